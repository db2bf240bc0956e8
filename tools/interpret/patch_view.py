"""What invoke interpret.patch does: make the pairs comparable, patch every cell, and say what was measured."""

import json

import torch
from rich.text import Text

from gptcore.device import generator
from gptcore.interpret import pairs
from gptcore.interpret.attribution import check_largest, edge_effects, gradient_effects, summed
from gptcore.interpret.patching import AXES, Sweep, sweep
from gptcore.interpret.paths import path_patch
from gptcore.interpret.report import head_name, token_texts
from tools.interpret import looking, report_view
from tools.interpret.looking import Counter, Document, print_table
from tools.interpret.prompts import Case, case_of, last_logits, shared
from tools.interpret.tokens import token_cell, token_text

DEMO = (
    ("Nora met Felix at the station. Nora waved to", "Nora met Oscar at the station. Nora waved to", "Felix", "Oscar"),
)
DEFAULT_SITE = {"layer": "block", "position": "resid_pre", "head": "attn.z"}
N_CHECKED = 10  # largest estimates that are measured too
WIDTH = 10  # of a token's cell


def show(given) -> int:
    """The command: one pair, our own pairs one after the other, or a file of them pooled."""
    looking.check_options(given)
    check(given)
    console = looking.open_console(given)
    model, documents = looking.load(given), []
    if given["pairs"]:
        counter = Counter()
        cases = [text_case(model, given, pair, console, counter) for pair in read_pairs(given["pairs"])]
        documents.append(look(model, cases, given, console, counter))
    elif given["demo"]:
        for pair in DEMO:
            console.print(Text(f"{pair[0]} ... / {pair[1]} ..."), soft_wrap=True)
            if word := shared(model, pair[0], *pair[2:]):
                console.print(Text(f"passed over: this tokenizer begins both answers with {word}"), soft_wrap=True)
                continue
            counter = Counter()
            documents.append(look(model, [text_case(model, given, pair, console, counter)], given, console, counter))
        console.print(Text("Tokens of the vocabulary, and their beginning again; one of the first copy is replaced."))
        documents.append(look(model, [repeat_case(model, given)], given, console, Counter()))
    else:
        pair = [given[name] for name in ("clean", "corrupted", "target", "foil")]
        counter = Counter()
        documents.append(look(model, [text_case(model, given, pair, console, counter)], given, console, counter))
    looking.write(given, model, "interpret.patch", documents, console)
    return 0


def check(given) -> None:
    """Raise ValueError unless the options name pairs in one way, and go together."""
    texts = [given[name] is not None for name in ("clean", "corrupted", "target")]
    ways = [
        name for name, asked in (("demo", given["demo"]), ("pairs", given["pairs"]), ("clean", any(texts))) if asked
    ]
    if len(ways) != 1 or (any(texts) and not all(texts)):
        raise ValueError(
            "clean: expected --clean, --corrupted and --target, or --demo, or --pairs alone, got otherwise"
        )
    if given["method"] != "measured" and given["direction"] == "noise":
        raise ValueError(f"direction: expected denoise for --method {given['method']}, got noise")
    if given["site"] and not set(by_of(given, given["site"])) <= {"layer", *AXES[given["site"]]}:
        fitting = ", ".join(site for site, axes in AXES.items() if given["by"] in axes)
        raise ValueError(f"site: expected one of {fitting} for --by {given['by']}, got {given['site']}")


# ------------------------------------------------------------------------------------------------------------- pairs


def read_pairs(path) -> list[tuple]:
    """(clean, corrupted, target, foil or None) a line of a JSON-lines file."""
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found.append((*(row[name] for name in ("clean", "corrupted", "target")), row.get("foil")))
            except (ValueError, KeyError, TypeError, AttributeError):
                wanted = '{"clean", "corrupted", "target"}'
                raise ValueError(f"pairs: expected {wanted} in line {number}, got {line.strip()[:80]!r}") from None
    if not found:
        raise ValueError(f"pairs: expected a pair a line, got none in {path}")
    return found


