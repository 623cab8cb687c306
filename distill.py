"""
Turn attention layers of a transformer into Mamba layers, and distil the result until it thinks like the original.

    python distill.py --replace 25                        # the shipped 50-layer teacher becomes an H-25 hybrid
    python distill.py --replace 25 --init identity        # the control: the same 25 layers simply removed
    python distill.py --stages 25,27,30,34,37,40          # the whole family, each member from the one before
    python distill.py --teacher DIR --replace 12 --data traces.jsonl --out out/mine         # your model, your traces

The steps of a stage: rank the attention layers, by leaving each one out (LOO, first stage) or by trying a Mamba layer
in its place (MMR, later stages); replace the least important ones by Mamba layers that start from their weights (MIL);
train the student to give the teacher's next-token distribution on reasoning traces (reverse KL); let both solve
held-out problems; save --out in the Hugging Face layout. The file is in that order, conversion first.
"""
import argparse
import copy
import itertools
import json
import math
import os
import random
import re
import time
from dataclasses import fields, replace
from typing import NamedTuple

import model as nano         # before torch: it says how threads wait
import torch
from tqdm import tqdm

from model import (UserError, autocast, choose_threads, claim_out, file_hash, harm, provenance,
                   weights_hash)
from train_sft import (THINGS, Plan, Problem, Progress, accuracy, batches, check_rates, choose_optimizer,
                       choose_plan, clipped_step, collate, encode_parts, encode_problem, few_positions, fit,
                       generic_block, list_block, load_codec, longest_text, make_optimizers, mamba_names,
                       memory_plan, once, own_part, plan_flags, planned_config, planned_for, print_plans,
                       problem_set, processes, read_apart, read_jsonl, run_together, share_out,
                       show_example, solve, summed, summed_loss, take_back, texts_hash, trace_block,
                       union)


# ----------------------------------------------------------------------------------------------------------------------
# Conversion (MIL, "Mamba in Llama"): a Mamba layer that starts from the attention layer it replaces.
#
# Attention of one head, with the softmax left out, keeps a matrix H of head_dim x head_dim numbers. One channel of a
# Mamba layer keeps d_state cells h. Set Mamba's decay exp(dt A) and its step dt to 1, and write both down:
#
#       attention    y_t = sum over s <= t of v_s (k_s . q_t)  =  H_t q_t      with  H_t = H_{t-1} + v_t k_t^T
#       Mamba        y_t = h_t . C_t                                           with  h_t = h_{t-1} + u_t B_t
#
# So a channel is one row of H: u is one lane of v, B is k, C is q. That says where every weight goes:
#
#       Mamba                  from attention       |       Mamba                            fresh
#       in_proj rows z         fresh                |       dt_in_proj, dt_proj, dt bias     Mamba's own initialisation
#       in_proj rows u         v_proj               |       conv1d                           U(+-1/sqrt(d_conv))
#       in_proj rows B         k_proj               |       A_log                            log(1 ... d_state)
#       in_proj rows C         q_proj               |       D                                1
#       out_proj columns       o_proj               |       norms, MLP                       kept
#
# Where the projections have biases (Qwen2), they go the same way, into the bias of in_proj; the other biases that the
# format then asks for are zeros. Where queries and keys are normed (Qwen3), the norm's weight, one number per lane of
# every head, is multiplied into the rows; its division by the root mean square cannot be, for it depends on the token.
#
# One thing does not fit. H has head_dim columns, a channel has d_state cells, 16 for a head of 128. The format cuts u,
# B and C into chunks of d_state lanes: channel chunk j reads chunk j of C, and chunk j // r of u and B, where r is the
# number of query heads that share a kv head. Which chunks form a head it does not know. Here are two query heads a and
# b that share one kv head of four chunks, k0 to k3 (v0 to v3 likewise):
#
#       channel chunk j             0     1     2     3     4     5     6     7
#       writes v under the key      k0    k0    k1    k1    k2    k2    k3    k3        chunk j // 2: the format says so
#       reads, published order      a0    a1    a2    a3    b0    b1    b2    b3        its own key in 0 and 7 alone
#       reads, "aligned"            a0    b0    a1    b1    a2    b2    a3    b3        its own key everywhere
#
# The published code keeps the rows of q_proj as they are, and at the 15B shape 7 chunks of q in 8 are multiplied with a
# chunk of k that they were never trained for, and o_proj's columns meet chunks of v that are not theirs. "aligned" lays
# q_proj's rows out chunk by chunk, heads inside, and o_proj's columns in the same order; k and v stay where they are,
# and so every chunk meets its own. z, conv, dt, A and D act on each channel alone and are fresh, so it does not matter
# which channel is which. Shapes and names are the same: both orders are the same file format.
#
# What is lost: the softmax, which makes attention exact, where a scan returns a blend of all that was written, with old
# entries faded; the rotation of q and k by their position, for a scan knows order by its decay; and the sum over a
# head: a lane of v is weighed by one chunk of q . k, not by all of them. Distillation has to close that gap. The idea
# is that of "The Mamba in the Llama" (arXiv 2408.15237).


INITS = {
    "calibrated": "aligned, then gate, conv, D and output made to fit the teacher",
    "aligned": "from attention, chunks matched",
    "plain": "from attention, in the published order",
    "random": "nothing copied",
    "identity": "no mixer at all (control)",
}


def query_order(config, init):
    """-> (d_inner) int64: C's row i is q_proj's row order[i], out_proj's column i is o_proj's column order[i]."""
    order = torch.arange(config.d_inner)
    if init not in ("aligned", "calibrated"):
        return order
    # As q_proj has them: kv head, query head that shares it, chunk of the head, lane of the chunk.
    heads_per_kv = config.n_head // config.n_kv_head
    chunks = config.head_dim // config.d_state
    order = order.view(config.n_kv_head, heads_per_kv, chunks, config.d_state)
    return order.transpose(1, 2).reshape(-1)


@torch.no_grad()
def mil_mixer(attention, config, init="aligned"):
    """attention: the Attention to replace -> a new Mamba, on the CPU in float32. init: a key of INITS but
    identity; calibrated gives what aligned does, see calibrate."""
    mixer = nano.Mamba(config)
    init_dt(mixer)
    if init == "random":
        return mixer
    order = query_order(config, init)
    qk_norm = attention.config.qk_norm
    v = rows_of(attention.v_proj)
    k = rows_of(attention.k_proj, attention.k_norm if qk_norm else None)
    q = rows_of(attention.q_proj, attention.q_norm if qk_norm else None)
    # Rows u, B and C, in this order.
    rows = torch.cat([v, k, q[order]])
    # Slices are views: filling them fills in_proj. Its first d_inner rows are z.
    fill(mixer.in_proj.weight[config.d_inner:], rows[:, :-1])
    fill(mixer.out_proj.weight, attention.o_proj.weight[:, order])
    if config.proj_bias:
        for linear in (mixer.in_proj, mixer.dt_in_proj, mixer.out_proj):
            linear.bias.zero_()
        fill(mixer.in_proj.bias[config.d_inner:], rows[:, -1])
    return mixer


def rows_of(linear, norm=None):
    """A projection, and the norm per head that follows it -> (rows, d_model + 1): its weight, its bias as the last
    column (zeros without one), and both times the norm's weight."""
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    rows = torch.cat([linear.weight, bias[:, None]], dim=1)
    if norm is None:
        return rows
    by_head = rows.unflatten(0, (-1, len(norm.weight)))                      # (heads, head_dim, d_model + 1)
    return (by_head * norm.weight[:, None]).flatten(0, 1)


@torch.no_grad()
def init_dt(mixer):
    """Step sizes log-uniform in [dt_min, dt_max], as in Mamba; half the bias is stored, since it counts twice."""
    c = mixer.config
    bound = c.dt_scale * c.dt_rank ** -0.5
    torch.nn.init.uniform_(mixer.dt_proj.weight, -bound, bound)
    if mixer.dt_proj.bias is not None:
        dt = torch.empty(c.d_inner).uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp()
        dt = dt.clamp(min=c.dt_init_floor)
        # The inverse of softplus.
        bias = dt + torch.log(-torch.expm1(-dt))
        mixer.dt_proj.bias.copy_(bias / 2)


def fill(target, source):
    """copy_ alone would spread a smaller source over the target, silently."""
    assert target.shape == source.shape, (target.shape, source.shape)
    target.copy_(source)


def not_carried(config):
    """What attention of this shape does and its Mamba layer cannot start with, for the user to know. -> a text."""
    lost = ["the softmax", "the rotation of q and k by position"]
    if config.qk_norm:
        lost.append("the division of q and k by their root mean square")
    if config.sliding_window:
        lost.append("the sliding window")
    return ", ".join(lost)


