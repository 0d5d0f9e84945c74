"""Headless Chromium, from Debian's packages, driven over WebDriver; nothing is downloaded."""

import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.support.programs import program

PACKAGES = "chromium chromium-driver"
FLAGS = (
    "--headless=new",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--no-proxy-server",
    "--hide-scrollbars",
)
WAIT_SECONDS = 20.0
T = TypeVar("T")


@dataclass(frozen=True)
class Browser:
    """One tab. Elements are named by CSS selectors."""

    driver: Chrome

    def open(self, url: str) -> None:
        self.driver.get(url)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Text of one element, shown or not; empty where there is none."""
        return str(self.script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        """Of every element that matches."""
        code = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.script(code, selector))

    def script(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, condition: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
        """The first value of `condition` that is true. Raises TimeoutException after `seconds`."""
        waiting: WebDriverWait[Chrome] = WebDriverWait(self.driver, seconds, poll_frequency=0.05)
        return waiting.until(lambda _: condition())

    def keys(self, *keys: str) -> None:
        """Types into whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, modifier: str, key: str) -> None:
        """A key while another is held."""
        ActionChains(self.driver).key_down(modifier).send_keys(key).key_up(modifier).perform()

    def focused(self) -> str:
        """The id of the element that has the focus, else its label, else its tag."""
        code = "const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.tagName"
        return str(self.script(code))

    def scheme(self, name: str) -> None:
        """The reader's setting: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """Of the page, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def picture(self, path: Path, quality: int = 80) -> None:
        """What the page shows, as WebP."""
        answer = self.devtools("Page.captureScreenshot", format="webp", quality=quality)
        path.write_bytes(base64.b64decode(answer["data"]))

    def devtools(self, command: str, **arguments: object) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def complaints(self) -> list[str]:
        """What the console was told since the last call: script errors, refused loads, violations of the policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh browser, ended with the block. Skips the test where the packages are missing."""
    options = ChromeOptions()
    options.binary_location = program("chromium", package=PACKAGES)
    for flag in (*FLAGS, *(("--no-sandbox",) if os.geteuid() == 0 else ())):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(program("chromedriver", package=PACKAGES)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
