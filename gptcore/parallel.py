"""Several processes that train one model: ddp, zero2 and zero3 by torch.distributed.

What you learn here: every process reads the same batch and passes its own sequences through the model. Sums of
gradients are then the only thing to exchange, and the three ways differ in what a process keeps between updates:

| way | weights | gradient sums | optimizer state |
|---|---|---|---|
| ddp | all | all | all |
| zero2 | its rows; all of them during an update | its rows | its rows |
| zero3 | its rows; a block's while the block runs | its rows | its rows |

A leaf is a DTensor: split by its first axis, or whole where Muon turns it as one matrix. Losses and gradients are sums
over the count of targets in the whole batch, never a mean of means, so the number of processes changes no more than the
order of additions.  Rajbhandari et al. 2019, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.

    torchrun --nproc-per-node 2 script.py

    team = gather_team("zero2")  # in the script, in every process
    params = team.place(init_params(config, generator(42)), config, options)
    state = init_state(params, config, options, team=team)
    for record in train(params, config, batches, state, options, team=team): ...
    whole = team.whole(params)  # plain tensors, to save or to evaluate: a collective call, like the rest
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptcore import optim, tree
from gptcore.lora import trained_spec

WAYS = ("ddp", "zero2", "zero3")


@dataclass(frozen=True, eq=False)
class Team:
    """The processes, and what this one holds. A process alone (ALONE) holds everything and exchanges nothing."""

    way: str = "alone"
    rank: int = 0
    size: int = 1
    mesh: Any = None  # torch.distributed's DeviceMesh of one axis

    @property
    def just_in_time(self) -> bool:
        """Does a block own its weights only while it runs?"""
        return self.way == "zero3"

    def place(self, params, config, options) -> dict:
        """The tree as this team trains it: every leaf that learns a DTensor of copies. params must be equal everywhere.

        options is a TrainOptions; its optimizer says which matrices must stay whole.
        """
        if self.size == 1:
            return params
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        spec = trained_spec(params, config)
        together = set(optim.groups(spec, options.optimizer.kind)["muon"])

        def placed(name, leaf):
            if name not in spec:
                return leaf
            how = Replicate() if self.way == "ddp" or name in together else Shard(0)
            return distribute_tensor(leaf.detach().clone(), self.mesh, [how], src_data_rank=None).requires_grad_()

        return tree.nest({name: placed(name, leaf) for name, leaf in tree.walk(params)})

    def local(self, leaf) -> Tensor:
        """What this process holds of a leaf: the same memory."""
        return leaf.detach().to_local() if is_placed(leaf) else leaf

    def whole(self, params) -> dict:
        """The tree as plain tensors, in every process; nothing of it learns."""
        return tree.map(lambda leaf: leaf.detach().full_tensor() if is_placed(leaf) else leaf, params)

    def for_update(self, params) -> dict:
        """The tree that an update's passes run on: whole leaves that gather gradients, for zero3 the placed ones."""
        if self.size == 1 or self.just_in_time:
            return params
        gathered = lambda leaf: leaf.detach().full_tensor().requires_grad_() if is_placed(leaf) else leaf
        return tree.map(gathered, params)

    def at_hand(self, params) -> dict:
        """A part of the tree with whole leaves, now; their gradients go back summed, each row to its owner."""
        if not self.just_in_time:
            return params
        from torch.distributed.tensor import Partial, Replicate

        def gathered(leaf):
            if not is_placed(leaf):
                return leaf
            return leaf.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("sum")])

        return tree.map(gathered, params)

    def sequences(self, n) -> range:
        """Which of an update's n sequences are this process's. Raises ValueError unless they can be shared equally."""
        if n % self.size:
            raise ValueError(f"batch: expected a multiple of {self.size} sequences, one share a process, got {n}")
        share = n // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, value) -> Tensor:
        """The sum over the processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def reduce_(self, params, updated, locals_) -> None:
        """Put the sum of all processes' gradients of `updated` (from for_update) beside what this one holds."""
        if self.size == 1:
            return
        from torch.distributed.tensor import DTensor, Partial

        sources = dict(tree.walk(updated))
        for name, leaf in tree.walk(params):
            if not is_placed(leaf) or (grad := sources[name].grad) is None:
                continue
            if not is_placed(grad):
                grad = grad.to_dense() if grad.is_sparse else grad
                grad = DTensor.from_local(grad, self.mesh, [Partial("sum")])
            locals_[name].grad = grad.redistribute(placements=leaf.placements).to_local()
            sources[name].grad = None

    def norm(self, params, locals_) -> Tensor | None:
        """The global norm of the gradients, of which each process has a part; None where one process has them all."""
        if self.size == 1:
            return None
        squares = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
        for name, leaf in tree.walk(params):
            if is_placed(leaf) and (grad := locals_[name].grad) is not None:
                part = leaf.placements[0].is_shard()
                wide = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
                squares[part] = squares[part].to(wide.device) + wide.double() ** 2
        return (squares[0].to(squares[1].device) + self.sum(squares[1])).sqrt().to(wide.dtype)

    def whole_state(self, params, optimizer) -> dict[str, Tensor]:
        """optim.state with whole leaves, in every process: what a checkpoint holds, for any number of processes."""
        leaves = dict(tree.walk(params))
        return {
            name: self._joined(leaves[name.rpartition("/")[0]], part) for name, part in optim.state(optimizer).items()
        }

    def load_state_(self, params, optimizer, flat) -> None:
        """optim.load_state_ of what whole_state gave, here or in a team of another size."""
        leaves = dict(tree.walk(params))
        optim.load_state_(optimizer, {n: self._part(leaves[n.rpartition("/")[0]], whole) for n, whole in flat.items()})

    def _joined(self, leaf, part):
        if not is_placed(leaf) or part.dim() == 0:
            return part
        from torch.distributed.tensor import DTensor

        shape = {"shape": leaf.shape, "stride": leaf.stride()}
        return DTensor.from_local(part, self.mesh, leaf.placements, **shape).full_tensor()

    def _part(self, leaf, whole):
        if not is_placed(leaf) or whole.dim() == 0:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole.to(leaf.device), self.mesh, leaf.placements, src_data_rank=None).to_local()

    def leave(self) -> None:
        """End the exchange; every process calls it. Without the barrier some abort while others still talk."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


ALONE = Team()


def is_placed(leaf) -> bool:
    """Is it a DTensor, of which this process may hold a part?"""
    return hasattr(leaf, "placements")


def gather_team(way, *, device="cpu", timeout=None) -> Team:
    """The team of this process, as torchrun's environment describes it: ALONE where there is none, or of one process.

    device: "cpu" (gloo) or "cuda" (NCCL, RCCL). Raises ValueError for an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"parallel: expected one of {', '.join(WAYS)}, got {way!r}")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    from torch.distributed.device_mesh import init_device_mesh

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
    return Team(way, dist.get_rank(), size, init_device_mesh(device, (size,)))


