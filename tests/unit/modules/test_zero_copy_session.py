# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""zero_copy_session, and the layer below it, against a fake libxenctrl."""

from __future__ import annotations

import errno

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _zerocopy
from fake_zerocopy import ABORTED, COMMITTED, COMMITTING, OPEN

LIVE = "-b----"


@pytest.fixture
def pair(fake_xen):
    """The domain ids of m1-a and m1-b."""
    return [
        fake_xen.add("source", name, LIVE, uuid=f"00000000-0000-0000-0000-00000000000{number}")
        for number, name in enumerate(("m1-a", "m1-b"), 1)
    ]


def test_a_session_is_bound_once(run, library, pair):
    first = run("zero_copy_session", source="m1-a", destination="m1-b")
    assert first["changed"]
    assert [(entry["source"], entry["destination"], entry["state"]) for entry in first["sessions"]] == [(*pair, "open")]
    again = run("zero_copy_session", source="m1-a", destination="m1-b")
    assert not again["changed"]
    assert again["sessions"] == first["sessions"]
    assert len(library.sessions) == 1


def test_as_many_as_guests_and_none_that_was_used(run, library, pair):
    used, committed = library.add(*pair, offered=512), library.add(*pair, COMMITTED, offered=512)
    other_way = library.add(*reversed(pair))
    result = run("zero_copy_session", source="m1-a", destination="m1-b", count=2)
    numbers = {entry["session"] for entry in result["sessions"]}
    assert len(numbers) == 2
    assert not numbers & {used, committed, other_way}


def test_the_limit_is_the_memory_of_the_source_or_what_is_given(run, library, pair):
    result = run("zero_copy_session", source="m1-a", destination="m1-b")
    assert result["sessions"][0]["max_frames"] == 256 << 8
    larger = run("zero_copy_session", source="m1-a", destination="m1-b", memory_mb=1024)
    assert larger["changed"]
    assert larger["sessions"][0]["max_frames"] == 1024 << 8


def test_check_mode_binds_and_ends_nothing(run, library, pair):
    assert run("zero_copy_session", check=True, source="m1-a", destination="m1-b")["changed"]
    assert not library.sessions
    library.add(*pair)
    assert run("zero_copy_session", check=True, source="m1-a", destination="m1-b", state="absent")["changed"]
    assert library.sessions[1].state == OPEN


@pytest.mark.parametrize("state", [OPEN, COMMITTING, COMMITTED, ABORTED])
def test_absent_ends_the_sessions_of_the_pair(run, library, pair, state):
    library.add(*pair, state)
    other_way = library.add(*reversed(pair))
    result = run("zero_copy_session", source="m1-a", destination="m1-b", state="absent")
    assert result["changed"]
    assert list(library.sessions) == [other_way]
    assert not run("zero_copy_session", source="m1-a", destination="m1-b", state="absent")["changed"]


def test_absent_ends_one_session(run, library, pair):
    kept, ended = library.add(*pair), library.add(*pair)
    result = run("zero_copy_session", source="m1-a", destination="m1-b", state="absent", session=ended)
    assert [entry["session"] for entry in result["sessions"]] == [ended]
    assert list(library.sessions) == [kept]


def test_one_that_the_hypervisor_keeps_does_not_keep_the_others(run, library, pair):
    kept, other = library.add(*pair, ABORTED), library.add(*pair)
    library.kept = {kept}
    result = run("zero_copy_session", source="m1-a", destination="m1-b", state="absent")
    assert result.failed
    assert f"Session {kept} cannot be ended" in result["msg"]
    assert "migrate-recover" in result["msg"]
    assert other not in library.sessions


def test_absent_host_vms_have_no_sessions(run, library, fake_xen):
    library.add(1, 2)
    assert not run("zero_copy_session", source="m1-a", destination="m1-b", state="absent")["changed"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"destination": "m1-a"}, "destination: m1-a is the source"),
        ({"destination": "m1-c"}, "destination: m1-c is absent"),
        ({"count": 0}, "count: 0"),
        ({"memory_mb": -1}, "memory_mb: -1"),
        ({"source": "1"}, "source: '1'"),
    ],
)
def test_bad_input_is_named(run, library, pair, arguments, words):
    result = run("zero_copy_session", **{"source": "m1-a", "destination": "m1-b", **arguments})
    assert result.failed
    assert words in result["msg"]
    assert not library.sessions


@pytest.mark.parametrize(
    ("call", "error", "state", "words"),
    [
        ("bind", errno.ENOSYS, "bound", "no zero-copy migration"),
        ("bind", errno.EOPNOTSUPP, "bound", "no HVM domain with HAP"),
        ("bind", errno.EBUSY, "bound", "just starting or ending"),
        ("bind", errno.ENOMEM, "bound", "too little memory"),
        ("bind", errno.EPERM, "bound", "a control domain"),
        ("bind", errno.EACCES, "bound", "security policy"),
        ("unbind", errno.EBUSY, "absent", "Session 1 cannot be ended"),
    ],
)
def test_refusals_of_the_hypervisor_are_explained(run, library, pair, call, error, state, words):
    if state == "absent":
        library.add(*pair)
    library.errors[call] = error
    result = run("zero_copy_session", source="m1-a", destination="m1-b", state=state)
    assert result.failed
    assert words in result["msg"]


