# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""A typed wrapper of the xl command, of this dom0 or, through a prefix command, of another one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _parse, _process
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandError,
    CommandTimeout,
    NotFound,
    Unreachable,
    XenUnavailable,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain, Drive, Hypervisor

# xl list, info and the like answer within a second; nested and emulated hosts are far slower.
QUICK = 60.0

# Destroying waits for device models and hotplug scripts.
SLOW = 180.0

# What libxl says when the hypervisor or xenstored is not there (libxl_ctx_alloc).
_UNAVAILABLE = (
    "cannot open libxc handle",
    "cannot connect to xenstore",
    "cannot init xl context",
    "Could not obtain handle on privileged command interface",
)
SSH_FAILED = 255


def domains(table: str) -> list[Domain]:
    """The domains that xl list -v prints, except Domain-0."""
    return [domain for domain in _parse.domain_table(table) if domain.domid != 0]


class Xl:
    """Runs xl. Errors: CommandError and its siblings in _errors, each with xl's own words."""

    def __init__(self, run: _process.Run = _process.run, ssh: Sequence[str] = ()) -> None:
        """ssh: the command and arguments that reach another dom0, or empty for this one."""
        self._run = run
        self._ssh = tuple(ssh)

    def shell(self, command: str, timeout: float = QUICK) -> _process.Result:
        """Runs a shell command in the dom0 that this object stands for."""
        return self._execute(("sh", "-c", command), timeout)

    def xl(self, *arguments: str, timeout: float = QUICK, under: tuple[str, ...] = ()) -> str:
        """Runs xl, or a command that does, and returns what it prints."""
        try:
            result = self._execute((*under, "xl", *arguments), timeout)
        except CommandTimeout as exc:
            command = " ".join(("xl", *arguments[:2]))
            raise CommandTimeout(
                f"{command} did not end within {timeout:g} s and was ended. If xl hangs in general, see whether "
                "xenstored and xenconsoled run.",
                **exc.details,
            ) from exc
        except NotFound as exc:
            raise XenUnavailable(f"{exc.message} Install xen-utils and boot into Xen.", **exc.details) from exc
        if result.rc != 0 and any(text in result.stderr for text in _UNAVAILABLE):
            raise XenUnavailable(
                "xl cannot reach the hypervisor or xenstored: "
                f"{_process.last_line(result.stderr)}. See that the host runs under Xen, that xenstored is up "
                "and that the task runs as root.",
                cmd=list(result.argv),
                stderr=result.stderr,
            )
        return replace(result, argv=result.argv[len(under) :]).check().stdout

    def _execute(self, argv: tuple[str, ...], timeout: float) -> _process.Result:
        if not self._ssh:
            return self._run(argv, timeout)
        result = self._run((*self._ssh, shlex.join(argv)), timeout)
        if result.rc == SSH_FAILED:
            raise Unreachable(
                f"{self._ssh[-1]} cannot be reached by ssh: {_process.last_line(result.stderr) or 'no message'}.",
                cmd=list(result.argv),
                stderr=result.stderr,
            )
        return result

    # --- reading

    def domains(self) -> list[Domain]:
        """All domains except Domain-0."""
        return domains(self.xl("list", "-v"))

    def domain(self, name: str) -> Domain | None:
        return next((domain for domain in self.domains() if domain.name == name), None)

    def configs(self) -> dict[int, dict[str, Any]]:
        """The configurations of the domains (libxl's JSON), by domain id."""
        return _parse.domain_configs(self.xl("list", "-l"))

    def hypervisor(self) -> Hypervisor:
        return _parse.hypervisor(self.xl("info"))

    def drives(self, domid: int) -> list[Drive]:
        return _parse.drives(self.monitor(domid, "info block"))

    # --- acting; by domain id, because a migration renames domains

    def create(self, config: str, *, paused: bool, timeout: float, lock: str | None = None) -> None:
        """Creates a domain. lock: file that xl holds a lock on until that is done, whatever becomes of this process."""
        under = ("flock", "--close", lock) if lock else ()
        self.xl("create", *(["-p"] if paused else []), config, timeout=timeout, under=under)

    def destroy(self, domid: int) -> None:
        """Has a domain be gone soon."""
        try:
            self.xl("destroy", str(domid), timeout=SLOW)
        except CommandError:
            # Of one that has shut down, the xl that looks after it may have been faster.
            if any(domain.domid == domid and domain.state != "dying" for domain in self.domains()):
                raise

    def shutdown(self, domid: int) -> None:
        """Asks the guest to shut down; a guest without PV drivers by an ACPI event."""
        self.xl("shutdown", "-F", str(domid))

    def power_button(self, domid: int) -> None:
        self.xl("trigger", str(domid), "power")

    def pause(self, domid: int) -> None:
        self.xl("pause", str(domid))

    def unpause(self, domid: int) -> None:
        self.xl("unpause", str(domid))

    def rename(self, domid: int, name: str) -> None:
        self.xl("rename", str(domid), name)

    def resume(self, domid: int) -> None:
        """Resumes a suspended domain.

        xl 4.17 has no command for that. But "xl save -c" ends in libxl_domain_resume() whether it
        can save or not; a suspended guest does not answer the request to suspend, so it takes a
        minute and more, and the exit code says nothing. The caller looks at the domain's state.
        """
        with suppress(CommandError):
            self.xl("save", "-c", str(domid), "/dev/null", timeout=1800.0)

    def migrate_recover(self, domid: int) -> None:
        """Ends a zero-copy migration whose xl is gone, on this side; a command of our patched xl."""
        self.xl("migrate-recover", str(domid), timeout=SLOW)

    def monitor(self, domid: int, command: str) -> str:
        """Gives a command to the monitor of a domain's QEMU and returns what it prints.

        xl's exit code is 0 also if QEMU refuses: the caller looks at the output.
        """
        return self.xl("qemu-monitor-command", str(domid), command).replace("\r", "").strip()
