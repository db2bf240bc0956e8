import torch

from gptcore import tree


def test_walk_and_nest_are_inverse():
    nested = {"embed": {"w": torch.ones(2)}, "blocks": [{"a": torch.zeros(1)}, {"a": torch.ones(1)}]}
    flat = dict(tree.walk(nested))
    assert list(flat) == ["embed.w", "blocks.0.a", "blocks.1.a"]
    again = tree.nest(flat)
    assert list(again) == ["embed", "blocks"]
    assert [name for name, _ in tree.walk(again)] == list(flat)
    assert isinstance(again["blocks"], list)


def test_eleven_layers_stay_in_order():
    """Layer 10 sorts before layer 2 as a string. Seen to fail with sorted() on the keys."""
    flat = {f"blocks.{i}.w": torch.tensor(i) for i in range(12)}
    assert [int(block["w"]) for block in tree.nest(flat)["blocks"]] == list(range(12))


def test_map_takes_several_trees():
    a = {"x": torch.tensor(1.0), "y": [torch.tensor(2.0)]}
    total = tree.map(torch.add, a, a)
    assert total["x"] == 2
    assert total["y"][0] == 4


def test_overlay_adds_leaves_at_their_paths():
    first = {"a": [{"w": 1}, {"w": 2}], "b": {"w": 3}}
    assert tree.overlay(first, {"a": [{"x": 4}, {}], "b": {"w": 5}}) == {
        "a": [{"w": 1, "x": 4}, {"w": 2}],
        "b": {"w": 5},
    }
    assert first == {"a": [{"w": 1}, {"w": 2}], "b": {"w": 3}}
