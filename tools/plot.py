"""loss.svg: how a run's loss fell, drawn without a plotting package so that every run has its picture."""

from pathlib import Path
from xml.sax.saxutils import escape

from gptcore import checkpoint
from gptcore.files import write_whole

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 360, 56, 40, 30


def write_loss_plot(run_dir) -> None:
    """Draw run_dir/loss.svg from its metrics: training loss thin, its running mean thick, validation as dots."""
    rows = checkpoint.read_metrics(run_dir)
    train = [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "train"]
    if len(train) < 2:
        return
    tokens_at = {row["step"]: row["tokens"] for row in rows if row["kind"] == "train"}
    held_out = [
        (tokens_at[row["step"]], row["loss"])
        for row in rows
        if row["kind"] == "validation" and row["step"] in tokens_at
    ]
    write_whole(Path(run_dir) / "loss.svg", loss_svg(Path(run_dir).name, train, held_out))


def loss_svg(name, train, held_out) -> str:
    """The picture as text; train and held_out are lists of (tokens, loss). It takes the page's text colour."""
    most = train[-1][0]
    losses = [loss for _, loss in train + held_out]
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1
    x = lambda tokens: LEFT + (WIDTH - LEFT - 16) * tokens / most
    y = lambda loss: TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)
    points = lambda pairs: " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in pairs)
    every = max(1, len(train) // 1500)  # more points than pixels help nobody
    thin = lambda pairs: pairs[:-1:every] + pairs[-1:]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>Loss of {escape(name)}</title>",
        f"<desc>Training loss from {train[0][1]:.3f} to {train[-1][1]:.3f} nats per token over {most:,} tokens"
        + (f"; validation ends at {held_out[-1][1]:.3f}" if held_out else "")
        + "</desc>",
        f'<text x="{LEFT}" y="18">{escape(name)}: nats per token; dots: held-out text</text>',
    ]
    for n in range(5):
        loss = low + (high - low) * n / 4
        lines += [
            f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - 16}" stroke="currentColor" stroke-opacity="0.15"/>',
            f'<text x="{LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>',
        ]
    for n in range(5):
        anchor = "end" if n == 4 else "middle"
        lines += [
            f'<text x="{x(most * n / 4):.1f}" y="{HEIGHT - 16}" text-anchor="{anchor}">{_tokens(most * n / 4)}</text>'
        ]
    lines += [
        f'<polyline points="{points(thin(train))}" fill="none" stroke="currentColor" stroke-opacity="0.3"/>',
        f'<polyline points="{points(thin(running_mean(train)))}" fill="none" stroke="#2196f3" stroke-width="2"/>',
        *(f'<circle cx="{x(tokens):.1f}" cy="{y(loss):.1f}" r="4" fill="#673ab7"/>' for tokens, loss in held_out),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def running_mean(pairs, weight=0.95):
    """(tokens, loss) with the loss averaged over the past, the far past weighing less."""
    smooth, total, norm = [], 0.0, 0.0
    for tokens, loss in pairs:
        total, norm = weight * total + loss, weight * norm + 1
        smooth.append((tokens, total / norm))
    return smooth


def _tokens(n):
    if n < 1e4:
        return f"{n:,.0f}"
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"
