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
    weights = shipped("weights", "*.safetensors")
    typer.echo(f"models: {', '.join(path.stem for path in weights) or 'none'}")
    for path in weights:
        from synthseg.networks.checkpoint import load_model

        model = load_model(path, "cpu")
        default = " (default)" if path.stem == DEFAULT_MODEL else ""
        typer.echo(f"\n{model.name}{default}: {model.voxel_size_mm:g} mm, {len(model.labels)} labels, {model.sha256}")
        for label in model.labels.labels:
            typer.echo(f"  {label.id:5d}  {label.name}")
