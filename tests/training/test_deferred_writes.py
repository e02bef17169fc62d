"""Files that are written later are what they would have been."""

import threading

import pytest
import safetensors.torch
import torch
from torch.distributed import checkpoint as dcp

from orpo_dist.training.deferred_writes import DeferredWrites


@pytest.fixture
def content():
    torch.manual_seed(0)
    flat = torch.randn(64)
    shared = {"view": flat[8:24].view(4, 4), "same": flat, "twice": flat}
    state = {"state": {0: {"exp_avg": torch.randn(3, 5), "step": torch.tensor(3.0)}}, "shared": shared, "lr": 0.1}
    return {
        "optimizer": state,
        "weights": {"b": torch.randn(5), "a": torch.randn(2, 3).bfloat16(), "none": torch.empty(0)},
    }


def save(folder, content):
    folder.mkdir(exist_ok=True)
    torch.save(content["optimizer"], folder / "optimizer.pt")
    safetensors.torch.save_file(content["weights"], folder / "model.safetensors", metadata={"format": "pt"})
    dcp.save({"model": content["weights"]}, storage_writer=dcp.FileSystemWriter(str(folder / "shards")), no_dist=True)
    torch.save({"plain": [1, 2]}, folder / "plain.pt")
    (folder / "config.json").write_text("{}")


def change(content):
    for tensor in (*content["optimizer"]["shared"].values(), *content["weights"].values()):
        tensor.zero_()
    content["optimizer"]["state"][0]["step"] += 1
    content["optimizer"]["state"][0]["exp_avg"].mul_(2)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_the_moment_byte_for_byte(tmp_path, content):
    originals = torch.save, safetensors.torch.save_file, dcp.FileSystemWriter
    deferred = DeferredWrites()
    for name in ("first", "second"):  # the second time into the memory of the first
        now = tmp_path / name / "now"
        now.parent.mkdir()
        save(now, content)
        later = tmp_path / name / "later"
        with deferred.collecting():
            save(later, content)
        assert originals == (torch.save, safetensors.torch.save_file, dcp.FileSystemWriter)
        assert set(files(later)) == {"plain.pt", "config.json"}
        assert len(deferred.paths) == 4
        change(content)
        deferred.write()
        expected, found = files(now), files(later)
        assert expected.keys() == found.keys()
        differ = [path for path in expected if expected[path] != found[path]]
        assert differ == ["shards/.metadata"]  # holds the folder's name and a new id
    loaded = {"model": {name: torch.empty_like(value) for name, value in content["weights"].items()}}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(str(tmp_path / "first" / "later" / "shards")), no_dist=True)
    assert loaded["model"]["b"].any()


def test_what_the_libraries_refuse_is_refused_at_once(tmp_path, content):
    deferred = DeferredWrites()
    flat = torch.randn(8)
    with deferred.collecting():
        with pytest.raises(RuntimeError, match="share memory"):
            safetensors.torch.save_file({"a": flat, "b": flat}, tmp_path / "shared.safetensors")
        with pytest.raises(ValueError, match="non contiguous"):
            safetensors.torch.save_file({"a": torch.randn(2, 3).t()}, tmp_path / "strided.safetensors")
        torch.save(content["weights"], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        safetensors.torch.save_file({}, tmp_path / "empty.safetensors")
        with (tmp_path / "stream.pt").open("wb") as stream:
            torch.save(content["weights"], stream)
    assert deferred.paths == []
    for name in ("old.pt", "stream.pt"):
        assert torch.equal(torch.load(tmp_path / name)["b"], content["weights"]["b"])


def test_other_threads_are_left_alone(tmp_path):
    deferred = DeferredWrites()
    with deferred.collecting():
        other = threading.Thread(target=torch.save, args=(torch.ones(2), tmp_path / "other.pt"))
        other.start()
        other.join()
        assert (tmp_path / "other.pt").is_file() and deferred.paths == []


def test_memory_is_used_again_and_what_is_not_needed_given_back(tmp_path, content):
    deferred = DeferredWrites()

    def places():
        with deferred.collecting():
            save(tmp_path / "run", content)
        deferred.write()
        return {storage.data_ptr() for storage in deferred._memory._used if storage.nbytes()}

    assert places() == places()
    content["weights"] = {"b": content["weights"]["b"]}
    assert len(places()) < len(places() | {0}) <= 6
    assert not any(deferred._memory._free.values())
