# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role rejuvenate as Ansible runs it, on machines that are files: all but the modules that act on Xen is real."""

from __future__ import annotations

import datetime
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.vmbeam.xen.plugins.module_utils._host_lock import HostLock, Lock
from checkout import environment

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).parent / "fakes" / "machine" / "module.py"
FAKED = (
    "guest",
    "guest_info",
    "guest_migrate",
    "guest_passage",
    "guest_record",
    "host_vm",
    "host_vm_disk",
    "host_vm_info",
    "wait_for_guest",
    "wait_for_xen",
    "zero_copy_info",
    "zero_copy_session",
)
LOGIN = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 me@home"
TIMEOUT = 600  # seconds; a run takes a tenth of that

PLAYBOOK = [
    {
        "hosts": "vmbeam_hosts",
        "serial": "{{ vmbeam_serial | default(1) }}",
        "gather_facts": False,
        "tasks": [{"ansible.builtin.import_role": {"name": "vmbeam.xen.rejuvenate"}}],
    }
]
# Stands in for role host_vm, which makes keys and waits for connections; see real_host_vm().
START = [
    {
        "vmbeam.xen.host_vm": {
            "name": "{{ host_vm_slots[host_vm_slot].name }}",
            "state": "started",
            "slot": "{{ host_vm_slot }}",
            "generation": "{{ host_vm_generation | int }}",
            "previous_disk": "{{ host_vm_previous_disk }}",
        }
    }
]


# In place of ssh: breaks as often as its folder says, else runs the command here.
SSH = """#!/bin/sh
for command; do :; done
case $command in ControlPersist) exit 0 ;; esac
breaks=$(cat {folder}/breaks)
echo $((breaks - 1)) > {folder}/breaks
[ "$breaks" -le 0 ] || {{ echo "kex_exchange_identification: Connection closed by remote host" >&2; exit 255; }}
exec sh -c "$command"
"""


class Machines:
    """Machines m1, m2, ... with an old host VM in slot a, and the role to run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, Any] = {}
        self.dom0s: dict[str, Any] = {}
        (folder / "golden.raw").write_bytes(b"image")
        (folder / "disks").mkdir()
        (folder / "play.yml").write_text(yaml.safe_dump(PLAYBOOK))
        collection = folder / "collections" / "ansible_collections" / "vmbeam" / "xen"
        for kind in ("plugins", "roles", "meta"):
            shutil.copytree(ROOT / kind, collection / kind, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "galaxy.yml", collection)
        shutil.rmtree(collection / "roles" / "host_vm")
        self.start = collection / "roles" / "host_vm" / "tasks" / "main.yml"
        self.start.parent.mkdir(parents=True)
        self.start.write_text(yaml.safe_dump(START))
        # Where udev shows a disk that was plugged in.
        guest = collection / "plugins" / "module_utils" / "_guest.py"
        guest.write_text(guest.read_text().replace("/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_", f"{folder}/disks/"))
        for name in FAKED:
            text = FAKE.read_text().replace("@NAME@", name).replace("@FOLDER@", str(folder))
            (collection / "plugins" / "modules" / f"{name}.py").write_text(text)

    def add(self, name: str, *guests: str, **world: Any) -> None:
        number = len(self.hosts) + 1
        slots = {slot: f"10.0.{number}.2{slot == 'b':d}" for slot in ("a", "b")}
        configurations = self.folder / f"{name}-guests"
        configurations.mkdir()
        for guest in guests:
            disk = self.folder / "disks" / f"{guest}-root"
            disk.touch()
            (configurations / f"{guest}.cfg").write_text(f'name = "{guest}"\ndisk = ["target={disk}"]\n')
        old = {
            "domid": 1,
            "slot": "a",
            "generation": 1,
            "created": "2023-11-01T00:00:00+00:00",
            "memory_mb": 4096,
            "disks": [{"id": f"{guest}-root", "path": f"/guests/{guest}.raw"} for guest in guests],
            "guests": {guest: self.guest(guest) for guest in guests},
        }
        self.write(
            name,
            {
                "host_vms": {f"{name}-a": old},
                "next_host_vm": {},
                "addresses": {address: f"{name}-{slot}" for slot, address in slots.items()},
                "stopped": {},
                "lost": {},
                "kept": [],
                "faults": [],
                # Commands that run as a guest moves, by "GUEST to HOST_VM".
                "along": {},
                "calls": [],
                **world,
            },
        )
        self.hosts[name] = {
            "vmbeam_slots": {
                slot: {"name": f"{name}-{slot}", "address": f"{address}/24", "mac": f"00:16:3e:00:0{number}:0{slot}"}
                for slot, address in slots.items()
            },
            "vmbeam_state_file": f"{self.folder}/{name}-state.json",
            "vmbeam_plan_file": f"{self.folder}/{name}-plan.json",
            "vmbeam_report_file": f"{self.folder}/{name}-report.json",
            "vmbeam_lock_file": f"{self.folder}/{name}-lock/lock.json",
            **self.place(name),
        }
        self.dom0s |= {f"{name}-{slot}": self.place(f"{name}-{slot}") for slot in slots}

    def real_host_vm(self) -> dict[str, Any]:
        """Have role host_vm as it is; return the variables that it needs."""
        role = self.start.parents[1]
        shutil.rmtree(role)
        shutil.copytree(ROOT / "roles" / "host_vm", role)
        return {"vmbeam_authorized_keys": [LOGIN], "vmbeam_keys_directory": f"{self.folder}/keys"}

    def seed_files(self, host_vm: str) -> dict[str, str]:
        """The files with which a host VM was started, by role host_vm as it is."""
        items = self.world(host_vm.split("-")[0])["host_vms"][host_vm]["seed_files"]
        files = {item["path"]: item["content"] for item in items}
        assert len(files) == len(items)  # module host_vm refuses a file that is given twice
        return files

    def place(self, dom0: str) -> dict[str, str]:
        """By which the stand-ins know in which dom0 they run."""
        return {"ansible_remote_tmp": f"{self.folder}/remote/{dom0}"}

    def over_ssh(self, breaks: int) -> dict[str, str]:
        """The variables of a dom0 whose connections break as often as is said, and as file `breaks` says later."""
        ssh = self.folder / "ssh"
        ssh.write_text(SSH.format(folder=self.folder))
        ssh.chmod(0o755)
        (self.folder / "breaks").write_text(str(breaks))
        return {
            "ansible_connection": "ssh",
            "ansible_ssh_executable": str(ssh),
            "ansible_ssh_transfer_method": "piped",
        }

    def guest(self, name: str, **values: Any) -> dict[str, Any]:
        disk = {"id": f"{name}-root", "target": f"{self.folder}/disks/{name}-root", "vdev": "xvda"}
        return {"state": "blocked", "type": "pvh", "memory_mb": 128, "vcpus": 1, "disks": [disk], **values}

    def world(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text())

    def write(self, name: str, world: dict[str, Any]) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(world))

    def read(self, name: str, what: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}-{what}.json").read_text())

    def where(self, name: str) -> dict[str, list[str]]:
        """The guests of each host VM of a machine."""
        return {vm: sorted(values["guests"]) for vm, values in self.world(name)["host_vms"].items()}

    def moves(self, name: str) -> list[str]:
        return [
            call.removeprefix("guest_migrate ")
            for call in self.world(name)["calls"]
            if call.startswith("guest_migrate ")
        ]

    def audited(self, log: str = "log") -> list[dict[str, Any]]:
        """What an audit log has, of a path in the folder."""
        return [json.loads(line) for line in (self.folder / log).read_text().splitlines()]

    def run(self, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        common = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "vmbeam_host_vm_memory_mb": 4096,
            "vmbeam_host_vm_directory": f"{self.folder}/host-vms",
            "vmbeam_guest_hypervisor_image": f"{self.folder}/golden.raw",
            "vmbeam_overlay_reserve_mb": 0,
            "vmbeam_gate_timeout": 6,
            "vmbeam_audit_file": "",
        }
        children = {"vmbeam_hosts": {"hosts": self.hosts}, "vmbeam_guest_dom0s": {"hosts": self.dom0s}}
        inventory = self.folder / "inventory.yml"
        inventory.write_text(yaml.safe_dump({"all": {"vars": common, "children": children}}, sort_keys=False))
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(inventory)]
        done = subprocess.run(
            [*command, str(self.folder / "play.yml"), *arguments, "-e", json.dumps(variables)],
            env=environment(ANSIBLE_COLLECTIONS_PATH=str(self.folder / "collections")),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        print(done.stdout, done.stderr)
        return done


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


@pytest.fixture
def changed(machines: Machines) -> Callable[..., None]:
    """Changes something of a guest on machine m1."""

    def change(name: str, **values: Any) -> None:
        world = machines.world("m1")
        world["host_vms"]["m1-a"]["guests"][name] |= values
        machines.write("m1", world)

    return change


def test_a_host_vm_that_a_rejuvenation_starts_gets_the_files_of_the_inventory(machines):
    """Given as text; a guest's configuration is as it is in the old host VM, and not as the inventory has it."""
    machines.add("m1", "app1")
    configuration = f"{machines.folder}/m1-guests/app1.cfg"
    given = [
        {"path": "/etc/systemd/network/30-storage.network", "content": "[Match]\nName=eth1\n"},
        {"path": configuration, "content": 'name = "app1"\nmemory = 64\n'},
    ]

    done = machines.run(vmbeam_seed_files=json.dumps(given), **machines.real_host_vm())

    assert done.returncode == 0
    files = machines.seed_files("m1-b")
    assert files["/etc/hostname"] == "m1-b\n"
    assert files["/etc/systemd/network/30-storage.network"] == "[Match]\nName=eth1\n"
    assert files[configuration] == Path(configuration).read_text()


