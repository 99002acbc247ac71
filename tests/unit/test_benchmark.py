"""The benchmark's schedule, statistics, verdicts and pages, and what the lab's helpers read from Ansible and guests."""

import itertools
import json
import signal
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]

from vmbeam_lab import ansible, guests, topology  # noqa: E402
from vmbeam_lab.errors import CommandFailed, LabError, ModuleFailed  # noqa: E402

from benchmarks import lab, meters, migration, page, plots, results, schedule, verdicts, web  # noqa: E402

PAIR = ["precopy-ssh", "zero-copy"]


# --- schedule


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def cell(size=128, least=1, wanted=3, rounds=3, label=None):
    return schedule.Cell(
        "by_size",
        label or f"{size} MiB",
        size,
        wanted={"precopy-ssh": wanted, "zero-copy": rounds},
        least={"precopy-ssh": least, "zero-copy": rounds},
    )


def play(one, budget, seconds, clock, given_up=()):
    """Go through the turns of a cell, each of which takes so many seconds by method."""
    budget.enter(one)
    order = []
    for method in schedule.turns(one, budget, given_up):
        clock.now += seconds[method]
        budget.done(method, seconds[method])
        order.append(method)
    return order


def test_with_time_enough_the_methods_take_turns_and_each_goes_both_ways():
    clock, one = Clock(), cell()
    order = play(one, schedule.Budget(1e9, [one], clock), {"precopy-ssh": 70, "zero-copy": 20}, clock)
    assert [sorted(order[place : place + 2]) for place in (0, 2, 4)] == [PAIR] * 3
    ways = {(method, number % 2) for number, method in enumerate(order)}
    assert ways == set(itertools.product(PAIR, (0, 1)))


def test_without_time_there_is_the_least():
    clock, one = Clock(), cell()
    order = play(one, schedule.Budget(0, [one], clock), {"precopy-ssh": 70, "zero-copy": 20}, clock)
    assert order == ["precopy-ssh", "zero-copy", "zero-copy", "zero-copy"]


def test_one_cell_does_not_take_the_time_that_the_next_ones_need():
    clock = Clock()
    cells = [cell(128), cell(2048)]
    budget = schedule.Budget(0, cells, clock)
    budget.enter(cells[0])
    # What is needed, and one more migration of 128 MiB.
    seconds = {size: {method: budget.estimate(method, size) for method in PAIR} for size in (128, 2048)}
    budget = schedule.Budget(budget.least_left() + 1.5 * seconds[128]["precopy-ssh"], cells, clock)
    first = play(cells[0], budget, seconds[128], clock)
    assert first.count("precopy-ssh") == 2
    second = play(cells[1], budget, seconds[2048], clock)
    assert second.count("precopy-ssh") == 1
    assert second.count("zero-copy") == 3


def test_estimates_follow_what_was_measured_but_not_failures():
    cells = [cell(128), cell(1024)]
    budget = schedule.Budget(0, cells, Clock())
    budget.enter(cells[0])
    guess, least = budget.estimate("precopy-ssh", 1024), budget.least_left()
    budget.done("precopy-ssh", None)
    assert budget.estimate("precopy-ssh", 1024) == guess
    assert budget.least_left() == least - budget.estimate("precopy-ssh", 128)
    budget.done("precopy-ssh", 2 * budget.estimate("precopy-ssh", 128))
    assert budget.estimate("precopy-ssh", 1024) == 2 * guess
    # All over: nothing is left.
    budget.enter(cells[1])
    for method, count in cells[1].least.items():
        for _ in range(count):
            budget.done(method, None)
    assert budget.least_left() == 0


def test_a_method_that_is_given_up_has_no_more_turns():
    one, given_up = cell(), set()
    budget = schedule.Budget(1e9, [one], Clock())
    budget.enter(one)
    order = []
    for method in schedule.turns(one, budget, given_up):
        order.append(method)
        if method == "precopy-ssh":
            given_up.add(method)
    assert order == ["precopy-ssh", *3 * ["zero-copy"]]


def wishes(**changes):
    defaults = migration.parse([])
    values = {
        "sizes_mib": defaults.sizes,
        "copy_sizes_mib": defaults.copy_sizes,
        "rates": defaults.rates,
        "rate_size_mib": defaults.rate_size,
        "methods": defaults.methods,
        "rounds": defaults.rounds,
        "stock_rounds": defaults.stock_rounds,
        "vcpus": defaults.vcpus,
        "web": not defaults.no_web,
        "together": not defaults.no_together,
    }
    return schedule.Wishes(**{**values, **changes})


def test_cells_by_default_have_all_that_the_figures_to_meet_need():
    cells = schedule.cells(wishes(), "precopy-ssh")
    by_kind = {kind: [one for one in cells if one.kind == kind] for kind in results.KINDS}
    assert [one.size_mib for one in by_kind["by_size"]] == [128, 256, 512, 1024, 2048]
    assert all(one.least == {"precopy-ssh": 1, "zero-copy": 5} for one in by_kind["by_size"] if one.size_mib != 1024)
    (gib,) = [one for one in by_kind["by_size"] if one.size_mib == 1024]
    assert gib.least == {"precopy-ssh": 1, "suspend-tcp": 1, "suspend-channel": 1, "zero-copy": 5}
    assert [one.rate for one in by_kind["by_rate"]] == [0, 1000, 3000, 10000]
    stock_too = {"wanted": {"precopy-ssh": 5, "zero-copy": 5}, "least": {"precopy-ssh": 1, "zero-copy": 5}}
    for one in (*by_kind["by_rate"], *by_kind["web"]):
        assert {"wanted": one.wanted, "least": one.least} == stock_too, one.label
    # What takes longest comes late: there the budget cuts.
    assert [one.kind for one in cells] == [*4 * ["by_rate"], "web", *5 * ["by_size"], *3 * ["others"]]
    assert [(one.type, one.vcpus) for one in by_kind["others"]] == [("pvh", 4), ("hvm", 4), ("pvh", 1)]
    assert [one.together for one in by_kind["others"]] == [False, False, True]
    # One guest serves all rates, and the web.
    assert len({migration.guest_of(one) for one in (*by_kind["by_rate"], *by_kind["web"])}) == 1


