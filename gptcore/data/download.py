"""A download from where it is needed: a process that fetches, watched, restarted, waited for.

What you learn here: a network may be slow, cut or gone, so nothing that must not stop ever talks to it. The hub is
asked by a child process (fetch.py); here somebody watches whether it gets on, kills it when it does not, starts it
again after growing pauses, and gives up aloud. Whoever needs a chunk waits for it, and is told what it waits for.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from . import shards, streams
from .fetch import COUNTS, Order, missing

PATIENCE = 120.0  # seconds without a new document after which the process is killed
PAUSES = (5.0, 15.0, 45.0, 120.0)  # seconds before it is started again, when nothing new has come in between
PROBE = 3.0  # seconds in all for finding out whether the hub is there
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")  # read by the hub's libraries, so by us


class Lost(ValueError):
    """What was waited for can no longer come."""


class Progress(NamedTuple):
    """How far a download is."""

    n_chunks: int  # that are there
    n_fetched: int  # of them by this download
    n_wanted: int
    n_documents: int  # encoded by this download so far
    n_bytes: int  # of their text in UTF-8
    seconds: float  # since its start
    trouble: str  # what it waits for, or what went wrong last; empty while all is well


def is_offline() -> bool:
    """Has the user forbidden the network?"""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)


def hub_reachable(seconds=PROBE) -> bool:
    """Does the hub's host, or its proxy, take a connection? One try, in a thread that nobody waits for longer."""
    if is_offline():
        return False
    place = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if (proxy := getproxies().get(place.scheme)) and not proxy_bypass(place.hostname):  # then it is asked, not the hub
        place = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    port, answer = place.port or (80 if place.scheme == "http" else 443), queue.Queue()

    def knock():
        try:
            socket.create_connection((place.hostname, port), timeout=seconds).close()
            answer.put(True)
        except OSError:  # also a name that cannot be resolved
            answer.put(False)

    threading.Thread(target=knock, daemon=True).start()
    try:
        return answer.get(timeout=seconds)
    except queue.Empty:
        return False


