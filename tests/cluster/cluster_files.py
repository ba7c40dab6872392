"""What cluster.yaml and the files under docs/cluster say: the versions and the commands in them, for the tests here."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "cluster"
LAUNCHER_FILES = [ROOT / "cluster.yaml", FOLDER / "on-premises.yaml"]
MANIFESTS = [FOLDER / "kuberay-rayjob.yaml", FOLDER / "kuberay-rayservice.yaml"]
SLURM = FOLDER / "slurm.sh"
PAGES = [FOLDER / "README.md", ROOT / "docs" / "security.md"]
DOCKERFILE = FOLDER / "Dockerfile"
VERSIONED = [*LAUNCHER_FILES, *MANIFESTS, DOCKERFILE, FOLDER / "README.md"]

SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
IMAGE = re.compile(r"\b(?:rayproject/ray:|m2d:ray)([\w.]+)-py(\d+)(-gpu|-cpu)?(?![\w-])")
RAY_VERSION = re.compile(r"rayVersion: \"([\w.]+)\"")


def locked() -> tuple[Version, str]:
    """Ray's version and Python's, as image tags write it (311), of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text()
    ray = re.search(r"^ray==(\S+)$", text, flags=re.MULTILINE)
    python = re.search(r"^# platform: .* CPython (\d+)\.(\d+)$", text, flags=re.MULTILINE)
    assert ray is not None, "requirements.lock names no ray"
    assert python is not None, "requirements.lock names no platform"
    return Version(ray[1]), python[1] + python[2]


def other_versions(text: str) -> list[str]:
    """Images and Ray versions in a text that are not those of requirements.lock."""
    ray, python = locked()
    images = [m[0] for m in IMAGE.finditer(text) if (Version(m[1]), m[2]) != (ray, python)]
    return images + [m[0] for m in RAY_VERSION.finditer(text) if Version(m[1]) != ray]


def strings(value: Any) -> Iterator[str]:
    """Every text in a YAML document, keys left out."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from strings(entry)
    elif isinstance(value, str):
        yield value


def texts(path: Path) -> list[str]:
    """The parts of a file in which a command may stand: YAML values, comments, blocks of a page, a script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        return blocks + [" ".join(code.split()) for code in re.findall(r"`((?:ray|python) [^`]+)`", prose)]
    comments = re.sub(r"^(?!\s*#).*$", "", text, flags=re.MULTILINE)
    parts = [re.sub(r"^\s*# ?", "", comments, flags=re.MULTILINE)]
    if path.suffix == ".yaml":
        parts += [part for document in yaml.safe_load_all(text) for part in strings(document)]
    return parts


def commands(text: str) -> list[list[str]]:
    """Calls of M2D in a shell text, as words from the script's or the module's name on."""
    found = re.findall(r"\bpython ((?:jobs/\w+\.py|tune_search\.py|-m m2d)\b[^\n`]*)", _in_one_line(text))
    return [_to_the_end(shlex.split(line, comments=True)) for line in found]


def ray_commands(text: str) -> list[list[str]]:
    """Calls of Ray's own command line in a shell text, as words from the subcommand on, quotes left as they are."""
    found = re.findall(r"\bray ([a-z][a-z_-]+[^\n`)]*)", _in_one_line(text))
    return [_to_the_end(line.split()) for line in found]


def unknown_to_ray(words: list[str]) -> list[str]:
    """Of a call of Ray, the command or the options that its command line does not know. Nothing is run."""
    import click
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        if found is None:
            return [name]
        command = found
    known = {option for parameter in command.params for option in parameter.opts}
    own = words[: words.index("--")] if "--" in words else words
    return [word.partition("=")[0] for word in own if word.startswith("--") and word.partition("=")[0] not in known]


def _in_one_line(text: str) -> str:
    return re.sub(r"\\\n\s*", " ", text)


def _to_the_end(words: list[str]) -> list[str]:
    """The words of one command, without what the shell does next."""
    ends = [index for index, word in enumerate(words) if word in ("&&", "||", "|", "&", ";", ">", "...")]
    return words[: ends[0]] if ends else words


def syntax_errors(text: str) -> list[str]:
    """Of a shell text, by `bash -n`: nothing of it runs. None for a good text."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=20)
    return done.stderr.strip().splitlines() if done.returncode else []


def lint(text: str) -> list[str]:
    """What shellcheck finds, its notes on style included. It has to be there: see SHELLCHECK."""
    assert SHELLCHECK is not None
    command = [SHELLCHECK, "--shell=bash", "--format=gcc", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().splitlines() + done.stderr.strip().splitlines()