@pytest.fixture
def shut_down(machines: Machines) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Shuts the machines down as playbooks/reboot.yml does; with its last step in another run."""
    (role,) = PLAYBOOK[0]["tasks"][0].values()
    tasks = [{"ansible.builtin.include_role": {**role, "tasks_from": "shut_down"}}]
    play = machines.folder / "play.yml"

    def run(*arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        play.write_text(yaml.safe_dump([{**PLAYBOOK[0], "tasks": tasks}]))
        done = machines.run(*arguments, **variables)
        play.write_text(yaml.safe_dump(PLAYBOOK))
        return done

    return run


def test_a_machine_that_is_shut_down_comes_back_as_it_was(machines, shut_down):
    machines.add("m1", "app1", "web1")
    world = machines.world("m1")
    world["host_vms"]["m1-a"]["guests"].pop("web1")  # configured, and stopped
    machines.write("m1", world)

    foreseen = shut_down("--check")

    assert foreseen.returncode == 0
    assert "shut down app1" in foreseen.stdout
    assert "power off m1-a" in foreseen.stdout
    assert "shut down web1" not in foreseen.stdout
    assert machines.world("m1")["calls"] == []

    assert shut_down().returncode == 0

    assert machines.world("m1")["calls"] == ["guest app1 m1-a asked", "guest app1 m1-a absent", "host_vm m1-a stopped"]
    # The machine stays reserved for this run.
    assert (machines.folder / "m1-lock" / "lock.json").exists()
    assert shut_down().returncode == 0
    assert len(machines.world("m1")["calls"]) == 3

    assert machines.run(vmbeam_repair_only=True).returncode == 0

    assert machines.where("m1") == {"m1-a": ["app1"]}
    assert machines.world("m1")["host_vms"]["m1-a"]["generation"] == 2


def test_guests_that_were_shut_down_beside_one_that_was_not_are_started_again(machines, shut_down):
    machines.add("m1", "app1", "web1", faults=["web1 stays up"])
    done = shut_down()
    assert done.returncode != 0
    assert "web1 did not shut down within 300 s" in done.stdout
    assert machines.where("m1") == {"m1-a": ["web1"]}
    # Whoever looks at the machine meanwhile does not take app1 for stopped on purpose.
    refused = machines.run()
    assert refused.returncode != 0
    assert "app1 ran before a reboot that was cut, and run nowhere now" in refused.stdout

    assert machines.run(vmbeam_repair_only=True).returncode == 0

    assert machines.where("m1") == {"m1-a": ["app1", "web1"]}
    assert machines.read("m1", "state")["down"] is None

    # Cut after one of them: the next run stops the other one, and both come back.
    assert shut_down().returncode != 0
    assert shut_down(vmbeam_destroy_on_timeout=True).returncode == 0
    assert machines.where("m1") == {}
    assert machines.run(vmbeam_repair_only=True).returncode == 0
    assert machines.where("m1") == {"m1-a": ["app1", "web1"]}


def test_no_guest_is_shut_down_that_could_not_be_started_again(machines, shut_down):
    machines.add("m1", "app1", "web1")
    (machines.folder / "m1-guests" / "web1.cfg").unlink()
    done = shut_down()
    assert done.returncode != 0
    assert "web1 could not be started again: its configuration is recorded nowhere" in done.stdout
    assert machines.world("m1")["calls"] == []


def test_a_guest_that_is_paused_keeps_its_machine_from_being_shut_down(machines, shut_down, changed):
    machines.add("m1", "app1", "web1")
    changed("web1", state="paused")
    done = shut_down()
    assert done.returncode != 0
    assert "web1 is paused" in done.stdout
    assert machines.world("m1")["calls"] == []


@pytest.mark.parametrize(("options", "moves"), [({}, 1), ({"vmbeam_zero_copy_transport": "channel"}, 0)])
def test_between_two_versions_of_the_channel_guests_go_without_one(machines, options, moves):
    machines.add("m1", "app1", next_host_vm={"channel_version": 4})
    done = machines.run(**options)
    assert done.returncode == (0 if moves else 2)
    assert machines.moves("m1") == ["app1 m1-a m1-b zero_copy"] * moves
    words = "goes by ssh: the channel of m1-a is of version 3" if moves else "there is no channel that is up"
    assert words in done.stdout


@pytest.mark.parametrize("strategy", ["precopy", "suspend"])
def test_guests_that_are_copied_go_by_a_channel_if_that_is_wanted(machines, strategy):
    machines.add("m1", "app1")
    options = {"vmbeam_strategy": strategy, "vmbeam_transport": "channel"}
    assert machines.run(**options).returncode == 0
    assert machines.moves("m1") == [f"app1 m1-a m1-b {strategy}"]
    assert machines.world("m1")["transports"] == ["channel"]


@pytest.mark.parametrize("other", [{"channel_version": 4}, {"zero_copy": False}])
def test_no_guest_is_copied_by_a_channel_that_cannot_be(machines, other):
    machines.add("m1", "app1", next_host_vm=other)
    done = machines.run(vmbeam_strategy="precopy", vmbeam_transport="channel")
    assert done.returncode == 2
    assert "app1 cannot be copied by memory that two host VMs share" in done.stdout
    assert "set vmbeam_transport to ssh" in done.stdout
    assert machines.moves("m1") == []
    assert machines.where("m1") == {"m1-a": ["app1"]}


def test_no_channel_is_left_between_host_vms_that_both_stay(machines, changed):
    machines.add("m1", "app1", "gpu1")
    changed("gpu1", devices=[{"type": "pci", "id": "0000:03:00.0"}])
    options = {"vmbeam_strategy": "auto", "vmbeam_guest_unmovable_policies": {"gpu1": "leave_and_skip"}}
    assert machines.run(**options).returncode == 0
    assert machines.where("m1") == {"m1-a": ["gpu1"], "m1-b": ["app1"]}
    assert "zero_copy_session m1-a m1-b channel absent" in machines.world("m1")["calls"]


def test_each_guest_moves_as_it_can(machines, changed):
    """auto without zero-copy in the new host VM, one pinned guest, one with a device that stays; then that one goes."""
    machines.add("m1", "app1", "db1", "gpu1", next_host_vm={"zero_copy": False})
    changed("gpu1", devices=[{"type": "pci", "id": "0000:03:00.0"}])
    options = {
        "vmbeam_strategy": "auto",
        "vmbeam_auto_strategies": ["zero_copy", "precopy", "suspend", "cold"],
        "vmbeam_pinned_guests": ["db1"],
        "vmbeam_guest_unmovable_policies": {"gpu1": "leave_and_skip"},
    }

    done = machines.run(**options)

    assert done.returncode == 0
    assert machines.where("m1") == {"m1-a": ["gpu1"], "m1-b": ["app1", "db1"]}
    # Before m1-b runs, it is taken to offer zero-copy.
    planned = {guest["name"]: guest["strategy"] for guest in machines.read("m1", "plan")["guests"]}
    assert planned == {"app1": "zero_copy", "db1": "cold", "gpu1": None}
    assert machines.moves("m1") == ["app1 m1-a m1-b precopy", "db1 m1-a m1-b cold"]
    report = machines.read("m1", "report")
    assert report["guests_left"] == ["gpu1"]
    reasons = {guest["guest"]: guest["strategy_reason"] for guest in report["guests"]}
    assert "not zero_copy, as the hypervisor below m1-b" in reasons["app1"]
    assert "vmbeam_pinned_guests" in reasons["db1"]
    assert "m1-a is kept for gpu1" in done.stdout

    again = machines.run(**options)
    assert again.returncode == 0
    assert "m1: skip: all that can move is in m1-b" in again.stdout
    assert len(machines.moves("m1")) == 2

    changed("gpu1", devices=[])
    assert machines.run(**options).returncode == 0
    assert machines.where("m1") == {"m1-b": ["app1", "db1", "gpu1"]}
    assert machines.read("m1", "state")["run"] is None


@pytest.mark.parametrize("policy", ["skip_host", "precopy", "suspend"])
def test_a_guest_that_cannot_go_by_zero_copy_is_dealt_with_as_its_policy_says(machines, changed, policy):
    """web1 is of type pv, whose memory cannot be passed on; app1 could go."""
    machines.add("m1", "app1", "web1")
    changed("web1", type="pv")

    done = machines.run(vmbeam_unmovable_policy=policy, vmbeam_guest_types=["pvh", "hvm", "pv"])

    assert done.returncode == 0
    because = "guest web1 is of type pv, whose memory cannot be passed on"
    if policy == "skip_host":
        assert f"m1: skip: the machine is left alone: {because}" in done.stdout
        assert machines.world("m1")["calls"] == []
        assert machines.where("m1") == {"m1-a": ["app1", "web1"]}
    else:
        assert machines.moves("m1") == ["app1 m1-a m1-b zero_copy", f"web1 m1-a m1-b {policy}"]
        assert machines.where("m1") == {"m1-b": ["app1", "web1"]}
        reasons = {guest["guest"]: guest["strategy_reason"] for guest in machines.read("m1", "report")["guests"]}
        assert reasons["web1"] == f"{policy} by the policy for guests that cannot move: {because}"


def test_each_of_two_guests_that_move_side_by_side_has_its_own_account(machines):
    machines.add("m1", "app1", "db1", "web1", faults=["db1 to m1-b"])
    done = machines.run(vmbeam_parallel_guests=2, vmbeam_guest_strategies={"db1": "precopy"})
    assert done.returncode != 0
    assert machines.where("m1") == {"m1-a": ["db1", "web1"], "m1-b": ["app1"]}
    app1, db1 = machines.read("m1", "report")["guests"]
    assert (app1["guest"], app1["result"], app1["session"], app1["seconds"]) == ("app1", "moved", 1, 2.0)
    assert (db1["guest"], db1["result"], db1["session"], db1["seconds"]) == ("db1", "failed", None, None)
    assert app1["started"] == db1["started"] < app1["finished"]
    assert "db1 cannot go to m1-b" in db1["text"]


@pytest.mark.parametrize("parallel", [1, 2])
def test_of_a_guest_that_may_still_be_on_its_way_nothing_is_undone(machines, parallel):
    """Its migration gave no result: app1 goes back, web1 keeps its disks in both host VMs, and both are kept."""
    machines.add("m1", "app1", "web1", faults=["web1 on its way to m1-b"])

    done = machines.run(vmbeam_on_failure="rollback", vmbeam_undo_on_failure=True, vmbeam_parallel_guests=parallel)

    assert done.returncode != 0
    assert "web1: the connection broke" in done.stdout
    assert machines.moves("m1") == [
        "app1 m1-a m1-b zero_copy",
        "web1 m1-a m1-b zero_copy",
        "app1 m1-b m1-a zero_copy",
    ]
    assert machines.where("m1") == {"m1-a": ["app1", "web1"], "m1-b": []}
    disks = {name: {disk["id"] for disk in vm["disks"]} for name, vm in machines.world("m1")["host_vms"].items()}
    assert disks == {"m1-a": {"app1-root", "web1-root"}, "m1-b": {"web1-root"}}


def test_guests_that_arrive_on_a_machine_that_is_not_reserved_any_more_are_told(machines):
    """The lock goes while they leave: nothing more is done, and the report has what became of each."""
    machines.add("m1", "app1", "web1", along={"web1 to m1-b": f"rm {machines.folder}/m1-lock/lock.json"})

    done = machines.run(vmbeam_parallel_guests=2)

    assert done.returncode != 0
    assert "app1: it has arrived, but nothing more is done" in done.stdout
    assert "This machine is not reserved for" in done.stdout
    report = machines.read("m1", "report")
    accounts = [(told["guest"], told["result"], told["seconds"]) for told in report["guests"]]
    assert accounts == [("app1", "failed", 2.0), ("web1", "failed", 2.0)]
    assert "Guest app1 is in m1-b (blocked). Guest web1 is in m1-b (blocked)." in report["failure"]["summary"]
    disks = {name: {disk["id"] for disk in vm["disks"]} for name, vm in machines.world("m1")["host_vms"].items()}
    assert disks == {"m1-a": {"app1-root", "web1-root"}, "m1-b": {"app1-root", "web1-root"}}


@pytest.fixture
def taken(machines: Machines) -> str:
    """A command by which another run takes machine m1, and records that it begins."""
    lock = {"owner": "other", "details": {}, "since": 0, "expires": 1e12}
    run = {"source": "m1-a", "destination": "m1-b", "guests": ["app1"], "strategies": {}, "cold": ["app1"]}
    commands = []
    for file, content in (("m1-lock/lock.json", lock), ("m1-state.json", {"run": run, "history": []})):
        theirs = machines.folder / f"other-{Path(file).name}"
        theirs.write_text(json.dumps(content))
        commands.append(f"cp {theirs} {machines.folder}/{file}")
    return "\n".join(commands)


def test_of_a_machine_that_another_run_took_during_a_move_nothing_is_changed(machines, taken, told):
    machines.add("m1", "app1", "web1", along={"app1 to m1-b": taken})

    done = machines.run(
        vmbeam_hooks={"after_guest": tell(machines)},
        vmbeam_textfile_directory=str(machines.folder),
        vmbeam_undo_on_failure=True,
    )

    assert done.returncode != 0
    assert "app1: This machine is not reserved for" in done.stdout
    assert machines.moves("m1") == ["app1 m1-a m1-b zero_copy"]
    disks = {name: {disk["id"] for disk in vm["disks"]} for name, vm in machines.world("m1")["host_vms"].items()}
    assert disks == {"m1-a": {"app1-root", "web1-root"}, "m1-b": {"app1-root"}}
    # With where it is, as the hook may need it to end what another one has begun.
    assert told() == [["after_guest", "m1", "app1", "m1-b", "failed"]]
    summary = machines.read("m1", "report")["failure"]["summary"]
    assert "Guest app1 is in m1-b (blocked). Guest web1 is in m1-a (blocked)." in summary
    assert machines.read("m1", "state")["run"]["cold"] == ["app1"]
    assert not (machines.folder / "vmbeam_rejuvenation.prom").exists()


def test_a_rollback_on_a_machine_that_another_run_took_leaves_that_run_what_there_is(machines, taken):
    machines.add("m1", "app1", "web1", faults=["web1 to m1-b"], along={"app1 to m1-a": taken})

    done = machines.run(vmbeam_on_failure="rollback")

    assert done.returncode != 0
    assert "The undo did not end: app1: This machine is not reserved for" in done.stdout
    assert machines.where("m1") == {"m1-a": ["app1", "web1"], "m1-b": []}
    assert "app1-root" in {disk["id"] for disk in machines.world("m1")["host_vms"]["m1-b"]["disks"]}
    ended = [call for call in machines.world("m1")["calls"] if call.startswith("zero_copy_session ")]
    assert ended == ["zero_copy_session m1-a m1-b guest absent"]
    assert machines.read("m1", "state")["run"]["cold"] == ["app1"]


def test_a_session_is_not_ended_while_a_guest_may_be_on_its_way_back(machines):
    machines.add("m1", "app1", "web1", faults=["web1 to m1-b", "app1 on its way to m1-a"])
    assert machines.run(vmbeam_on_failure="rollback").returncode != 0
    assert "zero_copy_session m1-b m1-a guest absent" not in machines.world("m1")["calls"]
    # This run has the machine all along.
    assert machines.read("m1", "state")["history"][-1]["outcome"] == "failed"


def test_guests_that_have_arrived_do_not_fail_for_a_connection_that_breaks_once(machines):
    """Nor is more than the report needs kept of them."""
    machines.add("m1", "app1", "web1", along={"web1 to m1-b": f"echo 1 > {machines.folder}/breaks"})
    machines.hosts["m1"] |= machines.over_ssh(0)
    left = {"ansible.builtin.debug": {"msg": "left: {{ [rejuvenate_migrations, rejuvenate_jobs, rejuvenate_kept] }}"}}
    (machines.folder / "play.yml").write_text(yaml.safe_dump([{**PLAYBOOK[0], "post_tasks": [left]}]))

    done = machines.run(vmbeam_parallel_guests=2)

    assert done.returncode == 0
    assert machines.where("m1") == {"m1-b": ["app1", "web1"]}
    assert "left: [{}, {}, {}]" in done.stdout


def test_what_one_host_vm_does_not_tell_is_still_known_of_the_other(machines):
    """A cut run left both; the old one offers no zero-copy, and the new one cannot say."""
    machines.add("m1", "app1", faults=["m1-b tells nothing of zero-copy"])
    world = machines.world("m1")
    old = world["host_vms"]["m1-a"]
    old["zero_copy"] = False
    world["host_vms"]["m1-b"] = {**old, "domid": 2, "slot": "b", "generation": 2, "disks": [], "guests": {}}
    machines.write("m1", world)

    done = machines.run(vmbeam_plan_only=True, vmbeam_strategy="auto")

    assert done.returncode == 0
    plan = machines.read("m1", "plan")
    assert plan["action"] == "resume"
    [guest] = plan["guests"]
    assert "not zero_copy, as the hypervisor below m1-a" in guest["strategy_reason"]


def test_rollback_after_a_failed_move(machines):
    machines.add("m1", "app1", "db1", "web1", faults=["web1 to m1-b"])

    done = machines.run(vmbeam_on_failure="rollback", vmbeam_guest_strategies={"db1": "cold"})

    assert done.returncode != 0
    assert machines.where("m1") == {"m1-a": ["app1", "db1", "web1"]}
    assert machines.moves("m1") == [
        "app1 m1-a m1-b zero_copy",
        "db1 m1-a m1-b cold",
        "web1 m1-a m1-b zero_copy",
        "app1 m1-b m1-a zero_copy",
        "db1 m1-b m1-a cold",
    ]
    assert sorted(disk["id"] for disk in machines.world("m1")["host_vms"]["m1-a"]["disks"]) == [
        "app1-root",
        "db1-root",
        "web1-root",
    ]
    assert "zero_copy_session m1-b m1-a guest absent" in machines.world("m1")["calls"]
    report = machines.read("m1", "report")
    assert report["guests_moved_back"] == ["app1", "db1"]
    assert report["guests_moved"] == 0
    assert report["failure"]["undone"]
    assert "web1 cannot go to m1-b" in done.stdout
    assert "Taken back to m1-a: app1, db1" in done.stdout
    assert machines.read("m1", "state")["run"] is None


@pytest.mark.parametrize(("breaks", "outcome"), [(4, "rejuvenated"), (5, "refused")])
def test_a_connection_that_breaks_is_tried_again(machines, breaks, outcome):
    machines.add("m1", "app1")
    machines.dom0s["m1-a"] |= machines.over_ssh(breaks)

    done = machines.run()

    if outcome == "rejuvenated":
        assert done.returncode == 0
        assert machines.where("m1") == {"m1-b": ["app1"]}
    else:
        assert done.returncode != 0
        assert "the guest dom0 of m1-a does not answer (" in done.stdout
        assert "kex_exchange_identification: Connection closed" in done.stdout
        assert machines.world("m1")["calls"] == []


def test_a_guest_that_hangs_or_does_not_serve_after_its_move_goes_back(machines):
    """app1 takes connections before and after; web1 is blocked, as is every idle guest, and dead."""
    machines.add("m1", "app1", "web1", faults=["web1 hangs in m1-b"])
    with socket.create_server(("127.0.0.1", 0)) as service:
        probes = {"app1": {"address": "127.0.0.1", "port": service.getsockname()[1]}}
        done = machines.run(vmbeam_on_failure="rollback", vmbeam_guest_probes=probes)
    assert done.returncode != 0
    assert "web1 shows no sign of life" in done.stdout
    assert machines.where("m1") == {"m1-a": ["app1", "web1"]}
    assert machines.read("m1", "report")["guests_moved_back"] == ["app1", "web1"]

    machines.write("m1", {**machines.world("m1"), "faults": []})
    done = machines.run(vmbeam_guest_probes=probes)
    assert done.returncode != 0
    assert "takes no connection" in done.stdout
    assert machines.where("m1") == {"m1-a": ["app1", "web1"]}


def test_a_rollback_that_fails_keeps_both_host_vms(machines):
    machines.add("m1", "app1", "web1", faults=["web1 to m1-b", "app1 to m1-a"])

    done = machines.run(vmbeam_on_failure="rollback")

    assert done.returncode != 0
    assert machines.where("m1") == {"m1-a": ["web1"], "m1-b": ["app1"]}
    assert "The undo did not end: app1: app1 cannot go to m1-a" in done.stdout
    assert machines.read("m1", "state")["run"]["guests"] == ["app1", "web1"]


def test_a_gate_that_fails_on_the_way_back_keeps_no_other_guest_from_it(machines):
    """The gate of app1 holds once, when it has moved forth; db1 cannot go back, and log1 can."""
    machines.add("m1", "app1", "db1", "log1", "web1", faults=["web1 to m1-b", "db1 to m1-a"])
    command = f"[ ! -e {machines.folder}/asked ] && touch {machines.folder}/asked"
    gate = {"name": "once", "guest": "app1", "command": ["sh", "-c", command], "timeout": 3}

    done = machines.run(vmbeam_on_failure="rollback", vmbeam_gates=[gate])

    assert done.returncode != 0
    assert machines.where("m1") == {"m1-a": ["app1", "log1", "web1"], "m1-b": ["db1"]}
    report = machines.read("m1", "report")
    assert report["guests_moved_back"] == ["log1"]
    told = f"app1: gate once does not hold: sh -c {command} failed with exit code 1: it printed nothing"
    assert f"The undo did not end: {told}; db1: db1 cannot go to m1-a." in report["failure"]["summary"]
    # Where they are after that.
    assert "Guest app1 is in m1-a (blocked). Guest db1 is in m1-b (blocked)." in report["failure"]["summary"]
    assert machines.read("m1", "state")["run"]["guests"] == ["app1", "db1", "log1", "web1"]


def test_a_guest_that_was_shut_down_and_not_started_is_started_by_the_next_run(machines):
    """It is in neither host VM then, and only the record knows of it."""
    machines.add("m1", "db1", "web1", faults=["db1 down"])
    options = {"vmbeam_guest_strategies": {"db1": "cold"}}
    done = machines.run(**options)
    assert done.returncode != 0
    assert "Guest db1 is in neither host VM" in done.stdout
    assert machines.where("m1") == {"m1-a": ["web1"], "m1-b": []}
    world = machines.world("m1")
    world["faults"], world["calls"] = [], []
    machines.write("m1", world)

    assert machines.run(**options).returncode == 0
    assert machines.where("m1") == {"m1-b": ["db1", "web1"]}
    assert machines.moves("m1") == ["db1 m1-a m1-b cold", "web1 m1-a m1-b zero_copy"]


def test_a_hook_that_fails_does_not_keep_guests_from_going_back(machines):
    machines.add("m1", "app1", "web1")
    hook = {"ansible.builtin.fail": {"msg": "hook of app1"}, "when": "vmbeam_guest == 'app1'"}
    (machines.folder / "after.yml").write_text(yaml.safe_dump([hook]))

    done = machines.run(vmbeam_on_failure="rollback", vmbeam_hooks={"after_guest": "after.yml"})

    assert done.returncode != 0
    assert "hook of app1" in done.stdout
    assert machines.where("m1") == {"m1-a": ["app1", "web1"]}
    assert machines.read("m1", "report")["guests_moved_back"] == ["app1"]


# In this order. Before a guest goes, its disks have come; before the last call, the guests are recorded in their place.
CALLS = ["host_vm m1-b started", "guest_migrate app1", "guest_migrate web1", "host_vm m1-a absent"]


@pytest.mark.parametrize(("when", "next_run"), [("before", {}), ("after", {"vmbeam_repair_only": True})])
def test_a_run_that_is_killed_is_continued_from_any_call(machines, when, next_run):
    """Each run is killed before or after the call that follows the one of the run before, and the next one goes on."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    machines.add("m1", "app1", "web1", next_host_vm={"created": now})
    options: dict[str, Any] = {}

    for call in CALLS:
        machines.write("m1", {**machines.world("m1"), "cut": f"{when} {call}"})
        assert machines.run(**options).returncode == -signal.SIGKILL, call
        assert sorted(guest for guests in machines.where("m1").values() for guest in guests) == ["app1", "web1"], call
        assert machines.read("m1", "state")["run"] is not None
        assert (machines.folder / "m1-lock" / "lock.json").exists()
        options = next_run

    assert machines.run(**options).returncode == 0

    assert machines.where("m1") == {"m1-b": ["app1", "web1"]}
    assert machines.moves("m1") == ["app1 m1-a m1-b zero_copy", "web1 m1-a m1-b zero_copy"]
    assert [call for call in machines.world("m1")["calls"] if call.startswith("host_vm ")] == [
        "host_vm m1-b started",
        "host_vm m1-a absent",
    ]
    new = machines.world("m1")["host_vms"]["m1-b"]
    assert new["generation"] == 2
    assert sorted(disk["id"] for disk in new["disks"]) == ["app1-root", "web1-root"]
    state = machines.read("m1", "state")
    assert state["run"] is None
    assert state["history"][-1]["outcome"] == "completed"
    [recorded] = json.loads((machines.folder / "m1-record" / "guests.json").read_text())["host_vms"]
    assert (recorded["host_vm"], recorded["generation"]) == ("m1-b", 2)
    assert not (machines.folder / "m1-lock" / "lock.json").exists()


