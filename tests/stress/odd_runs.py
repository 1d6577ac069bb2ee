"""Makes settings and environments for fuzz.py: what people put into YAML besides lit_cifar's own, and what a shell, a
cluster or a container leaves in the environment. Each run is one step on a few images."""

from typing import Any

from hypothesis import strategies as st

TINY = [
    "--accelerator", "cpu", "--data_dir", "tiny", "--batch_size", "4", "--trainer.max_steps", "2",
]  # fmt: skip
CALLBACKS = {
    "EarlyStopping": {"monitor": ("val/loss", "val/accuracy", "train/loss", "nothing", "null"), "patience": (0, 3, -1)},
    "ModelCheckpoint": {"monitor": ("val/loss", "null", "x"), "save_top_k": (-1, 0, 1, 2), "every_n_epochs": (0, 1)},
    "StochasticWeightAveraging": {"swa_lrs": (0.1, -1, "x", "null"), "swa_epoch_start": (0, 0.5, 1, 2.5)},
    "EMAWeightAveraging": {"decay": (0.9, 2, "x")},
    "LearningRateMonitor": {"logging_interval": ("step", "epoch", "day", "null")},
    "LearningRateFinder": {"num_training_steps": (0, 2, 5), "min_lr": (0, 1e-5, 2), "mode": ("linear", "cubic")},
    "BatchSizeFinder": {"mode": ("power", "binsearch", "x"), "max_trials": (0, 1, 2), "init_val": (0, 1, 2, 3)},
    "GradientAccumulationScheduler": {"scheduling": ("{0: 2}", "{1: 0}", "{-1: 2}", "2", "{a: b}")},
    "GradientAccumulationSchedulers": {},
    "DeviceStatsMonitor": {"cpu_stats": ("true", "null", "x")},
    "ModelSummary": {"max_depth": (-1, 0, 1, "x")},
    "Timer": {"duration": ("00:00:00:01", "1", "x", "null"), "interval": ("step", "epoch", "x")},
    "ModelPruning": {"pruning_fn": ("l1_unstructured", "x"), "amount": (0.5, 2, -1)},
    "OnExceptionCheckpoint": {"dirpath": (".", "", "null")},
    "LambdaCallback": {},
    "TQDMProgressBar": {"refresh_rate": (0, 1, -1)},
    "RichProgressBar": {},
    "BackboneFinetuning": {},
    "ThroughputMonitor": {},
    "Callback": {},
}
LOGGERS = {
    "CSVLogger": {"save_dir": (".", "logs", "null", "/proc/x"), "flush_logs_every_n_steps": (0, 1)},
    "TensorBoardLogger": {"save_dir": (".", "logs"), "log_graph": ("true", "x")},
    "WandbLogger": {"offline": ("true",)},
    "MLFlowLogger": {},
    "CometLogger": {},
    "NeptuneLogger": {},
    "Logger": {},
}
SETTINGS = {
    "strategy": (
        "auto", "ddp", "ddp_spawn", "ddp_notebook", "ddp_find_unused_parameters_true", "fsdp", "deepspeed", "dp", "x",
        "single_device", "{class_path: lightning.pytorch.strategies.SingleDeviceStrategy}",
        "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {find_unused_parameters: x}}",
    ),
    "precision": ("32", "64", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "transformer-engine", "8"),
    "profiler": ("simple", "advanced", "pytorch", "x", "{class_path: lightning.pytorch.profilers.XLAProfiler}"),
    "plugins": ("[]", "x", "[{class_path: lightning.pytorch.plugins.MixedPrecision}]",
                "[{class_path: lightning.pytorch.plugins.environments.LightningEnvironment}]"),
    "limit_train_batches": (0, 1, 1.0, 0.5, -1, 2.5), "limit_val_batches": (0, 1, 0.0),
    "limit_test_batches": (0, 1, 0.1),
    "overfit_batches": (0, 1, 0.5, 3), "val_check_interval": (0, 1, 0.5, 2.5),
    "check_val_every_n_epoch": (0, 1, "null"),
    "max_epochs": (-1, 0, 1, 2), "max_time": ("00:00:00:05", "x"), "min_epochs": (0, 3), "devices": (0, 1, "auto", "x"),
    "num_nodes": (0, 1), "log_every_n_steps": (-1, 0, 1), "gradient_clip_val": (-1, 0, 0.5, "x"),
    "gradient_clip_algorithm": ("norm", "value", "x"), "accumulate_grad_batches": (0, 1, 3), "barebones": ("true",),
    "fast_dev_run": ("true", 2, -1), "deterministic": ("true", "warn", "x"), "detect_anomaly": ("true",),
    "enable_progress_bar": ("true", "false"), "enable_model_summary": ("true",), "enable_checkpointing": ("false",),
    "inference_mode": ("false",), "sync_batchnorm": ("true",), "reload_dataloaders_every_n_epochs": (-1, 1),
}  # fmt: skip


