"""``python -m m2gen`` is ``m2gen``."""

from m2gen.cli import main

if __name__ == "__main__":
    main()
