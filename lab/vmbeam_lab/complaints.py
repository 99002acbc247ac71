"""What the hypervisors of a machine complain of, by their consoles.

A console has all that ``xl dmesg`` has, which keeps the last 16 KiB only, and is there even if its hypervisor is dead.
"""

from __future__ import annotations

import collections
import re
import shlex

from .errors import LabError
from .machine import Emulated
from .shell import tail

#: Bugs that a hypervisor found in itself, its death, the end of a domain for something that it did, and errors.
_COMPLAINT = re.compile(
    r"\(XEN\).*("
    r"Assertion|\bBUG\b|\bWARN\b|Xen call trace|[Pp]anic|FATAL|domain_crash|crashed"
    r"|(?<!=)\b[Ee]rror\b|\b[Ff]ailed\b|FAILURE)"
)
#: What looks like one, and is none.
_KNOWN = re.compile(
    # QEMU raises #GP instead of #SS if the address of a push is not canonical. Debug hypervisors try that at boot.
    r"Selftest 2 failed: .* expected #SS\[0000\], got #GP\[0000\]|SELFTEST FAILURE"
    # Profiling, for which Xen knows no CPU that is newer than its code.
    r"|xenoprof: Initialization failed\."
)

#: Prints the name and the text of the console of each host VM. The last line, a prompt, has no end.
_HOST_VM_CONSOLES = (
    "cd /var/log/xen/vmbeam 2>/dev/null || exit 0; "
    "for f in *.console; do [ ! -e $f ] || { echo === $f; cat $f; echo; }; done"
)


def complaints(text: str) -> list[str]:
    """Return the lines of a console in which a hypervisor complains."""
    return [line.strip() for line in text.splitlines() if _COMPLAINT.search(line) and not _KNOWN.search(line)]


class Complaints:
    """Those of a machine's host hypervisor and guest hypervisors that have not been reported yet."""

    def __init__(self, emulated: Emulated) -> None:
        self._emulated = emulated
        self._reported: dict[str, collections.Counter[str]] = {}

    def new(self) -> list[str]:
        """Return what is new since the last call, or since the consoles began.

        :raises LabError: host dom0 does not answer; with the host hypervisor's complaints, if there are any
        """
        found = self._new("host hypervisor", self._emulated.console.read_text(errors="replace"))
        try:
            consoles = self._emulated.ssh("sh", "-c", shlex.quote(_HOST_VM_CONSOLES))
        except LabError as exc:
            raise LabError("\n".join([str(exc), *found, tail(self._emulated.console)])) from exc
        sections = [section.partition("\n") for section in re.split(r"^=== ", consoles, flags=re.MULTILINE)[1:]]
        for name, _, text in sections:
            found += self._new(name, text)
        # What a console that is gone had is new in the next one of that name.
        there = {"host hypervisor", *(name for name, *_ in sections)}
        self._reported = {name: known for name, known in self._reported.items() if name in there}
        return found

    def _new(self, name: str, text: str) -> list[str]:
        """Return the complaints of one console that it did not have the last time."""
        # A console begins anew with its machine, so that positions in it tell nothing.
        seen, now = self._reported.get(name, collections.Counter()), collections.Counter(complaints(text))
        self._reported[name] = now
        return [f"{name}: {line}" for line in (now - seen).elements()]
