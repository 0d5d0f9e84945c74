"""Tells our import package `kernels` from Hugging Face's of the same name, without importing either."""

import importlib.util
import re
from pathlib import Path

from gateway.settings import SettingsError

MARK = re.compile(r'^DISTRIBUTION = "loramux"$', re.MULTILINE)


def require_own_kernels() -> None:
    """Raises SettingsError where `import kernels` would not find ours."""
    spec = importlib.util.find_spec("kernels")
    origin = None if spec is None else spec.origin
    if origin is None or not is_own(Path(origin)):
        where = origin or "nothing that can be imported"
        raise SettingsError(
            f"the import package `kernels` is not loramux's: Python finds {where}. Hugging Face publishes an unrelated "
            "distribution `kernels`; uninstall it (pip uninstall kernels) and reinstall loramux, "
            "or install loramux in a virtual environment of its own"
        )


def is_own(init: Path) -> bool:
    """Whether this `kernels/__init__.py` is ours."""
    return MARK.search(init.read_text(encoding="utf-8")) is not None
