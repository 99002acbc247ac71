# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Strategies, guests that cannot move, anti-affinity, the way back and the estimate, through the role's filters."""

from __future__ import annotations

from typing import Any

import pytest
from observed import (
    FILTERS,
    NOW,
    SETTINGS,
    SILENT,
    dom0,
    guest,
    host_vm,
    observe,
    observe_both,
    plan,
    problems,
)

PCI = [{"type": "pci", "id": "0000:03:00.0"}]
FILES = [{"path": "/etc/xen/guests/web1.cfg", "content": 'name = "web1"\n'}]


def observe_guest(zero_copy: bool | None = True, **values: Any) -> dict[str, Any]:
    """The usual machine, whose guest web1 has these values, and a configuration to be started from."""
    return observe(guest_dom0s={"a": dom0(guest("web1", **values), zero_copy=zero_copy, configurations=FILES)})


def first(made: dict[str, Any]) -> tuple[str, str]:
    return made["guests"][0]["step"], made["guests"][0]["strategy"]


class TestAuto:
    def test_zero_copy_first(self):
        made = plan(observe_guest(), strategy="auto")
        assert first(made) == ("move", "zero_copy")
        assert made["guests"][0]["strategy_reason"] == "auto: the first choice is possible"

    def test_precopy_if_zero_copy_is_not_offered(self):
        made = plan(observe_guest(zero_copy=False), strategy="auto")
        assert first(made) == ("move", "precopy")
        text = "\n".join(FILTERS["rejuvenation_plan_text"](made))
        assert "web1: auto: not zero_copy, as the hypervisor below m1-a, or the one in it, does not offer" in text

    def test_suspend_if_precopy_is_not_allowed(self):
        allowed = ["zero_copy", "suspend"]
        made = plan(observe_guest(zero_copy=False), strategy="auto", auto_strategies=allowed)
        assert first(made) == ("move", "suspend")

    @pytest.mark.parametrize(
        ("values", "settings"),
        [
            ({"migratable": False}, {}),
            ({"type": "pv"}, {}),
            ({}, {"pinned_guests": ["web1"]}),
            ({"state": "crashed"}, {}),
        ],
    )
    def test_cold_only_if_allowed(self, values, settings):
        observed = observe_guest(**values)
        refused = plan(observed, strategy="auto", **settings)
        assert len(problems(refused)) >= 1
        made = plan(observed, strategy="auto", auto_strategies=["zero_copy", "precopy", "cold"], **settings)
        assert first(made) == ("move", "cold")
        assert made["guests"][0]["config"] == "/etc/xen/guests/web1.cfg"
        assert problems(made) == []

    def test_one_guest_may_have_its_own(self):
        made = plan(observe_guest(), strategy="precopy", guest_strategies={"web1": "auto"})
        assert first(made) == ("move", "zero_copy")

    def test_remains_of_a_cut_migration_are_repaired_by_the_strategy_that_left_them(self):
        observed = observe_both(
            dom0(guest("web1"), zero_copy=True), dom0(guest("web1--incoming", state="paused"), zero_copy=True)
        )
        observed["state"] = {"run": {"strategies": {"web1": "suspend"}}}
        assert first(plan(observed, strategy="auto")) == ("move", "suspend")


