"""What pruning costs: secateur beside plain implementations of the published algorithms, and beside other tools.

    python benchmarks/prune.py [--size 8m|200m|8b] [--methods wanda,sparsegpt] [--peers --peer-python PATH]
    python benchmarks/prune.py --memory

Every contender prunes the same random Llama to a half on the same windows, each in a process of its own. Python's
start, imports, loading, pruning and writing are all counted; what imports alone take is measured for each tool, and is
taken off in the columns "net" and in ratios. Prints Markdown tables. With --memory a checkpoint of 3 GB is pruned under
a limit on memory instead.

Memory is given twice. "anon" leaves out mapped files, which is where a float32 checkpoint stays for whoever maps it;
"RSS" counts them as far as they were in memory at the peak.

For --peers, llmcompressor and nvidia-modelopt need an environment of their own (they pin other versions):

    python -m venv peers && peers/bin/pip install llmcompressor nvidia-modelopt torch==2.13.0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import SIZES, Size, make_checkpoint, make_tokens
from measure import Measured, run
from peers import OFFERED
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 10**9  #: bytes of memory in the memory case
IMPORTS = {
    "secateur": "import accelerate, secateur.cli.verbs.pruning; from transformers import LlamaForCausalLM",
    "reference": "import benchmarks.reference.__main__; from transformers import LlamaForCausalLM",
}


@dataclass(frozen=True)
class Case:
    """A method as it is measured: to half of everything that it prunes."""

    target: str  #: option of secateur, with the sizes of the model
    windows: float = 1.0  #: share of the windows; the authors of methods with gradients use few
    method: str = ""  #: where it differs from the case's name
    group: int = 0  #: weights of a pattern's group


_GROUPS = "--shape heads={heads},kv_heads={kv_heads},ffn={ffn}"
CASES = {
    "magnitude": Case("--ratio 0.5"),
    "wanda": Case("--ratio 0.5"),
    "sparsegpt": Case("--ratio 0.5"),
    "sparsegpt-2:4": Case("--pattern 2:4", method="sparsegpt", group=4),
    "shortgpt": Case("--ratio 0.5"),
    "minitron-depth": Case("--ratio 0.5"),
    "minitron-width": Case("--shape hidden={hidden},ffn={ffn}"),
    "flap": Case(_GROUPS),
    "wanda-sp": Case(_GROUPS),
    "llm-pruner": Case(_GROUPS, windows=1 / 8),
    "shortened-llama": Case("--ratio 0.5", windows=1 / 4),
}
CONFINED = ("wanda", "sparsegpt", "minitron-width", "shortgpt")  #: methods of the memory case


@dataclass
class Row:
    """One contender at one method."""

    method: str
    contender: str  #: ``secateur``, ``secateur bfloat16``, ``reference``, or a tool
    tokens: int
    command: list[str]
    out: Path
    runs: list[Measured] = field(default_factory=list)
    agreement: str = ""

    @property
    def tool(self) -> str:
        return self.contender.partition(" ")[0]

    @property
    def best(self) -> Measured:
        """The run of the fewest CPU-seconds, with the highest peaks of all runs."""
        best = min(self.runs, key=lambda run: run.cpu)
        anonymous, resident = (max(getattr(run, name) for run in self.runs) for name in ("anonymous", "resident"))
        return dataclasses.replace(best, anonymous=anonymous, resident=resident)


class Benchmark:
    """All that is measured in one go, and where it lies."""

    def __init__(self, asked: argparse.Namespace, size: Size) -> None:
        self.asked, self.size = asked, size
        self.threads = asked.threads or size.threads
        self.windows, self.seqlen = asked.windows or size.windows, asked.seqlen or size.seqlen
        self.work = Path(asked.out)
        self.base: dict[str, Measured] = {}  #: what imports take, for each tool
        self.rows: list[Row] = []

    def run(self, methods: Sequence[str]) -> None:
        """Measure; a row's output is removed as soon as it has been compared."""
        self.model = make_checkpoint(self.size, self.work / f"llama-{self.asked.size}")
        bfloat16 = "bfloat16" in self.asked.dtype and _says_dtype(self._environment("secateur"))
        for name in methods:
            rows = list(self._contenders(name, bfloat16=bfloat16))
            for row in rows:
                if row.tool not in self.base:
                    self.base[row.tool] = self._imports(row.tool)
            for turn in range(self.asked.repeat):
                for row in rows:
                    _clear(row.out)
                    row.runs.append(run(row.command, self._environment(row.tool), device=self.asked.device))
                    print(f"{row.method}, {row.contender}, run {turn + 1}: {_said(row.runs[-1])}", file=sys.stderr)
            for row in rows[1:]:
                row.agreement = _agreement(rows[0].out, row.out)
            for row in rows:
                _clear(row.out)
            self.rows += rows

    def confined(self, methods: Sequence[str]) -> None:
        """Prune a large checkpoint under a limit on memory."""
        self.model = make_checkpoint(self.size, self.work / "llama-3gb")
        self.base["secateur"] = self._imports("secateur")
        for name in methods:
            row = next(self._contenders(name, bfloat16=False))
            _clear(row.out)
            row.runs.append(run(row.command, self._environment("secateur"), limit=LIMIT))
            print(f"{row.method}: {_said(row.runs[-1])}", file=sys.stderr)
            _clear(row.out)
            self.rows.append(row)

    def _contenders(self, name: str, *, bfloat16: bool) -> Iterator[Row]:
        """The rows of a method; secateur comes first."""
        case, size = CASES[name], self.size
        windows = max(int(self.windows * case.windows), 1)
        tokens = make_tokens(self.work / f"tokens-{windows}x{self.seqlen}.npy", size.vocabulary, windows, self.seqlen)
        half = {key: str(getattr(size, key) // 2) for key in ("hidden", "ffn", "heads", "kv_heads")}
        method = case.method or name

        def row(contender: str, *command: str) -> Row:
            out = (
                self.work / f"out-{os.getpid()}-{contender.replace(' ', '-')}"
            )  # another run may go on beside this one
            filled = [str(out) if part == "OUT" else part for part in command]
            return Row(name, contender, windows * self.seqlen * (name != "magnitude"), filled, out)

        options = [*case.target.format(**half).split(), "--device", self.asked.device]
        if name != "magnitude":
            options += ["--calibration", f"tokens:{tokens}"]
        ours = (sys.executable, "-m", "secateur", "prune", str(self.model), "OUT", "--method", method, *options)
        if "float32" in self.asked.dtype:
            yield row("secateur", *ours)
        if bfloat16 and name != "magnitude":
            yield row("secateur bfloat16", *ours, "--dtype", "bfloat16")
        if self.asked.memory:
            return
        about = (str(self.model), "OUT", "--tokens", str(tokens), "--device", self.asked.device)
        group = ("--group", str(case.group)) if case.group else ()
        yield row("reference", sys.executable, "-m", "benchmarks.reference", method, *about, *group)
        for tool in OFFERED if self.asked.peers else ():
            if name in OFFERED[tool]:
                script = str(ROOT / "benchmarks" / "peers.py")
                yield row(tool, self.asked.peer_python, script, tool, name, *about)

    def _imports(self, tool: str) -> Measured:
        """What it takes to start Python and import a tool, the least of three."""
        if tool in IMPORTS:
            command = [sys.executable, "-c", IMPORTS[tool]]
        else:
            command = [self.asked.peer_python, str(ROOT / "benchmarks" / "peers.py"), tool, OFFERED[tool][0]]
        runs = [run(command, self._environment(tool)) for _ in range(3)]
        if runs[0].failure:
            raise SystemExit(f"{tool} cannot be imported: {runs[0].failure}")
        return min(runs, key=lambda measured: measured.cpu)

    def _environment(self, tool: str) -> dict[str, str]:
        """Alike for all: so many threads, which sleep when idle, and no network."""
        threads = {f"{name}_NUM_THREADS": str(self.threads) for name in ("OMP", "MKL", "OPENBLAS")}
        calm = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])} if tool in IMPORTS else {}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return kept | threads | calm | path | {"HF_HUB_OFFLINE": "1"}

    def above(self, row: Row) -> Measured:
        """What a row takes above imports alone."""
        best, base = row.best, self.base[row.tool]
        return dataclasses.replace(
            best,
            cpu=max(best.cpu - base.cpu, 0.01),
            wall=max(best.wall - base.wall, 0.01),
            anonymous=max(best.anonymous - base.anonymous, 1 << 20),
            resident=max(best.resident - base.resident, 1 << 20),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8m")
    parser.add_argument("--methods", default=",".join(CASES), help="of " + ", ".join(CASES))
    parser.add_argument("--windows", type=int, help="llm-pruner takes an eighth of them, shortened-llama a quarter")
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the one of the fewest CPU-seconds counts")
    parser.add_argument("--dtype", default="float32,bfloat16", help="rows of secateur")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", action="store_true", help="llmcompressor and nvidia-modelopt as well")
    parser.add_argument("--peer-python", default="peers/bin/python", help="interpreter that has them")
    parser.add_argument("--memory", action="store_true", help="the memory case")
    parser.add_argument("--out", default="runs/benchmark", help="where the checkpoint and the outputs lie")
    parser.add_argument("--json", type=Path, help="write all that was measured")
    asked = parser.parse_args()
    asked.dtype = asked.dtype.split(",")
    methods = [name for name in asked.methods.split(",") if name in CASES]
    if unknown := set(asked.methods.split(",")) - set(CASES):
        parser.error(f"--methods: {', '.join(sorted(unknown))}: not of {', '.join(CASES)}")
    if asked.memory:
        size = SIZES["3gb" if asked.size == "8m" else asked.size]
        benchmark = Benchmark(asked, size)
        benchmark.confined([name for name in methods if name in CONFINED])
        print(_memory_table(benchmark))
    else:
        benchmark = Benchmark(asked, SIZES[asked.size])
        benchmark.run(methods)
        print(f"{_table(benchmark)}\n\n{_reached(benchmark)}\n\n{_imports_table(benchmark)}")
    if asked.json:
        asked.json.write_text(json.dumps(_record(benchmark), indent=1))


def _clear(out: Path) -> None:
    """Remove an output, and what a run that failed left of one."""
    for directory in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(directory, ignore_errors=True)


def _says_dtype(environment: Mapping[str, str]) -> bool:
    """Whether secateur can run its forward passes in another type."""
    command = [sys.executable, "-m", "secateur", "prune", "--help"]
    return "--dtype" in subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def _table(benchmark: Benchmark) -> str:
    """Every row, with ratios to secateur's float32 row of the method."""
    device = benchmark.asked.device != "cpu"
    head = ["method", "contender", "tokens", "CPU s", "net", "wall s", "tokens/s", "anon MB", "net", "RSS MB", "net"]
    head += ["device MB"] * device + ["CPU ratio", "anon ratio", "RSS ratio", "same as secateur"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 3) + "---|"]
    ours = {row.method: row for row in benchmark.rows if row.contender == "secateur" and not row.best.failure}
    for row in benchmark.rows:
        best = row.best
        start = f"| {row.method} | {row.contender} | {row.tokens:,} |"
        if best.failure:
            lines.append(f"{start} failed: {best.failure} |" + " |" * (len(head) - 4))
            continue
        net = benchmark.above(row)
        cells = [f"{best.cpu:.1f}", f"{net.cpu:.1f}", f"{best.wall:.1f}"]
        cells += [f"{row.tokens / net.wall:,.0f}" if row.tokens else ""]
        cells += [_mb(best.anonymous), _mb(net.anonymous), _mb(best.resident), _mb(net.resident)]
        cells += [_mb(best.device or 0)] * device
        if row.method in ours:
            base = benchmark.above(ours[row.method])
            cells += [f"{getattr(net, name) / getattr(base, name):.2f}" for name in ("cpu", "anonymous", "resident")]
        else:
            cells += [""] * 3
        lines.append(f"{start} {' | '.join(cells)} | {row.agreement} |")
    return "\n".join(lines)


