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

      inside Mamba: x is the normed input             copied from (MIL, "Mamba in Llama")
          z  = W_z x                    gate          fresh
          u  = silu(conv(W_u x))        value         W_v       (the conv is fresh)
          B  = W_B x                    write key     W_k
          C  = W_C x                    read query    W_q
          dt = softplus(W_dt x + 2 b)   step size     fresh     (why 2 b: see the Mamba mixer)
          y  = scan(u, dt, A, B, C)     memory        A fresh: -1 ... -d_state
          out = W_o (y * silu(z))                     W_o

The recurrence, for one channel with its d_state memory cells h and each token t:
      h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        forget a little, write u under the key B
      y_t = C_t . h_t + D u_t                         read with the query C; D is a skip connection

Contents                                     (read part 1 top to bottom: every name is defined before it is used)
      Part 1   The model, by definition      config, norm, positions, attention, scan, Mamba, block, model
      Part 2   Using it                      state operations, prefill, decode, sampling
      Part 3   The same numbers, faster      chunked scan, choice of the scan, one token, texts that share rows
      Part 4   Files, and running a script   config.json, safetensors, tokenizer, chat template; devices, errors
      Part 5   Triton                        the scan and the one-token step as GPU kernels

Glossary. Sizes are lower case; capitals are the papers' letters.
      b, t                        batch, tokens in this call
      x                           residual stream, or a module's input: (b, t, d_model)
      q, k, v                     query, key, value of attention: n_head, n_kv_head heads of head_dim
      u, dt, z                    value that the scan writes, step size, gate: (b, t, d_inner), d in the scan;
                                  u is (b, t, d_xb) before conv and expansion
      A, B, C, D                  decay rate, write key, read query, skip weight
      h                           memory cells (b, d_inner, d_state): n = d_state cells a channel
      d_xb                        channels of u and B, before they are repeated for the query heads that share them
      groups                      channel c of d reads row c // (d / groups) of B (and of C)
      state                       what is handed in and handed back: all that a model, or a layer, remembers
Upstream code is named by commit: Fast-LLM 7d61a1ba (Apriel), state-spaces/mamba e9594ce1, MambaInLlama 60d64dc6.
"""
import math
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # waiting threads sleep: on a shared machine 10 times faster
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """Something the user can put right (a path, a file, a flag). Scripts print it as one line and exit with code 2."""
    def __init__(self, message):
        # A name in a damaged file may hold line ends.
        super().__init__(" ".join(message.splitlines()))


class RopeScaling(NamedTuple):
    """Llama 3's way to stretch rotary positions to longer texts. Another rule (yarn) is a class like this one, read and
    written in part 4 (rope_scaling_from_json and the next); where it scales attention, cos and sin of make_place."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int                 # tokens of context before the stretch

    def stretch(self, frequency):
        """frequency: radians per token, one per pair. Pairs that turn less than low_freq_factor times within
        the original context are slowed down by factor, those above high_freq_factor not, between them a blend."""
        turns = self.original_max_length * frequency / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        keep = ((turns - self.low_freq_factor) / width).clamp(0, 1)          # 1: as it is, 0: slowed down
        return frequency * keep + frequency / self.factor * (1 - keep)


# ======================================================================================================================
# Part 1. The model, by definition (part 3 has faster forms of some of it). First its shape, as in config.json.

@dataclass(frozen=True)
class Config:
    """Frozen: a model of another shape has another Config. Raises UserError, and so do the layers."""
    vocab_size: int
    d_model: int                             # hidden_size
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_mlp: int                               # intermediate_size
    layout: tuple = ()                       # the kind of each layer: t, m2, i or n, see Block; empty: all t
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None        # attention sees this many newest tokens; None: all
    tie_embeddings: bool = False             # the output head is the embedding table
    bos_id: int | None = 1                   # begin-of-text token
    eos_ids: tuple = (2,)                    # tokens that end a text
    max_length: int = 4096                   # trained context in tokens; informative, not a limit
    # Mamba layers. None: the width that copying attention needs, or Mamba's usual rank.
    d_inner: int | None = None               # n_head * head_dim
    d_xb: int | None = None                  # n_kv_head * head_dim
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int | None = None               # ceil(d_model / 16)
    expand_before_conv: bool = True          # the conv has d_inner channels, else d_xb
    conv_bias: bool = True
    dt_bias: bool = True
    proj_bias: bool = False                  # of in_proj, dt_in_proj and out_proj
    dt_min: float = 0.001                    # only for the start of a new layer: the range of its dt
    dt_max: float = 0.1
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    # What some families of transformers have beyond Mistral's.
    family: str = "mistral"                  # saved as, if all is attention: mistral, llama, qwen2, qwen3
    qkv_bias: bool = False                   # Qwen2: biases of q_proj, k_proj and v_proj
    qk_norm: bool = False                    # Qwen3: an RMSNorm of every query and key, before the rotation
    rope_scaling: RopeScaling | None = None  # Llama 3
    pad_id: int | None = None                # never used here, kept for the files

    def __post_init__(self):
        widths = {"layout": ("t",) * self.n_layer, "d_inner": self.n_head * self.head_dim,
                  "d_xb": self.n_kv_head * self.head_dim, "dt_rank": math.ceil(self.d_model / 16)}
        for name, default in widths.items():
            object.__setattr__(self, name, getattr(self, name) or default)       # the way around frozen
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head % n_kv_head must be 0, got {self.n_head} % {self.n_kv_head}")
        if len(self.layout) != self.n_layer:
            raise UserError(f"the layout names {len(self.layout)} layers, the model has {self.n_layer}")


# ----------------------------------------------------------------------------------------------------------------------
# RMSNorm and SwiGLU: the parts that the conversion leaves alone.
class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        """x (..., dim) -> x / rms(x) * weight. In float32 (at least), cast back, then scaled, as Mistral does it."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.rms_norm(wide, (x.shape[-1],), eps=self.eps)
        return y.to(x.dtype) * self.weight


class MLP(nn.Module):
    """SwiGLU, each token by itself: down(silu(gate(x)) * up(x)), (..., d_model) -> (..., d_model)."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ----------------------------------------------------------------------------------------------------------------------
# Where the tokens of one call stand. One forward serves a whole text, pieces, one token. What differs is how many
# tokens the state holds (`past`) and where each row's document began: a row may hold several, and padding left of a
# short text is one. `reset` marks first tokens; from it come positions and the mask.
class Place(NamedTuple):
    past: int                                # tokens in the state before this call
    positions: torch.Tensor | None           # (b, t) position within the document; None: past ... past + t - 1
    cos: torch.Tensor                        # (1 or b, 1, t, head_dim), as rotary takes them
    sin: torch.Tensor                        # ... with a minus sign in its first half
    mask: torch.Tensor | None                # (1 or b, 1, t, past + t) True where the query may look; None: causal.
                                             # Part 3 has a shorter form of it, Documents
    donated: bool = False                    # the caller gives its state away: it may be overwritten


def document_positions(tokens, past, origin, reset):
    """tokens (b, t), reset (b, t) or None, origin (b,): where in its row each open document began, None: at 0
    -> positions (b, t) within the document and the new origin; None and None for one document per row."""
    if reset is None and origin is None:
        return None, None
    index = torch.arange(past, past + tokens.shape[1], device=tokens.device)     # (t) places in the row
    first = tokens.new_zeros(len(tokens), 1) if origin is None else origin[:, None]
    if reset is not None:
        newest = torch.where(reset, index, 0).cummax(dim=1).values
        first = torch.maximum(first, newest)                                     # (b, t) where the document began
    return index - first, first[:, -1]


def rotary_frequencies(config, device):
    """-> (head_dim / 2) float32: the turn per token of each pair, in radians."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequency = config.rope_theta ** -exponent
    return frequency if config.rope_scaling is None else config.rope_scaling.stretch(frequency)


def attention_mask(config, past, positions, t, device):
    """-> (1 or b, 1, t, past + t) True where a query may look: not ahead, nor beyond the window or its document. None
    where "not ahead" says it all, and the tokens begin the text or are one token."""
    window = config.sliding_window
    plain = positions is None and (past == 0 or t == 1)
    if plain and (window is None or past + t <= window):
        return None
    query = torch.arange(past, past + t, device=device)
    back = query[:, None] - torch.arange(past + t, device=device)  # (t, past + t) how far back each key is
    mask = back >= 0
    if window is not None:
        mask &= back < window
    if positions is not None:
        mask = mask & (back <= positions[..., None])                # (b, t, past + t)
    return mask.view(-1, 1, t, past + t)


def make_place(config, tokens, past, origin, reset, dtype, donated=False):
    """Arguments as in document_positions; dtype: that of cos and sin -> (Place, origin)."""
    t = tokens.shape[1]
    positions, origin = document_positions(tokens, past, origin, reset)
    where = positions
    if positions is None:
        where = torch.arange(past, past + t, device=tokens.device)[None]
    angle = where[:, None, :, None] * rotary_frequencies(config, tokens.device)  # (1 or b, 1, t, head_dim / 2)
    cos = torch.cat([angle.cos(), angle.cos()], dim=-1).to(dtype)                # (1 or b, 1, t, head_dim)
    sin = torch.cat([-angle.sin(), angle.sin()], dim=-1).to(dtype)
    mask = attention_mask(config, past, positions, t, tokens.device)
    return Place(past, positions, cos, sin, mask, donated), origin


def rotary(x, cos, sin):
    """x (b, heads, t, head_dim): each pair x1, x2 = x[i], x[i + head_dim / 2] to x1 cos - x2 sin, x2 cos + x1 sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin


# ----------------------------------------------------------------------------------------------------------------------
# Grouped-query attention with a key/value cache: several query heads share one key and one value head. Still, a layer
# keeps 2 * n_kv_head * head_dim numbers of every token and reads them all for each new one: the cost that the
# conversion removes. Keys are kept as rotated; heads come before tokens, so what one head reads lies in one piece.
class LayerState:
    """What one layer remembers: a dataclass of tensors (b, ...). Part 2 has the operations."""
    def __iter__(self):
        return iter(vars(self).values())


@dataclass(frozen=True)
class KV(LayerState):
    """The cache of one attention layer."""
    k: torch.Tensor                          # (b, n_kv_head, room for tokens, head_dim), filled up to the position
    v: torch.Tensor


def append(cache, new, past):
    """cache (b, heads, max_length, head_dim), new (b, heads, t, head_dim) -> the cache with new at `past`."""
    gradients = torch.is_grad_enabled() and (new.requires_grad or cache.requires_grad)
    if gradients or cache.shape[2] < past + new.shape[2]:          # the second: a copy of this kind has no room
        return torch.cat([cache[:, :, :past], new.to(cache.dtype)], dim=2)
    cache.narrow(2, past, new.shape[2]).copy_(new)                 # in place: no earlier token is touched
    return cache


class Attention(nn.Module):
    name_in_file = "self_attn"
    float32 = ()                             # parameters that stay in float32 whatever the model's dtype

    def __init__(self, config):
        super().__init__()
        self.config = config
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.n_head * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def new_state(self, batch, max_length):
        shape = (batch, self.config.n_kv_head, max_length, self.config.head_dim)
        return KV(self.k_proj.weight.new_zeros(shape), self.k_proj.weight.new_zeros(shape))

    def project(self, x, place):
        """x (b, t, d_model) -> q (b, n_head, t, head_dim), k and v (b, n_kv_head, t, head_dim); q and k rotated.
        Another norm: here, project_joined, distill.rows_of, and a key in part 4. Another rope: see RopeScaling."""
        b, t, _ = x.shape
        heads = (b, t, -1, self.config.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        return rotary(q, place.cos, place.sin), rotary(k, place.cos, place.sin), v

    def attend(self, q, k, v, mask):
        """q (b, n_head, t, head_dim), k and v (b, n_kv_head, past + t, head_dim), mask as in Place -> like q.
        Query head i reads key/value head i // (n_head / n_kv_head)."""
        causal = mask is None and q.shape[2] > 1                   # one token may look at all there is
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    def forward(self, x, state, place):
        """x (b, t, d_model), state KV or None -> (b, t, d_model), the cache with t more tokens (None for None)."""
        b, t, _ = x.shape
        q, k, v = self.project(x, place)
        if state is not None:
            k = append(state.k, k, place.past)
            v = append(state.v, v, place.past)
            state = KV(k, v)
            k = k.narrow(2, 0, place.past + t)                     # (b, n_kv_head, past + t, head_dim)
            v = v.narrow(2, 0, place.past + t)
        y = self.attend(q, k, v, place.mask)
        y = y.transpose(1, 2).reshape(b, t, -1)                    # (b, t, n_head * head_dim)
        return self.o_proj(y), state


# ----------------------------------------------------------------------------------------------------------------------
# The selective scan: the memory of a Mamba layer. Every channel owns d_state cells. At each token all decay by
# exp(dt * A), then dt * u is added under the key B, and the query C reads them out. "Selective": dt, B and C come from
# the token, so the layer chooses what to keep, and one must walk through time. dt near 0 lets a token pass by, a large
# one wipes the cells and writes the token. The rates A = -1 ... -n: some cells forget in a few steps, some in many.
def scan_loop(u, dt, A, B, C, D=None, z=None, dt_bias=None, h=None, reset=None):
    """u, z, and dt before its softplus (b, t, d); A (d, n), negative; B (b, t, groups, n); C (b, t, other groups, n);
    D, dt_bias (d); h (b, d, n): the cells before the first token, None: zeros; reset (b, t) bool: cells are emptied
    before that token -> y (b, t, d) in u's dtype, and the cells after the last token. All in float32 at least.
    As selective_scan_ref in state-spaces/mamba e9594ce1, with time in the second place, groups, h and reset."""
    dtype = u.dtype
    wide = torch.promote_types(dtype, torch.float32)
    u = u.to(wide)
    A = A.to(wide)
    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    dt = F.softplus(dt)
    B = B.to(wide).repeat_interleave(len(A) // B.shape[2], dim=2)  # (b, t, d, n): a row for every channel
    C = C.to(wide).repeat_interleave(len(A) // C.shape[2], dim=2)
    h = u.new_zeros(len(u), *A.shape) if h is None else h.to(wide)
    ys = []
    for i in range(u.shape[1]):
        if reset is not None:
            h = h.masked_fill(reset[:, i, None, None], 0)
        decay = torch.exp(dt[:, i, :, None] * A)                   # (b, d, n)
        added = (dt[:, i] * u[:, i])[..., None] * B[:, i]          # (b, d, n)
        h = decay * h + added
        ys.append((h * C[:, i]).sum(-1))                           # (b, d)
    y = torch.stack(ys, dim=1)                                     # (b, t, d)
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(dtype), h


# ----------------------------------------------------------------------------------------------------------------------
# The short causal conv in front of the scan: each channel mixes its last d_conv inputs. A scan step sees one token, and
# "what stood just before" is what look-up needs most often. Its state is the last d_conv - 1 raw inputs (before conv,
# bias and SiLU), newest last, zeros when there were fewer: short prompts and single tokens need no case of their own.
def causal_conv(u, before, weight, bias, positions):
    """u (b, t, c), before (b, d_conv - 1, c) earlier inputs, weight (c, d_conv), positions (b, t) or None -> (b, t, c).
    weight[:, -1] meets the newest input. An input from before the document began (positions < distance) counts as 0."""
    inputs = torch.cat([before.to(u.dtype), u], dim=1)             # (b, d_conv - 1 + t, c)
    y = 0 if bias is None else bias
    for i in range(weight.shape[1]):
        distance = weight.shape[1] - 1 - i
        tap = inputs[:, i:i + u.shape[1]]                          # (b, t, c): the inputs from `distance` tokens back
        if positions is not None and distance:
            tap = tap.masked_fill((positions < distance)[..., None], 0)
        y = y + tap * weight[:, i]
    return y


# ----------------------------------------------------------------------------------------------------------------------
# The Mamba mixer ("m2" in the file format): Mamba-1 with grouped u and B, shaped so that attention weights fit into it.
# in_proj makes [z, u, B, C] in one product; dt has a low-rank path of its own. Everything is cut into chunks of d_state
# (not of head_dim). With n = d_state, channel c of chunk j = c // n reads z[c], all of C's chunk j, and of chunk
# j // (d_inner / d_xb) all of B and the lane c % n of u.
# The trap of this format: dt_proj adds its bias, and the scan adds it again, so dt = softplus(W_dt x + 2 b). Every
# released checkpoint was trained that way and every reader must do it. A new layer stores half (distill.init_dt).
@dataclass(frozen=True)
class SSM(LayerState):
    """The state of one Mamba layer: its size does not depend on the number of tokens."""
    conv: torch.Tensor                       # (b, d_conv - 1, d_xb) the last raw inputs of the conv, before expansion
    h: torch.Tensor                          # (b, d_inner, d_state) float32: the cells


class Mamba(nn.Module):
    name_in_file = "mixer"
    float32 = ("A_log", "D")
    scan = staticmethod(scan_loop)

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.d_inner % c.d_xb or c.d_xb % c.d_state:
            raise UserError(f"d_xb {c.d_xb} must divide d_inner {c.d_inner}, d_state {c.d_state} d_xb")
        channels = c.d_inner if c.expand_before_conv else c.d_xb
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner + 2 * c.d_xb, bias=c.proj_bias)        # rows [z, u, B, C]
        self.dt_in_proj = nn.Linear(c.d_model, c.dt_rank, bias=c.proj_bias)
        self.dt_proj = nn.Linear(c.dt_rank, c.d_inner, bias=c.dt_bias)
        self.conv1d = nn.Conv1d(channels, channels, c.d_conv, groups=channels, bias=c.conv_bias)  # holds weights only
        rates = torch.arange(1, c.d_state + 1).float()             # A = -1 ... -n
        self.A_log = nn.Parameter(rates.log().repeat(c.d_inner, 1))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.proj_bias)

    def new_state(self, batch, max_length):
        c = self.config
        conv = self.in_proj.weight.new_zeros(batch, c.d_conv - 1, c.d_xb)
        wide = torch.promote_types(conv.dtype, torch.float32)
        return SSM(conv, conv.new_zeros(batch, c.d_inner, c.d_state, dtype=wide))

    def expand(self, u):
        """(b, t, d_xb) -> (b, t, d_inner): each chunk of d_state lanes d_inner / d_xb times in a row."""
        repeat = self.config.d_inner // self.config.d_xb
        chunks = u.unflatten(-1, (-1, 1, self.config.d_state))     # (b, t, d_xb / n, 1, n)
        return chunks.expand(-1, -1, -1, repeat, -1).flatten(2)

    def mix(self, u, dt, B, C, z, state, place):
        """The memory, between the projections. u, B (b, t, d_xb); dt, C, z (b, t, d_inner) -> y (b, t, d_inner), SSM"""
        c = self.config
        if state is None:
            state = SSM(u.new_zeros(len(u), c.d_conv - 1, c.d_xb), None)
        before = state.conv.to(u.dtype)
        newest = u[:, max(0, u.shape[1] - c.d_conv + 1):]          # copied below: a view would keep all of u
        conv = torch.cat([before, newest], dim=1)[:, newest.shape[1]:].contiguous()
        if c.expand_before_conv:
            before = self.expand(before)
            u = self.expand(u)
        u = causal_conv(u, before, self.conv1d.weight[:, 0], self.conv1d.bias, place.positions)
        u = F.silu(u)
        if not c.expand_before_conv:
            u = self.expand(u)                                     # u (b, t, d_inner) in any case
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(wide))
        B = B.unflatten(-1, (-1, c.d_state))                       # (b, t, d_xb / n, n)
        C = C.unflatten(-1, (-1, c.d_state))                       # (b, t, d_inner / n, n)
        reset = None if place.positions is None else place.positions == 0
        # Here the dt bias counts a second time.
        y, h = self.scan(u, dt, A, B, C, self.D, z, self.dt_proj.bias, state.h, reset)
        return y, SSM(conv, h)

    def forward(self, x, state, place):
        """x (b, t, d_model), state SSM or None, place Place -> (b, t, d_model), the state after t more tokens."""
        c = self.config
        z, u, B, C = self.in_proj(x).split([c.d_inner, c.d_xb, c.d_xb, c.d_inner], dim=-1)       # (b, t, these)
        dt = self.dt_proj(self.dt_in_proj(x))                      # (b, t, d_inner), holds the bias once
        y, state = self.mix(u, dt, B, C, z, state, place)
        return self.out_proj(y), state


