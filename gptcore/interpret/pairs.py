"""A pair of prompts that differ, a number read from the logits, and the share of its difference that comes back.

What you learn here: a causal claim needs a contrast. One prompt gives the answer, its twin does not; a metric says how
much, and recovery says which share of the way from one to the other an intervention goes. Before that, two texts have
to be made comparable: which token continues them, and which position of one stands for which of the other.
Axes: B pairs, T tokens, K positions read, V vocabulary; ... are interventions, and come first.
Next: patching.py moves activations from one prompt of a pair to the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import stats

MIN_PAIRS = 5  # below that an interval over pairs means nothing
BANDS = ((0.7, "Critical"), (0.4, "Important"), (0.2, "Moderate"), (-torch.inf, "Minimal"))
DIRECTIONS = ("denoise", "noise")

# ----------------------------------------------------------------------------------------------------------- metrics
# A metric is any function from logits (...,B,V) to numbers (...,B): the pair's axis stays where it was.


def pick(logits, ids) -> Tensor:
    """The entry of each pair's id, one for all or (B,): (...,B,V) -> (...,B)."""
    ids = torch.as_tensor(ids, device=logits.device).expand(logits.shape[-2])
    return logits.gather(-1, ids.expand(logits.shape[:-1])[..., None])[..., 0]


def logit_diff(target, foil):
    """The metric logit[target] - logit[foil], which knows nothing of the other tokens."""
    return lambda logits: pick(logits, target) - pick(logits, foil)


def logit(target):
    """The metric logit[target]."""
    return lambda logits: pick(logits, target)


def prob(target):
    """The metric p(target)."""
    return lambda logits: pick(logits.softmax(-1), target)


def logprob(target):
    """The metric ln p(target)."""
    return lambda logits: pick(logits.log_softmax(-1), target)


def nll(target):
    """The metric -ln p(target)."""
    return lambda logits: -pick(logits.log_softmax(-1), target)


