"""
What the conversion buys: tokens/s of a transformer (H-0) and of its hybrids (H-k: k of 50 attention layers replaced).

    python bench.py --ctx 32768                                 # GPU: largest shape that fits; CPU: tiny, 2 minutes
    python bench.py --shape 3b --replace 0,20 --batch 1,8 --json bench.jsonl --plot bench.png
    python bench.py --ctx 1024,4096,16384,65536,131072 --what decode --batch 1,max --plot sweep.png
    python bench.py --what scan                                 # the selective scans that run here
    python bench.py --what transformers --model teacher         # against generate() of transformers
    python bench.py --table out/h25 out/h27                     # what distill.py and train_sft.py saved, as a table
    python bench.py --figures results/ten.jsonl --out out/ten   # ... and in two or three pictures

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
import math
import os
import re
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import model as nano         # before torch: it says how threads wait
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from model import (Config, HybridLM, State, UserError, claim_out, harm, join_projections,
                   load_pretrained, provenance, run_main, scan_backend, selective_scan,
                   start_script, sync)

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
ORDER = [*nano.APRIEL15B, 2]

WHAT = ("prefill", "decode", "scan", "chunks", "transformers")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ctx", help="tokens of context; several, with commas, for --plot "
        "(default: 32768; with --what transformers: a short text)")
    add("--shape", help=f"{', '.join(SHAPES)} (default: the largest "
        "that fits on a GPU, tiny on a CPU)")
    add("--model", help="bench this checkpoint directory, beside an H-0 of its shape "
        "(default: random weights)")
    add("--replace", help="layers replaced, of 50; scaled to other depths "
        "(default: 0,25,30,34,37,40; with --model: 0)")
    add("--batch", help="texts at once; max: as many as fit "
        "(default: 1,16,max on a GPU, 1,4,max elsewhere)")
    add("--what", default="prefill,decode", help=f"{', '.join(WHAT)} (default: prefill,decode)")
    add("--prefill-tokens", type=int,
        help="length of the measured prefill (default: --ctx on a GPU, else 1024)")
    add("--seconds", type=float, default=2.0,
        help="time spent per measured cell, at least 3 runs (default: 2 s)")
    add("--cpu-time", action="store_true",
        help="count this thread's CPU time and not the clock: for a CPU shared with other programs")
    add("--memory", type=float,
        help="GB for weights and caches (default: 96 %% of what is free on a GPU, else 4 GB)")
    add("--graph", action="store_true",
        help="decode by replaying a CUDA graph of the steps (not measured yet)")
    add("--device", default="auto",
        help="cuda, mps or cpu (default: the first of these that is there)")
    add("--dtype", default="auto",
        help="float32 or bfloat16 (default: bfloat16 on cuda, else float32)")
    add("--seed", type=int, default=0, help="seed of weights and inputs (default: 0)")
    add("--json", metavar="FILE", help="append one JSON line per row; with --table or --figures: "
        "write their results, one line each (both read such a file, too; if FILE is there, it must be among them)")
    add("--plot", metavar="FILE.png",
        help="tokens/s against context and against Mamba layers (needs matplotlib)")
    # Results of distill.py and train_sft.py instead of measurements.
    add("--table", nargs="+", metavar="DIR",
        help="only print a table of these results (or those inside, or in a file of --json)")
    add("--figures", nargs="+", metavar="DIR", help="... and draw two pictures of them into --out, "
        "a third of their curves (distill.py --curve)")
    add("--out", default="results",
        help="directory for the pictures of --figures (default: results)")
    add("--speeds", metavar="FILE",
        help="for --figures: tokens/s from bench.py --model DIR --json FILE")
    args = p.parse_args()
    args.short_text = args.ctx is None
    args.ctx = numbers("--ctx", args.ctx or "32768")
    default = "0" if args.model else "0,25,30,34,37,40"
    args.replace = numbers("--replace", args.replace or default, least=0)
    args.what = args.what.split(",")
    check_args(args)
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


def check_args(args):
    """Raises UserError for what cannot be meant, before anything is measured."""
    for what in args.what:
        if what not in WHAT:
            raise UserError(f"--what {what!r}: known are {', '.join(WHAT)}")
    if args.shape and args.shape not in SHAPES:
        raise UserError(f"--shape {args.shape!r}: known are {', '.join(SHAPES)}")
    if max(args.replace) > 50:
        raise UserError("--replace goes from 0 to 50")
    if min(args.ctx) < 8:
        raise UserError("--ctx starts at 8")
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise UserError(f"--memory must be above 0, got {args.memory}")
    if not 0 <= args.seconds < math.inf:
        raise UserError(f"--seconds must be 0 or more, got {args.seconds}")
    for batch in (args.batch or "max").split(","):
        if batch != "max":
            numbers("--batch", batch)
    if args.prefill_tokens is not None and args.prefill_tokens < 1:
        raise UserError("--prefill-tokens starts at 1")
    if "transformers" in args.what and not args.model:
        raise UserError("--what transformers needs --model DIR, a checkpoint that both can read")
    if args.plot and (args.table or args.figures):
        raise UserError("--plot draws measurements, --figures draws results")
    if args.plot and "decode" not in args.what:
        raise UserError("--plot draws what --what decode measures")
    if args.shape and args.model:
        raise UserError("give one of --shape and --model")
    if args.plot and not os.path.isdir(os.path.dirname(args.plot) or "."):
        raise UserError(f"cannot write {args.plot}: its directory is not there")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")


# ----------------------------------------------------------------------------------------------------------------------
# What must be kept and moved, from the shapes alone: a model on the meta device has sizes and no memory.

def hybrid(config, k):
    """config with k of 50 layers replaced, scaled to its own depth."""
    n = config.n_layer
    # Layer i stands for layer i * 50 / n of 50.
    turn = [ORDER.index(i * 50 // n) for i in range(n)]
    first_to_go = sorted(range(n), key=turn.__getitem__)
    gone = first_to_go[:round(k * n / 50)]
    return replace(config, layout=tuple("m2" if i in gone else "t" for i in range(n)))


def sizes(config, dtype, ctx):
    """-> parameters; bytes of all weights, of those read per step, of one text's caches and of its
    recurrent states."""
    with torch.device("meta"):
        model = nano.cast(HybridLM(config), "meta", dtype)
        kv_bytes, state_bytes = model.new_state(1, ctx).nbytes()
    weight_bytes = sum(p.nbytes for p in model.parameters())
    # One row of the embedding table is read per token; the output head is read whole, also if it is the same table.
    unread = 0 if config.tie_embeddings else model.embed_tokens.weight.nbytes
    return {"params": sum(p.numel() for p in model.parameters()),
            "weight_bytes": weight_bytes, "read_bytes": weight_bytes - unread,
            "kv_bytes": kv_bytes, "state_bytes": state_bytes}


def decode_limit(size, batch, copied):
    """Tokens/s if a step did nothing but move its bytes: weights and caches in, states in and out. A step reads far
    more than it writes, and is held against the bandwidth of a copy all the same."""
    of_one_text = size["kv_bytes"] + 2 * size["state_bytes"]
    seconds = (size["read_bytes"] + batch * of_one_text) / copied
    return batch / seconds


def prefill_limit(config, t, dtype, machine):
    """Tokens/s if a prompt of t tokens cost only its matrix products, attention's two products over all pairs of tokens
    that see each other, and the scans (scan_limits), each as fast as it can be and one after the other. Left out:
    norms, rotary, softmax, activations, the embedding, and that small products are slower than large ones."""
    c = config
    with torch.device("meta"):
        layers = HybridLM(c).layers
    matrices = [p.numel() for name, p in layers.named_parameters() if name.endswith("_proj.weight")]
    # The output head is asked for the last token alone.
    products = 2 * t * sum(matrices) + 2 * c.d_model * c.vocab_size
    window = min(t, c.sliding_window or t)
    pairs = window * (window + 1) / 2 + (t - window) * window
    attention = 4 * pairs * c.n_head * c.head_dim * c.layout.count("t")
    scan, _ = scan_limits(1, t, c, dtype, machine)
    seconds = (products + attention) / machine.products + scan * c.layout.count("m2")
    return t / seconds


def scan_limits(b, t, config, dtype, machine):
    """-> seconds (forward, backward) that no kernel can beat. Bytes: forward reads u, dt, z, C and writes y (t, d_inner
    each), B is d_xb wide; backward reads these with grad_y for y and writes four gradients and that of B. Or, where
    they take longer, the exponentials: d_state per channel and step and 4 for softplus and SiLU; backward needs those
    for rebuilding the states and for walking back, and 2 more."""
    c = config
    item = dtype.itemsize
    forward = b * t * (5 * c.d_inner + c.d_xb) * item / machine.copied
    backward = b * t * (9 * c.d_inner + 2 * c.d_xb) * item / machine.copied
    channels = b * t * c.d_inner
    forward = max(forward, channels * (c.d_state + 4) / machine.exponentials)
    backward = max(backward, channels * (2 * c.d_state + 6) / machine.exponentials)
    return forward, backward


def memory_for(args, device):
    """Bytes for weights and caches. The rest is for activations, logits and the allocator."""
    if args.memory is not None:
        return args.memory * 1e9
    if device.type != "cuda":
        # A laptop stays usable, and the run short.
        return 4e9
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_allocated() - 0.04 * total


# ----------------------------------------------------------------------------------------------------------------------
# Measuring.

# --cpu-time makes it time.thread_time, which stands still while another program has the core.
clock = time.perf_counter


def alternate(runs, device, seconds, warmup=1, least=3, most=50):
    """runs: {name: function} -> {name: seconds of each round}. All in turn, so that another program's burst hits them
    all. The first rounds (allocation, kernel compilation) are not counted."""
    times = {name: [] for name in runs}
    for _ in range(warmup):
        for run in runs.values():
            run()
    rounds = 0
    end = clock() + seconds * len(runs)
    while rounds < least or (clock() < end and rounds < most):
        rounds += 1
        for name, run in runs.items():
            times[name].append(time_once(run, device))
    return times


def measure(run, device, seconds, warmup=1, least=3):
    """-> (median, spread) of run() in seconds, see median_of."""
    return median_of(alternate({"": run}, device, seconds, warmup, least)[""])


def median_of(values):
    """-> the median and the spread: half the distance between the quartiles, relative to it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (high - low) / 2 / middle


