# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Streams of several commands over one pair of rings.

One side calls, the other runs a command for it: the streams are its standard input, output and error. Each side
may send only as much as the other has room for (WINDOW), so that a stream whose reader is slow doesn't hold
the others up, and memory is bounded.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from ansible_collections.vmbeam.xen.plugins.module_utils._channel_ring import (
    LIMIT,
    Frame,
    ProtocolError,
    Reader,
    Writer,
)

#: Bytes of a stream that the receiver keeps when whom they are for does not take them.
WINDOW = 1 << 21
#: Of a channel.
STREAMS = 32
#: How many streams of a process, of those that pass much, have how much more: with it more than is in a ring, so that a
#: stream that is taken does not wait for credit, and is rarely told of it. A daemon keeps so at most 64 MiB of each
#: channel and 60 more.
WIDE, MORE = 2, 30 << 20
#: Bytes of a request, an outcome or a credit.
CONTROL_LIMIT = 4096
#: Frames that wait for room; the other side does not take what it is sent if there are more.
WAITING = 16 * STREAMS
#: Bytes of room in the ring that it takes to read from a descriptor: small frames cost as much as large ones.
GRAIN = LIMIT // 8
#: What a pipe is made to hold: the most that Linux lets anyone ask for.
PIPE = 1 << 20
#: Frames to take, or to send of a stream, before others in this process have their turn.
TURNS = 16
#: Seconds without a sign of life until the other side is asked for one, and until it is given up.
QUIET, DEAD = 20.0, 60.0
_CREDIT = struct.Struct("<I")


class Kind:
    """Kinds of frames. CALL, EXIT and RESET have JSON; DATA and ERROR output; CREDIT a number of bytes.

    Plain numbers: until Python 3.12 each look at a member of an enumeration is a call, and there are many per frame.
    """

    CALL = 1
    DATA = 2
    ERROR = 3
    END = 4
    EXIT = 5
    RESET = 6
    CREDIT = 7
    PING = 8
    PONG = 9


def _widen(fd: int) -> None:
    """Lets a pipe hold more, so that its two ends take turns less often."""
    # It is none, or this user's pipes hold too much already.
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE)


class Source(Protocol):
    """Where a stream has from what it sends."""

    def watch(self, readable: Callable[[], None]) -> None:
        """Calls it whenever there is something to read, until unwatch(); PermissionError if that cannot be told."""

    def unwatch(self) -> None: ...

    def read(self, pieces: tuple[memoryview, ...]) -> int:
        """Fills some of that; returns how much, 0 at the end; raises OSError, BlockingIOError if there is nothing."""

    def close(self) -> None: ...


class Sink(Protocol):
    """Where a stream puts what it receives. It tells the stream what it has taken, and if it will take no more."""

    open: bool

    def write(self, pieces: tuple[memoryview, ...]) -> None:
        """Takes that, which is valid only during the call."""

    def end(self, then: Callable[[], None]) -> None:
        """Closes it when all is taken, and calls that."""

    def close(self) -> None: ...


