"""One training run, step by step: load, prove that it can learn, learn, score, save."""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.errors import TrainingFailed
from engine.registry.fingerprint import read_base
from engine.tuning import advice
from engine.tuning.base_model import (
    attach,
    check_gradients,
    load_base,
    load_tokenizer,
    losses,
    pad_token,
    precision,
    weight_bytes,
)
from engine.tuning.batches import packed, padded
from engine.tuning.data import Split, duplicates, split_rows
from engine.tuning.encoding import Example, encode_rows
from engine.tuning.estimate import checkpointing, read_shape, target_names
from engine.tuning.heldout import Score, score
from engine.tuning.learner import Learner, Watch, arguments, early_stop, ended, packing_is_sound
from engine.tuning.run_folder import RunFolder, Spent, step_of

_LEARN_FASTER = "Use a smaller train.learning_rate (a third of it), or more train.warmup_steps."


class Session:
    """Everything that a run holds while it runs."""

    def __init__(self, folder: RunFolder, tell: Any) -> None:
        self.folder = folder
        self.tell = tell
        self.recipe = folder.recipe()
        self.base = Path(self.recipe.base)
        self.watch = Watch(self._step)
        self.split: Split
        self.examples: list[Example]
        self.held_out: list[Example]
        self.base_score: Score
        self.packing = self.recipe.data.packing
        self.clock = time.monotonic()
        self.before = self.spent = Spent()
        self.notes: list[str] = []

    def prepare(self) -> None:
        """Read the rows, load the base, put the adapter on it, and prove that gradients reach its first layer."""
        torch.manual_seed(self.recipe.train.seed)
        self._stage("reading the data")
        self.split = split_rows(self.recipe.data.train, self.recipe.data.held_out, self.recipe.train.seed)
        self.folder.check_origin(self._origin())
        self.tokenizer = load_tokenizer(self.base)
        self._pad = pad_token(self.tokenizer)
        limit = self.recipe.data.max_length
        self.examples = encode_rows(self.split.train, self.tokenizer, limit, "training data")
        self.held_out = encode_rows(self.split.held_out, self.tokenizer, limit, "held-out data")
        self._stage("loading the base")
        quantization = self.recipe.quantization if self.recipe.method == "qlora" else None
        base = load_base(self.base, precision(self.recipe.train.precision), quantization)
        self.base_bytes = weight_bytes(base)
        targets = target_names(self.recipe, read_shape(self.base))
        self.model = attach(base, self.recipe, targets, checkpointing=checkpointing(self.recipe))
        self._check()

    def _origin(self) -> dict[str, str]:
        return {
            "the base": read_base(self.base).fingerprint,
            "the training data": self.split.train_digest,
            "the held-out data": self.split.held_out_digest,
        }

    def _check(self) -> None:
        self._stage("checking gradients")
        if self.packing and not packing_is_sound(self.model, self.examples, self._pad):
            self.packing = False
            self.notes.append("this model mixes rows that are packed, so they are padded instead")
        rows = self.examples[:2]
        batch = packed(rows) if self.packing else padded(rows, self._pad)
        self.model.train()
        check_gradients(self.model, losses(self.model, {k: v.to(self.model.device) for k, v in batch.items()})[1])
        self._stage("scoring the base")
        self.base_score = self._score()

    def learn(self) -> None:
        """Run the steps, from the last whole checkpoint if there is one."""
        steps = self.recipe.train.total_steps(len(self.examples))
        settings = arguments(self.recipe, self.folder.checkpoints, steps)
        callbacks = [self.watch, early_stop(self.recipe.train.patience), *self._tensorboard()]
        torch.manual_seed(self.recipe.train.seed)
        self.learner = Learner(self.model, settings, self.examples, self.held_out, packing=self.packing, pad=self._pad,
                               end=self.tokenizer.eos_token_id, callbacks=callbacks)  # fmt: skip
        checkpoint = self.folder.last_checkpoint()
        reached = step_of(checkpoint) if checkpoint else 0
        self.before = self.folder.go_back_to(reached)
        self.clock = time.monotonic()
        if checkpoint and (state := ended(checkpoint, steps, self.recipe.train.patience)):
            self.learner.state = state  # the Trainer would do a step more
            self.watch.on_train_begin(settings, state, None)
            self._take(state.best_model_checkpoint or str(checkpoint))
        else:
            self._stage(f"training from step {reached}" if checkpoint else "training")
            self.learner.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.spent = self._spent()
        self.steps_done = self.learner.state.global_step
        if self.watch.diverged:
            self._roll_back()

    def _roll_back(self) -> None:
        """After a divergence the best checkpoint is what is left; without one there is nothing."""
        best = self.learner.state.best_model_checkpoint
        if best is None or not math.isfinite(self.learner.state.best_metric or math.nan):
            problem = f"the loss diverged in step {self.steps_done}, before there was a checkpoint to go back to"
            raise TrainingFailed(problem, fix=_LEARN_FASTER)
        self._take(best)
        self.notes.append(
            f"the loss diverged in step {self.steps_done}: this is the best checkpoint before, {Path(best).name}"
        )

    def _take(self, checkpoint: str) -> None:
        """Put a checkpoint's adapter in the place of the one that is trained."""
        self.model.load_adapter(checkpoint, "best", is_trainable=True)
        state = {name: tensor for name, tensor in self.model.state_dict().items() if ".best." in name}
        self.model.load_state_dict({name.replace(".best.", ".default."): t for name, t in state.items()}, strict=False)
        self.model.delete_adapter("best")

    def finish(self) -> dict[str, Any]:
        """Round the adapter to what is served, score that, save it with its record.

        Raises TrainingFailed when the base has changed meanwhile.
        """
        self.folder.check_origin(self._origin())
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        self._stage("scoring the adapter")
        final = self._score()
        self._stage("saving")
        evidence = self._evidence(final)
        found = advice.advise(evidence)
        run = self._record(final, found)
        self._save(run)
        shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        return {"run": run, "advice": found, "notes": self.notes, "adapter": str(self.folder.adapter)}

    def _save(self, run: dict[str, Any]) -> None:
        target = self.folder.adapter
        shutil.rmtree(target, ignore_errors=True)
        self.model.peft_config["default"].base_model_name_or_path = self.base.resolve().name
        self.model.save_pretrained(str(target), save_embedding_layers=False)  # else it looks for the base on the Hub
        (target / "README.md").unlink(missing_ok=True)
        weights = target / "adapter_model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        (target / "run.json").write_text(json.dumps(run, indent=2) + "\n")

    def _record(self, final: Score, found: list[str]) -> dict[str, Any]:
        """The run in numbers, as the registry keeps it."""
        data = {
            "train": self.split.train_digest,
            "held_out": self.split.held_out_digest,
            "train_rows": len(self.examples),
            "held_out_rows": len(self.held_out),
        }
        base = {"name": self.base.resolve().name, "fingerprint": read_base(self.base).fingerprint,
                "precision": self.recipe.precision_name}  # fmt: skip
        return {
            "run_id": self.folder.run_id,
            "base": base,
            "recipe": self.folder.as_written(),
            "data": data,
            "steps": self.steps_done,
            "final_loss": round(final_loss(self.watch.losses), 4),
            "seconds": round(self.spent.seconds, 1),
            "tokens_per_second": round(self.spent.rate),
            "peak_bytes": peak_bytes(),
            "base_weight_bytes": self.base_bytes,
            "evaluation": {
                "metric": "exact match",
                "rows": final.rows,
                "adapter": round(final.accuracy, 4),
                "interval": [round(bound, 4) for bound in final.interval],
                "base": round(self.base_score.accuracy, 4),
                "base_begins_right": round(self.base_score.begin / self.base_score.rows, 4),
                "loss": round(final.loss, 4),
                "precision": self.recipe.precision_name,
            },
            "advice": found,
        }

    def _evidence(self, final: Score) -> advice.Evidence:
        lora = self.recipe.lora
        return advice.Evidence(
            rank=lora.rank,
            alpha=lora.scaled_by,
            rslora=lora.rslora,
            learning_rate=self.recipe.train.learning_rate,
            losses=tuple(self.watch.losses),
            held_out_losses=tuple(loss for _, loss, _ in self.watch.held_out),
            held_out_exact=final.accuracy,
            held_out_rows=final.rows,
            rows=len(self.examples),
            duplicates=duplicates(self.split.train),
            cut=sum(example.cut for example in self.examples),
            max_length=self.recipe.data.max_length,
            diverged=self.watch.diverged,
        )

    def _score(self) -> Score:
        return score(self.model, self.held_out, self._pad, self.tokenizer.eos_token_id)

    def _stage(self, text: str) -> None:
        self.tell({"event": "stage", "text": text})

    def _step(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            spent = self._spent()
            event |= {"seconds": spent.seconds, "tokens": spent.tokens, "tokens_per_second": spent.rate}
            event |= {"bytes": used_bytes()}
        self.folder.note(event)
        self.tell(event)

    def _spent(self) -> Spent:
        """What training has taken until now, before a kill too."""
        seconds = time.monotonic() - self.clock
        return Spent(self.before.seconds + seconds, self.before.tokens + self.learner.tokens_seen)

    def _tensorboard(self) -> list[Any]:
        from transformers.integrations import TensorBoardCallback

        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.notes.append("no TensorBoard events: pip install tensorboard")
            return []
        return [TensorBoardCallback(SummaryWriter(str(self.folder.path / "tensorboard")))]


def final_loss(values: list[float]) -> float:
    """The mean of the last ten steps' losses."""
    last = values[-10:]
    return sum(last) / len(last) if last else math.nan


def peak_bytes() -> int:
    """The most memory that the run has taken: the GPU's where it used one, else the process's."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def used_bytes() -> int:
    """The memory that the run takes now."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


logging.getLogger("transformers").setLevel(logging.WARNING)
