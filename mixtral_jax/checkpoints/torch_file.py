"""Files that torch saved (.pth, .pt), read an array at a time through torch itself, which runs no code of theirs."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mixtral_jax.checkpoints.archive import FLOATS, WHOLE, Entry, Part, first_line, rows_of, size_of
from mixtral_jax.errors import InputError

_CODES = {dtype.name: code for code, dtype in FLOATS.items()}
"""By torch's names of them, which are numpy's."""
_MADV_DONTNEED = 4


class TorchFile:
    """One file.

    Raises:
      InputError: torch is not installed, or the file is not a table of tensors, or wants to run code.
    """

    def __init__(self, path: Path):
        self._tensors = _load(path)
        self.entries: dict[str, Entry] = {}
        for name, tensor in self._tensors.items():
            if str(tensor.layout) != "torch.strided":
                raise InputError(str(path), None, f"tensor {name} has layout {tensor.layout}; plain ones can be read")
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _CODES:
                raise InputError(str(path), None, f"tensor {name} has dtype {dtype}; {', '.join(_CODES)} can be read")
            self.entries[name] = Entry(tuple(tensor.shape), _CODES[dtype], path)

    def read(self, name: str, part: Part = WHOLE) -> np.ndarray:
        """See Archive.read."""
        entry = self.entries[name]
        first, last, columns = rows_of(entry.shape, part)
        tensor = self._tensors[name].detach().contiguous().reshape(-1)[first * columns : last * columns]
        array = np.array(_as_numpy(tensor))
        _release(tensor)
        return array.reshape(-1, columns) if len(entry.shape) > 1 else array


def _load(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise InputError(str(path), None, "reading it needs torch: pip install 'mixtral-jax[torch]'") from None
    size_of(path)
    import pickle

    try:
        # Mapped: only what is read takes memory. weights_only: a pickle that would run code is refused.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        refused = f"refused: it holds more than tensors, and might run code ({first_line(error)})"
        raise InputError(str(path), None, refused) from None
    except Exception as error:  # a damaged pickle can raise anything
        damaged = f"not a whole torch file of the kind since version 1.6 ({first_line(error)})"
        raise InputError(str(path), None, damaged) from None
    tables = isinstance(loaded, dict)
    wrong = [name for name, each in loaded.items() if not isinstance(each, torch.Tensor)] if tables else ["the whole"]
    if wrong:
        raise InputError(str(path), None, f"a table of tensors is wanted; {wrong[0]} is none")
    return loaded


def _as_numpy(tensor: Any) -> np.ndarray:
    """The tensor's own memory; numpy has no bfloat16 that torch knows."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _release(tensor: Any) -> None:
    """Lets go of the pages of a mapped file that a tensor's reading brought in; they can be read again."""
    if sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)
