"""A conversation in the terminal, or over a pipe with one message a line."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.cli.options import console
from chameleon_jax.serving.llm import LLM
from chameleon_jax.serving.prompts import tokens_of

COMMANDS = "/adapter NAME, /adapter, /exit, /reset"


class Chat:
    """A conversation with its history. Answers go to stdout as their tokens come, notes to stderr.

    Args:
        llm: The model and its adapters.
        params: Sampling parameters; max_tokens is cut to the room behind the conversation.
        adapter: Adapter that answers; None is the base model.
    """

    def __init__(self, llm: LLM, params: SamplingParams, adapter: str | None = None):
        self._llm = llm
        self._params = params
        self._adapter = adapter
        self._messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Answer messages until /exit or the end of the input."""
        for line in map(str.strip, _lines(sys.stdin.isatty())):
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return
            try:
                if line.startswith("/"):
                    self._obey(command, argument.strip())
                elif line:
                    self._answer(line)
            except (ValueError, KeyError) as error:
                console.print(f"error: {error.args[0]}", soft_wrap=True)

    def _obey(self, command: str, argument: str) -> None:
        if command == "/reset":
            self._messages.clear()
            console.print("the conversation is forgotten")
        elif command == "/adapter":
            names = self._llm.list_loras()
            if argument and argument not in names:
                raise ValueError(
                    f"adapter is {argument!r}; allowed: {', '.join(names) or 'none, as --lora-modules names none'}"
                )
            self._adapter = argument or None
            console.print(f"answers come from {self._adapter or 'the base model'}")
        else:
            raise ValueError(f"command is {command!r}; allowed: {COMMANDS}")

    def _answer(self, text: str) -> None:
        """Print the answer to a message, and add both to the history. Control-C cuts it short.

        Raises:
            ValueError: The conversation no longer fits, or the template refuses it. The message is not in the history then.
        """
        request = self._submit([*self._messages, {"role": "user", "content": text}])
        loop, shown = self._llm.engine.loop, 0
        with _interrupted() as interrupted:
            while request.finish_reason is None:
                if interrupted.is_set():
                    loop.abort(request.request_id)
                else:
                    loop.step()
                answer = OutputSnapshot.of(request).text
                print(answer[shown:], end="", flush=True)
                shown = len(answer)
        print()
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": request.text}]

    def _submit(self, messages: list[dict[str, str]]) -> Request:
        tokenizer, engine = self._llm.get_tokenizer(), self._llm.engine
        token_ids = tokens_of(tokenizer.apply_chat_template(messages), tokenizer, add_special_tokens=False)
        if len(token_ids) >= engine.max_model_len:
            raise ValueError(
                f"the conversation has {len(token_ids)} tokens, and max_model_len is {engine.max_model_len}; /reset forgets it"
            )
        lora = None if self._adapter is None else LoRARequest(self._adapter)
        return engine.submit(token_ids, self._params.fit(len(token_ids), engine.max_model_len), lora)


def _lines(is_terminal: bool) -> Iterator[str]:
    if not is_terminal:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lines of `input` can then be edited)
    console.print(f"commands: {COMMANDS}; control-C ends an answer, control-D the conversation")
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


@contextlib.contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Set the event on control-C instead of raising KeyboardInterrupt, which could leave a step half planned."""
    event = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
