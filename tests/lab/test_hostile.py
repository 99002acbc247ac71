"""Host VMs that misuse the zero-copy interface (hostile/): all is refused, nothing leaks, the host goes on."""

from __future__ import annotations

import errno
import re

import pytest
from vmbeam_lab import wait
from vmbeam_lab.errors import CommandFailed, ModuleFailed

from tests.lab.hostile.host_vms import (
    OTHERS,
    PAIR,
    SECONDS,
    await_lines,
    begin,
    bind,
    destroy,
    install,
    log_of,
    misuse,
    set_up,
    start,
)

pytestmark = pytest.mark.usefixtures("alone")

#: Shuts a domain down as if it had crashed: it stays, so that it is dead, but not gone.
SHUT_DOWN = """\
if xenctrl.xc_domain_shutdown(handle, ctypes.c_uint32({domid}), 3):
    sys.exit(f"errno={{ctypes.get_errno()}}")
"""

#: States of a session in which it can rest (XEN_ZEROCOPY_STATE_*).
OPEN, COMMITTING, COMMITTED = 1, 2, 3

#: Asks to commit a session on behalf of its source, and ends successfully if that is refused as too early.
FORCE_COMMIT = """\
rc = xenctrl.xc_zerocopy_force_commit(handle, ctypes.c_uint32({session}), ctypes.c_uint32(0))
sys.exit(0 if rc == -1 and ctypes.get_errno() == {eilseq} else f"rc={{rc}}, errno={{ctypes.get_errno()}}")
"""


@pytest.fixture(scope="module")
def hostile(machine):
    """The machine, with what hostile host VMs boot from."""
    install(machine)
    return machine


def assert_no_forced_commit(lab, source: str, destination: str) -> None:
    """Host dom0 cannot hand a guest over before its source has begun to."""
    pair = {"source": f"hostile-{source}", "destination": f"hostile-{destination}"}
    [session, *_rest] = lab.module("vmbeam.xen.zero_copy_session", **pair, memory_mb=3)["sessions"]
    lab.xenctrl(FORCE_COMMIT.format(session=session["session"], eilseq=errno.EILSEQ))


def assert_untouched(lab, free_before: int) -> None:
    """Nothing is left of the host VMs, neither domains nor memory."""
    wait.until(
        lambda: not lab.domains() and lab.free_pages() >= free_before - lab.pools,
        timeout=60,
        failure=lambda: AssertionError(
            f"{free_before} pages were free before, now {lab.free_pages()}; domains: {lab.domains()}"
        ),
    )


def test_misuse_is_refused_and_leaks_nothing(hostile):
    free = hostile.free_pages()
    set_up(hostile, seed=1, commit=1, cpus=2)
    assert_no_forced_commit(hostile, "b", "d")
    misuse(hostile)
    for name in PAIR:
        assert re.search(r"HOSTILE CHILD calls=\d{3}", log_of(hostile, name))
    destroy(hostile, *PAIR, *OTHERS)
    assert_untouched(hostile, free)


@pytest.mark.parametrize("first", ["hostile-a", "hostile-b"])
def test_a_host_vm_dies_in_the_middle(hostile, first):
    free = hostile.free_pages()
    set_up(hostile, seed=2, cpus=2)
    begin(hostile)
    await_lines(hostile, r"HOSTILE CHECKED", *PAIR, timeout=600)
    bind(hostile, "a", "b", memory_mb=16, count=20)
    (other,) = set(PAIR) - {first}
    destroy(hostile, first)
    ends = await_lines(hostile, r"HOSTILE DONE .*", other, timeout=SECONDS + 120)
    print(ends[other][0])
    assert "HOSTILE FAIL" not in log_of(hostile, other), log_of(hostile, other)
    destroy(hostile, other, *OTHERS)
    assert_untouched(hostile, free)


@pytest.mark.parametrize("first", PAIR)
@pytest.mark.parametrize(
    "state",
    [
        pytest.param(OPEN, marks=pytest.mark.long, id="OPEN"),
        pytest.param(COMMITTING, id="COMMITTING"),
        pytest.param(COMMITTED, marks=pytest.mark.long, id="COMMITTED"),
    ],
)
def test_a_host_vm_dies_while_a_session_rests(hostile, state, first):
    """5: shut down first, which changes nothing, then destroyed; the other side gets all of the memory, or its own."""
    free = hostile.free_pages()
    (other,) = set(PAIR) - {first}
    set_up(hostile, rest=state)
    begin(hostile)
    await_lines(hostile, r"HOSTILE RESTS", *PAIR, timeout=300)
    domid = hostile.host("xl", "domid", first).strip()
    hostile.xenctrl(SHUT_DOWN.format(domid=domid))
    await_lines(hostile, r"HOSTILE ALONE", other, timeout=120)
    destroy(hostile, first)
    end = await_lines(hostile, r"HOSTILE DONE checks=(\d+) failures=(\d+)", other, timeout=120)[other]
    print(end[0])
    assert int(end[1]) >= 6
    assert end[2] == "0", log_of(hostile, other)
    destroy(hostile, other, *OTHERS)
    assert_untouched(hostile, free)


def test_an_empty_pool_for_page_tables_does_no_harm(hostile):
    """10: two host VMs use up what they have for page tables; what must be split then fails, or is copied."""
    free = hostile.free_pages()
    set_up(hostile, empty=1)
    begin(hostile)
    for name, end in await_lines(hostile, r"HOSTILE DONE checks=(\d+) failures=(\d+)", *PAIR, timeout=600).items():
        assert int(end[1]) > 10
        assert end[2] == "0", log_of(hostile, name)
    # With assertions, the hypervisor says once that there is no more.
    assert all("failed to allocate from HAP pool" in line for line in hostile.complaints.new())
    destroy(hostile, *PAIR, *OTHERS)
    assert_untouched(hostile, free)


def test_a_destination_has_one_source_at_a_time(hostile):
    """A stream names its session, so none may be there that is another source's; one that is gone does not matter."""
    free = hostile.free_pages()
    for name in (*PAIR, "hostile-c"):
        start(hostile, name, role=0)
    bind(hostile, "a", "b", memory_mb=4)
    with pytest.raises(ModuleFailed, match="has a session from another host VM"):
        bind(hostile, "c", "b", memory_mb=4)
    with pytest.raises(CommandFailed) as refusal:
        hostile.host("xl", "zero-copy-bind", "hostile-c", "hostile-b")
    assert "session from another source" in refusal.value.output
    # Neither a channel, nor the other way round, nor another destination.
    bind(hostile, "c", "b", purpose="channel")
    bind(hostile, "b", "a", memory_mb=4)
    bind(hostile, "a", "c", memory_mb=4)
    bind(hostile, "a", "b", state="absent")
    bind(hostile, "c", "b", memory_mb=4)
    with pytest.raises(ModuleFailed, match="has a session from another host VM"):
        bind(hostile, "a", "b", memory_mb=4)
    destroy(hostile, "hostile-c")
    bind(hostile, "a", "b", memory_mb=4)
    destroy(hostile, *PAIR)
    assert_untouched(hostile, free)
