# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""A machine's lock: a file in its host dom0 that says which run may change the machine, and until when."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import Conflict
from ansible_collections.vmbeam.xen.plugins.module_utils._file_lock import locked_folder
from ansible_collections.vmbeam.xen.plugins.module_utils._files import write_private
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Clock

# Gone after a reboot, like whatever the lock protected from a second run.
DEFAULT_PATH = "/run/vmbeam/host-lock.json"
# Seconds that another module may take to read and write the file.
PATIENCE = 30
# The option `lock` of a module, as the documentation fragment of that name has it.
LOCK_OPTION = {
    "type": "dict",
    "options": {
        "owner": {"type": "str", "required": True},
        "ttl": {"type": "int", "default": 3600},
        "details": {"type": "dict", "default": {}},
        "path": {"type": "path", "default": DEFAULT_PATH},
    },
}


class BootClock(Clock):
    """Seconds since the machine was booted: the same for all processes, and nobody sets it."""

    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclasses.dataclass(frozen=True)
class Lock:
    """Who has the machine. Times are in seconds since its boot."""

    owner: str
    details: dict[str, Any]
    since: float
    expires: float

    def expired(self, now: float) -> bool:
        return now >= self.expires

    def as_dict(self, now: float) -> dict[str, Any]:
        moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=now - self.since)
        return {
            "owner": self.owner,
            "details": self.details,
            "since": moment.isoformat(timespec="seconds"),
            "age_seconds": round(now - self.since, 1),
            "expires_in_seconds": round(self.expires - now, 1),
            "expired": self.expired(now),
        }


class HostLock:
    """The lock in the file `path`; use it as a context, in which nobody else reads or changes it."""

    def __init__(self, path: str = DEFAULT_PATH, clock: Clock | None = None) -> None:
        self._path = Path(path)
        self.clock = clock or BootClock()

    @contextlib.contextmanager
    def exclusive(self, make_folder: bool = True) -> Iterator[None]:
        """Keeps others from the file. Raises WaitTimeout if somebody else does so for long."""
        if not self._path.parent.exists():
            if not make_folder:  # nobody can have a lock there
                yield
                return
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The folder, not the file: that one is replaced at each change.
        with locked_folder(self._path.parent, PATIENCE, f"others that use {self._path}"):
            yield

    def holder(self) -> Lock | None:
        """Who has the machine, whether expired or not. Raises Conflict if the file cannot be read as a lock."""
        try:
            stored = json.loads(self._path.read_text())
            return Lock(**stored)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as exc:
            raise Conflict(
                f"{self._path} is not a lock of this collection ({exc}). If no run is under way, remove that file."
            ) from exc

    def keep(self, owner: str, ttl: float, details: dict[str, Any], *, check: bool = False) -> tuple[Lock, Lock, float]:
        """Renews the owner's lock; to be called within exclusive(). Returns it as it was and is, and the time.

        Raises Conflict if the owner has not got it any more.
        """
        held, now = self.holder(), self.clock.now()
        if held is None or held.owner != owner:
            raise Conflict(
                f"This machine is not reserved for {owner} any more, and another run may have changed it since. Run "
                "again: it continues from what it finds.",
                holder=held.as_dict(now) if held else None,
            )
        lock = Lock(owner, details, held.since, now + ttl)
        if not check:
            self.write(lock)
        return held, lock, now

    def write(self, lock: Lock) -> None:
        write_private(self._path, json.dumps(dataclasses.asdict(lock)).encode())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def keep_reserved(lock: dict[str, Any] | None, *, check: bool = False) -> None:
    """Renews the lock that a module's option `lock` describes, if it is given. Raises Conflict if it is lost."""
    if not lock:
        return
    file = HostLock(_checks.path("lock.path", lock["path"]))
    with file.exclusive(make_folder=not check):
        file.keep(lock["owner"].strip(), _checks.positive("lock.ttl", lock["ttl"]), lock["details"], check=check)
