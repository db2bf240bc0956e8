"""Several datasets as one, each with its share of the sequences.

What you learn here: a share is kept without drawing lots. Sequences come in blocks of a thousand; in each block every
dataset has its fixed number of places, and a keyed permutation says where. So the shares are exact, the n-th sequence
is a function of n, and each dataset is read through its own epochs in its own order.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from ..device import key
from .dataset import Dataset
from .order import permute

N_BLOCK = 1_000  # sequences in which the shares are exact: a share is a thousandth at least


@dataclass(frozen=True, eq=False)
class Mixture(Dataset):
    """A Dataset whose sequences come from its members."""

    members: tuple[Dataset, ...] = field(default=(), repr=False)

    @property
    def n_train_tokens(self) -> int:
        """Training tokens of all members."""
        return sum(member.n_train_tokens for member in self.members)

    @property
    def n_windows(self) -> int:
        """Sequences of an epoch: as many as all members have, though their shares are others."""
        return sum(member.n_windows for member in self.members)

    @property
    def downloads(self):
        """What brings the shards of the members that are streams."""
        return tuple(download for member in self.members for download in member.downloads)

    def training_shards(self):
        """The training text of one member after the other."""
        for member in self.members:
            yield from member.training_shards()

    @cached_property
    def validation(self):
        """What every member holds out."""
        return tuple(document for member in self.members for document in member.validation)

    def with_sequences(self, n_sequences) -> "Mixture":
        """The same data in updates of another size."""
        changed = super().with_sequences(n_sequences)
        return replace(changed, members=tuple(member.with_sequences(n_sequences) for member in self.members))

    def sequences(self, numbers):
        """The sequences with these numbers: (tokens, targets), int64 (len(numbers), T) each."""
        tokens = torch.empty(len(numbers), self.n_context, dtype=torch.int64)
        targets = torch.empty_like(tokens)
        owners, places = share_out(np.asarray(numbers, np.int64), self.plan["counts"], self.plan["seed"])
        for index, member in enumerate(self.members):
            rows = np.flatnonzero(owners == index)
            if len(rows):
                tokens[rows], targets[rows] = member.sequences(places[rows])
        return tokens, targets


def share_out(numbers, counts, seed):
    """Sequence numbers of the mixture -> (member, number among that member's sequences), int64 (N,) each.

    counts: the places of each member in a block; together N_BLOCK.
    """
    edges = np.cumsum([0, *counts])
    blocks, places = np.divmod(numbers, N_BLOCK)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        places[here] = permute(places[here], N_BLOCK, key(seed, "mix", block))
    owners = np.searchsorted(edges, places, side="right") - 1
    return owners, blocks * np.asarray(counts)[owners] + places - edges[owners]


def shares(weights) -> list[int]:
    """Weights -> places in a block, by largest remainder. Raises ValueError for weights that are no shares."""
    weights = np.asarray(weights, float)
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(f"mix: expected positive weights, got {', '.join(map(str, weights))}")
    exact = weights / weights.sum() * N_BLOCK
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: N_BLOCK - counts.sum()]] += 1
    if (counts == 0).any():
        raise ValueError(f"mix: expected shares of at least 1/{N_BLOCK}, got {', '.join(map(str, weights))}")
    return counts.tolist()


def mix(members, weights) -> Mixture:
    """Members with one tokenizer, context, update size and seed, as one dataset."""
    first = members[0]
    about = {word: " + ".join(member.plan["about"][word] or "-" for member in members) for word in first.plan["about"]}
    plan = {word: first.plan[word] for word in ("tokenizer", "n_context", "n_sequences", "seed", "packing")}
    plan |= {
        "about": about,
        "folder": ", ".join(member.plan["folder"] for member in members),
        "counts": shares(weights),
        "members": [member.plan for member in members],
    }
    notes = tuple(note for member in members for note in member.notes)
    return Mixture(plan, first.tokenizer, [], [], notes, members=tuple(members))
