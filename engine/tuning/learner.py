"""The training loop: transformers' Trainer, with our batches, our loss and our look at the held-out rows.

Why the Trainer: its checkpoints hold optimiser, schedule, data order and random state, so that a killed run goes on as if
nothing had happened; it has accumulation, schedules, precisions and TensorBoard. TRL's SFTTrainer
was measured 40 % slower on a CPU (3.6 against 2.6 s a step), and its loss on assistant turns refuses chat templates without
generation marks, such as this project's demo base. A loop of our own would be as fast, and need all of the above written again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from engine.tuning.base_model import losses, precision, takes
from engine.tuning.batches import Batch, packed, padded
from engine.tuning.encoding import IGNORED, Example
from engine.tuning.heldout import Score, score
from engine.tuning.recipe import Recipe

_LOOKS = 4  # at the held-out rows, unless the recipe says how often
_DIVERGED = 3.0  # times the loss that it began with
_WINDOW = 10


def arguments(recipe: Recipe, folder: Path, steps: int) -> TrainingArguments:
    """The recipe in the Trainer's words."""
    train = recipe.train
    gpu = torch.cuda.is_available()
    dtype = precision(train.precision)
    every = min(train.evaluate_every or math.ceil(steps / _LOOKS), steps)
    paged = train.optimizer == "paged_adamw_8bit" or (train.optimizer == "auto" and recipe.method == "qlora" and gpu)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule,
        warmup_steps=min(train.warmup_steps, steps - 1),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="paged_adamw_8bit" if paged else "adamw_torch",
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=not gpu,
        bf16=gpu and dtype == torch.bfloat16,
        fp16=gpu and dtype == torch.float16,
        gradient_checkpointing=False,  # the base has it on already, where it is wanted
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # how often in a row it was no better, for stopping early
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
    )


class Learner(Trainer):
    """Trains an adapter on examples, and scores it on those held out."""

    control: Any

    def __init__(self, model: Any, args: TrainingArguments, train: Sequence[Example], held_out: Sequence[Example],
                 *, packing: bool, pad: int, end: int, callbacks: list[TrainerCallback]) -> None:  # fmt: skip
        collate: Callable[[Sequence[Example]], Batch] = packed if packing else lambda rows: padded(rows, pad)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # what it prints we tell ourselves
        self.model_accepts_loss_kwargs = True  # we divide by the labels of the whole step, accumulation included
        self._loss_shifts_labels = False
        self._held_out, self._pad, self._end = held_out, pad, end
        self.tokens_seen = 0
        self.latest: Score | None = None

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy of the labelled tokens, summed over the batch and divided by the step's labels."""
        self.tokens_seen += inputs["input_ids"].numel()
        logits, loss = losses(model, inputs)
        count = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] >= 0).sum()
        loss = loss / count
        return (loss, logits) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out rows; the loss decides which checkpoint is the best."""
        self.latest = score(self.model, self._held_out, self._pad, self._end)
        metrics = {"eval_loss": self.latest.loss, "eval_exact": self.latest.accuracy}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Watch(TrainerCallback):
    """Tells `tell` about each step, and stops a run that has diverged."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float, float]] = []
        self.diverged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on from a checkpoint remembers the steps before it."""
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        looks = [entry for entry in state.log_history if "eval_loss" in entry]
        self.held_out = [(entry["step"], entry["eval_loss"], entry["eval_exact"]) for entry in looks]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Pass a step, or a look at the held-out rows, on."""
        if logs is None:
            return
        if "loss" in logs:
            self.losses.append(logs["loss"])
            rate, norm = logs.get("learning_rate", 0.0), logs.get("grad_norm", 0.0)
            self._tell({"event": "step", "step": state.global_step, "steps": state.max_steps, "loss": logs["loss"],
                        "learning_rate": rate, "grad_norm": norm})  # fmt: skip
            if diverged(self.losses):
                self.diverged = True
                control.should_training_stop = True
                control.should_save = control.should_evaluate = False
        elif "eval_loss" in logs:
            self.held_out.append((state.global_step, logs["eval_loss"], logs["eval_exact"]))
            self._tell({"event": "held_out", "step": state.global_step, "loss": logs["eval_loss"],
                        "exact": logs["eval_exact"]})  # fmt: skip


def diverged(values: Sequence[float]) -> bool:
    """Whether the loss is no number, or ten steps in a row stay far above where they began."""
    if not math.isfinite(values[-1]):
        return True
    if len(values) < 2 * _WINDOW:
        return False
    return min(values[-_WINDOW:]) > _DIVERGED * max(values[0], 1.0)


def early_stop(patience: int) -> TrainerCallback:
    """Stops after so many looks without a better held-out loss."""
    return EarlyStoppingCallback(early_stopping_patience=patience)


def ended(checkpoint: Path, steps: int, patience: int) -> TrainerState | None:
    """The state of a checkpoint behind which there is no step left: all are done, or patience had run out."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopper = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
    waited = stopper.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state if state.global_step >= steps or waited >= patience else None


def packing_is_sound(model: Any, examples: Sequence[Example], pad: int) -> bool:
    """Whether rows end to end give the losses that they give alone; some architectures mix neighbours."""
    if not takes(model, "position_ids"):
        return False
    pair = sorted(examples, key=lambda example: len(example.ids))[:2]
    if len(pair) < 2:
        return True
    first, second = pair
    silent = replace(first, labels=[IGNORED] * len(first.ids))
    changed = replace(silent, ids=[token - 1 if token else 1 for token in first.ids])
    batches = (packed(pair), padded(pair, pad), packed([silent, second]), packed([changed, second]))
    training = model.training
    model.eval()
    with torch.no_grad():
        together, apart, after_one, after_another = (
            float(losses(model, {name: tensor.to(model.device) for name, tensor in batch.items()})[1])
            for batch in batches
        )
    model.train(training)
    alike = math.isclose(together, apart, rel_tol=1e-4 if model.dtype == torch.float32 else 3e-2)
    # In 16 bits a little of a neighbour would pass for rounding; two neighbours of one length are computed alike.
    return alike and math.isclose(after_one, after_another, rel_tol=1e-4)
