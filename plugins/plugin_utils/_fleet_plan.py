# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What a run would do on all its machines: one document, whose form is roles/rolling/files/plan.schema.json.

Nothing is decided here that a run decides: batches, budget, locks, windows and each machine's plan come from what the
run uses. Memory is in MiB, times are in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import _rolling, _windows
from ansible_collections.vmbeam.xen.plugins.plugin_utils._affinity import turns
from ansible_collections.vmbeam.xen.plugins.plugin_utils._estimate import COPYING, total
from ansible_collections.vmbeam.xen.plugins.plugin_utils._moments import iso
from ansible_collections.vmbeam.xen.plugins.plugin_utils._plan import kept_by_guests
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import duration, listed, text_table

SCHEMA = 1
#: What becomes of a machine.
OUTCOMES = ("rejuvenate", "resume", "fresh", "left_out", "refused", "failed", "not_reached")
#: What may make a plan one that a pipeline does not accept.
OBJECTIONS = ("refused", "stop", "left_out", "unknown_time", "unknown_guest")
_ACTIONS = ("rejuvenate", "resume")
_MOVING = "move"
# What the parts of a run note of a machine.
_NOTED = ("rolling_outcome", "rejuvenate_plan", "rolling_calendar", "rolling_leased", "rolling_taken")
# How many machines an objection names.
_NAMED = 10


def fleet_plan(
    run: Mapping[str, Any], hostvars: Mapping[str, Mapping[str, Any]], about: dict[str, Any]
) -> dict[str, Any]:
    """Return the plan of a run whose machines have been selected, and each planned.

    `run` are the variables of the host on which it was selected (rolling_batches, rolling_budget, rolling_left_out).
    `hostvars` are Ansible's: of each machine rolling_outcome, rejuvenate_plan, rolling_calendar (when it may be begun)
    and what reserving it told. `about` has run_id, lock_owner, controller, order, forks (how many machines Ansible
    works on at once) and now (seconds since the epoch).
    """
    batches = [_rolling.machines_in(batch) for batch in run["rolling_batches"]]
    chosen = [name for batch in batches for name in batch]
    # Ansible puts a machine's variables together anew each time that they are asked for.
    noted = {name: _noted(hostvars[name]) for name in chosen}
    forks, allowed = int(about["forks"]), int(run["rolling_budget"])
    machines, parts = [], []
    failed: list[str] = []
    stops, stops_after = "", None
    elapsed: float | None = 0.0
    for number, batch in enumerate(batches, 1):
        begins = None if stops else elapsed
        now = float(about["now"]) + (elapsed or 0.0)
        members = []
        for name in batch:
            plan = noted[name].get("rejuvenate_plan") or {}
            judged = ("not_reached", None, stops) if stops else _foreseen(name, noted, plan, now)
            members.append(_machine(name, number, plan, judged))
        acting = [one["machine"] for one in members if one["outcome"] in _ACTIONS]
        # The role that is rolled may be another one, which makes no plan.
        plans = [noted[name]["rejuvenate_plan"] for name in acting if noted[name].get("rejuvenate_plan")]
        turn = turns(plans)
        for one in members:
            one["turn"] = turn.get(one["machine"], {}).get("turn")
        known = not stops and len(plans) == len(acting)
        seconds = _batch_seconds(plans, {name: own["turn"] for name, own in turn.items()}, forks) if known else None
        parts.append(
            {
                "number": number,
                "machines": batch,
                **_moving(members),
                "begins_after_seconds": begins,
                "seconds": seconds,
            }
        )
        machines += members
        if not stops:
            elapsed = total([elapsed, seconds])
            failed += [one["machine"] for one in members if one["outcome"] in ("refused", "failed")]
            stops = _rolling.stop_reason(failed, len(chosen), allowed)
            stops_after = number if stops else None
    machines += [_machine(name, None, {}, ("left_out", "labels", why)) for name, why in run["rolling_left_out"].items()]
    obstacles = _rolling.held(chosen, noted, about["lock_owner"])
    counts = Counter(machine["outcome"] for machine in machines)
    return {
        "schema": SCHEMA,
        "run": {"id": about["run_id"], "controller": about["controller"], "made": iso(about["now"])},
        "begins": not obstacles,
        "obstacles": obstacles,
        "order": about["order"],
        "limits": {"forks": forks, "largest_batch": max(map(len, batches), default=0)},
        "failure_budget": {
            "allowed": allowed,
            "foreseen": failed,
            # A run says so after its last batch as well, where nothing is left to be stopped.
            "stops_after_batch": stops_after if stops_after != len(batches) else None,
            "reason": stops if stops_after != len(batches) else "",
        },
        "totals": {
            "machines": len(machines),
            "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES},
            **_moving(machines),
            "seconds": elapsed,
            "machines_of_unknown_time": [
                one["machine"] for one in machines if one["outcome"] in _ACTIONS and one["seconds"] is None
            ],
        },
        "unknown_guests": _unknown_guests([facts.get("rejuvenate_plan") or {} for facts in noted.values()]),
        "batches": parts,
        "machines": machines,
    }


