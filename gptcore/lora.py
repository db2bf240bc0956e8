"""LoRA: a large model learns through a small second tree laid over the first, which stays as it is.

What you learn here: what fine-tuning changes in a matrix has low rank, so the change is learned as a product of two
thin matrices, b a of rank R, beside the frozen w: x w^T + (x a^T) b^T. b begins as zeros, so the start is the model
itself. Afterwards w + b a is an ordinary matrix, and nothing need know.  Hu et al. 2021, arXiv:2106.09685.
"""

import math

import torch

from gptcore import tree
from gptcore.model import Leaf, param_spec

PARTS = ("q", "k", "v", "o")  # the matrices of every block's attention


def lora_spec(config, rank) -> dict[str, Leaf]:
    """Every leaf of the second tree by name: lora_a (R,in), drawn, and lora_b (out,R), zeros. Nothing decays."""
    if rank < 1:
        raise ValueError(f"lora: expected a rank of at least 1, got {rank}")
    spec, found = param_spec(config), {}
    for layer in range(config.n_layer):
        for part in PARTS:
            n_out, n_in = spec[f"blocks.{layer}.attn.{part}.w"].shape
            found[f"blocks.{layer}.attn.{part}.lora_a"] = Leaf((rank, n_in), std=math.sqrt(2 / n_in))
            found[f"blocks.{layer}.attn.{part}.lora_b"] = Leaf((n_out, rank))
    return found


def init_lora(config, rank, generator) -> dict:
    """A fresh second tree, float32, drawn on the CPU: laid over a model it changes nothing yet, bit for bit."""
    draw = lambda leaf: torch.randn(leaf.shape, generator=generator) * leaf.std if leaf.std else torch.zeros(leaf.shape)
    return tree.nest({name: draw(leaf) for name, leaf in lora_spec(config, rank).items()})


def trained_spec(params, config) -> dict[str, Leaf]:
    """The leaves of params that learn: those of the second tree where one is laid over, else all of them."""
    shapes = {name: leaf.shape for name, leaf in tree.walk(params) if name.endswith(".lora_a")}
    return lora_spec(config, next(iter(shapes.values()))[0]) if shapes else param_spec(config)


def second(params, config) -> dict:
    """The tree of the leaves that learn, which is all that a run of LoRA saves."""
    spec = trained_spec(params, config)
    return tree.nest({name: leaf for name, leaf in tree.walk(params) if name in spec})


@torch.no_grad()
def merge(params, lora) -> dict:
    """An ordinary tree: w + lora_b lora_a in place of each w that the second tree reaches, added in float32."""
    flat, change = dict(tree.walk(params)), dict(tree.walk(lora))
    for name, a in change.items():
        if name.endswith(".lora_a"):
            at = name.removesuffix("lora_a")
            w = flat[at + "w"]
            flat[at + "w"] = (w.float() + change[at + "lora_b"].float() @ a.float()).to(w.dtype)
    return tree.nest(flat)
