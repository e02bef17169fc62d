"""The counts of benchmarks/lengths.py: of a text with known tokens, and those that the measured results used."""

import json
from pathlib import Path

import pytest

from benchmarks import lengths


@pytest.fixture
def count(tmp_path, monkeypatch):
    """Runs the program on a data file with a tokenizer; returns what it wrote."""

    def run(data: Path, tokenizer, *options: str) -> list[list[int]]:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        out = tmp_path / "mine.json"
        arguments = [str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(out), *options]
        monkeypatch.setattr("sys.argv", ["lengths.py", *arguments])
        lengths.main()
        return json.loads(out.read_text())

    return run


def test_counts_of_what_is_trained(tmp_path, plain_tokenizer, count):
    def tokens(text: str) -> int:
        return len(plain_tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [
        {"prompt": "one two three", "chosen": " four five", "rejected": " six"},
        {"prompt": "one two three four five six", "chosen": " seven", "rejected": " eight nine ten"},
        {"prompt": "one" + " two" * 40, "chosen": " three", "rejected": " four"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One more of each: BOS, EOS, EOS.
    expected = [[tokens(row[key]) + 1 for key in ("prompt", "chosen", "rejected")] for row in rows]
    assert count(data, plain_tokenizer) == expected
    assert count(data, plain_tokenizer, "--longest_prompt", str(expected[1][0])) == expected[:2]
    assert count(data, plain_tokenizer, "--longest_prompt", str(expected[1][0] - 1)) == expected[:1]
    assert count(data, plain_tokenizer, "--max_length", str(expected[1][0] + 1)) == [
        [expected[0][0], *(min(length, expected[1][0] + 1 - expected[0][0]) for length in expected[0][1:])],
        [expected[1][0], 1, 1],
    ]
    dropped = [json.loads(line) for line in (tmp_path / "mine.dropped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in dropped] == [3]  # its line


def test_real_lengths_are_reproduced(shared_data, smollm2_tokenizer, count):
    real = Path(lengths.__file__).parent / "lengths" / "real.json"
    options = ("--max_length", "1024", "--longest_prompt", "768")
    assert count(shared_data / "dpo_en_demo.json", smollm2_tokenizer, *options) == json.loads(real.read_text())
