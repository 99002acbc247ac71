"""Several machines of the lab: chosen, started side by side, told apart."""

import dataclasses
import sys
import threading
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lab"))

from vmbeam_lab import build, cli, inventory, paths, phases, topology
from vmbeam_lab.errors import LabError, TopologyError


@pytest.fixture
def lab():
    return topology.load(paths.LAB / "topology.yml")


class Machine:
    """In place of an emulated one: starting it waits until all others are being started, too."""

    def __init__(self, barrier, error=None):
        self.barrier = barrier
        self.error = error
        self.stopped = threading.Event()

    def start(self):
        self.barrier.wait(10)
        if self.error:
            raise self.error

    def stop(self):
        self.stopped.set()


def test_machines_start_at_the_same_time():
    barrier = threading.Barrier(2)
    cli.side_by_side([Machine(barrier), Machine(barrier)], Machine.start)


def test_all_failures_are_told_and_nothing_is_stopped():
    barrier = threading.Barrier(3)
    machines = [Machine(barrier, LabError("one")), Machine(barrier), Machine(barrier, LabError("three"))]
    with pytest.raises(LabError, match="one\nthree"):
        cli.side_by_side(machines, Machine.start)
    assert not any(machine.stopped.is_set() for machine in machines)


def test_an_interruption_ends_the_machines(monkeypatch):
    machines = [Machine(None), Machine(None)]
    wait, interrupted = cli.concurrent.futures.wait, []

    def interrupt(*arguments, **options):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return wait(*arguments, **options)

    monkeypatch.setattr(cli.concurrent.futures, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cli.side_by_side(machines, lambda machine: machine.stopped.wait(30))
    assert all(machine.stopped.is_set() for machine in machines)


def test_only_the_chosen_machines_each_once(lab):
    assert [machine.name for machine in lab.select(None)] == ["m1"]
    assert [machine.name for machine in lab.select(["m3", "m2", "m3"])] == ["m3", "m2"]
    with pytest.raises(TopologyError, match="no machine m9"):
        lab.select(["m9"])


def test_a_host_vm_names_its_machine(lab):
    assert inventory.machine_of(lab, "m2-b").name == "m2"
    with pytest.raises(TopologyError, match="m2-c"):
        inventory.machine_of(lab, "m2-c")


def test_machines_of_one_inner_network_share_no_connection(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "STATE", tmp_path)
    monkeypatch.setattr(paths, "INVENTORY", tmp_path / "inventory.yml")
    (tmp_path / "key.pub").write_text("ssh-ed25519 AAAA lab\n")
    machines = lab.select(["m2", "m3"])
    assert machines[0].slots["a"].address == machines[1].slots["a"].address
    inventory.write(lab, machines, tmp_path / "key", {"m2": tmp_path, "m3": tmp_path})
    groups = yaml.safe_load(paths.INVENTORY.read_text())["all"]["children"]
    hosts, guest_dom0s = groups["vmbeam_hosts"]["hosts"], groups["vmbeam_guest_dom0s"]["hosts"]
    assert list(hosts) == ["m2", "m3"]
    assert sorted(guest_dom0s) == ["m2-a", "m2-b", "m3-a", "m3-b"]
    assert len({host["ansible_port"] for host in hosts.values()}) == 2
    assert len({host["ansible_control_path"] for host in guest_dom0s.values()}) == 4
    assert len({host["ansible_ssh_common_args"] for host in guest_dom0s.values()}) == 2


def test_each_machine_gets_the_golden_image_of_its_size(lab, tmp_path, monkeypatch):
    asked, data = [], {}

    def golden(sources, dom0_memory_mb, boot):
        asked.append(dom0_memory_mb)
        path = tmp_path / f"golden-{dom0_memory_mb}"
        path.write_text("image")
        return path

    monkeypatch.setattr(build, "ssh_key", lambda: tmp_path / "key")
    monkeypatch.setattr(build.emulator, "build", lambda: tmp_path)
    monkeypatch.setattr(build, "_packages", lambda: tmp_path)
    monkeypatch.setattr(build.images, "base", lambda: tmp_path)
    monkeypatch.setattr(build, "_guest_boot", lambda base: tmp_path)
    monkeypatch.setattr(build, "_golden", golden)
    monkeypatch.setattr(build, "_system", lambda *arguments: tmp_path)
    monkeypatch.setattr(build, "_guest_disks", lambda *arguments: tmp_path)
    monkeypatch.setattr(
        build.images, "data_disk", lambda name, files, **options: data.update({name: files}) or tmp_path
    )
    monkeypatch.setattr(phases, "_FILE", tmp_path / "phases.jsonl")
    machines = lab.select(["m1", "m2", "m3"])
    other = dataclasses.replace(machines[2], guest_dom0_memory_mb=machines[0].guest_dom0_memory_mb)
    build.build(lab, [machines[0], machines[1], other])
    assert sorted(asked) == sorted({machine.guest_dom0_memory_mb for machine in machines[:2]})
    for machine in (*machines[:2], other):
        image = data[machine.name]["images/guest-hypervisor.raw"]
        assert image.name == f"golden-{machine.guest_dom0_memory_mb}"
