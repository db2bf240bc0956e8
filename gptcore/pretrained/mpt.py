"""MPT: ALiBi instead of positions, no bias anywhere, tied head."""

from gptcore.config import ModelConfig
from gptcore.pretrained.settings import MAX_CONTEXT, Settings, common_words
from gptcore.pretrained.table import PARTS, SAME

MODEL_TYPE, CLASS = "mpt", "MptForCausalLM"
PREFIX = ""

TABLE = (
    ("embed", "transformer.wte", SAME),
    ("blocks.*.norm_1", "transformer.blocks.*.norm_1", SAME),
    ("blocks.*.attn.{q,k,v}", "transformer.blocks.*.attn.Wqkv", PARTS),
    ("blocks.*.attn.o", "transformer.blocks.*.attn.out_proj", SAME),
    ("blocks.*.norm_2", "transformer.blocks.*.norm_2", SAME),
    ("blocks.*.mlp.up", "transformer.blocks.*.ffn.up_proj", SAME),
    ("blocks.*.mlp.down", "transformer.blocks.*.ffn.down_proj", SAME),
    ("norm_f", "transformer.norm_f", SAME),
)
BUFFERS = ()
WORDS = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}


def config_from(settings: Settings) -> ModelConfig:
    """The model that a config.json of this type describes. Raises ValueError for what we do not have."""
    settings = common_words(settings, WORDS)
    attention = settings.part("attn_config")
    for part, name, only in (
        (settings, "no_bias", True), (settings, "tie_word_embeddings", True), (settings, "logit_scale", None),
        (settings, "embedding_fraction", 1.0), (settings, "expansion_ratio", 4),  # the class knows no other
        (attention, "attn_type", "multihead_attention"),
        (attention, "alibi", True), (attention, "alibi_bias_max", 8), (attention, "clip_qkv", None),
        (attention, "qk_ln", False), (attention, "prefix_lm", False), (attention, "softmax_scale", None),
    ):  # fmt: skip
        part.must_be(name, only)
    d_model, n_head = settings.count("d_model", 2048), settings.count("n_heads", 16)
    if n_head & (n_head - 1):  # its slopes for other numbers are in another order than the published ones
        raise ValueError(f"n_heads: expected a power of two, got {n_head}")
    return ModelConfig(
        n_vocab=settings.count("vocab_size", 50368),
        n_context=settings.count("max_seq_len", 2048, MAX_CONTEXT),
        n_layer=settings.count("n_layers", 24),
        d_model=d_model,
        n_head=n_head,
        d_ff=4 * d_model,
        position="alibi",
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        bias="none",
    )


def config_to(config: ModelConfig) -> dict:
    """Settings from which config_from makes this config, if it can be said in them."""
    return {
        "vocab_size": config.n_vocab,
        "max_seq_len": config.n_context,
        "n_layers": config.n_layer,
        "d_model": config.d_model,
        "n_heads": config.n_head,
        "expansion_ratio": 4,
        "layer_norm_epsilon": config.norm_eps,
        "no_bias": True,
        "tie_word_embeddings": True,
        "attn_config": {"alibi": True, "attn_type": "multihead_attention"},
    }
