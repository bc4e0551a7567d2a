"""From files to tokens with owners: sources, records, templates, tokens, partitions, batches.

rows = load_rows("data/dolly")
records = read_records(rows)
encoded = encode(records, tokenizer, max_length=512, overlong="drop")
rows = rows.select(encoded.kept)
partition = dirichlet(rows.column("category"), 10, concentration=0.5, seed=1)
clients = [encoded.tokens.select(partition.rows_of(k)) for k in range(partition.num_clients)]
"""

from fedloom.data.answer_frame import AnswerFrame, answer_frame, plain_frame
from fedloom.data.batches import batches, num_batches
from fedloom.data.division import Division, Scheme, divide
from fedloom.data.encoding import (
    Encoded,
    EncodingCounts,
    LossOn,
    Overlong,
    Unanswered,
    encode,
    resolve_template,
)
from fedloom.data.holdout import HoldOut, hold_out, hold_out_by_category
from fedloom.data.layouts import write_shepherd
from fedloom.data.partition import Partition
from fedloom.data.records import Dialogue, Prompt, Record, Records, Shape, Turn, detect_shape, read_records
from fedloom.data.schemes import by_category, by_length, by_power_law, by_size, dirichlet, iid, natural, shards
from fedloom.data.sources import Row, Rows, Split, load_rows
from fedloom.data.templates import ChatTemplate, Rendered, Template, default_template, load_template, shipped_templates
from fedloom.data.token_rows import PromptTokens, record_prompts, render, text_prompts
from fedloom.data.tokenizer import byte_tokenizer, load_tokenizer
from fedloom.data.tokens import TokenSet

__all__ = [
    "AnswerFrame",
    "ChatTemplate",
    "Dialogue",
    "Division",
    "Encoded",
    "EncodingCounts",
    "HoldOut",
    "LossOn",
    "Overlong",
    "Partition",
    "Prompt",
    "PromptTokens",
    "Record",
    "Records",
    "Rendered",
    "Row",
    "Rows",
    "Scheme",
    "Shape",
    "Split",
    "Template",
    "TokenSet",
    "Turn",
    "Unanswered",
    "answer_frame",
    "batches",
    "by_category",
    "by_length",
    "by_power_law",
    "by_size",
    "byte_tokenizer",
    "default_template",
    "detect_shape",
    "dirichlet",
    "divide",
    "encode",
    "hold_out",
    "hold_out_by_category",
    "iid",
    "load_rows",
    "load_template",
    "load_tokenizer",
    "natural",
    "num_batches",
    "plain_frame",
    "read_records",
    "record_prompts",
    "render",
    "resolve_template",
    "shards",
    "shipped_templates",
    "text_prompts",
    "write_shepherd",
]
