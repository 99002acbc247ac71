"""Errors that the lab's commands report without a traceback."""

import typing


class LabError(Exception):
    """Something about the lab failed; the message says what and what to do."""


class CommandFailed(LabError):
    """A command ended with a failure."""

    def __init__(self, message: str, output: str) -> None:
        """:param output: all that it printed"""
        super().__init__(message)
        self.output = output


class ModuleFailed(LabError):
    """A module of Ansible failed, and said why."""

    def __init__(self, result: dict[str, typing.Any]) -> None:
        """:param result: what it returned"""
        super().__init__(str(result.get("msg", result)))
        self.result = result


class TopologyError(LabError):
    """The topology file is not usable; the message names the field."""


class BootTimeout(LabError):
    """A machine did not reach the awaited state in time."""
