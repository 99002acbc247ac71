"""One of the runs of `make lab-reliability`, in a process of its own.

A run is a cold boot of the machine, a host VM in slot a with the first PVH guest of the machine, which ticks for some
minutes and until the host VM in slot b is up, whose start it sees. A retry of the boot makes the run a failure.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import sys
import time
import typing

import yaml

from . import ansible, build, cli, guests, inventory, paths, phases, topology
from .errors import LabError
from .machine import Emulated
from .phases import phase
from .shell import run, tail

LOG = paths.STATE / "reliability.log"  #: of the current step

#: Bounds in seconds. BOOT covers all of the retries of a boot.
BOOT_TIMEOUT = (cli.BOOT_RETRIES + 1) * (cli.BOOT_TIMEOUT + 60)
PLAYBOOK_TIMEOUT = 1800
GUEST_TIMEOUT = 600
#: How long a guest may not answer while it is watched.
SILENCE = 120
#: A run, without the time for which its guest is watched; a start of the host VM of slot b that is slow included.
TIMEOUT = BOOT_TIMEOUT + 2 * PLAYBOOK_TIMEOUT + GUEST_TIMEOUT + SILENCE + 600


def ticking_guest(machine: topology.Machine) -> topology.Guest:
    """Return the guest of a machine that is watched.

    :raises LabError: it has none that is fit for it
    """
    for guest in machine.guests.values():
        if guest.type == "pvh":
            return guest
    raise LabError(f"{machine.name} has no PVH guest in the topology")


class Lab:
    """The machine, and the one guest of it that is started."""

    def __init__(self, topology_file: pathlib.Path) -> None:
        """:param topology_file: whose first default machine is booted"""
        self.topology_file = topology_file
        self.machine = topology.load(topology_file).select(None)[0]
        self.guest = ticking_guest(self.machine)
        # To look takes no QEMU program.
        self.emulated = Emulated(self.machine, pathlib.Path("/nonexistent"), build.ssh_key())

    def boot(self) -> None:
        """Cold-boot the host hypervisor and host dom0.

        :raises LabError: it failed, or succeeded by a retry only
        """
        lab: list[str | pathlib.Path] = [sys.executable, "-m", "vmbeam_lab", "--topology", self.topology_file]
        command = [*lab, "--machine", self.machine.name, "up", "--cold", "--hosts-only"]
        run(command, timeout=BOOT_TIMEOUT, log=LOG, cwd=paths.REPOSITORY)
        retries = [row["phase"] for row in phases.rows() if row["outcome"] == "retry"]
        if retries:
            raise LabError(", ".join(retries))

    def start_slot_a(self) -> None:
        """Start the host VM of slot a and the guest."""
        written = yaml.safe_load(paths.INVENTORY.read_text())
        listed = written["all"]["children"]["vmbeam_hosts"]["hosts"][self.machine.name]["lab_guests"]
        one = {"lab_guests": [entry for entry in listed if entry["name"] == self.guest.name]}
        ansible.playbook(paths.LAB / "playbooks" / "up.yml", "-e", json.dumps(one), timeout=PLAYBOOK_TIMEOUT, log=LOG)

    def start_slot_b(self) -> None:
        """Start the host VM of slot b."""
        ansible.playbook(
            paths.REPOSITORY / "playbooks" / "host_vm.yml",
            *("-e", "host_vm_slot=b"),
            timeout=PLAYBOOK_TIMEOUT,
            log=LOG,
        )

    def watch(self, seconds: float, started: concurrent.futures.Future[None]) -> dict[str, typing.Any]:
        """Look at the guest for that long and until `started` is done; return its longest gap and its memory errors.

        :raises LabError: it does not answer, was rebooted, stands still or has lost something
        """
        port = self.guest.http_port
        guests.await_start(port, GUEST_TIMEOUT)
        first = status = guests.reset_ticks(port, "watch")
        end = time.monotonic() + seconds
        seen_with_it = False
        while time.monotonic() < end or not seen_with_it:
            time.sleep(min(5, seconds))
            seen_with_it = started.done()
            status = guests.settled_status(port, SILENCE)
            problem = guests.trouble(first, status)
            if problem:
                raise LabError(f"guest {self.guest.name}: {problem}")
        if status["memory"]["verified"] <= first["memory"]["verified"]:
            raise LabError(f"guest {self.guest.name}: its memory writer stands still")
        return {"longest_gap_seconds": guests.longest_gap(status), "memory_errors": status["memory"]["errors"]}

    def watch_beside_slot_b(self, seconds: float) -> dict[str, typing.Any]:
        """As watch, while the host VM of slot b starts."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            started = pool.submit(self.start_slot_b)
            seen = self.watch(seconds, started)
            started.result()
        return seen

    def consoles(self) -> dict[str, str]:
        """Return the last console lines of the machine and of its host VMs."""
        lines = {self.machine.name: tail(self.emulated.console)}
        for slot in self.machine.slots:
            name = inventory.slot_name(self.machine, slot)
            try:
                lines[name] = self.emulated.ssh("tail", "-n", "40", f"/var/log/xen/vmbeam/{name}.console")
            except LabError as exc:
                lines[name] = f"not collected: {exc}"
        return lines


