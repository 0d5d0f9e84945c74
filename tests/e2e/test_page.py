"""The live page in headless Chromium on a real server: figures, streams side by side, keyboard, colours, errors."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from tests.e2e.server import Server
from tests.support.browser import Browser

PROMPT = "List 3 countries and their capitals."
TOKENS = 24
LONG = 1900  # tokens of answers that are stopped
ASKED = ["llama", "llama:lora0", "llama:lora1"]  # what a fresh page asks
WATCH = """
window.grown = {};
new MutationObserver((all) => all.forEach((one) => {
  const card = one.target.closest?.('.answer');
  if (card && one.target.className === 'text') grown[card.dataset.model] = (grown[card.dataset.model] ?? 0) + 1;
})).observe(document.querySelector('#answers'), {childList: true, subtree: true});
"""
MANY = """
const plain = window.fetch;
window.fetch = async (path, options) => {
  const answer = await plain(path, options);
  if (path !== 'v1/lora_adapters') return answer;
  const {data} = await answer.json();
  const many = data.flatMap((card) => Array.from({length: 200}, (_, i) => (
    {...card, name: `${card.name}-${i}`, id: `${card.id}-${i}`})));
  return Response.json({object: 'list', data: many}, {headers: answer.headers});
};
"""
REASON = "a tensor <b>that</b> binds to nothing: " + "base_model.model.layers.0.self_attn.q_proj.x" * 4
FAILED = f"""
const plain = window.fetch;
window.fetch = async (path, options) => {{
  const answer = await plain(path, options);
  if (path !== 'v1/lora_adapters') return answer;
  const {{data}} = await answer.json();
  Object.assign(data[1], {{state: 'failed', error: {json.dumps(REASON)}}});
  return Response.json({{object: 'list', data}}, {{headers: answer.headers}});
}};
"""
# Relative luminance and contrast as WCAG defines them, of an element's colour on the nearest background behind it.
CONTRAST = """
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92
  : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  const color = parts(getComputedStyle(node).backgroundColor);
  return color.length === 4 && color[3] === 0 ? behind(node.parentElement) : color;
};
return [...document.querySelectorAll(arguments[0])].map((node) => {
  const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
"""
FOCUS = """
const node = document.activeElement, style = getComputedStyle(node);
return {tag: node.tagName, ring: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0,
  name: node.ariaLabel || node.labels?.[0]?.textContent || node.textContent.trim() || node.title
    || (node.hasAttribute('aria-labelledby') && 'labelled')};
"""


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Browser]:
    """The page of the shared server, which has no keys. Nothing may have been said to the console at the end."""
    browser.complaints()
    browser.open(server.url)
    browser.until(lambda: browser.all("#rows tr"))
    yield browser
    assert browser.complaints() == []


def states(page: Browser) -> dict[str, str]:
    """Each answer's state by its model."""
    cards = "[...document.querySelectorAll('.answer')].map(e => [e.dataset.model, e.dataset.state])"
    return dict(page.script(f"return {cards}"))


def ask(page: Browser, tokens: int, prompt: str = PROMPT) -> None:
    page.script("document.querySelector('#tokens').value = arguments[0]", tokens)
    page.find("#prompt").clear()
    page.find("#prompt").send_keys(prompt)
    page.find("#send").click()


def until_all(page: Browser, state: str, models: list[str] = ASKED) -> None:
    page.until(lambda: states(page) == dict.fromkeys(models, state))


def answer_of(server: Server, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "temperature": 0}
    answer: Any = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
    return str(answer["choices"][0]["message"]["content"])


def status(server: Server) -> Any:
    return httpx.get(f"{server.url}/status", trust_env=False).json()


def test_it_shows_adapters_arena_and_slots(page: Browser, server: Server) -> None:
    assert page.texts("#rows td.name") == ["lora0", "lora1", "lora2"]
    assert page.texts("#rows td.rank") == ["4", "64", "256"]
    assert set(page.texts("#rows td.state")) <= {"host", "resident"}
    assert all(text.endswith("iB") for text in page.texts("#rows td.bytes"))
    assert page.text("#base") == "llama"
    assert page.text("#health") == "serving"
    told = status(server)["arena"]
    uses = ("kv", "prefix", "adapter", "free")
    whole = sum(told[use] for use in uses)
    assert f"{whole:,} chunks" in page.text("#arena-total")
    grows = "return [...document.querySelectorAll('#arena-bar i')].map(e => Number(e.style.flexGrow))"
    assert sum(page.script(grows)) == whole
    assert len(page.texts("#arena-legend dd")) == 4
    assert len(page.all("#slots-row i")) == 8


def test_models_answer_side_by_side_and_as_they_do_alone(page: Browser, server: Server) -> None:
    page.script(WATCH)
    ask(page, TOKENS)
    until_all(page, "done")
    texts = dict(zip(states(page), page.texts(".answer .text"), strict=True))
    assert texts == {model: answer_of(server, model) for model in ASKED}
    assert len(set(texts.values())) == 3
    assert all(count > 3 for count in page.script("return grown").values())  # token by token
    assert all("tokens" in text and "first after" in text for text in page.texts(".answer .facts"))
    assert "llama:lora1 done" in page.text("#told")
    page.until(lambda: page.text("#rows tr td.requests") != "0")
    page.until(lambda: page.text("#rows tr td.state") == "resident")


def test_the_choice_follows_boxes_chips_and_names(page: Browser) -> None:
    page.find("#rows tr:nth-child(3) input").click()
    page.find(".chip[data-model='llama']").click()
    assert page.focused() == "add"
    assert page.texts("#chosen .chip") == ["+ llama", "lora0", "lora1", "lora2"]
    page.find(".chip[data-model='llama:lora0']").click()
    assert not page.find("#rows tr:nth-child(1) input").is_selected()
    page.find("#add").send_keys("nobody", Keys.ENTER)
    assert 'No adapter is called "nobody".' in page.text("#ask-note")
    page.find("#add").clear()
    page.find("#add").send_keys("lora0", Keys.ENTER)
    ask(page, 3)
    until_all(page, "done", ["llama:lora1", "llama:lora2", "llama:lora0"])


def stop_first(page: Browser) -> None:
    """Stops lora0's answer by its button, from within the page: from here the click may come after the answer's end."""
    page.script(
        """
        const stop = () => {
          const answer = document.querySelector(".answer[data-model='llama:lora0']");
          if (answer?.dataset.state !== 'streaming' || !answer.querySelector('.text').textContent) return;
          watch.disconnect();
          answer.querySelector('button').click();
        };
        const watch = new MutationObserver(stop);
        watch.observe(document.body, {attributes: true, characterData: true, childList: true, subtree: true});
        """
    )
    ask(page, LONG)
    page.until(lambda: states(page).get("llama:lora0") == "stopped")


def test_one_answer_or_all_can_be_stopped(page: Browser, server: Server) -> None:
    stop_first(page)
    page.find("#stop").click()
    page.until(lambda: "streaming" not in states(page).values())
    assert set(states(page).values()) <= {"stopped", "done"}
    assert page.find("#send").is_enabled()
    page.until(lambda: status(server)["requests_running"] == 0)  # the engine was told


def test_refusals_stand_in_the_answer(page: Browser) -> None:
    page.script("document.querySelector('#prompt').value = 'far too long '.repeat(2000)")
    page.find("#send").click()
    until_all(page, "failed")
    assert all("context" in text for text in page.texts(".answer .note"))
    page.complaints()  # a 400 is told to the console by the browser itself


def test_without_an_admin_key_the_page_changes_nothing_and_says_so(page: Browser) -> None:
    assert "--admin-api-key" in page.text("#note")
    assert not page.find("#load-open").is_enabled()
    assert not any(button.is_displayed() for button in page.all("#rows button"))


def test_everything_can_be_reached_and_seen_with_tab(page: Browser) -> None:
    stops: list[dict[str, Any]] = []
    page.keys(Keys.TAB)
    while (stop := page.script(FOCUS))["tag"] != "BODY" and len(stops) < 60:
        stops.append(stop)
        page.keys(Keys.TAB)
    assert [stop for stop in stops if not (stop["ring"] and stop["name"])] == []
    names = [stop["name"].strip() for stop in stops]
    assert names[0] == "To the adapters"
    for wanted in ("Key", "Filter by name, state or tier", "Ask lora2", "Prompt", "Ask"):
        assert wanted in names


def test_a_prompt_is_asked_and_stopped_by_keys_alone(page: Browser) -> None:
    page.keys(Keys.TAB, Keys.TAB, Keys.ENTER)  # the second link leads to the prompt's section
    assert page.focused() == "ask"
    while page.focused() != "prompt":
        page.keys(Keys.TAB)
    page.keys(PROMPT)
    page.script("document.querySelector('#tokens').value = arguments[0]", LONG)
    page.chord(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: any(page.texts(".answer .text")))
    page.keys(Keys.ESCAPE)
    page.until(lambda: set(states(page).values()) <= {"stopped", "done"} and states(page))


def test_columns_sort_and_the_filter_hides(page: Browser) -> None:
    page.find("th.rank button").click()
    assert page.texts("#rows td.rank") == ["256", "64", "4"]
    assert page.find("th.rank").get_attribute("aria-sort") == "descending"
    page.find("th.rank button").click()
    assert page.texts("#rows td.rank") == ["4", "64", "256"]
    page.find("#filter").send_keys("LORA1")
    assert page.texts("#rows td.name") == ["lora1"]
    assert page.text("#shown") == "1 of 3"
    page.find("#filter").send_keys("x")
    assert page.text("#none") == "No adapter matches."


def test_hundreds_of_adapters_stay_quick(browser: Browser, server: Server) -> None:
    injected = browser.devtools("Page.addScriptToEvaluateOnNewDocument", source=MANY)
    try:
        browser.open(server.url)
        browser.until(lambda: browser.text("#shown") == "600 loaded")
        assert len(browser.all("#rows tr")) == 100
        browser.find("#more").click()
        assert len(browser.all("#rows tr")) == 600
        filtering = """
        const rows = document.querySelector('#rows'), filter = document.querySelector('#filter');
        const watch = new MutationObserver(() => {});
        watch.observe(rows, {attributes: true, characterData: true, childList: true, subtree: true});
        filter.value = arguments[0];
        filter.dispatchEvent(new Event('input'));
        const changes = watch.takeRecords();
        watch.disconnect();
        const nodes = changes.map((change) => change.addedNodes.length + change.removedNodes.length);
        return [changes.length, nodes.reduce((sum, count) => sum + count, 0)];
        """
        for text, shown in (("lora2-1", "111 of 600"), ("lora2-", "200 of 600"), ("", "600 loaded")):
            before = len(browser.all("#rows tr"))
            changes, nodes = browser.script(filtering, text)
            assert browser.text("#shown") == shown
            # rows come and go, and nothing in them is written anew
            assert changes == nodes == abs(len(browser.all("#rows tr")) - before)
    finally:
        browser.devtools("Page.removeScriptToEvaluateOnNewDocument", **injected)


@pytest.mark.parametrize("width", [360, 1400])
def test_why_a_load_failed_stands_in_its_row(browser: Browser, server: Server, width: int) -> None:
    injected = browser.devtools("Page.addScriptToEvaluateOnNewDocument", source=FAILED)
    browser.size(width, 1000)
    try:
        browser.open(server.url)
        browser.until(lambda: browser.texts("#rows td.state p:not([hidden])") == [REASON])
        assert browser.find("#rows tr[data-state='failed'] td.name").text == "lora1"
        assert min(browser.script(CONTRAST, "#rows td.state p:not([hidden])")) >= 4.5
        assert browser.script("return document.documentElement.scrollWidth") == width
    finally:
        browser.size(1400, 1000)
        browser.devtools("Page.removeScriptToEvaluateOnNewDocument", **injected)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(page: Browser, scheme: str) -> None:
    page.scheme(scheme)
    ground = page.script("return getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (int(ground[0]) > 128) is (scheme == "light")
    texts = "h1, h2, .muted, dt, dd, td, th button, button:enabled, input, textarea, #health, #note, .chip"
    ratios = page.script(CONTRAST, texts)
    assert len(ratios) > 50
    assert min(ratios) >= 4.5


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_window(page: Browser, width: int) -> None:
    page.size(width, 800)
    try:
        assert page.script("return document.documentElement.scrollWidth") == width
        out = "return [...document.querySelectorAll('button, input, textarea')].filter(e => e.offsetParent && "
        assert page.script(out + "e.getBoundingClientRect().right > innerWidth).map(e => e.id)") == []
    finally:
        page.size(1400, 1000)


def test_a_server_out_of_reach_is_told_and_found_again(page: Browser, server: Server) -> None:
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.devtools("Network.enable")
    page.devtools("Network.emulateNetworkConditions", offline=True, **conditions)
    page.until(lambda: "unreachable" in page.text("#health"))
    assert page.script("return document.body.dataset.stale") == "true"
    page.devtools("Network.emulateNetworkConditions", offline=False, **conditions)
    page.until(lambda: page.text("#health") == "serving")
    assert page.script("return document.body.dataset.stale") == "false"
    page.complaints()  # failed loads


def test_the_files_are_asked_about_but_not_sent_again(page: Browser) -> None:
    page.driver.refresh()
    page.until(lambda: page.all("#rows tr"))
    parts = "performance.getEntriesByType('resource').filter(e => e.name.includes('/page/'))"
    sent = page.script(f"return {parts}.map(e => e.transferSize)")
    assert len(sent) > 10
    assert max(sent) < 1000  # headers alone
