"""Hold requirements.lock against databases of known vulnerabilities, as far as one can be reached.

Called by `make audit` and in CI. Exit code 1: a vulnerability is known and a version without it is out. Where no
database answers, which a machine without network is no fault for, it says so and ends with 0.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PIP_AUDIT = Path(sys.executable).parent / "pip-audit"
DATABASES = ("pypi", "osv")  # as pip-audit names them; the second one only where the first tells nothing
ANSWER_S, ALL_S = 10, 120  # for one request, for all packages
IGNORED: dict[str, str] = {}  # id of a vulnerability -> why it does not concern M2D
NO_NETWORK = re.compile(
    r"ConnectionError|Timeout|SSLError|ProxyError|HTTPError|ServiceError|Max retries|[Nn]ame resolution|"
    r"[Cc]ould not connect|[Cc]onnection (?:refused|reset)"
)


def main(arguments: list[str]) -> int:
    reasons = []
    for database in DATABASES:
        try:
            found = ask(database, arguments)
        except NoAnswerError as error:
            reasons.append(f"{database}: {error}")
            continue
        return report(found)
    print(f"audit: SKIPPED, for no database of vulnerabilities answers here ({'; '.join(reasons)}); requirements.lock "
          "is not checked")  # fmt: skip
    return 0


class NoAnswerError(Exception):
    """The database cannot be reached, or knows none of the packages."""


def ask(database: str, arguments: list[str]) -> list[dict[str, Any]]:
    """What the database says of each package. Raises NoAnswerError."""
    command = [
        str(PIP_AUDIT), "--requirement", str(ROOT / "requirements.lock"), "--no-deps", "--disable-pip", "--format",
        "json", "--desc", "off", "--progress-spinner", "off", "--timeout", str(ANSWER_S), "--vulnerability-service",
        database, *(word for known in IGNORED for word in ("--ignore-vuln", known)), *arguments,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ALL_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit(f"audit: {PIP_AUDIT} is not there; run make setup first") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"not done after {ALL_S} s") from None
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if NO_NETWORK.search(done.stderr):
            raise NoAnswerError("not reached") from None
        raise SystemExit(f"audit: pip-audit failed: {last}") from None
    if not any("vulns" in package for package in found):
        # A mirror that has packages but no list of vulnerabilities; pip-audit calls that no vulnerability.
        raise NoAnswerError(f"knows none of the {len(found)} packages")
    return found


def report(found: list[dict[str, Any]]) -> int:
    """Print what was found; 1 where something can be done about it."""
    unknown = [package["name"] for package in found if "vulns" not in package]
    fixable = 0
    for package in found:
        for known in package.get("vulns", []):
            fixes = ", ".join(known["fix_versions"])
            fixable += bool(fixes)
            done = f"fixed in {fixes}" if fixes else "no fix is out"
            print(f"audit: {package['name']} {package['version']}: {known['id']}, {done}")
    rest = f"; not known there: {len(unknown)} ({unknown[0]} ...)" if unknown else ""
    print(f"audit: {len(found) - len(unknown)} packages checked, {fixable} vulnerabilities that have a fix{rest}")
    return int(fixable > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
