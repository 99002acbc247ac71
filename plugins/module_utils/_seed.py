# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The seed disk: a plain tar archive from which a host VM takes its identity at boot."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput

_MODE = re.compile(r"0?[0-7]{3,4}")


@dataclass(frozen=True)
class SeedFile:
    """A file that the host VM unpacks to its root. The content may be secret."""

    path: str
    content: str = field(repr=False)
    mode: int = 0o644


def seed_file(path: str, content: str, mode: str) -> SeedFile:
    """Checks the arguments of a seed file; mode is octal digits. Raises InvalidInput."""
    parts = path.split("/")[1:]
    if not path.startswith("/") or not all(parts) or ".." in parts or "." in parts or "\0" in path:
        raise InvalidInput(f"seed_files: path {path!r} must be absolute and must not contain '.' or '..'.")
    if not _MODE.fullmatch(mode):
        raise InvalidInput(f"seed_files: mode {mode!r} of {path} must be octal digits in quotes, such as '0644'.")
    return SeedFile(path, content, int(mode, 8))


def archive(files: Iterable[SeedFile]) -> bytes:
    """The tar archive; equal files give equal bytes. Its size is a multiple of a disk's sectors.

    Raises InvalidInput if a path is given twice.
    """
    by_path: dict[str, SeedFile] = {}
    for item in files:
        if item.path in by_path:
            raise InvalidInput(f"seed_files: {item.path} is given twice.")
        by_path[item.path] = item
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(by_path):
            data = by_path[path].content.encode()
            member = tarfile.TarInfo(path.lstrip("/"))
            member.size = len(data)
            member.mode = by_path[path].mode
            member.uname = member.gname = "root"
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
