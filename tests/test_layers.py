"""Imports run one way (design: ops ← models, sparsity ← engine, registry ← models and engine)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / 'mmslak'
# What a part of the package may import from the rest of it.
ALLOWED = {
    'ops': set(),
    'sparsity': set(),
    'registry': set(),
    'safe_load': set(),
    'checkpoint': {'safe_load'},
    'safe_loaders': {'checkpoint', 'download', 'safe_load'},
    'atomic': {'checkpoint'},
    'datasets': set(),
    'models': {'ops', 'registry', 'checkpoint', 'safe_loaders'},
    'engine': {'sparsity', 'registry', 'checkpoint', 'atomic', 'datasets'},
    'analysis': set(),
}
PURE_TORCH = ('ops', 'sparsity', 'analysis')
MM_LIBRARIES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
TASK_LIBRARIES = {'mmdet', 'mmseg', 'mmpretrain'}
MODULES = sorted(ROOT.rglob('*.py'))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of what a module imports."""
    package = path.relative_to(ROOT.parent).with_suffix('').parts[:-1]
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*base, *([node.module] if node.module else [])])
            names |= {f'{module}.{alias.name}' for alias in node.names}
    return names


def test_the_walk_finds_imports():
    found = imports(ROOT / 'models' / 'slak.py')
    assert 'mmslak.registry.MODELS' in found
    assert 'mmslak.models.large_kernel.LargeKernelConv2d' in found


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix('.py')
    found = imports(path)
    if part in ALLOWED:
        used = {name.split('.')[1] for name in found if name.startswith('mmslak.')}
        assert used - {part} <= ALLOWED[part]
    if part in PURE_TORCH:
        assert not {name.split('.')[0] for name in found} & MM_LIBRARIES
    at_import = {name.split('.')[0] for name in imports(path, top_level_only=True)}
    assert not at_import & TASK_LIBRARIES, 'task libraries are imported lazily'
