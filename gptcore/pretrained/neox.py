"""GPT-NeoX and Pythia: partial rotary positions, two norms read at once, a head's q, k and v beside each other."""

from gptcore.config import ModelConfig
from gptcore.pretrained.settings import ACTIVATIONS, MAX_CONTEXT, Settings, read_rope, write_rope
from gptcore.pretrained.table import HEAD_PARTS, SAME

MODEL_TYPE, CLASS = "gpt_neox", "GPTNeoXForCausalLM"
PREFIX = ""

TABLE = (
    ("embed", "gpt_neox.embed_in", SAME),
    ("blocks.*.norm_1", "gpt_neox.layers.*.input_layernorm", SAME),
    ("blocks.*.attn.{q,k,v}", "gpt_neox.layers.*.attention.query_key_value", HEAD_PARTS),
    ("blocks.*.attn.o", "gpt_neox.layers.*.attention.dense", SAME),
    ("blocks.*.norm_2", "gpt_neox.layers.*.post_attention_layernorm", SAME),
    ("blocks.*.mlp.up", "gpt_neox.layers.*.mlp.dense_h_to_4h", SAME),
    ("blocks.*.mlp.down", "gpt_neox.layers.*.mlp.dense_4h_to_h", SAME),
    ("norm_f", "gpt_neox.final_layer_norm", SAME),
    ("head", "embed_out", SAME),
)
RENAMED = {"lm_head.weight": "embed_out.weight"}  # transformers 5 writes the first, and reads both
BUFFERS = (r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq")


def config_from(settings: Settings) -> ModelConfig:
    """The model that a config.json of this type describes. Raises ValueError for what we do not have."""
    settings.must_be("attention_bias", True)
    return ModelConfig(
        n_vocab=settings.count("vocab_size", 50432),
        n_context=settings.count("max_position_embeddings", 2048, MAX_CONTEXT),
        n_layer=settings.count("num_hidden_layers", 44),
        d_model=settings.count("hidden_size", 6144),
        n_head=settings.count("num_attention_heads", 64),
        d_ff=settings.count("intermediate_size", 24576),
        norm_eps=settings.number("layer_norm_eps", 1e-5),
        mlp=settings.choice("hidden_act", "gelu", ACTIVATIONS),
        block="parallel" if settings.flag("use_parallel_residual", True) else "sequential",
        tied=settings.flag("tie_word_embeddings", False),
        **read_rope(settings, base_name="rotary_emb_base", fraction_name="rotary_pct", fraction=0.25),
    )


def config_to(config: ModelConfig) -> dict:
    """Settings from which config_from makes this config, if it can be said in them."""
    return {
        "vocab_size": config.n_vocab,
        "max_position_embeddings": config.n_context,
        "num_hidden_layers": config.n_layer,
        "hidden_size": config.d_model,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.d_ff,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_new"}.get(config.mlp, "gelu"),
        "use_parallel_residual": config.block != "sequential",
        "tie_word_embeddings": config.tied,
        "rotary_emb_base": config.rope_base,
        "rotary_pct": config.rope_fraction,
        **write_rope(config, partial=True),
    }
