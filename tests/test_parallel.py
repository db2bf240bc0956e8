"""Teams of processes: they learn what one learns, hold what was predicted, and go on in other numbers."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from teamwork import CONFIG, KINDS, N_STEPS, learn, options_for

from gptcore import generator, init_params, optim, parallel
from gptcore.config import architecture
from gptcore.model import Leaf, param_spec
from gptcore.train import TrainOptions

HERE = Path(__file__).resolve().parent
CLOSE = {"rel": 1e-6, "abs": 0}


def environment():
    """This process's, with the house in reach and one thread a process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def team(size, folder, *task):
    """torchrun in a process group of its own, on a port that is free."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([*torchrun, str(HERE / "teamwork.py"), str(folder), *task], env=environment(), **pipes)


def ended(child):
    """Its output; it must end well, and nothing that it started may be left."""
    text = child.communicate(timeout=240)[0]
    assert child.returncode == 0, text
    assert "terminate called" not in text
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    return text


@pytest.fixture(scope="module")
def alone():
    """What one process sees, by optimizer and number of passes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seen = {(kind, n): learn(parallel.ALONE, options_for(kind, n, 1))[2] for kind, n in KINDS}
    torch.set_num_threads(threads)
    return seen


EVERY = [f"{way} {kind} {n_passes}" for way in parallel.WAYS for kind, n_passes in KINDS]
FEW = ["ddp muon 1", "zero2 adamw 4"]  # zero3 with Muon: the test below


@pytest.mark.parametrize(
    ("size", "which"),
    [(2, FEW), *(pytest.param(n, EVERY, marks=pytest.mark.slow) for n in (2, 4))],
    ids=["2", "2 all", "4 all"],
)
def test_teams_learn_what_one_process_learns_and_hold_what_was_predicted(size, which, alone, tmp_path):
    """Twenty updates. Seen to fail with a mean of the processes' means, and with norms of the own part."""
    ended(team(size, tmp_path, "every-way", ",".join(which)))
    found = [json.loads((tmp_path / f"ways-{size}-{rank}.json").read_text()) for rank in range(size)]
    for name in which:
        way, kind, n_passes = name.split()
        losses, norms = zip(*alone[kind, int(n_passes)], strict=True)
        assert len(losses) == N_STEPS
        for mine in found:
            seen = list(zip(*mine[name]["seen"], strict=True))
            assert seen[0] == pytest.approx(losses, **CLOSE)
            assert seen[1] == pytest.approx(norms, **CLOSE)
        held = parallel.bytes_a_process(param_spec(CONFIG), options_for(kind, 1, 1), way, size)
        for part in ("weights", "state"):
            assert 4 * max(mine[name][part] for mine in found) == held[part], (name, part)


def test_a_run_goes_on_in_teams_of_other_sizes(alone, tmp_path):
    """One process, two, four: seven updates each from the file of the one before are the undisturbed training."""
    for size in (1, 2, 4):
        if size > 1:
            ended(team(size, tmp_path, "go-on"))
        else:
            command = [sys.executable, HERE / "teamwork.py", tmp_path, "go-on"]
            subprocess.run(command, env=environment(), check=True, timeout=120)
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    expected = alone["muon", 1]
    assert [loss for loss, _ in seen] == pytest.approx([loss for loss, _ in expected], **CLOSE)


def test_a_dead_process_ends_all_with_a_message(tmp_path):
    child = team(2, tmp_path, "die")
    text = child.communicate(timeout=120)[0]
    assert child.returncode != 0
    assert "exitcode  : -9" in text
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_alone_everything_is_as_it_was():
    params = init_params(CONFIG, generator(1))
    options = TrainOptions(n_steps=1)
    assert parallel.ALONE.place(params, CONFIG, options) is params
    assert list(parallel.ALONE.sequences(5)) == [0, 1, 2, 3, 4]
    assert parallel.gather_team("ddp") is parallel.ALONE
    with pytest.raises(ValueError, match="parallel: expected one of ddp, zero2, zero3, got 'fsdp'"):
        parallel.gather_team("fsdp")
    with pytest.raises(ValueError, match="batch: expected a multiple of 2 sequences, one share a process, got 3"):
        parallel.Team("ddp", 0, 2).sequences(3)


def test_what_is_sent_in_an_update():
    """By hand: AdamW over one block of 10 numbers and a head of 6, two processes, three passes."""
    spec = {"blocks.0.w": Leaf((5, 2), decay=True), "head.w": Leaf((3, 2), decay=True)}
    options = TrainOptions(n_steps=1)
    sent = {way: parallel.bytes_an_update(spec, options, way, 2, n_passes=3) for way in parallel.WAYS}
    assert sent == {"ddp": 4 * 2 * 16 // 2, "zero2": 4 * 2 * 16 // 2, "zero3": 4 * 3 * (3 * 10 + 2 * 6) // 2}
    muon = TrainOptions(n_steps=1, optimizer=optim.Options(kind="muon"))
    assert parallel.bytes_a_process(spec, muon, "zero3", 2) == {
        "weights": 4 * (10 + 4), "gradients": 4 * (10 + 4), "state": 4 * (10 + 2 * 4),
    }  # fmt: skip


PAGE = (HERE.parent / "docs/many-devices.md").read_text(encoding="utf-8")
GPT2 = {"n_vocab": 50_257, "n_context": 1024}
SHAPES = {
    "GPT-2": ("gpt2", GPT2 | {"n_layer": 12, "d_model": 768, "n_head": 12}),
    "GPT-2 XL": ("gpt2", GPT2 | {"n_layer": 48, "d_model": 1600, "n_head": 25}),
    "Phi-2": ("phi", {"n_vocab": 51_200, "n_context": 2048, "n_layer": 32, "d_model": 2560, "n_head": 32}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_pages_table_is_what_the_functions_count(name):
    kind, sizes = SHAPES[name]
    spec, options = param_spec(architecture(kind, **sizes)), TrainOptions(n_steps=1)
    n = sum(math.prod(leaf.shape) for leaf in spec.values())
    for way in parallel.WAYS:
        cells = [f"| {name} | {n:,} | {way}"]
        for size in (8, 64):
            held = sum(parallel.bytes_a_process(spec, options, way, size).values())
            sent = parallel.bytes_an_update(spec, options, way, size)
            cells += [f"{held / 1e9:.2f}", f"{sent / 1e9:.2f}"]
        assert " | ".join(cells) + " |" in PAGE


def test_the_pages_program_runs_alone_and_in_a_team(tmp_path):
    program = tmp_path / "many.py"
    program.write_text(re.search(r"^```python\n(.*?)^```", PAGE, re.S | re.M)[1], encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {"capture_output": True, "text": True, "env": environment(), "timeout": 120}
    one, two = (subprocess.run([sys.executable, *words, program], **ways) for words in ([], command))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    losses = [[float(line.split()[1]) for line in done.stdout.splitlines()] for done in (one, two)]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
