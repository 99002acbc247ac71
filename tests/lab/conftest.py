"""The lab for tests: booted once, returned to the same saved state before each test that asks.

Real Xen in real Xen; nothing in here is a stand-in. `make lab-logs` collects what a failed run left.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import types
import typing

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "lab")]

from vmbeam_lab import ansible, build, cli, guests, inventory, paths, topology, wait  # noqa: E402
from vmbeam_lab.complaints import Complaints  # noqa: E402
from vmbeam_lab.errors import BootTimeout  # noqa: E402
from vmbeam_lab.machine import Emulated, guest_dom0_ssh  # noqa: E402

from tests.lab.hostile.host_vms import destroy  # noqa: E402

STATE = "pytest"  #: name of the saved state that tests start from
PAIR_STATE = "pytest-pair"  #: the same, with a host VM in slot b
FLEET = ("m2", "m3", "m4")  #: machines that fit into one computer side by side
GUEST = "web1"  #: whom tests move if they do not say otherwise

#: Does something when the real xl says a certain thing, which is then waited for.
STAND_IN = """\
#!/bin/bash
case " $* " in *" {verb} "*) ;; *) exec {xl}.real "$@" ;; esac
fifo=$(mktemp -u /run/stand-in.XXXXXX)
mkfifo "$fifo"
{xl}.real "$@" <&0 2>"$fifo" &
child=$!
while IFS= read -r line; do
  printf '%s\\n' "$line" >&2
  case $line in *{text}*) {action} ;; esac
done <"$fifo"
rm "$fifo"
wait $child
"""
HELD, GO = "/run/stand-in.held", "/run/stand-in.go"
XL = "/usr/lib/xen-4.17/bin/xl"

#: Opens libxenctrl in a dom0.
XENCTRL = """\
import ctypes, pathlib, struct, sys
version = pathlib.Path("/sys/hypervisor/version")
name = ".".join((version / part).read_text().strip() for part in ("major", "minor"))
xenctrl = ctypes.CDLL("libxenctrl.so." + name, use_errno=True)
xenctrl.xc_interface_open.restype = ctypes.c_void_p
handle = ctypes.c_void_p(xenctrl.xc_interface_open(None, None, 0))
"""
#: Prints free_pages of struct xen_sysctl_physinfo (xen/include/public/sysctl.h): nine words of 32 bits, padding and
#: total_pages come before it.
FREE_PAGES = """\
info = ctypes.create_string_buffer(512)
if xenctrl.xc_physinfo(handle, info):
    sys.exit("xc_physinfo failed")
print(struct.unpack_from("<Q", info, 48)[0])
"""
#: Seconds until accounts are to be alike: each takes some twenty, as they pass three consoles.
ACCOUNTS = 180
#: Pages that Xen's own pools may keep of a test, or give back: 10, 4 and 2 were seen in three that followed each other.
POOLS = 64


#: How Ansible's commands are run: the checkout's settings, plain output, no questions.
ANSIBLE: dict[str, typing.Any] = {
    "cwd": REPOSITORY,
    "env": {**ansible.environment(), "ANSIBLE_NOCOLOR": "1"},
    "stdin": subprocess.DEVNULL,
}


def playbook_argv(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a playbook of the collection on the lab's inventory."""
    return ["ansible-playbook", "-i", str(paths.INVENTORY), str(REPOSITORY / "playbooks" / name), *arguments]


class Result(typing.NamedTuple):
    """What a playbook did."""

    code: int
    output: str

    @property
    def failed(self) -> bool:
        return self.code != 0


