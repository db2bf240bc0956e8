"""invoke interpret.*: what the commands share (tokens, tables, documents), then each command on small runs."""

import csv
import dataclasses
import io
import json
import math
import xml.etree.ElementTree as xml

import pytest
import torch
from cases import random_params
from click.testing import CliRunner
from models import hand_built
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from typed import typed

from gptcore import checkpoint, data, forward, generator, init_params, tokenizer
from gptcore.config import architecture
from gptcore.interpret.attention import head_scores, patterns, strength
from gptcore.interpret.lens import logit_lens
from tools.cli import main
from tools.interpret import looking
from tools.interpret.picture import history_svg
from tools.interpret.tokens import glyphs, token_cell, token_text

BYTE = tokenizer.named("byte")

HOSTILE = {
    b"[bold]": "[bold]",
    b"[/green]": "[/green]",
    b"[/": "[/",
    b"\\[": "\\[",
    b" the": "·the",
    b" ": "·",
    b"  ": "··",
    b"a b": "a b",
    b"\n\n": "⏎⏎",
    b"\tx": "⇥x",
    "\u202eabc".encode(): "U+202Eabc",
    b"\x00": "U+0000",
    b"\x1b[31m": "U+001B[31m",
    "\u200d".encode(): "U+200D",
    "猫".encode(): "猫",
    "🙂".encode(): "🙂",
    b"\xe2": "<0xE2>",
    b"a\xe2\x82": "a<0xE2><0x82>",
    b"\xed\xa0\x80": "<0xED><0xA0><0x80>",
}


@pytest.mark.parametrize(("raw", "shown"), HOSTILE.items())
def test_a_token_is_seen_whole(raw, shown):
    """Markup, spaces, controls, half characters: as characters that stand for themselves."""
    assert glyphs(raw) == shown


def test_ids_without_bytes_have_names():
    assert token_text(BYTE, BYTE.eot) == "<|endoftext|>"
    gaps = tokenizer.named("cl100k_base")
    assert token_text(gaps, 100_270) == "<100270>"
    with pytest.raises(ValueError, match="id: expected 0 to 256, got 300"):
        token_text(BYTE, 300)


def test_a_cell_is_cut_by_columns_of_the_terminal():
    words = tokenizer.named("cl100k_base")
    (long,) = [i for i, token in enumerate(words.tokens) if token == b" Administration"]
    assert token_cell(words, long, width=8).plain == "·Admini…"
    assert token_cell(words, long).plain == "·Administration"


def printed(width, columns, rows, **ways):
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    looking.print_table(console, columns, rows, **ways)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_never_wraps(width):
    """30 columns of hostile tokens: no line is wider than the terminal, no row takes two, what is left out is told."""
    shown = list(HOSTILE.values())
    columns = ["site", *(f"key {n}" for n in range(30))]
    rows = [[f"row {n}", *(Text(shown[(n + k) % len(shown)]) for k in range(30))] for n in range(20)]
    text = printed(width, columns, rows, title="[bold]every[/] token", left=("site",), most=9)
    lines = text.splitlines()
    assert lines[0] == "[bold]every[/] token"
    assert sum(line.strip().startswith("row ") for line in lines) == 20
    assert max(cell_len(line) for line in lines) <= width
    n_shown = lines[2].count("key")
    assert 1 <= n_shown < 30
    assert lines[-1] == f"+{30 - n_shown} more: --json or --csv"
    assert "…" not in printed(width, columns, rows, most=40)  # what is shown is whole
    narrow = printed(200, columns[:2], [row[:2] for row in rows], most=9)
    assert "more" not in narrow


GIVEN = {"json": None, "csv": None, "text": None, "demo": False, "interactive": False}


def test_documents_that_cannot_be_written_are_refused_first(tmp_path):
    with pytest.raises(ValueError, match="csv: expected a file beside --json -, got -"):
        looking.check_options(GIVEN | {"json": "-", "csv": "-"})
    with pytest.raises(ValueError, match="json: expected a file beside --interactive"):
        looking.check_options(GIVEN | {"json": "-", "interactive": True})
    with pytest.raises(ValueError, match="csv: expected a file in a folder that is there"):
        looking.check_options(GIVEN | {"csv": str(tmp_path / "none" / "x.csv")})
    looking.check_options(GIVEN | {"json": str(tmp_path / "x.json"), "csv": "-"})


@pytest.mark.parametrize("given", [{}, {"text": "a", "demo": True}, {"demo": True, "interactive": True}])
def test_one_of_three_ways_names_the_text(given):
    with pytest.raises(ValueError, match="text: expected one of --text, --demo and --interactive, got"):
        looking.texts(GIVEN | given, ["a"])


