#!/usr/bin/env bash
# Makes .venv with the project, its dependencies and FFCV: scripts/setup.sh [--dev] [--without-ffcv]
#
#   --dev            also what linting, type checks and tests need
#   --without-ffcv   do not build FFCV (needs no compiler); the in-memory loader takes its place
#
# Variables: PYTHON, the interpreter to use (3.11 to 3.14); VENV, the folder (.venv);
# REQUIRE_FFCV=1, fail if FFCV cannot be built.
#
# On Debian and Ubuntu, as root or with sudo that asks no password, missing system packages are installed. Done
# once, it takes a second; it does its work again when pyproject.toml or native/ change or it was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

dev=0
with_ffcv=1
for argument in "$@"; do
    case $argument in
        --dev) dev=1 ;;
        --without-ffcv) with_ffcv=0 ;;
        *) fail "unknown argument '$argument'; known are --dev and --without-ffcv" ;;
    esac
done
[ "$(uname -s)" = Linux ] || with_ffcv=0
VENV=${VENV:-.venv}

# ------------------------------------------------------------------------------------------ Python

is_suitable() { # runs, and is 3.11 to 3.14
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' > /dev/null 2>&1
}

# The first suitable one: python3 itself, because system packages such as python3-dev belong to it.
find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if is_suitable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || echo none; }

can_install_packages() {
    command -v apt-get > /dev/null || return 1
    [ "$(id -u)" = 0 ] || sudo -n true 2> /dev/null
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# Installs the named packages, or says that they are missing and ends.
install_packages() {
    if ! can_install_packages; then
        fail "missing on this machine, and not to be installed without root rights:
    sudo apt-get install $*
These are Debian's and Ubuntu's names; elsewhere: Python 3.11 to 3.14 with its venv module and headers, and a C++
compiler. Then run this again. Neither headers nor compiler are needed with: scripts/setup.sh --without-ffcv"
    fi
    stage "installing system packages: $*"
    quietly as_root apt-get update
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# Where python3 is too old (Ubuntu 22.04 has 3.10), a newer one may be packaged beside it.
newest_packaged_python() {
    local minor
    for minor in 14 13 12 11; do
        if apt-cache show "python3.$minor-venv" > /dev/null 2>&1; then
            echo "python3.$minor"
            return
        fi
    done
    return 1
}

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_suitable "$PYTHON" || fail "PYTHON=$PYTHON is Python $(version_of "$PYTHON"); 3.11 to 3.14 is needed"
        python=$PYTHON
        return
    fi
    if python=$(find_python); then return; fi
    stage "python3 is $(version_of python3); Python 3.11 to 3.14 is needed"
    if can_install_packages; then
        quietly as_root apt-get update
        packaged=$(newest_packaged_python) ||
            fail "this system's packages have no Python 3.11 to 3.14. Install one, then: PYTHON=/path/to/python3 $0"
        install_packages "$packaged" "$packaged-venv" "$packaged-dev"
        python=$(find_python) || fail "no suitable Python after installing $packaged"
    else
        install_packages python3.11 python3.11-venv python3.11-dev
    fi
}

# Prints the system packages that are missing beside Python itself.
missing_packages() {
    local package
    # Debian's and Ubuntu's names: python3-venv for python3, python3.12-venv for another one.
    package=$(basename "$python")
    [[ $package =~ ^python3(\.[0-9]+)?$ ]] || package=python$(version_of "$python")
    "$python" -c 'import ensurepip, venv' 2> /dev/null || echo "$package-venv"
    [ "$with_ffcv" = 1 ] || return 0
    command -v "${CXX:-g++}" > /dev/null || command -v c++ > /dev/null || command -v clang++ > /dev/null || echo g++
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_paths()["include"] + "/Python.h")' 2> /dev/null ||
        echo "$package-dev"
}

# ------------------------------------------------------------------------------------------ stamp

# What the installed environment depends on. A stamp holds it once everything is in place, never before.
fingerprint() {
    cat pyproject.toml scripts/setup.sh scripts/common.sh native/*.* native/bin/* native/bundled/*/*.* | cksum
    echo "ffcv $with_ffcv, folder $PWD"
}

is_current() { [ -x "$VENV/bin/python" ] && [ "$(cat "$1" 2> /dev/null)" = "$(fingerprint)" ]; }

user_stamp=$VENV/setup-done
dev_stamp=$VENV/setup-done-dev
if is_current "$dev_stamp" || { [ "$dev" = 0 ] && is_current "$user_stamp"; }; then
    stage "$VENV is up to date"
    exit 0
fi

# ------------------------------------------------------------------------------------------ work

choose_python
missing=$(missing_packages)
# shellcheck disable=SC2086  # one word for each package
[ -z "$missing" ] || install_packages $missing

if [ -x "$VENV/bin/python" ] && [ "$(version_of "$VENV/bin/python")" != "$(version_of "$python")" ]; then
    [ -z "${PYTHON:-}" ] ||
        fail "$VENV is for Python $(version_of "$VENV/bin/python"), PYTHON is $(version_of "$python"): delete $VENV first"
fi
rm -f "$user_stamp" "$dev_stamp"
if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then # none yet, or one left half-made
    stage "making $VENV with $python ($(version_of "$python"))"
    "$python" -m venv --clear "$VENV"
fi

extras=ffcv
[ "$dev" = 0 ] || extras=ffcv,dev
stage "installing Python packages (PyTorch is several GB: minutes, by your connection)"
show_only 'Downloading .*\([0-9]{2,}(\.[0-9])? MB\)|Installing collected' \
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --editable ".[$extras]"

if [ "$with_ffcv" = 1 ]; then
    stage "building FFCV"
    if ! "$VENV/bin/python" native/install_ffcv.py; then
        [ "${REQUIRE_FFCV:-0}" != 1 ] || fail "FFCV is required here (REQUIRE_FFCV=1)"
        stage "$VENV is ready, without FFCV (see above); the next run tries again"
        exit 0
    fi
fi

if [ "$dev" = 1 ]; then fingerprint > "$dev_stamp"; else fingerprint > "$user_stamp"; fi
stage "$VENV is ready"