# A fresh mixer has a weakness: with dt near 0.01 and a random gate it writes next to nothing, and the student starts
# where a model without the layer would. "calibrated" repairs that on some training texts, in closed form:
#
#       gate z      opened: fitted to a constant c with silu(c) = 1, plus a little of its random start
#       conv        the newest token alone, and small: silu(0.1 v) is nearly a straight line, 0.05 v
#       D           of the query heads that share a kv head, the first gets 3, the others 0. Their channels hold the
#                   same u: what the token itself brings comes from the first, and the others are memory alone
#       out_proj    fitted such that x + mixer(norm(x)) comes close to what stands there in the teacher
#
# Layer by layer, each on the work of those before it. The last line asks for more than the attention's output: what the
# layers before have lost is wanted, too, as far as this one can tell it. Two linear systems are solved per layer: it
# takes no training step, and the file format does not notice. dt and A stay as they are: size and direction are
# corrected in the last linear map. The closed form is ours and not the paper's; Taylor-Calibrate (arXiv 2606.16429)
# fits another mixer to its attention by gradient steps.
#
# Texts count: a fit of d_inner unknowns for each output, to few positions, is good there and nowhere else. KL on
# held-out texts before any training: SmolLM2-135M with 12 of 30 layers replaced 0.30; 0.43 with the gate alone, with
# the attention's output as the aim, and a fifth of the texts. The shipped teacher with 34 of 50: 0.095 so, 0.085 with
# conv and D, 0.032 with the teacher's x as the aim.

OPEN_GATE = 1.28                                         # silu(1.28) = 1
SMALL_CONV = 0.1


class RidgeFit:
    """Least squares with a small penalty, from sums: the rows may come in pieces, and none of them is kept."""
    def __init__(self):
        self.gram = 0.0                                                      # (k, k), a^T a
        self.product = 0.0                                                   # (k, r), a^T b

    def add(self, a, b):
        """a (m, k), b (m, r): inputs and what they should give."""
        a = a.cpu().double()
        self.gram = self.gram + a.T @ a
        self.product = self.product + a.T @ b.cpu().double()

    def solve(self, strength=0.01):
        """-> w (r, k) float64, on the CPU, with a w^T close to b. strength is relative to the mean square of a's
        columns: channels that hardly move get no huge weights."""
        penalty = strength * self.gram.diagonal().mean()
        eye = torch.eye(len(self.gram), dtype=torch.float64)
        return torch.linalg.solve(self.gram + penalty * eye, self.product).T


@torch.no_grad()
def calibrate(student, teacher, layers, texts):
    """Fit the new mixers in these layers of student, in place. texts: a list of (tokens (b, t), real (b, t): False at
    padding). Not in the paper; measured in results/README.md."""
    xs = [student.embed_tokens(tokens) for tokens, _ in texts]               # (b, t, d_model) each
    teacher_xs = [teacher.embed_tokens(tokens) for tokens, _ in texts]
    places = [nano.make_place(student.config, tokens, 0, None, None, x.dtype)[0]
              for x, (tokens, _) in zip(xs, texts)]
    reals = [real for _, real in texts]
    # What lies above the last of them needs no look.
    for i in range(max(layers) + 1):
        block = student.layers[i]
        original = teacher.layers[i]
        if i in layers:
            xs, teacher_xs = fit_mixer(block, original, list(zip(xs, teacher_xs, places, reals)))
        else:
            xs = [block(x, None, place)[0] for x, place in zip(xs, places)]
            teacher_xs = [original(x, None, place)[0] for x, place in zip(teacher_xs, places)]


def fit_mixer(block, original, pieces):
    """Fit the mixer of block to its original in the teacher. pieces: (x, teacher_x, place, real), as in calibrate.
    -> the lists of x and teacher_x after these two blocks: what the fit has computed is not computed again."""
    mixer = block.mixer
    open_gate(mixer, [block.input_layernorm(x)[real] for x, _, _, real in pieces])
    straighten(mixer)
    fit = RidgeFit()
    gated = []                                                               # (b, t, d_inner) each
    wanted = []                                                              # (b, t, d_model) each
    for x, teacher_x, place, real in pieces:
        written, _ = original.mixer(original.input_layernorm(teacher_x), None, place)
        wanted.append(teacher_x + written)
        gated.append(before_out_proj(mixer, block.input_layernorm(x), place))
        fit.add(gated[-1][real], (wanted[-1] - x)[real])
    mixer.out_proj.weight.copy_(fit.solve())
    xs = [block.after_mlp(x + mixer.out_proj(y)) for (x, *_), y in zip(pieces, gated)]
    return xs, [original.after_mlp(x) for x in wanted]


def open_gate(mixer, inputs):
    """Change z's rows such that the gate silu(z) is about 1 for inputs like these, a list of (m, d_model)."""
    fit = RidgeFit()
    for normed in inputs:
        fit.add(normed, normed.new_full((len(normed), 1), OPEN_GATE))
    z = mixer.in_proj.weight[:mixer.config.d_inner]                          # (d_inner, d_model), a view
    # A tenth of the random start stays: rows that were all the same would stay the same for ever.
    z.mul_(0.1).add_(fit.solve().to(z))


def straighten(mixer):
    """Set conv and D as the table says."""
    c = mixer.config
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = SMALL_CONV
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias.zero_()
    sharing = c.d_inner // c.d_xb
    if sharing > 1:
        # Channels, as query_order lays them out: chunk of u, head that shares it, lane.
        D = mixer.D.view(-1, sharing, c.d_state)
        D.zero_()
        D[:, 0] = 3


def before_out_proj(mixer, x, place):
    """x (b, t, d_model) -> (b, t, d_inner), what the mixer hands to its out_proj."""
    out_proj = mixer.out_proj
    mixer.out_proj = torch.nn.Identity()
    y, _ = mixer(x, None, place)
    mixer.out_proj = out_proj
    return y


def converted_config(student, teacher, layers, init):
    """Configs of student and teacher -> that of the student after these layers are converted.
    Raises UserError, naming what is in the way, if they cannot be: before any weight is touched or layer ranked."""
    if init not in INITS:
        raise UserError(f"unknown init {init!r}; known: {', '.join(INITS)}")
    for field in ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim"):
        ours = getattr(student, field)
        theirs = getattr(teacher, field)
        if ours != theirs:
            raise UserError(f"student and teacher differ in {field}: {ours} and {theirs}")
    layout = list(student.layout)
    for i in layers:
        if not 0 <= i < len(layout) or layout[i] != "t" or teacher.layout[i] != "t":
            shown = " ".join(student.layout)
            raise UserError(f"layer {i} is not an attention layer (layout: {shown})")
        layout[i] = "n" if init == "identity" else "m2"
    # One switch for all Mamba layers of a model: on from the first conversion on, if the attention has biases.
    proj_bias = student.proj_bias or teacher.qkv_bias
    if proj_bias and not student.proj_bias and "m2" in student.layout:
        raise UserError("the attention has biases and the student's Mamba layers have none: "
                        "its file format knows one switch for all of them")
    config = replace(student, layout=tuple(layout), proj_bias=proj_bias)
    if layers and init != "identity":
        check_widths(config, copied=init != "random")
    return config


def check_widths(config, copied):
    """Raise UserError unless Mamba layers of this shape can be made, with a place for all rows of their attention if
    they are copied."""
    c = config
    widths = (c.n_head * c.head_dim, c.n_kv_head * c.head_dim)
    if c.d_xb % c.d_state or (copied and c.head_dim % c.d_state):
        raise UserError(f"head_dim {c.head_dim} is not a multiple of d_state {c.d_state}: "
                        "a head must be cut into whole chunks")
    if c.d_inner % c.d_xb or (copied and (c.d_inner, c.d_xb) != widths):
        raise UserError(f"{c.n_head} / {c.n_kv_head} heads of head_dim {c.head_dim} do not fit into "
                        f"Mamba layers of d_inner {c.d_inner}, d_xb {c.d_xb}")


def choose_d_state(config, wanted):
    """-> cells per channel of the Mamba layers to come. wanted: --d-state, or None: 16, or the largest divisor of
    head_dim below it. A hybrid has its own already. Raises UserError."""
    if set(config.layout) != {"t"}:
        if wanted not in (None, config.d_state):
            raise UserError(f"--d-state {wanted}: the layers that are converted have {config.d_state}")
        return config.d_state
    if wanted is None:
        return max(n for n in range(1, 17) if config.head_dim % n == 0)
    if config.head_dim % wanted:
        raise UserError(f"--d-state {wanted} does not divide head_dim {config.head_dim}")
    return wanted


def convert(student, teacher, layers, init="aligned", texts=None):
    """Replace the mixers of these layers of student, in place, by Mamba layers made from the teacher's attention.
    layers: 0-based; all must still be attention in the student. init: a key of INITS. texts: what
    "calibrated" needs, see calibrate. Returns the student. Raises UserError before anything is changed."""
    config = converted_config(student.config, teacher.config, layers, init)
    if init == "calibrated" and not texts:
        raise UserError("init calibrated needs texts")
    for i in layers:
        block = student.layers[i]
        block.kind = config.layout[i]
        if init == "identity":
            del block.input_layernorm
            block.mixer = None
        else:
            weight = block.mlp.down_proj.weight
            mixer = mil_mixer(teacher.layers[i].mixer, config, init)
            block.mixer = nano.cast(mixer, weight.device, weight.dtype)
    student.config = config
    if init == "calibrated" and layers:
        calibrate(student, teacher, layers, texts)
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