@pytest.fixture
def told(machines: Machines) -> Callable[..., list[list[str]]]:
    """What the hook `tell` was told: hook, machine, guest, host VM, outcome."""
    return lambda: [line.split(",") for line in (machines.folder / "told").read_text().splitlines()]


def tell(machines: Machines, *more: str) -> list[str]:
    """A hook that notes what it is told, and then does more."""
    words = ",".join(f"$VMBEAM_{name}" for name in ("HOOK", "MACHINE", "GUEST", "HOST_VM", "OUTCOME"))
    return ["sh", "-c", "\n".join([f'echo "{words}" >> {machines.folder}/told', *more])]


def test_commands_are_hooks_and_each_guest_that_had_one_before_has_one_after(machines, told):
    machines.add("m1", "app1", "web1", faults=["web1 to m1-b"])
    names = ("before_machine", "after_machine", "before_guest", "after_guest")

    done = machines.run(vmbeam_on_failure="rollback", vmbeam_hooks=dict.fromkeys(names, tell(machines)))

    assert done.returncode != 0
    assert told() == [
        ["before_machine", "m1", "", "", ""],
        ["before_guest", "m1", "app1", "m1-a", ""],
        ["after_guest", "m1", "app1", "m1-b", "completed"],
        ["before_guest", "m1", "web1", "m1-a", ""],
        ["after_guest", "m1", "web1", "m1-a", "failed"],
        ["after_machine", "m1", "", "", "failed"],
    ]


