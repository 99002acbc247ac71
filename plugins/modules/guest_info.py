#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_info
short_description: Reports guests and the guest hypervisor
version_added: 0.1.0
description:
  - Returns the guests of a guest dom0 with their disks and network interfaces, and facts of the guest hypervisor.
  - The remains of a failed migration are returned under the names that xl gave them, which end in C(--incoming) or
    C(--migratedaway).
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options:
  name:
    description: Name of a guest. If omitted, all are returned.
    type: str
  config_directory:
    description: Folder whose files C(*.cfg) are returned as RV(configurations); it need not exist.
    type: path
seealso:
  - module: vmbeam.xen.guest
"""

EXAMPLES = r"""
- name: Look at the guests of a host VM
  vmbeam.xen.guest_info:
  delegate_to: m1-a
  register: source
"""

RETURN = r"""
guests:
  description: The guests, in the order of their domain ids.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Name of the guest.
      type: str
    domid:
      description: Id of its domain.
      type: int
    uuid:
      description: Its UUID, which it keeps when it migrates.
      type: str
    state:
      description: >-
        One of V(running), V(blocked) (its CPUs are idle), V(paused), V(suspended), V(shutdown), V(crashed)
        and V(dying).
      type: str
    type:
      description: V(pvh), V(hvm) or V(pv); null if xl keeps no configuration of it.
      type: str
    memory_mb:
      description: Memory in MiB.
      type: int
    vcpus:
      description: Number of virtual CPUs that are online.
      type: int
    cpu_time:
      description: CPU time that it has used in this guest hypervisor, in seconds.
      type: float
    disks:
      description: Its disks. The id is null for a disk that M(vmbeam.xen.host_vm_disk) did not plug in.
      type: list
      elements: dict
    nics:
      description: Its network interfaces.
      type: list
      elements: dict
    devices:
      description: >-
        Devices of the host VM that are passed through to it, each with C(type) (V(pci), V(usb) or V(dt)) and C(id), for
        USB the controller and port of the guest.
      type: list
      elements: dict
    cpu_affinity:
      description: For each of its virtual CPUs that was pinned when it was started, the CPUs that it may run on.
      type: list
      elements: list
    migratable:
      description: Whether it was started without C(nomigrate).
      type: bool
  sample:
    - name: web1
      domid: 2
      uuid: 6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a11
      state: blocked
      type: pvh
      memory_mb: 1024
      vcpus: 1
      cpu_time: 41.7
      disks:
        - id: web1-root
          target: /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_web1-root
          vdev: xvda
      nics:
        - mac: "00:16:3e:00:02:01"
          bridge: xenbr0
      devices: []
      cpu_affinity: []
      migratable: true
configurations:
  description: The files C(*.cfg) of O(config_directory), by path.
  returned: if O(config_directory) is given
  type: list
  elements: dict
  sample:
    - path: /etc/xen/guests/web1.cfg
      content: |
        name = "web1"
hypervisor:
  description: Facts of the guest hypervisor, memory in MiB.
  returned: success
  type: dict
  sample:
    version: 4.17.5
    extra: ".5"
    nr_cpus: 2
    total_memory_mb: 8191
    free_memory_mb: 4410
"""

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._guest import Guests
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    name = module.params["name"]
    if name is not None:
        _checks.domain_name("name", name)
    xl = Xl()
    result = {
        "changed": False,
        "guests": [guest for guest in Guests(xl).all() if name in (None, guest["name"])],
        "hypervisor": xl.hypervisor().as_dict(),
    }
    directory = module.params["config_directory"]
    if directory is not None:
        result["configurations"] = _configurations(Path(_checks.path("config_directory", directory)))
    return result


def _configurations(directory: Path) -> list[dict[str, str]]:
    """The xl files of a folder. Raises InvalidInput for one that cannot be read."""
    found = []
    for path in sorted(directory.glob("*.cfg")):
        try:
            found.append({"path": str(path), "content": path.read_text()})
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidInput(f"config_directory: {path} cannot be read: {exc}. Mend it, or move it away.") from exc
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={"name": {"type": "str"}, "config_directory": {"type": "path"}},
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
