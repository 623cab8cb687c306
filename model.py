"""
nanoH1: turn the attention layers of a finished transformer into Mamba layers (Apriel-H1, arXiv 2511.02651).

A transformer pays for attention twice: prefill costs O(length^2), and every generated token re-reads a key/value cache
that grows with each token before it. A selective state space layer (Mamba) keeps a state of fixed size instead. A
hybrid keeps attention where exact look-up is needed and lets Mamba do the rest. It need not be trained from nothing:
take a finished transformer, swap the attention layers that matter least for Mamba layers whose projections are copied
from them, and distil. Embeddings, norms and MLPs stay. This file holds the models; distill.py does the conversion.

      one block, before                               the same block, after
      x --+-- norm -- attention --(+)-- x'            x --+-- norm -- Mamba --(+)-- x'
          +------------------------+                      +--------------------+
      x' -+-- norm -- SwiGLU MLP --(+)-- out          x' -+-- norm -- MLP ----(+)-- out        (same MLP, same norms)

      inside Mamba: h is the normed input             copied from (MIL, "Mamba in Llama")
          z  = W_z h                    gate          fresh
          x  = silu(conv(W_x h))        value         W_v       (the conv is fresh)
          B  = W_B h                    write key     W_k
          C  = W_C h                    read query    W_q
          dt = softplus(W_dt h + bias)  step size     fresh
          y  = scan(x, dt, A, B, C)     memory        A fresh: -1 ... -d_state
          out = W_o (y * silu(z))                     W_o

The recurrence, for one channel with its d_state memory cells s and each token t:

      s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t        forget a little, write x under the key B
      y_t = C_t . s_t + D x_t                         read with the query C; D is a skip connection

Glossary. Sizes are lower case; capitals are the paper's letters, or the constants A and D.
      b, t          batch, tokens in this call        d_model       width of the residual stream (hidden_size)
      n_layer       blocks                            n_head, n_kv_head, head_dim    attention heads and their width;
      d_mlp         width inside the MLP                            n_head * head_dim need not equal d_model
      d_inner       channels of the Mamba layer, d    d_state, n    memory cells per channel
      d_xb          channels of x and B before they are repeated for every query head (as keys and values are in GQA)
      d_conv        taps of the short conv            dt_rank       rank of the projection that makes dt
      g             groups: channel c of d reads row c // (d // g) of B (and of C), so nothing is repeated in memory

Read it top to bottom: every name is defined before it is used. Where a function mirrors an upstream one, the commit is
named: Fast-LLM 7d61a1ba (the Apriel model code), state-spaces/mamba e9594ce1, MambaInLlama 60d64dc6.
"""
import contextlib
import datetime
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # waiting threads sleep: on a shared machine 10 times faster
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:                          # optional: without Triton the pure PyTorch scan does the work
    triton = None


class UserError(ValueError):
    """Something the user can put right (a path, a file, a flag). Scripts print it as one line and exit with code 2."""
    def __init__(self, message):
        # A name in a damaged file may hold line ends.
        super().__init__(" ".join(message.splitlines()))


# ----------------------------------------------------------------------------------------------------------------------
# Config: the shape of a model. Field by field the same as config.json (load and save below translate the names).

LAYER_KINDS = {
    "t": "attention and MLP",
    "m2": "Mamba and MLP",
    "i": "nothing: the whole layer passes its input on (part of the published format)",
    "n": "MLP only: the mixer was removed (this project's control experiment; other readers refuse it)",
}


@dataclass(frozen=True)
class Config:
    """Frozen: a model of another shape has another Config. Raises UserError for one that cannot be built."""
    vocab_size: int
    d_model: int                             # hidden_size
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_mlp: int                               # intermediate_size
    layout: tuple = ()                       # one LAYER_KINDS key per layer; empty means attention everywhere
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None        # attention sees this many newest tokens; None: all
    tie_embeddings: bool = False             # the output head is the embedding table
    bos_id: int | None = 1                   # begin-of-text token
    eos_ids: tuple = (2,)                    # tokens that end a text
    max_length: int = 4096                   # trained context in tokens; informative, not a limit
    # Mamba layers. None: the width that MIL needs, taken from the attention heads.
    d_inner: int | None = None               # n_head * head_dim
    d_xb: int | None = None                  # n_kv_head * head_dim
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int | None = None               # ceil(d_model / 16)
    expand_before_conv: bool = True          # ssm_cfg.repeat_kv_before_conv: conv over d_inner channels, or over d_xb
    conv_bias: bool = True
    dt_bias: bool = True
    proj_bias: bool = False                  # bias of in_proj, dt_in_proj and out_proj
    dt_min: float = 0.001                    # initialisation only: range of the step size dt of a new layer
    dt_max: float = 0.1
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)      # the way around frozen
        for name in ("vocab_size", "d_model", "n_layer", "n_head", "n_kv_head", "head_dim", "d_mlp", "sliding_window",
                     "d_inner", "d_xb", "d_state", "d_conv", "dt_rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} must be a positive whole number, got {value!r}")
        put("layout", tuple(self.layout) or ("t",) * self.n_layer)
        put("d_inner", self.d_inner or self.n_head * self.head_dim)
        put("d_xb", self.d_xb or self.n_kv_head * self.head_dim)
        put("dt_rank", self.dt_rank or math.ceil(self.d_model / 16))
        if len(self.layout) != self.n_layer:
            raise UserError(f"the layout names {len(self.layout)} layers, the model has {self.n_layer}")
        unknown = sorted({str(kind) for kind in self.layout} - set(LAYER_KINDS))
        if unknown:
            raise UserError(f"unsupported layer type {', '.join(unknown)}; known: {', '.join(LAYER_KINDS)}")
        mamba = ((self.d_inner, self.d_xb, "d_inner % d_xb"), (self.d_xb, self.d_state, "d_xb % d_state"))
        for big, small, name in ((self.n_head, self.n_kv_head, "n_head % n_kv_head"),
                                 (self.head_dim, 2, "head_dim % 2"), *(mamba if "m2" in self.layout else ())):
            if big <= 0 or small <= 0 or big % small:
                raise UserError(f"{name} must be 0, got {big} % {small}")


# ----------------------------------------------------------------------------------------------------------------------
# RMSNorm, rotary positions, SwiGLU: the parts that the conversion leaves alone.

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        """x (..., dim) -> x / rms(x) * weight. In float32 (at least), cast back, then scaled, as Mistral does it."""
        wide, n = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1]
        # Generating on a CPU is bound by the number of operations. rms_norm is nine there, layer_norm one; (x, -x) has
        # mean 0 and the mean square of x as its variance, so layer_norm does the same to it.
        if wide.is_cpu and not torch.is_grad_enabled():
            y = F.layer_norm(torch.cat([wide, -wide], dim=-1), (2 * n,), eps=self.eps)[..., :n]
        else:
            y = F.rms_norm(wide, (n,), eps=self.eps)
        return y.to(x.dtype) * self.weight


