import pytest
from conftest import ROOT, run

from training import arguments, command_line
from training.arguments import Parser, check_crops, check_finetuning, check_run, integer, number, number_or
from training.command_line import expand_home


def build_parser():
    parser = Parser("a test")
    arguments.add_run_flags(parser, name="test")
    arguments.add_length_flags(parser, epochs=10, warmup="4")
    arguments.add_batch_flags(parser)
    arguments.add_optimizer_flags(parser, base_learning_rate=1e-3, weight_decay=0.05)
    arguments.add_speed_flags(parser)
    arguments.add_logging_flags(parser)
    arguments.add_saving_flags(parser, interval=1)
    arguments.add_image_flags(parser)
    arguments.add_crop_flags(parser, crop_scale=(0.2, 1.0))
    arguments.add_finetuning_flags(parser, weights="--weights", betas=[0.9, 0.999], layer_decay=0.65)
    arguments.add_hub_flags(parser)
    return parser


def read(*words):
    """Parse words with the groups of flags that scripts share; return the flags and error messages."""
    return build_parser().read(list(words))


def read_and_check(*words):
    args, errors = read(*words)
    return args, errors + check_run(args) + check_crops(args) + check_finetuning(args, "--weights")


def test_defaults_have_no_errors():
    args, errors = read_and_check("--path_to_data", "x")
    assert not errors and args.num_workers >= 1 and args.report_to == []
    assert (args.epochs, args.seed, args.max_grad_norm, args.img_size) == (10, 0, 1.0, None)
    assert read_and_check("--img_size", "32")[0].img_size == [32, 32]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--epochs x", "--epochs: 'x' is not valid; expected a whole number of at least 1"),
        ("--seed -1", "--seed: '-1' is not valid; expected a whole number from 0 to 4294967295"),
        ("--weight_decay nan", "--weight_decay: 'nan' is not valid; expected a number of at least 0"),
        ("--crop_scale 0 1", "--crop_scale: '0' is not valid; expected a number from 0.001 to 1"),
        ("--nodata inf", "--nodata: 'inf' is not valid; expected a number"),
        (
            "--time_limit 1:60",
            "--time_limit: '1:60' is not valid; expected hours and minutes, HH:MM, of at least 00:01",
        ),
        ("--micro_batch_size all", "--micro_batch_size: 'all' is not valid; expected a whole number"),
        ("--mixed_precision fp8", "--mixed_precision: invalid choice: 'fp8'"),
        ("--epochs", "--epochs: expected one argument"),
    ],
)
def test_one_bad_value_ends_at_once(capsys, words, expected):
    with pytest.raises(SystemExit) as end:
        read("--not_a_flag", "1", *words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"error: {expected}")
    assert line.endswith(f"; {build_parser().prog} --help lists the flags")


def test_numbers_and_words():
    assert integer(1)("7") == 7 and [number_or("auto", number())(text) for text in ("auto", "0.75")] == ["auto", 0.75]
    for text in ("", "1e3", "9" * 30):
        with pytest.raises(arguments.argparse.ArgumentTypeError, match="is not valid; expected a whole number"):
            integer(1)(text)
    assert arguments.in_seconds(arguments.hours_and_minutes("12:34")) == 45_240
    for text in ("-9999", "-3.4e38", "-.5", "-1E-3"):  # negative numbers are values, not flags
        args, errors = read("--nodata", text)
        assert args.nodata == float(text) and not errors


def test_unknown_flags_are_listed_together():
    prog = build_parser().prog
    assert read("--per_gpu_batchsize", "8", "--zz=1")[1] == [
        f"--per_gpu_batchsize is not a flag of {prog}; did you mean --per_gpu_batch_size?",
        f"--zz is not a flag of {prog}; {prog} --help lists the flags",
    ]
    assert len(read("--what", "1", "stray", "-z", "--epo", "3")[1]) == 4  # abbreviations are not accepted


def test_flags_of_other_projects_are_known():
    words = "--lr 1 --blr 1 --min-lr 1 --bs 8 --wd 0 --data_dir x --output_dir y --resume --workers 2 --input_size 4"
    expected = "learning_rate base_learning_rate min_learning_rate global_batch_size weight_decay path_to_data "
    expected += "working_directory resume_from_checkpoint num_workers img_size"
    hints = [error.partition("; ")[2] for error in read(*words.split())[1]]
    assert hints == [f"did you mean --{name}?" for name in expected.split()]
    text = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("training/*.py")))
    assert [name for names in command_line.USUAL.values() for name in names if f'"--{name}"' not in text] == []


