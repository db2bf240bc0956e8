"""A newcomer's first minutes, measured: install, the first sample, the list of tasks, the first token.

    python benchmarks/first_contact.py [--json benchmarks/results/first_contact.json]

Everything happens in a fresh clone. Packages are installed twice, into two fresh virtual environments,
and the second is measured: what counts is the work, not the network. Training is quick mode as it stands; its
corpus, its tokenizer and its compiled update are made anew, and Ctrl-C ends it when samples.md has a text.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import click
import torch

from gptcore.device import card_name

HOUSE = Path(__file__).resolve().parent.parent
INSTALL = ("-m", "pip", "install", "--quiet", "-e", ".", "-c", "constraints.txt")
LONGEST = 1800  # seconds, after which something hangs


def install(clone, name):
    """(its python, seconds): a virtual environment beside the clone, with the clone in it."""
    folder = clone.parent / name
    began = time.perf_counter()
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([python, *INSTALL], cwd=clone, check=True, env=clean(folder), timeout=LONGEST)
    return python, time.perf_counter() - began


def clean(folder):
    """This process's environment without what would lead into another installation, and with caches of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TORCHINDUCTOR"))}
    path = f"{folder / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"VIRTUAL_ENV": str(folder), "PATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def start(python, clone, *words):
    """`invoke` with these words in the clone, its output in a pipe."""
    command = [python, "-m", "invoke", *words]
    env = clean(python.parent.parent)
    return subprocess.Popen(command, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def first_sample(python, clone):
    """(seconds to the first update's line, to the first sample) of a quick training, which is then stopped."""
    began, update, sample = time.perf_counter(), None, None
    with (clone / "train.log").open("wb") as log:
        command = [python, "-m", "invoke", "train", "--mode", "quick", "--data", "python-docs"]
        env = clean(python.parent.parent)
        child = subprocess.Popen(command, cwd=clone, env=env, stdout=log, stderr=log)
        while child.poll() is None and time.perf_counter() - began < LONGEST:
            time.sleep(0.1)
            if not update and b"update      1/" in (clone / "train.log").read_bytes():
                update = time.perf_counter() - began
            if not sample and any(path.stat().st_size for path in clone.glob("runs/*/samples.md")):
                sample = time.perf_counter() - began
                child.send_signal(signal.SIGINT)
    if child.poll() is None:
        child.kill()
        child.wait()
    if child.returncode != 130 or not update or not sample:
        raise click.ClickException((clone / "train.log").read_text(errors="replace")[-2000:])
    return update, sample


def listed(python, clone):
    """Seconds of `invoke --list`, the median of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert b"train" in start(python, clone, "--list").communicate(timeout=60)[0]
        times.append(time.perf_counter() - began)
    return sorted(times)[2]


def first_token(python, clone):
    """Seconds from the command to the first text that continues the prompt."""
    began, seen = time.perf_counter(), b""
    child = start(python, clone, "generate", "--preset", "balanced", "--prompt", "Return the")
    with child:
        while b"Return the " not in seen.partition(b"\n")[2] and (more := os.read(child.stdout.fileno(), 4096)):
            seen += more
        seconds = time.perf_counter() - began
        child.stdout.read()
    if child.returncode or b"Return the " not in seen:
        raise click.ClickException(seen.decode(errors="replace")[-2000:])
    return seconds


@click.command()
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Also write the result there.")
def main(file):
    """Install, train, list and generate as somebody would who has just come."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "gptcore")
        subprocess.run(["git", "clone", "--quiet", HOUSE, clone], check=True)
        install(clone, "warming")
        shutil.rmtree(clone.parent / "warming")
        python, installed = install(clone, "environment")
        click.echo(f"installed in {installed:.1f} s, without the downloads")
        update, sample = first_sample(python, clone)
        click.echo(f"first update after {update:.1f} s, first sample after {sample:.1f} s")
        first, tasks = first_token(python, clone), listed(python, clone)  # the first one may build the kernels
        token = sorted(first_token(python, clone) for _ in range(3))[1]
        click.echo(f"invoke --list {tasks:.2f} s; first token after {token:.2f} s, the very first time {first:.2f} s")
    result = {
        "machine": card_name("cpu"), "cores": os.cpu_count(), "torch": torch.__version__,
        "python": platform.python_version(), "command": "python benchmarks/first_contact.py",
        "install_seconds": round(installed, 1), "first_update_seconds": round(update, 1),
        "first_sample_seconds": round(sample, 1),
        "list_seconds": round(tasks, 2), "first_token_seconds": round(token, 2),
        "very_first_token_seconds": round(first, 2),
    }  # fmt: skip
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
