"""From a command line to a run that is ready for its next update: a new one, or one that was stopped.

The order of things: read the text, choose the sizes, draw the weights, measure this machine on copies of them, and
freeze the plan in run.json. What a run is made of stands there before its first update and never changes, so a resumed
run is the same run and needs no second measurement.
"""

import importlib.metadata
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from gptcore import checkpoint, device, optim, tokenizer, tree
from gptcore.config import ModelConfig, architecture, padded_vocab
from gptcore.data import Dataset, prepare
from gptcore.data import reopen as reopen_data
from gptcore.data.streamed import choose as choose_source
from gptcore.evaluate.perplexity import score_documents
from gptcore.generate import GenerateOptions, generate
from gptcore.model import check_params, count_params, init_params
from gptcore.train import TrainOptions, TrainState, copy_of, gradients_, init_state, measure
from tools import fetching, finetuning
from tools.machine import set_up
from tools.modes import ACCUMULATION, MICRO_BATCH, MODES, PROMPTS, RATES
from tools.tables import start_table
from tools.view import busy, duration

LEAST_SCORED = 8192  # held-out tokens of a validation, however short the run: fewer would say little
COMPILE_PAYS = 120.0  # seconds of planned training from which compiling is worth its wait
FREE_ON_RESUME = {
    "resume",
    "device",
    "threads",
    "compile_",
    "no_compile",
    "save_every",
    "cache",
    "cache_gb",
    "offline",
    "debug",
}


@dataclass
class Job:
    """A run and everything that is at work on it."""

    path: Path
    run: dict  # run.json
    config: ModelConfig
    params: dict
    state: TrainState
    options: TrainOptions
    dataset: Dataset
    device: torch.device
    peak: float  # FLOP/s that a matrix product reaches here
    save_every: int  # updates
    debug: bool = False
    known: dict = field(default_factory=dict)  # the last losses: what state.json keeps beside the weights


