"""Run folders: what a run was told, what it measured, and every state it can go on from.

What you learn here: how to write files so that a crash at any moment loses nothing. Everything is written under a
temporary name, flushed to the disk and renamed; state.json, with the sha256 of its neighbours, comes last, so a step
folder is either whole or does not exist. Weights are safetensors and the rest is JSON: nothing is ever pickled.

    runs/<name>/run.json  tokenizer.json  metrics.jsonl  latest  best
    runs/<name>/checkpoints/step-0001000/{model,optimizer,rng}.safetensors  state.json
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from gptcore import files, tokenizer, tree
from gptcore.config import ModelConfig
from gptcore.lora import merge
from gptcore.model import check_params

VERSION = 1  # of this layout, in every state.json
KEEP = 3  # saves that are not the end of an epoch: how many stay
PARTS = ("model", "optimizer", "rng")
DTYPES = {  # as safetensors spells them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Later(NamedTuple):
    """A leaf of a tree to be saved that is made when it is written, so that not all of them need to be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class Step(NamedTuple):
    """Everything a saved step holds: training goes on from it as if nothing had happened."""

    params: dict[str, Any]
    optimizer: dict[str, Tensor]  # "blocks.0.attn.q.w/exp_avg" -> its state
    rng: dict[str, Tensor]  # the state of each generator the run owns, uint8
    state: dict[str, Any]  # step, epoch, tokens, losses, rate


class StepInfo(NamedTuple):
    """A saved step as a listing needs it; no weights were read."""

    path: Path
    step: int
    state: dict[str, Any]
    n_bytes: int


class RunInfo(NamedTuple):
    """A run as a listing needs it. latest and best are step numbers, None where there is none yet."""

    path: Path
    run: dict[str, Any]
    steps: list[StepInfo]
    latest: int | None
    best: int | None
    damaged: list[str]  # one line for each run.json or state.json that cannot be read; run is {} without its own


# Creating a run


def next_name(root, mode) -> str:
    """The first free name of the row quick-001, quick-002, ... in the folder root."""
    taken = {path.name for path in Path(root).glob(f"{mode}-*")}
    return next(name for n in range(1, len(taken) + 2) if (name := f"{mode}-{n:03d}") not in taken)


