"""`python -m grbench`, which also runs in a checkout whose packages are not installed yet, and says so."""

import sys
from importlib.util import find_spec

for package in ("grkernels", "grengines", "hydra", "torch"):
    if find_spec(package) is None:
        print(
            f"grbench: {sys.executable} has no package {package}; run `make setup && . .venv/bin/activate` in a "
            "checkout, or `pip install grbench`",
            file=sys.stderr,
        )
        sys.exit(2)

from grbench.cli import main  # noqa: E402  it imports them

sys.exit(main())
