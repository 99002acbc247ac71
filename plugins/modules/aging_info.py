#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: aging_info
short_description: Reports how a hypervisor and its dom0 have aged
version_added: 0.1.0
description:
  - Returns indicators of aging of the hypervisor and of the dom0 that it runs in, as they are now, and their time
    series as far as the sampler of role P(vmbeam.xen.aging_monitor#role) has kept it.
  - Works alike in a host dom0 and in a guest dom0. Only reads, and every question that it asks is bounded in time.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options:
  history:
    description: The time series. The file need not exist.
    type: path
    default: /var/lib/vmbeam/aging/samples.jsonl
  window:
    description:
      - How many seconds of the time series to return, up to now. What was before the boot of this dom0 is left out.
    type: int
    default: 604800
  points:
    description:
      - At how many times at most the values of the series are returned; each is the median of neighbours then. With
        V(0) there is no series.
    type: int
    default: 120
  timeout:
    description: Seconds that each command may take.
    type: float
    default: 60
seealso:
  - plugin: vmbeam.xen.aging_trend
    plugin_type: filter
  - plugin: vmbeam.xen.aging_assessment
    plugin_type: filter
"""

EXAMPLES = r"""
- name: See how a guest hypervisor and its dom0 have aged
  vmbeam.xen.aging_info:
  delegate_to: m1-a
  register: aged

- name: See where that leads
  ansible.builtin.debug:
    msg: "{{ aged | vmbeam.xen.aging_trend }}"
"""

RETURN = r"""
time:
  description: When the indicators were read, in seconds since the epoch.
  returned: success
  type: float
  sample: 1762419731.25
indicators:
  description:
    - The indicators that could be read.
    - C(direction) is where aging leads the value, V(up) or V(down).
    - C(limit) is the most that the value can be, C(exhausted_at) the value at which nothing is left; both are null
      where none is known. Of C(hypervisor_own_memory) they are what no domain has now, which changes as domains come
      and go.
    - C(unit) is V(MiB), V(s) or V(count).
    - Of the hypervisor these are C(hypervisor_free_memory) and C(hypervisor_own_memory), which no domain has (its heap
      and tables; Xen on x86 has no heap of its own size); of its toolstack C(toolstack_latency) (the time that C(xl
      list) takes), C(highest_domid) (seen so far; after the limit ids begin anew) and C(device_model_memory) (resident
      memory of the largest one); of xenstore C(xenstore_nodes), C(xenstore_size) (not told by oxenstored),
      C(xenstore_domain_nodes) (those of the domain, but dom0, that has most; the limit is its quota),
      C(xenstored_memory) and C(xenstored_open_files); of dom0 C(dom0_available_memory), C(dom0_unreclaimable_slab),
      C(dom0_threads), C(dom0_open_files), C(disk_free_root), C(disk_free_var) and C(disk_free_vmbeam) (of
      C(/var/lib/vmbeam), each if it is a file system of its own) and C(uptime).
  returned: success
  type: list
  elements: dict
  sample:
    - name: dom0_available_memory
      value: 612.4
      unit: MiB
      limit: 849.2
      direction: down
      exhausted_at: 0.0
unavailable:
  description: Why other indicators could not be read, by name.
  returned: success
  type: dict
  sample:
    xenstore_nodes: xenstored does not answer at /run/xenstored/socket
series:
  description:
    - Earlier values since the boot, oldest first, as C(times) and for each of C(indicators) as many values, which are
      null where it was not seen.
    - C(samples) is how many samples they stand for.
  returned: success
  type: dict
  sample:
    samples: 2
    times: [1762419131.25, 1762419431.25]
    indicators:
      dom0_available_memory: [640.1, 626.8]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._aging import Dom0, observe
from ansible_collections.vmbeam.xen.plugins.module_utils._aging_history import DEFAULT_PATH, History, thin
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module


def body(module: AnsibleModule) -> dict[str, Any]:
    history = History(_checks.path("history", module.params["history"]))
    window = _checks.positive("window", module.params["window"])
    timeout = _checks.positive("timeout", module.params["timeout"])
    points = module.params["points"]
    if points < 0:
        raise InvalidInput(f"points: {points} is too small. Give 0 or more.")
    dom0 = Dom0(timeout=timeout)
    now = dom0.now()
    samples = history.read(dom0.proc.boot_id(), now - window, now)
    seen = observe(dom0, samples[-1].values if samples else {})
    return {
        "changed": False,
        "time": seen.time,
        "indicators": [indicator.as_dict() for indicator in seen.indicators],
        "unavailable": seen.unavailable,
        "series": {"samples": len(samples), **thin(samples, points)},
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "history": {"type": "path", "default": DEFAULT_PATH},
            "window": {"type": "int", "default": 604800},
            "points": {"type": "int", "default": 120},
            "timeout": {"type": "float", "default": 60},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
