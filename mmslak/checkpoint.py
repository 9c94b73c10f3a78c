"""Checkpoints: any known file in, clean files out, nothing half-loaded and no code run."""

import logging
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import safe_load

# Names inside LargeKernelConv2d in the official code, and ours.
OFFICIAL_BRANCHES = {
    'LoRA1': 'vertical',
    'LoRA2': 'horizontal',
    'small_conv': 'small',
    'lkb_origin': 'square',
}
EXPECTED = (
    'expected an official SLaK file, a checkpoint of an MMEngine run, or a file that '
    'tools/convert_checkpoint.py wrote'
)
# What reading a damaged file can raise.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError),
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(MemoryError, AssertionError),
)


MARKER = 'last_checkpoint'  # in the work folder; names the newest checkpoint
LONGEST_NAME = 255  # to be put into a message
INTERRUPTED = 'interrupted.pth'  # of a run that was told to stop


class CheckpointError(ValueError):
    """A file that cannot be used; the message names the file and what was expected."""


def is_pretrained(cfg: object) -> bool:
    """Whether a part of a config is an init_cfg that loads a file, by whatever name MMEngine has
    for it."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    return kind is PretrainedInit or str(kind).rpartition('.')[2] == 'Pretrained'


def load_pretrained(
    module: nn.Module,
    path: str | Path,
    prefix: str | None = None,
    map_location: object = None,
    use_ema: bool = False,
) -> None:
    """Loads a backbone's weights from any of the known files and says what was matched.

    Every tensor of the backbone must be in the file with its shape, but for the norms of the
    outputs (`norm{i}`), which a classifier lacks; the file may hold more only outside the
    backbone's stages (its head and final norm), and stages that `out_indices` leaves out.

    Args:
        module: The backbone.
        path: A .pth or .safetensors file.
        prefix: What stands before the backbone's names in the file, with a dot at its end or
            without, as MMEngine takes it. None takes 'backbone.' off if the file has such names.
        map_location: MMEngine's argument, without effect: the file is read on the CPU, and its
            tensors are copied to where the backbone is.
        use_ema: Take the averaged weights, see `read_state_dict`.

    Raises:
        CheckpointError: If the file is missing, damaged, no checkpoint or one of another
            architecture, or has no names with that prefix.
    """
    state = read_state_dict(path, use_ema)
    start = 'backbone.' if prefix is None else prefix.removeprefix('module.')
    start += '.' if start and not start.endswith('.') else ''
    inside = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    if prefix is not None and not inside:
        raise CheckpointError(
            f'{path}: no tensor of the file has the prefix {prefix!r} of init_cfg '
            f'(the file has {_some(state)})'
        )
    state = inside or state
    rename_for(module, state)

    own = module.state_dict()
    matched = [name for name in own if name in state]
    wrong = [name for name in matched if own[name].shape != state[name].shape]
    new = [name for name in own if name not in state]
    left = [name for name in state if name not in own]
    missing = [
        n for n in new if not re.match(r'norm\d+\.', n) and not n.endswith('.num_batches_tracked')
    ]
    is_absent = getattr(module, 'is_absent', lambda name: False)
    surplus = [n for n in left if re.match(r'(stages|downsample_layers)\.', n) and not is_absent(n)]
    if not any(own[name].dim() > 1 for name in matched):
        raise CheckpointError(
            f'{path}: no tensor of the file belongs to {type(module).__name__} '
            f'(the file has {_some(state)}; {_some(own)} wanted); {EXPECTED}'
        )
    problems = []
    if wrong:
        shapes = [f'{n} is {_shape(state[n])}, not {_shape(own[n])}' for n in wrong]
        problems.append(f'{len(wrong)} of another shape ({_some(shapes)})')
    if missing:
        problems.append(f'{len(missing)} missing in the file ({_some(missing)})')
    if surplus:
        problems.append(f'{len(surplus)} that the model lacks ({_some(surplus)})')
    if problems:
        raise CheckpointError(
            f'{path}: the weights are of another architecture than the {type(module).__name__} of '
            f'the config: {"; ".join(problems)}. Compare arch, kernel_sizes, small_kernel, '
            'decomposed and width_factor.'
        )
    module.load_state_dict({name: state[name] for name in matched}, strict=False)
    print_log(
        f'{path}: {len(matched)} of {len(own)} tensors of {type(module).__name__} matched; '
        f'new: {_some(new)}; left in the file: {_some(left)}',
        logger='current',
    )


def read_state_dict(path: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU, with wrappers' `module.` taken off.

    Args:
        path: A .pth or .safetensors file: {'state_dict': …} of MMEngine, {'model': …} of the
            official code, or the tensors alone.
        use_ema: Take the averaged weights: those of the official code are in 'model_ema'; runs of
            MMEngine with EMAHook have them in 'state_dict', where they are taken from in any case,
            and the live ones in 'ema_state_dict'; runs of mmcv 0.x and 1.x have both in one.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint, or has no averages.
    """
    content = read_checkpoint(path)
    if use_ema:
        tensors = _averaged(content)
        if tensors is None:
            raise CheckpointError(
                f'{path}: no averaged weights in it (keys: {_some(content)}); expected model_ema '
                'of the official code or ema_state_dict of a run with EMAHook; leave out use_ema '
                'to take the weights that it has'
            )
    else:
        inner = (content.get(key) for key in ('state_dict', 'model'))
        tensors = _tensors(next((state for state in inner if isinstance(state, dict)), content))
    if not tensors:
        raise CheckpointError(f'{path}: not a checkpoint (keys: {_some(content)}); {EXPECTED}')
    return tensors


