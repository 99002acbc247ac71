# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""host_vm, host_vm_info and host_vm_disk against a fake xl."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tarfile
from functools import partial

import pytest
from ansible.module_utils.basic import AnsibleModule

LIVE = "-b----"


@pytest.fixture
def machine(fake_xen, tmp_path, monkeypatch):
    """A host dom0 with a golden image, and a qemu-img that writes what it was asked for."""
    image = tmp_path / "image.raw"
    image.write_bytes(b"golden")
    qemu_img = tmp_path / "bin" / "qemu-img"
    qemu_img.write_text(
        '#!/bin/sh\n[ -e "$FAKE_XEN/faults/no-space" ] && { echo "No space left" >&2; exit 1; }\n'
        'for last; do :; done\necho "$*" >"$last"\n'
    )
    qemu_img.chmod(0o755)
    fake_xen.image = image
    fake_xen.directory = tmp_path / "host-vms"
    fake_xen.disk = tmp_path / "web1.raw"
    fake_xen.disk.write_bytes(b"disk")
    return fake_xen


@pytest.fixture
def start(machine, run, tmp_path):
    return partial(
        run,
        "host_vm",
        name="m1-b",
        slot="b",
        memory_mb=4096,
        image=str(machine.image),
        directory=str(machine.directory),
        console_log=str(tmp_path / "console" / "m1-b"),
        nics=[{"mac": "00:16:3e:00:01:0b"}],
        seed_files=[{"path": "/etc/hostname", "content": "m1-b\n"}],
    )


@pytest.fixture
def remove(machine, run):
    return partial(run, "host_vm", name="m1-b", state="absent", directory=str(machine.directory))


@pytest.fixture
def info(machine, run):
    return partial(run, "host_vm_info", directory=str(machine.directory))


@pytest.fixture
def disk(machine, run):
    return partial(run, "host_vm_disk", host_vm="m1-b", disk="web1-root", directory=str(machine.directory), timeout=5)


def changes(fake_xen):
    return [call for call in fake_xen.calls if call.split()[1] not in ("list", "info") and "info block" not in call]


def test_start(machine, start, tmp_path):
    result = start(cpus="2", extra_config={"tsc_mode": "native", "nographic": False})
    assert result["changed"]
    assert result["host_vm"] == {
        "name": "m1-b",
        "domid": 21,
        "state": "running",
        "memory_mb": 4096,
        "vcpus": 1,
        "slot": "b",
        "generation": 1,
        "created": result["host_vm"]["created"],
        "image_sha256": hashlib.sha256(b"golden").hexdigest(),
        "disks": [],
    }
    assert result["host_vm"]["created"].endswith("+00:00")
    assert result["diff"]["before"]["state"] == "absent"
    assert result["diff"]["after"]["state"] == "running"
    home = machine.directory / "m1-b"
    assert (home / "host-vm.cfg").read_text() == (
        'name = "m1-b"\n'
        'type = "hvm"\n'
        "memory = 4096\n"
        "vcpus = 1\n"
        "hap = 1\n"
        "nestedhvm = 1\n"
        'boot = "c"\n'
        'hdtype = "ahci"\n'
        f'disk = ["format=qcow2,vdev=hda,access=rw,target={home}/root.qcow2", '
        f'"format=raw,vdev=hdb,access=rw,target={home}/seed.tar"]\n'
        'vif = ["type=ioemu,mac=00:16:3e:00:01:0b,bridge=xenbr0,model=virtio-net-pci"]\n'
        'device_model_args_hvm = ["-device", "virtio-scsi-pci,id=vmbeam"]\n'
        f'serial = "file:{tmp_path}/console/m1-b"\n'
        'vga = "none"\n'
        "nographic = 0\n"
        "usb = 0\n"
        'on_poweroff = "destroy"\n'
        'on_reboot = "destroy"\n'
        'on_crash = "destroy"\n'
        'cpus = "2"\n'
        'tsc_mode = "native"\n'
    )
    assert (home / "root.qcow2").read_text() == (f"create -q -f qcow2 -F raw -b {machine.image} {home}/root.qcow2\n")
    assert json.loads((home / "generation.json").read_text())["slot"] == "b"
    with tarfile.open(home / "seed.tar") as tar:
        assert tar.getnames() == ["etc/hostname"]
    assert (tmp_path / "console").is_dir()


def test_secrets_are_for_root_only(machine, start):
    start()
    home = machine.directory / "m1-b"
    assert home.stat().st_mode & 0o077 == 0
    for name in ("seed.tar", "host-vm.cfg", "generation.json"):
        assert (home / name).stat().st_mode & 0o077 == 0


