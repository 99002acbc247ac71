# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventory plugin, as Ansible's commands run it, on a fleet whose ssh and xl are stand-ins."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.vmbeam.xen.plugins.module_utils import _process
from ansible_collections.vmbeam.xen.plugins.plugin_utils import _dom0_ssh, _machine_view
from checkout import environment

ROOT = Path(__file__).resolve().parents[3]
FAKE_SSH = Path(__file__).parents[1] / "fakes" / "fake_fleet_ssh.py"
SLOTS = {
    "a": {"name": "m1-a", "address": "10.0.2.21/24", "mac": "00:16:3e:01:00:0a"},
    "b": {"name": "m1-b", "address": "10.0.2.22/24", "mac": "00:16:3e:01:00:0b"},
}


def plain(value: dict[str, Any]) -> Any:
    """What ansible-inventory marks as not to be evaluated, without the mark."""
    return value.get("__ansible_unsafe", value)


def uuid(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012}"


class Fleet:
    """Dom0s by address: what is in them, and what Ansible makes of it."""

    def __init__(self, folder: Path, sources: Path) -> None:
        self.folder = folder
        self.sources = sources
        self.sources.mkdir()

    def dom0(self, address: str, *domains: dict[str, Any]) -> Path:
        """Let a dom0 answer, with these domains besides its own."""
        home = self.folder / address
        home.mkdir(exist_ok=True)
        entries = [{"name": "Domain-0", "domid": 0, "uuid": uuid(0), "flags": "r-----", "time": 60.0}]
        for number, domain in enumerate(domains, 1):
            entries.append({"domid": number, "uuid": uuid(number), "flags": "-b----", "time": 1.0, **domain})
        (self.folder / f"{address}.json").write_text(json.dumps(entries))
        return home

    def record(self, address: str, name: str, slot: str, generation: int, hosts: str = "") -> None:
        """Give a host dom0 the files of a host VM."""
        home = self.folder / address / "host-vms" / name
        home.mkdir(parents=True)
        record = {
            "generation": generation,
            "created": "2026-01-01T00:00:00+00:00",
            "image_sha256": "0" * 64,
            "slot": slot,
        }
        (home / "generation.json").write_text(json.dumps(record, indent=2) + "\n")
        with tarfile.open(home / "seed.tar", "w") as tar:
            member = tarfile.TarInfo("etc/hosts")
            member.size = len(hosts)
            tar.addfile(member, io.BytesIO(hosts.encode()))

    def source(self, name: str, content: dict[str, Any]) -> Path:
        path = self.sources / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return path

    def plugin(self, **options: Any) -> Path:
        return self.source("fleet.vmbeam.yml", {"plugin": "vmbeam.xen.xen", "timeout": 120, **options})

    def run(self, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name(command), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=environment(),
        )

    def list(self, *arguments: str | Path) -> tuple[dict[str, Any], str]:
        """The inventory, and what was warned of."""
        sources = arguments or ("-i", self.sources / "fleet.vmbeam.yml")
        result = self.run("ansible-inventory", *sources, "--list")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout, object_hook=plain), result.stderr

    @property
    def calls(self) -> list[list[str]]:
        """The ssh calls so far, without the scripts."""
        log = self.folder / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def asked(self) -> list[str]:
        return sorted(call[-1] for call in self.calls)


@pytest.fixture
def fleet(tmp_path, fake_xen, monkeypatch):
    """One machine m1 that runs m1-a with two guests."""
    fleet = Fleet(fake_xen.folder, tmp_path / "sources")
    monkeypatch.setenv("FAKE_FLEET", str(fleet.folder))
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(f"#!{sys.executable} -SE\n{FAKE_SSH.read_text()}")
    fleet.dom0("192.0.2.1", {"name": "m1-a", "memory": 4096}, {"name": "something-else"})
    fleet.record("192.0.2.1", "m1-a", "a", 3)
    fleet.dom0(
        "10.0.2.21",
        {"name": "web1", "config": {"c_info": {"type": "pvh"}, "nics": [{"mac": "00:16:3e:00:02:01"}]}},
        {"name": "app1", "flags": "--p---", "config": {"c_info": {"type": "hvm"}}},
    )
    return fleet


