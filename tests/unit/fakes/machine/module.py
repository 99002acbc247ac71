#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# WANT_JSON: Ansible hands the arguments over in a file, and leaves the module as it is.
"""Stand-ins for the modules that act on Xen: a machine is a JSON file (see test_rejuvenate_role.py).

Copied under the name of each module. The dom0 that a module runs in is known by its remote_tmp.
"""

import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

NAME = "@NAME@"
FOLDER = "@FOLDER@"
HYPERVISOR = {"version": "4.17.5", "total_memory_mb": 4096}


ME = os.path.realpath(sys.argv[0]).split(f"{FOLDER}/remote/")[1].split("/")[0]


class Failed(Exception):
    def __init__(self, message, **details):
        super().__init__(message)
        self.details = details


def call(world, *words):
    world["calls"].append(" ".join(str(word) for word in words))


def host_vm_info(world, _me, options, _check):
    host_vms = [
        {"name": name, "state": "running", "image_sha256": None, **vm} for name, vm in world["host_vms"].items()
    ]
    lost = [{"name": name, "domid": None, "state": "absent", "disks": [], **vm} for name, vm in world["lost"].items()]
    image = options.get("image")
    there = image and Path(image).exists()
    sha256 = hashlib.sha256(Path(image).read_bytes()).hexdigest() if there else None
    storage = {"image": {"path": image, "exists": there, "sha256": sha256}, "free_disk_mb": 500000} if image else {}
    return {
        **storage,
        "host_vms": host_vms + lost,
        "hypervisor": {**HYPERVISOR, "free_memory_mb": world.get("free_memory_mb", 16384)},
        "guest_record": [entry.as_dict() for entry in record().read()],
    }


def real(name):
    """A private part of the collection. By a statement, Ansible would take this file for a module of its own kind."""
    sys.path.insert(0, f"{FOLDER}/collections")
    return importlib.import_module(f"ansible_collections.vmbeam.xen.plugins.module_utils.{name}")


def record():
    """The real one, in a folder of the machine."""
    return real("_guest_record").GuestRecord(Path(f"{FOLDER}/{ME.split('-')[0]}-record"))


def guest_record(world, _me, options, check):
    look, renewed = real("_guest_record").look, real("_guest_record").renewed
    kept = record()
    before = kept.read()
    seen = []
    for one in options["host_vms"]:
        vm = world["host_vms"][one["name"]]
        disks = {disk["id"]: disk["path"] for disk in vm["disks"]}
        whole = (one["name"], vm["generation"])
        seen.append(look(whole, "2023-11-01", disks, one["guests"], one["configurations"], before))
    running = {(name, vm["generation"]) for name, vm in world["host_vms"].items()}
    after = renewed(before, seen, running, options["gone"])
    if after != before and not check:
        kept.write(after)
    return {"changed": after != before}


def host_vm(world, _me, options, _check):
    name = options["name"]
    there = name in world["host_vms"] or (options["state"] == "absent" and name in world["lost"])
    if there == (options["state"] == "started"):
        return {"changed": False}
    call(world, NAME, name, options["state"])
    if options["state"] == "stopped":
        vm = world["host_vms"].pop(name)
        if vm["guests"]:
            raise Failed(f"the test would have lost {list(vm['guests'])}")
        world["lost"][name] = {key: vm[key] for key in ("slot", "generation", "created")}
        return {"changed": True}
    if options["state"] == "absent":
        if name in world["lost"]:
            assert options["previous_disk"] == "keep", options
            world["kept"].append(name)
            record().forget(name, world["lost"].pop(name)["generation"])
            return {"changed": True}
        vm = world["host_vms"].pop(name)
        record().forget(name, vm["generation"])
        if vm["guests"]:
            raise Failed(f"the test would have lost {list(vm['guests'])}")
    else:
        if name in world["lost"]:
            if options["previous_disk"] != "keep":
                raise Failed(f"{name} was lost, not removed")
            world["kept"].append(name)
            del world["lost"][name]
        world["host_vms"][name] = {
            "domid": 9,
            "slot": options["slot"],
            "generation": int(options["generation"]),
            "created": "2023-11-01T00:00:00+00:00",
            "memory_mb": 4096,
            "disks": [],
            "guests": {},
            "seed_files": options.get("seed_files"),
            **world["next_host_vm"],
        }
    return {"changed": True}