def test_guests_have_their_hook_after_if_no_move_was_begun(machines, told):
    """One guest is drained, and the hook of the other one fails; so does the first one's hook after."""
    machines.add("m1", "app1", "web1", "zzz1")
    hooks = {
        "before_guest": tell(machines, '[ "$VMBEAM_GUEST" != web1 ] || { echo no way >&2; exit 3; }'),
        "after_guest": tell(machines, '[ "$VMBEAM_GUEST" != app1 ]'),
    }

    done = machines.run(vmbeam_hooks=hooks, vmbeam_parallel_guests=3)

    assert done.returncode != 0
    assert machines.moves("m1") == []
    assert told() == [
        ["before_guest", "m1", "app1", "m1-a", ""],
        ["before_guest", "m1", "web1", "m1-a", ""],
        ["after_guest", "m1", "app1", "m1-a", "failed"],
        ["after_guest", "m1", "web1", "m1-a", "failed"],
    ]
    summary = machines.read("m1", "report")["failure"]["summary"]
    assert "hook before_guest: sh -c" in summary
    assert "ended with 3: no way" in summary
    assert "The hook after_guest of app1 failed" in summary


def test_a_machine_has_its_hook_after_if_the_one_before_does_not_end(machines):
    machines.add("m1", "app1")
    tasks = [{"ansible.builtin.copy": {"content": "{{ vmbeam_outcome }}", "dest": f"{machines.folder}/outcome"}}]
    (machines.folder / "after.yml").write_text(yaml.safe_dump(tasks))
    slow = {"command": ["sleep", "300"], "timeout": 1}

    done = machines.run(vmbeam_hooks={"before_machine": slow, "after_machine": "after.yml"})

    assert done.returncode != 0
    assert "hook before_machine: sleep 300 did not end within 1 s" in done.stdout
    assert (machines.folder / "outcome").read_text() == "failed"
    assert machines.world("m1")["calls"] == []

    assert machines.run(vmbeam_hooks={"after_machine": "after.yml"}).returncode == 0
    assert (machines.folder / "outcome").read_text() == "completed"
    assert machines.where("m1") == {"m1-b": ["app1"]}


