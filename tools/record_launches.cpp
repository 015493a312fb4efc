// Replaces the host runtime of tests/simt: a launch is recorded and nothing runs. The launchers of the CUDA kernels
// thus report what they would launch on a device, at any size and without delay.
#include <cstdlib>
#include <vector>

#include "../tests/simt/simt.h"

#define VISIBLE extern "C" __attribute__((visibility("default")))

simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

struct Launch {
  int64_t blocks, threads, shared_bytes;
};

std::vector<Launch> launches;
int64_t shared_bytes = 0;
int sms = 0;

}  // namespace

VISIBLE void simulate_device(int64_t most_shared_bytes, int multiprocessors) {
  shared_bytes = most_shared_bytes;
  sms = multiprocessors;
}

// The next launch, first in first out; false when there is none.
VISIBLE bool next_launch(int64_t* blocks, int64_t* threads, int64_t* shared) {
  if (launches.empty()) return false;
  *blocks = launches.front().blocks;
  *threads = launches.front().threads;
  *shared = launches.front().shared_bytes;
  launches.erase(launches.begin());
  return true;
}

namespace simt {

void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>&) {
  launches.push_back({blocks, threads, shared});
}

int64_t shared_limit() { return shared_bytes; }
int multiprocessors() { return sms; }

// Only a kernel calls these.
float* shared_memory() { std::abort(); }
void wait_for_block(const char*, int) { std::abort(); }
uint64_t exchange(Exchange, unsigned, uint64_t, int, const char*, int) { std::abort(); }
void fence() { std::abort(); }
unsigned add(unsigned*, unsigned) { std::abort(); }
void fail(const char*, const char*, int) { std::abort(); }

}  // namespace simt
