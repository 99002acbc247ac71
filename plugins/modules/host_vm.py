#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_vm
short_description: Starts and removes host VMs in a host dom0
version_added: 0.1.0
description:
  - A host VM is an HVM domain with nested virtualization, in which a guest hypervisor and its guests run.
    A machine has at most two of them, in the slots V(a) and V(b).
  - Every start makes a new I(generation), from a fresh overlay of the golden image.
    The host VM gets its identity from a seed disk, a tar archive which it unpacks at boot.
  - Run it in the host dom0. It returns as soon as the host VM runs; use M(vmbeam.xen.wait_for_xen) in the
    host VM to wait until its guest hypervisor is ready.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
requirements:
  - C(qemu-img) (Debian's qemu-utils)
attributes:
  idempotent:
    details: >-
      A running host VM is left as it is, also if its arguments differ, which gives a warning:
      they take effect at the next start.
options:
  name:
    description: Name of the host VM, which is also the name of its domain.
    type: str
    required: true
  state:
    description:
      - V(started) creates and starts the host VM unless it runs.
      - V(stopped) stops it, and leaves its files and what is recorded of its guests, as a power cut of the machine
        does, so that C(playbooks/repair.yml) can start it with its guests again. Stop the guests first.
      - V(absent) stops it and removes its files. Guests that still run in it are lost.
    type: str
    choices: [started, stopped, absent]
    default: started
  slot:
    description: The machine's slot that the host VM takes. Required for O(state=started).
    type: str
    choices: [a, b]
  memory_mb:
    description:
      - Memory in MiB. Required for O(state=started).
      - A start is refused if the hypervisor has too little free memory for it and the overhead.
    type: int
  vcpus:
    description: Number of virtual CPUs.
    type: int
    default: 1
  cpus:
    description: Physical CPUs that the virtual CPUs are pinned to, in the form of xl.cfg(5).
    type: str
  image:
    description: Path of the golden image, a raw disk image. Required for O(state=started).
    type: path
  directory:
    description: Folder that holds a folder of files for each host VM.
    type: path
    default: /var/lib/vmbeam/host-vms
  nics:
    description: Network interfaces.
    type: list
    elements: dict
    default: []
    suboptions:
      mac:
        description: MAC address.
        type: str
        required: true
      bridge:
        description: Bridge in the host dom0.
        type: str
        default: xenbr0
      model:
        description:
          - Model of the emulated network card, as the device model names it.
          - Every access to a register of V(e1000) or V(rtl8139) is an exit to the host dom0.
        type: str
        default: virtio-net-pci
  seed_files:
    description: Files that the host VM unpacks to its root folder at boot, such as its host name and keys.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Absolute path in the host VM.
        type: str
        required: true
      content:
        description: Content of the file.
        type: str
        required: true
      mode:
        description: Permissions, as octal digits in quotes.
        type: str
        default: "0644"
  console_log:
    description:
      - File in the host dom0 that gets the output of the host VM's serial console.
      - If omitted, C(/var/log/xen/vmbeam/<name>.console).
    type: path
  generation:
    description: Number of the generation. If omitted, one more than the highest on the machine.
    type: int
  timeout:
    description:
      - Seconds that a start may take, from copying files until the domain runs.
      - With O(state=stopped), or O(state=absent) and O(graceful=true), seconds until the host VM is destroyed instead.
    type: float
    default: 300
  graceful:
    description: >-
      With O(state=stopped) and O(state=absent), whether to press the power button and wait before destroying the host
      VM.
    type: bool
    default: true
  previous_disk:
    description:
      - What becomes of the disk of a host VM of that name that was lost, as when the machine was rebooted, instead of
        being removed. It may hold the only copy of its guests' configurations.
      - V(refuse) starts nothing then, V(keep) moves the disk to the folder C(.kept) in O(directory), and V(discard)
        removes it.
      - With O(state=absent) the disk is removed unless this is V(keep).
    type: str
    choices: [refuse, keep, discard]
    default: refuse
  extra_config:
    description: Further options of xl.cfg(5), which win over those that the module sets.
    type: dict
    default: {}
seealso:
  - module: vmbeam.xen.host_vm_info
  - module: vmbeam.xen.host_vm_disk
"""

EXAMPLES = r"""
- name: Start a host VM in slot b
  vmbeam.xen.host_vm:
    name: m1-b
    slot: b
    memory_mb: 8192
    vcpus: 2
    image: /var/lib/vmbeam/images/guest-hypervisor.raw
    nics:
      - mac: "00:16:3e:00:01:0b"
    seed_files:
      - path: /etc/hostname
        content: "m1-b\n"
      - path: /root/.ssh/id_ed25519
        content: "{{ vault_m1_migration_key }}"
        mode: "0600"
    extra_config:
      tsc_mode: native

- name: Remove the host VM in slot a at once, after its guests have left it
  vmbeam.xen.host_vm:
    name: m1-a
    state: absent
    graceful: false
"""

RETURN = r"""
host_vm:
  description: The host VM as it is afterwards, or in check mode would be.
  returned: success
  type: dict
  sample:
    name: m1-b
    domid: 7
    state: running
    memory_mb: 8192
    vcpus: 2
    slot: b
    generation: 12
    created: "2025-03-01T03:00:12+00:00"
    image_sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    disks: []
kept_disk:
  description: Where the disk of the host VM that was lost or removed is kept, null if none was there to be kept.
  returned: if it was kept, and always on success
  type: str
  sample: /var/lib/vmbeam/host-vms/.kept/m1-b-11-20250301T030012Z.qcow2
left_behind:
  description: What a failed start could not undo.
  returned: when a start failed and undoing it failed too
  type: str
  sample: "Undoing the start failed too, m1-b may be left: xl destroy 7 failed with exit code 1"
"""

import contextlib
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import DEFAULT_DIRECTORY, HostVms, Nic, Spec
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff
from ansible_collections.vmbeam.xen.plugins.module_utils._seed import seed_file
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def spec_of(params: dict[str, Any]) -> Spec:
    return Spec(
        name=params["name"],
        slot=params["slot"],
        memory_mb=_checks.positive("memory_mb", params["memory_mb"]),
        image=_checks.path("image", params["image"]),
        vcpus=_checks.positive("vcpus", params["vcpus"]),
        cpus=params["cpus"],
        nics=[Nic(**nic) for nic in params["nics"]],
        seed_files=[seed_file(**item) for item in params["seed_files"]],
        console_log=_checks.path(
            "console_log", params["console_log"] or f"/var/log/xen/vmbeam/{params['name']}.console"
        ),
        generation=params["generation"],
        extra_config=params["extra_config"],
    )


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    name = _checks.domain_name("name", params["name"])
    deadline = Deadline(_checks.positive("timeout", params["timeout"]))
    host_vms = HostVms(Xl(), _checks.path("directory", params["directory"]))
    spec = spec_of(params) if params["state"] == "started" else None
    # What a dead controller has begun goes on: its host VM is not to be taken for one whose start has failed.
    with contextlib.nullcontext() if module.check_mode else host_vms.exclusive(name, deadline):
        return settle(module, host_vms, name, spec, deadline)


def settle(
    module: AnsibleModule, host_vms: HostVms, name: str, spec: Spec | None, deadline: Deadline
) -> dict[str, Any]:
    """Brings the host VM to the wanted state, or says what that would change; returns the module's result."""
    params = module.params
    previous, kept = params["previous_disk"], None
    step, domain, record = host_vms.plan(name, params["state"])
    before = host_vms.describe(name, domain, record)
    if spec and step is None and host_vms.differs(spec):
        module.warn(f"{name} runs with another configuration; the new one takes effect at its next start.")
    if step == "create" and spec:
        if module.check_mode:
            # A domain that never ran has nothing on its disk.
            host_vms.preflight(spec, "discard" if domain else previous)
            after = host_vms.foresee(spec)
        else:
            kept = host_vms.start(spec, deadline, previous)
    elif not module.check_mode:
        if step == "unpause" and domain:
            host_vms.unpause(domain)
        elif step == "stop":
            host_vms.stop(name, deadline, graceful=params["graceful"])
        elif step == "remove":
            kept = host_vms.remove(name, deadline, graceful=params["graceful"], keep_disk=previous == "keep")
    if not module.check_mode:
        after = host_vms.describe(name, *host_vms.find(name))
    elif step == "unpause":
        after = {**before, "state": "running"}
    elif step in ("stop", "remove"):
        after = host_vms.describe(name, None, record if step == "stop" else None)
    elif step is None:
        after = before
    return {
        "changed": step is not None,
        "host_vm": after,
        "kept_disk": str(kept) if kept else None,
        "diff": state_diff(before, after),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["started", "stopped", "absent"], "default": "started"},
            "slot": {"type": "str", "choices": ["a", "b"]},
            "memory_mb": {"type": "int"},
            "vcpus": {"type": "int", "default": 1},
            "cpus": {"type": "str"},
            "image": {"type": "path"},
            "directory": {"type": "path", "default": DEFAULT_DIRECTORY},
            "nics": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "mac": {"type": "str", "required": True},
                    "bridge": {"type": "str", "default": "xenbr0"},
                    "model": {"type": "str", "default": "virtio-net-pci"},
                },
            },
            "seed_files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "str", "required": True},
                    "content": {"type": "str", "required": True, "no_log": True},
                    "mode": {"type": "str", "default": "0644"},
                },
            },
            "console_log": {"type": "path"},
            "generation": {"type": "int"},
            "timeout": {"type": "float", "default": 300},
            "graceful": {"type": "bool", "default": True},
            "previous_disk": {"type": "str", "choices": ["refuse", "keep", "discard"], "default": "refuse"},
            "extra_config": {"type": "dict", "default": {}},
        },
        required_if=[("state", "started", ("slot", "memory_mb", "image"))],
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
