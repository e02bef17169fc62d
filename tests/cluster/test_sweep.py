"""Lines of a sweep: split as `submit` checks them, and given to a job word for word."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_dist.cluster import sweep
from orpo_dist.errors import UserError

LIBRARY = Path(__file__).resolve().parents[2] / "slurm" / "lib.sh"
LINES = [
    '--run_name a --system_prompt "costs $(touch INJECTED; echo 5) or $HOME" --learning_rate 1e-5; touch INJECTED2',
    "--dataset_name *.txt --run_name `touch INJECTED3`",
    r"""--run_name 'it''s' --system_prompt "a \"b\" \\ c"  --empty '' --x=a\ b""",
    "--system_prompt 'ü # no comment' --glob [ab]? > INJECTED4 && touch INJECTED5 | cat",
    "--tab\t'\ta'",
]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "sweep.txt"
    path.write_text("# a comment\n\n" + "\n   # another\n".join(LINES) + "\n", "utf-8")
    return path


def test_the_job_gets_the_words_that_submit_has_checked(file, tmp_path, capfd):
    """Through lib.sh, with the commands of the cluster replaced."""
    script = f"""
        set -u
        SITE_SUBMIT= SITE_SHARED_FOLDERS= SITE_LOCAL_FOLDERS=
        source {LIBRARY}
        on_head() {{ if [ "$3" = orpo_dist.recipe.preview ]; then echo /run; else "$@"; fi; }}
        set_environment() {{ :; }}
        train() {{ printf '%s\\0' "$@"; }}
        PYTHON={sys.executable} SLURM_ARRAY_TASK_ID=$1
        sweep r.yaml {file} --flag
    """
    for number, words in enumerate(sweep.runs_of(file)):
        done = subprocess.run(
            ["bash", "-c", script, "job", str(number)], cwd=tmp_path, capture_output=True, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr.decode()
        got = done.stdout.decode().split("\0")[:-1]
        assert got == ["r.yaml", "--flag", *words, "--output_dir", f"/run/{number}"]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.txt"]
    done = subprocess.run(["bash", "-c", script, "job", "5"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "its runs are 0 to 4" in done.stderr


def test_words(file):
    runs = sweep.runs_of(file)
    assert len(runs) == len(LINES)
    assert runs[0][3] == "costs $(touch INJECTED; echo 5) or $HOME" and runs[0][-3:] == ["1e-5;", "touch", "INJECTED2"]
    assert runs[2] == ["--run_name", "its", "--system_prompt", 'a "b" \\ c', "--empty", "", "--x=a b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# only\n", "contains no flags"),
        ("--a 'b\n", "run 0: No closing quotation"),
        ("--a 1\nlearning_rate 1\n", "run 1: a line must contain flags"),
        ("--output_dir x\n", "not --output_dir"),
        ("--output-dir=x\n", "not --output_dir"),
        ("--hub_token planted\n", "the line holds a secret"),
    ],
)
def test_refused(tmp_path, capsys, text, message):
    path = tmp_path / "sweep.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        sweep.runs_of(path)
    assert "planted" not in str(refused.value)
    assert sweep.main([str(path), "0"]) == 2
    assert message in capsys.readouterr().err


def test_an_array_names_runs_that_are_there():
    assert sweep.array(None, 3) == "0-2"
    assert sweep.array("0-2%2", 3) == "0-2%2"
    with pytest.raises(UserError, match="the runs of the sweep are 0 to 2"):
        sweep.array("0,3", 3)
