"""The tabs of demo.py's page. Each function adds one, and returns it, its function, its inputs and its outputs."""

import html
from collections.abc import Callable, Sequence
from functools import partial

import gradio as gr
import numpy as np
from PIL import Image

from training.heatmaps import class_legend, heat_map, overlay, scale_legend
from training.pictures import RECONSTRUCTION, displayable

# No event is part of an API; a slider that moves on while a picture is computed asks for its last place alone
EVENT = dict(api_visibility="private", show_progress="minimal", trigger_mode="always_last")
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
    shown = dict(buttons=["fullscreen"], min_width=150, format="png", interactive=False)
    return gr.Image(label=label, elem_classes=classes, **shown | options)


def gallery(label: str, columns: int, **options) -> gr.Gallery:
    """Return a place for pictures, all of which are seen."""
    shown = dict(columns=columns, height="auto", object_fit="contain", elem_classes=["labelled"])
    return gr.Gallery(label=label, **shown | options)


def one_line(text: str, colour: str = "inherit") -> str:
    return f'<div role="status" style="color: {colour}">{html.escape(text)}</div>'


def _name_models(models: Sequence, i: int) -> None:
    """Add the name of a model above its results, if there are several."""
    if len(models) > 1:
        gr.Markdown(f"### `{models[i].name}`")


def _mask_controls(model) -> list:
    """Add the controls of a mask, and return those of ratio, strategy and seed."""
    ratio = gr.Slider(1, 99, round(100 * model.mask_ratio), step=1, label="Removed patches (%)", min_width=220)
    strategy = gr.Radio(["random", "block", "grid"], value="random", label="Pattern", min_width=220)
    return [ratio, strategy, gr.Slider(0, 99, 0, step=1, label="Seed of the mask", min_width=220)]


def reconstruct_tab(models: Sequence, picked: gr.State) -> tuple:
    """Add the tab that reconstructs from a mask, and return it, its function, its inputs and its outputs."""
    numbers, places, outputs = [i for i, each in enumerate(models) if each.reconstructs], [], []
    leaks = any(model.reconstructs and model.leaks for model in models)
    with gr.Tab("Reconstruct") as tab:
        clicks = gr.State()  # a child of the tab: children of gr.Tabs are counted as tabs
        with gr.Row():
            controls = _mask_controls(models[numbers[0]])
            truth = gr.Checkbox(True, label="True patch statistics", info=LEAKS, visible=leaks, min_width=220)
        with gr.Row():
            gr.Markdown("**Click** a patch of what the encoder sees to remove it, or to put it back.")
            undo = gr.Button("Undo clicks", size="sm", scale=0, min_width=140)
        for i in numbers:
            _name_models(models, i)
            with gr.Row():
                row = [picture(label, elem_classes=["clickable"] * (i == 1)) for i, label in enumerate(RECONSTRUCTION)]
                row.append(picture("error of each patch"))
            outputs += row
            places.append((row[1], models[i].img_size))
        outputs += [gr.HTML(), gr.Markdown()]
    draw, inputs = partial(_reconstruct, models, numbers), [picked, *controls, truth, clicks]
    for place, size in places:
        event = place.select(_click_of(size), [picked, *controls, clicks], clicks, **EVENT)
        event.then(draw, inputs, outputs, **EVENT)
    undo.click(lambda: None, None, clicks, **EVENT).then(draw, inputs, outputs, **EVENT)
    gr.on([control.change for control in (*controls, truth)], draw, inputs, outputs, **EVENT)
    return tab, draw, inputs, outputs


def _factor(size: tuple[int, int]) -> int:
    """Return how many times larger a picture that is clicked is sent than its `size`.

    gradio takes places for those in a picture that is shrunk, never enlarged, and none is shown 512 pixels wide.
    """
    return -(-512 // max(size))


def _enlarged(shown: Image.Image) -> Image.Image:
    """Return a picture that can be clicked."""
    factor = _factor(shown.size)
    return shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)


