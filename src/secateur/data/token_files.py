"""Token ids from a file: ``tokens:FILE.npy`` is an array [windows, tokens]; no tokenizer is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UserError

__all__ = ["is_token_file", "read_token_file"]

SCHEME = "tokens"


def is_token_file(source: str) -> bool:
    """Whether a source is named ``tokens:...``."""
    return source.partition(":")[0] == SCHEME


def read_token_file(source: str, *, vocabulary: int, positions: int | None) -> NDArray[np.int64]:
    """Read windows of token ids.

    Args:
        source: ``tokens:FILE.npy``.
        vocabulary: of the model; every id must be below it.
        positions: maximal length of a window; None for no limit.

    Returns:
        int64 [windows, tokens], the ids unchanged.

    Raises:
        UserError: if the file is not a two-dimensional integer array with two tokens or more in a window, or an id or
            the length of a window is too large for the model.
    """
    name = source.partition(":")[2]
    path = Path(name).expanduser()
    if not name or not path.is_file():
        raise UserError(f"{source}: no such file; name a .npy file of token ids [windows, tokens]")
    try:
        # Memory-mapped, so that a header that claims too large a shape allocates nothing.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{source}: is not a readable .npy file: {' '.join(str(error).split())}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{source}: is an .npz archive; name a .npy file that holds one array")
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        content = f"{array.dtype} of shape {list(array.shape)}"
        raise UserError(f"{source}: holds {content}, but token ids are whole numbers of shape [windows, tokens]")
    if array.shape[0] < 1 or array.shape[1] < 2:
        raise UserError(f"{source}: has shape {list(array.shape)}; at least one window of two tokens is needed")
    if positions is not None and array.shape[1] > positions:
        raise UserError(f"{source}: windows of {array.shape[1]} tokens, but the model has {positions} positions")
    for extreme in (int(array.min()), int(array.max())):
        if not 0 <= extreme < vocabulary:
            raise UserError(f"{source}: holds the id {extreme}, but the model's ids are 0 to {vocabulary - 1}")
    return np.array(array, dtype=np.int64)
