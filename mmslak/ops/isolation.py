"""Tries a method in a process of its own: an illegal access on a GPU ends the process."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from mmslak.ops.plans import Case

SECONDS = 120
# `python -m` would take a package of the same name that is in the working directory.
RUN = """
import runpy, sys
root, module = sys.argv[1:3]
del sys.argv[1:3]
sys.path = [path for path in sys.path if path]
if root not in sys.path:
    sys.path.insert(0, root)
runpy.run_module(module, run_name='__main__', alter_sys=True)
"""

_passed: dict[tuple[str, str], bool] = {}


def command_of(module: str, *arguments: str) -> list[str]:
    """Command that runs a module of this very package in another process.

    Args:
        module: Such as `mmslak.ops.isolation`.
        *arguments: Of the module.
    """
    root = Path(__file__).absolute().parents[2]
    return [sys.executable, '-c', RUN, str(root), module, *arguments]


def passes_alone(name: str, case: Case) -> bool:
    """Whether another process can compute a case by a method, with right results.

    It is tried once for all shapes of a group.
    """
    key = name, case.group
    if key not in _passed:
        _passed[key] = _try(name, case)
    return _passed[key]


def _try(name: str, case: Case) -> bool:
    text = json.dumps(
        dict(
            name=name,
            device=str(case.device),
            dtype=str(case.dtype).removeprefix('torch.'),
            nhwc=case.layout == torch.channels_last,
            fields=case[3:],
        )
    )
    command = command_of('mmslak.ops.isolation', text)
    try:
        return subprocess.run(command, capture_output=True, timeout=SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def main(text: str) -> int:
    """Computes the case of `passes_alone`; the exit status is 0 if the results are right."""
    from mmslak.ops.tuner import works

    values = json.loads(text)
    shape, kernels, *flags = values['fields']
    layout = torch.channels_last if values['nhwc'] else torch.contiguous_format
    case = Case(
        torch.device(values['device']),
        getattr(torch, values['dtype']),
        layout,
        tuple(shape),
        tuple(map(tuple, kernels)),
        *flags,
    )
    return 0 if works(values['name'], case) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
