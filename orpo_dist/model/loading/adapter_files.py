"""Where peft keeps the adapters of a model: `default` in its folder itself, others in folders of their names."""

from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_ADAPTERS = ("checkpoint-", "_", ".")


def adapter_folder(folder: Path, name: str) -> Path:
    """Where peft saves the adapter `name` of a model that is saved in `folder`."""
    return folder if name == "default" else folder / name


def adapters_in(folder: Path) -> list[str]:
    """Names of the adapters that a model saved in `folder` has; checkpoints and other runs in it do not count."""
    found = [
        file.parent.name
        for file in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))
        if not file.parent.name.startswith(_NOT_ADAPTERS) and not (file.parent / TRAINING_ARGS_NAME).is_file()
    ]
    return ["default", *found] if (folder / ADAPTER_CONFIG).is_file() else found


def saved_embeddings(base: PreTrainedModel, folder: Path) -> list[tuple[int, ...]]:
    """Shapes of the whole input and output embeddings in the adapter's file in `folder`, (vocabulary, H); usually none.

    base: the model without the adapter."""
    layers = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    paths = [path for path, module in base.named_modules() if any(module is layer for layer in layers)]
    names = {f"base_model.model.{path}.{inner}weight" for path in paths for inner in ("", "base_layer.")}
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as content:
        return [tuple(content.get_slice(name).get_shape()) for name in content.keys() if name in names]  # noqa: SIM118


def load_adapters(model: PeftModel, folder: Path) -> None:
    """Load the weights of every adapter of `model` from a checkpoint. Which ones are active and train stays as it is.

    transformers loads the best model from the folder of `default` alone, and sets others aside with a log line.
    """
    for name in model.peft_config:
        set_peft_model_state_dict(model, load_file(adapter_folder(folder, name) / ADAPTER_WEIGHTS), adapter_name=name)
