"""The command line: a thin layer over functions with the same names and arguments.

Exit codes: 0 all done, 1 some scans of a batch failed, 2 bad input or usage, 3 internal error. Messages go to
stderr, one line per error; ``--debug`` adds the traceback. torch, monai and matplotlib are imported inside
the commands, so that help and usage errors come at once.
"""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthseg.errors import SynthSegError

if TYPE_CHECKING:
    from synthseg.batch import Job, Outcome

DEFAULT_MODEL = "siam16"

app = typer.Typer(
    name="synthseg",
    help="Segment head and brain scans of any contrast, resolution and orientation.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting (repeat).")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: all cores).")]


# ----------------------------------------------------------------------------------- errors and exit code


def main() -> None:
    """Entry point of the ``synthseg`` command."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # temporary files are removed
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every error ends as one line on stderr."""
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            code = app(args=list(arguments), prog_name="synthseg", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        _say("error: interrupted")
        return 130
    except Exception as error:
        return _report(error, debug)


def _report(error: Exception, debug: bool, subject: str = "") -> int:
    """Print one line (and the traceback if asked for) and return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, SynthSegError):
        _say(f"error: {error}")
        return 2
    if hasattr(error, "format_message"):  # a usage error of click, or of the copy of click inside typer
        _say(f"error: {error.format_message()} (see synthseg --help)")
        return 2
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = "" if debug else "; run again with --debug for the traceback"
    _say(f"error: {subject}internal error ({what}){hint}")
    return 3


def _say(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- root


def _show_version(value: bool) -> None:
    if value:
        from synthseg import __version__

        typer.echo(f"synthseg {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# ------------------------------------------------------------------------------------------------ segment


@app.command()
def segment(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Scans (NIfTI, MGH) or folders of them.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT",
            help="A file for one scan, or a folder. Default: <name>_seg.nii.gz beside each scan.",
        ),
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Write volumes in ml, one row per scan.")
    ] = None,
    overview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw slices; several scans: <stem>_<scan>.png.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME|FILE", help="A model or checkpoint.")] = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Segment scans: each gets a label map on its own grid."""
    from synthseg.batch import check_jobs, plan_jobs, run_jobs

    jobs = plan_jobs(inputs, output, overview)
    check_jobs(jobs, volumes, overwrite)

    _prepare_torch(threads)
    from rich.console import Console

    from synthseg.devices import resolve_device
    from synthseg.networks.checkpoint import load_model

    torch_device = resolve_device(device)
    loaded = load_model(model, torch_device)
    number = {job: f"[{index}/{len(jobs)}]" for index, job in enumerate(jobs, 1)}
    codes: list[int] = []
    with Console(stderr=True).status("starting") as status:

        def on_step(job: Job, step: str) -> None:
            status.update(f"{number[job].replace('[', '(').replace(']', ')')} {step}")

        def on_done(outcome: Outcome) -> None:
            codes.append(_finish(outcome, number[outcome.job], debug))

        run_jobs(jobs, loaded, torch_device, volumes, on_step, on_done)
    failed = [code for code in codes if code]
    if failed and len(jobs) > 1:
        _say(f"{len(failed)} of {len(jobs)} scans failed")
    raise typer.Exit(0 if not failed else failed[0] if len(jobs) == 1 else 1)


def _finish(outcome: Outcome, number: str, debug: bool) -> int:
    """Say how a scan went, and return its exit code."""
    source = outcome.job.source
    if outcome.segmentation is None:
        return _report(outcome.error or RuntimeError("no result"), debug, subject=f"{source}: ")
    for warning in outcome.segmentation.warnings:
        _say(f"warning: {source}: {warning}")
    timings_s = outcome.segmentation.timings_s
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in timings_s.items())
    _say(f"{number} {source} -> {outcome.job.target}: {sum(timings_s.values()):.1f} s ({steps})")
    return 0


# --------------------------------------------------------------------------------------------------- info


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
    templates = _shipped("templates", "*/")
    typer.echo(f"templates: {', '.join(path.name for path in templates) or 'none'}")
    presets = _shipped("pipelines", "presets/*.yaml")
    typer.echo(f"presets: {', '.join(path.stem for path in presets) or 'none'}")


