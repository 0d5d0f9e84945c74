"""Prometheus' own programs, from Debian's package `prometheus`, and a Prometheus that scrapes for one test."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.programs import program

START_SECONDS = 30.0
POLL_SECONDS = 0.1
SCRAPE_SECONDS = 1


@dataclass(frozen=True)
class Prometheus:
    """A server that scrapes one target each second."""

    url: str

    def query(self, expr: str) -> list[Any]:
        """The instant query's series. Raises AssertionError with Prometheus' own words where it is refused."""
        return list(self._get("query", query=expr)["result"])

    def range(self, expr: str, start: float, end: float, step: float) -> list[Any]:
        """The series from `start` to `end` (unix seconds), a value each `step` seconds."""
        return list(self._get("query_range", query=expr, start=f"{start}", end=f"{end}", step=f"{step}")["result"])

    def series(self, selector: str) -> list[dict[str, str]]:
        """The label sets that a selector finds."""
        answer: Any = self._get("series", **{"match[]": selector})
        return list(answer)

    def rules(self) -> list[Any]:
        """Every alert rule with its health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def until(self, expr: str, seconds: float = START_SECONDS) -> list[Any]:
        """The first answer that is not empty. Raises AssertionError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (found := self.query(expr)):
            assert time.monotonic() < deadline, f"no data in {seconds:.0f} s: {expr}"
            time.sleep(POLL_SECONDS)
        return found

    def _get(self, what: str, **params: str) -> Any:
        address = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(params)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{params}: {error.read().decode()}") from error


@contextlib.contextmanager
def prometheus(folder: Path, target: str, rules: Path) -> Iterator[Prometheus]:
    """Scrapes `target` (host:port) until the block is left; its files lie in `folder`."""
    config = folder / "prometheus.yaml"
    scrape = {"job_name": "loramux", "scrape_interval": f"{SCRAPE_SECONDS}s", "static_configs": [{"targets": [target]}]}
    rounds = {"evaluation_interval": f"{SCRAPE_SECONDS}s"}
    config.write_text(yaml.dump({"global": rounds, "rule_files": [str(rules)], "scrape_configs": [scrape]}))
    address, log = f"127.0.0.1:{_free_port()}", folder / "prometheus.log"
    flags = (f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}")
    with log.open("wb") as output:
        command = [program("prometheus", package="prometheus"), *flags]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, f"http://{address}", log)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
