# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The daemon of a guest dom0 that serves its channels: vmbeam-channel serve.

Channels come and go as host dom0 sets them up; the interrupt tells. A local client passes its standard input, output
and error through a socket, and the daemon joins them to a stream; the daemon at the other end runs the command. What
another host VM can have run here is in COMMANDS, and host dom0 decides which host VM that is. The destination trusts
the source with the configuration of the guest, as it would by ssh; the source runs nothing but lists for the
destination.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shlex
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_link import STREAMS, Kind, Link, Stream
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_measure import Drain, Supply
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_pages import Interrupt, Pages
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_ring import (
    PAGE,
    VERSION,
    ProtocolError,
    Reader,
    Writer,
    checksum,
    geometry,
    greet,
    greeted,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import GuestSessions, Unsupported, require_capable

SOCKET = Path("/run/vmbeam/channel.sock")
#: Exit code of flock when another receiver of the guest is at work; _migrate knows it.
LOCKED = 75
#: Exit code where the hypervisors know no zero-copy; the service knows it.
UNAVAILABLE = 69
#: Seconds that a client waits for a channel to come up. Whoever runs the client has more patience than that.
COMING = 30.0
#: Seconds between two attempts to share a channel's memory, and how often pages may be in use by a device model.
JOIN_PAUSE, BUSY_TURNS = 0.25, 120
#: Seconds until a channel for which there is not enough memory now is tried again.
OPEN_PAUSE = 10.0
#: Seconds, at least, between two looks for channels that are new or over.
LOOK_ROUND = 1.0
REQUEST = 4096
#: Seconds that a measurement of a channel takes.
MEASURED = 10.0
#: Seconds that the other side may take for one.
DRAINED = 6 * MEASURED
#: Bytes of output, and of errors, that a client takes: no command has that much to say.
OUTPUT = 1 << 20
_log = logging.getLogger("vmbeam-channel")


@dataclass(frozen=True)
class Command:
    """What can be run.

    arguments: makes an argument vector of a request, or raises ValueError; an empty one if the daemon itself does it.
    to: the side that runs it, or None. service: whether it takes a service of its own, because it leaves something
    behind, or does what this daemon, being confined, cannot. That costs half a second.
    """

    arguments: Callable[[dict[str, Any]], list[str]]
    takes_input: bool = True
    to: int | None = None
    service: bool = False


def _receiver(*xl: str) -> Callable[[dict[str, Any]], list[str]]:
    """What makes the argument vector of a receiver of a guest."""

    def arguments(request: dict[str, Any]) -> list[str]:
        guest = request.get("guest")
        try:
            _checks.domain_name("guest", guest if isinstance(guest, str) else "")
        except InvalidInput as exc:
            raise ValueError(exc.message) from exc
        lock = f"/run/lock/vmbeam-receive-{guest}.lock"
        return ["flock", "-n", "-o", "-E", str(LOCKED), lock, "xl", *xl]

    return arguments


#: Runs an argument vector as a service of its own: what xl leaves behind for the guest lives on there.
SERVICE = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe", "-p", "KillMode=process"]


#: What the other side can have run here.
COMMANDS = {
    "receive": Command(_receiver("migrate-receive", "--zero-copy"), to=1, service=True),
    "receive-copy": Command(_receiver("migrate-receive"), to=1, service=True),
    "restore": Command(_receiver("restore", "-p", "/dev/stdin"), to=1, service=True),
    "list": Command(lambda _request: ["xl", "list", "-v"], takes_input=False),
    # To measure the channel, with and without what pipes cost.
    "discard": Command(lambda _request: ["dd", "of=/dev/null", "bs=1M", "status=none"]),
    "measure": Command(lambda _request: []),
}


def command(request: dict[str, Any], side: int) -> tuple[Command, list[str]]:
    """What a request has the given side run, and its argument vector; raises ValueError."""
    found = COMMANDS.get(str(request.get("command")))
    if not found:
        raise ValueError(f"command: one of {', '.join(COMMANDS)} is needed")
    if found.to not in (None, side):
        raise ValueError(f"command: only the source of a channel can ask for {request['command']}")
    return found, found.arguments(request)


class Channel:
    """One channel, from its creation to its end. wanted: has wake() called soon."""

    #: Of any channel: whether a measurement of another side's is at work.
    _draining = False

    def __init__(
        self, sessions: GuestSessions, pages: Pages, wanted: Callable[[], None], ended: Callable[[Channel], None]
    ) -> None:
        self._sessions = sessions
        self._pages = pages
        self._wanted = wanted
        self._ended = ended
        self._greeted = False
        self._busy_turns = 0
        self._pausing: asyncio.TimerHandle | None = None
        self._asked = False
        self._children = 0
        self._over = False
        self.link: Link | None = None
        self.session = pages.session

    def wake(self) -> bool:
        """Goes on with what can be done; returns whether there was anything."""
        try:
            if not self.link:
                self._come_up()
            return bool(self.link and self.link.wake())
        except (OSError, ProtocolError) as exc:
            self.fail(str(exc))
        except Exception as exc:  # whatever the other side has found, it must not reach other channels
            _log.exception("channel %d", self.session)
            self.fail(f"internal error: {exc!r}")
        return False

    def _come_up(self) -> None:
        pages, size = self._pages, geometry(self._pages.frames)
        if not self._join():
            return
        if not self._greeted:
            greet(pages.memory, pages.side, pages.frames)
            self._greeted = True
            pages.notify()
        if greeted(pages.memory, 1 - pages.side, pages.frames):
            rings = (
                Reader(pages.memory, 1 - pages.side, size),
                Writer(pages.memory, pages.side, size),
            )
            self.link = Link(rings, pages.side, pages.notify, self._run, self.fail)
            _log.info("channel %d is up, %d KiB each way", self.session, size >> 10)

    def _join(self) -> bool:
        """Whether the memory is shared now.

        To ask is work for the hypervisor, and the other side can have this called as often as it likes. So there is a
        pause after each attempt; what was asked for in it comes after it.
        """
        if self._pausing:
            self._asked = True
            return False
        try:
            if self._pages.join():
                return True
            self._asked = False
        except OSError as exc:
            if exc.errno != errno.EBUSY or self._busy_turns == BUSY_TURNS:
                raise
            self._busy_turns += 1
            # No interrupt tells when a device model lets go.
            self._asked = True
        self._pausing = asyncio.get_running_loop().call_later(JOIN_PAUSE, self._paused)
        return False

    def _paused(self) -> None:
        self._pausing = None
        if self._asked and not self._over:
            self._wanted()

    def check(self) -> None:
        """Ends it if the hypervisor says that it is over."""
        try:
            state = self._sessions.query(self.session).state
        except OSError as exc:
            state = os.strerror(exc.errno or 0)
        if state != "open":
            self.fail(f"the channel is over: {state}")

    def fail(self, reason: str) -> None:
        if self.link and not self.link.dead:
            self.link.fail(reason)  # calls this again
            return
        if self._over:
            return
        self._over = True
        _log.info("channel %d: %s", self.session, reason)
        try:
            self._pages.end()
        except OSError as exc:
            _log.error("channel %d cannot be closed: %s", self.session, exc)
        self._ended(self)

    def _up(self) -> Link:
        return cast(Link, self.link)

    def call(self, request: dict[str, Any], fds: list[int], done: Callable[[int | str], None]) -> Stream:
        """Has the other side run a command; takes the descriptors out of the list. Raises ValueError."""
        takes_input = command(request, 1 - self._pages.side)[0].takes_input
        stream = self._up().call(request, done)
        standard_input, output, error = fds
        fds.clear()
        if not takes_input:
            os.close(standard_input)
            stream.end()
        stream.attach(
            sources={Kind.DATA: standard_input} if takes_input else {},
            sinks={Kind.DATA: output, Kind.ERROR: error},
            limit=OUTPUT,
        )
        return stream

    def _run(self, stream: Stream, request: dict[str, Any]) -> Callable[[int | str], None]:
        """Runs a command for the other side; returns what is to be called when the stream ends."""
        kind, argv = command(request, self._pages.side)
        if not argv:
            return self._drain(stream)
        if self._children >= STREAMS:
            raise ValueError(f"{STREAMS} commands have not ended yet. Try again later.")
        child = subprocess.Popen(
            [*(SERVICE if kind.service else []), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._children += 1
        _log.info("stream %d: %s", stream.number, shlex.join(argv))
        pipes = [pipe for pipe in (child.stdin, child.stdout, child.stderr) if pipe]
        with pipes[0], pipes[1], pipes[2]:
            ends = [os.dup(pipe.fileno()) for pipe in pipes]
        stream.attach(sources={Kind.DATA: ends[1], Kind.ERROR: ends[2]}, sinks={Kind.DATA: ends[0]})
        loop = asyncio.get_running_loop()
        process = os.pidfd_open(child.pid)

        def exited() -> None:
            loop.remove_reader(process)
            os.close(process)
            self._children -= 1
            stream.exited(child.wait())

        loop.add_reader(process, exited)

        def done(outcome: int | str) -> None:
            # The command has lost its pipes then, and tidies up by itself.
            _log.info("stream %d: %s", stream.number, f"exit code {outcome}" if isinstance(outcome, int) else outcome)

        return done

    def measure(self, request: dict[str, Any], supply: Supply, done: Callable[[int | str], None]) -> Stream:
        """Has the other side take a supply."""
        stream = self._up().call(request, done)
        stream.attach(sources={Kind.DATA: supply}, sinks={})
        return stream

    def _drain(self, stream: Stream) -> Callable[[int | str], None]:
        """Takes a stream into memory; one at a time in this process, because that is not little, and not for long."""
        if Channel._draining:
            raise ValueError("another measurement is at work. Try again later.")
        try:
            stream.attach(sources={}, sinks={Kind.DATA: partial(Drain, lambda: stream.exited(0))})
        except MemoryError:  # it must not end the channel
            raise ValueError("there is too little memory for a measurement") from None
        Channel._draining = True
        limit = asyncio.get_running_loop().call_later(DRAINED, stream.reset, f"it has taken {DRAINED:.0f} s")

        def done(_outcome: int | str) -> None:
            limit.cancel()
            Channel._draining = False

        return done

    def status(self) -> dict[str, Any]:
        return {
            "session": self.session,
            "up": bool(self.link),
            "side": ("source", "destination")[self._pages.side],
            "memory_kb": self._pages.frames * PAGE >> 10,
            "streams": self.link.streams if self.link else 0,
            "bytes": self.link.bytes if self.link else {"sent": 0, "received": 0},
        }


class Daemon:
    """All channels of this dom0, and its clients."""

    def __init__(self) -> None:
        self._sessions = GuestSessions()
        self._interrupt = Interrupt()
        self._channels: dict[int, Channel] = {}
        self._changed = asyncio.Event()
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.Handle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._looked = 0.0

    async def serve(self) -> None:
        """Runs for ever; raises OSError."""
        self._tidy()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._interrupt.fd, self._interrupted)
        with suppress(FileNotFoundError):
            SOCKET.unlink()
        SOCKET.parent.mkdir(mode=0o700, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(SOCKET))
        SOCKET.chmod(0o600)
        listener.listen()
        listener.setblocking(False)
        self._wake()
        clients: set[asyncio.Task[None]] = set()
        while True:
            try:
                connection, _address = await loop.sock_accept(listener)
            except OSError as exc:
                _log.error("no client can be served: %s", exc)
                await asyncio.sleep(1.0)
                continue
            task = asyncio.create_task(self._client(connection))
            clients.add(task)
            task.add_done_callback(clients.discard)

    def close(self) -> None:
        """Ends all channels.

        A page that Linux is told to free while it is lent it gets back later, at ten pages a second.
        """
        asyncio.get_running_loop().remove_reader(self._interrupt.fd)
        for channel in list(self._channels.values()):
            channel.fail("this daemon stops")

    def _tidy(self) -> None:
        """Ends channels that an earlier daemon left: their memory is lost to us, and the other side waits."""
        for session in self._sessions.all():
            if session.channel and session.owner == 0:
                _log.info("channel %d is of an earlier daemon: closing it", session.session)
                for step in (self._sessions.abort, self._sessions.close_session):
                    with suppress(OSError):
                        step(session.session)

    def _interrupted(self) -> None:
        self._interrupt.take()
        self._wake()

    def _wake(self) -> None:
        if not self._soon:
            self._soon = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Serves all channels in turn. An interrupt has many reasons but comes once, so it also looks for others."""
        self._soon = None
        for channel in list(self._channels.values()):
            if channel.wake():
                self._wake()
        if not self._later:
            self._later = asyncio.get_running_loop().call_at(self._looked + LOOK_ROUND, self._look_round)
        self._tell()

    def _look_round(self) -> None:
        """Finds channels that are new, or over."""
        self._later = None
        self._looked = asyncio.get_running_loop().time()
        for channel in list(self._channels.values()):
            channel.check()
        for session in self._sessions.all():
            if session.channel and session.state == "open" and session.owner is None:
                try:
                    channel = Channel(self._sessions, Pages(self._sessions, session), self._wake, self._gone)
                except OSError as exc:
                    if exc.errno != errno.ENOTCONN:
                        _log.error("channel %d cannot be opened yet: %s", session.session, exc)
                        if self._retry:
                            self._retry.cancel()
                        self._retry = asyncio.get_running_loop().call_later(OPEN_PAUSE, self._wake)
                    continue
                self._channels[session.session] = channel
                if channel.wake():
                    self._wake()
        self._tell()

    def _tell(self) -> None:
        """Lets clients look whether the channel that they wait for is up."""
        self._changed.set()
        self._changed.clear()

    def _gone(self, channel: Channel) -> None:
        self._channels.pop(channel.session, None)

    # --- clients

    async def _client(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        fds: list[int] = []
        with connection:
            try:
                await _ready(connection)
                text, fds, _flags, _address = socket.recv_fds(connection, REQUEST, 3)
                answer = await self._serve_client(json.loads(text), fds, connection)
            except (ValueError, OSError) as exc:
                answer = {"error": str(exc)}
            finally:
                for fd in fds:
                    os.close(fd)
            with suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(connection, json.dumps(answer).encode() + b"\n")

    async def _serve_client(self, request: dict[str, Any], fds: list[int], connection: socket.socket) -> dict[str, Any]:
        if request.get("command") == "status":
            return {"version": VERSION, "channels": [channel.status() for channel in self._channels.values()]}
        if request.get("command") == "measure":
            return await self._measure(request, connection)
        if len(fds) != 3:
            raise ValueError("three descriptors are needed")
        for number, fd in enumerate(fds):
            fds[number] = _of_our_own(fd, os.O_WRONLY if number else os.O_RDONLY)
        channel = await self._channel(request.pop("session", None))
        return await _outcome(partial(channel.call, request, fds), connection)

    async def _measure(self, request: dict[str, Any], connection: socket.socket) -> dict[str, Any]:
        channel = await self._channel(request.pop("session", None))
        supply = Supply(MEASURED)
        answer = await _outcome(partial(channel.measure, request, supply), connection)
        return supply.result() if answer == {"code": 0} else answer

    async def _channel(self, session: int | None) -> Channel:
        """The channel, once it is up; ValueError if there is none."""

        def found() -> Channel | None:
            up = [channel for channel in self._channels.values() if channel.link and session in (None, channel.session)]
            if len(up) > 1:
                raise ValueError("session: there are several channels. Name one.")
            return up[0] if up else None

        with suppress(TimeoutError):
            async with asyncio.timeout(COMING):
                while not (channel := found()):
                    await self._changed.wait()
                return channel
        what = "no channel" if session is None else f"no channel {session}"
        raise ValueError(f"session: there is {what} that is up. Does vmbeam-channel run in the other host VM?")


async def _outcome(call: Callable[[Callable[[int | str], None]], Stream], connection: socket.socket) -> dict[str, Any]:
    """What a client is told of its stream in the end; the stream does not outlive the client."""
    outcome: asyncio.Future[int | str] = asyncio.get_running_loop().create_future()
    stream = call(outcome.set_result)
    gone = asyncio.ensure_future(_ready(connection))
    ends: list[asyncio.Future[Any]] = [outcome, gone]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not outcome.done():
        stream.reset("the client has gone")
    gone.cancel()
    await asyncio.wait(ends)
    result = outcome.result()
    return {"code": result} if isinstance(result, int) else {"error": result}


async def _ready(connection: socket.socket) -> None:
    """Waits until something can be read, or the other end is gone."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    fd = connection.fileno()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


def _of_our_own(fd: int, flags: int) -> int:
    """Replaces a pipe by one that can be made non-blocking without that its other users notice."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return fd
    own = os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
    os.close(fd)
    return own


def serve() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    async def main() -> None:
        daemon = Daemon()
        serving = asyncio.ensure_future(daemon.serve())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
        try:
            with suppress(asyncio.CancelledError):
                await serving
        finally:
            daemon.close()

    try:
        checksum()
    except OSError as exc:
        raise SystemExit(f"{exc}. Install libxxhash0.") from exc
    try:
        require_capable()
    except Unsupported as exc:
        _log.info("%s", exc.message)
        raise SystemExit(UNAVAILABLE) from exc
    asyncio.run(main())
