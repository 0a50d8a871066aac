"""Options of `qrefta finetune`, in the groups of its help: data, training, memory, and while it
runs. The options that prepare a dense model are in `qrefta.cli.options`.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qrefta.choices import LoadDtype
from qrefta.choices import Loss as LossName
from qrefta.choices import Task as TaskName
from qrefta.cli.calibrating import KINDS
from qrefta.cli.options import CHECKPOINTING

_data = partial(typer.Option, rich_help_panel="Data")
_training = partial(typer.Option, rich_help_panel="Training")
_memory = partial(typer.Option, rich_help_panel="Memory")
_run = partial(typer.Option, rich_help_panel="While it runs")

Model = Annotated[
    str,
    typer.Argument(help="Hub name, folder or .gguf file: dense (is prepared first), or prepared."),
]
Dataset = Annotated[
    str, typer.Argument(help="Hub name, folder or file (csv, tsv, json, jsonl, parquet; lm: txt).")
]
Out = Annotated[Path, typer.Argument(help="Folder for checkpoints and the trained model.")]
Calibration = Annotated[
    str, typer.Option(help=f"Text to calibrate on: data (rows of the training data), {KINDS}.")
]
Task = Annotated[
    TaskName,
    typer.Option(
        help="Classes of text, language modelling, conversations, preferences (dpo: pairs of "
        "answers; grpo: prompts and a reward), or classes of images."
    ),
]

Mix = Annotated[
    list[str] | None,
    _data(
        help="SOURCE:WEIGHT of one more data set, where DATASET has the weight 1; repeat the "
        "option for more."
    ),
]
TextColumn = Annotated[
    list[str] | None, _data(help="For classify and lm: column with text; give two for pairs.")
]
LabelColumn = Annotated[str | None, _data(help="For classify: column with classes.")]
Header = Annotated[
    list[str] | None, _data(help="For classify: column names, in order, of a file without header.")
]
MaxLength = Annotated[
    int | None,
    _data(
        help="Rows are cut to this many tokens; default: 128, or the model's positions if it has "
        "fewer."
    ),
]
Packing = Annotated[bool, _data(help="For sft: put several conversations into a sequence.")]
PaddingFree = Annotated[
    bool | None,
    _data(
        help="For sft: join the conversations of a batch instead of padding; default: where it is "
        "right and faster."
    ),
]
Loss = Annotated[LossName, _data(help="For sft: learn all turns of the assistant, or the last.")]

LearningRate = Annotated[
    str, _training(help="Peak learning rate; auto: the best measured one for the method.")
]
Epochs = Annotated[float, _training(help="Passes over the training data.")]
MaxSteps = Annotated[int, _training(help="Optimizer steps; if positive, used instead of --epochs.")]
BatchSize = Annotated[int, _training(help="Rows a forward and backward pass.")]
Reward = Annotated[
    list[str] | None,
    _training(help="For grpo: FILE.py:FUNCTION; repeat the option for a sum of rewards."),
]
Beta = Annotated[
    float | None,
    _training(help="For dpo and grpo: weight of staying near the model at the start."),
]
NumGenerations = Annotated[
    int | None, _training(help="For grpo: answers to each prompt; default: 8.")
]
Optimizer = Annotated[
    str, _training(help="An optimizer of transformers' Trainer, such as adamw_8bit.")
]
GradientAccumulation = Annotated[
    int, _training(help="Forward and backward passes an optimizer step.")
]

GradientCheckpointing = Annotated[
    str,
    _memory(
        metavar=CHECKPOINTING,
        help="Recompute activations: less memory, more time; selective: all but the results of "
        "attention.",
    ),
]
Dtype = Annotated[
    LoadDtype,
    _memory(
        help="Dtype of a language model, in memory and in OUT; auto: as it is stored, but float32 "
        "on a processor that computes bfloat16 slowly."
    ),
]
Bf16 = Annotated[bool, _memory(help="Compute in bf16 under autocast.")]
Fsdp = Annotated[bool, _memory(help="Shard the model over torchrun's processes, by FSDP2.")]

ReportTo = Annotated[
    list[str] | None,
    _run(help="Logging integration of Trainer; repeat the option for more."),
]
EvalSteps = Annotated[
    float | None, _run(help="Evaluate every so many steps, or share of the run below 1.")
]
EarlyStopping = Annotated[
    int | None,
    _run(help="Stop after so many evaluations without a lower test loss; keep the best model."),
]
Resume = Annotated[bool, _run(help="Go on from the last checkpoint in OUT.")]