def test_whole_cells_are_not_cut_by_the_budget():
    clock, cells = Clock(), schedule.whole([cell(wanted=3, rounds=3)])
    order = play(cells[0], schedule.Budget(0, cells, clock), {"precopy-ssh": 70, "zero-copy": 20}, clock)
    assert {method: order.count(method) for method in PAIR} == {"precopy-ssh": 3, "zero-copy": 3}


def test_help_says_about_how_long_all_takes(capsys):
    minutes = schedule.Budget(0, schedule.whole(schedule.cells(wishes(), "precopy-ssh"))).least_left() / 60
    assert 3.5 * 60 < minutes < 4.5 * 60
    with pytest.raises(SystemExit):
        migration.parse(["--help"])
    assert "about four hours by default" in " ".join(capsys.readouterr().out.split())


def test_cells_without_what_is_not_wanted():
    cells = schedule.cells(wishes(methods=["precopy-ssh"], sizes_mib=[128], rates=[], web=False), "precopy-ssh")
    assert [one.wanted for one in cells] == [{"precopy-ssh": 5}]
    assert schedule.cells(wishes(methods=["suspend-tcp"], sizes_mib=[128], rates=[], web=False), "precopy-ssh") == []


# --- statistics


def measured(method, seconds, downtime=1.0, size=128, **more):
    return {"size_mib": size, "method": method, "seconds": seconds, "downtime_seconds": downtime, **more}


def failed(method, size=128, limit=None):
    more = {} if limit is None else {"more_than_seconds": limit}
    return {"size_mib": size, "method": method, "failed": "why", **more}


def records(**some):
    return {**{kind: [] for kind in results.KINDS}, **some}


def test_summary():
    found = results.summary([measured("x", value) for value in (3.0, 1.0, None, 2.5)])
    assert found == {
        "median": 2.5,
        "min": 1.0,
        "max": 3.0,
        "values": [1.0, 2.5, 3.0],
        "n": 3,
        "over_time": 0,
        "failed": 0,
        "lower_bound": False,
    }
    assert results.summary([]) is None
    found = results.summary([failed("x")])
    assert (found["median"], found["n"], found["failed"]) == (None, 0, 1)


@pytest.mark.parametrize(
    ("values", "over", "median", "lower_bound"),
    [
        ([], 1, 600, True),
        ([10.0, 20.0], 1, 20.0, False),
        ([10.0], 1, 305.0, True),
        ([10.0, 11.0, 12.0], 1, 11.5, False),
    ],
)
def test_migrations_beyond_the_limit_make_lower_bounds(values, over, median, lower_bound):
    entries = [measured("x", value) for value in values] + over * [failed("x", limit=600)]
    found = results.summary(entries)
    assert (found["median"], found["lower_bound"]) == (median, lower_bound)
    assert (found["n"], found["over_time"], found["failed"]) == (len(values), over, 0)
    assert found["max"] == 600
    # Nothing is known of their downtime.
    downtime = results.summary(entries, "downtime_seconds")
    assert downtime["over_time"] == over
    assert not downtime["lower_bound"]


def test_ratios_of_lower_bounds():
    over, ten, two = (
        results.summary([entry]) for entry in (failed("x", limit=600), measured("x", 10.0), measured("x", 2.0))
    )
    assert results.ratio(ten, two) == {"value": 5.0, "relation": "="}
    assert results.ratio(over, two) == {"value": 300.0, "relation": ">="}
    assert results.ratio(two, over) == {"value": 0.003, "relation": "<="}
    assert results.ratio(over, over) is None
    assert results.ratio(ten, results.summary([measured("x", 0)])) is None
    assert results.ratio(ten, None) is None
    assert results.ratio(results.summary([failed("x")]), two) is None


def test_results_have_ratios_of_medians_to_the_baseline_of_their_size():
    found = results.summarize(
        [
            measured("precopy-ssh", 10.0, 2.0),
            measured("precopy-ssh", 30.0, 4.0),
            measured("precopy-ssh", 20.0, None),
            measured("suspend-tcp", 5.0, 4.5),
            measured("precopy-ssh", 100.0, 8.0, size=512),
        ]
    )
    assert list(found) == ["128", "512"]
    assert found["128"]["precopy-ssh"]["seconds"]["median"] == 20
    to_baseline = found["128"]["suspend-tcp"]["ratio_to_precopy-ssh"]
    assert {metric: one["value"] for metric, one in to_baseline.items()} == {"seconds": 0.25, "downtime_seconds": 1.5}
    assert list(found["512"]) == ["precopy-ssh"]


