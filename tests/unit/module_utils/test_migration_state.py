# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The verdict on every combination of copies that a broken migration can leave."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils._migration_state import Phase, Sighting, judge
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain

FLAGS = {
    "live": "-b----",
    "runnable": "------",
    "new": "--p---",
    "paused": "--p---",
    "suspended": "---ss-",
    "crashed": "---sc-",
    "dying": "-----d",
}
SUFFIX = {"guest": "", "incoming": "--incoming", "away": "--migratedaway"}


def domain(role: str, state: str, uuid: str = "u") -> Domain:
    return Domain("web" + SUFFIX[role], 7, uuid, FLAGS[state], 256, 1, cpu_time=0.0 if state == "new" else 9.0)


def sighting(**roles: str) -> Sighting:
    return Sighting(**{role: domain(role, state) for role, state in roles.items() if state})


def verdict(source: dict, destination: dict | None, phase: Phase = Phase.NONE):
    seen = None if destination is None else sighting(**destination)
    result = judge("web", sighting(**source), seen, phase)
    steps = [f"{repair.side} {repair.verb} {repair.domain.name}" for repair in result.repairs]
    return result.location, steps, result.problem


CLEAR = [
    # source, destination, phase, location, repairs
    ({"guest": "live"}, {}, Phase.NONE, "source", []),
    ({"guest": "runnable"}, {}, Phase.NONE, "source", []),
    ({}, {"guest": "live"}, Phase.NONE, "destination", []),
    ({}, {"guest": "paused"}, Phase.NONE, "destination", []),
    # A receiver lost its sender.
    ({"guest": "live"}, {"incoming": "new"}, Phase.NONE, "source", ["destination destroy web--incoming"]),
    # A restored copy of strategy "suspend" whose source ran on.
    ({"guest": "live"}, {"guest": "new"}, Phase.NONE, "source", ["destination destroy web"]),
    # xl was killed while the guest was suspended.
    ({"guest": "suspended"}, {}, Phase.NONE, "source", ["source resume web"]),
    (
        {"guest": "suspended"},
        {"incoming": "new"},
        Phase.NONE,
        "source",
        ["destination destroy web--incoming", "source resume web"],
    ),
    # Strategy "suspend" was killed: both copies are paused.
    ({"guest": "paused"}, {"guest": "new"}, Phase.PAUSED, "source", ["destination destroy web", "source unpause web"]),
    ({"guest": "paused"}, {"guest": "new"}, Phase.NONE, "source", ["destination destroy web", "source unpause web"]),
    ({"guest": "paused"}, {}, Phase.PAUSED, "source", ["source unpause web"]),
    # ... after it had given the source's copy up.
    (
        {"guest": "paused"},
        {"guest": "new"},
        Phase.GIVEN_UP,
        "destination",
        ["source destroy web", "destination unpause web"],
    ),
    ({}, {"guest": "new"}, Phase.GIVEN_UP, "destination", ["destination unpause web"]),
    ({}, {"guest": "new"}, Phase.NONE, "destination", ["destination unpause web"]),
    # The handshake of xl broke.
    ({"away": "suspended"}, {"guest": "live"}, Phase.NONE, "destination", ["source destroy web--migratedaway"]),
    (
        {"away": "suspended"},
        {"incoming": "new"},
        Phase.NONE,
        "destination",
        ["destination rename web--incoming", "destination unpause web--incoming", "source destroy web--migratedaway"],
    ),
    (
        {"away": "suspended"},
        {"guest": "new"},
        Phase.NONE,
        "destination",
        ["destination unpause web", "source destroy web--migratedaway"],
    ),
    (
        {"away": "suspended"},
        {},
        Phase.NONE,
        "source",
        ["source rename web--migratedaway", "source resume web--migratedaway"],
    ),
    # The destination does not answer; what still has its name was not given up.
    ({"guest": "live"}, None, Phase.NONE, "source", []),
    ({"guest": "suspended"}, None, Phase.NONE, "source", ["source resume web"]),
    ({"guest": "paused"}, None, Phase.PAUSED, "source", ["source unpause web"]),
]

