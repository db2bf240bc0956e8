"""A report: everything that was found out about a model, on one page of HTML that needs nothing else.

What you learn here: a page can be looked at for years if it is one file that loads nothing, and it can be trusted if
nothing in it can run but what we wrote. So the code and the style are inside (report.js, report.css), the browser is
told their hashes and refuses all others, and what comes from outside, such as tokens, is data and never markup.
A panel is plain data: whoever has other numbers of the same kind makes a panel of them.
Axes: T tokens, L layers, H heads, R rows of a lens.
Next: tools/ puts the panels of a run together.
"""

import base64
import hashlib
import json
import math
import re
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptcore.interpret.attention import SHAPES, labels
from gptcore.interpret.pairs import band, doubt

# What each kind of panel shows, for whoever sees one for the first time.
KINDS = {
    "about": "What was looked at: the model, down to the fingerprint of its weights, and what it read.",
    "scores": "Each head is scored for what it looks at: 0 is what chance would reach, 1 is always. Choose a row to "
    "open its head; a heading sorts.",
    "heads": "Every row of a pattern is one token looking back: the stronger a cell's colour, the more of that earlier "
    "token it takes.",
    "lens": "What the model would say next if it stopped after each layer: read a column downwards to watch it make "
    "up its mind.",
    "waterfall": "The score of one next token as a sum of what each part of the network wrote: blue pushes it up, "
    "orange pulls it down, and the last bar is what is left.",
    "patching": "Two prompts, two answers: one activation of the clean run is put into the corrupted run, and a cell "
    "says how much of the clean answer that brings back.",
    "losses": "How surprised the model was by each token: the taller a bar, the less it expected what came.",
    "comparison": "Two models on the same documents. Left of the line the second predicts better, right of it the "
    "first; an interval that crosses the line leaves it open.",
    "reliability": "Of the times the model says 70 %, is it right in 70 %? Dots on the diagonal say yes; below it the "
    "model is too sure of itself.",
}
NOTES = {
    "losses": "Nats a token; dashed: the mean.",
    "comparison": "Above, the difference with its 95 % interval; grey: too small to matter. Below, a dot for each "
    "document, the first model across, the second up; blue where the second is better.",
    "reliability": "In percent: what was said across, what came true up, with 95 % intervals; the bars below count "
    "forecasts.",
    "heads": "Colours follow the root of the weight, so that a tenth is still seen. Weights are kept in 256 steps: "
    "what is shown is within 1/510 of what was measured.",
    "lens": "A stronger colour is surer. Underlined: the guess is the token that came next. The last row is what the "
    "model says.",
    "patching": "In percent. Colours stop at ±100 %, numbers do not. Where the prompts differ, the corrupted token "
    "follows the clean one. Hatched: not defined.",
}
SCORES = {  # what a high score says of a head
    "previous": "It looks at the token just before.",
    "current": "It looks at the token itself.",
    "start": "It looks at the first token, often for want of anything better.",
    "duplicate": "It looks at earlier copies of the token.",
    "prefix": "It looks at what followed an earlier copy of the token, which is what induction heads do.",
    "stripe": "On a text that is said twice it looks at what came next the first time: induction.",
    "uniform": "It looks everywhere alike: 1 is an even gaze.",
    "sparse": "It looks at one token only: the mean of its largest weight.",
}
# Whole lines, and what follows two blanks; in JavaScript no string of ours looks like that.
COMMENT = re.compile(r"^ *//.*|  // .*|^ */\*[^*]*\*/", re.MULTILINE)
STANDS_OUT = 0.3  # beyond chance: from here on an induction head is called weak, not minimal
INTRODUCTION = "Choose a token in the line below, and every panel marks it; choose a head, and every panel shows it."
HINT = "Point at something, or use the arrow keys, to read its numbers."
MOST_BARS = 24  # of a waterfall; the smaller ones are one bar
DIGITS = 4  # significant ones; patterns are kept in 256 steps instead


class Panel(NamedTuple):
    """One part of a report: plain data (dicts, lists, numbers, strings, tensors) that its kind can show."""

    kind: str  # one of KINDS
    title: str
    data: dict[str, Any]


def html(title, panels, *, max_mb=None) -> str:
    """The page as text: the same panels, the same text.

    A page above max_mb (1,000,000 bytes each) loses head patterns: what stays are the heads that score best, each
    score's best and one a layer at least, and the page names those that are missing. Raises ValueError for an unknown
    kind, and where max_mb is too little even so.
    """
    for panel in panels:
        if panel.kind not in KINDS:
            raise ValueError(f"panel: expected one of {', '.join(KINDS)}, got {panel.kind!r}")
    page = _page(title, panels)
    if max_mb is not None and len(page) > 1e6 * max_mb:
        page = _page(title, _thinned(panels, len(page) - 1e6 * max_mb))
        if len(page) > 1e6 * max_mb:
            raise ValueError(f"max_mb: expected at least {math.ceil(len(page) / 1e4) / 100}, got {max_mb:g}")
    return page


