"""`python -m lindm` is `lindm`."""

import sys

from lindm.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
