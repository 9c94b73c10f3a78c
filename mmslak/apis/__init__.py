"""Models from a config and a checkpoint, and what they predict: the Python API.

Importing it is cheap: torch and MMEngine are imported with the function that is asked for.
"""

import importlib

_MODULES = {'get_backbone': 'backbones', 'inference_model': 'inference', 'init_model': 'model'}
__all__ = ['get_backbone', 'inference_model', 'init_model']


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
