# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""The time series of aging indicators that is kept on a host: JSON lines, appended to, bounded by rotation."""

from __future__ import annotations

import io
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_PATH = "/var/lib/vmbeam/aging/samples.jsonl"

# However large a file is, no more than its end is read.
_READ_AT_MOST = 32 * 1024 * 1024
# More than the longest line.
_LAST_LINES = 16 * 1024


@dataclass(frozen=True)
class Sample:
    """The values of indicators at a time (seconds since the epoch) since a boot."""

    time: float
    boot_id: str
    values: dict[str, float]


class History:
    """A file of samples, and the one before it with the suffix .1."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._older = self._path.with_name(f"{self._path.name}.1")

    def append(self, sample: Sample, max_bytes: int) -> None:
        """Adds a sample; max_bytes bounds both files together. One process at a time."""
        line = json.dumps(vars(sample), separators=(",", ":")).encode() + b"\n"
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._open() as file:
            size = file.seek(0, os.SEEK_END)
            full = size > 0 and size + len(line) > max_bytes // 2
            if not full:
                file.write((b"\n" if self._torn(file, size) else b"") + line)
        if full:
            self._path.replace(self._older)
            with self._open() as file:
                file.write(line)

    def last(self) -> Sample | None:
        """The newest sample of the file."""
        return next(reversed(list(_samples(self._path, _LAST_LINES))), None)

    def read(self, boot_id: str, since: float, until: float) -> list[Sample]:
        """The samples since that boot and within those times, in order. None if nothing was kept.

        A clock that was set back leaves samples of the future, which are left out.
        """
        found: list[Sample] = []
        for path in (self._older, self._path):
            for sample in _samples(path, _READ_AT_MOST):
                wanted = sample.boot_id == boot_id and since <= sample.time <= until
                if wanted and (not found or sample.time > found[-1].time):
                    found.append(sample)
        return found

    def _open(self) -> io.FileIO:
        return open(self._path, "ab+", buffering=0)

    @staticmethod
    def _torn(file: io.FileIO, size: int) -> bool:
        """Whether a power cut or a full disk has left half a line at the end."""
        if size == 0:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"


def thin(samples: Sequence[Sample], count: int) -> dict[str, Any]:
    """At most count points of each indicator, as times and by name as values, None where one was not seen.

    Each point is the median of neighbours, so that an outlier does not stand for them.
    """
    ends = [len(samples) * index // max(count, 1) for index in range(count + 1)]
    groups = [samples[start:end] for start, end in itertools.pairwise(ends) if start < end]
    names = sorted({name for sample in samples for name in sample.values})
    return {
        "times": [round(statistics.median(sample.time for sample in group), 3) for group in groups],
        "indicators": {name: [_median(group, name) for group in groups] for name in names},
    }


def _median(group: Sequence[Sample], name: str) -> float | None:
    seen = [sample.values[name] for sample in group if name in sample.values]
    return round(statistics.median(seen), 3) if seen else None


def _samples(path: Path, at_most: int) -> Iterator[Sample]:
    """The samples in the last bytes of a file; lines that are none are passed over."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - at_most))
            lines = file.read(at_most).splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            sample = Sample(**json.loads(line))
            yield Sample(
                float(sample.time),
                str(sample.boot_id),
                {str(name): float(value) for name, value in sample.values.items()},
            )
        except (ValueError, TypeError, AttributeError):
            continue
