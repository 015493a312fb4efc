// Counts the bytes that kernels load and store. The kernels are compiled for ThreadSanitizer, so they call a hook at
// every access; these hooks count instead. There is no cache: what a kernel loads twice counts twice.
#include <cstdint>
#include <unordered_map>

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define VISIBLE extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint64_t kLine = 16;  // no two allocations share a line: malloc aligns to as much

struct Counts {
  int64_t read = 0, written = 0;
};

std::unordered_map<uint64_t, Counts> lines;

void count(const void* from, uint64_t size, bool written) {
  uint64_t at = reinterpret_cast<uint64_t>(from);
  while (size > 0) {
    const uint64_t here = size < kLine - at % kLine ? size : kLine - at % kLine;
    Counts& counts = lines[at / kLine];
    (written ? counts.written : counts.read) += static_cast<int64_t>(here);
    at += here;
    size -= here;
  }
}

}  // namespace

VISIBLE void count_from_zero() { lines.clear(); }

VISIBLE void bytes_within(const void* from, int64_t size, int64_t* read, int64_t* written) {
  const uint64_t first = reinterpret_cast<uint64_t>(from) / kLine;
  *read = *written = 0;
  for (uint64_t line = first; line * kLine < reinterpret_cast<uint64_t>(from) + static_cast<uint64_t>(size); ++line)
    if (const auto found = lines.find(line); found != lines.end()) {
      *read += found->second.read;
      *written += found->second.written;
    }
}

HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_read1(void* at) { count(at, 1, false); }
HOOK void __tsan_read2(void* at) { count(at, 2, false); }
HOOK void __tsan_read4(void* at) { count(at, 4, false); }
HOOK void __tsan_read8(void* at) { count(at, 8, false); }
HOOK void __tsan_read16(void* at) { count(at, 16, false); }
HOOK void __tsan_read_range(void* at, unsigned long size) { count(at, size, false); }
HOOK void __tsan_write1(void* at) { count(at, 1, true); }
HOOK void __tsan_write2(void* at) { count(at, 2, true); }
HOOK void __tsan_write4(void* at) { count(at, 4, true); }
HOOK void __tsan_write8(void* at) { count(at, 8, true); }
HOOK void __tsan_write16(void* at) { count(at, 16, true); }
HOOK void __tsan_write_range(void* at, unsigned long size) { count(at, size, true); }
