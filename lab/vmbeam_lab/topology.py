"""Reads and checks the topology file (``lab/topology.yml``)."""

from __future__ import annotations

import dataclasses
import ipaddress
import pathlib
import typing

import yaml

from .errors import TopologyError

GUEST_TYPES = ("pvh", "hvm")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one host VM (L1) on a machine."""

    address: str
    mac: str
    cpus: str = ""  #: xl pin string, e.g. "1"; empty: no pinning


@dataclasses.dataclass(frozen=True)
class Guest:
    """A guest (L2) of the lab."""

    name: str
    type: str  #: one of GUEST_TYPES
    memory_mb: int
    vcpus: int
    address: str
    mac: str
    http_port: int  #: on 127.0.0.1, forwarded to the guest's port 80
    memory_writer_mb: int = 8  #: memory that a program keeps rewriting and verifying
    memory_writer_rate: int = 100  #: pages it rewrites a second


@dataclasses.dataclass(frozen=True)
class Machine:
    """A physical machine (L0), emulated by one QEMU process."""

    name: str
    memory_mb: int
    cpus: int
    ssh_port: int
    address: str
    mac: str
    host_dom0_memory_mb: int
    host_vm_memory_mb: int
    host_vm_vcpus: int
    guest_dom0_memory_mb: int
    slots: dict[str, Slot]
    guests: dict[str, Guest]


@dataclasses.dataclass(frozen=True)
class Topology:
    """The whole lab."""

    prefix: int
    gateway: str
    default_machines: tuple[str, ...]
    machines: dict[str, Machine]

    def select(self, names: typing.Sequence[str] | None) -> list[Machine]:
        """Return the machines called `names`, or the default ones.

        A name that is given twice counts once.

        :raises TopologyError: a name is not in the topology
        """
        chosen = dict.fromkeys(names or self.default_machines)
        unknown = [name for name in chosen if name not in self.machines]
        if unknown:
            raise TopologyError(f"no machine {', '.join(unknown)} in the topology; it has {', '.join(self.machines)}")
        return [self.machines[name] for name in chosen]


def _build(cls: type, where: str, values: typing.Any) -> typing.Any:
    """Make a dataclass of a mapping, naming the field that does not fit."""
    if not isinstance(values, dict):
        raise TopologyError(f"{where}: expected a mapping, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise TopologyError(f"{where}: unknown field {', '.join(unknown)}")
    missing = sorted(
        name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING
    )
    if missing:
        raise TopologyError(f"{where}: missing field {', '.join(missing)}")
    for name, value in values.items():
        if fields[name].type == "int" and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            raise TopologyError(f"{where}.{name}: expected a positive integer, got {value!r}")
        if name == "address":
            try:
                ipaddress.ip_address(value)
            except ValueError as exc:
                raise TopologyError(f"{where}.{name}: {exc}") from exc
    return cls(**values)


def load(path: pathlib.Path) -> Topology:
    """Read the topology in file `path`.

    :raises TopologyError: the file is missing, malformed or inconsistent
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as exc:
        raise TopologyError(f"{path}: {exc}") from exc
    try:
        network, listed = raw["network"], raw["machines"]
        machines = {}
        for name, values in listed.items():
            slots = {
                slot: _build(Slot, f"machines.{name}.slots.{slot}", entry) for slot, entry in values["slots"].items()
            }
            guests = {
                guest: _build(Guest, f"machines.{name}.guests.{guest}", {"name": guest, **entry})
                for guest, entry in (values.get("guests") or {}).items()
            }
            machines[name] = _build(
                Machine,
                f"machines.{name}",
                {**values, "name": name, "slots": slots, "guests": guests},
            )
        topology = Topology(
            prefix=network["prefix"],
            gateway=network["gateway"],
            default_machines=tuple(raw.get("default_machines") or machines),
            machines=machines,
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise TopologyError(f"{path}: missing or malformed {exc}") from exc
    _check(topology)
    return topology


def _check(topology: Topology) -> None:
    """Refuse what cannot work: bad slots, clashes, memory that does not fit."""
    topology.select(None)
    ports: dict[int, str] = {}
    for machine in topology.machines.values():
        where = f"machines.{machine.name}"
        if set(machine.slots) != {"a", "b"}:
            raise TopologyError(f"{where}.slots: expected exactly a and b")
        needed = machine.host_dom0_memory_mb + 2 * machine.host_vm_memory_mb
        if needed > machine.memory_mb:
            raise TopologyError(
                f"{where}.memory_mb: {machine.memory_mb} MiB, but host dom0 and two host VMs "
                f"need more than {needed} MiB"
            )
        for guest in machine.guests.values():
            if guest.type not in GUEST_TYPES:
                raise TopologyError(
                    f"{where}.guests.{guest.name}.type: {guest.type!r} is not one of {', '.join(GUEST_TYPES)}"
                )
        claims = [(machine.ssh_port, f"{where}.ssh_port")] + [
            (guest.http_port, f"{where}.guests.{guest.name}.http_port") for guest in machine.guests.values()
        ]
        for port, claim in claims:
            if port in ports:
                raise TopologyError(f"{claim}: port {port} is taken by {ports[port]}")
            ports[port] = claim
