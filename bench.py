"""
What the conversion buys: tokens/s of a transformer (H-0) and of its hybrids (H-k: k of 50 attention layers replaced).

    python bench.py --ctx 32768                                 # GPU: largest shape that fits; CPU: tiny, 2 minutes
    python bench.py --shape 3b --replace 0,20 --batch 1,8 --json bench.jsonl --plot bench.png
    python bench.py --what scan                                 # the selective scans that run here
    python bench.py --figures out/h25 out/h27 out/h30           # a table and two pictures of what distill.py has saved

Weights are random (speed does not depend on them) unless --model names a checkpoint. All rows run the same code and the
same attention kernel, H-0 too: a slow baseline would flatter the ratio.

Every generated token reads all weights once for the whole batch, and each text's own key/value cache and states. So
    limit (tokens/s) = batch / (bytes read and written per step / copy bandwidth),
and a hybrid wins twice: its caches take less time to read, and more texts fit into the memory beside the weights. At
batch 1 the weights dominate and no hybrid can win much.
"""
import argparse
import datetime
import importlib.util
import json
import os
import re
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import model as nanoh1
from model import (KV, Config, HybridLM, State, UserError, claim_out, harm, join_projections, load_pretrained,
                   provenance, run_main, scan_backend, selective_scan, start_script, sync)

# 15b is Apriel's teacher, 8b ... 1b are Llama-3 shapes, tiny has the depth of the first
# and the width of a toy, so that a laptop shows the effect. Bytes and speed need no more than the shape.
SHAPES = {
    "15b": Config(131072, 5120, 50, 32, 8, 128, 14336, dt_rank=16),
    "8b": Config(128256, 4096, 32, 32, 8, 128, 14336),
    "3b": Config(128256, 3072, 28, 24, 8, 128, 8192, tie_embeddings=True),
    "1b": Config(128256, 2048, 16, 32, 8, 64, 8192, tie_embeddings=True),
    "tiny": Config(1024, 64, 50, 4, 2, 32, 192),
}

# Which of 50 layers go first: the published order, and then the one layer that it never replaces, so that H-50 can be
# asked for. Speed depends on the count only.
ORDER = [*nanoh1.APRIEL15B, 2]


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ctx", default="32768", help="tokens of context; several, with commas, for --plot (default: 32768)")
    add("--shape", help=f"{', '.join(SHAPES)} (default: the largest that fits on a GPU, tiny on a CPU)")
    add("--model", help="bench this checkpoint directory, beside an H-0 of its shape (default: random weights)")
    add("--replace", help="layers replaced, of 50; scaled to other depths (default: 0,25,30,34,37,40; with --model: 0)")
    add("--batch", help="texts at once; max: as many as fit (default: 1,16,max on a GPU, 1,4,max elsewhere)")
    add("--what", default="prefill,decode", help="prefill, decode, scan (default: prefill,decode)")
    add("--prefill-tokens", type=int, help="length of the measured prefill (default: --ctx on a GPU, else 1024)")
    add("--seconds", type=float, default=2.0, help="time spent per measured cell, at least 3 runs (default: 2 s)")
    add("--memory", type=float, help="GB for weights and caches (default: 96 %% of what is free on a GPU, else 4 GB)")
    add("--graph", action="store_true", help="decode by replaying a CUDA graph of the steps (not measured yet)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", default="auto", help="float32 or bfloat16 (default: bfloat16 on cuda, else float32)")
    add("--seed", type=int, default=0, help="seed of weights and inputs (default: 0)")
    add("--json", metavar="FILE", help="append one JSON line per row; with --table or --figures: write their "
        "reports, one line each (such a file can be given to both instead of directories)")
    add("--plot", metavar="FILE.png", help="tokens/s against context and against Mamba layers (needs matplotlib)")
    # Results of distill.py and train_sft.py instead of measurements.
    add("--table", nargs="+", metavar="DIR", help="only print a table of these results (or those inside, or in a file of "
        "--json)")
    add("--figures", nargs="+", metavar="DIR", help="... and draw the family into --out")
    add("--out", default="results", help="directory for the pictures of --figures (default: results)")
    add("--speeds", metavar="FILE", help="for --figures: tokens/s from bench.py --model DIR --json FILE")
    args = p.parse_args()
    args.ctx = numbers("--ctx", args.ctx)
    args.replace = numbers("--replace", args.replace or ("0" if args.model else "0,25,30,34,37,40"), least=0)
    args.what = args.what.split(",")
    for value, known, name in [(w, ("prefill", "decode", "scan"), "--what") for w in args.what] + [
            (args.shape or "tiny", SHAPES, "--shape")]:
        if value not in known:
            raise UserError(f"{name} {value!r}: known are {', '.join(known)}")
    if max(args.replace) > 50 or min(args.ctx) < 8 or (args.prefill_tokens or 1) < 1:
        raise UserError("--replace goes from 0 to 50, --ctx starts at 8, --prefill-tokens at 1")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    return args


