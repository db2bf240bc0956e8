"""How two spellings of one model's weights are read in both directions.

What you learn here: between our names and somebody else's there is no code, only a table of (ours, theirs, how). `how`
is a pair of functions that are each other's inverse: one leaf of theirs becomes ours, one or several, and back. A row
stands for a matrix and its bias, and counts only where the model has them, so one table serves models that differ in
biases, norms and heads.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gptcore.model import param_spec

LARGEST = 2**56  # numbers in a tensor; torch counts their bytes in 63 bits


class How(NamedTuple):
    """split(theirs, n, config) -> n leaves of ours; join(ours, config) -> theirs, its inverse."""

    split: Callable[[Tensor, int, object], list[Tensor]]
    join: Callable[[list[Tensor], object], Tensor]


def _turned(leaf):
    return leaf.T if leaf.dim() == 2 else leaf


SAME = How(lambda leaf, n, config: [leaf], lambda leaves, config: leaves[0])
TRANSPOSED = How(lambda leaf, n, config: [_turned(leaf)], lambda leaves, config: _turned(leaves[0]))
PARTS = How(lambda leaf, n, config: leaf.chunk(n), lambda leaves, config: torch.cat(leaves))
PARTS_TRANSPOSED = How(  # (in, 3 out)
    lambda leaf, n, config: _turned(leaf).chunk(n), lambda leaves, config: _turned(torch.cat(leaves))
)
HEAD_PARTS = How(  # a head's queries, keys and values, then the next head's
    lambda leaf, n, config: [part.flatten(0, 1) for part in leaf.unflatten(0, (config.n_head, n, -1)).unbind(1)],
    lambda leaves, config: torch.stack([leaf.unflatten(0, (config.n_head, -1)) for leaf in leaves], 1).flatten(0, 2),
)


class Pair(NamedTuple):
    """One leaf of theirs, and the leaves of ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    how: How


def pairs(table, config) -> list[Pair]:
    """The table for one model: every leaf of theirs by name, every leaf of ours in exactly one pair.

    table holds rows (ours, theirs, how): "blocks.*.attn.{q,k,v}" are the leaves of one of theirs, * is the layer.
    """
    spec, found = param_spec(config), []
    for ours, theirs, how in table:
        layers = range(config.n_layer) if "*" in ours else (0,)
        for layer in layers:
            for our_kind, their_kind in (("w", "weight"), ("b", "bias")):
                names = tuple(f"{name}.{our_kind}" for name in _several(ours.replace("*", str(layer))))
                if names[0] in spec:
                    found.append(Pair(f"{theirs.replace('*', str(layer))}.{their_kind}", names, how))
    return found


def _several(name):
    before, _, rest = name.partition("{")
    middle, _, after = rest.partition("}")
    return [f"{before}{word}{after}" for word in middle.split(",")] if rest else [name]


def shape_of(pair, config) -> tuple[int, ...]:
    """The shape that their leaf has: join of ours, without numbers. ValueError for more than can be counted."""
    spec = param_spec(config)
    shapes = [spec[name].shape for name in pair.ours]
    if (largest := max(map(math.prod, shapes))) > LARGEST:
        raise ValueError(f"{pair.theirs}: expected at most {LARGEST:,} numbers, got a config of {largest:,}")
    return tuple(pair.how.join([torch.empty(shape, device="meta") for shape in shapes], config).shape)
