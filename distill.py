"""
Turn attention layers of a transformer into Mamba layers, and distil the result until it thinks like the original.

    python distill.py --replace 25                                  # the shipped 50-layer teacher becomes an H-25 hybrid
    python distill.py --replace 25 --init identity                  # the control: the same 25 layers simply removed
    python distill.py --teacher DIR --replace 12 --data traces.jsonl --out out/mine       # your own model, your traces

The steps: score every attention layer by leaving it out (LOO); replace the least important ones by Mamba layers that
start from their weights (MIL); train the student to give the teacher's next-token distribution on reasoning traces
(reverse KL); let both solve held-out problems; save --out in the Hugging Face layout.
"""
import os
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import argparse
import copy
import hashlib
import json
import random
import signal
import sys
import time

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import model as nano
from model import UserError
from train_sft import (FAMILIES, accuracy, autocast, batches, claim_out, clipped_step, collate, cross_entropy,
                       encode_problem, learning_rate, list_block, load_progress, make_optimizers, pick_device, pick_dtype,
                       problem_set, read_jsonl, run_main, save_progress, show_example, solve, trace_block)


# ----------------------------------------------------------------------------------------------------------------------
# The loss: KL divergence between the two next-token distributions, at the positions whose next token is trained.
#
# Reverse KL, KL(student || teacher) = sum_v q_v (log q_v - log p_v), punishes the student for putting mass where the
# teacher has none, and lets it ignore what it cannot represent. Forward KL swaps the roles. Temperature 1, float32.
# With a large vocabulary the (tokens, vocabulary) logits are the largest tensors of the whole run (131072 x 16384 in
# float32 is 8.6 GB): they are then made piece by piece from the hidden states, and made again in the backward pass.

CHUNK_ABOVE = 16384                                      # vocabulary size from which on the loss works in pieces
CHUNK_TOKENS = 1024                                      # tokens per piece


def kl_divergence(student_logits, teacher_logits, kind="reverse_kl"):
    """Two (..., vocab_size) of logits -> (...) nats. Zero for equal logits, finite for any finite ones."""
    q, p = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    if kind == "forward_kl":
        q, p = p, q
    return (q.exp() * (q - p)).sum(-1)


def distillation_loss(x, teacher_x, head, teacher_head, kind="reverse_kl", chunk=None):
    """x, teacher_x (m, d_model): hidden states of the trained positions; head, teacher_head: the output layers.
    -> the summed divergence in nats. chunk: tokens per piece, None: decided by the vocabulary size."""
    piece = lambda a, b: kl_divergence(head(a), teacher_head(b), kind).sum()
    chunk = chunk or (CHUNK_TOKENS if head.weight.shape[0] > CHUNK_ABOVE else None)
    if chunk is None:
        return piece(x, teacher_x)
    total = x.new_zeros((), dtype=torch.float32)
    for i in range(0, len(x), chunk):
        total = total + checkpoint(piece, x[i:i + chunk], teacher_x[i:i + chunk], use_reentrant=False)
    return total


def batch_loss(student, teacher, tokens, targets, kind):
    """-> summed divergence over the trained positions of a batch, and their number."""
    trained = targets >= 0                                                   # shifted once, in collate
    with torch.no_grad():
        teacher_x = teacher.hidden(tokens)[0][trained]
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
# All layers before the missing one compute what they always do, so the walk below does them once.

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
            base = model.lm_head(model.hidden(tokens)[0][trained])
            x = model.embed_tokens(tokens)
            place, _ = nano.make_place(model.config, tokens, 0, None, None, x.dtype)
            for i, block in enumerate(model.layers):
                y = x + block.mlp(block.post_attention_layernorm(x)) if block.kind == "t" else None
                if y is not None:
                    for later in model.layers[i + 1:]:
                        y, _ = later(y, None, place)
                    totals[i] += score(model.lm_head(model.norm(y)[trained]), base, targets)
                x, _ = block(x, None, place)
                bar.update()
        tokens_seen, rows_seen = tokens_seen + int(trained.sum()), rows_seen + len(examples)
    bar.close()
    return [{"layer": i, "accuracy": right / rows_seen if use_accuracy else None, "kl": kl / tokens_seen,
             "loss": loss / tokens_seen}
            for i, (right, kl, loss) in enumerate(totals.tolist()) if model.layers[i].kind == "t"]


