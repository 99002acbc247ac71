# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What is safe to undo after a run failed before the source host VM was destroyed."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._observation import Copies, copies_by_guest, slot_view
from ansible_collections.vmbeam.xen.plugins.plugin_utils._preflight import older

LIVE_STATES = ("running", "blocked")


def recovery(
    plan: dict[str, Any], observed: dict[str, Any], settings: dict[str, Any], in_flight: list[str]
) -> dict[str, Any]:
    """Return what to undo, from a new observation of the machine.

    `in_flight` are the guests whose migration gave no result: it may still be at work, so nothing of
    theirs is touched. For the same reason a run that found its destination running undoes nothing:
    a migration of the run that was cut may still be at work. The result holds

    - guests: [{name, location, state}], location one of source, destination, both, nowhere and unknown
    - unpause: [{slot_name, name}], sole copies that were left paused
    - detach: [{host_vm, disk}], disks attached to the destination whose guest is at the source
    - move_back: plan entries of the guests that are in the destination and go back to the source, one after the
      other, with `step` back; empty unless `on_failure` is rollback
    - rollback_refused: why none goes back although that is wanted, empty if there is no reason
    - destination_exists: whether the destination is there
    - destroy_destination: whether it is to be destroyed: it holds no guest, and undo is wanted
    """
    source = slot_view(plan["source"]["slot"], observed, settings)
    destination = slot_view(plan["destination"]["slot"], observed, settings)
    copies = copies_by_guest(source, destination)
    attached = {disk["id"] for disk in destination["disks"]}
    result: dict[str, Any] = {"guests": [], "unpause": [], "detach": []}
    ours = bool(plan["destination"]["start"])
    all_at_source = ours and bool(source["reachable"])

    for guest in plan["guests"]:
        name = guest["name"]
        found = copies.get(name)
        location, state = _whereabouts(found, source, destination)
        result["guests"].append({"name": name, "location": location, "state": state})
        untouched = ours and location == "source" and name not in in_flight and found is not None and found.settled
        # One that was crashed before and was to stay, or to be started anew, may be so still.
        all_at_source = all_at_source and untouched and state in (*LIVE_STATES, "paused", guest["state"])
        # One that was paused before was so for a reason.
        if untouched and state == "paused" and guest["state"] != "paused":
            result["unpause"].append({"slot_name": source["name"], "name": name})
        if untouched and destination["reachable"]:
            result["detach"] += [
                {"host_vm": destination["name"], "disk": disk["id"]}
                for disk in guest["disks"]
                if disk["id"] in attached
            ]

    refused = _rollback_refused(ours, source, destination) if settings.get("on_failure") == "rollback" else ""
    result["rollback_refused"] = refused
    result["move_back"] = []
    if settings.get("on_failure") == "rollback" and not refused:
        result["move_back"] = [
            dict(guest, step="back")
            for guest in plan["guests"]
            if guest["name"] in copies
            and copies[guest["name"]].location == "destination"
            and copies[guest["name"]].settled
            and copies[guest["name"]].best["state"] in LIVE_STATES
            and guest["name"] not in in_flight
        ]

    unplanned = copies.keys() - {guest["name"] for guest in plan["guests"]}
    strangers = [name for name in unplanned if copies[name].location != "source"]
    result["destination_exists"] = destination["exists"]
    result["destroy_destination"] = bool(
        (settings.get("undo_on_failure") or settings.get("on_failure") == "rollback")
        and destination["exists"]
        and all_at_source
        and not strangers
    )
    return result


def _rollback_refused(ours: bool, source: dict[str, Any], destination: dict[str, Any]) -> str:
    """Return why guests cannot go back to the source, empty if they can."""
    if not ours:
        return (
            f"{destination['name']} ran before this run; to take its guests back, set vmbeam_destination_slot to "
            f"{source['slot']}"
        )
    for slot in (source, destination):
        if not slot["reachable"]:
            return f"the guest dom0 of {slot['name']} does not answer"
    if older(source["hypervisor"], destination["hypervisor"]):
        return f"{source['name']} has an older Xen, to which Xen moves no guest"
    return ""


def _whereabouts(found: Copies | None, source: dict[str, Any], destination: dict[str, Any]) -> tuple[str, Any]:
    if found:
        return found.location, found.best.get("state")
    unseen = any(slot["exists"] and not slot["reachable"] for slot in (source, destination))
    return ("unknown" if unseen else "nowhere"), None
