"""Every command, once.

A command lives in its own small module and is a click command: its types, choices, defaults and help are what the user
sees, in Invoke too (bridge.py). It imports torch, rich and gptcore inside its body, so that help is instant, raises
ValueError for what the user got wrong, and returns its exit status, or None for 0. To add one: an import and a name.
"""

import click

from tools.benchmark import benchmark
from tools.build import build
from tools.compare import compare
from tools.compile_gpu import compile_gpu
from tools.data import data
from tools.develop import lint, sanitize, test
from tools.docs import docs
from tools.doctor import doctor
from tools.download import download
from tools.evaluate import evaluate
from tools.generate import generate
from tools.harness import harness
from tools.interpret import interpret
from tools.menu import menu
from tools.pretrained import export, import_, pretrained
from tools.runs import runs
from tools.sampling_demo import sampling_demo
from tools.train import train

main = click.Group(
    "gptcore",
    commands=[
        benchmark, build, compare, compile_gpu, data, docs, doctor, download, evaluate, export, generate, harness,
        import_, interpret, lint, menu, pretrained, runs, sampling_demo, sanitize, test, train,
    ],
)  # fmt: skip
