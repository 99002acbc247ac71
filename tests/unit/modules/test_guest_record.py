# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""guest_record, what host_vm_info returns of it, and what host_vm does to the disk of a host VM that was lost."""

from __future__ import annotations

import json
from functools import partial

import pytest
from ansible.module_utils.basic import AnsibleModule

BY_ID = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_"


def config(name, *disks):
    listed = ", ".join(f'"format=raw,vdev=xvda,target={BY_ID}{disk}"' for disk in disks)
    return {"path": f"/etc/xen/guests/{name}.cfg", "content": f'name = "{name}"\ndisk = [{listed}]\n'}


def guest(name, *disks, state="blocked"):
    return {"name": name, "state": state, "disks": [{"id": disk, "target": BY_ID + disk} for disk in disks]}


@pytest.fixture
def machine(fake_xen, tmp_path):
    (tmp_path / "image.raw").write_bytes(b"golden")
    qemu_img = tmp_path / "bin" / "qemu-img"
    qemu_img.write_text('#!/bin/sh\nfor last; do :; done\necho "made" >"$last"\n')
    qemu_img.chmod(0o755)
    fake_xen.directory = tmp_path / "host-vms"
    return fake_xen


@pytest.fixture
def host_vm(machine, run, tmp_path):
    return partial(
        run,
        "host_vm",
        name="m1-a",
        slot="a",
        memory_mb=4096,
        image=str(tmp_path / "image.raw"),
        directory=str(machine.directory),
        console_log=str(tmp_path / "console"),
    )


@pytest.fixture
def note(machine, run):
    def note(*guests, configurations=(), name="m1-a", **options):
        seen = {"name": name, "guests": list(guests), "configurations": list(configurations)}
        return run("guest_record", directory=str(machine.directory), host_vms=[seen], **options)

    return note


@pytest.fixture
def recorded(machine, run):
    return lambda: run("host_vm_info", directory=str(machine.directory), guest_record=True)["guest_record"]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(AnsibleModule, "warn", lambda _module, text: said.append(text))
    return said


def lose(machine):
    """As a reboot does: no domain is left."""
    machine.write("source", [])


def test_what_it_takes_to_start_a_guest_again_is_recorded(machine, host_vm, note, recorded, warnings):
    host_vm()
    files = [config("web1", "web1-root"), config("db1", "db1-root")]
    result = note(guest("web1", "web1-root"), guest("app1", "app1-root"), configurations=files)
    assert result["changed"]
    assert result["host_vms"] == [
        {"name": "m1-a", "generation": 1, "disks": [], "guests": ["app1", "web1"], "configured": ["db1", "web1"]}
    ]
    assert "disk =" not in json.dumps(result)
    [entry] = recorded()
    assert (entry["host_vm"], entry["generation"]) == ("m1-a", 1)
    assert entry["guests"] == [
        {"name": "app1", "runs": True, "disks": ["app1-root"], "config": None},
        {"name": "db1", "runs": False, "disks": ["db1-root"], "config": files[1]},
        {"name": "web1", "runs": True, "disks": ["web1-root"], "config": files[0]},
    ]
    assert [text.split()[0] for text in warnings] == ["app1"]
    file = machine.directory / "guests.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in machine.directory.glob(".guests*")] == []

    before = file.read_bytes()
    again = note(guest("web1", "web1-root"), guest("app1", "app1-root"), configurations=files)
    assert again["changed"] is False
    assert file.read_bytes() == before


def test_check_mode_writes_nothing(machine, host_vm, note):
    host_vm()
    assert note(guest("web1"), check=True)["changed"]
    assert not (machine.directory / "guests.json").exists()


def test_a_guest_that_runs_keeps_the_configuration_that_is_gone(host_vm, note, recorded):
    host_vm()
    file = config("web1", "web1-root")
    note(guest("web1"), configurations=[file])
    note(guest("web1--incoming", state="paused"), guest("old1", state="shutdown"))
    guests = {guest["name"]: guest for guest in recorded()[0]["guests"]}
    assert guests["web1"]["config"] == file
    assert guests["web1"]["runs"]
    assert not guests["old1"]["runs"]


