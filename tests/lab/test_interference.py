"""What happens around a guest while it moves by zero-copy: it is alive exactly once, whatever it is.

The numbers are those of the cases that xen-patches/README.md lists.
"""

from __future__ import annotations

import concurrent.futures
import errno
import shlex

import pytest
from vmbeam_lab import guests, wait
from vmbeam_lab.errors import LabError, ModuleFailed

pytestmark = pytest.mark.long

GUEST = "web1"
OTHER = "app1"  #: HVM with two CPUs on the one of its host VM
#: What the receiver says before it creates the guest, let alone accepts memory.
RECEIVING = "Ready to receive"
#: What the sender says when all memory is shared and the guest stands still; long before it hands over.
SUSPENDED = "guest has suspended"
#: The receiver has all of the guest, and waits; the guest is not its own yet.
ACKNOWLEDGED = "Target has acknowledged transfer"
#: The guest is the destination's now, which does not know it yet.
HANDED_OVER = "Giving target permission to start"
#: Pages per second that a guest's writer is told to rewrite, and has to at least.
HIGHEST_RATE, LEAST_RATE = 10000, 2500
#: MiB of a guest, and what it rewrites: the others are as many as a guest of 128 MiB has that rewrites 8.
LARGE, LARGE_WRITER = 320, 192
#: Pages that a guest hypervisor may keep of its first migration: a MiB, the unit in which xl tells what is free.
BOOKKEEPING = 256
#: MiB that a guest has, and could have: the rest is populated on demand.
POPULATED, MAXIMUM = 112, 160
#: A frame of a guest of up to 3 GiB that nothing is at.
UNUSED_GFN = 0xD0000

#: Prints 0, or the error, of what a dom0 wants of a domain: XEN_DOMCTL_unpausedomain, XEN_DOMCTL_resumedomain,
#: XENMEM_populate_physmap.
ASK = {
    "unpause": "rc = xenctrl.xc_domain_unpause(handle, domid)",
    "resume": "rc = ctypes.CDLL('libxenguest.so.' + name, use_errno=True).xc_domain_resume(handle, domid, 1)",
    "populate": (
        f"gfn = ctypes.c_ulong({UNUSED_GFN})\n"
        "rc = xenctrl.xc_domain_populate_physmap_exact(handle, domid, ctypes.c_ulong(1), 0, 0, ctypes.byref(gfn))"
    ),
}


def asked(pair, slot: str, what: str, name: str) -> int:
    """Have the guest hypervisor of a slot do something to a domain past its toolstack; return 0 or the error."""
    # xl may just have renamed it.
    domid = int(pair.lab.guest_dom0(slot, f"xl domid {name} || xl domid {name}--migratedaway"))
    program = f"domid = ctypes.c_uint32({domid})\n{ASK[what]}\nprint(-rc and ctypes.get_errno())"
    return int(pair.xenctrl(slot, program))


@pytest.fixture
def fresh(pair):
    """The pair in its saved state: slot a runs every guest."""
    pair.restore()
    return pair


def outcome(migration: concurrent.futures.Future) -> str:
    """Return what became of a migration: "moved", or its error."""
    error = migration.exception(timeout=900)
    if error is None:
        return "moved"
    assert isinstance(error, LabError), error
    print(error)
    return str(error)


def log_of(migration: concurrent.futures.Future) -> str:
    """Return what both sides' xl said in a migration that failed."""
    error = migration.exception()
    assert isinstance(error, ModuleFailed), error
    log = "\n".join(error.result["migration"]["log_tail"])
    print(log)
    return log


def assert_free(pair, slot: str, before: int) -> None:
    """Nothing of a guest is left in a slot, which had so many pages free before."""
    kept = before - pair.free_pages(slot)
    print(f"{slot} has kept {kept} pages")
    assert abs(kept) <= BOOKKEEPING


