"""Fine-tuning: what is trained and what is kept, resuming bit by bit, few images, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.config import FinetuneConfig, parse
from synthseg.config.finetuning import TASKS
from synthseg.errors import ConfigError, LabelError
from synthseg.labels import load_scheme
from synthseg.networks.backbone import weights_of
from synthseg.networks.checkpoint import load_model, read_tensors
from synthseg.networks.feature_file import load_features, save_features
from synthseg.networks.features import FeatureNetwork
from synthseg.paths import data_dir
from synthseg.training.finetuning import Finetuner, PairStream, check

Make = Callable[..., FinetuneConfig]
SIAM = load_scheme("siam16")
NETWORK = {"channels": [6, 8, 10], "subpixel": 2}
GENERATOR: dict[str, Any] = {
    "shape": [16, 24, 24],
    "voxel_size_mm": 2.0,
    "subsamples": 2,
    "artefacts": {"bias_std": [0.3, 0.6], "bias_spacing_mm": [20.0, 40.0]},
}


@pytest.fixture(autouse=True)
def _single(one_thread: None) -> None:
    """Sums in one order, so that runs can be compared bit by bit."""


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of features with two heads: of classes, and of an image."""
    config = parse(FinetuneConfig, {"network": NETWORK, "generator": GENERATOR}, "test")
    torch.manual_seed(1)
    network = FeatureNetwork(config.network, {"segmentation": len(SIAM), "anatomy": 1})
    path = tmp_path_factory.mktemp("features") / "features.safetensors"
    heads: dict[str, dict[str, Any]] = {
        "segmentation": {"task": "segmentation", "labels": SIAM.to_dict()},
        "anatomy": {"task": "reconstruction"},
    }
    save_features(path, network, config, heads, {"templates": ["earlier"], "steps": 7})
    return path


@pytest.fixture
def make(template_folders: dict[str, Path], features: Path) -> Make:
    def make_config(**changes: Any) -> FinetuneConfig:
        record: dict[str, Any] = {
            "task": "reconstruction",
            "init": str(features),
            "templates": [str(template_folders["head"])],
            "steps": 3,
            "precision": "fp32",
            "report": False,
            "generator": GENERATOR,
            "network": NETWORK,
            "optimiser": {"warmup_steps": 1, "learning_rate": 0.02},
        }
        return parse(FinetuneConfig, record | changes, "test")

    return make_config


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_features_stay_and_free_ones_move(frozen: bool, make: Make, features: Path, tmp_path: Path) -> None:
    run = Finetuner(make(frozen=frozen, new_head=True), tmp_path)
    run.run()
    before, _ = read_tensors(features)
    after, _ = read_tensors(tmp_path / "finetuned.safetensors")
    body = [name for name in before if name.startswith("body.")]
    same = [torch.equal(before[name], after[name]) for name in body]
    assert all(same) if frozen else not any(same[:4])
    assert run.start == "100% of the features from " + str(features)
    kept = load_features(tmp_path / "finetuned.safetensors").heads
    assert set(kept) == ({"reconstruction", "segmentation"} if frozen else {"reconstruction"})
    assert kept["reconstruction"] == {"task": "reconstruction"}
    if frozen:  # the other head says what it said; the one for the same task has been replaced
        assert torch.equal(before["heads.segmentation.weight"], after["heads.segmentation.weight"])


def test_a_layer_for_the_task_is_taken_over_unless_a_new_one_is_asked_for(
    make: Make, features: Path, tmp_path: Path
) -> None:
    own, _ = read_tensors(features)
    for new in (False, True):
        run = Finetuner(make(new_head=new), tmp_path / str(new))
        weight = weights_of(run.plain)["features.heads.reconstruction.weight"]
        assert torch.equal(weight.half(), own["heads.anatomy.weight"]) == (not new)
        assert ("layer" in run.start) == (not new)
    segmentation = Finetuner(make(task="segmentation"), tmp_path / "segmentation")
    weight = weights_of(segmentation.plain)["features.heads.segmentation.weight"]
    assert torch.equal(weight.half(), own["heads.segmentation.weight"])


def test_classes_of_another_scheme_start_from_their_parts(make: Make, features: Path, tmp_path: Path) -> None:
    """``head`` says which class of ``siam16`` each of its labels is: left and right begin as the same class."""
    run = Finetuner(make(task="segmentation", scheme="head"), tmp_path)
    own, _ = read_tensors(features)
    head = run.target
    weight = weights_of(run.plain)["features.heads.segmentation.weight"].unflatten(0, (len(head), -1))
    source = own["heads.segmentation.weight"].unflatten(0, (len(SIAM), -1))
    for label_id in (10, 49):  # both thalami
        assert torch.equal(weight[head.index_of[label_id]].half(), source[6])


