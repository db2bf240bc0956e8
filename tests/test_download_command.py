"""invoke download, invoke data and invoke train on a stream, typed, with a small hub on loopback."""

import hashlib
import shutil
import threading

import pytest
from hub import serving, write_fineweb
from typed import SIGINT, typed
from typed import Command as Typed

from gptcore import checkpoint
from gptcore.data import budget, shards

SHARD = {"GPTCORE_SHARD_TOKENS": "40000", "HF_HUB_OFFLINE": "0"}
TINY = ["--n-layer", "1", "--d-model", "32", "--n-context", "64", "--tokenizer", "byte", "--accumulation-steps", "1"]
STEPS = ["--steps", "507", "--epochs", "1", "--save-every", "50", "--tokens-per-epoch", "520000"]


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory):
    """The folder of a small FineWeb-Edu."""
    root = tmp_path_factory.mktemp("fineweb")
    write_fineweb(root)
    return root


def surroundings(folder, address="http://127.0.0.1:9"):
    """The environment of a command: which hub, and where its libraries keep things."""
    return SHARD | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home")}


def weights(run):
    return [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.glob("checkpoints/step-0000507/*.saf*"))
    ]


def test_a_run_that_is_stopped_while_shards_arrive_is_the_undisturbed_one(fineweb, tmp_path):
    """An interrupt while it waits for its last shard, against a run whose hub was quick."""
    with serving(fineweb) as hub:
        around = surroundings(tmp_path, hub.address)
        calm = typed("train", "--data", "fineweb-edu", "--run", "calm", *TINY, *STEPS, cwd=tmp_path, **around)
        assert (calm.status, calm.stderr) == (0, "")
        go, begun = threading.Event(), lambda: list((tmp_path / "other").glob("*/*/train-00000.json"))
        hub.trouble = lambda path: go.wait(60) and None if path.endswith("002_00000.parquet") and begun() else None
        words = ["--data", "fineweb-edu", "--run", "slow", "--cache", "other", *TINY, *STEPS]
        slow = Typed("train", *words, cwd=tmp_path, **around)
        run = tmp_path / "runs/slow"
        slow.wait_for(
            lambda: (run / "metrics.jsonl").exists() and any(r["kind"] == "train" for r in checkpoint.read_metrics(run))
        )
        slow.wait_for(lambda: "Waiting for a shard" in slow.stdout)
        slow.signal(SIGINT)
        assert slow.end().status == 130
        go.set()
        chunks = next((tmp_path / "other").glob("*/*/chunks.json")).parent
        n_there = len(shards.read_chunks(chunks)["rows"])
        again = typed("train", "--resume", "slow", "--cache", "other", cwd=tmp_path, **around)
        assert (again.status, again.stderr) == (0, "")
    assert 3 < n_there < 13
    assert weights(run) == weights(tmp_path / "runs/calm")
    assert len(weights(run)) == 3
    offline = typed("evaluate", "--run", "slow", "--cache", "other", cwd=tmp_path, **surroundings(tmp_path))
    assert (offline.status, offline.stderr) == (0, "")


def test_a_download_goes_on_where_it_was_stopped_and_the_cache_can_be_looked_at(fineweb, tmp_path):
    with serving(fineweb) as hub:
        around, asked = surroundings(tmp_path, hub.address), ["--tokenizer", "byte", "--tokens", "160000"]
        hub.trouble = lambda path: 0.2
        first = Typed("download", *asked, cwd=tmp_path, **around)
        first.wait_for(lambda: list((tmp_path / "data").glob("*/*/train-00000.json")), seconds=100)
        first.signal(SIGINT)
        assert first.end().status == 130
        (entry,) = budget.entries(tmp_path / "data")
        folder, n_before = tmp_path / "data" / entry.folder, entry.n_shards
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("train-*.bin")}
        hub.trouble = lambda path: None
        second = typed("download", *asked, cwd=tmp_path, **around)
        assert (second.status, second.stderr) == (0, "")
        assert "ODC-By-1.0" in second.stdout
    for name, at in before.items():
        assert (folder / name).stat().st_mtime_ns == at or name == max(before)
    (entry,) = budget.entries(tmp_path / "data")
    assert entry.n_shards > n_before
    assert entry.n_tokens["train"] >= 160_000
    offline = typed("download", *asked, "--offline", cwd=tmp_path, **surroundings(tmp_path))
    assert offline.status == 0, offline.stderr
    listed = typed("data", "--verify", cwd=tmp_path)
    assert listed.status == 0
    assert f"{entry.n_shards} of {entry.n_shards} shards are whole" in listed.stdout
    path = folder / "train-00001.idx"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    broken = typed("data", "--verify", cwd=tmp_path)
    assert broken.status == 2
    assert "train-00001.idx" in broken.stdout
    gone = typed("data", "--clear", entry.folder.as_posix(), cwd=tmp_path)
    assert gone.status == 0
    assert not folder.exists()
    assert typed("data", "--clear", "nothing", cwd=tmp_path).status == 2


