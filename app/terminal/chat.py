"""`headwater chat`: a conversation in the terminal over /v1/chat/completions.

`Conversation` owns the messages and the settings; it holds whole turns only: a question is kept with what
was read of its answer, and dropped where nothing was. Ctrl-C stops an answer, never the program.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO, Any

from app.terminal.show import printable
from app.terminal.wire import Api, ApiError, Delta

ROUTE = "/v1/chat/completions"
PROMPT = "> "
HELP = """\
/system TEXT      set the system prompt; without TEXT take it away
/set NAME VALUE   set a field of the request, such as temperature 0.2; VALUE is JSON or text
/set NAME         leave the field to the server again
/set              show what is set
/clear            forget the conversation
/help             this list
/quit             leave; so does Ctrl-D. Ctrl-C stops an answer"""
OWN_FIELDS = frozenset({"model", "messages", "stream"})


class Conversation:
    """What is sent with the next question."""

    def __init__(self, *, model: str, system: str | None = None) -> None:
        self.system = system
        self.settings: dict[str, Any] = {}
        self.turns: list[tuple[str, str]] = []
        """Questions with their answers."""
        self._model = model

    def body(self, question: str) -> dict[str, Any]:
        """The request that asks this after all that was said."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in self.turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        return self.settings | {"model": self._model, "messages": messages, "stream": True}


class Chat:
    """Reads lines, obeys commands, prints answers as they come."""

    def __init__(self, api: Api, conversation: Conversation, *, read_line: Callable[[], str], sink: IO[str]) -> None:
        """`read_line` returns what was typed; it raises EOFError at the end and KeyboardInterrupt on Ctrl-C."""
        self._api = api
        self._conversation = conversation
        self._read_line = read_line
        self._sink = sink

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while True:
            try:
                if not self._turn():
                    return
            except KeyboardInterrupt:
                self._say("\n(/quit or Ctrl-D leaves)")

    def _turn(self) -> bool:
        """Do what one line says; False where it says to leave."""
        try:
            line = self._read_line().strip()
        except EOFError:
            return False
        if line == "/quit":
            return False
        if line.startswith("/"):
            self._obey(line)
        elif line:
            self._ask(line)
        return True

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands = {"/system": self._set_system, "/set": self._set, "/clear": self._clear, "/help": self._help}
        command = commands.get(name)
        if command is None:
            self._say(f"no command {name}; /help lists them")
        else:
            command(rest.strip())

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None
        self._say("the system prompt is set" if text else "there is no system prompt")

    def _set(self, rest: str) -> None:
        settings = self._conversation.settings
        name, _, value = rest.partition(" ")
        if name in OWN_FIELDS:
            self._say(f"{name} is not set here")
        elif not name:
            self._say(json.dumps(settings, ensure_ascii=False) if settings else "nothing is set")
        elif not value:
            settings.pop(name, None)
            self._say(f"{name} is left to the server")
        else:
            settings[name] = _value_of(value.strip())
            self._say(f"{name} is {json.dumps(settings[name], ensure_ascii=False)}")

    def _clear(self, _rest: str) -> None:
        self._conversation.turns.clear()
        self._say("the conversation is forgotten")

    def _help(self, _rest: str) -> None:
        self._say(HELP)

    def _ask(self, question: str) -> None:
        answer: list[str] = []
        ending = ""
        try:
            with closing(self._api.stream(ROUTE, self._conversation.body(question))) as deltas:
                ending = self._print(deltas, into=answer)
        except KeyboardInterrupt:
            ending = "(stopped)"
        except ApiError as error:
            ending = f"({_explain(error)})"
        if answer:
            self._conversation.turns.append((question, "".join(answer)))
            self._say("")
        if ending:
            self._say(ending)

    def _print(self, deltas: Iterator[Delta], *, into: list[str]) -> str:
        """Print and keep an answer; what is to be said of its end."""
        finish_reason: str | None = None
        is_thinking = False
        for delta in deltas:
            if delta.reasoning:
                self._write(("" if is_thinking else "(thinking) ") + printable(delta.reasoning))
                is_thinking = True
            if delta.text:
                into.append(delta.text)  # first: Ctrl-C may come while it is written, and what was seen is kept
                self._write(("\n\n" if is_thinking else "") + printable(delta.text))
                is_thinking = False
            finish_reason = delta.finish_reason or finish_reason
        if finish_reason == "length":
            return "(cut off: /set max_tokens N allows more)"
        return "" if finish_reason == "stop" else f"(ended: {finish_reason})"

    def _say(self, text: str) -> None:
        self._write(printable(text) + "\n")

    def _write(self, text: str) -> None:
        self._sink.write(text)
        self._sink.flush()


def terminal_lines(source: IO[str]) -> Callable[[], str]:
    """How lines are read: with editing and a history of what was typed where a person types."""
    if not source.isatty():
        return lambda: _next_line(source)
    import readline  # noqa: F401  # `input` edits lines with it

    return lambda: input(PROMPT)


def sink_of_terminal() -> IO[str]:
    """Standard output, with what its encoding lacks spelled out."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _next_line(source: IO[str]) -> str:
    line = source.readline()
    if not line:
        raise EOFError
    return line


def _value_of(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str)  # JSON has no NaN
    except ValueError:
        return text


def _explain(error: ApiError) -> str:
    if error.status == 404 and error.code != "model_not_found":
        return f"this server has no {ROUTE}; `headwater complete` needs /v1/completions alone"
    return str(error)
