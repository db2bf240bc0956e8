"""The moving picture as a drawing: when do heads begin to do what they do?"""

from xml.sax.saxutils import escape

from tools.plot import BOTTOM, HEIGHT, LEFT, TOP, WIDTH

RIGHT = WIDTH - 90  # names stand behind the lines


def history_svg(name, steps, curves) -> str:
    """steps, and curves {score: (its colour, {head: a strength a step})}: every head a thin line, each score's best at
    the end a thick one with its name. It takes the page's text colour.
    """
    last = max(steps[-1], 1)
    x = lambda step: LEFT + (RIGHT - LEFT) * step / last
    numbers = [value for _, heads in curves.values() for values in heads.values() for value in values]
    low = min(0.0, *(value for value in numbers if value == value))
    y = lambda value: TOP + (HEIGHT - TOP - BOTTOM) * (1 - value) / (1 - low)
    points = lambda values: " ".join(
        f"{x(step):.1f},{y(v):.1f}" for step, v in zip(steps, values, strict=True) if v == v
    )
    best = {score: max(heads, key=lambda head: heads[head][-1]) for score, (_, heads) in curves.items()}
    said = "; ".join(f"{score} {head} ends at {curves[score][1][head][-1]:.2f}" for score, head in best.items())
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" fill="currentColor">',
        f"<title>Heads of {escape(name)} as they form</title>",
        f"<desc>{escape(said)}</desc>",
        f'<text x="{LEFT}" y="18">{escape(name)}: attention beyond chance, a line a head, by update</text>',
    ]
    for n in range(6):
        lines += [
            f'<path d="M{LEFT} {y(n / 5):.1f}H{RIGHT}" stroke="currentColor" stroke-opacity="0.15"/>',
            f'<text x="{LEFT - 6}" y="{y(n / 5) + 4:.1f}" text-anchor="end">{n / 5:.1f}</text>',
        ]
    for n in range(5):
        step = last * n / 4
        lines.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 16}" text-anchor="middle">{step:,.0f}</text>')
    for score, (colour, heads) in curves.items():
        for head, values in heads.items():
            thick = head == best[score]
            width = 'stroke-width="2.5"' if thick else 'stroke-opacity="0.3"'
            line = f'<polyline points="{points(values)}" fill="none" stroke="{colour}" {width}>'
            lines.append(f"{line}<title>{escape(f'{score} {head}')}</title></polyline>")
            if thick:
                dot = f'cx="{x(steps[-1]):.1f}" cy="{y(values[-1]):.1f}" r="3" fill="{colour}"'
                lines.append(f"<circle {dot}/>")
    places = sorted(best, key=lambda score: -curves[score][1][best[score]][-1])
    height = TOP - 8
    for score in places:  # names do not lie on each other
        height = max(y(curves[score][1][best[score]][-1]) + 4, height + 14)
        colour = curves[score][0]
        lines.append(
            f'<text x="{RIGHT + 8}" y="{height:.1f}" fill="{colour}">{escape(f"{score} {best[score]}")}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"
