"""Zero-copy migration by xl alone, as its man page and docs/zero-copy-by-hand.md have it: no module takes part."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import shlex
import subprocess
import typing

import pytest
from vmbeam_lab import guests, wait
from vmbeam_lab.errors import CommandFailed

pytestmark = pytest.mark.long

GUEST = "web1"
#: Sessions that a host VM can have at a time.
SESSIONS = 32
#: The sender has not committed yet, and the receiver waits.
ACKNOWLEDGED = "Target has acknowledged transfer"
#: libxl, of a ring with requests, of a device that is attached or detached, and of a domain that is to suspend itself.
AT_WORK = "has got requests to answer yet"
ATTACHING, SUSPENDING = "calling hotplug script", "suspend request via XenBus"
#: The guest's second disk, as its guest dom0 and as the guest calls it, and how much the guest leaves behind there.
DISK, FRONTEND = f"scsi-0QEMU_QEMU_HARDDISK_{GUEST}-data", "xvdb"
SECTORS_PER_PAGE, BEHIND_SECTORS = 8, 4096
#: Where the kernel of a guest dom0 tells of the disk, in a shell.
SYSFS = f"/sys/block/$(basename $(readlink -f /dev/disk/by-id/{DISK}))"
#: Sets the bytes that a backend in the group writes in a second. In the device model of the host VM nothing could be
#: held up: it ends all that has got to it when the guest's memory is prepared.
LIMIT = f'echo "$(cat {SYSFS}/dev) wbps={{}}" > /sys/fs/cgroup/slow/io.max'
#: Has the disk's backend in that group, and write next to nothing.
SLOW_BACKEND = f"""set -e
echo +io > /sys/fs/cgroup/cgroup.subtree_control
mkdir -p /sys/fs/cgroup/slow
{LIMIT.format(100)}
threads=$(pgrep "^$(xl domid {GUEST})[.]{FRONTEND}-")
for thread in $threads; do echo $thread > /sys/fs/cgroup/slow/cgroup.procs; done
"""
#: What pkill finds them by, but not its own shell; the sender's name is that of a program behind a stand-in.
SENDER, RECEIVER = "[x]l.real migrate", "[x]l migrate-receive"


def bind(pair, source: str, destination: str, *options: str) -> int:
    """Let a slot pass something to another one, in host dom0, and return the session's number."""
    said = pair.lab.host("xl", "zero-copy-bind", *options, pair.name(source), pair.name(destination))
    return int(said.splitlines()[-1])


def unbind(pair, *sessions: int) -> None:
    command = "; ".join(["set -e", *(f"xl zero-copy-unbind {session}" for session in sessions)])
    pair.lab.host("sh", "-c", shlex.quote(command), timeout=300)


def sessions(pair) -> dict[int, list[str]]:
    """Return number -> the other columns of the sessions that host dom0 lists."""
    _header, *lines = pair.lab.host("xl", "zero-copy-list").splitlines()
    return {int(number): columns for number, *columns in map(str.split, lines)}


def migrate(pair, source: str, *arguments: str) -> None:
    """Run xl migrate in a slot's guest dom0."""
    command = shlex.join(["xl", "migrate", "--zero-copy", *arguments])
    try:
        print(pair.lab.guest_dom0(source, f"{command} 2>&1", timeout=900))
    except subprocess.CalledProcessError as exc:
        pytest.fail(f"{command}: {exc.stdout}")


def migrate_in_detail(pair) -> tuple[int, str]:
    """Run xl migrate from a to b by ssh; return its exit status, and what both sides tell of what they do."""
    bind(pair, "a", "b")
    receive = f"exec ssh {pair.name('b')} xl -vvv migrate-receive --zero-copy"
    command = shlex.join(["xl", "-vvv", "migrate", "--zero-copy", "-s", "", GUEST, receive])
    # What its transport still says may come after it.
    said = pair.lab.guest_dom0("a", f"{command} 2>&1; echo exit status $?", timeout=900)
    print(said)
    return int(re.search(r"(?m)^exit status (\d+)$", said)[1]), said


@pytest.mark.parametrize("channel", [True, False], ids=["channel", "ssh"])
def test_a_guest_moves_to_and_fro(pair, channel):
    before = pair.lab.status(GUEST)
    for source, destination in (("a", "b"), ("b", "a")):
        names = [pair.name(source), pair.name(destination)]
        way = bind(pair, source, destination, "--channel") if channel else None
        session = bind(pair, source, destination)
        bound = sessions(pair)
        assert bound[session][:4] == [*names, "guest", "open"]
        assert way is None or bound[way][:4] == [*names, "channel", "open"]
        if channel:
            migrate(pair, source, "-s", "", GUEST, f"exec vmbeam-channel receive {GUEST}")
        else:
            migrate(pair, source, GUEST, names[1])
        assert pair.running_in() == [destination]
        left = sessions(pair)
        assert session not in left
        if way is not None:
            assert way in left
            unbind(pair, way)
            assert way not in sessions(pair)
    assert not guests.lost(before, pair.lab.status(GUEST))