class TestCold:
    def test_needs_a_configuration(self):
        observed = observe(guest_dom0s={"a": dom0(guest("web1"))})
        assert problems(plan(observed, strategy="cold")) == ["configuration"]

    def test_paused_guest_would_not_shut_down(self):
        assert problems(plan(observe_guest(state="paused"), strategy="cold")) == ["guest state"]

    def test_older_xen_does_not_matter(self):
        made = plan(observe_guest(), strategy="cold")
        here, there = {"version": "4.20.1"}, {"version": "4.17.5", "free_memory_mb": 2000}
        assert FILTERS["rejuvenation_destination_problems"](made, here, there) == []

    def test_guest_that_a_cut_run_had_shut_down_is_started(self):
        made = plan(observe_guest(), strategy="cold")
        begun = FILTERS["rejuvenation_record"]({}, made, None, NOW, 5)
        empty = dom0(configurations=FILES)
        observed = observe_both(empty, dom0(), state=begun)
        resumed = plan(observed, strategy="precopy")
        assert [(item["name"], item["location"], item["strategy"]) for item in resumed["guests"]] == [
            ("web1", "nowhere", "cold")
        ]
        assert resumed["guests"][0]["disks"][0]["path"] == "/guests/web1-root.raw"
        assert resumed["steps"][0].startswith("start web1 in m1-b")
        assert resumed["idle_disks"] == []
        assert problems(resumed) == []

    def test_guest_that_was_stopped_on_purpose_is_not_started(self):
        cold, live = (plan(observe_guest(), strategy=strategy) for strategy in ("cold", "precopy"))
        began = FILTERS["rejuvenation_record"]({}, live, None, NOW, 5)
        assert plan(observe_both(dom0(), dom0(), state=began))["guests"] == []

        began = FILTERS["rejuvenation_record"]({}, cold, None, NOW, 5)
        assert plan(observe_both(dom0(), dom0(), state=began), confirm_gone=["web1"])["guests"] == []

        results = [{"guest": "web1", "result": "moved"}]
        phases = [{"phase": "move web1", "at": NOW}]
        report = FILTERS["rejuvenation_report"](cold, phases, results, {"undone": False}, NOW)
        failed = FILTERS["rejuvenation_record"](began, cold, report, NOW, 5)
        assert failed["run"]["guests"] == ["web1"]
        assert plan(observe_both(dom0(), dom0(), state=failed))["guests"] == []


class TestGuestsThatCannotMove:
    @pytest.mark.parametrize(
        ("values", "settings", "what"),
        [
            ({"devices": PCI}, {}, "passthrough"),
            ({"cpu_affinity": [[0], [4, 5]]}, {"host_vm_vcpus": 4}, "CPU pinning"),
            ({"migratable": False}, {}, "nomigrate"),
            ({}, {"pinned_guests": ["web1"]}, "pinned"),
        ],
    )
    def test_are_refused_by_default(self, values, settings, what):
        made = plan(observe_guest(**values), **settings)
        assert problems(made) == [what]
        assert "web1" in made["problems"][0]["message"]

    @pytest.mark.parametrize("affinity", [[], [[0]], [[3, 7]]])
    def test_pinning_to_cpus_that_are_there_is_no_obstacle(self, affinity):
        assert problems(plan(observe_guest(cpu_affinity=affinity), host_vm_vcpus=4)) == []

    def test_skip_host(self):
        made = plan(observe_guest(devices=PCI), unmovable_policy="skip_host", force=True)
        assert made["action"] == "skip"
        assert "0000:03:00.0" in made["reason"]
        assert problems(made) == []
        assert made["steps"] == made["batches"] == []

    def test_skip_host_is_too_late_for_a_run_that_has_begun(self):
        observed = observe_both(dom0(guest("web1", devices=PCI)), dom0())
        made = plan(observed, unmovable_policy="skip_host")
        assert made["action"] == "resume"
        assert problems(made) == ["skip_host"]

    @pytest.mark.parametrize("policy", ["precopy", "suspend"])
    def test_another_way(self, policy):
        made = plan(observe_guest(zero_copy=False), strategy="zero_copy", unmovable_policy=policy)
        assert first(made) == ("move", policy)
        assert made["guests"][0]["strategy_reason"].startswith(f"{policy} by the policy")
        assert problems(made) == []

    def test_another_way_that_is_none(self):
        made = plan(observe_guest(devices=PCI), unmovable_policy="cold")
        assert problems(made) == ["passthrough"]

    def test_policy_of_a_single_guest(self):
        guests = dom0(guest("web1", devices=PCI), guest("web2", devices=PCI, disks=[]))
        made = plan(
            observe(guest_dom0s={"a": guests}),
            unmovable_policy="leave_and_skip",
            guest_unmovable_policies={"web2": "fail"},
        )
        assert problems(made) == ["passthrough"]
        assert "web2" in made["problems"][0]["message"]

    def test_leave(self):
        guests = dom0(guest("web1", devices=PCI), guest("web2", disks=[]))
        made = plan(observe(guest_dom0s={"a": guests}), unmovable_policy="leave_and_skip")
        assert [(item["name"], item["step"]) for item in made["guests"]] == [("web1", "leave"), ("web2", "move")]
        assert made["batches"] == [["web2"]]
        assert made["steps"][-1] == "keep m1-a for web1"
        assert problems(made) == []

    def test_nothing_is_begun_if_all_would_be_left(self):
        made = plan(observe_guest(devices=PCI), unmovable_policy="leave_and_skip")
        assert made["action"] == "skip"

    def test_left_guest_keeps_later_runs_from_beginning_anew(self):
        vms = [host_vm("a"), host_vm("b", generation=2, disks=[{"id": "web2-root", "path": "/guests/web2.raw"}])]
        observed = {**observe_both(dom0(guest("web1", devices=PCI)), dom0(guest("web2"))), "host_vms": vms}
        made = plan(observed, unmovable_policy="leave_and_skip", force=True)
        assert made["action"] == "skip"
        assert "m1-a is kept" in made["reason"]
        assert plan(observed, unmovable_policy="cold")["action"] == "resume"
        # Unless it is not known what the new host VM has.
        silent = {**observed, "guest_dom0s": {**observed["guest_dom0s"], "b": SILENT}}
        assert problems(plan(silent, unmovable_policy="leave_and_skip", force=True)) == ["guest dom0"]

    def test_half_moved_guest_is_never_left(self):
        observed = observe_both(dom0(guest("web1", devices=PCI)), dom0(guest("web1--incoming", state="paused")))
        assert problems(plan(observed, unmovable_policy="leave_and_skip")) == ["passthrough"]

    def test_memory_of_a_left_guest_is_not_needed(self):
        guests = dom0(guest("web1", devices=PCI), guest("web2", disks=[]))
        observed = observe(guest_dom0s={"a": guests})
        assert problems(plan(observed, unmovable_policy="leave_and_skip", host_vm_memory_mb=1200)) == []
        assert "host VM memory" in problems(plan(observed, host_vm_memory_mb=1200))


