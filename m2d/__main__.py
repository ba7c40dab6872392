"""`python -m m2d COMMAND`."""

from m2d.cli import main_from_shell

if __name__ == "__main__":
    main_from_shell()
