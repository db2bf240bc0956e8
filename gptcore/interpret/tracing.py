"""Causal tracing: make the model forget a word, then restore one state and see where the fact comes back.

What you learn here: there need not be a second prompt. Noise on the embeddings of the subject spoils the answer; a
single clean state, put back into the spoiled run, may bring it back, and where it does the fact passed through.
Axes: S samples of noise, L layers, T tokens, C model width.
Meng et al. 2022, arXiv:2202.05262.
Next: steering.py adds a direction instead of restoring one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import stats
from gptcore.interpret.pairs import prob
from gptcore.interpret.patching import (
    Swap,
    at_positions,
    axes_of,
    cells_of,
    measure,
    names_of,
    places,
    reading,
    remember,
    run_cells,
)
from gptcore.interpret.taps import patch
from gptcore.model import check_tokens


class Trace(NamedTuple):
    """The metric of the clean run, of the spoiled runs, low (S,), and with each cell restored, (*axes,S); effect is
    the mean of restored - low over samples, (*axes), with a bootstrap over them."""

    axes: tuple[str, ...]
    clean: float
    low: Tensor
    restored: Tensor
    effect: stats.Interval


@torch.no_grad()
def trace(
    params, config, tokens, subject, metric=None, *, generator, site="resid_pre", by=None, width=None, samples=10,
    level=3.0, position=-1, draws=1000,
) -> Trace:  # fmt: skip
    """Spoil the subject's positions of one prompt (1,T) by noise and restore cell by cell, batched as patching.sweep.

    The noise is N(0, (level s)^2) with s the deviation of those embeddings' entries. site is one of patching.AXES; by
    defaults to layer x position, which a pattern has not. width layers are restored together: by default 10 in 48 of
    attn.out and mlp.out, else one. The metric defaults to the probability of the clean run's answer.
    """
    check_tokens(tokens, config)
    by = axes_of(config, site, ("layer", "position") if by is None else by)
    subject = sorted(places(subject, tokens.shape[1]))
    if len(tokens) != 1 or not subject:
        raise ValueError(f"tokens: expected one prompt and a subject in it, got {len(tokens)} rows and {subject}")
    width = width or (max(1, round(10 * config.n_layer / 48)) if site in ("attn.out", "mlp.out") else 1)
    wanted = [f"blocks.{i}.{name}" for i in range(config.n_layer) for name in names_of(site)]
    clean = remember(params, config, tokens, ["embed", *wanted])
    words = clean.seen["embed"][:, subject]
    noise = torch.randn(samples, *words.shape[1:], generator=generator).to(words)
    spoiled = clean.seen["embed"].repeat(samples, 1, 1)
    spoiled[:, subject] += level * words.std() * noise
    rows, read = tokens.repeat(samples, 1), reading(position, tokens)
    if metric is None:
        answer = measure(params, config, at_positions(clean.x[-1], read.at), read, lambda logits: logits.argmax(-1))
        metric = prob(int(answer))
    base = remember(params, config, rows, tap=patch(config, {"embed": lambda value: spoiled}))
    read = reading(position, rows)
    value = lambda run: measure(params, config, at_positions(run.x[-1], read.at), read, metric)
    source = {name: clean.seen[name].expand(samples, *clean.seen[name].shape[1:]) for name in wanted}
    every = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    first = torch.full((samples,), subject[0], device=tokens.device)
    low, n_tokens = value(base), tokens.shape[1]
    whole = value(clean._replace(x=[x.expand(samples, -1, -1) for x in clean.x]))
    sizes, cells = cells_of(config, site, by, range(n_tokens), n_tokens)
    swap = Swap(base, source, every, first, read, low)
    restored, _ = run_cells(params, config, swap, site, cells, by, metric, range(n_tokens), width=width)
    restored = restored.reshape(*sizes, samples)
    gained = (restored - low).movedim(-1, 0)
    effect = stats.ratio_interval(gained, torch.ones_like(gained), generator=generator, draws=draws)
    return Trace(by, whole[0].item(), low, restored, effect)