def plan_text(plan: Mapping[str, Any]) -> list[str]:
    """Return the plan as lines for a person."""
    totals, budget = plan["totals"], plan["failure_budget"]
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in totals["outcomes"].items() if count)
    strategies = "; ".join(
        f"{strategy}: {moved['guests']} guest(s), {moved['memory_mb']} MiB"
        for strategy, moved in totals["strategies"].items()
    )
    lines = [
        f"Plan of {totals['machines']} machine(s) in {len(plan['batches'])} batch(es), order {plan['order']}, up to "
        f"{plan['limits']['forks']} at once, {budget['allowed']} may fail: {outcomes}",
        f"Moves {totals['guests']} guest(s), {totals['memory_mb']} MiB, of which {totals['memory_copied_mb']} MiB "
        f"are copied{f' ({strategies})' if strategies else ''}",
    ]
    unknown = totals["machines_of_unknown_time"]
    if totals["seconds"] is not None:
        lines.append(f"Estimated time: {duration(totals['seconds'])}")
    else:
        lines.append(f"Estimated time: unknown, as no earlier run tells it of {_named(unknown)}")
    lines += [f"Would not begin: {obstacle}" for obstacle in plan["obstacles"]]
    if budget["reason"]:
        lines.append(f"Would stop after batch {budget['stops_after_batch']}: {budget['reason']}")
    lines += [
        f"Named in {', '.join(one['variables'])}, but on none of these machines: guest {one['guest']}"
        for one in plan["unknown_guests"]
    ]
    batches = [
        {
            **batch,
            "batch": batch["number"],
            "memory": _mib(batch["memory_mb"]),
            "begins after": _time(batch["begins_after_seconds"]),
            "time": _time(batch["seconds"]),
            "machines": _named(batch["machines"]),
        }
        for batch in plan["batches"]
    ]
    lines += ["", *text_table(batches, ["batch", "begins after", "time", "guests", "memory", "machines"])]
    rows = [
        {
            **machine,
            "guests": machine["guests_moving"],
            "memory": _mib(machine["memory_mb"]),
            "time": _time(machine["seconds"]) if machine["outcome"] in _ACTIONS else None,
            "strategies": ", ".join(machine["strategies"]),
        }
        for machine in plan["machines"]
    ]
    columns = ["machine", "batch", "outcome", "guests", "memory", "strategies", "time", "reason"]
    return [*lines, "", *text_table(rows, columns)]


def objections(plan: Mapping[str, Any], kinds: Any) -> list[str]:
    """Return, in sentences, what of the plan is of one of the `kinds` (of OBJECTIONS) that are not accepted.

    refused: the run would not begin, or machines would fail; stop: the failure budget would stop it before its last
    batch; left_out: machines that were chosen would be left alone though they are not fresh; unknown_time: it is not
    known how long it takes; unknown_guest: a variable names a guest that no machine has.

    :raises ValueError: a kind is not one of OBJECTIONS
    """
    wanted = listed(kinds, "vmbeam_plan_fail_on")
    strange = [str(kind) for kind in wanted if kind not in OBJECTIONS]
    if strange:
        raise ValueError(f"vmbeam_plan_fail_on: {', '.join(strange)} is not one of {', '.join(OBJECTIONS)}")
    found: dict[str, list[str]] = {kind: [] for kind in OBJECTIONS}
    found["refused"] += [f"The run would not begin. {obstacle}" for obstacle in plan["obstacles"]]
    found["refused"] += [
        f"{machine['machine']} would fail: {machine['reason']}"
        for machine in plan["machines"]
        if machine["outcome"] in ("refused", "failed")
    ]
    budget = plan["failure_budget"]
    if budget["reason"]:
        found["stop"].append(f"The run would stop after batch {budget['stops_after_batch']}: {budget['reason']}")
    found["left_out"] += [
        f"{machine['machine']} would be left out: {machine['reason']}"
        for machine in plan["machines"]
        if machine["outcome"] == "left_out" and machine["cause"] != "labels"
    ]
    unknown = plan["totals"]["machines_of_unknown_time"]
    if unknown:
        found["unknown_time"].append(f"No earlier run tells how long it takes: {_named(unknown)}")
    found["unknown_guest"] += [
        f"{', '.join(one['variables'])} names guest {one['guest']}, which is on none of these machines"
        for one in plan["unknown_guests"]
    ]
    return [sentence for kind in OBJECTIONS if kind in wanted for sentence in found[kind]]


def _noted(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in _NOTED if key in facts}


