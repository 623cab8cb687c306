"""
The hybrid as a vLLM model. Embedding, attention, MLP and head are vLLM's own; the Mamba mixer and the block are here.

vLLM calls a model with the tokens of many texts in one row: one token each of the texts that are being written
(decodes), then pieces of prompts (prefills), piece after piece. What a text left behind, its state, lies in a slot of a
pool that vLLM manages: it hands slots out, copies them for shared prefixes, and takes them away under pressure. The
mixer is told the slots. Everything else is nanoH1's Mamba layer (model.py, part 1), with these differences:

      the state of the conv     the inputs as the conv sees them, after expansion where that comes first: vLLM's kernels
                                convolve what they store. (slots, d_conv - 1, channels)
      the cells                 (slots, d_inner, d_state), float32 whatever the model's dtype
      tensor parallel           each process has whole chunks of u and B, and the channels that read them (not tested)

Where the sum is done: on a GPU by vLLM's kernels, elsewhere, and for shapes that these cannot do, by the PyTorch code
here. Do not put vLLM's kernels in its place on a CPU: there selective_scan_fn does not exist, and
selective_state_update takes A, dt, D and the bias once per head, which is silently wrong for Mamba-1. The GPU's lines
(step_kernels, prefill_kernels) have never run on a GPU: there was none.

Sizes as in nanoH1: t tokens, d channels, n = d_state cells a channel. Letters of the papers: u dt A B C D z, h cells.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
# Importing it defines the op torch.ops.vllm.mamba_mixer.
from vllm.model_executor.layers.mamba import mamba_mixer  # noqa: F401
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_update,
)
from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_scan_fn
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import selective_state_update
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum


# ----------------------------------------------------------------------------------------------------------------------
# The memory in PyTorch: scan and conv of nanoH1's model.py. The scan goes in chunks: the exponentials and products of
# a chunk of steps are made at once, so that a time step is a single multiply-add.
CHUNK = 64


def selective_scan(u, dt, A, B, C, D, z, dt_bias, h):
    """u, z, and dt before its softplus (b, t, d); A (d, n), negative; B (b, t, groups, n); C (b, t, other groups, n);
    D, dt_bias (d); h (b, d, n): the cells before the first token -> y (b, t, d) in u's dtype, the cells after the last.
    dt = softplus(dt + dt_bias), h = exp(dt A) h + dt u B, y = (C . h + D u) silu(z), all in float32."""
    dtype = u.dtype
    b, t, d = u.shape
    n = A.shape[1]
    u = u.float()
    dt = F.softplus(dt.float() + dt_bias)
    written = (dt * u).view(b, t, B.shape[2], -1, 1)               # (b, t, groups, d / groups, 1)
    y = torch.empty_like(u)
    for i in range(0, t, CHUNK):
        part = slice(i, i + CHUNK)
        decay = torch.exp(dt[:, part, :, None] * A)                # (b, steps, d, n)
        states = written[:, part] * B[:, part, :, None].float()
        states = states.view(b, -1, d, n)
        for j in range(states.shape[1]):
            states[:, j].addcmul_(decay[:, j], h)                  # what was written, + decay * h
            h = states[:, j]
        grouped = states.view(b, -1, C.shape[2], d // C.shape[2], n)
        read = torch.matmul(grouped, C[:, part, ..., None].float())
        y[:, part] = read.view(b, -1, d)
    y = (y + D * u) * F.silu(z.float())
    return y.to(dtype), h


def causal_conv(u, before, weight, bias):
    """u (b, t, c), before (b, d_conv - 1, c) earlier inputs, weight (c, d_conv), its last column meets the newest input
    -> (b, t, c), and the last d_conv - 1 inputs."""
    inputs = torch.cat([before, u], dim=1)                         # (b, d_conv - 1 + t, c)
    y = 0 if bias is None else bias
    for i in range(weight.shape[1]):
        y = y + inputs[:, i:i + u.shape[1]] * weight[:, i]
    return y, inputs[:, u.shape[1]:]


# ----------------------------------------------------------------------------------------------------------------------
# The mixer. As in nanoH1: in_proj makes [z, u, B, C], dt has a low-rank path of its own, everything is cut into chunks
# of d_state. Channel c of chunk j = c // d_state reads z[c], all of C's chunk j, and of chunk j // (d_inner / d_xb) all
# of B and one lane of u. The dt bias counts twice: dt_proj adds it, and the scan adds it again.

class SplitConv(nn.Module):
    """Holds the weights of the conv, this process's channels. (A linear layer of vLLM's would be repacked on a CPU and
    left empty.)"""
    def __init__(self, channels, d_conv, bias):
        super().__init__()
        self.weight = split_parameter((channels, 1, d_conv), torch.get_default_dtype())
        self.bias = split_parameter((channels,), torch.get_default_dtype()) if bias else None


def split_parameter(shape, dtype):
    """A parameter with this process's rows of a tensor: `shape` is that of the rows."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    parameter.weight_loader = load_rows
    return parameter