def test_a_cut_run_that_keeps_the_old_host_vm_has_nothing_to_repair(machines):
    """Whoever started app1 again in m1-a, because a repair misses it there, would have it twice."""
    device = {"devices": [{"type": "pci", "id": "0000:03:00.0"}]}
    machines.add("m1", "app1", "gpu1")
    world = machines.world("m1")
    world["host_vms"]["m1-a"]["guests"]["gpu1"] |= device
    machines.write("m1", world)
    options = {"vmbeam_guest_unmovable_policies": {"gpu1": "leave_and_skip"}}
    assert machines.run(**options).returncode == 0
    assert machines.where("m1") == {"m1-a": ["gpu1"], "m1-b": ["app1"]}
    state = machines.read("m1", "state")
    run = {"source": "m1-a", "destination": "m1-b", "guests": ["app1", "gpu1"], "strategies": {}, "cold": []}
    (machines.folder / "m1-state.json").write_text(json.dumps({**state, "run": {**run, "run_id": "night"}}))

    done = machines.run(
        **options,
        vmbeam_repair_only=True,
        vmbeam_run_id="mend",
        vmbeam_audit_file=f"{machines.folder}/log",
        vmbeam_textfile_directory=str(machines.folder),
    )

    assert done.returncode == 0
    # What is told of the last run is of the one that was closed.
    finished = datetime.datetime.fromisoformat(machines.read("m1", "state")["history"][-1]["finished"]).timestamp()
    told = (machines.folder / "vmbeam_rejuvenation.prom").read_text()
    assert f"last_run_timestamp_seconds {finished:.3f}" in told
    assert "runs nowhere" not in done.stdout
    state = machines.read("m1", "state")
    assert state["run"] is None
    assert state["history"][-1]["outcome"] == "completed"
    # Its begin has an end then.
    [end] = machines.audited()
    assert (end["event"], end["run"], end["outcome"], end["closed_later_by"]) == ("end", "night", "completed", "mend")
    assert (end["source"], end["destination"]) == ("m1-a", "m1-b")


