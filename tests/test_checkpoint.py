"""Run folders: a step is whole or does not exist, whatever happens while it is written."""

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcore import checkpoint, device, tree

HOUSE = Path(__file__).resolve().parent.parent


class Words:
    """A tokenizer as far as a run folder cares: it can save itself."""

    def save(self, path):
        Path(path).write_text('{"name": "words"}', encoding="utf-8")


def state_of(step):
    """Parameters, optimizer and generator states that tell their step."""
    g = device.generator("checkpoint", step)
    params = {
        "embed": {"w": torch.randn(8, 4, generator=g)},
        "blocks": [{"attn": {"q": {"w": torch.randn(4, 4, generator=g)}}, "scale": torch.tensor(float(step))}] * 2,
    }
    optimizer = {f"{name}/exp_avg": torch.randn(leaf.shape, generator=g) for name, leaf in tree.walk(params)}
    return {"params": tree.map(torch.clone, params), "optimizer": optimizer, "rng": {"order": g.get_state()}}


def save(run_dir, step, **state):
    return checkpoint.save_step(run_dir, step, **state_of(step), state={"epoch": 0, "loss": 1 / step} | state)


def same(a, b):
    """Are two nested trees equal, bit for bit?"""
    a, b = dict(tree.walk(a)), dict(tree.walk(b))
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def run(tmp_path):
    return checkpoint.create_run(tmp_path / "runs", "quick-001", {"mode": "quick", "config": {"n_layer": 2}}, Words())


def test_a_step_comes_back_bit_for_bit(run):
    loaded = checkpoint.load_step(save(run, 7, losses=[0.1, math.pi]))
    for part, saved in state_of(7).items():
        assert same(getattr(loaded, part), saved)
    assert (loaded.state["step"], loaded.state["losses"]) == (7, [0.1, math.pi])
    assert same(checkpoint.load_params(run / "checkpoints" / "step-0000007"), state_of(7)["params"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool], ids=str)
def test_every_dtype_and_layout_comes_back(run, dtype):
    leaf = torch.arange(6).reshape(2, 3).to(dtype).T  # not contiguous
    parts = {"params": {"a": {"w": leaf}, "b": torch.zeros(0, 3)}, "optimizer": {}, "rng": {}}
    loaded = checkpoint.load_step(checkpoint.save_step(run, 1, **parts, state={}))
    assert same(loaded.params, {"a": {"w": leaf.contiguous()}, "b": torch.zeros(0, 3)})


def test_what_is_loaded_is_not_the_file(run):
    """Seen to fail without the clone: safetensors maps the file, and the tensors would change with it."""
    params = checkpoint.load_params(path := save(run, 1))
    os.truncate(path / "model.safetensors", 0)
    assert same(params, state_of(1)["params"])


def test_a_run_has_exactly_its_files(run):
    save(run, 1000)
    checkpoint.append_metrics(run, {"kind": "start"})
    parts = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
    expected = [f"checkpoints/step-0001000/{part}" for part in parts]
    assert files(run) == [*expected, "latest", "metrics.jsonl", "run.json", "tokenizer.json"]
    assert (run / "latest").read_text(encoding="utf-8") == "step-0001000\n"


def test_safetensors_carry_the_configuration(run):
    from safetensors import safe_open

    with safe_open(save(run, 1) / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["gptcore"])["config"] == {"n_layer": 2}
        assert "blocks.0.attn.q.w" in file.keys()  # noqa: SIM118 (not a dict)


def test_names_count_and_never_overwrite(run):
    root = run.parent
    assert checkpoint.next_name(root, "quick") == "quick-002"
    assert checkpoint.next_name(root, "full") == "full-001"
    with pytest.raises(ValueError, match=r"run: expected a new name, got quick-001, which exists in"):
        checkpoint.create_run(root, "quick-001", {"mode": "other"}, Words())
    assert checkpoint.read_run(run)["mode"] == "quick"