def check_new_name(root, name) -> None:
    """Raise ValueError unless name is a plain one for a folder that root does not hold yet, and no step's."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"run: expected a plain name for a new folder, got {name!r}")
    if name.startswith("step-"):  # RUN may be a step folder, which is known by its name
        raise ValueError(f"run: expected a name that does not begin with step-, got {name}")
    if Path(root, name).exists():
        raise ValueError(f"run: expected a new name, got {name}, which exists in {root}")


def create_run(root, name, run, tokenizer) -> Path:
    """Make the folder root/name with run.json and tokenizer.json, complete or not at all; neither changes again.

    name None: next_name of run["mode"]. run is a dict of plain JSON, tokenizer anything with save(path). Raises
    ValueError if name is taken or not a name.
    """
    if name is not None:
        check_new_name(root, name)
    Path(root).mkdir(parents=True, exist_ok=True)
    while True:
        path = Path(root, next_name(root, run["mode"]) if name is None else name)
        try:
            path.mkdir()  # two processes cannot both make it
            break
        except FileExistsError:
            if name is not None:
                raise ValueError(f"run: expected a new name, got {name}, which exists in {root}") from None
    try:
        (path / "checkpoints").mkdir()
        tokenizer.save(path / "tokenizer.json")
        files.sync(path / "tokenizer.json")
        files.write_whole(path / "run.json", json.dumps(run, indent=1) + "\n")  # last: without it the folder is no run
        files.sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def read_run(run_dir) -> dict[str, Any]:
    """What run.json says. Raises ValueError naming the file if it is missing or not JSON."""
    return _read_json(Path(run_dir) / "run.json")


def read_config(run_dir) -> ModelConfig:
    """The model that run.json describes. Raises ValueError naming the file if it describes none."""
    try:
        return ModelConfig(**read_run(run_dir)["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{Path(run_dir, 'run.json')}: expected the config of a model, got {error}") from None


def sweep(run_dir) -> None:
    """Remove what a killed process left in a run: half-written steps and a torn last line of metrics.jsonl.

    For the one process that is about to write to the run.
    """
    run_dir = Path(run_dir)
    files.sweep(run_dir)
    files.sweep(run_dir / "checkpoints")
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        with open(metrics, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


# Saving a step


def save_step(run_dir, step, *, params, optimizer, rng, state) -> Path:
    """Write a step so that it is whole or does not exist, and make it the run's latest; returns its folder.

    params is a tree, for a new step with leaves that may be Later; optimizer and rng are flat dicts of tensors; state
    is a dict of plain JSON, in which epoch_end=True keeps the step for good and best_step names the best one so far.
    Where the same tensors are there already, only what is known about them is written again. Raises OSError with the
    file's name when the disk refuses; earlier steps are untouched then.
    """
    run_dir = Path(run_dir)
    path = run_dir / "checkpoints" / step_name(step)
    head = {"version": VERSION, "step": step}
    seal = lambda sums: json.dumps(_sealed(head | state | head | {"files": sums}), indent=1) + "\n"
    parts = dict(zip(PARTS, (dict(tree.walk(params)), optimizer, rng), strict=True))
    if _holds(path, parts):  # more may be known by now, a validation say: state.json alone is replaced, at once
        text = seal(read_state(path)["files"])
        if text != (path / "state.json").read_text(encoding="utf-8"):
            files.write_whole(path / "state.json", text)
    else:
        about = {"version": VERSION, "config": read_run(run_dir).get("config")}
        with files.whole_folder(path) as folder:
            for part, leaves in parts.items():  # names: the file has its own order, but sums depend on ours
                write_tensors(
                    folder / f"{part}.safetensors", leaves, {"gptcore": json.dumps(about | {"names": list(leaves)})}
                )
            paths = sorted(folder.iterdir())
            sums = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in paths}
            files.write(folder / "state.json", seal(sums))
    if (run_dir / "metrics.jsonl").exists():
        files.sync(run_dir / "metrics.jsonl")
    mark(run_dir, "latest", step)
    if state.get("best_step") == step:
        mark(run_dir, "best", step)
    return path


def mark(run_dir, word, step) -> None:
    """Let latest or best name this step."""
    if word not in ("latest", "best"):
        raise ValueError(f"mark: expected latest or best, got {word}")
    files.write_whole(Path(run_dir) / word, step_name(step) + "\n")


def marked(run_dir, word) -> int | None:
    """The step that latest or best names; None where nothing is named yet."""
    try:
        return int((Path(run_dir) / word).read_text(encoding="utf-8").strip().removeprefix("step-"))
    except (FileNotFoundError, ValueError):
        return None


def point_at(step_dir) -> None:
    """Let latest name this step, and best the one that was best when it was saved: a killed process may have left them
    at others. For the one process that is about to write to the run.
    """
    state, run_dir = read_state(step_dir), Path(step_dir).parent.parent
    mark(run_dir, "latest", state["step"])
    if state.get("best_step") is not None:
        mark(run_dir, "best", state["best_step"])
    elif (marked(run_dir, "best") or 0) > state["step"]:
        (run_dir / "best").unlink()


def remove_later(step_dir) -> list[int]:
    """Remove the steps after this one, which another future is about to replace; their numbers."""
    paths = sorted(Path(step_dir).parent.glob("step-*"), key=_by_number)
    later = [path for path in paths if _by_number(path) > _by_number(Path(step_dir))]
    for path in reversed(later):  # killed in between, the newest that is left goes on as before
        files.remove_folder(path)
    return [int(path.name.removeprefix("step-")) for path in later]


def prune(run_dir, keep=KEEP) -> list[int]:
    """Delete old steps: epoch ends, latest and best stay, and the last keep of the others. Returns the deleted ones."""
    run_dir = Path(run_dir)
    named = {marked(run_dir, "latest"), marked(run_dir, "best")}
    steps, _ = _steps(run_dir)
    others = [info for info in steps if not info.state.get("epoch_end")]
    old = [info for info in others[: max(0, len(others) - keep)] if info.step not in named]
    for info in old:
        files.remove_folder(info.path)
    return [info.step for info in old]


class Saver:
    """Saves steps in a thread: the caller waits for a copy into CPU memory, not for the disk.

    One save at a time; an error is raised by the next save, by join, or on leaving the with block. The thread is a
    daemon, so a second Ctrl-C abandons it: its step then does not exist, and the earlier ones do.
    """

    def __init__(self, run_dir, keep=KEEP):
        self.run_dir, self.keep = run_dir, keep
        self._thread, self._error = None, None

    def save(self, step, *, params, optimizer, rng, state) -> None:
        """Copy now; then save_step and prune in the background."""
        self.join()
        copy = lambda leaf: leaf.detach().to("cpu", copy=True)
        parts = {
            "params": tree.map(copy, params),
            "optimizer": {name: copy(leaf) for name, leaf in optimizer.items()},
            "rng": {name: copy(leaf) for name, leaf in rng.items()},
            "state": json.loads(json.dumps(state)),  # the caller may go on changing its own
        }
        self._thread = threading.Thread(target=self._write, args=(step, parts), daemon=True)
        self._thread.start()

    def _write(self, step, parts):
        try:
            save_step(self.run_dir, step, **parts)
            prune(self.run_dir, self.keep)
        except BaseException as error:  # carried to the thread that asked, where join raises it
            self._error = error

    def join(self) -> None:
        """Wait until nothing is being written; raises what went wrong in the meantime."""
        if self._thread:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not KeyboardInterrupt:
            self.join()


# Loading a step


def step_name(step) -> str:
    """The name of a step's folder: step-0001000."""
    return f"step-{step:07d}"


