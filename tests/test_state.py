"""MemoryState: two tensors, moved and cast as such, and a file that holds nothing else."""

import os
import stat
import threading

import oracle
import pytest
import torch
from oracle import LAYOUTS, poisoned, problem

import fastkm
from fastkm import MemoryState, load_memory_state, save_memory_state
from fastkm._files import check_file, replace_file, write_text


def test_a_state_is_a_pair():
    state = problem(2, 1, 1, 3, 4).state
    assert MemoryState._fields == ("mean", "cov")
    mean, cov = state
    assert mean is state.mean
    assert cov is state.cov


def test_a_state_can_be_cast_and_moved():
    p = problem(2, 3, 1, 4, 5)
    single = MemoryState(*(x.float() for x in p.state))
    result = fastkm.write(single, p.values.float(), 1.0, 1.0)
    assert result.state.mean.dtype == torch.float32
    moved = torch.utils._pytree.tree_map(lambda x: x.to("meta"), p.state)
    assert isinstance(moved, MemoryState)
    assert moved.mean.device.type == moved.cov.device.type == "meta"


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1), (0, 3, 4), (2, 3, 0)], ids=str)
def test_a_saved_state_comes_back(shape, tmp_path, dtype):
    B, K, C = shape
    state = problem(B, 1, 1, K, C, dtype).state
    save_memory_state(state, tmp_path / "memory.safetensors")
    loaded = load_memory_state(tmp_path / "memory.safetensors")
    assert isinstance(loaded, MemoryState)
    assert oracle.equal(loaded, state)
    assert loaded.mean.dtype == loaded.cov.dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_values_are_saved(layout, tmp_path):
    state = problem(2, 1, 1, 3, 4).state
    hostile = MemoryState(*(poisoned(x, layout) for x in state))
    save_memory_state(hostile, str(tmp_path / "memory.safetensors"))
    assert oracle.equal(load_memory_state(str(tmp_path / "memory.safetensors")), state)
    assert (tmp_path / "memory.safetensors").stat().st_size < 1024


def test_an_expanded_state_and_one_in_shared_storage_can_be_saved(tmp_path):
    one = problem(1, 1, 1, 4, 4).state
    storage = torch.stack([one.mean, one.cov])
    for state in (
        MemoryState(*(x.expand(3, 4, 4) for x in one)),
        MemoryState(storage[0], storage[1]),
    ):
        save_memory_state(state, tmp_path / "memory.safetensors")
        assert oracle.equal(load_memory_state(tmp_path / "memory.safetensors"), state)


def test_a_loaded_state_goes_on_being_written(tmp_path):
    p = problem(2, 6, 1, 5, 4)
    whole = fastkm.write(p.state, p.values, p.noise_var, p.ridge)
    first = fastkm.write(p.state, p.values[:, :3], p.noise_var[:, :3], p.ridge)
    save_memory_state(first.state, tmp_path / "memory.safetensors")
    state = load_memory_state(tmp_path / "memory.safetensors")
    rest = fastkm.write(state, p.values[:, 3:], p.noise_var[:, 3:], p.ridge)
    oracle.assert_close(rest.state.mean, whole.state.mean)
    oracle.assert_close(rest.state.cov, whole.state.cov)


# ---- what a file of a state is made of -------------------------------------------------------------------------------


def state_of(value=0.0, K=3, C=4):
    return MemoryState(torch.full((1, K, C), value), torch.eye(K)[None])


@pytest.mark.parametrize(
    "view",
    [
        torch._neg_view,
        lambda x: torch.complex(x, x).conj().imag,
        lambda x: x[:1].expand(2, *x.shape[1:]),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.nn.Parameter(x),
        lambda x: x.clone().requires_grad_().abs(),
    ],
    ids=["negated", "conjugated", "expanded", "transposed", "strided", "parameter", "with a graph"],
)
def test_a_view_is_saved_with_the_values_it_has(view, tmp_path):
    mean, cov = problem(2, 1, 1, 3, 4, torch.float32).state
    state = MemoryState(view(mean), view(cov))
    save_memory_state(state, tmp_path / "state")
    assert oracle.equal(load_memory_state(tmp_path / "state"), MemoryState(*(x.detach() for x in state)))


def test_one_tensor_can_be_mean_and_cov(tmp_path):
    square = torch.eye(3)[None]
    save_memory_state(MemoryState(square, square), tmp_path / "state")
    assert oracle.equal(load_memory_state(tmp_path / "state"), MemoryState(square, square))


@pytest.mark.parametrize("kind", [str, os.fsencode, lambda path: path])
def test_a_pair_and_every_kind_of_path(kind, tmp_path):
    path = kind(tmp_path / "a memory \u2014 1")
    save_memory_state(tuple(state_of(2.0)), path)
    assert oracle.equal(load_memory_state(path, torch.device("cpu")), state_of(2.0))


