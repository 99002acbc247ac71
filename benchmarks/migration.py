"""Measures what migration between the two host VMs of the lab's machine costs, Xen's own and ours (`make bench`).

In one run on one boot of the lab: a guest of each size goes to and fro by each method, then one of a certain size
rewrites its memory at each rate. Writes `results.json`, `RESULTS.md` and plots beside this file. The host VM of slot
b stays afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import typing

from vmbeam_lab import ansible, build, cli, guests, inventory, paths, phases, topology
from vmbeam_lab.errors import LabError
from vmbeam_lab.machine import Emulated, guest_dom0_ssh
from vmbeam_lab.phases import phase, say
from vmbeam_lab.shell import run

from . import plots, results
from .meters import Meters
from .web import Load

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
#: Of the benchmark's programs in the guest dom0s.
PROGRAM_TIMEOUT = 120
#: Of the guests that rewrite their memory at different rates: a quarter of it.
WRITER_SHARE = 4
PORT = 5001
#: Pages per second that the guests' program takes, and the MiB that a guest boots with.
MAX_RATE, LEAST_SIZE = 1_000_000, 96
#: In how many seconds a guest rewrites all of its pages, at most, when they are verified.
CHECK_SECONDS = 20
#: How long a guest serves before and after a migration.
WEB_SECONDS = 10


class Benchmark:
    """The benchmark's guests on the running lab."""

    def __init__(self, lab: topology.Topology) -> None:
        self.prefix, self.gateway = lab.prefix, lab.gateway
        self.machine = lab.select(None)[0]
        self.hosts = [inventory.slot_name(self.machine, slot) for slot in ("a", "b")]
        # To talk to the monitor takes no QEMU program.
        self.emulated = Emulated(self.machine, pathlib.Path("/nonexistent"), build.ssh_key())
        self.port = self._forward()
        self._measurements = itertools.count()
        macs = [self.machine.slots[slot].mac for slot in ("a", "b")]
        self.meters = Meters(self.emulated, dict(zip(self.hosts, macs, strict=True)))

    def _forward(self) -> int:
        """Return a new port of this computer that leads to port 80 of the benchmark's guest."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = f"hostfwd_add net0 tcp:127.0.0.1:{port}-{ADDRESS}:80"
        refusal = self.emulated.execute("human-monitor-command", {"command-line": command})
        if refusal:
            raise LabError(f"{self.machine.name}: {command}: {refusal.strip()}")
        return port

    def _guest(self, host: str, name: str, state: str, **options: object) -> None:
        ansible.module(host, "vmbeam.xen.guest", {"name": name, "state": state, **options}, timeout=GUEST_TIMEOUT)

    def pause_others(self) -> None:
        """Pause the topology's guests, which would compete for the CPU."""
        for name in self.machine.guests:
            self._guest(self.hosts[0], name, "paused")

    def start(self, size_mib: int, writer_mib: int | None = None) -> str:
        """Start the guest of a size in slot a and return its name. writer_mib: how much it rewrites."""
        name = f"bench{size_mib}"
        with tempfile.TemporaryDirectory() as directory:
            ansible.module(
                self.hosts[0],
                "ansible.builtin.copy",
                {
                    "src": str(self._config(pathlib.Path(directory), name, size_mib, writer_mib)),
                    "dest": f"/etc/xen/guests/{name}.cfg",
                },
            )
        self._guest(self.hosts[0], name, "running", config=f"/etc/xen/guests/{name}.cfg")
        guests.await_start(self.port, GUEST_TIMEOUT)
        return name

    def _config(self, directory: pathlib.Path, name: str, size_mib: int, writer_mib: int | None) -> pathlib.Path:
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
            **({"memory_writer_mb": writer_mib} if writer_mib else {}),
        }
        (directory / "guests.json").write_text(json.dumps([described]))
        tool = [sys.executable, paths.LAB / "guests" / "build"]
        run([*tool, "programs", "--output", directory / "guest-tools"], timeout=300)
        made = ["--boot", directory, "--guests", directory / "guests.json", "--output", directory, "--direct-scripts"]
        run([*tool, "guests", *made], timeout=300)
        return directory / f"{name}.cfg"

    def measure(self, name: str, order: list[str]) -> typing.Iterator[dict]:
        """Migrate a guest, which is in slot a, by one method after the other, and yield what was measured.

        It ends in slot a, by way of zero-copy if need be.
        """
        source, destination = "a", "b"
        for method in order:
            record = {
                "method": method,
                "direction": f"{source} to {destination}",
                **self._migrate(name, method, source, destination),
            }
            say(json.dumps(record))
            yield record
            source, destination = destination, source
        self._check_memory(name)
        if source == "b":
            self._migrate(name, results.ZERO_COPY, "b", "a")

    def _request_rate(self, rate: int) -> None:
        guests.await_status(
            self.port,
            lambda status: status["memory"]["rate"] == rate,
            timeout=GUEST_TIMEOUT,
            what=f"rate of {rate} pages/s",
            control=("memory-rate", str(rate)),
        )

    def set_rate(self, rate: int) -> float:
        """Have the guest rewrite so many pages a second; return how many it manages to, over two rounds or more."""
        self._request_rate(rate)
        if not rate:
            return 0
        before = guests.await_status(self.port, timeout=GUEST_TIMEOUT)
        after = guests.await_status(
            self.port,
            lambda status: status["memory"]["round"] >= before["memory"]["round"] + 2,
            timeout=GUEST_TIMEOUT,
            what="two rounds at the new rate",
        )
        pages, seconds = (after["memory"][key] - before["memory"][key] for key in ("verified", "updated"))
        return round(pages / seconds)

    def web(self, name: str, order: list[str]) -> list[dict]:
        """Migrate a guest, which is in slot a, while it serves as fast as it can; return answers per second."""
        measured = []
        source, destination = "a", "b"
        for method in order:
            options = self._options(name, method, source, destination)
            before = guests.await_status(self.port, timeout=GUEST_TIMEOUT)
            load = Load(self.port)
            load.start()
            try:
                time.sleep(WEB_SECONDS)
                migration = self._move(source, options)
                ended = time.monotonic()
                time.sleep(WEB_SECONDS)
            finally:
                load.end()
            problem = guests.trouble(before, guests.await_status(self.port, timeout=GUEST_TIMEOUT))
            if problem:
                raise LabError(f"{name} after {method} from {source} to {destination}: {problem}")
            # Without the time that Ansible takes to get there.
            answers = load.answers(ended - migration["seconds"], ended)
            measured.append({"method": method, "direction": f"{source} to {destination}", **answers._asdict()})
            say(json.dumps(measured[-1]))
            source, destination = destination, source
        return measured

    def throughput(self) -> dict[str, float]:
        """Return MiB/s from the guest dom0 of slot a to that of slot b, by way."""
        channel = self._session("a", "b", purpose="channel")
        with self._program("b", "sink", str(PORT)) as sink:
            assert sink.stdout is not None  # noqa: S101 - for the type checker
            if not sink.stdout.readline():
                raise LabError("throughput: the sink has not started")
            network = self._run("a", "network", self.machine.slots["b"].address, str(PORT))
        return {
            "channel": self._run("a", "channel", str(channel)),
            "network": network,
            "memcpy": self._run("a", "memcpy"),
        }

    @contextlib.contextmanager
    def _program(self, slot: str, *arguments: str) -> typing.Iterator[subprocess.Popen]:
        """Run throughput.py in a guest dom0; it is ended afterwards, if it does not end by itself."""
        # Both ends bound it: this one in case that ssh hangs.
        argv = ["timeout", str(2 * PROGRAM_TIMEOUT), *guest_dom0_ssh(self.machine, slot, self.emulated.key)]
        argv += ["timeout", str(PROGRAM_TIMEOUT), "python3", "-", *arguments]
        with (HERE / "throughput.py").open() as program:
            process = subprocess.Popen(argv, stdin=program, stdout=subprocess.PIPE, text=True)
        with process:
            yield process

    def _run(self, slot: str, *arguments: str) -> float:
        with self._program(slot, *arguments) as program:
            text, _ = program.communicate()
        if program.returncode:
            raise LabError(f"throughput by {arguments[0]}: exit code {program.returncode}")
        return float(text)

    def _migrate(self, name: str, method: str, source: str, destination: str) -> dict:
        options = self._options(name, method, source, destination)
        before = guests.reset_ticks(self.port, f"measurement-{next(self._measurements)}")
        earlier = self.meters.read()
        migration = self._move(source, options)
        used = self.meters.read().since(earlier)
        after = guests.settled_status(self.port, GUEST_TIMEOUT)
        problem = guests.trouble(before, after)
        if problem:
            raise LabError(f"{name} after {method} from {source} to {destination}: {problem}")
        return {
            **{key: migration[key] for key in ("seconds", "downtime_seconds", "bytes")},
            "longest_gap_seconds": guests.longest_gap(after),
            "phases": migration["phases"],
            "network_bytes": used["network_bytes"],
            "cpu_host_dom0": used["cpu_seconds"]["Domain-0"],
            "cpu_host_vms": round(sum(used["cpu_seconds"][host] for host in self.hosts), 1),
            **(migration["memory"] or {}),
        }

    def _options(self, name: str, method: str, source: str, destination: str) -> dict[str, object]:
        """Return the options of guest_migrate for a method, sessions included."""
        options: dict[str, object] = {
            "name": name,
            "destination": self.machine.slots[destination].address,
            "timeout": MIGRATE_TIMEOUT,
            **results.METHODS[method],
        }
        if options["strategy"] == "zero_copy":
            options["session"] = self._session(source, destination)
            options["channel"] = self._session(source, destination, purpose="channel")
        return options

    def _move(self, source: str, options: dict[str, object]) -> dict:
        """Migrate a guest and return what the module tells of that."""
        host = inventory.slot_name(self.machine, source)
        timeout = MIGRATE_TIMEOUT + REPAIR_TIMEOUT
        return ansible.module(host, "vmbeam.xen.guest_migrate", options, timeout=timeout)["migration"]

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
        # What rewrites nothing verifies nothing.
        least = before["memory"]["pages"] // CHECK_SECONDS
        if before["memory"]["rate"] < least:
            self._request_rate(least)
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

    def clear(self) -> None:
        """Destroy the benchmark's guests; raises LabError if anything is left."""
        left = self.remove_guests()
        if left:
            raise LabError(f"in the way of the next guest: {'; '.join(left)}")

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


