#!/usr/bin/env bash
# Makes or updates the repository's environment in .venv, then every script uses .venv/bin/python.
#   bash launch/env.sh [extras]      extras of pyproject.toml, default test,data
# A second call is a quick no-op. Extras add up: asking for fewer than are installed changes nothing.
#   PYTHON=/path/to/python3.12       use this interpreter
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...   pip's own variables, e.g. for the CPU-only builds of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$(pwd -P)
extras=${1:-test,data}
stamp=.venv/xact.stamp      # written last, so an interrupted or failed set-up has none
log=.venv/install.log
suitable='import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))'   # requires-python of pyproject.toml

say() { echo "env: $*"; }
fail() { echo "env: error: $*" >&2; exit 1; }

# One interpreter path or name per line, best first. Being on PATH proves nothing: pyenv leaves shims that fail.
candidates() {
    printf '%s\n' python3.12 python3.13 python3 python
    local pyenv_root
    pyenv_root=$(pyenv root 2>/dev/null || echo "${PYENV_ROOT:-${HOME:-}/.pyenv}")
    ls -d "$pyenv_root"/versions/*/bin/python 2>/dev/null || true
}

# Sets `python` to the first interpreter that runs, has the right version and can make environments.
find_python() {
    local list name version found="" no_venv="" package=""
    list=${PYTHON:-$(candidates)}
    while IFS= read -r name; do
        version=$("$name" -c 'import sys; print(".".join(map(str, sys.version_info[:3])))' 2>/dev/null) || continue
        found+="${found:+, }$name $version"
        "$name" -c "$suitable" 2>/dev/null || continue
        if "$name" -c 'import venv, ensurepip' 2>/dev/null; then python=$name; return; fi
        no_venv="$name $version" package="python${version%.*}-venv"
    done <<<"$list"
    [ -z "$no_venv" ] || fail "$no_venv cannot make environments (no venv or ensurepip module): install them" \
        "(Debian, Ubuntu: apt install $package) or name another Python: PYTHON=/path/to/python3.12"
    fail "needs Python 3.12 or 3.13, found: ${found:-none${PYTHON:+ ($PYTHON does not run)}}. Get one (apt install" \
        "python3.12 python3.12-venv | uv python install 3.12 | pyenv install 3.12) or name it: PYTHON=/path/to/python3.12"
}

# What the environment was made from. Its place counts: environments and editable installs hold absolute paths.
fingerprint() { echo "$root $(cksum <pyproject.toml) $(.venv/bin/python -V 2>/dev/null)"; }

covers() {  # covers INSTALLED WANTED: every wanted extra is installed
    local extra
    for extra in ${2//,/ }; do [[ ",$1," == *",$extra,"* ]] || return 1; done
}

current() {
    [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$(fingerprint)" ] && covers "$(sed -n 2p "$stamp")" "$extras"
}

if current; then exit 0; fi

# Two scripts started together in a fresh clone: the second waits, then finds the work done.
if command -v flock >/dev/null; then
    exec 9>.venv.lock
    # 75: it is held. Anything else is a file system without locks, as some clusters' are: then nobody waits.
    flock -n -E 75 9 2>/dev/null || [ $? -ne 75 ] || { say "waiting for another set-up of .venv"; flock 9; }
    if current; then exit 0; fi
fi

if [ -f "$stamp" ]; then
    installed=$(sed -n 2p "$stamp")
    for extra in ${installed//,/ }; do covers "$extras" "$extra" || extras+=",$extra"; done
    rm "$stamp"
fi

# pip as the test: it is the last thing venv installs. It must be the environment's own: a half-made one can run as the
# Python it was made from. A copied or moved one has the old place in its scripts; pyvenv.cfg tells where it was made.
own_pip='import os, sys, pip; sys.exit(not pip.__file__.startswith(os.path.abspath(".venv") + os.sep))'
usable() {
    grep -qF " $root/.venv" .venv/pyvenv.cfg && .venv/bin/python -c "$suitable" && .venv/bin/python -c "$own_pip"
}
if ! usable >/dev/null 2>&1; then
    find_python
    say "making .venv with $python ($("$python" -V))"
    "$python" -m venv --clear .venv || fail "$python -m venv .venv failed"
fi

say "installing .[$extras] into .venv (minutes the first time; log: $log)"
start=$SECONDS
if ! .venv/bin/python -m pip install --disable-pip-version-check -e ".[$extras]" >"$log" 2>&1; then
    reason=$(grep -E '^ *ERROR: ' "$log" | tail -n 1 | sed 's/^ *ERROR: //') || reason=$(tail -n 1 "$log")
    fail "pip install failed: ${reason:-no output} (log: $log)"
fi
{ fingerprint; echo "$extras"; } >"$stamp"
say "ready in $((SECONDS - start)) s: $(.venv/bin/python -V), .venv/bin/python"
