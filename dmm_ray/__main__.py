"""Entry point for ``python -m dmm_ray``, equivalent to ``dmm``."""

from dmm_ray.cli import main

if __name__ == "__main__":
    main()