def keep_reserved(lock, check):
    try:
        real("_host_lock").keep_reserved(lock, check=check)
    except real("_errors").Conflict as exc:
        raise Failed(exc.message) from exc


def host_vm_disk(world, _me, options, check):
    keep_reserved(options.get("lock"), check)
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
            {"path": str(path), "content": path.read_text()}
            for path in sorted(Path(FOLDER, f"{me.split('-')[0]}-guests").glob("*.cfg"))
        ],
    }


def wait_for_xen(_world, _me, _options, _check):
    return {"changed": False}


def wait_for_guest(world, me, options, _check):
    name = options["name"]
    if f"{name} hangs in {me}" in world["faults"]:
        raise Failed(f"{name} shows no sign of life")
    return {"heartbeat": {"state": world["host_vms"][me]["guests"][name]["state"]}}


def guest(world, me, options, _check):
    vm, name = world["host_vms"][me], options["name"]
    if options["state"] == "absent" and not options.get("wait", True):
        call(world, NAME, name, me, "asked")
        return {"changed": True}
    if options["state"] == "absent":
        call(world, NAME, name, me, "absent")
        if f"{name} stays up" in world["faults"] and not options["force"]:
            raise Failed(f"{name} did not shut down")
        return {"changed": vm["guests"].pop(name, None) is not None}
    if name not in vm["guests"]:
        written = Path(options["config"]).read_text()
        call(world, NAME, name, me)
        if f"{name} start" in world["faults"]:
            raise Failed(f"{name} cannot be started")
        disks = [{"id": Path(disk).name, "target": disk} for disk in re.findall(rf"{FOLDER}/disks/[\w-]+", written)]
        if not {disk["id"] for disk in vm["disks"]} >= {disk["id"] for disk in disks}:
            raise Failed(f"a disk of {name} is not attached to {me}")
        vm["guests"][name] = {"state": "blocked", "type": "pvh", "memory_mb": 128, "vcpus": 1, "disks": disks}
        return {"changed": True}
    world["host_vms"][me]["guests"][options["name"]]["state"] = options["state"]
    return {"changed": True}


def guest_migrate(world, me, options, check):
    name, strategy = options["name"], options["strategy"]
    there = world["addresses"][options["destination"]]
    here, moved = world["host_vms"][me]["guests"], world["host_vms"][there]["guests"]
    if not check:
        mend(world, name, here, moved)
    location = "destination" if name in moved else "source" if name in here else "nowhere"
    if strategy == "zero_copy" and world["host_vms"][there].get("zero_copy") is False:
        raise Failed("zero-copy is not offered")
    if (options["transport"] == "channel") != (options.get("channel") is not None):
        raise Failed(f"channel: {options.get('channel')} for transport {options['transport']}")
    if options["transport"] == "channel" and channel_version(world, me) != channel_version(world, there):
        raise Failed("there is no channel that is up")
    if strategy == "cold" and not options.get("config"):
        raise Failed("config: needed")
    if not check and location != "destination":
        call(world, NAME, name, me, there, strategy)
        world.setdefault("transports", []).append(options["transport"])
        if f"{name} to {there}" in world["faults"]:
            raise Failed(f"{name} cannot go to {there}", location=location)
        subprocess.run(["sh", "-ec", world["along"].get(f"{name} to {there}", "")], check=True)
        if f"{name} on its way to {there}" in world["faults"]:
            raise Failed("the connection broke")
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


