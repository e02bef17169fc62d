"""Token counts [P, C, R] of your data's pairs, for `bench.py --lengths`.

    python benchmarks/lengths.py DATA --tokenizer MODEL [--max_length 1024] [--longest_prompt 768] --out mine.json

DATA is what `orpo-dist train` takes: a file, a folder or a hub data set. The pairs go through the trainer's own data
preparation, so the counts are those of a run; dropped rows are listed in mine.dropped.jsonl.

benchmarks/lengths/real.json was made this way from `dpo_en_demo.json` of https://github.com/hiyouga/LLaMA-Factory
with the tokenizer and chat template of SmolLM2-135M-Instruct, --max_length 1024 and --longest_prompt 768: 231 of its
300 pairs. 43 prompts leave no room for a completion, 26 more are longer than 768 tokens.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer

from orpo_dist.data.prepare import PrepareOptions, prepare_pairs
from orpo_dist.data.sources import load_rows
from orpo_dist.packing.lengths import pair_lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--max_length", type=int, default=1024, help="most tokens of prompt + completion")
    parser.add_argument("--longest_prompt", type=int, help="leave out pairs whose prompt has more tokens")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prepared = prepare_pairs(
        load_rows(options.data),
        AutoTokenizer.from_pretrained(options.tokenizer),
        PrepareOptions(max_length=options.max_length, max_bad_rows=0.99),
        name="train",
        dropped_rows_path=options.out.with_suffix(".dropped.jsonl"),
    )
    pairs = [(pair.prompt, pair.chosen, pair.rejected) for pair in pair_lengths(prepared.dataset)]
    kept = [pair for pair in pairs if options.longest_prompt is None or pair[0] <= options.longest_prompt]
    options.out.write_text(json.dumps(kept) + "\n")
    print(f"{len(kept)} of {len(pairs)} pairs written to {options.out}")


if __name__ == "__main__":
    main()
