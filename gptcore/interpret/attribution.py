"""What does each part add to the answer? Exactly, for what it writes to the logit; to first order, for all it does.

What you learn here: the residual stream is a sum, and with the final norm's divisor held at what it was, so is every
logit: an embedding, heads, biases and MLPs, and a constant, with nothing left over. What a part does through later
parts is no sum; there one gradient gives an estimate for every activation at once, and patching says how good it is.

    decompose(params, config, tokens)                                  -> the stream after the last block as a sum
    direct(params, config, tokens, target, foil), neurons(...)         -> the logit, or a difference, as a sum
    gradient_effects(params, config, clean, corrupt, metric, sites)    -> estimated effects of patching, all at once
    edge_effects(params, config, clean, corrupt, metric)               -> the same for every writer and reader

Axes: B rows, T tokens, N parts, L layers, H heads (H_kv), D head width, C model width, F MLP width.
Elhage et al. 2021 (a mathematical framework); Syed et al. 2023, arXiv:2310.10348; Hanna et al. 2024, arXiv:2403.17806.
Next: patching.py measures what is estimated here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import ops
from gptcore.interpret.nodes import Node, feeds, head_results, readers, writers
from gptcore.interpret.patching import AXES, at_positions, linked, measure, names_of, patch_cells, reading
from gptcore.interpret.taps import chain, gradients, patch, record
from gptcore.model import check_tokens, head, residual, unembed

# -------------------------------------------------------------------------------------------------- the direct effect


class Decomposition(NamedTuple):
    """Parts (N,B,T,C) whose sum is the residual stream after the last block, and who writes each."""

    nodes: list[Node]
    parts: Tensor


class Direct(NamedTuple):
    """A logit, or a difference of two, as a sum: parts (N,B) + constant (B,) = logit (B,).

    The constant is the final norm's bias and the head's, which no part writes. Where the model caps its logits, this
    is the logit before the cap.
    """

    nodes: list[Node]
    parts: Tensor
    constant: Tensor
    logit: Tensor


class Neurons(NamedTuple):
    """The share of each neuron (L,B,F) and of the down projection's bias (L,B) in the logit; a layer's sum is the
    part of its mlp.out."""

    values: Tensor
    bias: Tensor


def part_sites(config) -> list[str]:
    """The sites from which every part of the stream follows, in order."""
    position = ["pos"] if config.position in ("learned", "sinusoidal") else []
    return [
        "embed",
        *position,
        *(f"blocks.{i}.{name}" for i in range(config.n_layer) for name in ("attn.z", "mlp.out")),
    ]


def parts_of(params, config, seen) -> Decomposition:
    """The parts from what was seen at part_sites, (B,T,...) or any other axes in place of T."""
    nodes, parts = [], []
    for site, value in seen.items():
        if not site.endswith("attn.z"):
            nodes.append(Node(site))
            parts.append(value)
            continue
        layer = Node(site).layer
        nodes += [Node(site, h) for h in range(config.n_head)]
        parts += head_results(params, config, layer, value).unbind(-2)
        if "b" in (o := params["blocks"][layer]["attn"]["o"]):
            nodes.append(Node(f"blocks.{layer}.attn.o.b"))
            parts.append(o["b"].expand_as(parts[-1]))
    return Decomposition(nodes, torch.stack(parts))


@torch.no_grad()
def decompose(params, config, tokens) -> Decomposition:
    """The residual stream of tokens (B,T) after the last block as the sum of all that was written to it.

    The parts are the token embedding, the positions if they are added, each head, each layer's output bias, and each
    MLP with its bias. They take N B T C numbers: direct needs them at one position only.
    """
    check_tokens(tokens, config)
    tap, seen = record(config, part_sites(config))
    residual(params, config, tokens, tap=tap)
    return parts_of(params, config, seen)


@torch.no_grad()
def direct(params, config, tokens, target, foil=None, *, position=-1) -> Direct:
    """Direct logit attribution: tokens (B,T), target and foil ids, one for all or (B,) -> Direct.

    With a foil it is the difference target - foil. The final norm's divisor is what it was in this run; what a part
    changes by changing it, or by being read by later parts, is not counted. Raises ValueError for an id outside the
    vocabulary.
    """
    seen, normed = seen_at(params, config, tokens, part_sites(config), position)
    nodes, parts = parts_of(params, config, seen)
    wanted, bias = answer(params, config, target, foil, tokens)
    gradient = direction(params, config, normed["norm_f.scale"], wanted)
    constant = bias + (wanted @ params["norm_f"]["b"] if "b" in params["norm_f"] else 0)
    return Direct(nodes, (parts * gradient).sum(-1), constant, (normed["norm_f"] * wanted).sum(-1) + bias)


@torch.no_grad()
def neurons(params, config, tokens, target, foil=None, *, position=-1) -> Neurons:
    """The direct effect of every neuron, as direct: its activation times its output weights along the logit.

    The gradient is projected back through the weights first, so that (B,F,C) never exists.
    """
    sites = [f"blocks.{i}.mlp.post" for i in range(config.n_layer)]
    seen, normed = seen_at(params, config, tokens, sites, position)
    gradient = direction(params, config, normed["norm_f.scale"], answer(params, config, target, foil, tokens)[0])
    down = [block["mlp"]["down"] for block in params.get("blocks", [])]
    values = gradient.new_zeros(config.n_layer, len(gradient), config.d_ff)
    bias = gradient.new_zeros(config.n_layer, len(gradient))
    for i, (site, p) in enumerate(zip(sites, down, strict=True)):
        values[i] = seen[site] * (gradient @ p["w"])
        bias[i] = gradient @ p["b"] if "b" in p else 0
    return Neurons(values, bias)


def seen_at(params, config, tokens, sites, position):
    """({site: value (B,...)}, {site of the final norm: value (B,...)}) at one position a row."""
    read = reading(position, tokens)
    if not read.single:
        raise ValueError(f"position: expected one a row, got {read.at.shape[1]}")
    rows = torch.arange(len(tokens), device=tokens.device)
    tap, seen = record(config, sites, keep=lambda value: value[rows, read.at[:, 0]])
    x, _ = residual(params, config, tokens, tap=tap)
    tap, normed = record(config, ["norm_f.scale", "norm_f"])
    unembed(params, config, x[rows, read.at[:, 0]], tap=tap)
    return seen, normed


def answer(params, config, target, foil, tokens) -> tuple[Tensor, Tensor]:
    """The head's row of the target (B,C), minus the foil's if there is one, and the same for its bias (B,)."""
    p = head(params)
    ids = [
        torch.as_tensor(each, device=tokens.device).expand(len(tokens)) for each in (target, foil) if each is not None
    ]
    for name, each in zip(("target", "foil"), ids, strict=False):
        if not ((each >= 0) & (each < config.n_vocab)).all():
            raise ValueError(f"{name}: expected ids from 0 to {config.n_vocab - 1}, got {each.tolist()}")
    minus = lambda leaf: leaf[ids[0]] - leaf[ids[1]] if len(ids) > 1 else leaf[ids[0]]
    return minus(p["w"]), minus(p["b"]) if "b" in p else p["w"].new_zeros(len(tokens))


def direction(params, config, scale, wanted) -> Tensor:
    """The logit's gradient with respect to the stream, its norm's divisor (B,1) held: wanted (B,C) -> (B,C)."""
    gradient = params["norm_f"]["w"] * wanted / scale
    return gradient - gradient.mean(-1, keepdim=True) if config.norm == "layernorm" else gradient


# ---------------------------------------------------------------------------------------------------------- estimates


class Edges(NamedTuple):
    """Estimated effect (U,V,B) of every writer on the metric through every reader; 0 where one does not feed the
    other."""

    writers: list[Node]
    readers: list[Node]
    effect: Tensor


class Checked(NamedTuple):
    """The largest estimates beside the truth: cells, and the change of the metric as estimated and as measured by
    patching, each (n,B)."""

    cells: list[tuple[int, ...]]
    estimate: Tensor
    exact: Tensor


@torch.no_grad()
def gradient_effects(params, config, clean, corrupt, metric, sites, *, position=-1, steps=0) -> dict[str, Tensor]:
    """Estimated change of the metric for every cell of the sites, {site: (L,*AXES[site],B)}, and of "embed" (T,B).

    (a_clean - a_corrupt) times the metric's gradient, summed over a cell: the gradient at the corrupt run with steps 0
    (attribution patching, 2 forwards and 1 backward for all sites), else its mean over that many midpoints of the way
    from the corrupt to the clean embeddings (integrated gradients; steps + 4 forwards). At the embedding that
    converges to the exact effect; at later sites, whose values do not move along a line, an error stays whatever steps
    is. Prompts have equal lengths; sites are names of patching.AXES, and "embed".
    """
    names = {site: [site] if site == "embed" else layered(config, site) for site in sites}
    every = [name for several in names.values() for name in several]
    moved, slope = differences_and_slopes(params, config, clean, corrupt, metric, every, position, steps)
    effects = {}
    for site, several in names.items():
        wide = site != "attn.pattern"  # a last axis C or D to sum over
        each = [(moved[name] * slope[name]).sum(-1) if wide else moved[name] * slope[name] for name in several]
        parts = len(names_of(site))  # a block's two outputs are one cell
        each = [sum(each[i : i + parts]) for i in range(0, len(each), parts)]
        effects[site] = (each[0] if site == "embed" else torch.stack(each)).movedim(0 if site == "embed" else 1, -1)
    return effects


def summed(effect, site, by) -> Tensor:
    """An effect of gradient_effects (L,*AXES[site],B) with the axes that a sweep by `by` tells apart: (*by,B)."""
    axes = ["layer", *AXES[site]]
    for axis in [axis for axis in axes if axis not in by]:
        effect = effect.sum(axes.index(axis))
        axes.remove(axis)
    return effect.permute(*(axes.index(axis) for axis in by), -1)


@torch.no_grad()
def edge_effects(params, config, clean, corrupt, metric, *, position=-1, steps=0) -> Edges:
    """Estimated effect of every edge, as gradient_effects: what a writer changes, times what a reader's input is worth.

    A reader's gradient is taken at its own input and pulled back through its norm, so that the edges of a writer sum
    to the effect of the writer.
    """
    points = path_points(params, config, clean, corrupt, steps)
    worth = sum(weight * reader_gradients(params, config, corrupt, metric, position, edit) for weight, edit in points)
    sites = [site for site in part_sites(config) if site != "pos"]
    moved = {site: new - old for site, (new, old) in both(params, config, clean, corrupt, sites).items()}
    wrote = parts_without_biases(params, config, moved)  # (U,B,T,C)
    effect = torch.einsum("ubtc,vbtc->uvb", wrote, worth)
    u, v = writers(config), readers(config)
    open_ = torch.tensor([[feeds(config, a, b) for b in v] for a in u], device=effect.device)
    return Edges(u, v, effect * open_[..., None])


def check_largest(params, config, clean, corrupt, site, metric, effect, n=10, *, by, position=-1) -> Checked:
    """The n largest cells of an effect (*by,B), by size of the sum over pairs, with what patching them really does."""
    total = effect.sum(-1)
    order = total.abs().flatten().argsort(descending=True)[:n]
    cells = list(zip(*(axis.tolist() for axis in torch.unravel_index(order, total.shape)), strict=True))
    patched = patch_cells(params, config, clean, corrupt, site, metric, cells, by=by, position=position)
    base = measured(params, config, corrupt, metric, position)
    return Checked(cells, effect.flatten(0, -2)[order], patched - base)


@torch.no_grad()
def measured(params, config, tokens, metric, position=-1) -> Tensor:
    """The metric of a run, (B,)."""
    read = reading(position, tokens)
    x, _ = residual(params, config, tokens)
    return measure(params, config, at_positions(x, read.at), read, metric)


def layered(config, site) -> list[str]:
    """The full names of a site of AXES, layer by layer."""
    if not config.n_layer:
        raise ValueError(f"n_layer: expected a model with blocks for {site}, got 0")
    if site not in AXES or (site == "resid_mid" and config.block != "sequential"):
        raise ValueError(f"site: expected embed or one of {', '.join(AXES)} that the model has, got {site!r}")
    return [f"blocks.{i}.{name}" for i in range(config.n_layer) for name in names_of(site)]


def both(params, config, clean, corrupt, sites) -> dict:
    """{site: (its value in the clean run, in the corrupt run)}."""
    linked(config, clean, corrupt, None)
    new, old = (values_of(params, config, tokens, sites) for tokens in (clean, corrupt))
    return {site: (new[site], old[site]) for site in sites}


def values_of(params, config, tokens, sites) -> dict[str, Tensor]:
    """{site: its value} of one run."""
    tap, seen = record(config, sites)
    residual(params, config, tokens, tap=tap)
    return seen


def path_points(params, config, clean, corrupt, steps):
    """(weight, tap) for each point at which the gradient is taken: the corrupt run, or midpoints of the way."""
    if steps < 0:
        raise ValueError(f"steps: expected 0 (at the corrupt run) or more, got {steps}")
    if steps == 0:
        return [(1.0, None)]
    new, old = both(params, config, clean, corrupt, ["embed"])["embed"]
    go = lambda share: patch(config, {"embed": lambda value: value + share * (new - old)})
    return [(1 / steps, go((j + 0.5) / steps)) for j in range(steps)]


def slopes_at(params, config, tokens, metric, position, names, edit):
    """gradients of the metric's sum over rows, which do not know each other, with respect to the named values."""
    read = reading(position, tokens)

    def run(tap):
        x, _ = residual(params, config, tokens, tap=chain(edit, tap))
        return measure(params, config, at_positions(x, read.at), read, metric).sum()

    return gradients(run, names)


