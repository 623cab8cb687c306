"""
Make reasoning traces, and train a model on them: the teacher from scratch, or supervised fine-tuning of any checkpoint.

    python train_sft.py --scratch --layers 5 --steps 300 --out out/tiny      # a small model from nothing
    python train_sft.py --model out/h25 --steps 50 --out out/h25-sft         # fine-tune a hybrid on the built-in traces
    python train_sft.py --model DIR --data traces.jsonl --out out/mine       # ... or any checkpoint on your own
    python train_sft.py --model out/h30 --merge out/h30 --out out/h30-sft    # ... and average it with an earlier one

The first half of this file is also the library of distill.py: problems, batches, loss and evaluation.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import zlib
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as nano
from model import (UserError, autocast, claim_out, format_prompt, provenance, run_main, start_script,
                   uninterrupted)


# ----------------------------------------------------------------------------------------------------------------------
# The problems. Three families that stress different things: arithmetic in several steps, exact retrieval among
# distractors, and a state that changes. All are procedural and endless, and every answer can be checked.
#
# A trace thinks in steps that need one look-up or one small calculation each. A story is walked back from the question
# to a number that is given, then forward again: a trace that started at the far end would have to search in its head.
#
# One of each family, as question / trace / answer:
#   story       Dan has 8 fewer than Cara. Ivo has 8 more than Cara. Cara has 32 cards. How many cards does Ivo have?
#               Ivo 8 more than Cara. Cara 32 cards. Ivo 32 + 8 = 40.                                         40
#   retrieval   The kite has code 38 66 73. Mia owns the lamp. The lamp has code 64 13 77. What is the code of the
#               thing of Mia?              Mia lamp. lamp 64 13 77.                                           64 13 77
#   swaps       Finn has the cup. Jon has the rope. 1: Jon and Finn swap. What does Jon have?
#               1: Jon rope, Finn cup; Jon cup, Finn rope. Jon cup.                                           cup
# Retrieval is what a state of fixed size finds hardest: a cache keeps every fact, a state must choose what to keep.
#
# A problem belongs to a split by a hash of its text, so that no split ever sees another's problems, whatever the seed.

NAMES = "Ann Bob Cara Dan Eve Finn Gus Hana Ivo Jon Kim Leo Mia Ned Ola Pam Quin Rosa Sam Tess".split()
THINGS = "lamp box door cup ring book key coin hat drum map rope bell fork vase kite".split()
GOODS = "apples coins stamps cards shells beads".split()


def story(rng, size):
    """Who has how many? A chain of 1 to 4 comparisons, and up to 4 people who do not matter."""
    n_chain, n_extra = between(rng, 1, 4, size), between(rng, 0, 4, size)
    names, goods = rng.sample(NAMES, n_chain + 1 + n_extra), rng.choice(GOODS)
    value, fact, note, base = {}, {}, {}, {}                                 # by name; base: the person compared with
    for i, name in enumerate(names):
        other = names[i - 1] if 0 < i <= n_chain else None                   # the chain: each from the one before it
        if i > n_chain and rng.random() < 0.7:                               # somebody who does not matter
            other = rng.choice(names[:i])
        if other is None:
            value[name] = rng.randint(2, 60)
            fact[name] = f"{value[name]} {goods}"
            continue
        v, d = value[other], rng.randint(2, 9)
        # The bounds keep every number in 2 ... 99, where each is a single token (see make_tokenizer).
        kind = rng.choice(["twice"] * (v <= 49) + ["more"] * 2 * (v <= 90) + ["fewer"] * 2 * (v >= 12))
        value[name] = {"twice": 2 * v, "more": v + d, "fewer": v - d}[kind]
        fact[name] = f"twice as many as {other}" if kind == "twice" else f"{d} {kind} than {other}"
        sign = {"twice": f"{v} * 2", "more": f"{v} + {d}", "fewer": f"{v} - {d}"}[kind]
        note[name], base[name] = f"{name} {sign} = {value[name]}.", other
    target, walk = names[n_chain], [names[n_chain]]
    while walk[-1] in base:                                                  # back to somebody whose number is given
        walk.append(base[walk[-1]])
    question = " ".join(f"{name} has {fact[name]}." for name in rng.sample(names, len(names)))  # facts in random order
    back = [f"{name} {fact[name]}." for name in walk]                        # the way back; the rest goes forward
    return (f"{question} How many {goods} does {target} have?",
            " ".join(back + [note[name] for name in reversed(walk[:-1])]), str(value[target]))


def retrieval(rng, size):
    """Which code belongs to this thing, or to the thing that somebody owns? 3 to 9 codes of three numbers."""
    things, owners = rng.sample(THINGS, between(rng, 3, 9, size)), rng.sample(NAMES, between(rng, 2, 4, size))
    code = {thing: " ".join(str(rng.randint(10, 99)) for _ in range(3)) for thing in things}
    facts, thing = [f"The {thing} has code {code[thing]}." for thing in things], things[0]
    steps, question = f"{thing} {code[thing]}.", f"What is the code of the {thing}?"         # one look-up
    if rng.random() < 0.6:                                                   # two look-ups, one after the other
        facts += [f"{name} owns the {owned}." for name, owned in zip(owners, things)]
        steps, question = f"{owners[0]} {thing}. {steps}", f"What is the code of the thing of {owners[0]}?"
    return f"{' '.join(rng.sample(facts, len(facts)))} {question}", steps, code[thing]


def swaps(rng, size):
    """Who ends up with what? 2 to 5 people swap what they have, 1 to 6 times."""
    n = between(rng, 2, 5, size)                                             # people
    people = rng.sample(NAMES, n)
    has = dict(zip(people, rng.sample(THINGS, n)))
    question, steps = [f"{name} has the {has[name]}." for name in people], []
    for i in range(1, between(rng, 1, 6, size) + 1):
        a, b = rng.sample(people, 2)
        question.append(f"{i}: {a} and {b} swap.")
        # Before and after each swap: the state stands in the text, nothing must be tracked silently.
        steps.append(f"{i}: {a} {has[a]}, {b} {has[b]}; {a} {has[b]}, {b} {has[a]}.")
        has[a], has[b] = has[b], has[a]
    who = rng.choice(people)
    return f"{' '.join(question)} What does {who} have?", f"{' '.join(steps)} {who} {has[who]}.", has[who]


def between(rng, low, high, size):
    """A random size from low to high; size in (0, 1] lowers the upper end (a curriculum starts small)."""
    return rng.randint(low, low + round((high - low) * size))


FAMILIES = {"story": story, "retrieval": retrieval, "swaps": swaps}
SPLITS = {"test": (0, 1), "probe": (2,), "dev": (3,)}    # remainders of the hash modulo 64; all others are "train"


def split_of(question):
    """A question -> its split. crc32, because Python's own hash of a text differs from process to process."""
    remainder = zlib.crc32(question.encode()) % 64
    return next((split for split, held in SPLITS.items() if remainder in held), "train")


