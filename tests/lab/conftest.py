"""The lab for tests: booted once, returned to the same saved state before each test that asks.

Real Xen in real Xen; nothing in here is a stand-in. `make lab-logs` collects what a failed run left.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import typing

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "lab"))

from vmbeam_lab import ansible, build, cli, guests, paths, topology, wait  # noqa: E402
from vmbeam_lab.complaints import Complaints  # noqa: E402
from vmbeam_lab.machine import Emulated, guest_dom0_ssh  # noqa: E402

STATE = "pytest"  #: name of the saved state that tests start from


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

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated
        self.machine = emulated.machine
        self.complaints = Complaints(emulated)

    def restore(self) -> None:
        """Return to the saved state, in a fresh QEMU."""
        self.emulated.stop()
        self.emulated.start(snapshot=STATE)
        self.emulated.wait_for_ssh(180)
        for guest in self.machine.guests:
            self.status(guest)

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

    def module(self, name: str, **arguments: object) -> dict:
        """Run a module in host dom0 and return its result."""
        return ansible.module(self.machine.name, name, arguments)

    def ansible_inventory(self) -> str:
        """Return the inventory as Ansible reads it."""
        argv = ["ansible-inventory", "-i", str(paths.INVENTORY), "--list"]
        return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True).stdout

    def start_playbook(self, log: pathlib.Path, name: str, *arguments: str) -> subprocess.Popen:
        """Start a playbook and let it run. A file takes its output: nobody reads a pipe meanwhile."""
        with log.open("w") as output:
            return subprocess.Popen(playbook_argv(name, *arguments), **ANSIBLE, stdout=output, stderr=subprocess.STDOUT)

    def host(self, *words: str, timeout: float = 60) -> str:
        """Run a command in host dom0."""
        return self.emulated.ssh(*words, timeout=timeout)

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


def bring_up(*options: str) -> Lab:
    """Boot the default machine of the topology, and return it."""
    assert cli.main(["up", *options]) == 0, "the lab does not come up"
    loaded = topology.load(paths.LAB / "topology.yml")
    machines = loaded.select(None)
    artefacts = build.build(loaded, machines)
    return Lab(Emulated(machines[0], artefacts.qemu, artefacts.key))


@pytest.fixture(scope="module")
def machine() -> typing.Iterator[Lab]:
    """The default machine, cold-booted, without any host VM."""
    lab = bring_up("--hosts-only")
    yield lab
    lab.emulated.stop()


@pytest.fixture(scope="module")
def booted() -> typing.Iterator[Lab]:
    """The default machine, up, with a host VM in slot a and guests; its state saved."""
    lab = bring_up()
    lab.all_status()
    lab.emulated.save(STATE)
    yield lab
    lab.emulated.stop()


@pytest.fixture
def lab(booted: Lab) -> Lab:
    """The lab in its saved state: slot a runs every guest, slot b is free."""
    booted.restore()
    return booted


@pytest.fixture(autouse=True)
def quiet_hypervisors(request: pytest.FixtureRequest) -> typing.Iterator[None]:
    """Fail a test after which a hypervisor has a complaint that it did not have before."""
    lab = request.getfixturevalue("booted" if "booted" in request.fixturenames else "machine")
    yield
    found = lab.complaints.new()
    assert not found, "\n".join(found)
