"""The native decoder: the weights laid out for it, and calls that never take long.

What you learn here: decoding reads every weight once a token, so its speed is the memory's, and all that matters is to
do nothing else. pack copies the weights in the order of their use into one block of memory, rounded if asked; a call
then makes many whole steps and returns within a twentieth of a second, so that a text streams and Ctrl-C is heard.
Axes: B rows, C model width, D head width, V vocabulary. Matrices are (out, in), as everywhere.
Next: generate.py decides who decodes.
"""

import contextlib
import importlib
import math
import mmap
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptcore import kernels, ops, tree
from gptcore.config import CHOICES
from gptcore.model import param_spec, rotary_table

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
HUGE = 2**21  # bytes of a huge page


class Packed(NamedTuple):
    """What decode_ takes: weights (w, b, scale of each leaf, empty where there is none), and a plan of numbers."""

    weights: list[Tensor]
    plan: list[int]
    constants: list[float]


def why_not(params, config) -> str:
    """Why the native decoder does not serve this model in its own dtype; an empty string if it does."""
    leaves = dict(tree.walk(params))
    reason = kernels.why_not("decode_", *leaves.values())
    if not reason and any(name.endswith(".lora_a") for name in leaves):
        return "LoRA that is not merged is not served"
    if not reason and params["embed"]["w"].dtype not in DTYPES:
        return f"{params['embed']['w'].dtype} is not served"
    if not reason and config.d_head > 256:
        return f"a head of {config.d_head} is not served"
    if not reason and config.n_vocab > 2**22:
        return f"a vocabulary of {config.n_vocab} is not served"
    return reason


@torch.no_grad()
def pack(params, config, dtype=None) -> Packed:
    """The weights for decode_ in float32, bfloat16, or int8 with a scale a row; dtype None: their own.

    Gains, biases, scales and tables stay float32, rows are padded with zeros to a multiple of 16, everything lies in
    one block of huge pages where the system has them. Raises ValueError for another dtype, or if nothing was built.
    """
    dtype = dtype or params["embed"]["w"].dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if reason := kernels.why_not("decode_"):
        raise ValueError(f"engine: expected native kernels, but {reason}")
    leaves = dict(tree.walk(params)) | _tables(config)
    matrices = {name for name, leaf in leaves.items() if leaf.dim() == 2 and name not in _TABLES}
    wanted = {name: (_padded(name, x), dtype if name in matrices else torch.float32) for name, x in leaves.items()}
    if dtype == torch.int8:
        wanted |= {f"{name[:-2]}.scale": ((len(leaves[name]),), torch.float32) for name in matrices}
    names = leaf_names(config)
    stores = _allocate({name: wanted[name] for name in names if name in wanted})
    for name, leaf in leaves.items():
        if stores[name].dtype == torch.int8:
            leaf, stores[f"{name[:-2]}.scale"][:] = quantize(leaf)
        stores[name][..., : leaf.shape[-1]] = leaf
    module = importlib.import_module("gptcore._C")
    numbers = _numbers(config)
    plan = [int(numbers[name]) for name in module.plan_fields()]
    constants = [float(numbers[name]) for name in module.constant_fields()]
    return Packed([stores.get(name, _NONE) for name in names], plan, constants)


@torch.no_grad()
def unpack(packed, config) -> dict:
    """The weights that the decoder computes with, float32, as a tree: what it says is what forward says of these."""
    stores = dict(zip(leaf_names(config), packed.weights, strict=True))

    def wide(name, shape):
        leaf = stores[name][..., : shape[-1]].float()
        return leaf * stores[f"{name[:-2]}.scale"][:, None] if stores[name].dtype == torch.int8 else leaf.clone()

    return tree.nest({name: wide(name, leaf.shape) for name, leaf in param_spec(config).items()})


