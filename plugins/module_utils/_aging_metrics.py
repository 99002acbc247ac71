# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Indicators of aging as metrics for Prometheus, for node_exporter's textfile collector."""

from __future__ import annotations

import os
from pathlib import Path

from ansible_collections.vmbeam.xen.plugins.module_utils._aging import Observation
from ansible_collections.vmbeam.xen.plugins.module_utils._proc import MIB

# Prometheus wants base units, and their names at the end.
_UNITS = {"MiB": (MIB, "_bytes"), "s": (1, "_seconds"), "count": (1, "")}


def render(observation: Observation) -> str:
    """The text of the metrics."""
    lines = _metric("sample_time_seconds", "When these indicators were read, since the epoch", observation.time)
    for indicator in observation.indicators:
        factor, suffix = _UNITS[indicator.kind.unit]
        what = indicator.kind.what[0].upper() + indicator.kind.what[1:]
        lines += _metric(f"{indicator.name}{suffix}", what, indicator.reading.value * factor)
        if indicator.exhausted_at is not None:
            lines += _metric(
                f"{indicator.name}_exhausted_at{suffix}",
                f"Value of vmbeam_aging_{indicator.name}{suffix} at which nothing is left",
                indicator.exhausted_at * factor,
            )
    return "\n".join(lines) + "\n"


def write(path: str, text: str) -> None:
    """Replaces the file as a whole: the collector may read it at any moment."""
    target = Path(path)
    # The collector reads files that end in .prom only.
    new = target.with_name(f"{target.name}.new")
    new.write_text(text)
    os.chmod(new, 0o644)
    new.replace(target)


def _metric(name: str, what: str, value: float) -> list[str]:
    name = f"vmbeam_aging_{name}"
    return [f"# HELP {name} {what}.", f"# TYPE {name} gauge", f"{name} {value:.15g}"]