def _place_of(event: gr.SelectData, size: tuple[int, int]) -> tuple[float, float]:
    """Return where (x, y), in [0, 1], an `_enlarged` picture of `size` (H, W) pixels was clicked."""
    height, width = (side * _factor(size) for side in size)
    return (event.index[0] + 0.5) / width, (event.index[1] + 0.5) / height


def _click_of(size: tuple[int, int]) -> Callable:
    """Return a function that adds a click, in a picture of `size` (H, W) pixels, to the clicks on the same mask."""

    def add(picked, ratio, strategy, seed, clicks, event: gr.SelectData):
        mask = (picked.time, ratio, strategy, seed)
        return mask, (*(clicks[1] if clicks and clicks[0] == mask else ()), _place_of(event, size))

    return add


def _reconstruct(models: Sequence, numbers: Sequence[int], picked, ratio, strategy, seed, truth, clicks) -> list:
    """Return the outputs of the tab: pictures of each model, the legend of the errors, the table."""
    mask = (picked.time, ratio, strategy, seed)
    options = dict(mask_ratio=ratio / 100, strategy=strategy, seed=int(seed))
    options |= dict(clicks=clicks[1] if clicks and clicks[0] == mask else ())
    results = []
    for i in numbers:
        if isinstance(picked.inputs[i], str):
            results.append(None)
            continue
        noise, num_kept = models[i].draw_mask(picked.index, **options)
        results.append(models[i].reconstruct(picked.inputs[i].whole, noise, num_kept, true_statistics=truth))
    return _show(models, numbers, picked, results, METRICS, tiles=(0, 1, 2, 3), leaks=truth)


def _show(models: Sequence, numbers, picked, results, metrics, *, tiles: Sequence[int], leaks: bool) -> list:
    """Return the outputs of a tab of reconstructions: some `tiles` and the errors of each, a legend, and a table."""
    high = max((np.nanmax(result.errors) for result in results if result), default=1)
    pictures = []
    for result in results:
        shown = [_enlarged(result.tiles[i]) for i in tiles] + [heat_map(result.errors, 0, high)] if result else None
        pictures += shown or [None] * (len(tiles) + 1)
    head = ["", *(f"`{models[i].name}`" for i in numbers)] if len(numbers) > 1 else ["", "PSNR, SSIM"]
    lines = [head, ["---"] + ["---:"] * len(numbers)]
    for text, (psnr, ssim) in metrics.items():
        lines.append([text, *(_score(result, psnr, ssim) for result in results)])
    counts = [(models[i], result) for i, result in zip(numbers, results, strict=True) if result]
    notes = [f"{result.num_kept} of {model.num_patches} patches are seen at a time." for model, result in counts]
    notes += [LEAKS] * (leaks and any(model.leaks for model, _ in counts))
    notes += [_unreadable(models[i], picked.inputs[i]) for i in numbers if isinstance(picked.inputs[i], str)]
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


def fill_tab(models: Sequence, picked: gr.State) -> tuple:
    """Add the tab that predicts every patch from masks that remove it."""
    numbers, outputs = [i for i, each in enumerate(models) if each.reconstructs], []
    with gr.Tab("Fill everything") as tab:
        gr.Markdown("Several masks remove each patch at least once: all that is shown was predicted while hidden.")
        with gr.Row():
            controls = _mask_controls(models[numbers[0]])
        for i in numbers:
            _name_models(models, i)
            with gr.Row():
                outputs += [picture(label) for label in ("original", "every patch predicted", "error of each patch")]
        outputs += [gr.HTML(), gr.Markdown()]
    draw, inputs = partial(_fill, models, numbers), [picked, *controls]
    gr.on([control.change for control in controls], draw, inputs, outputs, **EVENT)
    return tab, draw, inputs, outputs


