"""`python -m lit_cifar.test`: tests a checkpoint and reports as fit does. What other commands share is not here."""

import time
from pathlib import Path
from typing import Any

from lit_cifar.cli import machine
from lit_cifar.cli.command import CLI
from lit_cifar.cli.parser import Parser, value_of
from lit_cifar.errors import UserError
from lit_cifar.model.classifier import check_net
from lit_cifar.results.report import print_report, write_results
from lit_cifar.run.folder import run_folder
from lit_cifar.run.read import read_checkpoint
from lit_cifar.run.trust import checkpoint_config

# of the checkpoint's config; by its batch size threads and kernels are chosen, as they were for the run's own test
DATA_KEYS = ("data_dir", "dataset", "batch_size", "eval_batch_size", "mirrors")


def main(args: list[str]) -> None:
    """Tests and reports; `args` is the command line without the program's name."""
    started = time.perf_counter()
    path = Path(value_of("ckpt_path", args) or "")
    checkpoint = read_checkpoint(path) if path.name else None
    command = CLI(
        args,
        prog="python -m lit_cifar.test",
        description="Tests a checkpoint on the data it was trained on, or on --data_dir's, on any number of devices.",
        base=_base(checkpoint, trust=value_of("trust", args) == "true") if checkpoint else None,
        logs=False,
        add_arguments=_add_arguments,
    )
    if checkpoint is None:
        raise UserError("--ckpt_path FILE is missing: name a checkpoint, such as a run's checkpoints/last.ckpt")
    trainer, model, data = command.trainer, command.model, command.datamodule
    with machine.on_each_node():
        data.prepare_data()
        data.setup("test")
    model.check_fits(checkpoint, data.classes)
    model.set_classes(data.classes)

    test_started = time.perf_counter()
    trainer.test(model, datamodule=data, ckpt_path=path, weights_only=True, verbose=False)
    if not trainer.is_global_zero:
        return
    report = model.reports["test"]
    plain = model.reports.get("plain")
    results = {
        "dataset": data.dataset,
        **report.results(),
        **({"accuracy_without_tta": plain.accuracy} if plain else {}),
        "checkpoint": str(path),
        "num_steps": checkpoint["global_step"],
        "devices": trainer.world_size,
        "seconds": {"test": time.perf_counter() - test_started, "total": time.perf_counter() - started},
        "seed": command.plain_config["seed_everything"],
    }
    output = Path(command.options["output"] or (run_folder(path) or Path()) / f"test-{path.stem}.json")
    write_results(output, results)
    print_report(report, plain)
    print(f"\nResults: {output}")


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("--ckpt_path", type=str, default=None, help="the checkpoint to test")
    parser.add_argument(
        "--output", type=str, default=None, help="file for the results (default: test-NAME.json in the run's folder)"
    )
    parser.add_argument(
        "--trust", type=bool, default=False, help="true: make classes that the checkpoint names, of any package"
    )


def _base(checkpoint: dict[str, Any], trust: bool) -> dict[str, Any]:
    """The checkpoint's net and data; devices and the like are this command's own."""
    config = checkpoint_config(checkpoint, trust)
    if not trust and "net" in config.get("model", {}):
        check_net(config["model"]["net"], checkpoint["state_dict"])
    data = {key: value for key, value in config.get("data", {}).items() if key in DATA_KEYS}
    return {"seed_everything": config.get("seed_everything", 0), "model": config.get("model", {}), "data": data}


if __name__ == "__main__":
    machine.run(main)
