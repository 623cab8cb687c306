"""
Make reasoning traces, and train a model on them: the teacher from scratch, or supervised fine-tuning of any checkpoint.

    python train_sft.py --scratch --layers 5 --steps 300 --out out/tiny      # a small model from nothing
    python train_sft.py --model out/h25 --steps 50 --out out/h25-sft         # fine-tune a hybrid on the built-in traces
    python train_sft.py --model DIR --data traces.jsonl --out out/mine       # ... or any checkpoint on your own
    python train_sft.py --model out/h30 --merge out/h30 --out out/h30-sft    # ... and average it with an earlier one

Everything before "Training from nothing" is also the library of distill.py: problems, texts, batches, loss, optimisers
and the one training loop, `fit`.
"""
import argparse
import collections
import contextlib
import copy
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
import weakref
import zlib
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import NamedTuple

import model as nano         # before torch: it says how threads wait
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from model import (THOUGHTS, TOOLS, UserError, autocast, brief, claim_out, either, file_hash, provenance, read_records,
                   read_turns, refuse_keys, start_script, weights_hash)


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

NAMES = ("Ann Bob Cara Dan Eve Finn Gus Hana Ivo Jon "
         "Kim Leo Mia Ned Ola Pam Quin Rosa Sam Tess").split()
THINGS = "lamp box door cup ring book key coin hat drum map rope bell fork vase kite".split()
GOODS = "apples coins stamps cards shells beads".split()


def story(rng, size):
    """Who has how many? A chain of 1 to 4 comparisons, and up to 4 people who do not matter."""
    n_chain = between(rng, 1, 4, size)
    n_extra = between(rng, 0, 4, size)
    names = rng.sample(NAMES, n_chain + 1 + n_extra)
    goods = rng.choice(GOODS)
    # All by name: how many; that in words; the sum that gives it; the person compared with.
    value = {}
    fact = {}
    note = {}
    base = {}
    for i, name in enumerate(names):
        # The chain: each from the one before it.
        other = names[i - 1] if 0 < i <= n_chain else None
        # Somebody who does not matter.
        if i > n_chain and rng.random() < 0.7:
            other = rng.choice(names[:i])
        if other is None:
            value[name] = rng.randint(2, 60)
            fact[name] = f"{value[name]} {goods}"
            continue
        value[name], words, calculation = compare(rng, value[other])
        fact[name] = f"{words} {other}"
        note[name] = f"{name} {calculation} = {value[name]}."
        base[name] = other
    # The trace goes back to somebody whose number is given, then forward again.
    target = names[n_chain]
    walk = [target]
    while walk[-1] in base:
        walk.append(base[walk[-1]])
    steps = [f"{name} {fact[name]}." for name in walk]
    steps += [note[name] for name in reversed(walk[:-1])]
    in_random_order = rng.sample(names, len(names))
    facts = " ".join(f"{name} has {fact[name]}." for name in in_random_order)
    return f"{facts} How many {goods} does {target} have?", " ".join(steps), str(value[target])


def compare(rng, number):
    """A number that stands in some relation to a given one -> it, the relation in words, the calculation.
    The bounds keep every number in 2 ... 99, where each is a single token (see make_tokenizer)."""
    difference = rng.randint(2, 9)
    relations = []
    if number <= 49:
        relations += ["twice"]
    if number <= 90:
        relations += ["more", "more"]
    if number >= 12:
        relations += ["fewer", "fewer"]
    relation = rng.choice(relations)
    if relation == "twice":
        return 2 * number, "twice as many as", f"{number} * 2"
    if relation == "more":
        return number + difference, f"{difference} more than", f"{number} + {difference}"
    return number - difference, f"{difference} fewer than", f"{number} - {difference}"


def retrieval(rng, size):
    """Which code belongs to this thing, or to the thing that somebody owns? 3 to 9 codes of three numbers."""
    things = rng.sample(THINGS, between(rng, 3, 9, size))
    owners = rng.sample(NAMES, between(rng, 2, 4, size))
    code = {}
    for thing in things:
        numbers = [str(rng.randint(10, 99)) for _ in range(3)]
        code[thing] = " ".join(numbers)
    facts = [f"The {thing} has code {code[thing]}." for thing in things]
    wanted = things[0]
    steps = f"{wanted} {code[wanted]}."
    question = f"What is the code of the {wanted}?"
    # In these a second look-up comes first.
    if rng.random() < 0.6:
        facts += [f"{name} owns the {owned}." for name, owned in zip(owners, things)]
        steps = f"{owners[0]} {wanted}. {steps}"
        question = f"What is the code of the thing of {owners[0]}?"
    in_random_order = rng.sample(facts, len(facts))
    return f"{' '.join(in_random_order)} {question}", steps, code[wanted]


def swaps(rng, size):
    """Who ends up with what? 2 to 5 people swap what they have, 1 to 6 times."""
    n_people = between(rng, 2, 5, size)
    people = rng.sample(NAMES, n_people)
    has = dict(zip(people, rng.sample(THINGS, n_people)))
    question = [f"{name} has the {has[name]}." for name in people]
    steps = []
    for i in range(1, between(rng, 1, 6, size) + 1):
        a, b = rng.sample(people, 2)
        question.append(f"{i}: {a} and {b} swap.")
        # Before and after each swap: the state stands in the text, nothing must be tracked silently.
        steps.append(f"{i}: {a} {has[a]}, {b} {has[b]}; {a} {has[b]}, {b} {has[a]}.")
        had = has[a]
        has[a] = has[b]
        has[b] = had
    who = rng.choice(people)
    question.append(f"What does {who} have?")
    steps.append(f"{who} {has[who]}.")
    return " ".join(question), " ".join(steps), has[who]


def between(rng, low, high, size):
    """A random size from low to high; size in (0, 1] lowers the upper end (a curriculum starts small)."""
    return rng.randint(low, low + round((high - low) * size))


PROBLEM_FAMILIES = {"story": story, "retrieval": retrieval, "swaps": swaps}
# Remainders of the hash modulo 64; all others are "train".
SPLITS = {"test": (0, 1), "probe": (2,), "dev": (3,)}


def split_of(question):
    """A question -> its split. crc32, because Python's own hash of a text differs from process to process."""
    remainder = zlib.crc32(question.encode()) % 64
    for split, held in SPLITS.items():
        if remainder in held:
            return split
    return "train"


class Problem(NamedTuple):
    family: str                                          # a key of PROBLEM_FAMILIES
    question: str
    steps: str                                           # the trace
    answer: str


def problems(split, seed, size=1.0):
    """Endless Problems, the families in turn. Same split and seed, same problems.
    seed: anything that can be printed; size in (0, 1]: 1 is a problem of full size."""
    # Seeded with a text, which is the same on every machine.
    rng = random.Random(f"{split} {seed}")
    for family in itertools.cycle(PROBLEM_FAMILIES):
        # For "test" some 32 tries, cheap ones.
        while True:
            problem = Problem(family, *PROBLEM_FAMILIES[family](rng, size))
            if split_of(problem.question) == split:
                break
        yield problem


def problem_set(split, per_family, seed=0):
    """A list of different problems, per_family of each family. What is measured on must not hold one problem twice."""
    chosen = {}
    counts = dict.fromkeys(PROBLEM_FAMILIES, 0)
    for problem in problems(split, seed):
        if counts[problem.family] < per_family and problem.question not in chosen:
            chosen[problem.question] = problem
            counts[problem.family] += 1
        if min(counts.values()) >= per_family:
            return list(chosen.values())


def format_response(steps, answer):
    """The thoughts between tags, as reasoning models write them, then the answer."""
    # The space makes the first word the token it is everywhere else.
    return f"<think> {steps}</think> {answer}"


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer of the built-in traces: byte-level BPE, trained on them, stored as an ordinary tokenizer.json.
#
# 538 ids: 7 special tokens, 256 bytes and 275 merges. Names and things become one token each, and so does a number
# below 100: arithmetic is then a table that the MLPs can learn, and no digit has to be carried. The file has the form
# of a large model's, so whatever reads this teacher reads a real checkpoint.

# Their ids are 0 ... 6.
SPECIAL = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"]
# Words, short numbers, signs.
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"


def make_tokenizer(path, n_vocab=538, n_problems=300):
    """Train BPE on problems and write path/tokenizer.json (the Hugging Face form, which load_tokenizer reads)."""
    from tiktoken._educational import bpe_train
    some = itertools.islice(problems("train", 0), n_problems)
    texts = "\n".join(f"{p.question} {p.steps} {p.answer}" for p in some)
    # Every number below 100 becomes one token.
    numbers = " ".join(f"{i // 20}" for i in range(2000))
    ranks = bpe_train(f"{texts} {numbers}", n_vocab - len(SPECIAL), PATTERN, visualise=None)
    os.makedirs(path, exist_ok=True)
    nano.write_json(os.path.join(path, "tokenizer.json"), tokenizer_json(ranks))
    nano.write_json(os.path.join(path, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "clean_up_tokenization_spaces": False})


def tokenizer_json(ranks):
    """{token as bytes: rank}, as tiktoken trains it -> the dict in tokenizer.json.
    The two forms differ: tiktoken knows ids only, tokenizer.json wants for each token the pair it was merged from.
    The pair is found by encoding the token's bytes with the merges that are older than it: two parts are left."""
    character = {byte: letter for letter, byte in nano.byte_characters().items()}

    def as_text(token):
        return "".join(character[byte] for byte in token)

    merges = []
    rank = {}
    # The first 256 are the bytes themselves.
    for token in sorted(ranks, key=ranks.get)[256:]:
        pair = tuple(nano.bpe([bytes([byte]) for byte in token], rank))
        rank[pair] = len(rank)
        merges.append([as_text(part) for part in pair])
    vocab = {name: i for i, name in enumerate(SPECIAL)}
    for token, i in ranks.items():
        vocab[as_text(token)] = i + len(SPECIAL)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    added = [{"id": i, "content": name, **flags} for i, name in enumerate(SPECIAL)]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
           "ignore_merges": False, "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "post_processor": None, "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "decoder": level, "model": bpe}


# ----------------------------------------------------------------------------------------------------------------------
# Examples. An example is (ids, trained): token ids, and for each whether the loss counts it. Only what the assistant
# writes is trained, its end token included. The parts of a text are encoded one by one, so the border is exact by
# construction, and what a part means is never searched for in a finished text.

class Codec(NamedTuple):
    """How texts become ids."""
    enc: object                                          # the tokenizer
    chat: object                                         # the template of conversations, see model.load_chat
    begin: list                                          # ids in front of a text that is no conversation


def load_codec(path):
    """The Codec of a checkpoint directory. Raises UserError for a tokenizer that cannot be read."""
    enc = nano.load_tokenizer(path)
    return Codec(enc, nano.load_chat(path, enc, nano.FIXED_DATE), enc.begin)


def encode_parts(codec, parts):
    """parts: [(text, trained)] -> (ids, trained flags), two lists of equal length.
    No token ever spans two parts. Encoding the whole text could merge the prompt's end with the response's start."""
    ids = []
    trained = []
    for text, flag in parts:
        new = codec.enc.encode(text, allowed_special="all")
        ids += new
        trained += [flag] * len(new)
    return ids, trained


