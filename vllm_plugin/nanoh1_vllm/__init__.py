"""
Serve nanoH1's checkpoints with vLLM: pip install ./vllm_plugin, then vllm serve DIR.

A directory that holds nothing but attention is served by vLLM as it is: it is a Mistral, Llama or Qwen. A hybrid needs
two things that vLLM lacks: how to read its config.json (this file) and its model (model.py beside it). vLLM finds both
through the entry point in pyproject.toml: it calls register() in each of its processes.

A setting that is passed over gives a model that is nearly right, and nobody would notice. So all that nanoH1's own
reader refuses is refused here too, and what vLLM's attention would understand in another way. Two model types:

      apriel_hybrid_ssm     the format of Apriel-H1: attention as Mistral has it
      nanoh1_hybrid         the same with qkv_bias and qk_norm (true or false) and rope_scaling (null or Llama 3's)
"""
import math

from transformers import AutoConfig, MistralConfig

# vLLM's insides move from release to release. This is the one that the tests have seen.
TESTED = "0.32."

# Layer kinds of hybrid_block_layout -> what vLLM calls them. "n" (MLP alone) and "i" (nothing) have no cache.
KINDS = {"t": "attention", "m2": "mamba", "n": "mlp", "i": "identity"}

# ssm_cfg: key -> default. None: it follows from the sizes of the model.
SSM = {
    "d_state": 64,
    "d_inner": 4096,
    "d_xb": None,
    "dt_rank": "auto",
    "d_conv": 4,
    "expand": 1,
    "repeat_kv_before_conv": True,
    "conv_bias": True,
    "dt_proj_bias": True,
    "bias": False,
}

# Further keys of ssm_cfg: how a new layer starts, and settings of mixers that are not here. m2 is always SiLU.
SSM_IGNORED = ("dt_min", "dt_max", "dt_scale", "dt_init_floor", "dt_init", "activation",
               "n_v_heads", "n_qk_heads", "chunk_size")

# Settings that are read only to refuse them: key -> the values that change nothing, as an absent key does.
NEUTRAL = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "original_max_position_embeddings": (None,),
    "rope_interleaved": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "logit_scale": (1.0, None),
    "use_qk_norm": (False, None),
    "clip_qkv": (None,),
    "scale_emb": (1.0, None),
    "scale_depth": (None,),
    "no_rope_layers": (None,),
}

# The keys of rope_scaling and rope_parameters that are understood, and those of Llama 3's rule.
ROPE = {"rope_theta", "rope_type", "type", "factor", "partial_rotary_factor"}
LLAMA3 = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


class AprielHybridConfig(MistralConfig):
    """config.json of a hybrid: Mistral's keys, the layout, and the sizes of its Mamba layers. Raises ValueError for
    what is missing, or would change the result and is not implemented."""
    model_type = "apriel_hybrid_ssm"

    # transformers builds one without arguments as well, to compare with.
    def __init__(self, hybrid_block_layout=("t",), ssm_cfg=None, base_model_type="mistral",
                 qkv_bias=False, qk_norm=False, **raw):
        refuse_settings(raw)
        # Fast-LLM writes it with names that transformers refuses. The layout says it all.
        raw.pop("layer_types", None)
        if base_model_type != "mistral":
            require(raw, ("num_key_value_heads", "head_dim", "eos_token_id"))
        if self.model_type != "nanoh1_hybrid" and (qkv_bias or qk_norm):
            raise ValueError(f"qkv_bias and qk_norm do not belong to {self.model_type}")
        raw["hidden_act"] = "silu"
        super().__init__(**raw)
        self.hybrid_block_layout = list(hybrid_block_layout)
        self.ssm_cfg = fill_ssm(ssm_cfg, self.hidden_size)
        self.base_model_type = base_model_type
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        check_layout(self.hybrid_block_layout)
        # Without a Mamba layer vLLM must not take the model for a hybrid: this tells it so.
        if "m2" not in self.hybrid_block_layout:
            self.layer_types = ["full_attention"] * self.num_hidden_layers

    @property
    def layers_block_type(self):
        """By this name vLLM asks a hybrid what its layers are."""
        return [KINDS[kind] for kind in self.hybrid_block_layout]


class NanoH1HybridConfig(AprielHybridConfig):
    """The same with what Llama 3's and Qwen's attention have beyond Mistral's. None of its keys is optional."""
    model_type = "nanoh1_hybrid"

    def __init__(self, **raw):
        if raw:
            require(raw, ("base_model_type", "qkv_bias", "qk_norm", "rope_scaling",
                          "num_key_value_heads", "head_dim"))
        super().__init__(**raw)


def check_layout(layout):
    """Raise ValueError for layers that are unknown, or that vLLM cannot serve."""
    for kind in layout:
        if kind not in KINDS:
            raise ValueError(f"unsupported layer type {kind}; known: {', '.join(KINDS)}")
    if not set(layout) & {"t", "m2"}:
        raise ValueError("vLLM serves no model without a layer that remembers (t or m2)")


def require(raw, keys):
    for key in keys:
        if key not in raw:
            raise ValueError(f"config.json: the key {key!r} is missing")


def refuse_settings(raw):
    """raw: the keys of config.json that are not the hybrid's own. Raises ValueError."""
    for key, values in NEUTRAL.items():
        if key in raw and raw[key] not in values:
            refuse(key, raw[key])
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        kind = rope.get("rope_type", rope.get("type"))
        known = ROPE | LLAMA3 if kind == "llama3" else ROPE
        stretched = kind not in ("default", "linear", None) or rope.get("factor") not in (1.0, None)
        if stretched and kind != "llama3":
            refuse(name, rope)
        if set(rope) - known or rope.get("partial_rotary_factor") not in (1.0, None):
            refuse(name, rope)


def refuse(key, value):
    raise ValueError(f"config.json: {key} = {value!r} changes the result and is not implemented")


def fill_ssm(given, hidden_size):
    """ssm_cfg, or None -> the same with every key of SSM as a number or a bool. Raises ValueError."""
    given = given or {}
    unknown = sorted(set(given) - set(SSM) - set(SSM_IGNORED))
    if unknown:
        raise ValueError(f"config.json: ssm_cfg.{unknown[0]} is not known to this reader")
    ssm = SSM | {key: value for key, value in given.items() if key in SSM}
    if ssm["d_inner"] is None:
        ssm["d_inner"] = hidden_size * ssm["expand"]
    if ssm["d_xb"] is None:
        ssm["d_xb"] = hidden_size
    if ssm["dt_rank"] in ("auto", None):
        ssm["dt_rank"] = math.ceil(hidden_size / 16)
    return ssm


def register():
    """Called by vLLM in each of its processes, perhaps more than once. The model is named by a string, so that the
    processes that never build one do not import it."""
    import vllm
    from vllm import ModelRegistry
    if not vllm.__version__.startswith(TESTED):
        raise ImportError(f"nanoh1-vllm was written for vLLM {TESTED}x, this is {vllm.__version__}")
    for config in (AprielHybridConfig, NanoH1HybridConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for architecture in ("AprielHybridSSMForCausalLM", "NanoH1HybridForCausalLM"):
        ModelRegistry.register_model(architecture, "nanoh1_vllm.model:HybridForCausalLM")
