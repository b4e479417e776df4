"""Chat templates that render as those of Qwen3 and Gemma4 do, written from their output.

As theirs are: where a generation prompt ends, what is dropped of earlier turns, what is inserted.
"""

QWEN3 = """
{%- set ns = namespace(query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n')
            if '</think>' in message.content else '' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.query and thought %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content }}
        {{- '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

# Of the larger Gemma4 models; the smaller ones insert no empty thought.
GEMMA4 = """
{%- macro without_thinking(text) -%}
    {%- set ns = namespace(said='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.said = ns.said + part.split('<|channel>')[0] -%}
    {%- endfor -%}
    {{- ns.said | trim -}}
{%- endmacro -%}
{{- bos_token -}}
{%- if enable_thinking or messages[0].role == 'system' -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>\n' -}}{%- endif -%}
    {%- if messages[0].role == 'system' -%}{{- messages[0].content | trim -}}{%- endif -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- for message in messages if message.role != 'system' -%}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' -}}
    {{- without_thinking(message.content) if message.role == 'assistant'
        else message.content | trim -}}
    {{- '<turn|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\n' -}}
    {%- if not enable_thinking -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""
GEMMA4_SMALL = GEMMA4.replace("{{- '<|channel>thought\\n<channel|>' -}}", "").replace(
    "{{- '<|channel>thought\n<channel|>' -}}", ""
)
