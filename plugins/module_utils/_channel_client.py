# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The command vmbeam-channel of a guest dom0.

Its start is a part of each migration's time: it imports nothing that it does not need.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import NoReturn

#: As in _channel_daemon.
SOCKET = "/run/vmbeam/channel.sock"
USAGE = """\
usage: vmbeam-channel receive GUEST [SESSION]   have the other host VM receive a guest: xl migrate --zero-copy -s "" \
GUEST "exec vmbeam-channel receive GUEST"
       vmbeam-channel receive-copy GUEST [SESSION]   the same without --zero-copy
       vmbeam-channel restore GUEST [SESSION]   have it restore a guest, paused, that xl save writes
       vmbeam-channel list [SESSION]            the other host VM's domains
       vmbeam-channel discard [SESSION]         send standard input there, for nothing
       vmbeam-channel measure [SESSION]         how fast memory gets there, as JSON
       vmbeam-channel status                    the channels, as JSON
       vmbeam-channel serve                     the daemon
SESSION names the channel if there are several."""
#: As ssh's: the transport itself has failed.
FAILED = 255


def _request(arguments: list[str]) -> dict[str, object] | None:
    if not arguments:
        return None
    request: dict[str, object] = {"command": arguments.pop(0)}
    if request["command"] in ("receive", "receive-copy", "restore"):
        if not arguments:
            return None
        request["guest"] = arguments.pop(0)
    elif request["command"] not in ("list", "discard", "measure", "status"):
        return None
    if arguments:
        if not arguments[0].isdigit():
            return None
        request["session"] = int(arguments.pop(0))
    return None if arguments else request


def _fail(reason: str) -> NoReturn:
    sys.stderr.write(f"vmbeam-channel: {reason}\n")
    raise SystemExit(FAILED)


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        from ansible_collections.vmbeam.xen.plugins.module_utils._channel_daemon import serve

        serve()
        return
    request = _request(sys.argv[1:])
    if not request:
        raise SystemExit(USAGE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        try:
            daemon.connect(SOCKET)
        except OSError as exc:
            _fail(f"{SOCKET}: {exc.strerror}. Is the service vmbeam-channel running?")
        fds = [] if request["command"] in ("measure", "status") else [0, 1, 2]
        socket.send_fds(daemon, [json.dumps(request).encode()], fds)
        # The daemon has copies: without ours, whoever is at the other end notices when it closes them.
        for fd in fds[:2]:
            os.close(fd)
        with daemon.makefile() as lines:
            answer = json.loads(lines.readline() or '{"error": "the daemon has ended"}')
    if "error" in answer:
        _fail(answer["error"])
    if "code" in answer:
        raise SystemExit(answer["code"])
    sys.stdout.write(json.dumps(answer) + "\n")