def encode_problem(codec, problem):
    """A Problem -> (ids, trained): the response is trained, the question is not."""
    prompt = codec.chat.prompt([{"role": "user", "content": problem.question}])
    response = continue_thoughts(prompt, format_response(problem.steps, problem.answer))
    return encode_parts(codec, [(prompt, False), (response + codec.chat.end, True)])


def continue_thoughts(prompt, response):
    """The response, as it goes on after this prompt: some templates open the thoughts at the prompt's end.
    They must be there once: an opening that the prompt has is left out, and thoughts that are missing are empty."""
    before = prompt.rstrip()
    if not before.endswith("<think>"):
        return response
    if response.startswith("<think>"):
        space = prompt[len(before):]
        return response.removeprefix("<think>").removeprefix(space)
    return response if "</think>" in response else f"\n</think>\n\n{response}"


def show_example(codec, example):
    """One example as text, the trained part in >>> <<<: what the loss counts should be seen once by a human."""
    shown = ""
    # Neighbours with the same flag.
    for flag, pairs in itertools.groupby(zip(*example), key=lambda pair: pair[1]):
        text = codec.enc.decode([token for token, _ in pairs])
        shown += f">>>{text}<<<" if flag else text
    return shown


# ----------------------------------------------------------------------------------------------------------------------
# Examples from texts of your own: a file of records, see model.read_records. The two texts of a pair are taken to the
# letter, but for the tokens that must begin and end them. Messages go through the template of the checkpoint; every
# turn of the assistant is trained, but for those with "weight": 0.

def read_jsonl(path, codec, ctx, n_vocab):
    """A JSONL file -> (training examples, held-out examples: those of every 50th prompt). All of it is checked.
    Raises UserError with the line number; examples longer than ctx tokens are left out with a warning."""
    records, keys = read_with_keys(path, codec, ctx, n_vocab)
    # All records have been counted, long ones too: what is held out does not depend on --ctx.
    usable = [(record, out) for record, out in zip(records, held_out(keys)) if record]
    if len(usable) < 2:
        raise UserError(f"{path}: {len(usable)} usable records of at most {ctx} tokens; "
                        "two are needed")
    records, out = map(list, zip(*usable))
    # One at least is on each side.
    if len(set(out)) == 1:
        out[0] = not out[0]
    train = []
    held = []
    for record, is_out in zip(records, out):
        # Turns of one conversation stay together: they share their texts.
        if is_out:
            held += record
        else:
            train += record
    return train, held


def read_apart(path, held_path, codec, ctx, n_vocab):
    """Two JSONL files -> (training examples of the first, all examples of the second). A prompt of the second is not
    trained: records of the first that begin with it are left out, with a note. Raises UserError as read_jsonl."""
    records, keys = read_with_keys(path, codec, ctx, n_vocab)
    held_records, held_keys = read_with_keys(held_path, codec, ctx, n_vocab)
    asked = {prompt for prompt, _ in held_keys}
    n_asked = sum(prompt in asked for prompt, _ in keys)
    if n_asked == len(keys) > 0:
        raise UserError(f"all records of {path} begin with a prompt of {held_path}: none is left to train on")
    if n_asked:
        print(f"note: {n_asked} records of {path} begin with a prompt of {held_path}: not trained")
    kept = [record for record, (prompt, _) in zip(records, keys) if prompt not in asked]
    train = list(itertools.chain(*kept))
    held = list(itertools.chain(*held_records))
    for name, examples in ((path, train), (held_path, held)):
        if not examples:
            raise UserError(f"{name}: no usable record of at most {ctx} tokens")
    return train, held


def read_with_keys(path, codec, ctx, n_vocab):
    """A JSONL file -> for each record its examples of at most ctx tokens, and what prompt_and_all gives for it."""
    records = []
    keys = []
    n_long = 0

    def checked(record):
        examples = [encode_parts(codec, parts) for parts in parts_of(record, codec)]
        check_examples(examples, n_vocab)
        return examples

    for examples in read_records(path, checked):
        short = [example for example in examples if len(example[0]) <= ctx]
        n_long += len(examples) - len(short)
        records.append(short)
        keys.append(prompt_and_all(*examples[0]))
    n_kept = sum(len(record) for record in records)
    if n_long:
        print(f"warning: {n_long} of {n_long + n_kept} examples of {path} exceed --ctx {ctx} tokens",
              file=sys.stderr)
    return records, keys


def prompt_and_all(ids, trained):
    """An example -> what is equal where the first prompt is (the whole text has to be, where there is none), and what
    is equal where the whole text is."""
    asked = tuple(ids[:trained.index(True)]) if True in trained else ()
    whole = hash(tuple(ids))
    # One token is the beginning of a text that has no prompt.
    return hash(asked) if len(asked) > 1 else whole, whole


def held_out(keys):
    """keys: what prompt_and_all gives, one for each record -> for each, is it held out? All answers to every 50th
    prompt are, or a prompt with several answers would be learnt and asked. A prompt that more than a twentieth of the
    records answer is trained. Where there are fewer than 50 prompts, every 50th of the different texts is held out."""
    names = [prompt for prompt, _ in keys]
    if len(set(names)) < 50:
        names = [whole for _, whole in keys]
    records_of = collections.Counter(names)
    numbers = {}
    for name in names:
        if records_of[name] <= max(1, len(names) / 20):
            numbers.setdefault(name, len(numbers))
    return [numbers.get(name, 1) % 50 == 0 for name in names]


def check_examples(examples, n_vocab):
    """Raises UserError for examples that nothing can be learnt from, or that the model has no embedding for."""
    # The first token of a text is never predicted.
    if not any(any(trained[1:]) for _, trained in examples):
        raise UserError("there is no response to train on")
    largest = max(max(ids, default=0) for ids, _ in examples)
    if largest >= n_vocab:
        raise UserError(f"token id {largest}, the model knows {n_vocab}")


def parts_of(record, codec):
    """A record -> for each example its parts, [(text, trained)]. Raises UserError for what is not read."""
    refuse_keys(record, TOOLS, "tool calls are not read")
    prompt = record.get("prompt")
    response = either(record, "response", "completion")
    if isinstance(prompt, str) and isinstance(response, str):
        return [pair_parts(prompt, response, record, codec)]
    return conversation_parts(read_turns(record), codec.chat)


def pair_parts(prompt, response, record, codec):
    """Two texts, taken as they are, but for the tokens that must begin and end them."""
    refuse_keys(record, (*THOUGHTS, "system"), "more than a prompt and a response; write it into them, "
                                               "or use messages")
    if not response.strip():
        raise UserError("an empty response")
    begin = codec.enc.decode(codec.begin)
    # Not as one text with the prompt: to some tokenizers only what begins a text begins with a space.
    before = [] if prompt.startswith(begin) else [(begin, False)]
    # Without a template nobody knows how an answer ends. One that was cut (sample.py --keep-cut) has no end.
    known = not codec.chat.refusal and not record.get("cut")
    if known and not response.rstrip().endswith(codec.chat.end):
        response += codec.chat.end
    return [*before, (prompt, False), (response, True)]


# Where a template is no more than marks around the texts, a conversation is one example: the prompt of each turn begins
# with all that was written so far. Some templates rewrite what was said (most drop earlier thoughts): then a turn is an
# example of its own, with the history as the model will see it.

def conversation_parts(turns, chat):
    """Turns -> for each example its parts, [(text, trained)]. The prompt of each assistant turn is what the template
    makes of the turns before it, ready for an answer; the answer is written here, to the letter."""
    examples = []
    history = []
    so_far = ""
    for turn in turns:
        if turn.role == "assistant":
            prompt = chat.prompt(history)
            response = continue_thoughts(prompt, turn.text) + chat.end
            if not examples or not prompt.startswith(so_far):
                examples.append([])
                so_far = ""
            examples[-1].append((prompt[len(so_far):], False))
            examples[-1].append((response, turn.trained))
            so_far = prompt + response
        history.append({"role": turn.role, "content": turn.text})
    return [parts for parts in examples if any(trained for _, trained in parts)]


# ----------------------------------------------------------------------------------------------------------------------
# Batches. Batch number `step` depends on the seed and on `step` alone: a resumed run continues with exactly the batches
# that an undisturbed one would have seen, and there is no loader state to save.
#
# A source of examples is a function block(number, count): count examples, the same whenever it is asked. Blocks do not
# depend on each other.

def trace_block(codec, seed, ctx, size_at=lambda number: 1.0, split="train"):
    """-> a block function of examples made from the built-in problems, those of more than ctx tokens left out.
    size_at: block number -> size of its problems (a curriculum)."""
    def block(number, count):
        stream = problems(split, f"{seed} {number}", size_at(number))
        return list(itertools.islice(short_enough(codec, stream, ctx), count))
    return block


def short_enough(codec, stream, ctx):
    """A stream of problems -> their examples of at most ctx tokens. UserError where a hundred in a row are longer."""
    longer = 0
    for problem in stream:
        example = encode_problem(codec, problem)
        longer = longer + 1 if len(example[0]) > ctx else 0
        if not longer:
            yield example
        if longer == 100:
            raise UserError(f"--ctx {ctx}: the built-in texts are longer (the last that was tried: "
                            f"{len(example[0])} tokens)")


# The paper reports that pretraining data failed where the teacher's own traces worked. generic_block is that experiment
# in miniature: the same sentences and lengths, but nothing in them that must be thought about.

def generic_block(codec, seed, ctx):
    """The same for generic text: the facts of training problems and nothing else, no question, no reasoning, no answer.
    Text number i is about as long as problem number i of trace_block with its trace; all of it is trained.

    Facts are added until the text is long enough and its own hash, too, says "train": as with the problems, no text of
    the held-out splits can come up, whatever the seed."""
    begin = begin_mark(codec)

    def block(number, count):
        examples = []
        more = facts(problems("train", f"{seed} {number} facts"))
        likes = short_enough(codec, problems("train", f"{seed} {number}"), ctx)
        while len(examples) < count:
            length = len(next(likes)[0])
            text = ""
            ids = []
            while len(ids) < length or split_of(text) != "train":
                text = f"{text} {next(more)}".strip()
                parts = [(begin, False), (f" {text}{codec.chat.end}", True)]
                ids, trained = encode_parts(codec, parts)
            if len(ids) <= ctx:
                examples.append((ids, trained))
        return examples
    return block


def begin_mark(codec):
    """The text in front of a generic text: what the tokenizer puts there, or "<s>" if that is one token."""
    if codec.begin:
        return codec.enc.decode(codec.begin)
    return "<s>" if len(codec.enc.encode("<s>", allowed_special="all")) == 1 else ""


def facts(stream):
    """A stream of problems -> the sentences of their questions, without the last, which asks and ends in ?."""
    for problem in stream:
        for sentence in re.findall(r"[^.?]+\.", problem.question):
            yield sentence.strip()


def texts_hash(block):
    """A fingerprint of the first examples: that of everything they are made with, tokenizer and template included."""
    return hashlib.sha256(json.dumps(block(0, 16)).encode()).hexdigest()[:16]


