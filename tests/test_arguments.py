import pytest
import torch

from training import arguments
from training.arguments import Parser, add_logging_flags, integer, number, one_of, plan_batch, plan_length


def parser():
    result = Parser("a test")
    arguments.add_run_flags(result, name="test")
    arguments.add_length_flags(result, epochs=10, warmup_epochs=4)
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


def batch(processes=1, held=None, **given):
    names = ("global_batch_size", "per_gpu_batch_size", "micro_batch_size", "gradient_accumulation_steps")
    return plan_batch(**{name: given.get(name) for name in names}, num_processes=processes, held=held)


@pytest.mark.parametrize(
    ("processes", "given", "expected", "accumulation"),
    [
        (1, {}, (256, 256, 256), 1),
        (2, dict(per_gpu_batch_size=2048, gradient_accumulation_steps=4), (4096, 2048, 512), 4),  # the paper on two
        (8, dict(global_batch_size=4096), (4096, 512, 512), 1),
        (8, dict(global_batch_size=4096, micro_batch_size=64), (4096, 512, 64), 8),
        (2, dict(global_batch_size=32, per_gpu_batch_size=16, micro_batch_size=4), (32, 16, 4), 4),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=2, gradient_accumulation_steps=4), (8, 8, 2), 4),
    ],
)
def test_batch_flags(processes, given, expected, accumulation):
    plan, errors = batch(processes, **given)
    assert not errors and tuple(plan) == expected and plan.accumulation == accumulation


@pytest.mark.parametrize(
    ("processes", "given", "word"),
    [
        (3, dict(global_batch_size=32), "not divided by 3 processes"),
        (2, dict(global_batch_size=32, per_gpu_batch_size=32), "do not agree"),
        (1, dict(per_gpu_batch_size=8, gradient_accumulation_steps=3), "does not divide"),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=3), "does not divide"),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=2, gradient_accumulation_steps=2), "is not the batch of 8"),
        (1, dict(per_gpu_batch_size=8, held=16), "--global_batch_size 16"),
        (3, dict(held=16), "not divided by 3 processes"),
    ],
)
def test_bad_batch_flags(processes, given, word):
    _, errors = batch(processes, **given)
    assert len(errors) == 1 and word in errors[0]


def test_a_checkpoint_keeps_its_global_batch_on_other_processes():
    plan, errors = batch(2, held=16)
    assert not errors and tuple(plan) == (16, 8, 8)


def length(num_samples=100, global_batch_size=8, **given):
    defaults = dict(epochs=10, max_steps=None, warmup_epochs=None, warmup_steps=None)
    sizes = dict(num_samples=num_samples, global_batch_size=global_batch_size, default_warmup_epochs=4)
    return plan_length(**{**defaults, **given}, **sizes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(epochs=100), (12, 1200, 48)),
        (dict(), (12, 120, 6)),  # a default warmup is capped at 5 %
        (dict(warmup_epochs=4.0), (12, 120, 48)),
        (dict(max_steps=50, warmup_steps=7), (12, 50, 7)),
        (dict(max_steps=50, warmup_epochs=0.0), (12, 50, 0)),
    ],
)
def test_length_flags(given, expected):
    plan, errors = length(**given)
    assert not errors and tuple(plan) == expected


def test_bad_length_flags():
    assert "fewer than one global batch" in length(num_samples=7)[1][0]
    assert "--warmup_epochs 10 is 120 steps, not shorter than the run of 120" in length(warmup_epochs=10.0)[1][0]
    assert "--warmup_steps 50" in length(max_steps=50, warmup_steps=50)[1][0]


def test_precision_is_the_flag_then_accelerates_then_the_devices(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert arguments.resolve_precision(None) == "no" and arguments.resolve_precision("fp16") == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments.resolve_precision(None) == "bf16" and arguments.resolve_precision("no") == "no"


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert arguments.cores_per_process() >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    assert arguments.cores_per_process() == 1


@pytest.mark.parametrize(("launched", "threads", "expected"), [(True, "1", 3), (True, "2", 7), (False, "1", 7)])
def test_the_launchers_single_thread_is_undone(monkeypatch, launched, threads, expected):
    monkeypatch.setattr(arguments, "cores_per_process", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        arguments.use_all_cores()
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
