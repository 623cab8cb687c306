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
import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                          # optional: without Triton the pure PyTorch scan does the work
    triton = None


class UserError(ValueError):
    """Something the user can put right (a path, a file, a flag). Scripts print it as one line and exit with code 2."""


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
        put = lambda name, value: object.__setattr__(self, name, value)
        put("layout", tuple(self.layout) or ("t",) * self.n_layer)
        put("d_inner", self.d_inner or self.n_head * self.head_dim)
        put("d_xb", self.d_xb or self.n_kv_head * self.head_dim)
        put("dt_rank", self.dt_rank or math.ceil(self.d_model / 16))
        if len(self.layout) != self.n_layer:
            raise UserError(f"the layout names {len(self.layout)} layers, the model has {self.n_layer}")
        unknown = sorted({str(kind) for kind in self.layout} - set(LAYER_KINDS))
        if unknown:
            raise UserError(f"unsupported layer type {', '.join(unknown)}; known: {', '.join(LAYER_KINDS)}")
        for big, small, name in ((self.n_head, self.n_kv_head, "n_head % n_kv_head"),
                                 (self.d_inner, self.d_xb, "d_inner % d_xb"),
                                 (self.d_xb, self.d_state, "d_xb % d_state"), (self.head_dim, 2, "head_dim % 2")):
            if big <= 0 or small <= 0 or big % small:
                raise UserError(f"{name} must be 0, got {big} % {small}")


# ----------------------------------------------------------------------------------------------------------------------
# RMSNorm, rotary positions, SwiGLU: the parts that the conversion leaves alone.

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        """x (..., dim) -> x / rms(x) * weight. In float32, cast back, then scaled, as Mistral does it."""
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


def rotary(x, cos, sin):
    """x (b, t, heads, head_dim), cos and sin (1 or b, t, 1, head_dim): turn each pair (i, i + head_dim / 2), the
    split-half layout of Llama and Mistral. x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin: rolling by half a head swaps
    x1 and x2, and sin's first half holds the minus (three operations, for decoding is bound by their number)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class MLP(nn.Module):
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
# the scan forget at position 0) and the attention mask. With one document per row all of that is None and costs nothing.

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

class KV(NamedTuple):
    k: torch.Tensor                          # (b, max_length, n_kv_head, head_dim), filled up to the state's position
    v: torch.Tensor


def extend(cache, new, past):
    """Append new (b, t, ...) to cache (b, max_length, ...) at `past`: in place, or as a copy if gradients flow."""
    if cache.shape[1] < past + new.shape[1] or (torch.is_grad_enabled() and (new.requires_grad or cache.requires_grad)):
        return torch.cat([cache[:, :past], new.to(cache.dtype)], dim=1)
    cache[:, past:past + new.shape[1]] = new
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
        b, t, _ = x.shape
        if self.joined is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            width = self.n_kv_head * self.head_dim
            q, k, v = F.linear(x, self.joined).split([self.n_head * self.head_dim, width, width], dim=-1)
        q = rotary(q.view(b, t, self.n_head, self.head_dim), place.cos, place.sin)
        k = rotary(k.view(b, t, self.n_kv_head, self.head_dim), place.cos, place.sin)
        v = v.view(b, t, self.n_kv_head, self.head_dim)
        if cache is not None:
            cache = KV(extend(cache.k, k, place.past), extend(cache.v, v, place.past))
            k, v = cache.k[:, :place.past + t], cache.v[:, :place.past + t]
        k, v = k.transpose(1, 2), v.transpose(1, 2)                          # heads first: (b, heads, tokens, head_dim)
        if t == 1:                           # heads that share a key stand in for tokens, so each key is read only once
            q = q.view(b, self.n_kv_head, -1, self.head_dim)                 # (b, n_kv_head, heads per key, head_dim)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=place.mask)
        else:                                # query head a reads kv head a // (n_head / n_kv_head)
            if x.is_cuda and place.mask is not None:                         # kernels take a mask or groups, not both
                k, v = (m.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for m in (k, v))
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=place.mask,
                                               is_causal=place.mask is None, enable_gqa=True).transpose(1, 2)
        return self.o_proj(y.reshape(b, t, -1)), cache


# ----------------------------------------------------------------------------------------------------------------------
# The selective scan: the memory of a Mamba layer.
#
# Every channel owns d_state cells. At each token all cells decay by exp(dt * A), then dt * x is added to them under
# the key B, and the query C reads them out. "Selective" means that dt, B and C are computed from the token, so the
# layer chooses what to keep; for that reason there is no convolution form, and one must walk through time.
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
        h = torch.exp(dt[:, i, :, None] * A.to(f)) * h + (dt[:, i] * u[:, i])[..., None] * B[:, i]
        ys.append((h * C[:, i]).sum(-1) + (0 if D is None else D.to(f) * u[:, i]))
    y = torch.stack(ys, dim=1) * (1 if z is None else F.silu(z.to(f)))
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
        x, dt, A, B, C, keep, borders = ctx.saved_tensors
        (t, b, d), (g, n), gc, dy = x.shape, B.shape[2:], C.shape[2], dy.contiguous()
        dx, ddt, dA, dB, dC = map(torch.empty_like, (x, dt, A, B, C))
        dA.zero_()
        for i in reversed(range(0, t, ctx.size)):
            part = slice(i, i + ctx.size)
            a, s = chunk_states(x[part], dt[part], A, B[part], borders[i // ctx.size], None if keep is None else keep[part])
            dyg = dy[part].view(-1, b, gc, d // gc, 1)
            dC[part] = torch.matmul(dyg.transpose(-1, -2), s.view(-1, b, gc, d // gc, n)).squeeze(-2)
            k = (dyg * C[part][:, :, :, None]).view(s.shape)                 # (t, b, d, n)
            k[-1] += carry
            for j in reversed(range(len(k) - 1)):
                k[j].addcmul_(a[j + 1], k[j + 1])
            carry = a[0] * k[0]
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
    """Walk the recurrence of a Mamba layer: s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t, y_t = (C_t . s_t + D x_t) silu(z_t).

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
    if impl == "auto":
        impl = scan_backend(x.device, t)
    scans = {"loop": scan_loop, "chunk": scan_chunk}
    if impl not in scans:
        raise UserError(f"selective_scan: unknown impl {impl!r}; known here: {', '.join(scans)}, auto")
    return scans[impl](x, dt, A, B, C, D, z, dt_bias, state, reset)


