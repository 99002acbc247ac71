# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rolling playbook as ansible-playbook runs it, on machines that are files: only what Ansible does is real."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ansible_collections.vmbeam.xen.plugins.module_utils._host_lock import HostLock, Lock
from checkout import environment

ROOT = Path(__file__).resolve().parents[2]
ROLES = Path(__file__).parent / "fakes" / "roles"
SCHEMA = json.loads((ROOT / "roles" / "rolling" / "files" / "plan.schema.json").read_text())
TIMEOUT = 400  # seconds; a run takes a tenth of that


class Fleet:
    """An inventory of fake machines, whose files are in `folder`."""

    def __init__(self, folder: Path, machines: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.report_file = folder / "report.json"
        for name in machines:
            (folder / f"{name}.lock").mkdir()
        common = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "fake_folder": str(folder),
            "vmbeam_lock_file": f"{folder}/{{{{ inventory_hostname }}}}.lock/lock.json",
            "vmbeam_audit_file": f"{folder}/{{{{ inventory_hostname }}}}.audit",
            "vmbeam_machine_connect_timeout": 2,
            "vmbeam_run_report_file": str(self.report_file),
            "rolling_role": "fake_rejuvenate",
        }
        hosts = {"all": {"vars": common, "children": {"vmbeam_hosts": {"hosts": machines}}}}
        (folder / "inventory.yml").write_text(yaml.safe_dump(hosts, sort_keys=False))

    def argv(self, *before: Path | str, playbook: str = "rejuvenate.yml", **variables: Any) -> list[str]:
        """The command for the playbook, with others that go before it, or options."""
        playbooks = [str(word) for word in (*before, ROOT / "playbooks" / playbook)]
        command = str(Path(sys.executable).parent / "ansible-playbook")
        return [command, "-i", str(self.folder / "inventory.yml"), *playbooks, "-e", json.dumps(variables)]

    @property
    def environment(self) -> dict[str, str]:
        return environment(ANSIBLE_ROLES_PATH=str(ROLES))

    def run(self, *before: Path | str, **variables: Any) -> subprocess.CompletedProcess[str]:
        self.report_file.unlink(missing_ok=True)
        done = subprocess.run(
            self.argv(*before, **variables), env=self.environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        print(done.stdout, done.stderr)
        return done

    def lock(self, machine: str, lock: Lock) -> None:
        """Give a machine to another run."""
        HostLock(f"{self.folder}/{machine}.lock/lock.json").write(lock)

    def locks(self) -> dict[str, str | None]:
        """Who has which machine, None if that cannot be read."""
        owners = {}
        for path in sorted(self.folder.glob("*.lock/lock.json")):
            try:
                owners[path.parent.name.removesuffix(".lock")] = json.loads(path.read_text())["owner"]
            except ValueError:
                owners[path.parent.name.removesuffix(".lock")] = None
        return owners

    def report(self) -> dict[str, Any]:
        return json.loads(self.report_file.read_text())

    def results(self) -> dict[str, str]:
        return {machine["machine"]: machine["result"] for machine in self.report()["machines"]}

    @property
    def begun(self) -> list[str]:
        """The machines that were begun, in order, each as often as it was."""
        log = self.folder / "begun"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def fleet(tmp_path: Path) -> Callable[..., Fleet]:
    return lambda **machines: Fleet(tmp_path, machines)


def test_failures_within_a_batch_stop_the_run_after_it(fleet):
    hook = "- ansible.builtin.copy: {content: '{{ vmbeam_run.outcome }}', dest: '{{ fake_folder }}/after'}\n"
    machines = fleet(m1={}, m2={"fake_behaviour": "fail"}, m3={"fake_behaviour": "vanish"}, m4={}, m5={}, m6={})
    (machines.folder / "after.yml").write_text(hook)

    done = machines.run(
        vmbeam_serial=[1, "50%"],
        vmbeam_failure_budget=1,
        vmbeam_hooks={"after_run": "after.yml"},
        vmbeam_report_directory=str(machines.folder / "reports"),
    )

    assert done.returncode != 0
    assert machines.begun[0] == "m1"
    assert sorted(machines.begun) == ["m1", "m2", "m3", "m4"]
    untouched = dict.fromkeys(["m5", "m6"], "not touched")
    assert machines.results() == {"m1": "done", "m2": "failed", "m3": "failed", "m4": "done", **untouched}
    report = machines.report()
    assert report["untouched"] == ["m5", "m6"]
    assert "m2, m3" in report["stopped"]
    assert "Not touched: m5, m6" in done.stdout
    assert "told to fail" in done.stdout
    assert (machines.folder / "after").read_text() == "failed"
    [written] = (machines.folder / "reports").glob("*.json")
    told = [machine["machine"] for machine in json.loads(written.read_text())["machines"]]
    assert told == ["m1", "m2", "m3", "m4", "m5", "m6"]


def test_a_machine_that_cannot_be_begun_does_not_end_a_run_within_its_budget(fleet):
    always = [{"from": "2000-01-01", "to": "2999-12-31", "reason": "freeze"}]
    away = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 1}
    machines = fleet(
        m1={**away, "vmbeam_labels": {"rack": "r1"}},
        m2={"vmbeam_labels": {"rack": "r1"}, "vmbeam_blackouts": always},
        m3={"vmbeam_labels": {"rack": "r2"}},
        m4={"vmbeam_labels": {"rack": "r1"}},
        m5={"vmbeam_labels": {"rack": "r1"}},
    )
    (machines.folder / "m4.lock" / "lock.json").write_text("{")

    done = machines.run(vmbeam_select="rack=r1", vmbeam_failure_budget="50%")

    assert done.returncode != 0
    assert machines.results() == {"m1": "failed", "m2": "skipped", "m4": "failed", "m5": "done"}
    assert machines.begun == ["m5"]
    reasons = {machine["machine"]: machine["reason"] for machine in machines.report()["machines"]}
    assert "freeze" in reasons["m2"]
    assert "is not a lock of this collection" in reasons["m4"]
    assert machines.locks() == {"m4": None}


