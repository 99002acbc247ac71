# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judgements of role aging_monitor, through its filters."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.vmbeam.xen.plugins.filter.aging import FilterModule

FILTERS = FilterModule().filters()
STEP = 300.0
NOW = 1762419731.25
HOUR = 3600.0


def indicator(name: str, value: float, **values: Any) -> dict[str, Any]:
    row = {"name": name, "value": value, "unit": "MiB", "limit": 1000, "direction": "down", "exhausted_at": 0}
    return {**row, **values}


def info(*rows: dict[str, Any], times: list[float] | None = None, **series: list[float | None]) -> dict[str, Any]:
    """What aging_info returns; the series end one step ago."""
    length = max((len(column) for column in series.values()), default=0)
    if times is None:
        times = [NOW - STEP * (length - index) for index in range(length)]
    return {
        "time": NOW,
        "indicators": list(rows),
        "unavailable": {},
        "series": {"samples": length, "times": times, "indicators": series},
    }


def aged(values: list[float], **attributes: Any) -> dict[str, Any]:
    """What aging_info returns of memory that had these values, the last of them now."""
    return info(indicator("memory", values[-1], **attributes), memory=values[:-1])


def trend_of(values: list[float], **attributes: Any) -> dict[str, Any]:
    return FILTERS["aging_trend"](aged(values, **attributes))["memory"]


def noise(count: int, seed: int, scale: float = 1.0) -> list[float]:
    source = random.Random(seed)  # noqa: S311
    return [source.gauss(0, scale) for _ in range(count)]