def rotary(x, cos, sin):
    """x (b, t, heads, head_dim), cos and sin (1 or b, t, 1, head_dim): turn each pair (i, i + head_dim / 2), the
    split-half layout of Llama and Mistral. x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin: rolling by half a head swaps
    x1 and x2, and sin's first half holds the minus (three operations, for decoding is bound by their number)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), (..., d_model) -> (..., d_mlp) -> (..., d_model). One token at a time."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)
        self.joined = None                   # gate and up as one matrix, see join_projections

    def forward(self, x):
        if self.joined is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = F.linear(x, self.joined).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


# ----------------------------------------------------------------------------------------------------------------------
# Where the tokens of one call stand.
#
# One forward serves everything: a whole sequence, a prompt in pieces, one token. What differs is only how many tokens
# the state already holds (`past`) and where each row's document began. Documents matter twice: several may be packed
# into one row, and prompts of different length are padded on the left, where the padding is simply an earlier document
# of its own. `reset` marks each document's first token; from it come positions (attention turns by them, the conv and
# the scan forget at position 0) and the attention mask. With one document per row all that is None and costs nothing.

class Place(NamedTuple):
    past: int                                # tokens in the state before this call
    pos: torch.Tensor | None                 # (b, t) position within the document; None: past ... past + t - 1
    cos: torch.Tensor                        # (1 or b, t, 1, head_dim), as rotary takes them
    sin: torch.Tensor
    mask: torch.Tensor | None                # (1 or b, 1, t, past + t) True where the query may look; None: causal


def make_place(config, tokens, past, origin, reset, dtype):
    """-> (Place, origin). origin (b,) is the index in the cache at which each row's current document began, or None."""
    (b, t), device = tokens.shape, tokens.device
    index, pos = torch.arange(past, past + t, device=device), None           # (t) places in the cache
    if reset is not None or origin is not None:
        first = torch.zeros(b, t, dtype=torch.long, device=device) if origin is None else origin[:, None].expand(b, t)
        if reset is not None:                                                # newest document start at or before t
            first = torch.maximum(first, torch.where(reset, index, 0).cummax(dim=1).values)
        pos, origin = index - first, first[:, -1]                            # (b, t), (b)
    where = (index if pos is None else pos)[..., None].float()
    freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    angle = (where * freq).view(-1, t, 1, config.head_dim // 2)
    window, mask = config.sliding_window, None
    sees_all = t == 1 or past == 0                                           # SDPA has these two cases built in
    if pos is not None or not sees_all or (window is not None and past + t > window):
        back = index[:, None] - torch.arange(past + t, device=device)        # (t, past + t): how far back each key is
        mask = back >= 0
        if window is not None:
            mask = mask & (back < window)
        mask = mask[None] if pos is None else mask & (back <= pos[..., None])
        mask = mask[:, None]                                                 # (1 or b, 1, t, past + t)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return Place(past, pos, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1), mask), origin


# ----------------------------------------------------------------------------------------------------------------------
# Grouped-query attention with a key/value cache.
#
# Several query heads share one key and one value head: the cache, and with it the traffic of decoding, shrinks by
# n_head / n_kv_head (4 at the 15B shape). Still, a layer keeps 2 * n_kv_head * head_dim numbers of every token and
# reads them all for each new one: that is the cost the conversion removes. Keys are kept as rotated.

class KV(NamedTuple):
    """The cache of one attention layer."""
    k: torch.Tensor                          # (b, max_length, n_kv_head, head_dim), filled up to the state's position
    v: torch.Tensor


def extend(cache, new, past):
    """Append new (b, t, ...) to cache (b, max_length, ...) at `past`: in place, or as a copy if gradients flow."""
    if cache.shape[1] < past + new.shape[1] or (torch.is_grad_enabled() and (new.requires_grad or cache.requires_grad)):
        return torch.cat([cache[:, :past], new.to(cache.dtype)], dim=1)
    cache.narrow(1, past, new.shape[1]).copy_(new)
    return cache


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.n_head * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_head * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_head * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=False)
        self.joined = None                   # q, k and v as one matrix, see join_projections

    def forward(self, x, cache, place):
        """x (b, t, d_model), cache KV or None, place Place -> (b, t, d_model), the cache with t more tokens."""
        (b, t, _), turned = x.shape, self.n_head + self.n_kv_head            # rotary turns q and k at once
        qkv = F.linear(x, self.joined) if self.joined is not None else torch.cat(
            [self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qk, v = qkv.view(b, t, -1, self.head_dim).split([turned, self.n_kv_head], dim=2)
        q, k = rotary(qk, place.cos, place.sin).split([self.n_head, self.n_kv_head], dim=2)
        if cache is not None:
            cache = KV(extend(cache.k, k, place.past), extend(cache.v, v, place.past))
            k, v = (m.narrow(1, 0, place.past + t) for m in cache)           # (b, past + t, n_kv_head, head_dim)
        k, v = k.transpose(1, 2), v.transpose(1, 2)                          # heads first: (b, heads, tokens, head_dim)
        if t == 1:                           # heads that share a key stand in for tokens, so each key is read only once
            q = q.view(b, self.n_kv_head, -1, self.head_dim)                 # (b, n_kv_head, heads per key, head_dim)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=place.mask)
        else:                                # query head a reads kv head a // (n_head / n_kv_head)
            if x.is_cuda and place.mask is not None:                         # kernels take a mask or groups, not both
                k, v = (m.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for m in (k, v))
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=place.mask,
                                               is_causal=place.mask is None, enable_gqa=True).transpose(1, 2)
        return self.o_proj(y.reshape(b, t, -1)), cache                       # heads side by side again


# ----------------------------------------------------------------------------------------------------------------------
# The selective scan: the memory of a Mamba layer.
#
# Every channel owns d_state cells. At each token all cells decay by exp(dt * A), then dt * x is added to them under
# the key B, and the query C reads them out. "Selective" means that dt, B and C are computed from the token, so the
# layer chooses what to keep; for that reason there is no convolution form, and one must walk through time.
# dt is the one knob of a step: near 0 the token passes by (decay 1, nothing written), large it wipes the cells and
# writes itself. The d_state cells of a channel have the rates A = -1 ... -n: some forget in a few steps, some in many.
#
# scan_loop is the definition. scan_chunk computes the same numbers faster: the exponentials and products of a chunk of
# steps are made at once, so that a time step is a single multiply-add, and the read-out is one batched matrix product
# per chunk. Its backward keeps only the state at each chunk border and rebuilds the rest, so that (b, t, d, n), the
# history of all cells, never exists for the whole length. It divides by nothing and takes no logarithm: any dt is safe.
# The state, A, dt and D are float32 whatever the model's dtype (float64 if x is float64).

def scan_loop(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, reset=None):
    """The selective scan, one step at a time. Arguments and results as in selective_scan."""
    (b, t, d), n, f = x.shape, A.shape[1], torch.promote_types(x.dtype, torch.float32)
    B, C = (m.to(f).repeat_interleave(d // m.shape[2], dim=2) for m in (B, C))       # (b, t, d, n): a row per channel
    u, dt = x.to(f), F.softplus(dt.to(f) + (0 if dt_bias is None else dt_bias.to(f)))            # (b, t, d)
    h, ys = x.new_zeros(b, d, n, dtype=f) if state is None else state.to(f), []
    for i in range(t):
        if reset is not None:
            h = h.masked_fill(reset[:, i, None, None], 0)
        # (b, d, n): decay the cells, write; then read them: (b, d)
        h = torch.exp(dt[:, i, :, None] * A.to(f)) * h + (dt[:, i] * u[:, i])[..., None] * B[:, i]
        ys.append((h * C[:, i]).sum(-1) + (0 if D is None else D.to(f) * u[:, i]))
    y = torch.stack(ys, dim=1) * (1 if z is None else F.silu(z.to(f)))       # (b, t, d)
    return y.to(x.dtype), h


def chunk_states(x, dt, A, B, h, keep):
    """One chunk, time first: x, dt (t, b, d), A (d, n), B (t, b, g, n), h (b, d, n), keep (t, b, 1, 1) or None.
    -> decay a and states (t, b, d, n)."""
    (t, b, d), (g, n) = x.shape, B.shape[2:]
    a = torch.exp(dt[..., None] * A)                                         # (t, b, d, n)
    if keep is not None:
        a *= keep                                                            # a document's first step forgets all
    s = ((dt * x).view(t, b, g, d // g, 1) * B[:, :, :, None]).view(t, b, d, n)      # what each step writes
    for i in range(t):
        h = s[i].addcmul_(a[i], h)                                           # s[i] <- s[i] + a[i] * h, in place
    return a, s


class ChunkedScan(torch.autograd.Function):
    """(x, dt, A, B, C, h0, keep, size), all time first and in one float dtype, dt positive -> y (t, b, d), last state.

    Backward, with k the gradient that reaches a state from its own read-out and from the next step:
        k_t = dy_t C_t + a_{t+1} k_{t+1};  d(dt x)_t = k_t . B_t;  dB_t = k_t dt_t x_t;  dC_t = dy_t h_t;
        d(dt_t A) = k_t a_t h_{t-1}."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h, keep, size):
        """Keeps the inputs and the state at every chunk border, (t / size, b, d, n)."""
        (t, b, d), gc, borders = x.shape, C.shape[2], []
        y = torch.empty_like(x)
        for i in range(0, t, size):
            part = slice(i, i + size)
            borders.append(h)
            _, s = chunk_states(x[part], dt[part], A, B[part], h, None if keep is None else keep[part])
            y[part] = torch.matmul(s.view(-1, b, gc, d // gc, A.shape[1]), C[part][..., None]).view(-1, b, d)
            h = s[-1].clone()
        ctx.size = size
        ctx.save_for_backward(x, dt, A, B, C, keep, torch.stack(borders))
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, carry):
        """dy (t, b, d), carry (b, d, n): gradients of y and of the last state. Chunks from the last to the first."""
        x, dt, A, B, C, keep, borders = ctx.saved_tensors
        (t, b, d), (g, n), gc, dy = x.shape, B.shape[2:], C.shape[2], dy.contiguous()
        dx, ddt, dA, dB, dC = map(torch.empty_like, (x, dt, A, B, C))
        dA.zero_()
        for i in reversed(range(0, t, ctx.size)):
            part = slice(i, i + ctx.size)
            start, kept = borders[i // ctx.size], None if keep is None else keep[part]
            a, s = chunk_states(x[part], dt[part], A, B[part], start, kept)  # the same states once more
            dyg = dy[part].view(-1, b, gc, d // gc, 1)                       # (t, b, gc, d / gc, 1)
            dC[part] = torch.matmul(dyg.transpose(-1, -2), s.view(-1, b, gc, d // gc, n)).squeeze(-2)
            k = (dyg * C[part][:, :, :, None]).view(s.shape)                 # (t, b, d, n)
            k[-1] += carry                                                   # from the chunk after this one
            for j in reversed(range(len(k) - 1)):
                k[j].addcmul_(a[j + 1], k[j + 1])
            carry = a[0] * k[0]                                              # for the chunk before
            kg, u = k.view(-1, b, g, d // g, n), dt[part] * x[part]
            du = torch.matmul(kg, B[part][..., None]).view(u.shape)          # gradient of dt * x
            dB[part] = torch.matmul(u.view(-1, b, g, 1, d // g), kg).squeeze(-2)
            k[1:].mul_(s[:-1])                                               # from here k is the gradient of dt * A
            k[0].mul_(borders[i // ctx.size])
            k.mul_(a)
            dA += (k * dt[part][..., None]).sum((0, 1))
            ddt[part] = (k * A).sum(-1) + du * x[part]
            dx[part] = du * dt[part]
        return dx, ddt, dA, dB, dC, carry, None, None


def scan_chunk(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, reset=None):
    """The selective scan in chunks of time steps. Arguments and results as in selective_scan."""
    (b, t, d), n, f = x.shape, A.shape[1], torch.promote_types(x.dtype, torch.float32)
    u, dt = x.to(f), F.softplus(dt.to(f) + (0 if dt_bias is None else dt_bias.to(f)))
    h = x.new_zeros(b, d, n, dtype=f) if state is None else state.to(f)
    keep = None if reset is None else (~reset).T[:, :, None, None].to(f)     # (t, b, 1, 1)
    size = max(8, min(64, (1 << 19) // (b * d * n)))                         # steps per chunk: its cells stay in cache
    first = lambda m: m.to(f).transpose(0, 1).contiguous()                   # time first: each step is contiguous
    y, h = ChunkedScan.apply(first(u), first(dt), A.to(f), first(B), first(C), h, keep, size)
    y = y.transpose(0, 1)
    if D is not None:
        y = y + D.to(f) * u
    if z is not None:
        y = y * F.silu(z.to(f))
    return y.to(x.dtype), h


def selective_scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, reset=None, impl="auto"):
    """Walk the recurrence of a Mamba layer:
    s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t, y_t = (C_t . s_t + D x_t) silu(z_t).

    x, dt, z (b, t, d), float32, bfloat16 or float64; the step used is softplus(dt + dt_bias).
    A (d, n), negative. D, dt_bias (d). B (b, t, g, n) and C (b, t, g', n): channel c reads group c // (d // g).
    state (b, d, n): the cells before the first step, None means zeros. reset (b, t) bool: the cells are emptied before
    that step. impl: "loop" (the definition), "chunk" (pure PyTorch, fast), "triton", or "auto".
    Returns y (b, t, d) in x's dtype and the state after the last step, float32 (float64 when x is). Differentiable in
    every tensor but reset, and through the returned state. Raises UserError on shapes that do not fit together.
    The same function as selective_scan_ref in state-spaces/mamba e9594ce1, with time in the second place, grouped B and
    C, an initial state and resets."""
    (b, t, d), n = x.shape, A.shape[1]
    wanted = {"dt": (dt, (b, t, d)), "A": (A, (d, n)), "D": (D, (d,)), "z": (z, (b, t, d)), "dt_bias": (dt_bias, (d,)),
              "B": (B, (b, t, B.shape[2], n)), "C": (C, (b, t, C.shape[2], n)), "state": (state, (b, d, n)),
              "reset": (reset, (b, t))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if t == 0 or d % B.shape[2] or d % C.shape[2]:
        raise UserError(f"selective_scan: need t > 0 and groups that divide d = {d}, got t = {t}, "
                        f"{B.shape[2]} groups of B and {C.shape[2]} of C")
    name = scan_backend(x.device, t, n, x.dtype, impl)
    scan = scan_loop if name == "loop" else scan_chunk if name == "chunk" else scan_triton
    with torch.autocast(x.device.type, enabled=False):                       # mixed precision must not touch it
        return scan(x, dt, A, B, C, D, z, dt_bias, state, reset)


def scan_backend(device, t=2, n=16, dtype=torch.float32, impl="auto"):
    """The scan to take for t steps of n cells in dtype on this device: "loop", "chunk" or "triton". The only place that
    decides. Raises UserError if impl asks for what is not there."""
    kind, interpreted = torch.device(device).type, triton is not None and triton.knobs.runtime.interpret
    if impl not in ("auto", "loop", "chunk", "triton"):
        raise UserError(f"selective_scan: unknown impl {impl!r}; known: loop, chunk, triton, auto")
    if impl in ("loop", "chunk"):
        return impl
    usable = kind == "cuda" or impl == "triton" and kind == "cpu" and interpreted                # ROCm is "cuda", too
    if triton is None or not usable:
        if impl == "triton":
            raise UserError("impl='triton' needs " + ("Triton: pip install triton" if triton is None else
                            f"a GPU, or TRITON_INTERPRET=1 set before the start; the tensors are on {kind}"))
        return "loop" if t == 1 else "chunk"                                 # one step needs no machinery
    if n > 64 or n & (n - 1) or dtype == torch.float64:
        warnings.warn(f"scan: the Triton kernels want d_state a power of two up to 64 and at most float32, "
                      f"not {n} and {dtype}: taking chunk")                  # Python shows a warning once
        return "chunk"
    return "triton"


def scan_backend_reason(device):
    """One line for scripts to print: the scan that impl="auto" takes on this device, and why."""
    name, kind = scan_backend(device), torch.device(device).type
    why = (f"Triton {triton.__version__} on {torch.cuda.get_device_name(device)}" if name == "triton" else
           "Triton is not installed" if kind == "cuda" else f"pure PyTorch: Triton needs a GPU, this is {kind}")
    return f"scan: {name} ({why})"


# ----------------------------------------------------------------------------------------------------------------------
# The short causal conv in front of the scan: each channel mixes its last d_conv inputs.
#
# Its state is the last d_conv - 1 raw inputs (before the conv, its bias and SiLU), newest last, zeros when there were
# fewer. A prompt shorter than the conv, a piece of one token, or the border of a document need no case of their own.
# Why a conv at all: a scan step sees one token, and "what stood just before" is what look-up needs most often. d_conv
# is 4: a sum of 4 shifted products is all there is to it, and what a later call needs is plain to see.

def causal_conv(x, before, weight, bias, pos):
    """x (b, t, c), before (b, d_conv - 1, c) earlier inputs, weight (c, d_conv), pos (b, t) or None -> (b, t, c).
    weight[:, -1] meets the newest input. An input from before the document began (pos < distance) counts as zero."""
    t, taps = x.shape[1], weight.shape[1]
    window, y = torch.cat([before.to(x.dtype), x], dim=1), bias              # (b, d_conv - 1 + t, c)
    for i in range(taps):
        tap, distance = window[:, i:i + t], taps - 1 - i                     # (b, t, c): inputs from `distance` back
        if pos is not None and distance:
            tap = tap.masked_fill((pos < distance)[..., None], 0)
        y = tap * weight[:, i] if y is None else y + tap * weight[:, i]
    return y


# ----------------------------------------------------------------------------------------------------------------------
# The Mamba mixer ("m2" in the file format): Mamba-1 with grouped x and B, shaped so that attention weights fit into it.
#
# in_proj makes [z, x, B, C] in one product; dt has a low-rank path of its own. Everything is cut into chunks of d_state
# (not of head_dim): channel c (chunk j = c // n, lane p = c % n, r = d_inner / d_xb) reads z row c, x row (j//r) n + p
# B rows (j // r) n ... + n - 1 and C rows j n ... + n - 1.
#
# The trap of this format: dt_proj adds its bias, and the scan adds the same bias again, so dt = softplus(W r + 2 bias).
# Every released checkpoint was trained that way and every reader must do it. New layers therefore store half a bias.

class SSM(NamedTuple):
    """The state of one Mamba layer: its size does not depend on the number of tokens."""
    conv: torch.Tensor                       # (b, d_conv - 1, d_xb) the last raw inputs of the conv, before expansion
    h: torch.Tensor                          # (b, d_inner, d_state) float32: the cells


class Mamba(nn.Module):
    """The mixer. Parameter names and shapes are those of the file format; sizes, see the glossary."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        channels = c.d_inner if c.expand_before_conv else c.d_xb
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner + 2 * c.d_xb, bias=c.proj_bias)        # rows [z, x, B, C]
        self.dt_in_proj = nn.Linear(c.d_model, c.dt_rank, bias=c.proj_bias)
        self.dt_proj = nn.Linear(c.dt_rank, c.d_inner, bias=c.dt_bias)
        self.conv1d = nn.Conv1d(channels, channels, c.d_conv, groups=channels, bias=c.conv_bias)  # only holds weights
        self.A_log = nn.Parameter(torch.arange(1, c.d_state + 1).float().log().repeat(c.d_inner, 1))  # A = -1 ... -n
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.proj_bias)
        if not self.D.is_meta:
            self.init_dt()

    @torch.no_grad()
    def init_dt(self):
        """Step sizes log-uniform in [dt_min, dt_max], as in Mamba; half the bias is stored, since it counts twice."""
        c = self.config
        nn.init.uniform_(self.dt_proj.weight, -c.dt_scale * c.dt_rank ** -0.5, c.dt_scale * c.dt_rank ** -0.5)
        if self.dt_proj.bias is not None:
            dt = torch.empty(c.d_inner).uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp()
            dt = dt.clamp(min=c.dt_init_floor)
            self.dt_proj.bias.copy_((dt + torch.log(-torch.expm1(-dt))) / 2)  # the inverse of softplus, halved

    def expand(self, x):
        """(b, t, d_xb) -> (b, t, d_inner): each chunk of d_state lanes once for every query head that shares it."""
        c, (b, t, _) = self.config, x.shape
        chunks = x.view(b, t, c.d_xb // c.d_state, 1, c.d_state)
        return chunks.expand(-1, -1, -1, c.d_inner // c.d_xb, -1).reshape(b, t, c.d_inner)

    def forward(self, x, state, place):
        """x (b, t, d_model), state SSM or None, place Place -> (b, t, d_model), the state after t more tokens."""
        c, (b, t, _) = self.config, x.shape
        z, u, B, C = self.in_proj(x).split([c.d_inner, c.d_xb, c.d_xb, c.d_inner], dim=-1)
        dt = self.dt_proj(self.dt_in_proj(x))                                # (b, t, d_inner), holds the bias once
        if t == 1 and state is not None and not torch.is_grad_enabled() and \
                scan_backend(x.device, t, c.d_state, x.dtype) == "triton":   # the rest as one kernel, in place on state
            return self.out_proj(mamba_step(self, u, dt, B, C, z, state, place.pos)), state
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))      # (d_inner, d_state)
        before = u.new_zeros(b, c.d_conv - 1, c.d_xb) if state is None else state.conv
        new = min(t, c.d_conv - 1)                                           # a slice of all of u would keep u alive
        conv = torch.cat([before.to(u.dtype), u[:, t - new:]], dim=1)[:, new:].contiguous()      # for the next call
        if c.expand_before_conv:
            before, u = self.expand(before), self.expand(u)
        u = F.silu(causal_conv(u, before, self.conv1d.weight[:, 0], self.conv1d.bias, place.pos))  # (b, t, channels)
        if not c.expand_before_conv:
            u = self.expand(u)
        y, h = selective_scan(
            u, dt, A, B.view(b, t, -1, c.d_state), C.view(b, t, -1, c.d_state),
            self.D, z, self.dt_proj.bias,                                    # ... and here the bias counts again
            None if state is None else state.h, None if place.pos is None else place.pos == 0)
        return self.out_proj(y), SSM(conv, h)


# ----------------------------------------------------------------------------------------------------------------------
# Block, state and model.

class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)). Module names are those of the file format (Mistral's, and mixer)."""

    def __init__(self, config, kind):
        super().__init__()
        self.kind = kind
        if kind in ("t", "m2"):
            self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        if kind == "t":
            self.self_attn = Attention(config)
        if kind == "m2":
            self.mixer = Mamba(config)
        if kind != "i":
            self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = MLP(config)

    def forward(self, x, state, place):
        """x (b, t, d_model), state KV, SSM or None -> the same of the next layer."""
        if self.kind in ("t", "m2"):
            y, state = (self.self_attn if self.kind == "t" else self.mixer)(self.input_layernorm(x), state, place)
            x = x + y
        if self.kind != "i":
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x, state


@dataclass(frozen=True)
class State:
    """All that a model remembers of a batch of texts. A value: it belongs to the caller, not to the model. The
    caches (and the SSM parts, where Triton runs) change in place, so clone() before continuing a text in two ways."""
    position: int                            # tokens seen so far, padding included
    max_length: int                          # tokens that fit into the key/value caches
    layers: tuple                            # per layer: KV, SSM or None
    origin: torch.Tensor | None = None       # (b,) where each row's current document began; None: at 0

    def take(self, rows):
        """An independent State of these rows (a list or tensor of indices; a row may be taken many times)."""
        pick = lambda m: m[torch.as_tensor(rows, device=m.device)]
        layers = tuple(None if layer is None else type(layer)(*map(pick, layer)) for layer in self.layers)
        return replace(self, layers=layers, origin=None if self.origin is None else pick(self.origin))

    def clone(self):
        """An independent copy: attention, conv and SSM parts."""
        clone = lambda layer: None if layer is None else type(layer)(*(m.clone() for m in layer))
        return replace(self, layers=tuple(map(clone, self.layers)))

    def resize(self, max_length):
        """The same State with room for max_length >= position tokens (key/value caches are copied)."""
        def fit(m):                                                          # (b, max_length, n_kv_head, head_dim)
            new = m.new_zeros(len(m), max_length, *m.shape[2:])
            new[:, :self.position] = m[:, :self.position]
            return new
        layers = tuple(KV(*map(fit, layer)) if isinstance(layer, KV) else layer for layer in self.layers)
        return replace(self, max_length=max_length, layers=layers)

    def nbytes(self):
        """-> (bytes of key/value caches, bytes of conv and SSM states), for the whole batch as allocated."""
        size = lambda kind: sum(m.nbytes for layer in self.layers if isinstance(layer, kind) for m in layer)
        return size(KV), size(SSM)


class HybridLM(nn.Module):
    """The whole model: embedding, blocks as config.layout says, norm, output head. It holds no state of any text."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layout)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.recompute = False               # training: keep only each layer's input, compute the rest again going back

    def new_state(self, batch, max_length):
        """Empty caches for `batch` texts of at most `max_length` tokens, on the model's device and in its dtype."""
        c, weight = self.config, self.embed_tokens.weight
        def layer(kind):
            if kind == "t":
                return KV(*(weight.new_zeros(batch, max_length, c.n_kv_head, c.head_dim) for _ in "kv"))
            if kind == "m2":
                h_dtype = torch.promote_types(weight.dtype, torch.float32)
                return SSM(weight.new_zeros(batch, c.d_conv - 1, c.d_xb),
                           weight.new_zeros(batch, c.d_inner, c.d_state, dtype=h_dtype))
        return State(0, max_length, tuple(map(layer, c.layout)))

    def hidden(self, tokens, state=None, reset=None):
        """tokens (b, t) int64, state State or None, reset (b, t) bool or None (True: a new document begins here, which
        sees nothing before it) -> (b, t, d_model) after the last norm, and the State after these tokens (None for
        None). Raises UserError when the caches are too short or the batch is another."""
        past = 0 if state is None else state.position
        if state is not None and past + tokens.shape[1] > state.max_length:
            raise UserError(f"{past} + {tokens.shape[1]} tokens do not fit into a state made for {state.max_length}")
        for layer in () if state is None else state.layers:
            if layer is not None and layer[0].shape[0] != tokens.shape[0]:
                raise UserError(f"the state holds {layer[0].shape[0]} texts, the tokens {tokens.shape[0]}")
        x = self.embed_tokens(tokens)
        place, origin = make_place(self.config, tokens, past, None if state is None else state.origin, reset, x.dtype)
        layers = []
        for i, block in enumerate(self.layers):
            before = None if state is None else state.layers[i]
            if self.recompute and torch.is_grad_enabled():
                x, layer = checkpoint(block, x, before, place, use_reentrant=False)
            else:
                x, layer = block(x, before, place)
            layers.append(layer)
        if state is not None:
            state = State(past + tokens.shape[1], state.max_length, tuple(layers), origin)
        return self.norm(x), state

    def forward(self, tokens, state=None, reset=None):
        """As hidden, but -> logits (b, t, vocab_size)."""
        x, state = self.hidden(tokens, state, reset)
        return self.lm_head(x), state

    # Generation: prefill the prompts, then one forward with t = 1 per token. Rows never see each other: prompts of
    # different length are padded on the left, and a reset at each row's first real token hides the padding from
    # attention, conv and scan alike. With equal lengths (one prompt above all) there is no padding, no reset, no mask.

    @torch.no_grad()
    def prefill(self, prompts, room, chunk=2048, state=None):
        """prompts: a list of id lists, each at least one long; room: tokens that will follow -> logits (b, vocab_size)
        of the last position only, and the State. With a state given, the prompts (of equal length) continue it."""
        if not prompts or not all(len(p) for p in prompts):
            raise UserError("every prompt needs at least one token")
        longest, device = max(map(len, prompts)), self.embed_tokens.weight.device
        tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        reset = None
        if any(len(p) < longest for p in prompts):
            if state is not None:
                raise UserError("prompts that continue a state must have equal lengths")
            reset = torch.zeros_like(tokens, dtype=torch.bool)
            for row, p in enumerate(prompts):
                reset[row, longest - len(p)] = True
        state = self.new_state(len(prompts), longest + room) if state is None else state
        for i in range(0, longest, chunk):
            x, state = self.hidden(tokens[:, i:i + chunk], state, None if reset is None else reset[:, i:i + chunk])
        return self.lm_head(x[:, -1]), state

    @torch.no_grad()
    def decode(self, logits, state, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """Endless generator. Yields the next tokens (b,) int64 with the State that does not hold them yet, then feeds
        them. Row i draws from a random stream of its own, seeded by (seed, i), or by (seed, streams[i]) if seed is the
        pair (seed, streams). temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""
        seed, streams = seed if isinstance(seed, tuple) else (seed, range(len(logits)))
        rngs = [torch.Generator(logits.device).manual_seed(seed * 1_000_003 + i) for i in streams]
        while True:
            token = choose(logits, temperature, top_k, top_p, rngs)          # (b,)
            yield token, state
            x, state = self.hidden(token[:, None], state)                    # (b, 1, d_model)
            logits = self.lm_head(x[:, -1])                                  # (b, vocab_size)

    def generate(self, prompts, max_new_tokens, temperature=0.0, stop=None, top_k=0, top_p=1.0, seed=0):
        """prompts: a list of id lists of any lengths -> per prompt the list of new ids, at most max_new_tokens, without
        the stop token that ended it (stop: ids; None: config.eos_ids). A row gives what it would give alone."""
        stop = set(self.config.eos_ids if stop is None else stop)
        outputs, done = [[] for _ in prompts], [max_new_tokens < 1] * len(prompts)
        logits, state = self.prefill(prompts, max_new_tokens)
        tokens = self.decode(logits, state, temperature, top_k, top_p, seed)
        while not all(done):
            for i, token in enumerate(next(tokens)[0].tolist()):
                if not done[i] and token not in stop:
                    outputs[i].append(token)
                done[i] = done[i] or token in stop or len(outputs[i]) >= max_new_tokens
        return outputs


@torch.no_grad()
def join_projections(model):
    """For generation: projections that read the same input (q, k, v; gate, up) become one product each, because a step
    of one token costs calls, not arithmetic. The single weights become views of the joined ones: no more memory, and
    the model can still be saved. Do it last: weights that are moved or replaced afterwards would be missed."""
    for block in model.layers:
        pairs = [(block.mlp, ("gate_proj", "up_proj"))] if block.kind != "i" else []
        pairs += [(block.self_attn, ("q_proj", "k_proj", "v_proj"))] if block.kind == "t" else []
        for module, names in pairs:
            parts = [getattr(module, name).weight for name in names]         # (rows, d_model) each
            module.joined = torch.cat([w.data for w in parts])
            for w, view in zip(parts, module.joined.split([len(w) for w in parts])):
                w.data = view
    return model


def choose(logits, temperature, top_k, top_p, rngs):
    """logits (b, vocab_size) -> one token per row (b,); rngs: a torch.Generator per row.
    A generator each, so that what a row draws does not depend on which rows stand beside it in the batch."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:                                                        # the smallest set that holds top_p of the mass
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.cat([torch.multinomial(p, 1, generator=rng) for p, rng in zip(probs, rngs)])


def cast(module, device, dtype):
    """Move module to device and dtype, in place. A_log and D stay float32: the recurrence is sensitive to them."""
    for name, p in module.named_parameters():
        p.data = p.data.to(device, stored_dtype(name, dtype))
    return module


def keeps_float32(name):
    """Is this parameter, of a whole model or of a mixer alone, stored and used in float32 at least?"""
    return name.rpartition(".")[2] in ("A_log", "D")


def stored_dtype(name, dtype):
    """A parameter's name, the model's dtype -> the dtype of this parameter."""
    return torch.promote_types(dtype, torch.float32) if keeps_float32(name) else dtype


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a directory with config.json and safetensors, in the Hugging Face layout. All-attention models are
# Mistral's format, hybrids Apriel-H1's.
#
# What a file asks for is implemented, or it changes nothing, or it is refused by name. A setting that is passed over
# gives a model that is nearly right, and nobody would notice. The same for tensors: each parameter has exactly one
# Source, and each tensor of the file is used.

HYBRID_TYPES = ("apriel_hybrid_ssm", "apriel_h")
MODEL_TYPES = ("mistral", "llama", *HYBRID_TYPES)

# Sizes that every config.json must name: its key -> the field of Config.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "d_mlp",
}

# Settings that are read only to refuse them: key -> the values that change nothing. An absent key is one of them.
NEUTRAL = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}

# The same for the keys of rope_scaling (transformers 4) and rope_parameters (transformers 5).
NEUTRAL_ROPE = {
    "rope_type": ("default", None),
    "type": ("default", None),
    "factor": (1.0, None),
    "partial_rotary_factor": (1.0, None),
}

# The keys of ssm_cfg -> (field of Config, default).
SSM_KEYS = {
    "d_state": ("d_state", 64),
    "d_inner": ("d_inner", 4096),
    "d_xb": ("d_xb", None),
    "dt_rank": ("dt_rank", None),
    "d_conv": ("d_conv", 4),
    "repeat_kv_before_conv": ("expand_before_conv", True),
    "conv_bias": ("conv_bias", True),
    "dt_proj_bias": ("dt_bias", True),
    "bias": ("proj_bias", False),
    "dt_min": ("dt_min", 0.001),
    "dt_max": ("dt_max", 0.1),
    "dt_scale": ("dt_scale", 1.0),
    "dt_init_floor": ("dt_init_floor", 1e-4),
}

# Keys of ssm_cfg that change nothing: expand is read where d_inner is null, dt_init is about new layers, and the rest
# belongs to other mixers (m2 is always SiLU, whatever `activation` says). The first three are written.
SSM_IGNORED = {"expand": 1, "dt_init": "random", "activation": "identity"}
SSM_OTHERS = ("n_v_heads", "n_qk_heads", "chunk_size")

# No real size is near these. A config.json that asks for more is damaged, and must not cost memory or time first.
LARGEST = 1 << 24
MOST_LAYERS = 10_000


def read_json(path, kind=object):
    """path -> the value in it. kind: the Python type it must have, dict for a JSON object."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def refuse_value(name, value, expected):
    """Raise the UserError for a value of config.json that is not what it must be."""
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:60] + " ..."
    raise UserError(f"{name} must be {expected}, got {shown}")


def whole(name, value, most=LARGEST):
    """value, if it is a whole number from 1 to most. The name is for the error message, as in the next two."""
    if type(value) is not int or not 1 <= value <= most:
        refuse_value(name, value, f"a whole number from 1 to {most}")
    return value


def number(name, value):
    """value as a float, if it is a finite number above 0."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        refuse_value(name, value, "a number above 0")
    return float(value)


def flag(name, value):
    """value, if it is true or false."""
    if type(value) is not bool:
        refuse_value(name, value, "true or false")
    return value


def config_from_json(raw, where="config.json"):
    """raw: the dict in config.json -> Config. Defaults for absent keys are those of transformers' classes.
    Raises UserError for what is missing, of the wrong type, or changes the result and is not implemented."""
    try:
        return Config(**config_fields(raw))
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def config_fields(raw):
    """The dict in config.json -> the arguments of Config."""
    if not isinstance(raw, dict):
        refuse_value("it", raw, "a JSON object")
    family = raw.get("model_type")
    if family not in MODEL_TYPES:
        raise UserError(f"model_type {family!r} is not supported; known: {', '.join(MODEL_TYPES)}")
    hybrid = family in HYBRID_TYPES
    for key in [*SIZES, "hybrid_block_layout"] if hybrid else SIZES:
        if raw.get(key) is None:
            raise UserError(f"the key {key!r} is missing")
    refuse_settings(raw, NEUTRAL)

    fields = {field: whole(key, raw[key]) for key, field in SIZES.items()}
    whole("num_hidden_layers", raw["num_hidden_layers"], MOST_LAYERS)
    fields |= attention_fields(raw, family)
    fields |= rope_fields(raw)
    fields |= token_fields(raw)
    fields["norm_eps"] = number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6))
    fields["tie_embeddings"] = flag("tie_word_embeddings", raw.get("tie_word_embeddings", False))
    fields["max_length"] = whole("max_position_embeddings", raw.get("max_position_embeddings", 4096), 1 << 40)
    if hybrid:
        fields |= mamba_fields(raw)
    return fields


