// Threads that run a tape together: awake and spinning within a run, asleep between runs.
#include <pthread.h>
#include <sched.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "op.h"

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr std::chrono::microseconds kLinger{300};

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { free(memory); }
};

struct Pool {
  explicit Pool(int count) : count(count), scratch(count) {
    for (int i = 1; i < count; i++) threads.emplace_back([this, i] { loop(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stopping = true;
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    for (auto& thread : threads) thread.join();
  }

  // `alone`: on the calling thread, for work that is not worth waking others for.
  void run(const Op* tape, int64_t length, const Counts& step, bool alone) {
    std::lock_guard<std::mutex> one_run(running);
    ops = tape;
    num_ops = length;
    counts = step;
    next.store(0, std::memory_order_relaxed);
    if (!alone && count > 1) {
      {
        std::lock_guard<std::mutex> lock(mutex);
        generation.fetch_add(1, std::memory_order_release);
      }
      wake.notify_all();
    }
    play(0, alone ? 1 : count);
  }

  void play(int index, int playing);
  template <class Before>
  void arrive(Before before);

  void loop(int index) {
    uint64_t seen = 0;
    for (;;) {
      linger(seen);
      {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return generation.load(std::memory_order_relaxed) != seen; });
        seen = generation.load(std::memory_order_relaxed);
        if (stopping) return;
      }
      play(index, count);
    }
  }

  // The next run of a step often follows within microseconds, sooner than a sleeper would wake.  Meanwhile
  // whoever else wants this core gets it.
  void linger(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kLinger;
    do {
      for (int n = 0; n < 16; n++) {
        if (generation.load(std::memory_order_acquire) != seen) return;
        relax();
      }
      sched_yield();
    } while (std::chrono::steady_clock::now() < until);
  }

  const int count;
  std::vector<Scratch> scratch;
  std::vector<std::thread> threads;
  std::mutex running, mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> generation{0};
  bool stopping = false;
  const Op* ops = nullptr;
  int64_t num_ops = 0;
  Counts counts{};
  int64_t position = 0;  // the operation that the next phase runs
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> phase{0};
};

// The last to arrive opens the next phase, after doing `before` alone.  A waiter spins for a while, then
// gives its core away at every look, because whoever is late may be waiting for that very core.
template <class Before>
void Pool::arrive(Before before) {
  const uint32_t now = phase.load(std::memory_order_relaxed);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
    arrived.store(0, std::memory_order_relaxed);
    next.store(0, std::memory_order_relaxed);
    before();
    phase.store(now + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase.load(std::memory_order_acquire) == now; spins++) {
    if (spins < 1000) {
      relax();
    } else {
      sched_yield();
    }
  }
}

void* Worker::scratch(size_t bytes) {
  Scratch& mine = pool->scratch[index];
  if (mine.bytes < bytes) {
    free(mine.memory);
    mine.bytes = (bytes + 4095) & ~size_t(4095);
    mine.memory = aligned_alloc(4096, mine.bytes);
    if (mine.memory == nullptr) abort();
  }
  return mine.memory;
}

int64_t Worker::take(int64_t chunk) { return pool->next.fetch_add(chunk, std::memory_order_relaxed); }

void Worker::barrier() {
  if (count == 1) {
    pool->next.store(0, std::memory_order_relaxed);
  } else {
    pool->arrive([] {});
  }
}

static const Kernel kKernels[kKinds] = {
    run_embed,      run_rms_norm,       run_add_rms_norm, run_add,     run_gated,   run_take_rows, run_linear,
    run_rotate_store, run_plan_attention, run_attend,       run_experts, run_softcap, run_argmax,
    run_read,       run_draw,           run_logprobs,
};

// Elements of an operation that one thread has done before two have agreed to share it.
constexpr int64_t kLightElements = 4096;

static bool is_light(const Op& op, int64_t rows) {
  switch (op.kind) {
    case kPlanAttention: return true;
    case kRmsNorm:
    case kAddRmsNorm:
    case kAdd:
    case kEmbed:
    case kTakeRows: return rows * op.i[0] <= kLightElements;
    case kRotateStore: return rows * (op.i[0] + 2 * op.i[1]) * op.i[2] <= kLightElements;
    default: return false;
  }
}

void Pool::play(int index, int playing) {
  // Copies: once the last barrier is passed, the next run may already be written here.
  const Op* const tape = ops;
  const int64_t length = num_ops;
  const Counts step = counts;
  const auto rows_of = [&](const Op& op) {
    const int64_t numbers[] = {op.fixed, step.tokens, step.spans, step.samples};
    return numbers[op.rows];
  };
  Worker together{this, index, playing}, alone{this, index, 1};
  if (playing == 1) {
    for (int64_t n = 0; n < length; n++) {
      kKernels[tape[n].kind](tape[n], rows_of(tape[n]), alone);
      alone.barrier();
    }
    return;
  }
  for (int64_t n = 0; n < length; n = position) {
    kKernels[tape[n].kind](tape[n], rows_of(tape[n]), together);
    arrive([&] {
      int64_t following = n + 1;
      for (; following < length && is_light(tape[following], rows_of(tape[following])); following++) {
        kKernels[tape[following].kind](tape[following], rows_of(tape[following]), alone);
        alone.barrier();
      }
      position = following;
    });
  }
}

extern "C" {

Pool* isthmus_pool_open(int threads) { return new (std::nothrow) Pool(threads); }

void isthmus_pool_close(Pool* pool) { delete pool; }

void isthmus_run(Pool* pool, const Op* ops, int64_t length, const Counts* counts, int alone) {
  pool->run(ops, length, *counts, alone != 0);
}

// So that the caller can check that it lays records out as this library does.
int isthmus_op_bytes() { return int(sizeof(Op)); }

const char* isthmus_instructions() {
#if defined(__AVX512BF16__)
  return "AVX512-BF16";
#elif defined(__AVX512F__)
  return "AVX512";
#elif defined(__AVX2__) && defined(__FMA__)
  return "AVX2";
#elif defined(__AVX__)
  return "AVX";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "generic";
#endif
}
}