def quantize(w) -> tuple[Tensor, Tensor]:
    """Rows of w (out, in) as whole numbers in -127..127, and what each row's are to be multiplied by, (out,)."""
    scale = w.float().abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    return (w.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def leaf_names(config) -> list[str]:
    """The decoder's weights in its order: embed.w, embed.b, embed.scale, ..., blocks.0.norm_1.w, ..."""
    module = importlib.import_module("gptcore._C")
    blocks = [f"blocks.{i}.{leaf}" for i in range(config.n_layer) for leaf in module.block_leaves()]
    return [f"{leaf}.{kind}" for leaf in (*module.model_leaves(), *blocks) for kind in ("w", "b", "scale")]


# -------------------------------------------------------------------------------------------------------------- steps


@dataclass
class Pace:
    """How many steps fit into a call of about `seconds`, by the speed of the last one: 1 at first, at most 256."""

    seconds: float = 0.05
    n_steps: int = 1

    def learn_(self, n_made, seconds) -> None:
        """A call made n_made steps in so many seconds."""
        self.n_steps = max(1, min(256, int(self.seconds * n_made / max(seconds, 1e-9))))


@torch.no_grad()
def decode_(packed, cache, tokens, *, seed, position, n_steps, sampling, stop=(), pace=None, n_threads=0):
    """Read each row's newest token (B,) and go on for up to n_steps, or fewer if the pace says so.

    seed, position (B,) as in sampling.sample; the cache must have room for a step. -> (a list of B tokens a step, -1
    after a row's end; the cache as much longer). Raises ValueError where the first step's logits are not numbers.
    """
    n_steps = min(n_steps, pace.n_steps) if pace else n_steps
    began = time.perf_counter()
    drawn, length = kernels.decode_(
        *packed, tokens, list(cache.k), list(cache.v), cache.length, seed=seed, position=position,
        stop=torch.tensor(stop, dtype=torch.long), steps=n_steps, n_threads=n_threads, **sampling._asdict(),
    )  # fmt: skip
    if pace:
        pace.learn_(n_steps, time.perf_counter() - began)
    n_made = (length - cache.length).tolist()
    failed = [(n - 1, row) for row, n in enumerate(n_made) if n and drawn[row, n - 1] < 0]
    made = max(n_made)
    if failed:
        made, row = min(failed)  # what came before is good; the next call begins with the bad step and says so
        if made == 0:
            raise ValueError(f"logits: expected a finite largest logit in row {row}, at position {position[row]}")
    lengths = torch.minimum(length, cache.length + made)
    return drawn[:, :made].T.tolist(), cache._replace(length=lengths, bound=cache.bound + made)


# ------------------------------------------------------------------------------------------------------------- layout

_NONE = torch.empty(0)
_TABLES = {"positions.w", "cos.w", "sin.w", "slopes.w"}


def _tables(config):
    """What depends on the position alone, float32: learned positions are a weight and not here."""
    every = torch.arange(config.n_context)[None]
    if config.position == "sinusoidal":
        return {"positions.w": ops.sinusoidal(every, config.d_model)[0]}
    if config.position == "rope":
        cos, sin = rotary_table(every, config)
        return {"cos.w": cos[0, :, 0], "sin.w": sin[0, :, 0]}
    return {"slopes.w": ops.alibi_slopes(config.n_head)} if config.position == "alibi" else {}


def _numbers(config):
    """Every number of the plan and the constants by its name; a choice is its place among CHOICES."""
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return fields | {
        "norm": CHOICES["norm"].index(config.norm),
        "mlp": CHOICES["mlp"].index(config.mlp),
        "block": CHOICES["block"].index(config.block),
        "d_rot": config.d_rot if config.position == "rope" else 0,
        "embed_scale": math.sqrt(config.d_model) if config.scale_embedding else 1.0,
    }


def _padded(name, leaf):
    """The leaf's shape with rows of a multiple of 16; biases of matrices, slopes and angles are read as they are."""
    reads_rows = name.endswith(".w") or "norm" in name
    padding = -leaf.shape[-1] % 16 if reads_rows and name not in ("cos.w", "sin.w", "slopes.w") else 0
    return (*leaf.shape[:-1], leaf.shape[-1] + padding)


def huge_pages(n_bytes) -> Tensor:
    """n_bytes zeros, (n_bytes,) uint8, from a border of huge pages on; the system gives them where it has them."""
    # Private: what is shared, as by default, counts as a file, and those get no huge pages.
    block = mmap.mmap(-1, n_bytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not every system has huge pages to give
        block.madvise(mmap.MADV_HUGEPAGE)
    arena = torch.frombuffer(block, dtype=torch.uint8)
    start = -arena.data_ptr() % HUGE
    return arena[start : start + n_bytes]


def _allocate(wanted):
    """Zeroed tensors {name: (shape, dtype)} -> {name: tensor} in one block, each on its own line of the cache."""
    sizes = {name: -(-math.prod(shape) * dtype.itemsize // 64) * 64 for name, (shape, dtype) in wanted.items()}
    arena, start, stores = huge_pages(sum(sizes.values())), 0, {}
    for name, (shape, dtype) in wanted.items():
        stores[name] = arena[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        start += sizes[name]
    return stores
