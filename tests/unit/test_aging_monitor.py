# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role aging_monitor: its options, its units as systemd takes them, and the folder of metrics as Ansible leaves it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml
from checkout import environment

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles" / "aging_monitor"


def test_defaults_and_argument_specs_have_the_same_options():
    specs = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    options = {name for spec in specs.values() for name in spec["options"]}
    assert options == set(yaml.safe_load((ROLE / "defaults" / "main.yml").read_text()))


@pytest.fixture
def units(tmp_path):
    """The role's units with its defaults, but a command that is there."""
    variables = {
        **yaml.safe_load((ROLE / "defaults" / "main.yml").read_text()),
        **yaml.safe_load((ROLE / "vars" / "main.yml").read_text()),
        "_aging_monitor_command": "/bin/true",
    }
    environment = jinja2.Environment(  # noqa: S701  no HTML
        loader=jinja2.FileSystemLoader(ROLE / "templates"), undefined=jinja2.StrictUndefined, trim_blocks=True
    )

    def render(**changes):
        values = {**variables, **changes}
        for name in ("_aging_monitor_history", "_aging_monitor_metrics"):
            values[name] = environment.from_string(values[name]).render(values).strip()
        for name in variables["_aging_monitor_units"]:
            (tmp_path / name).write_text(environment.get_template(f"{name}.j2").render(values))
        return tmp_path

    return render


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("directory", ["/var/lib/prometheus/node-exporter", ""])
def test_systemd_takes_the_units_and_calls_the_service_safe(units, directory):
    folder = units(aging_monitor_textfile_directory=directory)
    paths = sorted(folder.glob("vmbeam-aging.*"))
    assert len(paths) == 2
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    safe = ["systemd-analyze", "security", "--offline=true", "--threshold=20", folder / "vmbeam-aging.service"]
    done = subprocess.run(safe, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    service = (folder / "vmbeam-aging.service").read_text()
    assert ("--metrics" in service) == bool(directory) == ("ReadWritePaths" in service)
    # Without it root may not write into another user's folder.
    capabilities = re.findall(r"^CapabilityBoundingSet=(.*)", service, re.MULTILINE)
    assert capabilities == (["", "CAP_DAC_OVERRIDE"] if directory else [""])


@pytest.fixture
def apply(tmp_path):
    """Apply the role to a copy of this computer's folders; return how many tasks changed something."""
    playbook, commands = tmp_path / "play.yml", tmp_path / "bin"
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "roles": ["vmbeam.xen.aging_monitor"]}
    playbook.write_text(yaml.safe_dump([play]))
    for folder in (commands, tmp_path / "units"):
        folder.mkdir()
    systemctl = commands / "systemctl"
    systemctl.write_text('#!/bin/sh\n[ "$1" != show ] || printf "LoadState=loaded\\nActiveState=active\\n"\n')
    systemctl.chmod(0o755)

    def run(directory, state="present"):
        variables = {
            "_aging_monitor_home": str(tmp_path / "lib"),
            "_aging_monitor_history": str(tmp_path / "aging" / "samples.jsonl"),
            "_aging_monitor_unit_directory": str(tmp_path / "units"),
            "aging_monitor_textfile_directory": str(directory),
            "aging_monitor_state": state,
        }
        done = subprocess.run(
            ["ansible-playbook", "-i", "localhost,", "-e", json.dumps(variables), playbook],
            cwd=ROOT,
            env=environment(PATH=f"{commands}:{os.environ['PATH']}"),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return int(re.search(r"changed=(\d+)", done.stdout)[1])

    return run


@pytest.mark.skipif(os.getuid() != 0, reason="the role's files are root's")
def test_a_folder_of_the_site_keeps_its_mode_and_no_metrics_are_left_behind(apply, tmp_path):
    old, new = tmp_path / "site", tmp_path / "new" / "metrics"
    old.mkdir()
    old.chmod(0o2775)
    assert apply(old) > 0
    assert old.stat().st_mode & 0o7777 == 0o2775
    metrics = old / "vmbeam_aging.prom"
    metrics.write_text("vmbeam_aging_uptime_seconds 1\n")
    assert apply(old) == 0
    assert metrics.exists()
    # Another folder, which is made; then no metrics.
    assert apply(new) > 0
    assert new.stat().st_mode & 0o7777 == 0o755
    assert not metrics.exists()
    metrics = new / "vmbeam_aging.prom"
    metrics.write_text("vmbeam_aging_uptime_seconds 1\n")
    assert apply("") > 0
    assert not metrics.exists()
    assert apply("") == 0
    # Whoever removes the role need not know where they were.
    assert apply(old) > 0
    (old / "vmbeam_aging.prom").write_text("")
    assert apply("", "absent") > 0
    assert [*old.iterdir(), *(tmp_path / "units").iterdir()] == []
