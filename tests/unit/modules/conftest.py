# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs modules as Ansible does, in this process, and the fake xl too, as most of them only need its answers."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.vmbeam.xen.plugins.module_utils import _process, _xl, _zerocopy

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))
from fake_zerocopy import FakeLibrary

FAKE_XL = Path(__file__).parents[1] / "fakes" / "fake_xl.py"
# Not runpy, which takes any path inside a collection for a package once Ansible's loader is there.
XL = compile(FAKE_XL.read_text(), FAKE_XL, "exec")


@pytest.fixture(autouse=True)
def quick_xl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the start of a process for each call of xl, except in tests marked with processes."""
    if request.node.get_closest_marker("processes"):
        return

    def run(argv, timeout):
        if argv[0] != "xl":
            return _process.run(argv, timeout)
        out, err, rc = io.StringIO(), io.StringIO(), 0
        monkeypatch.setattr(sys, "argv", list(argv))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(XL, {"__name__": "xl"})  # noqa: S102
            except SystemExit as end:
                rc = end.code
        return _process.Result(tuple(argv), rc, out.getvalue(), err.getvalue())

    monkeypatch.setattr(_xl.Xl.__init__, "__defaults__", (run, ()))


class Outcome(dict):
    """The result of a module; failed says whether it ended by fail_json."""

    @property
    def failed(self) -> bool:
        return bool(self.get("failed"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run_module(which: str, /, check: bool = False, **arguments: Any) -> Outcome:
        module = importlib.import_module(f"ansible_collections.vmbeam.xen.plugins.modules.{which}")
        capsys.readouterr()
        with patch_module_args({**arguments, "_ansible_check_mode": check}), pytest.raises(SystemExit) as end:
            module.main()
        outcome = Outcome(json.loads(capsys.readouterr().out))
        assert outcome.failed == (end.value.code != 0)
        return outcome

    return run_module


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(_zerocopy, "_load", lambda: fake)
    return fake


@pytest.fixture
def lock(run: Callable[..., Outcome], tmp_path: Path) -> dict[str, str]:
    """The options of a lock that run a has, in a folder of the test."""
    options = {"owner": "a", "path": str(tmp_path / "lock" / "lock.json")}
    assert not run("host_lock", **options).failed
    return options
