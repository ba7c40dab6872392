"""The files around the code: requirements, lock, README, Makefile and import contracts hold together."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def direct_requirements(name: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {r.name: r for r in map(Requirement, (line for line in lines if line and not line.startswith("-r")))}


def locked_versions() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def project_files() -> list[Path]:
    """What git tracks or would track: no environment, cache or experiment."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone, so nothing tells the project's files from what was made in it")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def commands_in(document: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    return [line.split(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("version", "admitted"),
    [("2.10.1", False), ("2.11.0", True), ("2.13.0", False), ("2.13.1", True), ("2.15.0", True)],
)
def test_torch_range_leaves_out_only_what_is_known_to_fail(version: str, admitted: bool) -> None:
    assert direct_requirements("requirements.txt")["torch"].specifier.contains(version) is admitted


def test_every_direct_requirement_has_a_range() -> None:
    stubs = {"pandas-stubs", "types-PyYAML"}  # versioned after what they describe; never imported
    for name in (path.name for path in ROOT.glob("requirements*.txt")):
        assert [
            r for r in direct_requirements(name) if not direct_requirements(name)[r].specifier and r not in stubs
        ] == []


def test_whatever_the_package_imports_is_a_direct_requirement() -> None:
    """Something that only comes along with another package can go with its next version."""
    sources = [ast.parse(path.read_text()) for path in (ROOT / "m2d").rglob("*.py")]
    statements = [statement for source in sources for statement in ast.walk(source)]
    names = {alias.name for statement in statements if isinstance(statement, ast.Import) for alias in statement.names}
    names |= {s.module for s in statements if isinstance(s, ast.ImportFrom) and s.module}
    external = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"m2d"}
    files = ("requirements.txt", "requirements-c2pa.txt")
    required = {canonicalize_name(name) for file in files for name in direct_requirements(file)}
    providers = packages_distributions()
    assert [m for m in sorted(external) if required.isdisjoint(map(canonicalize_name, providers[m]))] == []


def test_lock_holds_names_and_versions_only() -> None:
    """No host, index, path, hash or option: each line is a comment or NAME==VERSION."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert len(pinned) > 50
    assert [line for line in pinned if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.!]*", line)] == []
    assert [line for line in lines if "//" in line] == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_lock_satisfies_every_range(name: str) -> None:
    locked = locked_versions()
    for requirement in direct_requirements(name).values():
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is locked at {version}"


def test_lock_names_the_platform_that_setup_looks_for() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert re.search(r"^# platform: \w+ \w+, \w+ 3\.\d+$", lock, flags=re.MULTILINE)


def test_readme_opens_with_the_two_commands() -> None:
    assert commands_in("README.md")[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )?([a-z]+)", text, flags=re.MULTILINE):
        assert target in make_targets(), f"{document} names make {target}"
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).is_file(), f"{document} names {script}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), f"{document} links to {link}"


def test_no_file_names_a_registry_or_a_path_of_one_machine() -> None:
    forbidden = re.compile(
        r"pypi\.(?:org|python)|pythonhosted\.org|registry\.npmjs|deb\.debian\.org|download\.pytorch\.org"
        r"|--(?:extra-)?index-url|--find-links"
        r"|(?<![\w./-])/(?:work|root|opt/(?:pypi|wheels))/"
    )
    found = []
    for path in project_files():
        if path == Path(__file__).resolve():
            continue  # the patterns themselves
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # an image
        found += [f"{path.relative_to(ROOT)}:{n}: {line}" for n, line in enumerate(lines, 1) if forbidden.search(line)]
    assert found == []


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh"])
def test_script_is_executable_and_stops_at_the_first_error(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_ci_lints_audits_and_tests() -> None:
    (made,) = re.findall(r"^make (.+)$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    assert [word for word in made.split() if not word.startswith("--")] == ["lint", "audit", "test"]


def test_package_takes_its_dependencies_from_requirements_txt() -> None:
    """Two lists of dependencies would drift apart."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "dependencies" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    extras = {"c2pa": {"file": ["requirements-c2pa.txt"]}}
    assert project["tool"]["setuptools"]["dynamic"]["optional-dependencies"] == extras


def test_command_line_imports_nothing_heavy() -> None:
    """`--help` answers at once because nothing heavy is imported for it. The time itself depends on the machine."""
    heavy = [
        "torch",
        "torchvision",
        "ray",
        "diffusers",
        "timm",
        "lpips",
        "wandb",
        "pyarrow",
        "pandas",
        "matplotlib",
        "sklearn",
    ]
    program = f"import sys, m2d.cli; print(*[name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert run.stdout.split() == []


def test_driver_and_controller_of_a_run_do_without_the_networks() -> None:
    """Ray unpickles the worker's function in processes that only organise: seconds and 700 MB each."""
    heavy = ["torchvision", "diffusers", "timm", "lpips", "wandb", "matplotlib", "scipy", "sklearn"]
    modules = "m2d.training.trainer, m2d.training.ray_worker, m2d.training.run"
    program = f"import sys, {modules}; print(*[name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True, text=True)
    assert run.stdout.split() == []


NETWORKS = "The networks and the maths know neither Ray nor wandb"
FORBIDDEN = [
    ("models.added_ray", "import ray.data", NETWORKS),
    ("diffusion.added_wandb", "import wandb", NETWORKS),
    ("models.added_data", "from m2d.data import settings", "Rooms: upper may import lower, never the other way round"),
    ("training.step", "import ray", "The step, the losses and the generator run without Ray"),
    ("data.added_ray", "def late() -> None:\n    import ray", "Ray appears in these modules alone"),
    ("training.added_wandb", "import wandb", "wandb appears in m2d.training.telemetry alone"),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy of the package with every forbidden import in it."""
    return lint_imports_with(tmp_path_factory.mktemp("copy"), {module: line for module, line, _ in FORBIDDEN})


@pytest.mark.parametrize(("module", "line", "contract"), FORBIDDEN)
def test_import_contract_refuses(refused: str, module: str, line: str, contract: str) -> None:
    assert f"{contract} BROKEN" in refused
    broken = refused.partition("Broken contracts")[2]
    reasons = broken.partition(f"{contract}\n---")[2].partition("\n---")[0]
    assert f"m2d.{module} -> " in reasons


def test_new_room_must_be_given_its_floor(tmp_path: Path) -> None:
    assert "not listed as layers" in lint_imports_with(tmp_path, {"added": ""})


def lint_imports_with(copy: Path, added: dict[str, str]) -> str:
    """What import-linter says of a copy of the package in which each module ends with its line. It has to refuse it."""
    shutil.copytree(ROOT / "m2d", copy / "m2d", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for module, line in added.items():
        with (copy / "m2d" / f"{module.replace('.', '/')}.py").open("a") as source:
            source.write(f"{line}\n")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stdout


def test_what_a_bench_must_be_given_is_a_flag_as_its_docstring_writes_it() -> None:
    """By default jsonargparse takes parameters without a default by their place alone."""
    for path in sorted((ROOT / "bench").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "auto_cli":
                arguments = [functions[name.id] for name in ast.walk(call.args[0]) if isinstance(name, ast.Name)]
                needed = any(len(one.args) > len(one.defaults) for one in arguments)
                flags = any(keyword.arg == "as_positional" for keyword in call.keywords)
                assert flags or not needed, path.name
