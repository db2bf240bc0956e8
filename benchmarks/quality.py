"""Which way to train is best: variants x seeds at equal time or equal updates -> held-out bits per byte.

    python benchmarks/quality.py --minutes 5 [--variant gpt2] [--seed 1] [--json benchmarks/results/quality.json]
    python benchmarks/quality.py --updates 300 --threads 1

Every variant reads python-docs with a vocabulary of its own training text, and is scored on all documents held out.
With --minutes a variant makes as many updates as it can on this machine, measured first and then frozen, as invoke
train does; with --updates all make the same number. What stands in the JSON is not run again: an interrupted table goes
on where it was.
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import click
import torch
from peers import ModuleGPT, module_step

from gptcore import optim, tree
from gptcore.config import architecture, padded_vocab
from gptcore.data import prepare
from gptcore.device import card_name, generator, keep_memory_
from gptcore.evaluate.perplexity import score_documents
from gptcore.model import count_params, init_params
from gptcore.train import TrainOptions, init_state, measure, train

GPT2 = {"arch": "gpt2"}
QWEN3 = {"arch": "qwen3", "d_ff": 384}  # as many multiplications as GPT-2's 512 without a gate
MUON = {"kind": "muon", "lr": 6e-3, "muon_lr": 0.02}
WSD = {"schedule": "wsd", "warmup": 0.05, "floor": 0.1}
VARIANTS = {
    "gpt2": {"model": GPT2},
    "gpt2 rope": {"model": GPT2 | {"position": "rope"}},
    "gpt2 rope qk-norm": {"model": GPT2 | {"position": "rope", "qk_norm": True}},
    "gpt2 rope qk-norm relu2": {"model": GPT2 | {"position": "rope", "qk_norm": True, "mlp": "relu2"}},
    "llama": {"model": QWEN3 | {"arch": "llama"}},
    "qwen3": {"model": QWEN3},
    "qwen3 d_ff 512": {"model": QWEN3 | {"d_ff": 512}},
    "qwen3 floor 0": {"model": QWEN3, "train": {"floor": 0.0}},
    "qwen3 8 sequences": {"model": QWEN3, "n_sequences": 8},
    "qwen3 muon 0.03": {"model": QWEN3, "optimizer": {"muon_lr": 0.03}},
    "qwen3 muon 0.01": {"model": QWEN3, "optimizer": {"muon_lr": 0.01}},
    "qwen3 adamw part 1e-2": {"model": QWEN3, "optimizer": {"lr": 1e-2}},
    "qwen3 beta2 0.95": {"model": QWEN3, "optimizer": {"betas": (0.9, 0.95)}},
    "quick": {"model": QWEN3 | {"d_ff": 512}, "optimizer": {"weight_decay": 0.2}, "n_sequences": 8},
    "qwen3 decay 0.1": {"model": QWEN3, "optimizer": {"weight_decay": 0.1}},
    "qwen3 soft-cap 15": {"model": QWEN3 | {"logit_softcap": 15.0}},
    "qwen3 untied": {"model": QWEN3 | {"tied": False}},
    "qwen3 context 128": {"model": QWEN3, "n_context": 128, "n_sequences": 32},
    "qwen3 vocabulary 2048": {"model": QWEN3, "n_vocab": 2048},
    "qwen3 vocabulary 8192": {"model": QWEN3, "n_vocab": 8192},
    "qwen3 width 192": {"model": QWEN3 | {"d_model": 192, "n_head": 6, "d_ff": 576}},
    "qwen3 6 layers": {"model": QWEN3 | {"n_layer": 6}},
    "qwen3 adamw": {"model": QWEN3, "optimizer": {"kind": "adamw", "lr": 3e-3, "betas": (0.9, 0.95)}},
    "peer": {"model": GPT2, "peer": 2e-3},
}  # fmt: skip


def read(variant, seed, cache):
    """The text as the variant reads it."""
    words = f"bpe:{variant.get('n_vocab', 4096)}"
    sizes = {"n_context": variant.get("n_context", 256), "n_sequences": variant.get("n_sequences", 16)}
    return prepare(["python-docs"], words, **sizes, seed=seed, cache=cache)


def config_of(variant, dataset):
    """The variant's model: quick's size unless it says otherwise."""
    n_vocab = dataset.tokenizer.n_vocab
    sizes = {"n_vocab": n_vocab, "n_vocab_padded": padded_vocab(n_vocab), "n_context": dataset.n_context}
    model = {"n_layer": 4, "d_model": 128, "n_head": 4} | variant["model"]
    return architecture(model.pop("arch"), **sizes | model)


def run(variant, seed, minutes, updates, compiled, cache, watch):
    """One training and its score."""
    dataset = read(variant, seed, cache)
    config = config_of(variant, dataset)
    params = init_params(config, generator(seed, "init"))
    way = peer if "peer" in variant else ours
    seconds, losses = way(params, config, dataset, variant, seed, minutes, updates, compiled, watch)
    scores = score_documents(
        params, config, dataset.validation, eot=dataset.tokenizer.eot, token_bytes=dataset.tokenizer.n_bytes
    )
    return {
        "bits_per_byte": scores.bits_per_byte, "updates": len(losses), "seconds": sum(seconds),
        "tokens_per_second": dataset.n_sequences * dataset.n_context / statistics.median(seconds),
        "train_loss": statistics.mean(losses[-20:]), "validation_loss": scores.loss, "n_params": count_params(config),
        "load": os.getloadavg()[0],
    }  # fmt: skip


def ours(params, config, dataset, variant, seed, minutes, updates, compiled, watch):
    """gptcore.train -> (every update's seconds, every update's loss)."""
    moved = optim.Options(**MUON | variant.get("optimizer", {}))
    ways = {"dtype": "bfloat16", "compiled": compiled, "attention": "explicit", "seed": seed, "optimizer": moved}
    ways |= WSD | variant.get("train", {})
    n_steps = updates
    if not updates:
        each = TrainOptions(n_steps=1, n_pass=dataset.n_sequences, **ways)
        timing = measure(params, config, dataset.sequences(range(dataset.n_sequences)), each)
        n_steps = int(0.9 * 60 * minutes / timing.update_seconds(dataset.n_sequences))
    options = TrainOptions(n_steps=n_steps, **ways)
    state, seconds, losses = init_state(params, config, options), [], []
    for record in train(params, config, dataset.batch, state, options):
        seconds.append(record["seconds"])
        losses.append(record["loss"])
        watch(state.step, n_steps, losses[-1])
    return seconds, losses


def peer(params, config, dataset, variant, seed, minutes, updates, compiled, watch):
    """The same as nanoGPT does it, by modules and AdamW, warm-up and cosine; its weights are left in params."""
    model = ModuleGPT(config)
    model.load(params)
    step = module_step(model, compiled=compiled, autocast=True)
    n_steps = updates
    if not updates:
        trial = ModuleGPT(config)
        trial.load(params)
        trying, tried = module_step(trial, compiled=compiled, autocast=True), []
        for n in range(12):
            began = time.perf_counter()
            trying(*dataset.batch(n))
            tried.append(time.perf_counter() - began)
        n_steps = int(0.9 * 60 * minutes / statistics.median(tried[2:]))
    seconds, losses = [], []
    for n in range(n_steps):
        for group in step.optimizer.param_groups:
            group["lr"] = variant["peer"] * optim.warmup_cosine(n, n_steps=n_steps)
        began = time.perf_counter()
        losses.append(step(*dataset.batch(n)))
        seconds.append(time.perf_counter() - began)
        watch(n + 1, n_steps, losses[-1])
    for (name, leaf), value in zip(tree.walk(params), tree.leaves(model.params()), strict=True):
        assert leaf.shape == value.shape, name
        leaf.detach().copy_(value)
    return seconds, losses


def table(rows):
    """The rows' mean bits per byte by variant, with the interval of the mean over seeds (Student's t, 95 %)."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        bits = [row["bits_per_byte"] for row in mine]
        error = t.get(len(bits), 1.96) * statistics.stdev(bits) / len(bits) ** 0.5 if len(bits) > 1 else float("nan")
        speed = statistics.median(row["tokens_per_second"] for row in mine)
        last = mine[-1]
        yield (
            f"{name:<26} {statistics.mean(bits):.4f} +- {error:.4f} ({len(bits)} seeds)  {speed:>8,.0f} tok/s  "
            f"{last['updates']:>5} updates  train {last['train_loss']:.3f} held-out {last['validation_loss']:.3f}"
        )


