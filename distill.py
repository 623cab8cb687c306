"""
Turn attention layers of a transformer into Mamba layers, and distil the result until it thinks like the original.

    python distill.py --replace 25                        # the shipped 50-layer teacher becomes an H-25 hybrid
    python distill.py --replace 25 --init identity        # the control: the same 25 layers simply removed
    python distill.py --stages 25,27,30,34,37,40          # the whole family, each member from the one before
    python distill.py --teacher DIR --replace 12 --data traces.jsonl --out out/mine         # your model, your traces

The steps of a stage: rank the attention layers, by leaving each one out (LOO, first stage) or by trying a Mamba layer
in its place (MMR, later stages); replace the least important ones by Mamba layers that start from their weights (MIL);
train the student to give the teacher's next-token distribution on reasoning traces (reverse KL); let both solve
held-out problems; save --out in the Hugging Face layout.
"""
import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import model as nano
from model import (UserError, autocast, choose_threads, claim_out, harm, provenance, run_main, start_script,
                   uninterrupted)
from train_sft import (accuracy, batches, clipped_step, collate, encode_problem, generic_block, learning_rate,
                       list_block, load_progress, make_optimizers, problem_set, read_jsonl, save_progress,
                       show_example, solve, trace_block)


# ----------------------------------------------------------------------------------------------------------------------
# Conversion (MIL, "Mamba in Llama"): a Mamba layer that starts from the attention layer it replaces.
#
# Linear attention without its softmax is a Mamba layer whose decay is 1 and whose step is 1: values are written under
# keys and read with queries. So v, k, q and o have an obvious place in the new layer:
#
#       Mamba                        attention      |   Mamba                            fresh
#       in_proj rows z               fresh          |   dt_in_proj, dt_proj, dt bias     Mamba's own initialisation
#       in_proj rows x               v_proj         |   conv1d                           U(+-1/sqrt(d_conv))
#       in_proj rows B               k_proj         |   A_log                            log(1 ... d_state)
#       in_proj rows C               q_proj         |   D                                1
#       out_proj columns             o_proj         |   norms, MLP                       kept
#
# Mamba knows chunks of d_state channels, not heads. Channel chunk j is read with chunk j of C but written with chunk
# j // r of x and B (r query heads share a kv head). If Q's rows keep their order (head a of kv head g, chunk k: the
# published code), chunk k of head a meets the wrong chunk of its kv head 7 times in 8 at the 15B shape. "aligned" lays
# Q's rows and O's columns out in the order (g, k, a), and every chunk of q meets the same chunk of k and v. Both are
# the same file format, and differ in nothing but the order of those rows and columns.
#
# The idea is that of "The Mamba in the Llama" (arXiv 2408.15237); what is lost is the softmax, which makes attention
# exact: a scan returns a blend of all that was written, with old entries faded. Distillation has to close that gap.
# Positions go as well: a scan knows order by its decay, so q and k are taken over without their rotation.

INITS = {"calibrated": "aligned, then gate and output fitted on one batch", "aligned": "from attention, chunks matched",
         "plain": "from attention, in the published order", "random": "nothing copied",
         "identity": "no mixer at all (control)"}

@torch.no_grad()
def init_dt(mixer):
    """Step sizes log-uniform in [dt_min, dt_max], as in Mamba; half the bias is stored, since it counts twice."""
    c = mixer.config
    bound = c.dt_scale * c.dt_rank ** -0.5
    torch.nn.init.uniform_(mixer.dt_proj.weight, -bound, bound)
    if mixer.dt_proj.bias is not None:
        dt = torch.empty(c.d_inner).uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp()
        dt = dt.clamp(min=c.dt_init_floor)
        bias = dt + torch.log(-torch.expm1(-dt))                             # the inverse of softplus
        mixer.dt_proj.bias.copy_(bias / 2)


@torch.no_grad()
def mil_mixer(attention, config, init="aligned"):
    """attention: the Attention to replace -> a new Mamba, on the CPU in float32. init: a key of INITS but
    identity; calibrated gives what aligned does, see calibrate."""
    c, n, mixer = config, config.d_state, nano.Mamba(config)
    init_dt(mixer)
    if init == "random":
        return mixer
    if c.d_inner != c.n_head * c.head_dim or c.d_xb != c.n_kv_head * c.head_dim or c.head_dim % n or c.proj_bias:
        raise UserError(f"attention with {c.n_head} / {c.n_kv_head} heads of {c.head_dim} cannot become a Mamba layer "
                        f"of d_inner {c.d_inner}, d_xb {c.d_xb}, d_state {n}, projection bias {c.proj_bias}")
    order = torch.arange(c.d_inner)
    if init in ("aligned", "calibrated"):                                    # (g, a, k, lane) -> (g, k, a, lane)
        order = order.view(c.n_kv_head, c.n_head // c.n_kv_head, c.head_dim // n, n).transpose(1, 2).reshape(-1)
    z, x, B, C = mixer.in_proj.weight.split([c.d_inner, c.d_xb, c.d_xb, c.d_inner])  # views: copy_ fills in_proj
    for target, source in ((x, attention.v_proj.weight), (B, attention.k_proj.weight),
                           (C, attention.q_proj.weight[order]),
                           (mixer.out_proj.weight, attention.o_proj.weight[:, order])):
        assert target.shape == source.shape, (target.shape, source.shape)
        target.copy_(source)
    return mixer


# A fresh mixer has a weakness: with dt near 0.01 and a random gate it writes next to nothing, and the student starts
# where a model without the layer would. "calibrated" repairs that on one batch of texts, in closed form: the gate is
# opened (z is fitted to a constant c with silu(c) = 1, plus a little of its random start), and out_proj is fitted to
# what the attention would have written for the same input. Layer by layer, so each sees the work of those before it.
# The method is ours and not the paper's. Nothing but two linear systems per layer is solved: it takes no training step,
# and the file format does not notice. dt stays as it is: size and direction are corrected in the last linear map.
# With 7 of 10 layers replaced, 400 steps of distillation end at a KL of 0.16 from here and of 0.25 from "aligned" (see
# the README, "The claims").

def ridge_fit(a, b, strength=0.01):
    """Least squares with a small penalty: a (m, k), b (m, r) -> w (r, k) float64, on the CPU, with a w^T close to b.
    strength is relative to the mean square of a's columns: channels that hardly move get no huge weights."""
    a, b = a.double().cpu(), b.double().cpu()
    gram = a.T @ a                                                           # (k, k)
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, a.T @ b).T


