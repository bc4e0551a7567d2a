"""The report in a real browser: nothing on the console, charts drawn and live, both schemes, paper."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from site_ends import free_port

from fedloom.reporting.report import write_report

OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"]


class Browser:
    """The few WebDriver calls needed here, spoken to chromedriver directly."""

    def __init__(self, port: int, profile: Path) -> None:
        self._root = f"http://127.0.0.1:{port}/session"
        arguments = [*OPTIONS, f"--user-data-dir={profile}"]
        chrome = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._call("", {"capabilities": {"alwaysMatch": chrome}})["sessionId"]

    def _call(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self._root}{path}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, page: Path) -> None:
        self._call(f"/{self._session}/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        return self._call(f"/{self._session}/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._call(f"/{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def console(self) -> list[str]:
        return [entry["message"] for entry in self._call(f"/{self._session}/se/log", {"type": "browser"})]

    def scheme(self, name: str) -> None:
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path: Path) -> None:
        size = self.run("return [document.body.scrollWidth, document.documentElement.scrollHeight]")
        area = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        shot = self.devtools("Page.captureScreenshot", clip=area, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        request = urllib.request.Request(f"{self._root}/{self._session}", method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    port = free_port()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        opened = _connect(port, tmp_path_factory.mktemp("profile"))
        yield opened
        opened.close()
    finally:
        process.terminate()
        process.wait()


def _connect(port: int, profile: Path) -> Browser:
    deadline = time.monotonic() + 30
    while True:
        try:
            return Browser(port, profile)
        except urllib.error.HTTPError as error:
            pytest.skip(f"the browser does not start: {error.read()[:200]!r}")
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                pytest.skip("chromedriver does not answer")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def page(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report([comparison], path, reference="fedit")
    return path


def test_the_page_loads_without_a_word_on_the_console(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.console() == []
    assert browser.run("return document.documentElement.dataset.ready") == "yes"


def test_every_chart_is_drawn_and_the_tables_are_there(browser: Browser, page: Path) -> None:
    browser.open(page)
    sizes = browser.run(
        "return [...document.querySelectorAll('svg.plot')].filter(s => s.checkVisibility())"
        ".map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height,"
        " s.querySelectorAll('path,rect').length])"
    )
    assert len(sizes) >= 8
    assert all(width > 200 and height > 100 and marks > 2 for width, height, marks in sizes)
    assert browser.run("return document.querySelectorAll('.results tbody tr').length") == 6
    assert browser.run("return document.querySelectorAll('#groups .shaded tbody tr').length") == 6
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_key_hides_a_method_everywhere_and_brings_it_back(browser: Browser, page: Path) -> None:
    browser.open(page)
    drawn = "filter(s => getComputedStyle(s).display !== 'none').length"
    count = f"return [...document.querySelectorAll('.series[data-series=flora]')].{drawn}"
    shown = browser.run(count)
    assert shown >= 6
    click = "document.querySelector('[data-key=flora]').click()"
    browser.run(click)
    assert browser.run(count) == 0
    browser.run(click)
    assert browser.run(count) == shown


def test_the_arrow_keys_read_values(browser: Browser, page: Path) -> None:
    browser.open(page)
    press = "document.querySelector('svg.lines').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
    browser.run(press + press)
    text = browser.run("return document.getElementById('tip').innerText")
    assert "round" in text
    assert "flora" in text


def test_the_pointer_reads_values(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('svg.lines').scrollIntoView({block: 'center'})")
    box = browser.run(
        "const b = document.querySelector('svg.lines').getBoundingClientRect(); return [b.x, b.y, b.width]"
    )
    browser.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] / 2, y=box[1] + 60)
    assert browser.run("return !document.getElementById('tip').hidden")


def test_a_list_shows_one_panel(browser: Browser, page: Path) -> None:
    browser.open(page)
    for index, name in enumerate(("rows", "flora")):
        chosen = f"const s = document.querySelectorAll('#clients select')[{index}]; s.value = '{name}';"
        browser.run(f"{chosen} s.dispatchEvent(new Event('change'))")
    visible = (
        "[...document.querySelector('#clients .choice').querySelectorAll('.panel')].filter(p => p.checkVisibility())"
    )
    assert browser.run(f"return {visible}.map(p => p.dataset.names)") == ['["rows", "flora"]']


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(browser: Browser, page: Path, scheme: str, tmp_path: Path) -> None:
    browser.open(page)
    browser.scheme(scheme)
    contrast = browser.run(CONTRAST)
    assert len(contrast) > 50
    assert min(contrast) >= 4.5
    browser.picture(Path(os.environ.get("FEDLOOM_PICTURES", tmp_path)) / f"report-{scheme}.png")


def test_paper_gets_a_light_page_even_from_a_dark_screen(browser: Browser, page: Path) -> None:
    browser.open(page)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.devtools("Emulation.setEmulatedMedia", media="print", features=[dark])
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.run("return document.getElementById('scheme').checkVisibility()")
    browser.devtools("Emulation.setDeviceMetricsOverride", width=720, height=1000, deviceScaleFactor=1, mobile=False)
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    browser.devtools("Emulation.setEmulatedMedia", media="", features=[])
    document = base64.b64decode(browser.devtools("Page.printToPDF", printBackground=True)["data"])
    assert document.startswith(b"%PDF")
    if folder := os.environ.get("FEDLOOM_PICTURES"):
        (Path(folder) / "report.pdf").write_bytes(document)


# WCAG contrast of every visible text with what lies behind it.
CONTRAST = """
const parse = c => { const n = c.match(/[\\d.]+/g).map(Number);
                     return c.startsWith('color(') ? [n[0] * 255, n[1] * 255, n[2] * 255, n[3]] : n; };
const linear = v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
const lum = c => { const [r, g, b] = c.map(linear); return .2126 * r + .7152 * g + .0722 * b; };
const over = (top, below, a) => [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]);
const behind = e => { if (!e) return [255, 255, 255];
                      const c = parse(getComputedStyle(e).backgroundColor), a = c[3] ?? 1;
                      return a >= 1 ? c : a > 0 ? over(c, behind(e.parentElement), a) : behind(e.parentElement); };
return [...document.querySelectorAll('p, span, b, small, h1, h2, th, td, button, summary, caption, svg text')]
  .filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  .map(e => { const s = getComputedStyle(e); const text = e.closest('svg') ? s.fill : s.color;
              const a = lum(parse(text)), b = lum(behind(e));
              return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); });
"""
