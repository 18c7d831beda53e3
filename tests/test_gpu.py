"""The check pack for GPUs, each check run small on a CPU; and its table."""

import json
import subprocess
import sys

from conftest import ROOT, environment


def test_every_check_runs_small_on_a_cpu(tmp_path):
    """Run gpu.py, whose checks are then known to run; a check that ends without a figure fails, too."""
    command = [sys.executable, ROOT / "tests" / "gpu.py", "--device", "cpu", "--tiny", "--out", tmp_path / "gpu"]
    result = subprocess.run(
        [*command, "--seconds", "900"], capture_output=True, text=True, env=environment(), cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert {row["check"] for row in report["figures"]} == {
        *("environment", "numerics", "determinism", "throughput", "scripts", "resume"),
        *("waits", "loader", "learning", "memory", "distributed", "predict"),
    }
    assert report["machine"]["card"] == "CPU"


def test_without_cuda_all_checks_are_skipped(tmp_path):
    variables = environment(CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, ROOT / "tests" / "gpu.py", "--out", tmp_path / "gpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert result.returncode == 0
    assert "no CUDA device was found" in result.stdout and result.stdout.count("SKIP") == 12


def test_table_of_speeds(tmp_path):
    speeds = [
        dict(name="ViT-base, batch 256, compiled", value=5000.0, tflops=286.5, share=0.363, gigabytes=13.71),
        dict(name="copy", value=3.0),
    ]
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": {"card": "NVIDIA H100"}, "figures": speeds}))
    command = [sys.executable, ROOT / "tests" / "gpu.py", "--table", tmp_path / "gpu.json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    # 800 x 1,281,167 images at 5,000 a second take 56.9 hours
    row = "| NVIDIA H100 | ViT-base, batch 256, compiled | 5,000 | 286 | 36% | 13.7 GB | 57 h |"
    assert result.stdout.splitlines()[2:] == [row], result.stderr
