"""A model of ours as a folder that transformers loads, and the proof that it computes the same.

What you learn here: a model can be written for other code only if that code has a class that does the same. Some of our
axes are another spelling of what the class has (padding rows, interleaved pairs, a scaled embedding), and are spelled
out first; then the config goes through the class's own settings and back, and what does not survive is the reason for
a refusal.
"""

import contextlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gptcore import checkpoint, files, tokenizer, tree
from gptcore.checkpoint import Later
from gptcore.config import ModelConfig
from gptcore.model import forward, head
from gptcore.pretrained.settings import Settings
from gptcore.pretrained.table import pairs, shape_of
from gptcore.pretrained.weights import WHOLE

TOLERANCE = 1e-4  # largest difference of a logit in float32
N_PROBE = 64  # tokens whose logits are compared


def plain(params, config) -> tuple[dict, ModelConfig]:
    """The same model without what only we have: padding rows, an embedding scale, interleaved pairs, idle settings."""
    n, c = config.n_vocab, config
    own_head = {name: leaf[:n] for name, leaf in head(params).items()} if not c.tied or c.head_bias else {}
    embedding = params["embed"]["w"][:n]
    if c.scale_embedding:
        own_head = {"w": embedding} | own_head
        embedding = embedding * math.sqrt(c.d_model)
    params = params | {"embed": {"w": embedding}, "head": own_head}
    if c.position == "rope" and c.rope_interleaved:
        params = params | {"blocks": [_halved(block, c) for block in params["blocks"]]}
    unused = {"n_vocab_padded": n, "scale_embedding": False, "rope_interleaved": False, "dropout": 0.0}
    unused |= {"tied": c.tied and not c.scale_embedding}
    fresh = ModelConfig(n_vocab=1)
    if c.position != "rope":
        unused |= {name: getattr(fresh, name) for name in asdict(c) if name.startswith("rope_")}
    if c.rope_scaling == "none":
        unused |= {name: getattr(fresh, name) for name in ("rope_factor", "rope_low", "rope_high", "rope_trained")}
    return params, replace(c, **unused)


def _halved(block, config):
    """A block whose queries and keys pair (i, i + half) instead of (2i, 2i+1): same scores, rows in a new order."""
    order = [*range(0, config.d_rot, 2), *range(1, config.d_rot, 2), *range(config.d_rot, config.d_head)]
    turn = lambda leaf: leaf.unflatten(0, (-1, config.d_head))[:, order].flatten(0, 1)
    attn = block["attn"]
    norms = {name: tree.map(turn, attn[name]) for name in ("q_norm", "k_norm") if name in attn}
    return block | {"attn": attn | {name: tree.map(turn, attn[name]) for name in ("q", "k")} | norms}


def find_class(config, architectures):
    """The architecture whose settings say all of this config. Raises ValueError with what the nearest cannot say."""
    nearest, fewest = "", None
    for architecture in architectures:
        try:
            back = architecture.config_from(Settings(architecture.config_to(config)))
        except ValueError:
            continue
        ours, theirs = asdict(config), asdict(back)
        lost = [f"{name}={ours[name]!r}" for name in ours if ours[name] != theirs[name]]
        if not lost:
            return architecture
        if fewest is None or len(lost) < fewest:
            nearest, fewest = f"{architecture.CLASS} comes nearest, without {', '.join(lost)}", len(lost)
    raise ValueError(f"export: expected a model that transformers has a class for; {nearest}")


def export_folder(params, config, words, folder, architectures, *, progress=lambda line: None) -> float:
    """Write a model as a transformers folder and load it there; returns the largest difference of a logit.

    The folder appears once everything agrees. Raises ValueError where no class of transformers computes the same, where
    logits differ by more than TOLERANCE or ids at all, and if the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"out: expected a new folder, got {folder}, which exists")
    params, config = plain(params, config)
    architecture = find_class(config, architectures)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_folder(folder) as new:
        progress("Writing")
        write_folder(params, config, words, new, architecture)
        progress("Comparing with transformers")
        return compare(params, config, words, new)


def write_folder(params, config, words, folder, architecture) -> None:
    """config.json, the weights leaf by leaf, the tokenizer."""
    checkpoint.write_tensors(folder / WHOLE, leaves_of(params, config, architecture), {"format": "pt"})
    name = str(params["embed"]["w"].dtype).removeprefix("torch.")
    about = {"architectures": [architecture.CLASS], "model_type": architecture.MODEL_TYPE, "torch_dtype": name}
    ends = {"bos_token_id": words.eot, "eos_token_id": words.eot}
    write_json(folder / "config.json", about | architecture.config_to(config) | ends)
    write_json(folder / "generation_config.json", {"_from_model_config": True} | ends)
    files.write_whole(folder / "tokenizer.json", tokenizer.as_json(words))
    end = next(text for text, id in words.special.items() if id == words.eot)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end, "unk_token": end,
            "clean_up_tokenization_spaces": False, "model_max_length": config.n_context,
        },
    )  # fmt: skip


def leaves_of(params, config, architecture) -> dict[str, Later]:
    """The weights of a plain model under transformers' names, each made when it is asked for."""
    leaves = dict(tree.walk(params))
    back = {theirs: name for name, theirs in getattr(architecture, "RENAMED", {}).items()}
    return {
        back.get(pair.theirs, pair.theirs): Later(
            shape_of(pair, config), leaves["embed.w"].dtype, lambda pair=pair: _joined(pair, leaves, config)
        )
        for pair in pairs(architecture.TABLE, config)
    }


def write_json(path, content) -> None:
    """A JSON file, whole or not at all."""
    files.write_whole(path, json.dumps(content, indent=2) + "\n")


def _joined(pair, leaves, config):
    return pair.how.join([leaves[name].detach() for name in pair.ours], config)


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars and no advice from transformers inside; its settings as they were afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def compare(params, config, words, folder) -> float:
    """The largest difference between our logits and those of the folder in transformers, float32; ValueError above
    TOLERANCE, and where its tokenizer gives other ids.

    Theirs are computed and dropped before ours are: never two models in float32 at once.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    n_tokens = min(N_PROBE, config.n_context)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(words.n_vocab, config.n_vocab), (1, n_tokens), generator=draw)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        theirs = model.eval()(tokens).logits
        del model
    ours, _ = forward(tree.map(lambda leaf: leaf.float().cpu(), params), config, tokens)
    worst = (ours - theirs).abs().max().item()
    if not worst <= TOLERANCE:
        raise ValueError(f"export: expected logits within {TOLERANCE} of transformers' own, got {worst:.2g}")
    text = "".join(map(words.decode, ([id] for id in tokens[0].tolist()))) + " The quick brown fox, 1234 times.\n\n"
    with quiet_transformers():
        got = AutoTokenizer.from_pretrained(folder, local_files_only=True).encode(text, add_special_tokens=False)
    if got != words.encode(text):
        raise ValueError("export: expected the ids of our tokenizer from transformers' own, got others")
    return worst
