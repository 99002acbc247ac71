"""Measures what migration between the two host VMs of the lab's machine costs, Xen's own and ours (`make bench`).

In one run on one boot of a machine (topology.yml): a guest that rewrites its memory at each rate goes to and fro by
each method in turn, then one that serves, then one of each size, then others. Copying takes minutes
here: so each cell of the figures has each copying method once, and more often as long as the budget allows; a
migration that takes longer than the limit is broken off and counts as longer than that. Writes `results.json`,
`RESULTS.md` and plots beside this file after each cell, so that a run that is broken off leaves what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
import time
import typing

from vmbeam_lab import ansible, cli, paths, phases, topology
from vmbeam_lab.errors import LabError
from vmbeam_lab.phases import phase, say

from . import results, schedule, verdicts
from .lab import HERE, Benchmark, Guest, plain
from .schedule import Budget, Cell

LOG = paths.STATE / "bench.log"
TOPOLOGY = HERE / "topology.yml"
HOST_VM_TIMEOUT = 1800
#: Of the guests that rewrite their memory at different rates: a quarter of it.
WRITER_SHARE = 4
#: Pages per second that the guests' program takes, and the MiB that a guest boots with.
MAX_RATE, LEAST_SIZE = 1_000_000, 96
#: Measurements of throughput by each way.
THROUGHPUTS = 5
#: After so many cells in a row without a guest the lab is broken.
MAX_BROKEN = 2


def bring_up() -> None:
    """Boot the machine, from a saved boot if there is one, and start the host VM of slot b."""
    if cli.main(["--topology", str(TOPOLOGY), "up"]):
        raise LabError("the lab does not come up")
    with phase("host VM of slot b"):
        ansible.playbook(
            paths.REPOSITORY / "playbooks" / "host_vm.yml", "-e", "host_vm_slot=b", timeout=HOST_VM_TIMEOUT, log=LOG
        )


@dataclasses.dataclass
class Run:
    """What a run is to measure, and what it has measured."""

    command: str
    cells: list[Cell]
    records: results.Records = dataclasses.field(default_factory=lambda: {kind: [] for kind in results.KINDS})
    problems: list[str] = dataclasses.field(default_factory=list)
    throughput: bool = True  #: whether to measure that too
    complete: bool = False  #: whether it came to its end, with or without problems
    #: What an earlier run has found, as results.json tells it; {} if this one begins anew.
    earlier: dict[str, typing.Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.earlier:
            self.records = {kind: list(self.earlier["records"][kind]) for kind in results.KINDS}

    def begin(self, cell: Cell) -> None:
        """Forget what an earlier run has found of a cell."""
        self.records[cell.kind] = [entry for entry in self.records[cell.kind] if not cell.holds(entry)]

    def trouble(self, what: str) -> None:
        """Note, and say, that something failed."""
        self.problems.append(plain(what))
        say(f"PROBLEM: {what}")

    def write(self) -> str:
        """Write the files; return RESULTS.md's text."""
        labels = {cell.label for cell in self.cells}
        kept = [cell for cell in self.earlier.get("planned", []) if cell["cell"] not in labels]
        found = results.document(
            self.records,
            command="; then ".join([*filter(None, [self.earlier.get("command")]), self.command]),
            complete=self.complete and self.earlier.get("complete", True),
            problems=[*self.earlier.get("problems", []), *self.problems],
            planned=[*kept, *(cell.planned() for cell in self.cells)],
            phases=[*self.earlier.get("phases", []), *phases.rows()],
        )
        return results.write(found, HERE)


def guest_of(cell: Cell) -> Guest:
    """Return the guest of a cell."""
    writer = None if cell.rate is None else cell.size_mib // WRITER_SHARE
    return Guest(cell.size_mib, writer, cell.vcpus, cell.type)


