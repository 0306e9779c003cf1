"""lowrank tools delta and apply: checkpoints on disk, interrupted anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank.cli.apply
import lowrank.cli.delta
from lowrank import checkpoints, cli, delta

BF16 = torch.bfloat16
SHARDS = (("a.w", "a.b"), ("b.w",), ("c.w", "c.empty", "c.scalar"), ("d.same",))


def tools(*arguments):
    return cli.main(["tools", *map(str, arguments)])


def raw(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "a.w": (70, 90),
        "a.b": (90,),
        "b.w": (2000,),
        "c.w": (3, 1100),
        "c.empty": (0, 3),
        "c.scalar": (),
        "d.same": (9,),
    }
    dtypes = {"a.b": torch.float32, "c.scalar": torch.float32, "c.w": torch.float16, "d.same": torch.int64}
    return {
        name: (torch.randn(shape, generator=generator) * 9).to(dtypes.get(name, BF16)) for name, shape in sizes.items()
    }


def later(given, density=0.02, seed=1):
    generator, changed = torch.Generator().manual_seed(seed), {}
    for name, t in given.items():
        on = torch.rand(t.shape, generator=generator) < (0 if name == "d.same" else density)
        changed[name] = torch.where(on, raw(t) ^ 5, raw(t)).view(t.dtype)
    changed["c.scalar"] = given["c.scalar"] + 1
    return changed


def write(folder, given, index=True):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if not index:
        save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i, names in enumerate(SHARDS):
        file = f"model-{i}.safetensors"
        save_file({name: given[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(params=["sharded", "single"])
def pair(request, tmp_path):
    old = tensors()
    sharded = request.param == "sharded"
    return write(tmp_path / "old", old, sharded), write(tmp_path / "new", later(old), sharded)


@pytest.fixture
def sharded(tmp_path):
    """OLD, NEW and the delta."""
    old = tensors()
    folders = write(tmp_path / "old", old), write(tmp_path / "new", later(old))
    assert tools("delta", *folders, "--out", tmp_path / "d", "--stream", "run", "--base-step", 3) == 0
    return *folders, tmp_path / "d"


def test_there_and_applied(tmp_path, pair, capsys):
    """NEW's files byte for byte, the bytes of lowrank.delta.encode, and a word of it all."""
    old, new = pair
    assert tools("delta", old, new, "--out", tmp_path / "d", "--stream", "run [1]", "--base-step", 3, "--step", 5) == 0
    said = capsys.readouterr().out
    blob = (tmp_path / "d").read_bytes()
    described = delta.describe(blob)
    changed = sum(facts["changed"] for facts in described["tensors"].values())
    assert f"step 3 to 5, {changed:,} of 11,700 elements changed" in said
    assert f"{len(blob):,} bytes, {len(blob) / changed:.2f} per changed element" in said
    before, after = tensors(), later(tensors())
    again = delta.encode(after, old=before, stream="run [1]", base_step=3, step=5)
    assert described == delta.describe(again)  # its checksum is over all bytes
    assert delta.apply_(before, blob, verify=True).changed == changed
    assert all(torch.equal(raw(before[name]), raw(after[name])) for name in after)
    assert tools("apply", old, tmp_path / "d", "--verify") == 0
    assert f"at step 5, {changed:,} of 11,700" in capsys.readouterr().out
    assert shards(old) == shards(new)
    step = json.loads((old / "lowrank.step.json").read_text())
    assert step == {"stream": "run [1]", "step": 5, "sha256": described["sha256"]}
    assert sorted(path.name for path in old.iterdir() if path.suffix != ".safetensors") == sorted(
        {"config.json", "lowrank.step.json", *(path.name for path in new.glob("*.index.json"))}
    )
    assert tools("apply", old, tmp_path / "d") == 0
    assert "already at step 5, by this delta" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [tmp_path / "d", new, old]