# A new kind: a class with name_in_file, float32, new_state and forward, its LayerState, a line here. More: part 2.
MIXERS = {"t": Attention, "m2": Mamba}


# ----------------------------------------------------------------------------------------------------------------------
# Block, state and model. Two kinds of layer have no mixer: "i" passes its input on (part of the published format), "n"
# has its MLP alone (this project's control experiment, a layer whose mixer was removed; other readers refuse it).
class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""
    def __init__(self, config, kind):
        super().__init__()
        known = [*MIXERS, "i", "n"]
        if kind not in known:
            raise UserError(f"unsupported layer type {kind}; known: {', '.join(known)}")
        self.kind = kind
        self.mixer = None
        self.mlp = None
        if kind in MIXERS:
            self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
            self.mixer = MIXERS[kind](config)
        if kind != "i":
            self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
            self.mlp = MLP(config)

    def forward(self, x, state, place):
        """x (b, t, d_model), state LayerState or None -> x after this layer, and its state (of no use without one)."""
        if self.mixer is not None:
            y, state = self.mixer(self.input_layernorm(x), state, place)
            x = x + y
        return self.after_mlp(x), state

    def after_mlp(self, x):
        """The second half: x (b, t, d_model) -> like x."""
        if self.mlp is None:
            return x
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class State:
    """All that a model remembers of a batch of texts; the caller's own. A token makes a new State: cells and conv
    inputs anew, keys and values behind the old in one cache. The old State holds what it held; clone() to write two
    texts in turns. Of a State that is given away (donate) the kernel of part 5 overwrites cells and conv inputs."""
    position: int                            # tokens seen so far, padding included
    max_length: int                          # tokens that there is room for
    layers: tuple                            # per layer: LayerState, or None without a mixer
    origin: torch.Tensor | None = None       # (b,) where each row's current document began; None: at 0


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

    def hidden(self, tokens, state=None, reset=None, donate=False):
        """tokens (b, t) int64, state State or None, reset (b, t) bool or None (True: here begins a document, which sees
        nothing before it) -> (b, t, d_model) after the last norm, and the State after these tokens (None for None).
        donate: the caller gives its state away, so the new one may be written over it."""
        b, t = tokens.shape
        past = 0 if state is None else state.position
        if state is not None and past + t > state.max_length:
            raise UserError(f"{past} + {t} tokens do not fit into a state for {state.max_length}")
        x = self.embed_tokens(tokens)                              # (b, t, d_model)
        origin = None if state is None else state.origin
        place, origin = make_place(self.config, tokens, past, origin, reset, x.dtype, donate)
        layers = []
        for i, block in enumerate(self.layers):
            layer = None if state is None else state.layers[i]
            texts = b if layer is None else next(iter(layer)).shape[0]
            if texts != b:
                raise UserError(f"the state holds {texts} texts, the tokens {b}")
            if self.recompute and torch.is_grad_enabled():
                x, layer = checkpoint(block, x, layer, place, use_reentrant=False)
            else:
                x, layer = block(x, layer, place)
            layers.append(layer)
        if state is not None:
            state = State(past + t, state.max_length, tuple(layers), origin)
        return self.norm(x), state

    def forward(self, tokens, state=None, reset=None):
        """As hidden, but -> logits (b, t, vocab_size). From tokens to logits, and what is remembered: that is all."""
        x, state = self.hidden(tokens, state, reset)
        return self.lm_head(x), state


# ======================================================================================================================
# Part 2. Using it: states, prefill, decode, sampling. Written as functions of the model or the state; the lines at the
# end of the part make them methods.
#
# rows picks, repeats and reorders texts; clone lets a text go two ways; resize makes room. Each layer's part does its
# own share: a new kind of mixer has rows and clone from LayerState, and resize and nbytes too, unless its state grows
# with the text, as KV does. Six places at most: its class and state, MIXERS, Config and format_keys (whose keys then
# stand in every ssm_cfg that is written); distill.convert, if layers are to become it; bench.py, for limit and colour.

def new_state(model, batch, max_length):
    """Empty caches for `batch` texts of at most `max_length` tokens, on the model's device and in its dtype."""
    layers = []
    for block in model.layers:
        mixer = block.mixer
        layers.append(None if mixer is None else mixer.new_state(batch, max_length))
    return State(0, max_length, tuple(layers))


def layer_rows(layer, index):
    """index: a tensor of row numbers -> an independent state of these rows."""
    return type(layer)(*[tensor[index.to(tensor.device)] for tensor in layer])


def layer_clone(layer):
    return type(layer)(*[tensor.clone() for tensor in layer])


def layer_resize(layer, max_length, position):
    """-> with room for max_length tokens, of which `position` are there. A state of fixed size stays as it is."""
    return layer


def layer_nbytes(layer):
    """-> bytes that grow with the text, bytes that do not."""
    return 0, sum(tensor.nbytes for tensor in layer)


def kv_resize(cache, max_length, position):
    parts = []
    for old in cache:                                              # (b, n_kv_head, max_length, head_dim)
        new = old.new_zeros(*old.shape[:2], max_length, old.shape[3])
        new[:, :, :position] = old[:, :, :position]
        parts.append(new)
    return KV(*parts)


def kv_nbytes(cache):
    return cache.k.nbytes + cache.v.nbytes, 0


def each_layer(state, change):
    """-> state with change(layer state) in place of every layer's."""
    layers = tuple(None if layer is None else change(layer) for layer in state.layers)
    return replace(state, layers=layers)


def state_rows(state, index):
    """An independent State of these rows (a list or tensor of indices; a row may be taken many times)."""
    index = torch.as_tensor(index)
    state = each_layer(state, lambda layer: layer.rows(index))
    if state.origin is None:
        return state
    return replace(state, origin=state.origin[index.to(state.origin.device)])


def state_clone(state):
    """An independent copy."""
    return each_layer(state, lambda layer: layer.clone())


def state_resize(state, max_length):
    """The same State with room for max_length tokens (key/value caches are copied). Raises UserError for too few."""
    if max_length < state.position:
        raise UserError(f"{state.position} tokens do not fit into a state for {max_length}")
    state = each_layer(state, lambda layer: layer.resize(max_length, state.position))
    return replace(state, max_length=max_length)


def state_nbytes(state):
    """-> (bytes of key/value caches, bytes of states of fixed size), for the whole batch as allocated."""
    grow = 0
    fixed = 0
    for layer in state.layers:
        if layer is not None:
            layer_grows, layer_fixed = layer.nbytes()
            grow += layer_grows
            fixed += layer_fixed
    return grow, fixed


# ----------------------------------------------------------------------------------------------------------------------
# Generation: prefill the prompts, then one forward with t = 1 per token. Rows never see each other: prompts of
# different length are padded on the left, and a reset at each row's first real token hides the padding from
# attention, conv and scan alike. With equal lengths (one prompt above all) there is no padding and no reset. (Training
# pads on the right, where no token looks: it needs none either.)