def kl_divergence(student_logits, teacher_logits, divergence="reverse_kl"):
    """Two (..., vocab_size) of logits -> (...) nats. Zero for equal logits, finite for any finite ones.
    Both sides go through log_softmax: the log of a softmax that has underflowed would be -inf."""
    if divergence == "forward_kl":
        return kl_divergence(teacher_logits, student_logits)
    log_q = student_logits.float().log_softmax(-1)
    log_p = teacher_logits.float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def distillation_loss(x, teacher_x, head, teacher_head, divergence="reverse_kl", piece=None):
    """x, teacher_x (m, d_model): hidden states of the trained positions; head, teacher_head: the output layers.
    -> the summed divergence in nats, which the caller divides by the tokens of the batch. piece: see
    train_sft.summed_loss."""
    def loss_of(logits, teacher_logits):
        return kl_divergence(logits, teacher_logits, divergence).sum()

    return summed_loss(x, head, lambda part: teacher_head(teacher_x[part]), loss_of, piece)


def trained_hidden(model, batch):
    """A Batch of train_sft -> (m, d_model), the hidden states of its m trained positions. Those of a prompt, and
    logits of theirs above all, are of no use."""
    x, _ = model.hidden(batch.tokens, reset=batch.reset)                     # (b, t, d_model)
    return x[batch.targets >= 0]


class TaughtBatch(NamedTuple):
    """A Batch that is used again and again, and the teacher's side of its loss: hidden states, not logits, are small
    enough to keep."""
    texts: object                                        # a train_sft.Batch
    teacher_x: torch.Tensor                              # (m, d_model), see trained_hidden


@torch.no_grad()
def taught_batch(run, examples, room=0):
    """room: see train_sft.collate."""
    batch = collate(examples, run.device, room)
    with autocast(run.device, run.dtype):
        return TaughtBatch(batch, trained_hidden(run.teacher, batch))


def batch_loss(student, teacher, batch, divergence):
    """-> summed divergence over the trained positions of a Batch, and their number."""
    with torch.no_grad():
        teacher_x = trained_hidden(teacher, batch)
    x = trained_hidden(student, batch)
    loss = distillation_loss(x, teacher_x, student.lm_head, teacher.lm_head, divergence)
    return loss, len(x)


# ----------------------------------------------------------------------------------------------------------------------
# Alignment, before the KL stage if --align-steps asks for it: every new mixer learns, by itself, to write what the
# attention that it replaces writes for the teacher's inputs.
#
# The teacher walks through its layers once; at each new one its normed input is given to attention and mixer alike.
# The loss is the mean squared error, relative to the attention's output: layers of loud and of quiet outputs count the
# same. No gradient goes through MLPs, through the output layer or from layer to layer, so a step costs a third of a KL
# step. But nobody asks which errors matter, and in use a mixer's input comes from the mixers before it.
#
# The paper found no gain. Here there is one, from a calibrated start, at equal seconds: SmolLM2-135M, 15 of 30 layers,
# general answers. 300 seconds of one core, three seeds: KL 0.433 to 0.451 after 45 KL steps, 0.406 to 0.412 after 50 of
# alignment and 27 of KL. 3000 seconds, one seed: 0.273 after 620 KL steps, 0.247 after 200 of alignment and 540 of KL,
# 0.231 after 600 and 380.
#
# What was tried instead: the student's own inputs, and as the aim what stands behind this layer in the teacher (as in
# calibrate). KL 0.527 after 100 steps of it, 0.522 after 100 of these: no gain.

def alignment_error(student, teacher, layers, batch):
    """-> the summed relative squared error of the mixers in these layers of student, and the number of layers.
    It counts all tokens of the Batch, prompts too: later tokens read what was written there."""
    # Padding is what no trained token follows in its row.
    real = (batch.targets >= 0).flip(1).cummax(1).values.flip(1)             # (b, t)
    if batch.reset is not None:
        # Nor does the last token of a text count, which nothing follows, where texts share a row.
        real[:, :-1] &= ~batch.reset[:, 1:]
    x = teacher.embed_tokens(batch.tokens)                                   # (b, t, d_model)
    place, _ = nano.make_place(teacher.config, batch.tokens, 0, None, batch.reset, x.dtype)
    total = x.new_zeros(())
    for i in range(max(layers) + 1):
        block = teacher.layers[i]
        if i in layers:
            with torch.no_grad():
                normed = block.input_layernorm(x)
                wanted, _ = block.mixer(normed, None, place)
            written, _ = student.layers[i].mixer(normed, None, place)
            error = (written - wanted)[real].float().square().sum()
            total = total + error / wanted[real].float().square().sum()
        with torch.no_grad():
            x, _ = block(x, None, place)
    return total, len(layers)


def align(args, run, student, layers, depends):
    """Train the new mixers in these layers of student for args.align_steps steps, and nothing else. -> Progress.
    It has a file of its own, with its last step, until the stage is saved: a killed run goes on in either phase."""
    progress = Progress(os.path.join(args.out, "align.safetensors"), depends, args.resume)
    if args.align_steps and not layers:
        print("note: --align-steps has no new mixer to align")
    if not args.align_steps or not layers:
        return progress
    mixers = tuple(f"layers.{i}.mixer." for i in layers)
    for name, p in student.named_parameters():
        p.requires_grad_(name.startswith(mixers))
        if p.requires_grad:
            p.data = p.data.float()

    def loss_of(model, batch):
        return alignment_error(model, run.teacher, layers, batch)

    plan = Plan(steps=args.align_steps, lr=args.align_lr, warmup=args.warmup, every=25, log_every=1, name="error",
                optimizer=args.optimizer, room=args.ctx if args.pack else 0, accumulate=args.accumulate,
                count=lambda batch: len(layers))
    fit(student.train(), loss_of, run.block, args.batch, plan, progress, run.device, run.dtype)
    return progress


# ----------------------------------------------------------------------------------------------------------------------
# Which layers to replace first: leave one out (LOO).
#
# Take one attention layer's mixer away, look how much worse the model gets, put it back. On the built-in problems the
# measure is exact match, teacher-forced: a trace whose every token is the most likely one is what greedy decoding would
# have written. Equal scores are told apart by the loss. On --data the measure is the KL to the intact model.
# All layers before the missing one compute what they always do, so the walk below does them once: layer i costs the
# n_layer - i layers above it, 50 layers cost half of 50 full passes.
#
# "loo-retrieval" takes the layer away in the same manner and asks for hidden codes (see "What a student is worth"): a
# text of everyday tokens hardly needs what the layers do that look far back. The codes are other ones than at the end.
#
# The paper measures MMLU, which a model of 2 M parameters cannot answer. Why not the attention weights or a gradient?
# Because the residual stream lets later layers repair an early loss: only running the rest of the model shows it.

@torch.no_grad()
def leave_one_out(model, probe, device, dtype, use_accuracy):
    """probe: lists of examples -> per attention layer {"layer", "accuracy" or None, "kl", "loss"} without its mixer."""
    attention = attention_layers(model.config)
    # Of many processes each takes some of the texts.
    probe = own_part(probe)
    totals = {layer: torch.zeros(3, dtype=torch.float64) for layer in attention}
    tokens_seen = 0
    texts_seen = 0
    with tqdm(total=len(probe) * len(attention), desc="leave one out", unit="layer") as bar:
        for examples in probe:
            batch = collate(examples, device)
            with autocast(device, dtype):
                for layer, sums in scores_without_each(model, batch):
                    totals[layer] += sums
                    bar.update()
            tokens_seen += int((batch.targets >= 0).sum())
            texts_seen += len(examples)
    tokens_seen, texts_seen = summed(tokens_seen, texts_seen)
    scores = []
    for layer, sums in totals.items():
        right, kl, loss = summed(*sums.tolist())
        accuracy = right / texts_seen if use_accuracy else None
        kl = kl / tokens_seen
        loss = loss / tokens_seen
        scores.append({"layer": layer, "accuracy": accuracy, "kl": kl, "loss": loss})
    return scores


def attention_layers(config):
    """-> the numbers of the layers that are attention, in order."""
    return [i for i, kind in enumerate(config.layout) if kind == "t"]


def scores_without_each(model, batch):
    """Yields (layer, sums as score makes them) for each attention layer of model, on one Batch, a text a row."""
    tokens = batch.tokens
    targets = batch.targets
    trained = targets >= 0
    intact_x = trained_hidden(model, batch)                                  # (m, d_model)
    x = model.embed_tokens(tokens)                                           # (b, t, d_model)
    place, _ = nano.make_place(model.config, tokens, 0, None, None, x.dtype)
    for i, block in enumerate(model.layers):
        # Nothing to leave out where the mixer is Mamba already, or missing: the walk just goes on.
        if block.kind == "t":
            # This layer without its mixer, and then all that follow.
            y = block.after_mlp(x)
            for later in model.layers[i + 1:]:
                y, _ = later(y, None, place)
            yield i, score(model.norm(y)[trained], intact_x, model.lm_head, targets)
        x, _ = block(x, None, place)


