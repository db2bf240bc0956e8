"""What invoke interpret.report does: look with every tool at one text, and write the page."""

from importlib.metadata import version
from pathlib import Path

import torch
from rich.text import Text

from gptcore import device, model
from gptcore.files import write_whole
from gptcore.interpret import attention, induction, pairs, report
from gptcore.interpret.attribution import direct
from gptcore.interpret.lens import logit_lens
from gptcore.interpret.patching import sweep
from gptcore.interpret.taps import record
from tools.interpret import looking
from tools.interpret.induction_view import sequences, told
from tools.interpret.prompts import Case, case_of, last_logits, shared

DEMO = {  # words that are whole tokens nearly everywhere, said twice, so that a head that copies has something to copy
    "clean": "The name of the first item is the key. The name of the first",
    "corrupted": "The name of the first line is the key. The name of the first",
    "target": " item",
    "foil": " line",
}
PAIR = ("clean", "corrupted", "target")
N_SEQUENCES = 100  # random ones, said twice: those of interpret.induction-heads
SITES = ("resid_pre", "attn.out", "mlp.out")  # by position; attn.z by head
IN_TABLE = ("block", "attn.out", "mlp.out", "resid_post")
LAST = {"positions": [-1]}  # the whole stream gives all back by construction: it is patched at the end only


def show(given) -> None:
    """Look, write the page, and say where it is."""
    given = check(given)
    loaded, counter = looking.load(given), looking.Counter()
    console = looking.open_console({})
    pair = None if given["clean"] is None else read_pair(loaded, given, console, counter)
    text = given["clean"].rstrip(" ") if given["text"] is None else given["text"]
    ids = looking.ids_of(loaded, text, console)
    title = f"Inside {loaded.name}"
    panels = look(loaded, ids, pair, given, counter)
    page = report.html(title, panels, max_mb=given["max_mb"])
    write_whole(given["out"], page)
    console.print(Text(f"{given['out']}: {len(page) / 1e6:.2f} MB, {len(panels)} panels, nothing else needed"))
    console.print(counter.line())


def check(given):
    """The options with the demo's texts in place. Raises ValueError for texts that do not go together."""
    asked = [name for name in (*PAIR, "foil") if given[name] is not None]
    if given["demo"]:
        if asked or given["text"] is not None:
            raise ValueError(f"text: expected none beside --demo, got --{(asked or ['text'])[0]}")
        given = given | DEMO
    elif asked and any(given[name] is None for name in PAIR):
        missing = next(name for name in PAIR if given[name] is None)
        raise ValueError(f"{missing}: expected --clean, --corrupted and --target together, got no --{missing}")
    elif given["text"] is None and not asked:
        raise ValueError("text: expected --text, --demo or patch's three texts, got none")
    if not Path(given["out"]).parent.is_dir():
        raise ValueError(f"out: expected a file in a folder that is there, got {given['out']}")
    return given


def read_pair(loaded, given, console, counter) -> Case | None:
    """The two prompts; None for a demo whose two answers begin with one token, as bytes do."""
    texts = [given[name] for name in (*PAIR, "foil")]
    if given["demo"] and (word := shared(loaded, texts[0], *texts[2:])):
        console.print(Text(f"no patching: this tokenizer begins both of the demo's answers with {word}"))
        return None
    return case_of(loaded, *texts, console, counter)


def look(loaded, ids, pair, given, counter) -> list[report.Panel]:
    """Every panel that there is something for, about a text given as ids."""
    params, config = loaded.params, loaded.config
    tokens = torch.tensor([ids], device=params["embed"]["w"].device)
    text = lambda ids: report.token_texts(loaded.tokenizer, ids)
    shown = text(ids)
    panels = [about(loaded, shown, given)]
    if len(ids) > 1:
        panels.append(report.losses("Surprise", shown, model.nats(params, config, tokens[:, :-1], tokens[:, 1:])[0]))
        counter.n_rows += 1
    if config.n_layer:
        panels += heads(loaded, tokens, shown, given, counter)
    panels.append(report.lens("Logit lens", shown, {"logit": logit_lens(params, config, tokens)}, text))
    counter.n_rows += 1
    panels.append(waterfall(loaded, tokens, text, pair, counter))
    if pair and config.n_layer:
        panels.append(patching(loaded, pair, text, counter))
    return panels


