"""loss.svg: points where the numbers say, and well-formed whatever the run is called."""

import xml.etree.ElementTree as xml

import pytest

from gptcore import checkpoint
from tools.plot import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, loss_svg, running_mean, write_loss_plot


def points(svg, index):
    """The points of one polyline."""
    lines = xml.fromstring(svg).findall("{*}polyline")
    return [tuple(map(float, pair.split(","))) for pair in lines[index].get("points").split()]


def test_losses_lie_between_the_axes():
    """The highest is at the top, the lowest at the bottom, the last token at the right."""
    svg = loss_svg("run", [(0, 4.0), (50, 3.0), (100, 2.0)], [(100, 2.5)])
    assert points(svg, 0) == [
        (LEFT, TOP),
        ((LEFT + WIDTH - 16) / 2, (TOP + HEIGHT - BOTTOM) / 2),
        (WIDTH - 16, HEIGHT - BOTTOM),
    ]
    (dot,) = xml.fromstring(svg).findall("{*}circle")
    assert (float(dot.get("cx")), float(dot.get("cy"))) == (WIDTH - 16, TOP + 0.75 * (HEIGHT - TOP - BOTTOM))


def test_a_constant_has_a_constant_mean():
    assert [loss for _, loss in running_mean([(n, 3.0) for n in range(5)])] == pytest.approx([3.0] * 5)


def test_a_flat_loss_and_a_strange_name():
    """No division by zero, and a name is text, not markup."""
    root = xml.fromstring(loss_svg("<a> & b", [(1, 2.0), (2, 2.0)], []))
    assert root.find("{*}title").text == "Loss of <a> & b"


def test_a_run_of_one_update_has_no_picture(tmp_path):
    checkpoint.append_metrics(tmp_path, {"kind": "train", "step": 1, "tokens": 10, "loss": 3.0})
    write_loss_plot(tmp_path)
    assert not (tmp_path / "loss.svg").exists()
    checkpoint.append_metrics(tmp_path, {"kind": "train", "step": 2, "tokens": 20, "loss": 2.0})
    write_loss_plot(tmp_path)
    assert len(points((tmp_path / "loss.svg").read_text(encoding="utf-8"), 0)) == 2


def test_the_last_point_is_drawn_however_many_there_are():
    """Seen to fail when every third point was taken and the last was none of them."""
    train = [(n, 4.0 - n / 4000) for n in range(1, 4502)]
    svg = loss_svg("run", train, [])
    for index in (0, 1):
        assert 1500 <= len(points(svg, index)) <= 2252
        assert points(svg, index)[-1][0] == WIDTH - 16


def test_few_tokens_have_labels():
    """Seen to fail: below 500 they were all 0k."""
    labels = [text.text for text in xml.fromstring(loss_svg("run", [(100, 3.0), (400, 2.0)], [])).findall("{*}text")]
    assert labels[-5:] == ["0", "100", "200", "300", "400"]
    labels = [text.text for text in xml.fromstring(loss_svg("run", [(1, 3.0), (4e5, 2.0)], [])).findall("{*}text")]
    assert labels[-5:] == ["0", "100k", "200k", "300k", "400k"]
