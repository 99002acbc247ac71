#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# WANT_JSON: Ansible hands the arguments over in a file, and leaves the module as it is.
"""Stand-ins for the modules that act on Xen: a machine is a JSON file (see test_rejuvenate_role.py).

Copied under the name of each module. The dom0 that a module runs in is known by its remote_tmp.
"""

import fcntl
import json
import os
import sys

NAME = "@NAME@"
FOLDER = "@FOLDER@"
HYPERVISOR = {"version": "4.17.5", "total_memory_mb": 4096}


class Failed(Exception):
    def __init__(self, message, **details):
        super().__init__(message)
        self.details = details


def call(world, *words):
    world["calls"].append(" ".join(str(word) for word in words))


def host_vm_info(world, _me, _options, _check):
    host_vms = [
        {"name": name, "state": "running", "image_sha256": None, **vm} for name, vm in world["host_vms"].items()
    ]
    return {"host_vms": host_vms, "hypervisor": {**HYPERVISOR, "free_memory_mb": 16384}}


def host_vm(world, _me, options, _check):
    name = options["name"]
    if (name in world["host_vms"]) == (options["state"] != "absent"):
        return {"changed": False}
    call(world, NAME, name, options["state"])
    if options["state"] == "absent":
        vm = world["host_vms"].pop(name)
        if vm["guests"]:
            raise Failed(f"the test would have lost {list(vm['guests'])}")
    else:
        world["host_vms"][name] = {
            "domid": 9,
            "slot": options["slot"],
            "generation": options["generation"],
            "created": "2023-11-01T00:00:00+00:00",
            "memory_mb": 4096,
            "disks": [],
            "guests": {},
            **world["next_host_vm"],
        }
    return {"changed": True}


def host_vm_disk(world, _me, options, _check):
    vm, disk = world["host_vms"][options["host_vm"]], options["disk"]
    others = [entry for entry in vm["disks"] if entry["id"] != disk]
    changed = (len(others) == len(vm["disks"])) == (options["state"] == "attached")
    vm["disks"] = others + ([{"id": disk, "path": options.get("path")}] if options["state"] == "attached" else [])
    return {"changed": changed}


def guest_info(world, me, options, _check):
    if me not in world["host_vms"]:
        return {"guests": [{"name": name} for name in world["host_vms"]], "hypervisor": HYPERVISOR}
    guests = [{"name": name, **guest} for name, guest in world["host_vms"][me]["guests"].items()]
    return {
        "guests": [guest for guest in guests if options.get("name") in (None, guest["name"])],
        "hypervisor": {**HYPERVISOR, "free_memory_mb": 4096 - sum(guest["memory_mb"] for guest in guests)},
        "configurations": [
            {"path": f"/etc/xen/guests/{name}.cfg", "content": f'name = "{name}"\n'} for name in world["configured"]
        ],
    }


def guest(world, me, options, _check):
    world["host_vms"][me]["guests"][options["name"]]["state"] = options["state"]
    return {"changed": True}


def guest_migrate(world, me, options, check):
    name, strategy = options["name"], options["strategy"]
    there = world["addresses"][options["destination"]]
    here, moved = world["host_vms"][me]["guests"], world["host_vms"][there]["guests"]
    location = "destination" if name in moved else "source" if name in here else "nowhere"
    if strategy == "zero_copy" and world["host_vms"][there].get("zero_copy") is False:
        raise Failed("zero-copy is not offered")
    if strategy == "cold" and not options.get("config"):
        raise Failed("config: needed")
    if not check and location != "destination":
        call(world, NAME, name, me, there, strategy)
        if f"{name} to {there}" in world["faults"]:
            raise Failed(f"{name} cannot go to {there}", location=location)
        if f"{name} down" in world["faults"]:
            world["stopped"][name] = here.pop(name)
            raise Failed(f"{name} was shut down, and it could not be started", location="nowhere")
        attached = {disk["id"] for disk in world["host_vms"][there]["disks"]}
        entry = here.pop(name, None) or world["stopped"].pop(name)
        if not attached >= {disk["id"] for disk in entry["disks"]}:
            raise Failed(f"a disk of {name} is not attached to {there}")
        moved[name] = {**entry, "state": "blocked"}
    return {
        "changed": location != "destination",
        "location": "destination",
        "migration": {"guest": name, "strategy": strategy, "seconds": 2.0, "downtime_seconds": 0.5},
        "diff": {"before": {"location": location}, "after": {"location": "destination"}},
    }


def zero_copy_info(world, me, _options, _check):
    return {"capable": world["host_vms"].get(me, {}).get("zero_copy") is not False, "sessions": []}


def zero_copy_session(_world, _me, options, _check):
    return {"changed": True, "sessions": [{"session": number} for number in range(options.get("count", 1))]}


def main():
    with open(sys.argv[1]) as file:
        options = json.load(file)
    me = os.path.realpath(sys.argv[0]).split(f"{FOLDER}/remote/")[1].split("/")[0]
    path = f"{FOLDER}/{me.split('-')[0]}.json"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(path) as file:
            world = json.load(file)
        try:
            result = globals()[NAME](world, me, options, options.get("_ansible_check_mode"))
        except Failed as exc:
            result = {"failed": True, "msg": exc.args[0], **exc.details}
        with open(path, "w") as file:
            json.dump(world, file)
    print(json.dumps(result))


main()
