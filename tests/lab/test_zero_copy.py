"""Zero-copy migration to and fro between two host VMs: nothing leaks, and nothing is lost when one side's xl dies."""

from __future__ import annotations

import http.client
import json

import pytest
from vmbeam_lab import guests
from vmbeam_lab.errors import LabError

GUEST = "web1"
ROUNDS = 15


def test_the_module_tells_phases_and_pages(pair):
    before = pair.lab.status(GUEST)
    there = pair.move("a", "b")["migration"]
    back = pair.move("b", "a")["migration"]
    assert not guests.lost(before, pair.lab.status(GUEST))
    for migration in (there, back):
        print(json.dumps(migration))
        assert set(migration["phases"]) == {"connect", "memory", "state", "hand_over", "start", "clean_up"}
        memory = migration["memory"]
        assert memory["pages_passed_on"] + memory["pages_copied"] >= pair.lab.machine.guests[GUEST].memory_mb << 8
        assert memory["pages_passed_on"] > 100 * memory["pages_copied"]


@pytest.mark.long
def test_to_and_fro_leaks_nothing_and_keeps_connections(pair):
    connection = http.client.HTTPConnection("127.0.0.1", pair.lab.machine.guests[GUEST].http_port, timeout=120)
    connection.request("GET", "/status")
    before = json.loads(connection.getresponse().read())
    socket = connection.sock
    # The first time, each side gets what it keeps: bookkeeping, page tables.
    for source, destination in (("a", "b"), ("b", "a")):
        pair.move(source, destination)
    accounts = pair.accounts()
    for _ in range(ROUNDS - 1):
        for source, destination in (("a", "b"), ("b", "a")):
            pair.move(source, destination)
            assert pair.running_in() == [destination]
    assert pair.accounts() == accounts
    connection.request("GET", "/status")
    after = json.loads(connection.getresponse().read())
    assert connection.sock is socket, "the connection had to be made again"
    assert not guests.lost(before, after)


@pytest.mark.long
@pytest.mark.parametrize(
    ("slot", "verb", "text"),
    [
        ("b", "migrate-receive", "Ready to receive"),
        ("b", "migrate-receive", "Transfer complete"),
        ("b", "migrate-receive", "Got permission"),
        ("b", "migrate-receive", "Domain started"),
        ("a", "migrate", "Ready to receive"),
        ("a", "migrate", "Target has acknowledged"),
        ("a", "migrate", "Giving target permission"),
        ("a", "migrate", "Target reports successful"),
    ],
)
def test_xl_killed_at_any_point_loses_nothing(pair, slot, verb, text):
    before = pair.lab.status(GUEST)
    with pair.stand_in(slot, verb, text, "kill -KILL $child"):
        try:
            print(pair.move("a", "b")["migration"])
        except LabError as exc:
            print(exc)
    assert len(pair.running_in()) == 1
    assert not guests.lost(before, pair.lab.status(GUEST))
    # Wherever it is: a rerun finishes, and removes what is left.
    pair.move("a", "b")
    assert pair.running_in() == ["b"]
    pair.move("b", "a")
    assert pair.running_in() == ["a"]
    assert not guests.lost(before, pair.lab.status(GUEST))