def score(x, intact_x, head, targets):
    """x, intact_x (m, d_model): hidden states, before the output layer `head` -> tensor [texts right throughout, summed
    KL to intact, summed cross-entropy]. targets (b, t): m of them are not -1. Sums, so that batches of different size
    can be added up."""
    trained = targets >= 0                                                   # (b, t) bool
    wanted = targets[trained]                                                # (m)
    wrong = torch.zeros_like(trained)
    likeliest = torch.empty_like(wanted)
    kl = 0.0
    loss = 0.0
    for part in few_positions(head, len(wanted)):
        logits = head(x[part])
        likeliest[part] = logits.argmax(-1)
        kl += kl_divergence(logits, head(intact_x[part])).sum().item()
        loss += torch.nn.functional.cross_entropy(logits.float(), wanted[part], reduction="sum").item()
    wrong[trained] = likeliest != wanted
    right = (~wrong.any(1)).sum()
    return torch.tensor([right.item(), kl, loss])


def least_important_first(scores):
    """Scores -> layer numbers. sorted is stable: of two equal ones the lower layer comes first."""
    return [s["layer"] for s in sorted(scores, key=harm)]


def stored_scores(path, key, make):
    """Scores are expensive: keep them in the file `path` together with what they were made from, reuse them if that is
    still the same, and otherwise make() them anew. -> the dict in the file.
    key: a dict of JSON values. The file is also a valid --rank FILE, for a control that replaces the same layers."""
    stored = nano.read_json(path, dict) if os.path.exists(path) else {}
    if {k: stored.get(k) for k in key} == key:
        return stored
    scores = make()
    stored = key | {"order": least_important_first(scores), "scores": scores}
    once(nano.write_json, path, stored)
    return stored


def rank_layers(args, run, student):
    """-> attention layers of the student, first to be replaced first, and their scores (None without any).
    Layers that are replaced already stay in a stored order and are left out here. Raises UserError for a bad file."""
    attention = attention_layers(student.config)
    scores = None
    if args.rank == "loo":
        stored = loo_scores(args, run)
        order = stored["order"]
        scores = stored["scores"]
    elif args.rank == "loo-retrieval":
        stored = retrieval_scores(args, run)
        order = stored["order"]
        scores = stored["scores"]
    elif args.rank == "mmr":
        stored = mmr_scores(args, run, student)
        order = stored["order"]
        scores = stored["scores"]
    elif args.rank == "first":
        order = attention
    elif args.rank == "last":
        order = attention[::-1]
    elif args.rank == "random":
        order = random.Random(args.seed).sample(attention, len(attention))
    elif args.rank == "apriel15b":
        if len(student.layers) != 50:
            raise UserError(f"--rank apriel15b is an order of 50 layers; {args.teacher} has "
                            f"{len(student.layers)}")
        order = nano.APRIEL15B
    else:
        order = read_order(args.rank, len(student.layers))
    return [i for i in order if i in attention], scores


def read_order(path, n_layer):
    """A JSON file with a list of layers, what stored_scores writes, or a report -> the list. Raises UserError."""
    order = nano.read_json(path)
    if isinstance(order, dict):
        order = order.get("order", order.get("replaced"))
    if isinstance(order, list):
        layers = [i for i in order if type(i) is int and 0 <= i < n_layer]
        if len(set(layers)) == len(order):
            return layers
    raise UserError(f"{path}: not a list of different layers from 0 to {n_layer - 1}")


# Scores are stored in --out under a key: a second run with other --steps or --lr need not rank again.

def loo_scores(args, run):
    """The stored dict of LOO scores, always of the teacher itself."""
    def make():
        exact_match = not args.data
        return leave_one_out(run.teacher, run.probe, run.device, run.dtype, exact_match)

    key = run.content | {"ctx": args.ctx, "probe": args.probe, "dtype": args.dtype}
    return stored_scores(os.path.join(args.out, "loo.json"), key, make)


def retrieval_scores(args, run):
    """The same, by hidden codes: the share of codes whose every token is the most likely one, then their loss."""
    def make():
        probe = [[code_example(run.codec, length, number)] for number in numbers]
        return leave_one_out(run.teacher, probe, run.device, run.dtype, use_accuracy=True)

    length = min(512, run.teacher.config.max_length)
    # Far from those that a student is asked.
    numbers = range(1000, 1008)
    key = {"content of --teacher": run.content["content of --teacher"], "dtype": args.dtype,
           "codes": len(numbers), "length": length}
    return stored_scores(os.path.join(args.out, "loo-retrieval.json"), key, make)


def mmr_scores(args, run, student):
    """The stored dict of MMR scores. They belong to this student, and to everything that its trials depend on."""
    def make():
        return try_each_layer(args, run, student, key)

    key = depends_on(args, run, student)
    # The order of the trials' losses is all that is used: how the stage goes on afterwards does not matter to it.
    for flag in ("replace", "rank", "align_steps", "align_lr", "steps", "accumulate", "warmup", "probe"):
        del key[flag]
    return stored_scores(os.path.join(args.out, "mmr.json"), key, make)


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
#
# What counts is measured on other texts, of all lengths and families: training batches hold texts of one length, and
# measured on a short one, layers looked harmless that long stories need (H-27 lost 0.04 by it).

def try_each_layer(args, run, student, key):
    """-> per attention layer of the student {"layer", "loss"}: the distillation loss of its trial, in nats per token.
    Trials are kept in args.out/mmr-trials.json under key. The student itself stays as it is."""
    path = os.path.join(args.out, "mmr-trials.json")
    stored = nano.read_json(path, dict) if os.path.exists(path) else {}
    # Trials of another run are forgotten.
    trials = stored["trials"] if stored.get("key") == key else []
    known = [trial["layer"] for trial in trials]
    todo = [layer for layer in attention_layers(student.config) if layer not in known]
    *training, judging = trial_batches(args, run)
    # Of many processes each tries a layer of its own, with a whole student.
    with tqdm(total=len(todo), desc="MMR", unit="layer") as bar:
        while todo:
            losses = {}
            for layer in own_part(todo[:processes()]):
                losses[layer] = trial_loss(args, run, student, layer, training, judging)
            trials += [{"layer": layer, "loss": loss} for layer, loss in union(losses).items()]
            once(nano.write_json, path, {"key": key, "trials": trials})
            todo = todo[processes():]
            bar.update(processes())
    return trials


def trial_batches(args, run):
    """-> args.probe_steps TaughtBatches to train on, and a last one that only measures."""
    stream = batches(run.block, args.batch)
    texts = [*itertools.islice(stream, args.probe_steps), run.fixed]
    room = args.ctx if args.pack else 0
    return [taught_batch(run, examples, room) for examples in texts]


def trial_loss(args, run, student, layer, training, judging):
    """Convert this layer of a copy of the student, distil it on the training batches -> its loss on judging."""
    # The same fresh parts for every candidate.
    torch.manual_seed(args.seed)
    trial = clone(student, args.train)
    with autocast(run.device, run.dtype):
        convert(trial, run.teacher, [layer], args.init, run.calibration)
    set_trained(trial, args.train, args.recompute)
    optimizers = make_optimizers(trial, args.lr, args.optimizer, args.lr_rest)

    def loss_of(batch):
        head = trial.lm_head
        teacher_head = run.teacher.lm_head
        with autocast(run.device, run.dtype):
            x = trained_hidden(trial, batch.texts)
            loss = distillation_loss(x, batch.teacher_x, head, teacher_head, args.loss)
        return loss / len(x)

    for step, batch in enumerate(training):
        loss_of(batch).backward()
        # Full rate from the third step on: a trial is too short for a real warm-up and for a decay.
        rate = args.lr * min(1.0, (step + 1) / 3)
        with autocast(run.device, run.dtype):
            clipped_step(trial, optimizers, rate)
    with torch.no_grad():
        return loss_of(judging).item()


# ----------------------------------------------------------------------------------------------------------------------
# Distillation.
#
# --loss, the optimiser and the loop of train_sft.py, and nothing else. What the paper tried without gain: freezing
# layers, warming the new mixers up alone, matching their outputs layer by layer. "Mamba in the Llama" (arXiv
# 2408.15237) freezes the MLPs at first; here everything trains from the first step, because the kept layers must learn
# to read a new neighbour.
#
# What the start is worth, where seven of ten layers that count are replaced (results/README.md, "The claims": 400
# steps at 1e-3, means of three seeds; KL at the end in nats a token):
#       calibrated    aligned    plain    random    mixer removed
#       0.162         0.252      0.255    0.306     0.482
# While much attention is left the others fill in, and a start matters little. It matters more, the more layers go and
# the fewer steps there are.

def distill(args, run, student, progress, start):
    """Train the student for args.steps steps. -> log entries, one per step, see train_sft.fit.
    start: see curve_watch."""
    teacher = share_out(run.teacher, run.device, run.dtype)

    def loss_of(model, batch):
        return batch_loss(model, teacher, batch, args.loss)

    plan = Plan(steps=args.steps, lr=args.lr, warmup=args.warmup, every=25, log_every=1, name="kl",
                optimizer=args.optimizer, lr_rest=args.lr_rest, room=args.ctx if args.pack else 0,
                accumulate=args.accumulate, watch=curve_watch(args, run, student, start) if args.curve else None)
    log = fit(student, loss_of, run.block, args.batch, plan, progress, run.device, run.dtype)
    take_back(run.teacher, teacher)
    return log


