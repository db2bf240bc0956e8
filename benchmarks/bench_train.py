"""A training step against the same model written with torch.nn modules as nanoGPT does it, in turns, in one process.

    python benchmarks/bench_train.py [--json benchmarks/results/train.json] [--shape small] [--steps 12] [--profile]

Both sides: the same weights and batches, bfloat16 compute, torch.compile, clipping at 1.0, fused AdamW, as many rows in
the embedding, and an allocator that keeps its memory (device.keep_memory_), which helps both. A third side is the peer
in float32, not compiled. Losses are compared before anything is timed; the figure is the ratio, of the best and of the
median step. The limit is a step of nothing but matrix products, at the speed of the best of them. --profile tells
afterwards where our step's time goes. GPTCORE_KERNELS=reference shows what the native pass over the logits is worth.

Did not help: torch.compile for the pass over the logits; transparent huge pages (THP_MEM_ALLOC_ENABLE=1).
"""

import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from peers import ModuleGPT, module_step

from gptcore import optim, tree
from gptcore.config import architecture, padded_vocab
from gptcore.device import card_name, gemm_peak, generator, keep_memory_
from gptcore.model import init_params
from gptcore.train import TrainOptions, flops_per_token, init_state, train_step_

SHAPES = {
    "small": {"n_vocab": 8192, "d_model": 128, "n_layer": 4, "n_context": 256, "rows": 16},
    "large-vocabulary": {"n_vocab": 100_277, "d_model": 256, "n_layer": 4, "n_context": 128, "rows": 8},
}


def contestants(config, compiled):
    """{name: step(tokens, targets) -> loss}: ours with both ways of attention, and the peer."""
    fresh = init_params(config, generator(1))
    sides = {}
    for attention in ("explicit", "fused"):
        params = tree.map(torch.clone, fresh)
        options = TrainOptions(
            n_steps=10**9,
            warmup=0.0,
            dtype="bfloat16",
            compiled=compiled,
            attention=attention,
            optimizer=optim.Options(),
        )
        state = init_state(params, config, options)
        sides[f"gptcore, {attention}"] = lambda tokens, targets, p=params, s=state, o=options: train_step_(
            p, config, (tokens, targets), s, o
        )["loss"]
    models = [ModuleGPT(replace(config, n_vocab=config.n_vocab_padded)) for _ in range(2)]
    for model in models:
        model.load(fresh)
    plain = module_step(models[1], compiled=False, autocast=False)
    return sides | {
        "modules": module_step(models[0], compiled=compiled, autocast=True),
        "modules, float32 eager": plain,
    }


def race(sides, batches, n_steps):
    """Seconds of each step of each side, in turns; the first two steps, in which a side compiles, are apart."""
    first = {}
    for name, step in sides.items():
        began = time.perf_counter()
        losses = [step(*batches[0]), step(*batches[1])]
        first[name] = {"losses": losses, "seconds": time.perf_counter() - began}
    start = first["modules"]["losses"][0]
    for name, side in first.items():
        if abs(side["losses"][0] - start) > 0.01 * start:
            raise SystemExit(
                f"{name}: first loss {side['losses'][0]:.4f}, the peer's is {start:.4f}: not the same model"
            )
    names, seconds = list(sides), {name: [] for name in sides}
    for n in range(n_steps):
        first_side = n % len(sides)  # no side always goes first
        for name in (*names[first_side:], *names[:first_side]):
            began = time.perf_counter()
            sides[name](*batches[n % len(batches)])
            seconds[name].append(time.perf_counter() - began)
    return first, seconds


def profile(step, batches):
    """(milliseconds a step, operator), its own time on the thread that calls it, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for batch in batches:
            step(*batch)
    rows = ((row.self_cpu_time_total / 1e3 / len(batches), row.key) for row in seen.key_averages())
    return sorted(rows, reverse=True)


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), multiple=True, default=list(SHAPES), help="Which shapes.")
@click.option("--steps", type=click.IntRange(min=2), default=12, show_default=True, help="Timed steps a side.")
@click.option("--eager", is_flag=True, help="Neither side compiled.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads (default: all cores).")
@click.option("--profile", "profiled", is_flag=True, help="Also tell how long our step is in which operator.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Also write the result there.")
def main(shape, steps, eager, threads, profiled, file):
    """Race a training step against its peer."""
    torch.set_num_threads(threads or torch.get_num_threads())
    keep_memory_()
    result = {
        "command": "python benchmarks/bench_train.py", "machine": card_name("cpu"), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "load": os.getloadavg(), "compiled": not eager,
        "shapes": {},
    }  # fmt: skip
    for name in shape:
        sizes = dict(SHAPES[name])
        rows = sizes.pop("rows")
        config = architecture("gpt2", n_vocab_padded=padded_vocab(sizes["n_vocab"]), **sizes)
        draw = torch.Generator().manual_seed(0)
        batches = [
            tuple(torch.randint(config.n_vocab, (rows, config.n_context), generator=draw) for _ in range(2))
            for _ in range(4)
        ]
        sides = contestants(config, not eager)
        first, seconds = race(sides, batches, steps)
        peak, n_tokens = gemm_peak("cpu", torch.bfloat16), rows * config.n_context
        table = {}
        for side, times in seconds.items():
            best, median = min(times), statistics.median(times)
            table[side] = {
                "best_tokens_per_second": n_tokens / best, "median_tokens_per_second": n_tokens / median,
                "ratio_of_bests": min(seconds["modules"]) / best,
                "ratio_of_medians": statistics.median(seconds["modules"]) / median,
                "ratio_to_float32_eager": statistics.median(seconds["modules, float32 eager"]) / median,
                "share_of_gemm_peak": flops_per_token(config, config.n_context) * n_tokens / best / peak,
                "first_two_steps_seconds": first[side]["seconds"], "first_loss": first[side]["losses"][0],
            }  # fmt: skip
        limit = peak / flops_per_token(config, config.n_context)
        bound = limit / table["modules"]["best_tokens_per_second"]
        facts = {"gemm_peak": peak, "limit_tokens_per_second": limit, "largest_possible_ratio": bound}
        result["shapes"][name] = {"sizes": sizes | {"rows": rows}, **facts, "sides": table}
        click.echo(
            f"{name}: {sizes | {'rows': rows}}, bf16 GEMM peak {peak / 1e9:.0f} GFLOP/s: at most {limit:,.0f} tok/s, "
            f"x{bound:.2f} of the peer"
        )
        for side, row in table.items():
            click.echo(
                f"  {side:<22} {row['best_tokens_per_second']:>9,.0f} best "
                f"{row['median_tokens_per_second']:>9,.0f} median tok/s  "
                f"x{row['ratio_of_bests']:.2f} x{row['ratio_of_medians']:.2f} of the peer  "
                f"x{row['ratio_to_float32_eager']:.2f} of float32 eager  "
                f"{100 * row['share_of_gemm_peak']:.0f} % of peak  (compiled in {row['first_two_steps_seconds']:.0f} s)"
            )
        for milliseconds, operator in profile(sides["gptcore, explicit"], batches)[:12] if profiled else ():
            click.echo(f"  {milliseconds:>8.1f} ms a step  {operator}")
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
