# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Renders configuration files in xl's syntax (xl.cfg(5))."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput

_KEY = re.compile(r"[a-z][._0-9a-z]*")


def render(options: Mapping[str, Any]) -> str:
    """The text of an xl configuration file, one option a line in the given order.

    Values are strings, non-negative integers, booleans (as 1 and 0) and lists of strings and
    integers. Raises InvalidInput for anything that xl could not read back.
    """
    return "".join(f"{_key(key)} = {_value(key, value)}\n" for key, value in options.items())


def _key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidInput(f"extra_config: {key!r} is not the name of an xl option (lower-case letters, digits, '_').")
    return key


def _value(key: str, value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(key, item) for item in value) + "]"
    return _scalar(key, value)


def _scalar(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int) and value >= 0:
        return str(value)
    if isinstance(value, str) and value.isprintable():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    raise InvalidInput(
        f"{key}: {value!r} cannot be written to an xl configuration. "
        "Use a printable string, a non-negative integer, a boolean or a list of these."
    )
