"""Training: an update, and a generator of updates.

What you learn here: an update is a few passes (forward, loss, backward), one clipping of the summed gradient, and one
step of the optimizer; everything else is bookkeeping that must not change it. The batch, the learning rate and the
dropout masks of an update are functions of its number, so there is nothing else to save and a resumed run goes on bit
for bit. The library yields records; whoever wants a picture draws them.
Axes: N sequences of an update, n_pass sequences in a pass, T tokens a sequence.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptcore import ops, optim, tree
from gptcore.data import prefetch
from gptcore.device import key, synchronize
from gptcore.lora import trained_spec
from gptcore.model import block, check_tokens, embed, forward, head_loss, normed, param_spec, run_blocks
from gptcore.parallel import ALONE

Record = dict[str, Any]
DEFAULT_OPTIMIZER = optim.Options()


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train. Raises ValueError with expected and got."""

    n_steps: int  # updates of the whole run: the schedule's length
    optimizer: optim.Options = DEFAULT_OPTIMIZER
    schedule: str = "cosine"
    warmup: float = 0.05  # the share of all updates on the way up to the peak rate
    floor: float = 0.1  # the last update's rate as a share of the peak
    n_pass: int = 0  # sequences a pass; 0: all of an update at once
    clip: float = 1.0  # largest global norm of an update's gradient
    dtype: str = "float32"  # what the passes compute in; weights, gradient sums and optimizer state stay float32
    attention: str = "fused"
    compiled: bool = False
    recompute: bool = False  # keep one activation a block, and compute the others again in the backward pass
    seed: int = 42  # of the dropout masks

    def __post_init__(self):
        for name, least in (("n_steps", 1), ("n_pass", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.schedule not in optim.SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(optim.SCHEDULES)}, got {self.schedule!r}")
        for name in ("warmup", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float64, got {self.dtype!r}")
        if self.attention not in ("fused", "explicit"):
            raise ValueError(f"attention: expected fused or explicit, got {self.attention!r}")
        if not self.clip > 0:
            raise ValueError(f"clip: expected a number above 0, got {self.clip}")


@dataclass
class TrainState:
    """What moves while the weights do: the optimizer and the number of finished updates."""

    optimizer: Any
    step: int = 0


class NotFinite(ArithmeticError):
    """A loss or gradient that is no number: the message names the update and the first bad weight or site."""


def init_state(params, config, options, *, team=ALONE) -> TrainState:
    """A fresh optimizer over the leaves of params that learn (lora.trained_spec), which now want gradients.

    In a team (gptcore.parallel) over what this process holds of them.
    """
    spec = trained_spec(params, config)
    learning = {name: team.local(leaf.requires_grad_()) for name, leaf in tree.walk(params) if name in spec}
    return TrainState(optim.make(learning, spec, options.optimizer))


def copy_of(params, config) -> dict:
    """The tree with copies of the leaves that learn: training it changes nothing. What is frozen is shared."""
    spec = trained_spec(params, config)
    copy = {name: leaf.detach().clone() if name in spec else leaf for name, leaf in tree.walk(params)}
    return tree.nest(copy)


def rate(step, options) -> float:
    """The learning rate of an update as a share of the peak."""
    return optim.SCHEDULES[options.schedule](step, n_steps=options.n_steps, warmup=options.warmup, floor=options.floor)


def train(params, config, batches, state, options, *, stop=lambda: False, team=ALONE) -> Iterator[Record]:
    """Updates state.step .. n_steps - 1. Weights and state are whole whenever a record is yielded, so that is when to
    validate, to sample and to save.

    batches(step) -> (tokens, targets), each (N,T), is called ahead in a thread. stop() is read after each update. A
    record has kind "train", step, tokens, loss, lr, grad_norm, clipped, seconds and tokens_per_second; one of kind
    "note" has a text. In a team every process reads the same batches and yields the same records, and stop() must
    answer alike. Raises what train_step_ raises, and MemoryError where not even one sequence a pass fits.
    """
    with closing(prefetch(batches, state.step, options.n_steps)) as coming:
        for batch in coming:
            while True:
                try:
                    record = train_step_(params, config, batch, state, options, team=team)
                    break
                except torch.OutOfMemoryError:
                    if team.size > 1:  # the others wait in the middle of this update
                        raise
                    options = smaller_pass(options, len(batch[0]))
                    state.optimizer.zero_grad_()
                    torch.cuda.empty_cache()
                    yield {"kind": "note", "text": f"out of memory: passes of {options.n_pass} sequences from here on"}
            yield record
            if stop():
                return


def train_step_(params, config, batch, state, options, *, team=ALONE) -> Record:
    """One update on batch = (tokens, targets), each (N,T): its loss is the mean over all targets but those of -100.

    Raises NotFinite when the loss or the gradient is not finite, and leaves weights and state as they were; also when
    the first update of all makes weights that are not.
    """
    device = params["embed"]["w"].device
    began = time.perf_counter()
    with deterministic(device.type):
        at_hand, held = team.for_update(params), state.optimizer.named_params
        nats = gradients_(at_hand, config, batch, state.step, options, team=team)
        team.reduce_(params, at_hand, held)
        norm = optim.clip_([leaf.grad for leaf in held.values()], options.clip, norm=team.norm(params, held))
        nats, norm = torch.stack([nats.float(), norm.float()]).tolist()  # the one wait for the device
        if not math.isfinite(nats) or not math.isfinite(norm):
            state.optimizer.zero_grad_()
            where = first_bad(team.whole(params), config, batch, state.step, options)
            raise NotFinite(f"update {state.step}: loss {nats}, gradient norm {norm}; first bad value: {where}")
        ratio = rate(state.step, options)
        state.optimizer.step_(ratio)
        state.optimizer.zero_grad_()
    if state.step == 0 and (bad := first_bad_weight(team.whole(params))):
        raise NotFinite(f"update 0: the weights after it are not finite, first {bad}")
    synchronize(device)
    seconds, n_tokens = time.perf_counter() - began, batch[0].numel()
    state.step += 1
    return {
        "kind": "train", "step": state.step, "tokens": state.step * n_tokens, "loss": nats,
        "lr": options.optimizer.lr * ratio, "grad_norm": norm, "clipped": norm > options.clip,
        "seconds": seconds, "tokens_per_second": n_tokens / seconds,
    }  # fmt: skip


def gradients_(params, config, batch, step, options, *, team=ALONE) -> Tensor:
    """Add the gradient of the update's mean loss to the leaves, pass by pass; returns that mean in nats, ().

    In a team the gradient is that of this process's sequences, the mean that of all.
    """
    device = params["embed"]["w"].device
    tokens, targets = (part.to(device, non_blocking=True) for part in batch)
    run = loss_function(config, options.dtype, options.attention, options.compiled, options.recompute, team)
    mine = team.sequences(len(tokens))
    n_pass = options.n_pass or len(mine)
    nats = torch.zeros((), device=device, dtype=torch.promote_types(torch.float32, getattr(torch, options.dtype)))
    counted = (targets != -100).sum().clamp(min=1).to(nats.dtype)
    for first in mine[::n_pass]:
        part = slice(first, min(first + n_pass, mine.stop))
        seed = dropout_seeds(options.seed, step, first, len(tokens[part]), device) if config.dropout else None
        share = (targets[part] != -100).sum() / counted
        mean = run(params, tokens[part], targets[part], seed) * share
        mean.backward()
        nats += mean.detach()
    return team.sum(nats)


def dropout_seeds(seed, step, first, n, device) -> Tensor:
    """A seed for each of n sequences from `first` on, (n,): how an update is cut into passes changes no mask."""
    return ops.fold(
        torch.tensor(key(seed, "dropout", step) >> 2, device=device), torch.arange(first, first + n, device=device)
    )


@lru_cache(maxsize=8)
def loss_function(config, dtype, attention, compiled, recompute=False, team=ALONE) -> Callable:
    """(params, tokens, targets, seed) -> mean loss, computed in dtype; a block is one compiled graph if asked.

    One block's graph serves them all: a graph of the whole body is perhaps a twentieth faster, and takes a multiple of
    the time to compile. Weights are cast at the top instead of by autocast: faster in eager, and nothing hidden. What
    is as large as the vocabulary stays outside: the head's chunked loss, and the rows of the embedding, whose gradient
    is a few rows to add to the head's where they are one matrix.
    """
    kind = getattr(torch, dtype)
    cast = partial(tree.map, lambda leaf: leaf.to(kind))
    way = recomputed if recompute else block
    one = lambda x, p, positions, seed: way(x, cast(p), config, positions, dropout=seed, attention=attention)
    one = torch.compile(one, fullgraph=True, dynamic=False) if compiled else one

    def in_turn(x, p, positions, seed):  # the backward pass gathers the weights again, and runs the block again
        return checkpoint(lambda x: one(x, team.at_hand(p), positions, seed), x, use_reentrant=False)

    runner = in_turn if team.just_in_time else one

    def run(params, tokens, targets, seed):
        check_tokens(tokens, config)
        few = config.tied and tokens.device.type == "cpu" and not team.just_in_time
        params = params | {name: team.at_hand(part) for name, part in params.items() if name != "blocks"}
        x = embed(params, config, tokens, lookup=partial(F.embedding, sparse=few)).to(kind)
        each = lambda x, p, config, positions, kv=None, *, dropout, **_: runner(x, p, positions, dropout)
        x, _ = run_blocks(params, config, x, dropout=seed, block=each)
        return head_loss(params, config, normed(x, cast(params["norm_f"]), config, "norm_f", None), targets)

    return run


def recomputed(x, p, config, positions, kv=None, **ways) -> Tensor:
    """A block that keeps only x for the backward pass, and runs again there: equal gradients for less memory.

    Dropout's masks come back by themselves: they are a function of the seed.  Chen et al. 2016, arXiv:1604.06174.
    """
    run = lambda x: block(x, p, config, positions, kv, **ways)
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def deterministic(device_type):
    """Repeatable kernels inside, the caller's setting afterwards.

    A compiled embedding's backward adds with atomics on two threads: without this, equal runs differ.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device_type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def smaller_pass(options, n_sequences) -> TrainOptions:
    """The options with passes of half the sequences; MemoryError where a pass is one sequence already."""
    n_pass = options.n_pass or n_sequences
    if n_pass == 1:
        raise MemoryError("out of memory with one sequence a pass: use a smaller model, or a shorter --n-context")
    return replace(options, n_pass=n_pass // 2)


# ----------------------------------------------------------------------------------------------- what is not a number


def first_bad_weight(params):
    """The dotted name of the first weight with a NaN or infinity, or None."""
    return next((name for name, leaf in tree.walk(params) if not leaf.detach().isfinite().all()), None)


def first_bad(params, config, batch, step, options) -> str:
    """Replay an update's passes with a tap: the first weight or site that is not finite, else its gradient."""
    if bad := first_bad_weight(params):
        return bad
    for site, stats in look(params, config, batch, step, options):
        if stats["n_nan"] or stats["n_inf"]:
            return site
    return "the gradient"


@torch.no_grad()
def look(params, config, batch, step, options) -> list[tuple[str, Record]]:
    """Every site of every pass of an update with its min, max, mean, and counts of NaN and infinity, in order.

    Scores are -inf where a key is invisible, by design: there only +inf counts.
    """
    cast = tree.map(lambda leaf: leaf.to(getattr(torch, options.dtype)), params)
    device, seen = params["embed"]["w"].device, []

    def tap(name, value):
        if value.is_floating_point():
            finite = value[value.isfinite()].double()
            infinite = value.isposinf() if name.endswith(".scores") else value.isinf()
            stats = {
                name: getattr(finite, name)().item() if len(finite) else math.nan for name in ("min", "max", "mean")
            }
            seen.append((name, stats | {"n_nan": int(value.isnan().sum()), "n_inf": int(infinite.sum())}))
        return value

    n_pass = options.n_pass or len(batch[0])
    for first in range(0, len(batch[0]), n_pass):
        tokens = batch[0][first : first + n_pass].to(device)
        seed = dropout_seeds(options.seed, step, first, len(tokens), device) if config.dropout else None
        forward(cast, config, tokens, tap=tap, dropout=seed)
    return seen


# ------------------------------------------------------------------------------------------------- how long it takes


def flops_per_token(config, n_tokens) -> int:
    """Floating-point operations that training needs a token in sequences of n_tokens: 6 a weight of a matrix product
    (2 forward, 4 backward), and attention's two products over half the positions. Recomputation would not count."""
    embedded = config.n_vocab_padded * config.d_model * (0 if config.tied else 1)
    positions = config.n_context * config.d_model if config.position == "learned" else 0
    matrices = sum(math.prod(leaf.shape) for leaf in param_spec(config).values() if len(leaf.shape) == 2)
    attention = 6 * config.n_layer * n_tokens * config.n_head * config.d_head
    return 6 * (matrices - embedded - positions) + attention


@dataclass(frozen=True)
class Timing:
    """What a calibration measured: seconds a pass of n_pass sequences, and seconds for clipping and the optimizer."""

    options: TrainOptions
    pass_seconds: float
    step_seconds: float

    def update_seconds(self, n_sequences) -> float:
        """Seconds an update of so many sequences takes."""
        return self.pass_seconds * n_sequences / self.options.n_pass + self.step_seconds


def measure(params, config, batch, options, *, seconds=6.0) -> Timing:
    """Time passes of options.n_pass sequences, and the optimizer, on a copy of the weights: nothing is changed.

    Warms up (and compiles) first, then takes medians of up to 10 passes within so many seconds, at least 3.
    """
    copy = copy_of(params, config)
    state, device = init_state(copy, config, options), params["embed"]["w"].device
    part = tuple(t[: options.n_pass] for t in batch)

    def timed(f):
        synchronize(device)
        began = time.perf_counter()
        f()
        synchronize(device)
        return time.perf_counter() - began

    def pass_():
        with deterministic(device.type):
            gradients_(copy, config, part, 0, options)

    def move_():
        with deterministic(device.type):
            optim.clip_([leaf.grad for leaf in state.optimizer.named_params.values()], options.clip)
            state.optimizer.step_(1e-3)

    passes = []
    pass_(), pass_()
    warm = time.perf_counter()
    while len(passes) < 3 or (len(passes) < 10 and time.perf_counter() - warm < seconds):
        passes.append(timed(pass_))
    timed(move_)
    moves = [timed(move_) for _ in range(3)]
    return Timing(options, median(passes), median(moves))
