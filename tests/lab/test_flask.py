"""A security policy on the host hypervisor: what it allows works, what it forbids is refused, also in the middle.

Only debug hypervisors are compiled with Flask: VMBEAM_XEN_FLAVOUR=debug.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess

import pytest
from vmbeam_lab.errors import ModuleFailed

from tests.lab.hostile.host_vms import (
    DIRECTORY,
    LONGEST,
    PAIR,
    await_lines,
    begin,
    bind,
    destroy,
    install,
    log_of,
    put,
    set_up,
    start,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.environ.get("VMBEAM_XEN_FLAVOUR") != "debug", reason="Flask is in debug hypervisors only"),
]

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
POLICY = REPOSITORY / "build" / "flask-policy"
#: What allows host VMs of the usual type to exchange memory (tools/flask/policy/modules/domU.te).
ALLOWED = re.compile(r"(?m)^\s*allow domU_t domU_t:domain2 zerocopy;$")

#: Boots the host hypervisor with Flask, which lets everything pass until there is a policy.
BOOT_ENTRY = """\
echo 'GRUB_CMDLINE_XEN_DEFAULT="$GRUB_CMDLINE_XEN_DEFAULT xsm=flask flask=late"' > /etc/default/grub.d/zz-flask.cfg
update-grub
sync
"""


def denials(lab) -> list[tuple[str, str, str]]:
    """Return what the policy has forbidden so far: permission, type of who asked, type of whom it was about."""
    found = re.findall(
        r"avc:\s+denied\s+\{ (\w+) \}.*? scontext=\w+:\w+:(\w+) tcontext=\w+:\w+:(\w+) ", lab.host("xl", "dmesg")
    )
    return list(dict.fromkeys(found))


def forget(lab) -> None:
    """Have the host hypervisor's messages begin anew."""
    lab.host("xl", "dmesg", "-c")


def load(lab, policy: pathlib.Path) -> None:
    """Put a policy into force."""
    put(lab, policy, f"{DIRECTORY}/{policy.name}")
    lab.host("xl", "loadpolicy", f"{DIRECTORY}/{policy.name}")


@pytest.fixture(scope="module")
def guarded(machine):
    """The machine under the default policy, with what hostile host VMs boot from."""
    subprocess.run(["make", "--silent", "flask-policy"], cwd=REPOSITORY, check=True, timeout=600)
    machine.host("sh", "-c", shlex.quote(BOOT_ENTRY), timeout=300)
    machine.cut_power()
    install(machine)
    load(machine, POLICY / "xenpolicy")
    assert "Enforcing" in machine.host("xl", "getenforce")
    forget(machine)
    return machine


@pytest.fixture(autouse=True)
def alone(machine):
    """Leave no host VM to the next test, whatever became of this one."""
    yield
    destroy(machine, *machine.domains())


def test_the_default_policy_lets_host_vms_exchange_memory(guarded):
    """And whoever may not control them is refused by the policy, not by chance."""
    set_up(guarded, seed=3, commit=1, policy=1)
    begin(guarded)
    ends = await_lines(guarded, r"HOSTILE DONE .*", *PAIR, timeout=LONGEST)
    print(*(f"{name}: {end[0]}" for name, end in ends.items()), sep="\n")
    for name in PAIR:
        assert "HOSTILE FAIL" not in log_of(guarded, name), log_of(guarded, name)
    assert int(re.search(r"committed=(\d+)", ends["hostile-b"][0])[1]) > 0
    assert {asking for _permission, asking, _about in denials(guarded)} == {"domU_t"}


def test_who_may_not_exchange_memory_is_not_bound(guarded):
    """An isolated host VM, whichever side it is; then one that host dom0 may not touch any more."""
    start(guarded, "hostile-a")
    start(guarded, "hostile-b", label="isolated_domU_t")
    start(guarded, "hostile-c", label="prot_domU_t")
    forget(guarded)
    for source, destination in ("ab", "ba"):
        with pytest.raises(ModuleFailed, match="security policy of the host hypervisor forbids it"):
            bind(guarded, source, destination, memory_mb=4)
    assert denials(guarded) == [
        ("zerocopy", "domU_t", "isolated_domU_t"),
        ("zerocopy", "isolated_domU_t", "domU_t"),
    ]
    guarded.host("flask-set-bool", "prot_doms_locked", "1")
    forget(guarded)
    for source, destination in ("ac", "ca"):
        with pytest.raises(ModuleFailed, match="security policy of the host hypervisor forbids it"):
            bind(guarded, source, destination, memory_mb=4)
    assert denials(guarded) == [("zerocopy_bind", "dom0_t", "prot_domU_t")]


def test_a_policy_that_changes_ends_what_has_begun(guarded):
    """Sessions stay, and nothing more is lent by them."""
    without = POLICY / "xenpolicy-without"
    text, count = ALLOWED.subn("", (POLICY / "policy.conf").read_text())
    assert count
    (POLICY / "without.conf").write_text(text)
    argv = ["checkpolicy", "-t", "Xen", "-c", "30", str(POLICY / "without.conf"), "-o", str(without)]
    subprocess.run(argv, check=True, timeout=120)
    set_up(guarded, seed=4)
    begin(guarded)
    await_lines(guarded, r"HOSTILE CHECKED", *PAIR, timeout=600)
    load(guarded, without)
    forget(guarded)
    ends = await_lines(guarded, r"HOSTILE DONE .*", *PAIR, timeout=LONGEST)
    print(*(f"{name}: {end[0]}" for name, end in ends.items()), sep="\n")
    assert ("zerocopy", "domU_t", "domU_t") in denials(guarded)
    with pytest.raises(ModuleFailed, match="security policy of the host hypervisor forbids it"):
        bind(guarded, "a", "b", memory_mb=4)
    load(guarded, POLICY / "xenpolicy")
    bind(guarded, "a", "b", memory_mb=4)
