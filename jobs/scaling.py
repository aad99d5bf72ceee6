"""Entry point for ``ray job submit -- python jobs/scaling.py --config ...``: the same as ``dmm scaling``."""

import sys

from dmm_ray.cli import main

if __name__ == "__main__":
    main(["scaling", *sys.argv[1:]])
