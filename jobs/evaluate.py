"""Evaluate generated images: python jobs/evaluate.py --real /data/ISIC --generated RUN/generated_images/HASH

Judge features: python jobs/evaluate.py probe --data_root /data/ISIC
"""

from m2d.cli import main

if __name__ == "__main__":
    main("evaluate")
