"""Path patching: what does one part tell another, when nobody in between may answer?

What you learn here: patching a head shows all that it does, through everyone who reads it. To see one edge, hold every
other head and MLP at its value in the corrupt run, let only the sender change, and note what the receiver now reads;
then run the corrupt prompt once more with that reading put in. The logits are a receiver like any other.
Axes: N senders, B pairs, T tokens, K positions read, H heads, D head width, C model width.
Goldowsky-Dill et al. 2023, arXiv:2304.05969; Wang et al. 2022, arXiv:2211.00593.
Next: attribution.py estimates all edges at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptcore.interpret.nodes import Node, check_nodes, readers, writers
from gptcore.interpret.patching import BUDGET, at_positions, linked, measure, reading
from gptcore.interpret.taps import chain, patch, record
from gptcore.model import residual

WAYS = ("frozen", "recompute")  # what heads and MLPs between sender and receiver do


class Paths(NamedTuple):
    """The metric with each sender's message delivered, patched (N,B), and of both runs, each (B,).

    received holds, by the site of each receiver, what it read, (N,B,T,...); empty for the logits.
    """

    senders: list[tuple[Node, ...]]
    receivers: list[Node]
    patched: Tensor
    clean: Tensor
    corrupt: Tensor
    received: dict[str, Tensor]


def groups_of(config, nodes, known) -> list[tuple[Node, ...]]:
    """Each entry, a node or several that act together, as a tuple of known nodes."""
    groups = [(entry,) if isinstance(entry, Node) else tuple(entry) for entry in nodes]
    check_nodes(config, [node for group in groups for node in group], known)
    return groups


def chosen(config, groups, site, value) -> Tensor:
    """Where a site belongs to each of N groups: bool, to be broadcast with (N,B,T,H,D) for attn.z, else (N,B,T,C)."""
    if site.endswith("attn.z"):
        mask = torch.tensor([[Node(site, h) in group for h in range(config.n_head)] for group in groups])
        return mask[:, None, None, :, None].to(value.device)
    return torch.tensor([Node(site) in group for group in groups], device=value.device)[:, None, None, None]


@torch.no_grad()
def path_patch(
    params, config, clean, corrupt, senders, receivers, metric, *, position=-1, norm="exact", heads="frozen",
    mlps="frozen",
) -> Paths:  # fmt: skip
    """Send each sender's clean value to the receivers alone, on the corrupt tokens (B,T) -> Paths.

    senders are nodes.writers, or tuples of them that speak together; receivers are nodes.readers that listen together,
    or the logits alone. norm "linear" keeps the divisors of the norms at their corrupt values, so that messages add up;
    "exact" recomputes them. mlps or heads "recompute" lets those in between answer; with both, and the logits
    receiving, this is activation patching. Two recordings, then two forwards a sender, one for the logits.
    """
    for name, value, known in (("norm", norm, ("exact", "linear")), ("heads", heads, WAYS), ("mlps", mlps, WAYS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    linked(config, clean, corrupt, None)
    groups = groups_of(config, senders, writers(config))
    check_nodes(config, receivers, readers(config))
    if Node("logits") in receivers and len(receivers) > 1:
        raise ValueError("receivers: expected the logits alone, got others beside them")
    read, values, runs = reading(position, corrupt), [], []
    names = ["embed", "*.scale"] + (["*.attn.z", "*.mlp.out"] if config.n_layer else [])
    for tokens in (clean, corrupt):
        tap, seen = record(config, names)
        x, _ = residual(params, config, tokens, tap=tap)
        values.append(measure(params, config, at_positions(x, read.at), read, metric, tap=tap))
        runs.append(seen)
    size = max(1, BUDGET // (corrupt.numel() * max(4 * config.d_ff, 8 * config.d_model)))
    held, patched, heard = Held(config, *runs, norm, heads, mlps), [values[1].new_zeros(0, len(corrupt))], {}
    for start in range(0, len(groups), size):
        value, received = send(params, config, corrupt, groups[start : start + size], receivers, metric, read, held)
        patched.append(value)
        for site, part in received.items():
            heard.setdefault(site, []).append(part)
    received = {site: torch.cat(parts) for site, parts in heard.items()}
    return Paths(groups, list(receivers), torch.cat(patched), *values, received)


class Held(NamedTuple):
    """What the first run may change: the values of both runs by site, and who is held."""

    config: object
    clean: dict
    corrupt: dict
    norm: str
    heads: str
    mlps: str

    def tap(self, groups):
        """The tap of the first run: senders speak, the rest is held."""

        def speak(name, value):
            kind = name.split(".", 2)[-1]
            if self.norm == "linear" and kind.endswith(".scale"):
                return self.corrupt[name].repeat(len(groups), 1, 1)
            if kind not in ("embed", "attn.z", "mlp.out"):
                return value
            free = kind == "embed" or (self.heads if kind == "attn.z" else self.mlps) == "recompute"
            rows = value.unflatten(0, (len(groups), -1))
            spoken = chosen(self.config, groups, name, value)
            held = rows if free else self.corrupt[name]
            return torch.where(spoken, self.clean[name], held).expand_as(rows).flatten(0, 1)

        return speak


def inputs_of(config, receiver) -> list[str]:
    """The sites by which a receiver reads: a head's q, k or v, or what enters the MLP's activation."""
    if receiver.head is not None:
        return [receiver.site]
    return [f"{receiver.site}.{name}" for name in (("pre", "up") if config.mlp == "swiglu" else ("pre",))]


def send(params, config, tokens, groups, receivers, metric, read, held):
    """(the metric (N,B), {site: what was received (N,B,T,...)}) for some senders."""
    rows, tap = tokens.repeat(len(groups), 1), held.tap(groups)
    cells = lambda x: at_positions(x.unflatten(0, (len(groups), -1)), read.at.expand(len(groups), -1, -1))
    if Node("logits") in receivers:
        x, _ = residual(params, config, rows, tap=tap)
        same = patch(config, {"norm_f.scale": held.corrupt["norm_f.scale"].expand_as})
        return measure(params, config, cells(x), read, metric, tap=same if held.norm == "linear" else None), {}
    sites = [site for receiver in receivers for site in inputs_of(config, receiver)]
    recorder, received = record(config, sites)
    residual(params, config, rows, tap=chain(tap, recorder))

    def listen(site):
        own = [receiver.head for receiver in receivers if receiver.site == site]  # none: a whole MLP

        def edit(value):
            if not own:
                return received[site]
            value = value.clone()
            value[:, :, own] = received[site][:, :, own]
            return value

        return edit

    x, _ = residual(params, config, rows, tap=patch(config, {site: listen(site) for site in sites}))
    shaped = {site: value.unflatten(0, (len(groups), -1)) for site, value in received.items()}
    return measure(params, config, cells(x), read, metric), shaped
