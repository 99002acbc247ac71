# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Checks of names and other values that end up in xl's command line or in QEMU's monitor."""

from __future__ import annotations

import re
from typing import TypeVar

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput

Number = TypeVar("Number", int, float)

# xl takes an argument of digits only for a domain id.
_NAME = re.compile(r"(?!\d+$)[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")
# Names that xl gives to a domain that is being migrated.
MIGRATION_SUFFIXES = ("--incoming", "--migratedaway")
# QEMU refuses longer serial numbers.
_DISK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,35}")
_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:%_-]*")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_UNIT = re.compile(r"[A-Za-z0-9:_.@\\][A-Za-z0-9:_.@\\-]*")
_PATH = re.compile(r"/[A-Za-z0-9@%+=:._/-]*[A-Za-z0-9@%+=:._-]")


def domain_name(option: str, value: str) -> str:
    """Returns value if it can name a domain, else raises InvalidInput."""
    if value == "Domain-0" or value.endswith(MIGRATION_SUFFIXES) or not _NAME.fullmatch(value):
        raise InvalidInput(
            f"{option}: {value!r} cannot name a domain. Use up to 63 letters, digits, '.', '_', '+' and '-', "
            "not digits only, not Domain-0, and without the suffixes that xl uses during a migration."
        )
    return value


def disk_id(option: str, value: str) -> str:
    """Returns value if it can be a disk's id (and serial number), else raises InvalidInput."""
    if not _DISK.fullmatch(value):
        raise InvalidInput(
            f"{option}: {value!r} cannot be a disk id. Use 1 to 36 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    return value


def path(option: str, value: str) -> str:
    """Returns value if it is a path that needs no quoting in xl and QEMU, else raises InvalidInput."""
    if not _PATH.fullmatch(value) or "//" in value or "/../" in f"{value}/":
        raise InvalidInput(
            f"{option}: {value!r} is not usable. Give an absolute path of letters, digits and '@%+=:._-', without '..'."
        )
    return value


def address(option: str, value: str) -> str:
    """Returns value if it can be a host's name or address, else raises InvalidInput."""
    if not _ADDRESS.fullmatch(value):
        raise InvalidInput(f"{option}: {value!r} is not a host name or an IP address.")
    return value


def user(option: str, value: str) -> str:
    """Returns value if it can be a user's name, else raises InvalidInput."""
    if not _USER.fullmatch(value):
        raise InvalidInput(f"{option}: {value!r} is not a user name.")
    return value


def unit(option: str, value: str) -> str:
    """Returns value if it can be a systemd unit's name, else raises InvalidInput."""
    if not _UNIT.fullmatch(value):
        raise InvalidInput(f"{option}: {value!r} is not the name of a systemd unit.")
    return value


def positive(option: str, value: Number) -> Number:
    """Returns value if it is greater than zero, else raises InvalidInput."""
    if not value > 0:
        raise InvalidInput(f"{option}: {value:g} is too small. Give a number greater than 0.")
    return value
