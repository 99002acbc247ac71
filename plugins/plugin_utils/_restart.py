# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What is to be started again after a machine was shut down or rebooted, or a host VM of it was lost in another way.

The host dom0's record (vmbeam.xen.guest_record) says which guests there were; here it is compared with what runs.
"""

from __future__ import annotations

from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._guest import BY_ID, name_in
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm_disk import is_stable
from ansible_collections.vmbeam.xen.plugins.plugin_utils._moments import iso
from ansible_collections.vmbeam.xen.plugins.plugin_utils._observation import SLOTS, guest_name, slot_view
from ansible_collections.vmbeam.xen.plugins.plugin_utils._preflight import new_problem

UNCONFIGURED = "its configuration is recorded nowhere"

NOTHING: dict[str, Any] = {
    "host_vm": None,
    "slot": None,
    "start": False,
    "generation": None,
    "guests": [],
    "unknown": [],
    "configurations": [],
    "disks": [],
    "leftovers": [],
    "close_run": False,
    "up_again": False,
    "steps": [],
}


def restart(observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be done so that one host VM runs with all guests, each once; empty `steps` if nothing is.

    - host_vm, slot: the host VM that gets them: the one that runs; if none does, the one that had the newest generation
      (or that of `destination_slot`), in which a rejuvenation that was under way would have ended
    - start, generation: whether it is to be started, and as which generation
    - guests: [{name, config, disks: [{id, path, target}]}] to be started there: they ran when they were last seen, in a
      host VM that is lost, and run nowhere
    - unknown: [{name, why}] guests that would be among these if it were known how to start them
    - configurations: [{path, content}] to be put back, of guests to be started and of such as did not run
    - disks: [{id, path}] further ones to be attached: of guests that did not run
    - leftovers: names of other host VMs of which only files are left
    - close_run: whether the machine's record says that a run is under way, which is over then
    - up_again: whether it says that guests were stopped for a reboot, which is over then; they may be missing in a host
      VM that was not

    A machine on which both host VMs run, or whose only one does not answer, is none for this.
    """
    slots = {slot: slot_view(slot, observed, settings) for slot in SLOTS}
    existing = [slots[slot] for slot in SLOTS if slots[slot]["exists"]]
    record = observed.get("guest_record") or []
    identities = {(slot["name"], slot["generation"]) for slot in existing}
    lost = [entry for entry in record if (entry["host_vm"], entry["generation"]) not in identities]
    leftovers = [slot for slot in slots.values() if not slot["exists"] and slot["generation"] is not None]
    state = observed.get("state") or {}
    stopped = (state.get("down") or {}).get("guests") or []
    if len(existing) == 2 or not (lost or leftovers or stopped) or (existing and not existing[0]["reachable"]):
        return NOTHING
    if not existing and not lost:
        return NOTHING
    target = existing[0] if existing else _chosen(slots, lost, settings)
    if target is None:
        return NOTHING

    run = state.get("run") or {}
    runs = _last_known(lost) | dict.fromkeys(stopped, True)
    # Where such a guest was the record need not say: it is written before guests move, and after.
    if {run.get("source"), run.get("destination")} & {slot["name"] for slot in leftovers}:
        runs |= dict.fromkeys(_names_of(run), True)
    known = _configs(record)
    here = {guest_name(guest["name"]) for guest in target["guests"]}
    configured = {name_in(file["content"]): file for file in target["configurations"]}
    paths = {disk: path for entry in record for disk, path in entry["disks"].items()}
    attached = {disk["id"]: disk["path"] for disk in target["disks"]}
    paths |= attached

    result = dict(NOTHING, host_vm=target["name"], slot=target["slot"], start=not existing)
    for kind in ("guests", "unknown", "configurations", "disks"):
        result[kind] = []
    for name in sorted(runs.keys() - {*(settings.get("confirm_gone") or [])} - here):
        guest = known.get(name, {"disks": [], "config": None})
        # One that a person has put there since is right.
        config = configured.get(name) or guest["config"]
        if config and name not in configured:
            result["configurations"].append(config)
        if not runs[name]:
            continue
        why = UNCONFIGURED if not config else _disk_problem(guest["disks"], paths, attached)
        if why:
            result["unknown"].append({"name": name, "why": why})
            continue
        disks = [{"id": disk, "path": paths[disk], "target": BY_ID + disk} for disk in guest["disks"]]
        result["guests"].append({"name": name, "config": config, "disks": disks})
    taken = {disk["id"] for guest in result["guests"] for disk in guest["disks"]}
    idle = {
        disk: path for entry in lost for disk, path in entry["disks"].items() if disk not in taken | attached.keys()
    }
    result["disks"] = [{"id": disk, "path": path} for disk, path in sorted(idle.items())]
    # While anything is missing, nothing is put away.
    whole = not result["unknown"]
    result["leftovers"] = [slot["name"] for slot in leftovers if slot["name"] != target["name"]] if whole else []
    if result["start"]:
        generations = [slot["generation"] or 0 for slot in slots.values()]
        result["generation"] = max([*generations, *(entry["generation"] for entry in record)]) + 1
    result["up_again"] = bool(stopped) and whole
    # A repair that was itself cut may have left only that the run is over.
    over = run and result["leftovers"]
    if not over and not any(
        result[kind] for kind in ("start", "guests", "unknown", "configurations", "disks", "up_again")
    ):
        return NOTHING
    # What a run has left paused is repaired next, which needs the record of the run.
    paused = {
        guest_name(guest["name"]) for guest in target["guests"] if guest.get("state") not in ("running", "blocked")
    }
    result["close_run"] = bool(run) and whole and not paused & set(_names_of(run))
    result["steps"] = _steps(result)
    return result