@torch.no_grad()
def calibrate(student, teacher, layers, tokens, real):
    """Fit gate and out_proj of the new mixers in these layers of student, in place. tokens (b, t); real (b, t) False at
    padding. Not in the paper; measured in the README."""
    place, _ = nano.make_place(student.config, tokens, 0, None, None, student.embed_tokens.weight.dtype)
    x = student.embed_tokens(tokens)                                         # (b, t, d_model)
    for i, block in enumerate(student.layers):
        if i in layers:
            mixer, h = block.mixer, block.input_layernorm(x)
            open_gate = ridge_fit(h[real], h.new_full((int(real.sum()), 1), 1.28))           # (1, d_model)
            z = mixer.in_proj.weight[:mixer.config.d_inner]                  # (d_inner, d_model), a view
            z.mul_(0.1).add_(open_gate.to(z))
            keep, mixer.out_proj = mixer.out_proj, torch.nn.Identity()             # to see what goes into it
            inner, _ = mixer(h, None, place)                                 # (b, t, d_inner)
            mixer.out_proj = keep
            wanted, _ = teacher.layers[i].mixer(h, None, place)          # (b, t, d_model)
            keep.weight.copy_(ridge_fit(inner[real], wanted[real]))
        x, _ = block(x, None, place)


def convert(student, teacher, layers, init="aligned", batch=None):
    """Replace the mixers of these layers of student, in place, by Mamba layers made from the teacher's attention.
    layers: 0-based; all must still be attention in the student. init: a key of INITS. batch: (tokens, real), which
    "calibrated" needs, see calibrate. Returns the student."""
    layout = list(student.config.layout)
    if init not in INITS:
        raise UserError(f"unknown init {init!r}; known: {', '.join(INITS)}")
    if init == "calibrated" and batch is None:
        raise UserError("init calibrated needs a batch of tokens")
    for field in ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim"):
        if getattr(student.config, field) != getattr(teacher.config, field):
            raise UserError(f"student and teacher differ in {field}: {getattr(student.config, field)} and "
                            f"{getattr(teacher.config, field)}")
    for i in layers:
        if not 0 <= i < len(layout) or layout[i] != "t" or teacher.config.layout[i] != "t":
            raise UserError(f"layer {i} is not an attention layer (layout: {' '.join(layout)})")
        layout[i] = "n" if init == "identity" else "m2"
    config = replace(student.config, layout=tuple(layout))
    for i in layers:
        block = student.layers[i]
        if init == "identity":
            del block.input_layernorm
            block.mixer = None
        else:
            mixer = mil_mixer(teacher.layers[i].mixer, config, init)     # raises, if at all, at the first layer
            block.mixer = nano.cast(mixer, block.mlp.down_proj.weight.device, block.mlp.down_proj.weight.dtype)
        block.kind = layout[i]
    student.config = config
    if init == "calibrated" and layers:
        calibrate(student, teacher, layers, *batch)
    return student


# ----------------------------------------------------------------------------------------------------------------------
# The loss: KL divergence between the two next-token distributions, at the positions whose next token is trained.
#
# Reverse KL, KL(student || teacher) = sum_v q_v (log q_v - log p_v), punishes the student for putting mass where the
# teacher has none, and lets it ignore what it cannot represent. Forward KL swaps the roles. Temperature 1, float32.
# MiniLLM (arXiv 2306.08543) argues for it in language models: a small student that must cover all of a large teacher's
# distribution gives mass to text that the teacher would never write. Apriel-H1 found it better throughout, and uses
# nothing else: no cross-entropy, no matching of hidden states. MiniLLM lets the student write the texts; here they are
# given (the traces that the teacher was trained on), so a step is one forward of each and one backward.
#
# The teacher's whole distribution is a far richer signal than the one token that followed: some 100 steps do here what
# took the teacher thousands. Prompt and padding do not count, and the mean is over tokens, not over texts.
#
# With a large vocabulary the (tokens, vocabulary) logits are the largest tensors of the whole run (131072 x 16384 in
# float32 is 8.6 GB): they are then made piece by piece from the hidden states, and made again in the backward pass.

