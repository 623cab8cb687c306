"""
The Triton part of the tests (to be merged into test_model.py): python -m pytest test_triton_part.py -q
Without a GPU the kernels run in Triton's interpreter, at toy sizes; with one, on it, and at real sizes, too.
"""
import os
import subprocess
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"     # must be set before triton is imported
import pytest

import model
from model import Config, HybridLM, SSM, UserError, scan_chunk, scan_loop, selective_scan

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(model.triton is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or model.triton is None, reason="needs a GPU and Triton")


# ----------------------------------------------------------------------------------------------------------------------
# The Triton scan against the definition in float64.

@pytest.fixture
def small(monkeypatch):
    """Tiles, segments and blocks so small that toy sizes have several of each."""
    for name, value in {"SCAN_CELLS": 64, "SCAN_TILE": 2, "SCAN_SEGMENT": 4, "SCAN_PROGRAMS": 1 << 20}.items():
        monkeypatch.setattr(model, name, value, raising=False)


def scan_inputs(b, t, d, n, g, gc, dtype=torch.float32, device=DEVICE, seed=0):
    """Arguments of the scan by name; the values of those in dtype are exact in it."""
    rng = torch.Generator(device).manual_seed(seed)
    r = lambda *s, to=torch.float32: torch.randn(*s, generator=rng, device=device).to(to)
    return dict(x=r(b, t, d, to=dtype), dt=r(b, t, d, to=dtype), A=-2 * r(d, n).abs() - 0.01, B=r(b, t, g, n, to=dtype),
                C=r(b, t, gc, n, to=dtype), D=r(d), z=r(b, t, d, to=dtype), dt_bias=r(d), state=r(b, d, n))


def run_scan(scan, inputs, reset, cotangents, dtype=None, **kw):
    """-> {name: value, or gradient of a random functional of y and the last state}."""
    inputs = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
    y, h = scan(**inputs, reset=reset, **kw)
    dy, dh = cotangents
    torch.autograd.backward([y, h], [dy.to(y.dtype), dh.to(h.dtype)])
    return {"y": y.detach(), "h": h.detach()} | {"d" + k: v.grad for k, v in inputs.items()}


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
        assert name == "h" or got[name].dtype == (inputs[name[1:]] if name != "y" else inputs["x"]).dtype
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
    check_scan(scan_inputs(b, t, d, n, g, gc))


