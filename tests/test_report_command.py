"""invoke interpret.report, typed: one page about a run, and what it says about wrong input."""

import dataclasses
import json
import re

import pytest

pytest.importorskip("resource", reason="signals and terminals as they are here are POSIX's")

import torch
from cases import random_params
from typed import snapshot, typed

from gptcore import architecture, checkpoint, forward, tokenizer
from gptcore.interpret import pairs, report
from gptcore.interpret.attention import patterns
from tools.interpret.report_view import DEMO

BYTE = tokenizer.named("byte")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with random runs: two that read bytes, a small GPT-2 and one of no blocks, and one that reads words."""
    folder = tmp_path_factory.mktemp("house")
    texts = [DEMO["clean"] + DEMO["target"], DEMO["corrupted"] + DEMO["foil"]]
    bpe = tokenizer.train_bpe(texts * 9, 300)
    for name, n_layer, words in (("words", 2, bpe), ("empty", 0, BYTE), ("tiny", 2, BYTE)):
        config = architecture("gpt2", n_vocab=words.n_vocab, n_context=64, n_layer=n_layer, d_model=32, n_head=4)
        run = checkpoint.create_run(folder / "runs", name, {"config": dataclasses.asdict(config)}, words)
        checkpoint.save_step(run, 7, params=random_params(config, torch.float32), optimizer={}, rng={}, state={})
    return folder


def panels_of(path):
    """{title: data} and the texts of a page."""
    page = path.read_text(encoding="utf-8")
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    return {panel["title"]: panel["data"] for panel in found["panels"]}, found["texts"]


def test_the_demo_shows_every_tool(house):
    done = typed("interpret.report", "--run", "words", "--demo", "--out", "demo.html", cwd=house)
    assert (done.status, done.stderr) == (0, "")
    *_, where, work = done.stdout.splitlines()
    assert re.fullmatch(r"demo.html: 0\.\d\d MB, 8 panels, nothing else needed", where)
    assert re.match(r"\d+ rows of forward", work)
    panels, texts = panels_of(house / "demo.html")
    assert list(panels) == [
        "Model", "Surprise", "Heads on random repeats", "Heads on this text", "Attention", "Logit lens",
        "Direct effects", "Patching",
    ]  # fmt: skip
    assert ["".join(text) for text in texts] == [DEMO["clean"]]
    assert (panels["Patching"]["target"], panels["Patching"]["foil"]) == (" item", " line")
    again = typed("interpret.report", "--run", "words", "--demo", "--out", "again.html", cwd=house)
    assert again.status == 0
    assert (house / "again.html").read_bytes() == (house / "demo.html").read_bytes()


def test_the_heads_are_those_of_the_command(house):
    """The same sequences and intervals. Seen to fail with sequences of the report's own."""
    for words in (("report", "--text", "abc", "--out"), ("induction-heads", "--html")):
        done = typed(f"interpret.{words[0]}", "--run", "tiny", *words[1:], f"{words[0]}.html", cwd=house)
        assert (done.status, done.stderr) == (0, "")
    (page, _), (command, _) = (panels_of(house / f"{name}.html") for name in ("report", "induction-heads"))
    name = "Heads on random repeats"
    assert page[name]["scores"] == command[name]["scores"]


def test_a_demo_whose_answers_begin_alike_is_not_patched(house):
    done = typed("interpret.report", "--run", "tiny", "--demo", "--out", "bytes.html", cwd=house)
    assert (done.status, done.stderr) == (0, "")
    assert "no patching: this tokenizer begins both of the demo's answers with ·" in done.stdout
    panels, texts = panels_of(house / "bytes.html")
    assert "Patching" not in panels
    assert texts == [list(DEMO["clean"])]