def measure_cell(benchmark: Benchmark, cell: Cell, budget: Budget, run: Run) -> None:
    """Measure one cell; raises LabError if its guest does not start, or is lost."""
    about: dict[str, object] = {"size_mib": cell.size_mib}
    if cell.together:
        run.records[cell.kind].append({**about, "guest": cell.label, **benchmark.together(cell.size_mib)})
        return
    benchmark.require(guest_of(cell))
    if cell.rate is not None:
        about |= {"rate": cell.rate, "achieved_rate": benchmark.set_rate(cell.rate)}
    if cell.kind == "others":
        about |= {"guest": cell.label}
    given_up: set[str] = set()

    def migrate(method: str, told_as: str) -> str | None:
        """Migrate the guest and record that; return why it failed, None if it has not."""
        record = {**about, **benchmark.migrate(method, web=cell.kind == "web"), "method": told_as}
        if "failed" in record:
            record["method"] = method
        run.records[cell.kind].append(record)
        say(json.dumps(record))
        return typing.cast(str | None, record.get("failed"))

    before = results.ZERO_COPY
    for method in schedule.turns(cell, budget, given_up):
        began = time.monotonic()
        failed = None
        # There and back, so that turns() has each method go both ways.
        settling = [results.SETTLING] * 2 if method == results.ZERO_COPY != before else []
        for told_as in (*settling, method):
            failed = failed or migrate(method, told_as)
        before = method
        budget.done(method, None if failed else time.monotonic() - began)
        if failed:
            given_up.add(method)
            run.trouble(f"{cell.label}, {method}: {failed}")
            benchmark.require(guest_of(cell))
            if cell.rate is not None:
                benchmark.set_rate(cell.rate)
        say(f"{cell.label}: at least {budget.least_left() / 60:.0f} min left, {budget.elapsed() / 60:.0f} min used")
    benchmark.check_memory()


def measure_throughput(run: Run, benchmark: Benchmark) -> None:
    """Measure what is not a migration, in place of what an earlier run has found of it."""
    run.records["throughput"].clear()
    with phase("throughput"):
        try:
            for _ in range(THROUGHPUTS):
                for record in benchmark.throughput():
                    run.records["throughput"].append(record)
                    say(json.dumps(record))
        except LabError as exc:
            run.trouble(f"throughput: {exc}")


def measure(run: Run, benchmark: Benchmark, budget: Budget) -> None:
    """Measure all cells; what fails is noted, and the run goes on.

    :raises LabError: the lab is broken
    """
    if run.throughput:
        measure_throughput(run, benchmark)
    broken = 0
    for cell in run.cells:
        budget.enter(cell)
        run.begin(cell)
        try:
            with phase(f"migrations: {cell.label}"):
                measure_cell(benchmark, cell, budget, run)
            broken = 0
        except LabError as exc:
            run.trouble(f"{cell.label}: {exc}")
            broken += 1
        run.write()
        if broken == MAX_BROKEN:
            raise LabError(f"{broken} times in a row nothing could be measured to the end")


def numbers(text: str) -> list[int]:
    """Parse numbers given on the command line, e.g. "0,1000" or "none"."""
    found = [] if text == "none" else [int(word) for word in text.split(",")]
    if min(found, default=0) < 0 or len(set(found)) < len(found):
        raise ValueError(text)
    return found


def sizes_mib(text: str) -> list[int]:
    """Parse the sizes given on the command line, e.g. "128,512"."""
    sizes = numbers(text)
    if not all(sizes):
        raise ValueError(text)
    return sizes


