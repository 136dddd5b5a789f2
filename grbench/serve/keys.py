"""API keys of clients."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from grbench.serve.errors import RefusedError


def client_of(authorization: str, keys: Mapping[bytes, str] | None) -> str:
    """Return the name of the client whose key a call has; "": there is one client. Raises RefusedError.

    authorization: the header. Each key is compared in a time that does not depend on where it differs.
    """
    if keys is None:
        return ""
    given = authorization.removeprefix("Bearer ").encode()
    found = [name for key, name in keys.items() if hmac.compare_digest(given, key)]
    if not found:
        raise RefusedError(401, "authorization: allowed is `Bearer KEY` with a key of serve.api_key_file")
    return found[0]
