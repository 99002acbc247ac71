# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Sessions in which two host VMs exchange memory, by way of libxenctrl.

What a session is, its states and errors: xen/include/public/memory.h, XENMEM_zerocopy_op; the calls:
tools/include/xenctrl.h, xc_zerocopy_*.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _xenctrl
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    Conflict,
    NotFound,
    VmbeamError,
)

STATES = ("none", "open", "committing", "committed", "undoing", "aborted")
ROLES = ("none", "source", "destination")
FRAME = 4096
#: A page of control, and two rings of sixteen of the largest frames each: the other side takes milliseconds to wake up.
#: Role guest_hypervisor has Linux let a dom0 share as many pages.
CHANNEL_FRAMES = 1 + 2 * (16 * 256 + 1)
#: XEN_DOMCTL_ZEROCOPY_F_NEXT and XEN_ZEROCOPY_F_NEXT.
_HOST_NEXT = 1 << 2
_GUEST_NEXT = 1 << 3
# XEN_ZEROCOPY_INFO_*
_CHANNEL = 1 << 0
_CLOSED = {"source": 1 << 1, "destination": 1 << 2}
_DEAD = {"source": 1 << 3, "destination": 1 << 4}
#: XEN_DOMCTL_ZEROCOPY_F_CHANNEL.
_BIND_CHANNEL = 1 << 0
_DOMID_INVALID = 0x7FF4
_VERSION = _xenctrl.VERSION


class Unsupported(VmbeamError):
    """The hypervisor, or its tools, know nothing of zero-copy migration."""


_COUNTS = (
    "max_frames",
    "offered",
    "shared",
    "copies",
    "exchanged",
    "copied",
    "calls",
    "p2m_writes_4k",
    "p2m_writes_2m",
    "lost",
)


