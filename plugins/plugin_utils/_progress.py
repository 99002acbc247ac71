# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""How far a rejuvenation of many machines is, from the facts that role rejuvenate sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ansible_collections.vmbeam.xen.plugins.plugin_utils._plan import kept_by_guests
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import duration

#: The facts of role rejuvenate that are looked at, in the order in which they can change in one task.
PLAN, PHASES, RESULTS, REPORT = "rejuvenate_plan", "rejuvenate_phases", "rejuvenate_results", "rejuvenate_report"

_BAD = ("failed", "refused")


class Line(NamedTuple):
    """Something to tell of a machine; good is None if it is neither good nor bad news."""

    text: str
    good: bool | None = None


@dataclass
class _Machine:
    plan: Mapping[str, Any] | None = None
    told_plan: str = ""
    phases: int = 0
    told_results: list[Mapping[str, Any]] = field(default_factory=list)
    report: Mapping[str, Any] | None = None

    @property
    def outcome(self) -> str:
        if self.report:
            return str(self.report["outcome"])
        if self.plan is None:
            return "failed"
        if self.plan["problems"]:
            return "refused"
        return "skipped" if self.plan["action"] == "skip" else "planned"


class Progress:
    """Turns facts into lines as they come, and all of them into a summary."""

    def __init__(self) -> None:
        self._machines: dict[str, _Machine] = {}

    def see(self, machine: str, facts: Mapping[str, Any]) -> list[Line]:
        """Return what is new in facts that a task has set for a machine."""
        if not any(name in facts for name in (PLAN, PHASES, RESULTS, REPORT)):
            return []
        state = self._machines.setdefault(machine, _Machine())
        lines: list[Line] = []
        if PLAN in facts:
            lines += self._plan(state, facts[PLAN])
        if PHASES in facts:
            lines += self._phases(state, facts[PHASES])
        if RESULTS in facts:
            lines += self._results(state, facts[RESULTS])
        if REPORT in facts:
            lines += self._report(state, facts[REPORT])
        return lines

    @staticmethod
    def _plan(state: _Machine, plan: Mapping[str, Any]) -> Iterable[Line]:
        state.plan = plan
        if plan["problems"]:
            text = "refused: " + "; ".join(problem["message"] for problem in plan["problems"])
        elif plan["action"] == "skip":
            text = f"{'skipped' if kept_by_guests(plan) else 'nothing to do'}: {plan['reason']}"
        else:
            ends = f"{plan['source']['name']} -> {plan['destination']['name']}"
            text = f"{plan['action']} {ends}, {len(plan['guests'])} guest(s): {plan['reason']}"
        # It is made again when the guests were probed.
        if text != state.told_plan:
            state.told_plan = text
            yield Line(text, False if plan["problems"] else None)

    @staticmethod
    def _phases(state: _Machine, phases: Sequence[Mapping[str, Any]]) -> Iterable[Line]:
        if len(phases) < state.phases:
            # Another account has begun.
            state.phases = 0
            state.told_results = []
        for number in range(state.phases, len(phases)):
            text = f"phase {phases[number]['phase']}"
            if number:
                before = phases[number - 1]
                text += f" ({before['phase']}: {float(phases[number]['at']) - float(before['at']):.1f} s)"
            yield Line(text)
        state.phases = len(phases)

    @staticmethod
    def _results(state: _Machine, results: Sequence[Mapping[str, Any]]) -> Iterable[Line]:
        total = len(state.plan["guests"]) if state.plan else len(results)
        for number, result in enumerate(results, 1):
            # Not by its place: the way back has an account of its own, which is put behind that of the way there.
            if result in state.told_results:
                continue
            state.told_results.append(result)
            count = f"({number} of {total})"
            if result["result"] == "failed":
                yield Line(f"guest {result['text']} {count}", False)
                continue
            text = f"guest {result['guest']} {result['result']}"
            if result.get("seconds") is not None:
                text += f" by {result['strategy']} in {float(result['seconds']):.1f} s"
            if result.get("downtime_seconds") is not None:
                text += f", downtime {float(result['downtime_seconds']):.2f} s"
            yield Line(f"{text} {count}", True)

    @staticmethod
    def _report(state: _Machine, report: Mapping[str, Any]) -> Iterable[Line]:
        state.report = report
        text = f"{report['outcome']} in {duration(report['seconds'])}, {report['guests_moved']} guest(s) moved"
        if report["failure"]:
            yield Line(f"{text}: {report['failure']['summary']}", False)
        else:
            yield Line(text, True)

    def summary(self, failed: Iterable[str], seconds: float) -> Line | None:
        """Return one line for all machines, None if role rejuvenate was not at work.

        :param failed: the hosts that failed or could not be reached, as Ansible counts them
        :param seconds: how long it took in all
        """
        if not self._machines:
            return None
        outcomes = {name: machine.outcome for name, machine in self._machines.items()}
        outcomes.update({name: "failed" for name in failed if outcomes.get(name) not in _BAD})
        counts = []
        for outcome in sorted({*outcomes.values()}):
            names = sorted(name for name in outcomes if outcomes[name] == outcome)
            counts.append(f"{len(names)} {outcome}" + (f" ({', '.join(names)})" if outcome in _BAD else ""))
        reports = [machine.report for machine in self._machines.values() if machine.report]
        text = f"{len(outcomes)} machine(s): {', '.join(counts)}"
        text += f"; {sum(report['guests_moved'] for report in reports)} guest(s) moved"
        downtimes = [
            (float(report["longest_downtime_seconds"]), report["machine"])
            for report in reports
            if report["longest_downtime_seconds"] is not None
        ]
        if downtimes:
            longest, machine = max(downtimes)
            text += f", longest downtime {longest:.2f} s (on {machine})"
        return Line(f"{text}; {duration(seconds)} in all", not {*outcomes.values()} & {*_BAD})