CHUNK_ABOVE = 16384                                      # vocabulary size from which on the loss works in pieces
CHUNK_TOKENS = 1024                                      # tokens per piece


def kl_divergence(student_logits, teacher_logits, kind="reverse_kl"):
    """Two (..., vocab_size) of logits -> (...) nats. Zero for equal logits, finite for any finite ones.
    Both sides go through log_softmax: the log of a softmax that has underflowed would be -inf."""
    q, p = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    if kind == "forward_kl":
        q, p = p, q
    return (q.exp() * (q - p)).sum(-1)


def distillation_loss(x, teacher_x, head, teacher_head, kind="reverse_kl", chunk=None):
    """x, teacher_x (m, d_model): hidden states of the trained positions; head, teacher_head: the output layers.
    -> the summed divergence in nats. chunk: tokens per piece, None: decided by the vocabulary size.
    A sum, so pieces add up exactly to the whole, and the caller divides by the tokens of the batch."""
    piece = lambda a, b: kl_divergence(head(a), teacher_head(b), kind).sum()
    chunk = chunk or (CHUNK_TOKENS if head.weight.shape[0] > CHUNK_ABOVE else None)
    if chunk is None:
        return piece(x, teacher_x)
    total = x.new_zeros((), dtype=torch.float32)
    for i in range(0, len(x), chunk):
        # The pieces' logits are not kept for the backward pass but made again there: one piece exists at a time.
        total = total + checkpoint(piece, x[i:i + chunk], teacher_x[i:i + chunk], use_reentrant=False)
    return total


def batch_loss(student, teacher, tokens, targets, kind):
    """-> summed divergence over the trained positions of a batch, and their number.
    tokens, targets (b, t), see train_sft.collate. The prompt's logits are never made, of neither model."""
    trained = targets >= 0                                                   # shifted once, in collate
    with torch.no_grad():
        teacher_x = teacher.hidden(tokens)[0][trained]                       # (m, d_model): the trained positions
    x = student.hidden(tokens)[0][trained]
    return distillation_loss(x, teacher_x, student.lm_head, teacher.lm_head, kind), int(trained.sum())


@torch.no_grad()
def mean_loss(student, teacher, fixed, kind, device, dtype):
    """Mean divergence in nats per response token over a fixed list of batches (lists of examples)."""
    total, count = 0.0, 0
    for examples in fixed:
        with autocast(device, dtype):
            loss, n = batch_loss(student, teacher, *collate(examples, device), kind)
        total, count = total + loss.item(), count + n
    return total / max(1, count)


# ----------------------------------------------------------------------------------------------------------------------
# Which layers to replace first: leave one out (LOO).
#
# Take one attention layer's mixer away, look how much worse the model gets, put it back. On the built-in problems the
# measure is exact match, teacher-forced: a trace whose every token is the most likely one is what greedy decoding would
# have written. Equal scores are told apart by the loss. On --data the measure is the KL to the intact model.
# All layers before the missing one compute what they always do, so the walk below does them once: layer i costs the
# n_layer - i layers above it, 50 layers cost half of 50 full passes.
#
# The paper measures MMLU, which a model of 2 M parameters cannot answer. Why not the attention weights or a gradient?
# Because the residual stream lets later layers repair an early loss: only running the rest of the model shows it.

@torch.no_grad()
def leave_one_out(model, probe, device, dtype, use_accuracy):
    """probe: lists of examples -> per layer {"layer", "accuracy" or None, "kl", "loss"} without that layer's mixer."""
    layers, totals = len(model.layers), torch.zeros(len(model.layers), 3, dtype=torch.float64)
    tokens_seen, rows_seen = 0, 0
    bar = tqdm(total=len(probe) * layers, desc="leave one out", unit="layer")
    for examples in probe:
        tokens, targets = collate(examples, device)
        trained = targets >= 0
        with autocast(device, dtype):
            base = model.lm_head(model.hidden(tokens)[0][trained])           # (m, vocab_size), intact
            x = model.embed_tokens(tokens)                                   # (b, t, d_model)
            place, _ = nano.make_place(model.config, tokens, 0, None, None, x.dtype)
            for i, block in enumerate(model.layers):
                y = x + block.mlp(block.post_attention_layernorm(x)) if block.kind == "t" else None
                # Nothing to leave out where the mixer is Mamba already, or missing: the walk just goes on.
                if y is not None:
                    for later in model.layers[i + 1:]:                       # ... and all that follows
                        y, _ = later(y, None, place)
                    totals[i] += score(model.lm_head(model.norm(y)[trained]), base, targets)
                x, _ = block(x, None, place)                                 # the intact walk goes on
                bar.update()
        tokens_seen, rows_seen = tokens_seen + int(trained.sum()), rows_seen + len(examples)
    bar.close()
    return [{"layer": i, "accuracy": right / rows_seen if use_accuracy else None, "kl": kl / tokens_seen,
             "loss": loss / tokens_seen}
            for i, (right, kl, loss) in enumerate(totals.tolist()) if model.layers[i].kind == "t"]


