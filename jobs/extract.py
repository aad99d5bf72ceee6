"""Entry point for ``ray job submit -- python jobs/extract.py --config ...``: the same as ``dmm extract``."""

import sys

from dmm_ray.cli import main

if __name__ == "__main__":
    main(["extract", *sys.argv[1:]])
