# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Where a guest is while and after it migrates, and what of a failed migration can be repaired.

Pure: sightings of the two guest dom0s go in, a verdict comes out. What xl does (tools/xl/xl_migrate.c):

- The receiver makes the domain as NAME--incoming, paused. Told to go, it renames it to NAME and then
  unpauses it. So NAME--incoming never ran.
- The sender suspends the guest, waits for the receiver's acknowledgement, renames its copy to
  NAME--migratedaway, and only then tells the receiver to go. So when NAME--migratedaway exists, the
  copy at the destination was complete.
- If anything fails before that renaming, the sender resumes its copy. After it, nobody knows: xl
  leaves both copies as they are.
- A receiver that loses its sender after its acknowledgement leaves NAME--incoming behind.

Strategy "suspend" (ours) restores NAME paused at the destination, destroys the paused copy at the
source, and unpauses the new one. How far it came is remembered as a Phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain

SOURCE = "source"
DESTINATION = "destination"
BOTH = "both"
NOWHERE = "nowhere"
UNKNOWN = "unknown"


class Phase(Enum):
    """What our own attempt has done to the source's copy; the value is how a file remembers it."""

    NONE = ""
    PAUSED = "paused"
    # The copy at the destination is complete, and destroying the source's has begun.
    GIVEN_UP = "given up"


INCOMING = "--incoming"
AWAY = "--migratedaway"


@dataclass(frozen=True)
class Sighting:
    """The domains of one dom0 that bear the guest's name."""

    guest: Domain | None = None
    incoming: Domain | None = None
    away: Domain | None = None

    @classmethod
    def of(cls, name: str, domains: list[Domain]) -> Sighting:
        by_name = {domain.name: domain for domain in domains}
        return cls(by_name.get(name), by_name.get(name + INCOMING), by_name.get(name + AWAY))

    def all(self) -> list[Domain]:
        return [domain for domain in (self.guest, self.incoming, self.away) if domain]


@dataclass(frozen=True)
class Repair:
    """A step that brings the remains of a failed migration to a clear state.

    verb: destroy, rename (to the guest's name), resume or unpause.
    """

    side: str
    verb: str
    domain: Domain

    def __str__(self) -> str:
        return f"{self.verb} {self.domain.name} (domain {self.domain.domid}, {self.domain.state}) at the {self.side}"


@dataclass(frozen=True)
class Verdict:
    """Where the guest is once the repairs, in this order, are done; or why that takes a human."""

    location: str
    repairs: tuple[Repair, ...] = ()
    problem: str | None = None


def judge(name: str, source: Sighting, destination: Sighting | None, phase: Phase = Phase.NONE) -> Verdict:
    """Decides from what both dom0s show; destination is None if it cannot be asked.

    A copy is destroyed only if it cannot be the live guest: it never ran and another copy did, or it is
    suspended and renamed away while the other one has started, or we had given it up ourselves.
    """
    if destination is None:
        return _alone(name, source, phase)
    copies = source.all() + destination.all()
    if len({domain.uuid for domain in copies}) > 1:
        return Verdict(
            BOTH,
            problem=f"The domains named {name} at the source and the destination have different UUIDs: "
            "they are different guests. Rename or remove the one at the destination.",
        )
    if source.incoming or destination.away:
        return Verdict(
            UNKNOWN,
            problem=f"A migration of {name} in the other direction has not ended. Run it again to its end first.",
        )
    if any(domain.state == "dying" for domain in copies):
        return Verdict(UNKNOWN, problem=f"A copy of {name} is just being destroyed. Try again in a moment.")
    if destination.guest and not destination.guest.never_ran:
        return _at_destination(name, source, destination, destination.guest)
    if destination.incoming and not destination.incoming.never_ran:
        return Verdict(
            BOTH if source.guest else UNKNOWN,
            problem=f"{name}{INCOMING} at the destination has run, which xl does not do. Look at both ends by hand.",
        )
    if source.guest:
        return _at_source(name, source, destination, source.guest, phase)
    if source.away:
        return _in_between(name, source.away, destination)
    return _not_at_source(name, destination)


