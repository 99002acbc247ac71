# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What the host dom0 keeps of the guests in its host VMs, so that they can be started again when a host VM is lost.

A host VM is started from the golden image each time: what is in it, the guests' configurations too, is gone with it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput, UnexpectedOutput
from ansible_collections.vmbeam.xen.plugins.module_utils._file_lock import locked_folder
from ansible_collections.vmbeam.xen.plugins.module_utils._files import write_private
from ansible_collections.vmbeam.xen.plugins.module_utils._guest import BY_ID, name_in

FILE = "guests.json"

# Seconds that another module may take to read and write the file.
PATIENCE = 30.0

# A guest in one of these states had ended before its host VM did.
ENDED = ("shutdown", "crashed", "dying")

_TARGET = re.compile(re.escape(BY_ID) + r"(?P<disk>[A-Za-z0-9._-]+)")


@dataclass(frozen=True)
class Guest:
    """A guest as it was seen. runs: whether it had a domain that had not ended; disks: ids.

    config: path and content of its xl configuration, None if it is not known.
    """

    name: str
    runs: bool
    disks: list[str]
    config: dict[str, str] | None


@dataclass(frozen=True)
class Entry:
    """One generation of a host VM. disks: path in the host dom0 by id; noted: ISO 8601 in UTC."""

    host_vm: str
    generation: int
    noted: str
    disks: dict[str, str]
    guests: list[Guest]

    @property
    def identity(self) -> tuple[str, int]:
        return self.host_vm, self.generation

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(
    host_vm: tuple[str, int],
    noted: str,
    disks: Mapping[str, str] | None,
    guests: Iterable[Mapping[str, Any]],
    configurations: Iterable[Mapping[str, str]],
    known: Sequence[Entry],
) -> Entry:
    """The entry of a host VM that runs.

    host_vm: name and generation; disks: None if they are not known; guests and configurations: as guest_info returns
    them. What cannot be seen now and was known before is taken from the entries in known.
    """
    earlier: dict[str, str] = {disk: path for entry in known for disk, path in entry.disks.items()}
    configs: dict[str, dict[str, str]] = {
        guest.name: guest.config for entry in known for guest in entry.guests if guest.config
    }
    found: dict[str, dict[str, str]] = {}
    for file in configurations:
        name = name_in(file["content"])
        if name:
            found[name] = {"path": file["path"], "content": file["content"]}
    runs: dict[str, bool] = {}
    ids: dict[str, list[str]] = {}
    for guest in guests:
        name = _base(guest["name"])
        runs[name] = runs.get(name, False) or guest.get("state") not in ENDED
        ids[name] = [str(disk["id"]) for disk in guest.get("disks") or [] if disk.get("id")]
    entries = []
    for name in sorted(runs.keys() | found.keys()):
        if not _is_name(name):
            continue
        config = found.get(name) or (configs.get(name) if name in runs else None)
        named = _TARGET.findall(config["content"]) if config else []
        entries.append(Guest(name, runs.get(name, False), sorted({*named, *ids.get(name, [])}), config))
    if disks is None:
        used = {disk for guest in entries for disk in guest.disks}
        disks = {disk: path for disk, path in earlier.items() if disk in used}
    return Entry(*host_vm, noted, dict(disks), entries)


def renewed(
    record: Sequence[Entry], seen: Sequence[Entry], running: Collection[tuple[str, int]], gone: Collection[str]
) -> list[Entry]:
    """The record after host VMs were looked into.

    Of a host VM that is lost, those guests are kept of which seen has no copy and which are not in gone: they are still
    to be started, or if they did not run, to be configured. running: all that run, by name and generation.
    """
    up = {guest.name for entry in seen for guest in entry.guests if guest.runs}
    there = {guest.name for entry in seen for guest in entry.guests}
    fresh = {entry.identity: entry for entry in seen}
    result = []
    for entry in record:
        if entry.identity in fresh:
            continue
        if entry.identity not in running:
            left = [guest for guest in entry.guests if guest.name not in (up if guest.runs else there) | {*gone}]
            # Where nothing was looked into, that a host VM had no guests is still worth knowing.
            if seen and not left:
                continue
            entry = replace(entry, guests=left)
        result.append(entry)
    for entry in fresh.values():
        same = next((old for old in record if old.identity == entry.identity), None)
        # When it was last seen unchanged is nothing that a second run should write.
        result.append(same if same and replace(same, noted=entry.noted) == entry else entry)
    return sorted(result, key=lambda entry: (entry.generation, entry.host_vm))


class GuestRecord:
    """The record in a folder of host VMs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def read(self) -> list[Entry]:
        """Raises UnexpectedOutput if the record is damaged."""
        try:
            stored = json.loads(self.path.read_text())
            return [
                Entry(**{**entry, "guests": [Guest(**guest) for guest in entry["guests"]]})
                for entry in stored["host_vms"]
            ]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError) as exc:
            raise UnexpectedOutput(
                f"{self.path} is damaged: {exc}. Move it away; it is written anew from the guests that run.", output=""
            ) from exc

    def write(self, entries: Sequence[Entry]) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stored = {"host_vms": [entry.as_dict() for entry in entries]}
        write_private(self.path, (json.dumps(stored, indent=2) + "\n").encode())

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps other writers out. The folder must exist. Raises WaitTimeout."""
        with locked_folder(self.path.parent, PATIENCE, f"others that use {self.path}"):
            yield

    def forget(self, host_vm: str, generation: int) -> None:
        """Drops a host VM that was removed on purpose."""
        if not self.path.exists():
            return
        with self.exclusive():
            entries = self.read()
            left = [entry for entry in entries if entry.identity != (host_vm, generation)]
            if left != entries:
                self.write(left)


def _base(domain: str) -> str:
    """The guest that a domain is a copy of: a migration renames copies."""
    for suffix in _checks.MIGRATION_SUFFIXES:
        domain = domain.removesuffix(suffix)
    return domain


def _is_name(name: str) -> bool:
    """A host VM is not trusted to name its domains well."""
    try:
        _checks.domain_name("name", name)
    except InvalidInput:
        return False
    return True
