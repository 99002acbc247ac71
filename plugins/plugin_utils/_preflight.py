# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What keeps a machine from being rejuvenated: found before anything is touched, with figures and a fix."""

from __future__ import annotations

import re
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import Spec

# A guest in one of these states does not answer the suspend request that every strategy ends with.
UNMOVABLE_STATES = ("paused", "shutdown", "suspended", "crashed", "dying")


def plan_problems(
    plan: dict[str, Any],
    source: dict[str, Any],
    destination: dict[str, Any],
    observed: dict[str, Any],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return the problems of a plan. `source` and `destination` are views of the slots (slot_view)."""
    problems = silence_problems(plan, source, destination)
    if plan["destination"]["start"]:
        problems += _start_problems(plan, source, destination, observed, settings)
    elif source["reachable"] and destination["reachable"]:
        problems += destination_problems(plan, source["hypervisor"], destination["hypervisor"])
    return problems + guest_problems(plan, observed)


def silence_problems(plan: dict[str, Any], source: dict[str, Any], destination: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the guest dom0s that have to answer and do not."""
    problems = []
    if not source["reachable"]:
        problems.append(
            new_problem(
                "guest dom0",
                f"the guest dom0 of {source['name']} does not answer ({source['error'] or 'no answer'}): "
                "its guests cannot be moved",
                f"look at its console (/var/log/xen/vmbeam/{source['name']}.console in host dom0), then run again",
            )
        )
    if destination["exists"] and not destination["reachable"] and not plan["destination"]["recreate"]:
        problems.append(
            new_problem(
                "guest dom0",
                f"the guest dom0 of {destination['name']} does not answer "
                f"({destination['error'] or 'no answer'}), and guests may run in it",
                f"look at its console (/var/log/xen/vmbeam/{destination['name']}.console in host dom0); "
                "if no guest is in it, destroy it and run again",
            )
        )
    return problems


def destination_problems(
    plan: dict[str, Any], source: dict[str, Any], destination: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what keeps the running destination from taking the guests.

    `source` and `destination` are the `hypervisor` dictionaries that vmbeam.xen.guest_info returns.
    This can be known only once the destination runs, and it is asked before the first guest moves.
    """
    problems = []
    moving = [guest for guest in plan["guests"] if guest["step"] == "move"]
    name = plan["destination"]["name"]

    needed = sum(guest_footprint_mb(guest) for guest in moving)
    free = destination.get("free_memory_mb")
    if free is not None and free < needed:
        problems.append(
            _shortage(
                "guest memory",
                needed,
                free,
                "MiB",
                f"{name} has too little free memory for {', '.join(guest['name'] for guest in moving)}",
                "raise vmbeam_host_vm_memory_mb or give the guest dom0 less memory in the golden image",
            )
        )
    live = any(guest["strategy"] != "cold" for guest in moving)
    if live and older(destination, source):
        problems.append(
            new_problem(
                "guest hypervisor version",
                f"{name} runs Xen {destination['version']}, older than {source['version']} of "
                f"{plan['source']['name']}: Xen moves guests to the same or a newer version only",
                "build the golden image with the same or a newer Xen",
            )
        )
    return problems


def guest_footprint_mb(guest: dict[str, Any]) -> int:
    """Return the MiB that a guest takes of its hypervisor: its memory, its p2m (libxl's rule), its video memory."""
    memory, vcpus = int(guest.get("memory_mb") or 0), int(guest.get("vcpus") or 1)
    return memory + vcpus + -(-memory // 128) + (16 if guest.get("type") == "hvm" else 1)


def _start_problems(
    plan: dict[str, Any],
    source: dict[str, Any],
    destination: dict[str, Any],
    observed: dict[str, Any],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return what keeps the destination host VM from being started."""
    problems = []
    name = destination["name"]
    memory = int(settings["host_vm_memory_mb"])
    if name in (observed.get("domains") or []) and not destination["exists"]:
        problems.append(
            new_problem(
                "name",
                f"a domain named {name} runs on the host dom0, and it is not a host VM of vmbeam",
                "rename or destroy that domain, or give the slot another name in vmbeam_slots",
            )
        )

    # The host_vm module refuses by the same figure, but only when it is about to start.
    needed = Spec(
        name=name,
        slot=destination["slot"],
        memory_mb=memory,
        vcpus=int(settings.get("host_vm_vcpus", 1)),
        image="",
    ).needed_memory_mb
    free = int(observed["hypervisor"].get("free_memory_mb") or 0)
    if plan["destination"]["recreate"]:
        free += int(destination["memory_mb"] or 0)
    if free < needed:
        problems.append(
            _shortage(
                "machine memory",
                needed,
                free,
                "MiB",
                f"the host hypervisor has too little free memory for {name}",
                "lower vmbeam_host_vm_memory_mb, or free memory on the machine",
            )
        )

    # The destination must hold what the source holds now: the guests, and its own hypervisor and guest dom0.
    hypervisor = source["hypervisor"]
    if hypervisor.get("total_memory_mb") is not None and hypervisor.get("free_memory_mb") is not None:
        used = int(hypervisor["total_memory_mb"]) - int(hypervisor["free_memory_mb"])
        used -= sum(guest_footprint_mb(guest) for guest in plan["guests"] if guest["step"] == "leave")
        if used > memory:
            problems.append(
                _shortage(
                    "host VM memory",
                    used,
                    memory,
                    "MiB",
                    f"{name} would be too small for what runs in {source['name']}",
                    "raise vmbeam_host_vm_memory_mb",
                )
            )

    image = observed["image"]
    if not image.get("exists"):
        problems.append(
            new_problem(
                "golden image",
                f"the golden image {image.get('path')} is missing on the host dom0",
                "copy it there, or set vmbeam_guest_hypervisor_image",
            )
        )
    reserve, free_disk = int(settings.get("overlay_reserve_mb", 0)), observed.get("free_disk_mb")
    if free_disk is not None and int(free_disk) < reserve:
        problems.append(
            _shortage(
                "disk space",
                reserve,
                int(free_disk),
                "MiB",
                f"the host dom0 has too little disk space for the overlay of {name}",
                "free space on the host dom0, or lower vmbeam_overlay_reserve_mb",
            )
        )
    return problems


def guest_problems(plan: dict[str, Any], observed: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what keeps the guests that are to move from doing so, each for itself."""
    problems = []
    for guest in plan["guests"]:
        if guest["step"] != "move":
            continue
        name = guest["name"]
        problems += guest["problems"]
        probe = (observed.get("probes") or {}).get(name)
        if probe and not probe.get("ok"):
            problems.append(
                new_problem(
                    "probe",
                    f"guest {name} does not answer its probe before it moves ({probe.get('error') or 'no answer'})",
                    f"repair the guest, or correct vmbeam_guest_probes.{name}",
                )
            )
    return problems


def new_problem(what: str, message: str, fix: str) -> dict[str, Any]:
    """Return a problem; the figures stay None where it is not an amount that is missing."""
    return {
        "what": what,
        "message": message,
        "fix": fix,
        "needed": None,
        "available": None,
        "missing": None,
        "unit": None,
    }


def _shortage(what: str, needed: int, available: int, unit: str, message: str, fix: str) -> dict[str, Any]:
    missing = needed - available
    text = f"{message}: needs {needed} {unit}, has {available} {unit}, {missing} {unit} missing"
    return dict(new_problem(what, text, fix), needed=needed, available=available, missing=missing, unit=unit)


def older(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether one hypervisor (as guest_info returns it) is known to be older than the other."""
    first, second = _version(one.get("version")), _version(other.get("version"))
    return first is not None and second is not None and first < second


def _version(text: Any) -> tuple[int, ...] | None:
    """Return Xen's major and minor version as numbers, None if `text` has none."""
    match = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return tuple(int(part) for part in match.groups()) if match else None
