"""What a training looks like: the verdicts, the numbers in words, and the panel's colours."""

import io
import math

import pytest
from rich.console import Console

from tools.view import View, duration, perplexity, verdict

RUN = {"options": {"warmup": 0.05}, "n_steps": 40, "epochs": 2, "epoch_ends": [20, 40]}


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        (1.04, "learning well"),
        (1.06, "learning, a small gap is normal"),
        (1.2, "still training"),
        (1.31, "possible overfitting"),
    ],
)
def test_a_gap_in_words(validation, said):
    """R14, from four pairs of numbers."""
    assert verdict(2.0, 2.0 * validation) == said


def test_numbers_in_words():
    assert [duration(seconds) for seconds in (4, 89, 90, 5_400)] == ["4 s", "89 s", "1.5 min", "1.5 h"]
    assert [perplexity(loss) for loss in (0.0, math.log(250), 800.0)] == ["1", "250", "inf"]


def record(step, **changes):
    """A training record as gptcore.train yields it, with what tools/training.py adds."""
    row = {
        "kind": "train", "step": step, "epoch": 1 + (step > 20), "loss": 5.0, "lr": 3e-4, "grad_norm": 0.5,
        "clipped": False, "seconds": 0.1, "tokens_per_second": 10_000.0, "mfu": 0.1,
    }  # fmt: skip
    return row | changes


@pytest.mark.parametrize(("n_clipped", "yellow"), [(2, False), (3, True)])
def test_the_share_of_clipped_updates_is_yellow_above_a_tenth(n_clipped, yellow):
    """R15: 2 of 20 are a tenth, 3 are more."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100)
    view = View(console, RUN, 0)
    for step in range(1, 21):
        view.update(record(step, clipped=step <= n_clipped, grad_norm=3.0 if step <= n_clipped else 0.5))
    view.update(
        {
            "kind": "validation",
            "step": 20,
            "epoch": 1,
            "loss": 5.1,
            "perplexity": 164.0,
            "bits_per_byte": 2.0,
            "seconds": 1.0,
        }
    )
    said = console.file.getvalue()
    assert (f"\x1b[33mclipped {5 * n_clipped} % of the updates" in said) is yellow
    assert f"clipped {5 * n_clipped} % of the updates" in said
    assert "max 3.00" in said
    assert "Epoch 1 of 2, update 20" in said


def test_the_panel_keeps_fifteen_rows_and_marks_the_warm_up():
    """R12."""
    console = Console(file=io.StringIO(), width=120)
    view = View(console, RUN, 0)
    for step in range(1, 17):
        view.update(record(step, loss=6.0 if step == 16 else 5.0))
    console.file = io.StringIO()
    console.print(view.draw())
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    shown = {row[0]: row for row in rows if row and row[0].isdigit()}
    assert [*shown] == [str(step) for step in range(2, 17)]
    assert shown["2"][5] == "3.00e-04*"
    assert shown["3"][5] == "3.00e-04"
    assert shown["16"][1:4] == ["6.0000", "403.4", "5.0500"]  # the mean moves by a twentieth
