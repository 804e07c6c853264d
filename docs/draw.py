"""Draw docs/circuit-breaker.svg from the breaker's own table: `python docs/draw.py`, after the table has changed."""

from collections import defaultdict
from pathlib import Path

from gateway.policies.circuit_breaker import TRANSITIONS, Event, State

PICTURE = Path(__file__).parent / "circuit-breaker.svg"
CLOSED, OPEN, HALF_OPEN = State

WIDTH, HEIGHT, BOX_WIDTH, BOX_HEIGHT = 860, 360, 200, 56  # pixels
STYLE = """
    text { fill: #1c2333; font: 13px system-ui, sans-serif; text-anchor: middle } .name { font-weight: 600 }
    .small { fill: #55607a; font-size: 11px } rect { fill: #f4f6fb; stroke: #4361a8 }
    .closed rect { fill: #eef7ee; stroke: #3c8a4b } .open rect { fill: #fbeeee; stroke: #b04a4a }
    path { fill: none; stroke: #4361a8; stroke-width: 1.5 } .head { fill: #4361a8; stroke: none }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6eaf4 } .small { fill: #9aa5bd } rect { fill: #232b3d; stroke: #7f9cf0 }
      .closed rect { fill: #1f3325; stroke: #6fbf80 } .open rect { fill: #3a2426; stroke: #e08585 }
      path { stroke: #7f9cf0 } .head { fill: #7f9cf0 }
    }
"""
BOXES = {  # the upper left corner, and what a call meets there
    CLOSED: (20, 104, "calls pass"),
    OPEN: (640, 104, "calls fail at once"),
    HALF_OPEN: (330, 284, "a few probes pass"),
}
ARROWS = {  # how it runs, and the middle of the first line beside it
    (CLOSED, CLOSED): ("M50 104C30 50 130 50 110 104", 80, 42),
    (CLOSED, OPEN): ("M220 132H638", 446, 152),
    (OPEN, CLOSED): ("M700 104C640 20 220 20 162 102", 430, 20),
    (OPEN, HALF_OPEN): ("M780 160V320H532", 690, 338),
    (HALF_OPEN, OPEN): ("M500 284V236H700V162", 620, 256),
    (HALF_OPEN, CLOSED): ("M330 312H100V162", 196, 204),
}
WORDS = {
    Event.TRIPPED: "too many failures of its own",
    Event.ALARMED: "another worker's opened, and a call failed here",
    Event.RESTED: "CIRCUIT_BREAKER_TIMEOUT is over",
    Event.PROBE_FAILED: "one probe failed",
    Event.RECOVERED: "enough probes succeeded",
    Event.PEER_RECOVERED: "another worker's closed",
    Event.RESET: "by hand",
}


def circuit_breaker() -> str:
    """States as boxes, and an arrow from one to another with all that leads along it, by the names the log has."""
    along: dict[tuple[State, State], list[Event]] = defaultdict(list)
    for (old, event), new in TRANSITIONS.items():
        along[old, new].append(event)
    label = "; ".join(
        f"{old} to {new}: {', '.join(WORDS[event] for event in events)}" for (old, new), events in along.items()
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"  <style>{STYLE}  </style>",
        '  <defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '    <path class="head" d="M0 0 8 4 0 8z"/>',
        "  </marker></defs>",
    ]
    for state, (x, y, meaning) in BOXES.items():
        middle = x + BOX_WIDTH // 2
        parts += [
            f'  <g class="{state}"><rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>',
            f'    <text class="name" x="{middle}" y="{y + 24}">{state.name}</text>',
            f'    <text class="small" x="{middle}" y="{y + 42}">{meaning}</text></g>',
        ]
    for (old, new), events in along.items():
        path, x, y = ARROWS[old, new]
        parts.append(f'  <path d="{path}" marker-end="url(#a)"/>')
        for number, event in enumerate(events):
            parts.append(
                f'  <text data-from="{old}" data-to="{new}" data-event="{event}" x="{x}" y="{y + 34 * number}">'
                f'{event}<tspan class="small" x="{x}" dy="14">{WORDS[event]}</tspan></text>'
            )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(circuit_breaker())
