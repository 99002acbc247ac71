"""Zero-copy migration to and fro between two host VMs: nothing leaks, and nothing is lost when one side's xl dies."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import shlex
import subprocess
import threading
import typing

import pytest
from vmbeam_lab import ansible, guests
from vmbeam_lab.errors import CommandFailed, ModuleFailed

from benchmarks.meters import Meters

GUEST = "web1"
OTHER = "app1"  #: HVM, with a device model
#: How often each guest goes to and fro, of which the other one takes part in the first few.
ROUNDS, OTHER_ROUNDS = 15, 3

#: Pages of a guest that may be copied: those that the hypervisor, or the device model, has mapped.
MOST_COPIED = 64

#: A receiver that has not been asked for zero-copy: whoever calls it leaves the option out.
NOT_ASKED = """\
#!/bin/bash
words=()
for word; do [ "$word" = --zero-copy ] || words+=("$word"); done
exec /usr/lib/xen-4.17/bin/xl.real "${words[@]}"
"""
#: A receiver to which the record that begins zero-copy (type 0x13, 8 bytes) is an unknown one. What refuses it is as
#: old as the format of the stream, and all that a libxenguest without the patches does about it.
UNPATCHED = """\
#!/bin/bash
case " $* " in *" migrate-receive "*) ;; *) exec /usr/lib/xen-4.17/bin/xl.real "$@" ;; esac
exec /usr/lib/xen-4.17/bin/xl.real "$@" < <(python3 -c '
import os
record, other = (bytes([kind, 0, 0, 0, 8, 0, 0, 0]) for kind in (0x13, 0x7F))
while data := os.read(0, 1 << 16):
    os.write(1, data.replace(record, other))
')
"""


def connected(port: int) -> http.client.HTTPConnection:
    """Return a connection to a guest that breaks rather than be made again."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.connect()
    connection.auto_open = 0
    return connection


def status_by(connection: http.client.HTTPConnection) -> dict:
    """Return what a guest says of itself over a connection."""
    connection.request("GET", "/status")
    return json.loads(connection.getresponse().read())


def assert_same_owners(pair, before: dict[str, list[int]] | None) -> None:
    """Compare with an earlier audit: None where hypervisors have no assertions, and thus no audit."""
    after = pair.audit()
    if before is None or after is None:
        assert before is after
        return
    assert set(after) == {pair.name("a"), pair.name("b")}
    for name, (orphans, *bad) in after.items():
        assert bad == [0, 0], (name, bad)
        assert orphans == before[name][0], name


@contextlib.contextmanager
def asked_all_along(port: int) -> typing.Iterator[list[bytes]]:
    """Ask a guest over and over by one connection, and yield its answers so far; fail if that breaks."""
    answers: list[bytes] = []
    over = threading.Event()
    with contextlib.closing(connected(port)) as connection, concurrent.futures.ThreadPoolExecutor(1) as pool:

        def ask() -> None:
            while not over.wait(0.1):
                connection.request("GET", "/boot_id")
                answers.append(connection.getresponse().read())

        asking = pool.submit(ask)
        try:
            yield answers
        finally:
            over.set()
        asking.result()


def test_the_module_tells_phases_and_pages(pair):
    """Meanwhile a client goes on asking the guest, by one connection that is not made again.

    From one host VM to the other the network takes not a byte.
    """
    slots = pair.lab.machine.slots
    meters = Meters(pair.lab.emulated, {pair.name(slot): slots[slot].mac for slot in slots})
    before = pair.lab.status(GUEST)
    unused = meters.read()
    with asked_all_along(pair.lab.machine.guests[GUEST].http_port) as answers:
        there = pair.move("a", "b")["migration"]
        answered = len(answers)
        back = pair.move("b", "a")["migration"]
    used = meters.read()
    assert used.network_bytes == unused.network_bytes
    # The meters would have seen it: what it takes to connect is counted.
    pair.lab.guest_dom0("a", f"timeout 30 bash -c ': < /dev/tcp/{slots['b'].address}/22'")
    assert meters.read().network_bytes > used.network_bytes
    assert 0 < answered < len(answers)
    assert len(set(answers)) == 1
    assert not guests.lost(before, pair.lab.status(GUEST))
    for migration in (there, back):
        print(json.dumps(migration))
        assert set(migration["phases"]) == {"connect", "memory", "state", "hand_over", "start", "clean_up"}
        memory = migration["memory"]
        assert memory["pages_passed_on"] + memory["pages_copied"] >= pair.lab.machine.guests[GUEST].memory_mb << 8
        assert memory["pages_copied"] + memory["pages_sent"] <= MOST_COPIED


def test_without_a_host_that_can_pass_memory_on_nothing_is_touched(pair):
    """In host dom0, whose hypervisor has none below it: xl gets the same answer in a host VM of a host without."""
    name = pair.name("a")
    with pytest.raises(CommandFailed) as failure:
        pair.lab.host("xl", "migrate", "--zero-copy", "-s", shlex.quote(""), name, "false")
    assert "not possible here: this host isn't a VM of a capable one" in failure.value.output
    address = pair.lab.machine.slots["b"].address
    with pytest.raises(ModuleFailed, match="has no zero-copy migration"):
        pair.lab.module("vmbeam.xen.guest_migrate", name=name, destination=address, strategy="zero_copy")
    assert pair.running_in() == ["a"]


def test_without_a_session_nothing_is_touched(pair):
    """What host dom0 has not allowed fails before the guest is suspended, and says why."""
    before = pair.lab.status(GUEST)
    pair.lab.module("vmbeam.xen.zero_copy_session", source=pair.name("a"), destination=pair.name("b"), state="absent")
    for option, words in (
        ("--zero-copy", "There is no zero-copy session for this host to send a domain with"),
        ("--zero-copy=4000000000", "Zero-copy session 4000000000 doesn't exist, or is not for sending, or in use"),
    ):
        with pytest.raises(subprocess.CalledProcessError) as failure:
            pair.lab.guest_dom0("a", f"xl migrate {option} -s '' {GUEST} false")
        assert words in failure.value.stderr
    options = {
        "name": GUEST,
        "destination": pair.lab.machine.slots["b"].address,
        "strategy": "zero_copy",
        "transport": "channel",
        "channel": pair.sessions("a", "b", "channel")[0],
    }
    with pytest.raises(ModuleFailed, match="There is no zero-copy session") as refusal:
        ansible.module(pair.name("a"), "vmbeam.xen.guest_migrate", options)
    assert refusal.value.result["location"] == "source"
    assert pair.running_in() == ["a"]
    assert not guests.lost(before, pair.lab.status(GUEST))


@pytest.mark.long
@pytest.mark.parametrize(
    ("receiver", "words"),
    [
        pytest.param(NOT_ASKED, "Sender attempts a zero-copy migration, which isn't allowed", id="not asked"),
        pytest.param(UNPATCHED, "Mandatory record 0x7f", id="unpatched"),
    ],
)
def test_a_receiver_without_zero_copy_refuses(pair, receiver, words):
    before = pair.lab.status(GUEST)
    with pair.replaced_xl("b", receiver), pytest.raises(ModuleFailed) as refusal:
        pair.move("a", "b")
    print(refusal.value)
    log = refusal.value.result["migration"]["log_tail"]
    assert any(words in line for line in log), log
    assert refusal.value.result["location"] == "source"
    assert pair.running_in() == ["a"]
    assert pair.lab.guests_in("b") == set()
    assert not guests.lost(before, pair.lab.status(GUEST))
    for source, destination in (("a", "b"), ("b", "a")):
        pair.move(source, destination)
    assert not guests.lost(before, pair.lab.status(GUEST))


@pytest.mark.long
def test_to_and_fro_leaks_nothing_and_keeps_connections(pair):
    """15: a PVH guest thirty times, and an HVM guest six times, with their connections.

    Counts of pages would not tell if two domains had the same frame: hypervisors with assertions check each.
    """
    with contextlib.ExitStack() as stack:
        connections = {
            guest: stack.enter_context(contextlib.closing(connected(pair.lab.machine.guests[guest].http_port)))
            for guest in (GUEST, OTHER)
        }
        before = {guest: status_by(connection) for guest, connection in connections.items()}
        # Before those that count: the first time, each side gets what it keeps, bookkeeping and page tables.
        for guest in (GUEST, OTHER):
            for source, destination in (("a", "b"), ("b", "a")):
                pair.move(source, destination, guest)
        accounts, owners = pair.settled_accounts(), pair.audit()
        for turn in range(ROUNDS):
            for source, destination in (("a", "b"), ("b", "a")):
                for guest in (GUEST, OTHER) if turn < OTHER_ROUNDS else (GUEST,):
                    pair.move(source, destination, guest)
                    assert pair.running_in(guest) == [destination]
        pair.await_accounts(accounts)
        assert_same_owners(pair, owners)
        for guest, connection in connections.items():
            assert not guests.lost(before[guest], status_by(connection))


@pytest.mark.long
@pytest.mark.parametrize(
    ("slot", "verb", "text", "where"),
    [
        # Nobody commits.
        ("b", "migrate-receive", "Ready to receive", "a"),
        ("a", "migrate", "Ready to receive", "a"),
        # The sender commits just after this, or does not come to that.
        ("b", "migrate-receive", "Transfer complete", "ab"),
        ("a", "migrate", "Target has acknowledged", "ab"),
        # It has committed before this is said.
        ("b", "migrate-receive", "Got permission", "b"),
        ("b", "migrate-receive", "Domain started", "b"),
        ("a", "migrate", "Giving target permission", "b"),
        ("a", "migrate", "Target reports successful", "b"),
    ],
)
def test_xl_killed_at_any_point_loses_nothing(pair, slot, verb, text, where):
    """14: the session knows whose the guest is: there it runs, and the module says so."""
    before = pair.lab.status(GUEST)
    with pair.stand_in(slot, verb, text, "kill -KILL $child"):
        try:
            print(pair.move("a", "b")["migration"])
            told = "destination"
        except ModuleFailed as exc:
            print(exc)
            told = exc.result["location"]
    [found] = pair.running_in()
    assert found in where
    assert told == {"a": "source", "b": "destination"}[found]
    assert not guests.lost(before, pair.lab.status(GUEST))
    # Wherever it is: a rerun finishes, and removes what is left.
    pair.move("a", "b")
    assert pair.running_in() == ["b"]
    pair.move("b", "a")
    assert pair.running_in() == ["a"]
    assert not guests.lost(before, pair.lab.status(GUEST))
