"""Boots the lab many times and counts the boots that need no second try (`make lab-reliability`).

A run is a cold boot of the machine, a host VM in slot a with the first PVH guest of the topology,
which ticks for some minutes, and beside that the start of the host VM in slot b. A retry of the
boot makes the run a failure. Each run is a line of .lab/reliability.jsonl as soon as it ends.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import sys
import time

import yaml

from . import ansible, build, cli, guests, inventory, paths, phases, topology
from .errors import LabError
from .machine import Emulated
from .phases import phase, say
from .shell import run, tail

RECORDS = paths.STATE / "reliability.jsonl"
LOG = paths.STATE / "reliability.log"  #: of the current step

#: Share of the runs, in percent, that have to succeed.
WANTED_PERCENT = 95

#: Bounds in seconds. BOOT covers all of the retries of a boot.
BOOT_TIMEOUT = (cli.BOOT_RETRIES + 1) * (cli.BOOT_TIMEOUT + 60)
PLAYBOOK_TIMEOUT = 1800
GUEST_TIMEOUT = 600
#: How long a guest may not answer while it is watched.
SILENCE = 120


class Lab:
    """The machine, and the one guest of it that is started."""

    def __init__(self) -> None:
        self.machine = topology.load(paths.LAB / "topology.yml").select(None)[0]
        pvh = [guest for guest in self.machine.guests.values() if guest.type == "pvh"]
        if not pvh:
            raise LabError(f"{self.machine.name} has no PVH guest in the topology")
        self.guest = pvh[0]
        # To look takes no QEMU program.
        self.emulated = Emulated(self.machine, pathlib.Path("/nonexistent"), build.ssh_key())

    def boot(self) -> None:
        """Cold-boot the host hypervisor and host dom0.

        :raises LabError: it failed, or succeeded by a retry only
        """
        command = [sys.executable, "-m", "vmbeam_lab", "--machine", self.machine.name, "up", "--cold", "--hosts-only"]
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

    def watch(self, seconds: float) -> dict:
        """Look at the guest for that long, and return its longest gap and its memory errors.

        :raises LabError: it does not answer, was rebooted, stands still or has lost something
        """
        port = self.guest.http_port
        guests.await_start(port, GUEST_TIMEOUT)
        first = status = guests.reset_ticks(port, "watch")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(5, seconds))
            status = guests.settled_status(port, SILENCE)
            problem = guests.trouble(first, status)
            if problem:
                raise LabError(f"guest {self.guest.name}: {problem}")
        if status["memory"]["verified"] <= first["memory"]["verified"]:
            raise LabError(f"guest {self.guest.name}: its memory writer stands still")
        return {"longest_gap_seconds": guests.longest_gap(status), "memory_errors": status["memory"]["errors"]}

    def watch_beside_slot_b(self, seconds: float) -> dict:
        """As watch, while the host VM of slot b starts."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            started = pool.submit(self.start_slot_b)
            seen = self.watch(seconds)
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


def attempt(lab: Lab, number: int, minutes: float) -> dict:
    """Do one run and return its record."""
    phases.reset()
    start = time.monotonic()
    record: dict = {"run": number, "outcome": "failed", "reason": None}
    steps = {
        "boot": lab.boot,
        "host VM of slot a and guest": lab.start_slot_a,
        "guest for some minutes, host VM of slot b": lambda: record.update(lab.watch_beside_slot_b(minutes * 60)),
    }
    step = ""
    try:
        for step, act in steps.items():
            LOG.unlink(missing_ok=True)
            with phase(step):
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


def parse_records(text: str) -> list[dict]:
    """Return the records in a file; a last line that was cut is left out."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def succeeded(records: list[dict]) -> int:
    """Return how many runs succeeded without a retry."""
    return sum(record["outcome"] == "done" for record in records)


def reliable(records: list[dict]) -> bool:
    """Return whether at least WANTED_PERCENT of the runs succeeded."""
    return bool(records) and 100 * succeeded(records) >= WANTED_PERCENT * len(records)


def summary(records: list[dict]) -> str:
    """Return the count, the longest gap of all guests and the reason of each failure."""
    lines = [f"{succeeded(records)} of {len(records)} runs succeeded without a retry"]
    gaps = [record["longest_gap_seconds"] for record in records if record["outcome"] == "done"]
    if gaps:
        lines.append(f"longest gap between two ticks of a guest: {max(gaps):.1f} s")
    lines += [f"run {record['run']}: {record['reason']}" for record in records if record["outcome"] != "done"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Do the runs; return the exit status."""
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many boots in all (default: 20)")
    parser.add_argument("--minutes", type=float, default=5, help="how long the guest is watched (default: 5)")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="go on after the recorded runs")
    options = parser.parse_args(argv)
    # What has to be built is no part of a boot.
    if cli.main(["build"]):
        return 1
    records = parse_records(RECORDS.read_text()) if options.go_on and RECORDS.exists() else []
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        lab = Lab()
        for number in range(len(records) + 1, options.runs + 1):
            record = attempt(lab, number, options.minutes)
            records.append(record)
            with open(RECORDS, "a") as handle:
                handle.write(json.dumps(record) + "\n")
            say(f"run {number} of {options.runs}: {record['reason'] or 'done'}, {record['seconds']:.0f} s")
        # Its disks and console stay, to be looked at.
        lab.emulated.stop()
    except LabError as exc:
        print(f"reliability: {exc}", file=sys.stderr)
        return 1
    finally:
        print(summary(records))
    return 0 if reliable(records) else 1


if __name__ == "__main__":
    sys.exit(main())
