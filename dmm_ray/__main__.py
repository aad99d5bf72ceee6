"""``python -m dmm_ray``: the same as ``dmm``."""

from dmm_ray.cli import main

if __name__ == "__main__":
    main()
