"""The report: the figures of a small network on the small head, and the page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from synthseg.cli import run
from synthseg.errors import ConfigError
from synthseg.networks.feature_file import load_features
from synthseg.representation import report
from synthseg.representation.report import Measured, labels_of_blocks, measure, report_config
from synthseg.representation.report_page import table_rows, write_report
from synthseg.templates import Template, load_template
from tests.representation.models import write_model


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors", (16, 24, 24), 2.0)


@pytest.fixture(scope="module")
def measured(model_file: Path, tiny_template: Template) -> Measured:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "MATCHED", 100)
        return measure(load_features(model_file), [tiny_template], 2, seed=3)


def test_the_figures(measured: Measured) -> None:
    found = measured.figures
    assert found["channels"] == 6
    assert found["spacing_mm"] == pytest.approx(4)
    assert found["matching"]["within_mm"] == pytest.approx(4)  # one voxel of the grid
    for within in (found["intra_subject"], found["inter_subject"], *found["by_severity"]):
        assert 0 < within["l1"] < 1
        assert -1 < within["ssim"] < 1
    share = found["matching"]["share_within"]
    assert share == sorted(share)
    assert found["matching"]["accuracy"] == pytest.approx(np.mean(found["matching"]["by_severity"]))
    assert 0 < found["neural_collapse"]["effective_rank"] <= 6
    assert sum(found["spectrum"]) == pytest.approx(1)
    assert {"GM", "WM", "Skull", "Head"} <= set(found["classes"]) == set(found["probe"])
    cosines = np.array(found["class_cosines"])
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-6)
    assert len(measured.rows) == 2 * len(report.SEVERITIES)


def test_the_same_seed_gives_the_same_figures(
    measured: Measured, model_file: Path, tiny_template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MATCHED", 100)
    again = measure(load_features(model_file), [tiny_template], 2, seed=3)
    assert again.figures == measured.figures


def test_a_network_that_ignores_its_input_is_no_good(model_file: Path, tiny_template: Template) -> None:
    model = load_features(model_file)
    model.network.register_forward_hook(lambda _m, _i, found: [torch.ones_like(level) for level in found])
    found = measure(model, [tiny_template], 2).figures
    assert found["intra_subject"] == pytest.approx({"l1": 0, "ssim": 1, "ms_ssim": 1})
    assert found["inter_subject"] == found["intra_subject"]
    assert found["separation"]["ssim_difference"] == pytest.approx(0)
    assert found["neural_collapse"]["effective_rank"] == 0
    assert found["uniformity"] == pytest.approx(0, abs=1e-5)
    assert found["matching"]["accuracy"] < 0.2


def test_a_network_that_knows_the_place_in_the_image_alone_matches_little(
    model_file: Path, tiny_template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    def places(_module: object, _inputs: object, found: list[torch.Tensor]) -> list[torch.Tensor]:
        axes = [torch.linspace(-1, 1, n) for n in found[-1].shape[2:]]
        return [*found[:-1], torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]]

    monkeypatch.setattr(report, "MATCHED", 100)
    model = load_features(model_file)
    model.network.register_forward_hook(places)
    blind = measure(model, [tiny_template], 2).figures
    assert blind["apart_mm"] == 8
    assert blind["matching"]["accuracy"] < 0.6
    monkeypatch.setattr(report, "APART_MM", 0.0)
    assert measure(model, [tiny_template], 2).figures["matching"]["accuracy"] > 0.9


def test_the_grid_is_the_networks_own(model_file: Path) -> None:
    config = report_config(load_features(model_file))
    assert (config.voxel_size_mm, config.shape) == (2.0, (16, 24, 24))
    assert config.views.severities == list(report.SEVERITIES)
    assert config.deform.rotation_deg == config.artefacts.strip_probability == 0


def test_labels_of_blocks_by_hand() -> None:
    labels = torch.zeros(4, 2, 2, dtype=torch.uint8)
    labels[0] = 3
    labels[1, 0, 0] = 7  # four 3, one 7, three 0
    labels[2:, 0, 0] = 5  # two 5, six 0
    assert labels_of_blocks(labels, 2).flatten().tolist() == [3, 0]
    assert torch.equal(labels_of_blocks(labels, 1), labels)


def test_one_anatomy_is_too_few(model_file: Path, tiny_template: Template) -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        measure(load_features(model_file), [tiny_template], 1)


def test_the_page(measured: Measured, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(page, measured)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 6
    assert "http://" not in text
    assert "https://" not in text
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["intra_subject"] == measured.figures["intra_subject"]
    names = [name for name, _, _ in table_rows(measured.figures)]
    assert len(set(names)) == len(names)
    assert all(name in text for name in names)


def test_numbers_that_json_does_not_have(measured: Measured, tmp_path: Path) -> None:
    broken = Measured({**measured.figures, "probe": {"GM": 0.5, "<b>": math.nan}, "model": "<script>"})
    write_report(tmp_path / "report.html", broken)
    assert json.loads((tmp_path / "report.json").read_text())["probe"] == {"GM": 0.5, "<b>": None}
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_the_command_writes_a_folder(
    model_file: Path, template_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["features", "--report", str(tmp_path / "out"), "--model", str(model_file), "--n", "2"]
    for name in ("head", "other"):
        arguments += ["--templates", str(template_folders[name])]
    assert run([*arguments, "--device", "cpu"]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"colours.png", "severity.png", "matching.png", "probe.png", "classes.png", "spectrum.png"}
    assert written == {"report.html", "report.json", *pictures}
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures["templates"] == [load_template(template_folders[name]).name for name in ("head", "other")]
    assert run([*arguments, "--device", "cpu"]) == 2
    assert "exists already" in capsys.readouterr().err
