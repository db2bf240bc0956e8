"""gptcore: a GPT you can read in an afternoon, train on the machine you have, run at its speed, and look inside."""

from gptcore.cache import KVCache, fork, init_cache, with_lengths
from gptcore.config import ARCHITECTURES, ModelConfig, architecture
from gptcore.device import generator, key, pick
from gptcore.generate import GenerateOptions, generate, text_pieces
from gptcore.model import (
    activation_spec,
    block,
    check_params,
    count_params,
    embed,
    forward,
    init_params,
    loss,
    nats,
    param_spec,
    run_blocks,
    unembed,
)
from gptcore.sampling import PRESETS, Sampling, sample

__all__ = [
    "ARCHITECTURES", "PRESETS", "GenerateOptions", "KVCache", "ModelConfig", "Sampling", "activation_spec",
    "architecture", "block", "check_params", "count_params", "embed", "fork", "forward", "generate", "generator",
    "init_cache", "init_params", "key", "loss", "nats", "param_spec", "pick", "run_blocks", "sample", "text_pieces",
    "unembed", "with_lengths",
]  # fmt: skip