def _tensors(state: dict) -> dict[str, Tensor]:
    return {k.removeprefix('module.'): v for k, v in state.items() if isinstance(v, Tensor)}


def _averaged(content: dict) -> dict[str, Tensor] | None:
    """The averaged weights of a checkpoint; None if it has none."""
    if isinstance(content.get('model_ema'), dict):
        return _tensors(content['model_ema'])
    state = content.get('state_dict', content)
    state = _tensors(state) if isinstance(state, dict) else {}
    if 'ema_state_dict' in content:
        return state  # EMAHook exchanges the two when it saves

    # mmcv 0.x and 1.x have for the weight a.b a buffer ema_a_b beside it. Their EMAHook exchanges
    # the two for what EpochBasedRunner saves, and never with IterBasedRunner.
    beside = {name: f'ema_{name.replace(".", "_")}' for name in state}
    beside = {name: other for name, other in beside.items() if other in state}
    if not beside:
        return None
    meta = content.get('meta')
    if isinstance(meta, dict) and 'IterBasedRunner' in str(meta.get('config')):
        state |= {name: state[other] for name, other in beside.items()}
    return {name: tensor for name, tensor in state.items() if name not in beside.values()}


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint file, read without running any code from it.

    Raises:
        CheckpointError: If the file is missing, damaged, no checkpoint, or asks for code to be run.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path's own raises on names that are too long
        raise CheckpointError(f'{path}: no such checkpoint file')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path}: the file is empty; {EXPECTED}')
    try:
        content = load_file(path) if path.suffix == '.safetensors' else safe_load.load(path)
    except safe_load.RefusedError as error:
        raise CheckpointError(f'{path}: refused, because {error}') from error
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f'{path}: holds a {type(content).__name__}, not a dict; {EXPECTED}')
    return content


def warn_of_refused(content: dict) -> None:
    """Says what of a checkpoint that is to be saved `read_checkpoint`, and `--resume`, will refuse.

    Args:
        content: The checkpoint.
    """
    refused = list(_refused(content))
    if refused:
        print_log(
            f'Checkpoints of this run cannot be resumed from, because of {_some(refused)}: '
            'keep plain values, lists, dicts, tensors or arrays of numbers there',
            logger='current',
            level=logging.WARNING,
        )


def _refused(content: object, *place: str) -> Iterator[str]:
    """Places and reasons, down to entries of the message hub's dicts."""
    try:
        safe_load.check(content)
    except UNREADABLE as error:
        entries = content.items() if isinstance(content, dict) and len(place) < 4 else ()
        inner = [text for key, value in entries for text in _refused(value, *place, str(key))]
        yield from inner or [f'{".".join(place)} ({error})']


