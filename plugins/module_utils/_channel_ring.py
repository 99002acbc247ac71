# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Rings of frames in memory that two guest dom0s share.

Layout of the memory, which the source of the session lends, in pages of 4 KiB; all numbers are little-endian:

- page 0 is control: a Hello of each side, and the four indices, each in a cache line of its own;
- then a ring for what the source sends, and one of the same size for what the destination sends.

An index counts bytes since the beginning and never wraps; it is written by one side only. A frame is a header
and a payload, side by side, and wraps at the ring's end. Its writer moves the index only past whole frames.

The other side is not trusted: it can change any of this at any time. So each side keeps its own indices, checks
the other's at each use, and looks at a header only in a copy. Payloads are opaque here. x86 keeps the order in which
stores become visible; nothing else runs Xen with nested guests.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

PAGE = 4096
MAGIC = 0x4C45_4E4E_4148_4342
VERSION = 1
#: Bytes of a frame's payload.
LIMIT = 1 << 17

_HEADER = struct.Struct("<BBHIII")
_HELLO = struct.Struct("<QII")
# In the control page, by sender: source, destination. Indices are at words of 64 bits, hellos at bytes.
_PRODUCED = (16, 32)
_CONSUMED = (24, 40)
_HELLOS = (512, 576)


class ProtocolError(Exception):
    """The other side, or its memory, does not keep to the protocol."""


def geometry(frames: int) -> int:
    """The size of each ring, in bytes, in a channel of that many frames of 4 KiB; raises ProtocolError."""
    pages = (frames - 1) // 2
    if pages * PAGE < 2 * LIMIT:
        raise ProtocolError(f"A channel of {frames} frames is too small: at least {4 * LIMIT // PAGE + 1} are needed.")
    return pages * PAGE


@dataclass(frozen=True)
class Frame:
    """kind: see _channel_link. payload: one or two pieces of the shared memory, valid until Reader.release()."""

    kind: int
    stream: int
    payload: tuple[memoryview, ...]

    def data(self) -> bytes:
        return b"".join(self.payload)


class _Ring:
    def __init__(self, memory: memoryview, sender: int, size: int) -> None:
        self._words = memory[:PAGE].cast("Q")
        self._data = memory[PAGE + sender * size : PAGE + (sender + 1) * size]
        self._size = size
        self._produced_at = _PRODUCED[sender]
        self._consumed_at = _CONSUMED[sender]
        self._index = 0
        self._sequence = 0

    def _pieces(self, index: int, length: int) -> tuple[memoryview, ...]:
        start = index % self._size
        first = min(length, self._size - start)
        pieces = (self._data[start : start + first], self._data[: length - first])
        return pieces if length > first else pieces[:1]

    def _between(self, low: int, high: int) -> int:
        if not 0 <= high - low <= self._size:
            raise ProtocolError(f"Indices {low} and {high} do not fit a ring of {self._size} bytes.")
        return high - low


class Writer(_Ring):
    """The end that sends."""

    def room(self) -> int:
        """Bytes that the payload of a frame may have now, at most LIMIT; negative if not even an empty one fits."""
        used = self._between(self._words[self._consumed_at], self._index)
        return min(LIMIT, self._size - used - _HEADER.size)

    def space(self, length: int) -> tuple[memoryview, ...]:
        """Where the payload of the next frame goes; length at most room()."""
        return self._pieces(self._index + _HEADER.size, length)

    def publish(self, kind: int, stream: int, length: int) -> None:
        """Sends the frame whose payload is in space()."""
        check = 0
        for piece in self.space(length):
            check = zlib.crc32(piece, check)
        header = _HEADER.pack(kind, 0, stream, length, self._sequence, check)
        done = 0
        for piece in self._pieces(self._index, _HEADER.size):
            piece[:] = header[done : done + len(piece)]
            done += len(piece)
        self._index += _HEADER.size + length
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
        available = self._between(self._index, self._words[self._produced_at])
        if not available:
            return None
        if available < _HEADER.size:
            raise ProtocolError("Half a header was sent.")
        header = b"".join(self._pieces(self._index, _HEADER.size))
        kind, zero, stream, length, sequence, check = _HEADER.unpack(header)
        if zero or length > LIMIT or length > available - _HEADER.size or sequence != self._sequence:
            raise ProtocolError(f"A bad header was sent: {header.hex()}.")
        payload = self._pieces(self._index + _HEADER.size, length)
        found = 0
        for piece in payload:
            found = zlib.crc32(piece, found)
        if found != check:
            raise ProtocolError(f"Frame {sequence} has checksum {found:08x}, not {check:08x}.")
        self._length = _HEADER.size + length
        return Frame(kind, stream, payload)

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