def text_case(model, given, pair, console, counter) -> Case:
    """A pair of texts as ids; prompts of two lengths have no positions in common but those that are said."""
    case = case_of(model, *pair, console, counter, exact=given["exact_target"])
    if case.links is not None:
        lengths = f"{case.clean.shape[1]} and {case.corrupt.shape[1]}"
        if given["by"] == "position" and given["align"] == "strict":
            wanted = "expected equal lengths by position, or --align auto"
            raise ValueError(f"clean, corrupted: {wanted}, got {lengths} tokens")
        words = f"{lengths} tokens: {len(case.links)} positions are paired from both ends"
        console.print(Text(f"{words}, the rest is left as it is"))
    return case


def repeat_case(model, given) -> Case:
    """r r[:6] of random tokens, and the same with r[6] replaced: works with every tokenizer and model."""
    special, n = set(model.tokenizer.special.values()), min(12, model.config.n_context - 6)
    stream = generator(given["seed"], "repeat")
    drawn = torch.randperm(model.config.n_vocab, generator=stream).tolist()
    ids = [id for id in drawn if id not in special][: n + 1]
    if n < 8 or len(ids) <= n:
        raise ValueError(
            f"run: expected a context of 14 and a vocabulary of 9 for this pair, got {n + 6} and {len(ids)}"
        )
    r, other = ids[:n], ids[n]
    device = model.params["embed"]["w"].device
    clean = torch.tensor([r + r[:6]], device=device)
    corrupt = torch.tensor([[*r[:6], other, *r[7:], *r[:6]]], device=device)
    return Case(clean, corrupt, r[6], other, None)


def metric_of(model, case, name):
    """The metric of that name for a pair."""
    if name == "kl":
        return pairs.kl(last_logits(model, case.clean))
    if name == "logit-diff":
        return pairs.logit_diff(case.target, case.foil)
    return {"logit": pairs.logit, "prob": pairs.prob, "logprob": pairs.logprob, "nll": pairs.nll}[name](case.target)


# --------------------------------------------------------------------------------------------------------- measuring


def look(model, cases, given, console, counter) -> Document:
    """Everything about some pairs that are pooled: their answers, the table, the numbers."""
    answers = [show_answers(model, case, console, counter) for case in cases[:3]]
    if len(cases) > 3:
        console.print(Text(f"... and {len(cases) - 3} pairs more"))
    site = given["site"] or DEFAULT_SITE[given["by"]]
    if given["method"] == "edges":
        result, rows = show_edges(model, cases, given, console, counter)
    elif given["method"] == "attribution":
        result, rows = show_estimates(model, cases, given, site, console, counter)
    elif given["by"] == "layer" and given["site"] is None:
        result, rows = show_layers(model, cases, given, console, counter)
    else:
        result, rows = show_map(model, cases, given, site, console, counter)
    panels = panels_of(model, cases, given, counter)
    console.print(counter.line())
    named = [
        {"target": each.target, "foil": each.foil, "clean": each.clean[0], "corrupted": each.corrupt[0]}
        for each in cases
    ]
    ids = cases[0].clean[0].tolist()
    return Document(ids, {"pairs": named, "likeliest": answers, **result}, rows, panels)


def panels_of(model, cases, given, counter) -> tuple:
    """The first pair as a panel for --html: maps by position and by head and the table, whatever the terminal shows."""
    if not given["html"]:
        return ()
    text = lambda ids: token_texts(model.tokenizer, ids)
    return (report_view.patching(model, cases[0], text, counter),)


def show_answers(model, case, console, counter) -> dict:
    """The three likeliest tokens of both runs, and what is measured."""
    found = {}
    for name, tokens in (("clean", case.clean), ("corrupted", case.corrupt)):
        p, ids = last_logits(model, tokens)[0].softmax(-1).topk(min(3, model.config.n_vocab))
        line = Text(f"{name:<10}")
        for share, id in zip(p.tolist(), ids.tolist(), strict=True):
            line.append_text(Text.assemble(" ", token_cell(model.tokenizer, id, "bold"), f" {100 * share:.1f} %"))
        console.print(line)
        found[name] = [
            {"id": id, "text": token_text(model.tokenizer, id), "p": share}
            for share, id in zip(p.tolist(), ids.tolist(), strict=True)
        ]
        counter.n_rows += 1
    target, foil = (token_cell(model.tokenizer, id, "bold") for id in (case.target, case.foil))
    console.print(Text.assemble("target ", target, ", foil ", foil))
    return found


