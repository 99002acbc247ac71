# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""An append-only log of JSON lines: root's alone, bounded in size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._file_lock import locked_folder

# Another writer holds the log for as long as one line takes.
LOCK_SECONDS = 10.0


def line_of(entry: dict[str, Any]) -> str:
    """Returns entry as one line. Whatever is in it cannot begin another one: control characters are escaped."""
    return json.dumps(entry, separators=(",", ":"))


def append(path: Path, line: str, max_bytes: int, keep: int) -> None:
    """Appends line to the log at path, and makes the log and its folder if there is none.

    A log that would exceed max_bytes becomes path.1 first, path.1 becomes path.2, and so on; `keep` of these are
    kept. Raises OSError, and WaitTimeout if another writer does not let go of the log; nothing of the line stays then.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = f"{line}\n".encode()
    # The folder, as the log itself may be renamed meanwhile.
    with locked_folder(path.parent, LOCK_SECONDS, f"the lock of {path.parent}, which another writer holds"):
        if path.exists() and path.stat().st_size + len(data) > max_bytes:
            _rotate(path, keep)
        # Never through a link: root would append to whatever it names.
        log = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(log, 0o600)
            size = os.fstat(log).st_size
            # A power cut may have left half a line, which would swallow this one.
            if size > 0 and os.pread(log, 1, size - 1) != b"\n":
                data = b"\n" + data
            written = os.write(log, data)
            if written != len(data):
                os.ftruncate(log, size)
                raise OSError(f"{path}: only {written} of {len(data)} bytes could be written")
            os.fsync(log)
        finally:
            os.close(log)


def _rotate(path: Path, keep: int) -> None:
    for number in range(keep, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
        if newer.exists():
            newer.replace(older)
