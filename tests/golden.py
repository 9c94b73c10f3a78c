"""Outputs of the reference implementation, from ../shared/golden or our copy of it."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared' / 'golden'
GOLDEN = SHARED if SHARED.is_dir() else ROOT / 'tests' / 'data' / 'golden'
SLAK_FILES = ('slak_decomposed', 'slak_decomposed_sparse40', 'slak_square7')


def slak_options(name: str) -> dict:
    """Our constructor's arguments for the reference's model of that name."""
    arch = json.loads((GOLDEN / f'{name}_arch.json').read_text())
    *kernel_sizes, small_kernel = arch['kernel_size']
    return dict(
        arch=dict(depths=arch['depths'], dims=arch['dims']),
        kernel_sizes=kernel_sizes,
        small_kernel=small_kernel if small_kernel < min(kernel_sizes) else None,
        decomposed=arch['Decom'],
        width_factor=arch['width_factor'],
        layer_scale_init_value=arch['layer_scale_init_value'],
    )


def slak_expected(name: str) -> dict[str, np.ndarray]:
    """The reference's input, stage outputs and logits."""
    with np.load(GOLDEN / f'{name}_expected.npz') as arrays:
        return dict(arrays)
