# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""A run's report as one HTML page that needs nothing else.

Names and messages come from guests and machines that may be hostile. So the template escapes everything, styles and
classes are made from numbers and fixed words only, and the page forbids itself any script but its own, and any request.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._moments import iso, seconds_of
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import duration
from jinja2 import Environment, FileSystemLoader, StrictUndefined

#: The first words of the phases that have a colour of their own.
PHASE_KINDS = ("observe", "start", "move", "retire", "recover")
#: How many of the longest downtimes are drawn.
LONGEST = 10
#: A run of more machines than this shows the details of those only that need attention.
OPEN_MACHINES = 3
TICKS = 5
UNKNOWN = "\N{EN DASH}"
#: Outcomes after which somebody has to do something.
TROUBLE = ("failed", "unreachable", "refused")

# The only script: it sorts tables. Without it the page lacks nothing else.
_SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = table.tHead.rows[0].cells;
  for (const head of heads) {
    const button = document.createElement('button');
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const value = row => {
        const cell = row.cells[head.cellIndex];
        return cell.dataset.value ?? cell.textContent.trim();
      };
      const order = new Intl.Collator('en', {numeric: true});
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, other) => order.compare(value(one), value(other)) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  }
}
"""


@dataclass(frozen=True)
class Axis:
    """The time that a timeline shows, in seconds since the epoch."""

    first: float
    last: float

    def stretch(self, kind: str, first: float, last: float, text: str) -> dict[str, Any]:
        """Return the bar from `first` to `last`: its place in percent of the axis, and what it says."""
        length = max(self.last - self.first, 0.001)
        left = min(max((first - self.first) / length, 0.0), 1.0)
        right = min(max((last - self.first) / length, left), 1.0)
        return {"kind": kind, "left": round(left * 100, 3), "width": round((right - left) * 100, 3), "text": text}

    def ticks(self) -> list[str]:
        """Return moments at equal distances, the first and the last one included."""
        step = (self.last - self.first) / (TICKS - 1)
        return [iso(self.first + step * number) for number in range(TICKS)]


def page(report: dict[str, Any]) -> str:
    """Return the HTML page of a fleet report, whose form is roles/fleet_report/files/report.schema.json."""
    # S701: autoescape is on.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(span=_span, exact=_exact, figure=_figure, clock=_clock, date=_date, words=_words)
    machines = [
        {
            **machine,
            "anchor": f"machine-{number}",
            "troubled": machine["outcome"] in TROUBLE,
            "bars": [],
            "rows": _rows(machine),
            "ticks": _axis_of([machine]).ticks() if machine["started"] else [],
            "aging_rows": _aging_rows(machine["aging"]),
        }
        for number, machine in enumerate(report["machines"], 1)
    ]
    rolled = [machine for machine in machines if machine["started"]]
    axis = _axis_of(rolled) if rolled else Axis(0.0, 0.0)
    for machine in rolled:
        machine["bars"] = _phase_bars(machine, axis)
    return environment.get_template("_page.html.j2").render(
        run=report["run"],
        schema=report["schema"],
        summary=report["summary"],
        outcomes=[(outcome, count) for outcome, count in report["summary"]["outcomes"].items() if count],
        machines=machines,
        rolled=rolled,
        ticks=axis.ticks(),
        troubled=[machine for machine in machines if machine["troubled"]],
        open_all=len(rolled) <= OPEN_MACHINES,
        downtimes=_downtimes(machines),
        aged=[machine for machine in machines if machine["aging_rows"]],
        script=_SCRIPT,
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
    )


def _axis_of(machines: list[dict[str, Any]]) -> Axis:
    return Axis(
        min(seconds_of(machine["started"]) for machine in machines),
        max(seconds_of(machine["finished"]) for machine in machines),
    )


def _phase_bars(machine: dict[str, Any], axis: Axis) -> list[dict[str, Any]]:
    return [
        axis.stretch(
            _kind(phase["phase"]),
            seconds_of(phase["started"]),
            seconds_of(phase["finished"]),
            f"{phase['phase']}: {_clock(phase['started'])}, {_span(phase['seconds'])}",
        )
        for phase in machine["phases"]
    ]


def _rows(machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a machine's own timeline: its phases, then its guests."""
    if not machine["started"]:
        return []
    axis = _axis_of([machine])
    guests = [guest for guest in machine["guests"] if guest.get("started")]
    return [
        {"name": "phases", "bars": _phase_bars(machine, axis)},
        *({"name": guest["guest"], "bars": _guest_bars(guest, axis)} for guest in guests),
    ]


