"""The page of `mmslak app`, by gradio."""

import functools
import html
import signal
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import gradio as gr
import matplotlib
import numpy as np
from starlette.middleware import Middleware

from mmslak.analysis import THRESHOLDS
from mmslak.analysis.page import table
from mmslak.analysis.pictures import COLOURS, overlay_field
from mmslak.apis.inference import Prediction
from mmslak.cli.app_kernels import kernels_html, masks_over_training
from mmslak.cli.app_models import Model
from mmslak.cli.app_viewer import LOWEST, Field, Viewer, load_picture
from mmslak.datasets.samples import PICTURE_SUFFIXES
from mmslak.errors import UserError

NO_MODEL = '(none)'
SCALES = {'logarithmic': 'log', 'linear': 'linear', 'log(x + 1), as in the papers': 'papers'}
HEIGHT = 340  # pixels of a picture on the page
LEAST = 480  # of the longer side of a picture that is sent, since gradio does not enlarge
ROWS = 20  # of a table of detections
SECONDS = 30  # that a message stays
POLICY = (
    b'content-security-policy',
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
)
INTRODUCTION = """# See what it sees
Choose a picture, then click into the prediction: the receptive field says how much each pixel of
the picture contributes to that place."""
STYLE = """
.swatch { display: inline-block; width: 1em; height: 1em; margin-right: 0.4em }
.bar { display: inline-block; height: 0.8em; width: 10em; border: 1px solid; margin: 0 0.5em }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)) }
.scroll { overflow-x: auto } .scroll img { max-width: 100% } figure { margin: 0.5em 0 }
td, th { padding: 1px 10px 1px 0; text-align: left }
"""


class Chosen(NamedTuple):
    """The picture of a client.

    Attributes:
        path: Its file.
        model: Name of the model whose validation set it is of; None of any other picture.
        index: Its place in that set.
    """

    path: str
    model: str | None = None
    index: int | None = None


def told(outputs: int = 0):
    """Makes an event's function tell of an error that the user can correct, on the page.

    Args:
        outputs: How many there are; they are emptied. With 0 all stays as it is, and what would
            follow the event does not.
    """

    def decorator(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args):
            try:
                return function(*args)
            except UserError as error:
                text = html.escape(' '.join(str(error).split()))
                if not outputs:
                    raise gr.Error(text, duration=SECONDS, print_exception=False) from error
                gr.Warning(text, duration=SECONDS)
                return [None] * outputs if outputs > 1 else None

        return wrapper

    return decorator


