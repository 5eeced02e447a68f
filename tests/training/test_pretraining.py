"""Pretraining: what a step compares, resuming bit by bit, what is kept of the network, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthseg.config import PretrainConfig, TrainConfig, parse
from synthseg.config.pretraining import SamplingConfig
from synthseg.errors import ConfigError, TrainingError
from synthseg.labels import load_scheme
from synthseg.networks.backbone import weights_of
from synthseg.networks.checkpoint import load_model, read_tensors
from synthseg.networks.feature_file import load_features
from synthseg.paths import data_dir
from synthseg.training.contrastive import LOSSES, Voxels
from synthseg.training.guards import follow
from synthseg.training.loop import Trainer
from synthseg.training.objective import by_view, match, places_of
from synthseg.training.pretraining import Pretrainer, check
from synthseg.training.state import RunState
from synthseg.training.view_stream import ViewStream

Make = Callable[..., PretrainConfig]
GOLDEN = Path(__file__).with_name("golden_pretraining_losses.txt")
TERM = {"loss": "hscl", "hidden": 12, "dimensions": 20, "sampling": {"voxels": 24, "exclusion_mm": 3.0}}


@pytest.fixture
def make(template_folders: dict[str, Path]) -> Make:
    """``make(steps=3, contrast=...)``: a recipe that runs in a second, with changes."""

    def build(**changes: Any) -> PretrainConfig:
        record: dict[str, Any] = {
            "templates": [str(template_folders["head"]), str(template_folders["coarse"])],
            "steps": 4,
            "precision": "fp32",
            "report": False,
            "contrast": [TERM],
            "generator": {
                "shape": [16, 24, 16],
                "voxel_size_mm": 2.5,
                "subsamples": 2,
                "views": {"severities": [0.0, 0.5, 1.0]},
                "artefacts": {"strip_probability": 0.0, "crop_probability": 0.0},
            },
            "network": {"channels": [6, 8, 10]},
            "optimiser": {"warmup_steps": 2, "learning_rate": 0.02},
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = record
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        return parse(PretrainConfig, record, "test")

    return build


class Recorder(Pretrainer):
    """Keeps the loss of every step."""

    def step(self, batch: Any) -> tuple[float, float]:
        found = super().step(batch)
        self.losses = [*getattr(self, "losses", []), found[0]]
        return found


pytestmark = pytest.mark.usefixtures("one_thread")


def test_losses_are_the_golden_ones(make: Make, tmp_path: Path) -> None:
    expected = [float(line) for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    trainer = Recorder(make(segmentation_weight=1.0, anatomy_weight=1.0), tmp_path)
    trainer.run()
    now = "\n".join(f"{loss:.5f}" for loss in trainer.losses)
    assert trainer.losses == pytest.approx(expected, abs=1e-3), f"if the change is meant, write to {GOLDEN}:\n{now}"


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_resuming_is_going_on(optimiser: str, make: Make, tmp_path: Path) -> None:
    config = make(optimiser__name=optimiser, segmentation_weight=1.0, scored_cells=2)
    whole = Recorder(config, tmp_path / "whole")
    whole.run()
    first = Recorder(config, tmp_path / "parts")
    first.run(until=2)
    second = Recorder(config, tmp_path / "parts", resume=True)
    assert second.state.step == 2
    second.run()
    assert first.losses + second.losses == whole.losses
    for (name, a), b in zip(weights_of(whole.plain).items(), weights_of(second.plain).values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, second.ema[name]) for name, a in whole.ema.items())


def test_workers_do_not_change_a_run(make: Make, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 1):
        run = Recorder(make(workers=workers, steps=2), tmp_path / str(workers))
        run.run()
        losses.append(run.losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_trains(loss: str, make: Make, tmp_path: Path) -> None:
    """With two anatomies of different label sets, on two levels, with displaced views."""
    term = {**TERM, "loss": loss, "sampling": {"voxels": 20, "levels": [-1, -2]}}
    config = make(contrast=term, batch_size=2, anatomy_weight=0.0, generator__views__perturbation_mm=1.0)
    run = Pretrainer(config, tmp_path)
    before = {k: v.detach().clone() for k, v in weights_of(run.plain).items()}
    value, matched = run.step(run.stream().batch(0))
    assert run.terms() == {loss: pytest.approx(value)}
    assert 0 <= matched <= 1
    moved = {k.split(".")[0] for k, v in weights_of(run.plain).items() if not torch.equal(v, before[k])}
    assert moved == {"features", "projections"}


@pytest.mark.parametrize("loss", ["info_nce", "hucl"])
def test_features_learn_which_voxels_belong_together(
    loss: str, make: Make, template_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The share of voxels that are found again in the last view rises far above chance, 1 in 24."""
    term = {**TERM, "loss": loss, "temperature": 0.1}
    config = make(
        templates=[str(template_folders["head"])], contrast=term, anatomy_weight=0.0, steps=40, optimiser__ema_decay=0.5
    )
    run = Pretrainer(config, tmp_path)
    stream = run.stream()
    found = [run.step(stream.batch(number)) for number in range(40)]
    early, late = (sum(figure for _, figure in part) / 8 for part in (found[:8], found[-8:]))
    assert late > early + 0.1
    assert sum(value for value, _ in found[-8:]) < 0.9 * sum(value for value, _ in found[:8])


