#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_vm_disk_info
short_description: Reports the guest disks of running host VMs
version_added: 0.1.0
description:
  - Returns the disks that M(vmbeam.xen.host_vm_disk) has plugged into the host VMs of a machine, also those that an
    attempt which was interrupted has left half plugged in. Run it in the host dom0.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options:
  host_vm:
    description: Name of a host VM. If omitted, the disks of all that run are returned.
    type: str
  disk:
    description: Id of a disk. If omitted, all are returned.
    type: str
  directory:
    description: Folder that holds a folder of files for each host VM.
    type: path
    default: /var/lib/vmbeam/host-vms
seealso:
  - module: vmbeam.xen.host_vm_disk
  - module: vmbeam.xen.host_vm_info
"""

EXAMPLES = r"""
- name: See which host VMs have a guest's disk
  vmbeam.xen.host_vm_disk_info:
    disk: web1-root
  register: root_disk

- name: Refuse to go on while two host VMs have it
  ansible.builtin.assert:
    that: root_disk.disks | length < 2
"""

RETURN = r"""
disks:
  description:
    - The disks, by host VM and id, as M(vmbeam.xen.host_vm_disk) returns them.
    - The state is V(attached), or V(leftover) for one whose drive is there and whose device is not.
      M(vmbeam.xen.host_vm_disk) completes or removes that.
  returned: success
  type: list
  elements: dict
  sample:
    - host_vm: m1-b
      id: web1-root
      path: /dev/vg0/web1-root
      state: attached
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import DEFAULT_DIRECTORY, HostVms
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm_disk import guest_drives
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    wanted, disk = module.params["host_vm"], module.params["disk"]
    if wanted is not None:
        _checks.domain_name("host_vm", wanted)
    if disk is not None:
        _checks.disk_id("disk", disk)
    xl = Xl()
    host_vms = HostVms(xl, _checks.path("directory", module.params["directory"]))
    found = []
    for name in host_vms.names():
        domain, _record = host_vms.find(name)
        if domain is None or wanted not in (None, name):
            continue
        for known, drive in sorted(guest_drives(xl.drives(domain.domid)).items()):
            if disk in (None, known):
                state = "attached" if drive.attached else "leftover"
                found.append({"host_vm": name, "id": known, "path": drive.path, "state": state})
    return {"changed": False, "disks": found}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "host_vm": {"type": "str"},
            "disk": {"type": "str"},
            "directory": {"type": "path", "default": DEFAULT_DIRECTORY},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
