"""The entry point: commands, exit codes, and errors in one line."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from crdnd.cli.check_teacher import check_teacher_command
from crdnd.cli.compare import compare_command
from crdnd.cli.data import data_app
from crdnd.cli.demo import demo_command
from crdnd.cli.diff import diff_command
from crdnd.cli.doctor import doctor_command
from crdnd.cli.estimate import estimate_command
from crdnd.cli.evaluate import evaluate_command
from crdnd.cli.export import export_command
from crdnd.cli.hub import card_command, pull_command, push_command
from crdnd.cli.lists import list_command
from crdnd.cli.predict import predict_command
from crdnd.cli.recipes import recipes_command
from crdnd.cli.runs import runs_command, status_command, watch_command
from crdnd.cli.study import study_command
from crdnd.cli.train import distill_command, train_command
from crdnd.errors import InputError, Interrupted, RunError, first_line

INTERRUPTED = 130
app = typer.Typer(
    name="crdnd",
    help="Adversarially robust distillation: small image classifiers that stay right under attack.",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo_command)
app.command("train")(train_command)
app.command("distill")(distill_command)
app.command("check-teacher")(check_teacher_command)
app.command("evaluate")(evaluate_command)
app.command("predict")(predict_command)
app.command("export")(export_command)
app.command("compare")(compare_command)
app.command("study")(study_command)
app.command("runs")(runs_command)
app.command("status")(status_command)
app.command("watch")(watch_command)
app.command("recipes")(recipes_command)
app.command("estimate")(estimate_command)
app.command("diff")(diff_command)
app.command("card")(card_command)
app.command("push")(push_command)
app.command("pull")(pull_command)
app.command("list")(list_command)
app.command("doctor")(doctor_command)
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from crdnd.provenance import installed_version

        print(installed_version("crdnd"))
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 the caller's mistake, 1 ours or the machine's, 130 Ctrl-C, 143 SIGTERM."""
    code = _exit_code(list(sys.argv[1:] if arguments is None else arguments))
    if code == 0:
        _part()
    sys.exit(code)


def _part() -> None:
    """Leave the other processes of a run in order: a connection that is open at the end may abort the interpreter."""
    distributed = sys.modules.get("torch.distributed")  # not imported by a command that does not compute
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _exit_code(arguments: list[str]) -> int:
    try:
        result = app(args=arguments, prog_name="crdnd", standalone_mode=False)
    except Interrupted as error:
        return _say(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say("stopped.", INTERRUPTED)
    except InputError as error:
        return _say(f"error: {error}", 2)
    except RunError as error:
        return _say(f"error: {error}", 1)
    except MemoryError as error:
        return _say(f"error: out of memory ({first_line(error)}); take fewer or smaller images.", 1)
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to tell it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # Typer's usage errors come from click or from typer's own copy of it, depending on its version; both have this.
        if not hasattr(error, "format_message"):
            raise
        return _say(f"error: {error.format_message()}", 2)  # pyright: ignore[reportAttributeAccessIssue]
    if result == INTERRUPTED:  # typer from 0.29 on makes this of Ctrl-C
        return _say("stopped.", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _say(message: str, code: int) -> int:
    print(" ".join(message.splitlines()), file=sys.stderr)
    return code
