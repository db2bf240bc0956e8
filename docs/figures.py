"""The lessons' pictures, each drawn from a run that this script makes: python docs/figures.py writes docs/*.svg."""

import sys
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

from models import trained  # noqa: E402

from gptcore import architecture, generator, init_params, optim  # noqa: E402
from gptcore.interpret.attention import head_scores, patterns  # noqa: E402
from gptcore.sampling import kept_weights  # noqa: E402
from gptcore.tokenizer import named  # noqa: E402
from gptcore.train import TrainOptions, init_state, train  # noqa: E402
from tools.plot import loss_svg  # noqa: E402

BLUE = "#2196f3"


def picture(width, height, title, *lines) -> str:
    """An SVG with a white ground, which dark pages need, and a title for those who cannot see it."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
            'font-family="sans-serif" font-size="12">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *lines,
            "</svg>\n",
        ]
    )


def box(x, y, width, height, opacity) -> str:
    """A blue box."""
    return f'<rect x="{x}" y="{y:.1f}" width="{width}" height="{height:.1f}" fill="{BLUE}" opacity="{opacity:.2f}"/>'


def text(x, y, words) -> str:
    """Words that begin at a place."""
    return f'<text x="{x}" y="{y:.0f}">{words}</text>'


def heads() -> str:
    """The strongest previous-token and induction heads of a small trained model, on eight tokens said twice."""
    params, config = trained()
    tokens = torch.randperm(config.n_vocab, generator=generator("figure"))[:8].repeat(2)[None]
    scores, maps = head_scores(params, config, tokens), patterns(params, config, tokens)
    lines = []
    for place, (name, told) in enumerate((("previous", "previous token"), ("prefix", "induction"))):
        layer, head = divmod(int(scores[name].value.argmax()), config.n_head)
        left = 20 + 300 * place
        lines += [text(left, 20, f"block {layer}, head {head}: {told} (score {scores[name].value[layer, head]:.2f})")]
        lines += [f'<rect x="{left}" y="30" width="256" height="256" fill="none" stroke="#999"/>']
        lines += [
            box(left + 16 * k, 30 + 16 * q, 16, 16, share)
            for q, row in enumerate(maps[layer, 0, head].tolist())
            for k, share in enumerate(row)
            if share >= 0.01
        ]
    return picture(600, 320, "Two attention patterns", *lines, text(20, 308, "rows: queries; columns: keys, from left"))


def loss() -> str:
    """The loss of lesson 8's training."""
    words = named("byte")
    ids = torch.tensor(words.encode("the cat sat on the mat. " * 12))
    config = architecture("llama", n_vocab=words.n_vocab, n_context=32, n_layer=1, d_model=32)
    params = init_params(config, generator(42))
    options = TrainOptions(n_steps=40, optimizer=optim.Options(lr=1e-2))
    batches = lambda step: (ids[:256].view(8, 32), ids[1:257].view(8, 32))
    records = train(params, config, batches, init_state(params, config, options), options)
    drawn = loss_svg("lesson 8", [(record["tokens"], record["loss"]) for record in records], [])
    return drawn.replace("<title>", '<rect width="100%" height="100%" fill="white"/>\n<title>', 1)


def sampling() -> str:
    """What three settings leave of one distribution over twelve tokens."""
    logits, lines = 4 - 0.5 * torch.arange(12.0), []
    ways = ({"temperature": 1.0}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 3})
    for place, settings in enumerate(ways):
        weight = kept_weights(logits, **settings)
        left, told = 20 + 145 * place, ", ".join(f"{name} {value}" for name, value in settings.items())
        lines += [text(left, 20, told), f'<path d="M{left} 180h130" stroke="#999"/>']
        lines += [
            box(left + 11 * i, 180 - 200 * share, 9, 200 * share, 1)
            for i, share in enumerate((weight / weight.sum()).tolist())
        ]
    return picture(600, 200, "The same logits under four settings", *lines)


if __name__ == "__main__":
    for name, draw in (("heads", heads), ("loss", loss), ("sampling", sampling)):
        (DOCS / f"{name}.svg").write_text(draw(), encoding="utf-8")
        print(DOCS / f"{name}.svg")
