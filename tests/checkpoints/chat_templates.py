"""Constructs of public chat templates, each with the text that transformers 5.24.0 makes of it; `tests/parity` compares anew."""
# ruff: noqa: E501

from __future__ import annotations

from typing import Any, NamedTuple

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be <kind> & 'brief'.\n"},
    {"role": "user", "content": "Grüß dich, 你好 🏳️‍🌈"},
    {"role": "assistant", "content": "<think>so</think>Hello", "tool_calls": None},
    {"role": "user", "content": "Bye\r\n"},
]
TOOL_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "add", "name": "ann"},
    {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": None},
    {"role": "assistant", "content": "three", "reasoning": "1 + 2"},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"default": None}}}}}
]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "add"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}],
    },
    {"role": "tool", "content": "3", "tool_call_id": "call_1"},
]
PARTS: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]


class Case(NamedTuple):
    """`text` is None where the template refuses the messages; `options` are arguments of `apply_chat_template`."""

    template: str
    text: str | None
    messages: list[dict[str, Any]] = MESSAGES
    options: dict[str, Any] = {}  # noqa: RUF012


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMED = (
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '[' + message.role + '] ' + message.content | trim + eos_token }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '[assistant] ' }}\n{%- endif %}\n"
)

CASES = [
    # loops
    Case("{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.role }},{% endfor %}", "system,user,"),
    Case(
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }},{% endfor %}",
        "system,assistant,",
    ),
    Case("{% for m in messages %}{{ loop.previtem.role }}>{{ m.role }}>{{ loop.nextitem.role }}|{% endfor %}", None),
    Case(
        "{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }} {% endfor %}",
        "TrueFalse44 FalseFalse43 FalseFalse42 FalseTrue41 ",
    ),
    Case("{% for m in messages if m.role == 'user' %}{{ loop.index }}{% else %}none{% endfor %}", "12"),
    Case("{% for m in messages %}{{ loop.changed(m.role) }}{{ loop.cycle('a', 'b') }}{% endfor %}", "TrueaTruebTrueaTrueb"),
    Case(
        "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
        "role=system;content= Be <kind> & 'brief'.\n;",
    ),
    Case(
        "{% for a, b in messages[0] | dictsort %}{{ a }}{% endfor %}{{ messages[0] | items | list | length }}", "contentrole2"
    ),
    Case("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
    Case("{% for m in messages recursive %}{{ m.role[0] }}{% endfor %}", "suau"),
    # JSON
    Case("{{ messages[1] | tojson }}", '{"role": "user", "content": "Grüß dich, 你好 🏳️\u200d🌈"}'),
    Case(
        "{{ messages[:2] | tojson(indent=2) }}",
        '[\n  {\n    "role": "system",\n    "content": " Be <kind> & \'brief\'.\\n"\n  },\n  {\n    "role": "user",\n    "content": "Grüß dich, 你好 🏳️\u200d🌈"\n  }\n]',
    ),
    Case(
        "{{ messages[1] | tojson(ensure_ascii=True) }}",
        '{"role": "user", "content": "Gr\\u00fc\\u00df dich, \\u4f60\\u597d \\ud83c\\udff3\\ufe0f\\u200d\\ud83c\\udf08"}',
    ),
    Case(
        "{{ messages[1] | tojson(ensure_ascii=False, sort_keys=True) }}",
        '{"content": "Grüß dich, 你好 🏳️\u200d🌈", "role": "user"}',
    ),
    Case("{{ messages[1] | tojson(separators=(',', ':')) }}", '{"role":"user","content":"Grüß dich, 你好 🏳️\u200d🌈"}'),
    Case(
        "{{ messages[1] | tojson(True) }}",
        '{"role": "user", "content": "Gr\\u00fc\\u00df dich, \\u4f60\\u597d \\ud83c\\udff3\\ufe0f\\u200d\\ud83c\\udf08"}',
    ),
    Case(
        "{{ messages[0] | tojson(indent=4, separators=(',', ': '), sort_keys=True) }}",
        '{\n    "content": " Be <kind> & \'brief\'.\\n",\n    "role": "system"\n}',
    ),
    Case(
        "{{ '<a href=\"x\">&' | tojson }}{{ none | tojson }}{{ 1.5 | tojson }}{{ true | tojson }}",
        '"<a href=\\"x\\">&"null1.5true',
    ),
    Case("{{ missing | tojson }}", None),
    Case("{{ messages[1] | tojson(default=1) }}", None),
    # blocks of the model's text
    Case("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}|{% endfor %}", "system|user|assistant|user|"),
    Case(
        "{%- for m in messages -%}\n{%- generation -%} {{ m.role }} {%- endgeneration -%}\n{%- endfor -%}",
        "systemuserassistantuser",
    ),
    Case("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
    Case("{% generation %}{% set y = 2 %}{% endgeneration %}{{ y is defined }}", "False"),
    Case("{% set ns = namespace(x=1) %}{% generation %}{% set ns.x = 2 %}{% endgeneration %}{{ ns.x }}", "2"),
    Case("{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}", "1234"),
    # functions
    Case("{{ raise_exception('roles must alternate') }}", None),
    Case("{{ strftime_now('%Y') | length }}{{ strftime_now('') }}", "4"),
    Case("{{ strftime_now(format='%%') }}", "%"),
    Case(
        "{{ date_string is defined }}{% if not date_string is defined %}{% set date_string = '26 Jul' %}{% endif %}{{ date_string }}",
        "False26 Jul",
    ),
    Case("{{ dict(a=1, b=2) }}{{ dict([('a', 1)]) }}{{ dict.fromkeys(['a'], 0) }}", "{'a': 1, 'b': 2}{'a': 1}{'a': 0}"),
    Case("{{ dict.update(messages[0], {'role': 'x'}) }}{{ messages[0].role }}", None),
    Case("{{ cycler('a', 'b').next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}", "a,"),
    Case("{% do messages.append(1) %}", None),
    # names
    Case(
        "{%- set ns = namespace(found=false, text='') %}{% for m in messages %}{% set ns.found = true %}{% set ns.text = ns.text + m.role[0] %}{% endfor %}{{ ns.found }}{{ ns.text }}",
        "Truesuau",
    ),
    Case(
        "{%- set ns = namespace() %}{% set ns.a = [1] %}{% set ns.a = ns.a + [2] %}{{ ns.a }}{{ ns.missing is defined }}",
        "[1, 2]False",
    ),
    Case("{%- set ns = namespace({'a': 1}, b=2) %}{{ ns.a + ns.b }}{{ ns['a'] }}", "31"),
    Case("{%- set ns = namespace(self=1) %}{{ ns.self }}", "1"),
    Case("{%- set ns = namespace(_a=1) %}{{ ns._a }}", None),
    Case("{%- set ns = namespace() %}{% set ns._a = 1 %}", None),
    Case("{% set x = 0 %}{% for m in messages %}{% set x = x + 1 %}{% endfor %}{{ x }}", "0"),
    Case("{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c %}text{% endset %}{{ c }}", "12text"),
    Case("{% with a = 1 %}{{ a }}{% endwith %}{{ a is defined }}", "1False"),
    Case(
        "{% macro show(m, end='!') %}{{ m.role }}{{ end }}{{ caller is defined }}{% endmacro %}{{ show(messages[0]) }}{{ show(messages[1], end='?') }}",
        "system!Falseuser?False",
    ),
    Case("{% macro outer() %}[{{ caller(1) }}]{% endmacro %}{% call(x) outer() %}{{ x }}{% endcall %}", "[1]"),
    Case("{% filter upper %}a{% endfilter %}", "A"),
    # variables that are given
    Case("{{ messages[0].role }}{% set rest = messages[1:] %}{{ rest | length }}{{ messages[-1].content }}", "system3Bye\r\n"),
    Case("{{ messages[::-1] | map(attribute='role') | join(',') }}", "user,assistant,user,system"),
    Case("{{ tools is defined }}{{ tools is none }}{{ documents is defined }}{{ documents is none }}", "TrueTrueTrueTrue"),
    Case(
        "{% if tools %}tools{% endif %}{{ add_generation_prompt }}{{ chat_template is defined }}{{ tokenizer is defined }}",
        "TrueFalseFalse",
    ),
    Case("{{ add_generation_prompt }}", "False", options={"add_generation_prompt": False}),
    Case("{{ enable_thinking is defined and not enable_thinking }}", "True", options={"enable_thinking": False}),
    Case("{{ bos_token }}", "other", options={"bos_token": "other"}),
    Case("{{ tools }}{{ x.y }}{{ x.z is defined }}", "None[1, None]False", options={"x": {"y": [1, None]}}),
    Case(
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ pad_token is defined }}{{ additional_special_tokens }}",
        "<s></s><unk>False",
    ),
    Case(
        "{{ missing }}{{ missing is defined }}{{ messages[0].missing }}{{ messages[0]['missing'] is defined }}{{ missing or 'x' }}",
        "FalseFalsex",
    ),
    Case("{{ missing.field }}", None),
    Case("{{ messages[9].role }}", None),
    Case("{{ messages[0]['content'] + 1 }}", None),
    Case(
        "{{ messages[2].tool_calls is defined }}{{ 'tool_calls' in messages[2] }}{{ messages[2].get('tool_calls', []) }}",
        "FalseFalse[]",
    ),
    Case(
        "{% for m in messages %}{{ m | tojson }}\n{% endfor %}",
        '{"role": "user", "content": "add", "name": "ann"}\n{"role": "tool", "content": "3", "tool_call_id": "call_1"}\n{"thinking": "1 + 2", "role": "assistant", "content": "three", "reasoning": "1 + 2", "reasoning_content": "1 + 2"}\n',
        TOOL_MESSAGES,
    ),
    Case(
        "{{ messages[1].tool_call_id }}{{ messages[0].name }}{{ messages[2].reasoning_content }}{{ messages[2].thinking }}",
        "call_1ann1 + 21 + 2",
        TOOL_MESSAGES,
    ),
    Case("{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}", "ab", PARTS),
    Case(
        "{{ messages[0].content is string }}{{ messages[0].content is iterable }}{{ messages[0].content is mapping }}",
        "FalseTrueFalse",
        PARTS,
    ),
    Case(
        '{% for tool in tools %}{{ tool | tojson }}\n{{ tool.function | tojson(indent=1) }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls %}{% set call = call.function %}<tool_call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}</tool_call>{% endfor %}{% endfor %}',
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"default": null}}}}}\n{\n "name": "add",\n "parameters": {\n  "type": "object",\n  "properties": {\n   "a": {\n    "default": null\n   }\n  }\n }\n}<user>add<assistant><tool_call>{"name": "add", "arguments": {"a": "\xe9"}}</tool_call><tool>3',
        CALLS,
        {"tools": TOOLS},
    ),
    # text
    Case(
        "{{ messages[0].content | trim }}|{{ messages[0].content.strip() }}|{{ messages[0]['content'] }}|",
        "Be <kind> & 'brief'.|Be <kind> & 'brief'.| Be <kind> & 'brief'.\n|",
    ),
    Case(
        "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ messages[2].content.startswith('<think>') }}",
        "HelloTrue",
    ),
    Case(
        "{{ messages[2].content.replace('Hello', 'Hi') }}{{ 'x'.upper() }}{{ '%s-%d' % ('a', 2) }}{{ '{}'.format('b') }}",
        "<think>so</think>HiXa-2b",
    ),
    Case(
        "{{ messages[1].content | length }}{{ messages[1].content | upper }}{{ messages[1].content[:4] }}{{ messages[1].content[::-1][:2] }}",
        "18GRÜSS DICH, 你好 🏳️\u200d🌈Grüß🌈\u200d",
    ),
    Case(
        "{{ 'a' ~ 1 ~ none }}{{ '<b>' | e }}{{ '<b>' | safe }}{{ ['a', 'b'] | join }}{{ 'abc' | replace('b', '') }}",
        "a1None&lt;b&gt;<b>abac",
    ),
    Case(
        "{{ 'a\\nb' | indent(2) }}{{ 'x' | default('y') }}{{ missing | default('y') }}{{ '' | default('z', true) }}",
        "a\n  bxyz",
    ),
    Case(
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | map(attribute='role') | list }}",
        "2['system', 'user', 'assistant', 'user']",
    ),
    Case(
        "{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | first }}{{ [3, 1] | sort }}{{ [1, 1] | unique | list }}",
        "system[1, 3][1]",
    ),
    Case(
        "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ 'a' if false }}{{ 1 if true else 2 }}{{ 'b' in 'abc' }}{{ not none }}{{ 1.0 | int }}",
        "3181TrueTrue1",
    ),
    # white space
    Case("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n", "x\n"),
    Case("a\n  {%- if true %} b {% endif -%}\n c\n\n", "a b c\n"),
    Case("a\r\nb{# note #}\n{#- note -#}\nc\n", "a\nbc"),
    Case("{% raw %}{{ x }}{% endraw %}é\u2028你", "{{ x }}\xe9\u2028\u4f60"),
    Case("{{ 'a' }}\n\n", "a\n"),
    # the sandbox
    Case("{{ messages.append({'role': 'user'}) }}", None),
    Case("{{ messages.pop() }}", None),
    Case("{{ messages[0].update({'role': 'x'}) }}", None),
    Case("{{ messages[0].pop('role') }}", None),
    Case("{{ messages.sort() }}", None),
    Case("{{ ''.__class__ }}", ""),
    Case("{{ ''.__class__.__mro__ }}", None),
    Case("{{ messages.__init__.__globals__ }}", None),
    Case("{{ '{0.__class__}'.format(1) }}", ""),
    Case("{% for i in range(1000000) %}{% endfor %}", None),
    Case("{% include 'x' %}", None),
    # templates that cannot be compiled
    Case("{% for m in messages %}", None),
    Case("{{ messages | nonsense }}", None),
    Case("{{ messages is nonsense }}", None),
    Case("{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}", None),
    Case("{% generation %}", None),
    Case("{% trans %}x{% endtrans %}", None),
    # whole templates
    Case(
        CHATML,
        "<|im_start|>system\n Be <kind> & 'brief'.\n<|im_end|>\n<|im_start|>user\nGrüß dich, 你好 🏳️\u200d🌈<|im_end|>\n<|im_start|>assistant\n<think>so</think>Hello<|im_end|>\n<|im_start|>user\nBye\r\n<|im_end|>\n<|im_start|>assistant\n",
    ),
    Case(
        CHATML,
        "<|im_start|>system\n Be <kind> & 'brief'.\n<|im_end|>\n<|im_start|>user\nGrüß dich, 你好 🏳️\u200d🌈<|im_end|>\n<|im_start|>assistant\n<think>so</think>Hello<|im_end|>\n<|im_start|>user\nBye\r\n<|im_end|>\n",
        options={"add_generation_prompt": False},
    ),
    Case(
        TRIMMED,
        "<s>[system] Be <kind> & 'brief'.</s>[user] Grüß dich, 你好 🏳️\u200d🌈</s>[assistant] <think>so</think>Hello</s>[user] Bye</s>[assistant] ",
    ),
    # a last message that is continued
    Case(
        CHATML,
        "<|im_start|>system\n Be <kind> & 'brief'.\n<|im_end|>\n<|im_start|>user\nGrüß dich, 你好 🏳️\u200d🌈<|im_end|>\n<|im_start|>assistant\n<think>so</think>Hello<|im_end|>\n<|im_start|>user\nBye\r\n",
        options={"add_generation_prompt": False, "continue_final_message": True},
    ),
    Case(
        TRIMMED,
        "<s>[system] Be <kind> & 'brief'.</s>[user] Grüß dich, 你好 🏳️\u200d🌈</s>[assistant] <think>so</think>Hello</s>[user] Bye",
        options={"add_generation_prompt": False, "continue_final_message": True},
    ),
    Case("{{ messages[-1].content }} ...", "Bye\r\n", options={"add_generation_prompt": False, "continue_final_message": True}),
    Case("{{ messages[0].content }}", None, options={"add_generation_prompt": False, "continue_final_message": True}),
    Case(CHATML, None, PARTS, options={"add_generation_prompt": False, "continue_final_message": True}),
]
