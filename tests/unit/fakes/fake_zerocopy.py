# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A fake libxenctrl, of the calls for zero-copy."""

from __future__ import annotations

import ctypes
import errno
from types import SimpleNamespace

OPEN, COMMITTING, COMMITTED, ABORTED = 1, 2, 3, 5


class FakeLibrary:
    """What xc_zerocopy_* do with the sessions of a host hypervisor, all at once."""

    def __init__(self) -> None:
        self.sessions: dict[int, SimpleNamespace] = {}
        self.errors: dict[str, int] = {}
        self.guest = False
        self.kept: set[int] = set()
        self.xc_interface_open = lambda *_arguments: 1
        self.xc_interface_open.restype = None

    def add(self, source, destination, state=OPEN, offered=0, max_frames=1 << 20) -> int:
        number = max(self.sessions, default=0) + 1
        self.sessions[number] = SimpleNamespace(
            source=source, destination=destination, state=state, offered=offered, max_frames=max_frames
        )
        return number

    def _end(self, name: str, error: int = 0) -> int:
        error = self.errors.get(name, error)
        ctypes.set_errno(error)
        return -1 if error else 0

    def xc_interface_close(self, _handle) -> None:
        pass

    def xc_zerocopy_bind(self, _handle, source, destination, max_frames, _flags, session) -> int:
        if "bind" not in self.errors:
            session._obj.value = self.add(source.value, destination.value, max_frames=max_frames.value)
        return self._end("bind")

    def xc_zerocopy_query(self, _handle, session, flags, source, destination, info) -> int:
        wanted = session.value
        if flags.value == 1 << 2:
            wanted = min((number for number in self.sessions if number > wanted), default=0)
        if wanted not in self.sessions:
            return self._end("query", errno.ENOENT)
        found = self.sessions[wanted]
        source._obj.value, destination._obj.value = found.source, found.destination
        for name, value in {"session": wanted, **vars(found)}.items():
            if hasattr(info._obj, name):
                setattr(info._obj, name, value)
        return self._end("query")

    def xc_zerocopy_guest_capable(self, _handle, _info) -> int:
        return self._end("guest_capable", 0 if self.guest else errno.EOPNOTSUPP)

    def xc_zerocopy_guest_query(self, _handle, session, flags, owner, info) -> int:
        assert flags.value == 1 << 3
        host_flags, unused = ctypes.c_uint32(1 << 2), ctypes.c_uint32()
        result = self.xc_zerocopy_query(_handle, session, host_flags, *map(ctypes.byref, (unused, unused)), info)
        owner._obj.value = 7
        return result

    def xc_zerocopy_force_abort(self, _handle, session) -> int:
        found = self.sessions[session.value]
        if found.state == COMMITTED:
            return self._end("force_abort", errno.EISCONN)
        found.state = ABORTED
        return self._end("force_abort")

    def xc_zerocopy_unbind(self, _handle, session) -> int:
        if session.value in self.kept:
            return self._end("unbind", errno.EBUSY)
        if "unbind" not in self.errors:
            del self.sessions[session.value]
        return self._end("unbind")
