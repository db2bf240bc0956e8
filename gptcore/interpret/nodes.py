"""The parts that write to the residual stream, and the parts that read it, by name.

What you learn here: a transformer is a list of writers (the embedding, each head, each MLP) that add to one stream,
and of readers (the queries, keys and values of each head, each MLP, the logits) that see the sum of all earlier ones.
A circuit is a choice of edges from writers to readers.
Axes: B rows, T tokens, H heads (H_kv), D head width, C model width.
Next: attribution.py splits a logit over writers, paths.py opens one edge, ablation.py takes nodes away.
"""

from typing import NamedTuple

from torch import Tensor

from gptcore.interpret.taps import sites


class Node(NamedTuple):
    """A part by its site, and by its head where the site has one for each: Node("blocks.1.attn.z", 3)."""

    site: str
    head: int | None = None

    def __str__(self):
        return self.site if self.head is None else f"{self.site}[{self.head}]"

    @property
    def layer(self) -> int:
        """The block it is in; -1 for the embedding."""
        return int(self.site.split(".")[1]) if self.site.startswith("blocks.") else -1


def heads(config) -> list[Node]:
    """Every head, by what it mixes (attn.z)."""
    return [Node(f"blocks.{i}.attn.z", h) for i in range(config.n_layer) for h in range(config.n_head)]


def mlps(config) -> list[Node]:
    """Every MLP, by what it writes (mlp.out)."""
    return [Node(f"blocks.{i}.mlp.out") for i in range(config.n_layer)]


def writers(config) -> list[Node]:
    """The embedding, and every head and MLP in the order in which they write."""
    order = lambda node: (node.layer, node.site.endswith("mlp.out"))
    return [Node("embed"), *sorted(heads(config) + mlps(config), key=order)]


def readers(config) -> list[Node]:
    """The queries, keys and values of every head (H_kv for keys and values), every MLP, and the logits."""
    found = []
    for i in range(config.n_layer):
        for name, n_head in (("q", config.n_head), ("k", config.n_kv_head), ("v", config.n_kv_head)):
            found += [Node(f"blocks.{i}.attn.{name}", h) for h in range(n_head)]
        found.append(Node(f"blocks.{i}.mlp"))
    return [*found, Node("logits")]


def feeds(config, writer, reader) -> bool:
    """Does the reader see what the writer adds? Attention reads before it writes; in a parallel block so does the MLP.

    Each block has two moments of writing, 2l and 2l + 1; a reader sees what was written before its own.
    """
    wrote = -1 if writer.layer < 0 else 2 * writer.layer + writer.site.endswith("mlp.out")
    late = reader.site.endswith("mlp") and config.block == "sequential"
    return wrote < (2 * config.n_layer if reader.site == "logits" else 2 * reader.layer + late)


def check_nodes(config, nodes, known) -> None:
    """Raise ValueError unless every node is one of the known ones."""
    for node in nodes:
        if node not in known:
            if node.site not in ("logits",) and not node.site.endswith(".mlp"):
                sites(config, node.site)  # says which names are near
            raise ValueError(f"node: expected one such as {known[0]} or {known[-1]}, got {node}")


def output_weights(params, config, layer) -> Tensor:
    """The output projection of each head, (H,D,C): head h writes z[h] W_O[h], and the layer's bias is nobody's."""
    return params["blocks"][layer]["attn"]["o"]["w"].unflatten(1, (config.n_head, config.d_head)).permute(1, 2, 0)


def head_results(params, config, layer, z) -> Tensor:
    """What each head writes, from attn.z (...,H,D) -> (...,H,C)."""
    return (z[..., None, :] @ output_weights(params, config, layer))[..., 0, :]
