"""From measured migrations to medians, ratios and a table."""

from __future__ import annotations

import statistics
import typing

#: Name -> options of module guest_migrate. suspend over tcp is save and restore over a plain pipe.
METHODS: dict[str, dict[str, str]] = {
    "precopy-ssh": {"strategy": "precopy", "transport": "ssh"},
    "precopy-tcp": {"strategy": "precopy", "transport": "tcp"},
    "suspend-ssh": {"strategy": "suspend", "transport": "ssh"},
    "suspend-tcp": {"strategy": "suspend", "transport": "tcp"},
    "zero-copy": {"strategy": "zero_copy", "transport": "channel"},
}
BASELINE = "precopy-ssh"
ZERO_COPY = "zero-copy"

#: What is measured of each migration; None where it is not to be had.
METRICS = (
    "seconds",
    "downtime_seconds",
    "longest_gap_seconds",
    "bytes",
    "network_bytes",
    "cpu_host_dom0",
    "cpu_host_vms",
    "pages_passed_on",
    "pages_copied",
    "hypercalls",
    "p2m_writes_4k",
    "p2m_writes_2m",
)
#: Of which the ratio to BASELINE is told.
RATIOS = ("seconds", "downtime_seconds")


class Figure(typing.NamedTuple):
    """One figure of the paper, as measured here. by: what a row is about, size_mib or rate."""

    title: str
    metric: str
    unit: str
    by: str


#: Key in results.json -> figure; the numbers are the paper's. Figures 13 and 14 tell CPU time rather than utilization.
FIGURES = {
    "fig7": Figure("Migration time", "seconds", "s", "size_mib"),
    "fig9": Figure("Downtime", "downtime_seconds", "s", "size_mib"),
    "fig10": Figure("Migration time, by pages rewritten a second", "seconds", "s", "rate"),
    "fig11": Figure("Downtime, by pages rewritten a second", "downtime_seconds", "s", "rate"),
    "fig12": Figure("Bytes between the host VMs", "network_bytes", "bytes", "size_mib"),
    "fig13": Figure("CPU time of host dom0", "cpu_host_dom0", "s", "size_mib"),
    "fig14": Figure("CPU time of both host VMs", "cpu_host_vms", "s", "size_mib"),
    "fig15-copied": Figure("Pages copied", "pages_copied", "pages", "size_mib"),
    "fig15-hypercalls": Figure("Calls of the host hypervisor", "hypercalls", "calls", "size_mib"),
    "fig15-4k": Figure("Page table entries of 4 KiB written", "p2m_writes_4k", "entries", "size_mib"),
    "fig15-2m": Figure("Page table entries of 2 MiB written", "p2m_writes_2m", "entries", "size_mib"),
}


def schedule(rounds: int, methods: typing.Sequence[str] = tuple(METHODS)) -> list[str]:
    """Return the methods in the order of their migrations.

    Each migration goes back where the last one came from. So that no method always goes the same
    way, each round begins one method later, unless their number is odd.
    """
    shifts = [0 if len(methods) % 2 else number % len(methods) for number in range(rounds)]
    return [method for shift in shifts for method in (*methods[shift:], *methods[:shift])]


