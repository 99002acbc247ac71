# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What the argument specs of roles rejuvenate and host_vm cannot say of their variables.

Checked here and not by a task each: on the controller of a fleet, each task of each machine is a process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import _rolling

#: What a guest may have in vmbeam_guest_strategies, and in vmbeam_guest_unmovable_policies.
CHOICES = ("zero_copy", "precopy", "suspend", "cold", "auto")
POLICIES = ("fail", "skip_host", "precopy", "suspend", "cold", "leave_and_skip")

# What a gate may have, and what of it only one that asks metrics.
_METRICS_GATE = ("url", "query", "min", "max")
_GATE = ("name", "guest", "timeout", "command", *_METRICS_GATE)

_MAC = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}$")
_KEY = re.compile(r"(^|\s)(ssh|ecdsa|sk-ssh|sk-ecdsa)-\S+\s+AAAA")


def rejuvenation_objections(given: Mapping[str, Any], hosts: Container[str]) -> list[str]:
    """Return what is wrong with variables of role rejuvenate, the first of each kind, in the order of importance.

    `given` are those that the role's validate.yml names, `hosts` has the inventory's hosts.
    """
    return _first(
        lambda: _described(given, ("name", "address")),
        lambda: _in_inventory(given, given["slots"], hosts),
        lambda: _sized(given),
        lambda: _mappings(given["mappings"]),
        lambda: _choices(given),
        lambda: _groups(given["anti_affinity"]),
        lambda: _probes(given["mappings"]["vmbeam_guest_probes"]),
        lambda: _gates(given["gates"]),
        lambda: _times(given),
    )


def host_vm_objections(given: Mapping[str, Any], hosts: Container[str]) -> list[str]:
    """Return what is wrong with variables of role host_vm, likewise."""
    return _first(
        lambda: _described(given, ("name", "address", "mac")),
        lambda: _complete(given),
        lambda: _sized(given),
        lambda: _logins(given["logins"]),
        lambda: _in_inventory(given, given["slot"], hosts),
    )


def _first(*checks: Callable[[], Iterable[str]]) -> list[str]:
    # A check relies on those before it.
    for check in checks:
        for objection in check():
            return [objection]
    return []


