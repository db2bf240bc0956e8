"""Models of published shapes, random weights: made on the disk, imported, and generated from, each in a process.

    python benchmarks/bench_import.py [--shape phi-2] [--tokens 64] [--folder DIR] [--json FILE]

What is measured is the peak of resident memory, as the system counts it (mapped pages of files included) and of that
what is no file's but its own, beside the bytes of the weights; and the tokens a second once the first is there.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import click
import torch

from gptcore import checkpoint, files, tokenizer
from gptcore.checkpoint import Later
from gptcore.config import architecture
from gptcore.device import card_name, generator
from gptcore.pretrained import gpt2, neox, phi, sizes
from gptcore.pretrained.export import write_json
from gptcore.pretrained.table import pairs, shape_of

HOUSE = Path(__file__).resolve().parent.parent
GPT2 = {"n_vocab": 50_257, "n_context": 1024, "n_layer": 12, "d_model": 768, "n_head": 12, "mlp": "gelu_tanh"}
PYTHIA = {"n_vocab": 50_304, "n_context": 2048, "n_layer": 12, "d_model": 768, "n_head": 12}
PHI = {"n_vocab": 51_200, "n_context": 2048, "n_layer": 32, "d_model": 2560, "n_head": 32}
SHAPES = {
    "gpt2": (gpt2, architecture("gpt2", **GPT2), torch.float32, 50_257),
    "pythia-160m": (neox, architecture("neox", **PYTHIA), torch.bfloat16, 50_277),
    "phi-2": (phi, architecture("phi", **PHI), torch.bfloat16, 50_295),
}


def draw(name, shape, dtype):
    """A leaf of N(0, 0.02), a norm's gain around 1."""
    leaf = torch.randn(shape, generator=generator("shape", name)) * 0.02
    return (leaf + 1 if "norm" in name and name.endswith("weight") else leaf).to(dtype)


def make(folder, module, config, dtype, n_ids):
    """A folder of that model in the layout of transformers; weights pass through memory a leaf at a time."""
    leaves = {}
    for pair in pairs(module.TABLE, config):
        shape = shape_of(pair, config)
        leaves[pair.theirs] = Later(shape, dtype, partial(draw, pair.theirs, shape, dtype))
    checkpoint.write_tensors(folder / "model.safetensors", leaves, {"format": "pt"})
    write_json(folder / "config.json", {"model_type": module.MODEL_TYPE} | module.config_to(config))
    files.write_whole(folder / "tokenizer.json", tokenizer.as_json(tokenizer.named(f"cl100k:{n_ids}")))


def speak(name, n_tokens):
    """Greedy tokens from a run as invoke generate makes them; the tokens a second after the first one."""
    from gptcore import engine
    from gptcore.generate import GenerateOptions, generate
    from gptcore.sampling import PRESETS

    loaded = checkpoint.load_model(name)
    params, config = loaded.params, loaded.config
    packed = None if engine.why_not(params, config) else engine.pack(params, config)
    options = GenerateOptions(sampling=PRESETS["greedy"], max_new_tokens=n_tokens + 1)
    steps = generate(params, config, [[1, 2, 3]], options, packed=packed)
    next(steps)
    began = time.perf_counter()
    n_made = sum(1 for _ in steps)
    return n_made / (time.perf_counter() - began)


def watched(folder, *command):
    """(its output, seconds, peak resident bytes, peak of its own) of a command."""
    environment = os.environ | {"PYTHONPATH": str(HOUSE)}
    began, own = time.perf_counter(), [0]
    child = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)

    def look():
        while child.returncode is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            kept = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status)
            own[0] = max(own[0], sum(map(int, kept)) * 1024)
            time.sleep(0.05)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {child.returncode}: {output}")
    return output, time.perf_counter() - began, usage.ru_maxrss * 1024, own[0]


@click.command()
@click.option("--shape", multiple=True, type=click.Choice(list(SHAPES)), default=list(SHAPES), show_default=True)
@click.option("--tokens", default=64, show_default=True, help="New tokens.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Add the result to this file.")
@click.option("--folder", type=click.Path(file_okay=False), help="Where there is room (default: the system's own).")
@click.option("--speak", "run", metavar="RUN", help="Only that: speak from a run, and print the tokens a second.")
def main(shape, tokens, file, folder, run):
    """Make, import, generate; a line each."""
    if run:
        click.echo(speak(run, tokens))
        return
    result = {
        "command": "python benchmarks/bench_import.py", "machine": card_name("cpu"), "torch": torch.__version__,
        "python": platform.python_version(), "load": os.getloadavg(), "shapes": {},
    }  # fmt: skip
    if file and Path(file).exists():
        result["shapes"] = json.loads(Path(file).read_text(encoding="utf-8"))["shapes"]
    for name in shape:
        module, config, dtype, n_ids = SHAPES[name]
        n_bytes = sizes.weight_bytes(config, dtype.itemsize)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            place, source = Path(place), Path(place, "source")
            source.mkdir()
            make(source, module, config, dtype, n_ids)
            invoke = (sys.executable, "-m", "invoke", "-r", HOUSE, "import", "source", "--run", name)
            _, seconds, peak, own = watched(place, *map(str, invoke))
            row = {
                "weights": sizes.n_weights(config), "dtype": str(dtype).removeprefix("torch."), "weight_bytes": n_bytes,
                "import_seconds": seconds, "import_peak_bytes": peak, "import_own_bytes": own,
                "import_peak_ratio": peak / n_bytes,
            }  # fmt: skip
            for path in source.iterdir():  # room for what comes
                path.unlink()
            words = (sys.executable, Path(__file__).resolve(), "--speak", name, "--tokens", tokens)
            said, seconds, peak, own = watched(place, *map(str, words))
            row |= {"tokens_per_second": float(said), "generate_seconds": seconds}
            row |= {"generate_peak_bytes": peak, "generate_own_bytes": own}
        result["shapes"][name] = row
        click.echo(
            f"{name}: {n_bytes / 1e9:.2f} GB of weights; import {row['import_seconds']:.0f} s, peak "
            f"{row['import_peak_bytes'] / 1e9:.2f} GB ({row['import_peak_ratio']:.2f} x), "
            f"{row['import_own_bytes'] / 1e9:.2f} its own; generate {row['tokens_per_second']:.1f} tok/s, peak "
            f"{peak / 1e9:.2f} GB, {own / 1e9:.2f} its own"
        )
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