def by_of(given, site) -> tuple[str, ...]:
    """The axes of the sweep."""
    second = "query" if site == "attn.pattern" and given["by"] == "position" else given["by"]
    return ("layer",) if given["by"] == "layer" else ("layer", second)


def swept(model, cases, given, site, counter, *, by, metric=None, positions=None) -> Sweep:
    """One sweep of every pair, joined along the pairs."""
    found = []
    for case in cases:
        metric_ = metric_of(model, case, metric or given["metric"])
        ways = {"by": by, "direction": given["direction"], "align": case.links, "positions": positions}
        found.append(sweep(model.params, model.config, case.clean, case.corrupt, site, metric_, **ways))
        counter.n_rows += round(found[-1].forwards)
    if len({each.patched.shape for each in found}) > 1:
        lengths = sorted({each.patched.shape[1] for each in found})
        raise ValueError(f"pairs: expected equal lengths by position, got from {lengths[0]} to {lengths[-1]} tokens")
    join = lambda name: torch.cat([getattr(each, name) for each in found], dim=-1)
    values = {name: join(name) for name in ("patched", "clean", "corrupt")}
    return found[0]._replace(**values, forwards=sum(each.forwards for each in found))


def pooled(given, found):
    """Recovery over the pairs with its interval."""
    stream = generator(given["seed"], "pairs")
    return pairs.pooled(found.patched, found.clean, found.corrupt, found.direction, generator=stream)


def percent(value) -> str:
    """A recovery in percent, with its sign; ·· where it is undefined."""
    return "··" if value != value else f"{100 * value:+z.1f}"


def assessed(share, cell, why) -> str:
    """The band of a cell of an Interval; empty where there is a reason why not to judge."""
    return "" if why else pairs.band(*(float(end[cell]) for end in share)) or "undefined"


def show_layers(model, cases, given, console, counter):
    """The table of layers: attention and MLP together ranked, each alone, and the whole stream at the last position."""
    run = lambda site, **ways: swept(model, cases, given, site, counter, by=("layer",), **ways)
    both, attn, mlp, last = run("block"), run("attn.out"), run("mlp.out"), run("resid_post", positions=[-1])
    said = run("block", metric="prob").patched.mean(-1)
    shares = {
        name: pooled(given, each)
        for name, each in (("block", both), ("attn.out", attn), ("mlp.out", mlp), ("resid_post", last))
    }
    why = show_setting(both, given, console)
    block, n = shares["block"], model.config.n_layer
    order = sorted(range(n), key=lambda i: -block.value[i].nan_to_num(-torch.inf).item())
    ranks = {layer: rank + 1 for rank, layer in enumerate(order)}
    shown = order[: given["top_k"]] if given["order"] == "rank" else range(n)
    rows, cells = [], []
    for i in range(n):
        one = {name: share.value[i].item() for name, share in shares.items()}
        cells.append({
            "rank": ranks[i], "layer": i, "assessment": assessed(block, i, why), **one, "low": block.low[i].item(),
            "high": block.high[i].item(), "clean": both.clean.mean().item(), "corrupted": both.corrupt.mean().item(),
            "patched": both.patched[i].mean().item(), "p_target": said[i].item(),
        })  # fmt: skip
    for i in shown:
        one = cells[i]
        between = [] if one["low"] != one["low"] else [f"{percent(one['low'])} to {percent(one['high'])}"]
        alone = [percent(one[name]) for name in ("attn.out", "mlp.out", "resid_post")]
        measured_ = [f"{one['patched']:.3f}", f"{100 * one['p_target']:.1f}"]
        verdict = [] if why else [one["assessment"]]
        rows.append([str(one["rank"]), str(i), percent(one["block"]), *between, *verdict, *measured_, *alone])
    several = ["interval"] if len(cases) >= pairs.MIN_PAIRS and not block.low.isnan().all() else []
    measures = ["patched", "p target %", "attn %", "mlp %", "last %"]
    columns = ["rank", "layer", "block %", *several, *([] if why else ["assessment"]), *measures]
    print_table(console, columns, rows, left=("assessment",))
    console.print(
        Text(
            "% of the difference that comes back: block = attention and MLP of a layer together; last = the"
            " whole stream at the last position."
        ),
    )
    show_undefined(both, console)
    return {
        "axes": ["layer"],
        "recovery": {name: share.value for name, share in shares.items()},
        "layers": cells,
    }, cells


