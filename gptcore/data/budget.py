"""The cache of token shards: what is in it, how large it is, and what goes when there is too much.

What you learn here: a cache is bounded by forgetting what was used longest ago. What a plan still needs, what is held
out, and what was made of the user's own files is never forgotten.
"""

import hashlib
import json
import os
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from ..files import write_whole
from .shards import FILES, read_chunks, read_manifest
from .shards import rows as shard_rows


class Entry(NamedTuple):
    """One folder of shards."""

    folder: Path  # relative to the cache
    corpus: str
    tokenizer: str
    n_tokens: dict[str, int]  # by side
    n_shards: int
    n_bytes: int  # on the disk
    whole: bool  # is every token there that the corpus has?
    is_stream: bool


def entries(cache) -> list[Entry]:
    """Every folder of shards in the cache, by name."""
    found = []
    for path in sorted([*Path(cache).glob("*/*/manifest.json"), *Path(cache).glob("*/*/chunks.json")]):
        folder, is_stream = path.parent, path.name == "chunks.json"
        about = read_chunks(folder) if is_stream else read_manifest(folder)
        facts = about["about"] if is_stream else about
        n_tokens, n_shards = {}, 0
        for row in shard_rows(folder):
            side = row["name"].partition("-")[0]
            n_tokens[side], n_shards = n_tokens.get(side, 0) + row["n_tokens"], n_shards + 1
        rows = about["rows"] if is_stream else []
        whole = not is_stream or bool(rows and rows[-1]["last"] and n_shards == _n_written(about))
        words = (
            facts["corpus"],
            facts["tokenizer"]["name"],
            n_tokens,
            n_shards,
            folder_bytes(folder),
            whole,
            is_stream,
        )
        found.append(Entry(folder.relative_to(cache), *words))
    return found


def folder_bytes(folder) -> int:
    """The size of every file below a folder."""
    return sum(_size(path) for path in Path(folder).rglob("*"))


def evict_(cache, budget, keep=()) -> list[str]:
    """Remove training shards of streams, the one used longest ago first, until the cache holds at most budget bytes.

    keep: what stays beside all that is pinned, relative to the cache, "folder/train-00000" for a shard and "folder/"
    for all below. Returns what went. Raises ValueError with both sizes where nothing more may go.
    """
    gone, size = [], folder_bytes(cache)
    if size <= budget:
        return gone
    keep = (*keep, *(name for names in pins(cache).values() for name in names))
    for path in sorted(Path(cache).glob("*/*/train-*.json"), key=_last_use):
        name = path.relative_to(cache).with_suffix("").as_posix()
        if name.startswith(tuple(keep)) or not (path.parent / "chunks.json").is_file():
            continue
        size -= remove_shard(path.parent, path.stem)
        gone.append(name)
        if size <= budget:
            return gone
    raise ValueError(
        f"cache-gb: expected at most {budget / 1e9:.3g} GB in {cache}, got {size / 1e9:.3g} GB that nothing may go from"
    )


def pin(cache, run_dir, names) -> None:
    """Keep shards, named as in evict_, for a run, whatever process makes room, until they are unpinned.

    The cache itself remembers it: whoever evicts may never have heard of the run, which may have begun since.
    """
    path = _pin_path(cache, run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"run": str(Path(run_dir).resolve()), "shards": list(names)}))


def unpin(cache, run_dir) -> None:
    """Let a run's shards go."""
    _pin_path(cache, run_dir).unlink(missing_ok=True)


def pins(cache) -> dict[Path, list[str]]:
    """The shards that are pinned, by run folder."""
    found = {}
    for path in sorted(Path(cache, "plans").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # unpinned by another process
            continue
        found[Path(content["run"])] = content["shards"]
    return found


def remove_shard(folder, name) -> int:
    """Remove a shard, its .json first: it is absent at once. Returns how many bytes went."""
    n_bytes = 0
    for kind in ("json", *FILES):
        path = Path(folder) / f"{name}.{kind}"
        n_bytes += _size(path)
        path.unlink(missing_ok=True)
    return n_bytes


def touch(folder, name) -> None:
    """Remember that a shard was used now."""
    os.utime(Path(folder) / f"{name}.json")


def _pin_path(cache, run_dir):
    word = hashlib.sha256(str(Path(run_dir).resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path(cache, "plans", f"{word}.json")


def _size(path):
    """Bytes of a file; 0 for a folder, and for what another process has just renamed or removed."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0
    return stat.st_size if S_ISREG(stat.st_mode) else 0


def _last_use(path):
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # removed by another process: there is nothing left to remove
        return float("inf")


def _n_written(chunks):
    own = sum(len(rows) for rows in chunks["own"].values())
    return own + sum(len(row["shards"]) for row in chunks["rows"])
