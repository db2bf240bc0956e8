"""What every process of tests/test_parallel.py does: train in all ways, and write down what it saw and held.

torchrun --nproc-per-node N tests/teamwork.py FOLDER TASK
"""

import json
import os
import signal
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gptcore import generator, init_params, optim, tree
from gptcore.config import architecture
from gptcore.parallel import ALONE, WAYS, gather_team
from gptcore.train import TrainOptions, init_state, train

N_STEPS, N_SEQUENCES = 20, 16
CONFIG = architecture("qwen3", n_vocab=50, n_vocab_padded=52, n_context=12, n_layer=2, d_model=16, n_head=2, d_ff=24)
KINDS = tuple(product(("adamw", "muon"), (1, 4)))


def batch(step):
    """An update's sequences; a few targets are not counted, more of them in some sequences than in others."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(50, (N_SEQUENCES, 13), generator=draw)
    targets = tokens[:, 1:].clone()
    targets[: N_SEQUENCES // 2, :5] = -100
    return tokens[:, :-1], targets


def options_for(kind, n_passes, size, **more):
    """Options of a training whose processes each make so many passes an update."""
    moved = optim.Options(kind=kind, lr=1e-2, weight_decay=0.1)
    n_pass = N_SEQUENCES // size // n_passes
    return TrainOptions(n_steps=N_STEPS, n_pass=n_pass, clip=0.5, dtype="float64", optimizer=moved, **more)


def learn(team, options, start=None, n_steps=N_STEPS):
    """(params, state, losses and norms) after so many updates, from a file's weights and state if one is given."""
    params = tree.map(lambda leaf: leaf.double(), init_params(CONFIG, generator(1)))
    flat = load_file(start) if start else {}
    if start:
        params = tree.nest({name.removeprefix("w/"): leaf for name, leaf in flat.items() if name.startswith("w/")})
    params = team.place(params, CONFIG, options)
    state = init_state(params, CONFIG, options, team=team)
    if start:
        kept = {name.removeprefix("o/"): leaf for name, leaf in flat.items() if name.startswith("o/")}
        team.load_state_(params, state.optimizer, kept)
        state.step = int(flat["step"])
    seen = []
    for record in train(params, CONFIG, batch, state, options, stop=lambda: state.step >= n_steps, team=team):
        seen.append((record["loss"], record["grad_norm"]))
    return params, state, seen


def save(team, params, state, path):
    """One plain file of whole leaves, written by the first process."""
    weights, moved = team.whole(params), team.whole_state(params, state.optimizer)
    flat = {f"w/{name}": leaf.detach() for name, leaf in tree.walk(weights)} | {
        f"o/{name}": t for name, t in moved.items()
    }
    if team.rank == 0:
        save_file({n: leaf.contiguous() for n, leaf in flat.items()} | {"step": torch.tensor(state.step)}, path)


def every_way(folder, some=""):
    """Losses and norms of every combination, and how many numbers this process held after the last update."""
    found, team = {}, gather_team("ddp")
    for way, (kind, n_passes) in product(WAYS, KINDS):
        if some and f"{way} {kind} {n_passes}" not in some.split(","):
            continue
        team = replace(team, way=way)
        options = options_for(kind, n_passes, team.size, recompute=n_passes == 4 and way != "zero3")
        params, state, seen = learn(team, options)
        weights = sum(team.local(leaf).numel() for leaf in tree.leaves(params))
        moments = sum(t.numel() for n, t in optim.state(state.optimizer).items() if not n.endswith("/step"))
        found[f"{way} {kind} {n_passes}"] = {"seen": seen, "weights": weights, "state": moments}
    Path(folder, f"ways-{team.size}-{team.rank}.json").write_text(json.dumps(found))
    return team


def go_on(folder):
    """From the file, if there is one, for seven updates; the file is then this state's."""
    path = Path(folder, "state.safetensors")
    team = gather_team("zero3") if "WORLD_SIZE" in os.environ else ALONE
    start = path if path.exists() else None
    at = int(load_file(path)["step"]) if start else 0
    params, state, seen = learn(team, options_for("muon", 1, team.size), start, n_steps=min(N_STEPS, at + 7))
    save(team, params, state, path)
    if team.rank == 0:
        with Path(folder, "seen.jsonl").open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in seen))
    return team


def die(folder):
    """The second process is killed after its third update, while the first waits for it."""
    team = gather_team("zero2")
    learn(team, options_for("adamw", 1, team.size), n_steps=3)
    if team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    learn(team, options_for("adamw", 1, team.size))
    return team


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"every-way": every_way, "go-on": go_on, "die": die}[sys.argv[2]](sys.argv[1], *sys.argv[3:]).leave()
