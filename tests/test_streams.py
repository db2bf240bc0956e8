"""Streams: the same shards however often the download is killed, and nothing waits for a network that is not there.

The hub is a small one on loopback, or a folder in its layout; the loading code is the real one.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import serving, write_fineweb, write_wikitext

from gptcore import data, tokenizer
from gptcore.data import budget, corpora, download, fetch, mixture, shards, streamed, streams
from gptcore.files import only_writer

# Fetches in forks of one process, which has loaded the library once; each is killed after its time, 0 for never.
FORKS = """
import json, os, signal, sys, time
import datasets
from gptcore.data import fetch
for seconds in json.loads(sys.argv[2]):
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        os._exit(fetch.main(sys.argv[1:2]))
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
N_SHARD = 40_000
SIZES = {"n_context": 32, "n_sequences": 8, "seed": 1}


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory):
    """(folder, texts) of a small FineWeb-Edu."""
    root = tmp_path_factory.mktemp("fineweb")
    return root, write_fineweb(root)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Shards of N_SHARD tokens, the hub's caches in the test's own folder, and no hub unless a test has one."""
    monkeypatch.setenv(streamed.OWN_SIZE, str(N_SHARD))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return monkeypatch


def order_for(cache, source, n_chunks=100, **more):
    """An order with the byte tokenizer."""
    words = tokenizer.named("byte")
    path = Path(cache) / "byte.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    words.save(path)
    ways = {"source": source, "text_field": "text", "tokenizer": str(path), "name": "byte", "cache": str(cache)}
    return fetch.Order(**ways, n_chunks=n_chunks, n_shard=N_SHARD, **more)


def forked(order, seconds):
    """The exit statuses of fetches of one order, killed after so many seconds each."""
    words = [sys.executable, "-c", FORKS, json.dumps(order._asdict()), json.dumps(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    return [int(line) for line in done.stdout.split()]


def contents(folder):
    """The bytes of every shard file by name."""
    sides = ("train-", "val-", "test-")
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name.startswith(sides)}


def folder_of(order):
    stream = streams.open_stream(order.source, order.text_field)
    return Path(order.cache) / fetch.folder_of(stream, tokenizer.load(order.tokenizer), order.n_shard)


def test_a_stream_from_disk_holds_every_document_once(fineweb, tmp_path, small):
    """Tokens in the shards = tokens of the texts, in order, on the side that the text decides."""
    root, texts = fineweb
    order = order_for(tmp_path, f"hf:{root}#sample-10BT")
    fetch.fetch_(order, lambda **facts: None)
    folder, words = folder_of(order), tokenizer.named("byte")
    chunks = shards.read_chunks(folder)["rows"]
    assert len(chunks) > 5
    assert [chunk["last"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for side in shards.SIDES:
        found = []
        for row in shards.rows(folder, side):
            found += [ids for ids, _ in shards.whole_documents(shards.open_shard(folder, row))]
        wanted = [corpora.clean(text) for text in texts]
        wanted = [words.encode(text) for text in wanted if shards.held_out(text) == (side == "val")]
        assert found == wanted
    assert all(row["shards"]["train"]["n_tokens"] >= N_SHARD for row in chunks[:-1])


def test_twenty_kills_leave_the_shards_of_an_undisturbed_download(fineweb, tmp_path, small):
    """SIGKILL at random moments; the hub meanwhile also drops, truncates and refuses."""
    root, _ = fineweb
    rng, calm, killed = (
        random.Random(7),
        order_for(tmp_path / "calm", "fineweb-edu"),
        order_for(tmp_path, "fineweb-edu"),
    )
    with serving(root) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        began = time.monotonic()
        assert forked(calm, [0]) == [0]
        whole = time.monotonic() - began
        hub.trouble = lambda path: rng.choice([None, None, None, None, "drop", "truncate", "503", 0.05])
        statuses = forked(killed, [whole * rng.uniform(0.05, 0.5) for _ in range(20)])
        hub.trouble = lambda path: None
        assert forked(killed, [0]) == [0]
    assert statuses.count(-9) >= 10
    assert contents(folder_of(killed)) == contents(folder_of(calm))


def test_a_killed_parent_leaves_no_child_that_writes(fineweb, tmp_path, small):
    """SIGKILL to whoever watches; its child ends by itself, and the next download goes on. Seen to fail when the child
    did not mind that nobody reads what it tells."""
    code = """
