# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What the inventory plugin learns of a machine, by one ssh session for each of its dom0s. Reads only.

What is returned is plain data, so that it can be cached.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _checks, _process
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput, UnexpectedOutput
from ansible_collections.vmbeam.xen.plugins.module_utils._guest import Guests
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import RECORD, SEED_DISK, Record, facts
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl
from ansible_collections.vmbeam.xen.plugins.plugin_utils._dom0_ssh import run_all
from ansible_collections.vmbeam.xen.plugins.plugin_utils._observation import SLOTS, guest_name

_LIST = ("xl", "list", "-v")
_CONFIGS = ("xl", "list", "-l")
_INFO = ("xl", "info")


def host_dom0(
    run: _process.Run, words: Sequence[str], directory: str, state_file: str, timeout: float
) -> dict[str, Any]:
    """Return the host VMs of a machine, seen from its host dom0.

    The result has host_vms (as host_vm_info returns them, without disks), addresses (of every host VM that is or was
    there, by name), hypervisor, run (the one that is under way or was cut, else None) and last_run.

    :param words: how ssh reaches the host dom0
    :param directory: folder of the host VMs on it
    :param state_file: record of the machine's runs on it
    :raises VmbeamError: it did not answer, or with something else than expected
    """
    records = _sh(
        f'cd {shlex.quote(directory)} 2>/dev/null || exit 0; for file in */{RECORD}; do [ -e "$file" ] || continue; '
        "printf '%s ' \"${file%/*}\"; tr -d '\\n' <\"$file\"; echo; done"
    )
    # A seed disk tells its host VM the addresses of both slots.
    hosts = _sh(
        f'for file in {shlex.quote(directory)}/*/{SEED_DISK}; do tar -xOf "$file" etc/hosts 2>/dev/null; done; true'
    )
    file = shlex.quote(state_file)
    # Without Python, or of a file that is damaged, the whole file tells.
    brief = f"python3 -IS -c {shlex.quote(_BRIEF)} {file} 2>/dev/null || cat {file}"
    state = _sh(f"if grep -qs '[^[:space:]]' {file}; then {brief}; else echo '{{}}'; fi")
    answer = run_all(run, words, [_LIST, _INFO, records, hosts, state], timeout)

    xl = Xl(run=answer)
    domains = {domain.name: domain for domain in xl.domains()}
    known = _records(answer(records, timeout).check().stdout)
    past = _state(answer(state, timeout).check().stdout)
    run_now, last_run = past.get("run"), (past.get("history") or [None])[-1]
    names = {*known, *_names(run_now), *_names(last_run)}
    return {
        "host_vms": [facts(name, domains.get(name), known[name]) for name in sorted(known)],
        "addresses": {
            name: address for name, address in _hosts(answer(hosts, timeout).check().stdout).items() if name in names
        },
        "hypervisor": xl.hypervisor().as_dict(),
        "run": run_now,
        "last_run": {key: last_run.get(key) for key in _RUN} if last_run else None,
    }


_RUN = ("action", "outcome", "source", "destination", "generation", "finished", "guests_moved")
# The record keeps the reports of many runs, each with all guests; no more of it is sent than is told here.
_BRIEF = (
    "import json, sys; state = json.load(open(sys.argv[1])); "
    f"state['history'] = [{{key: run.get(key) for key in {_RUN}}} for run in state['history'][-1:]]; "
    "print(json.dumps(state))"
)


def guest_dom0(run: _process.Run, words: Sequence[str], timeout: float) -> dict[str, Any]:
    """Return the guests of a host VM, as guest_info returns them, and its hypervisor, seen from its guest dom0.

    :raises VmbeamError: it did not answer, or with something else than expected
    """
    xl = Xl(run=run_all(run, words, [_LIST, _CONFIGS, _INFO], timeout))
    return {"guests": Guests(xl).all(), "hypervisor": xl.hypervisor().as_dict()}


def named(described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the slots of vmbeam_slots that have a name."""
    return {slot: described[slot] for slot in SLOTS if "name" in described.get(slot, {})}


def slots(described: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the machine's host VMs, by name: those that exist and those that its slots are meant for.

    Each has slot, address (None if unknown), role and what host_vm_info says of it. The role is V(active) for the only
    one that exists; of two the newer generation is V(destination), the other one V(source). One that does not exist is
    V(absent), or V(unknown) if the machine did not answer.

    :param described: the variable vmbeam_slots of the machine, empty if there is none
    :param seen: what host_dom0() returned, empty if the machine did not answer
    """
    found: dict[str, dict[str, Any]] = {}
    for slot, given in named(described).items():
        found[given["name"]] = {
            **facts(given["name"], None, None),
            "slot": slot,
            "address": str(given.get("address") or "").partition("/")[0] or None,
        }
    for name, address in seen.get("addresses", {}).items():
        found.setdefault(name, {**facts(name, None, None), "address": address})
    for host_vm in seen.get("host_vms", []):
        before = found.get(host_vm["name"], {"address": None})
        found[host_vm["name"]] = {**before, **host_vm}
    existing = [host_vm for host_vm in found.values() if host_vm["domid"] is not None]
    newest = max((host_vm["generation"] or 0 for host_vm in existing), default=0)
    for host_vm in found.values():
        if host_vm["domid"] is None:
            host_vm["role"] = host_vm["state"] = "absent" if seen else "unknown"
        elif len(existing) == 1:
            host_vm["role"] = "active"
        else:
            host_vm["role"] = "destination" if host_vm["generation"] == newest else "source"
    return found


def guests_by_name(seen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the guests of a machine by name, each with the host VM that it is in and all in which there is a copy.

    Of a guest that is being migrated, the copy that runs tells where it is. Guests whose names no configuration of
    ours can have are left out: a host VM is not trusted.

    :param seen: what guest_dom0() returned, by host VM
    """
    copies: dict[str, list[dict[str, Any]]] = {}
    for host_vm, dom0 in seen.items():
        for guest in dom0["guests"]:
            name = guest_name(guest["name"])
            try:
                _checks.domain_name("name", name)
            except InvalidInput:
                continue
            copies.setdefault(name, []).append({**guest, "host_vm": host_vm})
    return {
        name: {
            **max(found, key=lambda copy: (copy["state"] in ("running", "blocked"), copy["name"] == name)),
            "name": name,
            "copies_in": [copy["host_vm"] for copy in found],
        }
        for name, found in sorted(copies.items())
    }


def _sh(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def _records(text: str) -> dict[str, Record]:
    found = {}
    for line in text.splitlines():
        name, _space, record = line.partition(" ")
        try:
            known = Record(**json.loads(record))
            if not isinstance(known.generation, int):
                raise TypeError(f"its generation is {known.generation!r}")
            found[_checks.domain_name("name", name)] = known
        except (ValueError, TypeError, InvalidInput) as exc:
            raise UnexpectedOutput(f"the record of host VM {name} is damaged: {exc}", output=line[:2000]) from exc
    return found


def _state(text: str) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except ValueError as exc:
        raise UnexpectedOutput(f"the record of its runs is damaged: {exc}", output=text[:2000]) from exc
    if not isinstance(state, dict):
        raise UnexpectedOutput("the record of its runs is damaged: not an object", output=text[:2000])
    return state


def _names(run: Mapping[str, Any] | None) -> set[str]:
    """The host VMs that a run is about."""
    return {run[end] for end in ("source", "destination") if run.get(end)} if run else set()


def _hosts(text: str) -> dict[str, str]:
    """The addresses in lines of /etc/hosts, by name."""
    fields = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return {words[1]: words[0] for words in fields if len(words) == 2}