def test_the_same_ids_with_other_names_start_anew(make: Make, features: Path, tmp_path: Path) -> None:
    renamed = json.loads((data_dir("schemes") / "siam16.json").read_text())
    renamed["labels"][6]["name"] = "Another"
    (tmp_path / "renamed.json").write_text(json.dumps(renamed))
    run = Finetuner(make(task="segmentation", scheme=str(tmp_path / "renamed.json")), tmp_path / "run")
    weight = weights_of(run.plain)["features.heads.segmentation.weight"].half()
    own = read_tensors(features)[0]["heads.segmentation.weight"]
    assert weight.shape == own.shape
    assert not torch.equal(weight, own)


def test_tasks_that_need_the_image_begin_at_their_baseline(
    make: Make, template_folders: dict[str, Path], tmp_path: Path
) -> None:
    held_out = {"validation_templates": [str(template_folders["other"])], "validation_contrasts": ["t1"]}
    for task in ("super-resolution", "bias-field"):
        run = Finetuner(make(task=task, **held_out), tmp_path / task)
        assert run.validate() == 0.0
        row = run.state.validation["figures"]["t1"]
        assert row[run.task.figure] == row[f"baseline_{run.task.figure}"] > 0


@pytest.mark.parametrize(
    ("task", "steps", "gain", "best"),
    [
        ("segmentation", 15, 0.05, 0.05),
        ("reconstruction", 15, 0.5, -0.5),  # from far below the baseline
        ("super-resolution", 30, 0.03, 0.03),
        ("bias-field", 15, 0.4, 0.4),
    ],
)
def test_every_task_learns(task: str, steps: int, gain: float, best: float, make: Make, tmp_path: Path) -> None:
    """Two images by heart, features free; where the start is the baseline, better than without a network."""
    config = make(
        task=task,
        steps=steps,
        frozen=False,
        init=None,
        few_shot=2,
        augment=False,
        optimiser={"warmup_steps": 2, "learning_rate": 0.01, "schedule": "constant", "ema_decay": 0.8},
        network={"channels": [8, 12, 16], "subpixel": 1},
        generator=GENERATOR
        | {
            "contrast": {"std": [0.0, 0.02], "texture_std": [0.0, 0.02], "soft_texture_std": [0.0, 0.05]},
            "artefacts": {
                "lowres_spacing_mm": 5.0,
                "bias_std": [0.3, 0.6],
                "bias_spacing_mm": [20.0, 40.0],
                "noise_std": [0.0, 0.01],
                "crop_probability": 0.0,
                "strip_probability": 0.0,
            },
        },
    )
    run = Finetuner(config, tmp_path)
    stream = run.stream()
    pairs = [stream.sample(index)[0] for index in (0, 1)]

    def score() -> float:
        with run.averaged(), torch.no_grad():
            results = [run.task.result(run.network(pair.image[None]), pair.image[None])[0] for pair in pairs]
        found = [run.task.figures(result, pair)[run.task.figure] for result, pair in zip(results, pairs, strict=True)]
        without = [run.task.figures(run.task.baseline(pair), pair)[run.task.figure] for pair in pairs]
        return run.task.score(float(np.mean(found)), float(np.mean(without)))

    begun = score()
    run.run()
    assert score() > max(begun + gain, best)


def test_resuming_is_going_on(make: Make, tmp_path: Path) -> None:
    config = make(steps=4, task="bias-field")
    whole = Finetuner(config, tmp_path / "whole")
    whole.run()
    Finetuner(config, tmp_path / "parts").run(until=2)
    second = Finetuner(config, tmp_path / "parts", resume=True)
    assert second.state.step == 2
    second.run()
    for (name, a), b in zip(weights_of(whole.plain).items(), weights_of(second.plain).values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, second.ema[name]) for name, a in whole.ema.items())
    with pytest.raises(ConfigError, match="other frozen"):
        Finetuner(make(steps=4, task="bias-field", frozen=False), tmp_path / "parts", resume=True)


def test_frozen_features_go_on_without_the_file_that_they_came_from(make: Make, features: Path, tmp_path: Path) -> None:
    init = tmp_path / "init.safetensors"
    init.write_bytes(features.read_bytes())
    Finetuner(make(init=str(init)), tmp_path / "run").run(until=2)
    init.unlink()
    path = Finetuner(make(init=str(init)), tmp_path / "run", resume=True).run()
    assert set(load_features(path).heads) == {"reconstruction", "segmentation"}
    kept, before = (read_tensors(file)[0]["heads.segmentation.weight"] for file in (path, features))
    assert torch.equal(kept, before)