def _described(given: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    slots = given["slots"]
    if not (
        isinstance(slots, Mapping)
        and sorted(slots) == ["a", "b"]
        and all(isinstance(slot, Mapping) and all(key in slot for key in keys) for slot in slots.values())
    ):
        yield (
            f"vmbeam_slots of {given['machine']} must describe both slots. Set, in its inventory, vmbeam_slots: "
            '{a: {name: …, address: 192.0.2.21/24, mac: "00:16:3e:…"}, b: {…}}'
        )


def _in_inventory(given: Mapping[str, Any], letters: Iterable[str], hosts: Container[str]) -> Iterator[str]:
    for letter in letters:
        slot = given["slots"][letter]
        if slot["name"] not in hosts:
            yield (
                f"{slot['name']}, slot {letter} of {given['machine']}, is not a host of the inventory. Add it "
                f"(ansible_host {str(slot['address']).split('/', maxsplit=1)[0]}, reached through {given['machine']})"
            )


def _complete(given: Mapping[str, Any]) -> Iterator[str]:
    slots = [{key: str(slot[key]) for key in ("name", "address", "mac")} for slot in given["slots"].values()]
    differ = all(len({slot[key].lower() if key == "mac" else slot[key] for slot in slots}) == 2 for key in slots[0])
    if not differ or not all(
        re.search(r"/[0-9]+$", slot["address"]) and _MAC.match(slot["mac"]) and _NAME.match(slot["name"])
        for slot in slots
    ):
        yield (
            f"vmbeam_slots of {given['machine']}: name, address and mac must differ between the slots; name must be a "
            "host name without dots, address must have a prefix length (192.0.2.21/24), mac six pairs of hexadecimal "
            "digits"
        )


def _sized(given: Mapping[str, Any]) -> Iterator[str]:
    if given["memory_mb"] < 512 or given["vcpus"] < 1:
        yield (
            f"vmbeam_host_vm_memory_mb must be at least 512 (MiB; is {given['memory_mb']}) and vmbeam_host_vm_vcpus at "
            f"least 1 (is {given['vcpus']}): set them in the inventory of {given['machine']}"
        )


def _logins(keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if not _KEY.search(key):
            yield (
                "vmbeam_authorized_keys must be a list of public SSH keys, or one on each line ('ssh-ed25519 AAAA… "
                f"comment', what a file NAME.pub has); this is none: {key}"
            )


def _mappings(given: Mapping[str, Any]) -> Iterator[str]:
    wrong = [name for name, value in given.items() if not isinstance(value, Mapping)]
    if wrong:
        yield (
            f"{', '.join(wrong)} must be a dictionary by the guest's name (vmbeam_hooks, by the moment's), and is "
            f'none; with -e, write -e \'{{"{wrong[0]}": {{"web1": …}}}}\''
        )


def _choices(given: Mapping[str, Any]) -> Iterator[str]:
    strategies = given["mappings"]["vmbeam_guest_strategies"]
    policies = given["mappings"]["vmbeam_guest_unmovable_policies"]
    if (
        any(value not in CHOICES for value in strategies.values())
        or any(value not in POLICIES for value in policies.values())
        or not given["auto_strategies"]
        or given["parallel_guests"] < 1
        # A comma may be part of an argument of ssh, a space need not separate two.
        or isinstance(given["ssh_args"], str)
    ):
        yield (
            f"Every value of vmbeam_guest_strategies must be one of {', '.join(CHOICES)} (is {dict(strategies)}), "
            f"every value of vmbeam_guest_unmovable_policies one of {', '.join(POLICIES)} (is {dict(policies)}), "
            f"vmbeam_auto_strategies must not be empty (is {given['auto_strategies']}), vmbeam_parallel_guests at "
            f"least 1 (is {given['parallel_guests']}), rejuvenate_ssh_args a list (is {given['ssh_args']})"
        )


def _groups(groups: Iterable[Any]) -> Iterator[str]:
    for group in groups:
        if not (
            isinstance(group, Mapping)
            and "name" in group
            and ("guests" in group) != ("label" in group)
            and not isinstance(group.get("guests"), str)
        ):
            yield (
                "Each of vmbeam_anti_affinity must have a name and either guests (a list of names) or label; one is "
                f"{group}"
            )


def _probes(probes: Mapping[str, Any]) -> Iterator[str]:
    for name, probe in probes.items():
        if not (isinstance(probe, Mapping) and ("url" in probe or {"address", "port"} <= set(probe))):
            yield (
                f"vmbeam_guest_probes.{name} must have either url (HTTP) or address and port (TCP), as the host dom0 "
                "reaches them"
            )


def _gates(gates: Iterable[Any]) -> Iterator[str]:
    for gate in gates:
        if not (
            isinstance(gate, Mapping)
            and "name" in gate
            and (not isinstance(gate.get("command", ""), str) or {"url", "query"} <= set(gate))
        ):
            yield (
                "Each of vmbeam_gates must have a name and either command (a list of words) or url and query (of a "
                f"Prometheus); one has {gate}"
            )
            continue
        metrics = [key for key in _METRICS_GATE if key in gate]
        if "command" in gate and metrics:
            yield (
                f"Gate {gate['name']} of vmbeam_gates has command and {', '.join(metrics)}, and can ask only one of "
                f"both. Make two gates of it, or leave out either command or {', '.join(metrics)}"
            )
        unknown = [str(key) for key in gate if key not in _GATE]
        if unknown:
            yield (
                f"Gate {gate['name']} of vmbeam_gates has {', '.join(unknown)}, which no gate has. Correct that or "
                f"leave it out; a gate may have {', '.join(_GATE)}"
            )


def _times(given: Mapping[str, Any]) -> Iterator[str]:
    _rolling.hooks(given["mappings"]["vmbeam_hooks"], "/")
    if given["lock_ttl"] < given["longest_move_seconds"]:
        yield (
            f"vmbeam_lock_ttl ({given['lock_ttl']} s) must be at least as long as a guest may take, "
            f"{given['longest_move_seconds']} s (twice vmbeam_migrate_timeout, vmbeam_shutdown_timeout and "
            f"{given['repair_seconds']} s)"
        )