def test_csv_has_an_empty_cell_where_nothing_is_defined():
    rows = [{"layer": 0, "score": 0.5}, {"layer": 1, "score": float("nan")}]
    text = looking.csv_table([looking.Document([1], {}, rows), looking.Document([2], {}, rows[:1])])
    assert list(csv.reader(io.StringIO(text))) == [
        ["text", "layer", "score"], ["0", "0", "0.5"], ["0", "1", ""], ["1", "0", "0.5"],
    ]  # fmt: skip
    assert json.dumps(looking.plain({"x": (float("inf"), 1)})) == '{"x": [null, 1]}'


# --------------------------------------------------------------------------------------------------------- the commands

TEXT = "abcab[/bold]\t\u202eabc猫 ab"


def save(name, words, steps, config, plan=None):
    folder = checkpoint.create_run("runs", name, {"config": dataclasses.asdict(config), "plan": plan}, words)
    for step, params in steps.items():
        checkpoint.save_step(folder, step, params=params, optimizer={}, rng={}, state={})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a hand-built run of three steps, the first two untrained, and a random one that knows its text."""
    place = tmp_path_factory.mktemp("looking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        made, config = hand_built(n_vocab=257, n_context=60)
        steps = {10: init_params(config, generator(1)), 20: init_params(config, generator(2)), 30: made}
        save("hand", BYTE, steps, config)
        (place / "notes.txt").write_text("a cat sat on a mat. " * 400, encoding="utf-8")
        dataset = data.prepare(["notes.txt"], BYTE, n_context=32, n_sequences=4, seed=1, cache="data")
        small = architecture("llama", n_vocab=257, n_context=32, n_layer=2, d_model=16, n_head=2)
        save("small", BYTE, {5: random_params(small, torch.float32)}, small, dataset.plan)
        yield place


@pytest.fixture
def call(home, monkeypatch):
    """Run a command in that folder; ValueErrors, which the bridge turns into one line, come through."""
    monkeypatch.chdir(home)

    def run(*argv, typed="", columns=80):
        result = CliRunner().invoke(
            main, ["interpret", *map(str, argv)], input=typed, env={"COLUMNS": str(columns)}, color=False
        )
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def load_run(home, name):
    return checkpoint.load_model(home / "runs" / name)


def test_a_lens_shows_what_the_library_reads(home, call):
    """The last row is the model's own prediction; JSON and CSV hold the same numbers."""
    model = load_run(home, "hand")
    ids = torch.tensor([model.tokenizer.encode("abcab")])
    logits, _ = forward(model.params, model.config, ids)
    best = logits[0, -1].argmax().item()
    text = call("logit-lens", "--run", "hand", "--text", "abcab", "--json", "lens.json", "--csv", "lens.csv")
    lines = text.splitlines()
    last = next(line for line in lines if line.strip().startswith("1 "))
    assert last.split()[:3] == ["1", "0.00", chr(best)] == ["1", "0.00", "c"]
    assert lines[-1].startswith("1 row of forward, ")
    content = json.loads((home / "lens.json").read_text(encoding="utf-8"))
    assert content["tool"] == "interpret.logit-lens"
    assert content["tokens"][0] == {"id": 97, "text": "a"}
    assert content["sha256"] == model.state["files"]["model.safetensors"]["sha256"]
    assert content["options"]["text"] == "abcab"
    (one,) = content["result"]["positions"]
    found = logit_lens(model.params, model.config, ids)
    for row, got in enumerate(one["rows"]):
        assert got["top"] == found.top[row, 0, -1].tolist()
        assert got["top_p"] == pytest.approx(found.top_p[row, 0, -1].tolist())
        assert (got["p"], got["rank"]) == (None, -1)  # nothing follows the last token
    with open(home / "lens.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["embed", "0", "1"]
    assert (rows[-1]["top"], rows[-1]["p"]) == ("c", "")


def test_a_target_continues_the_text(call):
    """As in every command: a space is put between them or taken from the text's end; the first token is followed."""
    text = call("logit-lens", "--run", "small", "--text", "ab", "--target", "c")
    assert text.startswith("a space was put before the target: ' c'\nthe target is 2 tokens (' ', 'c'); the first is")
    assert "rank and % of ·" in text
    text = call("logit-lens", "--run", "small", "--text", "ab ", "--target", "c")
    assert "after b (position 1); rank and % of ·" in text
    text = call("logit-lens", "--run", "small", "--text", "ab\n", "--target", "c", "--position", "0")
    assert "after a (position 0); rank and % of c" in text
    with pytest.raises(ValueError, match="position: expected -2 to 1 in this text, got 2"):
        call("logit-lens", "--run", "small", "--text", "ab", "--position", "2")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_every_view_fits_its_terminal(call, columns):
    """Hostile tokens, all positions, matrices and labels: no line is too wide, all end with what it took."""
    lens, heads = ("logit-lens", "--run", "small", "--text"), ("attention", "--run", "small", "--text")
    views = [
        (*lens, TEXT), (*lens, TEXT, "--position", "all"), (*heads, TEXT), (*heads, TEXT, "--layer", "1"),
        (*heads, TEXT, "--layer", "1", "--head", "0", "--value-weighted"),
        (*heads, "猫ab", "--layer", "1", "--head", "0"),
    ]  # fmt: skip
    for view in views:
        lines = call(*view, columns=columns).splitlines()
        assert max(map(cell_len, lines)) <= columns, view
        assert "of forward, " in lines[-1]


def test_demos_run_on_every_run(call):
    assert call("logit-lens", "--run", "small", "--demo").count("row of forward") == 3
    text = call("attention", "--run", "hand", "--demo")
    assert "L1H0: attention of each query" in text
    assert "Heads of layer 1 beside each other" in text


def test_a_tuned_lens_is_fitted_once_and_kept(home, call, monkeypatch):
    path = home / "runs" / "small" / "checkpoints" / "step-0000005" / "tuned_lens.safetensors"
    first = call("logit-lens", "--run", "small", "--text", "a cat sat", "--lens", "tuned")
    assert path.exists()
    assert first.startswith("Fitting translators on the training text, once for this step\n")
    assert "fitted on the run's training text" in first
    again = call("logit-lens", "--run", "small", "--text", "a cat sat", "--lens", "tuned")
    assert "fitted" not in again
    assert again.splitlines()[:-1] == first.splitlines()[2:-1]
    plain = call("logit-lens", "--run", "small", "--text", "a cat sat")
    assert plain.splitlines()[2:6] != again.splitlines()[2:6]
    with pytest.raises(ValueError, match="lens: expected a run that knows its text"):
        call("logit-lens", "--run", "hand", "--text", "a", "--lens", "tuned")


def test_long_and_empty_texts(call):
    text = call("logit-lens", "--run", "small", "--text", "x" * 50)
    assert text.startswith("50 tokens: the last 32, which the context holds, are looked at.")
    with pytest.raises(ValueError, match="text: expected at least one token, got an empty text"):
        call("logit-lens", "--run", "small", "--text", "")


def test_attention_shows_heads_labels_and_patterns(home, call):
    """And its documents hold every weight and score."""
    strongest = call("attention", "--run", "hand", "--text", "abcdabcd").splitlines()
    rows = [line.split() for line in strongest if line.strip().startswith(("previous ", "prefix ", "start "))]
    assert [row[:3] for row in rows if row[2] in ("1.00",)] == [["previous", "L0H0", "1.00"], ["start", "L1H1", "1.00"]]
    assert next(row for row in rows if row[0] == "prefix")[1] == "L1H0"
    labelled = call("attention", "--run", "hand", "--text", "abcdabcd", "--layer", "1")
    assert "L1H1: start_token 1.00, sparse 1.00" in labelled
    options = ("--layer", "1", "--head", "0", "--json", "-")
    content = json.loads(call("attention", "--run", "hand", "--text", "abcdabcd", *options))
    model = load_run(home, "hand")
    ids = torch.tensor([model.tokenizer.encode("abcdabcd")])
    wanted = patterns(model.params, model.config, ids)[1, 0, 0]
    torch.testing.assert_close(torch.tensor(content["result"]["pattern"]), wanted)
    found = head_scores(model.params, model.config, ids)
    for name, score in content["result"]["scores"].items():
        assert score["beyond"] == [[pytest.approx(x) for x in row] for row in strength(found, name).tolist()]
        assert score["low"] == [[None, None]] * 2
    assert content["result"]["labels"][1][1]["start_token"] == pytest.approx(1)
    table = list(
        csv.DictReader(io.StringIO(call("attention", "--run", "hand", "--text", "ab", *options[:4], "--csv", "-")))
    )
    assert [(row["query"], row["key"], row["key_token"]) for row in table] == [
        ("0", "0", "a"),
        ("1", "0", "a"),
        ("1", "1", "b"),
    ]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--layer", 99], "layer: expected 0 to 1, got 99"),
        (["--layer", 0, "--head", 2], "head: expected 0 to 1, got 2"),
        (["--head", 0], "head: expected --layer beside it, got 0 alone"),
    ],
)
def test_a_wrong_head_is_refused(call, options, line):
    with pytest.raises(ValueError, match=line):
        call("attention", "--run", "small", "--text", "ab", *options)