class TestTrend:
    def test_a_leak_in_noise(self):
        found = trend_of([800 - 2 * index + wobble for index, wobble in enumerate(noise(100, 1, 5))])
        assert found["trend"] == "decreasing"
        assert found["p"] < 0.001
        assert found["slope"] * STEP == pytest.approx(-2, rel=0.05)
        # 602 MiB are left, 2 go each 5 minutes.
        assert found["seconds_to_exhaustion"] == pytest.approx(301 * STEP, rel=0.05)
        assert (found["samples"], found["span"]) == (100, 99 * STEP)

    @pytest.mark.parametrize(
        "values", [[500.0 - index for index in range(40)], [500.0 - index // 5 for index in range(40)]]
    )
    def test_a_leak_without_noise(self, values):
        found = trend_of(values)
        assert found["trend"] == "decreasing"
        assert found["seconds_to_exhaustion"] == pytest.approx(values[-1] / -found["slope"], rel=0.02)

    def test_growth_to_a_limit(self):
        found = trend_of([10.0 * index for index in range(41)], direction="up", exhausted_at=1000)
        assert (found["trend"], found["seconds_to_exhaustion"]) == ("increasing", pytest.approx(60 * STEP))

    def test_growth_without_a_limit_ends_never(self):
        found = trend_of([10.0 * index for index in range(41)], direction="up", exhausted_at=None, limit=None)
        assert (found["trend"], found["seconds_to_exhaustion"]) == ("increasing", None)

    def test_what_recovers_is_not_exhausted(self):
        found = trend_of([100.0 + index for index in range(41)])
        assert (found["trend"], found["seconds_to_exhaustion"]) == ("increasing", None)

    def test_what_is_gone_is_exhausted_now(self):
        assert trend_of([400.0 - 10 * index for index in range(41)])["seconds_to_exhaustion"] == 0

    @pytest.mark.parametrize("seed", range(20))
    def test_noise_is_no_trend(self, seed):
        found = trend_of([500 + wobble for wobble in noise(100, seed)])
        assert (found["trend"], found["seconds_to_exhaustion"]) == ("none", None)

    def test_values_that_depend_on_earlier_ones_are_seldom_taken_for_a_trend(self):
        """A plain Mann-Kendall test would take every third of these series for one."""
        found = []
        for seed in range(40):
            values, level = [], 0.0
            for wobble in noise(100, seed):
                level = 0.8 * level + wobble
                values.append(500 + level)
            found.append(trend_of(values)["trend"])
        assert found.count("none") >= 36

    def test_a_constant_is_no_trend(self):
        assert trend_of([500.0] * 40)["trend"] == "none"

    def test_one_step_down_is_not_what_goes_on(self):
        """Guests that arrived once: memory has fallen, and falls no more."""
        found = trend_of([900.0] * 5 + [400.0] * 60)
        assert found["seconds_to_exhaustion"] is None

    def test_what_has_come_off_its_line_has_left_what_it_has_left_now(self):
        """A guest went and took 13 MiB of the hypervisor's tables along, and others fill what it left."""
        found = trend_of([100 + index / 12 for index in range(280)] + [110.0] * 8, direction="up", exhausted_at=112)
        # One MiB an hour, 2 are left. The line alone is 11 MiB above the limit.
        assert found["seconds_to_exhaustion"] == pytest.approx(2 * HOUR)

    def test_samples_need_not_be_equally_far_apart(self):
        times, values = [], []
        source = random.Random(7)  # noqa: S311
        at = NOW - 100000
        while at < NOW:
            times.append(at)
            values.append(900 - (at - NOW + 100000) / 1000)
            at += source.choice([60, 300, 5000])
        found = FILTERS["aging_trend"](info(indicator("memory", 800), times=times, memory=values))["memory"]
        assert found["slope"] == pytest.approx(-1 / 1000)
        assert found["seconds_to_exhaustion"] == pytest.approx(800 * 1000, rel=0.001)

    def test_what_was_not_always_seen(self):
        values: list[float | None] = [500.0 - index for index in range(40)]
        values[3:9] = [None] * 6
        found = FILTERS["aging_trend"](info(indicator("memory", 460), indicator("new", 5), memory=values))
        assert (found["memory"]["trend"], found["memory"]["samples"]) == ("decreasing", 35)
        assert (found["new"]["trend"], found["new"]["samples"]) == ("unknown", 1)

    def test_few_samples_say_nothing(self):
        short = aged([500.0 - 10 * index for index in range(11)])
        assert FILTERS["aging_trend"](short)["memory"]["trend"] == "unknown"
        assert FILTERS["aging_trend"](short, 0.01, 11)["memory"]["trend"] == "decreasing"
        # The test needs some, whatever is asked for.
        assert FILTERS["aging_trend"](aged([3.0, 2.0, 1.0]), 0.5, 1)["memory"]["trend"] == "unknown"

    def test_a_value_counts_as_the_samples_that_it_stands_for(self):
        thinned = aged([500.0 - index for index in range(41)])
        thinned["series"]["samples"] = 400
        found = FILTERS["aging_trend"](thinned, 0.01, 401)["memory"]
        assert (found["trend"], found["samples"]) == ("decreasing", 401)
        assert FILTERS["aging_trend"](thinned, 0.01, 402)["memory"]["trend"] == "unknown"

    def test_no_series(self):
        assert FILTERS["aging_trend"](info(indicator("memory", 5)))["memory"]["trend"] == "unknown"

    @pytest.mark.parametrize("missing", ["pymannkendall", "scipy.stats"])
    def test_a_missing_library_is_named(self, monkeypatch, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(AnsibleFilterError, match=f"(?s)library {missing}.*pip install pymannkendall"):
            trend_of([1.0])

    def test_strange_input(self):
        with pytest.raises(AnsibleFilterError, match="aging_trend: the input lacks 'series'"):
            FILTERS["aging_trend"]({})


def dom0(found: dict[str, Any], place: str = "guest", name: str = "m1-a") -> dict[str, Any]:
    return {"name": name, "place": place, "info": found}


def assess(*dom0s: dict[str, Any], **policy: Any) -> dict[str, Any]:
    return FILTERS["aging_assessment"](list(dom0s), policy)


NODES = {"unit": "count", "direction": "up", "limit": None, "exhausted_at": None}


class TestAssessment:
    @pytest.mark.parametrize(
        ("value", "due", "score"), [(1000, False, 0.5), (1999.9, False, 0.99), (2000, True, 1.0), (5000, True, 2.5)]
    )
    def test_threshold_of_what_rises(self, value, due, score):
        made = assess(dom0(info(indicator("xenstore_nodes", value, **NODES))), thresholds={"xenstore_nodes": 2000})
        assert (made["due"], made["score"]) == (due, score)
        assert made["reasons"] == (
            [f"m1-a: xenstore_nodes is {value}, at or over the threshold of 2000"] if due else []
        )

    @pytest.mark.parametrize(
        ("value", "due", "score"),
        [(400, False, 0.25), (100.1, False, 0.99), (100, True, 1.0), (50, True, 2.0), (0, True, 100.0)],
    )
    def test_threshold_of_what_falls(self, value, due, score):
        made = assess(dom0(info(indicator("dom0_available_memory", value))), thresholds={"dom0_available_memory": 100})
        assert (made["due"], made["score"]) == (due, score)
        assert made["reasons"] == (
            [f"m1-a: dom0_available_memory is {value} MiB, at or under the threshold of 100 MiB"] if due else []
        )

    def leak(self, hours: float) -> dict[str, Any]:
        """Memory that will last for so many hours, as 12 hours of samples show."""
        rate = 480 / (hours * HOUR / STEP)
        column = [480 + rate * (144 - index) for index in range(144)]
        return info(indicator("dom0_available_memory", 480), dom0_available_memory=column)

    @pytest.mark.parametrize(("hours", "due"), [(23.9, True), (24.1, False), (1000, False)])
    def test_prediction(self, hours, due):
        made = assess(dom0(self.leak(hours)), exhaustion_within=24 * HOUR)
        assert made["due"] == due == (made["score"] >= 1)
        assert made["score"] == pytest.approx(24 / hours, abs=0.01)
        if due:
            assert made["reasons"] == [
                "m1-a: dom0_available_memory will be exhausted in 23.9 h (is 480 MiB, changes by -20.1 an hour)"
            ]

    def own(self, values: list[float], free: list[float]) -> dict[str, Any]:
        """A hypervisor that takes so much itself, and has so much free."""
        used_up = values[-1] + free[-1]
        found = info(
            indicator("hypervisor_free_memory", free[-1], limit=4096),
            indicator("hypervisor_own_memory", values[-1], limit=used_up, direction="up", exhausted_at=used_up),
            hypervisor_own_memory=values[:-1],
            hypervisor_free_memory=free[:-1],
        )
        return assess(dom0(found))

    def test_a_leak_of_the_hypervisor_shows_while_guests_leave(self):
        """2 MiB an hour, and a guest with 128 MiB goes every three hours; or one with 16 MiB."""
        leak = [100 + index / 6 for index in range(288)]
        assert not self.own(leak, [128.0 * (index // 36) for index in range(288)])["due"]
        made = self.own(leak, [16.0 * (index // 36) for index in range(288)])
        assert made["reasons"] == [
            "m1-a: hypervisor_own_memory will be exhausted in 2.3 d (is 148 MiB, changes by +2 an hour)"
        ]

    def test_a_guest_that_takes_nearly_all_that_is_free_makes_no_machine_due(self):
        """The limit falls at once, and 4 MiB of tables are one step."""
        made = self.own([100.0] * 144 + [104.0] * 144, [2000.0] * 144 + [8.0] * 144)
        assert (made["due"], made["reasons"]) == (False, [])

    def test_a_trend_of_an_hour_is_not_believed(self):
        assert assess(dom0(self.leak(2)), exhaustion_within=24 * HOUR)["due"]
        assert not assess(dom0(self.leak(2)), exhaustion_within=24 * HOUR, min_span=13 * HOUR)["due"]
        assert not assess(dom0(self.leak(2)), exhaustion_within=24 * HOUR, min_samples=200)["due"]

    def test_by_default_three_days_count(self):
        assert assess(dom0(self.leak(71)))["due"]
        assert not assess(dom0(self.leak(73)))["due"]

    def test_without_prediction_no_library_is_needed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pymannkendall", None)
        made = assess(dom0(self.leak(2)), exhaustion_within=0, thresholds={"dom0_available_memory": 500})
        assert made["due"]
        assert made["indicators"][0]["trend"] is None
        with pytest.raises(AnsibleFilterError, match="pymannkendall"):
            assess(dom0(self.leak(2)))

    def test_the_most_urgent_reason_comes_first(self):
        found = info(
            indicator("xenstore_nodes", 2100, **NODES),
            indicator("dom0_available_memory", 10),
            indicator("dom0_threads", 5, **NODES),
        )
        limits = {"xenstore_nodes": 2000, "dom0_available_memory": 100, "dom0_threads": 600}
        made = assess(dom0(found), thresholds=limits)
        assert [reason.split()[1] for reason in made["reasons"]] == ["dom0_available_memory", "xenstore_nodes"]
        assert made["score"] == 10

    def test_what_has_aged_below_makes_no_machine_due(self):
        host = dom0(info(indicator("dom0_available_memory", 10)), "host", "m1")
        guest = dom0(info(indicator("dom0_available_memory", 900)))
        made = assess(host, guest, thresholds={"dom0_available_memory": 100})
        assert (made["due"], made["reasons"]) == (False, [])
        assert made["score"] == pytest.approx(0.111)
        assert made["host_reasons"] == ["m1: dom0_available_memory is 10 MiB, at or under the threshold of 100 MiB"]

    def test_nothing_to_judge(self):
        nothing = {"reasons": [], "host_reasons": [], "indicators": [], "unavailable": []}
        assert assess() == {"score": 0.0, "due": False, **nothing}
        assert FILTERS["aging_text"](assess(), "m1") == ["m1: aging score 0.00, not due", "Nothing could be read."]

    def lacking(self, **unavailable: str) -> dict[str, Any]:
        return {**info(indicator("dom0_available_memory", 900)), "unavailable": unavailable}

    def test_a_toolstack_that_does_not_answer_is_due_before_all_others(self):
        why = "xl list -v did not end\nwithin 60 s."
        made = assess(dom0(self.lacking(highest_domid=why, xenstore_nodes=why)), exhaustion_within=0)
        assert (made["due"], made["score"]) == (True, 100.0)
        told = "xl list -v did not end within 60 s"
        assert made["reasons"] == [f"m1-a: its toolstack does not answer ({told})"]
        assert f"m1-a: could not read highest_domid, xenstore_nodes ({told})" in FILTERS["aging_text"](made, "m1")

    def test_a_toolstack_that_does_not_answer_below_is_not_cured(self):
        made = assess(dom0(self.lacking(hypervisor_free_memory="xl info failed"), "host", "m1"), exhaustion_within=0)
        assert (made["due"], made["score"]) == (False, 0.0)
        assert made["host_reasons"] == ["m1: its toolstack does not answer (xl info failed)"]

    @pytest.mark.parametrize(
        ("found", "line"),
        [
            # A xenstored in a domain of its own has no socket.
            ({"xenstore_nodes": "no socket"}, "m1-a: could not read xenstore_nodes (no socket)"),
            (None, "m1-a: could not read anything (No route to host)"),
        ],
    )
    def test_what_may_have_another_cause_is_told_only(self, found, line):
        answer = self.lacking(**found) if found else {"unreachable": True, "msg": "No route to host"}
        made = assess(dom0(answer))
        assert (made["due"], made["score"]) == (False, 0.0)
        assert line in FILTERS["aging_text"](made, "m1")

    @pytest.mark.parametrize(
        ("policy", "words"),
        [
            ({"threshold": {}}, "no option 'threshold'"),
            ({"thresholds": {"memory": 5}}, "'memory' is none of the indicators hypervisor_free_memory"),
            ({"thresholds": {"uptime": "long"}}, "'long'"),
            ({"min_samples": None}, "wrong form"),
        ],
    )
    def test_a_policy_that_means_nothing(self, policy, words):
        with pytest.raises(AnsibleFilterError, match=words):
            assess(**policy)

    def test_text(self):
        found = self.leak(10)
        found["indicators"].append(indicator("highest_domid", 17, unit="count", direction="up"))
        lines = FILTERS["aging_text"](assess(dom0(found)), "m1")
        assert lines[0].startswith("m1: aging score 7.20, due: m1-a: dom0_available_memory will be exhausted in 10.0 h")
        heading = next(index for index, line in enumerate(lines) if line.startswith("dom0 "))
        assert lines[heading + 1].split() == (
            ["m1-a", "dom0_available_memory", "480", "MiB", "1000", "decreasing", "-48", "145", "10.0", "h", "7.20"]
        )
        assert lines[heading + 2].split() == [
            "m1-a",
            "highest_domid",
            "17",
            "count",
            "1000",
            "unknown",
            "-",
            "1",
            "-",
            "-",
        ]
