"""The host hypervisor is installed from our repository and runs, with its settings, under the machine's guests."""

import pytest

testinfra_hosts = ["ansible://m1"]


@pytest.mark.parametrize("name", ["xen-hypervisor-4.17-amd64", "xen-utils-4.17", "xenstore-utils"])
def test_packages_are_ours(host, name):
    assert "+vmbeam" in host.package(name).version


def test_our_packages_are_preferred(host):
    assert host.file("/etc/apt/preferences.d/vmbeam").contains("Pin: release o=vmbeam")
    assert "999" in host.check_output("apt-cache policy xen-utils-4.17")


def test_what_was_lost_is_back(host):
    modules = host.file("/etc/modules-load.d/vmbeam.conf").content_string.split("\n")
    assert {"loop", "tun", "xen-netback", "xen-blkback"} <= set(modules)
    assert host.file("/etc/xen/xl.conf").contains('^autoballoon="off"$')


def test_domains_are_shut_down_before_a_reboot(host):
    assert host.service("vmbeam-domains").is_enabled
    assert host.service("vmbeam-domains").is_running
    assert host.file("/usr/sbin/vmbeam-domains").mode == 0o755


def test_machine_runs_on_and_wants_no_reboot(host):
    assert "control_d" in host.file("/proc/xen/capabilities").content_string
    assert not host.file("/run/reboot-required").exists
    assert "m1-a" in host.check_output("xl list")