def _alone(name: str, source: Sighting, phase: Phase) -> Verdict:
    """The destination does not answer. A copy that still has its name was not given up: it is the guest."""
    here = source.guest
    if here is None or source.away or source.incoming or phase is Phase.GIVEN_UP:
        return Verdict(UNKNOWN, problem=f"Whether the destination runs {name} is not known: it does not answer.")
    return _at_source(name, source, Sighting(), here, phase)


def _at_destination(name: str, source: Sighting, destination: Sighting, there: Domain) -> Verdict:
    if source.guest:
        return Verdict(
            BOTH,
            problem=f"{name} exists at the source ({source.guest.state}) and at the destination ({there.state}). "
            "Nothing was touched. Find out which one is right and destroy the other: two running copies "
            "destroy the guest's disks.",
        )
    if source.away and source.away.state != "suspended":
        return Verdict(
            BOTH,
            problem=f"{source.away.name} at the source is {source.away.state} while {name} is {there.state} at the "
            "destination. Nothing was touched. Find out which one is right and destroy the other.",
        )
    if destination.incoming:
        return Verdict(
            DESTINATION,
            problem=f"The destination has both {name} and {name}{INCOMING}. Look there by hand.",
        )
    if not there.live and there.state != "paused":
        return Verdict(
            DESTINATION,
            problem=f"{name} is at the destination, but {there.state}. Look at its console there.",
        )
    return Verdict(DESTINATION, (Repair(SOURCE, "destroy", source.away),) if source.away else ())


def _at_source(name: str, source: Sighting, destination: Sighting, here: Domain, phase: Phase) -> Verdict:
    if source.away:
        return Verdict(SOURCE, problem=f"The source has both {name} and {name}{AWAY}. Look there by hand.")
    if phase is Phase.GIVEN_UP and here.state == "paused":
        if destination.guest is None:
            return Verdict(
                UNKNOWN,
                problem=f"{name} at the source was being destroyed, and its new copy at the destination is gone. "
                "Look there by hand; its disks are as they were when it was paused.",
            )
        return Verdict(
            DESTINATION, (Repair(SOURCE, "destroy", here), Repair(DESTINATION, "unpause", destination.guest))
        )
    stale = [domain for domain in (destination.incoming, destination.guest) if domain]
    repairs = [Repair(DESTINATION, "destroy", domain) for domain in stale]
    if here.state == "suspended":
        repairs.append(Repair(SOURCE, "resume", here))
    elif here.state == "paused":
        if not stale and phase is not Phase.PAUSED:
            return Verdict(
                SOURCE,
                problem=f"{name} is paused at the source and cannot be migrated. "
                "Unpause it first (vmbeam.xen.guest with state=running).",
            )
        repairs.append(Repair(SOURCE, "unpause", here))
    elif not here.live:
        return Verdict(
            SOURCE,
            problem=f"{name} is {here.state} at the source and cannot be migrated. Remove it and start it anew.",
        )
    return Verdict(SOURCE, tuple(repairs))


def _in_between(name: str, away: Domain, destination: Sighting) -> Verdict:
    """The handshake broke after the source gave its copy up, and the other copy has not run."""
    if away.state != "suspended":
        return Verdict(SOURCE, problem=f"{away.name} at the source is {away.state}, not suspended. Look there by hand.")
    if destination.incoming and destination.guest:
        return Verdict(UNKNOWN, problem=f"The destination has both {name} and {name}{INCOMING}. Look there by hand.")
    copy = destination.incoming or destination.guest
    if copy is None:
        return Verdict(SOURCE, (Repair(SOURCE, "rename", away), Repair(SOURCE, "resume", away)))
    rename = (Repair(DESTINATION, "rename", copy),) if destination.incoming else ()
    return Verdict(DESTINATION, (*rename, Repair(DESTINATION, "unpause", copy), Repair(SOURCE, "destroy", away)))


def _not_at_source(name: str, destination: Sighting) -> Verdict:
    if destination.incoming:
        return Verdict(
            NOWHERE,
            problem=f"Only {name}{INCOMING} exists, at the destination, and nothing shows whether it is complete. "
            "Start the guest anew from its disks, or rename and unpause that copy at your own risk.",
        )
    if destination.guest:
        return Verdict(DESTINATION, (Repair(DESTINATION, "unpause", destination.guest),))
    return Verdict(NOWHERE, problem=f"name: no guest {name} at the source or at the destination.")
