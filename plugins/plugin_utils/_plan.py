# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Decide how one machine is rejuvenated, from what was observed on it.

Pure functions over plain dictionaries: nothing here runs a command, so every decision can be unit tested.
Memory is in MiB, times are in seconds, time stamps are seconds since the epoch or ISO 8601 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._guest import name_in
from ansible_collections.vmbeam.xen.plugins.plugin_utils._affinity import groups_of, move_batches
from ansible_collections.vmbeam.xen.plugins.plugin_utils._estimate import estimate
from ansible_collections.vmbeam.xen.plugins.plugin_utils._observation import (
    SLOTS,
    copies_by_guest,
    public_view,
    slot_age,
    slot_view,
)
from ansible_collections.vmbeam.xen.plugins.plugin_utils._preflight import (
    destination_problems,
    guest_problems,
    new_problem,
    plan_problems,
    silence_problems,
)
from ansible_collections.vmbeam.xen.plugins.plugin_utils._restart import missing, none_runs
from ansible_collections.vmbeam.xen.plugins.plugin_utils._strategy import choose, settled_strategy
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import duration, listed, or_unknown, text_table

#: Strategies that copy memory, and so take the way that `transport` names.
_BY_TRANSPORT = ("precopy", "suspend")
#: A machine names no more guests than this that are not on it; beyond, the variables are those of many machines.
_MAX_UNKNOWN = 20


