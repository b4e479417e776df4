"""Rendering and loss masks: exactly what the target generated is supervised (traps B1 to B6)."""

import pytest

from deepspec.artifacts.run import Run
from deepspec.errors import DataError
from deepspec.messages import Message
from deepspec.target.chat import build_samples, load_chat
from deepspec.target.conversation import conversation_so_far
from tests.conftest import tiny_run


@pytest.fixture(scope="module")
def chat(demo_store):
    return load_chat(Run(tiny_run(demo_store)))


def test_the_rendered_prompt_ends_where_the_answer_begins(chat):
    text = chat.tokenizer.decode(chat.render([Message("user", "What is 2 + 2?")]))
    assert text.endswith("<|im_start|>assistant\n")
    assert "What is 2 + 2?" in text


def test_an_answer_in_text_gets_its_end_of_turn_back_only_if_it_finished(chat):
    finished, cut = chat.answer_ids("four", finished=True), chat.answer_ids("four", finished=False)
    assert finished == [*cut, chat.end_of_turn]
    assert chat.decode(finished, chat.stop_ids()) == "four"


def test_supervised_tokens_decode_to_the_answer_and_its_end_of_turn(chat):
    prompt, answer = (
        chat.render([Message("user", "hello")]),
        chat.answer_ids("hello to you", finished=True),
    )
    (sample,) = build_samples([(prompt, answer)])
    supervised = [
        token for token, kept in zip(sample.input_ids, sample.loss_mask, strict=True) if kept
    ]
    assert chat.tokenizer.decode(supervised) == "hello to you<|im_end|>"
    assert sample.loss_mask[: len(prompt)] == [False] * len(prompt)
    assert supervised[-1] == chat.end_of_turn


def test_the_first_answer_token_is_supervised_and_the_last_prompt_token_is_not():
    """Hand-computed: prompt [1, 2], answer [3] (trap B6)."""
    (sample,) = build_samples([([1, 2], [3])])
    assert (sample.input_ids, sample.loss_mask) == ([1, 2, 3], [False, False, True])


def test_turns_that_continue_each_other_share_a_sequence():
    samples = build_samples([([1, 2], [3, 9]), ([1, 2, 3, 9, 4, 5], [6, 9])])
    assert [sample.input_ids for sample in samples] == [[1, 2, 3, 9, 4, 5, 6, 9]]
    assert samples[0].loss_mask == [False, False, True, True, False, False, True, True]


def test_a_turn_whose_history_is_rendered_anew_starts_a_sequence_of_its_own():
    samples = build_samples([([1, 2], [7, 3, 9]), ([1, 2, 3, 9, 4], [6, 9])])
    assert [sample.input_ids for sample in samples] == [[1, 2, 7, 3, 9], [1, 2, 3, 9, 4, 6, 9]]


def test_every_supervised_token_has_the_context_it_was_generated_in(chat):
    """The tokens before each turn's answer are those that the engine was given (trap B3)."""
    messages = [Message("system", "be brief"), Message("user", "one"), Message("user", "two")]
    texts, turns = ["first answer", "second answer"], []
    for number, text in enumerate(texts):
        conversation = conversation_so_far(messages, texts[:number])
        assert conversation is not None
        turns.append((chat.render(conversation), chat.answer_ids(text, finished=True)))
    for sample in build_samples(turns):
        starts = [
            i
            for i in range(1, len(sample.loss_mask))
            if sample.loss_mask[i] and not sample.loss_mask[i - 1]
        ]
        for start in starts:
            assert any(sample.input_ids[:start] == prompt for prompt, _ in turns)
    assert conversation_so_far(messages, texts) is None


def test_a_tokenizer_of_another_family_is_refused(demo_store):
    with pytest.raises(DataError, match="end of a turn in the family 'gemma4'"):
        load_chat(Run(tiny_run(demo_store, "target.chat_family=gemma4")))
