"""What every command of interpret does: find texts and their ids, draw tables that fit, write documents.

A command collects a Document for each text that it looked at and ends with write(), which is where --json, --csv and
--html are honoured.
"""

import csv
import dataclasses
import io
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptcore import checkpoint
from gptcore.files import write_whole
from gptcore.interpret import report
from tools.interpret.tokens import token_text
from tools.machine import set_up

ENDS = ("quit", "exit", "q")
MORE = "--json or --csv"  # where the columns are that do not fit
DOCUMENTS = ("json", "csv", "html")


class Document(NamedTuple):
    """What one text gave: its ids, the numbers as plain JSON, the same as rows of cells, {column: value}, and as panels
    of a page.
    """

    ids: list[int]
    result: dict[str, Any]
    rows: list[dict[str, Any]]
    panels: tuple[report.Panel, ...] = ()


class Counter:
    """Counts forwards and seconds, for the last line of a view."""

    def __init__(self):
        self.began, self.n_rows = time.perf_counter(), 0

    def line(self) -> Text:
        """How many rows went through the model, and how long all of it took."""
        words = "row" if self.n_rows == 1 else "rows"
        seconds = time.perf_counter() - self.began
        return Text(f"{self.n_rows:,} {words} of forward, {seconds:.2f} s", style="#666666")


def check_options(given) -> None:
    """Raise ValueError for documents that cannot be written, before any work is done."""
    asked = {name: given[name] for name in DOCUMENTS if given.get(name)}
    first, *others = [name for name, path in asked.items() if path == "-"] or [""]
    if others:
        raise ValueError(f"{others[0]}: expected a file beside --{first} -, got -")
    for name, path in asked.items():
        if path == "-" and given.get("interactive"):
            raise ValueError(f"{name}: expected a file beside --interactive, which asks on standard output, got -")
        if path != "-" and not Path(path).parent.is_dir():
            raise ValueError(f"{name}: expected a file in a folder that is there, got {path}")


def open_console(given) -> Console:
    """Where the views go: nowhere, once a document has standard output for itself."""
    return Console(highlight=False, quiet="-" in [given.get(name) for name in DOCUMENTS])


def load(given) -> checkpoint.Loaded:
    """RUN's best step, or the step that it is, on the device that was asked for."""
    return checkpoint.load_model(given["run"], device=set_up(given))


def texts(given, demos):
    """The texts to look at, as --text, --demo or --interactive say. Raises ValueError unless it is one of the three."""
    asked = [name for name in ("text", "demo", "interactive") if given[name] not in (None, False)]
    if len(asked) != 1:
        got = " and ".join(f"--{name}" for name in asked) or "none"
        raise ValueError(f"text: expected one of --text, --demo and --interactive, got {got}")
    return {"text": lambda: [given["text"]], "demo": lambda: demos, "interactive": lambda: typed(">>> ")}[asked[0]]()


def typed(prompt):
    """Line after line, until quit, exit, q, the end of the input or Ctrl-C; empty ones are passed over."""
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip() in ENDS:
            return
        if line.strip():
            yield line


def look_at_texts(given, tool, demos, show) -> int:
    """Load the run, show(model, text, given, console) -> Document for each text, and write the documents.

    What is wrong with a text ends the command, but for one that was typed, which is asked for again.
    """
    check_options(given)
    found, console = texts(given, demos), open_console(given)
    model, documents = load(given), []
    for text in found:
        try:
            documents.append(show(model, text, given, console))
        except ValueError as error:
            if not given["interactive"]:
                raise
            console.print(Text(str(error)), style="yellow", soft_wrap=True)
        except (EOFError, KeyboardInterrupt):
            if not given["interactive"]:
                raise
            break
    write(given, model, tool, documents, console)
    return 0


def ids_of(model, text, console, name="text") -> list[int]:
    """The text's ids, the last n_context of them where there are more, which is said. Refuses an empty text by name."""
    ids = model.tokenizer.encode(text)
    if not ids:
        raise ValueError(f"{name}: expected at least one token, got an empty text")
    if len(ids) > model.config.n_context:
        line = f"{len(ids):,} tokens: the last {model.config.n_context:,}, which the context holds, are looked at."
        console.print(Text(line))
    return ids[-model.config.n_context :]