def test_names_that_no_guest_can_have_are_left_out(host_vm, note):
    host_vm()
    assert note(guest("../../etc/passwd"), guest("web1"))["host_vms"][0]["guests"] == ["web1"]


def test_a_host_vm_that_does_not_run_is_refused(machine, host_vm, note):
    host_vm()
    lose(machine)
    result = note(guest("web1"))
    assert result.failed
    assert "m1-a is not a host VM that runs" in result["msg"]


def test_guests_of_a_lost_host_vm_stay_recorded_until_they_are_seen(machine, host_vm, note, recorded):
    host_vm()
    files = [config("web1"), config("db1"), config("app1")]
    note(guest("web1"), guest("app1"), configurations=files)
    lose(machine)
    host_vm(previous_disk="keep")

    def left():
        lost = [entry for entry in recorded() if entry["generation"] == 1]
        return [guest["name"] for entry in lost for guest in entry["guests"]]

    note()
    assert left() == ["app1", "db1", "web1"]
    # db1 did not run, and is configured again. That web1 is configured does not make it run.
    note(guest("app1"), configurations=files[:2])
    assert left() == ["web1"]
    note(guest("app1"), configurations=files, gone=["web1"])
    assert [entry["generation"] for entry in recorded()] == [2]


def test_that_a_lost_host_vm_had_no_guests_is_kept_until_another_one_is_seen(machine, host_vm, note, recorded, run):
    host_vm()
    note()
    lose(machine)
    assert not run("guest_record", directory=str(machine.directory), host_vms=[])["changed"]
    assert len(recorded()) == 1


def test_a_host_vm_that_is_removed_on_purpose_is_forgotten(host_vm, note, recorded):
    host_vm()
    note(guest("web1"))
    host_vm(state="absent")
    assert recorded() == []


def test_a_damaged_record_is_told(machine, host_vm, note):
    host_vm()
    (machine.directory / "guests.json").write_text('{"host_vms": [{}]}')
    assert "is damaged" in note()["msg"]


@pytest.mark.parametrize("check", [False, True])
def test_the_disk_of_a_lost_host_vm_is_not_overwritten(machine, host_vm, note, check):
    host_vm()
    note(guest("web1"))
    lose(machine)
    disk = machine.directory / "m1-a" / "root.qcow2"
    disk.write_text("the only copy")
    result = host_vm(check=check)
    assert result.failed
    assert "only copy of its guests' configurations (recorded are web1)" in result["msg"]
    assert "playbooks/repair.yml" in result["msg"]
    assert disk.read_text() == "the only copy"


def test_the_disk_of_a_lost_host_vm_is_kept_or_discarded(machine, host_vm):
    host_vm()
    disk = machine.directory / "m1-a" / "root.qcow2"
    for number, (how, state) in enumerate((("keep", "started"), ("discard", "started"), ("keep", "absent")), 1):
        lose(machine)
        disk.write_text(f"disk {number}")
        result = host_vm(previous_disk=how, state=state)
        assert result["changed"]
        assert (result["kept_disk"] is not None) == (how == "keep")
    kept = sorted((machine.directory / ".kept").iterdir())
    assert [path.read_text() for path in kept] == ["disk 1", "disk 3"]
    assert [path.name.rsplit("-", 1)[0] for path in kept] == ["m1-a-1", "m1-a-3"]
    assert (machine.directory / ".kept").stat().st_mode & 0o077 == 0
    assert not disk.parent.exists()


def test_a_start_that_fails_keeps_what_was_there(machine, host_vm):
    host_vm()
    lose(machine)
    (machine.directory / "m1-a" / "root.qcow2").write_text("the only copy")
    machine.fault("create-refuses")
    result = host_vm(previous_disk="keep")
    assert result.failed
    [kept] = (machine.directory / ".kept").iterdir()
    assert result["kept_disk"] == str(kept)
    assert kept.read_text() == "the only copy"
    machine.no_fault("create-refuses")
    assert host_vm()["changed"]