def make_plan(observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a run would do on the machine, and all that keeps it from doing so.

    `observed` holds machine, now, hypervisor, host_vms, domains, image, free_disk_mb, guest_dom0s and state;
    `settings` holds the role's options. The plan's `action` is one of:

    - skip: the active host VM is fresh, or of this run, nothing to do (a problem if it does not answer); or a guest
      that cannot move has the policy skip_host; or only guests that the policy leave_and_skip keeps there are left to
      move
    - rejuvenate: start the other slot's host VM and move every guest to it
    - resume: both host VMs run because an earlier run was cut; finish it
    - impossible: it is not known which host VM to move from or to; `problems` says why

    A plan whose `problems` is not empty must not be carried out. `unknown_guests` are those that the options name
    but the machine does not have.
    """
    plan = _decide(observed, settings)
    return dict(plan, unknown_guests=_unknown_guests(plan, observed, settings))


def _decide(observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    slots = {slot: slot_view(slot, observed, settings) for slot in SLOTS}
    existing = [slot for slot in SLOTS if slots[slot]["exists"]]
    plan: dict[str, Any] = {
        "machine": observed["machine"],
        "action": "impossible",
        "reason": "",
        "source": None,
        "destination": None,
        "guests": [],
        "batches": [],
        "idle_disks": [],
        "steps": [],
        "estimate": None,
        "zero_copy_transport": _transport(settings),
        "unrecorded_run": False,
        "problems": [],
    }

    direction = _direction(existing, slots, settings) if existing else none_runs(observed, settings)
    if isinstance(direction, dict):
        plan["problems"].append(direction)
        plan["reason"] = direction["message"]
        return plan
    source, destination = slots[direction[0]], slots[direction[1]]
    plan["source"] = public_view(source, observed)
    plan["destination"] = public_view(destination, observed)

    if len(existing) == 1:
        plan["problems"] += missing(observed, settings)
        fresh, reason = freshness(source, observed, settings)
        run = (observed.get("state") or {}).get("run") or {}
        plan["unrecorded_run"] = fresh and run.get("destination") == source["name"]
        plan["reason"] = reason
        if fresh and (settings.get("done_in_run") or not settings.get("force")):
            plan["action"] = "skip"
            # Young as it is, one that does not answer is not well.
            plan["problems"] += silence_problems(plan, source, destination)
            plan["guests"] = [dict(_guest_view(guest), step="stay") for guest in source["guests"]]
            return plan
        if fresh:
            plan["reason"] += "; forced"
        plan["action"] = "rejuvenate"
    else:
        plan["action"] = "resume"
        plan["reason"] = (
            f"{source['name']} and {destination['name']} both run: an earlier run was cut; "
            f"{destination['name']} has the newer generation and is the destination"
        )

    recreate = _must_recreate(source, destination, observed)
    plan["destination"].update(start=not destination["exists"] or recreate, recreate=recreate)
    if plan["destination"]["start"]:
        # Both slots share one sequence of generations: the newer host VM is the one with the higher number.
        plan["destination"]["generation"] = max(slot["generation"] or 0 for slot in slots.values()) + 1
    if recreate:
        destination = dict(destination, reachable=True, guests=[], disks=[])

    _place_guests(plan, source, destination, observed, settings)
    plan["problems"] += plan_problems(plan, source, destination, observed, settings)
    plan["problems"] += _channel_problems(plan, source, destination, settings)
    why_skip = _reason_to_skip(plan, source)
    # What is in a host VM that does not answer is not known.
    if why_skip and not silence_problems(plan, source, destination):
        run = (observed.get("state") or {}).get("run") or {}
        unrecorded = plan["action"] == "resume" and run.get("destination") == destination["name"]
        return dict(plan, action="skip", reason=why_skip, batches=[], problems=[], unrecorded_run=unrecorded)
    plan["problems"] += _late_skips(plan)
    plan["estimate"] = estimate(plan, (observed.get("state") or {}).get("history") or [])
    plan["steps"] = _steps(plan)
    return plan


def confirm_plan(plan: dict[str, Any], observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the plan again, by what is observed once the destination runs, before the first guest moves.

    Starting a host VM takes minutes: guests may have come, gone or stopped since, and only now is it known what
    the destination offers. Source and destination stay as they are. `changes` says in words what differs, and
    `problems` what keeps the guests from moving now.
    """
    source = slot_view(plan["source"]["slot"], observed, settings)
    destination = slot_view(plan["destination"]["slot"], observed, settings)
    confirmed = dict(plan, changes=[])
    _place_guests(confirmed, source, destination, observed, settings)
    problems = silence_problems(confirmed, source, destination)
    if not problems:
        problems = destination_problems(confirmed, source["hypervisor"], destination["hypervisor"])
    problems += _channel_problems(confirmed, source, destination, settings)
    confirmed["problems"] = problems + guest_problems(confirmed, observed) + _late_skips(confirmed)
    differ = _channels_differ(source, destination)
    if settings.get("zero_copy_transport") == "auto" and differ:
        confirmed["zero_copy_transport"] = "ssh"
        if any(guest["strategy"] == "zero_copy" for guest in confirmed["guests"]):
            confirmed["changes"].append(f"what is not memory goes by ssh: {differ}")
    before = {guest["name"]: guest for guest in plan["guests"]}
    after = {guest["name"]: guest for guest in confirmed["guests"]}
    confirmed["changes"] += [f"guest {name} is gone" for name in before.keys() - after.keys()]
    for name, guest in after.items():
        if name not in before:
            confirmed["changes"].append(f"guest {name} is new: {guest['step']} ({guest['strategy']})")
        elif any(guest[key] != before[name][key] for key in ("step", "strategy")):
            confirmed["changes"].append(
                f"guest {name}: {guest['step']} ({guest['strategy']}), {guest['strategy_reason']}"
            )
    return confirmed


def _transport(settings: Mapping[str, Any]) -> str:
    """Return how what is not memory is to go by zero-copy, as long as the destination has not told of its channel."""
    wanted = settings.get("zero_copy_transport") or "auto"
    return "channel" if wanted == "auto" else wanted


def _channels_differ(source: Mapping[str, Any], destination: Mapping[str, Any]) -> str:
    """Return why no channel can come up between two host VMs, empty if one may, or if one of them does not tell."""
    versions = [view["channel_version"] for view in (source, destination)]
    if None in versions or len(set(versions)) == 1:
        return ""
    return " and ".join(
        f"the channel of {view['name']} is of version {view['channel_version']}" for view in (source, destination)
    )


def _channel_problems(
    plan: Mapping[str, Any], source: Mapping[str, Any], destination: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return what keeps guests from being copied by a channel, if they are to be."""
    copied = [
        guest["name"] for guest in plan["guests"] if guest["step"] == "move" and guest["strategy"] in _BY_TRANSPORT
    ]
    if settings.get("transport") != "channel" or not copied:
        return []
    views = (source, destination)
    lacking = " and ".join(f"{view['name']} has no zero-copy migration" for view in views if view["zero_copy"] is False)
    why = lacking or _channels_differ(source, destination)
    if not why:
        return []
    return [
        new_problem(
            "transport",
            f"{', '.join(copied)} cannot be copied by memory that two host VMs share: {why}",
            "set vmbeam_transport to ssh",
        )
    ]


def kept_by_guests(plan: Mapping[str, Any]) -> bool:
    """Return whether the machine is left alone because of guests that cannot move, and not because it is fresh."""
    staying = any(guest.get("step") in ("skip_host", "leave") for guest in plan.get("guests") or [])
    return staying and plan["action"] == "skip"


def batches(plan: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the guests that are to move, batch after batch, those of one batch at the same time."""
    by_name = {guest["name"]: guest for guest in plan["guests"]}
    return [[by_name[name] for name in batch] for batch in plan["batches"]]


def freshness(slot: dict[str, Any], observed: dict[str, Any], settings: dict[str, Any]) -> tuple[bool, str]:
    """Return whether the slot's host VM needs no rejuvenation, and the reason in words."""
    label = f"{slot['name']} (generation {or_unknown(slot['generation'])})"
    if settings.get("done_in_run"):
        return True, f"{label} is what this run has made of the machine already"
    age = slot_age(slot, observed)
    if age is None:
        return False, f"{label} has no record of when it was created"
    limit = float(settings.get("max_age", 0))
    if age >= limit:
        return False, f"{label} is {duration(age)} old, at or over the limit of {duration(limit)}"
    current = observed["image"].get("sha256")
    if current and slot["image_sha256"] != current:
        return False, f"{label} was made from another image than the current golden image"
    fresh = f"{label} is fresh: {duration(age)} old, limit {duration(limit)}, current golden image"
    aged, youngest = settings.get("due_reason"), float(settings.get("aging_min_age", 0))
    if aged and age < youngest:
        return True, f"{fresh}; not due because of aging before it is {duration(youngest)} old: {aged}"
    if aged:
        return False, f"{label} is due because of aging: {aged}"
    return True, fresh


def _unknown_guests(plan: dict[str, Any], observed: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the guests that options name but the machine does not have, each with the `variables` that name it.

    A gate or a probe of such a guest is never asked, which only a person can tell from a slip of the pen: the variables
    may be those of a group of machines. None if they name too many for that, or if a host VM does not tell its guests.
    """
    views = [slot_view(slot, observed, settings) for slot in SLOTS]
    if not plan["source"] or any(view["exists"] and not view["reachable"] for view in views):
        return []
    # One that does not run has its configuration there.
    known = {guest["name"] for guest in plan["guests"]}
    known |= {name_in(file["content"]) for view in views for file in view["configurations"]}
    gates = settings.get("gates") or []
    naming = {
        "vmbeam_guest_strategies": settings.get("guest_strategies") or {},
        "vmbeam_guest_unmovable_policies": settings.get("guest_unmovable_policies") or {},
        "vmbeam_pinned_guests": settings.get("pinned_guests") or [],
        "vmbeam_guest_probes": settings.get("guest_probes") or {},
        "vmbeam_gates": [gate["guest"] for gate in gates if gate.get("guest")],
        "vmbeam_anti_affinity": [
            name for group in settings.get("anti_affinity") or [] for name in listed(group.get("guests"))
        ],
        "vmbeam_guest_labels": settings.get("guest_labels") or {},
    }
    unknown = {str(name) for names in naming.values() for name in names} - known
    if len(unknown) > _MAX_UNKNOWN:
        return []
    return [
        {"guest": name, "variables": [variable for variable, names in naming.items() if name in names]}
        for name in sorted(unknown)
    ]


def describe(plan: dict[str, Any]) -> list[str]:
    """Return the plan as lines for a person."""
    lines = [f"{plan['machine']}: {plan['action']}: {plan['reason']}"]
    if plan["guests"]:
        rows = [
            dict(
                guest,
                guest=guest["name"],
                memory=f"{guest['memory_mb']} MiB",
                disks=", ".join(str(disk["id"]) for disk in guest["disks"]),
            )
            for guest in plan["guests"]
        ]
        columns = ["guest", "type", "memory", "vcpus", "location", "step", "strategy", "disks"]
        lines += ["", *text_table(rows, columns)]
        lines += [
            f"{guest['name']}: {guest['strategy_reason']}"
            for guest in plan["guests"]
            if guest.get("strategy_reason") and not guest["strategy_reason"].startswith("set for ")
        ]
    if plan["unknown_guests"]:
        named = (f"{one['guest']} ({', '.join(one['variables'])})" for one in plan["unknown_guests"])
        lines += ["", f"Named, but not on this machine: {', '.join(named)}"]
    if plan["steps"]:
        lines += ["", *(f"  {number}. {step}" for number, step in enumerate(plan["steps"], 1))]
        lines += ["", _estimate_text(plan["estimate"])]
    if plan["problems"]:
        lines += ["", f"Refused, {len(plan['problems'])} problem(s):"]
        lines += [
            f"  {number}. {problem['message']}. Fix: {problem['fix']}"
            for number, problem in enumerate(plan["problems"], 1)
        ]
    return lines


def _estimate_text(figures: dict[str, Any]) -> str:
    if figures["seconds"] is None:
        return f"Estimated time: unknown, as no earlier run tells it of: {', '.join(figures['unknown'])}"
    downtimes = [guest["downtime_seconds"] for guest in figures["guests"].values()]
    known = [seconds for seconds in downtimes if seconds is not None]
    longest = f", longest downtime {duration(max(known))}" if known else ""
    return f"Estimated time: {duration(figures['seconds'])}{longest} (by {figures['runs']} earlier run(s))"


def _place_guests(
    plan: dict[str, Any],
    source: dict[str, Any],
    destination: dict[str, Any],
    observed: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Enter the guests of both host VMs into the plan: where they are, what is to be done, in which batches."""
    plan["guests"] = _guest_steps(source, destination, observed, settings)
    plan["idle_disks"] = _idle_disks(source, plan["guests"])
    going = [guest for guest in plan["guests"] if guest["step"] in ("move", "finish")]
    plan["batches"] = move_batches(going, int(settings.get("parallel_guests") or 1))


def _reason_to_skip(plan: dict[str, Any], source: dict[str, Any]) -> str | None:
    """Return why the machine is left alone because of guests that cannot move, None if it is not."""
    skipping = [guest for guest in plan["guests"] if guest["step"] == "skip_host"]
    if skipping and plan["action"] == "rejuvenate":
        return "the machine is left alone: " + "; ".join(guest["strategy_reason"] for guest in skipping)
    left = [guest for guest in plan["guests"] if guest["step"] == "leave"]
    attached = {disk["id"] for disk in source["disks"]}
    settled = all(
        guest["step"] == "leave"
        or (guest["step"] == "finish" and attached.isdisjoint(disk.get("id") for disk in guest["disks"]))
        for guest in plan["guests"]
    )
    if plan["action"] == "resume" and left and settled and not plan["idle_disks"]:
        return f"all that can move is in {plan['destination']['name']}; {plan['source']['name']} is kept: " + "; ".join(
            guest["strategy_reason"] for guest in left
        )
    if plan["action"] == "rejuvenate" and left and len(left) == len(plan["guests"]):
        return "no guest can move: " + "; ".join(guest["strategy_reason"] for guest in left)
    return None


def _late_skips(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the problem of a machine that is to be left alone when its rejuvenation has begun already."""
    return [
        new_problem(
            "skip_host",
            f"{guest['strategy_reason']}, for which the machine was to be left alone, but its rejuvenation has begun",
            "make the guest movable, or set another policy for it (vmbeam_guest_unmovable_policies)",
        )
        for guest in plan["guests"]
        if guest["step"] == "skip_host"
    ]


def _direction(
    existing: list[str], slots: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> tuple[str, str] | dict[str, Any]:
    """Return the source's and the destination's slot, or the problem that keeps them from being known."""
    wanted = settings.get("destination_slot")
    if len(existing) == 1:
        source = existing[0]
        destination = next(slot for slot in SLOTS if slot != source)
        if wanted and wanted != destination:
            return new_problem(
                "direction",
                f"vmbeam_destination_slot is {wanted}, the slot of {slots[source]['name']}, which is to be replaced",
                "leave vmbeam_destination_slot unset",
            )
        return source, destination
    if wanted:
        return next(slot for slot in SLOTS if slot != wanted), wanted
    generations = {slot: slots[slot]["generation"] for slot in SLOTS}
    if None in generations.values() or generations["a"] == generations["b"]:
        seen = ", ".join(f"{slots[slot]['name']}: {or_unknown(generations[slot])}" for slot in SLOTS)
        return new_problem(
            "direction",
            f"both slots are in use, and the generations do not tell which host VM is newer ({seen})",
            "set vmbeam_destination_slot to the slot that the guests shall end in",
        )
    newer = max(SLOTS, key=lambda slot: generations[slot])
    return next(slot for slot in SLOTS if slot != newer), newer


def _must_recreate(source: dict[str, Any], destination: dict[str, Any], observed: dict[str, Any]) -> bool:
    """Return whether a destination that does not answer is to be replaced by a new one.

    That is safe only if no guest can be in it: the run that started it left its list of guests,
    and the source still has every one of them.
    """
    if not destination["exists"] or destination["reachable"] or not source["reachable"]:
        return False
    run = (observed.get("state") or {}).get("run") or {}
    if run.get("destination") != destination["name"] or run.get("source") != source["name"]:
        return False
    return set(run.get("guests") or []) <= {guest["name"] for guest in source["guests"]}


def _guest_view(guest: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": guest["name"],
        "type": guest.get("type"),
        "state": guest.get("state"),
        "uuid": guest.get("uuid"),
        "memory_mb": guest.get("memory_mb") or 0,
        "vcpus": guest.get("vcpus") or 1,
        # An empty CD drive is a disk without a target: nothing to move.
        "disks": [dict(disk) for disk in guest.get("disks") or [] if disk.get("target")],
        "devices": guest.get("devices") or [],
        "cpu_affinity": guest.get("cpu_affinity") or [],
        "migratable": guest.get("migratable"),
    }


def _guest_steps(
    source: dict[str, Any], destination: dict[str, Any], observed: dict[str, Any], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return every guest of both host VMs with its place and what is left to do with it.

    guest_migrate judges copies that a cut migration left, so they are steps like any other. A guest that a cut run
    had shut down to start it in the destination is in neither host VM: the run's record has it.
    """
    paths = {disk["id"]: disk.get("path") for disk in destination["disks"] + source["disks"]}
    run = (observed.get("state") or {}).get("run") or {}
    configs = {name_in(file["content"]): file["path"] for file in source["configurations"]}
    steps = []
    found = copies_by_guest(source, destination)
    for name, copies in found.items():
        guest = _guest_view(copies.best)
        for disk in guest["disks"]:
            disk["path"] = paths.get(disk.get("id"))
        guest["name"] = name
        guest["location"] = copies.location
        guest["settled"] = copies.settled
        guest["step"] = "finish" if copies.settled and copies.location == "destination" else "move"
        steps.append(guest)
    if run.get("source") == source["name"] and run.get("destination") == destination["name"]:
        steps += [
            dict(guest, location="nowhere", state=None, settled=True, step="move")
            for guest in run.get("cold") or []
            if guest["name"] not in found and guest["name"] not in (settings.get("confirm_gone") or [])
        ]
    for guest in steps:
        guest["config"] = configs.get(guest["name"]) or guest.get("config")
        guest["cut_strategy"] = (run.get("strategies") or {}).get(guest["name"])
        guest["anti_affinity"] = groups_of(guest["name"], settings)
        guest.update(strategy_reason="", problems=[])
        if guest["step"] == "finish":
            guest["strategy"] = settled_strategy(guest, settings)
            continue
        if guest["location"] == "nowhere":
            guest.update(strategy="cold", strategy_reason="shut down by the run that was cut")
            continue
        choice = choose(guest, source, destination, settings)
        guest.update(
            step=choice.step, strategy=choice.strategy, strategy_reason=choice.reason, problems=choice.problems
        )
    return sorted(steps, key=lambda guest: str(guest["name"]))


def _idle_disks(source: dict[str, Any], guests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the source's disks that no running guest uses; they follow, so that it can be started later."""
    used = {disk.get("id") for guest in guests for disk in guest["disks"]}
    return [{"id": disk["id"], "path": disk.get("path")} for disk in source["disks"] if disk["id"] not in used]


def _steps(plan: dict[str, Any]) -> list[str]:
    source, destination = plan["source"]["name"], plan["destination"]["name"]
    generation = plan["destination"]["generation"]
    steps = []
    if plan["destination"]["recreate"]:
        steps.append(f"destroy {destination}: it does not answer and holds no guest")
    if plan["destination"]["start"]:
        steps.append(f"start {destination} (generation {generation}) and wait until it is healthy")
    for guest in plan["guests"]:
        name, disks = guest["name"], len(guest["disks"])
        if guest["step"] == "leave":
            steps.append(f"leave {name} in {source}")
        elif guest["step"] == "finish":
            steps.append(f"finish {name}: it is in {destination}; check it, detach its disks from {source}")
        elif guest["location"] == "nowhere":
            steps.append(f"start {name} in {destination}, {disks} disk(s) with it: a run that was cut had shut it down")
        elif guest["settled"]:
            steps.append(f"move {name} from {source} to {destination} ({guest['strategy']}), {disks} disk(s) with it")
        else:
            steps.append(f"repair what a cut migration left of {name}, and end with it in {destination}")
    steps += [f"hand over disk {disk['id']}, which no running guest uses" for disk in plan["idle_disks"]]
    left = [guest["name"] for guest in plan["guests"] if guest["step"] == "leave"]
    if left:
        steps.append(f"keep {source} for {', '.join(left)}")
    else:
        steps.append(f"verify that no guest is left, then destroy {source}")
    return steps
