"""The sampler's timer runs, and a sample of it ends in the time series and in the metrics."""

testinfra_hosts = ["ansible://m1", "ansible://m1-a"]


def test_timer_runs(host):
    assert host.service("vmbeam-aging.timer").is_enabled
    assert host.service("vmbeam-aging.timer").is_running


def test_a_sample_becomes_metrics(host):
    # It returns when the sample is taken.
    host.check_output("systemctl start vmbeam-aging.service")
    assert "vmbeam_aging" in host.file("/var/lib/prometheus/node-exporter/vmbeam_aging.prom").content_string
