# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for ssh: runs its last argument as a process that outlives it, and relays its streams."""

import os
import subprocess
import sys
import threading

if os.path.exists(f"{os.environ['FAKE_XEN']}/faults/unreachable"):
    print("ssh: connect to host destination port 22: No route to host", file=sys.stderr)
    sys.exit(255)


def pour(source, sink):
    try:
        while data := os.read(source, 1 << 16):
            while data:
                data = data[os.write(sink, data) :]
    except OSError:
        pass
    os.close(sink)


os.environ["FAKE_SIDE"] = "destination"
remote = subprocess.Popen(
    ["sh", "-c", sys.argv[-1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
)
threading.Thread(target=pour, args=(0, remote.stdin.fileno()), daemon=True).start()
pour(remote.stdout.fileno(), 1)
os._exit(remote.wait())
