"""The role was applied to the machine, and its host VM left alone."""

testinfra_hosts = ["ansible://m1"]


def test_the_role_was_applied(host):
    assert host.file("/run/vmbeam-molecule-rolled").content_string == "rolled\n"


def test_the_host_vm_runs_on(host):
    assert {"m1-a", "m1-b"} & set(host.check_output("xl list").split())
    before = host.file("/run/vmbeam-molecule-host-vms").content_string
    assert "generation" in before
    assert host.check_output("cat /var/lib/vmbeam/host-vms/*/generation.json") == before.strip()


def test_the_machine_was_given_back(host):
    assert not host.file("/run/vmbeam/host-lock.json").exists
