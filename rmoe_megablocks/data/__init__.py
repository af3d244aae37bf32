"""The data room: text into Megatron's indexed datasets, what they hold, and a baseline to compare with.

Importing this package needs neither torch nor Megatron; only writing a dataset does.
"""

from rmoe_megablocks.data.build import prepare
from rmoe_megablocks.data.embedded import embedded_corpus, prepare_embedded
from rmoe_megablocks.data.errors import DataError
from rmoe_megablocks.data.ngram import bigram_bits_per_byte, dataset_bigram_bits_per_byte
from rmoe_megablocks.data.prepared.indexed import id_range, read_index, read_tokens
from rmoe_megablocks.data.prepared.metadata import DatasetMetadata, check_tokenizer, dataset_dir, metadata_beside
from rmoe_megablocks.data.reading.compression import open_text
from rmoe_megablocks.data.tokenizers import make_tokenizer

__all__ = [
    "DataError",
    "DatasetMetadata",
    "bigram_bits_per_byte",
    "check_tokenizer",
    "dataset_bigram_bits_per_byte",
    "dataset_dir",
    "embedded_corpus",
    "id_range",
    "make_tokenizer",
    "metadata_beside",
    "open_text",
    "prepare",
    "prepare_embedded",
    "read_index",
    "read_tokens",
]
