"""Metrics and alert rules by promtool: valid, and each fires when it should and only then (alerts_test.yaml)."""

import subprocess
from pathlib import Path

import yaml

from tests.grafana.exported import everything
from tests.grafana.promql import FOLDER, RULES
from tests.support.programs import program

CASES = Path(__file__).with_name("alerts_test.yaml")


def promtool(*arguments: str | Path, stdin: str = "") -> None:
    command = [program("promtool", package="prometheus"), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", "--lint-fatal", RULES)


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", FOLDER / "prometheus.yaml")


def test_the_metrics_keep_prometheus_conventions() -> None:
    promtool("check", "metrics", stdin=everything().render()[0].decode())


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", CASES)


def test_the_cases_cover_every_alert() -> None:
    names = {rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}
    fired: set[str] = set()
    quiet: set[str] = set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for check in case["alert_rule_test"]:
            (fired if check["exp_alerts"] else quiet).add(check["alertname"])
    assert fired == quiet == names