def by_rate(method, rate, seconds, downtime=1.0, achieved=None):
    more = {"rate": rate, "achieved_rate": rate if achieved is None else achieved}
    return measured(method, seconds, downtime, size=256, **more)


OURS = {
    "network_bytes": 0,
    "pages_copied": 3,
    "pages_sent": 5,
    "hypercalls": 20,
    "p2m_writes_4k": 16,
    "p2m_writes_2m": 64,
}
METERS = {
    **{f"cpu_{key}": 1.5 for key in ("host_dom0", "source", "destination", "machine")},
    **{f"cpu_share_{key}": 15.0 for key in ("host_dom0", "source", "destination")},
    "peak_memory_mib": 9000,
}


def everything():
    """Records of all that the figures need."""
    made = records(
        by_rate=[
            *(by_rate("precopy-ssh", rate, 100.0 + rate / 100, 2.0) for rate in (0, 10000)),
            *(by_rate("zero-copy", rate, 7.0, 1.0) | OURS for rate in (0, 10000)),
        ],
        web=[
            measured(method, 9.0, size=256, before=10.0, during=during, after=9.0, loss_percent=10 * (10 - during))
            | (OURS if method == "zero-copy" else {})
            for method, during in (("precopy-ssh", 3.0), ("zero-copy", 8.0))
        ],
        others=[measured("zero-copy", 8.0, size=512, guest="hvm, 4 vCPUs") | OURS],
        throughput=[
            {"way": way, "mib_per_s": value}
            for way, value in (("channel", 5.0), ("channel through pipes", 4.0), ("memcpy", 8.0), ("network", 2.0))
        ],
    )
    for size in (128, 512, 1024, 2048):
        for seconds in (6.0 + size / 1024, 8.0 + size / 1024):
            made["by_size"].append(measured("zero-copy", seconds, 1.0, size, **METERS) | OURS)
        stock = {**METERS, "network_bytes": size << 20, "bytes_copied": size << 20}
        made["by_size"].append(measured("precopy-ssh", 30 + size / 4, 2.5, size, **stock))
    made["by_size"].append(measured("suspend-tcp", 240.0, 230.0, 1024, **stock))
    return made


def about(**changes):
    return {"command": "make bench", "complete": True, "problems": [], "planned": [], "phases": [], **changes}


def test_every_figure_of_the_paper_has_its_key_and_both_methods():
    found = results.figures(everything())
    assert set(found) == {
        *("fig6", "fig7", "fig9", "fig10", "fig11", "fig12", "fig13", "fig14", "fig15", "fig16", "memory", "others")
    }
    for key, figure in found.items():
        if key not in ("fig6", "others", "fig15"):
            for part in figure["parts"]:
                assert part["rows"], (key, part["metric"])
                assert set(part["rows"][0]["methods"]) >= set(PAIR)
                assert all(part["rows"][0]["methods"][method]["n"] for method in PAIR), (key, part["metric"])
    (time,) = found["fig7"]["parts"]
    assert (time["rows"][0]["size_mib"], time["rows"][0]["ratio"]["value"]) == (128, round(62 / 7.125, 3))
    assert set(found["fig7"]["parts"][0]["rows"][2]["methods"]) == {*PAIR, "suspend-tcp"}
    assert {name: told["value"] for name, told in found["fig6"]["ratios"].items()} == {
        "channel / network": 2.5,
        "channel / memcpy": 0.625,
        "channel through pipes / network": 2.0,
        "channel through pipes / memcpy": 0.5,
    }
    parts = {part["metric"]: part for part in found["fig15"]["parts"]}
    assert parts["bytes_copied"]["rows"][0]["methods"]["precopy-ssh"]["median"] == 128 << 20
    # What the host hypervisor copied, and what the toolstack sent.
    assert parts["pages_copied_in_all"]["rows"][0]["methods"]["zero-copy"]["median"] == 8
    assert parts["bytes_copied"]["rows"][0]["methods"]["zero-copy"]["median"] == 32768
    assert parts["hypercalls"]["rows"][0]["methods"]["precopy-ssh"]["n"] == 0
    assert [row["achieved_rate"] for row in found["fig10"]["parts"][0]["rows"]] == [0, 10000]


def test_rows_without_a_ratio_say_what_there_is_instead():
    stock = measured("precopy-ssh", 30.0, network_bytes=4000)
    ours = measured("zero-copy", 7.0) | OURS
    found = results.figures(records(by_size=[stock, ours, failed("precopy-ssh", 512), {**ours, "size_mib": 512}]))
    rows = {part["metric"]: part["rows"] for key in ("fig7", "fig12", "fig15") for part in found[key]["parts"]}
    # All of stock's bytes are saved.
    both, alone = rows["network_bytes"]
    assert (both["ratio"], both["ratio_to_precopy-ssh"]) == (None, {"value": 0.0, "relation": "="})
    # Nothing counts these, if it was there to be counted.
    counted, failed_row = rows["hypercalls"]
    assert (counted["ratio"], counted["note"]) == (None, "not counted for stock")
    for row in (alone, failed_row):
        assert not row.keys() & {"note", "ratio_to_precopy-ssh"}
    assert not rows["seconds"][0].keys() & {"note", "ratio_to_precopy-ssh"}


# --- figures to meet


def verdict(made, word):
    (found,) = [one for one in verdicts.judge(made) if word in one["figure"]]
    return found


