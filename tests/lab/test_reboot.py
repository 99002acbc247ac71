"""A power cut on a machine of real nested Xen: repair.yml starts one host VM, and in it each guest once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import typing

import pytest
from vmbeam_lab import guests, wait

pytestmark = pytest.mark.long

RECORD = "/var/lib/vmbeam/host-vms/guests.json"
KEPT = "/var/lib/vmbeam/host-vms/.kept"
STATE = "/var/lib/vmbeam/state.json"
#: The guests' disks in host dom0.
DISKS = "/var/lib/vmbeam/guests"
#: Seconds that guests have to boot in a host VM that has just been started.
GUEST_BOOT = 900


def started_anew(lab, before: dict[str, dict]) -> dict[str, dict]:
    """Wait for every guest and check that it was booted since, with all on its disk that was acknowledged before."""
    machine = lab.machine.guests
    after = {name: guests.await_start(guest.http_port, GUEST_BOOT, "disk") for name, guest in machine.items()}
    for name, status in after.items():
        disk = status["disk"]
        assert status["boot_id"] != before[name]["boot_id"], name
        assert disk["recovered"] >= before[name]["disk"]["sequence"], (name, before[name]["disk"], disk)
        assert not disk["missing_at_start"], (name, disk)
        assert not disk["corrupt_at_start"], (name, disk)
    return after


def nothing_is_lost(lab, before: dict[str, dict]) -> None:
    for name, status in lab.all_status().items():
        assert not guests.lost(before[name], status), name


def once(lab, slot: str) -> None:
    """Check that the slot's host VM is the only one, and has every guest once."""
    assert lab.domains() == {f"{lab.machine.name}-{slot}"}
    listed = [line.split()[0] for line in lab.guest_dom0(slot, "xl list").splitlines()[1:]]
    assert sorted(listed) == sorted([*lab.machine.guests, "Domain-0"])


def changed(output: str, machine: str) -> int:
    """Return how many changes Ansible counted on the machine."""
    return int(re.findall(rf"(?m)^{machine} .*changed=(\d+)", output)[-1])


def generations(lab) -> dict[str, int]:
    return {vm["name"]: vm["generation"] for vm in lab.module("vmbeam.xen.host_vm_info")["host_vms"]}


def test_after_a_power_cut_each_guest_is_started_once(lab):
    name = lab.machine.name
    # What brought the lab up has recorded them, so there is nothing new.
    recorded = lab.playbook("record_guests.yml")
    assert not recorded.failed
    assert changed(recorded.output, name) == 0
    assert lab.host("stat", "-c", "%a:%U", RECORD).strip() == "600:root"
    before = lab.all_status()

    lab.cut_power()

    assert lab.domains() == set()
    planned = lab.playbook("plan.yml")
    assert planned.failed
    assert "playbooks/repair.yml" in planned.output
    # Nothing is started over the disk that may have the only copy of configurations.
    refused = lab.playbook("host_vm.yml")
    assert refused.failed
    assert "only copy" in refused.output
    foreseen = lab.playbook("repair.yml", "--check")
    assert not foreseen.failed
    assert f"start {name}-a (generation 2)" in foreseen.output
    for guest in lab.machine.guests:
        assert f"start {guest} in {name}-a" in foreseen.output
    assert lab.domains() == set()

    repaired = lab.playbook("repair.yml")

    assert not repaired.failed
    once(lab, "a")
    after = started_anew(lab, before)
    assert generations(lab) == {f"{name}-a": 2}
    assert lab.host("ls", KEPT).split()
    for guest in lab.machine.guests:
        text = lab.guest_dom0("a", f"cat /etc/xen/guests/{guest}.cfg")
        assert f'name = "{guest}"' in text

    again = lab.playbook("repair.yml")

    assert not again.failed
    assert changed(again.output, name) == 0
    once(lab, "a")
    nothing_is_lost(lab, after)


def test_a_planned_reboot_stops_each_guest_and_starts_it_once(lab, tmp_path):
    """reboot.yml on a machine that, as a virtual one does, ends with its reboot: powered on again, it goes on."""
    name = lab.machine.name
    log = tmp_path / "reboot.log"
    before = lab.all_status()
    unasked = lab.playbook("reboot.yml")
    assert unasked.failed
    assert "vmbeam_confirm_downtime" in unasked.output
    foreseen = lab.playbook("reboot.yml", "--check")
    assert not foreseen.failed
    for guest in lab.machine.guests:
        assert f"shut down {guest}" in foreseen.output
    nothing_is_lost(lab, before)

    # A boot that hangs, as some do here, is tried again.
    patience = ("-e", "host_hypervisor_reboot_timeout=1800")
    run = lab.start_playbook(log, "reboot.yml", "-e", "vmbeam_confirm_downtime=true", *patience)
    wait.until(
        lambda: lab.emulated.pid() is None or run.poll() is not None,
        timeout=1200,
        failure=lambda: AssertionError(f"the machine still runs:\n{log.read_text()}"),
    )
    if run.poll() is None:
        lab.power_on()
    run.wait(timeout=3600)

    print(log.read_text())
    assert run.returncode == 0
    once(lab, "a")
    # Not cut off: what a guest had acknowledged, and what it wrote as it shut down.
    started_anew(lab, before)
    assert generations(lab) == {f"{name}-a": 2}


