"""The data path: text to shards in MB/s, batches against a training step, and memory while much text passes.

    python benchmarks/bench_data.py [--json benchmarks/results/data.json] [--mb 50] [--memory-gb 0]

The stream is a local data set in the hub's layout, so no network is timed; the tokenizer is cl100k_base. Batches are
compared with a training step of quick mode in the same process. With --memory-gb so much synthetic text is fetched by
one process; another reads every batch of it and trains on some. How far the memory of each rises is told.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
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
SIZES = {"n_context": 256, "n_sequences": 8, "seed": 1}  # an update of quick mode


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
    order = order_for(folder, cache, n_chunks)
    began = time.perf_counter()
    fetch.fetch_(order, lambda **facts: None)
    return time.perf_counter() - began


def order_for(folder, cache, n_chunks):
    """The order to fetch a local data set with cl100k_base."""
    words = tokenizer.named("cl100k_base")
    path = Path(cache, "tokenizer.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    words.save(path)
    return fetch.Order(
        source=f"hf:{folder}", text_field="text", tokenizer=str(path), name=words.name, cache=str(cache),
        n_chunks=n_chunks, n_shard=shards.N_SHARD,
    )  # fmt: skip


def batch_cost(n_rounds=20):
    """Seconds of a quick mode's batch and of its training step, medians."""
    with tempfile.TemporaryDirectory() as cache:
        dataset = data.prepare("python-docs", MODES["quick"]["tokenizer"], cache=cache, **SIZES)
        params, config, state, options = model_for(dataset)
        times = {"batch": [], "step": []}
        for step in range(n_rounds + 2):
            began = time.perf_counter()
            batch = dataset.batch(step)
            read = time.perf_counter()
            train_step_(params, config, batch, state, options)
            if step > 1:
                times["batch"].append(read - began)
                times["step"].append(time.perf_counter() - read)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def model_for(dataset):
    """A model of quick mode's sizes, ready to be trained on the dataset: (params, config, state, options)."""
    n_vocab = dataset.tokenizer.n_vocab
    sizes = {name: MODES["quick"][name] for name in ("n_layer", "d_model", "n_head", "d_ff")}
    sizes |= {"n_vocab": n_vocab, "n_vocab_padded": padded_vocab(n_vocab), "n_context": dataset.n_context}
    config = architecture(MODES["quick"]["arch"], **sizes)
    params = init_params(config, generator(1))
    options = TrainOptions(n_steps=1_000, warmup=0.0, dtype="float32", compiled=False)
    return params, config, init_state(params, config, options), options


def memory(n_bytes):
    """How far fetching and training raise the memory, each in a process of its own: {"before", "peak"} in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"gb": write_texts(Path(folder, "much/hub"), n_bytes) / 1e9}
        write_texts(Path(folder, "little/hub"), 1_000_000)
        for work in WORKS:
            words = [sys.executable, __file__, "--grow", work, "--folder", folder]
            found[work] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    return found


def fetch_text(folder):
    """Everything that is in the folder's data set, into shards."""
    fetched(folder / "hub", folder / "cache", 10_000)


def read_through(folder, n_every=10_000):
    """Read every batch of an epoch, as training does, and train on one in n_every of them."""
    words = tokenizer.load(folder / "cache/tokenizer.json")
    dataset = data.prepare(f"hf:{folder}/hub", words, cache=folder / "cache", tokens_per_epoch=10**12, **SIZES)
    params, config, state, options = model_for(dataset)
    with closing(data.prefetch(dataset.batch, 0, dataset.n_windows // dataset.n_sequences)) as batches:
        for step, batch in enumerate(batches):
            if step % n_every == 0:
                train_step_(params, config, batch, state, options)


WORKS = {"fetch": fetch_text, "train": read_through}


def grow(work, folder):
    """Do it with little text, to load everything, with little again, and with much: the peaks of the last two."""
    found = {}
    for word, text in {"loaded": "little", "before": "little", "peak": "much"}.items():
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
        began = time.perf_counter()
        WORKS[work](folder / text)
        found |= {word: peak(), "seconds": time.perf_counter() - began}
        if word == "loaded" and work == "fetch":
            shutil.rmtree(folder / text / "cache")  # or the second time would find it done
    return found


def peak():
    """This process's peak memory in bytes since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@click.command()
@click.option("--mb", type=click.IntRange(min=1), default=50, show_default=True, help="Text to tokenise.")
@click.option("--memory-gb", type=click.FloatRange(min=0), default=0.0, help="Also the memory that so much text takes.")
@click.option(
    "--grow", "grow_", type=click.Choice(list(WORKS)), hidden=True, help="What a process of --memory-gb does."
)
@click.option("--folder", type=Path, hidden=True, help="Where it does that.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Also write the figures there.")
def main(mb, memory_gb, grow_, folder, file):
    """Measure the data path."""
    if grow_:
        return print(json.dumps(grow(grow_, folder)))
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
        found["memory"] = memory(memory_gb * 1e9)
        for work in WORKS:
            got, growth = found["memory"][work], found["memory"][work]["peak"] - found["memory"][work]["before"]
            print(f"{work} {found['memory']['gb']:.2f} GB in {got['seconds']:.0f} s: peak memory grew by "
                  f"{growth / 1e6:.0f} MB, from {got['before'] / 1e6:.0f} MB with little text")  # fmt: skip
    if file:
        Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
