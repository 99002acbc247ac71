"""The fleet benchmark: the simulated machines, what is judged of them, and what the page says of the figures."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]

from benchmarks.fleet import __main__ as command  # noqa: E402
from benchmarks.fleet import inventory, report, runs, simulation  # noqa: E402
from benchmarks.fleet.plugins.connection.simulated import module_call  # noqa: E402


@pytest.fixture
def fleet(tmp_path):
    return simulation.Fleet(inventory.fleet_folder(inventory.write(tmp_path, hosts=2, guests=2)))


def call(fleet, module, place="m0001", **arguments):
    return fleet.call("m0001", place, module, arguments)


def start(fleet):
    return call(fleet, "host_vm", name="m0001-b", slot="b", memory_mb=8192, generation=2)


def attach(fleet, guest):
    call(fleet, "host_vm_disk", host_vm="m0001-b", disk=f"{guest}-root", path=f"/dev/vg0/{guest}-root")


def move(fleet, guest, **more):
    return call(fleet, "guest_migrate", "m0001-a", name=guest, strategy="zero_copy", **more)


def roll(fleet):
    start(fleet)
    for guest in ("m0001-g01", "m0001-g02"):
        attach(fleet, guest)
        move(fleet, guest)
    call(fleet, "host_vm", name="m0001-a", state="absent")


# --- the machines


def test_the_inventory_names_what_the_machines_are(fleet, tmp_path):
    document = yaml.safe_load((tmp_path / "inventory.yml").read_text())["all"]["children"]
    machines, guest_dom0s = document["vmbeam_hosts"]["hosts"], document["vmbeam_guest_dom0s"]["hosts"]
    assert list(machines) == [state["name"] for state in fleet.machines()] == inventory.machine_names(2)
    slots = [slot for machine in machines.values() for slot in machine["vmbeam_slots"].values()]
    assert [slot["name"] for slot in slots] == list(guest_dom0s)
    for key in ("name", "address", "mac"):
        assert len({slot[key] for slot in slots}) == 4


def test_addresses_of_a_large_fleet_differ(tmp_path):
    path = inventory.write(tmp_path, hosts=300, guests=1)
    machines = yaml.safe_load(path.read_text())["all"]["children"]["vmbeam_hosts"]["hosts"]
    slots = [slot for machine in machines.values() for slot in machine["vmbeam_slots"].values()]
    assert len({slot["address"] for slot in slots}) == len({slot["mac"] for slot in slots}) == 600


def test_a_machine_that_is_rolled_is_finished_once(fleet):
    assert not runs.finished(fleet.read("m0001"))
    roll(fleet)
    assert runs.finished(fleet.read("m0001"))
    assert runs.times_done(fleet.read("m0001")) == 1
    assert not runs.finished(fleet.read("m0002"))


def test_a_machine_that_is_rolled_again_counts_twice(fleet):
    roll(fleet)
    call(fleet, "host_vm", name="m0001-a", slot="a", memory_mb=8192, generation=3)
    for guest in ("m0001-g01", "m0001-g02"):
        call(fleet, "host_vm_disk", host_vm="m0001-a", disk=f"{guest}-root", path=f"/dev/vg0/{guest}-root")
        call(fleet, "guest_migrate", "m0001-b", name=guest)
    call(fleet, "host_vm", name="m0001-b", state="absent")
    assert runs.times_done(fleet.read("m0001")) == 2


@pytest.mark.parametrize("lost", ["guests", "disks"])
def test_a_machine_that_lost_something_is_not_finished(fleet, lost):
    roll(fleet)
    state = fleet.read("m0001")
    kept = state["host_vms"]["m0001-b"][lost]
    state["host_vms"]["m0001-b"][lost] = list(kept)[:1] if lost == "guests" else {}
    fleet.add(state)
    assert not runs.finished(fleet.read("m0001"))


def test_a_machine_between_two_host_vms_is_not_finished(fleet):
    start(fleet)
    assert not runs.finished(fleet.read("m0001"))


def test_a_host_vm_that_does_not_run_cannot_be_reached(fleet):
    with pytest.raises(ConnectionError):
        call(fleet, "guest_info", "m0001-b")
    start(fleet)
    assert call(fleet, "guest_info", "m0001-b")["guests"] == []


def test_a_guest_without_its_disk_is_not_moved(fleet):
    start(fleet)
    assert move(fleet, "m0001-g01")["failed"]
    attach(fleet, "m0001-g01")
    assert move(fleet, "m0001-g01")["location"] == "destination"
    assert [guest["name"] for guest in call(fleet, "guest_info", "m0001-b")["guests"]] == ["m0001-g01"]


def test_check_mode_moves_nothing(fleet):
    start(fleet)
    attach(fleet, "m0001-g01")
    assert move(fleet, "m0001-g01", _ansible_check_mode=True)["changed"]
    assert call(fleet, "guest_info", "m0001-b")["guests"] == []


def test_a_session_is_used_by_one_guest(fleet):
    start(fleet)
    pair = {"source": "m0001-a", "destination": "m0001-b"}
    first = call(fleet, "zero_copy_session", **pair)["sessions"]
    assert call(fleet, "zero_copy_session", **pair)["sessions"] == first
    attach(fleet, "m0001-g01")
    move(fleet, "m0001-g01", session=first[0]["session"])
    assert call(fleet, "zero_copy_session", **pair)["sessions"] != first


def test_what_the_role_only_reads_is_answered(fleet):
    assert call(fleet, "zero_copy_info", "m0001-a")["capable"]
    assert [entry["name"] for entry in call(fleet, "aging_info", "m0001-a")["indicators"]] == [*simulation.INDICATORS]
    assert call(fleet, "audit_entry", entry={})["changed"]


def test_a_lock_is_kept_by_its_owner_only(fleet):
    assert call(fleet, "host_lock", owner="one", state="kept")["failed"]
    call(fleet, "host_lock", owner="one")
    assert call(fleet, "host_lock", owner="one", state="kept")["holder"]["owner"] == "one"
    assert call(fleet, "host_lock", owner="other", state="kept")["failed"]


def test_a_lock_has_one_owner_and_can_be_taken_over_by_name(fleet):
    assert call(fleet, "host_lock", owner="one", details={"run_id": 1})["holder"]["owner"] == "one"
    refused = call(fleet, "host_lock", owner="other")
    assert refused["failed"]
    assert refused["holder"]["details"] == {"run_id": 1}
    call(fleet, "host_lock", owner="other", state="absent")
    assert call(fleet, "host_lock", owner="other", takeover="one")["previous"] == "one"
    call(fleet, "host_lock", owner="other", state="absent")
    assert call(fleet, "host_lock", owner="one")["previous"] is None


def test_what_is_not_simulated_fails_and_says_so(fleet):
    answer = call(fleet, "reboot")
    assert answer["failed"]
    assert "reboot is not simulated" in answer["msg"]


def test_commands_of_the_roles_are_answered_and_no_others(fleet):
    def run(command):
        return call(fleet, "command", _raw_params=command)

    keys = run('for key in m0001-b migration; do base64 --wrap=0 "$key" && echo || exit 1; done')
    assert len(keys["stdout"].splitlines()) == 2
    assert run('for lock in /run/lock/*; do flock "$lock" true; done') == {
        "changed": True,
        "rc": 0,
        "stdout": "",
        "stderr": "",
        "cmd": ["for", "lock", "in", "/run/lock/*;", "do", "flock", '"$lock"', "true;", "done"],
    }
    assert run("reboot")["failed"]


def test_an_uploaded_file_can_be_copied_and_read(fleet):
    fleet.upload("m0001", "/tmp/source", "text")
    call(fleet, "copy", src="/tmp/source", dest="/var/lib/state.json")
    assert base64.b64decode(call(fleet, "slurp", src="/var/lib/state.json")["content"]) == b"text"
    assert call(fleet, "slurp", src="/tmp/source")["failed"]


# --- what goes wrong


def test_a_failing_migration_fails_until_the_cause_is_removed(fleet):
    start(fleet)
    attach(fleet, "m0001-g02")
    fleet.set_fault("m0001", "fails", 2)
    assert not move(fleet, "m0001-g02", _ansible_check_mode=True).get("failed")
    for _ in range(2):
        assert move(fleet, "m0001-g02")["failed"]
    fleet.set_fault("m0001", None)
    assert move(fleet, "m0001-g02")["location"] == "destination"


def test_the_controller_is_killed_once_and_after_the_migration(fleet):
    start(fleet)
    attach(fleet, "m0001-g01")
    fleet.set_fault("m0001", "kills", 1)
    # The controller forks, as Ansible does, a worker that makes the call.
    code = f"""
