"""Pairs with images: the packed layout against the padded layout with the pixels of each prompt once and twice.

    python benchmarks/vision.py                    CPU; `make bench` runs a smaller version
    python benchmarks/vision.py --device cuda --image 672 --batch 8

    duplicated   padded, every prompt and its image twice: the concatenated forward of other trainers
    padded       padded, but the tower runs once per pair
    packed       image tokens once, too

A LLaVA with random weights and a frozen tower, on random images; four fifths of a pair's tokens are image tokens. Every
measurement runs in its own process, the layouts alternate within a round, and the table gives medians. torch counts the
FLOPs while each layout runs one step; their ratio is the possible gain of the packed layout.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
LAYOUTS = ("duplicated", "padded", "packed")
PATCH = 14
WORDS = 24  # of the question
VOCABULARY = 8192


def build_model(settings: dict):
    import torch
    import transformers as t

    torch.manual_seed(0)
    text = t.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=settings["layers"],
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=16384,
        pad_token_id=0,
    )
    tower = t.CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=settings["image"],
        patch_size=PATCH,
    )
    model = t.LlavaForConditionalGeneration(t.LlavaConfig(text_config=text, vision_config=tower, image_token_index=3))
    return model.to(torch.bfloat16) if settings["device"] == "cuda" else model


def build_processor(settings: dict):
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<image>"]
    words = {name: i for i, name in enumerate(names + [f"w{i}" for i in range(len(names), VOCABULARY)])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": settings["image"], "width": settings["image"]}
    image_processor = t.CLIPImageProcessorPil(size={"shortest_edge": settings["image"]}, crop_size=side)
    return t.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def completion_lengths(image_tokens: int) -> tuple[int, int]:
    """Lengths of chosen and rejected: a tenth of the pair's tokens each, one a third longer than the other."""
    spare = image_tokens // 4 - WORDS
    longer = int(spare * 4 / 7)
    return spare - longer, longer


def build_rows(settings: dict, processor) -> list[dict]:
    import io
    import random

    import numpy as np
    from PIL import Image

    rng, noise = random.Random(0), np.random.default_rng(0)
    lengths = completion_lengths((settings["image"] // PATCH) ** 2)
    rows = []
    for _ in range(settings["batch"] * 2):
        image = Image.fromarray(noise.integers(0, 255, (settings["image"], settings["image"], 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        text = "<image> " + " ".join(f"w{rng.randrange(4, VOCABULARY)}" for _ in range(WORDS))
        chosen, rejected = ([rng.randrange(4, VOCABULARY) for _ in range(n)] for n in lengths)
        rows.append(
            {
                "prompt_ids": list(processor(text=[text], images=[[image]])["input_ids"][0]),
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "images": [{"bytes": buffer.getvalue(), "path": None}],
                "prompt_text": text,
            }
        )
    return rows


def worker(settings: dict) -> dict:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback, logging

    from orpo_dist import ORPOConfig, ORPOTrainer

    logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    on_gpu = settings["device"] == "cuda"
    processor = build_processor(settings)
    rows = build_rows(settings, processor)
    moments: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if on_gpu:
                torch.cuda.synchronize()
                if len(moments) == 0:
                    torch.cuda.reset_peak_memory_stats()
            moments.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        trainer = ORPOTrainer(
            build_model(settings),
            ORPOConfig(
                folder,
                per_device_train_batch_size=settings["batch"],
                max_steps=1 + settings["steps"],
                padding_free=settings["layout"] == "packed",
                verify_layout=False,
                gradient_checkpointing=False,
                dataloader_num_workers=0,
                max_length=None,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1000,
            ),
            train_dataset=rows,
            processing_class=processor,
            callbacks=[Clock()],
        )
        if settings["layout"] == "duplicated":
            trainer.layout.collator.chosen = replace(trainer.layout.collator.chosen, pixels_twice=True)
        flops = None
        if settings["count_flops"]:
            loader = iter(trainer.get_train_dataloader())
            trainer.model.to(trainer.args.device)
            batch = trainer.get_batch_samples(loader, 1, trainer.args.device)[0][0]
            with FlopCounterMode(display=False) as counter:
                trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
            flops = counter.get_total_flops()
            trainer.model.zero_grad()
        else:
            trainer.train()
    if not moments:
        return {"flops": flops}
    pairs = settings["batch"] * settings["steps"]
    wall, cpu = (last - first for first, last in zip(moments[0], moments[-1], strict=True))
    memory = (
        torch.cuda.max_memory_allocated() / 2**30
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    return {"pairs_per_second": pairs / wall, "pairs_per_cpu_second": pairs / cpu, "peak_memory_gib": memory}


def measure(settings: dict) -> dict:
    command = [sys.executable, str(Path(__file__)), "--worker", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{settings['layout']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(settings: dict, measured: dict[str, list[dict]], flops: dict[str, int]) -> str:
    def median(layout: str, name: str) -> float:
        return statistics.median(figures[name] for figures in measured[layout])

    image_tokens = (settings["image"] // PATCH) ** 2
    share = image_tokens / (image_tokens + WORDS + image_tokens // 4 - WORDS)
    lines = [
        f"{image_tokens} tokens per image, {share:.0%} of a pair's; micro-batches of {settings['batch']} pairs, "
        f"{settings['device']}, {settings['threads']} threads.\n",
        "| layout | pairs/s | x duplicated | pairs/CPU s, x | FLOPs predict, x | peak memory, GiB | of duplicated's |",
        "|---|---|---|---|---|---|---|",
    ]
    for layout in LAYOUTS:
        gains = {name: median(layout, name) / median("duplicated", name) for name in measured[layout][0]}
        lines.append(
            f"| {layout} | {median(layout, 'pairs_per_second'):.3f} | {gains['pairs_per_second']:.2f} | "
            f"{gains['pairs_per_cpu_second']:.2f} | {flops['duplicated'] / flops[layout]:.2f} | "
            f"{median(layout, 'peak_memory_gib'):.2f} | {gains['peak_memory_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image", type=int, default=336, help="side of the images in pixels, a multiple of 14")
    parser.add_argument("--layers", type=int, default=12, help="layers of the language model")
    parser.add_argument("--batch", type=int, default=4, help="pairs per micro-batch")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
        return
    names = ("device", "image", "layers", "batch", "steps", "threads")
    settings = {name: getattr(options, name) for name in names}
    flops = {layout: measure({**settings, "layout": layout, "count_flops": True})["flops"] for layout in LAYOUTS}
    measured: dict[str, list[dict]] = {layout: [] for layout in LAYOUTS}
    for number in range(options.rounds):
        for layout in LAYOUTS:
            figures = measure({**settings, "layout": layout, "count_flops": False})
            measured[layout].append(figures)
            print(f"  round {number + 1} {layout:10s} {figures['pairs_per_second']:.4f} pairs/s", flush=True)
    text = table(settings, measured, flops)
    print(text)
    versions = {name: version(name) for name in ("torch", "transformers")}
    about = {"date": time.strftime("%Y-%m-%d"), "settings": settings, "versions": versions}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"vision-{options.device}"
    (options.out / f"{name}.json").write_text(
        json.dumps({"about": about, "flops": flops, "rounds": measured}, indent=1) + "\n"
    )
    (options.out / f"{name}.md").write_text(f"{text}\n\nVersions {versions}, {about['date']}.\n")


if __name__ == "__main__":
    main()
