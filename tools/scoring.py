"""What invoke evaluate does: read the text, score it, and say what the numbers are worth."""

import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gptcore import checkpoint, data, device, files, stats
from gptcore.data import corpora, shards
from gptcore.evaluate.calibration import calibration, certainty
from gptcore.evaluate.choice import last_words, multiple_choice, read_items, read_words
from gptcore.evaluate.perplexity import (
    MIN_UNITS,
    Scores,
    blocks,
    detail,
    exp,
    first_tokens,
    gap,
    intervals,
    likelihood,
    references,
    score_tokens,
    summed,
    verdict,
    windows,
)
from tools import fetching
from tools.machine import set_up
from tools.reliability import reliability_svg

PATIENCE = 60.0  # seconds without anything new after which fetching text is given up
N_WORST = 20  # tokens shown in context
BANDS = ((20, "excellent"), (50, "good"), (100, "decent"), (math.inf, "needs work"))  # cl100k_base only


class Document(NamedTuple):
    """A text and its ids."""

    text: str
    tokens: list[int]
    n_bytes: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()


class Full(NamedTuple):
    """Everything about a target: a measure for score_tokens."""

    nats: Tensor
    correct: Tensor
    rank: Tensor
    entropy: Tensor
    confidence: Tensor
    brier: Tensor


def full(logits, targets) -> Full:
    """logits (n,V), targets (n,) -> Full."""
    sure = certainty(logits, targets)
    return Full(*detail(logits, targets), sure.confidence, sure.brier)


def check_options(given) -> None:
    """Raise ValueError for options that do not go together, and for files in no folder, before any work is done."""
    if given["choices"] or given["last_words"]:
        for name in ("data", "tokens", "window", "stride", "train_gap", "per_token"):
            if given[name]:
                raise ValueError(f"{name}: expected no questions beside it, got --choices or --last-words")
    if given["svg"] and given["last_words"] and not given["choices"]:
        raise ValueError("svg: expected text or --choices, which have confidences, got --last-words")
    for name in ("json", "svg", "per_token"):
        if given[name] and not Path(given[name]).parent.is_dir():
            raise ValueError(f"{name}: expected a file in a folder that is there, got {given[name]}")


def load(run, given) -> checkpoint.Loaded:
    """RUN's best step, or the step that it is, on the device that was asked for."""
    return checkpoint.load_model(run, device=set_up(given))


def most_tokens(model, given) -> int:
    """How many tokens to score: what was asked for, else what the run's own validation scores, else ten million."""
    own = None if given["data"] else model.run.get("n_validation_tokens")
    return given["tokens"] or own or 10_000_000


def read_text(model, given, console) -> list[Document]:
    """The text that --data names, or what the model's run has held out."""
    words = model.tokenizer
    if given["data"]:
        corpus = corpora.open_corpus(given["data"], cache=given["cache"], text_field=given["text_field"])
        texts = [text for _, text in corpus.documents()]
        n_bytes = [len(text.encode("utf-8", "replace")) for text in texts]
        return list(map(Document, texts, words.encode_batch(texts), n_bytes))
    held_out = own_text(model, given, console).validation
    return [Document(words.decode(tokens), list(tokens), size) for tokens, size in held_out]


def own_text(model, given, console, *, fetch=True) -> data.Dataset:
    """The text that the model's run was trained on; what it has held out of a stream is fetched again if it is gone.

    Raises ValueError where there is none, it is not here and not to be fetched, or its download gets nowhere.
    """
    if not model.run.get("plan"):
        raise ValueError(f"data: expected --data for {model.name}, which has no text of its own, got none")
    once = {"patience": PATIENCE, "pauses": ()}  # somebody waits for this
    with fetching.shown(console, "Fetching the held-out text, which is no longer in the cache") as watch:
        return data.reopen(model.run["plan"], model.tokenizer, cache=given["cache"], fetch=fetch, watch=watch, **once)


