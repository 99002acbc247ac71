# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The memory of a channel, and its interrupt, in a guest dom0.

See XEN_DOMCTL_zerocopy_guest in xen/include/public/domctl.h for what a channel is. The interfaces of Linux are those of
include/uapi/xen/gntalloc.h and evtchn.h.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct

from ansible_collections.vmbeam.xen.plugins.module_utils._channel_ring import PAGE
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import GuestSessions, Session

_GNTALLOC = "/dev/xen/gntalloc"
_EVTCHN = "/dev/xen/evtchn"
# struct ioctl_gntalloc_alloc_gref without its array, flag WRITABLE.
_ALLOC = struct.Struct("=HHIQ")
_WRITABLE = 1
_ALLOC_GREF = 0x184705
_BIND_VIRQ = 0x44500
#: VIRQ_ZEROCOPY, xen/include/public/memory.h.
_VIRQ = 17


class Interrupt:
    """VIRQ_ZEROCOPY. Only one process of a dom0 can have it: OSError EEXIST."""

    def __init__(self) -> None:
        self.fd = os.open(_EVTCHN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(self.fd, _BIND_VIRQ, struct.pack("=I", _VIRQ))
        except OSError:
            os.close(self.fd)
            raise

    def take(self) -> None:
        """Accepts what has come, so that more can come."""
        try:
            while ports := os.read(self.fd, 64):
                os.write(self.fd, ports)
        except BlockingIOError:
            pass


class Pages:
    """A channel that this dom0 takes part in, and its memory once the other side has lent it, or taken it.

    Every call may raise OSError: ENOTCONN when the channel was aborted or the other host VM is dead. join() raises
    EBUSY for as long as a device model holds on to a page.
    """

    def __init__(self, sessions: GuestSessions, session: Session) -> None:
        self._sessions = sessions
        self.session = session.session
        self.frames = session.max_frames
        self.side = 0 if session.role == "source" else 1
        sessions.open(self.session, session.role)
        try:
            self._allocate()
        except BaseException:
            self.end()
            raise
        self._missing = True

    def _allocate(self) -> None:
        fd = os.open(_GNTALLOC, os.O_RDWR | os.O_CLOEXEC)
        try:
            # Granted to this dom0 itself, whose process it is; nobody maps the grants.
            request = bytearray(_ALLOC.pack(0, _WRITABLE, self.frames, 0) + bytes(4 * self.frames))
            fcntl.ioctl(fd, _ALLOC_GREF, request)
            _domid, _flags, _count, index = _ALLOC.unpack_from(request)
            self._grefs = struct.unpack_from(f"={self.frames}I", request, _ALLOC.size)
            # The mapping keeps the memory when the descriptor is closed.
            self._map = mmap.mmap(
                fd, self.frames * PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=index
            )
        finally:
            os.close(fd)
        self.memory = memoryview(self._map)

    def join(self) -> bool:
        """Makes the memory shared, as far as the other side has done its part; returns whether all of it is."""
        if self._missing:
            self._sessions.prepare(self.session)
            self._missing = not self._sessions.share(self.session, self._grefs)
        return not self._missing

    def notify(self) -> None:
        self._sessions.notify(self.session)

    def end(self) -> None:
        """Gives the shared memory back to whom it belongs. May be called at any time, and again."""
        for step in (self._sessions.abort, self._sessions.close_session):
            try:
                step(self.session)
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.ENOTCONN):
                    raise
