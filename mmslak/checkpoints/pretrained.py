"""Weights from any known file into a backbone: all of them, or one clear error."""

import re
from collections.abc import Mapping
from pathlib import Path

from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit
from torch import Tensor, nn

from mmslak.checkpoints.files import EXPECTED, read_state_dict
from mmslak.checkpoints.names import rename_for
from mmslak.errors import CheckpointError, first_few


def is_pretrained(cfg: object) -> bool:
    """Whether a part of a config is an init_cfg that loads a file, under any of its names."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    return kind is PretrainedInit or str(kind).rpartition('.')[2] == 'Pretrained'


def load_pretrained(
    module: nn.Module,
    path: str | Path,
    prefix: str | None = None,
    map_location: object = None,
    use_ema: bool = False,
) -> None:
    """Loads a backbone's weights from any known file, and logs which tensors matched.

    Every tensor of the backbone must be in the file, with its shape. The norms of the outputs
    (`norm{i}`) may be absent, since a classifier has none. The file may have more tensors only
    outside the backbone's stages (a head, a final norm) or in stages that `out_indices` leaves out.

    Args:
        module: The backbone.
        path: A .pth or .safetensors file.
        prefix: Prefix of the backbone's names in the file, with or without a dot at its end. None
            means 'backbone.' if the file has such names.
        map_location: MMEngine's argument. It has no effect: the file is read to the CPU, and its
            tensors are copied to the backbone's device.
        use_ema: Take the averaged weights, see `read_state_dict`.

    Raises:
        CheckpointError: If the file is missing, damaged or no checkpoint, is of another
            architecture, or has no names with the prefix.
    """
    state = read_state_dict(path, use_ema)
    start = 'backbone.' if prefix is None else prefix.removeprefix('module.')
    start += '.' if start and not start.endswith('.') else ''
    inside = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    if prefix is not None and not inside:
        raise CheckpointError(
            f'{path}: no tensor of the file has the prefix {prefix!r} of init_cfg '
            f'(the file has {first_few(state)})'
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
            f'(the file has {first_few(state)}; {first_few(own)} wanted); {EXPECTED}'
        )
    hint = None if missing or surplus else hidden_channels_hint(state, own)
    if hint:
        raise CheckpointError(f'{path}: {hint}')
    problems = []
    if wrong:
        shapes = [f'{n} is {_shape(state[n])}, not {_shape(own[n])}' for n in wrong]
        problems.append(f'{len(wrong)} of another shape ({first_few(shapes)})')
    if missing:
        problems.append(f'{len(missing)} missing in the file ({first_few(missing)})')
    if surplus:
        problems.append(f'{len(surplus)} that the model lacks ({first_few(surplus)})')
    if problems:
        raise CheckpointError(
            f'{path}: the weights are of another architecture than the {type(module).__name__} of '
            f'the config: {"; ".join(problems)}. Compare arch, kernel_sizes, small_kernel, '
            'decomposed, width_factor and hidden_channels.'
        )
    module.load_state_dict({name: state[name] for name in matched}, strict=False)
    print_log(
        f'{path}: {len(matched)} of {len(own)} tensors of {type(module).__name__} matched; '
        f'new: {first_few(new)}; left in the file: {first_few(left)}',
        logger='current',
    )


def hidden_channels_of(state: Mapping[str, Tensor], prefix: str = '') -> list[list[int]] | None:
    """Reads `hidden_channels` of a large-kernel backbone from its tensors.

    Args:
        state: Tensors by name.
        prefix: Prefix of the backbone's names.

    Returns:
        Hidden units of each block of each stage; None if all have 4 × channels, the default.
    """
    name = re.compile(re.escape(prefix) + r'stages\.(\d+)\.(\d+)\.pwconv1\.weight')
    found = {(int(m[1]), int(m[2])): state[m[0]].shape for m in map(name.fullmatch, state) if m}
    if all(hidden == 4 * channels for hidden, channels in found.values()):
        return None
    stages: list[list[int]] = []
    for (stage, _), (hidden, _) in sorted(found.items()):
        stages += [[] for _ in range(len(stages), stage + 1)]
        stages[stage].append(hidden)
    return stages


def hidden_channels_hint(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str = ''
) -> str | None:
    """Says what to set if only hidden units of a backbone make the shapes differ; None otherwise.

    Args:
        state: Tensors of the file by name; none of the model's is missing.
        own: Those of the model.
        prefix: Prefix of the backbone's names.
    """
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    mlp = re.compile(
        f'({re.escape(prefix)}stages[.].*)[.](pwconv1[.](weight|bias)|pwconv2[.]weight)'
    )
    blocks = {match and match[1] for match in map(mlp.fullmatch, wrong)}
    if not blocks or None in blocks:
        return None
    for block in blocks:
        first, bias = (state[f'{block}.pwconv1.{kind}'].shape for kind in ('weight', 'bias'))
        second = state[f'{block}.pwconv2.weight'].shape
        if not (len(first) == len(second) == 2 and first[:1] == bias == second[1:]):
            return None
    widths = hidden_channels_of(state, prefix)
    change = f'set hidden_channels={widths}' if widths else 'leave out hidden_channels'
    return f'its hidden units are not those of the config: {change} in the backbone'


def _shape(tensor: Tensor) -> str:
    return '×'.join(map(str, tensor.shape)) or 'a number'
