"""What the reliability count makes of logs and records."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lab"))

from vmbeam_lab import reliability

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
    return {"run": number, "outcome": outcome, "reason": f"boot: why {number}", "longest_gap_seconds": gap}


def test_a_boot_that_hung_is_told_with_its_console():
    assert reliability.reason("m1: boot retry 1", HUNG).startswith("lab: m1: BOOT RETRY 1 of 2")
    assert "(XEN) hangs here" in reliability.explain(HUNG)


def test_of_ansibles_errors_the_last_is_told():
    assert (
        reliability.reason("ansible-playbook: exit status 2", ANSIBLE) == 'fatal: [m1]: FAILED! => {"msg": "no answer"}'
    )


def test_the_error_itself_is_told_if_the_log_tells_nothing_or_time_ran_out():
    assert reliability.reason("guest web1: another instance\nmore", "") == "guest web1: another instance"
    assert reliability.reason("up.yml: not done after 1800 s", ANSIBLE) == "up.yml: not done after 1800 s"


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