import json, sys, time
from gptcore.data import download, fetch
got = download.Download(fetch.Order(**json.loads(sys.argv[1])))
got.start()
while not (got._child and got._facts):
    time.sleep(0.01)
print(got._child.pid, flush=True)
time.sleep(100)
"""
    calm, killed = order_for(tmp_path / "calm", "fineweb-edu"), order_for(tmp_path / "killed", "fineweb-edu")
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        hub.trouble = lambda path: 0.3
        parent = subprocess.Popen([sys.executable, "-c", code, json.dumps(killed._asdict())], stdout=subprocess.PIPE)
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        hub.trouble = lambda path: "hang"  # no chunk more, whose telling would fail
        parent.kill()
        parent.communicate()
        end = time.monotonic() + 20
        while running(child):
            assert time.monotonic() < end, "the child writes on"
            time.sleep(0.05)
        assert len(contents(folder_of(killed))) < 50
        hub.trouble = lambda path: None
        assert forked(killed, [0]) == forked(calm, [0]) == [0]
    assert contents(folder_of(killed)) == contents(folder_of(calm))
    assert len(contents(folder_of(killed))) > 50


def running(pid):
    """Does this process, not ours, still run? One that has ended and that nobody asks for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or " Z " not in stat.read_text()


def test_wikitext_keeps_its_articles_and_its_splits(tmp_path, small):
    root = tmp_path / "wikitext"
    articles = write_wikitext(root)
    with serving(root, "Salesforce/wikitext") as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        dataset = data.prepare("wikitext", "byte", cache=tmp_path / "cache", tokens_per_epoch=3_000, **SIZES)
    folder, words = tmp_path / "cache" / dataset.plan["folder"], tokenizer.named("byte")
    for side, split in {"train": "train", "val": "validation", "test": "test"}.items():
        rows = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{side}-*.json"))]
        found = [ids for row in rows for ids, _ in shards.whole_documents(shards.open_shard(folder, row))]
        assert [words.decode(ids) for ids in found] == articles[split]
    dataset.download.close()


