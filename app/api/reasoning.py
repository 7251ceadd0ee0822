"""What the served model's way of reasoning means for one request: where its output begins, and when a form holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from app.api.deps import ServerContext
from app.core.errors import InvalidRequest
from app.core.types import Grammar
from app.text.reasoning import ReasoningForm, ReasoningParser, Start
from app.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReasoningPlan:
    """How the reasoning of one request's sequences is served."""

    form: ReasoningForm
    start: Start
    opening_id: int | None
    closing_id: int | None
    """The tags as tokens, where they are each one."""
    is_split: bool = True
    """False: it stays in the text."""
    hidden_tags: Mapping[int, str] = field(default_factory=dict)
    """Tags that are control tokens, by id: the text of the output would be without them."""

    def parser(self) -> ReasoningParser | None:
        """A parser for one sequence."""
        return ReasoningParser(self.form, self.start) if self.is_split else None

    def behind_reasoning(self, grammar: Grammar, *, field: str) -> Grammar:
        """The grammar for an output that may begin with reasoning. Raises InvalidRequest, naming `field`."""
        if self.start is Start.OVER:
            return grammar
        if self.start is Start.OPEN:
            if self.opening_id is None or self.closing_id is None:
                return grammar  # the model answers at once
            return msgspec.structs.replace(grammar, after=self.closing_id, opened_by=self.opening_id)
        if self.closing_id is None:
            raise InvalidRequest(
                f"`{field}`: this model begins by reasoning, and the end of that, {self.form.closing}, is no token of "
                "its own to wait for. Switch its reasoning off by `chat_template_kwargs`, or leave this out.",
                param=field,
            )
        return msgspec.structs.replace(grammar, after=self.closing_id)


def plan_reasoning(
    context: ServerContext, prompt: str, *, continued: str = "", is_split: bool = True, shows_special: bool = False
) -> ReasoningPlan | None:
    """The plan for the output of a rendered prompt; None where the model's reasoning, if any, is not known.

    `continued` is the text of the message that the prompt goes on with, `shows_special` whether control tokens are
    part of the text.
    """
    form = context.reasoning
    if form is None:
        return None
    return ReasoningPlan(
        form,
        form.start_after(prompt, continued=continued),
        opening_id=context.tokenizer.token_id(form.opening),
        closing_id=context.tokenizer.token_id(form.closing),
        is_split=is_split,
        hidden_tags={} if shows_special or not is_split else _hidden_tags(form, context.tokenizer),
    )


def _hidden_tags(form: ReasoningForm, tokenizer: Tokenizer) -> dict[int, str]:
    ids = {tokenizer.token_id(tag): tag for tag in (form.opening, form.closing)}
    return {token_id: tag for token_id, tag in ids.items() if token_id is not None and tokenizer.is_special(token_id)}
