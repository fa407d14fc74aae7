"""What TRL's SFTTrainer makes of the cases in ``chat_cases.py``: ids, labels, number of targets, loss.

``python tests/handoff/sft_trainer.py`` writes ``tests/golden/chat.json``, which the unit tests read.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from chat_cases import CASES, GOLDEN, Case, chat_model  # noqa: E402
from helpers import hf  # noqa: E402


def sft_figures(case: Case, folder: Path) -> dict[str, Any]:
    """Ids and labels of each row, targets and mean loss over all rows in one padded batch."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list(case.rows)
    settings = SFTConfig(
        output_dir=str(folder / "out"),
        assistant_only_loss=case.format == "messages",
        per_device_eval_batch_size=len(case.rows),
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = SFTTrainer(
        hf(chat_model(folder)), settings, train_dataset=rows, eval_dataset=rows, processing_class=case.tokenizer
    )
    encoded = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.eval_dataset]
    targets = sum(label != -100 for row in encoded for label in row["labels"][1:])
    return {"rows": encoded, "targets": targets, "loss": trainer.evaluate()["eval_loss"]}


if __name__ == "__main__":
    figures = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = sft_figures(case, Path(folder))
    GOLDEN.write_text(json.dumps(figures) + "\n")