def test_a_run_is_not_begun_if_another_one_has_one_of_its_machines(fleet):
    machines = fleet(m1={}, m2={}, m3={})
    machines.lock("m2", Lock("another run", {"controller": "elsewhere", "run_id": "night"}, 0.0, 1e12))
    machines.lock("m3", Lock("long over", {}, 0.0, 1.0))
    hook = ["touch", str(machines.folder / "hooked")]

    done = machines.run(vmbeam_failure_budget="100%", vmbeam_hooks={"before_run": hook, "after_run": hook})

    assert done.returncode != 0
    assert machines.begun == []
    assert not (machines.folder / "hooked").exists()
    words = " ".join(done.stdout.split())
    assert "m2: reserved by run another run of ? on elsewhere, since" in words
    assert "vmbeam_run_id='night'" in words
    assert "vmbeam_break_lock='another run'" in words
    # What the run had taken already is free again.
    assert machines.locks() == {"m2": "another run"}

    assert machines.run(vmbeam_break_lock="another run").returncode == 0
    assert machines.results() == dict.fromkeys(["m1", "m2", "m3"], "done")
    assert machines.locks() == {}
    # Once, by who reserved it; one that had expired is taken from nobody.
    assert [path.name for path in machines.folder.glob("*.audit")] == ["m2.audit"]
    [taken] = map(json.loads, (machines.folder / "m2.audit").read_text().splitlines())
    assert (taken["event"], taken["machine"], taken["break_lock"]) == ("takeover", "m2", True)
    assert taken["holder"] == {"owner": "another run", "run": "night", "user": None, "controller": "elsewhere"}


def test_a_lease_is_renewed_between_batches_for_the_machines_that_are_still_to_come(fleet):
    # In the inventory, where the controller's place in each batch has no part in it.
    machines = fleet(m1={}, m2={}, m3={"vmbeam_lease_ttl": 1}, m4={"vmbeam_lease_ttl": 1})
    (machines.folder / "m2.fresh").touch()
    done = machines.run(vmbeam_serial=2)
    assert done.returncode == 0
    renewed = [line for line in done.stdout.splitlines() if "(item=" in line and " -> m" in line]
    assert len(renewed) == 2
    assert all(name in "".join(renewed) for name in ("(item=m3)", "(item=m4)"))


def test_what_a_machine_has_wrong_in_its_variables_is_what_it_failed_of(fleet):
    machines = fleet(m1={"vmbeam_blackouts": "2026-12-24"}, m2={})

    done = machines.run(vmbeam_failure_budget=1, vmbeam_report_directory=str(machines.folder / "reports"))

    assert done.returncode != 0
    assert machines.results() == {"m1": "failed", "m2": "done"}
    reasons = {machine["machine"]: machine["reason"] for machine in machines.report()["machines"]}
    assert "vmbeam_blackouts is '2026-12-24': give a list" in reasons["m1"]
    [written] = (machines.folder / "reports").glob("*.json")
    told = {machine["machine"]: machine for machine in json.loads(written.read_text())["machines"]}
    assert (told["m1"]["outcome"], told["m1"]["reason"]) == ("failed", reasons["m1"])


