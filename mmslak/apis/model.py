"""A model from a config and a checkpoint."""

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from PIL import Image
from torch import Tensor, nn

from mmslak.apis.config import accepted_arguments, class_name, innermost_datasets, resolve
from mmslak.apis.options import read_with_options
from mmslak.checkpoints.files import forget_checkpoint, read_checkpoint
from mmslak.checkpoints.pretrained import is_pretrained, load_pretrained
from mmslak.checkpoints.whole_model import load_weights
from mmslak.errors import UserError, reason
from mmslak.models.teacher import is_distilled, model_config
from mmslak.ops.accelerate import MIN_SIZE, accelerate

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
# Attributes of the libraries' backbones that turn what their heads want into feature maps.
UNPOOLED = dict(
    gap_before_final_norm=False,  # SLaK, ConvNeXt
    out_type='featmap',  # transformers of mmpretrain
    output_cls_token=False,  # ViT of mmseg
)


def default_device() -> str:
    """Where a model runs if nothing else is asked for: MMEngine's choice, but never Apple's GPU.

    mmcv's operators, such as those of detectors, do not run there.
    """
    device = get_device()
    return 'cpu' if device == 'mps' else device


def init_model(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    cfg_options: dict | None = None,
) -> nn.Module:
    """Builds the model of a config of mmseg, mmdet or mmpretrain for prediction.

    Args:
        config: A file, `mmslak::NAME` for one that mmslak ships, or a config, which stays as it is.
        checkpoint: A file with all weights of the model: a checkpoint of a run, one that
            `mmslak get-checkpoint` has written, or an official one. None leaves random weights.
        device: Where the model runs; None takes an accelerator if there is one.
        cfg_options: Settings of the config to override, such as
            `{'model.backbone.conv_backend': 'native'}`.

    Returns:
        The model in eval mode, as `init_model` of mmseg and `init_detector` of mmdet return it:
        `model.cfg` is the config, and `model.dataset_meta` has the names (`classes`) and colours
        (`palette`) of the classes, as far as the checkpoint or the config's test set knows them.

    Raises:
        UserError: If the config or an option is wrong, or the checkpoint does not fit.
        CheckpointError: If the checkpoint cannot be read.

    Examples:
        >>> from mmslak.apis import init_model
        >>> model = init_model(
        ...     'mmslak::upernet_slak_t_ade20k', 'checkpoints/upernet_slak_tiny_ade20k.pth'
        ... )
        >>> model.dataset_meta['classes'][:2]
        ('wall', 'building')
    """
    cfg = read_model_config(config, cfg_options)
    checkpoint = str(checkpoint or 'none')
    with read_once(checkpoint):
        model = _build_and_load(cfg, checkpoint, device or default_device())
        meta = dataset_meta(cfg, checkpoint)
    model.dataset_meta = {name: value for name, value in meta.items() if value is not None}
    # The libraries look for what follows: mmpretrain for `_config`, mmseg for `test_pipeline`.
    model.cfg = model._config = cfg
    if cfg.get('test_dataloader'):
        cfg.test_pipeline = copy.deepcopy(test_dataset(cfg).get('pipeline', []))
    return model


def read_model_config(config: str | Path | Config, options: dict | None = None) -> Config:
    """The config, with its options, and without the weights it would start training from.

    Of a model that learns from a teacher it has the student alone.

    Args:
        config: A file, `mmslak::NAME`, or a config, of which a copy is returned.
        options: Settings to override.

    Raises:
        UserError: If the file is missing or broken, or an option does not fit it.
    """
    cfg = read_with_options(config, options)
    take_student(cfg)
    if 'data_preprocessor' in cfg:  # Runner's default, as mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    _remove_pretrained(cfg.model)
    return cfg


def take_student(cfg: Config) -> None:
    """Makes a config whose model learns from a teacher one of the student alone, in place."""
    if is_distilled(cfg.model):
        cfg.model = ConfigDict(model_config(cfg.model))


@contextmanager
def read_once(checkpoint: str) -> Iterator[None]:
    """Reads a checkpoint, and keeps it in memory for what is done inside; 'none' stands for none.

    Raises:
        CheckpointError: If it cannot be read, before anything slow is done.
    """
    if checkpoint != 'none':
        read_checkpoint(checkpoint, keep=True)
    try:
        yield
    finally:
        forget_checkpoint()