def await_none(pair, slot: str, timeout: float = 60) -> None:
    """Wait until no guest is in a slot any more: a receiver that lost its sender takes its time to tidy up."""
    wait.until(
        lambda: pair.lab.guests_in(slot) == set(),
        timeout=timeout,
        failure=lambda: AssertionError(f"left in {slot}: {pair.lab.guests_in(slot)}"),
    )


def assert_goes_on(pair, before: dict) -> None:
    """The guest has stayed at the source, as it was, and moves when it is asked again."""
    assert pair.running_in() == ["a"]
    assert not guests.lost(before, pair.lab.status(GUEST))
    pair.move("a", "b")
    assert pair.running_in() == ["b"]
    assert not guests.lost(before, pair.lab.status(GUEST))


def give_back(pair, mib: int) -> None:
    """Have the guest in slot a give that much of its memory back, and wait until most of it is free."""
    free, size = pair.free_mib("a"), pair.lab.machine.guests[GUEST].memory_mb
    pair.lab.guest_dom0("a", f"xl mem-set {GUEST} {size - mib}m")
    wait.until(
        lambda: pair.free_mib("a") >= free + 3 * mib // 4,
        timeout=120,
        failure=lambda: AssertionError("what the guest has given back is not free"),
    )


def start_anew(pair, guest: str, *edits: str) -> None:
    """Start a guest again in slot a, with a configuration that sed has edited."""
    script = " ".join(f"-e {shlex.quote(edit)}" for edit in edits)
    anew = f"sed {script} /etc/xen/guests/{guest}.cfg > /run/{guest}.cfg"
    pair.lab.guest_dom0("a", f"xl destroy {guest} && {anew} && xl create /run/{guest}.cfg", timeout=300)
    guests.await_start(pair.lab.machine.guests[guest].http_port, 900, "disk")


@pytest.mark.parametrize("guest", [OTHER, GUEST])
def test_memory_that_is_rewritten_all_the_time_stays_whole(pair, guest):
    """1: with two CPUs on the one of its host VM; if it is PVH, three fifths of all that it has.

    How much an HVM guest rewrites is written in its boot disk: it remains 8 MiB.
    """
    if guest == GUEST:
        sizes = (f"s/^memory = .*/memory = {LARGE}/", f"s/vmbeam.mem=[0-9]*/vmbeam.mem={LARGE_WRITER}/")
        start_anew(pair, guest, "s/^vcpus = .*/vcpus = 2/", *sizes)
    port = pair.lab.machine.guests[guest].http_port
    guests.set_rate(port, HIGHEST_RATE, timeout=120)
    before = pair.lab.status(guest)
    assert guest == OTHER or before["memory"]["mib"] == LARGE_WRITER
    after = guests.await_rounds(port, before, timeout=600)
    pages, seconds = (after["memory"][key] - before["memory"][key] for key in ("verified", "updated"))
    print(f"{guest}: {pages / seconds:.0f} pages/s")
    assert pages / seconds > LEAST_RATE
    for source, destination in (("a", "b"), ("b", "a")):
        pair.move(source, destination, guest)
        assert pair.running_in(guest) == [destination]
    guests.await_rounds(port, pair.lab.status(guest), timeout=600)
    assert not guests.lost(before, pair.lab.status(guest))


@pytest.mark.parametrize("cpus", [4, 1])
def test_guests_with_many_cpus_or_one_move_at_the_same_time(fresh, cpus):
    """PVH and HVM, with more CPUs than their host VM, or as many; to and fro."""
    kinds = fresh.lab.machine.guests
    for guest, kind in kinds.items():
        if kind.vcpus != cpus:
            start_anew(fresh, guest, f"s/^vcpus = .*/vcpus = {cpus}/")
    before = fresh.lab.all_status()
    for source, destination in (("a", "b"), ("b", "a")):
        sessions = fresh.sessions(source, destination, count=len(kinds))
        with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
            moves = [
                pool.submit(fresh.move, source, destination, guest, session)
                for guest, session in zip(kinds, sessions, strict=True)
            ]
        assert [outcome(move) for move in moves] == ["moved"] * len(kinds)
        for guest in kinds:
            assert fresh.running_in(guest) == [destination]
            # Name, id, memory, CPUs that are on.
            assert fresh.lab.guest_dom0(destination, f"xl list {guest}").splitlines()[1].split()[3] == str(cpus)
    for guest, status in fresh.lab.all_status().items():
        assert not guests.lost(before[guest], status)


