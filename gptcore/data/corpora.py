"""Where text comes from: a name, a file or a folder becomes a corpus.

What you learn here: a corpus is nothing but documents in a fixed order, (name, text), the same ones each time it is
asked, and a few words on where they come from. Every further source of text enters by this one door. Nothing is
filtered: text is read as UTF-8, a byte order mark is dropped and line ends become "\\n".
Next: shards.py writes the documents' tokens into files.
"""

import ast
import glob
import gzip
import hashlib
import json
import os
import platform
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..files import write_whole

EXTENSIONS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
SKIP = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order, and where they come from."""

    name: str  # names the folder of its shards; changes when the files do
    sources: tuple[str, ...]  # what open_corpus was given, paths made absolute: opens the same corpus again
    source: str  # for people
    revision: str
    licence: str
    documents: Callable[[], Iterator[tuple[str, str]]]  # (name, text), the same ones in the same order at each call
    notes: tuple[str, ...] = ()  # what a reader should be told, a line each


def open_corpus(sources, *, cache, text_field="text", stdin=None) -> Corpus:
    """The corpus that --data names: python-docs, or files, folders and globs in the given order; "-" is stdin.

    A .txt or .md file is a document, so is a line's text_field in .jsonl and .jsonl.gz, and a row's in .parquet.
    Folders are read recursively in the order of their relative paths, without hidden names. What stdin gives is kept in
    cache, so that it can be opened again. Raises ValueError for what is missing, empty or no text.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not sources:
        raise ValueError("data: expected python-docs, a file, a folder, a glob or -, got nothing")
    if [str(source) for source in sources] == ["python-docs"]:
        return python_docs_corpus()
    found, absolute = [], []
    for source in map(str, sources):
        if source == "python-docs":
            raise ValueError("data: expected python-docs alone, got it among other sources")
        place = str(_keep(stdin or sys.stdin.buffer, Path(cache))) if source == "-" else source
        found += _files(place)
        absolute.append(os.path.abspath(place))
    return Corpus(
        name=f"files-{_signature(found, text_field)}",
        sources=tuple(absolute),
        source=", ".join(str(source) for source in sources),
        revision="",
        licence="the user's own",
        documents=lambda: (document for name, path in found for document in _read(name, path, text_field)),
    )


# ------------------------------------------------------------------------------------------- Python's documentation


STDLIB = sysconfig.get_paths()["stdlib"]


def python_docs_corpus(root=STDLIB) -> Corpus:
    """The text that every Python carries. Raises ValueError where neither topics nor module sources are installed."""
    modules = [(os.path.relpath(path, root), path) for path in _modules(root)]
    read = cache(lambda: tuple(python_docs(root)))  # two megabytes, and two seconds to read
    notes = ()
    if not modules:
        n_bytes = sum(len(text.encode("utf-8", "replace")) for _, text in read())
        if not n_bytes:
            raise ValueError("data: expected Python's documentation, got none in this Python; use --data FILE")
        notes = (f"python-docs: this Python has no module sources, only {n_bytes:,} bytes of help topics",)
    return Corpus(
        name=f"python-docs-{_signature(modules, platform.python_version())}",
        sources=("python-docs",),
        source="the standard library's help topics and docstrings",
        revision=f"{platform.python_implementation()} {platform.python_version()}",
        licence="PSF-2.0",
        documents=lambda: iter(read()),
        notes=notes,
    )


def python_docs(root=STDLIB):
    """Python's own documentation as (name, text): pydoc's help topics, then each module's docstrings, in sections."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    for name in sorted(topics):
        yield from sections(f"topics/{name}", topics[name].strip())
    seen = set()
    for path in _modules(root):
        try:
            with warnings.catch_warnings(action="ignore"), open(path, "rb") as source:
                tree = ast.parse(source.read())
        except (SyntaxError, ValueError):
            continue
        module = os.path.relpath(path, root)[:-3].replace(os.sep, ".").removesuffix(".__init__")
        found = [(module, ast.get_docstring(tree)), *docstrings(tree)]
        found = [(name, text.strip()) for name, text in found if text and text.strip()]
        new = [f"{name}\n{text}" for name, text in found if text not in seen and not seen.add(text)]
        yield from sections(module, "\n\n".join(new))


def docstrings(node, prefix=""):
    """The classes and functions below a node as (dotted name, docstring or None), in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, ast.get_docstring(child)
            yield from docstrings(child, f"{prefix}{child.name}.")
        else:
            yield from docstrings(child, prefix)