def build_model(cfg: Config, checkpoint: str = 'none', device: str = 'cpu') -> nn.Module:
    """The whole model in eval mode, for commands: nothing in it takes a gradient.

    Args:
        cfg: From `read_model_config`.
        checkpoint: File with all its weights; 'none' leaves the initial, random ones.
        device: Where to put it.

    Raises:
        UserError: If the config does not build or the checkpoint does not fit.
        CheckpointError: If the file cannot be read.
    """
    return _build_and_load(cfg, checkpoint, device).requires_grad_(False)


def _build_and_load(cfg: Config, checkpoint: str, device: str) -> nn.Module:
    model = _build(cfg, cfg.model, 'model')
    if checkpoint == 'none':
        init_weights(model)
    else:
        load_weights(model, checkpoint)
    for hook in cfg.get('custom_hooks') or []:
        if isinstance(hook, dict) and hook.get('type') == 'mmslak.AccelerateHook':
            accelerate(model, hook.get('min_size', MIN_SIZE))
    return _to(revert_sync_batchnorm(model), device)


def build_backbone(
    cfg: Config, checkpoint: str = 'none', stage: int | None = None, device: str = 'cpu'
) -> nn.Module:
    """The backbone alone, in eval mode, with feature maps for outputs, never pooled ones.

    Args:
        cfg: From `read_model_config`; its `out_indices` are changed when a stage is asked for.
        checkpoint: File with its weights, of whatever model; 'none' leaves the random ones.
        stage: The one stage to return, counted from 0; None for the config's own.
        device: Where to put it.

    Raises:
        UserError: If the config has no backbone or does not build, or has no such stage.
        CheckpointError: If the file cannot be read or does not fit.
    """
    if 'backbone' not in cfg.model:
        raise UserError(f'config {cfg.filename} has a model without a backbone')
    if stage is not None:
        kind = resolve(cfg.model.backbone, cfg)
        takes = accepted_arguments(kind) if inspect.isclass(kind) else None
        if takes is not None and 'out_indices' not in takes:
            raise UserError(f'--stage: {kind.__name__} does not take out_indices')
        cfg.model.backbone.out_indices = (stage,)
    backbone = _build(cfg, cfg.model.backbone, 'backbone')
    if checkpoint == 'none':
        init_weights(backbone)
    else:
        load_pretrained(backbone, checkpoint)
    _unpool(backbone)
    return _to(revert_sync_batchnorm(backbone), device).requires_grad_(False)


@contextmanager
def unpooled(backbone: nn.Module) -> Iterator[None]:
    """Lets a backbone of a whole model give feature maps for what is done inside."""
    before = _unpool(backbone)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(backbone, name, value)


def _unpool(backbone: nn.Module) -> dict[str, object]:
    """Turns pooling and class tokens off; returns the settings until now."""
    before = {name: getattr(backbone, name) for name in UNPOOLED if hasattr(backbone, name)}
    for name in before:
        setattr(backbone, name, UNPOOLED[name])
    return before


def normalisation(cfg: Config) -> dict:
    """Mean and standard deviation by which a config normalises pictures.

    Returns:
        dict(mean=, std=, channels='RGB' or 'BGR'): those of its preprocessor or of Normalize in
        its test pipeline. Without both a preprocessor leaves the values as they are, as YOLOX's
        does. ImageNet's if the config has no preprocessor.
    """
    settings = cfg.model.get('data_preprocessor') or IMAGENET
    for step in cfg.get('test_pipeline') or []:
        if class_name(step) == 'Normalize':
            settings = dict(to_rgb=True) | step  # mmcv's default
    to_rgb = settings.get('bgr_to_rgb', settings.get('to_rgb', False))
    return dict(
        mean=[float(v) for v in settings.get('mean') or [0] * 3],
        std=[float(v) for v in settings.get('std') or [1] * 3],
        channels='RGB' if to_rgb else 'BGR',
    )