def test_the_audit_log_tells_the_run_of_each_play(machines):
    machines.add("m1", "app1")
    plays = [
        {**PLAYBOOK[0], "vars": {"vmbeam_run_id": name, "vmbeam_force": True, "vmbeam_audit_syslog": name == "two"}}
        for name in ("one", "two")
    ]
    (machines.folder / "play.yml").write_text(yaml.safe_dump(plays))
    module = machines.folder / "collections/ansible_collections/vmbeam/xen/plugins/modules/audit_entry.py"
    system_log = f"print(line, file=open('{machines.folder}/system', 'a'))"
    module.write_text(module.read_text().replace("syslog.syslog(syslog.LOG_NOTICE, line)", system_log))
    done = machines.run(vmbeam_audit_file=f"{machines.folder}/log")
    assert done.returncode == 0
    entries = machines.audited()
    assert [(entry["run"], entry["event"]) for entry in entries] == [
        (name, event) for name in ("one", "two") for event in ("begin", "guest", "end")
    ]
    # The system's log has those of the run that asked for it.
    assert machines.audited("system") == entries[3:]


def test_a_run_that_cannot_be_noted_does_not_begin(machines):
    machines.add("m1", "app1")
    (machines.folder / "file").touch()
    done = machines.run(vmbeam_audit_file=f"{machines.folder}/file/log")
    assert done.returncode != 0
    assert "at 'Note in the audit log'" in done.stdout
    # All that happens is the undoing of what had not begun.
    purposes = ("guest", "channel")
    assert machines.world("m1")["calls"] == [f"zero_copy_session m1-a m1-b {purpose} absent" for purpose in purposes]
    assert machines.where("m1") == {"m1-a": ["app1"]}


def test_whose_lock_was_taken_is_in_the_audit_log(machines):
    machines.add("m1", "app1")
    (machines.folder / "m1-lock").mkdir()
    details = {"run_id": "night", "user": "bob", "controller": "elsewhere", "process": {}}
    HostLock(f"{machines.folder}/m1-lock/lock.json").write(Lock("night (1)", details, 0.0, 1e12))
    log = {"vmbeam_audit_file": f"{machines.folder}/log"}

    assert machines.run(**log).returncode != 0
    assert not (machines.folder / "log").exists()

    assert machines.run(**log, vmbeam_run_id="mine", vmbeam_break_lock="night (1)").returncode == 0
    taken, *others = machines.audited()
    assert (taken["event"], taken["run"], taken["break_lock"]) == ("takeover", "mine", True)
    assert taken["holder"] == {"owner": "night (1)", "run": "night", "user": "bob", "controller": "elsewhere"}
    assert [entry["event"] for entry in others] == ["begin", "guest", "end"]


def test_a_machine_is_done_once_in_a_run(machines):
    """The stand-in for the new host VM is as old as the first one."""
    machines.add("m1", "app1")
    assert machines.run(vmbeam_run_id="night").returncode == 0
    done = machines.run(vmbeam_run_id="night", vmbeam_force=True)
    assert done.returncode == 0
    assert "m1: skip: m1-b (generation 2) is what this run has made of the machine already" in done.stdout
    assert machines.moves("m1") == ["app1 m1-a m1-b zero_copy"]


def test_a_repair_ends_what_a_cut_migration_left_half_done(machines):
    """db1 had been sent away and did not go on; web1 was on its way; app1 has moved, and its old copy is left."""
    machines.add("m1", "app1", "db1", "log1", "web1", faults=["log1 to m1-b"])
    assert machines.run(vmbeam_undo_on_failure=False).returncode != 0
    world = machines.world("m1")
    old, new = (world["host_vms"][name]["guests"] for name in ("m1-a", "m1-b"))
    assert (sorted(old), sorted(new)) == (["log1", "web1"], ["app1", "db1"])
    old["app1--migratedaway"] = machines.guest("app1", state="suspended")
    old["db1--migratedaway"] = machines.guest("db1", state="suspended")
    new["db1--incoming"] = {**new.pop("db1"), "state": "paused"}
    new["web1--incoming"] = machines.guest("web1", state="paused")
    world["host_vms"]["m1-b"]["disks"].append({"id": "web1-root", "path": "/guests/web1.raw"})
    machines.write("m1", {**world, "faults": [], "calls": []})

    done = machines.run(vmbeam_repair_only=True)

    assert done.returncode == 0
    assert machines.where("m1") == {"m1-b": ["app1", "db1", "log1", "web1"]}
    assert {guest["state"] for guest in machines.world("m1")["host_vms"]["m1-b"]["guests"].values()} == {"blocked"}
    mended = [call.removeprefix("mend ") for call in machines.world("m1")["calls"] if call.startswith("mend ")]
    assert sorted(mended) == [
        "destroy app1--migratedaway at the source",
        "destroy db1--migratedaway at the source",
        "destroy web1--incoming at the destination",
        "rename db1--incoming at the destination",
        "unpause db1--incoming at the destination",
    ]
    # Only these were moved now.
    assert machines.moves("m1") == ["log1 m1-a m1-b zero_copy", "web1 m1-a m1-b zero_copy"]
    assert machines.read("m1", "state")["run"] is None


def test_a_copy_that_is_left_beside_its_guest_in_the_only_host_vm_is_for_a_person(machines):
    """A migration of another time; nothing tells here what became of it."""
    machines.add("m1", "app1", "web1")
    world = machines.world("m1")
    world["host_vms"]["m1-a"]["guests"]["web1--migratedaway"] = machines.guest("web1", state="suspended")
    machines.write("m1", world)

    done = machines.run(vmbeam_repair_only=True)

    assert done.returncode != 0
    assert "web1--migratedaway (suspended) was left in m1-a beside web1: if web1 is well" in done.stdout
    assert machines.where("m1") == {"m1-a": ["app1", "web1", "web1--migratedaway"]}
    assert machines.world("m1")["calls"] == []


def test_a_repair_is_in_the_audit_log_and_in_the_report_of_its_run(machines):
    machines.add("m1", "app1")
    machines.add("m2", "web2")
    world = machines.world("m1")
    world["host_vms"]["m1-a"]["guests"]["app1"]["state"] = "paused"
    machines.write("m1", world)
    run = {"source": "m1-a", "destination": "m1-b", "guests": ["app1"], "strategies": {}, "cold": []}
    state = {"run": {**run, "run_id": "night"}, "history": []}
    (machines.folder / "m1-state.json").write_text(json.dumps(state))
    playbook = {"ansible.builtin.import_playbook": str(ROOT / "playbooks" / "repair.yml")}
    (machines.folder / "play.yml").write_text(yaml.safe_dump([playbook]))

    done = machines.run(
        vmbeam_serial=2,
        vmbeam_audit_file=f"{machines.folder}/{{{{ inventory_hostname }}}}-audit/log",
        vmbeam_report_directory=str(machines.folder / "reports"),
        vmbeam_run_id="mend",
    )

    assert done.returncode == 0
    end, entry = machines.audited("m1-audit/log")
    assert (end["event"], end["run"], end["outcome"], end["closed_later_by"]) == ("end", "night", "failed", "mend")
    assert (entry["event"], entry["run"], entry["outcome"], entry["unpaused"]) == (
        "repair",
        "mend",
        "completed",
        ["app1"],
    )
    # Nothing was done on m2.
    assert not (machines.folder / "m2-audit").exists()
    [written] = (machines.folder / "reports").glob("*.json")
    told = {machine["machine"]: machine["outcome"] for machine in json.loads(written.read_text())["machines"]}
    assert told == {"m1": "completed", "m2": "skipped"}


