"""The update: which weights decay, AdamW and Muon, the clipped gradient, and the rate at every step.

What you learn here: an optimizer is a few lines of state and arithmetic a leaf, a schedule is a function of the step
with nothing to save, and the state of a leaf goes by the leaf's name, as its weight does.
Next: train.py calls clip_, then step_ with the schedule's ratio.
"""

import math
from typing import NamedTuple

import torch

from gptcore import device, tree

KINDS = ("adamw", "muon")


class Options(NamedTuple):
    """What moves the weights. lr is AdamW's peak rate; with muon, the matrices inside the blocks go at muon_lr."""

    kind: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    muon_lr: float = 0.02


def groups(spec, kind="adamw") -> dict[str, list[str]]:
    """The leaves' names by how they are moved: "muon", "decay" and "no decay" (biases, norms); every leaf in one.

    spec is {name: leaf} with leaf.shape and leaf.decay. Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"optimizer: expected one of {', '.join(KINDS)}, got {kind!r}")
    found = {"muon": [], "decay": [], "no decay": []}
    for name, leaf in spec.items():
        hidden = kind == "muon" and name.startswith("blocks.") and len(leaf.shape) == 2 and leaf.decay
        found["muon" if hidden else "decay" if leaf.decay else "no decay"].append(name)
    return found


def adamw(named_params, spec, *, lr=3e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01) -> torch.optim.AdamW:
    """AdamW over {name: tensor}, decaying only what the spec says.  Loshchilov & Hutter 2017, arXiv:1711.05101."""
    found = groups({name: spec[name] for name in named_params})
    sets = [
        {"params": [named_params[name] for name in found[group]], "weight_decay": decay}
        for group, decay in (("decay", weight_decay), ("no decay", 0.0))
    ]
    return torch.optim.AdamW(sets, lr=lr, betas=betas, eps=eps, fused=True)  # on every device that device.pick knows


def orthogonalize(x, n_steps=5):
    """U S V^T -> about U V^T, for each matrix of x (N, rows, columns) of norm 1: singular values end near 1.

    Newton-Schulz: an odd polynomial of the matrix moves its singular values and nothing else; the coefficients favour
    speed over exactness.  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, n_steps).mT  # the smaller square of the two
    for _ in range(n_steps):
        square = x @ x.mT  # x <- a x + (b square + c square^2) x, each sum rounded once
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: every direction of a matrix moves equally far. For 2-D leaves; state momentum_buffer.

    The arithmetic of torch.optim.Muon, in bfloat16 only where the hardware multiplies it (elsewhere that takes seconds
    an update), and all matrices of one shape at once.
    """

    def __init__(self, params, *, lr=0.02, momentum=0.95, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Move every leaf that has a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for leaf in group["params"]:
                if leaf.grad is not None:
                    by_shape.setdefault(leaf.shape, []).append(leaf)
            for leaves in by_shape.values():
                self._move(leaves, group["lr"], group["momentum"], group["weight_decay"])

    def _move(self, leaves, lr, momentum, weight_decay):
        grads = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            if not self.state[leaf]:
                self.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)
        buffers = [self.state[leaf]["momentum_buffer"] for leaf in leaves]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        x = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov's look ahead
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # no singular value above 1
        narrow = x.dtype != torch.float64 and device.multiplies_bfloat16(x.device)
        x = x.bfloat16() if narrow else x
        updates = orthogonalize(x).to(leaves[0].dtype).unbind()
        rows, columns = leaves[0].shape
        torch._foreach_mul_(leaves, 1 - lr * weight_decay)
        torch._foreach_add_(leaves, updates, alpha=-lr * math.sqrt(max(1, rows / columns)))


class Optimizer:
    """The leaves by name, and what moves them: one torch optimizer, or two side by side. Made by make()."""

    def __init__(self, named_params, parts):
        self.named_params, self.parts = named_params, parts
        self.peaks = [group["lr"] for part in parts for group in part.param_groups]

    def step_(self, lr_ratio=1.0) -> None:
        """Move every leaf by its gradient, at lr_ratio times its group's peak rate."""
        groups = [group for part in self.parts for group in part.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = lr_ratio * peak
        for part in self.parts:
            part.step()

    def zero_grad_(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def make(params, spec, options) -> Optimizer:
    """The optimizer of a tree of params, its groups by param_spec. Raises ValueError where tree and spec differ.

    options has the fields of Options. The leaves are moved in place; gradients are read from leaf.grad.
    """
    named = dict(tree.walk(params))
    if named.keys() != spec.keys():
        missing, extra = sorted(spec.keys() - named.keys()), sorted(named.keys() - spec.keys())
        raise ValueError(f"weights: missing {missing}, not expected {extra}")
    matrices = groups(spec, options.kind)["muon"]
    rest = {name: leaf for name, leaf in named.items() if name not in matrices}
    decay = options.weight_decay
    parts = [adamw(rest, spec, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=decay)]
    if matrices:
        parts.append(Muon([named[name] for name in matrices], lr=options.muon_lr, weight_decay=decay))
    return Optimizer(named, parts)


def state(optimizer) -> dict[str, torch.Tensor]:
    """{"<leaf>/exp_avg": tensor, ...}: the live tensors, not copies; empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, leaf in optimizer.named_params.items()
        for part in optimizer.parts
        for key, value in part.state.get(leaf, {}).items()
    }


def load_state_(optimizer, flat) -> None:
    """Put copies of what state() gave in place of the optimizer's own: it goes on as if it had never stopped.

    Raises ValueError unless flat has exactly the entries of this optimizer, each with its shape, or none.
    """
    expected = {}
    for part in optimizer.parts:
        owned = {id(leaf) for group in part.param_groups for leaf in group["params"]}
        keys = ("momentum_buffer",) if isinstance(part, Muon) else ("step", "exp_avg", "exp_avg_sq")
        for name, leaf in optimizer.named_params.items():
            if id(leaf) in owned:
                expected |= {f"{name}/{key}": (part, leaf, key) for key in keys}
    if flat and flat.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - flat.keys()), sorted(flat.keys() - expected.keys())
        raise ValueError(f"optimizer state: missing {missing}, not expected {extra}")
    for name, value in flat.items():
        _, leaf, key = expected[name]
        shape = () if key == "step" else tuple(leaf.shape)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(value.shape)}")
    for part in optimizer.parts:
        part.state.clear()
    for name, value in flat.items():
        part, leaf, key = expected[name]
        part.state[leaf][key] = value.detach().to(leaf.device, copy=True)


@torch.no_grad()
def clip_(grads, max_norm=1.0, *, norm=None) -> torch.Tensor:
    """Scale the gradients so that their global norm is at most max_norm; returns the norm before, 0-dim and float32.

    norm is that of all gradients where these are a part of them. Nothing waits for the device. A norm that is not
    finite makes the gradients NaN.  arXiv:1211.5063.
    """
    if norm is None:
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, wide)))
    if norm.device.type != "cpu" or not norm <= max_norm:  # a factor of 1 need not be multiplied, where asking is free
        torch._foreach_mul_(grads, (max_norm / norm).clamp(max=1.0))
    return norm


def warmup_cosine(step, *, n_steps, warmup=0.05, floor=0.1):
    """The rate at a step as a share of its peak: a straight line up over the share warmup of all steps, then half a
    cosine that reaches floor at the last one.  arXiv:1608.03983."""
    n_warmup = int(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    t = min(1.0, (step - n_warmup) / max(1, n_steps - 1 - n_warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * t)) / 2


def wsd(step, *, n_steps, warmup=0.05, floor=0.1, decay=0.5):
    """Warm-up, stable, decay: up as above, then the peak, then over the share decay of all steps a straight line that
    reaches floor at the last one.  arXiv:2404.06395."""
    n_warmup = int(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    start = max(0, min((1 - decay) * n_steps, n_steps - 2))
    t = min(1.0, max(0.0, (step - start) / max(1, n_steps - 1 - start)))
    return 1 - (1 - floor) * t


SCHEDULES = {"cosine": warmup_cosine, "wsd": wsd}
