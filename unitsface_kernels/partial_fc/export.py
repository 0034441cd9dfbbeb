"""``python -m unitsface_kernels.partial_fc.export``; see ``distributed/partial_fc/export.py``."""

import sys

from ..distributed.partial_fc.export import main

if __name__ == "__main__":
    sys.exit(main())