class Lab:
    """A running machine of the lab, its guests as seen from outside."""

    pools = POOLS  #: for tests, which cannot import this file

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated
        self.machine = emulated.machine
        self.complaints = Complaints(emulated)
        self._started: list[subprocess.Popen] = []

    def restore(self, state: str = STATE, timeout: float = 180) -> None:
        """Return to a saved state, in a fresh QEMU, of which no playbook of an earlier test knows."""
        self.end_playbooks()
        self.emulated.stop()
        self.emulated.start(snapshot=state)
        self.emulated.wait_for_ssh(timeout)
        for guest in self.machine.guests:
            self.status(guest)

    def end_playbooks(self) -> None:
        """End what start_playbook() has started and still runs."""
        for run in self._started:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait(timeout=60)
        self._started.clear()

    def cut_power(self) -> None:
        """End the machine in the middle of whatever it does, and boot it from the same disks.

        Its CPUs stop first, and with that what QEMU has in memory of its disks' files is written, as the lab's disks
        leave out flushes: what the machine had written is on them, what it had only in its own memory is lost.
        """
        self.emulated.execute("stop")
        self.emulated.stop()
        self.power_on()

    def power_on(self) -> None:
        """Boot the machine, which is off, from the disks that it has."""
        for attempt in range(cli.BOOT_RETRIES + 1):
            self.emulated.start()
            try:
                self.emulated.wait_for_ssh(cli.BOOT_TIMEOUT)
                return
            except BootTimeout:
                if attempt == cli.BOOT_RETRIES:
                    raise
                self.emulated.stop()

    def playbook(self, name: str, *arguments: str, timeout: float = 1800) -> Result:
        """Run a playbook of the collection on the lab's inventory."""
        process = subprocess.run(
            playbook_argv(name, *arguments),
            **ANSIBLE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            text=True,
        )
        print(process.stdout)
        return Result(process.returncode, process.stdout)

    def module(self, name: str, /, **arguments: object) -> dict:
        """Run a module in host dom0 and return its result."""
        return ansible.module(self.machine.name, name, arguments)

    def ansible_inventory(self) -> str:
        """Return the inventory as Ansible reads it."""
        argv = ["ansible-inventory", "-i", str(paths.INVENTORY), "--list"]
        return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True).stdout

    def start_playbook(self, log: pathlib.Path, name: str, *arguments: str) -> subprocess.Popen:
        """Start a playbook, in a session of its own, and let it run.

        A file takes its output: nobody reads a pipe meanwhile.
        """
        with log.open("w") as output:
            run = subprocess.Popen(
                playbook_argv(name, *arguments),
                **ANSIBLE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(run)
        return run

    def host(self, *words: str, timeout: float = 60) -> str:
        """Run a command in host dom0."""
        return self.emulated.ssh(*words, timeout=timeout)

    def xenctrl(self, program: str) -> str:
        """Run a Python program in host dom0, for which libxenctrl is open (XENCTRL)."""
        return self.host(with_xenctrl(program))

    def free_pages(self) -> int:
        """Return the pages of 4 KiB that the host hypervisor has free."""
        return int(self.xenctrl(FREE_PAGES))

    def guest_dom0(self, slot: str, command: str, timeout: float = 120) -> str:
        """Run a command in the guest dom0 of a slot, through host dom0."""
        argv = [*guest_dom0_ssh(self.machine, slot, self.emulated.key), command]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=timeout).stdout

    def await_guest_dom0(self, slot: str, timeout: float) -> None:
        """Wait until the guest dom0 of a slot answers."""

        def answers() -> bool:
            try:
                return bool(self.guest_dom0(slot, "echo up", timeout=60))
            except subprocess.SubprocessError:
                return False

        wait.until(
            answers,
            timeout=timeout,
            failure=lambda: AssertionError(f"the guest dom0 of slot {slot} does not answer after {timeout:.0f} s"),
        )

    def domains(self) -> set[str]:
        """Return the names of the domains of the host hypervisor, dom0 left out."""
        lines = self.host("xl", "list").splitlines()[1:]
        return {line.split()[0] for line in lines} - {"Domain-0"}

    def guests_in(self, slot: str) -> set[str]:
        """Return the names of the guests of a slot's guest hypervisor."""
        lines = self.guest_dom0(slot, "xl list").splitlines()[1:]
        return {line.split()[0] for line in lines} - {"Domain-0"}

    def status(self, guest: str, timeout: float = 120) -> dict:
        """Return what a guest says of itself over HTTP."""
        return guests.await_status(self.machine.guests[guest].http_port, timeout=timeout, what=f"answer of {guest}")

    def all_status(self) -> dict[str, dict]:
        """Return the status of every guest."""
        return {guest: self.status(guest) for guest in self.machine.guests}


