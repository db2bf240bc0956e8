"""A decode step that never leaves the GPU: captured once, replayed for every token.

What you learn here: a small model's token takes hundreds of kernels, and starting them costs more than running them. A
CUDA graph starts them all at once, but it remembers addresses, not values: whatever a step reads and writes must stay
where it is. step_ is such a step; it waits for nobody, and anything that can call a function can run it. Lengths grow
and tokens are drawn on the device, and the host looks only every few tokens.
Axes: B rows, T = 1 token of each, V vocabulary.
Next: generate.py decides who decodes. Not yet run on a GPU: the tests run step_ on a CPU.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gptcore import kernels
from gptcore.cache import KVCache
from gptcore.model import forward

N_AHEAD = 8  # steps between two looks of the host: what is drawn after a row's end is thrown away


@dataclass
class Steps:
    """Where a step reads and writes, each (B,) int64 beside the cache, and how it is run once more."""

    tokens: Tensor
    seed: Tensor
    position: Tensor
    cache: KVCache  # its buffers are the caller's, its lengths are not
    run: Callable[[], None] | None = None

    def serves(self, cache) -> bool:
        """Are these the buffers that it writes to?"""
        return len(cache.length) == len(self.tokens) and cache.k is self.cache.k


def why_not(params) -> str:
    """Why a graph does not decode this model; an empty string if it does."""
    w = params["embed"]["w"]
    if w.device.type != "cuda":
        return f"a graph needs a GPU, and the weights are on {w.device.type}"
    return kernels.why_not("sample", w)


def step_(params, config, steps, sampling) -> None:
    """Read each row's newest token, draw its next in its place; lengths and positions grow. Nothing waits for the host.

    A row whose logits are not numbers gets -1, and goes on as if it were token 0 until somebody looks.
    """
    logits, longer = forward(params, config, steps.tokens.clamp(min=0)[:, None], steps.cache)
    settings = {"seed": steps.seed, "position": steps.position, **sampling._asdict()}
    steps.tokens.copy_(kernels.sample_ahead(logits[:, 0], **settings))
    steps.position.add_(1)
    steps.cache.length.copy_(longer.length)


@torch.no_grad()
def prepare(params, config, cache, sampling) -> Steps:
    """Steps for the rows of a cache: on a GPU a graph, elsewhere (and, told, where none can be made) the function."""
    room = cache._replace(length=cache.length.clone(), bound=config.n_context - 1)  # one bound for every step
    zeros = lambda: torch.zeros_like(cache.length)
    steps = Steps(zeros(), zeros(), zeros(), room)
    plain = partial(step_, params, config, steps, sampling)
    steps.run = plain
    if cache.length.device.type == "cuda":
        with torch.cuda.device(cache.length.device):  # which need not be the current one
            steps.run = _captured(plain, steps)
    return steps


def _captured(run, steps):
    """The function as a graph's replay. Nothing that a step will read has changed afterwards."""
    changing = (steps.cache.length, steps.tokens, steps.position)
    before = [x.clone() for x in changing]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries allocate and choose the first time, which a graph cannot hold
            run()
            for now, was in zip(changing, before, strict=True):
                now.copy_(was)  # what was appended lies above the length, and is overwritten before it is seen
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        warnings.warn(f"no CUDA graph ({error}): decoding step by step", RuntimeWarning, stacklevel=2)
        return run
    return graph.replay


@torch.no_grad()
def decode_(steps, cache, tokens, *, seed, position, n_steps, stop=()):
    """Read each row's newest token (B,) and go on for up to n_steps, at most N_AHEAD; the cache must have room.

    seed, position (B,) as in sampling.sample. -> (a list of B tokens a step, -1 after a row's end; the cache as much
    longer). Raises ValueError where the first step's logits are not numbers.
    """
    places = (steps.tokens, steps.seed, steps.position, steps.cache.length)
    for place, new in zip(places, (tokens, seed, position, cache.length), strict=True):
        place.copy_(new)
    drawn = []
    for _ in range(min(n_steps, N_AHEAD)):
        steps.run()
        drawn.append(steps.tokens.clone())
    rows = torch.stack(drawn, dim=1).tolist()  # here the host waits
    ends = [next((i for i, token in enumerate(row, 1) if token in stop), len(row)) for row in rows]
    made = max(ends)
    failed = [(row.index(-1), b) for b, row in enumerate(rows) if -1 in row[: ends[b]]]
    if failed:
        made, b = min(failed)  # what came before is good; the next call begins with the bad step and says so
        if made == 0:
            raise ValueError(f"logits: expected a finite largest logit in row {b}, at position {position[b]}")
    new = torch.tensor([min(end, made) for end in ends], device=cache.length.device)
    steps_made = [[row[i] if i < end else -1 for row, end in zip(rows, ends, strict=True)] for i in range(made)]
    return steps_made, cache._replace(length=cache.length + new, bound=cache.bound + made)
