# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the roles of the hypervisors refuse while domains run, by Ansible itself, with an xl that is not there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypervisor_machine import Machine

DOM0 = "Domain-0    0  2048  2  r-----  60.0"
HOST_VM = "m1-a        3  8192  4  -b----  12.5"
INSTALLED = {"xen-utils-4.17": "4.17.5+23-ga4e5191dc0-1+vmbeam1"}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def apply(machine: Machine) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a file of tasks of role hypervisor_common on a dom0 with these domains."""

    def run(tasks: str, domains: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        machine.program("xl", "Name       ID   Mem VCPUs  State  Time(s)", *domains)
        machine.program("apt-cache", " xen-utils-4.17 | 4.17.5+23-ga4e5191dc0-1 | http://deb.debian.org/debian")
        return machine.run(
            "hypervisor_common",
            *arguments,
            tasks_from=tasks,
            _hypervisor_common_role="host_hypervisor",
            _hypervisor_common_state="stock",
            _hypervisor_common_booted=True,
            _hypervisor_common_is_dom0=True,
            _hypervisor_common_installed=INSTALLED,
            _hypervisor_common_reboot=True,
            _hypervisor_common_reboot_required=True,
        )

    return run


# In check mode, in which nothing of this computer is removed if it is not refused.
def test_the_hypervisor_is_not_taken_from_host_vms_that_run(apply):
    done = apply("stock.yml", [DOM0, HOST_VM], "--check")
    assert done.returncode != 0
    words = " ".join(done.stdout.split())
    assert "m1 is to get Debian's Xen back, but domains run on it: Name, Domain-0, m1-a." in words
    assert "Take the repository away" not in done.stdout


def test_the_hypervisor_of_an_empty_dom0_is_taken_away(apply):
    done = apply("stock.yml", [DOM0], "--check")
    assert done.returncode == 0
    assert "Take the repository away" in done.stdout


def test_a_machine_is_not_rebooted_under_host_vms_that_run(apply, machine):
    done = apply("reboot.yml", [DOM0, HOST_VM])
    assert done.returncode != 0
    assert "m1 must be rebooted, but domains run on it: Name, Domain-0, m1-a." in " ".join(done.stdout.split())
    assert "reboot" not in machine.calls
