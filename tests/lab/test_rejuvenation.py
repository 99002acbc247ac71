"""Rejuvenation on real nested Xen: guests must not notice, failures must lose nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
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


@pytest.mark.parametrize(
    ("strategy", "transport"),
    [
        pytest.param("zero_copy", "ssh", id="zero_copy"),  # of memory that is copied
        pytest.param("precopy", "ssh", id="precopy"),
        pytest.param("precopy", "channel", id="precopy by the channel", marks=pytest.mark.long),
        pytest.param("suspend", "channel", id="suspend", marks=pytest.mark.long),
    ],
)
def test_guests_move_to_a_fresh_host_vm_and_do_not_notice(lab, strategy, transport):
    before = lab.all_status()
    name_a, name_b = f"{lab.machine.name}-a", f"{lab.machine.name}-b"
    assert lab.domains() == {name_a}

    # xl of the new host VM knows the guests.
    gates = [{"name": f"{guest} is there", "guest": guest, "command": ["xl", "domid", guest]} for guest in before]
    gates.append({"name": "all are there", "command": ["xl", "vcpu-list", *before]})

    result = lab.playbook(
        *("rejuvenate.yml", "-e", "vmbeam_force=true", "-e", f"vmbeam_strategy={strategy}"),
        *("-e", f"vmbeam_transport={transport}"),
        *("-e", json.dumps({"vmbeam_gates": gates})),
    )

    assert not result.failed
    for gate in gates:
        assert f"ask gate {gate['name']} in {name_b}" in result.output
    assert lab.domains() == {name_b}
    assert lab.guests_in("b") == set(lab.machine.guests)
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])

    again = lab.playbook("rejuvenate.yml")
    assert not again.failed
    assert lab.domains() == {name_b}


@pytest.mark.long
def test_a_gate_that_does_not_hold_keeps_the_old_host_vm(lab):
    before = lab.all_status()
    name_a, name_b = f"{lab.machine.name}-a", f"{lab.machine.name}-b"
    # As many domains as there will never be.
    full = ["sh", "-c", "test $(xl list | wc -l) -gt 99"]
    gates = {"vmbeam_gates": [{"name": "full house", "command": full, "timeout": 5}]}

    result = lab.playbook("rejuvenate.yml", "-e", "vmbeam_force=true", "-e", json.dumps(gates))

    assert result.failed
    assert "gate full house does not hold: " in result.output
    assert lab.domains() == {name_a, name_b}
    assert lab.guests_in("b") == set(lab.machine.guests)

    again = lab.playbook("rejuvenate.yml")
    assert not again.failed
    assert lab.domains() == {name_b}
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])


@pytest.mark.long
def test_two_guests_move_at_a_time_and_keep_their_connections(lab):
    """Moves of one batch run in the background of the guest dom0, where the playbook waits for each."""
    before = lab.all_status()
    name_a, name_b = f"{lab.machine.name}-a", f"{lab.machine.name}-b"
    with contextlib.ExitStack() as stack:
        connections = {}
        for guest, kind in lab.machine.guests.items():
            connection = http.client.HTTPConnection("127.0.0.1", kind.http_port, timeout=120)
            connections[guest] = stack.enter_context(contextlib.closing(connection))
            connection.request("GET", "/status")
            connection.getresponse().read()
        sockets = {guest: connection.sock for guest, connection in connections.items()}

        result = lab.playbook("rejuvenate.yml", "-e", "vmbeam_force=true", "-e", "vmbeam_parallel_guests=2")

        assert not result.failed
        assert re.search(rf": move (app1, web1|web1, app1) from {name_a} to {name_b} \(zero_copy\)", result.output)
        assert lab.domains() == {name_b}
        assert lab.guests_in("b") == set(lab.machine.guests)
        for guest, connection in connections.items():
            connection.request("GET", "/status")
            after = json.loads(connection.getresponse().read())
            assert connection.sock is sockets[guest] is not None, f"{guest}: the connection had to be made again"
            assert not guests.lost(before[guest], after)


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
