# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What is safe to undo after a run failed before the source host VM was destroyed."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._observation import Copies, copies_by_guest, slot_view

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
        all_at_source = all_at_source and untouched and state in (*LIVE_STATES, "paused")
        if untouched and state == "paused":
            result["unpause"].append({"slot_name": source["name"], "name": name})
        if untouched and destination["reachable"]:
            result["detach"] += [
                {"host_vm": destination["name"], "disk": disk["id"]}
                for disk in guest["disks"]
                if disk["id"] in attached
            ]

    unplanned = copies.keys() - {guest["name"] for guest in plan["guests"]}
    strangers = [name for name in unplanned if copies[name].location != "source"]
    result["destination_exists"] = destination["exists"]
    result["destroy_destination"] = bool(
        settings.get("undo_on_failure") and destination["exists"] and all_at_source and not strangers
    )
    return result


def _whereabouts(found: Copies | None, source: dict[str, Any], destination: dict[str, Any]) -> tuple[str, Any]:
    if found:
        return found.location, found.best.get("state")
    unseen = any(slot["exists"] and not slot["reachable"] for slot in (source, destination))
    return ("unknown" if unseen else "nowhere"), None
