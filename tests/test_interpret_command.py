"""invoke interpret.*: what the commands share (tokens, tables, documents), then each command on small runs."""

import csv
import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from gptcore import tokenizer
from tools.interpret import looking
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
