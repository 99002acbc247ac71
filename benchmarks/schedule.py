"""What is to be migrated how often, in which order, and what a budget of time allows."""

from __future__ import annotations

import collections
import dataclasses
import time
import typing

from .results import ZERO_COPY

#: Seconds around a migration: Ansible, sessions, meters, the guest's status.
_AROUND = 15.0
#: Method -> seconds, and seconds per MiB of the guest, in the emulated lab: a guess until one has been measured.
_GUESS = {
    "precopy-ssh": (40.0, 0.25),
    "precopy-tcp": (35.0, 0.25),
    "suspend-ssh": (30.0, 0.3),
    "suspend-tcp": (15.0, 0.3),
    "suspend-channel": (15.0, 0.3),
    ZERO_COPY: (7.0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Migrations of one guest by several methods in turn: what one row of the figures is made of."""

    kind: str  #: of the records: by_size, by_rate, web, others
    label: str
    size_mib: int
    wanted: dict[str, int]  #: method -> migrations, if the budget allows
    least: dict[str, int]  #: method -> migrations whatever the budget
    rate: int | None = None  #: pages rewritten per second; None: the guests' default
    vcpus: int = 1
    type: str = "pvh"
    together: bool = False  #: two such guests at once
    seconds_around: float = 120.0  #: a guess: the guest's start, the last check of its memory

    def holds(self, record: dict[str, typing.Any]) -> bool:
        """Return whether a record of its kind is of this cell."""
        about = {
            "by_size": ("size_mib", self.size_mib),
            "by_rate": ("rate", self.rate),
            "others": ("guest", self.label),
        }
        key, value = about.get(self.kind, ("", None))
        return record.get(key) == value

    def planned(self) -> dict[str, typing.Any]:
        """Return the cell as results.json tells it."""
        return {"cell": self.label, "wanted": self.wanted, "least": self.least}


class Budget:
    """The time that a run may take, and how much of it the rest of the run needs.

    It limits only what is beyond the least of each cell: without one number there is no figure at all.
    """

    def __init__(
        self, seconds: float, cells: typing.Sequence[Cell], clock: typing.Callable[[], float] = time.monotonic
    ) -> None:
        """:param seconds: 0: nothing but the least"""
        self._seconds = seconds
        self._cells = list(cells)
        self._clock = clock
        self._start = clock()
        self._place = -1
        self._done: collections.Counter[str] = collections.Counter()
        self._factor: dict[str, float] = {}

    def enter(self, cell: Cell) -> None:
        """Say that a cell begins; those before it are over."""
        self._place = self._cells.index(cell)
        self._done.clear()

    def done(self, method: str, seconds: float | None) -> None:
        """Count a migration of the present cell. seconds: that it took with all around it; None: it failed."""
        self._done[method] += 1
        if seconds is not None:
            self._factor[method] = seconds / _guess(method, self._cells[self._place].size_mib)

    def estimate(self, method: str, size_mib: int) -> float:
        """Return the seconds of a migration with all around it, by the last one of the same method."""
        return _guess(method, size_mib) * self._factor.get(method, 1.0)

    def least_left(self) -> float:
        """Return the seconds that the least of all that has not been measured takes."""
        seconds = 0.0
        for place, cell in enumerate(self._cells):
            if place < self._place:
                continue
            done = self._done if place == self._place else {}
            for method, count in cell.least.items():
                seconds += max(0, count - done.get(method, 0)) * self.estimate(method, cell.size_mib)
            if place > self._place:
                seconds += cell.seconds_around
        return seconds

    def affords(self, method: str) -> bool:
        """Return whether one more migration of the present cell leaves the time for the least of the rest."""
        more = self.estimate(method, self._cells[self._place].size_mib)
        return self.elapsed() + more + self.least_left() <= self._seconds

    def elapsed(self) -> float:
        """Return the seconds since the budget was made."""
        return self._clock() - self._start


def _guess(method: str, size_mib: int) -> float:
    fixed, per_mib = _GUESS[method]
    return _AROUND + fixed + per_mib * size_mib


def turns(cell: Cell, budget: Budget, given_up: typing.Container[str] = ()) -> typing.Iterator[str]:
    """Yield the methods of a cell in the order of their migrations, as long as the budget allows.

    Each migration goes back where the last one came from. So that no method always goes the same way, each round
    begins one method later, unless their number is odd.

    :param given_up: methods that are tried no more; it may grow meanwhile
    """
    for number in range(max(cell.wanted.values(), default=0)):
        methods = [method for method, count in cell.wanted.items() if number < count and method not in given_up]
        shift = 0 if len(methods) % 2 else number % max(1, len(methods))
        for method in (*methods[shift:], *methods[:shift]):
            if method not in given_up and (number < cell.least[method] or budget.affords(method)):
                yield method


def whole(cells: typing.Iterable[Cell]) -> list[Cell]:
    """Return the cells with all that is wanted as their least."""
    return [dataclasses.replace(cell, least=cell.wanted) for cell in cells]


class Wishes(typing.NamedTuple):
    """What the command line asks for."""

    sizes_mib: list[int]
    copy_sizes_mib: list[int]
    rates: list[int]
    rate_size_mib: int
    methods: list[str]
    rounds: int
    stock_rounds: int
    vcpus: list[int]
    web: bool
    together: bool


#: MiB of the guests with several CPUs, and of two that move at once.
VCPUS_SIZE_MIB = 512
TOGETHER_SIZE_MIB = 256


def cells(wishes: Wishes, baseline: str) -> list[Cell]:
    """Return the cells of a run, in their order.

    Large guests, of which stock migration takes longest, come late: a budget that is too short cuts there.
    """

    def counts(methods: typing.Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
        chosen = [method for method in methods if method in wishes.methods]
        wanted = {method: wishes.rounds if method == ZERO_COPY else wishes.stock_rounds for method in chosen}
        least = {method: wishes.rounds if method == ZERO_COPY else 1 for method in chosen}
        return wanted, least

    pair = (baseline, ZERO_COPY)
    found = []
    for rate in wishes.rates:
        label, size = f"{rate} pages/s", wishes.rate_size_mib
        found.append(Cell("by_rate", label, size, *counts(pair), rate=rate, seconds_around=60.0))
    if wishes.web:
        found.append(Cell("web", "web service", wishes.rate_size_mib, *counts(pair), rate=0, seconds_around=60.0))
    for size in wishes.sizes_mib:
        methods = wishes.methods if size in wishes.copy_sizes_mib else pair
        found.append(Cell("by_size", f"{size} MiB", size, *counts(methods)))
    if ZERO_COPY in wishes.methods:
        twice = {ZERO_COPY: 2}  # once each way
        for vcpus in wishes.vcpus:
            for kind in ("pvh", "hvm"):
                label = f"{kind}, {vcpus} vCPUs"
                cell = Cell("others", label, VCPUS_SIZE_MIB, twice, twice, vcpus=vcpus, type=kind, seconds_around=240.0)
                found.append(cell)
        if wishes.together:
            once = {ZERO_COPY: 1}
            size = TOGETHER_SIZE_MIB
            found.append(Cell("others", f"two of {size} MiB at once", size, once, once, together=True))
    return [cell for cell in found if cell.wanted]
