"""The tabs of demo.py's page. Each function adds one, and returns it, its function, its inputs and its outputs."""

import html
import re
from collections.abc import Callable, Sequence
from functools import partial

import gradio as gr
import numpy as np
from PIL import Image

from training.heatmaps import class_legend, heat_map, overlay, scale_legend
from training.pictures import RECONSTRUCTION, displayable

# No event is part of an API; a slider that moves on while a picture is computed asks for its last place alone
EVENT = dict(api_visibility="private", show_progress="minimal", trigger_mode="always_last")
STATE = dict(time_to_live=3600)  # seconds without a change after which what a visitor chose is forgotten
CLICKED = 1  # of the pictures RECONSTRUCTION
METRICS = {  # row of the table -> PSNR and SSIM in metrics.json
    "removed patches": ("masked_psnr", "masked_ssim"),
    "the same, filled with the visible mean": ("masked_psnr_visible_mean", None),
    "whole prediction": ("prediction_psnr", "prediction_ssim"),
    "with visible patches": ("pasted_psnr", "pasted_ssim"),
}
LEAKS = "Predictions use the true mean and variance of each removed patch, which the model did not see."


def picture(label: str, **options) -> gr.Image:
    """Return a place for a small picture, whose pixels stay sharp when they are enlarged."""
    classes = ["pixels", "labelled", *options.pop("elem_classes", [])]
    # In full screen a click would have another place
    defaults = dict(buttons=[] if "clickable" in classes else ["fullscreen"], min_width=150)
    return gr.Image(label=label, elem_classes=classes, format="png", interactive=False, **defaults | options)


def gallery(label: str, columns: int, **options) -> gr.Gallery:
    """Return a place for pictures, all of which are seen."""
    own = dict(columns=columns, height="auto", object_fit="contain", elem_classes=["labelled"], format="png")
    return gr.Gallery(label=label, **own, **options)


def if_chosen(draw: Callable, choice, *values):
    """Return what `draw` does, or leave all as it is if no image is chosen, or it is forgotten."""
    if choice is None:
        gr.Info("Choose an image first.")
        return gr.skip()
    return draw(choice, *values)


def one_line(text: str, colour: str = "inherit") -> str:
    return f'<div role="status" style="color: {colour}">{html.escape(text)}</div>'


def _name_models(models: Sequence, i: int) -> None:
    """Add the name of a model above its results, if there are several."""
    if len(models) > 1:
        gr.Markdown(f"### `{models[i].name}`")


def _mask_controls(models: Sequence, *, least: int = 1) -> list:
    """Add the controls of a mask that removes at least `least` %: ratio, strategy, seed, and use of true statistics."""
    start = max(round(100 * models[0].mask_ratio), least)
    ratio = gr.Slider(least, 99, start, step=1, label="Removed patches (%)", min_width=220)
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
            gr.Markdown("**Click** a patch of what the encoder sees to remove it, or to put it back.")
            undo = gr.Button("Undo clicks", size="sm", scale=0, min_width=140)
        for i in indices:
            _name_models(models, i)
            with gr.Row():
                row = [
                    picture(label, elem_classes=["clickable"] * (i == CLICKED))
                    for i, label in enumerate(RECONSTRUCTION)
                ]
                row.append(picture("error of each patch"))
            outputs += row
            places.append((row[CLICKED], models[i].img_size))
        outputs += [gr.HTML(), gr.Markdown()]
    draw, inputs = partial(if_chosen, partial(_reconstruct, models, indices)), [choice, *controls, clicks]
    for place, size in places:
        event = place.select(_click_of(size), [choice, *controls[:3], clicks], clicks, **EVENT)
        event.then(draw, inputs, outputs, **EVENT)
    undo.click(lambda: None, None, clicks, **EVENT).then(draw, inputs, outputs, **EVENT)
    gr.on([control.change for control in controls], draw, inputs, outputs, **EVENT)
    return tab, draw, inputs, outputs


