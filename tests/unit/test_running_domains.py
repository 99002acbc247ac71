# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the roles of the hypervisors refuse while domains run, by Ansible itself, with an xl that is not there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from checkout import environment

DOM0 = "Domain-0    0  2048  2  r-----  60.0"
HOST_VM = "m1-a        3  8192  4  -b----  12.5"
INSTALLED = {"xen-utils-4.17": "4.17.5+23-ga4e5191dc0-1+vmbeam1"}


@pytest.fixture
def apply(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a file of tasks of role hypervisor_common on this computer, as if it was a dom0 with these domains."""

    def program(name: str, lines: list[str]) -> None:
        path = tmp_path / name
        path.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
        path.chmod(0o755)

    def run(tasks: str, domains: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        program("xl", ["Name       ID   Mem VCPUs  State  Time(s)", *domains])
        program("apt-cache", [" xen-utils-4.17 | 4.17.5+23-ga4e5191dc0-1 | http://deb.debian.org/debian"])
        role = {"name": "vmbeam.xen.hypervisor_common", "tasks_from": tasks}
        tasks_of_play = [{"ansible.builtin.include_role": role}]
        play = {"hosts": "m1", "connection": "local", "gather_facts": False, "tasks": tasks_of_play}
        (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
        variables = {
            "_hypervisor_common_role": "host_hypervisor",
            "_hypervisor_common_state": "stock",
            "_hypervisor_common_booted": True,
            "_hypervisor_common_is_dom0": True,
            "_hypervisor_common_installed": INSTALLED,
            "_hypervisor_common_reboot": True,
            "_hypervisor_common_reboot_required": True,
        }
        done = subprocess.run(
            ["ansible-playbook", "-i", "m1,", "-e", json.dumps(variables), *arguments, tmp_path / "play.yml"],
            env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        print(done.stdout, done.stderr)
        return done

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


# Ansible itself refuses to reboot the computer that it runs on.
def test_a_machine_is_not_rebooted_under_host_vms_that_run(apply):
    done = apply("reboot.yml", [DOM0, HOST_VM])
    assert done.returncode != 0
    assert "m1 must be rebooted, but domains run on it: Name, Domain-0, m1-a." in " ".join(done.stdout.split())