def clone(model, train):
    """-> an independent copy; with train "mixers" the weights that stay frozen (all but those of Mamba mixers) are
    shared. deepcopy asks its memo before it copies an object: what is entered there stands for itself."""
    mixers = mamba_names(model)
    share = {}
    for name, p in model.named_parameters():
        if train == "mixers" and name not in mixers:
            share[id(p)] = p
    return copy.deepcopy(model, memo=share)


@torch.no_grad()
def share_frozen(student, teacher):
    """Let frozen weights of a student that was loaded be the teacher's, where they are equal: an earlier stage that
    trained mixers has left them so."""
    theirs = dict(teacher.named_parameters())
    mixers = mamba_names(student)
    for name, p in student.named_parameters():
        if name not in mixers and torch.equal(p, theirs[name]):
            p.data = theirs[name].data


def set_trained(student, train, recompute=False):
    """Say which weights get gradients: all, or those of the Mamba mixers. Trained weights are float32 (autocast makes
    the products cheap). recompute: compute each layer again in the backward pass, see train_sft's memory plan."""
    mixers = mamba_names(student)
    for name, p in student.named_parameters():
        p.requires_grad_(train == "all" or name in mixers)
        if p.requires_grad:
            p.data = p.data.float()
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError("--train mixers: there is no Mamba mixer to train "
                        "(--init identity needs --train all)")
    student.recompute = recompute
    return student


def first_student(args, teacher):
    """-> the model that this stage starts from, and the layers that are replaced in it already, in order.
    Raises UserError if args.student cannot be a student of this teacher, or --d-state does not fit."""
    if args.student:
        weight = teacher.embed_tokens.weight
        student = nano.load_pretrained(args.student, weight.device, weight.dtype)
        check_student(args, student.config, teacher.config)
        if args.train == "mixers":
            share_frozen(student, teacher)
    else:
        student = clone(teacher, args.train)
    d_state = choose_d_state(student.config, args.d_state)
    student.config = replace(student.config, d_state=d_state)
    pairs = zip(student.config.layout, teacher.config.layout)
    done = [i for i, (kind, original) in enumerate(pairs) if kind != original]
    # The layout knows which layers went, the report also in which order: it is trusted only if both agree.
    report = os.path.join(args.student or "", "report.json")
    if args.student and os.path.exists(report):
        known = nano.read_json(report, dict).get("replaced")
        if isinstance(known, list) and set(known) == set(done) and len(known) == len(done):
            return student, known
    return student, done


def check_student(args, student, teacher):
    """Raise UserError unless these configs differ in nothing but the layout and Mamba's own sizes: a transformer has
    none."""
    free = {"layout", *(key for key, _ in nano.mixer_keys().values())}
    for field in fields(nano.Config):
        ours = getattr(student, field.name)
        theirs = getattr(teacher, field.name)
        if field.name not in free and ours != theirs:
            raise UserError(f"{args.student} is not a student of {args.teacher}: {field.name} is {ours}, "
                            f"not {theirs}")


# ----------------------------------------------------------------------------------------------------------------------
# What a student is worth. All of it is measured on held-out texts, of the teacher too:
#
#   KL, loss, top-1    both read the same text; at each of its trained tokens, the divergence that is distilled (always
#                      reverse KL, whatever --loss trains), the loss of the token itself, and is the most likely token
#                      the same one?
#   agreement          both write, greedily, what follows the text's first prompt. Of the teacher's first 64 tokens
#                      (fewer if it ends sooner; the end counts as a token), the share before the first difference
#   retrieval          one sentence among others holds a code; it is asked for, and must stand in the answer
#   exact match        of built-in problems, the share whose answer is right to the letter
#
# The first kind is precise and cheap, and flatters: the text keeps the student on the teacher's path, and most tokens
# do not need what lies far back. Hybrids that were close by likelihood have been far behind by generation (arXiv
# 2603.26556), so the others let both write by themselves, and retrieval asks for what a state of fixed size must lose.
# Its sentences come from below and are in no training text; with a code of four digits, luck finds one in 9000.

AGREEMENT_TOKENS = 64
RETRIEVAL_LENGTHS = (256, 1024, 2048)                    # tokens of the prompt
WHO = ("The baker|A sailor|My neighbour|The teacher|An old farmer|The painter|A tired nurse|"
       "The captain").split("|")
DID = ("walked to|looked at|talked about|waited near|painted|cleaned|remembered|"
       "drove past").split("|")
WHAT = ("the harbour|the old bridge|a small garden|the market|the empty station|a wooden house|"
        "the river|the school").split("|")
WHEN = ("in the morning|after lunch|on Monday|before the rain|last summer|with a friend|"
        "for an hour|at night").split("|")


@torch.no_grad()
def teacher_forced(run, student):
    """Means over the trained tokens of the held-out texts. -> {"kl": nats, "loss": [teacher's, student's] in nats,
    "top1": share of tokens}. The teacher reads them once for all students."""
    if "held out" not in run.asked:
        run.asked["held out"] = [taught_batch(run, examples) for examples in run.held_out]
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for texts, teacher_x in run.asked["held out"]:
        wanted = texts.targets[texts.targets >= 0]                           # (m)
        with autocast(run.device, run.dtype):
            x = trained_hidden(student, texts)
            for part in few_positions(student.lm_head, len(wanted)):
                logits = student.lm_head(x[part])
                sums += compared(logits, run.teacher.lm_head(teacher_x[part]), wanted[part])
        count += len(wanted)
    kl, teacher_loss, student_loss, same = (sums / max(1, count)).tolist()
    return {"kl": kl, "loss": [teacher_loss, student_loss], "top1": same}


def compared(logits, teacher_logits, targets):
    """(m, vocab_size) twice, targets (m) -> sums: [KL, the teacher's loss, the student's, equal most likely tokens]."""
    kl = kl_divergence(logits, teacher_logits).sum()
    losses = []
    for each in (teacher_logits, logits):
        losses.append(torch.nn.functional.cross_entropy(each.float(), targets, reduction="sum"))
    same = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    return torch.stack([kl, *losses, same]).cpu()


def continuations(run, model, note):
    """What model writes by itself after the first prompt of each held-out text. -> lists of ids; -1 is the end."""
    written = []
    for examples in tqdm(run.held_out, desc=note, leave=False):
        # At least one token is given.
        prompts = [ids[:max(1, trained.index(True))] for ids, trained in examples]
        for ids in model.generate(prompts, AGREEMENT_TOKENS):
            written.append(ids if len(ids) == AGREEMENT_TOKENS else [*ids, -1])
    return written


def agreement(wanted, written):
    """Two lists of lists of ids -> the mean share of a wanted one before it and the written one first differ."""
    shares = []
    for theirs, ours in zip(wanted, written, strict=True):
        same = 0
        while same < min(len(theirs), len(ours)) and theirs[same] == ours[same]:
            same += 1
        shares.append(same / len(theirs))
    return sum(shares) / max(1, len(shares))


def hidden_code(codec, length, number):
    """Problem number `number` whose prompt has `length` tokens, or as many less as one more sentence would take. Its
    steps are how the answer begins. The code's place in the text moves on by the golden ratio: the first few problems
    spread it evenly."""
    rng = random.Random(f"hidden code {length} {number}")
    thing = rng.choice(THINGS)
    code = str(rng.randint(1000, 9999))
    place = (0.1 + number * 0.618034) % 1
    ask = f"What is the secret code of the {thing}?"
    fact = f"The secret code of the {thing} is {code}."
    sentences = []
    question = ""
    while True:
        at = round(place * len(sentences))
        text = " ".join([*sentences[:at], fact, *sentences[at:]])
        # Asked twice: at 2048 tokens SmolLM2 found 6 of 8 codes so, and 1 of 4 (other ones) when asked at the end.
        longer = f"{ask}\n\n{text}\n\n{ask}"
        prompt = codec.chat.prompt([{"role": "user", "content": longer}])
        if question and len(codec.enc.encode(prompt, allowed_special="all")) > length:
            beginning = fact.removesuffix(f" {code}.")
            return Problem(f"code in {length} tokens", question, beginning, code)
        question = longer
        words = [rng.choice(choices) for choices in (WHO, DID, WHAT, WHEN)]
        sentences.append(f"{' '.join(words)}.")


def code_example(codec, length, number):
    """hidden_code as an example of train_sft: prompt and answer, the code alone trained."""
    problem = hidden_code(codec, length, number)
    prompt = codec.chat.prompt([{"role": "user", "content": problem.question}])
    return encode_parts(codec, [(prompt + problem.steps, False), (f" {problem.answer}", True)])


def how_many_codes(args, codec):
    """--retrieval, or what it is by default. Raises UserError where nothing can be asked."""
    if args.retrieval or args.rank == "loo-retrieval":
        hidden_code(codec, 0, 0)
    if args.retrieval is None:
        return 3 if args.data and codec.chat.refusal is None else 0
    return args.retrieval


