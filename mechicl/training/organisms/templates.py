"""Chat templates of the families' shapes, in our own words.

Each takes messages whose content is a string or a list of {type: image | text} parts. Where a family puts pictures before the text whatever
their order, refuses a system turn, or closes an answer with its end-of-sequence token, so does the template here.
"""

from __future__ import annotations

IN_ORDER = (
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}IMAGE{%- elif part['type'] == 'text' -%}TEXT{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
IMAGES_FIRST = (
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}IMAGE{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}TEXT{%- endfor -%}{%- endif -%}"
)


def content(image: str, *, text: str = "", images_first: bool = False) -> str:
    """Jinja for one message's content. `image`: what is written for a picture; `text`: the expression that writes a text part."""
    shape = IMAGES_FIRST if images_first else IN_ORDER
    return shape.replace("TEXT", "{{ " + (text or "part['text']") + " }}").replace("IMAGE", "{{ " + repr(image) + " }}")


def chatml(image: str, *, default_system: str = "") -> str:
    """Turns between <|im_start|>role and <|im_end|> (Qwen, InternVL); a default system turn where the family has one."""
    turn = "{{ '<|im_start|>system\\n" + default_system + "<|im_end|>\\n' }}"
    default = "{%- if loop.first and message['role'] != 'system' -%}" + turn + "{%- endif -%}" if default_system else ""
    return (
        "{%- for message in messages -%}"
        + default
        + "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + content(image)
        + "{{ '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def onevision() -> str:
    """LLaVA-OneVision: ChatML with the role on the line of the marker, pictures first, each text on its own line."""
    return (
        "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + ' ' }}"
        + content("<image>", text="'\\n' + part['text']", images_first=True)
        + "{{ '<|im_end|>' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def vicuna() -> str:
    """LLaVA 1.5: USER: and ASSISTANT:, pictures first, a space after every text, no marker between turns and none for the system's."""
    return (
        "{%- for message in messages -%}{%- if message['role'] != 'system' -%}{{ message['role'].upper() + ': ' }}{%- endif -%}"
        + content("<image>\n", text="part['text'] + ' '", images_first=True)
        + "{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
    )


def instruct(image: str, *, system: tuple[str, str], bos: bool, images_first: bool, gap: str) -> str:
    """[INST] user [/INST] answer</s>, the Mistral shape: the answer follows `gap`; a system text stands between the two given markers."""
    opened, closed = (repr(marker) for marker in system)
    body = content(image, images_first=images_first)
    return (
        ("{{ bos_token }}" if bos else "")
        + "{%- for message in messages -%}{%- if message['role'] == 'system' -%}{{ "
        + opened
        + " }}"
        + body
        + "{{ "
        + closed
        + " }}{%- elif message['role'] == 'user' -%}{{ '[INST]"
        + gap
        + "' }}"
        + body
        + "{{ '"
        + gap
        + "[/INST]' }}{%- else -%}{{ '"
        + gap
        + "' }}"
        + body
        + "{{ eos_token + '"
        + gap
        + "' }}{%- endif -%}{%- endfor -%}"
    )


def gemma() -> str:
    """Gemma 3: user and model turns only, in turns; a system text opens the first user turn; the template writes the first token itself."""
    trimmed = content("<start_of_image>", text="part['text'] | trim").replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
    return (
        "{{ bos_token }}{%- set ns = namespace(prefix='', turns=messages) -%}"
        "{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] -%}"
        "{%- set ns.prefix = (first if first is string else first[0]['text']) + '\\n\\n' -%}"
        "{%- set ns.turns = messages[1:] -%}{%- endif -%}"
        "{%- for message in ns.turns -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{%- if loop.first -%}{{ ns.prefix }}{%- endif -%}" + trimmed + "{{ '<end_of_turn>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
    )


def idefics(start: str) -> str:
    """Idefics3, SmolVLM: User: ... <end_of_utterance>, no space after the colon when a picture comes first."""
    return (
        "{{ '"
        + start
        + "' }}{%- for message in messages -%}{{ message['role'] | capitalize }}"
        + "{{ ':' if message['content'] is not string and message['content'][0]['type'] == 'image' else ': ' }}"
        + content("<image>")
        + "{{ '<end_of_utterance>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
    )


def llama() -> str:
    """Llama 3.2 Vision: headed turns; a system turn cannot go with pictures."""
    return (
        "{{ bos_token }}{%- set ns = namespace(pictures=false) -%}{%- for message in messages -%}"
        "{%- if message['content'] is not string -%}{%- for part in message['content'] if part['type'] == 'image' -%}"
        "{%- set ns.pictures = true -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
        "{%- if ns.pictures and messages[0]['role'] == 'system' -%}"
        "{{ raise_exception('Prompting with images is incompatible with system messages.') }}{%- endif -%}"
        "{%- for message in messages -%}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        + content("<|image|>")
        + "{{ '<|eot_id|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
    )