def test_a_killed_run_is_continued_and_nothing_is_done_twice(fleet, tmp_path):
    machines = fleet(m1={}, m2={}, m3={})
    for fifo in ("held", "go"):
        os.mkfifo(tmp_path / fifo)
    with (tmp_path / "killed.log").open("w") as log:
        argv = machines.argv(fake_held="m2", vmbeam_run_id="night")
        controller = subprocess.Popen(argv, env=machines.environment, stdout=log, stderr=log, start_new_session=True)
    try:
        # Ends as soon as the machine's part of the run writes to it.
        subprocess.run(["timeout", str(TIMEOUT), "cat", str(tmp_path / "held")], check=True, capture_output=True)
        assert machines.locks() == dict.fromkeys(["m2", "m3"], machines.locks()["m2"])
        assert machines.locks()["m2"].startswith("night (")
        second = machines.run(vmbeam_run_id="night")
        assert second.returncode != 0
        assert "m2, m3: reserved by run night" in " ".join(second.stdout.split())
    finally:
        controller.send_signal(signal.SIGKILL)
        controller.wait()
        print((tmp_path / "killed.log").read_text())
    assert machines.begun == ["m1", "m2"]
    assert list(machines.locks()) == ["m2", "m3"]

    done = machines.run()

    assert done.returncode == 0
    assert machines.results() == {"m1": "fresh", "m2": "done", "m3": "done"}
    assert machines.begun == ["m1", "m2", "m2", "m3"]
    assert not list(tmp_path.glob("*.lock/lock.json"))
    # What the killed run had started ends, too.
    os.close(os.open(tmp_path / "go", os.O_RDWR | os.O_NONBLOCK))


def test_a_failing_hook_before_the_run_keeps_all_machines_untouched(fleet):
    machines = fleet(m1={}, m2={})
    (machines.folder / "before.yml").write_text("- ansible.builtin.fail: {msg: not today}\n")
    told = "{{ vmbeam_outcome }} {{ vmbeam_run.untouched | join(',') }} {{ vmbeam_run.stopped }}"
    after = {"ansible.builtin.copy": {"content": told, "dest": f"{machines.folder}/after"}}
    (machines.folder / "after.yml").write_text(yaml.safe_dump([after]))
    done = machines.run(vmbeam_hooks={"before_run": "before.yml", "after_run": "after.yml"})
    assert done.returncode != 0
    assert "not today" in done.stdout
    assert machines.begun == []
    assert machines.locks() == {}
    # What the hook before had begun is ended.
    assert (machines.folder / "after").read_text() == "failed m1,m2 not today"


@pytest.mark.parametrize(
    ("tag", "result", "begun", "hooks"),
    [("rejuvenate", "done", ["m1"], ["before", "after"]), ("plan", "planned", [], []), ("nonsense", None, [], [])],
)
def test_tags_select_parts_and_nothing_is_begun_without_its_tag(fleet, tag, result, begun, hooks):
    machines = fleet(m1={})
    for hook in ("before", "after"):
        line = f"- ansible.builtin.copy: {{content: '', dest: '{{{{ fake_folder }}}}/{hook}'}}\n"
        (machines.folder / f"{hook}.yml").write_text(line)

    done = machines.run(
        "--tags",
        tag,
        vmbeam_hooks={"before_run": "before.yml", "after_run": "after.yml"},
        vmbeam_report_directory=str(machines.folder / "reports"),
    )

    assert done.returncode == 0
    assert machines.begun == begun
    assert [hook for hook in ("before", "after") if (machines.folder / hook).exists()] == hooks
    assert machines.report_file.exists() == (machines.folder / "reports").exists() == (result is not None)
    if result:
        assert machines.results() == {"m1": result}


def test_hooks_of_the_run_may_be_commands_on_the_controller(fleet):
    machines = fleet(m1={}, m2={})
    told = f'echo "$VMBEAM_HOOK,$VMBEAM_RUN_ID,$VMBEAM_MACHINE,$VMBEAM_OUTCOME" >> {machines.folder}/told'
    hooks = {"before_run": ["sh", "-c", told], "after_run": {"command": ["sh", "-c", told], "timeout": 60}}
    assert machines.run(vmbeam_hooks=hooks, vmbeam_run_id="night").returncode == 0
    assert (machines.folder / "told").read_text().split() == ["before_run,night,,", "after_run,night,,completed"]


