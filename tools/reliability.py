"""A reliability curve as an SVG picture: what was said against what came true, drawn without a plotting package."""

from xml.sax.saxutils import escape

SIZE, LEFT, TOP, BAR = 320, 56, 30, 60  # the square, what is left of it and above, and the height of the counts below


def reliability_svg(name, curve) -> str:
    """The picture as text: a dot a bin with its interval, the diagonal of the honest, and below how many forecasts."""
    x = lambda share: LEFT + SIZE * share
    y = lambda share: TOP + SIZE * (1 - share)
    floor = TOP + SIZE + 40 + BAR  # what the counts stand on
    most = max(curve.n.tolist())
    total = int(curve.n.sum())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + SIZE + 24} {floor + 24}" role="img" '
        'font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>Calibration of {escape(name)}</title>",
        f"<desc>Of {total:,} forecasts, by confidence, the share that came true</desc>",
        f'<text x="{LEFT}" y="18">{escape(name)}: came true, by what was said</text>',
        f'<path d="M{x(0)} {y(0)}L{x(1)} {y(1)}" stroke="currentColor" stroke-opacity="0.3" stroke-dasharray="4"/>',
    ]
    for n in range(5):
        share = n / 4
        lines += [
            f'<path d="M{LEFT} {y(share):.1f}H{x(1)}" stroke="currentColor" stroke-opacity="0.15"/>',
            f'<text x="{LEFT - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>',
            f'<text x="{x(share):.1f}" y="{TOP + SIZE + 18}" text-anchor="middle">{100 * share:.0f} %</text>',
        ]
    columns = [column.tolist() for column in curve]
    places = " ".join(f"{x(said):.1f},{y(true):.1f}" for _, said, true, _, _ in zip(*columns, strict=True))
    lines += [f'<polyline points="{places}" fill="none" stroke="#2196f3" stroke-width="2"/>']
    for n, said, true, low, high in zip(*columns, strict=True):
        height = BAR * n / most
        lines += [
            f'<path d="M{x(said):.1f} {y(low):.1f}V{y(high):.1f}" stroke="#2196f3" stroke-opacity="0.5"/>',
            f'<circle cx="{x(said):.1f}" cy="{y(true):.1f}" r="4" fill="{"#ff9800" if said > true else "#4caf50"}"/>',
            f'<rect x="{x(said) - 5:.1f}" y="{floor - height:.1f}" width="10" height="{height:.1f}" fill="#673ab7"/>',
        ]
    lines += [f'<text x="{LEFT}" y="{floor + 16}">{total:,} forecasts, at most {most:,} in a bin</text>', "</svg>"]
    return "\n".join(lines) + "\n"
