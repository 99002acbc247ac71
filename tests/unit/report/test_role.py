# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tasks that report, by real Ansible on this computer: only what the machines did is made up."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jsonschema
import pytest
import yaml
from checkout import environment

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads((ROOT / "roles" / "fleet_report" / "files" / "report.schema.json").read_text())


def tasks_of(name: str, **values) -> dict:
    """A task that includes a task file of the role rejuvenate."""
    role = {"name": "vmbeam.xen.rejuvenate", "tasks_from": name}
    return {"ansible.builtin.include_role": role, "vars": values}


class Run(NamedTuple):
    """What a run of Ansible left."""

    output: str
    reports: list[Path]
    machines: Path  #: a folder for each machine


@pytest.fixture
def run_ansible(hostvars, tmp_path):
    """Returns a function that runs what the role does for the report on two machines, and reports all of them."""
    # Whether they are facts of this run or variables of the inventory makes no difference to who reads them.
    inventory = {"vmbeam_hosts": {"hosts": hostvars}}
    (tmp_path / "inventory.yml").write_text(yaml.safe_dump(inventory))
    begin = {"event": "begin", "guests": ["web1"]}
    settings = {
        "rejuvenate_audit_file": str(tmp_path / "machines/{{ inventory_hostname }}/audit.jsonl"),
        "rejuvenate_textfile_directory": str(tmp_path / "machines/{{ inventory_hostname }}"),
        "rejuvenate_record": {"history": ["{{ rejuvenate_report }}"]},
    }
    plays = [
        {
            "hosts": "m1,m2",
            "gather_facts": False,
            "serial": 1,
            "tasks": [
                tasks_of("audit", rejuvenate_event=begin, **settings),
                tasks_of("audit", rejuvenate_event={"event": "end"}, **settings),
                tasks_of("metrics", **settings),
            ],
        },
        {"ansible.builtin.import_playbook": str(ROOT / "playbooks" / "_report.yml")},
    ]
    (tmp_path / "run.yml").write_text(yaml.safe_dump(plays))

    def run(*arguments: str) -> Run:
        for machine in ("m1", "m2"):
            (tmp_path / "machines" / machine).mkdir(parents=True, exist_ok=True)
        process = subprocess.run(
            [
                *(sys.executable, "-m", "ansible", "playbook", "-i", tmp_path / "inventory.yml", tmp_path / "run.yml"),
                *("-c", "local", "-e", f"ansible_python_interpreter={sys.executable}"),
                *("-e", f"vmbeam_report_directory={tmp_path / 'reports'}", *arguments),
            ],
            env=environment(ANSIBLE_FORKS="2"),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        output = process.stdout + process.stderr
        assert process.returncode == 0, output
        return Run(output, sorted((tmp_path / "reports").glob("*")), tmp_path / "machines")

    return run


def test_a_run_is_reported_once_with_one_name(run_ansible, hostvars):
    run = run_ansible("-e", "vmbeam_operator=alice")
    data, page = run.reports[1], run.reports[0]
    report = json.loads(data.read_text())
    jsonschema.validate(report, SCHEMA)
    assert (data.name, page.name) == tuple(f"rejuvenation-{report['run']['id']}.{end}" for end in ("json", "html"))
    assert [machine["machine"] for machine in report["machines"]] == list(hostvars)
    assert [machine["outcome"] for machine in report["machines"]][:3] == ["completed", "failed", "refused"]
    assert report["run"]["operator"] == "alice"
    assert report["run"]["controller"] == platform.node()
    assert page.read_text().startswith("<!doctype html>")
    assert "<script>document" not in page.read_text()
    assert page.as_posix() in run.output

    for machine in ("m1", "m2"):
        entries = [json.loads(line) for line in (run.machines / machine / "audit.jsonl").read_text().splitlines()]
        assert [entry["event"] for entry in entries] == ["begin", "end"]
        for entry in entries:
            assert entry["run"] == report["run"]["id"]
            assert (entry["operator"], entry["controller"]) == ("alice", platform.node())
            assert (entry["machine"], entry["source"], entry["destination"]) == (
                machine,
                f"{machine}-a",
                f"{machine}-b",
            )
        assert entries[0]["guests"] == ["web1"]
    assert "last_run_success 1" in (run.machines / "m1" / "vmbeam_rejuvenation.prom").read_text()
    assert "last_run_success 0" in (run.machines / "m2" / "vmbeam_rejuvenation.prom").read_text()


def test_check_mode_writes_the_report_and_nothing_on_machines(run_ansible):
    run = run_ansible("--check", "-e", "vmbeam_run_id='../on friday'")
    assert [path.name for path in run.reports] == ["rejuvenation-.._on_friday.html", "rejuvenation-.._on_friday.json"]
    report = json.loads(run.reports[1].read_text())
    assert report["run"]["check_mode"] is True
    assert report["run"]["operator"] in (getpass.getuser(), os.environ.get("SUDO_USER"))
    assert sorted(path.name for path in run.machines.rglob("*")) == ["m1", "m2"]


def test_limited_run_is_reported_all_the_same(run_ansible, tmp_path):
    run = run_ansible("--limit", "m3:m4")
    report = json.loads(run.reports[1].read_text())
    assert [machine["machine"] for machine in report["machines"]] == ["m3", "m4"]
    assert run.output.count("TASK [vmbeam.xen.fleet_report : Write the report as data]") == 1


def test_no_directory_no_report(run_ansible, tmp_path):
    assert run_ansible("-e", "vmbeam_report_directory=", "-i", "localhost,", "--limit", "localhost").reports == []
    assert not (tmp_path / "reports").exists()


def test_a_run_that_is_repeated_under_its_name_changes_its_end_in_the_report_only(run_ansible):
    """And the earlier report is kept. So the role is not idempotent, and molecule does not test that it is."""
    night = ("-e", "vmbeam_run_id=night", "--limit", "m3:m4")
    [_page, first] = run_ansible(*night).reports
    before = json.loads(first.read_text())

    reports = run_ansible(*night).reports

    after = json.loads(first.read_text())
    assert after["run"].pop("finished") > before["run"].pop("finished")
    assert after["run"].pop("seconds") > before["run"].pop("seconds")
    assert after == before
    kept = [path.name.split(".json.")[0] for path in reports if ".json." in path.name]
    assert kept == ["rejuvenation-night"]
    assert len(reports) == 4
