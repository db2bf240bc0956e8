"""sample against what generation libraries do: sort, softmax, cumulative sum, scatter, multinomial.

    invoke benchmark --only sampling

`processors` are those of transformers, as its generate() would chain them; `plain torch` writes the same steps out.
"""

import pytest
import torch
from cases import logits_of

from gptcore import kernels, sampling

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "k50": {"top_k": 50},
    "p0.9": {"top_p": 0.9},
    "k50 p0.9": {"top_k": 50, "top_p": 0.9},
}


def torch_pipeline(logits, *, temperature=1.0, top_k=0, top_p=1.0):
    """The usual steps in plain torch: logits (B,V) -> tokens (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, ids = logits.sort(dim=-1)
        cut = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[:, -1] = False
        logits = logits.masked_fill(cut.scatter(1, ids, cut), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def processors(*, temperature=1.0, top_k=0, top_p=1.0):
    """transformers' own chain as one call; None where it is not installed."""
    try:
        from transformers.generation import logits_process as hf
    except ImportError:
        return None
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    chain = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
    chain += [hf.TopKLogitsWarper(top_k)] if top_k else []
    chain += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    return lambda logits: torch.multinomial(chain(None, logits).softmax(-1), 1)[:, 0]


@pytest.mark.parametrize("n_row", [1, 8])
@pytest.mark.parametrize("n_vocab", [50257, 100277, 151936])
@pytest.mark.parametrize("name", SETTINGS)
def bench_sample(race, benchmark, n_vocab, name, n_row):
    logits = logits_of("plain", n_vocab, rows=n_row) * 3
    settings, words = SETTINGS[name], {"seed": torch.arange(n_row), "position": torch.arange(n_row)}
    benchmark.group = f"sample V={n_vocab} {name} B={n_row}, {torch.get_num_threads()} threads"
    ways = {
        "native": lambda: kernels.sample(logits, **words, **settings),
        "reference": lambda: sampling.sample(logits, **words, **settings),
        "plain torch": lambda: torch_pipeline(logits, **settings),
    }
    if peer := processors(**settings):
        ways["processors"] = lambda: peer(logits)
    assert torch.equal(ways["native"](), ways["reference"]())
    kept = sampling.kept_weights(logits, **settings) > 0
    for call in list(ways.values())[2:]:  # the peers draw by other numbers, but from the same tokens
        assert kept.gather(1, call()[:, None]).all()
    with torch.no_grad():
        race(ways)
