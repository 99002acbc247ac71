"""Draws the figures."""

from __future__ import annotations

import pathlib
import typing

import matplotlib
import matplotlib.figure
import matplotlib.ticker

from .results import METHODS

_X = {"size_mib": "memory of the guest (MiB)", "rate": "pages rewritten per second"}
#: The same look in all of them.
_COLOURS = {method: f"C{number}" for number, method in enumerate(METHODS)}


def draw(figures: dict[str, dict[str, typing.Any]], directory: pathlib.Path) -> list[pathlib.Path]:
    """Draw each figure that has something to show into a file of `directory`; return the files."""
    directory.mkdir(exist_ok=True)
    for old in directory.glob("*.svg"):
        old.unlink()
    drawn = []
    for key, figure in figures.items():
        canvas = _canvas(key, figure)
        if canvas:
            drawn.append(directory / f"{key}.svg")
            # Without a date, and with ids that depend on the contents only.
            with matplotlib.rc_context({"svg.hashsalt": key}):
                canvas.savefig(drawn[-1], metadata={"Date": None})
    return drawn


def _canvas(key: str, figure: dict[str, typing.Any]) -> matplotlib.figure.Figure | None:
    if key == "fig6":
        if not figure["ways"]:
            return None
        canvas, (axes,) = _new(1)
        _bars(axes, {way: {"": found} for way, found in figure["ways"].items()}, figure["unit"])
    elif key == "fig16":
        # One row, a group of bars for each time.
        parts = [part for part in figure["parts"] if _known(part, 1) and part["unit"] != "%"]
        if not parts:
            return None
        canvas, (axes,) = _new(1)
        bars = {part["title"]: part["rows"][0]["methods"] for part in parts}
        _bars(axes, bars, parts[0]["unit"])
    elif figure["by"] in _X:
        parts = [part for part in figure["parts"] if _known(part, 2)]
        if not parts:
            return None
        canvas, all_axes = _new(len(parts))
        for axes, part in zip(all_axes, parts, strict=True):
            _lines(axes, part, figure["by"])
            if len(parts) > 1:
                axes.set_title(part["title"], fontsize="medium")
    else:
        return None
    number = f"Fig. {key.removeprefix('fig')}: " if key.startswith("fig") else ""
    canvas.suptitle(f"{number}{figure['title']}")
    return canvas


def _new(count: int) -> tuple[matplotlib.figure.Figure, typing.Any]:
    columns = min(count, 2)
    rows = -(-count // columns)
    canvas = matplotlib.figure.Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    every = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for unused in every[count:]:
        unused.remove()
    return canvas, every[:count]


def _known(part: dict[str, typing.Any], rows: int) -> bool:
    """Return whether something is known of so many rows."""
    return sum(any(_drawable(found) for found in row["methods"].values()) for row in part["rows"]) >= rows


def _drawable(found: dict[str, typing.Any] | None) -> bool:
    return found is not None and found["median"] is not None


def _lines(axes: typing.Any, part: dict[str, typing.Any], by: str) -> None:
    x = "achieved_rate" if by == "rate" else by
    for method in METHODS:
        rows = [row for row in part["rows"] if _drawable(row["methods"].get(method))]
        if not rows:
            continue
        found = [row["methods"][method] for row in rows]
        middle, spread = _middle_and_spread(found)
        places = [row[x] for row in rows]
        style = {"marker": "o", "capsize": 3, "color": _COLOURS[method], "label": method}
        axes.errorbar(places, middle, spread, **style)
        bounds = [(place, entry["median"]) for place, entry in zip(places, found, strict=True) if entry["lower_bound"]]
        for place, median in bounds:
            axes.annotate("at least", (place, median), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.set_xlabel(_X[by])
    axes.set_ylabel(part["unit"])
    # Room for a line of zeros, which is a result.
    low, high = axes.get_ylim()
    axes.set_ylim(-0.02 * high if low <= 0 else 0, 1.08 * high if high > 0 else 1)
    if part["unit"] == "bytes":
        axes.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _bars(axes: typing.Any, groups: dict[str, dict[str, dict[str, typing.Any]]], unit: str) -> None:
    """Draw groups of bars: group -> bar -> summary."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        known = [(place, bars[name]) for place, bars in enumerate(groups.values()) if _drawable(bars.get(name))]
        if not known:
            continue
        middle, spread = _middle_and_spread([found for _, found in known])
        places = [place + (number - (len(names) - 1) / 2) * width for place, _ in known]
        axes.bar(places, middle, width, yerr=spread, capsize=3, color=_COLOURS.get(name, "C0"), label=name or None)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(unit)
    axes.grid(visible=True, axis="y", alpha=0.3)
    if names != [""]:
        axes.legend()


def _middle_and_spread(found: list[dict[str, typing.Any]]) -> tuple[list[float], list[list[float]]]:
    middle = [entry["median"] for entry in found]
    return middle, [
        [entry["median"] - entry["min"] for entry in found],
        [entry["max"] - entry["median"] for entry in found],
    ]