def pad_left(prompts, device):
    """prompts: lists of ids -> tokens (b, longest), and reset (b, longest), None if all are equally long."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    reset = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt):] = torch.tensor(prompt)
        reset[row, longest - len(prompt)] = True
    ragged = any(len(prompt) < longest for prompt in prompts)
    return tokens.to(device), reset.to(device) if ragged else None


@torch.no_grad()
def prefill(model, prompts, room, chunk=None, state=None):
    """prompts: a list of id lists, each at least one long; room: tokens that will follow, if the state is new
    -> logits (b, vocab_size) of the last position only, and the State. With a state given, the prompts (of equal
    length) continue it. chunk: tokens of a prompt that are computed at once; None: 8192 over all rows, at least 1024.
    (Equal prompts in one chunk need no mask: 8192 tokens 12 % sooner than in chunks of 2048.) Raises UserError."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("every prompt needs at least one token")
    tokens, reset = pad_left(prompts, model.embed_tokens.weight.device)
    if state is None:
        state = model.new_state(len(prompts), tokens.shape[1] + room)
    elif reset is not None:
        raise UserError("prompts that continue a state must have equal lengths")
    chunk = chunk or max(1024, 8192 // len(prompts))
    for i in range(0, tokens.shape[1], chunk):
        begins = None if reset is None else reset[:, i:i + chunk]
        x, state = model.hidden(tokens[:, i:i + chunk], state, begins)
    return model.lm_head(x[:, -1]), state


@torch.no_grad()
def decode(model, logits, state, temperature=0.0, top_k=0, top_p=1.0, seed=0, streams=None):
    """Generator without an end (but UserError when the state is full): yields the next tokens (b,) int64 with the State
    that does not hold them yet, then feeds them.
    The State is given away and written over: clone() what shall last. Row i draws from a random stream of its
    own, seeded by (seed, streams[i]), with i itself for streams None. temperature 0 is greedy; top_k 0 and top_p 1
    switch those filters off. send(rows), a list of row numbers, in place of next(): go on with these rows only."""
    rngs = []
    for stream in range(len(logits)) if streams is None else streams:
        rngs.append(torch.Generator(logits.device).manual_seed(seed * 1_000_003 + stream))
    while True:
        token = choose(logits, temperature, top_k, top_p, rngs)    # (b,)
        rows = yield token, state
        if rows is not None:
            token = token[rows]
            state = state.rows(rows)
            rngs = [rngs[row] for row in rows]
        x, state = model.hidden(token[:, None], state, donate=True)
        logits = model.lm_head(x[:, -1])                           # (b, vocab_size)


def answers(model, logits, state, max_new_tokens, stop, **sampling):
    """Generator: one step of all rows that still write, as a list of (row, id), until every row has given a stop token
    (the last id of its row, then) or max_new_tokens. sampling: as decode takes it. Rows that have ended leave the
    batch once they are a quarter of it: a copy of the others' caches costs less than to go on computing them."""
    batch = list(range(len(logits)))         # the row that stands in each slot of the batch
    writing = set(batch)
    steps = model.decode(logits, state, **sampling)
    rows = None
    for _ in range(max_new_tokens):
        token, _ = steps.send(rows)
        new = [(row, id) for row, id in zip(batch, token.tolist()) if row in writing]
        yield new
        writing -= {row for row, id in new if id in stop}
        if not writing:
            break
        rows = None
        if len(writing) <= 0.75 * len(batch):
            rows = [slot for slot, row in enumerate(batch) if row in writing]
            batch = [batch[slot] for slot in rows]


def generate(model, prompts, max_new_tokens, temperature=0.0, stop=None, top_k=0, top_p=1.0, seed=0):
    """prompts: a list of id lists of any lengths -> per prompt the list of new ids, at most max_new_tokens, without
    the stop token that ended it (stop: ids; None: config.eos_ids). A row gives what it would give alone, if it
    drew from the random stream of its row number."""
    stop = set(model.config.eos_ids if stop is None else stop)
    outputs = [[] for _ in prompts]
    join_projections(model)
    with torch.inference_mode():
        logits, state = model.prefill(prompts, max_new_tokens)
        steps = model.answers(logits, state, max_new_tokens, stop, temperature=temperature, top_k=top_k,
                              top_p=top_p, seed=seed)
        for new in steps:
            for row, id in new:
                if id not in stop:
                    outputs[row].append(id)
    return outputs


# ----------------------------------------------------------------------------------------------------------------------
# Sampling. A row draws a number in [0, 1) and takes the token at which the sum of probabilities passes it. Its numbers
# come from a generator of its own, so that its text does not depend on what stands beside it in the batch. top_p means
# the smallest set of most likely tokens that holds so much: a token is outside if those likelier than it hold as much
# already. To find the set one sorts 50,000 numbers a row, which costs more than a small model; to see whether a token
# is in it, one adds. So draw from all, and where the token is outside, draw again among the likelier ones.

def draw(probs, top_p, rngs):
    """probs (b, m), rngs: a torch.Generator per row -> an index per row (b,)."""
    cumulative = probs.cumsum(dim=-1)
    draws = [torch.rand(1, device=probs.device, generator=rng) for rng in rngs]
    # Draws are below 1, so the last sum stays above. right: a token of probability 0 is never taken.
    passed = torch.stack(draws) * cumulative[:, -1:]               # (b, 1)
    index = torch.searchsorted(cumulative, passed, right=True)
    if top_p >= 1:
        return index[:, 0]
    likelier = torch.where(probs > probs.gather(1, index), probs, 0)
    mass = likelier.sum(dim=-1)
    outside = (mass >= top_p) & (mass > 0)                         # (b,) the likeliest token is always in
    rows = outside.nonzero()[:, 0].tolist()
    if rows:
        index[rows, 0] = draw(likelier[rows], top_p, [rngs[row] for row in rows])
    return index[:, 0]


def choose(logits, temperature, top_k, top_p, rngs):
    """logits (b, vocab_size) -> one token per row (b,); rngs: a torch.Generator per row. top_p counts after top_k."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if not top_k:
        return draw(logits.softmax(dim=-1), top_p, rngs)
    logits, ids = logits.topk(min(top_k, logits.shape[-1]))
    index = draw(logits.softmax(dim=-1), top_p, rngs)
    return ids.gather(1, index[:, None])[:, 0]


LayerState.rows = layer_rows
LayerState.clone = layer_clone
LayerState.resize = layer_resize
LayerState.nbytes = layer_nbytes
KV.resize = kv_resize
KV.nbytes = kv_nbytes
State.rows = state_rows
State.clone = state_clone
State.resize = state_resize
State.nbytes = state_nbytes
HybridLM.new_state = new_state
HybridLM.prefill = prefill
HybridLM.decode = decode
HybridLM.answers = answers
HybridLM.generate = generate


# ======================================================================================================================
# Part 3. The same numbers (but for the last digits), faster. Each form below names the definition that it equals and is
# tested against it. The list FASTER at the end of the part puts them in their places.

import sys
import warnings

try:
    import triton
    import triton.language as tl
except ImportError:                          # optional: without Triton the pure PyTorch scan does the work
    triton = None


# ----------------------------------------------------------------------------------------------------------------------
# The chunked scan, equal to scan_loop. The exponentials and products of a chunk of steps are made at once, so that a
# time step is a single multiply-add, and the read-out is one batched matrix product per chunk. Its backward keeps,
# beside the inputs, the cells at each chunk border and rebuilds the rest, so that of (b, t, d, n), the history of all
# cells, one chunk and a state per chunk exist at a time. It divides by nothing and takes no logarithm: any dt is safe.

def chunk_states(u, dt, A, B, h, keep):
    """One chunk, time first: u, dt (t, b, d), A (d, n), B (t, b, groups, n), h (b, d, n), keep (t, b, 1, 1) or None.
    -> decay and states, the cells after every step, both (t, b, d, n)."""
    t, b, d = u.shape
    groups, n = B.shape[2:]
    decay = torch.exp(dt[..., None] * A)
    if keep is not None:
        decay *= keep                                              # a document's first step forgets all
    written = (dt * u).view(t, b, groups, d // groups, 1)
    states = (written * B[:, :, :, None]).view(t, b, d, n)
    for i in range(t):
        states[i].addcmul_(decay[i], h)                            # states[i] += decay[i] * h
        h = states[i]
    return decay, states


class ChunkedScan(torch.autograd.Function):
    """(u, dt, A, B, C, h, keep, size), all time first and in one float dtype, dt positive -> y (t, b, d), last cells.

    Backward. grad_h_t is the gradient that reaches the cells from their own read-out and from the next step:
        grad_h_t = grad_y_t C_t + decay_{t+1} grad_h_{t+1}
        grad of dt_t u_t = grad_h_t . B_t          grad_B_t = grad_h_t dt_t u_t          grad_C_t = grad_y_t h_t
        grad of the rate dt_t A = grad_h_t decay_t h_{t-1}"""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, h, keep, size):
        """Keeps the inputs and the cells at every chunk border, (t / size, b, d, n)."""
        t, b, d = u.shape
        n = A.shape[1]
        c_groups = C.shape[2]
        y = torch.empty_like(u)
        borders = []
        for i in range(0, t, size):
            part = slice(i, i + size)
            borders.append(h)
            kept = None if keep is None else keep[part]
            _, states = chunk_states(u[part], dt[part], A, B[part], h, kept)
            grouped = states.view(-1, b, c_groups, d // c_groups, n)
            read = torch.matmul(grouped, C[part][..., None])       # (steps, b, c_groups, d / c_groups, 1)
            y[part] = read.view(-1, b, d)
            h = states[-1].clone()
        ctx.size = size
        ctx.save_for_backward(u, dt, A, B, C, keep, torch.stack(borders))
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, carry):
        """grad_y (t, b, d); carry (b, d, n), the gradient of the last cells. Chunks from the last to the first."""
        u, dt, A, B, C, keep, borders = ctx.saved_tensors
        t, b, d = u.shape
        groups, n = B.shape[2:]
        c_groups = C.shape[2]
        grad_y = grad_y.contiguous()
        grad_u = torch.empty_like(u)
        grad_dt = torch.empty_like(dt)
        grad_A = torch.zeros_like(A)
        grad_B = torch.empty_like(B)
        grad_C = torch.empty_like(C)
        for i in reversed(range(0, t, ctx.size)):
            part = slice(i, i + ctx.size)
            start = borders[i // ctx.size]
            kept = None if keep is None else keep[part]
            decay, states = chunk_states(u[part], dt[part], A, B[part], start, kept)

            grad_read = grad_y[part].view(-1, b, c_groups, d // c_groups, 1)
            grouped = states.view(-1, b, c_groups, d // c_groups, n)
            grad_C[part] = torch.matmul(grad_read.transpose(-1, -2), grouped).squeeze(-2)

            grad_h = grad_read * C[part][:, :, :, None]
            grad_h = grad_h.view(states.shape)                     # (steps, b, d, n)
            grad_h[-1] += carry                                    # from the chunk after this one
            for j in reversed(range(len(grad_h) - 1)):
                grad_h[j].addcmul_(decay[j + 1], grad_h[j + 1])
            carry = decay[0] * grad_h[0]                           # for the chunk before

            grouped = grad_h.view(-1, b, groups, d // groups, n)
            written = (dt[part] * u[part]).view(-1, b, groups, 1, d // groups)
            grad_B[part] = torch.matmul(written, grouped).squeeze(-2)
            grad_written = torch.matmul(grouped, B[part][..., None])
            grad_written = grad_written.view(-1, b, d)

            previous = torch.cat([start[None], states[:-1]])       # h_{t-1}
            # In place, to save memory: grad_h * decay * previous, (steps, b, d, n).
            grad_rate = previous.mul_(grad_h).mul_(decay)
            grad_A += (grad_rate * dt[part][..., None]).sum((0, 1))
            grad_dt[part] = grad_written * u[part]
            grad_dt[part] += (grad_rate * A).sum(-1)
            grad_u[part] = grad_written * dt[part]
        return grad_u, grad_dt, grad_A, grad_B, grad_C, carry, None, None


def chunk_size(b, d, n):
    """Steps per chunk: its cells, b * d * n a step, should stay in the processor's cache. Never fewer than 4: the cells
    at every chunk's start are kept for the backward pass."""
    return max(4, min(64, (1 << 19) // (b * d * n)))


def scan_chunk(u, dt, A, B, C, D=None, z=None, dt_bias=None, h=None, reset=None):
    """scan_loop in chunks of time steps."""
    dtype = u.dtype
    wide = torch.promote_types(dtype, torch.float32)
    u = u.to(wide)
    dt = dt.to(wide)
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    dt = F.softplus(dt)
    h = u.new_zeros(len(u), *A.shape) if h is None else h.to(wide)
    keep = None
    if reset is not None:
        keep = (~reset).T[:, :, None, None].to(wide)               # (t, b, 1, 1)

    def time_first(tensor):                                        # each step lies in one piece
        return tensor.to(wide).transpose(0, 1).contiguous()
    size = chunk_size(len(u), *A.shape)
    y, h = ChunkedScan.apply(time_first(u), time_first(dt), A.to(wide), time_first(B), time_first(C),
                             h, keep, size)
    y = y.transpose(0, 1)                                          # (b, t, d)
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(dtype), h


# ----------------------------------------------------------------------------------------------------------------------
# The choice of the scan. scan_backend is the only place that knows when Triton can be used.

def check_scan_shapes(u, dt, A, B, C, D, z, dt_bias, h, reset):
    b, t, d = u.shape
    n = A.shape[1]
    groups = B.shape[2]
    c_groups = C.shape[2]
    wanted = {"dt": (dt, (b, t, d)),
              "A": (A, (d, n)),
              "B": (B, (b, t, groups, n)),
              "C": (C, (b, t, c_groups, n)),
              "D": (D, (d,)),
              "z": (z, (b, t, d)),
              "dt_bias": (dt_bias, (d,)),
              "h": (h, (b, d, n)),
              "reset": (reset, (b, t))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise UserError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, not {shape}")
    if t == 0 or d % groups or d % c_groups:
        raise UserError(f"selective_scan: need t > 0 and groups that divide d = {d}, got t = {t}, "
                        f"{groups} groups of B and {c_groups} of C")


def selective_scan(u, dt, A, B, C, D=None, z=None, dt_bias=None, h=None, reset=None, impl="auto"):
    """Walk the recurrence of a Mamba layer: arguments and results as in scan_loop, its definition.
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t . h_t + D u_t) silu(z_t), with softplus(dt + dt_bias) for dt.

    impl: "loop" (the definition), "chunk" (pure PyTorch, fast), "triton", or "auto". u may be float32, bfloat16 or
    float64; the cells come back in float32 (float64 for that). Differentiable in every tensor but reset, and through
    the returned cells. Raises UserError on shapes that do not fit together."""
    check_scan_shapes(u, dt, A, B, C, D, z, dt_bias, h, reset)
    name = scan_backend(u.device, u.shape[1], A.shape[1], u.dtype, impl)
    scan = scan_loop if name == "loop" else scan_chunk
    if name == "triton":
        scan = scan_triton
    with torch.autocast(u.device.type, enabled=False):             # mixed precision must not touch it
        return scan(u, dt, A, B, C, D, z, dt_bias, h, reset)


def scan_backend(device, t=2, n=16, dtype=torch.float32, impl="auto"):
    """The scan to take for t steps of n cells in dtype on this device: "loop", "chunk" or "triton".
    Raises UserError if impl asks for what is not there. Sizes that no kernel takes go to chunk, with a warning."""
    if impl not in ("auto", "loop", "chunk", "triton"):
        raise UserError(f"selective_scan: unknown impl {impl!r}; known: loop, chunk, triton, auto")
    if impl in ("loop", "chunk"):
        return impl
    device_type = torch.device(device).type                        # ROCm is "cuda", too
    interpreted = triton is not None and triton.knobs.runtime.interpret
    if impl == "triton" and triton is None:
        raise UserError("impl='triton' needs Triton: pip install triton")
    if impl == "triton" and device_type != "cuda" and not (device_type == "cpu" and interpreted):
        raise UserError("impl='triton' needs a GPU, or TRITON_INTERPRET=1 set before the start; "
                        f"the tensors are on {device_type}")
    if impl == "auto" and (triton is None or device_type != "cuda"):
        return "loop" if t == 1 else "chunk"                       # one step needs no machinery
    if n > 64 or n & (n - 1) or dtype == torch.float64:
        # Python shows a warning once.
        warnings.warn("scan: the Triton kernels want d_state a power of two up to 64 and at most "
                      f"float32, not {n} and {dtype}: taking chunk")
        return "chunk"
    return "triton"


def scan_backend_reason(device):
    """One line for scripts to print: the scan that impl="auto" takes on this device, and why."""
    name = scan_backend(device)
    device_type = torch.device(device).type
    if name == "triton":
        why = f"Triton {triton.__version__} on {torch.cuda.get_device_name(device)}"
    elif device_type == "cuda":
        why = "Triton is not installed"
    else:
        why = f"pure PyTorch: Triton needs a GPU, this is {device_type}"
    return f"scan: {name} ({why})"


# ----------------------------------------------------------------------------------------------------------------------
# One token. Generating on a CPU is bound by the number of operations, on a GPU by the number of kernels: what follows
# makes fewer of them. A step of one token, in order (in inference mode, after join_projections: so does generate):
#
#     hidden            decode gives its state away; embedding; place (a mask for ragged batches and windows alone);
#                       then every block:
#       norm_on_cpu     on a GPU rms_norm as it is
#       Attention       project_joined: one product, one rotation; append; attend_fast; o_proj
#       Mamba           in_proj, dt_in_proj, dt_proj; mix_one_token (on a GPU step_kernel, which shifts the conv's
#                       inputs and does all up to the gate; on a CPU a few operations); out_proj
#       norm, MLP       mlp_joined: two products
#     lm_head           logits; choose; answers waits for the tokens
#
# Projections that read the same input (q, k, v; gate, up) become one product. The single weights become views of the
# joined ones: no more memory, and the model can still be trained and saved. A layer or weight that has been moved or
# replaced since is noticed, and the single products are taken again until generate() joins anew.
# (_modules and _parameters, because Module.__getattr__ takes longer than the check: this runs in every layer and step.)

class Joined(NamedTuple):
    weight: torch.Tensor                     # (rows of all, d_model)
    bias: torch.Tensor | None
    addresses: list                          # [(linear layer, "weight" or "bias", address of its rows)]
    places: list                             # [(modules of the owner, name, linear layer)]

    def __deepcopy__(self, memo):
        return None                          # the copy of a layer has weights of its own


def join(owner, *names):
    """-> Joined, of the linear layers of this module that read the same input; None if one is of another class."""
    linears = [owner._modules[name] for name in names]
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    joined = {"weight": None, "bias": None}
    addresses = []
    for name in joined:
        parts = [linear._parameters[name] for linear in linears]
        if parts[0] is None:
            continue
        joined[name] = together([part.data for part in parts])
        for linear, rows in zip(linears, joined[name].split([len(part) for part in parts])):
            linear._parameters[name].data = rows
            addresses.append((linear, name, rows.data_ptr()))
    places = [(owner._modules, name, linear) for name, linear in zip(names, linears)]
    return Joined(joined["weight"], joined["bias"], addresses, places)


def together(parts):
    """Tensors with rows of one width -> one tensor of all rows. It is their memory, if they lie in one piece already:
    another model that shares these weights may have joined them."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        one_piece = part.is_contiguous() and part.data_ptr() == end
        if not one_piece or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(parts)
        end += part.nbytes
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def still_joined(joined):
    """Is it there, are the layers still in their places, and their weights and biases still its rows?"""
    if joined is None:
        return False
    for modules, name, linear in joined.places:
        has_bias = linear._parameters.get("bias") is not None
        if modules[name] is not linear or has_bias != (joined.bias is not None):
            return False
    for linear, name, address in joined.addresses:
        part = linear._parameters.get(name)
        if part is None or part.data_ptr() != address:
            return False
    return True


def usable(joined):
    """In inference mode alone: what training and distillation compute does not depend on who has generated before."""
    return torch.is_inference_mode_enabled() and still_joined(joined)


def join_projections(model):
    """For generation: generate() calls it. Does nothing where it is done already. -> the model."""
    with torch.inference_mode(False), torch.no_grad():             # the weights stay ordinary tensors
        for block in model.layers:
            mlp = block.mlp
            if isinstance(mlp, MLP) and not still_joined(mlp.joined):
                mlp.joined = join(mlp, "gate_proj", "up_proj")
            mixer = block.mixer
            if isinstance(mixer, Attention) and not still_joined(mixer.joined):
                mixer.joined = join(mixer, "q_proj", "k_proj", "v_proj")
    return model


mlp_by_definition = MLP.forward
project_by_definition = Attention.project
attend_by_definition = Attention.attend
mask_by_definition = attention_mask
norm_by_definition = RMSNorm.forward
mix_by_definition = Mamba.mix


def mlp_joined(mlp, x):
    """MLP.forward with one product for gate and up."""
    if not usable(mlp.joined):
        return mlp_by_definition(mlp, x)
    gate, up = F.linear(x, mlp.joined.weight).chunk(2, dim=-1)
    return mlp.down_proj(F.silu(gate) * up)


def rotary_rolled(x, cos, sin):
    """rotary in three operations: rolling by half a head swaps the halves."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)


def project_joined(attention, x, place):
    """Attention.project with one product for q, k and v, and one rotation for q and k."""
    if not usable(attention.joined):
        return project_by_definition(attention, x, place)
    c = attention.config
    b, t, _ = x.shape
    qkv = F.linear(x, attention.joined.weight, attention.joined.bias)
    qkv = qkv.view(b, t, -1, c.head_dim).transpose(1, 2)           # (b, n_head + 2 n_kv_head, t, head_dim)
    qk, v = qkv.split_with_sizes([c.n_head + c.n_kv_head, c.n_kv_head], dim=1)
    if c.qk_norm:
        q, k = qk.split_with_sizes([c.n_head, c.n_kv_head], dim=1)
        qk = torch.cat([attention.q_norm(q), attention.k_norm(k)], dim=1)
    qk = rotary_rolled(qk, place.cos, place.sin)
    q, k = qk.split_with_sizes([c.n_head, c.n_kv_head], dim=1)
    return q, k, v


def attend_fast(attention, q, k, v, mask):
    """Attention.attend, for the four cases in which PyTorch's kernels need help."""
    if isinstance(mask, Documents):
        return attend_documents(attention, q, k, v, mask)
    if q.shape[2] == 1:
        # The query heads that share a key stand in for tokens, so each key is read only once.
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])    # (b, n_kv_head, heads per key, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, mask).reshape(q.shape)
    if q.is_cuda and mask is not None:
        # GPU kernels take a mask or groups, not both.
        share = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(share, dim=1)
        v = v.repeat_interleave(share, dim=1)
        return F.scaled_dot_product_attention(q, k, v, mask)
    if q.is_cpu and v.dtype == torch.bfloat16 and mask is None and q.shape[2] <= 512:
        return attend_by_products(q, k, v)
    return attend_by_definition(attention, q, k, v, mask)


def attend_by_products(q, k, v):
    """Attention.attend of whole texts, causal, with the scores written out. PyTorch's kernel for CPUs works in float32
    inside; two plain products in bfloat16 take 0.4 of its time where the CPU has them, and of its backward pass, too.
    The price is a matrix of t x t scores per head: for short texts alone."""
    b, heads, t, head_dim = q.shape
    share = heads // k.shape[1]
    # The query heads that share a key are one longer list of queries.
    queries = (q * head_dim ** -0.5).reshape(b, -1, share * t, head_dim)
    scores = (queries @ k.transpose(-1, -2)).view(b, heads, t, t)
    ahead = scores.new_full((t, t), -math.inf, dtype=torch.float32).triu(1)
    weights = (scores + ahead).softmax(-1).to(v.dtype)             # made in float32
    return (weights.view(b, -1, share * t, t) @ v).view(q.shape)


def norm_on_cpu(norm, x):
    """RMSNorm.forward. rms_norm is nine operations on a CPU, layer_norm one; (x, -x) has mean 0 and the mean square of
    x as its variance, so layer_norm does the same to it."""
    # With more than a thousand numbers the work counts, not the calls, and rms_norm is faster.
    if not x.is_cpu or torch.is_grad_enabled() or x.numel() > 1024:
        return norm_by_definition(norm, x)
    wide = x
    if x.dtype != torch.float32:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = x.shape[-1]
    y = torch.layer_norm(torch.cat([wide, -wide], dim=-1), (2 * n,), eps=norm.eps)
    return y.narrow(-1, 0, n).to(x.dtype) * norm.weight


def mix_one_token(mixer, u, dt, B, C, z, state, place):
    """Mamba.mix: one token is the work of one kernel on a GPU, see part 5, and of few operations elsewhere."""
    if u.shape[1] > 1 or state is None or torch.is_grad_enabled():
        return mix_by_definition(mixer, u, dt, B, C, z, state, place)
    if scan_backend(u.device, 1, mixer.config.d_state, u.dtype) == "triton":
        return mamba_step(mixer, u, dt, B, C, z, state, place)
    return mix_in_few_operations(mixer, u, dt, B, C, z, state, place)


def mix_in_few_operations(mixer, u, dt, B, C, z, state, place):
    """Mamba.mix for one token. A small model's step costs what its operations cost to call, and with one token every
    tap, group and cell has its place in one tensor: nothing is repeated, and no loop runs over taps."""
    c = mixer.config
    n = c.d_state
    b = len(u)
    h = state.h
    wide = h.dtype
    window = torch.cat([state.conv.to(u.dtype), u], dim=1)         # (b, d_conv, d_xb)
    inputs = window
    if place.positions is not None:
        distance = torch.arange(c.d_conv - 1, -1, -1, device=u.device)
        inputs = window.masked_fill((place.positions < distance)[..., None], 0)
        h = h.masked_fill((place.positions == 0)[..., None], 0)

    # The conv: taps times inputs, each chunk of n lanes once for all channels that share it.
    repeat = c.d_inner // c.d_xb
    copies = repeat if c.expand_before_conv else 1
    inputs = inputs.view(b, c.d_conv, -1, 1, n)
    weight = mixer.conv1d.weight[:, 0].T.reshape(c.d_conv, -1, copies, n)
    u = (inputs * weight).sum(1).view(b, 1, -1)                    # (b, 1, channels of the conv)
    if mixer.conv1d.bias is not None:
        u = u + mixer.conv1d.bias
    u = F.silu(u)
    if not c.expand_before_conv:
        u = mixer.expand(u)

    # The step of the scan, and the gate.
    u = u[:, 0].to(wide)                                           # (b, d_inner)
    dt = dt[:, 0].to(wide)
    if mixer.dt_proj.bias is not None:
        dt = dt + mixer.dt_proj.bias.to(wide)
    dt = F.softplus(dt)
    A = -torch.exp(mixer.A_log.to(wide))
    decay = torch.exp(dt[..., None] * A)                           # (b, d_inner, n)
    written = (dt * u).view(b, -1, repeat * n, 1)                  # (b, d_xb / n, channels that share B, 1)
    added = written * B.reshape(b, -1, 1, n)
    h = torch.addcmul(added.view(h.shape), decay, h)
    read = h.view(b, -1, n, n) * C.reshape(b, -1, 1, n)            # (b, d_inner / n, n channels, n cells)
    y = read.sum(-1).view(b, -1)
    y = torch.addcmul(y, mixer.D.to(wide), u)
    y = y * F.silu(z[:, 0].to(wide))
    conv = window[:, 1:].contiguous()
    return y[:, None].to(z.dtype), SSM(conv, h)


# ----------------------------------------------------------------------------------------------------------------------
# Texts that share rows (train_sft.py --pack). Their mask is made of blocks along the diagonal: of 16384 x 16384 entries
# only those within a text are True, and a kernel that is given the mask computes the others, too, and keeps a float32
# copy of it (1 GB) in every layer for the backward pass. So the mask becomes a list of lengths, and each text goes
# through the kernel by itself: the cost is the sum of their squares. (split, not slices: the backward pass of a slice
# fills a gradient of the whole row with zeros, for every text anew.)

class Documents(NamedTuple):
    """What attention_mask says, if nothing came before these rows."""
    lengths: list                            # of all texts, row after row; they add up to b * t tokens
    mask: torch.Tensor | None                # that of the longest text, for a sliding window; None: causal


def mask_or_documents(config, past, positions, t, device):
    """attention_mask -> Documents where there are any. Not in inference mode: there the texts of a row are a prompt and
    the padding to its left, and for many short ones a mask costs fewer calls."""
    understood = Attention.attend is attend_fast and not torch.is_inference_mode_enabled()
    if past > 0 or positions is None or not understood:
        return mask_by_definition(config, past, positions, t, device)
    starts = (positions.flatten() == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], positions.numel()]
    lengths = [end - start for start, end in zip(starts, ends)]
    return Documents(lengths, mask_by_definition(config, 0, None, max(lengths), device))


def attend_documents(attention, q, k, v, documents):
    """Attention.attend of one text after the other."""
    shape = q.shape
    parts = []
    for x in (q, k, v):
        tokens = x.transpose(1, 2).flatten(0, 1)                   # (b * t, heads, head_dim)
        one_row = tokens.transpose(0, 1)[None]                     # (1, heads, b * t, head_dim)
        parts.append(one_row.split(documents.lengths, dim=2))
    ys = []
    for q, k, v in zip(*parts):
        n = q.shape[2]
        mask = None if documents.mask is None else documents.mask[..., :n, :n]
        ys.append(attend_fast(attention, q, k, v, mask))
    y = torch.cat(ys, dim=2)                                       # (1, n_head, b * t, head_dim)
    return y[0].unflatten(1, (shape[0], shape[2])).transpose(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Where part 1 computes by definition, the model takes these forms. use(DEFINITIONS) takes them out again: to try
# something in part 1, and for the tests.

MLP.joined = None
Attention.joined = None

FASTER = [(RMSNorm, "forward", norm_on_cpu),
          (MLP, "forward", mlp_joined),
          (Attention, "project", project_joined),
          (Attention, "attend", attend_fast),
          (sys.modules[__name__], "attention_mask", mask_or_documents),
          (Mamba, "mix", mix_one_token),
          (Mamba, "scan", staticmethod(selective_scan))]
DEFINITIONS = [(owner, name, vars(owner)[name]) for owner, name, _ in FASTER]


def use(forms):
    """forms: [(class or module, name of a function, the function to put there)]."""
    for owner, name, form in forms:
        setattr(owner, name, form)


use(FASTER)


# ======================================================================================================================
# Part 4. Files, and running a script.

import contextlib
import ctypes
import datetime
import glob
import gzip
import hashlib
import json
import platform
import re
import shutil
import subprocess
import unicodedata
import zlib


def cast(module, device, dtype):
    """Move module to device and dtype, in place. A_log and D stay float32 at least: the recurrence needs it."""
    for name, p in module.named_parameters():
        p.data = p.data.to(device, stored_dtype(name, dtype))
    return module


def keeps_float32(name):
    """Is this parameter, of a whole model or of a mixer alone, stored and used in float32 at least?"""
    last = name.rpartition(".")[2]
    return any(last in mixer.float32 for mixer in MIXERS.values())


def stored_dtype(name, dtype):
    """A parameter's name, the model's dtype -> the dtype of this parameter."""
    return torch.promote_types(dtype, torch.float32) if keeps_float32(name) else dtype


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a directory with config.json and safetensors, in the Hugging Face layout.
#
# A setting that is passed over gives a model that is nearly right, and nobody would notice. So every setting that the
# known families have, and those by which their relatives differ (NEUTRAL lists them), is implemented, or changes
# nothing, or is refused by name; a key that is in none of these tables is passed over. In ssm_cfg and for the rotary
# frequencies every unknown key is refused. The same for tensors: each parameter has exactly one Source, and each tensor
# of the file is used, or follows from others (find_sources).
#
# An all-attention model is saved as its own family. A hybrid whose attention computes what Mistral's does is saved in
# the format of Apriel-H1, with base_model_type beside it if it came from another family. Models with more than their
# format can say must not: readers ignore keys that they do not know and would compute something else. These are hybrids
# with biases of q, k and v, norms of q and k or scaled rotary frequencies, and models of attention alone that differ
# from their family (a Llama with a window). They get a model type of their own, nanoh1_hybrid, which everybody else
# refuses: Apriel's format plus the keys base_model_type (the family of the attention), qkv_bias, qk_norm (true or
# false) and rope_scaling (null, or Llama 3's object), none optional.

class Family(NamedTuple):
    """A model type of transformers: how its attention differs, and what absent keys of config.json mean to it."""
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    n_kv_head: int | None = None         # None: as many as query heads
    head_dim: int | None = None          # None: hidden_size / heads
    bos_id: int | None = None
    eos_id: int | None = None


FAMILIES = {
    "mistral": Family("MistralForCausalLM", n_kv_head=8, bos_id=1, eos_id=2),
    "llama": Family("LlamaForCausalLM", bos_id=1, eos_id=2),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, n_kv_head=32),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, n_kv_head=32, head_dim=128),
}
HYBRIDS = {
    "apriel_hybrid_ssm": "AprielHybridSSMForCausalLM",
    "apriel_h": None,                    # an older name, only read
    "nanoh1_hybrid": "NanoH1HybridForCausalLM",
}

