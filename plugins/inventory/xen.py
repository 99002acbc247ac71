# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: xen
short_description: Machines with their host VMs and guests
version_added: 0.1.0
description:
  - Asks the host dom0 of each machine which host VMs it has, and the guest dom0 of each of these which guests it has.
    It reads only, by one ssh session for each dom0, and many at a time.
  - Its source is a YAML file whose name ends in C(vmbeam.yml) or C(vmbeam.yaml).
  - The machines' host dom0s are in the group C(vmbeam_hosts), the guest dom0s in C(vmbeam_guest_dom0s), the guests in
    C(vmbeam_guests). All that runs on a machine is in C(vmbeam_machine_NAME), and the guests of a host VM besides in
    C(vmbeam_guests_of_NAME), where characters that no group's name can have become C(_).
  - Guest dom0s are reached through the machine's host dom0, by C(ansible_ssh_common_args), and log in as the machine
    does, unless the inventory says something else of them. Their addresses come from C(vmbeam_slots) of the machine,
    or else from what their host VMs were made with. A slot that is free is in the inventory too, since
    playbooks/rejuvenate.yml needs it there.
  - How guests are reached is not known here. Set C(ansible_host) by O(compose) if they are to be managed.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - constructed
  - inventory_cache
notes:
  - What was seen of a host is in its variable C(vmbeam_observed), whose C(kind) is V(machine), V(host_vm) or V(guest).
  - A machine has its C(hypervisor) (as M(vmbeam.xen.host_vm_info) returns it), C(run) (the rejuvenation that is under
    way or was cut, or null) and C(last_run).
  - A guest dom0 has what M(vmbeam.xen.host_vm_info) returns of its host VM, except the disks, and besides C(address),
    C(role), C(reachable) and its own C(hypervisor). The role is V(active) for the only host VM of a machine, V(source)
    or V(destination) while there are two, V(absent) for a free slot, and V(unknown) if the machine does not answer.
  - A guest has what M(vmbeam.xen.guest_info) returns, and besides C(host_vm), the name of the host VM that it is in,
    and C(copies_in), which has two names while the guest is being migrated.
  - Guest dom0s and guests have the machine's name in C(vmbeam_machine).
  - Only ssh keys and agents can be used, no passwords, and the login has to be able to run xl, which means root.
  - With O(cache) what machines answered is kept. Those that did not answer are asked again every time.
requirements:
  - C(ssh) on the controller
options:
  plugin:
    description: Names this plugin.
    type: str
    required: true
    choices: [vmbeam.xen.xen]
  machines:
    description:
      - Machines, each with variables of its host dom0, as in a YAML inventory.
      - Of these C(ansible_host), C(ansible_port), C(ansible_user), C(ansible_ssh_private_key_file) and
        C(ansible_ssh_common_args) are used to ask it, as are those of the folders C(host_vars) and C(group_vars).
    type: dict
    default: {}
  machines_group:
    description: >-
      A group whose hosts are machines too. It is in another source of the inventory, which has to be read before this
      one, that is, to be given earlier or to come first in the alphabet of the folder.
    type: str
  qualify_guests:
    description:
      - Whether a guest is called C(GUEST.MACHINE) in the inventory.
      - If not, it is called by its own name, as another source of the inventory may do as well. Then a guest is left
        out, with a warning, whose name a machine, a host VM or a guest of another machine has.
    type: bool
    default: true
  strict_hosts:
    description:
      - Whether a dom0 that does not answer is an error. If not, it is a warning, and what it would tell is missing.
    type: bool
    default: false
  directory:
    description: Folder of the host VMs' files in the host dom0.
    type: str
    default: /var/lib/vmbeam/host-vms
  state_file:
    description: Record of the machine's rejuvenations in the host dom0.
    type: str
    default: /var/lib/vmbeam/state.json
  parallel:
    description: How many dom0s are asked at a time.
    type: int
    default: 20
  timeout:
    description: Seconds that a dom0 may take to answer.
    type: int
    default: 30
