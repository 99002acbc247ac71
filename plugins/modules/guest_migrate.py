#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_migrate
short_description: Migrates a guest to another guest dom0
version_added: 0.1.0
description:
  - Moves a running guest from the guest dom0 that the module runs in to another one. The guest's disks must be
    available there under the same paths.
  - What an earlier, failed migration of the guest has left is repaired first, if it is provable which copy of the
    guest is the live one. A guest that runs at the destination, and not here, is left as it is.
  - After a failure the module verifies where the guest is, lets it run on where that is safe, and reports the
    RV(location). It never touches anything if both ends have a copy that has run.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
requirements:
  - C(ssh) and C(flock) (Debian's openssh-client and util-linux); with O(transport=tcp) Python at the destination too;
    with O(transport=channel) the service C(vmbeam-channel) of role P(vmbeam.xen.guest_hypervisor#role) in both
options:
  name:
    description: Name of the guest.
    type: str
    required: true
  destination:
    description: Address of the destination's guest dom0, as ssh takes it.
    type: str
    required: true
  destination_user:
    description: User to log in as at the destination. It must be root, or equal to it, for xl.
    type: str
    default: root
  strategy:
    description:
      - V(precopy) is xl's live migration. The guest runs on while its memory is copied, over and over as it changes.
      - V(suspend) stops the guest, copies its memory once, and starts it at the destination. It needs the least time
        in all, and the longest downtime.
      - V(zero_copy) passes the memory on to the destination, which is a host VM on the same machine, without copying
        it. It takes a session (M(vmbeam.xen.zero_copy_session)).
      - V(cold) does not take the memory along. The guest is shut down, and started anew at the destination from
        O(config). One that has crashed or shut down already is started anew too, and one that is in neither guest dom0
        is started at the destination, which is how an interrupted run goes on. If it cannot be started there, it is
        started again at the source.
    type: str
    choices: [precopy, suspend, zero_copy, cold]
    default: precopy
  config:
    description:
      - Path of the guest's xl configuration for O(strategy=cold), the same in both guest dom0s. Its C(name) must be
        O(name).
      - What was changed of the running guest since it was started (memory, devices) is not in it.
    type: path
  shutdown_timeout:
    description: Seconds that the guest may take to shut down with O(strategy=cold).
    type: float
    default: 300
  destroy:
    description: >-
      Whether a guest that does not shut down within O(shutdown_timeout) is destroyed, as if its power was cut.
      Otherwise the module fails then, and the guest stays at the source; it may still shut down later.
    type: bool
    default: false
  session:
    description:
      - Number of the session for O(strategy=zero_copy).
      - By default the first one that lets this host VM pass a guest's memory on, and that none has used.
    type: int
  transport:
    description:
      - How the guest's memory gets to the destination.
      - V(ssh) encrypts it.
      - V(channel) is memory that the two guest dom0s share (M(vmbeam.xen.zero_copy_session)). Nothing is encrypted, and
        nothing of the guest passes any network. The module looks after what is left of a failed migration by ssh, and
        with O(strategy=suspend) tells the destination by ssh to go on. With O(strategy=zero_copy) only the state of the
        guest's CPUs and devices takes this way, not its memory. O(strategy=cold) cannot use it.
      - V(tcp) sends it as it is over a TCP connection to O(destination), which costs far less CPU time. Who can
        listen on that network can read the guest's memory, so use it on a bridge inside the machine only. The
        connection is set up by ssh and admitted by a token that is used once.
    type: str
    choices: [ssh, tcp, channel]
    default: ssh
  channel:
    description: Number of the session of the channel for O(transport=channel), if this host VM has several.
    type: int
  ssh_args:
    description: Further arguments of ssh, which win over those that the module gives.
    type: list
    elements: str
    default: []
  timeout:
    description: >-
      Seconds that the migration, or with O(strategy=cold) the start of the guest, may take. After that it is broken off
      and the guest runs on at the source. xl may need some more minutes for that, so allow ten more where the task
      itself has a limit, such as C(async).
    type: float
    default: 1800
notes:
  - Root of the source's guest dom0 needs an ssh key that the destination accepts, and the destination's host key in its
    C(known_hosts).
seealso:
  - module: vmbeam.xen.guest
"""

EXAMPLES = r"""
- name: Migrate a guest live
  vmbeam.xen.guest_migrate:
    name: web1
    destination: 10.0.2.22
  delegate_to: m1-a

- name: Migrate a guest by way of a suspension, with a cheap cipher
  vmbeam.xen.guest_migrate:
    name: web2
    destination: 10.0.2.22
    strategy: suspend
    ssh_args: ["-c", "aes128-gcm@openssh.com"]
  delegate_to: m1-a

- name: Pass a guest's memory on instead of copying it
  vmbeam.xen.guest_migrate:
    name: db1
    destination: 10.0.2.22
    strategy: zero_copy
    transport: channel
  delegate_to: m1-a

- name: Shut a guest down and start it in the other host VM
  vmbeam.xen.guest_migrate:
    name: legacy1
    destination: 10.0.2.22
    strategy: cold
    config: /etc/xen/guests/legacy1.cfg
  delegate_to: m1-a

- name: Migrate a guest over the machine's own bridge
  vmbeam.xen.guest_migrate:
    name: web3
    destination: 10.0.2.22
    transport: tcp
  delegate_to: m1-a
"""

RETURN = r"""
migration:
  description: What was done.
  returned: always, except for arguments that cannot be used
  type: dict
  contains:
    guest:
      description: Name of the guest.
      type: str
    strategy:
      description: The strategy that was used.
      type: str
    seconds:
      description: Time that all of it took.
      type: float
    downtime_seconds:
      description: >-
        Time from xl's message that the guest is suspended to the one that it is started, as both were seen at
        the source; null if one of them was not seen. With O(strategy=cold) from the request to shut down until the
        guest is started, without its boot; null if it did not run.
      type: float
    bytes:
      description: Size of the migration stream, null if unknown, as it is with O(strategy=precopy).
      type: int
    phases:
      description:
        - Seconds that each phase of xl's migration took, as seen at the source. Empty with O(strategy=suspend);
          C(stop) and C(start) with O(strategy=cold).
        - C(connect) ends when the receiver is ready; C(memory), with the guest running, when it is suspended; C(state),
          when the destination has all of it; C(hand_over), when the destination may go on; C(start), when the guest is
          started; C(clean_up), when the source has removed its copy. One whose end was not seen counts to the next one.
      type: dict
    memory:
      description:
        - What O(strategy=zero_copy) did to the memory, as counted by the host hypervisor, and C(pages_sent) by the
          toolstack; null with the others.
        - C(pages_passed_on) are pages of 4 KiB that the destination got without copying, C(pages_copied) those that
          were copied because something else on the machine had them in use, C(hypercalls) the calls of both guest
          hypervisors for it, C(p2m_writes_4k) and C(p2m_writes_2m) the changed entries of page tables, C(session) its
          number.
        - C(pages_sent) are those that the toolstack copied into the migration stream because they cannot be passed on,
          such as the rings of console and xenstore; null if the toolstack is too old to tell. What was copied in all is
          C(pages_copied) and C(pages_sent) together.
      type: dict
      sample:
        session: 7
        pages_passed_on: 32760
        pages_copied: 0
        pages_sent: 8
        hypercalls: 25
        p2m_writes_4k: 1561
        p2m_writes_2m: 189
    repairs:
      description: What was done about the remains of a failed migration.
      type: list
      elements: str
    log_tail:
      description: The last lines that xl and ssh printed, those for debugging left out.
      type: list
      elements: str
  sample:
    guest: web1
    strategy: suspend
    seconds: 34.102
    downtime_seconds: 33.26
    bytes: 277348111
    phases: {}
    memory: null
    repairs: []
    log_tail: ["Loading new save file /dev/stdin (new xl fmt info 0x3/0x0/1276)"]
location:
  description: >-
    Where the guest is. V(source) or V(destination) means there and only there; V(unknown) that one of the
    two dom0s could not be asked.
  returned: always, except for arguments that cannot be used
  type: str
  choices: [source, destination, both, nowhere, unknown]
  sample: destination
"""

from functools import partial
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._cold import ColdOptions
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput, VmbeamError
from ansible_collections.vmbeam.xen.plugins.module_utils._migrate import Links, Migration
from ansible_collections.vmbeam.xen.plugins.module_utils._migration_state import DESTINATION
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff
from ansible_collections.vmbeam.xen.plugins.module_utils._transport import (
    channel_domains,
    channel_rune,
    ssh_command,
    ssh_rune,
    tcp_rune,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import require_capable


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    name = _checks.domain_name("name", params["name"])
    address = _checks.address("destination", params["destination"])
    user = _checks.user("destination_user", params["destination_user"])
    ssh = ssh_command(address, user, params["ssh_args"])
    rune = partial(tcp_rune, ssh, address) if params["transport"] == "tcp" else partial(ssh_rune, ssh)
    channel = params["channel"]
    if channel is not None:
        if params["transport"] != "channel":
            raise InvalidInput(f"channel: transport {params['transport']} uses none. Leave it out.")
        _checks.positive("channel", channel)
    if params["transport"] == "channel":
        if params["strategy"] == "cold":
            raise InvalidInput("transport: strategy cold has nothing for a channel. Use ssh.")
        links = Links(Xl(), Xl(ssh=ssh), rune, partial(channel_rune, session=channel), lambda: channel_domains(channel))
    else:
        links = Links(Xl(), Xl(ssh=ssh), rune)
    cold = None
    if params["strategy"] == "cold":
        if params["config"] is None:
            raise InvalidInput("config: strategy cold needs the path of the guest's xl configuration.")
        cold = ColdOptions(
            _checks.path("config", params["config"]),
            _checks.positive("shutdown_timeout", params["shutdown_timeout"]),
            params["destroy"],
        )
    if params["session"] is not None:
        if params["strategy"] != "zero_copy":
            raise InvalidInput(f"session: strategy {params['strategy']} uses none. Leave it out.")
        _checks.positive("session", params["session"])
    if params["strategy"] == "zero_copy":
        require_capable()
    migration = Migration(
        name,
        links,
        params["strategy"],
        timeout=_checks.positive("timeout", params["timeout"]),
        session=params["session"],
        cold=cold,
    )
    try:
        if module.check_mode:
            before, changed = migration.foresee()
        else:
            before = migration.location()
            changed = migration.run()
    except VmbeamError as exc:
        exc.details["migration"] = migration.report.as_dict()
        raise
    return {
        "changed": changed,
        "location": DESTINATION,
        "migration": migration.report.as_dict(),
        "diff": state_diff({"location": before}, {"location": DESTINATION}),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "destination": {"type": "str", "required": True},
            "destination_user": {"type": "str", "default": "root"},
            "strategy": {"type": "str", "choices": ["precopy", "suspend", "zero_copy", "cold"], "default": "precopy"},
            "config": {"type": "path"},
            "shutdown_timeout": {"type": "float", "default": 300},
            "destroy": {"type": "bool", "default": False},
            "session": {"type": "int"},
            "transport": {"type": "str", "choices": ["ssh", "tcp", "channel"], "default": "ssh"},
            "channel": {"type": "int"},
            "ssh_args": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 1800},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
