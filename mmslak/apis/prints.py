"""What pycocotools prints goes into the log file."""

import logging
import sys

# Modules that tell what they are doing by print(): how far loading is, and the table of scores,
# which are logged as well.
PRINTING = (
    *('pycocotools.coco', 'pycocotools.cocoeval'),
    *('mmdet.datasets.api_wrappers.coco_api', 'mmdet.datasets.api_wrappers.cocoeval_mp'),
)


def redirect_prints(logger: logging.Logger | None = None) -> None:
    """Takes what those modules print, as far as they are imported, from the screen.

    Args:
        logger: Its handlers of files get the lines; None drops them.
    """

    def log(*values: object, **settings: object) -> None:
        if logger is not None:
            logger.info(' '.join(map(str, values)), extra=dict(file_only=True))

    for name in PRINTING:
        if name in sys.modules:
            sys.modules[name].print = log
