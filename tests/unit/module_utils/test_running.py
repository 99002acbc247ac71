# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Running commands, waiting, and the errors of xl."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _health, _process
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandError,
    CommandTimeout,
    NotFound,
    Unreachable,
    WaitTimeout,
    XenUnavailable,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._process import Result
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import LONGEST_PAUSE, Clock, Deadline, wait_for
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


class FakeClock(Clock):
    def __init__(self):
        self.time = 1000.0
        self.pauses = []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.time += seconds


def test_run_returns_everything():
    result = _process.run(["sh", "-c", "echo out; echo err >&2; exit 3"], 10)
    assert (result.rc, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_run_survives_bytes_that_are_no_text():
    assert _process.run(["printf", r"\377ok"], 10).stdout == "\ufffdok"


def test_check_says_what_failed():
    with pytest.raises(CommandError, match=r"^xl create -p failed with exit code 3: the last line$") as caught:
        Result(("xl", "create", "-p", "x.cfg"), 3, "", "first\nthe last line\n\n").check()
    assert caught.value.details["cmd"] == ["xl", "create", "-p", "x.cfg"]
    assert caught.value.details["rc"] == 3


def test_missing_command():
    with pytest.raises(NotFound, match="no-such-command-here is not installed"):
        _process.run(["no-such-command-here"], 10)


def test_timeout_ends_the_whole_group():
    """The children of a command must not stay behind."""
    started = time.monotonic()
    with pytest.raises(CommandTimeout) as caught:
        _process.run(["sh", "-c", "sleep 77 & echo $! >&2; wait"], 0.5)
    assert time.monotonic() - started < 5
    assert "did not end within 0.5 s" in caught.value.message
    child = int(caught.value.details["stderr"])
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            with open(f"/proc/{child}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {child} still runs")


def test_stubborn_process_is_killed():
    process = _process.start(["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done"], stdout=subprocess.PIPE)
    process.stdout.readline()
    _process.end(process, grace=0.5)
    assert process.returncode == -9


def test_ending_an_ended_process_does_nothing():
    process = _process.start(["true"])
    process.wait()
    _process.end(process)


def test_commands_see_a_broken_pipe_as_an_error():
    """xl must get EPIPE, not die of SIGPIPE while a guest is suspended."""
    process = _process.start(
        ["sh", "-c", "echo ready; read x; echo more; echo status $? >&2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert b"status 1" in process.stderr.read()


def test_wait_returns_what_the_probe_says():
    clock = FakeClock()
    answers = iter([None, "", "yes"])
    assert wait_for(lambda: next(answers), Deadline(60, clock), "it") == "yes"
    assert clock.pauses == [0.2, pytest.approx(0.3)]


def test_wait_is_bounded_and_its_pauses_capped():
    clock = FakeClock()
    calls = []
    with pytest.raises(WaitTimeout, match="Waited 60 s for it") as caught:
        wait_for(lambda: calls.append(clock.now()), Deadline(60, clock), "it")
    assert max(clock.pauses) == LONGEST_PAUSE
    assert caught.value.details["elapsed"] == 60.0
    assert calls[-1] == 1060.0  # a last look at the deadline


def test_wait_looks_at_least_once():
    assert wait_for(lambda: True, Deadline(0, FakeClock()), "it")


def test_wait_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda: 1 / 0, Deadline(1, FakeClock()), "it")


def answering(rc=0, stdout="", stderr=""):
    calls = []

    def run(argv, timeout):
        calls.append((tuple(argv), timeout))
        return Result(tuple(argv), rc, stdout, stderr)

    run.calls = calls
    return run


@pytest.mark.parametrize(
    "stderr",
    [
        "xencall: error: Could not obtain handle on privileged command interface: No such file or directory\n"
        "libxl: error: libxl.c:102:libxl_ctx_alloc: cannot open libxc handle: No such file or directory\n"
        "cannot init xl context\n",
        "libxl: error: libxl.c:108:libxl_ctx_alloc: cannot connect to xenstore: No such file or directory\n"
        "cannot init xl context\n",
    ],
)
def test_xen_that_is_not_there(stderr):
    with pytest.raises(XenUnavailable, match="xenstored is up") as caught:
        Xl(answering(1, "", stderr)).domains()
    assert caught.value.details["stderr"] == stderr


def test_xl_that_is_not_installed():
    def run(argv, timeout):
        raise NotFound("The command xl is not installed on this host.")

    with pytest.raises(XenUnavailable, match="Install xen-utils"):
        Xl(run).hypervisor()


def test_xl_that_hangs():
    def run(argv, timeout):
        raise CommandTimeout("xl list -v did not end within 60 s and was ended.", timeout=timeout)

    with pytest.raises(CommandTimeout, match="whether xenstored"):
        Xl(run).domains()


def test_ordinary_failure():
    with pytest.raises(CommandError, match="xl unpause 8 failed with exit code 1: no") as caught:
        Xl(answering(1, "", "no\n")).unpause(8)
    assert not isinstance(caught.value, XenUnavailable)


def test_remote_xl_is_quoted_for_the_remote_shell():
    run = answering()
    Xl(run, ssh=["ssh", "-T", "root@d"]).rename(7, "a b;c")
    assert run.calls[0][0] == ("ssh", "-T", "root@d", "xl rename 7 'a b;c'")


def test_ssh_failure_is_not_a_failure_of_xl():
    with pytest.raises(Unreachable, match="root@d cannot be reached by ssh: Connection timed out"):
        Xl(answering(255, "", "Connection timed out\n"), ssh=["ssh", "root@d"]).domains()


def test_every_command_is_bounded():
    run = answering()
    xl = Xl(run)
    for act in (xl.destroy, xl.shutdown, xl.power_button, xl.pause, xl.unpause, xl.resume):
        act(7)
    assert all(0 < timeout <= 1800 for _argv, timeout in run.calls)


def test_resume_by_a_save_that_fails():
    run = answering(1, "", "Failed to save domain, resuming domain\n")
    Xl(run).resume(7)
    assert run.calls[0][0] == ("xl", "save", "-c", "7", "/dev/null")


TABLE = (
    "Name ID Mem VCPUs\tState\tTime(s)   UUID Reason-Code\tSecurity Label\n"
    "{dom0} 0 1024 1 r----- 1.0 00000000-0000-0000-0000-000000000000 - -\n"
    "web 3 256 1 ---sc- 1.0 00000000-0000-0000-0000-000000000001 - -\n"
)


def test_health():
    def run(argv, timeout):
        return Result(tuple(argv), 0, {"a.service": "active\n", "b.service": "failed\n"}[argv[-1]])

    health = _health.examine(
        Xl(answering(0, TABLE.format(dom0="Domain-0"))), ["web", "db"], ["a.service", "b.service"], 5, run
    )
    assert health.as_dict() == {
        "xl": True,
        "xenstore": True,
        "guests": {"web": "crashed", "db": "absent"},
        "units": {"a.service": "active", "b.service": "failed"},
    }
    assert health.missing() == ["guest web is crashed", "guest db is absent", "unit b.service is failed"]


def test_health_before_dom0_is_set_up():
    health = _health.examine(Xl(answering(0, TABLE.format(dom0="(null)"))), [], [], 5)
    assert health.missing() == ["xenstored is not set up"]


def test_health_without_xl():
    health = _health.examine(Xl(answering(1, "", "cannot init xl context\n")), ["web"], [], 5)
    assert health.missing() == ["xl does not answer", "guest web is unknown"]
    assert "cannot init xl context" in health.error


def test_health_without_systemd():
    def run(argv, timeout):
        raise NotFound("no systemctl")

    health = _health.examine(Xl(answering(0, TABLE.format(dom0="Domain-0"))), [], ["a.service"], 5, run)
    assert health.missing() == ["unit a.service is unknown"]


def test_commands_speak_english(monkeypatch):
    monkeypatch.setenv("LC_ALL", "ja_JP.UTF-8")
    assert _process.run(["sh", "-c", "echo $LC_ALL"], 10).stdout == "C.UTF-8\n"
    assert os.environ["LC_ALL"] == "ja_JP.UTF-8"
