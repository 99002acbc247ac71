# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What Linux tells of a dom0 in /proc. Nothing here changes anything."""

from __future__ import annotations

import os
from pathlib import Path

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import UnexpectedOutput

MIB = 1024 * 1024

# What Linux calls a limit is none from here on.
_ENDLESS = 2**62


class Proc:
    """The files below /proc, or below a copy of it."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self._root = root

    def boot_id(self) -> str:
        """An id that is another one after each boot."""
        return self._text("sys/kernel/random/boot_id")

    def uptime(self) -> float:
        """Seconds since the boot."""
        return float(self._word("uptime", 0))

    def memory(self) -> dict[str, float]:
        """The fields of /proc/meminfo in MiB."""
        fields = {}
        for line in self._text("meminfo").splitlines():
            name, _colon, rest = line.partition(":")
            if rest.endswith(" kB"):
                fields[name] = int(rest[:-3]) / 1024
        return fields

    def open_files(self) -> tuple[int, int | None]:
        """Open files of all processes, and how many there may be, None if any number."""
        return int(self._word("sys/fs/file-nr", 0)), _bounded(int(self._word("sys/fs/file-nr", 2)))

    def threads(self) -> tuple[int, int]:
        """Threads of all processes and of the kernel, and how many there may be."""
        most = min(int(self._text(f"sys/kernel/{name}")) for name in ("pid_max", "threads-max"))
        return int(self._word("loadavg", 3).partition("/")[2]), most

    def processes(self, *parts: str) -> dict[int, str]:
        """Processes in whose name one of the parts occurs: names, as far as Linux keeps them, by process id."""
        found = {}
        for entry in os.listdir(self._root):
            if not entry.isdigit():
                continue
            try:
                name = self._text(f"{entry}/comm")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if any(part in name for part in parts):
                found[int(entry)] = name
        return found

    def resident(self, pid: int) -> float:
        """Memory of a process that is in RAM, in MiB."""
        return int(self._word(f"{pid}/statm", 1)) * os.sysconf("SC_PAGE_SIZE") / MIB

    def descriptors(self, pid: int) -> tuple[int, int | None]:
        """Files that a process has open, and how many it may have, None if any number."""
        for line in self._text(f"{pid}/limits").splitlines():
            if line.startswith("Max open files"):
                soft = line.split()[3]
                limit = None if soft == "unlimited" else _bounded(int(soft))
                return len(os.listdir(self._root / str(pid) / "fd")), limit
        raise UnexpectedOutput(f"/proc/{pid}/limits has no line on open files.", output="")

    def _text(self, name: str) -> str:
        return (self._root / name).read_text(errors="replace").strip()

    def _word(self, name: str, index: int) -> str:
        text = self._text(name)
        try:
            return text.split()[index]
        except IndexError as exc:
            raise UnexpectedOutput(f"/proc/{name} has fewer words than expected.", output=text[:200]) from exc


def _bounded(limit: int) -> int | None:
    return limit if limit < _ENDLESS else None
