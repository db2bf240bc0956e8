"""Documents become token files, whole or not at all.

What you learn here: tokens are written once and then only read, by the page, from files that several processes share.
A shard is `train-00000.bin` (ids, little-endian), `.idx` (where each document starts, then the total), `.bytes` (each
document's length in UTF-8) and `.json` (counts and sha256). The `.json` comes last: a shard exists iff it does. Which
documents are held out is decided by their text alone, so equal documents fall on one side, whatever else is there.
Next: order.py turns the shards into batches.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import only_writer, write_whole

N_SHARD = 10_000_000  # tokens after which a shard is closed
N_DOCUMENTS, N_CHARACTERS = 1_000, 16_000_000  # encoded at a time, at most
SIDES = ("train", "val")
FILES = {"bin": None, "idx": "<u8", "bytes": "<u8"}  # None: what the vocabulary needs


class Shard(NamedTuple):
    """One shard's files, read where they lie."""

    tokens: np.ndarray  # each document's ids, then end of text
    starts: np.ndarray  # of each document, then the total
    n_bytes: np.ndarray  # of each document's text in UTF-8


class Survey(NamedTuple):
    """What one reading of the documents tells before anything is tokenised."""

    text_sha256: str
    at_most: dict[str, int]  # tokens that each side can have: a token has a byte or more, and one ends the document
    n_characters: int


def held_out(text) -> bool:
    """Does this document belong to validation? A tenth does, by the sha256 of the text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64 < 0.1


def split(documents, cut=None) -> Iterator[tuple[str, str]]:
    """Each document's (side, text): by its text, or before and after the cut (document, character)."""
    for index, (_, text) in enumerate(documents):
        if cut is None:
            yield SIDES[held_out(text)], text
            continue
        at = 0 if index > cut[0] else cut[1] if index == cut[0] else len(text)
        yield from ((side, part) for side, part in zip(SIDES, (text[:at], text[at:]), strict=True) if part)


def survey(documents) -> Survey:
    """Read all documents, (name, text) each, once."""
    digest, at_most, n_characters = hashlib.sha256(), dict.fromkeys(SIDES, 0), 0
    for _, text in documents:
        content = text.encode("utf-8", "replace")
        digest.update(content + b"\0")
        at_most[SIDES[held_out(text)]] += len(content) + 1
        n_characters += len(text)
    return Survey(digest.hexdigest(), at_most, n_characters)


def last_tenth(documents, n_characters) -> tuple[int, int]:
    """The cut (document, character) before the last tenth of n_characters in all.

    It moves back to the end of a line, unless that would hold out more than a fifth.
    """
    place = n_characters - n_characters // 10
    for index, (_, text) in enumerate(documents):
        if place <= len(text):
            line = text.rfind("\n", 0, place) + 1
            return index, line if line and place - line <= n_characters // 10 else place
        place -= len(text)
    return 0, 0


# --------------------------------------------------------------------------------------------------------- writing


