# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reboots of a machine, as Ansible runs what is to be done: all but the modules that act on Xen is real."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

_spec = importlib.util.spec_from_file_location("role_harness", Path(__file__).with_name("test_rejuvenate_role.py"))
_harness = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_harness)


class Rebooted:
    """Machine m1, of which the power can be cut."""

    def __init__(self, machines: Any) -> None:
        self.machines = machines

    @property
    def world(self) -> dict[str, Any]:
        return self.machines.world("m1")

    def change(self, **values: Any) -> None:
        self.machines.write("m1", {**self.world, **values})

    def record(self) -> list[dict[str, Any]]:
        return json.loads((self.machines.folder / "m1-record" / "guests.json").read_text())["host_vms"]

    def note(self) -> None:
        """Each run records what it sees; this one has nothing else to do."""
        assert self.repair().returncode == 0

    def reboot(self) -> None:
        """No host VM is left but for its files, and what was in its disk is gone."""
        world = self.world
        world["lost"] |= {
            name: {"slot": vm["slot"], "generation": vm["generation"]} for name, vm in world["host_vms"].items()
        }
        self.change(host_vms={}, lost=world["lost"], calls=[])
        shutil.rmtree(self.machines.folder / "m1-guests")

    def repair(self, *arguments: str, **variables: Any) -> Any:
        return self.machines.run(*arguments, vmbeam_repair_only=True, **variables)

    def starts(self) -> list[str]:
        return [call for call in self.world["calls"] if call.startswith(("guest ", "host_vm "))]


@pytest.fixture
def m1(tmp_path: Path) -> Rebooted:
    machines = _harness.Machines(tmp_path)
    machines.add("m1", "app1", "db1", "web1")
    return Rebooted(machines)


def test_all_that_ran_is_started_again_once(m1):
    """db1 did not run: it gets its configuration and its disk, and stays down."""
    world = m1.world
    del world["host_vms"]["m1-a"]["guests"]["db1"]
    m1.change(host_vms=world["host_vms"])
    m1.note()
    m1.reboot()

    refused = m1.machines.run()
    assert refused.returncode != 0
    assert "app1, web1 ran when one did: was the machine rebooted?" in refused.stdout
    assert "playbooks/repair.yml starts one with its guests" in refused.stdout
    assert m1.world["calls"] == []

    foreseen = m1.repair("--check")
    assert foreseen.returncode == 0
    for step in (
        "start m1-a (generation 2)",
        "start app1 in m1-a, 1 disk",
        "start web1 in m1-a",
        "attach disk db1-root",
    ):
        assert step in foreseen.stdout
    assert m1.world["calls"] == []
    assert not (m1.machines.folder / "m1-guests").exists()

    done = m1.repair()
    assert done.returncode == 0
    assert "m1-a started, 2 guest(s) started, 4 disk(s) and configuration(s) put back, nothing else" in done.stdout
    assert m1.starts() == ["host_vm m1-a started", "guest app1 m1-a", "guest web1 m1-a"]
    assert m1.machines.where("m1") == {"m1-a": ["app1", "web1"]}
    after = m1.world
    assert after["kept"] == ["m1-a"]
    assert {disk["id"]: disk["path"] for disk in after["host_vms"]["m1-a"]["disks"]} == {
        f"{name}-root": f"/guests/{name}.raw" for name in ("app1", "db1", "web1")
    }
    for name in ("app1", "db1", "web1"):
        config = m1.machines.folder / "m1-guests" / f"{name}.cfg"
        assert f'name = "{name}"' in config.read_text()
        assert config.stat().st_mode & 0o077 == 0
    [entry] = m1.record()
    assert (entry["host_vm"], entry["generation"]) == ("m1-a", 2)

    again = m1.repair()
    assert again.returncode == 0
    assert "changed=0 " in again.stdout
    assert "nothing else to repair" in again.stdout
    assert m1.world == after


def test_a_host_vm_that_is_started_again_gets_the_files_of_the_inventory(m1):
    m1.note()
    m1.reboot()
    given = [{"path": "/etc/systemd/network/30-storage.network", "content": "[Match]\nName=eth1\n"}]

    assert m1.repair(vmbeam_seed_files=given, **m1.machines.real_host_vm()).returncode == 0

    files = m1.machines.seed_files("m1-a")
    assert files["/etc/hostname"] == "m1-a\n"
    assert files["/etc/systemd/network/30-storage.network"] == "[Match]\nName=eth1\n"


