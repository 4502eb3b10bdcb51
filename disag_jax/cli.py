"""What all commands share: flags, the config file, and mistakes told in one sentence."""

import dataclasses
import inspect
import itertools
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from disag_jax.config import Config
from disag_jax.errors import INTERRUPTED, RUN_ERROR, USER_ERROR, ConfigError, RunError
from disag_jax.files import discard_output

NUMBER_PARSERS = {int: flags.IntegerParser(), float: flags.FloatParser()}
PROCESS_FLAGS = ("coordinator", "num_processes", "process_id")
# What absl says of a flag that is marked as required.
MISSING = re.compile(r"flag --(\w+)=None: Flag --\1 must have a value other than None")


def define_config_flag():
    """The `--config` flag: a Python file with `get_config()`, and overrides of its fields."""
    return config_flags.DEFINE_config_file(
        "config", None, "experiment, for example configs/tiny.py"
    )


def define_cpu_devices_flag():
    """The `--cpu_devices` flag, for `mesh.runtime.start`."""
    return flags.DEFINE_integer(
        "cpu_devices",
        0,
        "simulate this many devices on the CPU; 0 takes the accelerators",
        lower_bound=0,
    )


def define_process_flags():
    """The flags coordinator, num_processes and process_id, as `processes.join` takes them."""
    return (
        flags.DEFINE_string(
            "coordinator",
            None,
            "host:port of process 0, for several processes without SLURM or MPI",
        ),
        flags.DEFINE_integer("num_processes", None, "processes of the run"),
        flags.DEFINE_integer("process_id", None, "which of them this is, from 0"),
    )


def values_for_all() -> dict[str, object]:
    """Values of a command's flags that its processes must share; of configs see `processes`."""
    own = set(PROCESS_FLAGS) | {"config"}
    return {
        flag.name: flag.value
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        for flag in defined
        if not module.startswith("absl") and flag.name.split(".")[0] not in own
    }


def run(main, arguments: str | None = None):
    """Runs `main()` after parsing flags.

    A user's mistake ends it with one sentence and code 2, a run that cannot go on with code 1.

    arguments: what the arguments that are not flags name, such as "directory"; `main` is then
      called with them, one or more.
    """

    def guarded(argv):
        if arguments is None and len(argv) > 1:
            _fail(f"argument {argv[1]!r} must be a flag, such as --config=configs/tiny.py")
        if arguments is not None and len(argv) == 1:
            _fail(f"a {arguments} must be named after the command")
        if arguments is not None:
            try:
                inspect.signature(main).bind(*argv[1:])
            except TypeError:
                _fail(f"argument {argv[2]!r} must not be there: one {arguments} is named")
        # Libraries log their settings at INFO; what a run has to say it prints.
        logging.set_verbosity(logging.WARNING)
        try:
            main(*argv[1:])
        except ConfigError as error:
            _fail(str(error))
        except RunError as error:
            _fail(str(error), RUN_ERROR)
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            # Whoever read the output, such as `head`, has had enough.
            discard_output()

    app.run(guarded, flags_parser=_parse)


def _parse(argv):
    """Parses flags; errors of the config file's overrides come as several exception types."""
    _check_overrides(argv)
    try:
        rest = flags.FLAGS(argv)
        # A file that cannot be read shows only when the value is used.
        if "config" in flags.FLAGS and not isinstance(flags.FLAGS["config"].value, Config):
            _fail(
                f"--config = {_config_path(argv)!r} must be a Python file whose get_config() "
                "returns a Config"
            )
        return rest
    except flags.Error as error:
        missing = MISSING.match(str(error))
        _fail(f"--{missing.group(1)} = None must be given" if missing else str(error))
    except SyntaxError as error:
        _fail(f"--config = {error.filename!r} must be valid Python: {error}")
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        _fail(str(error.args[0]) if error.args else repr(error))


def _check_overrides(argv):
    """Says of a wrong field which there are, and of a wrong number which field it is of.

    The flag library does neither.
    """
    for argument in argv:
        path, _, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not path.startswith("config."):
            continue
        section = Config
        for name in path.split(".")[1:]:
            if not dataclasses.is_dataclass(section):
                _fail(f"{path} = {value!r} must name a field; the one before .{name} has none")
            fields = {field.name: field.type for field in dataclasses.fields(section)}
            if name not in fields:
                known = ", ".join(fields)
                _fail(f"{path} = {value!r} must be a field of {section.__name__}: {known}")
            section = fields[name]
        if value and section in NUMBER_PARSERS:
            parser = NUMBER_PARSERS[section]
            try:
                parser.convert(value)
            except ValueError:
                _fail(f"{path} = {value!r} must be {parser.syntactic_help}")


def _config_path(argv) -> str | None:
    """What a command line names as its config file."""
    for argument, after in itertools.zip_longest(argv, argv[1:]):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            return value if equals else after
    return None


def _fail(sentence: str, code: int = USER_ERROR):
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)
