"""``synthseg info``."""

from __future__ import annotations

import typer

from synthseg.cli.base import DEFAULT_MODEL, DebugOption, app, shipped


@app.command()
def info(debug: DebugOption = False) -> None:
    """Show versions, the devices found, and the models, templates and presets that ship."""
    import platform
    from importlib.metadata import version

    import torch

    from synthseg import __version__

    typer.echo(f"synthseg {__version__}, Python {platform.python_version()}, {platform.platform()}")
    typer.echo(", ".join(f"{name} {version(name)}" for name in ("torch", "monai", "nibabel", "numpy", "scipy")))
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    typer.echo(f"devices: {', '.join(devices)}")
    _print_models()
    templates = shipped("templates", "*/")
    typer.echo(f"templates: {', '.join(path.name for path in templates) or 'none'}")
    presets = shipped("pipelines", "presets/*.yaml")
    typer.echo(f"presets: {', '.join(path.stem for path in presets) or 'none'}")


def _print_models() -> None:
    from synthseg.cli.correct_bias import BIAS_MODEL
    from synthseg.networks.checkpoint import FEATURE_FORMAT, load_model, shipped_models
    from synthseg.networks.feature_file import load_features

    names, others = shipped_models(), shipped_models(FEATURE_FORMAT)
    typer.echo(f"models: {', '.join([*names, *others]) or 'none'}")
    for name in names:
        model = load_model(name, "cpu")
        default = " (default)" if name == DEFAULT_MODEL else ""
        typer.echo(f"\n{model.name}{default}: {model.voxel_size_mm:g} mm, {len(model.labels)} labels, {model.sha256}")
        for label in model.labels.labels:
            typer.echo(f"  {label.id:5d}  {label.name}")
    for name in others:
        features = load_features(name, "cpu")
        default = " (default of correct-bias)" if name == BIAS_MODEL else ""
        tasks = ", ".join(head["task"] for head in features.heads.values())
        typer.echo(f"\n{features.name}{default}: {features.voxel_size_mm:g} mm, {tasks}, {features.sha256}")