def test_devices_are_attached_before_the_guest_is_suspended(pair):
    before = pair.lab.status(GUEST)
    status, said = migrate_in_detail(pair)
    assert status == 0
    earlier, suspended, _later = said.partition(SUSPENDING)
    assert suspended
    for script in ("block add", "vif-bridge online"):
        assert re.search(rf"{ATTACHING}: /etc/xen/scripts/\S*{script}", earlier)
    assert pair.running_in() == ["b"]
    assert not guests.lost(before, pair.lab.status(GUEST))
    pair.move("b", "a")


def test_a_guest_is_not_suspended_for_a_host_that_cannot_attach_its_devices(pair):
    before = pair.lab.status(GUEST)
    pair.lab.guest_dom0("b", "find /etc/xen/scripts -name 'vif-*' -exec chmod a-x {} +")
    try:
        status, said = migrate_in_detail(pair)
    finally:
        pair.lab.guest_dom0("b", "find /etc/xen/scripts -name 'vif-*' -exec chmod a+x {} +")
    assert status != 0
    assert "unable to add disk or nic devices" in said
    assert SUSPENDING not in said
    assert pair.running_in() == ["a"]
    assert pair.lab.guests_in("b") == set()
    assert "frontend-id" not in pair.lab.guest_dom0("b", "xenstore-ls /local/domain/0/backend || true")
    assert not guests.lost(before, pair.lab.status(GUEST))


@contextlib.contextmanager
def under_way(pair) -> typing.Iterator[typing.Callable[[], None]]:
    """Have the backend of the guest's disk at work on what the guest has left for it, and get no further.

    Yields what lets it go on, as leaving this does. In the end the disk has to hold what the guest left, for good: what
    the backend of slot a still had to write is written then.
    """
    port = pair.lab.machine.guests[GUEST].http_port

    def control(part: str, name: str, word: str, wanted: typing.Callable[[dict], bool]) -> dict:
        found = guests.await_status(
            port, lambda status: wanted(status[part]), timeout=120, what=f"{name} {word}", control=(name, word)
        )
        return found[part]

    def sectors_written() -> int:
        return int(pair.lab.guest_dom0("a", f"awk '{{print $7}}' {SYSFS}/stat"))

    control("disk", "disk-pause", "1", lambda disk: disk["paused"])
    try:
        before = sectors_written()
        pair.lab.guest_dom0("a", SLOW_BACKEND)
        try:
            control("behind", "behind", "write", lambda behind: behind["done"] == "write")
            yield lambda: pair.lab.guest_dom0("a", LIMIT.format("max"))
        finally:
            pair.lab.guest_dom0("a", LIMIT.format("max"))
        wait.until(
            lambda: sectors_written() - before >= BEHIND_SECTORS,
            timeout=120,
            failure=lambda: AssertionError(f"only {sectors_written() - before} sectors were written in slot a"),
        )
        found = control("behind", "behind", "check", lambda behind: behind["done"] == "check")
        assert found["pages"] * SECTORS_PER_PAGE == BEHIND_SECTORS
        assert found["wrong"] == 0
    finally:
        control("disk", "disk-pause", "0", lambda disk: not disk["paused"])


def test_a_disk_that_is_at_work_is_waited_for(pair):
    """What it still has to write would be written from memory that is not the guest's any more."""
    before = pair.lab.status(GUEST)
    # Renamed when the receiver has all, right before the disk is waited for.
    handing_over = f"until xl list | grep -q '^{GUEST}--migratedaway '; do sleep 0.2; done"
    with under_way(pair) as hurry, concurrent.futures.ThreadPoolExecutor(1) as pool:
        migration = pool.submit(migrate_in_detail, pair)
        pair.lab.guest_dom0("a", f"timeout 300 sh -c {shlex.quote(handing_over)}", timeout=330)
        hurry()
        status, said = migration.result()
        assert status == 0
        _earlier, suspended, later = said.partition(SUSPENDING)
        assert suspended
        assert AT_WORK in later
        assert pair.running_in() == ["b"]
    assert not guests.lost(before, pair.lab.status(GUEST))
    pair.move("b", "a")


