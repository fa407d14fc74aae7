"""secateur completion: scripts that shells accept and that complete verbs, options and their values."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.cli.arguments.completion import SHELLS

pytest.importorskip("shtab")

BASH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last} COMPREPLY=()
_shtab_secateur
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script_of(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    script = tmp_path / f"secateur.{shell}"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    return script


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_accepts_its_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = script_of(shell, tmp_path, capsys)
    assert "--calibration" in script.read_text(encoding="utf-8")
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    result = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["pru"], ["prune"]),
        (["study", "re"], ["report"]),
        (["study", "sta"], ["status"]),  # `study stage` is not for people
        (["prune", "--meth"], ["--method"]),
        (["prune", "--method", "minitron"], ["minitron-depth", "minitron-width"]),
        (["study", "run", "--launcher", ""], ["local", "slurm"]),
        (["inspect", "{tmp_path}/check"], ["{tmp_path}/checkpoint"]),
    ],
)
def test_bash_completes(
    words: list[str], offers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    (tmp_path / "checkpoint").mkdir()
    script = script_of("bash", tmp_path, capsys)
    line = " ".join(f"'{word.format(tmp_path=tmp_path)}'" for word in ["secateur", *words])
    text = BASH.format(script=script, words=line, last=len(words))
    result = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert sorted(result.stdout.split()) == sorted(offer.format(tmp_path=tmp_path) for offer in offers)


def test_an_unknown_shell_gets_the_near_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bsh"]) == 2
    assert "'bsh' is not known; did you mean 'bash'?" in capsys.readouterr().err
