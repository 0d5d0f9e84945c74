"""One log line about the running steps every few seconds, none while nothing runs. Called by the loop's heartbeat."""

import logging

from engine.messages import Stats

LOG_SECONDS = 10.0
log = logging.getLogger("loramux.steps")


class StepLog:
    """Remembers the last line's totals, so that the next can tell rates."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._steps = 0
        self._tokens = 0

    def observe(self, stats: Stats, now: float) -> None:
        """`now` in seconds of any steady clock."""
        if (elapsed := now - self._since) < LOG_SECONDS:
            return
        generated = sum(adapter.generated_tokens for adapter in stats.adapters)
        steps, tokens = stats.step - self._steps, generated - self._tokens
        self._since, self._steps, self._tokens = now, stats.step, generated
        if steps:
            log.info("%s", _line(stats, steps / elapsed, tokens / elapsed))


def _line(stats: Stats, steps: float, tokens: float) -> str:
    chunks = stats.chunks
    total = max(1, sum(chunks.values()))
    use = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in chunks.items() if name != "free")
    return (
        f"{stats.running} running, {stats.waiting} waiting, {steps:.1f} steps/s, {tokens:.1f} tokens/s, "
        f"{stats.slots_used} of {stats.slots_total} slots, arena: {use}"
    )
