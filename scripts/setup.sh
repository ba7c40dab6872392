#!/usr/bin/env bash
# Make .venv hold what M2D needs. `make` calls this before everything else; where nothing changed it returns at once.
# PYTHON=python3.12 make setup   makes a new .venv with that interpreter instead of the first suitable one.
# scripts/setup.sh browser       has Debian's chromium installed, once .venv is there: what `make test` wants besides.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.m2d-setup
oldest=3.11

say() { printf 'setup: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }

# Two makes in one clone take turns. The lock is on this file's own descriptor, so nothing is left behind.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9
fi

new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (${oldest/./, }))" 2>/dev/null; }

# What the environment is made from. The clone's own path is in it because an editable install records it.
fingerprint() { { pwd -P; "$venv/bin/python" -VV; cat requirements*.txt requirements.lock pyproject.toml scripts/setup.sh; } | cksum; }

usable() { new_enough "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; }

install_debian() {
    command -v apt-get >/dev/null || refuse "$1 is missing; install it with this system's package manager, then run make again"
    [ "$(id -u)" = 0 ] || refuse "$1 is missing; run: sudo apt-get install $1"
    say "installing the Debian package $1"
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -qq -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1)
    { "${apt[@]}" update && "${apt[@]}" install --yes --no-install-recommends "$1"; } >/dev/null </dev/null ||
        refuse "apt-get could not install $1; its own words are above"
}

# For the tests of the page, which are skipped without it. Tried once.
if [ "${1:-}" = browser ]; then
    tried=$venv/.m2d-browser
    [ -e "$tried" ] || command -v chromium >/dev/null || (install_debian chromium) || say "without chromium the tests of the page are skipped"
    touch "$tried"
    exit 0
fi

if usable && [ -f "$stamp" ] && [ "$(fingerprint)" = "$(cat "$stamp")" ]; then
    exit 0
fi

# The first of the candidates that is there and new enough; nothing where there is none.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

if ! usable; then
    python=$(find_python)
    if [ -z "$python" ] && [ -z "${PYTHON:-}" ] && ! command -v python3 >/dev/null; then
        install_debian python3
        python=$(find_python)
    fi
    if [ -z "$python" ]; then
        named=${PYTHON:-python3}
        found=$(command -v "$named" >/dev/null && "$named" -V 2>&1 | head -n 1) || found="not there"
        refuse "M2D needs Python $oldest or later and $named is $found; name another: make setup PYTHON=/path/to/python3.12"
    fi
    # Debian keeps venv and ensurepip in a package of their own.
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        install_debian "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fi
    "$python" -m venv --clear "$venv"
fi

here=$("$venv/bin/python" -c 'import platform as p
print(f"{p.system()} {p.machine()}, {p.python_implementation()} {p.python_version().rpartition(chr(46))[0]}")')
locked=$(sed -n 's/^# platform: //p' requirements.lock)
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
[ -t 1 ] || pip+=(--quiet)
if [ "$here" = "$locked" ]; then
    say "installing the versions of requirements.lock into $venv (about 7 GB the first time)"
    "${pip[@]}" install --no-compile -r requirements-dev.txt -c requirements.lock </dev/null
else
    say "requirements.lock is for $locked, this is $here: installing by the ranges of requirements.txt into $venv"
    "${pip[@]}" install --no-compile -r requirements-dev.txt </dev/null
fi
# pip would compile on one core. Some packages hold templates that are no Python; those stay as they are.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" </dev/null >/dev/null || true
"${pip[@]}" install --no-deps --no-build-isolation --editable . </dev/null
fingerprint >"$stamp"
