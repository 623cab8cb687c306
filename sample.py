"""
Generate text with a checkpoint: the teacher, a hybrid that distill.py made, or any directory that model.py reads.

    python sample.py --prompt "Tom has 3 apples and buys 4 more. How many apples does Tom have?"
    python sample.py --model out/h25 --prompt-file questions.txt --json > answers.jsonl
    python sample.py --model out/h25 --chat
    python sample.py --model out/smollm2 --prompt-file smollm2/prompts.txt --temperature 0.7 --traces out/traces.jsonl

The text goes to stdout, everything else (speed, bytes, warnings, progress) to stderr. A transformer's key/value cache
grows with every token; the recurrent state of a Mamba layer does not: the report at the end shows both.
"""
import argparse
import codecs
import dataclasses
import hashlib
import json
import os
import sys
import time
from typing import NamedTuple

import model as nano         # before torch: it says how threads wait
import torch
from tqdm import tqdm

from model import UserError, load_pretrained, load_tokenizer, run_main, start_script


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = p.add_argument
    add("--model", default="teacher", help="checkpoint directory (default: teacher)")
    # What to ask. One of the three; the default is --prompt with an empty text.
    add("--prompt", help="one question")
    add("--prompt-file", metavar="FILE",
        help="prompts; - for standard input. A text file: one question per line. x.jsonl, "
             "x.jsonl.gz: the records that train_sft.py reads. Of messages the last turn of the user is asked; "
             "a prompt is taken to the letter, as in training; what is answered there is ignored")
    add("--chat", action="store_true",
        help="a conversation on standard input, one line per turn. The state is kept between turns "
             "where the template only adds to what was said; else all is read again")
    add("--raw", action="store_true",
        help="continue the prompts as they are, behind the begin token where this tokenizer puts "
             "one before every text (Llama 3). Default: ask, with the checkpoint's own chat template")
    add("--num-samples", type=int, default=1, metavar="N",
        help="answers per prompt, all from one prefill (default: 1)")
    # How to draw.
    add("--max-new-tokens", type=int, default=512, metavar="N",
        help="at most this many tokens per answer (default: 512)")
    add("--temperature", type=float, default=0.0, metavar="T",
        help="0 takes the likeliest token (default: 0)")
    add("--top-k", type=int, default=0, metavar="K",
        help="draw among the K likeliest tokens; 0: all (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="draw among the fewest tokens that have this probability together (default: 1)")
    add("--seed", type=int, default=0, metavar="N",
        help="same seed, same text, alone or in a batch (default: 0)")
    # How to compute.
    add("--batch", type=int, default=32, metavar="N",
        help="answers that are written at the same time (default: 32)")
    add("--prefill-chunk", type=int, metavar="N",
        help="tokens of each prompt per forward (default: 8192 over all prompts, at least 1024)")
    add("--device", default="auto",
        help="cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", default="auto",
        help="float32 or bfloat16 (default: bfloat16 on cuda, else float32)")
    # What to write.
    add("--json", action="store_true",
        help="one JSON object per answer: prompt, text, tokens (a count), ids, "
             "prefill_tokens_per_s, decode_tokens_per_s (whole batch), kv_bytes, state_bytes (one text, as allocated)")
    add("--traces", metavar="FILE",
        help="write nothing but FILE: JSON lines of prompt and response with all their tags, as "
             "--data of distill.py and train_sft.py reads them. The same command again goes on where "
             "it stopped")
    add("--keep-cut", action="store_true",
        help="with --traces: keep answers that --max-new-tokens cut, marked \"cut\": they are trained without "
             "the token that ends an answer (default: they are left out and counted)")
    args = p.parse_args()
    check_args(args)
    return args


def check_args(args):
    if sum((args.prompt is not None, args.prompt_file is not None, args.chat)) > 1:
        raise UserError("give one of --prompt, --prompt-file and --chat")
    for flag in ("--num-samples", "--max-new-tokens", "--batch", "--prefill-chunk"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    # Logits divided by less would leave float32.
    if args.temperature != 0 and not 1e-6 <= args.temperature < float("inf"):
        raise UserError(f"--temperature must be 0, or 0.000001 or more, got {args.temperature}")
    if args.top_k < 0:
        raise UserError(f"--top-k must be 0 or more, got {args.top_k}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must be in (0, 1], got {args.top_p}")
    if args.chat and (args.num_samples > 1 or args.raw or args.json or args.traces):
        raise UserError("--chat goes without --num-samples, --raw, --json and --traces")
    if args.traces and args.json:
        raise UserError("give one of --json and --traces")
    if args.traces and args.num_samples > 1 and args.temperature == 0:
        raise UserError("--num-samples without --temperature: all answers to a prompt are the same")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        raise UserError("--top-k and --top-p belong to a --temperature above 0")
    if args.traces and not args.traces.endswith(".jsonl"):
        raise UserError(f"--traces writes JSON lines: call the file {args.traces}.jsonl")
    if args.keep_cut and not args.traces:
        raise UserError("--keep-cut belongs to --traces")


# ----------------------------------------------------------------------------------------------------------------------
# Prompts.

class Prompt(NamedTuple):
    asked: str                               # as the user wrote it
    text: str                                # as the model sees it, but for the begin token of a text
    ids: list


def read_inputs(args):
    """-> for each prompt a text that is to be continued, or the messages that ask for an answer."""
    file = args.prompt_file
    if file and file.endswith((".jsonl", ".jsonl.gz")):
        inputs = list(nano.read_records(file, nano.read_question))
        if not inputs:
            raise UserError(f"{file} is empty")
        if args.raw and not all(isinstance(asked, str) for asked in inputs):
            raise UserError(f"--raw continues texts, and {file} holds messages")
        return [asked if isinstance(asked, str) else as_messages(asked) for asked in inputs]
    lines = read_text(file) if file else [args.prompt or ""]
    return lines if args.raw else [as_messages([nano.Turn("user", line, False)]) for line in lines]


def warn_plain(inputs, chat):
    """Say so where texts of records, which are taken to the letter, are no prompts of this chat template."""
    texts = [asked for asked in inputs if isinstance(asked, str)]
    if not texts or chat.refusal is not None:
        return
    question = "a question such as no template has"
    try:
        whole = chat.prompt([{"role": "user", "content": question}])
    except UserError:
        # A template that wants more than a question: then nothing can be said.
        return
    _, _, after = whole.partition(question)
    # What ends a question: <|im_end|>, [/INST], ...
    mark = after.strip().split("\n")[0]
    if mark and not any(mark in text for text in texts):
        print(f"warning: prompts of records are taken to the letter, and none has the chat template's {mark!r}: "
              'to ask questions, write {"messages": [{"role": "user", "content": ...}]}', file=sys.stderr)


def as_messages(turns):
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def read_text(file):
    """-> the lines of a text file."""
    try:
        # utf-8-sig skips the mark with which some editors begin a file.
        with open(0 if file == "-" else file, encoding="utf-8-sig") as f:
            lines = f.read().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {file}: {getattr(e, 'strerror', None) or e}") from None
    if lines == [""]:
        raise UserError(f"{file} is empty")
    return lines


def make_prompt(asked, args, model, enc, chat):
    """An input -> Prompt. Before a text comes what this tokenizer puts before every text."""
    if isinstance(asked, str):
        # Not as one text: to some tokenizers only what begins a text begins with a space.
        begin = [] if asked.startswith(enc.decode(enc.begin)) else enc.begin
        return Prompt(asked, asked, encode(enc, model.config, asked, begin))
    text = chat.prompt(asked)
    return Prompt(asked[-1]["content"], text, encode(enc, model.config, text))


def encode(enc, config, text, begin=()):
    """A text -> its ids behind those of begin, at least one: an empty text is the begin token alone."""
    ids = [*begin, *enc.encode(text, allowed_special="all")]
    if not ids and config.bos_id is None:
        raise UserError("an empty prompt needs a begin token, and this checkpoint has none")
    ids = ids or [config.bos_id]
    if max(ids) >= config.vocab_size:
        raise UserError(f"the tokenizer makes id {max(ids)}, the model knows {config.vocab_size}")
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# Tokens to text.

def token_bytes(enc, token):
    """Bytes of one token. Embedding tables may be padded beyond the tokenizer: such an id shows as U+FFFD."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def text_of(enc, ids):
    """The text of these tokens. Bytes that are no UTF-8, as in half a character, show as U+FFFD."""
    return b"".join(token_bytes(enc, token) for token in ids).decode("utf-8", errors="replace")


class Printer:
    """Shows a text while it is made, token by token. The bytes of a character wait until it is complete."""
    def __init__(self, enc):
        self.enc = enc
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token):
        print(self.utf8.decode(token_bytes(self.enc, token)), end="", flush=True)

    def close(self):
        print(self.utf8.decode(b"", final=True))


# ----------------------------------------------------------------------------------------------------------------------
# Answers. Answer number r is sample r % num_samples to prompt r // num_samples; its random stream is that sample's.

@dataclasses.dataclass
class Answer:
    ids: list                                # without the token that ended it
    end: int | None = None                   # that token; None: cut at --max-new-tokens


class Speed(NamedTuple):
    """Tokens and seconds of one batch. The first token of an answer comes from the prefill, the others are decoded."""
    read: int
    read_seconds: float
    written: int
    decoded: int
    decode_seconds: float

    def prefill_rate(self):
        return self.read / self.read_seconds

    def decode_rate(self):
        """Tokens per second of the whole batch, None where no token was decoded."""
        return self.decoded / self.decode_seconds if self.decoded else None


def write_answers(model, args, device, prompts, numbers, bar, printer=None):
    """One batch: the answers with these numbers. bar moves on with every finished one; printer shows the text of a
    single one while it is made. -> a list of Answers, their Speed, and the State in which they were begun."""
    n = args.num_samples
    # Each prompt is read once, however many samples of it there are.
    asked = sorted({number // n for number in numbers})
    began = time.perf_counter()
    ids = [prompts[i].ids for i in asked]
    logits, state = model.prefill(ids, args.max_new_tokens, args.prefill_chunk)
    nano.sync(device)
    read_seconds = time.perf_counter() - began
    rows = [asked.index(number // n) for number in numbers]
    if len(rows) > len(asked):
        logits = logits[rows]
        state = state.rows(rows)
    answers = [Answer([]) for _ in rows]
    streams = [number % n for number in numbers]
    steps = model.answers(logits, state, args.max_new_tokens, model.config.eos_ids,
                          temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                          seed=args.seed, streams=streams)
    times = []
    written = 0
    for new in steps:
        times.append(time.perf_counter())
        for row, token in new:
            answer = answers[row]
            if token in model.config.eos_ids:
                answer.end = token
            else:
                answer.ids.append(token)
                written += 1
                if printer:
                    printer.put(token)
            if answer.end is not None or len(answer.ids) == args.max_new_tokens:
                bar.update()
        bar.set_postfix_str(f"{written / (times[-1] - began):.0f} tokens/s", refresh=False)
    firsts = sum(len(answer.ids) > 0 for answer in answers)
    speed = Speed(sum(map(len, ids)), read_seconds, written, written - firsts, times[-1] - times[0])
    return answers, speed, state


def report(speed, state, rows):
    """The figures of a run, on stderr. Rates are those of the whole batch."""
    kv, ssm = state.nbytes()
    rate = speed.decode_rate()
    print(f"prefill {speed.read} tokens in {speed.read_seconds:.3f} s, "
          f"{speed.prefill_rate():.0f} tokens/s; decode {speed.written} tokens, "
          f"{'-' if rate is None else round(rate)} tokens/s", file=sys.stderr)
    print(f"{rows} text{'s' * (rows > 1)} of at most {state.max_length} tokens: "
          f"KV cache {kv / 1e6:.3f} MB, recurrent state {ssm / 1e6:.3f} MB", file=sys.stderr)


def warn_length(tokens, config):
    """-> whether there was a reason to warn."""
    if tokens <= config.max_length:
        return False
    print(f"warning: {tokens} tokens of context, trained on {config.max_length}: "
          "it may get worse", file=sys.stderr)
    return True


def sample(model, enc, args, device, prompts):
    """All prompts, --num-samples answers each, --batch answers at a time."""
    count = len(prompts) * args.num_samples
    longest = max(len(prompt.ids) for prompt in prompts) + args.max_new_tokens
    check_room(model, min(args.batch, count), longest, device)
    traces = TraceFile(args, model, enc, prompts, device) if args.traces else None
    begin = traces.note["done"] if traces else 0
    # What follows takes time: prompts and file are known to be good by now.
    print(nano.scan_backend_reason(device), file=sys.stderr)
    warned = warn_length(max(len(prompt.ids) for prompt in prompts), model.config)
    alone = count == 1 and not args.json and not traces
    printer = Printer(enc) if alone else None
    hidden = alone or not sys.stderr.isatty()
    speeds = []
    with tqdm(total=count, initial=begin, unit=" answers", leave=False, disable=hidden) as bar:
        for low in range(begin, count, args.batch):
            numbers = range(low, min(low + args.batch, count))
            answers, speed, state = write_answers(model, args, device, prompts, numbers, bar, printer)
            speeds.append(speed)
            asked = [prompts[number // args.num_samples] for number in numbers]
            if traces:
                traces.add(asked, answers)
            elif args.json:
                print_json(enc, asked, answers, speed, state)
            elif alone:
                printer.close()
            else:
                print_texts(enc, asked, answers)
            contexts = [len(prompt.ids) + len(answer.ids) for prompt, answer in zip(asked, answers)]
            warned = warned or warn_length(max(contexts), model.config)
    if speeds:
        report(Speed(*(sum(values) for values in zip(*speeds))), state, len(answers))
    if traces:
        traces.report()


def check_room(model, rows, length, device):
    """Raises UserError if caches for so many texts of so many tokens exceed the memory that the device has."""
    small = sum(model.new_state(1, 1).nbytes())
    per_token = sum(model.new_state(1, 2).nbytes()) - small
    needed = rows * (small + (length - 1) * per_token)
    if needed > nano.memory_bytes(device):
        raise UserError(f"caches of {rows} texts of {length} tokens need {needed / 1e9:.3g} GB: take a smaller "
                        "--max-new-tokens or --batch")


def print_texts(enc, prompts, answers):
    for prompt, answer in zip(prompts, answers):
        print(f"--- {prompt.asked}\n{text_of(enc, answer.ids)}", flush=True)


def print_json(enc, prompts, answers, speed, state):
    kv, ssm = state.nbytes()
    for prompt, answer in zip(prompts, answers):
        row = {
            "prompt": prompt.asked,
            "text": text_of(enc, answer.ids),
            "tokens": len(answer.ids),
            "ids": answer.ids,
            "prefill_tokens_per_s": speed.prefill_rate(),
            "decode_tokens_per_s": speed.decode_rate(),
            "kv_bytes": kv // len(answers),
            "state_bytes": ssm // len(answers),
        }
        print(json.dumps(row, ensure_ascii=not utf8_output()), flush=True)


def utf8_output():
    """Can stdout show every character? If not, JSON has escapes of its own."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


# ----------------------------------------------------------------------------------------------------------------------
# Traces. A run of hours must survive Ctrl-C, a full disk and a crash. After every batch its rows are appended to FILE,
# and only then FILE.run.json is replaced, which says how many answers are done and how many bytes of FILE hold them.
# Going on begins with cutting FILE to these bytes: half a line, or rows of a batch that was not noted, come again.

class TraceFile:
    def __init__(self, args, model, enc, prompts, device):
        """Raises UserError for a FILE that was begun otherwise: it would hold answers of two kinds."""
        self.path = args.traces
        self.note_path = args.traces + ".run.json"
        self.enc = enc
        self.keep_cut = args.keep_cut
        texts = json.dumps([prompt.text for prompt in prompts]).encode()
        run = {"model": nano.weights_hash(model), "prompts": hashlib.sha256(texts).hexdigest()[:16]}
        for flag in ("num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed",
                     "keep_cut"):
            run[flag] = getattr(args, flag)
        self.note = {"run": run, "done": 0, "bytes": 0, "rows": 0, "cut": 0, "broken": 0}
        self.note |= {"path": args.model, "prompt_file": args.prompt_file, **nano.provenance(device)}
        if os.path.exists(self.note_path):
            self.note |= self.read_note(run)
        elif os.path.exists(self.path):
            raise UserError(f"{self.path} is there already, but not {self.note_path}: "
                            "choose another --traces")
        self.append("")

    def read_note(self, run):
        """-> what an earlier run has noted."""
        note = nano.read_json(self.note_path, dict)
        for key, now in run.items():
            before = note.get("run", {}).get(key)
            if before != now:
                raise UserError(f"{self.path} was begun with {key} = {before}, now it is {now}: "
                                "choose another --traces")
        return note

    def add(self, prompts, answers):
        """Append the answers that are whole texts, and note it."""
        lines = []
        for prompt, answer in zip(prompts, answers):
            ids = answer.ids if answer.end is None else answer.ids + [answer.end]
            text = self.read_back(ids)
            if answer.end is None and not self.keep_cut:
                self.note["cut"] += 1
            elif "\ufffd" in text:
                self.note["broken"] += 1
            else:
                row = {"prompt": prompt.text, "response": text}
                if answer.end is None:
                    row["cut"] = True
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        self.note["done"] += len(answers)
        self.note["rows"] += len(lines)
        self.append("".join(lines))

    def read_back(self, ids):
        """The text that is these ids again when it is encoded. Some tokenizers (SentencePiece) put a space in front of
        whatever they encode: one that stands there already is left out."""
        text = text_of(self.enc, ids)
        shorter = text.removeprefix(" ")
        if self.enc.encode(text, allowed_special="all") != ids == self.enc.encode(shorter, allowed_special="all"):
            return shorter
        return text

    def append(self, text):
        """Raises UserError where the file cannot be written, or is shorter than it was."""
        # A lone surrogate is no UTF-8, but its escape is JSON.
        data = text.encode("utf-8", errors="backslashreplace")
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with open(self.path, "a+b") as f:
                size = f.seek(0, os.SEEK_END)
                if size < self.note["bytes"]:
                    raise UserError(f"{self.path} holds {size} bytes, {self.note_path} noted "
                                    f"{self.note['bytes']}: delete both to begin anew")
                f.truncate(self.note["bytes"])
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            self.note["bytes"] += len(data)
            nano.write_json(self.note_path, self.note)
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}; "
                            "the same command goes on from the batch before") from None

    def report(self):
        note = self.note
        print(f"{self.path}: {note['rows']} traces of {note['done']} answers; left out: "
              f"{note['cut']} that --max-new-tokens cut, {note['broken']} with half a character",
              file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# A conversation. What the model sees is always the template's rendering of all messages so far, as one prompt. The
# state of the turn before is of use if it has read exactly the beginning of that: then only the rest must be read.
# Templates that drop the thoughts of earlier turns make it useless.

def converse(model, enc, args, device, chat):
    messages = []
    state = None
    # The ids that the state has read.
    known = []
    # The answer, and the token that the template puts behind it.
    room = args.max_new_tokens + 1
    check_room(model, 1, room, device)
    print(nano.scan_backend_reason(device), file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline()
        if not question:
            break
        messages.append({"role": "user", "content": question.strip()})
        ids = encode(enc, model.config, chat.prompt(messages))
        if ids[:len(known)] != known:
            state = None
            known = []
        elif state is not None and len(ids) + room > state.max_length:
            state = state.resize(2 * (len(ids) + room))
        began = time.perf_counter()
        logits, state = model.prefill([ids[len(known):]], room, args.prefill_chunk, state)
        nano.sync(device)
        read_seconds = time.perf_counter() - began
        new, state, seconds = speak(model, enc, args, logits, state)
        speed = Speed(len(ids) - len(known), read_seconds, len(new), max(0, len(new) - 1), seconds)
        # The last token of an answer that was cut is not read yet.
        known = (ids + new)[:state.position]
        messages.append({"role": "assistant", "content": text_of(enc, new)})
        warn_length(state.position, model.config)
        report(speed, state, 1)


def speak(model, enc, args, logits, state):
    """Show one answer while it is made. -> its ids, without the token that ended it, the State that has read all but
    the token drawn last, and the seconds from the first token on."""
    printer = Printer(enc)
    new = []
    began = None
    steps = model.decode(logits, state, args.temperature, args.top_k, args.top_p, args.seed)
    for token, state in steps:
        token = token.item()
        began = began or time.perf_counter()
        if token in model.config.eos_ids:
            break
        new.append(token)
        printer.put(token)
        if len(new) == args.max_new_tokens:
            break
    printer.close()
    return new, state, time.perf_counter() - began


def next_command(args, config):
    half = max(1, config.layout.count("t") // 2)
    if args.traces:
        return f"python distill.py --teacher {args.model} --replace {half} --data {args.traces}"
    if "t" in config.layout and "m2" not in config.layout:
        return f"python distill.py --teacher {args.model} --replace {half}"
    if set(config.layout) == {"n"}:
        return f"python sample.py --model {args.model} --chat"
    return f"python bench.py --model {args.model}"


def main():
    args = parse_args()
    device, dtype = start_script(args)
    # cuDNN makes a plan for every new length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that lacks a character shows its number.
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdin, "reconfigure"):
        # What is no UTF-8 shows as U+FFFD, and does not end a conversation.
        sys.stdin.reconfigure(errors="replace")
    inputs = [] if args.chat else read_inputs(args)
    model = nano.join_projections(load_pretrained(args.model, device, dtype))
    enc = load_tokenizer(args.model)
    chat = nano.load_chat(args.model, enc, nano.FIXED_DATE if args.traces else None)
    nano.choose_threads(model, device)
    try:
        with torch.inference_mode():
            if args.chat:
                converse(model, enc, args, device, chat)
            else:
                if not args.raw:
                    warn_plain(inputs, chat)
                prompts = [make_prompt(asked, args, model, enc, chat) for asked in inputs]
                sample(model, enc, args, device, prompts)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads our output has enough, as in sample.py | head -1. The rest goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except KeyboardInterrupt:
        if args.traces:
            print(f"\n{args.traces} is kept: the same command goes on", file=sys.stderr)
        raise
    print(f"next: {next_command(args, model.config)}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
