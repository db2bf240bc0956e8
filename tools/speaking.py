"""What invoke generate does: load a run, stream a text, keep up a conversation."""

import time
from dataclasses import replace
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from gptcore import checkpoint, device, engine, tree
from gptcore.config import ModelConfig
from gptcore.generate import GenerateOptions, generate, text_pieces
from gptcore.sampling import PRESETS, check_settings, with_strategy
from gptcore.tokenizer import Tokenizer
from tools.machine import set_up

REREAD = ", the context was full and its last half read again"
HELP = """Type a text and it is continued. An empty line does nothing; quit, exit or q ends; Ctrl-C stops a text."""


class Speaker(NamedTuple):
    """A run that is ready to speak."""

    name: str
    params: dict
    config: ModelConfig
    tokenizer: Tokenizer
    packed: engine.Packed | None  # the weights as the native decoder wants them, None where it does not serve


def choose_settings(given):
    """The preset, with what the command line overrides, and only what the strategy counts."""
    if given["preset"] not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {given['preset']}")
    own = {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p") if given[name] is not None}
    settings = PRESETS[given["preset"]]._replace(**own)
    check_settings(**settings._asdict())
    return with_strategy(given["strategy"], settings) if given["strategy"] else settings


def load(given) -> Speaker:
    """The run's model on the device, with the context that was asked for; ValueError names what does not fit."""
    model = checkpoint.load_model(given["run"], device=set_up(given))
    params, config, n_context = model.params, model.config, given["n_context"]
    if n_context and config.position == "learned":
        if n_context > config.n_context:
            got = f"{n_context}; positions beyond it were never learned"
            raise ValueError(f"n_context: expected at most {config.n_context}, got {got}")
        params = params | {"positions": {"w": params["positions"]["w"][:n_context]}}
    config = replace(config, n_context=n_context) if n_context else config
    params, packed = rounded(params, config, given)
    return Speaker(model.name, params, config, model.tokenizer, packed)


def rounded(params, config, given):
    """(params, packed): the weights in the dtype that was asked for, and laid out for the native decoder if it serves.

    int8 is the decoder's alone; the prompt is read with the numbers that its whole ones stand for, so that one model
    speaks. Raises ValueError where int8 was asked for and the decoder does not serve.
    """
    if given["dtype"] in ("float32", "bfloat16"):
        params = tree.map(lambda leaf: leaf.to(getattr(torch, given["dtype"])), params)
    others = given["engine"] in ("eager", "graph")
    forbidden = {f"--engine {given['engine']}": others, "--no-cache": given["no_cache"]}
    said = [f"{words} is given" for words, is_given in forbidden.items() if is_given]
    reason = said[0] if said else engine.why_not(params, config)
    if given["dtype"] != "int8":
        return params, None if reason else engine.pack(params, config)
    if reason:
        raise ValueError(f"dtype: expected float32 or bfloat16 without the native engine, got int8, but {reason}")
    packed = engine.pack(params, config, torch.int8)
    return engine.unpack(packed, config), packed


def make_options(given, settings, model) -> GenerateOptions:
    """What generate needs; a text ends at the end of text."""
    return GenerateOptions(
        sampling=settings, max_new_tokens=given["max_new_tokens"], seed=given["seed"],
        stop=(model.tokenizer.eot,), cached=not given["no_cache"], engine=given["engine"],
    )  # fmt: skip


def setting_line(model, given, settings) -> Text:
    """What is about to speak, and how."""
    words = [f"{name.replace('_', '-')} {value:g}" for name, value in settings._asdict().items()]
    place = device.backend_name(model.params["embed"]["w"].device) + (f", {given['dtype']}" if given["dtype"] else "")
    return Text(f"{model.name}, {place}: {given['preset']}, {', '.join(words)}, seed {given['seed']}")


def preset_table(presets):
    """Every preset with its values."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("preset", "top-k", "top-p", "temperature", "min-p"):
        table.add_column(column, justify="left" if column == "preset" else "right")
    off = lambda value, neutral: "-" if value == neutral else f"{value:g}"
    for name, s in presets.items():
        drawn = s.temperature != 0
        numbers = [off(s.top_k, 0), off(s.top_p, 1), f"{s.temperature:g}", off(s.min_p, 0)]
        table.add_row(name, *(numbers if drawn else ["-", "-", "0 (most likely)", "-"]))
    return table


def read_prompts(path) -> list[str]:
    """The lines of a UTF-8 file that are not blank. Raises ValueError for another file, or one of blank lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            prompts = [line.rstrip("\n") for line in file if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"prompts: expected UTF-8 text, got a binary file or another encoding in {path}") from None
    if not prompts:
        raise ValueError(f"prompts: expected a prompt a line, got none in {path}")
    return prompts


def encode(model, prompt) -> list[int]:
    """The prompt's ids; an empty prompt begins a new text."""
    return model.tokenizer.encode(prompt) or [model.tokenizer.eot]


def speak(model, prompt, options, stop, console) -> None:
    """The prompt and its continuation as it is made, then what it took."""
    ids = encode(model, prompt)
    n_new, n_again, began = 0, 0, time.perf_counter()

    def tokens():
        nonlocal n_new, n_again
        for step in generate(model.params, model.config, [ids], options, packed=model.packed):
            n_new, n_again = n_new + 1, n_again + step.reread
            if step.tokens[0] not in options.stop:
                yield step.tokens[0]

    write(console, prompt)
    try:
        for piece in text_pieces(tokens(), model.tokenizer, stop):
            write(console, piece)
    finally:
        write(console, "\n")
    seconds = time.perf_counter() - began
    line = (
        f"{len(ids):,} prompt tokens, {n_new:,} new, {n_new / seconds:,.0f} tokens a second{REREAD if n_again else ''}"
    )
    console.print(Text(line), style="#666666", soft_wrap=True)


def write(console, text) -> None:
    """The text itself: no markup, no wrapping, at once."""
    console.file.write(text)
    console.file.flush()


def speak_together(model, prompts, options, stop, console) -> None:
    """Several prompts at once, each text as if it were alone."""
    rows, n_again, began = [[] for _ in prompts], 0, time.perf_counter()
    ids = [encode(model, prompt) for prompt in prompts]
    for step in generate(model.params, model.config, ids, options, packed=model.packed):
        n_again += step.reread
        for row, token in zip(rows, step.tokens, strict=True):
            row += [token] if token >= 0 else []
    seconds = time.perf_counter() - began
    for prompt, row in zip(prompts, rows, strict=True):
        pieces = text_pieces((token for token in row if token not in options.stop), model.tokenizer, stop)
        write(console, prompt + "".join(pieces) + "\n" + "-" * 20 + "\n")
    n_new = sum(map(len, rows))
    line = f"{len(prompts)} texts, {n_new:,} new tokens, {n_new / seconds:,.0f} a second"
    line += REREAD if n_again else ""
    console.print(Text(line), style="#666666", soft_wrap=True)


def loop(model, options, given, console) -> int:
    """Prompt after prompt, until the user has enough; a text that is stopped or fails ends that text alone."""
    while True:
        try:
            prompt = input(">>> ")
        except EOFError:
            write(console, "\n")
            return 0
        if prompt.strip() in ("quit", "exit", "q"):
            return 0
        if prompt.strip() == "help":
            console.print(Text(HELP), soft_wrap=True)
            console.print(setting_line(model, given, options.sampling), soft_wrap=True)
        elif prompt.strip():
            try:
                speak(model, prompt, options, given["stop"], console)
            except KeyboardInterrupt:
                console.print(Text("stopped"), style="#666666")
            except ValueError as error:
                console.print(Text(str(error)), style="yellow", soft_wrap=True)
