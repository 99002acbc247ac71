# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Runs a command on another host with its standard input and output on a plain TCP connection.

A program of its own: _transport gives this text to "python3 -c" on both hosts. The client starts the
server through ssh and gives it a token, the command and the address to listen on; the server answers
with its port and takes the first connection that brings the token. What the command says on standard
error, and its exit code, come back through ssh.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from typing import IO, cast

# Seconds until a connection must stand, and until a silent peer is given up.
CONNECT = 60
DEAD = 120
TOKEN = 64


def prepare(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD * 1000)


def receive_token(connection: socket.socket) -> str:
    token = b""
    while len(token) < TOKEN and (part := connection.recv(TOKEN - len(token))):
        token += part
    return token.decode("ascii", "replace")


def accept(listener: socket.socket, token: str) -> socket.socket:
    """The first connection that brings the token, within CONNECT seconds."""
    end = time.monotonic() + CONNECT
    while (left := end - time.monotonic()) > 0:
        listener.settimeout(left)
        connection, _peer = listener.accept()
        # One that says nothing must not keep the right one waiting for long.
        connection.settimeout(min(5.0, left))
        try:
            if hmac.compare_digest(receive_token(connection), token):
                return connection
        except OSError:
            pass
        connection.close()
    raise TimeoutError("no connection brought the token")


def server() -> int:
    request = json.loads(sys.stdin.readline())
    family, kind, protocol, _name, address = socket.getaddrinfo(
        request["address"], 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, b"%d\n" % listener.getsockname()[1])
        connection = accept(listener, request["token"])
    with connection:
        prepare(connection)
        # xl reads and writes file descriptors of its own; the shell joins them to the connection.
        end = connection.fileno()
        command = subprocess.Popen(["sh", "-c", str(request["command"])], stdin=end, stdout=end)
    return command.wait()


def pour(source: int, sink: int) -> None:
    """Copies a stream until it ends or breaks.

    Not by splice: the end of a burst that it sends to a socket was seen to stay back (Linux 6.18), and
    in xl's protocol each side waits for the other.
    """
    with contextlib.suppress(OSError):
        while data := os.read(source, 1 << 18):
            while data:
                data = data[os.write(sink, data) :]


def send(connection: socket.socket) -> None:
    pour(0, connection.fileno())
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def client(address: str, command: str, ssh: list[str]) -> int:
    token = secrets.token_hex(TOKEN // 2)
    control = subprocess.Popen(ssh, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    # None only to the type checker.
    to_server, from_server = cast(IO[bytes], control.stdin), cast(IO[bytes], control.stdout)
    to_server.write(json.dumps({"address": address, "token": token, "command": command}).encode() + b"\n")
    to_server.flush()
    port = from_server.readline().strip()
    if not port.isdigit():
        to_server.close()
        return control.wait() or 1
    with socket.create_connection((address, int(port)), CONNECT) as connection:
        prepare(connection)
        connection.sendall(token.encode())
        threading.Thread(target=send, args=(connection,), daemon=True).start()
        pour(connection.fileno(), 1)
        os.close(1)
        return control.wait()


if __name__ == "__main__":
    raise SystemExit(server() if sys.argv[1] == "server" else client(sys.argv[2], sys.argv[3], sys.argv[4:]))