def time_once(run, device):
    """Seconds that one call of run() takes."""
    sync(device)
    start = clock()
    run()
    sync(device)
    return clock() - start


class Machine(NamedTuple):
    """What this machine can do at best, measured. A limit is a time that follows from these and from counting."""
    copied: float        # bytes/s of a large copy, read and write counted
    products: float      # floating point operations/s of a large matrix product in this dtype
    exponentials: float  # exp/s


def measure_machine(device, dtype, seconds):
    """seconds: the time for each of the three. -> Machine. A GPU's exponentials are computed: 16 a cycle on each
    multiprocessor's special function units."""
    large = device.type == "cuda"
    a = torch.empty(1 << (30 if large else 27), dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    copy_s, _ = measure(lambda: b.copy_(a), device, seconds, warmup=3, least=5)
    n = 8192 if large else 1024
    square = torch.randn(n, n, device=device).to(dtype)
    product = torch.empty_like(square)
    product_s, _ = measure(lambda: torch.mm(square, square, out=product), device, seconds,
                           warmup=3, least=5)
    if large:
        gpu = torch.cuda.get_device_properties(device)
        # clock_rate is in kHz.
        exponentials = 16 * gpu.multi_processor_count * getattr(gpu, "clock_rate", 1.98e6) * 1e3
    else:
        # Few enough to stay in the cache.
        few = torch.randn(1 << 14, device=device)
        result = torch.empty_like(few)
        exp_s, _ = measure(lambda: torch.exp(few, out=result), device, seconds, warmup=3, least=5)
        exponentials = few.numel() / exp_s
    return Machine(2 * a.nbytes / copy_s, 2 * n ** 3 / product_s, exponentials)


def random_model(config, device, dtype):
    """A model with random weights, made on the device: a 15B model never passes through the CPU's memory."""
    with torch.device("meta"):
        model = nano.cast(HybridLM(config), "meta", dtype)
    model.to_empty(device=device).requires_grad_(False)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for name, p in model.named_parameters():
        centre = 1 if name.endswith(("norm.weight", ".A_log", ".D")) else 0
        p.normal_(centre, 0.02)
    return model.eval()


def filled_state(model, batch, ctx):
    """A State as after ctx tokens, filled with random values: prefilling would cost O(ctx^2), and a step costs the same
    whatever the caches hold (but zeros may be cheaper to move, so none are left)."""
    state = model.new_state(batch, ctx)
    noise = {}
    for layer in state.layers:
        for m in layer or ():
            # The noise of one text does for all texts and layers: drawing it takes longer than moving it.
            one = m.shape[1:]
            if one not in noise:
                noise[one] = torch.randn(one, device=m.device)
            m.copy_(noise[one])
    return replace(state, position=ctx)


def narrow(state, batch, back):
    """The first `batch` texts of state, as views, `back` tokens before its end: steps of the same cost can be taken
    again and again from here; they write over the caches' last entries, and over the cells where Triton runs."""
    layers = []
    for layer in state.layers:
        layers.append(None if layer is None else type(layer)(*(m[:batch] for m in layer)))
    return State(state.position - back, state.max_length, tuple(layers))


def decode_steps(model, token, state, count):
    """count greedy steps of one token per text, as in decode. token (b, 1)."""
    for _ in range(count):
        x, state = model.hidden(token, state, donate=True)
        token = model.lm_head(x[:, -1]).argmax(dim=-1, keepdim=True)
    return token


def graph_of(run):
    """Record the kernels of run() once, replay them without Python: shows what launch overhead costs. SDPA fixes the
    length at capture, so this replays one position; generating text this way needs a kernel that reads the length."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Kernels compile before the capture.
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_decode(model, state, batch, args, device):
    """-> seconds per step (median), spread."""
    # Steps between two looks at the clock.
    count = min(16, state.position) if device.type == "cuda" else 1
    token = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    start = narrow(state, batch, count)

    def run():
        decode_steps(model, token, start, count)
    # On the GPU: flash attention and nothing else. It reads each key and value once; cuDNN, which SDPA prefers on
    # Hopper, would build a plan for every new length, and the other fallbacks would slow the baseline down unseen.
    flash = device.type == "cuda" and model.embed_tokens.weight.dtype == torch.bfloat16
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
        timed = graph_of(run) if args.graph else run
        seconds, spread = measure(timed, device, args.seconds)
    return seconds / count, spread


def prefill_length(args, ctx, device):
    """Tokens of the measured prompt."""
    return args.prefill_tokens or (ctx if device.type == "cuda" else min(ctx, 1024))


def time_prefill(model, length, args, device):
    """-> seconds (median), spread, for one prompt of random tokens, in one pass, logits of the last position."""
    prompt = torch.randint(model.config.vocab_size, (length,)).tolist()
    return measure(lambda: model.prefill([prompt], 1, chunk=length), device, args.seconds)


def peak_memory(device):
    """Bytes: on a GPU of this row, elsewhere of the process so far; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        # Windows.
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ----------------------------------------------------------------------------------------------------------------------
# The rows: a model at one length of context. Half of a row follows from the shape, the other half is measured.

def amount(x, unit="B"):
    """Four digits and a prefix: 28632 -> 28.63 kB."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{x / factor:.4g} {prefix}{unit}"
    return f"{x:.4g} {unit}"


def batches_that_fit(args, device, largest):
    """--batch as numbers, without what does not fit."""
    batches = args.batch or ("1,16,max" if device.type == "cuda" else "1,4,max")
    wanted = [largest if b == "max" else numbers("--batch", b)[0] for b in batches.split(",")]
    return sorted({b for b in wanted if 0 < b <= largest})


def planned_rows(args, config, device, dtype, memory, machine, ctx):
    """-> [(row, its Config)]: the computed half of every row, printed before anything is measured."""
    configs = {f"H-{k}": hybrid(replace(config, layout=()), k) for k in args.replace}
    if args.model:
        configs["model"] = config
    length = prefill_length(args, ctx, device)
    line = "{:>6} {:>5} {:>9} {:>9} {:>9} {:>10} {:>7} {:>9}   {}"
    print(f"\ncontext {ctx}: what is kept, how many texts fit into {amount(memory)}, "
          f"and the limits in tokens/s (prefill: {length} tokens)")
    print(line.format("model", "Mamba", "params", "weights", "KV/text", "state/text", "largest",
                      "prefill", "decode limit (batch)"))
    rows = []
    for name, c in configs.items():
        size = sizes(c, dtype, ctx)
        of_one_text = size["kv_bytes"] + size["state_bytes"]
        if not of_one_text:
            raise UserError(f"{name} has neither attention nor Mamba layers: it keeps nothing of a text")
        largest = max(0, int((memory - size["weight_bytes"]) // of_one_text))
        cells = []
        for batch in batches_that_fit(args, device, largest):
            most = decode_limit(size, batch, machine.copied)
            cells.append({"batch": batch, "limit_tokens_per_s": most})
        row = {"row": name, "mamba_layers": c.layout.count("m2"), "layers": c.n_layer, "ctx": ctx,
               **size, "largest_batch": largest, "decode": cells, "prefill_tokens": length,
               "prefill_limit_tokens_per_s": prefill_limit(c, length, dtype, machine)}
        rows.append((row, c))
        limits = [f"{cell['limit_tokens_per_s']:.0f} ({cell['batch']})" for cell in cells]
        print(line.format(name, row["mamba_layers"], amount(size["params"], ""),
                          amount(size["weight_bytes"]), amount(size["kv_bytes"]),
                          amount(size["state_bytes"]), largest,
                          f"{row['prefill_limit_tokens_per_s']:.0f}",
                          ", ".join(limits) or "does not fit"))
    return rows


@torch.inference_mode()
def measure_row(row, config, args, device, dtype):
    """Fill in the measured half of one row."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if row["row"] == "model":
        model = load_pretrained(args.model, device, dtype)
    else:
        model = random_model(config, device, dtype)
    join_projections(model)
    if "prefill" in args.what:
        seconds, spread = time_prefill(model, row["prefill_tokens"], args, device)
        rate = row["prefill_tokens"] / seconds
        row["prefill_tokens_per_s"] = rate
        row["prefill_spread"] = spread
        row["prefill_percent_of_limit"] = 100 * rate / row["prefill_limit_tokens_per_s"]
    if "decode" in args.what and row["decode"]:
        # Smaller batches are views of the largest.
        state = filled_state(model, row["decode"][-1]["batch"], row["ctx"])
        for cell in row["decode"]:
            seconds, spread = time_decode(model, state, cell["batch"], args, device)
            rate = cell["batch"] / seconds
            cell["tokens_per_s"] = rate
            cell["step_s"] = seconds
            cell["spread"] = spread
            cell["percent_of_limit"] = 100 * rate / cell["limit_tokens_per_s"]
    row["peak_bytes"] = peak_memory(device)


ROW = "{:>6} {:>12} {:>8}{} {:>8} {:>6} {:>9}"


def print_header(columns):
    """columns: cells of the row that has most batches."""
    titles = ["decode/s (batch)"] * (columns - 1) + ["at its largest"]
    cells = "".join(f"{title:>20}" for title in titles)
    print(ROW.format("model", "prefill/s", "of limit", cells, "of limit", "x H-0", "peak"))


def print_row(row, columns):
    """The measured half of one row."""
    # Why a cell has no figure.
    missing = row.get("failed", "")
    cells = []
    for cell in row["decode"]:
        if "tokens_per_s" in cell:
            noise = f"+-{100 * cell['spread']:.0f}%"
            cells.append(f"{cell['tokens_per_s']:.1f} {noise} ({cell['batch']})")
        else:
            cells.append(missing)
    if not cells:
        cells = [missing or "does not fit"]
    # The largest batch stands last.
    gap = [""] * (columns - len(cells))
    cells = cells[:-1] + gap + cells[-1:]
    prefill = ""
    prefill_share = ""
    if "prefill_spread" in row:
        prefill_share = f"{row['prefill_percent_of_limit']:.1f}%"
        prefill = f"{row['prefill_tokens_per_s']:.0f} +-{100 * row['prefill_spread']:.0f}%"
    share = ""
    if row["decode"] and "percent_of_limit" in row["decode"][-1]:
        share = f"{row['decode'][-1]['percent_of_limit']:.1f}%"
    ratio = f"{row['ratio_to_h0']:.2f}" if "ratio_to_h0" in row else ""
    peak = amount(row["peak_bytes"]) if row.get("peak_bytes") else ""
    cells = "".join(f"{cell:>20}" for cell in cells)
    print(ROW.format(row["row"], prefill, prefill_share, cells, share, ratio, peak), flush=True)


def ran_out_of_memory(error):
    """On a GPU that is an error of its own, on a CPU a plain RuntimeError."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "allocate memory" in str(error)


def best_rate(row):
    """tokens/s at the row's largest batch, or None."""
    return row["decode"][-1].get("tokens_per_s") if row.get("decode") else None


def bench_models(args, config, device, dtype, machine):
    """Prefill and decode of every row at every context. Yields rows as they are measured."""
    memory = memory_for(args, device)
    for ctx in args.ctx:
        rows = planned_rows(args, config, device, dtype, memory, machine, ctx)
        columns = max(1, *(len(row["decode"]) for row, _ in rows))
        print("\nmeasured, tokens/s: median, spread (half the distance between the quartiles), "
              "(batch)")
        if "decode" in args.what:
            print(f"decode: caches filled with random values as after {ctx} tokens, "
                  "instead of prefilling them")
        if "prefill" in args.what:
            print("prefill: one prompt, in one pass, logits of its last token")
        print_header(columns)
        base = None
        quiet = not sys.stderr.isatty()
        for row, c in tqdm(rows, desc=f"context {ctx}", leave=False, disable=quiet):
            try:
                measure_row(row, c, args, device, dtype)
            except (RuntimeError, MemoryError) as e:
                if not ran_out_of_memory(e):
                    raise
                row["failed"] = "out of memory"
            except KeyboardInterrupt:
                # Print the cells that are done.
                row["failed"] = "interrupted"
                print_row(row, columns)
                raise
            if row["row"] == "H-0":
                base = best_rate(row)
            if base and best_rate(row):
                row["ratio_to_h0"] = best_rate(row) / base
            print_row(row, columns)
            yield row


# ----------------------------------------------------------------------------------------------------------------------
# The scan alone.

def official_scan():
    """mamba_ssm's kernel in our argument order, or None. It wants time last and B and C with equally many groups."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None

    def last(m):
        return m.transpose(1, 2).contiguous()

    def groups(m):
        # (b, groups, n, t)
        return m.permute(0, 2, 3, 1).contiguous()

    def run(u, dt, A, B, C, D, z, dt_bias):
        B = B.repeat_interleave(C.shape[2] // B.shape[2], dim=2)
        y = selective_scan_fn(last(u), last(dt), A, groups(B), groups(C), D, last(z), dt_bias,
                              delta_softplus=True)
        return y.transpose(1, 2)
    return run


def sweep(a, s):
    """Blelloch's scan over time, in place: s[:, i] <- a[:, i] s[:, i - 1] + s[:, i]. a, s (b, t, d, n); a is spoilt."""
    t = s.shape[1]
    levels = [1 << i for i in range(t.bit_length())]
    for k in levels:
        # Two blocks of k steps become one.
        for left, right in neighbours(2 * k - 1, k, t):
            s[:, right].addcmul_(a[:, right], s[:, left])
            a[:, right].mul_(a[:, left])
    for k in levels[::-1]:
        for left, right in neighbours(3 * k - 1, k, t):
            s[:, right].addcmul_(a[:, right], s[:, left])
    return s


def neighbours(first, k, t):
    """The last steps of blocks of k steps, from `first` on, and those of the blocks before them -> [(left, right)], two
    slices; [] where none is left."""
    right = range(first, t, 2 * k)
    if not right:
        return []
    return [(slice(right[0] - k, right[-1] - k + 1, 2 * k), slice(right[0], t, 2 * k))]


class Blelloch(torch.autograd.Function):
    """a, s (b, t, d, n) -> all states h_t = a_t h_{t-1} + s_t, (b, t, d, n): what the chunked scan never holds."""

    @staticmethod
    def forward(ctx, a, s):
        h = sweep(a.clone(), s.clone())
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad_h):
        a, h = ctx.saved_tensors
        zero = torch.zeros_like(a[:, :1])
        # a_{t+1}, from late to early.
        after = torch.cat([zero, a.flip(1)[:, :-1]], dim=1)
        # The full gradients of the states, which are those of s.
        grad_s = sweep(after, grad_h.flip(1)).flip(1)
        grad_a = torch.cat([zero, grad_s[:, 1:] * h[:, :-1]], dim=1)
        return grad_a, grad_s