class Download:
    """The chunks of a stream's folder, fetched by a process of its own from start() on, until close().

    watch(Progress) is called about five times a second by whoever waits; what it raises ends the waiting.
    """

    def __init__(self, order: Order, folder=None, *, patience=PATIENCE, pauses=PAUSES):
        self.order, self.folder = order, folder and Path(folder)
        self.patience, self.pauses = patience, pauses
        self.watch = lambda progress: None
        self._child, self._thread, self._closed, self._ended = None, None, threading.Event(), threading.Event()
        self._facts, self._chunks, self._trouble, self._failure, self._began = {}, set(), "", "", time.monotonic()
        self._cleanup, self._waiting = None, False

    def start(self) -> None:
        """Begin to fetch, unless it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="download", daemon=True)
            self._began = time.monotonic()
            self._thread.start()

    def gap(self) -> int | None:
        """The first chunk that is not there whole; None if all are that were asked for and that the stream has."""
        there = self.folder is not None and self.folder.is_dir()
        return missing(self.folder, shards.read_chunks(self.folder), self.order.n_chunks) if there else 0

    def wait(self, ready) -> None:
        """Return when ready() is true. Raises Lost when that can no longer come, and what watch raises."""
        while not ready():
            self.start()
            if self._ended.is_set() and not ready():
                raise Lost(self._failure or f"data: expected more of {self.order.source}, got its end")
            self.watch(self.progress())
            self._ended.wait(0.2)

    def wait_for_chunk(self, number) -> None:
        """Return when the chunk's shards are there."""
        self.wait(lambda: self._on_disk(number))  # one that has come may have gone: another process made room

    def wait_for_end(self) -> None:
        """Return when everything that was asked for is there, or all that the stream has. Raises as wait does."""
        self.wait(lambda: self._ended.is_set() and not self._failure)

    def progress(self) -> Progress:
        """How far it is now."""
        n_chunks = len(shards.read_chunks(self.folder)["rows"]) if self.folder and self.folder.is_dir() else 0
        facts, seconds = self._facts, time.monotonic() - self._began
        counts = n_chunks, len(self._chunks), self.order.n_chunks
        trouble = "another process is writing there" if self._waiting else self._trouble
        return Progress(*counts, facts.get("n_documents", 0), facts.get("n_bytes", 0), seconds, trouble)

    def close(self) -> None:
        """End the process. What was whole stays; what was not is fetched again another time."""
        self._closed.set()
        if self._cleanup:
            self._cleanup()
        if self._thread:
            self._thread.join()

    def _on_disk(self, number):
        rows = shards.read_chunks(self.folder)["rows"]
        return number < len(rows) and not shards.broken(self.folder, rows[number]["shards"].values())

    # ------------------------------------------------------------------------------------------ in the thread

    def _run(self):
        self._failure = f"data: expected more of {self.order.source}, got an error in watching its download"
        try:
            self._failure = self._fetch()
        finally:  # whoever waits learns of every end
            self._ended.set()

    def _fetch(self):
        """Process after process; why there will be no more, empty if nothing more is needed."""
        if is_offline() and not os.path.isdir(streams.open_stream(self.order.source).repository):
            return f"data: expected {self.order.source} from the hub, and the network is not to be used"
        tries, furthest = 0, 0  # documents read, by one process, since the last chunk
        while not self._closed.is_set():
            n_documents, n_chunks = self._facts.get("n_documents", 0), len(self._chunks)
            end, error = self._one_process()
            if self._closed.is_set() or end == "done":
                break
            self._trouble = f"{error}; trying again"
            if end == "final":
                return error
            n_read, closed_one = self._facts.get("n_documents", 0) - n_documents, len(self._chunks) > n_chunks
            tries = 0 if closed_one or n_read > furthest else tries + 1  # what is read a second time is nothing new
            furthest = 0 if closed_one else max(furthest, n_read)
            if tries > len(self.pauses):
                word = "try" if tries == 1 else "tries"
                return f"data: expected {self.order.source} from the hub, gave up after {tries} {word}: {error}"
            self._closed.wait(self.pauses[max(0, tries - 1)])
        return ""

    def _one_process(self):
        """(how it ended: done, failed or final; what it said)."""
        environment = os.environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "30", "HF_HUB_ETAG_TIMEOUT": "30"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        silent = "ignore::RuntimeWarning:runpy"  # which says that the package has loaded its module fetch before
        words = [sys.executable, "-W", silent, "-m", "gptcore.data.fetch", json.dumps(self.order._asdict())]
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            errors="replace", env=environment,
            start_new_session=True,  # Ctrl-C is for us: a chunk that is nearly there may still come
        )  # fmt: skip
        self._child, lines = child, queue.Queue()
        self._cleanup = weakref.finalize(self, _end, child)
        threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
        errors = queue.Queue()
        threading.Thread(target=_read, args=(child.stderr, errors), daemon=True).start()
        end, error, seen, since, before = "failed", "", None, time.monotonic(), self._facts
        while not self._closed.is_set():
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                line = ""
            if line is None:
                break
            facts = json.loads(line) if line else {}
            if "chunk" in facts:
                self._chunks.add(facts.pop("chunk"))
                self._trouble = ""
            end, error = facts.pop("end", end), facts.pop("error", error)
            now = [facts.get(name, 0) for name in COUNTS] if facts else seen
            if facts:
                self._waiting = facts["waiting"]
                self._facts = {name: before.get(name, 0) + facts.get(name, 0) for name in COUNTS}
            if now != seen or facts.get("waiting"):
                seen, since = now, time.monotonic()
            if time.monotonic() - since > self.patience:
                error = f"nothing came for {self.patience:.0f} s"
                break
        self._cleanup()
        if not error and end == "failed":
            error = _last(errors) or f"the process ended with status {child.returncode}"
        return end, error


def _end(child):
    """Kill the process: it keeps nothing that a kill could harm."""
    child.kill()
    child.wait()


def _read(pipe, lines):
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _last(lines):
    """The last line that a process wrote to its standard error."""
    found = ""
    while (line := lines.get()) is not None:
        found = line.strip() or found
    return found
