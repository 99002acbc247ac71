"""A connection to a machine of the simulated fleet: takes what would go through ssh, and answers for the machine.

All that is before ssh is Ansible's own: the module is built and sent to this plugin as it would be to ssh.
"""

from __future__ import annotations

import ast
import json
import pathlib
import re
import typing

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ConnectionBase

from benchmarks.fleet.simulation import Fleet

DOCUMENTATION = """
name: simulated
short_description: Answers for a machine of the simulated fleet
description: For the fleet benchmark only.
author: vmbeam contributors
extends_documentation_fragment: [connection_pipelining]
options:
  fleet:
    description: Folder of the machines' states.
    type: path
    required: true
    vars: [{name: simulated_fleet}]
  machine:
    description: The machine.
    type: str
    required: true
    vars: [{name: simulated_machine}]
  place:
    description: The machine's name for its host dom0, a host VM's for that one's guest dom0.
    type: str
    required: true
    vars: [{name: simulated_place}]
"""

_TMP = re.compile(r"echo (ansible-tmp-[\w.-]+)=")
Answer = tuple[int, bytes, bytes]


class Connection(ConnectionBase):  # type: ignore[misc]
    """Answers for one dom0."""

    transport = "simulated"
    has_pipelining = True

    def _connect(self) -> Connection:
        self._connected = True
        return self

    @property
    def _fleet(self) -> Fleet:
        return Fleet(pathlib.Path(self.get_option("fleet")))

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> Answer:
        """Answer a command of the shell or, if there is input, the module that it is."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        if not in_data:
            return _shell(cmd)
        module, arguments = module_call(in_data.decode())
        try:
            answer = self._fleet.call(self.get_option("machine"), self.get_option("place"), module, arguments)
        except ConnectionError as error:
            raise AnsibleConnectionFailure(str(error)) from error
        return int(bool(answer.get("failed"))), json.dumps(answer).encode(), b""

    def put_file(self, in_path: str, out_path: str) -> None:
        """Take a file."""
        super().put_file(in_path, out_path)
        self._fleet.upload(self.get_option("machine"), out_path, pathlib.Path(in_path).read_text())

    def fetch_file(self, in_path: str, out_path: str) -> None:
        """Refuse: no playbook fetches files."""
        raise AnsibleConnectionFailure("fetching files is not simulated")

    def close(self) -> None:
        """There is nothing to close."""
        self._connected = False

    def reset(self) -> None:
        """There is nothing to reset."""


def module_call(payload: str) -> tuple[str, dict[str, typing.Any]]:
    """Return name, without collection, and arguments of the module in a payload that Ansible made for Python.

    :raises AnsibleConnectionFailure: it is something else
    """
    # The call is at its end, behind the source of the wrapper and before or behind the base64 of the module.
    found = dict(re.findall(r"^(ansible_module|params)=(.*),$", payload, re.MULTILINE))
    if len(found) != 2:
        raise AnsibleConnectionFailure("this version of Ansible sends modules in a form that is not known here")
    name, arguments = ast.literal_eval(found["ansible_module"]), json.loads(ast.literal_eval(found["params"]))
    return name.rsplit(".", 1)[-1], arguments["ANSIBLE_MODULE_ARGS"]


def _shell(command: str) -> Answer:
    """Answer what Ansible itself asks of a shell: a home, a temporary folder, its mode, its end."""
    folder = _TMP.search(command)
    if folder:
        return 0, f"{folder[1]}=/root/.ansible/tmp/{folder[1]}\n".encode(), b""
    return 0, b"/root\n" if "echo ~" in command else b"", b""
