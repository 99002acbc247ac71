# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The sampler of role aging_monitor: adds a sample to the time series of a dom0, and writes metrics."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ansible_collections.vmbeam.xen.plugins.module_utils import _aging_metrics
from ansible_collections.vmbeam.xen.plugins.module_utils._aging import Dom0, observe
from ansible_collections.vmbeam.xen.plugins.module_utils._aging_history import DEFAULT_PATH, History, Sample


def main(argv: Sequence[str] | None = None, dom0: Dom0 | None = None) -> int:
    """Takes one sample; returns the exit code."""
    options = _parser().parse_args(argv)
    dom0 = dom0 or Dom0()
    dom0.timeout = options.timeout
    history = History(options.history)
    last = history.last()
    before = last.values if last and last.boot_id == dom0.proc.boot_id() else {}
    seen = observe(dom0, before)
    for name, reason in seen.unavailable.items():
        sys.stderr.write(f"{name}: {reason}\n")  # the journal
    try:
        history.append(Sample(seen.time, seen.boot_id, seen.values), options.max_bytes)
    finally:
        # They have to tell of a disk that is full, too.
        if options.metrics:
            _aging_metrics.write(options.metrics, _aging_metrics.render(seen))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmbeam-aging-sample", description="Notes how a hypervisor and its dom0 age.")
    parser.add_argument("--history", default=DEFAULT_PATH, help="the time series (default: %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=8 << 20, help="that it may take (default: %(default)s)")
    parser.add_argument("--metrics", default="", help="file for node_exporter; none if empty")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that xl may take (default: %(default)s)")
    return parser
