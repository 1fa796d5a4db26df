"""The `householder` command: flags in; `householder.train` and `.recipes` do the work."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.text import Text

import householder
from householder.adapters import AdapterError
from householder.recipes.length_extrapolation import EvaluationConfig
from householder.storage import write_atomically
from householder.train.adapt import AdaptConfig
from householder.train.comparison import COMPARED, Comparison, run_comparison, stored_settings
from householder.train.config import TrainConfig
from householder.train.errors import ConfigError, Interrupted, RunError
from householder.train.interrupt import stop_on_signals
from householder.train.loop import TrainResult
from householder.train.settings import (
    Settings,
    base_type,
    check_names,
    field_types,
    read_toml,
)
from householder.train.text.config import TextConfig
from householder.train.text.folder import (
    SOURCES,
    holds_text_run,
    run_text,
    stored_text_settings,
)
from householder.train.text.processes import join_processes

app = typer.Typer(
    help="Train sequence models whose memory is updated by products of Householder reflections.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
reproduce_app = typer.Typer(help="Repeat published experiments: published beside measured.")
app.add_typer(reproduce_app, name="reproduce")

# Typer's base class of wrong usage is public only through its children.
UsageError: Any = typer.BadParameter.__base__

_OUTPUT = "Output"
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder to write.", rich_help_panel=_OUTPUT)
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Continue what the folder holds, bit for bit.", rich_help_panel=_OUTPUT
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what the folder holds.", rich_help_panel=_OUTPUT),
]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n.

    Args:
        arguments: the words after `householder`; by default those of the process.
    """
    try:
        code = app(args=arguments, prog_name="householder", standalone_mode=False)
    except UsageError as error:
        _fail(error.format_message(), 2)
    except ConfigError as error:
        _fail(str(error), 2)
    except Interrupted as error:
        _fail(str(error), 128 + error.signum, label="stopped")
    except torch.OutOfMemoryError as error:
        _fail(f"out of memory: {str(error).splitlines()[0]}; try a smaller --batch-size", 1)
    except (RunError, AdapterError, OSError) as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; --resume continues from the last checkpoint", 130, label="stopped")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, *, label: str = "error") -> NoReturn:
    text = Text.assemble((f"{label}: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)
    sys.exit(code)


def _with_settings(
    config: type[Settings],
    *more: type[Settings],
    show_defaults: bool,
    without: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per field of the settings, in place of its `**settings`.

    The command receives every one of them, None where the flag was not given. A field that several
    classes have is one option.

    Args:
        config: the class.
        more: others, whose fields are added.
        show_defaults: name the defaults in the help.
        without: fields that are no options of this command.
    """
    return functools.partial(_add_settings, (config, *more), show_defaults, without)


def _add_settings(
    configs: Sequence[type[Settings]],
    show_defaults: bool,
    without: Sequence[str],
    command: Callable[..., None],
) -> Callable[..., None]:
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    fields: dict[str, list[dataclasses.Field[Any]]] = {}
    types: dict[str, Any] = {}
    for config in configs:
        types = {**field_types(config), **types}
        for field in dataclasses.fields(config):
            if field.name not in without:
                fields.setdefault(field.name, []).append(field)
    settings = [
        _setting_parameter(same, types[name], show_defaults) for name, same in fields.items()
    ]

    def wrapper(**arguments: Any) -> None:
        command(**arguments)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    # Typer reads a command's options from these two.
    wrapper.__signature__ = inspect.Signature([*own, *settings])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *settings]}
    return wrapper


def _setting_parameter(
    same: Sequence[dataclasses.Field[Any]], annotation: Any, show_default: bool
) -> inspect.Parameter:
    """Return the option for fields of one name, described by the first of them."""
    field = same[0]
    kind, _ = base_type(annotation)
    flag = "--" + field.name.replace("_", "-")
    help, default, metavar = field.metadata["help"], field.default, None
    choices = dict.fromkeys(c for each in same for c in each.metadata["choices"] or ())
    if choices:
        help += f" One of {', '.join(choices)}."
    if field.name == "num_householder":
        help, default, metavar = f"{help} Several may be given: 1,2.", "1,2", "<ints>"
    elif field.name in COMPARED:
        help, metavar = f"{help} Several may be given, with commas.", f"<{kind.__name__}s>"
    if kind is bool:
        flag, default = f"{flag}/--no-{flag[2:]}", _shown(default)
    if show_default and default is not None:
        others = [each.default for each in same[1:] if each.default not in (None, field.default)]
        with_text = "".join(f"; with --text {_shown(value)}" for value in others)
        help += f" [dim]Default: {default}{with_text}.[/dim]"
    # The option's own default is None, to tell a flag that was given from one that was not.
    option = typer.Option(
        None, flag, help=help, rich_help_panel=field.metadata["section"], metavar=metavar
    )
    # A list: the flag may be repeated.
    annotation = list[str] | None if field.name in COMPARED else kind | None
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings whose flags were given, those that are compared as lists."""
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    for name in COMPARED:
        if name not in given:
            continue
        words = [word for part in given[name] for word in part.split(",")]
        if name == "mixer":
            given[name] = words
            continue
        try:
            given[name] = [int(word) for word in words]
        except ValueError as error:
            raise ConfigError(
                f"`{name}` must be numbers such as 2 or 1,2, got {','.join(words)!r}"
            ) from error
    return given


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        typer.echo(f"householder {householder.__version__} (torch {torch.__version__})")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("train")
@_with_settings(TrainConfig, TextConfig, show_defaults=True)
def _train(
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Train a language model on a file or a folder of text. May be repeated.",
            rich_help_panel="Text",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="The same on a dataset of the Hugging Face hub: owner/name or "
            "owner/name:configuration.",
            rich_help_panel="Text",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="TOML file of settings, named as the flags, which override it."
        ),
    ] = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Train one model per N (reflections per token) on a task, or a language model on text.

    Without arguments: words over S3, the permutations of three things, with N = 1 and N = 2. One
    layer with N = 2 learns to multiply them and goes on to four times the training length; with
    N = 1 it cannot. The folder (--out, by default householder-run) receives checkpoints, metrics
    and accuracy.png.

    With --text or --dataset: a causal language model, by default of 10 million parameters on
    bytes. The folder (--out, by default householder-text) receives checkpoints, metrics and the
    model, which `householder generate` continues texts with.
    """
    known = [*field_types(TrainConfig), *field_types(TextConfig), *SOURCES, "out"]
    file = {} if config is None else read_toml(config, known)
    sources = {"text": text, "dataset": dataset}
    given = _given(settings) | {name: value for name, value in sources.items() if value}
    in_file = file.pop("out", None)
    on_text = any(name in given or name in file for name in SOURCES)
    folder = _folder(out, in_file, "householder-text" if on_text else "householder-run")
    if on_text or (resume and holds_text_run(folder)):
        _train_on_text({**file, **given}, folder, resume=resume, overwrite=overwrite)
        return
    check_names({**file, **given}, field_types(TrainConfig), "settings without --text")
    base = _stored(folder, resume, overwrite)
    comparison = Comparison.from_settings({**base, **file, **given})
    _run(comparison, folder, resume=resume, overwrite=overwrite)


def _train_on_text(
    settings: dict[str, Any], folder: Path, *, resume: bool, overwrite: bool
) -> None:
    from householder.train.text.observer import TextDisplay

    for name in COMPARED:
        _take_single(settings, name)
    if resume and holds_text_run(folder):
        settings = {**stored_text_settings(folder), **settings}
    console = Console()
    with (
        join_processes(settings.get("device", "auto")) as processes,
        stop_on_signals() as stop,
        TextDisplay(console if processes.first else Console(quiet=True)) as display,
    ):
        run_text(
            settings,
            folder,
            processes,
            resume=resume,
            overwrite=overwrite,
            observer=display,
            stop=stop,
        )
    if processes.first:
        console.print(f"model: {folder / 'model'}", highlight=False, soft_wrap=True)


def _take_single(settings: dict[str, Any], name: str) -> None:
    """Replace a list of one value by the value."""
    values = settings.get(name)
    if isinstance(values, list):
        if len(values) != 1:
            raise ConfigError(f"`{name}` must be one value with language models, got {values}")
        settings[name] = values[0]


@app.command("generate")
def _generate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model, or of its run.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to continue; default: standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens at most.", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="Of the draws; 0: always the likeliest.", min=0.0)
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among the k likeliest tokens.", min=1)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the likeliest of this joint probability.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the draws; default: another each time.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "float32",
) -> None:
    """Continue a text with a trained language model, token by token as they are drawn."""
    from householder.train.text.generation import continue_text

    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    stream = continue_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    typer.echo(prompt, nl=False)
    for piece in stream:
        typer.echo(piece, nl=False)
    typer.echo()


@app.command("convert")
def _convert(
    source: Annotated[Path, typer.Argument(help="Folder of a model.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not hold anything.")],
) -> None:
    """Turn a checkpoint of flash-linear-attention into one of ours, or one of ours into theirs.

    Theirs: delta_net, gated_deltanet, gated_deltaproduct and path_attn, saved as safetensors.
    """
    from householder.hf.fla import convert
    from householder.hf.fla_config import ConversionError

    try:
        typer.echo(convert(source, target))
    except ConversionError as error:
        raise ConfigError(str(error)) from error


def _stored(folder: Path, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Return the settings that a resumed run starts from: those it was started with."""
    if resume and overwrite:
        raise ConfigError("--resume continues and --overwrite deletes the same folder; give one")
    return stored_settings(folder) if resume else {}


def _folder(flag: Path | None, in_file: Any, default: str) -> Path:
    if in_file is not None and not isinstance(in_file, str):
        raise ConfigError(f"`out` must be of type str, got {in_file!r}")
    return flag or Path(in_file or default)


def _run(
    comparison: Comparison, folder: Path, *, resume: bool, overwrite: bool
) -> list[TrainResult]:
    from householder.train.progress import ProgressDisplay
    from householder.train.report import describe, results_table, verdict

    console = Console()
    display = ProgressDisplay(comparison.configs, console, heading=describe(comparison))
    with stop_on_signals() as stop, display:
        results = run_comparison(
            comparison, folder, resume=resume, overwrite=overwrite, observer=display, stop=stop
        )
    console.print(results_table(results))
    console.print(verdict(results), highlight=False)
    console.print(f"curves: {folder / 'accuracy.png'}", highlight=False, soft_wrap=True)
    return results


def _adapt(
    out: Out = None, resume: Resume = False, overwrite: Overwrite = False, **settings: Any
) -> None:
    """Fine-tune a model of timm or transformers by a few reflections per layer.

    Train an adapter on a folder of images (one folder per class) or a text file, evaluate it, save
    it, and write the model with the adapter merged into its weights.

    The folder (--out, by default householder-adapt) receives adapter/, merged/, metrics and
    checkpoints.
    """
    from householder.train.adapt.progress import AdaptDisplay
    from householder.train.adapt.report import results_table
    from householder.train.adapt.run import adapt_settings, run_adapt

    if resume and overwrite:
        raise ConfigError("--resume continues and --overwrite deletes the same folder; give one")
    folder = out or Path("householder-adapt")
    stored = adapt_settings(folder) if resume else {}
    given = {name: value for name, value in settings.items() if value is not None}
    config = AdaptConfig.from_settings({**stored, **given})
    console = Console()
    with stop_on_signals() as stop, AdaptDisplay(config.steps, console) as display:
        result = run_adapt(
            config, folder, resume=resume, overwrite=overwrite, observer=display, stop=stop
        )
    console.print(results_table(result, folder))


app.command("adapt")(_with_settings(AdaptConfig, show_defaults=True)(_adapt))


@reproduce_app.callback(invoke_without_command=True)
def _reproduce(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from householder.recipes import experiments_table

        Console().print(experiments_table())


@reproduce_app.command("state-tracking")
@_with_settings(TrainConfig, show_defaults=False)
def _state_tracking(
    size: Annotated[
        str, typer.Option("--size", help="cpu: minutes on two cores; gpu: as published.")
    ] = "cpu",
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

    given = _given(settings)
    task = given.pop("task", "s3")
    folder = out or Path(f"householder-{task}-{size}")
    base = _stored(folder, resume, overwrite) or state_tracking.settings(task, size)
    comparison = Comparison.from_settings({**base, **given, "task": task})
    results = _run(comparison, folder, resume=resume, overwrite=overwrite)
    Console().print(state_tracking.published_beside_measured(results))


@reproduce_app.command("flip-flop")
@_with_settings(TrainConfig, show_defaults=False)
def _flip_flop(
    size: Annotated[
        str, typer.Option("--size", help="cpu: minutes on two cores; gpu: as published.")
    ] = "cpu",
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
    chosen = flip_flop.settings(size)
    base = _stored(folder, resume, overwrite) or chosen
    comparison = Comparison.from_settings({**base, **_given(settings)})
    results = _run(comparison, folder, resume=resume, overwrite=overwrite)
    found = [errors for result in results for errors in flip_flop.measure(result, size)]
    flip_flop.write_errors(found, folder)
    for result in results:
        if result.config.mixer == "path_attention":
            picture = flip_flop.transitions_picture(result)
            write_atomically(folder / "transitions.png", picture)
    Console().print(flip_flop.published_beside_measured(found))


@reproduce_app.command("a5-attention")
@_with_settings(TrainConfig, show_defaults=False)
def _a5_attention(
    size: Annotated[
        str, typer.Option("--size", help="cpu: short words, minutes on two cores; gpu: length 16.")
    ] = "cpu",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Count the layers that attention needs for the word problem of A5, with PaTH and with RoPE.

    Settings given here override those of the chosen size. The folder is by default
    householder-a5-attention-<size>.
    """
    from householder.recipes import a5_attention

    folder = out or Path(f"householder-a5-attention-{size}")
    chosen = a5_attention.settings(size)
    base = _stored(folder, resume, overwrite) or chosen
    comparison = Comparison.from_settings({**base, **_given(settings)})
    results = _run(comparison, folder, resume=resume, overwrite=overwrite)
    a5_attention.write_layers(results, folder)
    Console().print(a5_attention.layers_table(results))


@reproduce_app.command("recall")
@_with_settings(TrainConfig, show_defaults=False)
def _recall(
    size: Annotated[
        str,
        typer.Option(
            "--size", help="cpu: 8 pairs, minutes on two cores; gpu: 64 pairs, as published."
        ),
    ] = "cpu",
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    **settings: Any,
) -> None:
    """Recall values by their keys, at several widths, and print published beside measured.

    Settings given here override those of the chosen size; --d-model chooses one width, which is
    added to those that the folder holds. The folder is by default householder-recall-<size>.
    """
    from householder.recipes import recall

    folder = out or Path(f"householder-recall-{size}")
    chosen = recall.settings(size)
    given = _given(settings)
    for width in [given.pop("d_model")] if "d_model" in given else recall.WIDTHS[size]:
        part = folder / f"d{width}"
        # A run that was stopped may not have come to this width.
        resuming = resume and part.exists()
        base = _stored(part, resuming, overwrite) or chosen
        comparison = Comparison.from_settings({**base, **given, "d_model": width})
        _run(comparison, part, resume=resuming, overwrite=overwrite)
        found = recall.read_results(folder)
        recall.write_recall(found, folder)
    Console().print(recall.published_beside_measured(found))


@reproduce_app.command("length-extrapolation")
@_with_settings(
    TextConfig,
    EvaluationConfig,
    show_defaults=False,
    # The runs differ in it.
    without=("pattern",),
)
def _length_extrapolation(
    size: Annotated[
        str,
        typer.Option(
            "--size", help="cpu: tiny models, minutes on two cores; gpu: 30 million parameters."
        ),
    ] = "cpu",
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

    Published is printed beside measured. Settings given here override those of the chosen size;
    --num-householder is that of delta_product. The folder is by default
    householder-length-extrapolation-<size>.
    """
    from householder.recipes import length_extrapolation
    from householder.train.text.observer import TextDisplay

    folder = out or Path(f"householder-length-extrapolation-{size}")
    base = length_extrapolation.settings(size)
    if resume:
        base = length_extrapolation.stored_settings(folder)
    given = _given({**settings, "mixer": mixer, "text": text})
    _take_single(given, "num_layers")
    extrapolation = length_extrapolation.Extrapolation.from_settings({**base, **given})
    console = Console()
    with join_processes(extrapolation.configs[0].device) as processes, stop_on_signals() as stop:
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
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:<n>.")] = "cpu",
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

    if resume and overwrite:
        raise ConfigError("--resume continues and --overwrite deletes the same folder; give one")
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
