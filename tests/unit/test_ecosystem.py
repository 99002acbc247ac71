# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""That what other tools read of the collection is what they, and the roles, understand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ansible_collections.vmbeam.xen.plugins.module_utils import _aging, _aging_metrics
from ansible_collections.vmbeam.xen.plugins.plugin_utils import _rolling
from checkout import environment
from prometheus import promtool

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.fleet import inventory, runs  # noqa: E402

BIN = Path(sys.executable).parent
EXAMPLES = ROOT / "examples"
SURVEY = json.loads((EXAMPLES / "awx" / "survey.json").read_text())


def run(command: str, *arguments: str | Path, cwd: Path = ROOT, variables: Mapping[str, str] | None = None) -> str:
    """What a command of this Python environment prints; it has to succeed."""
    result = subprocess.run(
        [BIN / command, *arguments],
        cwd=cwd,
        env={**(variables or environment()), "NO_COLOR": "1", "PATH": f"{BIN}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@cache
def known_variables() -> frozenset[str]:
    """The variables vmbeam_* that playbooks and roles read."""
    files = [*(ROOT / "playbooks").glob("*.yml"), *(ROOT / "roles").rglob("*.yml")]
    # Not those in comments and descriptions.
    code = "\n".join(
        line.split(" #")[0]
        for path in files
        if path.parent.name != "meta"
        for line in path.read_text().splitlines()
        if not line.lstrip().startswith("#")
    )
    return frozenset(re.findall(r"\bvmbeam_[a-z0-9_]+", code))


@cache
def role_defaults(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "roles" / name / "defaults" / "main.yml").read_text())


@cache
def options() -> dict[str, dict[str, Any]]:
    """The options of the roles by the variables from which they have their values."""
    found = {}
    for name in ("rolling", "rejuvenate"):
        specs = yaml.safe_load((ROOT / "roles" / name / "meta" / "argument_specs.yml").read_text())["argument_specs"]
        for option, value in role_defaults(name).items():
            variable = re.match(r"\{\{ (vmbeam_\w+) \|", str(value))
            if variable:
                found[variable[1]] = specs["main"]["options"][option]
    return found


def test_every_module_with_a_state_has_a_twin_that_reads():
    twins = {"zero_copy_session": "zero_copy_info"}
    modules = {path.stem: path.read_text() for path in (ROOT / "plugins" / "modules").glob("*.py")}
    stateful = [name for name, text in modules.items() if re.search(r'^            "state": \{', text, re.MULTILINE)]
    assert {"host_vm", "host_vm_disk", "guest", "zero_copy_session"} <= {*stateful}
    for name in stateful:
        twin = twins.get(name, f"{name}_info")
        assert twin in modules, f"{name} has no twin"
        assert "vmbeam.xen.attributes.info" in modules[twin]
        assert f"module: vmbeam.xen.{name}\n" in modules[twin], f"{twin} does not refer to {name}"


@pytest.mark.parametrize("question", SURVEY["spec"], ids=lambda question: question["variable"])
def test_a_survey_asks_for_what_the_roles_know(question):
    variable, default, choices = question["variable"], question["default"], question.get("choices", [])
    assert variable in known_variables()
    assert question["question_name"]
    assert question["question_description"]
    # AWX gives the default as the role would have it, if that has one; in a form that the field can have.
    option = options().get(variable, {})
    theirs = option.get("default")
    if "choices" in option:
        assert {*choices} <= {*option["choices"]}
    if question["type"] == "integer":
        assert isinstance(default, int)
        assert question["min"] <= default <= question["max"]
        assert default == theirs
    elif question["type"] == "multiplechoice":
        assert default in choices
        assert default == (json.dumps(theirs) if isinstance(theirs, bool) else theirs)
    elif question["type"] == "multiselect":
        assert default.split("\n") == theirs
        assert {*theirs} <= {*choices}
    else:
        assert question["type"] == "text"
        assert question["min"] <= len(default) <= question["max"]


def test_a_survey_asks_how_the_machines_are_rolled():
    questions = {question["variable"]: question for question in SURVEY["spec"]}
    assert {"vmbeam_serial", "vmbeam_failure_budget", "vmbeam_order"} <= {*questions}
    assert tuple(questions["vmbeam_order"]["choices"]) == _rolling.ORDERS
    # What a run asks for that was refused: a job whose container is gone cannot be seen to be dead.
    assert {"vmbeam_run_id", "vmbeam_break_lock", "vmbeam_confirm_gone"} <= {*questions}


@pytest.mark.parametrize("variable", ["vmbeam_strategy", "vmbeam_unmovable_policy", "vmbeam_on_failure"])
def test_a_survey_offers_all_that_a_role_takes(variable):
    [question] = [question for question in SURVEY["spec"] if question["variable"] == variable]
    assert question["choices"] == options()[variable]["choices"]


def test_a_survey_has_each_variable_once():
    assert {*SURVEY} == {"name", "description", "spec"}
    variables = [question["variable"] for question in SURVEY["spec"]]
    assert len({*variables}) == len(variables)


def test_what_the_inventory_tells_is_no_variable_that_the_roles_read():
    plugin = (ROOT / "plugins" / "inventory" / "xen.py").read_text()
    told = {*re.findall(r'"(vmbeam_[a-z0-9_]+)"', plugin)} - {"vmbeam_slots"}
    groups = {"vmbeam_hosts", "vmbeam_guest_dom0s", "vmbeam_guests"}
    assert {"vmbeam_observed", "vmbeam_machine"} | groups == told
    assert not (told - groups) & known_variables()


def test_the_rulebook_gives_the_playbook_variables_that_it_knows():
    [ruleset] = yaml.safe_load((ROOT / "extensions" / "eda" / "rulebooks" / "rejuvenate_on_aging.yml").read_text())
    action = ruleset["rules"][0]["action"]["run_playbook"]
    assert {*action["extra_vars"]} <= known_variables()
    assert action["name"] == "vmbeam.xen.rejuvenate"
    assert (ROOT / "playbooks" / "rejuvenate.yml").exists()


@cache
def rules_of_prometheus() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((EXAMPLES / "prometheus" / "aging.rules.yml").read_text())["groups"]
    return group["rules"]


def test_the_rules_of_prometheus_judge_what_is_there_over_a_day():
    group = yaml.safe_load((EXAMPLES / "prometheus" / "aging.rules.yml").read_text())["groups"][0]
    # Else a value that ended is current until the next turn.
    assert group["interval"] == "1m"
    judging = [rule["expr"] for rule in group["rules"] if rule.get("record") == "vmbeam_aging_exhausted_soon"]
    assert len(judging) == 3
    for expression in judging:
        # A function over a range still answers for what is gone.
        assert expression.endswith(" and vmbeam_aging_seen_for_a_day")
        assert "[6h])[18h:1h])" in expression
        # Guests take of it.
        assert "deriv(vmbeam_aging_hypervisor_free_memory_bytes" not in expression
    [seen] = [rule["expr"] for rule in group["rules"] if rule.get("record") == "vmbeam_aging_seen_for_a_day"]
    assert seen.startswith("vmbeam_aging_uptime_seconds > 86400 ")


def test_the_rules_of_prometheus_do_what_they_say():
    promtool("test", "rules", ROOT / "tests" / "unit" / "eda" / "aging.rules.test.yml")


def test_prometheus_takes_the_metrics_of_aging():
    """All that there can be: no dom0 has each of them."""
    found = [_aging.Indicator(name, _aging.Reading(5.0, 10.0)) for name in _aging.KINDS]
    promtool("check", "metrics", told=_aging_metrics.render(_aging.Observation(1762419731.25, "boot", found, {})))


def test_the_rules_of_prometheus_use_metrics_that_there_are():
    recorded = {rule["record"]: rule for rule in rules_of_prometheus() if "record" in rule}
    used = {name for rule in rules_of_prometheus() for name in re.findall(r"vmbeam_\w+", rule["expr"])}
    suffixes = {name: _aging_metrics._UNITS[kind.unit][1] for name, kind in _aging.KINDS.items()}
    there = {f"vmbeam_aging_{name}{end}{unit}" for name, unit in suffixes.items() for end in ("", "_exhausted_at")}
    assert used & there
    assert used <= {*there, *recorded, "vmbeam_aging_sample_time_seconds"}
    for rule in rules_of_prometheus():
        if rule.get("record") == "vmbeam_aging_exhausted_soon":
            assert rule["labels"]["indicator"] in _aging.KINDS
            assert rule["labels"]["reason"]


def test_only_what_has_aged_in_a_guest_dom0_leads_to_a_rejuvenation():
    """As _aging_policy.assess has it: what has aged in the host dom0 is for a person."""
    [ruleset] = yaml.safe_load((ROOT / "extensions" / "eda" / "rulebooks" / "rejuvenate_on_aging.yml").read_text())
    [source] = [one["vmbeam.xen.aging"] for one in ruleset["sources"]]
    # What the rulebook asks for is a record, not an alert.
    assert source["query"] == "{{ vmbeam_aging_query | default('vmbeam_aging_due') }}"
    assert "alert" not in source
    rejuvenating = [rule["expr"] for rule in rules_of_prometheus() if rule.get("record") == "vmbeam_aging_due"]
    assert rejuvenating
    for expression in rejuvenating:
        selectors = re.findall(r"vmbeam_\w+(\{[^}]*\})?", expression)
        assert selectors == ['{place="guest"}'] * len(selectors)
        # What the event source makes an event of.
        assert re.search(r"by \(machine, indicator, reason\)", expression)
    others = [rule for rule in rules_of_prometheus() if "alert" in rule]
    assert ['{place="host"}' in rule["expr"] for rule in others].count(True) == 1


def test_the_execution_environment_can_be_created(tmp_path):
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    tarball = f"vmbeam-xen-{version}.tar.gz"
    (tmp_path / tarball).write_bytes(b"")
    definition = tmp_path / "execution-environment.yml"
    definition.write_text((ROOT / definition.name).read_text())
    run("ansible-builder", "create", "-f", definition, "-c", tmp_path / "context", "--output-filename", "Containerfile")
    wanted = yaml.safe_load((tmp_path / "context" / "_build" / "requirements.yml").read_text())["collections"]
    assert [(tmp_path / "context" / "_build" / entry["name"]).is_file() for entry in wanted] == [True]
    assert (tmp_path / "context" / "Containerfile").is_file()
    pinned = (ROOT / "requirements.txt").read_text().split()
    assert yaml.safe_load(definition.read_text())["dependencies"]["ansible_core"]["package_pip"] in pinned


def test_the_execution_environment_gets_what_the_controller_needs(tmp_path):
    """And not what developers need, which ansible-builder takes where nothing else is said."""
    found = yaml.safe_load(run("ansible-builder", "introspect", ROOT / "collections", cwd=tmp_path))
    assert [entry.split()[0] for entry in found["system"]] == ["openssh-clients", "openssh-client"]
    assert [re.split(r"[ #=<>]", entry)[0] for entry in found["python"]] == ["pymannkendall", "tzdata"]


def test_the_image_that_make_builds_is_the_one_that_ansible_navigator_runs():
    settings = yaml.safe_load((ROOT / "ansible-navigator.yml").read_text())["ansible-navigator"]
    tag = settings["execution-environment"]["image"].removesuffix(":latest")
    # With a line in the help, and the collection's tarball made first.
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^build-ee: build ## \S.*\n\t(ansible-builder build .*)", makefile, re.MULTILINE)
    assert rule
    assert f" --tag {tag} " in rule[1]


def test_ansible_navigator_takes_the_settings(tmp_path):
    local = ("--execution-environment", "false", "--log-file", tmp_path / "log", "--mode", "stdout")
    schema = json.loads(run("ansible-navigator", "settings", "--schema", "json", *local, cwd=tmp_path))
    settings = yaml.safe_load((ROOT / "ansible-navigator.yml").read_text())
    jsonschema.validate(settings, schema)
    settings["ansible-navigator"]["modus"] = "stdout"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(settings, schema)


def test_ansible_navigator_runs_a_playbook_as_the_settings_say(tmp_path):
    """On a fleet that is simulated, in a folder that is like a checkout: all that is written is below it."""
    hosts = inventory.write(tmp_path, hosts=1, guests=1)
    for name in ("ansible-navigator.yml", "ansible.cfg", "collections", "playbooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    variables = runs.environment(tmp_path)
    # For work in a checkout its ansible.cfg has to do.
    del variables["ANSIBLE_CONFIG"], variables["ANSIBLE_COLLECTIONS_PATH"]

    said = run("ansible-navigator", "run", "playbooks/plan.yml", "-i", hosts, cwd=tmp_path, variables=variables)

    assert "m0001    1      rejuvenate" in said
    # By the callback plugin that the settings enable.
    assert said.splitlines()[-1].startswith("vmbeam ")
    [artifact] = (tmp_path / ".ansible" / "artifacts").iterdir()
    assert re.fullmatch(r"plan-.*-successful\.json", artifact.name)


@pytest.mark.parametrize("playbook", sorted(EXAMPLES.glob("*.yml")), ids=lambda path: path.name)
def test_examples_are_playbooks_with_our_roles(playbook):
    run("ansible-playbook", "-i", EXAMPLES / "inventory" / "1-machines.yml", playbook, "--syntax-check")
    used = {found for found in re.findall(r"(?:role|name): (\S+)$", playbook.read_text(), re.MULTILINE) if "." in found}
    assert used
    for name in used:
        assert name.startswith("vmbeam.xen.")
        # A role that is included is looked for only when that task runs.
        assert (ROOT / "roles" / name.rsplit(".", 1)[1]).is_dir()


def test_the_example_inventory_describes_what_the_roles_ask_for():
    groups = yaml.safe_load((EXAMPLES / "inventory" / "1-machines.yml").read_text())
    common = yaml.safe_load((EXAMPLES / "inventory" / "group_vars" / "vmbeam_hosts.yml").read_text())
    ours = {name for name in common if name.startswith("vmbeam_")}
    defaults = {name for role in ("host_hypervisor", "host_vm", "rejuvenate") for name in role_defaults(role)}
    for machine in groups["vmbeam_hosts"]["hosts"].values():
        ours |= {name for name in machine if name.startswith("vmbeam_")}
        for slot in machine["vmbeam_slots"].values():
            assert {"name", "address", "gateway", "mac"} == {*slot}
    assert ours <= known_variables()
    assert {name for name in common if not name.startswith("vmbeam_")} <= defaults
    for key in ("name", "address", "mac"):
        machines = groups["vmbeam_hosts"]["hosts"].values()
        values = [slot[key] for machine in machines for slot in machine["vmbeam_slots"].values()]
        assert len({*values}) == len(values)
