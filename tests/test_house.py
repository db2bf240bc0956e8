"""The house rules of the source: floors, who may import what, and what the core never does.

Each rule is a function from source text to complaints, so that it can be shown a bad snippet and be seen to fail.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent

FLOORS = {
    0: ("config", "tree", "cache", "device", "files"),
    1: ("ops", "sampling", "optim", "stats", "tokenizer", "_C"),  # _C: what csrc/ is built into
    2: ("kernels",),
    3: ("model", "checkpoint", "data", "parallel", "pretrained", "lora", "engine", "graph", "generate"),
    4: ("train", "evaluate", "interpret"),
    5: ("tools",),
    6: ("tasks",),
}
FLOOR = {part: floor for floor, parts in FLOORS.items() for part in parts}

# On one floor nobody imports a neighbour, except these: each pair has one direction, so no circle can form.
SIDEWAYS = {
    "cache": {"config"},
    "checkpoint": {"model", "lora"},
    "lora": {"model"},
    "generate": {"model", "engine", "graph"},
    "engine": {"model"},
    "graph": {"model"},
    "parallel": {"lora"},
    "pretrained": {"model", "checkpoint"},
}

CONSOLE = {"rich", "click", "invoke", "questionary"}
HEAVY = {"transformers", "datasets"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
SEEDS = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "random.seed"}
STREAMS = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
DRAWS = {"torch." + name for name in (
    "rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson", "dropout", "rand_like",
    "randn_like", "randint_like",
)}  # fmt: skip
DRAWING_METHODS = {
    "normal_", "uniform_", "random_", "bernoulli", "bernoulli_", "exponential_", "cauchy_", "geometric_", "log_normal_",
    "multinomial", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
}  # fmt: skip
VAGUE = {"util", "utils", "helper", "helpers", "manager", "base", "common", "misc"}
READING_PATH = ("config", "ops", "cache", "model", "sampling", "generate")


def sources(*folders):
    """Every Python file of the folders as (path relative to the house, its text)."""
    for folder in folders:
        for path in sorted((HOUSE / folder).rglob("*.py")):
            yield path.relative_to(HOUSE).as_posix(), path.read_text(encoding="utf-8")


def part(path):
    """The part of the house a file belongs to: gptcore/data/order.py -> data, tools/cli.py -> tools."""
    first, *rest = path.removesuffix(".py").split("/")
    return rest[0] if first == "gptcore" else first


def dotted(node):
    """a.b.c as text; empty for anything else."""
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def aliases(source):
    """What each imported name stands for: {"np": "numpy", "manual_seed": "torch.manual_seed", ...}."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def full(name, known):
    """A dotted name with its first part as it was imported: np.random.rand -> numpy.random.rand."""
    first, *rest = name.split(".")
    return ".".join([known.get(first, first), *rest])


