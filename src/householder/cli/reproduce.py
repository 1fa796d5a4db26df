"""`householder reproduce`: published experiments, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from householder.cli.runs import refuse_both, run_chosen
from householder.cli.settings import (
    App,
    Out,
    Overwrite,
    Resume,
    given_settings,
    take_single,
    with_settings,
)
from householder.storage import write_atomically
from householder.train.config import TrainConfig
from householder.train.interrupt import stop_on_signals
from householder.train.text.config import TextConfig
from householder.train.text.positions import EvaluationConfig
from householder.train.text.processes import join_processes

reproduce_app = App(help="Repeat published experiments: published beside measured.")

Size = Annotated[
    str,
    typer.Option(
        "--size", help="cpu: small, minutes on two cores; gpu: as published or near it, on a GPU."
    ),
]


@reproduce_app.callback(invoke_without_command=True)
def _reproduce(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from householder.recipes import experiments_table

        Console().print(experiments_table())


@reproduce_app.command("state-tracking")
@with_settings(TrainConfig, show_defaults=False)
def _state_tracking(
    size: Size = "cpu",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Train on the word problem of a group and print published beside measured.

    --task is s3, s4, a5 or s5. Settings given here override those of the chosen size. The folder is
    by default householder-<task>-<size>.
    """
    from householder.recipes import state_tracking

    given = given_settings(settings)
    task = given.pop("task", "s3")
    folder = out or Path(f"householder-{task}-{size}")
    # A folder that is resumed need not be of the size that is the default here.
    chosen = {} if resume else state_tracking.settings(task, size)
    given["task"] = task
    results = run_chosen(chosen, given, folder, resume=resume, overwrite=overwrite)
    Console().print(state_tracking.published_beside_measured(results))


