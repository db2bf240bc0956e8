"""The operators on a real GPU: the laws of test_emulator.py, where the hardware has the last word."""

import math

import pytest
import torch
from cases import ATTENTION, LOGITS, SETTINGS, Attention, attention_inputs, logits_of

from gptcore import kernels, sampling

pytestmark = pytest.mark.gpu
STORAGE = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)]
STORAGE_IDS = ["fp32", "bf16", "fp16", "fp32 over bf16"]
SMALL = [
    Attention((30, 0, 5), n_new=7, window=7, alibi=True),
    Attention((599, 0), n_context=600, n_head=8, n_kv_head=2),
]


def on_gpu(args):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]


def attend(args, rules, mode="native"):
    rules = dict(zip(rules, on_gpu(rules.values()), strict=True))
    with kernels.using(mode):
        return kernels.kv_attention_(*args, **rules)


@pytest.mark.parametrize(("dtype", "cache_dtype"), STORAGE, ids=STORAGE_IDS)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_errs_at_most_twice_as_much_as_torch(case, dtype, cache_dtype):
    """Against float64 on the same numbers, or half a unit in the last place where torch is exact."""
    args, rules = attention_inputs(case, dtype, cache_dtype)
    rounded = [*args[:1], *(x.to(cache_dtype) for x in args[1:3]), *args[3:]]
    double = [x.double() if x.is_floating_point() else x for x in rounded]
    truth = attend(on_gpu(double), rules, "reference")
    own_args, twin_args = on_gpu(args), on_gpu(args)
    own, got = attend(own_args, rules, "reference"), attend(twin_args, rules)
    error = lambda z: (z.double() - truth).norm()
    assert error(got) <= max(2 * error(own), torch.finfo(dtype).eps / 2 * truth.norm())
    assert torch.equal(twin_args[3], own_args[3])
    assert torch.equal(twin_args[4], own_args[4])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_rows_alone_and_a_larger_bound_change_no_bit(case):
    """What the sanitizers run too."""
    args, rules = attention_inputs(case)
    wanted = attend(on_gpu(args), rules)
    assert torch.equal(attend(on_gpu(args), rules | {"n_keys": case.n_context}), wanted)
    for row in range(len(case.lengths)):
        alone = on_gpu([x[row : row + 1] for x in args])
        assert torch.equal(attend(alone, rules), wanted[row : row + 1])


@pytest.mark.parametrize("length", [-1, 300, 2**62])
def test_a_small_row_that_does_not_fit_is_not_written_and_says_so(length):
    """The host does not look at lengths on a device: such a row's z is NaN, and its neighbours are as ever."""
    args, rules = attention_inputs(Attention((10, 299), n_context=310))
    rules["n_keys"] = 300
    wanted, bad = attend(on_gpu(args), rules), on_gpu(args)
    bad[5][0] = length
    z = attend(bad, rules)
    assert z[0].isnan().all()
    assert torch.equal(z[1], wanted[1])
    assert torch.equal(bad[3][0].cpu(), args[3][0])


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("n_vocab", [61, 5003, 50257], ids=["small", "medium", "large"])
def test_tokens_equal_the_references(kind, n_vocab):
    """0 differences to the same call on the CPU."""
    logits, words = (
        logits_of(kind, n_vocab),
        {"seed": torch.tensor([0, -5, 2**62 + 3, 77]), "position": torch.arange(4)},
    )
    for settings in SETTINGS:
        with kernels.using("native"):
            got = kernels.sample(logits.cuda(), **words, **settings)
        assert torch.equal(got.cpu(), sampling.sample(logits, **words, **settings)), settings


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_small_row_that_cannot_be_drawn_from_is_named(bad):
    """-inf as in nothing above -inf."""
    logits = torch.zeros(3, 100)
    logits[1] = bad
    if bad != -math.inf:
        logits[1, 5:] = 0.0
    with kernels.using("native"), pytest.raises(ValueError, match="expected a finite largest logit in row 1"):
        kernels.sample(logits.cuda(), seed=1, position=1)
    with kernels.using("native"):
        drawn = kernels.sample_ahead(logits.cuda(), seed=1, position=1)
    assert (drawn == -1).tolist() == [False, True, False]
