"""Both files of the report are there, and the data names the machine that nothing was done with."""

import json
import os
import pathlib

REPORT = pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "reports", "rejuvenation-molecule")


def test_the_data_names_the_machine():
    report = json.loads(REPORT.with_suffix(".json").read_text())
    assert [machine["machine"] for machine in report["machines"]] == ["m1"]
    # A run in check mode, which comes first, writes one, too.
    assert report["run"]["check_mode"] is False


def test_the_page_names_the_machine():
    page = REPORT.with_suffix(".html").read_text()
    assert "m1" in page
    assert "check mode: nothing was changed" not in page
