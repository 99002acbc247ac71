# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""How each guest gets to the other host VM, and what becomes of one that cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._preflight import UNMOVABLE_STATES, new_problem

LIVE_STRATEGIES = ("zero_copy", "precopy", "suspend")
AUTO = "auto"
# What strategy cold may stop or start anew. A paused guest would lose what it has not written yet.
COLD_STATES = ("running", "blocked", "shutdown", "crashed")
ZERO_COPY_TYPES = ("pvh", "hvm")


@dataclass(frozen=True)
class Choice:
    """What is to be done with a guest, and why.

    step: move, leave (it stays in the source, and so does the source) or skip_host. strategy: None unless it
    moves. problems: empty unless the machine must be refused.
    """

    step: str
    strategy: str | None
    reason: str
    problems: list[dict[str, Any]] = field(default_factory=list)


def choose(
    guest: dict[str, Any], source: dict[str, Any], destination: dict[str, Any], settings: dict[str, Any]
) -> Choice:
    """Return how a guest of a plan moves. `source` and `destination` are views of the slots (slot_view)."""
    name = guest["name"]
    own = (settings.get("guest_strategies") or {}).get(name)
    wanted = own or settings.get("strategy") or "precopy"
    if wanted == AUTO:
        candidates = list(settings.get("auto_strategies") or LIVE_STRATEGIES)
        recorded = guest.get("cut_strategy")
        # What is left of a cut migration is best repaired by the strategy that left it.
        if recorded and not guest["settled"]:
            candidates = [recorded, *(one for one in candidates if one != recorded)]
    else:
        candidates = [wanted]

    rejected: list[tuple[str, list[dict[str, Any]]]] = []
    for strategy in candidates:
        found = obstacles(guest, strategy, source, destination, settings)
        if not found:
            return Choice("move", strategy, _why(wanted, own, strategy, rejected))
        rejected.append((strategy, found))
    return _unmovable(guest, rejected, source, destination, settings)