def attempt(lab: Lab, name: str, minutes: float) -> dict[str, typing.Any]:
    """Do one run and return its record.

    :param name: which run it is, for the progress that it prints
    """
    phases.reset()
    start = time.monotonic()
    record: dict[str, typing.Any] = {"outcome": "failed", "reason": None}
    steps: dict[str, typing.Callable[[], None]] = {
        "boot": lab.boot,
        "host VM of slot a and guest": lab.start_slot_a,
        "guest for some minutes, host VM of slot b": lambda: record.update(lab.watch_beside_slot_b(minutes * 60)),
    }
    step = ""
    try:
        for step, act in steps.items():
            LOG.unlink(missing_ok=True)
            with phase(f"{name}: {step}"):
                act()
        record["outcome"] = "done"
    except LabError as exc:
        log = LOG.read_text(errors="replace") if LOG.exists() else ""
        record["reason"] = f"{step}: {reason(str(exc), log)}"
        record["log"] = explain(log) or log.splitlines()[-60:]
        record["consoles"] = lab.consoles()
    record["phases"] = phases.rows()
    record["seconds"] = round(time.monotonic() - start, 1)
    record["end"] = round(time.time(), 1)
    return record


def reason(error: str, log: str) -> str:
    """Return one line that tells why a step failed, from its error and its log."""
    first = error.splitlines()[0]
    told = explain(log)
    return told[0] if told and "not done after" not in first else first


def explain(log: str, lines: int = 60) -> list[str]:
    """Return the line of a step's log that tells why it failed, and what follows it; empty if there is none.

    The first boot that hung tells, with its console; of other errors the last, for Ansible may have ignored some.
    """
    text = log.splitlines()
    hung = [number for number, line in enumerate(text) if "BOOT RETRY" in line or "not ready after" in line]
    errors = [number for number, line in enumerate(text) if line.startswith(("[ERROR]", "fatal:", "lab: "))]
    chosen = hung[:1] or errors[-1:]
    return text[chosen[0] : chosen[0] + lines] if chosen else []


def main(argv: list[str] | None = None) -> int:
    """Do one run and write its record; return 0 whether it succeeded or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", type=pathlib.Path, required=True)
    parser.add_argument("--name", required=True, help="of the run, for its progress")
    parser.add_argument("--minutes", type=float, required=True, help="how long the guest is watched")
    parser.add_argument("--record", type=pathlib.Path, required=True, help="file to write")
    options = parser.parse_args(argv)
    lab = Lab(options.topology)
    record = attempt(lab, options.name, options.minutes)
    # Its disks and console stay, to be looked at.
    lab.emulated.stop()
    options.record.write_text(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