def foreseen(observed: dict[str, Any], planned: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the observation as it would be after a restart, for check mode. `planned` is what restart() returned."""
    target = slot_view(planned["slot"], observed, settings)
    host_vm = {
        "name": target["name"],
        "domid": 0,
        "state": "running",
        "slot": planned["slot"],
        "memory_mb": target["memory_mb"],
        "generation": planned["generation"] if planned["start"] else target["generation"],
        "created": iso(observed["now"]) if planned["start"] else target["created"],
        "image_sha256": observed["image"].get("sha256") if planned["start"] else target["image_sha256"],
        "disks": target["disks"] + planned["disks"] + [disk for guest in planned["guests"] for disk in guest["disks"]],
    }
    dom0 = {
        "reachable": True,
        "error": "",
        "guests": target["guests"] + [dict(guest, state="running") for guest in planned["guests"]],
        "hypervisor": target["hypervisor"],
        "configurations": target["configurations"] + planned["configurations"],
        "zero_copy": target["zero_copy"],
    }
    gone = {target["name"], *planned["leftovers"]}
    state = observed.get("state") or {}
    over = {"run": None} if planned["close_run"] else {}
    if planned["up_again"]:
        over["down"] = None
    return {
        **observed,
        "host_vms": [*(vm for vm in observed["host_vms"] if vm["name"] not in gone), host_vm],
        "guest_dom0s": {planned["slot"]: dom0},
        "state": state | over,
        "guest_record": [],
    }


def seen(
    observed: dict[str, Any], settings: dict[str, Any], plan: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return what vmbeam.xen.guest_record is told of the host VMs whose guest dom0s answered.

    With a plan of which all moves are done, the guests are where they were to go.
    """
    result = []
    for slot in (slot_view(slot, observed, settings) for slot in SLOTS):
        if not (slot["exists"] and slot["reachable"]):
            continue
        guests = slot["guests"]
        if plan:
            stays = slot["name"] == plan["source"]["name"]
            guests = [dict(guest, state="running") for guest in plan["guests"] if (guest["step"] == "leave") == stays]
        told = [
            {"name": guest["name"], "state": guest.get("state"), "disks": guest.get("disks") or []} for guest in guests
        ]
        result.append({"name": slot["name"], "guests": told, "configurations": slot["configurations"]})
    return result


def none_runs(observed: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the problem of a machine on which no host VM runs."""
    slots = [slot_view(slot, observed, settings) for slot in SLOTS]
    message = f"no host VM runs (neither {' nor '.join(slot['name'] for slot in slots)})"
    planned = restart(observed, settings)
    if planned["steps"]:
        names = [guest["name"] for guest in planned["guests"] + planned["unknown"]]
        return new_problem(
            "host VM",
            f"{message}, and {', '.join(names) if names else 'no guest'} ran when one did: was the machine rebooted?",
            "playbooks/repair.yml starts one with its guests (--check shows how)",
        )
    left = [slot for slot in slots if slot["generation"] is not None]
    if left:
        newest = max(left, key=lambda slot: int(slot["generation"]))
        return new_problem(
            "host VM",
            f"{message}; {newest['name']} was lost, as by a reboot of the machine, and it is not recorded which guests "
            "it had: only its disk tells",
            f"keep that disk and start a fresh one: playbooks/host_vm.yml -e vmbeam_slot={newest['slot']} "
            "-e vmbeam_previous_disk=keep; the README of role rejuvenate says how to get at the configurations in it",
        )
    return new_problem("host VM", message, "start the first one: playbooks/host_vm.yml")


def missing(observed: dict[str, Any], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the problem of a machine on which guests of a host VM that is lost run nowhere; none if there are none."""
    planned = restart(observed, settings)
    names = [guest["name"] for guest in planned["guests"] + planned["unknown"]]
    if planned["start"] or not names:
        return []
    when = "before a reboot that was cut" if (observed.get("state") or {}).get("down") else "in a host VM that is lost"
    return [
        new_problem(
            "missing guests",
            f"{', '.join(names)} ran {when}, and run nowhere now",
            f"playbooks/repair.yml starts them in {planned['host_vm']} (--check shows how); those that were stopped on "
            "purpose are named with -e vmbeam_confirm_gone",
        )
    ]


def _chosen(
    slots: dict[str, dict[str, Any]], lost: list[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the slot whose host VM is started if none runs; None if none of the slots had one."""
    newest = {slot["name"]: slot["generation"] or 0 for slot in slots.values()}
    for entry in lost:
        if entry["host_vm"] in newest:
            newest[entry["host_vm"]] = max(newest[entry["host_vm"]], entry["generation"])
    if not any(newest.values()):
        return None
    if settings.get("destination_slot"):
        return slots[settings["destination_slot"]]
    return max(slots.values(), key=lambda slot: newest[slot["name"]])


def _disk_problem(disks: list[str], paths: dict[str, str], attached: dict[str, str]) -> str | None:
    """Return why a guest with these disks cannot be given them, None if it can."""
    pathless = [disk for disk in disks if disk not in paths]
    if pathless:
        return f"it is not recorded where its disk {', '.join(pathless)} is"
    moved = [paths[disk] for disk in disks if disk not in attached and not is_stable(paths[disk])]
    return f"{', '.join(moved)} may be another disk since: attach the right one" if moved else None


def _last_known(lost: list[dict[str, Any]]) -> dict[str, bool]:
    """Return the guests of lost host VMs, and whether they ran in any of them."""
    runs: dict[str, bool] = {}
    for entry in lost:
        for guest in entry["guests"]:
            runs[guest["name"]] = runs.get(guest["name"], False) or guest["runs"]
    return runs


def _names_of(run: dict[str, Any]) -> list[str]:
    """Return the guests of a run that was cut, those too that it had shut down."""
    return [*(run.get("guests") or []), *(guest["name"] for guest in run.get("cold") or [])]


def _configs(record: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is known best of each guest: of a host VM in which it ran, and that was seen last."""
    best: dict[str, tuple[tuple[bool, bool, str], dict[str, Any]]] = {}
    for entry in record:
        for guest in entry["guests"]:
            rank = (guest["config"] is not None, bool(guest["runs"]), str(entry["noted"]))
            if guest["name"] not in best or rank > best[guest["name"]][0]:
                best[guest["name"]] = (rank, guest)
    return {name: guest for name, (_rank, guest) in best.items()}


def _steps(planned: dict[str, Any]) -> list[str]:
    name = planned["host_vm"]
    steps = []
    if planned["start"]:
        steps.append(
            f"start {name} (generation {planned['generation']}) from the golden image; the disk of the lost one, if it "
            "is there, is moved aside"
        )
    steps += [f"attach disk {disk['id']}, whose guest did not run, to {name}" for disk in planned["disks"]]
    steps += [f"put {file['path']} back into {name}" for file in planned["configurations"]]
    steps += [f"start {guest['name']} in {name}, {len(guest['disks'])} disk(s) with it" for guest in planned["guests"]]
    steps += [f"leave {guest['name']} to a person: {guest['why']}" for guest in planned["unknown"]]
    steps += [f"move the disk of {leftover}, which is lost, aside" for leftover in planned["leftovers"]]
    if planned["close_run"]:
        steps.append("record that the run that was under way is over")
    if planned["up_again"]:
        steps.append("record that the guests that were stopped for a reboot run again")
    return steps
