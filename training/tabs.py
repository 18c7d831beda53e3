"""The tabs of demo.py's page. Each *_tab adds one, and returns the tab, its function, its inputs and its outputs."""

import html
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import gradio as gr
import numpy as np
from PIL import Image

from training.heatmaps import class_legend, heat_map, object_list, overlay, scale_legend
from training.pictures import RECONSTRUCTION, displayable

# No event is part of an API. If a slider moves while a picture is computed, only its last place is drawn next.
# With one `concurrency_id`, events run one after the other: an older result never replaces a newer one
EVENT = dict(api_visibility="private", show_progress="minimal", trigger_mode="always_last", concurrency_id="page")
STATE = dict(time_to_live=3600)  # seconds without a change after which what a visitor chose is forgotten
CLICKED = 1  # index in RECONSTRUCTION of the picture that can be clicked
METRICS = {  # row of the table -> prefix of PSNR and SSIM in metrics.json
    "masked patches": "masked",
    "whole image": "prediction",
    "with visible patches": "pasted",
}
LEAKS = "Predictions use the true mean and variance of each masked patch, which the model did not see."


def picture(label: str, **options) -> gr.Image:
    """Return a place for a small picture, whose pixels stay sharp when they are enlarged."""
    classes = ["pixels", "labelled", *options.pop("elem_classes", [])]
    # In full screen, a click would be taken for another place
    defaults = dict(buttons=[] if "clickable" in classes else ["fullscreen"], min_width=150)
    return gr.Image(label=label, elem_classes=classes, format="png", interactive=False, **defaults | options)


def gallery(label: str, columns: int, **options) -> gr.Gallery:
    """Return a gallery that shows all its pictures at once."""
    own = dict(columns=columns, height="auto", object_fit="contain", elem_classes=["labelled"], format="png")
    return gr.Gallery(label=label, **own, **options)


def if_chosen(draw: Callable, choice, *values):
    """Return the results of `draw`; leave the page as it is if no image is chosen, or its State has expired."""
    if choice is None:
        gr.Info("Choose an image first.")
        return gr.skip()
    return draw(choice, *values)


def one_line(text: str, colour: str = "inherit") -> str:
    return f'<div role="status" style="color: {colour}">{html.escape(text)}</div>'


def _columns(models: Sequence, indices: Sequence[int]) -> Iterator[int]:
    """Yield each index inside a column of its own, with the name of the model at its top if there are several."""
    with gr.Row():
        for i in indices:
            with gr.Column(min_width=320):  # below each other where it is narrower, as on a phone
                if len(models) > 1:
                    gr.Markdown(f"### `{models[i].name}`")
                yield i


def _mask_controls(models: Sequence, *, least: int = 1) -> list:
    """Add the controls of a mask that removes at least `least` %: ratio, strategy, seed, and use of true statistics."""
    start = max(round(100 * models[0].mask_ratio), least)
    ratio = gr.Slider(least, 99, start, step=1, label="Masked patches (%)", min_width=220)
    strategy = gr.Radio(["random", "block", "grid"], value="random", label="Pattern", min_width=220)
    seed = gr.Slider(0, 99, 0, step=1, label="Seed of the mask", min_width=220)
    leaks = any(model.leaks for model in models)
    truth = gr.Checkbox(True, label="True patch statistics", info=LEAKS, visible=leaks, min_width=220)
    return [ratio, strategy, seed, truth]


