"""The data path: text to shards in MB/s, batches against a training step, and memory while much text passes.

    python benchmarks/bench_data.py [--json benchmarks/results/data.json] [--mb 50] [--memory-gb 0]

The stream is a local data set in the hub's layout, so no network is timed; the tokenizer is cl100k_base. Batches are
compared with a training step of quick mode in the same process. With --memory-gb so much synthetic text is fetched, and
the growth of the process's peak memory is told.
"""

import json
import os
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import click
import pyarrow
import pyarrow.parquet
import torch

from gptcore import data, tokenizer
from gptcore.config import architecture, padded_vocab
from gptcore.data import corpora, fetch, shards
from gptcore.device import card_name, generator
from gptcore.model import init_params
from gptcore.train import TrainOptions, init_state, train_step_
from tools.modes import MODES

WORDS = [word for name, text in corpora.python_docs() for word in text.split()][:20_000]


def write_texts(folder, n_bytes):
    """A data set of texts made of real words in random order; how many bytes it holds."""
    rng, path, size = random.Random(1), folder / "data" / "train-00000.parquet", 0
    path.parent.mkdir(parents=True)
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while size < n_bytes:
            rows = [" ".join(rng.choices(WORDS, k=600)) for _ in range(500)]
            writer.write_table(pyarrow.table({"text": rows}))
            size += sum(len(row.encode()) for row in rows)
    return size


def fetched(folder, cache, n_chunks):
    """Fetch the data set in this process; seconds."""
    words = tokenizer.named("cl100k_base")
    path = Path(cache, "tokenizer.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    words.save(path)
    order = fetch.Order(
        source=f"hf:{folder}", text_field="text", tokenizer=str(path), name=words.name, cache=str(cache),
        n_chunks=n_chunks, n_shard=shards.N_SHARD,
    )  # fmt: skip
    began = time.perf_counter()
    fetch.fetch_(order, lambda **facts: None)
    return time.perf_counter() - began


def batch_cost(n_rounds=20):
    """Seconds of a quick mode's batch and of its training step, medians."""
    mode = MODES["quick"]
    with tempfile.TemporaryDirectory() as cache:
        sizes = {"n_context": 256, "n_sequences": 16, "seed": 1}
        dataset = data.prepare("python-docs", mode["tokenizer"], cache=cache, **sizes)
        n_vocab = dataset.tokenizer.n_vocab
        sizes = {name: mode[name] for name in ("n_layer", "d_model", "n_head", "d_ff")}
        config = architecture(
            "gpt2", n_vocab=n_vocab, n_vocab_padded=padded_vocab(n_vocab), n_context=dataset.n_context, **sizes
        )
        params = init_params(config, generator(1))
        options = TrainOptions(n_steps=1_000, warmup=0.0, dtype="float32", compiled=False)
        state, times = init_state(params, config, options), {"batch": [], "step": []}
        for step in range(n_rounds + 2):
            began = time.perf_counter()
            batch = dataset.batch(step)
            read = time.perf_counter()
            train_step_(params, config, batch, state, options)
            if step > 1:
                times["batch"].append(read - began)
                times["step"].append(time.perf_counter() - read)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak():
    """Peak memory of this process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@click.command()
@click.option("--mb", type=click.IntRange(min=1), default=50, show_default=True, help="Text to tokenise.")
@click.option("--memory-gb", type=click.FloatRange(min=0), default=0.0, help="Also fetch so much and watch the memory.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Also write the figures there.")
def main(mb, memory_gb, file):
    """Measure the data path."""
    found = {"machine": card_name(torch.device("cpu")), "threads": os.cpu_count(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_texts(Path(folder, "hub"), mb * 1_000_000)
        seconds = fetched(Path(folder, "hub"), Path(folder, "cache"), 10_000)
    found["shards"] = {"mb": n_bytes / 1e6, "seconds": seconds, "mb_per_second": n_bytes / 1e6 / seconds}
    print(f"text to shards: {n_bytes / 1e6:.0f} MB in {seconds:.1f} s, {n_bytes / 1e6 / seconds:.1f} MB/s")
    cost = batch_cost()
    found["batch"] = cost | {"share": cost["batch"] / cost["step"]}
    print(f"a batch {1e3 * cost['batch']:.3f} ms, a training step {1e3 * cost['step']:.1f} ms: "
          f"{100 * cost['batch'] / cost['step']:.2f} %")  # fmt: skip
    if memory_gb:
        with tempfile.TemporaryDirectory() as folder:
            n_bytes = write_texts(Path(folder, "hub"), memory_gb * 1e9)
            before = peak()
            seconds = fetched(Path(folder, "hub"), Path(folder, "cache"), 10_000)
        found["memory"] = {"gb": n_bytes / 1e9, "seconds": seconds, "growth_mb": (peak() - before) / 1e6}
        print(f"{n_bytes / 1e9:.2f} GB in {seconds:.0f} s: peak memory grew by {(peak() - before) / 1e6:.0f} MB")
    if file:
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