class TestConfirmation:
    def confirm(self, made, source, destination, **settings):
        return FILTERS["rejuvenation_confirm"](made, observe_both(source, destination), {**SETTINGS, **settings})

    def test_nothing_has_changed(self):
        made = plan(observe())
        confirmed = self.confirm(made, dom0(guest("web1")), dom0())
        assert confirmed["changes"] == confirmed["problems"] == []
        assert confirmed["destination"]["start"]
        assert confirmed["batches"] == [["web1"]]

    def test_destination_without_zero_copy(self):
        made = plan(observe(), strategy="auto")
        confirmed = self.confirm(made, dom0(guest("web1")), dom0(zero_copy=False), strategy="auto")
        assert first(confirmed) == ("move", "precopy")
        assert "web1: move (precopy)" in confirmed["changes"][0]
        assert confirmed["problems"] == []
        refused = self.confirm(plan(observe()), dom0(guest("web1")), dom0(zero_copy=False), strategy="zero_copy")
        assert problems(refused) == ["zero-copy"]

    @pytest.mark.parametrize(
        ("wanted", "versions", "transport"),
        [
            ("auto", (3, 3), "channel"),
            ("auto", (3, 4), "ssh"),
            # Its daemon may be about to start.
            ("auto", (3, None), "channel"),
            ("channel", (3, 4), "channel"),
            ("tcp", (3, 4), "tcp"),
        ],
    )
    def test_host_vms_whose_channels_differ_have_none(self, wanted, versions, transport):
        settings = {"strategy": "zero_copy", "zero_copy_transport": wanted}
        made = plan(observe(), **settings)
        assert made["zero_copy_transport"] == ("tcp" if wanted == "tcp" else "channel")
        source, destination = dom0(guest("web1"), channel_version=versions[0]), dom0(channel_version=versions[1])
        confirmed = self.confirm(made, source, destination, **settings)
        assert confirmed["zero_copy_transport"] == transport
        told = "goes by ssh: the channel of m1-a is of version 3 and the channel of m1-b is of version 4"
        assert [told in change for change in confirmed["changes"]] == ([True] if transport == "ssh" else [])
        assert not confirmed["problems"]

    @pytest.mark.parametrize(
        ("transport", "strategy", "destination", "found"),
        [
            ("channel", "precopy", {"channel_version": 3}, []),
            ("channel", "precopy", {"channel_version": 4}, ["transport"]),
            ("channel", "suspend", {"zero_copy": False}, ["transport"]),
            # Its daemon may be about to start.
            ("channel", "suspend", {"channel_version": None}, []),
            ("ssh", "precopy", {"channel_version": 4}, []),
        ],
    )
    def test_guests_that_are_to_be_copied_by_a_channel(self, transport, strategy, destination, found):
        settings = {"strategy": strategy, "transport": transport}
        made = plan(observe(), **settings)
        assert problems(made) == []
        pair = dom0(guest("web1"), channel_version=3), dom0(**destination)
        assert problems(self.confirm(made, *pair, **settings)) == found

    def test_a_channel_that_cannot_be_is_told_before_anything_is_started(self):
        observed = observe(guest_dom0s={"a": dom0(guest("web1"), zero_copy=False)})
        assert problems(plan(observed, strategy="precopy", transport="channel")) == ["transport"]

    def test_how_zero_copy_would_go_is_not_told_where_it_is_not_used(self):
        settings = {"strategy": "precopy", "zero_copy_transport": "auto"}
        pair = dom0(guest("web1"), channel_version=3), dom0(channel_version=4)
        assert not self.confirm(plan(observe(), **settings), *pair, **settings)["changes"]

    def test_guests_that_came_and_went(self):
        confirmed = self.confirm(plan(observe()), dom0(guest("new1", disks=[])), dom0())
        assert confirmed["changes"] == ["guest web1 is gone", "guest new1 is new: move (precopy)"]

    def test_guest_that_has_stopped(self):
        assert problems(self.confirm(plan(observe()), dom0(guest("web1", state="crashed")), dom0())) == ["guest state"]

    def test_probe_that_fails_now(self):
        observed = {**observe_both(dom0(guest("web1")), dom0()), "probes": {"web1": {"ok": False, "error": "refused"}}}
        assert problems(FILTERS["rejuvenation_confirm"](plan(observe()), observed, SETTINGS)) == ["probe"]

    def test_room(self):
        full = dom0()
        full["hypervisor"]["free_memory_mb"] = 100
        assert problems(self.confirm(plan(observe()), dom0(guest("web1")), full)) == ["guest memory"]

    @pytest.mark.parametrize(("source", "destination"), [(dom0(guest("web1")), SILENT), (SILENT, dom0())])
    def test_silence(self, source, destination):
        assert problems(self.confirm(plan(observe()), source, destination)) == ["guest dom0"]

    def test_skip_host_is_too_late(self):
        confirmed = self.confirm(
            plan(observe()), dom0(guest("web1", devices=PCI)), dom0(), unmovable_policy="skip_host"
        )
        assert problems(confirmed) == ["skip_host"]


