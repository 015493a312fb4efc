// The runtime behind simt.h. It is never compiled with a sanitizer, so that only accesses of kernels are checked.
// -DSIMT_THREAD_SANITIZER or -DSIMT_ADDRESS_SANITIZER names the sanitizer that the kernels are compiled with.
#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef SIMT_THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

#if defined(__x86_64__) && !defined(SIMT_THREAD_SANITIZER) && !defined(SIMT_ADDRESS_SANITIZER)
#define SIMT_FAST_SWITCH
// Saves the registers that a call must preserve and continues on another stack. A hundred times faster than
// swapcontext.
extern "C" void simt_switch(void** from, void* to);
asm(".text\n.globl simt_switch\n.hidden simt_switch\nsimt_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
#endif

simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kNoSync = 1;  // switching fibers orders no memory

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  State state = State::kDone;
  bool fenced = false;
  const char* file = "";
  int line = 0;
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  ucontext_t context;
  void* tsan = nullptr;
};

struct Warp {
  Exchange kind = Exchange::kNothing;
  unsigned mask = 0, arrived = 0, generation = 0;
  uint64_t value[32], result[32];
  int argument[32];
  const char* file = "";
  int line = 0;
};

struct World {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned threads = 0, alive = 0, at_barrier = 0, generation = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  char end_tag;
  // What ThreadSanitizer orders by: two tags in turn for the thread block, two for each warp. New for each thread
  // block.
  char* tags = nullptr;
  const std::function<void()>* body = nullptr;
  float* shared = nullptr;
  std::vector<void*> used_memory, used_fibers;  // kept to the end of the grid: reuse would order thread blocks
  void* main_pointer = nullptr;
  ucontext_t main_context;
  void* main_tsan = nullptr;
  std::string error;
  std::mt19937 random;
};
World world;

Fiber& current() { return world.fibers[threadIdx.x]; }

int64_t setting(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : otherwise;
}

void to_main() {
  const unsigned self = threadIdx.x;
  Fiber& fiber = world.fibers[self];
#ifdef SIMT_THREAD_SANITIZER
  __tsan_switch_to_fiber(world.main_tsan, kNoSync);
#endif
#ifdef SIMT_FAST_SWITCH
  simt_switch(&fiber.stack_pointer, world.main_pointer);
#else
  swapcontext(&fiber.context, &world.main_context);
#endif
}

void resume(unsigned thread) {
  Fiber& fiber = world.fibers[thread];
  threadIdx.x = thread;
#ifdef SIMT_THREAD_SANITIZER
  __tsan_switch_to_fiber(fiber.tsan, kNoSync);
#endif
#ifdef SIMT_FAST_SWITCH
  simt_switch(&world.main_pointer, fiber.stack_pointer);
#else
  swapcontext(&world.main_context, &fiber.context);
#endif
}

void run_thread() {
  (*world.body)();
  __tsan_release(&world.end_tag);
  current().state = State::kDone;
  --world.alive;
  to_main();
  std::abort();
}

void start(unsigned thread) {
  Fiber& fiber = world.fibers[thread];
  const int fresh = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!fiber.stack) fiber.stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, fresh, -1, 0));
#ifdef SIMT_THREAD_SANITIZER
  else  // a new mapping clears what ThreadSanitizer knows of an earlier thread on this stack
    mmap(fiber.stack, kStackBytes, PROT_READ | PROT_WRITE, fresh | MAP_FIXED, -1, 0);
  fiber.tsan = __tsan_create_fiber(0);
#endif
  fiber.state = State::kReady;
  fiber.fenced = false;
#ifdef SIMT_FAST_SWITCH
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // run_thread never returns
  *--top = reinterpret_cast<void*>(run_thread);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
#endif
}

// Memory of exactly this size, so that AddressSanitizer sees reads behind it, filled with 0xFF…: NaN.
float* poisoned(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, static_cast<size_t>(bytes))) throw std::bad_alloc();
  for (int64_t i = 0; i < bytes / 4; ++i) static_cast<volatile uint32_t*>(memory)[i] = ~0u;
  return static_cast<float*>(memory);
}