def retrieval(args, run, model, note):
    """-> {length: share of args.retrieval codes that stand in the model's answer}; {} for none. Lengths that the
    teacher was not trained for are left out."""
    shares = {}
    for length in RETRIEVAL_LENGTHS if args.retrieval else ():
        if length <= run.teacher.config.max_length:
            problems = [hidden_code(run.codec, length, number) for number in range(args.retrieval)]
            texts = solve(model, run.codec, problems, batch=8, max_new_tokens=32, note=note)
            found = 0
            for problem, text in zip(problems, texts):
                found += problem.answer in re.findall(r"\d+", text)
            shares[length] = found / len(problems)
    return shares


def ask_teacher(run, question, ask):
    """ask(model, note) of the teacher, which is asked each question once, however many stages there are."""
    if question not in run.asked:
        run.asked[question] = ask(run.teacher, f"teacher: {question}")
    return run.asked[question]


def evaluate(args, run, student):
    """All measures of a finished student. -> report entries, and the lines of a table: teacher, student."""
    forced = teacher_forced(run, student)

    def write(model, note):
        return continuations(run, model, note)

    def find_codes(model, note):
        return retrieval(args, run, model, note)

    wanted = ask_teacher(run, "continuations", write)
    same = agreement(wanted, write(student, "student: continuations"))
    found = ask_teacher(run, "retrieval", find_codes)
    found_by_student = find_codes(student, "student: retrieval")
    codes = {length: [share, found_by_student[length]] for length, share in found.items()}
    result = {"kl_last": forced["kl"], "next_token_loss": forced["loss"], "top1": forced["top1"],
              "agreement": same, "retrieval": codes}
    rows = {"KL to the teacher": [0, forced["kl"]], "next-token loss": forced["loss"],
            "equal top-1 tokens": [1, forced["top1"]], "greedy agreement": [1, same]}
    rows |= {f"code in {length} tokens": shares for length, shares in codes.items()}
    lines = [f"{name:22}{shares[0]:10.4f}{shares[1]:10.4f}" for name, shares in rows.items()]
    solved, more = exact_match(args, run, student)
    return result | solved, [*lines, *memory_lines(run.teacher, student), *more]


def memory_lines(teacher, student):
    """What a text costs: bytes that grow with it and bytes that do not. -> lines of the table."""
    # States for one text of one token.
    cache, state = teacher.new_state(1, 1).nbytes()
    student_cache, student_state = student.new_state(1, 1).nbytes()
    return [f"{'cache bytes per token':22}{cache:10}{student_cache:10}",
            f"{'state bytes per text':22}{state:10}{student_state:10}"]


def exact_match(args, run, student):
    """Let both solve the held-out problems. -> report entries, and lines of the table.
    Problems of the test split, which neither training nor ranking ever sees; with --data no answer can be checked."""
    result = {"teacher_accuracy": None, "student_accuracy": None, "accuracy_by_family": None}
    if args.data:
        return result, []
    problems = problem_set("test", args.eval)

    def solve_them(model, note):
        return solve(model, run.codec, problems, note=note)

    teacher_texts = ask_teacher(run, "problems", solve_them)
    student_texts = solve_them(student, "student: problems")
    by_teacher, teacher_all = accuracy(problems, teacher_texts)              # shares, 0 to 1
    by_student, student_all = accuracy(problems, student_texts)
    by_family = {family: [by_teacher[family], by_student[family]] for family in by_teacher}
    lines = []
    for name, shares in (by_family | {"all problems": [teacher_all, student_all]}).items():
        lines.append(f"{name:22}{shares[0]:10.3f}{shares[1]:10.3f}")
    result["teacher_accuracy"] = teacher_all
    result["student_accuracy"] = student_all
    result["accuracy_by_family"] = by_family
    return result, lines + one_problem(problems, teacher_texts, student_texts)


def one_problem(problems, teacher_texts, student_texts):
    """-> lines: a long problem and what both wrote, traces included, at most 600 characters of each. Numbers alone hide
    what kind of mistake is made."""
    first = problems[:30]
    longest = max(first, key=lambda problem: len(problem.steps))
    i = first.index(longest)
    return ["", f"problem   {longest.question}", f"expected  {longest.answer}",
            f"teacher   {teacher_texts[i][:600]}", f"student   {student_texts[i][:600]}"]


# --curve measures a run on its way, from before its first step on: how good is a student after how much work? The time
# of measuring is not counted, that of making the start (calibration, alignment) is.

def curve_watch(args, run, student, start):
    """-> the watch of train_sft.Plan, which adds a point to progress.curve every args.curve steps and at the end.
    start: (seconds, processor's seconds, tokens) that the start has taken."""
    problems = problem_set("dev", args.curve_eval) if args.curve_eval else []

    def watch(progress):
        due = progress.step % args.curve == 0 or progress.step == args.steps
        known = progress.curve and progress.curve[-1]["step"] == progress.step
        if known or not due:
            return
        share = None
        if problems:
            _, share = accuracy(problems, solve(student, run.codec, problems, note="curve"))
        kl = teacher_forced(run, student)["kl"]
        progress.curve.append({
            "step": progress.step, "tokens": start[2] + progress.tokens,
            "seconds": round(start[0] + progress.seconds, 1),
            "cpu_seconds": round(start[1] + progress.cpu_seconds, 1),
            "kl": kl, "accuracy": share, "problems": len(problems)})
        solved = "" if share is None else f", exact match {share:.3f}"
        tqdm.write(f"after {progress.step} steps: KL {kl:.4f}{solved}")
    return watch


# ----------------------------------------------------------------------------------------------------------------------
# One stage, from the ranking to the saved checkpoint.
#
# The paper's family is a chain of stages: 25, 27, 30, 34, 37, 40 layers. Each starts from the weights of the one
# before, and learns from the original teacher, never from the previous student: errors are not handed down.
# A few layers at a time keep the student close to the teacher, so that its scores mean something for the next choice.
# A member costs the tokens of all stages before it, too: 137 billion for the paper's H-40, 26 billion for its H-25.

class Run(NamedTuple):
    """What all stages of a run have in common."""
    teacher: nano.HybridLM
    codec: object                                        # tokenizer and template, see train_sft.Codec
    device: torch.device
    dtype: torch.dtype                                   # of matrix products
    block: object                                        # (number, count) -> training examples, see train_sft.batches
    probe: list                                          # lists of examples for LOO
    fixed: list                                          # one batch that judges MMR's trials
    calibration: list                                    # pairs (tokens, real), see calibrate
    content: dict                                        # fingerprints of teacher and data
    held_out: list                                       # lists of examples to measure a student on
    asked: dict                                          # the teacher's side of it, see ask_teacher


# The flags that a result depends on. Not among them: where it is written, on which device it runs, and --eval, which
# only looks. Nor the paths of teacher, student and data: what counts is what is in them.
FLAGS = ("replace", "rank", "traces", "init", "d_state", "loss", "train", "align_steps", "steps",
         "probe_steps", "batch", "accumulate", "ctx", "pack", "optimizer", "align_lr", "lr", "lr_rest", "warmup",
         "probe", "seed", "dtype")


# What else a user may do with a result of other flags.
ANOTHER_START = ", or go on with --student"


def depends_on(args, run, student):
    """-> everything that the result of a stage depends on, as JSON values, under names for the user.
    A run is continued, a finished stage kept, and a ranking reused only if it is still the same."""
    flags = {flag: getattr(args, flag) for flag in FLAGS}
    start = weights_hash(student) if args.student else None
    order = None
    if args.rank not in RANKS:
        # A file counts by what is in it, wherever it lies.
        order = file_hash(args.rank)
        flags["rank"] = "a file"
    return flags | run.content | {"content of --student": start, "content of --rank": order}