def refuse_settings(raw, neutral, where=""):
    """Raise UserError for the first key of the table `neutral` whose value in raw is none of those that change
    nothing. where: a prefix for its name in the message."""
    for key, values in neutral.items():
        if key in raw and raw[key] not in values:
            shown = json.dumps(raw[key])[:200]
            raise UserError(f"{where}{key} = {shown} changes the result and is not implemented")


def attention_fields(raw, family):
    """config.json -> heads, their width, and the sliding window."""
    n_head = raw["num_attention_heads"]
    n_kv_head = raw.get("num_key_value_heads", n_head if family == "llama" else 8)
    head_dim = raw.get("head_dim")
    # Only an absent window has the default. Llama has none.
    window = raw.get("sliding_window", None if family == "llama" else 4096)
    return {
        "n_kv_head": n_head if n_kv_head is None else whole("num_key_value_heads", n_kv_head),
        "head_dim": raw["hidden_size"] // n_head if head_dim is None else whole("head_dim", head_dim),
        "sliding_window": None if window is None else whole("sliding_window", window),
    }


def rope_fields(raw):
    """config.json -> the base of the rotary frequencies: flat in transformers 4, in rope_parameters in 5."""
    theta = raw.get("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            refuse_value(name, rope, "a JSON object or null")
        refuse_settings(rope, NEUTRAL_ROPE, name + ".")
        unknown = sorted(set(rope) - set(NEUTRAL_ROPE) - {"rope_theta"})
        if unknown:
            raise UserError(f"{name}.{unknown[0]} is not known to this reader")
        theta = rope.get("rope_theta", theta)
    return {"rope_theta": number("rope_theta", theta)}


def token_fields(raw):
    """config.json -> the tokens that begin and end a text. Null: none. Absent: Mistral's and Llama's."""
    eos = raw.get("eos_token_id", 2)
    eos = eos if isinstance(eos, list) else [eos]
    bos = raw.get("bos_token_id", 1)
    for key, token in [("bos_token_id", bos), *(("eos_token_id", token) for token in eos)]:
        if token is not None and type(token) is not int:
            refuse_value(key, token, "a token id, or null")
    return {"bos_id": bos, "eos_ids": tuple(token for token in eos if token is not None)}


def mamba_fields(raw):
    """config.json of a hybrid -> the layout, and the sizes of its Mamba layers from ssm_cfg."""
    layout = raw["hybrid_block_layout"]
    if not isinstance(layout, list):
        refuse_value("hybrid_block_layout", layout, "a list")
    ssm = raw.get("ssm_cfg")
    ssm = {} if ssm is None else ssm
    if not isinstance(ssm, dict):
        refuse_value("ssm_cfg", ssm, "a JSON object")
    unknown = sorted(set(ssm) - set(SSM_KEYS) - set(SSM_IGNORED) - set(SSM_OTHERS))
    if unknown:
        raise UserError(f"ssm_cfg.{unknown[0]} is not known to this reader")

    given = {key: ssm.get(key, default) for key, (_, default) in SSM_KEYS.items()}
    if given["d_inner"] is None:
        given["d_inner"] = raw["hidden_size"] * whole("ssm_cfg.expand", ssm.get("expand", 1))
    if given["d_xb"] is None:
        given["d_xb"] = raw["hidden_size"]
    if given["dt_rank"] in ("auto", None):
        given["dt_rank"] = math.ceil(raw["hidden_size"] / 16)
    fields = {"layout": tuple(layout)}
    checks = {bool: flag, float: number}
    for key, (field, default) in SSM_KEYS.items():
        check = checks.get(type(default), whole)
        fields[field] = check(f"ssm_cfg.{key}", given[key])
    return fields


def config_to_json(config, dtype):
    """Config -> the dict for config.json; dtype: a torch dtype, recorded as the weights' dtype."""
    c = config
    hybrid = any(kind != "t" for kind in c.layout)
    eos = list(c.eos_ids)
    raw = {
        "architectures": ["AprielHybridSSMForCausalLM" if hybrid else "MistralForCausalLM"],
        "model_type": "apriel_hybrid_ssm" if hybrid else "mistral",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_mlp,
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "sliding_window": c.sliding_window,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": eos if len(eos) > 1 else (eos + [None])[0],
        "max_position_embeddings": c.max_length,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if hybrid:
        raw["hybrid_block_layout"] = list(c.layout)
        raw["ssm_cfg"] = {key: getattr(c, field) for key, (field, _) in SSM_KEYS.items()} | SSM_IGNORED
    return raw


class Source(NamedTuple):
    """Where the numbers of one parameter lie."""
    file: object              # an open safetensors file
    name: str                 # the tensor's name in it
    shape: tuple              # of the parameter
    rows: slice | None = None # the rows of the tensor that are meant; None: all of it

    def read(self):
        """-> the tensor, in the dtype of the file."""
        tensor = self.file.get_tensor(self.name)
        return tensor if self.rows is None else tensor[self.rows]


def open_tensors(path):
    """path: a checkpoint directory -> {tensor name: Source}, following the index where there is one."""
    from safetensors import SafetensorError, safe_open
    index = os.path.join(path, "model.safetensors.index.json")
    where = read_index(index) if os.path.exists(index) else None
    sources = {}
    for name in ["model.safetensors"] if where is None else sorted(set(where.values())):
        full = os.path.join(path, name)
        if not os.path.isfile(full):
            raise UserError(f"{full} is missing")
        try:
            file = safe_open(full, framework="pt")
            for tensor in file.keys():
                if where is None or where.get(tensor) == name:
                    sources[tensor] = Source(file, tensor, tuple(file.get_slice(tensor).get_shape()))
        except (SafetensorError, OSError) as e:
            raise UserError(f"{full} is not a readable safetensors file: {e}") from None
    lost = sorted(set(where or ()) - set(sources))
    if lost:
        raise UserError(f"{index} names tensors that are not in their files: {some(lost)}")
    return sources


def read_index(index):
    """model.safetensors.index.json -> {tensor name: file name}."""
    where = read_json(index, dict).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{index} has no weight_map from tensor to file")
    return where


def find_sources(path, config):
    """The tensors of a checkpoint directory -> {parameter's name in the file: Source}. Names in old files, and tensors
    that follow from the others, are settled here."""
    sources = {}
    rows = 2 * config.d_inner + 2 * config.d_xb
    tensors = open_tensors(path)
    for name, source in tensors.items():
        # Older files hold the rotary frequencies as buffers.
        if name.endswith("rotary_emb.inv_freq"):
            continue
        sources[name] = source
        # M1 and older Fast-LLM have no dt_in_proj: its rows come last in in_proj, [z, x, B, C, dt].
        dt_name = name.replace(".in_proj.", ".dt_in_proj.")
        is_matrix = name.endswith("mixer.in_proj.weight") and len(source.shape) == 2
        if is_matrix and dt_name not in tensors and source.shape[0] > rows:
            rank = source.shape[0] - rows
            width = source.shape[1]
            sources[name] = source._replace(shape=(rows, width), rows=slice(0, rows))
            sources[dt_name] = source._replace(shape=(rank, width), rows=slice(rows, None))
    head = sources.get("lm_head.weight")
    embedding = sources.get("model.embed_tokens.weight")
    # A tied model may hold its head a second time. It must then be the embedding.
    if config.tie_embeddings and head is not None and embedding is not None:
        if not is_copy(head, embedding):
            raise UserError(f"{path}: config.json ties the embeddings, but lm_head.weight is not the embedding")
        del sources["lm_head.weight"]
    return sources


def is_copy(one, other):
    """Do two Sources hold the same numbers?"""
    first = one.read()
    second = other.read()
    return first.dtype == second.dtype and torch.equal(first, second)


def check_fit(path, sources, shapes):
    """Raise UserError unless the Sources are those of a model with these {parameter's name in the file: shape}."""
    wrong = [f"missing {name}" for name in shapes if name not in sources]
    wrong += [f"unexpected {name}" for name in sources if name not in shapes]
    for name, shape in shapes.items():
        if name in sources and sources[name].shape != shape:
            wrong.append(f"{name} has shape {sources[name].shape}, expected {shape}")
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit config.json: {some(wrong)}")


def some(names, most=5):
    """Names for an error message: the first few, and how many more. A wrong file may miss hundreds."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def file_name(name):
    """A parameter's name in the module -> its name in the file."""
    return name if name.startswith("lm_head.") else "model." + name


def load_pretrained(path, device="cpu", dtype=torch.float32):
    """A checkpoint directory -> HybridLM in eval mode. Tensors are read one by one straight into device and dtype.
    Raises UserError for a missing or broken file, unknown settings, and missing, unexpected or mis-shaped tensors."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise UserError(f"dtype {dtype} is not supported (float16 overflows in the scan): use float32 or bfloat16")
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise UserError(f"no such directory: {path}")
    file = os.path.join(path, "config.json")
    config = config_from_json(read_json(file, dict), file)
    sources = find_sources(path, config)
    # Published configs disagree with their weights on the rank of dt: the weights decide.
    for name, source in sources.items():
        if name.endswith("dt_in_proj.weight") and len(source.shape) == 2:
            config = replace(config, dt_rank=source.shape[0])
            break
    # A layer count that the file does not bear out is found here, before so many layers are built.
    layers = [i for i, kind in enumerate(config.layout) if kind != "i"]
    norms = [f"model.layers.{i}.post_attention_layernorm.weight" for i in layers]
    lost = [f"missing {name}" for name in norms if name not in sources]
    if lost:
        raise UserError(f"{path}: {len(lost)} layers of config.json have no tensors: {some(lost)}")

    # On the meta device a model has shapes and no memory. A tied head is not listed.
    with torch.device("meta"):
        model = HybridLM(config)
    names = {name: file_name(name) for name, _ in model.named_parameters()}
    check_fit(path, sources, {names[name]: tuple(p.shape) for name, p in model.named_parameters()})
    weights = {}
    for name, in_file in names.items():
        tensor = sources[in_file].read().to(device, stored_dtype(name, dtype), copy=True)
        weights[name] = nn.Parameter(tensor)
    # Not strict only because of the tied head: check_fit was strict, and has the better words.
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def write_atomic(path, write):
    """write(temporary path), then rename: a reader, or a crash, never meets half a file.
    Raises UserError where that fails (a full disk, a missing directory); the old file is then still there."""
    write_together({path: write})


def write_together(writers):
    """{path: write}, as write_atomic for several files. None is replaced before all of them are on the disk."""
    from safetensors import SafetensorError
    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    path = None
    try:
        for path, write in writers.items():
            write(path + ".tmp")
            # safetensors allows its owner only.
            os.chmod(path + ".tmp", 0o666 & ~mask)
        for path in writers:
            os.replace(path + ".tmp", path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        for path in writers:
            if os.path.exists(path + ".tmp"):
                os.remove(path + ".tmp")


def json_writer(value):
    """value -> a function that writes it to a path, as indented JSON with a newline at its end."""
    def write(path):
        with open(path, "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1)
            f.write("\n")
    return write


def tensor_writer(tensors):
    """{name: tensor} -> a function that writes them as a safetensors file."""
    from safetensors.torch import save_file
    return lambda path: save_file(tensors, path, metadata={"format": "pt"})


def file_writer(original):
    """The path of a file -> a function that writes its copy."""
    return lambda to: shutil.copyfile(original, to)


def write_json(path, value):
    """value as indented JSON, all or nothing. Raises UserError as write_atomic does."""
    write_atomic(path, json_writer(value))


def deal_out(parameters, shard_bytes):
    """{name: tensor} -> [{name: tensor}, ...] in the same order, each of at most shard_bytes (or a single tensor)."""
    shards = [{}]
    size = 0
    for name, p in parameters.items():
        if shards[-1] and size + p.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = p
        size += p.nbytes
    return shards


@torch.no_grad()
def save_pretrained(model, path, tokenizer_from=None, shard_bytes=5 << 30):
    """Write model to the directory path: config.json and model.safetensors, or shards of at most shard_bytes with an
    index. tokenizer_from: a directory whose tokenizer files are copied along. A_log and D are written in float32.
    Raises UserError where that fails; what was in the directory before is then still there."""
    path = os.fspath(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the directory {path}: {e.strerror}") from None
    parameters = {}
    # A tied head appears as the embedding.
    for name, p in model.named_parameters():
        w = p.detach().to(stored_dtype(name, p.dtype))
        parameters[file_name(name)] = w.cpu().contiguous()
    shards = deal_out(parameters, shard_bytes)
    count = len(shards)
    files = ["model.safetensors"]
    if count > 1:
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    writers = {file: tensor_writer(shard) for file, shard in zip(files, shards)}
    index = "model.safetensors.index.json"
    if count > 1:
        where = {}
        for file, shard in zip(files, shards):
            where |= dict.fromkeys(shard, file)
        total = sum(w.nbytes for w in parameters.values())
        writers[index] = json_writer({"metadata": {"total_size": total}, "weight_map": where})
    writers["config.json"] = json_writer(config_to_json(model.config, model.embed_tokens.weight.dtype))
    writers |= copies(tokenizer_from, path)
    write_together({os.path.join(path, file): write for file, write in writers.items()})
    # Left by a save of the other kind, where some readers look first.
    stale = os.path.join(path, index if count == 1 else "model.safetensors")
    if os.path.exists(stale):
        os.remove(stale)


def copies(source, path):
    """-> {file: write} for the tokenizer files of the directory `source` (None: none), unless they are in path."""
    found = {}
    for file in TOKENIZER_FILES if source else ():
        original = os.path.join(os.fspath(source), file)
        if os.path.exists(original) and os.path.abspath(original) != os.path.abspath(os.path.join(path, file)):
            found[file] = file_writer(original)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: a tokenizer.json becomes an object that gives the same ids as the library `tokenizers`. It has
#
#     encode(text, allowed_special="all")   ids; without "all", special tokens that stand in the text are plain text
#     decode(ids)                           text
#     decode_single_token_bytes(id)         bytes, to print while generating; KeyError for an id without a token
#     max_token_value                       the largest id
#     special, begin                        {text: id} of the added tokens; the ids that belong before a raw text
#
# A text takes four steps. Added tokens ("<s>") are cut out; the rest is normalised; patterns cut it into pieces (words,
# mostly); byte pair encoding turns the bytes of a piece into ids. ByteTokenizer leaves the last step to tiktoken, which
# joins two neighbours whenever the joined bytes are in the vocabulary, lowest id first, and takes a whole piece that is
# in the vocabulary as it is. tokenizer.json lists the allowed merges instead. The two agree if merges come in the order
# of ids and no token can be reached in one way only by the one rule: that is checked token by token.
#
# A tokenizer that is nearly right gives other ids and a model that is nearly right. So what ByteTokenizer cannot hold
# exactly goes through the package `tokenizers` where that is installed (LibraryTokenizer), and is refused where not.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Unfit(Exception):
    """A tokenizer.json may be sound, but ByteTokenizer cannot represent it exactly. The text says why."""


def byte_characters():
    """GPT-2's table {character in tokenizer.json: byte}.
    Printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    for byte in range(256):
        if byte not in printable:
            table[chr(256 + len(table) - len(printable))] = byte
    return table


def bpe(parts, rank):
    """Join neighbours in parts (a list of bytes), lowest rank[left, right] first, until none is left to join."""
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:]))
        ranks = [rank.get(pair, math.inf) for pair in pairs]
        best = ranks.index(min(ranks))
        if pairs[best] not in rank:
            break
        parts = parts[:best] + [parts[best] + parts[best + 1]] + parts[best + 2:]
    return parts


