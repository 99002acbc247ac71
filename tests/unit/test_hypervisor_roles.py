# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the roles of the hypervisors look at before they install, and after a reboot, as Ansible runs them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypervisor_machine import Machine

SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
ON = b"\x06\x00\x00\x00\x01"
OFF = b"\x06\x00\x00\x00\x00"
REFUSES_SECURE_BOOT = "m1 has Secure Boot on, and its boot loader would refuse the hypervisor"

BRIDGE = {"name": "xenbr0", "interface": "eno1"}
# Each with a line that sets up eno1.
NAMING = {
    "/etc/network/interfaces": "auto lo eno1\n",
    "/etc/network/interfaces.d/dhcp": "iface eno1 inet dhcp\n",
    "/etc/network/interfaces.d/hotplug": "allow-hotplug eno1\n",
    "/etc/network/interfaces.d/bridge": "iface br0 inet dhcp\n\tbridge_ports eno2 eno1\n",
    "/etc/network/interfaces.d/dashes": "iface br1 inet dhcp\n  bridge-ports eno1\n",
    "/etc/systemd/network/20-wired.network": "[Match]\nName=eno1\n\n[Network]\nDHCP=yes\n",
    "/etc/systemd/network/30-two.network": "[Match]\nName = eno2 eno1\n",
    # As netplan writes it: before the role's own files, which have no effect beside it.
    "/run/systemd/network/10-netplan-eno1.network": "[Match]\nPermanentMACAddress=52:54:00:12:34:56\nName=eno1\n",
}
# Others, and the role's own.
NOT_NAMING = {
    "/etc/network/interfaces": "# auto eno1\nauto lo\niface lo inet loopback\niface eno10 inet dhcp\n",
    "/etc/network/interfaces.d/vlan": "auto eno1.7\niface eno1.7 inet dhcp\n",
    "/etc/systemd/network/10-vmbeam-interface.network": "[Match]\nName=eno1\n\n[Network]\nBridge=xenbr0\n",
    "/etc/systemd/network/20-other.network": "[Match]\nName=eno10\n",
    "/etc/systemd/network/20-comment.network": "[Match]\n# Name=eno1\nName=xeno1\n",
    "/etc/systemd/network/20-wired.network.old": "[Match]\nName=eno1\n",
    "/etc/systemd/network/20-wired.link": "[Match]\nMACAddress=52:54:00:12:34:56\n\n[Link]\nName=eno1\n",
}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def install(machine: Machine) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Apply role host_hypervisor, from a repository without a key: it gets no further than to that."""
    repository = machine.folder / "repository"
    repository.mkdir()

    def run(**variables: Any) -> subprocess.CompletedProcess[str]:
        return machine.run("host_hypervisor", **{"host_hypervisor_repo": str(repository), **variables})

    return run


@pytest.fixture
def look(install: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Only look whether the machine allows the installation."""

    def run(**variables: Any) -> subprocess.CompletedProcess[str]:
        return install(host_hypervisor_check_only=True, **variables)

    return run


