"""Which tokens step s reads: a function of s, so there is nothing to save and nothing to shuffle.

What you learn here: sequences are numbered through all epochs, and a keyed permutation sends each number to its place
in the text. Whoever knows the seed and the step knows the batch, on any number of processes, today or after a resume.
Axes: T tokens a sequence. numpy, because ids lie in memory maps.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..device import key

IGNORE = -100  # a target that does not count
N_BLOCK = 1_024  # documents that are packed together by bestfit


def permute(index, n, key):
    """Where a keyed permutation of range(n) sends each index, (N,) -> int64 (N,).

    Four Feistel rounds on an even number of bits, walked until inside: Black & Rogaway 2002, Ciphers with arbitrary
    finite domains.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x, outside = np.array(index, dtype=np.uint64), np.ones(len(index), bool)
    while outside.any():
        left, right = x >> half, x & mask
        for step in range(4):
            left, right = right, left ^ (mix(right + np.uint64((key + step * 0x9E3779B97F4A7C15) % 2**64)) & mask)
        x = np.where(outside, (left << half) | right, x)
        outside = x >= n
    return x.astype(np.int64)


def mix(x):
    """The finaliser of splitmix64 on uint64 arrays, wrapping (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def arrange(numbers, counts, seed):
    """Sequence numbers, running through all epochs, -> (group, window in the group), int64 (N,) each.

    counts: windows of each group. Groups come one after the other; inside one the order is new in every epoch.
    """
    edges = np.cumsum([0, *counts])
    epochs, windows = np.divmod(np.asarray(numbers, np.int64), edges[-1])
    groups = np.searchsorted(edges, windows, side="right") - 1
    windows = windows - edges[groups]
    for epoch, group in sorted({*zip(epochs.tolist(), groups.tolist(), strict=True)}):
        here = (epochs == epoch) & (groups == group)
        windows[here] = permute(windows[here], counts[group], key(seed, "order", epoch, group))
    return groups, windows


# --------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Windows:
    """A shard's sequences: how many, and the inputs and targets of each, at most T."""

    n: int
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]


def concat(shard, n_context, eot) -> Windows:
    """Documents joined with end of text between them, cut every T tokens.

    The last window slides back to be full, so every token but a shard's first is a target.
    """
    tokens, n = shard.tokens, len(shard.tokens)

    def read(window):
        start = max(0, min(window * n_context, n - 1 - n_context))
        part = tokens[start : start + n_context + 1]
        return part[:-1], part[1:]

    return Windows(-(-(n - 1) // n_context), read)


def bestfit(shard, n_context, eot) -> Windows:
    """Documents kept apart: each starts after an end of text and every token is a target exactly once.

    Documents longer than T are cut into pieces of T; the pieces go into rows of T, longest first, each where least room
    is left, inside blocks of 1,024 documents.
    """
    tokens, starts = shard.tokens, shard.starts.tolist()
    rows = []
    for block in range(0, len(starts) - 1, N_BLOCK):
        edges = starts[block : block + N_BLOCK + 1]
        pieces = [
            (at, min(at + n_context, end)) for start, end in pairwise(edges) for at in range(start, end, n_context)
        ]
        rows += _fit(pieces, n_context)

    def read(window):
        targets = np.concatenate([tokens[start:end] for start, end in rows[window]])
        inputs = np.concatenate([_before(tokens, start, end, eot) for start, end in rows[window]])
        return inputs, targets

    return Windows(len(rows), read)


def _before(tokens, start, end, eot):
    """The inputs of the targets start to end: each one's predecessor, for the first of all an end of text."""
    return tokens[start - 1 : end - 1] if start else np.concatenate([np.array([eot], tokens.dtype), tokens[: end - 1]])


def _fit(pieces, n_context):
    """Best fit, decreasing: rows of pieces (start, end) of at most n_context tokens each."""
    rows, room = [], []  # room: (tokens left, row), sorted
    for start, end in sorted(pieces, key=lambda piece: piece[0] - piece[1]):
        place = bisect_left(room, (end - start, -1))
        if place == len(room):
            rows.append([])
            left, row = n_context, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append((start, end))
        if left > end - start:
            insort(room, (left - (end - start), row))
    return rows


PACKINGS = {"concat": concat, "bestfit": bestfit}
