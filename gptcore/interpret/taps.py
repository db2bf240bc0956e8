"""Taps: functions (name, value) -> value that a forward calls at every site, to read a value or to change it.

What you learn here: looking inside needs no hooks. A tap is an ordinary argument of forward, so recording is a dict
that fills up, an intervention is a function of one value, and the gradient with respect to any activation is the
gradient with respect to zeros that were added there.
Axes: those of the site, as model.activation_spec names them.
Next: lens.py reads the residual stream, patching.py changes it.
"""

from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gptcore.model import activation_spec


def sites(config, names) -> list[str]:
    """The sites that the names or patterns ("blocks.*.attn.z") stand for, in the order of a forward.

    Raises ValueError for a name that no site of this architecture bears, with the nearest that do.
    """
    every, names = activation_spec(config), [names] if isinstance(names, str) else list(names)
    for name in names:
        if not any(fnmatchcase(site, name) for site in every):
            near = get_close_matches(name, every, n=3) or ["positions ... logits"]
            raise ValueError(f"site: expected a name of activation_spec such as {', '.join(near)}, got {name!r}")
    return [site for site in every if any(fnmatchcase(site, name) for name in names)]


def record(config, names, keep=Tensor.detach):
    """(tap, seen): a tap that changes nothing and a dict that it fills with keep(value) at each of the names.

    names are sites or patterns; keep=lambda t: t.detach().cpu() moves what is kept off the device, keep=lambda t: t
    keeps the graph. A site that is met again, as in the next step of a generation, replaces what was seen there.
    """
    wanted, seen = frozenset(sites(config, names)), {}

    def tap(name, value):
        if name in wanted:
            seen[name] = keep(value)
        return value

    return tap, seen


def patch(config, edits):
    """A tap that goes on with edits[name](value) at each name: {site or pattern: value -> value}.

    A function must not write into the value that it is given, which others still read (put makes a copy); that raises
    ValueError naming the site, and so does, in the model, an answer of another shape, dtype or device. Where several
    patterns name one site, their edits follow each other.
    """
    by_site = {}
    for pattern, edit in edits.items():
        for name in sites(config, pattern):
            by_site.setdefault(name, []).append(edit)

    def tap(name, value):
        for edit in by_site.get(name, ()):
            counted = not torch.compiler.is_compiling() and not value.is_inference()  # else nobody counts the writes
            before = value._version if counted else None
            new = edit(value)
            if counted and value._version != before:
                raise ValueError(f"tap at {name}: expected a new tensor (see put), got one written in place")
            value = new
        return value

    return tap


def chain(*taps):
    """One tap out of several, each given what the one before returned; None stands for no tap."""
    taps = [tap for tap in taps if tap is not None]

    def tap(name, value):
        for one in taps:
            value = one(name, value)
        return value

    return tap if taps else None


def put(value, index, new) -> Tensor:
    """A copy of value with value[index] = new."""
    copy = value.clone()
    copy[index] = new
    return copy


@torch.enable_grad()
def gradients(run, names) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({site: d run / d value}, {site: value}) at every one of the names, from one backward pass, also inside no_grad.

    run(tap) -> scalar makes the forward. The gradient is taken with respect to zeros added to each value: a value that
    was replaced by a leaf would cut the graph of the sites below. A site that does not reach the scalar has gradient 0.
    Raises ValueError for a name that run did not meet (sites turns patterns into names) and a result that is no scalar.
    """
    names, plants, seen = frozenset(names), {}, {}

    def tap(name, value):
        if name not in names:
            return value
        seen[name], plants[name] = value.detach(), torch.zeros_like(value, requires_grad=True)
        return value + plants[name]

    out = run(tap)
    if out.numel() != 1:
        raise ValueError(f"run: expected a scalar, got shape {tuple(out.shape)}")
    if missed := sorted(names - plants.keys()):
        raise ValueError(f"names: expected sites that the run meets, got {', '.join(missed)}")
    found = torch.autograd.grad(out, list(plants.values()), materialize_grads=True) if plants else ()
    return dict(zip(plants, found, strict=True)), seen
