"""The tokenizer: fixed ids of the special tokens, text that survives the round trip, Qwen's
turns.
"""

from typing import Any

import pytest

from deepspec.config.target import DemoConfig
from deepspec.demo.corpus import Corpus, make_corpus
from deepspec.demo.stage import encode
from deepspec.demo.target import SPECIAL_TOKENS, train_tokenizer

MESSAGES = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(DemoConfig(conversations=300, held_out=5))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Any:
    return train_tokenizer((row.answer for row in corpus.training), vocab_size=400)


def test_special_tokens_have_the_ids_that_the_recipe_names(tokenizer: Any):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 2, 3)
    assert len(tokenizer) == 400


def test_the_template_marks_turns_as_qwen_does(tokenizer: Any):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    system = [{"role": "system", "content": "Be brief."}, MESSAGES[0]]
    text = tokenizer.apply_chat_template(
        system, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHow?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_every_conversation_renders_and_decodes_back_and_its_answer_ends_the_turn(
    corpus: Corpus, tokenizer: Any
):
    for row in corpus.training:
        example = encode(tokenizer, row)
        messages = [*row.prompt, {"role": "assistant", "content": row.answer}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert rendered == [*example.input_ids, *tokenizer.encode("\n")], (
            "training sees what a server would see"
        )
        answer = example.input_ids[example.prompt :]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == row.answer
        assert tokenizer.mask_token_id not in example.input_ids


def test_any_text_survives_and_digits_stay_single(tokenizer: Any):
    text = "naïve → 1234 \t\n  x_y"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4


def test_equal_texts_make_equal_tokenizers(corpus: Corpus, tokenizer: Any):
    again = train_tokenizer((row.answer for row in corpus.training), vocab_size=400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
