"""Where a chat server is, and the key that opens it."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from stackllm.errors import UsageError
from stackllm.rating.refusal import without_key

KEY = "STACKLLM_API_KEY"
"""Environment variable of the API key; there is no other place for it."""

_ENDINGS = re.compile(
    r"(?:(?P<completions>/chat/completions)|/api/(?:chat|generate|tags|embed)|/completions|/responses|/models"
    r"|/embeddings|/messages|(?<=/v1)/chat)/*$",
    re.IGNORECASE,
)
"""Of addresses that are copied from a page about one endpoint, where the base of all is meant."""


def check_url(url: str, allow_http: bool) -> str:
    """The address of the chat completions below a base URL.

    Raises
    ------
    UsageError
        If it is no http(s) URL, carries a password, ends in an endpoint's own path, or would send texts
        and key unencrypted to another machine.
    """
    import httpx2

    whole = f"{url.rstrip('/')}/chat/completions"
    try:
        httpx2.URL(whole)
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except (ValueError, httpx2.InvalidURL):
        parts, host = urlsplit(""), None
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"[rater] url must not hold a password. Put the key into {KEY}.")
    odd = parts.query or parts.fragment or " " in url or not url.isprintable()
    if parts.scheme not in ("http", "https") or not host or odd:
        raise UsageError(  # without the address, which may hold a key
            '[rater] url must be such as "https://host/v1" or "http://127.0.0.1:8000/v1": with https or http, '
            f"and with no password, query or space. A key belongs into {KEY}."
        )
    if parts.scheme == "http" and not allow_http and not _is_loopback(host):
        raise UsageError(
            f"[rater] url would send texts and key to {host} unencrypted. "
            "Use https, or set [server] allow_http = true."
        )
    ending = _ENDINGS.search(url)
    if ending:
        base = url[: ending.start()].rstrip("/")
        told = base if ending["completions"] else nearest_base(base)
        raise UsageError(
            f'[rater] url must be the address below which all endpoints stand, without "{ending[0].rstrip("/")}": '
            f'set it to "{without_key(told, os.environ.get(KEY, "").strip())}".'
        )
    return whole


def nearest_base(url: str) -> str:
    """The base of an endpoint's address, with ``/v1`` where it names no version.

    Examples
    --------
    >>> nearest_base("http://localhost:1234/chat/completions"), nearest_base("https://host/v1beta/openai")
    ('http://localhost:1234/v1', 'https://host/v1beta/openai')
    """
    base = url.removesuffix("/chat/completions")
    return base if re.search(r"/v\d+\w*(/|$)", base) else f"{base}/v1"


def read_key() -> str:
    """The API key out of the environment; empty if there is none.

    Raises
    ------
    UsageError
        If it can't be part of a header. The message does not show it.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(f"{KEY} holds characters that no API key has. Set it again.")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
