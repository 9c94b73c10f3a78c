"""Imports run one way between the rooms of the package, as `LAYERS` lists them."""

import ast
from pathlib import Path

import pytest

from tests.golden import ROOT

PACKAGE = ROOT / 'mmslak'
# Rooms, lowest first; those of one row do not import each other, but for those of `BESIDE`.
LAYERS = [
    ['errors', 'ops', 'sparsity', 'registry'],
    ['fileio'],
    ['checkpoints', 'datasets'],
    ['models', 'engine'],
    ['apis', 'analysis'],
    ['cli'],
    ['__main__'],
]
FORBIDDEN = {  # beside what lies above
    'ops': {'errors'},
    'sparsity': {'errors'},
    'datasets': {'fileio'},
    'models': {'sparsity'},
    'analysis': {'models', 'engine', 'checkpoints', 'datasets', 'registry'},
}
# What a room may import all the same. A backbone builds its compact form and takes its dead units
# out when it is deployed, which is no matter of training.
BUT = {'models': 'mmslak.sparsity.compact.'}
PURE_TORCH = ('ops', 'sparsity', 'analysis', 'errors')
MM_LIBRARIES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
TASK_LIBRARIES = {'mmdet', 'mmseg', 'mmpretrain'}
MODULES = sorted(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)
ROOMS = [room for row in LAYERS for room in row]


def room_of(path: Path) -> str:
    """The first folder, or the module, below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def allowed(room: str) -> set[str]:
    """Rooms that one may import from."""
    below = ROOMS[: next(ROOMS.index(row[0]) for row in LAYERS if room in row)]
    return set(below) - FORBIDDEN.get(room, set())


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of what a module imports."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def test_every_room_has_its_place():
    assert {room_of(path) for path in MODULES} - {'__init__'} == set(ROOMS)


def test_the_walk_finds_imports():
    found = imports(PACKAGE / 'models' / 'slak.py')
    assert 'mmslak.registry.MODELS' in found
    assert 'torch.nn' in found


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room, found = room_of(path), imports(path)
    own = [
        n for n in found if n.startswith('mmslak.') and not n.startswith(BUT.get(room, 'mmslak:'))
    ]
    used = {name.split('.')[1] for name in own}
    if room == '__init__':
        assert not used
    else:
        # What mmslak itself has can be read everywhere: its version, the path of a config.
        assert (used & set(ROOMS)) - {room} <= allowed(room)
    if room in PURE_TORCH:
        assert not {name.split('.')[0] for name in imports(path, True)} & MM_LIBRARIES
    at_import = {name.split('.')[0] for name in imports(path, top_level_only=True)}
    assert not at_import & TASK_LIBRARIES, 'task libraries are imported lazily'
    assert 'unittest' not in {name.split('.')[0] for name in found}


def test_contributing_has_every_room():
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    for room in ROOMS:
        assert f'| `mmslak/{room}' in text, room
