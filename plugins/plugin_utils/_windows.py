# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""When a machine may be rejuvenated: maintenance windows and blackouts."""

from __future__ import annotations

import datetime
import re
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import listed

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = datetime.timedelta(days=1)


def closed(
    windows: Sequence[Mapping[str, Any]],
    blackouts: Sequence[Mapping[str, Any]],
    now: float,
    margin: float = 0,
    timezone: str = "UTC",
) -> str:
    """Return why no machine may be begun at `now` (seconds since the epoch), empty if one may.

    A window is {days, from, to, timezone}: from and to are times of day; one that ends before it begins ends on the
    next day. Without any window every time is allowed. A blackout is {from, to, reason, timezone}: dates (the whole
    of both days) or date and time, ISO 8601. The window has to stay open, and no blackout to begin, for `margin`
    seconds; windows that adjoin or overlap are one. `timezone` is for those that name none.

    :raises ValueError: a window or a blackout cannot be read; the message names it
    """
    first = datetime.datetime.fromtimestamp(float(now), datetime.UTC)
    last = first + datetime.timedelta(seconds=float(margin))
    for blackout in blackouts or []:
        begin, end = _period(blackout, timezone)
        if begin <= last and first < end:
            what = blackout.get("reason") or "blackout"
            return f"{what}: from {_local(begin, blackout, timezone)} to {_local(end, blackout, timezone)}"
    if not windows:
        return ""
    if _open_until(windows, first, last, timezone) > last:
        return ""
    listed = "; ".join(_words(window, timezone) for window in windows)
    long_enough = f" for {float(margin):g} s" if margin else ""
    return f"outside of its maintenance window{long_enough}: {listed}; now it is {first:%a %Y-%m-%d %H:%M} UTC"


def _open_until(
    windows: Sequence[Mapping[str, Any]], first: datetime.datetime, last: datetime.datetime, timezone: str
) -> datetime.datetime:
    """Return until when there is an open window at each moment from `first` on; `first` if none is open then."""
    until = first
    for opens, closes in sorted(period for window in windows for period in _openings(window, first, last, timezone)):
        if opens <= until:
            until = max(until, closes)
    return until


def _openings(
    window: Mapping[str, Any], first: datetime.datetime, last: datetime.datetime, timezone: str
) -> Iterator[tuple[datetime.datetime, datetime.datetime]]:
    """Yield when a window opens and closes, each time that it may be open between `first` and `last`."""
    zone = _zone(window, timezone)
    days, begin, end = _days(window), _time(window, "from"), _time(window, "to")
    # One that began yesterday may still be open.
    day = first.astimezone(zone).date() - _DAY
    while day <= last.astimezone(zone).date():
        if DAYS[day.weekday()] in days:
            midnight = datetime.datetime.combine(day, datetime.time(), zone)
            opens, closes = midnight + begin, midnight + (end if end > begin else end + _DAY)
            yield opens.astimezone(datetime.UTC), closes.astimezone(datetime.UTC)
        day += _DAY


def _period(blackout: Mapping[str, Any], timezone: str) -> tuple[datetime.datetime, datetime.datetime]:
    zone = _zone(blackout, timezone)
    begin = _moment(blackout, "from", zone)
    end = _moment(blackout, "to", zone)
    if _is_date(blackout["to"]):
        end += _DAY
    if end <= begin:
        raise ValueError(f"vmbeam_blackouts: {dict(blackout)} ends before it begins")
    return begin.astimezone(datetime.UTC), end.astimezone(datetime.UTC)


def _is_date(value: Any) -> bool:
    return (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)) or (
        isinstance(value, str) and len(value.strip()) == 10
    )


def _moment(blackout: Mapping[str, Any], key: str, zone: zoneinfo.ZoneInfo) -> datetime.datetime:
    value = blackout.get(key)
    try:
        text = value.isoformat() if isinstance(value, datetime.date) else str(value)
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"vmbeam_blackouts: {key} of {dict(blackout)} is not an ISO 8601 date or time") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=zone)


def _days(window: Mapping[str, Any]) -> list[str]:
    """Return the days on which a window opens; all if it names none, a range (mon-fri) in full."""
    given = window.get("days") or list(DAYS)
    if isinstance(given, str):
        given = re.sub(r"\s*-\s*", "-", given)
    days: list[str] = []
    for entry in listed(given, "vmbeam_windows: days"):
        begin, _dash, end = str(entry).lower().partition("-")
        ends = [begin.strip()[:3], (end or begin).strip()[:3]]
        if any(day not in DAYS for day in ends):
            raise ValueError(f"vmbeam_windows: '{entry}' is not a day ({', '.join(DAYS)}) or a range of days")
        first, last = (DAYS.index(day) for day in ends)
        days += [DAYS[number % 7] for number in range(first, last + 1 if last >= first else last + 8)]
    return days


def _time(window: Mapping[str, Any], key: str) -> datetime.timedelta:
    value = window.get(key)
    # YAML 1.1 reads 22:30 without quotes as a number to base 60.
    text = f"{value // 60}:{value % 60:02}" if isinstance(value, int) else str(value)
    hours, colon, minutes = text.partition(":")
    if not (colon and hours.isdigit() and minutes.isdigit() and int(hours) <= 24 and int(minutes) < 60):
        raise ValueError(f"vmbeam_windows: {key} of {dict(window)} is not a time of day such as '22:30'")
    return datetime.timedelta(hours=int(hours), minutes=int(minutes))


def _zone(entry: Mapping[str, Any], timezone: str) -> zoneinfo.ZoneInfo:
    name = entry.get("timezone") or timezone
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError) as error:
        raise ValueError(f"timezone '{name}' is not known; write one such as Europe/Berlin") from error


def _local(moment: datetime.datetime, entry: Mapping[str, Any], timezone: str) -> str:
    return f"{moment.astimezone(_zone(entry, timezone)):%Y-%m-%d %H:%M %Z}"


def _words(window: Mapping[str, Any], timezone: str) -> str:
    begin, end = (_clock(_time(window, key)) for key in ("from", "to"))
    zone = window.get("timezone") or timezone
    return f"{', '.join(dict.fromkeys(_days(window)))} {begin} to {end} {zone}"


def _clock(time: datetime.timedelta) -> str:
    minutes = int(time.total_seconds()) // 60
    return f"{minutes // 60:02}:{minutes % 60:02}"
