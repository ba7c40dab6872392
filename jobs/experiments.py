"""Look after experiments: python jobs/experiments.py list | show NAME | clean --keep 5 | compare NAME_A NAME_B"""

from m2d.cli import main

if __name__ == "__main__":
    main("experiments")
