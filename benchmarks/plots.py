"""Draws the figures."""

from __future__ import annotations

import pathlib

import matplotlib.figure

from . import results


def draw(figures: dict[str, dict], directory: pathlib.Path) -> list[pathlib.Path]:
    """Draw each figure with two rows or more into a file of `directory`; return the files."""
    directory.mkdir(exist_ok=True)
    for old in directory.glob("*.svg"):
        old.unlink()
    drawn = []
    for key, figure in figures.items():
        if len(figure["rows"]) > 1:
            drawn.append(directory / f"{key}.svg")
            _draw(figure, drawn[-1])
    return drawn


def _draw(figure: dict, path: pathlib.Path) -> None:
    canvas = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = canvas.subplots()
    x = "achieved_rate" if figure["by"] == "rate" else figure["by"]
    for method in results.METHODS:
        rows = [row for row in figure["rows"] if method in row["methods"]]
        if not rows:
            continue
        found = [row["methods"][method] for row in rows]
        middle = [entry["median"] for entry in found]
        spread = [
            [entry["median"] - entry["min"] for entry in found],
            [entry["max"] - entry["median"] for entry in found],
        ]
        axes.errorbar([row[x] for row in rows], middle, spread, marker="o", capsize=3, label=method)
    axes.set_title(figure["title"])
    axes.set_xlabel({"size_mib": "memory of the guest (MiB)", "rate": "pages rewritten per second"}[figure["by"]])
    axes.set_ylabel(figure["unit"])
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    # Without a date, and with ids that depend on the contents only.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        canvas.savefig(path, metadata={"Date": None})
