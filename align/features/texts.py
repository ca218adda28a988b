"""The captions behind a caption store, which keeps a hash of each one's words: read again from the data they were encoded from."""

from align.common.errors import DataError
from align.common.files import hash64
from align.common.reject_codes import Reject
from align.features.store import FeatureStore
from align.sources.gate import Limits, split_captions
from align.sources.plan import Plan, Source, open_shard


def texts_of_shard(store: FeatureStore, shard: int, source: Source, plan: Plan, column: str) -> list[str]:
    """Return the caption of each row of one shard of a caption store, in order; no image is read.

    Captions are found by their words, so `source` need not name the key column. UsageError if the store has no hashes of words,
    DataError if the data does not hold these captions any more.
    """
    known: dict[int, str] = {}
    for row in open_shard(source, plan, shard).rows(images=False):
        try:
            texts, _ = split_captions(row.cell(column), Limits())
        except Reject:
            continue
        known.update(zip(hash64(texts).tolist(), texts, strict=True))
    wanted = store.text_ids[store.starts[shard] : store.starts[shard + 1]].tolist()
    missing = sum(one not in known for one in wanted)
    if missing:
        file = plan.shards["file"][shard].as_py()
        raise DataError(f"{file} lacks {missing} of {len(wanted)} captions that {store.folder} was made of; restore it, or encode again")
    return [known[one] for one in wanted]