def test_the_terms_are_weighted(make: Make, tmp_path: Path) -> None:
    terms = [TERM, {**TERM, "loss": "sup_con", "weight": 3.0}, {**TERM, "weight": 0.5}]
    config = make(contrast=terms, anatomy_weight=2.0, gradient_weight=0.25, segmentation_weight=4.0)
    run = Pretrainer(config, tmp_path)
    loss, dice = run.step(run.stream().batch(0))
    found = run.terms()
    weights = {"t1": 2.0, "t1_gradient": 0.5, "hscl": 1.0, "sup_con": 3.0, "hscl_2": 0.5, "segmentation": 4.0}
    assert set(found) == set(weights)
    assert loss == pytest.approx(sum(weights[name] * value for name, value in found.items()), rel=1e-5)
    assert 0 < dice < 1


# ---------------------------------------------------------------- files


def test_a_run_folder_is_complete(make: Make, template_folders: dict[str, Path], tmp_path: Path) -> None:
    config = make(
        steps=2,
        validate_every=1,
        report=True,
        segmentation_weight=1.0,
        templates=[str(template_folders["head"])],
        validation_templates=[str(template_folders["other"]), str(template_folders["coarse"])],
    )
    path = Pretrainer(config, tmp_path).run()
    assert path == tmp_path / "pretrained.safetensors"
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith("events.")}
    expected = {"config.json", "train.json", "log.csv", "views.png", "state.safetensors"}
    assert names == expected | {"pretrained.safetensors", "best.safetensors"}
    assert PretrainConfig.model_validate_json((tmp_path / "config.json").read_text()) == config
    model = load_features(path)
    assert {name: head["task"] for name, head in model.heads.items()} == {
        "anatomy": "reconstruction",
        "segmentation": "segmentation",
    }
    assert model.labels_of("segmentation") == load_scheme("siam16")
    assert not any("projection" in name for name in read_tensors(path)[0])
    figures = json.loads((tmp_path / "train.json").read_text())["validation"]
    parts = figures["terms"]
    assert set(parts) == {"t1", "t1_gradient", "hscl", "segmentation", "dice", "loss"}
    assert figures["mean"] == -parts["loss"]
    total = parts["t1"] + parts["t1_gradient"] + parts["hscl"] + parts["segmentation"]
    assert parts["loss"] == pytest.approx(total, abs=1e-3)
    logged = [line.split()[3:] for line in (tmp_path / "log.csv").read_text().splitlines() if "2 validation" in line]
    assert {name: float(value) for name, value in logged} == parts  # the loss is no Dice


