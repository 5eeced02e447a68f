"""The training loop: golden losses, resuming bit by bit, and what it refuses before it writes."""

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.config import NetworkConfig, TrainConfig
from synthseg.errors import CheckpointError, ConfigError, TrainingError
from synthseg.generator.plan import Plan
from synthseg.labels import load_scheme
from synthseg.networks.backbone import weights_of
from synthseg.networks.checkpoint import load_model, read_tensors
from synthseg.training.loop import Trainer, check, check_wider
from synthseg.training.stream import loader
from synthseg.training.validation import mean_dice, validation_table

MakeConfig = Callable[..., TrainConfig]
GOLDEN = Path(__file__).with_name("golden_losses.txt")


class Recorder(Trainer):
    """Keeps the loss of every step."""

    def step(self, batch: Any) -> tuple[float, float]:
        loss, dice = super().step(batch)
        self.losses = [*getattr(self, "losses", []), loss]
        return loss, dice


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Sums in one order, so that runs can be compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_losses_are_the_golden_ones(make_config: MakeConfig, tmp_path: Path) -> None:
    expected = [float(line) for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    trainer = Recorder(make_config(), tmp_path)
    trainer.run()
    now = "\n".join(f"{loss:.5f}" for loss in trainer.losses)
    assert trainer.losses == pytest.approx(expected, abs=1e-3), f"if the change is meant, write to {GOLDEN}:\n{now}"


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_resuming_is_going_on(optimiser: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(optimiser__name=optimiser)
    whole = Recorder(config, tmp_path / "whole")
    whole.run()
    first = Recorder(config, tmp_path / "parts")
    first.run(until=3)
    assert first.state.step == 3
    second = Recorder(config, tmp_path / "parts", resume=True)
    assert second.state.step == 3
    second.run()
    assert first.losses + second.losses == whole.losses
    assert len(whole.losses) == 6
    for (name, a), b in zip(weights_of(whole.plain).items(), weights_of(second.plain).values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, second.ema[name]) for name, a in whole.ema.items())
    ours, theirs = (load_model(tmp_path / part / "last.safetensors").network for part in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


class Interrupted(Recorder):
    """Gets a signal in the middle of its third step, or of its validation after the fourth."""

    def __init__(self, *arguments: Any, number: signal.Signals, validating: bool, **options: Any) -> None:
        self.number, self.validating = number, validating
        super().__init__(*arguments, **options)

    def compute(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.state.step == 2 and not self.validating:
            signal.raise_signal(self.number)
        return super().compute(batch)

    def validate(self) -> float:
        if self.validating:
            signal.raise_signal(self.number)
        return super().validate()


@pytest.fixture
def as_from_a_terminal() -> Any:
    """What the command sets, and a shell that starts the tests in the background does not."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: lambda number, frame: sys.exit(128 + number)}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize(("validating", "step"), [(False, 3), (True, 4)])
def test_an_interrupted_run_is_saved_after_the_step(
    number: signal.Signals,
    error: type[BaseException],
    validating: bool,
    step: int,
    template_folders: dict[str, Path],
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = {"validation_templates": [str(template_folders["other"])], "validation_contrasts": ["t1"]}
    config = make_config(validate_every=4, **held_out)
    whole = Recorder(config, tmp_path / "whole")
    whole.run()
    first = Interrupted(config, tmp_path / "parts", number=number, validating=validating)
    with pytest.raises(error):
        first.run()
    assert first.state.step == step
    told = capsys.readouterr().err
    assert f"stopped; step {step} is saved in {tmp_path / 'parts'}: the same command with --resume goes on" in told
    second = Recorder(config, tmp_path / "parts", resume=True)
    second.run()
    assert first.losses + second.losses == whole.losses
    assert second.state.validations == whole.state.validations
    assert all(torch.equal(a, second.ema[name]) for name, a in whole.ema.items())
    assert (tmp_path / "parts" / "best.safetensors").is_file()


@pytest.mark.usefixtures("as_from_a_terminal")
def test_a_run_interrupted_before_its_first_step_leaves_no_state(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(make_config(), tmp_path)
    monkeypatch.setattr("synthseg.training.run.loader", lambda stream: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert f"stopped; no state is in {tmp_path}: begin again" in capsys.readouterr().err
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.usefixtures("as_from_a_terminal")
def test_a_second_interruption_ends_the_step_and_saves_nothing_of_it(make_config: MakeConfig, tmp_path: Path) -> None:
    class Impatient(Recorder):
        def compute(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if self.state.step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().compute(batch)

    trainer = Impatient(make_config(checkpoint_every_s=1e-3), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert len(trainer.losses) == 3
    assert read_tensors(tmp_path / "state.safetensors")[1]["state"]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_workers_do_not_change_a_run(make_config: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 1):
        trainer = Recorder(make_config(workers=workers, steps=2), tmp_path / str(workers))
        trainer.run()
        losses.append(trainer.losses)
    assert losses[0] == losses[1]


def test_a_run_folder_is_complete(template_folders: dict[str, Path], make_config: MakeConfig, tmp_path: Path) -> None:
    held_out = {"validation_templates": [str(template_folders["other"])], "validation_contrasts": ["t1"]}
    config = make_config(steps=2, validate_every=1, report=True, checkpoint_every_s=1e-3, **held_out)
    best = Trainer(config, tmp_path).run()
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith("events.")}
    assert names == {
        "config.json",
        "train.json",
        "state.safetensors",
        "state.previous.safetensors",
        "early.safetensors",
        "last.safetensors",
        "best.safetensors",
        "log.csv",
        "report.html",
        "curves.png",
        "classes.png",
    }
    assert [read_tensors(tmp_path / f"{name}.safetensors")[1]["steps"] for name in ("early", "last")] == [1, 2]
    manifest = json.loads((tmp_path / "train.json").read_text())
    assert manifest["steps"] == 2
    assert manifest["templates"] == ["tiny", "tiny_coarse"]
    assert manifest["validation_templates"] == ["tiny_other"]
    assert 0 <= manifest["validation"]["mean"] <= 1
    assert TrainConfig.model_validate_json((tmp_path / "config.json").read_text()) == config
    model = load_model(best)
    assert model.labels == load_scheme("siam16")
    assert (model.voxel_size_mm, model.window) == (2.5, (16, 24, 16))
    assert model.record["steps"] == 2
    with torch.no_grad():
        assert model.network(torch.rand(1, 1, 16, 24, 16)).shape == (1, 17, 16, 24, 16)


def test_the_average_of_the_weights_is_what_is_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config(steps=1), tmp_path)
    start = {k: v.clone() for k, v in weights_of(trainer.plain).items()}
    trainer.run()
    saved = dict(load_model(tmp_path / "last.safetensors").network.named_parameters())
    moved = 0.0
    for name, p in trainer.plain.named_parameters():
        expected = start[name] + (1 - 1 / 10) * (p.detach() - start[name])  # decay (1 + 0) / (10 + 0) at first
        torch.testing.assert_close(saved[name], expected, rtol=2e-3, atol=1e-4)
        moved = max(moved, (p.detach() - start[name]).abs().max().item())
    assert moved > 5e-3


def test_a_loss_that_is_not_finite_stops_with_its_plan(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config(batch_size=2), tmp_path / "run")
    trainer.run(until=2)
    kept = read_tensors(tmp_path / "run" / "state.safetensors")[0]
    with torch.no_grad():
        next(trainer.plain.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"nan at step 2.*offending_plan\.json"):
        trainer.run()
    assert trainer.state.step == 2
    plans = [Plan.model_validate(p) for p in json.loads((tmp_path / "run" / "offending_plan.json").read_text())]
    assert [p.index for p in plans] == [4, 5]  # batch number 2
    after = read_tensors(tmp_path / "run" / "state.safetensors")[0]
    assert all(torch.equal(kept[k], after[k]) for k in kept)  # the last good state is still there


# ---------------------------------------------------------------- refused before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator__shape": [16, 24, 20]}, r"divisible by 8.*\[16, 24, 1[6-9]\]|divisible by 8.*\[16, 24, 24\]"),
        ({"network__channels": [6, 8]}, "3 levels"),
        ({"generator__contrast": {"random_weight": 0, "named_weights": {"t9": 1}}}, "t9.*known"),
        ({"validation_contrasts": ["t1", "t9"]}, "t9.*known"),
        ({"generator__shape": [8, 8, 8]}, r"\[8, 8, 8\] is a single voxel at the coarsest of 3 levels.*side 16"),
        ({"dice_weight": 0, "cross_entropy_weight": 0}, "nothing to learn: give dice_weight or cross_entropy_weight"),
        ({"grow": True, "network__architecture": "unet"}, "grow: only a dynunet .* got network.architecture unet"),
    ],
)
def test_recipes_that_cannot_run_are_refused(
    changes: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(**changes)
    with pytest.raises(ConfigError, match=message):
        check(config)
    with pytest.raises(ConfigError, match=message):
        Trainer(config, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_validation_templates_must_be_others(
    template_folders: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(validation_templates=[str(template_folders["head"])])
    with pytest.raises(ConfigError, match=r"\['tiny'\] are also trained on"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_needs_exact_labels(
    template_folders: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        templates=[str(template_folders["head"])],
        validation_templates=[str(template_folders["coarse"])],
    )
    with pytest.raises(ConfigError, match=r"tiny_coarse cannot tell"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_what_is_not_there(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        Trainer(make_config(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_the_smallest_patch_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config(generator__shape=[8, 16, 8]), tmp_path)
    loss, _ = trainer.step(trainer.stream().batch(0))
    assert np.isfinite(loss)


OTHER: dict[str, Any] = {
    "network__channels": [8, 8, 10],
    "seed": 1,
    "batch_size": 2,
    "optimiser__name": "muon",
    "generator__voxel_size_mm": 3.0,
    "generator__shape": [16, 16, 16],
    "validation_contrasts": ["t1"],
}


@pytest.mark.parametrize("key", ["templates", *OTHER])
def test_resuming_with_another_recipe_is_refused(
    key: str, template_folders: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    """The figures and the history in the model file would be false."""
    other = OTHER | {"templates": [str(template_folders["head"])]}
    Trainer(make_config(), tmp_path).run(until=1)
    name = "network" if key == "network__channels" else key.replace("__", r"\.")
    with pytest.raises(ConfigError, match=rf"state\.safetensors: the run was started with other {name}"):
        Trainer(make_config(**{key: other[key]}), tmp_path, resume=True)
    Trainer(make_config(steps=9, optimiser__learning_rate=0.01), tmp_path, resume=True)  # longer, slower: as you like


def test_init_that_does_not_fit_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    Trainer(make_config(), tmp_path / "a").run(until=1)
    model = str(tmp_path / "a" / "last.safetensors")
    with pytest.raises(ConfigError, match="of the weights"):
        Trainer(make_config(init=model, network__channels=[12, 14, 16]), tmp_path / "b")
    fitting = Trainer(make_config(init=model), tmp_path / "b")
    assert "100% of the weights" in fitting.start
    assert [run["steps"] for run in fitting.manifest()["earlier"]] == [1]


LAST = {"dynunet": "body.output_block.", "segresnet": "body.conv_final.2.", "unet": "body.model.2."}


@pytest.fixture
def own_classes(template_folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A scheme and a template of one's own: the ids are those of siam16, what they mean is not."""
    head, siam = load_scheme("head"), load_scheme("siam16")
    labels = [{"id": x.id, "name": f"Part-{x.id}", "tissue": x.tissue} for x in siam.labels]
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "labels": labels}))
    image = nib.load(template_folders["head"] / "labels.nii.gz")
    ids = siam.ids[head.mapping(siam)[head.to_index(np.asarray(image.dataobj))]]
    (tmp_path / "tiny_mine").mkdir()
    nib.save(nib.Nifti1Image(ids.astype(np.uint16), image.affine), tmp_path / "tiny_mine" / "labels.nii.gz")
    record = {"name": "tiny_mine", "scheme": str(tmp_path / "mine.json"), "derived": {}, "source": "a test"}
    (tmp_path / "tiny_mine" / "labels.json").write_text(json.dumps(record | {"labels": {}}))
    return {"scheme": str(tmp_path / "mine.json"), "templates": [str(tmp_path / "tiny_mine")]}


