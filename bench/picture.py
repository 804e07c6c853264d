"""Throughput as a picture: bars in SVG that can be read on a light page and on a dark one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 860, 16, 120, 44, 52, 18  # pixels
STYLE = """
    text { fill: #1c2333; font: 13px system-ui, sans-serif } .title { font-size: 15px; font-weight: 600 }
    .figure, .note { fill: #55607a } .note { font-size: 11px } .bar { fill: #a9b4cc } .ours { fill: #4361a8 }
    .spread { stroke: #1c2333; stroke-width: 1.5 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6eaf4 } .figure, .note { fill: #9aa5bd } .bar { fill: #4a556e } .ours { fill: #7f9cf0 }
      .spread { stroke: #e6eaf4 }
    }
"""


def draw(path: Path, targets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the picture of what ``throughput`` found to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(targets))


def svg(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar a server, the fastest first: its median as the bar, its slowest and fastest round as a line on it."""
    servers = sorted(
        ((name, row) for name, row in targets.items() if name != "direct"), key=lambda each: -each[1]["rps"]
    )
    scale = (WIDTH - LEFT - RIGHT) / max(row["rps_highest"] for _, row in servers)
    height = TOP + ROW * len(servers) + 24
    label = "Requests a second on one core. " + "; ".join(
        f"{_quoted(row['about'])}: {row['rps']:,}" for _, row in servers
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">',
        f"  <style>{STYLE}  </style>",
        f'  <text class="title" x="{LEFT}" y="24">Requests a second on one core</text>',
    ]
    for number, (name, row) in enumerate(servers):
        y = TOP + ROW * number
        low, middle, high = (scale * row[key] for key in ("rps_lowest", "rps", "rps_highest"))
        kind = "bar ours" if name == "gateway" else "bar"
        centre = y + 21 + BAR / 2
        parts += [
            f'  <text x="{LEFT}" y="{y + 15}">{escape(row["about"])}</text>',
            f'  <rect class="{kind}" x="{LEFT}" y="{y + 21}" width="{middle:.1f}" height="{BAR}" rx="3"/>',
            f'  <path class="spread" d="M{LEFT + low:.1f} {centre:g}H{LEFT + high:.1f}"/>',
            f'  <text class="figure" x="{LEFT + max(middle, high) + 8:.1f}" y="{y + 35}">{row["rps"]:,}</text>',
        ]
    note = "Medians; the line spans the slowest and the fastest round. Each server had one core to itself."
    parts += [f'  <text class="note" x="{LEFT}" y="{height - 8}">{note}</text>', "</svg>", ""]
    return "\n".join(parts)


def _quoted(text: str) -> str:
    return escape(text, {'"': "&quot;"})