def list_block(examples, seed):
    """A block function for a list of examples: epoch after epoch, each in its own random order.
    Example number i of the whole run lies in epoch i // len(examples): a block finds its place without a history."""
    def block(number, count):
        chosen = []
        for i in range(number * count, (number + 1) * count):
            epoch, nth = divmod(i, len(examples))
            if not chosen or nth == 0:
                rng = random.Random(f"{seed} {epoch}")
                order = rng.sample(range(len(examples)), len(examples))
            chosen.append(examples[order[nth]])
        return chosen
    return block


# Padding is computed and thrown away, so rows of a batch should be about equally long. Sorting 16 batches together does
# that; sorting everything would make lengths, and with them the learning signal, a function of time.

# Batches that are drawn together and sorted by length.
PER_BLOCK = 16


def batches(block, batch, start=0):
    """Endless lists of `batch` examples of similar length, from batch number `start` on."""
    for number in itertools.count(start // PER_BLOCK):
        examples = sorted(block(number, batch * PER_BLOCK), key=lambda example: len(example[0]))
        lists = [examples[i:i + batch] for i in range(0, len(examples), batch)]
        # No order from short to long.
        random.Random(number).shuffle(lists)
        # A run that is resumed in the middle of a block has seen some of it already.
        seen = start % PER_BLOCK if number == start // PER_BLOCK else 0
        yield from lists[seen:]


# That leaves some 5 % of padding where lengths are even, and much more where a few texts are far longer than others. It
# goes with --pack: texts share rows of at most --ctx tokens, and the model begins anew at each text, in positions,
# attention, conv and scan alike. A batch holds the same texts as without it, and has the same loss.

class Batch(NamedTuple):
    tokens: torch.Tensor                                 # (b, t) int64
    targets: torch.Tensor                                # (b, t) int64: the next token if it is trained, else -1
    reset: torch.Tensor | None                           # (b, t) True where a text begins; None: a text is a row
    padding: int                                         # how many of the b * t tokens are padding


def spread(lengths, n):
    """Texts of these lengths in tokens -> n rows, lists of text numbers, and the tokens of the longest row. The longest
    text comes first, and each goes into the row that is shortest."""
    rows = [[] for _ in range(n)]
    used = [0] * n
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = used.index(min(used))
        rows[row].append(number)
        used[row] += lengths[number]
    return rows, max(used)


def share_rows(lengths, room):
    """-> rows of at most room tokens (or as many as the longest text has), lists of text numbers. Rows are computed
    side by side, so they become fewer only as long as that saves padding, of which 1 % is let pass."""
    room = max(room, *lengths)
    best = None
    smallest = math.inf
    for n in range(len(lengths), 0, -1):
        rows, longest = spread(lengths, n)
        if longest > room or smallest < 1.01 * sum(lengths):
            break
        if n * longest < smallest:
            smallest = n * longest
            best = rows
    return best


def collate(examples, device, room=0):
    """[(ids, trained)] -> Batch. room: tokens of a row that texts share, 0: each has a row to itself. The one place
    where labels and mask are shifted. Rows are padded on the right, which a causal model never sees; the mask comes
    from lengths, so a pad id that is also a real token does no harm."""
    lengths = [len(ids) for ids, _ in examples]
    rows = [[number] for number in range(len(examples))]
    if room:
        rows = share_rows(lengths, room)
    widths = [sum(lengths[number] for number in row) for row in rows]
    shape = (len(rows), max(widths))
    tokens = torch.zeros(shape, dtype=torch.long)
    # -1 everywhere: nothing is trained.
    targets = torch.full(shape, -1)
    reset = torch.zeros(shape, dtype=torch.bool)
    for y, row in enumerate(rows):
        start = 0
        for number in row:
            ids, trained = map(torch.tensor, examples[number])
            end = start + len(ids)
            tokens[y, start:end] = ids
            targets[y, start:end - 1] = torch.where(trained[1:], ids[1:], -1)
            reset[y, start] = True
            start = end
        # Padding is a text of its own: the last one need not be walked on over it.
        reset[y, start:start + 1] = True
    padding = tokens.numel() - sum(lengths)
    return Batch(tokens.to(device), targets.to(device), reset.to(device) if room else None, padding)


# ----------------------------------------------------------------------------------------------------------------------
# Loss and evaluation.
#
# Six tokens in ten belong to prompts and are not trained, so their logits are never made: the mask is applied to the
# hidden states, before the output layer. Losses are sums with a count beside them. Batches differ in their number of
# trained tokens, and the mean over all of them is the sum of sums over the sum of counts, not the mean of means.
# A problem counts as solved if the answer is right to the letter; its trace may take any way.

# With a large vocabulary the (tokens, vocabulary) logits are the largest tensors of the whole run (131072 x 16384 in
# float32 is 8.6 GB): they are then made piece by piece from the hidden states, and the gradient of a piece is made at
# once, in its place, so that nothing is kept for the backward pass and nothing made twice. On a CPU the float32 copies
# of a few rows stay in the cache. It took 0.6 of 6.2 s off a distillation step of SmolLM2-135M, and 1.5 of 6.6 GB.

# The vocabulary size above which the loss works in pieces, the tokens of a piece, and those in float32 at once.
PIECES_ABOVE = 16384
PIECE_TOKENS = 1024
FLOAT32_TOKENS = 32


def cross_entropy(model, batch):
    """A Batch -> summed loss in nats (float32), and the number of trained tokens."""
    x, _ = model.hidden(batch.tokens, reset=batch.reset)           # (b, t, d_model)
    trained = batch.targets >= 0                         # (b, t) bool
    return summed_cross_entropy(x[trained], model.lm_head, batch.targets[trained]), int(trained.sum())


def summed_cross_entropy(x, head, targets, piece=None):
    """x (m, d_model): hidden states of the trained positions only; targets (m) -> the summed cross-entropy."""
    def loss_of(logits, wanted):
        return F.cross_entropy(logits, wanted, reduction="sum")

    return summed_loss(x, head, lambda part: targets[part], loss_of, piece)


def summed_loss(x, head, wanted_of, loss_of, piece=None):
    """x (m, d_model): hidden states of the trained positions; head: the output layer -> the summed loss.
    wanted_of(slice of the positions) -> what their logits are compared with, (tokens, ...), no gradient;
    loss_of(logits (tokens, vocab_size) float32, wanted) -> their summed loss. piece: positions that are computed at
    once, None: decided by the vocabulary size. A sum, so pieces add up exactly to the whole."""
    if piece is None and head.weight.shape[0] > PIECES_ABOVE:
        piece = PIECE_TOKENS
    if piece is not None:
        return LossInPieces.apply(x, head.weight, wanted_of, loss_of, piece)
    with torch.no_grad():
        wanted = wanted_of(slice(None))
    return loss_of(head(x).float(), wanted)


class LossInPieces(torch.autograd.Function):
    """(x, the head's weight, wanted_of, loss_of, piece) -> what summed_loss says."""
    @staticmethod
    def forward(ctx, x, weight, wanted_of, loss_of, piece):
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in slices(len(x), piece):
            logits = F.linear(x[part], weight)           # (tokens of this piece, vocab_size)
            wanted = wanted_of(part)
            for few in slices(len(logits), FLOAT32_TOKENS):
                total += loss_and_gradient(logits[few], wanted[few], loss_of)
            grad_x[part] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.T @ x[part]
            # Else the next piece would be made beside this one.
            del logits, wanted
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad * grad_weight
        return grad * grad_x, grad_weight, None, None, None


def loss_and_gradient(logits, wanted, loss_of):
    """(rows, vocab_size), see summed_loss -> the summed loss; logits are overwritten by its gradient."""
    with torch.enable_grad():
        wide = logits.float().requires_grad_()
        loss = loss_of(wide, wanted)
    logits.copy_(torch.autograd.grad(loss, wide)[0])
    return loss.detach()


def slices(count, most):
    """-> slices of at most `most` positions each, count in all."""
    return [slice(i, min(i + most, count)) for i in range(0, count, most)]


def few_positions(head, count):
    """-> slices of count positions whose logits may be there at once, in float32 too, where nothing has a gradient:
    all of them, if the vocabulary is not large."""
    large = head.weight.shape[0] > PIECES_ABOVE
    return slices(count, 4 * FLOAT32_TOKENS if large else max(1, count))


def answer_of(text):
    """What a response says after its thoughts; all of it, if it never closed them."""
    return text.rpartition("</think>")[2].strip()


@torch.no_grad()
def solve(model, codec, problem_list, batch=128, max_new_tokens=192, note="solving"):
    """Greedy answers to problems. -> the response texts, in order. Batches hold prompts of similar length."""
    enc = codec.enc
    prompts = []
    for problem in problem_list:
        text = codec.chat.prompt([{"role": "user", "content": problem.question}])
        prompts.append(enc.encode(text, allowed_special="all"))
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    by_length = own_part(by_length)
    texts = {}
    with tqdm(total=len(by_length), desc=note, unit="problem", leave=False) as bar:
        for i in range(0, len(by_length), batch):
            numbers = by_length[i:i + batch]
            outputs = model.generate([prompts[number] for number in numbers], max_new_tokens)
            for number, ids in zip(numbers, outputs):
                # A model may know more ids than the tokenizer.
                known = [token for token in ids if token <= enc.max_token_value]
                texts[number] = enc.decode(known)
            bar.update(len(numbers))
    texts = union(texts)
    return [texts[number] for number in range(len(prompts))]


def accuracy(problem_list, texts):
    """-> {family: share of problems with exactly the right answer}, and the pooled share (0 to 1)."""
    right = {}
    for problem, text in zip(problem_list, texts):
        right.setdefault(problem.family, []).append(answer_of(text) == problem.answer)
    by_family = {family: sum(flags) / len(flags) for family, flags in right.items()}
    return by_family, sum(map(sum, right.values())) / len(problem_list)


# ----------------------------------------------------------------------------------------------------------------------
# Optimiser. Weight matrices inside the layers take Muon's step, everything else AdamW's; or AdamW takes all of it.
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

def orthogonalize(matrices):
    """matrices (n, rows, columns) -> about U V^T of each one's singular value decomposition, by Newton-Schulz.
    The polynomial needs singular values of at most 1; the Frobenius norm is never smaller than the largest of them."""
    y = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    # Work on the shorter side: the products are smaller.
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    for _ in range(5):
        square = y @ y.mT                                # (n, s, s), s the shorter side
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return y.mT if tall else y


# Numbers that are orthogonalised together: a step makes some six tensors of their size.
MUON_AT_ONCE = 1 << 24


def muon_count(shape):
    """-> how many matrices of this shape go together."""
    return max(1, MUON_AT_ONCE // shape.numel())


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters (rows, columns) only. One state per parameter: "momentum", of its shape;
    that is half of what AdamW keeps. 0.95 is Jordan's value."""
    STATE = ("momentum",)

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                # Each process works on so many.
                count = muon_count(shape) * processes()
                for i in range(0, len(params), count):
                    self.step_shape(group, shape, params[i:i + count])

    def step_shape(self, group, shape, params):
        """A step of some parameters of one shape."""
        lr = group["lr"]
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        # The running mean of the gradients, and Nesterov's form of momentum: a look ahead along it.
        means = [self.state[p]["momentum"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, means, group["momentum"])
        if is_sharded(ahead[0]):
            update = orthogonalize_shared(ahead)
        else:
            update = orthogonalize(torch.stack(ahead)).unbind()
        # Decay is apart from the gradient, as in AdamW.
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, list(update), alpha=-0.2 * lr * max(shape) ** 0.5)


class AdamW(torch.optim.AdamW):
    """PyTorch's. STATE, here and in Muon: the names of what is kept for each parameter."""
    STATE = ("step", "exp_avg", "exp_avg_sq")


def mamba_names(model):
    """-> the names of the parameters of a model that lie inside mixers other than attention."""
    names = set()
    for i, block in enumerate(model.layers):
        if block.kind in nano.MIXERS and block.kind != "t":
            names |= {f"layers.{i}.mixer.{name}" for name, _ in block.mixer.named_parameters()}
    return names


# Muon's products do not depend on the batch. Per matrix they cost about what a step costs for 4 d_model tokens: 6 % of
# the products of a step of the shipped teacher, 1.2 times those of SmolLM2-135M with 1300 tokens, where it was no
# better per token either (KL of an H-12 from 0.49 to 0.30 in 50 steps; AdamW to 0.27 in 60). How many tokens a step
# will have is not known here, the room for them is: texts fill it to a third, roughly.
#
# Either moves each weight by about the rate, however small its gradient is: a rate that repairs a poor start ruins a
# good one. So AdamW's rates here, for wide models, are low, and lower for what is not new.

def choose_optimizer(args, d_model, muon, adamw):
    """Fill in --optimizer auto, and the rates unless --lr is given. muon, adamw: (lr, lr_rest) with each."""
    if args.optimizer == "auto":
        tokens = args.batch * args.accumulate * args.ctx
        args.optimizer = "muon" if tokens >= 16 * d_model else "adamw"
    if args.lr is None:
        rates = muon if args.optimizer == "muon" else adamw
        args.lr = rates[0]
        args.lr_rest = rates[1] if args.lr_rest is None else args.lr_rest


def check_rates(lr, lr_rest):
    """Raises UserError for rates that are none; a rate may be missing (None)."""
    if not 0 < (1 if lr is None else lr) < math.inf or not 0 <= (lr_rest or 0) < math.inf:
        raise UserError(f"--lr must be above 0, --lr-rest 0 or more, got {lr} and {lr_rest}")


def make_optimizers(model, lr, optimizer="muon", lr_rest=None, weight_decay=0.05):
    """-> optimisers over the parameters that need a gradient: [Muon, AdamW], or [AdamW] alone with optimizer "adamw".
    lr_rest: the rate of everything but Mamba mixers; None: lr, too. Weight decay is for matrices inside the layers: not
    for embeddings, norms and biases, and not for A_log (a matrix by shape, but not by meaning), D, dt bias and conv.
    Raises UserError for rates that are none."""
    check_rates(lr, lr_rest)
    mixers = mamba_names(model)
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = p.ndim == 2 and name.startswith("layers.") and not nano.keeps_float32(name)
            rate = lr if lr_rest is None or name in mixers else lr_rest
            groups.setdefault((matrix, rate), []).append(p)
    muon = []
    adamw = []
    for (matrix, rate), params in groups.items():
        # share: of the rate that clipped_step sets.
        group = {"params": params, "share": rate / lr,
                 "weight_decay": weight_decay if matrix else 0.0}
        if matrix and optimizer == "muon":
            muon.append(group)
        else:
            adamw.append(group)
    made = [Muon(muon, lr, weight_decay)] if muon else []
    # beta2 0.98, not 0.999: a mean over 1000 steps would be longer than most runs here.
    return made + ([AdamW(adamw, lr, (0.9, 0.98))] if adamw else [])


def learning_rate(step, steps, peak, warmup, floor=0.03, decay=0.4):
    """Linear warm-up, constant, and over the last `decay` of the steps linearly down to floor * peak.
    step counts from 0. A constant rate until late ("warm-up, stable, decay") suits runs whose length is a guess: the
    loss drops during the decay, and everything before it could be continued."""
    left = (steps - step) / max(1, decay * steps)
    return peak * min(1.0, (step + 1) / max(1, warmup), max(floor, left))


def clipped_step(model, optimizers, lr, clip=1.0):
    """Clip the gradient's norm, set the rate, step, clear. Raises UserError if the gradient is not finite.
    -> the norm over all parameters before clipping. It is checked before any weight is touched."""
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    if not torch.isfinite(norm):
        raise UserError("the loss or its gradient is not finite (NaN); lower --lr. "
                        "What was saved before is intact")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


# ----------------------------------------------------------------------------------------------------------------------
# The one training loop, for train_sft.py and distill.py alike: they differ in the loss, and in how much they log. A
# Plan says what the loop does, a Progress how far it is, and `fit` below is the loop.

class Plan(NamedTuple):
    steps: int
    lr: float                                            # the highest, see learning_rate
    warmup: int                                          # steps
    every: int                                           # steps between saves
    log_every: int                                       # steps between log entries
    name: str                                            # of the loss, in log entries and on the bar
    optimizer: str = "muon"                              # or adamw
    lr_rest: float | None = None                         # of everything but Mamba mixers; None: lr
    room: int = 0                                        # tokens of a row that texts share, see collate
    accumulate: int = 1                                  # batches in a step
    watch: object = None                                 # watch(progress), before the first step and after each
    count: object = None                                 # count(Batch): of what the loss is a sum; None: trained tokens


# A run in progress is one safetensors file: weights and optimiser states as tensors, the rest as JSON in its header.
# One file, renamed into place, is all or nothing: weights of one step can never meet the optimiser state of another,
# and while a new one is written the old one is still there. There is no random state in it, because batches depend on
# seed and step alone, and no pickle, which could run code.
#
# What the run depends on stands in it, too: a run is continued only under the same flags and with the same content of
# model and data, whatever became of the files that they were read from.

@dataclass
class Progress:
    """How far a run has come. Everything from `step` on is saved, together with weights and optimiser states."""
    path: str                                            # of the file
    run: dict                                            # what the run depends on: JSON values
    resume: bool = False                                 # continue from the file, if there is one
    step: int = 0                                        # steps done
    tokens: int = 0                                      # seen so far, padding included
    padding: int = 0                                     # ... so many of them
    seconds: float = 0.0                                 # of work so far, over all parts of an interrupted run
    cpu_seconds: float = 0.0                             # the same of the processor, all threads together
    loss: float = 0.0                                    # summed since the last log entry ...
    count: int = 0                                       # ... over so many trained tokens
    log: list = field(default_factory=list)              # entries, see fit
    curve: list = field(default_factory=list)            # what plan.watch has measured on the way

    SAVED = ("step", "tokens", "padding", "seconds", "cpu_seconds", "loss", "count", "log", "curve")

    def start_clocks(self):
        """From here on time is counted, beside what was counted before."""
        self.began = time.time() - self.seconds
        self.began_cpu = time.process_time() - self.cpu_seconds

    def read_clocks(self):
        self.seconds = time.time() - self.began
        self.cpu_seconds = time.process_time() - self.began_cpu

    def save(self, model, optimizers):
        """Write the file; of many processes, see save_parts.
        Raises UserError if that fails, for a full disk mostly; the file that was there before is left."""
        from safetensors.torch import save_file
        if processes() > 1:
            save_parts(self, model, optimizers)
            return
        tensors = named_tensors(model, optimizers)
        header = {"meta": json.dumps(self.meta())}
        try:
            nano.write_atomic(self.path, lambda to: save_file(tensors, to, metadata=header))
        except UserError as e:
            if not os.path.exists(self.path):
                raise
            raise UserError(f"{e}; the last save is intact, --resume continues from it") from None
        self.remove(but=self.path)

    def meta(self):
        """-> what is saved beside tensors, JSON values."""
        return {key: getattr(self, key) for key in ("run", *self.SAVED)}

    def load(self, model, optimizers, plan):
        """With resume: read the file, if there is one, into self, a model of the same shape and its optimisers.
        Raises UserError if the run depends on something else now, naming it, and for a file that is broken."""
        from safetensors import SafetensorError, safe_open
        parts = saved_parts(self.path)
        if not (self.resume and (parts or os.path.exists(self.path))):
            return
        try:
            if parts:
                meta = nano.read_json(os.path.join(parts[-1], "run.json"), dict)
                self.check(meta, plan)
                load_parts(parts[-1], model, optimizers)
            else:
                with safe_open(self.path, framework="pt") as f, torch.no_grad():
                    meta = json.loads(f.metadata()["meta"])
                    self.check(meta, plan)
                    load_tensors(f, model, optimizers)
        except UserError:
            raise
        except (SafetensorError, OSError, LookupError, AttributeError, RuntimeError, TypeError,
                ValueError) as e:
            if is_lost(e):
                raise
            raise UserError(f"{self.path} does not continue this run: {e}") from None
        for key in self.SAVED:
            setattr(self, key, meta[key])

    def check(self, meta, plan):
        """Raises UserError if what was saved belongs to another run, others for what was never saved by this class."""
        for key, now in self.run.items():
            then = meta["run"].get(key)
            if then != now:
                raise UserError(f"{self.path} was made with {key} = {then}, now {key} = {now}")
        for key in self.SAVED:
            check_type(key, meta[key], type(getattr(self, key)))
        for entry in meta["log"]:
            for key in ("step", "tokens", "padding", "seconds", plan.name):
                check_type(key, entry[key], float)
        for point in meta["curve"]:
            for key in ("step", "seconds", "cpu_seconds"):
                check_type(key, point[key], float)
        if meta["step"] > plan.steps or meta["step"] == plan.steps and not meta["log"]:
            raise ValueError(f"step {meta['step']} of {plan.steps}, {len(meta['log'])} log entries")

    def needs(self, model, optimizers):
        """Bytes on disk for the whole run: two of these files while one replaces the other; the checkpoint at the end
        is no larger than one. What is there already counts."""
        size = sum(p.nbytes for p in model.parameters())
        for optimizer in optimizers:
            # A step count is no more than a few bytes.
            n_states = sum(key != "step" for key in optimizer.STATE)
            for group in optimizer.param_groups:
                size += n_states * sum(p.nbytes for p in group["params"])
        files = [self.path]
        for folder in saved_parts(self.path):
            files += glob.glob(os.path.join(glob.escape(folder), "*"))
        there = sum(os.path.getsize(file) for file in files if os.path.exists(file))
        return 2 * size - there

    def check_disk(self, model, optimizers):
        """Raises UserError if the disk is too full for the run. Called before its first step."""
        folder = os.path.dirname(self.path) or "."
        needed = self.needs(model, optimizers)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f"{folder}: this run needs {needed / 1e9:.3g} GB of disk (weights and "
                            f"optimiser states, twice while saving), {free / 1e9:.3g} GB are free")

    def remove(self, but=None):
        """The run is finished and its result saved; or its progress is now in the file or directory `but`."""
        if os.path.exists(self.path) and but != self.path:
            os.remove(self.path)
        for folder in saved_parts(self.path) + saved_parts(self.path, ".tmp"):
            if folder != but:
                shutil.rmtree(folder)


def check_type(key, value, expected):
    """Raises ValueError unless a saved value is a list, an int or a float (a whole number is one), as expected."""
    if expected is float:
        good = isinstance(value, (int, float)) and abs(value) < 2**63
    elif expected is int:
        good = isinstance(value, int) and 0 <= value < 2**63
    else:
        good = isinstance(value, expected)
    if not good:
        raise ValueError(f"{key} is {brief(value)}")


def named_tensors(model, optimizers):
    """-> {name: tensor} of all that is saved. Names are weight|parameter, and so on for each state of an optimiser:
    parameter names hold dots, but no bar."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"weight|{name}"] = p.detach().contiguous()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{key}|{name}"] = value.detach().contiguous()
    return tensors


def load_tensors(f, model, optimizers):
    """The open file f of Progress.save -> weights of model and states of optimizers, in place."""
    states = {name: {} for name, _ in model.named_parameters()}
    for key in f.keys():
        part, name = key.split("|")
        states[name][part] = f.get_tensor(key)
    params = dict(model.named_parameters())
    for name, p in params.items():
        weight = states[name].pop("weight")
        if weight.shape != p.shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, not {tuple(p.shape)}")
        p.copy_(as_held(weight, p))
    names = {p: name for name, p in params.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = check_state(states.pop(names[p]), p, optimizer.STATE)


def check_state(state, p, keys):
    """The optimiser state of parameter p as it was saved -> as it is used. Raises ValueError if it is another one."""
    shapes = {key: () if key == "step" else tuple(p.shape) for key in keys}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != shapes:
        raise ValueError(f"an optimiser state is {found}, expected {shapes}")
    # AdamW's step count lives on the CPU, whatever the device of its parameter.
    return {key: value if key == "step" else as_held(value, p) for key, value in state.items()}


@contextlib.contextmanager
def signals_noted():
    """Ctrl-C and SIGTERM do nothing inside but fill the list that this gives, to be obeyed between two steps: a step
    that was taken in half must never be saved, and a save not be cut short."""
    noted = []

    def note(number, frame):
        if not noted:
            # Not print: a signal may come in the middle of a print, which cannot be entered twice.
            os.write(2, b"\nstopping after this step ...\n")
        noted.append(number)

    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # nohup ignores Ctrl-C, and so do we then. None is a handler that Python did not set and could not restore.
    caught = [number for number, handler in usual.items() if handler not in (signal.SIG_IGN, None)]
    for number in caught:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in caught:
            signal.signal(number, usual[number])


# Steps after which freed memory that is kept (see model.keep_memory) is given back.
TRIM_EVERY = 10


def fit(model, loss_of, block, batch, plan, progress, device, dtype):
    """Train model for plan.steps steps of plan.accumulate * batch examples each, see batches. -> the log, progress.log.
    loss_of(model, Batch) -> loss, summed over its trained tokens (or what plan.count counts), and their number.

    Saves every plan.every steps, after the last, and on Ctrl-C or SIGTERM after the step at hand; then it raises
    KeyboardInterrupt.
    With progress.resume it goes on from what was saved, to the same bits as if nothing had happened. A log entry: step,
    mean loss in nats per trained token since the last entry, tokens so far (padding included), padding, seconds."""
    whole = model
    model = share_out(whole, device, dtype)
    optimizers = make_optimizers(model, plan.lr, plan.optimizer, plan.lr_rest)
    progress.load(model, optimizers, plan)
    progress.check_disk(model, optimizers)
    stream = batches(block, batch * plan.accumulate, progress.step)
    if plan.watch:
        plan.watch(progress)
    progress.start_clocks()
    bar = tqdm(total=plan.steps, initial=progress.step, desc="training", unit="step")
    with bar, signals_noted() as noted:
        for step in range(progress.step, plan.steps):
            loss, count, tokens, padding = gradients(model, loss_of, next(stream), batch, plan, device, dtype)
            rate = learning_rate(step, plan.steps, plan.lr, plan.warmup)
            # Muon's products, too, take dtype: half of a step of a model of 135 M parameters is theirs.
            with autocast(device, dtype):
                clipped_step(model, optimizers, rate)
            progress.step = step + 1
            progress.tokens += tokens
            progress.padding += padding
            progress.read_clocks()
            # A signal that came to one process stops all.
            loss, stop = summed(loss, len(noted))
            progress.loss += loss
            progress.count += count
            bar.update()
            if progress.step % plan.log_every == 0 or progress.step == plan.steps:
                entry = write_entry(progress, plan.name)
                speed = progress.tokens / max(0.1, progress.seconds)
                bar.set_postfix({plan.name: f"{entry[plan.name]:.4f}", "tok_s": f"{speed:.0f}"})
            if progress.step % TRIM_EVERY == 0:
                nano.trim_memory()
            if plan.watch:
                plan.watch(progress)
                # What it took is not counted.
                progress.start_clocks()
            if stop:
                break
            if progress.step % plan.every == 0 or progress.step == plan.steps:
                progress.save(model, optimizers)
        [stopped] = summed(len(noted))
        if stopped:
            progress.save(model, optimizers)
    if stopped:
        print(f"saved step {progress.step}; run the same command with --resume to continue",
              file=sys.stderr)
        raise KeyboardInterrupt
    take_back(whole, model)
    return progress.log


def gradients(model, loss_of, examples, batch, plan, device, dtype):
    """Forward and backward pass of a step's examples, `batch` at a time: what one pass keeps is freed before the next.
    -> summed loss (of this process), and of the whole step: what it is divided by, all tokens, padding among them.

    The gradient is that of the mean over the trained tokens of the whole step, however it is cut: a mean of the
    batches' means would let a token count more, the fewer there are beside it."""
    parts = []
    for i in range(0, len(examples), batch):
        # Of many processes one without a text still comes to all calls, with a token that is not trained.
        mine = own_part(examples[i:i + batch]) or [([0], [False])]
        parts.append(collate(mine, device, plan.room))
    count = sum((plan.count or trained_tokens)(part) for part in parts)
    tokens = sum(part.tokens.numel() for part in parts)
    padding = sum(part.padding for part in parts)
    count, tokens, padding = summed(count, tokens, padding)
    total = 0.0
    for part in parts:
        with autocast(device, dtype):
            loss, _ = loss_of(model, part)
        # Of the gradients of many processes the engine takes the mean: their sum is meant.
        (loss / max(1, count) * processes()).backward()
        total += loss.item()
    return total, count, tokens, padding


def trained_tokens(batch):
    """How many tokens of a Batch the loss counts."""
    return int((batch.targets >= 0).sum())


def write_entry(progress, name):
    """Add what was summed up since the last log entry as a new one, and begin a new sum. -> the entry."""
    mean = progress.loss / max(1, progress.count)
    entry = {"step": progress.step, name: round(mean, 6), "tokens": progress.tokens,
             "padding": progress.padding, "seconds": round(progress.seconds, 1)}
    progress.log.append(entry)
    progress.loss = 0.0
    progress.count = 0
    return entry


# ----------------------------------------------------------------------------------------------------------------------
# Training from nothing.
#
# A teacher of 50 layers has the depth of the paper's, so that H-25 ... H-40 mean the same, and the width of a toy.
# It has 2.2 M parameters: per layer 2 query heads that share 1 key/value head of 32, and an MLP of 160.
#
# Depth costs time, not steps, so a shallow model learns the skills and is made deep afterwards. For the first few
# hundred steps its loss sits near 0.7 nats a token; it falls fast once copying from the context is found.
#
# The stack of 10 layers is repeated five times, and recovers within fifty steps. The price: the first 10 layers go on
# doing the work and solve 43 of 48 problems alone, and the attention of the others can go without a trace. Splitting
# each layer into five that share its work was tried, too, and so were ten layers that count: see results/README.md.

TEACHER = nano.Config(vocab_size=538, d_model=64, n_layer=50, n_head=2, n_kv_head=1, head_dim=32,
                      d_mlp=160, tie_embeddings=True, max_length=512)


@torch.no_grad()
def init_weights(model):
    """For training from nothing: small embeddings with one large shared component, and sharp queries and keys.

    Positional attention ("look one token back") needs a part of the input that is the same for every token; without
    biases only the embedding can bring it. With it, copying from the context is found several times sooner."""
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.1)
    # The shared component: channel 0.
    model.embed_tokens.weight[:, 0] += 0.3
    for block in model.layers:
        # Sharper attention from the start.
        for w in (block.mixer.q_proj.weight, block.mixer.k_proj.weight):
            w.mul_(1.8)
        # GPT-2's rule for residual branches.
        for w in (block.mixer.o_proj.weight, block.mlp.down_proj.weight):
            w.mul_(1.7 / math.sqrt(2 * len(model.layers)))


