"""What invoke interpret.attention does: a text's heads by score, a layer's heads by label, one head's pattern."""

import torch
from rich.cells import cell_len
from rich.text import Text

from gptcore.interpret import report
from gptcore.interpret.attention import (
    DETECTORS,
    MIN_SEQUENCES,
    SHAPES,
    compare_heads,
    find_heads,
    head_scores,
    labels,
    patterns,
    strength,
)
from gptcore.interpret.report import head_name
from tools.interpret.looking import ENDS, Counter, Document, ids_of, print_table
from tools.interpret.tokens import token_cell, token_text

DEMO = ("the green door and the red door and the green",)
BLOCKS = ((0.5, "█"), (0.3, "▓"), (0.1, "▒"), (-1.0, "░"))  # weight more than
WIDTH = 10  # of a token's cell
RANKED = (*DETECTORS, "uniform", "sparse")
MEANINGS = {
    "previous": "the token before", "current": "the token itself", "start": "the first token",
    "duplicate": "an earlier copy", "prefix": "what followed an earlier copy (induction)",
    "uniform": "everything alike", "sparse": "one key almost alone",
}  # fmt: skip


def check(given) -> None:
    """Raise ValueError for a head without its layer."""
    if given["head"] is not None and given["layer"] is None and not given["interactive"]:
        raise ValueError(f"head: expected --layer beside it, got {given['head']} alone")


def show(model, text, given, console) -> Document:
    """One text's heads, as --layer and --head say."""
    ids = ids_of(model, text, console)
    layer, head = asked(model.config) if given["interactive"] else (given["layer"], given["head"])
    within("layer", layer, model.config.n_layer)
    within("head", head, model.config.n_head)
    counter = Counter()
    tokens = torch.tensor([ids], device=model.params["embed"]["w"].device)
    weights = patterns(model.params, model.config, tokens, value_weighted=given["value_weighted"])[:, 0]  # (L,H,T,T)
    found = head_scores(model.params, model.config, tokens)
    counter.n_rows += 2
    if given["demo"]:
        show_strongest(found, console, 3)
        layer = min(2, model.config.n_layer - 1)
        show_pattern(model, ids, weights[layer, 0], layer, 0, given, console)
        show_alike(weights[layer], layer, console)
    elif layer is None:
        show_strongest(found, console)
    elif head is None:
        show_layer(found, layer, console)
    else:
        show_pattern(model, ids, weights[layer, head], layer, head, given, console)
    console.print(counter.line())
    panels = panels_of(model, ids, found, weights, given["value_weighted"])
    return Document(ids, as_json(found, weights, layer, head), cells(model, ids, found, weights, layer, head), panels)


def panels_of(model, ids, found, weights, value_weighted) -> tuple[report.Panel, ...]:
    """The scores, and the pattern of every head."""
    title = "Value-weighted attention" if value_weighted else "Attention"
    tokens = report.token_texts(model.tokenizer, ids)
    return (
        report.head_scores("Heads", found, notes=["One text gives no interval."]),
        report.attention(title, tokens, weights, named=labels(found)),
    )


def within(name, number, n) -> None:
    """Raise ValueError naming the range."""
    if number is not None and not 0 <= number < n:
        raise ValueError(f"{name}: expected 0 to {n - 1}, got {number}")


def asked(config) -> tuple[int | None, int | None]:
    """The layer and the head that are typed: a number (an empty line is 0) or all; anything else is asked again."""
    layer = ask("layer", config.n_layer)
    return layer, None if layer is None else ask("head", config.n_head)


def ask(name, n) -> int | None:
    """A number from 0 to n - 1, or None for all. Raises EOFError for what ends a loop."""
    while True:
        line = input(f"{name}, 0 to {n - 1} or all [0]: ").strip() or "0"
        if line in ENDS:
            raise EOFError
        if line == "all":
            return None
        if line.isdecimal() and int(line) < n:
            return int(line)


def show_strongest(found, console, k=5) -> None:
    """The k heads of the largest strength, a score at a time."""
    own = labels(found)
    rows = []
    for score in RANKED:
        for layer, head, number in find_heads(found, score, k):
            value, chance = (x[layer, head].item() for x in (found[score].value, found[score].chance))
            known = ", ".join(own[layer][head]) or "mixed"
            rows.append([score, head_name(layer, head), f"{number:.2f}", f"{value:.2f}", f"{chance:.2f}", known])
    columns = ["score", "head", "beyond", "value", "chance", "labels"]
    print_table(console, columns, rows, left=("score", "head", "labels"), most=40)
    for score in RANKED:
        console.print(Text.assemble((score, "bold"), f": {MEANINGS[score]}"))
    say_how(console)


def say_how(console) -> None:
    """What the numbers are."""
    console.print(Text("beyond = (value - chance) / (1 - chance); uniform and sparse as they are."))
    line = f"One text has no interval, {MIN_SEQUENCES} are needed: interpret.induction-heads scores many sequences."
    console.print(Text(line), style="#666666")