# Sizes that every config.json must name: its key -> the field of Config.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "d_mlp",
}

# Settings that are read only to refuse them: key -> the values that change nothing. An absent key changes nothing.
NEUTRAL = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "original_max_position_embeddings": (None,),
    "rope_interleaved": (False, None),
    # Gemma.
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    # Granite.
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    # Cohere, OLMo, MiniCPM, SmolLM 3.
    "logit_scale": (1.0, None),
    "use_qk_norm": (False, None),
    "clip_qkv": (None,),
    "scale_emb": (1.0, None),
    "scale_depth": (None,),
    "no_rope_layers": (None,),
}

# The same for the keys of rope_scaling (transformers 4) and rope_parameters (transformers 5). The type is spelled in
# two ways, sometimes in both.
NEUTRAL_ROPE = {
    "rope_type": ("default", "linear", None),
    "type": ("default", "linear", None),
    "factor": (1.0, None),
    "partial_rotary_factor": (1.0, None),
}

# Llama 3's rule: key -> field of RopeScaling.
LLAMA3_ROPE = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_length",
}

# The settings of a kind of mixer in ssm_cfg: key -> (field of Config, default).
Mamba.format_keys = {
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

# Further keys of ssm_cfg. None changes what a checkpoint computes, but expand, where d_inner is null; dt_init is about
# new layers, and the rest belongs to mixers that are not here (m2 is always SiLU, whatever `activation` says). The
# first three are written.
SSM_IGNORED = {"expand": 1, "dt_init": "random", "activation": "identity"}
SSM_OTHERS = ("n_v_heads", "n_qk_heads", "chunk_size")

# No real size is near these. A config.json that asks for more is damaged, and must not cost memory or time first.
LARGEST = 1 << 24
LONGEST = 1 << 40
MOST_LAYERS = 10_000


def checkpoint_dir(path):
    """path -> the same with ~ expanded, if it is a directory with a config.json. Raises UserError otherwise, with a
    hint where the user is nearly right."""
    path = os.path.expanduser(os.fspath(path))
    if os.path.isfile(path):
        more = ": GGUF is not read" if path.endswith(".gguf") else "; give the directory that holds config.json"
        raise UserError(f"{path} is a file, not a checkpoint directory{more}")
    if not os.path.isdir(path):
        more = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(path.split("/")[0]):
            more = f"; if that is a name on the Hugging Face hub: hf download {path} --local-dir DIR"
        raise UserError(f"no such directory: {path}{more}")
    if not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path} has no config.json{nearly(path)}")
    return path


def nearly(path):
    """The directory `path` lacks a file -> what it is instead, as the end of an error message, or nothing."""
    files = sorted(os.listdir(path))
    if "adapter_config.json" in files:
        return "; it holds an adapter, not a model: merge it into its base first (peft: merge_and_unload)"
    for file in files:
        if file.endswith((".bin", ".pth", ".pt")):
            return f"; {file} is a pickle, which is not read: save it again with transformers' save_pretrained"
        if file.endswith(".gguf"):
            return f"; {file} is a GGUF, which is not read: take the model in the safetensors format"
    return ""


def refuse_pointer(file):
    """Raise UserError if this file is only git LFS's note where the file would be, or may not be read."""
    try:
        with open(file, "rb") as f:
            start = f.read(100)
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from None
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        raise UserError(f"{file} is a git LFS pointer, not the file itself: run git lfs pull")


def read_json(path, expected=object):
    """path -> the value in it. expected: the Python type that it must have, dict for a JSON object.
    Raises UserError for a file that cannot be read, is not JSON, or holds another type."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as e:
        refuse_pointer(path)
        raise UserError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, expected):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a {expected.__name__}")
    return value


def refuse_value(name, value, expected):
    """Raise the UserError for a value of config.json that is not what it must be."""
    raise UserError(f"{name} must be {expected}, got {brief(value)}")


def brief(value, most=200):
    """A value of a JSON file as text for an error message, its first `most` characters if it is longer."""
    try:
        shown = json.dumps(value)
    except RecursionError:
        shown = "something nested deeply"
    return shown if len(shown) <= most else shown[:most] + " ..."


# Checks of one value of config.json: they give it back, or raise the UserError that names it.

def whole(name, value, most=LARGEST):
    """value, if it is a whole number from 1 to most."""
    if type(value) is not int or not 1 <= value <= most:
        refuse_value(name, value, f"a whole number from 1 to {most}")
    return value


def number(name, value):
    """value as a float, if it is a number above 0, and no infinity."""
    if type(value) not in (int, float) or not 0 < value < 1e300:
        refuse_value(name, value, "a number above 0")
    return float(value)


def flag(name, value):
    """value, if it is true or false."""
    if type(value) is not bool:
        refuse_value(name, value, "true or false")
    return value


# From config.json to Config. Whatever is wrong is a UserError that names the key; config_from_json adds the file.

def config_from_json(raw, where="config.json"):
    """raw: the dict in config.json -> Config. Defaults for absent keys are those of transformers' classes.
    Raises UserError for what is missing, of the wrong type, or changes the result and is not implemented."""
    try:
        return Config(**config_fields(raw))
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def read_config(path):
    """A checkpoint directory -> its Config. A text ends at any token that config.json or generation_config.json
    names: instruct models often list more of them in the second file, and either may say null. Raises UserError."""
    file = os.path.join(path, "config.json")
    raw = read_json(file, dict)
    config = config_from_json(raw, file)
    generation = os.path.join(path, GENERATION)
    if os.path.exists(generation):
        try:
            more = token_ids("eos_token_id", read_json(generation, dict).get("eos_token_id"))
        except UserError as e:
            raise UserError(f"{generation}: {e}") from None
        # The default of an absent key counts only where neither file says anything.
        if more and "eos_token_id" not in raw:
            config = replace(config, eos_ids=())
        config = replace(config, eos_ids=tuple(dict.fromkeys(config.eos_ids + more)))
    return config


def config_fields(raw):
    """The dict in config.json -> the arguments of Config."""
    if not isinstance(raw, dict):
        refuse_value("it", raw, "a JSON object")
    model_type = raw.get("model_type")
    known = [*FAMILIES, *HYBRIDS]
    if model_type not in known:
        raise UserError(f"model_type {brief(model_type)} is not supported; known: {', '.join(known)}")
    needed = list(SIZES)
    family = model_type
    if model_type in HYBRIDS:
        needed += ["hybrid_block_layout"]
        family = raw.get("base_model_type", "mistral")
    if model_type == "nanoh1_hybrid":
        needed += ["base_model_type", "qkv_bias", "qk_norm", "num_key_value_heads", "head_dim"]
    for key in needed:
        if raw.get(key) is None:
            raise UserError(f"the key {key!r} is missing")
    # Null is a value of this one.
    if model_type == "nanoh1_hybrid" and "rope_scaling" not in raw:
        raise UserError("the key 'rope_scaling' is missing")
    if family not in list(FAMILIES):
        refuse_value("base_model_type", family, f"one of {', '.join(FAMILIES)}")
    refuse_settings(raw, NEUTRAL)

    fields = {field: whole(key, raw[key]) for key, field in SIZES.items()}
    whole("num_hidden_layers", raw["num_hidden_layers"], MOST_LAYERS)
    fields["norm_eps"] = number("rms_norm_eps", raw.get("rms_norm_eps", 1e-6))
    fields["tie_embeddings"] = flag("tie_word_embeddings", raw.get("tie_word_embeddings", False))
    length = raw.get("max_position_embeddings", 4096)
    fields["max_length"] = whole("max_position_embeddings", length, LONGEST)
    fields["sliding_window"] = window_of(raw, model_type)
    fields |= attention_fields(raw, family)
    fields |= rope_fields(raw)
    fields |= token_fields(raw, FAMILIES[family])
    if model_type in HYBRIDS:
        fields |= mamba_fields(raw)
    return fields


def refuse_settings(raw, neutral, where=None):
    """Raise UserError for the first key of the table `neutral` whose value in raw is none of those that change
    nothing. where: the name of raw in the message, if it lies within config.json."""
    for key, values in neutral.items():
        if key in raw and raw[key] not in values:
            shown = f"{where} = {brief(raw)}" if where else f"{key} = {brief(raw[key])}"
            raise UserError(f"{shown} changes the result and is not implemented")


def attention_fields(raw, family):
    """config.json -> heads and their width; what the family's attention has that Mistral's has not."""
    n_head = raw["num_attention_heads"]
    defaults = FAMILIES[family]
    n_kv_head = raw.get("num_key_value_heads", defaults.n_kv_head or n_head)
    head_dim = raw.get("head_dim", defaults.head_dim)
    fields = {
        "family": family,
        "n_kv_head": n_head if n_kv_head is None else whole("num_key_value_heads", n_kv_head),
        "head_dim": raw["hidden_size"] // n_head if head_dim is None else whole("head_dim", head_dim),
        "qkv_bias": defaults.qkv_bias,
        "qk_norm": defaults.qk_norm,
    }
    if raw["model_type"] == "nanoh1_hybrid":
        fields["qkv_bias"] = flag("qkv_bias", raw["qkv_bias"])
        fields["qk_norm"] = flag("qk_norm", raw["qk_norm"])
    elif raw["model_type"] in HYBRIDS:
        fields["qkv_bias"] = False
        fields["qk_norm"] = False
    whole("num_attention_heads * head_dim", n_head * fields["head_dim"])
    if fields["head_dim"] % 2:
        raise UserError(f"head_dim must be even, got {fields['head_dim']}")
    return fields


def window_of(raw, model_type):
    """config.json -> the sliding window in tokens, None for none. Qwen has a switch for it and lets it begin at some
    layer; Llama has none and ignores what is left over from another model. Only an absent one has the default."""
    n_layer = raw["num_hidden_layers"]
    window = raw.get("sliding_window", 4096)
    types = raw.get("layer_types")
    is_qwen = model_type in ("qwen2", "qwen3")
    switch = flag("use_sliding_window", raw.get("use_sliding_window", not is_qwen))
    if model_type == "llama" or is_qwen and not switch:
        window = None
    if window is not None:
        whole("sliding_window", window, LONGEST)
    # A hybrid's layers are what hybrid_block_layout says, and Fast-LLM writes other names into layer_types.
    if model_type in HYBRIDS:
        return window
    if types is None and is_qwen and window is not None:
        first = raw.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            refuse_value("max_window_layers", first, "a whole number")
        full = min(n_layer, first)
        types = ["full_attention"] * full + ["sliding_attention"] * (n_layer - full)
    if types is None:
        return window
    if types == ["full_attention"] * n_layer and (is_qwen or window is None):
        return None
    if types == ["sliding_attention"] * n_layer and window is not None:
        return window
    raise UserError(f"layer_types = {brief(types)} with sliding_window = {brief(window)} is not implemented: "
                    f"either every layer has the window or none")


def rope_fields(raw):
    """config.json -> the base of the rotary frequencies and their scaling. Flat and in rope_scaling in transformers 4,
    all in rope_parameters in 5; what stands inside counts more."""
    theta = raw.get("rope_theta", 10000.0)
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            refuse_value(name, rope, "a JSON object or null")
        scalings.append(rope_scaling_from_json(rope, name))
        theta = rope.get("rope_theta", theta)
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise UserError("rope_scaling and rope_parameters contradict each other")
    scaling = scalings[0] if scalings else None
    return {"rope_theta": number("rope_theta", theta), "rope_scaling": scaling}


def rope_scaling_from_json(rope, name):
    """The dict rope_scaling or rope_parameters -> RopeScaling, or None where it changes nothing."""
    known = set(NEUTRAL_ROPE) | {"rope_theta"}
    scaling = None
    if rope.get("rope_type", rope.get("type")) == "llama3":
        fields = {}
        for key, field in LLAMA3_ROPE.items():
            check = whole if key == "original_max_position_embeddings" else number
            fields[field] = check(f"{name}.{key}", rope.get(key))
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise UserError(f"{name}.high_freq_factor must be above low_freq_factor")
        scaling = RopeScaling(**fields)
        known |= set(LLAMA3_ROPE)
        refuse_settings(rope, {"partial_rotary_factor": (1.0, None)}, name)
    else:
        refuse_settings(rope, NEUTRAL_ROPE, name)
    unknown = sorted(set(rope) - known)
    if unknown:
        raise UserError(f"{name}.{unknown[0]} is not known to this reader")
    return scaling


def rope_scaling_to_json(scaling):
    """RopeScaling or None -> the dict for config.json, as transformers 4 and 5 read it, or None."""
    if scaling is None:
        return None
    numbers = {key: getattr(scaling, field) for key, field in LLAMA3_ROPE.items()}
    return {"rope_type": "llama3"} | numbers


def token_fields(raw, defaults):
    """config.json -> the tokens that begin and end a text, and the one that pads; defaults: a Family.
    Some files pad with -1, which is no token."""
    return {
        "bos_id": token_id("bos_token_id", raw.get("bos_token_id", defaults.bos_id)),
        "eos_ids": token_ids("eos_token_id", raw.get("eos_token_id", defaults.eos_id)),
        "pad_id": token_id("pad_token_id", raw.get("pad_token_id"), least=-1),
    }


def token_id(name, value, least=0):
    """value, if it is an id or None."""
    if value is not None and (type(value) is not int or not least <= value <= LARGEST):
        refuse_value(name, value, "a token id, or null")
    return value


def token_ids(name, value):
    """An id, a list of ids, or None -> a tuple of ids."""
    ids = value if isinstance(value, list) else [value]
    return tuple(token_id(name, token) for token in ids if token is not None)


def mixer_keys():
    """-> {key of ssm_cfg: (field of Config, default)} of all kinds of mixers that have any."""
    keys = {}
    for mixer in MIXERS.values():
        keys |= getattr(mixer, "format_keys", {})
    return keys


def mamba_fields(raw):
    """config.json of a hybrid -> the layout, and the sizes of its Mamba layers from ssm_cfg."""
    layout = raw["hybrid_block_layout"]
    if not isinstance(layout, list):
        refuse_value("hybrid_block_layout", layout, "a list")
    ssm = raw.get("ssm_cfg")
    ssm = {} if ssm is None else ssm
    if not isinstance(ssm, dict):
        refuse_value("ssm_cfg", ssm, "a JSON object")
    known = mixer_keys()
    unknown = sorted(set(ssm) - set(known) - set(SSM_IGNORED) - set(SSM_OTHERS))
    if unknown:
        raise UserError(f"ssm_cfg.{unknown[0]} is not known to this reader")

    given = {key: ssm.get(key, default) for key, (_, default) in known.items()}
    if given["d_inner"] is None:
        given["d_inner"] = raw["hidden_size"] * whole("ssm_cfg.expand", ssm.get("expand", 1))
    if given["d_xb"] is None:
        given["d_xb"] = raw["hidden_size"]
    if given["dt_rank"] in ("auto", None):
        given["dt_rank"] = math.ceil(raw["hidden_size"] / 16)
    fields = {"layout": tuple(layout)}
    checks = {bool: flag, float: number}
    for key, (field, default) in known.items():
        check = checks.get(type(default), whole)
        fields[field] = check(f"ssm_cfg.{key}", given[key])
    return fields


def model_type_of(config):
    """Config -> the model_type as which it is saved: its family if that says it all, else one of the hybrid types."""
    c = config
    plain = not c.qkv_bias and not c.qk_norm and c.rope_scaling is None
    if any(kind != "t" for kind in c.layout):
        apriel = plain and set(c.layout) <= {"t", "m2", "i", "n"}
        return "apriel_hybrid_ssm" if apriel else "nanoh1_hybrid"
    defaults = FAMILIES[c.family]
    says_all = (defaults.qkv_bias, defaults.qk_norm) == (c.qkv_bias, c.qk_norm)
    if c.family == "llama" and c.sliding_window is not None:
        says_all = False
    return c.family if says_all else "nanoh1_hybrid"


def config_to_json(config, dtype):
    """Config -> the dict for config.json; dtype: a torch dtype, recorded as the weights' dtype."""
    c = config
    model_type = model_type_of(c)
    eos = list(c.eos_ids)
    raw = {
        "architectures": [HYBRIDS.get(model_type) or FAMILIES[model_type].architecture],
        "model_type": model_type,
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
    if c.pad_id is not None:
        raw["pad_token_id"] = c.pad_id
    if c.rope_scaling is not None or model_type == "nanoh1_hybrid":
        raw["rope_scaling"] = rope_scaling_to_json(c.rope_scaling)
    if model_type == "llama":
        del raw["sliding_window"]
        raw |= {"attention_bias": False, "mlp_bias": False}
    if model_type in ("qwen2", "qwen3"):
        # The window begins at layer max_window_layers.
        windowed = c.sliding_window is not None
        raw |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else c.n_layer}
    if model_type == "qwen3":
        raw["attention_bias"] = False
    if model_type in HYBRIDS:
        raw["hybrid_block_layout"] = list(c.layout)
        ssm = {key: getattr(c, field) for key, (field, _) in mixer_keys().items()}
        raw["ssm_cfg"] = ssm | SSM_IGNORED
        if c.family != "mistral" or model_type == "nanoh1_hybrid":
            raw["base_model_type"] = c.family
    if model_type == "nanoh1_hybrid":
        raw |= {"qkv_bias": c.qkv_bias, "qk_norm": c.qk_norm}
    return raw


