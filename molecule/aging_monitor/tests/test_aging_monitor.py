"""The sampler's timer runs, and a sample of it ends in the time series and in the metrics."""

import json

testinfra_hosts = ["ansible://m1", "ansible://m1-a"]


def test_timer_runs(host):
    assert host.service("vmbeam-aging.timer").is_enabled
    assert host.service("vmbeam-aging.timer").is_running


def test_a_sample_becomes_metrics(host):
    # It returns when the sample is taken.
    host.check_output("systemctl start vmbeam-aging.service")
    metrics = host.file("/var/lib/prometheus/node-exporter/vmbeam_aging.prom").content_string
    for name in ("hypervisor_free_memory_bytes", "xenstore_nodes", "dom0_available_memory_bytes"):
        assert f"\nvmbeam_aging_{name} " in metrics
    sample = json.loads(host.file("/var/lib/vmbeam/aging/samples.jsonl").content_string.splitlines()[-1])
    assert {"hypervisor_free_memory", "xenstore_nodes", "dom0_available_memory"} <= set(sample["values"])