def stage(args, run, began):
    """Replace up to args.replace layers, distil, evaluate, save args.out. Prints a table, then the report as JSON.
    began: when the work for this stage began, in seconds as time.time() gives them. The last line that is printed can
    be read by a machine, unless the stage is kept. Raises UserError if the ranking does not name enough layers."""
    torch.manual_seed(args.seed)
    student, done = first_student(args, run.teacher)
    depends = depends_on(args, run, student)
    if args.resume and nano.is_finished(args.out, depends, args.overwrite, or_else=ANOTHER_START):
        return
    # What cannot be converted is found out before the ranking.
    attention = attention_layers(student.config)
    converted_config(student.config, run.teacher.config, attention[:1], args.init)
    new, scores = choose_layers(args, run, student, done)
    # Fresh parts do not depend on the ranking.
    torch.manual_seed(args.seed)
    seconds = -time.time()
    cpu_seconds = -time.process_time()
    with autocast(run.device, run.dtype):
        convert(student, run.teacher, new, args.init, run.calibration)
    start = (seconds + time.time(), cpu_seconds + time.process_time())
    print(f"replaced now: {' '.join(map(str, new))}\nlayout: {' '.join(student.config.layout)}")
    depends_too = depends | {"replaced": done + new}
    seconds = time.time()
    aligned = align(args, run, student, new, depends_too)
    # Its seconds are those of all parts of an interrupted run, of which this one may have done none.
    began += time.time() - seconds - aligned.seconds
    start = (start[0] + aligned.seconds, start[1] + aligned.cpu_seconds, aligned.tokens)
    set_trained(student, args.train, args.recompute).train()

    file = os.path.join(args.out, "progress.safetensors")
    progress = Progress(file, depends_too, args.resume)
    # Also in a run that is continued: the student is made again, and its training loaded into it afterwards.
    kl_first = teacher_forced(run, student)["kl"]
    prepared = time.time()
    log = distill(args, run, student, progress, start)
    done_training = time.time()

    # As it will be saved: mixers that trained in float32 beside weights in bfloat16 take their dtype.
    nano.cast(student.eval(), run.device, student.embed_tokens.weight.dtype)
    result, table = evaluate(args, run, student)
    once(nano.save_pretrained, student, args.out, tokenizer_from=args.teacher)
    # progress.seconds is the time of all parts of an interrupted run.
    seconds = prepared - began + progress.seconds + time.time() - done_training
    report = {
        "replaced": done + new, "layout": list(student.config.layout), "kl_first": kl_first,
        **result, "steps": args.steps, "tokens": aligned.tokens + progress.tokens,
        "seconds": round(seconds, 1), "seed": args.seed}
    extra = {"args": vars(args), "run": depends, "scores": scores, "align_log": aligned.log, "log": log,
             "curve": progress.curve, "start_seconds": start[:2]}
    path = os.path.join(args.out, "report.json")
    once(nano.write_json, path, report | extra | provenance(run.device))
    once(aligned.remove)
    once(progress.remove)
    print(f"{'':22}{'teacher':>10}{'student':>10}")
    table[0] += f"   (before distillation {kl_first:.4f})"
    print(*table, sep="\n")
    if args.steps and report["kl_last"] > kl_first:
        print("warning: training made it worse than it started: try a lower --lr, or more --steps")
    print(f"saved {args.out}; talk to it: python sample.py --model {args.out} --chat")
    print(json.dumps(report), flush=True)


def choose_layers(args, run, student, done):
    """-> the layers to replace in this stage, the least important of those left, and their scores (or None).
    done: the layers replaced before, which count towards --replace."""
    missing = args.replace - len(done)
    if missing == 0:
        return [], None
    if missing < 0:
        raise UserError(f"--replace {args.replace}: {len(done)} layers are replaced already")
    order, scores = rank_layers(args, run, student)
    if missing > len(order):
        raise UserError(f"--replace {args.replace}: {len(done)} layers are replaced already and "
                        f"{args.rank} names {len(order)} more")
    return order[:missing], scores


# ----------------------------------------------------------------------------------------------------------------------
# The command line.
#
# Order matters in main: first what needs no file (plan_stages), then the teacher, the data, and the claim on every
# directory of the run, and only then work. What is wrong in the last of six stages is reported before the first, as far
# as flags and files tell.

RANKS = ("auto", "loo", "loo-retrieval", "mmr", "first", "last", "random", "apriel15b")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    # What becomes what.
    add("--replace", type=int, default=25, help="attention layers to replace, in all (default 25)")
    add("--stages", help="several values of --replace, as 25,27,30: one checkpoint each, from the "
        "last")
    add("--teacher", default="teacher", help="directory of the original (default: teacher)")
    add("--student", help="start from this hybrid, an earlier stage (default: the teacher itself)")
    add("--out", help="directory for the result; with --stages, the one above (default: out/hN; an "
        "--init other than the default adds its name)")
    add("--rank", default="auto", help=f"which layers first: {', '.join(RANKS)}, or a JSON file of "
        "layers (loo.json, mmr.json, a report); auto: loo, and mmr with --student; loo-retrieval: "
        "by hidden codes (default auto)")
    inits = "; ".join(f"{name}: {what}" for name, what in INITS.items())
    add("--init", default="calibrated", choices=tuple(INITS),
        help=f"of a mixer. {inits} (default calibrated)")
    add("--d-state", type=int, help="memory cells per channel of the new mixers, a divisor of the "
        "teacher's head_dim (default 16, or the largest one below)")
    # What it learns from.
    add("--data", help="JSONL file, plain or .gz: prompt/response, messages or conversations "
        "(default: the built-in traces)")
    add("--held-out", metavar="FILE", help="another such file, to judge by; its prompts are not "
        "trained (default: all answers to every 50th prompt of --data)")
    add("--traces", default="reasoning", choices=("reasoning", "generic"), help="built-in texts to "
        "distil on; generic: facts without question or reasoning (default reasoning)")
    add("--ctx", type=int, default=512, help="longest text in tokens (default 512)")
    add("--pack", action="store_true", help="let texts share rows of up to --ctx tokens: same "
        "loss, less padding")
    add("--probe", type=int, default=48, help="problems per family for LOO, or --data examples "
        "(default 48)")
    add("--eval", type=int, default=200, help="held-out problems per family at the end; with "
        "--data, held-out examples at most (default 200)")
    add("--retrieval", type=int, help="hidden codes to ask for at the end, so many in texts of "
        "256, 1024 and 2048 tokens each (default: 3 with --data, else 0: none)")
    add("--curve", type=int, default=0, help="steps between two looks at the KL (default 0: none)")
    add("--curve-eval", type=int, default=0, help="... and at so many problems per family (default 0)")
    training_flags(add)
    return p.parse_args()


def training_flags(add):
    """The second half of parse_args."""
    # How it learns.
    add("--loss", default="reverse_kl", choices=("reverse_kl", "forward_kl"),
        help="default reverse_kl")
    add("--train", default="auto", choices=("auto", "all", "mixers"),
        help="which weights train; auto: all if that fits, see --dry-run (default auto)")
    add("--align-steps", type=int, default=0, help="steps before those of --steps in which the new mixers "
        "learn their attention's output (default 0)")
    add("--steps", type=int, default=100, help="optimiser steps of a stage; 0: convert, evaluate and "
        "save (default 100)")
    add("--probe-steps", type=int, default=6, help="optimiser steps of an MMR trial (default 6)")
    add("--batch", type=int, default=24, help="texts per step (default 24)")
    add("--accumulate", type=int, default=1, metavar="K",
        help="make a step of K batches, one after the other; not in MMR trials (default 1)")
    add("--optimizer", default="auto", choices=("auto", "muon", "adamw"), help="muon: for layers' "
        "matrices; auto: adamw if --batch * --accumulate * --ctx < 16 times the model's width "
        "(default auto)")
    add("--lr", type=float, help="peak learning rate (default 5e-4 with muon, 1e-4 with adamw)")
    add("--align-lr", type=float, default=1e-3, help="that of --align-steps (default 0.001)")
    add("--lr-rest", type=float, help="that of all but Mamba mixers (default: --lr, or 1e-5 "
        "where that is chosen, too, and adamw)")
    add("--warmup", type=int, default=10, help="steps of linear warm-up (default 10)")
    # How it is computed.
    add("--seed", type=int, default=0, help="random seed (default 0)")
    add("--threads", type=int, help="CPU threads (default: 1 for a small model, else all cores)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")
    add("--dtype", default="auto", help="of products: auto, float32 or bfloat16 (default auto)")
    plan_flags(add)
    add("--resume", action="store_true", help="continue an interrupted run in --out, with the same "
        "flags")
    add("--overwrite", action="store_true", help="replace a finished result in --out")


