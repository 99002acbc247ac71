# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""How a migration stream gets to the other guest dom0."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

# Bound what a dead network can cost: about a minute and a half. First given wins in ssh, so the
# administrator's arguments come before these.
_DEFAULTS = (
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=30",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=6",
)


def ssh_command(address: str, user: str, ssh_args: Sequence[str] = ()) -> list[str]:
    """The ssh command that reaches the other dom0; the remote command is to be added."""
    return ["ssh", *ssh_args, *_DEFAULTS, f"{user}@{address}"]


def ssh_rune(ssh: Sequence[str], remote_command: str) -> str:
    """A shell command whose standard input and output are those of the remote shell command."""
    return f"exec {shlex.join([*ssh, remote_command])}"
