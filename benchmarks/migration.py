"""Measures what Xen's own migration costs between the two host VMs of the lab's machine (`make bench`).

In one run on one boot of the lab: a guest of each size goes to and fro by each method. Writes
`results.json` and `RESULTS.md` beside this file. The host VM of slot b stays afterwards.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shlex
import socket
import sys
import tempfile

from vmbeam_lab import ansible, build, cli, guests, inventory, paths, phases, topology
from vmbeam_lab.errors import LabError
from vmbeam_lab.machine import Emulated
from vmbeam_lab.phases import phase, say
from vmbeam_lab.shell import run

from . import results

HERE = pathlib.Path(__file__).resolve().parent
LOG = paths.STATE / "bench.log"

#: One guest at a time, beside those of the topology.
ADDRESS, MAC = "10.0.2.41", "00:16:3e:02:00:41"
NAME = re.compile(r"bench\d+")

#: Bounds in seconds; under emulation everything takes long.
HOST_VM_TIMEOUT = 1800
GUEST_TIMEOUT = 600
MIGRATE_TIMEOUT = 1800
#: What guest_migrate may need on top, to repair after a migration that took too long.
REPAIR_TIMEOUT = 600


class Benchmark:
    """The benchmark's guests on the running lab."""

    def __init__(self, lab: topology.Topology) -> None:
        self.prefix, self.gateway = lab.prefix, lab.gateway
        self.machine = lab.select(None)[0]
        self.hosts = [inventory.slot_name(self.machine, slot) for slot in ("a", "b")]
        self.port = self._forward()

    def _forward(self) -> int:
        """Return a new port of this computer that leads to port 80 of the benchmark's guest."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # To talk to the monitor takes no QEMU program.
        emulated = Emulated(self.machine, pathlib.Path("/nonexistent"), build.ssh_key())
        command = f"hostfwd_add net0 tcp:127.0.0.1:{port}-{ADDRESS}:80"
        refusal = emulated.execute("human-monitor-command", {"command-line": command})
        if refusal:
            raise LabError(f"{self.machine.name}: {command}: {refusal.strip()}")
        return port

    def _guest(self, host: str, name: str, state: str, **options: object) -> None:
        ansible.module(host, "vmbeam.xen.guest", {"name": name, "state": state, **options}, timeout=GUEST_TIMEOUT)

    def pause_others(self) -> None:
        """Pause the topology's guests, which would compete for the CPU."""
        for name in self.machine.guests:
            self._guest(self.hosts[0], name, "paused")

    def start(self, size_mib: int) -> str:
        """Start the guest of a size in slot a and return its name."""
        name = f"bench{size_mib}"
        with tempfile.TemporaryDirectory() as directory:
            ansible.module(
                self.hosts[0],
                "ansible.builtin.copy",
                {
                    "src": str(self._config(pathlib.Path(directory), name, size_mib)),
                    "dest": f"/etc/xen/guests/{name}.cfg",
                },
            )
        self._guest(self.hosts[0], name, "running", config=f"/etc/xen/guests/{name}.cfg")
        guests.await_start(self.port, GUEST_TIMEOUT)
        return name

    def _config(self, directory: pathlib.Path, name: str, size_mib: int) -> pathlib.Path:
        """Return the guest's xl file, made as those of the lab's guests."""
        described = {
            "name": name,
            "type": "pvh",
            "memory_mb": size_mib,
            "vcpus": 1,
            "mac": MAC,
            "address": ADDRESS,
            "prefix": self.prefix,
            "gateway": self.gateway,
            "disks": [],
            # Exists and cannot be mounted: the guest does not wait for a disk that never comes.
            "data_device": "null",
        }
        (directory / "guests.json").write_text(json.dumps([described]))
        tool = [sys.executable, paths.LAB / "guests" / "build"]
        run([*tool, "programs", "--output", directory / "guest-tools"], timeout=300)
        made = ["--boot", directory, "--guests", directory / "guests.json", "--output", directory, "--direct-scripts"]
        run([*tool, "guests", *made], timeout=300)
        return directory / f"{name}.cfg"

    def measure(self, size_mib: int, rounds: int) -> list[dict]:
        """Migrate a guest by each method in each round, and return what was measured."""
        name = self.start(size_mib)
        measured = []
        source, destination = "a", "b"
        for number, method in enumerate(results.schedule(rounds)):
            entry = {
                "size_mib": size_mib,
                "method": method,
                "direction": f"{source} to {destination}",
                **self._migrate(name, method, source, destination, word=f"{name}-{number}"),
            }
            measured.append(entry)
            say(json.dumps(entry))
            source, destination = destination, source
        self._check_memory(name)
        return measured

    def _migrate(self, name: str, method: str, source: str, destination: str, word: str) -> dict:
        options: dict[str, object] = {**results.METHODS[method]}
        if options["strategy"] == "zero_copy":
            options["session"] = self._session(source, destination)
            options["channel"] = self._session(source, destination, purpose="channel")
        before = guests.reset_ticks(self.port, word)
        moved = ansible.module(
            inventory.slot_name(self.machine, source),
            "vmbeam.xen.guest_migrate",
            {
                "name": name,
                "destination": self.machine.slots[destination].address,
                "timeout": MIGRATE_TIMEOUT,
                **options,
            },
            timeout=MIGRATE_TIMEOUT + REPAIR_TIMEOUT,
        )
        after = guests.settled_status(self.port, GUEST_TIMEOUT)
        problem = guests.trouble(before, after)
        if problem:
            raise LabError(f"{name} after {method} from {source} to {destination}: {problem}")
        migration = moved["migration"]
        return {
            **{key: migration[key] for key in ("seconds", "downtime_seconds", "bytes")},
            "longest_gap_seconds": guests.longest_gap(after),
        }

    def _session(self, source: str, destination: str, purpose: str = "guest") -> int:
        """Return the number of a session that lets one host VM pass a guest's memory to the other, or of a channel."""
        options = {
            "source": inventory.slot_name(self.machine, source),
            "destination": inventory.slot_name(self.machine, destination),
            "purpose": purpose,
        }
        return ansible.module(self.machine.name, "vmbeam.xen.zero_copy_session", options)["sessions"][0]["session"]

    def _check_memory(self, name: str) -> None:
        """Wait until each page was verified after the last migration."""
        before = guests.await_status(self.port, timeout=GUEST_TIMEOUT)
        after = guests.await_status(
            self.port,
            lambda status: status["memory"]["round"] >= before["memory"]["round"] + 2,
            timeout=GUEST_TIMEOUT,
            what="full check of memory",
        )
        problem = guests.trouble(before, after)
        if problem:
            raise LabError(f"{name} after its last migration: {problem}")

    def remove_guests(self) -> list[str]:
        """Destroy the benchmark's guests in both host VMs; return what is left, and why."""
        left = []
        for host in self.hosts:
            try:
                found = ansible.module(host, "vmbeam.xen.guest_info", {})["guests"]
                for name in [guest["name"] for guest in found if NAME.match(guest["name"])]:
                    if NAME.fullmatch(name):
                        self._guest(host, name, "absent", graceful=False)
                    else:
                        left.append(f"{name} in {host}, of a migration that failed")
            except LabError as exc:
                left.append(f"maybe a guest of the benchmark in {host}: {exc}")
        return left

    def unpause_others(self) -> list[str]:
        """Let the topology's guests run again; return those that are left paused, and why."""
        left = []
        for name in self.machine.guests:
            try:
                self._guest(self.hosts[0], name, "running")
            except LabError as exc:
                left.append(f"{name} in {self.hosts[0]}, maybe paused: {exc}")
        return left