def _guest_bars(guest: dict[str, Any], axis: Axis) -> list[dict[str, Any]]:
    """Return a guest's move, in it its migration, and in that its downtime."""
    began, ended = seconds_of(guest["started"]), seconds_of(guest["finished"])
    taken = _span(ended - began)
    bars = [axis.stretch("settle", began, ended, f"{guest['guest']}: {guest['result']} in {taken}, checks included")]
    seconds, downtime = guest.get("seconds"), guest.get("downtime_seconds")
    if seconds is not None:
        bars.append(axis.stretch("migrate", began, began + seconds, f"migration of {guest['guest']}: {_span(seconds)}"))
    if seconds is not None and downtime is not None:
        # The guest stops when its memory is passed; one that is suspended starts when all the rest is done.
        phases = guest.get("phases") or {}
        before = phases.get("connect", 0.0) + phases["memory"] if "memory" in phases else max(seconds - downtime, 0.0)
        stopped = began + before
        bars.append(
            axis.stretch("downtime", stopped, stopped + downtime, f"downtime of {guest['guest']}: {_exact(downtime)}")
        )
    return bars


def _downtimes(machines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the longest downtimes, longest first, each with its share of the longest one in percent."""
    found = [
        {"guest": guest["guest"], "machine": machine["machine"], "seconds": guest["downtime_seconds"]}
        for machine in machines
        for guest in machine["guests"]
        if guest["result"] == "moved" and guest.get("downtime_seconds") is not None
    ]
    found.sort(key=lambda one: float(one["seconds"]), reverse=True)
    longest = max((one["seconds"] for one in found), default=0) or 1
    return [{**one, "share": round(one["seconds"] / longest * 100, 2)} for one in found[:LONGEST]]


def _aging_rows(aging: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return what was measured before and after, an indicator a row, in the order of `before`."""
    before, after = ({one["name"]: one for one in (aging or {}).get(when) or []} for when in ("before", "after"))
    rows = []
    for name, one in {**before, **after}.items():
        values = [found[name]["value"] if name in found else None for found in (before, after)]
        rows.append(
            {
                "name": name,
                "unit": one.get("unit") or "",
                "before": values[0],
                "after": values[1],
                "verdict": _verdict(values[0], values[1], one.get("direction")),
            }
        )
    return rows


def _verdict(before: float | None, after: float | None, direction: str | None) -> str:
    """Return whether an indicator is fresher after, in a word; nothing if that cannot be said."""
    if before is None or after is None or direction not in ("up", "down"):
        return ""
    if before == after:
        return "the same"
    return "fresher" if (after < before) == (direction == "up") else "not fresher"


def _kind(phase: str) -> str:
    word = phase.split(" ")[0]
    return word if word in PHASE_KINDS else "other"


def _span(seconds: float | None) -> str:
    """Return seconds as people say them."""
    if seconds is None:
        return UNKNOWN
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def _exact(seconds: float | None) -> str:
    """Return a downtime as people compare it: in milliseconds below a second."""
    if seconds is None:
        return UNKNOWN
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _figure(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _clock(moment: str) -> str:
    return moment[11:19]


def _date(moment: str) -> str:
    return moment[:10]


def _words(text: str) -> str:
    return text.replace("_", " ")
