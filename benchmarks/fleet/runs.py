"""Runs ansible-playbook on a simulated fleet: what it costs the controller, and what it does to the machines."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
import time
import typing

from . import inventory
from .simulation import Fleet, State

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
PLAYBOOK = ROOT / "playbooks" / "rejuvenate.yml"
LOOP = HERE / "loop.yml"
#: The machine, counted from one, and its guest at which a run fails or is killed.
EVENT_HOST, EVENT_GUEST = 3, 2


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to roll a fleet."""

    title: str
    path: pathlib.Path = PLAYBOOK
    variables: dict[str, typing.Any] = dataclasses.field(default_factory=dict)


def by_serial(serial: typing.Any) -> Method:
    """Return the method that is our playbook with vmbeam_serial."""
    return Method(f"serial {json.dumps(serial)}", variables={"vmbeam_serial": serial})


PLAIN_LOOP = Method("plain loop", LOOP)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run of ansible-playbook cost the controller."""

    seconds: float  #: from start to end
    cpu_seconds: float  #: of the process and all its children
    peak_mb: float  #: resident memory of the process, or of the largest of its children, in MiB
    code: int  #: exit code, that of the signal as a negative number


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Return the environment of a run whose files are below `folder`."""
    return os.environ | {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
        "ANSIBLE_CONNECTION_PLUGINS": str(HERE / "plugins" / "connection"),
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_RETRY_FILES_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }


def playbook(method: Method, hosts: pathlib.Path, forks: int) -> Cost:
    """Run a method's playbook on an inventory to its end, or until it is killed; the output goes to a file beside."""
    command = [
        "ansible-playbook",
        f"--inventory={hosts}",
        f"--forks={forks}",
        f"--extra-vars={json.dumps(method.variables)}",
        str(method.path),
    ]
    begin = time.monotonic()
    with (hosts.parent / "log").open("a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(hosts.parent), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen must not look for it
    return Cost(
        seconds=round(time.monotonic() - begin, 2),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 2),
        peak_mb=round(usage.ru_maxrss / 1024, 1),
        code=process.returncode,
    )


def times_done(machine: State) -> int:
    """Return how often a machine was rejuvenated: its host VMs count their generations from one."""
    return min((host_vm["generation"] for host_vm in machine["host_vms"].values()), default=1) - 1


def finished(machine: State) -> bool:
    """Return whether a machine was rejuvenated and is whole: one host VM, which has every guest and its disk."""
    wanted = {config["path"] for config in machine["configurations"]}
    host_vms = list(machine["host_vms"].values())
    return (
        times_done(machine) > 0
        and len(host_vms) == 1
        and {f"/etc/xen/guests/{guest}.cfg" for guest in host_vms[0]["guests"]} == wanted
        and len(host_vms[0]["disks"]) == len(wanted)
    )


def measure(method: Method, hosts: int, guests: int, forks: int) -> dict[str, typing.Any]:
    """Roll a new fleet; return what it cost, and the log's end as `problem` if it was not all done."""
    with tempfile.TemporaryDirectory(prefix="vmbeam-fleet-") as name:
        path = inventory.write(pathlib.Path(name), hosts, guests)
        cost = playbook(method, path, forks)
        machines = Fleet(inventory.fleet_folder(path)).machines()
        calls = sum(sum(machine["calls"].values()) for machine in machines)
        record = {
            "method": method.title,
            "hosts": hosts,
            "guests": guests,
            "forks": forks,
            **dataclasses.asdict(cost),
            "calls_per_host": round(calls / hosts, 1),
        }
        if cost.code or not all(map(finished, machines)):
            record["problem"] = (path.parent / "log").read_text()[-2000:]
        return record


def event(method: Method, kind: str, hosts: int, guests: int, forks: int) -> dict[str, typing.Any]:
    """Roll a new fleet in which one migration fails, or the controller is killed during it; then run the same again.

    :param kind: a kind of fault, see simulation.Fleet.call
    """
    with tempfile.TemporaryDirectory(prefix="vmbeam-fleet-") as name:
        path = inventory.write(pathlib.Path(name), hosts, guests)
        fleet, at = Fleet(inventory.fleet_folder(path)), inventory.machine_names(hosts)[EVENT_HOST - 1]
        fleet.set_fault(at, kind, EVENT_GUEST)
        first = playbook(method, path, forks)
        between = fleet.machines()
        fleet.set_fault(at, None)
        second = playbook(method, path, forks)
        after = fleet.machines()
    return {
        "method": method.title,
        "kind": kind,
        "hosts": hosts,
        "guests": guests,
        "forks": forks,
        "code": first.code,
        "done": sum(map(finished, between)),
        "begun_after": sum(bool(machine["journal"]) for machine in between[EVENT_HOST:]),
        "left": {host_vm: len(entry["guests"]) for host_vm, entry in between[EVENT_HOST - 1]["host_vms"].items()},
        "code_again": second.code,
        "done_again": sum(map(finished, after)),
        "done_twice": sum(times_done(machine) > 1 for machine in after),
    }