def restack(model, n_layer):
    """-> a deeper model: the stack of layers repeated as a whole; or a shallower one: its first n_layer layers. It is
    wrong at first and recovers by training. Copies that start as zero would never be wrong, but stay idle altogether.
    Embedding, last norm and head are shared with the old model, not copied. Raises UserError if the stack does not fit
    a whole number of times, or if a layer is not attention."""
    old = len(model.layers)
    fits = 1 <= n_layer <= old or n_layer > old and n_layer % old == 0
    if not fits or set(model.config.layout) != {"t"}:
        raise UserError(f"cannot make {n_layer} layers of {old}: only all-attention models, "
                        "fewer or a whole multiple")
    new = nano.HybridLM(replace(model.config, n_layer=n_layer, layout=()))
    for i, block in enumerate(new.layers):
        block.load_state_dict(model.layers[i % old].state_dict())
    new.embed_tokens = model.embed_tokens
    new.norm = model.norm
    new.lm_head = model.lm_head
    return new


# ----------------------------------------------------------------------------------------------------------------------
# Merging: the average of two checkpoints that share an ancestor, weight by weight. The usual picture: fine-tuning moves
# a model a short way along a valley of the loss, and between its two ends the loss is no higher. The paper's H-30-SFT,
# the member that was released, is such an average. Two layouts cannot be averaged: a Mamba layer and an attention layer
# have no weights in common. That is found out before an hour of training, not after it.