def _print_models() -> None:
    weights = _shipped("weights", "*.safetensors")
    typer.echo(f"models: {', '.join(path.stem for path in weights) or 'none'}")
    for path in weights:
        from synthseg.networks.checkpoint import load_model

        model = load_model(path, "cpu")
        default = " (default)" if path.stem == DEFAULT_MODEL else ""
        typer.echo(f"\n{model.name}{default}: {model.voxel_size_mm:g} mm, {len(model.labels)} labels, {model.sha256}")
        for label in model.labels.labels:
            typer.echo(f"  {label.id:5d}  {label.name}")


def _shipped(kind: str, pattern: str) -> list[Path]:
    """What ships of one kind; nothing if this installation has no such folder."""
    from synthseg.paths import data_dir

    try:
        return sorted(data_dir(kind).glob(pattern))  # type: ignore[arg-type]
    except FileNotFoundError:
        return []


# ----------------------------------------------------------------------------------------------- generate


@app.command()
def generate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the samples.")],
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Settings that ship; synthseg info lists them.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Generator settings, or a recipe with them.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(metavar="NAME|DIR", help="Templates to draw from (repeat). Default: phantom.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many samples (default: 1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Sample i depends on the seed and i alone (default: 0).")] = None,
    scheme: Annotated[str | None, typer.Option(help="Label ids to write (default: the template's own).")] = None,
    replay: Annotated[Path | None, typer.Option(metavar="PLAN", help="Render this *_plan.json again.")] = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw all images and label maps on one picture.")
    ] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Make synthetic images with their label maps and Plans."""
    from synthseg.config import generator_config
    from synthseg.errors import ConfigError
    from synthseg.labels import load_scheme

    drawn = {"--preset": preset, "--config": config, "--n": n, "--seed": seed, "--set": settings or None}
    ignored = [name for name, value in drawn.items() if value is not None]
    if replay is not None and ignored:
        raise ConfigError(f"--replay renders a Plan as it was drawn; leave out {', '.join(ignored)}")
    if preset is not None and config is not None:
        raise ConfigError("--preset and --config: give one of them; to change a preset, copy its file and use --config")
    wanted = generator_config(config, settings or [], preset)
    table = load_scheme(scheme) if scheme else None
    _check_outputs(output, preview, overwrite)
    _prepare_torch(threads)

    from synthseg.devices import resolve_device
    from synthseg.generator import export
    from synthseg.preview import ContactSheet
    from synthseg.templates import expand, load_template

    torch_device = resolve_device(device)
    plan = export.load_plan(replay) if replay else None
    count = 1 if n is None else n
    export.check_free(output, range(count), overwrite, 1 if plan else len(wanted.views.severities))
    templates = [load_template(path) for path in expand(template or [plan.template if plan else "phantom"])]
    if table is not None:
        for found in templates:
            found.table.mapping(table)
    sheet = ContactSheet()

    def on_done(written: export.Written) -> None:
        _say(str(written.files.image))
        if preview is not None:
            name = written.files.image.name.removesuffix("_image.nii.gz")
            details = f"{written.plan.template}, {written.plan.contrast.name}, severity {written.plan.severity:g}"
            sheet.add(written.image, written.labels, written.table, f"{name}: {details}")

    if plan is not None and replay is not None:
        fitting = export.fitting_template(plan, templates[0], replay)
        export.write_sample(output, 0, fitting, [plan], table or fitting.table, torch_device, on_done)
    else:
        export.generate(wanted, templates, count, seed or 0, output, table, torch_device, on_done)
    if preview is not None:
        sheet.write(preview)
        _say(str(preview))


def _check_outputs(folder: Path, preview: Path | None, overwrite: bool) -> None:
    """Refuse, before anything is loaded, what could not be written in the end."""
    from synthseg.errors import OutputError
    from synthseg.volume import check_writable

    check_writable(folder / "0000_image.nii.gz")
    if preview is None:
        return
    if preview.suffix.lower() != ".png":
        raise OutputError(f"{preview}: the preview is a PNG; end its name in .png")
    if preview.is_file() and not overwrite:
        raise OutputError(f"{preview}: exists already; use --overwrite, or choose another name")
    check_writable(preview)


def _prepare_torch(threads: int | None) -> None:
    """Settings that must come before the first tensor."""
    from synthseg.allocator import tune_allocator

    tune_allocator()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------- train


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe YAML, or the name of one that ships.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Run folder. Default: runs/<name>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    settings: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Draw the first batch and stop.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Train a network on synthetic images of label templates."""
    from synthseg.config import TrainConfig, load_yaml, resolve_paths
    from synthseg.errors import CheckpointError, OutputError
    from synthseg.volume import check_writable

    config = resolve_paths(load_yaml(TrainConfig, recipe, settings or []), Path(recipe).parent)
    folder = output or Path("runs") / config.name
    if (folder / "state.safetensors").exists() and not resume and not dry_run:
        raise OutputError(f"{folder}: holds a run already; use --resume to go on, or another folder with -o")
    if resume and not (folder / "state.safetensors").is_file():
        raise CheckpointError(f"{folder}: holds no run to resume (state.safetensors); start it without --resume")
    check_writable(folder / "state.safetensors")
    _prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.training.loop import Trainer

    trainer = Trainer(config, folder, resolve_device(device), resume)
    _say(trainer.describe())
    if dry_run:
        _say(f"first batch: {trainer.draw_first_batch(folder / 'first_batch.png')}")
        return
    best = trainer.run()
    _say(f"model: {best}; use it with: synthseg segment IN --model {best}")


