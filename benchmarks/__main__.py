"""All benchmarks in one table: python -m benchmarks [--json]."""

import sys

from benchmarks import proxy
from benchmarks.table import parse_args, print_rows

if __name__ == "__main__":
    arguments = parse_args(__doc__, None)
    print_rows(proxy.run(), arguments.json)
    sys.exit(0)
