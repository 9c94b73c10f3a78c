"""Merges settings of the command line into a config, and checks that something reads each."""

import copy
import difflib
import inspect
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
from torch.utils.data import DataLoader

from mmslak.apis.config import LOADERS, accepted_arguments, check_scope, read_config, resolve, walk
from mmslak.errors import UserError, own_errors_only

# Keys beside a `type` that MMEngine itself reads; they are in no signature.
READ_BY_MMENGINE = {
    *('_delete_', '_scope_', 'type', 'priority', 'requires_grad', 'convert_to_iter_based'),
    *('constructor', 'paramwise_cfg', 'num_batch_per_epoch', 'disable_subprocess_warning'),
}
# Top-level keys that MMEngine and the tools read from the whole config, beside Runner's arguments.
READ_FROM_CONFIG = {
    *('activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval'),
    *('find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model'),
    'tta_pipeline',
}
RUN_LENGTHS = {'train_cfg.max_iters', 'train_cfg.max_epochs'}


def read_with_options(config: str | Path | Config, options: dict | None = None) -> Config:
    """Reads a config, merges options into it, and checks that its library is installed.

    Args:
        config: A file, `mmslak::NAME`, or a config, of which a copy is returned.
        options: Settings to override.

    Raises:
        UserError: If the file is missing or broken, or an option does not fit it.
    """
    cfg = copy.deepcopy(config) if isinstance(config, Config) else read_config(str(config))
    check_scope(cfg)
    apply_options(cfg, options or {})
    return cfg


def apply_options(cfg: Config, options: dict) -> None:
    """Merges `--cfg-options` into a config, in place.

    A key must be in the config, or be an argument of the class that the dict's `type` names, or of
    Runner. A string variable at the top of a config file (`data_root`, `checkpoint`) is replaced
    wherever its value was used, because the file is evaluated before options are merged: to change
    the variable alone would have no effect.

    Raises:
        UserError: On a key that nothing would read, with the nearest one that something does.
    """
    dotted = {}
    for key, value in options.items():
        name, _, rest = key.partition('.')
        if name not in cfg or not is_variable(cfg, name):
            dotted[key] = value
        elif isinstance(cfg[name], str) and isinstance(value, str) and not rest:
            _replace_string(cfg, cfg[name], value)
            cfg[name] = value
        else:
            # The value can have been changed since, so that places of the same name count too.
            places = [p for p, v in walk(cfg) if p.endswith(f'.{name}') or _equal(v, cfg[name])]
            places = [p for p in places if p != name]
            if places:
                use = ', '.join('.'.join(filter(None, [p, rest])) for p in places[:3])
                short = '; for a short run type mmslak train CONFIG --iterations 20'
                raise UserError(
                    f'--cfg-options {key}: {name} is a variable of the config file, '
                    f'used before options are merged; set where it went: {use}'
                    + (short if RUN_LENGTHS & set(places) else '')
                )
            dotted[key] = value
    for key in dotted:
        _check_key(cfg, key)
    cfg.merge_from_dict(dotted)


def _equal(value: object, variable: object) -> bool:
    """Whether a value equals a variable, of which only one may have the scope of its base."""
    if isinstance(value, dict) and isinstance(variable, dict):
        value, variable = (
            {k: v for k, v in d.items() if k != '_scope_'} for d in (value, variable)
        )
    return type(value) is type(variable) and value == variable


def is_variable(cfg: Config, name: str) -> bool:
    if name == 'data_preprocessor':  # Runner's is a default: the model's own goes first
        return 'data_preprocessor' in cfg.get('model', {})
    return name not in _runner_fields()


def _runner_fields() -> set[str]:
    return set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'} | READ_FROM_CONFIG


def _replace_string(node: dict | list, old: str, new: str) -> None:
    """Replaces `old`, also at the start of a path, in every string below `node`, in place."""
    for key in range(len(node)) if isinstance(node, list) else list(node):
        value = node[key]
        if isinstance(value, str) and value == old:
            node[key] = new
        elif isinstance(value, str) and value.startswith(old.rstrip('/') + '/'):
            node[key] = new.rstrip('/') + value[len(old.rstrip('/')) :]
        elif isinstance(value, (dict, list)):
            _replace_string(value, old, new)


@own_errors_only
def _check_key(cfg: Config, key: str) -> None:
    node, path = cfg, ''
    for part in key.split('.'):
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f'--cfg-options {key}: {path} is a list of {len(node)} '
                    f'and is followed by an index from 0 to {len(node) - 1}, not by {part!r}'
                )
            part = int(part)
        elif not isinstance(node, (dict, Config)):
            raise UserError(f'--cfg-options {key}: {path} is {node!r}, which has no keys below it')
        elif part not in node:
            _check_new_key(cfg, node, path, part, key)
        new = {}  # what is below a new key is checked as far as its place tells what it takes
        node = node[part] if isinstance(part, int) else node.get(part, new)
        path = f'{path}.{part}'.lstrip('.')


def _check_new_key(cfg: Config, node: dict, path: str, part: str, key: str) -> None:
    takes = _known_keys(cfg, node, path)
    if takes is None:
        # A dict of free keys, say model.test_cfg: only what looks like a slip is refused.
        if not difflib.get_close_matches(part, list(node), n=1, cutoff=0.85):
            return
        takes = set()
    if part in takes:
        return
    candidates = {p for p, _ in walk(cfg)} | {f'{path}.{name}'.lstrip('.') for name in takes}
    nearest = difflib.get_close_matches(key, sorted(candidates), n=1, cutoff=0)
    raise UserError(f'--cfg-options {key}: no such key in the config; the nearest is {nearest[0]}')


def _known_keys(cfg: Config, node: dict, path: str) -> set[str] | None:
    """Keys that a dict of the config can have; None if it can have any."""
    loops = {'val_cfg': ValLoop, 'test_cfg': TestLoop}
    if not path:
        return _runner_fields()
    if path in LOADERS:
        return accepted_arguments(DataLoader) | READ_BY_MMENGINE
    if path == 'randomness':
        return accepted_arguments(Runner.set_randomness)
    if path == 'auto_scale_lr':
        return {'enable', 'base_batch_size'}
    if path == 'train_cfg' and 'type' not in node:
        loop = EpochBasedTrainLoop if node.get('by_epoch') else IterBasedTrainLoop
        return accepted_arguments(loop) | {'type', 'by_epoch'}
    found = loops[path] if path in loops and 'type' not in node else resolve(node, cfg)
    names = accepted_arguments(found) if found is not None else None
    return names if names is None else names | READ_BY_MMENGINE
