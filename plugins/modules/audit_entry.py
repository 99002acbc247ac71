#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: audit_entry
short_description: Appends an entry to a machine's audit log
version_added: 0.1.0
description:
  - Appends one line of JSON to a log that only root can read and write. No entry is ever changed.
  - Whatever is in an entry stays on its own line, so that nothing in it can pass for another entry.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
attributes:
  idempotent:
    support: none
    details: Each run appends an entry.
options:
  entry:
    description:
      - What to note. C(time), the moment by the clock of this system, is put before it.
      - Keep secrets out.
    type: dict
    required: true
  path:
    description: The log. It and its folder are made if there is none.
    type: str
    default: /var/log/vmbeam/audit.jsonl
  max_mb:
    description: >-
      MiB to which the log may grow. It is then renamed, with the suffix C(.1), and a new one is begun.
    type: int
    default: 8
  keep:
    description: How many of the renamed logs are kept, C(.1) the newest.
    type: int
    default: 4
  syslog:
    description: Whether the entry goes to the system's log too, as facility C(authpriv), with tag C(vmbeam).
    type: bool
    default: false
notes:
  - It needs neither Xen nor C(xl).
"""

EXAMPLES = r"""
- name: Note that a guest was moved
  vmbeam.xen.audit_entry:
    entry:
      event: guest
      guest: web1
      result: moved
      session: 3
"""

RETURN = r"""
entry:
  description: The entry as it was written, or in check mode would have been.
  returned: success
  type: dict
  sample: {time: "2026-01-31T12:00:00.000+00:00", event: guest, guest: web1, result: moved, session: 3}
"""

import datetime
import syslog
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _audit, _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    path = Path(_checks.path("path", params["path"]))
    max_bytes = _checks.positive("max_mb", params["max_mb"]) * 1024 * 1024
    keep = _checks.positive("keep", params["keep"])
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    entry = {"time": time, **{key: value for key, value in params["entry"].items() if key != "time"}}
    if not module.check_mode:
        line = _audit.line_of(entry)
        _audit.append(path, line, max_bytes, keep)
        if params["syslog"]:
            syslog.openlog("vmbeam", facility=syslog.LOG_AUTHPRIV)
            syslog.syslog(syslog.LOG_NOTICE, line)
    return {"changed": True, "entry": entry, "diff": state_diff({}, entry)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "entry": {"type": "dict", "required": True},
            "path": {"type": "str", "default": "/var/log/vmbeam/audit.jsonl"},
            "max_mb": {"type": "int", "default": 8},
            "keep": {"type": "int", "default": 4},
            "syslog": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
