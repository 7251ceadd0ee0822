"""What the served model's way of reasoning means for one request: where its output begins, and when a form holds."""

from dataclasses import dataclass

import msgspec

from app.api.deps import ServerContext
from app.core.errors import InvalidRequest
from app.core.types import Grammar
from app.text.reasoning import ReasoningForm, ReasoningParser, Start


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
    context: ServerContext, prompt: str, *, continued: str = "", is_split: bool = True
) -> ReasoningPlan | None:
    """The plan for the output of a rendered prompt; None where the model's reasoning, if any, is not known.

    `continued` is the text of the message that the prompt goes on with.
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
    )
