"""A3: tiny random models of transformers with our weights say what ours say, inside too."""

import pytest
import torch
from cases import TINY, random_params, random_tokens

from gptcore import forward
from gptcore.config import architecture
from gptcore.interpret.taps import record
from gptcore.pretrained import ARCHITECTURES, export

SIZES = {"llama": {"n_kv_head": 2}, "qwen3": {"n_kv_head": 2, "d_head": 16}, "phi": {"n_kv_head": 2}}


def in_transformers(params, config):
    """transformers' causal language model with our weights, attention eager so that patterns come out."""
    import transformers

    params, config = export.plain(params, config)
    architecture = export.find_class(config, ARCHITECTURES.values())
    made = getattr(transformers, architecture.CLASS)
    words = architecture.config_to(config) | {"bos_token_id": None, "eos_token_id": None}
    model = made(made.config_class(**words, attn_implementation="eager")).eval()
    leaves = {name: leaf.make() for name, leaf in export.leaves_of(params, config, architecture).items()}
    missing, extra = model.load_state_dict(leaves, strict=False)
    lost = set(missing) & {name for name, _ in model.named_parameters()}  # a tied head is no parameter of its own there
    assert not lost, lost
    assert not extra, extra
    return model


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "phi", "neox"])
def test_a3_logits_residual_stream_and_patterns_are_those_of_transformers(family):
    """Weights of spread 0.2, gains and biases too. Seen to fail with NeoX's heads after each other.

    Their last hidden state is after the final norm, as ours is at norm_f; the others enter a block.
    """
    config = architecture(family, **TINY | SIZES.get(family, {}))
    params, tokens = random_params(config, dtype=torch.float32), random_tokens(config)
    with torch.no_grad():
        told = in_transformers(params, config)(tokens, output_hidden_states=True, output_attentions=True)
    tap, seen = record(config, "*")
    logits, _ = forward(params, config, tokens, tap=tap)
    pairs = {"logits": (logits, told.logits), "norm_f": (seen["norm_f"], told.hidden_states[-1])}
    for i in range(config.n_layer):
        pairs[f"resid_pre {i}"] = seen[f"blocks.{i}.resid_pre"], told.hidden_states[i]
        pairs[f"pattern {i}"] = seen[f"blocks.{i}.attn.pattern"], told.attentions[i]
    assert len(told.hidden_states) == config.n_layer + 1
    for what, (got, wanted) in pairs.items():
        error = (got - wanted).abs().max().item()
        assert error <= 1e-5 * max(1.0, wanted.abs().max().item()), f"{what}: off by {error:.1e}"