def stand_in_script(verb: str, text: str, action: str) -> str:
    """Return a program to put in the place of xl, which is then xl.real; what Pair.stand_in says of it."""
    return STAND_IN.format(verb=verb, text=shlex.quote(text), action=action, xl=XL)


def with_xenctrl(program: str) -> str:
    """Return the shell command that runs a Python program in a dom0, for which libxenctrl is open (XENCTRL)."""
    return f"python3 -c {shlex.quote(XENCTRL + program)}"


class Accounts(typing.NamedTuple):
    """Who owns how many pages of 4 KiB, as all three hypervisors say: host, a and b.

    By names: a domain that moves to and fro has another id each time. What Linux loses of its own memory at each resume
    (lab/guests/README.md) stays the guest's, so that no account shows it.
    """

    domains: dict[str, dict[str, int]]
    free: dict[str, int]

    def like(self, other: Accounts) -> bool:
        """Tell whether each domain has as many pages as in another account, and each pool some POOLS more or less."""
        return self.domains == other.domains and all(abs(left) <= POOLS for left in self.gained(other).values())

    def gained(self, other: Accounts) -> dict[str, int]:
        """Return the pages that each hypervisor has free, more than in another account."""
        return {name: count - other.free[name] for name, count in self.free.items()}


#: Has a hypervisor say what domain_pages() and the last line are read from, in one connection: each is dear.
COUNT = f"xl debug-keys q && xl dmesg && xl list && {with_xenctrl(FREE_PAGES)}"


def domain_pages(text: str) -> dict[str, int]:
    """Return domain -> pages, of what COUNT printed."""
    listed = re.findall(r"(?m)^(\S+) +(\d+) +\d+ +\d+ +\S+ +[\d.]+$", text)
    names = {number: name for name, number in listed}
    last = text[text.rindex("'q' pressed") :]
    found = re.findall(r"General information for domain (\d+):\n.*\n.*?nr_pages=(\d+)", last)
    return {names.get(number, f"domain {number}"): int(count) for number, count in found}


