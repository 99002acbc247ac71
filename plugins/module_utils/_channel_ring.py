# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Rings of frames in memory that two guest dom0s share.

Layout of the memory, which the source of the session lends, in pages of 4 KiB; all numbers are little-endian:

- page 0 is control: a Hello of each side, and for each ring four indices, each in a cache line of its own: what its
  writer has produced, what its reader has consumed, and past which index of the other each wants to be notified;
- then a ring for what the source sends, and one of the same size for what the destination sends.

An index counts bytes since the beginning and never wraps; it is written by one side only. A frame is a header
and a payload, side by side, each at a cache line; payloads wrap at the ring's end. The writer moves the index only past
whole frames.

The other side is not trusted: it can change any of this at any time. So each side keeps its own indices, checks
the other's at each use, and looks at a header only in a copy. Payloads are opaque here. x86 keeps the order in which
stores become visible; nothing else runs Xen with nested guests.

A notification costs both sides as much as copying hundreds of KiB, so only who waits is notified. Who is about to wait
publishes an index (ask()) and then looks again; the other side moves its own index and then looks at what is published
(due()). With a fence between the two steps of each, at least one of them sees what the other has done: no wake-up is
lost. Wrong values in there make notifications too many or too few for the side that wrote them, and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
import zlib
from collections.abc import Callable
from typing import NamedTuple

PAGE = 4096
MAGIC = 0x4C45_4E4E_4148_4342
VERSION = 3
#: Bytes of a frame's payload: what it takes to handle a frame, after whose payload nothing of the program is left in
#: the caches of the CPU, must be little beside copying it.
LIMIT = 1 << 20

# Kind, zero, stream, length, sequence, zero; then the checksum of that and of the payload; the rest of a cache line.
_HEADER = struct.Struct("<BBHIIIQ40x")
_CHECK = struct.Struct("<Q")
# Bytes of the header before the checksum.
_CHECKED = struct.calcsize("<BBHIII")
# Headers and payloads begin at cache lines: where it is not at a multiple of 16 bytes, copying a payload takes half as
# long again.
_LINE = 64
_HELLO = struct.Struct("<QII")
# In the control page, by sender: source, destination. Indices are at words of 64 bits, hellos at bytes.
_PRODUCED = (16, 32)
_CONSUMED = (24, 40)
_HELLOS = (512, 576)
# Likewise: past which index of the writer its reader wants to be notified, and the other way round.
_AWAITED_DATA = (80, 96)
_AWAITED_ROOM = (88, 104)
_LOCK = threading.Lock()


class ProtocolError(Exception):
    """The other side, or its memory, does not keep to the protocol."""


def geometry(frames: int) -> int:
    """The size of each ring, in bytes, in a channel of that many frames of 4 KiB; raises ProtocolError."""
    pages = (frames - 1) // 2
    if pages * PAGE < 2 * LIMIT:
        raise ProtocolError(f"A channel of {frames} frames is too small: at least {4 * LIMIT // PAGE + 1} are needed.")
    return pages * PAGE


class Frame(NamedTuple):
    """kind: see _channel_link. payload: one or two pieces of the shared memory, valid until Reader.release()."""

    kind: int
    stream: int
    length: int
    payload: tuple[memoryview, ...]

    def data(self) -> bytes:
        return b"".join(self.payload)


def _fence() -> None:
    """Has what was stored before become visible before anything after is loaded.

    x86 lets loads overtake stores, except past a locked instruction, which is what takes a lock that is free.
    """
    with _LOCK:
        pass


@functools.cache
def checksum() -> Callable[[int, int, int], int]:
    """XXH64 of libxxhash, of (address, length, seed); raises OSError if there is none.

    In a guest dom0 of the lab that is 7.4 GiB/s, where a copy has 2.7, the same algorithm in the kernel (AF_ALG) 1.3,
    zlib.adler32() 1.0 and zlib.crc32() 0.7. Debian's apt needs the library too.
    """
    function = ctypes.CDLL("libxxhash.so.0").XXH64
    function.restype = ctypes.c_uint64
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)
    return function


def _frame_size(length: int) -> int:
    """What a frame with such a payload takes."""
    return (_LINE + length + _LINE - 1) & -_LINE


class _Ring:
    def __init__(self, memory: memoryview, sender: int, size: int) -> None:
        self._words = memory[:PAGE].cast("Q")
        self._data = memory[PAGE + sender * size : PAGE + (sender + 1) * size]
        self._size = size
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._data))
        self._xxh64 = checksum()
        self._produced_at = _PRODUCED[sender]
        self._consumed_at = _CONSUMED[sender]
        self._awaited_data_at = _AWAITED_DATA[sender]
        self._awaited_room_at = _AWAITED_ROOM[sender]
        self._index = 0
        self._told = 0
        self._sequence = 0

    def _passed(self, awaited_at: int) -> bool:
        """Whether this side's index has passed the one that the other side waits for, since the last call."""
        if self._told == self._index:
            return False
        _fence()
        told, self._told = self._told, self._index
        return told <= self._words[awaited_at] < self._index

    def _pieces(self, index: int, length: int) -> tuple[memoryview, ...]:
        start = index % self._size
        over = start + length - self._size
        if over <= 0:
            return (self._data[start : start + length],)
        return (self._data[start:], self._data[:over])

    def _check(self, header: bytes, index: int, length: int) -> int:
        """The checksum of a header, without the checksum in it, and of the payload at an index."""
        check = zlib.crc32(header)  # of 16 bytes; the seed of the rest
        start = index % self._size
        over = start + length - self._size
        if over <= 0:
            return self._xxh64(self._start + start, length, check)
        return self._xxh64(self._start, over, self._xxh64(self._start + start, length - over, check))

    def _between(self, low: int, high: int) -> int:
        if not 0 <= high - low <= self._size:
            raise ProtocolError(f"Indices {low} and {high} do not fit a ring of {self._size} bytes.")
        return high - low