def summary(values: typing.Iterable[float | None]) -> dict[str, typing.Any] | None:
    """Return median, min, max and the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "values": known}


def summarize(migrations: list[dict]) -> dict[str, dict[str, dict]]:
    """Return size (MiB, as text) -> method -> metric -> summary, and the ratios of medians to BASELINE.

    :param migrations: each with `size_mib`, `method` and what there is of METRICS, at the default rate
    """
    return _summarize(migrations, "size_mib")


def _summarize(migrations: list[dict], by: str) -> dict[str, dict[str, dict]]:
    results: dict[str, dict[str, dict]] = {}
    for value in sorted({entry[by] for entry in migrations}):
        of_value = [entry for entry in migrations if entry[by] == value]
        measured = {entry["method"] for entry in of_value}
        results[str(value)] = methods = {
            method: {
                metric: summary(entry.get(metric) for entry in of_value if entry["method"] == method)
                for metric in METRICS
            }
            for method in METHODS
            if method in measured
        }
        baseline = methods.get(BASELINE, {})
        for result in methods.values():
            result["ratio_to_" + BASELINE] = {metric: _ratio(result[metric], baseline.get(metric)) for metric in RATIOS}
    return results


def figures(migrations: list[dict], by_rate: list[dict]) -> dict[str, dict]:
    """Return what was measured by the paper's figures: key -> title, unit, by and rows.

    A row has what it is about, the summaries of each method, and `ratio`, the baseline's median by zero-copy's.
    :param migrations: by size at the default rate; by_rate: of one size by rate
    """
    found = {"size_mib": _summarize(migrations, "size_mib"), "rate": _summarize(by_rate, "rate")}
    achieved = {entry["rate"]: entry["achieved_rate"] for entry in by_rate}
    result = {}
    for key, figure in FIGURES.items():
        rows = []
        for value, methods in found[figure.by].items():
            of_metric = {method: of_method[figure.metric] for method, of_method in methods.items()}
            rows.append(
                {
                    figure.by: int(value),
                    **({"achieved_rate": achieved[int(value)]} if figure.by == "rate" else {}),
                    "methods": {method: entry for method, entry in of_metric.items() if entry},
                    "ratio": _ratio(of_metric.get(BASELINE), of_metric.get(ZERO_COPY)),
                }
            )
        if any(row["methods"] for row in rows):
            result[key] = {"title": figure.title, "unit": figure.unit, "by": figure.by, "rows": rows}
    return result


def _ratio(one: dict | None, other: dict | None) -> float | None:
    return round(one["median"] / other["median"], 3) if one and other and other["median"] else None


def table(results: dict[str, dict[str, dict]]) -> str:
    """Return the results as a Markdown table: medians, least and greatest value in brackets."""
    lines = [
        f"| Guest | Method | Time (s) | to {BASELINE} | Downtime (s) | to {BASELINE} | Longest tick gap (s) "
        "| Stream (MiB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, methods in results.items():
        for method, result in methods.items():
            ratio = result["ratio_to_" + BASELINE]
            cells = [
                f"{size} MiB",
                method,
                _cell(result["seconds"]),
                _times(ratio["seconds"]),
                _cell(result["downtime_seconds"]),
                _times(ratio["downtime_seconds"]),
                _cell(result["longest_gap_seconds"]),
                _cell(result["bytes"], scale=1 << 20),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict | None, scale: float = 1) -> str:
    if not found:
        return "-"
    median, least, most = (found[key] / scale for key in ("median", "min", "max"))
    return f"{median:.2f} ({least:.2f}-{most:.2f})"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def figures_text(found: dict[str, dict]) -> str:
    """Return the figures as Markdown: a table each, medians with the least and greatest value in brackets."""
    parts = []
    for key, figure in found.items():
        methods = [method for method in METHODS if any(method in row["methods"] for row in figure["rows"])]
        unit = {"size_mib": "MiB", "rate": "pages/s wanted (achieved)"}[figure["by"]]
        lines = [
            f"### {key}: {figure['title']} ({figure['unit']})",
            "",
            f"| {' | '.join([unit, *methods, BASELINE + ' / ' + ZERO_COPY])} |",
            "|" + "---|" * (len(methods) + 2),
        ]
        for row in figure["rows"]:
            cells = [_cell(row["methods"].get(method)) for method in methods]
            about = f"{row['rate']} ({row['achieved_rate']})" if figure["by"] == "rate" else str(row[figure["by"]])
            lines.append(f"| {' | '.join([about, *cells, _times(row['ratio'])])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def throughput_text(found: dict[str, float]) -> str:
    """Return the throughputs as Markdown; `found` in MiB/s."""
    lines = ["### fig6: Throughput between two guest dom0s (MiB/s)", "", "| Way | MiB/s | to memcpy |", "|---|---|---|"]
    lines += [f"| {way} | {value:.2f} | {value / found['memcpy']:.3f}x |" for way, value in found.items()]
    return "\n".join(lines)


def web_text(found: list[dict]) -> str:
    """Return what a guest answered while it migrated as Markdown; nothing if that was not measured."""
    if not found:
        return ""
    lines = ["### fig16: Answers over HTTP per second", "", "| Method | before | during | after |", "|---|---|---|---|"]
    lines += [f"| {row['method']} | {row['before']:.1f} | {row['during']:.1f} | {row['after']:.1f} |" for row in found]
    return "\n".join(lines)


def page(command: str, results: dict[str, dict[str, dict]], phases: str, *more: str) -> str:
    """Return RESULTS.md; `more` are further sections."""
    return f"""# Migration, measured in the lab

Written by `{command}`; a change is lost. The values are in `results.json`.

The lab emulates every CPU, so its times mean nothing but their ratios. Each guest has one vCPU, no disk, and a program
that rewrites its memory at the default rate; the other guests are paused. Values are medians, the least and the
greatest in brackets. Downtime is what the source's guest dom0 saw, the tick gap what the guest saw. The size of
the stream is known for suspend only. In the first table a ratio is a method's time by the baseline's, in the figures,
which are numbered as in the paper, it is the baseline's by zero-copy's. In figures 10, 11 and 16 it is another guest,
which rewrites a quarter of its memory at the rate that is told (16: not at all). CPU time includes that of Ansible's
module in the guest dom0 and of the meters, with each method.

{table(results)}

{chr(10).join(section + chr(10) for section in more)}
The phases of the run:

```
{phases}
```
"""