def put_into_a_session(run: typing.Callable[[str], str], domain: str) -> None:
    """Have what runs for a domain in the scope of a session, as logind has it, but not of those of ssh in the lab."""
    run(
        "systemd-run --scope --unit=session-99 --slice=user sleep infinity >/dev/null 2>&1 & "
        "scope=/sys/fs/cgroup/user.slice/session-99.scope; "
        'timeout 60 sh -c "until test -e $scope/cgroup.procs; do sleep 0.2; done" && '
        f"for process in $(pgrep -x xl; pgrep -f '[q]emu.*{domain}'); do echo $process > $scope/cgroup.procs; done"
    )


def test_a_reboot_that_nobody_planned_shuts_guests_down(lab):
    """The host dom0 is told to reboot as by anyone who does not know better, with all that guests need in a session."""
    name = lab.machine.name
    before = lab.all_status()
    put_into_a_session(lambda command: lab.guest_dom0("a", command), "app1")
    put_into_a_session(lambda command: lab.host(command, timeout=120), f"{name}-a")

    lab.host("systemctl --no-block reboot")
    wait.until(
        lambda: lab.emulated.pid() is None,
        timeout=900,
        failure=lambda: AssertionError("the machine still runs"),
    )
    lab.power_on()

    for guest in lab.machine.guests:
        # A file system whose power was cut has a journal to recover from.
        described = lab.host(f"dumpe2fs -h {DISKS}/{guest}-data.raw")
        assert "has_journal" in described, guest
        assert "needs_recovery" not in described, guest
    repaired = lab.playbook("repair.yml")
    assert not repaired.failed
    once(lab, "a")
    started_anew(lab, before)


def test_a_host_vm_that_reboots_itself_is_lost_and_repaired(lab):
    name = lab.machine.name
    before = lab.all_status()
    lab.guest_dom0("a", "systemd-run --on-active=1 reboot --force --force")
    gone = f"while xl domid {name}-a >/dev/null 2>&1; do sleep 1; done"
    lab.host(f"timeout 300 sh -c {shlex.quote(gone)}", timeout=360)

    repaired = lab.playbook("repair.yml")

    assert not repaired.failed
    once(lab, "a")
    started_anew(lab, before)
    assert generations(lab) == {f"{name}-a": 2}


def test_a_power_cut_in_the_middle_of_a_rejuvenation(lab, tmp_path):
    """One guest has moved to slot b, and the other is about to: both end there, and the machine can be rejuvenated."""
    name = lab.machine.name
    log = tmp_path / "rejuvenate.log"
    run = lab.start_playbook(log, "rejuvenate.yml", "-e", "vmbeam_force=true")
    lab.await_guest_dom0("b", timeout=900)
    # app1 is the first; once it has its own name in slot b, it runs there.
    arrival = "until xl list app1 >/dev/null 2>&1; do sleep 1; done"
    lab.guest_dom0("b", f"timeout 900 sh -c {shlex.quote(arrival)}", timeout=960)
    before = lab.all_status()
    assert run.poll() is None

    # The controller first, or it would note that the run failed, as soon as the machine is back.
    os.killpg(run.pid, signal.SIGKILL)
    lab.cut_power()

    run.wait(timeout=60)
    print(log.read_text())
    assert json.loads(lab.host("cat", STATE))["run"]["destination"] == f"{name}-b"

    repaired = lab.playbook("repair.yml")

    assert not repaired.failed
    once(lab, "b")
    after = started_anew(lab, before)
    assert generations(lab) == {f"{name}-b": 3}
    state = json.loads(lab.host("cat", STATE))
    assert state["run"] is None
    assert state["history"][-1]["outcome"] == "failed"

    again = lab.playbook("repair.yml")
    assert not again.failed
    assert changed(again.output, name) == 0
    nothing_is_lost(lab, after)

    # Nothing that the power cut left stands in the way: slot a is free again.
    assert not lab.playbook("rejuvenate.yml", "-e", "vmbeam_force=true").failed
    once(lab, "a")
    nothing_is_lost(lab, after)