class Pair:
    """A host VM in each slot, and guests that can run in either."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def restore(self) -> None:
        """Return to the state in which slot a runs every guest and slot b none."""
        self.lab.restore(PAIR_STATE)

    def sessions(self, source: str, destination: str, purpose: str = "guest", count: int = 1) -> list[int]:
        """Return the numbers of so many sessions from one slot to the other, for guests that have not begun to move."""
        names = {"source": self.name(source), "destination": self.name(destination)}
        result = self.lab.module("vmbeam.xen.zero_copy_session", **names, purpose=purpose, count=count)
        return [entry["session"] for entry in result["sessions"]]

    def name(self, slot: str) -> str:
        return inventory.slot_name(self.lab.machine, slot)

    def move(self, source: str, destination: str, guest: str = GUEST, session: int | None = None) -> dict:
        """Migrate a guest by zero-copy and return what the module says; raises LabError.

        :param session: its number, for guests that move the same way at the same time
        """
        options = {
            "name": guest,
            "destination": self.lab.machine.slots[destination].address,
            "strategy": "zero_copy",
            "transport": "channel",
            "session": session or self.sessions(source, destination)[0],
            "channel": self.sessions(source, destination, "channel")[0],
        }
        return ansible.module(self.name(source), "vmbeam.xen.guest_migrate", options, timeout=900)

    def running_in(self, guest: str = GUEST, slots: typing.Sequence[str] = ("a", "b")) -> list[str]:
        """Return those of the slots in which a guest is alive, whatever it is called there."""
        found = []
        for slot in slots:
            for line in self.lab.guest_dom0(slot, "xl list").splitlines()[1:]:
                name, *_rest, state, _seconds = line.split()
                if name.startswith(guest) and "p" not in state and "s" not in state and "d" not in state:
                    found.append(slot)
        return found

    def free_mib(self, slot: str) -> int:
        """Return what the guest hypervisor of a slot has free."""
        return int(re.search(r"free_memory\s*: (\d+)", self.lab.guest_dom0(slot, "xl info"))[1])

    def free_pages(self, slot: str) -> int:
        """Return the pages of 4 KiB that the guest hypervisor of a slot has free."""
        return int(self.xenctrl(slot, FREE_PAGES))

    def xenctrl(self, slot: str, program: str) -> str:
        """Run a Python program in the guest dom0 of a slot, for which libxenctrl is open (XENCTRL)."""
        return self.lab.guest_dom0(slot, with_xenctrl(program))

    def accounts(self) -> Accounts:
        """Return what all three hypervisors say of who owns how much memory."""
        said = {
            "host": self.lab.host(COUNT),
            **{slot: self.lab.guest_dom0(slot, COUNT) for slot in ("a", "b")},
        }
        return Accounts(
            {name: domain_pages(text) for name, text in said.items()},
            {name: int(text.splitlines()[-1]) for name, text in said.items()},
        )

    def audit(self) -> dict[str, list[int]] | None:
        """Return what the host hypervisor finds wrong with the memory of each host VM (audit_p2m.py)."""
        program = pathlib.Path(__file__).with_name("audit_p2m.py").read_text()
        command = self.lab.emulated.ssh_command("python3", "-")
        # It walks through all of the memory, with nothing else being done meanwhile.
        done = subprocess.run(command, input=program, check=True, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout)

    def settled_accounts(self) -> Accounts:
        """Return what they say twice in a row: a domain that was destroyed takes its time to go."""
        before, seen = None, self.accounts()

        def settled() -> bool:
            nonlocal before, seen
            before, seen = seen, self.accounts()
            return seen.like(before)

        wait.until(settled, timeout=ACCOUNTS, failure=lambda: AssertionError(f"{before} first, {seen} then"))
        return seen

    def await_accounts(self, expected: Accounts) -> None:
        """Wait until the hypervisors say the same as before."""
        seen = expected

        def alike() -> bool:
            nonlocal seen
            seen = self.accounts()
            return seen.like(expected)

        wait.until(alike, timeout=ACCOUNTS, failure=lambda: AssertionError(f"{expected} before, {seen} after"))
        # So that POOLS can be judged.
        print("pages that are free now, and were not before:", seen.gained(expected))

    @contextlib.contextmanager
    def replaced_xl(self, slot: str, script: str) -> typing.Iterator[None]:
        """Have a program in the place of a slot's xl, which is xl.real meanwhile."""
        self.lab.guest_dom0(
            slot,
            f"test ! -e {XL}.real && mv {XL} {XL}.real && printf %s {shlex.quote(script)} > {XL} && chmod 755 {XL}",
        )
        try:
            yield
        finally:
            # The host VM may be gone by now.
            if self.name(slot) in self.lab.domains():
                self.lab.guest_dom0(slot, f"mv {XL}.real {XL}")

    def stand_in(self, slot: str, verb: str, text: str, action: str) -> contextlib.AbstractContextManager[None]:
        """Let a slot's xl do something, in shell, to each run of xl with a verb that says a certain thing."""
        return self.replaced_xl(slot, stand_in_script(verb, text, action))

    @contextlib.contextmanager
    def held(
        self,
        text: str,
        guest: str = GUEST,
        *,
        slot: str = "a",
        verb: str = "migrate",
        migrate: typing.Callable[[], object] | None = None,
    ) -> typing.Iterator[concurrent.futures.Future]:
        """Migrate a guest from a to b, and hold its sender, the source's xl, as soon as it says a certain thing.

        Or its receiver: slot b, verb migrate-receive. Yields the future of the migration; what is held goes on when
        the block ends.

        :param migrate: does it, in place of the module
        """
        hold = f"kill -STOP $child; echo > {HELD}; read -r _ < {GO}; kill -CONT $child"
        self.lab.guest_dom0(slot, f"rm -f {HELD} {GO} && mkfifo {HELD} {GO}")
        with (
            self.stand_in(slot, verb, text, hold),
            concurrent.futures.ThreadPoolExecutor(2) as pool,
        ):
            migration = pool.submit(migrate or functools.partial(self.move, "a", "b", guest))
            # A fifo: this ends at the moment when the other end is written to.
            holding = pool.submit(self.lab.guest_dom0, slot, f"timeout 300 cat {HELD}", timeout=330)
            concurrent.futures.wait([migration, holding], return_when=concurrent.futures.FIRST_COMPLETED)
            if migration.done():
                if not holding.done():
                    self.lab.guest_dom0(slot, f"timeout 60 sh -c {shlex.quote(f'echo > {HELD}')}", timeout=90)
                raise AssertionError(f"over before it said {text!r}") from migration.exception()
            holding.result()
            try:
                yield migration
            finally:
                if self.name(slot) in self.lab.domains():
                    self.lab.guest_dom0(slot, f"timeout 60 sh -c {shlex.quote(f'echo > {GO}')}", timeout=90)
                # Whatever it says: that is for the test to look at.
                concurrent.futures.wait([migration], timeout=900)