"""

EXAMPLES = r"""
---
# fleet.vmbeam.yml: machines that are named here
plugin: vmbeam.xen.xen
machines:
  m1: {ansible_host: 192.0.2.1}
  m2: {ansible_host: 192.0.2.2, ansible_ssh_common_args: -J bastion.example.org}

---
# fleet.vmbeam.yml: machines of another inventory, grouped by what they are running
plugin: vmbeam.xen.xen
machines_group: vmbeam_hosts
cache: true
cache_plugin: ansible.builtin.jsonfile
cache_connection: ~/.ansible/vmbeam-inventory
cache_timeout: 600
compose:
  ansible_host: vmbeam_observed.name ~ '.example.org' if vmbeam_observed.kind == 'guest' else ansible_host
groups:
  cut_runs: vmbeam_observed.kind == 'machine' and vmbeam_observed.run
keyed_groups:
  - key: vmbeam_observed.role
    prefix: host_vm
  - key: vmbeam_observed.hypervisor.version
    prefix: xen
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ansible.constants import LOCALHOST
from ansible.errors import AnsibleError, AnsibleParserError
from ansible.inventory.group import to_safe_group_name
from ansible.inventory.helpers import get_group_vars, sort_groups
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.utils.vars import combine_vars
from ansible.vars.plugins import get_vars_from_inventory_sources
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks, _process
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput, UnexpectedOutput, VmbeamError
from ansible_collections.vmbeam.xen.plugins.plugin_utils import _dom0_ssh, _machine_view

MACHINES = "vmbeam_hosts"
GUEST_DOM0S = "vmbeam_guest_dom0s"
GUESTS = "vmbeam_guests"

