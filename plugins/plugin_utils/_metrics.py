# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""A machine's runs as metrics, in Prometheus' text format for node_exporter's textfile collector."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._moments import seconds_of

_PREFIX = "vmbeam_rejuvenation_"
# Name, explanation and value of a metric.
_Figure = tuple[str, str, Any]


def metrics_text(record: dict[str, Any], refused_at: float | None = None) -> str:
    """Return the metrics of a machine from its record, whose `history` ends with the last run.

    `refused_at` is when a run was refused just now (seconds since the epoch), None if none was. What is not known is
    left out: a metric that is absent is not taken for a zero. None has a label: who scrapes the machine knows its name.
    """
    history = record.get("history") or []
    figures = [
        *(_of_last_run(history) if history else []),
        ("last_refused_timestamp_seconds", "When a run was last refused; absent once one has ended since.", refused_at),
    ]
    lines: list[str] = []
    for name, text, value in figures:
        if value is not None:
            metric = _PREFIX + name
            lines += [f"# HELP {metric} {text}", f"# TYPE {metric} gauge", f"{metric} {_number(value)}"]
    return "".join(f"{line}\n" for line in lines)


def _of_last_run(history: list[dict[str, Any]]) -> list[_Figure]:
    last = history[-1]
    # A run that was cut before it was recorded left the names of its guests only.
    guests = [guest for guest in last.get("guests", []) if isinstance(guest, dict)]
    completed = [run["finished"] for run in history if run["outcome"] == "completed"]
    return [
        ("last_run_success", "Whether the last run completed.", int(last["outcome"] == "completed")),
        ("last_run_timestamp_seconds", "When the last run ended.", seconds_of(last["finished"])),
        (
            "last_success_timestamp_seconds",
            "When the last run ended that completed, of those on record.",
            seconds_of(completed[-1]) if completed else None,
        ),
        ("last_run_seconds", "How long the last run took.", last.get("seconds")),
        ("last_run_guests_moved", "Guests that the last run moved.", last.get("guests_moved")),
        (
            "last_run_guests_failed",
            "Guests that the last run failed to move.",
            sum(guest["result"] == "failed" for guest in guests) if "guests_moved" in last else None,
        ),
        (
            "last_run_longest_downtime_seconds",
            "The longest downtime of a guest that the last run moved.",
            last.get("longest_downtime_seconds"),
        ),
        ("last_run_generation", "Generation of the host VM that the last run moved to.", last.get("generation")),
    ]


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{float(value):.3f}"
