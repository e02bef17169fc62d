"""Tests mirror the package: orpo_dist/a/b.py is tested by tests/a/test_b.py, or the table below says where and why."""

import ast
from pathlib import Path

import pytest

import orpo_dist

PACKAGE, TESTS = Path(orpo_dist.__file__).parent, Path(__file__).parent

# Module -> the test files that cover it, and the reason why they are not its mirror.
MIRRORED_ELSEWHERE: dict[str, tuple[list[str], str]] = {
    "autotrain/slurm.py": (["cluster/test_slurm.py"], "it only submits a job"),
    "cluster/cancel.py": (["cluster/test_slurm.py", "cluster/test_submit.py"], "it needs jobs that run"),
    "cluster/recipe_copy.py": (["cluster/test_submit.py"], "it is what a submission writes"),
    "cluster/line.py": (["cluster/test_rendezvous.py", "cluster/test_peers.py"], "both ends of it are nodes"),
    "cluster/orphans.py": (["cluster/test_restarts.py"], "its processes are those of a group"),
    "cluster/prefetch.py": (["cluster/test_slurm.py", "cluster/test_submit.py"], "it is a job of its own before a run"),
    "commands/convert_checkpoint.py": (["survival/test_world_size.py"], "it needs a checkpoint of two DeepSpeed ranks"),
    "commands/merge.py": (["model/loading/test_merge.py"], "the flags of merge_run, tested with it"),
    "config.py": (["recipe/test_recipe.py", "test_trainer.py"], "its fields reach a recipe and change a run"),
    "demo/texts.py": (["demo/test_support_set.py"], "the words of the support set, without code of their own"),
    "model/head/call.py": (["model/head/test_install.py"], "one call of an installed head"),
    "model/head/chunked_pass.py": (["model/head/test_fused_loss.py"], "the forward and backward of the fused loss"),
    "model/loading/processor.py": (
        ["model/loading/test_load.py", "model/loading/test_vision.py"],
        "loaded with its model",
    ),
    "model/packed/asked_layout.py": (["model/packed/test_choose_layout.py"], "options, and the collator of the choice"),
    "model/packed/carried.py": (
        ["model/test_families.py", "model/packed/test_compile.py"],
        "families whose layers drop keywords",
    ),
    "model/packed/mixers.py": (["model/test_families.py"], "each family has other mixers"),
    "model/packed/rotary.py": (["model/test_families.py"], "the rotary kinds belong to families"),
    "model/head/slice_pass.py": (["topologies/test_sequence_parallel.py"], "it needs the ranks that share a row"),
    "model/packed/slices.py": (["topologies/test_sequence_parallel.py"], "it needs the ranks that share a row"),
    "model/packed/verify_slices.py": (["topologies/test_sequence_parallel.py"], "it needs the ranks that share a row"),
    "packing/exchange.py": (["topologies/test_sequence_parallel.py"], "it needs the ranks that share a row"),
    "model/packed/switch.py": (["model/test_families.py"], "switching is tested on each family"),
    "model/packed/temperature.py": (["model/test_families.py"], "one family has it"),
    "model/packed/verify_head.py": (["model/packed/test_choose_head.py"], "what it finds decides the head"),
    "model/packed/verify_images.py": (["model/test_vision_families.py"], "the check runs on each vision family"),
    "run/prepare.py": (["test_train.py", "test_trainer.py"], "preparation is the first half of a run"),
    "training/building.py": (
        ["test_trainer.py"],
        "the trainer's construction, and what a change of options makes again",
    ),
    "training/evaluating.py": (["test_trainer.py", "training/test_evaluation.py"], "evaluate() of a real trainer"),
    "training/progress.py": (
        ["training/test_checkpoint_writer.py", "training/test_resuming.py"],
        "it shows when runs resume",
    ),
    "training/refusals.py": (["test_trainer.py"], "each refusal is an argument of the trainer"),
    "training/saving.py": (
        [
            "test_trainer.py",
            "training/test_final_model.py",
            "training/test_checkpoint_writer.py",
            "survival/test_async_saves.py",
        ],
        "what a real trainer writes",
    ),
    "training/setup.py": (["test_trainer.py"], "the first half of the trainer's construction"),
}


def is_exempt(path: Path) -> bool:
    """Nothing of its own to test: `__init__`s, constants, and aliases that only import names."""
    statements = ast.parse(path.read_text("utf-8")).body
    plain = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    main = [s for s in statements if isinstance(s, ast.If) and "__name__" in ast.unparse(s.test)]
    return path.name == "__init__.py" or all(isinstance(s, plain) or s in main for s in statements)


def modules() -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py")) if not is_exempt(path)]


def mirror(module: str) -> Path:
    return TESTS / Path(module).parent / f"test_{Path(module).name}"


def test_every_module_has_its_mirror_or_a_reason():
    assert [module for module in modules() if not mirror(module).exists() and module not in MIRRORED_ELSEWHERE] == []


def test_no_entry_is_stale():
    """A module that is gone, or has its mirror by now."""
    assert [module for module in MIRRORED_ELSEWHERE if module not in modules() or mirror(module).exists()] == []


@pytest.mark.parametrize("module", MIRRORED_ELSEWHERE)
def test_the_files_named_exist_and_give_a_reason(module):
    files, reason = MIRRORED_ELSEWHERE[module]
    assert files and reason
    assert [file for file in files if not (TESTS / file).is_file()] == []


def test_aliases_are_exempt_and_code_is_not(tmp_path):
    alias, code = tmp_path / "alias.py", tmp_path / "code.py"
    alias.write_text('"""An alias."""\nfrom a.b import main\nif __name__ == "__main__":\n    main()\n')
    code.write_text("import a\n\n\ndef main():\n    a.b()\n")
    assert is_exempt(alias) and not is_exempt(code)
