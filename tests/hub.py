"""The hub on loopback: a data set in the hub's own layout, served well, and as badly as hubs sometimes do."""

import hashlib
import http.server
import json
import random
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
import pyarrow.parquet

from gptcore.data.streams import STREAMS

FINEWEB = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""
WIKITEXT = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: test
    path: wikitext-103-raw-v1/test-*
  - split: train
    path: wikitext-103-raw-v1/train-*
  - split: validation
    path: wikitext-103-raw-v1/validation-*
---
"""
WORDS = ["the", "of", "and", "school", "water", "energy", "people,", "world.", "Ünï", "日本", "<|endoftext|>\r\n"]


def story(number, n_words=40) -> str:
    """A text of its own for each number."""
    rng = random.Random(number)
    return f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * n_words)))


def write_fineweb(root, n_files=3, n_rows=1_000, n_group=100, n_words=40) -> list[str]:
    """A small data set with FineWeb-Edu's files and columns; its texts in order."""
    texts = []
    for file in range(n_files):
        rows = [story(file * n_rows + row, n_words) for row in range(n_rows)]
        columns = {
            "text": rows, "id": [f"<urn:{file}-{row}>" for row in range(n_rows)], "dump": ["CC-MAIN-2024-10"] * n_rows,
            "url": ["https://example.org"] * n_rows, "file_path": ["s3://x"] * n_rows, "language": ["en"] * n_rows,
            "language_score": [0.9] * n_rows, "token_count": [len(text) for text in rows], "score": [3.1] * n_rows,
            "int_score": [3] * n_rows,
        }  # fmt: skip
        _write(root / f"sample/10BT/{file:03d}_00000.parquet", columns, n_group)
        texts += rows
    _write(root / "data/CC-MAIN-2024-10/train-00000-of-00001.parquet", {"text": ["another"]}, 1)
    (root / "README.md").write_text(FINEWEB)
    return texts


def write_wikitext(root) -> dict[str, list[str]]:
    """A small data set with WikiText's files: articles of lines, empty ones too; the articles of each split."""
    articles = {}
    for split, n_articles in {"train": 60, "validation": 8, "test": 5}.items():
        found = []
        for number in range(n_articles):
            title, body = f" = Article {split} {number} = \n", f" {story(number)} \n".replace("\r\n", "")
            found.append([title, "", body, " = = Part = = \n", " End . \n", ""])
        rows = [line for lines in found for line in lines]
        _write(root / f"wikitext-103-raw-v1/{split}-00000-of-00001.parquet", {"text": rows}, 50)
        articles[split] = ["".join(lines) for lines in found]
    (root / "README.md").write_text(WIKITEXT)
    return articles


def _write(path, columns, n_group):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=n_group)


class Hub:
    """A server for one data set. trouble(path) before each parquet read returns None, or what goes wrong:
    "drop", "truncate", "429", "503", "hang", or seconds to wait."""

    def __init__(self, root, repository):
        self.root, self.repository, self.trouble, self.requests = Path(root), repository, lambda path: None, []
        self.revision = next(s.revision for s in STREAMS.values() if s.repository == repository)
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def entry(self, path):
        content, name = path.read_bytes() if path.is_file() else b"", path.relative_to(self.root).as_posix()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file" if path.is_file() else "directory", "path": name, "size": len(content), "oid": oid}


class Handler(http.server.BaseHTTPRequestHandler):
    """What the libraries ask for: the data set, its tree, its files, whole or in ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = json.loads(content) if content[:1] == b"{" else parse_qs(content.decode())
        found = [self.hub.root / name for name in asked.get("paths", [])]
        self.reply(json.dumps([self.hub.entry(path) for path in found if path.exists()]).encode())

    def answer(self, with_body):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{hub.repository}", f"/datasets/{hub.repository}/resolve/{hub.revision}/"
        hub.requests.append((self.command, path))
        if path in (api, f"{api}/revision/{hub.revision}", f"{api}/revision/main"):
            return self.reply(json.dumps({"id": hub.repository, "sha": hub.revision, "siblings": []}).encode())
        if path.startswith(f"{api}/tree/{hub.revision}"):
            return self.tree(hub.root / path.removeprefix(f"{api}/tree/{hub.revision}").strip("/"))
        file = hub.root / path.removeprefix(files)
        if not path.startswith(files) or not file.is_file():
            return self.reply(b"", status=404, **{"X-Error-Code": "EntryNotFound"})
        wrong = hub.trouble(path) if file.suffix == ".parquet" and with_body else None
        if isinstance(wrong, float):
            time.sleep(wrong)
        if wrong == "hang":
            time.sleep(60)
        if wrong in ("429", "503"):
            return self.reply(b"", status=int(wrong), **{"Retry-After": "0"})
        content, size, status, extra = file.read_bytes(), file.stat().st_size, 200, {}
        if with_body and (asked := self.headers.get("Range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            content, status = content[int(first) : int(last or size) + 1], 206
            extra["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{size}"
        etag = f'"{hub.entry(file)["oid"]}"'
        self.reply(
            content, status, with_body, wrong,
            **{"ETag": etag, "X-Repo-Commit": hub.revision, "Accept-Ranges": "bytes"}, **extra,
        )  # fmt: skip

    def tree(self, folder):
        if not folder.is_dir():
            return self.reply(b"", status=404, **{"X-Error-Code": "EntryNotFound"})
        found = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()
        self.reply(json.dumps([self.hub.entry(path) for path in sorted(found)]).encode())

    def reply(self, content, status=200, with_body=True, wrong=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body and wrong in ("drop", "truncate"):
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(content)


@contextmanager
def serving(root, repository="HuggingFaceFW/fineweb-edu"):
    """A Hub at work."""
    hub = Hub(root, repository)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