def show_layer(found, layer, console) -> None:
    """A layer's heads: labels, and every score beyond chance."""
    own = labels(found)[layer]
    rows = [
        [
            head_name(layer, head),
            *(f"{strength(found, name)[layer, head]:.2f}" for name in RANKED),
            f"{found['keys'].value[layer, head]:.1f}",
        ]
        for head in range(len(own))
    ]
    print_table(console, ["head", *RANKED, "keys"], rows, left=("head",))
    for head, known in enumerate(own):
        words = ", ".join(f"{label} {number:.2f}" for label, number in known.items()) or "mixed"
        console.print(Text.assemble((head_name(layer, head), "bold"), f": {words}"))
    say_how(console)


def weight_cell(weight, threshold, decimals=True) -> Text:
    """A weight as a block and two decimals, or the block alone; a dot below the threshold."""
    if weight < threshold:
        return Text("·", style="#666666")
    block = next(block for least, block in BLOCKS if weight > least)
    return Text(f"{block}{weight:.2f}" if decimals else block, style=heat(weight))


def heat(weight) -> str:
    """One hue, stronger with the weight."""
    return "bold #2196f3" if weight > 0.5 else "#2196f3" if weight > 0.3 else ""


def print_matrix(console, names, weights, threshold, title) -> None:
    """Weights (T,T) as a lower triangle: with decimals where they fit the terminal, else as blocks alone."""
    first = max(cell_len(name.plain) for name in names)
    decimals = first + 6 * len(names) + 3 <= console.width
    rows = [
        [
            name if decimals else name + " ",
            *(weight_cell(weight, threshold, decimals) for weight in row[: q + 1]),
            *[""] * (len(row) - q - 1),
        ]
        for q, (name, row) in enumerate(zip(names, weights.tolist(), strict=True))
    ]
    heads = [name if decimals else name.plain[:1] for name in names]
    heads = [Text("·") if cell_len(str(head)) != 1 and not decimals else head for head in heads]  # a wide character
    columns = ["", *heads]
    print_table(console, columns, rows, left=("",), title=title, most=WIDTH, gap=1 if decimals else 0)


def show_pattern(model, ids, weights, layer, head, given, console) -> None:
    """A head's matrix, a row a query, then the last query's row along the text."""
    what = "value-weighted attention" if given["value_weighted"] else "attention"
    words = [token_cell(model.tokenizer, id, width=WIDTH) for id in ids]
    title = f"{head_name(layer, head)}: {what} of each query (row) to each key (column)"
    print_matrix(console, words, weights, given["threshold"], title)
    console.print(Text(f"█ > 0.5  ▓ > 0.3  ▒ > 0.1  · below {given['threshold']:g}"), style="#666666")
    line = Text.assemble("the last query, ", (token_text(model.tokenizer, ids[-1]), "bold"), ", looks at ")
    for id, weight in zip(ids, weights[-1].tolist(), strict=True):
        strong = weight >= given["threshold"]
        word = f"{token_text(model.tokenizer, id)}{f' {weight:.2f}' if strong else ''} "
        line.append(word, style=heat(weight) if strong else "#666666")
    console.print(line)


def show_alike(weights, layer, console, most=8) -> None:
    """How far the heads of a layer look at the same keys; weights (H,T,T)."""
    alike = compare_heads(weights[:most, None])
    columns = ["alike", *(head_name(layer, head) for head in range(len(alike)))]
    rows = [[name, *(f"{x:.2f}" for x in row)] for name, row in zip(columns[1:], alike.tolist(), strict=True)]
    print_table(console, columns, rows, left=("alike",), title=f"Heads of layer {layer} beside each other")
    console.print(Text("1: the same keys, 0: none in common."))


def as_json(found, weights, layer, head) -> dict:
    """Every score of every head; one head's pattern where one is looked at."""
    result = {"scores": {name: {**score._asdict(), "beyond": strength(found, name)} for name, score in found.items()}}
    result["labels"] = labels(found)
    if layer is not None and head is not None:
        result |= {"layer": layer, "head": head, "pattern": weights[layer, head]}
    return result


def cells(model, ids, found, weights, layer, head) -> list[dict]:
    """A row a weight where one head is looked at, else a row a head and score."""
    if layer is not None and head is not None:
        word = lambda place: token_text(model.tokenizer, ids[place])
        return [
            {"layer": layer, "head": head, "query": q, "key": k, "query_token": word(q), "key_token": word(k),
             "weight": weights[layer, head, q, k].item()}
            for q in range(len(ids)) for k in range(q + 1)
        ]  # fmt: skip
    layers = range(len(weights)) if layer is None else [layer]
    return [
        {"layer": each, "head": h, "score": name, "beyond": strength(found, name)[each, h].item(),
         "value": found[name].value[each, h].item(), "chance": found[name].chance[each, h].item()}
        for name in (*DETECTORS, *SHAPES) for each in layers for h in range(weights.shape[1])
    ]  # fmt: skip
