# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Indicators of the aging of a hypervisor and its dom0, as they are at a moment. Nothing here changes anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _parse
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import CommandTimeout, UnexpectedOutput, VmbeamError
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._proc import MIB, Proc
from ansible_collections.vmbeam.xen.plugins.module_utils._xenstore import Usage, Xenstore
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

#: Xen gives the ids below DOMID_FIRST_RESERVED in turn, and begins anew after the last one.
LAST_DOMID = 0x7FEF

_NEED_THE_TOOLSTACK = (
    "toolstack_latency",
    "highest_domid",
    "hypervisor_free_memory",
    "hypervisor_own_memory",
    "xenstore_nodes",
    "xenstore_domain_nodes",
    "xenstore_size",
)
_DISKS = {"root": "/", "var": "/var", "vmbeam": "/var/lib/vmbeam"}


@dataclass(frozen=True)
class Kind:
    """What an indicator is. direction is where aging leads its value, up or down."""

    unit: str
    direction: str
    what: str


KINDS: dict[str, Kind] = {
    "hypervisor_free_memory": Kind("MiB", "down", "memory that the hypervisor can give to domains"),
    "hypervisor_own_memory": Kind("MiB", "up", "memory that no domain has: the hypervisor's heap and tables"),
    "dom0_available_memory": Kind("MiB", "down", "memory that dom0 can use without swapping (MemAvailable)"),
    "dom0_unreclaimable_slab": Kind("MiB", "up", "memory of dom0's kernel that it cannot give back (SUnreclaim)"),
    "dom0_threads": Kind("count", "up", "threads of all processes of dom0 and of its kernel"),
    "dom0_open_files": Kind("count", "up", "files that the processes of dom0 have open"),
    "disk_free_root": Kind("MiB", "down", "free space of the file system at /"),
    "disk_free_var": Kind("MiB", "down", "free space at /var, if that is another file system"),
    "disk_free_vmbeam": Kind("MiB", "down", "free space at /var/lib/vmbeam, if that is another file system"),
    "xenstore_nodes": Kind("count", "up", "nodes in xenstore"),
    "xenstore_size": Kind("MiB", "up", "memory of the nodes in xenstore; oxenstored does not tell it"),
    "xenstore_domain_nodes": Kind("count", "up", "nodes of the domain (not dom0) with most; its quota is the limit"),
    "xenstored_memory": Kind("MiB", "up", "resident memory of xenstored"),
    "xenstored_open_files": Kind("count", "up", "files that xenstored has open"),
    "device_model_memory": Kind("MiB", "up", "resident memory of the largest device model"),
    "highest_domid": Kind("count", "up", "highest id that a domain was seen with; after the limit ids begin anew"),
    "toolstack_latency": Kind("s", "up", "time that xl list takes"),
    "uptime": Kind("s", "up", "time since the boot"),
}


@dataclass(frozen=True)
class Reading:
    """A value, and the most that it can be, None if that is not known."""

    value: float
    limit: float | None = None


@dataclass(frozen=True)
class Indicator:
    """An indicator at a moment.

    limit is the most that the value can be. exhausted_at is the value at which nothing is left. Both are None where
    none is known.
    """

    name: str
    reading: Reading

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def exhausted_at(self) -> float | None:
        return 0.0 if self.kind.direction == "down" else self.reading.limit

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.reading.value,
            "unit": self.kind.unit,
            "limit": self.reading.limit,
            "direction": self.kind.direction,
            "exhausted_at": self.exhausted_at,
        }


@dataclass(frozen=True)
class Observation:
    """What was seen at a time (seconds since the epoch), and why the rest was not."""

    time: float
    boot_id: str
    indicators: list[Indicator]
    unavailable: dict[str, str]

    @property
    def values(self) -> dict[str, float]:
        return {indicator.name: indicator.reading.value for indicator in self.indicators}


@dataclass
class Dom0:
    """Where indicators are read from; replaced in tests. timeout: seconds that each question may take."""

    xl: Xl = field(default_factory=Xl)
    proc: Proc = field(default_factory=Proc)
    xenstore: Callable[[], Xenstore] = Xenstore
    disk: Callable[[str], os.statvfs_result] = os.statvfs
    device: Callable[[str], int] = lambda path: os.stat(path).st_dev
    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    timeout: float = 60.0


def observe(dom0: Dom0, before: Mapping[str, float] | None = None) -> Observation:
    """Reads all indicators that can be read.

    before: values that were seen earlier since the same boot. Raises OSError if there is no /proc.
    """
    return _Observer(dom0, before or {}).observe()