def test_the_loop_asks_again_and_ends(call):
    """A wrong layer asks again, an empty line is 0, all is all, quit ends; so does the end of the input."""
    text = call("attention", "--run", "small", "--interactive", typed="abab\n9\nx\n1\n\nabab\nall\nabab\nquit\n")
    assert text.count("layer, 0 to 1 or all [0]: ") == 5
    assert "L1H0: attention of each query" in text
    assert text.count("of forward") == 2
    text = call("logit-lens", "--run", "small", "--interactive", "--position", "3", typed="ab\n\nabcd\n")
    assert "position: expected -2 to 1 in this text, got 3" in text
    assert text.count("of forward") == 1


def test_induction_heads_finds_the_hand_made_one(home, call):
    """I9: 1.0 for the induction head, below 0.05 for the duplicate-token head; the pair, its worth and its pattern."""
    text = call(
        "induction-heads", "--run", "hand", "--num-sequences", "10", "--json", "heads.json", "--csv", "heads.csv"
    )
    content = json.loads((home / "heads.json").read_text(encoding="utf-8"))["result"]
    stripe = content["scores"]["stripe"]["beyond"]
    assert stripe[1][0] == pytest.approx(1, abs=1e-5)
    assert max(*stripe[0], stripe[1][1]) < 0.05
    assert (content["lengths"], content["num_sequences"]) == ([29, 14], [8, 2])
    first = content["pairs"][0]
    assert (first["earlier"], first["later"]) == ([0, 0], [1, 0])
    assert first["without_earlier"]["prefix"] > 0.9
    assert content["gain"]["low"] > 5
    assert "L1H0 1.000 strong 1.00 to 1.00" in " ".join(text.split())
    assert "L0H0 → L1H0" in text
    assert "L1H0 on A B C D E, twice" in text
    assert text.splitlines()[-1].startswith("41 rows of forward, ")  # 10, three heads ablated, one example
    with open(home / "heads.csv", encoding="utf-8") as file:
        rows = {(row["layer"], row["head"], row["score"]): row for row in csv.DictReader(file)}
    assert float(rows["1", "0", "stripe"]["value"]) == pytest.approx(1, abs=1e-5)
    assert float(rows["1", "0", "copying"]["value"]) == pytest.approx(1, abs=1e-5)
    assert rows["1", "0", "copying"]["chance"] == ""