def imports(path, source):
    """Every imported module, wherever it stands, with its line: ("gptcore.tree", 7), ..."""
    known = aliases(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
            module = ".".join([*here, *filter(None, [node.module])])
            if module == "gptcore":  # from gptcore import tree: the names are modules
                yield from ((f"gptcore.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno
        elif isinstance(node, ast.Call) and full(dotted(node.func), known) in ("importlib.import_module", "__import__"):
            module = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "importlib"
            yield module, node.lineno


def at_import(source):
    """The nodes that run when a module is imported: everything outside functions."""
    waiting = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        yield node
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        waiting += [] if inside else ast.iter_child_nodes(node)


def imports_go_down(path, source):
    """A part imports from lower floors only, and sideways only what SIDEWAYS names."""
    here = part(path)
    if here == "__init__":
        return  # the public names come from every floor of gptcore
    if here not in FLOOR:
        yield f"{path}: {here} has no floor"
        return
    for module, line in imports(path, source):
        top, *rest = module.split(".")
        if top not in ("gptcore", "tools", "tasks"):
            continue
        there = rest[0] if top == "gptcore" and rest else top
        if there == here or there in SIDEWAYS.get(here, ()):
            continue
        if there not in FLOOR:
            yield f"{path}:{line}: expected a module of gptcore by its name, got {module}"
        elif FLOOR[there] >= FLOOR[here]:
            yield f"{path}:{line}: {here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"


def console_stays_upstairs(path, source):
    """rich, click, invoke and questionary are for tools/ and tasks.py."""
    if path.startswith("gptcore/"):
        yield from (f"{path}:{n}: imports {name}" for name, n in imports(path, source) if name.split(".")[0] in CONSOLE)


def heavy_imports_are_local(path, source):
    """transformers and datasets are imported inside the functions that need them."""
    for node in at_import(source):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (
            f"{path}:{node.lineno}: imports {name} when loaded" for name in names if name.split(".")[0] in HEAVY
        )


def names_are_clear(path, source):
    """No file is called utils or helpers."""
    yield from (f"{path}: says nothing" for word in path.removesuffix(".py").split("/") if word in VAGUE)


def core_is_silent(path, source):
    """The library yields, tools draw: below tools/ nothing is printed and no standard stream is named, but in the
    main() of a module that is a program too (python -m)."""
    known, tree = aliases(source), ast.parse(source)
    mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main" and "__main__" in source]
    apart = {id(node) for main in mains for node in ast.walk(main)}
    for node in ast.walk(tree) if path.startswith("gptcore/") else ():
        if id(node) in apart:
            continue
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield f"{path}:{node.lineno}: prints"
        if isinstance(node, ast.Attribute | ast.Name) and full(dotted(node), known) in STREAMS:
            yield f"{path}:{node.lineno}: {dotted(node)}"


def core_is_functions(path, source):
    """Models are functions over trees: no nn.Module."""
    for node in ast.walk(ast.parse(source)):
        bases = [dotted(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
        if path.startswith("gptcore/") and any(base.split(".")[-1] == "Module" for base in bases):
            yield f"{path}:{node.lineno}: {node.name} is a Module"


def core_has_no_global_seed(path, source):
    """No seed is set or read that others share."""
    known = aliases(source)
    for node in ast.walk(ast.parse(source)) if path.startswith("gptcore/") else ():
        if isinstance(node, ast.Attribute | ast.Name) and full(dotted(node), known) in SEEDS:
            yield f"{path}:{node.lineno}: {dotted(node)}"


def core_draws_from_a_generator(path, source):
    """Randomness enters as a generator or a seed: no draw from a stream that others share."""
    known = aliases(source)
    for node in ast.walk(ast.parse(source)) if path.startswith("gptcore/") else ():
        name = full(dotted(node), known) if isinstance(node, ast.Attribute | ast.Name) else ""
        if name.startswith("numpy.random.") or (name.startswith("random.") and name != "random.Random"):
            yield f"{path}:{node.lineno}: {name}"
        if not isinstance(node, ast.Call) or "generator" in {word.arg for word in node.keywords}:
            continue
        name = full(dotted(node.func), known)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else name.split(".")[-1]
        dropout = name.startswith("torch.nn.functional.") and "dropout" in method
        if name in DRAWS or method in DRAWING_METHODS or dropout:
            yield f"{path}:{node.lineno}: {name or method} without generator="


def nothing_is_pickled(path, source):
    """No pickle is written, and torch.load runs with weights_only=True."""
    yield from (f"{path}:{n}: imports {name}" for name, n in imports(path, source) if name.split(".")[0] in PICKLES)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if dotted(node.func) == "torch.save":
            yield f"{path}:{node.lineno}: torch.save writes a pickle"
        if dotted(node.func) == "torch.load" and given.get("weights_only") is not True:
            yield f"{path}:{node.lineno}: torch.load without weights_only=True"
        if "allow_pickle" in given and given["allow_pickle"] is not False:
            yield f"{path}:{node.lineno}: allow_pickle"


def functions_are_told(path, source):
    """Every file, public class, function and method of the core says in a sentence what it is."""
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

    def public(node):
        own = [n for n in node.body if isinstance(n, definitions) and not n.name.startswith("_")]
        return [node, *(below for n in own for below in (public(n) if isinstance(n, ast.ClassDef) else [n]))]

    for node in public(ast.parse(source)) if path.startswith("gptcore/") else ():
        if not ast.get_docstring(node):
            yield f"{path}:{getattr(node, 'lineno', 1)}: {getattr(node, 'name', 'the file')} has no docstring"


def code_lines(source):
    """How many lines hold code: neither blank, nor comment, nor docstring."""
    told = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - told)


# (rule, a file that breaks it, what it says)
BROKEN = [
    (imports_go_down, "gptcore/ops.py", "from gptcore.model import forward"),
    (imports_go_down, "gptcore/ops.py", "def f():\n    from gptcore import model"),
    (imports_go_down, "gptcore/ops.py", "from . import model"),
    (imports_go_down, "gptcore/data/order.py", "from ..train import train"),
    (imports_go_down, "gptcore/train.py", "from gptcore.evaluate import perplexity"),
    (imports_go_down, "gptcore/evaluate/perplexity.py", "import gptcore.interpret.lens"),
    (imports_go_down, "gptcore/model.py", "from gptcore import checkpoint"),
    (imports_go_down, "gptcore/train.py", "from tools.runs import runs"),
    (imports_go_down, "tools/cli.py", "import tasks"),
    (imports_go_down, "gptcore/train.py", "from gptcore import init_params"),
    (imports_go_down, "gptcore/novelty.py", "import torch"),
    (imports_go_down, "gptcore/ops.py", "import importlib\nimportlib.import_module('gptcore.model')"),
    (imports_go_down, "gptcore/ops.py", "from importlib import import_module as load\nload('gptcore.model')"),
    (console_stays_upstairs, "gptcore/train.py", "import importlib\nimportlib.import_module('rich.table')"),
    (console_stays_upstairs, "gptcore/train.py", "def f():\n    from rich.table import Table"),
    (heavy_imports_are_local, "gptcore/pretrained/phi.py", "import transformers"),
    (heavy_imports_are_local, "tools/data.py", "if True:\n    from datasets import load_dataset"),
    (names_are_clear, "gptcore/data/utils.py", ""),
    (names_are_clear, "tools/helpers.py", ""),
    (core_is_silent, "gptcore/train.py", "print('step')"),
    (core_is_silent, "gptcore/train.py", "import sys\nsys.stdout.write('step')"),
    (core_is_silent, "gptcore/train.py", "from sys import stderr\nstderr.write('step')"),
    (core_is_silent, "gptcore/train.py", "import sys\ndef main(): sys.stderr.write('step')"),
    (core_is_functions, "gptcore/model.py", "class GPT(nn.Module): pass"),
    (core_is_functions, "gptcore/model.py", "from torch.nn import Module\nclass GPT(Module): pass"),
    (core_has_no_global_seed, "gptcore/train.py", "torch.manual_seed(0)"),
    (core_has_no_global_seed, "gptcore/train.py", "from torch import manual_seed\nmanual_seed(0)"),
    (core_has_no_global_seed, "gptcore/train.py", "import torch as t\nt.cuda.manual_seed(0)"),
    (core_draws_from_a_generator, "gptcore/train.py", "import numpy as np\nnp.random.seed(0)"),
    (core_draws_from_a_generator, "gptcore/train.py", "from numpy import random\nrandom.rand(3)"),
    (core_draws_from_a_generator, "gptcore/train.py", "import random\nrandom.shuffle(x)"),
    *(
        (core_draws_from_a_generator, "gptcore/ops.py", f"import torch\nimport torch.nn.functional as F\n{call}")
        for call in (
            "torch.rand(3)",
            "torch.randn(3, device=x.device)",
            "torch.randint(9, (3,))",
            "torch.randperm(3)",
            "torch.multinomial(p, 1)",
            "torch.randn_like(x)",
            "x.normal_(0, 1)",
            "torch.empty(3).uniform_()",
            "p.multinomial(1)",
            "F.dropout(x, 0.1)",
            "torch.nn.init.trunc_normal_(w)",
        )
    ),
    (core_draws_from_a_generator, "gptcore/ops.py", "from torch import randn\nrandn(3)"),
    (core_draws_from_a_generator, "gptcore/ops.py", "from torch.nn.functional import dropout\ndropout(x, 0.1)"),
    (nothing_is_pickled, "gptcore/checkpoint.py", "import pickle"),
    (nothing_is_pickled, "gptcore/checkpoint.py", "torch.save(params, path)"),
    (nothing_is_pickled, "gptcore/checkpoint.py", "torch.load(path)"),
    (nothing_is_pickled, "tools/runs.py", "torch.load(path, weights_only=False)"),
    (nothing_is_pickled, "gptcore/data/shards.py", "np.load(path, allow_pickle=True)"),
    (functions_are_told, "gptcore/ops.py", "'''Words.'''\ndef rotary(x): return x"),
    (functions_are_told, "gptcore/ops.py", "x = 1"),
    (functions_are_told, "gptcore/ops.py", "'''Words.'''\nclass A:\n    '''Words.'''\n    def show(self): return 1"),
]

FINE = [
    (
        imports_go_down,
        "gptcore/model.py",
        "from gptcore import ops\nfrom gptcore.config import ModelConfig\nimport torch",
    ),
    (imports_go_down, "gptcore/generate.py", "from .model import forward"),
    (imports_go_down, "gptcore/data/order.py", "from gptcore.data import shards\nfrom .shards import read"),
    (imports_go_down, "gptcore/__init__.py", "from gptcore.train import train"),
    (imports_go_down, "tools/runs.py", "from gptcore import checkpoint, train\nfrom tools import bridge"),
    (console_stays_upstairs, "tools/runs.py", "import click"),
    (heavy_imports_are_local, "gptcore/pretrained/phi.py", "def f():\n    import transformers"),
    (core_is_silent, "tools/runs.py", "print('x')"),
    (core_has_no_global_seed, "gptcore/device.py", "g = torch.Generator().manual_seed(1)"),
    (core_draws_from_a_generator, "gptcore/ops.py", "import torch\ntorch.randn(3, generator=g).normal_(generator=g)"),
    (core_draws_from_a_generator, "gptcore/ops.py", "from gptcore.ops import dropout\ndropout(x, 0.1, seed)"),
    (core_draws_from_a_generator, "tools/runs.py", "import random\nrandom.shuffle(x)"),
    (core_is_silent, "gptcore/data/corpora.py", "import sys\nsys.stdin.buffer.read()"),
    (imports_go_down, "gptcore/model.py", "import importlib\nimportlib.import_module('gptcore.ops')"),
    (nothing_is_pickled, "gptcore/checkpoint.py", "torch.load(path, weights_only=True)"),
    (functions_are_told, "gptcore/ops.py", "'''Words.'''\nclass A:\n    '''Words.'''\n    def _own(self): return 1"),
    (functions_are_told, "gptcore/ops.py", "'''Words.'''\ndef _private(x): return x"),
]

RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    found = [complaint for path, text in sources("gptcore", "tools") for complaint in rule(path, text)]
    found += list(rule("tasks.py", (HOUSE / "tasks.py").read_text(encoding="utf-8")))
    assert not found


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_a_rule_sees(rule, path, text):
    assert list(rule(path, text))


@pytest.mark.parametrize(("rule", "path", "text"), FINE)
def test_a_rule_lets_pass(rule, path, text):
    assert not list(rule(path, text))


def test_the_reading_path_is_one_sitting():
    paths = [HOUSE / "gptcore" / f"{name}.py" for name in READING_PATH]
    lines = {path.name: code_lines(path.read_text(encoding="utf-8")) for path in paths if path.exists()}
    assert sum(lines.values()) <= 900, lines


def test_code_lines_counts_code_alone():
    source = '"""Words.\n\nMore.\n"""\n\n# why\nx = """a\nb"""\n\n\ndef f():\n    """Told."""\n    return x  # yes\n'
    assert code_lines(source) == 4


def loaded_after(statement):
    """The modules that a fresh Python has loaded after the statement."""
    code = f"import sys; sys.path.insert(0, '.'); {statement}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, capture_output=True, text=True, check=True).stdout
    return set(out.split())


def test_importing_gptcore_is_light():
    assert not loaded_after("import gptcore") & (HEAVY | CONSOLE)


def test_the_command_line_starts_without_torch():
    loaded = loaded_after("import tasks")
    assert "tools.cli" in loaded
    assert not loaded & (HEAVY | {"torch", "numpy", "rich", "questionary"})
