"""What invoke compare does: the same documents through every model, then differences instead of scores."""

import hashlib
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from gptcore import checkpoint, device
from gptcore.evaluate.choice import multiple_choice, read_items
from gptcore.evaluate.comparison import Model, compare, compare_items, one_tokenizer, rank
from gptcore.evaluate.perplexity import MIN_UNITS, byte_blocks, cuts, exp, score_tokens, summed
from gptcore.stats import holm
from tools import scoring


def steps_of(runs, console) -> list[Path]:
    """The step folders that --run names: one run alone is all its steps, a folder of runs is each run's best."""
    found = []
    for run in runs:
        folder = Path(run)
        inside = [path.parent for path in sorted(folder.glob("*/run.json"))] if folder.is_dir() else []
        if inside and not (folder / "run.json").is_file():
            for path in inside:
                if checkpoint.read_info(path).steps:
                    found.append(checkpoint.find_step(path))
                else:
                    console.print(Text(f"{path} has no saved step and is left out."))
        elif len(runs) == 1 and not folder.name.startswith("step-"):
            found += [info.path for info in checkpoint.read_info(checkpoint.find_run(run)).steps]
        else:
            found.append(checkpoint.find_step(run))
    if len(found) < 2:
        raise ValueError(f"run: expected two models or more to compare, got {len(found)}")
    return found


def names_of(paths) -> list[str]:
    """A name for each step folder, no two the same: run and step; the run's path where that would not tell."""
    folders = {}
    for path in paths:
        folders.setdefault((path.parent.parent.name, path.name), set()).add(path.resolve())
    names, seen = [], Counter()
    for path in paths:
        run = path.parent.parent
        name = f"{run.name if len(folders[run.name, path.name]) == 1 else run} {path.name}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def show_ranking(given, console) -> None:
    """Best first, then from step to step where the models are steps of one run."""
    paths = steps_of(given["run"], console)
    texts, models, trained, size = None, [], {}, None
    for name, path in zip(names_of(paths), paths, strict=True):
        loaded = scoring.load(path, given)
        if texts is None:
            documents = scoring.cut(scoring.read_text(loaded, given, console), given["tokens"], loaded.tokenizer)
            texts = [document.text for document in documents]
            size = block_size(documents, loaded.config.n_context)
        with console.status(Text(f"{name} reads {scoring.several(len(texts), 'document')}")):
            models.append(measured(loaded, name, texts, size))
        trained[name] = loaded.state.get("train_loss")
    generator = device.generator("compare")
    places = rank(models, generator=generator, margin=given["margin"])
    console.print(ranking_table(places, trained))
    console.print(difference_table([place.to_best for place in places[1:]], given["margin"]))
    for line in advice(places, models, "documents" if size is None else f"blocks of {size:,} bytes or more"):
        console.print(Text(line))
    if len({path.parent.parent for path in paths}) == 1:
        changes = compare(list(pairwise(models)), generator=generator, margin=given["margin"])
        steps = [int(path.name.removeprefix("step-")) for path in paths]
        console.print(change_table(changes, models, steps))


def block_size(documents, n_context) -> int | None:
    """Bytes of a block of about a context, where there are too few documents to draw over them; else None."""
    n_tokens = sum(len(document.tokens) for document in documents)
    if len(documents) >= MIN_UNITS or not n_tokens:
        return None
    return math.ceil(n_context * sum(document.n_bytes for document in documents) / n_tokens)


def measured(loaded, name, texts, size) -> Model:
    """A model's scores on texts, cut into its own ids; by blocks of size bytes unless that is None."""
    words, raw = loaded.tokenizer, [text.encode("utf-8", "replace") for text in texts]
    documents = list(zip(words.encode_batch(texts), map(len, raw), strict=True))
    measures, n_tokens = score_tokens(loaded.params, loaded.config, [ids for ids, _ in documents], eot=words.eot)
    if size is None:
        scores = summed(measures, n_tokens, documents)
    else:
        scores = byte_blocks(measures, n_tokens, documents, words.n_bytes, size)
        raw = [block for text in raw for block in in_blocks(text, size)]
    return Model(name, scores, tuple(hashlib.sha256(part).hexdigest() for part in raw), words.fingerprint)


