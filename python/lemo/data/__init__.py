"""Text and token files -> documents -> windows packed to the context.

Sources are given as strings, `[NAME=]WHERE`:

  notes.txt             any text file: one document (UTF-8)
  corpus.jsonl          one JSON object per line; also *.ndjson, and *.json (a list of objects, or one per line)
  table.csv             a record per row, the first line names the columns; also *.tsv
  part-0.parquet        records; also *.arrow and *.feather
  tokens.bin, *.npy     tokens (`lemo.data.tokens`); documents end at the end-of-text token if there is one
  folder/               every file of these kinds below it, sorted, but for hidden files and folders; or a data set
                        that `save_to_disk` wrote
  'src/**/*.py'         a glob
  hf:NAME[:SPLIT]       a Hugging Face data set by name (default split: train)

Suffixes may be in upper case and all files but Parquet's kind compressed as .gz, .bz2, .xz or .zst. NAME labels the
source in reports (default: the last part of the path).

A record holds `input_ids` (with `labels` and `attention_mask` if present), `text`, `messages` (through the
tokenizer's chat template; a list, or its JSON if a table has no lists), or `prompt` and `completion`; `text_field`
names another field. Labels are all tokens, or the answers alone on request or if the data mark them.

A window is `context` tokens cut from documents laid end to end; `position_ids` restart at 0 and the label is ignored
wherever a document begins, so nothing crosses a document boundary. Order depends on the seed alone, not on any
library's random generator.
"""

from lemo.data.documents import DataError, Documents
from lemo.data.load import load_documents
from lemo.data.order import permutation
from lemo.data.records import IGNORE_INDEX
from lemo.data.split import split_held_out
from lemo.data.tokens import TOKEN_DTYPES, write_tokens
from lemo.data.windows import CutWindows, PackedWindows, evaluation_pieces, evaluation_spans

__all__ = [
    "IGNORE_INDEX",
    "TOKEN_DTYPES",
    "CutWindows",
    "DataError",
    "Documents",
    "PackedWindows",
    "evaluation_pieces",
    "evaluation_spans",
    "load_documents",
    "permutation",
    "split_held_out",
    "write_tokens",
]