std::string place(const char* file, int line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

void set_error(const char* what, const char* file, int line) {
  if (world.error.empty())
    world.error = std::string("simt: ") + what + " at " + place(file, line) + ", block " + std::to_string(blockIdx.x) +
                  ", thread " + std::to_string(threadIdx.x);
}

void run_block() {
  world.alive = world.threads;
  world.at_barrier = 0;
  world.barrier_file = nullptr;
  for (unsigned thread = 0; thread < world.threads; ++thread) start(thread);
  std::vector<unsigned> order(world.threads);
  std::iota(order.begin(), order.end(), 0u);
  const int64_t seed = setting("FASTKM_SIMT_SEED", 0);
  if (seed < 0) std::reverse(order.begin(), order.end());
  while (world.alive > 0 && world.error.empty()) {
    if (seed > 0) std::shuffle(order.begin(), order.end(), world.random);
    bool ran = false;
    for (unsigned thread : order) {
      if (world.fibers[thread].state != State::kReady) continue;
      ran = true;
      resume(thread);
      if (!world.error.empty()) return;
    }
    if (ran) continue;
    for (unsigned thread = 0; thread < world.threads; ++thread) {
      const Fiber& fiber = world.fibers[thread];
      threadIdx.x = thread;
      if (fiber.state == State::kAtBarrier)
        set_error("deadlock: a barrier that not every thread reaches", fiber.file, fiber.line);
      if (fiber.state == State::kInWarp)
        set_error("deadlock: a warp operation that not every lane of its mask reaches", fiber.file, fiber.line);
    }
  }
}

// The product of a warp in the layout of the PTX manual. Tensor cores ignore the low 13 bits of their operands.
void multiply(Warp& warp) {
  const auto rounded = [](uint32_t bits) { return static_cast<double>(__uint_as_float(bits & 0xFFFFE000u)); };
  double a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *reinterpret_cast<const Fragments*>(warp.value[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int n = 0; n < 4; ++n) a[group + n % 2 * 8][member + n / 2 * 4] = rounded(own.a[n]);
    for (int n = 0; n < 2; ++n) b[member + n * 4][group] = rounded(own.b[n]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* sum = reinterpret_cast<const Fragments*>(warp.value[lane])->sum;
    for (int n = 0; n < 4; ++n) {
      double total = sum[n];
      for (int k = 0; k < 8; ++k) total += a[lane / 4 + n / 2 * 8][k] * b[k][lane % 4 * 2 + n % 2];
      sum[n] = static_cast<float>(total);
    }
  }
}

void finish(Warp& warp, const char* file, int line) {
  if (warp.kind == Exchange::kMultiply) multiply(warp);
  for (int lane = 0; lane < 32; ++lane) {
    if (!(warp.mask >> lane & 1)) continue;
    int from = lane;
    if (warp.kind == Exchange::kXor) from = (lane ^ warp.argument[lane]) & 31;
    if (warp.kind == Exchange::kIndex) from = warp.argument[lane] & 31;
    if (!(warp.mask >> from & 1)) fail("a shuffle reads a lane outside its mask", file, line);
    warp.result[lane] = warp.value[from];
  }
}

}  // namespace

void fail(const char* what, const char* file, int line) {
  set_error(what, file, line);
  to_main();
  std::abort();
}

float* shared_memory() { return world.shared; }
int64_t shared_limit() { return setting("FASTKM_SIMT_SHARED", 227 * 1024); }
int multiprocessors() { return static_cast<int>(setting("FASTKM_SIMT_SMS", 4)); }

void wait_for_block(const char* file, int line) {
  if (world.barrier_file && (std::strcmp(world.barrier_file, file) || world.barrier_line != line)) {
    static std::string what;
    what = "divergent barrier, others wait at " + place(world.barrier_file, world.barrier_line);
    fail(what.c_str(), file, line);
  }
  if (world.alive != world.threads) fail("a barrier after some threads have ended", file, line);
  Fiber& self = current();
  char* const tag = &world.tags[world.generation % 2];
  __tsan_release(tag);
  world.barrier_file = file;
  world.barrier_line = line;
  self.file = file;
  self.line = line;
  self.state = State::kAtBarrier;
  if (++world.at_barrier == world.threads) {
    for (unsigned thread = 0; thread < world.threads; ++thread) world.fibers[thread].state = State::kReady;
    world.at_barrier = 0;
    world.barrier_file = nullptr;
    ++world.generation;
  }
  to_main();
  __tsan_acquire(tag);
}

uint64_t exchange(Exchange kind, unsigned mask, uint64_t value, int argument, const char* file, int line) {
  Fiber& self = current();
  const unsigned lane = threadIdx.x % 32;
  Warp& warp = world.warps[threadIdx.x / 32];
  if (!(mask >> lane & 1)) fail("a lane is not in the mask it names", file, line);
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.kind = kind;
    warp.file = file;
    warp.line = line;
  } else if (warp.mask != mask) {
    fail("lanes of one warp operation name different masks", file, line);
  } else if (warp.kind != kind || warp.line != line || std::strcmp(warp.file, file)) {
    fail("divergent warp operation", file, line);
  }
  warp.value[lane] = value;
  warp.argument[lane] = argument;
  warp.arrived |= 1u << lane;
  char* const tag = &world.tags[2 + threadIdx.x / 32 * 2 + warp.generation % 2];
  const bool orders = kind == Exchange::kNothing;  // shuffles and products order no memory
  if (orders) __tsan_release(tag);
  self.file = file;
  self.line = line;
  self.state = State::kInWarp;
  if (warp.arrived == mask) {
    finish(warp, file, line);
    warp.arrived = 0;
    ++warp.generation;
    const unsigned first = threadIdx.x / 32 * 32;
    for (unsigned other = 0; other < 32; ++other)
      if (mask >> other & 1) world.fibers[first + other].state = State::kReady;
  }
  to_main();
  if (orders) __tsan_acquire(tag);
  return warp.result[lane];
}

