"""A stream into shards, in a process of its own: python -m gptcore.data.fetch JSON. download.py starts and watches it.

What you learn here: a stream's shards come in chunks. A chunk is one stretch of the stream, its training documents in
one shard and those held out in another, and it is closed by the document with which the training shard is full: a
function of the text alone. chunks.json has a row a chunk with the cursor after it, so a process killed at any moment
goes on behind the last whole chunk and writes the same bytes as one that was never killed.
Its output is JSON lines; its end is os._exit, because the threads of a stream may outlive everything else.
"""

import errno
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from .. import tokenizer as tokenizers
from ..files import only_writer, sweep, write_whole
from . import shards, streams
from .budget import evict_

N_TRAINING = 20_000_000  # bytes of training text, the first of the stream, from which a BPE learns
COMMIT = "[0-9a-f]{40}"  # a revision that cannot move
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of a disk: nothing that trying again would mend
REFUSED = (401, 403, 404)  # by the hub: it does not have that, or not for us
COUNTS = ("n_documents", "n_bytes", "n_held")  # encoded, their bytes, and bytes held back to train a tokenizer
N_AHEAD = 2  # batches of documents that are read before they are encoded


class Order(NamedTuple):
    """What to fetch: everything that download.py tells this process."""

    source: str  # a name of streams.STREAMS, or hf:...
    text_field: str
    tokenizer: str  # the path of a tokenizer.json, or bpe:N, which is trained on the stream's training text
    name: str  # of the tokenizer, for people
    cache: str
    n_chunks: int  # chunks 0 .. n_chunks - 1 shall be there at the end
    n_shard: int  # training tokens that close a chunk
    budget: int | None = None  # bytes that the cache may hold
    revision: str | None = None  # the commit that a plan was made with; None: the source's own, or the newest
    keep: tuple[str, ...] = ()  # shards beside these chunks', or folders of them, relative to the cache, that stay


def folder_of(stream, tokenizer, n_shard) -> Path:
    """Where the shards of a stream are, relative to the cache: they depend on the tokenizer and on a shard's size."""
    size = "" if n_shard == shards.N_SHARD else f"-{n_shard}"
    return Path(stream.name) / f"{tokenizer.fingerprint[:8]}{size}"


def trained_path(cache, stream, name) -> Path:
    """Where the tokenizer is kept that was trained on a stream."""
    return Path(cache) / stream.name / f"{name.replace(':', '-')}.json"


def fetch_(order, tell) -> None:
    """Write the chunks that are not there; tell(**facts) is called as things happen.

    Waits while another process writes there. Raises ValueError for a stream that cannot be what was asked for, and what
    the disk, the network and its library raise.
    """
    cache, stream = Path(order.cache), streams.open_stream(order.source, order.text_field)
    (cache / stream.name).mkdir(parents=True, exist_ok=True)
    stream = pinned_(cache, stream._replace(revision=order.revision or stream.revision))
    chosen, first_documents = tokenizer_(cache, stream, order.tokenizer, tell)
    place = folder_of(stream, chosen, order.n_shard)
    folder = cache / place
    folder.mkdir(exist_ok=True)
    keep = (*order.keep, *(f"{place.as_posix()}/train-{number:05d}" for number in range(order.n_chunks)))
    tell(waiting=True)
    with only_writer(folder, patience=float("inf")):
        tell(waiting=False)
        sweep(folder)
        chunks, own = shards.read_chunks(folder), set(stream.splits) - {"train"}
        check_revision(folder, chunks, stream.revision)
        chunks["about"] = {
            "corpus": stream.name, "source": stream.repository, "config": stream.config, "revision": stream.revision,
            "licence": stream.licence, "tokenizer": {"name": order.name, "fingerprint": chosen.fingerprint},
            "n_shard": order.n_shard, "eot": chosen.eot,
        }  # fmt: skip
        write = lambda documents, **ways: chunked(documents, folder, chosen, order.n_shard, tell, **ways)
        for side in sorted(own):  # the corpus's own validation and test
            if shards.broken(folder, chunks["own"].get(side, [])) or side not in chunks["own"]:
                made = write(streams.documents(stream, stream.splits[side]), side_of=lambda text, side=side: side)
                chunks["own"][side] = [row["shards"][side] for row in made if row["shards"]]
                shards.write_chunks(folder, chunks)
        side_of = (lambda text: "train") if own else (lambda text: shards.SIDES[shards.held_out(text)])
        while (first := missing(folder, chunks, order.n_chunks)) is not None:
            cursor = chunks["rows"][first - 1]["cursor"] if first else None
            documents = streams.documents(stream, stream.splits["train"], cursor)
            if first_documents and not first:
                documents, first_documents = first_documents, None
            for number, row in enumerate(write(documents, side_of=side_of, first=first), first):
                _put_row(folder, chunks, number, row)
                tell(chunk=number)
                if order.budget is not None:
                    for name in evict_(cache, order.budget, keep):
                        tell(evicted=name)
                if row["last"] or missing(folder, chunks, order.n_chunks, first=number + 1) != number + 1:
                    break


def pinned_(cache, stream):
    """The stream with a commit: its own, the one kept in the cache, or what the hub says its revision, or the newest,
    is now, which is then kept: a branch moves.
    """
    if re.fullmatch(COMMIT, stream.revision or "") or os.path.isdir(stream.repository):
        return stream
    path = cache / stream.name / "revision"
    if not path.is_file():
        from huggingface_hub import HfApi

        write_whole(path, HfApi().dataset_info(stream.repository, revision=stream.revision).sha)
    return stream._replace(revision=path.read_text(encoding="utf-8"))