def test_verdicts_of_all_figures_to_meet():
    found = verdicts.judge(everything())
    assert [(one["value"], one["met"], one["aim_met"]) for one in found] == [
        (35.75, True, False),  # 286 / 8
        (30.0, True, True),  # 240 / 8
        (round(9 / 7.125, 3), True, False),
        (0.5, True, True),
        (0.0, True, None),
        (0, True, None),
        (8, True, None),
        (20, True, False),
        (0.625, True, None),
    ]


def test_verdicts_of_nothing_are_not_measured():
    found = verdicts.judge(records())
    assert len(found) == 9
    assert all(one["value"] is one["met"] is one["aim_met"] is None and one["note"] for one in found)
    assert "| not measured |" in page.verdicts_text(found)
    assert "met**" not in page.verdicts_text(found)


@pytest.mark.parametrize(
    ("word", "kind", "record", "value"),
    [
        ("network bytes", "by_rate", by_rate("zero-copy", 0, 7.0) | OURS | {"network_bytes": 60}, 60),
        ("pages copied", "others", measured("zero-copy", 7.0, guest="x") | OURS | {"pages_copied": 60}, 65),
        ("pages copied", "others", measured("zero-copy", 7.0, guest="x") | OURS | {"pages_sent": 62}, 65),
        ("hypercalls", "by_size", measured("zero-copy", 7.0, size=2048) | OURS | {"hypercalls": 130}, 65),
    ],
)
def test_counts_are_judged_by_the_worst_migration(word, kind, record, value):
    made = everything()
    made[kind].append(record)
    assert (verdict(made, word)["value"], verdict(made, word)["met"]) == (value, False)
    # A migration that does not tell could be worse.
    for key in ("network_bytes", "pages_sent", "hypercalls"):
        record[key] = None
    assert verdict(made, word)["met"] is None
    # One that failed has no counts.
    record["failed"] = "why"
    assert verdict(made, word)["met"] is True


def test_what_was_copied_is_not_known_if_the_toolstack_does_not_tell_its_part():
    # As it was recorded before the toolstack's part was.
    old = {"pages_copied": 0, "bytes_copied": 0}
    parts = results.figures(records(by_size=[measured("zero-copy", 7.0) | old]))["fig15"]["parts"]
    for part in parts[:2]:
        assert part["rows"][0]["methods"]["zero-copy"]["n"] == 0, part["metric"]
    text = page.page(results.document(records(by_size=[measured("zero-copy", 7.0) | old]), **about()))
    assert "Guest pages copied, by the host hypervisor and by the toolstack (pages):\n\nNot measured.\n" in text


def test_calls_of_large_guests_are_counted_per_gib():
    made = records(by_size=[measured("zero-copy", 7.0, size=size) | OURS for size in (128, 2048)])
    assert verdict(made, "hypercalls")["value"] == 10


def test_the_fastest_copy_is_the_fastest_of_all_but_takes_a_plain_one():
    stock, ours = measured("precopy-ssh", 100.0, size=1024), measured("zero-copy", 10.0, size=1024)
    assert verdict(records(by_size=[stock, ours]), "fastest copy")["value"] is None
    found = verdict(records(by_size=[stock, ours, measured("suspend-tcp", 120.0, size=1024)]), "fastest copy")
    assert (found["value"], found["met"], found["aim_met"]) == (10.0, True, False)
    assert "precopy-ssh" in found["note"]


@pytest.mark.parametrize(
    ("limit", "met", "aim_met"),
    [(1000, True, True), (300, True, None), (100, None, None)],
)
def test_stock_that_takes_too_long_gives_a_lower_bound(limit, met, aim_met):
    made = records(by_size=[failed("precopy-ssh", 1024, limit), measured("zero-copy", 10.0, size=1024)])
    found = verdict(made, "stock live")
    assert (found["value"], found["relation"]) == (limit / 10, ">=")
    assert (found["met"], found["aim_met"]) == (met, aim_met)
    assert f"at least {limit // 10}" in page.verdicts_text([found])


@pytest.mark.parametrize("relation", ["=", ">=", "<="])
@pytest.mark.parametrize("at_least", [True, False])
@pytest.mark.parametrize("value", [4, 5, 6])
def test_bounds_of_bounds(relation, at_least, value):
    true_values = {"=": [value], ">=": range(value, 10), "<=": range(value + 1)}[relation]
    answers = {true >= 5 if at_least else true <= 5 for true in true_values}
    expected = answers.pop() if len(answers) == 1 else None
    assert verdicts.met(verdicts.Found(value, relation, ""), 5, at_least) is expected
    assert verdicts.met(verdicts.Found(value, relation, ""), None, at_least) is None


def test_the_verdict_on_downtime_tells_each_size_too():
    made = records(
        by_rate=[by_rate("precopy-ssh", 0, 50.0, 2.0), by_rate("zero-copy", 0, 7.0, 1.0)],
        by_size=[
            *(measured("precopy-ssh", 90.0, downtime, size=1024) for downtime in (1.0, 1.5, 2.0)),
            measured("zero-copy", 7.0, 1.8, size=1024),
            measured("precopy-ssh", 30.0, 2.0),
            measured("zero-copy", 7.0, 1.0),
            measured("zero-copy", 7.0, 1.0, size=2048),
        ],
    )
    found = verdict(made, "downtime, idle")
    assert found["value"] == 0.5
    assert found["note"] == "stock n=1, zero-copy n=1; by size: 128 MiB 0.5x (n=1, 1), 1024 MiB 1.2x (n=3, 1)"


