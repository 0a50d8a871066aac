"""The training recipe on transformers.Trainer, for a prepared model or any other, and any of `qrefta.train.tasks`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import DatasetDict
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from qrefta.distributed import check_sharding, processes, whole_state
from qrefta.hf_quantizer import is_prepared, prepared_config, saved_state
from qrefta.model.verify import check_weights
from qrefta.model_card import write_card
from qrefta.nn.factors import BANK
from qrefta.train.checkpoints import (
    clear_unfinished,
    last_checkpoint,
    publish,
    whole_checkpoints,
    writing,
)
from qrefta.train.nan_guard import finite_steps
from qrefta.train.tasks import TASKS


class FinetuneResult(NamedTuple):
    """What a training run came to.

    Attributes:
        accuracy_before, accuracy_after: on the test split, 0 .. 1; None for tasks without classes.
        test_loss_before, test_loss: mean cross-entropy on the test split, before and after training, nats.
        train_loss: mean over the steps of this call and all processes, nats.
        steps: optimizer steps of the whole run.
        train_s: seconds in the training loop of this call.
        trained_parameters: numbers that train.
    """

    accuracy_before: float | None
    accuracy_after: float | None
    test_loss_before: float
    test_loss: float
    train_loss: float
    steps: int
    train_s: float
    trained_parameters: int


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor,
    dataset: DatasetDict | str | Path,
    output_dir: str | Path,
    *,
    task: str = "classify",
    learning_rate: float = 1e-3,
    epochs: float = 3.0,
    max_steps: int = -1,
    batch_size: int = 32,
    max_length: int = 128,
    packing: bool = False,
    warmup_steps: float = 0.1,
    weight_decay: float = 0.0,
    save_steps: float = 0.25,
    optimizer: str = "adamw_torch",
    gradient_accumulation: int = 1,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    fsdp: bool = False,
    seed: int = 0,
    report_to: str | list[str] = "none",
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    progress: bool = True,
) -> FinetuneResult:
    """Train a model and leave it, with its tokenizer and a model card, in `output_dir`; it is trained in place.

    Everything is transformers.Trainer's: optimizer, linear decay, checkpoints under `output_dir`, its progress bar and
    logging integrations. Works alike for a prepared model, a PEFT model or a plain one, so that they can be compared
    on the same data, order and steps. At the end the factors' masters are rounded to the values that the forward
    pass used all along.

    In several processes that torchrun started, each with the same arguments, a step sees `batch_size` rows a process,
    in the order of one process with all of them; the first process writes.

    Args:
        model: of the task's class; a classifier with as many labels as the data have classes.
        tokenizer: the model's; for images its image processor.
        dataset: what the task's loader reads (`qrefta.train.data.load_classification`, `qrefta.train.tasks.load_text`, `load_chat`,
            `load_images`), or the `DatasetDict` that it returns.
        output_dir: for checkpoints and the trained model; without checkpoints of another run.
        task: classify (text), lm (running text), sft (conversations, by TRL's SFTTrainer) or image (classes of images).
        learning_rate: peak, of all trained numbers.
        epochs, max_steps: length of the run; `max_steps`, if positive, wins.
        batch_size: rows a forward and backward pass, in every process.
        max_length: tokens a row is cut to; for lm the tokens of a block.
        packing: for sft, fill sequences with several conversations. Only with flash attention do they not see each
            other.
        warmup_steps: steps, or below 1 the share of the run, in which the learning rate rises from 0; the first of them
            moves nothing.
        weight_decay: AdamW's; 0 by default, since it would pull factors towards zero, away from the original weights.
        save_steps: a checkpoint every so many steps, or below 1 every such share of the run.
        optimizer: any of Trainer's, `adamw_8bit` or `paged_adamw_8bit` for instance.
        gradient_accumulation: passes a step; a step sees `gradient_accumulation` x `batch_size` rows a process.
        gradient_checkpointing: recompute the blocks' activations in the backward pass and do not keep them.
        bf16: compute in bf16 under autocast. For a model that is loaded in float32; in a model loaded in bf16 the head
            trains in bf16 and loses small updates.
        fsdp: shard the model over the processes, one a GPU, by FSDP2; else each holds all of it (DDP).
        seed: of batch order and dropout.
        report_to: Trainer's logging integrations ("wandb", "tensorboard", ...).
        callbacks: Trainer's, called as training goes.
        resume: go on from the last checkpoint in `output_dir`; the model becomes that of an uninterrupted run.
        progress: show Trainer's progress bar.

    Raises:
        ValueError: for an unknown task, unusable data, a model whose labels do not fit them, nothing to resume, a
            damaged checkpoint to resume from, checkpoints of an earlier run that is not to be resumed, or processes
            that cannot share the model as is asked (see `qrefta.distributed`).
        FloatingPointError: if a loss or gradients are not finite; checkpoints from before are whole.
        OSError: if a checkpoint or the model cannot be written; what was there before is whole.
    """
    check_sharding()
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    load, make_recipe, *_ = TASKS[task]
    together = processes()
    with together.main_process_first():  # the others find its cache
        data = load(dataset, seed=seed) if isinstance(dataset, str | Path) else dataset
        recipe = make_recipe(model, tokenizer, data, max_length=max_length, packing=packing)
    if together.is_main_process:
        clear_unfinished(output_dir)
    checkpoint = last_checkpoint(output_dir)
    if resume and checkpoint is None:
        raise ValueError(f"There is no checkpoint to resume from in {output_dir}.")
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{output_dir} holds {checkpoint.name} of an earlier run, which could be taken for one of this run. Go on "
            "from it with resume=True, give another output_dir, or remove it."
        )
    arguments = recipe.arguments(
        **recipe.options,
        output_dir=str(output_dir),
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2 * batch_size,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        save_steps=save_steps,
        save_total_limit=2,
        logging_steps=0.25,
        eval_on_start=True,
        optim=optimizer,
        gradient_accumulation_steps=gradient_accumulation,
        bf16=bf16,
        gradient_checkpointing=False,  # switched on below, where its kind is certain
        ddp_find_unused_parameters=False
        if is_prepared(model)
        else None,  # all factors are used in every pass
        fsdp=fsdp or None,
        fsdp_config=fsdp2_config(model) if fsdp else None,
        use_cpu=not torch.accelerator.is_available(),  # else accelerate does not see torchrun's other processes
        seed=seed,
        report_to=report_to,
        disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = finite_steps(whole_checkpoints(recipe.trainer))(
        model=model,
        args=arguments,
        train_dataset=recipe.train,
        eval_dataset=recipe.test,
        data_collator=recipe.collate,
        compute_metrics=recipe.metrics,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if recipe.mean_loss:  # which Trainer does not know of models whose forward takes **kwargs
        trainer.model_accepts_loss_kwargs = False
    if fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp shards a model over GPUs, and there are none here; leave it out.")
    if resume and is_prepared(model):  # Trainer reads the weights past the plug-in
        check_weights(checkpoint)
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    evaluated = [
        row for row in trainer.state.log_history if "eval_loss" in row
    ]  # at step 0, and where a run went on
    before = evaluated[0]
    round_masters(model)
    after = trainer.evaluate()
    state = whole_state(model)
    if arguments.should_save:
        with writing(Path(output_dir), "the model") as folder:
            with saved_state(model, state):
                model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            if is_prepared(model):
                did = f"It was fine-tuned ({task}, {outcome.global_step} steps, test loss {after['eval_loss']:.4f})."
                write_card(folder, prepared_config(model), did)
            publish(folder, Path(output_dir))
    return FinetuneResult(
        accuracy_before=before.get("eval_accuracy"),
        accuracy_after=after.get("eval_accuracy"),
        test_loss_before=before["eval_loss"],
        test_loss=after["eval_loss"],
        train_loss=fmean(gather_object([outcome.training_loss])),
        steps=outcome.global_step,
        train_s=outcome.metrics["train_runtime"] - evaluated[-1]["eval_runtime"],
        trained_parameters=count_trained(model),
    )


def fsdp2_config(model: PreTrainedModel) -> dict[str, Any]:
    """Trainer's `fsdp_config` to shard a model block by block; every process writes its own part of a checkpoint.

    A prepared model's blocks are named, since what BERT's class names itself holds its embeddings, on which accelerate
    1.15 fails.
    """
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    if not is_prepared(model):
        return config
    blocks = set()
    for row in prepared_config(model).stacks:
        depth = row.stack.name.split(".").index("*") + 1
        blocks |= {
            type(model.get_submodule(".".join(path.split(".")[:depth]))).__name__
            for path in row.stack.modules
        }
    return config | {"transformer_layer_cls_to_wrap": sorted(blocks)}


def count_trained(model: nn.Module) -> int:
    """Numbers of a model that train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def round_masters(model: nn.Module) -> None:
    """Round every factor's float32 master to the value that the forward pass sees; no-op on other models."""
    if isinstance(model, FSDPModule):
        model.reshard()  # what is rounded are the shards, not their gathered copy
    for factors in getattr(model, BANK, {}).values():
        factors.round_masters()
