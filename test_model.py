"""Tests of nanoH1, each named after the property it holds. Run: python -m pytest (no network, no GPU, about a minute)."""
import os
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"     # before anything imports Triton: without a GPU it interprets its kernels

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import regex
from safetensors.torch import load_file, save_file

from model import (Config, GPT2_PATTERN, HybridLM, INITS, KV, SSM, UserError, ChunkedScan, convert, load_pretrained,
                   load_tokenizer, save_pretrained, selective_scan)

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


def tiny(layout, dtype=torch.float64, seed=0, **change):
    """A small model, every parameter random, so that no term can be dropped unseen. As in the 15B: hidden size unlike
    heads * head_dim, several query heads per key/value head, d_state smaller than head_dim, odd dt_rank."""
    torch.manual_seed(seed)
    layout = tuple(layout.split())
    shape = dict(vocab_size=61, d_model=24, n_layer=len(layout), n_head=4, n_kv_head=2, head_dim=8, d_mlp=20,
                 d_state=4, dt_rank=3, layout=layout)
    model = HybridLM(Config(**shape | change))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (1.0 if name.endswith("dt_proj.bias") else 0.1))
    return model.to(dtype).eval()


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


LAYOUTS = ["t t", "m2 m2", "m2 t", "t m2 t m2", "m2 i n t m2"]


# ----------------------------------------------------------------------------------------------------------------------
# The selective scan.

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


def with_gradients(impl, inputs):
    """-> {name: tensor}: y, the state, and the gradient of every float input for random cotangents of both. A plain sum
    in place of the cotangents would not see permuted or rescaled gradients."""
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    y, h = selective_scan(**leaves, impl=impl)
    rng = torch.Generator().manual_seed(1)
    draw = lambda m: torch.randn(m.shape, generator=rng, dtype=torch.float64).to(m.dtype)
    torch.autograd.backward([y, h], [draw(y), draw(h)])
    return {"y": y.detach(), "state": h.detach()} | {f"d{k}": v.grad for k, v in leaves.items() if v.requires_grad}


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
# The model: time, state, batches.

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
    """Truncated backpropagation hands states on in training mode: caches are then copied instead of written in place."""
    model, tokens = tiny("t m2"), some_tokens(2, 9)
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
    padding is known by its place, never by its id. Pieces of 3 put whole pieces of padding in front of short prompts."""
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
    model = tiny(layout)
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
    import model as module
    model = tiny("t m2")
    tokens, reset, _ = packed([6, 30, 9])
    tight, _ = model(tokens, reset=reset)
    conv, scan, place = module.causal_conv, module.selective_scan, module.make_place
    if leak == "conv":
        monkeypatch.setattr(module, "causal_conv", lambda x, before, weight, bias, pos: conv(x, before, weight, bias, None))
    if leak == "scan":
        monkeypatch.setattr(module, "selective_scan", lambda *a, **k: scan(*[
            None if isinstance(m, torch.Tensor) and m.dtype == torch.bool else m for m in a], **k | {"reset": None}
            if "reset" in k else k))
    if leak == "attention":
        def leaky(*args):
            right, origin = place(*args)
            return right._replace(mask=None), origin
        monkeypatch.setattr(module, "make_place", leaky)
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
    model, tokens = tiny("m2 t m2", torch.float32), some_tokens(2, t)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens)[0].float().square().mean()
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Generation.

def test_generation_stops_at_stop_tokens_and_leaves_them_out():
    model = tiny("m2 t", torch.float32, eos_ids=(0,))
    prompt = [3, 1, 4]
    free = model.generate([prompt], 20, stop=())[0]
    assert len(free) == 20
    for at in (0, 3, 9):
        cut = free.index(free[at])
        assert model.generate([prompt], 20, stop={free[at]})[0] == free[:cut]
        model.config = dataclasses.replace(model.config, eos_ids=(free[at],))
        assert model.generate([prompt], 20)[0] == free[:cut]                 # stop=None means the end tokens
    assert model.generate([prompt], 7, stop=())[0] == free[:7]


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
