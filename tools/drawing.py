"""What invoke sampling-demo shows: a confident and an uncertain distribution under every setting."""

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from gptcore.generate import GenerateOptions, generate
from gptcore.sampling import Sampling, kept_weights, sample

GREEDY = Sampling(temperature=0.0)
CONFIDENT = (10.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.05, 0.01)
UNCERTAIN = (2.0, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2)
FALLING = (5.0, 4.0, 3.0, 2.0, 1.0)
CUTS = {"all": Sampling(), "greedy": GREEDY, "top-k 3": Sampling(top_k=3), "top-p 0.95": Sampling(top_p=0.95)}
DISTRIBUTIONS = {
    "Confident": (CONFIDENT, CUTS),
    "Uncertain": (UNCERTAIN, CUTS | {"k 5, p 0.9": Sampling(top_k=5, top_p=0.9)}),
    "Temperature": (FALLING, {f"temperature {t:g}": Sampling(temperature=t) for t in (0.5, 1.0, 2.0)}),
}
ADVICE = {
    "facts": ("40", "0.85", "0.7"),
    "general": ("50", "0.9", "1.0"),
    "creative": ("100", "0.95", "1.2"),
    "chat": ("-", "0.9", "0.8"),
    "code": ("20", "-", "0.6"),
    "repeatable": ("-", "-", "0 (greedy)"),
}
WAYS = {
    "greedy": GREEDY,
    "multinomial, temperature 1.0": Sampling(),
    "top-k 50, temperature 0.8": Sampling(temperature=0.8, top_k=50),
    "top-p 0.9, temperature 0.8": Sampling(temperature=0.8, top_p=0.9),
    "top-k 50, top-p 0.9, temperature 0.8": Sampling(temperature=0.8, top_k=50, top_p=0.9),
}
N_NEW = 20
BARS = "·▁▂▃▄▅▆▇█"


def exact(logits, settings) -> torch.Tensor:
    """The probability of each token under the settings, (V,)."""
    if settings.temperature == 0:
        return torch.nn.functional.one_hot(torch.tensor(logits).argmax(), len(logits)).double()
    weights = kept_weights(torch.tensor(logits), **settings._asdict()).double().reshape(-1)
    return weights / weights.sum()


def drawn(logits, settings, draws, seed) -> torch.Tensor:
    """How often each token came in so many draws, (V,)."""
    rows = torch.tensor(logits).expand(draws, -1)
    tokens = sample(rows, seed=seed, position=torch.arange(draws), **settings._asdict())
    return torch.bincount(tokens, minlength=len(logits))


def show_distributions(draws, seed, console) -> None:
    """A table for each distribution: a row a token, a column a setting, exact percent beside drawn percent."""
    for name, (logits, ways) in DISTRIBUTIONS.items():
        title = f"{name}: percent exact, and of {draws} draws"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("logit", justify="right")
        for way in ways:
            table.add_column(way, justify="right", no_wrap=True)
        p = [exact(logits, settings) for settings in ways.values()]
        n = [drawn(logits, settings, draws, seed) for settings in ways.values()]
        for token, logit in enumerate(logits):
            cells = [cell(p[way][token].item(), n[way][token].item() / draws) for way in range(len(ways))]
            table.add_row(f"{logit:g}", *cells)
        table.add_section()
        table.add_row("unique", *(str((count > 0).sum().item()) for count in n))
        table.add_row("top", *(f"{count.max().item()} of {draws}" for count in n))
        console.print(table)


def cell(p, share) -> Text:
    """A probability and a frequency, each with its bar; nothing where a token cannot be drawn."""
    if p == 0:
        return Text("-")
    bar = lambda x: BARS[min(len(BARS) - 1, round(x * (len(BARS) - 1)))]
    return Text.assemble(f"{100 * p:.1f} ", (bar(p), "#673ab7"), f"{100 * share:4.0f} ", (bar(share), "#2196f3"))


def show_advice(console) -> None:
    """Where to begin."""
    table = Table(box=box.SIMPLE_HEAD, title="Where to begin", title_justify="left")
    for column in ("for", "top-k", "top-p", "temperature"):
        table.add_column(column, justify="left" if column == "for" else "right")
    for use, values in ADVICE.items():
        table.add_row(use, *values)
    console.print(table)


def show_texts(model, prompt, seed, console) -> None:
    """The same prompt continued in five ways."""
    ids = model.tokenizer.encode(prompt) or [model.tokenizer.eot]
    console.print(Text.assemble((model.name, "bold"), f": {N_NEW} tokens after {prompt!r}"))
    for way, settings in WAYS.items():
        options = GenerateOptions(sampling=settings, max_new_tokens=N_NEW, seed=seed, stop=(model.tokenizer.eot,))
        new = [step.tokens[0] for step in generate(model.params, model.config, [ids], options)]
        console.print(Text.assemble((f"{way}\n", "bold #673ab7"), prompt, (model.tokenizer.decode(new), "#2196f3")))
