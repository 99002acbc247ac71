"""A machine that is not there: what its host dom0 and guest dom0s would answer, with its state in a file.

Only what the playbooks need of a machine is simulated: host VMs, guests, disks, sessions, files. Nothing takes time,
and nothing is checked that a module would check. What a call changed is in the machine's journal, so that a run can be
judged by what happened to the machines and not by what the controller says of it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import signal
import typing

State = dict[str, typing.Any]
Answer = dict[str, typing.Any]

IMAGE = "/var/lib/vmbeam/images/guest-hypervisor.raw"
IMAGE_SHA256 = hashlib.sha256(b"golden image").hexdigest()
GUEST_MEMORY_MB = 1024
#: Some of what module aging_info reads in a guest dom0.
INDICATORS = (
    "hypervisor_free_memory",
    "toolstack_latency",
    "highest_domid",
    "xenstore_nodes",
    "xenstored_memory",
    "dom0_available_memory",
    "dom0_threads",
    "dom0_open_files",
    "disk_free_root",
    "uptime",
)
HYPERVISOR = {"version": "4.17.5", "extra": ".5", "nr_cpus": 16}
#: Long ago: a host VM that was created then is due.
BEGINNING = "2025-01-01T00:00:00+00:00"


def host_vm_memory_mb(guests: int) -> int:
    """Return the memory of a host VM that has room for so many guests."""
    return 4096 + guests * (GUEST_MEMORY_MB + 64)


def new_machine(name: str, guests: int, *, due: bool = True) -> State:
    """Return a machine with a host VM in slot a that has so many guests, and that is old if it is due."""
    names = [_guest_name(name, number) for number in range(1, guests + 1)]
    memory = host_vm_memory_mb(guests)
    return {
        "name": name,
        "memory_mb": 2 * memory + 8192,
        "host_vms": {
            f"{name}-a": _host_vm("a", 1, memory, BEGINNING if due else _now())
            | {"guests": names, "disks": {_disk(guest): _path(guest) for guest in names}}
        },
        "configurations": [
            {"path": f"/etc/xen/guests/{guest}.cfg", "content": f'name = "{guest}"\nmemory = {GUEST_MEMORY_MB}\n'}
            for guest in names
        ],
        "files": {f"{IMAGE}.sha256": f"{IMAGE_SHA256}  guest-hypervisor.raw\n"},
        "sessions": [],
        "next_session": 1,
        "next_domid": 2,
        "calls": {},
        "journal": [],
        "lock": None,
        "fault": None,
    }


def _host_vm(slot: str, generation: int, memory_mb: int, created: str) -> State:
    return {
        "slot": slot,
        "generation": generation,
        "memory_mb": memory_mb,
        "created": created,
        "domid": 1,
        "guests": [],
        "disks": {},
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _guest_name(machine: str, number: int) -> str:
    return f"{machine}-g{number:02}"


def _disk(guest: str) -> str:
    return f"{guest}-root"


def _path(guest: str) -> str:
    return f"/dev/vg0/{_disk(guest)}"


class Fleet:
    """The machines' states, each in a file of its own below `folder`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def add(self, state: State) -> None:
        """Add a machine, or replace it."""
        (self.folder / f"{state['name']}.json").write_text(json.dumps(state))

    def read(self, machine: str) -> State:
        """Return the state of a machine."""
        return typing.cast(State, json.loads((self.folder / f"{machine}.json").read_text()))

    def machines(self) -> list[State]:
        """Return the states of all machines, by name."""
        return [self.read(path.stem) for path in sorted(self.folder.glob("*.json"))]

    def set_fault(self, machine: str, kind: str | None, guest: int = 1) -> None:
        """Have the migration of a machine's guest (counted from one) go wrong, or with None go well.

        :param kind: fails: always, and nothing happens; kills: the controller is killed once, after the migration
        """
        with self._opened(machine) as state:
            state["fault"] = {"kind": kind, "guest": _guest_name(machine, guest)} if kind else None

    def call(self, machine: str, place: str, module: str, arguments: Answer) -> Answer:
        """Answer a module that is run in `place`: a machine's host dom0 (its name) or a guest dom0 (its host VM's).

        Kills this process's parent, the controller, if the machine's fault wants that.

        :raises ConnectionError: the place does not run
        """
        with self._opened(machine) as state:
            fault = state["fault"] if module == "guest_migrate" and not arguments.get("_ansible_check_mode") else None
            kind = fault["kind"] if fault and fault["guest"] == arguments["name"] else None
            state["calls"][module] = state["calls"].get(module, 0) + 1
            if kind == "fails":
                return {"failed": True, "msg": "injected failure", "location": "source", "migration": {}}
            if kind == "kills":
                state["fault"] = None
            answer = _answer(state, place, module, arguments)
        if kind == "kills":
            os.kill(os.getppid(), signal.SIGKILL)
        return answer

    def upload(self, machine: str, path: str, content: str) -> None:
        """Put a file into the host dom0 of a machine."""
        with self._opened(machine) as state:
            state["files"][path] = content

    @contextlib.contextmanager
    def _opened(self, machine: str) -> typing.Iterator[State]:
        with open(self.folder / f"{machine}.json", "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            state = json.load(file)
            try:
                yield state
            finally:
                file.seek(0)
                file.write(json.dumps(state))
                file.truncate()


def _answer(state: State, place: str, module: str, arguments: Answer) -> Answer:
    if place != state["name"] and place not in state["host_vms"]:
        raise ConnectionError(f"{place} does not run")
    function = _MODULES.get(module)
    if function is None:
        return {"failed": True, "msg": f"module {module} is not simulated: add it to benchmarks/fleet/simulation.py"}
    return {"changed": False} | function(state, place, arguments)


def _ping(_state: State, _place: str, _arguments: Answer) -> Answer:
    return {"ping": "pong"}


def _nothing(_state: State, _place: str, _arguments: Answer) -> Answer:
    return {}


def _host_vm_info(state: State, _place: str, arguments: Answer) -> Answer:
    used = sum(host_vm["memory_mb"] for host_vm in state["host_vms"].values())
    image = arguments.get("image")
    storage = (
        {"image": {"path": image, "exists": True, "sha256": IMAGE_SHA256}, "free_disk_mb": 500000} if image else {}
    )
    return {
        **storage,
        "host_vms": [
            _describe(name, host_vm)
            for name, host_vm in sorted(state["host_vms"].items())
            if arguments.get("name") in (None, name)
        ],
        "guest_record": [],
        "hypervisor": HYPERVISOR
        | {"total_memory_mb": state["memory_mb"], "free_memory_mb": state["memory_mb"] - used - 2048},
    }


def _describe(name: str, host_vm: State) -> Answer:
    return {
        "name": name,
        "state": "running",
        "vcpus": 4,
        "image_sha256": IMAGE_SHA256,
        **{key: host_vm[key] for key in ("domid", "memory_mb", "slot", "generation", "created")},
        "disks": [{"id": disk, "path": path} for disk, path in host_vm["disks"].items()],
    }


def _guest_info(state: State, place: str, arguments: Answer) -> Answer:
    host_vm = state["host_vms"].get(place)
    if host_vm is None:  # the host dom0, whose guests are the host VMs
        total, names = state["memory_mb"], sorted(state["host_vms"])
    else:
        total, names = host_vm["memory_mb"], host_vm["guests"]
    answer: Answer = {
        "guests": [
            _guest(name, number) for number, name in enumerate(names, 1) if arguments.get("name") in (None, name)
        ],
        "hypervisor": HYPERVISOR
        | {"total_memory_mb": total, "free_memory_mb": total - 2048 - len(names) * (GUEST_MEMORY_MB + 16)},
    }
    if arguments.get("config_directory"):
        answer["configurations"] = state["configurations"]
    return answer


def _guest(name: str, domid: int) -> Answer:
    return {
        "name": name,
        "domid": domid,
        "uuid": hashlib.sha256(name.encode()).hexdigest()[:32],
        "state": "blocked",
        "type": "pvh",
        "memory_mb": GUEST_MEMORY_MB,
        "vcpus": 1,
        "cpu_time": 41.7,
        "disks": [
            {"id": _disk(name), "target": f"/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_{_disk(name)}", "vdev": "xvda"}
        ],
        "nics": [{"mac": "00:16:3e:00:02:01", "bridge": "xenbr0"}],
    }


def _host_vm_module(state: State, _place: str, arguments: Answer) -> Answer:
    name, there = arguments["name"], state["host_vms"]
    if arguments.get("state", "started") == "absent":
        gone = there.pop(name, None)
        if gone:
            state["journal"].append(["destroy", name, gone["guests"]])
            state["sessions"] = [session for session in state["sessions"] if name not in session["pair"]]
        return {"changed": gone is not None, "host_vm": None}
    if name in there:
        return {"host_vm": _describe(name, there[name])}
    there[name] = _host_vm(arguments["slot"], arguments.get("generation") or 1, int(arguments["memory_mb"]), _now())
    there[name]["domid"] = state["next_domid"]
    state["next_domid"] += 1
    state["journal"].append(["start", name])
    return {"changed": True, "host_vm": _describe(name, there[name])}


def _host_vm_disk(state: State, place: str, arguments: Answer) -> Answer:
    if "lock" in arguments and (kept := _host_lock(state, place, {**arguments["lock"], "state": "kept"})).get("failed"):
        return kept
    name, disk = arguments["host_vm"], arguments["disk"]
    disks = state["host_vms"][name]["disks"]
    if arguments.get("state", "attached") == "attached":
        changed, path = disks.get(disk) != arguments["path"], arguments["path"]
        disks[disk] = path
    else:
        changed, path = disks.pop(disk, None) is not None, None
    return {"changed": changed, "disk": {"host_vm": name, "id": disk, "path": path, "state": arguments.get("state")}}


def _guest_passage(state: State, place: str, arguments: Answer) -> Answer:
    kept = _host_lock(state, place, {**arguments["lock"], "state": "kept"})
    if kept.get("failed"):
        return kept
    there = state["host_vms"][arguments["destination"]]["disks"]
    changed = not arguments["disks"].items() <= there.items()
    there.update(arguments["disks"])
    pair = {key: arguments[key] for key in ("source", "destination")}
    bound = [
        _zero_copy_session(state, place, {**pair, "purpose": purpose, "count": count})
        for purpose, count in (("channel", int(arguments["channel"])), ("guest", arguments["sessions"]))
    ]
    channel = (bound[0]["sessions"] or [None])[0]
    changed |= any(answer["changed"] for answer in bound)
    return {"changed": changed, "sessions": bound[1]["sessions"], "channel": channel}


def _zero_copy_session(state: State, _place: str, arguments: Answer) -> Answer:
    pair = [arguments["source"], arguments["destination"]]
    channel = arguments.get("purpose", "guest") == "channel"
    there = [session for session in state["sessions"] if [session["pair"], session["channel"]] == [pair, channel]]
    if arguments.get("state", "bound") == "absent":
        state["sessions"] = [session for session in state["sessions"] if session not in there]
        return {"changed": bool(there), "sessions": there}
    count = int(arguments.get("count", 1))
    missing = range(count - len(there))
    for _ in missing:
        there.append({"session": state["next_session"], "state": "open", "pair": pair, "channel": channel})
        state["sessions"].append(there[-1])
        state["next_session"] += 1
    return {"changed": bool(missing), "sessions": there[:count]}


def _guest_migrate(state: State, place: str, arguments: Answer) -> Answer:
    guest, here = arguments["name"], state["host_vms"][place]
    destination = next((name for name in state["host_vms"] if name != place), None)
    report = {
        "guest": guest,
        "strategy": arguments.get("strategy", "precopy"),
        "seconds": 3.8,
        "downtime_seconds": 1.1,
        "bytes": 131072,
        "phases": {"connect": 0.4, "memory": 1.2, "state": 0.7, "hand_over": 0.1, "start": 0.3, "clean_up": 1.1},
        "memory": {"session": arguments.get("session"), "pages_passed_on": 262144, "pages_copied": 0, "hypercalls": 24},
        "repairs": [],
        "log_tail": [],
    }
    moves = guest in here["guests"]
    if destination is None:
        return {"failed": True, "msg": "there is no destination", "location": "source", "migration": report}
    if moves and not arguments.get("_ansible_check_mode"):
        if _disk(guest) not in state["host_vms"][destination]["disks"]:
            return {"failed": True, "msg": "the disk is not there", "location": "source", "migration": report}
        here["guests"].remove(guest)
        state["host_vms"][destination]["guests"].append(guest)
        state["journal"].append(["move", guest, destination])
        for session in state["sessions"]:
            if session["session"] == arguments.get("session"):
                state["sessions"].remove(session)
                break
    return {"changed": moves, "location": "destination", "migration": report}


def _host_lock(state: State, _place: str, arguments: Answer) -> Answer:
    held, owner = state["lock"], arguments["owner"]
    ours = held is not None and held["owner"] == owner
    if arguments.get("state", "present") == "absent":
        state["lock"] = None if ours else held
        return {"holder": state["lock"]}
    if arguments.get("state") == "kept" and not ours:
        return {"failed": True, "msg": f"not reserved for {owner} any more", "holder": held}
    if held and not ours and held["owner"] != arguments.get("takeover"):
        return {"failed": True, "msg": f"reserved by {held['owner']}", "holder": held}
    times = {"since": _now(), "age_seconds": 1.0, "expires_in_seconds": 3600.0, "expired": False}
    state["lock"] = held if ours else {"owner": owner, "details": arguments.get("details", {}), **times}
    return {"holder": state["lock"], "previous": held["owner"] if held and not ours else None}


def _stat(state: State, _place: str, arguments: Answer) -> Answer:
    path = arguments["path"]
    if path == IMAGE:
        return {"stat": {"exists": True, "isdir": False, "mtime": 1.0, "size": 1 << 31, "inode": 7}}
    content = state["files"].get(path)
    if content is None:
        return {"stat": {"exists": False}}
    checksum = hashlib.sha1(content.encode()).hexdigest()  # noqa: S324 - what Ansible compares files by
    return {
        "stat": {
            "exists": True,
            "isdir": False,
            "islnk": False,
            "mtime": 2.0,
            "size": len(content),
            "inode": 8,
            "checksum": checksum,
        }
    }


def _slurp(state: State, _place: str, arguments: Answer) -> Answer:
    content = state["files"].get(arguments.get("src") or arguments.get("path"))
    if content is None:
        return {"failed": True, "msg": "file not found"}
    return {"content": base64.b64encode(content.encode()).decode(), "encoding": "base64"}


def _copy(state: State, _place: str, arguments: Answer) -> Answer:
    state["files"][arguments["dest"]] = state["files"].pop(arguments["src"])
    return {"changed": True, "dest": arguments["dest"]}


def _command(state: State, _place: str, arguments: Answer) -> Answer:
    words = arguments.get("argv") or (arguments.get("cmd") or arguments["_raw_params"]).split()
    lines: list[str] = []
    created = arguments.get("creates")
    if words[0] == "df":
        lines = ["Avail", "500000"]
    elif words[0] == "ssh-keygen":
        if created in state["files"]:
            return {"rc": 0, "stdout": f"skipped, since {created} exists", "stderr": ""}
        state["files"][created] = "key"
    elif words[:2] == ["for", "lock"]:  # role rejuvenate waits for migrations: there is none
        pass
    elif words[:2] == ["for", "key"]:  # role host_vm reads the keys, one line each
        key = base64.b64encode(b"ssh-ed25519 " + b"A" * 68 + b" key\n").decode()
        lines = [key] * (words.index(next(word for word in words if word.endswith(";"))) - 2)
    elif words[0] == "grep":
        lines = ["ssh-ed25519 " + "A" * 68 + " operator"]
    else:
        return {"failed": True, "rc": 1, "msg": f"command {words[0]} is not simulated", "stdout": "", "stderr": ""}
    return {"changed": True, "rc": 0, "stdout": "\n".join(lines), "stderr": "", "cmd": words}


def _audit_entry(_state: State, _place: str, _arguments: Answer) -> Answer:
    return {"changed": True}


def _aging_info(_state: State, _place: str, _arguments: Answer) -> Answer:
    indicator = {"value": 612.4, "unit": "MiB", "limit": 849.2, "direction": "down", "exhausted_at": 0.0}
    return {"time": 1762419731.25, "indicators": [{"name": name} | indicator for name in INDICATORS]}


def _zero_copy_info(_state: State, _place: str, _arguments: Answer) -> Answer:
    return {"capable": True, "channel_version": 3, "sessions": []}


_MODULES: dict[str, typing.Callable[[State, str, Answer], Answer]] = {
    "aging_info": _aging_info,
    "audit_entry": _audit_entry,
    "command": _command,
    "copy": _copy,
    "file": _nothing,
    "guest_info": _guest_info,
    "guest_migrate": _guest_migrate,
    "guest_passage": _guest_passage,
    "guest_record": _nothing,
    "host_lock": _host_lock,
    "host_vm": _host_vm_module,
    "host_vm_disk": _host_vm_disk,
    "host_vm_info": _host_vm_info,
    "ping": _ping,
    "slurp": _slurp,
    "stat": _stat,
    "wait_for": _nothing,
    "wait_for_gate": _nothing,
    "wait_for_guest": _nothing,
    "wait_for_xen": _nothing,
    "zero_copy_info": _zero_copy_info,
    "zero_copy_session": _zero_copy_session,
}
