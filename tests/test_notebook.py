"""docs/tutorial.ipynb: its commands are understood, and (`make notebook`) it runs whole."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from m2d.cli import parse

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def command_lines() -> list[list[str]]:
    lines = [line for cell in CELLS for line in cell.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[3:] for line in lines if line.startswith("!python -m m2d ")]


def test_every_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running takes minutes and is not part of CI; a renamed flag is found here."""
    monkeypatch.chdir(tmp_path)
    Path("tutorial").mkdir()
    for cell in CELLS:
        if written := re.fullmatch(r"%%writefile (\S+)\n(.*)", cell, flags=re.DOTALL):
            Path(written[1]).write_text(written[2])
    asked = [words[0] for words in command_lines()]
    assert asked == ["setup_data", "train", "generate", "evaluate"]
    for command, *arguments in command_lines():
        parse(command, arguments)


@pytest.mark.exhaustive
def test_it_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, by the kernel and the `python` of this environment."""
    nbclient = pytest.importorskip("nbclient", reason="`make notebook` installs it")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "tutorial" / "balanced" / "evaluation" / "evaluation.html").is_file()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "\x1b[2K" not in said  # a bar's frames, which a notebook would keep
    if kept := os.environ.get("M2D_NOTEBOOK"):  # to commit its outputs: M2D_NOTEBOOK=docs/tutorial.ipynb make notebook
        nbformat.write(notebook, ROOT / kept)
