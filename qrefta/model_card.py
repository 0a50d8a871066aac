"""The model card: how a model was prepared, in the words and fields that the page of a model
shows.
"""

from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from qrefta.choices import AUTO_BITS, FITTED, MIXED_TYPES, QuantType
from qrefta.config.settings import Settings
from qrefta.files.whole_file import replace_text
from qrefta.hf_config import QReftaConfig

NAME = "README.md"
_OF_TEMPLATE = "This model card has been automatically generated."  # in the cards of transformers

_USE = """```python
import qrefta

model = qrefta.load("this-folder")
```

`import qrefta` lets `from_pretrained` of transformers load it too."""


def write_card(
    folder: Path,
    config: QReftaConfig,
    did: str = "",
    use: str = _USE,
    library: str = "transformers",
) -> None:
    """Write README.md into the folder of a prepared, trained or exported model; keep an existing
    file.

    Args:
        folder: of the model.
        config: of the prepared model.
        did: sentences about later steps, such as training or merging.
        use: how to load the folder, Markdown.
        library: that loads the folder, by its name on the hub.
    """
    if not (folder / NAME).exists():
        replace_text(folder / NAME, model_card(config, did, use, library))


def replace_template(folder: Path, config: QReftaConfig) -> None:
    """Write README.md in place of a card that transformers made from its template; keep its tags
    and any other card.

    Args:
        folder: with a README.md.
        config: of the prepared model.
    """
    found = ModelCard.load(folder / NAME)
    if _OF_TEMPLATE not in found.text:
        return
    card = ModelCard(model_card(config))
    ours, theirs = card.data.get("tags") or [], found.data.get("tags") or []
    card.data["tags"] = [*ours, *(tag for tag in theirs if tag not in ours)]
    card.save(folder / NAME)


def model_card(
    config: QReftaConfig, did: str = "", use: str = _USE, library: str = "transformers"
) -> str:
    """The card as Markdown, with a header that model hubs read: base model, licence, errors.

    A base model in a folder is called by the folder's name, and is not in the header: hubs refuse a
    base model that is no repository.
    """
    settings = config.settings
    data = ModelCardData(
        base_model=_repository(config.base_model),
        license=base_license(config.base_model),
        library_name=library,
        tags=[
            "qrefta",
            settings.method,
            *_formats(config),
        ],
    )
    source = config.base_model or "a model that was not named"
    if _repository(source) is None:
        source = Path(source).name
    licence = data.license or "see the page of the base model; it covers these weights too"
    return "\n\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {Path(source).name}, prepared with qrefta",
            f"The linear layers in the blocks of {source} are stored as {_format(config)}"
            f"{_factors(settings)} {did}".rstrip(),
            f"Licence of the base model: {licence}.",
            "Squared quantization error, of the residual and of unsplit weights that are rounded "
            "plainly"
            + (", and of the outputs on the calibration text:" if config.calibrated else ":"),
            error_table(config),
            "## Use",
            use,
            "",
        ]
    )


def _repository(source: str | None) -> str | None:
    """The name of a repository on a hub; None for a folder, a file or no name."""
    if source is None or Path(source).exists():
        return None
    try:
        validate_repo_id(source)
    except ValueError:
        return None
    return source


def _factors(settings: Settings) -> str:
    """The trainable factors beside the weights, as the end of a sentence."""
    if settings.method in FITTED:
        return (
            f", without the part that {settings.method} keeps in trainable factors, which all "
            "layers of a role share."
        )
    return (
        f". The layers of a role share trainable factors (method {settings.method}), which add "
        "nothing to the weights before training."
    )


def _format(config: QReftaConfig) -> str:
    """The format of the weights and how they were rounded, in words."""
    settings = config.settings
    if settings.bits == 16:
        return "16 bits"
    formats = _formats(config)
    words = ", ".join(map(str.upper, formats))
    if settings.bits == AUTO_BITS:
        words += f" by stack, for at most {settings.target_bits:g} bits a weight,"
    words += f" in blocks of {settings.block_size}"
    if settings.double_quant:
        words += ", scales in 8 bits"
    searched = [one for one in formats if settings.of_stack(one).searches_scales(config.calibrated)]
    if searched:
        words += ", scales searched"
    if 0 < len(searched) < len(formats):
        words += f" for {', '.join(map(str.upper, searched))}"
    if config.calibrated and settings.may_feed_back:
        words += ", rounded with error feedback"
    if settings.rounding == "sequential":
        words += " layer after layer"
    return words


def _formats(config: QReftaConfig) -> list[QuantType]:
    """The formats of the weights, fewer bits first; none with 16 bits."""
    settings = config.settings
    if settings.bits == AUTO_BITS:
        of_stacks = {row.quant_type for row in config.stacks}
        return [kind for kind in MIXED_TYPES if kind in of_stacks]
    return [] if settings.bits == 16 or settings.quant_type is None else [settings.quant_type]


def error_table(config: QReftaConfig) -> str:
    """One row a stack, Markdown."""
    measured = any(row.output_ratio is not None for row in config.stacks)
    names = ["stack", "shape", "rank", "unsplit weights", "residual", "ratio"]
    names += ["ratio of outputs"] if measured else []
    names += ["bits per weight"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in config.stacks:
        shape = "x".join(map(str, [row.stack.layers, *row.stack.shape[1:]]))
        cells = [row.stack.name.replace("*", "&#42;"), shape, str(row.rank)]
        cells += [f"{row.baseline_error:.4g}", f"{row.residual_error:.4g}", f"{row.ratio:.3f}"]
        cells += [f"{row.output_ratio:.3f}"] if row.output_ratio is not None else []
        cells += [f"{row.bits_per_weight:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def base_license(source: str | None) -> str | None:
    """The licence that the card of a model names, in its folder or the hub's cache; None
    without.
    """
    if source is None:
        return None
    file = Path(source) / NAME
    if not file.is_file():
        with suppress(ValueError):  # no name that a hub takes
            cached = try_to_load_from_cache(source, NAME)
            file = Path(cached) if isinstance(cached, str) else file
    with suppress(ValueError, OSError):
        return ModelCard.load(file).data.to_dict().get("license")
    return None
