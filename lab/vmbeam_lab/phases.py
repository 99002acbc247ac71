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


def rows() -> list[dict[str, typing.Any]]:
    """Return the recorded phases: ``phase``, ``end`` (Unix time), ``seconds``, ``outcome``."""
    return [json.loads(line) for line in _FILE.read_text().splitlines()] if _FILE.exists() else []


def table(recorded: list[dict[str, typing.Any]] | None = None) -> str:
    """Return phases as text, the time from first to last at the end: some run side by side.

    :param recorded: as rows() returns them; by default what that returns
    """
    recorded = rows() if recorded is None else recorded
    if not recorded:
        return "no phases recorded"
    width = max(len(row["phase"]) for row in recorded)
    lines = [f"{row['phase']:<{width}}  {row['seconds']:>8.1f} s  {row['outcome']}" for row in recorded]
    elapsed = max(row["end"] for row in recorded) - min(row["end"] - row["seconds"] for row in recorded)
    lines.append(f"{'all':<{width}}  {elapsed:>8.1f} s")
    return "\n".join(lines)