@pytest.mark.parametrize("architecture", sorted(LAST))
def test_other_classes_get_a_new_last_layer(
    architecture: str, own_classes: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    """Their number and their ids are the same: what they mean is in their names."""
    network = {"network__architecture": architecture, "network__channels": [8, 16, 32]}
    Trainer(make_config(**network), tmp_path / "a").run(until=1)
    model = tmp_path / "a" / "last.safetensors"
    other = Trainer(make_config(init=str(model), seed=1, **own_classes, **network), tmp_path / "b")
    torch.manual_seed(1)
    random = weights_of(other.make_network())
    old, new = read_tensors(model)[0], weights_of(other.plain)
    last = {name for name in new if name.startswith(LAST[architecture])}
    assert last
    assert "100%" not in other.start
    for name, tensor in new.items():
        expected = random[name] if name in last else old[name].float()
        assert torch.equal(tensor, expected), name
    kernels = [name for name in last if new[name].ndim == 5]
    assert kernels
    assert not any(torch.equal(new[name], old[name].float()) for name in kernels)
    assert np.isfinite(other.step(other.stream().batch(0))[0])


def test_classes_that_are_parts_of_the_old_ones_keep_the_last_layer_in_shares(
    template_folders: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    Trainer(make_config(), tmp_path / "a").run(until=1)
    model = str(tmp_path / "a" / "last.safetensors")
    heads = [str(template_folders["head"])]
    other = Trainer(make_config(init=model, scheme="head", templates=heads), tmp_path / "b")
    assert "100% of the weights" in other.start
    name = "body.output_block.conv.conv.weight"
    old, new = read_tensors(Path(model))[0][name].float(), weights_of(other.plain)[name]
    head, siam = other.target, load_scheme("siam16")
    for label_id in (10, 49):  # both thalami
        part = new.unflatten(0, (len(head), -1))[head.index_of[label_id]]
        assert torch.equal(part, old.unflatten(0, (len(siam), -1))[siam.names.index("Thalamus")])


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config(), tmp_path)
    trainer.run(until=1)
    before = {name: tensor.detach().clone() for name, tensor in weights_of(trainer.plain).items()}
    next(trainer.plain.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="gradient is not finite at step 1"):
        trainer.run()
    for name, tensor in weights_of(trainer.plain).items():
        torch.testing.assert_close(tensor.detach(), before[name])
    assert (tmp_path / "offending_plan.json").is_file()


def test_scoring_some_voxels_of_each_block(make_config: MakeConfig, tmp_path: Path) -> None:
    whole, some, all_eight = (
        Recorder(make_config(scored_cells=cells, steps=2), tmp_path / str(cells)) for cells in (0, 2, 8)
    )
    for trainer in (whole, some, all_eight):
        trainer.run()
    assert all_eight.losses == whole.losses
    assert some.losses[0] != whole.losses[0]
    assert some.losses[0] == pytest.approx(whole.losses[0], rel=0.1)  # an estimate of the same loss


# ---------------------------------------------------------------- starting weights and validation


def test_starting_from_another_model(make_config: MakeConfig, tmp_path: Path) -> None:
    first = Trainer(make_config(steps=1), tmp_path / "a").run()
    second = Trainer(make_config(steps=1, seed=5, init=str(first)), tmp_path / "b")
    expected = dict(load_model(first).network.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in second.plain.named_parameters())
    assert all(torch.equal(second.ema[name], p) for name, p in second.plain.named_parameters())


def test_a_wider_network_starts_as_the_one_it_grew_from(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=1)
    first = load_model(Trainer(config, tmp_path / "a").run())
    wider = [width + 4 for width in config.network.channels]
    grown = make_config(init=str(tmp_path / "a" / "last.safetensors"), grow=True, seed=5, network__channels=wider)
    second = Trainer(grown, tmp_path / "b")
    share = int(re.match(r"(\d+)% of the weights", second.start)[1])  # type: ignore[index]
    assert share == 100 * sum(p.numel() for p in first.network.parameters()) // second.manifest()["parameters"]
    batch = next(loader(second.stream()))
    torch.testing.assert_close(second.plain.eval()(batch.images), first.network(batch.images), rtol=1e-3, atol=1e-3)
    path = second.run(until=1)
    assert load_model(path).record["config"]["network"]["channels"] == wider


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [4, 12, 16]}, "one finer level, or as many levels"),
        ({"channels": [12, 12, 12]}, "only channels may change .* residual False and True"),
        ({}, "no finer level and no wider one; leave out 'grow'"),
    ],
)
def test_what_a_network_cannot_grow_into_is_refused(
    change: dict[str, Any], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=1, network__channels=[8, 8, 8], network__subpixel=1)
    first = Trainer(config, tmp_path / "a").run()
    changes = {f"network__{key}": value for key, value in change.items()}
    if "residual" in message:
        changes["network__residual"] = True
    with pytest.raises(ConfigError, match=message):
        Trainer(
            make_config(
                init=str(first), grow=True, **{"network__channels": [8, 8, 8], "network__subpixel": 1} | changes
            ),
            tmp_path / "b",
        )