def numbers(flag, text, least=1):
    """"1,16" -> [1, 16]."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [least - 1]
    if min(values) < least:
        raise UserError(f"{flag} {text!r}: give whole numbers from {least} on, with commas between")
    return values


# ----------------------------------------------------------------------------------------------------------------------
# What must be kept and moved, computed from the shapes. test_model.py compares it with the real tensors.

def hybrid(config, k):
    """config with k of 50 layers replaced, scaled to its own depth."""
    n = config.n_layer
    order = sorted(range(n), key=lambda i: ORDER.index(i * 50 // n))         # layer i stands for layer i * 50 / n of 50
    gone = order[:round(k * n / 50)]
    return replace(config, layout=tuple("m2" if i in gone else "t" for i in range(n)))


def sizes(config, dtype, ctx):
    """-> parameters; bytes of all weights, of those read per step, of one text's caches and of its recurrent states."""
    c, item = config, dtype.itemsize
    with torch.device("meta"):                                               # shapes without memory
        params = dict(HybridLM(config).named_parameters())
    nbytes = lambda name, p: p.numel() * (4 if nanoh1.keeps_float32(name) else item)
    weights = sum(nbytes(name, p) for name, p in params.items())
    # One row of the embedding table is read per token; the output head is read whole, also if it is the same table.
    read = weights - (0 if c.tie_embeddings else nbytes("", params["embed_tokens.weight"]))
    kv = 2 * ctx * c.n_kv_head * c.head_dim * item * c.layout.count("t")
    state = ((c.d_conv - 1) * c.d_xb * item + c.d_inner * c.d_state * 4) * c.layout.count("m2")
    return {"params": sum(p.numel() for p in params.values()), "weight_bytes": weights, "read_bytes": read,
            "kv_bytes": kv, "state_bytes": state}


def limit(size, batch, bandwidth):
    """Tokens/s if a step did nothing but move its bytes: weights and caches in, states in and out."""
    return batch / ((size["read_bytes"] + batch * (size["kv_bytes"] + 2 * size["state_bytes"])) / bandwidth)


def memory_for(args, device):
    """Bytes for weights and caches. The rest is for activations, logits and the allocator."""
    if args.memory:
        return args.memory * 1e9
    if device.type != "cuda":
        return 4e9                                                           # a laptop stays usable, and the run short
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated() - 0.04 * torch.cuda.mem_get_info()[1]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring.

def measure(run, device, seconds, warmup=1, least=3, most=50):
    """-> (median, spread) of run() in seconds; spread: half the distance between the quartiles, relative. The first
    calls (allocation, kernel compilation) are not counted."""
    for _ in range(warmup):
        run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        times.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return middle, (high - low) / 2 / middle


def copy_bandwidth(device):
    """Bytes/s of a large copy, read and write counted: what any kernel that streams memory can hope for."""
    a = torch.empty(1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * a.nbytes / measure(lambda: b.copy_(a), device, 0.5, warmup=3, least=5)[0]


def random_model(config, device, dtype):
    """A model with random weights, made on the device: a 15B model never passes through the CPU's memory."""
    with torch.device("meta"):
        model = HybridLM(config)
    weights = {}
    for name, p in model.named_parameters():
        kind = torch.float32 if nanoh1.keeps_float32(name) else dtype
        mean = 1 if name.endswith(("norm.weight", ".A_log", ".D")) else 0
        w = torch.empty(p.shape, device=device, dtype=kind).normal_(mean, 0.02)
        weights[name] = torch.nn.Parameter(w, requires_grad=False)
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def filled_state(model, batch, ctx):
    """A State as after ctx tokens, filled with random values: prefilling would cost O(ctx^2), and a step costs the same
    whatever the caches hold (but zeros may be cheaper to move, so none are left)."""
    state, c = model.new_state(batch, ctx), model.config
    noise = torch.randn(c.n_kv_head, ctx, c.head_dim).to(model.embed_tokens.weight)
    for layer in state.layers:
        for m in layer or ():
            m.copy_(noise) if isinstance(layer, KV) else m.normal_()
    return replace(state, position=ctx)


def narrow(state, batch, back):
    """The first `batch` texts of state, as views, `back` tokens before its end. A State is a value, so the same steps
    can be taken again and again from here; they overwrite the caches' last entries with what belongs there."""
    cut = lambda layer: None if layer is None else type(layer)(*(m[:batch] for m in layer))
    return State(state.position - back, state.max_length, tuple(map(cut, state.layers)))


def decode_steps(model, token, state, count):
    """count greedy steps of one token per text, as in sample.py. token (b, 1)."""
    for _ in range(count):
        x, state = model.hidden(token, state)
        token = model.lm_head(x[:, -1]).argmax(dim=-1, keepdim=True)
    return token


def graph_of(run):
    """Record the kernels of run() once, replay them without Python: shows what launch overhead costs. SDPA fixes the
    length at capture, so this replays one position; generating text this way needs a kernel that reads the length."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):                                                   # kernels compile before the capture
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_decode(model, state, batch, args, device):
    """-> seconds per step (median), spread."""
    count = 16 if device.type == "cuda" else 1                               # steps between two looks at the clock
    token = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    start = narrow(state, batch, count)
    run = lambda: decode_steps(model, token, start, count)
    # On the GPU: flash attention and nothing else. It reads each key and value once; cuDNN, which SDPA prefers on
    # Hopper, would build a plan for every new length, and the other fallbacks would slow the baseline down unseen.
    flash = device.type == "cuda" and model.embed_tokens.weight.dtype == torch.bfloat16
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
        seconds, spread = measure(graph_of(run) if args.graph else run, device, args.seconds)
    return seconds / count, spread


def prefill_length(args, ctx, device):
    return args.prefill_tokens or (ctx if device.type == "cuda" else min(ctx, 1024))


def time_prefill(model, length, args, device):
    """-> seconds (median), spread, for one prompt of random tokens, in one pass, logits of the last position."""
    prompt = torch.randint(model.config.vocab_size, (length,)).tolist()
    return measure(lambda: model.prefill([prompt], 1, chunk=length), device, args.seconds)


# ----------------------------------------------------------------------------------------------------------------------
# The rows.

def amount(x, unit="B"):
    """Four digits and a prefix: 28632 -> 28.63 kB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.4g} {prefix}{unit}"
    return f"{x:.4g} {unit}"