def problems(split, seed, size=1.0):
    """Endless (family, question, steps, answer), the families in turn. Same split and seed, same problems.
    seed: anything that can be printed; size in (0, 1]: 1 is a problem of full size."""
    rng = random.Random(f"{split} {seed}")                                   # a text: the same on every machine
    for family in itertools.cycle(FAMILIES):
        while True:
            question, steps, answer = FAMILIES[family](rng, size)            # for "test" some 32 tries, cheap ones
            if split_of(question) == split:
                break
        yield family, question, steps, answer


def problem_set(split, per_family, seed=0):
    """A list of different problems, per_family of each family. What is measured on must not hold one problem twice."""
    seen, counts = {}, dict.fromkeys(FAMILIES, 0)
    for p in problems(split, seed):
        if counts[p[0]] < per_family and p[1] not in seen:
            seen[p[1]] = p
            counts[p[0]] += 1
        if min(counts.values()) >= per_family:
            return list(seen.values())


def format_response(steps, answer):
    """The thoughts between tags, as reasoning models write them; </s> is what ends generation."""
    return f"<think> {steps}</think> {answer}</s>"      # the space makes the first word the token it is everywhere else


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer of the built-in traces: byte-level BPE, trained on them, stored as an ordinary tokenizer.json.

# 538 ids: 7 special tokens, 256 bytes and 275 merges. Names and things become one token each, and so does a number
# below 100: arithmetic is then a table that the MLPs can learn, and no digit has to be carried. The file has the form
# of a large model's, so whatever reads this teacher reads a real checkpoint.
SPECIAL = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"]         # ids 0 to 6
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"                      # words, short numbers, signs