def test_three_texts_are_patched_as_the_library_does(house):
    """Of two lengths: the ends are pairs, and the metric is that of the library's own runs."""
    words = ("--clean", "one two", "--corrupted", "one three", "--target", "\nx", "--foil", "y", "--out", "three.html")
    done = typed("interpret.report", "--run", "tiny", *words, cwd=house)
    assert (done.status, done.stderr) == (0, "")
    assert "the target is 2 tokens" in done.stdout
    panels, _ = panels_of(house / "three.html")
    found, loaded = panels["Patching"], checkpoint.load_model(house / "runs" / "tiny")
    target, foil = (pairs.continuation(BYTE, "one two", text).ids[0] for text in ("\nx", "y"))
    assert (target, foil) == (ord("\n"), ord(" "))
    run = lambda text: forward(loaded.params, loaded.config, torch.tensor([BYTE.encode(text)]))[0][0, -1]
    assert found["clean"] == pytest.approx((run("one two")[target] - run("one two")[foil]).item(), rel=1e-3)
    assert [entry["site"] for entry in found["maps"]] == ["resid_pre", "attn.out", "mlp.out", "attn.z"]
    assert found["maps"][0]["cells"][0][3] == 0
    assert [row[0] for row in found["maps"][0]["cells"]] == [0, 0]  # before the first difference
    assert found["corrupted"] == [*"one t", None, "e"]
    assert [row[0] for row in found["table"]] == ["layer", "0", "1"]


def test_a_text_alone_has_no_patching_and_a_model_without_blocks_no_heads(house):
    text = "a<b>&\x00é"
    for name, panels in (("tiny", 7), ("empty", 4)):
        done = typed("interpret.report", "--run", name, "--text", text, "--out", "text.html", cwd=house)
        assert (done.status, done.stderr) == (0, "")
        found, texts = panels_of(house / "text.html")
        assert len(found) == panels
        assert texts == [["a", "<", "b", ">", "&", "\x00", "\udcc3", "\udca9"]]
    assert found["Direct effects"]["parts"][-1][0] == "constant"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "text: expected --text, --demo or patch's three texts, got none"),
        (["--demo", "--text", "a"], "text: expected none beside --demo, got --text"),
        (["--demo", "--foil", "a"], "text: expected none beside --demo, got --foil"),
        (["--clean", "a", "--target", "b"], "corrupted: expected --clean, --corrupted and --target together"),
        (["--text", "a", "--foil", "b"], "clean: expected --clean, --corrupted and --target together"),
        (["--demo", "--out", "none/x.html"], "out: expected a file in a folder that is there, got none/x.html"),
        (["--demo", "--max-mb", "0.01"], "max_mb: expected at least 0."),
        (
            ["--clean", "a", "--corrupted", "b", "--target", "x", "--foil", "y"],
            "foil: expected another token than the target, got · twice",
        ),
        (["--text", ""], "text: expected at least one token"),
        (["--clean", "ab", "--corrupted", "", "--target", "c"], "corrupted: expected at least one token"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(house, words, said):
    before = snapshot(house)
    done = typed("interpret.report", "--run", "tiny", *words, cwd=house)
    assert done.status == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert snapshot(house) == before


def test_every_view_can_be_a_page(house):
    """The same numbers as the library's; of several texts each panel says whose it is."""
    views = [
        (["attention", "--text", "abcab"], ["Heads", "Attention"]),
        (["attention", "--text", "abcab", "--value-weighted"], ["Heads", "Value-weighted attention"]),
        (["logit-lens", "--demo"], ["Logit lens, text 1", "Logit lens, text 2", "Logit lens, text 3"]),
        (["induction-heads", "--num-sequences", "5"], ["Heads on random repeats"]),
    ]
    for (command, *words), titles in views:
        done = typed(f"interpret.{command}", "--run", "tiny", *words, "--html", "view.html", cwd=house)
        assert (done.status, done.stderr) == (0, "")
        panels, texts = panels_of(house / "view.html")
        assert list(panels) == titles
        if command == "attention":
            loaded, ids = checkpoint.load_model(house / "runs" / "tiny"), torch.tensor([BYTE.encode("abcab")])
            weighted = "--value-weighted" in words
            wanted = patterns(loaded.params, loaded.config, ids, value_weighted=weighted)[:, 0].flatten(0, 1)
            found = report.unpacked(panels[titles[1]]["patterns"], 8, 5)
            assert (found - wanted).abs().max() <= 1 / 510 + 1e-6
            assert texts == [list("abcab")]


def test_a_history_is_no_page(house):
    words = ("--run", "tiny", "--history", "--html", "x.html")
    done = typed("interpret.induction-heads", *words, cwd=house)
    assert (done.status, done.stdout) == (2, "")
    assert "html: expected the heads of one step, got --history" in done.stderr
