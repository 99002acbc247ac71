# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The libxenctrl that belongs to the running hypervisor."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import XenUnavailable

VERSION = Path("/sys/hypervisor/version")


def library(version: Path = VERSION) -> Any:
    """Loads it. Raises XenUnavailable, or OSError if it is not installed."""
    try:
        major, minor = ((version / part).read_text().strip() for part in ("major", "minor"))
    except OSError as exc:
        raise XenUnavailable("No Xen runs below this system. Run this in a dom0.") from exc
    return ctypes.CDLL(f"libxenctrl.so.{major}.{minor}", use_errno=True)


class CpuTimes:
    """The CPU time of domains, to the nanosecond: an idle guest needs minutes for the tenths of seconds of xl."""

    def __init__(self, loaded: Any, handle: int) -> None:
        self._library = loaded
        self._handle = ctypes.c_void_p(handle)

    def seconds(self, domid: int, vcpus: int) -> float | None:
        """What the first `vcpus` virtual CPUs of a domain have used; None if that cannot be learnt."""
        used = [
            self._library.xc_domain_get_cpu_usage(self._handle, ctypes.c_uint32(domid), ctypes.c_int(number))
            for number in range(vcpus)
        ]
        return None if not used or min(used) < 0 else sum(used) / 1e9


@contextlib.contextmanager
def cpu_times() -> Iterator[CpuTimes | None]:
    """Opens the way to CPU times; None if there is none."""
    try:
        loaded = library()
        loaded.xc_interface_open.restype = ctypes.c_void_p
        loaded.xc_domain_get_cpu_usage.restype = ctypes.c_longlong
        handle = loaded.xc_interface_open(None, None, 0)
    except (OSError, AttributeError, XenUnavailable):
        handle = None
    if not handle:
        yield None
        return
    try:
        yield CpuTimes(loaded, handle)
    finally:
        loaded.xc_interface_close(ctypes.c_void_p(handle))
