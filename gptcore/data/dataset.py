"""A dataset: a plan, its shards, and the batch of any step.

What you learn here: preparing text is a plan and some files. The plan is plain data that goes into run.json; with the
plan and the files the same batches come back at any time, on any number of processes.
Axes: T tokens a sequence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from .. import tokenizer as tokenizers
from . import order, shards
from .download import Download


class Document(NamedTuple):
    """One document held out for validation."""

    tokens: list[int]  # without end of text
    n_bytes: int  # of the original text in UTF-8: the base of bits per byte


@dataclass(frozen=True, eq=False)
class Dataset:
    """A plan and its shards. Made by prepare, and from a run's plan by reopen."""

    plan: dict  # plain JSON: all that reopen needs
    tokenizer: tokenizers.Tokenizer = field(repr=False)
    groups: list[list[order.Windows]] = field(repr=False)  # the training shards; order is new in each group and epoch
    held_out: list[shards.Shard] = field(repr=False)
    notes: tuple[str, ...] = ()  # what the user should be told, a line each
    download: Download | None = field(default=None, repr=False)  # what brings the shards of a stream
    openers: tuple[Callable[[], shards.Shard], ...] = field(default=(), repr=False)  # of the training shards

    @property
    def n_context(self) -> int:
        """Tokens a sequence; less than was asked for where there is too little text."""
        return self.plan["n_context"]

    @property
    def n_sequences(self) -> int:
        """Sequences an update."""
        return self.plan["n_sequences"]

    @property
    def n_train_tokens(self) -> int:
        """Tokens of an epoch."""
        return sum(row["n_tokens"] for group in self.plan["groups"] for row in group)

    @property
    def n_windows(self) -> int:
        """Sequences of an epoch."""
        return sum(windows.n for group in self.groups for windows in group)

    @property
    def downloads(self) -> tuple[Download, ...]:
        """What brings the shards of streams, none for text that is here."""
        return (self.download,) if self.download else ()

    def training_shards(self) -> Iterator[shards.Shard]:
        """The training text as far as it is here, in the plan's order. Raises ValueError at a shard that is not."""
        for opener in self.openers:
            yield opener()

    @cached_property
    def validation(self) -> tuple[Document, ...]:
        """The documents held out, always the same ones."""
        return tuple(Document(*each) for shard in self.held_out for each in shards.whole_documents(shard))

    @property
    def n_validation_tokens(self) -> int:
        """Tokens of the documents held out, end of text not counted."""
        return sum(len(document.tokens) for document in self.validation)

    def with_sequences(self, n_sequences) -> "Dataset":
        """The same data in updates of another size."""
        at_least("n_sequences", n_sequences, 1)
        return replace(self, plan=self.plan | {"n_sequences": n_sequences})

    def batch(self, step, *, rank=0, world=1):
        """The (tokens, targets) of one update, int64 (n_sequences, T) each, or the rank-th of world equal slices of it.

        A function of the step alone: sequences step * n_sequences on, numbered through all epochs. Targets that do not
        count are -100. Raises ValueError where the slices would not be equal.
        """
        if self.n_sequences % world:
            raise ValueError(f"n_sequences: expected a multiple of {world} processes, got {self.n_sequences}")
        size = self.n_sequences // world
        first = step * self.n_sequences + rank * size
        return self.sequences(range(first, first + size))

    def sequences(self, numbers):
        """The sequences with these numbers: (tokens, targets), int64 (len(numbers), T) each."""
        counts = [[windows.n for windows in group] for group in self.groups]
        found = order.arrange(numbers, [sum(group) for group in counts], self.plan["seed"])
        tokens = np.full((len(numbers), self.n_context), self.tokenizer.eot, np.int64)
        targets = np.full_like(tokens, order.IGNORE)
        for row, (group, window) in enumerate(zip(*(places.tolist() for places in found), strict=True)):
            shard = 0
            while window >= counts[group][shard]:
                window -= counts[group][shard]
                shard += 1
            inputs, wanted = self.groups[group][shard].read(window)
            tokens[row, : len(inputs)], targets[row, : len(wanted)] = inputs, wanted
        return torch.from_numpy(tokens), torch.from_numpy(targets)


def at_least(name, value, least) -> None:
    """Raise ValueError unless value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