def chosen(names: dict[str, dict[str, tuple[Any, ...]]], package: str) -> st.SearchStrategy[dict[str, Any]]:
    """A class of Lightning's with some of its settings, right and wrong ones."""

    def with_settings(name: str) -> st.SearchStrategy[dict[str, Any]]:
        init_args = st.fixed_dictionaries(
            {}, optional={key: st.sampled_from(values) for key, values in names[name].items()}
        )
        return init_args.map(
            lambda args: {"class_path": f"lightning.pytorch.{package}.{name}", **({"init_args": args} if args else {})}
        )

    return st.sampled_from(sorted(names)).flatmap(with_settings)


OPTIONS = {
    "callbacks": st.lists(chosen(CALLBACKS, "callbacks"), min_size=1, max_size=3),
    "logger": st.lists(chosen(LOGGERS, "loggers"), min_size=1, max_size=2) | chosen(LOGGERS, "loggers"),
    **{name: st.sampled_from(values) for name, values in SETTINGS.items()},
}
# few at once: of many, one is refused nearly always, and the rest is never tried
names = st.lists(st.sampled_from(["callbacks", "callbacks", "logger", *SETTINGS]), min_size=1, max_size=3, unique=True)
trainers = names.flatmap(lambda chosen: st.fixed_dictionaries({name: OPTIONS[name] for name in chosen}))

NUMBERS = ("", "0", "1", "-1", "abc", "1.5", "99999999999", " 1", "²")
PLACES = ("", ".", "/proc/nowhere", "/dev/null", "s3://x", "~", "a\nb", "\udcff")
VARIABLES = {
    **dict.fromkeys(
        ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS",
         "SLURM_NNODES", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NTASKS_PER_NODE", "MASTER_PORT", "OMP_NUM_THREADS",
         "PL_GLOBAL_SEED", "COLUMNS", "LINES", "JSM_NAMESPACE_RANK", "CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK"),
        NUMBERS,
    ),
    **dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME", "LIT_CIFAR_CACHE", "MPLCONFIGDIR", "TORCH_HOME"), PLACES),
    "LIT_CIFAR_RESUME": ("", "auto", "nowhere.ckpt"),
    "MASTER_ADDR": ("", "localhost", "no.such.host.invalid"),
    "SLURM_JOB_NAME": ("bash", "train"), "SLURM_NODELIST": ("", "n[1-", "n1"),
    "LANG": ("C", "x"), "LC_ALL": ("POSIX", "x"), "TERM": ("dumb", "x"), "PYTHONWARNINGS": ("error", "x"),
    "KUBERNETES_PORT": ("x",), "TORCHELASTIC_RUN_ID": ("x",), "WORLD_SIZE": ("", "1", "abc"), "NO_COLOR": ("1",),
}  # fmt: skip
environments = st.dictionaries(st.sampled_from(sorted(VARIABLES)), st.none(), min_size=1, max_size=6).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(VARIABLES[name]) for name in sorted(names)})
)