def show_map(model, cases, given, site, console, counter):
    """Layer x position, layer x head or one site by layer, and its largest cells."""
    found = swept(model, cases, given, site, counter, by=by_of(given, site))
    share = pooled(given, found)
    why = show_setting(found, given, console)
    value = share.value if share.value.dim() == 2 else share.value[:, None]
    heading = lambda n: [f"head {n}" if given["by"] == "head" else f"{site} %"]
    if given["by"] == "position":
        tokens = (cases[0].corrupt if given["direction"] == "denoise" else cases[0].clean)[0].tolist()
        columns = [token_cell(model.tokenizer, tokens[at], width=WIDTH) for at in found.positions]
    else:
        columns = [name for n in range(value.shape[1]) for name in heading(n)]
    print_table(console, ["layer", *columns], [[str(i), *map(percent, row)] for i, row in enumerate(value.tolist())])
    cells, axes = [], found.axes
    for cell in torch.cartesian_prod(*(torch.arange(n) for n in share.value.shape)).reshape(-1, len(axes)).tolist():
        at, place = tuple(cell), dict(zip(axes, cell, strict=True))
        if given["by"] == "position":
            place[axes[1]] = found.positions[cell[1]]
        cells.append(place | {
            "recovery": share.value[at].item(), "low": share.low[at].item(), "high": share.high[at].item(),
            "patched": found.patched[at].mean().item(), "assessment": assessed(share, at, why),
        })  # fmt: skip
    verdict = lambda c: [] if why else [c["assessment"]]
    ranked = sorted((c for c in cells if c["recovery"] == c["recovery"]), key=lambda c: -abs(c["recovery"]))
    rows = [
        [*(str(c[axis]) for axis in axes), percent(c["recovery"]), f"{c['patched']:.3f}", *verdict(c)]
        for c in ranked[: given["top_k"]]
    ]
    if rows:
        print_table(console, [*axes, "%", "patched", *([] if why else ["assessment"])], rows, left=("assessment",))
    show_undefined(found, console)
    return {"axes": list(axes), "positions": found.positions, "site": site, "recovery": share.value}, cells


def show_setting(found, given, console) -> str:
    """What the numbers are of; returns what pairs.doubt has against a verdict, which is said."""
    into = (
        "clean values into the corrupted run"
        if given["direction"] == "denoise"
        else "corrupted values into the clean run"
    )
    ends = f"clean {found.clean.mean():.3f}, corrupted {found.corrupt.mean():.3f}"
    console.print(Text(f"{given['metric']}: {ends}; {given['direction']}: {into}"))
    if why := pairs.doubt(found.clean, found.corrupt, given["metric"]):
        console.print(Text(why), style="yellow")
    return why


def show_undefined(found, console) -> None:
    """Why pairs have no recovery, if any has none."""
    without = [n for n in range(len(found.clean)) if not pairs.differs(found.clean[n], found.corrupt[n])]
    if without:
        where = f"{len(without)} of {len(found.clean)} pairs: " if len(found.clean) > 1 else ""
        ends = f"({found.clean[without[0]]:.6g} and {found.corrupt[without[0]]:.6g})"
        console.print(Text(f"undefined: {where}clean and corrupt hardly differ {ends}"))


# --------------------------------------------------------------------------------------------------------- estimates


