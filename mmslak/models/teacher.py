"""A model that others learn from."""

import copy
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor

from mmslak.checkpoints.schemes import local_file
from mmslak.checkpoints.whole_model import load_weights
from mmslak.errors import UserError

DISTILLED = ('DistilledClassifier', 'DistilledSegmentor')
SETTINGS = ('type', '_scope_', 'student', 'teacher', 'teacher_checkpoint', 'loss')


class Teacher:
    """A frozen model in eval mode. It is no torch module, so that whoever has it does not own it.

    Its weights are not among the student's parameters, buffers and tensors of `state_dict`, and
    neither `train()` nor a deep copy, such as that of averaged weights, reaches it.

    Args:
        model: Config of the model, or a config file, such as 'mmslak::slak_t_imagenet'.
        checkpoint: File with all its weights, or its address.
    """

    def __init__(self, model: dict | str, checkpoint: str | Path) -> None:
        self.config = model_config(model)
        self.model = MODELS.build(copy.deepcopy(self.config))
        self.model.eval()  # returns None for some models of mmpretrain
        self.model.requires_grad_(False)
        self.checkpoint, self._loaded = checkpoint, False

    def load(self) -> None:
        """Loads the weights, once. All ranks have to call this together.

        Raises:
            UserError: If weights are missing or have another shape.
            CheckpointError: If the file cannot be read.
        """
        if not self._loaded:
            load_weights(self.model, str(local_file(self.checkpoint or '(no checkpoint given)')))
        self._loaded = True

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits of pictures (N, 3, H, W) that are normalised already, on their device."""
        self.load()
        if next(self.model.parameters()).device != inputs.device:
            self.model.to(inputs.device)
        return self.model(inputs, mode='tensor')

    def __deepcopy__(self, memo: dict) -> 'Teacher':
        return self


def is_distilled(model: dict) -> bool:
    """Whether the model of a config learns from a teacher."""
    return str(model.get('type')).rpartition('.')[2] in DISTILLED


def model_config(given: dict | str | Path) -> dict:
    """The config of a model: a copy of the given one, or that in a config file.

    Args:
        given: dict(type=…, …), or a path, or `mmslak::NAME`. Of a model that learns from a teacher
            it is the student's config.

    Raises:
        UserError: If a setting stands beside the student and not inside.
    """
    model = given
    if not isinstance(given, dict):
        cfg = Config.fromfile(given)
        model = {'_scope_': cfg.get('default_scope', 'mmengine'), **cfg.model}
        if 'data_preprocessor' in cfg:  # Runner's default, as mmpretrain's configs have it
            model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if is_distilled(model):
        inputs = model.get('data_preprocessor')
        for key in model.keys() - {*SETTINGS, 'data_preprocessor'}:
            raise UserError(
                f'model.{key}: {model["type"]} has no such setting; that of its student is '
                f'model.student.{key}'
            )
        model = model_config(model['student'])
        if inputs is not None:
            model.setdefault('data_preprocessor', inputs)
    return copy.deepcopy(dict(model))