def test_runs_that_begin_at_once_have_names_of_their_own(tmp_path):
    """Seen to fail when the name was chosen before the folder was made."""
    together = threading.Barrier(8)

    def begin(_):
        together.wait()
        return [checkpoint.create_run(tmp_path, None, {"mode": "quick"}, Words()).name for _ in range(10)]

    with ThreadPoolExecutor(8) as threads:
        names = [name for several in threads.map(begin, range(8)) for name in several]
    assert sorted(names) == [f"quick-{n:03d}" for n in range(1, 81)]


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/etc"])
def test_a_run_name_is_a_plain_name(tmp_path, name):
    with pytest.raises(ValueError, match="run: expected a plain name"):
        checkpoint.create_run(tmp_path, name, {}, Words())
    assert not files(tmp_path)


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path):
    class Broken:
        def save(self, path):
            raise OSError(28, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left"):
        checkpoint.create_run(tmp_path, "quick-001", {}, Broken())
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_seen(run, data):
    """Each byte of each file of a step counts, state.json's own digits included."""
    path = save(run, 1)
    file = path / data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
    whole = file.read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    try:
        if file.name == "state.json" and _same_json(file.read_bytes(), whole):
            return  # white space, or the case of an exponent: the same values
        with pytest.raises(ValueError, match=rf"{file.name}: "):
            checkpoint.load_step(path)
    finally:
        file.write_bytes(whole)


def _same_json(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
def test_a_damaged_file_is_named_in_one_line(run, part):
    path = save(run, 1)
    whole = (path / part).read_bytes()
    for damage in (whole[:-5], b"", None):
        (path / part).unlink() if damage is None else (path / part).write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{part}: ") as error:
            checkpoint.load_step(path)
        assert "\n" not in str(error.value)


def test_resume_takes_the_newest_step_that_holds(run):
    for step in (10, 20, 30):
        save(run, step)
    (run / "checkpoints/step-0000030/model.safetensors").write_bytes(b"torn")
    (run / "checkpoints/step-0000020/state.json").write_text("{", encoding="utf-8")
    path, bad = checkpoint.find_resumable(run)
    assert path.name == "step-0000010"
    assert [line.split(": ")[0].split("checkpoints/")[1] for line in bad] == [
        "step-0000030/model.safetensors",
        "step-0000020/state.json",
    ]
    assert checkpoint.find_resumable(run / "checkpoints/step-0000010") == (path, [])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.find_resumable(run / "checkpoints/step-0000030")


def test_a_damaged_step_is_written_again_and_a_whole_one_is_not(run):
    """Seen to fail when a state.json alone was enough: the resumed run ended with the damaged step."""
    path = save(run, 1)
    written = (path / "state.json").stat().st_mtime_ns
    save(run, 1)
    assert (path / "state.json").stat().st_mtime_ns == written
    (path / "model.safetensors").write_bytes(b"torn")
    save(run, 1)
    assert same(checkpoint.load_params(path), state_of(1)["params"])


def test_another_layout_is_refused(run):
    path = save(run, 1)
    (path / "state.json").write_text('{"version": 2}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"state.json: expected layout version 1, got 2"):
        checkpoint.load_step(path)


def test_a_step_under_another_name_is_refused(run):
    path = save(run, 1)
    path.rename(path.with_name("step-0000002"))
    with pytest.raises(ValueError, match="expected the state of step-0000002, got step-0000001"):
        checkpoint.load_step(path.with_name("step-0000002"))


def test_run_means_a_run_a_step_a_name_or_the_newest(run, tmp_path):
    root = run.parent
    first, second = save(run, 10), save(run, 20)
    checkpoint.mark(run, "best", 10)
    checkpoint.create_run(root, "empty-001", {}, Words())  # newer, but there is nothing to use
    for name in (None, "quick-001", run, str(run)):
        assert checkpoint.find_step(name, "best", root) == first
        assert checkpoint.find_step(name, "latest", root) == second
        assert checkpoint.find_run(name, root) == run
    for name in (first, "quick-001/checkpoints/step-0000010"):
        assert checkpoint.find_step(name, "latest", root) == first
        assert checkpoint.find_run(name, root) == run


def test_without_a_best_step_the_latest_is_used(run):
    latest = save(run, 10)
    assert checkpoint.find_step(run, "best") == latest


@pytest.mark.parametrize("name", [None, "nope", "/nowhere/run", "model.pt"])
def test_no_run_names_those_that_exist(run, name):
    with pytest.raises(ValueError, match=r"runs in .*: quick-001; invoke train --mode quick makes one"):
        checkpoint.find_step(name, root=run.parent)


def test_no_runs_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"got nothing; runs in .*: none; invoke train --mode quick"):
        checkpoint.find_step(root=tmp_path)


def test_a_missing_step_is_refused(run):
    save(run, 10)
    with pytest.raises(ValueError, match=r"expected a complete step, got .*step-0000011"):
        checkpoint.find_step(run / "checkpoints/step-0000011")
    (run / "checkpoints/step-0000010/state.json").unlink()
    with pytest.raises(ValueError, match="expected a run with a saved step"):
        checkpoint.find_step(run)


def test_a_listing_reads_no_weights(run):
    for step in (1, 2, 10_000_000):
        path = save(run, step, epoch_end=step == 2)
        (path / "model.safetensors").write_bytes(b"")
    checkpoint.mark(run, "best", 2)
    (info,) = checkpoint.list_runs(run.parent)
    assert [step.step for step in info.steps] == [1, 2, 10_000_000]
    assert (info.latest, info.best, info.damaged) == (10_000_000, 2, [])
    assert info.steps[0].n_bytes == sum(f["bytes"] for f in info.steps[0].state["files"].values()) > 500


def test_a_broken_run_does_not_hide_the_others(run):
    save(run, 1)
    broken = checkpoint.create_run(run.parent, "quick-002", {}, Words())
    (broken / "run.json").write_text("{", encoding="utf-8")
    infos = {info.path.name: info for info in checkpoint.list_runs(run.parent)}
    assert len(infos["quick-001"].steps) == 1
    assert "run.json: damaged" in infos["quick-002"].damaged[0]


def test_retention_keeps_epoch_ends_best_and_the_last_three(run):
    for step in range(1, 9):
        save(run, step, epoch_end=step == 2)
    checkpoint.mark(run, "best", 3)
    assert checkpoint.prune(run) == [1, 4, 5]
    assert [info.step for info in checkpoint.read_info(run).steps] == [2, 3, 6, 7, 8]
    assert checkpoint.prune(run) == []
    assert not list(run.rglob(".tmp-*"))


def test_retention_of_a_young_run_deletes_nothing(run):
    """Seen to fail with a slice to len(others) - keep, which is negative here."""
    save(run, 1)
    save(run, 2)
    assert checkpoint.prune(run) == []


def test_sweep_removes_what_a_killed_process_left(run):
    save(run, 1)
    checkpoint.append_metrics(run, {"kind": "train", "step": 1})
    before = files(run)
    torn = run / "checkpoints" / ".tmp-new-step-0000002-99"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (run / ".tmp-new-latest-99").write_text("step-", encoding="utf-8")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "tr')
    checkpoint.sweep(run)
    checkpoint.append_metrics(run, {"kind": "train", "step": 2})
    assert files(run) == before
    assert [row["step"] for row in checkpoint.read_metrics(run)] == [1, 2]


def test_of_two_rows_for_a_step_the_later_counts(run):
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0))]
    samples = [{"kind": "sample", "step": 3, "prompt": prompt, "text": "x"} for prompt in ("The", "In the")]
    checkpoint.append_metrics(run, {"kind": "start"}, *rows, *samples, {"kind": "validation", "step": 3, "loss": 9.0})
    checkpoint.append_metrics(run, {"kind": "start"}, {"kind": "train", "step": 2, "loss": 2.5})
    found = checkpoint.read_metrics(run)
    assert [(row["step"], row["loss"]) for row in found if row["kind"] == "train"] == [(1, 3.0), (2, 2.5), (3, 1.0)]
    assert [row["kind"] for row in found].count("sample") == 2
    assert [row["kind"] for row in found].count("start") == 2