def settled_strategy(guest: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return by what strategy a guest that is in the destination already got there, as far as that is known."""
    wanted = (settings.get("guest_strategies") or {}).get(guest["name"]) or settings.get("strategy") or "precopy"
    if wanted == AUTO:
        wanted = guest.get("cut_strategy") or "precopy"
    return "precopy" if wanted == "cold" and not guest.get("config") else str(wanted)


def obstacles(
    guest: dict[str, Any],
    strategy: str,
    source: dict[str, Any],
    destination: dict[str, Any],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return, as problems, what keeps a guest from being moved by a strategy; all at once."""
    problems = _common_obstacles(guest, source, destination, settings)
    if strategy == "cold":
        return problems + _cold_obstacles(guest, source, settings)
    problems += _live_obstacles(guest, source, settings)
    if strategy == "zero_copy":
        problems += _zero_copy_obstacles(guest, source, destination)
    return problems


def _why(wanted: str, own: str | None, strategy: str, rejected: list[tuple[str, list[dict[str, Any]]]]) -> str:
    if wanted != AUTO:
        return "set for this guest" if own else "set for all guests"
    if not rejected:
        return "auto: the first choice is possible"
    strategies: dict[str, list[str]] = {}
    for one, found in rejected:
        strategies.setdefault(found[0]["message"], []).append(one)
    return "auto: " + "; ".join(f"not {', '.join(ones)}, as {message}" for message, ones in strategies.items())


def _unmovable(
    guest: dict[str, Any],
    rejected: list[tuple[str, list[dict[str, Any]]]],
    source: dict[str, Any],
    destination: dict[str, Any],
    settings: dict[str, Any],
) -> Choice:
    """Apply the policy for a guest that none of the wanted strategies can move."""
    name = guest["name"]
    policy = (settings.get("guest_unmovable_policies") or {}).get(name) or settings.get("unmovable_policy") or "fail"
    strategy, found = rejected[0]
    because = "; ".join(problem["message"] for problem in found)
    if policy in ("skip_host", "leave_and_skip") and not guest["settled"]:
        # A half-moved guest must be brought to one place first.
        policy = "fail"
    if policy == "skip_host":
        return Choice("skip_host", None, because)
    if policy == "leave_and_skip":
        return Choice("leave", None, f"left in {source['name']}: {because}")
    if policy == "fail":
        return Choice("move", strategy, because, found)
    other = obstacles(guest, policy, source, destination, settings)
    return Choice("move", policy, f"{policy} by the policy for guests that cannot move: {because}", other)


def _common_obstacles(
    guest: dict[str, Any], source: dict[str, Any], destination: dict[str, Any], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    name, problems = guest["name"], []
    for device in guest.get("devices") or []:
        problems.append(
            new_problem(
                "passthrough",
                f"guest {name} has the {device['type'].upper()} device {device['id']} of {source['name']} passed "
                f"through, which {destination['name']} does not have",
                "detach the device, or let the guest stay (vmbeam_guest_unmovable_policies)",
            )
        )
    cpus = int(settings.get("host_vm_vcpus", 1))
    if any(allowed and min(allowed) >= cpus for allowed in guest.get("cpu_affinity") or []):
        problems.append(
            new_problem(
                "CPU pinning",
                f"guest {name} is pinned to CPUs that {destination['name']}, which has {cpus}, does not have",
                "raise vmbeam_host_vm_vcpus, or pin the guest to other CPUs",
            )
        )
    for disk in guest["disks"]:
        if not disk.get("path"):
            problems.append(
                new_problem(
                    "disk",
                    f"guest {name}'s disk {disk.get('vdev') or '?'} ({disk.get('target')}) is not a disk that the "
                    f"host dom0 attached to {source['name']}, so {destination['name']} cannot have it",
                    "put it on the host dom0 and attach it with vmbeam.xen.host_vm_disk",
                )
            )
    return problems


def _live_obstacles(guest: dict[str, Any], source: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    name, problems = guest["name"], []
    kinds = settings.get("guest_types") or ["pvh", "hvm"]
    if guest["type"] not in kinds:
        problems.append(
            new_problem(
                "guest type",
                f"guest {name} is of type {guest['type']}; only {' and '.join(kinds)} guests are moved",
                "stop this guest, or move it by other means",
            )
        )
    # What a cut migration left may be paused or suspended: guest_migrate knows what to do with it.
    if guest["state"] in UNMOVABLE_STATES and guest["settled"]:
        problems.append(
            new_problem(
                "guest state",
                f"guest {name} is {guest['state']} and would not answer a request to suspend",
                f"unpause or destroy it in {source['name']}",
            )
        )
    if guest.get("migratable") is False:
        problems.append(
            new_problem(
                "nomigrate",
                f"guest {name} was started with nomigrate",
                "start it without, or choose cold (vmbeam_guest_strategies)",
            )
        )
    if name in (settings.get("pinned_guests") or []):
        problems.append(
            new_problem(
                "pinned",
                f"guest {name} is not to be moved while it runs (vmbeam_pinned_guests)",
                "take it off vmbeam_pinned_guests, or choose what shall become of it (vmbeam_guest_unmovable_policies)",
            )
        )
    return problems


def _zero_copy_obstacles(
    guest: dict[str, Any], source: dict[str, Any], destination: dict[str, Any]
) -> list[dict[str, Any]]:
    problems = []
    # What is not known is not held against it: the rehearsal before the first move asks again.
    problems += [
        new_problem(
            "zero-copy",
            f"the hypervisor below {slot['name']}, or the one in it, does not offer zero-copy migration",
            "install the hypervisors and tools of this project, or choose auto or precopy (vmbeam_strategy)",
        )
        for slot in (source, destination)
        if slot.get("zero_copy") is False
    ]
    if guest["type"] not in ZERO_COPY_TYPES:
        problems.append(
            new_problem(
                "zero-copy",
                f"guest {guest['name']} is of type {guest['type']}, whose memory cannot be passed on",
                "choose auto or precopy for it (vmbeam_guest_strategies)",
            )
        )
    return problems


def _cold_obstacles(guest: dict[str, Any], source: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    name, problems = guest["name"], []
    if not guest.get("config"):
        problems.append(
            new_problem(
                "configuration",
                f"guest {name} has no xl configuration in {settings.get('guest_config_directory')} of {source['name']} "
                "to start it from",
                "put it there, or set vmbeam_guest_config_directory",
            )
        )
    if guest["location"] != "nowhere" and guest["state"] not in COLD_STATES:
        problems.append(
            new_problem(
                "guest state",
                f"guest {name} is {guest['state']} and would not answer a request to shut down",
                f"unpause or destroy it in {source['name']}",
            )
        )
    return problems
