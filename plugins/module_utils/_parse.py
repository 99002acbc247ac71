# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Parsers of what xl prints. Pure: nothing here runs a command.

Formats are those of Xen 4.17 to 4.20 (tools/xl/xl_info.c).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import UnexpectedOutput

NO_NAME = "(null)"

_TABLE_ROW = re.compile(
    r"(?P<name>\S.*?)\s+(?P<domid>\d+)\s+(?P<memory>\d+)\s+(?P<vcpus>\d+)"
    r"\s+(?P<flags>[r-][b-][p-][s-][-rscwS?][d-])\s+(?P<time>\d+\.\d+)"
    r"\s+(?P<uuid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\b.*"
)
_INFO_ROW = re.compile(r"(\w+)\s*:\s?(.*)")
_MONITOR_ROW = re.compile(r"(?P<name>[^\s:()]+)(?: \([^)]*\))?: (?P<file>.*?)(?: \((?P<driver>[^()]*)\))?")


@dataclass(frozen=True)
class Domain:
    """A domain as the table of "xl list -v" shows it. memory_mb is in MiB, cpu_time in seconds."""

    name: str
    domid: int
    uuid: str
    flags: str
    memory_mb: int
    vcpus: int
    cpu_time: float

    @property
    def state(self) -> str:
        """One word for xl's flags, the most final one first.

        A domain without a flag is ready to run and waits for a CPU: that is "running" too.
        """
        if self.flags[5] == "d":
            return "dying"
        if self.flags[3] == "s":
            return {"s": "suspended", "c": "crashed", "w": "crashed"}.get(self.flags[4], "shutdown")
        if self.flags[2] == "p":
            return "paused"
        return "blocked" if self.flags[1] == "b" else "running"

    @property
    def live(self) -> bool:
        """Whether the domain's CPUs can execute now."""
        return self.state in ("running", "blocked")

    @property
    def never_ran(self) -> bool:
        """Whether the domain is paused and has used no CPU time, as after "xl restore -p".

        xl prints tenths of seconds, so this alone does not prove it.
        """
        return self.state == "paused" and self.cpu_time == 0.0


@dataclass(frozen=True)
class Hypervisor:
    """What "xl info" says about the hypervisor. Memory is in MiB."""

    version: str
    extra: str
    nr_cpus: int
    total_memory_mb: int
    free_memory_mb: int

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Drive:
    """A block device of a domain's device model. attached: whether a device uses it."""

    name: str
    path: str
    attached: bool


def domain_table(text: str) -> list[Domain]:
    """Parses the output of "xl list -v". Raises UnexpectedOutput."""
    lines = text.splitlines()
    if not lines or not lines[0].startswith("Name ") or "State" not in lines[0]:
        raise UnexpectedOutput("xl list printed no table of domains.", output=text[:2000])
    domains = []
    for line in lines[1:]:
        if not line.strip():
            continue
        row = _TABLE_ROW.fullmatch(line.rstrip())
        if row is None:
            raise UnexpectedOutput(f"xl list printed a line of unknown form: {line!r}.", output=text[:2000])
        domains.append(
            Domain(
                name=row["name"],
                domid=int(row["domid"]),
                uuid=row["uuid"],
                flags=row["flags"],
                memory_mb=int(row["memory"]),
                vcpus=int(row["vcpus"]),
                cpu_time=float(row["time"]),
            )
        )
    return domains


def domain_configs(text: str) -> dict[int, dict[str, Any]]:
    """Parses the output of "xl list -l": configurations by domain id. Raises UnexpectedOutput."""
    try:
        return {int(entry["domid"]): entry["config"] for entry in json.loads(text)}
    except (ValueError, KeyError, TypeError) as exc:
        raise UnexpectedOutput(
            f"xl list -l printed no JSON list of domain configurations: {exc}.", output=text[:2000]
        ) from exc


def hypervisor(text: str) -> Hypervisor:
    """Parses the output of "xl info". Raises UnexpectedOutput, which names the missing field."""
    fields = {row[1]: row[2] for row in map(_INFO_ROW.fullmatch, text.splitlines()) if row}
    try:
        return Hypervisor(
            version=fields["xen_version"],
            extra=fields["xen_extra"],
            nr_cpus=int(fields["nr_cpus"]),
            total_memory_mb=int(fields["total_memory"]),
            free_memory_mb=int(fields["free_memory"]),
        )
    except KeyError as exc:
        raise UnexpectedOutput(f"xl info printed no field {exc.args[0]}.", output=text[:2000]) from exc
    except ValueError as exc:
        raise UnexpectedOutput(f"xl info printed a field that is no number: {exc}.", output=text[:2000]) from exc


def drives(text: str) -> list[Drive]:
    """Parses the output of QEMU's monitor command "info block"."""
    found: list[Drive] = []
    for line in text.replace("\r", "").splitlines():
        if line.startswith((" ", "\t")):
            if found and line.strip().startswith("Attached to:"):
                found[-1] = Drive(found[-1].name, found[-1].path, attached=True)
            continue
        row = _MONITOR_ROW.fullmatch(line.rstrip())
        if row:
            empty = row["file"] == "[not inserted]"
            found.append(Drive(row["name"], "" if empty else row["file"], attached=False))
    return found
