"""Rolling runs over three machines of real nested Xen: one fails, and the controller is killed half-way."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import signal
import types
import typing

import pytest
import yaml
from vmbeam_lab import guests, wait
from vmbeam_lab.errors import ModuleFailed

pytestmark = pytest.mark.long

FIRST, SECOND, THIRD = "m2", "m3", "m4"
RUN = "fleet-test"
#: Three machines share two CPUs: what takes minutes on one takes longer here.
PATIENCE = {"vmbeam_connect_timeout": 1800, "vmbeam_healthy_timeout": 900, "vmbeam_gate_timeout": 600}
RUN_TIMEOUT = 7200  # seconds; for a run over three machines


@pytest.fixture(autouse=True)
def quiet_hypervisors(fleet: dict) -> typing.Iterator[None]:
    """As for one machine: a complaint of a hypervisor that is new fails the test."""
    for lab in fleet.values():
        lab.complaints.new()
    yield
    found = [f"{name}: {line}" for name, lab in fleet.items() for line in lab.complaints.new()]
    assert not found, "\n".join(found)


class Runs:
    """Rolling runs over a fleet, with what its guests said before."""

    def __init__(self, fleet: dict, folder: pathlib.Path) -> None:
        self.fleet = fleet
        self.folder = folder
        self.report_file = folder / "report.json"
        self.before = self.statuses()

    def arguments(self, **variables: typing.Any) -> list[str]:
        common = {"vmbeam_force": True, "vmbeam_run_id": RUN, "vmbeam_run_report_file": str(self.report_file)}
        return ["rejuvenate.yml", "-e", json.dumps({**PATIENCE, **common, **variables})]

    def run(self, **variables: typing.Any) -> bool:
        """Run the playbook to its end; return whether it succeeded."""
        self.report_file.unlink(missing_ok=True)
        return not self.fleet[FIRST].playbook(*self.arguments(**variables), timeout=RUN_TIMEOUT).failed

    def results(self, key: str = "result") -> dict[str, str]:
        """Return what the run's report says of each machine."""
        report = json.loads(self.report_file.read_text())
        return {machine["machine"]: machine[key] for machine in report["machines"]}

    def holders(self) -> dict[str, str]:
        """Return who has reserved each machine, of those that somebody has."""
        locks = {name: lab.module("vmbeam.xen.host_lock_info")["holder"] for name, lab in self.fleet.items()}
        return {name: holder["owner"] for name, holder in locks.items() if holder}

    def hook(self, tasks: list[dict]) -> str:
        """Write a hook for the second machine, and return its path."""
        path = self.folder / "hook.yml"
        path.write_text(yaml.safe_dump([{"when": f"inventory_hostname == '{SECOND}'", "block": tasks}]))
        return str(path)

    def statuses(self) -> dict[str, dict]:
        return {guest: status for lab in self.fleet.values() for guest, status in lab.all_status().items()}

    def nothing_is_lost(self) -> None:
        for guest, status in self.statuses().items():
            assert not guests.lost(self.before[guest], status), guest

    def slots(self) -> dict[str, set[str]]:
        """Return which slots' host VMs each machine has."""
        return {name: {domain[-1] for domain in lab.domains()} for name, lab in self.fleet.items()}

    def outcomes(self, name: str) -> list[str]:
        """Return how each run that a machine records ended."""
        record = json.loads(self.fleet[name].host("cat", "/var/lib/vmbeam/state.json"))
        assert record["run"] is None, record["run"]
        return [run["outcome"] for run in record["history"]]

    def all_are_done_once(self) -> None:
        assert self.slots() == {name: {"b"} for name in self.fleet}
        for name, lab in self.fleet.items():
            assert lab.guests_in("b") == set(lab.machine.guests), name
            assert self.outcomes(name).count("completed") == 1, name
        self.nothing_is_lost()


@pytest.fixture
def runs(fleet: dict, tmp_path: pathlib.Path) -> Runs:
    return Runs(fleet, tmp_path)


def stand_in_tasks(tools: types.SimpleNamespace, slot: str, script: str) -> list[dict]:
    """Return tasks that put a program in the place of xl in a slot of the second machine, once."""
    name = f"{SECOND}-{slot}"
    move = f"test -e {tools.xl}.real || mv {tools.xl} {tools.xl}.real"
    return [
        {"name": "Keep xl", "ansible.builtin.shell": move, "delegate_to": name},
        {
            "name": "Put something else in its place",
            "ansible.builtin.copy": {"dest": tools.xl, "content": script, "mode": "0755"},
            "delegate_to": name,
        },
    ]


