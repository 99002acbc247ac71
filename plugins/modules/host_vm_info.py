#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_vm_info
short_description: Reports host VMs and the host hypervisor
version_added: 0.1.0
description:
  - Returns the host VMs of a machine, with the generation that they are of and the guest disks that are
    attached to them, and facts of the host hypervisor. Run it in the host dom0.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options:
  name:
    description: Name of a host VM. If omitted, all are returned.
    type: str
  directory:
    description: Folder that holds a folder of files for each host VM.
    type: path
    default: /var/lib/vmbeam/host-vms
  image:
    description:
      - A golden image, of which to return the checksum, with the room for disks of host VMs.
      - An image of gigabytes is read only if neither a file beside it nor the start of a host VM tells its checksum, as
        M(vmbeam.xen.host_vm) does it.
    type: path
  guest_record:
    description: Whether to return what M(vmbeam.xen.guest_record) has recorded of the guests.
    type: bool
    default: false
seealso:
  - module: vmbeam.xen.host_vm
  - module: vmbeam.xen.guest_record
"""

EXAMPLES = r"""
- name: Look at the host VMs
  vmbeam.xen.host_vm_info:
  register: machine

- name: Refuse to go on if another host VM of 8 GiB does not fit
  ansible.builtin.assert:
    that: machine.hypervisor.free_memory_mb > 8192 + 128
"""

RETURN = r"""
host_vms:
  description:
    - The host VMs, by name. One that has a record but no domain has the state V(absent).
    - Facts that do not apply are null. So are the disks of a host VM whose device model does not answer.
  returned: success
  type: list
  elements: dict
  sample:
    - name: m1-a
      domid: 3
      state: running
      memory_mb: 8192
      vcpus: 2
      slot: a
      generation: 11
      created: "2025-02-01T03:00:09+00:00"
      image_sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      disks:
        - id: web1-root
          path: /var/lib/vmbeam/guests/web1-root.raw
guest_record:
  description:
    - What is recorded of the guests in each generation of a host VM that runs, or that was lost with guests.
    - A guest's C(config) is null if it is not known. It may hold secrets.
  returned: if O(guest_record=true)
  type: list
  elements: dict
  sample:
    - host_vm: m1-a
      generation: 11
      noted: "2025-02-01T03:10:09+00:00"
      disks: {web1-root: /var/lib/vmbeam/guests/web1-root.raw}
      guests:
        - name: web1
          runs: true
          disks: [web1-root]
          config:
            path: /etc/xen/guests/web1.cfg
            content: |
              name = "web1"
image:
  description: The image, with its checksum, which is null if there is no image.
  returned: if O(image) is given
  type: dict
  sample:
    path: /var/lib/vmbeam/images/guest-hypervisor.raw
    exists: true
    sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
free_disk_mb:
  description: Free space in MiB where O(directory) is or will be, null if there is no such folder.
  returned: if O(image) is given
  type: int
  sample: 48231
hypervisor:
  description: Facts of the host hypervisor, memory in MiB.
  returned: success
  type: dict
  sample:
    version: 4.17.5
    extra: ".5"
    nr_cpus: 16
    total_memory_mb: 65451
    free_memory_mb: 40123
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import DEFAULT_DIRECTORY, HostVms
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    name = module.params["name"]
    xl = Xl()
    host_vms = HostVms(xl, _checks.path("directory", module.params["directory"]))
    names = host_vms.names()
    if name is not None:
        names = [known for known in names if known == _checks.domain_name("name", name)]
    result = {
        "changed": False,
        "host_vms": [host_vms.describe(known, *host_vms.find(known)) for known in names],
        "hypervisor": xl.hypervisor().as_dict(),
    }
    if module.params["image"]:
        result |= host_vms.storage(_checks.path("image", module.params["image"]))
    if module.params["guest_record"]:
        result["guest_record"] = [entry.as_dict() for entry in host_vms.guest_record.read()]
    return result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str"},
            "directory": {"type": "path", "default": DEFAULT_DIRECTORY},
            "image": {"type": "path"},
            "guest_record": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
