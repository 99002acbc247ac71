# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""audit_entry on real files."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import resource
import stat
import syslog
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _audit
from ansible_collections.vmbeam.xen.plugins.modules import audit_entry


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log" / "audit.jsonl"


@pytest.fixture
def note(run, log):
    return partial(run, "audit_entry", path=str(log))


def entries(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_entries_are_appended_for_root_alone(note, log):
    result = note(entry={"event": "begin", "guests": ["web1"]})
    note(entry={"event": "end"})
    assert result["changed"]
    assert entries(log)[0] == result["entry"]
    assert [entry["event"] for entry in entries(log)] == ["begin", "end"]
    assert entries(log)[0]["guests"] == ["web1"]
    assert (mode(log), mode(log.parent)) == (0o600, 0o700)


def test_time_is_this_system_s_own(note, log):
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    note(entry={"event": "begin", "time": "1970-01-01T00:00:00+00:00"})
    assert before <= datetime.datetime.fromisoformat(entries(log)[0]["time"]) <= datetime.datetime.now(datetime.UTC)


def test_the_system_s_log_gets_the_same_line_if_asked(note, log, monkeypatch):
    told = []
    # Not in the real one, to which Ansible tells what it is called with.
    system = SimpleNamespace(
        LOG_AUTHPRIV=syslog.LOG_AUTHPRIV,
        LOG_NOTICE=syslog.LOG_NOTICE,
        openlog=lambda tag, facility: told.append((tag, facility)),
        syslog=lambda level, line: told.append((level, line)),
    )
    monkeypatch.setattr(audit_entry, "syslog", system)
    note(entry={"event": "begin"})
    note(entry={"event": "begin"}, syslog=True, check=True)
    assert told == []
    note(entry={"event": "end"}, syslog=True)
    line = log.read_text().splitlines()[-1]
    assert told == [("vmbeam", syslog.LOG_AUTHPRIV), (syslog.LOG_NOTICE, line)]


def test_check_mode_writes_nothing(note, log):
    assert note(entry={"event": "begin"}, check=True)["changed"]
    assert not log.parent.exists()


def test_no_entry_passes_for_another_one(note, log):
    note(entry={"guest": 'web1"}\n{"event":"forged"}\u2028\x1b[2J'})
    assert [list(entry) for entry in entries(log)] == [["time", "guest"]]
    assert log.read_bytes().isascii()


def test_mode_of_an_older_log_is_mended(note, log):
    log.parent.mkdir()
    log.touch(0o644)
    note(entry={"event": "begin"})
    assert mode(log) == 0o600


def test_link_is_not_followed(note, log, tmp_path):
    log.parent.mkdir()
    victim = tmp_path / "victim"
    victim.touch()
    log.symlink_to(victim)
    assert note(entry={"event": "begin"}).failed
    assert victim.read_text() == ""


def test_full_log_is_renamed_and_the_oldest_goes(log):
    for number in range(8):
        _audit.append(log, f"line {number}", max_bytes=14, keep=2)
    kept = {path.name: path.read_text().splitlines() for path in log.parent.iterdir()}
    assert kept == {
        "audit.jsonl": ["line 6", "line 7"],
        "audit.jsonl.1": ["line 4", "line 5"],
        "audit.jsonl.2": ["line 2", "line 3"],
    }


def test_half_an_entry_swallows_no_other_one(note, log):
    note(entry={"event": "begin"})
    with log.open("a") as file:
        file.write('{"time":"2026')
    note(entry={"event": "end"})
    first, half, last = log.read_text().splitlines()
    assert (json.loads(first)["event"], half, json.loads(last)["event"]) == ("begin", '{"time":"2026', "end")


def test_entry_that_does_not_fit_is_written_not_at_all(log):
    _audit.append(log, "first", max_bytes=1000, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError, match="only 4 of 7 bytes"):
            _audit.append(log, "second", max_bytes=1000, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.read_text() == "first\n"


def test_log_that_another_writer_holds_is_not_waited_for_for_ever(note, log, monkeypatch):
    log.parent.mkdir()
    monkeypatch.setattr(_audit, "LOCK_SECONDS", 0.01)
    holder = os.open(log.parent, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    result = note(entry={"event": "begin"})
    assert result.failed
    assert "another writer" in result["msg"]
    os.close(holder)
    assert not note(entry={"event": "begin"}).failed


@pytest.mark.parametrize("wrong", [{"path": "audit.jsonl"}, {"max_mb": 0}, {"keep": -1}])
def test_bad_arguments(note, log, wrong):
    assert next(iter(wrong)) in note(entry={}, **wrong)["msg"]
    assert not log.exists()