def steps_of(part, key):
    """A part of a tokenizer.json: nothing, one step, or a Sequence of such parts under this key -> its steps."""
    if not part:
        return []
    if part.get("type") != "Sequence":
        return [part]
    steps = []
    for inner in part[key]:
        steps += steps_of(inner, key)
    return steps


def normal_forms(normalizer):
    """The normalizer of a tokenizer.json -> Unicode normal forms ("NFC"), to be applied one after the other."""
    forms = [step.get("type") for step in steps_of(normalizer, "normalizers")]
    for form in forms:
        if form not in ("NFC", "NFD", "NFKC", "NFKD"):
            raise Unfit(f"it has a normalizer ({form})")
    return forms


def split_patterns(pre_tokenizer):
    """The pre_tokenizer of a tokenizer.json -> regular expressions. The first cuts the text, the next its pieces."""
    import regex
    *splits, level = steps_of(pre_tokenizer, "pretokenizers") or [{}]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        raise Unfit("the pre-tokenizer does not end with ByteLevel without a prefix space")
    patterns = []
    for step in splits:
        kind = step.get("type")
        if kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            patterns.append(pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"]))
        else:
            how = f", behavior {step.get('behavior')}, invert {step.get('invert')}" if kind == "Split" else ""
            raise Unfit(f"the pre-tokenizer has a step {kind}{how}")
    if level.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    try:
        # What a pattern skips is a piece too.
        return [regex.compile(f"{pattern}|(?:(?!{pattern})(?s:.))+") for pattern in patterns]
    except regex.error as e:
        raise Unfit(f"the package regex does not read its pattern: {e}") from None


def check_ids(ids):
    """Raises UserError where these cannot be the ids of different tokens."""
    for token in ids:
        if type(token) is not int or not 0 <= token < 2**31:
            raise UserError(f"{token!r} is no token id")
    if len(set(ids)) < len(ids):
        raise UserError("two tokens have the same id")


def check_added(added, vocab_size, id_of):
    """added: the added_tokens of a tokenizer.json; id_of(text): the id in the vocabulary itself, or None. `tokenizers`
    goes by the texts and ignores the ids in added_tokens: a new token gets the next free one. Raises UserError where
    the file says another."""
    following = vocab_size
    seen = set()
    for token in added:
        text = token["content"]
        expected = id_of(text)
        if expected is None:
            expected = following
        if not text or text in seen:
            raise UserError(f"the added token {text!r} stands there twice, or is empty")
        if token["id"] != expected:
            raise UserError(f"the added token {text!r} has the id {token['id']}; "
                            f"by the vocabulary it is {expected}")
        seen.add(text)
        following = max(following, expected + 1)


def byte_merges(model, special):
    """The model of a tokenizer.json -> {bytes: id}, and its merges in order as a list of (left bytes, right bytes)."""
    # GPT-2's own file names no type.
    if model.get("type", "BPE") != "BPE" or "vocab" not in model or "merges" not in model:
        raise Unfit(f"model type {model.get('type')}, not byte-level BPE")
    if model.get("dropout"):
        raise UserError(f"model.dropout = {model['dropout']!r}: the ids of a text are random")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise Unfit(f"model.{key} = {model[key]!r}")
    table = byte_characters()
    for text in special:
        if text in table:
            raise Unfit(f"the added token {text!r} is the token of a byte, too")

    def as_bytes(text):
        return bytes(table[character] for character in text)

    try:
        ranks = {as_bytes(text): token for text, token in model["vocab"].items() if text not in special}
        pairs = []
        for merge in model["merges"]:
            texts = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append(tuple(map(as_bytes, texts)))
    except KeyError as e:
        raise Unfit(f"{e.args[0]!r} is not a character of byte-level BPE") from None
    if any(len(pair) != 2 for pair in pairs):
        raise UserError("a merge does not name two tokens")
    return ranks, pairs


def check_merges(ranks, pairs, ignore_merges):
    """Raises Unfit where tiktoken, which knows ids alone, could join otherwise than these merges do."""
    ids = [ranks.get(left + right, -1) for left, right in pairs]
    parts = {part for pair in pairs for part in pair}
    if min(ids, default=0) < 0 or not parts <= ranks.keys():
        raise Unfit("a merge names a token that is not in the vocabulary")
    if ids != sorted(ids):
        raise Unfit("its merges are not in the order of ids")
    rank = {pair: i for i, pair in enumerate(pairs)}
    for token in ranks:
        if len(token) > 1000:
            # bpe() takes time that grows with the square of the length.
            raise Unfit(f"a token has {len(token)} bytes")
        letters = [token[i:i + 1] for i in range(len(token))]
        known = all(letter in ranks for letter in letters)
        whole = ignore_merges and all(pair in rank for pair in ways_to_join(token, ranks))
        if not known or not (whole or bpe(letters, rank) == [token]):
            raise Unfit(f"the token {token!r} is not what its merges give; "
                        "tiktoken would use it elsewhere")


def ways_to_join(token, ranks):
    """All (left, right) in the vocabulary that tiktoken would join to this token."""
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    return [(left, right) for left, right in cuts if left in ranks and right in ranks]


def find_longest(texts):
    """-> a regular expression that finds these texts, the longest where several begin; None for no texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def cut(pattern, text):
    """Cut text by a pattern of find_longest -> [(part, whether it was found or stands between)]."""
    if pattern is None:
        return [(text, False)]
    return [(part, i % 2 == 1) for i, part in enumerate(pattern.split(text))]


def valid_unicode(text):
    """text with two surrogates as the character that they mean, and a lone one as U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class ByteTokenizer:
    """Byte-level BPE: GPT-2, Llama 3, Mistral Nemo, Qwen, SmolLM, DeepSeek. raw: the dict in a tokenizer.json.
    Raises Unfit, or UserError if the file contradicts itself."""

    def __init__(self, raw):
        import tiktoken
        model = raw.get("model") or {}
        added = raw.get("added_tokens") or []
        self.special = {token["content"]: token["id"] for token in added}
        ranks, pairs = byte_merges(model, self.special)
        check_added(added, len(model["vocab"]), model["vocab"].get)
        check_ids([*ranks.values(), *self.special.values()])
        for token in added:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise Unfit(f"the added token {token['content']!r} strips or needs word borders")
        self.forms = normal_forms(raw.get("normalizer"))
        self.patterns = split_patterns(raw.get("pre_tokenizer"))
        check_merges(ranks, pairs, model.get("ignore_merges"))
        # A vocabulary may lack bytes that its training text never had. `tokenizers` drops them without a word.
        self.missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        if self.missing and (model.get("unk_token") or model.get("byte_fallback")):
            raise Unfit("bytes without a token become other tokens")
        # Tokens that are "normalized" are found in the normalised text, after all others.
        late = [token for token in added if token.get("normalized")]
        self.late = {self.normalise(token["content"]): token["id"] for token in late}
        if len(self.late) < len(late):
            raise Unfit("two added tokens are the same once they are normalised")
        self.find_late = find_longest(self.late)
        self.find_early = find_longest([token["content"] for token in added if token not in late])
        # The pattern is not used: tiktoken gets piece by piece. (Its own patterns fail at 500,000 spaces in a row.)
        self.core = tiktoken.Encoding("tokenizer.json", pat_str="(?s:.+)", mergeable_ranks=ranks,
                                      special_tokens=self.special)
        self.decode = self.core.decode
        self.decode_single_token_bytes = self.core.decode_single_token_bytes
        self.max_token_value = self.core.max_token_value

    def normalise(self, text):
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        return text

    def encode_plain(self, text):
        """A normalised text without added tokens -> ids."""
        pieces = [text]
        for pattern in self.patterns:
            pieces = [match.group() for piece in pieces for match in pattern.finditer(piece)]
        ids = []
        for piece in pieces:
            known = piece.encode().translate(None, self.missing)
            if known:
                ids += self.core._encode_single_piece(known)
        return ids

    def encode(self, text, allowed_special=()):
        text = valid_unicode(text)
        if allowed_special != "all":
            return self.encode_plain(self.normalise(text))
        ids = []
        for part, early in cut(self.find_early, text):
            if early:
                ids.append(self.special[part])
                continue
            for smaller, late in cut(self.find_late, self.normalise(part)):
                ids += [self.late[smaller]] if late else self.encode_plain(smaller)
        return ids


class LibraryTokenizer:
    """Any other tokenizer.json, by the package `tokenizers`: Llama 2, Mistral 7B, Gemma (SentencePiece), Unigram.
    Kinds that put a space before a text put it before every text that they are given."""

    def __init__(self, library, raw):
        self.library = library
        self.library.no_truncation()
        self.library.no_padding()
        added = raw.get("added_tokens") or []
        check_added(added, self.library.get_vocab_size(False), self.library.token_to_id)
        self.special = {token["content"]: token["id"] for token in added}
        self.find = find_longest(self.special)
        self.max_token_value = max(self.library.get_vocab().values())
        steps = steps_of(raw.get("decoder"), "decoders")
        kinds = [step.get("type") for step in steps]
        if not {"ByteLevel", "ByteFallback", "Metaspace"}.intersection(kinds):
            raise UserError(f"the decoder {kinds} does not say which bytes a token has")
        self.table = byte_characters() if "ByteLevel" in kinds else {}
        self.fallback = "ByteFallback" in kinds

    def encode(self, text, allowed_special=()):
        text = valid_unicode(text)
        if allowed_special != "all" and self.find and self.find.search(text):
            raise UserError("this tokenizer cannot read a special token in a text as plain text")
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.library.decode(ids, skip_special_tokens=False)

    def decode_single_token_bytes(self, token):
        text = self.library.id_to_token(token)
        if text is None:
            raise KeyError(token)
        if text in self.special:
            return text.encode()
        if self.fallback and re.fullmatch("<0x[0-9A-F]{2}>", text):
            return bytes.fromhex(text[3:5])
        if self.table and all(character in self.table for character in text):
            return bytes(self.table[character] for character in text)
        # U+2581 is the space of SentencePiece.
        return text.replace("\u2581", " ").encode()


def begin_ids(post_processor):
    """The post_processor of a tokenizer.json -> ids that it puts before a text. What it appends is not wanted here:
    a text that goes on has no end."""
    ids = []
    for step in steps_of(post_processor, "processors"):
        if step.get("type") != "TemplateProcessing":
            continue
        for item in step["single"]:
            if "Sequence" in item:
                break
            name = item["SpecialToken"]["id"]
            ids += step["special_tokens"][name]["ids"]
    check_ids([*set(ids)])
    return ids


def load_tokenizer(path):
    """path/tokenizer.json -> a tokenizer. Encode with allowed_special="all" to cut special tokens out of a text.
    Raises UserError, with the reason, for a tokenizer that cannot be represented exactly."""
    file = os.path.join(os.fspath(path), "tokenizer.json")
    raw = read_json(file, dict)
    with refusing(file):
        try:
            enc = ByteTokenizer(raw)
        except Unfit as e:
            enc = other_tokenizer(file, raw, e)
        enc.begin = begin_ids(raw.get("post_processor"))
        return enc


def other_tokenizer(file, raw, reason):
    """What ByteTokenizer refused for this reason -> a LibraryTokenizer."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{reason}; it needs the package tokenizers: pip install tokenizers") from None
    with refusing(f"{reason}; with the package tokenizers"):
        return LibraryTokenizer(tokenizers.Tokenizer.from_file(file), raw)


@contextlib.contextmanager
def refusing(file):
    """Turn whatever a damaged file raises inside into a UserError that names the file."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    except (KeyboardInterrupt, SystemExit, MemoryError, TimeoutError):
        raise
    except BaseException as e:
        # Rust's panics, of tiktoken or tokenizers, are not Exceptions.
        first_line = str(e).strip().partition("\n")[0]
        raise UserError(f"{file}: not understood ({type(e).__name__}: {first_line})") from None


def begin_tokens(path, enc):
    """Ids that the tokenizer of the checkpoint at path puts before a raw text: [] mostly, [128000] for Llama 3.
    The end token that some append as well is left out."""
    return list(enc.begin)


# ----------------------------------------------------------------------------------------------------------------------
# Chat: messages become the text that the model was trained on.
#
# A checkpoint brings its own template, a program in the language of jinja2. It writes the marks of the roles, often a
# system message of its own, and the begin token. One that brings none gets Mistral's form, <s>[INST] question [/INST]
# answer</s>, if its tokenizer knows those marks: where they fall into letters, a model would learn to write letters and
# never to stop. What the model is to learn (the answer, and the token that ends it) is never searched for in rendered
# text: a prompt ends where the answer begins, and answer + chat.end follows.

def format_prompt(question):
    """The template of Mistral's instruct models. [INST] and <s> are single tokens."""
    return f"<s>[INST] {question} [/INST]"


class Chat:
    """What load_chat returns. render(messages, add_generation_prompt) -> text; end: the text of the token that ends an
    answer; refusal: why there is no template, or None."""

    def __init__(self, render=None, end=None, refusal=None):
        self.render = render
        self.refusal = refusal
        self.known_end = end

    @property
    def end(self):
        if self.refusal is not None:
            raise UserError(self.refusal)
        return self.known_end

    def prompt(self, messages):
        """messages: [{"role": "system", "user" or "assistant", "content": text}] -> the text before the answer."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        return self.render(messages, add_generation_prompt=True)


def load_chat(path, enc):
    """The chat template of the checkpoint at path, or Mistral's form. Where there is neither, or none that works here,
    chat.refusal says why; prompt() and end raise it as a UserError."""
    path = os.fspath(path)
    try:
        template = find_template(path)
        return built_in_chat(enc) if template is None else template_chat(path, template, enc)
    except UserError as e:
        return Chat(refusal=f"{path}: {e}")


def built_in_chat(enc):
    """Mistral's form, for a tokenizer that knows its marks."""
    for mark in ("<s>", "[INST]", "[/INST]", "</s>"):
        if len(enc.encode(mark, allowed_special="all")) != 1:
            raise UserError("it has no chat template, and Mistral's form does not fit: "
                            f"{mark} is not a single token of its tokenizer")
    return Chat(built_in_render, "</s>")


def built_in_render(messages, add_generation_prompt):
    """Mistral's form. A system message goes in front of the first user message."""
    text = "<s>"
    system = ""
    for message in messages:
        role = message["role"]
        content = message["content"]
        if role == "system":
            system = content + "\n\n"
        elif role == "user":
            text += f"[INST] {system}{content} [/INST]"
            system = ""
        elif role == "assistant":
            text += content + "</s>"
        else:
            raise UserError(f"the role {role!r} is not system, user or assistant")
    return text


def read_if_there(path, file):
    """The JSON object in path/file, or {} if there is no such file."""
    file = os.path.join(path, file)
    return read_json(file, dict) if os.path.exists(file) else {}


def find_template(path):
    """The text of a checkpoint's chat template, or None. The file chat_template.jinja has the first word."""
    file = os.path.join(path, "chat_template.jinja")
    if os.path.exists(file):
        try:
            with open(file, encoding="utf-8") as f:
                return f.read()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read chat_template.jinja: {e}") from None
    template = read_if_there(path, "tokenizer_config.json").get("chat_template")
    with refusing("chat_template"):
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            if "default" not in named:
                raise UserError(f"of the templates {', '.join(named)} none is named default")
            template = named["default"]
        if not isinstance(template, str | None):
            raise UserError(f"expected a text, found {type(template).__name__}")
    return template


def token_texts(path):
    """The tokens that a checkpoint names, as its template sees them -> {"eos_token": "</s>", ...}."""
    texts = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name, value in read_if_there(path, file).items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                texts[name] = text
    return texts


def compile_template(text):
    """A chat template -> a jinja2 template that knows what transformers lets templates use, and nothing else."""
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("its chat template needs the package jinja2: pip install jinja2") from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what is trained; here it is only read over."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    with refusing("its chat template"):
        return environment.from_string(text)


def template_chat(path, text, enc):
    """A checkpoint's own template, with the names of its tokens in it."""
    template = compile_template(text)
    names = token_texts(path)

    def render(messages, add_generation_prompt):
        with refusing("its chat template"):
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                   documents=None, **names)

    return Chat(render, end_of_answer(render, names, enc))


