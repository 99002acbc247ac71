# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""That what is written in several places agrees."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils import basic

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("*.py"))
ROLES = sorted((ROOT / "roles").iterdir())
# What a role may be given that has no default: unset means something of its own.
WITHOUT_DEFAULT = {"host_vm": {"host_vm_generation"}}


def test_action_group_has_all_modules():
    runtime = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text())
    assert sorted(runtime["action_groups"]["all"]) == MODULES


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
    written = yaml.safe_load(module.DOCUMENTATION)
    assert written["module"] == name
    assert {key: option(text) for key, text in written["options"].items()} == {
        key: argument(spec) for key, spec in seen["argument_spec"].items()
    }
    assert seen["supports_check_mode"] is True


@pytest.mark.parametrize("name", MODULES)
def test_examples_and_returns_are_complete(name):
    module = importlib.import_module(f"ansible_collections.vmbeam.xen.plugins.modules.{name}")
    known = yaml.safe_load(module.DOCUMENTATION)["options"]
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
