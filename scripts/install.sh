#!/bin/sh
# Make .venv and install secateur with its development tools and extras into it. `make install` calls this.
#
# It prints a line for each phase and, while one runs, what pip is doing: every second on a terminal, else every 15 s.
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

log=.venv/install.log # what pip prints
start=$(date +%s)

say() { printf 'install: %4d s  %s\n' "$(($(date +%s) - start))" "$*"; }
die() {
    end_ticks
    echo "install: $*" >&2
    exit 1
}

doing() { # the last step of pip's, without the folder of a file
    grep -E '^ *(Collecting|Processing|Downloading|Preparing|Building|Installing)' "$log" 2>/dev/null | tail -n 1 |
        sed 's/^ *//; s#[^ ]*/##g; s/ (from .*//' | cut -c 1-60
}
ticks=
tick() {
    seconds=0
    while sleep 1 >/dev/null 2>&1; do
        seconds=$((seconds + 1))
        if [ -t 1 ]; then
            printf '\r\033[K%s' "$(say "  $(doing)")"
        elif [ $((seconds % 15)) = 0 ]; then
            say "  $(doing)"
        fi
    done
}
end_ticks() {
    [ -n "$ticks" ] || return 0
    kill "$ticks" 2>/dev/null || true
    wait "$ticks" 2>/dev/null || true
    ticks=
    [ ! -t 1 ] || printf '\r\033[K'
}
trap end_ticks EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
phase() { # TEXT COMMAND...
    say "$1"
    shift
    tick &
    ticks=$!
    status=0
    "$@" || status=$?
    end_ticks
    [ "$status" = 0 ] || tail -n 20 "$log" >&2 2>/dev/null || true
    return "$status"
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
rm -f "$stamp" "$log"
phase "environment in .venv (Python $version)" "$python" -m venv $clear .venv

pip() { # COMMAND ARGUMENT...
    command=$1
    shift
    .venv/bin/python -m pip --disable-pip-version-check "$command" --progress-bar off "$@" >>"$log" 2>&1
}
with_index() { pip install "$pin"; }
with_local_wheel() { pip install --no-index --no-deps "$pin"; }
with_uv() { # BACKEND [OPTION...]
    backend=$1
    shift
    pip install uv && .venv/bin/uv pip install -q --python .venv/bin/python --torch-backend "$backend" "$@" "$pin" >>"$log" 2>&1
}
# Only torch itself: what it depends on comes with the rest, from the index that pip is set up for.
with_cpu() { with_local_wheel || with_uv cpu --no-deps; }

case $torch in
'')
    if [ "$(uname -s)" = Darwin ]; then
        phase "$pin" with_index
    elif nvidia-smi >/dev/null 2>&1; then
        phase "$pin for the NVIDIA GPU found here (a large download)" with_index
    else
        if ! phase "$pin, CPU build: nvidia-smi finds no GPU (TORCH=default takes the CUDA build)" with_cpu; then
            phase "no CPU build could be had; taking the index's own, which may bring gigabytes of CUDA" with_index
        fi
    fi
    ;;
default)
    phase "$pin, the index's own build" with_index
    ;;
cpu)
    phase "$pin, CPU build" with_cpu || die "no CPU build of $pin could be had"
    ;;
*)
    phase "$pin, build $torch" with_uv "$torch" || die "no build $torch of $pin could be had"
    ;;
esac

phase "secateur, its tools, and the extras tasks (lm-eval) and slurm" \
    pip install -c constraints.txt -e '.[dev,tasks,slurm]'
say "done: torch $(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')"
echo "$torch" >"$stamp"
