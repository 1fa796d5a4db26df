"""The command itself, and all of its parts but `reproduce`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.text import Text

import householder
from householder.adapters import AdapterError
from householder.cli.reproduce import reproduce_app
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
from householder.train.adapt import AdaptConfig
from householder.train.comparison import COMPARED
from householder.train.config import TrainConfig
from householder.train.errors import ConfigError, Interrupted, RunError
from householder.train.interrupt import stop_on_signals
from householder.train.settings import check_names, field_types, read_toml
from householder.train.text.config import TextConfig
from householder.train.text.folder import (
    SOURCES,
    holds_text_run,
    run_text,
    stored_text_settings,
)
from householder.train.text.processes import join_processes

app = App(
    help="Products of Householder reflections in neural networks: train, generate, fine-tune, "
    "convert, and reproduce what was published.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(reproduce_app, name="reproduce")

# Typer's base class of wrong usage is public only through its children.
UsageError: Any = typer.BadParameter.__base__


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
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno == errno.ENOSPC
        remedy = "; make room and continue with --resume" if full else ""
        _fail(f"{place}cannot be read or written: {error.strerror or error}{remedy}", 1)
    except (RunError, AdapterError) as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            "interrupted; a training run continues from its last checkpoint with --resume",
            130,
            label="stopped",
        )
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, *, label: str = "error") -> NoReturn:
    text = Text.assemble((f"{label}: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)
    sys.exit(code)


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
@with_settings(TrainConfig, TextConfig, show_defaults=True)
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
    given = given_settings(settings) | {name: value for name, value in sources.items() if value}
    in_file = file.pop("out", None)
    on_text = any(name in given or name in file for name in SOURCES)
    folder = _folder(out, in_file, "householder-text" if on_text else "householder-run")
    if on_text or (resume and holds_text_run(folder)):
        for name in given:
            if name in field_types(TrainConfig) and name not in field_types(TextConfig):
                flag = name.replace("_", "-")
                instead = "give --pattern instead" if name == "mixer" else f"leave --{flag} out"
                raise ConfigError(
                    f"`{name}` is a setting of tasks, and this is a run on text; {instead}"
                )
        _train_on_text({**file, **given}, folder, resume=resume, overwrite=overwrite)
        return
    check_names({**file, **given}, field_types(TrainConfig), "settings without --text")
    run_chosen({}, {**file, **given}, folder, resume=resume, overwrite=overwrite)


def _train_on_text(
    settings: dict[str, Any], folder: Path, *, resume: bool, overwrite: bool
) -> None:
    from householder.train.text.observer import TextDisplay

    for name in COMPARED:
        take_single(settings, name)
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
    tokenizer: Annotated[
        str | None,
        typer.Option(help="bytes, or a tokenizer.json; default: the one beside the model."),
    ] = None,
) -> None:
    """Continue a text with a trained language model, token by token as they are drawn."""
    from householder.train.text.generation import continue_text

    if prompt is None:
        prompt = "" if sys.stdin.isatty() else _standard_input()
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
        tokenizer=tokenizer,
    )
    typer.echo(prompt, nl=False)
    try:
        for piece in stream:
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:  # the reader has seen enough
        raise typer.Exit(130) from None
    finally:
        typer.echo()


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"`prompt` must be text in UTF-8, got a byte that is none of it on standard input: "
            f"{error.reason} at {error.start}; convert the text to UTF-8"
        ) from error


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


def _folder(flag: Path | None, in_file: Any, default: str) -> Path:
    if in_file is not None and not isinstance(in_file, str):
        raise ConfigError(
            f"`out` must be of type str, got {in_file!r}; write the folder's name in quotes"
        )
    return flag or Path(in_file or default)


@app.command("adapt")
@with_settings(AdaptConfig, show_defaults=True)
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

    refuse_both(resume, overwrite)
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
