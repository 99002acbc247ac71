# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Words and tables for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# What separates the entries of a list that is written as text, by its form, and how that is said.
_SEPARATORS = {
    "words": (r"[,\s]+", "its entries with commas or spaces between them"),
    "options": (r"\s+", "its entries with spaces between them"),
    "lines": (r"[\r\n]+", "an entry on each line"),
}
FORMS = (*_SEPARATORS, "json")


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 7 min, 3.5 h, 9 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"


def text_table(rows: list[dict[str, Any]], columns: list[str]) -> list[str]:
    """Return rows as aligned text lines, the first one the heading; a missing value is shown as '-'."""
    table = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def or_unknown(value: Any) -> str:
    """Return the value as text, "unknown" for None."""
    return "unknown" if value is None else str(value)


def listed(value: Any, name: str = "the list", form: str = "words") -> list[Any]:
    """Return a list as people give it: a list, one entry, or text, the only form of -e name=value and of a survey.

    `form` says how the list is written as text, unless that is JSON: "words" (separated by commas or white space),
    "options" (by white space alone, as a comma may be part of one), "lines" (for entries with both) or "json" (in no
    other way). `name` is the variable, for errors.

    :raises ValueError: text that is not such a list, or an unknown form
    """
    if form not in FORMS:
        raise ValueError(f"form '{form}' is not one of {', '.join(FORMS)}")
    if not isinstance(value, str):
        return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    text = value.strip()
    if text.startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{name} is '{text}', which is not JSON ({error}): {_advice(form)}") from error
    if form != "json":
        entries = re.split(_SEPARATORS[form][0], text)
        return [entry.strip() for entry in entries if entry.strip()]
    if text:
        raise ValueError(f"{name} is '{text}': {_advice(form)}")
    return []


def failure_reason(result: Mapping[str, Any]) -> str:
    """Return why a task failed, of its result: a loop says it only of its items, of which the first counts."""
    failed = [item for item in result.get("results") or [] if item.get("failed")]
    return str((failed or [result])[0].get("msg") or result.get("msg") or "no reason given")


def _advice(form: str) -> str:
    others = f", or as text {_SEPARATORS[form][1]}" if form in _SEPARATORS else ""
    return f'give a list, or one in JSON such as \'["a", "b"]\'{others}'


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
