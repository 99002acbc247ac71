# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What shuts domains down before their dom0, with an xl and a systemctl of the test's own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "roles" / "hypervisor_common" / "files" / "vmbeam-domains"

XL = """\
#!/bin/sh
cd "$(dirname "$0")"
case $1 in
list) if [ $# = 1 ]; then cat domains; elif [ "$3" = 1 ]; then echo '"nested_hvm": "True",'; fi ;;
domname) echo "name-of-$2" ;;
*) echo "$@" >> asked; if [ -e obedient ]; then sed -i '2,$d' domains; fi ;;
esac
"""
SYSTEMCTL = """\
#!/bin/sh
cat "$(dirname "$0")/state"
exit 1
"""
HEADER = "Name                                        ID   Mem VCPUs\tState\tTime(s)\n"
DOM0 = "Domain-0                                     0   896     1     r-----     103.0\n"
HOST_VM = "m1-a                                         1  3072     1     -b----     204.5\n"
GUEST = "web1                                         7   192     1     r-----       4.5\n"
OTHERS = """\
app1--incoming                               8   160     2     --p---       0.0
app2--migratedaway                           9   160     2     ---s--      10.1
(null)                                      10     0     1     --ps-d      93.0
"""


@pytest.fixture
def dom0(tmp_path: Path) -> Path:
    for name, text in {"xl": XL, "systemctl": SYSTEMCTL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "asked").touch()
    (tmp_path / "state").write_text("stopping\n")
    (tmp_path / "domains").write_text(HEADER + DOM0 + OTHERS)
    return tmp_path


def run(dom0: Path, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{dom0}:{os.environ['PATH']}"}
    return subprocess.run(
        [str(PROGRAM), str(seconds)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("domain", "asked"), [(HOST_VM, "trigger 1 power"), (GUEST, "shutdown -F 7")], ids=["host VM", "guest"]
)
def test_each_is_asked_as_it_listens_and_waited_for(dom0: Path, domain: str, asked: str) -> None:
    (dom0 / "domains").write_text(HEADER + DOM0 + OTHERS + domain)
    (dom0 / "obedient").touch()
    done = run(dom0)
    assert done.returncode == 0, done.stderr
    assert (dom0 / "asked").read_text().splitlines() == [asked]


def test_what_does_not_shut_down_is_told_when_the_time_is_up(dom0: Path) -> None:
    (dom0 / "domains").write_text(HEADER + DOM0 + GUEST)
    done = run(dom0, seconds=1)
    assert done.returncode == 1
    assert "still up after 1 seconds: 7" in done.stdout


def test_a_domain_that_has_xl_hang_does_not_keep_it_from_the_others(dom0: Path) -> None:
    (dom0 / "domains").write_text(HEADER + DOM0 + HOST_VM + GUEST)
    (dom0 / "xl").write_text(XL.replace("case $1 in", "case $* in 'domname 1') sleep 5; exit 1 ;; esac\ncase $1 in"))
    (dom0 / "obedient").touch()
    assert run(dom0).returncode == 0
    assert (dom0 / "asked").read_text().splitlines() == ["shutdown -F 7"]


def test_an_xl_that_fails_for_a_moment_does_not_tell_that_nothing_runs(dom0: Path) -> None:
    (dom0 / "domains").write_text(HEADER + DOM0 + GUEST)
    (dom0 / "xl").write_text(XL.replace("case $1 in", "[ -e tried ] || { touch tried; exit 1; }\ncase $1 in"))
    (dom0 / "obedient").touch()
    assert run(dom0).returncode == 0
    assert (dom0 / "asked").read_text().splitlines() == ["shutdown -F 7"]


def test_what_cannot_shut_down_is_neither_asked_nor_waited_for(dom0: Path) -> None:
    assert run(dom0).returncode == 0
    assert (dom0 / "asked").read_text() == ""


@pytest.mark.parametrize("state", ["running", "degraded", "starting"])
def test_nothing_is_asked_while_the_dom0_stays_up(dom0: Path, state: str) -> None:
    """The service is restarted, or stopped by hand."""
    (dom0 / "state").write_text(f"{state}\n")
    (dom0 / "domains").write_text(HEADER + DOM0 + HOST_VM)
    done = run(dom0)
    assert done.returncode == 0
    assert "left alone" in done.stdout
    assert (dom0 / "asked").read_text() == ""
