"""Make labelled images: python jobs/generate.py --checkpoint NAME/checkpoints/best --mode balance --data_root DATA"""

from m2d.cli import main

if __name__ == "__main__":
    main("generate")