def begin(given, console, chosen=frozenset()) -> Job:
    """Read, draw, measure, freeze: a run folder that has everything but its first update.

    chosen are the names of the options that were typed.
    """
    mode = MODES[given["mode"]] | (finetuning.DEFAULTS if given["init"] else {})
    if "mode" in chosen and given["init"]:  # its length was asked for
        mode |= {name: MODES[given["mode"]][name] for name in ("minutes", "epochs")}
    pick = lambda name: mode[name] if given[name] is None else given[name]
    refuse(given, pick)
    base = finetuning.open_base(given, chosen) if given["init"] else None
    place = set_up(given)
    device.keep_memory_()
    if not base:
        which = "" if "mode" in chosen else ", the default (--mode quick is done in minutes)"
        tell(console, f"Mode: {given['mode']}{which}")
    tell(console, f"Device: {device.backend_name(place)}, {device.card_name(place)}")
    for line in finetuning.refuse_memory(base, given, place) if base else ():
        tell(console, line)
    accumulation = given["accumulation_steps"] or mode.get("accumulation", ACCUMULATION)
    dataset = read_text(given, mode, accumulation, base, console)
    if base:
        config, params = base.config, finetuning.weights(base, given, place)
    else:
        config = choose_config(given, pick, dataset.tokenizer.n_vocab, dataset.n_context)
        params = tree.map(lambda leaf: leaf.to(place), init_params(config, device.generator(given["seed"], "init")))
    options = choose_options(given, mode)
    length = Length(
        epochs=pick("epochs"), minutes=None if given["steps"] else pick("minutes"), steps=given["steps"],
        n_windows=dataset.n_windows, n_micro=max(1, MICRO_BATCH // dataset.n_context), accumulation=accumulation,
        least_updates=0 if given["accumulation_steps"] or given["steps"] else mode["least_updates"],
    )  # fmt: skip
    timing, compiling = calibrate(params, config, dataset, options, given, length, console)
    accumulation, n_steps = length.fit(timing)
    epochs, minutes, n_micro = length.epochs, length.minutes, length.n_micro
    dataset = dataset.with_sequences(n_micro * accumulation)
    n_pass = min(timing.options.n_pass, dataset.n_sequences)
    options = replace(timing.options, n_steps=n_steps, n_pass=n_pass)
    seconds = n_steps * timing.update_seconds(dataset.n_sequences)
    ends = epoch_ends(n_steps, epochs)
    n_scored = min(dataset.n_validation_tokens, max(dataset.n_context, pick("tokens_per_epoch") // 10))
    if minutes:
        n_scored = min(n_scored, affordable(dataset, params, config, 6 * minutes / len(ends)))
    run = {
        "version": 1, "mode": "tuned" if base else given["mode"],
        "config": asdict(config), "options": dump_options(options),
        "seed": given["seed"], "plan": dataset.plan, "n_steps": n_steps, "epochs": len(ends), "epoch_ends": ends,
        "minutes": minutes, "accumulation_steps": accumulation, "estimated_seconds": round(seconds, 1),
        "arch": pick("arch"), "n_params": count_params(config), "n_train_tokens": dataset.n_train_tokens,
        "n_windows": dataset.n_windows, "n_validation_tokens": n_scored,
        "tokenizer": {"name": dataset.tokenizer.name, "fingerprint": dataset.tokenizer.fingerprint},
        "machine": machine(place, options), "argv": sys.argv[1:],
    } | (finetuning.facts(base, given) if base else {})  # fmt: skip
    path = checkpoint.create_run("runs", given["run"], run, dataset.tokenizer)
    fetching.pin(given["cache"], path, run)
    dataset = replace(dataset, tokenizer=dataset.tokenizer.with_rows(config.n_vocab))
    state = init_state(params, config, options)
    if base and (known := finetuning.moments(base, given, options.optimizer.kind)):
        optim.load_state_(state.optimizer, known)
        tell(console, "AdamW goes on with the moments that the import brought.")
    save_every = given["save_every"] or max(1, round(60 / timing.update_seconds(dataset.n_sequences)))
    peak = device.gemm_peak(place, getattr(torch, options.dtype))
    job = Job(path, run, config, params, state, options, dataset, place, peak, save_every, given["debug"])
    console.print(start_table(job, compiling))
    long = " More than an hour: --mode quick is done in minutes." if seconds > 3600 else ""
    line = f"About {duration(seconds)} of training, {n_steps:,} updates.{long}"
    tell(console, line)
    checkpoint.append_metrics(path, {"kind": "start", "step": 0, "time": time.time()})
    return job


def refuse(given, pick) -> None:
    """Raise ValueError for what can be seen to be wrong before anything is read or written."""
    if given["steps"] and given["minutes"]:
        raise ValueError("steps: expected --steps or --minutes, got both")
    if given["run"] is not None:
        checkpoint.check_new_name("runs", given["run"])
    if given["init"]:
        return
    if given["lora"]:
        raise ValueError("lora: expected --init RUN beside it, got none")
    choose_config(given, pick, n_vocab=1, n_context=given["n_context"])


def read_text(given, mode, accumulation, base, console):
    """The dataset, with a line for each thing the user should know."""
    n_context = min(given["n_context"], base.config.n_context) if base else given["n_context"]
    ways = {
        "n_context": n_context, "n_sequences": max(1, MICRO_BATCH // n_context) * accumulation,
        "seed": given["seed"], "cache": given["cache"], "text_field": given["text_field"], "packing": given["packing"],
        "tokens_per_epoch": given["tokens_per_epoch"] or mode["tokens_per_epoch"],
        "mix": weights(given["mix"]), **fetching.ways(given, mode["cache_gb"]),
    }  # fmt: skip
    chosen = base.tokenizer if base else choose_tokenizer(given["tokenizer"], mode, console)
    sources = list(given["data"]) or ["auto"]
    if "auto" in sources:
        found, why = choose_source(chosen, ways["tokens_per_epoch"], cache=given["cache"])
        tell(console, f"Data: {found}, because {why}")
        sources = [found if source == "auto" else source for source in sources]
    with fetching.shown(console, "Reading the text") as watch:
        dataset = prepare(sources, chosen, watch=watch, **ways)
    for note in dataset.notes:
        tell(console, note)
    return dataset


def weights(text) -> list[float] | None:
    """--mix as numbers. Raises ValueError for other words."""
    try:
        return text and [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"mix: expected numbers with commas, as in 0.7,0.3, got {text!r}") from None


def choose_tokenizer(name, mode, console):
    """What prepare is given: a tokenizer, or bpe:N, which only the text can make."""
    automatic = name == "auto"
    name = mode["tokenizer"] if automatic else name
    if re.fullmatch(r"bpe:[0-9]+", name):
        return name
    try:
        return tokenizer.named(name)
    except ValueError as error:
        if not automatic:
            raise
        tell(console, f"{error}; using bpe:4096")
        return "bpe:4096"


def choose_config(given, pick, n_vocab, n_context) -> ModelConfig:
    """The architecture by name, with the mode's sizes and whatever the command line overrides."""
    sizes = {name: pick(name) for name in ("n_layer", "d_model", "n_head")}
    ours = given["d_model"] in (None, MODES[given["mode"]]["d_model"])
    sizes["d_ff"] = given["d_ff"] or (MODES[given["mode"]]["d_ff"] if ours else 4 * sizes["d_model"])
    asked = {"n_kv_head": given["n_kv_head"], "position": given["position_encoding"], "dropout": given["dropout"]}
    sizes |= {name: value for name, value in asked.items() if value is not None}
    n_rows = padded_vocab(n_vocab)
    return architecture(pick("arch"), n_vocab=n_vocab, n_vocab_padded=n_rows, n_context=n_context, **sizes)


def affordable(dataset, params, config, seconds) -> int:
    """How many held-out tokens can be scored, beside writing the samples, in so many seconds; LEAST_SCORED at least."""
    eot, n_tried = dataset.tokenizer.eot, min(4096, dataset.n_validation_tokens)

    def score():
        score_documents(
            params, config, dataset.validation, eot=eot, token_bytes=dataset.tokenizer.n_bytes, max_tokens=n_tried
        )

    def speak():  # a tenth of the samples
        list(generate(params, config, [[eot]] * len(PROMPTS), GenerateOptions(max_new_tokens=10)))

    score(), speak()  # once to warm up
    began = time.perf_counter()
    score()
    scored = time.perf_counter()
    speak()
    left = seconds - 10 * (time.perf_counter() - scored)
    return max(LEAST_SCORED, int(n_tried * left / (scored - began)))


def epoch_ends(n_steps, epochs) -> tuple[int, ...]:
    """The counts of finished updates at which an epoch ends; the last one is the run's end."""
    return tuple(sorted({max(1, round((epoch + 1) * n_steps / epochs)) for epoch in range(epochs)}))


def choose_options(given, mode) -> TrainOptions:
    """What moves the weights: the mode's choices, and whatever the command line overrides. The length comes later."""
    kind = given["optimizer"] or mode.get("optimizer", "adamw")
    asked = {"lr": given["lr"], "muon_lr": given["muon_lr"], "weight_decay": given["weight_decay"]}
    lr = finetuning.RATES["lora" if given["lora"] else "full"] if given["init"] else RATES[kind]
    ours = kind == mode.get("optimizer") and not given["init"]
    decay = {"weight_decay": mode["weight_decay"]} if ours and "weight_decay" in mode else {}
    rates = {"lr": lr, **decay} | {name: value for name, value in asked.items() if value is not None}
    schedule = given["schedule"] or mode.get("schedule", "cosine")
    return TrainOptions(
        n_steps=1, clip=given["clip"], seed=given["seed"], schedule=schedule, warmup=mode.get("warmup", 0.05),
        recompute=given["recompute"], optimizer=optim.Options(kind=kind, **rates),
    )  # fmt: skip


@dataclass(frozen=True)
class Length:
    """How long a run was asked to be."""

    epochs: int
    minutes: float | None
    steps: int | None
    n_windows: int  # sequences of an epoch
    n_micro: int  # sequences of a micro-batch
    accumulation: int  # micro-batches an update, at most
    least_updates: int  # below which an update takes fewer micro-batches

    def fit(self, timing) -> tuple[int, int]:
        """(micro-batches an update, number of updates) on a machine of that speed."""
        accumulation = self.accumulation
        while True:
            n_sequences = self.n_micro * accumulation
            n_steps = self.steps or max(1, self.epochs * self.n_windows // n_sequences)
            if self.minutes:
                fitting = int(0.9 * 60 * self.minutes / timing.update_seconds(n_sequences))
                n_steps = max(1, min(n_steps, fitting))
            if n_steps >= self.least_updates or accumulation == 1:
                return accumulation, n_steps
            accumulation //= 2


def calibrate(params, config, dataset, options, given, length, console):
    """Measure this machine on copies of the weights -> (the timing of the way to train, a line on compiling).

    Chosen here: the number format, sequences a pass, compiled or not. On a CPU short sequences take the explicit
    attention, which a compiled graph fuses better than the kernel for long ones. What was measured leaves no trace.
    A run of --steps races no two formats, so that the same command makes the same weights again.
    """
    place = params["embed"]["w"].device
    most = max(1, (4096 if place.type == "cpu" else 16_384) // dataset.n_context)  # sequences that keep the cores busy
    formats = [given["dtype"]]
    if given["dtype"] == "auto":
        formats = ["bfloat16"] if device.multiplies_bfloat16(place) else ["float32"]
        if formats == ["bfloat16"] and place.type == "cpu":
            small = config.d_model < 128  # below it, casting costs more than the products save
            formats = ["bfloat16", "float32"] if not length.steps else ["float32"] if small else ["bfloat16"]

    def timed(seconds, **ways):
        return measure(
            params, config, dataset.sequences(range(ways["n_pass"])), replace(options, **ways), seconds=seconds
        )

    n_pass = min(most, length.n_micro * length.accumulation)
    with busy(console, "Measuring this machine"):
        timings = [timed(1.5, n_pass=n_pass, dtype=dtype) for dtype in formats]
    eager = min(timings, key=lambda timing: timing.pass_seconds)
    accumulation, n_steps = length.fit(eager)
    n_pass = min(most, length.n_micro * accumulation)  # a graph is compiled for one size of pass
    planned = 60 * length.minutes if length.minutes else n_steps * eager.update_seconds(length.n_micro * accumulation)
    if given["compile_"] == "off":
        return eager, "no: --compile off"
    if given["compile_"] == "auto" and (planned < COMPILE_PAYS or place.type not in ("cpu", "cuda")):
        return eager, "no: the run is too short to pay for it" if planned < COMPILE_PAYS else "no: not on this device"
    if given["recompute"]:
        return eager, "no: --recompute"
    if given["compile_"] == "auto" and config.dropout:
        return eager, "no: dropout's masks take minutes to compile"
    began, timings = time.perf_counter(), [] if given["compile_"] == "on" else [eager]
    attention = "explicit" if place.type == "cpu" and dataset.n_context <= 512 else "fused"
    ways = {"n_pass": n_pass, "dtype": eager.options.dtype, "compiled": True, "attention": attention}
    with busy(console, f"Compiling the update ({attention} attention)"):
        if fault := compile_fault(params, config, dataset.sequences(range(n_pass)), replace(options, **ways)):
            tell(console, f"torch.compile cannot be used, training is eager: {fault}")
            return eager, "no: it cannot be used here"
        timings.append(timed(3.0, **ways))
    best = min(timings, key=lambda timing: timing.update_seconds(n_pass))
    took = f"{time.perf_counter() - began:.0f} s of trying"
    if not best.options.compiled:
        return best, f"no: eager is faster ({took})"
    return best, f"yes, {best.options.attention} attention ({took})"


def compile_fault(params, config, batch, options) -> str:
    """Why a compiled update cannot be used, in one line: it fails, or its loss is not the eager one within 2 % in
    bfloat16 and 1e-4 in float32. Empty if it can.
    """
    copy = copy_of(params, config)
    init_state(copy, config, options)
    loss = lambda compiled: gradients_(copy, config, batch, 0, replace(options, compiled=compiled)).item()
    try:
        compiled, eager = loss(True), loss(False)
    except torch._dynamo.exc.TorchDynamoException as error:
        return next(filter(None, str(error).splitlines()), type(error).__name__)
    tolerance = 0.02 if options.dtype == "bfloat16" else 1e-4
    same = abs(compiled - eager) <= tolerance * abs(eager)
    return "" if same else f"expected the eager loss {eager:.5f}, got {compiled:.5f}"


def machine(place, options) -> dict:
    """What a resumed run must find again to be the same bit for bit."""
    packages = ("torch", "numpy", "tiktoken", "tokenizers", "safetensors")
    return {
        "device": str(place), "backend": device.backend_name(place), "card": device.card_name(place),
        "threads": torch.get_num_threads(), "dtype": options.dtype, "compiled": options.compiled,
        "python": platform.python_version(), "packages": {name: importlib.metadata.version(name) for name in packages},
    }  # fmt: skip


def dump_options(options) -> dict:
    """TrainOptions as plain JSON; load_options is the way back."""
    return asdict(options) | {"optimizer": options.optimizer._asdict()}


def load_options(given) -> TrainOptions:
    """What dump_options wrote."""
    moved = given["optimizer"] | {"betas": tuple(given["optimizer"]["betas"])}
    return TrainOptions(**given | {"optimizer": optim.Options(**moved)})


def tell(console, line) -> None:
    """A line of plain text: wrapped on a terminal, whole in a log."""
    console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


# ---------------------------------------------------------------------------------------------------- an earlier run


def reopen(given, chosen, console) -> Job:
    """A run at its newest whole step. What run.json fixed cannot be given again: ValueError names it."""
    fixed = sorted(chosen - FREE_ON_RESUME)
    if fixed:
        names = ", ".join("--" + name.replace("_", "-") for name in fixed)
        raise ValueError(f"resume: expected no {names}, which run.json has fixed; start a new run to change it")
    step_dir, damaged = checkpoint.find_resumable(given["resume"])
    path = step_dir.parent.parent
    run, step = checkpoint.read_run(path), checkpoint.load_step(step_dir)
    if not run.get("plan"):
        hint = f"invoke train --init {path.name} --data FILE trains it on"
        raise ValueError(f"resume: expected a run with a text of its own, got {path.name}, which was imported; {hint}")
    config, at = checkpoint.read_config(path), step.state["step"]
    params = tree.overlay(checkpoint.load_base(path), step.params) if run.get("lora") else step.params
    check_params(tree.nest({name: leaf for name, leaf in tree.walk(params) if ".lora_" not in name}), config)
    if at >= run["n_steps"] and step.state.get("sampled_at") == at:
        raise ValueError(f"resume: expected a run that is not finished, got {path.name} at update {at:,}, its last")
    for line in damaged:
        tell(console, f"{line}; using {step_dir.name}")
    place = set_up(given)
    device.keep_memory_()
    tell(console, f"Device: {device.backend_name(place)}, {device.card_name(place)}")
    options = load_options(run["options"])
    if given["compile_"] != "auto":
        options = replace(options, compiled=given["compile_"] == "on")
    mode = MODES.get(run["mode"], MODES["medium"])  # a fine-tuning has none
    words, ways = tokenizer.load(path / "tokenizer.json"), fetching.ways(given, mode["cache_gb"])
    fetching.pin(given["cache"], path, run)
    with fetching.shown(console, "Reading the text") as watch:
        dataset = reopen_data(run["plan"], words, cache=given["cache"], watch=watch, **ways)
    dataset = replace(dataset, tokenizer=dataset.tokenizer.with_rows(config.n_vocab))
    params = tree.map(lambda leaf: leaf.to(place), params)
    if options.compiled:
        batch = tuple(part[: options.n_pass] for part in dataset.batch(0))
        if fault := compile_fault(params, config, batch, options):
            tell(console, f"torch.compile cannot be used, training is eager: {fault}")
            options = replace(options, compiled=False)
    state = init_state(params, config, options)
    optim.load_state_(state.optimizer, step.optimizer)
    state.step = at
    for name, now in machine(place, options).items():
        if now != run["machine"][name]:
            tell(console, f"{name} was {run['machine'][name]} and is {now}: the rest may differ in its last bits")
    checkpoint.sweep(path)
    checkpoint.point_at(step_dir)
    if not damaged and (gone := checkpoint.remove_later(step_dir)):  # of damaged ones something may still be read
        tell(console, f"{step_dir.name} was asked for: removed the later steps {', '.join(map(str, gone))}")
    checkpoint.append_metrics(path, {"kind": "resume", "step": state.step, "time": time.time()})
    console.print(f"Going on with {path.name} at update {state.step:,} of {options.n_steps:,}.", highlight=False)
    save_every = given["save_every"] or max(1, round(60 * options.n_steps / max(1, run["estimated_seconds"])))
    peak = device.gemm_peak(place, getattr(torch, options.dtype))
    return Job(path, run, config, params, state, options, dataset, place, peak, save_every, given["debug"], step.state)