def about(loaded, shown, given) -> report.Panel:
    """The model, down to the sha256 of its weights, and how it was looked at."""
    config = loaded.config
    facts = [
        ("layers", config.n_layer), ("heads a layer", config.n_head), ("width", config.d_model),
        ("context", f"{config.n_context:,}"), ("vocabulary", f"{config.n_vocab:,}"),
        ("parameters", f"{model.count_params(config):,}"),
    ]  # fmt: skip
    rows = [
        ("run", loaded.name),
        ("position, norm, MLP", f"{config.position}, {config.norm}, {config.mlp}"),
        ("weights, sha256", loaded.state["files"]["model.safetensors"]["sha256"]),
        ("tokenizer", f"{loaded.tokenizer.name}, {loaded.tokenizer.fingerprint[:16]}"),
        ("text", f"{len(shown)} tokens"),
        ("seed", given["seed"]),
        ("device", device.backend_name(loaded.params["embed"]["w"].device)),
        ("versions", f"gptcore {version('gptcore')}, torch {torch.__version__}"),
    ]
    return report.about("Model", facts, rows, shown)


def heads(loaded, tokens, shown, given, counter) -> list[report.Panel]:
    """Scores on random tokens said twice, scores on the text, and the patterns."""
    params, config, panels = loaded.params, loaded.config, []
    if config.n_context >= 5:  # the end of text, and two tokens twice
        groups = sequences(loaded, N_SEQUENCES, None, given["seed"])
        draw = device.generator(given["seed"], "induction", "intervals")
        found = induction.summarise(induction.scan(params, config, *groups), generator=draw)
        gain = f"{found.gain.value:.2f} nats a token ({found.gain.low:.2f} to {found.gain.high:.2f})".replace("-", "−")
        note = (
            f"{told(groups)}. The second time the loss is lower by {gain}: what a head does shows in its score, what "
            "all of them achieve in this number."
        )
        panels.append(report.head_scores("Heads on random repeats", found.scores, notes=[note]))
        counter.n_rows += N_SEQUENCES
    if tokens.shape[1] < 2:
        return panels
    scores = attention.head_scores(params, config, tokens)
    note = "One text gives no interval. A head gets every label that holds; without any it is mixed."
    panels.append(report.head_scores("Heads on this text", scores, notes=[note]))
    tap, seen = record(config, ["blocks.*.attn.pattern", "blocks.*.attn.v"])
    with torch.no_grad():
        model.residual(params, config, tokens, tap=tap)
    patterns = torch.stack([seen[f"blocks.{layer}.attn.pattern"][0] for layer in range(config.n_layer)])
    norms = [
        attention.value_lengths(seen[f"blocks.{layer}.attn.v"], block["attn"]["o"]["w"])[0]
        for layer, block in enumerate(params["blocks"])
    ]
    named = attention.labels(scores)
    panels.append(report.attention("Attention", shown, patterns, norms=torch.stack(norms), named=named))
    counter.n_rows += 2
    return panels


def waterfall(loaded, tokens, text, pair, counter) -> report.Panel:
    """What adds up to the answer after the last token: the pair's, if this is its clean text, else the model's own."""
    params, config = loaded.params, loaded.config
    if pair and torch.equal(pair.clean, tokens):
        target, foil = pair.target, pair.foil
    else:
        target, foil = last_logits(loaded, tokens)[0].topk(2).indices.tolist()
        counter.n_rows += 1
    found = direct(params, config, tokens, target, foil)
    counter.n_rows += 1
    names = text([target, foil])
    return report.waterfall("Direct effects", text(tokens[0]), found, *names, capped=config.logit_softcap > 0)


def patching(loaded, pair, text, counter) -> report.Panel:
    """Clean activations in the corrupted run, by position and by head, and a table by layer."""
    params, config = loaded.params, loaded.config
    metric = pairs.logit_diff(pair.target, pair.foil)
    run = lambda site, by, **ways: sweep(
        params, config, pair.clean, pair.corrupt, site, metric, by=by, align=pair.links, **ways
    )
    sweeps = [*(run(site, ("layer", "position")) for site in SITES), run("attn.z", ("layer", "head"))]
    layers = {site: run(site, ("layer",), **at) for site, at in zip(IN_TABLE, [{}, {}, {}, LAST], strict=True)}
    tops = [last_logits(loaded, each)[0].softmax(-1).topk(3) for each in (pair.clean, pair.corrupt)]
    counter.n_rows += 2 + round(sum(each.forwards for each in (*sweeps, *layers.values())))
    top = {
        name: list(zip(text(found.indices.tolist()), found.values.tolist(), strict=True))
        for name, found in zip(("Clean", "Corrupted"), tops, strict=True)
    }
    target, foil = text([pair.target, pair.foil])
    clean, corrupt = text(pair.clean[0]), text(pair.corrupt[0])
    return report.patching(
        "Patching", clean, corrupt, sweeps, target=target, foil=foil, align=pair.links, layers=layers, top=top
    )