def merge_partner(args, model):
    """-> the model to merge with (float32, CPU), or None without --merge. Raises UserError if it cannot be merged."""
    if not args.merge:
        return None
    if not 0 <= args.merge_weight <= 1:
        raise UserError(f"--merge-weight must lie between 0 and 1, got {args.merge_weight}")
    other = nano.load_pretrained(args.merge)
    names = [f.name for f in fields(nano.Config)]
    differ = [name for name in names if getattr(other.config, name) != getattr(model.config, name)]
    if differ:
        raise UserError(f"--merge {args.merge}: it differs from the trained model "
                        f"in {', '.join(differ)}")
    return other


@torch.no_grad()
def merge(model, other, weight):
    """model becomes weight * model + (1 - weight) * other, in float32: bfloat16 would round half of the change away."""
    # The same config means the same order of weights.
    for p, q in zip(model.parameters(), other.parameters()):
        p.data = weight * p.float() + (1 - weight) * q.float().to(p.device)


# ----------------------------------------------------------------------------------------------------------------------
# The memory plan: what a training step needs, known before anything is loaded. A model on the meta device has shapes
# and no memory, and fake tensors pass through the real code, which does no work on them. So it is written down nowhere
# what a layer keeps for its backward pass: one layer of each kind runs forth and back on fake tensors, of few tokens
# and of twice as many, while a Ledger counts. Bytes lie on a line, fixed + tokens * per_token.
#
# Trained weights (float32), frozen ones, the teacher and optimiser states are there all the time. On top comes the
# largest of four moments:
#       the loss            forward is over: what all layers keep, and some logits of student and teacher
#       the last layer      what all layers keep, and what the last of them makes while it goes back
#       the first layer     the gradients of all weights, and what the first layer makes; nothing else is kept any more
#       the update          the gradients of all weights, and what the optimiser makes of them
# Between the last layer and the first, what was kept goes as gradients come. A layer that recomputes keeps its input
# alone, and runs a second time when its turn comes: a third more work.
#
# Every text counts as --ctx tokens, all of them trained. N processes hold 1 / N of weights, gradients, states and
# texts, and two layers as a whole; before and after the steps each holds all weights. Not counted are Triton's scratch
# (some 100 MB at the 15B shape) and the ranking of layers. A GB is 1e9 bytes.

