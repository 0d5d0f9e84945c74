"""Why a load failed, as those may read it who do not run the server. Called where failures are kept."""


def public_reason(reason: str, source: str) -> str:
    """The reason without the source, which may be a folder of the server."""
    return reason.replace(source, "its source") if "/" in source else reason
