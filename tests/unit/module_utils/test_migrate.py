# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Migrations with real processes, pipes, locks and sockets, and a fake xl that breaks where it is told to."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shlex
import subprocess
import time
from functools import partial

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _channel_daemon, _migrate, _transport
from ansible_collections.vmbeam.xen.plugins.module_utils._cold import ColdOptions
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandError,
    Conflict,
    InvalidInput,
    Undecided,
    Unreachable,
    VmbeamError,
    XenUnavailable,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._migrate import Links, Migration
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

LIVE = "-b----"
PAUSED = "--p---"
SUSPENDED = "---ss-"
AT_SOURCE = ({"web": LIVE}, {})
AT_DESTINATION = ({}, {"web": LIVE})


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(_migrate, "SETTLE", 5.0)
    monkeypatch.setattr(_migrate, "RECEIVER_END", 5.0)


@pytest.fixture
def locks(tmp_path):
    return str(tmp_path)


@pytest.fixture
def migration(locks):
    def make(strategy="precopy", transport="ssh", timeout=20.0, session=None):
        ssh = _transport.ssh_command("127.0.0.1", "root")
        rune = (
            partial(_transport.tcp_rune, ssh, "127.0.0.1") if transport == "tcp" else partial(_transport.ssh_rune, ssh)
        )

        def receive(receiver, guest):
            _command, argv = _channel_daemon.command({"command": receiver, "guest": guest}, 1)
            # What the channel does: the daemon of the other side runs it.
            return _transport.ssh_rune(ssh, shlex.join(argv).replace("/run/lock", locks))

        links = Links(Xl(), Xl(ssh=ssh), rune)
        if transport == "channel":
            links = Links(Xl(), Xl(ssh=ssh), rune, receive, links.destination.domains)
        return Migration("web", links, strategy, timeout, locks=locks, session=session)

    return make


def both(fake_xen):
    return fake_xen.seen("source"), fake_xen.seen("destination")


def fails(migration, error=CommandError):
    with pytest.raises(error) as caught:
        migration.run()
    return caught.value


@pytest.mark.parametrize("transport", ["ssh", "tcp", "channel"])
@pytest.mark.parametrize("strategy", ["precopy", "suspend", "zero_copy"])
def test_moves_the_guest(fake_xen, migration, strategy, transport):
    fake_xen.add("source", "web")
    fake_xen.add("source", "other", uuid="11111111-1111-1111-1111-111111111111")
    job = migration(strategy, transport)
    assert job.run() is True
    assert both(fake_xen) == ({"other": LIVE}, {"web": LIVE})
    report = job.report
    assert report.repairs == []
    assert 0 < report.downtime_seconds <= report.seconds
    assert not any("debug" in line or "vmbeam-transport" in line for line in report.log_tail)
    if strategy == "suspend":
        assert report.bytes > 300_000
        assert report.phases == {}
    else:
        assert report.bytes is None
        assert report.log_tail[-1] == "Migration successful."
        assert list(report.phases) == ["connect", "memory", "state", "hand_over", "start", "clean_up"]
        assert sum(report.phases.values()) <= report.seconds
    assert report.memory == (
        {
            "session": 7,
            "pages_passed_on": 32760,
            "pages_copied": 8,
            "pages_sent": 5,
            "hypercalls": 91,
            "p2m_writes_4k": 24,
            "p2m_writes_2m": 126,
        }
        if strategy == "zero_copy"
        else None
    )


@pytest.mark.parametrize("strategy", ["precopy", "suspend"])
def test_downtime_is_null_without_the_messages(fake_xen, migration, monkeypatch, strategy):
    monkeypatch.setattr(_migrate, "_SUSPENDED", "never said")
    fake_xen.add("source", "web")
    job = migration(strategy)
    job.run()
    assert job.report.downtime_seconds is None


def test_what_an_older_toolstack_does_not_count_is_null(fake_xen, migration, monkeypatch):
    monkeypatch.setattr(_migrate, "_SENT", re.compile("never said"))
    fake_xen.add("source", "web")
    job = migration("zero_copy")
    job.run()
    assert job.report.memory["pages_sent"] is None
    assert job.report.memory["pages_copied"] == 8