def test_a_figure_that_nothing_has_is_left_out(
    make: Make, template_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of held-out heads of which the views have no point in common, there is no match."""
    term = {**TERM, "adaptive_temperature": True}
    held_out = {"templates": [str(template_folders["head"])], "validation_templates": [str(template_folders["other"])]}
    run = Pretrainer(make(contrast=[term], **held_out), tmp_path)
    blank = replace(run.stream().batch(0), labels=torch.zeros(3, 16, 24, 16, dtype=torch.uint8))
    monkeypatch.setattr(ViewStream, "anatomies", lambda *_: blank)
    assert np.isfinite(run.validate())
    assert set(run.state.validation["terms"]) == {"t1", "t1_gradient", "hscl", "loss"}
    assert run.state.validation["terms"]["hscl"] == 0


def test_the_average_of_the_weights_is_what_is_saved(make: Make, tmp_path: Path) -> None:
    run = Pretrainer(make(steps=2), tmp_path)
    run.run()
    saved = weights_of(load_features(tmp_path / "pretrained.safetensors").network)
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, run.ema[f"features.{name}"], rtol=2e-3, atol=1e-3)
    assert any(
        not torch.allclose(run.ema[f"features.{k}"], v, atol=1e-4) for k, v in weights_of(run.plain.features).items()
    )


def test_a_segmentation_starts_from_the_features(make: Make, template_folders: dict[str, Path], tmp_path: Path) -> None:
    """All of the body; the last layer as well if the same classes were segmented."""
    plain = {"generator": {"shape": [16, 24, 16], "voxel_size_mm": 2.5, "subsamples": 2}, "precision": "fp32"}
    for weight in (0.0, 1.0):
        path = Pretrainer(make(steps=1, segmentation_weight=weight), tmp_path / str(weight)).run()
        recipe = {**plain, "network": {"channels": [6, 8, 10]}, "templates": [str(template_folders["head"])]}
        trainer = Trainer(parse(TrainConfig, {**recipe, "init": str(path)}, "test"), tmp_path / f"seg{weight}")
        given, own = weights_of(load_features(path).network), weights_of(trainer.plain)
        body = [name for name in own if "output_block" not in name]
        assert all(torch.equal(own[name], given[name]) for name in body)
        last = torch.equal(
            own["body.output_block.conv.conv.weight"],
            given.get("heads.segmentation.weight", own["body.output_block.conv.conv.weight"] + 1),
        )
        assert last == (weight > 0)
        assert trainer.start.startswith("100%") == (weight > 0)
        assert trainer.manifest()["earlier"][0]["steps"] == 1
        assert trainer.step(trainer.stream().batch(0))[0] > 0


def test_pretraining_starts_from_a_segmentation(make: Make, make_config: Any, tmp_path: Path) -> None:
    model = Trainer(make_config(steps=1), tmp_path / "a").run()
    run = Pretrainer(make(init=str(model), segmentation_weight=1.0), tmp_path / "b")
    old, new = read_tensors(model)[0], weights_of(run.plain.features)
    assert torch.equal(new["heads.segmentation.weight"], old["body.output_block.conv.conv.weight"].float())
    name = next(name for name in new if "bottleneck" in name)
    assert torch.equal(new[name], old[name].float())
    other = Pretrainer(make(init=str(model), segmentation_weight=1.0, scheme="head"), tmp_path / "c")
    assert len(weights_of(other.plain.features)["heads.segmentation.weight"]) == 8 * len(load_scheme("head"))
    renamed = json.loads((data_dir("schemes") / "siam16.json").read_text())
    renamed["labels"][6]["name"] = "Another"  # the same ids say other classes: their head begins anew
    (tmp_path / "renamed.json").write_text(json.dumps(renamed))
    again = Pretrainer(
        make(init=str(model), segmentation_weight=1.0, scheme=str(tmp_path / "renamed.json")), tmp_path / "e"
    )
    assert not torch.equal(
        weights_of(again.plain.features)["heads.segmentation.weight"], new["heads.segmentation.weight"]
    )
    for width in (12, 512):  # large projections, which are always new, do not make up for a body that does not fit
        term = {**TERM, "hidden": width}
        with pytest.raises(ConfigError, match="of the weights"):
            Pretrainer(make(init=str(model), network__channels=[12, 14, 16], contrast=term), tmp_path / "d")


def test_what_was_taken_over_is_not_rounded_up(make: Make, tmp_path: Path) -> None:
    run = Pretrainer(make(), tmp_path)
    run.say_start(0.004)
    assert run.start.startswith("99% of the weights")
    run.say_start(0.0)
    assert run.start.startswith("100% of the weights")


def test_the_picture_of_the_first_batch(make: Make, tmp_path: Path) -> None:
    path = Pretrainer(make(), tmp_path / "run").draw_first_batch(tmp_path / "first.png")
    assert path.stat().st_size > 5000
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_with_its_plans(make: Make, tmp_path: Path) -> None:
    run = Pretrainer(make(), tmp_path)
    with torch.no_grad():
        next(run.plain.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"nan at step 0.*offending_plan\.json"):
        run.run()
    assert [plan["view"] for plan in json.loads((tmp_path / "offending_plan.json").read_text())] == [0, 1, 2]


def test_a_loss_below_zero_does_not_count_as_divergence(make: Make) -> None:
    """Those without a term that bounds them (decoupled, pixel propagation) may be."""
    state, config = RunState(), make().divergence
    for step in range(1, 3000):
        state.step = step
        assert not follow(state, config, -0.8, 0.1)


# ---------------------------------------------------------------- refused before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast": [], "anatomy_weight": 0.0}, "nothing to learn"),
        ({"contrast": {"loss": "info_nce"}, "generator__views": {"severities": [1.0]}}, "severities has 1.*sup_con"),
        ({"contrast": {"sampling": {"levels": [-1, -4]}}}, r"contrast\[0\].*\[-4\] is beyond the 3 levels"),
        ({"contrast": {"loss": "equiangular", "dimensions": 8}}, "siam16 has 16 structures; give 15 or more"),
        ({"generator__shape": [16, 24, 20]}, "divisible by 8"),
        ({"network": {"architecture": "unet", "channels": [6, 8]}}, "decoder of a dynunet, got unet"),
    ],
)
def test_recipes_that_cannot_run_are_refused(changes: dict[str, Any], message: str, make: Make, tmp_path: Path) -> None:
    config = make(**changes)
    with pytest.raises(ConfigError, match=message):
        check(config)
    with pytest.raises(ConfigError, match=message):
        Pretrainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_structure_has_no_equal_angles(make: Make, tmp_path: Path) -> None:
    scheme = tmp_path / "one.json"
    scheme.write_text(json.dumps({"name": "one", "labels": [{"id": 0, "name": "none"}, {"id": 1, "name": "head"}]}))
    with pytest.raises(ConfigError, match="has 1; choose another loss, or a scheme with several"):
        check(make(contrast={"loss": "equiangular"}, scheme=str(scheme)))


@pytest.mark.parametrize(
    "change",
    [
        {"contrast": {"loss": "sup_con"}},
        {"seed": 3},
        {"anatomy_weight": 0.5},
        {"generator__views": {"severities": [0.0, 1.0]}},
    ],
)
def test_resuming_with_another_recipe_is_refused(change: dict[str, Any], make: Make, tmp_path: Path) -> None:
    Pretrainer(make(), tmp_path).run(until=1)
    with pytest.raises(ConfigError, match="the run was started with other " + next(iter(change)).replace("__", ".")):
        Pretrainer(make(**change), tmp_path, resume=True)


def test_features_do_not_segment(make: Make, tmp_path: Path) -> None:
    path = Pretrainer(make(steps=1), tmp_path).run()
    with pytest.raises(Exception, match="holds features, not a segmentation"):
        load_model(path)


# ---------------------------------------------------------------- voxels and their embeddings


def voxels(index: list[list[int]]) -> Voxels:
    at = torch.tensor(index)
    nothing = torch.zeros_like(at)
    return Voxels(at, torch.zeros(*at.shape, 3), nothing, nothing, nothing, nothing, SamplingConfig())


def test_voxels_are_read_where_they_are() -> None:
    """Two anatomies of two views with different numbers of points: images 0 to 3."""
    sampled = [voxels([[5, 6, 7], [8, 9, 10]]), voxels([[1, 2], [3, 4]])]
    image, place = places_of(sampled)
    assert image.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert place.tolist() == [5, 6, 7, 8, 9, 10, 1, 2, 3, 4]
    embeddings = place.float()[None, :, None]
    joined = by_view(embeddings, sampled)[0, :, 0]
    assert joined.tolist() == [5, 6, 7, 1, 2, 8, 9, 10, 3, 4]  # the first views of all anatomies, then the second


def test_match_is_the_share_that_is_found_again() -> None:
    sampled = [voxels([[0, 1, 2], [3, 4, 5]]), voxels([[0, 1], [2, 3]])]
    first = torch.eye(4)[:3]
    last = 2 * torch.eye(4)[[0, 2, 1]]  # the second and third point are taken for each other
    other = torch.eye(4)[:2]
    embeddings = torch.cat([first, last, other, other])[None]
    assert float(match(embeddings, sampled)) == pytest.approx((1 / 3 + 1) / 2)
    assert torch.isnan(match(embeddings[:, :0], [voxels([[], []])]))