def methods(text: str) -> list[str]:
    """Parse the methods given on the command line, e.g. "precopy-ssh,zero-copy"."""
    found = text.split(",")
    if len(set(found)) < len(found) or not set(found) <= set(results.METHODS):
        raise ValueError(text)
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)

    def add(name: str, default: object, text: str, kind: typing.Callable[[str], object] = int) -> None:
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: {shown})")

    add("--sizes", [128, 256, 512, 1024, 2048], "MiB of the guests, in the order to measure, or none", sizes_mib)
    add("--copy-sizes", [1024], "of these, where the other ways to copy are measured too, or none", numbers)
    add("--rates", [0, 1000, 3000, 10000], "pages rewritten per second by a guest of --rate-size, or none", numbers)
    add("--rate-size", 256, "its MiB")
    default = [results.BASELINE, "suspend-tcp", "suspend-channel", results.ZERO_COPY]
    add("--methods", default, f"of {', '.join(results.METHODS)}", methods)
    add("--rounds", 5, "migrations by zero-copy in each cell")
    add("--stock-rounds", 5, "by each copying method in each cell, if the budget allows; 1 at least")
    add("--budget", 120, "minutes: beyond them each copying method has one migration in each cell, and no more")
    parser.add_argument(
        "--all",
        action="store_true",
        help="measure as often as is wanted, whatever the budget: about four hours by default, see --dry-run",
    )
    add("--limit", 1800, "seconds that a migration may take")
    add("--vcpus", [4], "CPUs of a PVH and an HVM guest that move by zero-copy too, or none", numbers)
    parser.add_argument(
        "--add",
        action="store_true",
        help="add to what results.json has: what is measured again replaces what was measured of the same guest before",
    )
    parser.add_argument("--no-throughput", action="store_true", help="without the channel, the network and memcpy")
    parser.add_argument("--no-web", action="store_true", help="without the web service (figure 16)")
    parser.add_argument("--no-together", action="store_true", help="without two guests that move at once")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a figure to meet is missed")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and in what time")
    options = parser.parse_args(argv)
    if min(options.rounds, options.stock_rounds, options.limit) < 1 or options.budget < 0:
        parser.error("--rounds, --stock-rounds, --limit: at least 1; --budget: at least 0")
    if max(options.rates, default=0) > MAX_RATE:
        parser.error(f"--rates: at most {MAX_RATE}")
    if min([options.rate_size, *options.sizes]) < LEAST_SIZE:
        parser.error(f"--sizes, --rate-size: at least {LEAST_SIZE}")
    if 0 in options.vcpus:
        parser.error("--vcpus: at least 1")
    return options


def say_plan(cells: list[Cell], budget: int) -> None:
    """Say what a run measures, and about how long that takes."""
    for cell in cells:
        alone = Budget(0, [cell]).least_left()
        say(
            f"{cell.label}: {json.dumps(cell.wanted)}, of these at least {json.dumps(cell.least)}, {alone / 60:.0f} min"
        )
    least, everything = (Budget(0, some).least_left() / 60 for some in (cells, schedule.whole(cells)))
    if least == everything:
        say(f"about {everything:.0f} min, after the lab is up, whatever the budget")
        return
    say(f"about {least:.0f} min at least, after the lab is up; more as long as it fits into {budget} min")
    say(f"about {everything:.0f} min for all that is wanted (--all)")


def tell_missed(records: results.Records) -> list[str]:
    """Print which figures to meet were missed, and return them."""
    judged = verdicts.judge(records)
    missed = [verdict["figure"] for verdict in judged if verdict["met"] is False]
    unknown = sum(verdict["met"] is None for verdict in judged)
    print(f"Of {len(judged)} figures to meet {unknown} cannot be told; missed: {'; '.join(missed) or 'none'}")
    return missed


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: that a figure is missed is a result, unless --strict."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    wishes = schedule.Wishes(
        sizes_mib=options.sizes,
        copy_sizes_mib=options.copy_sizes,
        rates=options.rates,
        rate_size_mib=options.rate_size,
        methods=options.methods,
        rounds=options.rounds,
        stock_rounds=options.stock_rounds,
        vcpus=options.vcpus,
        web=not options.no_web,
        together=not options.no_together,
    )
    command = f"make bench ARGS={shlex.quote(shlex.join(argv))}" if argv else "make bench"
    cells = schedule.cells(wishes, results.BASELINE)
    cells = schedule.whole(cells) if options.all else cells
    say_plan(cells, options.budget)
    if options.dry_run:
        return 0
    try:
        earlier = results.read(HERE) if options.add else {}
    except results.Unusable as exc:
        print(f"--add: {exc}", file=sys.stderr)
        return 1
    run = Run(command, cells, throughput=not options.no_throughput, earlier=earlier)
    LOG.unlink(missing_ok=True)
    phases.reset()
    benchmark = None
    try:
        bring_up()
        benchmark = Benchmark(topology.load(TOPOLOGY), options.limit)
        measure(run, benchmark, Budget(60 * options.budget, run.cells))
        run.complete = True
    except LabError as exc:
        run.trouble(str(exc))
    finally:
        # Half of it is better than nothing after an hour.
        if any(run.records.values()):
            print(run.write())
        if benchmark:
            with contextlib.suppress(LabError):
                benchmark.clear()
    missed = tell_missed(run.records) if any(run.records.values()) else []
    return 1 if run.problems or not run.complete or (options.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