def hosts(inventory: dict[str, Any], group: str) -> list[str]:
    """The hosts of a group and of its children."""
    entry = inventory.get(group, {})
    below = [host for child in entry.get("children", []) for host in hosts(inventory, child)]
    return sorted({*entry.get("hosts", []), *below})


def facts(inventory: dict[str, Any], host: str) -> dict[str, Any]:
    return inventory["_meta"]["hostvars"][host]


def test_machines_host_vms_and_guests(fleet):
    fleet.plugin(
        machines={"m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS}},
        compose={
            "ansible_host": "vmbeam_observed.name ~ '.example.org' if vmbeam_observed.kind == 'guest' else ansible_host"
        },
        groups={"stopped": "vmbeam_observed.state == 'paused'", "large": "vmbeam_observed.memory_mb >= 4096"},
        keyed_groups=[
            {"key": "vmbeam_observed.role", "prefix": "role"},
            {"key": "vmbeam_observed.type", "prefix": "type"},
        ],
    )
    inventory, said = fleet.list()
    assert "WARNING" not in said
    assert hosts(inventory, "vmbeam_hosts") == ["m1"]
    assert hosts(inventory, "vmbeam_guest_dom0s") == ["m1-a", "m1-b"]
    assert hosts(inventory, "vmbeam_guests") == ["app1.m1", "web1.m1"]
    assert hosts(inventory, "vmbeam_machine_m1") == ["app1.m1", "m1-a", "m1-b", "web1.m1"]
    assert hosts(inventory, "vmbeam_guests_of_m1_a") == ["app1.m1", "web1.m1"]
    assert "something-else" not in json.dumps(inventory)

    machine = facts(inventory, "m1")["vmbeam_observed"]
    assert machine["hypervisor"]["free_memory_mb"] == 9000
    assert (machine["run"], machine["last_run"]) == (None, None)
    host_vm = facts(inventory, "m1-a")["vmbeam_observed"]
    assert host_vm["hypervisor"]["version"] == "4.17.5"
    assert {key: host_vm[key] for key in ("slot", "generation", "state", "memory_mb", "role", "reachable")} == {
        "slot": "a",
        "generation": 3,
        "state": "blocked",
        "memory_mb": 4096,
        "role": "active",
        "reachable": True,
    }
    free = facts(inventory, "m1-b")
    assert free["ansible_host"] == "10.0.2.22"
    assert (free["vmbeam_observed"]["role"], free["vmbeam_observed"]["slot"]) == ("absent", "b")
    guest = facts(inventory, "web1.m1")
    assert guest["vmbeam_machine"] == "m1"
    assert guest["vmbeam_observed"]["host_vm"] == "m1-a"
    assert guest["vmbeam_observed"]["nics"] == [{"mac": "00:16:3e:00:02:01", "bridge": None}]

    assert guest["ansible_host"] == "web1.example.org"
    assert facts(inventory, "m1-a")["ansible_host"] == "10.0.2.21"
    assert hosts(inventory, "stopped") == ["app1.m1"]
    assert hosts(inventory, "large") == ["m1-a"]
    assert hosts(inventory, "role_active") == ["m1-a"]
    assert hosts(inventory, "type_hvm") == ["app1.m1"]
    # One session for each dom0 that there is.
    assert fleet.asked() == ["10.0.2.21", "192.0.2.1"]


def test_a_machine_of_another_source_is_asked_as_ansible_would(fleet):
    static = fleet.source("hosts.yml", {"vmbeam_hosts": {"hosts": {"m1": {"ansible_host": "{{ net }}.1"}}}})
    fleet.source("group_vars/all.yml", {"net": "192.0.2", "ansible_user": "root"})
    fleet.source("group_vars/vmbeam_guest_dom0s.yml", {"ansible_user": "admin"})
    fleet.source(
        "host_vars/m1.yml",
        {
            "vmbeam_slots": SLOTS,
            "ansible_port": 2222,
            "ansible_ssh_private_key_file": "/k ey",
            "ansible_ssh_common_args": "-o ProxyJump=bastion -o ControlPath=/run/%C",
        },
    )
    plugin = fleet.plugin(machines_group="vmbeam_hosts")
    inventory, said = fleet.list("-i", static, "-i", plugin)
    assert "WARNING" not in said
    assert hosts(inventory, "vmbeam_guests") == ["app1.m1", "web1.m1"]
    host_dom0, guest_dom0 = sorted(fleet.calls, key=lambda call: call[-1], reverse=True)
    login = ["-o", "ProxyJump=bastion", "-o", "ControlPath=/run/%C", "-p", "2222", "-l", "root", "-i", "/k ey", "--"]
    bounds = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=120"]
    assert host_dom0 == [*bounds, *login, "192.0.2.1"]
    assert guest_dom0[-1] == "10.0.2.21"
    assert guest_dom0[guest_dom0.index("-l") + 1] == "admin"
    assert facts(inventory, "m1-a")["ansible_ssh_private_key_file"] == "/k ey"
    result = fleet.run("ansible-inventory", "-i", plugin, "-i", static, "--list")
    assert "there is no host in vmbeam_hosts yet" in result.stderr


def test_the_way_through_the_host_dom0_survives_ssh(tmp_path):
    """The real ssh takes what ansible_ssh_common_args says, and starts the one that is to carry it."""
    log = tmp_path / "log"
    proxy = tmp_path / "ssh"
    proxy.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(log)!r}, 'w'))\n")
    proxy.chmod(0o755)
    machine = {
        "ansible_host": "192.0.2.1",
        "ansible_user": "root",
        "ansible_ssh_private_key_file": "/it's a key",
        "ansible_ssh_common_args": "-o 'ProxyCommand=ssh -W %h:%p bastion' -o ControlPath=/run/%C",
    }
    found = _dom0_ssh.behind("m1", machine, "m1-a", {})
    # As Ansible's connection plugin splits it.
    arguments = shlex.split(found["ansible_ssh_common_args"])
    result = subprocess.run(
        ["ssh", "-F", "/dev/null", *arguments, "-p", "2022", "root@10.0.2.21", "true"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SHELL": "/bin/sh"},
        executable="/usr/bin/ssh",
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 255, result.stderr
    assert json.loads(log.read_text()) == [
        "-o",
        "ProxyCommand=ssh -W %h:%p bastion",
        "-o",
        "ControlPath=/run/%C",
        "-l",
        "root",
        "-i",
        "/it's a key",
        "-W",
        "[10.0.2.21]:2022",
        "--",
        "192.0.2.1",
    ]


def test_guest_dom0s_of_equal_addresses_are_told_apart():
    one, two = (_dom0_ssh.behind(machine, {}, f"{machine}-a", {}) for machine in ("m1", "m2"))
    assert one["ansible_control_path"] != two["ansible_control_path"]
    assert "HostKeyAlias=m1-a" in one["ansible_ssh_common_args"]
    assert one["ansible_control_path"].startswith("%(directory)s/")


def test_addresses_come_from_the_seed_disk_if_no_slots_are_described(fleet):
    home = fleet.dom0("192.0.2.2", {"name": "m2-b"})
    hosts_file = "127.0.0.1 localhost\n10.0.2.31 m2-a\n10.0.2.21 m2-b\n10.0.2.99 other\n::1 localhost ip6-localhost\n"
    fleet.record("192.0.2.2", "m2-b", "b", 8, hosts_file)
    last = {"outcome": "completed", "source": "m2-a", "destination": "m2-b", "guests": ["not told"]}
    (home / "state.json").write_text(json.dumps({"machine": "m2", "run": None, "history": [last]}))
    fleet.plugin(machines={"m2": {"ansible_host": "192.0.2.2"}})
    inventory, said = fleet.list()
    assert "WARNING" not in said
    assert hosts(inventory, "vmbeam_guest_dom0s") == ["m2-a", "m2-b"]
    assert facts(inventory, "m2-a")["ansible_host"] == "10.0.2.31"
    assert facts(inventory, "m2-b")["ansible_host"] == "10.0.2.21"
    assert facts(inventory, "m2")["vmbeam_observed"]["last_run"]["outcome"] == "completed"
    assert "not told" not in json.dumps(inventory)


def test_a_guest_that_is_being_migrated_is_one_host(fleet):
    fleet.dom0("192.0.2.1", {"name": "m1-a"}, {"name": "m1-b"})
    fleet.record("192.0.2.1", "m1-b", "b", 4)
    fleet.dom0("10.0.2.22", {"name": "web1--incoming", "flags": "--p---"}, {"name": "new"}, {"name": "app1"})
    fleet.plugin(machines={"m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS}})
    inventory, _said = fleet.list()
    assert hosts(inventory, "vmbeam_guests") == ["app1.m1", "new.m1", "web1.m1"]
    guest = facts(inventory, "web1.m1")["vmbeam_observed"]
    assert (guest["name"], guest["host_vm"], guest["copies_in"]) == ("web1", "m1-a", ["m1-a", "m1-b"])
    # Of two of one name, the one that runs: the other is a leftover.
    assert hosts(inventory, "vmbeam_guests_of_m1_b") == ["app1.m1", "new.m1"]
    roles = {name: facts(inventory, name)["vmbeam_observed"]["role"] for name in ("m1-a", "m1-b")}
    assert roles == {"m1-a": "source", "m1-b": "destination"}


def test_a_dom0_that_does_not_answer_is_a_warning_or_an_error(fleet):
    machines = {
        "m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS},
        "m2": {"ansible_host": "192.0.2.2"},
        "m3": {"ansible_host": "192.0.2.3", "vmbeam_slots": {"a": {"name": "m3-a", "address": "10.0.2.41/24"}}},
        "m4": {"ansible_host": "192.0.2.4"},
        "m5": {"ansible_host": "192.0.2.5"},
    }
    (fleet.dom0("192.0.2.4") / "dies").touch()
    fleet.dom0("192.0.2.5", {"name": "m5-a"})
    fleet.record("192.0.2.5", "m5-a", "a", 1)
    (fleet.folder / "192.0.2.5" / "host-vms" / "m5-a" / "generation.json").write_text("{\n")
    (fleet.dom0("10.0.2.21") / "dies").touch()
    fleet.plugin(machines=machines)
    inventory, said = fleet.list()
    said = " ".join(said.split())
    assert "host dom0 m2: no connection by ssh: ssh: connect to host 192.0.2.2 port 22: No route to host" in said
    assert "host dom0 m3: no connection" in said
    assert "host dom0 m4: the session ended early" in said
    assert "host dom0 m5: the record of host VM m5-a is damaged" in said
    assert "guest dom0 m1-a:" in said
    assert hosts(inventory, "vmbeam_hosts") == ["m1", "m2", "m3", "m4", "m5"]
    assert facts(inventory, "m1-a")["vmbeam_observed"]["reachable"] is False
    assert facts(inventory, "m3-a")["vmbeam_observed"]["role"] == "unknown"
    assert "vmbeam_observed" not in facts(inventory, "m3")

    fleet.plugin(machines={"m2": machines["m2"]}, strict_hosts=True)
    result = fleet.run("ansible-inventory", "-i", fleet.sources / "fleet.vmbeam.yml", "--list")
    assert "host dom0 m2: no connection" in result.stderr
    assert "vmbeam_hosts" not in result.stdout


def test_a_dom0_that_answers_nonsense_is_the_only_one_that_is_missing(fleet):
    machines = {"m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS}}
    for number, spoilt in ((2, '{"run": ["what"], "history": []}'), (3, '{"run": null, "history": [3]}')):
        address = f"192.0.2.{number}"
        (fleet.dom0(address) / "state.json").write_text(spoilt)
        machines[f"m{number}"] = {"ansible_host": address}
    fleet.dom0("192.0.2.4", {"name": "m4-a"})
    fleet.record("192.0.2.4", "m4-a", "a", 1)
    record = fleet.folder / "192.0.2.4" / "host-vms" / "m4-a" / "generation.json"
    record.write_text(record.read_text().replace(": 1,", ': "first",'))
    machines["m4"] = {"ansible_host": "192.0.2.4"}
    fleet.dom0("192.0.2.5", {"name": "m5-a"})
    fleet.record("192.0.2.5", "m5-a", "a", 1, "10.0.2.51 m5-a\n")
    fleet.dom0("10.0.2.51", {"name": "web5", "config": None})
    machines["m5"] = {"ansible_host": "192.0.2.5"}
    fleet.plugin(machines=machines)
    inventory, said = fleet.list()
    said = " ".join(said.split())
    assert "host dom0 m2: its answer has the wrong form" in said
    assert "host dom0 m3: its answer has the wrong form" in said
    assert "host dom0 m4: the record of host VM m4-a is damaged: its generation is 'first'" in said
    assert "guest dom0 m5-a: its answer has the wrong form" in said
    assert hosts(inventory, "vmbeam_guests") == ["app1.m1", "web1.m1"]
    assert facts(inventory, "m5-a")["vmbeam_observed"]["reachable"] is False


@pytest.mark.parametrize("python", [True, False])
def test_of_the_record_of_runs_no_more_is_sent_than_is_told(fleet, tmp_path, python):
    """Unless the host dom0 has no Python."""
    last = {"outcome": "completed", "source": "m1-b", "destination": "m1-a", "guests": [{"guest": "web1"}]}
    cut = {"source": "m1-a", "destination": "m1-b", "guests": ["web1"]}
    state = {"machine": "m1", "run": cut, "history": [{**last, "outcome": "failed"}] * 49 + [last]}
    (fleet.folder / "192.0.2.1" / "state.json").write_text(json.dumps(state))
    if not python:
        program = tmp_path / "bin" / "python3"
        program.unlink()
        program.write_text("#!/bin/sh\nexit 127\n")
        program.chmod(0o755)
    sent = []

    def run(argv, timeout):
        result = _process.run(argv, timeout)
        sent.append(result.stdout)
        return result

    folder = "/var/lib/vmbeam"
    seen = _machine_view.host_dom0(run, ["192.0.2.1"], f"{folder}/host-vms", f"{folder}/state.json", 120)
    assert seen["run"] == cut
    assert seen["last_run"] == {
        **dict.fromkeys(("action", "generation", "finished", "guests_moved")),
        **{key: last[key] for key in ("outcome", "source", "destination")},
    }
    assert ('"guest"' in sent[0]) == ("failed" in sent[0]) == (not python)


def test_a_dom0_that_hangs_costs_no_more_than_the_timeout(fleet):
    (fleet.dom0("192.0.2.3") / "hangs").touch()
    fleet.plugin(machines={"m3": {"ansible_host": "192.0.2.3"}}, timeout=1)
    _inventory, said = fleet.list()
    assert "host dom0 m3: ssh -o BatchMode=yes did not end within 1 s" in " ".join(said.split())


def test_answers_are_cached_and_who_did_not_answer_is_asked_again(fleet, tmp_path):
    source = fleet.plugin(
        machines={"m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS}, "m2": {"ansible_host": "192.0.2.2"}},
        cache=True,
        cache_plugin="ansible.builtin.jsonfile",
        cache_connection=str(tmp_path / "cache"),
    )
    first, _said = fleet.list()
    assert fleet.asked() == ["10.0.2.21", "192.0.2.1", "192.0.2.2"]
    second, said = fleet.list()
    assert fleet.asked() == ["10.0.2.21", "192.0.2.1", "192.0.2.2", "192.0.2.2"]
    assert "host dom0 m2" in said
    assert second == first
    fleet.dom0("10.0.2.21")
    third, _said = fleet.list("-i", source, "--flush-cache")
    assert hosts(third, "vmbeam_guests") == []
    fourth, _said = fleet.list()
    assert fourth == third


def test_a_guest_poses_as_nothing_else(fleet):
    """A host VM is not trusted: what it says of its guests names no other host, and is not evaluated."""
    mark = fleet.folder / "evaluated"
    evil = "{{ lookup('ansible.builtin.pipe', 'touch " + str(mark) + "') }}"
    fleet.dom0(
        "10.0.2.21",
        {"name": "web1", "config": {"disks": [{"pdev_path": evil, "vdev": "xvda"}]}},
        {"name": "m2"},
        {"name": "m1-b"},
        {"name": "localhost"},
        {"name": "vmbeam_hosts"},
        {"name": "known"},
        {"name": "-oProxyCommand=x"},
    )
    fleet.dom0("192.0.2.2")
    static = fleet.source("hosts.yml", {"mine": {"hosts": {"known": {"ansible_host": "198.51.100.1"}}}})
    plugin = fleet.plugin(
        machines={"m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS}, "m2": {"ansible_host": "192.0.2.2"}},
        qualify_guests=False,
    )
    inventory, said = fleet.list("-i", static, "-i", plugin)
    said = " ".join(said.split())
    assert hosts(inventory, "vmbeam_guests") == ["known", "web1"]
    assert facts(inventory, "known")["ansible_host"] == "198.51.100.1"
    for name in ("m2", "m1-b", "localhost", "vmbeam_hosts"):
        assert f"guest {name} of m1 is left out" in said
    assert facts(inventory, "m2")["vmbeam_observed"]["kind"] == "machine"
    show = ("-c", "local", "-m", "ansible.builtin.debug", "-a", "msg={{ vmbeam_observed.disks }}")
    result = fleet.run("ansible", "-i", plugin, "web1", *show)
    assert "lookup" in result.stdout, result.stderr
    assert not mark.exists()


def test_two_machines_cannot_be_given_host_vms_of_one_name(fleet):
    m2 = {"ansible_host": "192.0.2.2", "vmbeam_slots": SLOTS}
    fleet.plugin(machines={"m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS}, "m2": m2})
    result = fleet.run("ansible-inventory", "-i", fleet.sources / "fleet.vmbeam.yml", "--list")
    clash = "host VM m1-a of m2: there is a machine or a host VM of m1 of that name"
    assert clash in " ".join(result.stderr.split())
    assert "vmbeam_hosts" not in result.stdout


@pytest.mark.parametrize("copy", ["m0", "m2"])
def test_what_a_copy_of_a_machine_has_of_it_is_left_out(fleet, copy):
    """Whichever of the two comes first."""
    fleet.dom0("192.0.2.2", {"name": "m1-a"}, {"name": "own-a"})
    fleet.record("192.0.2.2", "m1-a", "a", 3)
    fleet.record("192.0.2.2", "own-a", "a", 4)
    fleet.plugin(
        machines={"m1": {"ansible_host": "192.0.2.1", "vmbeam_slots": SLOTS}, copy: {"ansible_host": "192.0.2.2"}}
    )
    inventory, said = fleet.list()
    left_out = f"host VM m1-a of {copy} is left out: there is a machine or a host VM of m1 of that name"
    assert left_out in " ".join(said.split())
    assert hosts(inventory, "vmbeam_guests") == ["app1.m1", "web1.m1"]
    assert facts(inventory, "m1-a")["vmbeam_machine"] == "m1"
    assert hosts(inventory, f"vmbeam_machine_{copy}") == ["own-a"]
