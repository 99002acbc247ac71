# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The daemon of a guest dom0 that serves its channels: vmbeam-channel serve.

Channels come and go as host dom0 sets them up; the interrupt tells. A local client passes its standard input, output
and error through a socket, and the daemon joins them to a stream; the daemon at the other end runs the command. What
another host VM can have run here is in COMMANDS, and host dom0 decides which host VM that is.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._channel_link import Kind, Link, Stream
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_pages import Interrupt, Pages
from ansible_collections.vmbeam.xen.plugins.module_utils._channel_ring import (
    PAGE,
    ProtocolError,
    Reader,
    Writer,
    geometry,
    greet,
    greeted,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import GuestSessions

SOCKET = Path("/run/vmbeam/channel.sock")
#: Exit code of flock when another receiver of the guest is at work; _migrate knows it.
LOCKED = 75
#: Seconds that a client waits for a channel to come up.
COMING = 60.0
REQUEST = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_log = logging.getLogger("vmbeam-channel")


def _receive(request: dict[str, Any]) -> list[str]:
    guest = request.get("guest")
    if not isinstance(guest, str) or not _NAME.fullmatch(guest):
        raise ValueError("guest: no name of a guest")
    lock = f"/run/lock/vmbeam-receive-{guest}.lock"
    return ["flock", "-n", "-o", "-E", str(LOCKED), lock, "xl", "migrate-receive", "--zero-copy"]


#: What the other side can have run here: it makes of a request an argument vector, or raises ValueError.
COMMANDS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "receive": _receive,
    "list": lambda _request: ["xl", "list", "-v"],
    # To measure the channel.
    "discard": lambda _request: ["dd", "of=/dev/null", "bs=256K", "status=none"],
}


def command(request: dict[str, Any]) -> list[str]:
    """The argument vector of a request; raises ValueError."""
    found = COMMANDS.get(str(request.get("command")))
    if not found:
        raise ValueError(f"command: one of {', '.join(COMMANDS)} is needed")
    return found(request)


class Channel:
    """One channel, from its creation to its end."""

    def __init__(self, sessions: GuestSessions, pages: Pages, ended: Callable[[Channel], None]) -> None:
        self._sessions = sessions
        self._pages = pages
        self._ended = ended
        self._greeted = False
        self.link: Link | None = None
        self.session = pages.session

    def wake(self) -> bool:
        """Goes on with what can be done; returns whether there was anything."""
        try:
            if self.link:
                return self.link.wake()
            self._come_up()
        except (OSError, ProtocolError) as exc:
            self.fail(str(exc))
        return False

    def _come_up(self) -> None:
        pages, size = self._pages, geometry(self._pages.frames)
        if not pages.join():
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
            self.link = Link(rings, pages.side, pages.notify, _run, self.fail)
            _log.info("channel %d is up, %d KiB each way", self.session, size >> 10)
            self.link.wake()

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
        _log.info("channel %d: %s", self.session, reason)
        try:
            self._pages.end()
        except OSError as exc:
            _log.error("channel %d cannot be closed: %s", self.session, exc)
        self._ended(self)

    def status(self) -> dict[str, Any]:
        return {
            "session": self.session,
            "up": bool(self.link),
            "side": ("source", "destination")[self._pages.side],
            "memory_kb": self._pages.frames * PAGE >> 10,
            "streams": self.link.streams if self.link else 0,
            "bytes": self.link.bytes if self.link else {"sent": 0, "received": 0},
        }


