# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Observations of a machine as role rejuvenate makes them, and its filters, for tests of its decisions."""

from __future__ import annotations

import datetime
from typing import Any

from ansible_collections.vmbeam.xen.plugins.filter.rejuvenation import FilterModule

NOW = 1_700_000_000.0
DAY = 86400
FILTERS = FilterModule().filters()
BY_ID = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_"

SETTINGS: dict[str, Any] = {
    "slots": {"a": {"name": "m1-a"}, "b": {"name": "m1-b"}},
    "force": False,
    "max_age": 7 * DAY,
    "destination_slot": "",
    "strategy": "precopy",
    "guest_strategies": {},
    "guest_types": ["pvh", "hvm"],
    "host_vm_memory_mb": 3072,
    "host_vm_vcpus": 1,
    "overlay_reserve_mb": 1024,
    "undo_on_failure": True,
}


def guest(name: str, **values: Any) -> dict[str, Any]:
    base = name.split("--")[0]
    described = {
        "name": name,
        "domid": 3,
        "uuid": f"uuid-{base}",
        "state": "blocked",
        "type": "pvh",
        "memory_mb": 128,
        "vcpus": 1,
        "disks": [{"id": f"{base}-root", "target": f"{BY_ID}{base}-root", "vdev": "xvda"}],
        "nics": [],
    }
    return {**described, **values}


def host_vm(slot: str, **values: Any) -> dict[str, Any]:
    described = {
        "name": f"m1-{slot}",
        "domid": 5,
        "state": "running",
        "memory_mb": 3072,
        "vcpus": 1,
        "slot": slot,
        "generation": 1,
        "created": "2023-11-01T00:00:00+00:00",
        "image_sha256": "abc",
        "disks": [{"id": "web1-root", "path": "/guests/web1-root.raw"}],
    }
    return {**described, **values}


def dom0(*guests: dict[str, Any], **values: Any) -> dict[str, Any]:
    used = 1000 + sum(item["memory_mb"] for item in guests)
    hypervisor = {"version": "4.17.5", "total_memory_mb": 3072, "free_memory_mb": 3072 - used}
    return {"reachable": True, "error": "", "guests": list(guests), "hypervisor": hypervisor, **values}


SILENT = {"reachable": False, "error": "timed out", "guests": [], "hypervisor": {}}


def observe(**values: Any) -> dict[str, Any]:
    """A machine whose host VM m1-a is old and holds the guest web1."""
    observed = {
        "machine": "m1",
        "now": NOW,
        "hypervisor": {"version": "4.17.5", "free_memory_mb": 5000},
        "host_vms": [host_vm("a")],
        "domains": ["m1-a"],
        "image": {"path": "/golden.raw", "exists": True, "sha256": "abc"},
        "free_disk_mb": 9000,
        "guest_dom0s": {"a": dom0(guest("web1"))},
        "state": {},
        "probes": {},
    }
    return {**observed, **values}


def observe_both(source: dict[str, Any], destination: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A machine whose run from m1-a to m1-b was cut; web1's disk is attached to both."""
    return observe(
        host_vms=[host_vm("a"), host_vm("b", generation=2)],
        domains=["m1-a", "m1-b"],
        guest_dom0s={"a": source, "b": destination},
        **values,
    )


def plan(observed: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return FILTERS["rejuvenation_plan"](observed, {**SETTINGS, **settings})


def problems(made: dict[str, Any]) -> list[str]:
    return [problem["what"] for problem in made["problems"]]


def age(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(NOW - seconds, datetime.UTC).isoformat(timespec="seconds")