def load_step(step_dir) -> Step:
    """Read a whole step onto the CPU, after checking every file's sha256.

    Raises ValueError naming the file that is missing, damaged or not ours.
    """
    state = read_state(step_dir)
    model, optimizer, rng = (_read_tensors(Path(step_dir) / f"{part}.safetensors", state) for part in PARTS)
    return Step(tree.nest(model), optimizer, rng, state)


def load_params(step_dir) -> dict[str, Any]:
    """The parameters alone, checked like load_step; what a model needs in order to be used."""
    return tree.nest(_read_tensors(Path(step_dir) / "model.safetensors", read_state(step_dir)))


def load_merged(step_dir) -> dict[str, Any]:
    """The parameters that a step computes with: those of a run of LoRA laid over its base and merged.

    Raises ValueError like load_params, and where the base is not the one that the run began from.
    """
    params, run_dir = load_params(step_dir), Path(step_dir).parent.parent
    return merge(load_base(run_dir), params) if read_run(run_dir).get("lora") else params


def base_of(step_dir, run_root) -> dict[str, str]:
    """What run.json keeps of the step that a run begins from: where it is, seen from the run's root, and its sha256."""
    path = Path(step_dir)
    sha256 = read_state(path)["files"]["model.safetensors"]["sha256"]
    return {"step": os.path.relpath(path.resolve(), Path(run_root).resolve()), "sha256": sha256}


def load_base(run_dir) -> dict[str, Any]:
    """The parameters that a run began from, as run.json names them. Raises ValueError where they are not there."""
    run_dir = Path(run_dir)
    base = read_run(run_dir)["init"]
    path = run_dir.parent / base["step"]
    got = read_state(path)["files"]["model.safetensors"]["sha256"]
    if got != base["sha256"]:
        raise ValueError(f"{path}: expected the weights that {run_dir.name} began from, got others")
    return load_merged(path)


class Loaded(NamedTuple):
    """A saved step that is ready to be used: speak, measure, look inside."""

    path: Path  # the step folder
    run: dict[str, Any]  # run.json
    state: dict[str, Any]  # state.json
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: tokenizer.Tokenizer

    @property
    def name(self) -> str:
        """The run and the step, for people."""
        return f"{self.path.parent.parent.name} {self.path.name}"


def load_model(run=None, *, device="cpu", root="runs") -> Loaded:
    """RUN's best step, or the step that RUN is, every file checked and the weights on the device.

    Raises ValueError as find_step and load_params do, and where the weights are another architecture's.
    """
    path = find_step(run, root=root)
    folder = path.parent.parent
    config, params = read_config(folder), load_merged(path)
    check_params(params, config)
    params = tree.map(lambda leaf: leaf.to(device), params)
    words = tokenizer.load(folder / "tokenizer.json").with_rows(config.n_vocab)
    return Loaded(path, read_run(folder), read_state(path), params, config, words)


