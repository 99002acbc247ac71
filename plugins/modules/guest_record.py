#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_record
short_description: Records in a host dom0 which guests its host VMs have
version_added: 0.1.0
description:
  - A host VM is lost when its machine is rebooted, and the configurations of its guests with it. This module keeps in
    the host dom0 what it takes to start the guests again, in the file C(guests.json) of O(directory), for root only.
    That is for each host VM the disks that are attached to it, its guests, which of them run, and their configurations.
    C(playbooks/repair.yml) starts them again from that.
  - Role C(rejuvenate) records whenever it looks at a machine. Use this module, or C(playbooks/record_guests.yml), after
    guests were started or configured in another way, as by M(vmbeam.xen.guest). That module cannot do it, as nothing in
    a host VM can write to the host dom0.
  - Guests of a host VM that is lost stay recorded until they are seen in another one. M(vmbeam.xen.host_vm) with
    C(state=absent) forgets the host VM that it removes.
  - Run it in the host dom0.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
options:
  host_vms:
    description: Host VMs that were looked into. They must run. Of others nothing that is recorded changes.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the host VM.
        type: str
        required: true
      guests:
        description: All its guests, as M(vmbeam.xen.guest_info) returns them; C(name), C(state) and C(disks) are used.
        type: list
        elements: dict
        required: true
      configurations:
        description: The files of its guests' configurations, as M(vmbeam.xen.guest_info) returns them.
        type: list
        elements: dict
        required: true
        suboptions:
          path:
            description: Path in the guest dom0.
            type: path
            required: true
          content:
            description: Content of the file.
            type: str
            required: true
  gone:
    description: Guests of lost host VMs that shall not be started again.
    type: list
    elements: str
    default: []
  directory:
    description: Folder that holds a folder of files for each host VM.
    type: path
    default: /var/lib/vmbeam/host-vms
seealso:
  - module: vmbeam.xen.guest_info
  - module: vmbeam.xen.host_vm_info
"""

EXAMPLES = r"""
- name: See the guests of a host VM
  vmbeam.xen.guest_info:
    config_directory: /etc/xen/guests
  delegate_to: m1-a
  register: seen

- name: Record them
  vmbeam.xen.guest_record:
    host_vms:
      - name: m1-a
        guests: "{{ seen.guests }}"
        configurations: "{{ seen.configurations }}"
"""

RETURN = r"""
host_vms:
  description: What is recorded afterwards, or in check mode would be; the configurations themselves are left out.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the host VM.
      type: str
    generation:
      description: Its generation.
      type: int
    disks:
      description: Ids of the disks that are attached to it.
      type: list
      elements: str
    guests:
      description: Guests that run in it, or are still to be started if it is lost.
      type: list
      elements: str
    configured:
      description: Guests whose configuration is known.
      type: list
      elements: str
  sample:
    - name: m1-a
      generation: 11
      disks: [web1-root]
      guests: [web1]
      configured: [web1]
"""

import contextlib
import datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import Conflict
from ansible_collections.vmbeam.xen.plugins.module_utils._guest_record import Entry, look, renewed
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import DEFAULT_DIRECTORY, HostVms
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    directory = _checks.path("directory", params["directory"])
    host_vms = HostVms(Xl(), directory)
    record = host_vms.guest_record
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    alone = record.exclusive() if Path(directory).is_dir() else contextlib.nullcontext()
    with alone:
        before = record.read()
        running = {}
        for name in host_vms.names():
            domain, facts = host_vms.find(name)
            if domain and facts:
                running[name] = (facts.generation, host_vms.describe(name, domain, facts)["disks"])
        seen = []
        for host_vm in params["host_vms"]:
            name = _checks.domain_name("host_vms", host_vm["name"])
            if name not in running:
                raise Conflict(f"host_vms: {name} is not a host VM that runs. Nothing was recorded.")
            generation, disks = running[name]
            paths = None if disks is None else {disk["id"]: disk["path"] for disk in disks}
            entry = look((name, generation), now, paths, host_vm["guests"], host_vm["configurations"], before)
            seen.append(entry)
        identities = {(name, generation) for name, (generation, _disks) in running.items()}
        after = renewed(before, seen, identities, params["gone"])
        changed = after != before
        if changed and not module.check_mode:
            record.write(after)

    for entry in seen:
        for guest in entry.guests:
            if guest.config is None:
                module.warn(
                    f"{guest.name} in {entry.host_vm} has no configuration that is known, so it could not be started "
                    "again if the machine were rebooted. Put its xl configuration beside the others."
                )
    told, told_before = [_told(entry) for entry in after], [_told(entry) for entry in before]
    return {"changed": changed, "host_vms": told, "diff": state_diff({"host_vms": told_before}, {"host_vms": told})}


def _told(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.host_vm,
        "generation": entry.generation,
        "disks": sorted(entry.disks),
        "guests": [guest.name for guest in entry.guests if guest.runs],
        "configured": [guest.name for guest in entry.guests if guest.config],
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "host_vms": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "guests": {"type": "list", "elements": "dict", "required": True},
                    "configurations": {
                        "type": "list",
                        "elements": "dict",
                        "required": True,
                        "options": {
                            "path": {"type": "path", "required": True},
                            "content": {"type": "str", "required": True, "no_log": True},
                        },
                    },
                },
            },
            "gone": {"type": "list", "elements": "str", "default": []},
            "directory": {"type": "path", "default": DEFAULT_DIRECTORY},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
