"""A chat template cut into the pieces that stand around the user's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

if TYPE_CHECKING:
    from capkv_local.llama.llama import Llama

# Stand-ins for messages: nothing that a template would change or a tokenizer cares for.
_USER, _ANSWER, _NEXT = "§§user§§", "§§answer§§", "§§next§§"


@dataclass(frozen=True)
class ChatTemplate:
    """Tokens around messages: ``first USER after ANSWER between USER after ANSWER ...``."""

    first: list[int]
    after: list[int]
    between: list[int]

    @classmethod
    def of(cls, llama: Llama) -> ChatTemplate:
        """The template in the model's metadata, or plain ``Question: ... Answer: ...``."""
        pieces = _pieces(llama) or ("", "\nAnswer:", "\n\n")
        first, after, between = (
            llama.tokenize(piece.encode(), add_bos=False, special=True) for piece in pieces
        )
        bos = llama.token_bos()
        if llama._model.add_bos_token() and bos != -1 and first[:1] != [bos]:
            first = [bos, *first]
        return cls(first, after, between)


def _pieces(llama: Llama) -> tuple[str, str, str] | None:
    template = llama.metadata.get("tokenizer.chat_template")
    if not template:
        return None

    def text(token: int) -> str:
        return llama._model.token_get_text(token) if token != -1 else ""

    render = Jinja2ChatFormatter(
        template=template, bos_token=text(llama.token_bos()), eos_token=text(llama.token_eos())
    )
    messages: list[Any] = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    one = str(render(messages=messages[:1]).prompt)
    many = str(render(messages=messages).prompt)
    if _USER not in one or _ANSWER not in many or _NEXT not in many:
        return None
    first, after = one.split(_USER, 1)
    between = many.split(_ANSWER, 1)[1].split(_NEXT, 1)[0]
    return first, after, between
