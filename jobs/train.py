"""Entry point for ``ray job submit -- python jobs/train.py --config ...``: the same as ``dmm train``."""

import sys

from dmm_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