def reconstruct_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab that reconstructs from a mask, and return it, its function, its inputs and its outputs."""
    indices, places, outputs = [i for i, each in enumerate(models) if each.reconstructs], [], []
    with gr.Tab("Reconstruct") as tab:
        clicks = gr.State()  # a child of the tab: children of gr.Tabs are counted as tabs
        with gr.Row():
            controls = _mask_controls([models[i] for i in indices])
        with gr.Row():
            gr.Markdown("**Click** a patch of what the encoder sees to mask it, or to show it again.")
            undo = gr.Button("Undo clicks", size="sm", scale=0, min_width=140)
        for i in _columns(models, indices):
            with gr.Row(elem_classes=["tiles"]):
                row = [
                    picture(label, elem_classes=["clickable"] * (number == CLICKED))
                    for number, label in enumerate((*RECONSTRUCTION, "error of each patch"))
                ]
            outputs += [*row, gr.Markdown()]
            places.append((row[CLICKED], models[i].img_size))
        outputs.append(gr.HTML())
    draw, inputs = partial(if_chosen, partial(_reconstruct, models, indices)), [choice, *controls, clicks]
    for place, size in places:
        event = place.select(_click_of(size), [choice, *controls[:3], clicks], clicks, **EVENT)
        event.then(draw, inputs, outputs, **EVENT)
    undo.click(lambda: None, None, clicks, **EVENT).then(draw, inputs, outputs, **EVENT)
    gr.on([control.change for control in controls], draw, inputs, outputs, **EVENT)
    return tab, draw, inputs, outputs


def _factor(size: tuple[int, int]) -> int:
    """Return how many times larger a picture that is clicked is sent than its `size`.

    gradio converts the place of a click only in a picture that the page shrinks; the page shows none 512 pixels wide.
    """
    return -(-512 // max(size))


def _clickable(tile: Image.Image) -> Image.Image:
    """Return a picture at the size at which it can be clicked. Compressing it as PNG takes most of the page's time."""
    factor = _factor(tile.size)
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _place_of(event: gr.SelectData, size: tuple[int, int]) -> tuple[float, float]:
    """Return where (x, y), in [0, 1], a `_clickable` picture of `size` (H, W) pixels was clicked."""
    height, width = (side * _factor(size) for side in size)
    return (event.index[0] + 0.5) / width, (event.index[1] + 0.5) / height


def _click_of(size: tuple[int, int]) -> Callable:
    """Return a function that adds a click, in a picture of `size` (H, W) pixels, to the clicks on the same mask."""

    def add(choice, ratio, strategy, seed, clicks, event: gr.SelectData):
        if choice is None:
            return None
        mask = (choice.time, ratio, strategy, seed)
        return mask, (*(clicks[1] if clicks and clicks[0] == mask else ()), _place_of(event, size))

    return add


def _reconstruct(models: Sequence, indices: Sequence[int], choice, ratio, strategy, seed, truth, clicks) -> list:
    """Return the outputs of the tab: pictures and table of each model, and the legend of the errors."""
    clicked = clicks[1] if clicks and clicks[0] == (choice.time, ratio, strategy, seed) else ()
    mask = dict(mask_ratio=ratio / 100, strategy=strategy, seed=int(seed), clicks=clicked)
    results = _results(models, indices, choice, mask, true_statistics=truth)
    return _show(models, indices, choice, results, list(METRICS), tiles=(0, 1, 2, 3), leaks=truth)


def _results(models: Sequence, indices: Sequence[int], choice, mask: dict, **options) -> list:
    """Return the reconstruction of each model, None where it cannot read the image."""
    results = []
    for i in indices:
        if isinstance(choice.inputs[i], str):
            results.append(None)
            continue
        noise, num_kept = models[i].draw_mask(choice.index, **mask)
        results.append(models[i].reconstruct(choice.inputs[i].whole, noise, num_kept, **options))
    return results


def _show(models: Sequence, indices, choice, results, rows, *, tiles: Sequence[int], leaks: bool) -> list:
    """Return the outputs of a tab of reconstructions: some `tiles`, the errors and a table of each, and a legend."""
    high, outputs = max((np.nanmax(result.errors) for result in results if result), default=1), []
    for i, result in zip(indices, results, strict=True):
        if result is None:
            outputs += [*[None] * (len(tiles) + 1), _unreadable(models[i], choice.inputs[i])]
            continue
        outputs += [_clickable(result.tiles[k]) if k == CLICKED else result.tiles[k] for k in tiles]
        note = f"{result.num_kept} of {models[i].num_patches} patches are seen at a time."
        note += f" {LEAKS}" * (leaks and models[i].leaks)
        outputs += [heat_map(result.errors, 0, high), f"{_table(result, rows)}\n\n{note}"]
    text = "error of a patch: root mean square over its pixels, where white is 1"
    text += "; grey patches were visible" if len(rows) > 1 else ""
    return [*outputs, scale_legend("0", f"{high:.3f}", text)]