def train_text(model, given, n_tokens, console) -> list[Document]:
    """The first tokens of the training text, as many as were held out."""
    found, left = [], n_tokens
    for shard in own_text(model, given, console).training_shards():
        for tokens, size in shards.whole_documents(shard):
            if left <= 0:
                break
            found.append(Document(model.tokenizer.decode(tokens), tokens, size))
            left -= len(tokens)
    return cut(found, n_tokens, model.tokenizer)


def cut(documents, n_tokens, words) -> list[Document]:
    """The first n_tokens tokens; the last document ends where they do."""
    kept = first_tokens(pairs(documents), n_tokens, words.n_bytes)
    whole = documents[: len(kept)]
    return [
        document if len(tokens) == len(document.tokens) else Document(words.decode(tokens), tokens, size)
        for document, (tokens, size) in zip(whole, kept, strict=True)
    ]


def score(model, documents, given, measure=likelihood):
    """(measures of each target, targets a document, Scores by document) of documents as the options say."""
    eot = model.tokenizer.eot if given["prefix"] == "eot" else None
    ways = {"eot": eot, "window": given["window"], "stride": given["stride"], "measure": measure}
    measures, n_tokens = score_tokens(model.params, model.config, [d.tokens for d in documents], **ways)
    return measures, n_tokens, summed(measures, n_tokens, pairs(documents), model.tokenizer.n_bytes)


def pairs(documents) -> list[tuple]:
    """The documents as the library takes them."""
    return [(document.tokens, document.n_bytes) for document in documents]


# ------------------------------------------------------------------------------------------------------- perplexity


def show_perplexity(model, given, console) -> dict:
    """Score the text, print what came out, and return it for JSON."""
    documents = cut(read_text(model, given, console), most_tokens(model, given), model.tokenizer)
    texts = [document.text for document in documents]
    forecasts = given["calibration"] or given["svg"]
    measure = full if forecasts or given["per_token"] else likelihood
    began = time.perf_counter()
    with console.status(Text(f"reading {sum(len(d.tokens) for d in documents):,} tokens")):
        measures, n_tokens, scores = score(model, documents, given, measure)
    seconds = time.perf_counter() - began
    units, unit = in_units(model, documents, measures, n_tokens, scores)
    found = intervals(units, generator=device.generator("evaluate"))
    ladder = references(pairs(documents), model.config.n_vocab, counts=counts(model, given, console), texts=texts)
    console.print(facts(model, given, documents, scores, seconds))
    console.print(score_table(found))
    for line in reading(model, given, scores, found, ladder, texts, f"{len(units.nats)} {unit}"):
        console.print(Text(line))
    content = {name: plain(interval) for name, interval in found.items()}
    content |= {"references": ladder, "verdict": verdict(found["bits_per_byte"], ladder)}
    content |= {"n_tokens": int(scores.n_tokens.sum()), "tokens_per_second": int(scores.n_tokens.sum()) / seconds}
    if given["train_gap"]:
        content["train_gap"] = show_gap(model, given, units, int(scores.n_tokens.sum()), console)
    if forecasts:
        generator = device.generator("evaluate", "calibration")
        sure = calibration(measures.confidence, measures.correct, measures.brier, units.n_tokens, generator=generator)
        content["calibration"] = show_curve(model, sure, given, console)
    if given["per_token"]:
        write_tokens(given["per_token"], model, documents, measures, n_tokens)
        console.print(worst_table(model, documents, measures, n_tokens))
    return content | {"documents": by_document(documents, measures, n_tokens)}


def in_units(model, documents, measures, n_tokens, scores) -> tuple[Scores, str]:
    """What intervals are drawn over, and what to call it: documents, or blocks of a context where they are few."""
    if len(scores.nats) >= MIN_UNITS:
        return scores, "documents"
    size = model.config.n_context
    cut = blocks(measures, n_tokens, [d.tokens for d in documents], model.tokenizer.n_bytes, size)
    return cut, f"blocks of {size} tokens or more"


