"""Objects in COCO's form, which the formats with boxes have in common."""

from collections.abc import Iterable

from mmslak.datasets.formats.description import Sample

INFO = dict(description='written by mmslak new-config')  # such files are no data of a person


def annotation(
    number: int, box: Iterable[float], polygons: list | dict | None = None, crowd: bool = False
) -> dict:
    """An annotation of COCO without its ids.

    Args:
        number: Of the class.
        box: x, y, width, height in pixels.
        polygons: Polygons of the mask, or COCO's run lengths; None if there is no mask.
        crowd: Whether training and scores ignore it.
    """
    box = [round(float(value), 2) for value in box]
    found = dict(bbox=box, area=box[2] * box[3], iscrowd=int(crowd), category_id=number)
    return found if polygons is None else dict(found, segmentation=polygons)


def to_coco(samples: Iterable[Sample], classes: Iterable[str]) -> dict:
    """The content of a COCO file; names of pictures are below the root of the data."""
    images, annotations = [], []
    for image_id, sample in enumerate(samples, 1):
        width, height = sample.size
        images.append(dict(id=image_id, file_name=sample.path, width=width, height=height))
        for thing in sample.label:
            ids = dict(id=len(annotations) + 1, image_id=image_id)
            annotations.append({**thing, **ids, 'category_id': thing['category_id'] + 1})
    categories = [dict(id=number, name=name) for number, name in enumerate(classes, 1)]
    return dict(info=INFO, images=images, annotations=annotations, categories=categories)


def has_mask(thing: dict) -> bool:
    """Whether an annotation has a mask: run lengths, or polygons of three points and more."""
    mask = thing.get('segmentation')
    if isinstance(mask, dict):
        return bool(mask.get('counts'))
    return bool(mask) and all(isinstance(p, list) and len(p) >= 6 for p in mask)


def kind_of(samples: Iterable[Sample], notes: list[str]) -> str:
    """'masks' if every object has one, else 'boxes'; with a note where only some have."""
    things = [has_mask(thing) for sample in samples for thing in sample.label]
    if any(things) and not all(things):
        missing = len(things) - sum(things)
        notes.append(
            f'{missing} of {len(things)} objects have no mask: boxes are used; give these masks or '
            'take them out for a model with masks'
        )
    return 'masks' if things and all(things) else 'boxes'
