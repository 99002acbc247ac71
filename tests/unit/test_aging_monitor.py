# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Role aging_monitor: that its options are described, and that its units are what systemd takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml

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