class Writer(_Ring):
    """The end that sends."""

    def room(self) -> int:
        """Bytes that the payload of a frame may have now, at most LIMIT; negative if not even an empty one fits."""
        used = self._between(self._words[self._consumed_at], self._index)
        return min(LIMIT, ((self._size - used) & -_LINE) - _LINE)

    def ask(self, length: int) -> bool:
        """Asks to be notified when a quarter of the ring is free, or that much; returns whether that much is now.

        A quarter, so that not every frame that is taken ends in a notification, and so that the other side still has
        work while this one wakes up.
        """
        awaited = self._index + max(self._size // 4, _frame_size(length)) - self._size
        if awaited > 0:
            self._words[self._awaited_room_at] = awaited - 1
            _fence()
        return self.room() >= length

    def due(self) -> bool:
        """Whether the other side has to be notified of what was sent since this was last asked."""
        return self._passed(self._awaited_data_at)

    def space(self, length: int) -> tuple[memoryview, ...]:
        """Where the payload of the next frame goes; length at most room()."""
        return self._pieces(self._index + _HEADER.size, length)

    def publish(self, kind: int, stream: int, length: int) -> None:
        """Sends the frame whose payload is in space()."""
        header = _HEADER.pack(kind, 0, stream, length, self._sequence, 0, 0)[:_CHECKED]
        header += _CHECK.pack(self._check(header, self._index + _HEADER.size, length))
        (place,) = self._pieces(self._index, len(header))
        place[:] = header
        self._index += _frame_size(length)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._words[self._produced_at] = self._index

    def send(self, kind: int, stream: int, payload: bytes) -> None:
        """Sends a frame; its payload at most room() bytes."""
        done = 0
        for piece in self.space(len(payload)):
            piece[:] = payload[done : done + len(piece)]
            done += len(piece)
        self.publish(kind, stream, len(payload))


class Reader(_Ring):
    """The end that receives."""

    _length = 0

    def next(self) -> Frame | None:
        """The oldest frame, which stays there until release(), or None; raises ProtocolError."""
        index = self._index
        available = self._between(index, self._words[self._produced_at])
        if not available:
            return None
        if available < _LINE:
            raise ProtocolError("Half a header was sent.")
        start = index % self._size
        header = bytes(self._data[start : start + _LINE])
        kind, zero, stream, length, sequence, zero_too, check = _HEADER.unpack(header)
        size = _frame_size(length)
        if zero or zero_too or length > LIMIT or size > available or sequence != self._sequence:
            raise ProtocolError(f"A bad header was sent: {header.hex()}.")
        payload = self._pieces(start + _LINE, length)
        found = self._check(header[:_CHECKED], start + _LINE, length)
        if found != check:
            raise ProtocolError(f"Frame {sequence} has checksum {found:016x}, not {check:016x}.")
        self._length = size
        return Frame(kind, stream, length, payload)

    def ask(self) -> bool:
        """Asks to be notified of the next frame; returns whether it is there now."""
        self._words[self._awaited_data_at] = self._index
        _fence()
        return bool(self._words[self._produced_at] != self._index)

    def due(self) -> bool:
        """Whether the other side has to be notified of the room that was given back since this was last asked."""
        return self._passed(self._awaited_room_at)

    def release(self) -> None:
        """Gives the room of the frame back."""
        self._index += self._length
        self._length = 0
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._words[self._consumed_at] = self._index


def greet(memory: memoryview, side: int, frames: int) -> None:
    """Tells the other side that this one (0: source, 1: destination) is there, with rings of that geometry."""
    hello = _HELLO.pack(MAGIC, VERSION, frames)
    at = _HELLOS[side]
    # The magic number last.
    memory[at + 8 : at + len(hello)] = hello[8:]
    memory[:PAGE].cast("Q")[at // 8] = MAGIC


def greeted(memory: memoryview, side: int, frames: int) -> bool:
    """Whether the other side, which is the given one, is there; raises ProtocolError if it does not fit."""
    magic, version, size = _HELLO.unpack(bytes(memory[_HELLOS[side] : _HELLOS[side] + _HELLO.size]))
    if magic != MAGIC:
        return False
    if version != VERSION or size != frames:
        raise ProtocolError(
            f"The other side speaks version {version} with {size} frames; this one {VERSION} with {frames}. "
            "Install the same vmbeam in both host VMs."
        )
    return True
