"""Models of others: read from a folder in the layout of transformers, and written into one.

    model = open_folder("phi-2/")               # config and names checked, no number read yet
    run = save_run(model, name="phi-2")         # a run folder like any other, leaf by leaf

What you learn here: an architecture is a config and a table of names. Reading checks every name and shape before the
first number; weights then pass through memory one leaf at a time, so importing needs less memory than using. What is
exported is loaded by transformers and its logits are compared before anybody is told that it worked.
Adding an architecture is one file like llama.py, its name here, and a row in the test.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from gptcore import checkpoint, tokenizer, tree
from gptcore.checkpoint import Later
from gptcore.config import ModelConfig
from gptcore.model import check_params, count_params, param_spec
from gptcore.pretrained import gpt2, llama, mpt, neox, phi, qwen2, qwen3, seed
from gptcore.pretrained.settings import Settings
from gptcore.pretrained.table import pairs, shape_of
from gptcore.pretrained.weights import Weights, read_json

ARCHITECTURES = {module.MODEL_TYPE: module for module in (gpt2, neox, phi, llama, qwen2, qwen3, mpt)}
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO = {torch.float16: torch.bfloat16, torch.float64: torch.float32}  # the others stay as they are


class Foreign(NamedTuple):
    """A model in somebody else's layout, ready to be saved: what it is, and leaves that are read when written."""

    config: ModelConfig
    leaves: dict[str, Later]
    tokenizer: tokenizer.Tokenizer
    about: dict[str, Any]  # plain JSON: where it is from
    optimizer: Mapping[str, torch.Tensor] = MappingProxyType({})
    notes: tuple[str, ...] = ()  # what the user should be told, a line each

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights in the format they will have."""
        return sum(torch.Size(leaf.shape).numel() * leaf.dtype.itemsize for leaf in self.leaves.values())


def read_config(folder) -> tuple[Any, ModelConfig]:
    """(the architecture's module, the model) that a folder's config.json describes; ValueError for any other."""
    path = Path(folder, "config.json")
    given = read_json(path)
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"{path}: expected a model_type of {', '.join(ARCHITECTURES)}, got {kind!r}")
    try:
        return ARCHITECTURES[kind], ARCHITECTURES[kind].config_from(Settings(given))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def open_folder(folder, *, dtype="auto", about=None) -> Foreign:
    """The model in a folder with config.json, safetensors and tokenizer.json, every name and shape checked.

    dtype float32, bfloat16 or auto: as most numbers are stored, but float16 becomes bfloat16 and float64 float32.
    Raises ValueError naming the file, setting or tensor that is not as expected; no code from the folder is run.
    """
    if dtype not in ("auto", *FORMATS):
        raise ValueError(f"dtype: expected auto, {', '.join(FORMATS)}, got {dtype}")
    architecture, config = read_config(folder)
    weights = Weights(folder)
    if config.n_layer > len(weights.shapes):
        raise ValueError(f"weights: expected tensors of {config.n_layer:,} layers, got {len(weights.shapes):,} tensors")
    table, spec = pairs(architecture.TABLE, config), param_spec(config)
    names = match_names(weights, table, architecture, config)
    kind = FORMATS.get(dtype) or common_format(weights, names.values())
    leaves = {}
    for pair in table:
        for place, ours in enumerate(pair.ours):
            make = partial(_read, weights, names[pair.theirs], pair, place, kind, config)
            leaves[ours] = Later(spec[ours].shape, kind, make)
    leaves = {name: leaves[name] for name in spec}
    check_params(tree.nest(leaves), config)
    words = read_tokenizer(folder)
    check_vocabulary(words, config)
    rounded = {weights.dtypes[name] for name in names.values()} & {torch.float16, torch.float32}
    notes = [f"{str(each)[6:]} weights become bfloat16; --dtype float32 keeps every bit" for each in rounded]
    notes = tuple(sorted(notes)) if dtype == "auto" and kind == torch.bfloat16 else ()
    about = {"architecture": architecture.CLASS} | (about or {"source": Path(folder).resolve().name})
    return Foreign(config, leaves, words, about, notes=notes)


def open_checkpoint(path, *, tokenizer=None, dtype="auto") -> Foreign:
    """The model in a .pt checkpoint of the attention-to-detail project, its optimizer's moments included.

    Raises ValueError as seed.open_checkpoint does.
    """
    if dtype not in ("auto", *FORMATS):
        raise ValueError(f"dtype: expected auto, {', '.join(FORMATS)}, got {dtype}")
    config, leaves, optimizer, words, about = seed.open_checkpoint(path, tokenizer=tokenizer, dtype=dtype)
    check_vocabulary(words, config)
    return Foreign(config, leaves, words, about, optimizer)


def common_format(weights, names) -> torch.dtype:
    """What most numbers of these tensors are stored in, as AUTO has it: a model computes in one format, whatever its
    norms were kept in.
    """
    numbers = Counter()
    for name in names:
        kind = weights.dtypes[name]
        numbers[AUTO.get(kind, kind)] += math.prod(weights.shapes[name])
    return numbers.most_common(1)[0][0]


def check_vocabulary(words, config) -> None:
    """Raise ValueError for a tokenizer with more ids than the model has rows."""
    if words.n_vocab > config.n_vocab:
        raise ValueError(f"tokenizer: expected at most {config.n_vocab} ids as the model has, got {words.n_vocab}")


def match_names(weights, table, architecture, config) -> dict[str, str]:
    """{name in the table: name in the file}. Raises ValueError for names that are missing or nobody expects, for
    shapes that are not the model's, and for formats that are no floating point."""
    prefixed = any(name.startswith(architecture.PREFIX) for name in weights.shapes)
    found = {}
    for name in weights.shapes:
        full = name if prefixed or name.startswith("lm_head.") else architecture.PREFIX + name
        if not any(re.fullmatch(buffer, full) for buffer in architecture.BUFFERS):
            found[getattr(architecture, "RENAMED", {}).get(full, full)] = name
    if config.tied and "lm_head.weight" in found:  # the embedding once more, as old versions wrote it
        copy, embedding = found.pop("lm_head.weight"), found.get(table[0].theirs)
        if embedding and not torch.equal(weights.read(copy), weights.read(embedding)):
            raise ValueError(f"{copy}: expected the embedding, to which the head is tied, got other numbers")
    wanted = {pair.theirs: shape_of(pair, config) for pair in table}
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"weights: {_few('missing', missing)}, {_few('not expected', extra)}")
    for name, shape in wanted.items():
        got, kind = weights.shapes[found[name]], weights.dtypes[found[name]]
        if got != shape:
            raise ValueError(f"{name}: expected {shape}, got {got}")
        if kind is None:
            raise ValueError(f"{name}: expected 16, 32 or 64 bits of floating point, got another format")
    return found