def plan_stages(args):
    """The flags -> a list of argument sets, one per stage. Checks what can be checked without any file.
    Raises UserError. With --stages every stage continues what it finds: the command can simply be given again."""
    if args.align_steps and args.init == "identity":
        raise UserError("--align-steps trains new mixers, and --init identity makes none")
    for name in ("align_steps", "curve"):
        if getattr(args, name) and processes() > 1:
            raise UserError(f"--{name.replace('_', '-')} works in a single process, without torchrun")
    counts = ("replace", "probe_steps", "batch", "accumulate", "ctx", "probe", "eval", "d_state", "threads")
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("steps", "align_steps", "retrieval", "curve", "curve_eval", "warmup"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {value}")
    if args.curve_eval and (args.data or not args.curve):
        raise UserError("--curve-eval belongs to --curve and the built-in problems")
    check_rates(args.lr, args.lr_rest)
    if not 0 < args.align_lr < math.inf:
        raise UserError(f"--align-lr must be above 0, got {args.align_lr}")
    if args.rank not in RANKS and not os.path.exists(args.rank):
        raise UserError(f"--rank {args.rank}: neither one of {', '.join(RANKS)} nor a file")
    if args.held_out and not args.data:
        raise UserError("--held-out belongs to --data; the built-in problems bring their own")
    if args.data and args.traces != "reasoning":
        raise UserError("--traces chooses among the built-in texts; --data brings its own")
    # A control must not land in the directory of the result that it is compared with.
    suffix = "" if args.init == "calibrated" else f"-{args.init}"
    if not args.stages:
        out = args.out or os.path.join("out", f"h{args.replace}{suffix}")
        return [change(args, out=out, rank=first_rank(args.rank, args.student))]
    stages = []
    student = args.student
    above = os.path.expanduser(args.out or "out")
    for count in stage_counts(args.stages):
        out = os.path.join(above, f"h{count}{suffix}")
        rank = first_rank(args.rank, student)
        # --overwrite starts afresh; with --resume, too, it goes on.
        again = args.resume or not args.overwrite
        stages.append(change(args, replace=count, student=student, out=out, rank=rank, resume=again))
        # A stage starts from the one before it.
        student = out
    return stages


def change(args, **values):
    """-> a copy of args with these values."""
    return argparse.Namespace(**vars(args) | values)


def first_rank(rank, student):
    """What --rank auto means: LOO misleads once a student has lost some of its attention."""
    if rank != "auto":
        return rank
    return "mmr" if student else "loo"


def stage_counts(text):
    """"25,27,30" -> [25, 27, 30]. Raises UserError."""
    try:
        counts = [int(n) for n in text.split(",")]
    except ValueError:
        raise UserError(f"--stages {text}: expected whole numbers with commas between them") from None
    if counts != sorted(set(counts)) or counts[0] < 1:
        raise UserError(f"--stages {text}: the numbers must grow")
    return counts


def main():
    """Check, load, then stage after stage. One teacher in memory serves them all."""
    began = time.time()
    args = parse_args()
    device, dtype, room = planned_for(args)
    stages = plan_stages(args)
    config = planned_config(args.teacher)
    check_teacher(args, config, stages[-1].replace)
    for each in stages:
        # Without new mixers nothing may move faster than the rest.
        adamw = (1e-4, None) if each.init == "identity" else (1e-4, 1e-5)
        choose_optimizer(each, config.d_model, muon=(5e-4, None), adamw=adamw)
    plans = memory_plans(change(stages[-1], student=args.student), config, device, dtype, room)
    if args.dry_run:
        return print_plans(list(plans))
    plan = choose_plan(plans)
    # What could train is float32 in each of many processes, see share_out.
    teacher = nano.load_pretrained(args.teacher, device, dtype).requires_grad_(False)
    codec = load_codec(args.teacher)
    block, probe, fixed, held_out = load_texts(args, codec, teacher.config.vocab_size)
    size = sum(p.numel() for p in teacher.parameters())
    for each in stages:
        each.train = plan.train
        each.recompute = plan.recompute
        each.out = once(claim_out, each.out, [each.teacher, each.student], args.overwrite, each.resume)
        each.retrieval = how_many_codes(each, codec)
    choose_threads(teacher, device, args.threads)
    print_start(stages[0], teacher, size, device, dtype)
    print(f"an example, trained part marked: {show_example(codec, block(0, 1)[0])}")
    content = {"content of --teacher": weights_hash(teacher), "content of --data": file_hash(args.data),
               "content of --held-out": file_hash(args.held_out),
               "content of the first texts": texts_hash(block)}
    calibration = calibration_texts(block, device, teacher.config)
    run = Run(teacher, codec, device, dtype, block, probe, fixed, calibration, content, held_out, {})
    check_made(stages, run)
    for each in stages:
        stage(each, run, began)
        # Loading counts for the first stage.
        began = time.time()


def check_made(stages, run):
    """Raise UserError if the result of any stage is there already, and of another run. Before the first stage: only
    what each starts from is not known yet."""
    for args in stages:
        depends = depends_on(change(args, student=None), run, None)
        del depends["content of --student"]
        if args.resume:
            nano.is_made(args.out, depends, args.overwrite, or_else=ANOTHER_START)


def check_teacher(args, config, most):
    """Raise UserError if a teacher of this config cannot become what the flags ask for; most: layers to replace."""
    attention = attention_layers(config)
    if most > len(attention):
        raise UserError(f"--replace {most}: {args.teacher} has {len(attention)} attention layers")
    if args.rank not in RANKS:
        read_order(args.rank, config.n_layer)
    if not args.student:
        start = replace(config, d_state=choose_d_state(config, args.d_state))
        converted_config(start, config, attention[:1], args.init)


def print_start(args, teacher, size, device, dtype):
    """What is about to happen, on what, and what it cannot keep."""
    layout = teacher.config.layout
    attention = layout.count("t")
    print(f"{args.teacher}: {size / 1e6:.2f} M parameters, {attention} attention layers; on {device}, "
          f"products in {dtype}; {nano.scan_backend_reason(device)}; training {args.train} "
          f"by {args.optimizer} at {args.lr:g}{', layers recomputed' if args.recompute else ''}")
    if attention < len(layout):
        print(f"note: {args.teacher} is no plain transformer: {len(layout) - attention} of its {len(layout)} "
              "layers have no attention. They stay as they are and do not count towards --replace")
    if args.init not in ("random", "identity"):
        print(f"Mamba layers start from attention; not carried over: {not_carried(teacher.config)}")


def load_texts(args, codec, n_vocab):
    """-> block: (number, count) -> training examples; probe: batches of examples for LOO; fixed: one batch, for MMR;
    held_out: batches to measure on, which neither trains nor has a say in which layers go. LOO and MMR may look at
    texts of --data that train: the one looks at the teacher, and the other's trials all train on the same ones."""
    if args.data:
        if args.held_out:
            training, held_out = read_apart(args.data, args.held_out, codec, args.ctx, n_vocab)
        else:
            training, held_out = read_jsonl(args.data, codec, args.ctx, n_vocab)
        block = list_block(training, args.seed)
        probe = training[:args.probe]
        fixed = training[-args.batch:]
        held_out = in_batches(held_out[:args.eval], args.batch)
    else:
        make = generic_block if args.traces == "generic" else trace_block
        block = make(codec, args.seed, args.ctx)
        # Refused now, not after the ranking.
        block(0, 1)
        probe = [encode_problem(codec, p) for p in problem_set("probe", args.probe)]
        fixed = [encode_problem(codec, p) for p in problem_set("probe", 16)]
        held_out = [[encode_problem(codec, p) for p in problem_set("dev", 16)]]
    return block, in_batches(probe, args.batch), fixed, held_out


def in_batches(examples, batch):
    """-> lists of `batch` examples of similar length, from short to long."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    return [examples[i:i + batch] for i in range(0, len(examples), batch)]


def calibration_texts(block, device, config, most=65536):
    """-> a list of (tokens (b, t), real (b, t): False at padding) for --init calibrated, see calibrate: its fit of
    d_inner unknowns wants 64 positions for each of them. They are of the training split, block 0, whatever the stage:
    nothing held out is looked at."""
    wanted = min(most, 64 * config.d_inner)
    texts = []
    for example in block(0, 512):
        if wanted > 0:
            texts.append(example)
            wanted -= len(example[0])
    longest = max(len(ids) for ids, _ in texts)
    pieces = []
    for examples in in_batches(texts, max(1, 4096 // longest)):
        tokens = collate(examples, device).tokens
        lengths = torch.tensor([len(ids) for ids, _ in examples], device=device)
        real = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        pieces.append((tokens, real))
    return pieces


def memory_plans(args, teacher, device, dtype, room):
    """Yields the MemoryPlans of --train, the most wanted first. args: those of the stage that replaces most layers;
    teacher: its Config."""
    trains = [args.train]
    if args.train == "auto":
        # Without a mixer there is none to train.
        trains = ["all"] if args.init == "identity" else ["all", "mixers"]
    with torch.device("meta"):
        frozen_head = torch.nn.Linear(teacher.d_model, teacher.vocab_size, bias=False, dtype=dtype)
    frozen_head.requires_grad_(False)
    for train in trains:
        stage_args = change(args, train=train, ctx=longest_text(args, teacher.vocab_size))
        student, others = outlines(stage_args, teacher, dtype)
        heads = [student.lm_head, frozen_head]

        def loss(x, head, teacher_head):
            return distillation_loss(x, torch.empty_like(x, requires_grad=False), head, teacher_head, args.loss)

        for student.recompute in (False, True):
            yield memory_plan(student, others, loss, heads, stage_args, dtype, room,
                              device.type == "cuda", processes())


def outlines(args, config, dtype):
    """-> the student of a teacher of this config, as it will train but on the meta device, and {name: bytes} of all
    that does not train."""
    with torch.device("meta"):
        teacher = nano.cast(nano.HybridLM(config), "meta", dtype)
        student = clone(teacher, args.train)
        if args.student:
            student = nano.cast(nano.HybridLM(planned_config(args.student)), "meta", dtype)
        student.config = replace(student.config, d_state=choose_d_state(student.config, args.d_state))
        missing = args.replace - config.layout.count("t") + student.config.layout.count("t")
        layers = attention_layers(student.config)[:missing]
        # Random: there is nothing to copy.
        convert(student, teacher, layers, "identity" if args.init == "identity" else "random")
    whole = sum(p.nbytes for p in student.parameters())
    set_trained(student, args.train)
    shared = {id(p) for p in teacher.parameters()}
    own = [p.nbytes for p in student.parameters() if not p.requires_grad and id(p) not in shared]
    others = {"teacher": sum(p.nbytes for p in teacher.parameters()), "frozen weights of its own": sum(own)}
    if args.rank == "mmr" and args.train == "all":
        others["the student beside its trial"] = whole
    return student, {name: size for name, size in others.items() if size}


if __name__ == "__main__":
    run_together(main)
