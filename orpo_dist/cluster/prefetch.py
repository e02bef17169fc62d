"""`orpo-dist prefetch RECIPE.yaml`: fetches model and rows into the shared cache and tokenises the pairs.

It runs on a node with network. Training jobs then run offline: compute nodes often have no network, and a thousand
ranks should not query the hub.
"""

from collections.abc import Sequence
from pathlib import Path

from orpo_dist.errors import UserError
from orpo_dist.recipe.preview import preview, without_gpu

# Formats that are not loaded. In some repositories they are most of the data.
_OTHER_FORMATS = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.tflite", "*.ot", "original/*", "consolidated*", "onnx/*"]


def main(argv: Sequence[str]) -> int:
    """`orpo-dist prefetch`. Returns 0 when everything is fetched.

    Raises:
        UserError: a bad recipe, or a model or dataset that cannot be fetched.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: orpo-dist prefetch RECIPE.yaml [--field value ...]\n\nFetch model and data, and tokenise.")
        return 0 if argv else 2
    from orpo_dist.recipe.recipe import Recipe

    view = preview(argv[0], argv[1:])
    recipe = Recipe.parse([*argv, *without_gpu(view.values)])
    from orpo_dist.run.prepare import prepare

    for name, revision in ((recipe.model.model_name_or_path, recipe.model.model_revision), (_adapter(recipe), None)):
        if name:
            print(f"{name}: {_fetch(name, revision)}")
    view.run_folder.mkdir(parents=True, exist_ok=True)
    _, pairs = prepare(recipe, view.run_folder)
    evaluated = f", {len(pairs.evaluation.dataset)} to evaluate on" if pairs.evaluation else ""
    print(f"Tokenised: {len(pairs.train.dataset)} pairs to train on{evaluated}")
    return 0


def _adapter(recipe: object) -> str | None:
    return recipe.model.adapter_name_or_path  # type: ignore[attr-defined]


def _fetch(name: str, revision: str | None) -> Path:
    """The folder of a model: itself, or its snapshot in the hub's cache. Raises UserError."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from orpo_dist.model.loading.hub import hub_errors

    try:
        with hub_errors(name, revision):
            folder = Path(snapshot_download(name, revision=revision, ignore_patterns=_OTHER_FORMATS))
    except HfHubHTTPError as error:
        raise UserError(f"{name} cannot be fetched: {error}") from error
    return folder