def score(logits, base, targets):
    """logits, base (m, vocab_size) -> tensor [rows right throughout, summed KL to base, summed cross-entropy].
    targets (b, t): m of them are not -1. Sums, so that batches of different size can be added up."""
    trained, wanted = targets >= 0, targets[targets >= 0]                    # (b, t) bool, (m)
    wrong = torch.zeros_like(trained)
    wrong[trained] = logits.argmax(-1) != wanted
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
    return torch.tensor([float((~wrong.any(1)).sum()), kl_divergence(logits, base).sum().item(), loss.item()])


def least_important_first(scores):
    """Scores -> layer numbers. sorted is stable: of two equal ones the lower layer comes first."""
    return [s["layer"] for s in sorted(scores, key=harm)]


def weights_hash(model):
    """A fingerprint of all weights, so that stored scores are used for no other model."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        # As bytes, because numpy has no bfloat16. The names count, too: two equal layers may have changed places.
        digest.update(name.encode() + p.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def file_hash(path):
    """The same for a data file: edited data makes new scores."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


def stored_scores(path, key, make):
    """Scores are expensive: keep them in the file `path` together with what they were made from, reuse them if that is
    still the same, and otherwise make() them anew. -> the dict in the file.
    key: a dict of JSON values. The file is also a valid --rank FILE, for a control that replaces the same layers."""
    stored = nano.read_json(path, dict) if os.path.exists(path) else {}
    if {k: stored.get(k) for k in key} != key:
        scores = make()
        stored = key | {"order": least_important_first(scores), "scores": scores}
        nano.write_json(path, stored)
    return stored


def rank_layers(args, run, student):
    """-> attention layers of the student, first to be replaced first, and their scores (None without any).
    Layers that are replaced already stay in a stored order and are left out here. Raises UserError for a bad file."""
    attention = [i for i, kind in enumerate(student.config.layout) if kind == "t"]
    if args.rank in ("first", "last"):                                       # baselines: no scores at all
        return attention if args.rank == "first" else attention[::-1], None
    if args.rank == "random":
        return random.Random(args.seed).sample(attention, len(attention)), None
    if args.rank == "apriel15b":                                             # the order that the paper published
        if len(student.layers) != 50:
            raise UserError(f"--rank apriel15b is an order of 50 layers; {args.teacher} has {len(student.layers)}")
        return [i for i in nano.APRIEL15B if i in attention], None
    if args.rank not in ("loo", "mmr"):                                      # a file: list, stored_scores' dict, report
        stored = nano.read_json(args.rank)
        order = stored.get("order", stored.get("replaced")) if isinstance(stored, dict) else stored
        if not isinstance(order, list) or set(order) - set(range(len(student.layers))) or len(set(order)) < len(order):
            raise UserError(f"{args.rank}: not a list of different layers from 0 to {len(student.layers) - 1}")
        return [i for i in order if i in attention], None
    key = {"teacher": weights_hash(run.teacher), "data": args.data and file_hash(args.data), "ctx": args.ctx,
           "probe": args.probe, "dtype": args.dtype}
    # Scores are stored in --out under a key: a second run with other --steps or --lr need not rank again.
    if args.rank == "loo":                                                   # always of the teacher itself
        make = lambda: leave_one_out(run.teacher, run.probe, run.device, run.dtype, use_accuracy=not args.data)
        stored = stored_scores(os.path.join(args.out, "loo.json"), key, make)
    else:
        # MMR's scores belong to this student, and to everything that its trials depend on.
        flags = ("data", "traces", "ctx", "init", "train", "probe_steps", "batch", "lr", "loss", "seed", "dtype")
        key = {"teacher": key["teacher"], "student": weights_hash(student), "content": key["data"]} | {
            f: getattr(args, f) for f in flags}
        make = lambda: try_each_layer(args, run, student, attention, key)
        stored = stored_scores(os.path.join(args.out, "mmr.json"), key, make)
    return [i for i in stored["order"] if i in attention], stored["scores"]


# ----------------------------------------------------------------------------------------------------------------------
# Which layers next: MIL-Mamba-Replacement (MMR).
#
# Layers that look unimportant alone may matter together, and once half of the attention is gone LOO misleads. MMR asks
# the question that counts: put a Mamba layer in this place, distil for a few steps, how good is the student then? All
# candidates see the same batches, so the teacher's side is computed once; only one trial student exists at a time; and
# every finished trial is written down, so that a killed run continues with the next one.
#
# In the paper H-30 gave up layers 6, 7 and 8, which LOO had ranked 37th to 46th of 49. There, a trial has 100 steps;
# here --probe-steps is 6, since only the order of the losses is used, and with the same batches even small
# differences come from the layer. Against 100 steps, layers that work keep their order (rank correlation 0.92 and 1.0
# in two stages), idle ones change places by chance. 25 candidates cost some 150 steps, more than the stage's own 100.

