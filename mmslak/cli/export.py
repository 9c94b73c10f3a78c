"""Exports a model or its backbone: ONNX, TorchScript or fused safetensors.

Kernel branches and norms are fused first. Graphs take any batch, height and width. The result is
run against PyTorch at two sizes, and more than 1e-4 of relative error fails. Inputs are normalised
pictures; mean, std and channel order are in the file's metadata.

Examples:
    mmslak export configs/upernet_slak_t_ade20k.py iter_160000.pth --to onnx
    mmslak export configs/cascade_mask_rcnn_slak_t_coco.py epoch_36.pth --to torchscript \\
        --backbone-only --out slak_tiny.ts
    mmslak export configs/cascade_mask_rcnn_slak_t_coco.py epoch_36.pth --to onnx \\
        --images data/coco/val2017

A segmentor gives class scores at the picture's size. A whole detector is exported to ONNX alone, by
mmdeploy, for one picture at a time; the check compares what is found in the pictures of --images.
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
from mmslak.analysis.detections import Agreement, Detections, compare
from mmslak.apis import detectors
from mmslak.apis.model import (
    build_backbone,
    build_model,
    dataset_meta,
    model_class,
    normalisation,
    pad_values,
    read_model_config,
    read_once,
    read_picture,
)
from mmslak.cli.parser import (
    add_cfg_options,
    add_config,
    check_output,
    command_parser,
    one_line_errors,
    pictures,
)
from mmslak.datasets.findings import of
from mmslak.errors import UserError, reason

PICTURES = 4  # of --images
MULTIPLES = (
    'if it needs sides that are multiples of 32, add '
    '--cfg-options model.data_preprocessor.pad_size_divisor=32'
)
SUFFIXES = dict(onnx='.onnx', torchscript='.ts', safetensors='.safetensors')


def original(cfg, args: argparse.Namespace) -> nn.Module:
    """What is to be exported, as a module of a picture, not fused.

    Raises:
        UserError: If it is of no known library, or no graph of a picture.
    """
    scope = cfg.get('default_scope')
    if args.backbone_only:
        return build_backbone(cfg, args.checkpoint)
    if scope == 'mmdet':
        return build_model(cfg, args.checkpoint)
    if scope not in ('mmseg', 'mmpretrain'):
        raise UserError(
            f'{args.config} is of {scope or "no library"}: only whole segmentors, classifiers and '
            'detectors are exported; --backbone-only exports the backbone of any model'
        )
    if scope == 'mmseg' and not hasattr(model_class(cfg), 'encode_decode'):
        raise UserError(f'{args.config}: {cfg.model.type} cannot be exported as one graph')
    model = build_model(cfg, args.checkpoint)
    return export.WholeModel(model, scope == 'mmseg', getattr(model, 'align_corners', False))


def metadata(
    cfg, classes: Sequence[str] | None, names: Sequence[str], **more: object
) -> dict[str, str]:
    """What a user of the file has to know, as strings."""
    norm = normalisation(cfg)
    values = dict(norm, outputs=list(names), classes=list(classes) if classes else None, **more)
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
        export.to_onnx(model, example, path, names)
        export.annotate(path, info)
        return export.onnx_runner(path)
    # Names as in the model itself, for `load_state_dict` after `switch_to_deploy()`.
    own = model.model if isinstance(model, export.WholeModel) else model
    # Copies: the format has no place for tensors that share their memory.
    state = {name: tensor.clone().contiguous() for name, tensor in own.state_dict().items()}
    save_file(state, path, metadata=info)
    own.load_state_dict(load_file(path))
    return lambda x: export.outputs_of(model, x)


def write_detector(
    cfg, model: nn.Module, args: argparse.Namespace, classes: Sequence[str] | None, path: Path
) -> list[str]:
    """Writes a whole detector, checks it, prints how well it agrees, and returns its outputs.

    Raises:
        UserError: If a picture cannot be read, or mmdeploy cannot write the graph.
        ExportError: If nothing is found in the pictures, or the graph finds something else.
    """
    detectors.check_model(model)
    settings, limit = detectors.last_settings(model), detectors.most_objects(model)
    threshold = settings.get('score_thr', 0.0)
    files, norm = pictures(args.images, PICTURES), normalisation(cfg)
    expected = {}
    divisor = getattr(model.data_preprocessor, 'pad_size_divisor', 1)
    for size in sizes_of(args, divisor):
        inputs = [read_picture(file, size, norm)[None] for file in files]
        try:
            expected[size] = [(x, Detections(*detectors.find(model, x))) for x in inputs]
        except Exception as error:  # detectors raise what they like
            hint = '' if size[0] % 32 == size[1] % 32 == 0 else f'; {MULTIPLES}'
            raise export.ExportError(
                f'{type(model).__name__} does not run on pictures of {size[0]}×{size[1]}: '
                f'{type(error).__name__}: {reason(error)}{hint}'
            ) from error
        if not any(len(found.scores) for _, found in expected[size]):
            raise export.ExportError(
                f'--images {args.images}: PyTorch finds nothing in {of(len(files), "picture")} of '
                f'{size[0]}×{size[1]}, so that the export cannot be checked; give pictures with '
                'objects, or another --shape'
            )
    example = next(x for x, found in next(iter(expected.values())) if len(found.scores))
    names = detectors.output_names(model)
    detectors.to_onnx(export.deployed(model), example, path)
    more = dict(size_divisor=divisor, pad_value=pad_values(cfg))
    if 'masks' in names:
        more['mask_threshold'] = settings.get('mask_thr_binary', 0.5)
    export.annotate(path, metadata(cfg, classes, names, **more))
    run = export.onnx_runner(path)
    for size, pairs in expected.items():
        agreement = Agreement()
        for file, (x, found) in zip(files, pairs, strict=True):
            where = f'{args.out}: {file.name} at {size[0]}×{size[1]}'
            try:
                got = Detections.of_graph(*run(x))
            except Exception as error:  # whatever the runtime raises
                raise export.ExportError(f'{where} does not run: {reason(error)}') from error
            agreement = agreement.merge(compare(got, found, threshold, limit, where))
        masks = f', masks within {agreement.mask:.1e}' if 'masks' in names else ''
        print(
            f'{size[0]}×{size[1]}: {of(agreement.pairs, "detection")} in '
            f'{of(len(files), "picture")} as PyTorch has them: IoU {agreement.iou:.4f} or more, '
            f'scores within {agreement.score:.1e}{masks}'
        )
    return names


def write_graph(
    cfg, model: nn.Module, args: argparse.Namespace, classes: Sequence[str] | None, path: Path
) -> list[str]:
    """Writes any other model, checks it, prints how well it agrees, and returns its outputs.

    Raises:
        ExportError: If that fails.
    """
    sizes = sizes_of(args)
    outputs = first_outputs(model, sizes[0])
    names = [f'stage{i}' for i in range(len(outputs))] if args.backbone_only else ['scores']
    info = metadata(cfg, classes, names)
    run = write(args.to, export.deployed(model), sizes[0], path, info, names)
    errors = export.check(run, model, sizes, names, str(args.out))
    for (height, width), error in errors.items():
        print(f'{height}×{width}: max relative error {error:.1e} against PyTorch')
    return names


def sizes_of(args: argparse.Namespace, divisor: int = 1) -> list[tuple[int, int]]:
    """Heights and widths to check at: multiples of what pictures are padded to."""

    def padded(size: tuple[int, int]) -> tuple[int, int]:
        return tuple(-(-side // divisor) * divisor for side in size)

    first = padded(args.shape)
    return [first, padded(export.other_size(first))]


def check_packages(cfg, args: argparse.Namespace) -> None:
    """Checks, before anything slow, that what an export needs is there.

    Raises:
        UserError: If not.
    """
    if cfg.get('default_scope') == 'mmdet' and not args.backbone_only:
        if args.to != 'onnx':
            raise UserError(
                f'--to {args.to}: a whole detector is exported to onnx alone; --backbone-only '
                'exports its backbone'
            )
        detectors.check_mmdeploy()
        if args.images is None:
            raise UserError(
                '--images FOLDER: a whole detector is checked on pictures with objects; '
                '--backbone-only exports its backbone'
            )
    for package in ('onnx', 'onnxruntime') if args.to == 'onnx' else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(f'--to onnx needs {package}: pip install onnx onnxruntime')


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
    parser.add_argument(
        '--images', help=f'folder of pictures; the first {PICTURES} check a whole detector'
    )
    add_cfg_options(parser)
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.shape) < 32:
        parser.error('--shape: expected 32 or more')
    cfg = read_model_config(args.config, args.cfg_options)
    check_packages(cfg, args)
    stem = args.config if args.checkpoint == 'none' else args.checkpoint
    path = args.out or Path(stem).with_suffix(SUFFIXES[args.to])
    if args.out is None and args.checkpoint == 'none':
        path = Path(path.name)  # not among the configs
    if path.resolve() == Path(args.checkpoint).resolve():
        raise UserError(f'{path} is the checkpoint itself; give another name by --out')
    check_output(path)
    args.out = path
    with read_once(args.checkpoint):
        model = original(cfg, args)
        classes = dataset_meta(cfg, args.checkpoint)['classes']
    beside = path.with_name(f'.{path.name}')  # until it is checked; a file of before stays as it is
    whole_detector = cfg.get('default_scope') == 'mmdet' and not args.backbone_only
    write_and_check = write_detector if whole_detector else write_graph
    try:
        names = write_and_check(cfg, model, args, classes, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    print(f'{path}: {args.to}, outputs {", ".join(names)}')
