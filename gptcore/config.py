"""What a GPT is made of: how many, how wide, and one closed choice an axis.

What you learn here: the few numbers that fix a model's shape, and the few choices in which the well-known families
(GPT-2, Llama, Qwen, Phi, NeoX, MPT) differ. Nothing here computes; every choice is
looked up once, in ops.py or model.py.
Next: ops.py holds the equation behind every choice.
"""

import math
from dataclasses import dataclass, fields

CHOICES = {
    "position": ("learned", "sinusoidal", "rope", "alibi"),
    "rope_scaling": ("none", "linear", "llama3"),
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "gelu_tanh", "relu2", "swiglu"),
    "bias": ("all", "qkv", "none"),  # qkv: on the three input projections of attention only, as Qwen2 has it
    "block": ("sequential", "parallel", "parallel_shared_norm"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a model: n_ counts things, d_ is a width. Raises ValueError with expected and got.

    Widths given as 0 are derived: d_head = d_model / n_head, d_ff = 4 d_model, n_kv_head = n_head. The derived value is
    stored: dataclasses.replace(config, d_model=...) keeps the old d_head and d_ff, so say those too.
    """

    n_vocab: int  # ids the model can read and write
    n_vocab_padded: int = 0  # rows of the embedding: ids from n_vocab on are never a target and never drawn
    n_context: int = 256  # positions the cache holds
    n_layer: int = 4
    d_model: int = 128
    n_head: int = 4
    n_kv_head: int = 0  # below n_head: grouped keys and values (GQA, arXiv:2305.13245); 1: multi-query
    d_head: int = 0
    d_ff: int = 0
    position: str = "learned"
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0  # the share of d_head that turns; the rest passes
    rope_interleaved: bool = False  # pairs (2i, 2i+1) instead of (i, i + half)
    rope_scaling: str = "none"  # how a model was stretched beyond the context it was first trained on
    rope_factor: float = 1.0  # by how much
    rope_low: float = 1.0  # llama3: pairs that turn fewer times than this in rope_trained positions are stretched,
    rope_high: float = 4.0  # those that turn more often than this are not, and in between it is mixed
    rope_trained: int = 8192  # llama3: the context before
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    mlp: str = "gelu"
    block: str = "sequential"
    bias: str = "all"
    qk_norm: bool = False  # RMSNorm over d_head on queries and keys, before the rotation
    tied: bool = True  # the head is the embedding, transposed
    head_bias: bool = False
    scale_embedding: bool = False  # multiply the token embedding by sqrt(d_model)
    score_softcap: float = 0.0  # c: scores become c tanh(scores / c); 0: as they are (arXiv:2408.00118)
    logit_softcap: float = 0.0
    window: int = 0  # a query sees its last `window` keys, itself included; 0: all of them
    dropout: float = 0.0

    def __post_init__(self):
        for axis, choices in CHOICES.items():
            if getattr(self, axis) not in choices:
                raise ValueError(f"{axis}: expected one of {', '.join(choices)}, got {getattr(self, axis)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{field.name}: expected a whole number of at least 0, got {value!r}")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name}: expected True or False, got {value!r}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if field.type is float and not number:
                raise ValueError(f"{field.name}: expected a number, got {value!r}")
        for name in ("n_vocab", "n_context", "d_model", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.d_head and self.d_model % self.n_head:
            raise ValueError(f"d_model: expected a multiple of n_head={self.n_head}, got {self.d_model}")
        derived = {
            "n_vocab_padded": self.n_vocab,
            "n_kv_head": self.n_head,
            "d_head": self.d_model // self.n_head,
            "d_ff": 4 * self.d_model,
        }
        for name, value in derived.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else
        if self.n_vocab_padded < self.n_vocab:
            raise ValueError(f"n_vocab_padded: expected at least n_vocab={self.n_vocab}, got {self.n_vocab_padded}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head: expected a divisor of n_head={self.n_head}, got {self.n_kv_head}")
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction: expected a number in (0, 1], got {self.rope_fraction}")
        if self.position == "rope" and (self.d_rot < 2 or self.d_rot % 2):
            raise ValueError(f"rope_fraction x d_head: expected an even width of at least 2, got {self.d_rot}")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model: expected an even width for sinusoidal positions, got {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")
        for name in ("score_softcap", "logit_softcap", "norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        for name in ("rope_base", "rope_factor", "rope_trained"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not 0 < self.rope_low < self.rope_high:
            raise ValueError(f"rope_high: expected a number above rope_low={self.rope_low}, got {self.rope_high}")

    @property
    def d_rot(self) -> int:
        """How many of a head's d_head numbers turn with the position."""
        return int(self.rope_fraction * self.d_head)


LLAMA = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": "none"}

ARCHITECTURES = {
    "gpt2": {},
    "alibi": {"position": "alibi", "bias": "none"},
    "llama": LLAMA,
    "qwen3": LLAMA | {"qk_norm": True},
    "phi": {
        "position": "rope", "rope_fraction": 0.4, "mlp": "gelu_tanh", "block": "parallel_shared_norm",
        "tied": False, "head_bias": True,
    },
    "neox": {"position": "rope", "rope_fraction": 0.25, "block": "parallel", "tied": False},
    "seed": {"position": "alibi", "rope_interleaved": True, "scale_embedding": True, "dropout": 0.1},
}  # fmt: skip


def architecture(name, **sizes) -> ModelConfig:
    """The named architecture with the given sizes: architecture("llama", n_vocab=4096, n_kv_head=2)."""
    if name not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {name!r}")
    unknown = sizes.keys() - {field.name for field in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"sizes: expected fields of ModelConfig, got {', '.join(sorted(unknown))}")
    return ModelConfig(**ARCHITECTURES[name] | sizes)


def padded_vocab(n_vocab) -> int:
    """Rows for an embedding of n_vocab ids: a multiple of 128 from 4,096 ids on, so that matrix tiles come out even."""
    return -(-n_vocab // 128) * 128 if n_vocab >= 4096 else n_vocab
