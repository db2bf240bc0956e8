"""The order of the data: a function of the step, complete in every epoch, the same on any number of processes."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore import data
from gptcore.data import order, shards
from gptcore.device import key

EOT = 256


def shard(lengths):
    """A shard whose j-th token is j, except that the ends of its documents are end of text."""
    edges = np.cumsum([0, *lengths])
    tokens = np.arange(1_000, 1_000 + edges[-1])
    tokens[edges[1:] - 1] = EOT
    return shards.Shard(tokens, edges, np.array(lengths))


@pytest.fixture
def dataset(tmp_path):
    for index in range(200):
        (tmp_path / f"{index:03}.txt").write_text(
            f"{index} " + "".join(chr(97 + index % 26) for _ in range(index % 50))
        )
    return data.prepare(tmp_path, "byte", n_context=32, n_sequences=8, seed=42, cache=tmp_path / ".cache")


def test_known_values():
    """From the page that specifies the order: a run's data must not move between versions."""
    assert order.permute(range(8), 8, 1).tolist() == [0, 7, 1, 5, 4, 3, 6, 2]
    assert order.permute(range(10), 10, 42).tolist() == [4, 0, 2, 3, 5, 1, 6, 7, 9, 8]
    assert key(42, "order", 0) == 0x638352CA359592C1


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 3_000), word=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, word):
    assert sorted(order.permute(range(n), n, word).tolist()) == list(range(n))
    assert order.permute([n - 1], n, word)[0] == order.permute(range(n), n, word)[n - 1]


def test_permute_mixes():
    """Neighbours part: of 10,000 steps 1 would come by chance once. False alarm at 8: 1e-5 (Poisson)."""
    image = order.permute(range(10_000), 10_000, key(1, "test"))
    assert (np.diff(image) == 1).sum() < 8
    assert abs(np.corrcoef(image, range(10_000))[0, 1]) < 0.05  # five sigma


def test_every_sequence_comes_once_an_epoch_in_a_new_order():
    counts = [5, 0, 40]
    first, second = (
        list(zip(*(x.tolist() for x in order.arrange(range(45 * epoch, 45 * epoch + 45), counts, 42)), strict=True))
        for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) == [(group, w) for group, n in enumerate(counts) for w in range(n)]
    assert first != second
    assert [group for group, _ in first] == [0] * 5 + [2] * 40  # groups as they arrive
    assert order.arrange([50, 3], counts, 42)[1].tolist() == [second[5][1], first[3][1]]