class Page:
    """The page and what its controls do.

    Args:
        models: By their names.
    """

    def __init__(self, models: dict[str, Model]) -> None:
        self.models = models

    # What is chosen: (Chosen, row, column).

    @told()
    def choose_upload(self, path: str | None) -> tuple:
        """A picture of the client's own; its centre is the first place."""
        return self._at_centre(Chosen(path)) if path else (gr.skip(),) * 3

    @told()
    def choose_example(self, name: str, event: gr.SelectData) -> tuple:
        """One of the gallery."""
        return self._offered(name, event.index)

    @told()
    def choose_first(self, name: str) -> tuple:
        """The first of the gallery, so that the page begins with an answer."""
        return self._offered(name, 0)

    @told()
    def choose_sample(self, name: str, index: float | None) -> tuple:
        """Any picture of the validation set."""
        model = self.models[name]
        if model.validation is None:
            raise UserError(model.no_validation)
        if index is None:
            raise UserError(f'a number from 0 to {len(model.validation) - 1} is expected')
        example = model.validation.example(int(index))
        return self._at_centre(Chosen(str(example.path), name, example.index))

    def _offered(self, name: str, index: int) -> tuple:
        offers = self.models[name].offers
        if not offers:
            return (gr.skip(),) * 3
        example = offers[index][0]
        return self._at_centre(Chosen(str(example.path), name, example.index))

    def _at_centre(self, chosen: Chosen) -> tuple:
        height, width = load_picture(chosen.path).shape[:2]
        return chosen, height // 2, width // 2

    # What is shown of it.

    @told(3)
    def show(
        self, chosen: Chosen | None, name: str, opacity: float, threshold: float
    ) -> tuple[np.ndarray | None, dict, str | None]:
        """The prediction over the picture, the truth, and the text beside them."""
        if chosen is None:
            return None, gr.Image(visible=False), None
        viewer = self.models[name].viewer
        prediction = viewer.predict(chosen.path, threshold, opacity)
        truth = None
        if chosen.index is not None:
            try:
                truth = self.models[chosen.model].validation.truth(chosen.index)
            except UserError as error:  # the prediction is there all the same
                gr.Warning(html.escape(str(error)), duration=SECONDS)
        text = found_html(prediction) + self._cost(viewer, chosen.path)
        shown = gr.Image(visible=False) if truth is None else gr.Image(enlarge(truth), visible=True)
        return enlarge(prediction.overlay), shown, text

    @told(3)
    def look(
        self,
        chosen: Chosen | None,
        name: str,
        other: str,
        row: float | None,
        column: float | None,
        stage: str,
        scale: str,
        threshold: float,
    ) -> tuple[np.ndarray | None, dict, str | None]:
        """The receptive field of the place, of one or two models, and the text below."""
        if chosen is None:
            return None, gr.Image(visible=False), None
        if row is None or column is None:
            raise UserError('a row and a column of the picture are expected')
        at = int(row), int(column)
        names = [name] if other == NO_MODEL else [name, other]
        fields, classes = [], []
        for one in names:
            viewer = self.models[one].viewer
            index = viewer.stages.index(stage) if stage in viewer.stages else None
            fields.append(viewer.field(chosen.path, at, index, SCALES[scale]))
            classes.append(viewer.there(chosen.path, at, threshold))
        picture = self.models[name].viewer.see(chosen.path).picture[..., ::-1]
        times = enlargement(picture)
        cross = tuple(times * position + times // 2 for position in at)
        drawn = [overlay_field(enlarge(picture), enlarge(field.scores), cross) for field in fields]
        second = gr.Image(visible=False)
        if len(names) == 2:
            second = gr.Image(drawn[1], label=f'Receptive field: {other}', visible=True)
        return drawn[0], second, place_html(at, names, fields, classes, scale)

    @told()
    def click(
        self,
        chosen: Chosen | None,
        name: str,
        other: str,
        stage: str,
        scale: str,
        threshold: float,
        event: gr.SelectData,
    ) -> tuple:
        """Looks at the place that was clicked."""
        picture = self.models[name].viewer.see(chosen.path).picture
        column, row = (
            min(position // enlargement(picture), length - 1)
            for position, length in zip(event.index, picture.shape[1::-1], strict=True)
        )
        return row, column, *self.look(chosen, name, other, row, column, stage, scale, threshold)

    def change_model(self, name: str) -> tuple:
        """What the controls offer for another model."""
        model = self.models[name]
        stages, layers = model.viewer.stages, list(model.viewer.layers)
        count = len(model.validation) if model.validation else 0
        return (
            gr.Gallery(
                [(small, example.name) for example, small in model.offers],
                label='Examples' if count else 'Examples (the validation set is not here)',
            ),
            gr.Number(
                label=f'Picture of the validation set, 0 to {count - 1}', visible=count > 0, value=0
            ),
            gr.Dropdown(stages, value=stages[-1]),
            gr.Dropdown(layers, value=layers[0] if layers else None, visible=bool(layers)),
        )

    @told(1)
    def kernels(self, name: str, layer: str | None) -> str:
        """The kernels of a layer."""
        if layer is None:
            raise UserError(f'{name} has no large depthwise kernel')
        return kernels_html(layer, self.models[name].viewer.kernels(layer))

    @told(1)
    def training(self, name: str, layer: str | None) -> str:
        """The masks of a layer in the checkpoints of the run, and the run's log."""
        model = self.models[name]
        if layer is None or model.folder is None:
            raise UserError(f'{name} has no work folder, or no large depthwise kernel')
        parts = list(model.viewer.kernels(layer).weights)
        return masks_over_training(model.folder, layer, parts)

    def _cost(self, viewer: Viewer, path: str) -> str:
        cost, seen = viewer.cost(path), viewer.see(path)
        text = f'{seen.milliseconds:.0f} ms on {viewer.device}'
        if cost is not None:
            text += (
                f' · {cost.macs / 1e9:.2f} GMACs dense, {cost.nonzero_macs / 1e9:.2f} non-zero · '
                f'{cost.parameters / 1e6:.2f} million parameters, '
                f'{cost.nonzero_parameters / 1e6:.2f} non-zero'
            )
        return f'<p id="cost">{text}</p>'


def enlargement(picture: np.ndarray) -> int:
    """How many times larger a picture (H, W, …) is sent."""
    return max(1, LEAST // max(picture.shape[:2]))


def enlarge(picture: np.ndarray) -> np.ndarray:
    """The picture as it is sent, each of its pixels a square."""
    times = enlargement(picture)
    return picture.repeat(times, 0).repeat(times, 1)


def found_html(prediction: Prediction) -> str:
    """What was found, as a table: a legend with shares, detections, or the top classes."""
    found = prediction.found
    if prediction.labels is not None:
        rows = [
            f'<tr><td><span class="swatch" style="background: rgb{colour}"></span>'
            f'{html.escape(name)}</td><td>{entry["share"]:.1%}</td></tr>'
            for entry, (name, colour) in zip(found['classes'], prediction.legend, strict=True)
        ]
        return f'<table><tr><th>class</th><th>share</th></tr>{"".join(rows)}</table>'
    if 'instances' not in found:
        rows = [(entry['name'], f'{entry["score"]:.1%}') for entry in found['classes']]
        return table(('class', 'probability'), rows)
    best = sorted(found['instances'], key=lambda entry: -entry['score'])
    rows = [(entry['name'], f'{entry["score"]:.2f}') for entry in best[:ROWS]]
    return f'<p>{len(best)} objects</p>' + table(('object', 'score'), rows)


def place_html(
    at: tuple[int, int],
    names: Sequence[str],
    fields: Sequence[Field],
    classes: Sequence[tuple[str, float] | None],
    scale: str,
) -> str:
    """The class of a place and the areas that hold shares of the contributions, by model."""
    head = ['model', 'class there', *(f'{threshold:.0%} in' for threshold in THRESHOLDS)]
    rows = [
        (
            name,
            f'{there[0]}, {there[1]:.1%}' if there else 'no object',
            *(f'{area.ratio:.1%}' for area in field.areas),
        )
        for name, field, there in zip(names, fields, classes, strict=True)
    ]
    height, width = fields[0].scores.shape
    stops = matplotlib.colormaps[COLOURS](np.linspace(0, 1, 5), bytes=True)[:, :3].tolist()
    least = '0.001 or less' if SCALES[scale] == 'log' else '0'
    stops = ', '.join(f'rgb{tuple(colour)}' for colour in stops)
    return (
        f'<p id="place">Row {at[0]}, column {at[1]} of {height} rows and {width} columns. The area '
        'that holds a share of all contributions is that of a square around the place, as a share '
        'of the picture.</p>'
        f'<div class="scroll">{table(head, rows)}</div>'
        f'<p>Contribution, as a share of the largest: {least}<span class="bar" role="img" '
        f'aria-label="from dark to bright" style="background: linear-gradient(to right, {stops})">'
        f'</span>1</p>'
    )


def build(models: dict[str, Model]) -> gr.Blocks:
    """The page.

    Args:
        models: By their names.
    """
    page = Page(models)
    names = list(models)
    with gr.Blocks(title='mmslak: see what it sees', analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        chosen = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                model = gr.Dropdown(names, value=names[0], label='Model', elem_id='model')
                upload = gr.File(
                    label='Your picture', file_types=list(PICTURE_SUFFIXES), elem_id='upload'
                )
                gallery = gr.Gallery(
                    label='Examples',
                    columns=3,
                    height=260,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id='examples',
                )
                sample = gr.Number(
                    label='Picture of the validation set', precision=0, elem_id='sample'
                )
                opacity = gr.Slider(
                    0, 1, 0.3, step=0.05, label='Opacity of the prediction', elem_id='opacity'
                )
                threshold = gr.Slider(
                    *(LOWEST, 1, 0.3),
                    step=0.05,
                    label='Lowest score of a detection',
                    elem_id='threshold',
                )
            with gr.Column(scale=3, min_width=300):
                prediction = picture('Prediction: click a place in it', 'prediction')
                found = gr.HTML(label='What was found', elem_id='found')
            with gr.Column(scale=3, min_width=300):
                truth = picture('Truth', 'truth', visible=False)
        gr.Markdown('## What a place looks at')
        with gr.Row():
            row = gr.Number(label='Row of the place', precision=0, elem_id='row', min_width=120)
            column = gr.Number(
                label='Column of the place', precision=0, elem_id='column', min_width=120
            )
            stage = gr.Dropdown([], label='Feature map', elem_id='stage', min_width=120)
            scale = gr.Radio(list(SCALES), value=next(iter(SCALES)), label='Scale', elem_id='scale')
            other = gr.Dropdown(
                [NO_MODEL, *names],
                value=names[1] if len(names) > 1 else NO_MODEL,
                label='Second model',
                elem_id='other',
                min_width=240,
            )
            look = gr.Button('Look at this place', elem_id='look', min_width=120)
        with gr.Row():
            first = picture('Receptive field', 'field')
            second = picture('Receptive field of the second model', 'field2', visible=False)
        place = gr.HTML(label='The place', elem_id='place-text')
        with gr.Accordion('Kernels', open=False, elem_id='kernels'):
            layer = gr.Dropdown([], label='Layer', elem_id='layer')
            with gr.Row():
                show_kernels = gr.Button('Show its kernels', elem_id='show-kernels')
                show_training = gr.Button('Masks over training', elem_id='show-training')
            kernels = gr.HTML(label='Kernels', elem_id='kernels-text')

        one = dict(concurrency_limit=1, concurrency_id='model', api_visibility='private')
        settings = [chosen, model, other, row, column, stage, scale, threshold]
        shown = dict(
            fn=page.show,
            inputs=[chosen, model, opacity, threshold],
            outputs=[prediction, truth, found],
            **one,
        )
        looked = dict(fn=page.look, inputs=settings, outputs=[first, second, place], **one)
        controls = dict(
            fn=page.change_model, inputs=[model], outputs=[gallery, sample, stage, layer], **one
        )
        at = dict(outputs=[chosen, row, column], show_progress='hidden', **one)
        for event in (
            blocks.load(**controls).success(page.choose_first, [model], **at),
            upload.upload(page.choose_upload, [upload], **at),
            gallery.select(page.choose_example, [model], **at),
            sample.submit(page.choose_sample, [model, sample], **at),
            model.input(**controls),
        ):
            event.success(**shown).success(**looked)
        opacity.input(**shown, trigger_mode='always_last')
        threshold.input(**shown, trigger_mode='always_last').success(**looked)
        for control in (stage, scale, other):
            control.input(**looked)
        for control in (row, column):
            control.submit(**looked)
        look.click(**looked)
        for image in (prediction, first, second):
            image.select(
                page.click,
                [chosen, model, other, stage, scale, threshold],
                [row, column, first, second, place],
                trigger_mode='multiple',  # each click is answered, one after the other
                **one,
            )
        show_kernels.click(page.kernels, [model, layer], [kernels], **one)
        show_training.click(page.training, [model, layer], [kernels], **one)
    return blocks


def picture(label: str, name: str, visible: bool = True) -> gr.Image:
    """A picture that is shown, and that can be clicked."""
    return gr.Image(
        label=label,
        elem_id=name,
        visible=visible,
        interactive=False,
        format='png',
        buttons=['fullscreen'],
        alt_text=label,
        height=HEIGHT,
        min_width=300,
    )


class NothingFromElsewhere:
    """Middleware that forbids the browser to load anything from another host.

    Args:
        app: The ASGI application.
    """

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def answer(message: dict) -> None:
            if message['type'] == 'http.response.start':
                message = dict(message, headers=[*message['headers'], POLICY])
            await send(message)

        await self.app(scope, receive, answer)


def serve(models: dict[str, Model], host: str, port: int | None, max_upload: int) -> None:
    """Serves the page until the process is told to end.

    Args:
        models: By their names.
        host: Address to listen at.
        port: None takes the first free one from 7860.
        max_upload: Megabytes of a picture.

    Raises:
        UserError: If it cannot listen there.
    """
    page = build(models)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=f'{max_upload}mb',
            prevent_thread_lock=True,
            quiet=True,
            theme=gr.themes.Base(  # fonts of the machine
                font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']
            ),
            css=STYLE,
            footer_links=[],
            app_kwargs=dict(middleware=[Middleware(NothingFromElsewhere)]),
        )
    except OSError as error:
        raise UserError(f'--host {host} --port {port or 7860}: {error}') from error
    print(f'mmslak app: {page.local_url} (Ctrl-C ends it)', flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
