# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Guests in a guest dom0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._checks import MIGRATION_SUFFIXES
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandError,
    Conflict,
    InvalidInput,
    VmbeamError,
    WaitTimeout,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import NO_NAME, Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline, wait_for
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

# How udev names a disk that host_vm_disk has plugged in; the disk's id follows.
BY_ID = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_"

_CONFIG_NAME = re.compile(r"""^\s*name\s*=\s*(["'])(?P<name>[^"'\n]*)\1""", re.MULTILINE)


def describe(domain: Domain, config: Mapping[str, Any]) -> dict[str, Any]:
    """The guest as modules return it; config is libxl's JSON, empty if xl has none."""
    return {
        "name": domain.name,
        "domid": domain.domid,
        "uuid": domain.uuid,
        "state": domain.state,
        "type": config.get("c_info", {}).get("type"),
        "memory_mb": domain.memory_mb,
        "vcpus": domain.vcpus,
        "cpu_time": domain.cpu_time,
        "disks": [
            {"id": _disk_id(disk.get("pdev_path")), "target": disk.get("pdev_path"), "vdev": disk.get("vdev")}
            for disk in config.get("disks", [])
        ],
        "nics": [{"mac": nic.get("mac"), "bridge": nic.get("bridge")} for nic in config.get("nics", [])],
        "devices": _devices(config),
        "cpu_affinity": config.get("b_info", {}).get("vcpu_hard_affinity", []),
        "migratable": config.get("b_info", {}).get("disable_migrate") != "True",
    }


def _devices(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """The devices of the host that the guest has to itself; libxl leaves out values that are 0."""
    pci = [
        f"{device.get('domain', 0):04x}:{device.get('bus', 0):02x}:{device.get('dev', 0):02x}.{device.get('func', 0):x}"
        for device in config.get("pcidevs", [])
    ]
    usb = [f"{device.get('ctrl', 0)}-{device.get('port', 0)}" for device in config.get("usbdevs", [])]
    tree = [str(device.get("path")) for device in config.get("dtdevs", [])]
    return [{"type": kind, "id": one} for kind, ids in (("pci", pci), ("usb", usb), ("dt", tree)) for one in ids]


def _disk_id(target: str | None) -> str | None:
    return target.removeprefix(BY_ID) if target and target.startswith(BY_ID) else None


def config_name(path: str) -> str:
    """The guest's name in an xl configuration file. Raises InvalidInput."""
    try:
        found = name_in(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInput(f"config: {path} cannot be read on this host: {exc}.") from exc
    if found is None:
        raise InvalidInput(f"config: {path} has no line 'name = \"...\"'. Add it: the guest is known by its name.")
    return found


def name_in(text: str) -> str | None:
    """The guest's name in the text of an xl configuration, None if it has none."""
    found = _CONFIG_NAME.findall(text)
    return str(found[-1][1]) if found else None


class Guests:
    """The guests of this dom0."""

    def __init__(self, xl: Xl) -> None:
        self._xl = xl

    def all(self) -> list[dict[str, Any]]:
        """All guests that have a name; one without is just being made or destroyed."""
        domains = [domain for domain in self._xl.domains() if domain.name != NO_NAME]
        configs = self._xl.configs() if domains else {}
        return [describe(domain, configs.get(domain.domid, {})) for domain in domains]

    def find(self, name: str) -> Domain | None:
        """Raises Conflict if the name is given twice, as after a mistaken "xl rename"."""
        found = [domain for domain in self._xl.domains() if domain.name == name]
        if len(found) > 1:
            raise Conflict(f"name: {len(found)} domains have the name {name}. Rename or destroy all but one by hand.")
        return found[0] if found else None

    def describe(self, domain: Domain | None) -> dict[str, Any] | None:
        return describe(domain, self._xl.configs().get(domain.domid, {})) if domain else None

    def plan(self, name: str, state: str, config: str | None) -> tuple[Domain | None, str | None]:
        """The guest and the step that leads to state: create, pause, unpause, remove or None.

        Raises Conflict or InvalidInput if there is no safe step.
        """
        domains = self._xl.domains()
        guest = self.find(name)
        if state == "absent":
            return guest, "remove" if guest else None
        if guest is None:
            self._check_creatable(name, config, domains)
            return None, "create"
        if guest.live:
            return guest, "pause" if state == "paused" else None
        if guest.state == "paused":
            return guest, "unpause" if state == "running" else None
        raise Conflict(
            f"name: {name} is {guest.state} and cannot become {state}. If it is a leftover of a migration, run "
            "guest_migrate again; else remove it with state=absent first."
        )

    @staticmethod
    def _check_creatable(name: str, config: str | None, domains: list[Domain]) -> None:
        if not config:
            raise InvalidInput(f"config: {name} does not exist here, so the path of its xl configuration is needed.")
        for domain in domains:
            if domain.name in [name + suffix for suffix in MIGRATION_SUFFIXES]:
                raise Conflict(
                    f"name: a migration of {name} has not ended: {domain.name} exists. Run guest_migrate again; "
                    "starting a second copy could destroy the guest's disks."
                )
        written = config_name(config)
        if written != name:
            raise InvalidInput(f"config: {config} is the configuration of {written!r}, not of {name!r}.")

    def create(self, name: str, config: str, deadline: Deadline, *, paused: bool) -> None:
        """Starts a guest; a half-made one is destroyed after a failure."""
        try:
            self._xl.create(config, paused=paused, timeout=max(1.0, deadline.left))
        except VmbeamError as exc:
            try:
                half = self.find(name)
                if half:
                    self._xl.destroy(half.domid)
            except VmbeamError as undo:
                exc.details["left_behind"] = f"Undoing the start failed too, {name} may be left: {undo}"
            raise

    def remove(self, domain: Domain, deadline: Deadline, *, graceful: bool, forced: bool = True) -> None:
        """Shuts the guest down if graceful, and destroys what is left.

        Unless forced, a guest that does not shut down is left as it is: raises WaitTimeout or CommandError.
        """
        if graceful and domain.live:
            try:
                self.ask_to_shut_down(domain)
                wait_for(lambda: not self._is_live(domain.domid), deadline, f"{domain.name} to shut down")
            except (WaitTimeout, CommandError):
                if not forced:
                    raise
        if self._exists(domain.domid):
            self._xl.destroy(domain.domid)
            wait_for(
                lambda: not self._exists(domain.domid),
                Deadline(60.0, deadline.clock),
                f"{domain.name} to be destroyed",
            )

    def ask_to_shut_down(self, domain: Domain) -> None:
        self._xl.shutdown(domain.domid)

    def pause(self, domain: Domain) -> None:
        self._xl.pause(domain.domid)

    def unpause(self, domain: Domain) -> None:
        self._xl.unpause(domain.domid)

    def _exists(self, domid: int) -> bool:
        return any(domain.domid == domid and domain.state != "dying" for domain in self._xl.domains())

    def _is_live(self, domid: int) -> bool:
        return any(domain.domid == domid and domain.live for domain in self._xl.domains())
