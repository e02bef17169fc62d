"""Tables as pandas writes them to JSON."""

import pandas
import pytest

from orpo_dist.data.files import read_file
from orpo_dist.data.pandas_json import pandas_rows
from orpo_dist.errors import UserError

ROWS = [{"prompt": f"Q{n}", "chosen": "good", "rejected": "bad"} for n in range(3)]


@pytest.mark.parametrize("labels", [None, ["a", "b", "c"]])
@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
def test_orients(tmp_path, orient, labels):
    path = tmp_path / "a.json"
    pandas.DataFrame(ROWS, index=labels).to_json(path, orient=orient)
    assert [row for _, row in read_file(path, "train")] == ROWS


def test_values_have_no_names(tmp_path):
    path = tmp_path / "a.json"
    pandas.DataFrame(ROWS).to_json(path, orient="values")
    with pytest.raises(UserError, match=r"orient='values'.*orient='records'"):
        list(read_file(path, "train"))


def test_messages_in_columns(tmp_path):
    rows = [{"chosen": {"role": "assistant", "content": str(n)}, "rejected": {"role": "assistant", "content": "no"}}
            for n in range(2)]  # fmt: skip
    for orient in ("columns", "index", "split"):
        pandas.DataFrame(rows).to_json(tmp_path / "a.json", orient=orient)
        assert [row for _, row in read_file(tmp_path / "a.json", "train")] == rows


def test_one_row_is_no_table():
    message = {"role": "assistant", "content": "x"}
    assert pandas_rows({"prompt": message, "chosen": message, "rejected": message}) is None
    assert pandas_rows({"prompt": "x", "chosen": "y", "rejected": "z"}) is None
