"""Draws the ratios that it reads as JSON as an SVG chart, on a logarithmic scale.

In: `[[heading, [[label, {loop: ratio}]]]]`. The chart brings its own background, so it
can be read on any page, and follows the reader's preference for dark colours.
"""

import json
import math
import sys
from html import escape
from typing import TypeAlias

Sections: TypeAlias = list[tuple[str, list[tuple[str, dict[str, float]]]]]

TIMES = "\N{MULTIPLICATION SIGN}"
WIDTH = 720
LEFT, RIGHT = 300, 52  # where the labels of rows and bars have their place
TOP = 104
ROW, BAR = 34, 12
TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
       fill: #24292f }
.title { font-size: 17px; font-weight: 600 }
.heading { font-weight: 600 }
.quiet { font-size: 12px; fill: #57606a }
.value { font-size: 11px }
.page { fill: #f6f8fa }
.grid { stroke: #e4e8ec }
.one { stroke: #24292f; stroke-width: 1.5 }
.asyncio { fill: #0f766e }
.uvloop { fill: #5eb8ae }
.asyncio.slower { fill: #c2570c }
.uvloop.slower { fill: #f0a35e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .quiet { fill: #9da7b3 }
  .page { fill: #161b22 }
  .grid { stroke: #2b323b }
  .one { stroke: #e6edf3 }
  .asyncio { fill: #2dbdae }
  .uvloop { fill: #1a756d }
  .asyncio.slower { fill: #f08c3a }
  .uvloop.slower { fill: #9a5a24 }
}
"""


def text(x: float, y: float, content: str, style: str = "", anchor: str = "") -> str:
    attributes = f' class="{style}"' if style else ""
    attributes += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{attributes}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return (
        f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" '
        f'y2="{y2:.1f}"/>'
    )


def bar(x: float, y: float, to: float, style: str) -> str:
    return (
        f'<rect class="{style}" x="{min(x, to):.1f}" y="{y:.1f}" '
        f'width="{max(abs(to - x), 1):.1f}" height="{BAR}"/>'
    )


def draw(sections: Sections) -> str:
    rows = [row for _, rows in sections for row in rows]
    ratios = [ratio for _, loops in rows for ratio in loops.values()]
    low = max([tick for tick in TICKS if tick <= min(ratios)] or TICKS[:1])
    high = min([tick for tick in TICKS if tick >= max(ratios)] or TICKS[-1:])
    low, high = min(low, 0.5), max(high, 2)
    loops = list(rows[0][1])

    def across(ratio: float) -> float:
        share = math.log(ratio / low) / math.log(high / low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    one = across(1)
    bottom = TOP + ROW * (len(rows) + len(sections)) + 6
    height = bottom + 34
    subtitle = (
        f"Higher is better. 1{TIMES} is the same speed, orange is slower. "
        "The scale is logarithmic."
    )
    body = [
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
        text(20, 32, "Times as fast as Starlette's background tasks", "title"),
        text(20, 53, subtitle, "quiet"),
    ]
    x = WIDTH - 20.0 - 90 * len(loops)
    for loop in loops:
        x += 90
        body.append(bar(x - 70, 22, x - 58, loop))
        body.append(text(x - 52, 32, loop))

    for tick in TICKS:
        if low <= tick <= high:
            x = across(tick)
            style = "one" if tick == 1 else "grid"
            body.append(line(x, TOP - 8, x, bottom, style))
            label = f"{tick:g}{TIMES}"
            body.append(text(x, TOP - 14, label, "quiet", "middle"))
            body.append(text(x, bottom + 18, label, "quiet", "middle"))
    body.append(text(one - 6, TOP - 34, "← slower", "quiet", "end"))
    body.append(text(one + 6, TOP - 34, "faster →", "quiet"))

    y = TOP
    for heading, section in sections:
        body.append(text(20, y + 22, heading, "heading"))
        y += ROW
        for label, measured in section:
            body.append(text(32, y + BAR + 4, label))
            for number, (loop, ratio) in enumerate(measured.items()):
                at = y + number * (BAR + 1)
                faster = ratio >= 1
                to = across(ratio)
                body.append(bar(one, at, to, loop if faster else f"{loop} slower"))
                anchor = "start" if faster else "end"
                x = to + 4 if faster else to - 4
                value = f"{ratio:.2f}{TIMES}" if ratio < 10 else f"{ratio:.0f}{TIMES}"
                body.append(text(x, at + BAR - 2, value, "value", anchor))
            y += ROW
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">'
    )
    return "\n".join(
        [
            svg,
            "<title>Speed of postlude's background tasks over Starlette's</title>",
            f"<style>{STYLE}</style>",
            *body,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    print(draw(json.load(sys.stdin)), end="")
