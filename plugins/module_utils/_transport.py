# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""How a migration stream gets to the other guest dom0."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Sequence

from ansible_collections.vmbeam.xen.plugins.module_utils import _process, _tcp_relay
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import VmbeamError
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import QUICK, domains

# Bound what a dead network can cost: about two minutes. The first given wins in ssh, so the
# administrator's arguments come before these.
_DEFAULTS = (
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=30",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=8",
    # A shared connection would outlive the migration and keep its lock.
    "-oControlPath=none",
)


def ssh_command(address: str, user: str, ssh_args: Sequence[str] = ()) -> list[str]:
    """The ssh command that reaches the other dom0; the remote command is to be added."""
    return ["ssh", *ssh_args, *_DEFAULTS, f"{user}@{address}"]


def channel_rune(receiver: str, guest: str, session: int | None) -> str:
    """A shell command whose standard input and output are those of a receiver of the guest at the other end.

    receiver: which one, as vmbeam-channel names it.
    """
    return shlex.join(["exec", *_channel(receiver, guest, session=session)])


def channel_domains(session: int | None) -> list[Domain]:
    """The domains of the other host VM, except Domain-0; raises CommandError and its siblings."""
    return domains(_process.run(_channel("list", session=session), QUICK).check().stdout)


def channel_version() -> int | None:
    """Which version of the channel this host VM speaks; None if its daemon does not tell."""
    try:
        answer = json.loads(_process.run(_channel("status", session=None), QUICK).check().stdout)
    except (VmbeamError, ValueError):
        return None
    version = answer.get("version")
    return version if isinstance(version, int) else None


def _channel(*arguments: str, session: int | None) -> list[str]:
    return ["vmbeam-channel", *arguments, *([str(session)] if session else [])]


def ssh_rune(ssh: Sequence[str], remote_command: str) -> str:
    """A shell command whose standard input and output are those of the remote shell command."""
    return f"exec {shlex.join([*ssh, remote_command])}"


def tcp_rune(ssh: Sequence[str], address: str, remote_command: str) -> str:
    """As ssh_rune, but the two streams go over a TCP connection to the address; ssh starts the command."""
    program = inspect.getsource(_tcp_relay)
    server = shlex.join(["python3", "-c", program, "server"])
    return f"exec {shlex.join([sys.executable, '-c', program, 'client', address, remote_command, *ssh, server])}"
