"""Exports a backbone, a segmentor or a classifier: ONNX, TorchScript or fused safetensors.

Kernel branches and norms are fused first. Graphs take any batch, height and width. The result is
run against PyTorch at two sizes, and more than 1e-4 of relative error fails. Inputs are normalised
pictures; mean, std and channel order are in the file's metadata.

Examples:
    mmslak export configs/upernet_slak_t_ade20k.py iter_160000.pth --to onnx
    mmslak export configs/cascade_mask_rcnn_slak_t_coco.py epoch_36.pth --to torchscript \\
        --backbone-only --out slak_tiny.ts

A segmentor gives class scores at the picture's size. Of a detector only the backbone is exported.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmslak.analysis import export
from mmslak.apis.model import (
    build_backbone,
    build_model,
    dataset_meta,
    model_class,
    normalisation,
    read_model_config,
    read_once,
)
from mmslak.cli.parser import (
    add_cfg_options,
    add_config,
    check_output,
    command_parser,
    one_line_errors,
)
from mmslak.errors import UserError, reason

SUFFIXES = dict(onnx='.onnx', torchscript='.ts', safetensors='.safetensors')


def original(cfg, args: argparse.Namespace) -> nn.Module:
    """What is to be exported, as a module of a picture, not fused.

    Raises:
        UserError: If it is a detector, or of no known library.
    """
    scope = cfg.get('default_scope')
    if args.backbone_only:
        return build_backbone(cfg, args.checkpoint)
    if scope not in ('mmseg', 'mmpretrain'):
        raise UserError(
            f'{args.config} is of {scope or "no library"}: only whole segmentors and classifiers '
            'are exported; --backbone-only exports the backbone of any model'
        )
    if scope == 'mmseg' and not hasattr(model_class(cfg), 'encode_decode'):
        raise UserError(f'{args.config}: {cfg.model.type} cannot be exported as one graph')
    model = build_model(cfg, args.checkpoint)
    return export.WholeModel(model, scope == 'mmseg', getattr(model, 'align_corners', False))


def metadata(cfg, classes: Sequence[str] | None, names: Sequence[str]) -> dict[str, str]:
    """What a user of the file has to know, as strings."""
    norm = normalisation(cfg)
    values = dict(norm, outputs=list(names), classes=list(classes) if classes else None)
    return {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}


def write(kind: str, model: nn.Module, size: tuple[int, int], path: Path, info: dict, names: list):
    """Writes the file and returns how to run it.

    Raises:
        ExportError: If that fails.
    """
    example = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    if kind == 'torchscript':
        export.to_torchscript(model, example, path, info)
        traced = torch.jit.load(str(path))
        return lambda x: export.outputs_of(traced, x)
    if kind == 'onnx':
        import onnx

        export.to_onnx(model, example, path, names)
        graph = onnx.load(str(path))
        for key, value in info.items():
            graph.metadata_props.add(key=key, value=value)
        onnx.save(graph, str(path))
        return export.onnx_runner(path)
    # Names as in the model itself, for `load_state_dict` after `switch_to_deploy()`.
    own = model.model if isinstance(model, export.WholeModel) else model
    # Copies: the format has no place for tensors that share their memory.
    state = {name: tensor.clone().contiguous() for name, tensor in own.state_dict().items()}
    save_file(state, path, metadata=info)
    own.load_state_dict(load_file(path))
    return lambda x: export.outputs_of(model, x)


def first_outputs(model: nn.Module, size: tuple[int, int]) -> list[torch.Tensor]:
    """Outputs of a black picture.

    Raises:
        ExportError: If the model wants more than a picture, or does not run on that size.
    """
    try:
        return export.outputs_of(model, torch.zeros(1, 3, *size))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        what = f'the model does not run on a picture of {size[0]}×{size[1]}'
        if isinstance(error, TypeError) and isinstance(model, export.WholeModel):
            # Heads of mask classification and PointRend, which want more than features.
            head = getattr(model.model, 'decode_head', model.model)
            head = head[-1] if isinstance(head, nn.ModuleList) else head
            what = (
                f'a model with {type(head).__name__} is no graph of a picture alone, only its '
                'backbone can be exported (--backbone-only)'
            )
        raise export.ExportError(f'{what}: {reason(error)}') from error


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak export`."""
    parser = command_parser('export', __doc__)
    add_config(parser)
    parser.add_argument('checkpoint', help='checkpoint file, or none for random weights')
    parser.add_argument('--to', required=True, choices=list(SUFFIXES), help='format')
    parser.add_argument('--out', type=Path, help='file to write [CHECKPOINT with its suffix]')
    parser.add_argument('--backbone-only', action='store_true', help='without neck and head')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        default=(224, 224),
        metavar=('H', 'W'),
        help='size to trace and check with; a second one is checked too [224 224]',
    )
    add_cfg_options(parser)
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.shape) < 32:
        parser.error('--shape: expected 32 or more')
    for package in ('onnx', 'onnxruntime') if args.to == 'onnx' else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(f'--to onnx needs {package}: pip install onnx onnxruntime')

    cfg = read_model_config(args.config, args.cfg_options)
    stem = args.config if args.checkpoint == 'none' else args.checkpoint
    path = args.out or Path(stem).with_suffix(SUFFIXES[args.to])
    if args.out is None and args.checkpoint == 'none':
        path = Path(path.name)  # not among the configs
    if path.resolve() == Path(args.checkpoint).resolve():
        raise UserError(f'{path} is the checkpoint itself; give another name by --out')
    check_output(path)
    with read_once(args.checkpoint):
        model = original(cfg, args)
        classes = dataset_meta(cfg, args.checkpoint)['classes']
    beside = path.with_name(f'.{path.name}')  # until it is checked; a file of before stays as it is
    sizes = [tuple(args.shape), export.other_size(tuple(args.shape))]
    try:
        outputs = first_outputs(model, sizes[0])
        names = [f'stage{i}' for i in range(len(outputs))] if args.backbone_only else ['scores']
        info = metadata(cfg, classes, names)
        run = write(args.to, export.deployed(model), sizes[0], beside, info, names)
        errors = export.check(run, model, sizes, names, str(path))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    for (height, width), error in errors.items():
        print(f'{height}×{width}: max relative error {error:.1e} against PyTorch')
    print(f'{path}: {args.to}, outputs {", ".join(names)}')
