"""Tables before and after a training: what the run is made of, and what came out."""

import math

import torch
from rich import box
from rich.table import Table

from gptcore import checkpoint
from gptcore.lora import trained_spec
from gptcore.train import look
from tools.view import duration, fact_table, panel, perplexity


def start_table(job, compiling):
    """What the run is made of; every number stands in run.json too."""
    config, run, data, options = job.config, job.run, job.dataset, job.options
    optimizer, spec = options.optimizer, trained_spec(job.params, config)
    counts = {
        decay: sum(math.prod(leaf.shape) for leaf in spec.values() if leaf.decay is decay) for decay in (True, False)
    }
    share = lambda decay: f"{counts[decay]:,} ({100 * counts[decay] / sum(counts.values()):.1f} %)"
    about = data.plan["about"]
    update_tokens = data.n_sequences * data.n_context
    passes = options.n_steps * data.n_sequences / data.n_windows
    warmup = int(options.warmup * options.n_steps)
    heads = f"{config.n_head}" + (
        f" ({config.n_kv_head} for keys and values)" if config.n_kv_head != config.n_head else ""
    )
    return fact_table(
        f"{job.path}",
        {
            "data": about["corpus"],
            "training": f"{run['n_train_tokens']:,} tokens, {run['n_windows']:,} sequences of {data.n_context}",
            "validation": f"{run['n_validation_tokens']:,} tokens of {data.n_validation_tokens:,} held out",
            "shards": data.plan["folder"],
            "licence": about["licence"],
            "tokenizer": f"{data.tokenizer.name}, {data.tokenizer.n_vocab:,} ids",
            "model": f"{run['arch']}, {run['n_params']:,} parameters"
            + (f", {sum(counts.values()):,} of LoRA learn" if "lora" in run else ""),
            "sizes": f"{config.n_layer} blocks, width {config.d_model}, MLP {config.d_ff}, heads {heads}",
            "positions": f"{config.position}, dropout {config.dropout:g}",
            "update": f"{update_tokens:,} tokens, accumulation {run['accumulation_steps']}",
            "pass": f"{options.n_pass} sequences in {options.dtype}; compiled: {compiling}",
            "decayed": f"{share(True)} by {optimizer.weight_decay:g}",
            "not decayed": share(False),
            "optimizer": f"{optimizer.kind}, peak rate {optimizer.lr:g}"
            + (f", matrices {optimizer.muon_lr:g}" if optimizer.kind == "muon" else ""),
            "schedule": f"{options.schedule}, {options.n_steps:,} updates, {warmup:,} warm-up, floor {options.floor:g}",
            "epochs": f"{run['epochs']}, together {passes:.2f} passes over the text",
        },
    )


def site_table(job):
    """The first update's sites, from token ids to logits."""
    batch = job.dataset.batch(job.state.step)
    low, high = batch[0].min().item(), batch[0].max().item()
    table = Table(box=box.SIMPLE_HEAD, title=f"token ids {low}..{high} of {job.config.n_vocab}", title_justify="left")
    for column in ("site", "min", "max", "mean", "NaN", "inf"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for site, stats in look(job.params, job.config, batch, job.state.step, job.options):
        numbers = [f"{stats[name]:.4g}" for name in ("min", "max", "mean")]
        table.add_row(site, *numbers, str(stats["n_nan"]), str(stats["n_inf"]))
    return table


def final_panel(job, reason):
    """What came out, and the commands that use it."""
    known, name, ends = job.known, job.path.name, job.run["epoch_ends"]
    worked = [row for row in checkpoint.read_metrics(job.path) if row["kind"] in ("train", "validation")]
    done = sum(job.state.step >= end for end in ends)
    lines = [
        f"{job.path} at update {job.state.step:,} of {job.options.n_steps:,}",
        f"{duration(sum(row['seconds'] for row in worked))}, {done} of {len(ends)} epochs",
    ]
    if "train_loss" in known:
        lines += [f"train loss {known['train_loss']:.4f}, perplexity {perplexity(known['train_loss'])}"]
    if "validation_loss" in known:
        bits = f"{known['bits_per_byte']:.3f} bits per byte"
        loss = known["validation_loss"]
        lines += [f"validation loss {loss:.4f}, perplexity {perplexity(loss)}, {bits}"]
        lines += [f"best step {checkpoint.marked(job.path, 'best')}"]
    if job.device.type == "cuda":
        lines += [f"peak GPU memory {torch.cuda.max_memory_allocated(job.device) / 1e9:.2f} GB"]
    if reason == "end":
        commands = [f"invoke generate --run {name} --preset balanced", f"invoke runs --run {name}"]
    else:
        commands = [f"invoke train --resume {name}"]
    return panel("Done" if reason == "end" else f"Stopped by {reason}, saved", lines, commands)