def check_revision(folder, chunks, revision) -> None:
    """Raise ValueError where the folder holds shards of another commit than this one: they are never mixed."""
    got = chunks["about"].get("revision", revision)
    if revision and got != revision:
        raise ValueError(
            f"data: expected revision {revision} in {folder}, got {got}; another --cache may hold both, and "
            "invoke data --clear removes these"
        )


def missing(folder, chunks, n_chunks, first=0) -> int | None:
    """The first chunk from `first` on that is not there whole, among the n_chunks first ones that the stream has."""
    rows = chunks["rows"]
    for number in range(first, n_chunks):
        if number >= len(rows):
            return None if rows and rows[-1]["last"] else number
        if shards.broken(folder, rows[number]["shards"].values()):
            return number
    return None


def _put_row(folder, chunks, number, row) -> None:
    """The chunk's row. One that was there before must come out the same, or the stream is another one now."""
    rows = chunks["rows"]
    if number < len(rows) and rows[number]["shards"] != row["shards"]:
        raise ValueError(f"data: expected chunk {number} of {folder} as it was, got other text: the stream has changed")
    chunks["rows"] = [*rows[:number], row, *rows[number + 1 :]]
    shards.write_chunks(folder, chunks)


def tokenizer_(cache, stream, name, tell):
    """(the tokenizer, None), or for bpe:N that is not trained yet (the tokenizer, all documents of the stream).

    What was read to train it is not read again.
    """
    if not name.startswith("bpe:"):
        return tokenizers.load(name), None
    path = trained_path(cache, stream, name)
    if path.is_file():
        return tokenizers.load(path), None
    documents, held, texts, n_bytes = streams.documents(stream, stream.splits["train"]), [], [], 0
    for cursor, text in documents:
        held.append((cursor, text))
        size = len(text.encode("utf-8", "replace"))
        if "val" in stream.splits or not shards.held_out(text):
            texts.append(text)
            n_bytes += size
        tell(n_held=size)
        if n_bytes >= N_TRAINING:
            break
    if not texts:
        raise ValueError(f"data: expected text in {stream.repository}, got none")
    tokenizers.named(name, texts).save(path)
    return tokenizers.load(path), chain(held, documents)


def chunked(documents, folder, tokenizer, n_shard, tell, *, side_of, first=0) -> Iterator[dict]:
    """Write chunk after chunk of documents, (cursor, text) each: {"shards": {side: row}, "cursor", "last"} each.

    side_of(text) names the shard; the first chunk has the number first. A chunk is closed when its training shard holds
    n_shard tokens.
    """
    dtype = shards.dtype_of(tokenizer)
    waiting, n_tokens, cursor, number = {}, {}, None, first

    def close(last):
        rows = {side: shards.write_shard(folder, f"{side}-{number:05d}", waiting[side], dtype) for side in waiting}
        return {"shards": rows, "cursor": cursor, "last": last}

    for batch in ahead(shards.batches(documents)):
        texts, n_bytes = [text for _, text in batch], 0
        for (after, text), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
            side, cursor = side_of(text), after
            document = shards.stored(text, ids, tokenizer)
            waiting.setdefault(side, []).append(document)
            n_bytes += document[1]
            n_tokens[side] = n_tokens.get(side, 0) + len(ids) + 1
            if n_tokens[side] >= n_shard and side == "train":
                yield close(last=False)
                waiting, n_tokens, number = {}, {}, number + 1
        tell(n_documents=len(batch), n_bytes=n_bytes)
    yield close(last=True)


def ahead(iterator, n_ahead=N_AHEAD):
    """The same items, read by a thread while the last one is used."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="fetch")
    try:
        waiting = deque(thread.submit(next, iterator, None) for _ in range(n_ahead))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, iterator, None))
            yield item
    finally:  # nobody waits for a read that the network may never answer
        thread.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------ the process


def is_final(error) -> bool:
    """Would it be the same another time? Then nobody tries again: what was asked for is wrong or not there, a package
    is missing, or the disk is full.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (ValueError, ImportError)) or status in REFUSED:
        return True
    return getattr(error, "errno", None) in FULL


def words_of(error) -> str:
    """The error in one line, with its kind where it is not one of ours."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def main(argv) -> int:
    """Fetch what the order, JSON, says. Lines on stdout: facts once a second and at each chunk, then how it ended."""
    order = Order(**json.loads(argv[0]))
    output, sys.stdout = sys.stdout, sys.stderr  # what a library has to say is no fact
    facts, lock = {**dict.fromkeys(COUNTS, 0), "waiting": False}, threading.Lock()

    def say(**line):
        with lock:
            print(json.dumps(line), file=output, flush=True)  # a parent that is gone breaks the pipe: our end

    def tell(waiting=None, **events):
        for name in COUNTS:
            facts[name] += events.pop(name, 0)
        facts["waiting"] = facts["waiting"] if waiting is None else waiting
        if events:
            say(**facts, **events)

    def every_second():
        try:
            while True:
                time.sleep(1)
                say(**facts)
        except OSError:
            os._exit(1)

    threading.Thread(target=every_second, daemon=True).start()
    try:
        fetch_(order, tell)
        say(**facts, end="done")
    except BrokenPipeError:
        return 1
    except Exception as error:  # every one of them is told to the parent, which decides: nothing is swallowed
        say(**facts, end="final" if is_final(error) else "failed", error=words_of(error))
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
