"""The guest hypervisor is installed from our repository, and its dom0 serves channels to other host VMs."""

import pytest

testinfra_hosts = ["ansible://m1-a"]


@pytest.mark.parametrize("name", ["xen-hypervisor-4.17-amd64-guest", "xen-utils-4.17"])
def test_packages_are_ours(host, name):
    assert "+vmbeam" in host.package(name).version


def test_guest_dom0_outweighs_its_guests_at_the_next_boot(host):
    assert host.file("/etc/systemd/system/xen.service.d/vmbeam-weight.conf").contains(
        "sched-credit2 -d Domain-0 -w 1024"
    )


def test_channels_are_served_again(host):
    assert host.file("/usr/sbin/vmbeam-channel").mode == 0o755
    assert host.service("vmbeam-channel").is_enabled
    assert host.service("vmbeam-channel").is_running
    assert host.run("vmbeam-channel status").succeeded


def test_domains_are_shut_down_before_a_reboot(host):
    assert host.service("vmbeam-domains").is_enabled
    assert host.service("vmbeam-domains").is_running
    assert host.file("/usr/sbin/vmbeam-domains").mode == 0o755


def test_guests_run_on_and_no_reboot_is_wanted(host):
    assert {"web1", "app1"} <= set(host.check_output("xl list").split())
    assert not host.file("/run/reboot-required").exists
