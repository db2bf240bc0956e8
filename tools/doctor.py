"""What this machine has, and what works without the rest."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import click

from tools.options import in_cache

N_TRIED = 10_000  # tokens that --data fetches


@click.command()
@click.option("--data", metavar="SOURCE", help="Fetch a little of this stream instead, and read it from the cache.")
@in_cache
def doctor(data, cache):
    """Look at this machine: a line for everything that gptcore can use, and what works without what is missing."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if data:
        return try_data(console, data, cache)
    for name, fine, text in examine():
        mark = ("ok", "green") if fine else ("--", "yellow")
        console.print(Text.assemble(mark, f"  {name:<14}{text}"), soft_wrap=True)


def try_data(console, source, cache) -> None:
    """The first N_TRIED tokens of a stream, fetched, then read again from the cache, which asks nobody."""
    from gptcore.data import budget, order, shards, streamed, streams
    from gptcore.tokenizer import named
    from tools import fetching

    if not streams.is_stream(source):
        raise ValueError(f"data: expected {', '.join(streams.STREAMS)} or hf:REPOSITORY, got {source}")
    os.environ[streamed.OWN_SIZE] = str(N_TRIED)  # shards of its own, so that a little is enough
    words, seconds = named("cl100k_base"), []
    for _ in range(2):
        began = time.perf_counter()
        with fetching.shown(console, f"Fetching {N_TRIED:,} tokens of {source}") as watch:
            entry = streamed.fetch_all(source, words, N_TRIED, cache=cache, watch=watch)
        folder = Path(cache, entry.folder)
        windows = order.concat(shards.open_shard(folder, shards.rows(folder, "train")[0]), 256, words.eot)
        inputs, targets = windows.read(0)
        seconds.append(time.perf_counter() - began)
    first = inputs[:10].tolist()
    lines = {
        "sequences": f"{windows.n} of inputs {inputs.shape} and targets {targets.shape}",
        "ids": ", ".join(map(str, first)),
        "text": repr(words.decode(first)),
        "seconds": f"{seconds[0]:.2f}, then {seconds[1]:.3f} from the cache: a factor of {seconds[0] / seconds[1]:.0f}",
    }
    for name, text in lines.items():
        console.print(f"{name:<11}{text}", markup=False, highlight=False, soft_wrap=True)
    console.print(fetching.entry_table(budget.entries(cache)))


def examine():
    """Every line as (name, is it there, what it is or what works without it)."""
    yield from machine()
    yield from building()
    yield from native()
    yield from files()
    yield terminal()


def machine():
    """Python, torch, and the device that --device auto takes."""
    import torch

    from gptcore import device

    yield "Python", True, f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    builds = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    built = " and ".join(f"{name} {version}" for name, version in builds.items() if version) or "the CPU"
    yield "torch", True, f"{torch.__version__}, built for {built}"
    here = device.pick()
    without = "" if here.type != "cpu" else "; no GPU: everything works, training is slower"
    yield "device", here.type != "cpu", f"{here}: {device.backend_name(here)}, {device.card_name(here)}{without}"
    n_bytes = device.total_memory(here)
    yield "memory", n_bytes > 0, f"{n_bytes / 1e9:.1f} GB" if n_bytes else "unknown here: batches are not fitted to it"
    wide = device.multiplies_bfloat16(here)
    no_autocast = ", no autocast" if here.type == "mps" else ""
    yield "bfloat16", wide, "in hardware" if wide else f"not in hardware: float32{no_autocast}"
    yield "threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    peaks = ((name, device.gemm_peak(here, dtype) / 1e9) for name, dtype in dtypes(wide))
    yield "peak", True, ", ".join(f"{peak:,.0f} GFLOP/s {name}" for name, peak in peaks)


def dtypes(wide):
    """The number formats worth measuring."""
    import torch

    return [("float32", torch.float32)] + ([("bfloat16", torch.bfloat16)] if wide else [])


def building():
    """The compiler, ninja and torch.compile: speed, never a need."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++", "cl")), None)
    found = compiler and shutil.which(compiler)
    yield "C++ compiler", bool(found), found or f"{compiler or 'none'} not found: torch operators are used as they are"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        yield "ninja", True, importlib.metadata.version("ninja")
    error = compile_error()
    yield "torch.compile", not error, error or "works"


def native():
    """The native kernels: which operator they serve, and why not."""
    from gptcore import kernels

    found = kernels.report()
    built = f"{found['isa']} of {', '.join(found['isas'])}; {found['compiler']}" if "isa" in found else ""
    yield "native code", bool(built), built or next(iter(found["ops"].values()))["why"]
    for name, row in found["ops"].items():
        on_gpu = f"; on a GPU: {row['gpu'] or 'native'}" if found.get("gpu") else ""
        yield name, row["used"] == "native", f"{row['used']}: {row['why']}{on_gpu}"


def compile_error() -> str:
    """Why torch.compile does not work here, in one line; empty if it does."""
    import torch

    try:
        torch.compile(lambda x: (x.sin() + 1).sum(), fullgraph=True)(torch.ones(8))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        return f"does not work, training is eager and slower: {reason}"
    return ""


def files():
    """What is on the disk, and whether the hub can be reached for more."""
    from gptcore.data.download import OFFLINE, hub_reachable, is_offline

    for name in ("runs", "data"):
        size, free = folder_size(Path(name)), shutil.disk_usage(".").free
        yield f"{name}/", True, f"{size / 1e9:.2f} GB, {free / 1e9:.0f} GB free"
    encoding = cl100k_base()
    yield (
        "cl100k_base",
        bool(encoding),
        encoding or "not here and fetched when needed; --tokenizer bpe:4096 needs nothing",
    )
    hub = hub_reachable()
    forbidden = next((f"{name}={os.environ[name]}" for name in OFFLINE if os.environ.get(name, "0") != "0"), "")
    missing = forbidden if is_offline() else "not reached in 3 seconds"
    yield "hub", hub, "reached" if hub else f"{missing}: --data python-docs and your own files work without it"


def folder_size(path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def cl100k_base() -> str:
    """The folder with the cl100k_base file that a tokenizer would read; empty if there is none."""
    from gptcore import tokenizer

    path = tokenizer.find_file(*tokenizer.CL100K_FILE)
    return f"in {path.parent}" if path else ""


def terminal():
    """Whether the live panel and the menu can be shown."""
    fine = sys.stdin.isatty() and sys.stdout.isatty()
    return (
        "terminal",
        fine,
        f"{shutil.get_terminal_size().columns} columns" if fine else "none: plain lines, no questions",
    )
