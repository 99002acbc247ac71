# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the checkout importable as the collection, and gives tests a Xen that is not there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKES = Path(__file__).parent / "fakes"
sys.path.insert(0, str(ROOT / "collections"))

DOM0 = {
    "name": "Domain-0",
    "domid": 0,
    "uuid": "00000000-0000-0000-0000-000000000000",
    "flags": "r-----",
    "time": 60.0,
}
WEB_UUID = "6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a11"


def pytest_configure(config: pytest.Config) -> None:
    # Here, as ansible-test has settings of its own.
    config.addinivalue_line("markers", "processes: runs the fake xl as a process of its own")


class FakeXen:
    """The state behind the fake xl and ssh commands: two dom0s, and faults to come.

    Processes of their own read and write it, so the code under test is run as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "faults").mkdir()
        for side in ("source", "destination"):
            self.write(side, [])

    def write(self, side: str, domains: list[dict]) -> None:
        (self.folder / f"{side}.json").write_text(json.dumps([DOM0, *domains]))

    def add(self, side: str, name: str, flags: str = "-b----", time: float = 12.5, uuid: str = WEB_UUID) -> int:
        domains = self.read(side)
        domid = max([7, *(domain["domid"] for domain in domains)]) + 1
        domains.append({"name": name, "domid": domid, "uuid": uuid, "flags": flags, "time": time})
        self.write(side, domains)
        return domid

    def read(self, side: str) -> list[dict]:
        return json.loads((self.folder / f"{side}.json").read_text())[1:]

    def seen(self, side: str) -> dict[str, str]:
        """The flags of the domains, by name."""
        return {domain["name"]: domain["flags"] for domain in self.read(side)}

    def fault(self, name: str) -> None:
        """Makes a fault happen, each time its place is passed."""
        (self.folder / "faults" / name).touch()

    def no_fault(self, name: str) -> None:
        (self.folder / "faults" / name).unlink()

    @property
    def calls(self) -> list[str]:
        """What xl was called with, in order, each line with the side."""
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def fake_xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeXen:
    folder = tmp_path / "xen"
    folder.mkdir()
    monkeypatch.setenv("FAKE_XEN", str(folder))
    monkeypatch.setenv("FAKE_SIDE", "source")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("xl", "ssh"):
        program = bin_folder / name
        program.write_text(f"#!{sys.executable} -SE\n{(FAKES / f'fake_{name}.py').read_text()}")
        program.chmod(0o755)
    (bin_folder / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return FakeXen(folder)