def test_what_a_playbook_before_found_decides_the_order(fleet):
    """As playbooks/aging.yml does, which has chosen the machines once before, in another order."""
    machines = fleet(m1={"score": 0.1}, m2={"score": 1.5}, m3={"score": 0.7})
    before = machines.folder / "aging.yml"
    score = {"name": "Judge", "ansible.builtin.set_fact": {"vmbeam_aging_score": "{{ score }}"}}
    plays = [
        {"import_playbook": str(ROOT / "playbooks" / "_targets.yml")},
        {"hosts": "vmbeam_targets", "gather_facts": False, "tasks": [score]},
    ]
    before.write_text(yaml.safe_dump(plays))
    done = machines.run(before, vmbeam_order="aging")
    assert done.returncode == 0
    assert machines.begun == ["m2", "m3", "m1"]
    assert machines.results() == dict.fromkeys(["m2", "m3", "m1"], "done")


def around(moment: datetime.datetime, before: int, after: int) -> list[dict[str, str]]:
    """A window from so many hours before a moment to so many after it, as the clock of its time zone shows."""
    hours = {"from": -before, "to": after}
    return [{key: f"{moment + datetime.timedelta(hours=count):%H:%M}" for key, count in hours.items()}]


def test_machines_are_begun_within_their_maintenance_windows(fleet):
    """The one that m4 and m5 have is open by the clock of m4 only: by that of UTC it opens nine hours later."""
    now = datetime.datetime.now(datetime.UTC)
    there = now.astimezone(zoneinfo.ZoneInfo("Asia/Tokyo"))
    machines = fleet(
        m1={"vmbeam_windows": around(now, 2, 3), "vmbeam_window_margin": 3600},
        m2={"vmbeam_windows": around(now, -2, 3)},
        m3={"vmbeam_windows": around(now, 2, 3), "vmbeam_window_margin": 14400},
        m4={"vmbeam_windows": around(there, 2, 3), "vmbeam_timezone": "Asia/Tokyo"},
        m5={"vmbeam_windows": around(there, 2, 3)},
    )

    done = machines.run(vmbeam_serial=5)

    assert done.returncode == 0
    skipped = dict.fromkeys(["m2", "m3", "m5"], "skipped")
    assert machines.results() == {"m1": "done", "m4": "done", **skipped}
    assert sorted(machines.begun) == ["m1", "m4"]
    reasons = {machine["machine"]: machine["reason"] for machine in machines.report()["machines"]}
    assert reasons["m2"].startswith("outside of its maintenance window: mon, tue, wed, thu, fri, sat, sun ")
    assert reasons["m3"].startswith("outside of its maintenance window for 14400 s: ")
    assert " UTC; now it is " in reasons["m5"]
    assert machines.locks() == {}


def test_the_oldest_machine_is_the_first_and_one_of_unknown_age_before_it(fleet, fake_xen):
    """m3 has no host VM. m4 has two, of a run that was cut: the new one is the one that counts."""
    directory = {"vmbeam_host_vm_directory": "{{ fake_folder }}/{{ inventory_hostname }}-vms"}
    skipped = {"vmbeam_labels": {"tier": ["db", "cache"]}}
    machines = fleet(m1=directory, m2=directory, m3=directory, m4=directory, m5={**directory, **skipped})
    created = {
        "m1-a": "2026-03-02",
        "m2-a": "2026-01-05",
        "m4-a": "2025-01-01",
        "m4-b": "2026-02-03",
        "m5-a": "2025-01-01",
    }
    for name, day in created.items():
        home = machines.folder / f"{name.split('-')[0]}-vms" / name
        home.mkdir(parents=True)
        record = {"generation": 1, "created": f"{day}T00:00:00+00:00", "image_sha256": "", "slot": name[-1]}
        (home / "generation.json").write_text(json.dumps(record))
        fake_xen.add("source", name)

    assert machines.run(vmbeam_order="oldest", vmbeam_skip="tier=db").returncode == 0

    assert machines.begun == ["m3", "m2", "m4", "m1"]
    assert list(machines.results()) == ["m3", "m2", "m4", "m1"]


def batches_of(output: str) -> list[list[str]]:
    """In which batches Ansible had machines, by what it prints of the task that looks whether one may be begun."""
    plays = re.split(r"(?m)^PLAY \[", output)
    task = re.compile(r"(?ms)^TASK \[[^]]*Look whether it may be begun now\].*?(?=^TASK|\Z)")
    looked = [match for play in plays if play.startswith("Rejuvenate]") and (match := task.search(play))]
    return [sorted(re.findall(r"(?m)^ok: \[(m\d)\]", match[0])) for match in looked]