def _table(result, rows: Sequence[str]) -> str:
    """Return PSNR and SSIM of a reconstruction as a table, beside those of the mean colour of the visible patches."""
    columns = {"prediction": result.metrics, "mean visible colour": result.baseline}
    columns = {name: metrics for name, metrics in columns.items() if metrics}
    lines = [["PSNR, SSIM", *columns], ["---"] + ["---:"] * len(columns)]
    for row in rows:
        psnr, ssim = (f"{METRICS[row]}_{name}" for name in ("psnr", "ssim"))
        lines.append([row, *(f"{metrics[psnr]:.2f} dB, {metrics[ssim]:.3f}" for metrics in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unreadable(model, reason: str) -> str:
    return f"`{model.name}` cannot read this image: {reason}."


def fill_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab that predicts every patch from masks that remove it."""
    indices, outputs = [i for i, each in enumerate(models) if each.reconstructs], []
    with gr.Tab("Fill everything") as tab:
        gr.Markdown("Several masks remove each patch at least once: all that is shown was predicted while hidden.")
        with gr.Row():  # below 10 %, up to 100 masks would be needed
            controls = _mask_controls([models[i] for i in indices], least=10)
        for _ in _columns(models, indices):
            with gr.Row(elem_classes=["tiles"]):
                outputs += [picture(label) for label in ("original", "every patch predicted", "error of each patch")]
            outputs.append(gr.Markdown())
        outputs.append(gr.HTML())
    draw, inputs = partial(if_chosen, partial(_fill, models, indices)), [choice, *controls]
    gr.on([control.change for control in controls], draw, inputs, outputs, **EVENT)
    return tab, draw, inputs, outputs


def _fill(models: Sequence, indices: Sequence[int], choice, ratio, strategy, seed, truth) -> list:
    """Return the outputs of the tab, as `_reconstruct` does."""
    mask = dict(mask_ratio=ratio / 100, strategy=strategy, seed=int(seed))
    results = _results(models, indices, choice, mask, true_statistics=truth, everywhere=True)
    return _show(models, indices, choice, results, ["whole image"], tiles=(0, 2), leaks=truth)


def classify_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab of the likeliest classes or labels, or of numbers."""
    indices, outputs = [i for i, each in enumerate(models) if each.classifies], []
    with gr.Tab("Classify") as tab:
        for i in _columns(models, indices):
            with gr.Row():
                outputs.append(picture("what the model sees", scale=1))
                problem = models[i].model.problem
                if problem == "numbers":
                    outputs.append(gr.Markdown())
                else:  # all labels, since each is a question of its own
                    most = None if problem == "labels" else 8
                    outputs.append(gr.Label(label=problem, num_top_classes=most, scale=2))
            outputs.append(gr.HTML())
    return tab, partial(if_chosen, partial(_classify, models, indices)), [choice], outputs


def _classify(models: Sequence, indices: Sequence[int], choice) -> list:
    outputs = []
    for i in indices:
        if isinstance(choice.inputs[i], str):
            outputs += [None, None, one_line(_unreadable(models[i], choice.inputs[i]))]
            continue
        result = models[i].classify(choice.inputs[i].view)
        if models[i].model.problem == "numbers":
            rows = [f"| {in_markdown(name)} | {value:.6g} |" for name, value in result.items()]
            result = "\n".join(["| name | number |", "| --- | ---: |", *rows])
        outputs += [_pixels(choice.inputs[i].view), result, ""]
    return outputs


def in_markdown(text: str) -> str:
    """Return text for a cell of a Markdown table: in one line, with all punctuation escaped."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _pixels(image) -> np.ndarray:
    """Return an image (C, H, W) as gr.Image takes it."""
    pixels = displayable(image).numpy()
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def segment_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab of the classes of pixels."""
    slider = dict(minimum=0, value=60, label="Opacity of the classes (%)")
    indices = [i for i, each in enumerate(models) if each.segments]
    functions = dict(compute=lambda model, inputs: model.segment(inputs), draw=_draw_classes)
    return _slider_tab(models, indices, choice, names=("Segment", "classes of pixels"), slider=slider, **functions)


def _draw_classes(model, inputs, classes: np.ndarray, opacity: float) -> tuple[Image.Image, str]:
    image = displayable(inputs.picture).numpy()
    return overlay(image, classes, model.colours, opacity), class_legend(classes, model.classes, model.colours)


def detect_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab of the objects in an image."""
    indices = [i for i, each in enumerate(models) if each.detects]
    slider = dict(minimum=5, value=100 * models[indices[0]].least_score, label="Least score (%)")
    functions = dict(compute=lambda model, inputs: model.detect(inputs), draw=_draw_objects)
    return _slider_tab(models, indices, choice, names=("Detect", "objects"), slider=slider, **functions)


def _draw_objects(model, inputs, records, least_score: float) -> tuple[Image.Image, str]:
    drawn, records = model.draw_objects(inputs, records, least_score)
    return drawn, object_list(records, model.classes, model.colours)


def _slider_tab(
    models: Sequence,
    indices: Sequence[int],
    choice: gr.State,
    *,
    names,
    slider: dict,
    compute: Callable,
    draw: Callable,
) -> tuple:
    """Add a tab of pictures that a slider changes without another forward pass.

    Args:
        names: titles of the tab and of the pictures.
        slider: options of the slider, in percent.
        compute: (model, its inputs) -> a result for `draw`.
        draw: (model, its inputs, the result, the slider's value in [0, 1]) -> a picture, and HTML that explains it.
    """
    places = []
    with gr.Tab(names[0]) as tab:
        results = gr.State(**STATE)
        slider = gr.Slider(maximum=100, step=1, **slider)
        for _ in _columns(models, indices):
            with gr.Row():
                places += [picture(names[1], elem_classes=["smooth"], min_width=300, scale=3), gr.HTML(min_width=200)]
    again = partial(if_chosen, partial(_draw_again, models, indices, draw))
    slider.change(again, [choice, results, slider], places, **EVENT)
    both = partial(if_chosen, partial(_compute_and_draw, models, indices, compute, draw))
    return tab, both, [choice, slider], [results, *places]


def _compute_and_draw(models: Sequence, indices: Sequence[int], compute: Callable, draw: Callable, choice, percent):
    """Return the time of the image with the result of each model, and then a picture and HTML for each."""
    inputs = [choice.inputs[i] for i in indices]
    results = [
        None if isinstance(each, str) else compute(models[i], each) for i, each in zip(indices, inputs, strict=True)
    ]
    return [(choice.time, results), *_draw_again(models, indices, draw, choice, (choice.time, results), percent)]


def _draw_again(models: Sequence, indices: Sequence[int], draw: Callable, choice, results, percent) -> list | dict:
    """Return a picture and HTML for each model; skip if there are no `results`, or those of another image."""
    if results is None or results[0] != choice.time:
        return gr.skip()
    outputs = []
    for i, result in zip(indices, results[1], strict=True):
        if result is None:
            outputs += [None, one_line(_unreadable(models[i], choice.inputs[i]))]
        else:
            outputs += draw(models[i], choice.inputs[i], result, percent / 100)
    return outputs


def look_tab(models: Sequence, choice: gr.State, choose: Callable, other: Callable) -> tuple:
    """Add the tab of features and attention of two images.

    `choose` adds the controls for the second image, and returns their events; `other` returns its default.
    """
    indices, outputs, places = [i for i, each in enumerate(models) if not each.detects], [], []
    with gr.Tab("Look inside") as tab:
        second, features = gr.State(**STATE), gr.State(**STATE)
        gr.Markdown(
            "**Colours** are the first three principal components of the patch features of both images: equal colours "
            "are similar features. **Click** a patch of an image to see how similar all patches are to it."
        )
        with gr.Accordion("Choose the second image", open=False):
            events = choose(second, label="Second image")
        for i in _columns(models, indices):
            model, seen, similar = models[i], [], []
            compares = model.compares
            with gr.Row(elem_classes=["tiles"]):
                for name in ("first", "second"):
                    seen.append(picture(f"{name} image", elem_classes=["clickable"] * compares))
                    colours = picture("features as colours", visible=compares)
                    similar.append(picture("similarity to the patch", visible=compares))
                    outputs += [seen[-1], colours, similar[-1]]
            outputs.append(gr.HTML())
            if compares:
                places += [(place, i, image, [*similar, outputs[-1]]) for image, place in enumerate(seen)]
            heads = f"attention of the {'class token, by head' if model.attends == 'head' else 'queries of the probe'}"
            outputs += [gallery(f"{name} image: {heads}", 6, buttons=[]) for name in ("first", "second")]
    draw = partial(if_chosen, partial(_look, models, indices, other))
    inputs, results = [choice, second], [features, *outputs]
    for event in events:
        event.then(draw, inputs, results, **EVENT)
    for place, i, image, results_of_click in places:
        place.select(_similarity_of(models[i], i, image), features, results_of_click, **EVENT)
    return tab, draw, inputs, results


def _look(models: Sequence, indices: Sequence[int], other: Callable, choice, second) -> list:
    """Return the features by model index, and nine outputs for each model in the tab."""
    second = second or other() or choice
    all_features, outputs = {}, []
    for i in indices:
        model, pair = models[i], (choice.inputs[i], second.inputs[i])
        if any(isinstance(inputs, str) for inputs in pair):
            reason = next(inputs for inputs in pair if isinstance(inputs, str))
            outputs += [*[None] * 6, one_line(_unreadable(model, reason)), None, None]
            continue
        features, colours, attention = model.look(pair)
        similar, legend = [None] * 2, ""
        if model.compares:
            all_features[i], (similar, legend) = features, _similarity(model, features, 0, 0.5, 0.5)
        for inputs, colour, values in zip(pair, colours, similar, strict=True):
            seen = Image.fromarray(_pixels(inputs.whole if model.segments else inputs.view))
            outputs += [_clickable(seen), colour if model.compares else None, values]
        outputs += [legend, *attention]
    return [all_features, *outputs]


def _similarity_of(model, i: int, image: int) -> Callable:
    """Return a function that shows the similarity to a patch of an image that is clicked."""

    def show(features, event: gr.SelectData):
        if features is None or i not in features:
            return gr.skip()
        maps, legend = _similarity(model, features[i], image, *_place_of(event, model.img_size))
        return [*maps, legend]

    return show


def _similarity(model, features, image: int, x: float, y: float) -> tuple[list, str]:
    """Return maps of the similarity of all patches to that at (x, y) in [0, 1], and their legend."""
    values, (row, column) = model.compare(features, image, x, y)
    low = float(min(each.min() for each in values))
    text = f"cosine similarity to row {row + 1}, column {column + 1} of the {('first', 'second')[image]} image"
    return [heat_map(each, low, 1) for each in values], scale_legend(f"{low:.2f}", "1", text)


def nearest_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab of the nearest images of a folder."""
    indices, outputs = [i for i, each in enumerate(models) if each.bank], []
    with gr.Tab("Nearest") as tab:
        for i in _columns(models, indices):
            label = f"nearest of {len(models[i].bank[1])} images, by cosine similarity"
            outputs += [gallery(label, 4, buttons=[]), gr.HTML()]
    return tab, partial(if_chosen, partial(_nearest, models, indices)), [choice], outputs


def _nearest(models: Sequence, indices: Sequence[int], choice) -> list:
    """Return the pictures of the nearest images, and a line on an image that cannot be read, for each model."""
    outputs = []
    for i in indices:
        inputs = choice.inputs[i]
        unreadable = isinstance(inputs, str)
        outputs += (
            [None, one_line(_unreadable(models[i], inputs))] if unreadable else [models[i].nearest(inputs.view), ""]
        )
    return outputs
