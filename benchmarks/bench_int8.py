"""What rounding the weights costs: perplexity on held-out text in float32, bfloat16 and int8.

    invoke benchmark --only int8 --run RUN

The decoder rounds weights only; what it computes with, engine.unpack gives back in float32, and forward of those is its
equal (tests/test_engine.py). So this scores the decoder's own model, many positions at once. Without --run a quick
model is trained for a minute first: a random one has nothing to lose.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptcore import checkpoint, data, engine, kernels
from gptcore.evaluate.perplexity import score_documents

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
N_TOKENS = 50_000
HOUSE = Path(__file__).parents[1]


@pytest.fixture
def trained(request, tmp_path):
    """(the run that was asked for, or a minute's, and the folder of its text)."""
    run, cache = request.config.getoption("run"), request.config.getoption("text_cache")
    if not run:
        words = ["train", "--mode", "quick", "--minutes", "1", "--run", "minute"]
        subprocess.run([sys.executable, "-m", "invoke", "-r", str(HOUSE), *words], cwd=tmp_path, check=True)
        run, cache = tmp_path / "runs/minute", tmp_path / "data"
    return checkpoint.load_model(run), cache


@pytest.mark.skipif(bool(kernels.why_not("decode_")), reason=kernels.why_not("decode_"))
def bench_int8_perplexity(benchmark, trained):
    model, cache = trained
    words, config = model.tokenizer, model.config
    documents = data.reopen(model.run["plan"], words, cache=cache).validation
    documents = [(list(tokens), size) for tokens, size in documents]
    ways = {"eot": words.eot, "token_bytes": words.n_bytes, "max_tokens": N_TOKENS}
    found = {}
    for name, dtype in DTYPES.items():
        rounded = engine.unpack(engine.pack(model.params, config, dtype), config)
        scores = score_documents(rounded, config, documents, **ways)
        change = scores.perplexity / found["fp32"]["perplexity"] - 1 if found else 0.0
        found[name] = {"perplexity": scores.perplexity, "change": change}
    benchmark.group = f"int8, {model.name}"
    benchmark.extra_info |= found | {"why": f"{int(scores.n_tokens.sum()):,} held-out tokens"}
    benchmark.pedantic(score_documents, (rounded, config, documents), ways | {"max_tokens": 4096}, rounds=1)
