# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role rejuvenate after a reboot of a machine, as Ansible runs it: all but the modules that act on Xen is real."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

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
