"""Boots the lab many times and counts the boots that need no second try (`make lab-reliability`).

What a run is, reliability_run says. Each is a process of its own, with its own disks, ports and state directory
(.lab/reliability-1, -2 ...), so that several can go on at a time; whatever it started ends with it. Each run is a line
of .lab/reliability.jsonl as soon as it ends, and benchmarks/RELIABILITY.md is written when all are there.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import copy
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import typing

import yaml

from . import cli, paths, reliability_run, topology
from .errors import LabError
from .phases import say
from .shell import isolated
from .topology import Machine

RECORDS = paths.STATE / "reliability.jsonl"
REPORT = paths.REPOSITORY / "benchmarks" / "RELIABILITY.md"

#: Share of the runs, in percent, that have to succeed.
WANTED_PERCENT = 95

#: Distance between the ports of the same machine of two workers; those of the topology are closer to each other.
PORT_STEP = 100


@dataclasses.dataclass(frozen=True)
class Worker:
    """Does one run after the other, on a copy of the machine."""

    number: int
    state: pathlib.Path  #: its directory for running machines
    topology: pathlib.Path
    machine: Machine

    def __str__(self) -> str:
        return f"{self.machine.name} of worker {self.number} (ssh port {self.machine.ssh_port})"


def moved(document: dict[str, typing.Any], machine: str, distance: int) -> dict[str, typing.Any]:
    """Return a topology file's content with that machine alone, its ports higher by `distance`."""
    chosen = copy.deepcopy(document["machines"][machine])
    chosen["ssh_port"] += distance
    for guest in chosen["guests"].values():
        guest["http_port"] += distance
    return {"network": document["network"], "default_machines": [machine], "machines": {machine: chosen}}


def make_worker(number: int, source: pathlib.Path, machine: str) -> Worker:
    """Give a worker its state directory, with a topology that no other uses."""
    state = paths.STATE.resolve() / f"reliability-{number}"
    state.mkdir(parents=True, exist_ok=True)
    path = state / "topology.yml"
    path.write_text(yaml.safe_dump(moved(yaml.safe_load(source.read_text()), machine, number * PORT_STEP)))
    return Worker(number, state, path, topology.load(path).select(None)[0])


def check_memory(machine: Machine, parallel: int, total_mb: int) -> None:
    """Refuse more machines at a time than the computer has memory for.

    :raises LabError: telling how many would fit
    """
    if parallel * machine.memory_mb > total_mb:
        raise LabError(
            f"{parallel} times {machine.name} need {parallel * machine.memory_mb} MiB, this computer has {total_mb}: "
            f"--parallel {total_mb // machine.memory_mb} at most, or a smaller machine (--machine m2)"
        )


class Runs:
    """The runs that are wanted: hands out their numbers, keeps their records, ends them all on demand."""

    def __init__(self, wanted: int, minutes: float, records: list[dict[str, typing.Any]]) -> None:
        self.wanted = wanted
        self.minutes = minutes
        self.records = records
        recorded = {record["run"] for record in records}
        self._left = collections.deque(number for number in range(1, wanted + 1) if number not in recorded)
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def work(self, worker: Worker) -> None:
        """Do runs on a worker's machine until none is left."""
        while True:
            with self._lock:
                if self._ended or not self._left:
                    return
                number = self._left.popleft()
            say(f"run {number} of {self.wanted}: begins on {worker}")
            record = self._run(worker, number)
            with self._lock:
                if self._ended:  # its end is not its own fault
                    return
                self.records.append(record)
                with open(RECORDS, "a") as handle:
                    handle.write(json.dumps(record) + "\n")
            say(
                f"run {number} of {self.wanted}: {record['reason'] or 'done'}, {record['seconds']:.0f} s, "
                f"on {worker}; {succeeded(self.records)} of {len(self.records)} succeeded so far"
            )

    def _run(self, worker: Worker, number: int) -> dict[str, typing.Any]:
        written = worker.state / "record.json"
        written.unlink(missing_ok=True)
        start = time.monotonic()
        record = {"run": number, "machine": worker.machine.name, "worker": worker.number}
        why = self._process(command(worker, number, self.minutes, written), worker.state)
        try:
            return {**record, **json.loads(written.read_text())}
        except (OSError, ValueError):
            seconds = round(time.monotonic() - start, 1)
            return {**record, "outcome": "failed", "reason": why, "seconds": seconds, "end": round(time.time(), 1)}

    def _process(self, argv: list[str], state: pathlib.Path) -> str:
        """Run the process of a run; return how it ended."""
        with self._lock:
            if self._ended:
                return "not begun"
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                cwd=paths.REPOSITORY,
                env={**os.environ, "VMBEAM_LAB_STATE": str(state)},
                process_group=0,
            )
            self._processes.add(process)
        timeout = self.minutes * 60 + reliability_run.TIMEOUT
        try:
            return f"the run's process ended with status {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"the run was not done after {timeout:.0f} s"
        finally:
            with self._lock:
                self._processes.discard(process)

    def end(self) -> None:
        """End the runs that go on, with all that they started, and begin no other."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.kill()


def command(worker: Worker, number: int, minutes: float, record: pathlib.Path) -> list[str]:
    """Return the argv of one run."""
    return isolated(
        [
            *(sys.executable, "-m", "vmbeam_lab.reliability_run", "--topology", str(worker.topology)),
            *("--name", f"run {number} on {worker.machine.name} of worker {worker.number}"),
            *("--minutes", str(minutes), "--record", str(record)),
        ]
    )


def do(runs: Runs, workers: list[Worker]) -> None:
    """Do all runs; an interruption ends those that go on."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(workers)) as pool:
        working = [pool.submit(runs.work, worker) for worker in workers]
        try:
            for future in concurrent.futures.as_completed(working):
                future.result()
        except BaseException:
            runs.end()
            raise


