"""Which model a name means: the base, or one of its adapters; and what /v1/models lists.

Names resolve exactly or not at all, so that a mistyped adapter is never served by the base.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from engine.types import AdapterInfo, AdapterState
from gateway.errors import bad_request, model_not_found
from gateway.lazy import Lazy
from gateway.state import Engine


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What serves a request."""

    id: str  # the served id: the base's name, or base:adapter
    base: str
    adapter: str | None = None  # bare name
    adapter_id: int | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of GET /v1/models. `root` is a name, never a path on the server."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "loramux"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class ModelRegistry:
    """Reads the engine's adapters afresh for each name, so that loads and unloads show at once."""

    def __init__(self, engine: Engine, lazy: Lazy | None = None) -> None:
        """`lazy` knows where adapters are that were not loaded yet."""
        self._engine = engine
        self._lazy = lazy

    async def resolve(self, model: str | None) -> ResolvedModel:
        """The base or the adapter that `model` names: a served id, base:adapter, or a bare adapter name.

        Raises:
            ApiError: 400 where no name is given, 404 `model_not_found` where nothing bears it, 503 where the hub
                that is to have it does not deliver.
        """
        name = self._adapter_name(model) if model and model != self.base else None
        if self._lazy is None or name is None:
            return self.find(model)
        known = self._engine.adapters.get(name)
        if known is None:
            adapter = await self._lazy.find(self._engine, name)
            return self.find(model) if adapter is None else self._resolved(adapter)
        if await self._lazy.has_left(self._engine, known):
            raise model_not_found(model or "")
        return self.find(model)

    def find(self, model: str | None) -> ResolvedModel:
        """`resolve` without waiting: for names that must be known already."""
        if not model:
            raise bad_request("'model' is required: name the base or one of its adapters.", param="model")
        base = self.base
        if model == base:
            return ResolvedModel(id=base, base=base)
        adapter = self._adapter(model)
        if adapter is None:
            raise model_not_found(model)
        return self._resolved(adapter)

    @property
    def base(self) -> str:
        """The base's served name."""
        return self._engine.model.served_name

    def cards(self) -> ModelList:
        """The base first, then the adapters in the order in which they were loaded."""
        return ModelList(data=list(self._cards()))

    def card(self, model: str) -> ModelCard:
        """The card of what `model` names, by any name that a request may use.

        Raises:
            ApiError: 404 `model_not_found`.
        """
        served_id = self.find(model).id
        return next(card for card in self._cards() if card.id == served_id)

    def _cards(self) -> Iterator[ModelCard]:
        info = self._engine.model
        yield ModelCard(
            id=info.served_name, created=info.created, root=info.served_name, max_model_len=info.max_model_len
        )
        for adapter in self._engine.adapters.values():
            if is_served(adapter):
                yield self._adapter_card(adapter)

    def _adapter_card(self, adapter: AdapterInfo) -> ModelCard:
        info = self._engine.model
        return ModelCard(
            id=f"{info.served_name}:{adapter.name}",
            created=int(adapter.created) or info.created,
            root=adapter.name,
            parent=info.served_name,
            max_model_len=info.max_model_len,
        )

    def _adapter_name(self, model: str) -> str | None:
        """The bare name in base:adapter or alone; None where another base is named."""
        base, colon, name = model.partition(":")
        if colon and base != self.base:
            return None
        return name if colon else model

    def _adapter(self, model: str) -> AdapterInfo | None:
        name = self._adapter_name(model)
        adapter = None if name is None else self._engine.adapters.get(name)
        return adapter if adapter is not None and is_served(adapter) else None

    def _resolved(self, adapter: AdapterInfo) -> ResolvedModel:
        base = self.base
        return ResolvedModel(
            id=f"{base}:{adapter.name}", base=base, adapter=adapter.name, adapter_id=adapter.adapter_id
        )


def is_served(adapter: AdapterInfo) -> bool:
    """Whether new requests may name it. A failed one may be named too: the engine answers with the reason."""
    return adapter.state is not AdapterState.DRAINING
