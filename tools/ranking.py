"""What invoke compare does: the same documents through every model, then differences instead of scores."""

import math
from itertools import pairwise
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from gptcore import checkpoint, device
from gptcore.evaluate.choice import multiple_choice, read_items
from gptcore.evaluate.comparison import Model, compare, compare_items, one_tokenizer, rank
from gptcore.evaluate.perplexity import score_documents
from gptcore.stats import holm
from tools import scoring


def steps_of(runs) -> list[Path]:
    """The step folders that --run names: one run alone is all its steps, a folder of runs is each run's best."""
    found = []
    for run in runs:
        folder = Path(run)
        inside = [path.parent for path in sorted(folder.glob("*/run.json"))] if folder.is_dir() else []
        if inside and not (folder / "run.json").is_file():
            found += [checkpoint.find_step(path) for path in inside]
        elif len(runs) == 1 and not folder.name.startswith("step-"):
            found += [info.path for info in checkpoint.read_info(checkpoint.find_run(run)).steps]
        else:
            found.append(checkpoint.find_step(run))
    if len(found) < 2:
        raise ValueError(f"run: expected two models or more to compare, got {len(found)}")
    return found


def texts_for(model, given) -> list[str]:
    """Whole documents, up to --tokens tokens of this model."""
    left, texts = scoring.most_tokens(model, given), []
    for document in scoring.read_text(model, given):
        if left <= 0:
            break
        texts.append(document.text)
        left -= len(document.tokens)
    return texts


def show_ranking(given, console) -> None:
    """Best first, then from step to step where the models are steps of one run."""
    paths, texts, models, trained = steps_of(given["run"]), None, [], {}
    for path in paths:
        loaded = scoring.load(path, given)
        texts = texts or texts_for(loaded, given)
        with console.status(Text(f"{loaded.name} reads {len(texts):,} documents")):
            models.append(measured(loaded, texts))
        trained[loaded.name] = loaded.state.get("train_loss")
    generator = device.generator("compare")
    places = rank(models, generator=generator, margin=given["margin"])
    console.print(ranking_table(places, trained))
    console.print(difference_table([place.to_best for place in places[1:]], given["margin"]))
    for line in advice(places, models):
        console.print(Text(line))
    if len({path.parent.parent for path in paths}) == 1:
        changes = compare(list(pairwise(models)), generator=generator, margin=given["margin"])
        console.print(change_table(changes, {model.name: model for model in models}))


def measured(loaded, texts) -> Model:
    """A model's scores on texts, cut into its own ids."""
    ids = loaded.tokenizer.encode_batch(texts)
    sizes = [len(text.encode("utf-8", "replace")) for text in texts]
    documents = list(map(scoring.Document, texts, ids, sizes))
    scores = score_documents(loaded.params, loaded.config, scoring.pairs(documents), eot=loaded.tokenizer.eot)
    return Model(loaded.name, scores, tuple(d.sha256 for d in documents), loaded.tokenizer.fingerprint)


def ranking_table(places, trained) -> Table:
    """A row a model; perplexities only where they are of the same tokens."""
    same = one_tokenizer([place.model for place in places])
    columns = ("", "model", "bits/byte", *(("perplexity", "in training", "") if same else ()))
    table = make_table(columns, left=("", "model"))
    for place in places:
        scores, perplexities = place.model.scores, []
        if same:
            loss = trained[place.model.name]
            perplexities = [f"{scores.perplexity:.4g}", "-" if loss is None else f"{math.exp(loss):.4g}"]
            perplexities += ["Very good" if place.very_good else ""]
        table.add_row("★" if place.star else "", place.model.name, f"{scores.bits_per_byte:.4f}", *perplexities)
    return table


def difference_table(comparisons, margin) -> Table:
    """How much worse than the best, and how sure that is."""
    columns = ("against the best", "difference", "95 % interval", "p", "visible", "")
    table = make_table(columns, left=("against the best", ""))
    for found in comparisons:
        cells = ["", "", "", ""]
        if found.difference:
            value, low, high = (float(bound) for bound in found.difference[:3])
            cells = [f"{value:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{found.p:.3f}", f"{found.detectable:.2g}"]
        table.add_row(found.second, *cells, brief(found.word))
    table.caption = f"bits per byte; visible: found four times in five; equivalent: within ±{margin:g}"
    table.caption_justify = "left"
    return table


def brief(word) -> str:
    """A comparison's word without its figures, which stand in columns of their own."""
    return word.split(" (")[0].split(" within")[0].split(":")[0]


def advice(places, models):
    """What to make of the ranking, a line each."""
    best, second = places[0], places[1]
    if not one_tokenizer(models):
        yield "Tokenizers differ: perplexities are of other tokens and do not compare; bits per byte do."
    if best.star:
        yield f"Use {best.model.name}: better than the next by more than chance."
    else:
        yield f"No difference shown between {best.model.name} and {second.model.name}: {second.to_best.word}."
    yield "Differences: paired bootstrap over documents, p adjusted for several (Holm)."


def change_table(changes, models) -> Table:
    """From step to step: old, new, and whether it moved."""
    table = make_table(("from", "to", "old", "new", "", "difference", "%", ""), left=("from", "to"))
    table.title, table.title_justify = "From step to step, bits per byte", "left"
    for change in changes:
        old, new = (models[name].scores.bits_per_byte for name in (change.first, change.second))
        arrow = "=" if new == old else "↓" if new < old else "↑"
        name = lambda whole: whole.split()[-1]
        moved = (f"{old:.4f}", f"{new:.4f}", arrow, f"{new - old:+.4f}", f"{100 * (new / old - 1):+.2f}")
        table.add_row(name(change.first), name(change.second), *moved, brief(change.word))
    return table


def make_table(columns, left) -> Table:
    """A table that fits a narrow terminal; numbers never wrap, names may."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        words = column in left
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def show_answers(given, console) -> None:
    """The same questions through every model: accuracy, and McNemar's exact test against the best."""
    items, right = scoring.named(given["choices"], read_items), {}
    for path in steps_of(given["run"]):
        loaded = scoring.load(path, given)
        right[loaded.name] = multiple_choice(loaded.params, loaded.config, loaded.tokenizer, items).correct()[
            "acc_norm"
        ]
    names = sorted(right, key=lambda name: -right[name].sum())
    generator = device.generator("compare", "answers")
    found = [compare_items(right[names[0]], right[name], generator=generator) for name in names[1:]]
    adjusted = ["", *(f"{p:.3f}" for p in holm([each.p for each in found]))]
    table = make_table(("model", "right", "only the best", "only this", "difference", "p"), left=("model",))
    table.title, table.title_justify = f"{len(items)} questions, acc_norm", "left"
    for name, answered, p in zip(names, [None, *found], adjusted, strict=True):
        share = f"{100 * torch.mean(right[name].double()).item():.1f} %"
        if answered is None:
            table.add_row(name, share, "", "", "", "")
            continue
        value, low, high = (100 * bound for bound in answered.difference)
        counts = (str(answered.only_first), str(answered.only_second))
        table.add_row(name, share, *counts, f"{value:+.1f} ({low:+.1f} to {high:+.1f})", p)
    console.print(table)
    console.print(Text("p: McNemar's exact test against the best, adjusted for several (Holm)."), style="#666666")
