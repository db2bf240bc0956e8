"""Activation patching is what it says: the same as one whole forward a cell, and right where the answer is known.

F1 ... F9 are the letters of these identities in this project; F1 is held by the golden files.
"""

from itertools import product

import pytest
import torch
from cases import CONFIGS, random_params, random_tokens
from models import hand_built

from gptcore import forward
from gptcore.interpret.pairs import kl, logit_diff, logprob_of, prob
from gptcore.interpret.patching import AXES, DEFAULT_BY, patch_cells, run_cells, swap_of, sweep
from gptcore.interpret.taps import patch, record

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
deep = pytest.mark.parametrize(
    "config", [c for c in CONFIGS.values() if c.n_layer > 1], ids=[n for n, c in CONFIGS.items() if c.n_layer > 1]
)
METRIC = logit_diff(torch.tensor([3, 8, 1]), 5)


def close(got, wanted, atol=1e-9):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol, equal_nan=True)


def pair(config, length=12, first=4):
    """Three clean prompts, and their twins that differ in three tokens: at `first`, three later, and at the end."""
    clean = random_tokens(config, length=length)
    corrupt = clean.clone()
    for at in (first, first + 3, length - 1):  # the last, or a window of one key would see no difference
        corrupt[:, at] = (corrupt[:, at] + 1 + at) % config.n_vocab
    return clean, corrupt


def sites_of(config):
    return [site for site in AXES if site != "resid_mid" or config.block == "sequential"]


