"""Sample a checkpoint: python jobs/generate.py --checkpoint experiments/NAME/checkpoints/best --num_samples 16"""

from m2d.cli import main

if __name__ == "__main__":
    main("generate")
