"""Checkpoint files: read without running code, written clean."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmslak.checkpoints import torch_file
from mmslak.checkpoints.unpickle import RefusedError
from mmslak.errors import CheckpointError, UserError, first_few, reason
from mmslak.fileio.absent import absent_checkpoint
from mmslak.fileio.atomic import write_atomically

EXPECTED = (
    'expected an official SLaK file, a checkpoint of an MMEngine run, or a file that '
    'mmslak convert-checkpoint wrote'
)
# What reading a damaged file can raise.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError),
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(MemoryError, AssertionError),
)
_kept: dict[tuple, dict] = {}  # the content of one file at most, by the file's path and state


def read_state_dict(path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint by name, on the CPU, without the `module.` of wrappers.

    Args:
        path: A .pth or .safetensors file: {'state_dict': …} of MMEngine, {'model': …} of the
            official code, or the tensors alone.
        use_ema: Take the averaged weights. The official code has them in 'model_ema'. Runs of
            MMEngine with EMAHook have them in 'state_dict', and the live weights in
            'ema_state_dict'; the averages are taken with or without `use_ema`. Runs of mmcv 0.x and
            1.x have both in 'state_dict'.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint, or has no averages.
    """
    content = read_checkpoint(path)
    if use_ema:
        tensors = _averaged(content)
        if tensors is None:
            raise CheckpointError(
                f'{path}: no averaged weights in it (keys: {first_few(content)}); expected '
                'model_ema of the official code or ema_state_dict of a run with EMAHook; leave '
                'use_ema out to load the weights that it has'
            )
    else:
        inner = (content.get(key) for key in ('state_dict', 'model'))
        tensors = _tensors(next((state for state in inner if isinstance(state, dict)), content))
    if not tensors:
        raise CheckpointError(f'{path}: not a checkpoint (keys: {first_few(content)}); {EXPECTED}')
    return tensors


def _tensors(state: dict) -> dict[str, Tensor]:
    return {k.removeprefix('module.'): v for k, v in state.items() if isinstance(v, Tensor)}


def _averaged(content: dict) -> dict[str, Tensor] | None:
    """Gives the averaged weights of a checkpoint, or None."""
    if isinstance(content.get('model_ema'), dict):
        return _tensors(content['model_ema'])
    state = content.get('state_dict', content)
    state = _tensors(state) if isinstance(state, dict) else {}
    if 'ema_state_dict' in content:
        return state  # EMAHook exchanges the two when it saves

    # mmcv 0.x and 1.x keep the average of the weight a.b in a buffer ema_a_b. Their EMAHook
    # exchanges the two before EpochBasedRunner saves, but not before IterBasedRunner does.
    beside = {name: f'ema_{name.replace(".", "_")}' for name in state}
    beside = {name: other for name, other in beside.items() if other in state}
    if not beside:
        return None
    meta = content.get('meta')
    if isinstance(meta, dict) and 'IterBasedRunner' in str(meta.get('config')):
        state |= {name: state[other] for name, other in beside.items()}
    return {name: tensor for name, tensor in state.items() if name not in beside.values()}


def read_checkpoint(path: str | Path, keep: bool = False) -> dict:
    """Reads a checkpoint file without running any code of it. All its bytes are verified.

    Args:
        path: A .pth or .safetensors file.
        keep: Keep the content in memory for later calls, until `take_checkpoint` gives it away or
            another file is kept. A file that has changed since is read anew.

    Returns:
        The content. Do not change a content that is kept.

    Raises:
        CheckpointError: If the file is missing, damaged, no checkpoint, or asks for code to be run.
    """
    path = Path(path)
    fault = absent_checkpoint(path)
    if fault:
        raise CheckpointError(fault)
    version = _version(path)
    if version in _kept:
        return _kept[version]
    if keep:
        _kept.clear()  # before the next content needs memory
    content = _read(path)
    if keep:
        _kept[version] = content
    return content


def take_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint file, or takes over the content that `read_checkpoint` kept of it.

    Raises:
        CheckpointError: See `read_checkpoint`.
    """
    content = read_checkpoint(path)
    _kept.pop(_version(Path(path)), None)
    return content


def forget_checkpoint() -> None:
    """Frees the content that `read_checkpoint` kept."""
    _kept.clear()


def _version(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path.absolute(), status.st_mtime_ns, status.st_size


def _read(path: Path) -> dict:
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path}: the file is empty; {EXPECTED}')
    try:
        content = load_file(path) if path.suffix == '.safetensors' else torch_file.load(path)
    except RefusedError as error:
        raise CheckpointError(f'{path}: refused, because {reason(error)[:300]}') from error
    except UNREADABLE as error:
        raise CheckpointError(
            f'{path}: truncated, damaged or not a checkpoint ({reason(error)[:200]}); {EXPECTED}'
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path}: holds a {type(content).__name__}, not a dict; {EXPECTED}')
    return content


def publish(path: str | Path, use_ema: bool = False) -> 'OrderedDict[str, Tensor]':
    """Reads the weights of a finished run to publish them: no optimizer, no masks, no logs.

    Names and zeros stay as they are. Of a run with EMAHook these are the averaged weights.

    Raises:
        CheckpointError: See `read_state_dict`.
    """
    state = read_state_dict(path, use_ema)
    return OrderedDict((k, v.detach().clone().contiguous()) for k, v in state.items())


def save_state_dict(state: dict[str, Tensor], path: str | Path) -> None:
    """Writes tensors alone: {'state_dict': …} as .pth, or the tensors as .safetensors.

    Raises:
        UserError: On another suffix, or if the file cannot be written. An older file of this name
            is unchanged then.
    """
    path = Path(path)
    if path.suffix not in ('.pth', '.safetensors'):
        raise UserError(f'{path}: expected a name that ends in .pth or .safetensors')
    if path.suffix == '.safetensors':
        content = save(dict(state))
    else:
        file = io.BytesIO()
        torch.save({'state_dict': OrderedDict(state)}, file)
        content = file.getbuffer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror or error}') from error


def count_parameters(state: dict[str, Tensor]) -> tuple[int, int]:
    """Counts (all, non-zero) weights of a state dict, without the statistics of batch norms."""
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    weights = [v for k, v in state.items() if not k.endswith(statistics)]
    return sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)
