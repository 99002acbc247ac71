"""Command of the fleet benchmark: `make bench-fleet ARGS=--help`."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shlex
import sys
import typing

import ansible.release

from . import report, runs

#: Of the fleets in which something goes wrong.
EVENT_HOSTS, EVENT_GUESTS, EVENT_FORKS = 5, 2, 5
EVENT_SERIALS: tuple[typing.Any, ...] = (1, [1, 3, "100%"])


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    command = argparse.ArgumentParser(prog="make bench-fleet", description=__doc__)
    command.add_argument("--hosts", type=_numbers, default=[3, 10, 30], help="sizes of fleets, ascending (%(default)s)")
    command.add_argument("--guests", type=int, default=10, help="guests per host (%(default)s)")
    command.add_argument("--forks", type=_numbers, default=[5, 50], help="(%(default)s)")
    command.add_argument(
        "--serials",
        type=json.loads,
        default=[1, [1, 10, "10%"]],
        metavar="JSON",
        help="values of vmbeam_serial (%(default)s)",
    )
    command.add_argument("--no-loop", action="store_true", help="leave out the plain loop")
    command.add_argument("--no-events", action="store_true", help="leave out the failure and the kill")
    command.add_argument(
        "--limit", type=float, default=1200, metavar="SECONDS", help="leave out what would take longer (%(default)s)"
    )
    command.add_argument("--output", type=pathlib.Path, default=runs.ROOT / "benchmarks", help="folder of the results")
    return command


def cases(options: argparse.Namespace) -> list[tuple[runs.Method, int]]:
    """Return methods and forks to measure. One host at a time needs no forks, nor does the loop."""
    found = []
    for serial in options.serials:
        forks = options.forks[:1] if serial == 1 else options.forks
        found += [(runs.by_serial(serial), count) for count in forks]
    if not options.no_loop:
        found.append((runs.PLAIN_LOOP, options.forks[0]))
    return found


def estimate(entries: list[report.Record], hosts: int) -> float:
    """Return the seconds that a fleet will take by what smaller ones of the series took; 0 without one."""
    return entries[-1]["seconds"] / entries[-1]["hosts"] * hosts if entries else 0


def main(argv: list[str] | None = None) -> int:
    """Measure; return 1 if a fleet was not rolled to its end."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    found: report.Record = {
        "command": f"make bench-fleet ARGS={shlex.quote(shlex.join(argv))}" if argv else "make bench-fleet",
        "ansible": ansible.release.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "complete": False,
        "costs": [],
        "growth": [],
        "not_run": [],
        "events": [],
    }
    for method, forks in cases(options):
        entries: list[report.Record] = []
        for hosts in options.hosts:
            seconds = estimate(entries, hosts)
            if seconds > options.limit:
                found["not_run"].append(
                    f"{method.title}, {hosts} hosts, {forks} forks: would take about {seconds / 60:.0f} minutes here"
                )
                continue
            record = runs.measure(method, hosts, options.guests, forks)
            print(json.dumps(record), flush=True)
            if "problem" not in record:
                entries.append(record)
            found["costs"].append(record)
            found["growth"] = report.growth(found["costs"])
            report.write(found, options.output)
    methods = [] if options.no_events else [runs.by_serial(serial) for serial in EVENT_SERIALS] + [runs.PLAIN_LOOP]
    for kind in ("fails", "kills"):
        for method in methods:
            record = runs.event(method, kind, EVENT_HOSTS, EVENT_GUESTS, EVENT_FORKS)
            print(json.dumps(record), flush=True)
            found["events"].append(record)
            report.write(found, options.output)
    found["complete"] = True
    report.write(found, options.output)
    return int(any("problem" in record for record in found["costs"]))


if __name__ == "__main__":
    sys.exit(main())
