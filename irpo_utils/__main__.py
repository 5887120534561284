"""The command line: python -m irpo_utils [preset] [key=value ...], which is what ./run_all.sh calls."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from .files import Busy, ConfigError, MissingArtefact, load_object
from .methods.recipes import catalogue
from .run.config import Config, dump
from .run.driver import estimate, start, why
from .run.jobs import run_alone
from .run.presets import presets
from .run.store import is_run, read_run, run_folder

HELP = """usage: ./run_all.sh [preset] [key=value ...]     run the loop, skip what is done, write outputs/<run>/report.html
       ./run_all.sh RUN [key=value ...]           go on with outputs/RUN, with the parameters that it has
       ./run_all.sh why RUN                       say of every stage whether it is done, and if not why
       ./run_all.sh lab                           open JupyterLab on working copies of the notebooks
       ./run_all.sh --list                        show the presets, the methods and every parameter with its default
       ./run_all.sh --estimate preset [key=value ...]   memory that a run would take; runs nothing
       ./run_all.sh --bench [quick|full]          sampling and training beside generate and TRL -> outputs/bench/bench.json
       ./run_all.sh --site                        build the book of the project -> outputs/site/index.html
       ./run_all.sh --gpu-check                   what a GPU is to show, in nine minutes -> outputs/gpu/gpu.json
       ./run_all.sh --publish RUN                 copy a run's small artefacts to outputs/reference/RUN
       ./run_all.sh export RUN FOLDER [method=irpo seed=0 iteration=3 push=OWNER/NAME]   write M_t as one whole model
       ./run_all.sh pairs RUN FILE [method=irpo seed=0 iteration=1 form=text]   write a round's pairs as preference data
       ./run_all.sh attempts RUN FOLDER [method=irpo seed=0 iteration=1]   write M_{t-1}'s solutions as problems to refine
       ./run_all.sh extrapolate TH1 TH0|base FOLDER [a=0.3]   ExPO: write TH1 + a (TH1 - TH0), both folders of policies
       ./run_all.sh grade --task gsm8k FILE.jsonl       grade any responses (see grade --help)
       ./run_all.sh --test                        run the tests

  run=NAME       the folder under outputs/ (default: the preset's name)
  jobs=J         methods and seeds at work side by side, each on `threads` CPU threads; one that is left over evaluates
                 (default: on Linux without a GPU as many as cores and memory allow, else 1). They go to the machines of
                 a Ray cluster if RAY_ADDRESS names one; sampling.workers=W: processes that draw for one of them
                 (irpo_utils/site/pages/clusters.md)
  key=value      any parameter, as in iterations=2 seeds=3 methods=irpo,dpo train.lr=1e-3 dpo.train.beta=0.3
  --yes          do finished stages again that took long, where a changed parameter wants it
  --debug        with any command: show the traceback behind an error

A run that was stopped goes on with the same command. A changed parameter reruns what depends on it, and no more."""  # noqa: E501
# Commands of other rooms, which take the rest of the command line.
COMMANDS = {
    "lab": "irpo_utils.run.lab:main",
    "grade": "irpo_utils.run.grade:main",
    "export": "irpo_utils.report.publish:export",
    "pairs": "irpo_utils.report.publish:pairs",
    "attempts": "irpo_utils.report.publish:attempts",
    "extrapolate": "irpo_utils.report.publish:extrapolate",
    "--site": "irpo_utils.site.build:main",
    "--gpu-check": "irpo_utils.extras.gpu_check:main",
}


def show_all() -> None:
    """The presets, the methods and the parameters there are."""
    print("presets:")
    for name, text in presets().items():
        print(f"  {name:36} {text}")
    print(
        "\nmethods (irpo_utils/methods/recipes.yaml), each round as reward, selection, loss, start, reference; "
        "methods=all takes every one:"
    )
    for name, recipe in catalogue().items():
        rounds = [f"{r.reward}, {r.selection}, {r.loss}, {r.start}, {r.reference}" for r in recipe.rounds]
        print(f"  {name:16} {' | '.join(rounds)}")
    print("\nparameters and their defaults (before the preset's):")
    print(dump(Config()))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}; see ./run_all.sh --help")


def parser() -> argparse.ArgumentParser:
    made = Parser("./run_all.sh", add_help=False, allow_abbrev=False)
    made.add_argument("-h", "--help", action="store_true")
    made.add_argument("--list", action="store_true")
    made.add_argument("--estimate", action="store_true")
    made.add_argument("--yes", action="store_true")
    made.add_argument("--bench", nargs="?", const="quick", choices=("quick", "full"))
    made.add_argument("--publish", metavar="RUN")
    made.add_argument("--method-seed", nargs=4, help=argparse.SUPPRESS)
    made.add_argument("--evaluations", choices=("last", "only"), help=argparse.SUPPRESS)
    made.add_argument("words", nargs="*")
    return made


def command(arguments: list[str]) -> int:
    if arguments[:1] and arguments[0] in COMMANDS:
        return load_object(COMMANDS[arguments[0]])(arguments[1:])
    options = parser().parse_intermixed_args(arguments)  # `--yes` may stand between parameters
    words, alone = options.words, options.help or options.list or options.bench or options.publish is not None
    if (alone and (words or options.estimate)) or (options.evaluations and not options.method_seed):
        raise ConfigError(f"no option is used as {' '.join(arguments)!r}; see ./run_all.sh --help")
    if options.help:
        print(HELP)
    elif options.list:
        show_all()
    elif options.bench:
        os.environ.update(TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
        return load_object("irpo_utils.extras.bench:main")(options.bench)
    elif options.publish is not None:
        load_object("irpo_utils.report.publish:publish")(run_folder(options.publish))
    elif options.method_seed:
        run, method, seed, parent = options.method_seed
        run_alone(Path(run), method, int(seed), int(parent), options.evaluations)
    elif words[:1] == ["why"]:
        if len(words) != 2:
            raise ConfigError("why: used as why RUN, a folder under outputs/")
        why(*read_run(words[1]))
    else:
        named = words[:1] and ("=" not in words[0] or is_run(words[0]))
        preset, settings = (words[0], words[1:]) if named else ("tiny", words)
        if options.estimate:
            estimate(preset, settings)
        else:
            start(preset, settings, options.yes)
    return 0


def readable(message: str) -> str:
    """A message in which a value of thousands of characters is not repeated whole."""
    short = re.sub(r"\S{400,}", lambda m: f"{m[0][:80]}... ({len(m[0]):,} characters)", message)
    return short if len(short) < 4000 else f"{short[:2000]} ... {short[-1000:]}"


def main(arguments: list[str]) -> int:
    """Run one command; every error that a user can do something about is one line."""
    debug = "--debug" in arguments
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request to stop is a person's
    try:
        return command([a for a in arguments if a != "--debug"])
    except BrokenPipeError:  # standard output was closed, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if "--method-seed" not in arguments:  # one of several, for which the driver speaks
            print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ConfigError, MissingArtefact, Busy, OSError, RuntimeError) as error:
        if debug:
            traceback.print_exc()
        plain = isinstance(error, OSError) and not isinstance(error, MissingArtefact) and error.filename
        print("error:", readable(f"{error.strerror}: {error.filename}" if plain else str(error)), file=sys.stderr)
        return 2 if isinstance(error, ConfigError | MissingArtefact | Busy) else 1
    except Exception as error:  # a case that nobody thought of
        if debug:
            traceback.print_exc()
        print(f"error: {readable(f'{type(error).__name__}: {error}')} (--debug shows where)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
