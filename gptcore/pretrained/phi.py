"""Phi-1, 1.5 and 2: one norm feeds attention and MLP, partial rotary positions, biases everywhere, the head's too."""

from gptcore.config import ModelConfig
from gptcore.pretrained.settings import ACTIVATIONS, MAX_CONTEXT, Settings, read_rope, write_rope
from gptcore.pretrained.table import SAME

MODEL_TYPE, CLASS = "phi", "PhiForCausalLM"
PREFIX = ""

TABLE = (
    ("embed", "model.embed_tokens", SAME),
    ("blocks.*.norm_1", "model.layers.*.input_layernorm", SAME),
    ("blocks.*.attn.q", "model.layers.*.self_attn.q_proj", SAME),
    ("blocks.*.attn.k", "model.layers.*.self_attn.k_proj", SAME),
    ("blocks.*.attn.v", "model.layers.*.self_attn.v_proj", SAME),
    ("blocks.*.attn.o", "model.layers.*.self_attn.dense", SAME),
    ("blocks.*.mlp.up", "model.layers.*.mlp.fc1", SAME),
    ("blocks.*.mlp.down", "model.layers.*.mlp.fc2", SAME),
    ("norm_f", "model.final_layernorm", SAME),
    ("head", "lm_head", SAME),
)
BUFFERS = (r".*\.rotary_emb\.inv_freq",)


def config_from(settings: Settings) -> ModelConfig:
    """The model that a config.json of this type describes. Raises ValueError for what we do not have."""
    settings.must_be("qk_layernorm", False)
    n_head = settings.count("num_attention_heads", 32)
    return ModelConfig(
        n_vocab=settings.count("vocab_size", 51200),
        n_context=settings.count("max_position_embeddings", 2048, MAX_CONTEXT),
        n_layer=settings.count("num_hidden_layers", 24),
        d_model=settings.count("hidden_size", 2048),
        n_head=n_head,
        n_kv_head=settings.count("num_key_value_heads", n_head),
        d_ff=settings.count("intermediate_size", 8192),
        norm_eps=settings.number("layer_norm_eps", 1e-5),
        mlp=settings.choice("hidden_act", "gelu_new", ACTIVATIONS),
        block="parallel_shared_norm",
        tied=settings.flag("tie_word_embeddings", False),
        head_bias=True,
        **read_rope(settings, fraction=0.5),
    )


def config_to(config: ModelConfig) -> dict:
    """Settings from which config_from makes this config, if it can be said in them."""
    return {
        "vocab_size": config.n_vocab,
        "max_position_embeddings": config.n_context,
        "num_hidden_layers": config.n_layer,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "intermediate_size": config.d_ff,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_new"}.get(config.mlp, "gelu"),
        "tie_word_embeddings": config.tied,
        **write_rope(config, partial=True),
    }