class TestAntiAffinity:
    GROUPS = ({"name": "db", "guests": ["db1", "db2"]}, {"name": "edge", "label": "edge"})

    def batches(self, *names, limit, labels=None):
        guests = dom0(*(guest(name, disks=[]) for name in names))
        settings = {"anti_affinity": self.GROUPS, "guest_labels": labels or {}, "parallel_guests": limit}
        return plan(observe(guest_dom0s={"a": guests}), **settings)["batches"]

    def test_two_of_a_group_are_never_in_one_batch(self):
        assert self.batches("app1", "db1", "db2", "web1", limit=4) == [["app1", "db1", "web1"], ["db2"]]

    def test_by_label(self):
        labels = {"app1": ["edge"], "web1": "big, edge"}
        assert self.batches("app1", "web1", limit=2, labels=labels) == [["app1"], ["web1"]]
        assert self.batches("app1", "web1", limit=2, labels={"app1": ["edge"]}) == [["app1", "web1"]]
        # As text it is a name, in which another may be.
        assert self.batches("app1", "web1", limit=2, labels={"app1": "edge", "web1": "edges"}) == [["app1", "web1"]]

    def test_limit(self):
        assert self.batches("a1", "a2", "a3", limit=2) == [["a1", "a2"], ["a3"]]
        assert self.batches("a1", "a2", limit=1) == [["a1"], ["a2"]]

    def plan_of(self, machine, *groups, action="rejuvenate", problems=()):
        guests = [{"anti_affinity": [group]} for group in groups]
        return {"machine": machine, "action": action, "guests": guests, "problems": list(problems)}

    def test_machines_take_turns(self):
        turns = FILTERS["rejuvenation_turns"](
            [self.plan_of("m1", "db"), self.plan_of("m2", "db", "web"), self.plan_of("m3", "web"), self.plan_of("m4")]
        )
        assert {name: entry["turn"] for name, entry in turns.items()} == {"m1": 0, "m2": 1, "m3": 0, "m4": 0}
        assert turns["m2"]["mates"] == [{"group": "db", "machine": "m1"}, {"group": "web", "machine": "m3"}]

    def test_machines_that_are_not_rolled_do_not_count(self):
        turns = FILTERS["rejuvenation_turns"](
            [
                self.plan_of("m1", "db", action="skip"),
                self.plan_of("m2", "db"),
                self.plan_of("m3", "db", problems=["refused"]),
            ]
        )
        assert turns == {"m2": {"turn": 0, "mates": []}}