def try_each_layer(args, run, student, attention, key):
    """-> per attention layer {"layer", "loss"}: the distillation loss (nats per token) after args.probe_steps steps,
    on held-out texts of all lengths and families: training batches hold texts of one length, and measured on a short
    one, layers looked harmless that long stories need (H-27 lost 0.04 by it). The student itself stays as it is."""
    path, stream = os.path.join(args.out, "mmr-trials.json"), batches(run.block, args.batch)
    texts = [*itertools.islice(stream, args.probe_steps), run.fixed]         # the last batch only measures
    stored = nano.read_json(path, dict) if os.path.exists(path) else {}
    trials = stored["trials"] if stored.get("key") == key else []            # not of this run: forget them
    data = []
    for examples in texts:
        tokens, targets = collate(examples, run.device)
        with torch.no_grad(), autocast(run.device, run.dtype):
            # Hidden states, not logits: (m, d_model) is small enough to keep for all batches.
            data.append((tokens, targets, run.teacher.hidden(tokens)[0][targets >= 0]))
    todo = [layer for layer in attention if layer not in {trial["layer"] for trial in trials}]
    for layer in tqdm(todo, desc="MMR", unit="layer"):
        torch.manual_seed(args.seed)                                         # the same fresh parts for every candidate
        trial = convert(clone(student, args.train), run.teacher, [layer], args.init, run.calibration)
        optimizers = make_optimizers(set_trained(trial, args.train), args.lr)                # states of its own
        for step, (tokens, targets, teacher_x) in enumerate(data):
            last = step == args.probe_steps
            with autocast(run.device, run.dtype), torch.set_grad_enabled(not last):
                x = trial.hidden(tokens)[0][targets >= 0]
                loss = distillation_loss(x, teacher_x, trial.lm_head, run.teacher.lm_head, args.loss) / len(x)
            if not last:
                loss.backward()
                # Full rate from the third step on: a trial is too short for a real warm-up and for a decay.
                clipped_step(trial, optimizers, args.lr * min(1.0, (step + 1) / 3))
        trials.append({"layer": layer, "loss": loss.item()})
        nano.write_json(path, {"key": key, "trials": trials})
    return trials


# ----------------------------------------------------------------------------------------------------------------------
# Distillation.
#
# --loss, the optimiser of train_sft.py, and nothing else. What the paper tried without gain: freezing layers, warming
# the new mixers up alone, matching their outputs layer by layer. "Mamba in the Llama" (arXiv 2408.15237) freezes the
# MLPs at first; here everything trains from the first step, because the kept layers must learn to read a new neighbour.
#
# What the start is worth, where seven of ten layers that count are replaced (README, "The claims": 400 steps at 1e-3,
# means of three seeds; KL at the end in nats a token):
#       calibrated    aligned    plain    random    mixer removed
#       0.162         0.252      0.255    0.306     0.482
# While much attention is left the others fill in, and a start matters little. It matters more, the more layers go and
# the fewer steps there are.

def distill(args, run, student, meta):
    """Train the student for args.steps steps. -> log entries, one per step. meta: a dict kept with the progress, saved
    in args.out/progress.safetensors every 25 steps and on Ctrl-C, and read back with --resume.
    An entry: step, kl in nats per trained token (of that batch: it is noisy), tokens seen with padding, seconds."""
    optimizers, start, log, began = make_optimizers(student, args.lr), 0, [], time.time()
    progress = os.path.join(args.out, "progress.safetensors")
    if args.resume and os.path.exists(progress):
        stored = load_progress(progress, student, optimizers, meta["run"])
        meta.update(stored)
        start, log = meta["step"], meta["log"]
        began -= log[-1]["seconds"] if log else 0                            # the time of the earlier part counts, too
    bar = tqdm(total=args.steps, initial=start, desc="distilling", unit="step")
    stream, tokens_seen = batches(run.block, args.batch, start), log[-1]["tokens"] if log else 0
    # The log has one entry per finished step, so its length says where to go on.
    save = lambda: save_progress(progress, student, optimizers, meta | {"step": len(log), "log": log})
    try:
        for step in range(start, args.steps):
            tokens, targets = collate(next(stream), run.device)
            with autocast(run.device, run.dtype):
                loss, count = batch_loss(student, run.teacher, tokens, targets, args.loss)
            (loss / max(1, count)).backward()                                # the mean over this batch's tokens
            with uninterrupted():
                clipped_step(student, optimizers, learning_rate(step, args.steps, args.lr, args.warmup))
                tokens_seen += tokens.numel()
                log.append({"step": step + 1, "kl": round(loss.item() / max(1, count), 6), "tokens": tokens_seen,
                            "seconds": round(time.time() - began, 1)})
            bar.update()
            bar.set_postfix(kl=f"{log[-1]['kl']:.4f}", tok_s=f"{tokens_seen / max(0.1, log[-1]['seconds']):.0f}")
            if (step + 1) % 25 == 0:
                save()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                         # a second Ctrl-C must not spoil the save
        save()
        print(f"\nsaved step {len(log)}; run the same command with --resume to continue", file=sys.stderr)
        raise
    finally:
        bar.close()
    return log


def clone(model, train):
    """-> an independent copy; with train "mixers" the weights, which stay frozen, are shared instead of copied.
    deepcopy asks its memo before it copies an object: a parameter that is entered there stands for itself."""
    share = {id(p): p for p in model.parameters()} if train == "mixers" else {}
    return copy.deepcopy(model, memo=share)