def _run(stream: Stream, request: dict[str, Any]) -> Callable[[int | str], None]:
    """Runs a command for the other side; returns what is to be called when the stream ends."""
    argv = command(request)
    child = subprocess.Popen(
        # A service of its own: what xl leaves behind for the guest belongs there, and is not confined like this
        # daemon is.
        ["systemd-run", "--quiet", "--collect", "--wait", "--pipe", "-p", "KillMode=process", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _log.info("stream %d: %s", stream.number, shlex.join(argv))
    assert child.stdin and child.stdout and child.stderr  # noqa: S101, PT018
    ends = [os.dup(pipe.fileno()) for pipe in (child.stdin, child.stdout, child.stderr)]
    for pipe in (child.stdin, child.stdout, child.stderr):
        pipe.close()
    stream.attach(sources={Kind.DATA: ends[1], Kind.ERROR: ends[2]}, sinks={Kind.DATA: ends[0]})
    loop = asyncio.get_running_loop()
    process = os.pidfd_open(child.pid)

    def exited() -> None:
        loop.remove_reader(process)
        os.close(process)
        stream.exited(child.wait())

    loop.add_reader(process, exited)

    def done(outcome: int | str) -> None:
        # The command has lost its pipes then, and tidies up by itself.
        _log.info("stream %d: %s", stream.number, f"exit code {outcome}" if isinstance(outcome, int) else outcome)

    return done


class Daemon:
    """All channels of this dom0, and its clients."""

    def __init__(self) -> None:
        self._sessions = GuestSessions()
        self._interrupt = Interrupt()
        self._channels: dict[int, Channel] = {}
        self._changed = asyncio.Event()

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
            connection, _address = await loop.sock_accept(listener)
            task = asyncio.create_task(self._client(connection))
            clients.add(task)
            task.add_done_callback(clients.discard)

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
        busy = [channel.wake() for channel in list(self._channels.values())]
        if any(busy):
            # An interrupt has many reasons but comes once: look again until there is nothing left.
            asyncio.get_running_loop().call_soon(self._wake)
        else:
            self._look_round()
        self._changed.set()
        self._changed.clear()

    def _look_round(self) -> None:
        """Finds channels that are new, or over."""
        for channel in list(self._channels.values()):
            channel.check()
        for session in self._sessions.all():
            if session.channel and session.state == "open" and session.owner is None:
                try:
                    channel = Channel(self._sessions, Pages(self._sessions, session), self._gone)
                except OSError as exc:
                    if exc.errno != errno.ENOTCONN:
                        _log.error("channel %d cannot be opened: %s", session.session, exc)
                    continue
                self._channels[session.session] = channel
                channel.wake()

    def _gone(self, channel: Channel) -> None:
        self._channels.pop(channel.session, None)

    # --- clients

    async def _client(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        with connection:
            await _ready(connection)
            try:
                text, fds, _flags, _address = socket.recv_fds(connection, REQUEST, 3)
                request = json.loads(text)
            except (OSError, ValueError) as exc:
                _log.warning("bad request: %s", exc)
                return
            try:
                answer = await self._serve_client(request, fds, connection)
            except (ValueError, OSError) as exc:
                answer = {"error": str(exc)}
            with suppress(OSError):
                await loop.sock_sendall(connection, json.dumps(answer).encode() + b"\n")

    async def _serve_client(self, request: dict[str, Any], fds: list[int], connection: socket.socket) -> dict[str, Any]:
        try:
            if request.get("command") == "status":
                return {"channels": [channel.status() for channel in self._channels.values()]}
            command(request)
            if len(fds) != 3:
                raise ValueError("three descriptors are needed")
            link = await self._link(request.pop("session", None))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        outcome: asyncio.Future[int | str] = asyncio.get_running_loop().create_future()
        stream = link.call(request, outcome.set_result)
        stream.attach(sources={Kind.DATA: fds[0]}, sinks={Kind.DATA: fds[1], Kind.ERROR: fds[2]})
        gone = asyncio.ensure_future(_ready(connection))
        ends: list[asyncio.Future[Any]] = [outcome, gone]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not outcome.done():
            stream.reset("the client has gone")
        gone.cancel()
        result = await outcome
        return {"code": result} if isinstance(result, int) else {"error": result}

    async def _link(self, session: int | None) -> Link:
        """The channel's, once it is up; ValueError if there is none."""

        def found() -> Link | None:
            links = [
                channel.link
                for channel in self._channels.values()
                if channel.link and session in (None, channel.session)
            ]
            if len(links) > 1:
                raise ValueError("session: there are several channels. Name one.")
            return links[0] if links else None

        with suppress(TimeoutError):
            async with asyncio.timeout(COMING):
                while not (link := found()):
                    await self._changed.wait()
                return link
        what = "no channel" if session is None else f"no channel {session}"
        raise ValueError(f"session: there is {what} that is up. Does vmbeam-channel run in the other host VM?")


async def _ready(connection: socket.socket) -> None:
    """Waits until something can be read, or the other end is gone."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(connection.fileno(), event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(connection.fileno())


def serve() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    async def main() -> None:
        await Daemon().serve()

    asyncio.run(main())
