"""What a run keeps of its code and messages: the copy of the code, without lines that look like keys; log files.

No setting holds a key: m2d.files.paths refuses URIs with credentials.
"""

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
# What hosts of code scan pushes for: keys that show by their form, and texts that stand behind a name of a secret.
_KEYS = re.compile(
    r"""\b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    | \bgh[pousr]_[A-Za-z0-9]{30,} | \bgithub_pat_\w{30,} | \bglpat-[\w-]{20,}
    | \bhf_[A-Za-z0-9]{30,} | \bwandb_v\d_\w{30,} | \bsk-[\w-]{32,} | \bxox[abeprs]-[\w-]{20,} | \bAIza[\w-]{35}
    | \beyJ[\w-]{16,}\.eyJ[\w-]{16,}
    | ://[^/@\s:'"]*:[^/@\s'"{}]{4,}@
    | (?i:api_?key|access_?key|secret|token|passw(?:or)?d)\w*["']?\]?\s*(?::\s*\w+\s*)?[:=,]\s*   # a name and a sign
      ["'](?=[^"']*\d)[^\s"'{}]{12,}["']
    | (?i:key)["']?\]?\s*[:=]\s*["'][0-9a-f]{40}["']""",
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
BLANKED_LINE = "# M2D left this line out of the copy, for it looks as if it held a key"


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """M2D's messages inside the `with` block, kept in this file too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("m2d").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("m2d").removeHandler(handler)
        handler.close()


def back_up_code(target: Path) -> dict[str, Any]:
    """Copy the package's sources; returns the commit and whether the tree had changes (None without git).

    Lines that look as if they held a key are left out, which is said.
    """
    package = Path(__file__).parent
    shutil.copytree(package, target / "m2d", ignore=shutil.ignore_patterns("__pycache__"))
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.is_file() and script.parent.name != "m2d":
        shutil.copy2(script, target / script.name)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=package, capture_output=True, encoding="utf-8", errors="replace",
                timeout=20, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    commit, changes = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", ".")
    if changes:
        (target / "uncommitted.patch").write_text(changes, encoding="utf-8")
    left_out = _blank_keys_in(target)
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        logger.warning(
            "code_backup: lines that look like keys are left out of the copy (%s%s); give keys by the environment",
            ", ".join(left_out[:3]), more,
        )  # fmt: skip
    return {"commit": commit.strip() if commit else None, "uncommitted_changes": bool(changes) if commit else None}


def code_without_keys(text: str) -> tuple[str, list[int]]:
    """Source code or a patch without the lines that look as if they held a key, and the numbers of those lines.

    As many lines as before, so that a patch's line counts hold. Long random words behind a name such as `api_key` or
    `password`, access keys and tokens of known form, private keys, and URIs with a password are found; others are not.
    """
    lines = text.split("\n")
    suspects = {number for number, line in enumerate(lines) if _KEYS.search(line)}
    for found in _PRIVATE_KEY.finditer(text):
        first = text.count("\n", 0, found.start())
        suspects |= set(range(first, first + found[0].count("\n") + 1))
    for number in suspects:
        mark = re.match(r"(?:\+|-(?!----))?\s*", lines[number])  # of a patch, and the indentation
        lines[number] = f"{mark[0] if mark else ''}{BLANKED_LINE}"
    return "\n".join(lines), [number + 1 for number in sorted(suspects)]


def _blank_keys_in(folder: Path) -> list[str]:
    """Blank lines that look as if they held a key in the sources and patches below a folder: `file:line` of each."""
    blanked_lines = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".py", ".patch", ".yaml", ".yml") or path.is_symlink():
            continue
        code, numbers = code_without_keys(path.read_bytes().decode("utf-8", "surrogateescape"))
        if numbers:
            path.write_bytes(code.encode("utf-8", "surrogateescape"))
            blanked_lines += [f"{path.relative_to(folder)}:{number}" for number in numbers]
    return blanked_lines
