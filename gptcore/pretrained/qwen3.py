"""Qwen3: Llama with an RMSNorm over each query and key, and heads of a width of their own."""

from gptcore.config import ModelConfig
from gptcore.pretrained import llama
from gptcore.pretrained.settings import Settings
from gptcore.pretrained.table import SAME

MODEL_TYPE, CLASS = "qwen3", "Qwen3ForCausalLM"
PREFIX, BUFFERS = llama.PREFIX, llama.BUFFERS

TABLE = (
    *llama.TABLE,
    ("blocks.*.attn.q_norm", "model.layers.*.self_attn.q_norm", SAME),
    ("blocks.*.attn.k_norm", "model.layers.*.self_attn.k_norm", SAME),
)


def config_from(settings: Settings) -> ModelConfig:
    """The model that a config.json of this type describes. Raises ValueError for what we do not have."""
    for name in ("use_sliding_window", "attention_bias"):
        settings.must_be(name, False)
    given = Settings({"head_dim": 128} | settings.given)
    return ModelConfig(bias="none", qk_norm=True, **llama.shape_from(given, n_vocab=151936, d_ff=22016))


def config_to(config: ModelConfig) -> dict:
    """Settings from which config_from makes this config, if it can be said in them."""
    return llama.shape_to(config)
