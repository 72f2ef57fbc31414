"""``python -m attnbias.cli`` is `attnbias`; ``torchrun -m attnbias.cli`` starts several."""

from __future__ import annotations

import sys

from attnbias.cli import main

if __name__ == "__main__":
    sys.exit(main())