def _reached(benchmark: Benchmark) -> str:
    """Secateur against the fastest other contender of each method, and its memory against that one's."""
    lines = [
        "| method | row | fastest other | its CPU s / secateur's | asked | secateur's anon / its | RSS / its | asked |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    done = [row for row in benchmark.rows if not row.best.failure]
    for row in done:
        others = [other for other in done if other.method == row.method and other.tool != "secateur"]
        if row.tool != "secateur" or not others:
            continue
        fastest = min(others, key=lambda other: benchmark.above(other).cpu)
        ours, its = benchmark.above(row), benchmark.above(fastest)
        lines.append(
            f"| {row.method} | {row.contender} | {fastest.contender} | {its.cpu / ours.cpu:.2f}x "
            f"| {'4x' if 'bfloat16' in row.contender else '2x'} | {ours.anonymous / its.anonymous:.2f} "
            f"| {ours.resident / its.resident:.2f} | 0.33 |"
        )
    return "\n".join(lines)


def _imports_table(benchmark: Benchmark) -> str:
    lines = ["| imports alone | CPU s | wall s | anon MB | RSS MB |", "|---|---:|---:|---:|---:|"]
    for tool, took in benchmark.base.items():
        memory = f"{_mb(took.anonymous)} | {_mb(took.resident)}"
        lines.append(f"| {tool} | {took.cpu:.1f} | {took.wall:.1f} | {memory} |")
    return "\n".join(lines)


def _memory_table(benchmark: Benchmark) -> str:
    stored = benchmark.size.parameters * benchmark.size.dtype.itemsize
    base = benchmark.base["secateur"]
    lines = [
        f"{stored / 1e9:.2f} GB of weights, {benchmark.windows} windows of {benchmark.seqlen} tokens, "
        f"RLIMIT_DATA {LIMIT / 1e6:,.0f} MB; imports alone {_mb(base.anonymous)} MB\n",
        "| method | | peak anon MB | RSS with mapped files MB | CPU s | wall s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in benchmark.rows:
        best = row.best
        verdict = f"fails: {best.failure}" if best.failure else "passes"
        cells = f"{_mb(best.anonymous)} | {_mb(best.resident)} | {best.cpu:.0f} | {best.wall:.0f}"
        lines.append(f"| {row.method} | {verdict} | {cells} |")
    return "\n".join(lines)


def _record(benchmark: Benchmark) -> dict[str, Any]:
    """All that was measured, in plain values; commands and places are left out."""
    rows = [
        {
            "method": row.method,
            "contender": row.contender,
            "tokens": row.tokens,
            "agreement": row.agreement,
            "runs": [dataclasses.asdict(measured) for measured in row.runs],
        }
        for row in benchmark.rows
    ]
    size = {**dataclasses.asdict(benchmark.size), "dtype": str(benchmark.size.dtype).removeprefix("torch.")}
    said = {"threads": benchmark.threads, "windows": benchmark.windows, "seqlen": benchmark.seqlen}
    imports = {tool: dataclasses.asdict(measured) for tool, measured in benchmark.base.items()}
    return {"size": size, **said, "device": benchmark.asked.device, "imports": imports, "rows": rows}


def _agreement(ours: Path, theirs: Path) -> str:
    """How far another contender keeps what secateur keeps; empty where one of them left nothing."""
    if not (ours / "plan.safetensors").exists() or not theirs.exists():
        return ""
    equal = total = 0
    with ExitStack() as files:
        plan = files.enter_context(safe_open(ours / "plan.safetensors", "pt"))
        names = {name for name in plan.keys() if name.startswith(("keep.", "mask."))}  # noqa: SIM118
        other = _tensors(theirs, files)
        masked = any(name.startswith("mask.") for name in names)
        for name in sorted(names):
            if name in other:
                value = other[name].get_tensor(name)
            elif masked and name.removeprefix("mask.") in other:
                value = other[name.removeprefix("mask.")].get_tensor(name.removeprefix("mask.")) != 0
            else:
                continue  # a space that was not asked for: all of it is kept
            mine = plan.get_tensor(name)
            equal += int((mine == value).sum()) if masked else len(set(mine.tolist()) & set(value.tolist()))
            total += mine.numel()
    if not total:
        return ""
    return f"{100 * equal / total:.2f}% of mask" if masked else f"{equal} of {total} kept"


def _tensors(directory: Path, files: ExitStack) -> dict[str, Any]:
    """Name -> the open file that holds it. A plan or a reference's choice comes before the weights."""
    chosen = [p for p in (directory / "plan.safetensors", directory / "kept.safetensors") if p.exists()]
    opened = [files.enter_context(safe_open(p, "pt")) for p in chosen or sorted(directory.glob("*.safetensors"))]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _said(measured: Measured) -> str:
    return measured.failure or (
        f"{measured.cpu:.1f} CPU s, {measured.wall:.1f} s, {_mb(measured.anonymous)} MB anonymous"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"


if __name__ == "__main__":
    main()
