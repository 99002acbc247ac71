# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""guest_passage against a fake xl, a fake libxenctrl and a lock in a file."""

from __future__ import annotations

from functools import partial

import pytest


@pytest.fixture
def passage(run, fake_xen, library, lock, tmp_path):
    """Makes way for two guests from m1-a, a domain, to m1-b, a host VM with a device model."""
    image = tmp_path / "image.raw"
    image.write_bytes(b"golden")
    qemu_img = tmp_path / "bin" / "qemu-img"
    qemu_img.write_text('#!/bin/sh\nfor last; do :; done\necho "$*" >"$last"\n')
    qemu_img.chmod(0o755)
    disks = {f"{name}-root": str(tmp_path / f"{name}.raw") for name in ("web1", "db1")}
    for path in disks.values():
        (tmp_path / path).write_bytes(b"disk")
    directory = str(tmp_path / "host-vms")
    for slot in ("a", "b"):
        host_vm = {"name": f"m1-{slot}", "slot": slot, "memory_mb": 1024, "image": str(image), "directory": directory}
        nics = [{"mac": f"00:16:3e:00:01:0{slot}"}]
        assert not run("host_vm", **host_vm, console_log=str(tmp_path / "console" / slot), nics=nics).failed
    options = {"source": "m1-a", "destination": "m1-b", "disks": disks, "directory": directory, "timeout": 5}
    return partial(run, "guest_passage", **options, lock=lock)


def test_all_is_made_once(passage, library):
    first = passage(channel=True, sessions=2)
    assert first["changed"]
    assert [(disk["id"], disk["state"]) for disk in first["disks"]] == [
        ("web1-root", "attached"),
        ("db1-root", "attached"),
    ]
    numbers = {entry["session"] for entry in first["sessions"]}
    assert len(numbers) == 2
    assert first["channel"]["session"] not in numbers
    assert len(library.sessions) == 3


def test_what_is_there_stays(passage, run, library):
    first = passage(sessions=2)
    assert [len(first["diff"][when]["sessions"]) for when in ("before", "after")] == [0, 2]
    again = passage(sessions=2)
    assert not again["changed"]
    assert again["diff"]["before"] == again["diff"]["after"] == first["diff"]["after"]
    assert again["sessions"] == first["sessions"]
    assert again["channel"] is None
    assert len(library.sessions) == 2


def test_without_zero_copy_no_session_is_bound(passage, library):
    assert passage()["sessions"] == []
    assert library.sessions == {}


def test_check_mode_changes_nothing(passage, run, library, tmp_path):
    foreseen = passage(check=True, channel=True, sessions=1)
    assert foreseen["changed"]
    assert library.sessions == {}
    seen = run("host_vm_info", name="m1-b", directory=str(tmp_path / "host-vms"))["host_vms"][0]
    assert seen["disks"] == []


def test_nothing_is_touched_once_the_lock_is_lost(passage, run, library, lock, tmp_path):
    run("host_lock", **lock, state="absent")
    run("host_lock", **{**lock, "owner": "b"})
    run("host_lock", **{**lock, "owner": "b"}, state="absent")
    lost = passage(channel=True, sessions=1)
    assert lost.failed
    assert "not reserved for a any more" in lost["msg"]
    assert library.sessions == {}
    seen = run("host_vm_info", name="m1-b", directory=str(tmp_path / "host-vms"))["host_vms"][0]
    assert seen["disks"] == []


def test_the_lock_is_kept_for_as_long_as_is_said(passage, run, lock):
    passage(lock={**lock, "ttl": 50, "details": {"user": "alice"}})
    holder = run("host_lock_info", path=lock["path"])["holder"]
    assert 40 < holder["expires_in_seconds"] <= 50
    assert holder["details"] == {"user": "alice"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"destination": "m1-a"}, "m1-a is the source, too"),
        ({"sessions": -1}, "sessions: -1 is too small"),
        ({"disks": {"web1-root": "/nowhere.raw"}}, "disks.web1-root: /nowhere.raw does not exist"),
        ({"disks": {"web1-root": None}}, "disks.web1-root: 'None' is not usable"),
        ({"destination": "m1-c"}, "destination: m1-c is absent"),
        ({"source": "m1-c", "sessions": 1}, "source: m1-c is absent"),
    ],
)
def test_what_cannot_be_is_refused(passage, library, options, word):
    refused = passage(**options)
    assert refused.failed
    assert word in refused["msg"]
    assert library.sessions == {}


def test_nothing_is_attached_before_all_options_are_seen_to_be_right(passage, run, tmp_path):
    assert passage(sessions=-1).failed
    seen = run("host_vm_info", name="m1-b", directory=str(tmp_path / "host-vms"))["host_vms"][0]
    assert seen["disks"] == []
