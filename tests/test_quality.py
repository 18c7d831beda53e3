import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Start, log_of, losses_of, metrics_of, run_code, weights_of
from PIL import Image

from benchmarks import quality
from training.launch import RunError

SIZES = "--img_size 32 --patch_size 8 --encoder_embed_dim 32 --encoder_depth 1 --encoder_num_heads 2"
SIZES += " --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 --learning_rate 1e-3"
COMMON = f"{SIZES} --global_batch_size 8 --num_workers 0 --mixed_precision no --log_every 1"
FLAGS = [f"--common={COMMON}", "--recipe", "baseline=", "--recipe", "grid=--mask_strategy grid", "--points", "4"]
FLAGS += ["--seconds", "10", "--seeds", "0", "3", "--parallel", "2", "--probe_steps", "2"]
FLAGS += ["--probe=--global_batch_size 8 --num_workers 0"]
FASTER = """
import os, runpy, sys, time
clock = time.perf_counter
time.perf_counter = lambda: 10 * clock()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Script(Start):
    """A script that `quality` starts, with the libraries imported. Dry runs have a clock that is ten times as fast."""

    def __init__(self, words, *, stdout, **options):
        self.log = Path(stdout.name)
        words = words[1:]
        if "--dry_run" in words:
            faster = self.log.with_suffix(".py")
            faster.write_text(FASTER)
            words = [faster, *words]
        super().__init__(*words, cwd=Path.cwd())

    def poll(self):
        if self.returncode is None and super().poll() is not None:
            self.log.write_text("".join(self.communicate()))
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)


def times(out, recipes, **options):
    """Return made-up seconds per step for each recipe, and the steps of an epoch of 40 images."""
    return {name: dict(step_seconds=0.5 if name == "grid" else 0.25, steps_per_epoch=5) for name in recipes}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "Popen", Script)
    monkeypatch.setattr(quality, "time_steps", times)


@pytest.fixture(scope="module")
def compared(image_folder, tmp_path_factory):
    """Return the folder that compares a baseline of 40 steps with a recipe of 20, two seeds each."""
    out = tmp_path_factory.mktemp("quality") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "Popen", Script)
        patch.setattr(quality, "time_steps", times)
        quality.main(["--path_to_data", str(image_folder), *FLAGS, "--out", str(out)])
    return out


def test_a_table_and_curves_of_what_the_runs_have_logged(compared):
    results = json.loads((compared / "quality.json").read_text())
    assert results["baseline"] == "baseline" and "cores" in results["machine"]
    table = (compared / "quality.md").read_text()
    for name, steps in (("baseline", [10, 20, 30, 40]), ("grid", [5, 10, 15, 20])):
        result = results["recipes"][name]
        assert [point["step"] for point in result["curve"]] == steps
        assert [point["seconds"] for point in result["curve"]] == [2.5, 5, 7.5, 10]
        logs = [log_of(compared / name / f"pretrain_{seed}") for seed in (0, 3)]
        for metric in quality.METRICS:
            values = np.array([[line[metric] for line in log if metric in line] for log in logs])
            actual = np.array([point[metric] for point in result["curve"]])
            np.testing.assert_allclose(actual.T, [values.mean(0), values.std(0, ddof=1)], atol=1e-9)
        ends = [metrics_of(compared / name / f"probe_{seed}") for seed in (0, 3)]
        assert [end["step"] for end in ends] == [2, 2]
        assert result["attentive_top1"][0] == pytest.approx(np.mean([end["top1"] for end in ends]))
        for seed, log in zip((0, 3), logs, strict=True):
            training = [line for line in log if "loss" in line]
            assert [line["step"] for line in training] == list(range(1, steps[-1] + 1))
            assert training[-1]["learning_rate"] == 0  # the schedule ends with the run
            trained = sum(8 / line["images_per_second"] for line in training)
            measured = {entry["seed"]: entry["seconds"] for entry in result["runs"]}
            assert measured[seed] == pytest.approx(trained)
        value, deviation = result["curve"][-1]["linear_top1"]
        assert f"| {name} |" in table and f"| {value:.2f} ± {deviation:.2f} |" in table
    with Image.open(compared / "quality.png") as picture:
        assert picture.size == (1500, 500)


def test_seeds_and_flags_reach_the_runs(compared):
    flags = {path: json.loads((path / "args.json").read_text())["flags"] for path in compared.glob("*/pretrain_?")}
    found = {(path.parent.name, path.name, value["mask_strategy"], value["seed"]) for path, value in flags.items()}
    names = {"baseline": "random", "grid": "grid"}
    assert found == {(name, f"pretrain_{seed}", mask, seed) for name, mask in names.items() for seed in (0, 3)}


def test_finished_runs_are_not_run_again_and_recipes_may_be_added(compared, image_folder, quick, monkeypatch):
    out = shutil.copytree(compared, Path("again"))
    before, started = json.loads((out / "quality.json").read_text()), []
    popen = quality.Popen
    monkeypatch.setattr(quality, "Popen", lambda words, **options: started.append(words) or popen(words, **options))
    flags, reported, report = ["--path_to_data", str(image_folder), *FLAGS, "--out", str(out)], [], quality.report
    monkeypatch.setattr(quality, "report", lambda *given: reported.append(given[2]["seeds"]) or report(*given))
    quality.main(flags)
    assert reported == [[0], [0, 3]]  # the report is written after each seed
    assert not started and json.loads((out / "quality.json").read_text()) == before
    quality.main([*flags, "--recipe", "half=--mask_ratio 0.5", "--seeds", "0"])
    assert len(started) == 2 and all("again/half" in " ".join(words) for words in started)
    after = json.loads((out / "quality.json").read_text())["recipes"]
    assert after.keys() == {"baseline", "grid", "half"}
    assert after["grid"]["runs"] == before["recipes"]["grid"]["runs"][:1]
    assert "±" not in (out / "quality.md").read_text()  # one seed has no standard deviation


def test_an_interrupted_comparison_goes_on_exactly(compared, image_folder, quick, monkeypatch, capsys):
    out = Path("interrupted")

    def interrupt(seconds):
        time.sleep(0.01)
        if sum((run / "log.jsonl").exists() and len(losses_of(run)) > 5 for run in out.glob("*/pretrain_0")) == 2:
            raise KeyboardInterrupt

    flags = ["--path_to_data", str(image_folder), *FLAGS, "--seeds", "0", "--out", str(out)]
    monkeypatch.setattr(quality, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quality.main(flags)
    monkeypatch.setattr(quality, "sleep", time.sleep)
    assert not (out / "quality.json").exists() and len(list(out.glob("*/pretrain_0/checkpoints/step_*"))) == 2
    quality.main(flags)
    results = [json.loads((place / "quality.json").read_text())["recipes"] for place in (compared, out)]
    for name, steps in (("baseline", 40), ("grid", 20)):
        one, other = (place / name / "pretrain_0" for place in (compared, out))
        assert losses_of(one) == losses_of(other)
        weights, others = (weights_of(run, steps) for run in (one, other))
        assert all((weights[key] == others[key]).all() for key in weights)
        one, other = (result[name]["runs"][0] for result in results)
        assert one["curve"] == other["curve"] and one["attentive_top1"] == other["attentive_top1"]


def test_sigterm_ends_the_runs_too(image_folder, tmp_path):
    code = "import os, signal, sys; from benchmarks import quality; from training.launch import run_script\n"
    code += "quality.time_steps = lambda out, recipes, **_: {'a': dict(step_seconds=1e-3, steps_per_epoch=5)}\n"
    code += "def end(_):\n"
    code += "    if list(quality.Path('work_dir').rglob('log.jsonl')): os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "quality.sleep = end\nrun_script(lambda: quality.main(sys.argv[1:]), remedy='the same command')"
    flags = ["--path_to_data", image_folder, f"--common={COMMON}", "--recipe", "a=", "--seeds", 0]
    ended = run_code(code, *flags, cwd=tmp_path, code=130).stderr
    assert ended.strip().endswith("error: interrupted; the same command")
    assert len(list(tmp_path.rglob("checkpoints/step_*"))) == 1
    assert "stopped by SIGTERM" in (tmp_path / "work_dir/quality/a/pretrain_0.log").read_text()


def test_steps_are_timed_by_dry_runs(image_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "Popen", Script)
    flags = ["--path_to_data", str(image_folder), *COMMON.split()]
    timed = quality.time_steps(
        tmp_path, {"a": flags, "b": [*flags, "--repeated_augmentation", "2"]}, rounds=1, parallel=1
    )
    assert timed["a"]["steps_per_epoch"] == 5 and timed["b"]["steps_per_epoch"] == 10
    for name in "ab":
        text = (tmp_path / name / "dry_run_0.log").read_text()
        assert f" {timed[name]['step_seconds']:g} s a step" in text and timed[name]["step_seconds"] > 0


def test_the_median_over_rounds_and_the_mean_of_parallel_dry_runs(monkeypatch, tmp_path):
    seconds, calls = iter([1, 3, 10, 10, 5, 7, 20, 20, 100, 100, 30, 30]), []

    def dry_runs(commands, *, parallel, title):
        calls.append(title)
        for _, log in commands:
            log.parent.mkdir(exist_ok=True)
            log.write_text(f"steps      9, 4 per epoch, 0 warmup\n... after 3: {next(seconds)} s a step, 1 images/s")

    monkeypatch.setattr(quality, "run_all", dry_runs)
    timed = quality.time_steps(tmp_path, {"a": [], "b": []}, rounds=3, parallel=2)
    assert {name: value["step_seconds"] for name, value in timed.items()} == {"a": 6, "b": 20}
    assert calls == ["timing a", "timing b"] * 3


def test_steps_fill_the_time():
    assert quality.count_steps(0.1, 100, 5) == 1000 and quality.count_steps(0.3, 100, 5) == 330
    assert quality.count_steps(99, 10, 5) == 5


def test_the_time_to_reach_a_target_is_interpolated():
    seconds, values = [10, 20, 30, 40], [20.0, 30.0, 28.0, 50.0]
    curve = [dict(seconds=x, linear_top1=[y, 1.0]) for x, y in zip(seconds, values, strict=True)]
    for target in (21.0, 25.0, 30.0):
        assert quality.seconds_to_reach(curve, target) == pytest.approx(np.interp(target, values[:2], seconds[:2]))
    assert quality.seconds_to_reach(curve, 39.0) == pytest.approx(35)
    assert quality.seconds_to_reach(curve, 19.0) == 10 and quality.seconds_to_reach(curve, 51.0) is None


def test_cores_are_shared_unless_the_user_says_how(monkeypatch, tmp_path):
    (tmp_path / "script.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    monkeypatch.setattr(quality, "cores_per_process", lambda: 8)
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for given, expected in (("3", "3"), (None, "4")):
        monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS")
        quality.run_all([(["script.py"], log) for log in logs], parallel=2, title="")
        assert [log.read_text().strip() for log in logs] == [expected] * 2


def test_a_failure_ends_the_other_runs(monkeypatch, tmp_path):
    (tmp_path / "bad.py").write_text("raise SystemExit('error: the disk is full')")
    (tmp_path / "long.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    commands = [
        (["long.py"], tmp_path / "long.log"),
        (["bad.py"], tmp_path / "bad.log"),
        (["long.py"], tmp_path / "c.log"),
    ]
    with pytest.raises(RunError, match=r"bad.log: the disk is full$"):
        quality.run_all(commands, parallel=2, title="")
    assert not (tmp_path / "c.log").exists()


def test_data_without_labels_and_stopped_runs_have_no_curves(compared, tmp_path):
    run = shutil.copytree(compared / "grid", tmp_path / "grid") / "pretrain_0"
    lines = [line for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if "linear_top1" not in line]
    (run / "log.jsonl").write_text("".join(lines))
    with pytest.raises(RunError, match="pretrain_0 has no linear_top1; expected data with labelled validation images"):
        quality.read_run(tmp_path / "grid", 0, dict(step_seconds=1), points=4)
    os.unlink(run / "metrics.json")
    with pytest.raises(RunError, match="pretrain_0 was stopped; continue with the same command"):
        quality.read_run(tmp_path / "grid", 0, dict(step_seconds=1), points=4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--recipe a=", "--path_to_data"),
        ("--path_to_data x --recipe a", "--recipe: 'a' is not valid; expected a name and flags"),
        ("--path_to_data x --recipe a/b=", "--recipe: 'a/b=' is not valid"),
        ("--path_to_data x --recipe quality.md=", "--recipe: 'quality.md=' is not valid"),
        ("--path_to_data x --recipe a= --recipe a=", "--recipe has a name twice (a a)"),
        ("--path_to_data x --recipe a='", "No closing quotation"),
        ("--path_to_data x --seconds 0", "--seconds"),
        ("--path_to_data x --out .", "--out . holds something else; give another name"),
    ],
)
def test_bad_flags_are_refused(flags, expected, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        quality.main(flags.split())
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_another_comparison_and_bad_recipes_are_refused(compared, image_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "Popen", Script)
    out = shutil.copytree(compared, tmp_path / "out")
    flags = ["--path_to_data", str(image_folder), *FLAGS, "--out", str(out)]
    changed = ["--seconds", "20", "--points", "3"]
    again = [word.replace("--mask_strategy grid", "--mask_strategy block") for word in flags]
    for words, expected in (
        ([*flags, *changed], ["--seconds differs from", "--points differs from"]),
        (again, ["--recipe grid differs from"]),
        ([*flags, "--recipe", "bad=--mask_rate 3"], ["--mask_rate is not a flag of pretrain_mae.py; did you mean"]),
    ):
        with pytest.raises(SystemExit) as ended:
            quality.main(words)
        errors = [line for line in capsys.readouterr().err.split("error: ")[1:]]
        assert ended.value.code == 2 and len(errors) == len(expected), errors
        assert all(part in error for part, error in zip(expected, errors, strict=True)), errors
