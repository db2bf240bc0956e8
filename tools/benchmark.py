"""invoke benchmark: run benchmarks/, show who won, keep the numbers."""

import json
import os
import shlex
import tempfile
from pathlib import Path

import click

from tools.options import with_threads

GROUPS = {  # name -> the file that measures it
    "kv-cache": "bench_kv_cache.py",
    "decode": "bench_decode.py",
    "sampling": "bench_sampling.py",
    "attention": "bench_attention.py",
    "int8": "bench_int8.py",
    "interpret": "bench_interpret.py",
}
QUIET = 0.05  # the share of the CPUs that others may use while something is measured
OF_A_RUN = ("decode", "int8")  # the groups that can measure a trained model


@click.command()
@click.option("--only", type=click.Choice(list(GROUPS)), help="One group (default: all of them).")
@click.option(
    "--run", metavar="RUN", help=f"Measure this run or step: {' and '.join(OF_A_RUN)} (default: random weights)."
)
@click.option("-k", metavar="NAME", help="Only cases whose name holds this; pytest's -k expression.")
@with_threads
@click.option(
    "--realtime", is_flag=True, help="Measure at real-time priority, in bursts, on a machine that others use too."
)
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Also write everything measured there.")
def benchmark(only, run, k, threads, realtime, file):
    """Measure speed as ratios within one run: against peers, against the reference, against the memory."""
    if run is not None and only and only not in OF_A_RUN:
        raise ValueError(f"only: expected {' or '.join(OF_A_RUN)} beside --run, got {only}")
    if realtime:
        check_realtime()
    from rich.console import Console

    from tools.develop import HOUSE, python
    from tools.native import build_first

    build_first(lambda line: click.echo(line, err=True))
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    groups = [only] if only else GROUPS if run is None else OF_A_RUN
    files = [str(HOUSE / "benchmarks" / GROUPS[group]) for group in groups]
    chosen = [*(["-k", k] if k else []), *([] if run is None else model_words(run))]
    chosen += ["--realtime"] if realtime else []
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "benchmark.json")
        words = ["-q", "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={raw}"]
        status = python("pytest", *files, *words, *chosen)
        found = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() and raw.stat().st_size else None
    if found is None:
        return status or 1
    console = Console()
    for case in found["benchmarks"]:
        console.print(case_table(case))
    if file:
        given = {"--only": only, "--run": run, "-k": k, "--threads": threads}
        typed = [str(word) for pair in given.items() if pair[1] is not None for word in pair]
        found["command"] = shlex.join(["invoke", "benchmark", *typed, *(["--realtime"] if realtime else [])])
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return status


def check_realtime():
    """Raise ValueError unless this process may run before all others."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except (AttributeError, PermissionError) as error:
        raise ValueError(f"realtime: expected a Linux that grants real-time priority, got {error}") from error


def model_words(run):
    """pytest's words for a run; it works in another folder, so they name whole paths."""
    from gptcore import checkpoint

    return ["--run", str(checkpoint.find_step(run).resolve()), "--text-cache", str(Path("data").resolve())]


def case_table(case):
    """One case: a row for each contestant, its time, that over the first one's, and what it makes a second."""
    told = dict(case["extra_info"])
    scored = {name: row for name, row in told.items() if isinstance(row, dict) and "perplexity" in row}
    if scored:
        return perplexity_table(case["group"], scored, told["why"])
    n_tokens, n_bytes = told.get("n_tokens"), told.get("n_bytes")
    rows = {name: row for name, row in told.items() if isinstance(row, dict) and "us" in row}
    columns = ["", "ms", "ratio", "spread"]
    columns += (["tokens/s"] if n_tokens else []) + (["GB/s", "of a read"] if n_bytes and "read" in rows else [])
    lines = []
    for name, row in rows.items():
        low, high = row["spread"]
        cells = [name, f"{row['us'] / 1e3:,.3f}", f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        cells += [f"{n_tokens / row['us'] * 1e6:,.0f}" if name != "read" else ""] if n_tokens else []
        if n_bytes and "read" in rows:
            cells += [f"{n_bytes / row['us'] / 1e3:.1f}", f"{100 * rows['read']['ratio'] / row['ratio']:.0f} %"]
        lines.append(cells)
    why = told.get("why", "")
    if told.get("others", 0) > QUIET:
        why += f"\nothers used {100 * told['others']:.0f} % of the CPUs: these numbers are not to be judged"
    return told_table(case["group"], columns, lines, why.strip())


def perplexity_table(title, rows, why):
    """What rounding costs: a row for each dtype, its perplexity, and by how much that is above the first."""
    lines = [[name, f"{row['perplexity']:.4f}", f"{100 * row['change']:+.3f} %"] for name, row in rows.items()]
    return told_table(title, ["", "perplexity", "change"], lines, why)


def told_table(title, columns, lines, why):
    """A title, the cells of each line below the columns, and what there is to say: neither wraps at their width."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for cells in lines:
        table.add_row(*cells)
    return Group(Text(title, style="bold"), table, Text(f"{why}\n" if why else "", style="#666666"))
