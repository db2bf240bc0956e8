"""One table of models and shapes, shared by tests and benchmarks; the case is the test's id.

Every architecture by name, and beside them one variant an axis that no named architecture sets; below, the calls of
each kernel.
"""

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore import tree
from gptcore.config import ARCHITECTURES, architecture
from gptcore.model import init_params
from gptcore.ops import alibi_slopes, rotary_table

TINY = {"n_vocab": 61, "n_context": 40, "n_layer": 2, "d_model": 40, "n_head": 4}

VARIANTS = {
    "gqa": ("llama", {"n_kv_head": 2}),
    "mqa": ("gpt2", {"n_kv_head": 1}),
    "interleaved": ("llama", {"rope_interleaved": True, "rope_fraction": 0.6}),
    "linear_rope": ("qwen3", {"rope_scaling": "linear", "rope_factor": 3.0}),
    "llama3_rope": (
        "llama",
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_low": 0.5, "rope_high": 2.0, "rope_trained": 20},
    ),
    "sinusoidal": ("gpt2", {"position": "sinusoidal"}),
    "relu2": ("gpt2", {"mlp": "relu2", "bias": "qkv"}),
    "softcaps": ("gpt2", {"score_softcap": 5.0, "logit_softcap": 3.0}),
    "window": ("alibi", {"window": 7}),
    "window_rope": ("llama", {"window": 1}),
    "padded": ("phi", {"n_vocab_padded": 64}),
    "tied_bias": ("qwen3", {"head_bias": True, "tied": True}),
    "wide_heads": ("qwen3", {"d_head": 16, "d_ff": 24, "n_kv_head": 2}),
    "six_heads": ("alibi", {"n_head": 6, "d_model": 36}),
    "one_layer": ("neox", {"n_layer": 1}),
    "no_layer": ("gpt2", {"n_layer": 0}),
}

CONFIGS = {name: architecture(name, **TINY) for name in ARCHITECTURES} | {
    name: architecture(arch, **TINY | sizes) for name, (arch, sizes) in VARIANTS.items()
}

# How 40 tokens may arrive: at once, in uneven chunks, one by one.
CUTS = [(40,), (16, 23, 24, 25, 40), tuple(range(1, 41))]


def random_params(config, dtype=torch.float64, seed=0):
    """Weights far from their initial values, so that every bias, gain and head takes part."""
    generator = torch.Generator().manual_seed(seed)
    fresh = init_params(config, generator)
    noisy = lambda leaf: (leaf + 0.2 * torch.randn(leaf.shape, generator=generator)).to(dtype)
    return tree.map(noisy, fresh)