def bring_up(*options: str, names: typing.Sequence[str] = ()) -> list[Lab]:
    """Boot machines of the topology, its default ones if none is named, and return them."""
    chosen = [word for name in names for word in ("--machine", name)]
    assert cli.main([*chosen, "up", *options]) == 0, "the lab does not come up"
    loaded = topology.load(paths.LAB / "topology.yml")
    machines = loaded.select(names)
    artefacts = build.build(loaded, machines)
    return [Lab(Emulated(machine, artefacts.qemu, artefacts.key)) for machine in machines]


@pytest.fixture(scope="module")
def machine() -> typing.Iterator[Lab]:
    """The default machine, cold-booted, without any host VM."""
    [lab] = bring_up("--hosts-only")
    yield lab
    lab.emulated.stop()


@pytest.fixture
def alone(machine: Lab) -> typing.Iterator[None]:
    """Leave no host VM to the next test, whatever became of this one."""
    yield
    destroy(machine, *machine.domains())


@pytest.fixture(scope="module")
def booted() -> typing.Iterator[Lab]:
    """The default machine, up, with a host VM in slot a and guests; its state saved."""
    [lab] = bring_up()
    lab.all_status()
    lab.emulated.save(STATE)
    yield lab
    lab.end_playbooks()
    lab.emulated.stop()


@pytest.fixture
def lab(booted: Lab) -> Lab:
    """The lab in its saved state: slot a runs every guest, slot b is free."""
    booted.restore()
    return booted


@pytest.fixture(scope="module")
def pair(booted) -> Pair:
    """The lab with a host VM in each slot, both of which have the guests' disks; its state saved."""
    booted.restore()
    result = booted.playbook("host_vm.yml", "-e", "host_vm_slot=b")
    assert not result.failed
    pair = Pair(booted)
    for guest in booted.machine.guests.values():
        for disk in inventory.disk_ids(guest.name, guest.type):
            booted.module(
                "vmbeam.xen.host_vm_disk",
                host_vm=pair.name("b"),
                disk=disk,
                path=f"/var/lib/vmbeam/guests/{disk}.raw",
            )
            booted.guest_dom0("b", f"udevadm wait --timeout=120 /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_{disk}")
    booted.emulated.save(PAIR_STATE)
    return pair


@pytest.fixture(scope="module")
def machines() -> typing.Iterator[dict[str, Lab]]:
    """Three small machines, each with a host VM in slot a and its guest; their states saved."""
    labs = bring_up(names=FLEET)
    try:
        for lab in labs:
            for guest in lab.machine.guests.values():
                guests.await_start(guest.http_port, 900, "disk")
        for lab in labs:
            lab.emulated.save(STATE)
        yield {lab.machine.name: lab for lab in labs}
    finally:
        for lab in labs:
            lab.end_playbooks()
            lab.emulated.stop()


@pytest.fixture
def fleet(machines: dict[str, Lab]) -> dict[str, Lab]:
    """The three machines in their saved states."""
    with concurrent.futures.ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(lambda lab: lab.restore(timeout=420), machines.values()))
    return machines


@pytest.fixture
def tools() -> types.SimpleNamespace:
    """What tests of a fleet take from here: they have no machine of their own."""
    return types.SimpleNamespace(xl=XL, held=HELD, go=GO, stand_in_script=stand_in_script)


@pytest.fixture(autouse=True)
def quiet_hypervisors(request: pytest.FixtureRequest) -> typing.Iterator[None]:
    """Fail a test after which a hypervisor has a complaint that it did not have before."""
    lab = request.getfixturevalue("booted" if "booted" in request.fixturenames else "machine")
    yield
    found = lab.complaints.new()
    assert not found, "\n".join(found)
