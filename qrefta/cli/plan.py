"""qrefta plan."""

from typing import Annotated, Any

import typer

from qrefta.choices import Dtype, Optimizer
from qrefta.cli.console import console, quiet_libraries
from qrefta.cli.options import (
    CHECKPOINTING,
    TrustRemoteCode,
    parse_checkpointing,
    with_settings,
)


@with_settings
def plan(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder of a dense model; its config.json is enough.")
    ],
    batch: Annotated[int, typer.Option(help="Sequences, or images, a pass.")] = 1,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence; not for images.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 24GB.")] = None,
    reserve: Annotated[
        str, typer.Option(help="Part of it that is not counted: CUDA itself, fragments.")
    ] = "1GB",
    *,
    settings: dict[str, Any],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the parts that stay dense; default: the model's.")
    ] = None,
    gradient_checkpointing: Annotated[
        str,
        typer.Option(
            metavar=CHECKPOINTING,
            help="Recompute activations; selective: all but the results of attention.",
        ),
    ] = "off",
    whole_logits: Annotated[
        bool, typer.Option(help="Count the logits of all tokens: for dpo, grpo and other trainers.")
    ] = False,
    optimizer: Annotated[Optimizer, typer.Option(help="AdamW in 32 or 8 bits.")] = "adamw",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Count the memory of a training step from the config alone; suggest changes if needed."""
    quiet_libraries(data=False)
    from qrefta.memory.plan import plan as plan_memory
    from qrefta.tables import plan_table, size_text

    memory = plan_memory(
        model,
        batch=batch,
        seq=seq,
        gpu=gpu,
        reserve=reserve,
        dtype=dtype,
        optimizer=optimizer,
        gradient_checkpointing=parse_checkpointing(gradient_checkpointing),
        whole_logits=whole_logits,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    console.print(plan_table(memory))
    if memory.available_bytes is None:
        return
    largest = [_largest("batch", memory.largest_batch or 0)]
    if memory.largest_rank is not None:
        largest.append(_largest("rank", memory.largest_rank))
    verdict = "It fits" if memory.fits else "It does not fit"
    console.print(
        f"{verdict} in {size_text(memory.available_bytes)}; with all other settings as given: "
        f"{', '.join(largest)}."
    )
    worth = memory.total_bytes / 100
    for saving in (found for found in memory.savings if found.saved_bytes >= worth):
        console.print(f"  {saving.change} would save {size_text(saving.saved_bytes)}")


def _largest(name: str, number: int) -> str:
    return f"largest {name} {number:,}" if number else f"no {name} fits"
