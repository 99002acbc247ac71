#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_vm_disk
short_description: Attaches guest disks to a running host VM and detaches them
version_added: 0.1.0
description:
  - Plugs a disk of a guest into the SCSI controller of a host VM's device model, or unplugs it.
    In the host VM it appears as C(/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_<disk>).
  - A disk may be attached to both host VMs of a machine while its guest moves from one to the other. Then only the
    one in which the guest runs writes to it.
  - Detaching does not ask the host VM. Detach a disk only after its guest has left, or the guest gets I/O errors.
  - Run it in the host dom0.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
  - vmbeam.xen.lock
options:
  host_vm:
    description: Name of the host VM. It must run, unless O(state=detached).
    type: str
    required: true
  disk:
    description: Id of the disk, which becomes its serial number. At most 36 characters.
    type: str
    required: true
  path:
    description:
      - Block device or raw image file in the host dom0. Required for O(state=attached).
      - >-
        Names that another disk may have after a reboot, such as V(/dev/sdb), are refused, as C(playbooks/repair.yml)
        attaches what was recorded; but for one that a host VM has by that name already.
    type: path
  state:
    description: Whether the disk shall be attached.
    type: str
    choices: [attached, detached]
    default: attached
  directory:
    description: Folder that holds a folder of files for each host VM.
    type: path
    default: /var/lib/vmbeam/host-vms
  timeout:
    description: Seconds that the device model may take.
    type: float
    default: 60
seealso:
  - module: vmbeam.xen.host_lock
  - module: vmbeam.xen.host_vm_info
"""

EXAMPLES = r"""
- name: Attach a guest's disk to the new host VM
  vmbeam.xen.host_vm_disk:
    host_vm: m1-b
    disk: web1-root
    path: /dev/vg0/web1-root

- name: Detach it from the old one, after the guest has left
  vmbeam.xen.host_vm_disk:
    host_vm: m1-a
    disk: web1-root
    state: detached
    lock:
      owner: upgrade-2026-11
"""

RETURN = r"""
disk:
  description: The disk as it is afterwards, or in check mode would be.
  returned: success
  type: dict
  sample:
    host_vm: m1-b
    id: web1-root
    path: /dev/vg0/web1-root
    state: attached
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._host_lock import LOCK_OPTION, keep_reserved
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import DEFAULT_DIRECTORY, HostVms
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm_disk import HostVmDisk, is_stable, plug_in
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    name = _checks.domain_name("host_vm", params["host_vm"])
    disk = _checks.disk_id("disk", params["disk"])
    deadline = Deadline(_checks.positive("timeout", params["timeout"]))
    wanted = params["state"]
    keep_reserved(params["lock"], check=module.check_mode)

    xl = Xl()
    host_vms = HostVms(xl, _checks.path("directory", params["directory"]))
    domain, _record = host_vms.find(name)
    if wanted == "attached":
        path = _checks.path("path", params["path"])
        if not is_stable(path) and not _is_attached(host_vms, path):
            raise InvalidInput(
                f"path: {path} may be another disk after a reboot, and would be attached as this one. Name it by its "
                "link in /dev/disk/by-id, /dev/mapper or the folder of its volume group."
            )
        seen = plug_in(xl, name, domain, disk, path, deadline, check=module.check_mode)
        there = seen is not None and seen.attached
        return _result(not there, _state(name, disk, path if there else None), _state(name, disk, path))

    if domain is None:
        return _result(False, _state(name, disk, None), _state(name, disk, None))
    target = HostVmDisk(xl, domain.domid, disk)
    seen = target.observe()
    if seen and not module.check_mode:
        target.detach(deadline)
    before = _state(name, disk, seen.path if seen and seen.attached else None)
    return _result(seen is not None, before, _state(name, disk, None))


def _is_attached(host_vms: HostVms, path: str) -> bool:
    """Whether a host VM has it, so that it is only to be passed on."""
    seen = (host_vms.describe(name, *host_vms.find(name)) for name in host_vms.names())
    return any(disk["path"] == path for host_vm in seen for disk in host_vm["disks"] or [])


def _state(host_vm: str, disk: str, path: str | None) -> dict[str, Any]:
    return {"host_vm": host_vm, "id": disk, "path": path, "state": "attached" if path else "detached"}


def _result(changed: bool, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {"changed": changed, "disk": after, "diff": state_diff(before, after)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "host_vm": {"type": "str", "required": True},
            "disk": {"type": "str", "required": True},
            "path": {"type": "path"},
            "state": {"type": "str", "choices": ["attached", "detached"], "default": "attached"},
            "lock": LOCK_OPTION,
            "directory": {"type": "path", "default": DEFAULT_DIRECTORY},
            "timeout": {"type": "float", "default": 60},
        },
        required_if=[("state", "attached", ("path",))],
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