def in_blocks(raw, size) -> list[bytes]:
    """The bytes of a text, cut as byte_blocks does."""
    found, start = [], 0
    for n in cuts(len(raw), size):
        found.append(raw[start : start + n])
        start += n
    return found


def ranking_table(places, trained) -> Table:
    """A row a model; perplexities only where they are of the same tokens."""
    same = one_tokenizer([place.model for place in places])
    columns = ("", "model", "bits/byte", *(("perplexity", "in training", "") if same else ()))
    table = make_table(columns, left=("", "model"))
    for place in places:
        scores, perplexities = place.model.scores, []
        if same:
            loss = trained[place.model.name]
            perplexities = [f"{scores.perplexity:.4g}", "-" if loss is None else f"{exp(loss):.4g}"]
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


def advice(places, models, unit):
    """What to make of the ranking, a line each."""
    best, second = places[0], places[1]
    if not one_tokenizer(models):
        yield "Tokenizers differ: perplexities are of other tokens and do not compare; bits per byte do."
    if best.star:
        yield f"Use {best.model.name}: better than the next by more than chance."
    else:
        yield f"No difference shown between {best.model.name} and {second.model.name}: {second.to_best.word}."
    n = len(best.model.scores.nats)
    yield f"Differences: paired bootstrap over {n:,} {unit}, p adjusted for several (Holm)."


def change_table(changes, models, steps) -> Table:
    """From step to step: old, new, and whether it moved."""
    table = make_table(("from", "to", "old", "new", "", "difference", "%", ""), left=())
    table.title, table.title_justify = "From step to step, bits per byte", "left"
    for change, (first, second), numbers in zip(changes, pairwise(models), pairwise(steps), strict=True):
        old, new = first.scores.bits_per_byte, second.scores.bits_per_byte
        arrow = "=" if new == old else "↓" if new < old else "↑"
        moved = (f"{old:.4f}", f"{new:.4f}", arrow, f"{new - old:+.4f}", f"{100 * (new / old - 1):+.2f}")
        table.add_row(*map(str, numbers), *moved, brief(change.word))
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
    paths = steps_of(given["run"], console)
    for name, path in zip(names_of(paths), paths, strict=True):
        loaded = scoring.load(path, given)
        scores = multiple_choice(loaded.params, loaded.config, loaded.tokenizer, items)
        right[name] = scores.correct()["acc_norm"]
    best, *others = sorted(right, key=lambda name: -right[name].sum())
    generator = device.generator("compare", "answers")
    found = [compare_items(right[best], right[name], generator=generator) for name in others]
    adjusted = holm([each.p for each in found])
    table = make_table(("model", "right", "only the best", "only this", "difference", "p"), left=("model",))
    table.title, table.title_justify = f"{scoring.several(len(items), 'question')}, acc_norm", "left"
    share = lambda name: f"{100 * right[name].double().mean().item():.1f} %"
    table.add_row(best, share(best), "", "", "", "")
    for name, answered, p in zip(others, found, adjusted, strict=True):
        value, low, high = (100 * bound for bound in answered.difference)
        bounds = "" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})"
        counts = (str(answered.only_first), str(answered.only_second))
        table.add_row(name, share(name), *counts, f"{value:+.1f}{bounds}", f"{p:.3f}")
    console.print(table)
    if adjusted[0] < 0.05:
        console.print(Text(f"Use {best}: right more often than the next by more than chance."))
    else:
        seen = f": could have seen {100 * found[0].detectable:.2g} %" if found[0].detectable else ""
        console.print(Text(f"No difference shown between {best} and {others[0]}{seen}."))
    console.print(Text("p: McNemar's exact test against the best, adjusted for several (Holm)."), style="#666666")