def test_lists_may_be_given_as_text(machines):
    machines.add("m1", "app1", "web1")
    run = {"source": "m1-a", "destination": "m1-b", "guests": ["app1", "db1", "db2"], "strategies": {}, "cold": []}
    (machines.folder / "m1-state.json").write_text(json.dumps({"run": run, "history": []}))

    done = machines.run(
        vmbeam_repair_only=True,
        vmbeam_confirm_gone="db1, db2",
        vmbeam_strategy="auto",
        vmbeam_auto_strategies="precopy,cold",
        vmbeam_pinned_guests="db1,app1",
    )

    assert done.returncode == 0
    assert machines.read("m1", "state")["run"] is None
    planned = {guest["name"]: guest["strategy"] for guest in machines.read("m1", "plan")["guests"]}
    assert planned == {"app1": "cold", "web1": "precopy"}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"vmbeam_strategy": "fast"}, "value of rejuvenate_strategy must be one of: zero_copy, precopy,"),
        (
            {"vmbeam_auto_strategies": "precopy warm"},
            "value of rejuvenate_auto_strategies must be one or more of: zero_copy, precopy, suspend, cold",
        ),
        ({"vmbeam_migrate_timeout": "30m"}, "rejuvenate_migrate_timeout"),
        ({"vmbeam_force": "maybe"}, "rejuvenate_force"),
        ({"vmbeam_guest_strategies": "app1=cold"}, "vmbeam_guest_strategies must be a dictionary"),
        (
            {"vmbeam_guest_strategies": {"app1": "fast"}},
            "Every value of vmbeam_guest_strategies must be one of",
        ),
        ({"vmbeam_migration_ssh_args": "-4 -C"}, "vmbeam_migration_ssh_args is '-4 -C': give a list"),
        ({"vmbeam_gates": "one"}, "vmbeam_gates is 'one': give a list"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(machines, given, error):
    machines.add("m1", "app1")
    done = machines.run(**given)
    assert done.returncode != 0
    assert error in " ".join((done.stdout + done.stderr).split())
    assert machines.world("m1")["calls"] == []


def test_the_tag_plan_of_the_playbook_plans_only(machines):
    machines.add("m1", "app1")
    playbook = {"ansible.builtin.import_playbook": str(ROOT / "playbooks" / "rejuvenate.yml")}
    (machines.folder / "play.yml").write_text(yaml.safe_dump([playbook]))
    done = machines.run("--tags", "plan")
    assert done.returncode == 0
    assert machines.read("m1", "plan")["action"] == "rejuvenate"
    assert machines.world("m1")["calls"] == []
    assert not (machines.folder / "m1-state.json").exists()
    assert not (machines.folder / "m1-lock" / "lock.json").exists()


def test_what_the_tag_rejuvenate_selects_is_the_whole_of_it(machines):
    machines.add("m1", "app1")
    assert machines.run("--tags", "rejuvenate").returncode == 0
    assert machines.where("m1") == {"m1-b": ["app1"]}
    assert machines.read("m1", "state")["history"][-1]["outcome"] == "completed"


def test_a_lock_that_a_guest_may_outlast_is_refused(machines):
    machines.add("m1", "app1")
    done = machines.run(vmbeam_lock_ttl=3600, vmbeam_migrate_timeout=1800)
    assert done.returncode != 0
    assert "vmbeam_lock_ttl (3600 s) must be at least as long as a guest may take, 4500 s" in done.stdout
    assert machines.world("m1")["calls"] == []


@pytest.mark.parametrize(("forks", "seconds"), [("1", 9000), ("2", 4500)])
def test_a_lock_lasts_while_machines_wait_for_a_fork(machines, forks, seconds):
    for name in ("m1", "m2"):
        machines.add(name, f"app-{name}")
    look = {"vmbeam.xen.host_lock_info": {"path": "{{ vmbeam_lock_file }}"}, "register": "seen"}
    stop = {"ansible.builtin.fail": {"msg": "for {{ seen.holder.expires_in_seconds | int // 100 }} from now"}}
    machines.start.write_text(yaml.safe_dump([look, stop]))
    done = machines.run("--forks", forks, vmbeam_serial=2, vmbeam_lock_ttl=4500)
    # It was renewed some seconds before it is looked at.
    assert done.stdout.count(f'"msg": "for {seconds // 100 - 1} from now"') == 2


def test_the_report_of_the_run_knows_machines_that_are_only_planned(machines):
    machines.add("m1", "app1")
    report = {"ansible.builtin.import_playbook": str(ROOT / "playbooks" / "_report.yml")}
    (machines.folder / "play.yml").write_text(yaml.safe_dump([*PLAYBOOK, report]))
    done = machines.run(rejuvenate_plan_only=True, vmbeam_report_directory=str(machines.folder / "reports"))
    assert done.returncode == 0
    [written] = (machines.folder / "reports").glob("*.json")
    assert [machine["outcome"] for machine in json.loads(written.read_text())["machines"]] == ["planned"]


def test_check_mode_with_diff_shows_what_would_be_where(machines):
    machines.add("m1", "app1", "web1")
    before = machines.world("m1")
    done = machines.run("--check", "--diff")
    assert done.returncode == 0
    assert machines.world("m1") == before
    diff = done.stdout[done.stdout.index("--- before") :]
    assert '-    "m1-a": {' in diff
    assert '+    "m1-b": {' in diff
    assert '+        "generation": "2"' in diff
    assert not (machines.folder / "m1-state.json").exists()
    assert machines.read("m1", "plan")["action"] == "rejuvenate"


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ({"disks": []}, "guest web2's disk xvda"),
        ({"free_memory_mb": 1000}, "the host hypervisor has too little free memory for m2-b: needs"),
    ],
)
def test_preflight_is_made_again_before_each_machine(machines, lost, told):
    """What m2 needs is lost when both are planned and m1 is rolled: m2 is looked at in its turn, and not touched."""
    machines.add("m1", "app1")
    machines.add("m2", "web2")
    world = machines.world("m2")
    (world if "free_memory_mb" in lost else world["host_vms"]["m2-a"]).update(lost)
    change = {"content": json.dumps(world), "dest": str(machines.folder / "m2.json")}
    later = {"ansible.builtin.copy": change, "when": "inventory_hostname == 'm1'"}
    plan = {**PLAYBOOK[0], "serial": 2, "vars": {"rejuvenate_plan_only": True}}
    (machines.folder / "play.yml").write_text(yaml.safe_dump([plan, {**PLAYBOOK[0], "post_tasks": [later]}]))
    for name in ("m1", "m2"):
        (machines.folder / f"{name}-metrics").mkdir()
    done = machines.run(vmbeam_textfile_directory=f"{machines.folder}/{{{{ inventory_hostname }}}}-metrics")
    assert machines.where("m1") == {"m1-b": ["app1"]}
    assert done.returncode != 0
    assert done.stdout.count("m2: rejuvenate: ") == 2
    assert f"m2 is not rejuvenated, nothing was touched: (1) {told}" in done.stdout
    assert machines.world("m2")["calls"] == []
    metrics = [(machines.folder / f"{name}-metrics/vmbeam_rejuvenation.prom").read_text() for name in ("m1", "m2")]
    assert ["last_refused_timestamp_seconds" in text for text in metrics] == [False, True]
    assert ["last_run_success" in text for text in metrics] == [True, False]


def test_guests_that_stopped_while_the_host_vm_started_are_seen(machines):
    machines.add("m1", "app1", "web1")
    pause = {"vmbeam.xen.guest": {"name": "web1", "state": "paused"}, "delegate_to": "m1-a"}
    machines.start.write_text(yaml.safe_dump([*START, pause]))
    done = machines.run()
    assert done.returncode != 0
    assert "guest web1 is paused and would not answer" in done.stdout
    assert machines.moves("m1") == []
    assert machines.where("m1") == {"m1-a": ["app1", "web1"]}
    assert machines.world("m1")["host_vms"]["m1-a"]["guests"]["web1"]["state"] == "paused"