def facts(model, given, documents, scores, seconds) -> Table:
    """What was read, and how."""
    n_context, n_scored = model.config.n_context, int(scores.n_tokens.sum())
    window = given["window"] or n_context
    stride = given["stride"] or window
    prefix = 1 if given["prefix"] == "eot" else 0
    seen = sum(
        (first + end) * (end - first + 1) // 2 - begin * (end - first + 1)
        for d in documents
        for begin, end, first in windows(len(d.tokens) + prefix, window, stride)
    )
    n_all = sum(len(d.tokens) for d in documents)
    after = "each after the end-of-text id" if prefix else "first tokens not scored"
    source = ", ".join(given["data"]) or "what the run has held out"
    table = Table(box=box.SIMPLE, title=Text(model.name, style="bold"), title_justify="left", show_header=False)
    rows = {
        "text": f"{source}: {several(len(documents), 'document')}, {int(scores.n_bytes.sum()):,} bytes, {after}",
        "scored": f"{n_scored:,} tokens, {100 * n_scored / n_all:.1f} % of the text",
        "windows": f"{window} tokens, {stride} apart; a token saw {seen / n_scored:.0f} before it on average",
        "speed": f"{n_scored / seconds:,.0f} tokens a second",
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="#2196f3"), Text(value))
    return table


def several(n, word) -> str:
    """1 document, 2 documents."""
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def score_table(found) -> Table:
    """The four numbers with their intervals."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "value", "95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    names = {"loss": "loss (nats per token)", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
    for name, interval in found.items():
        bounds = "-" if math.isnan(interval.low) else f"{interval.low:.4g} to {interval.high:.4g}"
        table.add_row(names.get(name, name), f"{interval.value:.4f}", bounds)
    return table


def reading(model, given, scores, found, ladder, texts, units):
    """What the numbers say, a line each."""
    if math.isnan(found["loss"].low):
        yield f"No intervals: {units} are too few, {MIN_UNITS} are needed."
    else:
        yield f"Intervals: bootstrap over {units}."
    yield f"As unsure as a choice among {scores.perplexity:,.1f} tokens; untrained, among {model.config.n_vocab:,}."
    n_words = sum(len(re.split(r"\s+", text)) for text in texts)
    yield f"Perplexity of a word: {math.exp(min(700, scores.nats.sum().item() / n_words)):,.4g}."
    costs = ", ".join(f"{name} {bits:.3f}" for name, bits in ladder.items())
    words = verdict(found["bits_per_byte"], ladder)
    yield f"Bits per byte without a model: {costs}." + (f" The model {verb(words)}." if words else "")
    if model.tokenizer.name == "cl100k_base":
        yield f"Perplexity with this vocabulary: {next(word for top, word in BANDS if scores.perplexity < top)}."
    if model.state.get("train_loss") is not None:
        yield against_training(exp(model.state["train_loss"]), scores.perplexity, other=bool(given["data"]))


def verb(words) -> str:
    """The verdict inside a sentence."""
    return f"is {words}" if words.startswith("no ") else words


def against_training(trained, measured, *, other) -> str:
    """The perplexity logged in training beside this one; on other text a difference need not be overfitting."""
    ratio = measured / trained
    words = "overfitting" if ratio > 1.5 else "slightly higher, which is normal" if ratio > 1.1 else "similar"
    words = "other text" if other else words
    return f"Training perplexity {trained:.4g}, here {measured:.4g} ({measured - trained:+.4g}): {words}."


def counts(model, given, console):
    """How often each id came in training; None where the run's text is not here."""
    total = torch.zeros(model.config.n_vocab, dtype=torch.long)
    try:
        for shard in own_text(model, given, console, fetch=False).training_shards():
            total += torch.bincount(torch.from_numpy(shard.tokens.astype("int64")), minlength=len(total))
    except ValueError:  # the verdict then does without token frequencies
        return None
    return total