import os, pathlib, time
from benchmarks.fleet.simulation import Fleet
if os.fork():
    time.sleep(60)
Fleet(pathlib.Path({str(fleet.folder)!r})).call("m0001", "m0001-a", "guest_migrate", {{"name": "m0001-g01"}})
"""
    controller = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=50)
    assert controller.returncode == -signal.SIGKILL
    assert fleet.read("m0001")["host_vms"]["m0001-b"]["guests"] == ["m0001-g01"]
    assert move(fleet, "m0001-g02").get("failed")  # its disk is not there: the fault is over, and nobody is killed
    assert fleet.read("m0001")["fault"] is None


# --- the connection


def test_the_payload_of_this_ansible_is_understood(tmp_path):
    """A real run of one module: the connection plugin finds name and arguments in what Ansible sends."""
    path = inventory.write(tmp_path, hosts=1, guests=1)
    found = subprocess.run(
        ["ansible", "m0001", f"--inventory={path}", "-m", "vmbeam.xen.host_vm_info", "-a", "name=m0001-a", "-o"],
        env=runs.environment(tmp_path) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "SUCCESS" in found.stdout, found.stdout + found.stderr
    assert json.loads(found.stdout.split("=> ", 1)[1])["host_vms"][0]["name"] == "m0001-a"


def test_arguments_with_quotes_and_lines_survive():
    arguments = {"content": "a \"quoted\"\nline, with 'both' and = signs,"}
    params = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
    payload = (
        f"code\n    _ansiballz_main(\nansible_module='vmbeam.xen.guest',\nparams={params!r},\nzip_data='UEs=',\n)\n"
    )
    assert module_call(payload) == ("guest", arguments)


# --- a whole run


@pytest.mark.parametrize("method", [runs.by_serial(1), runs.PLAIN_LOOP], ids=["rejuvenate.yml", "loop.yml"])
def test_a_small_fleet_is_rolled_to_its_end(method, monkeypatch):
    """By real Ansible and the real roles: if they ask for what is not simulated, the benchmark measures nothing."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    record = runs.measure(method, hosts=2, guests=2, forks=5)
    assert "problem" not in record, record["problem"]
    assert record["calls_per_host"] > 0


