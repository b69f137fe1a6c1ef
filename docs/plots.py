#!/usr/bin/env python3
"""Draws the plots of docs/BENCHMARKS.md from its tables: docs/policies.svg, perplexity against bytes read for a token,
from the table behind the line <!-- policies -->, and docs/neurons.svg, loss against the share of neurons that is read, from
the one behind <!-- neurons -->. Needs nothing but Python."""
import pathlib
import re

HERE = pathlib.Path(__file__).parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 64, 16, 16, 48
POLICIES = {"exact": "#222222", "scored": "#1b6ca8", "miss": "#c0561a", "all": "#7a7a7a"}
IMAGES = ["#1b6ca8", "#c0561a", "#3a7d34", "#222222"]


def rows(name):
    """The cells of the table behind <!-- name -->."""
    text = (HERE / "BENCHMARKS.md").read_text().split(f"<!-- {name} -->")[1].strip().split("\n\n")[0]
    for line in text.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def number(cell):
    return float(re.sub(r"[^0-9.]", "", cell))


def ticks(low, high, step):
    first = int(low / step) + 1
    return [step * i for i in range(first, int(high / step) + 1)]


def draw(name, points, x_label, y_label, steps, limit, lines=False):
    """Writes `name`: `points` of (colour, label, x, y), ticks at multiples of `steps`, and a dashed line at `limit`, a
    y and what it says. With `lines` points of one colour are joined, and the last of them has the label."""
    xs, ys = [p[2] for p in points], [p[3] for p in points]
    x0, x1 = 0.92 * min(xs), 1.08 * max(xs)
    y0, y1 = min(ys) - 0.1 * (max(ys) - min(ys)), max(ys) + 0.12 * (max(ys) - min(ys))
    x = lambda v: LEFT + (v - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    y = lambda v: HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for v in ticks(x0, x1, steps[0]):
        out.append(f'<path d="M{x(v):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#dddddd"/>')
        out.append(f'<text x="{x(v):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{v:g}</text>')
    for v in ticks(y0, y1, steps[1]):
        out.append(f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    at, text = limit
    out.append(f'<path d="M{LEFT} {y(at):.1f}H{WIDTH - RIGHT}" stroke="#999999" stroke-dasharray="4 4"/>')
    out.append(f'<text x="{WIDTH - RIGHT - 4}" y="{y(at) - 5:.1f}" text-anchor="end" fill="#666666">{text}</text>')
    out.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x_label}</text>')
    out.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{y_label}</text>'
    )
    for colour in dict.fromkeys(p[0] for p in points) if lines else []:
        path = " ".join(f"{x(p[2]):.1f},{y(p[3]):.1f}" for p in points if p[0] == colour)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
    for i, (colour, label, px, py) in enumerate(points):
        out.append(f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="4" fill="{colour}"/>')
        if not lines or i + 1 == len(points) or points[i + 1][0] != colour:
            out.append(
                f'<text x="{x(px) + 6:.1f}" y="{y(py) - 5:.1f}" font-size="10" fill="{colour}">{label}</text>'
            )
    out.append("</svg>")
    (HERE / name).write_text("\n".join(out) + "\n")


def policies():
    points = []
    for policy, thresholds, perplexity, _, kib in (cells[:5] for cells in rows("policies")):
        label = policy if thresholds in ("", "-") else f"{policy} {thresholds}"
        points.append((policy, label, number(kib), float(perplexity)))
    exact = points[0][3]
    # What costs far more than the rest would press it flat: it stays in the table.
    points = [(POLICIES[p[0].split()[0]], *p[1:]) for p in points if p[3] < 1.12 * exact]
    draw("policies.svg", points, "KiB read for a token", "perplexity", (50, 0.5), (1.01 * exact, "1 % above exact"))


def neurons():
    points, all_of = [], {}
    for image, used, perplexity in (cells[:3] for cells in rows("neurons")):
        first = all_of.setdefault(image, float(perplexity))
        loss = 100 * (float(perplexity) / first - 1)
        # The same here: what loses more than half again stays in the table.
        if loss < 55:
            points.append((IMAGES[len(all_of) - 1], image, number(used), loss))
    draw("neurons.svg", points, "% of the dense layers' neurons computed and read", "% more perplexity", (10, 10), (1, "1 %"), True)


policies()
neurons()
