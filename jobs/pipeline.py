"""Entry point for ``ray job submit -- python jobs/pipeline.py --config ...``: the same as ``dmm demo``."""

import sys

from dmm_ray.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
