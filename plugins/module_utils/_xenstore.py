# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Asks xenstored for nodes, and how many of them domains own: read only, over its socket.

The protocol is that of xen/include/public/io/xs_wire.h; both xenstored (in C) and oxenstored answer.
Counting so costs one request a domain, while a walk through the nodes takes two a node.
"""

from __future__ import annotations

import re
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import UnexpectedOutput, XenUnavailable

SOCKET = "/run/xenstored/socket"

# struct xsd_sockmsg: type, req_id, tx_id, len
_HEADER = struct.Struct("=IIII")
_CONTROL = 0
_DIRECTORY = 1
_READ = 2
_ERROR = 16
_MAX_PAYLOAD = 4096

_OCAML = re.compile(r"dom\d+ quota: (?:(?P<nodes>\d+)/(?P<quota>\d+)|not set)")
_C_ROW = re.compile(r"(?m)^(nodes|memory) *: *(\d+)")


@dataclass(frozen=True)
class Usage:
    """What a domain has in xenstore: nodes, those that it may have, and bytes; None for what is not told."""

    nodes: int
    quota: int | None
    size: int | None


class Xenstore:
    """A connection to the xenstored of this dom0. Use it as a context manager."""

    def __init__(self, path: str = SOCKET, timeout: float = 10.0) -> None:
        """timeout: seconds that each answer may take. Raises XenUnavailable."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
        except OSError as exc:
            self._socket.close()
            raise XenUnavailable(f"xenstored does not answer at {path}: {exc.strerror or exc}.") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def usage(self, domid: int) -> Usage | None:
        """What the domain has, None if xenstored does not know it. Raises XenUnavailable or UnexpectedOutput."""
        said = self._control("quota", str(domid))
        if said is None:
            return None
        ocaml = _OCAML.fullmatch(said)
        if ocaml:
            return Usage(int(ocaml["nodes"] or 0), int(ocaml["quota"]) if ocaml["quota"] else None, None)
        rows = dict(_C_ROW.findall(said))
        if "nodes" not in rows:
            raise UnexpectedOutput("xenstored answered a question for quotas in an unknown form.", output=said)
        quotas = dict(_C_ROW.findall(self._control("quota") or ""))
        return Usage(
            int(rows["nodes"]),
            int(quotas["nodes"]) if "nodes" in quotas else None,
            int(rows["memory"]) if "memory" in rows else None,
        )

    def read(self, path: str) -> str | None:
        """The value of a node, None if there is none or it may not be read. Raises XenUnavailable."""
        return self._ask(_READ, path)

    def children(self, path: str) -> list[str]:
        """The names of the nodes below a node, none if it is not there. Raises XenUnavailable."""
        said = self._ask(_DIRECTORY, path)
        return said.split("\0") if said else []

    def _control(self, *words: str) -> str | None:
        """The answer to a control command, None if it is an error."""
        return self._ask(_CONTROL, *words)

    def _ask(self, request: int, *words: str) -> str | None:
        """The answer to a request, None if it is an error."""
        payload = b"".join(word.encode() + b"\0" for word in words)
        try:
            self._socket.sendall(_HEADER.pack(request, 0, 0, len(payload)) + payload)
            kind, _request, _transaction, length = _HEADER.unpack(self._receive(_HEADER.size))
            if length > _MAX_PAYLOAD:
                raise UnexpectedOutput(f"xenstored announced an answer of {length} bytes.", output="")
            answer = self._receive(length)
        except OSError as exc:
            raise XenUnavailable(f"xenstored does not answer: {exc.strerror or exc}.") from exc
        return None if kind == _ERROR else answer.rstrip(b"\0").decode(errors="replace")

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise XenUnavailable("xenstored closed the connection.")
            data += part
        return data