def _fill(models: Sequence, numbers: Sequence[int], picked, ratio, strategy, seed) -> list:
    """Return the outputs of the tab, as `_reconstruct` does."""
    results = []
    for i in numbers:
        if isinstance(picked.inputs[i], str):
            results.append(None)
            continue
        mask = models[i].draw_mask(picked.index, mask_ratio=ratio / 100, strategy=strategy, seed=int(seed))
        results.append(models[i].reconstruct(picked.inputs[i].whole, *mask, everywhere=True))
    metrics = {name: METRICS[name] for name in ("whole prediction",)}
    return _show(models, numbers, picked, results, metrics, tiles=(0, 2), leaks=True)


def classify_tab(models: Sequence, picked: gr.State) -> tuple:
    """Add the tab of the likeliest classes or labels, or of numbers."""
    numbers, outputs = [i for i, each in enumerate(models) if each.classifies], []
    with gr.Tab("Classify") as tab:
        for i in numbers:
            _name_models(models, i)
            with gr.Row():
                outputs.append(picture("what the model sees", scale=1))
                if models[i].model.problem == "numbers":
                    outputs.append(gr.Markdown())
                else:
                    outputs.append(gr.Label(label=models[i].model.problem, num_top_classes=8, scale=2))
    return tab, partial(_classify, models, numbers), [picked], outputs


def _classify(models: Sequence, numbers: Sequence[int], picked) -> list:
    outputs = []
    for i in numbers:
        if isinstance(picked.inputs[i], str):
            outputs += [None, None]
            continue
        result, seen = models[i].classify(picked.inputs[i].view), _shown(picked.inputs[i].view)
        if models[i].model.problem == "numbers":
            result = "| name | number |\n| --- | ---: |\n" + "\n".join(f"| {k} | {v:.6g} |" for k, v in result.items())
        outputs += [seen, result]
    return outputs


def _shown(image) -> np.ndarray:
    """Return an image (C, H, W) as gr.Image takes it."""
    pixels = displayable(image).numpy()
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def segment_tab(models: Sequence, picked: gr.State) -> tuple:
    """Add the tab of the classes of pixels."""
    numbers, places = [i for i, each in enumerate(models) if each.segments], []
    with gr.Tab("Segment") as tab:
        labels = gr.State()
        opacity = gr.Slider(0, 100, 60, step=1, label="Opacity of the classes (%)")
        for i in numbers:
            _name_models(models, i)
            with gr.Row():
                places += [picture("classes of pixels", min_width=300, scale=3), gr.HTML(min_width=200)]
    blend = partial(_blend, models, numbers)
    opacity.change(blend, [picked, labels, opacity], places, **EVENT)

    def draw(picked, opacity):
        found = [None if isinstance(picked.inputs[i], str) else models[i].segment(picked.inputs[i]) for i in numbers]
        return [found, *blend(picked, found, opacity)]

    return tab, draw, [picked, opacity], [labels, *places]


def _blend(models: Sequence, numbers: Sequence[int], picked, labels, opacity) -> list:
    """Return an overlay and a legend for each model."""
    outputs = []
    for i, numbers_of_pixels in zip(numbers, labels or [], strict=True):
        if numbers_of_pixels is None:
            outputs += [None, one_line(_unreadable(models[i], picked.inputs[i]))]
            continue
        image = displayable(picked.inputs[i].picture).numpy()
        outputs.append(overlay(image, numbers_of_pixels, models[i].colours, opacity / 100))
        outputs.append(class_legend(numbers_of_pixels, models[i].classes, models[i].colours))
    return outputs


