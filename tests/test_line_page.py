"""The page in a real browser: what it shows, hostile names, orders, and that it says when there is no news."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowad_fast.line import Alarm, Shot
from flowad_fast.stages.decision import Calibration, ClassCalibration, PixelThreshold
from tests.line_servers import missing, until
from tests.line_station import TOKEN, Page
from tests.test_detector import FakeEngine, fake
from tests.test_line_runner import frame
from tests.test_line_web import gated

pytestmark = pytest.mark.long
HOSTILE = ("<script>alert(1)</script>.png", '"><img src=x onerror=alert(2)>.png', "';alert(3)//${alert(4)}.png")


class Spotted(FakeEngine):
    """As the fake, but the map has the score in one place only."""

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        maps, scores = super().run(frames, y)
        spot = np.zeros_like(maps)
        spot[:, 20:30, 40:48] = maps[:, 20:30, 40:48]
        return spot, scores


def detector() -> Any:
    limits = ClassCalibration(threshold=100.0, parts=100, pixels=PixelThreshold(threshold=100.0, parts=100))
    return fake(Calibration(alpha=0.01, classes={"": limits}), Spotted())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    try:
        from selenium import webdriver
    except ModuleNotFoundError:
        missing("chromium-driver, and selenium of PyPI")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing("chromium, chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for one in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    one = webdriver.Chrome(options, webdriver.ChromeService(driver))
    one.set_window_size(1300, 1000)
    yield one
    one.quit()


def text(browser: Any, selector: str) -> str:
    found: str = browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)
    return found


def shown(browser: Any, selector: str) -> bool:
    found: bool = browser.find_element("css selector", selector).is_displayed()
    return found


def troubles(browser: Any) -> list[str]:
    """What the console says is wrong: exceptions, and what the policy has blocked."""
    return [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]


@pytest.fixture
def page(tmp_path: Path, browser: Any) -> Iterator[Page]:
    hostile = [Shot(frame(150, i), name) for i, name in enumerate(HOSTILE)]
    (tmp_path / "bundles" / "two").mkdir(parents=True)
    (tmp_path / "bundles" / "two" / "manifest.json").write_text("{}")
    (tmp_path / "bundles" / '"><b>three').mkdir()
    (tmp_path / "bundles" / '"><b>three' / "manifest.json").write_text("{}")
    shots, go = gated(frame(5), *hostile, Shot(None, "<i>half</i>", "<b>incomplete</b> buffer"))
    with Page(detector(), shots, tmp_path) as one:
        one.line.start()
        until(lambda: one.watch.report()["cell"].parts == 5)
        browser.get(one.web.address)
        troubles(browser)  # of the test before
        until(lambda: text(browser, "#ready") == "ready")
        yield one
        go.set()


def test_it_shows_the_line(page: Page, browser: Any) -> None:
    tiles = text(browser, "#tiles")
    assert "5parts" in tiles and "1good" in tiles and "3anomalous" in tiles and "1no result" in tiles
    assert text(browser, "#verdict") == "anomalous" and "score 150, threshold 100" in text(browser, "#score")
    assert "region at 40, 20: 80 px" in text(browser, "#regions")
    assert "camera cell" in text(browser, "#sources") and browser.title == "Line"
    for chart in ("#rejects", "#scores", "#latency"):
        assert browser.find_elements("css selector", f"{chart} svg polyline"), chart
    assert "learning what is usual" in text(browser, "#learned")
    assert len(browser.find_elements("css selector", "#evidence .test")) >= 2
    assert troubles(browser) == []


def test_heat_and_contours_are_drawn_where_the_defect_is(page: Page, browser: Any) -> None:
    pixel = """const c = document.getElementById("canvas"), s = c.width / 64;
        return [...c.getContext("2d").getImageData(arguments[0] * s, arguments[1] * s, 1, 1).data]"""

    def at(x: float, y: float) -> list[int]:
        found: list[int] = browser.execute_script(pixel, x, y)
        return found

    until(lambda: at(44, 25)[3] == 255)
    set_opacity = "const o = arguments[0]; o.value = arguments[1]; o.dispatchEvent(new Event('input'))"
    slider = browser.find_element("id", "opacity")
    browser.execute_script(set_opacity, slider, 100)
    with_heat, outside = at(44.5, 25.5), at(10.5, 50.5)
    assert with_heat[0] > with_heat[2], "from the threshold on, heat is warm"
    assert min(at(40, 25)[:3]) > 200, "a white contour at the box's edge"
    browser.execute_script(set_opacity, slider, 0)
    assert at(44.5, 25.5) != with_heat and at(10.5, 50.5) == outside


def test_hostile_names_are_text(page: Page, browser: Any) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    page.line.tell(Alarm("<script>alert(5)</script>", datetime.now(UTC), '"><img src=x onerror=alert(6)>'))
    until(lambda: "alert(6)" in text(browser, "#alarms"))
    browser.find_element("id", "bad").click()
    until(lambda: "alert(3)" in text(browser, "#outcomes"))
    rows = text(browser, "#outcomes")
    assert all(name in rows for name in HOSTILE)
    browser.find_element("id", "all").click()
    assert "<i>half</i>" in text(browser, "#outcomes") and "<b>incomplete</b> buffer" in text(browser, "#outcomes")
    assert text(browser, "#part").endswith(HOSTILE[-1])
    assert browser.find_elements("css selector", "td script, td img, td i, #alarms img, #alarms script, p img") == []
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    scripts = browser.execute_script("return [...document.scripts].map((one) => one.getAttribute('src'))")
    assert scripts == ["page.js"] and troubles(browser) == []


def test_a_part_that_did_not_pass_can_be_opened_and_held(page: Page, browser: Any) -> None:
    browser.find_element("id", "bad").click()
    rows = browser.find_elements("css selector", "#outcomes tr")
    assert len(rows) == 3
    browser.execute_script("document.querySelectorAll('#outcomes tr')[2].click()")
    until(lambda: text(browser, "#part").endswith(HOSTILE[0]))
    assert text(browser, "#hold") == "Back to live"
    browser.find_element("id", "hold").click()
    until(lambda: text(browser, "#part").endswith(HOSTILE[-1]))


def test_activation_needs_the_token(page: Page, browser: Any) -> None:
    assert shown(browser, "#unlock") and not shown(browser, "#activate")
    field = browser.find_element("id", "token")
    field.send_keys("a-wrong-token-is-here\n")
    until(lambda: "wrong or missing token" in text(browser, "#notice"))
    assert not shown(browser, "#activate")
    field.send_keys(TOKEN + "\n")
    until(lambda: shown(browser, "#activate"))
    options = [one.text for one in browser.find_elements("css selector", "#bundle option")]
    assert sorted(options) == ['"><b>three', "two"]
    browser.find_element("css selector", "#activate button[type=submit]").click()
    until(lambda: "embedder's own detector" in text(browser, "#progress"))
    browser.find_element("id", "rollback").click()
    until(lambda: "no way back" in text(browser, "#notice"))
    assert (
        TOKEN not in browser.page_source
        and browser.execute_script("return document.cookie + localStorage.length") == "0"
    )


def test_it_says_when_there_is_no_news(page: Page, browser: Any) -> None:
    page.server.close()
    until(lambda: shown(browser, "#banner"), 15)
    assert "No news from the line" in text(browser, "#banner") and text(browser, "#ready") == "no news"


def test_a_private_page_shows_nothing_before_the_token(tmp_path: Path, browser: Any) -> None:
    shots, go = gated(frame(5))
    with Page(detector(), shots, tmp_path, private=True) as page:
        page.line.start()
        until(lambda: page.watch.report()["cell"].parts == 1)
        browser.get(page.web.address)
        until(lambda: "private" in text(browser, "#banner"))
        assert text(browser, "#tiles") == "" and shown(browser, "#unlock")
        browser.find_element("id", "token").send_keys(TOKEN + "\n")
        until(lambda: text(browser, "#ready") == "ready" and text(browser, "#verdict") == "good")
        until(lambda: browser.execute_script("return document.getElementById('canvas').width") > 100)
        go.set()


@pytest.mark.parametrize("width", [1300, 800, 500])
def test_nothing_is_wider_than_the_window(page: Page, browser: Any, width: int) -> None:
    browser.set_window_size(width, 1000)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
    finally:
        browser.set_window_size(1300, 1000)