def test_a_reboot_in_the_middle_of_a_rejuvenation_ends_with_all_guests_in_one_host_vm(m1):
    """app1 has moved when web1 cannot; then the power is cut."""
    m1.change(faults=["web1 to m1-b"])
    assert m1.machines.run(vmbeam_undo_on_failure=False, vmbeam_run_id="night").returncode != 0
    assert m1.machines.where("m1") == {"m1-a": ["web1"], "m1-b": ["app1", "db1"]}
    m1.reboot()

    done = m1.repair(vmbeam_audit_file=f"{m1.machines.folder}/log", vmbeam_run_id="mend")

    assert done.returncode == 0
    restart, end, restarted = m1.machines.audited()
    assert (restart["event"], restart["run"], restart["guests"]) == ("restart", "mend", ["app1", "db1", "web1"])
    assert (end["event"], end["run"], end["outcome"], end["closed_later_by"]) == ("end", "night", "failed", "mend")
    assert (restarted["event"], restarted["run"], restarted["outcome"]) == ("restarted", "mend", "completed")
    assert m1.machines.where("m1") == {"m1-b": ["app1", "db1", "web1"]}
    assert m1.starts() == [
        "host_vm m1-b started",
        *(f"guest {name} m1-b" for name in ("app1", "db1", "web1")),
        "host_vm m1-a absent",
    ]
    assert sorted(m1.world["kept"]) == ["m1-a", "m1-b"]
    assert m1.world["host_vms"]["m1-b"]["generation"] == 3
    state = m1.machines.read("m1", "state")
    assert state["run"] is None
    assert state["history"][-1]["outcome"] == "failed"
    assert [entry["host_vm"] for entry in m1.record()] == ["m1-b"]

    # The way is free for the next rejuvenation.
    m1.change(faults=[])
    assert m1.machines.run(vmbeam_force=True).returncode == 0
    assert m1.machines.where("m1") == {"m1-a": ["app1", "db1", "web1"]}
    assert [entry["host_vm"] for entry in m1.record()] == ["m1-a"]


def test_a_guest_that_cannot_be_started_keeps_no_other_from_it_and_is_named(m1):
    """web1 has no configuration, and app1 fails once."""
    (m1.machines.folder / "m1-guests" / "web1.cfg").unlink()
    m1.note()
    m1.reboot()
    m1.change(faults=["app1 start"])

    done = m1.repair(vmbeam_audit_file=f"{m1.machines.folder}/log")

    assert done.returncode != 0
    assert [(entry["event"], entry.get("outcome")) for entry in m1.machines.audited()] == [
        ("restart", None),
        ("restarted", "for a person to decide"),
    ]
    assert "guest web1 ran before m1-a had to be started anew, and its configuration is recorded nowhere" in done.stdout
    assert "guest app1 could not be started in m1-a: app1 cannot be started" in done.stdout
    assert m1.machines.where("m1") == {"m1-a": ["db1"]}

    # Rejuvenated, the machine would forget them.
    m1.change(faults=[], calls=[])
    refused = m1.machines.run(vmbeam_force=True)
    assert refused.returncode != 0
    assert "app1, web1 ran in a host VM that is lost, and run nowhere now" in refused.stdout

    done = m1.repair()
    assert done.returncode != 0
    assert "guest web1 ran before" in done.stdout
    assert m1.starts() == ["guest app1 m1-a"]
    assert m1.machines.where("m1") == {"m1-a": ["app1", "db1"]}

    assert m1.repair(vmbeam_confirm_gone="web1").returncode == 0
    assert m1.machines.run(vmbeam_force=True).returncode == 0
    assert m1.machines.where("m1") == {"m1-b": ["app1", "db1"]}


def test_a_restart_that_breaks_off_is_noted_as_failed(m1):
    """A file is where the folder of the guests' configurations has to be."""
    m1.note()
    m1.reboot()
    (m1.machines.folder / "m1-guests").touch()

    assert m1.repair(vmbeam_audit_file=f"{m1.machines.folder}/log").returncode != 0

    assert [(entry["event"], entry.get("outcome")) for entry in m1.machines.audited()] == [
        ("restart", None),
        ("restarted", "failed"),
    ]


def test_a_host_vm_that_dies_alone_leaves_its_guests_to_the_other_one(m1):
    """As by xl destroy, when app1 had moved there."""
    m1.change(faults=["db1 to m1-b"])
    assert m1.machines.run(vmbeam_undo_on_failure=False).returncode != 0
    world = m1.world
    dead = world["host_vms"].pop("m1-b")
    m1.change(
        host_vms=world["host_vms"], lost={"m1-b": {"slot": "b", "generation": dead["generation"]}}, faults=[], calls=[]
    )

    done = m1.repair()

    assert done.returncode == 0
    assert m1.machines.where("m1") == {"m1-a": ["app1", "db1", "web1"]}
    assert m1.starts() == ["guest app1 m1-a", "host_vm m1-b absent"]
    assert m1.machines.read("m1", "state")["run"] is None


def test_what_is_not_recorded_is_kept_and_told(m1):
    m1.reboot()
    done = m1.repair()
    assert done.returncode != 0
    assert "m1-a was lost, as by a reboot of the machine, and it is not recorded which guests it had" in done.stdout
    assert "playbooks/host_vm.yml -e vmbeam_slot=a -e vmbeam_previous_disk=keep" in done.stdout
    assert m1.world["calls"] == []