def test_a_busy_guest_has_to_be_busy():
    busy = records(by_rate=[by_rate("zero-copy", 0, 10.0, 1.0), by_rate("zero-copy", 10000, 10.5, 1.2)])
    found = verdict(busy, "dirty pages")
    assert (found["value"], found["met"]) == (20.0, False)
    assert "time +5.0 %" in found["note"]
    idle = records(by_rate=[by_rate("zero-copy", 0, 10.0), by_rate("zero-copy", 10000, 10.5, achieved=5000)])
    found = verdict(idle, "dirty pages")
    assert found["met"] is None
    assert "5000" in found["note"]


# --- pages, plots, files


def test_page_tells_how_often_each_was_measured_and_what_was_not():
    made = everything()
    made["by_size"] += [
        measured("zero-copy", 6.0, size=256),
        failed("precopy-ssh", 256, 600),
        failed("precopy-ssh", 512),
    ]
    planned = [cell(256, least=1, wanted=5, rounds=2).planned()]
    text = page.page(results.document(made, **about(planned=planned)), ["plots/fig7.svg"])
    assert "| 256 | > 600 (n=0, 1 over time) | not measured | 6 (n=1) | at least 100x |" in text
    assert "| 512 MiB | precopy-ssh | 158 (n=1, 1 failed) |" in text
    assert "7.50 (6.50-8.50, n=2)" in text
    assert "256 MiB: precopy-ssh 1 to 5, zero-copy 2" in text
    assert "![fig7](plots/fig7.svg)" in text
    assert "Partial" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_a_partial_run_leaves_valid_files_that_say_so(tmp_path):
    made = records(by_size=[measured("zero-copy", 7.0) | OURS])
    results.write(results.document(made, **about(complete=False, problems=["the lab\nis gone"])), tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "**Partial" in text
    assert "- Problem: the lab is gone" in text
    assert "Not measured." in text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] is False
    assert found["figures"]["fig7"]["parts"][0]["rows"][0]["methods"]["zero-copy"]["median"] == 7
    assert not list(tmp_path.glob("*.new"))


def test_page_and_plots_are_made_anew_from_the_records_alone(tmp_path, capsys):
    results.write(results.document(everything(), **about()), tmp_path)
    names = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.*"))]
    assert {path.stem for path in tmp_path.glob("plots/*")} == {
        *("fig6", "fig7", "fig9", "fig10", "fig11", "fig12", "fig13", "fig14", "fig15", "fig16", "memory")
    }
    before = {name: (tmp_path / name).read_bytes() for name in names}
    old = json.loads(before[Path("results.json")])
    kept = {key: value for key, value in old.items() if key not in ("figures_to_meet", "figures", "results")}
    (tmp_path / "results.json").write_text(json.dumps(kept))
    for name in names[1:]:
        if name != Path("results.json"):
            (tmp_path / name).unlink(missing_ok=True)
    assert results.main([str(tmp_path)]) == 0
    after = {name: (tmp_path / name).read_bytes() for name in names}
    assert after[Path("RESULTS.md")] == before[Path("RESULTS.md")]
    assert json.loads(after[Path("results.json")]) == old
    assert all(b"<svg" in after[name] for name in names if name.suffix == ".svg")
    (tmp_path / "results.json").write_text("{}")
    assert results.main([str(tmp_path)]) == 1
    assert "cannot be used" in capsys.readouterr().err


def test_nothing_to_draw_makes_no_plot(tmp_path):
    assert plots.draw(results.figures(records()), tmp_path) == []


# --- the run


class FakeBenchmark:
    """Migrates at once; fails as told: {(guest's name, method): [record, ...]}."""

    def __init__(self, failures=(), unstartable=()):
        self.failures = dict(failures)
        self.unstartable = unstartable
        self.started, self.checked, self.rates = [], 0, []

    def throughput(self):
        yield {"way": "channel", "mib_per_s": 1.0}

    def require(self, guest):
        if guest.name in self.unstartable:
            raise LabError(f"no {guest.name}")
        self.started.append(guest.name)

    def set_rate(self, rate):
        self.rates.append(rate)
        return rate

    def migrate(self, method, web=False):
        failure = self.failures.get((self.started[-1], method))
        return {"method": method, "direction": "a to b", **(failure or {"seconds": 1.0, "web": web})}

    def check_memory(self):
        self.checked += 1


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(migration, "HERE", tmp_path)
    monkeypatch.setattr(migration.phases, "_FILE", tmp_path / "phases.jsonl")

    def make(**changes):
        changes = {"rates": [0, 1000], "vcpus": [], "sizes_mib": [128, 512, 1024], **changes}
        return migration.Run("make bench", schedule.cells(wishes(rounds=2, together=False, **changes), "precopy-ssh"))

    return make


def go(one, benchmark, budget=0):
    migration.measure(one, benchmark, schedule.Budget(budget, one.cells))


def count(made, **wanted):
    return len(results.of(made, **wanted))


def test_run_measures_all_cells(run, tmp_path):
    one, benchmark = run(vcpus=[4]), FakeBenchmark()
    go(one, benchmark)
    assert not one.problems
    assert {kind: len(made) for kind, made in one.records.items()} == {
        # Among them two that settle.
        "by_size": 3 * (1 + 2 + 2) + 2,
        "by_rate": 2 * (1 + 2 + 2),
        "web": 1 + 2 + 2,
        "others": 4,
        "throughput": 5,
    }
    assert benchmark.checked == len(one.cells)
    assert benchmark.rates == [0, 1000, 0]
    assert all(entry["web"] for entry in one.records["web"])
    # Written after each cell, before the whole is known to be complete.
    assert json.loads((tmp_path / "results.json").read_text())["complete"] is False


