"""RESULTS.md: what was measured, as Markdown."""

from __future__ import annotations

import typing

from vmbeam_lab import phases

from .results import (
    BASELINE,
    CHANNEL,
    MEMCPY,
    MEMCPY_IN_BOTH,
    METHODS,
    PIPES,
    SETTLING,
    ZERO_COPY,
    Records,
    of,
    summary,
)

_NOTES = f"""\
The lab emulates every CPU, so its times mean nothing but their ratios. Values are medians; in brackets the least and
the greatest, and n, how many were measured: not every method as often, because copying takes minutes here. "> 600"
means that a migration was broken off after that time, so that a ratio is known to be at least, or at most, what it
says.

- Each guest is a PVH one with one vCPU, no disk, and a program that rewrites 8 MiB at 100 pages a second, unless it
  says otherwise; it is the only one on the machine. In figures 10, 11 and 16 it rewrites a quarter of its memory at the
  rate that is told (16: not at all).
- `{BASELINE}` is stock live migration as `xl migrate` does it, `{ZERO_COPY}` is ours; the others are more ways to
  copy: live or of a guest that is suspended, through ssh, a plain TCP connection, or the channel in shared memory.
- Downtime is what the source's guest dom0 saw, the tick gap what the guest saw.
- Bytes are those that one host VM sent to the other on any virtual interface, measured in host dom0.
- CPU time is what the host hypervisor accounts to the domain. It includes the work of Ansible's module in the guest
  dom0 and of the meters, with each method. A host VM's includes its guest hypervisor, guest dom0 and guest. Time that
  the host hypervisor spends for a domain is part of that domain's: Xen doesn't account for it apart, nor does it tell
  the time of its idle CPUs. So there is the CPU time of the emulator's process too: all of both hypervisors and all
  domains.
- Calls and entries were counted by the host hypervisor; with stock migration nothing counts them. Guest pages copied
  are those that the host hypervisor counted when the memory was passed on for good, and those that the toolstack
  counted as it sent them, because they cannot be passed on; they are not known if one of the two has not told. The
  bytes that stock migration copies are told by those that it sent, each of which is copied several times on its way.
- Figure 6, `{CHANNEL}`: from memory of one guest dom0's daemon to memory of the other's, with all that a stream takes:
  one copy into the shared memory, one out of it, a checksum on both sides, flow control. The paper's figure is that of
  a program in the guest dom0s which transfers data by the memory that they share. `{PIPES}` is from the
  standard input of a command in one guest dom0 to a command in the other, as migrations go: with what pipes cost, two
  more copies and another process on the one CPU of each side. Both sides of the channel copy at once:
  `{MEMCPY_IN_BOTH}` is what a plain copy has then; `{MEMCPY}` has the computer to itself.
- The memory in use is the machine's without what is free. It does not compare the methods: both host VMs have all of
  theirs allocated all along, and it is looked at every three seconds only, once or twice in a migration by zero-copy.
  It tells that a migration takes little beyond that for long; not what it takes for a moment.
"""