def test_two_runs_on_one_cache_rob_each_other_of_nothing(fineweb, tmp_path):
    """One is stopped; another folder's download makes room for itself, and may not take the first one's shards. Seen to
    fail when only the runs in the same folder counted."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    around, cache = surroundings(tmp_path), ["--cache", tmp_path / "cache"]
    words = ["--data", f"hf:{fineweb}#sample-10BT", "--run", "first", "--tokens-per-epoch", "80000", *cache, *TINY]
    first = Typed("train", *words, "--steps", "2000", "--epochs", "1", "--save-every", "1", cwd=one, **around)
    first.wait_for(lambda: (one / "runs/first/latest").exists() and "update" in first.stdout)
    first.wait_for(lambda: len(list((tmp_path / "cache").glob("*/*/train-*.json"))) == 2)
    first.signal(SIGINT)
    assert first.end().status == 130
    before = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*/*/train-*")}
    asked = ["--data", f"hf:{fineweb}/#sample-10BT", "--tokens", "80000", "--tokenizer", "byte", *cache]
    full = typed("download", *asked, "--cache-gb", "0.0003", cwd=other, **around)
    assert (full.status, full.stderr.count("\n")) == (2, 1)
    assert "cache-gb: expected at most" in full.stderr
    assert {path: path.read_bytes() for path in before if path.exists()} == before
    cleared = typed("data", "--clear", "all", *cache, cwd=other, **around)
    assert (cleared.status, "that no unfinished run needs" in cleared.stderr) == (2, True)
    shutil.rmtree(one / "runs/first")  # nobody needs them any more
    asked[3] = "120000"
    assert typed("download", *asked, "--cache-gb", "0.0004", cwd=other, **around).status == 0
    assert not all(path.exists() for path in before)


def test_held_out_text_that_is_gone_is_fetched_aloud_or_not_at_all(fineweb, tmp_path):
    """Seen to fail when evaluate fetched without a word, and knew no --offline."""
    words = ["--data", "fineweb-edu", "--run", "short", "--tokens-per-epoch", "30000", "--steps", "1", "--epochs", "1"]
    with serving(fineweb) as hub:
        around = surroundings(tmp_path, hub.address)
        assert typed("train", *words, *TINY, cwd=tmp_path, **around).status == 0
        quiet = typed("evaluate", "--run", "short", cwd=tmp_path, **around)
        for path in tmp_path.glob("data/*/*/val-*"):
            path.unlink()
        offline = typed("evaluate", "--run", "short", "--offline", cwd=tmp_path, **around)
        aloud = typed("evaluate", "--run", "short", cwd=tmp_path, **around)
    assert (offline.status, offline.stderr.count("\n")) == (2, 1)
    assert "the network is not to be used" in offline.stderr
    assert (quiet.status, aloud.status) == (0, 0)
    assert "Fetching the held-out text" not in quiet.stdout
    assert aloud.stdout.count("Fetching the held-out text, which is no longer in the cache") == 1


def test_a_full_disk_stops_it_with_one_line_and_loses_nothing(fineweb, tmp_path):
    """Files of 60 kB at most: the first chunk's text does not fit."""
    words = ["--data", f"hf:{fineweb}#sample-10BT", "--tokenizer", "byte", "--tokens", "160000"]
    full = typed("download", *words, cwd=tmp_path, n_bytes=60_000, **surroundings(tmp_path))
    assert (full.status, full.stderr.count("\n")) == (2, 1)
    assert "train-00000.bin: File too large" in full.stderr
    assert not list((tmp_path / "data").glob("*/*/train-*.json"))
    assert typed("download", *words, cwd=tmp_path, **surroundings(tmp_path)).status == 0
    assert list((tmp_path / "data").glob("*/*/train-00003.json"))


def test_doctor_tries_a_stream_and_needs_the_network_once(fineweb, tmp_path):
    with serving(fineweb) as hub:
        first = typed("doctor", "--data", "fineweb-edu", cwd=tmp_path, **surroundings(tmp_path, hub.address))
    assert (first.status, first.stderr) == (0, "")
    assert "of inputs (256,) and targets (256,)" in first.stdout
    again = typed("doctor", "--data", "fineweb-edu", cwd=tmp_path, **surroundings(tmp_path))
    assert (again.status, again.stderr) == (0, "")
    facts = [
        [line for line in done.stdout.splitlines() if line.startswith(("ids ", "text "))] for done in (first, again)
    ]
    assert len(facts[0]) == 2
    assert facts[0] == facts[1]
    assert typed("doctor", "--data", "notes.txt", cwd=tmp_path).status == 2


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    done = typed("train", "--mode", "quick", "--data", "fineweb-edu", cwd=tmp_path, **surroundings(tmp_path))
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "--data python-docs needs no network" in done.stderr
    done = typed("train", "--mode", "quick", "--steps", "1", *TINY, cwd=tmp_path, **surroundings(tmp_path))
    assert done.status == 0, done.stderr
    assert "Data: python-docs, because the hub cannot be reached" in done.stdout
    done = typed("train", "--data", "fineweb-edu", "--mix", "1,2", cwd=tmp_path)
    assert (done.status, "mix: expected a weight for each of 1 sources" in done.stderr) == (2, True)


def test_streams_and_files_are_mixed_by_weight(fineweb, tmp_path):
    (tmp_path / "notes.txt").write_text("A line of my own.\n" * 400)
    words = ["--data", f"hf:{fineweb}#sample-10BT", "--data", "notes.txt", "--mix", "0.7,0.3", "--run", "mixed"]
    short = ["--steps", "6", "--epochs", "1", "--tokens-per-epoch", "40000"]
    done = typed("train", *words, *TINY, *short, cwd=tmp_path, **surroundings(tmp_path))
    assert (done.status, done.stderr) == (0, "")
    assert checkpoint.read_run(tmp_path / "runs/mixed")["plan"]["counts"] == [700, 300]
    done = typed("evaluate", "--run", "mixed", cwd=tmp_path)
    assert (done.status, done.stderr) == (0, "")
