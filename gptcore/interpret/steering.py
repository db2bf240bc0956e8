"""Steering: add a direction to the residual stream and the model goes on in that sense.

What you learn here: the mean difference of the stream between two sets of texts is a direction that means what tells
them apart; added while the model writes, it moves what is written. A tap does it, so it works in every run, cached
generation included: an edit that depends on positions reads them from the site of that name.
Axes: B rows, T tokens, C model width.
Turner et al. 2023, arXiv:2308.10248; Rimsky et al. 2023, arXiv:2312.06681.
Next: report.py puts what was found on a page.
"""

import torch
from torch import Tensor

from gptcore.interpret.taps import record, sites
from gptcore.model import residual


@torch.no_grad()
def mean_difference(params, config, positive, negative, layer) -> Tensor:
    """The mean stream after a layer at the last token of the positive texts, minus that of the negative ones: (C,).

    Both are lists of token ids, of any lengths.
    """

    def mean(texts):
        if not texts or not all(len(ids) for ids in texts):
            raise ValueError(f"texts: expected at least one token in each of at least one text, got {texts}")
        lengths = torch.tensor([len(ids) for ids in texts])
        rows = [list(ids) + [0] * (int(lengths.max()) - len(ids)) for ids in texts]  # on the right: nobody looks there
        device = params["embed"]["w"].device
        last = (torch.arange(len(texts), device=device), (lengths - 1).to(device))
        tap, seen = record(config, site_of(config, layer), keep=lambda value: value[last])
        residual(params, config, torch.tensor(rows, device=device), tap=tap)
        return seen[site_of(config, layer)].mean(0)

    return mean(positive) - mean(negative)


def steer(config, vector, layer, scale=1.0, positions="all", *, n_prompt=None):
    """A tap that adds scale * vector (C,) to the residual stream after a layer.

    positions are "all", a slice of absolute positions, or "prompt" and "generated": those below, or from, n_prompt
    tokens on, one number or (B,) for the rows of every call; they count in the context that the model sees. Raises
    ValueError for a layer, a vector or positions that do not fit.
    """
    site = site_of(config, layer)
    if vector.shape != (config.d_model,):
        raise ValueError(f"vector: expected shape ({config.d_model},), got {tuple(vector.shape)}")
    if not isinstance(positions, slice) and positions not in ("all", "prompt", "generated"):
        raise ValueError(f"positions: expected all, prompt, generated or a slice, got {positions!r}")
    if positions in ("prompt", "generated") and n_prompt is None:
        raise ValueError(f"n_prompt: expected the number of the prompt's tokens for {positions}, got none")
    begin = None if n_prompt is None else torch.as_tensor(n_prompt).reshape(-1, 1)
    at = {}

    def tap(name, value):
        if name == "positions":
            at["positions"] = value
        if name != site:
            return value
        return value + wanted(at["positions"])[..., None] * (scale * vector.to(value))

    def wanted(p):
        if isinstance(positions, slice):
            start, stop, step = positions.indices(config.n_context)
            return (p >= start) & (p < stop) & ((p - start) % step == 0)
        if positions == "all":
            return torch.ones_like(p, dtype=torch.bool)
        if len(begin) not in (1, len(p)):
            raise ValueError(f"n_prompt: expected one for all or {len(p)} rows, got {len(begin)}")
        return p < begin.to(p) if positions == "prompt" else p >= begin.to(p)

    return tap


def site_of(config, layer) -> str:
    """The residual stream after a layer."""
    if not 0 <= layer < config.n_layer:
        raise ValueError(f"layer: expected 0 to {config.n_layer - 1}, got {layer}")
    return sites(config, f"blocks.{layer}.resid_post")[0]