def test_the_plan_of_a_fleet_is_what_the_run_then_does(fleet, tmp_path):
    """With batches, order, labels, a window, guests and a failure that are not the inventory's own."""
    always = [{"from": "2000-01-01", "to": "2999-12-31", "reason": "freeze"}]
    rack = {"vmbeam_labels": {"rack": "r1"}}
    machines = fleet(
        m1={**rack, "vmbeam_aging_score": 0.1},
        m2={**rack, "vmbeam_aging_score": 0.9},
        m3={"vmbeam_labels": {"rack": "r2"}, "vmbeam_aging_score": 5},
        m4={**rack, "vmbeam_aging_score": 0.5, "vmbeam_blackouts": always},
        m5={**rack, "vmbeam_aging_score": 0.7},
        m6={**rack, "vmbeam_aging_score": 0.3, "fake_behaviour": "fail"},
        m7={**rack},
        m8={**rack, "vmbeam_aging_score": 0.6, "fake_behaviour": "keep"},
    )
    options: dict[str, Any] = {
        "vmbeam_order": "aging",
        "vmbeam_serial": [1, 3, 2],
        "vmbeam_select": "rack=r1",
        "vmbeam_run_plan_file": str(tmp_path / "plan.json"),
    }

    planned = machines.run(playbook="plan.yml", **options)

    assert planned.returncode != 0
    assert "m6 would fail: told to fail" in planned.stdout
    assert machines.begun == []
    assert machines.locks() == {}
    plan = json.loads((tmp_path / "plan.json").read_text())
    jsonschema.validate(plan, SCHEMA)
    outcomes = {one["machine"]: (one["outcome"], one["cause"]) for one in plan["machines"]}
    assert outcomes == {
        **dict.fromkeys(["m2", "m5"], ("rejuvenate", None)),
        "m4": ("left_out", "window"),
        "m8": ("left_out", "guests"),
        "m6": ("failed", None),
        "m1": ("rejuvenate", None),
        "m7": ("not_reached", None),
        "m3": ("left_out", "labels"),
    }
    assert plan["failure_budget"]["stops_after_batch"] == 3

    done = machines.run(**options)

    account = machines.report()
    reached = [batch for batch in plan["batches"] if batch["number"] <= 3]
    assert batches_of(done.stdout) == [sorted(batch["machines"]) for batch in reached]
    chosen = [one for one in plan["machines"] if one["cause"] != "labels"]
    assert [one["machine"] for one in chosen] == [one["machine"] for one in account["machines"]]
    became = {"rejuvenate": "done", "left_out": "skipped", "failed": "failed", "not_reached": "not touched"}
    assert {one["machine"]: became[one["outcome"]] for one in chosen} == machines.results()
    assert account["stopped"] == plan["failure_budget"]["reason"]
    assert [name for name in machines.begun if name != "m6"] == ["m2", "m5", "m1"]


def test_a_plan_tells_whose_machines_a_run_would_not_get(fleet, tmp_path):
    machines = fleet(m1={}, m2={})
    machines.lock("m2", Lock("another run", {"controller": "elsewhere", "run_id": "night"}, 0.0, 1e12))
    machines.lock("m1", Lock("long over", {}, 0.0, 1.0))
    file = {"vmbeam_run_plan_file": str(tmp_path / "plan.json")}

    done = machines.run(playbook="plan.yml", **file)

    assert done.returncode != 0
    assert machines.locks() == {"m1": "long over", "m2": "another run"}
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert not plan["begins"]
    [obstacle] = plan["obstacles"]
    assert obstacle.startswith("m2: reserved by run another run of ? on elsewhere")
    assert machines.run(playbook="plan.yml", vmbeam_plan_fail_on="stop", **file).returncode == 0
    assert machines.begun == []

    assert machines.run(playbook="plan.yml", vmbeam_break_lock="another run", **file).returncode == 0
    assert machines.locks() == {"m1": "long over", "m2": "another run"}
    assert list(machines.folder.glob("*.audit")) == []


def test_check_mode_shows_the_same_plan_of_the_run(fleet, tmp_path):
    machines = fleet(m1={}, m2={}, m3={})
    (machines.folder / "m2.fresh").touch()
    told = {}
    for name, playbook, arguments in (("plan", "plan.yml", []), ("check", "rejuvenate.yml", ["--check", "--diff"])):
        file = tmp_path / f"{name}.json"
        done = machines.run(*arguments, playbook=playbook, vmbeam_serial=2, vmbeam_run_plan_file=str(file))
        assert done.returncode == 0
        assert "Plan of 3 machine(s) in 2 batch(es)" in done.stdout
        told[name] = json.loads(file.read_text())
    assert {**told["plan"], "run": None} == {**told["check"], "run": None}
    assert "Run completed: 1 fresh, 2 planned" in done.stdout
    assert machines.begun == []