def test_second_run_changes_nothing(fake_xen, migration):
    fake_xen.add("destination", "web", time=99.0)
    job = migration()
    assert job.run() is False
    assert both(fake_xen) == AT_DESTINATION
    assert all(call.split()[1] == "list" for call in fake_xen.calls)


def test_paused_by_an_administrator_at_the_destination_is_left(fake_xen, migration):
    fake_xen.add("destination", "web", flags=PAUSED, time=3.0)
    assert migration().run() is False
    assert both(fake_xen) == ({}, {"web": PAUSED})


# What stays at both ends after a fault, whatever the strategy.
@pytest.mark.parametrize(
    ("fault", "strategy"),
    [
        ("receiver-dies-early", "precopy"),
        ("receiver-dies-early", "suspend"),
        ("receiver-killed-early", "precopy"),
        ("receiver-killed-early", "suspend"),
        ("receiver-refuses", "precopy"),
        ("sender-killed", "precopy"),
        ("receiver-dies-early", "zero_copy"),
        ("receiver-refuses", "zero_copy"),
        ("sender-killed", "zero_copy"),
        ("sender-killed-before-commit", "zero_copy"),
        ("save-fails", "suspend"),
        ("save-does-not-pause", "suspend"),
        ("restore-fails-late", "suspend"),
    ],
)
def test_guest_runs_on_at_the_source(fake_xen, migration, fault, strategy):
    fake_xen.add("source", "web")
    fake_xen.fault(fault)
    error = fails(migration(strategy))
    assert both(fake_xen) == AT_SOURCE
    assert error.details["location"] == "source"
    assert "The guest runs on at the source." in error.message
    # And the next run, without the fault, succeeds.
    fake_xen.no_fault(fault)
    assert migration(strategy).run() is True
    assert both(fake_xen) == AT_DESTINATION


@pytest.mark.parametrize(
    "fault", ["receiver-killed-before-go", "receiver-killed-before-unpause", "receiver-killed-after-start"]
)
def test_committed_session_is_completed_at_the_destination(fake_xen, migration, fault):
    fake_xen.add("source", "web")
    fake_xen.fault(fault)
    job = migration("zero_copy")
    assert job.run() is True
    assert both(fake_xen) == AT_DESTINATION
    assert "xl migrate-recover web--migratedaway (domain 8, suspended) at the source" in job.report.repairs


def test_the_session_is_handed_to_xl(fake_xen, migration):
    fake_xen.add("source", "web")
    migration("zero_copy", session=7).run()
    assert any("migrate --zero-copy=7" in call for call in fake_xen.calls)


@pytest.mark.parametrize(
    "fault", ["receiver-killed-before-go", "receiver-killed-before-unpause", "receiver-killed-after-start"]
)
def test_broken_handshake_is_completed_at_the_destination(fake_xen, migration, fault):
    """xl calls this state undefined; but the copy at the destination is known to be complete."""
    fake_xen.add("source", "web")
    fake_xen.fault(fault)
    job = migration()
    assert job.run() is True
    assert both(fake_xen) == AT_DESTINATION
    assert any("destroy web--migratedaway" in repair for repair in job.report.repairs)
    assert "** Migration failed during final handshake **" in job.report.log_tail


@pytest.mark.parametrize("strategy", ["precopy", "suspend"])
def test_hanging_receiver_is_broken_off(fake_xen, migration, strategy):
    """Only the transport is ended: xl itself resumes the guest then."""
    fake_xen.add("source", "web")
    fake_xen.fault("receiver-hangs" if strategy == "precopy" else "restore-hangs-late")
    started = time.monotonic()
    error = None
    job = migration(strategy, timeout=1.0)
    error = fails(job)
    assert time.monotonic() - started < 15
    assert "timeout: the migration of web did not end within 1 s" in error.message
    assert fake_xen.seen("source") == {"web": LIVE}
    assert error.details["location"] == "source"
    if strategy == "precopy":
        assert "Migration failed, resuming at sender." in job.report.log_tail
        assert not any("save -c" in call for call in fake_xen.calls)


