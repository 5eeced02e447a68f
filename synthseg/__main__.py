"""``python -m synthseg`` is the command ``synthseg``."""

from synthseg.cli import main

if __name__ == "__main__":
    main()