def _factor(size: tuple[int, int]) -> int:
    """Return how many times larger a picture that is clicked is sent than its `size`.

    gradio takes places for those in a picture that is shrunk, never enlarged, and none is shown 512 pixels wide.
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
    """Return the outputs of the tab: pictures of each model, the legend of the errors, the table."""
    clicked = clicks[1] if clicks and clicks[0] == (choice.time, ratio, strategy, seed) else ()
    mask = dict(mask_ratio=ratio / 100, strategy=strategy, seed=int(seed), clicks=clicked)
    results = _results(models, indices, choice, mask, true_statistics=truth)
    return _show(models, indices, choice, results, METRICS, tiles=(0, 1, 2, 3), leaks=truth)


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


def _show(models: Sequence, indices, choice, results, metrics, *, tiles: Sequence[int], leaks: bool) -> list:
    """Return the outputs of a tab of reconstructions: some `tiles` and the errors of each, a legend, and a table."""
    high = max((np.nanmax(result.errors) for result in results if result), default=1)
    pictures = []
    for result in results:
        if result is None:
            pictures += [None] * (len(tiles) + 1)
            continue
        pictures += [_clickable(result.tiles[i]) if i == CLICKED else result.tiles[i] for i in tiles]
        pictures.append(heat_map(result.errors, 0, high))
    head = ["", *(f"`{models[i].name}`" for i in indices)] if len(indices) > 1 else ["", "PSNR, SSIM"]
    lines = [head, ["---"] + ["---:"] * len(indices)]
    for text, (psnr, ssim) in metrics.items():
        lines.append([text, *(_score(result, psnr, ssim) for result in results)])
    counts = [(models[i], result) for i, result in zip(indices, results, strict=True) if result]
    notes = [f"{result.num_kept} of {model.num_patches} patches are seen at a time." for model, result in counts]
    notes += [LEAKS] * (leaks and any(model.leaks for model, _ in counts))
    notes += [_unreadable(models[i], choice.inputs[i]) for i in indices if isinstance(choice.inputs[i], str)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = "error of a patch: root mean square over its pixels, where white is 1"
    text += "; grey patches were visible" if len(metrics) > 1 else ""
    return [*pictures, scale_legend("0", f"{high:.3f}", text), table + "\n\n" + " ".join(dict.fromkeys(notes))]


def _score(result, psnr: str, ssim: str | None) -> str:
    """Return a cell of the table."""
    if not result:
        return ""
    return f"{result.metrics[psnr]:.2f} dB" + (f", {result.metrics[ssim]:.3f}" if ssim else "")


def _unreadable(model, reason: str) -> str:
    return f"`{model.name}` cannot read this image: {reason}."


def fill_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab that predicts every patch from masks that remove it."""
    indices, outputs = [i for i, each in enumerate(models) if each.reconstructs], []
    with gr.Tab("Fill everything") as tab:
        gr.Markdown("Several masks remove each patch at least once: all that is shown was predicted while hidden.")
        with gr.Row():  # below 10 %, up to 100 masks would be needed
            controls = _mask_controls([models[i] for i in indices], least=10)
        for i in indices:
            _name_models(models, i)
            with gr.Row():
                outputs += [picture(label) for label in ("original", "every patch predicted", "error of each patch")]
        outputs += [gr.HTML(), gr.Markdown()]
    draw, inputs = partial(if_chosen, partial(_fill, models, indices)), [choice, *controls]
    gr.on([control.change for control in controls], draw, inputs, outputs, **EVENT)
    return tab, draw, inputs, outputs


def _fill(models: Sequence, indices: Sequence[int], choice, ratio, strategy, seed, truth) -> list:
    """Return the outputs of the tab, as `_reconstruct` does."""
    mask = dict(mask_ratio=ratio / 100, strategy=strategy, seed=int(seed))
    results = _results(models, indices, choice, mask, true_statistics=truth, everywhere=True)
    metrics = {name: METRICS[name] for name in ("whole prediction",)}
    return _show(models, indices, choice, results, metrics, tiles=(0, 2), leaks=truth)


def classify_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab of the likeliest classes or labels, or of numbers."""
    indices, outputs = [i for i, each in enumerate(models) if each.classifies], []
    with gr.Tab("Classify") as tab:
        for i in indices:
            _name_models(models, i)
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
    """Return text in one line for a cell of a Markdown table, in which no character has a meaning."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _pixels(image) -> np.ndarray:
    """Return an image (C, H, W) as gr.Image takes it."""
    pixels = displayable(image).numpy()
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def segment_tab(models: Sequence, choice: gr.State) -> tuple:
    """Add the tab of the classes of pixels."""
    indices, places = [i for i, each in enumerate(models) if each.segments], []
    with gr.Tab("Segment") as tab:
        labels = gr.State(**STATE)
        opacity = gr.Slider(0, 100, 60, step=1, label="Opacity of the classes (%)")
        for i in indices:
            _name_models(models, i)
            with gr.Row():
                places += [picture("classes of pixels", min_width=300, scale=3), gr.HTML(min_width=200)]
    blend = partial(if_chosen, partial(_blend, models, indices))
    opacity.change(blend, [choice, labels, opacity], places, **EVENT)
    return tab, partial(if_chosen, partial(_segment, models, indices)), [choice, opacity], [labels, *places]