def make_tokenizer(path, n_vocab=538, n_problems=300):
    """Train BPE on problems and write path/tokenizer.json (the Hugging Face form, which model.load_tokenizer reads).
    The two forms differ: tiktoken knows ids only, tokenizer.json wants for each token the pair it was merged from.
    The pair is found by encoding the token's bytes with the merges that are older than it: two parts are left."""
    from tiktoken._educational import bpe_train
    texts = (f"{q} {steps} {answer}" for _, q, steps, answer in itertools.islice(problems("train", 0), n_problems))
    numbers = " ".join(str(n) for n in range(100) for _ in range(20))        # every number below 100 becomes one token
    ranks = bpe_train("\n".join(texts) + " " + numbers, n_vocab - len(SPECIAL), PATTERN, visualise=None)
    character = {byte: c for c, byte in nano.byte_characters().items()}
    text = lambda token: "".join(character[byte] for byte in token)          # bytes as tokenizer.json writes them
    merges, rank = [], {}
    for token in sorted(ranks, key=ranks.get)[256:]:                         # the two parts that a token was made from
        pair = tuple(nano.bpe([bytes([byte]) for byte in token], rank))
        rank[pair] = len(rank)
        merges.append([text(part) for part in pair])
    vocab = {name: i for i, name in enumerate(SPECIAL)} | {text(t): i + len(SPECIAL) for t, i in ranks.items()}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    os.makedirs(path, exist_ok=True)
    nano.write_json(os.path.join(path, "tokenizer.json"), {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges}})
    nano.write_json(os.path.join(path, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False})


# ----------------------------------------------------------------------------------------------------------------------
# Examples and batches. An example is (ids, trained): token ids, and for each whether the loss counts it. Only what the
# assistant writes is trained. The parts of a text are encoded one by one, so the border is exact by construction.
#
# Batch number `step` depends on the seed and on `step` alone: a resumed run continues with exactly the batches that an
# uninterrupted one would have seen, and there is no loader state to save. Batches hold texts of similar length.

def encode_parts(enc, parts):
    """parts: [(text, trained)] -> (ids, trained flags), two lists of equal length.
    No token ever spans two parts. Encoding the whole text could merge the prompt's end with the response's start."""
    ids, trained = [], []
    for text, flag in parts:
        new = enc.encode(text, allowed_special="all")
        ids, trained = ids + new, trained + [flag] * len(new)
    return ids, trained


def encode_problem(enc, problem):
    """A problem as problems() yields it -> (ids, trained): the response is trained, the question is not."""
    _, question, steps, answer = problem
    return encode_parts(enc, [(format_prompt(question), False), (format_response(steps, answer), True)])


def parts_of(record):
    """One parsed JSONL line -> [(text, trained)]. {"prompt", "response"} is taken verbatim; {"messages"} goes through
    the template <s>[INST] user [/INST]assistant</s>, a system message in front of the first user message.
    Every assistant turn is trained. Another shape raises what Python raises; read_jsonl turns it into a UserError."""
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        return [(record["prompt"], False), (record["response"], True)]
    parts, system = [("<s>", False)], ""
    for message in record["messages"]:
        role, content = message["role"], message["content"]
        if role == "system":
            system = content + "\n\n"
        elif role == "user":
            parts.append((f"[INST] {system}{content} [/INST]", False))
            system = ""
        elif role == "assistant":
            parts.append((content + "</s>", True))
        else:
            raise KeyError(f"role {role!r}")
    return parts


def read_jsonl(path, enc, ctx, n_vocab):
    """A JSONL file -> (training examples, held-out examples: every 50th). Checks every line before anything is trained.
    Raises UserError with the line number; examples longer than ctx tokens are left out with a warning."""
    examples, long = [], 0
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    ids, trained = encode_parts(enc, parts_of(json.loads(line)))
                except (ValueError, KeyError, TypeError, AttributeError) as e:
                    raise UserError(f"{path}, line {number}: neither prompt and response nor messages ({e})") from None
                if not any(trained[1:]):                                     # the first token is never predicted
                    raise UserError(f"{path}, line {number}: there is no response to train on")
                if max(ids) >= n_vocab:                                      # or the embedding fails in mid-training
                    raise UserError(f"{path}, line {number}: token id {max(ids)}, the model knows {n_vocab}")
                examples.append((ids, trained))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8: {e}") from None
    kept = [e for e in examples if len(e[0]) <= ctx]
    if len(kept) < len(examples):
        print(f"warning: {len(examples) - len(kept)} of {len(examples)} examples exceed --ctx {ctx} tokens",
              file=sys.stderr)
    if len(kept) < 2:
        raise UserError(f"{path}: {len(kept)} usable examples of at most {ctx} tokens; two are needed")
    held = kept[::50]                                                        # at least one; never trained on
    return [e for i, e in enumerate(kept) if i % 50], held


def trace_block(enc, seed, size_at=lambda block: 1.0, split="train"):
    """-> a function (block number, count) -> count examples made from the built-in problems.
    size_at: block number -> size of its problems (a curriculum). Blocks do not depend on each other."""
    def block(number, count):
        stream = problems(split, f"{seed} {number}", size_at(number))
        return [encode_problem(enc, p) for p in itertools.islice(stream, count)]
    return block


