"""Zero-copy migration to and fro between two host VMs: nothing leaks, and nothing is lost when one side's xl dies."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import typing

import pytest
from vmbeam_lab import ansible, guests, inventory
from vmbeam_lab.errors import LabError

GUEST = "web1"
DISK = "web1-data"
ROUNDS = 15
XL = "/usr/lib/xen-4.17/bin/xl"

#: Stands in for xl: kills the real one, and nothing else, when it says a certain thing.
KILLER = """\
#!/bin/bash
case " $* " in *" {verb} "*) ;; *) exec {xl}.real "$@" ;; esac
fifo=$(mktemp -u /run/killer.XXXXXX)
mkfifo "$fifo"
{xl}.real "$@" <&0 2>"$fifo" &
child=$!
while IFS= read -r line; do
  printf '%s\\n' "$line" >&2
  case $line in *{text}*) kill -KILL $child ;; esac
done <"$fifo"
rm "$fifo"
wait $child
"""


class Pair:
    """Two host VMs, and a guest that can run in either."""

    def __init__(self, lab) -> None:
        self.lab = lab

    def session(self, source: str, destination: str, purpose: str) -> int:
        names = {"source": self.name(source), "destination": self.name(destination)}
        return self.lab.module("vmbeam.xen.zero_copy_session", **names, purpose=purpose)["sessions"][0]["session"]

    def name(self, slot: str) -> str:
        return inventory.slot_name(self.lab.machine, slot)

    def move(self, source: str, destination: str) -> dict:
        """Migrate the guest and return what the module says; raises LabError."""
        options = {
            "name": GUEST,
            "destination": self.lab.machine.slots[destination].address,
            "strategy": "zero_copy",
            "transport": "channel",
            "session": self.session(source, destination, "guest"),
            "channel": self.session(source, destination, "channel"),
        }
        return ansible.module(self.name(source), "vmbeam.xen.guest_migrate", options, timeout=900)

    def running_in(self) -> list[str]:
        """Return the slots in which the guest is alive, whatever it is called there."""
        found = []
        for slot in ("a", "b"):
            for line in self.lab.guest_dom0(slot, "xl list").splitlines()[1:]:
                name, *_rest, state, _seconds = line.split()
                if name.startswith(GUEST) and "p" not in state and "s" not in state and "d" not in state:
                    found.append(slot)
        return found

    def accounts(self) -> dict[str, typing.Any]:
        """Return what all three hypervisors say of who owns how much memory."""
        count = "xl debug-keys q && xl dmesg && xl info"
        host = self.lab.host("sh", "-c", shlex.quote(count))
        inside = {slot: self.lab.guest_dom0(slot, count) for slot in ("a", "b")}
        return {
            "host": pages(host),
            "host free": free(host),
            **{slot: {0: pages(text)[0]} for slot, text in inside.items()},
            **{f"{slot} free": free(text) for slot, text in inside.items()},
        }


def pages(text: str) -> dict[int, int]:
    """Return domain id -> pages, as the debug key last said."""
    last = text[text.rindex("'q' pressed") :]
    found = re.findall(r"General information for domain (\d+):\n.*\n.*?nr_pages=(\d+)", last)
    return {int(domain): int(count) for domain, count in found}


def free(text: str) -> int:
    return int(re.search(r"free_memory\s*: (\d+)", text)[1])


@pytest.fixture(scope="module")
def pair(booted) -> Pair:
    """The lab with a host VM in each slot, both of which have the guest's disk."""
    booted.restore()
    result = booted.playbook("host_vm.yml", "-e", "host_vm_slot=b")
    assert not result.failed
    pair = Pair(booted)
    booted.module(
        "vmbeam.xen.host_vm_disk", host_vm=pair.name("b"), disk=DISK, path=f"/var/lib/vmbeam/guests/{DISK}.raw"
    )
    device = f"/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_{DISK}"
    booted.guest_dom0("b", f"udevadm wait --timeout=120 {device}")
    return pair


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
    killer = KILLER.format(verb=verb, text=shlex.quote(text), xl=XL)
    pair.lab.guest_dom0(
        slot,
        f"test ! -e {XL}.real && mv {XL} {XL}.real && printf %s {shlex.quote(killer)} > {XL} && chmod 755 {XL}",
        timeout=60,
    )
    try:
        print(pair.move("a", "b")["migration"])
    except LabError as exc:
        print(exc)
    finally:
        pair.lab.guest_dom0(slot, f"mv {XL}.real {XL}", timeout=60)
    assert len(pair.running_in()) == 1
    assert not guests.lost(before, pair.lab.status(GUEST))
    # Wherever it is: a rerun finishes, and removes what is left.
    pair.move("a", "b")
    assert pair.running_in() == ["b"]
    pair.move("b", "a")
    assert pair.running_in() == ["a"]
    assert not guests.lost(before, pair.lab.status(GUEST))