def differences_and_slopes(params, config, clean, corrupt, metric, names, position, steps):
    """({site: a_clean - a_corrupt}, {site: mean gradient})."""
    linked(config, clean, corrupt, None)
    slope = dict.fromkeys(names, 0.0)
    for weight, edit in path_points(params, config, clean, corrupt, steps):
        found, seen = slopes_at(params, config, corrupt, metric, position, names, edit)
        slope = {name: slope[name] + weight * found[name] for name in names}
    new = values_of(params, config, clean, names)
    old = values_of(params, config, corrupt, names) if steps else seen  # the one point was the corrupt run
    return {name: new[name] - old[name] for name in names}, slope


def reader_gradients(params, config, tokens, metric, position, edit) -> Tensor:
    """What a unit of each reader's input is worth, (V,B,T,C) in the order of readers, at one point."""
    last = f"blocks.{config.n_layer - 1}.resid_post" if config.n_layer else "embed"  # only the logits read it
    inner = [f"attn.{name}" for name in "qkv"] + ["mlp.pre"] + (["mlp.up"] if config.mlp == "swiglu" else [])
    stream = ["resid_pre"] + (["resid_mid"] if config.block == "sequential" else [])
    names = {f"blocks.{i}.{name}" for i in range(config.n_layer) for name in inner + stream} | {last}
    slope, seen = slopes_at(params, config, tokens, metric, position, names, edit)
    found = []
    for i, p in enumerate(params.get("blocks", [])):
        at = lambda name, i=i: slope[f"blocks.{i}.{name}"]
        weights = lambda name, p=p: p["attn"][name]["w"].unflatten(0, (-1, config.d_head))  # (H,D,C)
        heads = [torch.einsum("bthd,hdc->hbtc", at(f"attn.{name}"), weights(name)) for name in "qkv"]
        found.append(pull_back(config, p["norm_1"], seen[f"blocks.{i}.resid_pre"], torch.cat(heads)))
        own = at("mlp.pre") @ p["mlp"]["gate" if "gate" in p["mlp"] else "up"]["w"]
        own = own + at("mlp.up") @ p["mlp"]["up"]["w"] if "gate" in p["mlp"] else own
        x = seen[f"blocks.{i}.{stream[-1]}"]
        found.append(pull_back(config, p.get("norm_2", p["norm_1"]), x, own[None]))
    return torch.cat([*found, slope[last][None]])


def pull_back(config, p, x, gradient) -> Tensor:
    """Gradients (n,B,T,C) at the output of the norm p of x (B,T,C), as gradients at its input."""
    _, pull = torch.func.vjp(lambda x: ops.NORMS[config.norm](x, **p, eps=config.norm_eps), x)
    return torch.func.vmap(lambda g: pull(g)[0])(gradient)


def parts_without_biases(params, config, moved) -> Tensor:
    """The writers' share of a difference of two runs, (U,B,T,C): biases are the same in both and cancel."""
    nodes, parts = parts_of(params, config, moved)
    return parts[[i for i, node in enumerate(nodes) if not node.site.endswith("attn.o.b")]]