UNCLEAR = [
    ({"guest": "live"}, {"guest": "live"}, Phase.NONE, "both", "exists at the source (blocked) and at the dest"),
    ({"guest": "live"}, {"guest": "paused"}, Phase.NONE, "both", "Nothing was touched"),
    ({"guest": "suspended"}, {"guest": "live"}, Phase.NONE, "both", "Nothing was touched"),
    ({"guest": "paused"}, {"guest": "live"}, Phase.GIVEN_UP, "both", "Nothing was touched"),
    ({"guest": "live"}, {"guest": "crashed"}, Phase.NONE, "both", "(crashed)"),
    ({"guest": "live"}, {"incoming": "live"}, Phase.NONE, "both", "has run"),
    ({"guest": "live"}, {"incoming": "paused"}, Phase.NONE, "both", "has run"),
    ({"away": "suspended"}, {"incoming": "live"}, Phase.NONE, "unknown", "has run"),
    ({"away": "live"}, {"guest": "live"}, Phase.NONE, "both", "Nothing was touched"),
    ({"away": "live"}, {}, Phase.NONE, "source", "not suspended"),
    ({"guest": "live", "away": "suspended"}, {}, Phase.NONE, "source", "has both"),
    ({"away": "suspended"}, {"guest": "new", "incoming": "new"}, Phase.NONE, "unknown", "has both"),
    ({}, {"guest": "live", "incoming": "new"}, Phase.NONE, "destination", "has both"),
    ({"guest": "paused"}, {}, Phase.NONE, "source", "Unpause it first"),
    ({"guest": "paused"}, {}, Phase.GIVEN_UP, "unknown", "is gone"),
    ({"guest": "crashed"}, {}, Phase.NONE, "source", "is crashed"),
    ({}, {"guest": "crashed"}, Phase.NONE, "destination", "crashed"),
    ({}, {"guest": "suspended"}, Phase.NONE, "destination", "suspended"),
    ({}, {"incoming": "new"}, Phase.NONE, "nowhere", "Only web--incoming"),
    ({}, {}, Phase.NONE, "nowhere", "name: no guest web"),
    ({"guest": "dying"}, {"guest": "new"}, Phase.NONE, "unknown", "being destroyed"),
    # An unfinished migration the other way round.
    ({"incoming": "new"}, {"guest": "live"}, Phase.NONE, "unknown", "in the other direction"),
    ({"incoming": "new"}, {"away": "suspended"}, Phase.NONE, "unknown", "in the other direction"),
    ({}, {"guest": "new", "away": "live"}, Phase.NONE, "unknown", "in the other direction"),
    ({"guest": "paused", "incoming": "new"}, None, Phase.PAUSED, "unknown", "does not answer"),
    ({}, None, Phase.NONE, "unknown", "does not answer"),
    ({"away": "suspended"}, None, Phase.NONE, "unknown", "does not answer"),
    ({"guest": "paused"}, None, Phase.GIVEN_UP, "unknown", "does not answer"),
    ({"guest": "paused"}, None, Phase.NONE, "source", "Unpause it first"),
]


@pytest.mark.parametrize(("source", "destination", "phase", "location", "repairs"), CLEAR)
def test_clear(source, destination, phase, location, repairs):
    assert verdict(source, destination, phase) == (location, repairs, None)


@pytest.mark.parametrize(("source", "destination", "phase", "location", "words"), UNCLEAR)
def test_unclear(source, destination, phase, location, words):
    where, steps, problem = verdict(source, destination, phase)
    assert (where, steps) == (location, [])
    assert words in problem


def test_different_guests_of_one_name():
    result = judge("web", Sighting(guest=domain("guest", "live")), Sighting(guest=domain("guest", "new", uuid="v")))
    assert result.repairs == ()
    assert "different guests" in result.problem


EVERY = [
    (dict(zip(SUFFIX, source, strict=True)), dict(zip(SUFFIX, destination, strict=True)), phase)
    for source in itertools.product(["", *FLAGS], repeat=3)
    for destination in itertools.product(["", *FLAGS], repeat=3)
    if sum(map(bool, source)) + sum(map(bool, destination)) <= 3
    for phase in Phase
]


def test_no_verdict_ever_endangers_the_guest():
    """Over all combinations of up to three copies, and every phase."""
    for source, destination, phase in EVERY:
        states = [state for state in (*source.values(), *destination.values()) if state]
        seen = {"source": sighting(**source), "destination": sighting(**destination)}
        result = judge("web", seen["source"], seen["destination"], phase)
        case = (source, destination, phase, result)
        destroyed = [repair.domain for repair in result.repairs if repair.verb == "destroy"]
        woken = [repair for repair in result.repairs if repair.verb in ("resume", "unpause")]
        # A copy that can be running is not destroyed.
        assert not any(copy.live for copy in destroyed), case
        # Of the copies there were, one stays.
        assert not states or len(destroyed) < len(states), case
        # Nothing is woken beside a copy that runs, and not two of them.
        assert not woken or not any(copy.live for side in seen.values() for copy in side.all()), case
        assert len(woken) <= 1, case
        # A copy that has run is destroyed only where it had been given up.
        for copy in destroyed:
            assert copy.never_ran or copy.name.endswith("--migratedaway") or phase is Phase.GIVEN_UP, case
        # Either it is clear, or nothing is done.
        assert not (result.problem and result.repairs), case
        if result.problem is None and woken:
            assert woken[-1].side == result.location, case
