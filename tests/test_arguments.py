import json
import math
from types import SimpleNamespace

import pytest
import torch

from modeling.files import Stored
from training import arguments, launch
from training.arguments import Parser, add_logging_flags, integer, number, one_of


def parser():
    result = Parser("a test")
    arguments.add_run_flags(result, name="test")
    arguments.add_length_flags(result, epochs=10, warmup="4")
    arguments.add_batch_flags(result)
    arguments.add_optimizer_flags(result, base_learning_rate=1e-3, weight_decay=0.05)
    return result


def read(*words):
    return parser().read(list(words))


def test_defaults_have_no_errors():
    args, errors = read()
    assert not errors and args.epochs == 10 and args.seed == 0 and args.max_grad_norm == 1.0


def test_all_bad_values_are_reported_together():
    args, errors = read("--epochs", "x", "--seed", "-1", "--weight_decay", "nan", "--mixed_precision", "fp8", "--lol=1")
    assert len(errors) == 5
    assert len(read("--what", "1", "--seed", "9" * 30)[1]) == 2 and len(read("stray", "-z")[1]) == 2
    assert "--epochs x is no valid value; expected a whole number of at least 1" in errors
    assert "--mixed_precision fp8 is no valid value; expected one of no, bf16, fp16" in errors
    assert any(error.startswith("--lol is not a flag") for error in errors)
    assert args.epochs == 10 and args.mixed_precision is None


def test_a_misspelt_flag_is_told_its_name():
    _, errors = read("--per_gpu_batchsize", "8")
    assert errors == [f"--per_gpu_batchsize is not a flag of {parser().prog}; did you mean --per_gpu_batch_size?"]


def test_abbreviations_are_refused():
    _, errors = read("--epo", "3")
    assert len(errors) == 1


@pytest.mark.parametrize("read_flag", [integer(1), number(0.5, 1), number()])
@pytest.mark.parametrize("text", ["", "abc", "nan", "inf", "-3"])
def test_numbers_out_of_bounds_are_unreadable(read_flag, text):
    assert isinstance(read_flag(text), arguments.Unreadable)


def test_numbers_and_words():
    assert integer(1)("7") == 7 and number(0, 1)("0.75") == 0.75 and one_of("a", "b")("b") == "b"


def test_recipes_are_inserted_and_later_flags_win(tmp_path):
    recipe = tmp_path / "x.args"
    recipe.write_text("# a comment\n--epochs 3 --seed 5  # another\n\n--experiment_name 'two words'\n")
    args, errors = read(f"@{recipe}", "--epochs", "4")
    assert not errors and (args.epochs, args.seed, args.experiment_name) == (4, 5, "two words")


def test_bad_recipes(tmp_path):
    (tmp_path / "unknown.args").write_text("--epochs 3 --nonsense 4\n")
    (tmp_path / "quote.args").write_text("--experiment_name 'open\n")
    _, errors = read(f"@{tmp_path}/missing.args", f"@{tmp_path}/unknown.args", f"@{tmp_path}/quote.args")
    assert len(errors) == 3 and "missing.args" in errors[0] and "quote.args" in errors[1] and "--nonsense" in errors[2]


def test_a_flag_without_its_value_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--epochs")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_precision_is_the_flag_then_accelerates_then_the_devices(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launch.resolve_precision(None) == "no" and launch.resolve_precision("fp16") == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launch.resolve_precision(None) == "bf16" and launch.resolve_precision("no") == "no"


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launch.cores_per_process() >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    assert launch.cores_per_process() == 1