def load_rows(parameter, tensor):
    """Fill parameter with its process's share of the rows of the tensor in the file."""
    processes = get_tensor_model_parallel_world_size()
    whole = (parameter.shape[0] * processes, *parameter.shape[1:])
    if tensor.shape != whole:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, expected {whole}")
    share = tensor.chunk(processes)[get_tensor_model_parallel_rank()]
    parameter.data.copy_(share)


class Mamba(nn.Module, MambaBase):
    def __init__(self, config, vllm_config, prefix):
        super().__init__()
        ssm = config.ssm_cfg
        bias = ssm["bias"]
        d_inner = ssm["d_inner"]
        d_xb = ssm["d_xb"]
        self.d_state = ssm["d_state"]
        self.d_conv = ssm["d_conv"]
        if d_inner % d_xb or d_xb % self.d_state:
            raise ValueError(f"d_xb {d_xb} must divide d_inner {d_inner}, d_state {self.d_state} d_xb")
        if self.d_conv < 2:
            raise ValueError("vLLM cannot keep the state of a conv that sees one input only: d_conv 1")
        chunks = d_xb // self.d_state
        processes = get_tensor_model_parallel_world_size()
        if chunks % processes:
            raise ValueError(f"{chunks} chunks of d_xb cannot be shared by {processes} processes")
        self.d_inner = d_inner // processes
        self.d_xb = d_xb // processes
        self.expand_before_conv = ssm["repeat_kv_before_conv"]
        self.channels = self.d_inner if self.expand_before_conv else self.d_xb
        self.dtype = vllm_config.model_config.dtype
        known_shape = self.d_conv <= 4 and self.d_state <= 256
        self.use_kernels = current_platform.is_cuda() and known_shape

        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size, [d_inner, d_xb, d_xb, d_inner], bias, prefix=f"{prefix}.in_proj")
        self.dt_in_proj = ReplicatedLinear(
            config.hidden_size, ssm["dt_rank"], bias, prefix=f"{prefix}.dt_in_proj")
        self.dt_proj = ColumnParallelLinear(
            ssm["dt_rank"], d_inner, ssm["dt_proj_bias"], prefix=f"{prefix}.dt_proj")
        self.conv1d = SplitConv(self.channels, self.d_conv, ssm["conv_bias"])
        self.A_log = split_parameter((self.d_inner, self.d_state), torch.float32)
        self.D = split_parameter((self.d_inner,), torch.float32)
        self.out_proj = RowParallelLinear(
            d_inner, config.hidden_size, bias, prefix=f"{prefix}.out_proj")

        # By this name the op finds the mixer, and vLLM the layer that needs slots.
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are named {prefix}")
        layers[prefix] = self
        self.prefix = prefix
        # The pool, set by vLLM: conv inputs and cells of all slots.
        self.kv_cache = (torch.tensor([]), torch.tensor([]))

    @property
    def mamba_type(self):
        return MambaAttentionBackendEnum.MAMBA1

    def get_state_shape(self):
        return state_shape(self.channels, self.d_inner, self.d_state, self.d_conv)

    def get_state_dtype(self):
        return self.dtype, torch.float32

    def forward(self, x):
        """x (tokens, d_model) -> (tokens, d_model). Behind an op, so that torch.compile sees nothing of the slots."""
        out = torch.empty_like(x)
        torch.ops.vllm.mamba_mixer(x, out, _encode_layer_name(self.prefix))
        return out

    def forward_impl(self, hidden_states, output):
        """Called by the op, which names the arguments. hidden_states (tokens, d_model): decodes first, then prefills,
        then perhaps padding -> into output."""
        x = hidden_states
        widths = [self.d_inner, self.d_xb, self.d_xb, self.d_inner]
        z, u, B, C = self.in_proj(x)[0].split(widths, dim=-1)      # (tokens, these)
        dt = self.dt_proj(self.dt_in_proj(x)[0])[0]                # (tokens, d_inner), holds the bias once
        inputs = (u, dt, B, C, z)
        y = torch.zeros_like(z)                                    # padding stays zero
        # None while vLLM measures how much memory a call takes.
        metadata = get_forward_context().attn_metadata
        if metadata is not None:
            metadata = metadata[self.prefix]
            step = self.step_kernels if self.use_kernels else self.step
            prefill = self.prefill_kernels if self.use_kernels else self.prefill
            decodes = slice(0, metadata.num_decode_tokens)
            prefills = slice(decodes.stop, decodes.stop + metadata.num_prefill_tokens)
            if metadata.num_decode_tokens:
                y[decodes] = step(*[part[decodes] for part in inputs], metadata)
            if metadata.num_prefill_tokens:
                y[prefills] = prefill(*[part[prefills] for part in inputs], metadata)
        output.copy_(self.out_proj(y)[0])

    def pool(self):
        """-> conv inputs (slots, d_conv - 1, channels) and cells (slots, d_inner, d_state) of all texts: views."""
        conv, h = self.kv_cache
        if is_conv_state_dim_first():
            conv = conv.transpose(1, 2)
        return conv, h

    def rates(self):
        return -torch.exp(self.A_log)

    def dt_bias(self):
        """(d_inner) float32: what the scan adds to dt, the bias that dt_proj has added before."""
        if self.dt_proj.bias is None:
            return torch.zeros_like(self.D)
        return self.dt_proj.bias.float()

    def expand(self, u):
        """(..., d_xb) -> (..., d_inner): each chunk of d_state lanes d_inner / d_xb times in a row."""
        chunks = u.unflatten(-1, (-1, self.d_state))
        return chunks.repeat_interleave(self.d_inner // self.d_xb, dim=-2).flatten(-2)

    # In PyTorch.

    def mix(self, u, dt, B, C, z, conv, h):
        """The memory, between the projections. u, B (b, t, d_xb); dt, C, z (b, t, d_inner); conv (b, d_conv - 1,
        channels); h (b, d_inner, d_state) -> y (b, t, d_inner), and conv and h after these tokens."""
        if self.expand_before_conv:
            u = self.expand(u)
        u, conv = causal_conv(u, conv, self.conv1d.weight[:, 0], self.conv1d.bias)
        u = F.silu(u)
        if not self.expand_before_conv:
            u = self.expand(u)
        B = B.unflatten(-1, (-1, self.d_state))                    # (b, t, d_xb / n, n)
        C = C.unflatten(-1, (-1, self.d_state))                    # (b, t, d_inner / n, n)
        # Here the dt bias counts a second time.
        y, h = selective_scan(u, dt, self.rates(), B, C, self.D, z, self.dt_bias(), h)
        return y, conv, h

    def step(self, u, dt, B, C, z, metadata):
        """One token each of several texts: u, B (texts, d_xb); dt, C, z (texts, d_inner) -> y (texts, d_inner)"""
        conv, h = self.pool()
        slots = metadata.state_indices_tensor_d[:, 0]
        tokens = [tensor[:, None] for tensor in (u, dt, B, C, z)]  # (texts, 1, ...)
        y, new_conv, new_h = self.mix(*tokens, conv[slots], h[slots])
        conv[slots] = new_conv
        h[slots] = new_h
        return y[:, 0]

    def prefill(self, u, dt, B, C, z, metadata):
        """A piece each of several texts, one after the other: u, B (tokens, d_xb); dt, C, z (tokens, d_inner)
        -> y (tokens, d_inner). A text whose first piece this is begins with zeros: its slot may hold another's rest."""
        conv, h = self.pool()
        slots = metadata.state_indices_tensor_p.tolist()
        starts = metadata.query_start_loc_p.tolist()
        goes_on = metadata.has_initial_states_p.tolist()
        ys = []
        for i, slot in enumerate(slots):
            piece = slice(starts[i], starts[i + 1])
            tokens = [tensor[None, piece] for tensor in (u, dt, B, C, z)]      # (1, t, ...)
            before = (conv[slot:slot + 1], h[slot:slot + 1])
            if not goes_on[i]:
                before = [torch.zeros_like(state) for state in before]
            y, new_conv, new_h = self.mix(*tokens, *before)
            conv[slot] = new_conv[0]
            h[slot] = new_h[0]
            ys.append(y[0])
        return torch.cat(ys)

    # By vLLM's kernels on a GPU: the same, but never run on one. A kernel knows heads: here a head is a chunk, d_state
    # channels wide. It wants as many groups of B as of C, and prompts as (channels, tokens).

    def step_kernels(self, u, dt, B, C, z, metadata):
        """As step."""
        conv, h = self.pool()
        slots = metadata.state_indices_tensor_d
        weight = self.conv1d.weight[:, 0]
        if self.expand_before_conv:
            u = self.expand(u)
        u = causal_conv1d_update(u.contiguous(), conv.transpose(1, 2), weight, self.conv1d.bias, "silu",
                                 conv_state_indices=slots)
        if not self.expand_before_conv:
            u = self.expand(u)

        def heads(tensor):
            return tensor.reshape(-1, self.d_inner // self.d_state, self.d_state)
        A = self.rates().unflatten(0, (-1, self.d_state))          # (d_inner / n, n, n)
        h = h.unflatten(1, (-1, self.d_state))                     # (slots, d_inner / n, n, n)
        y = torch.empty_like(heads(u))
        # Here the dt bias counts a second time.
        selective_state_update(h, heads(u), heads(dt), A, heads(self.expand(B)), heads(C),
                               heads(self.D)[0], heads(self.dt_bias())[0], z=heads(z),
                               dt_softplus=True, state_batch_indices=slots,
                               dst_state_batch_indices=slots, out=y)
        return y.flatten(1)

    def prefill_kernels(self, u, dt, B, C, z, metadata):
        """As prefill."""
        conv, h = self.pool()
        weight = self.conv1d.weight[:, 0]
        texts = {
            "cache_indices": metadata.state_indices_tensor_p,
            "has_initial_state": metadata.has_initial_states_p,
            "query_start_loc": metadata.query_start_loc_p,
        }
        if self.expand_before_conv:
            u = self.expand(u)
        u = causal_conv1d_fn(u.T, weight, self.conv1d.bias, conv_states=conv.transpose(1, 2),
                             activation="silu", metadata=metadata, **texts)
        if not self.expand_before_conv:
            u = self.expand(u.T).T
        B = self.expand(B).unflatten(-1, (-1, self.d_state)).permute(1, 2, 0)  # (d_inner / n, n, tokens)
        C = C.unflatten(-1, (-1, self.d_state)).permute(1, 2, 0)
        # Here the dt bias counts a second time.
        y = selective_scan_fn(u, h, dt.T, self.rates(), B, C, self.D, z.T, self.dt_bias(),
                              delta_softplus=True, **texts)
        return y.T


def state_shape(channels, d_inner, d_state, d_conv):
    """The sizes in one process -> the shapes of what a slot holds: conv inputs, cells."""
    conv = (channels, d_conv - 1) if is_conv_state_dim_first() else (d_conv - 1, channels)
    return conv, (d_inner, d_state)


# ----------------------------------------------------------------------------------------------------------------------
# Block and model. vLLM hands on two tensors: x, what the last half-block gave, and residual, the stream before it was
# added. Its norms add the two and normalise in one kernel.

def make_attention(config, vllm_config, prefix):
    """Attention as the config says, from vLLM's own classes: Llama's with or without biases of q, k and v, Qwen 3's
    where queries and keys are normalised. The window is taken from the config by both."""
    sizes = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "cache_config": vllm_config.cache_config,
        "prefix": prefix,
    }
    length = config.max_position_embeddings
    if config.qk_norm:
        return Qwen3Attention(**sizes, head_dim=config.head_dim, qkv_bias=config.qkv_bias,
                              rms_norm_eps=config.rms_norm_eps, max_position=length,
                              rope_parameters=config.rope_parameters)
    return LlamaAttention(config, **sizes, bias=config.qkv_bias, max_position_embeddings=length)


def add_and_norm(norm, x, residual):
    """-> the stream x + residual after the norm, and before it. Before the first layer there is no residual."""
    if residual is None:
        return norm(x), x
    return norm(x, residual)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)), or what of it a layer kind has."""
    def __init__(self, vllm_config, prefix):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.kind = config.hybrid_block_layout[extract_layer_index(prefix)]
        width = config.hidden_size
        if self.kind in ("t", "m2"):
            self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        if self.kind == "t":
            self.self_attn = make_attention(config, vllm_config, f"{prefix}.self_attn")
        if self.kind == "m2":
            self.mixer = Mamba(config, vllm_config, f"{prefix}.mixer")
        if self.kind != "i":
            self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
            self.mlp = LlamaMLP(width, config.intermediate_size, "silu", prefix=f"{prefix}.mlp")

    def forward(self, positions, x, residual):
        """positions (tokens), x (tokens, d_model), residual like x or None -> x, residual"""
        if self.kind == "i":
            return (torch.zeros_like(x), x) if residual is None else (x, residual)
        if self.kind == "t":
            x, residual = add_and_norm(self.input_layernorm, x, residual)
            x = self.self_attn(positions, x)
        if self.kind == "m2":
            x, residual = add_and_norm(self.input_layernorm, x, residual)
            x = self.mixer(x)
        x, residual = add_and_norm(self.post_attention_layernorm, x, residual)
        return self.mlp(x), residual


class HybridForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid):
    """vLLM's Llama with other blocks. Raises ValueError for what vLLM offers and this model does not."""
    def __init__(self, *, vllm_config, prefix=""):
        config = vllm_config.model_config.hf_config
        named = len(config.hybrid_block_layout)
        if named != config.num_hidden_layers:
            raise ValueError(f"the layout names {named} layers, not {config.num_hidden_layers}")
        refuse_options(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Block)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config):
        ssm = vllm_config.model_config.hf_config.ssm_cfg
        processes = vllm_config.parallel_config.tensor_parallel_size
        d_inner = ssm["d_inner"] // processes
        channels = d_inner if ssm["repeat_kv_before_conv"] else ssm["d_xb"] // processes
        return state_shape(channels, d_inner, ssm["d_state"], ssm["d_conv"])

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config):
        return vllm_config.model_config.dtype, torch.float32

    @classmethod
    def get_mamba_state_copy_func(cls):
        """How a slot is copied for a shared prefix."""
        return MambaStateCopyFuncCalculator.mamba1_state_copy_func()

    def load_weights(self, weights):
        """weights: (name, tensor) as in the file. vLLM's loaders pass over missing, unknown and too long tensors of
        joined projections, so names and rows are compared here. Raises ValueError."""
        ssm = self.config.ssm_cfg
        rows = 2 * ssm["d_inner"] + 2 * ssm["d_xb"]
        found = []

        def watched():
            for name, tensor in weights:
                found.append(name)
                if name.endswith("mixer.in_proj.weight") and len(tensor) != rows:
                    raise ValueError(f"{len(tensor)} rows, expected {rows}. (Are dt's among them? "
                                     f"nanoH1 loads that older form and saves it in this one.)")
                yield name, tensor
        try:
            loaded = super().load_weights(watched())
        except (AssertionError, RuntimeError, ValueError) as e:
            raise ValueError(f"{found[-1]}: {e}") from e
        found = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            found.discard("lm_head.weight")
        wanted = names_in_file(self)
        wrong = [f"missing {name}" for name in sorted(wanted - found)]
        wrong += [f"unexpected {name}" for name in sorted(found - wanted)]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors do not fit config.json: {', '.join(wrong[:5])}")
        return loaded


def names_in_file(model):
    """-> the names that the model's parameters have in the file, where joined projections are still apart."""
    names = set()
    for name, _ in model.named_parameters():
        module, _, last = name.rpartition(".")
        path, _, joined = module.rpartition(".")
        parts = model.packed_modules_mapping.get(joined, [joined])
        names |= {f"{path}.{part}.{last}".removeprefix(".") for part in parts}
    return names


def refuse_options(vllm_config):
    """Raise ValueError for an option of vLLM under which this model would compute something else."""
    cache = vllm_config.cache_config
    dtype = vllm_config.model_config.dtype
    refused = {
        "dtype float16, which overflows in the scan,": dtype == torch.float16,
        "cells that are not float32": cache.mamba_ssm_cache_dtype not in ("auto", "float32"),
        "mamba_cache_mode all": cache.mamba_cache_mode == "all",
        "quantisation": vllm_config.quant_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallel": vllm_config.parallel_config.pipeline_parallel_size > 1,
    }
    for name, wanted in refused.items():
        if wanted:
            raise ValueError(f"{name} is not implemented for hybrids")