def _page(title, panels):
    script, style = _source("report.js"), _source("report.css")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    data = _data(panels)
    numbered = list(enumerate(panels, start=1))
    lines = [
        '<!doctype html><html lang="en"><head>',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{style}</style></head>",
        f"<body><header><h1>{escape(title)}</h1>",
        f'<p class="lead">{INTRODUCTION if any(map(_has_text, panels)) else ""}</p>',
        "<nav>", *(f'<a href="#panel-{n}">{escape(panel.title)}</a>' for n, panel in numbered), "</nav></header>",
        '<div id="text"></div><main>', *(_section(n, panel) for n, panel in numbered), "</main>",
        "<noscript>The pictures are drawn with JavaScript, which is switched off here.</noscript>",
        '<p id="end"><button class="act" id="json">All data as JSON</button>',
        "<span>This file is complete: it loads nothing and sends nothing.</span></p>",
        f'<script type="application/json" id="data">{data}</script>',
        f"<script>{script}</script></body></html>",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _has_text(panel):
    return "tokens" in panel.data


def _section(number, panel):
    """A panel without its picture, which the script puts into its body. Nothing here comes from a tokenizer."""
    told = lambda name: panel.data.get(name) or []
    notes = [*told("notes"), *([NOTES[panel.kind]] if panel.kind in NOTES else [])]
    lines = [
        f'<section class="panel" id="panel-{number}" data-kind="{panel.kind}" aria-labelledby="title-{number}">',
        f'<h2 id="title-{number}">{escape(panel.title)}</h2>',
        *(f'<p class="finding">{escape(text)}</p>' for text in told("findings")),
        f'<p class="lead">{escape(KINDS[panel.kind])}</p>',
        *_terms("facts", told("facts")), *_terms("rows", told("rows") if panel.kind == "about" else []),
        '<div class="controls"></div>',
        f'<p class="readout" aria-live="polite">{"" if panel.kind == "about" else HINT}</p>',
        '<div class="body"></div>',
        *(f'<p class="note">{escape(text)}</p>' for text in notes), "</section>",
    ]  # fmt: skip
    return "\n".join(lines)


def _terms(name, pairs):
    """A list of terms and what they are, nothing for none."""
    if pairs:
        inside = (f"<div><dt>{escape(str(term))}</dt><dd>{escape(str(value))}</dd></div>" for term, value in pairs)
        yield f'<dl class="{name}">{"".join(inside)}</dl>'


@cache
def _source(name):
    """A source without its comments and its indentation: what is read here is not read there."""
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return "\n".join(line.strip() for line in COMMENT.sub("", text).splitlines() if line.strip())


def _hash(source):
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _data(panels):
    """The panels as JSON in ASCII without a "<"; equal texts are written once, and panels name them by number."""
    texts, shown = [], []
    for panel in panels:
        data = plain(panel.data)
        if "tokens" in data:
            tokens = data.pop("tokens")
            texts += [] if tokens in texts else [tokens]
            data["text"] = texts.index(tokens)
        shown.append({"kind": panel.kind, "title": panel.title, "data": data})
    page = {"texts": texts, "head": _first_head(panels), "panels": shown}
    return json.dumps(page, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _first_head(panels):
    """The head to begin with, "layer.head": of those whose patterns are there the one that stands out most."""
    there = {tuple(head) for panel in panels if panel.kind == "heads" for head in panel.data["heads"]}
    found = [
        (value, tuple(head))
        for panel in panels if panel.kind == "scores"
        for name, score in panel.data["scores"].items() if name not in SHAPES
        for head, value in zip(panel.data["heads"], plain(score["corrected"]), strict=True)
        if value is not None and tuple(head) in there
    ]  # fmt: skip
    return "{}.{}".format(*max(found, key=lambda each: each[0])[1]) if found else None


def plain(value):
    """What JSON can hold: tensors become lists, numbers keep four digits, and what is not finite becomes None."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def token_texts(tokenizer, ids) -> list[str]:
    """The true text of each id. A byte that is no character is a lone surrogate, as Python's surrogateescape has it."""
    special = {id: text for text, id in tokenizer.special.items()}
    return [
        token.decode("utf-8", "surrogateescape") if (token := tokenizer.tokens[id]) else special.get(id, f"<id {id}>")
        for id in map(int, ids)
    ]


def packed(patterns) -> str:
    """Patterns (heads, T, T) as base64 of round(255 a), the lower triangle: head, query, key at q(q+1)/2 + k."""
    T = patterns.shape[-1]
    rows, columns = torch.tril_indices(T, T)
    steps = (255 * patterns[:, rows, columns]).round().to(torch.uint8)
    return base64.b64encode(steps.cpu().numpy().tobytes()).decode()


def unpacked(text, n_head, n_token) -> Tensor:
    """The patterns (n_head, T, T) that packed made a text of, within 1/510."""
    steps = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(n_head, -1)
    rows, columns = torch.tril_indices(n_token, n_token)
    patterns = torch.zeros(n_head, n_token, n_token)
    patterns[:, rows, columns] = steps.float() / 255
    return patterns


def _thinned(panels, excess):
    """The panels with so many bytes less of head patterns, or with those alone that must stay."""
    thinner = []
    for panel in panels:
        if panel.kind == "heads" and excess > 0:
            heads = [tuple(head) for head in panel.data["heads"]]
            n_bytes = len(panel.data["patterns"]) // len(heads)
            order, n_least = _by_need(heads, panels)
            n = max(n_least, len(heads) - math.ceil(excess / (n_bytes - 10)))  # naming a missing one takes 8
            panel = _with_heads(panel, sorted(map(heads.index, order[:n])))
            excess -= (len(heads) - n) * (n_bytes - 10)
        thinner.append(panel)
    return thinner


def _by_need(heads, panels):
    """(the heads, most needed first; how many must stay: the best of each score and of each layer)."""
    columns = [
        dict(zip(map(tuple, panel.data["heads"]), plain(score["corrected"]), strict=True))
        for panel in panels if panel.kind == "scores" for score in panel.data["scores"].values()
    ]  # fmt: skip
    value = lambda column, head: -math.inf if column.get(head) is None else column[head]
    best = lambda head: max((value(column, head) for column in columns), default=0.0)
    musts = [max(heads, key=lambda head: value(column, head)) for column in columns]
    for layer in dict.fromkeys(layer for layer, _ in heads):
        musts.append(max((head for head in heads if head[0] == layer), key=best))
    musts = list(dict.fromkeys(musts))
    return [*musts, *sorted((head for head in heads if head not in musts), key=best, reverse=True)], len(musts)


def _with_heads(panel, kept):
    """A panel of patterns with the heads of these numbers only, and a sentence that names the others."""
    data, n = dict(panel.data), len(panel.data["heads"])
    steps = base64.b64decode(data["patterns"])
    size = len(steps) // n
    data["patterns"] = base64.b64encode(b"".join(steps[i * size : (i + 1) * size] for i in kept)).decode()
    missing = [head_name(layer, head) for i, (layer, head) in enumerate(data["heads"]) if i not in set(kept)]
    for name in ("heads", "labels", "norms"):
        if data.get(name) is not None:
            data[name] = [plain(data[name][i]) for i in kept]
    data["notes"] = [*data.get("notes", ()), f"Left out to keep the file small: {', '.join(missing)}."]
    return panel._replace(data=data)


# ------------------------------------------------------------------------------------------- panels of what was found


def head_name(layer, head) -> str:
    """L1H0: layer 1, head 0."""
    return f"L{layer}H{head}"


def about(title, facts, rows, tokens) -> Panel:
    """What was looked at: facts and rows, both (term, value) pairs, and the text as token_texts gives it."""
    return Panel("about", title, {"facts": facts, "rows": rows, "tokens": tokens})


def head_scores(title, scores, *, notes=()) -> Panel:
    """{name: attention.Score} as a table, each (L,H); what is not a share, the effective keys, is left out."""
    n_layer, n_head = next(iter(scores.values())).value.shape
    heads = [(layer, head) for layer in range(n_layer) for head in range(n_head)]
    columns, best = {}, []
    for name, score in scores.items():
        if name == "keys":
            continue
        value, low, high = score[:3] if name in SHAPES else score.corrected()
        chance = torch.full_like(value, math.nan) if name in SHAPES else score.chance
        column = {"corrected": value, "low": low, "high": high, "value": score.value, "chance": chance}
        columns[name] = {key: each.flatten() for key, each in column.items()}
        top = value.flatten().nan_to_num(-math.inf).argmax().item()
        if name not in SHAPES and value.flatten()[top] > STANDS_OUT:
            best.append(f"{name} {head_name(*heads[top])} ({value.flatten()[top]:.2f})")
    named = [list(each) or ["mixed"] for layer in labels(scores) for each in layer]
    data = {"heads": heads, "scores": columns, "labels": named, "words": {n: SCORES.get(n, "") for n in columns}}
    nothing = f"No head stands out: none of what it could look for reaches {STANDS_OUT} beyond chance."
    finding = f"What stands out: {', '.join(best)}." if best else nothing
    return Panel("scores", title, data | {"findings": [finding], "notes": notes})


def attention(title, tokens, patterns, *, norms=None, named=None) -> Panel:
    """Every head's pattern (L,H,T,T). norms (L,H,T): attention.value_lengths; named: labels of scores."""
    n_layer, n_head = patterns.shape[:2]
    data = {
        "tokens": tokens,
        "heads": [(layer, head) for layer in range(n_layer) for head in range(n_head)],
        "patterns": packed(patterns.flatten(0, 1)),
        "norms": None if norms is None else norms.flatten(0, 1),
        "labels": [list(each) for layer in named for each in layer] if named else [[]] * (n_layer * n_head),
    }
    return Panel("heads", title, data)


def lens(title, tokens, lenses, text, *, row=0) -> Panel:
    """Lenses by name, {"logit": lens.Lens}, of one row; text(ids) are the texts of tokens, as token_texts has them."""
    shown, first = {}, next(iter(lenses.values()))
    for name, each in lenses.items():
        nested = [[text(ids) for ids in reading] for reading in each.top[:, row].tolist()]
        rank = [[None if place < 0 else place for place in reading] for reading in each.rank[:, row].tolist()]
        numbers = {"p": each.top_p, "target_p": each.p, "entropy": each.entropy, "kl": each.kl}
        shown[name] = {"top": nested, "rank": rank} | {key: value[:, row] for key, value in numbers.items()}
    targets = [text([id])[0] if id >= 0 else None for id in first.target[row].tolist()]
    rows = [name if name == "embed" else f"block {name}" for name in first.names]
    middle = first.settled[row].double().median()
    finding = f"Half of the guesses no longer change from {rows[int(middle)]} on."
    data = {"tokens": tokens, "rows": rows, "targets": targets, "lenses": shown, "findings": [finding]}
    return Panel("lens", title, data)


def waterfall(title, tokens, direct, target, foil=None, *, row=0, position=-1, capped=False) -> Panel:
    """The logit of a target, less that of a foil, as attribution.direct splits it at a position of one row."""
    parts = [(_part(node), value) for node, value in zip(direct.nodes, direct.parts[:, row].tolist(), strict=True)]
    data = {"tokens": tokens, "position": position % len(tokens), "target": target, "foil": foil}
    largest = max(parts, key=lambda part: abs(part[1]))
    notes = ["This model bends its logits at a cap; the total is the logit before that."] if capped else []
    finding = f"The largest part is {largest[0]}: {largest[1]:+.2f}, of {direct.logit[row]:.2f} in all."
    told = {"notes": notes, "findings": [finding.replace("-", "−")]}
    return Panel("waterfall", title, data | bars(parts, direct.constant[row].item()) | told)


def _part(node):
    """A node's name on the page: L0H3, MLP 0, bias 0 (of the heads' output), embed, pos."""
    if node.head is not None:
        return head_name(node.layer, node.head)
    return node.site if node.layer < 0 else f"{'MLP' if 'mlp' in node.site else 'bias'} {node.layer}"


def bars(parts, constant) -> dict[str, Any]:
    """Bars of (name, value) parts as [name, from, to], in the order given and by size; the total is the last.

    Of more than MOST_BARS parts the smaller ones are one bar.
    """
    sized = sorted(parts, key=lambda part: -abs(part[1]))
    large, small = sized[:MOST_BARS], sized[MOST_BARS:]
    rest = [(f"{len(small)} smaller", sum(value for _, value in small))] if small else []
    found = {}
    for order, shown in {"network": [part for part in parts if part in large], "size": large}.items():
        top, found[order] = 0.0, []
        for name, value in [*shown, *rest, ("constant", constant)]:
            found[order].append((name, top, top + value))
            top += value
        found[order].append(("total", 0.0, top))
    return {"parts": [*parts, ("constant", constant)], "bars": found}


def patching(
    title, tokens, corrupted, sweeps, *, target, foil=None, metric="logit difference", align=None, layers=None,
    top=None, row=0,
) -> Panel:  # fmt: skip
    """Maps of the recovery in one pair, from patching.Sweeps by layer and position or head, clean into corrupt.

    tokens and corrupted are the texts of the two prompts; align pairs their positions (all alike if None), and what has
    no counterpart is not defined. layers: {site: Sweep by layer} for the table. top: {run: [(token, p), ...]}.
    """
    align = [(i, i) for i in range(len(tokens))] if align is None else align
    across = dict(align)  # clean position -> corrupt position
    maps = []
    for sweep in sweeps:
        cells, columns = sweep.recovery[..., row], None
        if sweep.axes[1] == "position":
            at = {position: i for i, position in enumerate(sweep.positions)}
            nothing = torch.full_like(cells[:, :1], math.nan)
            picked = [at.get(across.get(i), len(at)) for i in range(len(tokens))]
            cells = torch.cat([cells, nothing], dim=1)[:, picked]
        else:
            columns = [f"H{head}" for head in range(cells.shape[1])]
        maps.append({"site": sweep.site, "rows": _blocks(len(cells)), "columns": columns, "cells": cells})
    data = {
        "tokens": tokens, "corrupted": [corrupted[across[i]] if i in across else None for i in range(len(tokens))],
        "maps": maps, "target": target, "foil": foil, "metric": metric, "clean": sweeps[0].clean[row],
        "corrupt": sweeps[0].corrupt[row], "top": top or {},
    }  # fmt: skip
    if layers:
        ends = [end[row : row + 1] for end in (sweeps[0].clean, sweeps[0].corrupt)]
        why = doubt(*ends) if metric == "logit difference" else ""  # of another metric the direction is not known
        data |= _layer_table({site: sweep.recovery[..., row].tolist() for site, sweep in layers.items()}, why)
    return Panel("patching", title, data)


def _blocks(n):
    return [f"block {layer}" for layer in range(n)]


def _layer_table(columns, why):
    """A row a layer: the recovery at each site and what the first of them is called, and a sentence on the best.

    Where there is a reason why not to judge, it is the sentence, and nothing is called anything.
    """
    percent = lambda x: f"{100 * x:z.0f} %".replace("-", "−") if math.isfinite(x) else "not defined"
    rows = list(zip(*columns.values(), strict=True))
    table = [[str(i), *map(percent, row), band(row[0])] for i, row in enumerate(rows)]
    first = next(iter(columns))
    if why:
        return {"table": [["layer", *columns], *(row[:-1] for row in table)], "findings": [why]}
    best = max(range(len(rows)), key=lambda i: rows[i][0] if math.isfinite(rows[i][0]) else -math.inf)
    finding = f"The {first} of layer {best} brings back most: {percent(rows[best][0])}, {band(rows[best][0])}."
    return {
        "table": [["layer", *columns, "assessment"], *table],
        "findings": [finding] if math.isfinite(rows[best][0]) else ["Both runs answer alike: nothing to bring back."],
    }


def losses(title, tokens, nats) -> Panel:
    """The loss of every token but the first: nats (T-1,)."""
    mean = nats.mean().item()
    finding = f"On average {mean:.2f} nats a token, a perplexity of {math.exp(min(mean, 700)):,.1f}."
    data = {"tokens": tokens, "nats": [None, *nats.tolist()], "mean": mean}
    return Panel("losses", title, data | {"findings": [finding]})


def comparison(title, comparisons, documents, *, margin, unit="bits per byte") -> Panel:
    """comparison.Comparisons with one first model, and (first, second) of the first of them for every document.

    What cannot be compared is said and not drawn. Raises ValueError for no documents.
    """
    if not len(documents):
        raise ValueError("documents: expected at least one, got none")
    shown = []
    for each in (each for each in comparisons if each.difference):
        value, low, high = each.difference[:3]
        shown.append({"name": each.second, "word": each.word, "value": value, "low": low, "high": high, "p": each.p})
    models = [comparisons[0].first, comparisons[0].second]
    findings = [f"{each.second} against {each.first}: {each.word}." for each in comparisons]
    data = {"unit": unit, "margin": margin, "models": models, "intervals": shown, "documents": documents}
    return Panel("comparison", title, data | {"findings": findings})


def reliability(title, found) -> Panel:
    """A calibration.Calibration: its curve, and its errors with their intervals."""
    told = {"calibration error": found.ece, "with equal counts": found.ece_equal_count, "Brier score": found.brier}
    bounds = lambda each: f" ({each.low:.3f} to {each.high:.3f})" if math.isfinite(each.low) else ""
    facts = [(name, f"{each.value:.3f}{bounds(each)}".replace("-", "−")) for name, each in told.items()]
    return Panel("reliability", title, found.curve._asdict() | {"facts": facts})