def test_a_torn_last_line_is_left_out_and_any_other_is_named(run):
    assert checkpoint.read_metrics(run) == []
    (run / "metrics.jsonl").write_text('{"kind": "start"}\n{"kind": "tra', encoding="utf-8")
    assert checkpoint.read_metrics(run) == [{"kind": "start"}]
    (run / "metrics.jsonl").write_text('{"kind": "start"}\n{"kind": "tra\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: expected a JSON object a line"):
        checkpoint.read_metrics(run)
    (run / "metrics.jsonl").write_text("5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: expected a JSON object a line, got int$"):
        checkpoint.read_metrics(run)


def test_equal_steps_are_equal_files(run):
    """Byte by byte. Seen to fail with several entries of metadata, which safetensors writes in any order."""
    other = checkpoint.create_run(run.parent, "other", checkpoint.read_run(run), Words())
    first, second = save(run, 1), save(other, 1)
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [
        path.read_bytes() for path in sorted(second.iterdir())
    ]


def test_what_is_known_later_is_added_to_a_step(run):
    """The weights stay as they are. Seen to fail when a whole step was left alone: its validation was lost."""
    path = save(run, 1)
    written = (path / "model.safetensors").stat().st_mtime_ns
    checkpoint.save_step(run, 1, **state_of(1), state={"validation_loss": 2.5})
    assert checkpoint.load_step(path).state["validation_loss"] == 2.5
    assert (path / "model.safetensors").stat().st_mtime_ns == written


def test_other_weights_replace_a_whole_step(run):
    """A run that went back and on differently. Seen to fail when any whole step was kept: the state told of others."""
    save(run, 9)
    other = checkpoint.save_step(run, 9, **state_of(10), state={"loss": 0.5})
    loaded = checkpoint.load_step(other)
    assert same(loaded.params, state_of(10)["params"])
    assert same(loaded.optimizer, state_of(10)["optimizer"])
    assert loaded.state["loss"] == 0.5


def test_the_best_step_is_what_its_state_says(run):
    """Killed before best was written, a run finds it again. Seen to fail with mark as a step of its own."""
    for step, best in ((10, 10), (20, 10), (30, 30)):
        save(run, step, best_step=best)
        assert checkpoint.marked(run, "best") == best
    (run / "best").unlink()
    checkpoint.point_at(run / "checkpoints/step-0000030")
    assert checkpoint.marked(run, "best") == 30


def test_going_back_names_what_was_there(run):
    """latest and best never name a step that went."""
    for step in (5, 10, 20):
        save(run, step, **({"best_step": step} if step > 5 else {}))
    checkpoint.point_at(run / "checkpoints/step-0000010")
    assert checkpoint.remove_later(run / "checkpoints/step-0000010") == [20]
    assert [checkpoint.marked(run, word) for word in ("latest", "best")] == [10, 10]
    assert checkpoint.find_resumable(run)[0].name == "step-0000010"
    checkpoint.point_at(run / "checkpoints/step-0000005")  # nothing had been validated yet
    assert [checkpoint.marked(run, word) for word in ("latest", "best")] == [5, None]


# Saving in the background


def test_a_saver_writes_what_was_there_when_it_was_asked(run):
    """Seen to fail without the copy: the next update changes the leaves while they are being written."""
    parts, state = state_of(5), {"losses": [1.0], "best_step": 5}
    with checkpoint.Saver(run) as saver:
        saver.save(5, **parts, state=state)
        tree.map(lambda leaf: leaf.zero_(), parts["params"])
        parts["rng"]["order"].zero_()
        state["losses"].append(2.0)
    loaded = checkpoint.load_step(checkpoint.find_step(run, "best"))
    assert same(loaded.params, state_of(5)["params"])
    assert same(loaded.rng, state_of(5)["rng"])
    assert loaded.state["losses"] == [1.0]


def test_a_saver_prunes(run):
    with checkpoint.Saver(run, keep=2) as saver:
        for step in range(1, 6):
            saver.save(step, **state_of(step), state={"epoch_end": step == 1})
    assert [info.step for info in checkpoint.read_info(run).steps] == [1, 4, 5]


@pytest.mark.parametrize("when", ["next save", "join", "exit"])
def test_a_savers_error_is_raised_where_it_is_waited_for(run, when):
    saver = checkpoint.Saver(run)
    saver.save(1, **state_of(1), state={})
    saver.join()
    (run / "run.json").unlink()  # a save reads it
    saver.save(2, **state_of(2), state={})
    again = lambda: saver.save(3, **state_of(3), state={})
    wait = {"next save": again, "join": saver.join, "exit": lambda: leave(saver)}[when]
    with pytest.raises(ValueError, match=r"run.json: expected a file, got none"):
        wait()
    saver.join()  # told once


def leave(saver):
    with saver:
        pass


# Crashes


def test_files_reach_the_disk_before_their_names(run, monkeypatch):
    """fsync of the four files and of their folder, then the rename, then fsync of the parent: for a power cut."""
    seen, fsync, rename = [], os.fsync, os.rename

    def spy_fsync(handle):
        seen.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def spy_rename(source, target):
        inodes = {"folder": os.stat(source).st_ino} | {p.name: p.stat().st_ino for p in Path(source).iterdir()}
        seen.append(("rename", inodes))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    path = save(run, 1)
    at = next(i for i, (what, _) in enumerate(seen) if what == "rename")
    inodes = seen[at][1]
    synced = [inode for _, inode in seen[:at]]
    assert len(inodes) == 5
    assert set(inodes.values()) <= set(synced)
    assert synced[-2:] == [inodes["state.json"], inodes["folder"]]
    assert seen[at + 1] == ("fsync", path.parent.stat().st_ino)


def test_a_new_run_reaches_the_disk(tmp_path, monkeypatch):
    """Its two files, and last the folder that holds its name. Seen to fail without the last."""
    seen, fsync = [], os.fsync

    def spy(handle):
        seen.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    run = checkpoint.create_run(tmp_path, "quick-001", {}, Words())
    assert {(run / name).stat().st_ino for name in ("run.json", "tokenizer.json")} <= set(seen)
    assert seen[-1] == tmp_path.stat().st_ino


def child(code, *arguments):
    """Run code in a Python of its own, with this file's functions at hand; returns the finished process."""
    head = f"import sys; sys.path[:0] = [{str(HOUSE)!r}, {str(HOUSE / 'tests')!r}]\nfrom test_checkpoint import *\n"
    words = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks, which this system cannot")
def test_kill_9_at_every_call_leaves_a_whole_step(run):
    """A process that saves is killed at its 1st, 2nd, ... call to the file system, until one comes through."""
    done = child(
        """
        import shutil, signal
        begin, n, newest = Path(sys.argv[1]), 0, 1
        save(begin, 1)
        checkpoint.mark(begin, "best", 1)
        while True:
            n += 1
            run = begin.with_name("killed")
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(begin, run)
            pid = os.fork()
            if pid == 0:
                left = n
                def count(event, _):
                    global left
                    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.scandir"):
                        left -= 1
                        if left == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(count)
                for step in (2, 3):
                    checkpoint.append_metrics(run, {"kind": "train", "step": step})
                    save(run, step)
                    checkpoint.mark(run, "best", step)
                    checkpoint.prune(run, keep=1)
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            path, bad = checkpoint.find_resumable(run)
            assert not bad, bad
            assert None not in (checkpoint.marked(run, "best"), checkpoint.marked(run, "latest"))
            for found in (path, checkpoint.find_step(run, "best"), checkpoint.find_step(run, "latest")):
                assert same(checkpoint.load_params(found), state_of(int(found.name[5:]))["params"])
            for found in run.glob("checkpoints/step-*"):
                checkpoint.check_step(found)
            assert int(path.name[5:]) >= newest
            newest = int(path.name[5:])
            checkpoint.read_metrics(run)
            checkpoint.sweep(run)
            assert not list(run.rglob(".tmp-*"))
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
        assert newest == 3
        print(n)
        """,
        run,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50  # that many deaths


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks, which this system cannot")
def test_kill_9_at_any_moment_leaves_a_whole_step(run):
    """The same from outside, within the writing of larger files: 12 deaths, each at a random moment after a save."""
    done = child(
        """
        import random, signal, time
        run, chance = Path(sys.argv[1]), random.Random(1)
        big = torch.zeros(300_000)
        def save_big(step):
            parts = {"params": {"w": big + step}, "optimizer": {"w/exp_avg": big - step}, "rng": {}}
            checkpoint.save_step(run, step, **parts, state={})
            checkpoint.prune(run)
        save_big(1)
        for _ in range(12):
            told, tells = os.pipe()
            pid = os.fork()
            if pid == 0:
                step = int(checkpoint.find_resumable(run)[0].name[5:])
                while True:
                    step += 1
                    save_big(step)
                    os.write(tells, b".")
            os.read(told, 1)  # it has saved once
            time.sleep(chance.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            path, bad = checkpoint.find_resumable(run)
            step, loaded = int(path.name[5:]), checkpoint.load_step(path)
            assert not bad, bad
            assert torch.equal(loaded.params["w"], big + step)
            checkpoint.sweep(run)
        print(step)
        """,
        run,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 12  # each child saved at least once


@pytest.mark.parametrize("n_bytes", [64, 600, 900, 40_000])
def test_a_full_disk_is_one_line_and_costs_no_earlier_step(run, n_bytes):
    """A limit on the size of a file stands in for the disk: it fails in state.json, in a small and in a large file."""
    pytest.importorskip("resource", reason="this system limits no file sizes")
    save(run, 1)
    before = files(run)
    done = child(
        """
        import resource
        run, n_bytes = Path(sys.argv[1]), int(sys.argv[2])
        parts = state_of(2)
        parts["params"]["embed"]["w"] = torch.zeros(20_000 if n_bytes > 10_000 else 8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        try:
            checkpoint.save_step(run, 2, **parts, state={})
        except OSError as error:
            print(f"{error.filename}: {error.strerror}")
        """,
        run,
        n_bytes,
    )
    (line,) = done.stdout.splitlines()
    assert "step-0000002" in line
    assert "File too large" in line
    assert files(run) == before
    assert same(checkpoint.load_step(checkpoint.find_step(run, "latest")).params, state_of(1)["params"])