def _few(word, names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word} {', '.join(names[:3]) or 'none'}{more}"


def _read(weights, name, pair, place, kind, config):
    leaf = pair.how.split(weights.read(name), len(pair.ours), config)[place].to(kind)
    if not leaf.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got some that are not")
    return leaf


def read_tokenizer(folder) -> tokenizer.Tokenizer:
    """The tokenizer of a folder: its tokenizer.json, or what transformers makes of older files beside it."""
    path = Path(folder, "tokenizer.json")
    if path.is_file():
        return tokenizer.load(path)
    if not Path(folder, "vocab.json").is_file() or not Path(folder, "merges.txt").is_file():
        raise ValueError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, got neither")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        model = Tokenizer(models.BPE.from_file(str(Path(folder, "vocab.json")), str(Path(folder, "merges.txt"))))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{folder}: expected the vocab.json and merges.txt of a BPE, got {error}") from None
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.add_special_tokens([tokenizer.EOT])
    return tokenizer.parse(model.to_str(), name=str(folder))


def save_run(model, *, name, root="runs") -> Path:
    """Make the run root/name from a Foreign model, leaf by leaf: a run like any other, at step 0, without a plan.

    Raises ValueError for a name that is taken and numbers that are not finite, OSError when the disk refuses; nothing
    is left behind then.
    """
    run = {
        "version": 1, "mode": "imported", "arch": model.about.get("architecture"), "config": asdict(model.config),
        "n_params": count_params(model.config), "source": model.about,
        "tokenizer": {"name": model.tokenizer.name, "fingerprint": model.tokenizer.fingerprint},
    }  # fmt: skip
    path = checkpoint.create_run(root, name, run, model.tokenizer)
    try:
        checkpoint.save_step(
            path, 0, params=tree.nest(model.leaves), optimizer=model.optimizer, rng={},
            state={"epoch": 0, "epoch_end": True, "tokens": 0},
        )  # fmt: skip
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path
