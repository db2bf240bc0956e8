"""Two small models whose heads are known: one made by hand, one trained in seconds. Both do induction.

The hand-built one has exact scores, so a tool that names what it finds can be held to it. The trained one has what
training leaves: approximate heads, several of them, biases everywhere.
"""

import torch

from gptcore import generator, init_params, nats, optim, tree
from gptcore.config import ModelConfig, architecture
from gptcore.train import TrainOptions, init_state, train

BETA = 60.0  # the score of a match; exp(-60) of everything else is nothing


def hand_built(n_vocab=13, n_context=25, dtype=torch.float32):
    """(params, config): block 0 copies each token's predecessor next to it, block 1 looks for it and copies on.

    The residual stream holds one-hot slots [token | position | previous | out]. L0H0 is the previous-token head; L0H1
    attends to equal tokens and writes nothing; L1H0 is the induction head; L1H1 attends to position 0 and writes
    nothing. The gains of norm_1 make the norms the identity: two ones in block 0's stream, three in block 1's.
    """
    d_model = 3 * n_vocab + n_context
    config = ModelConfig(
        n_vocab=n_vocab, n_context=n_context, n_layer=2, d_model=d_model, n_head=2, d_head=max(n_vocab, n_context),
        d_ff=1, norm="rmsnorm", bias="none", tied=False,
    )  # fmt: skip
    eye = lambda n, start, n_in: torch.eye(n_in, dtype=dtype)[start : start + n]
    token, position = eye(n_vocab, 0, d_model), eye(n_context, n_vocab, d_model)
    previous = eye(n_vocab, n_vocab + n_context, d_model)
    out = eye(n_vocab, 2 * n_vocab + n_context, d_model)  # each reads its slot: (width, C)
    before, first = torch.zeros_like(position), torch.zeros_like(position)
    before[0] = position[0] + position[1]  # position 0 has nothing before it and asks for itself
    before[1:-1] = position[2:]
    first[0] = position.sum(0)
    nothing = torch.zeros_like(token)
    ask = BETA * config.d_head**0.5
    wide = lambda x: torch.nn.functional.pad(x, (0, 0, 0, config.d_head - len(x)))  # (D,C)
    heads = lambda *each: torch.cat([wide(x) for x in each])
    blocks = [
        {
            "q": heads(ask * before, ask * token), "k": heads(position, token), "v": heads(token, nothing),
            "o": heads(previous, nothing).T,
        },
        {
            "q": heads(ask * token, ask * first), "k": heads(previous, position), "v": heads(token, nothing),
            "o": heads(10 * out, nothing).T,
        },
    ]  # fmt: skip
    params = tree.map(lambda leaf: torch.zeros_like(leaf, dtype=dtype), init_params(config, generator(0)))
    params["embed"]["w"], params["positions"]["w"], params["head"]["w"] = token.clone(), position.clone(), out.clone()
    params["norm_f"]["w"] += 1
    for p, weights, n_ones in zip(params["blocks"], blocks, (2, 3), strict=True):
        p["norm_1"]["w"] += (n_ones / d_model + config.norm_eps) ** 0.5
        p["norm_2"]["w"] += 1
        for name, w in weights.items():
            p["attn"][name]["w"] = w.contiguous()
    return params, config


def repeat_batch(config, n_rows, words):
    """(tokens, targets), each (n_rows, n_context - 1): random tokens in which a span is repeated right after itself.

    Its length is from 6 to 23 and its start anywhere: with one offset alone a model would learn the position. The
    targets are the repeated tokens but the first, which nobody can know; the others are -100.
    """
    stream, n = generator(*words), config.n_context
    rows = torch.randint(config.n_vocab, (n_rows, n), generator=stream)
    targets = torch.full_like(rows, -100)
    for row, target in zip(rows, targets, strict=True):
        t = int(torch.randint(6, 24, (), generator=stream))
        a = int(torch.randint(n - 2 * t + 1, (), generator=stream))
        row[a + t : a + 2 * t] = row[a : a + t].clone()
        target[a + t + 1 : a + 2 * t] = row[a + t + 1 : a + 2 * t]
    return rows[:, :-1], targets[:, 1:]


def repeat_loss(params, config, length=20):
    """Mean nats of the repeated tokens but the first, over 64 rows of different tokens and their copies."""
    stream = generator("repeat loss")
    r = torch.stack([torch.randperm(config.n_vocab, generator=stream)[:length] for _ in range(64)])
    rows = torch.cat([r, r], dim=1)
    with torch.no_grad():
        return nats(params, config, rows[:, :-1], rows[:, 1:])[:, length:].mean().item()


def trained(seed=0, n_steps=1500):
    """(params, config) of an attention-only model of two layers, trained until it repeats: 10 to 15 s on one thread.

    Attention-only, because the MLP's weights start at zero, which is a fixed point.
    """
    config = architecture("gpt2", n_vocab=40, n_context=48, n_layer=2, d_model=64, n_head=4, d_ff=1, tied=False)
    draw = generator(seed, "trained")

    def fresh(name, leaf):
        if leaf.ndim < 2 or ".mlp." in name:
            return leaf * 0 if ".mlp." in name else leaf
        std = 0.1 if name in ("embed.w", "positions.w") else config.d_model**-0.5 * (0.5 if name.endswith("o.w") else 1)
        return torch.randn(leaf.shape, generator=draw) * std

    params = tree.nest({name: fresh(name, leaf) for name, leaf in tree.walk(init_params(config, draw))})
    optimizer = optim.Options(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    options = TrainOptions(n_steps=n_steps, optimizer=optimizer, floor=1.0, warmup=50 / n_steps)  # up, then level
    batches = lambda step: repeat_batch(config, 32, (seed, "trained", step))
    state = init_state(params, config, options)
    for record in train(params, config, batches, state, options):
        if record["step"] % 25 == 0 and repeat_loss(params, config) < 0.05:
            break
    return tree.map(torch.Tensor.detach, params), config
