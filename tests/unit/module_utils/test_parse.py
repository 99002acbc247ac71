# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What xl and QEMU print, read back."""

from __future__ import annotations

import json

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _parse
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import UnexpectedOutput

HEADER = (
    "Name                                        ID   Mem VCPUs\tState\tTime(s)"
    "   UUID                            Reason-Code\tSecurity Label\n"
)
TABLE = HEADER + (
    "Domain-0                                     0  1024     1     r-----     141.9"
    " 00000000-0000-0000-0000-000000000000        -                -\n"
    "m1-a                                         3  4096     1     -b----    1293.4"
    " 3f4c1c9e-0a52-4a3b-8a3c-0d1a55b50c1e        -                -\n"
    "(null)                                       5     0     1     ---s-d       2.0"
    " 5d9a3a50-5be8-4a16-93a5-f8d7b2bb6f01        0                -\n"
    "web1--incoming                               6   256     1     --p---       0.0"
    " 6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a11        -                -\n"
    "a-name-that-is-longer-than-the-forty-columns-of-the-table    17 16384    12     ------ 1000000.1"
    " 6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a12        -  system_u:system_r:domU_t\n"
    "web2--migratedaway                           8   255     1     ---ss-      41.0"
    " 6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a13        2                -\n"
)


def row(flags: str, time: str = "1.0") -> _parse.Domain:
    line = f"web                                          9   256     1     {flags}  {time:>8}"
    return _parse.domain_table(f"{HEADER}{line} 6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a11        -                -\n")[0]


def test_table():
    domains = {domain.domid: domain for domain in _parse.domain_table(TABLE)}
    assert [domain.name for domain in domains.values()] == [
        "Domain-0",
        "m1-a",
        "(null)",
        "web1--incoming",
        "a-name-that-is-longer-than-the-forty-columns-of-the-table",
        "web2--migratedaway",
    ]
    assert domains[3] == _parse.Domain(
        "m1-a", 3, "3f4c1c9e-0a52-4a3b-8a3c-0d1a55b50c1e", "-b----", memory_mb=4096, vcpus=1, cpu_time=1293.4
    )
    assert (domains[17].memory_mb, domains[17].vcpus, domains[17].cpu_time) == (16384, 12, 1000000.1)
    assert {domid: domain.state for domid, domain in domains.items()} == {
        0: "running",
        3: "blocked",
        5: "dying",
        6: "paused",
        17: "running",
        8: "suspended",
    }


@pytest.mark.parametrize(
    ("flags", "state", "live"),
    [
        ("r-----", "running", True),
        ("------", "running", True),
        ("-b----", "blocked", True),
        ("-bp---", "paused", False),
        ("rb----", "blocked", True),
        ("---s--", "shutdown", False),
        ("---sr-", "shutdown", False),
        ("---ss-", "suspended", False),
        ("--pss-", "suspended", False),
        ("---sc-", "crashed", False),
        ("---sw-", "crashed", False),
        ("---s?-", "shutdown", False),
        ("-----d", "dying", False),
        ("--psrd", "dying", False),
    ],
)
def test_states(flags, state, live):
    domain = row(flags)
    assert (domain.state, domain.live) == (state, live)


def test_never_ran_needs_both_signs():
    assert row("--p---", "0.0").never_ran
    assert not row("--p---", "0.1").never_ran
    assert not row("-b----", "0.0").never_ran


def test_empty_table():
    assert _parse.domain_table(HEADER) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "libxl_list_domain failed.\n",
        HEADER + "web1 what is this\n",
        HEADER + "web1   6   256     1     -x----       0.0 6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a11  - -\n",
        # Without -v, so without UUIDs.
        "Name ID Mem VCPUs\tState\tTime(s)\nweb1   6   256     1     -b----       0.0\n",
    ],
)
def test_garbled_table(text):
    with pytest.raises(UnexpectedOutput) as caught:
        _parse.domain_table(text)
    assert caught.value.message.startswith("xl list printed")
    assert caught.value.details["output"] == text


def test_configs():
    text = json.dumps([{"domid": 0, "config": {}}, {"domid": 7, "config": {"c_info": {"type": "pvh"}}}])
    assert _parse.domain_configs(text)[7] == {"c_info": {"type": "pvh"}}


@pytest.mark.parametrize(
    "text", ["", "[", "null", '{"domid": 1}', '[{"config": {}}]', '[{"domid": null, "config": {}}]']
)
def test_garbled_configs(text):
    with pytest.raises(UnexpectedOutput):
        _parse.domain_configs(text)


INFO = """\
host                   : m1
release                : 6.1.0-28-amd64
version                : #1 SMP PREEMPT_DYNAMIC Debian 6.1.119-1 (2024-11-22)
machine                : x86_64
nr_cpus                : 3
virt_caps              : pv hvm hap shadow gnttab-v1
total_memory           : 16383
free_memory            : 9120
outstanding_claims     : 0
xen_major              : 4
xen_minor              : 17
xen_extra              : .5
xen_version            : 4.17.5
xen_caps               : xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_64
xen_changeset          :
xen_commandline        : placeholder dom0_mem=1G,max:1G com1=115200,8n1 loglvl=all
cc_compile_date        : Sat Mar  1 10:00:00 UTC 2025
"""


def test_hypervisor():
    assert _parse.hypervisor(INFO).as_dict() == {
        "version": "4.17.5",
        "extra": ".5",
        "nr_cpus": 3,
        "total_memory_mb": 16383,
        "free_memory_mb": 9120,
    }


@pytest.mark.parametrize("field", ["xen_version", "xen_extra", "nr_cpus", "total_memory", "free_memory"])
def test_missing_field_of_info_is_named(field):
    text = "".join(line for line in INFO.splitlines(keepends=True) if not line.startswith(field))
    with pytest.raises(UnexpectedOutput, match=field):
        _parse.hypervisor(text)


def test_info_with_words_for_numbers():
    with pytest.raises(UnexpectedOutput, match="no number"):
        _parse.hypervisor(INFO.replace("9120", "plenty"))


BLOCKS = """\
ide0-hd0 (#block154): /var/lib/vmbeam/host-vms/m1-a/root.qcow2 (qcow2)\r
    Attached to:      /machine/unattached/device[23]\r
    Cache mode:       writeback\r
    Backing file:     /var/lib/vmbeam/images/guest-hypervisor.raw (chain depth: 1)\r
\r
ide2-cd0: [not inserted]\r
    Attached to:      /machine/unattached/device[25]\r
    Removable device: not locked, tray closed\r
\r
vmbeam-web1-root (#block901): /dev/vg0/web1-root (raw)\r
    Attached to:      vmbeam-web1-root\r
    Cache mode:       writeback, direct\r
\r
vmbeam-web1-data (#block955): /srv/web1 (old).raw (raw, read-only)\r
    Removable device: not locked, tray closed\r
    Cache mode:       writeback, direct\r
"""


def test_drives():
    assert _parse.drives(BLOCKS) == [
        _parse.Drive("ide0-hd0", "/var/lib/vmbeam/host-vms/m1-a/root.qcow2", attached=True),
        _parse.Drive("ide2-cd0", "", attached=True),
        _parse.Drive("vmbeam-web1-root", "/dev/vg0/web1-root", attached=True),
        _parse.Drive("vmbeam-web1-data", "/srv/web1 (old).raw", attached=False),
    ]


def test_no_drives():
    assert _parse.drives("") == []
