#!/usr/bin/env python3
"""Draws docs/policies.svg, perplexity against bytes read for a token, from the table behind the line
<!-- policies --> in docs/BENCHMARKS.md. Needs nothing but Python."""
import pathlib
import re

HERE = pathlib.Path(__file__).parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 64, 16, 16, 48
COLOURS = {"exact": "#222222", "scored": "#1b6ca8", "miss": "#c0561a", "all": "#7a7a7a"}


def rows():
    text = (HERE / "BENCHMARKS.md").read_text().split("<!-- policies -->")[1].strip().split("\n\n")[0]
    for line in text.splitlines()[2:]:
        policy, thresholds, perplexity, _, kib = [cell.strip() for cell in line.strip("|").split("|")[:5]]
        yield policy, thresholds, float(perplexity), float(re.sub(r"[^0-9.]", "", kib))


def ticks(low, high, step):
    first = int(low / step) + 1
    return [step * i for i in range(first, int(high / step) + 1)]


def main():
    points = list(rows())
    # What costs far more than the rest would press it flat: it stays in the table.
    points = [p for p in points if p[2] < 1.12 * points[0][2]]
    xs, ys = [p[3] for p in points], [p[2] for p in points]
    x0, x1 = 0.92 * min(xs), 1.08 * max(xs)
    y0, y1 = min(ys) - 0.1 * (max(ys) - min(ys)), max(ys) + 0.12 * (max(ys) - min(ys))
    x = lambda v: LEFT + (v - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    y = lambda v: HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for v in ticks(x0, x1, 50):
        out.append(f'<path d="M{x(v):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#dddddd"/>')
        out.append(f'<text x="{x(v):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{v:g}</text>')
    for v in ticks(y0, y1, 0.5):
        out.append(f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    limit = 1.01 * points[0][2]
    out.append(f'<path d="M{LEFT} {y(limit):.1f}H{WIDTH - RIGHT}" stroke="#999999" stroke-dasharray="4 4"/>')
    out.append(f'<text x="{WIDTH - RIGHT - 4}" y="{y(limit) - 5:.1f}" text-anchor="end" fill="#666666">1 % above exact</text>')
    out.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">KiB read for a token</text>')
    out.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">perplexity</text>'
    )
    for policy, thresholds, perplexity, kib in points:
        colour = COLOURS[policy.split()[0]]
        label = policy if thresholds in ("", "-") else f"{policy} {thresholds}"
        out.append(f'<circle cx="{x(kib):.1f}" cy="{y(perplexity):.1f}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{x(kib) + 6:.1f}" y="{y(perplexity) - 5:.1f}" font-size="10" fill="{colour}">{label}</text>')
    out.append("</svg>")
    (HERE / "policies.svg").write_text("\n".join(out) + "\n")


main()