@reproduce_app.command("flip-flop")
@with_settings(TrainConfig, show_defaults=False)
def _flip_flop(
    size: Size = "cpu",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Train attentions to remember one bit, and print published beside measured errors.

    Settings given here override those of the chosen size. The folder is by default
    householder-flip-flop-<size>.
    """
    from householder.recipes import flip_flop

    folder = out or Path(f"householder-flip-flop-{size}")
    chosen, given = flip_flop.settings(size), given_settings(settings)
    results = run_chosen(chosen, given, folder, resume=resume, overwrite=overwrite)
    found = [errors for result in results for errors in flip_flop.measure(result, size)]
    flip_flop.write_errors(found, folder)
    for result in results:
        if result.config.mixer == "path_attention":
            picture = flip_flop.transitions_picture(result)
            write_atomically(folder / "transitions.png", picture)
    Console().print(flip_flop.published_beside_measured(found))


@reproduce_app.command("a5-attention")
@with_settings(TrainConfig, show_defaults=False)
def _a5_attention(
    size: Size = "cpu",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Count the layers that attention needs for the word problem of A5, with PaTH and with RoPE.

    Size gpu has words of up to 16 elements, cpu of up to 5. Settings given here override those of
    the chosen size. The folder is by default householder-a5-attention-<size>.
    """
    from householder.recipes import a5_attention

    folder = out or Path(f"householder-a5-attention-{size}")
    chosen, given = a5_attention.settings(size), given_settings(settings)
    results = run_chosen(chosen, given, folder, resume=resume, overwrite=overwrite)
    a5_attention.write_layers(results, folder)
    Console().print(a5_attention.layers_table(results))


@reproduce_app.command("recall")
@with_settings(TrainConfig, show_defaults=False)
def _recall(
    size: Size = "cpu",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Recall values by their keys, at several widths, and print published beside measured.

    Size gpu has the published 64 pairs, cpu 8. Settings given here override those of the chosen
    size; --d-model chooses one width, which is added to those that the folder holds. The folder is
    by default householder-recall-<size>.
    """
    from householder.recipes import recall

    folder = out or Path(f"householder-recall-{size}")
    chosen = recall.settings(size)
    given = given_settings(settings)
    for width in [given["d_model"]] if "d_model" in given else recall.WIDTHS[size]:
        part = folder / f"d{width}"
        # A run that was stopped may not have come to this width.
        resuming = resume and part.exists()
        given["d_model"] = width
        run_chosen(chosen, given, part, resume=resuming, overwrite=overwrite)
        found = recall.read_results(folder)
        recall.write_recall(found, folder)
    Console().print(recall.published_beside_measured(found))


@reproduce_app.command("length-extrapolation")
@with_settings(
    TextConfig,
    EvaluationConfig,
    show_defaults=False,
    # The runs differ in it.
    without=("pattern",),
)
def _length_extrapolation(
    size: Size = "cpu",
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="A file or a folder of text. May be repeated. Default: the sources of Python's "
            "standard library.",
            rich_help_panel="Text",
        ),
    ] = None,
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            "--mixer", help="Mixers to compare, with commas.", rich_help_panel="Language model"
        ),
    ] = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Train small language models and measure their loss far beyond the training length.

    Published is printed beside measured. Size gpu has models of 30 million parameters, cpu tiny
    ones. Settings given here override those of the chosen size; --num-householder is that of
    delta_product. The folder is by default householder-length-extrapolation-<size>.
    """
    from householder.recipes import length_extrapolation
    from householder.train.text.observer import TextDisplay

    folder = out or Path(f"householder-length-extrapolation-{size}")
    base = length_extrapolation.settings(size)
    if resume:
        base = length_extrapolation.stored_settings(folder)
    given = given_settings({**settings, "mixer": mixer, "text": text})
    take_single(given, "num_layers")
    extrapolation = length_extrapolation.Extrapolation.from_settings({**base, **given})
    console, device = Console(), extrapolation.models.configs[0].device
    with join_processes(device) as processes, stop_on_signals() as stop:
        found = length_extrapolation.run(
            extrapolation,
            folder,
            processes,
            resume=resume,
            overwrite=overwrite,
            observe=lambda config: TextDisplay(console),
            stop=stop,
        )
    console.print(length_extrapolation.published_beside_measured(found))
    console.print(f"curves: {folder / 'losses.png'}", highlight=False, soft_wrap=True)


@reproduce_app.command("constructions")
def _constructions() -> None:
    """Check the exact solutions known from theory: no training, seconds on a CPU."""
    from householder.recipes import constructions

    results = constructions.run_all()
    Console().print(constructions.results_table(results))
    if not all(result.exact for result in results):
        raise typer.Exit(1)


@reproduce_app.command("adapters")
def _adapters(
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder of images, one folder per class. Default: digits."),
    ] = None,
    image_size: Annotated[
        int, typer.Option("--image-size", min=8, help="To which a folder's images are resized.")
    ] = 32,
    shots: Annotated[int, typer.Option("--shots", min=1, help="Images per class.")] = 20,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of each adaptation.")] = 200,
    pretrain_steps: Annotated[
        int, typer.Option("--pretrain-steps", min=1, help="Of the base model.")
    ] = 600,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs per method.")] = 5,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu, cuda or cuda:<n>. So small a model is no faster on a GPU.",
        ),
    ] = "cpu",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Adapt a small ViT to new classes by every method and print published beside measured.

    The folder (--out, by default householder-adapters) receives results.json and accuracy.png, the
    accuracy of each method against how many numbers it trains.
    """
    from householder.recipes import adapters
    from householder.train.build import resolve_device

    refuse_both(resume, overwrite)
    folder = out or Path("householder-adapters")
    settings = adapters.Settings(
        images=None if images is None else str(images),
        image_size=image_size,
        shots=shots,
        steps=steps,
        pretrain_steps=pretrain_steps,
        seeds=seeds,
        device=str(resolve_device(device)),
    )
    console = Console()
    with stop_on_signals() as stop:
        outcomes = adapters.run(
            settings,
            folder,
            resume=resume,
            overwrite=overwrite,
            say=lambda line: console.print(line, highlight=False, soft_wrap=True),
            stop=stop,
        )
    console.print(adapters.results_table(outcomes, settings))
    console.print(f"plot: {folder / 'accuracy.png'}", highlight=False, soft_wrap=True)