def _segment(models: Sequence, indices: Sequence[int], choice, opacity) -> list:
    """Return the time of the image with the classes of its pixels for each model; an overlay and a legend for each."""
    inputs = [choice.inputs[i] for i in indices]
    classes = [
        None if isinstance(each, str) else models[i].segment(each) for i, each in zip(indices, inputs, strict=True)
    ]
    return [(choice.time, classes), *_blend(models, indices, choice, (choice.time, classes), opacity)]


def _blend(models: Sequence, indices: Sequence[int], choice, labels, opacity) -> list | dict:
    """Return an overlay and a legend for each model; skip if `labels` are those of another image, or none yet."""
    if labels is None or labels[0] != choice.time:
        return gr.skip()
    outputs = []
    for i, classes in zip(indices, labels[1], strict=True):
        if classes is None:
            outputs += [None, one_line(_unreadable(models[i], choice.inputs[i]))]
            continue
        image = displayable(choice.inputs[i].picture).numpy()
        outputs.append(overlay(image, classes, models[i].colours, opacity / 100))
        outputs.append(class_legend(classes, models[i].classes, models[i].colours))
    return outputs


def look_tab(models: Sequence, choice: gr.State, choose: Callable, other: Callable) -> tuple:
    """Add the tab of features and attention of two images.

    `choose` adds places to choose the second image, and returns their events; `other` returns it until one is chosen.
    """
    outputs, places = [], []
    with gr.Tab("Look inside") as tab:
        second, features = gr.State(**STATE), gr.State(**STATE)
        gr.Markdown(
            "**Colours** are the first three principal components of the patch features of both images: equal colours "
            "are similar features. **Click** a patch of an image to see how similar all patches are to it."
        )
        with gr.Accordion("Choose the second image", open=False):
            events = choose(second, label="Second image")
        for i, model in enumerate(models):
            _name_models(models, i)
            compares, seen, similar = not model.segments, [], []  # a segmenter's encoder has no final norm
            with gr.Row():
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
    draw, inputs, results = partial(if_chosen, partial(_look, models, other)), [choice, second], [features, *outputs]
    for event in events:
        event.then(draw, inputs, results, **EVENT)
    for place, i, image, results_of_click in places:
        place.select(_similarity_of(models[i], i, image), features, results_of_click, **EVENT)
    return tab, draw, inputs, results


def _look(models: Sequence, other: Callable, choice, second) -> list:
    """Return the features of each model, and its nine outputs."""
    second = second or other() or choice
    all_features, outputs = [], []
    for model, *pair in zip(models, choice.inputs, second.inputs, strict=True):
        if any(isinstance(inputs, str) for inputs in pair):
            reason = next(inputs for inputs in pair if isinstance(inputs, str))
            all_features.append(None)
            outputs += [*[None] * 6, one_line(_unreadable(model, reason)), None, None]
            continue
        features, colours, attention = model.look(pair)
        all_features.append(None if model.segments else features)
        similar, legend = ([None] * 2, "") if model.segments else _similarity(model, features, 0, 0.5, 0.5)
        for inputs, colour, values in zip(pair, colours, similar, strict=True):
            seen = Image.fromarray(_pixels(inputs.whole if model.segments else inputs.view))
            outputs += [_clickable(seen), None if model.segments else colour, values]
        outputs += [legend, *attention]
    return [all_features, *outputs]


def _similarity_of(model, i: int, image: int) -> Callable:
    """Return a function that shows the similarity to a patch of an image that is clicked."""

    def show(features, event: gr.SelectData):
        if features is None or features[i] is None:
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
        for i in indices:
            label = f"nearest of {len(models[i].bank[1])} images, by cosine similarity: {models[i].name}"
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
