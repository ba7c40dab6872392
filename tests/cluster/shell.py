"""What bash and shellcheck say of a shell text. Nothing of it runs."""

import shutil
import subprocess
import sys
from pathlib import Path

SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")


def problems(text: str) -> list[str]:
    """Syntax errors, by `bash -n`; none for a good text."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=20)
    return done.stderr.strip().splitlines() if done.returncode else []


def lint(text: str) -> list[str]:
    """What shellcheck finds, its notes on style included. It has to be there: see SHELLCHECK."""
    assert SHELLCHECK is not None
    command = [SHELLCHECK, "--shell=bash", "--format=gcc", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().splitlines() + done.stderr.strip().splitlines()
