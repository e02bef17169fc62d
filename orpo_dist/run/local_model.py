"""What a local model is, whatever folder it lies in: a digest of its config and of samples of its weights."""

import hashlib
from pathlib import Path

PATTERNS = ("config.json", "*.safetensors", "*.bin")
SAMPLES, SAMPLE_BYTES = 32, 1 << 16  # of each file: 2 MiB, of 70B in 30 files 60 MiB


def content_digest(folder: Path) -> str:
    """Names, sizes and 32 evenly spaced samples of the files. A file of up to 2 MiB is read as a whole."""
    state = hashlib.sha256()
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        state.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= SAMPLES * SAMPLE_BYTES:
                state.update(file.read())
                continue
            for number in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()[:16]
