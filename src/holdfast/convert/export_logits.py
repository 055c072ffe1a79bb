"""Compares the logits of an export with those of its source. transformers opens both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.catalog.hf_folder import CONFIG
from holdfast.errors import MismatchError, UsageError

NUM_TOKENS = 32
"""Number of random input tokens."""

EXACT = 1e-5
"""Largest difference between the logits of equal weights in float32, as a share of the largest
logit. The difference may exceed 0, since the order of sums may differ."""

ROUNDED, DIVERGENCE_MAX = 0.1, 0.01
"""Largest difference, and largest KL divergence per token, if weights were rounded to another
dtype. A small divergence alone proves nothing: it is also small between two unrelated models whose
predictions are almost uniform."""


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """Difference between the logits of two folders."""

    difference: float
    """Largest difference, as a share of the largest logit."""

    divergence: float
    """Mean KL divergence per token."""

    @property
    def good(self) -> bool:
        """Whether rounding alone can explain the difference."""
        is_rounded = self.difference <= ROUNDED and self.divergence <= DIVERGENCE_MAX
        return self.difference <= EXACT or is_rounded


def compare_logits(folder: str, source: str) -> LogitsReport:
    """Compare the logits of the models in two local folders. Both run in float32 on the same random
    tokens.

    Raises:
        UsageError: transformers is not installed.
        MismatchError: transformers cannot open a folder, or finds missing or unexpected tensors;
            the shapes of the logits differ; or the model needs other inputs than tokens.
    """
    first, second = _logits(folder), _logits(source)
    if first.shape != second.shape:
        raise MismatchError(
            f"the logits of `{folder}` have shape {list(first.shape)}, those of `{source}` "
            f"{list(second.shape)}"
        )
    scale = second.abs().max().clamp(min=1e-30)
    odds, wanted = first.log_softmax(-1), second.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - odds)).sum(-1).mean()
    return LogitsReport(float((first - second).abs().max() / scale), float(divergence))


def _logits(folder: str) -> Tensor:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"logits need transformers, which cannot be imported: {error}",
            hint="pip install transformers",
        ) from error
    config = json.loads((Path(folder) / CONFIG).read_bytes())
    name = next(iter(config.get("architectures") or ()), "")
    kind: Any = getattr(transformers, str(name), transformers.AutoModelForCausalLM)
    try:
        model, info = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise MismatchError(f"transformers does not open `{folder}`: {reason[0]}") from error
    wrong = [
        f"{key.replace('_', ' ')}: {', '.join(sorted(map(str, info[key]))[:5])}"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    ]
    if wrong:
        raise MismatchError(f"transformers opens `{folder}` with {'; '.join(wrong)}")
    words = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, words, (1, NUM_TOKENS), generator=generator)
    with torch.no_grad():
        try:
            logits: Tensor = model.eval()(input_ids=tokens).logits
        except (AttributeError, ValueError, RuntimeError, TypeError) as error:
            raise MismatchError(f"`{folder}` gives no logits for tokens alone: {error}") from error
    return logits[0].float()