def test_xl_that_does_not_end_is_ended(fake_xen, migration, monkeypatch):
    monkeypatch.setattr(_migrate, "SETTLE", 0.3)
    fake_xen.add("source", "web")
    fake_xen.fault("save-hangs")
    error = fails(migration("suspend", timeout=0.5))
    assert "timeout" in error.message
    assert both(fake_xen) == AT_SOURCE


def test_no_process_outlives_a_migration_that_was_broken_off(fake_xen, migration, locks):
    fake_xen.add("source", "web")
    fake_xen.fault("save-hangs")
    _migrate.SETTLE = 0.3
    fails(migration("suspend", timeout=0.5))
    with open(f"{locks}/vmbeam-send-web.lock") as lock:  # inherited by every one of them
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_failing_switch_over_goes_forward_only(fake_xen, migration, side):
    """Once the source's copy is being destroyed, it must never run again."""
    fake_xen.add("source", "web")
    fault = "destroy-source-fails" if side == "source" else "unpause-destination-fails"
    fake_xen.fault(fault)
    error = fails(migration("suspend"))
    assert fake_xen.seen("destination") == {"web": PAUSED}
    assert fake_xen.seen("source") == ({"web": PAUSED} if side == "source" else {})
    assert error.details["location"] in ("destination", "unknown")
    fake_xen.no_fault(fault)
    assert migration("suspend").run() is True
    assert both(fake_xen) == AT_DESTINATION


def test_source_is_unpaused_though_the_destination_is_lost(fake_xen, migration):
    fake_xen.add("source", "web")
    fake_xen.fault("cut-after-receive")
    error = fails(migration("suspend"))
    assert fake_xen.seen("source") == {"web": LIVE}
    assert error.details["location"] == "source"
    assert "No route to host" in error.message
    fake_xen.no_fault("cut-after-receive")
    fake_xen.no_fault("unreachable")
    job = migration("suspend")
    assert job.run() is True
    assert both(fake_xen) == AT_DESTINATION
    assert job.report.repairs[0].startswith("destroy web (domain 21, paused) at the destination")


def test_killed_between_pause_and_switch_over(fake_xen, migration, locks):
    """A run that was killed leaves a note that it was not an administrator who paused the guest."""
    fake_xen.add("source", "web", flags=PAUSED)
    with open(f"{locks}/vmbeam-send-web.lock", "w") as lock:
        lock.write("paused")
    assert migration("suspend").run() is True
    assert both(fake_xen) == AT_DESTINATION
    assert os.path.getsize(f"{locks}/vmbeam-send-web.lock") == 0


def test_success_of_xl_is_not_believed(fake_xen, migration):
    fake_xen.add("source", "web")
    fake_xen.fault("receiver-does-not-unpause")
    error = fails(migration(), Conflict)
    assert "xl reported success, but web is not running at the destination" in error.message
    assert error.details["location"] == "destination"


def test_guest_that_cannot_be_resumed_is_reported(fake_xen, migration):
    fake_xen.add("source", "web")
    fake_xen.fault("sender-killed")
    fake_xen.fault("resume-fails")
    error = fails(migration())
    assert fake_xen.seen("source") == {"web": SUSPENDED}
    assert "resume web (domain 8, suspended) at the source had no effect" in error.message


def test_both_ends_run_it(fake_xen, migration):
    fake_xen.add("source", "web")
    fake_xen.add("destination", "web")
    error = fails(migration(), Undecided)
    assert error.details["location"] == "both"
    assert both(fake_xen) == ({"web": LIVE}, {"web": LIVE})
    assert all(call.split()[1] == "list" for call in fake_xen.calls)


def test_nowhere(fake_xen, migration):
    error = fails(migration(), Undecided)
    assert error.details["location"] == "nowhere"
    assert error.message.startswith("name: no guest web")


