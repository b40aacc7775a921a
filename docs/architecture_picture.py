"""Draw the picture of the architecture page: the floors of the package and the way of a text.

Run after a room has moved: python docs/architecture_picture.py
The floors are read from tests/test_house.py, which holds the imports to them.
"""

from __future__ import annotations

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "_static" / "architecture.svg"

# Rooms that a text passes, in order; the page numbers its steps alike.
WAY = ("vectorizer", "_inputs", "inference", "cache", "model", "cache")
WIDTH, FLOOR_HEIGHT, ROOM_HEIGHT = 480, 40, 28
LEFT, GAP, PADDING, BADGE = 40, 6, 8, 19
LETTER_WIDTHS = {**dict.fromkeys("fijlrt", 5.1), **dict.fromkeys("mw", 13.5)}  # others: 8.2
# Each colour stands on a ground of its own, or reads on black and on white.
STYLE = """
text { font: 15px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
.floor { fill: #768390; font-weight: 600; }
.line { stroke: #768390; stroke-opacity: 0.35; }
.room { fill: #d5dde6; }
.name { fill: #17212b; }
.passed .room { fill: #1d5fa8; }
.passed .name { fill: #fff; }
.badge { fill: #ffd866; }
.step { fill: #17212b; font-size: 13px; font-weight: 700; text-anchor: middle; }
"""


def read_floors() -> dict[int, set[str]]:
    """Return the rooms of each floor as the test of the layout states them."""
    source = (ROOT / "tests" / "test_house.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            floors: dict[int, set[str]] = ast.literal_eval(node.value)
            return floors
    raise ValueError("tests/test_house.py defines no FLOORS.")


def draw_room(name: str, left: float, top: float) -> tuple[str, float]:
    """Return a room with the steps that pass it, and its width."""
    steps = [number for number, room in enumerate(WAY, 1) if room == name]
    label = sum(LETTER_WIDTHS.get(letter, 8.2) for letter in name)
    width = label + 2 * PADDING + BADGE * len(steps)
    parts = [
        f'<rect class="room" x="{left:g}" y="{top:g}" width="{width:g}" height="{ROOM_HEIGHT}" '
        'rx="5"/>',
        f'<text class="name" x="{left + PADDING:g}" y="{top + 19:g}" '
        f'textLength="{label:g}">{escape(name)}</text>',
    ]
    for place, step in enumerate(steps):
        x = left + PADDING + label + BADGE * (place + 0.5) + 2
        parts.append(f'<circle class="badge" cx="{x:g}" cy="{top + 14:g}" r="8.5"/>')
        parts.append(f'<text class="step" x="{x:g}" y="{top + 18.5:g}">{step}</text>')
    return f'<g class="{"passed" if steps else "other"}">{"".join(parts)}</g>', width


def draw(floors: dict[int, set[str]]) -> str:
    """Return the picture as SVG: the highest floor on top, rooms that a text passes first."""
    if missing := set(WAY) - set().union(*floors.values()):
        raise ValueError(f"The way of a text leads through rooms that are on no floor: {missing}.")
    parts, height = [], FLOOR_HEIGHT * len(floors)
    for row, (floor, rooms) in enumerate(sorted(floors.items(), reverse=True)):
        top, left = FLOOR_HEIGHT * row + (FLOOR_HEIGHT - ROOM_HEIGHT) / 2, float(LEFT)
        border = top + ROOM_HEIGHT + (FLOOR_HEIGHT - ROOM_HEIGHT) / 2
        parts.append(f'<text class="floor" x="14" y="{top + 19:g}">{floor}</text>')
        if border < height:
            parts.append(f'<path class="line" d="M8 {border:g}H{WIDTH - 8}"/>')
        for name in sorted(rooms, key=lambda name: (WAY.index(name) if name in WAY else 9, name)):
            room, width = draw_room(name, left, top)
            parts.append(room)
            left += width + GAP
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    body = "\n".join([f"<style>{STYLE}</style>", *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


if __name__ == "__main__":
    PICTURE.write_text(draw(read_floors()), encoding="utf-8")
