"""How much of a model is kept: perplexity, and KL divergence to a reference, on texts."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.config.checks import whole
from qrefta.measure.divergence import (
    TokenStatistics,
    compare_logits,
    mean_over_tokens,
    perplexity,
    token_losses,
)
from qrefta.measure.sources import load_causal_model, load_tokenizer, source_name
from qrefta.measure.texts import cut_windows, read_text
from qrefta.model.modes import eval_mode


@dataclass(frozen=True)
class TextComparison:
    """A model on a text, compared with a reference. Without a reference its entries are None.

    Standard errors take windows as the unit of sampling; they are None for a single window.

    Attributes:
        model: name of the model.
        reference: name of the reference model.
        text: name of the text's file and of its folder, such as "wikitext2/test.txt".
        window: tokens of a full window.
        windows: number of windows.
        tokens: number of tokens that were predicted.
        perplexity: exp of the model's mean loss.
        perplexity_stderr: its standard error.
        reference_perplexity: of the reference.
        reference_perplexity_stderr: its standard error.
        kl_mean: mean KL(reference || model) of the next-token distributions, in nats.
        kl_stderr: standard error of the mean.
        kl_median: half of the tokens have at most this divergence.
        kl_99: 99 % of the tokens have at most this divergence.
        kl_999: 99.9 % of the tokens have at most this divergence.
        agreement: share of tokens for which both models' most probable token is the same.
        flips: share of tokens for which exactly one model's most probable token is the true one.
    """

    model: str
    reference: str | None
    text: str
    window: int
    windows: int
    tokens: int
    perplexity: float
    perplexity_stderr: float | None
    reference_perplexity: float | None = None
    reference_perplexity_stderr: float | None = None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    kl_999: float | None = None
    agreement: float | None = None
    flips: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, for a table or a JSON file."""
        return asdict(self)

    def to_text(self) -> dict[str, str]:
        """The measures as a reader sees them, by their names in a table."""
        shown = {
            "tokens": f"{self.tokens:,}",
            "windows": f"{self.windows:,}",
            "perplexity": _with_stderr(self.perplexity, self.perplexity_stderr),
        }
        if self.reference is None:
            return shown
        return shown | {
            "reference's perplexity": _with_stderr(
                self.reference_perplexity, self.reference_perplexity_stderr
            ),
            "KL divergence, mean": _with_stderr(self.kl_mean, self.kl_stderr),
            "KL, median": f"{self.kl_median:.3g}",
            "KL, 99 %": f"{self.kl_99:.3g}",
            "KL, 99.9 %": f"{self.kl_999:.3g}",
            "same top-1 token": f"{self.agreement:.1%}",
            "flips": f"{self.flips:.1%}",
        }


def compare(
    model: PreTrainedModel | str | Path,
    reference: PreTrainedModel | str | Path | None,
    texts: str | Path | Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int = 512,
    limit: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
    progress: bool = True,
) -> list[TextComparison]:
    """How much of `reference` the model keeps: perplexity, KL divergence and top-1 agreement.

    Each text is cut into windows without overlap, and each window is predicted by both models. The
    KL divergence is KL(reference || model) of the distributions of the next token, over the whole
    vocabulary.

    Both models are in memory. Beyond them and a forward pass of one window, the peak is the logits
    of a window of both, 2 x window x vocabulary numbers, and a few float32 copies of 64 rows of
    them. For 512 tokens, 128,000 words and float32 it is about 0.7 GB. Of the text, five numbers a
    token are kept.

    Both models must have the same vocabulary. Heads of different size are refused, even if the
    larger one is only padded: leaving rows out would change its distribution.

    Args:
        model: a causal language model: an object, which may be prepared, trained or in
            bitsandbytes' 4 bits; a folder or hub name; or a `.gguf` file.
        reference: the model to compare with, in the same forms; None: perplexity only.
        texts: one or several text files, in UTF-8, UTF-16 or UTF-32.
        tokenizer: of both models; default: the reference's, else the model's.
        window: tokens of a window; models with fewer positions lower it.
        limit: windows of each text; default: all.
        device: of models given by name, such as "cuda:1"; default: the GPU, on a machine without
            one the CPU. Objects stay where they are, also on two different devices.
        trust_remote_code: whether to run code that comes with models given by name.
        dtype: of models given by name; "auto": as each is stored.
        progress: show a progress bar.

    Returns:
        One entry a text, in order.

    Raises:
        ValueError: if `window` or `limit` is no whole number, a model is not a causal language
            model, the vocabularies differ, no tokenizer is found, a text is missing or has fewer
            than 2 tokens, or logits are not finite.
        ImportError: for a GGUF file, if the package gguf is not installed.
    """
    window = whole("window", window, 2)
    if limit is not None:
        limit = whole("limit", limit, 1)
    files = [texts] if isinstance(texts, str | Path) else list(texts)
    if not files:
        raise ValueError("no text is given; give at least one text file")
    contents = [read_text(file) for file in files]
    tokenizer = tokenizer or _shared_tokenizer(model, reference, trust_remote_code)
    model_name = source_name(model)
    reference_name = None if reference is None else source_name(reference)
    models = [load_causal_model(model, device, trust_remote_code, dtype)]
    if reference is not None:
        models.append(load_causal_model(reference, device, trust_remote_code, dtype))
        _check_vocabularies(*models)
    length = min([window, *_positions(models)])
    comparisons = []
    for text in contents:
        windows = cut_windows(text, tokenizer, length, limit)
        _check_tokens(windows, models)
        bar = tqdm(windows, desc=text.file, unit="window", disable=not progress)
        comparisons.append(
            TextComparison(
                model=model_name,
                reference=reference_name,
                text=text.file,
                window=length,
                windows=len(windows),
                tokens=sum(len(window) - 1 for window in windows),
                **_measure(models, bar),
            )
        )
    return comparisons


