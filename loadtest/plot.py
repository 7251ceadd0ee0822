"""Draws a run as one SVG file: distributions of TTFT, ITL and TPOT, and events with text per second."""

from collections import Counter
from collections.abc import Sequence
from html import escape

from loadtest.record import RequestRecord

_WIDTH, _HEIGHT, _MARGIN = 420, 240, 44
_MAX_POINTS = 200


def draw(records: Sequence[RequestRecord], title: str) -> str:
    """The text of the SVG file."""
    done = [record for record in records if record.is_completed]
    panels = [
        _cumulative("TTFT (ms)", [record.ttft * 1e3 for record in done if record.ttft is not None]),
        _cumulative("ITL (ms)", [gap * 1e3 for record in done for gap in record.itl]),
        _cumulative("TPOT (ms)", [record.tpot * 1e3 for record in done if record.tpot is not None]),
        _over_time("events with text per second, by second", records),
    ]
    body = [
        f'<g transform="translate({(index % 2) * _WIDTH},{30 + (index // 2) * _HEIGHT})">{panel}</g>'
        for index, panel in enumerate(panels)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH}" height="{30 + 2 * _HEIGHT}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>{"".join(body)}</svg>\n'
    )


def _cumulative(label: str, values: list[float]) -> str:
    """Which part of the values (upwards) is at most so large (to the right), up to the 99.5th percentile."""
    ordered = sorted(values)
    shown = ordered[: max(1, round(len(ordered) * 0.995))]
    step = max(1, len(shown) // _MAX_POINTS)
    points = [(value, (index + 1) / len(ordered)) for index, value in enumerate(shown)][::step]
    return _panel(label, points, x_max=shown[-1] if shown else 1.0, y_max=1.0)


def _over_time(label: str, records: Sequence[RequestRecord]) -> str:
    start = min((record.scheduled_ns for record in records), default=0)
    counts = Counter((moment - start) // 1_000_000_000 for record in records for moment in record.output_ns)
    last = max(counts, default=0)
    points = [(float(second), float(counts[second])) for second in range(last + 1)]
    return _panel(label, points, x_max=float(max(last, 1)), y_max=float(max(counts.values(), default=1)))


def _panel(label: str, points: Sequence[tuple[float, float]], *, x_max: float, y_max: float) -> str:
    right, bottom = _WIDTH - 16, _HEIGHT - 30
    x_scale, y_scale = (right - _MARGIN) / (x_max or 1.0), (bottom - 24) / (y_max or 1.0)
    line = " ".join(f"{_MARGIN + x * x_scale:.1f},{bottom - y * y_scale:.1f}" for x, y in points)
    return (
        f'<text x="{_MARGIN}" y="16">{escape(label)}</text>'
        f'<path d="M{_MARGIN},24V{bottom}H{right}" fill="none" stroke="#888"/>'
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{x_max:.4g}</text>'
        f'<text x="{_MARGIN}" y="{bottom + 16}">0</text>'
        f'<text x="{_MARGIN - 4}" y="30" text-anchor="end">{y_max:.4g}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1664a8" stroke-width="1.5"/>'
    )