def sections(name, text, n_bytes=4096):
    """Cut at blank lines into pieces of at most n_bytes, unless a paragraph alone is longer.

    Whole modules are too unequal to hold out: one of them alone can be a quarter of the validation text.
    """
    part, size = [], 0
    for paragraph in text.split("\n\n") if text else ():
        more = len(paragraph.encode("utf-8", "replace")) + 2
        if part and size + more > n_bytes:
            yield name, "\n\n".join(part)
            part, size = [], 0
        part, size = [*part, paragraph], size + more
    if part:
        yield name, "\n\n".join(part)


def _modules(root):
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIP)
        yield from (os.path.join(folder, file) for file in sorted(files) if file.endswith(".py"))


# ------------------------------------------------------------------------------------------------- the user's files


def _files(source):
    """The text files of one source as (relative name, path), sorted by name."""
    if os.path.isfile(source):
        if not source.endswith(EXTENSIONS):
            raise ValueError(f"data: expected a file ending in {', '.join(EXTENSIONS)}, got {source}")
        if not os.path.getsize(source):
            raise ValueError(f"data: expected text, got the empty file {source}")
        return [(os.path.basename(source), source)]
    if os.path.isdir(source):
        found = [(Path(path).relative_to(source).as_posix(), path) for path in _walk(source)]
    else:
        paths = glob.glob(source, recursive=True)
        if not paths:
            raise ValueError(f"data: expected python-docs, a file, a folder, a glob or -, got nothing at {source}")
        found = [(Path(path).as_posix(), path) for path in paths if os.path.isfile(path)]
    found = sorted(each for each in found if each[1].endswith(EXTENSIONS) and os.path.getsize(each[1]))
    if not found:
        raise ValueError(f"data: expected files ending in {', '.join(EXTENSIONS)}, got none with text in {source}")
    return found


def _walk(root):
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))


def _signature(files, *words):
    """Eight hexadecimal digits that change when a file of (relative name, path) does: its name, size or time."""
    stats = [(name, os.stat(path)) for name, path in files]
    rows = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join([*words, *rows]).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _keep(stdin, folder):
    """Store what stdin gives, once, under a name that its content decides; the path."""
    content = stdin.read()
    if not content:
        raise ValueError("data: expected text on stdin, got nothing")
    path = folder / f"stdin-{hashlib.sha256(content).hexdigest()[:8]}" / "stdin.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return path


def _read(name, path, text_field):
    """The documents of one file; those without a character are left out."""
    if path.endswith((".txt", ".md")):
        rows = [(name, _decode(Path(path).read_bytes(), path))]
    elif path.endswith(".parquet"):
        rows = _parquet(name, path, text_field)
    else:
        rows = _json_lines(name, path, text_field)
    for row, text in rows:
        if text := clean(text):
            yield row, text


def clean(text) -> str:
    """A document as it is counted and tokenised: no byte order mark, line ends "\\n", nothing that UTF-8 cannot hold.

    Surrogates (JSON can spell half a pair) have no UTF-8: they become "?" here, before anything counts bytes.
    """
    return text.encode("utf-8", "replace").decode().removeprefix("\ufeff").replace("\r\n", "\n")


def _decode(content, path):
    """Bytes as UTF-8. What is mostly something else (UTF-16, an image, an archive) is refused, never trained on."""
    text = content.decode("utf-8", "replace")
    if b"\0" in content or 4 * (text.count("\ufffd") - content.count(b"\xef\xbf\xbd")) > len(text):
        raise ValueError(f"data: expected UTF-8 text, got a binary file or another encoding in {path}")
    return text


def _json_lines(name, path, text_field):
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                text = _decode(line, path).strip().removeprefix("\ufeff")
                if text:
                    yield f"{name}:{number}", _field(text, text_field, f"{path} line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data: expected a gzip file, got {path}: {error}") from error


def _field(line, text_field, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"data: expected JSON in {where}, got {line[:40]!r}") from error
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        got = f"the fields {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"data: expected text in the field {text_field!r} of {where}, got {got}; see --text-field")
    return row[text_field]


def _parquet(name, path, text_field):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"data: expected the package pyarrow to read {path}, got {error}") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: expected a parquet file, got {path}: {error}") from error
    with file:
        if text_field not in file.schema_arrow.names:
            got = ", ".join(file.schema_arrow.names)
            raise ValueError(f"data: expected the column {text_field!r} in {path}, got {got}; see --text-field")
        number = 0
        for batch in file.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if not isinstance(text, str):
                    got = type(text).__name__
                    raise ValueError(f"data: expected text in {text_field!r} of {path} row {number}, got {got}")
                yield f"{name}:{number}", text
