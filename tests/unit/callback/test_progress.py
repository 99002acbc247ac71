# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The progress of a run: line by line from the role's facts, and in a real ansible-playbook."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.vmbeam.xen.plugins.plugin_utils import _progress
from ansible_collections.vmbeam.xen.plugins.plugin_utils._progress import Progress

ROOT = Path(__file__).resolve().parents[3]
PLAN = {
    "action": "rejuvenate",
    "reason": "m1-a is 9 d old",
    "problems": [],
    "source": {"name": "m1-a"},
    "destination": {"name": "m1-b"},
    "guests": [{"name": "web1"}, {"name": "app1"}],
}
WEB1 = {"guest": "web1", "result": "moved", "strategy": "zero_copy", "seconds": 12.84, "downtime_seconds": 4.5}
APP1 = {"guest": "app1", "result": "failed", "text": "app1: no session", "strategy": "zero_copy", "seconds": None}
REPORT = {
    "machine": "m1",
    "outcome": "completed",
    "seconds": 150.0,
    "guests_moved": 2,
    "longest_downtime_seconds": 4.5,
    "failure": None,
}


def phases(*names: str) -> list[dict[str, Any]]:
    return [{"phase": name, "at": 1000.0 + 20 * number} for number, name in enumerate(names)]


def texts(progress: Progress, **facts: Any) -> list[str]:
    return [line.text for line in progress.see("m1", {f"rejuvenate_{name}": value for name, value in facts.items()})]


def test_a_run_line_by_line():
    progress = Progress()
    assert texts(progress, probed={}, other=1) == []
    assert texts(progress, phases=phases("observe"), results=[]) == ["phase observe"]
    assert texts(progress, plan=PLAN) == ["rejuvenate m1-a -> m1-b, 2 guest(s): m1-a is 9 d old"]
    assert texts(progress, plan=dict(PLAN)) == []
    assert texts(progress, phases=phases("observe", "start m1-b")) == ["phase start m1-b (observe: 20.0 s)"]
    assert texts(progress, results=[WEB1]) == ["guest web1 moved by zero_copy in 12.8 s, downtime 4.50 s (1 of 2)"]
    assert texts(progress, results=[WEB1, APP1]) == ["guest app1: no session (2 of 2)"]
    assert texts(progress, report=REPORT) == ["completed in 2 min, 2 guest(s) moved"]
    # Another account has begun.
    assert texts(progress, phases=phases("observe"), results=[]) == ["phase observe"]
    assert texts(progress, results=[WEB1]) == ["guest web1 moved by zero_copy in 12.8 s, downtime 4.50 s (1 of 2)"]


def test_guests_that_go_back_are_told_once():
    """As rollback.yml does: an account of the way back, which is then put behind that of the way there."""
    progress = Progress()
    back = {**WEB1, "result": "moved back", "seconds": 9.0}
    texts(progress, phases=phases("observe", "move app1", "recover"), plan=PLAN, results=[WEB1, APP1])
    assert texts(progress, results=[]) == []
    assert texts(progress, results=[back]) == ["guest web1 moved back by zero_copy in 9.0 s, downtime 4.50 s (1 of 2)"]
    assert texts(progress, results=[WEB1, APP1, back]) == []


def test_a_guest_that_fails_on_both_ways_is_told_of_each():
    progress = Progress()
    back = {**APP1, "text": "app1: it does not answer"}
    texts(progress, plan=PLAN, results=[WEB1, APP1])
    texts(progress, results=[])
    assert texts(progress, results=[back]) == ["guest app1: it does not answer (1 of 2)"]


def test_a_machine_that_guests_keep_from_being_done_is_not_one_with_nothing_to_do():
    plan = {**PLAN, "action": "skip", "reason": "no guest can move", "guests": [{"name": "web1", "step": "leave"}]}
    assert texts(Progress(), plan=plan) == ["skipped: no guest can move"]
    stays = {**plan, "reason": "m1-a is fresh", "guests": [{"name": "web1", "step": "stay"}]}
    assert texts(Progress(), plan=stays) == ["nothing to do: m1-a is fresh"]


