"""Checkpoints of the earlier project (attention-to-detail): model_epoch_N_DATASET.pt, with what its optimizer knew.

What you learn here: a .pt file is a pickle, a program that a loader runs; weights_only=True reads tensors and plain
values from it and refuses everything else. What such a file does not say is in its tensors: whether the head is the
embedding, and how positions were encoded.
"""

import re
import warnings
from pathlib import Path

import torch

from gptcore import tokenizer as tokenizers
from gptcore.checkpoint import Later
from gptcore.config import architecture
from gptcore.model import param_spec
from gptcore.pretrained.settings import MAX_CONTEXT, Settings
from gptcore.pretrained.table import SAME, pairs, shape_of

TABLE = (
    ("embed", "token_embedding.embedding", SAME),
    ("positions", "pos_encoding.pos_embedding", SAME),
    ("blocks.*.norm_1", "blocks.*.norm1", SAME),
    ("blocks.*.attn.q", "blocks.*.attention.W_q", SAME),
    ("blocks.*.attn.k", "blocks.*.attention.W_k", SAME),
    ("blocks.*.attn.v", "blocks.*.attention.W_v", SAME),
    ("blocks.*.attn.o", "blocks.*.attention.W_o", SAME),
    ("blocks.*.norm_2", "blocks.*.norm2", SAME),
    ("blocks.*.mlp.up", "blocks.*.ffn.linear1", SAME),
    ("blocks.*.mlp.down", "blocks.*.ffn.linear2", SAME),
    ("norm_f", "ln_f", SAME),
    ("head", "output_proj", SAME),
)
POSITION = "pos_encoding.pos_embedding.weight"
EMBEDDING, HEAD = "token_embedding.embedding.weight", "output_proj.weight"
BUFFERS = r"(.*\.)?(alibi|rope)\..*"
LONGEST = 5000  # positions of a file that does not say
STARTS = (b"PK", b"\x80")  # an archive, or a pickle
STATES = ("step", "exp_avg", "exp_avg_sq")


def open_checkpoint(path, *, tokenizer=None, dtype="auto"):
    """(config, leaves, optimizer, tokenizer, facts) of a .pt file, every name and shape checked.

    tokenizer names what the file does not hold: by default what its config says, else cl100k_base. Raises ValueError in
    one line for files that need more than weights_only=True, and for what is missing or not as expected.
    """
    given = read_checkpoint(path)
    weights = {name.replace("_orig_mod.", "", 1): leaf for name, leaf in given["model_state_dict"].items()}
    weights = {name: leaf for name, leaf in weights.items() if not re.fullmatch(BUFFERS, name)}
    config = config_of(Settings(given["config"]), weights)
    table = pairs(TABLE, config)
    check(weights, table, config)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    leaves = {
        pair.ours[0]: Later(tuple(weights[pair.theirs].shape), kind, lambda pair=pair: weights[pair.theirs].to(kind))
        for pair in table
    }
    leaves = {name: leaves[name] for name in param_spec(config)}
    optimizer = optimizer_of(given.get("optimizer_state_dict"), weights, table, config)
    words = tokenizers.named(tokenizer or given["config"].get("encoding") or "cl100k_base")
    facts = {"source": Path(path).name, "architecture": "attention-to-detail"}
    for name in ("epoch", "train_loss", "val_loss", "loss", "current_lr", "scheduler_state_dict"):
        if isinstance(given.get(name), int | float | dict):
            facts[name] = plain_json(given[name])
    return config, leaves, optimizer, words, facts


