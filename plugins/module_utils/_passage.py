# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The sessions and channels that two host VMs need, for the host dom0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import Conflict, InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import CHANNEL_FRAMES, HostSessions, Session


def ends(params: Mapping[str, Any]) -> list[str]:
    """The host VMs that a module's options source and destination name. Raises InvalidInput."""
    names = [_checks.domain_name(option, params[option]) for option in ("source", "destination")]
    if names[0] == names[1]:
        raise InvalidInput(f"destination: {names[1]} is the source, too. Name another host VM.")
    return names


def between(sessions: HostSessions, pair: Sequence[Domain | None], *, channel: bool) -> list[Session]:
    """The sessions by which the first of two host VMs passes memory to the second, or the channels of both."""
    ids = [domain.domid if domain else None for domain in pair]
    return [entry for entry in sessions.all() if [entry.source, entry.destination] == ids and entry.channel == channel]


def bound(
    sessions: HostSessions,
    names: Sequence[str],
    pair: Sequence[Domain | None],
    count: int,
    frames: int | None,
    *,
    check: bool = False,
) -> tuple[list[Session], list[Session]]:
    """Sees that there are `count` unused sessions for that many frames, or open channels with None.

    Returns those that were found, and with those that were bound. Raises Conflict.
    """
    for option, name, domain in zip(("source", "destination"), names, pair, strict=True):
        if domain is None or not domain.live:
            raise Conflict(f"{option}: {name} is {domain.state if domain else 'absent'}. Start it first.")
    source, destination = (domain.domid for domain in pair if domain)
    channel = frames is None
    size = CHANNEL_FRAMES if frames is None else frames
    there = between(sessions, pair, channel=channel)
    usable = (entry for entry in there if (entry.state == "open" if channel else entry.unused))
    found = [entry for entry in usable if entry.max_frames >= size][:count]
    missing = 0 if check else count - len(found)
    new = [sessions.bind(source, destination, size, channel=channel) for _missing in range(missing)]
    return found, found + new
