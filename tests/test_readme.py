"""Law 9: what the README shows runs as written."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="processes as tests/typed.py makes them are POSIX's")

from typed import SIGTERM, Command, typed

HOUSE = Path(__file__).resolve().parent.parent
README = (HOUSE / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
SHOWN = re.findall(r"^```\n(.*?)^```", README, re.S | re.M) + re.findall(r"`(invoke [^`]+)`", README)
COMMANDS = sorted(
    {part.strip() for text in SHOWN for part in re.split(r"&&|\n", text) if part.strip().startswith("invoke")}
)
NOT_HERE = {
    "invoke test": "it would run itself",
    "invoke lint": "CI runs it first",
    "invoke docs": "needs an extra; tests/test_docs.py runs it",
    "invoke sanitize": "a minute; CI runs it last",
    "invoke benchmark": "minutes; test_benchmark.py runs one case",
    "invoke TASK --help": "stands for all",
    "invoke download --tokens 50000000": "the hub's 150 MB; tests/test_download_command.py has a hub of its own",
    "invoke compile-gpu": "a minute; CI runs it before the tests",
    "invoke pretrained phi-2": "5.6 GB; tests/test_pretrained_commands.py has a hub of its own",
    "invoke import FILE": "stands for all",
    "invoke harness --run RUN --tasks …": "needs an extra; tests/test_scoring.py runs it",
}
if shutil.which(os.environ.get("CXX", "c++")) is None:
    NOT_HERE["invoke build"] = "no C++ compiler"
# Five minutes become seconds: the same command on a smaller model.
SMALLER = "--epochs 2 --n-layer 1 --d-model 32 --n-context 64 --accumulation-steps 1 --save-every 2 --steps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a text in it."""
    path = tmp_path_factory.mktemp("readme")
    lines = (f"A note of the {n}th day: the cat sat on the mat, and it was the best of times.\n\n" for n in range(400))
    (path / "notes.txt").write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_runs(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_ten_lines_learn():
    """The last update's loss is below half of the first one's."""
    done = subprocess.run([sys.executable, "-c", SNIPPETS[0]], cwd=HOUSE, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    losses = [float(line.split()[1]) for line in lines[:60]]
    assert losses[-1] < 0.5 * losses[0]


def test_the_readme_shows_commands():
    assert {"invoke train --mode quick", "invoke train --resume", "invoke runs", "invoke doctor"} <= set(COMMANDS)


def test_every_command_runs(folder):
    """In the order of a first visit: train, then the rest; a run is stopped half-way before --resume."""
    trained = typed("train", "--mode", "quick", *SMALLER.split(), "6", cwd=folder)
    assert trained.status == 0, trained.stderr
    for command in COMMANDS:
        heavy = command.startswith("invoke benchmark ")  # minutes; test_benchmark.py runs one case
        if heavy or command in NOT_HERE or command == "invoke train --mode quick":
            continue
        if command == "invoke train --resume":
            interrupt_a_run(folder)
        done = typed(*shlex.split(command)[1:], cwd=folder, stdin="The\nquit\n")
        assert done.status == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip(), command


def interrupt_a_run(folder):
    """A run that has saved, but not finished."""
    child = Command("train", "--mode", "quick", *SMALLER.split(), "400", cwd=folder)
    child.wait_for(lambda: "\nupdate" in child.stdout)
    child.signal(SIGTERM)
    assert child.end().status == 143


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (HOUSE / target).exists(), target


def test_the_numbers_of_the_modes_are_the_codes():
    from gptcore.config import architecture
    from gptcore.model import count_params
    from tools.modes import MODES, N_CONTEXT

    for name, mode in MODES.items():
        n_vocab = 4096 if mode["tokenizer"] == "bpe:4096" else 100_277
        sizes = {size: mode[size] for size in ("n_layer", "d_model", "n_head", "d_ff")}
        count = count_params(architecture(mode["arch"], n_vocab=n_vocab, n_context=N_CONTEXT, **sizes))
        row = next(line for line in README.splitlines() if line.startswith(f"| {name} "))
        assert f"| {mode['n_layer']} | {mode['d_model']} | {mode['n_head']} |" in row
        assert f"{count:,}" in row
        assert f"{mode['tokens_per_epoch'] // 10**6}M" in row


def test_the_speeds_are_the_committed_ones():
    result = json.loads((HOUSE / "benchmarks/results/train.json").read_text(encoding="utf-8"))
    for shape in result["shapes"].values():
        ours, theirs = shape["sides"]["gptcore, explicit"], shape["sides"]["modules"]
        speeds = [f"{side['median_tokens_per_second']:,.0f}" for side in (ours, theirs)]
        row = f"| {' | '.join(speeds)} | {ours['ratio_of_medians']:.2f} |"
        assert row in README


def test_the_decoder_is_as_fast_as_the_committed_figures_say():
    for model in ("124M", "7M"):
        found = json.loads((HOUSE / f"benchmarks/results/decode-{model}.json").read_text(encoding="utf-8"))
        for case in found["benchmarks"]:
            told, kind = case["extra_info"], case["group"].split(",")[0].split()[-1]
            if "context 128" in case["group"]:
                speed = f"{told['n_tokens'] * 1e6 / told['native']['us']:,.0f}"
                ratios = [f"{told[peer]['ratio']:.{digits}f}" for peer, digits in (("llama.cpp", 2), ("eager", 1))]
                share = f"{100 * told['read']['ratio']:.0f} %"
                assert f"| {model} | {kind} | {speed} | {share} | {' | '.join(ratios)} |" in README