def pad_values(cfg: Config) -> list[float]:
    """What a config pads normalised pictures with, for each channel.

    That of Pad in its test pipeline, which pads before the preprocessor normalises, else that of
    the preprocessor.
    """
    norm = normalisation(cfg)
    for step in cfg.get('test_pipeline') or []:
        if class_name(step) == 'Normalize':  # what is padded is normalised already
            norm = dict(norm, mean=[0] * 3, std=[1] * 3)
        if class_name(step) == 'Pad':
            value = step.get('pad_val', 0)
            value = value.get('img', 0) if isinstance(value, dict) else value
            pixel = list(value) if isinstance(value, Sequence) else [value] * 3
            pixel = pixel[::-1] if norm['channels'] == 'RGB' else pixel  # pictures are read as BGR
            return [(p - m) / s for p, m, s in zip(pixel, norm['mean'], norm['std'], strict=True)]
    return [(cfg.model.get('data_preprocessor') or {}).get('pad_value', 0)] * 3


def dataset_meta(cfg: Config, checkpoint: str = 'none') -> dict:
    """Names and colours of the classes: the checkpoint's, else those of the config's test set.

    Returns:
        dict(classes=tuple or None, palette=list or None)
    """
    meta = {}
    if checkpoint != 'none' and Path(checkpoint).suffix != '.safetensors':
        saved = read_checkpoint(checkpoint).get('meta')
        meta = (saved.get('dataset_meta') if isinstance(saved, dict) else None) or {}
    if not meta.get('classes') and cfg.get('test_dataloader'):
        dataset = test_dataset(cfg)
        meta = {**getattr(resolve(dataset, cfg), 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    return dict(classes=meta.get('classes'), palette=meta.get('palette'))


def test_dataset(cfg: Config) -> ConfigDict:
    """The config of the first test dataset, inside of wrappers."""
    return next(innermost_datasets(cfg.test_dataloader.dataset))[1]


def model_class(cfg: Config) -> type | None:
    """The class that the config's model names; None if there is none of that name."""
    return resolve(cfg.model, cfg)


def read_picture(path: Path, size: tuple[int, int], norm: dict) -> Tensor:
    """A picture as the model takes it.

    Args:
        path: The file.
        size: (height, width) to resize to.
        norm: From `normalisation`.

    Returns:
        Tensor (3, height, width), float32.

    Raises:
        UserError: If the file is not a picture.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert('RGB').resize(size[::-1], Image.Resampling.BICUBIC)
    # PIL's decoders raise SyntaxError and ValueError, too.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f'{path}: not a picture that can be read ({error})') from error
    array = np.asarray(picture, dtype=np.float32)
    if norm['channels'] == 'BGR':
        array = array[..., ::-1]
    array = (array - np.array(norm['mean'], np.float32)) / np.array(norm['std'], np.float32)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _remove_pretrained(node: dict | list) -> None:
    """Removes, in place, every setting that would load weights while the model is built."""
    if isinstance(node, list):
        node[:] = [value for value in node if not is_pretrained(value)]
    for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        if key == 'pretrained' or is_pretrained(value):
            node[key] = None
        elif isinstance(value, (dict, list)):
            _remove_pretrained(value)


def _build(cfg: Config, part: ConfigDict, what: str) -> nn.Module:
    scope = cfg.get('default_scope') or 'mmengine'
    try:
        with quiet():
            return MODELS.build({'_scope_': scope, **part})
    except Exception as error:  # the classes of a config can raise anything
        raise UserError(
            f'config {cfg.filename}: its {what} cannot be built: {type(error).__name__}: {error}'
        ) from error


def init_weights(module: nn.Module) -> None:
    """Initialises a module as training does, without a line in the log for every parameter."""
    if hasattr(module, 'init_weights'):
        with quiet():
            module.init_weights()


@contextmanager
def quiet(level: int = logging.WARNING):
    """Hides records of MMEngine's log below a level."""
    logger = MMLogger.get_current_instance()
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _to(module: nn.Module, device: str) -> nn.Module:
    try:
        module = module.to(device)
    except (RuntimeError, AssertionError) as error:
        why = reason(error)
        raise UserError(f'device {device} cannot be used: {why}') from error
    module.eval()  # returns None for some backbones of mmpretrain
    return module
