"""Guests that take another way, or go back, on real nested Xen: nothing may be lost, nothing run twice."""

from __future__ import annotations

import shlex

import pytest
from vmbeam_lab import guests

pytestmark = pytest.mark.long

FORCED = ("rejuvenate.yml", "-e", "vmbeam_force=true")
#: Seconds that a guest has from its start until it writes to its disk.
START = 900
#: A guest that was moved cold has to boot before its probe sees an answer.
PATIENT = ("-e", f"vmbeam_gate_timeout={START}")


def host_vms(lab) -> tuple[str, str]:
    return f"{lab.machine.name}-a", f"{lab.machine.name}-b"


def started(lab, guest: str) -> dict[str, dict]:
    """Return the status of every guest once this one, which was started anew, writes to its disk."""
    guests.await_start(lab.machine.guests[guest].http_port, START, "disk")
    return lab.all_status()


def test_cold_starts_a_guest_anew_and_the_others_do_not_notice(lab):
    """app1 is shut down and started from its configuration; what it had synced is on its disk, once."""
    before = lab.all_status()
    _name_a, name_b = host_vms(lab)

    result = lab.playbook(*FORCED, *PATIENT, "-e", '{"vmbeam_guest_strategies": {"app1": "cold"}}')

    assert not result.failed
    assert lab.domains() == {name_b}
    assert lab.guests_in("b") == set(lab.machine.guests)
    after = started(lab, "app1")
    assert not guests.lost(before["web1"], after["web1"])
    assert after["app1"]["boot_id"] != before["app1"]["boot_id"]
    disk = after["app1"]["disk"]
    assert not disk["write_errors"]
    assert not disk["readback_errors"]
    assert not disk["foreign_records"]
    assert disk["sequence"] > before["app1"]["disk"]["sequence"]

    again = lab.playbook("rejuvenate.yml")
    assert not again.failed
    assert lab.status("app1")["boot_id"] == after["app1"]["boot_id"]


def test_a_cold_run_that_is_killed_between_shutdown_and_start_is_continued(lab, tmp_path):
    """The controller dies when app1 is down and its start is held up; the next run ends with one app1, in slot b."""
    before = lab.all_status()
    _name_a, name_b = host_vms(lab)
    cold = (*PATIENT, "-e", '{"vmbeam_guest_strategies": {"app1": "cold"}}')
    log = tmp_path / "rejuvenate.log"
    run = lab.start_playbook(log, *FORCED, *cold)
    lab.await_guest_dom0("b", timeout=600)
    xl = lab.guest_dom0("b", "readlink -f /usr/lib/xen-4.17/bin/xl").strip()
    held = f'#!/bin/bash\ncase " $* " in *" create "*) read -r _ < /run/held ;; esac\nexec {xl}.real "$@"\n'
    lab.guest_dom0("b", f"mkfifo /run/held && cp {xl} {xl}.real && printf %s {shlex.quote(held)} > {xl}.new")
    lab.guest_dom0("b", f"chmod 755 {xl}.new && mv {xl}.new {xl}")
    # Once a reader, the held create, is there, this ends, and app1 is in neither host VM.
    lab.guest_dom0(
        "b", "timeout 900 sh -c 'exec 3> /run/held; sleep infinity <&- >&- 2>&- & echo $! > /run/holder'", 960
    )
    run.kill()
    run.wait(timeout=60)
    print(log.read_text())
    assert "app1" not in lab.guests_in("a") | lab.guests_in("b")

    lab.guest_dom0("b", f"cp {xl}.real {xl}.new && mv {xl}.new {xl} && kill $(cat /run/holder)")
    again = lab.playbook(*FORCED, *cold)

    assert not again.failed
    assert lab.domains() == {name_b}
    assert lab.guests_in("b") == set(lab.machine.guests)
    after = started(lab, "app1")
    assert not guests.lost(before["web1"], after["web1"])
    assert after["app1"]["disk"]["sequence"] > before["app1"]["disk"]["sequence"]
    assert not after["app1"]["disk"]["foreign_records"]


def test_auto_takes_what_is_possible_and_says_why(lab):
    """app1 may not be moved while it runs, and what remains for it is cold; web1 goes by zero-copy."""
    before = lab.all_status()
    _name_a, name_b = host_vms(lab)
    choices = (
        '{"vmbeam_strategy": "auto", "vmbeam_pinned_guests": ["app1"],'
        ' "vmbeam_auto_strategies": ["zero_copy", "precopy", "suspend", "cold"]}'
    )

    result = lab.playbook(*FORCED, *PATIENT, "-e", choices)

    assert not result.failed
    assert (
        "app1: auto: not zero_copy, precopy, suspend, as guest app1 is not to be moved while it runs" in result.output
    )
    assert "web1: auto: the first choice is possible" in result.output
    assert lab.domains() == {name_b}
    after = lab.all_status()
    assert not guests.lost(before["web1"], after["web1"])
    assert after["app1"]["boot_id"] != before["app1"]["boot_id"]


def test_auto_chooses_from_what_is_allowed(lab):
    before = lab.all_status()
    name_a, name_b = host_vms(lab)
    result = lab.playbook(*FORCED, "-e", '{"vmbeam_strategy": "auto", "vmbeam_auto_strategies": ["precopy"]}')
    assert not result.failed
    assert f"from {name_a} to {name_b} (precopy)" in result.output
    assert lab.domains() == {name_b}
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])


def test_a_guest_that_cannot_move_stays_and_its_host_vm_with_it(lab):
    before = lab.all_status()
    name_a, name_b = host_vms(lab)
    stay = ("-e", '{"vmbeam_pinned_guests": ["app1"], "vmbeam_unmovable_policy": "leave_and_skip"}')

    assert not lab.playbook(*FORCED, *stay).failed
    assert lab.domains() == {name_a, name_b}
    assert (lab.guests_in("a"), lab.guests_in("b")) == ({"app1"}, {"web1"})
    assert f"{lab.machine.name}: skip: " in lab.playbook(*FORCED, *stay).output
    assert lab.domains() == {name_a, name_b}

    assert not lab.playbook(*FORCED).failed
    assert lab.domains() == {name_b}
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])


@pytest.mark.parametrize("strategy", ["zero_copy", "precopy"])
def test_rollback_after_a_killed_receiver(lab, strategy, tmp_path):
    """app1 has moved when the receiver of web1 is killed: both end in slot a, slot b is free, no guest notices."""
    before = lab.all_status()
    name_a, _name_b = host_vms(lab)
    log = tmp_path / "rejuvenate.log"
    run = lab.start_playbook(log, *FORCED, "-e", f"vmbeam_strategy={strategy}", "-e", "vmbeam_on_failure=rollback")
    lab.await_guest_dom0("b", timeout=600)
    arrival = "until xl list | grep -q web1--incoming; do sleep 1; done; pkill -KILL -f '[m]igrate-receive'"
    lab.guest_dom0("b", f"timeout 900 sh -c {shlex.quote(arrival)}", timeout=960)
    code = run.wait(timeout=1800)
    output = log.read_text()
    print(output)
    assert code != 0
    assert f"Taken back to {name_a}: app1" in output
    assert lab.domains() == {name_a}
    assert lab.guests_in("a") == set(lab.machine.guests)
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])

    again = lab.playbook(*FORCED, "-e", f"vmbeam_strategy={strategy}")
    assert not again.failed
    for guest, status in after.items():
        assert not guests.lost(status, lab.status(guest))