class _FdSource:
    """Reads from a descriptor."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._watched = False

    def watch(self, readable: Callable[[], None]) -> None:
        asyncio.get_running_loop().add_reader(self._fd, readable)
        self._watched = True

    def unwatch(self) -> None:
        if self._watched:
            self._watched = False
            asyncio.get_running_loop().remove_reader(self._fd)

    def read(self, pieces: tuple[memoryview, ...]) -> int:
        return os.readv(self._fd, pieces)

    def close(self) -> None:
        self.unwatch()
        os.close(self._fd)


class _FdSink:
    """Writes to a descriptor as it takes it."""

    def __init__(self, fd: int, taken: Callable[[int], None], broken: Callable[[], None]) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._taken = taken
        self._broken = broken
        self._left = bytearray()
        self._ending: Callable[[], None] | None = None
        self._waiting = False
        self.open = True

    def write(self, pieces: tuple[memoryview, ...]) -> None:
        size = sum(map(len, pieces))
        if not self.open:
            self._taken(size)
            return
        done = 0
        if not self._left:
            try:
                done = os.writev(self._fd, pieces)
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                self._taken(size)
                self._broken()
                return
        if done:
            self._taken(done)
        if done < size:
            for piece in pieces:
                self._left += piece[done:]
                done = max(0, done - len(piece))
            self._wait()

    def end(self, then: Callable[[], None]) -> None:
        """Closes it when all is written."""
        self._ending = then
        if not self._left:
            self._end()

    def close(self) -> None:
        if self.open:
            self.open = False
            if self._waiting:
                asyncio.get_running_loop().remove_writer(self._fd)
            os.close(self._fd)
            self._left.clear()

    def _end(self) -> None:
        self.close()
        then, self._ending = self._ending, None
        if then:
            then()

    def _wait(self) -> None:
        if not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        try:
            with memoryview(self._left) as left:
                done = os.write(self._fd, left[:PIPE])
        except BlockingIOError:
            return
        except OSError:
            left_over = len(self._left)
            self.close()
            self._taken(left_over)
            self._broken()
        else:
            del self._left[:done]
            self._taken(done)
            if self._left:
                return
            self._waiting = False
            asyncio.get_running_loop().remove_writer(self._fd)
        if self._ending:
            self._end()


#: Of what to call with the bytes that were taken, and what when no more will be.
MakeSink = Callable[[Callable[[int], None], Callable[[], None]], Sink]


class Stream:
    """One command, on either side. It closes its sources and sinks.

    done: called once, with the exit code or with the reason of a failure.
    """

    def __init__(self, link: Link, number: int, done: Callable[[int | str], None]) -> None:
        self._link = link
        self.number = number
        #: Whether this side called.
        self.ours = number % 2 == link.side
        self._done: Callable[[int | str], None] | None = done
        self._credit = WINDOW
        #: Bytes that this side may keep.
        self.window = WINDOW
        self._owed = 0
        self._received = 0
        #: Bytes that whom they are for has taken.
        self.taken = 0
        self._limit: int | None = None
        self._sinks: dict[int, Sink] = {}
        self._sources: dict[int, Source] = {}
        self._paused = True
        self._exit: int | None = None

    def attach(
        self, *, sources: Mapping[int, int | Source], sinks: Mapping[int, int | MakeSink], limit: int | None = None
    ) -> None:
        """Joins descriptors, or others, to the stream, by the kind of frame that carries what passes.

        limit: bytes to receive at most.
        """
        self._limit = limit
        for ends in (sources, sinks):
            if isinstance(end := ends.get(Kind.DATA), int):
                _widen(end)
        for kind, sink in sinks.items():
            make = partial(_FdSink, sink) if isinstance(sink, int) else sink
            self._sinks[kind] = make(self._taken, self._broken)
        for kind, source in sources.items():
            self._sources[kind] = _FdSource(source) if isinstance(source, int) else source
        self.resume()

    def exited(self, code: int) -> None:
        """The command has ended; told to the caller when its output has been sent."""
        self._exit = code
        self._finish()

    def end(self) -> None:
        """Tells the other side that there is no input."""
        self._link.post(Kind.END, self.number)

    def reset(self, reason: str) -> None:
        """Gives up, and tells the other side."""
        if self._done:
            self._link.post(Kind.RESET, self.number, json.dumps({"reason": reason}).encode())
            self.fail(reason)

    def fail(self, reason: str) -> None:
        self._close()
        self._tell(reason)

    # --- what the link calls

    def receive(self, frame: Frame) -> None:
        if frame.kind in (Kind.DATA, Kind.ERROR):
            size = frame.length
            self._owed += size
            self._received += size
            if self._owed > self.window:
                raise ProtocolError(f"Stream {self.number} was sent more than there is room for.")
            if self._limit is not None and self._received > self._limit:
                self.reset(f"the other side has more to say than {self._limit} bytes")
                return
            sink = self._sinks.get(frame.kind)
            if sink:
                sink.write(frame.payload)
            else:
                self._taken(size)
        elif frame.kind == Kind.CREDIT:
            self._credit += _credit(frame)
            if self._credit > WINDOW + MORE:
                raise ProtocolError(f"Stream {self.number} was given more credit than there is.")
            self.resume()
        elif frame.kind == Kind.END:
            if (sink := self._sinks.get(Kind.DATA)) and sink.open:
                sink.end(lambda: None)
        elif frame.kind == Kind.EXIT:
            code = _field(frame, "code", int)
            self._exit_told(code)
        elif frame.kind == Kind.RESET:
            self.fail(_field(frame, "reason", str)[:500])
        else:
            raise ProtocolError(f"Stream {self.number} was sent a frame of kind {frame.kind}.")

    def resume(self) -> None:
        """Reads on, if there is room again."""
        if self._paused and self._sources and self._credit and self._link.room():
            self._paused = False
            try:
                for kind, source in self._sources.items():
                    source.watch(partial(self._readable, kind, source))
            except PermissionError:
                # A file, or /dev/null. Later, because the caller may have more to attach.
                reason = "standard input is nothing that can be waited for. Use a pipe."
                asyncio.get_running_loop().call_soon(self.reset, reason)

    # --- our own

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            for source in self._sources.values():
                source.unwatch()

    def _readable(self, kind: int, source: Source) -> None:
        for _turn in range(TURNS):
            room = min(self._credit, self._link.room())
            if room <= 0:
                self._pause()
                return
            try:
                length = self._link.pour(kind, self.number, source, room)
            except BlockingIOError:
                return
            except OSError:
                length = 0
            self._credit -= length
            if not length:
                self._ended(kind)
            if length < room:  # that was all there is for now
                return

    def _ended(self, kind: int) -> None:
        self._sources.pop(kind).close()
        if kind == Kind.DATA:
            self._link.post(Kind.END, self.number)
        self._finish()

    def _finish(self) -> None:
        if self._exit is not None and not self._sources and self._done:
            self._link.post(Kind.EXIT, self.number, json.dumps({"code": self._exit}).encode())
            self._close()
            self._tell(self._exit)

    def _exit_told(self, code: int) -> None:
        """The outcome, when all output that came before it is written."""
        for sink in self._sinks.values():
            if sink.open:
                sink.end(lambda: self._exit_told(code))
                return
        self._close()
        self._tell(code)

    def _taken(self, size: int) -> None:
        """Lets the other side send as much again."""
        self._owed -= size
        self.taken += size
        self._link.credit(self, size)

    def _broken(self) -> None:
        """Whom the data is for does not want it any more. A command must learn of that by its output breaking."""
        if self.ours:
            self.reset("whom the output is for has gone")
        # Else it is a command that has read enough; what comes of it tells its exit code.

    def _close(self) -> None:
        for source in self._sources.values():
            source.close()
        self._sources.clear()
        for sink in self._sinks.values():
            sink.close()

    def _tell(self, outcome: int | str) -> None:
        done, self._done = self._done, None
        self._link.forget(self)
        if done:
            done(outcome)


class Link:
    """All streams of a channel. Everything is called in the event loop.

    notify: tells the other side that there is something in the rings, or room. accept: takes a Stream that the
    other side opens, and its request; raises ValueError with the reason why not. failed: called once.
    """

    #: How many streams of this process are wide: of all channels, as their memory is.
    _wide = 0

    def __init__(
        self,
        rings: tuple[Reader, Writer],
        side: int,
        notify: Callable[[], None],
        accept: Callable[[Stream, dict[str, Any]], Callable[[int | str], None]],
        failed: Callable[[str], None],
    ) -> None:
        self._reader, self._writer = rings
        self.side = side
        self._notify = notify
        self._accept = accept
        self._failed = failed
        self._streams: dict[int, Stream] = {}
        self._next = side
        self._outbox: deque[tuple[int, int, bytes]] = deque()
        self._credits: dict[int, int] = {}
        self._heard = asyncio.get_running_loop().time()
        self._pulse: asyncio.TimerHandle | None = None
        self.dead: str | None = None
        self.bytes = {"sent": 0, "received": 0}

    @property
    def streams(self) -> int:
        return len(self._streams)

    def call(self, request: dict[str, Any], done: Callable[[int | str], None]) -> Stream:
        """Has the other side run a command."""
        if len(self._streams) >= STREAMS:
            raise ValueError(f"There are {STREAMS} streams in use. Try again later.")
        while self._next in self._streams:
            self._next = (self._next + 2) & 0xFFFF
        stream = self._streams[self._next] = Stream(self, self._next, done)
        self._next = (self._next + 2) & 0xFFFF
        self.post(Kind.CALL, stream.number, json.dumps(request).encode())
        self._watch()
        return stream

    def wake(self) -> bool:
        """Takes some of what has arrived; returns whether there may be more: then call it again, later.

        If not, the other side will notify of what comes next.
        """
        taken = more = False
        try:
            for turn in range(TURNS):
                if self.dead or not (frame := self._reader.next() or (self._reader.ask() and self._reader.next())):
                    break
                self._handle(frame)
                self._reader.release()
                taken = True
                # Soon enough for whoever waits for a quarter of the ring, and small frames are gone in no time.
                if turn % 2:
                    self.tell()
            else:
                more = True
            self.tell()
            self._flush()
        except (ProtocolError, ValueError, TypeError) as exc:
            self.fail(f"protocol error: {exc}")
        if taken:
            self._heard = asyncio.get_running_loop().time()
        return more

    def fail(self, reason: str) -> None:
        """The channel is gone: so are its streams."""
        if self.dead:
            return
        self.dead = reason
        if self._pulse:
            self._pulse.cancel()
        for stream in list(self._streams.values()):
            stream.fail(reason)
        self._failed(reason)

    # --- what streams call

    def room(self) -> int:
        """Bytes of data that can be sent now; what waits goes first. 0 if the other side does not keep to the rules."""
        if self.dead or self._outbox:
            return 0
        try:
            room = self._writer.room()
            if room < GRAIN:
                room = self._writer.room() if self._writer.ask(GRAIN) else 0
            return room
        except ProtocolError as exc:
            asyncio.get_running_loop().call_soon(self.fail, f"protocol error: {exc}")
            return 0

    def pour(self, kind: int, number: int, source: Source, room: int) -> int:
        """Reads from a source right into the ring; returns the length, 0 at its end."""
        length = source.read(self._writer.space(room))
        if length:
            self._writer.publish(kind, number, length)
            self.bytes["sent"] += length
            self.tell()
        return length

    def tell(self) -> None:
        """Notifies the other side if it waits for what has just changed: so the two work side by side."""
        if self.dead or not (self._writer.due() | self._reader.due()):
            return
        try:
            self._notify()
        except OSError as exc:
            asyncio.get_running_loop().call_soon(self.fail, f"the other side cannot be notified: {exc}")

    def post(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Sends a frame as soon as there is room."""
        if self.dead:
            return
        loop = asyncio.get_running_loop()
        if len(self._outbox) >= WAITING:
            loop.call_soon(self.fail, "the other side does not take what it is sent")
            return
        self._outbox.append((kind, number, payload))
        loop.call_soon(self._flush)

    def credit(self, stream: Stream, size: int) -> None:
        """Tells what was taken, by larger amounts."""
        if self.dead or stream.number not in self._streams:
            return
        due = self._credits.get(stream.number, 0) + size
        self._credits[stream.number] = due
        if due >= stream.window // 2:
            del self._credits[stream.number]
            # What only fills a pipe is not taken.
            if stream.window == WINDOW and Link._wide < WIDE and stream.taken > WINDOW + PIPE:
                Link._wide += 1
                stream.window += MORE
                due += MORE
            self.post(Kind.CREDIT, stream.number, _CREDIT.pack(due))

    def forget(self, stream: Stream) -> None:
        if self._streams.pop(stream.number, None) and stream.window > WINDOW:
            Link._wide -= 1
        self._credits.pop(stream.number, None)

    # --- our own

    def _handle(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == Kind.PING:
            self.post(Kind.PONG, 0)
        elif kind == Kind.PONG:
            pass  # that it has come is all that matters
        elif kind == Kind.CALL:
            self._called(frame)
        elif stream := self._streams.get(frame.stream):
            if kind == Kind.DATA:
                self.bytes["received"] += frame.length
            stream.receive(frame)
        # Else it has ended on this side, which the other one did not know yet.

    def _called(self, frame: Frame) -> None:
        number = frame.stream
        if number % 2 == self.side or number in self._streams:
            raise ProtocolError(f"Stream {number} was opened by the wrong side, or twice.")
        request = _object(frame)
        try:
            if len(self._streams) >= STREAMS:
                raise ValueError(f"There are {STREAMS} streams in use. Try again later.")
            stream = Stream(self, number, lambda _outcome: None)
            self._streams[number] = stream
            stream._done = self._accept(stream, request)
        except (ValueError, OSError) as exc:
            self._streams.pop(number, None)
            self.post(Kind.RESET, number, json.dumps({"reason": f"refused: {exc}"}).encode())
        else:
            self._watch()

    def _flush(self) -> None:
        if self.dead:
            return
        try:
            while self._outbox:
                length = len(self._outbox[0][2])
                if self._writer.room() < length and not self._writer.ask(length):
                    return
                self._writer.send(*self._outbox.popleft())
                self.tell()
            if self.room():
                for stream in list(self._streams.values()):
                    stream.resume()
        except ProtocolError as exc:
            self.fail(f"protocol error: {exc}")

    def _watch(self) -> None:
        """Looks after the other side, as long as there are streams."""
        if not self._pulse:
            loop = asyncio.get_running_loop()
            self._heard = loop.time()
            self._pulse = loop.call_later(QUIET, self._beat)

    def _beat(self) -> None:
        self._pulse = None
        loop = asyncio.get_running_loop()
        if not self._streams or self.dead:
            return
        silence = loop.time() - self._heard
        if silence >= DEAD:
            self.fail(f"the other side has been silent for {silence:.0f} s")
            return
        if silence >= QUIET:
            self.post(Kind.PING, 0)
        self._pulse = loop.call_later(QUIET, self._beat)


def _control(frame: Frame) -> bytes:
    """The payload of a frame that is not data."""
    if frame.length > CONTROL_LIMIT:
        raise ProtocolError(f"A frame of kind {frame.kind} is larger than {CONTROL_LIMIT} bytes.")
    return frame.data()


def _credit(frame: Frame) -> int:
    data = _control(frame)
    if len(data) != _CREDIT.size:
        raise ProtocolError("Credit is 4 bytes.")
    return int(_CREDIT.unpack(data)[0])


def _object(frame: Frame) -> dict[str, Any]:
    # Deeply nested arrays end in a RecursionError.
    with suppress(ValueError, RecursionError):
        value = json.loads(_control(frame))
        if isinstance(value, dict):
            return value
    raise ProtocolError(f"A frame of kind {frame.kind} has no JSON object.")


def _field(frame: Frame, name: str, kind: type) -> Any:
    value = _object(frame).get(name)
    # A bool is an int to Python, not to the protocol.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(f"A frame of kind {frame.kind} lacks {name}.")
    return value
