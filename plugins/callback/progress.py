# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: progress
type: aggregate
short_description: Tells how far a rejuvenation is
version_added: 0.1.0
description:
  - Prints a line when the plan of a machine is made, when a phase begins, when a guest has arrived (with its downtime)
    or has not, when a machine is done, and a summary at the end.
  - It comes on top of what the stdout callback prints. Each line begins with C(vmbeam), so that C(grep ^vmbeam) leaves
    the progress alone.
  - Lines are coloured as Ansible's own are, that is, not if the output is no terminal.
  - It looks at nothing but the facts that role P(vmbeam.xen.rejuvenate#role) sets.
author:
  - vmbeam contributors (@vmbeam)
requirements:
  - V(vmbeam.xen.progress) in C(callbacks_enabled) of ansible.cfg, or in C(ANSIBLE_CALLBACKS_ENABLED) of the environment
"""

EXAMPLES = r"""
# ansible.cfg
# [defaults]
# callbacks_enabled = vmbeam.xen.progress
"""

import time
from typing import Any

from ansible import constants as C  # noqa: N812
from ansible.plugins.callback import CallbackBase
from ansible_collections.vmbeam.xen.plugins.plugin_utils._progress import Line, Progress

COLOURS = {True: C.COLOR_OK, False: C.COLOR_ERROR, None: C.COLOR_HIGHLIGHT}


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Prints the progress of role rejuvenate."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "vmbeam.xen.progress"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress = Progress()
        self._began = time.monotonic()

    def v2_runner_on_ok(self, result: Any) -> None:
        """Look for facts in what a task returned."""
        facts = result.result.get("ansible_facts")
        if not facts:
            return
        machine = result.host.get_name()
        for line in self._progress.see(machine, facts):
            self._print(line, machine)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the summary."""
        line = self._progress.summary({**stats.failures, **stats.dark}, time.monotonic() - self._began)
        if line:
            self._print(line, "summary")

    def _print(self, line: Line, what: str) -> None:
        self._display.display(f"vmbeam {time.strftime('%H:%M:%S')} {what}: {line.text}", color=COLOURS[line.good])