def test_a_run_folder_is_complete(make: Make, template_folders: dict[str, Path], tmp_path: Path) -> None:
    held_out = {"validation_templates": [str(template_folders["other"])], "validation_contrasts": ["t1", "random"]}
    run = Finetuner(make(task="segmentation", steps=2, validate_every=1, report=True, **held_out), tmp_path)
    best = run.run()
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith("events.")}
    assert names >= {"config.json", "train.json", "state.safetensors", "log.csv", "examples.png", "last.safetensors"}
    manifest = json.loads((tmp_path / "train.json").read_text())
    assert manifest["validation"]["task"] == "segmentation"
    assert set(manifest["validation"]["figures"]) == {"t1", "random"}
    assert manifest["earlier"][0]["templates"] == ["earlier"]
    features, model = load_features(best), load_model(tmp_path / "segmentation.safetensors")
    assert features.labels_of("segmentation") == SIAM == model.labels
    image = torch.rand(1, 1, 16, 24, 24)
    with torch.no_grad():
        logits = features.network.head("segmentation", features.network(image)[-1])
        torch.testing.assert_close(model.network(image), logits, rtol=1e-4, atol=1e-4)


def test_few_shot_is_a_few_images(make: Make, tmp_path: Path) -> None:
    for augment in (True, False):
        run = Finetuner(make(few_shot=2, augment=augment, task="segmentation"), tmp_path / str(augment))
        stream = run.stream()
        plans = [stream.sample(index)[1] for index in range(6)]
        heads = {plan.model_copy(update={"artefacts": plans[0].artefacts}).model_dump_json() for plan in plans}
        assert len(heads) == 2
        assert len({plan.artefacts.model_dump_json() for plan in plans}) == (6 if augment else 2)
    assert len({plan.model_dump_json() for _, plan in map(endless(make, tmp_path).sample, range(4))}) == 4


def endless(make: Make, folder: Path) -> PairStream:
    return Finetuner(make(), folder / "endless").stream()


def test_samples_do_not_depend_on_who_makes_them(make: Make, tmp_path: Path) -> None:
    run = Finetuner(make(batch_size=2), tmp_path)
    together = run.stream().batch(3)
    alone = [run.stream(rank, 2).batch(3) for rank in (0, 1)]
    assert [plan for part in alone for plan in part.plans] == together.plans
    for a, b in zip(together.pairs, [pair for part in alone for pair in part.pairs], strict=True):
        assert torch.equal(a.image, b.image)


@pytest.fixture
def images(tmp_path: Path) -> list[dict[str, str]]:
    """Two small scans with labels of siam16."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 26, 24)], indexing="ij")
    found = []
    for name, size in (("a", 0.5), ("b", 0.6)):
        radius = np.sqrt(x**2 + y**2 + z**2)
        labels = np.where(radius < size, 2, np.where(radius < 0.8, 1, 0)).astype(np.int16)
        image = np.array([0, 300, 800], dtype=np.float32)[labels] + 10 * y
        for kind, data in (("image", image.astype(np.float32)), ("label", labels)):
            nib.save(nib.Nifti1Image(data, np.diag([2.0, 1.8, 2.2, 1.0])), tmp_path / f"{name}_{kind}.nii.gz")
        found.append(
            {"image": str(tmp_path / f"{name}_image.nii.gz"), "labels": str(tmp_path / f"{name}_label.nii.gz")}
        )
    return found


def test_real_images_are_learned_from_and_measured_on(images: list[dict[str, str]], make: Make, tmp_path: Path) -> None:
    config = make(task="segmentation", templates=[], images=images[:1], validation_images=images[1:], new_head=True)
    run = Finetuner(config, tmp_path / "run")
    looks = [run.stream().sample(index) for index in range(3)]
    assert len({look.model_dump_json() for _, look in looks}) == 3
    assert not torch.equal(looks[0][0].target, looks[1][0].target)
    run.run()
    row = run.state.validation["figures"]["b_image"]
    assert 0 <= row["dice"] <= 1
    manifest = json.loads((tmp_path / "run" / "train.json").read_text())
    assert (manifest["images"], manifest["validation_images"], manifest["templates"]) == (["a_image"], ["b_image"], [])
    assert load_model(tmp_path / "run" / "segmentation.safetensors").labels == SIAM


def test_held_out_images_of_one_name_are_all_measured(
    images: list[dict[str, str]], make: Make, template_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The file name may be that of another, or of a contrast."""
    renamed = []
    for folder, one in zip(("p", "q"), images, strict=True):
        (tmp_path / folder).mkdir()
        record = {"image": tmp_path / folder / "t1.nii.gz", "labels": tmp_path / folder / "t1_seg.nii.gz"}
        for kind, path in record.items():
            path.write_bytes(Path(one[kind]).read_bytes())
        renamed.append({kind: str(path) for kind, path in record.items()})
    held_out = {"validation_templates": [str(template_folders["other"])], "validation_contrasts": ["t1"]}
    run = Finetuner(make(task="segmentation", validation_images=renamed, **held_out), tmp_path / "run")
    run.validate()
    assert set(run.state.validation["figures"]) == {"t1", "p/t1", "q/t1"}


