"""The models of one generator replica, by name: the base, and deltas over it that come and go while it answers.

Deltas stand in the base's engine and share its batches, whatever their technique. Those that train the base's own
weights cannot, and have an engine each. Knows no Ray and no HTTP.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.assets import model_folder
from app.config import GeneratorConfig
from app.data.prompts import PacosTemplate, Template, template_from_json
from app.data.tokenization import Tokenizer, load_tokenizer
from app.engine.deltas import DeltasFull, needs_own_model
from app.engine.engine import Engine, EngineSettings
from app.engine.front import EngineFront
from app.errors import UserError
from app.methods.delta import Delta, check_base, fold_delta, read_delta
from app.models.checkpoints import load_decoder, read_provenance, weights_hash
from app.models.decoder import Decoder
from app.models.precision import compute_dtype, resolve_precision
from app.serving.messages import ModelInfo
from app.serving.registered_deltas import delta_folder, follows_alias, production, version_before, version_now
from app.serving.served_model import ServedModel
from app.tracking.registry import NotRegistered

logger = logging.getLogger("ray.serve")

_BATCHES_PER_S = 120.0
"""Of events, of all an engine's requests together. Each goes through four processes, which costs more than the token in
it; so the more requests there are, the more tokens go into one."""
_GRACE_S = 5.0
"""A model that was replaced is kept for so long, for requests that have found it and not reached its engine yet."""


class ModelLibrary:
    def __init__(self, config: GeneratorConfig, *, name: str) -> None:
        """Load the base as `name`, and each delta of the settings as `name:DELTA`.

        Raises:
            UserError: a folder is missing or damaged, or a delta is not registered, or of another base or tokenizer,
                or all of them together are larger than `max_delta_bytes`.
        """
        self.name = name
        self._config = config
        self._folder = model_folder(config.model)
        self._tokenizer = load_tokenizer(self._folder)
        self._token_bytes = self._tokenizer.token_bytes()
        self._fingerprint = self._tokenizer.fingerprint()
        self._base_hash = weights_hash(self._folder)
        base = load_decoder(self._folder)
        _check_vocabulary(base, self._tokenizer, config)
        self._front = self._engine(base, name)
        template = template_of(read_provenance(self._folder))
        self._models = {name: self._served(name, self._front, template, self._base_hash, base.max_length)}
        self._references = dict(config.deltas)
        """By the delta's name, what it is loaded from; an alias is looked up again and again."""
        self._versions: dict[str, str] = {}
        """By the delta's name, what its reference meant when it was loaded."""
        self._told: dict[str, str] = {}
        """By the delta's name, why it stays what it is: told once, not at every look."""
        self._unknown_until: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        """Why a registered delta could not be loaded, until it is tried again."""
        self._loading = threading.Lock()
        try:
            for delta_name, reference in config.deltas.items():
                self._load_first(delta_name, reference)
        except DeltasFull as error:
            self.shutdown()
            raise UserError(f"generator.max_delta_bytes={config.max_delta_bytes}: {error}; raise it") from None
        except BaseException:
            self.shutdown()
            raise

    @property
    def models(self) -> dict[str, ServedModel]:
        """Those that are loaded, by full name."""
        return dict(self._models)

    def get(self, full_name: str) -> ServedModel | None:
        return self._models.get(full_name)

    def find(self, full_name: str) -> ServedModel | None:
        """The same, and a registered delta that nobody has asked for yet is loaded. Blocks while it does.

        Raises:
            UserError: the registered delta does not fit the base, or is not what was registered.
            DeltasFull: deltas that are in use leave no room for it.
        """
        delta_name = full_name.removeprefix(f"{self.name}:")
        if full_name in self._models or delta_name == full_name or not self._config.load_registered:
            return self._models.get(full_name)
        with self._loading:
            if full_name not in self._models and time.monotonic() >= self._unknown_until.get(delta_name, 0):
                self._load_registered(delta_name)
            if failed := self._failed.get(delta_name):
                raise UserError(failed)
        return self._models.get(full_name)

    def load_again(self, model: ServedModel) -> None:
        """Put a delta back that had to make room for others.

        Raises:
            UserError, DeltasFull: as `find`.
        """
        delta_name = model.info.name.removeprefix(f"{self.name}:")
        with self._loading:
            self._load(delta_name, self._versions[delta_name], pin=delta_name in self._config.deltas)

    def follow_aliases(self) -> None:
        """Load what each alias means now, and answer with it from then on; requests that run end as they began.

        One that cannot be loaded is told in the log, and the old one stays.
        """
        for delta_name, reference in list(self._references.items()):
            if not follows_alias(reference):
                continue
            try:
                version = version_now(reference, self._config.tracking)
                if version != self._versions.get(delta_name):
                    with self._loading:
                        self._load(delta_name, version, pin=delta_name in self._config.deltas)
                    logger.info(f"{self.name}:{delta_name} is {version} now")
            except (UserError, DeltasFull) as error:
                self._tell(delta_name, str(error))
            except Exception:  # whatever a store or a damaged file raises: what is loaded still answers
                logger.exception(f"{self.name}:{delta_name} stays {self._versions.get(delta_name)}")

    @property
    def has_aliases(self) -> bool:
        return self._config.load_registered or any(map(follows_alias, self._references.values()))

    @property
    def fronts(self) -> dict[str, EngineFront]:
        """The engines, by the name of the first model on each."""
        fronts: dict[int, tuple[str, EngineFront]] = {}
        for name, model in self.models.items():
            fronts.setdefault(id(model.front), (name, model.front))
        return dict(fronts.values())

    def shutdown(self) -> None:
        for front in self.fronts.values():
            front.shutdown()

    def _tell(self, delta_name: str, reason: str) -> None:
        if self._told.get(delta_name) != reason:
            self._told[delta_name] = reason
            logger.error(f"{self.name}:{delta_name} stays {self._versions.get(delta_name)}: {reason}")

    def _load_first(self, delta_name: str, reference: str) -> None:
        """A replica that starts while an alias means something broken answers as its neighbours do, which stayed with
        what it meant before."""
        version = version_now(reference, self._config.tracking)
        try:
            self._load(delta_name, version, pin=True)
        except UserError as error:
            before = version_before(reference, self._config.tracking)
            if before is None or before == version:
                raise
            logger.error(f"{self.name}:{delta_name} is {before}, which was promoted before {version}: {error}")
            self._load(delta_name, before, pin=True)

    def _load_registered(self, delta_name: str) -> None:
        """What cannot be had is not asked for again within `refresh_s`: a store that is away takes its time to tell."""
        reference = production(delta_name)
        self._failed.pop(delta_name, None)
        try:
            version = version_now(reference, self._config.tracking) if reference else None
            if reference is not None and version is not None:
                self._load(delta_name, version, pin=False)
                self._references[delta_name] = reference
                return
        except NotRegistered:
            pass
        except UserError as error:
            self._failed[delta_name] = str(error)
        if len(self._unknown_until) > 1000:  # whoever guesses names
            self._unknown_until.clear()
            self._failed.clear()
        self._unknown_until[delta_name] = time.monotonic() + self._config.refresh_s

    def _load(self, delta_name: str, version: str, *, pin: bool) -> None:
        """Have `NAME:delta_name` answer with the delta that `version` is, a folder or a registered version."""
        full_name = f"{self.name}:{delta_name}"
        folder = delta_folder(version, self._config.tracking)
        delta = read_delta(folder)
        check_base(delta, str(folder), base_hash=self._base_hash, tokenizer_hash=self._fingerprint)
        template, weights = template_of(delta.metadata), self._base_hash + delta.hash
        if needs_own_model(delta):
            if delta_name not in self._config.deltas:
                raise UserError(
                    f"{full_name} trains weights of the base itself, so it takes a model and a cache of its own; list "
                    "it in generator.deltas"
                )
            model = with_delta(self._folder, delta)
            front = self._engine(model, full_name)
            served = self._served(full_name, front, template, weights, model.max_length)
        else:
            variant = self._front.load_delta(delta, pin=pin)
            room = self._models[self.name].info.context_length - variant.prefix_length
            served = self._served(full_name, self._front, template, weights, room, delta=variant.hash)
        replaced = self._models.get(full_name)
        self._models[full_name] = served
        self._versions[delta_name] = version
        self._told.pop(delta_name, None)
        if replaced is not None:
            self._retire(replaced)

    def _retire(self, model: ServedModel) -> None:
        if model.front is not self._front:
            threading.Thread(target=_shutdown_when_idle, args=(model.front,), daemon=True).start()
        elif model.delta is not None and not any(other.delta == model.delta for other in self._models.values()):
            self._front.unpin_delta(model.delta)

    def _engine(self, model: Decoder, name: str) -> EngineFront:
        config = self._config
        settings = EngineSettings(
            max_batch_size=config.max_batch_size,
            max_queue=config.max_queue,
            max_kv_bytes=config.max_kv_bytes,
            prefault_kv=config.prefault_kv,
            kv_dtype=config.kv_dtype,
            max_delta_bytes=config.max_delta_bytes,
            max_extra_blocks=config.max_extra_blocks,
        )
        device = torch.device(config.device)
        model = model.requires_grad_(False).eval().to(device, compute_dtype(config.precision, device))
        # a model's vocabulary may be filled up to a round number, with tokens that have no text
        padded = [*self._token_bytes, *[b""] * (model.config.vocab_size - len(self._token_bytes))]
        engine = Engine(model, settings, token_bytes=padded)
        return EngineFront(engine, name=f"engine {name}", batches_per_s=_BATCHES_PER_S)

    def _served(
        self,
        full_name: str,
        front: EngineFront,
        template: Template,
        weights: str,
        context_length: int,
        *,
        delta: str | None = None,
    ) -> ServedModel:
        precision = resolve_precision(self._config.precision, torch.device(self._config.device))
        parts = [weights, self._fingerprint, precision, self._config.kv_dtype, json.dumps(template.to_json())]
        model_hash = hashlib.sha256(":".join(parts).encode()).hexdigest()
        info = ModelInfo(full_name, model_hash, context_length, template.to_json())
        return ServedModel(info, front, self._tokenizer, self._token_bytes, template, delta=delta)


def template_of(metadata: dict[str, Any]) -> Template:
    """The one that a model says it was tuned with."""
    stored = metadata.get("template")
    return template_from_json(stored) if stored else PacosTemplate()


def with_delta(folder: Path, delta: Delta) -> Decoder:
    """The model in `folder` with `delta` folded into it."""
    model = load_decoder(folder)  # in fp32, whatever is served: merging rounds only once
    fold_delta(model, delta)
    return model.requires_grad_(False).eval()


def _check_vocabulary(model: Decoder, tokenizer: Tokenizer, config: GeneratorConfig) -> None:
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"model={config.model!r}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; their files do not belong together"
        )


def _shutdown_when_idle(front: EngineFront, *, sleep: Callable[[float], None] = time.sleep) -> None:
    sleep(_GRACE_S)
    while front.stats().running or front.stats().waiting:
        sleep(1.0)
    front.shutdown()