# From files to parameters. What cannot be read, or does not fit, is a UserError that names the file.

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"


class Source(NamedTuple):
    """Where the numbers of one parameter lie."""
    file: object                         # an open safetensors file
    name: str                            # the tensor's name in it
    shape: tuple                         # of the parameter
    rows: slice | None = None            # the rows of the tensor that are meant; None: all of it

    def read(self):
        """-> the tensor, in the dtype of the file."""
        tensor = self.file.get_tensor(self.name)
        return tensor if self.rows is None else tensor[self.rows]


# What a safetensors file calls the dtypes that are read. Others (integers, float8) belong to quantised models.
DTYPES = ("F64", "F32", "F16", "BF16")


def open_tensors(path):
    """path: a checkpoint directory -> {tensor name: Source}. As in transformers, model.safetensors comes before an
    index, which names the file of each tensor."""
    single = os.path.join(path, "model.safetensors")
    index = os.path.join(path, INDEX)
    if not os.path.exists(index):
        if not os.path.exists(single):
            raise UserError(f"{single} is missing{nearly(path)}")
        return open_file(single)
    if os.path.exists(single):
        print(f"warning: {path} holds both model.safetensors and {INDEX}: reading the first",
              file=sys.stderr)
        return open_file(single)
    where = read_index(index)
    sources = {}
    for file in sorted(set(where.values())):
        tensors = open_file(os.path.join(path, file))
        sources |= {name: source for name, source in tensors.items() if where.get(name) == file}
    lost = sorted(set(where) - set(sources))
    if lost:
        raise UserError(f"{index} names tensors that are not in their files: {some(lost)}")
    return sources


def read_index(path):
    """model.safetensors.index.json -> {tensor name: file name}."""
    where = read_json(path, dict).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{path} has no weight_map from tensor to file")
    return where


def open_file(path):
    """A safetensors file -> {tensor name: Source}."""
    from safetensors import SafetensorError, safe_open
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing")
    sources = {}
    try:
        file = safe_open(path, framework="pt")
        for name in file.keys():
            tensor = file.get_slice(name)
            dtype = tensor.get_dtype()
            if dtype not in DTYPES:
                raise UserError(f"{path}: {name} is stored as {dtype}; known: {', '.join(DTYPES)}")
            sources[name] = Source(file, name, tuple(tensor.get_shape()))
    except (SafetensorError, OSError) as e:
        refuse_pointer(path)
        raise UserError(f"{path} is not a readable safetensors file: {e}") from None
    return sources


def find_sources(path, config):
    """The tensors of a checkpoint directory -> {parameter's name in the file: Source}. Names in old files, and tensors
    that follow from the others, are settled here."""
    sources = {}
    rows = 2 * config.d_inner + 2 * config.d_xb
    m2 = [i for i, kind in enumerate(config.layout) if kind == "m2"]
    mamba = {f"model.layers.{i}.mixer.in_proj.weight" for i in m2}
    tensors = open_tensors(path)
    for name, source in tensors.items():
        # Older files hold the rotary frequencies as buffers.
        if name.endswith("rotary_emb.inv_freq"):
            continue
        sources[name] = source
        # M1 and older Fast-LLM have no dt_in_proj: its rows come last in in_proj, [z, x, B, C, dt].
        dt_name = name.replace(".in_proj.", ".dt_in_proj.")
        is_matrix = name in mamba and len(source.shape) == 2
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
            raise UserError(f"{path}: config.json ties the embeddings, but lm_head.weight is not the "
                            f"embedding")
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


def file_name(name, layout):
    """A parameter's name in the module -> its name in the file: a mixer that is attention is called self_attn there."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] == "mixer":
        parts[2] = MIXERS[layout[int(parts[1])]].name_in_file
    return name if name.startswith("lm_head.") else "model." + ".".join(parts)


def outline(path):
    """A checkpoint directory -> HybridLM on the meta device, where a model has shapes and no memory, and {name of its
    parameter: Source}. Reads no tensor. Raises UserError as load_pretrained."""
    path = checkpoint_dir(path)
    config = read_config(path)
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
    try:
        with torch.device("meta"):
            model = HybridLM(config)
    except UserError as e:
        raise UserError(f"{os.path.join(path, 'config.json')}: {e}") from None
    # A tied head is not listed.
    names = {name: file_name(name, config.layout) for name, _ in model.named_parameters()}
    check_fit(path, sources, {names[name]: tuple(p.shape) for name, p in model.named_parameters()})
    return model, {name: sources[in_file] for name, in_file in names.items()}


def load_pretrained(path, device="cpu", dtype=torch.float32):
    """A checkpoint directory -> HybridLM in eval mode. Tensors are read one by one straight into device and dtype.
    Raises UserError for a missing or broken file, unknown settings, and missing, unexpected or mis-shaped tensors."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise UserError(f"dtype {dtype} is not supported (float16 overflows in the scan): use float32 or "
                        f"bfloat16")
    model, sources = outline(path)
    weights = {}
    for name, source in sources.items():
        tensor = source.read().to(device, stored_dtype(name, dtype), copy=True)
        weights[name] = nn.Parameter(tensor)
    # Not strict only because of the tied head: check_fit was strict, and has the better words.
    model.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def write_atomic(path, write):
    """write(temporary path), then rename: a reader, or a crash, never meets half a file.
    Raises UserError where that fails (a full disk, a missing directory); the old file is then still there."""
    write_together({path: write})


def write_together(writers):
    """{path: write}, as write_atomic for several files. None is replaced before all of them are on the disk: a full
    disk leaves all old ones. The renames come one after the other, so a crash between two leaves new files beside old.
    Raises UserError."""
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


def text_writer(text):
    """text -> a function that writes it to a path."""
    def write(path):
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
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


@torch.no_grad()
def save_pretrained(model, path, tokenizer_from=None, shard_bytes=5 << 30, dtype=None):
    """Write model to the directory path: config.json and model.safetensors, or shards of at most shard_bytes with an
    index. dtype: of the weights in the file (None: the model's); A_log and D are float32 in any case.
    tokenizer_from: a directory whose tokenizer files are copied along.
    Raises UserError where that fails; unless a rename failed, what was in the directory before is then still there."""
    path = os.path.expanduser(os.fspath(path))
    dtype = dtype or model.embed_tokens.weight.dtype
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the directory {path}: {e.strerror}") from None
    tensors = {}
    # A tied head appears as the embedding.
    for name, p in model.named_parameters():
        tensor = p.detach().to("cpu", stored_dtype(name, dtype)).contiguous()
        tensors[file_name(name, model.config.layout)] = tensor
    raw = config_to_json(model.config, dtype)
    writers = weight_writers(tensors, shard_bytes)
    writers["config.json"] = json_writer(raw)
    old = old_weights(path)
    source = os.path.expanduser(os.fspath(tokenizer_from or path))
    if not same_place(source, path):
        writers |= copies(source)
        old |= {file for file in (*TOKENIZER_FILES, GENERATION) if os.path.exists(os.path.join(path, file))}
    writers |= generation_writer(source, raw["eos_token_id"])
    writers |= template_writer(source)
    write_together({os.path.join(path, file): write for file, write in writers.items()})
    # What another model left here and this one does not bring.
    for file in old - set(writers):
        os.remove(os.path.join(path, file))


def weight_writers(tensors, shard_bytes):
    """{name: tensor} -> {file: write} for model.safetensors, or for shards of at most shard_bytes (or a single tensor)
    with their index."""
    shards = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": tensor_writer(tensors)}
    writers = {}
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        writers[file] = tensor_writer(shard)
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    writers[INDEX] = json_writer({"metadata": {"total_size": total}, "weight_map": where})
    return writers


def old_weights(path):
    """The directory `path` -> the names of the weight files in it, those of an index among them: a new checkpoint
    replaces them."""
    files = set(os.listdir(path))
    old = {"model.safetensors", INDEX}
    old |= {file for file in files if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file)}
    if INDEX in files:
        try:
            named = read_index(os.path.join(path, INDEX)).values()
            old |= {file for file in named if file.endswith(".safetensors")}
        except UserError:
            # A broken one names nothing.
            pass
    return files & old


def copies(source):
    """-> {file: write} for the tokenizer files of the directory `source`."""
    writers = {}
    for file in TOKENIZER_FILES:
        original = os.path.join(source, file)
        if os.path.exists(original):
            writers[file] = file_writer(original)
    return writers


def generation_writer(source, eos):
    """-> {file: write} for generation_config.json of the directory `source`, if there is one, with the end tokens of
    config.json: a reader that asks either file, or both, stops at the same tokens."""
    file = os.path.join(source, GENERATION)
    if not os.path.exists(file):
        return {}
    try:
        raw = read_json(file, dict)
    except UserError:
        # Nobody could read it, and a save must not fail for it.
        raw = {}
    return {GENERATION: json_writer(raw | {"eos_token_id": eos})}


def template_writer(source):
    """-> {file: write} for chat_template.jinja, where the directory `source` has no chat template and its tokenizer
    knows the marks of Mistral's form: a server must be told what load_chat knows by itself."""
    try:
        tokens = read_if_there(source, "tokenizer.json").get("added_tokens", [])
        known = {token["content"] for token in tokens}
        if find_template(source) is not None or not known.issuperset(INST_MARKS):
            return {}
    except (UserError, TypeError, KeyError):
        # Whoever reads these files says what is wrong with them; a save must not fail for it.
        return {}
    return {"chat_template.jinja": text_writer(INST_TEMPLATE)}


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: a tokenizer.json becomes an object that gives the same ids as the library `tokenizers`. It has
#
#     encode(text, allowed_special="all")   ids; without "all", special tokens that stand in the text are plain text
#     decode(ids)                           text
#     decode_single_token_bytes(id)         bytes, to print while generating; KeyError for an id without a token
#     max_token_value                       the largest id
#     special                               {text: id} of the added tokens
#     begin                                 ids that belong before a raw text: [] mostly, [128000] for Llama 3
#
# A text takes four steps. Added tokens ("<s>") are cut out; the rest is normalised; patterns cut it into pieces (words,
# mostly); byte pair encoding turns the bytes of a piece into ids. ByteTokenizer leaves the last step to tiktoken, which
# joins two neighbours whenever the joined bytes are in the vocabulary, lowest id first, and takes a whole piece that is
# in the vocabulary as it is. tokenizer.json lists the allowed merges instead. The two agree if merges come in the order
# of ids and no token can be reached in one way only by the one rule: that is checked token by token.
#
# "The same ids" has one limit that no test can lift: the libraries know different versions of Unicode. A letter that is
# a few years old is one to this, and a sign without a kind to that.
#
# A tokenizer that is nearly right gives other ids and a model that is nearly right. So what ByteTokenizer cannot hold
# exactly goes through the package `tokenizers` where that is installed (LibraryTokenizer), and is refused where not.

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Unfit(Exception):
    """A tokenizer.json may be sound, but ByteTokenizer cannot represent it exactly. The text says why."""


