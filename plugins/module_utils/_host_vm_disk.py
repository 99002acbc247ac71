# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Disks that the host dom0 plugs into a running host VM, by the monitor of its device model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandError,
    Conflict,
    InvalidInput,
    VmbeamError,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain, Drive
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline, wait_for
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

# The SCSI controller that every host VM is created with, and the prefix of what hangs on it.
CONTROLLER = "vmbeam"
PREFIX = f"{CONTROLLER}-"

_WARNING = re.compile(r"warning: ")

# Names that the kernel gives in the order in which it finds devices.
_FOUND = re.compile(
    r"/dev/(?:(?:sd|hd|vd|xvd)[a-z]+\d*|nvme\d+(?:c\d+)?n\d+(?:p\d+)?|(?:dm-|loop|nbd|rbd|zd)\d+(?:p\d+)?)"
)


def is_stable(path: str) -> bool:
    """Whether a path names the same disk after a reboot, when playbooks/repair.yml attaches what was recorded."""
    return not _FOUND.fullmatch(path)


def guest_drives(drives: Iterable[Drive]) -> dict[str, Drive]:
    """The drives of guest disks, by disk id, attached or not."""
    return {drive.name.removeprefix(PREFIX): drive for drive in drives if drive.name.startswith(PREFIX)}


def guest_disks(drives: Iterable[Drive]) -> dict[str, str]:
    """The paths of the attached guest disks, by disk id."""
    return {disk: drive.path for disk, drive in guest_drives(drives).items() if drive.attached}


def plug_in(
    xl: Xl,
    host_vm: str,
    domain: Domain | None,
    disk: str,
    path: str,
    deadline: Deadline,
    *,
    options: tuple[str, str] = ("host_vm", "path"),
    check: bool = False,
) -> Drive | None:
    """Attaches a disk to a host VM, the domain, if it is not attached; returns as what it was seen before.

    `options` are the module's that have host_vm and path. Raises InvalidInput, Conflict, CommandError.
    """
    if not os.path.exists(path):
        raise InvalidInput(f"{options[1]}: {path} does not exist on this host. Create the disk, or correct the path.")
    if domain is None or not domain.live:
        raise Conflict(f"{options[0]}: {host_vm} is {domain.state if domain else 'absent'}. Start it first.")
    target = HostVmDisk(xl, domain.domid, disk)
    seen = target.observe()
    target.check(seen, path)
    if not (seen and seen.attached) and not check:
        target.attach(path, deadline)
    return seen


class HostVmDisk:
    """One guest disk of one host VM; disk is the disk's id, domid the host VM's."""

    def __init__(self, xl: Xl, domid: int, disk: str) -> None:
        self._xl = xl
        self._domid = domid
        self._disk = disk
        self._name = PREFIX + disk

    def observe(self) -> Drive | None:
        return next((drive for drive in self._xl.drives(self._domid) if drive.name == self._name), None)

    def check(self, seen: Drive | None, path: str) -> None:
        """Raises Conflict if the disk is attached with another path."""
        if seen and seen.attached and seen.path != path:
            raise Conflict(
                f"disk: {self._disk} is attached already, with path {seen.path}. Detach it first, or use another id."
            )

    def attach(self, path: str, deadline: Deadline) -> None:
        """Attaches the disk; after a failure nothing of it is left. Raises Conflict, CommandError."""
        seen = self.observe()
        self.check(seen, path)
        if seen and seen.attached:
            return
        if seen:  # left by an attempt that was interrupted; its path or options may differ
            self.detach(deadline)
        # Through the page cache, which the device models of all host VMs share, so that they see the
        # same content: direct I/O fails (EFAULT), as the kernel cannot pin another domain's memory.
        # The guest's flushes reach the disk.
        self._order(f"drive_add 0 if=none,id={self._name},file={path},format=raw,cache=writeback", expect="OK")
        try:
            self._order(
                f"device_add scsi-hd,bus={CONTROLLER}.0,drive={self._name},id={self._name},"
                f"serial={self._disk},share-rw=on"
            )
            wait_for(self._is_attached, deadline, f"disk {self._disk} to be attached")
        except VmbeamError as exc:
            try:
                self.detach(Deadline(deadline.seconds, deadline.clock))
            except VmbeamError as undo:
                exc.details["left_behind"] = f"The drive {self._name} may be left in the host VM: {undo.message}"
            raise

    def detach(self, deadline: Deadline) -> None:
        """Detaches the disk if it is there. Raises WaitTimeout if the device does not go."""
        seen = self.observe()
        if seen is None:
            return
        if seen.attached:
            self._unless_gone(f"device_del {self._name}")
            wait_for(lambda: not self._is_attached(), deadline, f"disk {self._disk} to be unplugged")
        # QEMU drops the drive together with its device, unless no device was ever attached. Dropped
        # before the device, it would stay behind as a zombie that blocks the id.
        if self.observe() is not None:
            self._unless_gone(f"drive_del {self._name}")
            wait_for(lambda: self.observe() is None, deadline, f"the drive of disk {self._disk} to be closed")

    def _is_attached(self) -> bool:
        seen = self.observe()
        return seen is not None and seen.attached

    def _unless_gone(self, command: str) -> None:
        """Gives a removing command; that QEMU knows the object no more is as good as success."""
        try:
            self._order(command)
        except CommandError as exc:
            if "not found" not in exc.message:
                raise

    def _order(self, command: str, expect: str = "") -> None:
        """Gives a command; raises CommandError with QEMU's words if it says anything but what is expected."""
        said = [line for line in self._xl.monitor(self._domid, command).splitlines() if not _WARNING.match(line)]
        if "\n".join(said) != expect:
            raise CommandError(
                f"disk {self._disk}: QEMU refused {command.split()[0]}: {' '.join(said) or 'it said nothing'}",
                monitor_command=command,
            )
