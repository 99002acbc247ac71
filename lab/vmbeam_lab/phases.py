"""Times the lab's phases, prints them as they pass, keeps them for the summary."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import typing

from . import paths

_FILE = paths.STATE / "phases.jsonl"


def say(text: str) -> None:
    """Print a progress line at once, also into a pipe."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def phase(name: str) -> typing.Iterator[None]:
    """Announce, time and record the phase `name`."""
    say(f"{name} ...")
    start = time.monotonic()
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        seconds = time.monotonic() - start
        say(f"{name}: {outcome} in {seconds:.1f} s")
        record(name, seconds, outcome)


def record(name: str, seconds: float, outcome: str = "done") -> None:
    """Add one line to the phase file."""
    _FILE.parent.mkdir(parents=True, exist_ok=True)
    with open(_FILE, "a") as handle:
        entry = {"phase": name, "end": round(time.time(), 1), "seconds": round(seconds, 1), "outcome": outcome}
        handle.write(json.dumps(entry) + "\n")


def reset() -> None:
    """Forget the recorded phases."""
    _FILE.unlink(missing_ok=True)


def table() -> str:
    """Return the recorded phases as text, the time from first to last at the end: some run side by side."""
    if not _FILE.exists():
        return "no phases recorded"
    rows = [json.loads(line) for line in _FILE.read_text().splitlines()]
    width = max(len(row["phase"]) for row in rows)
    lines = [f"{row['phase']:<{width}}  {row['seconds']:>8.1f} s  {row['outcome']}" for row in rows]
    elapsed = max(row["end"] for row in rows) - min(row["end"] - row["seconds"] for row in rows)
    lines.append(f"{'all':<{width}}  {elapsed:>8.1f} s")
    return "\n".join(lines)