@pytest.mark.parametrize(("launched", "threads", "expected"), [(True, "1", 3), (True, "2", 7), (False, "1", 7)])
def test_the_launchers_single_thread_is_undone(monkeypatch, launched, threads, expected):
    monkeypatch.setattr(launch, "cores_per_process", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        launch.use_all_cores()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_trackers_are_asked_for_in_two_ways():
    def trackers(*words):
        parser = Parser("")
        add_logging_flags(parser)
        args, errors = parser.read(list(words))
        return args.report_to, errors

    assert trackers() == trackers("--report_to", "none") == ([], [])
    assert trackers("--log_wandb") == trackers("--report_to", "wandb") == (["wandb"], [])
    assert trackers("--report_to", "tensorboard", "--log_wandb") == (["wandb", "tensorboard"], [])
    assert "contradicts itself" in trackers("--report_to", "none", "tensorboard")[1][0]
    assert "expected one of none, wandb, tensorboard" in trackers("--report_to", "comet")[1][0]


@pytest.mark.parametrize("text", ["-9999", "-3.4e38", "-.5", "-1E-3"])
def test_negative_numbers_are_values(text):
    flags = Parser("")
    flags.add_argument("--nodata", type=number(-math.inf))
    args, errors = flags.read(["--nodata", text])
    assert args.nodata == float(text) and not errors
    _, errors = flags.read(["--nodata", "nan"])
    assert errors == ["--nodata nan is no valid value; expected a number"]


class Refused(Exception):
    """What is wrong with flags."""


def test_what_is_known_of_images_fills_flags_that_were_left_out(tmp_path):
    """By the run that is resumed, by weights for as many channels, or by the data's statistics."""
    statistics = dict(channels=2, value_range=[0.0, 9.0], nodata=-1.0, mean=[0.1, 0.2], std=[0.3, 0.4])

    def taken(*words, statistics=statistics, weights=None, resume=None, **options):
        flags = Parser("a test")
        arguments.add_image_flags(flags)
        args, errors = flags.read(list(words))
        args.path_to_data, args.resume_from_checkpoint = "data", resume
        args.working_directory, args.experiment_name = tmp_path, "run"
        errors += arguments.check_images(args, statistics, weights, **options)
        if errors:
            raise Refused(errors)
        return [args.input_channels, args.value_range, args.nodata, args.mean, args.std]

    assert taken() == [2, [0.0, 9.0], -1.0, [0.1, 0.2], [0.3, 0.4]]
    assert taken("--nodata", "7", "--std", "1", "1") == [2, [0.0, 9.0], 7.0, [0.1, 0.2], [1.0, 1.0]]
    halves = taken("--value_range", "-9", "9")  # zero in their middle
    assert halves[:3] == [2, [-9.0, 9.0], -1.0]
    assert halves[3] == pytest.approx([0.55, 0.6]) and halves[4] == pytest.approx([0.15, 0.2])
    assert taken("--value_range", "0", "510", statistics=statistics | dict(value_range=None))[3] == [0.05, 0.1]
    colour = [3, None, None, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    assert taken("--input_channels", "3") == taken(statistics=None) == colour

    def weights(channels, value_range):
        stored = Stored(mean=[0.5] * channels, std=[0.25] * channels, value_range=value_range)
        return SimpleNamespace(sizes=dict(in_channels=channels), stored=stored)

    normalised = [[0.5] * 2, [0.25] * 2]
    assert taken(weights=weights(2, None)) == [2, [0.0, 9.0], -1.0, *normalised]  # trained on 8 bits, for deep data
    assert taken(weights=weights(2, None), statistics=None) == [2, None, None, *normalised]
    assert taken(weights=weights(2, [0.0, 1.0]), statistics=None) == [2, [0.0, 1.0], None, *normalised]
    eight_bits = statistics | dict(value_range=None)
    assert taken(weights=weights(2, [0.0, 1.0]), statistics=eight_bits) == [2, None, -1.0, *normalised]
    with pytest.raises(Refused, match="0 9 is not that of the weights, 0 to 1; give that, or --mean and --std too"):
        taken(weights=weights(2, [0.0, 1.0]))
    both = ["--mean", "0", "1", "--std", "2", "3"]
    assert taken(*both, weights=weights(2, [0.0, 1.0])) == [2, [0.0, 9.0], -1.0, [0.0, 1.0], [2.0, 3.0]]
    with pytest.raises(Refused, match="5 5 is no range"):
        taken("--value_range", "5", "5")
    assert taken(weights=weights(3, None)) == taken()  # which are refused later
    assert taken(weights=weights(5, None), statistics=None) == [5, None, None, [0.5] * 5, [0.25] * 5]
    assert taken(weights=weights(1, None), statistics=None, adapt=True) == colour

    assert taken(resume="auto") == taken()  # there is nothing to resume
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    names = ("input_channels", "value_range", "nodata", "mean", "std")
    (tmp_path / "run/args.json").write_text(json.dumps({"flags": dict(zip(names, colour, strict=True))}))
    assert taken(resume="auto") == taken(resume="auto", weights=weights(3, [0.0, 1.0])) == colour
    assert taken() != colour
