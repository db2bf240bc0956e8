"""One table of models and shapes, shared by tests and benchmarks; the case is the test's id.

Every architecture by name, and beside them one variant an axis that no named architecture sets.
"""

import torch

from gptcore import tree
from gptcore.config import ARCHITECTURES, architecture
from gptcore.model import init_params

TINY = {"n_vocab": 61, "n_context": 40, "n_layer": 2, "d_model": 40, "n_head": 4}

VARIANTS = {
    "gqa": ("llama", {"n_kv_head": 2}),
    "mqa": ("gpt2", {"n_kv_head": 1}),
    "interleaved": ("llama", {"rope_interleaved": True, "rope_fraction": 0.6}),
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


def recorder(names=None):
    """A tap that changes nothing and remembers what it saw, in order."""
    seen = {}

    def tap(name, value):
        if names is None or name in names:
            seen[name] = value
        return value

    return tap, seen