def equal_case(cases, method) -> Case:
    """The pair for an estimate: one, of equal lengths."""
    if len(cases) > 1 or cases[0].links is not None:
        raise ValueError(f"method: expected one pair of equal lengths for {method}, got several or two lengths")
    return cases[0]


def show_estimates(model, cases, given, site, console, counter):
    """The largest effects that gradients foretell, beside what patching them does."""
    case, by = equal_case(cases, "attribution"), by_of(given, site)
    metric, words = metric_of(model, case, given["metric"]), (model.params, model.config, case.clean, case.corrupt)
    found = summed(gradient_effects(*words, metric, [site], steps=given["steps"])[site], site, by)
    checked = check_largest(*words, site, metric, found, max(N_CHECKED, given["top_k"]), by=by)
    counter.n_rows += (given["steps"] + 4 if given["steps"] else 2) + 3 + len(checked.cells)
    rows = [
        [*map(str, cell), f"{e:+.3f}", f"{x:+.3f}"]
        for cell, e, x in zip(checked.cells, checked.estimate[:, 0], checked.exact[:, 0], strict=True)
    ]
    show_method(given, console)
    print_table(console, [*by, "estimate", "measured"], rows)
    exact = dict(zip(checked.cells, checked.exact[:, 0].tolist(), strict=True))
    cells = torch.cartesian_prod(*(torch.arange(n) for n in found.shape[:-1])).reshape(-1, len(by)).tolist()
    cells = [
        dict(zip(by, cell, strict=True)) | {"estimate": found[tuple(cell)].item(), "measured": exact.get(tuple(cell))}
        for cell in cells
    ]
    return {"axes": list(by), "site": site, "estimate": found[..., 0], "checked": checked}, cells


def show_edges(model, cases, given, console, counter):
    """The largest edges from writers to readers, beside what sending that one message does."""
    case = equal_case(cases, "edges")
    metric, words = metric_of(model, case, given["metric"]), (model.params, model.config, case.clean, case.corrupt)
    found = edge_effects(*words, metric, steps=given["steps"])
    effect = found.effect[..., 0]
    order = effect.abs().flatten().argsort(descending=True)[: max(N_CHECKED, given["top_k"])].tolist()
    exact, rows = {}, []
    for n in order:
        writer, reader = found.writers[n // len(found.readers)], found.readers[n % len(found.readers)]
        if effect.flatten()[n] == 0:
            continue
        sent = path_patch(*words, [writer], [reader], metric)
        exact[n] = (sent.patched[0, 0] - sent.corrupt[0]).item()
        counter.n_rows += 3 if reader.site == "logits" else 4
        rows.append([label(writer), label(reader), f"{effect.flatten()[n]:+.3f}", f"{exact[n]:+.3f}"])
    counter.n_rows += given["steps"] + 4 if given["steps"] else 3
    show_method(given, console)
    print_table(console, ["from", "to", "estimate", "measured"], rows, left=("from", "to"))
    cells = []
    for n in effect.flatten().nonzero()[:, 0].tolist():
        writer, reader = found.writers[n // len(found.readers)], found.readers[n % len(found.readers)]
        ends = {"from": str(writer), "to": str(reader)}
        cells.append(ends | {"estimate": effect.flatten()[n].item(), "measured": exact.get(n)})
    return {"edges": cells}, cells


def show_method(given, console) -> None:
    """How the estimates were made, and what they are worth."""
    way = (
        f"the mean gradient at {given['steps']} points between the embeddings"
        if given["steps"]
        else "the gradient at the corrupted prompt"
    )
    console.print(Text(f"change of {given['metric']} as {way} foretells it, and as it was measured"))


def label(node) -> str:
    """A node in few letters: L1H3, L0 mlp, L1H2 q."""
    if node.layer < 0:
        return node.site
    part = node.site.split(".")[-1]
    if node.head is None:
        return f"L{node.layer} {'attention bias' if part == 'b' else 'mlp'}"
    return head_name(node.layer, node.head) + ("" if part == "z" else f" {part}")
