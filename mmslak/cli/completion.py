"""Prints a script that completes `mmslak` in a shell: commands, options, files.

Examples:
    mmslak completion bash > ~/.local/share/bash-completion/completions/mmslak
    mmslak completion zsh > ~/.zsh/completions/_mmslak
"""

import argparse
import importlib
from collections.abc import Sequence

import shtab

from mmslak.cli.main import COMMANDS
from mmslak.cli.parser import command_parser, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak completion`."""
    parser = command_parser('completion', __doc__)
    parser.add_argument('shell', choices=shtab.SUPPORTED_SHELLS)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """A parser of all commands, for completion alone: `mmslak` itself imports one command."""
    parser = argparse.ArgumentParser(prog='mmslak')
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        module = importlib.import_module(f'mmslak.cli.{name.replace("-", "_")}')
        one = commands.add_parser(name, help=text, parents=[module.build_parser()], add_help=False)
        for action in one._actions:
            if isinstance(action.choices, dict) and action.nargs != argparse.PARSER:
                action.choices = list(action.choices)  # shtab takes dicts for commands
            if action.dest in ('config', 'checkpoint', 'inputs', 'models', 'out', 'source', 'file'):
                action.complete = shtab.FILE
            elif action.dest in ('work_dir', 'root', 'images', 'show_dir', 'data'):
                action.complete = shtab.DIRECTORY
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    print(shtab.complete(whole_parser(), build_parser().parse_args(argv).shell))