def told(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(done.stdout.split())


def test_what_lacks_a_key_gets_no_further_than_to_that(machine, install):
    """Else what follows says nothing: without a refusal, files of the machine are changed."""
    done = install()
    assert done.returncode != 0
    assert "vmbeam.asc" in told(done)
    assert "/etc/apt/keyrings" in machine.files()


def test_a_machine_with_secure_boot_is_refused_before_anything_is_changed(machine, install):
    machine.write(SECURE_BOOT, ON)
    before = machine.files()
    done = install()
    assert done.returncode != 0
    assert REFUSES_SECURE_BOOT in told(done)
    assert machine.files() == before


@pytest.mark.parametrize(
    "variable",
    [OFF, None, b"", b"\x01\x01\x01\x01", b"\xff\xfe\x80\x00\x02"],
    ids=["off", "not EFI", "empty", "no value", "odd"],
)
def test_a_machine_of_which_secure_boot_is_not_known_to_be_on_is_accepted(machine, look, variable):
    if variable is not None:
        machine.write(SECURE_BOOT, variable)
    assert look().returncode == 0


def test_the_secure_boot_of_a_computer_on_which_an_image_is_built_does_not_matter(machine, look):
    machine.write(SECURE_BOOT, ON)
    machine.facts["is_chroot"] = True
    assert look().returncode == 0


def test_a_machine_that_has_secure_boot_now_gets_its_own_xen_back(machine, look):
    machine.write(SECURE_BOOT, ON)
    assert look(host_hypervisor_state="stock").returncode == 0


def test_an_interface_that_others_set_up_is_refused_for_the_bridge_before_anything_is_changed(machine, install):
    for path, content in {**NOT_NAMING, **NAMING}.items():
        machine.write(path, content)
    before = machine.files()
    done = install(host_hypervisor_bridge=BRIDGE)
    assert done.returncode != 0
    [words] = {part.split(" sets up eno1, which")[0] for part in told(done).split("m1: ")[1:] if "sets up" in part}
    assert {path.removeprefix(str(machine.root)) for path in words.split(", ")} == set(NAMING)
    assert machine.files() == before


def test_an_interface_that_no_other_sets_up_is_accepted_for_the_bridge(machine, look):
    for path, content in NOT_NAMING.items():
        machine.write(path, content)
    assert look(host_hypervisor_bridge=BRIDGE).returncode == 0


@pytest.mark.parametrize(
    "variables",
    [
        {"host_hypervisor_bridge": {"name": "xenbr0"}},
        {"host_hypervisor_bridge": BRIDGE, "host_hypervisor_state": "stock"},
    ],
    ids=["no interface", "stock"],
)
def test_who_sets_up_the_network_does_not_matter_where_the_role_does_not(machine, look, variables):
    for path, content in NAMING.items():
        machine.write(path, content)
    assert look(**variables).returncode == 0


@pytest.mark.parametrize("state", ["present", "stock"])
def test_a_look_at_a_machine_changes_nothing(machine, look, state):
    """Of one that runs without Xen, and would be rebooted."""
    machine.program("dpkg-query", "installed xen-utils-4.17 4.17.5+23-ga4e5191dc0-1+vmbeam1")
    machine.write("/run/reboot-required", "")
    before = machine.files()
    done = look(host_hypervisor_state=state, host_hypervisor_bridge=BRIDGE, host_hypervisor_reboot=True)
    assert done.returncode == 0
    assert "changed=0 " in done.stdout
    assert machine.files() == before
    assert [call.split()[0] for call in machine.calls] == ["dpkg-query"]


@pytest.mark.parametrize(
    ("facts", "variables", "error"),
    [
        (
            {"distribution_release": "trixie"},
            {},
            "This role knows Debian 12 (bookworm); m1 runs Debian trixie.",
        ),
        ({}, {"host_hypervisor_repo": ""}, "Set host_hypervisor_repo to a directory on the controller"),
        ({}, {"host_hypervisor_repo": "https://192.0.2.1/apt"}, "A URL also needs host_hypervisor_repo_key."),
        ({}, {"host_hypervisor_repo": "/no/such"}, "host_hypervisor_repo: '/no/such' is no directory"),
    ],
    ids=["release", "no repository", "no key", "no directory"],
)
def test_a_look_refuses_what_an_installation_would(machine, look, facts, variables, error):
    machine.facts |= facts
    done = look(**variables)
    assert done.returncode != 0
    assert error in told(done)


def test_a_look_refuses_a_machine_with_secure_boot(machine, look):
    """Two bytes of the attributes would be one letter."""
    machine.write(SECURE_BOOT, b"\xc3\xa9\x00\x00\x01")
    done = look()
    assert done.returncode != 0
    assert REFUSES_SECURE_BOOT in told(done)


@pytest.fixture
def reboot(machine: Machine) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run what a role does at its end, on a machine that must be rebooted."""
    machine.write("/run/reboot-required", "")

    def run(state: str) -> subprocess.CompletedProcess[str]:
        return machine.run(
            "hypervisor_common",
            tasks_from="reboot.yml",
            _hypervisor_common_state=state,
            _hypervisor_common_booted=True,
            _hypervisor_common_reboot=True,
            _hypervisor_common_reboot_timeout=600,
        )

    return run


@pytest.mark.parametrize("capabilities", [None, ""], ids=["Linux alone", "in a virtual machine of another Xen"])
def test_a_machine_that_comes_up_without_its_xen_is_an_error(machine, reboot, capabilities):
    machine.boots_into(capabilities)
    done = reboot("present")
    assert done.returncode != 0
    assert "m1 was rebooted, and runs Linux without Xen." in told(done)
    assert machine.calls == ["reboot"]


def test_a_machine_that_comes_up_with_xen_is_done(machine, reboot):
    machine.boots_into("control_d\n")
    assert reboot("present").returncode == 0
    assert machine.calls == ["reboot"]


def test_a_machine_that_shall_not_have_the_hypervisor_may_come_up_without_it(machine, reboot):
    machine.boots_into(None)
    assert reboot("stock").returncode == 0
    assert machine.calls == ["reboot"]
