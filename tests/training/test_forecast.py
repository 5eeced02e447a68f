"""The plan before the first step: what it says, that measuring it changes nothing, and what it refuses."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.config import FinetuneConfig, TrainConfig, parse
from synthseg.errors import TemplateError
from synthseg.networks.backbone import weights_of
from synthseg.training import forecast
from synthseg.training.forecast import Pace, check_templates, measure, peak_memory_bytes, plan
from synthseg.training.loop import Trainer
from synthseg.training.stream import Batch
from synthseg.training.validation import LabelledScan, scan_table

MakeConfig = Callable[..., TrainConfig]


class Recorder(Trainer):
    def step(self, batch):  # type: ignore[no-untyped-def]
        loss, dice = super().step(batch)
        self.losses = [*getattr(self, "losses", []), loss]
        return loss, dice


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_measuring_changes_nothing(optimiser: str, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4, optimiser__name=optimiser)
    plain = Recorder(config, tmp_path / "plain")
    plain.run()
    measured = Recorder(config, tmp_path / "measured")
    before = {k: v.detach().clone() for k, v in weights_of(measured.plain).items()}
    state, rng_state = copy.deepcopy(measured.state), torch.get_rng_state()
    pace = measure(measured, most_steps=3)
    assert pace.steps == 2
    assert 0 < pace.render_s < 10
    assert 0 < pace.network_s < 10
    assert measured.state == state
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert not measured.optimiser.state_dict()["state"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(measured.plain).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in measured.ema.items())
    assert not (tmp_path / "measured").exists()
    measured.run()
    assert measured.losses == plain.losses
    assert all(torch.equal(v, measured.ema[k]) for k, v in plain.ema.items())


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_with_a_plan_equals_one_without(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4, optimiser__name="muon")
    whole = Recorder(config, tmp_path / "whole")
    whole.run()
    Recorder(config, tmp_path / "parts").run(until=2)
    resumed = Recorder(config, tmp_path / "parts", resume=True)
    measure(resumed, most_steps=2)
    resumed.run()
    assert resumed.losses == whole.losses[2:]


def test_the_copy_learns_by_itself(make_config: MakeConfig, tmp_path: Path) -> None:
    """Its steps are real ones: its weights move."""
    trainer = Trainer(make_config(), tmp_path / "a")
    double = forecast.throwaway(trainer, tmp_path / "b")
    assert double.templates[0] is trainer.templates[0]
    before = {k: v.detach().clone() for k, v in weights_of(double.plain).items()}
    double.step(double.stream().batch(0))
    moved = [name for name, tensor in weights_of(double.plain).items() if not torch.equal(tensor, before[name])]
    assert len(moved) > len(before) / 2
    assert double.state.step == 1
    assert trainer.state.step == 0


def test_the_plan_says_what_is_trained(
    make_config: MakeConfig, template_folders: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(steps=1000, validation_templates=[str(template_folders["other"])], validation_contrasts=["t1"])
    trainer = Trainer(config, tmp_path / "run")
    text = "\n".join(plan(trainer, Pace(0.5, 1.5, 4, 3_000_000_000, 0, None)))
    for words in (
        "16 of siam16 and background: GM, WM, CSF",
        "voxel size  2.5 mm (templates 1.4 mm)",
        "16 x 24 x 16 voxels, 40 x 60 x 40 mm; 1 a step",
        "2 to train on, 1 held out (tiny_other)",
        "3.0 GB (measured",
        "1800 steps an hour (measured, 4 steps): 0.50 s to draw, 1.50 s to learn",
        "about 33 min to step 1000",  # 2000 s, and one validation
        f"in {tmp_path / 'run'}, from random weights, step 0 of 1000",
    ):
        assert words in text, text
    assert "not measured (why)" in plan(trainer, None, "why")[-1]


def test_workers_draw_while_the_network_learns() -> None:
    pace = Pace(3.0, 2.0, 4, None, 0, None)
    assert [pace.step_s(workers) for workers in (0, 1, 2)] == [5.0, 3.0, 2.0]


def test_the_time_counts_the_validations_that_are_left(make_config: MakeConfig) -> None:
    pace = Pace(1.0, 3.0, 4, None, 0, None, scans_s=5.0)
    config = make_config(steps=10, validate_every=4, validation_contrasts=["t1", "t2"])
    # from step 5: five steps of 4 s; after steps 8 and 10, two maps in two contrasts of 1 + 3 / 3 s each, and the scans
    assert pace.seconds_to_finish(config, steps_done=5, held_out=2) == 5 * 4 + 2 * (4 * 2 + 5)
    assert pace.seconds_to_finish(config, steps_done=10, held_out=2) == 0
    config = make_config(steps=8, validate_every=4, batch_size=2)
    assert pace.seconds_to_finish(config, steps_done=0, held_out=0) == 8 * 4 + 2 * 5
    record = {"steps": 10, "validate_every": 10, "validation_contrasts": ["t1", "ct"], "validation_images": [{}, {}]}
    for image in record["validation_images"]:
        image |= {"image": "a.nii.gz", "labels": "b.nii.gz"}
    few = parse(FinetuneConfig, record, "test")
    # one map in two contrasts and two images of 2 s each
    assert Pace(1.0, 3.0, 4, None, 0, None).seconds_to_finish(few, steps_done=0, held_out=1) == 10 * 4 + 4 * 2


@pytest.fixture
def two_scans(template_folders: dict[str, Path], tmp_path: Path) -> list[dict[str, str]]:
    """The tiny head, bright as its ids, and the front half of it."""
    labels = nib.load(template_folders["head"] / "labels.nii.gz")
    ids = np.asarray(labels.dataobj)
    found = []
    for name, part in (("whole", ids), ("half", ids[:, ids.shape[1] // 2 :])):
        files = {key: str(tmp_path / f"{name}_{key}.nii.gz") for key in ("image", "labels")}
        nib.save(nib.Nifti1Image(part.astype(np.float32), labels.affine), files["image"])
        nib.save(nib.Nifti1Image(part, labels.affine), files["labels"])
        found.append({**files, "scheme": "head", "name": name})
    return found


@pytest.mark.usefixtures("one_thread")
def test_the_time_of_real_scans_is_measured_on_the_first(
    make_config: MakeConfig, two_scans: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_config(validation_scans=two_scans), tmp_path / "run")
    before = {k: v.detach().clone() for k, v in weights_of(trainer.plain).items()}
    assert [scan.name for scan in trainer.scans] == ["whole", "half"]
    seen: list[tuple[str, bool]] = []

    def slow(network: torch.nn.Module, config: TrainConfig, scans: list[LabelledScan], *rest: Any) -> Any:
        seen.extend((scan.name, network.training) for scan in scans)
        return scan_table(network, config, scans, *rest)

    monkeypatch.setattr(forecast, "scan_table", slow)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: 7.0 * len(seen)))  # 7 s for each scan
    pace = measure(trainer, most_steps=1)
    assert seen == [("whole", False)]
    whole, half = (scan.image.numel() for scan in trainer.scans)
    assert half < whole
    assert pace.scans_s == pytest.approx(7.0 * (1 + half / whole))
    assert trainer.network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer.plain).items())
    (told,) = [line for line in plan(trainer, Pace(0.5, 0.5, 4, None, 0, None, scans_s=90.0)) if "time" in line[:4]]
    assert told == "time        about 96 s to step 6, validations included"


@pytest.mark.parametrize("wanted", [True, False])
def test_steps_are_measured_with_the_algorithms_of_the_run(
    wanted: bool, make_config: MakeConfig, tmp_path: Path
) -> None:
    seen = []

    class Watching(Trainer):
        def compute(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().compute(batch)

    measure(Watching(make_config(deterministic=wanted), tmp_path), most_steps=2)
    assert seen == [wanted] * 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_plan_names_both_voxel_sizes(two_grids: list[str], make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config(templates=two_grids), tmp_path)
    text = "\n".join(plan(trainer, measure(trainer, most_steps=1)))
    assert "voxel size  2.5 mm (templates 1.4 and 2.9 mm)" in text
    assert "steps an hour (measured" in text


def test_several_devices_have_a_plan_without_speed(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config(), tmp_path)
    trainer.fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    told = forecast.forecast(trainer)
    assert told[-1] == "speed       not measured (2 processes share each step)"
    assert not [line for line in told if line.startswith(("memory", "time"))]


@pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss")
def test_peak_memory_is_that_of_the_process() -> None:
    before = peak_memory_bytes()
    assert before is not None
    torch.ones(before // 4 + 50_000_000, dtype=torch.float32)  # as much again, and 200 MB
    after = peak_memory_bytes()
    assert after is not None
    assert after - before > 150_000_000


def test_every_template_is_checked_before_training(
    make_config: MakeConfig, template_folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "labels.nii.gz").write_bytes(b"no image")
    (broken / "labels.json").write_text('{"scheme": "head"}')
    heads = [str(template_folders["head"]), str(broken), str(tmp_path / "missing")]
    with pytest.raises(TemplateError, match=r"missing: not a template"):
        check_templates(make_config(templates=heads))
    with pytest.raises(TemplateError, match=r"broken.labels\.nii\.gz"):
        check_templates(make_config(templates=heads[:2]))
    both = make_config(templates=heads[:2], validation_templates=[str(broken)])
    with pytest.raises(TemplateError, match="2 problems with the templates"):
        check_templates(both)


def test_classes_that_no_template_holds_are_named(make_config: MakeConfig, template_folders: dict[str, Path]) -> None:
    (note,) = check_templates(make_config(templates=[str(template_folders["head"])]))
    assert "Caudate" in note
    assert "Thalamus" not in note