def test_guests_pass_each_other(fresh):
    """13: two migrations at once, in opposite directions."""
    fresh.move("a", "b", OTHER)
    before = fresh.lab.all_status()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        moves = [pool.submit(fresh.move, "a", "b", GUEST), pool.submit(fresh.move, "b", "a", OTHER)]
    assert [outcome(move) for move in moves] == ["moved", "moved"]
    assert (fresh.running_in(GUEST), fresh.running_in(OTHER)) == (["b"], ["a"])
    for guest, status in fresh.lab.all_status().items():
        assert not guests.lost(before[guest], status)


def test_a_guest_that_gives_memory_back_meanwhile_loses_none(fresh):
    """8: its balloon works while its memory is shared."""
    before = fresh.lab.status(GUEST)
    size = fresh.lab.machine.guests[GUEST].memory_mb
    for source, destination, target in (("a", "b", size - 40), ("b", "a", size)):
        fresh.lab.guest_dom0(source, f"xl mem-set {GUEST} {target}m")
        fresh.move(source, destination)
        assert fresh.running_in() == [destination]
    assert not guests.lost(before, fresh.lab.status(GUEST))


def test_a_guest_that_is_destroyed_half_way_is_gone_everywhere(fresh):
    """2: xl destroy at the source, while the destination has the guest's memory too, ends the migration first."""
    free = fresh.free_pages("b")
    other = fresh.lab.status(OTHER)
    with fresh.held(SUSPENDED) as migration:
        fresh.lab.guest_dom0("a", f"timeout 60 xl destroy {GUEST}", timeout=90)
    assert "moved" not in outcome(migration)
    assert fresh.lab.guests_in("a") == {OTHER}
    assert fresh.lab.guests_in("b") == set()
    assert_free(fresh, "b", free)
    assert not guests.lost(other, fresh.lab.status(OTHER))


def test_a_guest_whose_old_copy_is_destroyed_after_the_hand_over_goes_on(fresh):
    """2: xl destroy at the source hits what is left there, not the guest, which is the destination's by then."""
    before = fresh.lab.all_status()
    with fresh.held(HANDED_OVER) as migration:
        fresh.lab.guest_dom0("a", f"timeout 60 xl destroy {GUEST}--migratedaway", timeout=90)
    assert outcome(migration) == "moved"
    assert fresh.running_in() == ["b"]
    assert fresh.lab.guests_in("a") == {OTHER}
    for guest, status in fresh.lab.all_status().items():
        assert not guests.lost(before[guest], status)
    fresh.move("b", "a")
    assert fresh.running_in() == ["a"]


def test_a_session_that_is_removed_half_way_leaves_the_guest_as_it_was(fresh):
    """16: host dom0 ends it while the sender waits for the receiver: the guest runs on, and none of it stays pinned."""
    before = fresh.lab.status(GUEST)
    with fresh.held(RECEIVING, slot="b", verb="migrate-receive") as migration:
        wait.until(
            # All of a channel is on offer as long as it is there.
            lambda: any(
                session["offered"] and not session["channel"]
                for session in fresh.lab.module("vmbeam.xen.zero_copy_info")["sessions"]
            ),
            timeout=120,
            failure=lambda: AssertionError("the guest's memory is not offered"),
        )
        pair = {"source": fresh.name("a"), "destination": fresh.name("b")}
        fresh.lab.module("vmbeam.xen.zero_copy_session", **pair, state="absent")
    assert "moved" not in outcome(migration)
    assert fresh.running_in() == ["a"]
    assert not guests.lost(before, fresh.lab.status(GUEST))
    give_back(fresh, 40)
    fresh.move("a", "b")
    assert fresh.running_in() == ["b"]
    assert not guests.lost(before, fresh.lab.status(GUEST))