@pytest.mark.parametrize("n_context", [1, 2, 16, 33, 64, 200])
@pytest.mark.parametrize("lengths", [[201], [1] * 201, [3, 150, 1, 47]], ids=["one", "empty", "some"])
def test_concat_makes_every_token_a_target(lengths, n_context):
    """Once, but for the overlap of the last window; the inputs are what stands before. Seen to fail with floor."""
    it = shard(lengths)
    windows = order.concat(it, n_context, EOT)
    n = len(it.tokens)
    times = np.zeros(n, int)
    for window in range(windows.n):
        inputs, targets = windows.read(window)
        start = min(window * n_context, n - 1 - n_context)
        assert len(inputs) == len(targets) == n_context
        assert inputs.tolist() == it.tokens[start : start + n_context].tolist()
        assert targets.tolist() == it.tokens[start + 1 : start + 1 + n_context].tolist()
        times[start + 1 : start + 1 + n_context] += 1
    assert windows.n == -(-(n - 1) // n_context)
    assert (times[0], times[1:].min()) == (0, 1)
    assert times.sum() - (n - 1) == -(n - 1) % n_context  # what the last window reads again


@pytest.mark.parametrize("n_context", [1, 2, 16, 33, 64, 500])
def test_bestfit_makes_every_token_a_target_once(n_context):
    """Each row holds whole pieces of documents and no input of another one. Seen to fail with a wrong room."""
    rng = np.random.default_rng(1)
    it = shard([*rng.integers(1, 90, 1_500), 1, 1])
    windows = order.bestfit(it, n_context, EOT)
    starts = set((it.starts[:-1]).tolist())
    seen = []
    for window in range(windows.n):
        inputs, targets = windows.read(window)
        assert len(inputs) == len(targets) <= n_context
        seen.append(targets)
        for place in range(len(targets)):
            if targets[place] != EOT:
                at = int(targets[place]) - 1_000
                assert inputs[place] == (EOT if at in starts else it.tokens[at - 1])
    assert sorted(np.concatenate(seen).tolist()) == sorted(it.tokens.tolist())
    assert len(it.tokens) > 0.98 * windows.n * n_context  # what is left is filler


def test_best_fit_takes_the_row_with_least_room():
    rows = order._fit([(0, 6), (10, 15), (20, 24), (30, 35), (40, 43), (50, 52)], 10)
    assert rows == [[(0, 6), (20, 24)], [(10, 15), (30, 35)], [(40, 43), (50, 52)]]
    rows = order._fit([(0, 7), (10, 18), (20, 22)], 10)
    assert rows == [[(10, 18), (20, 22)], [(0, 7)]]


def test_a_short_last_shard_is_filled_up():
    """A shard below one window: end of text as input, -100 as target."""
    dataset = data.Dataset(
        {"n_context": 8, "n_sequences": 1, "seed": 1, "groups": [], "validation": []},
        data.tokenizers.named("byte"),
        [[order.concat(shard([6]), 8, EOT)]],
        [],
    )
    tokens, targets = dataset.batch(0)
    assert tokens.tolist() == [[1_000, 1_001, 1_002, 1_003, 1_004, EOT, EOT, EOT]]
    assert targets.tolist() == [[1_001, 1_002, 1_003, 1_004, EOT, -100, -100, -100]]


@pytest.mark.parametrize("packing", order.PACKINGS)
def test_batches_are_contiguous_and_a_function_of_the_step(packing, tmp_path, dataset):
    dataset = data.prepare(
        tmp_path, "byte", n_context=32, n_sequences=8, seed=42, cache=tmp_path / ".cache", packing=packing
    )
    batches = [dataset.batch(step) for step in (7, 0, 7)]
    for tokens, targets in batches:
        assert tokens.shape == targets.shape == (8, 32)
        assert tokens.dtype == targets.dtype == torch.int64
        assert tokens.is_contiguous()
        assert targets.is_contiguous()
    assert torch.equal(batches[0][0], batches[2][0])
    assert torch.equal(batches[0][1], batches[2][1])
    assert not torch.equal(batches[0][0], batches[1][0])
    again = data.reopen(dataset.plan, dataset.tokenizer, cache=tmp_path / ".cache")
    assert torch.equal(again.batch(7)[1], batches[0][1])
    other = data.prepare(
        tmp_path, "byte", n_context=32, n_sequences=8, seed=43, cache=tmp_path / ".cache", packing=packing
    )
    assert not torch.equal(other.batch(7)[0], batches[0][0])


def test_the_target_is_the_next_token(dataset):
    tokens, targets = dataset.batch(2)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_one_batch(dataset, world):
    """Across the border of two epochs as well. Seen to fail with interleaved slices."""
    for step in (0, dataset.n_windows // dataset.n_sequences):
        parts = [dataset.batch(step, rank=rank, world=world) for rank in range(world)]
        for whole, slices in zip(dataset.batch(step), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(slices), whole)


def test_unequal_slices_are_refused(dataset):
    with pytest.raises(ValueError, match=r"^n_sequences: expected a multiple of 3 processes, got 8$"):
        dataset.batch(0, rank=0, world=3)


def test_an_epoch_reads_the_plan_and_the_size_of_an_update_does_not_matter(dataset):
    """The batches of an epoch, whatever their size, are its sequences in order; the next epoch has them, too."""
    n = dataset.n_windows
    epoch, following = dataset.sequences(range(n))[1], dataset.sequences(range(n, 2 * n))[1]
    assert sorted(epoch.tolist()) == sorted(following.tolist())
    assert not torch.equal(epoch, following)
    small = dataset.with_sequences(3)
    steps = torch.cat([small.batch(step)[1] for step in range(n // 3)])
    assert torch.equal(steps, epoch[: n // 3 * 3])
    assert small.plan["n_sequences"] == 3
    assert epoch.numel() >= dataset.n_train_tokens - 1 > epoch.numel() - dataset.n_context


def test_prefetch_yields_in_order():
    assert list(data.prefetch(lambda step: step * step, 3, 9)) == [9, 16, 25, 36, 49, 64]
    assert list(data.prefetch(lambda step: step, 5, 5)) == []


def test_prefetch_stays_a_little_ahead_and_ends_when_closed():
    """Seen to fail (threads left) without the with."""
    made = []
    batches = data.prefetch(lambda step: made.append(step) or step, 0, 10**6, n_ahead=3)
    assert [next(batches), next(batches)] == [0, 1]
    batches.close()
    assert len(made) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_raises_where_the_step_is_due():
    def batch(step):
        if step == 2:
            raise ValueError("step 2")
        return step

    batches = data.prefetch(batch, 0, 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="step 2"):
        next(batches)