class TestRollback:
    def recover(self, observed, in_flight=(), made=None, **settings):
        settings = {**SETTINGS, "on_failure": "rollback", **settings}
        return FILTERS["rejuvenation_recovery"](made or plan(observe()), observed, settings, list(in_flight))

    def test_guest_that_has_moved_goes_back(self):
        result = self.recover(observe_both(dom0(), dom0(guest("web1"))))
        assert [(item["name"], item["step"]) for item in result["move_back"]] == [("web1", "back")]
        assert not result["destroy_destination"]

    def test_only_if_wanted(self):
        assert self.recover(observe_both(dom0(), dom0(guest("web1"))), on_failure="keep")["move_back"] == []

    def test_guest_whose_place_is_not_clear_stays(self):
        for source, destination in (
            (dom0(guest("web1")), dom0(guest("web1"))),
            (dom0(), dom0(guest("web1--incoming", state="paused"))),
            (dom0(), dom0(guest("web1", state="crashed"))),
            (dom0(guest("web1")), dom0()),
        ):
            assert self.recover(observe_both(source, destination))["move_back"] == []
        assert self.recover(observe_both(dom0(), dom0(guest("web1"))), in_flight=["web1"])["move_back"] == []

    def test_destination_goes_once_all_are_back_even_if_undo_is_declined(self):
        assert self.recover(observe_both(dom0(guest("web1")), dom0()), undo_on_failure=False)["destroy_destination"]

    def test_guest_that_was_paused_before_it_moved_stays_paused(self):
        paused = observe_both(dom0(guest("web1", state="paused")), dom0())
        confirmed = FILTERS["rejuvenation_confirm"](plan(observe()), paused, SETTINGS)
        result = self.recover(paused, made=confirmed)
        assert result["unpause"] == []
        assert result["destroy_destination"]

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            (SILENT, "does not answer"),
            (dom0(hypervisor={"version": "4.16.2"}), "older Xen"),
        ],
    )
    def test_no_way_back(self, source, words):
        result = self.recover(observe_both(source, dom0(guest("web1"))))
        assert result["move_back"] == []
        assert words in result["rollback_refused"]

    def test_no_way_back_for_what_an_earlier_run_moved(self):
        observed = observe_both(dom0(guest("app1", disks=[])), dom0(guest("web1")))
        result = self.recover(observed, made=plan(observed))
        assert result["move_back"] == []
        assert "set vmbeam_destination_slot to a" in result["rollback_refused"]

    def test_report_counts_what_stayed_moved(self):
        results = [
            {"guest": name, "result": result}
            for name, result in (("app1", "moved"), ("web1", "moved"), ("web1", "moved back"))
        ]
        phases = [{"phase": "move app1, web1", "at": NOW}]
        report = FILTERS["rejuvenation_report"](plan(observe()), phases, results, {"undone": False}, NOW + 30)
        assert report["guests_moved"] == 1
        assert report["guests_moved_back"] == ["web1"]


def run_of(*phases: tuple[str, float], outcome: str = "completed", **guests: dict[str, Any]) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "phases": [{"phase": phase, "seconds": seconds} for phase, seconds in phases],
        "guests": [
            {"guest": name, "result": "moved", "strategy": "precopy", "memory_mb": 128, **values}
            for name, values in guests.items()
        ],
    }


