"""One golden conversation per chat family and mode, through the code that capture runs (traps
A5 and B1 to B6).
"""

import json
from itertools import groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from deepspec.hidden.sequences import CaptureRow, capture_rows
from deepspec.messages import Message
from deepspec.target.chat import Chat
from tests.conftest import tiny_run
from tests.target.chat_templates import GEMMA4, GEMMA4_SMALL, QWEN3

QWEN_MARKS = {"tokens": ["<think>", "</think>"], "special": []}
GEMMA_MARKS = {
    "tokens": [],
    "special": ["<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"],
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "user", "content": "Two?"},
]

QWEN_HEAD, QWEN_NEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n",
    "<|im_start|>user\nTwo?<|im_end|>\n",
)
QWEN, NO_THOUGHT = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
GEMMA_USER, GEMMA_NEXT, MODEL = (
    "<|turn>user\nOne?<turn|>\n",
    "<|turn>user\nTwo?<turn|>\n",
    "<|turn>model\n",
)
GEMMA_HEAD, GEMMA_THINKS = (
    "<bos><|turn>system\nBe brief.<turn|>\n" + GEMMA_USER,
    "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n" + GEMMA_USER,
)
EMPTY = "<|channel>thought\n<channel|>"

# (family, template, thinking, the two answers, what is expected: sequences of (context, supervised)
# pieces)
GOLDEN = {
    "qwen3 thinking": (
        "qwen",
        QWEN3,
        True,
        ["<think>\nhm\n</think>\n\nFirst.", "<think>\nso\n</think>\n\nSecond."],
        [
            [QWEN_HEAD + QWEN, "<think>\nhm\n</think>\n\nFirst.<|im_end|>"],
            [
                QWEN_HEAD + QWEN + "First.<|im_end|>\n" + QWEN_NEXT + QWEN,
                "<think>\nso\n</think>\n\nSecond.<|im_end|>",
            ],
        ],
    ),
    "qwen3 not thinking": (
        "qwen",
        QWEN3,
        False,
        ["First.", "Second."],
        [
            [QWEN_HEAD + QWEN + NO_THOUGHT, "First.<|im_end|>"],
            [
                QWEN_HEAD + QWEN + "First.<|im_end|>\n" + QWEN_NEXT + QWEN + NO_THOUGHT,
                "Second.<|im_end|>",
            ],
        ],
    ),
    "gemma4 thinking": (
        "gemma4",
        GEMMA4,
        True,
        ["<|channel>thought\nhm\n<channel|>First.", "<|channel>thought\nso\n<channel|>Second."],
        [
            [GEMMA_THINKS + MODEL, "<|channel>thought\nhm\n<channel|>First.<turn|>"],
            [
                GEMMA_THINKS + MODEL + "First.<turn|>\n" + GEMMA_NEXT + MODEL,
                "<|channel>thought\nso\n<channel|>Second.<turn|>",
            ],
        ],
    ),
    "gemma4 not thinking": (
        "gemma4",
        GEMMA4,
        False,
        ["First.", "Second."],
        [
            [GEMMA_HEAD + MODEL + EMPTY, "First.<turn|>"],
            [GEMMA_HEAD + MODEL + "First.<turn|>\n" + GEMMA_NEXT + MODEL + EMPTY, "Second.<turn|>"],
        ],
    ),
    "small gemma4 not thinking": (
        "gemma4",
        GEMMA4_SMALL,
        False,
        ["First.", "Second."],
        [[GEMMA_HEAD + MODEL, "First.<turn|>", "\n" + GEMMA_NEXT + MODEL, "Second.<turn|>"]],
    ),
}


def make_chat(demo_store: Path, family: str, template: str, *, thinking: bool) -> Chat:
    (folder,) = demo_store.glob("demo/*/target")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    marks = QWEN_MARKS if family == "qwen" else GEMMA_MARKS
    tokenizer.add_tokens(marks["tokens"])
    tokenizer.add_special_tokens({"extra_special_tokens": marks["special"]})
    if family == "gemma4":
        tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = template
    target = tiny_run(demo_store).target.model_copy(
        update={"chat_family": family, "thinking": thinking}
    )
    return Chat(tokenizer, target)


def pieces(chat: Chat, row: CaptureRow) -> list[str]:
    """The sequence as text, cut where supervision begins and ends; the first piece is context."""
    runs = groupby(zip(row.input_ids, row.loss_mask, strict=True), key=lambda pair: pair[1])
    return [
        chat.tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        for _, run in runs
    ]


@pytest.mark.parametrize("ids_given", [True, False], ids=["tokens given", "text alone"])
@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_supervised_is_what_the_target_generated_in_the_context_it_saw(
    demo_store: Path, name: str, ids_given: bool
):
    family, template, thinking, answers, expected = GOLDEN[name]
    chat = make_chat(demo_store, family, template, thinking=thinking)
    turns = []
    for text in answers:
        ids = chat.answer_ids(text, finished=True)
        # trap A5: what the next turn is asked on is what was said
        assert chat.decode(ids, chat.stop_ids()) == text
        turns.append(
            {"text": text, "token_ids": ids if ids_given else None, "finish_reason": "stop"}
        )
    answer = {
        "id": 1,
        "held_out": False,
        "messages": json.dumps(MESSAGES),
        "tools": None,
        "turns": turns,
    }
    found = capture_rows([answer], chat, tiny_run(demo_store).hidden)
    assert found.rejects == []
    rows = sorted(found.rows, key=lambda row: len(row.input_ids))
    assert [pieces(chat, row) for row in rows] == expected
    assert all(row.input_ids[-1] == chat.end_of_turn and row.loss_mask[-1] for row in rows)


@pytest.mark.parametrize("name", GOLDEN)
def test_no_token_of_a_generation_prompt_is_supervised(demo_store: Path, name: str):
    family, template, thinking, answers, expected = GOLDEN[name]
    chat = make_chat(demo_store, family, template, thinking=thinking)
    prompt = chat.tokenizer.decode(
        chat.render([Message(**message) for message in MESSAGES[:2]]), skip_special_tokens=False
    )
    assert prompt == expected[0][0]
    assert not any(prompt.endswith(piece) for row in expected for piece in row[1::2])
    assert answers[0] not in prompt


def test_calls_of_tools_and_their_results_are_context_and_the_answer_behind_them_is_supervised(
    demo_store: Path,
):
    chat = make_chat(demo_store, "qwen", QWEN3, thinking=False)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    turn = {"text": "It is 2.", "token_ids": None, "finish_reason": "stop"}
    tools = json.dumps([{"type": "function", "function": {"name": "add"}}])
    answer = {
        "id": 1,
        "held_out": False,
        "messages": json.dumps(messages),
        "tools": tools,
        "turns": [turn],
    }
    (row,) = capture_rows([answer], chat, tiny_run(demo_store).hidden).rows
    context, supervised = pieces(chat, row)
    assert supervised == "It is 2.<|im_end|>"
    for words in (
        "# Tools",
        '"name": "add"',
        "<tool_call>",
        "<tool_response>\n2\n</tool_response>",
    ):
        assert words in context