def show_gap(model, given, held_out, n_tokens, console) -> dict:
    """Training text measured in the same way, and the difference, each with its interval."""
    documents = train_text(model, given, n_tokens, console)
    trained, _ = in_units(model, documents, *score(model, documents, given))
    loss = intervals(trained, generator=device.generator("evaluate", "train"))["loss"]
    more = gap(held_out, trained, generator=device.generator("evaluate", "gap"))
    console.print(Text(f"Loss on training text {bounded(loss)}; on this text {bounded(more, '+.4f')}."))
    return {"train_loss": plain(loss), "difference": plain(more)}


def bounded(interval, form=".4f") -> str:
    """A number, and its interval if there is one."""
    low, high = (format(bound, form) for bound in (interval.low, interval.high))
    return f"{interval.value:{form}}" + ("" if math.isnan(interval.low) else f" ({low} to {high})")


def show_curve(model, found, given, console) -> dict:
    """The three numbers and the reliability curve, with bars; the curve is drawn where --svg says."""
    table = Table(box=box.SIMPLE_HEAD, title="Calibration", title_justify="left")
    for column in ("said", "came true", "95 % interval", "forecasts", ""):
        table.add_column(column, justify="right" if column else "left")
    columns = (column.tolist() for column in found.curve)
    for n, said, true, low, high in zip(*columns, strict=True):
        bar = Text("█" * round(20 * min(said, true)), style="#2196f3")
        bar.append("█" * (round(20 * max(said, true)) - len(bar)), style="#ff9800" if said > true else "#4caf50")
        table.add_row(
            f"{100 * said:.1f} %", f"{100 * true:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}", f"{n:,}", bar
        )
    console.print(table)
    names = {"error": found.ece, "error, equal counts": found.ece_equal_count, "Brier": found.brier}
    for name, interval in names.items():
        console.print(Text(f"{name} {bounded(interval)}"))
    console.print(Text("Orange: said more than came true. Green: said less."), style="#666666")
    if given["svg"]:
        files.write_whole(Path(given["svg"]), reliability_svg(model.name, found.curve))
    numbers = {name: plain(getattr(found, name)) for name in ("ece", "ece_equal_count", "brier")}
    return numbers | {"curve": {name: column.tolist() for name, column in found.curve._asdict().items()}}


def rows_of(model, documents, measures, n_tokens):
    """(document, index, id, its measures) of every target, in order."""
    columns = zip(*(column.tolist() for column in measures), strict=True)
    for place, (document, n) in enumerate(zip(documents, n_tokens.tolist(), strict=True)):
        for index in range(len(document.tokens) - n, len(document.tokens)):
            yield place, index, document.tokens[index], type(measures)(*next(columns))


