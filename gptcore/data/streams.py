"""Text that is too much to have: data sets on the hub, read as a stream that can go on where it stopped.

What you learn here: a stream is documents in a fixed order, each with a cursor, the place after it as plain JSON. With
the revision pinned and the order unshuffled, whoever starts at a cursor reads exactly the documents that follow. Rows
are fetched through the datasets library a row group at a time, so going on fetches none of those before.
Next: fetch.py writes a stream's tokens into shards.
"""

import hashlib
import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from .corpora import clean

N_ROWS = 1_000  # read at a time; a cursor is the place before them, and how many of them are done


class Stream(NamedTuple):
    """One configuration of a data set on the hub, or of a local folder in the hub's layout."""

    name: str  # names the folder of its shards
    repository: str
    config: str | None
    revision: str | None  # a commit; None: the newest one, kept in the manifest with the first shard
    licence: str
    splits: dict[str, str]  # our side: its split; without val a tenth of the documents is held out, by their text
    begins: str | None = None  # a document begins at each row that matches; None: every row is one
    text_field: str = "text"


STREAMS = {
    "fineweb-edu": Stream(
        name="fineweb-edu",
        repository="HuggingFaceFW/fineweb-edu",
        config="sample-10BT",
        revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
        licence="ODC-By-1.0",
        splits={"train": "train"},
    ),
    "wikitext": Stream(
        name="wikitext",
        repository="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        licence="CC-BY-SA-3.0",
        splits={"train": "train", "val": "validation", "test": "test"},
        begins=r" = [^=].* = \n?",
    ),
}


def is_stream(source) -> bool:
    """Does --data name a stream: one of STREAMS, or hf:REPOSITORY?"""
    return source in STREAMS or str(source).startswith("hf:")


def open_stream(source, text_field="text") -> Stream:
    """The stream of a name, or of hf:REPOSITORY[@REVISION][#CONFIG], a data set of the hub or a local folder.

    Raises ValueError for another source.
    """
    if source in STREAMS:
        return STREAMS[source]
    found = re.fullmatch(r"hf:(?P<repository>[^@#]+)(?:@(?P<revision>[^#]+))?(?:#(?P<config>.+))?", str(source))
    if not found:
        known = ", ".join(STREAMS)
        raise ValueError(f"data: expected {known} or hf:REPOSITORY[@REVISION][#CONFIG], got {source!r}")
    word = hashlib.sha256(f"{source}\0{text_field}".encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", found["repository"]).strip("-.")[-40:]
    return Stream(
        name=f"hf-{slug}-{word}",
        repository=found["repository"],
        config=found["config"],
        revision=found["revision"],
        licence="see the data set's card",
        splits={"train": "train"},
        text_field=text_field,
    )


def documents(stream, split, cursor=None) -> Iterator[tuple[dict, str]]:
    """(cursor after it, text) of each document, from a cursor on, or from the start.

    Raises ValueError for rows without text in the stream's field; what the network does comes as its library raises it.
    """
    if stream.begins is None:
        for text, _, after in rows(stream, split, cursor):
            if text := clean(text):
                yield after, text
        return
    part, begins, after = [], re.compile(stream.begins), cursor
    for text, before, after in rows(stream, split, cursor):  # noqa: B007, the last row's cursor ends the last document
        if part and begins.fullmatch(text):
            if whole := clean("".join(part)):
                yield before, whole
            part = []
        part.append(text)
    if part and (whole := clean("".join(part))):
        yield after, whole


def rows(stream, split, cursor=None) -> Iterator[tuple[str, dict, dict]]:
    """Each row's text with the cursors before and after it.

    A cursor is {"state": the data set's own, "done": rows after it that are read}: asking the data set for its state
    before each row would cost more than the row.
    """
    dataset = open_split(stream, split)
    if cursor and cursor["state"]:
        dataset.load_state_dict(cursor["state"])
    state, done = (cursor["state"], cursor["done"]) if cursor else (None, 0)
    table = iter(dataset)
    while batch := list(islice(table, N_ROWS)):
        for index in range(done, len(batch)):
            text = batch[index].get(stream.text_field)
            if not isinstance(text, str):
                got = f"{type(text).__name__}, among the fields {', '.join(batch[index])}"
                raise ValueError(f"data: expected text in the field {stream.text_field!r} of {stream.name}, got {got}")
            yield text, {"state": state, "done": index}, {"state": state, "done": index + 1}
        state, done = dataset.state_dict(), 0


def open_split(stream, split):
    """The data set as a stream whose pieces are row groups, one column of them where the format has columns."""
    import datasets

    dataset = datasets.load_dataset(
        stream.repository, name=stream.config, split=split, streaming=True, revision=stream.revision
    )
    return dataset.select_columns([stream.text_field]).reshard()
