# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Judges by a policy whether a machine is due for rejuvenation because it has aged. Times are in seconds."""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._aging import KINDS
from ansible_collections.vmbeam.xen.plugins.plugin_utils._aging_trend import trends
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import duration, text_table

DEFAULTS: dict[str, Any] = {
    # Of indicators in their units: reached by a value that rises or falls to it.
    "thresholds": {},
    # A resource that a trend uses up within this time; 0: no prediction.
    "exhaustion_within": 259200,
    "min_samples": 12,
    # A trend over a shorter time may be an hour of the day.
    "min_span": 21600,
    "significance": 0.01,
}

# Beyond, no order is worth having.
_WORST = 100.0
# What xl tells by itself. Not the counts of xenstore, which nobody is told if xenstored is in a domain of its own.
_TOOLSTACK = ("highest_domid", "hypervisor_free_memory")


def assess(dom0s: list[dict[str, Any]], policy: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return how urgently a machine needs rejuvenation.

    `dom0s` are {name, place, info}: place is guest or host, info what module aging_info returned there, even if it
    failed. `policy` is vmbeam_aging_policy. A score of 1 and more means due, with the reasons in words. Rejuvenation
    replaces what a guest dom0 sees; what has aged below it goes to `host_reasons` and counts for nothing else.

    A toolstack that does not answer has aged most of all. Of a dom0 that could not be asked, which may be for the
    connection, `unavailable` tells and nothing else.
    """
    rules = _rules(policy or {})
    rows = [row for dom0 in dom0s if _answered(dom0) for row in _rows(dom0, rules)]
    unavailable = [row for dom0 in dom0s for row in _unavailable(dom0)]
    guest = [row for row in rows + unavailable if row["place"] == "guest"]
    host = [row for row in rows + unavailable if row["place"] == "host"]
    score = max((row["score"] for row in guest), default=0.0)
    return {
        "score": score,
        "due": any(row["reasons"] for row in guest),
        "reasons": _reasons(guest),
        "host_reasons": _reasons(host),
        "indicators": rows,
        "unavailable": unavailable,
    }


def describe(assessment: dict[str, Any], machine: str) -> list[str]:
    """Return an assessment as lines for a person."""
    verdict = f"due: {'; '.join(assessment['reasons'])}" if assessment["due"] else "not due"
    lines = [f"{machine}: aging score {assessment['score']:.2f}, {verdict}"]
    if assessment["host_reasons"]:
        lines.append(f"Below it, where rejuvenation does not help: {'; '.join(assessment['host_reasons'])}")
    lines += [
        f"{row['dom0']}: could not read {', '.join(row['indicators']) or 'anything'} ({row['why']})"
        for row in assessment["unavailable"]
    ]
    rows = [
        {
            **row,
            "value": _number(row["value"]),
            "limit": None if row["limit"] is None else _number(row["limit"]),
            "an hour": None if row["slope"] is None else f"{row['slope'] * 3600:+.3g}",
            "exhausted in": None if row["seconds_to_exhaustion"] is None else duration(row["seconds_to_exhaustion"]),
            "score": f"{row['score']:.2f}" if row["score"] else None,
        }
        for row in assessment["indicators"]
    ]
    columns = ["dom0", "indicator", "value", "unit", "limit", "trend", "an hour", "samples", "exhausted in", "score"]
    return [*lines, "", *text_table(rows, columns)] if rows else [*lines, "Nothing could be read."]


def _rules(policy: dict[str, Any]) -> dict[str, Any]:
    """Return the policy with defaults. Raises ValueError for what it does not know."""
    unknown = sorted(set(policy) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"vmbeam_aging_policy has no option {unknown[0]!r}; it has {', '.join(DEFAULTS)}")
    rules = {**DEFAULTS, **policy}
    strange = sorted(set(rules["thresholds"]) - set(KINDS))
    if strange:
        known = ", ".join(KINDS)
        raise ValueError(f"vmbeam_aging_policy.thresholds: {strange[0]!r} is none of the indicators {known}")
    rules["thresholds"] = {name: float(value) for name, value in rules["thresholds"].items()}
    for name in ("exhaustion_within", "min_samples", "min_span", "significance"):
        rules[name] = float(rules[name])
    return rules


def _rows(dom0: dict[str, Any], rules: dict[str, Any]) -> list[dict[str, Any]]:
    info = dom0["info"]
    found = trends(info, rules["significance"], int(rules["min_samples"])) if rules["exhaustion_within"] else {}
    rows = []
    for indicator in info["indicators"]:
        trend = found.get(indicator["name"], {})
        judged = [
            _by_threshold(indicator, rules["thresholds"].get(indicator["name"])),
            _by_prediction(indicator, trend, rules),
        ]
        rows.append(
            {
                "dom0": dom0["name"],
                "place": dom0["place"],
                "indicator": indicator["name"],
                **{key: indicator[key] for key in ("value", "unit", "limit", "direction", "exhausted_at")},
                **{key: trend.get(key) for key in ("trend", "slope", "p", "samples", "span", "seconds_to_exhaustion")},
                "score": max(score for score, _reason in judged),
                "reasons": [f"{dom0['name']}: {reason}" for score, reason in judged if score >= 1],
            }
        )
    return rows


def _answered(dom0: dict[str, Any]) -> bool:
    return "indicators" in dom0["info"]


def _unavailable(dom0: dict[str, Any]) -> list[dict[str, Any]]:
    """Return why indicators of a dom0 could not be read, those of one cause together, none if it was not asked."""
    causes: dict[str, list[str]] = {}
    if _answered(dom0):
        for name, why in dom0["info"]["unavailable"].items():
            causes.setdefault(why, []).append(name)
    else:
        causes[str(dom0["info"].get("msg") or "no answer")] = []
    rows = []
    for cause, names in causes.items():
        why = " ".join(cause.split()).rstrip(".")
        stuck = not set(names).isdisjoint(_TOOLSTACK)
        rows.append(
            {
                "dom0": dom0["name"],
                "place": dom0["place"],
                "indicators": names,
                "why": why,
                "score": _WORST if stuck else 0.0,
                "reasons": [f"{dom0['name']}: its toolstack does not answer ({why})"] if stuck else [],
            }
        )
    return rows


def _by_threshold(indicator: dict[str, Any], threshold: float | None) -> tuple[float, str]:
    """Return how near the value has come to its threshold, 1 when it is there, and the reason."""
    if threshold is None:
        return 0.0, ""
    value = indicator["value"]
    rising = indicator["direction"] == "up"
    reached = value >= threshold if rising else value <= threshold
    side = "over" if rising else "under"
    return _score(_ratio(value, threshold) if rising else _ratio(threshold, value), reached), (
        f"{indicator['name']} is {_amount(value, indicator)}, at or {side} the threshold of "
        f"{_amount(threshold, indicator)}"
    )


def _by_prediction(indicator: dict[str, Any], trend: dict[str, Any], rules: dict[str, Any]) -> tuple[float, str]:
    """Return how much sooner than allowed the resource is used up, 1 when just so, and the reason."""
    left = trend.get("seconds_to_exhaustion")
    if left is None or trend["span"] < rules["min_span"]:
        return 0.0, ""
    within = rules["exhaustion_within"]
    return _score(_ratio(within, left), left <= within), (
        f"{indicator['name']} will be exhausted in {duration(left)} (is {_amount(indicator['value'], indicator)}, "
        f"changes by {trend['slope'] * 3600:+.3g} an hour)"
    )


def _score(near: float, reached: bool) -> float:
    """Return how near a limit is, on the side of 1 on which it is, however it is rounded."""
    return max(near, 1.0) if reached else min(near, 0.99)


def _ratio(part: float, whole: float) -> float:
    return round(min(part / whole, _WORST), 3) if whole > 0 else _WORST


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Return the reasons, the most urgent first."""
    return [reason for row in sorted(rows, key=lambda row: -row["score"]) for reason in row["reasons"]]


def _amount(value: float, indicator: dict[str, Any]) -> str:
    return _number(value) if indicator["unit"] == "count" else f"{_number(value)} {indicator['unit']}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