# The paper reports that pretraining data failed where the teacher's own traces worked. generic_block is that experiment
# in miniature: the same sentences and lengths, but nothing in them that must be thought about.
def generic_block(enc, seed):
    """The same for generic text: the facts of training problems and nothing else, no question, no reasoning, no answer.
    Text number i is about as long as problem number i of trace_block with its trace; all of it is trained.

    Facts are added until the text is long enough and its own hash, too, says "train": as with the problems, no text of
    the held-out splits can come up, whatever the seed."""
    def facts(stream):
        for _, question, _, _ in stream:
            yield from (sentence.strip() for sentence in re.findall(r"[^.?]+\.", question))     # the question ends in ?

    def block(number, count):
        examples, more = [], facts(problems("train", f"{seed} {number} facts"))
        for like in itertools.islice(problems("train", f"{seed} {number}"), count):
            length, text, ids = len(encode_problem(enc, like)[0]), "", []
            while len(ids) < length or split_of(text) != "train":
                text = f"{text} {next(more)}".strip()
                ids, trained = encode_parts(enc, [("<s>", False), (f" {text}</s>", True)])
            examples.append((ids, trained))
        return examples
    return block


def list_block(examples, seed):
    """The same for a list of examples: epoch after epoch, each in its own random order.
    Example number i of the whole run lies in epoch i // len(examples): a block finds its place without a history."""
    def block(number, count):
        chosen = []
        for i in range(number * count, (number + 1) * count):
            epoch, place = divmod(i, len(examples))
            if not chosen or place == 0:
                order = random.Random(f"{seed} {epoch}").sample(range(len(examples)), len(examples))
            chosen.append(examples[order[place]])
        return chosen
    return block


# Padding is computed and thrown away, so rows of a batch should be about equally long. Sorting 16 batches together does
# that; sorting everything would make lengths, and with them the learning signal, a function of time.
PER_BLOCK = 16                                           # batches that are drawn together and sorted by length


