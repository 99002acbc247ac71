"""Where the lab keeps things. Everything is below the checkout or the cache."""

from __future__ import annotations

import os
import pathlib

LAB = pathlib.Path(__file__).resolve().parent.parent
REPOSITORY = LAB.parent

#: Running machines, their disks and logs, the inventory.
STATE = pathlib.Path(os.environ.get("VMBEAM_LAB_STATE") or REPOSITORY / ".lab")
INVENTORY = STATE / "inventory.yml"
LOGS = STATE / "logs"
COLLECTIONS = REPOSITORY / "collections"
