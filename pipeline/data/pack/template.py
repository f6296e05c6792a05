"""The chat template of a tokenizer: messages -> text, and where in it the answers stand.

A template is Jinja text that comes with a tokenizer (`chat_template.jinja`, or in tokenizer_config.json), rendered here
by transformers, in its sandbox. Answers are what it marks by `{% generation %}`; where it marks nothing they are what
an assistant's message adds to the text of those before it with the prompt for an answer behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
Messages = Sequence[Mapping[str, Any]]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Template:
    """`text`: of the template; `tokens`: names of special tokens that it may use, such as bos_token, and their text."""

    text: str
    tokens: dict[str, str]

    def render(self, messages: Messages, prompt: bool = False) -> str:
        """The text of a chat; `prompt`: with what an answer begins behind. Raises DataError for what it refuses."""
        return self._rendered(messages, prompt)[0]

    def answers(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and [begin, end) of its answers in characters. Raises DataError."""
        if _MARKED.search(self.text):
            text, [spans] = self._rendered(messages, mark=True)
            return text, [(begin, end) for begin, end in spans]
        text, spans = self.render(messages), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = self.render(messages[:number], prompt=True), self.render(messages[: number + 1])
                if not after.startswith(before) or not text.startswith(after):
                    raise DataError(
                        "its chat template writes a chat in another way than the beginning of that chat, so answers "
                        "cannot be found; mark them in the template by {% generation %} and {% endgeneration %}"
                    )
                spans.append((len(before), len(after)))
        return text, spans

    def _rendered(self, messages: Messages, prompt: bool = False, mark: bool = False) -> tuple[str, list[Any]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        asked: dict[str, Any] = {"add_generation_prompt": prompt, "return_assistant_tokens_mask": mark, **self.tokens}
        try:
            found: Any = render_jinja_template([[dict(each) for each in messages]], chat_template=self.text, **asked)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"its chat template refuses it: {error}") from error
        return found[0][0], found[1]


def read_template(tokenizer: Path, file: Path | None = None) -> Template:
    """The template beside `tokenizer` (a folder, or a tokenizer.json in one), or that of `file`.

    Raises DataError when there is none.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).is_file() else {}
        own = file or folder / FILE
        text = own.read_text(encoding="utf-8") if file or own.is_file() else settings.get("chat_template")
    except (OSError, ValueError) as error:
        raise DataError(f"the chat template of {folder} cannot be read: {error}") from error
    if isinstance(text, list):  # several, by name
        text = next((each["template"] for each in text if each.get("name") == "default"), None)
    if not text:
        raise DataError(
            f"the tokenizer in {folder} has no chat template (neither {FILE} nor one in {SETTINGS}); put one "
            "there, take the tokenizer of a network that chats, or give one with --template FILE"
        )
    special = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    return Template(
        text, {key: value for key, value in special.items() if key.endswith("_token") and isinstance(value, str)}
    )
