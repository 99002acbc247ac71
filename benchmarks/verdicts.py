"""Compares what was measured with the figures that this project has to meet."""

from __future__ import annotations

import typing

from . import results
from .results import BASELINE, CHANNEL, COPIES, MEMCPY, ZERO_COPY, Records, of, ratio, summary

GIB = 1024
#: Pages per second of the busy guest, and the share of it that the guest has to manage to.
BUSY_RATE, BUSY_SHARE = 10000, 0.9


class Found(typing.NamedTuple):
    """A measured value. relation: "=", ">=" or "<=", of the true value to it; note: what it was computed from."""

    value: float
    relation: str
    note: str


class Goal(typing.NamedTuple):
    """One figure to meet."""

    name: str
    unit: str
    at_least: bool
    bound: float
    aim: float | None
    measure: typing.Callable[[Records], Found | str]  #: the reason as text if there is none


def _n(**summaries: dict[str, typing.Any] | None) -> str:
    return ", ".join(f"{name.replace('_', '-')} n={found['n'] if found else 0}" for name, found in summaries.items())


def _by_size(records: Records, size: int, method: str, metric: str = "seconds") -> dict[str, typing.Any] | None:
    return summary(of(records["by_size"], size_mib=size, method=method), metric)


def _by_rate(records: Records, rate: int, method: str, metric: str) -> dict[str, typing.Any] | None:
    return summary(of(records["by_rate"], rate=rate, method=method), metric)


def _told(found: dict[str, typing.Any] | None, missing: str, note: str) -> Found | str:
    return Found(found["value"], found["relation"], note) if found else missing


def _stock_time(records: Records) -> Found | str:
    stock, ours = _by_size(records, GIB, BASELINE), _by_size(records, GIB, ZERO_COPY)
    return _told(ratio(stock, ours), "needs both at 1024 MiB", _n(stock=stock, zero_copy=ours))


def _fastest_copy(records: Records) -> Found | str:
    ours = _by_size(records, GIB, ZERO_COPY)
    if not of(records["by_size"], size_mib=GIB, method="suspend-tcp"):
        return "needs suspend-tcp at 1024 MiB"
    copies = {method: _by_size(records, GIB, method) for method in COPIES}
    medians = {method: found["median"] for method, found in copies.items() if found and found["median"] is not None}
    if not medians:
        return "no copy at 1024 MiB succeeded"
    fastest = min(medians, key=lambda method: medians[method])
    note = f"{fastest} is the fastest; " + _n(copy=copies[fastest], zero_copy=ours)
    return _told(ratio(copies[fastest], ours), "needs zero-copy at 1024 MiB", note)


def _growth(records: Records) -> Found | str:
    large, small = _by_size(records, 2048, ZERO_COPY), _by_size(records, 128, ZERO_COPY)
    return _told(ratio(large, small), "needs 2048 and 128 MiB", _n(large=large, small=small))


def _downtime(records: Records) -> Found | str:
    stock, ours = (_by_rate(records, 0, method, "downtime_seconds") for method in (BASELINE, ZERO_COPY))
    note = _n(stock=stock, zero_copy=ours)
    by_size = _downtime_by_size(records)
    if by_size:
        note += f"; by size: {', '.join(by_size)}"
    return _told(ratio(ours, stock), "needs both at 0 pages/s", note)


def _downtime_by_size(records: Records) -> list[str]:
    """Return the same ratio for each size, as text: the verdict is that of one size."""
    found = []
    for size in sorted({entry["size_mib"] for entry in records["by_size"]}):
        stock, ours = (_by_size(records, size, method, "downtime_seconds") for method in (BASELINE, ZERO_COPY))
        known = ratio(ours, stock)
        if known and stock and ours:
            found.append(f"{size} MiB {known['value']}x (n={stock['n']}, {ours['n']})")
    return found


def _busy(records: Records) -> Found | str:
    changes = {}
    for name, metric in (("time", "seconds"), ("downtime", "downtime_seconds")):
        busy, idle = (_by_rate(records, rate, ZERO_COPY, metric) for rate in (BUSY_RATE, 0))
        found = ratio(busy, idle)
        if not found or found["relation"] != "=" or not busy or not idle:
            return f"needs zero-copy at {BUSY_RATE} and 0 pages/s"
        changes[name] = (100 * (busy["median"] / idle["median"] - 1), busy["n"], idle["n"])
    note = ", ".join(f"{name} {change:+.1f} % (n={busy}, {idle})" for name, (change, busy, idle) in changes.items())
    achieved = max(entry["achieved_rate"] for entry in of(records["by_rate"], rate=BUSY_RATE, method=ZERO_COPY))
    note += f", guest achieved {achieved} pages/s"
    if achieved < BUSY_SHARE * BUSY_RATE:
        return f"the guest cannot rewrite that fast: {note}"
    return Found(round(max(change for change, *_ in changes.values()), 1), "=", note)


