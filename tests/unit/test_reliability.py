"""What the reliability count makes of logs and records, and that runs side by side keep apart."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lab"))

from vmbeam_lab import paths, reliability, reliability_run, topology
from vmbeam_lab.errors import LabError
from vmbeam_lab.shell import isolated

HUNG = """\
lab: m1: boot host hypervisor and host dom0 ...
lab: m1: BOOT RETRY 1 of 2: m1: host dom0 not ready after 420 s; last: timed out
--- console
(XEN) hangs here
lab: m1: boot host hypervisor and host dom0: done in 60.0 s
"""
ANSIBLE = """\
[ERROR]: Task failed: ignored
fatal: [m1]: FAILED! => {"msg": "ignored"}
...ignoring
fatal: [m1]: FAILED! => {"msg": "no answer"}
PLAY RECAP
"""


def record(number, outcome="done", gap=0.3):
    return {
        "run": number,
        "machine": "m2",
        "worker": 1,
        "outcome": outcome,
        "reason": f"boot: why {number}" if outcome != "done" else None,
        "longest_gap_seconds": gap,
        "memory_errors": 0,
        "seconds": 500.0,
    }


def test_a_boot_that_hung_is_told_with_its_console():
    assert reliability_run.reason("m1: boot retry 1", HUNG).startswith("lab: m1: BOOT RETRY 1 of 2")
    assert "(XEN) hangs here" in reliability_run.explain(HUNG)


def test_of_ansibles_errors_the_last_is_told():
    assert (
        reliability_run.reason("ansible-playbook: exit status 2", ANSIBLE)
        == 'fatal: [m1]: FAILED! => {"msg": "no answer"}'
    )


def test_the_error_itself_is_told_if_the_log_tells_nothing_or_time_ran_out():
    assert reliability_run.reason("guest web1: another instance\nmore", "") == "guest web1: another instance"
    assert reliability_run.reason("up.yml: not done after 1800 s", ANSIBLE) == "up.yml: not done after 1800 s"


def test_a_record_that_was_cut_is_done_again():
    assert reliability.parse_records('{"run": 1}\n{"run": 2}\n{"ru') == [{"run": 1}, {"run": 2}]
    assert reliability.parse_records("") == []


@pytest.mark.parametrize(("done", "failed", "expected"), [(0, 0, False), (19, 1, True), (18, 2, False), (1, 0, True)])
def test_95_percent_are_reliable(done, failed, expected):
    records = [record(n) for n in range(done)] + [record(n, "failed") for n in range(failed)]
    assert reliability.reliable(records) is expected


def test_summary_counts_and_tells_each_reason():
    text = reliability.summary([record(1, gap=0.2), record(2, "failed"), record(3, gap=1.25)])
    assert text.splitlines() == [
        "2 of 3 runs succeeded without a retry",
        "longest gap between two ticks of a guest: 1.2 s",
        "run 2: boot: why 2",
    ]


@pytest.fixture
def machine():
    return topology.load(paths.LAB / "topology.yml").machines["m2"]


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "STATE", tmp_path)
    monkeypatch.setattr(reliability, "RECORDS", tmp_path / "reliability.jsonl")
    return tmp_path


def workers(count):
    return [reliability.make_worker(n + 1, paths.LAB / "topology.yml", "m2") for n in range(count)]


def test_summary_is_in_the_order_of_runs():
    text = reliability.summary([record(3, "failed"), record(1), record(2, "failed")])
    assert text.splitlines()[2:] == ["run 2: boot: why 2", "run 3: boot: why 3"]


def test_report_tells_command_count_and_each_run(machine):
    failed = {**record(1, "failed"), "reason": "boot: a|b", "seconds": 99.6}
    del failed["longest_gap_seconds"], failed["memory_errors"]
    text = reliability.report([record(2, gap=1.25), failed], machine, 2, 5)
    assert "`make lab-reliability N=2 ARGS='--machine m2 --parallel 2 --minutes 5'`" in text
    assert "- 1 of 2 runs succeeded without a retry" in text
    assert text.splitlines()[-2:] == [
        "| 1 | m2, 1 | failed | 100 | - | - | boot: a\\|b |",
        "| 2 | m2, 1 | done | 500 | 1.2 | 0 |  |",
    ]


def test_more_machines_than_memory_are_refused(machine):
    reliability.check_memory(machine, 2, 2 * machine.memory_mb)
    with pytest.raises(LabError, match="--parallel 2 at most"):
        reliability.check_memory(machine, 3, 3 * machine.memory_mb - 1)


def test_workers_share_no_port_and_no_directory(state):
    made = workers(3)
    loaded = [topology.load(worker.topology) for worker in made]
    ports = [machine.ssh_port for lab in loaded for machine in lab.machines.values()]
    ports += [guest.http_port for worker in made for guest in worker.machine.guests.values()]
    listed = topology.load(paths.LAB / "topology.yml").machines.values()
    ports += [machine.ssh_port for machine in listed] + [g.http_port for m in listed for g in m.guests.values()]
    assert len(set(ports)) == len(ports)
    assert len({worker.state for worker in made}) == 3
    # What images are made of is the same, so that they are built once.
    assert len({(worker.machine.name, worker.machine.address, *worker.machine.slots.values()) for worker in made}) == 1


def program(monkeypatch, text):
    """Have a program of Python do the runs: it knows number, record (a path) and worker."""

    def command(worker, number, minutes, record):
        known = f"number, record, worker = {number}, {str(record)!r}, {worker.number}"
        return [sys.executable, "-c", f"import json, os, time\n{known}\n{text}"]

    monkeypatch.setattr(reliability, "command", command)


DONE = "json.dump({'outcome': 'done', 'reason': None, 'seconds': 1, 'longest_gap_seconds': 0.1}, open(record, 'w'))"


def test_each_wanted_run_is_done_once(state, monkeypatch):
    program(monkeypatch, f"open({str(state / 'log')!r}, 'a').write(f'{{number}}\\n')\n{DONE}")
    runs = reliability.Runs(5, 0, [record(2)])
    reliability.do(runs, workers(2))
    assert sorted((state / "log").read_text().split()) == ["1", "3", "4", "5"]
    assert sorted(entry["run"] for entry in runs.records) == [1, 2, 3, 4, 5]
    written = reliability.parse_records((state / "reliability.jsonl").read_text())
    assert {(entry["run"], entry["machine"]) for entry in written} == {(n, "m2") for n in (1, 3, 4, 5)}


def test_runs_go_on_side_by_side(state, monkeypatch):
    # Each waits for the other one's mark.
    program(
        monkeypatch,
        f"open({str(state)!r} + f'/{{number}}', 'w').close()\n"
        f"while not os.path.exists({str(state)!r} + f'/{{3 - number}}'): time.sleep(0.01)\n{DONE}",
    )
    runs = reliability.Runs(2, 0, [])
    reliability.do(runs, workers(2))
    assert reliability.succeeded(runs.records) == 2


def test_a_process_that_dies_is_a_failed_run(state, monkeypatch):
    program(monkeypatch, "os._exit(3)")
    runs = reliability.Runs(1, 0, [])
    reliability.do(runs, workers(1))
    assert runs.records[0]["outcome"] == "failed"
    assert runs.records[0]["reason"] == "the run's process ended with status 3"


def test_an_interruption_ends_the_runs_and_records_none(state, monkeypatch):
    program(monkeypatch, f"open({str(state)!r} + f'/{{number}}', 'w').close()\ntime.sleep(600)")
    runs = reliability.Runs(4, 0, [])

    def interrupt(futures):
        deadline = time.monotonic() + 30
        while not all((state / number).exists() for number in "12"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(reliability.concurrent.futures, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reliability.do(runs, workers(2))
    assert runs.records == []
    assert not (state / "3").exists()


def needs_namespaces():
    made = subprocess.run(isolated(["true"]), capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no namespaces here: {made.stderr.strip()}")


def alive(marker):
    """Whether a process has this word in its command line."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and directory.name != str(os.getpid()):
            try:
                words = (directory / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if marker.encode() in words:
                found.append(directory.name)
    return found


def test_what_a_killed_run_started_is_gone(tmp_path):
    needs_namespaces()
    marker, ready = f"vmbeam-test-{os.getpid()}", tmp_path / "ready"
    # A daemon, as QEMU is one: another session, its parent gone.
    daemon = f"setsid -f sh -c 'sleep 600; :' {marker}; touch {ready}; sleep 600"
    process = subprocess.Popen(isolated(["sh", "-c", daemon]))
    try:
        deadline = time.monotonic() + 30
        while not (ready.exists() and alive(marker)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait(10)
        while alive(marker):
            assert time.monotonic() < deadline, "the daemon outlives the run"
            time.sleep(0.02)
    finally:
        for pid in alive(marker):
            os.kill(int(pid), signal.SIGKILL)


class Future:
    """Done once it was asked that often."""

    def __init__(self, looks):
        self.looks = looks

    def done(self):
        self.looks -= 1
        return self.looks <= 0


def test_the_guest_is_watched_until_both_host_vms_are_up(machine, monkeypatch):
    looked = []
    status = {"memory": {"verified": 1, "errors": 0}}

    def settled(port, silence):
        looked.append(port)
        return {"memory": {"verified": 1 + len(looked), "errors": 0}}

    lab = object.__new__(reliability_run.Lab)
    lab.machine, lab.guest = machine, reliability_run.ticking_guest(machine)
    monkeypatch.setattr(reliability_run.guests, "await_start", lambda port, timeout: status)
    monkeypatch.setattr(reliability_run.guests, "reset_ticks", lambda port, word: status)
    monkeypatch.setattr(reliability_run.guests, "settled_status", settled)
    monkeypatch.setattr(reliability_run.guests, "trouble", lambda first, last: None)
    monkeypatch.setattr(reliability_run.guests, "longest_gap", lambda last: 0.5)
    seen = lab.watch(0, Future(3))
    assert looked == [lab.guest.http_port] * 3
    assert seen == {"longest_gap_seconds": 0.5, "memory_errors": 0}
