"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from gptcore.config import ModelConfig
from gptcore.pretrained import llama
from gptcore.pretrained.settings import Settings

MODEL_TYPE, CLASS = "qwen2", "Qwen2ForCausalLM"
PREFIX, TABLE, BUFFERS = llama.PREFIX, llama.TABLE, llama.BUFFERS


def config_from(settings: Settings) -> ModelConfig:
    """The model that a config.json of this type describes. Raises ValueError for what we do not have."""
    settings.must_be("use_sliding_window", False)
    return ModelConfig(bias="qkv", **llama.shape_from(settings, n_vocab=151936, d_ff=22016))


def config_to(config: ModelConfig) -> dict:
    """Settings from which config_from makes this config, if it can be said in them."""
    return llama.shape_to(config)
