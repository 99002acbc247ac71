"""What a run leaves for those who were not there: report, audit log, metrics. They have to tell the same."""

from __future__ import annotations

import json
import pathlib
import shlex

import jsonschema
import pytest

ROLE = pathlib.Path(__file__).resolve().parents[2] / "roles" / "fleet_report"
SCHEMA = json.loads((ROLE / "files" / "report.schema.json").read_text())
AUDIT = "/var/log/vmbeam/audit.jsonl"
METRICS = "/var/lib/vmbeam/metrics"

pytestmark = pytest.mark.long


@pytest.fixture
def rejuvenate(lab, tmp_path):
    """Returns a function that runs the playbook and returns its result with the report and the page."""
    lab.host("mkdir", "-p", METRICS)
    folder = tmp_path / "reports"

    def run(*arguments: str):
        result = lab.playbook(
            "rejuvenate.yml",
            *("-e", "vmbeam_force=true", "-e", "vmbeam_operator=tester"),
            *("-e", f"vmbeam_report_directory={folder}", "-e", f"vmbeam_textfile_directory={METRICS}"),
            *arguments,
        )
        page, data = sorted(folder.iterdir())
        assert (page.suffix, data.suffix) == (".html", ".json")
        report = json.loads(data.read_text())
        jsonschema.validate(report, SCHEMA)
        return result, report, page.read_text()

    return run


def audit_entries(lab) -> list[dict]:
    # The folder is made by the first entry.
    text = lab.host("sh", "-c", shlex.quote(f"cat {AUDIT} 2>/dev/null || true"))
    return [json.loads(line) for line in text.splitlines()]


def test_report_audit_log_and_metrics_of_a_run_agree(lab, rejuvenate):
    result, report, page = rejuvenate()
    assert not result.failed
    name = lab.machine.name
    [machine] = [machine for machine in report["machines"] if machine["machine"] == name]
    assert (machine["outcome"], machine["source"], machine["destination"]) == ("completed", f"{name}-a", f"{name}-b")
    guests = {guest["guest"]: guest for guest in machine["guests"]}
    assert set(guests) == set(lab.machine.guests)
    for guest in guests.values():
        assert guest["result"] == "moved"
        # ISO 8601 of one zone sorts by time.
        assert machine["started"] < guest["started"] < guest["finished"] < machine["finished"]
        assert 0 < guest["downtime_seconds"] < guest["seconds"]
    for moment in ("before", "after"):
        assert "dom0_available_memory" in [indicator["name"] for indicator in machine["aging"][moment]]
    for text in (name, *guests, report["run"]["id"]):
        assert text in page

    begin, *moves, end = audit_entries(lab)
    assert lab.host("stat", "-c", "%a:%U:%G", AUDIT).strip() == "600:root:root"
    assert (begin["event"], end["event"]) == ("begin", "end")
    assert set(begin["guests"]) == set(guests)
    assert (end["outcome"], end["guests_moved"]) == ("completed", len(guests))
    for entry in (begin, *moves, end):
        assert entry["run"] == report["run"]["id"]
        assert entry["operator"] == report["run"]["operator"] == "tester"
        assert entry["controller"] == report["run"]["controller"]
    assert [move["guest"] for move in moves] == [guest["guest"] for guest in machine["guests"]]
    for move in moves:
        assert move["event"] == "guest"
        assert move["downtime_seconds"] == guests[move["guest"]]["downtime_seconds"]
        assert move["session"] == guests[move["guest"]]["memory"]["session"]

    lines = lab.host("cat", f"{METRICS}/vmbeam_rejuvenation.prom").splitlines()
    metrics = dict(line.split() for line in lines if not line.startswith("#"))
    figures = {name.removeprefix("vmbeam_rejuvenation_last_run_"): float(value) for name, value in metrics.items()}
    assert figures["success"] == 1
    assert figures["guests_moved"] == len(guests)
    assert figures["generation"] == machine["generation"]
    assert figures["seconds"] == pytest.approx(machine["seconds"])
    assert figures["longest_downtime_seconds"] == pytest.approx(machine["longest_downtime_seconds"], abs=0.001)

    record = json.loads(lab.host("cat", "/var/lib/vmbeam/state.json"))
    assert record["history"][-1]["run_id"] == report["run"]["id"]


def test_run_that_is_refused_is_reported(lab, rejuvenate):
    """In report and metrics; there is nothing to audit."""
    before = audit_entries(lab)
    result, report, page = rejuvenate("-e", "vmbeam_guest_hypervisor_image=/nonexistent.raw")
    assert result.failed
    assert report["run"]["outcome"] == "failed"
    [machine] = report["machines"]
    assert machine["outcome"] == "refused"
    assert any("/nonexistent.raw" in problem["message"] for problem in machine["problems"])
    assert "/nonexistent.raw" in page
    assert audit_entries(lab) == before
    metrics = lab.host("cat", f"{METRICS}/vmbeam_rejuvenation.prom")
    assert "vmbeam_rejuvenation_last_refused_timestamp_seconds " in metrics
    assert "vmbeam_rejuvenation_last_run" not in metrics