class TestEstimate:
    def test_of_a_machine_without_history(self):
        figures = plan(observe())["estimate"]
        assert figures["seconds"] is None
        assert figures["unknown"] == ["observe and plan", "start m1-b", "move web1", "retire m1-a"]
        assert "Estimated time: unknown" in FILTERS["rejuvenation_plan_text"](plan(observe()))[-1]

    def test_by_earlier_runs(self):
        spans = (("observe and plan", 10), ("start m1-a", 60), ("move web1", 25), ("retire m1-b", 5))
        slow = (("observe and plan", 20), ("start m1-b", 80), ("move web1", 35), ("retire m1-a", 7))
        failed = run_of(("start m1-b", 900), outcome="failed")
        history = [
            run_of(*spans, web1={"seconds": 20, "downtime_seconds": 1.0}),
            failed,
            run_of(*slow, web1={"seconds": 30, "downtime_seconds": 3.0}),
        ]
        made = plan(observe(state={"history": history}))
        assert made["estimate"]["parts"] == [
            {"part": "observe and plan", "seconds": 15},
            {"part": "start m1-b", "seconds": 70},
            {"part": "move web1", "seconds": 30.0},  # 25 s for the migration, 5 s for disks and gates
            {"part": "retire m1-a", "seconds": 6},
        ]
        assert made["estimate"]["seconds"] == 121.0
        assert made["estimate"]["guests"]["web1"] == {"seconds": 25.0, "downtime_seconds": 2.0}
        text = FILTERS["rejuvenation_plan_text"](made)[-1]
        assert text == "Estimated time: 2 min, longest downtime 2 s (by 2 earlier run(s))"

    @pytest.mark.parametrize(("strategy", "seconds"), [("precopy", 40.0), ("zero_copy", 10.0)])
    def test_guest_that_never_moved_is_estimated_by_others(self, strategy, seconds):
        """In proportion to its memory if that is copied."""
        other = {"seconds": 10, "memory_mb": 32, "strategy": strategy, "downtime_seconds": None}
        made = plan(observe(state={"history": [run_of(("move app1", 12), app1=other)]}), strategy=strategy)
        assert made["estimate"]["guests"]["web1"] == {"seconds": seconds, "downtime_seconds": None}

    def test_other_strategies_tell_nothing(self):
        history = [run_of(("move web1", 25), web1={"seconds": 20, "downtime_seconds": 1.0})]
        assert plan(observe(state={"history": history}), strategy="suspend")["estimate"]["guests"]["web1"] == {
            "seconds": None,
            "downtime_seconds": None,
        }

    def test_runs_without_phases_are_passed_over(self):
        assert plan(observe(state={"history": [{"outcome": "completed", "guests": ["web1"]}]}))["estimate"]["runs"] == 0


class TestPreview:
    def preview(self, made):
        return FILTERS["rejuvenation_preview"](made)

    def test_new_host_vm(self):
        assert self.preview(plan(observe())) == {
            "before": {"m1-a": {"generation": "1", "guests": ["web1"], "disks": ["web1-root"]}},
            "after": {"m1-b": {"generation": "2", "guests": ["web1"], "disks": ["web1-root"]}},
        }

    def test_cut_run(self):
        made = plan(observe_both(dom0(guest("web1")), dom0(guest("app1", disks=[]))))
        shown = self.preview(made)
        assert shown["before"]["m1-b"]["guests"] == ["app1"]
        assert shown["after"] == {"m1-b": {"generation": "2", "guests": ["app1", "web1"], "disks": ["web1-root"]}}

    def test_host_vm_that_is_kept(self):
        guests = dom0(guest("web1", devices=PCI), guest("web2", disks=[]))
        made = plan(observe(guest_dom0s={"a": guests}), unmovable_policy="leave_and_skip")
        assert self.preview(made)["after"] == {
            "m1-a": {"generation": "1", "guests": ["web1"], "disks": ["web1-root"]},
            "m1-b": {"generation": "2", "guests": ["web2"], "disks": []},
        }


def test_the_record_says_how_each_guest_moves():
    made = plan(observe_guest(), guest_strategies={"web1": "cold"})
    run = FILTERS["rejuvenation_record"]({}, made, None, NOW, 5)["run"]
    assert run["strategies"] == {"web1": "cold"}
    assert [item["name"] for item in run["cold"]] == ["web1"]


def test_a_guest_that_runs_nowhere_is_not_forgotten_when_the_run_is_undone():
    """The next host VM could not be started, say: this guest is still to be started, and only the record tells so."""
    made = plan(observe_guest(), guest_strategies={"web1": "cold"})
    begun = FILTERS["rejuvenation_record"]({}, made, None, NOW, 5)
    for location, kept in (("nowhere", True), ("source", False)):
        failure = {"undone": True, "guests": [{"name": "web1", "location": location, "state": None}]}
        report = FILTERS["rejuvenation_report"](made, [{"phase": "start", "at": NOW}], [], failure, NOW)
        run = FILTERS["rejuvenation_record"](begun, made, report, NOW, 5)["run"]
        assert (run is not None) == kept
