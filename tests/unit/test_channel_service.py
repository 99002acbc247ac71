# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The systemd unit of the channel's daemon: that it is confined, and is not kept from its work."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "roles" / "guest_hypervisor" / "files" / "vmbeam-channel.service"
AGING_UNIT = ROOT / "roles" / "aging_monitor" / "templates" / "vmbeam-aging.service.j2"
#: What the samples of aging, which are of xl and of Python too, are confined by, and the daemon cannot be.
LESS = {"MemoryDenyWriteExecute=yes"}
#: What the samples need that the daemon does not, for metrics in another user's folder.
MORE = {"CapabilityBoundingSet=CAP_DAC_OVERRIDE"}
CONFINING = ("Protect", "Private", "Restrict", "NoNew", "Lock", "Memory", "Capability", "SystemCall", "DevicePolicy")


def confinement(unit: Path) -> set[str]:
    return {line for line in unit.read_text().splitlines() if line.startswith(CONFINING)}


def test_it_is_as_confined_as_the_samples_of_aging():
    assert confinement(AGING_UNIT) - confinement(UNIT) == LESS | MORE


def test_it_has_the_devices_of_channels():
    devices = {line.split("=")[1] for line in UNIT.read_text().splitlines() if line.startswith("DeviceAllow=")}
    assert devices == {f"/dev/xen/{name} rw" for name in ("privcmd", "hypercall", "evtchn", "gntalloc")}


@pytest.mark.parametrize(
    "directive",
    [
        "MemoryDenyWriteExecute=",  # ctypes
        "PrivateDevices=",  # /dev/xen
        "PrivateUsers=",  # Xen's devices are for root
        "ProtectProc=",  # /proc/xen
        "ProcSubset=",
        "PrivateIPC=",
        "User=",
        "DynamicUser=",
    ],
)
def test_it_is_not_kept_from_its_work(directive):
    assert not [line for line in UNIT.read_text().splitlines() if line.startswith(directive)]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_it_for_safe(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/sbin/vmbeam-channel", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    safe = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
    done = subprocess.run(safe, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