def test_a_network_does_not_grow_into_one_of_fewer_levels() -> None:
    with pytest.raises(ConfigError, match="one finer level, or as many levels"):
        check_wider(NetworkConfig(channels=(8, 12, 16, 20)), NetworkConfig(channels=(12, 16, 20)))
    with pytest.raises(ConfigError, match=r"only channels may change .* subpixel 1, the recipe .* and 2"):
        check_wider(NetworkConfig(channels=(8, 12, 16), subpixel=1), NetworkConfig(channels=(12, 16, 20)))


def test_templates_of_other_voxel_size_and_shape_train_together(
    two_grids: list[str], make_config: MakeConfig, tmp_path: Path
) -> None:
    """A step on each alone, and one on both in one batch."""
    trainer = Recorder(make_config(templates=two_grids, batch_size=2), tmp_path)
    stream = trainer.stream()
    kinds = {frozenset(plan.template for plan in batch.plans): batch for batch in map(stream.batch, range(12))}
    assert len(kinds) == 3
    for batch in kinds.values():
        trainer.step(batch)
    assert np.isfinite(trainer.losses).all()
    assert trainer.manifest()["templates"] == ["tiny", "tiny_half"]


def test_validation_of_a_perfect_and_a_blind_network(
    template_folders: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(templates=[str(template_folders["head"])])
    trainer = Trainer(config, tmp_path)
    target = trainer.target

    class Blind(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros((1, len(target), *image.shape[2:]))
            logits[:, 2] = 1
            return logits

    table = validation_table(Blind(), config, trainer.templates, target, ["t1", "random"])
    assert set(table) == {"t1", "random"}
    for row in table.values():
        assert row["GM"] == 0.0
        assert 0 < row["WM"] < 0.5
        assert "Background" not in row
        assert "Caudate" not in row  # the tiny head has none
    rows = [sum(row.values()) / len(row) for row in table.values()]
    assert mean_dice(table) == pytest.approx(sum(rows) / 2)
    assert table == validation_table(Blind(), config, trainer.templates, target, ["t1", "random"])
