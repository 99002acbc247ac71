# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What is left to put right on a machine on which a run was cut, beyond what a resumed run does by itself."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._observation import copies_by_guest, guest_name, slot_view
from ansible_collections.vmbeam.xen.plugins.plugin_utils._report import close_cut_run

# Of these a guest does not come back by itself, and nothing here can tell whether it may.
DEAD_STATES = ("suspended", "shutdown", "crashed")

NOBODY: dict[str, Any] = {"guests": []}


def repairs(plan: dict[str, Any], observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what to repair on a machine with one host VM. A machine with two is one to resume.

    - host_vm: the name of the host VM
    - unpause: guests that a cut run left paused, of which there is no other copy
    - decide: in words, what only a person can decide
    - close_run: whether the record says that a run is under way, and nothing is left to decide
    - done: whether any of this is to be done without a person
    - summary: in words, how the machine is after that

    settings["confirm_gone"] names guests that are known to have been stopped.
    """
    source = slot_view(plan["source"]["slot"], observed, settings)
    run = (observed.get("state") or {}).get("run") or {}
    result: dict[str, Any] = {"host_vm": source["name"], "unpause": [], "decide": [], "close_run": False}
    _find(result, source, run, settings)
    result["done"] = bool(result["unpause"] or result["close_run"])
    result["summary"] = _summary(result)
    return result


def _find(result: dict[str, Any], source: dict[str, Any], run: dict[str, Any], settings: dict[str, Any]) -> None:
    """Enter into `result` what there is to repair."""
    if not source["reachable"]:
        result["decide"].append(
            f"the guest dom0 of {source['name']} does not answer ({source['error'] or 'no answer'}): look at its "
            f"console (/var/log/xen/vmbeam/{source['name']}.console in host dom0); its guests run on without it"
        )
        return
    copies = copies_by_guest(source, NOBODY)
    for name, found in copies.items():
        result["decide"] += [_leftover(name, copy, found.source, source["name"]) for copy in _leftovers(found.source)]
        # Whoever paused a guest on purpose did so outside of a run.
        if found.settled and found.best.get("state") == "paused" and name in (run.get("guests") or []):
            result["unpause"].append(name)
        if found.settled and found.best.get("state") in DEAD_STATES:
            result["decide"].append(
                f"guest {name} is {found.best['state']} in {source['name']} and there is no other copy: look why (its "
                f"console, /var/log/xen), then destroy it there (xl destroy {name}) and start it again"
            )
    lost = sorted(set(run.get("guests") or []) - copies.keys() - set(settings.get("confirm_gone") or []))
    result["decide"] += [
        f"guest {name}, which the run that was cut had to move, runs nowhere on this machine: start it in "
        f"{source['name']}, or, if it was stopped on purpose, repeat this with -e vmbeam_confirm_gone={name}"
        for name in lost
    ]
    result["close_run"] = bool(run) and not result["decide"]


def _summary(found: dict[str, Any]) -> str:
    if found["decide"]:
        return "needs a person: " + "; ".join(found["decide"])
    unpaused = f"{len(found['unpause'])} guest(s) set going, " if found["unpause"] else ""
    closed = "the record of the run that was cut is closed" if found["close_run"] else "nothing else to repair"
    return f"one host VM, {found['host_vm']}, with each guest once; {unpaused}{closed}"


def close_run(state: dict[str, Any], host_vm: str, now: float, limit: int) -> dict[str, Any]:
    """Return the machine's record with the run that was cut in its history; `host_vm` is the one that is left."""
    closed = close_cut_run(state, now, limit)
    if state["run"].get("destination") != host_vm:
        closed["history"][-1] = dict(closed["history"][-1], outcome="failed", note="cut; closed by a repair")
    return closed


def _leftovers(copies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [copy for copy in copies if guest_name(copy["name"]) != copy["name"]]


def _leftover(name: str, copy: dict[str, Any], copies: list[dict[str, Any]], host_vm: str) -> str:
    if len(copies) > 1:
        return (
            f"{copy['name']} ({copy.get('state')}) was left in {host_vm} beside {name}: if {name} is well, remove it "
            f"there (xl destroy {copy['name']})"
        )
    return (
        f"{copy['name']} ({copy.get('state')}) is all that is left of guest {name}, in {host_vm}; the other host VM "
        f"is gone: if a migration by copying was cut, let it go on there (xl rename {copy['name']} {name}, "
        f"xl unpause {name}); after zero_copy its memory may be gone: destroy it and start it again"
    )
