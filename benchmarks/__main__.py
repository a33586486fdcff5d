"""All benchmarks but those of GPUs and of the search in one table: python -m benchmarks [--json].

Each alone: benchmarks.train, .data (and of that .tokenise), .search, .gpu.
"""

import sys

from benchmarks import train
from benchmarks.data import __main__ as data
from benchmarks.table import parse_args, print_rows

if __name__ == "__main__":
    arguments = parse_args(__doc__, None)
    print_rows([*train.run(), *data.run()], arguments.json)
    sys.exit(0)