def read_state(step_dir) -> dict[str, Any]:
    """What state.json says. Raises ValueError if it is missing, damaged, of another layout or of another step."""
    path = Path(step_dir) / "state.json"
    state = _read_json(path)
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: expected layout version {VERSION}, got {found}")
    if state.get("sha256") != _sealed(state)["sha256"]:
        raise ValueError(f"{path}: damaged, its sha256 does not hold")
    if step_name(state["step"]) != path.parent.name:
        raise ValueError(f"{path}: expected the state of {path.parent.name}, got {step_name(state['step'])}")
    return state


def check_step(step_dir) -> None:
    """Raise ValueError naming the first file of the step that is missing or damaged."""
    state = read_state(step_dir)
    for part in PARTS:
        _check(Path(step_dir) / f"{part}.safetensors", state)


def _holds(step_dir, parts):
    """Is the step whole, and does it hold these tensors, bit for bit?"""
    try:
        step = load_step(step_dir)
    except ValueError:
        return False
    found = zip((dict(tree.walk(step.params)), step.optimizer, step.rng), parts.values(), strict=True)
    return all(ours.keys() == theirs.keys() and all(_equal(ours[n], theirs[n]) for n in ours) for ours, theirs in found)


def _equal(a, b):
    bits = lambda leaf: leaf.contiguous().reshape(-1).view(torch.uint8)  # nan is itself, -0 is not 0
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def find_run(run=None, root="runs") -> Path:
    """The run folder that RUN means: a path, a name in root, one of its step folders, or None for the newest.

    The newest run is the one written to last. Raises ValueError that lists the runs there are.
    """
    if run is None:
        found = [path for path in _runs(root) if _steps(path)[0]]
        if found:
            return max(found, key=_written)
    else:
        for path in (Path(run), Path(root, run)):
            for folder in (path, path.parent.parent):
                if (folder / "run.json").is_file() and (folder == path or path.parent.name == "checkpoints"):
                    return folder
    names = ", ".join(path.name for path in _runs(root)) or "none"
    got = "nothing" if run is None else run
    raise ValueError(
        f"run: expected a run or step folder, got {got}; runs in {root}: {names}; invoke train --mode quick makes one"
    )


def find_step(run=None, prefer="best", root="runs") -> Path:
    """The step folder that RUN means: itself, or its run's best or latest step; without a best one, the latest.

    Raises ValueError that says what is there instead.
    """
    if prefer not in ("best", "latest"):
        raise ValueError(f"prefer: expected best or latest, got {prefer}")
    for path in (Path(run), Path(root, run)) if run is not None else ():
        if path.parent.name == "checkpoints" and (path / "state.json").is_file():
            return path
    run_dir = find_run(run, root)
    if run is not None and Path(run).name.startswith("step-"):
        raise ValueError(f"run: expected a complete step, got {run}")
    steps, damaged = _steps(run_dir)
    if not steps:
        raise ValueError(f"run: expected a run with a saved step, got {run_dir}; {'; '.join(damaged) or 'none yet'}")
    wanted = marked(run_dir, prefer)
    if wanted is None:
        return steps[-1].path
    for info in steps:
        if info.step == wanted:
            return info.path
    # Another step in its place, an untrained one perhaps, would be no answer to what was asked.
    why = "; ".join(damaged) or "it is not there"
    raise ValueError(f"run: expected {run_dir}'s {prefer} step {step_name(wanted)}, but {why}; --run can name another")


def find_resumable(run=None, root="runs") -> tuple[Path, list[str]]:
    """The newest step whose sha256s hold, and a line for each newer one that is damaged.

    RUN may be a step folder: then it is that step or none. Raises ValueError if no step can be used.
    """
    run_dir = find_run(run, root)
    only = Path(run).name if run is not None and Path(run).name.startswith("step-") else "step-*"
    bad = []
    for path in sorted((run_dir / "checkpoints").glob(only), key=_by_number, reverse=True):
        try:
            check_step(path)
            return path, bad
        except ValueError as error:
            bad.append(str(error))
    raise ValueError(f"run: expected a run with a whole step, got {run_dir}; {'; '.join(bad) or 'nothing was saved'}")