def set_trained(student, train):
    """Say which weights get gradients: all, or those of the Mamba mixers. Trained weights are float32 (autocast makes
    the products cheap); a model of more than a billion weights recomputes each layer in the backward pass."""
    for name, p in student.named_parameters():
        p.requires_grad_(train == "all" or name.startswith("layers.") and ".mixer." in name and
                         student.layers[int(name.split(".")[1])].kind == "m2")
        if p.requires_grad:
            p.data = p.data.float()
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError("--train mixers: there is no Mamba mixer to train (--init identity needs --train all)")
    student.recompute = sum(p.numel() for p in student.parameters()) > 1e9
    return student


def first_student(args, teacher):
    """-> the model that this stage starts from, and the layers that are replaced in it already, in order.
    Raises UserError if args.student cannot be a student of this teacher: only Mamba's own sizes may differ."""
    if not args.student:
        return clone(teacher, args.train), []
    student = nano.load_pretrained(args.student, teacher.embed_tokens.weight.device, teacher.embed_tokens.weight.dtype)
    # Everything but the layout is compared; Mamba's sizes are the student's own, an all-attention teacher has none.
    if replace(student.config, layout=()) != replace(teacher.config, layout=(), **{
            key: getattr(student.config, key) for key in ("d_state", "d_conv", "dt_rank", "d_inner", "d_xb")}):
        raise UserError(f"{args.student} is not a student of {args.teacher}: its config.json describes another model")
    done = [i for i, kind in enumerate(student.config.layout) if kind != teacher.config.layout[i]]
    # The layout knows which layers went, the report also in which order: it is trusted only if both agree.
    report = os.path.join(args.student, "report.json")
    known = nano.read_json(report, dict).get("replaced") if os.path.exists(report) else None
    return student, known if known and sorted(known) == done else done


# ----------------------------------------------------------------------------------------------------------------------
# One stage, from the ranking to the saved checkpoint.
#
# The paper's family is a chain of stages: 25, 27, 30, 34, 37, 40 layers. Each starts from the weights of the one
# before, and learns from the original teacher, never from the previous student: errors are not handed down.
# A few layers at a time keep the student close to the teacher, so that its scores mean something for the next choice.
# A member costs the tokens of all stages before it, too: 137 billion for the paper's H-40, 26 billion for its H-25.

# The flags that a result depends on. A run is continued, and a finished stage kept, only under the same ones. Not among
# them: where it is written, on which device it runs, and --eval, which only looks.
FLAGS = ("teacher", "student", "replace", "rank", "data", "traces", "init", "loss", "train", "steps", "probe_steps",
         "batch", "ctx", "lr", "warmup", "probe", "seed", "dtype")


class Run(NamedTuple):                                   # what all stages of a run have in common
    teacher: nano.HybridLM
    enc: object                                          # tiktoken.Encoding
    device: torch.device
    dtype: torch.dtype                                   # of matrix products
    block: object                                        # (number, count) -> training examples, see train_sft.batches
    probe: list                                          # lists of examples for LOO
    fixed: list                                          # one held-out batch, for the KL before and after
    calibration: tuple                                   # (tokens, real), see calibrate
    solved: dict                                         # the teacher's answers, once it has been asked


def evaluate(args, run, student):
    """Let both solve the held-out problems. -> report entries, and the lines of a table.
    Problems of the test split, which neither training nor ranking ever sees; with --data no answer can be checked."""
    teacher, result = run.teacher, {"teacher_accuracy": None, "student_accuracy": None, "accuracy_by_family": None}
    cache = lambda m: m.new_state(1, 1).nbytes()[0]                          # a state for one token: bytes per token
    state = lambda m: m.new_state(1, 1).nbytes()[1]                          # does not grow with the text
    lines = [f"{'':22}{'teacher':>10}{'student':>10}",
             f"{'cache bytes per token':22}{cache(teacher):10}{cache(student):10}",
             f"{'state bytes per text':22}{state(teacher):10}{state(student):10}"]
    if args.data:
        return result, lines
    problems = problem_set("test", args.eval)
    if args.eval not in run.solved:                                          # every stage asks the same problems
        run.solved[args.eval] = solve(teacher, run.enc, problems, note="teacher solves")
    texts = [run.solved[args.eval], solve(student, run.enc, problems, note="student solves")]
    (by_t, all_t), (by_s, all_s) = (accuracy(problems, t) for t in texts)    # shares, 0 to 1
    result = {"teacher_accuracy": all_t, "student_accuracy": all_s,
              "accuracy_by_family": {family: [by_t[family], by_s[family]] for family in by_t}}
    lines += [f"{family:22}{by_t[family]:10.3f}{by_s[family]:10.3f}" for family in by_t]
    lines += [f"{'all problems':22}{all_t:10.3f}{all_s:10.3f}"]
    # One long problem with both answers in full: numbers alone hide what kind of mistake is made.
    show = max(range(min(30, len(problems))), key=lambda i: len(problems[i][2]))         # a long one
    lines += ["", f"problem   {problems[show][1]}", f"expected  {problems[show][3]}"]
    lines += [f"{who}  {text[show][:600]}" for who, text in zip(("teacher ", "student "), texts)]
    return result, lines


