"""What downloads look like, what they may use, and what they must leave alone."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from gptcore import checkpoint
from gptcore.data import budget, shards
from gptcore.data.download import OFFLINE
from gptcore.files import only_writer, remove_folder
from tools.view import duration


def ways(given, cache_gb) -> dict:
    """The budget, and the shards that must stay, as gptcore.data takes them."""
    obey(given["offline"])
    return {"budget": int(1e9 * (given["cache_gb"] or cache_gb)), "keep": needed(given["cache"])}


def obey(offline) -> None:
    """--offline is for the whole process, and for those that it starts."""
    if offline:
        os.environ.update(dict.fromkeys(OFFLINE, "1"))


def needed(cache, root="runs") -> tuple[str, ...]:
    """The training shards that the plans of unfinished runs name, as paths relative to the cache.

    The runs in root, and those elsewhere that the cache knows; it forgets the ones that are finished or gone.
    """
    names = [name for info in checkpoint.list_runs(root) if unfinished(info) for name in planned(info.run)]
    for run_dir, shards_of_run in budget.pins(cache).items():
        if (run_dir / "run.json").exists() and unfinished(checkpoint.read_info(run_dir)):
            names += shards_of_run
        else:
            budget.unpin(cache, run_dir)
    return tuple(dict.fromkeys(names))


def unfinished(info) -> bool:
    """Has the run updates left to make?"""
    return info.latest is None or info.latest < info.run.get("n_steps", 0)


def planned(run) -> list[str]:
    """The training shards of a run's plan, as paths relative to the cache."""
    plan = run.get("plan") or {}
    return [
        f"{part['folder']}/{row['name']}"
        for part in plan.get("members", [plan])
        for group in part.get("groups", ())
        for row in group
    ]


def pin(cache, run_dir, run) -> None:
    """Keep what a run reads of streams in the cache, for as long as it is unfinished."""
    plan = run["plan"]
    if any("stream" in part for part in plan.get("members", [plan])):
        budget.pin(cache, run_dir, planned(run))


@contextmanager
def shown(console, text):
    """A status line while something is waited for; yields the watch(Progress) that keeps it true."""
    with console.status(text) as status:
        told = [0.0]

        def watch(progress):
            line = f"{text}: {describe(progress)}"
            if console.is_terminal:
                status.update(line)
            elif time.monotonic() - told[0] > 10:
                told[0] = time.monotonic()
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield watch


def describe(progress) -> str:
    """How far a download is, how fast, and how long the rest may take."""
    line = f"{progress.n_chunks} of {progress.n_wanted} shards, {progress.n_bytes / 1e6:,.1f} MB of text"
    if progress.seconds > 2 and progress.n_bytes:
        line += f", {progress.n_bytes / 1e6 / progress.seconds:.1f} MB/s"
    if progress.n_fetched and progress.n_chunks < progress.n_wanted:
        left = (progress.n_wanted - progress.n_chunks) * progress.seconds / progress.n_fetched
        line += f", about {duration(left)} left"
    return line + (f" ({progress.trouble})" if progress.trouble else "")


def entry_table(entries):
    """A row for each folder of shards."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("folder", "tokenizer", "train", "val", "test", "shards", "MB", ""):
        table.add_column(name, justify="left" if name in ("folder", "tokenizer", "") else "right")
    for entry in entries:
        counts = [f"{entry.n_tokens[side]:,}" if side in entry.n_tokens else "-" for side in ("train", "val", "test")]
        state = "" if entry.whole else "more to fetch" if entry.is_stream else "unfinished"
        names = Text(entry.folder.as_posix()), Text(entry.tokenizer)
        table.add_row(*names, *counts, str(entry.n_shards), f"{entry.n_bytes / 1e6:,.1f}", state)
    return table


def verify(console, cache, entries) -> int:
    """Print what is wrong with the shards; 2 if anything is."""
    folders = [Path(cache, entry.folder) for entry in entries]
    faults = [fault for folder in folders for fault in shards.broken(folder, shards.rows(folder))]
    for fault in faults:
        console.print(fault, style="yellow", markup=False, soft_wrap=True)
    n_shards = sum(entry.n_shards for entry in entries)
    console.print(f"{n_shards - len({fault.rpartition('.')[0] for fault in faults})} of {n_shards} shards are whole.")
    return 2 if faults else 0


def clear(console, cache, entries, name) -> int:
    """Delete the folders of that name, or all; shards that an unfinished run needs are refused."""
    chosen = [entry for entry in entries if name in ("all", entry.folder.as_posix(), entry.corpus)]
    if not chosen:
        known = ", ".join(entry.folder.as_posix() for entry in entries) or "an empty cache"
        raise ValueError(f"clear: expected all or one of {known}, got {name}")
    for entry in chosen:
        if wanted := [shard for shard in needed(cache) if shard.startswith(f"{entry.folder.as_posix()}/")]:
            raise ValueError(f"clear: expected a folder that no unfinished run needs, got {wanted[0]}")
    for entry in chosen:
        with only_writer(Path(cache, entry.folder), patience=0):
            pass  # somebody who writes there would be robbed
        remove_folder(Path(cache, entry.folder))
        console.print(f"Deleted {entry.folder.as_posix()}, {entry.n_bytes / 1e6:,.1f} MB.", markup=False)
    return 0
