"""The inventory plugin on a running machine: what it finds, and that Ansible gets there by what it says."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest
import yaml
from vmbeam_lab import ansible, inventory, paths

LOGIN = ("ansible_host", "ansible_port", "ansible_user", "ansible_ssh_private_key_file", "ansible_ssh_common_args")


def run(*argv: str | pathlib.Path) -> str:
    """Run a command of Ansible and return what it prints."""
    result = subprocess.run(
        [str(word) for word in argv],
        cwd=paths.REPOSITORY,
        env={**ansible.environment(), "ANSIBLE_NOCOLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert "WARNING" not in result.stderr
    return result.stdout


def hosts(found: dict, group: str) -> set[str]:
    """Return the hosts of a group and of its children."""
    entry = found.get(group, {})
    return set(entry.get("hosts", [])).union(*(hosts(found, child) for child in entry.get("children", [])))


@pytest.fixture
def source(lab, tmp_path) -> pathlib.Path:
    """A source that says of the machine how to log in, and nothing of its slots and guests."""
    known = json.loads(lab.ansible_inventory())["_meta"]["hostvars"][lab.machine.name]
    path = tmp_path / "lab.vmbeam.yml"
    machines = {lab.machine.name: {name: known[name] for name in LOGIN}}
    path.write_text(yaml.safe_dump({"plugin": "vmbeam.xen.xen", "machines": machines, "timeout": 180}))
    return path


@pytest.mark.long
def test_host_vms_and_guests_are_found_and_reached(lab, source):
    machine = lab.machine.name
    host_vm = inventory.slot_name(lab.machine, "a")
    unsafe = run("ansible-inventory", "-i", source, "--list")
    found = json.loads(unsafe, object_hook=lambda value: value.get("__ansible_unsafe", value))
    facts = found["_meta"]["hostvars"]

    assert hosts(found, "vmbeam_hosts") == {machine}
    assert hosts(found, "vmbeam_guest_dom0s") == {host_vm}
    assert hosts(found, "vmbeam_guests") == {f"{guest}.{machine}" for guest in lab.guests_in("a")}
    assert hosts(found, f"vmbeam_machine_{machine}") == hosts(found, "vmbeam_guests") | {host_vm}
    assert len(hosts(found, "vmbeam_guests")) == len(lab.machine.guests)

    assert facts[host_vm]["ansible_host"] == lab.machine.slots["a"].address
    told = facts[host_vm]["vmbeam_observed"]
    assert (told["slot"], told["role"], told["reachable"]) == ("a", "active", True)
    assert told["memory_mb"] == pytest.approx(lab.machine.host_vm_memory_mb, abs=16)
    assert facts[machine]["vmbeam_observed"]["hypervisor"]["version"] == "4.17.5"
    for guest in lab.machine.guests.values():
        seen = facts[f"{guest.name}.{machine}"]["vmbeam_observed"]
        assert seen["host_vm"] == host_vm
        assert seen["type"] == guest.type
        assert seen["state"] in ("running", "blocked")
        assert [disk["id"] for disk in seen["disks"]] == inventory.disk_ids(guest.name, guest.type)

    for host in (machine, host_vm):
        # The lab's own inventory says how slow it is; this one doesn't.
        assert "pong" in run("ansible", "-i", source, host, "-m", "ansible.builtin.ping", "-T", "60")