def stage(args, run):
    """Replace up to args.replace layers, distil, evaluate, save args.out. Prints a table, then the report as JSON.
    Raises UserError if the ranking does not name enough layers. The last line printed can be read by a machine."""
    began = time.time()
    torch.manual_seed(args.seed)
    student, done = first_student(args, run.teacher)
    order, scores = rank_layers(args, run, student) if len(done) < args.replace else ([], None)
    new = order[:args.replace - len(done)]                                   # the least important of those left
    if len(done) + len(new) != args.replace:
        raise UserError(f"--replace {args.replace}: {len(done)} layers are replaced already and {args.rank} names "
                        f"{len(order)} more")
    torch.manual_seed(args.seed)                                             # fresh parts do not depend on the ranking
    student = set_trained(convert(student, run.teacher, new, args.init, run.calibration), args.train).train()
    print(f"replaced now: {' '.join(map(str, new))}\nlayout: {' '.join(student.config.layout)}")
    same = {flag: getattr(args, flag) for flag in FLAGS}
    # Always reverse KL on the same held-out batch, whatever --loss trains: results can be compared.
    kl = lambda: mean_loss(student, run.teacher, [run.fixed], "reverse_kl", run.device, run.dtype)
    meta = {"run": same | {"replaced": done + new}, "kl_first": kl()}
    here = time.time()
    log = distill(args, run, student, meta)
    began -= log[-1]["seconds"] - (time.time() - here)                       # time before an interruption counts, too
    student.eval()
    kl_last = kl()
    result, table = evaluate(args, run, student)
    nano.save_pretrained(student, args.out, tokenizer_from=args.teacher)
    table.insert(1, f"{'KL to the teacher':22}{0:10.4f}{kl_last:10.4f}   (before distillation {meta['kl_first']:.4f})")
    report = {"replaced": done + new, "layout": list(student.config.layout), **result, "kl_first": meta["kl_first"],
              "kl_last": kl_last, "steps": args.steps, "tokens": log[-1]["tokens"],
              "seconds": round(time.time() - began + args.set_up, 1), "seed": args.seed}
    extra = {"args": vars(args), "scores": scores, "log": log, **provenance(run.device)}
    nano.write_json(os.path.join(args.out, "report.json"), report | extra)
    if os.path.exists(os.path.join(args.out, "progress.safetensors")):
        os.remove(os.path.join(args.out, "progress.safetensors"))
    print("\n".join([*table, f"saved {args.out}", json.dumps(report)]), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The command line.
#
# Order matters in main: first what needs no file (plan), then the teacher, then the data, then the claim on every
# directory of the run, and only then work. A mistake in the last of six stages is reported before the first one starts.

RANKS = ("auto", "loo", "mmr", "first", "last", "random", "apriel15b")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--replace", type=int, default=25, help="attention layers to replace, in all (default 25)")
    p.add_argument("--stages", help="several values of --replace, as 25,27,30: one checkpoint each, from the last")
    p.add_argument("--teacher", default="teacher", help="checkpoint directory of the original (default: teacher)")
    p.add_argument("--student", help="start from this hybrid, an earlier stage (default: the teacher itself)")
    p.add_argument("--out", help="directory for the result; with --stages, the one above (default: out/hN; an --init "
                                 "other than the default adds its name)")
    p.add_argument("--data", help="JSONL file of prompt/response or messages (default: the built-in traces)")
    p.add_argument("--traces", default="reasoning", choices=("reasoning", "generic"),
                   help="built-in texts to distil on; generic: facts without question or reasoning (default reasoning)")
    p.add_argument("--rank", default="auto", help=f"which layers first: {', '.join(RANKS)}, or a JSON file of layers "
                                                  "(loo.json, mmr.json, a report); auto: loo, and mmr "
                                                  "with --student (default auto)")
    p.add_argument("--init", default="calibrated", choices=tuple(INITS), help="of a mixer (default calibrated)")
    p.add_argument("--loss", default="reverse_kl", choices=("reverse_kl", "forward_kl"), help="default reverse_kl")
    p.add_argument("--train", default="auto", choices=("auto", "all", "mixers"),
                   help="which weights train; auto: all if that fits into memory (default auto)")
    p.add_argument("--steps", type=int, default=100, help="optimiser steps of a stage (default 100)")
    p.add_argument("--probe-steps", type=int, default=6, help="optimiser steps of an MMR trial (default 6)")
    p.add_argument("--batch", type=int, default=24, help="texts per step (default 24)")
    p.add_argument("--ctx", type=int, default=512, help="longest text in tokens (default 512)")
    p.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default 0.0005)")
    p.add_argument("--warmup", type=int, default=10, help="steps of linear warm-up (default 10)")
    p.add_argument("--probe", type=int, default=48, help="problems per family for LOO, or --data examples (default 48)")
    p.add_argument("--eval", type=int, default=200, help="held-out problems per family at the end (default 200)")
    p.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    p.add_argument("--dtype", default="auto", help="of matrix products: auto, float32 or bfloat16 (default auto)")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run in --out, with the same flags")
    p.add_argument("--overwrite", action="store_true", help="replace a finished result in --out")
    return p.parse_args()


