"""Bytes to typed bodies and back. What is wrong with a body becomes a BadRequest that names the field."""

from __future__ import annotations

import logging
import re
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from computron.errors import BadRequest, ComputronError, PayloadTooLarge

log = logging.getLogger(__name__)
T = TypeVar("T")

JSON = {"Content-Type": "application/json"}
_PLACE = re.compile(r"(.*) - at `(?:key in )?`?\$\.?([^`]*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


async def read_body(request: web.BaseRequest) -> bytes:
    """The whole body. Raises PayloadTooLarge."""
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise PayloadTooLarge(f"the body is larger than the {request._client_max_size} bytes that are taken") from error


async def read_json(request: web.BaseRequest, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type. Raises BadRequest, naming the field, and PayloadTooLarge."""
    body = await read_body(request)
    try:
        value = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except msgspec.DecodeError as error:
        what = f"the body is not valid JSON: {error}" if body else "the body is empty, but JSON is needed"
        raise BadRequest(what) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if log.isEnabledFor(logging.DEBUG):
        _log_unknown(body, value)
    return value


def _invalid(message: str) -> BadRequest:
    place = ""
    if match := _PLACE.fullmatch(message):
        message, place = match[1], match[2].replace("[...]", "")
    if missing := _MISSING.fullmatch(message):
        place = f"{place}.{missing[1]}" if place else missing[1]
        return BadRequest(f"`{place}` is required", param=place)
    if not place:
        return BadRequest(f"the body is wrong: {message}")
    return BadRequest(f"`{place}`: {message[:1].lower()}{message[1:]}", param=place)


def _log_unknown(body: bytes, value: Any) -> None:
    known = getattr(value, "__struct_fields__", None)
    if known is not None:
        unknown = sorted(set(msgspec.json.decode(body)) - set(known))
        if unknown:
            log.debug("ignored_fields fields=%s", ",".join(unknown))


def _encode_unknown(value: Any) -> Any:
    # numpy arrays and scalars, and torch tensors, which custom models may answer with
    tolist = getattr(value, "tolist", None)
    if tolist is None:
        raise NotImplementedError(f"{type(value).__name__} cannot be written as JSON")
    return tolist()


_encoder = msgspec.json.Encoder(enc_hook=_encode_unknown)
encode = _encoder.encode


def answer(value: Any, *, status: int = 200) -> web.Response:
    """`value` as a JSON response."""
    return web.Response(body=encode(value), status=status, headers=JSON)


def error_body(error: ComputronError) -> dict[str, dict[str, str | None]]:
    """OpenAI's shape."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