def random_tokens(config, rows=3, length=40, seed=1):
    """Token ids (rows, length) below n_vocab."""
    return torch.randint(config.n_vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


class Rows(TorchDispatchMode):
    """Counts the rows of token ids that are embedded, whoever asks for it."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.embedding.default:
            self.n += len(args[1])
        return function(*args, **(kwargs or {}))


def twins(config, first, length=9):
    """Three clean prompts (3, length), and the same with every second token from `first` on replaced."""
    clean = random_tokens(config, length=length)
    corrupt = clean.clone()
    corrupt[:, first::2] = (clean[:, first::2] + 7) % config.n_vocab
    return clean, corrupt


def recorder(names=None):
    """A tap that changes nothing and remembers what it saw, in order."""
    seen = {}

    def tap(name, value):
        if names is None or name in names:
            seen[name] = value
        return value

    return tap, seen


# --------------------------------------------------------------------------------------------------------- the kernels


class Attention(NamedTuple):
    """One call of kv_attention_: rows that hold `lengths` positions get T new tokens."""

    lengths: tuple
    n_head: int = 4
    n_kv_head: int = 4
    n_new: int = 1
    d_head: int = 16
    n_context: int = 40
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    scale: float | None = None
    d_rot: int = 0
    interleaved: bool = False

    def __str__(self):
        differs = [f"{f}={v}" for f, v in self._asdict().items() if v != self._field_defaults.get(f)]
        return " ".join(differs).replace("lengths=", "").replace("(", "").replace(")", "")


HEAD_SIZES = (1, 6, 8, 10, 16, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)

ATTENTION = [
    Attention(lengths=(0,)),
    Attention(lengths=(39, 0, 17)),
    Attention(lengths=(33, 0, 17), n_new=7),
    Attention(lengths=(0,), n_new=40),
    Attention(lengths=(37, 3), n_new=3, n_head=8, n_kv_head=1),
    Attention(lengths=(37, 3), n_new=2, n_head=6, n_kv_head=3, alibi=True),
    Attention(lengths=(30, 0, 5), n_new=7, window=1),
    Attention(lengths=(30, 0, 5), n_new=7, window=7, alibi=True),
    Attention(lengths=(30, 0), n_new=7, window=1000),
    Attention(lengths=(30, 0), n_new=7, softcap=5.0),
    Attention(lengths=(30, 0), n_new=2, softcap=0.1, alibi=True, n_head=6, n_kv_head=2, window=9),
    Attention(lengths=(30, 4), scale=0.7),
    Attention(lengths=(30, 0, 4), d_rot=16),
    Attention(lengths=(30, 0), n_new=7, d_rot=16, interleaved=True, n_head=6, n_kv_head=2),
    Attention(lengths=(30, 4), n_new=2, d_head=10, d_rot=6),
    Attention(lengths=(30, 4), n_new=2, d_head=40, d_rot=2, interleaved=True, window=5),
    Attention(lengths=(254, 512), n_new=70, n_context=600, d_head=64, d_rot=32, n_head=8, n_kv_head=1),
    Attention(lengths=(255,), n_context=600),
    Attention(lengths=(254, 512), n_new=5, n_context=600, d_head=64),
    Attention(lengths=(599, 0, 256, 300), n_context=600, n_head=8, n_kv_head=2, d_head=80),
    Attention(lengths=(520, 255), n_new=70, n_context=600, n_head=2, n_kv_head=1, window=270),
    Attention(lengths=(1000,), n_new=9, n_context=1100, n_head=8, n_kv_head=1, d_head=128, alibi=True),
    Attention(lengths=(0,), n_new=300, n_context=300, n_head=3, n_kv_head=3, d_head=24),
    *(Attention(lengths=(21, 3), n_new=2, d_head=d) for d in HEAD_SIZES),
]


def attention_inputs(case, dtype=torch.float32, cache_dtype=None, seed=2):
    """Positional and keyword arguments of kv_attention_ for a case; q, k, v have the strides that the model gives."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    rows, heads = len(case.lengths), (case.n_head, case.n_kv_head, case.n_kv_head)
    q, k, v = (normal(rows, case.n_new, n, case.d_head).transpose(1, 2) for n in heads)
    caches = [normal(rows, case.n_kv_head, case.n_context, case.d_head).to(cache_dtype or dtype) for _ in range(2)]
    rules = {"scale": case.scale, "window": case.window, "softcap": case.softcap}
    rules["alibi_slopes"] = alibi_slopes(case.n_head) if case.alibi else None
    lengths = torch.tensor(case.lengths)
    if case.d_rot:
        cos, sin = rotary_table(lengths[:, None] + torch.arange(case.n_new), case.d_rot, 10_000.0)
        rules |= {"cos": cos, "sin": sin, "interleaved": case.interleaved}
    return (q, k, v, *caches, lengths), {"n_keys": max(case.lengths) + case.n_new, **rules}


# Logits of every kind that a sampler meets, (rows, V): by name, so that a failing test says which.
def logits_of(kind, n_vocab, seed=0, rows=4):
    """Logits (rows, V) of one of LOGITS."""
    x = torch.randn(rows, n_vocab, generator=torch.Generator().manual_seed(seed))
    at = torch.arange(rows)
    if kind == "peaked":
        return x * 8
    if kind == "tied":
        return (x * 2).round()
    if kind == "equal":
        return torch.zeros_like(x)
    if kind == "one_hot":
        return torch.full_like(x, -torch.inf).index_put((at, at % n_vocab), torch.tensor(3.0))
    if kind == "masked":
        return x.masked_fill(x < 0.5, -torch.inf).index_put((at, -1 - at % n_vocab), torch.tensor(0.0))
    if kind == "denormal":
        return x * 1e-40
    if kind == "huge":
        return x * 1e30
    return x


LOGITS = ("plain", "peaked", "tied", "equal", "one_hot", "masked", "denormal", "huge")

SETTINGS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 1000, "temperature": 1.5},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999999, "temperature": 2.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.85, "temperature": 0.7},
    {"top_k": 200, "top_p": 0.98, "min_p": 0.001, "temperature": 1.5},
]
