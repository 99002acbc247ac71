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

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._observation import (
    SLOTS,
    copies_by_guest,
    public_view,
    slot_age,
    slot_view,
)
from ansible_collections.vmbeam.xen.plugins.plugin_utils._preflight import new_problem, plan_problems
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import duration, or_unknown, text_table


def make_plan(observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a run would do on the machine, and all that keeps it from doing so.

    `observed` holds machine, now, hypervisor, host_vms, domains, image, free_disk_mb, guest_dom0s and state;
    `settings` holds the role's options. The plan's `action` is one of:

    - skip: the active host VM is fresh, nothing to do
    - rejuvenate: start the other slot's host VM and move every guest to it
    - resume: both host VMs run because an earlier run was cut; finish it
    - impossible: it is not known which host VM to move from or to; `problems` says why

    A plan whose `problems` is not empty must not be carried out.
    """
    slots = {slot: slot_view(slot, observed, settings) for slot in SLOTS}
    existing = [slot for slot in SLOTS if slots[slot]["exists"]]
    plan: dict[str, Any] = {
        "machine": observed["machine"],
        "action": "impossible",
        "reason": "",
        "source": None,
        "destination": None,
        "guests": [],
        "idle_disks": [],
        "steps": [],
        "unrecorded_run": False,
        "problems": [],
    }

    direction = _direction(existing, slots, settings)
    if isinstance(direction, dict):
        plan["problems"].append(direction)
        plan["reason"] = direction["message"]
        return plan
    source, destination = slots[direction[0]], slots[direction[1]]
    plan["source"] = public_view(source, observed)
    plan["destination"] = public_view(destination, observed)

    if len(existing) == 1:
        fresh, reason = freshness(source, observed, settings)
        run = (observed.get("state") or {}).get("run") or {}
        plan["unrecorded_run"] = fresh and run.get("destination") == source["name"]
        plan["reason"] = reason
        if fresh and not settings.get("force"):
            plan["action"] = "skip"
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

    plan["guests"] = _guest_steps(source, destination, settings)
    plan["idle_disks"] = _idle_disks(source, plan["guests"])
    plan["problems"] += plan_problems(plan, source, destination, observed, settings)
    plan["steps"] = _steps(plan)
    return plan


def freshness(slot: dict[str, Any], observed: dict[str, Any], settings: dict[str, Any]) -> tuple[bool, str]:
    """Return whether the slot's host VM needs no rejuvenation, and the reason in words."""
    label = f"{slot['name']} (generation {or_unknown(slot['generation'])})"
    age = slot_age(slot, observed)
    if age is None:
        return False, f"{label} has no record of when it was created"
    limit = float(settings.get("max_age", 0))
    if age >= limit:
        return False, f"{label} is {duration(age)} old, at or over the limit of {duration(limit)}"
    current = observed["image"].get("sha256")
    if current and slot["image_sha256"] != current:
        return False, f"{label} was made from another image than the current golden image"
    if settings.get("due_reason"):
        return False, f"{label} is due because of aging: {settings['due_reason']}"
    return True, f"{label} is fresh: {duration(age)} old, limit {duration(limit)}, current golden image"


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
    if plan["steps"]:
        lines += ["", *(f"  {number}. {step}" for number, step in enumerate(plan["steps"], 1))]
    if plan["problems"]:
        lines += ["", f"Refused, {len(plan['problems'])} problem(s):"]
        lines += [
            f"  {number}. {problem['message']}. Fix: {problem['fix']}"
            for number, problem in enumerate(plan["problems"], 1)
        ]
    return lines


def _direction(
    existing: list[str], slots: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> tuple[str, str] | dict[str, Any]:
    """Return the source's and the destination's slot, or the problem that keeps them from being known."""
    wanted = settings.get("destination_slot")
    if not existing:
        names = " nor ".join(slots[slot]["name"] for slot in SLOTS)
        return new_problem(
            "host VM", f"no host VM runs (neither {names})", "start the first one: playbooks/host_vm.yml"
        )
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
    }


def _guest_steps(source: dict[str, Any], destination: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every guest of both host VMs with its place and what is left to do with it.

    guest_migrate judges copies that a cut migration left, so they are steps like any other.
    """
    paths = {disk["id"]: disk.get("path") for disk in destination["disks"] + source["disks"]}
    strategies = settings.get("guest_strategies") or {}
    steps = []
    for name, copies in copies_by_guest(source, destination).items():
        guest = _guest_view(copies.best)
        for disk in guest["disks"]:
            disk["path"] = paths.get(disk.get("id"))
        guest["name"] = name
        guest["location"] = copies.location
        guest["settled"] = copies.settled
        guest["step"] = "finish" if copies.settled and copies.location == "destination" else "move"
        guest["strategy"] = strategies.get(name, settings.get("strategy", "precopy"))
        steps.append(guest)
    return steps


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
        if guest["step"] == "finish":
            steps.append(f"finish {name}: it is in {destination}; check it, detach its disks from {source}")
        elif guest["settled"]:
            steps.append(f"move {name} from {source} to {destination} ({guest['strategy']}), {disks} disk(s) with it")
        else:
            steps.append(f"repair what a cut migration left of {name}, and end with it in {destination}")
    steps += [f"hand over disk {disk['id']}, which no running guest uses" for disk in plan["idle_disks"]]
    steps.append(f"verify that no guest is left, then destroy {source}")
    return steps