def list_runs(root="runs") -> list[RunInfo]:
    """Every run in the folder root, newest last. Reads run.json and state.json alone, no weights."""
    return [read_info(path) for path in sorted(_runs(root), key=_written)]


def read_info(run_dir) -> RunInfo:
    """One run as list_runs shows it."""
    run_dir = Path(run_dir)
    steps, damaged = _steps(run_dir)
    try:
        run = read_run(run_dir)
    except ValueError as error:
        run, damaged = {}, [str(error), *damaged]
    return RunInfo(run_dir, run, steps, marked(run_dir, "latest"), marked(run_dir, "best"), damaged)


def _runs(root):
    return [path.parent for path in sorted(Path(root).glob("*/run.json")) if not path.parent.name.startswith(".")]


def _written(run_dir):
    """When the run was last written to: its last save, or its beginning."""
    return max(path.stat().st_mtime_ns for name in ("run.json", "latest") if (path := run_dir / name).exists())


def _by_number(step_dir):
    return len(step_dir.name), step_dir.name  # beyond step-9999999 the names grow longer


def _steps(run_dir):
    """The run's complete steps in order, and a line for each whose state.json cannot be trusted."""
    steps, damaged = [], []
    for path in sorted(Path(run_dir).glob("checkpoints/step-*"), key=_by_number):
        try:
            state = read_state(path)
        except ValueError as error:
            damaged.append(str(error))
        else:
            n_bytes = sum(file["bytes"] for file in state["files"].values())
            steps.append(StepInfo(path, state["step"], state, n_bytes))
    return steps, damaged


# What the run measured


def append_metrics(run_dir, *rows) -> None:
    """Add rows, dicts of plain JSON, to metrics.jsonl. They reach the disk for certain with the next save_step."""
    path = Path(run_dir) / "metrics.jsonl"
    with files.named(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(run_dir) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, in order. Of two rows of one kind for one step the later counts: a resumed run
    writes again what it repeats. A torn last line is left out; any other broken line raises ValueError with its number.
    """
    path = Path(run_dir) / "metrics.jsonl"
    rows = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or torn
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(type(row).__name__)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object a line, got {error}") from None
        repeats = row.get("kind") in ("train", "validation", "sample")  # a start, a stop or a note happens once
        rows[(row["kind"], row.get("step"), row.get("prompt")) if repeats else number] = row
    return list(rows.values())


def write_tensors(path, leaves, metadata) -> None:
    """Write {name: tensor or Later} as a safetensors file that is on the disk for certain, a leaf at a time.

    metadata is a dict of strings. Raises OSError with the file's name when the disk refuses.
    """
    entries, end = {}, 0
    order = sorted(leaves, key=lambda name: (-leaves[name].dtype.itemsize, name))  # the wide ones first: all aligned
    for name in order:
        leaf = leaves[name]
        start, end = end, end + math.prod(leaf.shape) * leaf.dtype.itemsize
        entries[name] = {"dtype": DTYPES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": metadata} | entries).encode()
    header += b" " * (-len(header) % 8)
    with files.named(path), open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            leaf = leaves[name].make() if isinstance(leaves[name], Later) else leaves[name]
            file.write(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file, got none") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON: {error}") from None


def _sealed(state):
    """The state with the sha256 of all its other values, so that a changed digit in it is seen too."""
    rest = {name: value for name, value in state.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path, state):
    expected = state["files"][path.name]
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got none")
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{path}: damaged, expected {expected['bytes']} bytes, got {path.stat().st_size}")
    if (got := _sha256(path)) != expected["sha256"]:
        raise ValueError(f"{path}: damaged, expected sha256 {expected['sha256'][:8]}, got {got[:8]}")


def _read_tensors(path, state):
    _check(path, state)
    with safe_open(path, framework="pt") as file:
        # a clone owns its memory; what safetensors hands out is the file itself, mapped
        return {name: file.get_tensor(name).clone() for name in json.loads(file.metadata()["gptcore"])["names"]}