def read_checkpoint(path) -> dict:
    """What a .pt file holds, read with weights_only=True. Raises ValueError in one line where that is not enough."""
    if not Path(path).is_file():
        raise ValueError(f"file: expected a .pt file or a folder, got {path}")
    with open(path, "rb") as file:
        if not file.read(2).startswith(STARTS):
            raise ValueError(f"{path}: expected a .pt file as torch.save writes them, got another format")
    try:
        with warnings.catch_warnings(action="ignore"):  # about a pickle that is refused in the next moment
            given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors have no common base that can be named here
        reason = " ".join(str(error).split())
        found = re.search(r"Unsupported (operand \d+|(global|class) *:?[^.]{0,60})", reason, re.I)
        raise ValueError(
            f"{path}: expected tensors and plain values, which weights_only=True reads, got "
            f"{found.group() if found else reason[:160] or type(error).__name__}"
        ) from None
    parts = {"model_state_dict": torch.Tensor, "config": object}
    for name, kind in parts.items():
        values = given.get(name) if isinstance(given, dict) else None
        if not isinstance(values, dict) or not all(
            isinstance(v, kind) and isinstance(k, str) for k, v in values.items()
        ):
            raise ValueError(f"{path}: expected {name}, a dict by name, got {type(values).__name__}")
    for name, leaf in given["model_state_dict"].items():
        if not dense(leaf):
            raise ValueError(f"{name}: expected a dense tensor with its numbers, got {leaf.layout} on {leaf.device}")
    return given


def dense(value) -> bool:
    """Is it a tensor with a number in each place, and not a list of those that are not zero, or a shape alone?"""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def config_of(settings, weights):
    """The model that the file's config and tensors describe."""
    for name in (EMBEDDING, HEAD):
        if name not in weights:
            raise ValueError(f"weights: expected {name}, got none")
    n_context = settings.count(
        "max_seq_len",
        len(weights[POSITION]) if POSITION in weights and weights[POSITION].dim() else LONGEST,
        MAX_CONTEXT,
    )
    learned = {"learned": "learned", "rope": "rope", "alibi": "alibi"}
    position = settings.choice("position_encoding_type", "learned" if POSITION in weights else "alibi", learned)
    n_layer = settings.count("num_layers")
    if n_layer > len(weights):
        raise ValueError(f"num_layers: expected tensors of {n_layer:,} layers, got {len(weights):,} tensors")
    return architecture(
        "seed",
        n_vocab=settings.count("vocab_size"),
        n_context=n_context,
        n_layer=n_layer,
        d_model=settings.count("d_model"),
        n_head=settings.count("num_heads"),
        d_ff=settings.count("d_ff"),
        position=position,
        dropout=settings.get("dropout", 0.1),
        tied=torch.equal(weights[HEAD], weights[EMBEDDING]),  # the flag was not saved
        head_bias="output_proj.bias" in weights,
    )


def check(weights, table, config) -> None:
    """Raise ValueError unless the file has exactly the model's tensors, each with its shape and finite."""
    wanted = {pair.theirs: shape_of(pair, config) for pair in table}
    expected = wanted.keys() | ({HEAD} if config.tied else set())
    missing, extra = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing or extra:
        raise ValueError(f"weights: missing {', '.join(missing) or 'none'}, not expected {', '.join(extra) or 'none'}")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(weights[name].shape)}")
        if not weights[name].is_floating_point() or not weights[name].isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got some that are not")


def optimizer_of(given, weights, table, config) -> dict[str, torch.Tensor]:
    """AdamW's moments by our names; empty without any. Its k-th entry is the k-th of the weights that decay, then of
    the others, each in the model's own order."""
    if not given:
        return {}
    order = [name for name in weights if not (config.tied and name == HEAD)]
    still = lambda name: any(word in name.lower() for word in ("bias", "norm", "ln_f"))
    order = [name for name in order if not still(name)] + [name for name in order if still(name)]
    ours, found = {pair.theirs: pair.ours[0] for pair in table}, {}
    states = given.get("state") if isinstance(given, dict) else None
    if not isinstance(states, dict) or (states and states.keys() != set(range(len(order)))):
        raise ValueError(f"optimizer_state_dict: expected the states of {len(order)} weights, got others")
    for index, state in states.items():
        name = order[index]
        for key in STATES:
            value = state.get(key) if isinstance(state, dict) else None
            value = value if dense(value) else torch.tensor(value if isinstance(value, int | float) else torch.nan)
            shape = () if key == "step" else tuple(weights[name].shape)
            if tuple(value.shape) != shape or not value.float().isfinite().all():
                raise ValueError(f"optimizer_state_dict: expected {key} {shape} of {name}, got {tuple(value.shape)}")
            found[f"{ours[name]}/{key}"] = value.float()
    return found


def plain_json(value):
    """Numbers, texts, lists and dicts as they are; everything else as text."""
    if isinstance(value, dict):
        return {str(key): plain_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