# The share of a device's memory to plan with. A GPU keeps some for itself, and loses some in gaps between tensors; on
# a CPU the gaps are a quarter (see model.keep_memory), and there are other programs.
ROOM = {"cuda": 0.93, "cpu": 0.7, "mps": 0.7}
# No built-in text is longer, in tokens of their own tokenizer.
LONGEST_BUILT_IN = 180


class Ledger(TorchDispatchMode):
    """A context that counts the bytes of the tensors made in it: now, and the most so far."""
    def __init__(self, before):
        """before: tensors that are there already and do not count."""
        super().__init__()
        self.now = 0
        self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.enter(tensor.untyped_storage())
        return result

    def enter(self, storage):
        """Views share a storage, which counts once and leaves with the last of them."""
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.leave, key, storage.nbytes())

    def leave(self, key, size):
        self.known.remove(key)
        self.now -= size


def observe(forward, before):
    """forward() makes a tensor of the tensors `before` -> bytes kept for its backward pass; the most there is at once
    in both passes, that and the gradients of the weights included."""
    ledger = Ledger(before)
    with ledger:
        y = forward()
        kept = ledger.now
        y.backward(torch.empty_like(y))
    return kept, ledger.most


class Line(NamedTuple):
    """Bytes that grow with the tokens of a step."""
    fixed: float
    per_token: float = 0.0

    def at(self, tokens):
        return self.fixed + tokens * self.per_token

    def plus(self, other, times=1):
        return Line(self.fixed + times * other.fixed, self.per_token + times * other.per_token)


def lines_through(observed, small, large):
    """observed(tokens) -> two numbers of bytes; two numbers of tokens -> the two Lines."""
    lines = []
    for low, high in zip(observed(small), observed(large)):
        slope = (high - low) / (large - small)
        lines.append(Line(low - slope * small, slope))
    return lines


