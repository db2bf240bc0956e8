"""What invoke interpret.logit-lens does: a text's stream after every block, as tables."""

import torch
from rich.text import Text

from gptcore import data
from gptcore.interpret import report
from gptcore.interpret.lens import fit_tuned_lens, load_tuned_lens, logit_lens, save_tuned_lens
from tools import fetching
from tools.interpret.looking import Counter, Document, ids_of, print_table
from tools.interpret.prompts import continued
from tools.interpret.tokens import token_cell, token_text
from tools.view import busy

DEMO = (
    "Monday, Tuesday, Wednesday, Thursday,",
    "The file was opened for reading, and then the file was",
    "Nora gave the keys to Felix, and Felix gave the keys back to",
)
SHADES = ((0.5, "bright_green"), (0.3, "green"), (0.1, "yellow"), (0.0, "white"))  # probability more than
WIDTH = 10  # of a token's cell
FIT_ROWS, FIT_TOKENS = 4, 128  # of a step of the tuned lens: 300 of them take about a minute on a small model


def show(model, text, given, console) -> Document:
    """One text through the lens: the table of one position, or of all beside each other."""
    target = None
    if given["target"] is not None:
        text, (target, *_), _ = continued(model, text, given["target"], console)
    ids = ids_of(model, text, console)
    tokens = torch.tensor([ids], device=model.params["embed"]["w"].device)
    position = where(given["position"], len(ids))
    tuned = tuned_lens(model, given, console) if given["lens"] == "tuned" else None
    counter = Counter()  # what was fitted is no part of the forward's time
    k = min(given["top_k"], model.config.n_vocab)
    found = logit_lens(model.params, model.config, tokens, target, temperature=given["temperature"], k=k, tuned=tuned)
    counter.n_rows += 1
    if position is None:
        show_all(model, ids, found, console)
    else:
        show_one(model, ids, found, position, console)
    console.print(counter.line())
    places = range(len(ids)) if position is None else [position]
    text_of = lambda ids: report.token_texts(model.tokenizer, ids)
    name = f"{given['lens'].capitalize()} lens"
    panel = report.lens(name, text_of(ids), {given["lens"]: found}, text_of)
    return Document(ids, as_json(model, found, places), cells(model, ids, found, places), (panel,))


def where(position, n_tokens) -> int | None:
    """The index that --position means; None for all. Raises ValueError naming the range."""
    if position == "all":
        return None
    if not -n_tokens <= position < n_tokens:
        raise ValueError(f"position: expected {-n_tokens} to {n_tokens - 1} in this text, got {position}")
    return position % n_tokens


def tuned_lens(model, given, console) -> dict:
    """The tuned lens beside the step; fitted on the run's training text and saved where there is none yet."""
    path, sha256 = model.path / "tuned_lens.safetensors", model.state["files"]["model.safetensors"]["sha256"]
    place = model.params["embed"]["w"].device
    if path.exists():
        return load_tuned_lens(path, model.config, sha256, device=place)
    if not model.run.get("plan"):
        raise ValueError(f"lens: expected a run that knows its text, to fit a tuned lens on; {model.name} does not")
    with fetching.shown(console, "Fetching the text, which is no longer in the cache") as watch:
        dataset = data.reopen(model.run["plan"], model.tokenizer, cache=given["cache"], watch=watch)

    def batch(step):
        tokens, _ = dataset.sequences(range(step * FIT_ROWS, (step + 1) * FIT_ROWS))
        return tokens[:, :FIT_TOKENS].long().to(place)

    with busy(console, "Fitting translators on the training text, once for this step"):
        tuned = fit_tuned_lens(model.params, model.config, batch)
    save_tuned_lens(path, tuned, sha256)
    console.print(Text(f"fitted on the run's training text, saved as {path}"), soft_wrap=True)
    return tuned


def shade(p) -> str:
    """The style of a probability."""
    return next(style for least, style in SHADES if p > least or least == 0)


def show_one(model, ids, found, position, console) -> None:
    """A row a reading: target's rank, distance to the end, the likeliest tokens with their probabilities."""
    target = found.target[0, position].item()
    k = found.top.shape[-1]
    rows = []
    for row, name in enumerate(found.names):
        known = [f"{found.rank[row, 0, position]:,}", f"{100 * found.p[row, 0, position]:.1f}"] if target >= 0 else []
        numbers = [name, *known, f"{found.kl[row, 0, position]:.2f}"]
        guesses = []
        for id, p in zip(found.top[row, 0, position].tolist(), found.top_p[row, 0, position].tolist(), strict=True):
            guess = token_cell(model.tokenizer, id, shade(p), WIDTH)
            guesses.append(Text.assemble(guess, (f" {100 * p:5.1f}", shade(p))))
        rows.append([*numbers, *guesses, f"{found.entropy[row, 0, position]:.2f}"])
    asked = ["rank", "%"] if target >= 0 else []
    columns = ["layer", *asked, "KL", *(f"{n + 1}. %" for n in range(k)), "entropy"]
    after = Text.assemble("after ", token_cell(model.tokenizer, ids[position], "bold"), f" (position {position})")
    if target >= 0:
        after.append_text(Text.assemble("; rank and % of ", token_cell(model.tokenizer, target, "bold")))
    console.print(after)
    print_table(console, columns, rows, left=("layer",), gap=1)
    settled = found.settled[0, position].item()
    console.print(Text(f"The final token is on top from {found.names[settled]} on. KL to the end and entropy in nats."))


def show_all(model, ids, found, console) -> None:
    """A row a reading, a column a position: the likeliest token; below, where it settled."""
    rows = [
        [name, *(token_cell(model.tokenizer, id, shade(p), WIDTH) for id, p in zip(top, top_p, strict=True))]
        for name, top, top_p in zip(
            found.names, found.top[:, 0, :, 0].tolist(), found.top_p[:, 0, :, 0].tolist(), strict=True
        )
    ]
    rows.append(["settled", *(found.names[row] for row in found.settled[0].tolist())])
    columns = ["layer", *(token_cell(model.tokenizer, id, width=WIDTH) for id in ids)]
    print_table(console, columns, rows, left=("layer",))
    legend = Text("The likeliest next token after each: ")
    for words, style in (("> 50 %", "bright_green"), (" > 30 %", "green"), (" > 10 %", "yellow"), (" less", "white")):
        legend.append(words, style)
    console.print(legend)


def reading(model, found, row, place) -> dict:
    """The numbers of one reading at one position."""
    measured = {name: getattr(found, name)[row, 0, place].item() for name in ("p", "rank", "entropy", "kl")}
    top = found.top[row, 0, place].tolist()
    words = [token_text(model.tokenizer, id) for id in top]
    return {"layer": found.names[row], "top": top, "text": words, "top_p": found.top_p[row, 0, place], **measured}


def as_json(model, found, places) -> dict:
    """The readings of some positions as plain JSON."""
    rows = lambda place: [reading(model, found, row, place) for row in range(len(found.names))]
    one = lambda place: {
        "position": place,
        "target": found.target[0, place].item(),
        "settled": found.names[found.settled[0, place].item()],
        "rows": rows(place),
    }
    return {"positions": [one(place) for place in places]}


def cells(model, ids, found, places) -> list[dict]:
    """A row for each position and reading."""
    rows = []
    for place in places:
        for row in range(len(found.names)):
            one = reading(model, found, row, place)
            one |= {"top": one.pop("text")[0], "top_p": one["top_p"][0].item()}
            where = {"position": place, "token": token_text(model.tokenizer, ids[place])}
            rows.append(where | {"target": found.target[0, place].item()} | one)
    return rows
