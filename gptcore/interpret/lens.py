"""The lenses: what would the model say if it stopped after this block?

What you learn here: every block adds to one stream, so the stream can be read out early through the final norm and the
head (nostalgebraist 2020, "interpreting GPT: the logit lens"). The norm's statistics are those of the stream that is
read, not of the last one. What early layers write in another basis a translator learns to read: the tuned lens
(Belrose et al. 2023, arXiv:2303.08112).
Axes: B rows, T tokens, C model width, V vocabulary, L blocks, R = L + 1 readings (embed, then after each block).
Next: attribution.py takes the last stream apart.
"""

import json
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gptcore import files, model, ops
from gptcore.interpret.taps import record

CHUNK_BYTES = 2**26  # of wide logits at once: (R,B,T,V) never exists


class Lens(NamedTuple):
    """Readings of the residual stream, each (R,B,T) unless it says otherwise; a row's name is the block it follows."""

    names: tuple[str, ...]  # (R,): embed, 0, 1, ...; with sites="all" also 0.mid, ...
    top: Tensor  # (R,B,T,k) ids, likeliest first
    top_p: Tensor  # (R,B,T,k) their probabilities
    target: Tensor  # (B,T) the ids that are asked for; -1: none
    p: Tensor  # the target's probability; nan without a target
    rank: Tensor  # how many logits are larger than the target's; -1 without one
    entropy: Tensor  # nats
    kl: Tensor  # nats: KL(p_final || p_here)
    settled: Tensor  # (B,T) the first row from which on the final top token stays on top


@torch.no_grad()
def logit_lens(params, config, tokens, target=None, *, temperature=1.0, sites="resid", k=5, tuned=None) -> Lens:
    """Read the stream of tokens (B,T) after every block, all rows and positions at once.

    target: an id or ids (B,T); default the next token of the text, which the last position has not. sites "all" reads
    between attention and MLP too. tuned: what fit_tuned_lens returns. One forward and a head for each reading. Raises
    ValueError for ids, a k or a temperature that cannot be.
    """
    model.check_tokens(tokens, config)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if not 1 <= k <= config.n_vocab:
        raise ValueError(f"k: expected 1 to {config.n_vocab}, got {k}")
    if tuned is not None and sites != "resid":
        raise ValueError(f"sites: expected resid with a tuned lens, which reads nothing else, got {sites!r}")
    target = targets_of(config, tokens, target)
    names, streams = streams_of(params, config, tokens, sites)
    rows, flat = [x.flatten(0, 1) for x in streams], target.flatten()
    parts = []
    for index in chunks(len(flat), config.n_vocab, tokens.device):
        final = log_probabilities(params, config, rows[-1][index], temperature)
        read = lambda x, final=final, index=index: reading(
            log_probabilities(params, config, x, temperature), final, flat[index], k
        )
        early = [read(translate(x[index], tuned, row)) for row, x in enumerate(rows[:-1])]
        parts.append([*early, reading(final, final, flat[index], k)])
    found = (torch.stack([torch.cat([part[row][i] for part in parts]) for row in range(len(names))]) for i in range(6))
    top, top_p, p, rank, entropy, kl = (each.unflatten(1, tokens.shape) for each in found)
    stays = (top[..., 0] == top[-1, ..., 0]).flip(0).cumprod(0).sum(0)  # rows at the end that agree with the last
    return Lens(names, top, top_p, target, p, rank, entropy, kl, len(names) - stays)


def targets_of(config, tokens, target=None) -> Tensor:
    """The ids that are asked for, (B,T): one id everywhere, those given, or the next tokens and -1 at the end."""
    if target is None:
        return tokens.roll(-1, 1).index_fill(1, torch.tensor([-1], device=tokens.device), -1)
    target = torch.as_tensor(target, device=tokens.device)
    if target.ndim and target.shape != tokens.shape:
        raise ValueError(f"target: expected an id or ids {tuple(tokens.shape)}, got {tuple(target.shape)}")
    if (target < -1).any() or (target >= config.n_vocab).any():
        raise ValueError(f"target: expected ids below {config.n_vocab}, got {target.max().item()}")
    return target.expand(tokens.shape)


def streams_of(params, config, tokens, sites="resid") -> tuple[tuple[str, ...], list[Tensor]]:
    """(names, residual streams (B,T,C)): the embedding's, then each block's; the last is what the head reads."""
    if sites not in ("resid", "all"):
        raise ValueError(f"sites: expected resid or all, got {sites!r}")
    x = model.embed(params, config, tokens)
    names, streams = ["embed"], [x]
    for layer in range(config.n_layer):
        tap = None
        if sites == "all" and config.block == "sequential":
            tap, seen = record(config, f"blocks.{layer}.resid_mid")
        x, _ = model.run_blocks(params, config, x, first=layer, last=layer + 1, tap=tap)
        if tap:
            names, streams = [*names, f"{layer}.mid"], [*streams, seen[f"blocks.{layer}.resid_mid"]]
        names, streams = [*names, str(layer)], [*streams, x]
    return tuple(names), streams


