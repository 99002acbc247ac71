# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What a plan changes, as two states to compare."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import or_unknown


def preview(plan: dict[str, Any]) -> dict[str, Any]:
    """Return {before, after}: the host VMs by name, with their generation, guests and disks.

    Of a destination that is there before, only the guests that are in the plan are known.
    """
    source, destination = plan["source"], plan["destination"]
    left = [guest for guest in plan["guests"] if guest["step"] == "leave"]
    moved = [guest for guest in plan["guests"] if guest["step"] in ("move", "finish")]
    there = [guest for guest in moved if guest["location"] == "destination"]
    here = [guest for guest in plan["guests"] if guest["location"] in ("source", "both")]
    idle = plan["idle_disks"]
    before = {source["name"]: _host_vm(source["generation"], here, idle)}
    if destination["exists"]:
        before[destination["name"]] = _host_vm(None if destination["start"] else destination["generation"], there, [])
    after = {destination["name"]: _host_vm(destination["generation"], moved, idle)}
    if left:
        after[source["name"]] = _host_vm(source["generation"], left, [])
    return {"before": before, "after": after}


def _host_vm(generation: Any, guests: list[dict[str, Any]], idle: list[dict[str, Any]]) -> dict[str, Any]:
    disks = [disk for guest in guests for disk in guest["disks"]] + idle
    return {
        "generation": or_unknown(generation),
        "guests": sorted(guest["name"] for guest in guests),
        "disks": sorted(str(disk["id"]) for disk in disks),
    }
