"""Tests of gpu.py, the checks for GPUs, which run small on a CPU, and of its table."""

import json

import pytest
from conftest import run, start

SHORT = ["environment", "compilation", "numerics", "determinism", "throughput", "scripts", "waits", "loader"]
SHORT += ["learning", "memory", "predict"]
LONG = ["resume", "distributed"]  # like "scripts", they use the scripts only through flags


@pytest.mark.parametrize("checks", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_every_check_runs_small_on_a_cpu(checks, tmp_path):
    """gpu.py ends without a failure, and each check reports at least one figure."""
    flags = ["--device", "cpu", "--tiny", "--seconds", 900, "--out", tmp_path / "gpu", "--only", *checks]
    process = start("tests/gpu.py", *flags, cwd=tmp_path)
    said = "".join(process.communicate(timeout=900))
    assert process.returncode == 0, said
    report = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert {row["check"] for row in report["figures"]} == {*checks}
    assert report["machine"]["card"] == "CPU"


def test_without_cuda_all_checks_are_skipped(tmp_path):
    said = run("tests/gpu.py", "--out", tmp_path / "gpu", cwd=tmp_path, CUDA_VISIBLE_DEVICES="").stdout
    assert "no CUDA device was found" in said and said.count("SKIP") == len(SHORT + LONG)


def test_table_of_speeds(tmp_path):
    speeds = [
        dict(name="ViT-base, batch 256, compiled", value=5000.0, tflops=286.5, share=0.363, gigabytes=13.71),
        dict(name="copy", value=3.0),
    ]
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": {"card": "NVIDIA H100"}, "figures": speeds}))
    result = run("tests/gpu.py", "--table", tmp_path / "gpu.json", cwd=tmp_path)
    # 800 x 1,281,167 images at 5,000 a second take 56.9 hours
    row = "| NVIDIA H100 | ViT-base, batch 256, compiled | 5,000 | 286 | 36% | 13.7 GB | 57 h |"
    assert result.stdout.splitlines()[2:] == [row], result.stderr
