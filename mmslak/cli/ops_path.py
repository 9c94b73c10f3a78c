"""Prints the folder of the module that stands in for the CUDA extension of RepLKNet, SLaK and
UniRepLKNet.

Examples:
    export LARGE_KERNEL_CONV_IMPL=$(mmslak ops-path)
    export PYTHONPATH=$(mmslak ops-path):$PYTHONPATH
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import mmslak
from mmslak.cli.parser import command_parser


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak ops-path`."""
    return command_parser('ops-path', __doc__)


def main(argv: Sequence[str] | None = None) -> int:
    build_parser().parse_args(argv)
    print(Path(mmslak.__file__).parent / 'ops' / 'drop_in')
    return 0
