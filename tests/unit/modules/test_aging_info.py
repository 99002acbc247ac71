# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module that reports aging: run as Ansible does, with a Xen that is not there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils._aging import KINDS

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def keep(path: Path, *ages: float, boot: str = BOOT) -> None:
    """Writes a time series of samples that are so many seconds old."""
    lines = [
        json.dumps({"time": time.time() - age, "boot_id": boot, "values": {"uptime": age, "highest_domid": 99}})
        for age in ages
    ]
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")


@pytest.mark.parametrize("check", [False, True])
def test_what_is_seen_now(fake_xen, run, tmp_path, check):
    fake_xen.add("source", "web")
    result = run("aging_info", check, history=str(tmp_path / "none.jsonl"))
    assert result["changed"] is False
    found = {row["name"]: row for row in result["indicators"]}
    assert list(found) == [name for name in KINDS if name in found]
    assert found["hypervisor_free_memory"]["value"] == 9000
    assert found["hypervisor_free_memory"]["limit"] == 16383
    assert found["highest_domid"]["value"] == 8
    assert found["dom0_available_memory"]["value"] > 0
    assert abs(result["time"] - time.time()) < 60
    assert "xenstored does not answer" in result["unavailable"]["xenstore_nodes"]
    assert result["series"] == {"samples": 0, "times": [], "indicators": {}}
    # Nothing is asked of xl but what it only reads for.
    assert {call.split()[1] for call in fake_xen.calls} == {"list", "info"}
    assert list(tmp_path.glob("*.jsonl")) == []


def test_the_series(fake_xen, run, tmp_path):
    path = tmp_path / "samples.jsonl"
    keep(path, 900, 800, boot="before")
    keep(path, 700, 600, 500, 400, 300)
    result = run("aging_info", history=str(path))
    assert result["series"]["samples"] == 5
    assert result["series"]["indicators"]["uptime"] == [700, 600, 500, 400, 300]
    assert result["series"]["times"] == sorted(result["series"]["times"])
    # It lasts until the boot, though the domain is gone.
    assert {row["name"]: row["value"] for row in result["indicators"]}["highest_domid"] == 99

    assert run("aging_info", history=str(path), window=550)["series"]["indicators"]["uptime"] == [500, 400, 300]
    thinned = run("aging_info", history=str(path), points=1)["series"]
    assert thinned["indicators"]["uptime"] == [500]
    assert thinned["samples"] == 5
    none = run("aging_info", history=str(path), points=0)
    assert none["series"]["times"] == []
    assert {row["name"]: row["value"] for row in none["indicators"]}["highest_domid"] == 99


def test_no_toolstack_is_no_failure(fake_xen, run, tmp_path):
    fake_xen.fault("xenstored-down-source")
    result = run("aging_info", history=str(tmp_path / "none.jsonl"))
    assert not result.failed
    assert "xl cannot reach" in result["unavailable"]["toolstack_latency"]
    assert "dom0_available_memory" in {row["name"] for row in result["indicators"]}


@pytest.mark.parametrize(("argument", "value"), [("history", "a b"), ("window", 0), ("points", -1), ("timeout", 0)])
def test_bad_arguments(fake_xen, run, argument, value):
    result = run("aging_info", **{argument: value})
    assert result["msg"].startswith(f"{argument}: ")
    assert fake_xen.calls == []
