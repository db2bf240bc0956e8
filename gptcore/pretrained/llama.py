"""Llama, SmolLM, TinyLlama: RMSNorm, rotary positions that may be stretched, SwiGLU, shared keys and values."""

from gptcore.config import ModelConfig
from gptcore.pretrained.settings import MAX_CONTEXT, Settings, read_rope, write_rope
from gptcore.pretrained.table import SAME

MODEL_TYPE, CLASS = "llama", "LlamaForCausalLM"
PREFIX = ""

TABLE = (
    ("embed", "model.embed_tokens", SAME),
    ("blocks.*.norm_1", "model.layers.*.input_layernorm", SAME),
    ("blocks.*.attn.q", "model.layers.*.self_attn.q_proj", SAME),
    ("blocks.*.attn.k", "model.layers.*.self_attn.k_proj", SAME),
    ("blocks.*.attn.v", "model.layers.*.self_attn.v_proj", SAME),
    ("blocks.*.attn.o", "model.layers.*.self_attn.o_proj", SAME),
    ("blocks.*.norm_2", "model.layers.*.post_attention_layernorm", SAME),
    ("blocks.*.mlp.gate", "model.layers.*.mlp.gate_proj", SAME),
    ("blocks.*.mlp.up", "model.layers.*.mlp.up_proj", SAME),
    ("blocks.*.mlp.down", "model.layers.*.mlp.down_proj", SAME),
    ("norm_f", "model.norm", SAME),
    ("head", "lm_head", SAME),
)
BUFFERS = (r".*\.rotary_emb\.inv_freq",)


def config_from(settings: Settings) -> ModelConfig:
    """The model that a config.json of this type describes. Raises ValueError for what we do not have."""
    biased = settings.flag("mlp_bias", False)
    if settings.flag("attention_bias", False) != biased:
        raise ValueError("attention_bias: expected the value of mlp_bias, got the other one")
    settings.must_be("pretraining_tp", 1)
    return ModelConfig(bias="all" if biased else "none", **shape_from(settings, n_vocab=32000, d_ff=11008))


def shape_from(settings, *, n_vocab, d_ff) -> dict:
    """What this family has in common, as fields of ModelConfig."""
    settings.must_be("hidden_act", "silu")
    d_model, n_head = settings.count("hidden_size", 4096), settings.count("num_attention_heads", 32)
    return {
        "n_vocab": settings.count("vocab_size", n_vocab),
        "n_context": settings.count("max_position_embeddings", 2048, MAX_CONTEXT),
        "n_layer": settings.count("num_hidden_layers", 32),
        "d_model": d_model,
        "n_head": n_head,
        "n_kv_head": settings.count("num_key_value_heads", n_head),
        "d_head": settings.count("head_dim", d_model // n_head),
        "d_ff": settings.count("intermediate_size", d_ff),
        "norm": "rmsnorm",
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "tied": settings.flag("tie_word_embeddings", False),
        **read_rope(settings),
    }


def config_to(config: ModelConfig) -> dict:
    """Settings from which config_from makes this config, if it can be said in them."""
    biased = {"mlp_bias": True, "attention_bias": True} if config.bias == "all" else {}
    return shape_to(config) | biased


def shape_to(config) -> dict:
    """The inverse of shape_from."""
    return {
        "vocab_size": config.n_vocab,
        "max_position_embeddings": config.n_context,
        "num_hidden_layers": config.n_layer,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.d_head,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        **write_rope(config),
    }