def test_unreachable_destination_touches_nothing(fake_xen, migration):
    fake_xen.add("source", "web")
    fake_xen.fault("unreachable")
    error = fails(migration(), Unreachable)
    assert "root@127.0.0.1 cannot be reached by ssh: ssh: connect to host" in error.message
    assert error.details["location"] == "source"
    assert fake_xen.seen("source") == {"web": LIVE}


def test_xenstored_down_at_the_destination(fake_xen, migration):
    fake_xen.add("source", "web")
    fake_xen.fault("xenstored-down-destination")
    error = fails(migration(), XenUnavailable)
    assert "xenstored is up" in error.message


def test_one_migration_at_a_time(fake_xen, migration, locks):
    fake_xen.add("source", "web")
    with open(f"{locks}/vmbeam-send-web.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = fails(migration(), Conflict)
    assert "Another migration of web is at work" in error.message
    assert both(fake_xen) == AT_SOURCE


@pytest.mark.parametrize("transport", ["ssh", "channel"])
@pytest.mark.parametrize("strategy", ["precopy", "suspend"])
def test_one_receiver_at_a_time(fake_xen, migration, locks, strategy, transport):
    fake_xen.add("source", "web")
    with open(f"{locks}/vmbeam-receive-web.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = fails(migration(strategy, transport))
    assert "nother receiver of" in error.message
    assert both(fake_xen) == AT_SOURCE


def test_stale_copy_is_kept_while_its_receiver_lives(fake_xen, migration, locks, monkeypatch):
    monkeypatch.setattr(_migrate, "RECEIVER_END", 1.0)
    fake_xen.add("source", "web")
    fake_xen.add("destination", "web--incoming", flags=PAUSED, time=0.0)
    with open(f"{locks}/vmbeam-receive-web.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = fails(migration(), Conflict)
    assert "receiver of web is still at work" in error.message
    assert fake_xen.seen("destination") == {"web--incoming": PAUSED}
    assert migration().run() is True
    assert both(fake_xen) == AT_DESTINATION


def test_hint_for_a_known_message(fake_xen, migration):
    fake_xen.add("source", "web")
    job = migration()
    job._links = Links(
        job._links.source,
        job._links.destination,
        lambda _command: "echo 'failed to free memory for the domain' >&2; exit 1",
    )
    assert "too little free memory" in fails(job).message


def test_check_mode_looks_only(fake_xen, migration):
    fake_xen.add("source", "web")
    assert migration().foresee() == ("source", True)
    assert both(fake_xen) == AT_SOURCE
    fake_xen.write("source", [])
    fake_xen.add("destination", "web")
    assert migration().foresee() == ("destination", False)
    fake_xen.add("source", "web")
    with pytest.raises(Undecided):
        migration().foresee()


def broken_channel(job):
    """Has the faster way of a migration be one that leads nowhere; returns how often it was tried."""
    tried = []

    def glance():
        tried.append(1)
        raise CommandError("there is no channel that is up")

    job._links = dataclasses.replace(job._links, glance=glance)
    return tried


@pytest.mark.parametrize("strategy", ["precopy", "suspend", "zero_copy"])
def test_check_mode_tells_of_a_channel_that_is_not_up(fake_xen, migration, strategy):
    fake_xen.add("source", "web")
    job = migration(strategy, transport="channel")
    broken_channel(job)
    with pytest.raises(CommandError, match="no channel that is up"):
        job.foresee()
    # One that has arrived needs none.
    fake_xen.write("source", [])
    fake_xen.add("destination", "web")
    assert job.foresee() == ("destination", False)


def test_nothing_is_suspended_for_a_channel_that_is_not_up(fake_xen, migration):
    fake_xen.add("source", "web")
    job = migration("suspend", transport="channel")
    tried = broken_channel(job)
    assert "no channel that is up" in fails(job).message
    assert tried == [1]
    assert not [call for call in fake_xen.calls if " save " in call]
    assert both(fake_xen) == AT_SOURCE


def test_a_suspension_is_not_begun_if_only_the_channel_leads_there(fake_xen, migration):
    fake_xen.add("source", "web")
    job = migration("suspend", transport="channel")
    job._links = dataclasses.replace(job._links, glance=list)
    fake_xen.fault("unreachable")
    with pytest.raises(Unreachable):
        job.foresee()
    fails(job, Unreachable)
    assert fake_xen.seen("source") == {"web": LIVE}
    assert not [call for call in fake_xen.calls if " save " in call]


def test_what_the_other_guest_dom0_is_asked_to_run():
    rune = _transport.channel_rune("restore", "web", 3)
    assert rune == "exec vmbeam-channel restore web 3"
    assert _transport.channel_rune("receive-copy", "web", None) == "exec vmbeam-channel receive-copy web"


def test_relay_refuses_a_wrong_token(tmp_path):
    """Somebody else who finds the port gets nothing, and does not keep the right one out."""
    import inspect
    import json
    import socket

    from ansible_collections.vmbeam.xen.plugins.module_utils import _tcp_relay

    server = subprocess.Popen(
        ["python3", "-c", inspect.getsource(_tcp_relay), "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    token = "a" * _tcp_relay.TOKEN
    server.stdin.write(json.dumps({"address": "127.0.0.1", "token": token, "command": "tr a-z A-Z"}).encode() + b"\n")
    server.stdin.flush()
    port = int(server.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), 5) as wrong:
        wrong.sendall(b"b" * _tcp_relay.TOKEN)
        assert wrong.recv(10) == b""
    with socket.create_connection(("127.0.0.1", port), 5) as right:
        right.sendall(token.encode() + b"hello")
        right.shutdown(socket.SHUT_WR)
        assert right.recv(10) == b"HELLO"
    assert server.wait(5) == 0


def test_relay_gives_back_the_exit_code(fake_xen):
    ssh = _transport.ssh_command("127.0.0.1", "root")
    rune = _transport.tcp_rune(ssh, "127.0.0.1", "cat >&2; exit 7")
    done = subprocess.run(["sh", "-c", rune], input=b"data", capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"", b"data")


def test_relay_says_when_ssh_fails(fake_xen):
    fake_xen.fault("unreachable")
    rune = _transport.tcp_rune(_transport.ssh_command("127.0.0.1", "root"), "127.0.0.1", "true")
    done = subprocess.run(["sh", "-c", rune], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    assert done.returncode == 255
    assert b"No route to host" in done.stderr


def test_ssh_arguments_of_the_administrator_come_first():
    command = _transport.ssh_command("d", "root", ["-oConnectTimeout=5"])
    assert command.index("-oConnectTimeout=5") < command.index("-oConnectTimeout=30")
    assert command[-1] == "root@d"


def test_all_errors_are_typed():
    assert issubclass(Undecided, Conflict)
    assert issubclass(Conflict, VmbeamError)


@pytest.fixture
def cold(locks, tmp_path):
    """A cold move of web, whose configuration both dom0s have: they share this computer's files."""
    config = tmp_path / "web.cfg"
    config.write_text('name = "web"\nmemory = 512\n')

    def make(shutdown_timeout=5.0, destroy=False, path=config, timeout=20.0):
        ssh = _transport.ssh_command("127.0.0.1", "root")
        links = Links(Xl(), Xl(ssh=ssh), partial(_transport.ssh_rune, ssh))
        options = ColdOptions(str(path), shutdown_timeout, destroy)
        return Migration("web", links, "cold", timeout, locks=locks, cold=options)

    return make


def acts(fake_xen):
    """What xl changed, in order."""
    return [call for call in fake_xen.calls if call.split()[1] != "list"]


class TestCold:
    def test_shuts_down_here_and_starts_there(self, fake_xen, cold):
        fake_xen.add("source", "web")
        job = cold()
        assert job.run() is True
        assert fake_xen.seen("source") == {}
        assert list(fake_xen.seen("destination")) == ["web"]
        assert [call.split()[:2] for call in acts(fake_xen)] == [["source", "shutdown"], ["destination", "create"]]
        assert 0 < job.report.downtime_seconds <= job.report.seconds
        assert list(job.report.phases) == ["stop", "start"]

    def test_a_second_run_changes_nothing(self, fake_xen, cold):
        fake_xen.add("source", "web")
        cold().run()
        before = acts(fake_xen)
        assert cold().run() is False
        assert acts(fake_xen) == before

    def test_check_mode_touches_nothing(self, fake_xen, cold):
        fake_xen.add("source", "web")
        assert cold().foresee() == ("source", True)
        assert acts(fake_xen) == []

    @pytest.mark.parametrize("flags", ["---sc-", "---s--"])
    def test_a_guest_that_is_down_already(self, fake_xen, cold, flags):
        fake_xen.add("source", "web", flags=flags)
        job = cold()
        assert job.run() is True
        assert fake_xen.seen("source") == {}
        assert list(fake_xen.seen("destination")) == ["web"]
        assert job.report.downtime_seconds is None

    def test_a_run_that_was_cut_after_the_shutdown_goes_on(self, fake_xen, cold):
        assert cold().foresee() == ("nowhere", True)
        assert cold().run() is True
        assert list(fake_xen.seen("destination")) == ["web"]

    @pytest.mark.parametrize("text", ['name = "db"\n', "memory = 1\n"])
    def test_nothing_is_stopped_without_a_way_to_start_it(self, fake_xen, cold, tmp_path, text):
        fake_xen.add("source", "web")
        (tmp_path / "web.cfg").write_text(text)
        assert "is the configuration of" in fails(cold(), InvalidInput).message
        assert "cannot be read at the destination" in fails(cold(path=tmp_path / "none.cfg"), InvalidInput).message
        assert both(fake_xen) == AT_SOURCE

    def test_a_guest_that_does_not_shut_down_stays(self, fake_xen, cold):
        fake_xen.add("source", "web")
        fake_xen.fault("shutdown-ignored")
        error = fails(cold(shutdown_timeout=0.5))
        assert "to shut down. Nothing was started" in error.message
        assert error.details["location"] == "source"
        assert both(fake_xen) == AT_SOURCE

    def test_its_power_is_cut_only_if_that_is_wanted(self, fake_xen, cold):
        fake_xen.add("source", "web")
        fake_xen.fault("shutdown-ignored")
        assert cold(shutdown_timeout=0.5, destroy=True).run() is True
        assert fake_xen.seen("source") == {}
        assert list(fake_xen.seen("destination")) == ["web"]

    @pytest.mark.parametrize("fault", ["create-refuses-destination", "create-fails-halfway-destination"])
    def test_a_guest_that_cannot_start_there_is_started_again_here(self, fake_xen, cold, fault):
        fake_xen.add("source", "web")
        fake_xen.fault(fault)
        error = fails(cold())
        assert "It was started again at the source" in error.message
        assert error.details["location"] == "source"
        assert list(fake_xen.seen("source")) == ["web"]
        assert fake_xen.seen("destination") == {}

    def test_a_start_that_may_still_be_at_work_is_never_doubled(self, fake_xen, cold, tmp_path):
        """The connection is lost, or the time is up, while the destination starts the guest."""
        fake_xen.add("source", "web")
        fake_xen.fault("create-hangs-destination")
        error = fails(cold(timeout=2.0))
        assert "A receiver of web is still at work" in error.message
        assert fake_xen.seen("source") == {}
        assert len(fake_xen.read("destination")) == 1
        assert "still at work" in fails(cold(), Conflict).message

    def test_a_paused_guest_could_not_shut_down_and_is_not_touched(self, fake_xen, cold):
        fake_xen.add("source", "web", flags=PAUSED)
        fails(cold(), Undecided)
        assert both(fake_xen) == ({"web": PAUSED}, {})

    def test_two_copies_are_left_to_a_person(self, fake_xen, cold):
        fake_xen.add("source", "web")
        fake_xen.add("destination", "web")
        fails(cold(), Undecided)
        assert acts(fake_xen) == []
