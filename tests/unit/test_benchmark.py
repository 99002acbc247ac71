"""The benchmark's statistics and table, and what the lab's helpers read from Ansible and guests."""

import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]

from vmbeam_lab import ansible, guests  # noqa: E402
from vmbeam_lab.errors import LabError  # noqa: E402

from benchmarks import meters, migration, plots, results, web  # noqa: E402


def measured(method, seconds, downtime, size=128, gap=0.5, size_bytes=None):
    return {
        "size_mib": size,
        "method": method,
        "seconds": seconds,
        "downtime_seconds": downtime,
        "longest_gap_seconds": gap,
        "bytes": size_bytes,
    }


def test_every_round_has_every_method_and_each_goes_both_ways():
    order = results.schedule(2)
    half = len(results.METHODS)
    assert sorted(order[:half]) == sorted(order[half:]) == sorted(results.METHODS)
    ways = {(method, number % 2) for number, method in enumerate(order)}
    assert ways == set(itertools.product(results.METHODS, (0, 1)))


def test_summary():
    assert results.summary([3.0, 1.0, None, 2.5]) == {"median": 2.5, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.5]}
    assert results.summary([None]) is None


def test_results_have_ratios_of_medians_to_the_baseline_of_their_size():
    found = results.summarize(
        [
            measured("precopy-ssh", 10.0, 2.0),
            measured("precopy-ssh", 30.0, 4.0),
            measured("precopy-ssh", 20.0, None),
            measured("suspend-tcp", 5.0, 4.5, size_bytes=1 << 27),
            measured("precopy-ssh", 100.0, 8.0, size=512),
        ]
    )
    assert list(found) == ["128", "512"]
    assert found["128"]["precopy-ssh"]["seconds"]["median"] == 20
    assert found["128"]["suspend-tcp"]["ratio_to_precopy-ssh"] == {"seconds": 0.25, "downtime_seconds": 1.5}
    assert found["512"]["precopy-ssh"]["ratio_to_precopy-ssh"]["seconds"] == 1
    assert list(found["512"]) == ["precopy-ssh"]


def test_table_and_page():
    found = results.summarize(
        [measured("precopy-ssh", 10.0, 2.0), measured("suspend-tcp", 5.0, 3.0, size_bytes=1 << 27)]
    )
    table = results.table(found)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    by_method = {row[1]: row for row in rows[2:]}
    assert by_method["precopy-ssh"][2:5] == ["10.00 (10.00-10.00)", "1.00x", "2.00 (2.00-2.00)"]
    assert by_method["precopy-ssh"][7] == "-"
    assert by_method["suspend-tcp"][3:6:2] == ["0.50x", "1.50x"]
    assert by_method["suspend-tcp"][7] == "128.00 (128.00-128.00)"
    page = results.page("make bench", found, "boot 1.0 s")
    assert table in page
    assert "`make bench`" in page
    assert "ratios" in page


def by_rate(method, rate, seconds):
    return {**measured(method, seconds, seconds / 10, size=256), "rate": rate, "achieved_rate": rate - 1}


def test_figures_have_rows_with_the_baseline_by_zero_copy(tmp_path):
    by_size = [
        measured("precopy-ssh", 40.0, 2.0),
        {**measured("zero-copy", 4.0, 1.0), "network_bytes": 0, "pages_copied": 8},
        measured("precopy-ssh", 80.0, 2.0, size=512),
        {**measured("zero-copy", 5.0, 1.0, size=512), "network_bytes": 0, "pages_copied": 9},
    ]
    found = results.figures(by_size, [by_rate("precopy-ssh", 0, 50.0), by_rate("zero-copy", 0, 5.0)])
    assert set(found) == {"fig7", "fig9", "fig10", "fig11", "fig12", "fig15-copied"}
    assert [(row["size_mib"], row["ratio"]) for row in found["fig7"]["rows"]] == [(128, 10.0), (512, 16.0)]
    assert found["fig10"]["rows"][0]["achieved_rate"] == -1
    assert list(found["fig15-copied"]["rows"][0]["methods"]) == ["zero-copy"]
    text = results.figures_text(found)
    assert "| 512 | 80.00 (80.00-80.00) | 5.00 (5.00-5.00) | 16.00x |" in text
    drawn = plots.draw(found, tmp_path / "plots")
    # One row makes no plot.
    assert {path.stem for path in drawn} == {"fig7", "fig9", "fig12", "fig15-copied"}
    assert all(b"<svg" in path.read_bytes() for path in drawn)


