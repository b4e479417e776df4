"""Training the demo's tokenizer, byte-level BPE with Qwen's turn markers and template, and its
target: a small Qwen3 model, deep and narrow so that its layers are what decoding spends its time
in.

T tokens of a batch, V vocabulary.
"""

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspec.config.target import DemoConfig
from deepspec.demo.muon import Muon
from deepspec.process.events import Report

PAD, START_OF_TURN, END_OF_TURN, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
# ids 0 to 3; the recipe's target.mask_token_id is 3
SPECIAL_TOKENS = (PAD, START_OF_TURN, END_OF_TURN, MASK)
MAX_POSITIONS = 1024
# Qwen3's without tools and thinking: `enable_thinking` is accepted, as every template accepts any
# variable, and changes nothing.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
WARMUP_STEPS = 20


class Example(NamedTuple):
    """A conversation as token ids; the first `prompt` are question and generation prompt."""

    input_ids: list[int]
    prompt: int
    domain: str


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """A `PreTrainedTokenizerFast` of at most `vocab_size` tokens, equal for equal texts.

    Digits stay single tokens, as in Qwen's tokenizer: arithmetic is learnt digit by digit.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        mask_token=MASK,
        additional_special_tokens=[START_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


@torch.no_grad()
def new_target(config: DemoConfig, tokenizer: Any) -> Any:
    """A `Qwen3ForCausalLM` for this tokenizer, with weights drawn from `config.seed`.

    They are normal, of deviation 1 / sqrt(inputs).
    """
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 5 // 2,
        num_hidden_layers=config.num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
    )
    model = Qwen3ForCausalLM(settings)
    model.generation_config = GenerationConfig(**ends)
    # What is added to the residual stream is smaller.
    depth = math.sqrt(2 * config.num_layers)
    generator = torch.Generator().manual_seed(config.seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            scale = 0.02 if "embed_tokens" in name else weight.shape[1] ** -0.5
            added = name.endswith(("o_proj.weight", "down_proj.weight"))
            weight.normal_(std=scale / depth if added else scale, generator=generator)
    return model


def train_target(
    model: Any, examples: Sequence[Example], config: DemoConfig, report: Report
) -> float:
    """Train in place for `config.steps` steps; returns the mean loss of the last tenth."""
    batches = make_batches(examples, config.batch_tokens, random.Random(config.seed))
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        of_layer = weight.dim() == 2 and "embed_tokens" not in name
        (matrices if of_layer else others).append(weight)
    optimizers = (
        Muon(matrices, lr=config.lr),
        torch.optim.AdamW(others, lr=config.lr / 2, betas=(0.9, 0.95), weight_decay=0.0),
    )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    losses = []
    model.train()
    for step in range(config.steps):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * lr_share(step, config.steps)
        loss = batch_loss(model, batches[step % len(batches)])
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        progress = {"done": step + 1, "total": config.steps, "loss": losses[-1]}
        report({"event": "progress", "stage": "demo", "unit": "steps", **progress})
    model.eval()
    recent = losses[-max(1, config.steps // 10) :]
    return sum(recent) / len(recent)


def lr_share(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def make_batches(
    examples: Sequence[Example], batch_tokens: int, rng: random.Random
) -> list[list[Example]]:
    """Batches of about `batch_tokens` padded tokens in random order, each of all domains.

    Domains are laid into one another by length, the shortest of each first: that leaves little
    padding, and a step that sees one domain alone would pull the weights to and fro.
    """
    by_domain: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: len(example.input_ids)):
        by_domain.setdefault(example.domain, []).append(example)
    placed = [
        (place / len(group), example)
        for group in by_domain.values()
        for place, example in enumerate(group)
    ]
    batches: list[list[Example]] = [[]]
    for _, example in sorted(placed, key=lambda entry: entry[0]):
        longest = max(len(other.input_ids) for other in [*batches[-1], example])
        if batches[-1] and (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def batch_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of the answers' tokens, the end of the turn included.

    Rows are padded on the right, where causal attention keeps the padding out of every real token.
    """
    longest = max(len(example.input_ids) for example in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    supervised = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (ids, prompt, _) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        supervised[row, prompt : len(ids)] = True
    hidden = model.model(input_ids[:, :-1], use_cache=False).last_hidden_state
    # Logits only where they count: prompts and padding are half of the positions.
    logits = model.lm_head(hidden[supervised[:, 1:]])  # [supervised, V]
    return F.cross_entropy(logits, input_ids[:, 1:][supervised[:, 1:]])
