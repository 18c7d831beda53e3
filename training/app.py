"""The page of demo.py: the image that a visitor chooses, the frame of the tabs, and the server.

`models` are any objects with the methods of `PageModel` in demo.py; this file imports no model. The image that a
visitor chose is in gr.State, of which each session has its own.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gradio as gr
from gradio_client.utils import is_http_url_like

from training.launch import RunError
from training.ports import free_port
from training.tabs import (
    EVENT,
    STATE,
    classify_tab,
    detect_tab,
    fill_tab,
    look_tab,
    nearest_tab,
    one_line,
    reconstruct_tab,
    segment_tab,
)

CSS = """
.pixels :is(.image-container, .image-container button:has(img), .image-frame) { width: 100%; }
.pixels img { width: 100% !important; height: auto !important; }
.pixels img { object-fit: contain !important; image-rendering: pixelated; }
.labelled > label { position: static !important; display: flex; width: 100%; }
.labelled:not(.examples) .grid-wrap { height: auto !important; max-height: none !important; min-height: 0 !important; }
.smooth img { image-rendering: auto; }
.tiles { display: grid !important; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.clickable img { cursor: crosshair; }
.examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; }
@media (max-width: 600px) { .labelled .grid-container { grid-template-columns: repeat(3, 1fr) !important; } }
footer { display: none !important; }
"""
MAX_UPLOAD = 20_000_000  # bytes per image file
MAX_SESSIONS = 50  # sessions whose images and features stay in memory; the oldest are forgotten first
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(models: Sequence, examples: Sequence, caption: str, pick: Callable) -> gr.Blocks:
    """Return the page.

    Args:
        models: shown side by side in each tab that they have results for.
        examples: pairs of an image to begin with, as a tuple (name, index, data), and its thumbnail.
        caption: the caption of the examples.
        pick: (name, index, data) -> the image as models see it (`Choice` in demo.py), or a str with the problem.
    """
    title = "Masked autoencoder" if any(model.reconstructs for model in models) else "Vision Transformer"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, 600)) as page:
        gr.Markdown(f"# {title}\n" + ", ".join(f"`{model.name}`" for model in models))
        choice, active = gr.State(**STATE), gr.State()
        simple = all(model.pixels.value_range is None and model.pixels.channels in (1, 3) for model in models)
        choose = partial(_choose, examples=examples, caption=caption, pick=pick, simple=simple)
        firsts = [partial(pick, *example) for example, _ in examples[:2]]
        choices = choose(choice, label="Your image")
        tabs = []
        with gr.Tabs():
            if any(model.reconstructs for model in models):
                tabs += [reconstruct_tab(models, choice), fill_tab(models, choice)]
            if any(model.classifies for model in models):
                tabs.append(classify_tab(models, choice))
            if any(model.segments for model in models):
                tabs.append(segment_tab(models, choice))
            if any(model.detects for model in models):
                tabs.append(detect_tab(models, choice))
            if not all(model.detects for model in models):
                tabs.append(look_tab(models, choice, choose, firsts[-1] if firsts else lambda: None))
            if any(model.bank for model in models):
                tabs.append(nearest_tab(models, choice))
        begin = partial(_begin, firsts[0] if firsts else None, tabs[0][0].label)
        start = page.load(begin, None, [choice, active], **EVENT)
        for tab, draw, inputs, outputs in tabs:
            options = dict(fn=partial(_draw_if_active, tab.label, draw), inputs=[active, *inputs], outputs=outputs)
            tab.select(partial(str, tab.label), None, active, **EVENT).then(**options, **EVENT)
            for event in (start, *choices):
                event.then(**options, **EVENT)
    for block in page.blocks.values():
        if isinstance(block, gr.components.Component):
            block.async_move_resource_to_block_cache = partial(_take_file, block.async_move_resource_to_block_cache)
    return page


async def _take_file(take: Callable, path: str | Path | None) -> str | None:
    """Take a file of this machine; refuse an address, which gradio would download."""
    if is_http_url_like(str(path)):
        raise gr.Error("addresses are not downloaded; upload the image")
    return await take(path)


def _begin(first: Callable | None, tab: str) -> tuple:
    """Return the first image, None if there are no examples, and the label of the first tab."""
    return first and first(), tab


def _draw_if_active(name: str, draw: Callable, active: str, *values):
    """Return the results of a tab; those of a hidden tab are drawn when it is opened."""
    return draw(*values) if active == name else gr.skip()


def _choose(
    choice: gr.State, *, label: str, examples: Sequence, caption: str, pick: Callable, simple: bool
) -> list[gr.events.Dependency]:
    """Add places to upload and to choose an image, and return the events that set `choice`.

    A browser cannot show images that are not `simple`; they are uploaded as files.
    """
    with gr.Row():
        if simple:
            upload = gr.Image(label=label, sources=["upload", "webcam", "clipboard"], height=290, min_width=260)
            upload.preprocess = _path_of  # gr.Image would decode the file, which may be damaged
        else:
            upload = gr.File(label=f"{label}: TIFF or .npy", height=290, min_width=260)
        tiles = [(tile, Path(example[0]).name) for example, tile in examples]
        options = dict(columns=6, height=290, object_fit="contain", allow_preview=False, buttons=[], min_width=300)
        options.update(elem_classes=["labelled", "examples"], format="png")
        gallery = gr.Gallery([tile for tile, _ in tiles], label=caption, scale=2, visible=bool(tiles), **options)
    status = gr.HTML()

    def choose_example(event: gr.SelectData):
        return pick(*examples[event.index][0]), None, one_line(f"image: {tiles[event.index][1]}")

    changed = upload.input if simple else upload.upload
    return [
        changed(partial(_choose_file, pick), [upload, choice], [choice, status], **EVENT),
        gallery.select(choose_example, None, [choice, upload, status], **EVENT),
    ]


def _path_of(payload) -> str | None:
    """Return the path of an uploaded file; gradio has checked that it is one."""
    return payload and payload.path


def _choose_file(pick: Callable, path: str | None, choice):
    """Return the image in an uploaded file and a status line; the previous image if the file cannot be read."""
    if path is None:
        return choice, ""
    path = Path(path)
    if path.stat().st_size > MAX_UPLOAD:
        result = f"larger than {MAX_UPLOAD // 10**6} MB"
    else:
        result = pick(path.name, 0, path.read_bytes())
    if isinstance(result, str):
        return choice, one_line(f"error: {path.name}: {result}", "#c62828")
    return result, one_line(f"image: {path.name}")


def serve(page: gr.Blocks, *, host: str, port: int, share: bool) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP, and print its address. Raises RunError if no port can be used."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda *_: sys.exit(0))
    local, public = _launch(page, host, port, share=share)
    page.server.force_exit = True  # do not wait for pages that are open in a browser
    print(f"demo: {local}" + (f" and {public}" if public else "") + " (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def _launch(page: gr.Blocks, host: str, port: int, *, share: bool) -> tuple[str, str | None]:
    """Start the server at a port, or a later one, and return its address and the public one of `share`."""
    options = dict(theme=THEME, css=CSS, max_file_size=MAX_UPLOAD, state_session_capacity=MAX_SESSIONS)
    options.update(footer_links=[], ssr_mode=False, quiet=True, show_error=False, prevent_thread_lock=True)
    options["_frontend"] = False  # skip gradio's check of its page: it fails behind a proxy or on a busy machine
    name = f"[{host.strip('[]')}]" if ":" in host else host
    first = port
    for _ in range(10):
        try:
            return page.launch(server_name=name, server_port=port, share=share, **options)[1:]
        except OSError:  # the port was taken meanwhile, or is in use at 127.0.0.1, where gradio tries it too
            print(f"port {port} cannot be used; trying a later one")
            port, errors = free_port(host, port + 1)
            if errors:
                break
    raise RunError(f"no port from {first} on can be used; give another --port")