def test_training_begins_with_the_first_shard_and_reads_the_others_as_they_come(fineweb, tmp_path, small):
    """A slow hub and a fast one give identical batches; prepare returns before everything is there."""
    root, _ = fineweb
    batches = []
    for name, wait in {"fast": None, "slow": 3.0}.items():
        with serving(root) as hub:
            small.setenv("HF_ENDPOINT", hub.address)
            begun = lambda cache=tmp_path / name: list(cache.glob("*/*/train-00000.json"))
            hub.trouble = lambda path, wait=wait, begun=begun: wait if "/002_" in path and begun() else None
            dataset = data.prepare("fineweb-edu", "byte", cache=tmp_path / name, tokens_per_epoch=520_000, **SIZES)
            n_there = len(shards.read_chunks(tmp_path / name / dataset.plan["folder"])["rows"])
            batches.append([dataset.batch(step) for step in range(0, dataset.n_windows // 8, 100)])
            plan = dataset.plan
            dataset.download.close()
        if wait:
            assert n_there < len(plan["groups"]) == 13
        small.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the second epoch needs no network
        again = data.reopen(plan, dataset.tokenizer, cache=tmp_path / name)
        assert torch.equal(again.batch(dataset.n_windows // 8 - 1)[0], dataset.batch(dataset.n_windows // 8 - 1)[0])
    for (one, _), (other, _) in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_bestfit_knows_a_planned_streams_sequences_without_it(fineweb, tmp_path, small):
    """To read what a run has held out, nothing that it was trained on is fetched again."""
    ways = {"cache": tmp_path, "tokens_per_epoch": 60_000, "packing": "bestfit", **SIZES}
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        dataset = data.prepare("fineweb-edu", "byte", **ways)
        dataset.download.close()
        folder, plan = tmp_path / dataset.plan["folder"], json.loads(json.dumps(dataset.plan))
        wanted = dataset.batch(3)
        for path in folder.glob("train-*"):
            path.unlink()
        again = data.reopen(plan, dataset.tokenizer, cache=tmp_path)
        assert (again.n_windows, again.validation) == (dataset.n_windows, dataset.validation)
        assert not list(folder.glob("train-*"))
        for path in folder.glob("val-*"):
            path.unlink()
        with pytest.raises(ValueError, match=r"val-00000\.json: expected the shard's counts, got no file"):
            data.reopen(plan, dataset.tokenizer, cache=tmp_path, fetch=False)
        again = data.reopen(plan, dataset.tokenizer, cache=tmp_path)  # fetches the chunk that holds it, and no more
        assert [path.name for path in folder.glob("train-*.json")] == ["train-00000.json"]
        for one, other in zip(again.batch(3), wanted, strict=True):
            assert torch.equal(one, other)
        again.download.close()


def test_a_trained_tokenizer_reads_nothing_twice(fineweb, tmp_path, small):
    root, texts = fineweb
    dataset = data.prepare(f"hf:{root}#sample-10BT", "bpe:300", cache=tmp_path, tokens_per_epoch=30_000, **SIZES)
    wanted = tokenizer.named("bpe:300", [t for t in map(corpora.clean, texts) if not shards.held_out(t)])
    assert dataset.tokenizer.fingerprint == wanted.fingerprint
    folder, (row,) = tmp_path / dataset.plan["folder"], dataset.plan["groups"][0]
    ids, _ = next(shards.whole_documents(shards.open_shard(folder, shards.rows(folder, "train")[0])))
    assert wanted.decode(ids) == next(t for t in map(corpora.clean, texts) if not shards.held_out(t))
    assert row["n_tokens"] == 30_000
    dataset.download.close()


def test_a_damaged_or_missing_shard_is_fetched_again_and_the_same(fineweb, tmp_path, small):
    """A flipped byte, a cut file, a missing index, missing counts."""
    root, _ = fineweb
    source = f"hf:{root}#sample-10BT"
    dataset = data.prepare(source, "byte", cache=tmp_path, tokens_per_epoch=100_000, **SIZES)
    last = dataset.n_windows // 8 - 1
    wanted = [dataset.batch(step)[0] for step in (0, last)]
    folder = tmp_path / dataset.plan["folder"]
    dataset.download.wait_for_chunk(2)
    dataset.download.close()
    before = contents(folder)
    path = folder / "train-00001.bin"
    path.write_bytes(bytes([before[path.name][0] ^ 1]) + before[path.name][1:])
    (folder / "train-00002.bin").write_bytes(before["train-00002.bin"][:-10])
    (folder / "train-00000.idx").unlink()
    (folder / "val-00001.json").unlink()
    again = data.reopen(dataset.plan, dataset.tokenizer, cache=tmp_path)
    for step, batch in zip((0, last), wanted, strict=True):
        assert torch.equal(again.batch(step)[0], batch)
    again.download.wait_for_chunk(1)
    again.download.close()
    assert {name: content for name, content in contents(folder).items() if name in before} == before


@pytest.mark.parametrize("content", ['{"about": {}, "own"', "[]", "{}", "\xff"])
def test_a_damaged_list_of_chunks_is_named_and_can_be_deleted(fineweb, tmp_path, small, content):
    source = f"hf:{fineweb[0]}#sample-10BT"
    dataset = data.prepare(source, "byte", cache=tmp_path, tokens_per_epoch=20_000, **SIZES)
    dataset.download.close()
    path = tmp_path / dataset.plan["folder"] / "chunks.json"
    path.write_bytes(content.encode("latin-1"))
    message = r"chunks\.json: expected .*; without this file its shards are fetched again"
    for reads in (
        lambda: data.prepare(source, "byte", cache=tmp_path, tokens_per_epoch=20_000, **SIZES),
        lambda: budget.entries(tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            reads()
    path.unlink()
    again = data.prepare(source, "byte", cache=tmp_path, tokens_per_epoch=20_000, **SIZES)
    again.download.close()
    assert again.plan == dataset.plan


def test_without_a_network_it_is_told_at_once(tmp_path, small):
    with pytest.raises(ValueError, match=r"data: expected 1 shards of fineweb-edu in .*, got 0, and the hub cannot be"):
        data.prepare("fineweb-edu", "byte", cache=tmp_path, tokens_per_epoch=10_000, **SIZES)
    assert streamed.choose("byte", 10_000, cache=tmp_path) == ("python-docs", "the hub cannot be reached")
    small.setenv("HF_HUB_OFFLINE", "1")
    assert streamed.choose("byte", 10_000, cache=tmp_path) == ("python-docs", "the network is not to be used")
    with pytest.raises(ValueError, match="and the network is not to be used; --data python-docs needs no network"):
        data.prepare("fineweb-edu", "byte", cache=tmp_path, tokens_per_epoch=10_000, **SIZES)


def test_a_hub_that_answers_nothing_ends_in_one_line(fineweb, tmp_path, small):
    """A process that gets nowhere is killed and started again, and in the end somebody says so."""
    root, _ = fineweb
    with serving(root) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        hub.trouble = lambda path: "hang"
        order = order_for(tmp_path, "fineweb-edu")
        got = download.Download(order, folder_of(order), patience=1.0, pauses=(0.1,))
        with pytest.raises(ValueError, match=r"gave up after 2 tries: nothing came for 1 s"):
            got.wait_for_chunk(0)
        got.close()


def test_what_is_held_out_is_not_waited_for_for_ever(fineweb, tmp_path, small):
    """Whoever only measures says how long it waits, and is told. Seen to fail when all waited 13 minutes."""
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        dataset = data.prepare("fineweb-edu", "byte", cache=tmp_path, tokens_per_epoch=20_000, **SIZES)
        dataset.download.close()
        for path in (tmp_path / dataset.plan["folder"]).glob("val-*"):
            path.unlink()
        hub.trouble, told = (lambda path: "hang"), []
        ways = {"cache": tmp_path, "patience": 1.0, "pauses": (), "watch": told.append}
        with pytest.raises(download.Lost, match=r"gave up after 1 try: nothing came for 1 s"):
            data.reopen(dataset.plan, dataset.tokenizer, **ways)
        assert told


def test_a_process_that_never_gets_further_is_given_up(fineweb, tmp_path, small):
    """Seen to fail: every process read the documents before the trouble again, which passed for progress."""
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        hub.trouble = lambda path: 0.2
        order = order_for(tmp_path, "fineweb-edu")._replace(n_shard=10_000_000)
        got = download.Download(order, folder_of(order), pauses=(0.1,))
        killed = []

        def kill(progress):
            if got._child and got._child not in killed and progress.n_documents > 500 * len(killed):
                killed.append(got._child)
                got._child.kill()
            assert len(killed) < 5

        got.watch = kill
        with pytest.raises(download.Lost, match=r"gave up after 2 tries: the process ended with status -9"):
            got.wait_for_chunk(0)
        got.close()


def test_offline_a_missing_shard_is_told_at_once(fineweb, tmp_path, small):
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        dataset = data.prepare("fineweb-edu", "byte", cache=tmp_path, tokens_per_epoch=80_000, **SIZES)
        dataset.download.wait_for_chunk(1)
        dataset.download.close()
    (tmp_path / dataset.plan["folder"] / "train-00001.bin").unlink()
    small.setenv("HF_HUB_OFFLINE", "1")
    again = data.reopen(dataset.plan, dataset.tokenizer, cache=tmp_path)
    with pytest.raises(download.Lost, match=r"fineweb-edu from the hub, and the network is not to be used"):
        again.batch(again.n_windows // 8 - 1)
    assert again.download._child is None


@pytest.mark.parametrize("words", ["byte", "bpe:300"])
def test_progress_counts_bytes_of_text_once(fineweb, tmp_path, small, words):
    """Seen to fail: characters were counted, and what a tokenizer was trained on counted twice."""
    root, texts = fineweb
    dataset = data.prepare(f"hf:{root}#sample-10BT", words, cache=tmp_path, tokens_per_epoch=2_000_000, **SIZES)
    dataset.download.wait_for_end()
    progress = dataset.download.progress()
    wanted = [corpora.clean(text) for text in texts]
    assert progress.n_documents == len(wanted)
    assert progress.n_bytes == sum(len(text.encode()) for text in wanted) > sum(map(len, wanted))


def test_what_the_hub_does_not_have_is_not_asked_for_again(fineweb, tmp_path, small):
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        with pytest.raises(ValueError, match=r"404"):
            data.prepare("hf:no/such", "byte", cache=tmp_path, tokens_per_epoch=80_000, **SIZES)
        assert sum(path == "/api/datasets/no/such" for _, path in hub.requests) == 1


def test_a_branch_becomes_a_commit_and_a_proxy_is_asked(fineweb, tmp_path, small):
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        source = f"hf:{hub.repository}@main#sample-10BT"
        dataset = data.prepare(source, "byte", cache=tmp_path, tokens_per_epoch=20_000, **SIZES)
        dataset.download.close()
        assert dataset.plan["about"]["revision"] == dataset.plan["stream"]["revision"] == hub.revision
        small.setenv("HF_ENDPOINT", "http://hub.invalid")
        assert not download.hub_reachable()
        small.setenv("http_proxy", hub.address.removeprefix("http://"))
        assert download.hub_reachable()


def test_revisions_are_never_mixed(fineweb, tmp_path, small):
    """The branch moves while a run is stopped. Seen to fail: the plan did not know its commit, so a resume in another
    cache took the newest."""
    with serving(fineweb[0]) as hub:
        small.setenv("HF_ENDPOINT", hub.address)
        source, old = f"hf:{hub.repository}@main#sample-10BT", hub.revision
        ways = {"tokens_per_epoch": 50_000, **SIZES}
        first = data.prepare(source, "byte", cache=tmp_path / "one", **ways)
        first.download.wait_for_end()
        hub.revision = "f" * 40
        second = data.prepare(source, "byte", cache=tmp_path / "two", **ways)
        second.download.close()
        with pytest.raises(ValueError, match=f"data: expected revision {old} in .*, got {'f' * 40}; another --cache"):
            data.reopen(first.plan, first.tokenizer, cache=tmp_path / "two")
        (tmp_path / "one" / Path(first.plan["folder"]).parent / "revision").unlink()
        (tmp_path / "one" / first.plan["folder"] / "train-00001.bin").unlink()
        with pytest.raises(ValueError, match=f"data: expected revision {'f' * 40} in .*, got {old}"):
            data.prepare(source, "byte", cache=tmp_path / "one", **ways).batch(195)
        hub.requests.clear()
        hub.revision = old
        again = data.reopen(first.plan, first.tokenizer, cache=tmp_path / "three")
        again.download.close()
        assert not any(path.endswith("/revision/main") for _, path in hub.requests)


def test_a_writer_elsewhere_is_waited_for_aloud(fineweb, tmp_path, small):
    order = order_for(tmp_path, f"hf:{fineweb[0]}#sample-10BT", n_chunks=1)
    folder_of(order).mkdir(parents=True)
    got, told = download.Download(order, folder_of(order)), threading.Event()
    got.watch = lambda progress: told.set() if progress.trouble == "another process is writing there" else None
    with only_writer(folder_of(order)):
        got.start()
        waiter = threading.Thread(target=got.wait_for_chunk, args=(0,))
        waiter.start()
        assert told.wait(60)
    waiter.join(60)
    assert not shards.broken(folder_of(order), shards.rows(folder_of(order), "train"))
    got.close()


def test_the_cache_keeps_to_its_budget_and_to_what_is_planned(fineweb, tmp_path, small):
    root, _ = fineweb
    order = order_for(tmp_path, f"hf:{root}#sample-10BT")
    fetch.fetch_(order, lambda **facts: None)
    folder = folder_of(order)
    place = folder.relative_to(tmp_path).as_posix()
    for number in range(3):
        os.utime(folder / f"train-{number:05d}.json", (number, number))
    size = budget.folder_bytes(tmp_path)
    assert budget.evict_(tmp_path, size) == []
    assert budget.evict_(tmp_path, size - 1, keep=(f"{place}/train-00000",)) == [f"{place}/train-00001"]
    assert not list(folder.glob("train-00001.*"))
    keep = [p.relative_to(tmp_path).with_suffix("").as_posix() for p in folder.glob("train-*.json")]
    with pytest.raises(ValueError, match="cache-gb: expected at most"):
        budget.evict_(tmp_path, 1000, keep=keep)
    with pytest.raises(ValueError, match="cache-gb: expected room for"):
        data.prepare(order.source, "byte", cache=tmp_path, tokens_per_epoch=100_000, budget=10_000, **SIZES)
    before = contents(folder)
    fetch.fetch_(order, lambda **facts: None)
    assert contents(folder).keys() > before.keys()
    (entry,) = budget.entries(tmp_path)
    assert (entry.whole, entry.is_stream, entry.n_tokens["train"]) == (
        True,
        True,
        sum(row["n_tokens"] for row in shards.rows(folder, "train")),
    )


def test_what_a_run_elsewhere_needs_stays(fineweb, tmp_path, small):
    """The run begins after the download that makes room. Seen to fail when that knew the runs of its start alone."""
    order = order_for(tmp_path, f"hf:{fineweb[0]}#sample-10BT")
    fetch.fetch_(order, lambda **facts: None)
    place = folder_of(order).relative_to(tmp_path).as_posix()
    budget.pin(tmp_path, tmp_path / "run", [f"{place}/train-00000"])
    size = budget.folder_bytes(tmp_path)
    assert budget.evict_(tmp_path, size - 1) == [f"{place}/train-00001"]
    budget.unpin(tmp_path, tmp_path / "run")
    size = budget.folder_bytes(tmp_path)
    assert budget.evict_(tmp_path, size - 1) == [f"{place}/train-00000"]


def test_a_plan_that_the_cache_cannot_hold_ends_in_one_line(fineweb, tmp_path, small):
    """Seen to fail: while the tokenizer was still to be trained nobody knew the plan's shards, so each made room for
    the next, and the first was fetched again without end."""
    (tmp_path / "notes").write_bytes(bytes(400_000))
    order = order_for(tmp_path, f"hf:{fineweb[0]}#sample-10BT", n_chunks=3, budget=600_000)
    with pytest.raises(ValueError, match="cache-gb: expected at most"):
        fetch.fetch_(order._replace(tokenizer="bpe:300", name="bpe:300"), lambda **facts: None)


def test_members_of_a_mixture_make_no_room_for_each_other(fineweb, tmp_path, small):
    """Seen to fail: with a budget for one of them, the second one's download removed the first one's shards."""
    root, _ = fineweb
    sources = [f"hf:{root}#sample-10BT", f"hf:{root}/#sample-10BT"]  # one text under two names
    ways = {"tokens_per_epoch": 80_000, "mix": [1, 1], "cache": tmp_path, "budget": 150_000}
    mixed = data.prepare(sources, "byte", **ways, **SIZES)
    for part in mixed.downloads:
        part.wait(part._ended.is_set)
    for member in mixed.members:
        assert (tmp_path / member.plan["folder"] / "train-00000.json").is_file()
        member.download.close()


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ("hf:#x", "text", "expected fineweb-edu, wikitext or hf:REPOSITORY"),
        ("ROOT", "body", "body"),
    ],
)
def test_what_is_wrong_with_a_stream_is_told(fineweb, tmp_path, small, source, field, message):
    source = source.replace("ROOT", f"hf:{fineweb[0]}#sample-10BT")
    with pytest.raises(ValueError, match=message):
        data.prepare(source, "byte", cache=tmp_path, tokens_per_epoch=10_000, text_field=field, **SIZES)


# ----------------------------------------------------------------------------------------------------------- mixing


def test_shares_are_exact_in_every_block_and_each_member_is_read_in_its_own_order():
    counts = mixture.shares([0.7, 0.2, 0.1])
    assert counts == [700, 200, 100]
    owners, places = mixture.share_out(np.arange(5_000), counts, seed=3)
    for member, count in enumerate(counts):
        for block in range(5):
            assert (owners[block * 1000 : (block + 1) * 1000] == member).sum() == count
        assert sorted(places[owners == member].tolist()) == list(range(5 * count))
    some = np.array([4_999, 17, 2_003])
    assert np.array_equal(mixture.share_out(some, counts, seed=3)[1], places[some])
    assert not np.array_equal(mixture.share_out(some, counts, seed=4)[1], places[some])


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [float("nan"), 1], [1, 1e-9]], ids=str)
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="mix: expected"):
        mixture.shares(weights)


def test_a_mixture_is_a_dataset(tmp_path):
    """Texts of one letter each tell where a sequence comes from."""
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text((letter * 60 + "\n") * 80)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    mixed = data.prepare(paths, "byte", cache=tmp_path / "cache", mix=[3, 1], **SIZES | {"n_sequences": 100})
    kinds = [chr(row[row != 10][0]) for step in range(10) for row in mixed.batch(step)[0]]
    assert (kinds.count("a"), kinds.count("b")) == (750, 250)
    again = data.reopen(json.loads(json.dumps(mixed.plan)), mixed.tokenizer, cache=tmp_path / "cache")
    for one, other in zip(mixed.batch(3), again.batch(3), strict=True):
        assert torch.equal(one, other)
    assert len(mixed.validation) == 2
    halves = [mixed.batch(3, rank=rank, world=2)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), mixed.batch(3)[0])
    with pytest.raises(ValueError, match="mix: expected a weight for each of 2 sources"):
        data.prepare(paths, "byte", cache=tmp_path, mix=[1], **SIZES)