def _shared_tokenizer(
    model: PreTrainedModel | str | Path,
    reference: PreTrainedModel | str | Path | None,
    trust_remote_code: bool,
) -> PreTrainedTokenizerBase:
    """The reference's tokenizer, or else the model's; if both have one, they must agree."""
    sources = [model] if reference is None else [reference, model]
    found = []
    for source in sources:
        tokenizer = load_tokenizer(source, trust_remote_code)
        if tokenizer is not None:
            found.append((source_name(source), tokenizer))
    if not found:
        names = " or ".join(source_name(source) for source in sources)
        raise ValueError(f"There is no tokenizer in {names}; give one as `tokenizer`.")
    if len(found) == 2:
        _check_tokenizers(*found)
    return found[0][1]


def _check_tokenizers(
    first: tuple[str, PreTrainedTokenizerBase], second: tuple[str, PreTrainedTokenizerBase]
) -> None:
    """Refuse two tokenizers, with their names, that give a token different numbers."""
    name, tokenizer = first
    other_name, other_tokenizer = second
    numbers = tokenizer.get_vocab()
    others = other_tokenizer.get_vocab()
    for token in sorted(numbers.keys() & others.keys()):
        if numbers[token] != others[token]:
            raise ValueError(
                f"The vocabularies differ: token {token!r} is number {numbers[token]} in {name} "
                f"and {others[token]} in {other_name}; only models of one vocabulary compare."
            )


def _check_vocabularies(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Refuse two heads of different size."""
    size = _text_config(model).vocab_size
    reference_size = _text_config(reference).vocab_size
    if size != reference_size:
        raise ValueError(
            f"The model's vocabulary has {size} tokens and the reference's {reference_size}; only "
            "models of one vocabulary compare. If one is padded, call resize_token_embeddings."
        )


def _check_tokens(windows: Sequence[Tensor], models: Sequence[PreTrainedModel]) -> None:
    """Refuse a tokenizer whose tokens a model does not have."""
    largest = max(int(window.max()) for window in windows)
    size = _text_config(models[0]).vocab_size
    if largest >= size:
        raise ValueError(
            f"The tokenizer gives token number {largest}, and the model's vocabulary has {size} "
            "tokens; give the model's tokenizer as `tokenizer`."
        )


def _positions(models: Sequence[PreTrainedModel]) -> list[int]:
    """The models' largest numbers of tokens, where their configs name one."""
    numbers = [getattr(_text_config(model), "max_position_embeddings", None) for model in models]
    return [number for number in numbers if number is not None]


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _measure(models: Sequence[PreTrainedModel], windows: Iterable[Tensor]) -> dict[str, Any]:
    """The measured entries of a `TextComparison`, for a model and, if given, its reference."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
        if len(models) == 1:
            return _perplexity_entries(_model_losses(models[0], windows))
        return _comparison_entries(_statistics(models[0], models[1], windows))


def _model_losses(model: PreTrainedModel, windows: Iterable[Tensor]) -> list[Tensor]:
    """The losses of the tokens, one tensor a window."""
    losses = []
    for window in windows:
        losses.append(token_losses(_logits(model, window), window[1:]))
        _check_finite("The loss of the model", losses[-1])
    return losses


def _statistics(
    model: PreTrainedModel, reference: PreTrainedModel, windows: Iterable[Tensor]
) -> list[TokenStatistics]:
    """The statistics of the tokens, window by window."""
    measured = []
    for window in windows:
        compared = compare_logits(_logits(model, window), _logits(reference, window), window[1:])
        _check_finite("The loss of the model", compared.loss)
        _check_finite("The loss of the reference", compared.reference_loss)
        _check_finite("The KL divergence", compared.divergence)
        measured.append(compared)
    return measured


@torch.no_grad()
def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """The logits that predict all tokens of a window but the first, (tokens - 1, vocabulary)."""
    inputs = window[None].to(model.device)
    return model(input_ids=inputs, use_cache=False).logits[0, :-1]


def _with_stderr(value: float | None, stderr: float | None) -> str:
    """Four digits of a value, and two of its standard error if it has one."""
    if stderr is None:
        return f"{value:.4g}"
    return f"{value:.4g} ± {float(f'{stderr:.2g}'):g}"  # 160, not 1.6e+02


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(
            f"{name} is infinite or not a number for {int((~values.isfinite()).sum())} of "
            f"{len(values)} tokens of a window; the logits of a model are not finite."
        )


def _perplexity_entries(losses: Sequence[Tensor]) -> dict[str, Any]:
    """The entries of a `TextComparison` without a reference."""
    estimate = perplexity(losses)
    return {"perplexity": estimate.mean, "perplexity_stderr": estimate.stderr}


def _comparison_entries(windows: Sequence[TokenStatistics]) -> dict[str, Any]:
    """All measured entries of a `TextComparison`."""
    reference = perplexity([window.reference_loss for window in windows])
    divergence = mean_over_tokens([window.divergence for window in windows])
    divergences = torch.cat([window.divergence for window in windows]).numpy()
    median, most, nearly_all = np.quantile(divergences, [0.5, 0.99, 0.999])
    return {
        **_perplexity_entries([window.loss for window in windows]),
        "reference_perplexity": reference.mean,
        "reference_perplexity_stderr": reference.stderr,
        "kl_mean": divergence.mean,
        "kl_stderr": divergence.stderr,
        "kl_median": float(median),
        "kl_99": float(most),
        "kl_999": float(nearly_all),
        "agreement": mean_over_tokens([window.agreement for window in windows]).mean,
        "flips": mean_over_tokens([window.flip for window in windows]).mean,
    }
