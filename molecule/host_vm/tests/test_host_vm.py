"""The host VM runs beside the other one, has the identity of its slot, and an empty, healthy guest hypervisor."""

import testinfra

testinfra_hosts = ["ansible://m1-b"]


def test_it_has_the_identity_of_its_slot(host):
    slot = host.ansible.get_variables()
    assert host.check_output("hostname") == slot["inventory_hostname"]
    assert slot["ansible_host"] in host.check_output("ip -4 -oneline address")
    assert host.file("/root/.ssh/id_ed25519").mode == 0o600


def test_guest_hypervisor_is_healthy_and_empty(host):
    assert "xen_caps" in host.check_output("xl info")
    (only,) = host.check_output("xl list").splitlines()[1:]
    assert only.startswith("Domain-0")
    assert host.service("vmbeam-channel").is_running


def test_the_other_host_vm_runs_on(request):
    inventory = request.config.getoption("--ansible-inventory")
    machine = testinfra.get_host("ansible://m1", ansible_inventory=inventory)
    assert {"m1-a", "m1-b"} <= set(machine.check_output("xl list").split())
