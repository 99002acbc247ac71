"""What the lab's machine is asked about a migration: bytes between the host VMs, CPU time, free memory."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import time
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
#: Prints the free memory every few seconds, until its standard input is closed.
_SAMPLE = r"""
while xl info | sed -n 's/^free_memory *: *//p'; do
  read -r -t 3
  [ $? -gt 128 ] || break
done
"""
#: Seconds that it may take to end.
_SAMPLE_END = 30


class Reading(typing.NamedTuple):
    """What the meters show, `at` which second: bytes between the host VMs; CPU time by domain, and of the emulator."""

    at: float
    network_bytes: int
    cpu_seconds: dict[str, float]
    machine_seconds: float

    def since(self, earlier: Reading) -> Reading:
        """Return the differences."""
        return Reading(
            self.at - earlier.at,
            self.network_bytes - earlier.network_bytes,
            {name: round(now - earlier.cpu_seconds[name], 1) for name, now in self.cpu_seconds.items()},
            round(self.machine_seconds - earlier.machine_seconds, 1),
        )


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
        return Reading(time.monotonic(), network_bytes(text), cpu_seconds(text), self._machine_seconds())

    def _machine_seconds(self) -> float:
        pid = self._emulated.pid()
        if pid is None:
            raise LabError(f"{self._emulated.machine.name}: the emulator does not run any more")
        return process_seconds(pathlib.Path(f"/proc/{pid}/stat").read_text(), os.sysconf("SC_CLK_TCK"))

    @contextlib.contextmanager
    def free_memory(self, limit: float) -> typing.Iterator[list[int]]:
        """Fill the list with MiB of free memory of the host hypervisor, sampled inside of the context.

        It stays empty if that fails: a migration is not lost for it.
        :param limit: in seconds, after which the sampling ends
        """
        found: list[int] = []
        command = f"timeout {limit:.0f} bash -c {shlex.quote(_SAMPLE)}"
        argv = ["timeout", f"{limit + _SAMPLE_END:.0f}", *self._emulated.ssh_command(command)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sampler:
            try:
                yield found
            finally:
                try:
                    # Closes its standard input.
                    text, _ = sampler.communicate(timeout=_SAMPLE_END)
                    found += [int(word) for word in text.split()]
                except (subprocess.TimeoutExpired, ValueError, OSError):
                    sampler.kill()


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


def process_seconds(text: str, ticks: int) -> float:
    """Return the CPU time in /proc/PID/stat, user and system. ticks: per second."""
    # The name of the program, in brackets, may contain anything.
    words = text[text.rindex(")") + 2 :].split()
    return (int(words[11]) + int(words[12])) / ticks
