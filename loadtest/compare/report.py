"""Writes table.md, summary.json and plot.svg into the folder, and the part of a page between two marks."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.compare.client_check import check_table
from loadtest.compare.curve import curve_table
from loadtest.compare.peers import Peer
from loadtest.compare.plot import draw
from loadtest.compare.results import Results, counting
from loadtest.compare.table import cells, markdown

CURVE = """\
Poisson arrivals of 128 / 64 tokens at rising rates: the share of requests whose first token came within a second of
its scheduled time and whose further tokens took at most 100 ms each in the mean. A server that made less than half good
was asked no higher rate. A p99 is told of 500 requests or more."""
BEGIN = "<!-- compare: begin -->"
END = "<!-- compare: end -->"


def write_report(results: Results, peers: Sequence[Peer], *, page: Path | None) -> str:
    """Write all of it and return the tables.

    Args:
        page: a Markdown page with the two marks, or None.

    Raises:
        ValueError: the page lacks the marks.
    """
    machine = results.machine()
    title = "unknown" if machine is None else machine.title
    counted = counting(results.measurements())
    text, made = markdown(counted, peers, title), cells(counted)
    if points := results.points():
        text += f"\n### What is made good of what arrives\n\n{CURVE}\n\n{curve_table(points, peers)}\n"
    if turns := results.turns():
        text += f"\n### Our client beside vllm bench serve\n\n{check_table(turns)}\n"
    results.folder.mkdir(parents=True, exist_ok=True)
    (results.folder / "table.md").write_text(text, encoding="utf-8")
    summary = msgspec.json.encode({"machine": machine, "cells": made})
    (results.folder / "summary.json").write_bytes(msgspec.json.format(summary, indent=2) + b"\n")
    (results.folder / "plot.svg").write_text(draw(made, peers, title), encoding="utf-8")
    if page is not None:
        page.write_text(between_marks(page.read_text(encoding="utf-8"), text), encoding="utf-8")
    return text


def between_marks(page: str, text: str) -> str:
    """The page with `text` in place of what stood between the marks. Raises ValueError without them."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END} to fill")
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}"