def test_a_migration_after_one_by_another_method_is_apart(run):
    cell = schedule.Cell("by_rate", "0 pages/s", 256, *[{"precopy-ssh": 2, "zero-copy": 4}] * 2, rate=0)
    one, benchmark = run(), FakeBenchmark()
    one.cells = [cell]
    go(one, benchmark)
    stock, settling, ours = "precopy-ssh", results.SETTLING, "zero-copy"
    made = [entry["method"] for entry in one.records["by_rate"]]
    assert made == [stock, settling, settling, ours, ours, stock, settling, settling, ours, ours]
    page = (migration.HERE / "RESULTS.md").read_text()
    assert "| 0 (0) | 1 (n=2) | 1 (n=4) | 1x |" in page
    assert "time 1 (n=4) s, that of the others 1 (n=4) s" in page


def test_a_migration_that_fails_before_the_others_settle_is_one_that_failed(run):
    cell = schedule.Cell("by_rate", "0 pages/s", 256, *[{"precopy-ssh": 1, "zero-copy": 2}] * 2, rate=0)
    one, benchmark = run(), FakeBenchmark({(migration.guest_of(cell).name, "zero-copy"): {"failed": "lost"}})
    one.cells = [cell]
    go(one, benchmark)
    assert [entry["method"] for entry in one.records["by_rate"]] == ["precopy-ssh", "zero-copy"]


def test_run_goes_on_after_a_migration_that_fails(run):
    over = {"failed": "timeout: too late", "more_than_seconds": 600}
    one = run()
    go(one, FakeBenchmark({("bench512-pvh1", "precopy-ssh"): over}), budget=1e9)
    made = one.records["by_size"]
    # Not tried again at this size, but at the next.
    assert count(made, size_mib=512, method="precopy-ssh") == 1
    assert count(made, size_mib=512, method="zero-copy") == 2
    assert count(made, size_mib=1024, method="precopy-ssh") == 5
    assert one.problems == ["512 MiB, precopy-ssh: timeout: too late"]
    fig7 = results.figures(one.records)["fig7"]["parts"][0]["rows"]
    assert [row["ratio"]["relation"] for row in fig7] == ["=", ">=", "="]


def test_run_goes_on_without_a_guest_that_does_not_start_but_not_for_ever(run):
    one = run()
    go(one, FakeBenchmark(unstartable=["bench512-pvh1"]))
    assert {entry["size_mib"] for entry in one.records["by_size"]} == {128, 1024}
    assert one.problems == ["512 MiB: no bench512-pvh1"]
    one = run(sizes_mib=[128, 512, 1024, 2048])
    with pytest.raises(LabError, match="2 times in a row"):
        go(one, FakeBenchmark(unstartable=["bench512-pvh1", "bench1024-pvh1"]))
    assert {entry["size_mib"] for entry in one.records["by_size"]} == {128}


def test_run_tells_throughput_that_cannot_be_measured(run):
    class NoChannel(FakeBenchmark):
        def throughput(self):
            raise LabError("no channel")

    one = run()
    go(one, NoChannel())
    assert one.problems == ["throughput: no channel"]
    assert one.records["by_size"]


class WholeFake(FakeBenchmark):
    def __init__(self, *_arguments):
        super().__init__()

    def clear(self):
        self.cleared = True


ARGV = ["--sizes", "128,512", "--rates", "none", "--vcpus", "none", "--no-web", "--no-together", "--budget", "0"]


@pytest.mark.parametrize(
    ("error", "status"), [(None, 0), (LabError("the lab is gone"), 1), (KeyboardInterrupt(), None)]
)
def test_whatever_ends_a_run_its_files_say_what_it_has(run, monkeypatch, tmp_path, error, status):
    class Fake(WholeFake):
        def require(self, guest):
            super().require(guest)
            if error and guest.size_mib == 512:
                raise error

    monkeypatch.setattr(migration, "LOG", tmp_path / "bench.log")
    monkeypatch.setattr(migration, "bring_up", lambda: None)
    monkeypatch.setattr(migration, "Benchmark", Fake)
    if status is None:
        with pytest.raises(KeyboardInterrupt):
            migration.main(ARGV)
    else:
        assert migration.main(ARGV) == status
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["complete"] is (status is not None)
    assert [bool(found["problems"])] == [isinstance(error, LabError)]
    assert count(found["records"]["by_size"], size_mib=128) == 8
    assert count(found["records"]["by_size"], size_mib=512) == (0 if error else 8)
    assert ("Partial" in (tmp_path / "RESULTS.md").read_text()) is (status is None)