def parse_records(text: str) -> list[dict[str, typing.Any]]:
    """Return the records in a file; a last line that was cut is left out."""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def succeeded(records: list[dict[str, typing.Any]]) -> int:
    """Return how many runs succeeded without a retry."""
    return sum(record["outcome"] == "done" for record in records)


def reliable(records: list[dict[str, typing.Any]]) -> bool:
    """Return whether at least WANTED_PERCENT of the runs succeeded."""
    return bool(records) and 100 * succeeded(records) >= WANTED_PERCENT * len(records)


def summary(records: list[dict[str, typing.Any]]) -> str:
    """Return the count, the longest gap of all guests and the reason of each failure."""
    lines = [f"{succeeded(records)} of {len(records)} runs succeeded without a retry"]
    gaps = [record["longest_gap_seconds"] for record in records if record["outcome"] == "done"]
    if gaps:
        lines.append(f"longest gap between two ticks of a guest: {max(gaps):.1f} s")
    failures = [record for record in records if record["outcome"] != "done"]
    lines += [f"run {record['run']}: {record['reason']}" for record in by_number(failures)]
    return "\n".join(lines)


def by_number(records: list[dict[str, typing.Any]]) -> list[dict[str, typing.Any]]:
    """Return the records in the order of their runs; runs side by side end in another one."""
    return sorted(records, key=lambda record: record["run"])


def report(records: list[dict[str, typing.Any]], machine: Machine, parallel: int, minutes: float) -> str:
    """Return RELIABILITY.md."""
    guest = reliability_run.ticking_guest(machine)
    arguments = f"--machine {machine.name} --parallel {parallel} --minutes {minutes:g}"
    rows = []
    for record in by_number(records):
        gap = record.get("longest_gap_seconds")
        cells = (
            record["run"],
            f"{record.get('machine', machine.name)}, {record.get('worker', 1)}",
            record["outcome"],
            f"{record['seconds']:.0f}",
            "-" if gap is None else f"{gap:.1f}",
            record.get("memory_errors", "-"),
            (record["reason"] or "").replace("|", "\\|"),
        )
        rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(
        [
            "# How often the lab boots",
            "",
            f"Written by `make lab-reliability N={len(records)} ARGS='{arguments}'`; a change is lost.",
            "",
            f"A run is a cold boot of machine {machine.name} ({machine.memory_mb} MiB, {machine.cpus} emulated CPUs),",
            f"of two host VMs of {machine.host_vm_memory_mb} MiB, and of a guest of {guest.memory_mb} MiB in one.",
            "The guest has to tick, to find its memory as it wrote it and to stay the same instance for",
            f"{minutes:g} minutes and until the second host VM is up. A boot that was tried again is a failure.",
            f"Runs at a time: {parallel}.",
            "",
            *(f"- {line}" for line in summary(records).splitlines()),
            "",
            "| Run | Machine, worker | Outcome | Seconds | Longest tick gap (s) | Memory errors | Reason |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Do the runs; return the exit status."""
    parser = argparse.ArgumentParser(prog="reliability", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how many boots in all (default: 20)")
    parser.add_argument("--minutes", type=float, default=5, help="how long the guest is watched (default: 5)")
    parser.add_argument("--parallel", type=int, default=1, help="how many runs at a time (default: 1)")
    parser.add_argument("--topology", type=pathlib.Path, default=paths.LAB / "topology.yml")
    parser.add_argument("--machine", help="machine of the topology that is booted (default: the first default one)")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="go on after the recorded runs")
    options = parser.parse_args(argv)
    if options.runs < 1 or options.parallel < 1:
        parser.error("--runs and --parallel take a number of 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        machine = topology.load(options.topology).select([options.machine] if options.machine else None)[0]
        reliability_run.ticking_guest(machine)
        check_memory(machine, options.parallel, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20)
        # What has to be built is no part of a boot.
        if cli.main(["--topology", str(options.topology), "--machine", machine.name, "build"]):
            return 1
        workers = [make_worker(number + 1, options.topology, machine.name) for number in range(options.parallel)]
    except LabError as exc:
        print(f"reliability: {exc}", file=sys.stderr)
        return 1
    records = parse_records(RECORDS.read_text()) if options.go_on and RECORDS.exists() else []
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        do(Runs(options.runs, options.minutes, records), workers)
        REPORT.write_text(report(records, machine, options.parallel, options.minutes))
    finally:
        print(summary(records))
    return 0 if reliable(records) else 1


if __name__ == "__main__":
    sys.exit(main())
