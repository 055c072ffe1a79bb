"""Bar charts as standalone SVG files with a light and a dark style.

`holdfast.dashboard.chart` cannot be used: its charts take their style from the page around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, ROW = 720, 236, 76, 34, 26

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 } .bar { fill: #8c959f } .ours { fill: #0969da } .first { fill: #1a7f37 }
.range { stroke: #24292f; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .bar { fill: #6e7681 } .ours { fill: #4493f8 } .first { fill: #3fb950 }
.range { stroke: #e6edf3 } }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """Median of a system, with the range of its rounds."""

    label: str
    value: float
    low: float
    high: float

    @property
    def style(self) -> str:
        """CSS class: Holdfast, the machine's limit, or another system."""
        if self.label.startswith("holdfast"):
            return "bar ours"
        return "bar first" if self.label.startswith(("raw", "plain", "python")) else "bar"


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Draw horizontal bars from zero, with a thin line across each one's range."""
    most = max([bar.high for bar in bars if bar.high > 0], default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / most
    height = TOP + ROW * len(bars) + 6
    parts = [f'<text class="title" x="12" y="20">{escape(title)}</text>']
    for number, bar in enumerate(bars):
        top = TOP + number * ROW
        middle = top + ROW // 2
        width, low, high = (max(0.0, value * scale) for value in (bar.value, bar.low, bar.high))
        parts += [
            f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect class="{bar.style}" x="{LEFT}" y="{top + 4}" width="{width:.1f}" '
            f'height="{ROW - 8}" rx="2"/>',
            f'<path class="range" d="M{LEFT + low:.1f} {middle}H{LEFT + high:.1f}"/>',
            f'<text x="{LEFT + max(high, width) + 6:.1f}" y="{middle + 4}">{bar.value:.3g}</text>',
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f"{''.join(parts)}</svg>\n"
    )