def _ours(records: Records) -> list[dict[str, typing.Any]]:
    """Return all records of zero-copy migrations that succeeded."""
    kinds = ("by_size", "by_rate", "web", "others")
    return [entry for kind in kinds for entry in of(records[kind], method=ZERO_COPY) if "failed" not in entry]


def _worst(entries: list[dict[str, typing.Any]], metric: str) -> Found | str:
    """Return the greatest value; one migration of which it is not known spoils that."""
    known = [entry[metric] for entry in entries if entry.get(metric) is not None]
    if not known:
        return "no zero-copy migration tells it"
    if len(known) < len(entries):
        return f"not known of {len(entries) - len(known)} of {len(entries)} migrations"
    return Found(max(known), "=", f"the most of n={len(known)} zero-copy migrations")


def _calls(records: Records) -> Found | str:
    large = [entry for entry in _ours(records) if entry.get("size_mib", 0) >= GIB]
    if not large:
        return "needs zero-copy at 1024 MiB or more"
    per_gib = [
        {"calls": None if entry.get("hypercalls") is None else entry["hypercalls"] * GIB / entry["size_mib"]}
        for entry in large
    ]
    return _worst(per_gib, "calls")


def _channel(records: Records) -> Found | str:
    ways = {way: summary(of(records["throughput"], way=way), "mib_per_s") for way in (CHANNEL, MEMCPY)}
    return _told(ratio(ways[CHANNEL], ways[MEMCPY]), "needs the throughput", _n(**ways))


#: As the project's requirements say.
GOALS = (
    Goal("stock live (precopy) / zero-copy migration time, 1 GiB guest", "x", True, 20, 100, _stock_time),
    Goal("fastest copy / zero-copy migration time, 1 GiB guest", "x", True, 5, 20, _fastest_copy),
    Goal("zero-copy migration time, 2048 / 128 MiB", "x", False, 1.5, 1.2, _growth),
    Goal("zero-copy / stock downtime, idle guest", "x", False, 1.0, 0.5, _downtime),
    Goal("zero-copy time and downtime at 10000 dirty pages/s, more than idle by", " %", False, 10, None, _busy),
    Goal("network bytes of a migration", "", False, 0, None, lambda records: _worst(_ours(records), "network_bytes")),
    Goal(
        "guest pages copied per migration",
        "",
        False,
        64,
        None,
        lambda records: _worst(_ours(records), "pages_copied_in_all"),
    ),
    Goal("L1->L0 hypercalls per GiB", "", False, 64, 16, _calls),
    Goal("channel throughput / memcpy in the same dom0", "x", True, 0.5, None, _channel),
)


def met(found: Found, bound: float | None, at_least: bool) -> bool | None:
    """Return whether a value keeps a bound; None if it cannot be told."""
    if bound is None:
        return None
    keeps = found.value >= bound if at_least else found.value <= bound
    # Of a value that is known to be greater, or less, than this only one answer is sure.
    sure = {"=": True, ">=": keeps == at_least, "<=": keeps != at_least}[found.relation]
    return keeps if sure else None


def judge(records: Records) -> list[dict[str, typing.Any]]:
    """Return for each goal `value`, `relation`, `met` and `aim_met`; None where it was not measured."""
    records = results.counted({kind: records.get(kind, []) for kind in results.KINDS})
    verdicts = []
    for goal in GOALS:
        found = goal.measure(records)
        known = found if isinstance(found, Found) else None
        verdicts.append(
            {
                "figure": goal.name,
                "unit": goal.unit,
                "at_least": goal.at_least,
                "bound": goal.bound,
                "aim": goal.aim,
                "value": known.value if known else None,
                "relation": known.relation if known else None,
                "met": met(known, goal.bound, goal.at_least) if known else None,
                "aim_met": met(known, goal.aim, goal.at_least) if known else None,
                "note": known.note if known else found,
            }
        )
    return verdicts