def end_of_answer(render, names, enc):
    """The token that a template writes after an answer, or else the checkpoint's eos_token."""
    answer = "the answer"
    messages = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": answer}]
    try:
        after = render(messages, add_generation_prompt=False).partition(answer)[2].lstrip()
    except UserError:
        # Some want more: tools, or a system message.
        after = ""
    ends = [special for special in enc.special if after.startswith(special)]
    end = max(ends, key=len, default=names.get("eos_token"))
    if end not in enc.special:
        raise UserError(f"no single token ends an answer: the chat template writes none, and eos_token is {end!r}")
    return end


# ----------------------------------------------------------------------------------------------------------------------
# Running a script: what all scripts share. Devices, errors, Ctrl-C, where a number comes from.

def pick_device(name):
    """"auto" -> cuda, mps or cpu, the first that is there. Raises UserError for a device that is not."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device, there in found.items() if there) if name == "auto" else name
    if not found.get(name.split(":")[0]):
        raise UserError(f"device {name!r} is not available here; available: {', '.join(d for d in found if found[d])}")
    return torch.device(name)


def pick_dtype(name, device):
    """"auto" -> bfloat16 on cuda, float32 elsewhere. Only matrix products use it: the rest is float32."""
    name = ("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype {name!r} is not supported: use float32 or bfloat16")
    return getattr(torch, name)


def start_script(args):
    """args with device and dtype, as the flags of every script -> (torch.device, dtype of matrix products)."""
    torch.set_flush_denormal(True)           # a state that has decayed to 1e-40 costs 100 cycles an operation
    device = pick_device(args.device)
    return device, pick_dtype(args.dtype, device)


def choose_threads(model, device, threads=None):
    """Set the CPU threads: as many as asked for; else one for a small model on a CPU, where two gain little and lose
    much while another program has a core; else PyTorch's own choice."""
    small = device.type == "cpu" and sum(p.numel() for p in model.parameters()) < 10_000_000
    torch.set_num_threads(threads or (1 if small else torch.get_num_threads()))


