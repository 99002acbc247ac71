# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""How the controller reaches dom0s by ssh: from Ansible's connection variables to ssh's arguments and back."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _process
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import UnexpectedOutput, Unreachable
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import SSH_FAILED

# Each has an older name, which Ansible takes too.
_ADDRESS = ("ansible_host", "ansible_ssh_host")
_PORT = ("ansible_port", "ansible_ssh_port")
_USER = ("ansible_user", "ansible_ssh_user")
_KEY = ("ansible_ssh_private_key_file", "ansible_private_key_file")
_ARGUMENTS = ("ansible_ssh_common_args", "ansible_ssh_extra_args")

#: The variables of an inventory host that ssh_words() and behind() look at.
VARIABLES = (*_ADDRESS, *_PORT, *_USER, *_KEY, *_ARGUMENTS)


def ssh_words(name: str, variables: Mapping[str, Any]) -> list[str]:
    """Return ssh's arguments for an inventory host, the destination last.

    What `variables` leave open is for ssh's own configuration to say.
    """
    words = [word for name in _ARGUMENTS for word in shlex.split(str(variables.get(name) or ""))]
    for option, names in (("-p", _PORT), ("-l", _USER), ("-i", _KEY)):
        value = _first(variables, names)
        if value is not None:
            words += [option, str(value)]
    return [*words, "--", str(_first(variables, _ADDRESS) or name)]


def behind(machine: str, machine_variables: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the connection variables of a guest dom0, which is reached through its machine's host dom0.

    :param own: what the inventory says of the guest dom0 already, and is not overridden by the machine's
    """
    words = ssh_words(machine, machine_variables)
    # ssh replaces % in a ProxyCommand: only the guest dom0's address and port are meant for it.
    jump = shlex.join(["ssh", *words[:-2]]).replace("%", "%%")
    arguments = [
        # The first of several options of a name counts, so the machine's own way (a bastion) comes after.
        "-o",
        f"ProxyCommand={jump} -W '[%h]:%p' -- {shlex.quote(words[-1]).replace('%', '%%')}",
        # Inner addresses may repeat between machines. The key is known by the name, as role host_vm notes it.
        "-o",
        f"HostKeyAlias={name}",
        *shlex.split(str(own.get("ansible_ssh_common_args") or machine_variables.get("ansible_ssh_common_args") or "")),
    ]
    # Likewise: Ansible names the control socket by address, port and user.
    socket = hashlib.sha256(f"{machine}/{name}".encode()).hexdigest()[:12]
    found: dict[str, Any] = {
        "ansible_ssh_common_args": shlex.join(arguments),
        "ansible_control_path": f"%(directory)s/{socket}",
    }
    for names in (_USER, _KEY):
        value = _first(machine_variables, names)
        if value is not None and _first(own, names) is None:
            found[names[0]] = value
    return found


def run_all(
    run: _process.Run, words: Sequence[str], commands: Sequence[tuple[str, ...]], timeout: float
) -> _process.Run:
    """Run commands in one ssh session, a handshake being the dearest part, and return what answers like them.

    The returned function takes the place of :func:`_process.run` for exactly these commands. Standard error is not
    told apart: a command that failed has that of all.

    :param words: ssh_words() of the host
    :param timeout: seconds for all of it
    :raises Unreachable: ssh has no connection
    :raises UnexpectedOutput: the session ended before the last command did
    """
    # A zero byte is in no output of xl, nor in a text file.
    script = "; ".join(f"{shlex.join(command)}; printf '\\0%d\\0' $?" for command in commands)
    limit = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(timeout))}")
    result = run(("ssh", *limit, *words, script), timeout)
    if result.rc == SSH_FAILED:
        raise Unreachable(f"no connection by ssh: {_process.last_line(result.stderr) or 'no message'}")
    fields = result.stdout.split("\0")
    if len(fields) != 2 * len(commands) + 1:
        raise UnexpectedOutput(
            f"the session ended early: {_process.last_line(result.stderr) or 'no message'}", output=result.stdout[:2000]
        )
    answers = {
        command: _process.Result(command, int(fields[2 * number + 1]), fields[2 * number], result.stderr)
        for number, command in enumerate(commands)
    }
    return lambda argv, _timeout: answers[tuple(argv)]


def _first(variables: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((variables[name] for name in names if variables.get(name) not in (None, "")), None)
