"""Apply the masks of a pruned checkpoint to what a merge of adapters or a foreign trainer has made of it."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.config import AnyPath, spec
from secateur.errors import UserError
from secateur.files import check_disk, read_json, require_new_directory, resumable_directory
from secateur.formatting import percent
from secateur.hub import is_hub_name, local_checkpoint, repository_of
from secateur.model.card import Ancestry, model_card, pruning_method
from secateur.model.checkpoint import Checkpoint, read_config
from secateur.model.checkpoint_writing import PROVENANCE, write_checkpoint
from secateur.model.companions import copy_companions, vocabulary_files
from secateur.model.plan import JSON_FILE, TENSOR_FILE, Plan, load_masks
from secateur.model.runtimes import describe_runtimes
from secateur.model.surgery import cut_config, cut_tensors
from secateur.progress import notify, track
from secateur.pruning.pipeline import runtimes_of

__all__ = ["MaskRequest", "Masked", "mask_checkpoint"]


@spec
class MaskRequest:
    """A checkpoint whose pruned weights are to be zero again.

    Attributes:
        model: the checkpoint: a directory, a Hub name, or the result of an earlier call.
        plan: the pruned checkpoint whose masks apply, likewise.
        out: new directory to write; None for the name of ``model`` with ``-masked`` behind it.
    """

    model: AnyPath
    plan: AnyPath
    out: AnyPath | None = None

    @property
    def directory(self) -> Path:
        """The directory to write."""
        if self.out is not None:
            return Path(self.out)
        if is_hub_name(str(self.model)):
            raise UserError(f"`out`: name a new directory for the masked {self.model}")
        path = Path(self.model)
        return path.absolute().with_name(f"{path.absolute().name}-masked")


@dataclass(frozen=True)
class Masked:
    """A checkpoint with its masks applied. ``os.fspath`` gives its directory."""

    path: Path
    matrices: int  #: that have a mask
    masked: int  #: weights that the masks drop
    weights: int  #: of those matrices
    zeroed: int  #: weights that were not zero, although a mask drops them
    norm_share: float  #: L2 norm of these weights, as a share of the norm of all weights of the matrices

    def __fspath__(self) -> str:
        return str(self.path)

    def record(self) -> dict[str, Any]:
        """Plain values, as ``secateur mask --json`` prints them."""
        return {"out": str(self.path), **self.counts}

    @property
    def counts(self) -> dict[str, Any]:
        """What the masks dropped."""
        return {name: value for name, value in vars(self).items() if name != "path"}

    def __str__(self) -> str:
        share = percent(self.zeroed / max(1, self.masked))
        return (
            f"set {self.zeroed:,} weights to zero ({share} of the {self.masked:,} that the masks drop; "
            f"{percent(self.norm_share)} of the norm of {self.matrices} matrices)"
        )


def mask_checkpoint(request: MaskRequest) -> Masked:
    """Write ``model`` with the masks of ``plan`` applied, tensor by tensor, and the plan beside it.

    Raises:
        UserError: if the plan has no masks, or they belong to a model of other names, sizes or another family.
    """
    out, plan_folder = request.directory, local_checkpoint(request.plan)
    require_new_directory(out)
    masks = _read_masks(plan_folder, request.plan)
    checkpoint = Checkpoint(local_checkpoint(request.model))
    _check_fit(checkpoint, masks, plan_folder)
    check_disk(out, checkpoint.stored_bytes)
    plan = Plan.keeping_all("mask", "sparse", {}, checkpoint.shape, masks=masks)
    counts = _count(checkpoint, masks)
    result = Masked(out, **counts)
    origin = read_json(plan_folder / PROVENANCE) if (plan_folder / PROVENANCE).is_file() else None
    with resumable_directory(out, {"mask": str(request.model)}, resume=False) as (fresh, _):
        write_checkpoint(
            fresh,
            cut_config(checkpoint, plan),
            cut_tensors(checkpoint, plan),
            provenance={
                "kind": "masked",
                "plan": read_json(plan_folder / JSON_FILE)["fingerprint"],
                "source": checkpoint.digest,
                **counts,
                **({"origin": origin} if origin else {}),
            },
            card=_card(checkpoint, plan, result, request, plan_folder, pruning_method(origin)),
        )
        _copy_files(checkpoint.directory, plan_folder, fresh)
    return result


def _read_masks(folder: Path, name: Any) -> Mapping[str, Tensor]:
    if not (folder / JSON_FILE).is_file():
        raise UserError(f"`plan`: {name} has no {JSON_FILE}; name the directory that `secateur prune` wrote")
    if not (masks := load_masks(folder)):
        raise UserError(
            f"`plan`: {name} has no masks; only sparse methods make some, and a cut in depth or width holds as it is"
        )
    return masks


def _check_fit(checkpoint: Checkpoint, masks: Mapping[str, Tensor], plan_folder: Path) -> None:
    """Refuse masks that belong to a model of another family, other names or sizes."""
    if (plan_folder / "config.json").is_file():
        shape, pruned = checkpoint.shape, read_config(plan_folder / "config.json")[2]
        alike = dataclasses.replace(pruned, vocabulary=shape.vocabulary, tied=shape.tied)  # masks touch neither
        if alike != shape:
            raise UserError(
                f"`plan`: the masks are of a {pruned.family.name} ({pruned}), but {checkpoint.directory} is a "
                f"{shape.family.name} ({shape}); name the checkpoint that it was made from"
            )
    if mismatch := checkpoint.mask_mismatch(masks):
        name, size, tensor_size = mismatch
        raise UserError(
            f"`plan`: its mask of {name} has size {size}, but in {checkpoint.directory} the tensor is "
            f"{tensor_size or 'missing'}; name the checkpoint that it was made from"
        )


def _count(checkpoint: Checkpoint, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Count what the masks drop, with the share of the norm that the nonzero weights among it hold."""
    masked = weights = zeroed = 0
    squares, dropped_squares = 0.0, 0.0
    with track("count the weights", len(masks)) as progress:
        for name, mask in masks.items():
            weight = checkpoint.tensor(name)
            checkpoint.check_finite(name, weight)
            dropped = weight.masked_fill(mask, 0)
            weights, masked = weights + mask.numel(), masked + int((~mask).count_nonzero())
            zeroed += int(dropped.count_nonzero())
            squares += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
            dropped_squares += float(torch.linalg.vector_norm(dropped, dtype=torch.float64)) ** 2
            progress.advance()
    return {
        "matrices": len(masks),
        "masked": masked,
        "weights": weights,
        "zeroed": zeroed,
        "norm_share": math.sqrt(dropped_squares / squares) if squares else 0.0,
    }


