"""Sweep loss weights and learning rates: python tune_search.py --preset demo --data_root /data/ISIC --num_trials 12"""

from m2d.cli import main

if __name__ == "__main__":
    main("tune")
