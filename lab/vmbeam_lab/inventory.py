"""The inventory of the lab, as Ansible uses it on any fleet."""

from __future__ import annotations

import pathlib
import typing

import yaml

from . import paths
from .errors import TopologyError
from .machine import host_dom0_ssh
from .topology import Machine, Topology

_SSH_OPTIONS = (
    "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "
    # Handshakes are the dearest part of SSH under emulation: keep connections.
    "-o ControlMaster=auto -o ControlPersist=600 -o ConnectTimeout=30 "
    "-o ServerAliveInterval=30 -o ServerAliveCountMax=10"
)


def slot_name(machine: Machine, slot: str) -> str:
    """Return the name of the host VM in `slot`: domain, host name and inventory host."""
    return f"{machine.name}-{slot}"


def machine_of(topology: Topology, host_vm: str) -> Machine:
    """Return the machine that has a slot for the host VM of that name.

    :raises TopologyError: none has
    """
    for machine in topology.machines.values():
        if host_vm in [slot_name(machine, slot) for slot in machine.slots]:
            return machine
    raise TopologyError(f"no machine of the topology has a slot for a host VM {host_vm}")


def disk_ids(guest_name: str, guest_type: str) -> list[str]:
    """Return the ids of a lab guest's disks, in the order of its devices."""
    return [f"{guest_name}-root", f"{guest_name}-data"] if guest_type == "hvm" else [f"{guest_name}-data"]


def write(
    topology: Topology, machines: list[Machine], key: pathlib.Path, guests: dict[str, pathlib.Path]
) -> pathlib.Path:
    """Write the inventory of `machines` and return its path.

    :param guests: machine -> directory with its guests' xl files
    """
    hosts: dict[str, typing.Any] = {}
    guest_dom0s: dict[str, typing.Any] = {}
    for machine in machines:
        hosts[machine.name] = {
            "ansible_host": "127.0.0.1",
            "ansible_port": machine.ssh_port,
            "vmbeam_host_vm_memory_mb": machine.host_vm_memory_mb,
            "vmbeam_host_vm_vcpus": machine.host_vm_vcpus,
            # The emulated CPU's TSC is not called invariant, so Xen would trap every RDTSC.
            "vmbeam_host_vm_extra_config": {"tsc_mode": "native"},
            # Nobody misses what an orderly shutdown of a host VM without guests would save.
            "vmbeam_graceful_stop": False,
            # Two ends of one bridge in one machine: encryption would take most of the emulated CPU's time.
            "vmbeam_transport": "tcp",
            "vmbeam_slots": {
                slot: {
                    "name": slot_name(machine, slot),
                    "address": f"{entry.address}/{topology.prefix}",
                    "gateway": topology.gateway,
                    "mac": entry.mac,
                    "cpus": entry.cpus,
                }
                for slot, entry in machine.slots.items()
            },
            "vmbeam_guest_probes": {
                guest.name: {"url": f"http://{guest.address}/status"} for guest in machine.guests.values()
            },
            "lab_guests": [
                {
                    "name": guest.name,
                    "config": str(guests[machine.name] / f"{guest.name}.cfg"),
                    "disks": disk_ids(guest.name, guest.type),
                    "url": f"http://127.0.0.1:{guest.http_port}/status",
                }
                for guest in machine.guests.values()
            ],
        }
        jump = " ".join(host_dom0_ssh(machine, key, "-W", "%h:%p"))
        for slot, entry in machine.slots.items():
            guest_dom0s[slot_name(machine, slot)] = {
                "ansible_host": entry.address,
                "ansible_ssh_common_args": f"-o ProxyCommand='{jump}' {_SSH_OPTIONS}",
                # Ansible names it by address and port, and inner addresses repeat between machines: it would
                # take the connection to another machine's host VM.
                "ansible_control_path": str(paths.STATE / machine.name / f"ssh-{slot}"),
            }
    document = {
        "all": {
            "vars": {
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(key),
                "ansible_ssh_common_args": _SSH_OPTIONS,
                "ansible_python_interpreter": "/usr/bin/python3",
                "ansible_ssh_timeout": 60,
                "vmbeam_authorized_keys": [key.with_suffix(".pub").read_text().strip()],
            },
            "children": {
                "vmbeam_hosts": {"hosts": hosts},
                "vmbeam_guest_dom0s": {"hosts": guest_dom0s},
            },
        }
    }
    paths.INVENTORY.parent.mkdir(parents=True, exist_ok=True)
    paths.INVENTORY.write_text("# Written by the lab; a change is lost.\n" + yaml.safe_dump(document, sort_keys=False))
    return paths.INVENTORY
