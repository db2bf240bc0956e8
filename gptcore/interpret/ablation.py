"""Ablation: what is a part worth? Take it away, and see what is lost.

What you learn here: a score says what a head does, an ablation what it is worth to the answer; and what "away" means
is a choice. Zero is a value that the rest of the model has never seen; the mean over other texts keeps what is always
there; another text's value (resampling) keeps even its spread. Heads back each other up, so the loss of one may be
little although both do the work.
Axes: N groups of nodes, B rows, T tokens, H heads, D head width, C model width.
Wang et al. 2022, arXiv:2211.00593 (mean); Chan et al. 2022 (causal scrubbing: resampling, faithfulness).
Next: tracing.py destroys a word and restores single states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import stats
from gptcore.interpret.nodes import Node, heads, mlps
from gptcore.interpret.patching import BUDGET, at_positions, measure, places, reading
from gptcore.interpret.paths import chosen, groups_of
from gptcore.interpret.taps import record
from gptcore.model import check_tokens, residual

WAYS = ("zero", "mean", "resample")
MIN_ROWS = 5  # for an interval


class Ablation(NamedTuple):
    """The metric of the whole model, before (B,), and without each group, after (N,B)."""

    groups: list[tuple[Node, ...]]
    before: Tensor
    after: Tensor

    def difference(self, *, generator, draws=1000) -> stats.Interval:
        """The mean of after - before over rows, (N,), with a bootstrap over rows; bounds are nan below 5 of them."""
        moved = (self.after - self.before).T
        return stats.ratio_interval(moved, torch.ones_like(moved), generator=generator, draws=draws, least=MIN_ROWS)


class Faithfulness(NamedTuple):
    """The share of the metric that a set of nodes keeps up when all others are ablated, and what it is made of: the
    metric (B,) of the whole model, of the kept nodes alone, and of none."""

    share: float
    whole: Tensor
    kept: Tensor
    none: Tensor


@torch.no_grad()
def ablate(
    params, config, tokens, groups, metric, way="mean", *, position=-1, positions=None, reference=None, lengths=None,
    per_position=False, draws=5, generator=None,
) -> Ablation:  # fmt: skip
    """Run tokens (B,T) without each of the groups in turn: a Node (head or MLP), or several taken away together.

    way "zero" writes zeros; "mean" the mean over the reference tokens (n,T'), by default the same ones, over positions
    too unless per_position; lengths (n,) say where padded reference rows end. "resample" writes what another row has
    there, by a seeded derangement of the batch, and takes the mean metric of several draws from the generator.
    positions are those that are ablated, all by default. The metric reads the position as in patching.sweep.
    """
    check_tokens(tokens, config)
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    if way == "resample" and (len(tokens) < 2 or generator is None):
        raise ValueError(f"tokens: expected two rows or more to resample from, and a generator, got {len(tokens)} rows")
    groups, read = groups_of(config, groups, heads(config) + mlps(config)), reading(position, tokens)
    sites = list(dict.fromkeys(node.site for group in groups for node in group))
    where = torch.zeros(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    where[places(positions, tokens.shape[1])] = True
    tap, seen = record(config, sites)
    x, _ = residual(params, config, tokens, tap=tap)
    before = measure(params, config, at_positions(x, read.at), read, metric)
    if way == "mean":
        reference = tokens if reference is None else reference
        if per_position and reference.shape[1] != tokens.shape[1]:
            n, got = tokens.shape[1], reference.shape[1]
            raise ValueError(f"reference: expected {n} tokens a row for means per position, got {got}")
        seen = means(params, config, reference, sites, lengths, per_position)
    after = []
    for _ in range(draws if way == "resample" else 1):
        other = derangement(len(tokens), generator).to(tokens.device) if way == "resample" else None
        new = {
            site: torch.zeros_like(value) if way == "zero" else value if other is None else value[other]
            for site, value in seen.items()
        }
        after.append(without(params, config, tokens, groups, new, where, read, metric))
    return Ablation(groups, before, torch.stack(after).mean(0))


def faithfulness(params, config, tokens, keep, metric, way="mean", **ways) -> Faithfulness:
    """How much of the metric the nodes of keep hold up alone: (kept - none) / (whole - none), summed over rows.

    Everything outside keep is ablated, as ablate does with the same further arguments; of the whole model it is 1.
    """
    every = heads(config) + mlps(config)
    outside = [node for node in every if node not in groups_of(config, [tuple(keep)], every)[0]]
    whole, (kept, none) = (
        (found := ablate(params, config, tokens, [outside, every], metric, way, **ways)).before,
        found.after,
    )
    share = (kept - none).sum() / (whole - none).sum()
    return Faithfulness(share.item(), whole, kept, none)


def without(params, config, tokens, groups, new, where, read, metric) -> Tensor:
    """The metric (N,B) with the values `new` in place of each group's own, at the positions `where` (T,)."""
    size, found = max(1, BUDGET // (tokens.numel() * max(4 * config.d_ff, 8 * config.d_model))), []
    for start in range(0, len(groups), size):
        some = groups[start : start + size]

        def tap(name, value, some=some):
            if name not in new:
                return value
            rows = value.unflatten(0, (len(some), -1))
            away = chosen(config, some, name, value) & where.view(-1, *[1] * (value.dim() - 2))
            return torch.where(away, new[name], rows).flatten(0, 1)

        x, _ = residual(params, config, tokens.repeat(len(some), 1), tap=tap)
        x = at_positions(x.unflatten(0, (len(some), -1)), read.at.expand(len(some), -1, -1))
        found.append(measure(params, config, x, read, metric))
    return torch.cat(found) if found else params["embed"]["w"].new_zeros(0, len(tokens))


def means(params, config, tokens, sites, lengths, per_position) -> dict[str, Tensor]:
    """Mean values over the rows of tokens (n,T), padding not counted: {site: (1,1,...), or (1,T,...) per position}."""
    tap, seen = record(config, sites)
    residual(params, config, tokens, tap=tap)
    ends = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else torch.as_tensor(lengths)
    own = torch.arange(tokens.shape[1]) < ends[:, None]
    over = (0,) if per_position else (0, 1)

    def mean(value):
        counted = own.to(value).view(*own.shape, *[1] * (value.dim() - 2))
        return (value * counted).sum(over, keepdim=True) / counted.sum(over, keepdim=True)

    return {site: mean(value) for site, value in seen.items()}


def derangement(n, generator) -> Tensor:
    """A random order of n rows, (n,), in which none is its own: one cycle through all of them."""
    order = torch.randperm(n, generator=generator)
    return torch.empty_like(order).index_copy(0, order, order.roll(1))
