"""From text to batches: corpora -> shards -> order, or for text that is too much to have, streams -> shards -> order.

    dataset = prepare("notes/", "bpe:4096", n_context=256, n_sequences=64, seed=42, cache="data")
    tokens, targets = dataset.batch(0)

What you learn here: preparing text is a plan and some files. The plan is plain data that goes into run.json; with the
plan and the files the same batches come back at any time.
"""

import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from .. import tokenizer as tokenizers
from ..files import only_writer, write_whole
from . import corpora, order, shards, streams
from .dataset import Dataset, Document, at_least
from .mixture import Mixture, shares
from .mixture import mix as mix_datasets
from .streamed import prepare_stream, reopen_stream

N_TRAINING = 20_000_000  # bytes of text, the first ones of the training side, from which a BPE learns
MIN_CONTEXT = 16

__all__ = ["Dataset", "Document", "Mixture", "prefetch", "prepare", "reopen"]


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
    mix=None,
    budget=None,
    keep=(),
    watch=lambda progress: None,
) -> Dataset:
    """Read text, tokenise it into shards under cache unless they are there, and plan the order of the batches.

    sources: what --data names, one or several; tokenizer: what --tokenizer names, or a Tokenizer. tokens_per_epoch caps
    the training tokens, and the validation tokens at a tenth of it. Documents are held out by their text; text with
    fewer than two sequences on a side holds out its last tenth instead, and if that is too little the context becomes
    the largest power of two, from 16 on, that gives two sequences on each side. Raises ValueError below that.
    A stream is fetched, see streamed.prepare_stream for budget, keep and watch. With mix, a weight a source, each
    source is a dataset of its own and gives its share of the sequences; a tokenizer that is trained learns from the
    first one.
    """
    for name, value in {"n_context": n_context, "n_sequences": n_sequences}.items():
        at_least(name, value, 1)
    if tokens_per_epoch is not None:
        at_least("tokens_per_epoch", tokens_per_epoch, n_context + 2)
    if packing not in order.PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(order.PACKINGS)}, got {packing!r}")
    cache = Path(cache)
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    same = {"n_sequences": n_sequences, "seed": seed, "cache": cache, "text_field": text_field, "packing": packing}
    fetching = {"budget": budget, "keep": keep, "watch": watch}
    if mix is not None:
        ways = same | fetching | {"tokens_per_epoch": tokens_per_epoch, "stdin": stdin}
        return _mixed(sources, mix, tokenizer, n_context, ways)
    if any(map(streams.is_stream, sources)):
        if len(sources) > 1:
            raise ValueError(f"data: expected {sources[0]} alone, or --mix with a weight for each, got several sources")
        if tokens_per_epoch is None:
            raise ValueError(f"tokens_per_epoch: expected a number for {sources[0]}, which is a stream, got None")
        ways = same | fetching | {"n_context": n_context, "tokens_per_epoch": tokens_per_epoch}
        return prepare_stream(sources[0], tokenizer, **ways)
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


def reopen(plan, tokenizer, *, cache, fetch=True, **fetching) -> Dataset:
    """The dataset of a run's plan, its shards verified by sha256.

    Shards that are missing or damaged are written again if the source still holds the same text, and fetched again if
    it is a stream and fetch is true; fetching: see streamed.reopen_stream. Raises ValueError naming the shard where
    that cannot be, or if the tokenizer is another one.
    """
    if "members" in plan:
        members = tuple(reopen(part, tokenizer, cache=cache, fetch=fetch, **fetching) for part in plan["members"])
        return Mixture(plan, tokenizer, [], [], members=members)
    wanted = plan["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != wanted:
        raise ValueError(f"tokenizer {tokenizer.name}: expected fingerprint {wanted}, got {tokenizer.fingerprint}")
    if "stream" in plan:
        return reopen_stream(plan, tokenizer, cache=cache, fetch=fetch, **fetching)
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


def _mixed(sources, weights, tokenizer, n_context, ways):
    """A dataset of each source, with one tokenizer and one context, mixed by weight."""
    if len(sources) != len(weights) or len(sources) < 2:
        raise ValueError(f"mix: expected a weight for each of {len(sources)} sources, two at least, got {len(weights)}")
    n_all, total, members = ways.pop("tokens_per_epoch"), sum(shares(weights)), []
    names = [f"{streams.open_stream(source).name}/" for source in sources if streams.is_stream(source)]
    ways |= {"keep": (*ways["keep"], *names)}  # no member's shards make room for another's
    for source, count in zip(sources, shares(weights), strict=True):
        n_tokens = None if n_all is None else max(n_context + 2, n_all * count // total)
        member = prepare(source, tokenizer, n_context=n_context, tokens_per_epoch=n_tokens, **ways)
        tokenizer = member.tokenizer
        members.append(member)
    fewest = min(member.n_context for member in members)
    if fewest < n_context:
        return _mixed(sources, weights, tokenizer, fewest, ways | {"tokens_per_epoch": n_all})
    return mix_datasets(members, weights)


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
    rows = [row for group in plan["groups"] for row in group]
    openers = tuple(partial(shards.open_shard, folder, row) for row in rows)
    held_out = [shards.open_shard(folder, row) for row in plan["validation"]]
    return Dataset(plan, tokenizer, groups, held_out, notes, openers=openers)