Facts = dict[str, Any]


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):  # type: ignore[misc]
    """Adds machines, host VMs and guests to the inventory."""

    NAME = "vmbeam.xen.xen"

    def verify_file(self, path: str) -> bool:
        """Say whether `path` can be a source of this plugin."""
        return bool(super().verify_file(path)) and path.endswith(("vmbeam.yml", "vmbeam.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Add what the source at `path` describes."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        self._sources = [*inventory.processed_sources, path]
        self._problems: list[str] = []
        # Machines by the names that vmbeam_slots give to their host VMs.
        self._owners: dict[str, str] = {}
        self._answers = self._cached(path) if cache else {}
        try:
            self._add_everything()
        except InvalidInput as exc:
            raise AnsibleParserError(f"{path}: {exc.message}") from exc
        if self.get_option("cache"):
            self._cache[self.get_cache_key(path)] = self._answers
        if self._problems and self.get_option("strict_hosts"):
            raise AnsibleParserError(f"{path}: {'; '.join(self._problems)}")
        for problem in self._problems:
            self.display.warning(f"{path}: {problem}")

    def _cached(self, path: str) -> dict[str, dict[str, Facts]]:
        """What dom0s answered earlier: {kind: {name: answer}}."""
        if not self.get_option("cache"):
            return {}
        try:
            return dict(self._cache[self.get_cache_key(path)])
        except KeyError:
            return {}

    def _add_everything(self) -> None:
        for group in (MACHINES, GUEST_DOM0S, GUESTS):
            self.inventory.add_group(group)
        directory = _checks.path("directory", self.get_option("directory"))
        state_file = _checks.path("state_file", self.get_option("state_file"))
        timeout = _checks.positive("timeout", self.get_option("timeout"))

        ways = self._add_machines()
        machines = self._ask(
            "host dom0",
            ways,
            lambda words: _machine_view.host_dom0(_process.run, words, directory, state_file, timeout),
        )
        described = {machine: self._templated(machine, ["vmbeam_slots"]).get("vmbeam_slots") or {} for machine in ways}
        # Whose a name is does not depend on which other machine is found to have it, too.
        for machine, slots in described.items():
            for slot in _machine_view.named(slots).values():
                self._owners.setdefault(slot["name"], machine)
        host_vms: dict[str, dict[str, Facts]] = {}
        for machine in ways:
            host_vms[machine] = self._add_host_vms(machine, described[machine], machines.get(machine, {}))
        dom0s = self._ask(
            "guest dom0",
            {
                name: _dom0_ssh.ssh_words(name, self._connection(name))
                for found in host_vms.values()
                for name, host_vm in found.items()
                if host_vm["domid"] is not None and host_vm["address"]
            },
            lambda words: _machine_view.guest_dom0(_process.run, words, timeout),
        )
        added = [*ways]
        for machine, found in host_vms.items():
            self._tell_host_vms(found, dom0s)
            added += found
            added += self._add_guests(machine, {name: dom0s[name] for name in found if name in dom0s})
        for name in added:
            self._construct(name)

    def _ask(self, kind: str, ways: Mapping[str, list[str]], ask: Callable[[list[str]], Facts]) -> dict[str, Facts]:
        """Return what dom0s answer, by name; the problems of those that do not are noted.

        :param kind: what these dom0s are, under which their answers are cached
        :param ways: ssh's arguments by name
        """
        known = self._answers.setdefault(kind, {})

        def attempt(name: str) -> Facts | VmbeamError:
            try:
                return ask(ways[name])
            except VmbeamError as exc:
                return exc
            # One that answers nonsense keeps no other from being in the inventory.
            except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as exc:
                return UnexpectedOutput(f"its answer has the wrong form: {type(exc).__name__}: {exc}", output="")

        unknown = [name for name in ways if name not in known]
        with ThreadPoolExecutor(_checks.positive("parallel", self.get_option("parallel"))) as pool:
            for name, answer in zip(unknown, pool.map(attempt, unknown), strict=True):
                if isinstance(answer, VmbeamError):
                    self._problems.append(f"{kind} {name}: {answer.message}")
                else:
                    known[name] = answer
        return {name: known[name] for name in ways if name in known}

    # --- machines

    def _add_machines(self) -> dict[str, list[str]]:
        """Add the host dom0s and return how ssh reaches them, by name."""
        wanted = self.get_option("machines_group")
        group = self.inventory.groups.get(wanted)
        names = [host.name for host in group.get_hosts()] if group else []
        if wanted and not names:
            raise InvalidInput(
                f"machines_group: there is no host in {wanted} yet. Give the source that has it before this one."
            )
        for name, variables in self.get_option("machines").items():
            names.append(self.inventory.add_host(name))
            self._set(name, variables or {})
        for name in names:
            self.inventory.add_host(name, group=MACHINES)
        return {name: _dom0_ssh.ssh_words(name, self._connection(name)) for name in names}

    # --- host VMs

    def _add_host_vms(self, machine: str, described: Facts, seen: Facts) -> dict[str, Facts]:
        """Add the guest dom0s of a machine and return what is known of their host VMs, by name.

        Raises InvalidInput if something else has a name that vmbeam_slots give. A host VM that was only found there, as
        on a machine that is a copy of another one, is left out then.
        """
        given = {slot["name"] for slot in _machine_view.named(described).values()}
        host_vms = {}
        for name, host_vm in _machine_view.slots(described, seen).items():
            clash = self._clash(machine, name)
            if not clash:
                host_vms[name] = host_vm
            elif name in given:
                raise InvalidInput(f"host VM {name} of {machine}: {clash}.")
            else:
                self._problems.append(f"host VM {name} of {machine} is left out: {clash}")
        group = self._group("machine", machine)
        for name, host_vm in host_vms.items():
            self.inventory.add_host(name, group=GUEST_DOM0S)
            self.inventory.add_host(name, group=group)
            self.inventory.set_variable(name, "vmbeam_machine", machine)
            self._set(name, _dom0_ssh.behind(machine, self._connection(machine), name, self._connection(name)))
            if host_vm["address"]:
                self.inventory.set_variable(name, "ansible_host", host_vm["address"])
            elif host_vm["domid"] is not None:
                self._problems.append(f"guest dom0 {name}: its address is not known. Set vmbeam_slots of {machine}.")
        if seen:
            told = {"kind": "machine", **{key: seen[key] for key in ("hypervisor", "run", "last_run")}}
            self.inventory.set_variable(machine, "vmbeam_observed", told)
        return host_vms

    def _clash(self, machine: str, name: str) -> str:
        """Return what else has a host VM's name, empty if nothing has."""
        host = self.inventory.get_host(name)
        groups = [group.name for group in host.get_groups()] if host else []
        owners = [self._owners.get(name, machine), host.get_vars().get("vmbeam_machine", machine) if host else machine]
        other = next((owner for owner in owners if owner != machine), machine)
        if other == machine and MACHINES not in groups:
            return ""
        return f"there is a machine or a host VM of {other} of that name"

    def _tell_host_vms(self, host_vms: dict[str, Facts], dom0s: dict[str, Facts]) -> None:
        for name, host_vm in host_vms.items():
            told = {
                "kind": "host_vm",
                **host_vm,
                "reachable": name in dom0s,
                "hypervisor": dom0s[name]["hypervisor"] if name in dom0s else None,
            }
            self.inventory.set_variable(name, "vmbeam_observed", told)

    # --- guests

    def _add_guests(self, machine: str, dom0s: dict[str, Facts]) -> list[str]:
        """Add the guests of a machine, whose guest dom0s answered so, and return their names."""
        added = []
        for guest, facts in _machine_view.guests_by_name(dom0s).items():
            name = f"{guest}.{machine}" if self.get_option("qualify_guests") else guest
            if not self._may_be_guest(name, machine):
                self._problems.append(f"guest {guest} of {machine} is left out: something else has the name {name}")
                continue
            group = self._group("guests_of", facts["host_vm"])
            self.inventory.add_child(self._group("machine", machine), group)
            added.append(self.inventory.add_host(name, group=group))
            self.inventory.add_host(name, group=GUESTS)
            self._set(name, {"vmbeam_machine": machine, "vmbeam_observed": {"kind": "guest", **facts}})
        return added

    def _may_be_guest(self, name: str, machine: str) -> bool:
        """Whether a guest of the machine may have a name: a host VM is not trusted, its guests pose as nothing else."""
        if name in LOCALHOST or name in self.inventory.groups:
            return False
        host = self.inventory.get_host(name)
        if host is None:
            return True
        groups = {group.name for group in host.get_groups()}
        return not groups & {MACHINES, GUEST_DOM0S} and host.get_vars().get("vmbeam_machine", machine) == machine

    # --- the inventory

    def _group(self, what: str, name: str) -> str:
        return str(self.inventory.add_group(to_safe_group_name(f"vmbeam_{what}_{name}", force=True, silent=True)))

    def _set(self, host: str, variables: Mapping[str, Any]) -> None:
        for key, value in variables.items():
            self.inventory.set_variable(host, key, value)

    def _variables(self, name: str) -> Facts:
        """What the inventory says of a host so far, with the folders host_vars and group_vars."""
        host = self.inventory.get_host(name)
        if host is None:
            return {}
        # Groups become children of the group all only when every source is read.
        groups = sort_groups({self.inventory.groups["all"], *host.get_groups()})
        found: Facts = get_group_vars(groups)
        for more in (
            get_vars_from_inventory_sources(self.loader, self._sources, groups, "all"),
            host.get_vars(),
            get_vars_from_inventory_sources(self.loader, self._sources, [host], "all"),
            self._vars,
        ):
            found = combine_vars(found, more)
        return found

    def _templated(self, name: str, wanted: list[str]) -> Facts:
        """The variables of a host that are wanted and there."""
        variables = self._variables(name)
        self.templar.available_variables = {**variables, "inventory_hostname": name}
        try:
            return {key: self.templar.template(variables[key]) for key in wanted if key in variables}
        except AnsibleError as exc:
            raise InvalidInput(f"a variable of {name}: {exc}") from exc

    def _connection(self, name: str) -> Facts:
        return self._templated(name, [*_dom0_ssh.VARIABLES])

    def _construct(self, name: str) -> None:
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), self._variables(name), name, strict=strict)
        variables = self._variables(name)
        self._add_host_to_composed_groups(
            self.get_option("groups"), variables, name, strict=strict, fetch_hostvars=False
        )
        self._add_host_to_keyed_groups(
            self.get_option("keyed_groups"), variables, name, strict=strict, fetch_hostvars=False
        )
