# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""That what is written in several places agrees."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import basic
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.vmbeam.xen.plugins.plugin_utils import _fleet_plan, _rolling, _text, _variables
from checkout import environment
from jinja2 import nodes
from jinja2.nativetypes import NativeEnvironment

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("*.py"))
ROLES = sorted((ROOT / "roles").iterdir())
TEMPLATES = NativeEnvironment()
TEMPLATES.filters["vmbeam.xen.listed"] = _text.listed
# What a role may be given that has no default: unset means something of its own.
WITHOUT_DEFAULT = {"host_vm": {"host_vm_generation"}}


def test_action_group_has_all_modules():
    runtime = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text())
    assert sorted(runtime["action_groups"]["all"]) == MODULES


def test_a_play_may_give_all_modules_their_defaults(tmp_path):
    """As the documentation of each module says: by the action group."""
    lock = str(tmp_path / "lock.json")
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "module_defaults": {"group/vmbeam.xen.all": {"path": lock}},
        "tasks": [
            {"vmbeam.xen.host_lock": {"owner": "night"}},
            {"vmbeam.xen.host_lock_info": None, "register": "seen"},
            {"ansible.builtin.debug": {"msg": "held by {{ seen.holder.owner }}"}},
        ],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", "-c", "local", tmp_path / "play.yml"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert '"msg": "held by night"' in done.stdout
    assert json.loads(Path(lock).read_text())["owner"] == "night"


def documented(module: Any) -> dict[str, Any]:
    """DOCUMENTATION with the options of the fragments that it extends."""
    written = yaml.safe_load(module.DOCUMENTATION)
    for name in written["extends_documentation_fragment"]:
        file, _, section = name.removeprefix("vmbeam.xen.").partition(".")
        fragment = importlib.import_module(f"ansible_collections.vmbeam.xen.plugins.doc_fragments.{file}")
        text = getattr(fragment.ModuleDocFragment, section.upper() or "DOCUMENTATION")
        written["options"] |= yaml.safe_load(text).get("options", {})
    return written


def option(text: dict[str, Any]) -> dict[str, Any]:
    """What an option of DOCUMENTATION says that its argument_spec says too."""
    result = {key: text[key] for key in ("type", "choices", "default", "elements", "required") if key in text}
    if "suboptions" in text:
        result["options"] = {name: option(inner) for name, inner in text["suboptions"].items()}
    return result


def argument(spec: dict[str, Any]) -> dict[str, Any]:
    result = {key: value for key, value in spec.items() if key not in ("no_log", "options")}
    if "options" in spec:
        result["options"] = {name: argument(inner) for name, inner in spec["options"].items()}
    return result


@pytest.mark.parametrize("name", MODULES)
def test_documentation_is_the_argument_spec(name, monkeypatch):
    module = importlib.import_module(f"ansible_collections.vmbeam.xen.plugins.modules.{name}")
    seen = {}

    class Stop(Exception):
        pass

    def capture(**arguments):
        seen.update(arguments)
        raise Stop

    monkeypatch.setattr(module, "AnsibleModule", capture)
    with pytest.raises(Stop):
        module.main()
    assert basic.AnsibleModule is not capture
    written = documented(module)
    assert written["module"] == name
    assert {key: option(text) for key, text in written["options"].items()} == {
        key: argument(spec) for key, spec in seen["argument_spec"].items()
    }
    assert seen["supports_check_mode"] is True


@pytest.mark.parametrize("name", MODULES)
def test_examples_and_returns_are_complete(name):
    module = importlib.import_module(f"ansible_collections.vmbeam.xen.plugins.modules.{name}")
    known = documented(module)["options"]
    for example in yaml.safe_load(module.EXAMPLES):
        arguments = example.get(f"vmbeam.xen.{name}", {}) or {}
        assert set(arguments) <= set(known)
    for key, value in yaml.safe_load(module.RETURN).items():
        assert value["description"], key
        assert "sample" in value, key
        assert value["returned"], key


def role_file(role: Path, name: str) -> Any:
    """What a file of a role says, nothing if there is none."""
    path = role / name
    return yaml.safe_load(path.read_text()) or {} if path.exists() else {}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_defaults_and_argument_specs_of_a_role_have_the_same_options(role):
    specs = role_file(role, "meta/argument_specs.yml").get("argument_specs", {})
    options = {name for spec in specs.values() for name in spec.get("options", {})}
    assert options - WITHOUT_DEFAULT.get(role.name, set()) == set(role_file(role, "defaults/main.yml"))


