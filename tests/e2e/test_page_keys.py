"""The live page on a server with keys: what it asks for, what it may change, and an engine that dies under it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Files
from tests.e2e.server import Server, serving
from tests.support.browser import Browser

API_KEY, ADMIN_KEY = "sk-api-77e0", "sk-admin-ünï"
MARKUP = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def keyed(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("page") / "log"
    env = {"LORAMUX_API_KEY": API_KEY, "LORAMUX_ADMIN_API_KEY": ADMIN_KEY}
    with serving(log, *files.flags, "--lora-paths", *files.lora_paths(), env=env) as server:
        yield server


@pytest.fixture
def page(browser: Browser, keyed: Server) -> Browser:
    """As in a fresh tab: no key is known."""
    browser.open(f"{keyed.url}/page/icon.svg")
    browser.script("sessionStorage.clear()")
    browser.open(keyed.url)
    browser.until(lambda: browser.script("return document.querySelector('#key-dialog').open"))
    return browser


def give(page: Browser, key: str) -> None:
    """Types a key into the dialog, which is open or is opened."""
    if not page.script("return document.querySelector('#key-dialog').open"):
        page.find("#key-open").click()
    page.find("#key").clear()
    page.find("#key").send_keys(key)
    page.find("#key-form button[type=submit]").click()


def shown(page: Browser) -> list[str]:
    return page.texts("#rows td.name")


def until_shown(page: Browser, *names: str) -> None:
    page.until(lambda: shown(page) == list(names))


def press(page: Browser, label: str) -> None:
    page.find(f"[aria-label='{label}']").click()


def load(page: Browser, name: str, path: str | Path) -> None:
    for field, text in (("#load-name", name), ("#load-path", str(path))):
        page.find(field).clear()
        page.find(field).send_keys(text)
    page.find("#load-send").click()


def kill_under_answers(page: Browser, server: Server) -> None:
    """Asks, and kills the engine; once more where all answers came to their own ends before."""
    for _ in range(5):
        page.find("#send").click()
        page.until(lambda: any(page.texts(".answer .text")))
        server.engine.kill()
        page.until(lambda: "engine" in page.text("#health"))
        page.until(lambda: not page.all(".answer[data-state=streaming]"))
        if page.all(".answer[data-state=failed]"):
            return
        page.until(lambda: page.text("#health") == "serving", 60)
    pytest.fail("no answer was under way when the engine died")


def test_nothing_is_shown_until_the_key_is_given(page: Browser) -> None:
    assert page.text("#health") == "needs a key"
    assert shown(page) == []
    give(page, "wrong")
    page.until(lambda: page.text("#key-why") == "The server refused this key.")
    give(page, API_KEY)
    until_shown(page, "lora0", "lora1", "lora2")
    assert page.text("#health") == "serving"
    page.find("#prompt").send_keys("Hello")
    page.find("#send").click()
    page.until(lambda: [card.get_attribute("data-state") for card in page.all(".answer")] == ["done"] * 3)


def test_the_key_stays_in_this_tab(page: Browser) -> None:
    give(page, API_KEY)
    until_shown(page, "lora0", "lora1", "lora2")
    assert page.script("return [localStorage.length, document.cookie, location.href.includes('sk-')]") == [0, "", False]
    assert page.script("return Object.values(sessionStorage)") == [API_KEY]
    page.driver.refresh()
    until_shown(page, "lora0", "lora1", "lora2")
    page.find("#key-open").click()
    page.find("#key-forget").click()
    page.until(lambda: page.text("#health") == "needs a key")
    assert page.script("return sessionStorage.length") == 0


def test_the_api_key_changes_nothing(page: Browser) -> None:
    give(page, API_KEY)
    until_shown(page, "lora0", "lora1", "lora2")
    press(page, "Pin lora0")
    page.until(lambda: "needs the admin key" in page.text("#note"))
    assert page.texts("#rows td.pinned") == ["", "", ""]
    page.script("sessionStorage.clear()")
    press(page, "Unload lora0")
    page.until(lambda: page.text("#key-why") == "Loading, unloading and pinning need the admin key.")


def test_with_the_admin_key_adapters_are_loaded_pinned_and_unloaded(page: Browser, files: Files) -> None:
    give(page, ADMIN_KEY)
    until_shown(page, "lora0", "lora1", "lora2")
    page.find("#load-open").click()
    load(page, "guest", files.rank4)
    until_shown(page, "lora0", "lora1", "lora2", "guest")
    assert page.text("#note") == "guest: loaded"
    press(page, "Pin guest")
    page.until(lambda: page.texts("#rows td.pinned")[-1] == "pinned")
    press(page, "Unpin guest")
    page.until(lambda: page.texts("#rows td.pinned")[-1] == "")
    press(page, "Unload guest")
    assert page.text("#unload-title") == "Unload guest?"
    assert page.focused() == "unload-cancel"
    page.find("#unload-form button[type=submit]").click()
    until_shown(page, "lora0", "lora1", "lora2")
    assert page.text("#note") == "guest: unloaded"


def test_a_load_that_fails_says_why_as_text(page: Browser) -> None:
    give(page, ADMIN_KEY)
    until_shown(page, "lora0", "lora1", "lora2")
    page.find("#load-open").click()
    load(page, MARKUP, MARKUP)
    page.until(lambda: "<img" in page.text("#load-note"))
    assert page.all("#load-note *") == []
    load(page, "guest", "/nowhere")
    page.until(lambda: "nowhere" in page.text("#load-note"))
    page.find("#load-cancel").click()
    assert "owned" not in page.driver.title


def test_an_engine_that_dies_is_told_in_the_answers_and_above(page: Browser, keyed: Server) -> None:
    give(page, API_KEY)
    until_shown(page, "lora0", "lora1", "lora2")
    page.script("document.querySelector('#tokens').value = 1900")
    page.find("#prompt").send_keys("List 3 countries and their capitals.")
    kill_under_answers(page, keyed)
    page.until(lambda: any("engine" in text for text in page.texts(".answer .note")))
    assert page.find(".answer[data-state=failed] .note").get_attribute("role") == "alert"
    page.until(lambda: page.text("#health") == "serving", 60)
    until_shown(page, "lora0", "lora1", "lora2")
    page.until(lambda: page.text("#arena-total") != "no engine")
