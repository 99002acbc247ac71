"""A machine of the lab as the roles installed it: real Xen from our packages, driven by our modules."""

from __future__ import annotations

import json
import re


def facts(lab) -> dict:
    """What xl says of the hypervisor."""
    return dict(re.findall(r"(?m)^(\w+)\s*: (.*)$", lab.host("xl", "info")))


def test_the_packaged_hypervisor_runs_and_can_nest(machine):
    installed = machine.host("dpkg-query", "-W", "-f", "'${Version}'", "xen-hypervisor-4.17-amd64")
    assert "+vmbeam" in installed
    info = facts(machine)
    assert info["xen_version"] == "4.17.5"
    assert {"hvm", "hap"} <= set(info["virt_caps"].split())
    assert int(info["nr_cpus"]) == machine.machine.cpus
    assert machine.domains() == set()


def test_host_vm_info_reads_the_real_hypervisor(machine):
    result = machine.module("vmbeam.xen.host_vm_info")
    assert result["changed"] is False
    assert result["host_vms"] == []
    hypervisor, info = result["hypervisor"], facts(machine)
    assert hypervisor["free_memory_mb"] == int(info["free_memory"])
    assert hypervisor["total_memory_mb"] == int(info["total_memory"])


def test_a_host_vm_that_does_not_fit_is_refused(machine):
    result = machine.playbook("host_vm.yml", "-e", "vmbeam_host_vm_memory_mb=999999")
    assert result.failed
    assert "MiB" in result.output
    assert machine.domains() == set()


def test_a_plan_without_host_vm_is_refused_and_changes_nothing(machine):
    before = machine.host("find", "/var/lib/vmbeam", "-type", "f")
    result = machine.playbook("plan.yml")
    assert result.failed
    assert "no host VM runs" in result.output
    assert "playbooks/host_vm.yml" in result.output
    assert machine.host("find", "/var/lib/vmbeam", "-type", "f") == before


def test_a_saved_machine_comes_back_as_it_was(machine):
    machine.host("sh", "-c", "'echo before > /root/marker'")
    boot_id = machine.host("cat", "/proc/sys/kernel/random/boot_id")
    machine.emulated.save("test")
    machine.host("sh", "-c", "'echo after > /root/marker'")
    machine.emulated.stop()
    machine.emulated.start(snapshot="test")
    machine.emulated.wait_for_ssh(180)
    assert machine.host("cat", "/root/marker") == "before\n"
    assert machine.host("cat", "/proc/sys/kernel/random/boot_id") == boot_id


def test_the_inventory_has_the_machine_and_its_slots(machine):
    inventory = json.loads(machine.ansible_inventory())
    hosts = inventory["_meta"]["hostvars"]
    assert machine.machine.name in hosts
    for slot in machine.machine.slots:
        assert f"{machine.machine.name}-{slot}" in hosts