class _Observer:
    def __init__(self, dom0: Dom0, before: Mapping[str, float]) -> None:
        self._dom0 = dom0
        self._before = before
        self._found: dict[str, Reading] = {}
        self._unavailable: dict[str, str] = {}
        self._domains: list[Domain] = []

    def observe(self) -> Observation:
        started = self._dom0.now()
        if self._probe(self._toolstack, *_NEED_THE_TOOLSTACK):
            self._probe(self._highest_domid, "highest_domid")
            self._probe(self._hypervisor, "hypervisor_free_memory", "hypervisor_own_memory")
            self._probe(self._xenstore, "xenstore_nodes", "xenstore_domain_nodes", "xenstore_size")
        self._probe(self._memory, "dom0_available_memory", "dom0_unreclaimable_slab")
        self._probe(self._threads, "dom0_threads")
        self._probe(self._open_files, "dom0_open_files")
        self._probe(self._disks, *(f"disk_free_{name}" for name in _DISKS))
        self._probe(self._daemons, "xenstored_memory", "xenstored_open_files", "device_model_memory")
        self._probe(self._uptime, "uptime")
        return Observation(
            time=round(started, 3),
            boot_id=self._dom0.proc.boot_id(),
            indicators=[Indicator(name, self._found[name]) for name in KINDS if name in self._found],
            unavailable=self._unavailable,
        )

    def _probe(self, read: Callable[[], None], *names: str) -> bool:
        """Whether it could be read; if not, notes why."""
        try:
            read()
        except (VmbeamError, OSError, ValueError) as exc:
            self._unavailable.update({name: str(exc) for name in names if name not in self._found})
            return False
        return True

    def _note(self, name: str, value: float, limit: float | None = None) -> None:
        self._found[name] = Reading(round(value, 3), None if limit is None else round(limit, 3))

    def _toolstack(self) -> None:
        started = self._dom0.monotonic()
        try:
            table = self._dom0.xl.xl("list", "-v", timeout=self._dom0.timeout)
        except CommandTimeout:
            # So slow it is, at least.
            self._note("toolstack_latency", self._dom0.monotonic() - started)
            raise
        self._note("toolstack_latency", self._dom0.monotonic() - started)
        self._domains = _parse.domain_table(table)

    def _highest_domid(self) -> None:
        seen = [float(domain.domid) for domain in self._domains]
        self._note("highest_domid", max([*seen, self._before.get("highest_domid", 0.0)]), LAST_DOMID)

    def _hypervisor(self) -> None:
        hypervisor = _parse.hypervisor(self._dom0.xl.xl("info", timeout=self._dom0.timeout))
        total, free = hypervisor.total_memory_mb, hypervisor.free_memory_mb
        own = total - free - sum(domain.memory_mb for domain in self._domains)
        self._note("hypervisor_free_memory", free, total)
        # It grows until nothing is free. What domains have by then it cannot take: the limit moves as they come and go.
        self._note("hypervisor_own_memory", own, own + free)

    def _xenstore(self) -> None:
        with self._dom0.xenstore() as xenstore:
            answers = {domain.domid: xenstore.usage(domain.domid) for domain in self._domains}
        usages = {domid: usage for domid, usage in answers.items() if usage}
        if not usages:
            raise UnexpectedOutput("xenstored knows no domain.", output="")
        self._note("xenstore_nodes", sum(usage.nodes for usage in usages.values()))
        sizes = [usage.size for usage in usages.values() if usage.size is not None]
        if sizes:
            self._note("xenstore_size", sum(sizes) / MIB)
        # dom0 may have any number.
        others = [usage for domid, usage in usages.items() if domid != 0]
        if others:
            fullest: Usage = max(others, key=lambda usage: usage.nodes)
            self._note("xenstore_domain_nodes", fullest.nodes, fullest.quota)

    def _memory(self) -> None:
        fields = self._dom0.proc.memory()
        missing = [name for name in ("MemTotal", "MemAvailable", "SUnreclaim") if name not in fields]
        if missing:
            raise UnexpectedOutput(f"/proc/meminfo has no {missing[0]}.", output="")
        self._note("dom0_available_memory", fields["MemAvailable"], fields["MemTotal"])
        self._note("dom0_unreclaimable_slab", fields["SUnreclaim"])

    def _threads(self) -> None:
        self._note("dom0_threads", *self._dom0.proc.threads())

    def _open_files(self) -> None:
        self._note("dom0_open_files", *self._dom0.proc.open_files())

    def _disks(self) -> None:
        devices = set()
        for name, path in _DISKS.items():
            try:
                device, disk = self._dom0.device(path), self._dom0.disk(path)
            except FileNotFoundError:
                continue
            if device not in devices:
                devices.add(device)
                self._note(
                    f"disk_free_{name}", disk.f_bavail * disk.f_frsize / MIB, disk.f_blocks * disk.f_frsize / MIB
                )

    def _daemons(self) -> None:
        proc = self._dom0.proc
        processes = proc.processes("xenstored", "qemu-system")
        device_models = []
        for pid, name in processes.items():
            try:
                resident = proc.resident(pid)
                if "xenstored" not in name:
                    device_models.append(resident)
                else:
                    self._note("xenstored_memory", resident)
                    self._note("xenstored_open_files", *proc.descriptors(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
        if device_models:
            self._note("device_model_memory", max(device_models))

    def _uptime(self) -> None:
        self._note("uptime", self._dom0.proc.uptime())
