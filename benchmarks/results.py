"""From records of migrations to medians, ratios, figures and files.

`python -m benchmarks.results` (make bench-report) makes RESULTS.md, the plots and everything but the records in
results.json anew, from these records alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import typing

#: Name -> options of module guest_migrate. suspend over tcp is save and restore over a plain pipe.
METHODS: dict[str, dict[str, str]] = {
    "precopy-ssh": {"strategy": "precopy", "transport": "ssh"},
    "precopy-tcp": {"strategy": "precopy", "transport": "tcp"},
    "suspend-ssh": {"strategy": "suspend", "transport": "ssh"},
    "suspend-tcp": {"strategy": "suspend", "transport": "tcp"},
    "suspend-channel": {"strategy": "suspend", "transport": "channel"},
    "zero-copy": {"strategy": "zero_copy", "transport": "channel"},
}
BASELINE = "precopy-ssh"
ZERO_COPY = "zero-copy"
#: Method of the records of migrations by zero-copy that come right after one by another method, as page.py explains.
SETTLING = "zero-copy, settling"
COPIES = tuple(method for method in METHODS if method != ZERO_COPY)

#: Ways of throughput. CHANNEL is its own: from memory of one guest dom0 to memory of the other, as memcpy goes. PIPES
#: is between commands, as all that uses the channel is: with their pipes. MEMCPY_IN_BOTH is what memcpy has while the
#: other guest dom0 copies, too, as both do who use the channel.
CHANNEL, PIPES, NETWORK, MEMCPY, MEMCPY_IN_BOTH = WAYS = (
    "channel",
    "channel through pipes",
    "network",
    "memcpy",
    "memcpy beside memcpy in the other",
)

#: Kinds of records. Each record has `method`, and either what was measured or `failed`, the reason; then also
#: `more_than_seconds` if it was broken off at the time limit. Those of throughput have `way` and `mib_per_s`.
KINDS = ("by_size", "by_rate", "web", "others", "throughput")

Records = dict[str, list[dict[str, typing.Any]]]


class Part(typing.NamedTuple):
    """One diagram of a figure."""

    metric: str
    title: str
    unit: str


class Figure(typing.NamedTuple):
    """One figure of the paper, as measured here. kind: of the records; by: what a row is about."""

    title: str
    kind: str
    by: str
    parts: tuple[Part, ...]


#: Key in results.json -> figure; the numbers are the paper's.
FIGURES = {
    "fig7": Figure("Migration time", "by_size", "size_mib", (Part("seconds", "migration time", "s"),)),
    "fig9": Figure("Downtime", "by_size", "size_mib", (Part("downtime_seconds", "downtime", "s"),)),
    "fig10": Figure("Migration time by dirty rate", "by_rate", "rate", (Part("seconds", "migration time", "s"),)),
    "fig11": Figure("Downtime by dirty rate", "by_rate", "rate", (Part("downtime_seconds", "downtime", "s"),)),
    "fig12": Figure(
        "Network traffic of a migration",
        "by_size",
        "size_mib",
        (Part("network_bytes", "between the host VMs", "bytes"),),
    ),
    "fig13": Figure(
        "CPU utilization, mean of a migration",
        "by_size",
        "size_mib",
        (
            Part("cpu_share_host_dom0", "host dom0", "% of a CPU"),
            Part("cpu_share_source", "source host VM", "% of a CPU"),
            Part("cpu_share_destination", "destination host VM", "% of a CPU"),
        ),
    ),
    "fig14": Figure(
        "CPU time of a migration",
        "by_size",
        "size_mib",
        (
            Part("cpu_host_dom0", "host dom0", "s"),
            Part("cpu_source", "source host VM", "s"),
            Part("cpu_destination", "destination host VM", "s"),
            Part("cpu_machine", "the whole emulated machine", "s of the computer"),
        ),
    ),
    "fig15": Figure(
        "Memory load of a migration",
        "by_size",
        "size_mib",
        (
            Part("pages_copied_in_all", "guest pages copied, by the host hypervisor and by the toolstack", "pages"),
            Part("bytes_copied", "guest memory copied (stock: sent, each byte is copied several times)", "bytes"),
            Part("hypercalls", "calls of the host hypervisor", "calls"),
            Part("p2m_writes_4k", "p2m writes of 4 KiB", "entries"),
            Part("p2m_writes_2m", "p2m writes of 2 MiB", "entries"),
        ),
    ),
    "fig16": Figure(
        "Web throughput of the migrating guest",
        "web",
        "size_mib",
        (
            Part("before", "before", "answers/s"),
            Part("during", "during", "answers/s"),
            Part("after", "after", "answers/s"),
            Part("loss_percent", "loss during, by before", "%"),
        ),
    ),
    "memory": Figure(
        "Memory of the machine",
        "by_size",
        "size_mib",
        (Part("peak_memory_mib", "in use at most, host hypervisor and all host VMs", "MiB"),),
    ),
    "others": Figure(
        "Guests with several CPUs, several guests (the slower one's time)",
        "others",
        "guest",
        (Part("seconds", "migration time", "s"), Part("downtime_seconds", "downtime", "s")),
    ),
}

#: Of the first table.
METRICS = ("seconds", "downtime_seconds", "longest_gap_seconds", "bytes")


def summary(entries: typing.Iterable[dict[str, typing.Any]], metric: str = "seconds") -> dict[str, typing.Any] | None:
    """Sum up one metric of the records of one method in one cell; None if there is no record.

    `n` values are known; `median`, `min`, `max` are None if none is. `over_time` migrations were broken off at the
    time limit; they count as times, at least as long as the limit, and `lower_bound` says that the median may be
    greater for that reason. `failed` are those that failed otherwise.
    """
    entries = list(entries)
    if not entries:
        return None
    known = sorted(entry[metric] for entry in entries if entry.get(metric) is not None)
    over = [entry["more_than_seconds"] for entry in entries if entry.get("more_than_seconds") is not None]
    bounds = over if metric == "seconds" else []
    values = known + bounds
    return {
        "median": statistics.median(values) if values else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "values": known,
        "n": len(known),
        "over_time": len(over),
        "failed": sum("failed" in entry for entry in entries) - len(over),
        # The greater one of the two in the middle, if there are two: limits are greater than what kept them.
        "lower_bound": bool(bounds) and len(values) // 2 >= len(known),
    }


def ratio(one: dict[str, typing.Any] | None, other: dict[str, typing.Any] | None) -> dict[str, typing.Any] | None:
    """Return the ratio of two medians: `value`, and `relation`, "=", ">=" or "<=", of the true one to it.

    None if it cannot be told.
    """
    if not one or not other or one["median"] is None or not other["median"]:
        return None
    if one["lower_bound"] and other["lower_bound"]:
        return None
    relation = ">=" if one["lower_bound"] else "<=" if other["lower_bound"] else "="
    return {"value": round(one["median"] / other["median"], 3), "relation": relation}


def of(records: typing.Iterable[dict[str, typing.Any]], **wanted: object) -> list[dict[str, typing.Any]]:
    """Return the records that have these values."""
    return [entry for entry in records if all(entry.get(key) == value for key, value in wanted.items())]


def counted(records: Records) -> Records:
    """Return the records, those of zero-copy with what was copied in all: `pages_copied_in_all` and `bytes_copied`.

    Both are None if one of the two who copy, host hypervisor and toolstack, has not told how much.
    """
    return {
        kind: [{**entry, **_copied(entry)} if entry.get("method") == ZERO_COPY else entry for entry in entries]
        for kind, entries in records.items()
    }


def _copied(entry: dict[str, typing.Any]) -> dict[str, int | None]:
    by_hypervisor, by_toolstack = entry.get("pages_copied"), entry.get("pages_sent")
    if by_hypervisor is None or by_toolstack is None:
        return {"pages_copied_in_all": None, "bytes_copied": None}
    pages = by_hypervisor + by_toolstack
    return {"pages_copied_in_all": pages, "bytes_copied": pages << 12}


def _values(records: list[dict[str, typing.Any]], by: str) -> list[typing.Any]:
    return sorted({entry[by] for entry in records})


def summarize(records: list[dict[str, typing.Any]]) -> dict[str, dict[str, dict[str, typing.Any]]]:
    """Return size (MiB, as text) -> method -> METRICS and the ratio of each method's time and downtime to BASELINE's.

    :param records: by_size
    """
    found: dict[str, dict[str, dict[str, typing.Any]]] = {}
    for size in _values(records, "size_mib"):
        cells = {method: of(records, size_mib=size, method=method) for method in METHODS}
        found[str(size)] = methods = {
            method: {metric: summary(entries, metric) for metric in METRICS}
            for method, entries in cells.items()
            if entries
        }
        baseline = methods.get(BASELINE, {})
        for result in methods.values():
            result["ratio_to_" + BASELINE] = {
                metric: ratio(result[metric], baseline.get(metric)) for metric in ("seconds", "downtime_seconds")
            }
    return found


def figures(records: Records) -> dict[str, dict[str, typing.Any]]:
    """Return what was measured by the paper's figures: key -> title, by and parts with title, unit and rows.

    A row has what it is about, the summary of each method, and `ratio`, the baseline's median by zero-copy's. Where
    that cannot be told, it has `ratio_to_precopy-ssh`, zero-copy's median by the baseline's, if zero-copy's is 0, or
    `note`, why not.
    """
    records = counted(records)
    result: dict[str, dict[str, typing.Any]] = {"fig6": throughput(records.get("throughput", []))}
    for key, figure in FIGURES.items():
        of_kind = records.get(figure.kind, [])
        parts = [
            {"metric": part.metric, "title": part.title, "unit": part.unit, "rows": _rows(of_kind, figure.by, part)}
            for part in figure.parts
        ]
        result[key] = {"title": figure.title, "by": figure.by, "parts": parts}
    return result


def _rows(records: list[dict[str, typing.Any]], by: str, part: Part) -> list[dict[str, typing.Any]]:
    rows = []
    for value in _values(records, by):
        of_value = of(records, **{by: value})
        methods = {method: summary(of(of_value, method=method), part.metric) for method in METHODS}
        row: dict[str, typing.Any] = {by: value}
        if by == "rate":
            row["achieved_rate"] = max((entry["achieved_rate"] for entry in of_value), default=0)
        row["methods"] = {method: found for method, found in methods.items() if found}
        row["ratio"] = ratio(methods[BASELINE], methods[ZERO_COPY])
        if not row["ratio"]:
            row |= _instead_of_ratio(of(of_value, method=BASELINE), methods[BASELINE], methods[ZERO_COPY])
        rows.append(row)
    return rows


def _instead_of_ratio(
    records: list[dict[str, typing.Any]], stock: dict[str, typing.Any] | None, ours: dict[str, typing.Any] | None
) -> dict[str, typing.Any]:
    """Return what a row says if its ratio has no value. records: of stock."""
    to_stock = ratio(ours, stock)
    if to_stock:
        return {f"ratio_to_{BASELINE}": to_stock}
    if stock and not stock["n"] and any("failed" not in entry for entry in records):
        return {"note": "not counted for stock"}
    return {}


def throughput(records: list[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    """Return figure 6: the summary of each way, and the channel's ratios to the others."""
    ways = {way: summary(of(records, way=way), "mib_per_s") for way in WAYS}
    return {
        "title": "Throughput between two guest dom0s",
        "unit": "MiB/s",
        "ways": {way: found for way, found in ways.items() if found},
        "ratios": {
            f"{way} / {other}": ratio(ways[way], ways[other])
            for way in (CHANNEL, PIPES)
            for other in (NETWORK, MEMCPY, MEMCPY_IN_BOTH)
            if ways[way] and ways[other]
        },
    }