def kl(wanted):
    """The metric KL(p_wanted || p) in nats, for the logits (B,V) of a run such as the clean one."""
    log_p = wanted.log_softmax(-1)
    return lambda logits: (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def logprob_of(ids):
    """The metric ln p(all of ids (B,K)), teacher-forced: for logits (...,B,K,V) read where each of the ids is foretold.

    Tokens end with all but the last of the ids, and positions (B,K) are the last K: `position=torch.arange(-K, 0)`.
    """
    return lambda logits: logprob(ids.flatten())(logits.flatten(-3, -2)).unflatten(-1, ids.shape).sum(-1)


# ---------------------------------------------------------------------------------------------------------- recovery


def recovery(patched, clean, corrupt, direction="denoise") -> Tensor:
    """The share of the way that an intervention goes: patched (...,B), clean and corrupt (B,) -> (...,B).

    Denoising goes from corrupt to clean, noising from clean to corrupt. It is never clipped: below 0 and above 1 are
    real. It is nan where clean and corrupt hardly differ, or where patched is.
    """
    check_direction(direction)
    way = patched - corrupt if direction == "denoise" else clean - patched
    return (way / (clean - corrupt)).masked_fill(~differs(clean, corrupt), torch.nan)


def differs(clean, corrupt) -> Tensor:
    """Is there a difference to recover?  |m_clean - m_corrupt| >= 1e-3 (|m_clean| + |m_corrupt|) + 1e-6."""
    return (clean - corrupt).abs() >= 1e-3 * (clean.abs() + corrupt.abs()) + 1e-6


def pooled(patched, clean, corrupt, direction="denoise", *, generator, draws=1000) -> stats.Interval:
    """Recovery over all pairs: the ratio of sums over those that have one, patched (...,B) -> Interval of (...).

    The bounds are a bootstrap over pairs, and nan where fewer than 5 have one.
    """
    share = recovery(patched, clean, corrupt, direction)
    whole = (clean - corrupt).expand(share.shape).where(share.isfinite(), 0.0)
    pairs = lambda t: t.movedim(-1, 0).cpu().double()
    ways, wholes = pairs(share.nan_to_num(0.0) * whole), pairs(whole)
    return stats.ratio_interval(ways, wholes, generator=generator, draws=draws, least=MIN_PAIRS)


def band(value, low=None, high=None) -> str:
    """The name of a recovery: Critical above 0.7, Important above 0.4, Moderate above 0.2, else Minimal.

    An interval that crosses a bound has both names; what is undefined has none.
    """
    name = lambda x: next(word for bound, word in BANDS if x > bound)
    if value != value:
        return ""
    ends = [value if end is None or end != end else end for end in (low, high)]
    words = dict.fromkeys(name(end) for end in ends)
    return " to ".join(words)


def doubt(clean, corrupt, metric="logit-diff") -> str:
    """Why no verdict can be read into pairs with these metrics of their two runs, (B,) each; empty where one can.

    What comes back is the clean run's answer, so on average that run must prefer the target: to the foil, if the metric
    is logit-diff, and more than the corrupt run does (nll and kl fall where it does). Runs that hardly differ raise no
    doubt, since their recovery is not defined.
    """
    if not any(map(differs, clean, corrupt)):
        return ""
    more = corrupt.mean() - clean.mean() if metric in ("nll", "kl") else clean.mean() - corrupt.mean()
    if metric == "logit-diff" and clean.mean() <= 0:
        return "The clean run does not prefer the target: read no verdict into this."
    return (
        ""
        if more > 0
        else "The clean run prefers the target no more than the corrupted one: read no verdict into this."
    )


def check_direction(direction) -> None:
    """Raise ValueError unless it is one of the two."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")


# ------------------------------------------------------------------------------------------------------------- texts


class Target(NamedTuple):
    """The prompt as it is fed, the ids of what continues it, and a sentence for each thing that was decided."""

    prompt: str
    ids: list[int]
    notes: tuple[str, ...]


def continuation(tokenizer, prompt, target, *, exact=False) -> Target:
    """The ids by which target continues prompt, as the tokenizer cuts the text of both.

    Spaces at the end of the prompt belong to the target's first token and move there; where no white space separates
    the two, one space is put between them unless exact. A single prediction can only be about the first id. Raises
    ValueError where nothing continues the prompt, or the cut falls inside one of its tokens.
    """
    if not target.strip():
        raise ValueError(f"target: expected a text that continues the prompt, got {target!r}")
    bare = prompt.rstrip(" ")
    target, notes = prompt[len(bare) :] + target, []
    if bare and not exact and not target[0].isspace() and not bare[-1].isspace():
        target = " " + target
        notes.append(f"a space was put before the target: {target!r}")
    before, both = tokenizer.encode(bare), tokenizer.encode(bare + target)
    if both[: len(before)] != before or len(both) == len(before):
        cut = lambda ids: [tokenizer.decode([id]) for id in ids]
        raise ValueError(f"target: expected the prompt's tokens {cut(before)} to go on, got {cut(both)}")
    ids = both[len(before) :]
    if len(ids) > 1:
        pieces = ", ".join(repr(tokenizer.decode([id])) for id in ids)
        notes.append(f"the target is {len(ids)} tokens ({pieces}); the first is what is measured")
    return Target(bare, ids, tuple(notes))


def foil_of(logits, target) -> int:
    """The token that the corrupt run prefers to the target: the likeliest other one of its logits (V,)."""
    return int(logits.index_fill(-1, torch.tensor([target], device=logits.device), -torch.inf).argmax())


def align_ends(clean, corrupt) -> list[tuple[int, int]]:
    """Positions that stand for each other in two lists of ids: the common beginning, and from the end the common end.

    The last two always do, since they foretell the same thing; what lies between has no counterpart. Of equal lengths
    all positions are pairs.
    """
    if len(clean) == len(corrupt):
        return [(i, i) for i in range(len(clean))]
    short, same = min(len(clean), len(corrupt)), lambda i, j: clean[i] == corrupt[j]
    head = next((i for i in range(short) if not same(i, i)), short)
    tail = next((i for i in range(short - head) if not same(-1 - i, -1 - i)), short - head)
    head, tail = min(head, short - 1), max(1, tail)
    ends = [(len(clean) - i, len(corrupt) - i) for i in range(tail, 0, -1)]
    return [(i, i) for i in range(head) if i < ends[0][0] and i < ends[0][1]] + ends
