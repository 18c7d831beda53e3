"""Tests of the pages: every link, flag and snippet works, and README and the table of recipes are complete."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from random_modules import build_autoencoder, new_encoder
from test_house import CONFIGS, RECIPES, SCRIPTS

import export_onnx
import pretrain_mae
from modeling.classifier import Classifier
from modeling.detector import Detector
from modeling.export import (
    export_autoencoder,
    export_classifier,
    export_detector,
    export_encoder,
    export_segmenter,
)
from modeling.upernet import Segmenter
from training.arguments import Parser

README = (ROOT / "README.md").read_text()
FOLDERS = (ROOT, ROOT / "docs", ROOT / "recipes", ROOT / ".github", ROOT / ".github" / "ISSUE_TEMPLATE")
PAGES = sorted(page for folder in FOLDERS for page in folder.glob("*.md"))
OTHER_FLAGS = {  # flags of other programs, and of tests/gpu.py and tests/soak.py
    *("--config_file", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"),
    *("--max_restarts", "--rdzv_backend", "--standalone", "--cpu"),  # accelerate launch, torchrun
    *("--job-name", "--nodes", "--gpus-per-node", "--signal", "--batch"),  # sbatch, scancel
    *("--shm-size", "--check", "--help"),  # docker run, ruff format
    *("--images", "--cifar10", "--out", "--seconds", "--only", "--device", "--tiny", "--table"),
    *("--kills", "--processes", "--launcher", "--launch_flags"),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_image_exists(page):
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "code", page.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, flags=re.M)
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
    used = set(re.findall(r"\]\[([^]]+)\]", text))
    assert used == set(re.findall(r"^\[([^]]+)\]: ", text, flags=re.M))


class Parsed(Exception):
    """Carry the parser of a script out of its `parse_args`."""


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    def capture(parser, argv=None):
        raise Parsed(parser)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "read", capture)
        for script, module in SCRIPTS.items():
            with pytest.raises(Parsed) as parsed:
                module.parse_args([])
            found[script] = parsed.value.args[0]
    return found


def flags_of(parser: Parser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


NAMING_FLAGS = [path for path in (*PAGES, *RECIPES, *CONFIGS) if path.name != "CHANGELOG.md"]  # names removed flags


@pytest.mark.parametrize("path", NAMING_FLAGS, ids=name_of)
def test_every_flag_that_a_page_names_exists(path, parsers):
    known = OTHER_FLAGS.union(*map(flags_of, parsers.values()))
    unknown = set(re.findall(r"(?<![\w/-])--[a-z][\w-]*", path.read_text())) - known
    assert not unknown


def test_help_or_a_page_explains_every_flag(parsers):
    pages = "\n".join(page.read_text() for page in PAGES)
    for script, parser in parsers.items():
        for action in parser._actions:
            explained = action.help and action.help != "==SUPPRESS=="
            assert explained or any(f"`{option}" in pages for option in action.option_strings), (script, action.dest)


def test_the_readme_is_short_and_lists_every_page():
    assert README.count("\n") <= 150
    tables = re.findall(r"(?:^\|.*\n)+", README, flags=re.M)
    assert max(len(row) for table in tables for row in table.splitlines()) <= 120
    assert sum(table.count("\n") - 2 > 8 for table in tables) <= 2
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, page.name


def test_the_table_of_recipes_is_complete():
    listed = re.findall(r"^\| \[(\S+\.args)\]\(\1\)", (ROOT / "recipes/README.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "recipes")) for path in RECIPES)


def test_the_project_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    releases = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert releases[0] == "Unreleased" and releases[1] == project["version"]
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    command = "pip install -r requirements-dev.txt && pytest"
    assert command in README and command in [step.get("run") for step in jobs["tests"]["steps"]]
    assert f">={jobs['tests']['strategy']['matrix']['python'][0]}" == project["requires-python"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and "version" not in citation
    assert citation["license"] == project["license"] and f"# {citation['title']}\n" in README


SNIPPETS = [
    pytest.param(found, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, found in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a folder with tiny models and the photograph that the snippets open."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "photographs").mkdir()
    size = dict(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=2)
    encoder, pretrained = new_encoder(**size), new_encoder(**size | {"img_size": 64})
    statistics = dict(mean=[0.5] * 3, std=[0.25] * 3)
    model = build_autoencoder(pretrained, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    export_encoder(pretrained, folder / "work_dir/quickstart_pretrain/encoder", **statistics)
    export_autoencoder(model, folder / "work_dir/quickstart_pretrain/encoder/pretraining", **statistics)
    classes = [f"class {number}" for number in range(5)]
    classifier, best = Classifier(encoder, len(classes)), folder / "work_dir/finetune_classifier/best"
    export_classifier(classifier, best, classes=classes, crop_ratio=0.875, **statistics)
    segmenter = Segmenter(new_encoder(**size), len(classes), head="linear")
    best = folder / "work_dir/finetune_segmentation/best"
    export_segmenter(segmenter, best, classes=classes, resize=(128, 32), **statistics)
    detector = Detector(new_encoder(**size | {"img_size": 64}), len(classes), width=8)
    export_detector(detector, folder / "work_dir/finetune_detection/best", classes=classes, **statistics)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photograph.jpg")
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, trained, monkeypatch):
    """Snippets with OWNER/NAME need the Hub and are only compiled; `pretrain_mae.main` only checks its flags."""
    code = compile(snippet, "snippet", "exec")
    monkeypatch.chdir(trained)
    errors = []
    if "classifier.onnx" in snippet and not Path("classifier.onnx").exists():
        export_onnx.main(["work_dir/finetune_classifier/best", "classifier.onnx", "--raw_pixels"])
    monkeypatch.setattr(pretrain_mae, "main", lambda argv: errors.extend(pretrain_mae.parse_args(argv)[1]))
    if "OWNER/NAME" not in snippet:
        exec(code, {})
    assert not errors