def look_tab(models: Sequence, picked: gr.State, choose: Callable, other: Callable) -> tuple:
    """Add the tab of features and attention of two images.

    `choose` adds places to choose the second image, and returns their events; `other` returns it until one is chosen.
    """
    outputs, places = [], []
    with gr.Tab("Look inside") as tab:
        second, features = gr.State(), gr.State()
        gr.Markdown(
            "**Colours** are the first three principal components of the patch features of both images: equal colours "
            "are similar features. **Click** a patch of an image to see how similar all patches are to it."
        )
        with gr.Accordion("Choose the second image", open=False):
            events = choose(second, label="Second image")
        for i, model in enumerate(models):
            _name_models(models, i)
            with gr.Row():
                for name in ("first", "second"):
                    outputs.append(picture(f"{name} image", elem_classes=["clickable"]))
                    places.append((outputs[-1], i, name == "second"))
                    outputs += [picture("features as colours"), picture("similarity to the patch")]
            outputs.append(gr.HTML())
            heads = f"attention of the {'class token, by head' if model.attends == 'head' else 'queries of the probe'}"
            outputs += [gallery(f"{name} image: {heads}", 6, buttons=[]) for name in ("first", "second")]
    draw, inputs, results = partial(_look, models, other), [picked, second], [features, *outputs]
    for event in events:
        event.then(draw, inputs, results, **EVENT)
    for place, i, is_second in places:
        maps = [outputs[9 * i + 2], outputs[9 * i + 5], outputs[9 * i + 6]]
        place.select(_similarity_of(models[i], i, is_second), features, maps, **EVENT)
    return tab, draw, inputs, results


def _look(models: Sequence, other: Callable, picked, second) -> list:
    """Return the features of each model, and its nine outputs."""
    second = second or other() or picked
    kept, outputs = [], []
    for model, *pair in zip(models, picked.inputs, second.inputs, strict=True):
        if any(isinstance(inputs, str) for inputs in pair):
            kept.append(None)
            outputs += (
                [None] * 6 + [one_line(_unreadable(model, next(i for i in pair if isinstance(i, str))))] + [None] * 2
            )
            continue
        features, colours, attention = model.look(pair)
        kept.append(features)
        similar, legend = _similarity(model, features, 0, 0.5, 0.5)
        for inputs, colour, values in zip(pair, colours, similar, strict=True):
            seen = _shown(inputs.view if not model.segments else inputs.whole)
            outputs += [_enlarged(Image.fromarray(seen)), colour, values]
        outputs += [legend, *attention]
    return [kept, *outputs]


def _similarity_of(model, i: int, is_second: bool) -> Callable:
    """Return a function that shows the similarity to a patch of an image that is clicked."""

    def show(features, event: gr.SelectData):
        maps, legend = _similarity(model, features[i], int(is_second), *_place_of(event, model.img_size))
        return [*maps, legend]

    return show


def _similarity(model, features, image: int, x: float, y: float) -> tuple[list, str]:
    """Return maps of the similarity of all patches to that at (x, y) in [0, 1], and their legend."""
    values, (row, column) = model.compare(features, image, x, y)
    low = float(min(each.min() for each in values))
    text = f"cosine similarity to row {row + 1}, column {column + 1} of the {('first', 'second')[image]} image"
    return [heat_map(each, low, 1) for each in values], scale_legend(f"{low:.2f}", "1", text)


def nearest_tab(models: Sequence, picked: gr.State) -> tuple:
    """Add the tab of the nearest images of a folder."""
    numbers, outputs = [i for i, each in enumerate(models) if each.bank], []
    with gr.Tab("Nearest") as tab:
        for i in numbers:
            label = f"nearest of {len(models[i].bank[1])} images, by cosine similarity: {models[i].name}"
            outputs.append(gallery(label, 4, buttons=[]))
    return tab, partial(_nearest, models, numbers), [picked], outputs


def _nearest(models: Sequence, numbers: Sequence[int], picked) -> list:
    inputs = [picked.inputs[i] for i in numbers]
    found = [
        None if isinstance(each, str) else models[i].nearest(each.view) for i, each in zip(numbers, inputs, strict=True)
    ]
    return found if len(found) > 1 else found[0]
