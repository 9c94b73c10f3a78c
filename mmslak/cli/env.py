"""Prints what a bug report needs: versions, devices, and how mmslak and mmcv are installed."""

import argparse
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from mmengine.utils.dl_utils import collect_env

import mmslak
from mmslak.cli.parser import command_parser, one_line_errors
from mmslak.errors import reason

# Distributions of both stacks; those of one have the same import names.
DISTRIBUTIONS = (
    *('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'),
    *('onedl-mmpretrain', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'),
    *('torchvision', 'triton', 'numpy', 'safetensors', 'onnx', 'onnxruntime', 'mmdeploy'),
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak env`."""
    return command_parser('env', __doc__)


def is_clone() -> bool:
    """Whether mmslak runs from a clone of the repository, which has make's targets."""
    return (Path(mmslak.__file__).parents[1] / 'Makefile').is_file()


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def mmcv_operators() -> str:
    """Whether mmcv's compiled operators can be used; detectors need them."""
    try:
        import mmcv.ops  # noqa: F401
    except Exception as error:  # torch raises what it likes of a library for another torch
        return f'not there ({type(error).__name__}: {reason(error)})'
    return 'compiled'


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    build_parser().parse_args(argv)
    package = Path(mmslak.__file__).parent
    found = {'mmslak': f'{mmslak.__version__}, {"a clone" if is_clone() else "a wheel"}: {package}'}
    found |= {name: version for name in DISTRIBUTIONS if (version := installed(name))}
    found |= {'mmcv operators': mmcv_operators(), 'machine': platform.platform()}
    found['CPU'] = f'{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'
    found |= {name: str(value).strip() for name, value in collect_env().items()}
    for name, value in found.items():
        print(f'{name}: {value}')