def ensure_(folder, documents, tokenizer, about, cut=None) -> dict:
    """Write the shards of the documents into the folder unless they are there and whole; the manifest.

    documents is called for an iterator of (name, text). One process writes, others wait for it. Raises OSError naming
    the file when the disk is full; then no unfinished shard is visible.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        manifest = read_manifest(folder)
        if manifest and not broken(folder, rows(folder)):
            return manifest
        return write_(folder, documents(), tokenizer, about, cut)


def write_(folder, documents, tokenizer, about, cut=None) -> dict:
    """Tokenise the documents into the folder, which is emptied first; the manifest. Call it as the only writer."""
    folder = Path(folder)
    for leftover in folder.iterdir():
        if leftover.name != ".lock":
            leftover.unlink()
    digest = hashlib.sha256()

    def read():
        for name, text in documents:
            digest.update(text.encode("utf-8", "replace") + b"\0")
            yield name, text

    dtype = dtype_of(tokenizer)
    waiting, n_waiting, n_written = {side: [] for side in SIDES}, dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)

    def flush(side):
        write_shard(folder, f"{side}-{n_written[side]:05d}", waiting[side], dtype)
        waiting[side], n_waiting[side], n_written[side] = [], 0, n_written[side] + 1

    for batch in batches(split(read(), cut)):
        for (side, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            waiting[side].append(stored(text, ids, tokenizer))
            n_waiting[side] += len(ids) + 1
            if n_waiting[side] >= N_SHARD:
                flush(side)
    for side in SIDES:
        if waiting[side]:
            flush(side)
    manifest = {
        **about,
        "text_sha256": digest.hexdigest(),
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "dtype": dtype,
        "eot": tokenizer.eot,
    }
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def dtype_of(tokenizer) -> str:
    """How an id is stored: in two bytes where all ids fit."""
    return "<u2" if tokenizer.n_vocab <= 65_535 else "<u4"


def stored(text, ids, tokenizer) -> tuple[np.ndarray, int]:
    """A document as write_shard takes it: its ids with end of text, and how many bytes of UTF-8 its text has."""
    return np.array([*ids, tokenizer.eot], dtype_of(tokenizer)), len(text.encode("utf-8", "replace"))


def batches(pairs) -> Iterator[list[tuple]]:
    """Pairs of (anything, text), as many at a time as are encoded together."""
    batch, size = [], 0
    for word, text in pairs:
        batch.append((word, text))
        size += len(text)
        if len(batch) == N_DOCUMENTS or size >= N_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_shard(folder, name, documents, dtype) -> dict:
    """Write one shard of documents, (ids, n_bytes of the text) each; its row of counts and sha256."""
    lengths = [len(ids) for ids, _ in documents]
    contents = {
        "bin": np.concatenate([ids for ids, _ in documents]).astype(dtype, copy=False),
        "idx": np.cumsum([0, *lengths]).astype("<u8"),
        "bytes": np.array([n_bytes for _, n_bytes in documents], dtype="<u8"),
    }
    for kind, content in contents.items():
        write_whole(folder / f"{name}.{kind}", content.data)
    row = {
        "name": name,
        "n_tokens": sum(lengths),
        "n_documents": len(documents),
        "n_bytes": sum(n_bytes for _, n_bytes in documents),
        "dtype": dtype,
        "sha256": {kind: hashlib.sha256(content.data).hexdigest() for kind, content in contents.items()},
    }
    write_whole(folder / f"{name}.json", json.dumps(row).encode())
    return row


# --------------------------------------------------------------------------------------------------------- reading


def read_manifest(folder) -> dict | None:
    """What write_ returned; None while the folder is not complete."""
    path = Path(folder) / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rows(folder, side="") -> list[dict]:
    """The counts and sha256 of the shards that exist, of one side or of all, in order."""
    paths = sorted(Path(folder).glob(f"{side or '*'}-?????.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def read_chunks(folder) -> dict:
    """What chunks.json tells of a stream's folder: {"about", "own": {side: [row]}, "rows": [chunk]}; see fetch.py.

    Raises ValueError naming the file where it is damaged.
    """
    path = Path(folder) / "chunks.json"
    empty = {"about": {}, "own": {}, "rows": []}
    if not path.is_file():
        return empty
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got {error}; without this file its shards are fetched again"
        ) from error
    if not isinstance(found, dict) or found.keys() != empty.keys():
        raise ValueError(f"{path}: expected the rows of chunks; without this file its shards are fetched again")
    return found


def write_chunks(folder, chunks) -> None:
    """Replace chunks.json."""
    write_whole(Path(folder) / "chunks.json", json.dumps(chunks))


def broken(folder, wanted) -> list[str]:
    """What is wrong with the shards that the rows describe, a line each: missing or changed files."""
    found = []
    for row in wanted:
        if not (path := Path(folder) / f"{row['name']}.json").is_file():
            found.append(f"{path}: expected the shard's counts, got no file")
        for kind, sha256 in row["sha256"].items():
            path = Path(folder) / f"{row['name']}.{kind}"
            got = "no file"
            if path.is_file():
                with open(path, "rb") as file:
                    got = hashlib.file_digest(file, "sha256").hexdigest()
            if got != sha256:
                found.append(f"{path}: expected sha256 {sha256}, got {got}")
    return found


def open_shard(folder, row) -> Shard:
    """The first row["n_tokens"] tokens of a shard, mapped into memory, and the documents that begin in them."""
    tokens, starts, n_bytes = _map(folder, row)
    n_tokens = row["n_tokens"]
    edges = np.minimum(starts[: np.searchsorted(starts[:-1], n_tokens) + 1].astype(np.int64), n_tokens)
    return Shard(tokens[:n_tokens], edges, n_bytes[: np.searchsorted(starts[1:], n_tokens, side="right")])


def whole_documents(shard) -> Iterator[tuple[list[int], int]]:
    """(ids without end of text, UTF-8 bytes of the text) of each document that lies in the shard to its end."""
    for (start, end), n_bytes in zip(pairwise(shard.starts.tolist()), shard.n_bytes.tolist(), strict=False):
        yield shard.tokens[start : end - 1].tolist(), n_bytes


def first_tokens(folder, rows, n_tokens, *, whole=False) -> list[dict]:
    """The rows of the shards that hold the first n_tokens, the last one shortened; whole: to the end of a document.

    All of them for n_tokens None.
    """
    if n_tokens is None:
        return rows
    taken = []
    for row in rows:
        n = min(row["n_tokens"], n_tokens)
        if whole and n < row["n_tokens"]:
            ends = _map(folder, row).starts[1:]
            n = int(ends[np.searchsorted(ends, n)])
        taken.append(row | {"n_tokens": n})
        n_tokens -= n
        if n_tokens <= 0:
            break
    return taken


def _map(folder, row):
    path, dtypes = Path(folder) / row["name"], FILES | {"bin": row["dtype"]}
    return Shard(*(np.memmap(f"{path}.{kind}", dtype, "r") for kind, dtype in dtypes.items()))
