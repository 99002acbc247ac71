# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Words and tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def listed(value: Any) -> list[Any]:
    """Return a list as people give it: a list, its entries as text with commas (-e on a command line), or one entry."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def failure_reason(result: Mapping[str, Any]) -> str:
    """Return why a task failed, of its result: a loop says it only of its items, of which the first counts."""
    failed = [item for item in result.get("results") or [] if item.get("failed")]
    return str((failed or [result])[0].get("msg") or result.get("msg") or "no reason given")


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