@pytest.fixture
def warnings(monkeypatch):
    """Where warnings go depends on what else of Ansible this process has loaded: caught at the source."""
    said = []
    monkeypatch.setattr(AnsibleModule, "warn", lambda _module, text: said.append(text))
    return said


@pytest.mark.parametrize(
    ("lock", "words"),
    [(".m1-b.lock", "others that start, stop or remove m1-b"), (".m1-b.create.lock", "another xl that creates m1-b")],
)
def test_one_start_at_a_time(machine, start, remove, lock, words):
    """The controller of the other one may be dead, its module too: then nobody but the kernel knows of it."""
    machine.directory.mkdir()
    with open(machine.directory / lock, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for act in (start, remove):
            refused = act(timeout=1)
            assert refused.failed
            assert words in refused["msg"]
        assert changes(machine) == []
        assert start(check=True)["changed"]
    assert start()["changed"]


def test_second_start_changes_nothing(machine, start, warnings):
    first = start()
    before = changes(machine)
    second = start()
    assert second["changed"] is False
    assert second["host_vm"] == first["host_vm"]
    assert changes(machine) == before
    assert warnings == []


def test_other_arguments_wait_for_the_next_start(machine, start, warnings):
    start()
    result = start(memory_mb=8000)
    assert result["changed"] is False
    assert warnings == ["m1-b runs with another configuration; the new one takes effect at its next start."]


def test_generations_count_over_both_slots(machine, start, remove):
    start(name="m1-a", slot="a")
    assert start()["host_vm"]["generation"] == 2
    remove(name="m1-a")
    assert start(name="m1-a", slot="a")["host_vm"]["generation"] == 3
    remove()
    assert start(generation=40)["host_vm"]["generation"] == 40


def test_check_mode_predicts(machine, start):
    result = start(check=True)
    assert result["changed"]
    assert result["host_vm"]["state"] == "running"
    assert (result["host_vm"]["memory_mb"], result["host_vm"]["generation"]) == (4096, 1)
    assert changes(machine) == []
    assert not machine.directory.exists()


def test_check_mode_refuses_what_would_fail(machine, start):
    machine.fault("no-memory")
    assert start(check=True).failed


def test_too_little_memory_is_told_in_mib(machine, start):
    machine.fault("no-memory")
    result = start()
    assert result.failed
    assert result["msg"].startswith("memory_mb: m1-b needs 4131 MiB with overhead, but only 100 MiB are free: 4031")
    assert (result["needed_memory_mb"], result["free_memory_mb"]) == (4131, 100)
    assert changes(machine) == []


def test_missing_image(machine, start):
    machine.image.unlink()
    result = start()
    assert result["msg"].startswith("image: ")
    assert changes(machine) == []


def test_name_of_another_domain(machine, start, remove, info):
    machine.add("source", "m1-b")
    for result in (start(), remove()):
        assert result.failed
        assert "not a host VM" in result["msg"]
    assert machine.seen("source") == {"m1-b": LIVE}
    assert info()["host_vms"] == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("create-refuses", "Unable to create domain"),
        ("create-fails-halfway", "device model: spawn failed"),
        ("create-crashes", "m1-b was created but is crashed already"),
        ("no-space", "No space left"),
    ],
)
def test_failed_start_leaves_nothing(machine, start, fault, words):
    machine.fault(fault)
    result = start()
    assert result.failed
    assert words in result["msg"]
    assert machine.seen("source") == {}
    assert not (machine.directory / "m1-b").exists()
    assert "left_behind" not in result
    machine.no_fault(fault)
    assert start()["changed"]


@pytest.mark.processes
def test_start_that_hangs_is_ended_and_undone(machine, start):
    machine.fault("create-hangs")
    result = start(timeout=3)
    assert "did not end within" in result["msg"]
    assert machine.seen("source") == {}
    assert not (machine.directory / "m1-b").exists()


def test_what_cannot_be_undone_is_told(machine, start):
    machine.fault("create-fails-halfway")
    machine.fault("destroy-source-fails")
    result = start()
    assert "spawn failed" in result["msg"]
    assert "Unable to destroy guest" in result["left_behind"]


def test_leftover_of_an_interrupted_start_is_replaced(machine, start):
    start()
    domains = machine.read("source")
    domains[0].update(flags="--p---", time=0.0)
    machine.write("source", domains)
    result = start()
    assert result["changed"]
    assert result["host_vm"]["state"] == "running"
    assert len(machine.seen("source")) == 1


