# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""playbooks/aging.yml by Ansible itself, with a Xen that is not there, and what playbooks/plan.yml makes of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def play(fake_xen, tmp_path):
    """Run playbooks on a machine whose host VM m1-a is a minute old; return Ansible's exit code and output."""
    fake_xen.add("source", "m1-a")
    home = tmp_path / "host-vms" / "m1-a"
    home.mkdir(parents=True)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"generation": 1, "created": created, "image_sha256": hashlib.sha256(b"").hexdigest(), "slot": "a"}
    (home / "generation.json").write_text(json.dumps(record))
    image = tmp_path / "golden.raw"
    image.write_bytes(b"")
    slots = {slot: {"name": f"m1-{slot}", "address": f"192.0.2.1{slot}/24", "mac": "x"} for slot in "ab"}
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    machine = {
        **local,
        "vmbeam_slots": slots,
        "vmbeam_host_vm_memory_mb": 512,
        "vmbeam_host_vm_directory": str(tmp_path / "host-vms"),
        "vmbeam_guest_hypervisor_image": str(image),
        "vmbeam_state_file": str(tmp_path / "state.json"),
    }
    # One that is not there is a guest dom0 that does not answer.
    guest_dom0 = {**local, "ansible_python_interpreter": f"{{{{ guest_python | default('{sys.executable}') }}}}"}
    hosts = {"m1": machine, "m1-a": guest_dom0, "m1-b": local}
    inventory = tmp_path / "inventory.json"
    inventory.write_text(json.dumps({"vmbeam_hosts": {"hosts": {"m1": machine}}, "dom0s": {"hosts": hosts}}))

    def run(*playbooks, **variables):
        done = subprocess.run(
            [
                *("ansible-playbook", "-i", inventory, "-e", json.dumps(variables)),
                *(ROOT / "playbooks" / playbook for playbook in playbooks),
            ],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        print(done.stdout, done.stderr)
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_table_and_the_plan(play):
    policy = {"exhaustion_within": 0, "thresholds": {"highest_domid": 5}}
    _code, output = play("aging.yml", "plan.yml", vmbeam_aging_policy=policy, vmbeam_aging_min_age=0)
    assert "Validating arguments against arg spec 'assess'" in output
    assert "m1: aging score 1.60, due: m1-a: highest_domid is 8, at or over the threshold of 5" in output
    assert re.search(r"(?m)m1  +dom0_available_memory", output)
    assert re.search(r"(?m)m1-a +dom0_available_memory", output)
    assert re.search(
        r"m1: rejuvenate: m1-a \(generation 1\) is due because of aging: m1-a: highest_domid is 8,", output
    )
    assert "changed=0" in output
    assert "changed=1" not in output


def test_a_young_host_vm_is_left_alone_although_it_has_aged(play):
    policy = {"exhaustion_within": 0, "thresholds": {"highest_domid": 5}}
    code, output = play("aging.yml", "plan.yml", vmbeam_aging_policy=policy)
    assert "m1: skip: m1-a (generation 1) is fresh" in output
    assert "; not due because of aging before it is 24.0 h old: m1-a: highest_domid is 8," in output
    assert code == 0


def test_a_guest_dom0_that_does_not_answer_is_told_and_its_machine_refused(play):
    code, output = play("aging.yml", "plan.yml", vmbeam_aging_policy={"exhaustion_within": 0}, guest_python="/none")
    assert "m1: aging score 0.00, not due" in output
    assert "m1-a: could not read anything (" in output
    assert "m1: skip: m1-a (generation 1) is fresh" in output
    assert "m1 is not rejuvenated, nothing was touched: (1) the guest dom0 of m1-a does not answer" in output
    assert code != 0


def test_a_machine_that_has_not_aged_is_left_alone(play):
    code, output = play("aging.yml", "plan.yml", vmbeam_aging_policy={"exhaustion_within": 0})
    assert "m1: aging score 0.00, not due" in output
    assert "m1: skip: m1-a (generation 1) is fresh" in output
    assert code == 0
