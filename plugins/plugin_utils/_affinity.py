# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Guests of one anti-affinity group must not be on the move at the same time, on one machine or on several."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import listed


def groups_of(name: str, settings: dict[str, Any]) -> list[str]:
    """Return the names of a guest's anti-affinity groups, in the order of the settings.

    A group names its `guests`, or the `label` that its guests bear (settings' `guest_labels`).
    """
    labels = listed((settings.get("guest_labels") or {}).get(name))
    return [
        group["name"]
        for group in settings.get("anti_affinity") or []
        if name in listed(group.get("guests")) or (group.get("label") is not None and group["label"] in labels)
    ]


def move_batches(guests: list[dict[str, Any]], limit: int) -> list[list[str]]:
    """Return the names of the guests that move together, batch after batch.

    A batch has at most `limit` guests and at most one of each group (`anti_affinity` of a guest). The order of
    the guests is kept as far as that allows.
    """
    batches: list[list[dict[str, Any]]] = []
    for guest in guests:
        taken = set(guest["anti_affinity"])
        for batch in batches:
            if len(batch) < limit and taken.isdisjoint(group for other in batch for group in other["anti_affinity"]):
                batch.append(guest)
                break
        else:
            batches.append([guest])
    return [[guest["name"] for guest in batch] for batch in batches]


def turns(plans: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for the machines of a batch, which of them must be rolled one after the other.

    The result has, by machine, `turn` (0 for those that go first) and `mates`: {group, machine} of each other
    machine that holds a guest of a group of its own. Machines of one turn have no group in common.
    """
    groups = {
        plan["machine"]: {group for guest in plan["guests"] for group in guest.get("anti_affinity") or []}
        for plan in plans
        if plan["action"] in ("rejuvenate", "resume") and not plan["problems"]
    }
    result: dict[str, dict[str, Any]] = {}
    for machine, own in groups.items():
        mates = [
            {"group": group, "machine": other}
            for other, theirs in groups.items()
            if other != machine
            for group in sorted(own & theirs)
        ]
        used = {result[mate["machine"]]["turn"] for mate in mates if mate["machine"] in result}
        result[machine] = {"turn": next(turn for turn in range(len(groups)) if turn not in used), "mates": mates}
    return result