def test_a_run_may_add_to_an_earlier_one(run, monkeypatch, tmp_path):
    monkeypatch.setattr(migration, "LOG", tmp_path / "bench.log")
    monkeypatch.setattr(migration, "bring_up", lambda: None)
    monkeypatch.setattr(migration, "Benchmark", WholeFake)
    assert migration.main(["--add", *ARGV]) == 1  # to nothing
    assert migration.main(ARGV) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    more = ["--add", *ARGV, "--no-throughput", "--sizes", "512,1024", "--rounds", "2"]
    assert migration.main(more) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    sizes = {size: count(found["records"]["by_size"], size_mib=size, method="zero-copy") for size in (128, 512, 1024)}
    assert sizes == {128: 5, 512: 2, 1024: 2}
    assert found["records"]["throughput"] == first["records"]["throughput"]
    assert [cell["cell"] for cell in found["planned"]] == ["128 MiB", "512 MiB", "1024 MiB"]
    assert found["command"].split("; then ") == [first["command"], f"make bench ARGS='{' '.join(more)}'"]
    assert found["complete"]
    # Throughput alone, which takes the place of the old one.
    assert migration.main(["--add", *ARGV, "--sizes", "none"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["records"] == found["records"]


@pytest.mark.parametrize(("rate", "strict", "status"), [(1.0, [], 0), (1.0, ["--strict"], 1), (4.0, ["--strict"], 0)])
def test_the_last_line_tells_missed_figures_and_only_strict_fails_for_them(
    run, monkeypatch, tmp_path, capsys, rate, strict, status
):
    class Fake(WholeFake):
        def throughput(self):
            yield {"way": "channel", "mib_per_s": rate}
            yield {"way": "memcpy", "mib_per_s": 4.0}

    monkeypatch.setattr(migration, "LOG", tmp_path / "bench.log")
    monkeypatch.setattr(migration, "bring_up", lambda: None)
    monkeypatch.setattr(migration, "Benchmark", Fake)
    assert migration.main([*ARGV, *strict]) == status
    missed = "channel throughput / memcpy in the same dom0" if rate < 2 else "none"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Of 9 figures to meet 8 cannot be told; missed: {missed}"


def test_a_run_without_a_lab_leaves_the_old_files(run, monkeypatch, tmp_path):
    def no_lab():
        raise LabError("the lab does not come up")

    monkeypatch.setattr(migration, "LOG", tmp_path / "bench.log")
    monkeypatch.setattr(migration, "bring_up", no_lab)
    assert migration.main(ARGV) == 1
    assert not list(tmp_path.glob("*.json"))


def test_a_dry_run_touches_nothing(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(migration, "bring_up", lambda: pytest.fail("touched the lab"))
    assert migration.main([*ARGV, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "about 12 min at least" in said
    assert "about 30 min for all that is wanted (--all)" in said
    assert migration.main([*ARGV, "--dry-run", "--all"]) == 0
    said = capsys.readouterr().err
    assert "about 30 min, after the lab is up, whatever the budget" in said
    assert "12 min" not in said
    assert not list(tmp_path.iterdir())


class OnlyMigrate(lab.Benchmark):
    """A benchmark whose guest is migrated by a function."""

    def __init__(self, move, monkeypatch, limit=0.0):
        self.limit, self.port, self._slot = limit, 0, "a"
        self._guest = lab.Guest(128)
        self._measurements = itertools.count()
        self._options = lambda *_arguments: {}
        self._measure = lambda *_arguments: move()
        self.status = status()
        monkeypatch.setattr(lab.guests, "reset_ticks", lambda *_arguments: status())
        monkeypatch.setattr(lab.guests, "settled_status", lambda *_arguments: self.status)
        monkeypatch.setattr(lab.guests, "await_status", lambda *_arguments, **_named: self.status)


def raising(error):
    def move():
        raise error

    return move


def test_a_guest_goes_on_where_its_migration_took_it(monkeypatch):
    benchmark = OnlyMigrate(lambda: {"seconds": 7.0}, monkeypatch)
    assert benchmark.migrate("zero-copy") == {
        "method": "zero-copy",
        "direction": "a to b",
        "seconds": 7.0,
        "longest_gap_seconds": 1.5,
    }
    assert benchmark.migrate("zero-copy")["direction"] == "b to a"


@pytest.mark.parametrize(
    ("result", "stays"),
    [({"location": "source"}, True), ({"location": "unknown"}, False), ({}, False)],
)
def test_a_guest_whose_migration_failed_goes_on_only_at_the_source(monkeypatch, result, stays):
    benchmark = OnlyMigrate(raising(ModuleFailed({"msg": "timeout: too late", **result})), monkeypatch)
    record = benchmark.migrate("precopy-ssh")
    assert record["failed"] == "timeout: too late"
    assert record["more_than_seconds"] == 0
    assert (benchmark._guest is not None) is stays
    assert benchmark._slot == "a"


def test_a_failure_before_the_limit_is_no_bound(monkeypatch):
    benchmark = OnlyMigrate(raising(LabError("no")), monkeypatch, limit=600)
    assert "more_than_seconds" not in benchmark.migrate("precopy-ssh")
    assert benchmark._guest is None


def test_a_guest_that_lost_something_is_not_used_again(monkeypatch):
    benchmark = OnlyMigrate(lambda: {"seconds": 7.0}, monkeypatch)
    benchmark.status = status(boot_id="two")
    record = benchmark.migrate("zero-copy")
    assert "another instance" in record["failed"]
    # It was in time.
    assert "more_than_seconds" not in record
    assert "seconds" not in record
    assert benchmark._guest is None


def test_the_names_of_guests_tell_them_apart():
    names = [
        made.name
        for made in (
            lab.Guest(512),
            lab.Guest(512, vcpus=4),
            lab.Guest(512, vcpus=4, type="hvm"),
            lab.Guest(512, number=1),
        )
    ]
    assert len(set(names)) == 4
    assert all(lab.NAME.fullmatch(name) for name in names)
    assert not lab.NAME.fullmatch(names[0] + "--incoming")
    assert not lab.NAME.match("web1")


def test_errors_do_not_name_directories_of_this_computer():
    text = lab.plain(f"{ROOT}/playbooks/x.yml and {Path.home()}/.cache: {'x' * 900}")
    assert text.startswith("./playbooks/x.yml and ~/.cache: x")
    assert len(lab.plain("y" * 5000)) == 1000


def test_the_worse_of_two_guests_counts():
    assert lab.worst([{"a": 1, "b": 5}, {"a": 2, "b": 3}], ("a", "b")) == {"a": 2, "b": 5}
    assert lab.worst([{"a": 1}, {}], ("a",)) == {"a": None}


def test_run_measures_two_guests_at_once(run):
    class Two(FakeBenchmark):
        def together(self, size_mib):
            return {"method": "zero-copy", "seconds": 9.0}

    one = migration.Run("make bench", [one for one in schedule.cells(wishes(), "precopy-ssh") if one.together])
    go(one, Two())
    assert one.records["others"] == [
        {"size_mib": 256, "guest": "two of 256 MiB at once", "method": "zero-copy", "seconds": 9.0}
    ]


def test_memory_of_a_migration():
    assert lab._memory(None, 4711) == {"bytes_copied": 4711}
    assert lab._memory({"pages_copied": 2, "pages_sent": None}, 0) == {"pages_copied": 2, "pages_sent": None}


def test_the_machine_holds_the_largest_guest():
    machine = topology.load(migration.TOPOLOGY).select(None)[0]
    assert not machine.guests
    xen = 200
    most = machine.host_vm_memory_mb - machine.guest_dom0_memory_mb - xen
    # Its page tables and the like take a hundredth.
    assert most > 1.01 * max(migration.parse([]).sizes)


def test_answers_are_counted_before_during_and_after():
    load = web.Load(0)
    load._times = [0.0, 1.0, 2.0, 9.0, 12.0, 12.5, 13.0, 14.0]
    assert load.answers(2.0, 12.0) == web.Answers(before=1.0, during=0.2, after=1.5)


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
    earlier = meters.Reading(10.0, 100, {"m1-a": 1.5}, 50.0)
    later = meters.Reading(17.0, 150, {"m1-a": 4.0}, 60.25)
    assert later.since(earlier) == meters.Reading(7.0, 50, {"m1-a": 2.5}, 10.2)
    assert meters.process_seconds("12 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20", 100) == 3.0


class Shell:
    """Stands in for an emulated machine: commands run on this computer."""

    def __init__(self, xl):
        self.path = xl.parent

    def ssh_command(self, *words):
        return ["env", f"PATH={self.path}:/usr/bin:/bin", "sh", "-c", *words]


@pytest.mark.parametrize(
    ("script", "expected"), [("echo 'free_memory            : 1234'", [1234]), ("exit 1", []), ("echo nothing", [])]
)
def test_free_memory_is_sampled_until_the_end(tmp_path, script, expected):
    xl = tmp_path / "xl"
    xl.write_text(f"#!/bin/sh\n{script}\n")
    xl.chmod(0o755)
    sampled = meters.Meters.__new__(meters.Meters)
    sampled._emulated = Shell(xl)
    with sampled.free_memory(10) as found:
        assert found == []
    assert found == expected


def test_a_load_ends_with_what_is_measured_beside_it(monkeypatch):
    monkeypatch.setattr(lab, "guest_dom0_ssh", lambda *_: [])
    benchmark = lab.Benchmark.__new__(lab.Benchmark)
    benchmark.machine, benchmark.emulated = None, types.SimpleNamespace(key=None)
    with benchmark._partner("load") as load:
        assert load.poll() is None
    assert load.returncode in (-signal.SIGPIPE, 128 + signal.SIGPIPE)


def test_the_command_line():
    assert migration.methods("zero-copy,precopy-ssh") == ["zero-copy", "precopy-ssh"]
    assert migration.numbers("none") == migration.sizes_mib("none") == []
    assert migration.numbers("0,1000") == [0, 1000]
    assert migration.sizes_mib("128,512") == [128, 512]
    for parse, text in (
        *((migration.methods, text) for text in ("rsync", "")),
        *((migration.numbers, text) for text in ("", "1,1", "-1", "big")),
        *((migration.sizes_mib, text) for text in ("128,", "0", "-1", "64,64", "big")),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse tells the user which
            parse(text)
    for argv in (["--rounds", "0"], ["--sizes", "64"], ["--rates", "2000000"], ["--vcpus", "0"], ["--budget", "-1"]):
        with pytest.raises(SystemExit):
            migration.parse(argv)


def test_a_module_that_fails_tells_its_result(monkeypatch):
    def run(*_arguments, **_named):
        raise CommandFailed("ansible: exit status 2", output)

    monkeypatch.setattr(ansible, "run", run)
    output = 'm1-a | FAILED! => {\n    "location": "source",\n    "msg": "timeout: too late"\n}\n'
    with pytest.raises(ModuleFailed, match="too late") as caught:
        ansible.module("m1-a", "vmbeam.xen.guest_migrate", {})
    assert caught.value.result["location"] == "source"
    output = "no inventory"
    with pytest.raises(CommandFailed):
        ansible.module("m1-a", "vmbeam.xen.guest_migrate", {})


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
