# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters that judge how machines have aged: entry points to plugin_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import _aging_policy, _aging_trend
from ansible_collections.vmbeam.xen.plugins.plugin_utils._filters import checked


class FilterModule:
    """Name the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        functions: dict[str, Callable[..., Any]] = {
            "aging_trend": _aging_trend.trends,
            "aging_assessment": _aging_policy.assess,
            "aging_text": _aging_policy.describe,
        }
        return {name: checked(name, function) for name, function in functions.items()}