@needs_triton
@pytest.mark.parametrize("b, t, d, n, g, gc", [
    (1, 8, 24, 4, 3, 1), (2, 11, 24, 4, 1, 3), (1, 33, 8, 8, 1, 8), (1, 5, 8, 64, 4, 1), (1, 9, 24, 1, 3, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_triton_scan_in_segments_tiles_and_blocks(small, b, t, d, n, g, gc, packed):
    if packed and t == 33:
        pytest.skip("slow in the interpreter")
    reset = resets(b, t, (0, 0), (b - 1, 3), (b - 1, 4), (0, t - 1)) if packed else None
    check_scan(scan_inputs(b, t, d, n, g, gc), reset)


@needs_triton
@pytest.mark.parametrize("shift", [-30.0, 30.0, 3000.0])
def test_triton_scan_with_extreme_steps(small, shift):
    """dt near 0 forgets nothing and learns nothing; large dt forgets everything."""
    inputs = scan_inputs(1, 9, 16, 4, 2, 4)
    check_scan(inputs | {"dt": inputs["dt"] + shift}, tolerance=1e-5)


@needs_triton
def test_triton_softplus_is_exact_for_small_steps():
    inputs = scan_inputs(1, 2, 32, 4, 1, 1)
    dt = torch.linspace(-25, 25, 64, device=DEVICE).view(1, 2, 32)
    y, h = selective_scan(**inputs | {"dt": dt, "state": None, "D": None, "dt_bias": None, "z": None}, impl="triton")
    read = (inputs["B"] * inputs["C"])[:, 0].sum(-1)
    want = torch.nn.functional.softplus(dt.double())[:, 0] * inputs["x"][:, 0] * read
    assert ((y[:, 0] / want - 1).abs() < 1e-5).all()


@needs_triton
def test_triton_scan_in_bfloat16_from_slices(small):
    """Inputs as the mixer makes them: slices of one wider tensor, half precision."""
    inputs = scan_inputs(2, 5, 32, 8, 2, 4, torch.bfloat16)
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
    inputs = scan_inputs(1, 5, 16, 4, 2, 4)
    check_scan({k: inputs[k] for k in ("x", "dt", "A", "B", "C")})


@needs_triton
def test_triton_scan_repeats_bit_for_bit_and_continues(small):
    inputs, reset = scan_inputs(1, 12, 16, 4, 2, 4), resets(1, 12, (0, 7))
    cotangents = torch.randn_like(inputs["x"]), torch.randn_like(inputs["state"])
    first, again = (run_scan(selective_scan, inputs, reset, cotangents, impl="triton") for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    pieces, h = [], inputs["state"]
    for piece in (slice(0, 5), slice(5, 6), slice(6, 12)):
        part = {k: v[:, piece] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()} | {"state": h}
        y, h = selective_scan(**part, reset=reset[:, piece], impl="triton")
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), first["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, first["h"], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The one-token kernel, alone and in a model.

def tiny_config(**kw):
    return Config(**dict(vocab_size=50, d_model=32, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_mlp=32,
                         layout=("m2", "t"), d_state=4) | kw)


@needs_triton
@pytest.mark.parametrize("change", [{}, {"expand_before_conv": False}, {"conv_bias": False, "dt_bias": False},
                                    {"d_conv": 2, "n_kv_head": 1}, {"d_conv": 1}, {"n_head": 6, "d_state": 8}])
@pytest.mark.parametrize("pos", [None, (0, 1, 5)])
def test_one_token_kernel_is_the_mixer(monkeypatch, change, pos):
    torch.manual_seed(0)
    config = tiny_config(**change)
    monkeypatch.setattr(model, "SCAN_CELLS", 8)                              # several rounds per chunk
    mixer = model.Mamba(config).to(DEVICE)
    x = torch.randn(3, 1, config.d_model, device=DEVICE)
    state = SSM(torch.randn(3, config.d_conv - 1, config.d_xb, device=DEVICE),
                torch.randn(3, config.d_inner, config.d_state, device=DEVICE))
    place = model.Place(9, None if pos is None else torch.tensor(pos, device=DEVICE)[:, None], None, None, None)
    backend = model.scan_backend
    with torch.no_grad():
        monkeypatch.setattr(model, "scan_backend", lambda *a: "loop")
        want, after = mixer(x, state, place)
        monkeypatch.setattr(model, "scan_backend", lambda *a: "triton")
        got, same = mixer(x, state, place)
    monkeypatch.setattr(model, "scan_backend", backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.conv, after.conv, rtol=0, atol=0)
    torch.testing.assert_close(state.h, after.h, rtol=1e-5, atol=1e-6)
    assert same.h is state.h and same.conv is state.conv                     # in place


@needs_triton
def test_generation_with_triton_is_the_same(monkeypatch):
    torch.manual_seed(0)
    lm = HybridLM(tiny_config()).eval().to(DEVICE)
    prompts = [[3, 1, 4, 1, 5, 9], [2, 6]]                                   # padded on the left: documents, resets
    monkeypatch.setattr(model, "scan_backend", lambda *a: "chunk")
    want = lm.generate(prompts, 4, stop=())
    monkeypatch.setattr(model, "scan_backend", lambda *a: "triton")
    assert lm.generate(prompts, 4, stop=()) == want


# ----------------------------------------------------------------------------------------------------------------------
# Who runs where.

def test_backend_is_chosen_and_named(monkeypatch):
    assert model.scan_backend("cpu") == "chunk" and model.scan_backend("cpu", 1) == "loop"
    assert model.scan_backend("cuda") == ("chunk" if model.triton is None else "triton")
    assert model.scan_backend_reason("cpu").startswith("scan: chunk (")
    monkeypatch.setattr(model, "triton", None)
    assert model.scan_backend("cuda") == "chunk" and "not installed" in model.scan_backend_reason("cuda")
    with pytest.raises(UserError, match="needs Triton"):
        selective_scan(**scan_inputs(1, 2, 4, 4, 1, 1, device="cpu"), impl="triton")


@needs_triton
def test_triton_refuses_the_cpu_and_odd_sizes(monkeypatch):
    inputs = scan_inputs(1, 3, 4, 3, 1, 1)
    with pytest.warns(UserWarning, match="taking chunk"):
        got = selective_scan(**inputs, impl="triton")
    torch.testing.assert_close(got, scan_chunk(**inputs))
    with pytest.raises(UserError, match="unknown impl"):
        selective_scan(**inputs, impl="fast")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        selective_scan(**scan_inputs(1, 3, 4, 4, 1, 1, device="cpu"), impl="triton")


COMPILE = """
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import model

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

block = dict(N=16, BD=model.SCAN_CELLS // 16)
tile = block | dict(T=model.SCAN_TILE)
for arch in (80, 90):
    for name, most, kernel, off, constants in (
            ("forward", 128, model.scan_forward, ["sum_ptr", "tile_ptr", "reset_ptr"], tile),
            ("forward, packed", 128, model.scan_forward, ["sum_ptr", "tile_ptr"], tile),
            ("states", 128, model.scan_forward, ["start_ptr", "y_ptr", "tile_ptr", "reset_ptr"], tile),
            ("tiles", 128, model.scan_forward, ["y_ptr", "reset_ptr"], tile),
            ("combine", 128, model.scan_combine, [], dict(N=16, BLOCK=256, BACK=True)),
            ("carry", 128, model.scan_carry, ["reset_ptr"], block),
            ("backward", 255, model.scan_backward, ["reset_ptr"], tile | dict(WB=32, WC=16, PAIR=2)),
            ("backward, packed", 255, model.scan_backward, [], tile | dict(WB=32, WC=16, PAIR=2)),
            ("step", 128, model.step_kernel, ["pos_ptr"],
             dict(TAPS=4, SLOTS=4, N=16, BD=64, EXPAND=True, num_warps=2))):
        registers, stack = usage(kernel, arch, off, **constants)
        print(f"sm_{arch} {name}: {registers} registers, {stack} bytes spilled")
        assert registers <= most and stack == 0, (arch, name, registers, stack)
"""


@needs_triton
def test_kernels_compile_without_spilling(tmp_path):
    """For sm_80 and sm_90, without a GPU; in a process of its own, where the interpreter was never switched on."""
    tool = os.path.join(os.path.dirname(model.triton.__file__), "backends/nvidia/bin/cuobjdump")
    if not os.path.exists(tool):
        pytest.skip("this Triton has no NVIDIA tools")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True,
                            cwd=os.path.dirname(os.path.abspath(__file__)))
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)


# ----------------------------------------------------------------------------------------------------------------------
# Real sizes, on a GPU: python -m pytest test_triton_part.py -q -k gpu

@needs_gpu
@pytest.mark.parametrize("b, t, d, n, g, gc", [
    (1, 4096, 4096, 16, 64, 256), (8, 512, 4096, 16, 256, 256), (3, 1000, 1000, 16, 25, 125),
    (1, 777, 2048, 64, 8, 32), (40, 64, 4096, 16, 64, 256), (1, 2048, 96, 8, 1, 96)])
@pytest.mark.parametrize("packed", [False, True])
def test_gpu_scan_is_chunk(b, t, d, n, g, gc, packed):
    """Against scan_chunk in float64 (itself tested against the loop)."""
    reset = torch.rand(b, t, device=DEVICE) < 0.01 if packed else None
    check_scan(scan_inputs(b, t, d, n, g, gc), reset, tolerance=2e-5, reference=scan_chunk)


@needs_gpu
def test_gpu_scan_bfloat16_32k():
    inputs = scan_inputs(1, 32768, 4096, 16, 64, 256, torch.bfloat16)
    check_scan(inputs, reference=scan_chunk, dtype=torch.float32, tolerance=6e-3)


@needs_gpu
def test_gpu_backward_repeats_bit_for_bit():
    inputs = scan_inputs(2, 2048, 4096, 16, 64, 256, torch.bfloat16)
    cotangents = torch.randn_like(inputs["x"]), torch.randn_like(inputs["state"])
    first, again = (run_scan(selective_scan, inputs, None, cotangents, impl="triton") for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


@needs_gpu
def test_gpu_offsets_beyond_31_bits():
    """17 texts of 32768 steps and 4096 channels are 2.3e9 elements; equal rows must give equal results."""
    b, one = 17, scan_inputs(1, 32768, 4096, 16, 64, 256, torch.bfloat16)
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
def test_gpu_step_at_15b_shape():
    """One token, bfloat16, b 41, against the slow path in float32."""
    torch.manual_seed(0)
    config = Config(vocab_size=8, d_model=512, n_layer=1, n_head=32, n_kv_head=8, head_dim=128, d_mlp=8, layout=("m2",))
    mixer = model.cast(model.Mamba(config), DEVICE, torch.bfloat16)
    x = torch.randn(41, 1, 512, device=DEVICE, dtype=torch.bfloat16)
    place = model.Place(9, None, None, None, None)
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
