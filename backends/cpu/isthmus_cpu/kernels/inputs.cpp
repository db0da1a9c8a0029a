// A step's inputs from its plan, over the arrays that all steps share.
#include <cstdint>
#include <cstring>

// As Buffers in inputs.py.  Rows of `history` and `tables` are those of the device's state.
struct Buffers {
  int32_t *token_ids, *positions;
  int64_t* slots;
  int32_t *span_rows, *query_starts, *context_lengths, *sample_tokens, *sample_rows, *token_rows, *history, *tables;
  int64_t history_width, table_width, block_size, max_rows;
  // What the last plan filled, and beyond which everything is padding.
  int64_t tokens, spans, samples, longest_query, longest_context;
};

extern "C" {

int isthmus_buffers_bytes() { return int(sizeof(Buffers)); }

// Where blocks are appended to tables, and where a plan's spans, of which `span_samples` says which are
// sampled, put their tokens.  What the plan before filled further becomes padding: tokens and samples of
// the padding row, spans of no length, slots of the spare block.
void isthmus_prepare(Buffers* b, int64_t appends, const int32_t* block_rows, const int32_t* block_indices,
                     const int32_t* block_ids, int64_t spans, const int32_t* span_rows, const int32_t* span_starts,
                     const int32_t* span_lengths, const uint8_t* span_samples) {
  for (int64_t n = 0; n < appends; n++) b->tables[block_rows[n] * b->table_width + block_indices[n]] = block_ids[n];
  int64_t token = 0, sample = 0;
  b->longest_query = b->longest_context = 0;
  for (int64_t span = 0; span < spans; span++) {
    const int64_t row = span_rows[span], start = span_starts[span], length = span_lengths[span];
    const int32_t* table = b->tables + row * b->table_width;
    for (int64_t position = start; position < start + length; position++, token++) {
      b->token_rows[token] = int32_t(row);
      b->positions[token] = int32_t(position);
      b->slots[token] = table[position / b->block_size] * b->block_size + position % b->block_size;
    }
    b->span_rows[span] = int32_t(row);
    b->context_lengths[span] = int32_t(start + length);
    b->query_starts[span + 1] = int32_t(token);
    if (span_samples[span]) {
      b->sample_tokens[sample] = int32_t(token - 1);
      b->sample_rows[sample++] = int32_t(row);
    }
    if (length > b->longest_query) b->longest_query = length;
    if (start + length > b->longest_context) b->longest_context = start + length;
  }
  const int32_t padding = int32_t(b->max_rows);
  for (int64_t n = token; n < b->tokens; n++) {
    b->token_rows[n] = padding;
    b->positions[n] = b->token_ids[n] = 0;
    b->slots[n] = 0;
  }
  for (int64_t n = spans; n < b->spans; n++) {
    b->span_rows[n] = padding;
    b->context_lengths[n] = 0;
  }
  for (int64_t n = spans; n < b->max_rows; n++) b->query_starts[n + 1] = int32_t(token);
  for (int64_t n = sample; n < b->samples; n++) {
    b->sample_tokens[n] = 0;
    b->sample_rows[n] = padding;
  }
  b->tokens = token;
  b->spans = spans;
  b->samples = sample;
}

// Token ids as the history holds them now.
void isthmus_read_tokens(Buffers* b) {
  for (int64_t n = 0; n < b->tokens; n++) {
    b->token_ids[n] = b->history[b->token_rows[n] * b->history_width + b->positions[n]];
  }
}

// Sampled tokens into the history, each at the position after its span.
void isthmus_write_tokens(Buffers* b, int64_t count, const int32_t* tokens) {
  for (int64_t n = 0; n < count; n++) {
    b->history[b->sample_rows[n] * b->history_width + b->positions[b->sample_tokens[n]] + 1] = tokens[n];
  }
}
}
