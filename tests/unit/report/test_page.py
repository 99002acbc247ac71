# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The page of a run, in a real browser."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.vmbeam.xen.plugins.filter.report import FilterModule
from playwright.sync_api import Browser, Page, sync_playwright

FILTERS = FilterModule().filters()
BROWSERS = ("chromium-headless-shell", "chromium")
HOSTILE = "<script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is installed: make setup installs Debian's"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


class Shown:
    """A page in the browser, with what it asked for and complained of."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page: Page = browser.new_page(**options)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture
def file(fleet, tmp_path) -> Path:
    path = tmp_path / "run.html"
    path.write_text(FILTERS["rejuvenation_page"](fleet))
    return path


@pytest.fixture
def show(browser, file) -> Iterator[Any]:
    opened: list[Shown] = []

    def show_it(path: Path = file, **options: Any) -> Shown:
        opened.append(Shown(browser, path, **options))
        return opened[-1]

    yield show_it
    for shown in opened:
        shown.page.close()


def test_content_is_there_without_complaint_or_request(show, file):
    shown = show()
    assert "Rejuvenation of 7 machines" in shown.texts("h1")[0]
    assert shown.texts("#timeline") == ["Timeline"]
    outcomes = dict(
        zip(
            shown.texts("section:has(#machines) tbody th"),
            shown.texts("section:has(#machines) tbody td:nth-child(2)"),
            strict=True,
        )
    )
    assert outcomes == {
        "m1": "completed",
        "m2": "failed",
        "m3": "refused",
        "m4": "skipped",
        "m5": "not touched",
        "m6": "unreachable",
        "m7": "failed",
    }
    assert "db1 on m1" in shown.texts(".measure")[0]
    assert "1.27 s" in shown.texts(".measure")[0]
    assert "No route to host" in shown.texts(".trouble")[0]
    assert "Failed to get types for pfn batch" in shown.texts(".trouble pre")[0]
    assert [row.split("\t") for row in shown.texts("section:has(#aging) tbody tr")] == [
        ["m1", "dom0 available memory", "MiB", "112", "655", "fresher"],
        ["m1", "xenstore nodes", "count", "70123", "412", "fresher"],
        ["m1", "uptime", "", "\N{EN DASH}", "91", ""],
    ]
    assert shown.complaints == []
    assert shown.requests == [file.as_uri()]


def test_names_and_messages_do_nothing(show, fleet):
    shown = show()
    assert shown.page.title() == f"Rejuvenation {fleet['run']['id']}: failed"
    assert HOSTILE in shown.texts(".trouble pre")[0]
    assert shown.page.locator("img, iframe, object, embed, form, link, base").count() == 0
    assert shown.page.locator("script").count() == 1
    assert shown.complaints == []


def test_what_got_through_the_escaping_would_not_run(show, file, tmp_path):
    """The page's own policy holds even where the template would not."""
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(file.read_text().replace("<footer>", f"{HOSTILE}<img src=http://attacker.invalid/x><footer>"))
    shown = show(spoiled)
    assert shown.page.title() != "owned"
    assert any("Content Security Policy" in complaint for complaint in shown.complaints)


def test_everything_is_there_without_scripts(show):
    shown = show(java_script_enabled=False)
    assert len(shown.texts("section:has(#machines) tbody tr")) == 7
    assert shown.page.locator("button").count() == 0


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout(show, width, scheme):
    shown = show(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert shown.page.evaluate("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll('body *')].filter(
        one => one.getBoundingClientRect().right > innerWidth && !one.closest('.scroll, .track, pre')
    ).map(one => one.outerHTML.slice(0, 80))"""
    assert shown.page.evaluate(wide) == []
    # Nobody has to scroll a table on a desktop.
    if width == 1400:
        tight = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
        assert shown.page.evaluate(tight) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(show, scheme):
    """WCAG AA: 4.5 to 1 for each text against what is behind it."""
    shown = show(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
    weak = shown.page.evaluate(
        """() => {
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const light = color => {
        const part = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = rgb(color).map(v => part(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = one => {
        const color = getComputedStyle(one).backgroundColor;
        return rgb(color).length === 4 && rgb(color)[3] === 0 ? behind(one.parentElement) : color;
      };
      const found = [];
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const one = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !one.checkVisibility() || one.tagName === 'SCRIPT') continue;
        const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) found.push(one.outerHTML.slice(0, 80));
      }
      return found;
    }"""
    )
    assert weak == []


def test_tables_can_be_sorted(show):
    shown = show()
    column = "section:has(#machines) tbody td:nth-child(6)"
    head = shown.page.get_by_role("button", name="Longest downtime")
    head.click()
    assert shown.texts(column)[-2:] == ["510 ms", "1.27 s"]
    head.click()
    assert shown.texts(column)[:2] == ["1.27 s", "510 ms"]
    assert shown.page.locator("th[aria-sort=descending]").count() == 1


def test_bars_are_where_their_times_are(show):
    shown = show()
    bars = shown.page.locator("#machine-1 .row:has-text('db1') .bar")
    places = [re.findall(r"[\d.]+", bars.nth(number).get_attribute("style") or "") for number in range(bars.count())]
    # The machine took 321 s. db1 began after 190 s, was settled 42 s later, migrated for 21.5 s, and stood still for
    # 1.27 s when it had been connected for 4 s and its memory passed for 12.5 s.
    assert [[float(number) for number in place] for place in places] == [
        pytest.approx([100 * first / 321, 100 * length / 321], abs=0.01)
        for first, length in ((190, 42), (190, 21.5), (206.5, 1.27))
    ]


def test_downtime_of_a_suspended_guest_is_at_the_end_of_its_migration(show):
    shown = show()
    styles = shown.page.locator("#machine-2 .row:has-text('app1') .bar.downtime").get_attribute("style") or ""
    length = 130 + 42 + 1 + 28
    first, width = (float(number) for number in re.findall(r"[\d.]+", styles))
    assert first + width == pytest.approx(100 * (70 + 33) / length, abs=0.01)


def test_landmarks_and_names(show):
    shown = show()
    page = shown.page
    assert page.locator("html").get_attribute("lang") == "en"
    assert [page.get_by_role(role).count() for role in ("banner", "main", "contentinfo")] == [1, 1, 1]
    headings = page.locator("h1, h2, h3").evaluate_all("all => all.map(one => +one.tagName[1])")
    assert headings[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(headings))
    ids = page.locator("[id]").evaluate_all("all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    for target in page.locator("a").evaluate_all("all => all.map(one => one.getAttribute('href'))"):
        assert target.removeprefix("#") in ids


def test_run_in_which_nothing_was_done(show, hostvars, tmp_path, fleet):
    made = FILTERS["rejuvenation_fleet_report"](["m4"], hostvars, fleet["run"], 1_700_000_820.0)
    path = tmp_path / "nothing.html"
    path.write_text(FILTERS["rejuvenation_page"](made))
    shown = show(path)
    assert "Rejuvenation of 1 machine" in shown.texts("h1")[0]
    assert shown.page.locator("#timeline, .trouble, .measure").count() == 0
    assert shown.complaints == []