GROUP = [{"name": "db", "label": "database"}]
LABELS = {"db1": ["database"], "db2": ["database"]}


def test_machines_with_guests_of_one_group_are_rolled_one_after_the_other(machines):
    for name, guest in (("m1", "db1"), ("m2", "db2"), ("m3", "web3")):
        machines.add(name, guest)
    done = machines.run(vmbeam_serial=3, vmbeam_anti_affinity=GROUP, vmbeam_guest_labels=LABELS)
    assert done.returncode == 0
    for name in ("m1", "m2", "m3"):
        assert list(machines.where(name)) == [f"{name}-b"]
    first, second = sorted(span(machines.read(name, "report")) for name in ("m1", "m2"))
    assert first[1] <= second[0]


def test_each_machine_of_a_batch_moves_its_guests_in_the_order_of_its_plan(machines):
    """m1 in twos and then one alone, m2 one after the other."""
    machines.add("m1", "app1", "log1", "web1")
    machines.add("m2", "db1", "db2")
    done = machines.run(
        vmbeam_serial=2, vmbeam_parallel_guests=2, vmbeam_anti_affinity=[{"name": "db", "guests": ["db1", "db2"]}]
    )
    assert done.returncode == 0
    assert machines.read("m1", "plan")["batches"] == [["app1", "log1"], ["web1"]]
    assert machines.moves("m2") == ["db1 m2-a m2-b zero_copy", "db2 m2-a m2-b zero_copy"]


def test_machines_of_a_batch_move_side_by_side_and_one_that_fails_keeps_no_other_from_it(machines):
    machines.add("m1", "app1", "web1", faults=["web1 to m1-b"])
    machines.add("m2", "db1", "db2", "db3")
    done = machines.run(vmbeam_serial=2, vmbeam_on_failure="rollback")
    assert done.returncode != 0
    assert machines.where("m1") == {"m1-a": ["app1", "web1"]}
    assert machines.read("m1", "report")["guests_moved_back"] == ["app1"]
    assert machines.where("m2") == {"m2-b": ["db1", "db2", "db3"]}
    assert machines.read("m2", "report")["outcome"] == "completed"
    # Twice for both, once for what m1 takes back, and once for the third guest of m2.
    assert done.stdout.count(" : Make way for the guests] ") == 4


def span(report: dict[str, Any]) -> tuple[float, float]:
    """When a machine was being changed: from the end of the report's first phase to the end of the last."""
    begun, ended = (datetime.datetime.fromisoformat(report[key]).timestamp() for key in ("started", "finished"))
    return begun + report["phases"][0]["seconds"], ended


def test_no_machine_follows_one_of_its_group_that_failed(machines):
    machines.add("m1", "db1", faults=["db1 to m1-b"])
    machines.add("m2", "db2", faults=["db2 to m2-b"])
    done = machines.run(vmbeam_serial=2, vmbeam_anti_affinity=GROUP, vmbeam_guest_labels=LABELS)
    assert done.returncode != 0
    assert sorted(len(machines.moves(name)) for name in ("m1", "m2")) == [0, 1]
    assert "failed, and holds guests of the same anti-affinity group (db)" in done.stdout


def test_no_machine_follows_one_of_its_group_that_failed_in_a_batch_before(machines):
    machines.add("m1", "db1", faults=["db1 to m1-b"])
    machines.add("m2", "db2")
    machines.add("m3", "web3")
    playbook = {"ansible.builtin.import_playbook": str(ROOT / "playbooks" / "rejuvenate.yml")}
    (machines.folder / "play.yml").write_text(yaml.safe_dump([playbook]))
    done = machines.run(vmbeam_failure_budget=2, vmbeam_anti_affinity=GROUP, vmbeam_guest_labels=LABELS)
    assert done.returncode != 0
    assert machines.moves("m2") == []
    assert "m2 is not rejuvenated, nothing was touched: m1 failed, and holds guests of the same" in done.stdout
    assert machines.where("m3") == {"m3-b": ["web3"]}


def test_a_machine_that_another_run_had_before_its_turn_is_not_touched(machines):
    """Its lock is gone when its turn comes, as if it had expired, and another run had taken and given it back."""
    machines.add("m1", "db1")
    machines.add("m2", "db2")
    other = "{{ 'm2' if inventory_hostname == 'm1' else 'm1' }}"
    hook = {"ansible.builtin.file": {"path": f"{machines.folder}/{other}-lock/lock.json", "state": "absent"}}
    (machines.folder / "before.yml").write_text(yaml.safe_dump([hook]))
    done = machines.run(
        vmbeam_serial=2,
        vmbeam_anti_affinity=GROUP,
        vmbeam_guest_labels=LABELS,
        vmbeam_hooks={"before_machine": "before.yml"},
    )
    assert done.returncode != 0
    # Either may be the first.
    late, first = sorted(("m1", "m2"), key=lambda name: len(machines.moves(name)))
    assert list(machines.where(first)) == [f"{first}-b"]
    assert machines.world(late)["calls"] == []
    assert f"fatal: [{late}]: FAILED!" in done.stdout
    assert "This machine is not reserved for" in done.stdout


def test_the_plan_of_the_fleet_is_what_the_role_then_does(machines, tmp_path):
    """With the role's own plans, and times from the runs before."""
    for name in ("m1", "m2"):
        machines.add(name, f"app-{name}", f"web-{name}")
    play = {"ansible.builtin.import_playbook": str(ROOT / "playbooks" / "plan.yml")}
    options = {
        "vmbeam_run_plan_file": str(tmp_path / "fleet.json"),
        "vmbeam_order": "oldest",
        "vmbeam_strategy": "precopy",
    }

    def fleet_plan(**more: Any) -> dict[str, Any]:
        (machines.folder / "play.yml").write_text(yaml.safe_dump([play]))
        assert machines.run(**options, **more).returncode == 0
        return json.loads((tmp_path / "fleet.json").read_text())

    plan = fleet_plan()
    assert machines.world("m1")["calls"] == machines.world("m2")["calls"] == []
    assert plan["totals"]["machines_of_unknown_time"] == ["m1", "m2"]
    assert plan["totals"]["strategies"] == {"precopy": {"guests": 4, "memory_mb": 512}}

    (machines.folder / "play.yml").write_text(yaml.safe_dump(PLAYBOOK))
    assert machines.run(vmbeam_strategy="precopy").returncode == 0
    for one in plan["machines"]:
        moved = sorted((guest["batch"], guest["guest"], guest["strategy"]) for guest in one["guests"])
        way = f"{one['source']} {one['destination']}"
        assert machines.moves(one["machine"]) == [f"{guest} {way} {strategy}" for _, guest, strategy in moved]

    again = fleet_plan(vmbeam_force=True)
    assert again["totals"]["machines_of_unknown_time"] == []
    assert again["totals"]["seconds"] == pytest.approx(sum(batch["seconds"] for batch in again["batches"]), abs=0.2)
    assert again["totals"]["seconds"] > 0


def test_the_defaults_of_the_survey_are_what_a_plan_takes(machines, tmp_path):
    """All of them together, and as text: AWX gives those that a person leaves as they are."""
    survey = json.loads((ROOT / "examples" / "awx" / "survey.json").read_text())
    for name in ("m1", "m2"):
        machines.add(name, f"app-{name}")
    play = {"ansible.builtin.import_playbook": str(ROOT / "playbooks" / "plan.yml")}
    (machines.folder / "play.yml").write_text(yaml.safe_dump([play]))
    answers = {question["variable"]: str(question["default"]) for question in survey["spec"]}

    done = machines.run(vmbeam_run_plan_file=str(tmp_path / "fleet.json"), **answers)

    assert done.returncode == 0
    plan = json.loads((tmp_path / "fleet.json").read_text())
    assert [batch["machines"] for batch in plan["batches"]] == [["m1"], ["m2"]]
    assert [one["outcome"] for one in plan["machines"]] == ["rejuvenate", "rejuvenate"]
    assert [guest["strategy"] for one in plan["machines"] for guest in one["guests"]] == ["zero_copy", "zero_copy"]
    assert machines.world("m1")["calls"] == machines.world("m2")["calls"] == []
