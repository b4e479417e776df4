"""Made-up samples and shards for the tests of the cache."""

from collections.abc import Sequence
from pathlib import Path

import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.cache.codecs import make_codec
from deepspec.cache.format import EncodedTensor, HiddenSample, Layout, last_hidden_spans
from deepspec.cache.shard_writer import ShardWriter, WrittenShard

LAYERS, SIZE = 2, 8
LAYOUT = Layout(
    make_codec("raw", num_layers=LAYERS, hidden_size=SIZE),
    make_codec("raw", num_layers=1, hidden_size=SIZE),
    {"target": "tiny"},
)


def make_sample(number: int, tokens: int, layout: Layout = LAYOUT) -> HiddenSample:
    """Random states; the second half of the tokens is supervised."""
    generator = torch.Generator().manual_seed(number)
    mask = [index > tokens // 2 for index in range(tokens)]
    spans = torch.from_numpy(last_hidden_spans(mask))

    def stored(codec, rows: int) -> EncodedTensor:
        states = torch.randn(
            rows, codec.num_layers, codec.hidden_size, generator=generator
        ).bfloat16()
        return EncodedTensor(codec, tuple(codec.quantize(states)))

    return HiddenSample(
        sample_id=2**63 + number,
        input_ids=torch.arange(tokens, dtype=torch.int32),
        loss_mask=torch.tensor(mask, dtype=torch.uint8),
        context=stored(layout.context, tokens),
        last_hidden=stored(layout.last_hidden, int(spans[:, 1].sum())),
        last_spans=spans,
    )


def same(first: HiddenSample, second: HiddenSample) -> bool:
    tensors = [
        (
            sample.input_ids,
            sample.loss_mask,
            sample.context.decode(),
            sample.last_hidden.decode(),
            sample.last_spans,
        )
        for sample in (first, second)
    ]
    return first.sample_id == second.sample_id and all(
        torch.equal(a, b) for a, b in zip(*tensors, strict=True)
    )


def write_shard(
    path: Path, samples: Sequence[HiddenSample], *, shard: int = 7, layout: Layout = LAYOUT
) -> WrittenShard:
    with ShardWriter(path, layout, shard) as writer:
        for sample in samples:
            writer.write(writer.encode(sample, held_out=0))
        return writer.finish()


def make_cache(
    artifact: Artifact, shards: Sequence[Sequence[HiddenSample]], layout: Layout = LAYOUT
) -> Artifact:
    """A sealed cache of these samples."""
    from deepspec.artifacts.records import Counts
    from deepspec.cache.index import INDEX, write_index
    from deepspec.cache.reader import SCHEMA

    artifact.create({})
    artifact.store.write(artifact.path(SCHEMA), layout.schema.serialize().to_pybytes())
    for shard, samples in enumerate(shards):
        with artifact.store.staged() as local:
            written = write_shard(local, samples, shard=shard, layout=layout)
            counts = Counts(rows=len(samples), **written._asdict())
            artifact.commit(shard, local, counts, upstream="up")
    write_index(artifact, list(artifact.records().values()))
    artifact.seal(shards=range(len(shards)), files=(SCHEMA, INDEX), inputs={})
    return artifact