def test_without_xen_there_is_a_clear_error(run, pair, monkeypatch, tmp_path):
    monkeypatch.setattr(_zerocopy, "_VERSION", tmp_path / "absent")
    result = run("zero_copy_session", source="m1-a", destination="m1-b")
    assert result.failed
    assert "No Xen runs below this system" in result["msg"]


def test_without_patched_tools_there_is_a_clear_error(run, pair, monkeypatch, tmp_path):
    for part, number in (("major", "4"), ("minor", "3")):
        (tmp_path / part).write_text(f"{number}\n")
    monkeypatch.setattr(_zerocopy, "_VERSION", tmp_path)
    result = run("zero_copy_session", source="m1-a", destination="m1-b")
    assert result.failed
    assert "no zero-copy migration: libxenctrl.so.4.3: " in result["msg"]


def test_info_of_a_machine_names_the_host_vms(run, library, pair):
    library.add(*pair)
    library.add(pair[0], 99, COMMITTED, offered=512)
    library.sessions[2].flags = 1 << 1 | 1 << 4
    result = run("zero_copy_info")
    assert not result["changed"]
    assert result["capable"] is False
    assert [(entry["source_name"], entry["destination_name"], entry["state"]) for entry in result["sessions"]] == [
        ("m1-a", "m1-b", "open"),
        ("m1-a", None, "committed"),
    ]
    assert (result["sessions"][1]["closed"], result["sessions"][1]["dead"]) == (["source"], ["destination"])


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("""echo '{"version": 3, "channels": []}'""", 3),
        # Of a daemon that does not tell; of one that is not there.
        ("""echo '{"channels": []}'""", None),
        ("echo nothing", None),
        ("exit 255", None),
    ],
)
def test_info_of_a_host_vm_tells_the_version_of_its_channel(
    run, fake_xen, library, monkeypatch, tmp_path, script, version
):
    command = tmp_path / "vmbeam-channel"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    library.guest = True
    assert run("zero_copy_info")["channel_version"] == version
    library.guest = False
    assert run("zero_copy_info")["channel_version"] is None


def test_info_of_a_host_vm_tells_the_owner(run, library):
    library.guest = True
    library.add(1, 2)
    result = run("zero_copy_info")
    assert result["capable"] is True
    assert [(entry["owner"], entry["source_name"]) for entry in result["sessions"]] == [(7, None)]


@pytest.fixture
def stock(library):
    """The answers of a hypervisor without our patches to patched tools: which domain is looked at before what to do."""
    for call in ("query", "guest_query", "guest_capable"):
        library.errors[call] = errno.ESRCH
    library.errors["bind"] = errno.ENOSYS
    return library


@pytest.mark.parametrize("state", ["bound", "absent"])
def test_a_hypervisor_without_the_patches_is_recognised(run, stock, pair, state):
    result = run("zero_copy_session", source="m1-a", destination="m1-b", state=state)
    assert result.failed
    assert "no zero-copy migration. Install the patched packages" in result["msg"]


def test_info_of_a_hypervisor_without_the_patches_is_no_failure(run, stock):
    result = run("zero_copy_info")
    assert (result["capable"], result["sessions"]) == (False, [])


@pytest.mark.parametrize("error", [errno.ESRCH, errno.ENOSYS, errno.EOPNOTSUPP])
def test_guests_cannot_move_without_copies_where_a_hypervisor_has_no_patches(library, error):
    """That of this host VM itself, and as it tells of the one below."""
    library.errors["guest_capable"] = error
    with pytest.raises(_zerocopy.Unsupported):
        _zerocopy.require_capable()


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES])
def test_a_refusal_is_not_taken_for_a_lack_of_patches(library, error):
    library.errors["guest_capable"] = error
    with pytest.raises(PermissionError):
        _zerocopy.require_capable()


def test_a_host_vm_that_has_gone_is_not_taken_for_a_lack_of_patches(run, library, pair):
    library.errors["bind"] = errno.ESRCH
    result = run("zero_copy_session", source="m1-a", destination="m1-b")
    assert result["msg"] == "One of the two host VMs does not run."


def test_info_without_patched_tools_is_no_failure(run, monkeypatch):
    def load():
        raise _zerocopy.Unsupported("none")

    monkeypatch.setattr(_zerocopy, "_load", load)
    result = run("zero_copy_info")
    assert (result["capable"], result["sessions"]) == (False, [])