@pytest.mark.parametrize(("flags", "changed"), [("--p---", True), ("---sc-", None), ("---s--", None)])
def test_other_states(machine, start, flags, changed):
    start()
    domains = machine.read("source")
    domains[0].update(flags=flags, time=7.0)
    machine.write("source", domains)
    result = start()
    if changed:
        assert result["changed"]
        assert result["host_vm"]["state"] == "blocked"
    else:
        assert "state=absent first" in result["msg"]
        assert machine.seen("source") == {"m1-b": flags}


def test_damaged_record(machine, start):
    start()
    (machine.directory / "m1-b" / "generation.json").write_text("{")
    result = start()
    assert "generation.json is damaged" in result["msg"]


@pytest.mark.parametrize("usable", [True, False])
def test_a_checksum_beside_the_image_is_believed_unless_it_is_older(machine, start, usable):
    stated = "a" * 64
    beside = machine.image.with_name(machine.image.name + ".sha256")
    beside.write_text(f"{stated}  {machine.image.name}\n")
    age = 0 if usable else 1_000_000_000
    seen = os.stat(machine.image)
    os.utime(beside, ns=(seen.st_atime_ns, seen.st_mtime_ns - age))
    real = hashlib.sha256(machine.image.read_bytes()).hexdigest()
    assert start()["host_vm"]["image_sha256"] == (stated if usable else real)


def test_an_image_is_described_without_a_trace(machine, info):
    sha256 = hashlib.sha256(b"golden").hexdigest()
    seen = info(image=str(machine.image))
    assert seen["image"] == {"path": str(machine.image), "exists": True, "sha256": sha256}
    assert seen["free_disk_mb"] > 0
    assert not machine.directory.exists()
    machine.image.unlink()
    seen = info(image=str(machine.image), directory=str(machine.directory / "deeper"))
    assert seen["image"] == {"path": str(machine.image), "exists": False, "sha256": None}
    assert seen["free_disk_mb"] is None
    assert "image" not in info()


def test_image_is_read_once(machine, start):
    start()
    seen = os.stat(machine.image)
    cache = json.loads((machine.directory / "image-sha256.json").read_text())
    cache["sha256"] = "remembered"
    (machine.directory / "image-sha256.json").write_text(json.dumps(cache))
    assert start(name="m1-a", slot="a")["host_vm"]["image_sha256"] == "remembered"
    machine.image.write_bytes(b"golde2")
    os.utime(machine.image, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
    assert start(name="m1-c", slot="a")["host_vm"]["image_sha256"] == hashlib.sha256(b"golde2").hexdigest()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name", "17"),
        ("memory_mb", 0),
        ("vcpus", -1),
        ("timeout", 0),
        ("image", "/a,b"),
        ("directory", "/a b"),
        ("console_log", "/a b"),
        ("seed_files", [{"path": "x", "content": ""}]),
        ("extra_config", {"Bad Key": 1}),
    ],
)
def test_bad_arguments_are_named(machine, start, argument, value):
    result = start(**{argument: value})
    assert result.failed
    assert result["msg"].startswith(f"{argument}: ")
    assert changes(machine) == []


def test_arguments_of_a_start_are_required(machine, run):
    assert "slot, memory_mb, image" in run("host_vm", name="m1-b")["msg"]


def test_remove_presses_the_power_button(machine, start, remove):
    start()
    result = remove()
    assert result["changed"]
    assert result["host_vm"]["state"] == "absent"
    assert machine.seen("source") == {}
    assert not (machine.directory / "m1-b").exists()
    assert changes(machine)[-1] == "source trigger 21 power"


def test_remove_destroys_what_does_not_go(machine, start, remove):
    start()
    machine.fault("shutdown-ignored")
    assert remove(timeout=0.5)["changed"]
    assert machine.seen("source") == {}
    assert changes(machine)[-1] == "source destroy 21"


def test_remove_at_once(machine, start, remove):
    start()
    remove(graceful=False)
    assert changes(machine)[-1] == "source destroy 21"
    assert "source trigger 21 power" not in machine.calls


def test_remove_twice(machine, start, remove):
    start()
    remove()
    assert remove()["changed"] is False


def test_remove_in_check_mode(machine, start, remove):
    start()
    result = remove(check=True)
    assert result["changed"]
    assert result["host_vm"]["state"] == "absent"
    assert machine.seen("source") == {"m1-b": "r-----"}
    assert (machine.directory / "m1-b").exists()


