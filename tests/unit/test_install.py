"""scripts/install.sh with a Python that only says what it is asked for: its phases, and what it shows of them."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from secateur.runtime import install_command

ROOT = Path(__file__).parents[2]
#: Stands for python3 and for .venv/bin/python.
PYTHON = """#!/bin/sh
case "$*" in
*version_info\\[*) echo 3.12 ;;
"-m venv"*) mkdir -p .venv/bin .venv/lib/python3.12/site-packages && cp "$0" .venv/bin/python ;;
*" install "*)
    echo "$*" >>arguments
    echo "Processing /some/folder/package-1.0.whl (from somewhere)"
    echo "WARNING: noise" >&2
    sleep 2
    [ ! -e broken ] ;;
*metadata*) echo 2.0+cpu ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def install(clone: Path, *, terminal: bool = False) -> tuple[int, str]:
    """Run the script and return its exit code and what it prints."""
    environment = {**os.environ, "PYTHON": str(clone / "python"), "TORCH": "cpu"}
    command = ["sh", str(clone / "scripts" / "install.sh")]
    if not terminal:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stdout + result.stderr
    reader, writer = pty.openpty()
    with subprocess.Popen(command, env=environment, stdout=writer, stderr=writer) as process:
        os.close(writer)
        text = b""
        try:
            while part := os.read(reader, 4096):
                text += part
        except OSError:  # Linux: the other end is closed
            pass
    os.close(reader)
    return process.returncode, text.decode()


def test_each_phase_is_a_line_with_the_seconds_so_far(clone: Path) -> None:
    code, text = install(clone)
    lines = text.splitlines()
    assert code == 0 and all(re.match(r"install: +\d+ s  \S", line) for line in lines), text
    phases = ("environment in .venv", "torch==", "secateur, its tools", "done: torch")
    assert all(phase in line for line, phase in zip(lines, phases, strict=True)), text
    assert "noise" not in text
    seconds = [int(line.split()[1]) for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] >= 4


def test_a_terminal_shows_what_pip_does(clone: Path) -> None:
    code, text = install(clone, terminal=True)
    assert code == 0 and re.search(r"\r\x1b\[Kinstall: +\d+ s    Processing package-1.0.whl\r", text), text


def test_the_extras_are_installed(clone: Path) -> None:
    install(clone)
    assert "-e .[dev,tasks,slurm]" in (clone / "arguments").read_text().splitlines()[-1]


def test_a_failure_ends_it(clone: Path) -> None:
    (clone / "broken").touch()
    code, text = install(clone)
    assert (
        code == 1
        and "WARNING: noise" in text
        and "no CPU build of torch==" in text
        and not (clone / ".venv" / ".installed").exists()
    )


def test_the_command_installs_where_the_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/a folder/bin/python")
    assert install_command("secateur[tasks]") == "'/a folder/bin/python' -m pip install 'secateur[tasks]'"
    monkeypatch.setattr("secateur.runtime.find_spec", lambda _: None)  # an environment that uv has made
    assert install_command("shtab") == "uv pip install -p '/a folder/bin/python' shtab"


def test_every_extra_that_a_message_or_page_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    files = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile"]
    names = {name for file in files for name in re.findall(r"secateur\[([\w,-]+)\]", file.read_text(encoding="utf-8"))}
    assert {extra for name in names for extra in name.split(",")} == extras.keys() - {"dev"}
