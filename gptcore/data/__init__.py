"""From text to batches: corpora -> shards -> order.

    dataset = prepare("notes/", "bpe:4096", n_context=256, n_sequences=64, seed=42, cache="data")
    tokens, targets = dataset.batch(0)

What you learn here: preparing text is a plan and some files. The plan is plain data that goes into run.json; with the
plan and the files the same batches come back at any time.
"""

import json
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import tokenizer as tokenizers
from ..files import only_writer, write_whole
from . import corpora, order, shards

N_TRAINING = 20_000_000  # bytes of text, the first ones of the training side, from which a BPE learns
MIN_CONTEXT = 16


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
        _at_least("n_sequences", n_sequences, 1)
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


def prepare(
    sources,
    tokenizer,
    *,
    n_context,
    n_sequences,
    seed,
    cache,
    text_field="text",
    packing="concat",
    tokens_per_epoch=None,
    stdin=None,
) -> Dataset:
    """Read text, tokenise it into shards under cache unless they are there, and plan the order of the batches.

    sources: what --data names, one or several; tokenizer: what --tokenizer names, or a Tokenizer. tokens_per_epoch caps
    the training tokens, and the validation tokens at a tenth of it. Documents are held out by their text; text with
    fewer than two sequences on a side holds out its last tenth instead, and if that is too little the context becomes
    the largest power of two, from 16 on, that gives two sequences on each side. Raises ValueError below that.
    """
    for name, value in {"n_context": n_context, "n_sequences": n_sequences}.items():
        _at_least(name, value, 1)
    if tokens_per_epoch is not None:
        _at_least("tokens_per_epoch", tokens_per_epoch, n_context + 2)
    if packing not in order.PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(order.PACKINGS)}, got {packing!r}")
    cache = Path(cache)
    corpus = corpora.open_corpus(sources, cache=cache, text_field=text_field, stdin=stdin)
    survey = _survey_(corpus, cache / corpus.name)
    notes, enough = list(corpus.notes), min(survey.at_most.values()) >= n_context + 2
    if enough:
        chosen, folder = _shards_(corpus, tokenizer, cache)
        enough = _fewest(cache / folder) >= n_context + 2
    cut = None if enough else list(shards.last_tenth(corpus.documents(), survey.n_characters))
    if not enough:
        chosen, folder = _shards_(corpus, tokenizer, cache, cut)
    asked, n_fewest = n_context, _fewest(cache / folder)
    if n_fewest < n_context + 2:
        n_context = 1 << max(0, n_fewest - 2).bit_length() >> 1
        if n_context < MIN_CONTEXT:
            counts = " and ".join(f"{_count(cache / folder, side)} {side}" for side in shards.SIDES)
            raise ValueError(f"data: expected two sequences of {MIN_CONTEXT} tokens on each side, got {counts} tokens")
        notes.append(f"too little text for a context of {asked} tokens: it is {n_context}")
    n_validation = None if tokens_per_epoch is None else max(tokens_per_epoch // 10, n_context + 2)
    plan = {
        "sources": list(corpus.sources),
        "text_field": text_field,
        "text_sha256": survey.text_sha256,
        "cut": cut,
        "about": _about(corpus),
        "tokenizer": {"name": chosen.name, "fingerprint": chosen.fingerprint},
        "folder": folder.as_posix(),
        "n_context": n_context,
        "n_sequences": n_sequences,
        "seed": seed,
        "packing": packing,
        "groups": [shards.first_tokens(cache / folder, shards.rows(cache / folder, "train"), tokens_per_epoch)],
        "validation": shards.first_tokens(cache / folder, shards.rows(cache / folder, "val"), n_validation, whole=True),
    }
    return _open(plan, chosen, cache, tuple(notes))


def reopen(plan, tokenizer, *, cache) -> Dataset:
    """The dataset of a run's plan, its shards verified by sha256.

    Shards that are missing or damaged are written again if the source still holds the same text. Raises ValueError
    naming the shard if it does not, or if the tokenizer is another one.
    """
    wanted = plan["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != wanted:
        raise ValueError(f"tokenizer {tokenizer.name}: expected fingerprint {wanted}, got {tokenizer.fingerprint}")
    folder = Path(cache) / plan["folder"]
    planned = [row for rows in (*plan["groups"], plan["validation"]) for row in rows]
    if faults := shards.broken(folder, planned):
        try:
            corpus = corpora.open_corpus(plan["sources"], cache=cache, text_field=plan["text_field"])
            got = shards.survey(corpus.documents()).text_sha256
        except ValueError as error:
            raise ValueError(f"{faults[0]}; and its source cannot be read: {error}") from error
        if got != plan["text_sha256"]:
            raise ValueError(f"{faults[0]}; and its source has changed")
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            if shards.broken(folder, planned):
                shards.write_(folder, corpus.documents(), tokenizer, plan["about"], plan["cut"])
        if faults := shards.broken(folder, planned):
            raise ValueError(f"{faults[0]}, although the source has not changed")
    return _open(plan, tokenizer, cache)


def prefetch(batch, start, stop, *, n_ahead=2):
    """Yield batch(start) to batch(stop - 1) in order, made by one thread while the last one is used.

    Closing the generator ends the thread; an error in batch is raised where its step is due.
    """
    steps = iter(range(start, stop))
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting = deque(thread.submit(batch, step) for step in islice(steps, n_ahead))
        while waiting:
            ready = waiting.popleft().result()
            waiting.extend(thread.submit(batch, step) for step in islice(steps, 1))
            yield ready


def _at_least(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _about(corpus):
    words = ("name", "source", "revision", "licence")
    return {"corpus" if word == "name" else word: getattr(corpus, word) for word in words}


def _survey_(corpus, folder):
    """The survey of the corpus, kept in its folder: while the files stay as they are, they are not read again."""
    path = folder / "survey.json"
    if not path.is_file():
        survey = shards.survey(corpus.documents())  # first: text that cannot be read leaves no folder
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(survey._asdict()))
    return shards.Survey(**json.loads(path.read_text(encoding="utf-8")))


def _shards_(corpus, tokenizer, cache, cut=None):
    """(the tokenizer, trained if it is to be, the folder of the shards relative to cache)."""
    end = "" if cut is None else "-tail"
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer_(corpus, tokenizer, cache / corpus.name, end, cut)
    folder = Path(corpus.name) / f"{tokenizer.fingerprint[:8]}{end}"
    shards.ensure_(cache / folder, corpus.documents, tokenizer, _about(corpus), cut)
    return tokenizer, folder


def _tokenizer_(corpus, name, folder, end, cut):
    """The named tokenizer; one that is trained on this corpus is kept beside its shards."""
    if not name.startswith("bpe:"):
        return tokenizers.named(name)
    path = folder / f"{name.replace(':', '-')}{end}.json"
    if not path.is_file():
        trained = tokenizers.named(name, _training_texts(corpus, cut))
        folder.mkdir(parents=True, exist_ok=True)
        trained.save(path)
    return tokenizers.load(path)


def _training_texts(corpus, cut):
    left = N_TRAINING
    for side, text in shards.split(corpus.documents(), cut):
        if side == "train":
            yield text
            left -= len(text.encode("utf-8", "replace"))
        if left <= 0:
            return


def _count(folder, side):
    return sum(row["n_tokens"] for row in shards.rows(folder, side))


def _fewest(folder):
    return min(_count(folder, side) for side in shards.SIDES)


def _open(plan, tokenizer, cache, notes=()):
    folder, pack = Path(cache) / plan["folder"], order.PACKINGS[plan["packing"]]
    groups = [
        [pack(shards.open_shard(folder, row), plan["n_context"], tokenizer.eot) for row in group]
        for group in plan["groups"]
    ]
    return Dataset(plan, tokenizer, groups, [shards.open_shard(folder, row) for row in plan["validation"]], notes)
