"""Induction heads: the hand-built model's exact scores, and what a trained one must show."""

import pytest
import torch
from models import hand_built, repeat_loss

from gptcore import forward


@pytest.mark.parametrize("bos", [False, True])
def test_the_hand_built_model_repeats(bos):
    """4.3: every token of the second copy follows as it did in the first."""
    params, config = hand_built()
    r = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    tokens = torch.cat([torch.tensor([12][:bos], dtype=torch.long), r, r])[None]
    logits, _ = forward(params, config, tokens)
    assert torch.equal(logits[0, bos + 12 : -1].argmax(-1), tokens[0, bos + 13 :])


def test_the_trained_model_repeats(trained):
    params, config = trained
    assert repeat_loss(params, config) < 0.1
    assert all((p["mlp"][name]["w"] == 0).all() for p in params["blocks"] for name in ("up", "down"))
