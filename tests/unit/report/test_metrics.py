# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The metrics of a machine's runs."""

from __future__ import annotations

from ansible_collections.vmbeam.xen.plugins.filter.report import FilterModule
from prometheus import promtool

FILTERS = FilterModule().filters()


def metrics(*history, refused_at=None):
    """The metrics of a machine with these runs, and then maybe one that was refused."""
    text = FILTERS["rejuvenation_metrics"]({"machine": "m1", "run": None, "history": list(history)}, refused_at)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert text == "" or text.endswith("\n")
    return {name.removeprefix("vmbeam_rejuvenation_"): float(value) for name, value in map(str.split, lines)}


class TestMetrics:
    def test_completed_run(self, hostvars):
        run = hostvars["m1"]["rejuvenate_report"]
        assert metrics(run) == {
            "last_run_success": 1,
            "last_run_timestamp_seconds": 1_700_000_321,
            "last_success_timestamp_seconds": 1_700_000_321,
            "last_run_seconds": 321,
            "last_run_guests_moved": 4,
            "last_run_guests_failed": 0,
            "last_run_longest_downtime_seconds": 1.27,
            "last_run_generation": 2,
        }

    def test_failed_run_does_not_hide_the_last_success(self, hostvars):
        found = metrics(hostvars["m1"]["rejuvenate_report"], hostvars["m2"]["rejuvenate_report"])
        assert found["last_run_success"] == 0
        assert found["last_run_guests_failed"] == 1
        assert found["last_run_timestamp_seconds"] > found["last_success_timestamp_seconds"] == 1_700_000_321

    def test_what_is_unknown_is_absent(self):
        cut = {"outcome": "completed", "finished": "2023-11-14T22:13:20+00:00", "generation": 2, "guests": ["web1"]}
        assert metrics(cut) == {
            "last_run_success": 1,
            "last_run_timestamp_seconds": 1_700_000_000,
            "last_success_timestamp_seconds": 1_700_000_000,
            "last_run_generation": 2,
        }

    def test_no_run(self):
        assert metrics() == {}

    def test_refused_run(self, hostvars):
        run = hostvars["m1"]["rejuvenate_report"]
        refused = {"last_refused_timestamp_seconds": 1_700_009_000}
        assert metrics(run, refused_at="1700009000.0") == {**metrics(run), **refused}
        assert metrics(refused_at=1_700_009_000) == refused
        # The state of a machine that never had a run.
        assert "last_refused" in FILTERS["rejuvenation_metrics"]({}, 1_700_009_000.0)

    def test_each_metric_is_explained(self, hostvars):
        text = FILTERS["rejuvenation_metrics"]({"history": [hostvars["m1"]["rejuvenate_report"]]}, 1_700_009_000.0)
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if not line.startswith("#"):
                name = line.split()[0]
                assert lines[number - 2].startswith(f"# HELP {name} ")
                assert lines[number - 1] == f"# TYPE {name} gauge"

    def test_prometheus_takes_them(self, hostvars):
        run = hostvars["m1"]["rejuvenate_report"]
        promtool("check", "metrics", told=FILTERS["rejuvenation_metrics"]({"history": [run]}, 1_700_009_000.0))
