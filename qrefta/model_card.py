"""The model card: what was done to a model, in the words and fields that a model's page shows."""

from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from qrefta.files.safetensors import replace_text
from qrefta.hf_config import QReftaConfig

NAME = "README.md"

_USE = """```python
import qrefta

model = qrefta.load("this-folder")
```

`import qrefta` lets `from_pretrained` of transformers load it too."""


def write_card(folder: Path, config: QReftaConfig, did: str = "", use: str = _USE) -> None:
    """Write README.md into a folder of a prepared model, or of what was made of one; one that is there is kept.

    Args:
        folder: where the model was written.
        config: of the prepared model.
        did: sentences on what was done beyond preparing it: training, merging.
        use: how the folder is loaded, Markdown.
    """
    if not (folder / NAME).exists():
        replace_text(folder / NAME, model_card(config, did, use))


def model_card(config: QReftaConfig, did: str = "", use: str = _USE) -> str:
    """The card as Markdown with a header that model hubs read: base model, its licence, what was done, error table."""
    data = ModelCardData(
        base_model=config.base_model,
        license=base_license(config.base_model),
        library_name="transformers",
        tags=["qrefta", config.method, *([config.quant_type] if config.bits == 4 else [])],
    )
    source = config.base_model or "a model that was not named"
    stored = (
        f"{config.quant_type.upper()} in blocks of {config.block_size}"
        if config.bits == 4
        else "16 bits"
    )
    if config.bits == 4 and config.double_quant:
        stored += ", scales in 8 bits"
    licence = data.license or "see its own page; it holds for these weights too"
    return "\n\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {Path(source).name}, prepared with qrefta",
            f"The linears of the blocks of {source} are stored as {stored}, less what {config.method} keeps in "
            f"trainable factors shared by all layers of a role. {did}".rstrip(),
            f"Licence of the base model: {licence}.",
            "Squared quantization error, of the residual and of whole weights:",
            error_table(config),
            "## Use",
            use,
            "",
        ]
    )


def error_table(config: QReftaConfig) -> str:
    """One row a stack, Markdown."""
    lines = [
        "| stack | shape | rank | whole weights | residual | ratio | bits a weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in config.stacks:
        shape = "x".join(map(str, [row.layers, *row.shape]))
        lines.append(
            f"| {row.stack.replace('*', '&#42;')} | {shape} | {row.rank} | {row.baseline_error:.4g} | "
            f"{row.residual_error:.4g} | {row.ratio:.3f} | {row.bits_per_weight:.2f} |"
        )
    return "\n".join(lines)


def base_license(source: str | None) -> str | None:
    """The licence that a model's own card names, in its folder or the hub's cache; None where there is none."""
    if source is None:
        return None
    file = Path(source) / NAME
    if not file.is_file():
        with suppress(ValueError):  # no name that a hub takes
            cached = try_to_load_from_cache(source, NAME)
            file = Path(cached) if isinstance(cached, str) else file
    with suppress(ValueError, OSError):
        return ModelCard.load(file).data.license
    return None