def sync(device):
    """Wait until the device has finished: its calls return before the work is done, and clocks would read too early."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# The order in which Apriel's 50-layer 15B teacher gave up its attention (0-based). Published: the first 25 (H-25, by
# leaving one out), then 3 5 (H-27) and 6 7 8 (H-30), by trial. What H-34, H-37 and H-40 replaced is not published: here
# the published leave-one-out order goes on. Layer 2 has no score there, and is never replaced.
APRIEL15B = [47, 39, 24, 36, 31, 43, 32, 20, 38, 37, 30, 33, 22, 23, 40, 42, 44, 35, 41, 27, 21, 46, 45, 49, 25,
             3, 5, 6, 7, 8, 34, 29, 28, 19, 26, 18, 17, 16, 13, 15, 14, 9, 12, 11, 48, 10, 4, 1, 0]


def harm(score):
    """What replacing a layer costs, by its score: LOO: minus the accuracy without it, or the KL where there is none;
    MMR: the loss of its trial. -> a pair of numbers, the second for ties."""
    accuracy = score.get("accuracy")
    return -accuracy if accuracy is not None else score.get("kl", score["loss"]), score["loss"]


def autocast(device, dtype):
    """Matrix products in dtype over float32 weights; nothing at all for float32.
    The weights, their gradients and the optimiser stay float32: a step of 0.1 % would vanish in bfloat16's 8 bits."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def provenance(device):
    """Where a number comes from, for JSON: commit of this code ("-dirty" if it was changed, None outside git), machine,
    versions of torch and triton (None without it), CPU threads."""
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=here,
                                capture_output=True, text=True).stdout.strip() or None
    except OSError:                                                          # there is no git
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    if os.path.exists("/proc/cpuinfo") and device.type == "cpu":             # Linux: platform knows no more than x86_64
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return {"commit": commit, "device": f"{device.type}: {name or platform.machine()}", "torch": torch.__version__,
            "triton": getattr(triton, "__version__", None), "threads": torch.get_num_threads()}


