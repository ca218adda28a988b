"""Files of tensors from elsewhere: nothing in them is run, and one that does not read is refused by name."""

import pytest
import torch

from align.common.errors import DamagedError, UsageError
from align.common.tensor_files import read_tensor_file, write_tensor_file


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_is_written_is_read(tmp_path, name):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(2.0)}
    write_tensor_file(tmp_path / "new" / name, tensors)
    back = read_tensor_file(tmp_path / "new" / name)
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], value) for key, value in tensors.items())


def test_other_kinds_of_files_are_not_written(tmp_path):
    with pytest.raises(UsageError, match="write .pt"):
        write_tensor_file(tmp_path / "x.bin", {"a": torch.ones(1)})


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_files_that_run_code_or_are_cut_are_refused(tmp_path):
    torch.save({"a": Hostile(tmp_path / "owned")}, tmp_path / "evil.pt")
    with pytest.raises(DamagedError, match="more than tensors"):
        read_tensor_file(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    torch.save({"a": torch.ones(64, 64)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in (
        ("cut.pt", whole[: len(whole) // 2]),
        ("empty.bin", b""),
        ("html.pt", b"<html>"),
        ("cut.safetensors", whole[:50]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedError):
            read_tensor_file(tmp_path / name)
    for name in ("none.pt", "whole.onnx"):
        with pytest.raises(UsageError, match="safetensors"):
            read_tensor_file(tmp_path / name)
    (tmp_path / "whole.onnx").write_bytes(whole)
    with pytest.raises(UsageError, match="unknown kind"):
        read_tensor_file(tmp_path / "whole.onnx")
