"""The sampler is at work in its sandbox, and sees the hypervisor, xenstore and dom0."""

import json

testinfra_hosts = ["ansible://m1-a"]


def test_it_samples_without_failure(host):
    assert host.service("vmbeam-aging.timer").is_running
    host.run_expect([0], "systemctl start vmbeam-aging.service")
    last = host.file("/var/lib/vmbeam/aging/samples.jsonl").content_string.splitlines()[-1]
    assert {"hypervisor_free_memory", "xenstore_nodes", "dom0_available_memory"} <= set(json.loads(last)["values"])
