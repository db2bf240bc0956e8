"""What invoke interpret.report does: look with every tool at one text, and write the page."""

from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

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

DEMO = {  # words that are whole tokens nearly everywhere, said twice, so that a head that copies has something to copy
    "clean": "The name of the first item is the key. The name of the first",
    "corrupted": "The name of the first line is the key. The name of the first",
    "target": " item",
    "foil": " line",
}
PAIR = ("clean", "corrupted", "target")
N_SEQUENCES, LENGTH = 100, 40  # of the random probes, said twice
SITES = ("resid_pre", "attn.out", "mlp.out")  # by position; attn.z by head
IN_TABLE = ("block", "attn.out", "mlp.out", "resid_post")
LAST = {"positions": [-1]}  # the whole stream gives all back by construction: it is patched at the end only


class Pair(NamedTuple):
    """Two prompts (1,T) and the ids whose logits are weighed."""

    clean: torch.Tensor
    corrupt: torch.Tensor
    target: int
    foil: int


def show(given) -> None:
    """Look, write the page, and say where it is."""
    given = check(given)
    loaded, counter = looking.load(given), looking.Counter()
    console = looking.open_console({})
    pair = None if given["clean"] is None else read_pair(loaded, given, counter, console)
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


def read_pair(loaded, given, counter, console) -> Pair | None:
    """The two prompts as ids, and what is asked of them; what was decided on the way is said.

    None for a demo whose two answers begin with one token, as bytes do. Raises ValueError for such texts of the user's.
    """
    words, place = loaded.tokenizer, loaded.params["embed"]["w"].device
    found = pairs.continuation(words, given["clean"], given["target"])
    corrupted = given["corrupted"].rstrip(" ")
    for name, text in (("clean", found.prompt), ("corrupted", corrupted)):
        if not text:
            raise ValueError(f"{name}: expected at least one token, got an empty text")
    clean, corrupt = (torch.tensor([words.encode(text)], device=place) for text in (found.prompt, corrupted))
    if given["foil"] is None:
        with torch.no_grad():
            logits = model.forward(loaded.params, loaded.config, corrupt)[0][0, -1]
        counter.n_rows += 1
        foil = pairs.foil_of(logits, found.ids[0])
    else:
        foil = pairs.continuation(words, corrupted, given["foil"]).ids[0]
    if foil != found.ids[0]:
        for note in found.notes:
            console.print(Text(note))
        return Pair(clean, corrupt, found.ids[0], foil)
    (word,) = report.token_texts(words, [foil])
    if not given["demo"]:
        raise ValueError(f"foil: expected another token than the target, got {word!r} twice")
    console.print(Text(f"no patching: this tokenizer begins both of the demo's answers with {word!r}"))
    return None


def look(loaded, ids, pair, given, counter) -> list[report.Panel]:
    """Every panel that there is something for, about a text given as ids."""
    params, config = loaded.params, loaded.config
    tokens = torch.tensor([ids], device=params["embed"]["w"].device)
    text = lambda ids: report.token_texts(loaded.tokenizer, ids)
    shown = text(ids)
    panels = [about(loaded, shown, given)]
    if len(ids) > 1:
        panels.append(report.losses("Surprise", shown, model.nats(params, config, tokens[:, :-1], tokens[:, 1:])[0]))
    if config.n_layer:
        panels += heads(loaded, tokens, shown, given, counter)
    panels.append(report.lens("Logit lens", shown, {"logit": logit_lens(params, config, tokens)}, text))
    panels.append(waterfall(loaded, tokens, text, pair))
    counter.n_rows += 4
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
    params, config, words = loaded.params, loaded.config, loaded.tokenizer
    draw = torch.Generator().manual_seed(given["seed"])
    panels, most = [], (config.n_context - 1) // 2
    if most >= 2:
        group = induction.repeats(
            config, N_SEQUENCES, min(LENGTH, most), generator=draw, bos=words.eot, exclude=words.special.values()
        )
        group = group._replace(tokens=group.tokens.to(tokens.device))
        found = induction.summarise(induction.scan(params, config, group), generator=draw)
        gain = f"{found.gain.value:.2f} nats a token ({found.gain.low:.2f} to {found.gain.high:.2f})"
        note = (
            f"{N_SEQUENCES} sequences of {group.length} random tokens, said twice. The second time the loss is lower "
            f"by {gain}: what a head does shows in its score, what all of them achieve in this number."
        )
        panels.append(report.head_scores("Heads on random repeats", found.scores, notes=[note]))
        counter.n_rows += N_SEQUENCES
    if tokens.shape[1] < 2:
        return panels
    scores = attention.head_scores(params, config, tokens, generator=draw)
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


def waterfall(loaded, tokens, text, pair) -> report.Panel:
    """What adds up to the answer after the last token: the pair's, if this is its clean text, else the model's own."""
    params, config = loaded.params, loaded.config
    if pair and torch.equal(pair.clean, tokens):
        target, foil = pair.target, pair.foil
    else:
        with torch.no_grad():
            target, foil = model.forward(params, config, tokens)[0][0, -1].topk(2).indices.tolist()
    found = direct(params, config, tokens, target, foil)
    names = text([target, foil])
    return report.waterfall("Direct effects", text(tokens[0]), found, *names, capped=config.logit_softcap > 0)


def patching(loaded, pair, text, counter) -> report.Panel:
    """Clean activations in the corrupted run, by position and by head, and a table by layer."""
    params, config = loaded.params, loaded.config
    align = pairs.align_ends(pair.clean[0].tolist(), pair.corrupt[0].tolist())
    metric = pairs.logit_diff(pair.target, pair.foil)
    run = lambda site, by, **ways: sweep(
        params, config, pair.clean, pair.corrupt, site, metric, by=by, align=align, **ways
    )
    sweeps = [*(run(site, ("layer", "position")) for site in SITES), run("attn.z", ("layer", "head"))]
    layers = {site: run(site, ("layer",), **at) for site, at in zip(IN_TABLE, [{}, {}, {}, LAST], strict=True)}
    counter.n_rows += round(sum(each.forwards for each in (*sweeps, *layers.values())))
    with torch.no_grad():
        logits = [model.forward(params, config, each)[0][0, -1] for each in (pair.clean, pair.corrupt)]
    tops = [each.softmax(-1).topk(3) for each in logits]
    top = {
        name: list(zip(text(found.indices.tolist()), found.values.tolist(), strict=True))
        for name, found in zip(("Clean", "Corrupted"), tops, strict=True)
    }
    target, foil = text([pair.target, pair.foil])
    clean, corrupt = text(pair.clean[0]), text(pair.corrupt[0])
    return report.patching(
        "Patching", clean, corrupt, sweeps, target=target, foil=foil, align=align, layers=layers, top=top
    )
