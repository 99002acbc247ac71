# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for ssh: each destination is a folder, in which its files are, and a side of the fake xl."""

import json
import os
import signal
import subprocess
import sys

FLEET = os.environ["FAKE_FLEET"]
*words, destination, script = sys.argv[1:]
with open(f"{FLEET}/log", "a") as log:
    print(json.dumps([*words, destination]), file=log)
if not os.path.isdir(f"{FLEET}/{destination}"):
    print(f"ssh: connect to host {destination} port 22: No route to host", file=sys.stderr)
    sys.exit(255)
if os.path.exists(f"{FLEET}/{destination}/hangs"):
    signal.pause()
if os.path.exists(f"{FLEET}/{destination}/dies"):
    sys.exit(1)
os.environ["FAKE_SIDE"] = destination
script = script.replace("/var/lib/vmbeam", f"{FLEET}/{destination}")
sys.exit(subprocess.run(["sh", "-c", script], check=False).returncode)
