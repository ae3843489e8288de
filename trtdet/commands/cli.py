# SPDX-License-Identifier: Apache-2.0
"""What the commands share at the border: the parser of the command line, logging, exit codes."""

import argparse
import logging
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from trtdet import about
from trtdet.commands.advice import advise, nearest
from trtdet.commands.stages import hand_over
from trtdet.doctor.packages import requirement_file
from trtdet.errors import DOCTOR, EngineError, GraphError
from trtdet.files import message_of, printable, shortened
from trtdet.streams import flush_output, open_streams
from trtdet.terminal import PROJECT

logger = logging.getLogger(__name__)


#: Errors that are the user's to fix: one line on stderr, exit status 1.
USER_ERRORS = (GraphError, EngineError, ValueError, OSError)

#: What engines are usually called.
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")

#: Exit status of a run that is done but for some images that could not be read.
SOME_SKIPPED = 3


class _PrintableFormatter(logging.Formatter):
    """One line for each message, whatever file names are in it; a terminal gets no control
    characters from them.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shortened(printable(super().formatMessage(record)))


def setup_logging(verbose: bool = False, quiet: bool = False) -> None:
    """Send this project's log to stderr; results alone go to stdout.

    Args:
        quiet: warnings and errors alone, and no progress bars.
    """
    open_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(levelname).1s %(message)s"))
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger(PROJECT).setLevel(logging.WARNING if quiet else logging.NOTSET)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Third-party chatter is of interest only with -v; Python's warnings are among it, of which
    # Pillow has two lines for every odd tag of an image, without its name.
    logging.captureWarnings(True)
    for name in ("tf2onnx", "tensorflow", "absl", "PIL", "matplotlib", "py.warnings"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


def run_main(run: Callable[[], int | None]) -> int:
    """Run one stage and turn its errors into an exit status.

    Returns:
        What `run` returns (0 for None), 1 for an error of `USER_ERRORS`, 130 for Ctrl-C, 143 for
        SIGTERM (a batch system's or a container's end): as a shell would report them.
    """
    with _terminate_as_interrupt() as terminated:
        try:
            status = run() or 0
            flush_output()
            return status
        except (ImportError, AttributeError) as error:
            message = _missing(error)
            if message is None:
                raise
            logger.debug("traceback", exc_info=True)
            sys.stderr.write(f"error: {printable(message)}\n")
            return 1
        except USER_ERRORS as error:
            logger.debug("traceback", exc_info=True)
            sys.stderr.write(f"error: {message_of(error)}\n")
            return 1
        except MemoryError as error:
            logger.debug("traceback", exc_info=True)
            sys.stderr.write(f"error: not enough memory ({message_of(error)}){_needs_less()}\n")
            return 1
        except KeyboardInterrupt:
            sys.stderr.write("terminated\n" if terminated.is_set() else "interrupted\n")
            return 143 if terminated.is_set() else 130


#: The options of the stage that runs, given or not.
_options: ContextVar[frozenset[str]] = ContextVar("_options", default=frozenset())
#: What needs less memory if it is smaller, or if there are fewer.
SMALLER, FEWER = ("--batch_size", "--calib_batch_size", "--size"), ("--workers", "--contexts")


def _needs_less() -> str:
    """The options of this stage that make it need less memory."""
    here = _options.get()
    smaller = " or ".join(name for name in SMALLER if name in here)
    fewer = " or ".join(name for name in FEWER if name in here)
    if smaller and fewer:
        return f"; a smaller {smaller}, or fewer {fewer}, needs less"
    return f"; a smaller {smaller} needs less" if smaller else ""


def _missing(error: ImportError | AttributeError) -> str | None:
    """What to do about a package that is not there, cannot be loaded, or is another one of its
    name.

    None for what is a fault of ours.
    """
    if isinstance(error, AttributeError) and not isinstance(error.obj, ModuleType):
        return None
    package = _package_of(error).partition(".")[0]
    if package in ("", "trtdet"):
        return None
    if isinstance(error, AttributeError):
        where = getattr(error.obj, "__file__", None) or "no file"
        return f"the Python package {package} is not the one that is needed ({where}: {error}); pip install -r {requirement_file(package)} brings it, unless another file of its name is on PYTHONPATH"
    if not isinstance(error, ModuleNotFoundError):
        return f"the Python package {package} cannot be loaded ({error}); install what it misses, or it again: pip install --force-reinstall -r {requirement_file(package)}; {DOCTOR}"
    return (
        f"the Python package {package} is not installed here; activate the environment that has it (. .venv/bin/activate), "
        f"or pip install -r {requirement_file(package)}; {DOCTOR}"
    )


def _package_of(error: ImportError | AttributeError) -> str:
    """The module that is not as it should be: the one that is named, or in whose code it shows."""
    if isinstance(error, AttributeError):
        return str(getattr(error.obj, "__name__", ""))
    if error.name:
        return error.name
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    foreign = (name for name in names if name.partition(".")[0] not in ("trtdet", "importlib"))
    return next(foreign, "")


def check_plot(plot: Path | None) -> None:
    """Find out before long work whether --plot can draw.

    Raises:
        ValueError: matplotlib is missing.
    """
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib; pip install matplotlib")


@contextmanager
def _terminate_as_interrupt() -> Iterator[threading.Event]:
    """Let SIGTERM do what Ctrl-C does: by itself it ends the process where it stands, with
    temporary files left behind.

    Yields:
        Set once it has come.
    """
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated  # handlers belong to the main thread
        return

    def on_terminate(number: int, frame: FrameType | None) -> None:
        terminated.set()
        interrupt = signal.getsignal(signal.SIGINT)  # the builder has one of its own
        if not callable(interrupt):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    previous = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def parse_given(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, frozenset[str]]:
    """Parse a command line.

    Returns:
        All options, and the names of those that the command line gives, be it with their default.
    """
    args = parser.parse_args(argv)
    defaults = {action: action.default for action in parser._actions}
    try:
        for action in defaults:  # without defaults, what is left is given
            action.default = argparse.SUPPRESS
        given = parser.parse_args(argv)
    finally:
        for action, default in defaults.items():
            action.default = default
    return args, frozenset(vars(given))


# ---- the command line

#: Where the help texts start, and where lines end on a wide terminal.
HELP_COLUMN, HELP_WIDTH = 28, 102


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names the value of an option once: `--model, --engine, -e FILE`."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, HELP_WIDTH) - 2
        super().__init__(prog, max_help_position=HELP_COLUMN, width=max(width, 60))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """A text of several lines, a module's, stays as it is; that of a group is filled."""
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {values}"


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, with --version, and with errors that say what to do instead
    of listing all options.

    An unknown option is reported before anything else that is wrong, by the nearest name here, or
    by what the habit of another program (`trtdet.commands.habits`) is called here.
    """

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **keywords)
        self._commands: argparse._SubParsersAction[ArgumentParser] | None = None
        self._pairs: list[str] = []  # words such as model=FILE
        self.add_argument("--version", action="version", version=f"trtdet {about.__version__}", help="print the version and exit")  # fmt: skip

    def add_subparsers(self, **keywords: Any) -> Any:
        self._commands = super().add_subparsers(**keywords)
        return self._commands

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        hand_over(self)
        _options.set(frozenset(self._option_string_actions))
        words = list(sys.argv[1:] if args is None else args)
        self._pairs = [word for word in words if re.match(r"[a-z_]+=", word)]
        unknown = [word for word in self._own_words(words) if not self._is_known(word)]
        if unknown:
            self._refuse_unknown(list(dict.fromkeys(word.partition("=")[0] for word in unknown)))
        if "" in words:
            before = next((word for word in words[: words.index("")][-1:]), "")
            self.error(f"{f'argument {before}: ' if before else ''}expected a value, found nothing between the quotes; is a variable of your shell empty?")  # fmt: skip
        self._check_command(words)
        self._check_names(words)
        for word in self._own_words(words):
            if word.endswith("=--"):  # argparse before 3.13 makes an empty list of it
                self.error(f"argument {word[:-3]}: expected a value, found --")
        with self._nothing_required():  # a stray word may be why something is missing
            _, extras = super().parse_known_args(words)
        self._refuse_stray([word for word in extras if word not in self._pairs], words)
        parsed, extras = super().parse_known_args(words, namespace)
        self._refuse_stray(extras, words)
        return parsed, extras

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        """Exit with status 2 for options that are not known here."""
        if self._commands is not None:
            commands = self._commands.choices
            having = [c for c, sub in commands.items() if names[0] in sub._option_string_actions]
            self.error(f"give a command before {names[0]}: {', '.join(having or commands)}")
        advice = "; ".join(f"{name}: {self.advice(name)}" for name in names)
        self.error(f"unknown option{'s' if len(names) > 1 else ''} {advice}")

    def _check_command(self, words: Sequence[str]) -> None:
        """Exit with status 2 for a command that there is not."""
        if self._commands is None:
            return
        commands = self._commands.choices
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in commands:
            near = nearest(command, commands)
            advice = f"did you mean {near}?" if near else f"expected one of {', '.join(commands)}"
            self.error(f"unknown command {command}: {advice}")

    def _refuse_stray(self, words: Sequence[str], line: Sequence[str]) -> None:
        """Exit with status 2 for words of a command line that belong to no option."""
        if not words:
            return
        given = {word.partition("=")[0] for word in self._own_words(line)}

        def is_given(action: argparse.Action) -> bool:
            return not action.option_strings or not given.isdisjoint(action.option_strings)

        groups = [g._group_actions for g in self._mutually_exclusive_groups if g.required]
        inputs = [a for a in self._actions if "--input" in a.option_strings]
        wanted = [inputs, *groups, *([a] for a in self._actions if a.required)]
        missing = [some[0] for some in wanted if some and not any(map(is_given, some))]
        if missing:
            advice = f"write the option before it, as in {missing[0].option_strings[0]} {words[0]}"
        elif inputs and inputs[0].nargs == "+":
            advice = "several values go behind one option, as in --input a.jpg b.jpg"
        else:
            advice = "write the option before it"
        self.error(f"{' '.join(words)}: belongs to no option; {advice}")

    @contextmanager
    def _nothing_required(self) -> Iterator[None]:
        """Parse what is there, be it enough or not."""
        everything: list[Any] = [*self._actions, *self._mutually_exclusive_groups]
        required = [item for item in everything if item.required]
        try:
            for item in required:
                item.required = False
            yield
        finally:
            for item in required:
                item.required = True

    def _own_words(self, words: Sequence[str]) -> Iterator[str]:
        """What looks like options: with sub-commands those in front of the command's name."""
        for word in words:
            if word == "--":
                return
            if word.startswith("-") and word != "-" and " " not in word.partition("=")[0]:
                if not re.match(r"-\.?\d", word):  # a negative number
                    yield word
            elif self._commands is not None:
                return

    def _check_names(self, words: Sequence[str]) -> None:
        """Exit with status 2 where one value is given under two names: the first would be lost
        without a word.
        """
        given: dict[argparse.Action, str] = {}
        for word in self._own_words(words):
            name = word.partition("=")[0]
            action = self._option_string_actions.get(name)
            if isinstance(action, argparse._StoreAction) and given.setdefault(action, name) != name:
                self.error(f"{given[action]} and {name} are names of one option; leave one out")

    def _is_known(self, word: str) -> bool:
        known = self._option_string_actions
        name = word.partition("=")[0]
        # "-b4" is "-b 4", but "-onnx" is no "-o nnx".
        joined = not name.startswith("--") and name[:2] in known and f"-{name}" not in known
        return name in known or joined

    def advice(self, name: str) -> str:
        """What to write in place of an unknown option."""
        return advise(name, self.prog, self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        head, _, missing = message.partition("the following arguments are required: ")
        if missing and not head:
            message = self._missing(missing)
        if one := re.fullmatch("one of the arguments (.*) is required", message):
            message = f"missing {' or '.join(self._usages(one[1].split()))}"
        message = shortened(printable(message))
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def _missing(self, names: str) -> str:
        """What to add to the command line, in the form that it takes there."""
        if self._commands is not None and names == self._commands.metavar:
            return f"give a command: {', '.join(self._commands.choices)}"
        known = self._usages(names.split(", "))
        advice = f"; write --NAME VALUE, not {self._pairs[0]}" if self._pairs else ""
        return "missing " + (", ".join(known) or names) + advice

    def _usages(self, names: Sequence[str]) -> list[str]:
        """Options as they are written, by argparse's names for them."""
        actions = {"/".join(action.option_strings): action for action in self._actions}
        return [_usage_of(actions[name]) for name in names if name in actions]

    def format_usage(self) -> str:
        """One line: what is required, and that there is more."""
        return f"usage: {self._short_usage()} (--help lists the options)\n"

    def format_help(self) -> str:
        self.usage = self._short_usage().replace("%", "%%")
        return super().format_help()

    def _short_usage(self) -> str:
        words = [self.prog]
        grouped: set[argparse.Action] = set()
        for group in self._mutually_exclusive_groups:
            if group.required:
                grouped.update(group._group_actions)
                words.append("(" + " | ".join(_usage_of(a) for a in group._group_actions) + ")")
        words += [_usage_of(a) for a in self._actions if a.required and a not in grouped]
        return " ".join([*words, "[options]"])


def _usage_of(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return metavar
    return action.option_strings[0] if action.nargs == 0 else f"{action.option_strings[0]} {metavar}"  # fmt: skip
