"""Pages in headless Chromium: nothing is asked for, nothing is complained of, everything fits."""

import os
import shutil

import pytest
from report_runs import read_page, write_classification, write_pretraining, write_probe, write_recognition

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("REQUIRE_CHROMIUM"), reason="needs Debian's chromium (apt-get install chromium)"
)
NAMES = "[...document.querySelectorAll('svg:not([aria-hidden])')].map(e => [e.getAttribute('role'), e.ariaLabel])"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    writers = [write_pretraining, write_recognition, write_classification, write_probe]
    runs = [write(folder / write.__name__.removeprefix("write_")) for write in writers]
    for run in runs:
        read_page(run)
    again = write_pretraining(folder / "again" / "pretraining", learning_rate=1.0)
    read_page(again, *runs)
    return {run.name: run / "page.html" for run in runs} | {"comparison": again / "page.html"}


@pytest.mark.parametrize("kind", ["pretraining", "recognition", "classification", "probe", "comparison"])
def test_a_page_fits_and_asks_for_nothing(browser, pages, kind):
    """Wide and light, then narrow and dark, with everything unfolded."""
    asked, said, papers = [], [], set()
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages[kind].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    for width, scheme in ((1280, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(OVERFLOW) == 0, width
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    pictures = page.evaluate(NAMES)
    assert pictures and all(role == "img" and label for role, label in pictures)
    assert asked == [pages[kind].as_uri()] and not said and len(papers) == 2
    page.close()
