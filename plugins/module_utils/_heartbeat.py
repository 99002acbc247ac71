# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Whether a guest makes progress: that it is running or blocked is said of one that hangs, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import VmbeamError
from ansible_collections.vmbeam.xen.plugins.module_utils._health import LIVE
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._xenctrl import CpuTimes
from ansible_collections.vmbeam.xen.plugins.module_utils._xenstore import Xenstore
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

CONNECTED = "connected"
# enum xenbus_state of xen/include/public/io/xenbus.h
_STATES = {
    "1": "initialising",
    "2": "waiting for the guest's driver",
    "3": "initialised",
    "4": CONNECTED,
    "5": "closing",
    "6": "closed",
}
# What a guest without such drivers has, too, has emulated devices beside: that one's CPU time has to do.
_EMULATED = "hvm"


@dataclass(frozen=True)
class Beat:
    """What was seen of a guest. cpu_seconds is what it used between the first look and this one."""

    state: str = "unknown"
    cpu_seconds: float = 0.0
    devices: dict[str, str] = field(default_factory=dict)
    error: str = ""

    def missing(self) -> list[str]:
        """What does not hold, in words; empty if the guest makes progress."""
        if self.error:
            return [self.error]
        if self.state not in LIVE:
            return [f"it is {self.state}"]
        words = [] if self.cpu_seconds > 0 else [f"it is {self.state}, but its virtual CPUs have not run"]
        return words + [f"its {name} is {state}" for name, state in self.devices.items() if state != CONNECTED]

    def as_dict(self) -> dict[str, Any]:
        return {"state": self.state, "cpu_seconds": round(self.cpu_seconds, 9), "devices": self.devices}


class Heartbeat:
    """Looks at a guest again and again."""

    def __init__(
        self, xl: Xl, name: str, cpu_times: CpuTimes | None = None, xenstore: Callable[[], Xenstore] = Xenstore
    ) -> None:
        self._xl = xl
        self._name = name
        self._cpu_times = cpu_times
        self._xenstore = xenstore
        self._domid: int | None = None
        self._emulated = False
        self._first: float | None = None

    def look(self) -> Beat:
        """Looks once. Never raises for what cannot be seen."""
        try:
            domain = self._xl.domain(self._name)
            if domain is None:
                return Beat("absent")
            if domain.domid != self._domid:
                self._domid, self._first = domain.domid, None
                config = self._xl.configs().get(domain.domid, {})
                self._emulated = config.get("c_info", {}).get("type") == _EMULATED
            return Beat(domain.state, self._advance(domain), {} if self._emulated else self._devices(domain.domid))
        except VmbeamError as exc:
            return Beat(error=exc.message)

    def _advance(self, domain: Domain) -> float:
        used = self._cpu_times.seconds(domain.domid, domain.vcpus) if self._cpu_times else None
        if used is None:
            self._cpu_times, used = None, domain.cpu_time  # not one and then the other: they differ
        if self._first is None:
            self._first = used
        return used - self._first

    def _devices(self, domid: int) -> dict[str, str]:
        """The states of the backends of disks and network interfaces, by the devices' names.

        A new one waits until the guest's driver has connected to it, so after a migration this says that the driver
        lives. Its place is read from where the guest cannot write.
        """
        states = {}
        with self._xenstore() as xenstore:
            for kind in ("vbd", "vif"):
                for number in xenstore.children(f"/libxl/{domid}/device/{kind}"):
                    backend = xenstore.read(f"/libxl/{domid}/device/{kind}/{number}/backend")
                    state = xenstore.read(f"{backend}/state") if backend else None
                    states[f"{kind} {number}"] = _STATES.get(state or "", "unknown")
        return states
