# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Who runs Ansible, such that a later run can tell whether that process is still alive."""

from __future__ import annotations

import datetime
import getpass
import multiprocessing
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


def identity() -> dict[str, Any]:
    """Return who runs ansible-playbook: run_id (unique), user, controller (host name) and process.

    A process is {boot, namespace, pid, started}: a number is that of one process only within one boot and one PID
    namespace (a container), and until it is used again.
    """
    # Tasks are templated in a child of the process that is meant.
    parent = multiprocessing.parent_process()
    pid = parent.pid if parent and parent.pid else os.getpid()
    started = _started(pid)
    began = datetime.datetime.fromtimestamp(_epoch(started), datetime.UTC)
    user, controller = _user(), socket.gethostname()
    return {
        "run_id": f"{began:%Y%m%dT%H%M%SZ}-{user}-{controller}-{pid}",
        "user": user,
        "controller": controller,
        "process": {"boot": _boot(), "namespace": _namespace(), "pid": pid, "started": started},
    }


def lock_owner(me: Mapping[str, Any], run_id: str) -> str:
    """Return under which name this process, whose identity is `me`, takes the locks of machines for the run `run_id`.

    A run that is repeated under the same name is another owner.
    """
    return run_id if run_id == me["run_id"] else f"{run_id} ({me['run_id']})"


def alive(process: Mapping[str, Any]) -> bool | None:
    """Return whether the process still runs; None if that cannot be seen from here."""
    if not process or process.get("namespace") != _namespace() or process.get("boot") != _boot():
        return None
    try:
        return _started(int(process["pid"])) == process.get("started")
    except (FileNotFoundError, ProcessLookupError):
        return False


def abandoned(holder: Mapping[str, Any], run_id: str, break_lock: str = "") -> bool:
    """Return whether a host's lock (the `holder` that host_lock returns) may be taken from the run that holds it.

    That is so if its controller process is known to be dead; if it is of the run `run_id`, which is being resumed, and
    its process is not seen to be alive; or if `break_lock` names its owner.
    """
    if not holder:
        return False
    if break_lock and break_lock == holder.get("owner"):
        return True
    details = holder.get("details") or {}
    living = alive(details.get("process") or {})
    return living is False or (living is None and details.get("run_id") == run_id)


def _started(pid: int) -> int:
    """Return when the process began, in clock ticks since the boot."""
    # The command's name, in parentheses, may hold anything.
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        raise ProcessLookupError(pid)
    return int(fields[19])


def _epoch(ticks: int) -> float:
    booted = next(line for line in (_PROC / "stat").read_text().splitlines() if line.startswith("btime"))
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return os.readlink(_PROC / "self/ns/pid")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