class Plan(typing.NamedTuple):
    """What is to be measured."""

    sizes_mib: list[int]
    rates: list[int]
    rate_size_mib: int
    methods: list[str]
    rounds: int


@dataclasses.dataclass
class Measured:
    """What was measured so far: records of migrations, answers per second, and MiB/s."""

    by_size: list[dict] = dataclasses.field(default_factory=list)
    by_rate: list[dict] = dataclasses.field(default_factory=list)
    web: list[dict] = dataclasses.field(default_factory=list)
    throughput: dict[str, float] = dataclasses.field(default_factory=dict)


def measure(plan: Plan, measured: Measured) -> None:
    """Measure; whatever happens, no guest of the benchmark stays, and what was measured is in `measured`."""
    benchmark = Benchmark(topology.load(paths.LAB / "topology.yml"))
    # Whose ratios are asked for.
    pair = [method for method in plan.methods if method in (results.BASELINE, results.ZERO_COPY)]
    try:
        benchmark.pause_others()
        with phase("throughput"):
            measured.throughput = benchmark.throughput()
            say(json.dumps(measured.throughput))
        for size in plan.sizes_mib:
            with phase(f"migrations of {size} MiB"):
                name = benchmark.start(size)
                for record in benchmark.measure(name, results.schedule(plan.rounds, plan.methods)):
                    measured.by_size.append({"size_mib": size, **record})
            benchmark.clear()
        if plan.rates and pair:
            with phase(f"rates of {plan.rate_size_mib} MiB"):
                name = benchmark.start(plan.rate_size_mib, plan.rate_size_mib // WRITER_SHARE)
                for rate in plan.rates:
                    about = {"size_mib": plan.rate_size_mib, "rate": rate, "achieved_rate": benchmark.set_rate(rate)}
                    for record in benchmark.measure(name, results.schedule(plan.rounds, pair)):
                        measured.by_rate.append({**about, **record})
            with phase(f"web service of {plan.rate_size_mib} MiB"):
                benchmark.set_rate(0)
                # Each goes once in each direction.
                measured.web = benchmark.web(name, results.schedule(2, pair))
            benchmark.clear()
    finally:
        for what in [*benchmark.remove_guests(), *benchmark.unpause_others()]:
            say(f"left behind: {what}")


def numbers(text: str) -> list[int]:
    """Parse numbers given on the command line, e.g. "0,1000"; nothing is none."""
    found = [int(word) for word in text.split(",")] if text else []
    if min(found, default=0) < 0 or len(set(found)) < len(found):
        raise ValueError(text)
    return found


def sizes_mib(text: str) -> list[int]:
    """Parse the sizes given on the command line, e.g. "128,512"."""
    sizes = numbers(text)
    if not sizes or not all(sizes):
        raise ValueError(text)
    return sizes


def methods(text: str) -> list[str]:
    """Parse the methods given on the command line, e.g. "precopy-ssh,zero-copy"."""
    found = text.split(",")
    if len(set(found)) < len(found) or not set(found) <= set(results.METHODS):
        raise ValueError(text)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--sizes", type=sizes_mib, default=[128, 512], help="MiB of the guests (default: 128,512)")
    parser.add_argument("--rounds", type=int, default=3, help="migrations of each size by each method (default: 3)")
    parser.add_argument(
        "--rates",
        type=numbers,
        default=[0, 1000, 3000, 10000],
        help="pages rewritten per second by a guest of --rate-size (default: 0,1000,3000,10000; '' for none)",
    )
    parser.add_argument("--rate-size", type=int, default=256, help="its MiB (default: 256)")
    parser.add_argument(
        "--methods",
        type=methods,
        default=list(results.METHODS),
        help=f"of {', '.join(results.METHODS)} (default: all of them)",
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if max(options.rates, default=0) > MAX_RATE:
        parser.error(f"--rates: at most {MAX_RATE}")
    if options.rate_size < LEAST_SIZE or min(options.sizes) < LEAST_SIZE:
        parser.error(f"--sizes, --rate-size: at least {LEAST_SIZE}")
    LOG.unlink(missing_ok=True)
    phases.reset()
    plan = Plan(options.sizes, options.rates, options.rate_size, options.methods, options.rounds)
    command = f"make bench ARGS={shlex.quote(shlex.join(argv))}" if argv else "make bench"
    measured = Measured()
    try:
        bring_up()
        measure(plan, measured)
    except LabError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    finally:
        # Half of it is better than nothing after an hour.
        if measured.by_size:
            write(command, options.rounds, measured)
    return 0


def write(command: str, rounds: int, measured: Measured) -> None:
    """Write results.json, RESULTS.md and the plots."""
    found = results.summarize(measured.by_size)
    figures = results.figures(measured.by_size, measured.by_rate)
    document = {
        "command": command,
        "rounds": rounds,
        "figures": {"fig6": measured.throughput, **figures, "fig16": measured.web},
        "results": found,
        "migrations": measured.by_size,
        "migrations_by_rate": measured.by_rate,
        "phases": phases.rows(),
    }
    (HERE / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    plotted = plots.draw(figures, HERE / "plots")
    text = results.page(
        command,
        found,
        phases.table(),
        results.throughput_text(measured.throughput) if measured.throughput else "",
        results.figures_text(figures),
        results.web_text(measured.web),
        "\n".join(f"![{path.stem}](plots/{path.name})" for path in plotted),
    )
    (HERE / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
