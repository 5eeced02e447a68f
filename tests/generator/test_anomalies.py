"""Anomalies lie in their hosts, are seen in the image, and are to the network what the recipe says."""

from dataclasses import replace

import pytest
import torch

from synthseg.config import AnomalyConfig, GeneratorConfig
from synthseg.errors import ConfigError, LabelError
from synthseg.generator.anomalies import KINDS, paint_anomalies, sample_anomalies, with_anomalies
from synthseg.generator.draw import Draw
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import Label, LabelTable, load_scheme
from synthseg.templates import Template
from synthseg.training.stream import group_table

CHANCES = [f"{kind}_probability" for kind in ("lesion", "perivascular", "tumour", "haemorrhage", "cavity")]


def only(kind: str, **more: object) -> AnomalyConfig:
    return AnomalyConfig(
        **{"probability": 1.0, **{c: float(c == f"{kind}_probability") for c in CHANCES}, **more}  # type: ignore[arg-type]
    )


def everything(label: int | None = None) -> AnomalyConfig:
    return AnomalyConfig(probability=1.0, label=label, **{c: 1.0 for c in CHANCES})  # type: ignore[arg-type]


def drawn(config: AnomalyConfig, template: Template, seed: int = 0) -> torch.Tensor:
    made = sample_anomalies(config, template.table, Draw(torch.Generator().manual_seed(seed)))
    assert made is not None
    return paint_anomalies(template, template.labels, made)


@pytest.mark.parametrize("kind", ["lesion", "perivascular", "tumour", "haemorrhage", "cavity"])
def test_anomalies_lie_in_tissue_that_may_host_them(kind: str, tiny_template: Template) -> None:
    config = only(kind)
    template = with_anomalies(tiny_template, config)
    names = list(KINDS)
    first = len(tiny_template.table)
    seen = set()
    for seed in range(6):
        before = template.labels.clone()
        painted = drawn(config, template, seed)
        assert torch.equal(template.labels, before)
        changed = painted != before
        assert (painted[~changed] < first).all()
        for value in painted[changed].unique().tolist():
            name = names[value - first]
            seen.add(name)
            hosts = {template.table.labels[i].tissue for i in before[painted == value].unique().tolist()}
            assert hosts <= KINDS[name].hosts
    assert kind in seen
    assert seen <= {kind, "oedema"}
    assert ("oedema" in seen) == (kind == "tumour")


def test_a_lesion_has_the_size_asked_for(head: LabelTable) -> None:
    labels = torch.zeros((60, 60, 60), dtype=torch.uint8)
    labels[1:-1, 1:-1, 1:-1] = head.index_of[2]
    plain = Template("block", labels, head, (1.0, 1.0, 1.0), (29.5,) * 3, {})
    config = only("tumour", tumour_radius_mm=(8.0, 8.0), oedema_mm=(4.0, 4.0), roughness=0.0)
    template = with_anomalies(plain, config)
    first, names = len(head), list(KINDS)
    found = 0
    for seed in range(12):
        painted = drawn(config, template, seed)
        tumour = painted == first + names.index("tumour")
        where = tumour.nonzero()
        if (where.amin(0) < 14).any() or (where.amax(0) > 45).any():
            continue  # cut by the side of the block
        found += 1
        assert int(tumour.sum()) == pytest.approx(4 / 3 * 3.14159 * 8**3, rel=0.03)
        both = int(tumour.sum()) + int((painted == first + names.index("oedema")).sum())
        assert both == pytest.approx(4 / 3 * 3.14159 * 12**3, rel=0.03)
    assert found > 0


def settings(anomalies: AnomalyConfig) -> GeneratorConfig:
    base = GeneratorConfig(voxel_size_mm=1.5, shape=(24, 22, 26), subsamples=2, anomalies=anomalies)
    calm = {"strip_probability": 0.0, "crop_probability": 0.0, "lowres_probability": 0.0}
    return base.model_copy(update={"artefacts": base.artefacts.model_copy(update=calm)})


@pytest.mark.parametrize("label", [None, 17])
def test_the_image_shows_them_and_the_target_is_host_or_class(label: int | None, tiny_template: Template) -> None:
    config = settings(everything(label))
    template = with_anomalies(tiny_template, config.anomalies)
    plan = sample_plan(config, template.name, template.table, 4, 0)
    assert plan.anomalies is not None
    healthy = plan.model_copy(update={"anomalies": None})
    image, labels = render([template], [plan])
    image_healthy, labels_healthy = render([template], [healthy])
    assert (image - image_healthy).abs().max() > 0.05
    first = len(tiny_template.table)
    if label is None:
        assert torch.equal(labels, labels_healthy)
    else:
        diseased = labels >= first
        assert diseased.any()
        assert torch.equal(labels[~diseased], labels_healthy[~diseased])


def test_a_class_of_their_own_reaches_the_network(tiny_template: Template) -> None:
    siam = load_scheme("siam16")
    wider = LabelTable("siam17", (*siam.labels, Label(id=17, name="Anomaly")))
    own = {x.id: {**x.to, "siam17": x.to["siam16"]} for x in tiny_template.table.labels if "siam16" in x.to}
    labels = [Label(**{**vars(x), "to": own.get(x.id, x.to)}) for x in tiny_template.table.labels]
    source = LabelTable("head17", tuple(labels))
    plain = Template("t", tiny_template.labels, source, (1.0,) * 3, (9.5, 12.5, 11.0), {})
    index, groups = group_table(with_anomalies(plain, everything(17)).table, wider)
    assert torch.equal(groups, torch.eye(len(wider), dtype=torch.bool))
    assert index[-len(KINDS) :].tolist() == [17] * len(KINDS)
    with pytest.raises(LabelError, match="has no"):
        group_table(with_anomalies(plain, everything(99)).table, wider)


def test_off_by_default(tiny_template: Template) -> None:
    assert with_anomalies(tiny_template, AnomalyConfig()) is tiny_template
    assert sample_plan(GeneratorConfig(), "t", tiny_template.table, 0, 0).anomalies is None


def test_a_table_without_them_is_refused(tiny_template: Template) -> None:
    with pytest.raises(ConfigError, match="with_anomalies"):
        sample_plan(settings(everything()), "t", tiny_template.table, 0, 0)


def test_a_table_without_room_for_them_is_refused(tiny_template: Template) -> None:
    many = tuple(Label(i, f"L{i}", tissue="wm" if i else "air") for i in range(251))
    fits, full = (replace(tiny_template, table=LabelTable("many", many[:n]), cache={}) for n in (250, 251))
    config = settings(everything())
    found = with_anomalies(fits, config.anomalies)
    plan = sample_plan(config, "t", found.table, 0, 0)
    assert plan.anomalies is not None
    assert render([found], [plan])[1].max() < 250
    with pytest.raises(ConfigError, match=r"251 labels of scheme 'many'.*at most 250.*probability to 0"):
        with_anomalies(full, config.anomalies)


def test_plans_survive_json_and_replay(tiny_template: Template) -> None:
    config = settings(everything())
    template = with_anomalies(tiny_template, config.anomalies)
    plan = sample_plan(config, template.name, template.table, 1, 3)
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert torch.equal(render([template], [plan])[0], render([template], [again])[0])


def test_left_and_right_labels_still_swap(tiny_template: Template) -> None:
    table = with_anomalies(tiny_template, everything()).table
    assert table.flip[: len(tiny_template.table)].tolist() == tiny_template.table.flip.tolist()
    assert table.flip[-len(KINDS) :].tolist() == list(range(len(table) - len(KINDS), len(table)))