# ------------------------------------------------------------------------------------------------------------ tables


def as_text(cell) -> Text:
    """A cell as a Text of its own, so that nothing in it is read as markup."""
    return cell.copy() if isinstance(cell, Text) else Text(str(cell))


def print_table(console, columns, rows, *, left=(), title="", most=24, gap=2) -> None:
    """A table that never wraps: cells are cut to `most` columns of the terminal, and table columns that do not fit are
    counted instead. columns are names or Texts; rows are lists of str or Text; left: columns that hold words; gap:
    spaces between columns.
    """
    columns, rows = [as_text(column) for column in columns], [[as_text(cell) for cell in row] for row in rows]
    for cell in (*columns, *(cell for row in rows for cell in row)):
        cell.truncate(most, overflow="ellipsis")
    widths = [max(cell_len(cell.plain) for cell in column) for column in zip(columns, *rows, strict=True)]
    n, room = 0, console.width - 2  # the box's edges
    while n < len(columns) and room >= widths[n] + gap:
        room, n = room - widths[n] - gap, n + 1
    if title:
        console.print(Text(title, style="bold"))
    shape = {"box": box.SIMPLE_HEAD, "padding": (0, gap - 1, 0, 0)} if gap else {"box": None, "padding": 0}
    table = Table(**shape)
    for column, width in list(zip(columns, widths, strict=True))[:n]:
        justify = "left" if column.plain in left else "right"
        table.add_column(column, justify=justify, no_wrap=True, width=width, overflow="ellipsis")
    for row in rows:
        table.add_row(*row[:n])
    console.print(table)
    if n < len(columns):
        console.print(Text(f"+{len(columns) - n} more: {MORE}"))


# --------------------------------------------------------------------------------------------------------- documents


def write(given, model, tool, documents, console) -> None:
    """--json: a line of JSON for each text; --csv: a row for each cell, in front its text's number. Undefined is empty
    in CSV and null in JSON. --html: the panels of all texts on one page.
    """
    if given["json"]:
        emit(given["json"], "".join(json_line(given, model, tool, document) for document in documents), console)
    if given["csv"]:
        emit(given["csv"], csv_table(documents), console)
    if given.get("html"):
        emit(given["html"], report.html(f"Inside {model.name}", numbered(documents)), console)


def numbered(documents) -> list[report.Panel]:
    """The panels of all documents; of several texts each title says whose it is."""
    name = lambda panel, n: panel.title if len(documents) == 1 else f"{panel.title}, text {n}"
    return [
        panel._replace(title=name(panel, n))
        for n, document in enumerate(documents, start=1)
        for panel in document.panels
    ]


def json_line(given, model, tool, document) -> str:
    """One text's numbers with all that they were made of."""
    options = {name: value for name, value in given.items() if name not in DOCUMENTS}
    content = {
        "tool": tool, "version": version("gptcore"), "run": model.name,
        "sha256": model.state["files"]["model.safetensors"]["sha256"],
        "tokens": [{"id": id, "text": token_text(model.tokenizer, id)} for id in document.ids],
        "options": options, "result": plain(document.result),
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def csv_table(documents) -> str:
    """The rows of all documents under one heading."""
    file = io.StringIO()
    rows = [{"text": number} | row for number, document in enumerate(documents) for row in document.rows]
    table = csv.DictWriter(file, list(rows[0]) if rows else ["text"], lineterminator="\n")
    table.writeheader()
    table.writerows({name: "" if value is None else value for name, value in plain(row).items()} for row in rows)
    return file.getvalue()


def plain(value):
    """The same as JSON knows it: tensors and tuples as lists, named tuples as dicts, what is no finite number None."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if dataclasses.is_dataclass(value):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def emit(path, content, console) -> None:
    """A document to its file, or to standard output."""
    if path == "-":
        console.file.write(content)
    else:
        write_whole(path, content)
