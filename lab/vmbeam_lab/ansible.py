"""Runs playbooks and modules on the lab's inventory: bounded, without questions or colours.

``python -m vmbeam_lab.ansible COMMAND [ARGUMENT...]`` becomes that command, in the environment of the lab's Ansible.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import pathlib
import re
import sys
import typing

from . import paths
from .errors import CommandFailed, LabError, ModuleFailed
from .shell import run


def environment() -> dict[str, str]:
    """Return the environment of Ansible's commands in the lab.

    Ansible starts a Python and compiles a module's sources for each task: 10 s and more of an emulated CPU.
    Mitogen keeps one Python on each host: 1 to 3 s. ANSIBLE_STRATEGY=linear does without.
    """
    mitogen = importlib.resources.files("ansible_mitogen")
    return {
        "ANSIBLE_CONFIG": str(paths.REPOSITORY / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(paths.COLLECTIONS),
        "ANSIBLE_STRATEGY_PLUGINS": str(mitogen.joinpath("plugins", "strategy")),
        "ANSIBLE_STRATEGY": "mitogen_linear",
        # It says at each run that Ansible discourages strategies of others.
        "ANSIBLE_DEPRECATION_WARNINGS": "0",
        # The inventory tells ssh so by arguments, which Mitogen does not read for this.
        "ANSIBLE_HOST_KEY_CHECKING": "0",
        **os.environ,
    }


_PLAIN = {"ANSIBLE_NOCOLOR": "1"}

_RESULT = re.compile(r"(?m)^\S+ \| [A-Z]+!? => (?=\{)")


def playbook(path: pathlib.Path, *arguments: str, timeout: float, log: pathlib.Path) -> None:
    """Run the playbook `path` for at most `timeout` seconds, its output appended to `log`.

    :raises LabError: it failed or took too long
    """
    argv: list[str | pathlib.Path] = ["ansible-playbook", "-i", paths.INVENTORY, path, *arguments]
    run(argv, timeout=timeout, log=log, cwd=paths.REPOSITORY, env={**environment(), **_PLAIN})


def module(host: str, name: str, arguments: dict[str, typing.Any], timeout: float = 300) -> dict[str, typing.Any]:
    """Run a module on a host of the inventory and return its result.

    :raises ModuleFailed: it failed, and said why
    :raises LabError: it could not be run, or took longer than `timeout` seconds
    """
    argv: list[str | pathlib.Path] = ["ansible", "-i", paths.INVENTORY, host, "-m", name]
    if arguments:  # an empty object is taken for text
        argv += ["-a", json.dumps(arguments)]
    try:
        output = run(argv, timeout=timeout, cwd=paths.REPOSITORY, env={**environment(), **_PLAIN})
    except CommandFailed as exc:
        if not _RESULT.search(exc.output):
            raise
        raise ModuleFailed(parse_result(exc.output)) from exc
    return parse_result(output)


def parse_result(output: str) -> dict[str, typing.Any]:
    """Return the result in what the command ``ansible`` printed for one host, warnings left out.

    :raises LabError: there is none
    """
    found = _RESULT.search(output)
    if not found:
        raise LabError(f"no result in the output of ansible:\n{output}")
    return typing.cast(dict[str, typing.Any], json.JSONDecoder().raw_decode(output, found.end())[0])


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
