# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Moments as reports have them: ISO 8601 in UTC, to the millisecond."""

from __future__ import annotations

import datetime


def iso(epoch: float) -> str:
    """Return seconds since the epoch as a moment."""
    return datetime.datetime.fromtimestamp(float(epoch), datetime.UTC).isoformat(timespec="milliseconds")


def seconds_of(moment: str) -> float:
    """Return a moment as seconds since the epoch."""
    return datetime.datetime.fromisoformat(moment).timestamp()