# In place of role host_hypervisor, which reboots a machine for which that is required.
HOST_HYPERVISOR = """
- ansible.legacy.note:
    words: "host_hypervisor {{ 'looks' if host_hypervisor_check_only | default(false) else 'installs' }}"
- ansible.builtin.fail: {msg: there is no such repository}
  when: vmbeam_xen_repo == "nowhere"
- ansible.legacy.boot:
  when: host_hypervisor_reboot | default(false) and (inventory_dir ~ "/run/reboot-required") is exists
"""


@pytest.fixture
def planned(m1: Rebooted) -> Rebooted:
    """Runs playbooks/reboot.yml, which would reboot this computer."""
    folder = m1.machines.folder
    playbook = (ROOT / "playbooks" / "reboot.yml").read_text()
    for real, instead in (
        ("ansible.builtin.reboot:", "ansible.legacy.boot:"),
        ("import_playbook: _targets.yml", f"import_playbook: {ROOT}/playbooks/_targets.yml"),
        ("path: /run/", f"path: {folder}/run/"),
    ):
        assert real in playbook
        playbook = playbook.replace(real, instead)
    (folder / "play.yml").write_text(playbook)
    (folder / "run").mkdir()
    (folder / "library").mkdir()
    for name in ("boot", "note"):
        text = _harness.FAKE.read_text().replace("@NAME@", name).replace("@FOLDER@", str(folder))
        (folder / "library" / f"{name}.py").write_text(text)
    role = m1.machines.start.parents[2] / "host_hypervisor"
    shutil.rmtree(role)
    (role / "tasks").mkdir(parents=True)
    (role / "tasks" / "main.yml").write_text(HOST_HYPERVISOR)
    return m1


@pytest.mark.parametrize(
    ("repository", "first", "reboot"),
    [
        ("", [], ["reboot"]),
        ("https://example.org/xen", ["host_hypervisor looks"], ["host_hypervisor installs", "reboot"]),
    ],
)
def test_a_planned_reboot_stops_all_before_it_and_starts_all_after_it(planned, repository, first, reboot):
    """What installs the hypervisor is asked whether it can before a guest is stopped."""
    done = planned.machines.run(vmbeam_confirm_downtime=True, vmbeam_xen_repo=repository)

    assert done.returncode == 0
    names = ("app1", "db1", "web1")
    assert planned.world["calls"] == [
        *first,
        *(f"guest {name} m1-a asked" for name in names),
        *(f"guest {name} m1-a absent" for name in names),
        "host_vm m1-a stopped",
        *reboot,
        "host_vm m1-a started",
        *(f"guest {name} m1-a" for name in names),
    ]
    assert planned.machines.where("m1") == {"m1-a": ["app1", "db1", "web1"]}
    assert planned.machines.read("m1", "state")["down"] is None
    assert not (planned.machines.folder / "m1-lock" / "lock.json").exists()


@pytest.mark.parametrize(
    ("options", "told", "calls"),
    [
        ({}, "The guests of m1 would be down for as long as it takes to reboot it", []),
        (
            {"vmbeam_confirm_downtime": True, "vmbeam_xen_repo": "nowhere"},
            "there is no such repository",
            ["host_hypervisor looks"],
        ),
    ],
)
def test_no_guest_is_stopped_unasked_or_for_a_hypervisor_that_cannot_be_installed(planned, options, told, calls):
    done = planned.machines.run(**options)

    assert done.returncode != 0
    assert told in done.stdout
    assert planned.world["calls"] == calls
    assert not (planned.machines.folder / "m1-lock" / "lock.json").exists()


def test_check_mode_tells_what_a_planned_reboot_would_do_and_needs_no_consent(planned):
    done = planned.machines.run("--check", vmbeam_xen_repo="https://example.org/xen")

    assert done.returncode == 0
    for step in ("shut down app1", "shut down web1", "power off m1-a"):
        assert step in done.stdout
    assert planned.world["calls"] == []
    assert planned.machines.where("m1") == {"m1-a": ["app1", "db1", "web1"]}
    assert not (planned.machines.folder / "run" / "reboot-required").exists()


def test_a_machine_whose_guest_stays_up_is_not_rebooted_and_no_batch_follows_its_own(planned):
    """Its batch is not cut: m2 is rebooted beside it."""
    planned.machines.add("m2", "mail1")
    planned.machines.add("m3", "news1")
    planned.change(faults=["web1 stays up"])

    done = planned.machines.run(vmbeam_confirm_downtime=True, vmbeam_serial=2)

    assert done.returncode != 0
    assert "m1: web1 did not shut down within 300 s" in done.stdout
    assert "(what had been stopped was started again)" in done.stdout
    assert ["reboot" in planned.machines.world(name)["calls"] for name in ("m1", "m2", "m3")] == [False, True, False]
    assert planned.machines.where("m1") == {"m1-a": ["app1", "db1", "web1"]}
    assert planned.machines.where("m2") == {"m2-a": ["mail1"]}
    assert planned.machines.world("m3")["calls"] == []