def role_options(role: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options of a role with their names, once for each entry point that has them."""
    for spec in role_file(role, "meta/argument_specs.yml").get("argument_specs", {}).values():
        yield from spec.get("options", {}).items()


def role_code(role: Path) -> str:
    """What a role does with its options."""
    return "".join(
        path.read_text() for folder in ("tasks", "vars", "templates") for path in sorted((role / folder).glob("*"))
    )


def description(option: dict[str, Any]) -> str:
    text = option["description"]
    return text if isinstance(text, str) else " ".join(text)


def names_in(template: Any) -> set[str]:
    """The variables and functions that a template of a default uses."""
    return {node.name for node in TEMPLATES.parse(str(template)).find_all(nodes.Name)}


OPTIONS = [(role, name, option) for role in ROLES for name, option in role_options(role)]


@pytest.mark.parametrize(("role", "name", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_of_a_role_says_what_its_default_is(role, name, option):
    """It is what the role has if nobody sets anything, or the description says how it is found."""
    if name in WITHOUT_DEFAULT.get(role.name, set()):
        assert "default" not in option
        return
    default = role_file(role, "defaults/main.yml")[name]
    used = names_in(default)
    for variable in used:
        if variable.startswith("vmbeam_"):
            assert f"C({variable})" in description(option)
    if not all(variable.startswith("vmbeam_") for variable in used):
        assert "default" not in option
        assert "y default" in description(option)
        return
    if used:
        default = TEMPLATES.from_string(default).render()
    assert "default" in option, f"of {name} meta/argument_specs.yml has no default: it is {default!r}"
    assert (type(option["default"]), option["default"]) == (type(default), default)
    checked = ArgumentSpecValidator({name: option}).validate({name: default})
    assert checked.error_messages == []


@pytest.mark.parametrize(("role", "name", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_of_a_role_has_a_type_and_a_unit(role, name, option):
    assert "type" in option
    assert ("elements" in option) == (option["type"] == "list")
    if option["type"] == "int":
        assert re.search(r"\b(seconds|MiB|number|how many|share)\b", description(option), re.I), "of what unit is it?"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_an_option_of_which_only_some_values_work_has_choices(role):
    """Those that tasks compare with words, or of which the description names several values."""
    code = role_code(role)
    for name, option in role_options(role):
        compared = set(re.findall(rf"\b{name} *(?:\| default\(.*\) *)?[!=]= '(\w*)'", code))
        for words in re.findall(rf"\b{name} in \[([^]]*)\]", code):
            compared |= set(re.findall(r"'(\w*)'", words))
        named = {*re.findall(r"V\(([a-z_]+)\)", description(option))}
        if option["type"] not in ("str", "list", "raw"):
            continue
        assert compared <= set(option.get("choices", ())), name
        assert "choices" in option or len(named) < 2, f"{name} has no choices, but takes {sorted(named)}"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_list_of_a_role_may_be_text(role):
    """Wherever it is used it is made a list first, unless its default does that.

    A list of dictionaries cannot be text: its validation refuses that.
    """
    defaults = role_file(role, "defaults/main.yml")
    code = role_code(role)
    for name, option in role_options(role):
        if (
            option["type"] == "list"
            and option["elements"] != "dict"
            and " | vmbeam.xen.listed(" not in str(defaults[name])
        ):
            used = re.findall(rf"(?<!')\b{name}\b(?![:']).{{0,22}}", code)
            assert used, name
            assert {text for text in used if not text.startswith(f"{name} | vmbeam.xen.listed(")} == set()


def module_choices(module: str, option: str) -> set[str]:
    text = importlib.import_module(f"ansible_collections.vmbeam.xen.plugins.modules.{module}").DOCUMENTATION
    return set(yaml.safe_load(text)["options"][option]["choices"])


def test_choices_of_the_roles_are_what_modules_filters_and_tasks_accept():
    choices = {name: set(option["choices"]) for _role, name, option in OPTIONS if "choices" in option}
    strategies, transports = module_choices("guest_migrate", "strategy"), module_choices("guest_migrate", "transport")
    slots = module_choices("host_vm", "slot")
    assert choices["host_vm_slot"] == slots
    assert choices["rejuvenate_destination_slot"] == slots | {""}
    assert choices["host_vm_previous_disk"] == module_choices("host_vm", "previous_disk")
    assert choices["rejuvenate_auto_strategies"] == strategies
    assert choices["rejuvenate_strategy"] == strategies | {"auto"}
    assert choices["rejuvenate_unmovable_policy"] == (strategies - {"zero_copy"}) | {
        "fail",
        "skip_host",
        "leave_and_skip",
    }
    assert choices["rejuvenate_zero_copy_transport"] == transports | {"auto"}
    assert choices["rejuvenate_transport"] == transports
    assert choices["rolling_order"] == set(_rolling.ORDERS)
    assert choices["rolling_plan_fail_on"] == set(_fleet_plan.OBJECTIONS)
    # Values of dictionaries, which an argument spec does not know, are checked by a filter.
    assert set(_variables.CHOICES) == choices["rejuvenate_strategy"]
    assert set(_variables.POLICIES) == choices["rejuvenate_unmovable_policy"]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_a_role_is_described(role):
    assert (role / "README.md").read_text().startswith(f"# vmbeam.xen.{role.name}\n")
    about = role_file(role, "meta/main.yml")["galaxy_info"]
    assert about["description"]
    assert about["license"] == "GPL-3.0-or-later"
    for entry, spec in role_file(role, "meta/argument_specs.yml").get("argument_specs", {}).items():
        assert spec["short_description"], entry
        for name, option in spec.get("options", {}).items():
            assert option["description"], name


def test_each_role_has_a_scenario_of_molecule():
    # The private one is applied by those of host_hypervisor and guest_hypervisor.
    roles = {role.name for role in ROLES} - {"hypervisor_common"}
    assert roles == {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")}


@pytest.mark.parametrize(
    ("role", "variable"),
    [("aging_monitor", "_aging_monitor_files"), ("guest_hypervisor", "_guest_hypervisor_channel_files")],
)
def test_what_a_role_installs_of_the_collection_is_complete(role, variable):
    """What is copied to a dom0 imports nothing of the collection that is not."""
    installed = set(role_file(ROOT / "roles" / role, "vars/main.yml")[variable])
    pattern = re.compile(
        r"^from ansible_collections\.vmbeam\.xen\.plugins\.module_utils(?:\.(\w+))? import (.*)$", re.M
    )
    for name in installed:
        for module, names in pattern.findall((ROOT / "plugins" / "module_utils" / name).read_text()):
            wanted = [module] if module else names.split(", ")
            assert {f"{one}.py" for one in wanted} <= installed, name
