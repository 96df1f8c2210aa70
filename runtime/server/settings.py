"""How a server is to behave, as a value. Knows no model."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, option


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``keys`` empty: anyone may ask. ``queue`` is how many calls may wait beside those that are
    computed. ``timeout_s`` bounds a whole answer, ``grace_s`` how long a stop waits for those in
    progress. ``origins`` are of pages of others that may ask from a browser. ``hosts`` are the
    names it answers to, None: any. ``log`` is what is told of each call: nothing but failures, a
    line, or what was sent as well. ``ui`` holds another page than ours."""

    keys: Sequence[str] = ()
    queue: int = 256
    timeout_s: float = 3600.0
    grace_s: float = 10.0
    keep_alive_s: float = 15.0
    most_body_bytes: int = 32 << 20
    most_file_bytes: int = 200 << 20
    most_file_bytes_kept: int = 1 << 30
    body_timeout_s: float = 60.0
    origins: Sequence[str] = ()
    hosts: frozenset[str] | None = None
    log: str = "failures"  # or calls, bodies
    ui: Path | None = None
    require_model: bool = True

    def owner(self, key: str | None) -> str | None:
        """Whose key it is, as a name that gives nothing away; None: nobody's. Takes as long for
        any key."""
        if not self.keys:
            return ""
        digest = _digest(key or "")
        found = [hmac.compare_digest(digest, _digest(known)) for known in self.keys]
        return digest.hex()[:16] if any(found) and key else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read_keys(file: Path) -> list[str]:
    """A key per line; empty lines and those that begin with # are none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the keys in {file} ({error})") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise UserError(f"there is no key in {file}: write one on a line of its own")
    return keys


def hosts_of(host: str, keys: Sequence[str], insecure: bool) -> frozenset[str] | None:
    """The names that a server on ``host`` answers to. UserError for an address that others reach
    and nobody needs a key for."""
    if keys or insecure:
        return None
    if not _is_loopback(host):
        raise UserError(
            f"anyone who reaches {host} could use this server: give {option('api_key')}, or "
            f"{option('insecure')} if that is meant"
        )
    return frozenset({host.lower(), "localhost", "127.0.0.1", "::1"})


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