def test_the_history_is_a_row_a_step_and_a_drawing(home, call):
    options = ("--num-sequences", "10", "--history", "--svg", "heads.svg", "--csv", "history.csv")
    lines = call("induction-heads", "--run", "hand", *options).splitlines()
    rows = [line.split() for line in lines if line.strip()[:2] in ("10", "20", "30")]
    assert [row[0] for row in rows] == ["10", "20", "30", "30"]  # the last one counts rows of forward
    assert [row[5] for row in rows[:3]] == ["minimal", "minimal", "strong"]
    assert rows[2][3:5] == ["L1H0", "1.00"]
    drawn = xml.fromstring((home / "heads.svg").read_text(encoding="utf-8"))
    assert "induction L1H0 ends at 1.00" in drawn.find("{*}desc").text
    assert len(drawn.findall("{*}polyline")) == 8
    with open(home / "history.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["step"] for row in table} == {"10", "20", "30"}
    gains = [float(row["value"]) for row in table if row["score"] == "gain"]
    assert abs(gains[0]) < 0.5
    assert gains[2] > 5
    with pytest.raises(ValueError, match="svg: expected --history beside it"):
        call("induction-heads", "--run", "hand", "--svg", "x.svg")


def test_a_drawing_leaves_out_what_is_undefined():
    curves = {"induction": ("#2196f3", {"L0H0": [0.0, math.nan, 0.5], "<H>": [0.1, 0.2, 0.3]})}
    drawn = xml.fromstring(history_svg("a & b", [10, 20, 40], curves))
    points = [line.get("points").split() for line in drawn.findall("{*}polyline")]
    assert [len(each) for each in points] == [2, 3]


def test_what_is_typed_wrong_is_one_line_and_2(home):
    """Through invoke: too long a sequence names the largest; a position that is none; no text."""
    for words, line in (
        (("interpret.induction-heads", "--run", "small", "--seq-length", "40"),
         "interpret.induction-heads: seq_length: expected 2 to 15, so that it fits 32 twice, got 40"),
        (("interpret.logit-lens", "--run", "small", "--text", "a", "--position", "x"),
         "interpret.logit-lens: Invalid value for '--position': expected a whole number or all, got 'x'"),
        (("interpret.attention", "--run", "small"),
         "interpret.attention: text: expected one of --text, --demo and --interactive, got none"),
    ):  # fmt: skip
        done = typed(*words, cwd=home)
        assert (done.status, done.stdout, done.stderr.strip()) == (2, "", f"invoke {line}")
