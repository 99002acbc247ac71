# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of the rejuvenate role: entry points to the decisions in plugin_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import (
    _affinity,
    _plan,
    _preflight,
    _preview,
    _recovery,
    _report,
    _settle,
    _variables,
)
from ansible_collections.vmbeam.xen.plugins.plugin_utils._filters import checked


class FilterModule:
    """Name the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        functions: dict[str, Callable[..., Any]] = {
            "host_vm_objections": _variables.host_vm_objections,
            "rejuvenation_objections": _variables.rejuvenation_objections,
            "rejuvenation_plan": _plan.make_plan,
            "rejuvenation_plan_text": _plan.describe,
            "rejuvenation_confirm": _plan.confirm_plan,
            "rejuvenation_batches": _plan.batches,
            "rejuvenation_preview": _preview.preview,
            "rejuvenation_turns": _affinity.turns,
            "rejuvenation_destination_problems": _preflight.destination_problems,
            "rejuvenation_account": _report.account,
            "rejuvenation_passed": _settle.passed,
            "rejuvenation_settled": _settle.settled,
            "rejuvenation_recovery": _recovery.recovery,
            "rejuvenation_report": _report.make_report,
            "rejuvenation_report_text": _report.report_text,
            "rejuvenation_record": _report.record_run,
            "rejuvenation_close_cut_run": _report.close_cut_run,
        }
        return {name: checked(name, function) for name, function in functions.items()}
