"""`report.html` of a run: curves as inline SVG and the samples, in one file that needs nothing else."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

from app.training.metrics import Record, read_metrics

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 240, 66, 26, 12
_MOST_POINTS = 600
_LAST_TICK = 4
_PLOTS = (
    ("Loss, nats a token", ("loss", "heldout_loss")),
    ("Held-out perplexity", ("heldout_perplexity",)),
    ("Held-out bits a byte", ("heldout_bits_per_byte",)),
    ("Learning rate", ("learning_rate",)),
    ("Norm of the gradient", ("grad_norm",)),
    ("Tokens a second", ("tokens_per_second",)),
    ("Share of exact answers", ("exact_answers",)),
)
_LOGARITHMIC = frozenset(["heldout_perplexity", "grad_norm"])
_COLOURS = ("#2563a8", "#c2410c")
_NAMES = {"loss": "training", "heldout_loss": "held out"}
_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:1.5rem}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto}text{font-size:11px;fill:currentColor}
.grid{stroke:currentColor;opacity:.15}dt{font-weight:600;margin-top:1rem}
dd{margin:0;white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px;overflow-wrap:anywhere}
pre{overflow-x:auto;font-size:13px}
"""
Points = Sequence[tuple[float, float]]


def write_report(folder: Path) -> Path:
    """Draw what metrics.jsonl and recipe.json of a run folder hold."""
    records = list(read_metrics(folder / "metrics.jsonl"))
    recipe = folder / "recipe.json"
    plots = "\n".join(_figure(title, names, records) for title, names in _PLOTS)
    samples = "\n".join(
        f"<dt>step {record['step']}</dt><dd>{html.escape(str(record['sample']))}</dd>"
        for record in records
        if "sample" in record
    )
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Training run</title><style>{_STYLE}</style>
<h1>Training run</h1><p>{html.escape(_summary(records))}</p>
<div class="plots">{plots}</div>
<h2>Samples</h2><dl>{samples}</dl>
<h2>Recipe</h2><pre>{html.escape(recipe.read_text(encoding="utf-8") if recipe.is_file() else "")}</pre>
</html>
"""
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target


def _summary(records: Sequence[Record]) -> str:
    steps = [record for record in records if "loss" in record]
    heldout = [record for record in records if "heldout_loss" in record]
    if not steps or not heldout:
        return "No step was logged yet."
    last, best = steps[-1], heldout[-1]
    bits = f", {best['heldout_bits_per_byte']} bits a byte" if "heldout_bits_per_byte" in best else ""
    return (
        f"{last['step']} steps in {float(str(last['seconds'])) / 60:.1f} minutes. Loss {last['loss']}, held out "
        f"{best['heldout_loss']} (perplexity {best['heldout_perplexity']}{bits})."
    )


def _figure(title: str, names: Sequence[str], records: Sequence[Record]) -> str:
    lines = {
        name: [(float(str(record["step"])), float(str(record[name]))) for record in records if name in record]
        for name in names
    }
    drawn = {name: _thinned(points) for name, points in lines.items() if points}
    if not drawn:
        return ""
    is_logarithmic = bool(_LOGARITHMIC & set(names))
    body = _axes_and_lines(drawn, is_logarithmic=is_logarithmic)
    label = html.escape(title)
    return (
        f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">{body}</svg></figure>'
    )


def _axes_and_lines(lines: dict[str, Points], *, is_logarithmic: bool) -> str:
    scale = math.log10 if is_logarithmic else float
    values = [scale(max(value, 1e-12)) if is_logarithmic else value for points in lines.values() for _, value in points]
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0
    last_step = max(step for points in lines.values() for step, _ in points) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 10) * step / last_step
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)
        return x, y

    parts = []
    for tick in range(_LAST_TICK + 1):
        value, step = low + (high - low) * tick / _LAST_TICK, last_step * tick / _LAST_TICK
        x, y = place(step, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shown = 10**value if is_logarithmic else value
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{shown:.3g}</text>')
        anchor = "end" if tick == _LAST_TICK else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{step:.0f}</text>')
    for index, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        drawn = [place(step, scale(max(value, 1e-12)) if is_logarithmic else value) for step, value in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>')
        if len(lines) > 1:
            parts.append(
                f'<text x="{_WIDTH - 14}" y="{_TOP + 12 + 14 * index}" text-anchor="end" style="fill:{colour}">'
                f"{_NAMES.get(name, name)}</text>"
            )
    return "".join(parts)


def _thinned(points: Points) -> Points:
    stride = -(-len(points) // _MOST_POINTS)
    return [*points[::stride], points[-1]] if stride > 1 else points
