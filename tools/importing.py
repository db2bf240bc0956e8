"""What invoke pretrained, import and export do: tell sizes first, then move weights a leaf at a time."""

import re
import shutil
import sys
from pathlib import Path

import click
from rich import box
from rich.table import Table

from gptcore import checkpoint, device
from gptcore.pretrained import ARCHITECTURES, export, hub, open_checkpoint, open_folder, read_config, save_run, sizes
from gptcore.pretrained.weights import read_json

GB = 1e9


def from_folder(folder, dtype, name, console) -> int:
    """A run from a folder in the layout of transformers."""
    name = choose_name(name, Path(folder).resolve().name)
    _, config = read_config(folder)
    refuse_what_cannot_fit(config, 4 if dtype == "float32" else 2)  # at least, and before the weights are opened
    model = open_folder(folder, dtype=dtype)
    width = {leaf.dtype.itemsize for leaf in model.leaves.values()}
    refuse_what_cannot_fit(model.config, max(width))
    return save(model, name, console)


def from_hub(name, revision, dtype, run, yes, console) -> int:
    """A run from a model of the hub: its sizes and licence first, then a question."""
    run = choose_name(run, name.split("/")[-1])
    repository = hub.find(hub.repository_name(name), revision)
    ((_, path),) = hub.fetch(repository, ["config.json"])
    architecture, config = read_config(path.parent)
    width = width_of(read_json(path), dtype)
    refuse_what_cannot_fit(config, width)
    console.print(size_table(repository, architecture, config, width))
    if not yes and not hub_question(console):
        raise click.Abort
    for file, path in hub.fetch(repository):  # noqa: B007 (the last path is used)
        console.print(f"{file}: {repository.files[file] / GB:.3f} GB", highlight=False, markup=False, soft_wrap=True)
    about = {"source": repository.name, "revision": repository.revision, "licence": repository.licence}
    return save(open_folder(path.parent, dtype=dtype, about=about), run, console)


def hub_question(console) -> bool:
    """Shall it be downloaded? Raises ValueError where nobody can answer."""
    if not sys.stdin.isatty():
        raise ValueError("yes: expected --yes where no terminal can be asked, got none")
    return click.confirm("Download it?", default=True)


def from_checkpoint(path, tokenizer, dtype, name, console) -> int:
    """A run from a .pt checkpoint of the attention-to-detail project."""
    name = choose_name(name, re.sub(r"[^\w.-]", "-", Path(path).stem))
    return save(open_checkpoint(path, tokenizer=tokenizer, dtype=dtype), name, console)


def choose_name(name, default) -> str:
    """A free name for the run, before anything is read."""
    checkpoint.check_new_name("runs", default if name is None else name)
    return default if name is None else name


def save(model, name, console) -> int:
    """Write the run and tell what it is good for."""
    for note in model.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    free = shutil.disk_usage(".").free
    if free < model.n_bytes:
        raise ValueError(f"run: expected {model.n_bytes / GB:.1f} GB of free disk, got {free / GB:.1f}")
    with console.status("Converting, a tensor at a time"):
        path = save_run(model, name=name)
    said = f"{path.name}: {sizes.n_weights(model.config):,} weights, {model.n_bytes / GB:.2f} GB in {path}"
    for line in (said, f"invoke generate --run {path.name}", f"invoke train --init {path.name} --data FILE"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def width_of(settings, dtype) -> int:
    """Bytes that a weight will take: what was asked for, else as the config.json says."""
    stored = settings.get("dtype") or settings.get("torch_dtype")
    wide = dtype == "float32" or (dtype == "auto" and stored in (None, "float32", "float64"))
    return 4 if wide else 2


def refuse_what_cannot_fit(config, width) -> None:
    """Raise ValueError where this machine's memory cannot hold the weights and the cache of one text."""
    needed = sizes.weight_bytes(config, width) + sizes.cache_bytes(config, min(config.n_context, 2048), width)
    if needed > (total := device.total_memory("cpu")):
        hint = "" if width == 2 else "; --dtype bfloat16 needs half of it"
        raise ValueError(f"memory: expected {needed / GB:.1f} GB for this model, got {total / GB:.1f} GB{hint}")


def size_table(repository, architecture, config, width):
    """What it is, what it costs, what fits this machine."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    total = device.total_memory("cpu")
    n_text = min(config.n_context, 2048)
    generating = sizes.weight_bytes(config, width) + sizes.cache_bytes(config, n_text, width)
    fits = lambda n_bytes: f"{n_bytes / GB:.2f} GB" + ("" if n_bytes < 0.9 * total else ", more than this machine has")
    for row in (
        ("model", f"{repository.name} at {repository.revision[:12]}, {architecture.CLASS}"),
        ("licence", repository.licence),
        ("weights", f"{sizes.n_weights(config):,}: {config.n_layer} layers of {config.d_model}, {config.n_head} heads"),
        ("download", f"{repository.n_bytes / GB:.2f} GB"),
        ("run folder", f"{sizes.weight_bytes(config, width) / GB:.2f} GB"),
        (f"generate, {n_text:,} tokens", fits(generating)),
        ("fine-tune with --lora 8", fits(sizes.lora_bytes(config, 8, width)) + ", and activations"),
        ("fine-tune everything", fits(sizes.full_bytes(config)) + ", and activations"),
    ):
        table.add_row(*row)
    return table


def export_run(run, format_, out, console) -> int:
    """Write a run's model for other programs; success is told once it was loaded there and agrees."""
    model = checkpoint.load_model(run)
    name = model.path.parent.parent.name
    if format_ == "gguf":
        from gptcore.pretrained import gguf

        path = Path(out or f"exports/{name}.gguf")
        line = gguf.export_file(model.params, model.config, model.tokenizer, path)
    else:
        path = Path(out or f"exports/{name}")
        with console.status("Exporting") as status:
            worst = export.export_folder(
                model.params, model.config, model.tokenizer, path, ARCHITECTURES.values(), progress=status.update
            )
        line = f"transformers' logits differ by at most {worst:.1e}, its tokenizer gives equal ids"
    console.print(f"{path}: {line}", highlight=False, markup=False, soft_wrap=True)
    return 0