def test_a_guest_cannot_run_where_it_is_not(fresh):
    """6: whoever unpauses or resumes a copy of it past the toolstack, before and after the hand-over."""
    before = fresh.lab.status(GUEST)
    with fresh.held(ACKNOWLEDGED) as migration:
        assert asked(fresh, "b", "unpause", f"{GUEST}--incoming") == errno.EBUSY
    assert outcome(migration) == "moved"
    assert fresh.running_in() == ["b"]
    fresh.move("b", "a")
    with fresh.held(HANDED_OVER) as migration:
        assert asked(fresh, "a", "unpause", f"{GUEST}--migratedaway") == errno.EBUSY
        assert asked(fresh, "a", "resume", f"{GUEST}--migratedaway") == errno.EBUSY
    assert outcome(migration) == "moved"
    assert fresh.running_in() == ["b"]
    assert not guests.lost(before, fresh.lab.status(GUEST))


def test_a_guest_that_is_resumed_at_the_source_is_not_handed_over(fresh):
    """6: its state has arrived at the destination, but would not fit its memory any more."""
    before = fresh.lab.status(GUEST)
    with fresh.held(ACKNOWLEDGED) as migration:
        assert asked(fresh, "a", "resume", GUEST) == 0
    assert "moved" not in outcome(migration)
    await_none(fresh, "b")
    assert_goes_on(fresh, before)


def test_a_guest_gets_no_memory_while_its_own_is_shared(fresh):
    """8: it could be at a place that the sender has been to already."""
    before = fresh.lab.status(GUEST)
    give_back(fresh, 8)
    with fresh.held(ACKNOWLEDGED) as migration:
        assert asked(fresh, "a", "populate", GUEST) == errno.EBUSY
    assert outcome(migration) == "moved"
    # It was not for a lack of memory, nor for the place.
    assert asked(fresh, "b", "populate", GUEST) == 0
    assert not guests.lost(before, fresh.lab.status(GUEST))


def test_a_guest_that_is_populated_on_demand_stays(fresh):
    """What it has not touched yet is nobody's memory, which cannot be handed over: refused before it is suspended."""
    start_anew(fresh, GUEST, f"s/^memory = .*/memory = {POPULATED}\\nmaxmem = {MAXIMUM}/")
    before = fresh.lab.status(GUEST)
    with pytest.raises(ModuleFailed) as refusal:
        fresh.move("a", "b")
    print(refusal.value)
    assert refusal.value.result["location"] == "source"
    assert fresh.running_in() == ["a"]
    await_none(fresh, "b")
    assert not guests.lost(before, fresh.lab.status(GUEST))


@pytest.mark.parametrize("slot", ["a", "b"])
def test_a_killed_channel_leaves_the_guest_at_the_source(fresh, slot):
    """15: the daemon of either side is killed before the hand-over; the next migration uses a new one."""
    before = fresh.lab.status(GUEST)
    with fresh.held(SUSPENDED) as migration:
        fresh.lab.guest_dom0(slot, "systemctl kill --signal=KILL vmbeam-channel")
    assert f"{GUEST} failed" in outcome(migration)
    assert_goes_on(fresh, before)


def test_the_destination_dies_before_the_hand_over(fresh):
    """5: the guest goes on at the source."""
    before = fresh.lab.status(GUEST)
    with fresh.held(SUSPENDED) as migration:
        fresh.lab.host("xl", "destroy", fresh.name("b"))
    assert "moved" not in outcome(migration)
    assert fresh.running_in(slots=["a"]) == ["a"]
    assert not guests.lost(before, fresh.lab.status(GUEST))


