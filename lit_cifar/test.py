"""`python -m lit_cifar.test`: tests a checkpoint and reports as fit does. What other commands share is not here."""

from lit_cifar import process

if __name__ == "__main__":
    process.begin()  # before the imports, which take seconds

import time
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lit_cifar import clock
from lit_cifar.cli import machine
from lit_cifar.cli.command import set_up
from lit_cifar.cli.parser import NET, TRUST, Parser
from lit_cifar.errors import UserError, calls_chosen
from lit_cifar.files import check_output, write_durably, write_output, writing
from lit_cifar.model.classifier import checked_config
from lit_cifar.results.report import print_report, write_results
from lit_cifar.run.folder import Run
from lit_cifar.run.read import State, read_checkpoint
from lit_cifar.text import in_command

# of the checkpoint's config; by its batch size threads and kernels are chosen, as they were for the run's own test
DATA_KEYS = ("data_dir", "dataset", "batch_size", "eval_batch_size", "mirrors")
SECTIONS = {**dict.fromkeys(("seed_everything", "model_class", "model")), "data": DATA_KEYS}
OF_TRAINING = {"optimizer", "scheduler", "scheduler_interval", "scheduler_monitor"}  # of the model; a test makes none
WAY_OUT = "choose another place with --output"


@in_command()
@calls_chosen("in the test")
def main(args: list[str]) -> None:
    """Tests and reports; `args` is the command line without the program's name."""
    started = time.perf_counter()
    command = set_up(
        args,
        prog="python -m lit_cifar.test",
        description="Tests a checkpoint on the data it was trained on, or on --data_dir's, on any number of devices.",
        start=_tested,
        logs=False,
        add_arguments=_add_arguments,
    )
    trainer, model, data, state = command.trainer, command.model, command.datamodule, command.state
    if state is None:
        raise UserError("--ckpt_path FILE is missing: name a checkpoint, such as a run's checkpoints/last.ckpt")
    run = Run.of(state.path, state.identity)
    chosen = command.options["output"]
    output = Path(chosen or (run.folder if run else Path()) / f"test-{state.path.stem}.json")
    if trainer.is_global_zero:
        check_output(output, WAY_OUT)
    with machine.on_each_node():
        data.prepare_data()
        data.setup("test")
    model.check_fits(state, data.classes)
    model.set_classes(data.classes)

    # those that the run was trained with, and a test does without
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
    clock.reset()
    test_started = time.perf_counter()
    if state.is_net:  # Lightning reads no other files than its own
        model.load_state_dict(state.weights, strict=model.strict_loading)
    path = None if state.is_net else state.path
    trainer.test(model, datamodule=data, ckpt_path=path, weights_only=True, verbose=False)
    if not trainer.is_global_zero:
        return
    now = time.perf_counter()
    compiled = clock.seconds()["compile"]
    seconds = {"compile": compiled, "test": now - test_started - compiled, "total": now - started}
    try:
        with writing(output, WAY_OUT):
            write = write_output if chosen else write_durably
            write_results(output, command.results(str(state.path), state.step, seconds), write)
    finally:
        print_report(model.reports["test"], model.reports.get("plain"), num_all=len(data.test.labels))
    print(f"\nResults: {output}")


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("--ckpt_path", type=str, default=None, help=NET)
    parser.add_argument(
        "--output", type=str, default=None, help="file for the results (default: test-NAME.json in the run's folder)"
    )
    parser.add_argument("--trust", type=bool, default=False, help=TRUST)


def _tested(settings: Namespace) -> tuple[State, dict[str, Any]] | None:
    """The state to test, with its net and data; devices and the like are this command's own."""
    machine.set_log_level(settings.log_level)
    if not settings.ckpt_path:
        return None
    state = read_checkpoint(Path(settings.ckpt_path))
    model = state.config.get("model", {}).keys()
    wanted = SECTIONS if state.config.get("model_class") else {**SECTIONS, "model": model - OF_TRAINING}
    return state, checked_config(state, settings, wanted)


if __name__ == "__main__":
    machine.run(main)
