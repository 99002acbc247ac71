# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What was observed on a machine, slot by slot."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

SLOTS = ("a", "b")

# libxl renames the copy that it receives and, once the receiver runs, the one that it sent.
INCOMING = "--incoming"
SENT_AWAY = "--migratedaway"


def slot_view(slot: str, observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return all that was observed of a slot's host VM, with None or empty for what is not known."""
    name = settings["slots"][slot]["name"]
    record: dict[str, Any] = next((vm for vm in observed["host_vms"] if vm["name"] == name), {})
    dom0 = (observed.get("guest_dom0s") or {}).get(slot) or {}
    return {
        "slot": slot,
        "name": name,
        "exists": record.get("domid") is not None,
        "state": record.get("state"),
        "memory_mb": record.get("memory_mb"),
        "generation": record.get("generation"),
        "created": record.get("created"),
        "image_sha256": record.get("image_sha256"),
        "disks": record.get("disks") or [],
        "reachable": bool(dom0.get("reachable")),
        "error": dom0.get("error") or "",
        "guests": dom0.get("guests") or [],
        "hypervisor": dom0.get("hypervisor") or {},
        "configurations": dom0.get("configurations") or [],
        "zero_copy": dom0.get("zero_copy"),
        "channel_version": dom0.get("channel_version"),
    }


def public_view(slot: dict[str, Any], observed: dict[str, Any]) -> dict[str, Any]:
    """Return what a plan says about a host VM."""
    view = {key: slot[key] for key in ("slot", "name", "generation", "created", "exists", "reachable")}
    view["version"] = slot["hypervisor"].get("version")
    view["age_seconds"] = slot_age(slot, observed) if slot["exists"] else None
    return view


def slot_age(slot: dict[str, Any], observed: dict[str, Any]) -> float | None:
    """Return the seconds since the slot's host VM was created, or None if that is not recorded."""
    created = slot.get("created")
    if not created:
        return None
    try:
        moment = datetime.datetime.fromisoformat(str(created))
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return float(observed["now"]) - moment.timestamp()


def guest_name(domain: str) -> str:
    """Return the name of the guest that a domain is a copy of; a migration renames copies."""
    return domain.removesuffix(INCOMING).removesuffix(SENT_AWAY)


@dataclass(frozen=True)
class Copies:
    """The copies of one guest in the two host VMs, as guest_info describes them."""

    source: list[dict[str, Any]]
    destination: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The copy that tells most of the guest: one that has its own name, rather the source's."""
        copies = self.source + self.destination
        return next((copy for copy in copies if guest_name(copy["name"]) == copy["name"]), copies[0])

    @property
    def location(self) -> str:
        """One of source, destination and both."""
        if self.source and self.destination:
            return "both"
        return "source" if self.source else "destination"

    @property
    def settled(self) -> bool:
        """Whether there is one copy only and it has its own name: no migration is under way or was cut."""
        return len(self.source) + len(self.destination) == 1 and self.best["name"] == guest_name(self.best["name"])


def copies_by_guest(source: dict[str, Any], destination: dict[str, Any]) -> dict[str, Copies]:
    """Return the copies of every guest in two slots (slot_view), by the guest's name."""
    found: dict[str, Copies] = {}
    for side, slot in (("source", source), ("destination", destination)):
        for guest in slot["guests"]:
            copies = found.setdefault(guest_name(guest["name"]), Copies([], []))
            getattr(copies, side).append(guest)
    return dict(sorted(found.items()))
