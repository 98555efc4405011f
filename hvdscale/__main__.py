"""``python -m hvdscale`` is the ``hvdscale`` command."""

import sys

from hvdscale.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
