"""Who is asked on the way: judges, attackers, translators; what they said is kept in the run directory by content."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from leeway.generation.api_settings import ApiSettings
from leeway.generation.backend import Backend
from leeway.generation.kept import Kept, KeptBackend
from leeway.generation.local import LocalBackend, weights_hash
from leeway.generation.openai_api import OpenAIBackend
from leeway.hashing import digest
from leeway.judges.coherence import Improbable
from leeway.model.load import Dtype, load_model
from leeway.model.perplexity import Perplexity
from leeway.study.eval_parts import Speaker
from leeway.study.spec import Spec


@dataclass(frozen=True)
class Voices:
    """Backends for the speakers of a study; without a file nothing is kept, as in a plan, which asks nobody."""

    kept: Path | None = None
    device: str = "auto"

    def of(self, speaker: Speaker) -> Backend:
        """A model behind an endpoint or of this machine's, loaded and reached once it is asked."""
        backend = self._endpoint(speaker) if speaker.endpoint else self._local(speaker)
        return backend if self.kept is None else KeptBackend(backend, Kept(self.kept))

    def _local(self, speaker: Speaker) -> Backend:
        return LocalBackend(speaker.model, speaker.revision, device=self.device)

    @staticmethod
    def _endpoint(speaker: Speaker) -> Backend:
        return OpenAIBackend(
            ApiSettings(
                model=speaker.model,
                base_url=speaker.endpoint or "",
                key_env=speaker.key_env,
                concurrency=speaker.concurrency,
                timeout_s=speaker.timeout_s,
                retries=speaker.retries,
                max_calls=speaker.max_calls,
                max_dollars=speaker.max_dollars,
                price_in=speaker.price_in,
                price_out=speaker.price_out,
            )
        )

    def surprise(self, spec: Spec) -> Improbable:
        """The base model's surprise at an answer."""
        return _Surprise(spec.model, spec.revision, spec.weights, spec.device)


def limit_of(speaker: Speaker, own: int) -> int:
    """The limit of each of its replies: as the study has it, else `own`, of whoever asks."""
    return own if speaker.max_new_tokens is None else speaker.max_new_tokens


@dataclass
class _Surprise:
    """The base model as a reader of answers, loaded when it is first asked."""

    name: str
    revision: str | None
    dtype: Dtype
    device: str

    @cached_property
    def identity(self) -> str:
        return digest("perplexity", weights_hash(self.name, self.revision), self.dtype)

    def shares(self, prompts: Seq[str], texts: Seq[str]) -> list[float]:
        return self._model.shares(prompts, texts)

    @cached_property
    def _model(self) -> Perplexity:
        return Perplexity(load_model(self.name, revision=self.revision, dtype=self.dtype, device=self.device))
