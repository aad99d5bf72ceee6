"""``python tests/alone.py VERB ...``: the command line, whose units are done in its own process, without Ray.

With ``DMM_TEST_BY_LINE`` set it waits for a line on stdin before each unit.
"""

import os
import sys

from stores import units_here

from dmm_ray.cli import main

if __name__ == "__main__":
    with units_here(before=sys.stdin.readline if "DMM_TEST_BY_LINE" in os.environ else None):
        main(sys.argv[1:])