def test_recipes_are_inserted_and_later_flags_win(tmp_path):
    recipe, quote = tmp_path / "x.args", tmp_path / "quote.args"
    recipe.write_text("# a comment\n--epochs 3 --seed 5  # another\n\n--experiment_name 'two words' --nonsense 4\n")
    quote.write_text("--experiment_name 'open\n")
    args, errors = read(f"@{recipe}", "--epochs", "4", f"@{tmp_path}/missing.args", f"@{quote}")
    assert (args.epochs, args.seed, args.experiment_name) == (4, 5, "two words")
    assert len(errors) == 3 and "missing.args" in errors[0] and "quote.args" in errors[1] and "--nonsense" in errors[2]


@pytest.mark.parametrize("words", ["--working_directory ~/runs", "--working_directory=~/runs", "@~/a.args"])
def test_a_tilde_is_the_home_folder(words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.args").write_text("--working_directory ~/runs")
    args, errors = read("--path_to_data=~", "--cache_dir", "~/a~b=~", *words.split())
    assert not errors and args.working_directory == str(tmp_path / "runs") and args.path_to_data == str(tmp_path)
    assert args.cache_dir == str(tmp_path / "a~b=~")
    for word in ("a~b", "=~/a", "~nobody~/a", "--cache_dir=a=~/b"):  # a shell does not expand these either
        assert expand_home(word) == word


@pytest.mark.parametrize("name", ["", " ", ".", "..", "./", "a/.."])
def test_an_experiment_has_a_folder_of_its_own(name):
    _, errors = read_and_check("--path_to_data", "x", "--experiment_name", name)
    assert errors == [f"--experiment_name {name!r} names no folder inside --working_directory; give a name"]
    assert not read_and_check("--path_to_data", "x", "--experiment_name", "a/b.c")[1]


@pytest.mark.parametrize(
    "data",
    [
        *("\ufeff--epochs 3\r\n--seed 5\r\n".encode(), b"--epochs\t3\r--seed 5\r", b"--epochs 3\n\n--seed 5\n\n\n"),
        *("--epochs 3\r\n--seed 5\r\n".encode(name) for name in ("utf-8-sig", "utf-16")),
        *(b"--epochs 3 \\\n  --seed 5", b"--epochs 3 \\\r\n--seed 5\r\n", "--epochs\u00a03 --seed 5".encode()),
        b"# it's run by: accelerate launch x.py \\\n--epochs 3 # don't change it\n--seed 5",
    ],
)
def test_recipes_that_other_programs_wrote(tmp_path, data):
    (tmp_path / "x.args").write_bytes(data)
    args, errors = read(f"@{tmp_path}/x.args")
    assert (args.epochs, args.seed) == (3, 5) and not errors


def test_a_number_sign_begins_a_comment_only_before_a_word(tmp_path):
    (tmp_path / "x.args").write_text("--path_to_data data/set#2 --experiment_name 'a # b' --epochs 3 # --epochs 4\n")
    args, errors = read(f"@{tmp_path}/x.args")
    assert (args.path_to_data, args.experiment_name, args.epochs) == ("data/set#2", "a # b", 3) and not errors


def test_words_that_begin_with_an_at_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "@me.jpg").touch()
    parser = build_parser()
    parser.add_argument("image")
    assert parser.read(["@me.jpg"])[0].image == "@me.jpg"
    assert read("--experiment_name=@home")[0].experiment_name == "@home"
    with pytest.raises(SystemExit):
        parser.read(["@you.jpg"])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: the recipe you.jpg cannot be read (No such file") and "./@NAME" in first
    assert "the following arguments are required: image" in second


def test_contradictions_are_listed_together():
    args, errors = read_and_check(
        *("--report_to", "none", "tensorboard", "--log_wandb", "--value_range", "5", "5", "--crop_scale", "0.9", "0.2"),
        *("--img_size", "1", "2", "3", "--micro_batch_size", "auto", "--gradient_accumulation_steps", "2"),
        *("--hub_private", "--weights", "", "--eval_only", "--dry_run", "--resume_from_checkpoint", "auto"),
    )
    expected = [
        "--report_to none tensorboard contradicts itself",
        "--path_to_data is missing",
        "--value_range 5 5 is empty",
        "--micro_batch_size auto chooses --gradient_accumulation_steps, which is given as 2",
        "--hub_private ",
        "--crop_scale 0.9 0.2 is empty",
        "--img_size 1 2 3 has more than two values",
        "--weights is empty",
        "--eval_only needs trained weights; give --weights",
        "--resume_from_checkpoint does not go with --eval_only",
        "--dry_run does not go with --eval_only",
    ]
    assert len(errors) == len(expected) and all(map(str.startswith, errors, expected))
    assert args.report_to == ["wandb", "tensorboard"]


@pytest.mark.parametrize("script", ["pretrain_mae", "finetune_classifier", "finetune_segmentation", "prepare_data"])
def test_the_help_names_one_default_a_flag(tmp_path, script):
    text = run(f"{script}.py", "--help", cwd=tmp_path, COLUMNS="999").stdout
    assert "--data_format" not in text or "(default: detected from suffixes and content)" in text
    assert not [line for line in text.splitlines() if line.count("default") > 1]
