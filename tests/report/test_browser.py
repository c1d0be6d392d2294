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


def look(browser, path, width=1280, scheme="light"):
    """The page as opened, whatever it asked for, and whatever the console said."""
    asked, said = [], []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    return page, asked, said


@pytest.mark.parametrize("kind", ["pretraining", "recognition", "classification", "probe", "comparison"])
class TestPages:
    @pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
    def test_it_fits_and_asks_for_nothing(self, browser, pages, kind, width, scheme):
        page, asked, said = look(browser, pages[kind], width, scheme)
        assert asked == [pages[kind].as_uri()] and not said
        assert page.evaluate(OVERFLOW) == 0
        pictures = page.evaluate(NAMES)
        assert pictures and all(role == "img" and label for role, label in pictures)

    def test_dark_differs_from_light(self, browser, pages, kind):
        colours = {
            look(browser, pages[kind], scheme=scheme)[0].evaluate("getComputedStyle(document.body).backgroundColor")
            for scheme in ("light", "dark")
        }
        assert len(colours) == 2