def test_throughput_is_compared_with_memcpy():
    assert "| channel | 5.00 | 0.500x |" in results.throughput_text({"channel": 5.0, "memcpy": 10.0})


def test_answers_are_counted_before_during_and_after():
    load = web.Load(0)
    load._times = [0.0, 1.0, 2.0, 9.0, 12.0, 12.5, 13.0, 14.0]
    assert load.answers(2.0, 12.0) == web.Answers(before=1.0, during=0.2, after=1.5)
    text = results.web_text([{"method": "zero-copy", **load.answers(2.0, 12.0)._asdict()}])
    assert "| zero-copy | 1.0 | 0.2 | 1.5 |" in text
    assert results.web_text([]) == ""


def test_meters_read_what_tc_and_xl_say():
    text = """\
[{"protocol":"all","pref":1},{"protocol":"all","kind":"flower","options":{"actions":[{"order":1,"stats":{"bytes":700}}]}}]

[{"kind":"flower","options":{"actions":[{"stats":{"bytes":34}}]}}]
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1536     1     r-----     105.5
m1-a                                         2  3072     1     -b----      22.3
"""
    assert meters.network_bytes(text) == 734
    for broken in ("", "[]", text.replace("34}", '34}},{"stats":{"bytes":1}')):
        with pytest.raises(LabError):
            meters.network_bytes(broken)
    assert meters.cpu_seconds(text) == {"Domain-0": 105.5, "m1-a": 22.3}
    earlier, later = meters.Reading(100, {"m1-a": 1.5}), meters.Reading(150, {"m1-a": 4.0})
    assert later.since(earlier) == {"network_bytes": 50, "cpu_seconds": {"m1-a": 2.5}}


def test_methods_and_rates():
    assert migration.methods("zero-copy,precopy-ssh") == ["zero-copy", "precopy-ssh"]
    assert migration.numbers("") == []
    assert migration.numbers("0,1000") == [0, 1000]
    for parse, text in ((migration.methods, "rsync"), (migration.methods, ""), (migration.numbers, "1,1")):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse tells the user which
            parse(text)


def test_sizes():
    assert migration.sizes_mib("128,512") == [128, 512]
    for text in ("", "128,", "0", "-1", "64,64", "big"):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse tells the user which
            migration.sizes_mib(text)


def test_the_result_is_found_among_warnings():
    output = (
        '[WARNING]: something {odd}\nm1-a | CHANGED => {\n    "changed": true,\n    "n": {"x": 1}\n}\n[WARNING]: more\n'
    )
    assert ansible.parse_result(output) == {"changed": True, "n": {"x": 1}}
    with pytest.raises(LabError, match="no hosts"):
        ansible.parse_result("[WARNING]: no hosts matched")


def status(**changes):
    return {
        "boot_id": "one",
        "uptime": 100.0,
        "memory": {"errors": 0, "last_error": None},
        "disk": None,
        "ticks": {"longest_gap_ms": {"monotonic": 210.0, "boottime": 1500.0, "realtime": 1400.0}},
        **changes,
    }


def test_longest_gap_is_in_seconds_and_of_any_clock():
    assert guests.longest_gap(status()) == 1.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"boot_id": "two"}, "another instance"),
        ({"uptime": 99.0}, "back in time"),
        ({"memory": {"errors": 2, "last_error": {"kind": "stale"}}}, "2 memory errors, the last: {'kind': 'stale'}"),
        ({"disk": {"write_errors": 0, "readback_errors": 0, "foreign_records": 1}}, "disk errors"),
        ({"disk": {"write_errors": 0, "readback_errors": 0, "foreign_records": 0}}, None),
    ],
)
def test_trouble(changes, words):
    found = guests.trouble(status(), status(**changes))
    assert found is None if words is None else words in found
