# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""host_lock: one owner at a time, whatever the others do."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _host_lock
from ansible_collections.vmbeam.xen.plugins.module_utils._host_lock import HostLock, Lock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lock.json"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    class Clock:
        time = 1000.0

        def now(self) -> float:
            return self.time

    monkeypatch.setattr(_host_lock, "BootClock", Clock)
    return Clock


def test_a_free_machine_is_reserved_and_given_back(run, file, clock):
    taken = run("host_lock", owner="one", path=str(file), ttl=60, details={"user": "alice"})
    assert taken["changed"]
    assert taken["holder"]["owner"] == "one"
    assert taken["holder"]["details"] == {"user": "alice"}
    assert taken["holder"]["expires_in_seconds"] == 60
    assert taken["previous"] is None
    assert taken["diff"] == {"before": {"owner": None}, "after": {"owner": "one"}}
    given = run("host_lock", owner="one", path=str(file), state="absent")
    assert given["changed"]
    assert given["holder"] is None
    assert not file.exists()
    again = run("host_lock", owner="one", path=str(file), state="absent")
    assert not again["changed"]


def test_another_one_is_refused_and_told_who_and_for_how_long(run, file, clock):
    run("host_lock", owner="one", path=str(file), ttl=60, details={"user": "alice"})
    clock.time += 20
    refused = run("host_lock", owner="two", path=str(file))
    assert refused.failed
    for word in ("one", "alice", "20 s", "40 s"):
        assert word in refused["msg"]
    assert refused["holder"]["owner"] == "one"
    not_theirs = run("host_lock", owner="two", path=str(file), state="absent")
    assert not not_theirs["changed"]
    assert not_theirs["holder"]["owner"] == "one"


def test_the_owner_renews_without_a_change(run, file, clock):
    run("host_lock", owner="one", path=str(file), ttl=60)
    clock.time += 50
    renewed = run("host_lock", owner="one", path=str(file), ttl=60)
    assert not renewed["changed"]
    assert renewed["holder"]["age_seconds"] == 50
    assert renewed["holder"]["expires_in_seconds"] == 60
    clock.time += 50
    assert run("host_lock", owner="two", path=str(file)).failed


def test_a_lock_is_kept_only_by_the_owner_that_has_it(run, file, clock):
    for lost in (None, "two"):
        if lost:
            run("host_lock", owner=lost, path=str(file), ttl=60)
        refused = run("host_lock", owner="one", path=str(file), state="kept")
        assert refused.failed
        assert "not reserved for one any more" in refused["msg"]
        assert (refused["holder"] or {}).get("owner") == lost
        assert file.exists() == bool(lost)
    clock.time += 60  # expired, but nobody has had it since
    kept = run("host_lock", owner="two", path=str(file), ttl=60, state="kept")
    assert not kept["changed"]
    assert kept["holder"]["expires_in_seconds"] == 60


def test_an_expired_lock_is_anybodys_and_its_owner_learns_of_it(run, file, clock):
    run("host_lock", owner="one", path=str(file), ttl=60)
    clock.time += 60
    taken = run("host_lock", owner="two", path=str(file))
    assert taken["previous"] == "one"
    assert run("host_lock", owner="one", path=str(file)).failed


def test_a_lock_is_taken_over_only_from_the_owner_that_is_named(run, file, clock):
    run("host_lock", owner="one", path=str(file))
    assert run("host_lock", owner="three", takeover="two", path=str(file)).failed
    taken = run("host_lock", owner="three", takeover="one", path=str(file))
    assert taken["previous"] == "one"
    assert taken["holder"]["owner"] == "three"


def test_check_mode_predicts_and_writes_nothing(run, file, clock):
    predicted = run("host_lock", check=True, owner="one", path=str(file))
    assert predicted["changed"]
    assert not file.parent.exists()
    run("host_lock", owner="one", path=str(file))
    assert run("host_lock", check=True, owner="two", path=str(file)).failed
    assert run("host_lock", check=True, owner="one", path=str(file), state="absent")["changed"]
    assert file.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"owner": " "}, "owner"), ({"owner": "one", "ttl": 0}, "ttl"), ({"owner": "one", "path": "/a b"}, "path")],
)
def test_bad_arguments_are_named(run, file, arguments, words):
    refused = run("host_lock", **{"path": str(file), **arguments})
    assert refused.failed
    assert words in refused["msg"]


def test_a_file_that_is_no_lock_is_not_touched(run, file):
    file.parent.mkdir()
    file.write_text("{")
    refused = run("host_lock", owner="one", path=str(file))
    assert refused.failed
    assert str(file) in refused["msg"]
    assert file.read_text() == "{"


def compete(path: str, name: str, start, winners) -> None:
    start.wait(30)
    lock = HostLock(path)
    with lock.exclusive():
        if lock.holder() is None:
            lock.write(Lock(name, {}, 0.0, 1e12))
            winners.put(name)


def test_of_many_at_the_same_time_one_wins(file):
    context = multiprocessing.get_context("fork")
    start, winners = context.Event(), context.Queue()
    processes = [context.Process(target=compete, args=(str(file), str(number), start, winners)) for number in range(12)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert winners.get(timeout=10) == HostLock(str(file)).holder().owner
    assert winners.empty()
