#!/bin/sh
# Make .venv and install secateur with its development tools into it. `make install` calls this.
#
#   PYTHON  the interpreter to start from (default: python3)
#   TORCH   the build of PyTorch:
#             (unset)   the index's own where nvidia-smi finds a GPU, and on macOS; else a CPU build
#             default   the index's own (on Linux: with CUDA)
#             cpu       a CPU build, or fail
#             cu130...  any value of uv's --torch-backend
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
torch=${TORCH:-}
stamp=.venv/.installed

say() { echo "install: $*"; }
die() {
    echo "install: $*" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    die "no $python found: install Python 3.11 or newer, or give PYTHON=/path/to/python"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || die "$python does not run"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is Python $version, but 3.11 or newer is needed: give another with PYTHON=/path/to/python"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv or no ensurepip: install them (on Debian and Ubuntu the package python$version-venv)"
pin=$(grep '^torch==' constraints.txt) || die "constraints.txt pins no torch"

# A finished environment of the same Python and the same TORCH is updated in place, anything else is made anew.
clear=--clear
if [ -f "$stamp" ] && [ -e ".venv/lib/python$version/site-packages" ]; then
    [ -n "$torch" ] && [ "$torch" != "$(cat "$stamp")" ] || clear=
fi
[ -n "$clear" ] || [ -n "$torch" ] || torch=$(cat "$stamp")
rm -f "$stamp"
say "environment in .venv (Python $version)"
"$python" -m venv $clear .venv

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
with_index() { pip install -qq "$pin"; }
with_local_wheel() { pip install -qq --no-index --no-deps "$pin" >/dev/null 2>&1; }
with_uv() { # BACKEND [OPTION...]
    backend=$1
    shift
    pip install -qq uv && .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend "$backend" "$@" "$pin"
}
# Only torch itself: what it depends on comes with the rest, from the index that pip is set up for.
with_cpu() { with_local_wheel || with_uv cpu --no-deps; }

case $torch in
'')
    if [ "$(uname -s)" = Darwin ]; then
        say "$pin"
        with_index
    elif nvidia-smi >/dev/null 2>&1; then
        say "$pin for the NVIDIA GPU found here (a large download)"
        with_index
    else
        say "$pin, CPU build: nvidia-smi finds no GPU (TORCH=default takes the CUDA build)"
        if ! with_cpu; then
            say "no CPU build could be had; taking the index's own, which may bring gigabytes of CUDA"
            with_index
        fi
    fi
    ;;
default)
    say "$pin, the index's own build"
    with_index
    ;;
cpu)
    say "$pin, CPU build"
    with_cpu || die "no CPU build of $pin could be had"
    ;;
*)
    say "$pin, build $torch"
    with_uv "$torch" || die "no build $torch of $pin could be had"
    ;;
esac

say "secateur and its tools"
pip install -qq -c constraints.txt -e '.[dev]'
say "done: torch $(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')"
echo "$torch" >"$stamp"
