"""Entry point for ``ray job submit -- python jobs/score.py --config ...``: the same as ``dmm score``."""

import sys

from dmm_ray.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