def bytes_a_process(spec, options, way, size) -> dict[str, int]:
    """What the largest share of a team of `size` holds between updates: {"weights", "gradients", "state"}, in bytes.

    spec as param_spec gives it, float32. gradients counts their sums as the optimizer reads them.
    """
    together = set(optim.groups(spec, options.optimizer.kind)["muon"])
    numbers = {"weights": 0, "gradients": 0, "state": 0}
    for name, leaf in spec.items():
        rows = leaf.shape[0] if way == "ddp" or name in together else math.ceil(leaf.shape[0] / size)
        held = rows * math.prod(leaf.shape[1:])
        numbers["weights"] += held
        numbers["gradients"] += held
        numbers["state"] += held * (1 if name in together else 2)
    return {name: 4 * number for name, number in numbers.items()}


def bytes_an_update(spec, options, way, size, n_passes=1) -> int:
    """What a process sends in an update, in bytes, if all-reduce and its halves run as rings: each whole leaf costs
    (size - 1) / size of itself for a gather, as much for a reduce-scatter, and both for an all-reduce."""
    together = set(optim.groups(spec, options.optimizer.kind)["muon"])
    halves = 0
    for name, leaf in spec.items():
        part = way != "ddp" and name not in together
        times = 2  # an all-reduce; or a gather and a reduce-scatter
        if part and way == "zero3":  # gathered in the forward pass, in a block's backward pass again, then reduced
            times = n_passes * (3 if name.startswith("blocks.") else 2)
        halves += times * math.prod(leaf.shape)
    return 4 * halves * (size - 1) // size