def test_good_and_bad_news():
    progress = Progress()
    refusal = {**PLAN, "problems": [{"message": "no memory", "fix": "add some"}, {"message": "no disk", "fix": "buy"}]}
    facts = {
        "rejuvenate_plan": refusal,
        "rejuvenate_results": [WEB1, APP1],
        "rejuvenate_report": {**REPORT, "outcome": "failed", "failure": {"summary": "m1: stopped"}},
    }
    assert [(line.good, line.text) for line in progress.see("m1", facts)] == [
        (False, "refused: no memory; no disk"),
        (True, "guest web1 moved by zero_copy in 12.8 s, downtime 4.50 s (1 of 2)"),
        (False, "guest app1: no session (2 of 2)"),
        (False, "failed in 2 min, 2 guest(s) moved: m1: stopped"),
    ]


def test_summary():
    progress = Progress()
    assert progress.summary(["m1"], 1) is None
    unknown = {"source": None, "destination": None, "action": "impossible", "problems": [{"message": "x", "fix": "y"}]}
    for machine, plan, report in (
        ("m1", PLAN, REPORT),
        ("m2", PLAN, {**REPORT, "machine": "m2", "longest_downtime_seconds": 7.25}),
        ("m3", {**PLAN, "action": "skip"}, None),
        ("m4", {**PLAN, **unknown}, None),
        ("m5", PLAN, None),
        ("m6", PLAN, None),
    ):
        progress.see(machine, {"rejuvenate_plan": plan, **({"rejuvenate_report": report} if report else {})})
    progress.see("m7", {"rejuvenate_phases": phases("observe")})
    line = progress.summary(["m4", "m6", "m7", "m8"], 7300)
    assert line.good is False
    assert line.text == (
        "8 machine(s): 2 completed, 3 failed (m6, m7, m8), 1 planned, 1 refused (m4), 1 skipped; 4 guest(s) moved, "
        "longest downtime 7.25 s (on m2); 2.0 h in all"
    )


def test_the_role_sets_the_facts_that_are_looked_at():
    written = "\n".join(path.read_text() for path in (ROOT / "roles" / "rejuvenate" / "tasks").glob("*.yml"))
    for name in (_progress.PLAN, _progress.PHASES, _progress.RESULTS, _progress.REPORT):
        assert re.search(rf"^    {name}:", written, re.MULTILINE), name


PLAYBOOK = [
    {
        "hosts": "all",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.set_fact": {"rejuvenate_phases": phases("observe"), "rejuvenate_results": []}},
            {"ansible.builtin.set_fact": {"rejuvenate_plan": PLAN}},
            {"ansible.builtin.set_fact": {"rejuvenate_results": [WEB1]}},
            {"ansible.builtin.set_fact": {"rejuvenate_report": REPORT}, "when": "inventory_hostname == 'm1'"},
            {"ansible.builtin.fail": {"msg": "no"}, "when": "inventory_hostname == 'm2'"},
        ],
    }
]


@pytest.fixture
def command(tmp_path):
    playbook = tmp_path / "play.yml"
    playbook.write_text(yaml.safe_dump(PLAYBOOK))
    return [Path(sys.executable).with_name("ansible-playbook"), "-i", "m1,m2", "-c", "local", playbook]


@pytest.fixture
def environment():
    plain = {name: value for name, value in os.environ.items() if name not in ("ANSIBLE_NOCOLOR", "NO_COLOR")}
    return {
        **plain,
        "TERM": "xterm",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
        "ANSIBLE_CALLBACKS_ENABLED": "vmbeam.xen.progress",
    }


def test_beside_the_default_output_without_a_terminal(command, environment):
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2
    assert "PLAY RECAP" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    lines = [line.split(" ", 2) for line in result.stdout.splitlines() if line.startswith("vmbeam ")]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", line[1]) for line in lines)
    told = [line[2] for line in lines]
    assert [line for line in told if line.startswith("m1: ")] == [
        "m1: phase observe",
        "m1: rejuvenate m1-a -> m1-b, 2 guest(s): m1-a is 9 d old",
        "m1: guest web1 moved by zero_copy in 12.8 s, downtime 4.50 s (1 of 2)",
        "m1: completed in 2 min, 2 guest(s) moved",
    ]
    assert told[-1].startswith("summary: 2 machine(s): 1 completed, 1 failed (m2); 2 guest(s) moved")


def test_coloured_on_a_terminal(command, environment):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    try:
        while part := os.read(ours, 65536):
            output += part
    except OSError:  # what the end of a terminal looks like
        pass
    assert process.wait(300) == 2
    os.close(ours)
    assert re.search(rb"\x1b\[0;32mvmbeam \S+ m1: guest web1 moved", output)