def _number(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


_NONE = "not measured"


def settling_text(records: Records) -> str:
    """Return which migrations are left out of the figures, and what they would have told; "" if none are."""
    entries = [entry for kind in ("by_size", "by_rate", "web") for entry in records[kind]]
    if not of(entries, method=SETTLING):
        return ""
    seconds, downtime = (
        [_cell(summary(of(entries, method=method), metric)) for method in (SETTLING, ZERO_COPY)]
        for metric in ("seconds", "downtime_seconds")
    )
    return f"""\
- The first two migrations by zero-copy after one by another method are not in the figures. All of it takes longer
  then, what touches no memory of the guest too: the emulator translates code as it is run, and did other code before.
  Of all guests and rates together: time {seconds[0]} s, that of the others {seconds[1]} s; downtime {downtime[0]} s,
  that of the others {downtime[1]} s. `results.json` has each as `{SETTLING}`.
"""


def _cell(found: dict[str, typing.Any] | None) -> str:
    """Return a summary as text."""
    if not found:
        return _NONE
    about = [f"n={found['n']}"]
    about += [f"{found['over_time']} over time"] * bool(found["over_time"])
    about += [f"{found['failed']} failed"] * bool(found["failed"])
    if found["median"] is None:
        return f"- ({', '.join(about)})" if found["over_time"] + found["failed"] else _NONE
    median, least, most = (_number(found[key]) for key in ("median", "min", "max"))
    if least != most:
        about.insert(0, f"{least}-{most}")
    return f"{'> ' if found['lower_bound'] else ''}{median} ({', '.join(about)})"


def _relation(relation: str) -> str:
    return {"=": "", ">=": "at least ", "<=": "at most "}[relation]


def _times(found: dict[str, typing.Any] | None) -> str:
    return f"{_relation(found['relation'])}{_number(found['value'])}x" if found else "-"


def table(head: typing.Sequence[str], rows: typing.Iterable[typing.Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def verdicts_text(verdicts: list[dict[str, typing.Any]]) -> str:
    """Return the figures to meet as a table."""

    def bound(verdict: dict[str, typing.Any], key: str) -> str:
        if verdict[key] is None:
            return "-"
        return f"at {'least' if verdict['at_least'] else 'most'} {verdict[key]:g}{verdict['unit']}"

    def value(verdict: dict[str, typing.Any]) -> str:
        if verdict["value"] is None:
            return _NONE
        return f"{_relation(verdict['relation'])}{_number(verdict['value'])}{verdict['unit']}"

    def answer(verdict: dict[str, typing.Any]) -> str:
        if verdict["value"] is None:
            return _NONE
        word = {True: "**met**", False: "**not met**", None: "cannot be told"}[verdict["met"]]
        return word + (", aim too" if verdict["aim_met"] else "")

    rows = [
        [
            verdict["figure"],
            value(verdict),
            bound(verdict, "bound"),
            bound(verdict, "aim"),
            answer(verdict),
            verdict["note"],
        ]
        for verdict in verdicts
    ]
    return table(["Figure", "Measured", "Bound", "Aim", "Verdict", "From"], rows)


def results_text(found: dict[str, dict[str, dict[str, typing.Any]]]) -> str:
    """Return the times by size and method as a table."""
    head = ["Guest", "Method", "Time (s)", f"to {BASELINE}", "Downtime (s)", f"to {BASELINE}", "Longest tick gap (s)"]
    rows = []
    for size, methods in found.items():
        for method, result in methods.items():
            to_baseline = result["ratio_to_" + BASELINE]
            rows.append(
                [
                    f"{size} MiB",
                    method,
                    _cell(result["seconds"]),
                    _times(to_baseline["seconds"]),
                    _cell(result["downtime_seconds"]),
                    _times(to_baseline["downtime_seconds"]),
                    _cell(result["longest_gap_seconds"]),
                ]
            )
    return table(head, rows) if rows else "Not measured."


def _told(found: dict[str, typing.Any] | None, metric: str) -> bool:
    # That a migration failed is told where times are.
    return found is not None and (found["n"] > 0 or metric.endswith("seconds"))


def _part_text(part: dict[str, typing.Any], by: str) -> str:
    # Nobody knows how many pages stock migration copies, for example: no column for what is never known.
    told = [row["methods"] for row in part["rows"]]
    methods = [method for method in METHODS if any(_told(row.get(method), part["metric"]) for row in told)]
    title = f"{part['title'][0].upper()}{part['title'][1:]} ({part['unit']}):"
    if not methods:
        return f"{title}\n\nNot measured."
    ratios = any(row["ratio"] for row in part["rows"])
    about = {"size_mib": "Guest (MiB)", "rate": "Pages/s wanted (achieved)", "guest": "Guest"}[by]
    rows = []
    for row in part["rows"]:
        first = f"{row['rate']} ({row['achieved_rate']})" if by == "rate" else str(row[by])
        cells = [_cell(row["methods"].get(method)) for method in methods]
        rows.append([first, *cells, *([_times(row["ratio"])] if ratios else [])])
    return f"{title}\n\n{table([about, *methods, *([f'{BASELINE} / {ZERO_COPY}'] if ratios else [])], rows)}"


def _throughput_text(figure: dict[str, typing.Any]) -> str:
    rows = [[way, _cell(found)] for way, found in figure["ways"].items()]
    rows += [[name, _times(found)] for name, found in figure["ratios"].items()]
    return table(["Way", figure["unit"]], rows)


def figures_text(figures: dict[str, dict[str, typing.Any]]) -> str:
    """Return the figures, a section and a table each."""
    sections = []
    for key, figure in figures.items():
        if key == "fig6":
            texts = [_throughput_text(figure)] if figure["ways"] else []
        else:
            texts = [_part_text(part, figure["by"]) for part in figure["parts"] if part["rows"]]
        name = f"Figure {key.removeprefix('fig')}: {figure['title']}" if key.startswith("fig") else figure["title"]
        sections.append("\n\n".join([f"### {name}", *(texts or ["Not measured."])]))
    return "\n\n".join(sections)


def _state_text(found: dict[str, typing.Any]) -> str:
    lines = []
    if not found["complete"]:
        lines.append("**Partial: the run is under way or was broken off; not all that was planned has been measured.**")
        lines.append("")
    lines += [f"- Problem: {' '.join(problem.split())}" for problem in found["problems"]]
    lines.append("")
    lines.append(f"Planned: {'; '.join(_planned(cell) for cell in found['planned'])}.")
    return "\n".join(lines).strip()


def _planned(cell: dict[str, typing.Any]) -> str:
    def count(method: str, wanted: int) -> str:
        least = cell["least"][method]
        return f"{method} {wanted}" if least == wanted else f"{method} {least} to {wanted}"

    return f"{cell['cell']}: {', '.join(count(*item) for item in cell['wanted'].items())}"


def page(found: dict[str, typing.Any], plots: typing.Sequence[str] = ()) -> str:
    """Return RESULTS.md for a document of results.document(); `plots` are the files of the plots."""
    pictures = "\n".join(f"![{name.rsplit('/', 1)[-1].split('.')[0]}]({name})" for name in plots)
    return f"""# Migration, measured in the lab

Written by `{found["command"]}`; a change is lost. The values are in `results.json`, from which `make bench-report`
makes this page and the plots anew.

{_state_text(found)}

## Figures to meet

{verdicts_text(found["figures_to_meet"])}

## How to read this

{_NOTES}{settling_text(found["records"])}
## Times by size

{results_text(found["results"])}

## The paper's figures

{figures_text(found["figures"])}

{pictures}

## Phases of the run

```
{phases.table(found["phases"])}
```
"""
