import json

import pytest

from training.arguments import RunError
from training.progress import DamagedImages, truncate_log


def test_lines_beyond_the_checkpoint_are_removed(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 4, "val_loss": 2.0}, {"step": 5, "loss": 1.0}]
    lines += [{"step": 5, "val_loss": 1.0}, {"step": 6, "loss": 0.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 7, "lo')
    truncate_log(tmp_path, 5)
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == lines[:3]
    truncate_log(tmp_path / "nothing here", 5)


def test_damaged_images_are_named_once_and_limited(tmp_path):
    damaged = DamagedImages(tmp_path, 50, is_main_process=True)
    damaged.add([("a.jpg", "truncated"), ("b.jpg", "empty"), ("a.jpg", "truncated")])
    again = DamagedImages(tmp_path, 50, is_main_process=True)
    again.add([("a.jpg", "truncated"), ("c.jpg", "empty")])
    lines = [json.loads(line) for line in (tmp_path / "damaged.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["a.jpg", "b.jpg", "c.jpg"] and lines[1]["reason"] == "empty"
    with open(tmp_path / "damaged.jsonl", "a") as file:
        file.write('{"path": "/cu')
    assert DamagedImages(tmp_path, 50, is_main_process=True).named == {"a.jpg", "b.jpg", "c.jpg"}
    again.add([(f"{i}.jpg", "empty") for i in range(7)])
    with pytest.raises(RunError, match="11 of 50 images are damaged, more than the 10 allowed"):
        again.add([("x.jpg", "empty")])


def test_of_few_images_one_must_be_readable(tmp_path):
    damaged = DamagedImages(tmp_path, 3, is_main_process=True)
    damaged.add([("a.jpg", "empty"), ("b.jpg", "empty")])
    with pytest.raises(RunError, match="3 of 3 images are damaged, more than the 2 allowed"):
        damaged.add([("c.jpg", "empty")])


def test_the_limit_is_one_percent_of_a_large_set(tmp_path):
    damaged = DamagedImages(tmp_path, 5000, is_main_process=False)
    damaged.add([(f"{i}.jpg", "empty") for i in range(50)])
    assert not (tmp_path / "damaged.jsonl").exists()
    with pytest.raises(RunError):
        damaged.add([("x.jpg", "empty")])