@click.command()
@click.option("--variant", type=click.Choice(list(VARIANTS)), multiple=True, help="Which variants (default: all).")
@click.option("--seed", type=int, multiple=True, default=(1,), show_default=True, help="Which seeds.")
@click.option("--minutes", type=click.FloatRange(min=0.1), help="Training time of each.")
@click.option("--updates", type=click.IntRange(min=2), help="Updates of each, instead of minutes.")
@click.option("--compiled/--eager", default=True, show_default=True, help="Compile the update.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: all cores).")
@click.option("--cache", default="data", show_default=True, help="Where the text is kept.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Read and write the results there.")
def main(variant, seed, minutes, updates, compiled, threads, cache, file):
    """Train every variant with every seed, and show the table."""
    if bool(minutes) == bool(updates):
        raise click.UsageError("expected --minutes or --updates")
    torch.set_num_threads(threads or torch.get_num_threads())
    keep_memory_()
    found = {"rows": []}
    if file and Path(file).exists():
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    found |= {"machine": card_name("cpu"), "torch": torch.__version__, "python": platform.python_version()}
    for name in variant or VARIANTS:
        for number in seed:
            asked = {"variant": name, "seed": number, "minutes": minutes, "asked_updates": updates}
            asked["threads"] = torch.get_num_threads()
            if any(asked.items() <= row.items() for row in found["rows"]):
                continue

            def watch(step, n_steps, loss, name=name, number=number):
                if step % 50 == 0:
                    click.echo(f"  {name}, seed {number}: update {step} of {n_steps}, loss {loss:.3f}", err=True)

            found["rows"].append(asked | run(VARIANTS[name], number, minutes, updates, compiled, cache, watch))
            click.echo(next(table(found["rows"][-1:])))
            if file:
                Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    same = {"minutes": minutes, "asked_updates": updates}
    click.echo("\n".join(table([row for row in found["rows"] if same.items() <= row.items()])))


if __name__ == "__main__":
    main()
