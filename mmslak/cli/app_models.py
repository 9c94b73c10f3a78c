"""The models of `mmslak app`, each loaded once, with the pictures that are offered for it."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from PIL import Image

from mmslak import config_file
from mmslak.apis.model import default_device, read_model_config
from mmslak.cli.app import Given
from mmslak.cli.app_examples import Example, Validation, examples
from mmslak.cli.app_viewer import Viewer
from mmslak.cli.sparsity import find_checkpoint
from mmslak.errors import UserError


class Model:
    """A model of the page.

    Args:
        name: What the page calls it.
        viewer: The model; several names can have the same one.
        folder: Of its checkpoint, whose other checkpoints and logs tell of its training.
    """

    def __init__(self, name: str, viewer: Viewer, folder: Path | None) -> None:
        self.name, self.viewer, self.folder = name, viewer, folder
        self.no_validation = ''  # why there is none

    @cached_property
    def validation(self) -> Validation | None:
        """The validation set of the config; None where it is not there."""
        try:
            return Validation(self.viewer.cfg)
        except UserError as error:
            self.no_validation = str(error)
            return None

    @cached_property
    def offers(self) -> list[tuple[Example, Image.Image]]:
        """Pictures that can be chosen, those of the validation set first, with small ones."""
        own = self.validation.examples() if self.validation else []
        known = {example.path.resolve().parent for example in own}
        found = own + [e for e in examples() if e.path.resolve().parent not in known]
        drawn = [(example, example.thumbnail()) for example in found]
        return [(example, small) for example, small in drawn if small is not None]


def load_models(
    given: Iterable[Given], device: str | None = None, options: dict | None = None
) -> dict[str, Model]:
    """Loads models; one that is asked for twice is there once.

    Args:
        given: What to load.
        device: Where they run; None takes a GPU if there is one.
        options: Settings of the configs to override.

    Returns:
        The models by their names.

    Raises:
        UserError: If a config cannot be used.
        CheckpointError: If a checkpoint cannot be read or does not fit.
    """
    viewers: dict[tuple[str, str], Viewer] = {}
    models = {}
    for name, config, checkpoint in given:
        file = None if checkpoint == 'none' else find_checkpoint(Path(checkpoint))
        key = str(Path(config_file(config)).resolve()), str(file and file.resolve())
        if key not in viewers:
            cfg = read_model_config(config, options)
            viewers[key] = Viewer(cfg, str(file or 'none'), device or default_device())
        models[name] = Model(name, viewers[key], file and file.parent)
    return models
