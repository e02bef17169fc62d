"""Single values of a recipe and its flags, read without the libraries that check all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from orpo_dist.errors import UserError
from orpo_dist.recipe.preview import check_row_groups, preview, without_gpu

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("model_name_or_path: tiny\ndataset_name: pairs.jsonl\nlearning_rate: 1e-5\n")
    return path


def test_a_preview_reads_file_and_flags(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preview(recipe).run_folder == tmp_path / "runs" / "tiny"
    assert not preview(recipe).trains_adapter
    assert not preview(recipe, ["--use_peft", "--no_use_peft"]).trains_adapter
    view = preview(recipe, ["--output_dir=elsewhere", "--use_peft", "--beta", "0.2", "--load-in-4bit", "true"])
    assert view.run_folder == tmp_path / "elsewhere"
    assert view.trains_adapter and view.quantised and view.values["beta"] == 0.2


def test_the_preview_as_a_program_needs_no_torch(recipe):
    program = (
        "import sys; from orpo_dist.recipe.preview import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, recipe], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(REPOSITORY / "runs" / "tiny")


def test_recipes_for_gpus_can_be_read_without_one():
    assert without_gpu({"bf16": True}) == ["--use_cpu", "true"]
    assert without_gpu({"fp16": True, "tf32": True})[2:] == ["--fp16", "false", "--tf32", "false"]


def test_ranks_that_share_a_row_are_on_one_node(tmp_path):
    (tmp_path / "r.yaml").write_text("sequence_parallel_size: 3\n")
    check_row_groups(preview(tmp_path / "r.yaml"), 6)
    check_row_groups(preview(tmp_path / "r.yaml", ["--sequence_parallel_size", "4"]), 8)
    with pytest.raises(UserError, match="sequence_parallel_size=3 does not divide the 8 processes of a node"):
        check_row_groups(preview(tmp_path / "r.yaml"), 8)
