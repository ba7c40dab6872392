"""What people get who install M2D instead of cloning it: the wheel, as its build back end makes it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from m2d import __version__

ROOT = Path(__file__).resolve().parent.parent
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that no build folder is left here and none of an earlier build slips in."""
    copy = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "m2d", copy / "m2d", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "requirements-c2pa.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-c", BUILD, "dist"], cwd=copy, check=True, capture_output=True)
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Presets, templates, the service's page and py.typed are data files, which setuptools takes only where told."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone, so nothing tells the package's files from what was made in it")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "m2d"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.splitlines()
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in listed if (ROOT / name).exists()}
    assert {"m2d/py.typed", "m2d/presets/demo.yaml", "m2d/serving/page/index.html"} <= held


def test_wheel_says_its_version_its_command_and_all_its_requirements(wheel: zipfile.ZipFile) -> None:
    folder = f"m2d-{__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "[console_scripts]\nm2d = m2d.cli:main_from_shell" in wheel.read(f"{folder}/entry_points.txt").decode()
    required = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    optional = [line for line in metadata.get_all("Requires-Dist") if 'extra == "c2pa"' in line]
    assert len(metadata.get_all("Requires-Dist")) - len(optional) == len([line for line in required if line])
    assert [line.partition(">")[0].partition("<")[0] for line in optional] == ["c2pa-python", "cryptography"]


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
def test_the_wheel_alone_runs_the_demo(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """In an environment of its own that borrows the other packages of this one, without the clone."""
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "environment"], check=True)
    site = Path(subprocess.run([python, "-c", SITE], check=True, capture_output=True, text=True).stdout.strip())
    assert wheel.filename
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel.filename], check=True)
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    told = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "RAY_worker_niceness": "0"}
    where = [python, "-c", "import m2d; print(m2d.__file__)"]
    assert subprocess.run(where, check=True, capture_output=True, text=True, env=told, cwd=tmp_path).stdout.startswith(
        str(site)
    )
    done = subprocess.run(["m2d", "demo"], cwd=tmp_path, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"report.html", "contact_sheet.png"} <= {path.name for path in (tmp_path / "demo").iterdir()}


def test_the_newest_release_is_the_version_and_is_cited() -> None:
    """Three files name it: the changelog, the citation and the package."""
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest, date = re.findall(r"^## \[(.+)\] - (\S+)$", changes, flags=re.MULTILINE)[0]
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest == __version__
    assert f"\nversion: {newest}\ndate-released: {date}\n" in citation


def test_image_of_one_machine_copies_what_it_is_given() -> None:
    """Docker is not at hand here: its files must be there, admitted by .dockerignore, and its Python the lock's."""
    steps = (ROOT / "Dockerfile").read_text()
    python = re.search(r"^# platform: .* (3\.\d+)$", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    assert python
    assert f"\nFROM python:{python[1]}-slim" in steps
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", steps, flags=re.MULTILINE) for name in line.split()]
    admitted = (ROOT / ".dockerignore").read_text().splitlines()
    assert [name for name in copied if not (ROOT / name).exists() or f"!{name}" not in admitted] == []
