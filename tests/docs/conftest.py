"""The README's commands run in forks of the test process, as those of tests/ranks do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ranks"))
