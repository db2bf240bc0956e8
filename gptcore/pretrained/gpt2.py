"""GPT-2: learned positions, tied head, matrices stored (in, out), queries, keys and values in one of them."""

from gptcore.config import ModelConfig
from gptcore.pretrained.settings import ACTIVATIONS, MAX_CONTEXT, Settings, common_words
from gptcore.pretrained.table import PARTS_TRANSPOSED, SAME, TRANSPOSED

MODEL_TYPE, CLASS = "gpt2", "GPT2LMHeadModel"
PREFIX = "transformer."  # the hub's own files are without it

TABLE = (
    ("embed", "transformer.wte", SAME),
    ("positions", "transformer.wpe", SAME),
    ("blocks.*.norm_1", "transformer.h.*.ln_1", SAME),
    ("blocks.*.attn.{q,k,v}", "transformer.h.*.attn.c_attn", PARTS_TRANSPOSED),
    ("blocks.*.attn.o", "transformer.h.*.attn.c_proj", TRANSPOSED),
    ("blocks.*.norm_2", "transformer.h.*.ln_2", SAME),
    ("blocks.*.mlp.up", "transformer.h.*.mlp.c_fc", TRANSPOSED),
    ("blocks.*.mlp.down", "transformer.h.*.mlp.c_proj", TRANSPOSED),
    ("norm_f", "transformer.ln_f", SAME),
    ("head", "lm_head", SAME),
)
BUFFERS = (r".*\.attn\.(masked_)?bias",)  # the causal mask, as tensors
WORDS = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip


def config_from(settings: Settings) -> ModelConfig:
    """The model that a config.json of this type describes. Raises ValueError for what we do not have."""
    settings = common_words(settings, WORDS)
    for name, only in (
        ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False),
    ):  # fmt: skip
        settings.must_be(name, only)
    d_model = settings.count("n_embd", 768)
    return ModelConfig(
        n_vocab=settings.count("vocab_size", 50257),
        n_context=settings.count("n_positions", 1024, MAX_CONTEXT),
        n_layer=settings.count("n_layer", 12),
        d_model=d_model,
        n_head=settings.count("n_head", 12),
        d_ff=settings.count("n_inner", 4 * d_model),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        mlp=settings.choice("activation_function", "gelu_new", ACTIVATIONS),
        tied=settings.flag("tie_word_embeddings", True),
    )


def config_to(config: ModelConfig) -> dict:
    """Settings from which config_from makes this config, if it can be said in them."""
    return {
        "vocab_size": config.n_vocab,
        "n_positions": config.n_context,
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.d_ff,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}.get(config.mlp, "gelu"),
        "tie_word_embeddings": config.tied,
    }
