"""`python -m grbench`."""

import sys

from grbench.cli import main

sys.exit(main())
