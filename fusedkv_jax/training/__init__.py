"""Training: configuration, train step, loop, checkpoints and metrics."""

from typing import TYPE_CHECKING

from fusedkv_jax.lazy import lazy_names

__all__ = [
    "INTERRUPTED_EXIT_CODE",
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpointError",
    "DistillationConfig",
    "DivergedError",
    "EarlyExitConfig",
    "EvalResult",
    "ExperimentConfig",
    "OptimizerConfig",
    "StepOptions",
    "TrainConfig",
    "TrainProgram",
    "TrainResult",
    "TrainState",
    "WorkdirLockedError",
    "checkpoint_directory",
    "committed_steps",
    "create_state",
    "evaluate",
    "learning_rate_schedule",
    "load_model",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "save_model",
    "train",
]

if TYPE_CHECKING:
    from fusedkv_jax.training.checkpointing.checkpoints import (
        Checkpoints,
        checkpoint_directory,
        load_model,
        save_model,
    )
    from fusedkv_jax.training.checkpointing.directory import committed_steps
    from fusedkv_jax.training.checkpointing.lock import WorkdirLockedError
    from fusedkv_jax.training.checkpointing.manifest import CheckpointError, DamagedCheckpointError
    from fusedkv_jax.training.config import ExperimentConfig, TrainConfig
    from fusedkv_jax.training.distillation_config import DistillationConfig
    from fusedkv_jax.training.divergence import DivergedError
    from fusedkv_jax.training.early_exit_config import EarlyExitConfig
    from fusedkv_jax.training.evaluation import EvalResult, evaluate, make_eval_step
    from fusedkv_jax.training.interrupts import INTERRUPTED_EXIT_CODE
    from fusedkv_jax.training.loop import TrainResult, train
    from fusedkv_jax.training.optimizer import learning_rate_schedule, make_optimizer
    from fusedkv_jax.training.optimizer_config import OptimizerConfig
    from fusedkv_jax.training.program import TrainProgram
    from fusedkv_jax.training.state import TrainState, create_state
    from fusedkv_jax.training.step import StepOptions, make_train_step
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        __all__,
        {
            "checkpointing.checkpoints": [
                "Checkpoints",
                "checkpoint_directory",
                "load_model",
                "save_model",
            ],
            "checkpointing.directory": ["committed_steps"],
            "checkpointing.lock": ["WorkdirLockedError"],
            "checkpointing.manifest": ["CheckpointError", "DamagedCheckpointError"],
            "config": ["ExperimentConfig", "TrainConfig"],
            "distillation_config": ["DistillationConfig"],
            "divergence": ["DivergedError"],
            "early_exit_config": ["EarlyExitConfig"],
            "evaluation": ["EvalResult", "evaluate", "make_eval_step"],
            "interrupts": ["INTERRUPTED_EXIT_CODE"],
            "loop": ["TrainResult", "train"],
            "optimizer": ["learning_rate_schedule", "make_optimizer"],
            "optimizer_config": ["OptimizerConfig"],
            "program": ["TrainProgram"],
            "state": ["TrainState", "create_state"],
            "step": ["StepOptions", "make_train_step"],
        },
    )