def batches(block, batch, start=0):
    """Endless lists of `batch` examples of similar length, from batch number `start` on.
    The last line skips, when a run is resumed in the middle of a block, the batches that it has seen already."""
    for number in itertools.count(start // PER_BLOCK):
        examples = sorted(block(number, batch * PER_BLOCK), key=lambda e: len(e[0]))
        groups = [examples[i:i + batch] for i in range(0, len(examples), batch)]
        random.Random(number).shuffle(groups)                                # no order from short to long
        yield from groups[start % PER_BLOCK if number == start // PER_BLOCK else 0:]


def collate(examples, device):
    """[(ids, trained)] -> tokens (b, t), targets (b, t) int64: targets[i, j] is the token after tokens[i, j] if it is
    trained, else -1. The one place where labels and mask are shifted. Rows are padded on the right, which a causal
    model never sees; the mask comes from lengths, so a pad id that is also a real token does no harm."""
    longest = max(len(ids) for ids, _ in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full((len(examples), longest), -1)                       # -1 everywhere: nothing is trained
    for row, (ids, trained) in enumerate(examples):
        tokens[row, :len(ids)] = torch.tensor(ids)
        targets[row, :len(ids) - 1] = torch.where(torch.tensor(trained[1:]), torch.tensor(ids[1:]), -1)
    return tokens.to(device), targets.to(device)


def show_example(enc, example):
    """One example as text, the trained part in >>> <<<: what the loss counts should be seen once by a human."""
    runs = itertools.groupby(zip(*example), key=lambda pair: pair[1])        # neighbours with the same flag
    texts = [(flag, enc.decode([token for token, _ in run])) for flag, run in runs]
    return "".join(f">>>{text}<<<" if flag else text for flag, text in texts)


# ----------------------------------------------------------------------------------------------------------------------
# Loss and evaluation.
#
# Six tokens in ten belong to prompts and are not trained, so their logits are never made: the mask is applied to the
# hidden states, before the output layer. Losses are sums with a count beside them. Batches differ in their number of
# trained tokens, and the mean over all of them is the sum of sums over the sum of counts, not the mean of means.
# A problem counts as solved if the answer is right to the letter; its trace may take any way.

def cross_entropy(model, tokens, targets):
    """-> summed loss in nats (float32) over the trained tokens, their number, and the rows right throughout."""
    x, _ = model.hidden(tokens)                                              # (b, t, d_model)
    trained = targets >= 0                                                   # (b, t) bool
    logits = model.lm_head(x[trained]).float()                               # (trained tokens, vocab_size) only
    loss = F.cross_entropy(logits, targets[trained], reduction="sum")
    wrong = torch.zeros_like(targets, dtype=torch.bool)
    wrong[trained] = logits.argmax(-1) != targets[trained]                   # untrained places are never wrong
    return loss, int(trained.sum()), int((~wrong.any(dim=1)).sum())


def answer_of(text):
    """What a response says after its thoughts; all of it, if it never closed them."""
    return text.rpartition("</think>")[2].strip()


@torch.no_grad()
def solve(model, enc, problem_list, batch=128, max_new_tokens=192, note="solving"):
    """Greedy answers to problems. -> the response texts, in order. Batches hold prompts of similar length."""
    device = model.embed_tokens.weight.device
    prompts = [enc.encode(format_prompt(p[1]), allowed_special="all") for p in problem_list]
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None] * len(prompts)
    with tqdm(total=len(prompts), desc=note, unit="problem", leave=False) as bar:
        for i in range(0, len(order), batch):
            rows = order[i:i + batch]
            outputs = model.generate([prompts[row] for row in rows], max_new_tokens)
            for row, ids in zip(rows, outputs):
                texts[row] = enc.decode([i for i in ids if i <= enc.max_token_value])    # a model may know more ids
            bar.update(len(rows))
    return texts


def accuracy(problem_list, texts):
    """-> {family: share of problems with exactly the right answer}, and the pooled share (0 to 1)."""
    right = {}
    for (family, _, _, answer), text in zip(problem_list, texts):
        right.setdefault(family, []).append(answer_of(text) == answer)
    return {family: sum(r) / len(r) for family, r in right.items()}, sum(map(sum, right.values())) / len(problem_list)


# ----------------------------------------------------------------------------------------------------------------------
# Optimiser. Weight matrices inside the layers take Muon's step, everything else AdamW's.
#
# Muon (Jordan et al. 2024) replaces the gradient of a matrix, after momentum, by the nearest orthogonal matrix: every
# direction of the matrix moves by the same amount, also those whose gradient is small. It finds the copying circuits
# that these problems need in about half of AdamW's tokens. Five Newton-Schulz iterations approximate it, on all
# matrices of one shape at once. The factor 0.2 sqrt(larger side) gives a step the size of AdamW's, so one rate does.
#
# Newton-Schulz: an odd polynomial of x acts on the singular values of x alone and leaves its directions as they are.
# Jordan's 3.4445 s - 4.7750 s^3 + 2.0315 s^5 lifts a small s by 3.4 each time. It does not converge: after five rounds
# the values lie around 1, roughly between 0.7 and 1.2. That is good enough for a step, and far cheaper than an SVD.
# Embeddings are left to AdamW, as Jordan does it: a row of theirs is one token's own, and no direction of a map.

def orthogonalize(g):
    """g (n, rows, columns) -> about U V^T of each matrix's singular value decomposition, by Newton-Schulz.
    The polynomial needs singular values of at most 1; the Frobenius norm is never smaller than the largest of them."""
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]                                         # work on the shorter side: a is smaller
    x = x.mT if tall else x
    for _ in range(5):
        a = x @ x.mT                                                         # (n, s, s), s the shorter side
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters (rows, columns) only. One state per parameter: "momentum", of its shape;
    that is half of what AdamW keeps. 0.95 is Jordan's value."""
    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, same = group["lr"], group["momentum"], {}          # same: shape -> its parameters
            for p in group["params"]:
                if p.grad is not None:
                    same.setdefault(p.shape, []).append(p)
            for shape, params in same.items():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)           # buffer: running mean of gradients
                update = orthogonalize(torch.stack(torch._foreach_lerp(grads, buffers, momentum)))   # Nesterov's form
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])  # decoupled, as in AdamW
                torch._foreach_add_(params, list(update.unbind()), alpha=-0.2 * lr * max(shape) ** 0.5)


def make_optimizers(model, lr, weight_decay=0.05):
    """-> [Muon, AdamW] over the parameters that need a gradient. Weight decay only for Muon's matrices: not for
    embeddings, norms and biases, and not for A_log (a matrix by shape, but not by meaning), D, dt bias and conv."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrix = lambda name, p: p.ndim == 2 and name.startswith("layers.") and not nano.keeps_float32(name)
    groups = [[p for name, p in named if matrix(name, p) == flag] for flag in (True, False)]
    # beta2 0.98, not 0.999: a mean over 1000 steps would be longer than most runs here.
    kinds = (lambda ps: Muon(ps, lr, weight_decay), lambda ps: torch.optim.AdamW(ps, lr, (0.9, 0.98), weight_decay=0.0))
    return [kind(group) for kind, group in zip(kinds, groups) if group]


def learning_rate(step, steps, peak, warmup, floor=0.03, decay=0.4):
    """Linear warm-up, constant, and over the last `decay` of the steps linearly down to floor * peak.
    step counts from 0. A constant rate until late ("warm-up, stable, decay") suits runs whose length is a guess: the
    loss drops during the decay, and everything before it could be continued."""
    left = (steps - step) / max(1, decay * steps)
    return peak * min(1.0, (step + 1) / max(1, warmup), max(floor, left))


def clipped_step(model, optimizers, lr, clip=1.0):
    """Clip the gradient's norm, set the rate, step, clear. Raises UserError if the gradient is not finite.
    -> the norm over all parameters before clipping. It is checked before any weight is touched."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
    if not torch.isfinite(norm):
        raise UserError("the loss or its gradient is not finite (NaN); lower --lr. What was saved before is intact")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


