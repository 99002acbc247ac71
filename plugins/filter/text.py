# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of words: entry points to plugin_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import _text
from ansible_collections.vmbeam.xen.plugins.plugin_utils._filters import checked


class FilterModule:
    """Name the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        functions: dict[str, Callable[..., Any]] = {
            "failure_reason": _text.failure_reason,
            "listed": _text.listed,
        }
        return {name: checked(name, function) for name, function in functions.items()}