def newest_intact(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in a work folder that can be resumed from.

    That is the one that `last_checkpoint` names, unless newer ones were written since; where it is
    damaged, the next older one. All bytes of the one that is returned were read and verified.

    Returns:
        The file, None if the folder has no checkpoints; and why newer ones were passed over.

    Raises:
        CheckpointError: If there are checkpoints and all are damaged.
    """
    folder = Path(folder)
    passed_over = []
    for path in _newest_first(folder):
        if path == folder / MARKER:
            passed_over.append(f'{path}: names no file')
            continue
        try:
            content = read_checkpoint(path)
            if not {'meta', 'state_dict', 'message_hub'} <= content.keys():
                raise CheckpointError(f'{path}: not a checkpoint of a run to resume')
            return path, passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(f'no intact checkpoint in {folder}: ' + '; '.join(passed_over))
    return None, []


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints of a run, those written last first."""
    marker, named, moved = folder / MARKER, None, -1
    if marker.is_file():
        named, moved = _named_by(marker), marker.stat().st_mtime_ns
    files = [
        path
        for path in folder.glob('*.pth')
        if re.search(r'\d\.pth$|^interrupted\.pth$', path.name)
        and not re.search(r'^(best|non_finite)_|-[0-9a-f]{8}\.pth$', path.name)
        and path != named
    ]
    files.sort(key=lambda path: (path.stat().st_mtime_ns, len(path.name), path.name), reverse=True)
    if named is None:
        return files
    newer = [path for path in files if path.stat().st_mtime_ns > moved]
    if newer:  # written, but not yet named; or merely copied later
        last = _iteration(named)
        newer = [path for path in newer if (_iteration(path) or last + 1) > last]
    return [*newer, named, *(path for path in files if path not in newer)]


def _named_by(marker: Path) -> Path:
    """The checkpoint that a marker names; the marker itself if what it has is no name of a file.

    The folder may have been moved or copied since: one of that name beside the marker is meant.
    """
    text = marker.read_text(errors='replace').strip()
    for path in (marker.parent / Path(text).name, Path(text)):
        if os.path.isfile(path):
            return path
    return Path(text) if text.isprintable() and 0 < len(text) <= LONGEST_NAME else marker


def _iteration(path: Path) -> int:
    """Iterations that a checkpoint says to have done; 0 if it cannot be read."""
    try:
        return int(safe_load.load(path, tensors=False)['meta']['iter'])
    except UNREADABLE:
        return 0


def rename_official(
    state: dict[str, Tensor], prefix: str = '', final_norm: int | None = None
) -> None:
    """Gives the official names of SLaK's tensors ours, in place.

    Args:
        state: Tensors by name.
        prefix: What stands before the backbone's names.
        final_norm: Stage whose output norm takes the classifier's final norm (`norm.`); None leaves
            that alone.
    """
    branch = re.compile(re.escape(prefix) + r'stages\.\d+\.\d+\.large_kernel\.(\w+)\.')
    for name in list(state):
        new = name
        match = branch.match(name)
        if match and match[1] in OFFICIAL_BRANCHES:
            new = name[: match.start(1)] + OFFICIAL_BRANCHES[match[1]] + name[match.end(1) :]
        elif final_norm is not None and name.startswith(f'{prefix}norm.'):
            new = f'{prefix}norm{final_norm}.' + name[len(prefix) + len('norm.') :]
        if new != name:
            state[new] = state.pop(name)


def rename_for(module: nn.Module, state: dict[str, Tensor], prefix: str = '') -> None:
    """Gives official names those of a backbone, in place.

    The norm of the arch's last stage takes the classifier's final norm, if the backbone pools
    before it.

    Args:
        module: The backbone.
        state: Tensors by name.
        prefix: What stands before the backbone's names.
    """
    last = len(getattr(module, 'depths', ())) - 1
    has_final_norm = getattr(module, 'gap_before_final_norm', False) and last in module.out_indices
    rename_official(state, prefix, last if has_final_norm else None)


def convert(path: str | Path, use_ema: bool = False) -> 'OrderedDict[str, Tensor]':
    """Tensors of any known SLaK file under the clean names: `backbone.…`, and `head.fc.…` for a
    classifier.

    The classifier's final norm stays `backbone.norm`, apart from the norms that a dense predictor
    gives each stage. UperNet's and Cascade Mask R-CNN's heads have the same names in mmseg 0.x and
    1.x, and in mmdet 2.x and 3.x.

    Raises:
        CheckpointError: See `read_state_dict`; also if the file holds no SLaK.
    """
    state = read_state_dict(path, use_ema)
    if not any(re.match(r'(backbone\.)?stages\.\d+\.\d+\.large_kernel\.', name) for name in state):
        raise CheckpointError(f'{path}: no SLaK in it (it has {_some(state)}); {EXPECTED}')
    clean = OrderedDict()
    whole_model = any(name.startswith('backbone.') for name in state)
    for name, tensor in state.items():
        if whole_model and name.startswith('ema_'):
            continue  # of mmcv's EMAHook, which keeps a second copy of every weight
        if not whole_model:
            head = re.sub(r'^head\.(?=weight|bias)', 'head.fc.', name)
            name = head if name.startswith('head.') else f'backbone.{name}'
        clean[name] = tensor.detach().clone().contiguous()
    rename_official(clean, 'backbone.')
    return clean


def publish(path: str | Path, use_ema: bool = False) -> 'OrderedDict[str, Tensor]':
    """Weights of a finished run for others: no optimizer, no masks, no logs; names and zeros kept.

    A run with EMAHook keeps its averaged weights as the ones to use already.

    Raises:
        CheckpointError: See `read_state_dict`.
    """
    state = read_state_dict(path, use_ema)
    return OrderedDict((k, v.detach().clone().contiguous()) for k, v in state.items())


def save_state_dict(state: dict[str, Tensor], path: str | Path) -> None:
    """Writes tensors alone: {'state_dict': …} as .pth, or the tensors as .safetensors.

    Raises:
        ValueError: On another suffix.
    """
    path = Path(path)
    if path.suffix not in ('.pth', '.safetensors'):
        raise ValueError(f'{path}: expected a name that ends in .pth or .safetensors')
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.safetensors':
        save_file(dict(state), path)
    else:
        torch.save({'state_dict': OrderedDict(state)}, path)


def count_parameters(state: dict[str, Tensor]) -> tuple[int, int]:
    """(all, non-zero) weights of a state dict; statistics of batch norms do not count."""
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    weights = [v for k, v in state.items() if not k.endswith(statistics)]
    return sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f'{path}: truncated, damaged or not a checkpoint ({reason[:200]}); {EXPECTED}'
    )


def _shape(tensor: Tensor) -> str:
    return '×'.join(map(str, tensor.shape)) or 'a number'


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    rest = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(map(str, names[:most])) + rest) or 'nothing'