def write_tokens(path, model, documents, measures, n_tokens) -> None:
    """A JSON line for each token: document, index, id, text, nll, rank, entropy."""
    with open(path, "w", encoding="utf-8") as file:
        for place, index, id, m in rows_of(model, documents, measures, n_tokens):
            row = {"document": place, "index": index, "id": id, "text": model.tokenizer.decode([id])}
            row |= {"nll": round(m.nats, 5), "rank": m.rank, "entropy": round(m.entropy, 5)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def worst_table(model, documents, measures, n_tokens) -> Table:
    """The tokens that surprised most, with what stood before them."""
    table = Table(box=box.SIMPLE_HEAD, title="Most surprising", title_justify="left")
    for column in ("nats", "rank", "before", "token"):
        table.add_column(column, justify="right" if column != "token" else "left", no_wrap=True)
    rows = sorted(rows_of(model, documents, measures, n_tokens), key=lambda row: -row[3].nats)[:N_WORST]
    for place, index, id, m in rows:
        before = model.tokenizer.decode(documents[place].tokens[max(0, index - 12) : index])
        text = model.tokenizer.decode([id])
        table.add_row(
            f"{m.nats:.2f}", str(m.rank), Text(visible(before)[-40:]), Text(visible(text), style="bold #f44336")
        )
    return table


def visible(text) -> str:
    """A text on one line, with the spaces at its ends to be seen."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return re.sub(r"^ | $", "·", "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text))


def by_document(documents, measures, n_tokens) -> list[dict]:
    """Nats by document and token."""
    return [
        {"sha256": d.sha256, "n_bytes": d.n_bytes, "nats": nats.double().sum().item(),
         "token_nats": [round(value, 5) for value in nats.tolist()]}
        for d, nats in zip(documents, measures.nats.split(n_tokens.tolist()), strict=True)
    ]  # fmt: skip


def write_json(path, content) -> None:
    """Every number, as one line of JSON."""
    files.write_whole(Path(path), json.dumps(content) + "\n")


def plain(interval) -> dict:
    """An interval as JSON, which knows neither nan nor infinity."""
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


# --------------------------------------------------------------------------------------------------------- questions


def lines_of(path) -> list[str]:
    """The lines of a text file; JSON may hold every other character that some take for the end of a line."""
    return Path(path).read_text(encoding="utf-8").split("\n")


def show_choices(model, given, console) -> dict:
    """Multiple choice: four ways of being right, with Wilson intervals, and how honest the confidences are."""
    items = named(given["choices"], read_items)
    scores = multiple_choice(model.params, model.config, model.tokenizer, items)
    title = f"{model.name}: {several(len(items), 'question')}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("", "right", "95 % interval"):
        table.add_column(column, justify="right" if column else "left")
    shares = {name: stats.wilson(int(right.sum()), len(items)) for name, right in scores.correct().items()}
    for name, share in shares.items():
        table.add_row(name, f"{100 * share.value:.1f} %", f"{100 * share.low:.1f} to {100 * share.high:.1f} %")
    console.print(table)
    chance = sum(1 / len(item.endings) for item in items) / len(items)
    console.print(Text(f"Guessing: {100 * chance:.1f} %."))
    ones, generator = torch.ones(len(items), dtype=torch.long), device.generator("evaluate", "choices")
    sure = calibration(scores.confidence(), scores.correct()["acc"], scores.brier(), ones, generator=generator)
    return {
        **{name: plain(share) for name, share in shares.items()},
        "guessing": chance,
        "calibration": show_curve(model, sure, given, console),
        "questions": [
            {"label": item.label, "log_p": log_p[: len(item.endings)]}
            for item, log_p in zip(items, scores.log_p.tolist(), strict=True)
        ],
    }


def show_words(model, path, console) -> dict:
    """Last words: the share that greedy decoding writes, and the perplexity of a word."""
    pairs = named(path, read_words)
    answers = last_words(model.params, model.config, model.tokenizer, pairs)
    share = stats.wilson(int(answers.greedy.sum()), len(pairs))
    console.print(Text(f"{model.name}: {several(len(pairs), 'last word')}"))
    bounds = f"{100 * share.low:.1f} to {100 * share.high:.1f} %"
    console.print(Text(f"right {100 * share.value:.1f} % ({bounds}), perplexity of a word {answers.perplexity:,.4g}"))
    words = [
        {"log_p": log_p, "greedy": greedy}
        for log_p, greedy in zip(answers.log_p.tolist(), answers.greedy.tolist(), strict=True)
    ]
    perplexity = answers.perplexity if math.isfinite(answers.perplexity) else None
    return {"acc": plain(share), "perplexity": perplexity, "words": words}


def named(path, read) -> list:
    """What read makes of a file's lines; an error names the file, and so does nothing at all."""
    try:
        found = read(lines_of(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got a binary file or another encoding") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error
    if not found:
        raise ValueError(f"{path}: expected a JSON object a line, got none")
    return found