# --- the command and the page


def record(hosts, cpu, **more):
    return {
        "method": "serial 1",
        "hosts": hosts,
        "guests": 10,
        "forks": 5,
        "seconds": 2 * cpu,
        "cpu_seconds": cpu,
        "peak_mb": 60 + hosts / 10,
        "code": 0,
        "calls_per_host": 108.0,
        **more,
    }


def test_linear_cost_has_the_same_further_cost_and_a_falling_ratio():
    (found,) = report.growth([record(hosts, 3 + 2 * hosts) for hosts in (100, 1, 10)])
    assert found["sizes"] == [1, 10, 100]
    assert found["further"] == [2, 2]
    assert found["further_mb"] == [0.1, 0.1]
    assert found["per_host"] == pytest.approx(2.03 / 5, abs=0.01)
    assert found["cpu"] == {"slope": 2, "intercept": 3, "residual": 0}
    assert found["memory"] == {"slope": 0.1, "intercept": 60, "residual": 0}


def test_quadratic_cost_shows():
    (found,) = report.growth([record(hosts, hosts * hosts) for hosts in (1, 10, 100)])
    assert found["further"] == [11, 110]
    assert found["per_host"] == 100
    assert found["cpu"]["residual"] > 1


def test_growth_leaves_out_what_failed_and_what_has_one_size():
    assert report.growth([record(1, 1), record(10, 10, problem="log"), record(10, 10, forks=50)]) == []


def test_what_would_take_too_long_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "measure", lambda method, hosts, guests, forks: record(hosts, 10 * hosts))
    argv = ["--hosts", "10,3,100", "--limit", "900", "--serials", "[1]", "--no-loop", "--no-events"]
    assert command.main([*argv, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "fleet.json").read_text())
    assert [entry["hosts"] for entry in found["costs"]] == [3, 10]
    assert found["not_run"] == ["serial 1, 100 hosts, 5 forks: would take about 33 minutes here"]
    page = (tmp_path / "FLEET.md").read_text()
    assert found["not_run"][0] in page
    assert "not complete" not in page
    assert "| serial 1 | 5 | 3, 10 | 1.00x | 10.00 | 0.10 |" in page
    assert "| serial 1 | 5 | 0.0 + 10.00 n | 0.0% | - | 60 + 0.10 n | 0.0% |" in page


def test_a_fleet_that_was_not_rolled_to_its_end_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "measure", lambda *_arguments: record(3, 3, problem="fatal"))
    argv = ["--hosts", "3", "--serials", "[1]", "--no-loop", "--no-events", "--output", str(tmp_path)]
    assert command.main(argv) == 1
    assert "**no**" in (tmp_path / "FLEET.md").read_text()


def test_a_run_that_was_broken_off_says_so(tmp_path, monkeypatch):
    def measure(_method, hosts, _guests, _forks):
        if hosts == 10:
            raise KeyboardInterrupt
        return record(hosts, hosts)

    monkeypatch.setattr(runs, "measure", measure)
    argv = ["--hosts", "3,10", "--serials", "[1]", "--no-loop", "--no-events", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        command.main(argv)
    page = (tmp_path / "FLEET.md").read_text()
    assert "not complete" in page
    assert "| serial 1 | 3 x 10 |" in page
