"""Draws a comparison as one SVG file: a panel a workload, a bar a server, a line from lowest to highest round."""

from collections.abc import Sequence
from html import escape

from loadtest.compare.peers import Peer
from loadtest.compare.table import Cell
from loadtest.compare.workloads import WORKLOADS, Workload

_WIDTH, _LABEL, _ROW, _HEAD = 760, 210, 20, 34
_OURS, _OTHERS = "#1664a8", "#9aa5b1"


def draw(cells: Sequence[Cell], peers: Sequence[Peer], title: str) -> str:
    """The text of the SVG file."""
    panels, top = [], 30
    for workload in WORKLOADS:
        bars = [(peer, cell) for peer in peers for cell in cells if _matches(cell, peer, workload)]
        if bars:
            panels.append(f'<g transform="translate(0,{top})">{_panel(workload, bars)}</g>')
            top += _HEAD + _ROW * len(bars)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top + 10}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>{"".join(panels)}</svg>\n'
    )


def _matches(cell: Cell, peer: Peer, workload: Workload) -> bool:
    return (cell.peer, cell.workload) == (peer.name, workload.name)


def _panel(workload: Workload, bars: Sequence[tuple[Peer, Cell]]) -> str:
    largest = max(cell.tokens_per_s.high for _, cell in bars)
    scale = (_WIDTH - _LABEL - 70) / (largest if largest > 0 else 1.0)
    parts = [f'<text x="12" y="24" font-weight="bold">{escape(workload.title)}: output tokens/s</text>']
    for index, (peer, cell) in enumerate(bars):
        parts.append(_bar(peer, cell, _HEAD + index * _ROW, scale))
    return "".join(parts)


def _bar(peer: Peer, cell: Cell, y: int, scale: float) -> str:
    value, middle = cell.tokens_per_s, y + _ROW // 2 - 2
    low, high, width = (_LABEL + value.low * scale, _LABEL + value.high * scale, value.median * scale)
    colour = _OURS if peer.is_ours else _OTHERS
    return (
        f'<text x="{_LABEL - 6}" y="{y + 12}" text-anchor="end">{escape(f"{peer.title} {peer.precision}")}</text>'
        f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_ROW - 5}" fill="{colour}"/>'
        f'<path d="M{low:.1f},{middle}H{high:.1f}" stroke="#222"/>'
        f'<text x="{high + 6:.1f}" y="{y + 12}">{value.median:.0f}</text>'
    )
