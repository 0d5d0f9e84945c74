"""Progress bars of the start, one for each stage, on standard error."""

from collections.abc import Callable

from tqdm import tqdm


def show_progress() -> Callable[[str, int, int], None]:
    """A `progress(stage, done, total)` that draws; a stage's bar closes when it is done."""
    bars: dict[str, tqdm[int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(range(total), desc=stage)
        bar = bars[stage]
        bar.update(done - bar.n)
        if done >= total:
            bars.pop(stage).close()

    return progress