def score(logits, base, targets):
    """logits, base (m, vocab_size) -> tensor [rows that are right throughout, summed KL to base, summed cross-entropy]."""
    trained, wanted = targets >= 0, targets[targets >= 0]
    wrong = torch.zeros_like(trained)
    wrong[trained] = logits.argmax(-1) != wanted
    loss = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
    return torch.tensor([float((~wrong.any(1)).sum()), kl_divergence(logits, base).sum().item(), loss.item()])


def least_important_first(scores):
    """Highest accuracy without the layer first, ties by the lower loss; by KL where there is no accuracy."""
    key = lambda s: (s["kl"], s["loss"]) if s["accuracy"] is None else (-s["accuracy"], s["loss"])
    return [s["layer"] for s in sorted(scores, key=key)]


def weights_hash(model):
    """A fingerprint of all weights, so that stored scores are used for no other model."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode() + p.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def rank_layers(args, teacher, probe, device, dtype):
    """-> all attention layers of the teacher, first to be replaced first, and the LOO scores or None."""
    attention = [i for i, kind in enumerate(teacher.config.layout) if kind == "t"]
    if args.rank in ("first", "last"):
        return attention if args.rank == "first" else attention[::-1], None
    if args.rank == "random":
        return random.Random(args.seed).sample(attention, len(attention)), None
    if args.rank != "loo":
        stored = nano.read_json(args.rank)
        order = stored.get("order") if isinstance(stored, dict) else stored
        if not isinstance(order, list) or set(order) - set(attention) or len(set(order)) < len(order):
            raise UserError(f"{args.rank}: no list of different attention layers (0 to {len(teacher.layers) - 1})")
        return order, stored.get("scores") if isinstance(stored, dict) else None
    file, key = os.path.join(args.out, "loo.json"), {"teacher": weights_hash(teacher), "data": args.data, "probe": args.probe}
    stored = nano.read_json(file) if os.path.exists(file) else {}
    if {k: stored.get(k) for k in key} != key:
        scores = leave_one_out(teacher, probe, device, dtype, use_accuracy=not args.data)
        stored = key | {"order": least_important_first(scores), "scores": scores}
        nano.write_json(file, stored)
    return stored["order"], stored["scores"]


# ----------------------------------------------------------------------------------------------------------------------
# Distillation.

def distill(args, student, teacher, block, device, dtype, meta):
    """Train the student for args.steps steps. -> list of log entries. meta: a dict that is kept with the progress; it is
    saved in args.out/progress.safetensors every 25 steps and on Ctrl-C, and read back with --resume."""
    optimizers, start, log, began = make_optimizers(student, args.lr), 0, [], time.time()
    progress = os.path.join(args.out, "progress.safetensors")
    if args.resume and os.path.exists(progress):
        meta.update(load_progress(progress, student, optimizers))
        start, log = meta["step"], meta["log"]
        began -= log[-1]["seconds"] if log else 0
    bar = tqdm(total=args.steps, initial=start, desc="distilling", unit="step")
    stream, tokens_seen, step = batches(block, args.batch, start), log[-1]["tokens"] if log else 0, start
    save = lambda: save_progress(progress, student, optimizers, meta | {"step": step, "log": log})
    try:
        for step in range(start, args.steps):
            tokens, targets = collate(next(stream), device)
            with autocast(device, dtype):
                loss, count = batch_loss(student, teacher, tokens, targets, args.loss)
            (loss / max(1, count)).backward()
            clipped_step(student, optimizers, learning_rate(step, args.steps, args.lr, args.warmup))
            tokens_seen += tokens.numel()
            log.append({"step": step + 1, "kl": round(loss.item() / max(1, count), 6), "tokens": tokens_seen,
                        "seconds": round(time.time() - began, 1)})
            bar.update()
            bar.set_postfix(kl=f"{log[-1]['kl']:.4f}", tok_s=f"{tokens_seen / max(0.1, log[-1]['seconds']):.0f}")
            if (step + 1) % 25 == 0:
                step += 1
                save()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                         # a second Ctrl-C must not spoil the save
        step = len(log)
        save()
        print(f"\nsaved step {step}; run the same command with --resume to continue", file=sys.stderr)
        raise
    finally:
        bar.close()
    return log


def make_student(args, teacher, order):
    """-> the student, and all layers that it has replaced, in order of replacement."""
    torch.manual_seed(args.seed)
    if args.student:
        student = nano.load_pretrained(args.student)
        if student.config.n_layer != teacher.config.n_layer or student.config.d_model != teacher.config.d_model:
            raise UserError(f"{args.student} is not a student of {args.teacher}: other shape")
    elif args.train == "mixers":                                             # frozen weights are shared, not copied
        student = copy.deepcopy(teacher, memo={id(p): p for p in teacher.parameters()})
    else:
        student = copy.deepcopy(teacher).float()
    done = [i for i, kind in enumerate(student.config.layout) if kind != teacher.config.layout[i]]
    if args.student and os.path.exists(os.path.join(args.student, "report.json")):
        done = nano.read_json(os.path.join(args.student, "report.json")).get("replaced", done)
    new = [i for i in order if i not in done][:max(0, args.replace - len(done))]
    if len(done) + len(new) != args.replace:
        raise UserError(f"--replace {args.replace}: {len(done)} layers are replaced already, and the order names "
                        f"{len(new)} more")
    device = teacher.embed_tokens.weight.device
    student = nano.convert(student.to(device), teacher, new, args.init)
    for name, p in student.named_parameters():
        p.requires_grad_(args.train == "all" or ".mixer." in name)
        if p.requires_grad:
            p.data = p.data.float()                                          # float32 masters; autocast casts for the products
    return student, done + new


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--replace", type=int, required=True, help="attention layers to replace, in all")
    p.add_argument("--teacher", default="teacher", help="checkpoint directory of the original (default: teacher)")
    p.add_argument("--student", help="start from this hybrid, an earlier stage (default: the teacher itself)")
    p.add_argument("--out", help="directory for the result (default: out/hN, with the init's name if it is not the default)")
    p.add_argument("--data", help="JSONL file of prompt/response or messages (default: the built-in traces)")
    p.add_argument("--rank", default="loo", help="which layers first: loo, first, last, random, or a JSON file (default loo)")
    p.add_argument("--init", default="aligned", choices=tuple(nano.INITS), help="start of a new mixer (default aligned)")
    p.add_argument("--loss", default="reverse_kl", choices=("reverse_kl", "forward_kl"), help="default reverse_kl")
    p.add_argument("--train", default="auto", choices=("auto", "all", "mixers"),
                   help="which weights train; auto: all if they fit into memory (default auto)")
    p.add_argument("--steps", type=int, default=150, help="optimiser steps (default 150)")
    p.add_argument("--batch", type=int, default=24, help="texts per step (default 24)")
    p.add_argument("--ctx", type=int, default=512, help="longest text in tokens (default 512)")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 0.001)")
    p.add_argument("--warmup", type=int, default=10, help="steps of linear warm-up (default 10)")
    p.add_argument("--probe", type=int, default=48, help="problems per family for LOO, or examples of --data (default 48)")
    p.add_argument("--eval", type=int, default=200, help="held-out problems per family in the final table (default 200)")
    p.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    p.add_argument("--dtype", default="auto", help="of matrix products: auto, float32 or bfloat16 (default auto)")
    p.add_argument("--resume", action="store_true", help="continue an interrupted run in --out, with the same flags")
    p.add_argument("--overwrite", action="store_true", help="replace a finished result in --out")
    return p.parse_args()


def check(args, device):
    """Everything that can be checked before hours of work. -> teacher, tokenizer, training examples, held-out examples."""
    args.out = args.out or f"out/h{args.replace}" + ("" if args.init == "aligned" else f"-{args.init}")
    for name in ("replace", "steps", "batch", "ctx", "probe"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.rank not in ("loo", "first", "last", "random") and not os.path.exists(args.rank):
        raise UserError(f"--rank {args.rank}: neither loo, first, last, random nor a file")
    dtype = pick_dtype(args.dtype, device)
    teacher, enc = nano.load_pretrained(args.teacher, device, dtype), nano.load_tokenizer(args.teacher)
    attention = teacher.config.layout.count("t")
    if args.replace > attention:
        raise UserError(f"--replace {args.replace}: {args.teacher} has {attention} attention layers")
    train, held = read_jsonl(args.data, enc, args.ctx, teacher.config.vocab_size) if args.data else (None, None)
    claim_out(args.out, args.overwrite, args.resume, done="report.json")
    size = sum(p.numel() for p in teacher.parameters())
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.train == "auto":                                                 # weights, gradients, two moments, the teacher
        args.train = "all" if size * 20 < 0.7 * memory else "mixers"
    print(f"{args.teacher}: {size / 1e6:.2f} M parameters, {attention} attention layers; device {device}, {dtype}; "
          f"scan: {nano.scan_backend(device)}; training {args.train}")
    return teacher, enc, train, held


def evaluate(args, teacher, student, enc, held):
    """Let both solve the held-out problems. -> report entries, and the lines of a table."""
    result = {"teacher_accuracy": None, "student_accuracy": None, "accuracy_by_family": None}
    cache = lambda m: sum(2 * m.config.n_kv_head * m.config.head_dim * 4 for kind in m.config.layout if kind == "t")
    state = lambda m: m.new_state(1, 1).nbytes()[1]
    lines = [f"{'':22}{'teacher':>10}{'student':>10}"]
    if not args.data:
        problems = problem_set("test", args.eval)
        texts = [solve(m, enc, problems, note=note) for m, note in ((teacher, "teacher solves"), (student, "student solves"))]
        (by_t, all_t), (by_s, all_s) = (accuracy(problems, t) for t in texts)
        result = {"teacher_accuracy": all_t, "student_accuracy": all_s,
                  "accuracy_by_family": {family: [by_t[family], by_s[family]] for family in FAMILIES}}
        lines += [f"{family:22}{by_t[family]:10.3f}{by_s[family]:10.3f}" for family in FAMILIES]
        lines += [f"{'all problems':22}{all_t:10.3f}{all_s:10.3f}"]
        _, question, steps, answer = max(problems[:30], key=lambda p: len(p[2]))
        shown = [text for p, *both in zip(problems, *texts) if p[1] == question for text in both]
        lines += ["", f"problem   {question}", f"expected  {answer}", f"teacher  {shown[0]}", f"student  {shown[1]}", ""]
    lines.insert(1, f"{'cache bytes per token':22}{cache(teacher):10}{cache(student):10}")
    lines.insert(2, f"{'state bytes per text':22}{state(teacher):10}{state(student):10}")
    return result, lines


def main():
    began, args = time.time(), parse_args()
    device = pick_device(args.device)
    teacher, enc, train, held = check(args, device)
    dtype = pick_dtype(args.dtype, device)
    if args.data:
        probe, fixed, block = held[:args.probe], held[:args.batch], list_block(train, args.seed)
    else:
        probe = [encode_problem(enc, p) for p in problem_set("probe", args.probe)]
        fixed = [encode_problem(enc, p) for p in problem_set("dev", 16)]
        block = trace_block(enc, args.seed)
    probe.sort(key=lambda e: len(e[0]))
    probe = [probe[i:i + args.batch] for i in range(0, len(probe), args.batch)]
    order, scores = rank_layers(args, teacher, probe, device, dtype)
    student, replaced = make_student(args, teacher, order)
    print(f"replaced, in this order: {' '.join(map(str, replaced))}\nlayout: {' '.join(student.config.layout)}\n"
          f"an example, trained part marked: {show_example(enc, block(0, 1)[0])}")
    meta = {"kl_first": mean_loss(student, teacher, [fixed], "reverse_kl", device, dtype)}
    log = distill(args, student, teacher, block, device, dtype, meta)
    student.eval()
    meta["kl_last"] = mean_loss(student, teacher, [fixed], "reverse_kl", device, dtype)
    nano.save_pretrained(student, args.out, tokenizer_from=args.teacher)
    result, table = evaluate(args, teacher, student, enc, held)
    table.insert(1, f"{'KL to the teacher':22}{0:10.4f}{meta['kl_last']:10.4f}   (before distillation {meta['kl_first']:.4f})")
    report = {"replaced": replaced, "layout": list(student.config.layout), **result, "kl_first": meta["kl_first"],
              "kl_last": meta["kl_last"], "steps": args.steps, "tokens": log[-1]["tokens"],
              "seconds": round(time.time() - began, 1), "seed": args.seed}
    extra = {"args": vars(args), "scores": scores, "log": log, "torch": torch.__version__, "device": str(device)}
    nano.write_json(os.path.join(args.out, "report.json"), report | extra)
    if os.path.exists(os.path.join(args.out, "progress.safetensors")):
        os.remove(os.path.join(args.out, "progress.safetensors"))
    print("\n".join(table))
    print(f"saved {args.out}")
    print(json.dumps(report))


if __name__ == "__main__":
    run_main(main)
