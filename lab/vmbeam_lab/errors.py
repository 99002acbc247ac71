"""Errors that the lab's commands report without a traceback."""


class LabError(Exception):
    """Something about the lab failed; the message says what and what to do."""


class TopologyError(LabError):
    """The topology file is not usable; the message names the field."""


class BootTimeout(LabError):
    """A machine did not reach the awaited state in time."""
