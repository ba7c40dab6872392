"""Train M2D: ray job submit -- python jobs/train.py --preset ham-128 --data_root /data/ISIC"""

from m2d.cli import main

if __name__ == "__main__":
    main("train")
