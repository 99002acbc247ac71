"""Rejuvenation on real nested Xen: guests must not notice, failures must lose nothing."""

from __future__ import annotations

import shlex

import pytest
from vmbeam_lab import guests


def snapshot_of(lab) -> dict:
    """What a run that changes nothing leaves as it was."""
    return {
        "domains": lab.domains(),
        "guests": lab.guests_in("a"),
        "files": lab.host("find", "/var/lib/vmbeam", "-newer", "/proc/1", "-name", "*.json"),
        "boot ids": {name: status["boot_id"] for name, status in lab.all_status().items()},
    }


def test_bad_input_is_refused_before_anything_is_touched(lab):
    before = snapshot_of(lab)
    for arguments, words in (
        (["-e", "vmbeam_host_vm_memory_mb=999999"], ["MiB"]),
        (["-e", "vmbeam_strategy=teleport"], ["teleport"]),
        (["-e", "vmbeam_guest_hypervisor_image=/nonexistent.raw"], ["/nonexistent.raw"]),
    ):
        result = lab.playbook("rejuvenate.yml", "-e", "vmbeam_force=true", *arguments)
        assert result.failed
        for word in words:
            assert word in result.output
    assert snapshot_of(lab) == before


def test_check_mode_and_plan_change_nothing(lab):
    before = snapshot_of(lab)
    for arguments in (["rejuvenate.yml", "--check", "--diff"], ["plan.yml"]):
        result = lab.playbook(*arguments, "-e", "vmbeam_force=true")
        assert not result.failed
        for guest in lab.machine.guests:
            assert guest in result.output
        assert snapshot_of(lab) == before


@pytest.mark.parametrize("strategy", ["zero_copy", "precopy", pytest.param("suspend", marks=pytest.mark.long)])
def test_guests_move_to_a_fresh_host_vm_and_do_not_notice(lab, strategy):
    before = lab.all_status()
    name_a, name_b = f"{lab.machine.name}-a", f"{lab.machine.name}-b"
    assert lab.domains() == {name_a}

    result = lab.playbook("rejuvenate.yml", "-e", "vmbeam_force=true", "-e", f"vmbeam_strategy={strategy}")

    assert not result.failed
    assert lab.domains() == {name_b}
    assert lab.guests_in("b") == set(lab.machine.guests)
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])

    again = lab.playbook("rejuvenate.yml")
    assert not again.failed
    assert lab.domains() == {name_b}


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero_copy", "precopy"])
def test_a_killed_receiver_leaves_the_guest_at_the_source_and_a_rerun_finishes(lab, strategy, tmp_path):
    before = lab.all_status()
    forced = ["rejuvenate.yml", "-e", "vmbeam_force=true", "-e", f"vmbeam_strategy={strategy}"]
    log = tmp_path / "rejuvenate.log"
    run = lab.start_playbook(log, *forced, "-e", "vmbeam_undo_on_failure=false")
    lab.await_guest_dom0("b", timeout=600)
    arrival = "until xl list | grep -q -e --incoming; do sleep 1; done; pkill -KILL -f '[m]igrate-receive'"
    lab.guest_dom0("b", f"timeout 600 sh -c {shlex.quote(arrival)}", timeout=660)
    code = run.wait(timeout=900)
    print(log.read_text())
    assert code != 0
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])

    again = lab.playbook(*forced)
    assert not again.failed
    assert lab.domains() == {f"{lab.machine.name}-b"}
    for guest, status in after.items():
        assert not guests.lost(status, lab.status(guest))
