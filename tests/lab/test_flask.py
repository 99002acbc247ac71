"""A security policy on the host hypervisor: what it allows works, what it forbids is refused, also in the middle.

Only debug hypervisors are compiled with Flask: VMBEAM_XEN_FLAVOUR=debug.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import typing

import pytest
from vmbeam_lab.errors import ModuleFailed

from tests.lab.hostile.host_vms import (
    DIRECTORY,
    PAIR,
    await_lines,
    begin,
    bind,
    install,
    log_of,
    misuse,
    put,
    set_up,
    start,
)

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.long,
    pytest.mark.skipif(os.environ.get("VMBEAM_XEN_FLAVOUR") != "debug", reason="Flask is in debug hypervisors only"),
]

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
POLICY = REPOSITORY / "build" / "flask-policy"
FORBIDDEN = "security policy of the host hypervisor forbids it"

#: Boots the host hypervisor with Flask and a policy, and with room for what it refuses (hostile.c tries hundreds).
BOOT_ENTRY = """\
set -e
echo 'GRUB_CMDLINE_XEN_DEFAULT="$GRUB_CMDLINE_XEN_DEFAULT xsm=flask flask=enforcing conring_size=4M"' \\
    > /etc/default/grub.d/zz-flask.cfg
update-grub
sed -i 's|^\\s*module2\\s.*\\s\\(/.*\\)initrd\\.img.*|&\\n\\tmodule2 --nounzip \\1flask-policy|' /boot/grub/grub.cfg
grep flask-policy /boot/grub/grub.cfg
sync
"""
#: What lets host VMs of the usual type exchange memory, and host dom0 bind an isolated one (tools/flask/policy).
EXCHANGE = r"(?m)^\s*allow domU_t domU_t:domain2 zerocopy;$"
BIND = r"(?s)(allow dom0_t isolated_domU_t:domain2 \{[^}]*)\bzerocopy_bind\b"


def denials(lab) -> list[tuple[str, str, str]]:
    """Return what the policy has forbidden so far: permissions, type of who asked, type of whom it was about."""
    messages = lab.host("xl", "dmesg", timeout=120)
    assert "FLASK: Denying unknown" not in messages
    found = re.findall(r"avc:\s+denied\s+\{ ([\w ]+) \}.* scontext=\w+:\w+:(\w+) tcontext=\w+:\w+:(\w+) ", messages)
    return list(dict.fromkeys(found))


def forget(lab) -> None:
    """Have the host hypervisor's messages begin anew."""
    lab.host("xl", "dmesg", "-c", timeout=120)


def load(lab, policy: pathlib.Path) -> None:
    """Put a policy into force."""
    put(lab, policy, f"{DIRECTORY}/{policy.name}")
    lab.host("xl", "loadpolicy", f"{DIRECTORY}/{policy.name}")


@contextlib.contextmanager
def without(lab, rule: str) -> typing.Iterator[None]:
    """Have the default policy without a rule in force; a group in the rule stays."""
    text, count = re.subn(rule, lambda match: "".join(match.groups()), (POLICY / "policy.conf").read_text())
    assert count
    source, policy = POLICY / "without.conf", POLICY / "without"
    source.write_text(text)
    subprocess.run(["checkpolicy", "-t", "Xen", "-c", "30", str(source), "-o", str(policy)], check=True, timeout=120)
    load(lab, policy)
    try:
        yield
    finally:
        load(lab, POLICY / "xenpolicy")


@pytest.fixture(scope="module")
def guarded(machine):
    """The machine under the default policy, with what hostile host VMs boot from."""
    subprocess.run(["make", "--silent", "flask-policy"], cwd=REPOSITORY, check=True, timeout=600)
    # Not xen*: what is called so has a boot entry as a hypervisor.
    put(machine, POLICY / "xenpolicy", "/boot/flask-policy")
    print(machine.host("sh", "-c", shlex.quote(BOOT_ENTRY), timeout=300))
    machine.cut_power()
    # Whose exit status is the mode.
    assert "Enforcing" in machine.host("xl getenforce || true")
    install(machine)
    return machine


def test_the_default_policy_lets_host_vms_exchange_memory(guarded):
    """And who may not control them is refused by the policy, not by chance; host dom0 is refused nothing."""
    set_up(guarded, seed=3, commit=1, policy=1)
    misuse(guarded)
    assert {asking for _permissions, asking, _about in denials(guarded)} == {"domU_t"}


def test_who_may_not_exchange_memory_is_not_bound(guarded):
    """An isolated host VM, whichever side it is; and one that host dom0 may not bind at all."""
    start(guarded, "hostile-a")
    start(guarded, "hostile-b", label="isolated_domU_t")
    forget(guarded)
    for source, destination in ("ab", "ba"):
        with pytest.raises(ModuleFailed, match=FORBIDDEN):
            bind(guarded, source, destination, memory_mb=4)
    assert denials(guarded) == [
        ("zerocopy", "domU_t", "isolated_domU_t"),
        ("zerocopy", "isolated_domU_t", "domU_t"),
    ]
    with without(guarded, BIND):
        for source, destination in ("ab", "ba"):
            forget(guarded)
            with pytest.raises(ModuleFailed, match=FORBIDDEN):
                bind(guarded, source, destination, memory_mb=4)
            assert denials(guarded) == [("zerocopy_bind", "dom0_t", "isolated_domU_t")]


def test_a_policy_that_changes_ends_what_has_begun(guarded):
    """What is lent stays lent until one of the two aborts; nothing is added to it, and it cannot be handed over."""
    set_up(guarded, revoked=1, policy=1)
    begin(guarded)
    await_lines(guarded, r"HOSTILE RESTS", *PAIR, timeout=300)
    forget(guarded)
    with without(guarded, EXCHANGE):
        await_lines(guarded, r"HOSTILE REFUSED", *PAIR, timeout=300)
        ends = await_lines(guarded, r"HOSTILE DONE checks=\d+ failures=(\d+)", *PAIR, timeout=300)
        for name, end in ends.items():
            print(f"{name}: {end[0]}")
            assert end[1] == "0", log_of(guarded, name)
        assert denials(guarded) == [("zerocopy", "domU_t", "domU_t")]
        with pytest.raises(ModuleFailed, match=FORBIDDEN):
            bind(guarded, "b", "d", memory_mb=4)
    bind(guarded, "b", "d", memory_mb=4)
