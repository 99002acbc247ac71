# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Typed errors of the private layers; only a module's main() turns them into fail_json."""

from __future__ import annotations

from typing import Any


class VmbeamError(Exception):
    """Base of all expected failures.

    The message is one or two sentences for the administrator: what is wrong and what to do.
    details are added to the module's failure result.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class InvalidInput(VmbeamError):
    """A module argument cannot be used. The message names the argument and the fix."""


class Conflict(VmbeamError):
    """The observed state forbids the requested change; nothing was changed."""


class Undecided(Conflict):
    """It cannot be decided by what is seen where a guest is, or what to do; nothing was touched."""


class NotFound(VmbeamError):
    """Something that must exist does not."""


class CommandError(VmbeamError):
    """A command failed. Details: cmd (list), rc (int), stdout, stderr."""


class CommandTimeout(VmbeamError):
    """A command did not end in time and was ended. Details: cmd (list), timeout (seconds)."""


class XenUnavailable(VmbeamError):
    """xl cannot be run at all, or cannot reach the hypervisor or xenstored."""


class Unreachable(VmbeamError):
    """ssh could not reach the other dom0."""


class UnexpectedOutput(VmbeamError):
    """The output of a tool is not of the form that this collection knows. Details: output."""


class WaitTimeout(VmbeamError):
    """A condition did not become true in time. Details: elapsed (seconds)."""
