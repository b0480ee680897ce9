"""The official client's transport, with time-outs and streams.

Sessions and addresses, whatever is called through them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .extra import kaggle_extra

with kaggle_extra():
    import requests
    import urllib3
    from kagglesdk.kaggle_http_client import KaggleHttpClient

TIMEOUT = (15.0, 120.0)
"""Seconds to connect, and to wait for the next bytes of an answer."""


class Transport(KaggleHttpClient):
    """The official transport, with time-outs."""

    def _init_session(self) -> Any:
        fresh = self._session is None
        super()._init_session()
        if fresh:
            for prefix in ("http://", "https://"):
                self._session.mount(prefix, _WithTimeout())
        return self._session

    def call(self, *args: Any, **options: Any) -> Any:
        """One call of the API.

        Raises:
            requests.RequestException: there was no answer, it was a refusal, or it was not JSON.
        """
        try:
            return super().call(*args, **options)
        except json.JSONDecodeError as error:
            raise requests.exceptions.InvalidJSONError(str(error)) from error

    def get(self, route: str, ref: str) -> requests.Response:
        """A streamed GET below the API's address."""
        session = self._init_session()
        response = session.get(
            self._get_request_url(route, ref), stream=True, headers={"Accept": "text/event-stream, */*"}
        )
        if response.status_code >= 400:
            with response:
                response.raise_for_status()
        return response


def unless_silent(stream: Iterator[bytes]) -> Iterator[bytes]:
    """The same, with a `ReadTimeout` where requests calls a silence in the midst of an answer a lost connection."""
    try:
        yield from stream
    except requests.ConnectionError as error:
        if error.args and isinstance(error.args[0], urllib3.exceptions.ReadTimeoutError):
            raise requests.ReadTimeout(*error.args) from error
        raise


class _WithTimeout(requests.adapters.HTTPAdapter):
    def send(self, *args: Any, **options: Any) -> requests.Response:
        return super().send(*args, **{**options, "timeout": options.get("timeout") or TIMEOUT})