def test_one_step_after_another(tmp_path, sharded, capsys):
    """Steps and stream come from lowrank.step.json; what is out of order changes nothing."""
    old, new, first = sharded
    newer = write(tmp_path / "newer", later(later(tensors()), seed=2))
    shutil.copytree(old, tmp_path / "start")
    assert tools("apply", old, first) == 0
    assert tools("delta", old, newer, "--out", tmp_path / "e") == 0
    described = delta.describe((tmp_path / "e").read_bytes())
    assert (described["stream"], described["base_step"], described["step"]) == ("run", 4, 5)
    assert tools("delta", new, old, "--out", tmp_path / "other", "--base-step", 4) == 0
    assert tools("delta", new, newer, "--out", tmp_path / "rival", "--stream", "run", "--base-step", 3) == 0
    kept = shards(old)
    capsys.readouterr()
    for file, message in (
        ("other", "lowrank.step.json: expected a delta of stream 'run', got ''"),
        ("rival", "out of order: the delta is from step 3 to 4, the receiver at 4"),
    ):
        assert tools("apply", old, tmp_path / file) == 2
        assert message in capsys.readouterr().err
    assert shards(old) == kept
    assert tools("apply", old, tmp_path / "e", "--verify") == 0
    assert shards(old) == shards(newer)
    assert tools("apply", old, first) == 2
    assert "out of order: the delta is from step 3 to 4, the receiver at 5" in capsys.readouterr().err
    assert tools("apply", tmp_path / "start", tmp_path / "e", "--verify") == 2
    assert "not the base of this delta" in capsys.readouterr().err
    assert not (tmp_path / "start" / "lowrank.apply.json").exists()


class Stop(BaseException):
    pass


@pytest.mark.parametrize("before", [True, False])
def test_interrupted_at_every_rename(tmp_path, sharded, monkeypatch, capsys, before):
    """Before or after each rename: no other delta then, and the same command ends with the same bytes."""
    old, new, file = sharded
    assert tools("delta", new, old, "--out", tmp_path / "back", "--stream", "run", "--base-step", 3) == 0
    start = tmp_path / "start"
    shutil.copytree(old, start)
    replace, n = os.replace, 0
    while True:
        n += 1
        shutil.rmtree(old)
        shutil.copytree(start, old)
        count = 0

        def stopping(source, target, n=n):
            nonlocal count
            count += 1
            if count == n and before:
                raise Stop
            replace(source, target)
            if count == n:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping)
            try:
                tools("apply", old, file)
                break
            except Stop:
                pass
        capsys.readouterr()
        if (old / "lowrank.apply.json").exists() and not (old / "lowrank.step.json").exists():
            mixed = shards(old)
            assert tools("apply", old, tmp_path / "back") == 2
            assert (
                "the delta from step 3 to 4 of 'run' was interrupted here; apply that one first"
                in capsys.readouterr().err
            )
            assert tools("delta", old, new, "--out", tmp_path / "no") == 2
            assert "a delta was half applied here" in capsys.readouterr().err
            assert shards(old) == mixed
        assert tools("apply", old, file, "--verify") == 0
        assert shards(old) == shards(new)
        assert not (old / "lowrank.apply.json").exists()
        assert not list(old.glob(".*"))
        assert json.loads((old / "lowrank.step.json").read_text())["step"] == 4
    assert n == 1 + 3 + 1 + 1  # the journal, the shards that change, the step; then it was not interrupted


KILLED = """
import os, signal, sys
from lowrank import cli, delta
write, left = delta.write, 2
def killed(*arguments):
    global left
    write(*arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
delta.write = killed
cli.main(["tools", "apply", *sys.argv[1:]])
"""


def test_killed_while_it_writes(sharded, capsys):
    old, new, file = sharded
    done = subprocess.run([sys.executable, "-c", KILLED, old, file], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (old / "lowrank.apply.json").exists()
    assert list(old.glob(".*.applying"))
    assert tools("apply", old, file) == 0
    assert shards(old) == shards(new)
    assert not list(old.glob(".*"))


def test_two_tensors_at_a_time(tmp_path, monkeypatch):
    """Of both checkpoints, no more than one tensor each is referred to."""
    names = [f"layer.{i}" for i in range(12)]
    old = {name: torch.full((5000 + i,), float(i), dtype=BF16) for i, name in enumerate(names)}
    for folder, given in (("old", old), ("new", {name: t + 1 for name, t in old.items()})):
        (tmp_path / folder).mkdir()
        save_file(given, tmp_path / folder / "model.safetensors")
    alive, most = [0], [0]

    class Counted:
        def __init__(self, path):
            self.file = checkpoints.open_tensors(path)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exc):
            self.file.__exit__(*exc)

        def get_slice(self, name):
            return self.file.get_slice(name)

        def get_tensor(self, name):
            t = self.file.get_tensor(name)
            alive[0] += t.nbytes
            most[0] = max(most[0], alive[0])
            weakref.finalize(t, lambda nbytes=t.nbytes: alive.__setitem__(0, alive[0] - nbytes))
            return t

    monkeypatch.setattr(lowrank.cli.delta, "open_tensors", Counted)
    assert tools("delta", tmp_path / "old", tmp_path / "new", "--out", tmp_path / "d") == 0
    assert 0 < most[0] <= 2 * 2 * 5011


