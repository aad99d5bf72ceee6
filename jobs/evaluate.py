"""Entry point for ``ray job submit -- python jobs/evaluate.py --config ...``: the same as ``dmm evaluate``."""

import sys

from dmm_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
