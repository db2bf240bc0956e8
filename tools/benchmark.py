"""invoke benchmark: run benchmarks/, show who won, keep the numbers."""

import json
import os
import tempfile
from pathlib import Path

import click

GROUPS = {  # name -> the file that measures it
    "kv-cache": "bench_kv_cache.py",
    "decode": "bench_decode.py",
    "sampling": "bench_sampling.py",
    "attention": "bench_attention.py",
}


@click.command()
@click.option("--only", type=click.Choice(list(GROUPS)), help="One group (default: all of them).")
@click.option("-k", metavar="NAME", help="Only cases whose name holds this; pytest's -k expression.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: all cores).")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Also write everything measured there.")
def benchmark(only, k, threads, file):
    """Measure speed as ratios within one run: against peers, against the reference, against the memory."""
    from rich.console import Console

    from tools.develop import HOUSE, python
    from tools.native import build_first

    build_first(lambda line: click.echo(line, err=True))
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    files = [str(HOUSE / "benchmarks" / name) for group, name in GROUPS.items() if only in (None, group)]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "benchmark.json")
        words = ["-q", "--benchmark-only", "--benchmark-columns=median", f"--benchmark-json={raw}"]
        status = python("pytest", *files, *words, *(["-k", k] if k else []))
        found = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() and raw.stat().st_size else None
    if found is None:
        return status or 1
    console = Console()
    for case in found["benchmarks"]:
        console.print(case_table(case))
    if file:
        given = {"--only": only, "-k": k, "--threads": threads}
        typed = [f"{name} {value}" for name, value in given.items() if value is not None]
        found["command"] = " ".join(["invoke benchmark", *typed])
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return status


def case_table(case):
    """One case: a row for each contestant, its time, its ratio to the first, and what that makes a second."""
    from rich import box
    from rich.table import Table

    told = dict(case["extra_info"])
    n_tokens, n_bytes = told.get("n_tokens"), told.get("n_bytes")
    rows = {name: row for name, row in told.items() if isinstance(row, dict) and "us" in row}
    columns = ["", "ms", "times the first", "spread"]
    columns += (["tokens/s"] if n_tokens else []) + (["GB/s", "share of a read"] if n_bytes and "read" in rows else [])
    title, why = case["group"], told.get("why")
    table = Table(*columns, title=title, caption=why, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for name, row in rows.items():
        low, high = row["spread"]
        cells = [name, f"{row['us'] / 1e3:,.3f}", f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        cells += [f"{n_tokens / row['us'] * 1e6:,.0f}" if name != "read" else ""] if n_tokens else []
        if n_bytes and "read" in rows:
            cells += [f"{n_bytes / row['us'] / 1e3:.1f}", f"{100 * rows['read']['ratio'] / row['ratio']:.0f} %"]
        table.add_row(*cells)
    return table
