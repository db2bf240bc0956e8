"""How much memory a model needs, before any of it is read: arithmetic on its config.

What you learn here: to generate, a machine holds the weights and a cache that grows with every token; to train all of
them with AdamW, sixteen bytes a weight; to train a small second tree over frozen weights, hardly more than generating.
Activations come on top of training. Sizes are decimal bytes.
"""

import math
from dataclasses import replace

from gptcore.model import param_spec


def n_weights(config) -> int:
    """How many numbers the weights are, padding rows included."""
    one = param_spec(replace(config, n_layer=1))  # a config from elsewhere may say a billion layers
    times = lambda name: config.n_layer if name.startswith("blocks.") else 1
    return sum(math.prod(leaf.shape) * times(name) for name, leaf in one.items())


def weight_bytes(config, width) -> int:
    """The weights in numbers of so many bytes."""
    return n_weights(config) * width


def cache_bytes(config, n_tokens, width) -> int:
    """Keys and values of so many tokens."""
    return 2 * config.n_layer * config.n_kv_head * config.d_head * n_tokens * width


def full_bytes(config) -> int:
    """AdamW on everything in float32: weights, gradients and two moments, before activations."""
    return 16 * n_weights(config)


def activation_bytes(config, n_tokens, *, recompute=False) -> int:
    """What a sequence of so many tokens keeps for the backward pass, in float32, roughly: 34 widths a token and block,
    with recomputation one a block and 34 for the one at work.  Korthikanti et al. 2022, arXiv:2205.05198."""
    widths = config.n_layer + 34 if recompute else 34 * config.n_layer
    return 4 * widths * config.d_model * n_tokens


def lora_weights(config, rank) -> int:
    """How many numbers a LoRA of that rank on q, k, v and o has."""
    q, kv = config.n_head * config.d_head, config.n_kv_head * config.d_head
    return config.n_layer * rank * (2 * (config.d_model + q) + 2 * (config.d_model + kv))


def lora_bytes(config, rank, width) -> int:
    """Frozen weights of `width` bytes, and AdamW in float32 on a LoRA of that rank, before activations."""
    return weight_bytes(config, width) + 16 * lora_weights(config, rank)