class KernelScan(torch.autograd.Function):
    """What Triton's scan keeps and makes, see model.TritonScan, and none of its work: kernels take no fake tensors."""
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.empty(inputs[0].shape, dtype=inputs[0].dtype)

    @staticmethod
    def backward(ctx, grad_y):
        u, _, A, *_ = ctx.saved_tensors
        # The cells after every 16th step stay until all gradients are there.
        cells = torch.empty(u.numel() // 16, A.shape[1])
        grads = tuple(torch.empty(m.shape, dtype=m.dtype) for m in ctx.saved_tensors)
        del cells
        return grads


def kernel_scan(u, dt, A, B, C, D, z, dt_bias, h, reset):
    """model.selective_scan as on a GPU."""
    return KernelScan.apply(u, dt, A, B, C, D, z, dt_bias), None


@functools.cache
def layer_lines(config, kind, trained, batch, ctx, dtype, stream, kernels):
    """A layer of this kind; trained: the names of its parameters that train; dtype: of products and frozen weights;
    stream: of its input; kernels: are there a GPU's? -> Lines: what it keeps, the most in both passes."""
    def observed(batch, ctx):
        with FakeTensorMode():
            layer = nano.cast(nano.Block(config, kind), "cpu", dtype)
            for name, p in layer.named_parameters():
                p.requires_grad_(name in trained)
                p.data = p.data.float() if name in trained else p.data
            if kernels and kind == "m2":
                layer.mixer.scan = kernel_scan
            if kernels and kind == "t":
                layer.mixer.attend = functools.partial(nano.attend_by_definition, layer.mixer)
            ids = torch.empty(batch, ctx, dtype=torch.long)
            x = torch.empty(batch, ctx, config.d_model, dtype=stream, requires_grad=True)
            place, _ = nano.make_place(config, ids, 0, None, None, stream)

            def forward():
                with autocast(x.device, dtype):
                    return layer(x, None, place)[0]
            return observe(forward, [x, place.cos, place.sin, *layer.parameters()])

    # A scan is a loop over tokens, and its chunks depend on the batch; short texts keep less in attention.
    if kind == "m2":
        return lines_through(lambda tokens: observed(batch, tokens // batch), 16 * batch, 32 * batch)
    return lines_through(lambda tokens: observed(tokens // ctx, ctx), ctx, 2 * ctx)


def loss_line(loss, heads, dtype, stream):
    """loss(x, *heads) -> the summed loss of hidden states x (m, d_model); heads: output layers on the meta device
    -> the Line of the most in its forward and backward pass, x included."""
    def observed(tokens):
        with FakeTensorMode():
            copies = []
            for head in heads:
                copies.append(torch.nn.Linear(head.in_features, head.out_features, bias=False))
                made = torch.empty(head.weight.shape, dtype=head.weight.dtype)
                copies[-1].weight = torch.nn.Parameter(made, head.weight.requires_grad)

            def forward():
                x = torch.empty(tokens, head.in_features, dtype=stream, requires_grad=True)
                with autocast(x.device, dtype):
                    return loss(x, *copies)
            return observe(forward, [copy.weight for copy in copies])

    # One piece or two, see LossInPieces.
    return lines_through(observed, 1024, 2048)[1]


def optimizer_bytes(optimizers, kernels):
    """-> bytes of what the optimisers keep, and of what they make in a step."""
    kept = 0
    made = 0
    for optimizer in optimizers:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        sizes = [p.nbytes for p in params]
        # A step count is no more than a few bytes.
        kept += sum(key != "step" for key in optimizer.STATE) * sum(sizes)
        if isinstance(optimizer, Muon):
            # Six to eight tensors of the size of what is orthogonalised together.
            for p in params:
                alike = sum(q.shape == p.shape for q in params)
                made = max(made, 8 * p.nbytes * min(alike, muon_count(p.shape)))
        else:
            # AdamW makes three of one weight after the other, or, on a GPU, one of all weights together.
            made = max(made, sum(sizes) if kernels else 3 * max(sizes))
    return kept, made


class MemoryPlan(NamedTuple):
    """The memory of a training step, in one process."""
    train: str                                           # which weights: all or mixers
    recompute: bool
    dtype: torch.dtype                                   # of products
    batch: int                                           # texts ...
    ctx: int                                             # ... of so many tokens
    room: float                                          # bytes to plan with
    resident: dict                                       # {name: bytes} that are there all the time
    kept: Line                                           # by all layers, for the backward pass
    moments: dict                                        # {name: Line}

    def most(self):
        """-> bytes that are there at once."""
        tokens = self.batch * self.ctx
        return sum(self.resident.values()) + max(line.at(tokens) for line in self.moments.values())

    def most_tokens(self):
        """-> tokens of a step that there is room for, at least 0."""
        left = self.room - sum(self.resident.values())
        tokens = [(left - line.fixed) / line.per_token for line in self.moments.values() if line.per_token]
        fixed = max(line.fixed for line in self.moments.values())
        return max(0, int(min(tokens))) if fixed <= left else 0

    def fits(self):
        return self.most() <= self.room


def memory_plan(student, others, loss, heads, args, dtype, room, kernels, n=1):
    """student: on the meta device, with the dtypes, requires_grad and recompute that it trains with; others: {name:
    bytes} of what is not trained; loss, heads: see loss_line; args: train, batch, accumulate, ctx, lr, optimizer;
    n: processes -> MemoryPlan."""
    config = student.config
    stream = student.embed_tokens.weight.dtype
    batch = math.ceil(args.batch / n)
    tokens = batch * args.ctx
    weights = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    states, made = optimizer_bytes(make_optimizers(student, args.lr, args.optimizer), kernels)
    resident = others | {"trained weights": weights, "optimiser states": states}

    kept = Line(0)
    last = []
    first = []
    for kind, count in collections.Counter(config.layout).items():
        block = student.layers[config.layout.index(kind)]
        trained = frozenset(name for name, p in block.named_parameters() if p.requires_grad)
        keeps, most = layer_lines(config, kind, trained, batch, args.ctx, dtype, stream, kernels)
        first.append(most)
        last.append(most if student.recompute else most.plus(keeps, -1))
        if student.recompute:
            # What is fixed are copies of weights in dtype, which autocast keeps until the loss is there.
            keeps = Line(keeps.fixed, config.d_model * stream.itemsize)
        kept = kept.plus(keeps, count)
    gradients = Line(weights / n)
    if args.accumulate > 1:
        # Those of the batches before this one.
        kept = kept.plus(gradients)
    moments = {
        "the loss": kept.plus(loss_line(loss, heads, dtype, stream)),
        "the last layer": kept.plus(max(last, key=lambda line: line.at(tokens))),
        "the first layer": gradients.plus(max(first, key=lambda line: line.at(tokens))),
        "the update": gradients.plus(Line(made))}
    if n > 1:
        # Before and after the steps each holds both models whole.
        whole = sum(others.values()) + weights
        resident = {name: size / n for name, size in resident.items()}
        resident["two whole layers"] = 2 * max(layer_bytes(block) for block in student.layers)
        moments["conversion, all weights whole"] = Line(whole - sum(resident.values()))
    return MemoryPlan(args.train, student.recompute, dtype, batch, args.ctx, room, resident, kept, moments)


def layer_bytes(block):
    return sum(p.nbytes for p in block.parameters())


def choose_plan(plans):
    """-> the first of some MemoryPlans that fits; the last, if none does. Later ones are not made."""
    for plan in plans:
        if plan.fits():
            break
    return plan


def print_plans(plans):
    """The chosen plan, term by term, and all of them in a line each."""
    chosen = choose_plan(plans)
    tokens = chosen.batch * chosen.ctx
    print(f"memory of a step of {chosen.batch} x {chosen.ctx} tokens in GB, products in {chosen.dtype}, training "
          f"{chosen.train}{', layers recomputed' if chosen.recompute else ''}")
    for name, size in chosen.resident.items():
        print(f"  {name:34}{size / 1e9:9.2f}")
    for name, line in chosen.moments.items():
        print(f"  {'or at ' + name:34}{line.at(tokens) / 1e9:9.2f}")
    print(f"  {'in all':34}{chosen.most() / 1e9:9.2f} of {chosen.room / 1e9:.2f}\n")
    print("train    recomputed   kept, kB a token   in all, GB   fits   largest step")
    for plan in plans:
        words = ("no", "yes")
        most = plan.most_tokens()
        rows = f"{most // plan.ctx} x {plan.ctx}" if most >= plan.ctx else f"1 x {most}"
        print(f"{plan.train:9}{words[plan.recompute]:13}{plan.kept.per_token / 1e3:16.1f}{plan.most() / 1e9:13.2f}"
              f"   {words[plan.fits()]:7}{rows}")
    if not chosen.fits():
        print("none fits: lower --batch or --ctx")


def plan_flags(add):
    """The flags of the memory plan, for an ArgumentParser's add_argument."""
    add("--dry-run", action="store_true", help="print the memory plan and stop: no weight is read, nothing written")
    add("--memory", type=float, metavar="GB",
        help="with --dry-run: plan for a GPU of this size (default: for this device)")


def planned_for(args):
    """The flags -> device, dtype of products, and bytes: what the run would take, or with --memory a GPU of that size.
    Raises UserError."""
    wanted = args.dtype
    device, dtype = start_script(args)
    if args.memory is None:
        # A GPU is one process's own.
        share = 1 if device.type == "cuda" else processes()
        return device, dtype, ROOM[device.type] * nano.memory_bytes(device) / share
    if not args.dry_run or not 0 < args.memory < math.inf:
        raise UserError("--memory GB, above 0, is for --dry-run")
    if args.device == "auto":
        device = torch.device("cuda")
    return device, nano.pick_dtype(wanted, device), ROOM[device.type] * args.memory * 1e9


def planned_config(path):
    """A checkpoint directory -> its Config. Weights are not read, and need not be there: one may plan before the
    download. If they are, their headers are checked."""
    path = nano.checkpoint_dir(path)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in os.listdir(path)):
        return nano.outline(path)[0].config
    return nano.read_config(path)


def longest_text(args, vocab_size):
    """-> tokens that the longest text may have."""
    own = not args.data and vocab_size == TEACHER.vocab_size
    return min(args.ctx, LONGEST_BUILT_IN) if own else args.ctx


# ----------------------------------------------------------------------------------------------------------------------
# Many processes: the same scripts on all GPUs of a machine, or of several. You may skip this: a process that is alone
# passes through every function below as if it were not there.
#
#       torchrun --nproc_per_node 8 distill.py --teacher DIR --replace 12 --data traces.jsonl --out out/mine
#
# torchrun starts this command 8 times and tells each process, in its environment, its number (its "rank", 0 to 7), how
# many there are, and where they find each other. Each then runs main() from top to bottom, on a GPU of its own, and
# takes the same decisions, for it has the same flags, files and seed. At some places all of them meet and exchange
# something (a "collective" call): a sum, a gathered matrix. A process that came to other calls than the rest, or in
# another order, would wait for ever; so whatever only one of them can know, such as a signal, is first told to all.
#
# Sharded is what training needs most memory for, 16 bytes a parameter: weights, gradients, optimiser states. FSDP2 (in
# PyTorch: fully_shard) leaves every process 1/N of the rows of each matrix. Shortly before a layer computes, forward or
# backward, its rows are gathered from all; right after it, they are freed. In the backward pass the gradients of all
# processes are added up, and each keeps those of its own rows. AdamW works on numbers one by one, so on rows as well.
# Muon needs whole matrices: process 0 gets all rows of the first few, process 1 those of the next, and so on.
#
# Shared out is the work: of the examples of a batch, process r takes numbers r, r + N, r + 2N, ... So a step has the
# same gradient whatever N is, but for rounding; --batch counts the texts of all processes. In the same way they share
# the problems that are solved, the texts of LOO and the candidates of MMR. For these, for conversion, and when the
# result is saved every process holds both models whole, what trains in float32: one GPU must have room for that, and
# for a trial of MMR if there is one. Gradients and optimiser states of a whole student exist in a trial alone.
#
# Files are written by process 0. The result is that of a single process. A run in progress, though, is written by all,
# each its rows, and can be continued by any number of them, one included.

def processes():
    """How many processes run this script together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(items):
    """What this process takes of a list: every Nth item, from the one of its own number on."""
    return items[dist.get_rank()::processes()] if processes() > 1 else items


def summed(*numbers):
    """Numbers that each process has -> a list of their sums over all processes."""
    if processes() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return [type(number)(total) for number, total in zip(numbers, sums.tolist())]


def union(part):
    """A dict that each process has -> one of all their entries."""
    if processes() == 1:
        return part
    parts = [None] * processes()
    dist.all_gather_object(parts, part)
    whole = {}
    for each in parts:
        whole |= each
    return whole


def once(do, *args, **named):
    """do(*args, **named) by process 0, while the others wait. -> what it gave there. A UserError is everybody's."""
    if processes() == 1:
        return do(*args, **named)
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = do(*args, **named)
        except UserError as e:
            outcome[1] = str(e)
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


# A tensor that is sharded is a DTensor: it has the shape of the whole, of which it holds this process's rows.

def is_sharded(tensor):
    """Does this process hold no more than some rows of it?"""
    return processes() > 1 and hasattr(tensor, "full_tensor")


def share_out(model, device, dtype):
    """-> a model that computes the same, in hidden() and then lm_head, of whose weights each process holds its rows.
    `model` is a shell without weights until take_back. A single process: the model itself.
    Weights that train are float32 in each process's rows; on a GPU they are gathered, and used, in dtype."""
    if processes() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"torchrun with several processes needs --device cuda or cpu, got {device}")
    # A state that a layer gives back may be a view. Nobody writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    # What one that has generated keeps, see model.join_projections, is not sharded.
    for module in model.modules():
        if getattr(module, "joined", None) is not None:
            module.joined = None
    # deepcopy asks its memo before it copies: the weights stay the same, and leave the shell behind.
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    set_weights(model, {name: p.detach().to("meta") for name, p in model.named_parameters()})
    mesh = init_device_mesh(device.type, (processes(),))
    full = MixedPrecisionPolicy(cast_forward_inputs=False)
    cheap = full
    if device.type == "cuda":
        cheap = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)

    def shard(module, policy):
        for p in module.parameters():
            if p.requires_grad and not is_sharded(p):
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        fully_shard(module, mesh=mesh, mp_policy=policy)

    # What is gathered together: a layer. A call takes what no earlier call has taken inside it.
    for block in shared.layers:
        if any(nano.keeps_float32(name) for name, _ in block.named_parameters()):
            # The cells' own weights, A_log, D and the bias of dt, stay float32, and the small ones beside them.
            for name in ("in_proj", "out_proj"):
                shard(getattr(block.mixer, name), cheap)
            shard(block.mixer, full)
        shard(block, cheap)
    # The residual stream begins in float32, as in a single process, and the loss ends in it.
    shard(shared, full)
    register_fsdp_forward_method(shared, "hidden")
    return shared


@torch.no_grad()
def take_back(model, shared):
    """The weights of what share_out made of this model become its own again, whole in every process."""
    if shared is model:
        return
    # After a forward pass without a backward, embedding and head are still gathered.
    shared.reshard()
    set_weights(model, {name: p.full_tensor() for name, p in shared.named_parameters()})


def set_weights(model, weights):
    """{name: tensor}, tied ones once, as named_parameters has them: become the model's parameters, not copied."""
    model.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def orthogonalize_shared(matrices):
    """As orthogonalize, of sharded matrices of one shape, in place. Each process is sent all rows of a few of them,
    works on these, and sends to everybody the rows that are theirs."""
    n = processes()
    rows, columns = matrices[0].shape
    # As FSDP2 cuts: equal pieces, and what is left for the last ones.
    most = -(-rows // n)
    held = [max(0, min(most, rows - i * most)) for i in range(n)]
    each = -(-len(matrices) // n)
    own = [matrix.to_local() for matrix in matrices]
    # Zeros where the matrices run out; they stay zeros.
    own += [torch.zeros_like(own[0])] * (each * n - len(own))
    own = torch.stack(own)                               # (n * each, held rows, columns): `each` for every process
    to_one = [own.numel() // n] * n
    from_one = [each * height * columns for height in held]
    received = own.new_empty(sum(from_one))
    dist.all_to_all_single(received, own.flatten(), from_one, to_one)
    parts = [part.view(each, height, columns) for part, height in zip(received.split(from_one), held)]
    whole = orthogonalize(torch.cat(parts, dim=1))       # (each, rows, columns)
    back = torch.cat([part.flatten() for part in whole.split(held, dim=1)])
    received = own.new_empty(own.numel())
    dist.all_to_all_single(received, back.to(own.dtype), to_one, from_one)
    for matrix, update in zip(matrices, received.view_as(own)):
        matrix.to_local().copy_(update)
    return matrices


# Progress in parts: a directory progress-STEP beside where a single process has its file, written by PyTorch's
# distributed checkpoint under another name and renamed when all is on the disk. A file or directory that is there is
# whole, then; older ones go when a newer one has come. (The engine keeps its table of contents as a pickle: continue no
# run of somebody whose code you would not run.)

def saved_parts(path, ending=""):
    """The path of a Progress -> its directories, the newest last. ending ".tmp": those that were never finished."""
    name = path.removesuffix(".safetensors")
    return sorted(glob.glob(f"{glob.escape(name)}-{'[0-9]' * 8}{ending}"))


def save_parts(progress, model, optimizers):
    """Progress.save of many processes. Raises UserError if it fails in any of them."""
    from torch.distributed import checkpoint
    path = f"{progress.path.removesuffix('.safetensors')}-{progress.step:08d}"
    unfinished = path + ".tmp"
    once(shutil.rmtree, unfinished, ignore_errors=True)
    try:
        checkpoint.save(named_tensors(model, optimizers), checkpoint_id=unfinished)
    except checkpoint.api.CheckpointException as e:
        raise_cause(e, f"cannot write {path}")

    def finish():
        nano.write_json(os.path.join(unfinished, "run.json"), progress.meta())
        shutil.rmtree(path, ignore_errors=True)
        os.rename(unfinished, path)
        progress.remove(but=path)
    once(finish)


def load_parts(path, model, optimizers):
    """The directory `path` of save_parts -> weights of model and states of optimizers, in place. By any number of
    processes: each reads the rows that it holds now."""
    from torch.distributed import checkpoint
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = {key: torch.zeros_like(p.detach()) for key in optimizer.STATE if key != "step"}
                if "step" in optimizer.STATE:
                    optimizer.state[p]["step"] = torch.tensor(0.0)
    try:
        with warnings.catch_warnings():
            # That one process alone is meant is no news.
            warnings.simplefilter("ignore")
            checkpoint.load(named_tensors(model, optimizers), checkpoint_id=path, no_dist=processes() == 1)
    except checkpoint.api.CheckpointException as e:
        raise_cause(e, f"{path} does not continue this run")


def raise_cause(exception, what):
    """Raises a CheckpointException, which is the failures of all processes, as a UserError of one line."""
    cause = next(iter(exception.failures.values()))[0]
    if is_lost(cause):
        raise cause
    raise UserError(f"{what}: {cause}") from None


def as_held(value, p):
    """A whole tensor -> as parameter p is held here: on its device, and of a sharded one the rows of this process."""
    if not is_sharded(p):
        return value.to(p.device)
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)


# What goes wrong is said once. Mostly all processes see the same mistake; or one fails, and the others fail a moment
# later, because it does not answer any more. So the first to fail tells the rest, and they are silent.

def run_together(main):
    """nano.run_main, for a script that torchrun may have started: then it is one of many processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        nano.run_main(main)
        return
    store, rank, world = next(dist.rendezvous("env://"))
    # When torchrun starts all again (--max-restarts), what the last attempt left in its store must not be found.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    # One may wait for long while another works; that one is gone is noticed by torchrun, and by gloo at once.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=12))
    terminal = os.dup(2)
    if rank > 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
    code = 0
    try:
        main()
    except BaseException as e:
        code, text = ending(e)
        if text and store.add("failed", 1) == 1:
            os.write(terminal, text.encode())
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the usual good-byes: what the engine's threads are in the middle of might never end.
    os._exit(code)


def ending(exception):
    """-> exit code, and what to print, of a process that ends with this exception; the same as with nano.run_main."""
    if isinstance(exception, SystemExit):
        return exception.code or 0, ""
    if isinstance(exception, KeyboardInterrupt):
        return 130, "interrupted\n"
    if isinstance(exception, UserError):
        return 2, f"error: {exception}\n"
    if is_lost(exception):
        return 1, "error: another process of this run has ended; --resume continues from the last save\n"
    return 1, "".join(traceback.format_exception(exception))


def is_lost(exception):
    """Does this exception say that another process does not answer?"""
    return isinstance(exception, dist.DistError) or "gloo" in str(exception)


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    # What to start from, and where to write.
    add("--scratch", action="store_true", help="start from nothing, with the shape of the shipped teacher")
    add("--model", help="start from this checkpoint directory")
    add("--layers", type=int,
        help="with --scratch: layers (default 50); with --model: make this many of it")
    add("--out", required=True, help="directory for the result")
    # What to train on.
    add("--data", help="JSONL file, plain or .gz: prompt/response, messages or conversations "
                       "(default: the built-in traces)")
    add("--batch", type=int, default=32, help="texts per step (default 32)")
    add("--accumulate", type=int, default=1, metavar="K",
        help="make a step of K batches, one after the other: K times the texts, the memory of one (default 1)")
    add("--ctx", type=int, default=512, help="longest text in tokens (default 512)")
    add("--pack", action="store_true", help="let texts share rows of up to --ctx tokens: same loss, less padding")
    add("--easy", type=float, default=0.0, help="share of the steps during which built-in problems "
                                                "grow from small to full size (default 0)")
    # How to train.
    add("--steps", type=int, default=200, help="optimiser steps (default 200)")
    add("--lr", type=float, help="peak learning rate (default 0.005 with --scratch, else 0.0005, "
                                  "or 0.0002 with adamw)")
    add("--lr-rest", type=float, help="that of everything but Mamba mixers (default: --lr)")
    add("--optimizer", default="auto", choices=("auto", "muon", "adamw"), help="muon: for layers' "
        "matrices; auto: adamw if --batch * --accumulate * --ctx < 16 times the model's width "
        "(default auto)")
    add("--warmup", type=int, default=50, help="steps of linear warm-up (default 50)")
    add("--seed", type=int, default=0, help="random seed (default 0)")
    # What to do with the result.
    add("--merge", metavar="DIR", help="afterwards average the weights with those of this checkpoint")
    add("--merge-weight", type=float, metavar="W",
        help="with --merge: result = W * trained + (1 - W) * DIR (default 0.5)")
    add("--eval", type=int, help="held-out problems per family (default 100, or 0 with --data: none)")
    add("--save-dtype", default="float32", choices=("float32", "bfloat16"), help="default float32")
    # How to compute.
    add("--threads", type=int, help="CPU threads (default: all cores)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    add("--dtype", default="auto", help="of matrix products: auto, float32 or bfloat16 (default auto)")
    plan_flags(add)
    # What happens to runs that were interrupted or finished.
    add("--every", type=int, default=200, help="steps between saves (default 200)")
    add("--resume", action="store_true", help="continue an interrupted run in --out, with the same flags")
    add("--overwrite", action="store_true", help="replace a finished result in --out")
    return p.parse_args()


def check_flags(args):
    """Raises UserError for what can be seen to be wrong without any file."""
    for name in ("steps", "batch", "accumulate", "ctx", "every", "layers", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if args.data and (args.eval or args.easy):
        raise UserError("--eval and --easy are about the built-in problems; --data brings its own texts")
    if args.eval is None:
        args.eval = 0 if args.data else 100
    for name in ("eval", "warmup"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must be 0 or more, got {getattr(args, name)}")
    if not 0 <= args.easy <= 1:
        raise UserError(f"--easy must be from 0 to 1, got {args.easy}")
    if args.merge_weight is not None and not args.merge:
        raise UserError("--merge-weight belongs to --merge")
    if args.merge and args.merge_weight is None:
        args.merge_weight = 0.5
    check_rates(args.lr, args.lr_rest)
    if args.scratch == bool(args.model):
        raise UserError("pass either --scratch or --model DIR")


def own_tokenizer(args):
    """Let --out hold the tokenizer of a new model. Raises UserError where it holds another one."""
    there = os.path.exists(os.path.join(args.out, "tokenizer.json"))
    if not there or args.overwrite and not args.resume:
        print("training the tokenizer ...")
        make_tokenizer(args.out)
    elif nano.load_tokenizer(args.out).max_token_value + 1 != TEACHER.vocab_size:
        raise UserError(f"{args.out} holds another model's tokenizer: choose another --out, or pass --overwrite")


def start_model(args):
    """-> the model to train (float32, CPU) and its Codec; --out holds the tokenizer of a new model afterwards."""
    torch.manual_seed(args.seed)
    if args.model:
        model = nano.load_pretrained(args.model)
        if args.layers:
            model = restack(model, args.layers)
        return model, load_codec(args.model)
    # All decided by one process: another might already see what it has written.
    once(own_tokenizer, args)
    model = nano.HybridLM(replace(TEACHER, n_layer=args.layers or TEACHER.n_layer, layout=()))
    init_weights(model)
    return model, load_codec(args.out)


def choose_rates(args, d_model):
    """Fill in --optimizer auto and the rates."""
    muon = (0.005, None) if args.scratch else (0.0005, None)
    adamw = muon if args.scratch else (0.0002, None)
    choose_optimizer(args, d_model, muon, adamw)


def start_data(args, codec, n_vocab):
    """-> the block function of the examples to train on."""
    if args.data:
        examples, _ = read_jsonl(args.data, codec, args.ctx, n_vocab)
        return list_block(examples, args.seed)
    if not args.easy:
        return trace_block(codec, args.seed, args.ctx)
    # Blocks until problems have their full size.
    growing = max(1, args.easy * args.steps / PER_BLOCK)
    return trace_block(codec, args.seed, args.ctx, lambda number: min(1.0, 0.2 + 0.8 * number / growing))


def start_progress(args, model, other, block):
    """-> the Progress of this run. other: the model to merge with, or None."""
    keys = ("layers", "steps", "batch", "accumulate", "ctx", "pack", "lr", "lr_rest", "optimizer", "warmup",
            "easy", "seed", "dtype", "merge_weight", "save_dtype")
    run = {key: getattr(args, key) for key in keys}
    run["content of the model"] = weights_hash(model)
    run["content of --merge"] = weights_hash(other) if other else None
    run["content of --data"] = file_hash(args.data)
    run["content of the first texts"] = texts_hash(block)
    return Progress(os.path.join(args.out, "progress.safetensors"), run, args.resume)


def evaluate(args, model, codec):
    """Let the model solve held-out problems. -> report entries; prints a table."""
    if not args.eval:
        return {}
    held = problem_set("test", args.eval)
    by_family, pooled = accuracy(held, solve(model, codec, held))
    for name, share in {**by_family, "all": pooled}.items():
        print(f"{name:12} {share:.3f}")
    return {"accuracy": pooled, "accuracy_by_family": by_family, "problems_per_family": args.eval}


def memory_plans(args, config, device, dtype, room):
    """Yields a MemoryPlan without and one with recomputing, for a model of this config."""
    with torch.device("meta"):
        model = nano.HybridLM(config)
    others = {}
    if args.merge:
        others["the model to merge with"] = sum(p.nbytes for p in model.parameters())

    def loss(x, head):
        return summed_cross_entropy(x, head, torch.empty(len(x), dtype=torch.long))

    values = {"train": "all", "ctx": longest_text(args, config.vocab_size)}
    shape = argparse.Namespace(**vars(args) | values)
    for model.recompute in (False, True):
        yield memory_plan(model, others, loss, [model.lm_head], shape, dtype, room,
                          device.type == "cuda", processes())


def start_config(args):
    """-> the Config of the model to train, from no more than its config.json."""
    config = planned_config(args.model) if args.model else TEACHER
    return replace(config, n_layer=args.layers, layout=()) if args.layers else config


def main():
    """Check flags and files, train, merge, save, evaluate. What a user can get wrong is found before the first step."""
    args = parse_args()
    check_flags(args)
    device, dtype, room = planned_for(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.dry_run:
        config = start_config(args)
        choose_rates(args, config.d_model)
        return print_plans(list(memory_plans(args, config, device, dtype, room)))
    args.out = once(claim_out, args.out, [args.model, args.merge], args.overwrite, args.resume,
                    done="training.json")
    model, codec = start_model(args)
    # Refused now, not after the training.
    other = merge_partner(args, model)
    block = start_data(args, codec, model.config.vocab_size)
    choose_rates(args, model.config.d_model)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, layout {' '.join(model.config.layout)}; "
          f"{args.optimizer} at {args.lr:g}, products in {dtype}\n"
          f"an example, trained part marked: {show_example(codec, block(0, 1)[0])}")
    progress = start_progress(args, model, other, block)
    if args.resume and nano.is_finished(args.out, progress.run, args.overwrite, done="training.json"):
        return
    plan = Plan(args.steps, args.lr, args.warmup, args.every, log_every=10, name="loss",
                optimizer=args.optimizer, lr_rest=args.lr_rest, room=args.ctx if args.pack else 0,
                accumulate=args.accumulate)
    model = model.to(device).train()
    model.recompute = choose_plan(memory_plans(args, model.config, device, dtype, room)).recompute
    log = fit(model, cross_entropy, block, args.batch, plan, progress, device, dtype)
    if other:
        merge(model, other, args.merge_weight)
    save_dtype = getattr(torch, args.save_dtype)
    once(nano.save_pretrained, model, args.out, tokenizer_from=args.model, dtype=save_dtype)
    # Evaluated as saved, rounding included.
    model = nano.load_pretrained(args.out, device)
    result = {**evaluate(args, model, codec), **provenance(device)}
    report = {"args": vars(args), "run": progress.run, "log": log, **result}
    once(nano.write_json, os.path.join(args.out, "training.json"), report)
    once(progress.remove)
    print(json.dumps({"loss": log[-1]["loss"], **result}))
    print(f"next: python sample.py --model {args.out} --chat", file=sys.stderr)


if __name__ == "__main__":
    run_together(main)
