# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Whether Xen, its guests and its services are up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _parse, _process
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import VmbeamError
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


@dataclass(frozen=True)
class Health:
    """What was asked for, and whether it holds."""

    xl: bool = False
    xenstore: bool = False
    guests: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def missing(self) -> list[str]:
        """What does not hold, in words; empty if all is well."""
        words = []
        if not self.xl:
            words.append("xl does not answer")
        elif not self.xenstore:
            words.append("xenstored is not set up")
        words += [f"guest {name} is {state}" for name, state in self.guests.items() if state not in LIVE]
        words += [f"unit {name} is {state}" for name, state in self.units.items() if state != "active"]
        return words

    def as_dict(self) -> dict[str, Any]:
        return {"xl": self.xl, "xenstore": self.xenstore, "guests": self.guests, "units": self.units}


LIVE = ("running", "blocked")


def examine(
    xl: Xl, guests: Sequence[str], units: Sequence[str], timeout: float, run: _process.Run = _process.run
) -> Health:
    """Looks once. timeout bounds each command, in seconds. Never raises for what is not up yet."""
    unit_states = {unit: _unit_state(unit, timeout, run) for unit in units}
    try:
        domains = _parse.domain_table(xl.xl("list", "-v", timeout=timeout))
    except VmbeamError as exc:
        return Health(guests=dict.fromkeys(guests, "unknown"), units=unit_states, error=exc.message)
    states = {domain.name: domain.state for domain in domains}
    return Health(
        xl=True,
        # The name comes from xenstore, where xen-init-dom0 has written it.
        xenstore=any(domain.domid == 0 and domain.name == "Domain-0" for domain in domains),
        guests={name: states.get(name, "absent") for name in guests},
        units=unit_states,
    )


def _unit_state(unit: str, timeout: float, run: _process.Run) -> str:
    try:
        return _process.last_line(run(("systemctl", "is-active", unit), timeout).stdout) or "unknown"
    except VmbeamError:
        return "unknown"