def naive(params, config, clean, corrupt, site, metric, cell, by, *, position=-1, width=1, links=None):
    """One whole forward of the corrupt run with a cell's values from the clean one."""
    names = ("attn.out", "mlp.out") if site == "block" else (site,)
    at, links = dict(zip(by, cell, strict=True)), links or [(i, i) for i in range(clean.shape[1])]
    low, high = max(0, cell[0] - width // 2), cell[0] + (width + 1) // 2
    wanted = [f"blocks.{i}.{name}" for i in range(low, min(high, config.n_layer)) for name in names]
    tap, seen = record(config, wanted)
    forward(params, config, clean, tap=tap)

    def edit(value, new):
        value = value.clone()
        if site == "attn.pattern":
            for (q_from, q), (k_from, k) in product(links, links):
                if at.get("query", q) == q and at.get("key", k) == k:
                    heads = at.get("head", slice(None))
                    value[:, heads, q, k] = new[:, heads, q_from, k_from]
            return value
        for here, there in links:
            if at.get("position", there) == there:
                heads = (at.get("head", slice(None)),) if "head" in AXES[site] else ()
                value[(slice(None), there, *heads)] = new[(slice(None), here, *heads)]
        return value

    edits = {name: lambda value, name=name: edit(value, seen[name]) for name in wanted}
    return metric(forward(params, config, corrupt, tap=patch(config, edits))[0][:, position])


@every_config
def test_f5_a_sweep_is_one_forward_a_cell_at_every_site(config):
    """Every axis of every site told apart. Seen to fail when a cell starts one position late."""
    params, (clean, corrupt) = random_params(config), pair(config, length=8, first=3)
    for site in sites_of(config):
        by = ("layer", *(axis for axis in AXES[site] if axis != "key"))
        found = sweep(params, config, clean, corrupt, site, METRIC, by=by)
        sizes = found.patched.shape
        assert sizes[0] == config.n_layer
        if not config.n_layer:
            continue
        cells = [cell for cell in product(*map(range, sizes[:-1])) if sum(cell) % 5 == 0]
        for cell in cells:
            close(found.patched[cell], naive(params, config, clean, corrupt, site, METRIC, cell, by))
        if config.window != 1 or site not in ("attn.q", "attn.k", "attn.pattern"):  # there a query has one key
            assert (found.patched - found.corrupt).abs().max() > 1e-3


@deep
def test_f5_coarser_cells_are_the_same_forward_too(config):
    """By layer, by layer and head, one key at a time, three layers at once."""
    params, (clean, corrupt) = random_params(config), pair(config, length=8, first=3)
    for site, by, width in [
        *((site, DEFAULT_BY[AXES[site]], 1) for site in sites_of(config)),
        *((site, ("layer",), 2) for site in sites_of(config)),
        ("mlp.out", ("layer", "position"), 3),
        ("attn.pattern", ("layer", "key"), 1),
    ]:
        found = sweep(params, config, clean, corrupt, site, METRIC, by=by, width=width)
        assert found.axes == by
        for cell in [found.patched[..., 0].argmax(), found.patched[..., 0].argmin()]:
            cell = tuple(int(i) for i in torch.unravel_index(cell, found.patched.shape[:-1]))
            wanted = naive(params, config, clean, corrupt, site, METRIC, cell, by, width=width)
            close(found.patched[cell], wanted)


@deep
def test_f2_f7_the_whole_stream_is_the_whole_difference(config):
    params, (clean, corrupt) = random_params(config), pair(config)
    for direction in ("denoise", "noise"):
        found = sweep(params, config, clean, corrupt, "resid_post", METRIC, by=("layer",), direction=direction)
        close(found.recovery, torch.ones_like(found.patched), atol=1e-6)
        last = (clean, corrupt)[direction == "noise"]
        close(found.patched[-1], METRIC(forward(params, config, last)[0][:, -1]))


@deep
def test_f3_nothing_happens_before_the_first_difference_or_after_what_is_read(config):
    params, (clean, corrupt) = random_params(config), pair(config)
    corrupt[1, 4] = clean[1, 4]  # this pair differs from position 7 on
    for site in sites_of(config):
        by = ("layer", "query" if site == "attn.pattern" else "position")
        found = sweep(params, config, clean, corrupt, site, METRIC, by=by, position=7)
        assert (found.recovery[:, :4] == 0).all()
        assert (found.recovery[:, 4:7, 1] == 0).all()
        assert (found.recovery[:, 8:] == 0).all()
        assert (found.recovery[:, 4:8, 0] != 0).any()


@deep
def test_f4_at_the_bottom_only_differing_positions_matter_and_are_everything(config):
    params, (clean, corrupt) = random_params(config), pair(config)
    found = sweep(params, config, clean, corrupt, "resid_pre", METRIC)
    same = [at for at in range(12) if at not in (4, 7, 11)]
    close(found.recovery[0, same], torch.zeros(9, 3, dtype=torch.float64))
    assert (found.recovery[0, [4, 7, 11]].abs() > 1e-4).any()
    both = sweep(params, config, clean, corrupt, "resid_pre", METRIC, by=("layer",), positions=[4, 7, 11])
    close(both.recovery[0], torch.ones(3, dtype=torch.float64))


def test_every_site_has_its_own_axes_unless_told():
    """Seen to fail with a pattern, which had none."""
    config = CONFIGS["gqa"]
    params, (clean, corrupt) = random_params(config), pair(config)
    sizes = {("position",): (2, 12, 3), ("position", "head"): (2, 4, 3), ("head", "query", "key"): (2, 4, 12, 3)}
    for site in sites_of(config):
        wanted = {"block": (2, 3), "attn.k": (2, 2, 3), "attn.v": (2, 2, 3)}.get(site, sizes[AXES[site]])
        assert sweep(params, config, clean, corrupt, site, METRIC).patched.shape == wanted, site


def test_f6_equal_prompts_have_nothing_to_recover():
    config = CONFIGS["gpt2"]
    params, clean = random_params(config), random_tokens(config, length=9)
    found = sweep(params, config, clean, clean.clone(), "attn.z", METRIC)
    assert found.recovery.isnan().all()
    assert found.undefined(0, 0, 2).startswith("clean and corrupt hardly differ (")
    assert (found.patched == found.corrupt).all()


@deep
def test_f8_its_own_values_change_nothing(config):
    """Every cell really runs: the base's own values go into it, and the first difference is said to be at 0."""
    params, (_, corrupt) = random_params(config), pair(config)
    for site in sites_of(config):
        swap, _ = swap_of(params, config, corrupt, corrupt, site, METRIC, -1, "denoise", None)
        by = ("layer", AXES[site][0])
        cells = torch.tensor(list(product(range(2), range(4))))
        patched, work = run_cells(
            params, config, swap._replace(first=torch.zeros(3)), site, cells, by, METRIC, range(12)
        )
        close(patched, swap.value.expand(8, 3))
        assert work > 0


def test_f9_in_the_hand_built_model_only_the_induction_head_carries_the_answer():
    """BOS r r[:i+1], and the same with token i + 1 of the first copy replaced, for three i at once."""
    params, config = hand_built()
    r = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    clean = torch.cat([torch.tensor([12]), r, r])[None].repeat(3, 1)
    corrupt, i, rows = clean.clone(), torch.tensor([2, 5, 8]), torch.arange(3)
    corrupt[rows, i + 2] = r[0]
    metric = logit_diff(r[i + 1], r[0])
    found = sweep(params, config, clean, corrupt, "attn.z", metric, position=i + 13)
    close(found.recovery[1, 0], torch.ones(3), atol=1e-5)
    for head in ((0, 0), (0, 1), (1, 1)):
        close(found.recovery[head], torch.zeros(3), atol=1e-5)
    key = sweep(params, config, clean, corrupt, "attn.v", metric, by=("layer", "position", "head"), position=i + 13)
    close(key.recovery[1, i + 2, 0, rows], torch.ones(3), atol=1e-5)  # whose value it copies


@deep
def test_rows_of_their_own_lengths_are_read_where_they_end(config):
    """Padded on the right: what a row says at its own end does not depend on its company."""
    params, (clean, corrupt) = random_params(config), pair(config)
    ends = torch.tensor([11, 8, 9])
    together = sweep(params, config, clean, corrupt, "mlp.out", METRIC, position=ends)
    for row, end in enumerate(ends.tolist()):
        metric = logit_diff([3, 8, 1][row], 5)
        cut = slice(row, row + 1), slice(end + 1)
        alone = sweep(params, config, clean[cut], corrupt[cut], "mlp.out", metric)
        close(together.patched[:, : end + 1, row], alone.patched[..., 0])
        assert (together.patched[:, end + 1 :, row] == together.corrupt[row]).all()


def test_several_tokens_are_scored_by_teacher_forcing():
    """ln p(a b c | prompt) at three positions, also for cells that lie between them."""
    config = CONFIGS["llama"]
    params, (clean, corrupt) = random_params(config), pair(config)
    ids = torch.tensor([[3, 9, 4]]).expand(3, -1)
    clean, corrupt = (torch.cat([tokens, ids[:, :2]], dim=1) for tokens in (clean, corrupt))
    metric, at = logprob_of(ids), torch.arange(-3, 0)[None]
    found = sweep(params, config, clean, corrupt, "resid_pre", metric, position=at)
    whole = forward(params, config, clean)[0][:, -3:].log_softmax(-1)
    close(found.clean, whole.gather(-1, ids[..., None]).sum((1, 2)))
    for cell in product(range(2), (5, 10, 11, 12, 13)):
        wanted = naive(params, config, clean, corrupt, "resid_pre", metric, cell, found.axes, position=slice(-3, None))
        close(found.patched[cell], wanted)


@deep
def test_two_lengths_are_compared_where_they_are_paired(config):
    params, (clean, corrupt) = random_params(config), pair(config)
    corrupt = corrupt[:, 1:]
    links = [(0, 0), (1, 1), (2, 2), (7, 5), (9, 8), (10, 9), (11, 10)]
    for site in ("resid_pre", "attn.z"):
        found = sweep(params, config, clean, corrupt, site, METRIC, by=("layer", "position"), align=links)
        without = [3, 4, 6, 7]
        assert found.patched[:, without].isnan().all()
        assert found.undefined(0, 3, 1) == "the position has no counterpart in the other prompt"
        assert found.undefined(0, 5, 1) == ""
        for cell in product(range(config.n_layer), (2, 5, 8, 10)):
            wanted = naive(params, config, clean, corrupt, site, METRIC, cell, found.axes, links=links)
            close(found.patched[cell], wanted)
    found = sweep(params, config, clean, corrupt, "attn.pattern", METRIC, by=("layer", "head"), align=links)
    wanted = naive(params, config, clean, corrupt, "attn.pattern", METRIC, (1, 2), found.axes, links=links)
    close(found.patched[1, 2], wanted)
    back = sweep(params, config, clean, corrupt, "attn.z", METRIC, by=("layer",), align=links, direction="noise")
    turned = [(b, a) for a, b in links]
    close(back.patched[1], naive(params, config, corrupt, clean, "attn.z", METRIC, (1,), ("layer",), links=turned))


@pytest.mark.parametrize("metric", [prob(7), kl(torch.randn(3, 61, generator=torch.Generator().manual_seed(1)))])
def test_how_cells_share_batches_changes_nothing(metric):
    config = CONFIGS["gqa"]
    params, (clean, corrupt) = random_params(config), pair(config)
    whole = sweep(params, config, clean, corrupt, "attn.k", metric, by=("layer", "position", "head"))
    one = sweep(params, config, clean, corrupt, "attn.k", metric, by=("layer", "position", "head"), budget=1)
    close(one.patched, whole.patched)
    assert whole.patched.shape == (2, 12, 2, 3)
    assert one.forwards == pytest.approx(whole.forwards)
    cells = [(1, 5, 1), (0, 7, 0)]
    few = patch_cells(params, config, clean, corrupt, "attn.k", metric, cells, by=whole.axes)
    close(few, torch.stack([whole.patched[cell] for cell in cells]))


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn.v", "block"])
def test_one_cell_alone_runs_through_the_layers_above(site):
    """The layers above it have no cell of their own. Seen to fail when each layer was expected to have one."""
    config = CONFIGS["gpt2"]
    params, (clean, corrupt) = random_params(config), pair(config)
    by = ("layer", "position")
    found = patch_cells(params, config, clean, corrupt, site, METRIC, [(0, 7)], by=by)
    close(found[0], naive(params, config, clean, corrupt, site, METRIC, (0, 7), by))


def test_no_more_runs_than_must():
    """A cell of the upper layer runs one block of two on the positions from its group of 8 on."""
    config = CONFIGS["gpt2"]
    params, (clean, corrupt) = random_params(config), pair(config, length=32, first=8)
    found = sweep(params, config, clean, corrupt, "resid_pre", METRIC)
    cells = {8: 8, 16: 8, 24: 8}
    wanted = sum(n * (32 - start) / 32 for start, n in cells.items()) * (1 + 0.5)
    assert found.forwards == pytest.approx(2 + wanted)


def test_what_does_not_fit_is_refused():
    config = CONFIGS["phi"]
    params, (clean, corrupt) = random_params(config), pair(config)
    run = lambda *words, **ways: sweep(params, config, *words, **ways)
    with pytest.raises(
        ValueError, match=r"expected equal shapes, or align for two lengths, got \(3, 12\) and \(3, 11\)"
    ):
        run(clean, corrupt[:, 1:], "resid_pre", METRIC)
    with pytest.raises(ValueError, match=r"site: expected one of resid_pre, resid_post, attn\.out.*got 'resid_mid'"):
        run(clean, corrupt, "resid_mid", METRIC)
    with pytest.raises(ValueError, match=r"by: expected layer, then any of position, head for attn\.z"):
        run(clean, corrupt, "attn.z", METRIC, by=("layer", "query"))
    with pytest.raises(ValueError, match="direction: expected one of denoise, noise, got 'up'"):
        run(clean, corrupt, "resid_pre", METRIC, direction="up")
    with pytest.raises(ValueError, match=r"positions: expected them within 12 tokens, got \[3, 12\]"):
        run(clean, corrupt, "resid_pre", METRIC, positions=[3, 12])
    with pytest.raises(ValueError, match="position: expected one for all or 3, within 12 tokens, got 12"):
        run(clean, corrupt, "resid_pre", METRIC, position=12)
    with pytest.raises(ValueError, match=r"align: expected positions below 12 and 11"):
        run(clean, corrupt[:, 1:], "resid_pre", METRIC, align=[(11, 11)])
    with pytest.raises(ValueError, match=r"align: expected positions below 12 and 11, each once"):
        run(clean, corrupt[:, 1:], "resid_pre", METRIC, align=[(1, 1), (2, 1)])
    with pytest.raises(ValueError, match="position: expected one counted from the end"):
        run(clean, corrupt[:, 1:], "resid_pre", METRIC, align=[(11, 10)], position=3)
