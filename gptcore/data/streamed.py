"""A dataset from a stream: planned before it is there, trained from while it arrives.

What you learn here: the plan of a stream says how many tokens of which shard are read in which order, before any of
them has come. So it does not depend on how fast the network is, and a batch whose shard is late is waited for, never
replaced. A group is a shard: training begins with the first, and a later epoch reads files that are all here.
"""

import os
import re
from collections import deque
from pathlib import Path

import numpy as np

from .. import tokenizer as tokenizers
from . import order, shards, streams
from .budget import Entry, entries, touch
from .dataset import Dataset, at_least
from .download import PATIENCE, PAUSES, Download, hub_reachable, is_offline
from .fetch import COMMIT, Order, check_revision, folder_of, missing, trained_path

N_OPEN = 2  # shards that are mapped into memory at a time: an update may be between two
OWN_SIZE = "GPTCORE_SHARD_TOKENS"  # an environment variable: tokens of a stream's shard, for tests and slow networks


def shard_size() -> int:
    """Training tokens of a stream's shard."""
    text = os.environ.get(OWN_SIZE, str(shards.N_SHARD))
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise ValueError(f"{OWN_SIZE}: expected a whole number of at least 2, got {text!r}")
    return int(text)


def prepare_stream(
    source, tokenizer, *, n_context, n_sequences, seed, cache, tokens_per_epoch, text_field="text", packing="concat",
    budget=None, keep=(), watch=lambda progress: None,
) -> Dataset:  # fmt: skip
    """The dataset of the first tokens_per_epoch tokens of a stream; its first shard is there, others may follow.

    tokenizer, n_context, n_sequences, seed, cache, packing: as prepare takes them. budget: bytes that the cache may
    hold, None for any number; keep: shards that other plans need. watch(Progress) is called while the first shard is
    waited for. Raises ValueError where the plan is larger than the budget, the hub is not within reach and not enough
    is in the cache, or the stream holds too little text.
    """
    at_least("tokens_per_epoch", tokens_per_epoch, n_context + 2)
    stream, n_shard, cache = streams.open_stream(source, text_field), shard_size(), Path(cache)
    download, path, chosen = _download_(source, stream, tokenizer, tokens_per_epoch, cache, text_field, budget, keep)
    download.watch = watch
    n_late = _begin(download, stream)
    if not chosen:
        download.wait(path.is_file)
        chosen = tokenizers.load(path)
        _check_budget(chosen, tokens_per_epoch, budget, cache)
        download.folder = cache / folder_of(stream, chosen, n_shard)
    folder = download.folder
    download.wait_for_chunk(0)
    chunks = shards.read_chunks(folder)
    if re.fullmatch(COMMIT, stream.revision or ""):  # a branch was resolved when its first shard was fetched
        check_revision(folder, chunks, stream.revision)
    held_out = chunks["own"].get("val") or [row for side, row in chunks["rows"][0]["shards"].items() if side == "val"]
    n_train = [_n_train(row) for row in chunks["rows"]]
    sides = n_train[0], sum(row["n_tokens"] for row in held_out)
    if min(sides) < n_context + 2:
        got = "{:,} to train on and {:,} held out".format(*sides)
        raise ValueError(f"data: expected two sequences of {n_context} tokens on each side of {stream.name}, got {got}")
    if chunks["rows"][-1]["last"]:  # then it is known how much there is
        tokens_per_epoch = min(tokens_per_epoch, sum(min(n_shard, n) for n in n_train))
    plan = {
        "sources": [str(source)],
        "text_field": text_field,
        "stream": {"n_shard": n_shard, "revision": chunks["about"]["revision"]},
        "about": {word: chunks["about"][word] for word in ("corpus", "source", "revision", "licence")},
        "tokenizer": {"name": chosen.name, "fingerprint": chosen.fingerprint},
        "folder": folder.relative_to(cache).as_posix(),
        "n_context": n_context,
        "n_sequences": n_sequences,
        "seed": seed,
        "packing": packing,
        "groups": [[row] for row in _rows(tokens_per_epoch, n_shard)],
        "validation": shards.first_tokens(folder, held_out, max(tokens_per_epoch // 10, n_context + 2), whole=True),
    }
    late = f"{stream.name}: {n_late} of {download.order.n_chunks} shards arrive while it trains"
    notes = (late,) if n_late else ()
    dataset = open_plan(plan, chosen, cache, download, notes)
    if packing != "concat":
        for (row,), (windows,) in zip(plan["groups"], dataset.groups, strict=True):
            row["n_windows"] = windows.n
    return dataset


def reopen_stream(
    plan, tokenizer, *, cache, fetch=True, budget=None, keep=(), watch=lambda progress: None, patience=PATIENCE,
    pauses=PAUSES,
) -> Dataset:  # fmt: skip
    """The dataset of a stream's plan. Shards that are missing or damaged are fetched again when they are read.

    budget, keep, watch: as prepare takes them; patience, pauses: seconds, as Download takes them.
    Raises ValueError where what is held out is missing and not to be fetched, or the hub is not within reach.
    """
    cache, folder, source = Path(cache), Path(cache) / plan["folder"], plan["sources"][0]
    stream = streams.open_stream(source, plan["text_field"])
    check_revision(folder, shards.read_chunks(folder), plan["stream"]["revision"])
    _, path = _tokenizer_(tokenizer, cache, stream)
    asked = Order(
        source=source, text_field=plan["text_field"], tokenizer=str(path), name=plan["tokenizer"]["name"],
        cache=str(cache), n_chunks=len(plan["groups"]), n_shard=plan["stream"]["n_shard"], budget=budget,
        revision=plan["stream"]["revision"], keep=tuple(keep),
    )  # fmt: skip
    ways = {"patience": patience, "pauses": pauses}
    download = Download(asked, folder, **ways)
    download.watch = watch
    if faults := shards.broken(folder, plan["validation"]):
        if not fetch:
            raise ValueError(faults[0])
        first = Download(asked._replace(n_chunks=1), folder, **ways)  # holds it; the others are for whoever trains
        first.watch = watch
        try:
            _begin(first, stream)
            first.wait_for_end()
        finally:
            first.close()
        if faults := shards.broken(folder, plan["validation"]):
            raise ValueError(f"{faults[0]}, fetched again: {source} has changed since the run was planned")
    return open_plan(plan, tokenizer, cache, download)


def open_plan(plan, tokenizer, cache, download, notes=()) -> Dataset:
    """The dataset of a plan whose training shards may come later."""
    folder, pack = Path(cache) / plan["folder"], order.PACKINGS[plan["packing"]]
    opened = deque()
    parts = [Part(download, folder, number, row, pack, plan["n_context"], tokenizer.eot, opened)
             for number, (row,) in enumerate(plan["groups"])]  # fmt: skip
    if plan["packing"] == "concat":  # as many sequences as the tokens say, whatever they are
        counts = [-(-(part.row["n_tokens"] - 1) // plan["n_context"]) for part in parts]
    else:  # the documents decide, so a new plan waits for all of them, and keeps the counts
        counts = [part.row.get("n_windows") or part.windows().n for part in parts]
    windows = [[order.Windows(n, part.read)] for n, part in zip(counts, parts, strict=True)]
    held_out = [shards.open_shard(folder, row) for row in plan["validation"]]
    return Dataset(plan, tokenizer, windows, held_out, notes, download, tuple(part.shard for part in parts))


class Part:
    """One planned shard, opened when it is read, and closed when N_OPEN others were opened since.

    Groups are read one after the other, so the memory that a run's text takes does not grow with it.
    """

    def __init__(self, download, folder, number, row, pack, n_context, eot, opened):
        self.download, self.folder, self.number, self.row = download, folder, number, row
        self.pack, self.n_context, self.eot, self.opened, self._windows = pack, n_context, eot, opened, None

    def windows(self) -> order.Windows:
        """Its sequences, waited for. Raises ValueError where they cannot come."""
        if self._windows is None:
            self.download.wait_for_chunk(self.number)
            touch(self.folder, self.row["name"])
            self._windows = self.pack(self.shard(), self.n_context, self.eot)
            self.opened.append(self)
            if len(self.opened) > N_OPEN:
                self.opened.popleft()._windows = None
        return self._windows

    def shard(self) -> shards.Shard:
        """Its tokens. Raises ValueError where it is not here, or where the stream has ended before."""
        chunks, n_wanted, name = shards.read_chunks(self.folder)["rows"], self.row["n_tokens"], self.row["name"]
        chunk = chunks[self.number] if self.number < len(chunks) else None
        if chunk is None or shards.broken(self.folder, chunk["shards"].values()):
            raise ValueError(
                f"data: expected {self.folder / name}, which is fetched when training goes on, got no file"
            )
        if (n_got := _n_train(chunk)) < n_wanted:
            n_all = self.number * self.download.order.n_shard + n_got
            where = f"{self.folder / name}, got {n_got:,}: the stream has no more than {n_all:,}"
            raise ValueError(f"data: expected {n_wanted:,} tokens in {where}; a new run plans no more than these")
        return shards.open_shard(self.folder, chunk["shards"]["train"] | {"n_tokens": n_wanted})

    def read(self, window):
        """The inputs and targets of one sequence."""
        return self.windows().read(window)


def fetch_all(
    source, tokenizer, n_tokens, *, cache, text_field="text", budget=None, keep=(), watch=lambda progress: None
) -> Entry:
    """Bring the first n_tokens training tokens of a stream into the cache; what is there then.

    The rest as in prepare_stream.
    """
    stream, cache = streams.open_stream(source, text_field), Path(cache)
    download, path, chosen = _download_(source, stream, tokenizer, n_tokens, cache, text_field, budget, keep)
    download.watch = watch
    if _begin(download, stream):
        if not chosen:
            download.wait(path.is_file)
        download.wait_for_end()
    folder = folder_of(stream, tokenizers.load(path), shard_size())
    return next(entry for entry in entries(cache) if entry.folder == folder)


def is_cached(source, tokenizer, tokens_per_epoch, *, cache, text_field="text") -> bool:
    """Are all the shards there that prepare_stream would plan?"""
    stream, cache, n_shard = streams.open_stream(source, text_field), Path(cache), shard_size()
    chosen = tokenizer
    if isinstance(tokenizer, str):
        path = trained_path(cache, stream, tokenizer)
        if not path.is_file():
            return False
        chosen = tokenizers.load(path)
    folder = cache / folder_of(stream, chosen, n_shard)
    chunks = shards.read_chunks(folder)
    return bool(chunks["rows"]) and missing(folder, chunks, len(_rows(tokens_per_epoch, n_shard))) is None


def choose(tokenizer, tokens_per_epoch, *, cache) -> tuple[str, str]:
    """(what --data auto stands for, why): FineWeb-Edu that is cached or can be had, else Python's documentation."""
    if is_cached("fineweb-edu", tokenizer, tokens_per_epoch, cache=cache):
        return "fineweb-edu", "it is in the cache"
    if is_offline():
        return "python-docs", "the network is not to be used"
    if hub_reachable():
        return "fineweb-edu", "the hub can be reached"
    return "python-docs", "the hub cannot be reached"


def _download_(source, stream, tokenizer, n_tokens, cache, text_field, budget, keep):
    """(the download of a stream's first tokens, where its tokenizer is or will be, the tokenizer if it is there)."""
    chosen, path = _tokenizer_(tokenizer, cache, stream)
    name, n_shard = tokenizer if isinstance(tokenizer, str) else tokenizer.name, shard_size()
    folder, n_chunks = None, len(_rows(n_tokens, n_shard))
    if chosen:
        _check_budget(chosen, n_tokens, budget, cache)
        folder = cache / folder_of(stream, chosen, n_shard)
    asked = Order(
        source=str(source), text_field=text_field, tokenizer=str(path) if chosen else name, name=name, cache=str(cache),
        n_chunks=n_chunks, n_shard=n_shard, budget=budget, keep=tuple(keep),
    )  # fmt: skip
    return Download(asked, folder), path, chosen


def _begin(download, stream) -> int:
    """Start the download unless all is there; how many chunks are not. ValueError, at once, where it cannot begin."""
    n_there, n_chunks = download.gap(), download.order.n_chunks
    if n_there is None:
        return 0
    if not os.path.isdir(stream.repository) and not hub_reachable():
        why = "the network is not to be used" if is_offline() else "the hub cannot be reached"
        raise ValueError(
            f"data: expected {n_chunks} shards of {stream.name} in {download.order.cache}, got {n_there}, and {why}; "
            "--data python-docs needs no network"
        )
    download.start()
    return n_chunks - n_there


def _tokenizer_(tokenizer, cache, stream):
    """(the tokenizer, or None where it is still to be trained, the path that it is or will be kept at)."""
    if isinstance(tokenizer, str) and tokenizer.startswith("bpe:"):
        path = trained_path(cache, stream, tokenizer)
        return (tokenizers.load(path), path) if path.is_file() else (None, path)
    chosen = tokenizers.named(tokenizer) if isinstance(tokenizer, str) else tokenizer
    path = Path(cache) / stream.name / f"tokenizer-{chosen.fingerprint[:8]}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen.save(path)
    return chosen, path


def _n_train(chunk):
    """Training tokens of a chunk."""
    return chunk["shards"].get("train", {"n_tokens": 0})["n_tokens"]


def _rows(n_tokens, n_shard):
    """The planned shards of so many tokens: n_shard of each, and what is left of the last."""
    whole, rest = divmod(n_tokens, n_shard)
    counts = [n_shard] * whole + ([rest] if rest > 1 else [])
    return [{"name": f"train-{number:05d}", "n_tokens": count} for number, count in enumerate(counts)]


def _check_budget(tokenizer, n_tokens, budget, cache):
    """Raise ValueError, before anything is fetched, for a plan that the cache may not hold."""
    n_bytes = 1.1 * n_tokens * np.dtype(shards.dtype_of(tokenizer)).itemsize  # a tenth more is held out
    if budget is not None and n_bytes > budget:
        raise ValueError(
            f"cache-gb: expected room for {n_bytes / 1e9:.3g} GB of shards in {cache}, got {budget / 1e9:.3g} GB"
        )
