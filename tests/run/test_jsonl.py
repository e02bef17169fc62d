"""Files of lines that a resumed run continues."""

import json

import pytest

from orpo_dist.run.jsonl import keep_lines

GOOD = [b'{"step": 1, "loss": 1.0}\n', '{"step": 2, "reply": "ü"}\n'.encode()]


@pytest.mark.parametrize(
    "bad",
    [
        b"\0" * 64,
        b"",
        b"{",
        b"null",
        b"3",
        b"[1]",
        b'"step"',
        b'{"loss": 1}',
        b'{"step": "2"}',
        b'{"step": null}',
        b'{"step": true}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_line_is_dropped_and_named(tmp_path, capsys, bad, place):
    path = tmp_path / "log.jsonl"
    lines = [*GOOD]
    lines.insert(place, bad + b"\n")
    path.write_bytes(b"".join(lines))
    keep_lines(path, lambda event: event["step"] < 9, added='{"step": 9}\n')
    assert path.read_bytes() == b"".join(GOOD) + b'{"step": 9}\n'
    told = capsys.readouterr().out
    assert (f"{path}: dropped" in told and f"in line {place + 1} " in told) == bool(bad)
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_many_bad_lines_are_counted(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"x\n" * 9)
    keep_lines(path, lambda event: True)
    assert "in line 1, 2, 3, 4, 5 and 4 more" in capsys.readouterr().out


def test_a_partial_last_line_and_windows_line_ends(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\r\n{"step": 2}\r\n{"step": 3, "lo')
    keep_lines(path, lambda event: event["step"] > 1)
    assert json.loads(path.read_text()) == {"step": 2}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_bytes(GOOD[0])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orpo_dist.run.jsonl.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        keep_lines(path, lambda event: False)
    assert path.read_bytes() == GOOD[0]
