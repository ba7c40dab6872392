"""What scripts/audit.py makes of pip-audit's answers; in pip-audit's place stands a program that gives them."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "audit.py"


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which calls the stand-in."""
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PIP_AUDIT", tmp_path / "pip-audit")
    return module


def stand_in(tmp_path: Path, *, stdout: str = "", stderr: str = "", code: int = 0, seconds: float = 0) -> None:
    """A pip-audit that writes its arguments to asked.txt and answers so."""
    (tmp_path / "stdout").write_text(stdout)
    (tmp_path / "stderr").write_text(stderr)
    program = tmp_path / "pip-audit"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked.txt"\nsleep {seconds}\n'
        f'cat "{tmp_path}/stderr" >&2\ncat "{tmp_path}/stdout"\nexit {code}\n'
    )
    program.chmod(0o755)


def answer(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def package_with(*fixes: str) -> dict[str, Any]:
    return {"name": "pillow", "version": "9.0.0", "vulns": [{"id": "PYSEC-1", "fix_versions": list(fixes)}]}


def test_a_known_vulnerability_with_a_fix_fails(
    audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, stdout=answer(CLEAN, package_with("9.0.1", "10.0.0")), code=1)
    assert audit.main([]) == 1
    assert "pillow 9.0.0: PYSEC-1, fixed in 9.0.1, 10.0.0" in capsys.readouterr().out


def test_one_without_a_fix_is_told_and_passes(
    audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, stdout=answer(CLEAN, package_with()), code=1)
    assert audit.main([]) == 0
    assert "pillow 9.0.0: PYSEC-1, no fix is out" in capsys.readouterr().out


def test_nothing_found_passes_and_tells_what_was_not_looked_up(
    audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, stdout=answer(CLEAN, SKIPPED))
    assert audit.main([]) == 0
    assert "audit: 1 packages" in (told := capsys.readouterr().out)
    assert "not known there: 1 (torch" in told


UNREACHED = "Traceback ...\nrequests.exceptions.ConnectionError: Max retries exceeded\n"


@pytest.mark.parametrize(
    "how", [{"stderr": UNREACHED, "code": 1}, {"stdout": answer(SKIPPED, SKIPPED)}], ids=["no network", "a mirror"]
)
def test_without_a_database_it_is_skipped_aloud_after_both_were_asked(
    audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any]
) -> None:
    """A mirror that lists no vulnerabilities of any package has not found that there are none."""
    stand_in(tmp_path, **how)
    assert audit.main([]) == 0
    assert capsys.readouterr().out.startswith("audit: SKIPPED, ")
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    assert [line.rpartition("--vulnerability-service ")[2] for line in asked] == ["pypi", "osv"]
    assert all("requirements.lock --no-deps" in line for line in asked)


def test_one_that_hangs_is_ended(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "ALL_S", 0.3)
    stand_in(tmp_path, seconds=5)
    assert audit.main([]) == 0
    assert "not done after 0.3 s" in capsys.readouterr().out


def test_an_error_that_is_no_missing_network_fails(audit: ModuleType, tmp_path: Path) -> None:
    stand_in(tmp_path, stderr="pip-audit: error: unrecognized arguments: --no-deps", code=2)
    with pytest.raises(SystemExit, match=r"^audit: pip-audit failed: pip-audit: error: unrecognized"):
        audit.main([])


def test_a_missing_pip_audit_fails(audit: ModuleType) -> None:
    with pytest.raises(SystemExit, match="run make setup"):
        audit.main([])