def plan(args, config, device, dtype, memory, bandwidth, ctx):
    """The computed half of every row, printed before anything is measured."""
    rows, default = [], "1,16,max" if device.type == "cuda" else "1,4,max"
    configs = [hybrid(replace(config, layout=()), k) for k in args.replace] + [config] * bool(args.model)
    names = [f"H-{k}" for k in args.replace] + ["model"] * bool(args.model)
    line = "{:>6} {:>5} {:>9} {:>9} {:>9} {:>10} {:>7}   {}"
    print(f"\ncontext {ctx}: what is kept, how many texts fit into {amount(memory)}, and the limit in tokens/s")
    print(line.format("model", "Mamba", "params", "weights", "KV/text", "state/text", "largest", "limit (batch)"))
    for name, c in zip(names, configs):
        size = sizes(c, dtype, ctx)
        largest = int((memory - size["weight_bytes"]) // (size["kv_bytes"] + size["state_bytes"]))
        batches = [largest if b == "max" else numbers("--batch", b)[0] for b in (args.batch or default).split(",")]
        fits = sorted({b for b in batches if 0 < b <= largest})
        row = {"row": name, "mamba_layers": c.layout.count("m2"), "layers": c.n_layer, "ctx": ctx, **size,
               "largest_batch": max(largest, 0),
               "decode": [{"batch": b, "limit_tokens_per_s": limit(size, b, bandwidth)} for b in fits]}
        rows.append((row, c))
        text = ", ".join(f"{d['limit_tokens_per_s']:.0f} ({d['batch']})" for d in row["decode"]) or "does not fit"
        kept = [amount(size[key]) for key in ("weight_bytes", "kv_bytes", "state_bytes")]
        print(line.format(name, row["mamba_layers"], amount(size["params"], ""), *kept, row["largest_batch"], text))
    return rows


@torch.inference_mode()
def measure_row(row, config, args, device, dtype):
    """Fill in the measured half of one row."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = load_pretrained(args.model, device, dtype) if row["row"] == "model" else random_model(config, device, dtype)
    join_projections(model)
    if "prefill" in args.what:
        length = prefill_length(args, row["ctx"], device)
        seconds, spread = time_prefill(model, length, args, device)
        row |= {"prefill_tokens": length, "prefill_tokens_per_s": length / seconds, "prefill_spread": spread}
    if "decode" in args.what and row["decode"]:
        state = filled_state(model, row["decode"][-1]["batch"], row["ctx"])  # smaller batches are views of the largest
        for cell in row["decode"]:
            seconds, spread = time_decode(model, state, cell["batch"], args, device)
            rate = cell["batch"] / seconds
            cell |= {"tokens_per_s": rate, "step_s": seconds, "spread": spread,
                     "percent_of_limit": 100 * rate / cell["limit_tokens_per_s"]}
    row["peak_bytes"] = peak_memory(device)


def peak_memory(device):
    """Bytes: on a GPU of this row, elsewhere of the process so far; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:                                                      # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_row(row, columns, base):
    """The measured half of one row; without a row, the header. columns: batches of the fullest row; base: H-0's row."""
    line = "{:>6} {:>12}" + "{:>20}" * columns + " {:>8} {:>6} {:>9}"
    if row is None:
        decode = ["decode/s (batch)"] * (columns - 1) + ["at its largest"] * (columns > 0)
        print(line.format("model", "prefill/s", *decode, "of limit", "x H-0", "peak"))
        return
    missing = row.get("failed", "")                                          # why a cell has no figure
    cells = [f"{d['tokens_per_s']:.1f} +-{100 * d['spread']:.0f}% ({d['batch']})" if "tokens_per_s" in d else missing
             for d in row["decode"]] or [missing or "does not fit"]
    cells = cells[:-1] + [""] * (columns - len(cells)) + cells[-1:]          # the largest batch stands last
    best, share, ratio, prefill = (row["decode"] or [{}])[-1], "", "", ""
    if "prefill_spread" in row:
        prefill = f"{row['prefill_tokens_per_s']:.0f} +-{100 * row['prefill_spread']:.0f}%"
    if "tokens_per_s" in best:
        share = f"{best['percent_of_limit']:.1f}%"
        if base:
            row["ratio_to_h0"] = best["tokens_per_s"] / base["decode"][-1]["tokens_per_s"]
            ratio = f"{row['ratio_to_h0']:.2f}"
    peak = amount(row["peak_bytes"]) if row.get("peak_bytes") else ""
    print(line.format(row["row"], prefill, *cells, share, ratio, peak), flush=True)


def bench_models(args, config, device, dtype, about, bandwidth):
    """Prefill and decode of every row at every context. Yields rows as they are measured."""
    memory = memory_for(args, device)
    for ctx in args.ctx:
        rows, base = plan(args, config, device, dtype, memory, bandwidth, ctx), None
        columns = max(1, *(len(row["decode"]) for row, _ in rows))
        print("\nmeasured, tokens/s: median, spread (half the distance between the quartiles), (batch)")
        if "decode" in args.what:
            print(f"decode: caches filled with random values as after {ctx} tokens, instead of prefilling them")
        if "prefill" in args.what:
            print(f"prefill: one prompt of {prefill_length(args, ctx, device)} tokens")
        print_row(None, columns, None)
        for row, c in tqdm(rows, desc=f"context {ctx}", leave=False, disable=not sys.stderr.isatty()):
            try:
                measure_row(row, c, args, device, dtype)
            except (RuntimeError, MemoryError) as e:                         # on a CPU it is a plain RuntimeError
                if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(e):
                    raise
                row["failed"] = "out of memory"
            except KeyboardInterrupt:                                        # print the cells that are done
                row["failed"] = "interrupted"
                print_row(row, columns, base)
                raise
            if not row["mamba_layers"] and any("tokens_per_s" in d for d in row["decode"][-1:]):
                base = row
            print_row(row, columns, base)
            yield about | row


# ----------------------------------------------------------------------------------------------------------------------
# The scan alone.

def scan_limits(b, t, d, n, xb, dtype, bandwidth, device):
    """-> milliseconds (forward, backward) that no kernel can beat. Bytes: forward reads x, dt, z, C and writes y (t, d
    each), B is d_xb wide; backward reads these with dy for y and writes four gradients and that of B. On a GPU the
    special function units may be slower: n exponentials per channel and step and 4 for softplus and SiLU, 16 a cycle
    on each multiprocessor; backward needs those for rebuilding the states and for walking back, and 2 more."""
    item = dtype.itemsize
    times = [b * t * (5 * d + xb) * item / bandwidth, b * t * (9 * d + 2 * xb) * item / bandwidth]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        units = 16 * gpu.multi_processor_count * getattr(gpu, "clock_rate", 1.98e6) * 1e3        # clock_rate in kHz
        times = [max(s, b * t * d * e / units) for s, e in zip(times, (n + 4, 2 * n + 6))]
    return [1e3 * s for s in times]


def official_scan():
    """mamba_ssm's kernel in our argument order, or None. It wants time last and B and C with equally many groups."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def run(x, dt, A, B, C, D, z, dt_bias):
        last = lambda m: m.transpose(1, 2).contiguous()
        B = B.repeat_interleave(C.shape[2] // B.shape[2], dim=2)
        B, C = (m.permute(0, 2, 3, 1).contiguous() for m in (B, C))          # (b, groups, n, t)
        y = selective_scan_fn(last(x), last(dt), A, B, C, D, last(z), dt_bias, delta_softplus=True)
        return y.transpose(1, 2)
    return run


def sweep(a, s):
    """Blelloch's scan over time, in place: s[:, i] <- a[:, i] s[:, i - 1] + s[:, i]. a, s (b, t, d, n); a is spoilt."""
    t = s.shape[1]
    levels = [1 << i for i in range(t.bit_length())]
    for up, k in [(True, k) for k in levels] + [(False, k) for k in levels[::-1]]:
        right = range(2 * k - 1 if up else 3 * k - 1, t, 2 * k)              # last steps of blocks of k steps ...
        if right:
            left = slice(right[0] - k, right[-1] - k + 1, 2 * k)             # ... and of the blocks before them
            right = slice(right[0], t, 2 * k)
            s[:, right].addcmul_(a[:, right], s[:, left])
            if up:                                                           # two blocks become one
                a[:, right].mul_(a[:, left])
    return s


class Blelloch(torch.autograd.Function):
    """a, s (b, t, d, n) -> all states h_t = a_t h_{t-1} + s_t, (b, t, d, n): what the chunked scan never holds."""

    @staticmethod
    def forward(ctx, a, s):
        h = sweep(a.clone(), s.clone())
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h = ctx.saved_tensors
        after = torch.cat([torch.zeros_like(a[:, :1]), a.flip(1)[:, :-1]], dim=1)        # a_{t+1}, from late to early
        k = sweep(after, dh.flip(1)).flip(1)                                 # gradients of the states, and of s
        return torch.cat([torch.zeros_like(a[:, :1]), k[:, 1:] * h[:, :-1]], dim=1), k


def blelloch_scan(u, dt, A, B, C, D, z, dt_bias):
    """The selective scan by a parallel prefix sum over the materialised (b, t, d, n), as plain PyTorch code has it."""
    dt, d = F.softplus(dt + dt_bias), len(A)
    B, C = (m.repeat_interleave(d // m.shape[2], dim=2) for m in (B, C))     # (b, t, d, n)
    h = Blelloch.apply(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B)
    return ((h * C).sum(-1) + D * u) * F.silu(z)


def bench_scan(args, config, device, dtype, about, bandwidth):
    """Forward and backward of every scan at the shape's width, batch 1. Yields rows."""
    c, ctx = config, max(args.ctx)
    known = {"loop": 256, "chunk": ctx if device.type == "cuda" else 2048}   # backward of the loop keeps every state
    if scan_backend(device) not in known:
        known[scan_backend(device)] = ctx
    others = {"mamba_ssm": official_scan()} if device.type == "cuda" else {"blelloch": blelloch_scan}
    most = {"mamba_ssm": ctx, "blelloch": min(2048, (1 << 25) // (c.d_inner * c.d_state))}         # some 1 GB
    known |= {name: most[name] for name, run in others.items() if run}
    print(f"\nselective scan, batch 1, d_inner {c.d_inner}, d_state {c.d_state}; auto takes: {scan_backend(device)}")
    line = "{:>10} {:>7} {:>17} {:>8} {:>17} {:>8} {:>10}"
    print(line.format("scan", "tokens", "forward ms", "limit", "backward ms", "limit", "ns/token"))
    for name, most in known.items():
        t, groups = min(ctx, most), (c.d_xb // c.d_state, c.d_inner // c.d_state)
        run = others.get(name) or (lambda *inputs: selective_scan(*inputs, impl=name)[0])
        rand = lambda *shape, dtype=dtype: torch.randn(*shape, device=device, dtype=dtype)
        x, dt, z, dy = (rand(1, t, c.d_inner) for _ in range(4))
        B, C = (rand(1, t, g, c.d_state) for g in groups)
        A = -torch.arange(1, c.d_state + 1, device=device).float().repeat(c.d_inner, 1)
        D, bias = (rand(c.d_inner, dtype=torch.float32) for _ in range(2))
        inputs = [m.requires_grad_() for m in (x, dt, A, B, C, D, z, bias - 4)]   # softplus(-4) = 0.018, as in a model
        with torch.no_grad():
            forward, spread = measure(lambda: run(*inputs), device, args.seconds)
        both, spread2 = measure(lambda: torch.autograd.grad(run(*inputs), inputs, dy), device, args.seconds)
        low = scan_limits(1, t, c.d_inner, c.d_state, c.d_xb, dtype, bandwidth, device)
        back = both - forward
        cells = [f"{1e3 * forward:.3f} +-{100 * spread:.0f}%", f"{low[0]:.3f}",
                 f"{1e3 * back:.3f} +-{100 * spread2:.0f}%", f"{low[1]:.3f}", f"{1e9 * forward / t:.0f}"]
        print(line.format(name, t, *cells), flush=True)
        yield about | {"row": f"scan {name}", "tokens": t, "forward_s": forward, "backward_s": back, "spread": spread,
                       "forward_limit_s": low[0] / 1e3, "backward_limit_s": low[1] / 1e3,
                       "peak_bytes": peak_memory(device)}


# ----------------------------------------------------------------------------------------------------------------------

def plot(rows, path):
    """Two panels: tokens/s at the largest batch against context, and against the number of Mamba layers."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [row for row in rows if any("tokens_per_s" in d for d in row.get("decode", [])[-1:])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, key, group, label in ((left, "ctx", "row", "context, tokens"),
                                    (right, "mamba_layers", "ctx", "Mamba layers")):
        for value in dict.fromkeys(row[group] for row in rows):
            line = sorted((row[key], row["decode"][-1]["tokens_per_s"]) for row in rows if row[group] == value)
            axes.plot(*zip(*line), marker="o", label=value if group == "row" else f"{value} tokens")
        axes.set_xlabel(label)
        axes.legend()
    left.set_xscale("log", base=2)
    left.set_ylabel("tokens/s at each model's largest batch")
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


# ----------------------------------------------------------------------------------------------------------------------
# Results: a table, and two pictures of a family, made from the reports that the runs have saved and from nothing else.
#
# A result is known by its history, the reports of all stages that led to it, oldest first: the tokens that a member has
# cost are those of all of them, and its layer map has a row for each. A directory of train_sft.py is a member, too
# (H-30-SFT). Runs that differ in the seed alone are named x-s0, x-s1, ... and share a row of the table.

NEEDED = ("args", "layout", "replaced", "teacher_accuracy", "student_accuracy", "accuracy_by_family", "kl_first",
          "kl_last", "scores", "tokens", "seconds", "seed")


def read_result(path):
    """The report in a result directory, with its name, path, and the checkpoint it started from; None if none is there.
    What train_sft.py writes is brought to the keys of distill.py. Raises UserError for a report of something else."""
    files = (os.path.join(path, name) for name in ("report.json", "training.json"))
    file = next((f for f in files if os.path.exists(f)), None)               # report.json, if both are there
    if file is None:
        return None
    report = nanoh1.read_json(file, dict)
    try:
        if file.endswith("training.json"):                                   # no teacher was asked: no KL, no scores
            layout = nanoh1.config_from_json(nanoh1.read_json(os.path.join(path, "config.json"), dict)).layout
            report = dict.fromkeys(NEEDED) | report | {key: report["log"][-1][key] for key in ("tokens", "seconds")} | {
                "layout": list(layout), "replaced": [i for i, kind in enumerate(layout) if kind != "t"],
                "student_accuracy": report.get("accuracy"), "seed": report["args"]["seed"],
                "accuracy_by_family": {f: [None, share] for f, share in report.get("accuracy_by_family", {}).items()}}
        missing = [key for key in NEEDED if key not in report]               # an older report, or a foreign one
        if not missing:
            before = report["args"].get("student", report["args"].get("model"))              # where this stage began
            return report | {"name": os.path.basename(os.path.abspath(path)), "path": path, "before": before}
    except (KeyError, IndexError) as e:
        missing = [e]
    raise UserError(f"{file} is no report of distill.py or train_sft.py: it has no {missing[0]}")


def read_lines(path):
    """A file that --json has written -> its reports, as read_result gives them. Raises UserError naming a bad line."""
    reports = []
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                reports.append(json.loads(line))
                if missing := [key for key in (*NEEDED, "name", "path", "before") if key not in reports[-1]]:
                    raise UserError(f"{path}, line {number} is no result: it has no {missing[0]}")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}, line {number} is no result: {e}") from None
    return reports


def write_lines(path, results):
    """histories -> a JSON line for the newest report of each; the logs of single steps stay with the checkpoints."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            for reports in results:
                line = {key: value for key, value in reports[-1].items() if key != "log"}
                f.write(json.dumps(line | {"tokens_before": tokens_of(reports) - line["tokens"]}) + "\n")
    nanoh1.write_atomic(path, write)


def tokens_of(reports):
    """Tokens that a history has cost, all stages together; a line of --json knows it without its earlier stages."""
    return reports[-1]["tokens"] + reports[-1].get("tokens_before", sum(r["tokens"] for r in reports[:-1]))


def history(report, known):
    """-> reports of the stages that led to this one, oldest first. known: {path: report}, asked before the disk. A
    family may have moved as a whole: then an earlier stage is found beside the later one."""
    reports, seen = [report], set()
    while (before := reports[0]["before"]) and before not in seen:
        seen.add(before)                                                     # a run may have replaced its own start
        sibling = os.path.join(os.path.dirname(os.path.abspath(reports[0]["path"])), os.path.basename(before))
        earlier = next((r for r in (known.get(p) or read_result(p) for p in (before, sibling)) if r), None)
        if earlier is None or not earlier["replaced"]:                       # nothing known, or the teacher itself
            break
        reports.insert(0, earlier)
    return reports


def find_results(paths):
    """Directories of results, those above them, or files of --json -> their histories, by the number of layers
    replaced. A directory that is a result itself is not searched. Raises UserError where there is none."""
    found = []
    for path in paths:
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
        here = read_lines(path) if os.path.isfile(path) else [read_result(path)]
        here = [r for r in here if r] or [r for d in inside if (r := read_result(os.path.join(path, d)))]
        if not here:
            raise UserError(f"{path}: no report.json of distill.py and no training.json of train_sft.py there")
        found += here
    known = {report["path"]: report for report in found}
    return sorted((history(report, known) for report in found),
                  key=lambda h: (len(h[-1]["replaced"]), len(h), h[-1]["name"]))


def teacher_accuracy(reports):
    """What the teacher scored in the newest stage that asked it, or None."""
    return next((r["teacher_accuracy"] for r in reversed(reports) if r["teacher_accuracy"] is not None), None)


def table_lines(results):
    """histories -> a Markdown table. Numbers of several seeds: the mean +- half the distance of the extremes."""
    groups = {}                                                              # name without seed -> [(seed, its row)]
    for reports in results:
        last, teacher = reports[-1], teacher_accuracy(reports)
        by_family = {family: pair[1] for family, pair in (last["accuracy_by_family"] or {}).items()}
        student = last["student_accuracy"]
        row = {"replaced": len(last["replaced"]), "teacher": teacher, "student": student,
               "of teacher": student / teacher if student is not None and teacher else None, **by_family,
               "KL first": last["kl_first"], "KL last": last["kl_last"],
               "M tokens": tokens_of(reports) / 1e6, "seconds": last["seconds"]}
        groups.setdefault(re.sub(r"-s\d+$", "", last["name"]), []).append((last["seed"], row))

    def cell(column, values):
        """The cell of a column for all seeds of a row. A seed without this value is left out, not counted as 0."""
        known, digits = [v for v in values if v is not None], {"replaced": 0, "seconds": 0}.get(column, 3)
        if not known:
            return ""
        spread = f" +-{(max(known) - min(known)) / 2:.{digits}f}" if max(known) > min(known) else ""
        return f"{sum(known) / len(known):.{digits}f}{spread}"
    # A column for every key that any row has: families of problems differ between teachers, --data has none.
    columns = list(dict.fromkeys(key for group in groups.values() for _, row in group for key in row))
    table = [["result", "seeds", *columns]]
    for name, group in groups.items():
        table.append([name, " ".join(str(seed) for seed, _ in group),
                      *(cell(column, [row.get(column) for _, row in group]) for column in columns)])
    # Padded, so that it can be read in the terminal as well as pasted into the README.
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in table]


def layer_rows(results):
    """The longest history -> per stage (name, kinds, bars): kinds: per layer "t", "m2" or "n", and "new" where it was
    replaced in this stage; bars: {layer: 0 ... 1}, its LOO or MMR score between the stage's least and largest harm."""
    rows, before = [], None
    for report in max(results, key=lambda h: len(h[-1]["replaced"])):
        layout = report["layout"]
        kinds = ["new" if k != "t" and (before is None or before[i] == "t") else k for i, k in enumerate(layout)]
        # LOO accuracies and MMR losses have no common unit, and losses fall from stage to stage: scale within a stage.
        cost = {s["layer"]: harm(s)[0] for s in report["scores"] or ()}      # empty for --rank first, last, FILE, ...
        low, high = min(cost.values(), default=0), max(cost.values(), default=0)
        rows.append((report["name"], kinds, {i: (c - low) / ((high - low) or 1) for i, c in cost.items()}))
        before = layout
    return rows


def map_lines(rows):
    """The layer map as text: a letter per layer, below it its score as a digit, 9 for the most harmful layer."""
    letters, width = {"t": "t", "m2": "m", "n": "-", "i": "-", "new": "M"}, max(len(name) for name, _, _ in rows) + 2
    lines = [" " * width + "".join(f"{i:<5}" for i in range(0, len(rows[0][1]), 5))]
    for name, kinds, bars in rows:
        digits = [str(round(9 * bars[i])) if i in bars else " " for i in range(len(kinds))]
        lines += [name.ljust(width) + "".join(letters[kind] for kind in kinds), " " * width + "".join(digits).rstrip()]
    return [*lines, "t attention, m Mamba, M replaced in this stage, - removed; digits: harm by the score, 0 to 9"]


@torch.no_grad()
def throughput(paths, file, device, dtype):
    """Decoding speed of the checkpoints in paths, tokens/s: from the lines of bench.py in file, at the longest context
    and the largest batch there, or else measured now by bench.py's functions."""
    if file is None:
        speed, how = [[] for _ in paths], argparse.Namespace(seconds=1.0, graph=False)
        batch, ctx = (16, 32768) if device.type == "cuda" else (4, 8192)     # caches that outweigh so small a model
        # Three rounds over all models, and the median: another program's burst then hits one round, not one member.
        for i in tqdm([*range(len(paths))] * 3, desc=f"decoding {batch} texts after {ctx} tokens", unit="model"):
            lm = nanoh1.join_projections(nanoh1.load_pretrained(paths[i], device, dtype))
            state = filled_state(lm, batch, ctx)
            speed[i].append(batch / time_decode(lm, state, batch, how, device)[0])
        return [sorted(rates)[1] for rates in speed]
    try:
        with open(file, encoding="utf-8") as f:                              # JSON lines, one per row
            rows = [json.loads(line) for line in f if line.strip()]
        known = {}                                                           # the longest context is written last
        for row in sorted((r for r in rows if r.get("decode")), key=lambda r: r["ctx"]):
            if row["row"] == "model":                                        # row H-0 of --model is a random model
                known[os.path.realpath(row["shape"])] = row["decode"][-1]["tokens_per_s"]
        return [known[os.path.realpath(path)] for path in paths]
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file} has no line for {e}: python bench.py --model DIR --json {file}") from None


def draw_family(plt, path, results, teacher, speed):
    """Score against decoding speed, a point per member, and the tokens of all its stages beside it. Members whose
    mixers were removed (--init identity) are crosses. speed: the teacher's, then the members'."""
    points = [("teacher", teacher, speed[0], "o", "black")]
    for reports, rate in zip(results, speed[1:]):
        last, label = reports[-1], f"{reports[-1]['name']}\n{tokens_of(reports) / 1e6:.2f} M tokens"
        removed = "n" in last["layout"]
        points.append((label, last["student_accuracy"], rate, *(("x", "gray") if removed else ("o", "tab:red"))))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    width, height = (max(p[k] for p in points) - min(p[k] for p in points) or 1 for k in (2, 1))
    for point in points:
        label, accuracy, rate, marker, color = point
        axes.plot(rate / speed[0], accuracy, marker, color=color)
        # A label must not run into its neighbour's: above the point if the nearest other one is lower, else below.
        apart = lambda p: ((p[2] - rate) / width) ** 2 + ((p[1] - accuracy) / height) ** 2
        nearest = min((p for p in points if p is not point), key=apart)
        y, edge = (1, "bottom") if accuracy > nearest[1] else (-1, "top")
        x, side = (-7, "right") if marker == "x" else (7, "left")
        axes.annotate(label, (rate / speed[0], accuracy), (x, y), textcoords="offset points", fontsize=7, ha=side,
                      va=edge, color=color)
    axes.margins(0.36, 0.12)
    axes.set_xlabel(f"decoding speed, teacher = 1 ({speed[0]:.0f} tokens/s)")
    axes.set_ylabel("exact match on held-out problems")
    figure.tight_layout()
    nanoh1.write_atomic(path, lambda to: figure.savefig(to, format="png", dpi=150))


def draw_layers(plt, path, rows):
    """The layer map: a row per stage, a column per layer; above each row the scores that decided it, as bars."""
    colors = {"t": "#4c78a8", "m2": "#f3c9a5", "n": "#dddddd", "i": "#dddddd", "new": "#e4572e"}
    figure, axes = plt.subplots(figsize=(10, 0.9 + 0.75 * len(rows)))
    # Matplotlib counts from below: reversed, so that the first stage is on top.
    for y, (_, kinds, bars) in enumerate(reversed(rows)):
        axes.bar(range(len(kinds)), 0.4, 0.9, y, color=[colors[kind] for kind in kinds])
        axes.bar(list(bars), [0.03 + 0.42 * value for value in bars.values()], 0.5, y + 0.43, color="#555555")
    axes.set_yticks([y + 0.2 for y in range(len(rows))], [name for name, _, _ in reversed(rows)])
    for kind, label in (("t", "attention"), ("m2", "Mamba"), ("new", "replaced in this stage")):
        axes.bar([0], [0], color=colors[kind], label=label)
    # Bars of no height, for the legend alone.
    axes.bar([0], [0], color="#555555", label="harm (LOO, then MMR), scaled per stage")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=4, fontsize=8, frameon=False)
    axes.set_xlim(-1, len(rows[0][1]))
    axes.set_xlabel("layer")
    figure.tight_layout()
    nanoh1.write_atomic(path, lambda to: figure.savefig(to, format="png", dpi=150))


def show_results(args, device, dtype):
    """--table and --figures."""
    results = find_results([*(args.table or ()), *(args.figures or ())])
    print("\n".join(table_lines(results)))
    if args.json:
        try:
            write_lines(args.json, results)
        except OSError as e:
            raise UserError(f"cannot write {args.json}: {e.strerror}") from None
    if not args.figures:
        return
    rows = layer_rows(results)                                               # as text in any case: it needs nothing
    print("\n".join(["", *map_lines(rows)]), flush=True)
    try:
        import matplotlib
    except ImportError:
        return print("no pictures: they need matplotlib (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    out = args.out
    out = claim_out(out, [], overwrite=True, resume=False)                             # pictures are cheap, old ones are replaced
    draw_layers(plt, os.path.join(out, "layers.png"), rows)
    print(f"wrote {os.path.join(out, 'layers.png')}", flush=True)
    # A member without accuracy (trained on --data, or never evaluated) has no place in the picture.
    solved = [h for h in results if h[-1]["student_accuracy"] is not None and teacher_accuracy(h) is not None]
    if not solved:
        return print("no family.png: no member and its teacher have solved problems")
    teacher = next(r["args"]["teacher"] for r in solved[0] if "teacher" in r["args"])
    speed = throughput([teacher, *(reports[-1]["path"] for reports in solved)], args.speeds, device, dtype)
    draw_family(plt, os.path.join(out, "family.png"), solved, teacher_accuracy(solved[0]), speed)
    print(f"wrote {os.path.join(out, 'family.png')}")


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def pick_config(args, device, dtype, memory):
    """The shape: a checkpoint's, the one named, or the largest whose rows all fit with one text."""
    if args.model:
        where = os.path.join(args.model, "config.json")
        return nanoh1.config_from_json(nanoh1.read_json(where), where), args.model
    name = args.shape or "tiny"
    if not args.shape and device.type == "cuda":
        def need(name):
            size = [sizes(hybrid(SHAPES[name], k), dtype, max(args.ctx)) for k in args.replace]
            return max(s["weight_bytes"] + s["kv_bytes"] + s["state_bytes"] for s in size)
        name = next((name for name in SHAPES if need(name) <= memory), "tiny")
    return SHAPES[name], name


def about_run(args, device, dtype, shape, bandwidth):
    """What every JSON line says about the machine and the run."""
    return {"date": datetime.datetime.now().isoformat(timespec="seconds"), "command": " ".join(sys.argv),
            **provenance(device), "dtype": str(dtype).removeprefix("torch."), "shape": shape,
            "scan": scan_backend(device), "copy_bytes_per_s": bandwidth, "graph": args.graph}


def main():
    args = parse_args()
    device, dtype = start_script(args)
    torch.manual_seed(args.seed)
    if args.table or args.figures:
        return show_results(args, device, dtype)
    if args.graph and device.type != "cuda":
        raise UserError("--graph needs a GPU with CUDA")
    bandwidth = copy_bandwidth(device)
    config, shape = pick_config(args, device, dtype, memory_for(args, device))
    about, rows = about_run(args, device, dtype, shape, bandwidth), []
    print(f"shape {shape}: {config.n_layer} layers, d_model {config.d_model} | {about['device']}, {about['threads']} "
          f"threads | {about['dtype']} | torch {about['torch']}, triton {about['triton']} | commit {about['commit']}\n"
          f"{nanoh1.scan_backend_reason(device)}\n"
          f"copy bandwidth {amount(bandwidth)}/s (measured, read and write)")
    parts = [bench_models] * bool({"prefill", "decode"} & set(args.what)) + [bench_scan] * ("scan" in args.what)
    try:
        if args.json:
            open(args.json, "a").close()                                     # fail now, not after the first row
        for part in parts:
            for row in part(args, config, device, dtype, about, bandwidth):
                rows.append(row)
                if args.json:
                    with open(args.json, "a", encoding="utf-8") as f:
                        f.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {args.json}: {e.strerror}") from None
    finally:                                                                 # Ctrl-C, too, keeps what was measured
        if args.plot and rows:
            plot(rows, args.plot)


if __name__ == "__main__":
    run_main(main)
