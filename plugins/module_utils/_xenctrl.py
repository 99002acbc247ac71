# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The libxenctrl that belongs to the running hypervisor."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import XenUnavailable

VERSION = Path("/sys/hypervisor/version")


def library(version: Path = VERSION) -> Any:
    """Loads it. Raises XenUnavailable, or OSError if it is not installed."""
    try:
        major, minor = ((version / part).read_text().strip() for part in ("major", "minor"))
    except OSError as exc:
        raise XenUnavailable("No Xen runs below this system. Run this in a dom0.") from exc
    return ctypes.CDLL(f"libxenctrl.so.{major}.{minor}", use_errno=True)


class Interface:
    """An open handle of libxenctrl; raises XenUnavailable. To be closed, or used by `with`."""

    def __init__(self, loaded: Any) -> None:
        loaded.xc_interface_open.restype = ctypes.c_void_p
        handle = loaded.xc_interface_open(None, None, 0)
        if not handle:
            raise XenUnavailable(
                f"Cannot talk to the hypervisor: {os.strerror(ctypes.get_errno())}. Run this as root of a dom0."
            )
        self._library = loaded
        self._handle = ctypes.c_void_p(handle)

    def invoke(self, name: str, *arguments: Any) -> Any:
        """Calls a function that takes a handle first; what it returns. ctypes.get_errno() has the errno it has set."""
        return getattr(self._library, name)(self._handle, *arguments)

    def close(self) -> None:
        self._library.xc_interface_close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class CpuTimes(Interface):
    """The CPU time of domains, to the nanosecond: an idle guest needs minutes for the tenths of seconds of xl."""

    def __init__(self, loaded: Any) -> None:
        loaded.xc_domain_get_cpu_usage.restype = ctypes.c_longlong
        super().__init__(loaded)

    def seconds(self, domid: int, vcpus: int) -> float | None:
        """What the first `vcpus` virtual CPUs of a domain have used; None if that cannot be learnt."""
        used = [
            self.invoke("xc_domain_get_cpu_usage", ctypes.c_uint32(domid), ctypes.c_int(number))
            for number in range(vcpus)
        ]
        return None if not used or min(used) < 0 else sum(used) / 1e9


@contextlib.contextmanager
def cpu_times() -> Iterator[CpuTimes | None]:
    """Opens the way to CPU times; None if there is none."""
    try:
        opened = CpuTimes(library())
    except (OSError, AttributeError, XenUnavailable):
        yield None
        return
    with opened:
        yield opened
