"""Aging on real nested Xen: a leak is noticed, makes the machine due, and is gone in the fresh host VM."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from vmbeam_lab import ansible, guests, inventory, paths

pytestmark = pytest.mark.long

PLAYBOOKS = paths.REPOSITORY / "playbooks"
INTERVAL = 20  #: seconds from one sample to the next
SAMPLES = 14  #: with a leak, before it is judged
HISTORY = "/var/lib/vmbeam/aging/samples.jsonl"
METRICS = "/var/lib/prometheus/node-exporter/vmbeam_aging.prom"

#: 15 MiB a minute: a guest dom0 of the lab lasts for half an hour or more.
MEMORY_LEAK = "import time\nkept = []\nwhile True:\n    kept.append(b'x' * 2**20)\n    time.sleep(4)\n"
#: Twenty nodes each three seconds or so. Nobody sets a quota for dom0's.
XENSTORE_LEAK = (
    "i=0; while sleep 2; do i=$((i+1)); xenstore-write $(seq -f /local/domain/0/leak/$i-%g 20 | sed 's/$/ x/'); done"
)
NODES = 200  #: more than at first, at which the machine is due

#: Read by xl, xenstored's socket, /proc and the file system in a service that may do little else.
ALWAYS_READ = {
    "hypervisor_free_memory",
    "hypervisor_own_memory",
    "highest_domid",
    "dom0_available_memory",
    "dom0_open_files",
    "disk_free_root",
    "xenstore_nodes",
    "xenstored_memory",
    "xenstored_open_files",
    "toolstack_latency",
}


def aging(lab, slot: str) -> dict[str, float]:
    """Return the indicators of a guest dom0 by name, each of which must have been readable."""
    result = ansible.module(inventory.slot_name(lab.machine, slot), "vmbeam.xen.aging_info", {"points": 0})
    assert result["changed"] is False
    assert result["unavailable"] == {}
    return {indicator["name"]: indicator["value"] for indicator in result["indicators"]}


def await_samples(lab, slot: str, count: int) -> None:
    """Wait until so many more samples are there; tail is told of each by the kernel."""
    follow = f"tail -n 0 -F {HISTORY} | sed {count}q"
    limit = 600 + 3 * INTERVAL * count
    lab.guest_dom0(slot, f"timeout {limit} sh -c {shlex.quote(follow)}", timeout=limit + 60)


def judged_by(policy: dict) -> list[str]:
    """Return the arguments that judge by a policy.

    However long ago the lab's saved state was made, its host VM counts as young, and is not too young to have aged.
    """
    return ["-e", json.dumps({"vmbeam_aging_policy": policy, "vmbeam_max_age": 10**9, "vmbeam_aging_min_age": 0})]


def changed(output: str) -> int:
    return sum(int(count) for count in re.findall(r"\bchanged=(\d+)", output))


def test_a_leak_makes_a_machine_due_and_is_gone_after_rejuvenation(lab):
    name_a, name_b = (inventory.slot_name(lab.machine, slot) for slot in ("a", "b"))
    before, at_first = lab.all_status(), aging(lab, "a")
    policy = {
        "thresholds": {"xenstore_nodes": at_first["xenstore_nodes"] + NODES},
        "exhaustion_within": 7200,
        "min_samples": 10,
        "min_span": 60,
    }
    judged = judged_by(policy)
    plan, rejuvenate = (str(PLAYBOOKS / name) for name in ("plan.yml", "rejuvenate.yml"))

    monitor = ["aging_monitor.yml", "-e", f"aging_monitor_interval={INTERVAL}"]
    assert not lab.playbook(*monitor).failed
    again = lab.playbook(*monitor)
    assert (again.failed, changed(again.output)) == (False, 0)
    await_samples(lab, "a", 1)
    for read in (lab.host, lambda *words: lab.guest_dom0("a", shlex.join(words))):
        assert set(json.loads(read("tail", "-n", "1", HISTORY))["values"]) >= ALWAYS_READ
        assert "\nvmbeam_aging_toolstack_latency_seconds " in read("cat", METRICS)

    # What has just begun to run still fills memory, which is no sign of anything.
    healthy = lab.playbook("aging.yml", plan, *judged_by({**policy, "exhaustion_within": 0}))
    assert not healthy.failed
    assert f"{lab.machine.name}: skip: " in healthy.output

    lab.guest_dom0("a", f"systemd-run --unit=leak-memory python3 -c {shlex.quote(MEMORY_LEAK)}")
    lab.guest_dom0("a", f"systemd-run --unit=leak-xenstore sh -c {shlex.quote(XENSTORE_LEAK)}")
    await_samples(lab, "a", SAMPLES)
    leaked = aging(lab, "a")

    cured = lab.playbook("aging.yml", rejuvenate, *judged)
    assert f"{name_a}: dom0_available_memory will be exhausted in " in cured.output
    assert f"{name_a}: xenstore_nodes is " in cured.output
    assert "is due because of aging: " in cured.output
    assert not cured.failed
    assert lab.domains() == {name_b}
    after = lab.all_status()
    for guest, status in before.items():
        assert not guests.lost(status, after[guest])

    fresh = aging(lab, "b")
    assert fresh["xenstore_nodes"] < policy["thresholds"]["xenstore_nodes"] <= leaked["xenstore_nodes"]
    lost = at_first["dom0_available_memory"] - leaked["dom0_available_memory"]
    assert lost > 0
    assert fresh["dom0_available_memory"] - leaked["dom0_available_memory"] > lost / 2
    assert fresh["uptime"] < leaked["uptime"]

    again = lab.playbook("aging.yml", rejuvenate, *judged)
    assert not again.failed
    assert f"{lab.machine.name}: skip: " in again.output
    assert lab.domains() == {name_b}

    assert not lab.playbook("aging_monitor.yml", "-e", "aging_monitor_state=absent").failed
    assert (
        lab.host("sh", "-c", f"'ls -d /etc/systemd/system/vmbeam-aging* {HISTORY} {METRICS} 2>/dev/null | wc -l'")
        == "0\n"
    )
