"""The adapters' scripts import each other as siblings, as they do when run; so must the tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "adapters"))