# ---------------------------------------------------------------------------------------------- templates

templates_app = typer.Typer(help="List, check and import label templates.", no_args_is_help=True)
app.add_typer(templates_app, name="templates")


@templates_app.command("list")
def templates_list(debug: DebugOption = False) -> None:
    """The templates that ship, with their scheme."""
    from synthseg.templates import read_record

    for folder in _shipped("templates", "*/"):
        if (folder / "labels.nii.gz").is_file():
            record = read_record(folder)
            typer.echo(f"{folder.name}\t{record['scheme']}\t{len(record['labels'])} labels\t{folder}")


@templates_app.command("check")
def templates_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Label maps, or imported templates.")],
    scheme: Annotated[str | None, typer.Option(help="head, brainweb, siam16 or a JSON file.")] = None,
    debug: DebugOption = False,
) -> None:
    """Say what is wrong with a folder of label maps."""
    from synthseg.templates import check_folder, label_map_files

    problems, notes = check_folder(folder, scheme)
    for note in notes:
        _say(f"note: {note}")
    for problem in problems:
        _say(f"error: {problem}")
    typer.echo(f"{len(label_map_files(folder))} label maps, {len(problems)} problems")
    raise typer.Exit(2 if problems else 0)


@templates_app.command("import")
def templates_import(
    source: Annotated[Path, typer.Argument(metavar="FILE|DIR")],
    scheme: Annotated[str, typer.Option(help="What the ids mean: head, brainweb, siam16 or a JSON file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of templates to add to.")],
    debug: DebugOption = False,
) -> None:
    """Bring label maps into the project's format: checked, RAS+, without islands, dura derived where missing."""
    from synthseg.templates import import_templates
    from synthseg.volume import check_writable

    check_writable(output / "labels.nii.gz")
    import_templates(source, scheme, output, lambda folder: _say(str(folder)))


# ------------------------------------------------------------------------------------------------- priors

priors_app = typer.Typer(help="Measure the intensities of tissues in real scans.", no_args_is_help=True)
app.add_typer(priors_app, name="priors")


@priors_app.command("estimate")
def priors_estimate(
    images: Annotated[list[Path], typer.Option(metavar="FILE|DIR", help="Scans, or folders of them (repeat).")],
    labels: Annotated[
        list[Path], typer.Option(metavar="FILE|DIR", help="Their label maps, on the same grids (repeat).")
    ],
    scheme: Annotated[str, typer.Option(help="What the ids mean: head, brainweb, siam16 or a JSON file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="YAML", help="File to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write the range of intensities of each tissue, for contrast.priors of a recipe."""
    from synthseg.errors import OutputError
    from synthseg.labels import load_scheme
    from synthseg.volume import check_writable, write_text_atomically

    table = load_scheme(scheme)
    if output.is_file() and not overwrite:
        raise OutputError(f"{output}: exists already; use --overwrite to replace it, or choose another name")
    check_writable(output)
    _prepare_torch(None)
    from synthseg.generator import priors

    found = priors.estimate(images, labels, table, lambda image: _say(str(image)))
    write_text_atomically(output, found.to_yaml())
    _say(f"{output}: {len(found.tissues)} tissues of {len(found.images)} scans")