def plan(args):
    """The flags -> a list of argument sets, one per stage. Checks what can be checked without any file.
    Raises UserError. With --stages every stage continues what it finds: the command can simply be given again."""
    for name in ("replace", "steps", "probe_steps", "batch", "ctx", "probe", "eval"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.rank not in RANKS and not os.path.exists(args.rank):
        raise UserError(f"--rank {args.rank}: neither one of {', '.join(RANKS)} nor a file")
    if args.data and args.traces != "reasoning":
        raise UserError("--traces chooses among the built-in texts; --data brings its own")
    # A control must not land in the directory of the result that it is compared with.
    name, rank = "" if args.init == "calibrated" else f"-{args.init}", args.rank
    if not args.stages:
        args.out = args.out or f"out/h{args.replace}{name}"
        args.rank = ("mmr" if args.student else "loo") if rank == "auto" else rank
        return [args]
    try:
        counts = [int(n) for n in args.stages.split(",")]
    except ValueError:
        raise UserError(f"--stages {args.stages}: expected whole numbers with commas between them") from None
    if counts != sorted(set(counts)) or counts[0] < 1:
        raise UserError(f"--stages {args.stages}: the numbers must grow")
    above, stages = args.out or "out", []
    for n in counts:                                                         # a stage starts from the one before it
        student = stages[-1].out if stages else args.student
        change = {"replace": n, "student": student, "resume": True, "out": os.path.join(above, f"h{n}{name}"),
                  "rank": ("mmr" if student else "loo") if rank == "auto" else rank}
        stages.append(argparse.Namespace(**vars(args) | change))
    return stages


def is_finished(args):
    """Is this stage done already? UserError if it was done under other flags: its successors would build on it."""
    file = os.path.join(args.out, "report.json")
    if args.overwrite or not os.path.exists(file):
        return False
    made = nano.read_json(file, dict).get("args", {})
    for flag in FLAGS:
        if made.get(flag, getattr(args, flag)) != getattr(args, flag):       # a flag may be newer than the report
            raise UserError(f"{args.out} was made with {flag} = {made[flag]}, now {flag} = {getattr(args, flag)}; pass "
                            f"the same flags, or --overwrite, or continue from it with --student")
    print(f"{args.out} is finished already, kept")
    return True


def main():
    """Check, load, then stage after stage. One teacher in memory serves them all."""
    began, args = time.time(), parse_args()
    device, dtype = start_script(args)
    stages = plan(args)
    teacher, enc = nano.load_pretrained(args.teacher, device, dtype), nano.load_tokenizer(args.teacher)
    attention = teacher.config.layout.count("t")
    if stages[-1].replace > attention:
        raise UserError(f"--replace {stages[-1].replace}: {args.teacher} has {attention} attention layers")
    if args.data:
        train, held = read_jsonl(args.data, enc, args.ctx, teacher.config.vocab_size)
        probe, fixed, block = held[:args.probe], held[:args.batch], list_block(train, args.seed)  # never trained on
    else:
        probe, fixed = ([encode_problem(enc, p) for p in problem_set(split, n)]
                        for split, n in (("probe", args.probe), ("dev", 16)))
        block = (generic_block if args.traces == "generic" else trace_block)(enc, args.seed)
    for s in stages:
        claim_out(s.out, args.overwrite, s.resume, done="report.json")
    size = sum(p.numel() for p in teacher.parameters())
    choose_threads(teacher, device)
    if args.train == "auto":                                                # weights, gradients, optimiser, the teacher
        # 20 bytes each: 4 weight, 4 gradient, up to 8 optimiser, 4 teacher. The rest is left to activations.
        train_kind = "all" if size * 20 < 0.7 * memory_bytes(device) else "mixers"
        for s in stages:
            s.train = train_kind
    print(f"{args.teacher}: {size / 1e6:.2f} M parameters, {attention} attention layers; on {device}, products in "
          f"{dtype}; {nano.scan_backend_reason(device)}; training {stages[0].train}\n"
          f"an example, trained part marked: {show_example(enc, block(0, 1)[0])}")
    probe = sorted(probe, key=lambda e: len(e[0]))                           # batches of similar length
    probe = [probe[i:i + args.batch] for i in range(0, len(probe), args.batch)]
    run = Run(teacher, enc, device, dtype, block, probe, fixed, calibration_batch(block, device), {})
    for s in [s for s in stages if not (args.stages and is_finished(s))]:
        s.set_up, began = time.time() - began, time.time()                   # the first stage pays for loading
        stage(s, run)
        began = time.time()


def calibration_batch(block, device, count=48, most=16384):
    """-> tokens (b, t) of some training texts, at most `most` of them, and real (b, t): False at padding.
    For --init calibrated: its fit of d_inner unknowns wants several positions for each of them, see calibrate.
    They are of the training split, block 0, whatever the stage: nothing held out is looked at."""
    examples = block(0, count)
    longest = max(len(ids) for ids, _ in examples)
    examples = examples[:max(1, most // longest)]                            # long texts: fewer of them
    lengths = torch.tensor([len(ids) for ids, _ in examples], device=device)
    tokens, _ = collate(examples, device)
    return tokens, torch.arange(tokens.shape[1], device=device) < lengths[:, None]


def memory_bytes(device):
    """Memory of the GPU, or of the machine, in bytes: all of it, not what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    run_main(main)
