# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Trends in the time series of aging indicators: Mann-Kendall test, Sen's slope, time to exhaustion.

The libraries are pymannkendall and scipy, which it needs. They are loaded when a trend is asked for only: whoever
judges by thresholds does without.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

#: Of fewer values the test can say nothing at all, whatever is asked for.
FEWEST_SAMPLES = 4


def trends(info: dict[str, Any], significance: float = 0.01, min_samples: int = 12) -> dict[str, dict[str, Any]]:
    """Return the trend of each indicator of what module aging_info returned, by name.

    Each has `trend` (increasing, decreasing, none, or unknown with fewer than `min_samples` samples), `p`, `slope`
    (Sen's, in units a second), `samples` (how many the values stand for), `span` (seconds between the first and the
    last value) and `seconds_to_exhaustion`, None unless a trend that is significant leads there.
    """
    libraries = _libraries()
    times = info["series"]["times"]
    columns = info["series"]["indicators"]
    # Of many samples aging_info makes one value of several.
    each = info["series"]["samples"] / max(len(times), 1)
    found = {}
    for indicator in info["indicators"]:
        column = columns.get(indicator["name"]) or [None] * len(times)
        earlier = [(at, value) for at, value in zip(times, column, strict=True) if value is not None]
        points = [point for point in earlier if point[0] < info["time"]] + [(info["time"], indicator["value"])]
        samples = round(each * (len(points) - 1)) + 1
        found[indicator["name"]] = _trend(points, samples, indicator, significance, min_samples, *libraries)
    return found


def _trend(
    points: Sequence[tuple[float, float]],
    samples: int,
    indicator: dict[str, Any],
    significance: float,
    min_samples: int,
    mann_kendall: Any,
    theil_sen: Any,
) -> dict[str, Any]:
    span = points[-1][0] - points[0][0]
    trend: dict[str, Any] = {
        "trend": "unknown",
        "p": None,
        "slope": None,
        "samples": samples,
        "span": round(span, 3),
        "seconds_to_exhaustion": None,
    }
    if samples < min_samples or len(points) < FEWEST_SAMPLES:
        return trend
    # Seconds since the first sample: those since the epoch would cost digits.
    times, values = [at - points[0][0] for at, _value in points], [float(value) for _at, value in points]
    p = _p(mann_kendall, values)
    # The library's own slope is one a sample, and samples need not be equally far apart.
    slope, intercept = (float(number) for number in theil_sen(values, times)[:2])
    trend.update(p=round(p, 6), slope=slope)
    if p >= significance or slope == 0.0:
        trend["trend"] = "none"
        return trend
    trend["trend"] = "increasing" if slope > 0 else "decreasing"
    exhausted_at = indicator["exhausted_at"]
    if exhausted_at is not None and (slope > 0) == (indicator["direction"] == "up"):
        line = intercept + slope * times[-1]
        # The line that a value has come off may be beyond a limit that moves with the value.
        reached = min(line, values[-1]) if slope > 0 else max(line, values[-1])
        left = exhausted_at - reached
        trend["seconds_to_exhaustion"] = round(max(0.0, left / slope), 1)
    return trend


def _p(mann_kendall: Any, values: Sequence[float]) -> float:
    """Return the probability that a series without a trend looks like this one.

    What a machine does is seldom independent of what it did before, which the plain test takes for a trend; with
    the correction by Hamed and Rao it says so less often. Of short series the correction can make too much, so
    both have to agree. A perfect line leaves the correction nothing to go by.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = [
            float(test(values).p) for test in (mann_kendall.original_test, mann_kendall.hamed_rao_modification_test)
        ]
    return max(p for p in found if not math.isnan(p))


def _libraries() -> tuple[Any, Any]:
    try:
        import pymannkendall
        from scipy.stats import theilslopes
    except ImportError as error:
        raise AnsibleFilterError(
            f"Trends need the Python library {error.name or 'pymannkendall'} where Ansible runs. Install it there "
            "(pip install pymannkendall), or judge by thresholds only: vmbeam_aging_policy: {exhaustion_within: 0}"
        ) from error
    return pymannkendall, theilslopes
