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

#: What is measured of each migration; `bytes` is None where Xen does not tell it.
METRICS = ("seconds", "downtime_seconds", "longest_gap_seconds", "bytes")
#: Of which the ratio to BASELINE is told.
RATIOS = ("seconds", "downtime_seconds")


def schedule(rounds: int) -> list[str]:
    """Return the methods in the order of their migrations.

    Each migration goes back where the last one came from. So that no method always goes the same
    way, each round begins one method later, unless their number is odd.
    """
    methods = list(METHODS)
    shifts = [0 if len(methods) % 2 else number % len(methods) for number in range(rounds)]
    return [method for shift in shifts for method in methods[shift:] + methods[:shift]]


def summary(values: typing.Iterable[float | None]) -> dict[str, typing.Any] | None:
    """Return median, min, max and the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "values": known}


def summarize(migrations: list[dict]) -> dict[str, dict[str, dict]]:
    """Return size (MiB, as text) -> method -> metric -> summary, and the ratios of medians to BASELINE.

    :param migrations: each with `size_mib`, `method` and METRICS
    """
    results: dict[str, dict[str, dict]] = {}
    for size in sorted({entry["size_mib"] for entry in migrations}):
        of_size = [entry for entry in migrations if entry["size_mib"] == size]
        results[str(size)] = methods = {
            method: {
                metric: summary(entry[metric] for entry in of_size if entry["method"] == method) for metric in METRICS
            }
            for method in METHODS
        }
        baseline = methods[BASELINE]
        for result in methods.values():
            result["ratio_to_" + BASELINE] = {metric: _ratio(result[metric], baseline[metric]) for metric in RATIOS}
    return results


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


def page(command: str, results: dict[str, dict[str, dict]], phases: str) -> str:
    """Return RESULTS.md."""
    return f"""# Xen's own migration, measured in the lab

Written by `{command}`; a change is lost. The values are in `results.json`.

The lab emulates every CPU, so its times mean nothing but their ratios. Each guest has one vCPU, no disk, and a program
that rewrites its memory at the default rate; the other guests are paused. Values are medians, the least and the
greatest in brackets. Downtime is what the source's guest dom0 saw, the tick gap what the guest saw. The size of
the stream is known for suspend only.

{table(results)}

The phases of the run:

```
{phases}
```
"""