# A run in progress is one safetensors file: weights and optimiser states as tensors, the rest as JSON in its header.
# One file, renamed into place, is all or nothing: weights of one step can never meet the optimiser state of another.
# There is no random state in it, because batches depend on seed and step alone, and no pickle, which could run code.

def save_progress(path, model, optimizers, meta):
    """model: the module being trained; meta: what else is needed, as JSON.
    Tensors are named kind|parameter: parameter names hold dots, but no bar. All is float32, as trained."""
    from safetensors.torch import save_file
    tensors = {f"weight|{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for name, p in model.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{key}|{name}"] = value.detach().contiguous()
    nano.write_atomic(path, lambda to: save_file(tensors, to, metadata={"meta": json.dumps(meta)}))


def load_progress(path, model, optimizers, run):
    """The reverse, into a model of the same shape. -> meta. meta["run"], what the run depends on, must equal run.
    Raises UserError, naming the flag, if it does not, and for a file that is broken or of another model."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as f, torch.no_grad():
            meta = json.loads(f.metadata()["meta"])
            for key in sorted(run):
                if meta["run"].get(key) != run[key]:
                    raise UserError(f"{path} was made with {key} = {meta['run'].get(key)}, now {key} = {run[key]}")
            states = {name: {} for name, _ in model.named_parameters()}
            for key in f.keys():
                kind, name = key.split("|")
                states[name][kind] = f.get_tensor(key)
            for name, p in model.named_parameters():
                p.copy_(states[name].pop("weight"))
                for optimizer in optimizers:
                    if states[name] and any(p is q for group in optimizer.param_groups for q in group["params"]):
                        # AdamW's step count lives on the CPU, whatever the device of its parameter.
                        optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in states[name].items()}
            return meta
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f"{path} does not continue this run: {e}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Training.
#
# A teacher of 50 layers has the depth of the paper's, so that H-25 ... H-40 mean the same, and the width of a toy.
# It has 2.2 M parameters: per layer 2 query heads that share 1 key/value head of 32, and an MLP of 160.
#
# Depth costs time, not steps, so a shallow model learns the skills and is made deep afterwards. For the first few
# hundred steps its loss sits near 0.7 nats a token; it falls fast once copying from the context is found.
#
# The stack of 10 layers is repeated five times, and recovers within fifty steps. The price: the first 10 layers go on
# doing the work and solve 43 of 48 problems alone, the attention of the others can go without a trace. Splitting each
# layer into five that share its work was tried, too: see "The teacher" in the README. Ten layers that count: see there.

TEACHER = nano.Config(vocab_size=538, d_model=64, n_layer=50, n_head=2, n_kv_head=1, head_dim=32, d_mlp=160,
                      tie_embeddings=True, max_length=512)


@torch.no_grad()
def init_weights(model):
    """For training from nothing: small embeddings with one large shared component, and sharp queries and keys.

    Positional attention ("look one token back") needs a part of the input that is the same for every token; without
    biases only the embedding can bring it. With it, copying from the context is found several times sooner."""
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.1)
    model.embed_tokens.weight[:, 0] += 0.3                                   # the shared component: channel 0
    for block in model.layers:
        for w in (block.mixer.q_proj.weight, block.mixer.k_proj.weight):
            w.mul_(1.8)                                                      # sharper attention from the start
        for w in (block.mixer.o_proj.weight, block.mlp.down_proj.weight):
            w.mul_(1.7 / math.sqrt(2 * len(model.layers)))                   # GPT-2's rule for residual branches


def resize(model, n_layer):
    """-> a deeper model: the stack of layers repeated as a whole; or a shallower one: its first n_layer layers. It is
    wrong at first and recovers within a few steps, while every layer goes on doing something (copies that start as zero
    would stay idle). Embedding, last norm and head are shared with the old model, not copied. Raises UserError if the
    stack does not fit a whole number of times, or if a layer is not attention."""
    old = len(model.layers)
    if n_layer < 1 or n_layer > old and n_layer % old or set(model.config.layout) != {"t"}:
        raise UserError(f"cannot make {n_layer} layers of {old}: only all-attention models, fewer or a whole multiple")
    new = nano.HybridLM(replace(model.config, n_layer=n_layer, layout=()))   # an empty layout: attention
    for i, block in enumerate(new.layers):
        block.load_state_dict(model.layers[i % old].state_dict())
    new.embed_tokens, new.norm, new.lm_head = model.embed_tokens, model.norm, model.lm_head
    return new


# ----------------------------------------------------------------------------------------------------------------------
# Merging: the average of two checkpoints that share an ancestor, weight by weight. The usual picture: fine-tuning moves
# a model a short way along a valley of the loss, and between its two ends the loss is no higher. The paper's H-30-SFT,
# the member that was released, is such an average. Two layouts cannot be averaged: a Mamba layer and an attention layer
# have no weights in common. That is found out before an hour of training, not after it.

def merge_partner(args, model):
    """-> the model to merge with (float32, CPU), or None without --merge. Raises UserError if it cannot be merged."""
    if not 0 <= args.merge_weight <= 1:
        raise UserError(f"--merge-weight must lie between 0 and 1, got {args.merge_weight}")
    if not args.merge:
        return None
    other = nano.load_pretrained(args.merge)
    differ = [f.name for f in fields(nano.Config) if getattr(other.config, f.name) != getattr(model.config, f.name)]
    if differ:
        raise UserError(f"--merge {args.merge}: it differs from the trained model in {', '.join(differ)}")
    return other


@torch.no_grad()
def merge(model, other, weight):
    """model becomes weight * model + (1 - weight) * other, in float32: bfloat16 would round half of the change away."""
    for p, q in zip(model.parameters(), other.parameters()):                 # same config: the same order of weights
        p.data = weight * p.float() + (1 - weight) * q.float().to(p.device)


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scratch", action="store_true", help="start from nothing, with the shape of the shipped teacher")
    p.add_argument("--model", help="start from this checkpoint directory")
    p.add_argument("--layers", type=int, help="with --scratch: layers (default 50); with --model: make this many of it")
    p.add_argument("--out", required=True, help="directory for the result")
    p.add_argument("--data", help="JSONL file of prompt/response or messages (default: the built-in traces)")
    p.add_argument("--steps", type=int, default=200, help="optimiser steps (default 200)")
    p.add_argument("--batch", type=int, default=32, help="texts per step (default 32)")
    p.add_argument("--ctx", type=int, default=512, help="longest text in tokens (default 512)")
    p.add_argument("--lr", type=float, help="peak learning rate (default 0.005 with --scratch, else 0.0005)")
    p.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up (default 50)")
    p.add_argument("--easy", type=float, default=0.0,
                   help="share of the steps during which built-in problems grow from small to full size (default 0)")
    p.add_argument("--eval", type=int, default=100, help="held-out problems per family (default 100; 0: none)")
    p.add_argument("--every", type=int, default=200, help="steps between saves (default 200)")
    p.add_argument("--merge", metavar="DIR", help="afterwards average the weights with those of this checkpoint")
    p.add_argument("--merge-weight", type=float, default=0.5, metavar="W",
                   help="result = W * trained + (1 - W) * DIR (default 0.5)")
    p.add_argument("--save-dtype", default="float32", choices=("float32", "bfloat16"), help="default float32")
    p.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    p.add_argument("--dtype", default="auto", help="of matrix products: auto, float32 or bfloat16 (default auto)")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run in --out, with the same flags")
    p.add_argument("--overwrite", action="store_true", help="replace a finished result in --out")
    return p.parse_args()


def start_model(args):
    """-> the model to train (float32, CPU) and its tokenizer; --out holds the tokenizer afterwards.
    Raises UserError unless exactly one of --scratch and --model is given."""
    if args.scratch == bool(args.model):
        raise UserError("pass either --scratch or --model DIR")
    torch.manual_seed(args.seed)
    if args.scratch:
        if not os.path.exists(os.path.join(args.out, "tokenizer.json")):
            print("training the tokenizer ...")
            make_tokenizer(args.out)
        model = nano.HybridLM(replace(TEACHER, n_layer=args.layers or TEACHER.n_layer, layout=()))
        init_weights(model)
        return model, nano.load_tokenizer(args.out)
    model, enc = nano.load_pretrained(args.model), nano.load_tokenizer(args.model)
    return (resize(model, args.layers) if args.layers else model), enc


def train(args, model, block, device, dtype):
    """The loop. -> list of log entries. Saves args.out/progress.safetensors every args.every steps and on Ctrl-C.
    An entry per 10 steps: step, mean loss in nats per trained token, tokens seen (padding included), seconds."""
    optimizers, start, log, began = make_optimizers(model, args.lr), 0, [], time.time()
    progress = os.path.join(args.out, "progress.safetensors")
    keys = ("model", "layers", "data", "steps", "batch", "ctx", "lr", "warmup", "easy", "seed")
    run = {key: getattr(args, key) for key in keys}
    if args.resume and os.path.exists(progress):
        meta = load_progress(progress, model, optimizers, run)
        start, log = meta["step"], meta["log"]
        began -= log[-1]["seconds"] if log else 0                            # the time of the earlier part counts, too
    # What is not in the log yet: tokens so far, and loss and trained tokens since its last entry.
    tokens_seen, *meter = meta["since"] if start else (0, 0.0, 0)
    save = lambda: save_progress(progress, model, optimizers,
                                 {"run": run, "step": start, "log": log, "since": [tokens_seen, *meter]})
    bar = tqdm(total=args.steps, initial=start, desc="training", unit="step")
    stream = batches(block, args.batch, start)
    try:
        for step in range(start, args.steps):
            tokens, targets = collate(next(stream), device)                  # (b, t) each
            with autocast(device, dtype):
                loss, count, _ = cross_entropy(model, tokens, targets)
            (loss / max(1, count)).backward()                                # the mean over this batch's tokens
            with uninterrupted():
                clipped_step(model, optimizers, learning_rate(step, args.steps, args.lr, args.warmup))
                start, tokens_seen = step + 1, tokens_seen + tokens.numel()
                meter = [meter[0] + loss.item(), meter[1] + count]
            bar.update()
            if (step + 1) % 10 == 0 or step + 1 == args.steps:
                log.append({"step": step + 1, "loss": round(meter[0] / max(1, meter[1]), 5), "tokens": tokens_seen,
                            "seconds": round(time.time() - began, 1)})
                speed = tokens_seen / max(0.1, log[-1]["seconds"])
                bar.set_postfix(loss=f"{log[-1]['loss']:.4f}", tok_s=f"{speed:.0f}")
                meter = [0.0, 0]
            if (step + 1) % args.every == 0:
                save()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                         # a second Ctrl-C must not spoil the save
        save()
        print(f"\nsaved step {start}; run the same command with --resume to continue", file=sys.stderr)
        raise
    finally:
        bar.close()
    return log


def main():
    """Check flags and files, train, merge, save, evaluate. What a user can get wrong is found before the first step."""
    args = parse_args()
    device, dtype = start_script(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.lr = args.lr or (0.005 if args.scratch else 0.0005)
    for name in ("steps", "batch", "ctx", "every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    claim_out(args.out, args.overwrite, args.resume)
    model, enc = start_model(args)
    other = merge_partner(args, model)                                       # refused now, not after the training
    if args.data:
        examples, _ = read_jsonl(args.data, enc, args.ctx, model.config.vocab_size)
        block = list_block(examples, args.seed)
    else:
        full = max(1, args.easy * args.steps / PER_BLOCK)                   # blocks until problems have their full size
        block = trace_block(enc, args.seed, lambda number: min(1.0, 0.2 + 0.8 * number / full) if args.easy else 1.0)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, layout {' '.join(model.config.layout)}\n"
          f"an example, trained part marked: {show_example(enc, block(0, 1)[0])}")
    model = model.to(device).train()
    log = train(args, model, block, device, dtype)
    if other:
        merge(model, other, args.merge_weight)
    model.eval().to(getattr(torch, args.save_dtype))                         # in place
    nano.save_pretrained(model, args.out, tokenizer_from=args.model)
    model.float()                                                            # evaluated as saved, rounding included
    report = {"args": vars(args), "log": log, **provenance(device)}
    if args.eval and not args.data:
        held = problem_set("test", args.eval)
        by_family, pooled = accuracy(held, solve(model, enc, held))
        report |= {"accuracy": pooled, "accuracy_by_family": by_family, "problems_per_family": args.eval}
        print("\n".join(f"{name:12} {share:.3f}" for name, share in (by_family | {"all": pooled}).items()))
    nano.write_json(os.path.join(args.out, "training.json"), report)
    if os.path.exists(os.path.join(args.out, "progress.safetensors")):
        os.remove(os.path.join(args.out, "progress.safetensors"))
    print(json.dumps({"loss": log[-1]["loss"], **{k: v for k, v in report.items() if k not in ("log", "args")}}))


if __name__ == "__main__":
    run_main(main)
