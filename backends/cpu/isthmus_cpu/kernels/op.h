// One operation of a tape: what to run, over which memory, with which numbers.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

enum Kind : int32_t {
  kEmbed, kRmsNorm, kAddRmsNorm, kAdd, kGated, kTakeRows, kLinear, kRotateStore, kPlanAttention, kAttend,
  kExperts, kSoftcap, kArgmax, kRead, kDraw, kLogprobs, kKinds
};

// How many rows an operation runs over: a number of its own, or one of the step's counts.
enum Rows : int32_t { kFixed, kTokens, kSpans, kSamples };

struct Op {
  int32_t kind;
  int32_t rows;
  int64_t fixed;  // rows, where rows == kFixed
  void* p[12];
  int64_t i[12];
  float f[4];
};

// What of a step is not known when a tape is made.  Filled by the inputs part, read by every run.
struct Counts {
  int64_t tokens, spans, samples;
};

struct Pool;

// What one thread sees of a run.
struct Worker {
  Pool* pool;
  int index;
  int count;
  void* scratch(size_t bytes);           // this thread's own memory, valid until its next call
  int64_t take(int64_t chunk);           // the next unclaimed index of this phase; see Pool
  void barrier();                        // all threads arrive; take() starts again from 0
};

using Kernel = void (*)(const Op&, int64_t rows, Worker&);

#define KERNEL(name) void name(const Op& op, int64_t rows, Worker& worker)
KERNEL(run_embed);
KERNEL(run_rms_norm);
KERNEL(run_add_rms_norm);
KERNEL(run_add);
KERNEL(run_gated);
KERNEL(run_take_rows);
KERNEL(run_linear);
KERNEL(run_rotate_store);
KERNEL(run_plan_attention);
KERNEL(run_attend);
KERNEL(run_experts);
KERNEL(run_softcap);
KERNEL(run_argmax);
KERNEL(run_read);
KERNEL(run_draw);
KERNEL(run_logprobs);