def bring_up() -> None:
    """Boot the lab, from a saved boot if there is one, and start the host VM of slot b."""
    if cli.main(["up"]):
        raise LabError("the lab does not come up")
    with phase("host VM of slot b"):
        ansible.playbook(
            paths.REPOSITORY / "playbooks" / "host_vm.yml", "-e", "host_vm_slot=b", timeout=HOST_VM_TIMEOUT, log=LOG
        )


def measure(sizes: list[int], rounds: int) -> list[dict]:
    """Return what was measured of every migration; whatever happens, no guest of the benchmark stays."""
    benchmark = Benchmark(topology.load(paths.LAB / "topology.yml"))
    measured = []
    try:
        benchmark.pause_others()
        for size in sizes:
            with phase(f"migrations of {size} MiB"):
                measured += benchmark.measure(size, rounds)
            left = benchmark.remove_guests()
            if left:
                raise LabError(f"in the way of the next size: {'; '.join(left)}")
    finally:
        for what in [*benchmark.remove_guests(), *benchmark.unpause_others()]:
            say(f"left behind: {what}")
    return measured


def sizes_mib(text: str) -> list[int]:
    """Parse the sizes given on the command line, e.g. "128,512"."""
    sizes = [int(word) for word in text.split(",")]
    if min(sizes) <= 0 or len(set(sizes)) < len(sizes):
        raise ValueError(text)
    return sizes


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--sizes", type=sizes_mib, default=[128, 512], help="MiB of the guests (default: 128,512)")
    parser.add_argument("--rounds", type=int, default=3, help="migrations of each size by each method (default: 3)")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    LOG.unlink(missing_ok=True)
    phases.reset()
    try:
        bring_up()
        measured = measure(options.sizes, options.rounds)
    except LabError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    command = f"make bench ARGS={shlex.quote(shlex.join(argv))}" if argv else "make bench"
    found = results.summarize(measured)
    document = {"command": command, "rounds": options.rounds, "results": found, "migrations": measured}
    (HERE / "results.json").write_text(json.dumps({**document, "phases": phases.rows()}, indent=2) + "\n")
    (HERE / "RESULTS.md").write_text(results.page(command, found, phases.table()))
    print(results.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
