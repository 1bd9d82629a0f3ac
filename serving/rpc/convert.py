"""Conversion between protobuf messages and Python values, for the server and the clients. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chameleon_jax.outputs import Logprob
from chameleon_jax.sampling_params import SamplingParams, StructuredOutputsParams
from chameleon_jax.serving.rpc import chameleon_v1_pb2 as messages

FINISH_REASONS = {
    None: messages.FINISH_REASON_UNSPECIFIED,
    "stop": messages.FINISH_REASON_STOP,
    "length": messages.FINISH_REASON_LENGTH,
    "abort": messages.FINISH_REASON_ABORT,
}
FINISH_REASON_NAMES = {value: name for name, value in FINISH_REASONS.items()}

_OPTIONAL = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed"),
    *("max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "skip_special_tokens"),
)
_IF_ANY = ("logit_bias", "allowed_token_ids")
"""Fields whose empty value counts as left out."""
_ALWAYS = ("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos")


def sampling_to_message(params: SamplingParams) -> messages.SamplingParams:
    """Convert sampling parameters. Raises ValueError for a seed outside of signed 64 bits."""
    given = {name: getattr(params, name) for name in (*_OPTIONAL, *_IF_ANY) if getattr(params, name) is not None}
    if params.structured_outputs is not None:
        language = {name: value for name, value in vars(params.structured_outputs).items() if value is not None}
        given["structured_outputs"] = messages.StructuredOutputs(**language)
    always = {name: getattr(params, name) for name in _ALWAYS}
    return messages.SamplingParams(**given, **always)


def sampling_from_message(message: messages.SamplingParams, defaults: Mapping[str, Any]) -> SamplingParams:
    """Convert sampling parameters of a request. Raises ValueError, naming the field.

    Args:
        message: The request's parameters.
        defaults: Values of the fields that the message leaves out.
    """
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    given |= {name: getattr(message, name) for name in _IF_ANY if getattr(message, name)}
    if message.HasField("structured_outputs"):
        given["structured_outputs"] = _language(message.structured_outputs)
    always = {name: getattr(message, name) for name in _ALWAYS}
    return SamplingParams(**{**defaults, **given}, **always)


def _language(message: messages.StructuredOutputs) -> StructuredOutputsParams:
    optional = ("json", "regex", "grammar", "whitespace_pattern")
    given = {name: getattr(message, name) for name in optional if message.HasField(name)}
    return StructuredOutputsParams(**given, choice=message.choice or None, json_object=message.json_object or None)


def logprobs_to_messages(positions: Sequence[Mapping[int, Logprob]] | None) -> list[messages.TokenLogprobs]:
    return [
        messages.TokenLogprobs(
            alternatives=[
                messages.Alternative(
                    token_id=token, logprob=p.logprob, text=p.decoded_token or "", token_bytes=p.token_bytes or b""
                )
                for token, p in position.items()
            ]
        )
        for position in positions or ()
    ]


def logprobs_from_messages(positions: Sequence[messages.TokenLogprobs]) -> list[dict[int, Logprob]] | None:
    """Convert logprobs of an answer. None if it has none, as they were not requested."""
    if not positions:
        return None
    return [{a.token_id: Logprob(a.logprob, a.text, a.token_bytes) for a in position.alternatives} for position in positions]


def stop_reason_to_message(reason: str | int | None) -> messages.StopReason | None:
    if reason is None:
        return None
    return messages.StopReason(text=reason) if isinstance(reason, str) else messages.StopReason(token_id=reason)


def stop_reason_from_message(message: messages.StopReason) -> str | int | None:
    field = message.WhichOneof("reason")
    return None if field is None else getattr(message, field)
