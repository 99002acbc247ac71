# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Moves a guest without its memory: shut down in one guest dom0, started from its configuration in the other."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import Conflict, InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._guest import Guests, name_in
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Clock, Deadline
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

# States in which a guest can be stopped without losing more than its memory.
STATES = ("running", "blocked", "shutdown", "crashed")


@dataclass(frozen=True)
class ColdOptions:
    """How a guest is stopped. config: path of its xl configuration, the same in both guest dom0s.

    shutdown_timeout is in seconds; destroy: whether a guest that takes longer is destroyed.
    """

    config: str
    shutdown_timeout: float = 300.0
    destroy: bool = False


class Ends(Protocol):
    """The two guest dom0s."""

    @property
    def source(self) -> Xl: ...

    @property
    def destination(self) -> Xl: ...


class ColdMove:
    """The steps of a cold move. Whoever calls them knows where the guest is, and that nobody else moves it."""

    def __init__(self, name: str, links: Ends, options: ColdOptions, clock: Clock) -> None:
        self._name = name
        self._source = links.source
        self._destination = links.destination
        self._options = options
        self._clock = clock

    def check(self) -> None:
        """Raises InvalidInput unless the destination can start the guest, as far as is known without trying."""
        self._check(self._destination, "destination")

    def _check(self, xl: Xl, side: str) -> None:
        path = self._options.config
        read = xl.shell(f"cat -- {shlex.quote(path)}")
        if read.rc != 0:
            raise InvalidInput(f"config: {path} cannot be read at the {side}: {read.stderr.strip()}.")
        found = name_in(read.stdout)
        if found != self._name:
            raise InvalidInput(
                f"config: {path} at the {side} is the configuration of {found!r}, not of {self._name!r}."
            )

    def stop(self, guest: Domain) -> None:
        """Shuts the guest down. Raises WaitTimeout if it stays and may not be destroyed, Conflict if it is back."""
        deadline = Deadline(self._options.shutdown_timeout, self._clock)
        Guests(self._source).remove(guest, deadline, graceful=True, forced=self._options.destroy)
        back = self._source.domain(self._name)
        if back and back.state != "dying":
            raise Conflict(
                f"{self._name} was started again at the source when it had shut down (domain {back.domid}): "
                "see on_poweroff in its configuration."
            )

    def start(self, timeout: float, receiver: Callable[[str], str]) -> None:
        """Starts the guest at the destination.

        receiver: makes of a shell command one that holds the lock of the guest's receiver. It outlives a broken
        connection, so after a failure wait for it before undo_start().
        """
        command = receiver(f"xl create {shlex.quote(self._options.config)}")
        self._destination.shell(command, timeout=timeout).check()

    def undo_start(self, timeout: float) -> str:
        """Destroys what a failed start left at the destination and starts the guest at the source.

        Returns what was done; raises what keeps it from that. Nobody else may start the guest meanwhile.
        """
        half = self._destination.domain(self._name)
        if half:
            self._destination.destroy(half.domid)
        self._check(self._source, "source")
        Guests(self._source).create(self._name, self._options.config, Deadline(timeout, self._clock), paused=False)
        return f"start {self._name} again at the source"
