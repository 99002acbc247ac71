"""FLEET.md and fleet.json: what the fleet benchmark found."""

from __future__ import annotations

import itertools
import json
import pathlib
import statistics
import typing

from benchmarks.page import table

from . import runs

Record = dict[str, typing.Any]

_NOTES = """\
## What is real here and what is not

**Real**, the controller: ansible-core, `playbooks/rejuvenate.yml` and its roles and filters, as an operator runs them;
an inventory in which each machine has a host dom0 and two guest dom0s; planning, templating, the loop of the strategy,
forks, and each module packed and handed over with its arguments.

**Simulated**, everything behind ssh: there is no machine, no Xen, no guest. A connection plugin takes what Ansible
would send by ssh and answers at once for the machine, whose host VMs, guests, disks, sessions and files are a file
(`benchmarks/fleet/simulation.py`). So

- no time passes on targets: the seconds are the controller's alone and not those of a rejuvenation, which takes minutes
  per host on real machines, and while which the controller mostly waits;
- the ssh client (a process for each call, its encryption, its connections) is not in the figures; the calls are
  counted, so that it can be added;
- nothing is shown about Xen, migration, downtime or capacity: the lab's tests and `benchmarks/RESULTS.md` are for that.

The **plain loop** (`benchmarks/fleet/loop.yml`) is our own small equivalent of how role cluster_upgrade of oVirt's
collection goes about: one play on localhost includes a file for each host in turn. It makes the same changes to a
machine by the same modules (the start of a host VM by the same role), but looks at the machine less often: no check
that each guest can be moved, no gates, no record, no report, no way back. Like its model it asks once at the beginning
which hosts are up (here: have one host VM) and due; the first failure ends the loop, and a rescue notes it and lets the
play end as a success.
"""


def growth(records: list[Record]) -> list[Record]:
    """Return, by method and forks, how the cost per host grows with the fleet; only of series with several sizes.

    `per_host` is CPU seconds per host at the largest fleet over those at the smallest; `further` the CPU seconds that
    each further host costs between neighbouring sizes, which a linear cost keeps the same; `further_mb` likewise the
    memory. `cpu` and `memory` are straight lines through all sizes, see _line.
    """
    found = []
    for (method, forks), entries in _series(records).items():
        if len(entries) < 2:
            continue
        small, large = entries[0], entries[-1]
        pairs = list(itertools.pairwise(entries))
        found.append(
            {
                "method": method,
                "forks": forks,
                "sizes": [entry["hosts"] for entry in entries],
                "per_host": round(large["cpu_seconds"] / large["hosts"] / (small["cpu_seconds"] / small["hosts"]), 2),
                "further": [_further(one, other, "cpu_seconds") for one, other in pairs],
                "further_mb": [_further(one, other, "peak_mb") for one, other in pairs],
                "cpu": _line(entries, "cpu_seconds"),
                "memory": _line(entries, "peak_mb"),
            }
        )
    return found


def _line(entries: list[Record], what: str) -> Record:
    """Return the straight line of least squares through a cost by hosts.

    `slope` is per host, `intercept` is paid once, `residual` the largest distance of a value from the line as a part of
    the value: zero with two sizes.
    """
    hosts, values = [entry["hosts"] for entry in entries], [entry[what] for entry in entries]
    slope, intercept = statistics.linear_regression(hosts, values)
    residuals = [abs(intercept + slope * x - y) / y for x, y in zip(hosts, values, strict=True)]
    return {"slope": round(slope, 3), "intercept": round(intercept, 2), "residual": round(max(residuals), 3)}


def _series(records: list[Record]) -> dict[tuple[str, int], list[Record]]:
    series: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["hosts"]):
        if "problem" not in record:
            series.setdefault((record["method"], record["forks"]), []).append(record)
    return series


def _further(one: Record, other: Record, what: str) -> float:
    return typing.cast(float, round((other[what] - one[what]) / (other["hosts"] - one["hosts"]), 3))


