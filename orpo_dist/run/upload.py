"""What a run sends to the hub: a list of what is allowed, since a run's folder also holds rows, samples, logs and jobs.

The files are linked into a folder of their own, which is uploaded as a whole. Its name begins with an underscore, like
that of unfinished checkpoints.
"""

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from orpo_dist.run.summary import PENDING_SUMMARY, SUMMARY_NAME

STAGED = "_upload"
# Of a model, an adapter and their tokenizer or processor, as save_pretrained writes them.
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "*processor_config.json",
    "*.py",  # code of the model's repository, which save_pretrained copies
)
_PENDING = {PENDING_SUMMARY: SUMMARY_NAME}  # the summary gets its name after the upload: then the run has finished
_OF_THE_RUN = ("README.md", "recipe.yaml", SUMMARY_NAME, PENDING_SUMMARY, "training_args.bin")
_FOLDERS = {"additional_chat_templates": ("*.jinja",), "merged": (*_MODEL_FILES, "README.md")}


def allowed_files(folder: Path) -> list[Path]:
    """The files below a run's folder that may be uploaded, as relative paths."""
    patterns: tuple[str, ...] = (*_MODEL_FILES, *_OF_THE_RUN)
    found = [(path, patterns) for path in folder.iterdir()]
    for name, patterns in _FOLDERS.items():
        if (folder / name).is_dir():
            found += [(path, patterns) for path in (folder / name).iterdir()]
    return sorted(
        path.relative_to(folder)
        for path, patterns in found
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in patterns)
    )


def stage(folder: Path, name: str = STAGED) -> Path:
    """A folder `name` in a run's folder, with its allowed files."""
    staged = folder / name
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for file in allowed_files(folder):
        target = staged / file.with_name(_PENDING.get(file.name, file.name))
        target.parent.mkdir(exist_ok=True)
        _link(folder / file, target)
    return staged


def upload_run(folder: Path, repo_id: str, *, blocking: bool, **options: Any) -> Any:
    """Upload a run's folder, without what is not allowed. Returns what `HfApi.upload_folder` does.

    Args:
        blocking: False returns a future.
        options: of `HfApi.upload_folder`.
    """
    api: Any = HfApi()
    staged = stage(folder)
    try:
        sent = api.upload_folder(repo_id=repo_id, folder_path=str(staged), run_as_future=not blocking, **options)
    except BaseException:
        unstage(folder)
        raise
    if blocking:
        unstage(folder)
    else:
        sent.add_done_callback(lambda _: unstage(folder))
    return sent


def unstage(folder: Path) -> None:
    """Remove what `stage` has made in a run's folder."""
    for staged in folder.glob(f"{STAGED}*"):
        shutil.rmtree(staged, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
