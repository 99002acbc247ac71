"""What the lab's machine is asked before and after a migration: bytes between the host VMs, CPU time of each domain."""

from __future__ import annotations

import json
import re
import typing

from vmbeam_lab.errors import LabError
from vmbeam_lab.machine import Emulated

#: Counts what one host VM sends to the other one, and nothing else, on each of its network interfaces in host dom0.
_COUNT = """
set -e
for device in /sys/class/net/vif{domid}.*; do
  device=${{device##*/}}
  tc qdisc replace dev $device clsact
  tc filter replace dev $device ingress pref 1 handle 1 protocol all flower src_mac {mac} dst_mac {other} action pass
done
"""
_READ = "for device in /sys/class/net/vif{domid}.*; do tc -s -j filter show dev ${{device##*/}} ingress; echo; done"


class Reading(typing.NamedTuple):
    """What the meters show: bytes between the host VMs, seconds of CPU time by domain of the host hypervisor."""

    network_bytes: int
    cpu_seconds: dict[str, float]

    def since(self, earlier: Reading) -> dict[str, typing.Any]:
        """Return the differences, as a migration's record has them."""
        return {
            "network_bytes": self.network_bytes - earlier.network_bytes,
            "cpu_seconds": {name: round(now - earlier.cpu_seconds[name], 1) for name, now in self.cpu_seconds.items()},
        }


class Meters:
    """The meters of a machine with two host VMs."""

    def __init__(self, emulated: Emulated, macs: dict[str, str]) -> None:
        """:param macs: the name of each of the two host VMs, and its guest dom0's hardware address"""
        self._emulated = emulated
        self._domids = {name: int(emulated.ssh("xl", "domid", name)) for name in macs}
        addresses = list(macs.values())
        for name, mac in macs.items():
            (other,) = set(addresses) - {mac}
            emulated.ssh(_COUNT.format(domid=self._domids[name], mac=mac, other=other))
        self.read()

    def read(self) -> Reading:
        """Return what the meters show now."""
        commands = [_READ.format(domid=domid) for domid in self._domids.values()]
        text = self._emulated.ssh("; ".join([*commands, "xl list"]))
        return Reading(network_bytes(text), cpu_seconds(text))


def network_bytes(text: str) -> int:
    """Sum up the bytes in what tc tells of filters, a line of JSON for each interface.

    :raises LabError: an interface has not exactly one that counts; no bytes would be a lie then
    """
    total = 0
    lines = [line for line in text.splitlines() if line.startswith("[")]
    for line in lines:
        actions = [action for entry in json.loads(line) for action in entry.get("options", {}).get("actions", [])]
        if len(actions) != 1:
            raise LabError(f"an interface of a host VM has {len(actions)} counters: {line}")
        total += actions[0]["stats"]["bytes"]
    if not lines:
        raise LabError(f"no interface of a host VM has a counter: {text}")
    return total


def cpu_seconds(text: str) -> dict[str, float]:
    """Return the domains' CPU time as `xl list` tells it."""
    rows = re.findall(r"(?m)^(\S+) +\d+ +\d+ +\d+ +\S+ +([\d.]+)$", text)
    return {name: float(seconds) for name, seconds in rows}
