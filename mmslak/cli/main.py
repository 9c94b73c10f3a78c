"""The command `mmslak`: finds the module of a command, and imports nothing else before."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from itertools import takewhile

import mmslak
from mmslak.fileio.absent import absent_checkpoint, absent_config, absent_input

# Each is the module of its name in mmslak.cli.
COMMANDS = {
    'new-config': 'write a config for a folder of your own data',
    'train': 'train the model of a config',
    'test': 'test a checkpoint: mIoU, AP, accuracy',
    'demo': 'predict for pictures, folders and videos',
    'browse': 'draw samples as the model gets them',
    'check-dataset': 'say what data teach and what is wrong with them',
    'prepare-data': 'check and download public data; label maps to indices',
    'get-checkpoint': 'download released weights',
    'convert-checkpoint': 'write weights in their clean form',
    'compact': 'take dead hidden units out of a checkpoint',
    'app': 'a page: predictions, and what a click looks at',
    'erf': 'effective receptive fields',
    'complexity': 'parameters and MACs, dense and non-zero',
    'sparsity': 'report on the zeros of a model',
    'tune': 'measure which convolutions are fast here',
    'export': 'ONNX, TorchScript, fused safetensors',
    'run-demo': 'the whole pipeline on digits, on a CPU',
    'run-demo-detection': 'its detectors, after run-demo',
    'run-demo-compact': 'hidden units that go, after run-demo',
    'make-digit-scenes': 'write the data set of the demos',
    'ops-path': 'print where the stand-in for the CUDA extension is',
    'env': 'print what a bug report needs',
    'completion': 'print shell completion: bash, zsh or tcsh',
}


def help_text() -> str:
    """The commands, a line each."""
    rows = [f'  {name:20}{text}' for name, text in COMMANDS.items()]
    usage = 'usage: mmslak COMMAND …    (mmslak COMMAND --help explains one)'
    return '\n'.join([usage, *rows])  # as many lines as a screen has


def absent_file(name: str, words: Sequence[str]) -> str | None:
    """What to say of a file that a command line names before its options, and that is not there.

    The command itself would say the same, but after its imports, which take seconds or, on a slow
    machine, a minute. What is not clearly a file to read is left to it.
    """
    words = list(takewhile(lambda word: not word.startswith('-'), words))
    faults = [absent_config(word) for word in words if word.endswith('.py') or '::' in word]
    if name in ('test', 'demo', 'app', 'export'):
        faults += [absent_checkpoint(word) for word in words if word.endswith('.pth')]
    if name == 'demo':
        faults.append(absent_input(words[:-2]))
    return next(filter(None, faults), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Its name and its arguments; None for those of the process.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else '--help'
    if name in ('-h', '--help', 'help'):
        print(help_text())
        return 0
    if name in ('-V', '--version'):
        print(f'mmslak {mmslak.__version__}')
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f'did you mean {near[0]}?' if near else 'mmslak --help lists them'
        print(f'error: no command {name}; {hint}', file=sys.stderr)
        return 2
    fault = absent_file(name, argv[1:])
    if fault is not None:
        from mmslak.fileio.per_machine import is_first_of_machine  # takes a moment

        if is_first_of_machine():
            print(f'error: {fault}', file=sys.stderr)
        return 2
    return importlib.import_module(f'mmslak.cli.{name.replace("-", "_")}').main(argv[1:])