def _machine(
    name: str, batch: int | None, plan: Mapping[str, Any], judged: tuple[str, str | None, str]
) -> dict[str, Any]:
    """Return the entry of a machine with its plan, {} if nobody has looked at it; `judged` is of _foreseen()."""
    outcome, cause, reason = judged
    acts = outcome in _ACTIONS
    figures = (plan.get("estimate") or {}) if acts else {}
    guests = [_guest(guest, plan, figures) for guest in plan.get("guests") or []]
    moving = [guest for guest in guests if acts and guest["step"] == _MOVING]
    downtimes = [guest["downtime_seconds"] for guest in moving if guest["downtime_seconds"] is not None]
    return {
        "machine": name,
        "batch": batch,
        "turn": None,
        "outcome": outcome,
        "cause": cause,
        "reason": reason,
        "problems": [
            {key: problem[key] for key in ("what", "message", "fix")} for problem in plan.get("problems") or []
        ],
        "source": (plan.get("source") or {}).get("name"),
        "destination": (plan.get("destination") or {}).get("name") if acts else None,
        "guests": guests,
        "guests_moving": len(moving),
        "memory_mb": sum(guest["memory_mb"] for guest in moving),
        "strategies": sorted({str(guest["strategy"]) for guest in moving}),
        "seconds": figures.get("seconds"),
        "longest_downtime_seconds": max(downtimes, default=None),
    }


def _foreseen(
    name: str, noted: Mapping[str, Mapping[str, Any]], plan: Mapping[str, Any], now: float
) -> tuple[str, str | None, str]:
    """Return what becomes of a machine that is begun at `now`, for left_out the cause, and why in words."""
    told = _rolling.outcomes([name], noted)[name]
    if told["result"] == "failed":
        refused = "; ".join(problem["message"] for problem in plan.get("problems") or [])
        return ("refused", None, refused) if refused else ("failed", None, str(told["reason"]))
    kept = kept_by_guests(plan)
    if told["result"] == "skipped" and not kept:
        return "left_out", "window", str(told["reason"])
    reason = str(plan.get("reason") or told["reason"])
    if not plan and told["result"] == "planned":
        return "rejuvenate", None, reason
    if plan.get("action") not in _ACTIONS:
        return ("left_out", "guests", reason) if kept else ("fresh", None, reason)
    calendar = noted[name].get("rolling_calendar") or {}
    closed = calendar and _windows.closed(now=now, **calendar)
    return ("left_out", "window", f"when its turn comes: {closed}") if closed else (str(plan["action"]), None, reason)


def _guest(guest: Mapping[str, Any], plan: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    own = (figures.get("guests") or {}).get(guest["name"]) or {}
    together = [number for number, batch in enumerate(plan.get("batches") or [], 1) if guest["name"] in batch]
    return {
        "guest": guest["name"],
        "step": guest["step"],
        "strategy": guest.get("strategy"),
        "reason": guest.get("strategy_reason") or "",
        "memory_mb": guest["memory_mb"],
        "batch": together[0] if together else None,
        "seconds": own.get("seconds"),
        "downtime_seconds": own.get("downtime_seconds"),
    }


def _unknown_guests(plans: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the guests that variables of some machine name and that no machine has: each with these variables."""
    here = {guest["name"] for plan in plans for guest in plan.get("guests") or []}
    naming: dict[str, set[str]] = {}
    for plan in plans:
        for one in plan.get("unknown_guests") or []:
            naming.setdefault(one["guest"], set()).update(one["variables"])
    return [{"guest": name, "variables": sorted(naming[name])} for name in sorted(naming) if name not in here]


def _moving(machines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many guests move, and how much memory, in all and by strategy."""
    moving = [
        guest
        for machine in machines
        if machine["outcome"] in _ACTIONS
        for guest in machine["guests"]
        if guest["step"] == _MOVING
    ]
    strategies: dict[str, dict[str, int]] = {}
    for guest in moving:
        counted = strategies.setdefault(str(guest["strategy"]), {"guests": 0, "memory_mb": 0})
        counted["guests"] += 1
        counted["memory_mb"] += guest["memory_mb"]
    return {
        "guests": len(moving),
        "memory_mb": sum(counted["memory_mb"] for counted in strategies.values()),
        "memory_copied_mb": sum(strategies[one]["memory_mb"] for one in COPYING if one in strategies),
        "strategies": dict(sorted(strategies.items())),
    }


def _batch_seconds(plans: Sequence[Mapping[str, Any]], turn: Mapping[str, int], forks: int) -> float | None:
    """Return how long a batch takes, None if a part of it is not known.

    The machines of a batch go through each part together, `forks` of them at once, as Ansible's linear strategy has
    them do; after all were looked at, those of one anti-affinity group go one after the other.
    """
    times: dict[tuple[int, str], list[float | None]] = {}
    for plan in plans:
        moves = 0
        for part in plan["estimate"]["parts"]:
            kind = str(part["part"]).split()[0]
            if kind == "move":
                moves += 1
                kind = f"move {moves}"
            when = -1 if kind == "observe" else turn[plan["machine"]]
            times.setdefault((when, kind), []).append(part["seconds"])
    return total([_in_slots(seconds, forks) for seconds in times.values()])


def _in_slots(seconds: Sequence[float | None], slots: int) -> float | None:
    """Return how long works of these lengths take, begun in this order in so many slots."""
    ends = [0.0] * max(1, min(slots, len(seconds)))
    for one in seconds:
        if one is None:
            return None
        first = ends.index(min(ends))
        ends[first] += one
    return max(ends)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _mib(memory: int) -> str:
    return f"{memory} MiB"


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
