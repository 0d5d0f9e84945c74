"""Makes docs/pictures: `python -m docs.make_pictures`, from the repository's root, in some three minutes.

A server of the demo model with two dozen adapters takes traffic for a while under a real Prometheus. The page is
photographed in headless Chromium while it does, and what the dashboards' queries return is drawn.
"""

import base64
import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from docs.panel_pictures import draw, panels_of
from tests.e2e.server import Server, serving
from tests.grafana.promql import RULES, VARIABLES, dashboards
from tests.grafana.tools import Prometheus, prometheus
from tests.support.browser import Browser, chromium

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
ADMIN_KEY = "for-pictures"
NAMES = (
    "list/short", "json/strict", "sql/warehouse", "voice/pirate", "table/wide", "list/steps", "json/plain", "sql/shop",
    "voice/sea", "table/small", "list/agenda", "json/orders", "sql/audit", "voice/harbour", "table/prices",
    "list/packing", "json/events", "sql/reports", "voice/captain", "table/teams", "list/recipes", "json/people",
    "sql/library", "voice/parrot",
)  # fmt: skip
PROMPTS = (
    "List 3 countries and their capitals.",
    "Name four fruits and their colours.",
    "Which planets have rings?",
    "Give me three rivers in Europe.",
)
CLIENTS = 7
SECONDS = 110.0  # of traffic before the dashboards are drawn
FLAGS = (
    "--served-model-name", "llama", "--max-loras-per-batch", "6", "--max-loaded-loras", "18",
    "--context-length", "1024", "--max-total-tokens", "3584",
    "--threads", "1",
)  # fmt: skip


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    paths = [f"{name}={ROOT / 'adapters' / f'lora{index % 5}'}" for index, name in enumerate(NAMES)]
    env = {"LORAMUX_ADMIN_API_KEY": ADMIN_KEY}
    with serving(folder / "log", *FLAGS, "--lora-paths", *paths, env=env) as server, chromium() as browser:
        browser.size(1400, 820)
        browser.open(server.url)
        browser.until(lambda: browser.all("#rows tr"))
        browser.script("sessionStorage.setItem('loramux.key', arguments[0])", ADMIN_KEY)
        browser.driver.refresh()
        browser.until(lambda: browser.all("#rows tr"))
        photograph(browser, "page-idle-light", "light")
        with prometheus(folder, server.url.removeprefix("http://"), RULES) as scraper, traffic(server) as start:
            photograph_traffic(browser)
            time.sleep(max(0.0, start + SECONDS - time.time()))
            draw_dashboards(browser, scraper, start, folder)


def photograph(browser: Browser, name: str, scheme: str) -> None:
    browser.scheme(scheme)
    time.sleep(1.5)  # the page's own round, and its transitions
    browser.picture(PICTURES / f"{name}.webp", quality=72)


def photograph_traffic(browser: Browser) -> None:
    """Light and dark with streams that run, and as a telephone shows it."""
    browser.size(1400, 1290)
    time.sleep(60)
    for name in ("sql/warehouse", "voice/pirate"):
        browser.find("#add").send_keys(name, "\n")
    for scheme in ("light", "dark"):
        browser.find("#prompt").clear()
        browser.find("#prompt").send_keys(PROMPTS[0])
        browser.find("#send").click()
        browser.script("document.activeElement.blur(); scrollTo(0, 0)")
        browser.until(lambda: sum(len(text) > 40 for text in browser.texts(".answer .text")) >= 2, 60)
        photograph(browser, f"page-traffic-{scheme}", scheme)
        browser.until(lambda: browser.find("#send").is_enabled(), 120)
    browser.size(360, 1000, 2)
    photograph(browser, "page-narrow-dark", "dark")


@contextlib.contextmanager
def traffic(server: Server) -> Iterator[float]:
    """Clients that ask one model after the other, popular ones more often; yields when it began."""
    over = threading.Event()
    clients = [threading.Thread(target=_client, args=(server.url, seed, over)) for seed in range(CLIENTS)]
    clients.append(threading.Thread(target=_operator, args=(server.url, over)))
    for client in clients:
        client.start()
    try:
        yield time.time()
    finally:
        over.set()
        for client in clients:
            client.join()


def _client(url: str, seed: int, over: threading.Event) -> None:
    draws = random.Random(seed)
    models = ["llama", *(f"llama:{name}" for name in NAMES)]
    weights = [1 / (rank + 1) for rank in range(len(models))]
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        while not over.is_set():
            (model,) = draws.choices(models, weights)
            body: dict[str, Any] = {"model": model, "max_tokens": draws.choice((24, 48, 96)), "temperature": 0.7}
            body["messages"] = [{"role": "user", "content": draws.choice(PROMPTS)}]
            client.post("/v1/chat/completions", json=body)


def _operator(url: str, over: threading.Event) -> None:
    """Loads, pins and unloads now and then; one load fails."""
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    guest = {"lora_name": "guest", "lora_path": str(ROOT / "adapters" / "lora3")}
    name = {"lora_name": "guest"}
    rounds = (("load", guest), ("pin", name), ("unpin", name), ("unload", name), ("load", guest | {"lora_path": "/no"}))
    with httpx.Client(base_url=url, timeout=120, headers=headers, trust_env=False) as client:
        client.post("/pin_lora_adapter", json={"lora_name": NAMES[0]})
        while True:
            for route, body in rounds:
                client.post(f"/{route}_lora_adapter", json=body)
                if over.wait(4):
                    return


def draw_dashboards(browser: Browser, scraper: Prometheus, start: float, folder: Path) -> None:
    end = time.time()
    browser.scheme("light")
    for name, board in dashboards().items():
        panels = panels_of(board, lambda expr: scraper.range(_runnable(expr), start, end, step=1))
        svg, width, height = draw(board["title"], panels, (start, end))
        browser.size(width, height)
        browser.open(f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}")
        browser.picture(PICTURES / f"dashboard-{Path(name).stem}.webp", quality=60)
        empty = [panel.title for panel in panels if not any(series.points for series in panel.series)]
        print(json.dumps({"dashboard": name, "panels": len(panels), "without data": empty}))


def _runnable(expr: str) -> str:
    """The query with Grafana's variables replaced; rates over a time that suits so short a run."""
    for name, value in (VARIABLES | {"$__rate_interval": "15s"}).items():
        expr = expr.replace(name, value)
    return expr


if __name__ == "__main__":
    main()
