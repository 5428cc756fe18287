"""`python -m megatron_elastic`: the same as the console script `megatron-elastic`."""

import sys

from megatron_elastic.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
