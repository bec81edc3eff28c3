"""``python -m benchmarks.kernel_resources``: see `tools.kernel_resources`."""

import sys

from .tools.kernel_resources import main

if __name__ == "__main__":
    sys.exit(main())