def mend(world, name, source, destination):
    """What a cut migration left of a guest, as the real module judges it."""
    if not {f"{name}--incoming", f"{name}--migratedaway"} & {*source, *destination}:
        return
    verdict = real("_migration_state").judge(name, *(sighting(name, guests) for guests in (source, destination)))
    if verdict.problem:
        raise Failed(verdict.problem, location=verdict.location)
    for repair in verdict.repairs:
        call(world, "mend", repair.verb, repair.domain.name, "at the", repair.side)
        guests = source if repair.side == "source" else destination
        # It may have been renamed just now.
        entry = guests.pop(repair.domain.name if repair.domain.name in guests else name)
        if repair.verb != "destroy":
            guests[name] = entry if repair.verb == "rename" else {**entry, "state": "blocked"}


def sighting(name, guests):
    flags = {"paused": "--p---", "suspended": "---ss-", "blocked": "-b----"}
    # One that is paused has not run yet.
    domains = [
        real("_parse").Domain(copy, 1, name, flags[entry["state"]], 128, 1, 0.0 if entry["state"] == "paused" else 9.0)
        for copy, entry in guests.items()
    ]
    return real("_migration_state").Sighting.of(name, domains)


def guest_passage(world, me, options, check):
    keep_reserved(options["lock"], check)
    for disk, path in options["disks"].items():
        values = {"host_vm": options["destination"], "disk": disk, "path": path, "state": "attached"}
        host_vm_disk(world, me, values, check)
    sessions = [{"session": number} for number in range(1, options["sessions"] + 1)]
    return {"changed": True, "sessions": sessions, "channel": {"session": 9} if options["channel"] else None}


def zero_copy_info(world, me, _options, _check):
    if f"{me} tells nothing of zero-copy" in world["faults"]:
        raise Failed("xl info failed")
    capable = world["host_vms"].get(me, {}).get("zero_copy") is not False
    return {"capable": capable, "channel_version": channel_version(world, me), "sessions": []}


def channel_version(world, host_vm):
    return world["host_vms"].get(host_vm, {}).get("channel_version", 3)


def zero_copy_session(world, _me, options, check):
    if options.get("state") == "absent" and not check:
        call(world, NAME, options["source"], options["destination"], options.get("purpose", "guest"), "absent")
    return {"changed": True, "sessions": [{"session": number} for number in range(1, options.get("count", 1) + 1)]}


def boot(world, me, _options, check):
    """In place of ansible.builtin.reboot: what was in memory is gone, and what a host VM had in its disk."""
    if check:
        return {"changed": True}
    call(world, "reboot")
    if world["host_vms"]:
        raise Failed(f"the test would have lost {list(world['host_vms'])}")
    for gone in ("guests", "lock"):
        shutil.rmtree(f"{FOLDER}/{me}-{gone}")
    return {"changed": True, "rebooted": True}


def note(world, _me, options, check):
    """That a stand-in for a role was called."""
    if not check:
        call(world, options["words"])
    return {"changed": True}


def cut(world, when, options):
    """Whether the run is to be cut before or after this call; once."""
    words = [when, NAME, *(str(options[key]) for key in ("name", "host_vm", "disk", "state") if key in options)]
    if options.get("_ansible_check_mode") or world.get("cut") != " ".join(words):
        return False
    world["cut"] = ""
    return True


def kill_run():
    """Kill the ansible-playbook that called this, as losing its computer does: it has no time to tidy up."""
    process, found = os.getppid(), []
    while process > 1:
        # An interpreter and its script; not a shell that was told to run one.
        if Path(Path(f"/proc/{process}/cmdline").read_text().split("\0")[1]).name == "ansible-playbook":
            found.append(process)
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    for process in reversed(found):
        os.kill(process, signal.SIGKILL)


def main():
    with open(sys.argv[1]) as file:
        options = json.load(file)
    me = ME
    path = f"{FOLDER}/{me.split('-')[0]}.json"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(path) as file:
            world = json.load(file)
        ends = cut(world, "before", options)
        if not ends:
            try:
                result = globals()[NAME](world, me, options, options.get("_ansible_check_mode"))
            except Failed as exc:
                result = {"failed": True, "msg": exc.args[0], **exc.details}
            ends = cut(world, "after", options)
        with open(path, "w") as file:
            json.dump(world, file)
    if ends:
        kill_run()
    else:
        print(json.dumps(result))


main()