def weights_hash(model):
    """A fingerprint of all weights: what was made with a model is continued with that model only."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        # The name counts, too: two equal layers may have changed places.
        digest.update(name.encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(p.detach().to("cpu").contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def run_main(main):
    """Run a script: a user's mistake is one line and exit code 2, Ctrl-C exit code 130, a bug keeps its traceback."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def claim_out(path, overwrite, resume, done="config.json"):
    """Check that the directory `path` can be written and holds no finished result (`done`) nobody asked to lose.
    Raises UserError for both. It is called before anything is computed: an hour of training must not end here."""
    if os.path.exists(os.path.join(path, done)) and not (overwrite or resume):
        raise UserError(f"{path} already holds a result: choose another --out, or pass --overwrite")
    try:
        os.makedirs(path, exist_ok=True)
        # Permission bits say little on network disks, and nothing to root: only writing tells.
        probe = os.path.join(path, ".writable")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as e:
        raise UserError(f"cannot write to {path}: {e.strerror}") from None


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C inside waits until the block is done: a step that was taken in half must never be saved."""
    pressed, usual = [], signal.getsignal(signal.SIGINT)
    if usual not in (signal.SIG_IGN, None):                                  # nohup ignores it, and so do we then
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        if usual is not None:
            signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------------------------
# Appendix: the same scan in Triton. You may stop reading here: nothing below changes a result, it is only faster.
#
# One program (a single warp, so nothing to synchronise) takes a block of channels of one text, keeps their cells in
# registers and walks through time: scan_loop for a block. A time step is read and written once, y needs one sum over
# n, and grouped B and C are read where they lie. The names are those of scan_loop:
#
#       kernel          scan_loop                       kernel             ChunkedScan, backward
#       u, dt, h        u, dt, h (of the block)         k                  a_{t+1} k_{t+1}: k from the next step alone
#       A2              A * log2(e): exp2 is cheaper    g                  k_t, the full gradient of a state
#       B, C            a row of B, C per channel       kept, h            a_t h_{t-1} and h_t
#       c, live         channel numbers; c < d          part               (text, segment) as one number
#       cell            c * n + n: place in (d, n)      row                (text, step) as one number
#
# A few long texts would leave most of the GPU idle. They are cut into segments, a program for each:
#   1. every segment runs from empty cells and tells where it ends, and the sum of its dt (exp(A sum) is its decay);
#   2. scan_combine walks over the segments: start <- decay * start + end;
#   3. every segment runs again, now from its true start, and writes y.
# With many texts there is one segment, and 3 does it alone. Backward keeps the inputs and the segments' starts only:
#   1. the states again, of which one per tile of SCAN_TILE steps is written down;
#   2. k through every segment, from zero, and scan_combine from the last segment to the first;
#   3. tile by tile, last first: the state before every step into a small scratch, then back with all gradients.
# Sums over channels (dB, dC) stop at the largest power of two that divides block and group; torch adds the rest, as it
# adds dA, dD and d(dt_bias) over parts. No atomics, so a result repeats bit for bit. A pointer that is None switches
# off what hangs on it. All arithmetic is float32; places are int64, since b * t * d passes 2^31.

if triton is not None:
    SCAN_CELLS = 512         # cells (channels * n) of a program: 16 per thread; twice as many spill in the backward
    SCAN_TILE = 16           # steps between saved states; the scratch of all running programs should fit the L2 cache
    SCAN_PROGRAMS = 2048     # cut texts into segments until there are so many programs; an H200 runs about 3000 at once
    SCAN_SEGMENT = 64        # ... but into none shorter than this
    LOG2E = tl.constexpr(1.4426950408889634)

    @triton.jit
    def load32(ptr):
        return tl.load(ptr).to(tl.float32)                      # whatever lies there

    @triton.jit
    def softplus(v):
        """max(v, 0) + log(1 + e), e = exp(-|v|), the log by its series in s = e / (2 + e) <= 1/3: exact for small e."""
        e = tl.exp(-tl.abs(v))
        s = e / (2 + e)
        q = s * s
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13)))))
        return tl.maximum(v, 0.0) + 2 * s * series

    @triton.jit
    def scan_place(t, d, seg, n_seg, GB, GC, N: tl.constexpr, BD: tl.constexpr, PAIR: tl.constexpr):
        """Which text, steps and channels are this program's, and where its rows of B and C lie. A thread holds rows r
        and r + BD / 2 of a tile; with PAIR = 2 these are neighbouring channels, whose dB and dC it adds on its own."""
        blocks = tl.cdiv(d, BD)
        block, part = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)       # neighbours share B, C
        first = part % n_seg * seg                              # the segment's first step within its text
        start, end = part // n_seg * t + first, part // n_seg * t + tl.minimum(first + seg, t)
        r, n = tl.arange(0, BD), tl.arange(0, N)[None, :]
        c = block * BD + r % (BD // PAIR) * PAIR + r // (BD // PAIR)            # for PAIR 1: block * BD + r
        live, c = c < d, tl.minimum(c, d - 1)                   # rows past d repeat the last channel and write nothing
        cell = c[:, None] * N + n                               # (BD, N)
        return block, part, start, end, live, c, cell, (c // GB)[:, None] * N + n, (c // GC)[:, None] * N + n

    @triton.jit
    def scan_step(x_ptr, dt_ptr, B_ptr, reset_ptr, x_row, dt_row, B_row, row, c, B_at, A2, bias):
        """-> u, dt before its softplus, dt (BD), B and the decay a (BD, N), and whether a document begins (a is 0)."""
        u, raw = load32(x_ptr + row * x_row + c), load32(dt_ptr + row * dt_row + c) + bias
        B, dt = load32(B_ptr + row * B_row + B_at), softplus(raw)
        a, reset = tl.exp2(dt[:, None] * A2), False
        if reset_ptr is not None:
            reset = tl.load(reset_ptr + row) != 0               # one flag for all channels
            a = tl.where(reset, 0.0, a)
        return u, raw, dt, B, a, reset

    # t, seg and n_seg are not specialised: a new prompt length must not mean a new compilation. Rows may lie x_row,
    # dt_row ... elements apart, as slices of in_proj's output do; GB, GC channels share a row of B, of C.

    @triton.jit(do_not_specialize=["t", "seg", "n_seg"])
    def scan_forward(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, reset_ptr,
                     x_row, dt_row, B_row, C_row, z_row, t, d, seg, n_seg, GB, GC,
                     start_ptr, end_ptr, sum_ptr, tile_ptr, y_ptr, N: tl.constexpr, BD: tl.constexpr, T: tl.constexpr):
        """start (None: zeros), end (b, n_seg, d, n) and sum of dt (b, n_seg, d) of every segment; y (b, t, d);
        tile (b, n_seg, seg / T, d, n): the state before each T-th step."""
        block, part, first, last, live, c, cell, B_at, C_at = scan_place(t, d, seg, n_seg, GB, GC, N, BD, 1)
        A2, bias, D = tl.load(A_ptr + cell) * LOG2E, tl.load(bias_ptr + c), tl.load(D_ptr + c)
        h, total = tl.zeros([BD, N], tl.float32), tl.zeros([BD], tl.float32)  # the cells; dt since the start
        if start_ptr is not None:
            h = tl.load(start_ptr + part * d * N + cell)
        for row in range(first, last):
            if tile_ptr is not None:
                if (row - first) % T == 0:
                    tile = part * (seg // T) + (row - first) // T
                    tl.store(tile_ptr + tile * d * N + cell, h, mask=live[:, None])
            u, raw, dt, B, a, reset = scan_step(x_ptr, dt_ptr, B_ptr, reset_ptr, x_row, dt_row, B_row,
                                                row, c, B_at, A2, bias)
            h = a * h + (dt * u)[:, None] * B
            total = tl.where(reset, float("-inf"), total) + dt  # below zero: the segment forgets all that came before
            if y_ptr is not None:                               # else: a pass for the states alone
                y = tl.sum(h * load32(C_ptr + row * C_row + C_at), axis=1) + D * u
                if z_ptr is not None:
                    z = load32(z_ptr + row * z_row + c)
                    y *= z * tl.sigmoid(z)
                tl.store(y_ptr + row * d + c, y, mask=live)     # in the dtype of x
        tl.store(end_ptr + part * d * N + cell, h, mask=live[:, None])
        if sum_ptr is not None:                                 # wanted by scan_combine
            tl.store(sum_ptr + part * d + c, total, mask=live)

    @triton.jit(do_not_specialize=["n_seg"])
    def scan_combine(A_ptr, first_ptr, sum_ptr, own_ptr, enter_ptr, d, n_seg, N: tl.constexpr, BLOCK: tl.constexpr,
                     BACK: tl.constexpr):
        """own (b, n_seg, d, n): what each segment yields by itself -> enter, likewise: what comes into it. first
        (b, d, n) comes into the first one; BACK: into the last, and so on towards the first."""
        blocks = tl.cdiv(d * N, BLOCK)
        b, cell = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        live = cell < d * N                                     # cells are independent here
        A2 = tl.load(A_ptr + cell, mask=live, other=0.0) * LOG2E
        h = tl.load(first_ptr + b * d * N + cell, mask=live, other=0.0)
        for i in range(n_seg):
            part = b * n_seg + (n_seg - 1 - i if BACK else i)
            total = tl.load(sum_ptr + part * d + cell // N, mask=live, other=0.0)
            own = tl.load(own_ptr + part * d * N + cell, mask=live, other=0.0)
            tl.store(enter_ptr + part * d * N + cell, h, mask=live)
            h = tl.where(total < 0, 0.0, tl.exp2(A2 * total)) * h + own

    @triton.jit(do_not_specialize=["t", "seg", "n_seg"])
    def scan_carry(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, reset_ptr,
                   x_row, dt_row, B_row, C_row, z_row, t, d, seg, n_seg, GB, GC, dy_ptr, k_ptr,
                   N: tl.constexpr, BD: tl.constexpr):
        """k (b, n_seg, d, n): the gradient that leaves each segment's start if none enters at its end."""
        block, part, first, last, live, c, cell, B_at, C_at = scan_place(t, d, seg, n_seg, GB, GC, N, BD, 1)
        A2, bias, k = tl.load(A_ptr + cell) * LOG2E, tl.load(bias_ptr + c), tl.zeros([BD, N], tl.float32)
        for i in range(first, last):
            row = first + last - 1 - i
            u, raw, dt, B, a, reset = scan_step(x_ptr, dt_ptr, B_ptr, reset_ptr, x_row, dt_row, B_row,
                                                row, c, B_at, A2, bias)
            dy = load32(dy_ptr + row * d + c)
            if z_ptr is not None:
                z = load32(z_ptr + row * z_row + c)
                dy *= z * tl.sigmoid(z)
            k = a * (k + dy[:, None] * load32(C_ptr + row * C_row + C_at))    # neither x nor B matters to it
        tl.store(k_ptr + part * d * N + cell, k, mask=live[:, None])

    @triton.jit
    def store_sums(ptr, row, block, d, v, W: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, PAIR: tl.constexpr):
        """v (BD, N), rows as in scan_place: its sums over W neighbouring channels go to ptr (b, t, d / W, n). W divides
        d, so that no sum has rows from both sides of d."""
        v = tl.sum(tl.reshape(v, [PAIR, BD // PAIR, N]), axis=0)                # within a thread: c, c + 1
        v = tl.sum(tl.reshape(v, [BD // W, W // PAIR, N]), axis=1)              # across threads
        i = block * (BD // W) + tl.arange(0, BD // W)[:, None]
        tl.store(ptr + row * (d // W) * N + i * N + tl.arange(0, N)[None, :], v, mask=i < d // W)

    # The gradients of one step. From h_t = a h_{t-1} + dt u B and y_t = (C . h_t + D u) silu(z), with g = dL / dh_t:
    #       g   = dy silu(z) C + k                  dB  = g dt u                    dC = h_t dy silu(z)
    #       du  = g . B         (of dt u)           dx  = du dt + D dy silu(z)      dD = u dy silu(z)
    #       w   = g a h_{t-1}   (of dt A)           ddt = (du u + w . A) sigmoid    dA = w dt
    # where sigmoid(raw) is the derivative of softplus, and dz = dy (C . h_t + D u) silu'(z). h_t needs h_{t-1}, but the
    # walk goes from late to early, and dividing by a would be unstable: hence the tiles. SCAN_TILE trades the size of
    # the saved states (b, t / SCAN_TILE, d, n), which live during one layer's backward only, against the scratch.

    @triton.jit(do_not_specialize=["t", "seg", "n_seg"])
    def scan_backward(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, reset_ptr,
                      x_row, dt_row, B_row, C_row, z_row, t, d, seg, n_seg, GB, GC, dy_ptr, k_ptr, tile_ptr, past_ptr,
                      dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, N: tl.constexpr,
                      BD: tl.constexpr, T: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, PAIR: tl.constexpr):
        """k (b, n_seg, d, n) as it enters each segment's end -> as it leaves its start. past (b, n_seg, T, d, n) is
        scratch. dB (b, t, d / WB, n), dC (b, t, d / WC, n), dA (b, n_seg, d, n), dD, dbias (b, n_seg, d)."""
        block, part, first, last, live, c, cell, B_at, C_at = scan_place(t, d, seg, n_seg, GB, GC, N, BD, PAIR)
        A2, bias, D = tl.load(A_ptr + cell) * LOG2E, tl.load(bias_ptr + c), tl.load(D_ptr + c)
        dA, dD, dbias = tl.zeros([BD, N], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
        k = tl.load(k_ptr + part * d * N + cell)
        past_at = past_ptr + part * T * d * N + cell            # a slot for each step of one tile
        for i in range(tl.cdiv(last - first, T)):               # tiles, the last one first
            tile = tl.cdiv(last - first, T) - 1 - i
            low, high = first + tile * T, tl.minimum(first + tile * T + T, last)
            h = tl.load(tile_ptr + (part * (seg // T) + tile) * d * N + cell)
            for row in range(low, high):                        # forward, to have the state before every step
                tl.store(past_at + (row - low) * d * N, h, mask=live[:, None])
                u, raw, dt, B, a, reset = scan_step(x_ptr, dt_ptr, B_ptr, reset_ptr, x_row, dt_row, B_row,
                                                    row, c, B_at, A2, bias)
                h = a * h + (dt * u)[:, None] * B
            tl.debug_barrier()                                  # a thread may read what another wrote
            for j in range(low, high):                          # and back
                row = low + high - 1 - j
                u, raw, dt, B, a, reset = scan_step(x_ptr, dt_ptr, B_ptr, reset_ptr, x_row, dt_row, B_row,
                                                    row, c, B_at, A2, bias)
                C, dy = load32(C_ptr + row * C_row + C_at), load32(dy_ptr + row * d + c)
                kept = a * tl.load(past_at + (row - low) * d * N)               # a_t h_{t-1}
                h = kept + (dt * u)[:, None] * B                                # h_t, as in the forward
                if z_ptr is not None:
                    z = load32(z_ptr + row * z_row + c)
                    s, y = tl.sigmoid(z), tl.sum(h * C, axis=1) + D * u
                    tl.store(dz_ptr + row * d + c, dy * y * s * (1 + z * (1 - s)), mask=live)
                    dy *= z * s                                 # from here: the gradient of C . h + D u
                g = k + dy[:, None] * C                                         # dL / dh_t
                du, w = tl.sum(g * B, axis=1), g * kept         # gradients of dt * u and of dt * A
                ddt = (du * u + tl.sum(w * A2, axis=1) / LOG2E) * tl.sigmoid(raw)
                tl.store(dx_ptr + row * d + c, du * dt + dy * D, mask=live)
                tl.store(ddt_ptr + row * d + c, ddt, mask=live)
                store_sums(dB_ptr, row, block, d, g * (dt * u)[:, None], WB, N, BD, PAIR)
                store_sums(dC_ptr, row, block, d, h * dy[:, None], WC, N, BD, PAIR)
                dA, dD, dbias = dA + w * dt[:, None], dD + dy * u, dbias + ddt
                k = a * g                                       # what the step before receives
            tl.debug_barrier()                                  # all slots read, before the next tile overwrites them
        tl.store(k_ptr + part * d * N + cell, k, mask=live[:, None])
        tl.store(dA_ptr + part * d * N + cell, dA, mask=live[:, None])
        tl.store(dD_ptr + part * d + c, dD, mask=live)
        tl.store(dbias_ptr + part * d + c, dbias, mask=live)

    def scan_plan(inputs, b):
        """inputs as TritonScan.forward has them -> the arguments that all kernels share, sizes, the grid."""
        x, dt, A, B, C, _, z, _, _ = inputs
        t, (d, n) = len(x) // b, A.shape
        width, n_seg = min(64, max(1, SCAN_CELLS // n)), 1
        while b * triton.cdiv(d, width) * n_seg < SCAN_PROGRAMS and t >= 2 * n_seg * SCAN_SEGMENT:
            n_seg *= 2                                          # twice as many programs, half as long
        seg = triton.cdiv(triton.cdiv(t, n_seg), SCAN_TILE) * SCAN_TILE                          # whole tiles
        n_seg = triton.cdiv(t, seg)                             # the last may be shorter
        strides = [0 if m is None else m.stride(0) for m in (x, dt, B, C, z)]
        shared = (*inputs, *strides, t, d, seg, n_seg, d * n // B.shape[1], d * n // C.shape[1])
        return shared, (t, d, n, width, seg, n_seg), (triton.cdiv(d, width) * n_seg * b,)

    class TritonScan(torch.autograd.Function):
        """x, dt, z (b * t, d), B, C (b * t, g * n), whose rows may lie apart; A, D, bias, state (b, d, n) float32 and
        contiguous; reset (b * t) uint8; z and reset may be None -> y (b * t, d), the last state."""

        @staticmethod
        def forward(ctx, x, dt, A, B, C, D, z, bias, reset, state):
            b, inputs = len(state), (x, dt, A, B, C, D, z, bias, reset)
            shared, (t, d, n, width, seg, n_seg), grid = scan_plan(inputs, b)
            start, y, end = state, x.new_empty(x.shape), state.new_empty(b, n_seg, d, n)
            fixed = dict(N=n, BD=width, T=SCAN_TILE, num_warps=1)
            with torch.cuda.device_of(x):
                if n_seg > 1:
                    start, total = torch.empty_like(end), state.new_empty(b, n_seg, d)
                    scan_forward[grid](*shared, None, end, total, None, None, **fixed)                         # step 1
                    scan_combine[(b * triton.cdiv(d * n, 256),)](A, state, total, end, start, d, n_seg, n, 256, False)
                scan_forward[grid](*shared, start, end, None, None, y, **fixed)                                # step 3
            ctx.save_for_backward(*inputs, start)
            return y, end[:, -1].contiguous()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy, dh):
            *inputs, start = ctx.saved_tensors
            (x, dt, A, B, C, _, z, _, _), b, dy, dh = inputs, len(start), dy.contiguous(), dh.contiguous()
            shared, (t, d, n, width, seg, n_seg), grid = scan_plan(inputs, b)
            end, dA, k = (start.new_empty(b, n_seg, d, n) for _ in range(3))
            total, dD, dbias = (start.new_empty(b, n_seg, d) for _ in range(3))
            dx, ddt, dz = (None if m is None else m.new_empty(m.shape) for m in (x, dt, z))
            tiles = start.new_empty(b, n_seg, seg // SCAN_TILE, d, n)           # a state per tile
            past = start.new_empty(b, n_seg, SCAN_TILE, d, n)                   # scratch for one tile of every program
            # W channels are added up by a program, left such sums make up a group: 1 is final, more are partial sums
            W = [math.gcd(width, d * n // m.shape[1]) for m in (B, C)]
            left = [d * n // m.shape[1] // w for m, w in zip((B, C), W)]
            sums = [m.new_empty(b * t, m.shape[1] // n, l, n, dtype=m.dtype if l == 1 else torch.float32)
                    for m, l in zip((B, C), left)]
            with torch.cuda.device_of(x):
                scan_forward[grid](*shared, start, end, total, tiles, None, N=n, BD=width, T=SCAN_TILE, num_warps=1)
                if n_seg > 1:
                    scan_carry[grid](*shared, dy, end, N=n, BD=width, num_warps=1)
                    scan_combine[(b * triton.cdiv(d * n, 256),)](A, dh, total, end, k, d, n_seg, n, 256, True)
                else:
                    k.copy_(dh[:, None])                        # one segment: what comes from the caller
                scan_backward[grid](*shared, dy, k, tiles, past, dx, ddt, dA, *sums, dD, dz, dbias, N=n, BD=width,
                                    T=SCAN_TILE, WB=W[0], WC=W[1], PAIR=min(2, *W), num_warps=1)
            dB, dC = ((s if l == 1 else s.sum(2).to(m.dtype)).view(m.shape) for m, s, l in zip((B, C), sums, left))
            return dx, ddt, dA.sum((0, 1)), dB, dC, dD.sum((0, 1)), dz, dbias.sum((0, 1)), None, k[:, 0]

    def scan_triton(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, reset=None):
        """The selective scan in Triton kernels. Arguments and results as in selective_scan."""
        (b, t, d), n = x.shape, A.shape[1]
        def rows(m):                                            # a slice of in_proj's output passes without a copy
            m = m if m is None else m.reshape(b * t, -1)
            return m if m is None or m.stride(1) == 1 else m.contiguous()
        full = lambda m, *shape: x.new_zeros(shape, dtype=torch.float32) if m is None else m.float().contiguous()
        reset = None if reset is None else reset.contiguous().view(torch.uint8)
        y, h = TritonScan.apply(rows(x), rows(dt), full(A), rows(B), rows(C), full(D, d), rows(z), full(dt_bias, d),
                                reset, full(state, b, d, n))
        return y.view(b, t, d), h

    # One token, the case of decoding, is the work of one kernel instead of some twenty: conv window, SiLU, softplus,
    # cells, read-out, skip and gate. A program takes a chunk of d_xb and all the channels that repeat it, so that it
    # may shift the conv window in place once it has read it.

    @triton.jit
    def step_kernel(x_ptr, dt_ptr, B_ptr, C_ptr, z_ptr, conv_ptr, h_ptr, pos_ptr, weight_ptr, conv_bias_ptr, A_log_ptr,
                    D_ptr, bias_ptr, y_ptr, in_row, d_xb, R, TAPS: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr,
                    BD: tl.constexpr, EXPAND: tl.constexpr):
        """x, B (b, d_xb) and C, z (b, d), rows in_row apart; dt, y (b, d); conv (b, TAPS - 1, d_xb) and h (b, d, n) are
        updated; pos (b) or None. R = d / d_xb; EXPAND: the conv has d channels, not d_xb. SLOTS: TAPS - 1 or more."""
        chunk, b = tl.program_id(0) % (d_xb // N), (tl.program_id(0) // (d_xb // N)).to(tl.int64)
        d, n, window, pos = d_xb * R, tl.arange(0, N)[None, :], conv_ptr + b * (TAPS - 1) * d_xb, TAPS
        if pos_ptr is not None:
            pos = tl.load(pos_ptr + b)
        for low in range(0, R * N, BD):
            r = low + tl.arange(0, BD)
            live, c, source = r < R * N, chunk * R * N + tl.minimum(r, R * N - 1), chunk * N + r % N
            tap = c if EXPAND else source                       # the channel of the conv
            u = load32(weight_ptr + tap * TAPS + TAPS - 1) * load32(x_ptr + b * in_row + source)     # newest input
            for i in tl.static_range(TAPS - 1):                 # inputs from before the document began count as zero
                v = tl.where(pos < TAPS - 1 - i, 0.0, load32(window + i * d_xb + source))
                u += load32(weight_ptr + tap * TAPS + i) * v
            if conv_bias_ptr is not None:
                u += load32(conv_bias_ptr + tap)
            dt = load32(dt_ptr + b * d + c)                       # holds the bias once
            if bias_ptr is not None:
                dt += load32(bias_ptr + c)
            u, dt = u * tl.sigmoid(u), softplus(dt)
            cell, A = c[:, None] * N + n, -tl.exp(load32(A_log_ptr + c[:, None] * N + n))
            h = tl.where(pos == 0, 0.0, tl.load(h_ptr + b * d * N + cell))
            h = tl.exp(dt[:, None] * A) * h + (dt * u)[:, None] * load32(B_ptr + b * in_row + chunk * N + n)
            C, z = load32(C_ptr + b * in_row + (c // N)[:, None] * N + n), load32(z_ptr + b * in_row + c)
            y = tl.sum(h * C, axis=1) + load32(D_ptr + c) * u
            tl.store(h_ptr + b * d * N + cell, h, mask=live[:, None])           # in place
            tl.store(y_ptr + b * d + c, y * z * tl.sigmoid(z), mask=live)
        slot, source = tl.arange(0, SLOTS)[:, None], chunk * N + n             # (SLOTS, N): the window moves on by one
        older = tl.load(window + (slot + 1) * d_xb + source, mask=slot < TAPS - 2, other=0.0)
        newest = tl.load(x_ptr + b * in_row + source)                          # raw: before conv and SiLU
        tl.debug_barrier()                                      # all threads have read the window
        tl.store(window + slot * d_xb + source, tl.where(slot == TAPS - 2, newest, older), mask=slot < TAPS - 1)

    def mamba_step(mixer, x, dt, B, C, z, state, pos):
        """What Mamba.forward does between its projections, for one token and in place on state: x, B (b, 1, d_xb), C,
        z (b, 1, d_inner) slices of one tensor, dt (b, 1, d_inner), pos (b, 1) or None -> y (b, 1, d_inner)."""
        c, b, y = mixer.config, len(x), torch.empty_like(dt)
        r, n = c.d_inner // c.d_xb, c.d_state
        assert all(m.stride(0) == z.stride(0) for m in (x, B, C)) and all(m.is_contiguous() for m in (dt, *state))
        width = min(triton.next_power_of_2(r * n), max(1, 8 * SCAN_CELLS // n))
        with torch.cuda.device_of(x):
            step_kernel[(b * c.d_xb // n,)](
                x, dt, B, C, z, state.conv, state.h, pos, mixer.conv1d.weight, mixer.conv1d.bias, mixer.A_log, mixer.D,
                mixer.dt_proj.bias, y, z.stride(0), c.d_xb, r, TAPS=c.d_conv,
                SLOTS=triton.next_power_of_2(max(1, c.d_conv - 1)), N=n, BD=width, EXPAND=c.expand_before_conv,
                num_warps=max(1, width * n // 512))
        return y
