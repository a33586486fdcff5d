"""All benchmarks in one table: python -m benchmarks [--json]. Each alone: benchmarks.proxy, .data, .tokenise."""

import sys

from benchmarks import proxy, tokenise
from benchmarks.data import __main__ as data
from benchmarks.table import parse_args, print_rows

if __name__ == "__main__":
    arguments = parse_args(__doc__, None)
    print_rows([*proxy.run(), *data.run(), *tokenise.run()], arguments.json)
    sys.exit(0)