// A fence before an atomic orders all earlier accesses for every thread that sees the atomic.
void fence() { current().fenced = true; }

unsigned add(unsigned* to, unsigned value) {
  if (current().fenced) __tsan_release(to);
  current().fenced = false;
  const unsigned before = *to;
  *to = before + value;
  __tsan_acquire(to);
  return before;
}

void launch(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body) {
  if (threads < 1 || threads > 1024) throw std::runtime_error("simt: a block has 1 to 1024 threads");
  if (blocks < 1 || blocks > INT32_MAX) throw std::runtime_error("simt: a grid has 1 to 2^31 - 1 blocks");
  if (shared_bytes > shared_limit()) throw std::runtime_error("simt: more shared memory than there is");
  const int64_t seed = setting("FASTKM_SIMT_SEED", 0);
  world.random.seed(static_cast<unsigned>(seed));
  world.threads = static_cast<unsigned>(threads);
  world.body = &body;
  world.error.clear();
  blockDim.x = world.threads;
  gridDim.x = static_cast<unsigned>(blocks);
  if (world.fibers.size() < world.threads) world.fibers.resize(world.threads);
#ifdef SIMT_THREAD_SANITIZER
  world.main_tsan = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0u);
  if (seed < 0) std::reverse(order.begin(), order.end());
  if (seed > 0) std::shuffle(order.begin(), order.end(), world.random);
  const auto destroy_fibers = [] {
#ifdef SIMT_THREAD_SANITIZER
    for (void* fiber : world.used_fibers) __tsan_destroy_fiber(fiber);
    world.used_fibers.clear();
#endif
  };
  for (unsigned block : order) {
    blockIdx.x = block;
    world.warps.assign((world.threads + 31) / 32, Warp());
    world.shared = poisoned(shared_bytes);
    world.tags = static_cast<char*>(std::malloc(2 + 2 * world.warps.size()));
    world.used_memory.insert(world.used_memory.end(), {world.shared, world.tags});
    run_block();
    if (!world.error.empty()) break;
#ifdef SIMT_THREAD_SANITIZER
    for (unsigned thread = 0; thread < world.threads; ++thread) world.used_fibers.push_back(world.fibers[thread].tsan);
    if (world.used_fibers.size() + world.threads > 7900) destroy_fibers();  // ThreadSanitizer holds no more fibers
#else
    for (void* memory : world.used_memory) std::free(memory);
    world.used_memory.clear();
#endif
  }
  __tsan_acquire(&world.end_tag);
  for (void* memory : world.used_memory) std::free(memory);
  world.used_memory.clear();
  destroy_fibers();
  if (!world.error.empty()) throw std::runtime_error(world.error);
}

}  // namespace simt
