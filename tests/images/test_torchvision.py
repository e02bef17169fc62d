"""torchvision that cannot be imported, or is missing: text and PIL go on, and what needs it says so in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.processors import qwen_processor
from tests.vlm.rows import save_vlm, swift_and_trl_rows, write_rows

REPOSITORY = Path(__file__).resolve().parents[2]
CAUSE = "torchvision 0.28.0 beside torch "
BROKEN = "cannot be imported (RuntimeError: operator torchvision::nms does not exist)"


@pytest.fixture
def run(tmp_path):
    """`run(code, *arguments)`: Python code in a process of its own, whose torchvision raises as a build for another
    torch does. `missing=True`: where there is none."""
    package = tmp_path / "packages" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    information = package.with_name("torchvision-0.28.0.dist-info")
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")

    def start(code: str, *arguments: str, missing: bool = False) -> subprocess.CompletedProcess:
        path = os.pathsep.join(map(str, (REPOSITORY,) if missing else (package.parent, REPOSITORY)))
        code = f"import sys\nsys.modules['torchvision'] = None\n{code}" if missing else code
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return start


@pytest.mark.parametrize("first", ["", "import transformers\nfrom transformers import AutoTokenizer\n"])
def test_the_trainer_is_imported_and_doctor_names_the_cause(run, first):
    """Also where the user imports transformers first, which then has looked already."""
    code = (
        "import orpo_dist\nfrom orpo_dist import ORPOTrainer\nfrom orpo_dist.commands.doctor import _torchvision\n"
        "from transformers import CLIPImageProcessorPil, utils\nprint(utils.is_torchvision_available())\n"
        "(check,) = _torchvision()\nprint(check.state, check.detail, '->', check.fix)\n"
    )
    done = run(first + code)
    assert done.returncode == 0, done.stderr[-2000:]
    available, check = done.stdout.splitlines()[-2:]
    assert available == "False"
    assert check.startswith("note 0.28.0 beside torch ") and BROKEN in check
    assert "train on text alone -> install the build of torchvision that matches torch " in check


MAIN = "import sys\nfrom orpo_dist.cli import main\nsys.exit(main(sys.argv[1:]))\n"


@pytest.mark.parametrize("missing", [False, True])
def test_a_run_that_needs_it_says_so_in_one_line(run, tmp_path, missing):
    qwen_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2_vl"}')  # no weights: it must not come so far
    data = write_rows(tmp_path / "pairs.jsonl", swift_and_trl_rows(tmp_path, 4))
    model = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data)]
    done = run(MAIN, "train", *model, "--output_dir", str(tmp_path / "run"), "--use_cpu", missing=missing)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("orpo-dist: error: ")]
    assert "the rows have images" in line
    assert ("torchvision is not installed: " if missing else CAUSE) in line
    assert missing or BROKEN in line
    assert "install the build of torchvision that matches torch " in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_family_that_needs_none_trains_on_images(run, tmp_path):
    folder = save_vlm(tmp_path / "model")
    data = write_rows(tmp_path / "pairs.jsonl", swift_and_trl_rows(tmp_path, 4))
    arguments = ["--model_name_or_path", str(folder), "--dataset_name", str(data), "--use_cpu", "--max_steps", "1"]
    done = run(MAIN, "train", *arguments, "--output_dir", str(tmp_path / "run"), "--save_strategy", "no")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 rows, 4 pairs kept" in done.stdout + done.stderr and "image" not in done.stderr.lower()
