"""The inventory of a simulated fleet, and the machines that it names."""

from __future__ import annotations

import pathlib

import yaml

from .simulation import Fleet, host_vm_memory_mb, new_machine


def machine_names(hosts: int) -> list[str]:
    """Return the machines' names, in the order in which Ansible takes them."""
    return [f"m{number:04}" for number in range(1, hosts + 1)]


def fleet_folder(path: pathlib.Path) -> pathlib.Path:
    """Return the folder of the machines of an inventory."""
    return path.parent / "fleet"


def write(folder: pathlib.Path, hosts: int, guests: int, due: int | None = None) -> pathlib.Path:
    """Make a fleet below `folder` whose first `due` machines (all if None) are due; return its inventory's path."""
    path = folder / "inventory.yml"
    fleet = Fleet(fleet_folder(path))
    fleet.folder.mkdir(parents=True)
    machines, guest_dom0s = {}, {}
    for number, name in enumerate(machine_names(hosts)):
        fleet.add(new_machine(name, guests, due=due is None or number < due))
        net = f"10.{number // 250}.{number % 250}"
        slots = {
            slot: {
                "name": f"{name}-{slot}",
                "address": f"{net}.{place}/16",
                "gateway": "10.255.0.1",
                "mac": f"00:16:3e:{number // 256:02x}:{number % 256:02x}:0{slot}",
            }
            for place, slot in enumerate("ab", 1)
        }
        machines[name] = {"simulated_machine": name, "simulated_place": name, "vmbeam_slots": slots}
        for slot in slots.values():
            guest_dom0s[slot["name"]] = {"simulated_machine": name, "simulated_place": slot["name"]}
    shared = {
        "ansible_connection": "simulated",
        "ansible_python_interpreter": "/usr/bin/python3",
        "simulated_fleet": str(fleet.folder),
        "vmbeam_host_vm_memory_mb": host_vm_memory_mb(guests),
        "vmbeam_host_vm_vcpus": 4,
    }
    document = {
        "all": {
            "hosts": {
                "localhost": {
                    "ansible_connection": "local",
                    "ansible_python_interpreter": "{{ ansible_playbook_python }}",
                }
            },
            "children": {
                "vmbeam_hosts": {"hosts": machines, "vars": shared},
                "vmbeam_guest_dom0s": {"hosts": guest_dom0s, "vars": shared},
            },
        }
    }
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path