def scan_backend(device, t=2):
    """The name of the scan that impl="auto" takes for t steps on this device: the only place that decides."""
    return "loop" if t == 1 else "chunk"                                     # one step needs no machinery


# ----------------------------------------------------------------------------------------------------------------------
# The short causal conv in front of the scan: each channel mixes its last d_conv inputs.
#
# Its state is the last d_conv - 1 raw inputs (before the conv, its bias and SiLU), newest last, zeros when there were
# fewer. A prompt shorter than the conv, a piece of one token, or the border of a document need no case of their own.

def causal_conv(x, before, weight, bias, pos):
    """x (b, t, c), before (b, d_conv - 1, c) earlier inputs, weight (c, d_conv), pos (b, t) or None -> (b, t, c).
    weight[:, -1] meets the newest input. An input from before the document began (pos < distance) counts as zero."""
    t, taps = x.shape[1], weight.shape[1]
    window, y = torch.cat([before.to(x.dtype), x], dim=1), bias              # (b, d_conv - 1 + t, c)
    for i in range(taps):
        tap, distance = window[:, i:i + t], taps - 1 - i
        if pos is not None and distance:
            tap = tap.masked_fill((pos < distance)[..., None], 0)
        y = tap * weight[:, i] if y is None else y + tap * weight[:, i]
    return y


# ----------------------------------------------------------------------------------------------------------------------
# The Mamba mixer ("m2" in the file format): Mamba-1 with grouped x and B, shaped so that attention weights fit into it.
#
# in_proj makes [z, x, B, C] in one product; dt has a low-rank path of its own. Everything is cut into chunks of d_state
# (not of head_dim): channel c (chunk j = c // n, lane p = c % n, r = d_inner / d_xb) reads z row c, x row (j // r) n + p,
# B rows (j // r) n ... + n - 1 and C rows j n ... + n - 1.
#
# The trap of this format: dt_proj adds its bias, and the scan adds the same bias again, so dt = softplus(W r + 2 bias).
# Every released checkpoint was trained that way and every reader must do it. New layers therefore store half a bias.