@pytest.mark.parametrize(("fault", "last"), [(None, "trigger 21 power"), ("shutdown-ignored", "destroy 21")])
def test_stop_leaves_what_it_is_started_again_from(machine, start, remove, fault, last):
    start()
    foreseen = remove(state="stopped", check=True)
    assert foreseen["changed"]
    assert (foreseen["host_vm"]["state"], foreseen["host_vm"]["generation"]) == ("absent", 1)
    assert machine.seen("source") == {"m1-b": "r-----"}
    if fault:
        machine.fault(fault)

    result = remove(state="stopped", timeout=0.5)

    assert result["changed"]
    assert (result["host_vm"]["state"], result["host_vm"]["generation"]) == ("absent", 1)
    assert machine.seen("source") == {}
    assert changes(machine)[-1] == f"source {last}"
    assert (machine.directory / "m1-b" / "root.qcow2").exists()
    assert remove(state="stopped")["changed"] is False
    assert "was lost, not removed" in start()["msg"]


def test_remove_files_of_a_host_vm_that_is_gone(machine, start, remove):
    start()
    machine.write("source", [])
    assert remove()["changed"]
    assert not (machine.directory / "m1-b").exists()


def test_info(machine, start, disk, info):
    start(name="m1-a", slot="a")
    start()
    disk(path=str(machine.disk))
    result = info()
    assert [host_vm["name"] for host_vm in result["host_vms"]] == ["m1-a", "m1-b"]
    assert result["host_vms"][1]["disks"] == [{"id": "web1-root", "path": str(machine.disk)}]
    assert result["hypervisor"]["free_memory_mb"] == 9000
    assert result["changed"] is False
    assert [host_vm["name"] for host_vm in info(name="m1-a")["host_vms"]] == ["m1-a"]
    assert info(name="m1-x")["host_vms"] == []


def test_wedged_host_vm_is_seen_and_can_be_removed(machine, start, info, remove):
    start()
    machine.fault("monitor-dead")
    (host_vm,) = info()["host_vms"]
    assert (host_vm["state"], host_vm["disks"]) == ("running", None)
    assert remove(graceful=False)["changed"]
    assert machine.seen("source") == {}


def test_info_of_a_host_vm_that_is_gone(machine, start, info):
    start()
    machine.write("source", [])
    (host_vm,) = info()["host_vms"]
    assert (host_vm["state"], host_vm["domid"], host_vm["generation"]) == ("absent", None, 1)


def test_info_without_xenstored(machine, info):
    machine.fault("xenstored-down-source")
    result = info()
    assert result.failed
    assert "xenstored is up" in result["msg"]


def test_attach(machine, start, disk):
    start()
    result = disk(path=str(machine.disk))
    assert result["changed"]
    assert result["disk"] == {"host_vm": "m1-b", "id": "web1-root", "path": str(machine.disk), "state": "attached"}
    assert result["diff"]["before"]["state"] == "detached"
    drive = machine.read("source")[0]["drives"]["vmbeam-web1-root"]
    assert drive["options"] == f"0 if=none,id=vmbeam-web1-root,file={machine.disk},format=raw,cache=writeback"
    assert drive["device"] == (
        "scsi-hd,bus=vmbeam.0,drive=vmbeam-web1-root,id=vmbeam-web1-root,serial=web1-root,share-rw=on"
    )
    assert disk(path=str(machine.disk))["changed"] is False


def test_attach_in_check_mode(machine, start, disk):
    start()
    assert disk(check=True, path=str(machine.disk))["changed"]
    assert machine.read("source")[0].get("drives", {}) == {}


def test_attach_with_another_path(machine, start, disk, tmp_path):
    start()
    disk(path=str(machine.disk))
    result = disk(path=str(machine.image))
    assert "disk: web1-root is attached already" in result["msg"]
    assert disk(check=True, path=str(machine.image)).failed


def test_attach_completes_what_was_interrupted(machine, start, disk):
    start()
    domains = machine.read("source")
    domains[0]["drives"] = {"vmbeam-web1-root": {"path": "/dev/other", "attached": False}}
    machine.write("source", domains)
    assert disk(path=str(machine.disk))["changed"]
    assert machine.read("source")[0]["drives"]["vmbeam-web1-root"]["path"] == str(machine.disk)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("drive-add-refused", "QEMU refused drive_add: Could not open"),
        ("device-add-refused", "QEMU refused device_add: Error: Bus 'vmbeam.0' not found"),
        ("monitor-dead", "Failed to connect to QMP"),
    ],
)
def test_failed_attach_leaves_nothing(machine, start, disk, fault, words):
    start()
    machine.fault(fault)
    result = disk(path=str(machine.disk))
    assert result.failed
    assert words in result["msg"]
    assert machine.read("source")[0].get("drives", {}) == {}


