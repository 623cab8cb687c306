"""
Generate text with a checkpoint: the teacher, a hybrid that distill.py made, or any directory that model.py reads.

    python sample.py --prompt "Tom has 3 apples and buys 4 more. How many apples does Tom have?"
    python sample.py --model out/h25 --prompt-file questions.txt --json > answers.jsonl
    python sample.py --model out/h25 --chat

The text goes to stdout, everything else (speed, bytes, warnings, progress) to stderr. A transformer's key/value cache
grows with every token; the recurrent state of a Mamba layer does not: the last line shows both.
"""
import argparse
import codecs
import json
import sys
import time

import torch
from tqdm import tqdm

from model import (UserError, choose_threads, format_prompt, join_projections, load_pretrained, load_tokenizer,
                   run_main, scan_backend_reason, start_script, sync)


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="teacher", help="checkpoint directory (default: teacher)")
    # What to ask. One of the three; the default is --prompt with an empty text.
    add("--prompt", default=None, help="one question")
    add("--prompt-file", help="a file with one prompt per line, - for standard input; all lines run as one batch")
    add("--chat", action="store_true", help="a conversation on standard input; the state is kept between turns")
    add("--raw", action="store_true", help="continue the prompt as it is. Default: <s>[INST] prompt [/INST], for every "
        "checkpoint; for one with another chat template write that template into the prompt and add --raw")
    add("--num-samples", type=int, default=1, help="answers per prompt, all from one prefill (default: 1)")
    # How to draw.
    add("--max-new-tokens", type=int, default=512, help="at most this many tokens per answer (default: 512)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    add("--top-k", type=int, default=0, help="draw among the k likeliest tokens; 0: all (default: 0)")
    add("--top-p", type=float, default=1.0, help="draw among the smallest set with this probability (default: 1)")
    add("--seed", type=int, default=0, help="same seed, same text, alone or in a batch (default: 0)")
    # How to compute.
    add("--prefill-chunk", type=int, default=2048, help="tokens of the prompt per forward (default: 2048)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", default="auto", help="float32 or bfloat16 (default: bfloat16 on cuda, else float32)")
    add("--json", action="store_true", help="one JSON object per answer on stdout: prompt, text, tokens (a count), "
        "ids, prefill_tokens_per_s, decode_tokens_per_s (whole batch), kv_bytes, state_bytes (one text, as allocated)")
    args = p.parse_args()
    if sum((args.prompt is not None, args.prompt_file is not None, args.chat)) > 1:
        raise UserError("give one of --prompt, --prompt-file and --chat")
    for flag, value, ok, wanted in (
            ("--num-samples", args.num_samples, args.num_samples >= 1, "at least 1"),
            ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
            ("--temperature", args.temperature, 0 <= args.temperature < float("inf"), "0 or more"),
            ("--top-k", args.top_k, args.top_k >= 0, "0 or more"),
            ("--top-p", args.top_p, 0 < args.top_p <= 1, "in (0, 1]"),
            ("--prefill-chunk", args.prefill_chunk, args.prefill_chunk >= 1, "at least 1")):
        if not ok:
            raise UserError(f"{flag} must be {wanted}, got {value}")
    if args.chat and (args.num_samples > 1 or args.raw or args.json):
        raise UserError("--chat goes without --num-samples, --raw and --json")
    return args


def read_prompts(args):
    """-> the list of prompts that the flags name."""
    if args.prompt_file is None:
        return [args.prompt or ""]
    try:
        with open(0 if args.prompt_file == "-" else args.prompt_file, encoding="utf-8") as f:
            lines = f.read().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {args.prompt_file}: {getattr(e, 'strerror', None) or e}") from None
    if lines == [""]:
        raise UserError(f"{args.prompt_file} is empty")
    return lines


def encode(enc, config, text, raw):
    """A prompt -> its ids, at least one. An empty raw prompt is the begin token alone."""
    ids = enc.encode(text if raw else format_prompt(text), allowed_special="all")
    if not ids and config.bos_id is None:
        raise UserError("an empty prompt needs a begin token, and this checkpoint has none")
    ids = ids or [config.bos_id]
    if max(ids) >= config.vocab_size:
        raise UserError(f"the tokenizer makes id {max(ids)}, but the model knows only {config.vocab_size} tokens")
    return ids


def token_bytes(enc, token):
    """Bytes of one token. Embedding tables may be padded beyond the tokenizer: such an id shows as U+FFFD."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def warn_length(tokens, config):
    if tokens > config.max_length:
        print(f"warning: {tokens} tokens of context, trained on {config.max_length}: it may get worse", file=sys.stderr)


def answer(model, enc, args, logits, state, streams, show=None):
    """Draw from logits (b, vocab_size) on, until every row met a stop token or its length. streams (b): which random
    stream each row uses. show(text) is called with the newest text of row 0. -> ids per row (without the stop token),
    the State and the token of row 0 that it does not hold yet, and timings."""
    stop, rows = set(model.config.eos_ids), len(logits)
    outputs, done, times = [[] for _ in range(rows)], [False] * rows, []
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")           # holds back the bytes of a cut character
    tokens = model.decode(logits, state, args.temperature, args.top_k, args.top_p,
                          args.seed, streams)
    bar = tqdm(total=args.max_new_tokens, unit="step", leave=False, disable=bool(show) or not sys.stderr.isatty())
    while not all(done):
        token, state = next(tokens)
        token = token.tolist()                                               # waits for the device
        times.append(time.perf_counter())
        for i in range(rows):
            done[i] = done[i] or token[i] in stop
            if not done[i]:
                outputs[i].append(token[i])
                if i == 0 and show:
                    show(utf8.decode(token_bytes(enc, token[i])))
                done[i] = len(outputs[i]) >= args.max_new_tokens
        bar.update()
    bar.close()
    if show:
        show(utf8.decode(b"", final=True))
    made = sum(map(len, outputs)) - sum(1 for ids in outputs if ids)         # the first token belongs to the prefill
    rate = made / (times[-1] - times[0]) if made and len(times) > 1 else None
    return outputs, state, token[0], {"first": times[0], "decode_tokens_per_s": rate}


def report(n_prompt, seconds, n_new, start, timing, state, rows):
    """The figures of one run, on stderr. Rates are those of the whole batch."""
    kv, ssm = state.nbytes()
    rate = timing["decode_tokens_per_s"]
    print(f"prefill {n_prompt} tokens, {n_prompt / seconds:.0f} tokens/s; first token after "
          f"{timing['first'] - start:.3f} s; decode {n_new} tokens, {'-' if rate is None else f'{rate:.0f}'} tokens/s\n"
          f"{rows} text{'s' * (rows > 1)} of at most {state.max_length} tokens: KV cache {kv / 1e6:.3f} MB, "
          f"recurrent state {ssm / 1e6:.3f} MB", file=sys.stderr)


def show_text(text):
    print(text, end="", flush=True)


def sample(model, enc, args, device):
    """All prompts in one batch, --num-samples answers each."""
    prompts, n = read_prompts(args), args.num_samples
    ids = [encode(enc, model.config, prompt, args.raw) for prompt in prompts]
    print(scan_backend_reason(device), file=sys.stderr)                      # now that the prompts are known to be good
    warn_length(max(map(len, ids)), model.config)
    start = time.perf_counter()
    logits, state = model.prefill(ids, args.max_new_tokens, args.prefill_chunk)
    sync(device)
    seconds, n_prompt = time.perf_counter() - start, sum(map(len, ids))
    if n > 1:                                                                # each prompt is read once, then copied
        rows = [row for row in range(len(ids)) for _ in range(n)]
        logits, state = logits[rows], state.rows(rows)
    single = len(ids) * n == 1 and not args.json
    outputs, state, _, timing = answer(model, enc, args, logits, state, [i % n for i in range(len(ids) * n)],
                                       show_text if single else None)
    kv, ssm = (size // len(outputs) for size in state.nbytes())
    for i, new in enumerate(outputs):
        text = b"".join(token_bytes(enc, token) for token in new).decode("utf-8", errors="replace")
        if args.json:
            print(json.dumps({
                "prompt": prompts[i // n], "text": text, "tokens": len(new), "ids": new,
                "prefill_tokens_per_s": n_prompt / seconds, "decode_tokens_per_s": timing["decode_tokens_per_s"],
                "kv_bytes": kv, "state_bytes": ssm}, ensure_ascii=False))
        elif not single:
            print(f"--- {prompts[i // n]}\n{text}")
    print(end="\n" if single else "")
    warn_length(state.position if state.position > max(map(len, ids)) else 0, model.config)
    report(n_prompt, seconds, sum(map(len, outputs)), start, timing, state, len(outputs))


def chat(model, enc, args, device):
    """One conversation. Between turns only the new question is read: the state holds all that was said before."""
    state, pending = None, []                                                # tokens that the state does not hold yet
    stop = model.config.eos_ids
    print(scan_backend_reason(device), file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline()
        if not question:
            break
        text = format_prompt(question.strip())
        new = encode(enc, model.config, text if state is None else text.removeprefix("<s>"), raw=True)
        start, room = time.perf_counter(), args.max_new_tokens + 1
        if state is not None and state.position + len(pending + new) + room > state.max_length:
            state = state.resize(2 * (state.position + len(pending + new) + room))
        logits, state = model.prefill([pending + new], room, args.prefill_chunk, state)
        sync(device)
        seconds = time.perf_counter() - start
        outputs, state, last, timing = answer(model, enc, args, logits, state, [0], show_text)
        pending = [last] if last in stop or not stop else [last, stop[0]]    # an answer cut short is closed, too
        print()
        warn_length(state.position, model.config)
        report(len(new), seconds, len(outputs[0]), start, timing, state, 1)


def main():
    args = parse_args()
    device, dtype = start_script(args)
    torch.backends.cuda.enable_cudnn_sdp(False)                              # cuDNN makes a plan for every new length
    model = join_projections(load_pretrained(args.model, device, dtype))
    enc = load_tokenizer(args.model)
    choose_threads(model, device)
    with torch.inference_mode():
        (chat if args.chat else sample)(model, enc, args, device)


if __name__ == "__main__":
    run_main(main)
