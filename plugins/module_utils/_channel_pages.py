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

import ctypes
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
# Python's mmap() has no way to say where; asm-generic/mman-common.h.
_MAP_FIXED = 0x10
_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
#: VIRQ_ZEROCOPY, xen/include/public/memory.h.
_VIRQ = 17


def runs(offsets: list[int], starts: set[int]) -> list[tuple[int, int, int]]:
    """Pages that can be mapped at once: index of the first, how many, and the first one's offset.

    They were allocated at once, and the file has them side by side. starts: the first offset of each allocation; when
    Linux unmaps pages of two, it frees those that it has allocated in between for whomever (gntalloc_vma_close()).
    """
    found: list[tuple[int, int, int]] = []
    for index, offset in enumerate(offsets):
        if found and offset == found[-1][2] + found[-1][1] * PAGE and offset not in starts:
            found[-1] = (found[-1][0], found[-1][1] + 1, found[-1][2])
        else:
            found.append((index, 1, offset))
    return found


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
    EBUSY if too many pages are in use elsewhere: it may be called again, later.
    """

    #: All of it, once join() has returned True.
    memory: memoryview

    def __init__(self, sessions: GuestSessions, session: Session) -> None:
        self._sessions = sessions
        self.session = session.session
        self.frames = session.max_frames
        self.side = 0 if session.role == "source" else 1
        self._file = os.open(_GNTALLOC, os.O_RDWR | os.O_CLOEXEC)
        self._joined = False
        self._starts: set[int] = set()
        self._mapped: tuple[int, int] | None = None
        try:
            # First: if there are not enough now, the session is still to be had later.
            self._pages = self._allocate(self.frames)
        except BaseException:
            self._release()
            raise
        try:
            sessions.open(self.session, session.role)
        except BaseException:
            self.end()
            raise

    def _allocate(self, count: int) -> list[tuple[int, int]]:
        """Grant references of new pages, and where the file has them."""
        # Granted to this dom0 itself, whose process it is; nobody maps the grants.
        request = bytearray(_ALLOC.pack(0, _WRITABLE, count, 0) + bytes(4 * count))
        fcntl.ioctl(self._file, _ALLOC_GREF, request)
        _domid, _flags, _count, offset = _ALLOC.unpack_from(request)
        self._starts.add(offset)
        grefs = struct.unpack_from(f"={count}I", request, _ALLOC.size)
        return [(gref, offset + index * PAGE) for index, gref in enumerate(grefs)]

    def join(self) -> bool:
        """Makes the memory shared, as far as the other side has done its part; returns whether all of it is."""
        while not self._joined:
            self._sessions.prepare(self.session)
            shared = self._sessions.share(self.session, [gref for gref, _offset in self._pages])
            if shared.busy:
                self._replace(shared.busy)
            elif shared.missing:
                return False
            else:
                self._map()
                self._joined = True
        return True

    def _replace(self, busy: list[int]) -> None:
        """Takes other pages. The old ones are given back when all are found, so that they are not found again."""
        try:
            fresh = self._allocate(len(busy))
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            raise OSError(errno.EBUSY, f"{len(busy)} pages of the channel are in use by a device model") from exc
        for index, page in zip(busy, fresh, strict=True):
            self._pages[index] = page

    def _map(self) -> None:
        """Maps the pages side by side, and gives back those that are not needed."""
        size = self.frames * PAGE
        # Reserves the range, which is then taken piece by piece; and ends the mapping of all when it goes.
        whole = mmap.mmap(-1, size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
        flags = mmap.MAP_SHARED | _MAP_FIXED
        for first, count, offset in runs([offset for _gref, offset in self._pages], self._starts):
            at = start + first * PAGE
            if _mmap(at, count * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file, offset) != at:
                code = ctypes.get_errno()
                raise OSError(code, f"pages of the channel cannot be mapped: {os.strerror(code)}")
        self.memory = memoryview(whole)
        self._mapped = start, size
        self._release()

    def _release(self) -> None:
        """Gives back pages that are not mapped."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def notify(self) -> None:
        self._sessions.notify(self.session)

    def end(self) -> None:
        """Gives the shared memory back to whom it belongs. May be called at any time, and again.

        Whoever still has a view of it, sees other memory then.
        """
        try:
            for step in (self._sessions.abort, self._sessions.close_session):
                try:
                    step(self.session)
                except OSError as exc:
                    if exc.errno not in (errno.ENOENT, errno.ENOTCONN):
                        raise
        finally:
            self._release()
            if self._mapped:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
                _mmap(*self._mapped, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
                self._mapped = None
