"""What invoke interpret.induction-heads does: one model's heads on repeated random tokens, or a whole run's history."""

import math
from pathlib import Path

import torch
from rich.text import Text

from gptcore import checkpoint, device, tree
from gptcore.files import write_whole
from gptcore.interpret import report
from gptcore.interpret.attention import find_heads, patterns, strength
from gptcore.interpret.induction import (
    copying_eigenvalues,
    find_pairs,
    history,
    n_ablated,
    repeats,
    scan,
    strong,
    summarise,
)
from gptcore.interpret.report import head_name
from tools.interpret.attention_view import print_matrix
from tools.interpret.looking import Counter, Document, check_options, load, open_console, print_table, write
from tools.interpret.picture import history_svg

LENGTH = 40
N_PAIRS = 5
SHOWN = ("stripe", "prefix", "previous", "duplicate", "start", "current", "uniform", "sparse", "keys")
COLOURS = {"stripe": "#2196f3", "previous": "#673ab7"}  # of the history's lines
WORTH = "A score says what a head does, an ablation what it is worth: where heads back each other up, that is little."


def show(given) -> int:
    """The command: scores now, or with --history over every saved step."""
    check(given)
    console, model = open_console(given), load(given)
    groups, counter = sequences(model, given["num_sequences"], given["seq_length"], given["seed"]), Counter()
    console.print(Text.assemble((model.name, "bold"), f": {told(groups)}"), soft_wrap=True)
    work = show_history if given["history"] else show_heads
    document = work(model, groups, given, console, counter)
    console.print(counter.line())
    write(given, model, "interpret.induction-heads", [document], console)
    return 0


def check(given) -> None:
    """Raise ValueError for options that do not go together, and files in no folder, before any work is done."""
    check_options(given)
    if given["html"] and given["history"]:
        raise ValueError("html: expected the heads of one step, got --history, which --svg draws")
    if given["svg"] and not given["history"]:
        raise ValueError("svg: expected --history beside it, which is what is drawn, got it alone")
    if given["svg"] and not Path(given["svg"]).parent.is_dir():
        raise ValueError(f"svg: expected a file in a folder that is there, got {given['svg']}")


