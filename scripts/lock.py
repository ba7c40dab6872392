"""Write requirements.lock: the version, in this environment, of every package that requirements-dev.txt leads to.

Called by `make lock`. It reads what is installed and asks no registry, so the lock is a set that has been run here.
"""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    pending = list(read_requirements(ROOT / "requirements-dev.txt"))
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found = distribution(name)
            except PackageNotFoundError:
                raise SystemExit(f"lock: {requirement} is not installed; run make setup first") from None
            if not requirement.specifier.contains(found.version, prereleases=True):
                raise SystemExit(f"lock: {name} is {found.version}, {requirement} is asked for; run make setup first")
            versions[name] = Version(found.version).public  # without +cpu: that label exists on one index only
            children = (Requirement(line) for line in found.requires or [])
            pending += [child for child in children if applies(child, extra)]
    versions.pop("pip", None)  # what installs is the machine's, not the project's
    lines = [
        "# A whole set of versions that M2D was tested with, made by `make lock`: edit requirements*.txt instead.",
        f"# platform: {describe_platform()}",
        *(f"{name}=={version}" for name, version in sorted(versions.items())),
    ]
    (ROOT / "requirements.lock").write_text("\n".join(lines) + "\n")
    print(f"requirements.lock: {len(versions)} packages, {describe_platform()}")


def read_requirements(path: Path) -> Iterator[Requirement]:
    for line in path.read_text().splitlines():
        wanted = line.split("#")[0].strip()
        if wanted.startswith("-r "):
            yield from read_requirements(path.parent / wanted.removeprefix("-r ").strip())
        elif wanted:
            yield Requirement(wanted)


def applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def describe_platform() -> str:
    """The words that scripts/setup.sh compares, to know whether the lock fits the machine."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{platform.system()} {platform.machine()}, {platform.python_implementation()} {python}"


if __name__ == "__main__":
    main()
