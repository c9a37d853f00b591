"""What survived of a text that streamed through a small cache: on a terminal, and as a page."""

from capkv_local.inspect.collect import Passage, Survival, collect, levels, passages
from capkv_local.inspect.page import render_page, write_page
from capkv_local.inspect.question import Attention, question_attention
from capkv_local.inspect.strip import print_strip

__all__ = [
    "Attention",
    "Passage",
    "Survival",
    "collect",
    "levels",
    "passages",
    "print_strip",
    "question_attention",
    "render_page",
    "write_page",
]