def test_a_header_of_odd_length(tmp_path):
    """Other writers need not align: tensors at odd addresses."""
    old, new = tensors(), later(tensors())
    folders = write(tmp_path / "old", old, index=False), write(tmp_path / "new", new, index=False)
    for folder in folders:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    assert tools("delta", *folders, "--out", tmp_path / "d") == 0
    assert tools("apply", folders[0], tmp_path / "d", "--verify") == 0
    assert shards(folders[0]) == shards(folders[1])


def test_linked_files_are_replaced_not_followed(tmp_path, sharded):
    """Snapshots of the hub's cache are links to files that others share."""
    old, new, file = sharded
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in old.iterdir():
        (linked / path.name).symlink_to(path)
    kept = shards(old)
    assert tools("apply", linked, file) == 0
    assert shards(linked) == shards(new)
    assert shards(old) == kept


def test_different_checkpoints(tmp_path, sharded, capsys):
    old, new, _ = sharded
    given = later(tensors())
    for change, message in (
        (lambda t: t.pop("b.w"), "NEW: {folder}: lacks 'b.w'"),
        (lambda t: t.update(more=torch.zeros(3)), "NEW: {folder}: has 'more', which is not in OLD"),
        (lambda t: t.update({"a.w": t["a.w"].mT.contiguous()}), "NEW: a.w: expected shape [70, 90], got [90, 70]"),
        (lambda t: t.update({"a.w": t["a.w"].half()}), "NEW: a.w: expected torch.bfloat16, got torch.float16"),
        (lambda t: t.update({"a.w": t["a.w"].bool()}), "NEW: a.w: expected one of bfloat16"),
    ):
        changed = dict(given)
        change(changed)
        folder = write(tmp_path / "changed", changed, index=False)
        capsys.readouterr()
        assert tools("delta", old, folder, "--out", tmp_path / "out") == 2
        assert message.format(folder=folder) in capsys.readouterr().err
        shutil.rmtree(folder)
    for arguments, message in (
        ((tmp_path / "nowhere", new), "OLD: no safetensors in"),
        ((old, ""), "NEW: no safetensors in ''"),
        ((old, new, "--step", 0), "expected step > base_step >= 0, got 0 and 0"),
        ((old, new, "--base-step", -1), "expected step > base_step >= 0, got 0 and -1"),
    ):
        assert tools("delta", *arguments, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert tools("delta", old, new, "--out", tmp_path) == 2
    assert "expected a file name to write to, got a directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "new", "old"]


def test_bad_deltas_leave_no_trace(tmp_path, sharded, capsys):
    old, new, file = sharded
    content = file.read_bytes()
    files = {path.name: path.read_bytes() for path in old.iterdir()}
    flipped = bytearray(content)
    flipped[-1] ^= 1
    bad = tmp_path / "bad"
    capsys.readouterr()
    for damaged, message in (
        (bytes(flipped), "FILE: damaged: its checksum is another"),
        (content[:-1], "not a whole safetensors file"),
        (next(iter(shards(old).values())), "delta: not a description"),
    ):
        bad.write_bytes(damaged)
        assert tools("apply", old, bad) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert tools("delta", old, new, "--out", bad, "--no-fingerprint") == 0
    capsys.readouterr()
    other = write(tmp_path / "other", {**load_file(new / "model-1.safetensors"), "e": torch.zeros(1)}, index=False)
    for arguments, message in (
        ((old, bad, "--verify"), "encoded with fingerprint=False"),
        ((other, bad), "lacks 'a.b'"),
        ((tmp_path / "nowhere", bad), "MODEL: expected a checkpoint's folder"),
        ((old, tmp_path / "nothing"), "nothing"),
    ):
        assert tools("apply", *arguments) == 2
        assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in old.iterdir()} == files


def test_importing_the_commands_is_cheap():
    code = (
        "import sys, lowrank.cli.delta, lowrank.cli.apply;"
        "print([name for name in ('transformers', 'rich', 'safetensors') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
