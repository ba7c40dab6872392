"""The commands, flags and versions that the cluster files name are those of this repository."""

import re
from pathlib import Path

import pytest
from cluster.cluster_files import (
    DOCKERFILE,
    LAUNCHER_FILES,
    MANIFESTS,
    PAGES,
    ROOT,
    SLURM,
    VERSIONED,
    commands,
    locked,
    other_versions,
    ray_commands,
    texts,
    unknown_to_ray,
)
from packaging.requirements import Requirement

from m2d.cli import COMMANDS, parse
from m2d.errors import ConfigError

FILES = [*LAUNCHER_FILES, *MANIFESTS, SLURM, *PAGES]
PARTS = [(path, text) for path in FILES for text in texts(path)] + [(SLURM, SLURM.read_text())]
RAY_CALLS = [(path, words) for path, text in PARTS for words in ray_commands(text)]
CALLS = [(path, words) for path in FILES for text in texts(path) for words in commands(text)]


def check(words: list[str]) -> None:
    """Raises where a call would be refused: no such job, command or flag, or a wrong value."""
    if words[0] == "-m":
        name, arguments = words[2], words[3:]
        if name == "--version":
            return
    else:
        assert (ROOT / words[0]).is_file(), f"{words[0]} is not there"
        name, arguments = {"tune_search.py": "tune"}.get(words[0], Path(words[0]).stem), words[1:]
    if f"{name} {' '.join(arguments[:1])}" in COMMANDS:
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    if arguments:
        parse(name, arguments)


@pytest.mark.parametrize(("path", "words"), CALLS, ids=[f"{path.name}: {' '.join(w)[:60]}" for path, w in CALLS])
def test_every_call_would_be_taken(path: Path, words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("path", [*LAUNCHER_FILES, MANIFESTS[0], SLURM, PAGES[0]], ids=lambda path: path.name)
def test_every_file_shows_a_training_run(path: Path) -> None:
    """So that no file drops out of the check above unseen."""
    assert any(of == path and words[0] == "jobs/train.py" and "--data_root" in words for of, words in CALLS)


@pytest.mark.parametrize(
    "line",
    [
        "python jobs/train_model.py --preset ham-128",
        "python jobs/train.py --presets ham-128",
        "python jobs/train.py --preset ham-1024",
        "python jobs/train.py --num_workers many",
        "python jobs/experiments.py list --experiment_dir /mnt/m2d",
    ],
)
def test_a_call_that_would_be_refused_is_caught(line: str) -> None:
    (words,) = commands(line)
    with pytest.raises((ConfigError, AssertionError)):
        check(words)


@pytest.mark.parametrize("path", sorted({path for path, _ in RAY_CALLS}), ids=lambda path: path.name)
def test_ray_knows_every_command_and_option(path: Path) -> None:
    assert [unknown_to_ray(words) for of, words in RAY_CALLS if of == path and unknown_to_ray(words)] == []


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("ray start --head --dashboard-address=127.0.0.1", ["--dashboard-address"]),
        ("ray job submit --working_dir . -- python x.py --y", ["--working_dir"]),
        ("ray launch cluster.yaml", ["launch"]),
    ],
)
def test_what_ray_does_not_know_is_caught(line: str, unknown: list[str]) -> None:
    (words,) = ray_commands(line)
    assert unknown_to_ray(words) == unknown


@pytest.mark.parametrize("path", VERSIONED, ids=lambda path: path.name)
def test_images_have_the_ray_and_the_python_of_the_lock(path: Path) -> None:
    text = path.read_text()
    assert other_versions(text) == []
    assert other_versions(text.replace(str(locked()[0]), "2.59.1"))  # there are images in it, and they are seen


def test_the_range_of_ray_that_the_page_tells_is_that_of_the_requirements() -> None:
    line = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("ray["))
    told = re.search(r"admits Ray\s+(\d+\.\d+)\s+to\s+(\d+)\.(\d+)", PAGES[0].read_text())
    assert told is not None
    admitted = Requirement(line).specifier
    assert admitted.contains(f"{told[1]}.0")
    assert admitted.contains(f"{told[2]}.{told[3]}.0")
    assert not admitted.contains(f"{told[2]}.{int(told[3]) + 1}.0")


def test_the_image_copies_what_is_in_the_repository() -> None:
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert {"m2d", "jobs", "requirements.txt", "requirements.lock"} <= set(names)
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", [*LAUNCHER_FILES, DOCKERFILE], ids=lambda path: path.name)
def test_every_program_of_the_repository_reaches_the_nodes(path: Path) -> None:
    """Without --working-dir a job finds what was mounted or copied, so a new program at the top needs a line there."""
    programs = [program.name for program in ROOT.glob("*.py") if program.name != "setup.py"]
    assert [name for name in ["jobs", *programs] if not re.search(rf"\b{re.escape(name)}\b", path.read_text())] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", path.read_text())
    assert targets
    assert [target for target in targets if not (path.parent / target).exists()] == []
