"""What --lora-preload and --lora-warm name, brought to its tier before the server is ready. Called by the supervisor.

Those of --lora-paths and --lora-state are preloaded by the engine itself, before it tells that it is ready.
"""

import logging
from collections.abc import Collection

from engine.types import AdapterState, EngineError, ErrorCode
from gateway.errors import ApiError
from gateway.settings import Settings
from gateway.state import Engine, Gateway

log = logging.getLogger(__name__)


async def warm_up(gateway: Gateway, settings: Settings) -> None:
    """Raises EngineError, naming the flag, for an adapter that is not there or cannot be loaded."""
    for flag, names in (("--lora-preload", settings.lora_preload), ("--lora-warm", settings.lora_warm)):
        for name in names:
            try:
                await _bring(gateway, name, to_arena=flag == "--lora-warm")
            except (ApiError, EngineError) as error:
                code = error.code if isinstance(error, EngineError) else ErrorCode.ADAPTER_NOT_FOUND
                raise EngineError(code, f"{flag} {name}: {error.message}") from error
    await _tell_of_lost(gateway.client, settings.lora_warm)


async def try_to_warm_up(gateway: Gateway, settings: Settings) -> None:
    """The same for an engine that is started again: what fails keeps nobody waiting."""
    try:
        await warm_up(gateway, settings)
    except EngineError as error:
        log.error("%s", error.message)


async def _bring(gateway: Gateway, name: str, *, to_arena: bool) -> None:
    client = gateway.client
    if name not in client.adapters:
        await gateway.registry.resolve(name)
    adapter = client.adapters[name]
    if adapter.state in (AdapterState.COLD, AdapterState.FAILED):
        adapter = await client.load_adapter(name, adapter.source, revision=adapter.revision, inplace=True)
    if to_arena and not adapter.pinned:  # pinning returns when it is there
        await client.pin_adapter(name, True)
        await client.pin_adapter(name, False)


async def _tell_of_lost(client: Engine, names: Collection[str]) -> None:
    """They are copied one after the other, and the arena may hold fewer than were named."""
    tiers = {adapter.name: adapter.tier for adapter in (await client.stats()).adapters} if names else {}
    if lost := [name for name in names if tiers.get(name) != "arena"]:
        log.warning("--lora-warm: the arena has no room for all of them; %s left it again", ", ".join(lost))