class SSM(NamedTuple):
    conv: torch.Tensor                       # (b, d_conv - 1, d_xb) the last raw inputs of the conv, before expansion
    h: torch.Tensor                          # (b, d_inner, d_state) float32: the cells


class Mamba(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        channels = c.d_inner if c.expand_before_conv else c.d_xb
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner + 2 * c.d_xb, bias=c.proj_bias)        # rows [z, x, B, C]
        self.dt_in_proj = nn.Linear(c.d_model, c.dt_rank, bias=c.proj_bias)
        self.dt_proj = nn.Linear(c.dt_rank, c.d_inner, bias=c.dt_bias)
        self.conv1d = nn.Conv1d(channels, channels, c.d_conv, groups=channels, bias=c.conv_bias)  # holds the weights only
        self.A_log = nn.Parameter(torch.arange(1, c.d_state + 1).float().log().repeat(c.d_inner, 1))  # A = -1 ... -n
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.proj_bias)
        if not self.D.is_meta:
            self.init_dt()

    @torch.no_grad()
    def init_dt(self):
        """Step sizes log-uniform in [dt_min, dt_max], as in Mamba; half of the bias is stored, since it counts twice."""
        c = self.config
        nn.init.uniform_(self.dt_proj.weight, -c.dt_scale * c.dt_rank ** -0.5, c.dt_scale * c.dt_rank ** -0.5)
        if self.dt_proj.bias is not None:
            dt = torch.empty(c.d_inner).uniform_(math.log(c.dt_min), math.log(c.dt_max)).exp().clamp(min=c.dt_init_floor)
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
        before = u.new_zeros(b, c.d_conv - 1, c.d_xb) if state is None else state.conv
        conv = torch.cat([before.to(u.dtype), u], dim=1)[:, t:]              # the conv state for the next call
        if c.expand_before_conv:
            before, u = self.expand(before), self.expand(u)
        u = F.silu(causal_conv(u, before, self.conv1d.weight[:, 0], self.conv1d.bias, place.pos))
        if not c.expand_before_conv:
            u = self.expand(u)
        y, h = selective_scan(
            u, dt, -torch.exp(self.A_log.float()), B.view(b, t, -1, c.d_state), C.view(b, t, -1, c.d_state),
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
    key/value caches are filled in place, so take clone() before continuing the same text in two ways."""
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
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layout)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

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
            x, layer = block(x, None if state is None else state.layers[i], place)
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
            token = choose(logits, temperature, top_k, top_p, rngs)
            yield token, state
            x, state = self.hidden(token[:, None], state)
            logits = self.lm_head(x[:, -1])

    def generate(self, prompts, max_new_tokens, temperature=0.0, stop=None, top_k=0, top_p=1.0, seed=0):
        """prompts: a list of id lists of any lengths -> per prompt the list of new ids, at most max_new_tokens, without
        the stop token that ended it (stop: a collection of ids; None: config.eos_ids). A row gives what it gives alone."""
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
    """logits (b, vocab_size) -> one token per row (b,); rngs: a torch.Generator per row."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:                                                            # the smallest set that holds top_p of the mass
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    return torch.cat([torch.multinomial(p, 1, generator=rng) for p, rng in zip(probs, rngs)])


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

INITS = {"aligned": "from attention, chunks matched", "plain": "from attention, in the published order",
         "random": "nothing copied", "identity": "no mixer at all (control)"}


@torch.no_grad()
def mil_mixer(attention, config, init="aligned"):
    """attention: the Attention to replace -> a new Mamba, on the CPU in float32. init: aligned, plain or random."""
    c, n, mixer = config, config.d_state, Mamba(config)
    if init == "random":
        return mixer
    if c.d_inner != c.n_head * c.head_dim or c.d_xb != c.n_kv_head * c.head_dim or c.head_dim % n or c.proj_bias:
        raise UserError(f"attention with {c.n_head} / {c.n_kv_head} heads of {c.head_dim} cannot become a Mamba layer of "
                        f"d_inner {c.d_inner}, d_xb {c.d_xb}, d_state {n}, projection bias {c.proj_bias}")
    order = torch.arange(c.d_inner)
    if init == "aligned":                                                    # (g, a, k, lane) -> (g, k, a, lane)
        order = order.view(c.n_kv_head, c.n_head // c.n_kv_head, c.head_dim // n, n).transpose(1, 2).reshape(-1)
    z, x, B, C = mixer.in_proj.weight.split([c.d_inner, c.d_xb, c.d_xb, c.d_inner])
    for target, source in ((x, attention.v_proj.weight), (B, attention.k_proj.weight),
                           (C, attention.q_proj.weight[order]), (mixer.out_proj.weight, attention.o_proj.weight[:, order])):
        assert target.shape == source.shape, (target.shape, source.shape)
        target.copy_(source)
    return mixer


def convert(student, teacher, layers, init="aligned"):
    """Replace the mixers of these layers of student, in place, by Mamba layers made from the teacher's attention.
    layers: 0-based; all must still be attention in the student. init: a key of INITS. Returns the student."""
    layout = list(student.config.layout)
    if init not in INITS:
        raise UserError(f"unknown init {init!r}; known: {', '.join(INITS)}")
    for i in layers:
        if not 0 <= i < len(layout) or layout[i] != "t" or teacher.config.layout[i] != "t":
            raise UserError(f"layer {i} is not an attention layer (layout: {' '.join(layout)})")
        layout[i] = "n" if init == "identity" else "m2"
    student.config = replace(student.config, layout=tuple(layout))
    for i in layers:
        block = student.layers[i]
        weight, block.kind = block.mlp.down_proj.weight, layout[i]
        if init == "identity":
            del block.input_layernorm
        else:
            block.mixer = cast(mil_mixer(teacher.layers[i].self_attn, student.config, init), weight.device, weight.dtype)
        del block.self_attn
    return student


def cast(module, device, dtype):
    """Move to device and dtype; A_log and D stay float32 (the recurrence is sensitive to them)."""
    for name, p in module.named_parameters():
        p.data = p.data.to(device, torch.promote_types(dtype, torch.float32) if keeps_float32(name) else dtype)
    return module


def keeps_float32(name):
    return name.endswith((".A_log", ".D")) or name in ("A_log", "D")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a directory with config.json and safetensors, in the Hugging Face layout. All-attention models are
# Mistral's format, hybrids Apriel-H1's. Everything that would change the result is either implemented or refused.

MODEL_TYPES = ("mistral", "llama", "apriel_hybrid_ssm", "apriel_h")
SSM_KEYS = {                                 # ssm_cfg key -> (Config field or None if it changes nothing, default)
    "d_state": ("d_state", 64), "d_inner": ("d_inner", 4096), "d_xb": ("d_xb", None), "dt_rank": ("dt_rank", None),
    "d_conv": ("d_conv", 4), "repeat_kv_before_conv": ("expand_before_conv", True), "conv_bias": ("conv_bias", True),
    "dt_proj_bias": ("dt_bias", True), "bias": ("proj_bias", False), "dt_min": ("dt_min", 0.001),
    "dt_max": ("dt_max", 0.1), "dt_scale": ("dt_scale", 1.0), "dt_init_floor": ("dt_init_floor", 1e-4),
    "expand": (None, 1), "dt_init": (None, "random"),
    "activation": (None, "identity"),        # belongs to another mixer; m2 is always SiLU
    "n_v_heads": (None, None), "n_qk_heads": (None, None), "chunk_size": (None, None),           # the same
}


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None


def config_from_json(raw, where="config.json"):
    """raw: the dict in config.json -> Config. Defaults for absent keys are those of transformers' classes."""
    kind, hybrid = raw.get("model_type"), raw.get("model_type") in MODEL_TYPES[2:]
    if kind not in MODEL_TYPES:
        raise UserError(f"{where}: model_type {kind!r} is not supported; known: {', '.join(MODEL_TYPES)}")
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
    for key in needed + ["hybrid_block_layout"] * hybrid:
        if raw.get(key) is None:
            raise UserError(f"{where}: the key {key!r} is missing")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    refused = {"hidden_act": raw.get("hidden_act", "silu") != "silu", "attention_bias": raw.get("attention_bias", False),
               "mlp_bias": raw.get("mlp_bias", False), "quantization_config": raw.get("quantization_config"),
               "partial_rotary_factor": rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1,
               "rope_parameters" if "rope_parameters" in raw else "rope_scaling":
                   rope and rope.get("rope_type", rope.get("type", "default")) != "default"}
    for key, bad in refused.items():
        if bad:
            raise UserError(f"{where}: {key} = {json.dumps(raw.get(key))} changes the result and is not implemented")
    n_head, eos = raw["num_attention_heads"], raw.get("eos_token_id", 2)
    kv_default, window_default = (n_head, None) if kind == "llama" else (8, 4096)
    fields = dict(
        vocab_size=raw["vocab_size"], d_model=raw["hidden_size"], n_layer=raw["num_hidden_layers"], n_head=n_head,
        n_kv_head=raw.get("num_key_value_heads", kv_default) or n_head, d_mlp=raw["intermediate_size"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // n_head,
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))), norm_eps=raw.get("rms_norm_eps", 1e-6),
        sliding_window=raw.get("sliding_window", window_default), tie_embeddings=raw.get("tie_word_embeddings", False),
        bos_id=raw.get("bos_token_id", 1), eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        max_length=raw.get("max_position_embeddings", 4096))
    if hybrid:
        ssm = raw.get("ssm_cfg") or {}
        unknown = sorted(set(ssm) - set(SSM_KEYS))
        if unknown:
            raise UserError(f"{where}: ssm_cfg.{unknown[0]} is not known to this reader")
        fields |= {field: ssm.get(key, default) for key, (field, default) in SSM_KEYS.items() if field}
        fields["layout"] = tuple(raw["hybrid_block_layout"])
        fields["d_inner"] = fields["d_inner"] or ssm.get("expand", 1) * raw["hidden_size"]
        fields["d_xb"] = fields["d_xb"] or raw["hidden_size"]
        fields["dt_rank"] = None if fields["dt_rank"] == "auto" else fields["dt_rank"]
    try:
        return Config(**fields)
    except TypeError as e:
        raise UserError(f"{where}: a value has the wrong type ({e})") from None
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def config_to_json(config, dtype):
    """Config -> the dict for config.json; dtype: a torch dtype, recorded as the weights' dtype."""
    c, hybrid = config, any(kind != "t" for kind in config.layout)
    raw = {"architectures": ["AprielHybridSSMForCausalLM" if hybrid else "MistralForCausalLM"],
           "model_type": "apriel_hybrid_ssm" if hybrid else "mistral",
           "vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layer,
           "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim,
           "intermediate_size": c.d_mlp, "hidden_act": "silu", "rope_theta": c.rope_theta, "rms_norm_eps": c.norm_eps,
           "sliding_window": c.sliding_window, "tie_word_embeddings": c.tie_embeddings, "bos_token_id": c.bos_id,
           "eos_token_id": list(c.eos_ids) if len(c.eos_ids) > 1 else c.eos_ids[0] if c.eos_ids else None,
           "max_position_embeddings": c.max_length, "torch_dtype": str(dtype).removeprefix("torch.")}
    if hybrid:
        raw["hybrid_block_layout"] = list(c.layout)
        raw["ssm_cfg"] = {key: getattr(c, field) for key, (field, _) in SSM_KEYS.items() if field}
        raw["ssm_cfg"] |= {"expand": 1, "dt_init": "random", "activation": "identity"}
    return raw


