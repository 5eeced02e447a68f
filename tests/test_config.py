"""Recipes: nearest keys, ranges, overrides, YAML in and out."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from synthseg.config import GeneratorConfig, NetworkConfig, TrainConfig, load_yaml, parse, set_by_path, to_yaml
from synthseg.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"stepss": 3}, "unknown key 'stepss', did you mean 'steps'"),
        ({"optimizer": {}}, "did you mean 'optimiser'"),
        ({"generator": {"deform": {"rotation": 3}}}, "'generator.deform.rotation', did you mean 'rotation_deg'"),
        ({"network": {"chanels": [8]}}, "did you mean 'channels'"),
        ({"generator": {"zzzzqq": 1}}, "known keys: voxel_size_mm, shape"),
        ({"learning_rate": 3}, r"'learning_rate', did you mean 'optimiser.learning_rate'\?$"),
        ({"generator": {"noise_std": [0, 1]}}, r"did you mean 'generator.artefacts.noise_std'\?$"),
        ({"template": []}, r"did you mean 'templates'\?$"),
        ({"generator": {"seed": 1, "ema_decay": 0}}, r"did you mean 'seed'\?; .* mean 'optimiser.ema_decay'\?$"),
        ({"learning": 3}, "unknown key 'learning', known keys: name, "),
    ],
)
def test_unknown_keys_name_the_nearest(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse(TrainConfig, record, "r.yaml")
    assert str(error.value).startswith("r.yaml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("deform", "rotation_deg", -1),
        ("deform", "svf_spacing_mm", (30, 20)),
        ("deform", "flip_probability", 1.5),
        ("deform", "scaling", 1.0),
        ("anatomy", "ventricle_ratio", (0.0, 3.0)),
        ("anatomy", "nuclei_ratio", (0.0, 1.5)),
        ("contrast", "mean", (1.0, 0.0)),
        ("contrast", "mean", 3),
        ("contrast", "mean", "bright"),
        ("artefacts", "noise_std", (0.2, 0.1)),
        ("artefacts", "crop_fraction", 1.0),
        ("artefacts", "lowres_spacing_mm", 0),
    ],
)
def test_values_out_of_range_are_named(section: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{section}\.{key}"):
        parse(GeneratorConfig, {section: {key: value}}, "r.yaml")


@pytest.mark.parametrize(
    "record",
    [
        {"generator": {"shape": [0, 16, 16]}},
        {"generator": {"shape": [-16, 16, 16]}},
        {"generator": {"shape": [16, 16]}},
        {"generator": {"voxel_size_mm": 0}},
        {"generator": {"subsamples": 3}},
        {"generator": {"deform": {"svf_spacing_mm": [0, 20]}}},
        {"generator": {"contrast": {"texture_spacing_mm": [0, 20]}}},
        {"generator": {"artefacts": {"bias_spacing_mm": [-5, 20]}}},
        {"generator": {"artefacts": {"noise_std": [-0.1, 0.1]}}},
        {"generator": {"voxel_size_mm": float("nan")}},
        {"generator": {"contrast": {"named_weights": {"t1": -1}}}},
        {"generator": {"contrast": {"named_weights": {}, "random_weight": 0}}},
        {"network": {"channels": []}},
        {"network": {"channels": [0, 8]}},
        {"network": {"architecture": "resnet"}},
        {"steps": 0},
        {"templates": []},
        {"optimiser": {"ema_decay": 1.0}},
    ],
)
def test_values_that_cannot_work_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse(TrainConfig, record, "r.yaml")


def test_every_problem_is_listed() -> None:
    with pytest.raises(ConfigError) as error:
        parse(TrainConfig, {"steps": -1, "seeds": 3, "network": {"subpixel": 5}}, "r.yaml")
    assert all(word in str(error.value) for word in ("steps", "seeds", "seed'", "network.subpixel"))


def test_configs_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        TrainConfig().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("model", [TrainConfig, GeneratorConfig])
def test_yaml_round_trip(model: Any, tmp_path: Path) -> None:
    text = to_yaml(model())
    assert load_yaml(model, write(tmp_path, text)) == model()
    assert list(yaml.safe_load(text)) == list(model.model_fields)  # in the order that they are documented


def test_yaml_round_trip_of_other_values(tmp_path: Path) -> None:
    config = parse(
        TrainConfig,
        {
            "templates": ["a", "b"],
            "init": "some.safetensors",
            "generator": {"shape": [16, 24, 32], "contrast": {"named_weights": {"t1": 1.0}}},
            "network": {"channels": [8, 16], "architecture": "unet"},
        },
        "r",
    )
    assert load_yaml(TrainConfig, write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("steps=50", ["steps"], 50),
        ("generator.voxel_size_mm=1.5", ["generator", "voxel_size_mm"], 1.5),
        ("generator.shape=[16, 24, 32]", ["generator", "shape"], [16, 24, 32]),
        ("name=a=b", ["name"], "a=b"),
        ("init=null", ["init"], None),
        ("generator.contrast.named_weights={t1: 1}", ["generator", "contrast", "named_weights"], {"t1": 1}),
    ],
)
def test_overrides_are_yaml(assignment: str, path: list[str], value: Any) -> None:
    record: dict[str, Any] = {"generator": {"subsamples": 2}}
    set_by_path(record, assignment)
    node: Any = record
    for key in path:
        node = node[key]
    assert node == value
    assert record["generator"]["subsamples"] == 2


@pytest.mark.parametrize(
    "assignment", ["steps", "=3", "steps.more=3", "steps=[", "", "terms.loss=a", "terms.1.loss=a", "terms.-1=a"]
)
def test_wrong_overrides_are_errors(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        set_by_path({"steps": 3, "terms": [{"loss": "b"}]}, assignment)


def test_an_entry_of_a_list_can_be_overridden() -> None:
    record: dict[str, Any] = {"terms": [{"loss": "a"}, {"loss": "b", "beta": 2}]}
    set_by_path(record, "terms.1.beta=10")
    set_by_path(record, "terms.0={loss: c}")
    assert record == {"terms": [{"loss": "c"}, {"loss": "b", "beta": 10}]}


def test_a_section_left_empty_can_be_overridden() -> None:
    record: dict[str, Any] = {"generator": None}  # "generator:" with everything below commented out
    set_by_path(record, "generator.subsamples=2")
    assert record == {"generator": {"subsamples": 2}}


def test_overrides_beat_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "steps: 7\nseed: 3\n")
    config = load_yaml(TrainConfig, file, ["steps=9", "generator.subsamples=1", "steps=11"])
    assert (config.steps, config.seed, config.generator.subsamples) == (11, 3, 1)
    with pytest.raises(ConfigError, match=r"recipe\.yaml.*did you mean 'subsamples'"):
        load_yaml(TrainConfig, file, ["generator.subsample=1"])


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_yaml(TrainConfig, write(tmp_path, "# nothing\n")) == TrainConfig()


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1", "a: b: c", "3"])
def test_files_that_are_no_recipe_name_themselves(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_yaml(TrainConfig, write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_yaml(TrainConfig, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("channels", "subpixel", "multiple"), [((8, 16, 32), 1, 4), ((8, 16, 32), 2, 8), ((32, 64, 128, 192), 2, 16)]
)
def test_multiple_by_hand(channels: tuple[int, ...], subpixel: Any, multiple: int) -> None:
    assert NetworkConfig(channels=channels, subpixel=subpixel).multiple == multiple