def test_a_loaded_state_stays_when_its_file_is_written(tmp_path):
    """By this package, and by others that write into the file that is there."""
    path = tmp_path / "state"
    save_memory_state(state_of(1.0), path)
    loaded = load_memory_state(path)
    save_memory_state(state_of(2.0), path)
    assert oracle.equal(loaded, state_of(1.0))
    again = load_memory_state(path)
    save_memory_state(again, path)  # over itself
    assert oracle.equal(load_memory_state(path), state_of(2.0))
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert oracle.equal(again, state_of(2.0))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (state_of().mean, "must be a MemoryState"),
        ((torch.zeros(3), torch.zeros(2, 2)), "state.mean must have shape"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 2, 2)), "state.cov must have shape"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3, 3).double()), "state.cov must be float32"),
        ((torch.zeros(1, 3, 4).half(), torch.zeros(1, 3, 3).half()), "state.mean must be float32 or float64"),
        ((torch.zeros(1, 3, 4).long(), torch.zeros(1, 3, 3).long()), "state.mean must be float32 or float64"),
    ],
)
def test_what_is_no_state_is_neither_saved_nor_loaded(state, words, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises((TypeError, ValueError), match=words):
        save_memory_state(state, tmp_path / "state")
    assert not list(tmp_path.iterdir())
    if isinstance(state, tuple):
        save_file(dict(zip(MemoryState._fields, state, strict=True)), tmp_path / "state")
        with pytest.raises((TypeError, ValueError), match=rf"{tmp_path}/state holds no memory state: {words}"):
            load_memory_state(tmp_path / "state")


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, "half"], ids=["empty", "text", "bytes", "half"])
def test_a_foreign_or_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "state"
    if content == "half":
        save_memory_state(state_of(), path)
        content = path.read_bytes()[:-20]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} holds no memory state"):
        load_memory_state(path)


@pytest.mark.parametrize("names", [(), ("mean",), ("mean", "cov", "more"), tuple("abcdefgh")])
def test_other_tensors_are_no_state(names, tmp_path):
    from safetensors.torch import save_file

    save_file({name: torch.zeros(1) for name in names}, tmp_path / "state")
    with pytest.raises(ValueError, match=f"{tmp_path}/state holds no memory state: it must hold mean and cov"):
        load_memory_state(tmp_path / "state")


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    for path, error in ((tmp_path / "none", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error, match=str(path)):
            load_memory_state(path)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        save_memory_state(state_of(), tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        save_memory_state(state_of(), tmp_path / "no folder" / "state")


# ---- files in general ------------------------------------------------------------------------------------------------


def test_permissions_and_links_are_kept(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    before = os.umask(0o027)
    try:
        save_memory_state(state_of(), real)
    finally:
        os.umask(before)
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    real.chmod(0o604)
    link.symlink_to(real)
    save_memory_state(state_of(1.0), link)
    assert stat.S_IMODE(real.stat().st_mode) == 0o604
    assert link.is_symlink()
    assert oracle.equal(load_memory_state(real), state_of(1.0))


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(*_):
        raise OSError("no space left on device")

    def write_half():
        with replace_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.write("hal")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space"):
                write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["/proc/x", "/dev/null", "/etc/hostname/x", "a" * 250, "no folder/x", "."])
def test_a_path_that_cannot_be_written_is_named_and_left_alone(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.stat(path) if os.path.exists(path) else None
    for call in (check_file, lambda x: write_text(x, "text")):
        with pytest.raises(OSError, match=os.path.realpath(path)):
            call(path)
    assert not list(tmp_path.iterdir())
    assert before is None or stat.S_IFMT(os.stat(path).st_mode) == stat.S_IFMT(before.st_mode)


def test_checking_a_path_changes_nothing(tmp_path):
    check_file(tmp_path / "new")
    write_text(tmp_path / "old", "old")
    inode = (tmp_path / "old").stat().st_ino
    check_file(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").stat().st_ino == inode


def test_text_is_utf8_whatever_the_locale_and_the_names(tmp_path):
    write_text(tmp_path / "page", "± ∇ λ \udcff")
    assert (tmp_path / "page").read_bytes() == "± ∇ λ \\udcff".encode()


def test_two_that_write_one_file_leave_a_whole_one(tmp_path):
    """What is read at any time is a state that one of them wrote."""
    path, errors = tmp_path / "state", []
    states = [state_of(1.0), state_of(2.0, K=40, C=50)]

    def work(state):
        for _ in range(40):
            try:
                save_memory_state(state, path)
                loaded = load_memory_state(path)
                assert any(loaded.mean.shape == x.mean.shape and oracle.equal(loaded, x) for x in states)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert list(tmp_path.iterdir()) == [path]