def blelloch_scan(u, dt, A, B, C, D, z, dt_bias):
    """The selective scan by a parallel prefix sum over the materialised (b, t, d, n), as plain PyTorch code has it."""
    d = len(A)
    dt = F.softplus(dt + dt_bias)
    B = B.repeat_interleave(d // B.shape[2], dim=2)      # (b, t, d, n)
    C = C.repeat_interleave(d // C.shape[2], dim=2)
    h = Blelloch.apply(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B)
    return ((h * C).sum(-1) + D * u) * F.silu(z)


def mambapy_scan():
    """mamba.py's scan (package mambapy, MambaBlock.selective_scan) in our argument order, or None. It knows one group
    of B and C, so every group of C becomes a text of its own; softplus and gate are where mamba.py has them."""
    try:
        from mambapy.mamba import MambaBlock
    except ImportError:
        return None

    def run(u, dt, A, B, C, D, z, dt_bias):
        b, t, d = u.shape
        groups = C.shape[2]
        n = A.shape[1]

        def apart(m):
            # (b, t, groups * width) -> (b * groups, t, width)
            return m.reshape(b, t, groups, -1).transpose(1, 2).flatten(0, 1)
        A = A.view(groups, 1, d // groups, n).repeat(b, 1, 1, 1)
        D = D.view(groups, 1, d // groups).repeat(b, 1, 1)
        B = B.repeat_interleave(groups // B.shape[2], dim=2)
        # self is not used in there.
        y = MambaBlock.selective_scan(None, apart(u), apart(F.softplus(dt + dt_bias)), A, apart(B),
                                      apart(C), D)
        y = y.view(b, groups, t, -1).transpose(1, 2).reshape(u.shape)
        return y * F.silu(z)
    return run


def own_scan(impl):
    """selective_scan with this implementation, as a function of its inputs alone."""
    return lambda *inputs: selective_scan(*inputs, impl=impl)[0]


def scan_contestants(config, ctx, device):
    """-> {tokens: {name: function}}, what runs here. Those that are compared run over equally many tokens: as many as a
    prefix sum over all states can hold (a dozen copies of them, some 1 GB), and the loop over few."""
    auto = scan_backend(device)
    if device.type == "cuda":
        foreign = {"mamba_ssm": official_scan()}
        t = ctx
    else:
        foreign = {"blelloch": blelloch_scan, "mambapy": mambapy_scan()}
        t = min(ctx, 2048, (1 << 25) // (config.d_inner * config.d_state))
    runs = {name: own_scan(name) for name in (auto, "chunk")}
    runs |= {name: run for name, run in foreign.items() if run}
    few = max(1, min(256, t // 2, (1 << 20) // (config.d_inner * config.d_state)))
    return {few: {"loop": own_scan("loop")}, t: runs}


def scan_inputs(config, b, t, device, dtype):
    """Random inputs of a scan as in a model -> [u, dt, A, B, C, D, z, dt_bias], all with gradients."""
    c = config
    u = torch.randn(b, t, c.d_inner, device=device, dtype=dtype)
    B = torch.randn(b, t, c.d_xb // c.d_state, c.d_state, device=device, dtype=dtype)
    C = torch.randn(b, t, c.d_inner // c.d_state, c.d_state, device=device, dtype=dtype)
    A = -torch.arange(1, c.d_state + 1, device=device).float().repeat(c.d_inner, 1)
    D = torch.randn(c.d_inner, device=device)
    # softplus(-4) = 0.018, as in a model.
    bias = torch.randn(c.d_inner, device=device) - 4
    inputs = [u, torch.randn_like(u), A, B, C, D, torch.randn_like(u), bias]
    return [m.requires_grad_() for m in inputs]


def bench_scan(args, config, device, dtype, machine):
    """Forward and backward of every scan at the shape's width, batch 1, in turn. Yields rows."""
    c = config
    auto = scan_backend(device)
    print(f"\nselective scan, batch 1, d_inner {c.d_inner}, d_state {c.d_state}, groups of B and C "
          f"{c.d_xb // c.d_state} and {c.d_inner // c.d_state}; auto takes: {auto}")
    line = "{:>10} {:>7} {:>17} {:>8} {:>17} {:>8} {:>10} {:>20}"
    print(line.format("scan", "tokens", "forward ms", "limit", "backward ms", "limit", "ns/token",
                      f"both, {auto} = 1"))
    for t, runs in scan_contestants(c, max(args.ctx), device).items():
        inputs = scan_inputs(c, 1, t, device, dtype)
        grad_y = torch.randn_like(inputs[0])

        def forward(run):
            with torch.no_grad():
                run(*inputs)

        def both(run):
            torch.autograd.grad(run(*inputs), inputs, grad_y)
        forwards = {name: partial(forward, run) for name, run in runs.items()}
        forwards = alternate(forwards, device, args.seconds)
        boths = {name: partial(both, run) for name, run in runs.items()}
        boths = alternate(boths, device, args.seconds)
        limits = scan_limits(1, t, c, dtype, machine)
        for name in runs:
            row = scan_row(name, t, forwards[name], boths[name], boths.get(auto), limits)
            forward_ms = f"{1e3 * row['forward_s']:.3f} +-{100 * row['spread']:.0f}%"
            backward_ms = f"{1e3 * row['backward_s']:.3f} +-{100 * row['both_spread']:.0f}%"
            print(line.format(name, t, forward_ms, f"{1e3 * limits[0]:.3f}", backward_ms,
                              f"{1e3 * limits[1]:.3f}", f"{1e9 * row['forward_s'] / t:.0f}",
                              with_range(row, "times_auto") if auto in runs else ""), flush=True)
            yield row | {"peak_bytes": peak_memory(device)}


def scan_row(name, t, forwards, boths, auto, limits):
    """The times of all rounds -> one row. auto: the times of the scan that the model takes, in the same rounds."""
    forward, spread = median_of(forwards)
    both, both_spread = median_of(boths)
    row = {"row": f"scan {name}", "tokens": t, "forward_s": forward, "backward_s": both - forward,
           "spread": spread, "both_spread": both_spread, "rounds": len(boths),
           "forward_limit_s": limits[0], "backward_limit_s": limits[1]}
    if auto:
        row |= ratios("times_auto", boths, auto)
    return row


def ratios(key, ours, theirs):
    """Times of the same rounds -> {key: the median of ours / theirs, key_range: least and greatest}."""
    all_rounds = sorted(a / b for a, b in zip(ours, theirs))
    return {key: statistics.median(all_rounds), f"{key}_range": [all_rounds[0], all_rounds[-1]]}


def with_range(row, key):
    """What ratios has put into row, as text."""
    low, high = row[f"{key}_range"]
    return f"{row[key]:.2f} ({low:.2f} to {high:.2f})"


# (batch, d_inner, tokens) that occur, from one layer of the shipped teacher to a wide layer and a large batch.
SCAN_SHAPES = [(1, 64, 100), (1, 64, 2048), (1, 64, 32768), (64, 64, 100), (64, 64, 1024),
               (24, 128, 256), (1, 576, 1024), (6, 576, 220), (1, 1024, 100), (1, 1024, 2048),
               (8, 1024, 100), (64, 1024, 32), (1, 4096, 100), (1, 4096, 1024), (8, 4096, 64)]


def bench_chunks(args, config, device, dtype, machine):
    """Forward and backward of the chunked scan with the steps per chunk that model.chunk_size takes, and with others.
    Yields a row per shape; the best of all rounds counts, since a burst only ever adds."""
    rule = nano.chunk_size
    print("\nchunked scan, forward and backward: time by steps per chunk, the best one = 1")
    for b, d, t in SCAN_SHAPES:
        shape = replace(config, d_inner=d, d_xb=max(config.d_state, d // 4))
        inputs = scan_inputs(shape, b, t, device, dtype)
        grad_y = torch.randn_like(inputs[0])
        taken = rule(b, d, config.d_state)

        def run(size):
            nano.chunk_size = lambda *shape: size
            torch.autograd.grad(own_scan("chunk")(*inputs), inputs, grad_y)
        powers = [2 ** i for i in range(9) if 2 ** i < 2 * t]
        runs = {size: partial(run, size) for size in sorted({taken, *powers})}
        try:
            times = alternate(runs, device, args.seconds / 10)
        finally:
            nano.chunk_size = rule
        best = {size: min(rounds) for size, rounds in times.items()}
        fastest = min(best.values())
        shares = {size: seconds / fastest for size, seconds in best.items()}
        cells = " ".join(f"{size}: {share:.2f}" for size, share in shares.items())
        print(f"b {b}, d {d}, t {t}: {taken} taken, {shares[taken]:.2f}  | {cells}", flush=True)
        yield {"row": "chunks", "batch": b, "d_inner": d, "tokens": t, "taken": taken,
               "times_best": shares[taken], "seconds": best}


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers, on a checkpoint that both read: its generate() and ours, as a user would call them.

def bench_transformers(args, device, dtype):
    """Greedy decoding, alternating. Yields a row per context. Both make exactly as many tokens; the first logits are
    the end of the prefill."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: pip install transformers")
        return
    transformers.logging.set_verbosity_error()
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    except (ValueError, KeyError, OSError) as e:
        why = str(e).splitlines()[0]
        raise UserError(f"transformers cannot load {args.model}: {why}") from None
    theirs = theirs.to(device).eval()
    # Of its own nothing: penalties and the like would change what is likeliest.
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    ours = load_pretrained(args.model, device, dtype)
    print(f"\ngreedy decoding, transformers {transformers.__version__} and ours in turn, "
          "tokens/s: median, ratio (least to greatest)")
    line = "{:>8} {:>7} {:>10} {:>10} {:>22} {:>10} {:>10} {:>22}"
    print(line.format("context", "tokens", "decode", "theirs", "ratio",
                      "in all", "theirs", "ratio"))
    for ctx in [7] if args.short_text else args.ctx:
        prompt = torch.randint(ours.config.vocab_size, (ctx,)).tolist()
        # A long prompt takes half a minute on a CPU, and warms up within one call.
        short = ctx < 1000
        count = 100 if short else 32
        rounds = 9 if short else 3
        row = compare_generate(ours, theirs, prompt, count, rounds, int(short), device)
        decode = [f"{row[key]:.1f}" for key in ("decode_tokens_per_s", "theirs_decode_tokens_per_s")]
        whole = [f"{row[key]:.1f}" for key in ("tokens_per_s", "theirs_tokens_per_s")]
        print(line.format(ctx, count, *decode, with_range(row, "decode_ratio"),
                          *whole, with_range(row, "ratio")), flush=True)
        yield {"row": "transformers", "transformers": transformers.__version__, "ctx": ctx, **row}


def compare_generate(ours, theirs, prompt, count, rounds, warmup, device):
    """count: new tokens -> a row: tokens/s of both, of the whole call and from the first logits on; all ratios."""
    ids = torch.tensor([prompt], device=device)
    tokens = {}
    first_logits = {"ours": [], "theirs": []}

    def run_ours():
        first_logits["ours"].append(None)
        tokens["ours"] = ours.generate([prompt], count, stop=())[0]

    def run_theirs():
        first_logits["theirs"].append(None)
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                                 do_sample=False, pad_token_id=0)
        tokens["theirs"] = output[0, len(prompt):].tolist()

    def watch(model, name):
        # The head's first call in a run ends the prefill.
        def hook(*_):
            if first_logits[name][-1] is None:
                sync(device)
                first_logits[name][-1] = clock()
        return model.lm_head.register_forward_hook(hook)
    ends = {"ours": [], "theirs": []}

    def ending(name, run):
        run()
        sync(device)
        ends[name].append(clock())
    hooks = [watch(ours, "ours"), watch(theirs, "theirs")]
    runs = {"ours": partial(ending, "ours", run_ours),
            "theirs": partial(ending, "theirs", run_theirs)}
    try:
        times = alternate(runs, device, 0, warmup, least=rounds)
    finally:
        for hook in hooks:
            hook.remove()
    if tokens["ours"] != tokens["theirs"]:
        raise UserError(f"not the same tokens, so their speeds do not compare: {tokens}")
    decode = {}
    for name in runs:
        # Without the warm-up.
        pairs = list(zip(ends[name], first_logits[name]))[-rounds:]
        decode[name] = [end - first for end, first in pairs]
    row = {"tokens": count, "rounds": rounds}
    for prefix, name in (("", "ours"), ("theirs_", "theirs")):
        row[f"{prefix}tokens_per_s"] = count / statistics.median(times[name])
        row[f"{prefix}decode_tokens_per_s"] = (count - 1) / statistics.median(decode[name])
    return row | ratios("ratio", times["theirs"], times["ours"]) | ratios(
        "decode_ratio", decode["theirs"], decode["ours"])


# ----------------------------------------------------------------------------------------------------------------------
# Results: a table and pictures, made from what the runs have saved and from nothing else: JSON in, pictures out.
#
# A member of a family is known by its stages: the tokens that it has cost are those of all of them, and its layer map
# has a row for each. A directory of train_sft.py is a member, too (H-30-SFT). Runs that differ in the seed alone are
# named x-s0, x-s1, ... (or have one name in several directories); they share a row of the table and a point. Others of
# one name, of two teachers say, are no seeds of one another: then the path is their name.

NEEDED = ("layout", "replaced", "teacher_accuracy", "student_accuracy", "accuracy_by_family",
          "kl_first", "kl_last", "tokens", "seconds", "seed")


@dataclass
class Result:
    """What one run of distill.py (a stage) or of train_sft.py has left. report: all that it has saved, with the keys
    of distill.py; where train_sft.py has no such thing (no teacher, no KL, no scores), None."""
    report: dict
    name: str
    path: str
    # The checkpoint that this run began with.
    before: str | None
    # The Results of the stages that led here, oldest first; find_results fills them in.
    earlier: tuple = ()

    @classmethod
    def from_distill(cls, path):
        """path: a directory with report.json."""
        file = os.path.join(path, "report.json")
        report = nano.read_json(file, dict)
        check_keys(report, (*NEEDED, "args"), file)
        return cls(report, last_part(path), path, report["args"].get("student"))

    @classmethod
    def from_training(cls, path):
        """path: a directory with training.json."""
        file = os.path.join(path, "training.json")
        saved = nano.read_json(file, dict)
        check_keys(saved, ("log", "args"), file)
        last_entry = saved["log"][-1] if saved["log"] else {}
        check_keys(last_entry, ("tokens", "seconds"), f"the log in {file}")
        where = os.path.join(path, "config.json")
        layout = nano.config_from_json(nano.read_json(where, dict), where).layout
        report = dict.fromkeys((*NEEDED, "scores")) | saved
        report["layout"] = list(layout)
        report["replaced"] = [i for i, kind in enumerate(layout) if kind != "t"]
        report["student_accuracy"] = saved.get("accuracy")
        by_family = saved.get("accuracy_by_family", {})
        pairs = {family: [None, share] for family, share in by_family.items()}
        report["accuracy_by_family"] = pairs
        report["tokens"] = last_entry["tokens"]
        report["seconds"] = last_entry["seconds"]
        report["seed"] = saved["args"].get("seed")
        return cls(report, last_part(path), path, saved["args"].get("model"))

    @classmethod
    def from_line(cls, line, where):
        """line: what write_lines has written, or the report of one run by hand; where: its place, for errors."""
        check_keys(line, NEEDED, where)
        name = f"h{len(line['replaced'])}" + ("-identity" if "n" in line["layout"] else "")
        name = line.get("name", name)
        return cls(line, name, line.get("path", name), line.get("before"))

    @property
    def member(self):
        """The name without its seed."""
        return re.sub(r"-s\d+$", "", self.name)

    @property
    def args(self):
        return self.report.get("args") or {}

    @property
    def layout(self):
        return self.report["layout"]

    @property
    def removed(self):
        """Were mixers taken out instead of replaced: is this the control?"""
        return "n" in self.layout

    @property
    def curve(self):
        """Points of distill.py --curve, see there; [] without."""
        return self.report.get("curve") or []

    @property
    def tokens(self):
        """Tokens that all stages have cost together; a line of --json knows it without its earlier stages."""
        before = sum(result.report["tokens"] for result in self.earlier)
        return self.report["tokens"] + self.report.get("tokens_before", before)

    @property
    def accuracy(self):
        return self.report["student_accuracy"]

    @property
    def teacher_accuracy(self):
        """What the teacher scored in the newest stage that asked it, or None."""
        for result in (self, *reversed(self.earlier)):
            if result.report["teacher_accuracy"] is not None:
                return result.report["teacher_accuracy"]

    @property
    def problems(self):
        """How many problems it was asked; 200 of a family is distill.py's own choice."""
        return self.args.get("eval", 200) * max(1, len(self.report["accuracy_by_family"] or ()))


def last_part(path):
    return os.path.basename(os.path.abspath(path))


def check_keys(report, needed, where):
    """Raises UserError for an older report, or one of something else."""
    for key in needed:
        if not isinstance(report, dict) or key not in report:
            raise UserError(f"{where} is no result of distill.py or train_sft.py: it has no {key}")


def read_result(path):
    """The Result in a directory, report.json before training.json; None if neither is there."""
    if os.path.exists(os.path.join(path, "report.json")):
        return Result.from_distill(path)
    if os.path.exists(os.path.join(path, "training.json")):
        return Result.from_training(path)
    return None


def read_json_lines(path):
    """A file of JSON lines -> what is in them. Raises UserError naming a bad line."""
    values = []
    number = 0
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                values.append(json.loads(line))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path}, line {number} is no JSON: {e}") from None
    return values


def results_in(path):
    """path: a file of --json, a directory with a result, or one above such -> Results, at least one."""
    results = []
    if os.path.isfile(path):
        for number, line in enumerate(read_json_lines(path), 1):
            results.append(Result.from_line(line, f"{path}, line {number}"))
    else:
        # A directory that is a result itself is not searched.
        results.append(read_result(path))
        if results == [None] and os.path.isdir(path):
            results = [read_result(os.path.join(path, name)) for name in sorted(os.listdir(path))]
    results = [result for result in results if result]
    if not results:
        raise UserError(f"{path}: no report.json of distill.py and no training.json of train_sft.py "
                        "there")
    return results


def stages_before(result, known):
    """-> the Results of the stages that led to this one, oldest first. known: {absolute path: Result}, asked before the
    disk. A family may have moved as a whole: then an earlier stage is found beside the later one."""
    def look_up(path):
        path = os.path.abspath(path)
        return known.get(path) or read_result(path)
    earlier = []
    seen = set()
    # A run may have replaced its own start: a path is followed once.
    while result.before and result.before not in seen:
        seen.add(result.before)
        beside = os.path.join(os.path.dirname(result.path), os.path.basename(result.before))
        result = look_up(result.before) or look_up(beside)
        # Nothing known, or the teacher itself.
        if result is None or not result.report["replaced"]:
            break
        earlier.insert(0, result)
    return tuple(earlier)


def find_results(paths):
    """Directories of results, those above them, or files of --json -> Results with their earlier stages, by the number
    of layers replaced. Raises UserError where there is none."""
    found = []
    for path in paths:
        found += results_in(path)
    # What is named twice, or in a directory and in the one above it, is one run.
    runs = {(os.path.realpath(r.path), r.report["seed"], r.report["seconds"]): r for r in found}
    found = list(runs.values())
    known = {os.path.abspath(result.path): result for result in found}
    for result in found:
        result.earlier = stages_before(result, known)
        before = result.earlier[-1].report if result.earlier else None
        if before and before["layout"] == result.layout:
            # train_sft.py replaces nothing, and does not know what its start had before.
            result.report["replaced"] = before["replaced"]
    return sorted(found, key=lambda r: (len(r.report["replaced"]), len(r.earlier), r.name))


def write_lines(path, results):
    """A JSON line for each of the Results; the logs of single steps stay with the checkpoints."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            for result in results:
                line = {key: value for key, value in result.report.items() if key != "log"}
                line["name"] = result.name
                line["path"] = result.path
                line["before"] = result.before
                line["tokens_before"] = result.tokens - result.report["tokens"]
                f.write(json.dumps(line) + "\n")
    nano.write_atomic(path, write)


def members_of(results):
    """-> {member: its Results, one for each seed}, in the order of the results."""
    named = {}
    for result in results:
        named.setdefault(result.member, []).append(result)
    members = {}
    for name, group in named.items():
        if differ_in_seed_alone(group):
            members[name] = group
            continue
        for result in group:
            path = result.path
            # Lines of a file may name one directory, and be of two runs in it.
            while path in members:
                path += " (another run)"
            members[path] = [result]
    return members


# What follows from the seed, and the order of layers: it may be asked for once, and then be read from that file.
OF_THE_SEED = ("seed", "rank", "content of --rank", "content of the first texts", "content of --student")


def differ_in_seed_alone(group):
    """Are these Results runs of one kind with different seeds? As far as they tell: older ones say less."""
    first, *others = [result.report.get("run") or {} for result in group]
    for other in others:
        for key in (first.keys() & other.keys()) - set(OF_THE_SEED):
            if first[key] != other[key]:
                return False
    seeds = [result.report["seed"] for result in group]
    return len(set(seeds)) == len(seeds)


# The table: a line per member, its seeds averaged.

def table_row(result):
    """-> {column: number or None}."""
    report = result.report
    row = {"replaced": len(report["replaced"]), "teacher": result.teacher_accuracy,
           "student": result.accuracy, "of teacher": None}
    if result.accuracy is not None and result.teacher_accuracy:
        row["of teacher"] = result.accuracy / result.teacher_accuracy
    for family, (_, share) in (report["accuracy_by_family"] or {}).items():
        row[family] = share
    row["KL first"] = report["kl_first"]
    row["KL last"] = report["kl_last"]
    row |= text_measures(report)
    row["M tokens"] = result.tokens / 1e6
    row["seconds"] = report["seconds"]
    return row


def text_measures(report):
    """What distill.py has measured on held-out texts -> columns; {} for a report from before it did. Codes are the
    student's share of those that the teacher finds; without any of these there is no such share."""
    if report.get("next_token_loss") is None:
        return {}
    teacher_loss, loss = report["next_token_loss"]
    row = {"teacher's loss": teacher_loss, "loss": loss, "top-1": report["top1"],
           "agreement": report["agreement"]}
    for length, (by_teacher, by_student) in report["retrieval"].items():
        row[f"codes {length}"] = by_student / by_teacher if by_teacher else None
    return row


def table_cell(column, values):
    """The values of all seeds -> their mean +- half the distance of the extremes. A seed without this value is left
    out, not counted as 0."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = 0 if column in ("replaced", "seconds") else 3
    mean = f"{sum(known) / len(known):.{digits}f}"
    if max(known) == min(known):
        return mean
    return f"{mean} +-{(max(known) - min(known)) / 2:.{digits}f}"


def table_lines(results):
    """Results -> a Markdown table, padded, so that it can be read in the terminal as well."""
    members = members_of(results)
    rows = {}
    # A column for every key that any row has: families of problems differ between teachers, --data has none.
    columns = {}
    for name, seeds in members.items():
        rows[name] = [table_row(result) for result in seeds]
        for row in rows[name]:
            columns |= dict.fromkeys(row)
    table = [["result", "seeds", *columns]]
    for name, seeds in members.items():
        line = [name, " ".join(str(result.report["seed"]) for result in seeds)]
        for column in columns:
            line.append(table_cell(column, [row.get(column) for row in rows[name]]))
        table.append(line)
    widths = [max(map(len, cells)) for cells in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    lines = []
    for cells in table:
        padded = [text.ljust(width) for text, width in zip(cells, widths)]
        lines.append("| " + " | ".join(padded) + " |")
    return lines


# The layer map: which layer became Mamba in which stage, and the scores that decided it.

def map_rows(result):
    """One row per stage of a member -> [(name, kinds, bars)]. kinds: per layer "t", "m2" or "n", and "new" where it was
    replaced in this stage. bars: {layer: 0 ... 1}, its LOO or MMR score between the stage's least and largest harm."""
    rows = []
    old = ["t"] * len(result.layout)
    for stage in (*result.earlier, result):
        kinds = list(stage.layout)
        for i, kind in enumerate(stage.layout):
            if kind != "t" and old[i] == "t":
                kinds[i] = "new"
        # LOO accuracies and MMR losses have no common unit, and losses fall from stage to stage: scale within a stage.
        # There are no scores for --rank first, last, FILE, ...
        cost = {score["layer"]: harm(score)[0] for score in stage.report.get("scores") or ()}
        least = min(cost.values(), default=0)
        most = max(cost.values(), default=0)
        bars = {i: (c - least) / ((most - least) or 1) for i, c in cost.items()}
        rows.append((stage.name, kinds, bars))
        old = stage.layout
    return rows


def layer_maps(results):
    """The members with most layers replaced, Mamba's and the control's, one for each seed ->
    {(removed, seed): rows of map_rows}."""
    last = {}
    for result in results:
        key = result.removed, result.report["seed"]
        progress = len(result.report["replaced"]), len(result.earlier)
        if key not in last or progress > last[key][0]:
            last[key] = progress, result
    return {key: map_rows(last[key][1]) for key in sorted(last)}


def map_title(removed, seed):
    return f"{'mixers removed (control)' if removed else 'Mamba'}, seed {seed}"


def map_lines(maps):
    """The layer maps as text: a letter per layer, below it its score as a digit, 9 for the most harmful layer."""
    letters = {"t": "t", "m2": "m", "n": "-", "i": "-", "new": "M"}
    lines = []
    for key, rows in maps.items():
        width = max(len(name) for name, _, _ in rows) + 2
        numbers_above = "".join(f"{i:<5}" for i in range(0, len(rows[0][1]), 5))
        lines += ["", map_title(*key), " " * width + numbers_above.rstrip()]
        for name, kinds, bars in rows:
            digits = [str(round(9 * bars[i])) if i in bars else " " for i in range(len(kinds))]
            lines.append(name.ljust(width) + "".join(letters[kind] for kind in kinds))
            lines.append((" " * width + "".join(digits)).rstrip())
    lines.append("t attention, m Mamba, - removed, M replaced or removed in this stage; "
                 "digits: harm by the score, 0 to 9")
    return lines


def draw_layers(plt, path, maps):
    """The layer maps: a row per stage, a column per layer; above each row the scores that decided it, as bars."""
    colors = {"t": "#4c78a8", "m2": "#f3c9a5", "n": "#dddddd", "i": "#dddddd", "new": "#e4572e"}
    both = sorted({removed for removed, _ in maps})
    seeds = sorted({seed for _, seed in maps})
    heights = []
    for removed in both:
        heights.append(max(len(maps[key]) for key in maps if key[0] == removed) + 0.6)
    n_layer = max(len(rows[0][1]) for rows in maps.values())
    width = len(seeds) * max(3.6, min(10, 0.2 * n_layer))
    size = (width, 0.9 + 0.62 * sum(heights))
    figure, grid = plt.subplots(len(heights), len(seeds), figsize=size, height_ratios=heights,
                                squeeze=False)
    for row, removed in enumerate(both):
        for column, seed in enumerate(seeds):
            axes = grid[row][column]
            if (removed, seed) not in maps:
                axes.axis("off")
                continue
            draw_map(axes, maps[removed, seed], colors)
            axes.set_title(map_title(removed, seed), fontsize=9)
    for kind, label in (("t", "attention"), ("m2", "Mamba"), ("n", "removed"),
                        ("new", "replaced or removed in this stage")):
        # Bars of no height, for the legend alone.
        grid[0][0].bar([0], [0], color=colors[kind], label=label)
    grid[0][0].bar([0], [0], color="#555555", label="harm (LOO, then MMR), scaled per stage")
    figure.legend(loc="upper center", ncol=3 if width < 9 else 5, fontsize=8, frameon=False)
    # The legend takes the uppermost quarter of an inch.
    save_figure(plt, figure, path, top=1 - 0.25 / figure.get_figheight())


def draw_map(axes, rows, colors):
    """One member into axes."""
    # Matplotlib counts from below: reversed, so that the first stage is on top.
    for y, (_, kinds, bars) in enumerate(reversed(rows)):
        axes.bar(range(len(kinds)), 0.4, 0.9, y, color=[colors[kind] for kind in kinds])
        heights = [0.03 + 0.42 * value for value in bars.values()]
        axes.bar(list(bars), heights, 0.5, y + 0.43, color="#555555")
    names = [name for name, _, _ in reversed(rows)]
    axes.set_yticks([y + 0.2 for y in range(len(rows))], names, fontsize=8)
    axes.set_xlim(-0.8, len(rows[0][1]) - 0.2)
    axes.set_ylim(-0.1, len(rows))
    axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


# The picture of a family: score against speed. The score's axis begins at 0 and every point has its noise as a bar, so
# that nobody reads a ranking where there is none.

def noise_interval(share, problems):
    """-> (low, high): where the true share lies with 95 % if `share` of so many problems was solved (Wilson)."""
    z = 1.96
    spread = z * math.sqrt(share * (1 - share) / problems + z * z / (4 * problems * problems))
    centre = share + z * z / (2 * problems)
    scale = 1 + z * z / problems
    # Rounding takes the bound of 0 below 0, that of 1 below 1.
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def speeds_from_lines(file, paths):
    """-> (decoding speed of each of these checkpoints, tokens/s, batch, context), from the lines of bench.py --model
    DIR --json: at the longest context, and there the largest batch, that all of them have. Raises UserError where a
    checkpoint or such a line is missing."""
    known = {}
    for row in read_json_lines(file):
        # Row H-0 of --model is a random model.
        if row.get("row") == "model":
            of_path = known.setdefault(os.path.realpath(row["shape"]), {})
            for entry in row.get("decode") or ():
                if entry.get("tokens_per_s"):
                    of_path[row["ctx"], entry["batch"]] = entry["tokens_per_s"]
    for path in paths:
        if not known.get(os.path.realpath(path)):
            raise UserError(f"{file} has no line for {path}: "
                            f"python bench.py --model {path} --json {file}")
    rates = [known[os.path.realpath(path)] for path in paths]
    shared = set.intersection(*map(set, rates))
    if not shared:
        raise UserError(f"{file} has no context and batch at which all of these were measured: "
                        f"{', '.join(map(str, paths))}")
    ctx, batch = max(shared)
    return [of_path[ctx, batch] for of_path in rates], batch, ctx


@torch.inference_mode()
def measured_speeds(configs, device, dtype):
    """-> (decoding speed of models of these shapes with random weights, tokens/s, batch, context). It depends on how
    many layers of each kind there are, and not on their order: equal counts are measured once."""
    how = argparse.Namespace(seconds=1.0, graph=False)
    # Caches that outweigh so small a model.
    batch = 16 if device.type == "cuda" else 4
    ctx = 32768 if device.type == "cuda" else 8192
    shapes = [replace(config, layout=tuple(sorted(config.layout))) for config in configs]
    rates = {shape: [] for shape in shapes}
    # Three rounds over all, and the median: another program's burst then hits one round, not one member.
    title = f"decoding {batch} texts after {ctx} tokens"
    for shape in tqdm([*rates] * 3, desc=title, unit="model"):
        lm = join_projections(random_model(shape, device, dtype))
        seconds, _ = time_decode(lm, filled_state(lm, batch, ctx), batch, how, device)
        rates[shape].append(batch / seconds)
    return [statistics.median(rates[shape]) for shape in shapes], batch, ctx


def places_of(members, args, device, dtype):
    """Where teacher and members stand on the x axis -> ([x of the teacher, of each member], the axis' label): by the
    speeds in --speeds, else by speeds measured now if the checkpoints are there, else by the layers given up."""
    firsts = [seeds[0] for seeds in members.values()]
    teachers = [result.args["teacher"] for result in firsts if result.args.get("teacher")]
    paths = [*teachers[:1], *(result.path for result in firsts)]
    files = [os.path.join(path, "config.json") for path in paths]
    if args.speeds:
        rates, batch, ctx = speeds_from_lines(args.speeds, paths)
    elif teachers and all(map(os.path.exists, files)):
        configs = [nano.config_from_json(nano.read_json(file, dict), file) for file in files]
        rates, batch, ctx = measured_speeds(configs, device, dtype)
    else:
        given_up = [len(result.report["replaced"]) for result in firsts]
        return [0, *given_up], f"attention layers given up, of {len(firsts[0].layout)}"
    label = f"speed, decoding {batch} texts after {ctx} tokens, teacher = 1 ({rates[0]:.0f} tokens/s)"
    return [rate / rates[0] for rate in rates], label


# By Result.removed: marker, colour, and what it is.
LOOKS = {False: ("o", "#c03a2b", "Mamba in their place"),
         True: ("x", "#777777", "mixers removed (control)")}


def draw_family(plt, path, members, places, x_label):
    """Score against places, a point per member: the mean of its seeds (these faint, where there are several), and the
    95 % noise of its problems as a bar."""
    figure, axes = plt.subplots(figsize=(8, 4.8))
    first = next(iter(members.values()))[0]
    teacher = first.teacher_accuracy
    low, high = noise_interval(teacher, first.problems)
    axes.axhspan(low, high, color="#cccccc", alpha=0.5, linewidth=0,
                 label=f"teacher; band and bars: 95 % noise of {first.problems} problems")
    axes.axhline(teacher, color="black", linewidth=0.8)
    axes.plot([places[0]], [teacher], "*", color="black", markersize=11)
    for removed in sorted({seeds[0].removed for seeds in members.values()}):
        marker, color, label = LOOKS[removed]
        # A point of no place, for the legend alone.
        axes.plot([], [], marker, color=color, label=label)
    # Points in one place would hide each other: they move to the right by the width of a letter.
    step = 0.02 * (max(places) - min(places) or 1)
    x = -math.inf
    top = high
    for place, seeds in sorted(zip(places[1:], members.values()), key=lambda pair: pair[0]):
        x = max(place, x + step)
        top = max(top, draw_member(axes, x, seeds))
    axes.set_ylim(0, 1.05 * top)
    axes.margins(x=0.06)
    axes.set_xlabel(x_label)
    axes.set_ylabel("exact match on held-out problems")
    axes.legend(loc="lower left", fontsize=8)
    save_figure(plt, figure, path)


def draw_member(axes, x, seeds):
    """One member at x: mean, noise, single seeds, name and cost. -> the upper end of what was drawn."""
    marker, color, _ = LOOKS[seeds[0].removed]
    scores = [result.accuracy for result in seeds]
    mean = sum(scores) / len(scores)
    low, high = noise_interval(mean, seeds[0].problems)
    axes.errorbar([x], [mean], [[mean - low], [high - mean]], color=color, linewidth=1, capsize=2)
    axes.plot([x], [mean], marker, color=color, markersize=6)
    if len(seeds) > 1:
        axes.plot([x] * len(seeds), scores, marker, color=color, markersize=4, alpha=0.35)
    label = f"{seeds[0].member}, {seeds[0].tokens / 1e6:.2f} M tokens"
    axes.annotate(label, (x, min(low, *scores)), (0, -4), textcoords="offset points", fontsize=7,
                  rotation=90, ha="center", va="top", color=color)
    return max(high, *scores)


# The picture of curves: how good is a student after how much work, from before the first step on (--curve). What has
# equally many layers replaced has one colour; where mixers were removed, the line is dashed.

def problems_of(result, point):
    """How many problems stand behind the accuracy of this point. An older report has how many of each kind."""
    of_each = result.args.get("curve_eval") or 0
    return point.get("problems", of_each * len(result.report["accuracy_by_family"] or ()))


def draw_curves(plt, path, results):
    """A line per Result, which must have a curve: its KL to the teacher, and beside it, if any has it, exact match.
    Time is the processor's on a CPU, which other programs do not prolong: that of training and of making the start."""
    points = [point for result in results for point in result.curve]
    # They are others than those that are solved at the end.
    asked = {problems_of(result, point) for result in results for point in result.curve
             if point["accuracy"] is not None}
    measures = {"kl": "KL to the teacher, held-out texts, nats a token",
                "accuracy": f"exact match of {' or '.join(map(str, sorted(asked)))} problems"}
    if all(point["accuracy"] is None for point in points):
        del measures["accuracy"]
    figure, grid = plt.subplots(1, len(measures), figsize=(7 * len(measures), 4.6), squeeze=False)
    counts = sorted({len(result.report["replaced"]) for result in results})
    on_cpu = all(result.report.get("device", "cpu").startswith("cpu") for result in results)
    for axes, (key, label) in zip(grid[0], measures.items()):
        for result in results:
            known = [point for point in result.curve if point[key] is not None]
            x = [point["cpu_seconds" if on_cpu else "seconds"] for point in known]
            color = f"C{counts.index(len(result.report['replaced']))}"
            marker, _, _ = LOOKS[result.removed]
            style = marker + ("--" if result.removed else "-")
            axes.plot(x, [point[key] for point in known], style, color=color, markersize=4, label=result.name)
        axes.set_xlabel(f"{'CPU seconds' if on_cpu else 'seconds'} (dashed: mixers removed)")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        if key == "accuracy":
            axes.set_ylim(-0.02, 1.02)
    # On this scale equal distances are equal ratios: half the KL, in how many seconds?
    grid[0][0].set_yscale("log")
    kls = [point["kl"] for point in points]
    if max(kls) > 20 * min(kls):
        # There is no room for every number between the powers of ten.
        grid[0][0].yaxis.set_minor_locator(plt.LogLocator(subs=(2, 5)))
    grid[0][0].yaxis.set_major_formatter("{x:g}")
    grid[0][0].yaxis.set_minor_formatter("{x:g}")
    grid[0][0].legend(fontsize=8)
    save_figure(plt, figure, path)


def import_pyplot():
    """matplotlib's pyplot, set to draw into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(plt, figure, path, top=1.0):
    """Into a PNG file, all or nothing. top: the share of its height that the axes may take."""
    figure.tight_layout(rect=(0, 0, 1, top))
    nano.write_atomic(path, lambda to: figure.savefig(to, format="png", dpi=150))
    plt.close(figure)
    print(f"wrote {path}", flush=True)


def show_results(args, device, dtype):
    """--table and --figures."""
    inputs = [*(args.table or ()), *(args.figures or ())]
    if args.json and os.path.exists(args.json) and not any(nano.same_place(args.json, path) for path in inputs):
        raise UserError(f"{args.json} is there already: name it among the inputs, too, and its lines are kept")
    results = find_results(inputs)
    print("\n".join(table_lines(results)))
    if args.json:
        try:
            write_lines(args.json, results)
        except OSError as e:
            raise UserError(f"cannot write {args.json}: {e.strerror}") from None
    if not args.figures:
        return
    maps = layer_maps(results)
    # As text in any case: it needs nothing.
    print("\n".join(map_lines(maps)), flush=True)
    plt = import_pyplot()
    if plt is None:
        print("no pictures: they need matplotlib (pip install matplotlib)")
        return
    # Pictures are cheap, old ones are replaced.
    claim_out(args.out, [], overwrite=True, resume=False)
    draw_layers(plt, os.path.join(args.out, "layers.png"), maps)
    watched = [result for result in results if result.curve]
    if watched:
        draw_curves(plt, os.path.join(args.out, "curves.png"), watched)
    # A member without accuracy (trained on --data, or never evaluated) has no place in the picture.
    solved = [r for r in results if r.accuracy is not None and r.teacher_accuracy is not None]
    if not solved:
        print("no family.png: no member and its teacher have solved problems")
        return
    runs = [result.report.get("run") or {} for result in solved]
    teachers = {run["content of --teacher"] for run in runs if "content of --teacher" in run}
    if len(teachers) > 1:
        print("no family.png: these results have different teachers")
        return
    members = members_of(solved)
    places, x_label = places_of(members, args, device, dtype)
    draw_family(plt, os.path.join(args.out, "family.png"), members, places, x_label)


def plot(rows, path):
    """Two panels: tokens/s at the largest batch against context, and against the number of Mamba layers; both with
    the limit."""
    plt = import_pyplot()
    rows = [row for row in rows if best_rate(row)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axes, key, group, label in ((left, "ctx", "row", "context, tokens"),
                                    (right, "mamba_layers", "ctx", "Mamba layers")):
        for value in dict.fromkeys(row[group] for row in rows):
            line = sorted((row for row in rows if row[group] == value), key=lambda row: row[key])
            x = [row[key] for row in line]
            drawn, = axes.plot(x, [best_rate(row) for row in line], marker="o",
                               label=value if group == "row" else f"{value} tokens")
            limits = [row["decode"][-1]["limit_tokens_per_s"] for row in line]
            axes.plot(x, limits, ":", color=drawn.get_color(), linewidth=1)
        axes.set_xlabel(label)
        axes.legend(fontsize=8)
    contexts = sorted({row["ctx"] for row in rows})
    left.set_xscale("log", base=2)
    left.set_xticks(contexts, [amount(ctx / 1.024, "").replace(" ", "") for ctx in contexts], fontsize=8)
    # On this scale equal distances are equal ratios, whatever the context.
    left.set_yscale("log")
    left.set_ylabel("tokens/s, largest batch (dotted: limit)")
    save_figure(plt, figure, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def pick_config(args, dtype, device, memory):
    """-> the Config and its name: a checkpoint's, the one named, or the largest whose rows all fit with one text."""
    if args.model:
        where = os.path.join(args.model, "config.json")
        return nano.config_from_json(nano.read_json(where), where), args.model
    if args.shape or device.type != "cuda":
        name = args.shape or "tiny"
        return SHAPES[name], name
    for name in SHAPES:
        needs = []
        for k in args.replace:
            size = sizes(hybrid(SHAPES[name], k), dtype, max(args.ctx))
            needs.append(size["weight_bytes"] + size["kv_bytes"] + size["state_bytes"])
        if max(needs) <= memory:
            return SHAPES[name], name
    return SHAPES["tiny"], "tiny"


def about_run(args, device, dtype, shape, machine):
    """What every JSON line says about the machine and the run."""
    now = datetime.datetime.now().isoformat(timespec="seconds")
    return {"date": now, "command": " ".join(sys.argv), **provenance(device),
            "dtype": str(dtype).removeprefix("torch."), "shape": shape,
            "scan": scan_backend(device), "copy_bytes_per_s": machine.copied,
            "product_flops": machine.products, "exponentials_per_s": machine.exponentials,
            "graph": args.graph, "clock": clock.__name__}


def measured_rows(args, config, device, dtype, machine):
    """All rows that --what asks for, as they are measured."""
    if "prefill" in args.what or "decode" in args.what:
        yield from bench_models(args, config, device, dtype, machine)
    if "scan" in args.what:
        yield from bench_scan(args, config, device, dtype, machine)
    if "chunks" in args.what:
        yield from bench_chunks(args, config, device, dtype, machine)
    if "transformers" in args.what:
        yield from bench_transformers(args, device, dtype)


def append_line(path, row):
    """Raises UserError for a file that cannot be written. row None: only see whether it can."""
    try:
        with open(path, "a", encoding="utf-8") as f:
            if row is not None:
                f.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def next_command(args):
    """What one would want to run after this."""
    if args.table:
        return f"python bench.py --figures {' '.join(args.table)}"
    if args.model:
        return f"python sample.py --model {args.model} --chat"
    return "python distill.py --replace 25, and then this with --model out/h25"


def main():
    args = parse_args()
    bench(args)
    print(f"next: {next_command(args)}", file=sys.stderr)


def bench(args):
    """Measure, or show results, as the flags say."""
    device, dtype = start_script(args)
    torch.manual_seed(args.seed)
    if args.table or args.figures:
        show_results(args, device, dtype)
        return
    if args.graph and device.type != "cuda":
        raise UserError("--graph needs a GPU with CUDA")
    if args.cpu_time:
        if device.type != "cpu" or torch.get_num_threads() > 1:
            raise UserError("--cpu-time counts one thread on a CPU: --device cpu, and OMP_NUM_THREADS=1 before it")
        global clock
        clock = time.thread_time
    if args.json:
        # Fail now, not after the first row.
        append_line(args.json, None)
    machine = measure_machine(device, dtype, min(0.5, args.seconds / 4))
    config, shape = pick_config(args, dtype, device, memory_for(args, device))
    about = about_run(args, device, dtype, shape, machine)
    print(f"shape {shape}: {config.n_layer} layers, d_model {config.d_model} | {about['device']}, "
          f"{about['threads']} threads | {about['dtype']} | torch {about['torch']}, "
          f"triton {about['triton']} | commit {about['commit']}")
    print(nano.scan_backend_reason(device))
    print(f"measured ({clock.__name__}): copy {amount(machine.copied)}/s (read and write), matrix product "
          f"{amount(machine.products, 'flop')}/s, exp {amount(machine.exponentials, '')}/s")
    rows = []
    try:
        for row in measured_rows(args, config, device, dtype, machine):
            rows.append(about | row)
            if args.json:
                append_line(args.json, rows[-1])
    finally:
        # Ctrl-C, too, keeps what was measured.
        if args.plot and rows:
            plot(rows, args.plot)


if __name__ == "__main__":
    run_main(main)