def test_the_destination_dies_after_the_hand_over(fresh):
    """5: the guest dies with it: the source does not run it again, nobody says where it is, the other one lives."""
    other = fresh.lab.status(OTHER)
    free, size = fresh.free_mib("a"), fresh.lab.machine.guests[GUEST].memory_mb
    with fresh.held(HANDED_OVER) as migration:
        fresh.lab.host("xl", "destroy", fresh.name("b"))
    assert "moved" not in outcome(migration)
    assert migration.exception().result["location"] == "unknown"
    assert fresh.running_in(slots=["a"]) == []
    # What is left of it can be destroyed, if xl has not done so, and its memory is the host VM's again.
    for name in fresh.lab.guests_in("a"):
        if name.startswith(GUEST):
            fresh.lab.guest_dom0("a", f"timeout 60 xl destroy {name}", timeout=90)
    wait.until(
        lambda: fresh.lab.guests_in("a") == {OTHER} and fresh.free_mib("a") >= free + size - 1,
        timeout=60,
        failure=lambda: AssertionError(f"{fresh.free_mib('a')} MiB free, {free} before; {fresh.lab.guests_in('a')}"),
    )
    assert not guests.lost(other, fresh.lab.status(OTHER))


def test_the_source_dies_after_the_hand_over(fresh):
    """5: the destination starts the guest, which it has got already, by itself."""
    before = fresh.lab.status(GUEST)
    with fresh.held(HANDED_OVER) as migration:
        fresh.lab.host("xl", "destroy", fresh.name("a"))
        wait.until(
            lambda: fresh.running_in(slots=["b"]) == ["b"],
            timeout=300,
            failure=lambda: AssertionError("the destination does not start the guest"),
            interval=2,
        )
    assert "moved" not in outcome(migration)
    assert not guests.lost(before, fresh.lab.status(GUEST))


def test_the_source_dies_before_the_hand_over(fresh):
    """5: the guest is lost with it; the destination must not run half of it, and gets its own memory back."""
    free = fresh.free_pages("b")
    with fresh.held(SUSPENDED) as migration:
        fresh.lab.host("xl", "destroy", fresh.name("a"))
        await_none(fresh, "b", timeout=300)
    assert "moved" not in outcome(migration)
    assert_free(fresh, "b", free)


def test_a_receiver_that_cannot_start_the_guest_gives_it_back(fresh):
    """6: its device model dies before the hand-over, so REVERT follows COMMIT, and the source has its guest again."""
    # The first time, each side gets what it keeps.
    for source, destination in (("a", "b"), ("b", "a")):
        fresh.move(source, destination, OTHER)
    accounts = fresh.settled_accounts()
    before = fresh.lab.status(OTHER)
    with fresh.held(ACKNOWLEDGED, OTHER) as migration:
        model = f"/local/domain/$(xl domid {OTHER}--incoming)/image/device-model-pid"
        fresh.lab.guest_dom0("b", f"kill -KILL $(xenstore-read {model})")
    assert f"{OTHER} failed" in outcome(migration)
    log = log_of(migration)
    # The receiver says so only when the session is committed; and then, when it has given the guest back.
    assert "Got permission, starting domain" in log
    assert "Cleanup OK, granting sender permission to resume" in log
    assert "Resumed OK" in log
    assert fresh.running_in(OTHER) == ["a"]
    assert fresh.lab.guests_in("b") == set()
    assert not guests.lost(before, fresh.lab.status(OTHER))
    fresh.await_accounts(accounts)
    fresh.move("a", "b", OTHER)
    assert fresh.running_in(OTHER) == ["b"]
    assert not guests.lost(before, fresh.lab.status(OTHER))


def test_a_commit_that_is_refused_leaves_the_guest_at_the_source(fresh):
    """6: the destination destroys what it has received, which ends the session, just before the sender commits."""
    free = fresh.free_pages("b")
    before = fresh.lab.status(GUEST)
    with fresh.held(ACKNOWLEDGED) as migration:
        fresh.lab.guest_dom0("b", f"timeout 60 xl destroy {GUEST}--incoming", timeout=90)
    assert f"{GUEST} failed" in outcome(migration)
    assert "Unable to commit zero-copy session" in log_of(migration)
    assert fresh.lab.guests_in("b") == set()
    assert_free(fresh, "b", free)
    assert_goes_on(fresh, before)