def document(records: Records, **about: object) -> dict[str, typing.Any]:
    """Return results.json.

    :param about: `command`, `complete`, `problems`, `planned` and `phases` of the run
    """
    from . import verdicts  # which needs this module

    return {
        **about,
        "figures_to_meet": verdicts.judge(records),
        "figures": figures(records),
        "results": summarize(records["by_size"]),
        "records": records,
    }


def write(found: dict[str, typing.Any], directory: pathlib.Path) -> str:
    """Write results.json, RESULTS.md and the plots of a document into a directory; return RESULTS.md's text."""
    from . import page, plots  # matplotlib takes long to load

    _replace(directory / "results.json", json.dumps(found, indent=2) + "\n")
    drawn = plots.draw(found["figures"], directory / "plots")
    text = page.page(found, [str(path.relative_to(directory)) for path in drawn])
    _replace(directory / "RESULTS.md", text)
    return text


def _replace(path: pathlib.Path, text: str) -> None:
    """Write a file so that there is always a whole one, the old or the new."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


class Unusable(Exception):
    """There is no results.json, or it has another form."""


def read(directory: pathlib.Path) -> dict[str, typing.Any]:
    """Return of the results.json in a directory what was measured, and how; raise Unusable."""
    path = directory / "results.json"
    try:
        old = json.loads(path.read_text())
        return {
            **{key: old[key] for key in ("command", "complete", "problems", "planned", "phases")},
            "records": {kind: old["records"][kind] for kind in KINDS},
        }
    except (OSError, ValueError, KeyError) as exc:
        raise Unusable(f"{path} cannot be used: {exc!r}") from exc


def main(argv: list[str] | None = None) -> int:
    """Make everything anew from the records in results.json."""
    parser = argparse.ArgumentParser(prog="results", description=__doc__)
    parser.add_argument("directory", type=pathlib.Path, nargs="?", default=pathlib.Path(__file__).resolve().parent)
    directory = parser.parse_args(argv).directory
    try:
        about = read(directory)
    except Unusable as exc:
        print(f"results: {exc}", file=sys.stderr)
        return 1
    print(write(document(about.pop("records"), **about), directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