def test_a_failure_in_the_second_machine_stops_the_run_and_the_next_one_finishes(runs, tools):
    # Later the sender may have committed, and then the guest moves all the same.
    killed = tools.stand_in_script("migrate-receive", "Ready to receive", "kill -KILL $child")
    hook = runs.hook(stand_in_tasks(tools, "b", killed))

    assert not runs.run(vmbeam_hooks={"before_guest": hook})

    assert runs.results() == {FIRST: "done", SECOND: "failed", THIRD: "not touched"}
    [guest] = runs.fleet[SECOND].machine.guests
    reason = runs.results("reason")[SECOND]
    assert f"xl migrate of {guest} failed" in reason
    assert "runs on at the source" in reason
    assert runs.holders() == {}
    # The new host VM is gone, and the guest was never lost.
    assert runs.slots() == {FIRST: {"b"}, SECOND: {"a"}, THIRD: {"a"}}
    assert runs.fleet[SECOND].guests_in("a") == set(runs.fleet[SECOND].machine.guests)
    assert runs.outcomes(SECOND)[-1] == "failed"
    runs.nothing_is_lost()

    assert runs.run()

    assert runs.results() == {FIRST: "fresh", SECOND: "done", THIRD: "done"}
    assert runs.holders() == {}
    runs.all_are_done_once()


def test_a_killed_controller_is_followed_by_a_run_that_finishes(runs, tools, tmp_path):
    second = runs.fleet[SECOND]
    hold = f"kill -STOP $child; : > {tools.held}; read -r _ < {tools.go}; kill -CONT $child"
    script = tools.stand_in_script("migrate", "guest has suspended", hold)
    fifo = f"rm -f {tools.held} {tools.go} && mkfifo {tools.go}"
    make = {"name": "Make the ways to hold it", "ansible.builtin.shell": fifo, "delegate_to": f"{SECOND}-a"}
    # Last, as the test looks for them.
    hook = runs.hook([*stand_in_tasks(tools, "a", script), make])
    log = tmp_path / "killed.log"
    controller = second.start_playbook(log, *runs.arguments(vmbeam_hooks={"before_guest": hook}))

    def is_held() -> bool:
        assert controller.poll() is None, "the run ended before it was held"
        held = f"timeout 60 sh -c 'until [ -e {tools.held} ]; do sleep 1; done' && echo held || true"
        return "held" in second.guest_dom0("a", held, timeout=180)

    try:
        # The moment when the guest is suspended and its memory shared.
        wait.until(is_held, timeout=RUN_TIMEOUT, failure=lambda: AssertionError("the run was not held"))
        assert second.guests_in("a") == set(second.machine.guests)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(controller.pid, signal.SIGKILL)
        controller.wait(60)
        print(log.read_text())
    assert runs.slots() == {FIRST: {"b"}, SECOND: {"a", "b"}, THIRD: {"a"}}
    # The third one, too, whose turn has not come; the first one has been given back.
    holders = runs.holders()
    assert set(holders) == {SECOND, THIRD}
    assert all(owner.startswith(f"{RUN} (") for owner in holders.values())
    with pytest.raises(ModuleFailed, match=f"reserved by {RUN}"):
        second.module("vmbeam.xen.host_lock", owner="another run")

    # What it had begun goes on or ends, as on any machine whose controller is dead.
    # Who holds xl may be dead, too: then nobody else lets it go on.
    go = f"timeout 60 sh -c {shlex.quote(f'echo > {tools.go}')}; pkill -CONT -x xl.real; mv {tools.xl}.real {tools.xl}"
    second.guest_dom0("a", go, timeout=120)
    assert runs.run()

    assert runs.results() == {FIRST: "fresh", SECOND: "done", THIRD: "done"}
    assert runs.holders() == {}
    runs.all_are_done_once()


def test_a_repair_of_healthy_machines_changes_nothing(runs):
    before = runs.slots()
    repaired = runs.fleet[FIRST].playbook("repair.yml", timeout=RUN_TIMEOUT)
    assert not repaired.failed
    for name in runs.fleet:
        assert f"one host VM, {name}-a, with each guest once; nothing else to repair" in repaired.output
    assert runs.holders() == {}
    assert runs.slots() == before
    runs.nothing_is_lost()