def test_a_disk_that_does_not_end_keeps_its_guest(pair):
    before = pair.lab.status(GUEST)
    with under_way(pair):
        status, said = migrate_in_detail(pair)
        assert status != 0
        assert AT_WORK in said.partition(SUSPENDING)[2]
        assert "Disks or nics haven't answered all requests" in said
        assert pair.running_in() == ["a"]
        assert pair.lab.guests_in("b") == set()
    assert not guests.lost(before, pair.lab.status(GUEST))


def test_sessions_are_limited_and_can_be_removed(pair):
    before = set(sessions(pair))
    command = shlex.join(["xl", "zero-copy-bind", pair.name("a"), pair.name("b"), "64"])
    said = pair.lab.host(
        "sh", "-c", shlex.quote(f"for turn in $(seq {SESSIONS + 1}); do {command}; done; true"), timeout=600
    )
    now = sessions(pair)
    bound = set(now) - before
    try:
        assert len(now) == SESSIONS
        assert "too many sessions" in said
        assert {now[session][4] for session in bound} == {"64"}
    finally:
        unbind(pair, *bound)
    assert set(sessions(pair)) == before


def test_what_cannot_be_is_refused_with_a_reason(pair):
    before = sessions(pair)
    a, b = pair.name("a"), pair.name("b")
    for arguments, reason in (
        (["zero-copy-bind", a, a], "are the same domain"),
        (["zero-copy-bind", a, "nobody"], "nobody is an invalid domain identifier"),
        (["zero-copy-bind", "--channel", a, b, "64"], "size of a channel is fixed"),
        (["zero-copy-bind", a, b, "64x"], "invalid memory size"),
        (["zero-copy-unbind", "4000000000"], "no zero-copy session 4000000000"),
    ):
        with pytest.raises(CommandFailed) as failed:
            pair.lab.host("xl", *arguments)
        assert reason in failed.value.output
    assert sessions(pair) == before


def send_signal(pair, slot: str, name: str, pattern: str) -> None:
    pair.lab.guest_dom0(slot, f"pkill -{name} -f '{pattern}'")


def recover(pair, slot: str, domain: str) -> str:
    """Run xl migrate-recover in a slot's guest dom0 and return what it says; raises CalledProcessError."""
    said = pair.lab.guest_dom0(slot, f"xl migrate-recover {domain} 2>&1", timeout=300)
    print(said)
    return said


@pytest.mark.parametrize("committed", [False, True], ids=["called off", "committed"])
def test_what_killed_programs_have_left_is_recovered(pair, committed):
    """Both xl are killed, before or after the hand-over: the session knows whose the guest is."""
    before = pair.lab.status(GUEST)
    way, session = bind(pair, "a", "b", "--channel"), bind(pair, "a", "b")
    command = f"xl migrate --zero-copy={session} -s '' {GUEST} 'exec vmbeam-channel receive {GUEST} {way}'"
    with pair.held(ACKNOWLEDGED, migrate=lambda: pair.lab.guest_dom0("a", command, timeout=900)) as migration:
        if committed:
            # The receiver does not get to start the guest.
            send_signal(pair, "b", "STOP", RECEIVER)
            send_signal(pair, "a", "CONT", SENDER)
            wait.until(
                lambda: sessions(pair)[session][3] == "committed",
                timeout=120,
                failure=lambda: AssertionError(f"session {session} is not committed: {sessions(pair)}"),
            )
        send_signal(pair, "b", "KILL", RECEIVER)
        send_signal(pair, "a", "KILL", SENDER)
    assert isinstance(migration.exception(), subprocess.CalledProcessError)
    assert pair.running_in() == []
    [left] = [name for name in pair.lab.guests_in("a") if name.startswith(GUEST)]
    if committed:
        with pytest.raises(subprocess.CalledProcessError) as early:
            recover(pair, "a", left)
        assert "hasn't started domain" in early.value.stdout
        with pytest.raises(CommandFailed) as needed:
            unbind(pair, session)
        assert "migrate-recover" in needed.value.output
        assert "has been started" in recover(pair, "b", f"{GUEST}--incoming")
        assert "has started domain" in recover(pair, "a", left)
        assert session not in sessions(pair)
    else:
        assert "has been called off" in recover(pair, "b", f"{GUEST}--incoming")
        assert "has been called off" in recover(pair, "a", left)
    assert pair.running_in() == ["b" if committed else "a"]
    assert not guests.lost(before, pair.lab.status(GUEST))
    # An aborted session may be left.
    unbind(pair, *{way, session} & set(sessions(pair)))
    assert not {way, session} & set(sessions(pair))
