"""Tests of the repository: imports between files, sizes of files and functions, and commands in pages and recipes."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import benchmarks.data
import benchmarks.deploy
import benchmarks.evaluation
import benchmarks.hours
import benchmarks.quality
import benchmarks.scaling
import benchmarks.step
import demo
import export_onnx
import finetune_classifier
import finetune_detection
import finetune_segmentation
import predict
import prepare_data
import pretrain_mae
import push_to_hub
from training.plan import plan_batch

PACKAGES = ("modeling", "data", "training")
SCRIPTS = {
    "pretrain_mae.py": pretrain_mae,
    "finetune_classifier.py": finetune_classifier,
    "finetune_segmentation.py": finetune_segmentation,
    "finetune_detection.py": finetune_detection,
    "predict.py": predict,
    "demo.py": demo,
    "prepare_data.py": prepare_data,
    "push_to_hub.py": push_to_hub,
    "export_onnx.py": export_onnx,
    "benchmarks/data.py": benchmarks.data,
    "benchmarks/deploy.py": benchmarks.deploy,
    "benchmarks/evaluation.py": benchmarks.evaluation,
    "benchmarks/hours.py": benchmarks.hours,
    "benchmarks/quality.py": benchmarks.quality,
    "benchmarks/scaling.py": benchmarks.scaling,
    "benchmarks/step.py": benchmarks.step,
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_import_each_other_or_a_script(package):
    for path in (ROOT / package).glob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & ({*PACKAGES} - {package}), path
        assert not tops & {Path(script).parts[0].removesuffix(".py") for script in SCRIPTS}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_inside_a_package_there_is_no_cycle(package):
    modules = {f"{package}.{path.stem}": path for path in (ROOT / package).glob("*.py")}
    graph = {name: imports(path) & modules.keys() for name, path in modules.items()}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph


def test_pretraining_starts_without_the_packages_that_it_does_not_use():
    blocked = ("timm", "transformers", "datasets", "evaluate", "wandb", "matplotlib", "onnx", "onnxruntime")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import pretrain_mae"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def commands(text: str):
    """Yield the script and the arguments of each command in a text, except for those with `--help` alone."""
    for line in re.sub(r"\\\n\s*#?", " ", text).splitlines():
        for script in SCRIPTS:
            before, found, after = line.partition(f" {script} ")
            if found and ("launch" in before or before.strip("$ #`").endswith(("python", ".sbatch"))):
                words = shlex.split(after.partition("`")[0].partition("&&")[0], comments=True)
                if words != ["--help"]:
                    yield script, words


RECIPES = sorted((ROOT / "recipes").rglob("*.args"))
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
BATCH_FILES = sorted((ROOT / "recipes").rglob("*.sbatch"))
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, *RECIPES, *CONFIGS, *BATCH_FILES]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_read_without_errors(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(path.read_text()))
    assert found or path.name == "contributing.md"
    for script, words in found:
        _, errors = SCRIPTS[script].parse_args(words)
        assert not errors, words


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_processes_divide_the_batches_of_their_commands(path, monkeypatch):
    """The number is that of the command; sbatch without --nodes starts two nodes of eight processes."""
    monkeypatch.chdir(ROOT)
    for line in path.read_text().splitlines():
        number = re.search(r"--num_processes (\d+)", line)
        processes = int(number[1]) if number else 16 if "sbatch --job-name" in line and "--nodes" not in line else None
        for script, words in commands(line.replace("recipes/slurm/train.sbatch", "accelerate launch")):
            if processes and hasattr(SCRIPTS[script], "optimizer_step"):
                args, _ = SCRIPTS[script].parse_args(words)
                names = ("global_batch_size", "per_gpu_batch_size", "micro_batch_size", "gradient_accumulation_steps")
                plan_batch(
                    **{name: getattr(args, name) for name in names}, num_processes=processes
                )  # raises InputError if they do not divide the batch


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_opens_with_its_command_and_says_what_to_expect(path):
    header = path.read_text().partition("\n--")[0].lower()
    assert str(path.relative_to(ROOT)) in header
    assert "hardware:" in header and "expected:" in header and "measured" in header


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_its_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert path.read_text().startswith("# ") and f"accelerate_configs/{path.name}" in path.read_text()
    wanted = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    for name, value in wanted.items():
        assert str(
            getattr(config, name).value if hasattr(getattr(config, name), "value") else getattr(config, name)
        ) == str(value)


PRODUCT = [*ROOT.glob("*.py"), *(path for folder in (*PACKAGES, "benchmarks") for path in (ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", sorted(PRODUCT), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    """The limits are 400 lines a script, 450 another file, 120 `main`, 5 a nested function, and eight parameters."""
    text = path.read_text()
    assert text.count("\n") <= (400 if path.parent == ROOT else 450)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        first_word = (ast.get_docstring(node) or "-").split()[0]
        assert first_word not in ("What", "Whether", "Whatever", "Where", "Of", "How"), node.name
        if isinstance(node, ast.ClassDef):
            continue
        parameters = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        assert len(parameters - {"self", "cls"}) <= 8, node.name
        assert node.end_lineno - node.lineno < 120 or node.name != "main"
        for inner in ast.walk(node):
            if inner is not node and isinstance(inner, ast.FunctionDef):
                assert inner.end_lineno - inner.lineno < 5, f"{inner.name} in {node.name}"