@contextlib.contextmanager
def refusing(file, outcome="not understood"):
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
        raise UserError(f"{file}: {outcome} ({type(e).__name__}: {first_line})") from None


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


def is_composed(normalizer):
    """The normalizer of a tokenizer.json -> whether it turns letters and their accents into one character (NFC)."""
    forms = [step.get("type") for step in steps_of(normalizer, "normalizers")]
    for form in forms:
        # The tables for other forms differ too much between Python and `tokenizers`.
        if form != "NFC":
            raise Unfit(f"it has a normalizer ({form})")
    return len(forms) > 0


def split_patterns(pre_tokenizer):
    """The pre_tokenizer of a tokenizer.json -> regular expressions. The first cuts the text, the next its pieces."""
    import regex
    *splits, level = steps_of(pre_tokenizer, "pretokenizers") or [{}]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        raise Unfit("the pre-tokenizer does not end with ByteLevel without a prefix space")
    patterns = []
    for step in splits:
        action = step.get("type")
        if action == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif action == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            patterns.append(pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"]))
        else:
            how = ""
            if action == "Split":
                how = f", behavior {step.get('behavior')}, invert {step.get('invert')}"
            raise Unfit(f"the pre-tokenizer has a step {action}{how}")
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
    if model.get("dropout"):
        raise UserError(f"model.dropout = {model['dropout']!r}: the ids of a text are random")
    if "merges" in model and model.get("continuing_subword_prefix"):
        # `tokenizers` ends the whole process where a merge lacks the prefix.
        raise UserError(f"model.continuing_subword_prefix = {model['continuing_subword_prefix']!r}")
    # GPT-2's own file names no type.
    if model.get("type", "BPE") != "BPE" or "vocab" not in model or "merges" not in model:
        raise Unfit(f"model type {model.get('type')}, not byte-level BPE")
    if model.get("end_of_word_suffix"):
        raise Unfit(f"model.end_of_word_suffix = {model['end_of_word_suffix']!r}")
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
        taken_whole = ignore_merges and all(pair in rank for pair in ways_to_join(token, ranks))
        if not known or not (taken_whole or bpe(letters, rank) == [token]):
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
        self.composed = is_composed(raw.get("normalizer"))
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
        return unicodedata.normalize("NFC", text) if self.composed else text

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
        steps = [step.get("type") for step in steps_of(raw.get("decoder"), "decoders")]
        if not {"ByteLevel", "ByteFallback", "Metaspace"}.intersection(steps):
            raise UserError(f"the decoder {steps} does not say which bytes a token has")
        self.table = byte_characters() if "ByteLevel" in steps else {}
        self.fallback = "ByteFallback" in steps

    def encode(self, text, allowed_special=()):
        text = valid_unicode(text)
        if allowed_special != "all" and self.find and self.find.search(text):
            raise UserError("this tokenizer cannot read a special token in a text as plain text")
        with refusing("the package tokenizers"):
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
        if self.table:
            known = all(character in self.table for character in text)
            return bytes(self.table[character] for character in text) if known else text.encode()
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
    # A set: the same token may stand there twice.
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


# ----------------------------------------------------------------------------------------------------------------------
# Chat: messages become the text that the model was trained on.
#
# A checkpoint brings its own template, a program in the language of jinja2. It writes the marks of the roles, often a
# system message of its own, and the begin token. One that brings none gets Mistral's form, <s>[INST] question [/INST]
# answer</s>, if its tokenizer knows those marks: where they fall into letters, a model would learn to write letters and
# never to stop. What the model is to learn (the answer, and the token that ends it) is never searched for in rendered
# text: a prompt ends where the answer begins, and answer + chat.end follows.

class Chat:
    """What load_chat returns. render(messages, add_generation_prompt) -> text; end: the text of the token that ends an
    answer; refusal: why there is no template, or None."""

    def __init__(self, render=None, end=None, refusal=None):
        self.render = render
        self.refusal = refusal
        self.known_end = end

    @property
    def end(self):
        """A text. Raises UserError where there is no template, as prompt does."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        return self.known_end

    def prompt(self, messages):
        """messages: [{"role": "system", "user" or "assistant", "content": text}] -> the text before the answer.
        Raises UserError where there is no template, and for messages that it refuses."""
        if self.refusal is not None:
            raise UserError(self.refusal)
        return self.render(messages, add_generation_prompt=True)


# Some templates write the date (Llama 3's do). What is stored must not depend on the day, or a run of hours could not
# be continued after midnight: training and traces have this one, which Llama's template itself falls back to.
FIXED_DATE = datetime.datetime(2024, 7, 26)


def load_chat(path, enc, date=None):
    """The chat template of the checkpoint at path, or Mistral's form. Where there is neither, or none that works here,
    chat.refusal says why; prompt() and end raise it as a UserError. date: the datetime that a template is told when it
    asks for the time; None: the real one."""
    path = os.fspath(path)
    try:
        template = find_template(path)
        if template is None or template == INST_TEMPLATE:
            return built_in_chat(enc)
        return template_chat(path, template, enc, date)
    except UserError as e:
        return Chat(refusal=f"{path}: {e}")


# Mistral's form, and the same as a template for other programs: save_pretrained writes it beside such a tokenizer. Here
# built_in_render does it, which needs no package.
INST_MARKS = ("<s>", "[INST]", "[/INST]", "</s>")
INST_TEMPLATE = (
    "{{ '<s>' }}{% set system = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set system.text = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + system.text + message['content'] + ' [/INST]' }}{% set system.text = '' %}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('a role that is not system, user or assistant') }}{% endif %}"
    "{% endfor %}")


def built_in_chat(enc):
    """Mistral's form, for a tokenizer that knows its marks."""
    for mark in INST_MARKS:
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


def compile_template(text, date=None):
    """A chat template -> a jinja2 template that knows what transformers lets templates use, and nothing else. date: as
    load_chat takes it."""
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
        return (date or datetime.datetime.now()).strftime(form)

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


def template_chat(path, text, enc, date):
    """A checkpoint's own template, with the names of its tokens in it."""
    template = compile_template(text, date)
    names = token_texts(path)

    def render(messages, add_generation_prompt):
        with refusing(f"{path}: its chat template", "failed"):
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                   tools=None, documents=None, **names)

    return Chat(render, end_of_answer(render, names, enc))


def end_of_answer(render, names, enc):
    """The token that a template writes after an answer, or else the checkpoint's eos_token."""
    answer = "an answer such as no template has"
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
# Records: texts of your own, to train on or to ask. A JSONL file, plain or .gz, one record a line, in any of the shapes
# in which traces are published:
#
#   {"prompt": "...", "response": "..."}                two texts, taken to the letter
#   {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
#   {"prompt": [message, ...], "completion": [message, ...]}            TRL: messages, the completion is trained
#   {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}              ShareGPT
#
# "completion" is the same as "response". An assistant message may bring its thoughts apart (reasoning_content,
# reasoning or thinking): they become "<think>\nthoughts\n</think>\n\ncontent". Whatever else a line may hold is
# refused by its number and by what was found: a shape that is half understood says half of what it means. (What is
# found is a UserError of the functions below; read_records adds file and line.)

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TOOLS = ("tool_calls", "function_call", "tools", "functions")


class Turn(NamedTuple):
    """One message."""
    role: str                                # system, user or assistant
    text: str
    trained: bool                            # an assistant's turn, unless it has "weight": 0


def read_records(path, use):
    """Yields use(record) for each line of the file. Raises UserError, also one of use, with the line number."""
    for number, line in read_lines(path):
        try:
            found = use(parse_record(line))
        except UserError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
        yield found


def read_lines(path):
    """Yields (number from 1, line) of a text file, plain or gzip; blank lines are left out."""
    try:
        with open(path, "rb") as f:
            start = f.read(4)
        if start == b"PAR1":
            raise UserError(f"{path} is a parquet file; write its rows as lines of JSON")
        opener = gzip.open if start[:2] == b"\x1f\x8b" else open
        # utf-8-sig skips the mark with which some editors begin a file.
        with opener(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not a text in UTF-8: {e}") from None
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def parse_record(line):
    """A line -> its record, a dict. Raises UserError."""
    if line.lstrip().startswith("["):
        raise UserError("a JSON array; what is needed is one record {...} a line")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"not JSON ({getattr(e, 'msg', e)})") from None
    if not isinstance(record, dict):
        raise UserError(f"{brief(record)} is no record {{...}}")
    return record


def either(record, key, other):
    """The value of the one key or of the other; None if neither holds anything."""
    return record[key] if record.get(key) is not None else record.get(other)


def refuse_keys(record, keys, what):
    """Raises UserError if one of the keys holds something. null and [] are what a table writes for nothing."""
    for key in keys:
        if record.get(key):
            raise UserError(f"{what} ({key})")


def read_turns(record):
    """A record of messages -> [Turn]: maybe a system message, then user and assistant in turn, the assistant last."""
    given, messages = find_messages(record)
    turns = [turn._replace(trained=False) for turn in read_messages(record, given)]
    turns += [read_message(message) for message in messages]
    check_order(turns)
    if not turns or turns[-1].role != "assistant":
        raise UserError("the last message is not the assistant's")
    return turns


def read_question(record):
    """A record -> what it asks, whatever the answer: a text that is taken to the letter, or [Turn], the user's last."""
    refuse_keys(record, TOOLS, "tool calls are not read")
    prompt = record.get("prompt")
    if isinstance(prompt, str) and either(record, "messages", "conversations") is None:
        refuse_keys(record, ("system",), "more than a prompt; write it into the prompt, or use messages")
        return prompt
    messages = prompt if isinstance(prompt, list) else find_messages(record)[1]
    turns = read_messages(record, messages)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    check_order(turns)
    if not turns or turns[-1].role != "user":
        raise UserError("there is no message of the user")
    return turns


def read_messages(record, messages):
    """The messages of a record -> [Turn], its system message first, wherever it stands."""
    turns = [read_message(message) for message in messages]
    # Some ShareGPT files keep the system message beside the conversation.
    if record.get("system"):
        turns.insert(0, Turn("system", content_text(record["system"]), False))
    return turns


def find_messages(record):
    """-> two lists of messages: those that are only read, and those of which the assistant's are trained."""
    prompt = record.get("prompt")
    response = either(record, "response", "completion")
    if isinstance(prompt, list) and isinstance(response, list):
        return prompt, response
    messages = either(record, "messages", "conversations")
    if messages is None:
        raise UserError(unknown_shape(record))
    if not isinstance(messages, list):
        raise UserError(f"messages that are not a list but {brief(messages)}")
    return [], messages


def unknown_shape(record):
    """What to say of a record that is none of the known shapes."""
    if "instruction" in record:
        return "an Alpaca record (instruction, input, output); write it as messages"
    if "chosen" in record:
        return "a preference pair (chosen, rejected); only one response can be trained on"
    if "prompt" in record:
        return "a prompt without a response or completion of the same kind, text or messages"
    return ("neither prompt and response nor messages nor conversations; "
            f"keys: {brief(sorted(record))}")


def read_message(message):
    """One message, {"role", "content"} or {"from", "value"} -> Turn. Raises UserError for what is not read."""
    if not isinstance(message, dict):
        raise UserError(f"a message that is {brief(message)}")
    refuse_keys(message, TOOLS, "tool calls are not read")
    role = either(message, "role", "from")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"the role {brief(role)}; read are {', '.join(ROLES)}")
    text = content_text(either(message, "content", "value"))
    if ROLES[role] != "assistant":
        refuse_keys(message, THOUGHTS, "thoughts of somebody else than the assistant")
        return Turn(ROLES[role], text, False)
    if not text.strip():
        raise UserError("an empty response")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"the weight {brief(weight)}; a turn is trained (1) or not (0)")
    return Turn("assistant", with_thoughts(message, text), weight != 0)


def content_text(content):
    """The content of a message, a text or a list of text parts -> text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"the content {brief(content)}; it must be a text")
    texts = []
    for part in content:
        is_object = isinstance(part, dict)
        form = part.get("type") if is_object else part
        if not is_object or form != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"a content part of type {brief(form)}; only text is read")
        texts.append(part["text"])
    return "".join(texts)


def with_thoughts(message, text):
    """The thoughts of an assistant message, wherever they stand, in front of its text: once."""
    found = [message[key] for key in THOUGHTS if message.get(key)]
    if not found:
        return text
    if not all(isinstance(thoughts, str) and thoughts == found[0] for thoughts in found):
        raise UserError(f"thoughts that are no text, or two of them: {brief(found)}")
    inside, closed, _ = text.rpartition("</think>")
    if not closed:
        return f"<think>\n{found[0]}\n</think>\n\n{text}"
    if inside.removeprefix("<think>").strip() != found[0].strip():
        raise UserError("thoughts beside a content that has others in <think>")
    return text


def check_order(turns):
    """Raises UserError unless a system message, if there is one, comes first, and user and assistant take turns."""
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    for i, turn in enumerate(rest):
        wanted = "assistant" if i % 2 else "user"
        if turn.role == "system":
            raise UserError("a second system message, or one that is not the first message")
        if turn.role != wanted:
            raise UserError(f"roles out of order: {turn.role} where {wanted} is expected")


# ----------------------------------------------------------------------------------------------------------------------
# Running a script: what all scripts share. Devices, errors, Ctrl-C, where a number comes from.

def pick_device(name):
    """"auto" -> cuda, mps or cpu, the first that is there. Raises UserError for a device that is not."""
    found = ["cuda"] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    found += ["cpu"]
    if name == "auto":
        name = found[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is none that PyTorch knows; available: {', '.join(found)}") from None
    beyond = device.type == "cuda" and device.index and device.index >= torch.cuda.device_count()
    if device.type not in found or beyond:
        raise UserError(f"device {name!r} is not available here; available: {', '.join(found)}")
    return device


def pick_dtype(name, device, wide=False):
    """"auto" -> the dtype of matrix products, and of weights that do not train: bfloat16 on cuda, float32 elsewhere.
    wide: a model of wide matrices is to be trained. A CPU that multiplies bfloat16 takes a quarter of the time then.
    Weights that train, the cells of a scan and losses are float32 in any case."""
    if name == "auto":
        known = torch.cpu.get_capabilities()
        fast_cpu = known.get("avx512_bf16") or known.get("amx_bf16")
        narrow = device.type == "cuda" or (device.type == "cpu" and wide and fast_cpu)
        name = "bfloat16" if narrow else "float32"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype {name!r} is not supported: use float32 or bfloat16")
    return getattr(torch, name)


def trains_wide(args):
    """Will this script train a model of wide matrices? Narrow ones stay in float32: there they cost little."""
    path = getattr(args, "teacher", None) or getattr(args, "model", None)
    if not hasattr(args, "optimizer") or not path:
        return False
    return os.path.exists(os.path.join(path, "config.json")) and read_config(path).d_model >= 256


def start_script(args):
    """args with device and dtype, as the flags of every script -> torch.device, dtype (see pick_dtype)."""
    # Else a state that has decayed to 1e-40 costs 100 cycles an operation.
    torch.set_flush_denormal(True)
    keep_memory()
    # A shell expands ~ in "--out ~/x", and not in "--out=~/x".
    paths = ("model", "teacher", "student", "merge", "data", "held_out", "rank", "out", "prompt_file", "traces",
             "json", "plot", "speeds", "table", "figures")
    for name in paths:
        path = getattr(args, name, None)
        if path == "":
            # A variable of the shell that is not set.
            raise UserError(f"--{name.replace('_', '-')} is empty")
        if isinstance(path, list):
            setattr(args, name, [os.path.expanduser(each) for each in path])
        elif isinstance(path, str):
            setattr(args, name, os.path.expanduser(path))
    # A seed is multiplied by a million, for the random streams of many texts.
    if not 0 <= getattr(args, "seed", 0) < 2 ** 32:
        raise UserError(f"--seed must be 0 to {2 ** 32 - 1}, got {args.seed}")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, trains_wide(args))
    # "auto" would not say what a run depends on.
    args.dtype = str(dtype).removeprefix("torch.")
    return device, dtype


# From malloc.h: blocks above this size are the system's own, and free memory above that size goes back to it.
M_MMAP_THRESHOLD = -3
M_TRIM_THRESHOLD = -1


def keep_memory():
    """Memory of freed tensors of up to 32 MB stays with the process. Else Linux's C library gives it back at once, and
    the system clears every page anew for the next: a quarter of a training step of 135 M weights. Larger ones are
    given back: an evaluation's would be kept for the rest of the run, in pieces that nothing large fits into."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def trim_memory():
    """Give back what keep_memory has kept. Batches differ in shape, and what one left does not fit the next: a process
    that trains SmolLM2-135M with 7 GB had grown to 14 after 240 steps."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def choose_threads(model, device, threads=None):
    """Set the CPU threads: as many as asked for; else one for a small model on a CPU, where two gain little and lose
    much while another program has a core; else PyTorch's own choice."""
    small = device.type == "cpu" and sum(p.numel() for p in model.parameters()) < 10_000_000
    torch.set_num_threads(threads or (1 if small else torch.get_num_threads()))


def memory_bytes(device):
    """Memory of the GPU, or of the machine, in bytes: all of it, not what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
    """A context: matrix products in dtype, whatever the dtype of the weights; nothing at all for float32.
    Weights that train, their gradients and the optimiser stay float32: a step of 0.1 % would vanish in bfloat16's 8
    bits."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def provenance(device):
    """Where a number comes from, for JSON: commit of this code ("-dirty" if it was changed, None outside git), machine,
    versions of torch and triton (None without it), CPU threads."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        printed = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout
        commit = printed.strip() or None
    except OSError:
        # There is no git.
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    # On Linux, platform knows no more than x86_64.
    if os.path.exists("/proc/cpuinfo") and device.type == "cpu":
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return {"commit": commit, "device": f"{device.type}: {name or platform.machine()}", "torch": torch.__version__,
            "triton": getattr(triton, "__version__", None), "threads": torch.get_num_threads()}


def weights_hash(model):
    """A fingerprint of all weights: what was begun with a model is continued with that model only."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        # The names count, too: two equal layers may have changed places.
        digest.update(name.encode())
        # As bytes, because numpy has no bfloat16.
        weights = p.detach().to("cpu").contiguous().view(torch.uint8)
        digest.update(weights.numpy().tobytes())
    return digest.hexdigest()[:16]


