"""Shards: whole or absent, the same bytes for the same text, and never a document on both sides."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore import data, tokenizer
from gptcore.data import shards

SETTINGS = {"n_context": 16, "n_sequences": 4, "seed": 1}


def story(index):
    """A short text of its own for each index, with a special string now and then."""
    rng = random.Random(index)
    words = " ".join(rng.choice(("the", "cat", "sat", "on", "a", "mat", "Ünï", "<|endoftext|>")) for _ in range(20))
    return f"{index} {words}\n"


@pytest.fixture
def notes(tmp_path):
    """300 stories as lines of a file, each tenth one twice: the path."""
    lines = [json.dumps({"text": story(index - index % 10 if index % 10 == 1 else index)}) for index in range(300)]
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def folder_of(dataset, cache):
    return Path(cache) / dataset.plan["folder"]


def documents_in(folder, side):
    """(ids, n_bytes) of every document, the end of text still there, read without the code under test."""
    found = []
    for path in sorted(Path(folder).glob(f"{side}-*.json")):
        row = json.loads(path.read_text())
        ids = np.fromfile(path.with_suffix(".bin"), row["dtype"]).tolist()
        starts = np.fromfile(path.with_suffix(".idx"), "<u8").tolist()
        sizes = np.fromfile(path.with_suffix(".bytes"), "<u8").tolist()
        assert (row["n_tokens"], row["n_documents"], row["n_bytes"]) == (len(ids), len(sizes), sum(sizes))
        assert starts[-1] == len(ids)
        found += [(ids[a:b], n) for a, b, n in zip(starts, starts[1:], sizes, strict=False)]
    return found


def test_no_document_is_on_both_sides(notes, tmp_path):
    """Duplicates included. Seen to fail when the index decided instead of the text."""
    dataset = data.prepare(notes, "byte", cache=tmp_path, **SETTINGS)
    train, val = ({tuple(ids) for ids, _ in documents_in(folder_of(dataset, tmp_path), side)} for side in shards.SIDES)
    assert not train & val
    assert len(train | val) == len(set(texts(notes)))
    share = len(val) / len(train | val)
    assert abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 270)  # five sigma


@pytest.mark.parametrize("name", ["byte", "bpe:300", "cl100k_base"])
def test_the_shards_hold_every_token_and_an_end_for_each_document(name, notes, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "N_SHARD", 1_000)  # so that there are several
    monkeypatch.setattr(shards, "N_DOCUMENTS", 7)
    dataset = data.prepare(notes, name, cache=tmp_path, **SETTINGS)
    it, folder = dataset.tokenizer, folder_of(dataset, tmp_path)
    for side in shards.SIDES:
        wanted = [text for text in texts(notes) if shards.held_out(text) == (side == "val")]
        assert documents_in(folder, side) == [([*it.encode(t), it.eot], len(t.encode())) for t in wanted]
    assert len(list(folder.glob("train-*.bin"))) > 1
    dtype = "<u4" if name == "cl100k_base" else "<u2"
    assert {row["dtype"] for row in shards.rows(folder)} == {dtype}
    manifest = shards.read_manifest(folder)
    assert manifest["licence"] == "the user's own"
    assert manifest["tokenizer"] == {"name": it.name, "fingerprint": it.fingerprint}
    assert [document.n_bytes for document in dataset.validation] == [n for _, n in documents_in(folder, "val")]
    assert [it.decode(document.tokens) for document in dataset.validation] == [
        t for t in texts(notes) if shards.held_out(t)
    ]


def test_the_same_text_gives_the_same_shards(notes, tmp_path):
    plans = [data.prepare(notes, "bpe:300", cache=tmp_path / name, **SETTINGS).plan for name in ("a", "b")]
    assert plans[0] == plans[1]
    assert json.loads(json.dumps(plans[0])) == plans[0]
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_tokenizer_learns_from_the_training_side_only(notes, tmp_path):
    dataset = data.prepare(notes, "bpe:300", cache=tmp_path, **SETTINGS)
    training = [text for text in texts(notes) if not shards.held_out(text)]
    assert dataset.tokenizer.fingerprint == tokenizer.train_bpe(training, 300).fingerprint


def test_unchanged_text_is_not_written_again(notes, tmp_path):
    first = data.prepare(notes, "bpe:300", cache=tmp_path / "cache", **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    again = data.prepare(notes, "bpe:300", cache=tmp_path / "cache", **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")} == before
    assert again.plan == first.plan


def test_leftovers_are_neither_seen_nor_kept(notes, tmp_path):
    """What a killed writer leaves: temporary files, and shards without their .json."""
    clean = data.prepare(notes, "byte", cache=tmp_path, **SETTINGS)
    folder = folder_of(clean, tmp_path)
    (folder / "manifest.json").unlink()
    for name in ("train-00000.bin.77.tmp", "train-00009.bin", "val-00009.idx", "val-00009.bytes"):
        (folder / name).write_bytes(b"half")
    assert [row["name"] for row in shards.rows(folder)] == ["train-00000", "val-00000"]
    again = data.prepare(notes, "byte", cache=tmp_path, **SETTINGS)
    assert again.plan == clean.plan
    files = {f"{side}-00000.{kind}" for side in shards.SIDES for kind in ("bin", "idx", "bytes", "json")}
    assert {path.name for path in folder.iterdir()} == files | {"manifest.json"}


PREPARE = """
import sys
from gptcore import data
dataset = data.prepare(sys.argv[1], "byte", cache=sys.argv[2], n_context=16, n_sequences=4, seed=1)
print([row["sha256"] for row in (*dataset.plan["groups"][0], *dataset.plan["validation"])])
"""


def test_a_full_disk_leaves_nothing_half_visible(notes, tmp_path):
    """A limit on the size of files stands for the full disk. Seen to fail with the temporary file left."""
    resource = pytest.importorskip("resource", reason="no limits on file sizes here")
    limited = subprocess.run(
        [sys.executable, "-c", PREPARE, notes, tmp_path / "cache"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)),
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 1
    assert limited.stderr.splitlines()[-1].startswith("OSError: [Errno 27] File too large: ")
    assert limited.stderr.splitlines()[-1].endswith("train-00000.bin'")
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == ["survey.json"]
    free = data.prepare(notes, "byte", cache=tmp_path / "cache", **SETTINGS)
    assert free.plan == data.prepare(notes, "byte", cache=tmp_path / "other", **SETTINGS).plan


def test_two_processes_prepare_at_once(notes, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(notes), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != ""


# ------------------------------------------------------------------------------------------------- opening it again


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx", "val-00000.bytes"])
@pytest.mark.parametrize("how", [damage, Path.unlink], ids=["damaged", "missing"])
def test_a_bad_shard_is_written_again(name, how, notes, tmp_path):
    """Seen to fail when reopen looked at sizes only."""
    first = data.prepare(notes, "bpe:300", cache=tmp_path, **SETTINGS)
    plan, tokens = json.loads(json.dumps(first.plan)), first.batch(3)[0]
    path = folder_of(first, tmp_path) / name
    content = path.read_bytes()
    how(path)
    again = data.reopen(plan, first.tokenizer, cache=tmp_path)
    assert path.read_bytes() == content
    assert torch.equal(again.batch(3)[0], tokens)
    assert again.plan == first.plan


def test_without_its_source_a_bad_shard_is_named(notes, tmp_path):
    first = data.prepare(notes, "bpe:300", cache=tmp_path, **SETTINGS)
    shard = folder_of(first, tmp_path) / "train-00000.bin"
    text = notes.read_text(encoding="utf-8")
    notes.unlink()
    again = data.reopen(first.plan, first.tokenizer, cache=tmp_path)  # a whole shard needs no source
    assert torch.equal(again.batch(0)[0], first.batch(0)[0])
    damage(shard)
    message = r"train-00000\.bin: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}; and its source cannot be read: data: "
    with pytest.raises(ValueError, match=message):
        data.reopen(first.plan, first.tokenizer, cache=tmp_path)
    notes.write_text(text.replace("cat", "dog"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train-00000\.bin: expected .*; and its source has changed$"):
        data.reopen(first.plan, first.tokenizer, cache=tmp_path)
    notes.write_text(text, encoding="utf-8")  # another time stamp, the same text
    assert torch.equal(data.reopen(first.plan, first.tokenizer, cache=tmp_path).batch(0)[0], first.batch(0)[0])


def test_another_tokenizer_is_refused(notes, tmp_path):
    plan = data.prepare(notes, "bpe:300", cache=tmp_path, **SETTINGS).plan
    with pytest.raises(ValueError, match=r"^tokenizer byte: expected fingerprint [0-9a-f]{64}, got [0-9a-f]{64}$"):
        data.reopen(plan, tokenizer.named("byte"), cache=tmp_path)


# ------------------------------------------------------------------------------------------------------ little text


def test_a_single_document_holds_out_its_last_tenth(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(story(index) for index in range(100)), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    dataset = data.prepare(path, "byte", cache=tmp_path, **SETTINGS)
    [(train, n_train)], [(val, n_val)] = (documents_in(folder_of(dataset, tmp_path), side) for side in shards.SIDES)
    head, tail = (dataset.tokenizer.decode(ids) for ids in (train, val))
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.1 * len(text) <= len(tail) < 0.1 * len(text) + 200
    assert (n_train, n_val) == (len(head.encode()), len(tail.encode()))
    assert (dataset.n_context, dataset.notes) == (16, ())
    assert json.loads(json.dumps(dataset.plan)) == dataset.plan
    held = dataset.validation
    damage(folder_of(dataset, tmp_path) / "val-00000.bin")
    assert data.reopen(dataset.plan, dataset.tokenizer, cache=tmp_path).validation == held


@pytest.mark.parametrize(
    ("texts", "cut"),
    [
        (["0123456789\n"], (0, 10)),  # the line end comes after
        (["012345\n89\n"], (0, 9)),  # moving back would hold out more than a fifth
        (["0123456\n9\n" * 10], (0, 90)),
        (["0123456\n9\n" * 4, "0123456789" * 6], (1, 50)),  # no line end at all
        (["0123456789" * 9, "0123456789"], (0, 90)),
        ([], (0, 0)),
    ],
)
def test_the_last_tenth_begins_at_a_line(texts, cut):
    assert shards.last_tenth([("", text) for text in texts], sum(map(len, texts))) == cut
    whole = {
        side: "".join(t for s, t in shards.split([("", t) for t in texts], cut) if s == side) for side in shards.SIDES
    }
    assert whole["train"] + whole["val"] == "".join(texts)


def test_three_kilobytes_train(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("".join(story(index) for index in range(40))[:3_000], encoding="utf-8")
    dataset = data.prepare(path, "bpe:4096", cache=tmp_path, n_context=256, n_sequences=4, seed=1)
    assert dataset.notes == (f"too little text for a context of 256 tokens: it is {dataset.n_context}",)
    assert dataset.n_context in (16, 32, 64, 128)
    n_val = sum(len(document.tokens) + 1 for document in dataset.validation)
    assert dataset.n_context < n_val - 1 <= 2 * dataset.n_context  # the largest power with two windows
    assert dataset.batch(0)[0].shape == (4, dataset.n_context)


def test_the_smallest_text(tmp_path):
    """17 tokens and an end are two windows of 16. One token less, and nothing can be trained."""
    path, asked = tmp_path / "tiny.txt", SETTINGS | {"n_context": 64}
    path.write_text("x" * 170, encoding="utf-8")
    assert data.prepare(path, "byte", cache=tmp_path, **asked).n_context == 16
    for n_characters, got in ((169, "154 train and 17 val"), (1, "2 train and 0 val")):
        path.write_text("x" * n_characters, encoding="utf-8")
        message = f"data: expected two sequences of 16 tokens on each side, got {got} tokens"
        with pytest.raises(ValueError, match=f"^{message}$"):
            data.prepare(path, "byte", cache=tmp_path, **asked)


def test_tokens_per_epoch_caps_both_sides(notes, tmp_path):
    whole = data.prepare(notes, "byte", cache=tmp_path, **SETTINGS)
    part = data.prepare(notes, "byte", cache=tmp_path, tokens_per_epoch=3_000, **SETTINGS)
    assert part.n_train_tokens == 3_000 < whole.n_train_tokens
    assert part.n_windows == math.ceil(2_999 / 16)
    held = part.validation
    assert held == whole.validation[: len(held)]
    n_tokens = [len(document.tokens) + 1 for document in held]
    assert sum(n_tokens[:-1]) < 300 <= sum(n_tokens)
    more = data.prepare(notes, "byte", cache=tmp_path, tokens_per_epoch=10**9, **SETTINGS)
    assert (more.n_train_tokens, more.validation) == (whole.n_train_tokens, whole.validation)


def test_python_docs_from_end_to_end(tmp_path):
    dataset = data.prepare("python-docs", "bpe:1024", cache=tmp_path, n_context=128, n_sequences=8, seed=1)
    assert dataset.plan["about"]["licence"] == "PSF-2.0"
    assert dataset.plan["sources"] == ["python-docs"]
    assert dataset.n_train_tokens > 100_000
    for document in dataset.validation:
        text = dataset.tokenizer.decode(document.tokens)
        assert shards.held_out(text)
        assert len(text.encode()) == document.n_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_context": 0}, "n_context: expected a whole number of at least 1, got 0"),
        ({"n_sequences": True}, "n_sequences: expected a whole number of at least 1, got True"),
        ({"tokens_per_epoch": 17}, "tokens_per_epoch: expected a whole number of at least 18, got 17"),
        ({"packing": "tight"}, "packing: expected one of concat, bestfit, got 'tight'"),
    ],
)
def test_bad_options_are_refused(options, message, notes, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}$"):
        data.prepare(notes, "byte", cache=tmp_path, **SETTINGS | options)
