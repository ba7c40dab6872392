"""Prepare a dataset once: python jobs/setup_data.py --all --preset ham-64 --data_root /data/ISIC"""

from m2d.cli import main

if __name__ == "__main__":
    main("setup_data")