def file_hash(path):
    """A fingerprint of a data file; None for no file."""
    if not path:
        return None
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:16]


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


def claim_out(path, inputs, overwrite, resume, done="report.json"):
    """Check that the directory `path` can be written and that nothing is lost in it; made if it is not there.
    -> path, with ~ expanded. inputs: the directories that the run reads (None: not given). done: the report that a
    finished run of this script leaves. Raises UserError
    * for an input, however its path is spelled, whatever the flags;
    * for a model that this script did not make, unless overwrite;
    * for its own result, unless overwrite or resume.
    It is called before anything is computed: an hour of training must not end here."""
    path = os.path.expanduser(path)
    for other in inputs:
        if other is not None and same_place(path, os.path.expanduser(other)):
            raise UserError(f"--out {path} is {other}, which this run reads: choose another --out")
    there = [file for file in ("config.json", done) if os.path.exists(os.path.join(path, file))]
    if there == ["config.json"] and not is_unfinished(path) and not overwrite:
        raise UserError(f"{path} holds a model that this script did not make: choose another --out, or pass "
                        f"--overwrite")
    if not (overwrite or resume):
        if there:
            raise UserError(f"{path} already holds a result: choose another --out, or pass --overwrite")
        if is_unfinished(path):
            raise UserError(f"{path} holds an unfinished run: pass --resume to continue it, or --overwrite")
    try:
        os.makedirs(path, exist_ok=True)
        # Permission bits say little on network disks, and nothing to root: only writing tells.
        probe = os.path.join(path, ".writable")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as e:
        raise UserError(f"cannot write to {path}: {e.strerror}") from None
    return path


def is_unfinished(path):
    """Does this directory hold a run that was interrupted, by one process (of which an alignment may be all that there
    is) or by many?"""
    files = ("progress.safetensors", "align.safetensors", "progress-*")
    return any(glob.glob(os.path.join(glob.escape(path), file)) for file in files)


def is_finished(out, *rest, **named):
    """The same as is_made, and says so."""
    made = is_made(out, *rest, **named)
    if made:
        print(f"{out} is finished already, kept")
    return made


def is_made(out, depends, overwrite, done="report.json", or_else=""):
    """Does the directory `out` hold the result of this very run? depends: what the run depends on, JSON values under
    names for the user; the report `done` has it as "run". Raises UserError if the result was made from something else,
    unless it is to be overwritten. or_else: what the user may do besides."""
    file = os.path.join(out, done)
    # A result may stand there while a run that overwrites it was interrupted.
    if not os.path.exists(file) or is_unfinished(out):
        return False
    report = read_json(file, dict)
    made = report.get("run") or report.get("args") or {}
    for name, now in depends.items():
        # A flag may be newer than the report.
        before = made.get(name, now)
        if before != now and overwrite:
            return False
        if before != now:
            raise UserError(f"{out} was made with {name} = {before}, now {name} = {now}; pass the same "
                            f"flags, or --overwrite{or_else}")
    return True


def same_place(path, other):
    """Do two paths name one directory: through a link, another spelling, a letter's case where the disk ignores it?"""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


# ======================================================================================================================
# Part 5. Triton: the same scan, and one token, as GPU kernels. You may stop reading here: below, results are the same
# up to rounding, only faster.
#
# One program, a single warp, takes a strip of channels of one text, keeps their cells in registers and walks through
# time: scan_loop for a strip. Every cell stays with one thread, so nothing waits; a barrier stands only where threads
# read memory that others wrote. A walk reads a time step once, y needs one sum over n, and grouped B and C are read
# where they lie. Names are those of the definition; these come on top:
#
#       A2              A * log2(e), since exp2 is cheaper than exp
#       decay, written  exp(dt A) and dt u: a step is h = decay * h + written B
#       part, row       (text, segment) and (text, step) as one number each; int64, since b * t * d passes 2^31
#       lane            0 ... n - 1: which cell of a channel, and which number of its group's B or C
#       at              the steps and channels of a program, and where its rows of B and C lie
#       later           the part of grad_h_t that comes from the step after: decay_{t+1} grad_h_{t+1}
#
# A few long texts would leave most of the GPU idle. They are cut into segments, a program for each. Forward:
#   1. every segment runs from empty cells and tells where it ends, and the sum of its dt (exp(A sum) is its decay);
#   2. scan_combine walks over the segments: start <- decay * start + end;
#   3. every segment runs again, now from its true start, and writes y.
# With many texts there is one segment, and 3 does it alone. Backward has the inputs and the segments' starts:
#   1. the states again, of which one per tile of SCAN_TILE steps is saved;
#   2. grad_h through every segment, from zero, and scan_combine from the last segment to the first;
#   3. tile by tile, last first: the state before every step into a small scratch, then back with all gradients.
# There are no atomics, so a result repeats bit for bit. All arithmetic is float32.