def sequences(model, n, length, seed) -> list:
    """The groups of repeats: a fifth of the sequences is half as long, so that an offset that stays can be told.

    Ids without bytes, special ones among them, are left out; the end of text begins each sequence.
    """
    config, words = model.config, model.tokenizer
    silent = (words.n_bytes == 0).nonzero()[:, 0].tolist()
    length = length or max(2, min(LENGTH, (config.n_context - 1) // 2))
    n_short = n // 5 if n >= 10 and length >= 4 else 0
    sizes = [(n - n_short, length), *([(n_short, length // 2)] if n_short else [])]
    place = model.params["embed"]["w"].device
    found = []
    for count, size in sizes:
        stream = device.generator(seed, "induction", size)
        group = repeats(config, count, size, generator=stream, bos=words.eot, exclude=silent)
        found.append(group._replace(tokens=group.tokens.to(place)))
    return found


def told(groups) -> str:
    """What the sequences are."""
    sizes = " and ".join(f"{len(group.tokens)} of {group.length}" for group in groups)
    return f"{sizes} random tokens, each twice after the end of text"


def bounds(interval, form=".2f") -> str:
    """The bounds, or nothing where there are none."""
    low, high = float(interval.low), float(interval.high)
    return "" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def show_heads(model, groups, given, console, counter) -> Document:
    """Losses, the best heads, those that feed them, and what they look like."""
    params, config = model.params, model.config
    stream = device.generator(given["seed"], "induction", "intervals")
    n = sum(len(group.tokens) for group in groups)
    with console.status(Text(f"reading {n:,} sequences")):
        found = summarise(scan(params, config, *groups), generator=stream)
    counter.n_rows += n
    copies = copying_eigenvalues(params, config)
    show_losses(found, console)
    show_best(found, copies, given["top_k"], console)
    with console.status(Text("ablating")):
        pairs = find_pairs(params, config, *groups, found=found, generator=stream, n_later=1, n_earlier=N_PAIRS)
    counter.n_rows += n_ablated(pairs) * n
    show_pairs(pairs, console)
    if pairs:
        counter.n_rows += show_example(model, pairs[0], console)
    panel = report.head_scores("Heads on random repeats", found.scores, notes=[f"{told(groups)}. {WORTH}"])
    return Document([], as_json(found, copies, pairs, groups), cells(found, copies), (panel,))


def show_losses(found, console) -> None:
    """What repeating is worth."""
    parts = {"first copy": found.first, "second copy": found.second, "gain": found.gain}
    rows = [[name, f"{interval.value:.3f}", bounds(interval, ".3f")] for name, interval in parts.items()]
    print_table(console, ["nats per token", "mean", "95 % interval"], rows, left=("nats per token",))


def show_best(found, copies, k, console) -> None:
    """The best heads by the stripe; heads that look elsewhere but steadily; the best previous-token heads."""
    score, prefix = found.scores["stripe"].corrected(), strength(found.scores, "prefix")
    rows = []
    for layer, head, number in find_heads(found.scores, "stripe", k):
        at = (layer, head)
        interval = score._replace(low=score.low[at], high=score.high[at])
        measured = (prefix[at], copies[at], found.copying[at], found.scores["stripe"].chance[at])
        rows.append(
            [head_name(*at), f"{number:.3f}", strong(number), bounds(interval), *(f"{x:.2f}" for x in measured)]
        )
    columns = ["head", "induction", "", "95 % interval", "prefix", "copying", "raises", "chance"]
    print_table(console, columns, rows, left=("head", ""))
    console.print(Text("induction, prefix: attention beyond chance to what followed last time (the stripe, any copy)."))
    console.print(Text("copying: by the OV circuit's eigenvalues; raises: by the logits; both from -1 to 1."))
    for layer, head, j, number in found.shifted:
        line = f"shifted induction (j = {j}): {head_name(layer, head)} looks there with {number:.2f} at both lengths."
        console.print(Text(line))
    best = ", ".join(f"{head_name(*at)} {number:.2f}" for *at, number in find_heads(found.scores, "previous", 3))
    console.print(Text(f"previous-token heads: {best}"))


def show_pairs(pairs, console) -> None:
    """The pairs behind the best head, and what is lost without either."""
    if not pairs:
        console.print(Text("No head above 0.3 in the second layer or later: no pair to take apart."))
        return
    rows = []
    for pair in pairs:
        lost = (pair.without_earlier.prefix, pair.without_earlier.gain, pair.without_later.gain)
        numbers = (pair.z, pair.previous, pair.copying, *lost, pair.composition, pair.baseline)
        rows.append([f"{head_name(*pair.earlier)} → {head_name(*pair.later)}", *(f"{x:.2f}" for x in numbers)])
    columns = ["pair", "z", "previous", "copying", "-prefix", "-gain", "later's", "K-comp.", "random"]
    print_table(console, columns, rows, left=("pair",), title="Heads that feed the best one", gap=1)
    line = "z: K-composition beyond random heads. -prefix, -gain (nats): lost when the earlier head's output is that on"
    console.print(Text(f"{line} another sequence; later's: the gain lost so without the later head."))
    console.print(Text(WORTH))


def show_example(model, pair, console) -> int:
    """The best pair's patterns on five tokens twice; how many rows of forward it took."""
    words = model.tokenizer
    letters = [ids[0] for ids in map(words.encode, (" A", " B", " C", " D", " E"))]
    if len(set(letters)) < 5:  # a tokenizer that splits the space off
        letters = [words.encode(letter)[0] for letter in "ABCDE"]
    tokens = torch.tensor([letters * 2], device=model.params["embed"]["w"].device)
    if tokens.shape[1] > model.config.n_context:
        return 0
    found = patterns(model.params, model.config, tokens, layers=[pair.earlier[0], pair.later[0]])
    names = [Text(name) for name in "ABCDEABCDE"]
    for weights, (layer, head) in zip(found[:, 0], (pair.earlier, pair.later), strict=True):
        print_matrix(console, names, weights[head], 0.1, f"{head_name(layer, head)} on A B C D E, twice")
    return 1


def as_json(found, copies, pairs, groups) -> dict:
    """Every number."""
    scores = {name: {**score._asdict(), "beyond": strength(found.scores, name)} for name, score in found.scores.items()}
    losses = {name: getattr(found, name) for name in ("first", "second", "gain")}
    return {
        "lengths": [group.length for group in groups], "num_sequences": [len(group.tokens) for group in groups],
        **losses, "scores": scores, "copying": copies, "raises": found.copying, "shifted": found.shifted,
        "pairs": pairs,
    }  # fmt: skip


def cells(found, copies) -> list[dict]:
    """A row a head and score."""
    rows = list(score_rows(found))
    for name, numbers in (("copying", copies), ("raises", found.copying)):
        for layer, heads in enumerate(numbers.tolist()):
            rows += [{"layer": layer, "head": head, "score": name, "value": x} for head, x in enumerate(heads)]
    return rows


def score_rows(found):
    """A row a head and score, with chance and interval."""
    for name in SHOWN:
        score, beyond = found.scores[name], strength(found.scores, name)
        for layer, heads in enumerate(beyond.tolist()):
            for head, number in enumerate(heads):
                measured = {part: x[layer, head].item() for part, x in score._asdict().items()}
                yield {"layer": layer, "head": head, "score": name, "beyond": number, **measured}


# --------------------------------------------------------------------------------------------------- the moving picture


def show_history(model, groups, given, console, counter) -> Document:
    """A row a saved step: losses, and the best head of each kind; drawn where --svg says."""
    steps = checkpoint.read_info(model.path.parent.parent).steps
    place = model.params["embed"]["w"].device
    load_each = (
        (info.step, tree.map(lambda leaf: leaf.to(place), checkpoint.load_params(info.path))) for info in steps
    )
    stream, picture = device.generator(given["seed"], "induction", "intervals"), []
    with console.status(Text(f"reading the sequences at {len(steps)} steps")):
        for step, found in history(load_each, model.config, *groups, generator=stream):
            picture.append((step, found))
            counter.n_rows += sum(len(group.tokens) for group in groups)
    rows = []
    for step, found in picture:
        best = [find_heads(found.scores, name, 1)[0] for name in ("stripe", "previous")]
        shown = [f"{head_name(*at)} {number:.2f}" for *at, number in best]
        gain = [f"{interval.value:.3f}" for interval in (found.second, found.gain)]
        rows.append([f"{step:,}", *gain, shown[0], strong(best[0][2]), shown[1], bounds(found.gain)])
    columns = ["step", "second", "gain", "induction", "", "previous", "95 % of the gain"]
    print_table(console, columns, rows, left=("",))
    console.print(Text("second, gain: nats a token on the second copy, and less than on the first."))
    if given["svg"]:
        write_whole(given["svg"], history_svg(model.path.parent.parent.name, *curves_of(picture)))
    losses = lambda found: {name: getattr(found, name) for name in ("first", "second", "gain")}
    result = [
        {"step": step, **losses(found), "scores": {name: strength(found.scores, name) for name in SHOWN}}
        for step, found in picture
    ]
    return Document([], {"history": result}, [row for step, found in picture for row in moment(step, found)])


def curves_of(picture) -> tuple[list[int], dict]:
    """(steps, {score: (colour, {head: a strength a step})})."""
    numbers = {name: [strength(found.scores, name) for _, found in picture] for name in COLOURS}
    heads = [divmod(i, numbers["stripe"][0].shape[1]) for i in range(numbers["stripe"][0].numel())]
    curves = {
        ("induction" if name == "stripe" else name): (
            COLOURS[name], {head_name(*at): [each[at].item() for each in numbers[name]] for at in heads}
        )
        for name in COLOURS
    }  # fmt: skip
    return [step for step, _ in picture], curves


def moment(step, found):
    """The rows of one step: every head's scores, then the losses."""
    for row in score_rows(found):
        yield {"step": step, **row}
    for name in ("first", "second", "gain"):
        yield {"step": step, "score": name, **getattr(found, name)._asdict()}
