import json

from conftest import run


def test_data_is_measured_against_torchvision_and_by_stage(image_folder, tmp_path):
    flags = ["--path_to_data", image_folder / "train", "--num_images", 10, "--img_size", 32, "--rounds", 1]
    done = run("benchmark.py", "data", *flags, "--json", "out.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in rows] == [
        *("data: file to batch", "data: read", "data: decode", "data: crop and resize", "data: collate")
    ]
    assert all(set(row) == {"name", "ours", "theirs", "unit", "ratio", "machine"} for row in rows)
    whole = rows[0]
    assert whole["unit"] == "images/s" and whole["ours"] > 0 and whole["theirs"] > 0
    assert abs(whole["ratio"] - whole["ours"] / whole["theirs"]) < 1e-6  # of a single round
    assert f"ratio {whole['ratio']:.2f}" in done.stdout and "cores" in whole["machine"]


def test_bad_flags(tmp_path):
    bad = run("benchmark.py", "nothing", "--rounds", 0, cwd=tmp_path, code=2).stderr
    for word in ("nothing is no valid value; expected one of data", "--rounds 0", "--path_to_data is missing"):
        assert word in bad
    assert "holds no image" in run("benchmark.py", "data", "--path_to_data", tmp_path, cwd=tmp_path, code=2).stderr