def test_images_that_show_nothing_to_measure_are_left_out(
    images: list[dict[str, str]], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Finetuner(make(task="segmentation", validation_images=images[:1]), tmp_path / "run")
    shown = run.validation_pairs()["a_image"][0]
    blank = replace(shown, target=torch.zeros_like(shown.target), head=torch.zeros_like(shown.head))
    expected = run.validate()
    monkeypatch.setattr(run, "validation_pairs", lambda: {"a_image": [shown, blank], "blank": [blank]})
    assert run.validate() == expected
    assert set(run.state.validation["figures"]) == {"a_image"}
    monkeypatch.setattr(run, "validation_pairs", lambda: {"blank": [blank]})
    assert np.isnan(run.validate())
    assert len(run.state.validations) == 2
    assert "NaN" not in json.dumps(run.manifest())


def test_held_out_labels_must_tell_a_class(images: list[dict[str, str]], make: Make, tmp_path: Path) -> None:
    labels = [{"id": i, "name": f"any {i}", "to": {"siam16": list(range(17 if i else 1))}} for i in (0, 1, 2)]
    (tmp_path / "vague.json").write_text(json.dumps({"name": "vague", "labels": labels}))
    one = images[1] | {"scheme": str(tmp_path / "vague.json")}
    with pytest.raises(ConfigError, match="validation_images: the labels of b_image tell no class of siam16"):
        Finetuner(make(task="segmentation", validation_images=[images[0], one]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_few_real_images_are_the_first(images: list[dict[str, str]], make: Make, tmp_path: Path) -> None:
    run = Finetuner(make(task="segmentation", templates=[], images=images, few_shot=1), tmp_path / "run")
    stream = run.stream()
    assert {stream.sample(index)[1].image for index in range(6)} == {"a_image"}
    assert run.manifest()["images"] == ["a_image"]


def test_real_images_as_they_are(images: list[dict[str, str]], make: Make, tmp_path: Path) -> None:
    run = Finetuner(make(task="segmentation", templates=[], images=images, augment=False), tmp_path / "run")
    stream = run.stream()
    targets = {stream.sample(index)[0].target.numpy().tobytes() for index in range(8)}
    assert len(targets) == 2


def test_what_cannot_run_is_refused_before_anything_is_written(
    images: list[dict[str, str]], make: Make, template_folders: dict[str, Path], features: Path, tmp_path: Path
) -> None:
    elsewhere = images[0] | {"image": str(tmp_path / ".." / tmp_path.name / "a_image.nii.gz")}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"templates": []}, "nothing to learn from"),
        ({"init": None}, "frozen features need a trained network"),
        ({"few_shot": 1, "images": images}, "not both"),
        ({"few_shot": 3, "images": images, "templates": []}, "few_shot is 3, but there are 2 images"),
        ({"images": images, "validation_images": images[:1]}, "also trained on"),
        ({"images": images, "validation_images": [elsewhere]}, "also trained on"),
        ({"validation_contrasts": ["t9"]}, "no contrast"),
        ({"task": "segmentation", "dice_weight": 0, "cross_entropy_weight": 0}, "nothing to learn: give dice_weight"),
        ({"network": {"architecture": "unet", "channels": [8, 16, 32]}}, "dynunet"),
    ]
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            check(make(**changes))
    with pytest.raises(ConfigError, match="of the features"):
        Finetuner(make(network={"channels": [6, 8, 12], "subpixel": 2}), tmp_path / "run")
    with pytest.raises(ConfigError, match="has no T1"):
        Finetuner(make(images=images, templates=[]), tmp_path / "run")
    unrelated = tmp_path / "own.json"
    unrelated.write_text(json.dumps({"name": "own", "labels": [{"id": 0, "name": "none"}, {"id": 1, "name": "all"}]}))
    with pytest.raises(LabelError, match="does not say what"):
        Finetuner(make(task="segmentation", scheme=str(unrelated), new_head=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_batch_can_be_looked_at(make: Make, tmp_path: Path) -> None:
    for task in TASKS:
        path = Finetuner(make(task=task), tmp_path).draw_first_batch(tmp_path / f"{task}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
