"""Nested parameters and their dotted names.

What you learn here: a model's weights are a plain nested dict with lists for the layers, and every leaf has one name,
the path to it ("blocks.0.attn.q.w"): the key in a checkpoint, in the optimizer state and in an error message.
"""

from torch import Tensor


def walk(tree, path=""):
    """Every leaf of a nested tree with its dotted name, in order: ("blocks.0.attn.q.w", tensor), ..."""
    if isinstance(tree, dict):
        for key, sub in tree.items():
            yield from walk(sub, f"{path}.{key}" if path else key)
    elif isinstance(tree, list):
        for index, sub in enumerate(tree):
            yield from walk(sub, f"{path}.{index}" if path else str(index))
    else:
        yield path, tree


def leaves(tree) -> list[Tensor]:
    """The leaves alone, in the order of walk."""
    return [leaf for _, leaf in walk(tree)]


def map(f, *trees):
    """A tree of the same shape whose leaves are f of the given trees' leaves."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: map(f, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, list):
        return [map(f, *subs) for subs in zip(*trees, strict=True)]
    return f(*trees)


def overlay(first, second):
    """The tree first with the leaves of second added, at their paths; where both have a leaf it is second's."""
    if isinstance(second, dict):
        return first | {key: overlay(first[key], sub) if key in first else sub for key, sub in second.items()}
    if isinstance(second, list):
        return [overlay(*pair) for pair in zip(first, second, strict=True)]
    return second


def nest(flat):
    """The inverse of walk: dotted names -> nested dicts; keys 0, 1, ... become a list."""
    tree = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return _listed(tree)


def _listed(node):
    if not isinstance(node, dict):
        return node
    node = {key: _listed(sub) for key, sub in node.items()}
    if node and all(key.isdigit() for key in node):
        return [node[str(index)] for index in range(len(node))]
    return node