@pytest.mark.parametrize("fault", [None, "drive-stays"])
def test_detach(machine, start, disk, fault):
    start()
    disk(path=str(machine.disk))
    if fault:
        machine.fault(fault)
    assert disk(state="detached", check=True)["changed"]
    result = disk(state="detached")
    assert result["changed"]
    assert result["disk"]["state"] == "detached"
    assert machine.read("source")[0]["drives"] == {}
    assert disk(state="detached")["changed"] is False


def test_detach_that_the_host_vm_ignores(machine, start, disk):
    start()
    disk(path=str(machine.disk))
    machine.fault("device-del-ignored")
    result = disk(state="detached", timeout=0.5)
    assert "Waited 0.5 s for disk web1-root to be unplugged" in result["msg"]
    assert "vmbeam-web1-root" in machine.read("source")[0]["drives"]


@pytest.mark.parametrize("state", ["attached", "detached"])
def test_no_disk_is_touched_once_the_lock_is_lost(machine, start, disk, run, lock, state):
    start()
    if state == "detached":
        disk(path=str(machine.disk))
    run("host_lock", **lock, state="absent")
    before = machine.read("source")
    lost = disk(state=state, path=str(machine.disk), lock=lock)
    assert lost.failed
    assert "not reserved for a any more" in lost["msg"]
    assert machine.read("source") == before


def test_the_lock_is_renewed_as_a_disk_is_detached(start, disk, run, lock):
    start()
    assert not disk(state="detached", lock={**lock, "ttl": 50}).failed
    assert 40 < run("host_lock_info", path=lock["path"])["holder"]["expires_in_seconds"] <= 50
    assert not disk(state="detached", check=True, lock={**lock, "ttl": 100}).failed
    assert run("host_lock_info", path=lock["path"])["holder"]["expires_in_seconds"] <= 50


def test_disk_info(machine, start, disk, run):
    start()
    start(name="m1-a", slot="a")
    disk(path=str(machine.disk))
    disk(host_vm="m1-a", path=str(machine.disk))
    domains = machine.read("source")
    domains[0]["drives"]["vmbeam-web2-root"] = {"path": "/dev/other", "attached": False}
    machine.write("source", domains)
    before = changes(machine)
    directory = str(machine.directory)
    found = run("host_vm_disk_info", directory=directory)
    attached = {"id": "web1-root", "path": str(machine.disk), "state": "attached"}
    leftover = {"host_vm": "m1-b", "id": "web2-root", "path": "/dev/other", "state": "leftover"}
    assert found["disks"] == [{"host_vm": "m1-a", **attached}, {"host_vm": "m1-b", **attached}, leftover]
    assert found["changed"] is False
    assert run("host_vm_disk_info", directory=directory, disk="web2-root")["disks"] == [leftover]
    assert run("host_vm_disk_info", directory=directory, host_vm="m1-a")["disks"] == [{"host_vm": "m1-a", **attached}]
    assert changes(machine) == before
    assert run("host_vm_disk_info", directory=directory, disk="a b").failed


def test_disk_of_no_host_vm(machine, disk):
    result = disk(path=str(machine.disk))
    assert result["msg"] == "host_vm: m1-b is absent. Start it first."
    assert disk(state="detached")["changed"] is False


@pytest.mark.parametrize("path", ["/dev/sdb", "/dev/nvme0n1p2", "/dev/dm-3", "/dev/loop0"])
def test_a_disk_that_may_be_another_after_a_reboot_is_refused(machine, start, disk, path):
    start()
    result = disk(path=path)
    assert result["msg"].startswith(f"path: {path} may be another disk after a reboot")


def test_a_disk_that_a_host_vm_has_is_passed_on_whatever_its_name(machine, start, disk):
    start(name="m1-a", slot="a")
    disk(host_vm="m1-a", path=str(machine.disk))
    start()
    domains = machine.read("source")
    domains[0]["drives"]["vmbeam-web1-root"]["path"] = "/dev/sdzz"
    machine.write("source", domains)
    assert disk(path="/dev/sdzz")["msg"].startswith("path: /dev/sdzz does not exist")


@pytest.mark.parametrize("path", ["/dev/vg0/sdb", "/dev/disk/by-id/nvme-x", "/dev/mapper/dm-3", "/srv/sdb"])
def test_a_disk_that_stays_the_same_is_not_refused_for_its_name(machine, start, disk, path):
    start()
    assert disk(path=path)["msg"].startswith(f"path: {path} does not exist")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("disk", "a,b"), ("host_vm", "17"), ("path", "/no/such/disk"), ("path", "/a,b"), ("timeout", -1)],
)
def test_bad_arguments_of_a_disk(machine, start, disk, argument, value):
    start()
    result = disk(**{"path": str(machine.disk), argument: value})
    assert result["msg"].startswith(f"{argument}: ")
