"""What invoke interpret.attribute does: a logit as a sum of parts, the largest first, with nothing left over."""

import torch
from rich.text import Text

from gptcore.interpret.attribution import direct, measured, neurons
from tools.interpret import looking
from tools.interpret.looking import Counter, Document, print_table
from tools.interpret.patch_view import label
from tools.interpret.prompts import continued
from tools.interpret.tokens import token_cell, token_text


def show(given) -> int:
    """The command: one text, one position, one logit."""
    looking.check_options(given)
    console = looking.open_console(given)
    model, counter = looking.load(given), Counter()
    ids, position = cut(model, given, console)
    tokens = torch.tensor([ids], device=model.params["embed"]["w"].device)
    target, foil = (id_of(model, ids[: position + 1], given[name], console) for name in ("target", "foil"))
    if target is not None and target == foil:
        name = token_text(model.tokenizer, foil)
        raise ValueError(f"foil: expected another token than the target, got {name} twice")
    if target is None:
        target = int(measured(model.params, model.config, tokens, lambda logits: logits.argmax(-1), position))
        counter.n_rows += 1
    words = (model.params, model.config, tokens, target, foil)
    found = direct(*words, position=position)
    parts = {"head": by_head, "component": by_component}.get(given["by"], by_head)(found)
    if given["by"] == "neuron":
        parts = by_neuron(parts, neurons(*words, position=position))
        counter.n_rows += 1
    counter.n_rows += 1
    parts["constant"] = found.constant[0].item()
    total = found.logit[0].item()
    show_parts(model, ids, position, target, foil, parts, total, given, console)
    console.print(counter.line())
    cells = [{"part": name, "value": value} for name, value in parts.items()]
    result = {"position": position, "target": target, "foil": foil, "logit": total, "parts": parts}
    looking.write(given, model, "interpret.attribute", [Document(ids, result, cells)], console)
    return 0


def cut(model, given, console):
    """(the text's ids, the position that is read)."""
    followed = any(given[name] is not None for name in ("target", "foil"))
    text = given["text"].rstrip(" ") if followed and given["position"] == -1 else given["text"]  # they take the spaces
    ids = looking.ids_of(model, text, console)
    if not -len(ids) <= given["position"] < len(ids):
        raise ValueError(f"position: expected {-len(ids)} to {len(ids) - 1} in this text, got {given['position']}")
    return ids, given["position"] % len(ids)


def id_of(model, ids, target, console) -> int | None:
    """The id of a token that continues the ids; what was decided is said.

    Where a space was asked for as the last of them, the target stands right behind it.
    """
    if target is None:
        return None
    prompt = model.tokenizer.decode(ids)
    if not prompt.endswith(" "):
        return continued(model, prompt, target, console).ids[0]
    both = model.tokenizer.encode(prompt + target)
    if both[: len(ids)] != ids or len(both) == len(ids):
        raise ValueError(f"target: expected a text that goes on after the token at that position, got {target!r}")
    return both[len(ids)]


def by_head(found) -> dict[str, float]:
    """Every part by its name."""
    return {label(node): value for node, value in zip(found.nodes, found.parts[:, 0].tolist(), strict=True)}


def by_component(found) -> dict[str, float]:
    """The same with the heads and the output bias of a layer as one."""
    parts = {}
    for node, value in zip(found.nodes, found.parts[:, 0].tolist(), strict=True):
        name = f"L{node.layer} attention" if ".attn." in node.site else label(node)
        parts[name] = parts.get(name, 0.0) + value
    return parts


def by_neuron(parts, found) -> dict[str, float]:
    """The same with every MLP as its neurons and its bias."""
    split = {}
    for name, value in parts.items():
        if not name.endswith(" mlp"):
            split[name] = value
            continue
        layer = int(name[1:].split()[0])
        split |= {f"L{layer} neuron {n}": each for n, each in enumerate(found.values[layer, 0].tolist())}
        split[f"L{layer} mlp bias"] = found.bias[layer, 0].item()
    return split


def show_parts(model, ids, position, target, foil, parts, total, given, console) -> None:
    """The largest parts, what the others come to, the constant, and the sum of all."""
    what = Text.assemble("logit of ", token_cell(model.tokenizer, target, "bold"))
    if foil is not None:
        what.append_text(Text.assemble(" minus that of ", token_cell(model.tokenizer, foil, "bold")))
    what.append_text(
        Text.assemble(" after ", token_cell(model.tokenizer, ids[position], "bold"), f" (position {position})")
    )
    console.print(what)
    ranked = sorted((name for name in parts if name != "constant"), key=lambda name: -abs(parts[name]))
    shown, rest = ranked[: given["top_k"]], ranked[given["top_k"] :]
    rows = [[name, f"{parts[name]:+.3f}"] for name in shown]
    if rest:
        rows.append([f"{len(rest):,} others", f"{sum(parts[name] for name in rest):+.3f}"])
    rows += [["constant", f"{parts['constant']:+.3f}"], ["sum = logit", f"{total:+.3f}"]]
    print_table(console, ["part", "adds"], rows, left=("part",))
    cap = f", before the cap of {model.config.logit_softcap:g}" if model.config.logit_softcap else ""
    console.print(Text(f"Direct effects{cap}: what a part changes through later parts is not in them."), soft_wrap=True)
