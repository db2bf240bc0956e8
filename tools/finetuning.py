"""Where a fine-tuning begins: a run's weights and tokenizer, a second tree if asked for, and what it will take.

The defaults are small on purpose. A trained model is already in a good place: few passes, a low rate after a long
warm-up, and the step before the first update counts as a result, so that a fine-tuning that makes it worse is seen.
"""

from dataclasses import replace
from pathlib import Path

import torch

from gptcore import checkpoint, device, lora, tokenizer, tree
from gptcore.pretrained import hub, sizes

DEFAULTS = {
    "epochs": 3, "minutes": None, "accumulation": 4, "least_updates": 0, "optimizer": "adamw", "schedule": "cosine",
    "warmup": 0.1,
}  # fmt: skip
RATES = {"full": 2e-5, "lora": 1e-4}
FIXED = {"arch", "position_encoding", "n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "tokenizer"}
GB = 1e9


def open_base(given, chosen) -> checkpoint.Loaded:
    """The run that --init names. Raises ValueError where it is none, and for options that it has decided already."""
    if fixed := sorted(chosen & FIXED):
        names = ", ".join("--" + name.replace("_", "-") for name in fixed)
        raise ValueError(f"init: expected no {names}, which the model has decided, got {given['init']} with it")
    if given["optimizer"] == "muon" and given["lora"]:
        raise ValueError("optimizer: expected adamw with --lora, got muon")
    try:
        base = checkpoint.load_model(given["init"])
    except ValueError as error:
        if given["init"] in hub.NAMES and not Path("runs", given["init"]).exists():
            raise ValueError(
                f"init: expected a run, got {given['init']}; invoke pretrained {given['init']} makes it"
            ) from None
        raise ValueError(f"init: {error}") from None
    words = tokenizer.load(base.path.parent.parent / "tokenizer.json")
    config = base.config if given["dropout"] is None else replace(base.config, dropout=given["dropout"])
    return base._replace(tokenizer=words, config=config)


def refuse_memory(base, given, place) -> list[str]:
    """What the training will hold, a line for each part. Raises ValueError where it is more than the machine has."""
    config, rank = base.config, given["lora"]
    width = base.params["embed"]["w"].dtype.itemsize
    held = sizes.lora_bytes(config, rank, width) if rank else sizes.full_bytes(config)
    total = device.total_memory(place)
    if held > total:
        less = "" if rank else f"; --lora 8 holds {sizes.lora_bytes(config, 8, width) / GB:.1f} GB"
        raise ValueError(f"memory: expected {held / GB:.1f} GB, got {total / GB:.1f} GB on this machine{less}")
    n_tokens = min(given["n_context"], config.n_context)
    activations = sizes.activation_bytes(config, n_tokens, recompute=given["recompute"])
    what = f"frozen weights and LoRA of rank {rank}" if rank else "weights, gradients and AdamW's moments"
    more = "" if given["recompute"] else "; --recompute needs less"
    return [
        f"Memory: {held / GB:.2f} GB for {what}, and about {activations / GB:.2f} GB of activations for each sequence "
        f"of {n_tokens:,} in a pass{more}; this machine has {total / GB:.1f} GB."
    ]


def weights(base, given, place):
    """The tree to train: all of the base in float32, or the base as it is under a fresh second tree."""
    if not given["lora"]:
        return tree.map(lambda leaf: leaf.to(place, torch.float32), base.params)
    fresh = lora.init_lora(base.config, given["lora"], device.generator(given["seed"], "lora"))
    return tree.map(lambda leaf: leaf.to(place), tree.overlay(base.params, fresh))


def moments(base, given, kind) -> dict:
    """AdamW's moments, if the base is an import that brought them and everything is trained with AdamW."""
    if given["lora"] or kind != "adamw" or base.run.get("mode") != "imported":
        return {}
    return checkpoint.load_step(base.path).optimizer


def facts(base, given) -> dict:
    """What run.json keeps of it."""
    begun = checkpoint.base_of(base.path, "runs") | {"name": base.name}
    return {"init": begun, "arch": base.run.get("arch")} | ({"lora": {"rank": given["lora"]}} if given["lora"] else {})