def open_tensors(path):
    """path: a checkpoint directory -> {tensor name: (open file, shape)}, following the index where there is one."""
    from safetensors import SafetensorError, safe_open
    index = os.path.join(path, "model.safetensors.index.json")
    names, files = None, ["model.safetensors"]
    if os.path.exists(index):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index} has no weight_map")
        files = sorted(set(names.values()))
    tensors = {}
    for file in files:
        full = os.path.join(path, file)
        if not os.path.exists(full):
            raise UserError(f"{full} is missing")
        try:
            f = safe_open(full, framework="pt")
            tensors |= {key: (f, tuple(f.get_slice(key).get_shape())) for key in f.keys()
                        if names is None or names.get(key) == file}
        except (SafetensorError, OSError) as e:
            raise UserError(f"{full} is not a readable safetensors file: {e}") from None
    lost = sorted(set(names or ()) - set(tensors))
    if lost:
        raise UserError(f"{index} names tensors that are not in their files: {some(lost)}")
    return tensors


def some(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
    config = config_from_json(read_json(os.path.join(path, "config.json")), os.path.join(path, "config.json"))
    tensors = open_tensors(path)
    shapes, joined = {name: shape for name, (_, shape) in tensors.items()}, {}
    rows = 2 * config.d_inner + 2 * config.d_xb                              # of in_proj: z, x, B, C
    for name in [name for name in shapes if name.endswith("mixer.in_proj.weight")]:
        dt_name = name.replace(".in_proj.", ".dt_in_proj.")
        if dt_name not in shapes and shapes[name][0] > rows:                 # M1, older Fast-LLM: dt's rows come last
            joined[dt_name], width = name, shapes[name][1]
            shapes[name], shapes[dt_name] = (rows, width), (shapes[name][0] - rows, width)
    ranks = [shape[0] for name, shape in shapes.items() if name.endswith("mixer.dt_in_proj.weight")]
    config = replace(config, dt_rank=ranks[0]) if ranks else config          # published configs disagree; weights decide
    with torch.device("meta"):
        model = HybridLM(config)
    params = {file_name(name): (name, p) for name, p in model.named_parameters()}                # a tied head is not listed
    wrong = ([f"missing {name}" for name in params if name not in shapes] +
             [f"unexpected {name}" for name in shapes if name not in params] +
             [f"{name} has shape {shapes[name]}, expected {tuple(p.shape)}" for name, (_, p) in params.items()
              if name in shapes and shapes[name] != tuple(p.shape)])
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit config.json: {some(wrong)}")
    weights = {}
    for name, (own, p) in params.items():
        w = tensors[joined.get(name, name)][0].get_tensor(joined.get(name, name))
        w = w[rows:] if name in joined else w[:rows] if name in joined.values() else w
        to = torch.promote_types(dtype, torch.float32) if keeps_float32(own) else dtype
        weights[own] = nn.Parameter(w.to(device, to, copy=True))
    model.load_state_dict(weights, strict=False, assign=True)                # strict was decided above, with better words
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "generation_config.json")


