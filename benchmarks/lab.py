"""The benchmark's guests on the running lab: starts them, migrates them, and measures that."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import typing

from vmbeam_lab import ansible, build, guests, inventory, paths, topology
from vmbeam_lab.errors import LabError, ModuleFailed
from vmbeam_lab.machine import Emulated, guest_dom0_ssh
from vmbeam_lab.shell import run

from . import results
from .meters import Meters, Reading
from .web import Load

HERE = pathlib.Path(__file__).resolve().parent

#: Of the guests, by number: only one runs at a time, except where two migrate at once.
ADDRESSES = ("10.0.2.41", "10.0.2.42")
MACS = ("00:16:3e:02:00:41", "00:16:3e:02:00:42")
NAME = re.compile(r"bench\d+-(pvh|hvm)\d+(-\d)?")

#: Bounds in seconds; under emulation everything takes long.
GUEST_TIMEOUT = 600
#: What guest_migrate may need on top of its limit, to repair after a migration that took too long.
REPAIR_TIMEOUT = 600
#: Of the benchmark's programs in the guest dom0s.
PROGRAM_TIMEOUT = 120
PORT = 5001
#: In how many seconds a guest rewrites all of its pages, at most, when they are verified.
CHECK_SECONDS = 20
#: How long a guest serves before and after a migration.
WEB_SECONDS = 10
#: What zero-copy's counters are judged by.
MEMORY = ("pages_copied", "pages_sent", "hypercalls", "p2m_writes_4k", "p2m_writes_2m")
#: Where host dom0 keeps the boot disk of an HVM guest: a directory that it has.
DISKS = "/var/lib/vmbeam/images"


@dataclasses.dataclass(frozen=True)
class Guest:
    """A guest of the benchmark."""

    size_mib: int
    writer_mib: int | None = None  #: how much it rewrites; None: its default
    vcpus: int = 1
    type: str = "pvh"
    number: int = 0

    @property
    def name(self) -> str:
        """The name of its domain, and that of its description."""
        return f"bench{self.size_mib}-{self.type}{self.vcpus}" + (f"-{self.number}" if self.number else "")


class Benchmark:
    """The benchmark's guests, one at a time, which remain where their last migration took them."""

    def __init__(self, lab: topology.Topology, limit: int) -> None:
        """:param limit: seconds that a migration may take"""
        self.prefix, self.gateway = lab.prefix, lab.gateway
        self.machine = lab.select(None)[0]
        self.limit = limit
        self.hosts = {slot: inventory.slot_name(self.machine, slot) for slot in ("a", "b")}
        # To talk to the monitor takes no QEMU program.
        self.emulated = Emulated(self.machine, pathlib.Path("/nonexistent"), build.ssh_key())
        self._ports = [self._forward(address) for address in ADDRESSES]
        self.port = self._ports[0]
        self._measurements = itertools.count()
        self.meters = Meters(self.emulated, {name: self.machine.slots[slot].mac for slot, name in self.hosts.items()})
        self._guest: Guest | None = None
        self._slot = "a"

    def _forward(self, address: str) -> int:
        """Return a new port of this computer that leads to port 80 of the guest with an address."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        command = f"hostfwd_add net0 tcp:127.0.0.1:{port}-{address}:80"
        refusal = self.emulated.execute("human-monitor-command", {"command-line": command})
        if refusal:
            raise LabError(f"{self.machine.name}: {command}: {refusal.strip()}")
        return port

    # --- guests

    def require(self, guest: Guest) -> None:
        """Have this guest running, and no other one of the benchmark: the one that runs already, or a new one."""
        if self._guest == guest:
            return
        self.clear()
        self._start(guest)
        self._guest, self._slot = guest, "a"

    def _start(self, guest: Guest) -> None:
        config = f"/etc/xen/guests/{guest.name}.cfg"
        with tempfile.TemporaryDirectory() as directory:
            made = self._make(pathlib.Path(directory), guest)
            self._copy(self.hosts["a"], made / f"{guest.name}.cfg", config)
            for disk in _disks(guest):
                self._copy(self.machine.name, made / f"{disk}.raw", f"{DISKS}/{disk}.raw")
                self._attach(disk)
        options = {"name": guest.name, "state": "running", "config": config}
        ansible.module(self.hosts["a"], "vmbeam.xen.guest", options, timeout=GUEST_TIMEOUT)
        guests.await_start(self._ports[guest.number], GUEST_TIMEOUT)

    def _copy(self, host: str, source: pathlib.Path, target: str) -> None:
        ansible.module(host, "ansible.builtin.copy", {"src": str(source), "dest": target})

    def _attach(self, disk: str) -> None:
        """Give both host VMs a guest's disk."""
        device = f"/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_{disk}"
        for slot, host in self.hosts.items():
            options = {"host_vm": host, "disk": disk, "path": f"{DISKS}/{disk}.raw"}
            ansible.module(self.machine.name, "vmbeam.xen.host_vm_disk", options)
            argv = guest_dom0_ssh(self.machine, slot, self.emulated.key)
            run([*argv, f"udevadm wait --timeout=120 {device}"], timeout=180)

    def _make(self, directory: pathlib.Path, guest: Guest) -> pathlib.Path:
        """Return the directory with the guest's xl file and disks, made as those of the lab's guests."""
        described = {
            "name": guest.name,
            "type": guest.type,
            "memory_mb": guest.size_mib,
            "vcpus": guest.vcpus,
            "mac": MACS[guest.number],
            "address": ADDRESSES[guest.number],
            "prefix": self.prefix,
            "gateway": self.gateway,
            "disks": _disks(guest),
            # Exists and cannot be mounted: the guest does not wait for a disk that never comes.
            "data_device": "null",
            **({"memory_writer_mb": guest.writer_mib} if guest.writer_mib else {}),
        }
        (directory / "guests.json").write_text(json.dumps([described]))
        made: list[str | pathlib.Path] = [
            "--boot",
            build.guest_boot(),
            "--guests",
            directory / "guests.json",
            "--output",
            directory,
        ]
        run([sys.executable, paths.LAB / "guests" / "build", "guests", *made, "--direct-scripts"], timeout=300)
        return directory

    def clear(self) -> None:
        """Destroy the benchmark's guests in both host VMs; raises LabError if anything is left."""
        self._guest = None
        left = []
        for host in self.hosts.values():
            for guest in ansible.module(host, "vmbeam.xen.guest_info", {})["guests"]:
                name = guest["name"]
                if NAME.fullmatch(name):
                    options = {"name": name, "state": "absent", "graceful": False}
                    ansible.module(host, "vmbeam.xen.guest", options, timeout=GUEST_TIMEOUT)
                elif NAME.match(name):
                    left.append(f"{name} in {host}, of a migration that failed")
        if left:
            raise LabError(f"in the way of the next guest: {'; '.join(left)}")

    def set_rate(self, rate: int) -> int:
        """Have the guest rewrite so many pages a second; return how many it manages to, over two rounds or more."""
        guests.set_rate(self.port, rate, GUEST_TIMEOUT)
        if not rate:
            return 0
        before = guests.await_status(self.port, timeout=GUEST_TIMEOUT)
        after = guests.await_rounds(self.port, before, GUEST_TIMEOUT, "two rounds at the new rate")
        pages, seconds = (after["memory"][key] - before["memory"][key] for key in ("verified", "updated"))
        return round(float(pages / seconds))

    def check_memory(self) -> None:
        """Wait until each of the guest's pages was verified after its last migration; raises LabError."""
        before = guests.await_status(self.port, timeout=GUEST_TIMEOUT)
        # What rewrites nothing verifies nothing.
        least = before["memory"]["pages"] // CHECK_SECONDS
        if before["memory"]["rate"] < least:
            guests.set_rate(self.port, least, GUEST_TIMEOUT)
        self._raise_trouble(before, guests.await_rounds(self.port, before, GUEST_TIMEOUT))

    def _raise_trouble(self, before: dict[str, typing.Any], after: dict[str, typing.Any]) -> None:
        problem = guests.trouble(before, after)
        if problem:
            # Nothing that it does after this means anything.
            self._guest = None
            raise LabError(f"the guest lost something: {problem}")

    # --- migrations

    def migrate(self, method: str, web: bool = False) -> dict[str, typing.Any]:
        """Migrate the guest to the other slot and return the record of that (results.KINDS).

        After a migration that failed the guest runs on where it was, or require() starts another one.

        :param web: whether it has to serve as fast as it can meanwhile
        """
        source, destination = self._slot, "b" if self._slot == "a" else "a"
        record: dict[str, typing.Any] = {"method": method, "direction": f"{source} to {destination}"}
        began = math.inf
        try:
            options = self._options(self._guest, method, source, destination)
            before = guests.reset_ticks(self.port, f"measurement-{next(self._measurements)}")
            began = time.monotonic()
            measured = self._measure(options, source, destination, web)
            began = math.inf
            after = guests.settled_status(self.port, GUEST_TIMEOUT)
            self._raise_trouble(before, after)
        except LabError as exc:
            record["failed"] = plain(str(exc))
            if time.monotonic() - began >= self.limit:
                record["more_than_seconds"] = self.limit
            self._look_after(exc)
            return record
        self._slot = destination
        return {**record, **measured, "longest_gap_seconds": guests.longest_gap(after)}

    def _look_after(self, error: LabError) -> None:
        """Go on with the guest after a failure only if it is sure to be well where it was."""
        if isinstance(error, ModuleFailed) and error.result.get("location") == "source":
            with contextlib.suppress(LabError):
                guests.await_status(self.port, timeout=GUEST_TIMEOUT)
                return
        self._guest = None

    def _measure(self, options: dict[str, object], source: str, destination: str, web: bool) -> dict[str, typing.Any]:
        earlier = self.meters.read()
        with self.meters.free_memory(self.limit + REPAIR_TIMEOUT) as free:
            if web:
                migration, served = self._move_while_serving(source, options)
            else:
                migration, served = self._move(source, options), {}
        used = self.meters.read().since(earlier)
        return {
            **{key: migration[key] for key in ("seconds", "downtime_seconds", "bytes", "phases")},
            **self._metered(used, source, destination),
            "peak_memory_mib": self.machine.memory_mb - min(free) if free else None,
            **_memory(migration["memory"], used.network_bytes),
            **served,
        }

    def _metered(self, used: Reading, source: str, destination: str) -> dict[str, float]:
        domains = {"host_dom0": "Domain-0", "source": self.hosts[source], "destination": self.hosts[destination]}
        cpu = {key: used.cpu_seconds[name] for key, name in domains.items()}
        return {
            "network_bytes": used.network_bytes,
            **{f"cpu_{key}": value for key, value in cpu.items()},
            **{f"cpu_share_{key}": round(100 * value / used.at, 1) for key, value in cpu.items()},
            "cpu_machine": used.machine_seconds,
        }

    def _move_while_serving(
        self, source: str, options: dict[str, object]
    ) -> tuple[dict[str, typing.Any], dict[str, float]]:
        """Migrate the guest; return also its answers per second, before, during and after."""
        load = Load(self.port)
        load.start()
        try:
            time.sleep(WEB_SECONDS)
            migration = self._move(source, options)
            ended = time.monotonic()
            time.sleep(WEB_SECONDS)
        finally:
            load.end()
        # Without the time that Ansible takes to get there.
        answers = load.answers(ended - migration["seconds"], ended)
        loss = round(100 * (1 - answers.during / answers.before), 1) if answers.before else None
        return migration, {**answers._asdict(), "loss_percent": loss}

    def _options(self, guest: Guest | None, method: str, source: str, destination: str) -> dict[str, object]:
        """Return the options of guest_migrate for a method, sessions included."""
        if guest is None:
            raise LabError("there is no guest to migrate")
        options: dict[str, object] = {
            "name": guest.name,
            "destination": self.machine.slots[destination].address,
            "timeout": self.limit,
            **results.METHODS[method],
        }
        if options["strategy"] == "zero_copy":
            options["session"] = self._sessions(source, destination)[0]
        if options["transport"] == "channel":
            options["channel"] = self._sessions(source, destination, purpose="channel")[0]
        return options

    def _move(self, source: str, options: dict[str, object]) -> dict[str, typing.Any]:
        """Migrate the guest and return what the module tells of that."""
        timeout = self.limit + REPAIR_TIMEOUT
        told = ansible.module(self.hosts[source], "vmbeam.xen.guest_migrate", options, timeout=timeout)
        return typing.cast(dict[str, typing.Any], told["migration"])

    def _sessions(self, source: str, destination: str, **more: object) -> list[int]:
        """Return the numbers of sessions that let one host VM pass guests' memory to the other, or of a channel."""
        options = {"source": self.hosts[source], "destination": self.hosts[destination], **more}
        found = ansible.module(self.machine.name, "vmbeam.xen.zero_copy_session", options)["sessions"]
        return [session["session"] for session in found]

    def together(self, size_mib: int) -> dict[str, typing.Any]:
        """Start two guests, migrate both at once by zero-copy, and return one record: the worse of both values.

        :raises LabError: that failed
        """
        self.clear()
        both = [Guest(size_mib, number=number) for number in range(len(ADDRESSES))]
        for guest in both:
            self._start(guest)
        options = [self._options(guest, results.ZERO_COPY, "a", "b") for guest in both]
        for option, session in zip(options, self._sessions("a", "b", count=len(both)), strict=True):
            option["session"] = session
        before = [guests.await_status(port, timeout=GUEST_TIMEOUT) for port in self._ports]
        earlier = self.meters.read()
        with concurrent.futures.ThreadPoolExecutor(len(both)) as pool:
            migrations = list(pool.map(lambda option: self._move("a", option), options))
        used = self.meters.read().since(earlier)
        for port, status in zip(self._ports, before, strict=True):
            self._raise_trouble(status, guests.settled_status(port, GUEST_TIMEOUT))
        return {
            "method": results.ZERO_COPY,
            "direction": "a to b",
            **worst(migrations, ("seconds", "downtime_seconds")),
            **self._metered(used, "a", "b"),
            **worst([migration["memory"] or {} for migration in migrations], MEMORY),
        }

    # --- throughput

    def throughput(self) -> typing.Iterator[dict[str, typing.Any]]:
        """Yield the MiB/s from the guest dom0 of slot a to that of slot b by each way."""
        channel = self._sessions("a", "b", purpose="channel")[0]
        yield {"way": results.CHANNEL, "mib_per_s": self._run("channel", str(channel))}
        yield {"way": results.PIPES, "mib_per_s": self._run("pipes", str(channel))}
        with self._partner("sink", str(PORT)):
            address = self.machine.slots["b"].address
            yield {"way": results.NETWORK, "mib_per_s": self._run("network", address, str(PORT))}
        yield {"way": results.MEMCPY, "mib_per_s": self._run("memcpy")}
        with self._partner("load") as load:
            measured = self._run("memcpy")
            if load.poll() is not None:
                raise LabError("throughput: the load ended before what was measured beside it")
            yield {"way": results.MEMCPY_IN_BOTH, "mib_per_s": measured}

    @contextlib.contextmanager
    def _partner(self, *arguments: str) -> typing.Iterator[subprocess.Popen[str]]:
        """Run throughput.py in the guest dom0 of slot b beside what is measured in the other.

        Leaving this ends it: sink has been closed by the other side, load is killed by what it prints to nobody.
        """
        with self._program("b", *arguments) as partner:
            assert partner.stdout is not None  # noqa: S101 - for the type checker
            if not partner.stdout.readline():
                raise LabError(f"throughput: {arguments[0]} has not started")
            yield partner

    @contextlib.contextmanager
    def _program(self, slot: str, *arguments: str) -> typing.Iterator[subprocess.Popen[str]]:
        """Run throughput.py in a guest dom0; afterwards its output is closed, and it is waited for."""
        # Both ends bound it: this one in case that ssh hangs.
        argv = ["timeout", str(2 * PROGRAM_TIMEOUT), *guest_dom0_ssh(self.machine, slot, self.emulated.key)]
        argv += ["timeout", str(PROGRAM_TIMEOUT), "python3", "-", *(shlex.quote(word) for word in arguments)]
        with (HERE / "throughput.py").open() as program:
            process = subprocess.Popen(argv, stdin=program, stdout=subprocess.PIPE, text=True)
        with process:
            yield process

    def _run(self, *arguments: str) -> float:
        with self._program("a", *arguments) as program:
            text, _ = program.communicate()
        if program.returncode:
            raise LabError(f"throughput by {arguments[0]}: exit code {program.returncode}")
        return float(text)


def plain(text: str) -> str:
    """Return the end of an error's text, without the names of this computer's directories."""
    for directory, name in ((paths.REPOSITORY, "."), (paths.STATE, ".lab"), (pathlib.Path.home(), "~")):
        text = text.replace(str(directory), name)
    return text[-1000:]


def worst(found: list[dict[str, typing.Any]], keys: typing.Iterable[str]) -> dict[str, float | None]:
    """Return the greatest value of each key; None if one is not known."""
    values = {key: [entry.get(key) for entry in found] for key in keys}
    return {
        key: None if None in several else max(value for value in several if value is not None)
        for key, several in values.items()
    }


def _disks(guest: Guest) -> list[str]:
    return [f"{guest.name}-root"] if guest.type == "hvm" else []


def _memory(counted: dict[str, int | None] | None, network_bytes: int) -> dict[str, int | None]:
    """Return what a migration's record tells of memory; counted: by zero-copy migration, None for what copies."""
    return {"bytes_copied": network_bytes} if counted is None else counted