def _card(
    checkpoint: Checkpoint, plan: Plan, result: Masked, request: MaskRequest, plan_folder: Path, method: str | None
) -> str:
    ancestry = Ancestry.read(checkpoint.directory, repository_of(request.model, checkpoint.directory))
    if not ancestry.base_model and not ancestry.metadata:  # a merge writes no card
        ancestry = Ancestry.read(plan_folder, repository_of(request.plan, plan_folder))
    pruned = f" with {method}" if method else ""
    return model_card(
        f"{ancestry.subject(checkpoint.shape)}, pruned{pruned}, changed and masked again",
        ancestry,
        [
            f"The model was pruned{pruned} by secateur and then changed by another tool, for example by a merge of "
            f"adapters. The masks of the pruned checkpoint were applied again: secateur mask {result}.",
            "",
            f"- sparsity: {percent(result.masked / result.weights)} of the weights of {result.matrices} matrices; "
            "zeros are stored as any other weight, so the file is as large as before; `plan.safetensors` holds the "
            "masks",
            f"- shape: {checkpoint.shape}",
            f"- runs in: {describe_runtimes(runtimes_of(checkpoint, plan), sparse=True)}",
        ],
        tags=["pruning", *([method] if method else [])],
        image_text=checkpoint.whole is not None,
    )


def _copy_files(source: Path, plan_folder: Path, out: Path) -> None:
    """Copy the plan and what lies beside the weights; a merge often writes no tokenizer, so the plan's is taken."""
    for name in (JSON_FILE, TENSOR_FILE):
        shutil.copyfile(plan_folder / name, out / name)
    if not vocabulary_files(source) and vocabulary_files(plan_folder):
        notify(f"{source}: has no tokenizer; the output gets that of {plan_folder}")
        copy_companions(plan_folder, out)
    copy_companions(source, out)