def write_atomic(path, write):
    """write(temporary path), then rename: a reader, or a crash, never meets half a file."""
    write(path + ".tmp")
    os.replace(path + ".tmp", path)


def write_json(path, value):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1)
            f.write("\n")
    write_atomic(path, write)


@torch.no_grad()
def save_pretrained(model, path, tokenizer_from=None, shard_bytes=5 << 30):
    """Write model to the directory path: config.json and model.safetensors, or shards of at most shard_bytes with an
    index. tokenizer_from: a directory whose tokenizer files are copied along. A_log and D are written in float32."""
    from safetensors.torch import save_file
    path = os.fspath(path)
    os.makedirs(path, exist_ok=True)
    shards, size = [{}], 0
    for name, p in model.named_parameters():                                 # a tied head appears once, as the embedding
        w = (p.float() if keeps_float32(name) and p.dtype != torch.float64 else p).detach().cpu().contiguous()
        if shards[-1] and size + w.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][file_name(name)], size = w, size + w.nbytes
    count, index = len(shards), os.path.join(path, "model.safetensors.index.json")
    files = ["model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(files, shards):
        write_atomic(os.path.join(path, file), lambda to, shard=shard: save_file(shard, to, metadata={"format": "pt"}))
    if count > 1:
        total = sum(w.nbytes for shard in shards for w in shard.values())
        where = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": where})
    elif os.path.exists(index):
        os.remove(index)                                                     # left by an earlier, sharded save
    write_json(os.path.join(path, "config.json"), config_to_json(model.config, model.embed_tokens.weight.dtype))
    for file in TOKENIZER_FILES if tokenizer_from else ():
        source = os.path.join(os.fspath(tokenizer_from), file)
        if os.path.exists(source) and os.path.abspath(source) != os.path.abspath(os.path.join(path, file)):
            write_atomic(os.path.join(path, file), lambda to, source=source: shutil.copyfile(source, to))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: a byte-level BPE tokenizer.json becomes a tiktoken.Encoding with the same ids for every text.
#
# tiktoken joins two neighbours whenever the joined bytes are in the vocabulary, lowest id first, and takes a whole
# pre-token that is in the vocabulary as it is. tokenizer.json lists the allowed merges instead. The two agree if merges
# come in the order of ids and no token can be reached in one way only by the one rule: that is checked token by token.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_characters():
    """The GPT-2 table {character in tokenizer.json: byte}: printable bytes stand for themselves, others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def bpe(parts, rank):
    """Join neighbours in parts (a list of bytes), lowest rank[left, right] first, until none is left to join."""
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), math.inf))
        if (parts[best], parts[best + 1]) not in rank:
            break
        parts = parts[:best] + [parts[best] + parts[best + 1]] + parts[best + 2:]
    return parts


def split_pattern(pre, refuse):
    """The pre_tokenizer of a tokenizer.json -> the regular expression for tiktoken."""
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    level = steps[-1] if steps else {}
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        refuse("the pre-tokenizer does not end with ByteLevel without a prefix space")
    if len(steps) == 1 and level.get("use_regex", True):
        return GPT2_PATTERN
    split = steps[0]
    if len(steps) != 2 or split.get("type") != "Split" or level.get("use_regex", True):
        refuse("the pre-tokenizer is not one Split followed by ByteLevel")
    if split.get("behavior") != "Isolated" or split.get("invert") or "Regex" not in split.get("pattern", {}):
        refuse(f"Split with behavior {split.get('behavior')}, invert {split.get('invert')}, pattern {split.get('pattern')}")
    pattern = split["pattern"]["Regex"]
    return f"{pattern}|(?:(?!{pattern})(?s:.))+"                             # what the pattern skips is a piece of its own


def load_tokenizer(path):
    """path/tokenizer.json -> tiktoken.Encoding. Encode with allowed_special="all" to cut special tokens out of the text.
    Raises UserError, with the reason, for a tokenizer that tiktoken cannot represent exactly."""
    import tiktoken
    file = os.path.join(os.fspath(path), "tokenizer.json")
    raw, table = read_json(file), byte_characters()

    def refuse(reason):
        raise UserError(f"{file}: {reason}")

    model, added = raw.get("model") or {}, raw.get("added_tokens") or []
    if model.get("type") != "BPE" or "vocab" not in model or "merges" not in model:
        refuse(f"model type {model.get('type')}, only byte-level BPE is supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"model.{key} = {model[key]!r}")
    if raw.get("normalizer"):
        refuse(f"it has a normalizer ({raw['normalizer'].get('type')})")
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            refuse(f"the added token {token['content']!r} strips or needs word borders")
    special = {token["content"]: token["id"] for token in added}
    for a, b in zip(sorted(special), sorted(special)[1:]):                   # a prefix sorts right before its extension
        if b.startswith(a):
            refuse(f"the special token {a!r} is a prefix of {b!r}")
    try:
        as_bytes = lambda text: bytes(table[character] for character in text)
        ranks = {as_bytes(text): i for text, i in model["vocab"].items() if text not in special}
        pairs = [tuple(map(as_bytes, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
    except KeyError as e:
        refuse(f"{e.args[0]!r} is not a character of byte-level BPE")
    ids = [ranks.get(left + right, -1) for left, right in pairs]
    if min(ids, default=0) < 0 or ids != sorted(ids) or any(bytes([byte]) not in ranks for byte in range(256)):
        refuse("its merges are not in the order of ids, or a byte or a merged token is not in the vocabulary")
    rank = {pair: i for i, pair in enumerate(pairs)}
    for token in ranks:
        every = all((token[:i], token[i:]) in rank for i in range(1, len(token))
                    if token[:i] in ranks and token[i:] in ranks)
        if not (every and model.get("ignore_merges")) and bpe([bytes([x]) for x in token], rank) != [token]:
            refuse(f"the token {token!r} is not what its merges give; tiktoken would use it elsewhere")
    try:
        return tiktoken.Encoding(os.path.basename(os.path.normpath(path)), pat_str=split_pattern(raw.get("pre_tokenizer") or {}, refuse),
                                 mergeable_ranks=ranks, special_tokens=special)
    except UserError:
        raise
    except ValueError as e:
        refuse(f"tiktoken refused the pattern: {e}")