def page(found: Record) -> str:
    """Return FLEET.md."""
    parts = [
        "# The controller and a fleet, with simulated machines",
        f"Written by `{found['command']}`; a change is lost. The values are in `fleet.json`.",
        f"ansible-core {found['ansible']}, Python {found['python']}, {found['cpus']} CPUs, which other work used "
        "too: CPU time is the figure to look at, wall time only an upper bound.",
        "" if found["complete"] else "**The run is not complete**: it is under way, or was broken off.",
        _NOTES,
        "## Cost",
        "CPU seconds are those of ansible-playbook and all its processes, with the settings of ansible.cfg here, which "
        "role rolling recommends to all. Other work on the computer raises them: caches are shared, and the controller "
        "looks for results as long as it waits. The peak is the resident memory of its main process; its forks share "
        "most of it. A call is a module that a dom0 was asked to run.",
        table(
            [
                "Method",
                "Hosts x guests",
                "Forks",
                "Seconds",
                "CPU s",
                "CPU s per host",
                "Peak MiB",
                "Calls per host",
                "Done",
            ],
            [
                [
                    record["method"],
                    f"{record['hosts']} x {record['guests']}",
                    str(record["forks"]),
                    f"{record['seconds']:.1f}",
                    f"{record['cpu_seconds']:.1f}",
                    f"{record['cpu_seconds'] / record['hosts']:.2f}",
                    f"{record['peak_mb']:.0f}",
                    f"{record['calls_per_host']:.0f}",
                    "**no**" if "problem" in record else "all",
                ]
                for record in found["costs"]
            ],
        ),
    ]
    if found["not_run"]:
        parts += ["Not run:", "\n".join(f"- {text}" for text in found["not_run"])]
    if found["growth"]:
        parts += [
            "## Growth",
            "The first ratio is CPU seconds per host at the largest fleet to those at the smallest; the start of "
            "Ansible and the packing of modules, which are paid once, make it fall. So the next column tells what each "
            "further host cost from one size to the next: linear is what stays the same.",
            table(
                [
                    "Method",
                    "Forks",
                    "Hosts",
                    "Per host, largest / smallest",
                    "CPU s per further host",
                    "MiB per further host",
                ],
                [
                    [
                        entry["method"],
                        str(entry["forks"]),
                        ", ".join(map(str, entry["sizes"])),
                        f"{entry['per_host']:.2f}x",
                        ", ".join(f"{value:.2f}" for value in entry["further"]),
                        ", ".join(f"{value:.2f}" for value in entry["further_mb"]),
                    ]
                    for entry in found["growth"]
                ],
            ),
            "A straight line through all sizes: what is paid once, what each host costs, and how far from the line a "
            "value is at most. Fleets of two sizes lie on a line whatever they cost.",
            _lines_table(found["growth"]),
        ]
    for kind, title in (("fails", "A migration fails"), ("kills", "The controller is killed (SIGKILL)")):
        events = [record for record in found["events"] if record["kind"] == kind]
        if events:
            parts += [f"## {title}", _event_text(events)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _lines_table(growth_records: list[Record]) -> str:
    loops = [entry["cpu"]["slope"] for entry in growth_records if entry["method"] == runs.PLAIN_LOOP.title]
    return table(
        [
            "Method",
            "Forks",
            "CPU s = once + per host",
            "Off the line at most",
            "Per host, times the plain loop's",
            "MiB = once + per host",
            "Off the line at most",
        ],
        [
            [
                entry["method"],
                str(entry["forks"]),
                f"{entry['cpu']['intercept']:.1f} + {entry['cpu']['slope']:.2f} n",
                f"{entry['cpu']['residual']:.1%}",
                f"{entry['cpu']['slope'] / loops[0]:.1f}" if loops else "-",
                f"{entry['memory']['intercept']:.0f} + {entry['memory']['slope']:.2f} n",
                f"{entry['memory']['residual']:.1%}",
            ]
            for entry in growth_records
        ],
    )


def _event_text(events: list[Record]) -> str:
    one = events[0]
    head = (
        f"{one['hosts']} hosts with {one['guests']} guests, {one['forks']} forks; at guest {runs.EVENT_GUEST} of host "
        f"{runs.EVENT_HOST}. Then, the cause removed, the same command again. Hosts of the same batch are at work side "
        "by side, so they count as begun."
    )
    return f"{head}\n\n" + table(
        [
            "Method",
            "Exit code",
            "Done",
            "Hosts begun after it",
            f"Left on host {runs.EVENT_HOST}: host VMs (guests)",
            "Again: exit code",
            "Done",
            "Done twice",
        ],
        [
            [
                record["method"],
                str(record["code"]),
                str(record["done"]),
                str(record["begun_after"]),
                ", ".join(f"{name} ({count})" for name, count in record["left"].items()),
                str(record["code_again"]),
                f"{record['done_again']} of {record['hosts']}",
                str(record["done_twice"]),
            ]
            for record in events
        ],
    )


def write(found: Record, folder: pathlib.Path) -> None:
    """Write both files."""
    (folder / "fleet.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "FLEET.md").write_text(page(found))