def chunks(n, n_vocab, device):
    """The numbers 0 .. n - 1 in parts whose wide logits stay within CHUNK_BYTES."""
    return torch.arange(n, device=device).split(max(1, CHUNK_BYTES // (4 * n_vocab)))


def log_probabilities(params, config, x, temperature=1.0) -> Tensor:
    """A stream (N,C) through the final norm, the head and the soft-cap: ln p (N,V), in at least float32."""
    return (ops.wide(model.unembed(params, config, x[None])[0]) / temperature).log_softmax(-1)


def reading(here, final, target, k):
    """(top ids, their p, target's p, its rank, entropy, KL) of ln p (N,V), beside the final ln p and targets (N,)."""
    p = here.exp()
    top_p, top = p.topk(k)
    index, known = target.clamp(min=0)[:, None], target >= 0
    wanted = here.gather(1, index)
    rank = (here > wanted).sum(1).where(known, -1)
    entropy = torch.special.entr(p).sum(1)
    kl = (final.exp() * (final - here)).sum(1)
    return top, top_p, wanted[:, 0].exp().where(known, torch.nan), rank, entropy, kl


# ------------------------------------------------------------------------------------------------------ the tuned lens


def translate(x, tuned, row) -> Tensor:
    """h + A h + b of a reading's stream (...,C); itself without a tuned lens."""
    return x if tuned is None else x + ops.linear(x, tuned["a"][row], tuned["b"][row])


def fit_tuned_lens(params, config, batches, *, steps=300, lr=3e-3) -> dict[str, Tensor]:
    """{"a": (L,C,C), "b": (L,C)}: translators that bring each reading but the last near the model's own prediction.

    batches(step) -> tokens (B,T). They start at zero, which is the logit lens, and minimise the mean
    KL(p_final || p_lens) at every layer by Adam; the model itself does not change.
    """
    if not config.n_layer:
        raise ValueError("n_layer: expected a model with blocks to translate, got 0")
    like = params["embed"]["w"].detach()
    fresh = lambda *shape: [like.new_zeros(shape, requires_grad=True) for _ in range(config.n_layer)]
    tuned = {"a": fresh(config.d_model, config.d_model), "b": fresh(config.d_model)}
    optimizer = torch.optim.Adam([*tuned["a"], *tuned["b"]], lr=lr)
    for step in range(steps):
        with torch.no_grad():
            _, streams = streams_of(params, config, batches(step))
        *early, last = (x.detach().flatten(0, 1) for x in streams)
        for index in chunks(len(last), config.n_vocab, last.device):  # one layer's logits at a time; gradients add up
            with torch.no_grad():
                final = log_probabilities(params, config, last[index])
            for row, x in enumerate(early):
                here = log_probabilities(params, config, translate(x[index], tuned, row))
                kl = (final.exp() * (final - here)).sum() / len(last)
                leaves = [tuned["a"][row], tuned["b"][row]]  # no gradient for the model, whoever wants one
                for leaf, grad in zip(leaves, torch.autograd.grad(kl, leaves), strict=True):
                    leaf.grad = grad if leaf.grad is None else leaf.grad + grad
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: torch.stack(leaves).detach() for name, leaves in tuned.items()}


def save_tuned_lens(path, tuned, sha256) -> None:
    """Write a tuned lens as safetensors that name the model whose file has this sha256."""
    leaves = {name: leaf.contiguous().cpu() for name, leaf in tuned.items()}
    files.write_whole(path, save(leaves, {"gptcore": json.dumps({"model": sha256})}))


def load_tuned_lens(path, config, sha256, *, device="cpu") -> dict[str, Tensor]:
    """Read a tuned lens. Raises ValueError where it was fitted to another model, or is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("gptcore", "{}"))
            tuned = {name: file.get_tensor(name).clone().to(device) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: expected a tuned lens, got {error}") from None
    if about.get("model") != sha256:
        got = str(about.get("model"))[:8]
        raise ValueError(f"{path}: expected a lens fitted to model {sha256[:8]}, got one fitted to {got}")
    wanted = {"a": (config.n_layer, config.d_model, config.d_model), "b": (config.n_layer, config.d_model)}
    shapes = {name: tuple(leaf.shape) for name, leaf in tuned.items()}
    if shapes != wanted:
        raise ValueError(f"{path}: expected translators {wanted}, got {shapes}")
    return tuned