class _Info(ctypes.Structure):
    """struct xen_zerocopy_info"""

    _fields_ = (
        ("session", ctypes.c_uint32),
        ("state", ctypes.c_uint8),
        ("role", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("version", ctypes.c_uint32),
        *((name, ctypes.c_uint32) for name in _COUNTS),
        ("reserved", ctypes.c_uint32),
    )


class _Extent(ctypes.Structure):
    """struct xen_domctl_zerocopy_extent"""

    _fields_ = (
        ("gfn", ctypes.c_uint64),
        ("gref", ctypes.c_uint32),
        ("order", ctypes.c_uint8),
        ("status", ctypes.c_uint8),
        ("pad", ctypes.c_uint16),
    )


# XEN_DOMCTL_ZEROCOPY_EXT_*
_DONE, _UNSEEN, _AGAIN, _BUSY = 0, 1, 5, 6
_DOM0 = ctypes.c_uint32(0)


@dataclass(frozen=True)
class Session:
    """A session. Frames are of 4 KiB.

    source, destination: domain ids of the host VMs; None as seen from within a host VM.
    owner: within a host VM, the id of the guest that has opened it, None if none has.
    calls: hypercalls of the two guest hypervisors; p2m_writes: changes of the host VMs' memory maps by order.
    lost: frames that were exchanged and could not be given back.
    closed, dead: the roles whose guest hypervisor has closed it, and whose host VM is shut down or gone.
    """

    session: int
    state: str
    role: str
    channel: bool
    max_frames: int
    offered: int
    shared: int
    copies: int
    exchanged: int
    copied: int
    calls: int
    p2m_writes_4k: int
    p2m_writes_2m: int
    lost: int
    closed: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    source: int | None = None
    destination: int | None = None
    owner: int | None = None

    @property
    def unused(self) -> bool:
        """Whether a migration may still take it."""
        return self.state == "open" and self.offered == 0 and self.owner is None and not self.channel

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _session(info: _Info) -> Session:
    return Session(
        state=STATES[info.state] if info.state < len(STATES) else str(info.state),
        role=ROLES[info.role] if info.role < len(ROLES) else str(info.role),
        channel=bool(info.flags & _CHANNEL),
        closed=[role for role, flag in _CLOSED.items() if info.flags & flag],
        dead=[role for role, flag in _DEAD.items() if info.flags & flag],
        **{name: getattr(info, name) for name in ("session", *_COUNTS)},
    )


_UNSUPPORTED = (
    "The hypervisor, or the one below it, has no zero-copy migration. Install the patched packages on the machine "
    "and in its host VMs, or use another strategy."
)


class _Control(_xenctrl.Interface):
    """An open handle of a libxenctrl that knows sessions; errors of its calls become ours."""

    def __init__(self, library: Any = None) -> None:
        super().__init__(library or _load())

    def call(self, name: str, *arguments: Any) -> None:
        """Calls xc_zerocopy_NAME; raises OSError with the errno it has set."""
        if self.invoke(f"xc_zerocopy_{name}", *arguments) != 0:
            number = ctypes.get_errno()
            if number == errno.ENOSYS:
                raise Unsupported(_UNSUPPORTED)
            raise OSError(number, os.strerror(number))

    def ask(self, name: str, *arguments: Any) -> None:
        """Calls xc_zerocopy_NAME, one that names no domain but DOMID_INVALID; as call().

        A hypervisor without our patches does not know that there is none to look for, and says that it does not run;
        ours has no such answer to a question. Ours says EOPNOTSUPP where it was built without what sessions need, or
        runs on bare hardware and not in a host VM.
        """
        try:
            self.call(name, *arguments)
        except OSError as exc:
            if exc.errno in (errno.ESRCH, errno.EOPNOTSUPP):
                raise Unsupported(_UNSUPPORTED) from exc
            raise

    def each(self, query: Callable[[int], Session]) -> Iterator[Session]:
        """All sessions, by a query for the next one after a number."""
        number = 0
        while True:
            try:
                found = query(number)
            except OSError as exc:
                if exc.errno == errno.ENOENT:
                    return
                raise
            yield found
            number = found.session


def _load() -> Any:
    """The libxenctrl of the running hypervisor's version."""
    try:
        library = _xenctrl.library(_VERSION)
        library.xc_zerocopy_query  # noqa: B018 - looked up in the library
    except (OSError, AttributeError) as exc:
        raise Unsupported(f"libxenctrl has no zero-copy migration: {exc}. Install the patched Xen packages.") from exc
    return library


class HostSessions(_Control):
    """The sessions of a machine, for its host dom0."""

    def query(self, session: int, flags: int = 0) -> Session:
        """One session; raises OSError ENOENT."""
        source, destination, info = ctypes.c_uint32(), ctypes.c_uint32(), _Info()
        self.ask(
            "query",
            ctypes.c_uint32(session),
            ctypes.c_uint32(flags),
            *map(ctypes.byref, (source, destination, info)),
        )
        return replace(_session(info), source=source.value, destination=destination.value)

    def all(self) -> list[Session]:
        return list(self.each(lambda number: self.query(number, _HOST_NEXT)))

    def bind(self, source: int, destination: int, max_frames: int, *, channel: bool = False) -> Session:
        """Allows the source to pass max_frames frames to the destination, or lets them share these. Raises Conflict."""
        number = ctypes.c_uint32()
        try:
            flags = _BIND_CHANNEL if channel else 0
            self.call("bind", *map(ctypes.c_uint32, (source, destination, max_frames, flags)), ctypes.byref(number))
        except OSError as exc:
            raise Conflict(_BIND_ERRORS.get(exc.errno or 0, f"The hypervisor refuses the session: {exc}.")) from exc
        return self.query(number.value)

    def remove(self, session: int) -> None:
        """Ends a session: what is not committed is undone.

        Raises Conflict if the hypervisor keeps it, because a guest hypervisor does not know yet whose the guest is.
        """
        try:
            try:
                self.call("force_abort", ctypes.c_uint32(session))
            except OSError as exc:
                # It is committed: nothing to undo.
                if exc.errno not in (errno.EISCONN, errno.ENOTCONN):
                    raise
            self.call("unbind", ctypes.c_uint32(session))
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                return
            if exc.errno == errno.EBUSY:
                raise Conflict(
                    f"Session {session} cannot be ended: its migration was broken off after the memory had begun to "
                    "change hands, and a host VM has not yet been told who has the guest now. Migrate the guest "
                    "again, or run xl migrate-recover for its domain in both host VMs."
                ) from exc
            raise Conflict(f"Session {session} cannot be ended: {exc}.") from exc


_BIND_ERRORS = {
    errno.ESRCH: "One of the two host VMs does not run.",
    errno.EOPNOTSUPP: "One of the two is no HVM domain with HAP and nested virtualization, or has a passed-through "
    "device, populate-on-demand memory, log-dirty mode or altp2m.",
    errno.EPERM: "One of the two is a control domain.",
    errno.EACCES: "The security policy of the host hypervisor forbids it.",
    errno.EBUSY: "One of the two host VMs is just starting or ending. Try again when it is up.",
    errno.EEXIST: "The destination has a session from another host VM, whose guests move first. Remove that session "
    "when they have.",
    errno.ENOSPC: "The host VM has too many sessions already. Remove those that are not needed.",
    errno.ENOMEM: "The host hypervisor has too little memory for the session.",
}


@dataclass(frozen=True)
class Shared:
    """What came of sharing pages.

    missing: the other side has not lent all of them yet. busy: positions of pages that are in use elsewhere on the
    machine, such as by the device model of this host VM, which keeps what lies around its devices' buffers mapped.
    """

    missing: bool
    busy: list[int]


class GuestSessions(_Control):
    """The sessions of a host VM, for its guest dom0."""

    def query(self, session: int, flags: int = 0) -> Session:
        """One session; raises OSError ENOENT."""
        owner, info = ctypes.c_uint32(), _Info()
        self.ask("guest_query", ctypes.c_uint32(session), ctypes.c_uint32(flags), *map(ctypes.byref, (owner, info)))
        return replace(_session(info), owner=None if owner.value == _DOMID_INVALID else owner.value)

    def all(self) -> list[Session]:
        return list(self.each(lambda number: self.query(number, _GUEST_NEXT)))

    def get(self, session: int) -> Session:
        """One session; raises NotFound."""
        try:
            return self.query(session)
        except OSError as exc:
            raise NotFound(f"session: this host VM has no session {session}: {exc}.") from exc

    # --- channels; the domain that takes part is this dom0

    def open(self, session: int, role: str) -> None:
        self.call("guest_open", _DOM0, ctypes.c_uint32(session), ctypes.c_uint32(ROLES.index(role)), None)

    def prepare(self, session: int) -> None:
        """Has device models of this host VM drop what they have mapped, which would be in the way."""
        self.call("guest_prepare", _DOM0, ctypes.c_uint32(session))

    def share(self, session: int, grefs: Sequence[int]) -> Shared:
        """Lends, or takes, a page for each grant reference. May be repeated, with other pages in place of busy ones."""
        extents = (_Extent * len(grefs))(
            *(_Extent(gfn=index, gref=gref, status=_UNSEEN) for index, gref in enumerate(grefs))
        )
        self.call("guest_extents", _DOM0, *map(ctypes.c_uint32, (session, 0, len(grefs))), extents)
        outcomes = {extent.status for extent in extents}
        if outcomes - {_DONE, _AGAIN, _BUSY}:
            raise OSError(errno.EINVAL, f"pages of session {session} cannot be shared: status {sorted(outcomes)}")
        return Shared(_AGAIN in outcomes, [index for index, extent in enumerate(extents) if extent.status == _BUSY])

    def notify(self, session: int) -> None:
        self.call("guest_notify", _DOM0, ctypes.c_uint32(session))

    def abort(self, session: int) -> None:
        self.call("guest_abort", _DOM0, ctypes.c_uint32(session))

    def close_session(self, session: int) -> None:
        self.call("guest_close", _DOM0, ctypes.c_uint32(session))


def require_capable() -> None:
    """Raises Unsupported unless this host VM's hypervisor and tools, and the hypervisor below, know zero-copy."""
    with GuestSessions() as sessions:
        sessions.ask("guest_capable", None)