if triton is not None:
    # Cells (channels * n) of a program: 16 per thread. With twice as many the backward runs out of registers.
    SCAN_CELLS = 512
    # Steps between saved states. It trades their memory, (b, t / SCAN_TILE, d, n) during one layer's backward, against
    # the scratch of one tile per program, which should fit into the L2 cache.
    SCAN_TILE = 16
    # Texts are cut into segments until there are so many programs (an H200 runs about 3000 at once) ...
    SCAN_PROGRAMS = 2048
    # ... but not into so many that t / segments falls below this.
    SCAN_SEGMENT = 64
    LOG2E = tl.constexpr(1.4426950408889634)

    class Inputs(NamedTuple):
        """What a scan reads: tensors in torch, pointers in a kernel. A row is one step of one text."""
        u: object                            # (b * t, d)
        dt: object                           # (b * t, d)
        A: object                            # (d, n) float32
        B: object                            # (b * t, groups * n)
        C: object                            # (b * t, groups * n), its groups may be others
        D: object                            # (d) float32
        z: object                            # (b * t, d) or None
        dt_bias: object                      # (d) float32
        reset: object                        # (b * t) uint8 or None

    class Strides(NamedTuple):
        """Elements from one row to the next: rows may lie apart, as slices of in_proj's output do."""
        u: int
        dt: int
        B: int
        C: int
        z: int

    class Grads(NamedTuple):
        """The gradients of TritonScan's arguments. A kernel writes A, B, C, D and dt_bias in parts; torch adds them."""
        u: object                            # (b * t, d)
        dt: object                           # (b * t, d)
        A: object                            # (b, segments, d, n) -> (d, n)
        B: object                            # partial sums of a GroupSum -> (b * t, groups * n)
        C: object                            # likewise
        D: object                            # (b, segments, d) -> (d)
        z: object                            # (b * t, d) or None
        dt_bias: object                      # (b, segments, d) -> (d)
        reset: object                        # None
        h: object                            # (b, segments, d, n) at the segments' ends, then at their starts

    class Where(NamedTuple):
        """Which text, steps and channels are a program's, and where they lie."""
        part: object                         # (text, segment)
        first: object                        # the segment's first row
        end: object                          # and the row after its last
        strip: object                        # which WIDTH channels of d
        channel: object                      # (WIDTH) their numbers
        live: object                         # (WIDTH) False beyond d
        cell: object                         # (WIDTH, n) their places in (d, n)
        B: object                            # (WIDTH, n) places of the groups they read in a row of B
        C: object                            # (WIDTH, n) and of C

    class Step(NamedTuple):
        """One time step of a strip, ready for h = decay * h + written B."""
        u: object                            # (WIDTH)
        raw: object                          # (WIDTH) dt before softplus
        dt: object                           # (WIDTH)
        written: object                      # (WIDTH) dt u
        B: object                            # (WIDTH, n)
        decay: object                        # (WIDTH, n) exp(dt A), 0 where a document begins
        reset: object                        # whether one begins here

    @triton.jit
    def load32(ptr):
        """Whatever lies there, as float32."""
        return tl.load(ptr).to(tl.float32)

    @triton.jit
    def softplus(v):
        """max(v, 0) + log(1 + e), e = exp(-|v|), the log by its series in s = e / (2 + e) <= 1/3: exact for small e."""
        e = tl.exp(-tl.abs(v))
        s = e / (2 + e)
        square = s * s
        series = 1 / 11 + square / 13
        series = 1 / 9 + square * series
        series = 1 / 7 + square * series
        series = 1 / 5 + square * series
        series = 1 / 3 + square * series
        series = 1 + square * series
        return tl.maximum(v, 0.0) + 2 * s * series

    # A thread holds lines i and i + WIDTH / 2 of a strip's (WIDTH, n) values. With PAIR = 2 these are neighbouring
    # channels, whose shares of grad_B and grad_C it adds up on its own. For eight lines:
    #
    #       line               0  1  2  3  4  5  6  7
    #       channel, PAIR = 1  0  1  2  3  4  5  6  7
    #       channel, PAIR = 2  0  2  4  6  1  3  5  7        lines 0 and 4 are channels 0 and 1

    @triton.jit
    def scan_place(t, d, segment, segments, share_B, share_C,
                   N: tl.constexpr, WIDTH: tl.constexpr, PAIR: tl.constexpr):
        """-> Where. share_B, share_C: how many channels read one group of B, of C."""
        strips = tl.cdiv(d, WIDTH)
        # Neighbouring programs are strips of the same steps: they share B and C in the cache.
        strip = tl.program_id(0) % strips
        part = (tl.program_id(0) // strips).to(tl.int64)
        text = part // segments
        begin = part % segments * segment
        first = text * t + begin
        end = text * t + tl.minimum(begin + segment, t)
        i = tl.arange(0, WIDTH)
        lane = tl.arange(0, N)[None, :]
        channel = strip * WIDTH + i % (WIDTH // PAIR) * PAIR + i // (WIDTH // PAIR)
        live = channel < d
        # Lines beyond d repeat the last channel and write nothing.
        channel = tl.minimum(channel, d - 1)
        cell = channel[:, None] * N + lane
        B = (channel // share_B)[:, None] * N + lane
        C = (channel // share_C)[:, None] * N + lane
        return Where(part, first, end, strip, channel, live, cell, B, C)

    @triton.jit
    def scan_step(inputs, stride, row, at, A2, bias):
        """The time step `row` of the strip `at` (Where) -> Step. A2 (WIDTH, n), bias (WIDTH)."""
        u = load32(inputs.u + row * stride.u + at.channel)
        raw = load32(inputs.dt + row * stride.dt + at.channel) + bias
        B = load32(inputs.B + row * stride.B + at.B)
        dt = softplus(raw)
        decay = tl.exp2(dt[:, None] * A2)
        reset = False
        if inputs.reset is not None:
            reset = tl.load(inputs.reset + row) != 0
            decay = tl.where(reset, 0.0, decay)
        return Step(u, raw, dt, dt * u, B, decay, reset)

    # t, segment and segments are not specialised: a new prompt length must not mean a new compilation. A pointer that
    # is None switches off what hangs on it.

    @triton.jit(do_not_specialize=["t", "segment", "segments"])
    def scan_forward(inputs, stride, t, d, segment, segments, share_B, share_C,
                     N: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
                     end_ptr, start_ptr=None, total_ptr=None, saved_ptr=None, y_ptr=None):
        """From the cells at the start of every segment (None: zeros) to those at its end, both (b, segments, d, n).
        total (b, segments, d): the sum of its dt; saved (b, segments, segment / TILE, d, n): the cells before each
        TILE-th step; y (b, t, d) in the dtype of u."""
        at = scan_place(t, d, segment, segments, share_B, share_C, N, WIDTH, 1)
        A2 = tl.load(inputs.A + at.cell) * LOG2E
        bias = tl.load(inputs.dt_bias + at.channel)
        D = tl.load(inputs.D + at.channel)
        h = tl.zeros([WIDTH, N], tl.float32)
        total = tl.zeros([WIDTH], tl.float32)
        if start_ptr is not None:
            h = tl.load(start_ptr + at.part * d * N + at.cell)
        for row in range(at.first, at.end):
            if saved_ptr is not None:
                if (row - at.first) % TILE == 0:
                    tile = at.part * (segment // TILE) + (row - at.first) // TILE
                    tl.store(saved_ptr + tile * d * N + at.cell, h, mask=at.live[:, None])
            step = scan_step(inputs, stride, row, at, A2, bias)
            h = step.decay * h + step.written[:, None] * step.B
            # A total below zero says: the segment forgets all that came before.
            total = tl.where(step.reset, float("-inf"), total) + step.dt
            if y_ptr is not None:
                C = load32(inputs.C + row * stride.C + at.C)
                y = tl.sum(h * C, axis=1) + D * step.u
                if inputs.z is not None:
                    z = load32(inputs.z + row * stride.z + at.channel)
                    y *= z * tl.sigmoid(z)
                tl.store(y_ptr + row * d + at.channel, y, mask=at.live)
        tl.store(end_ptr + at.part * d * N + at.cell, h, mask=at.live[:, None])
        if total_ptr is not None:
            tl.store(total_ptr + at.part * d + at.channel, total, mask=at.live)

    @triton.jit(do_not_specialize=["segments"])
    def scan_combine(A_ptr, outside_ptr, total_ptr, own_ptr, enter_ptr, d, segments,
                     N: tl.constexpr, CELLS: tl.constexpr, BACK: tl.constexpr):
        """own (b, segments, d, n): what each segment yields by itself -> enter, likewise: what comes into it. outside
        (b, d, n) comes into the first one; BACK: into the last, and so on towards the first."""
        # Cells are independent here, whatever their channel.
        programs = tl.cdiv(d * N, CELLS)
        text = (tl.program_id(0) // programs).to(tl.int64)
        cell = tl.program_id(0) % programs * CELLS + tl.arange(0, CELLS)
        live = cell < d * N
        A2 = tl.load(A_ptr + cell, mask=live, other=0.0) * LOG2E
        h = tl.load(outside_ptr + text * d * N + cell, mask=live, other=0.0)
        for i in range(segments):
            part = text * segments + (segments - 1 - i if BACK else i)
            total = tl.load(total_ptr + part * d + cell // N, mask=live, other=0.0)
            own = tl.load(own_ptr + part * d * N + cell, mask=live, other=0.0)
            tl.store(enter_ptr + part * d * N + cell, h, mask=live)
            decay = tl.where(total < 0, 0.0, tl.exp2(A2 * total))
            h = decay * h + own

    @triton.jit(do_not_specialize=["t", "segment", "segments"])
    def scan_carry(inputs, stride, t, d, segment, segments, share_B, share_C,
                   N: tl.constexpr, WIDTH: tl.constexpr, grad_y_ptr, own_ptr):
        """own (b, segments, d, n): grad_h as it leaves each segment's start if nothing enters at its end."""
        at = scan_place(t, d, segment, segments, share_B, share_C, N, WIDTH, 1)
        A2 = tl.load(inputs.A + at.cell) * LOG2E
        bias = tl.load(inputs.dt_bias + at.channel)
        later = tl.zeros([WIDTH, N], tl.float32)
        # The loop counts up, the walk goes from the last row to the first.
        for i in range(at.first, at.end):
            row = at.first + at.end - 1 - i
            step = scan_step(inputs, stride, row, at, A2, bias)
            grad_y = load32(grad_y_ptr + row * d + at.channel)
            if inputs.z is not None:
                z = load32(inputs.z + row * stride.z + at.channel)
                grad_y *= z * tl.sigmoid(z)
            C = load32(inputs.C + row * stride.C + at.C)
            later = step.decay * (later + grad_y[:, None] * C)
        tl.store(own_ptr + at.part * d * N + at.cell, later, mask=at.live[:, None])

    # The gradients of one step. From h_t = kept + dt u B, kept = decay h_{t-1}, and y_t = (C . h_t + D u) silu(z):
    #
    #       grad_z = grad_y (C . h_t + D u) silu'(z)        then grad_y <- grad_y silu(z)
    #       grad_h = grad_y C + later                       the full gradient of h_t
    #       grad_written = grad_h . B                       of dt u
    #       grad_rate = grad_h kept                         of dt A
    #       grad_u = grad_written dt + grad_y D             grad_D = grad_y u
    #       grad_dt = grad_written u + grad_rate . A        times sigmoid(raw), the derivative of softplus
    #       grad_B = grad_h dt u                            grad_C = grad_y h_t
    #       grad_A = grad_rate dt                           grad_dt_bias = grad_dt
    #
    # kept needs h_{t-1}, but the walk goes from late to early, and dividing by decay is unstable: hence the tiles.

    @triton.jit
    def rebuild_tile(inputs, stride, at, A2, bias, h, low, high, history_at, d, N: tl.constexpr):
        """From h, the cells before row low: the cells before every row of low ... high - 1 into the history."""
        for row in range(low, high):
            tl.store(history_at + (row - low) * d * N, h, mask=at.live[:, None])
            step = scan_step(inputs, stride, row, at, A2, bias)
            h = step.decay * h + step.written[:, None] * step.B

    @triton.jit
    def store_sums(ptr, row, strip, d, values,
                   SUM: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PAIR: tl.constexpr):
        """values (WIDTH, n), lines as in scan_place: sums over SUM neighbouring channels go to ptr (b, t, d / SUM, n).
        SUM divides d, so that no sum has lines from both sides of d."""
        # First within a thread: the lines of a pair of channels lie WIDTH / PAIR apart.
        values = tl.reshape(values, [PAIR, WIDTH // PAIR, N])
        values = tl.sum(values, axis=0)                            # (WIDTH / PAIR, n), pairs in the order of channels
        # Then across threads.
        values = tl.reshape(values, [WIDTH // SUM, SUM // PAIR, N])
        values = tl.sum(values, axis=1)                            # (WIDTH / SUM, n)
        i = strip * (WIDTH // SUM) + tl.arange(0, WIDTH // SUM)[:, None]
        lane = tl.arange(0, N)[None, :]
        tl.store(ptr + row * (d // SUM) * N + i * N + lane, values, mask=i < d // SUM)

    @triton.jit(do_not_specialize=["t", "segment", "segments"])
    def scan_backward(inputs, stride, t, d, segment, segments, share_B, share_C,
                      N: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
                      SUM_B: tl.constexpr, SUM_C: tl.constexpr, PAIR: tl.constexpr,
                      grad_y_ptr, saved_ptr, history_ptr, grad):
        """grad: Grads. saved as in scan_forward, history (b, segments, TILE, d, n) is scratch."""
        at = scan_place(t, d, segment, segments, share_B, share_C, N, WIDTH, PAIR)
        A2 = tl.load(inputs.A + at.cell) * LOG2E
        bias = tl.load(inputs.dt_bias + at.channel)
        D = tl.load(inputs.D + at.channel)
        grad_A = tl.zeros([WIDTH, N], tl.float32)
        grad_D = tl.zeros([WIDTH], tl.float32)
        grad_bias = tl.zeros([WIDTH], tl.float32)
        later = tl.load(grad.h + at.part * d * N + at.cell)
        history_at = history_ptr + at.part * TILE * d * N + at.cell
        tiles = tl.cdiv(at.end - at.first, TILE)
        for i in range(tiles):
            tile = tiles - 1 - i
            low = at.first + tile * TILE
            high = tl.minimum(low + TILE, at.end)
            h = tl.load(saved_ptr + (at.part * (segment // TILE) + tile) * d * N + at.cell)
            rebuild_tile(inputs, stride, at, A2, bias, h, low, high, history_at, d, N)
            # A thread may read what another one wrote.
            tl.debug_barrier()
            # From the last row to the first.
            for j in range(low, high):
                row = low + high - 1 - j
                step = scan_step(inputs, stride, row, at, A2, bias)
                C = load32(inputs.C + row * stride.C + at.C)
                grad_y = load32(grad_y_ptr + row * d + at.channel)
                kept = step.decay * tl.load(history_at + (row - low) * d * N)
                h = kept + step.written[:, None] * step.B
                if inputs.z is not None:
                    z = load32(inputs.z + row * stride.z + at.channel)
                    sigma = tl.sigmoid(z)
                    y = tl.sum(h * C, axis=1) + D * step.u
                    grad_z = grad_y * y * sigma * (1 + z * (1 - sigma))
                    tl.store(grad.z + row * d + at.channel, grad_z, mask=at.live)
                    grad_y *= z * sigma
                grad_h = later + grad_y[:, None] * C
                grad_written = tl.sum(grad_h * step.B, axis=1)
                grad_rate = grad_h * kept
                grad_dt = grad_written * step.u + tl.sum(grad_rate * A2, axis=1) / LOG2E
                grad_dt *= tl.sigmoid(step.raw)
                grad_u = grad_written * step.dt + grad_y * D
                tl.store(grad.u + row * d + at.channel, grad_u, mask=at.live)
                tl.store(grad.dt + row * d + at.channel, grad_dt, mask=at.live)
                grad_B = grad_h * step.written[:, None]
                store_sums(grad.B, row, at.strip, d, grad_B, SUM_B, N, WIDTH, PAIR)
                grad_C = h * grad_y[:, None]
                store_sums(grad.C, row, at.strip, d, grad_C, SUM_C, N, WIDTH, PAIR)
                grad_A += grad_rate * step.dt[:, None]
                grad_D += grad_y * step.u
                grad_bias += grad_dt
                later = step.decay * grad_h
            # All of the history was read before the next tile overwrites it.
            tl.debug_barrier()
        tl.store(grad.h + at.part * d * N + at.cell, later, mask=at.live[:, None])
        tl.store(grad.A + at.part * d * N + at.cell, grad_A, mask=at.live[:, None])
        tl.store(grad.D + at.part * d + at.channel, grad_D, mask=at.live)
        tl.store(grad.dt_bias + at.part * d + at.channel, grad_bias, mask=at.live)

    class ScanPlan(NamedTuple):
        """How a scan is cut into programs."""
        b: int
        t: int
        d: int
        n: int
        width: int                           # channels of a program
        segment: int                         # steps of a segment, whole tiles; the last one may be shorter
        segments: int                        # segments of a text
        grid: tuple                          # (programs)
        shared: dict                         # the arguments that all scan kernels take, by name

    def scan_plan(inputs, b):
        """inputs: Inputs of b texts -> ScanPlan."""
        d, n = inputs.A.shape
        t = len(inputs.u) // b
        width = min(64, max(1, SCAN_CELLS // n))
        strips = triton.cdiv(d, width)
        segments = 1
        while b * strips * segments < SCAN_PROGRAMS and t >= 2 * segments * SCAN_SEGMENT:
            segments *= 2
        segment = triton.cdiv(triton.cdiv(t, segments), SCAN_TILE) * SCAN_TILE
        segments = triton.cdiv(t, segment)
        stride = Strides(
            u=inputs.u.stride(0),
            dt=inputs.dt.stride(0),
            B=inputs.B.stride(0),
            C=inputs.C.stride(0),
            z=0 if inputs.z is None else inputs.z.stride(0))
        shared = dict(
            inputs=inputs, stride=stride, t=t, d=d, segment=segment, segments=segments,
            share_B=d * n // inputs.B.shape[1], share_C=d * n // inputs.C.shape[1],
            N=n, WIDTH=width, num_warps=1)
        return ScanPlan(b, t, d, n, width, segment, segments, (b * segments * strips,), shared)

    class GroupSum:
        """The gradient of B or of C, a sum over the channels that read a group. The kernel adds up `width` of them, the
        largest power of two that divides a strip and a group, and torch adds the rest."""

        def __init__(self, like, plan):
            """like (b * t, groups * n): the B or C whose gradient this is."""
            groups = like.shape[1] // plan.n
            share = plan.d // groups
            self.like = like
            self.width = math.gcd(plan.width, share)
            self.rest = share // self.width
            # One sum is final; several are partial sums.
            dtype = like.dtype if self.rest == 1 else torch.float32
            self.sums = like.new_empty(len(like), groups, self.rest, plan.n, dtype=dtype)

        def total(self):
            """-> (b * t, groups * n)"""
            total = self.sums
            if self.rest > 1:
                total = total.sum(2).to(self.like.dtype)
            return total.view(self.like.shape)

    def combine(plan, A, outside, total, own, back):
        """Arguments as in scan_combine -> what enters each segment, (b, segments, d, n)."""
        cells = 256
        grid = (plan.b * triton.cdiv(plan.d * plan.n, cells),)
        enter = torch.empty_like(own)
        scan_combine[grid](
            A, outside, total, own, enter, plan.d, plan.segments, N=plan.n, CELLS=cells, BACK=back)
        return enter

    def segment_starts(inputs, plan, h):
        """Forward, 1 and 2: h (b, d, n) before the texts -> the cells before each segment (b, segments, d, n)."""
        if plan.segments == 1:
            return h[:, None]
        end = h.new_empty(plan.b, plan.segments, plan.d, plan.n)
        total = h.new_empty(plan.b, plan.segments, plan.d)
        scan_forward[plan.grid](**plan.shared, TILE=SCAN_TILE, end_ptr=end, total_ptr=total)
        return combine(plan, inputs.A, h, total, end, back=False)

    def segment_grads(inputs, plan, total, grad_y, grad_h):
        """Backward, 2: grad_h (b, d, n) after the texts -> after each segment (b, segments, d, n), in new memory."""
        if plan.segments == 1:
            return grad_h[:, None].clone()
        own = grad_h.new_empty(plan.b, plan.segments, plan.d, plan.n)
        scan_carry[plan.grid](**plan.shared, grad_y_ptr=grad_y, own_ptr=own)
        return combine(plan, inputs.A, grad_h, total, own, back=True)

    class TritonScan(torch.autograd.Function):
        """The fields of Inputs and h (b, d, n), float32 and contiguous -> y (b * t, d), the last h."""

        @staticmethod
        def forward(ctx, u, dt, A, B, C, D, z, dt_bias, reset, h):
            inputs = Inputs(u, dt, A, B, C, D, z, dt_bias, reset)
            plan = scan_plan(inputs, len(h))
            with torch.cuda.device_of(u):
                start = segment_starts(inputs, plan, h)
                end = torch.empty_like(start)
                y = u.new_empty(u.shape)
                scan_forward[plan.grid](
                    **plan.shared, TILE=SCAN_TILE, end_ptr=end, start_ptr=start, y_ptr=y)
            ctx.save_for_backward(*inputs, start)
            return y, end[:, -1].contiguous()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_y, grad_h):
            *inputs, start = ctx.saved_tensors
            inputs = Inputs(*inputs)
            plan = scan_plan(inputs, len(start))
            b, segments, d, n = start.shape
            grad_y = grad_y.contiguous()
            end = torch.empty_like(start)
            total = start.new_empty(b, segments, d)
            saved = start.new_empty(b, segments, plan.segment // SCAN_TILE, d, n)
            history = start.new_empty(b, segments, SCAN_TILE, d, n)
            sum_B = GroupSum(inputs.B, plan)
            sum_C = GroupSum(inputs.C, plan)
            with torch.cuda.device_of(start):
                scan_forward[plan.grid](
                    **plan.shared, TILE=SCAN_TILE, end_ptr=end, start_ptr=start,
                    total_ptr=total, saved_ptr=saved)
                grads = Grads(
                    u=inputs.u.new_empty(inputs.u.shape),
                    dt=inputs.dt.new_empty(inputs.dt.shape),
                    A=torch.empty_like(start),
                    B=sum_B.sums,
                    C=sum_C.sums,
                    D=torch.empty_like(total),
                    z=None if inputs.z is None else inputs.z.new_empty(inputs.z.shape),
                    dt_bias=torch.empty_like(total),
                    reset=None,
                    h=segment_grads(inputs, plan, total, grad_y, grad_h.contiguous()))
                scan_backward[plan.grid](
                    **plan.shared, TILE=SCAN_TILE, SUM_B=sum_B.width, SUM_C=sum_C.width,
                    PAIR=min(2, sum_B.width, sum_C.width),
                    grad_y_ptr=grad_y, saved_ptr=saved, history_ptr=history, grad=grads)
            return grads._replace(
                A=grads.A.sum((0, 1)),
                B=sum_B.total(),
                C=sum_C.total(),
                D=grads.D.sum((0, 1)),
                dt_bias=grads.dt_bias.sum((0, 1)),
                h=grads.h[:, 0])

    def scan_triton(u, dt, A, B, C, D=None, z=None, dt_bias=None, h=None, reset=None):
        """The selective scan in Triton kernels. Arguments and results as in selective_scan."""
        b, t, d = u.shape
        n = A.shape[1]

        def rows(m):
            """(b, t, ...) -> (b * t, ...), where a slice of in_proj's output passes without a copy."""
            if m is None:
                return None
            m = m.reshape(b * t, -1)
            return m if m.stride(1) == 1 else m.contiguous()

        def float32(m, *shape):
            if m is None:
                return u.new_zeros(shape, dtype=torch.float32)
            return m.float().contiguous()

        if reset is not None:
            reset = reset.contiguous().view(torch.uint8)
        inputs = Inputs(
            u=rows(u), dt=rows(dt), A=float32(A), B=rows(B), C=rows(C), D=float32(D, d),
            z=rows(z), dt_bias=float32(dt_bias, d), reset=reset)
        y, h = TritonScan.apply(*inputs, float32(h, b, d, n))
        return y.view(b, t, d), h

    # One token, the case of decoding, is the work of one kernel instead of some twenty: conv window, SiLU, softplus,
    # cells, read-out, skip and gate. A program takes a chunk of d_state lanes of d_xb and all the channels that repeat
    # it: it alone reads this part of the conv window, and may write the next window over it. What follows the conv
    # stays in float32; part 1 rounds u to the dtype of the model in between.

    class Token(NamedTuple):
        """What the projections say about the newest token. u, B, C, z are slices of one tensor."""
        u: object                            # (b, d_xb)
        B: object                            # (b, d_xb)
        C: object                            # (b, d)
        z: object                            # (b, d)
        dt: object                           # (b, d), holds its bias once
        position: object                     # (b) or None

    class Weights(NamedTuple):
        """Parameters of a Mamba layer, as they are stored."""
        conv: object                         # (channels, 1, TAPS)
        conv_bias: object                    # (channels) or None
        A_log: object                        # (d, n)
        D: object                            # (d)
        dt_bias: object                      # (d) or None

    @triton.jit
    def step_kernel(token, weights, conv_ptr, h_ptr, next_conv_ptr, next_h_ptr, y_ptr,
                    in_row, d_xb, repeat, TAPS: tl.constexpr, SLOTS: tl.constexpr,
                    N: tl.constexpr, WIDTH: tl.constexpr, EXPAND: tl.constexpr):
        """The state, conv (b, TAPS - 1, d_xb) and h (b, d, n), and the next one, which may lie in the same memory;
        y (b, d). in_row: elements between the rows of u, B, C, z. repeat: d / d_xb. EXPAND: the conv has d channels,
        not d_xb. SLOTS: a power of two, TAPS - 1 or more."""
        chunks = d_xb // N
        chunk = tl.program_id(0) % chunks
        text = (tl.program_id(0) // chunks).to(tl.int64)
        d = d_xb * repeat
        lane = tl.arange(0, N)[None, :]
        window = text * (TAPS - 1) * d_xb
        position = TAPS
        if token.position is not None:
            position = tl.load(token.position + text)
        for low in range(0, repeat * N, WIDTH):
            i = low + tl.arange(0, WIDTH)
            live = i < repeat * N
            channel = chunk * repeat * N + tl.minimum(i, repeat * N - 1)
            source = chunk * N + i % N
            conv_channel = channel if EXPAND else source
            taps = weights.conv + conv_channel * TAPS
            u = load32(taps + TAPS - 1) * load32(token.u + text * in_row + source)
            for j in tl.static_range(TAPS - 1):
                # Inputs from before the document began count as zero.
                earlier = load32(conv_ptr + window + j * d_xb + source)
                earlier = tl.where(position < TAPS - 1 - j, 0.0, earlier)
                u += load32(taps + j) * earlier
            if weights.conv_bias is not None:
                u += load32(weights.conv_bias + conv_channel)
            u *= tl.sigmoid(u)
            dt = load32(token.dt + text * d + channel)
            if weights.dt_bias is not None:
                dt += load32(weights.dt_bias + channel)
            dt = softplus(dt)
            cell = channel[:, None] * N + lane
            A = -tl.exp(load32(weights.A_log + cell))
            B = load32(token.B + text * in_row + chunk * N + lane)
            h = tl.load(h_ptr + text * d * N + cell)
            h = tl.where(position == 0, 0.0, h)
            h = tl.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B
            C = load32(token.C + text * in_row + (channel // N)[:, None] * N + lane)
            z = load32(token.z + text * in_row + channel)
            y = tl.sum(h * C, axis=1) + load32(weights.D + channel) * u
            tl.store(next_h_ptr + text * d * N + cell, h, mask=live[:, None])
            tl.store(y_ptr + text * d + channel, y * z * tl.sigmoid(z), mask=live)
        # The window moves on by one: (SLOTS, n), the newest input raw, before conv and SiLU.
        slot = tl.arange(0, SLOTS)[:, None]
        source = chunk * N + lane
        slot_at = window + slot * d_xb + source
        older = tl.load(conv_ptr + slot_at + d_xb, mask=slot < TAPS - 2, other=0.0)
        newest = tl.load(token.u + text * in_row + source)
        value = tl.where(slot == TAPS - 2, newest, older)
        # All threads have read the window, before any overwrites it.
        tl.debug_barrier()
        tl.store(next_conv_ptr + slot_at, value, mask=slot < TAPS - 1)

    def mamba_step(mixer, u, dt, B, C, z, state, place):
        """Mamba.mix for one token, where u, B, C and z are slices of one tensor. The next state is written over the
        given one if place.donated, that is, if the caller gave it away."""
        config = mixer.config
        n = config.d_state
        repeat = config.d_inner // config.d_xb
        width = min(triton.next_power_of_2(repeat * n), max(1, 8 * SCAN_CELLS // n))
        assert u.stride(0) == B.stride(0) == C.stride(0) == z.stride(0)
        assert dt.is_contiguous() and state.conv.is_contiguous() and state.h.is_contiguous()
        token = Token(u, B, C, z, dt, place.positions)
        weights = Weights(
            conv=mixer.conv1d.weight, conv_bias=mixer.conv1d.bias, A_log=mixer.A_log, D=mixer.D,
            dt_bias=mixer.dt_proj.bias)
        y = torch.empty_like(dt)
        new = state
        if not place.donated:
            new = SSM(torch.empty_like(state.conv), torch.empty_like(state.h))
        with torch.cuda.device_of(u):
            step_kernel[(len(u) * config.d_xb // n,)](
                token, weights, state.conv, state.h, new.conv, new.h, y,
                z.stride(0), config.d_xb, repeat, TAPS=config.d_conv, N=n, WIDTH=width,
                SLOTS=triton.next_power_of_2(max(1, config.d_conv - 1)),
                EXPAND=config.expand_before_conv, num_warps=max(1, width * n // 512))
        return y, new
