"""Chat templates of the families' shapes, in our own words. Each takes messages whose content is a string or a list of {type: image | text} parts."""

from __future__ import annotations


def parts(image: str, text: str = "{{ part['text'] }}") -> str:
    """Jinja for one message's content, in order: what is written for a picture, and for a text."""
    return (
        "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}" + image + "{%- elif part['type'] == 'text' -%}" + text + "{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )


def chatml(image: str, *, default_system: str = "") -> str:
    """Turns between <|im_start|>role and <|im_end|>, as the Qwen and InternVL models have; a default system turn where the family has one."""
    default = (
        "{%- if loop.first and message['role'] != 'system' -%}{{ '<|im_start|>system\\n" + default_system + "<|im_end|>\\n' }}{%- endif -%}"
        if default_system
        else ""
    )
    return (
        "{%- for message in messages -%}"
        + default
        + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + parts(image)
        + "{{ '<|im_end|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )
