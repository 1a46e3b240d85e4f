#include "program/threads.h"

#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace kbit {
namespace {

// Looks at a value before parking. Inside a pass the others are at most a piece of work away; between two passes lies the
// sampling of a token, which takes about as long as waking a parked thread (docs/measurements.md).
constexpr int kLooksInPass = 2000, kLooksBetween = 10000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` does nothing on most cores; isb is about as long as pause
#endif
}

// Waits until `value` is no longer `old`.
void wait_while(std::atomic<std::uint32_t>& value, std::uint32_t old, int looks) {
  for (int i = 0; i < looks; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

}  // namespace

struct Team::State {
  alignas(64) std::atomic<std::uint32_t> job{0};         // changes when there is a new call, or the end
  alignas(64) std::atomic<std::uint32_t> generation{0};  // changes when a barrier opens
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<std::uint32_t> left{0};        // members that have finished the call
  Call call = nullptr;
  void* context = nullptr;
  Team* team = nullptr;
  bool ended = false;
  long process = 0;
};

Team::Team(int size) : size_(size), loops_(size > 1 ? kLoops : 0) { start_threads(); }

Team::~Team() {
  state_->ended = true;
  state_->job.fetch_add(1, std::memory_order_release);
  state_->job.notify_all();
}

void Team::start_threads() {
  state_ = std::make_shared<State>();
  state_->process = process_id();
  for (int index = 1; index < size_; ++index) {
    // Detached: a member that waits owns nothing but its share of the state, and ends when it is told.
    std::thread([state = state_, index] {
      std::uint32_t seen = 0;
      for (;;) {
        wait_while(state->job, seen, kLooksBetween);
        ++seen;
        if (state->ended) return;
        Worker worker(*state->team, index);
        state->call(state->context, worker);
        state->left.fetch_add(1, std::memory_order_acq_rel);
        state->left.notify_all();
      }
    }).detach();
  }
}

void Team::run(Call call, void* context) {
  const std::lock_guard<std::mutex> lock(turn_);
  Worker worker(*this, 0);
  if (size_ == 1) return call(context, worker);
  if (state_->process != process_id()) start_threads();  // a forked child has none of its parent's threads
  for (std::size_t i = 0; i < used_; ++i) {
    loops_[i].next.store(0, std::memory_order_relaxed);
    loops_[i].done.store(0, std::memory_order_relaxed);
  }
  used_ = 0;
  State& state = *state_;
  state.team = this;
  state.call = call;
  state.context = context;
  state.left.store(0, std::memory_order_relaxed);
  state.job.fetch_add(1, std::memory_order_release);
  state.job.notify_all();
  call(context, worker);
  wait_for(state.left, static_cast<std::uint32_t>(size_ - 1));
}

void Team::wait_for(std::atomic<std::uint32_t>& value, std::uint32_t wanted) {
  for (int i = 0; i < kLooksInPass; ++i) {
    if (value.load(std::memory_order_acquire) == wanted) return;
    relax();
  }
  for (std::uint32_t seen; (seen = value.load(std::memory_order_acquire)) != wanted;) {
    value.wait(seen, std::memory_order_acquire);
  }
}

Team::Loop& Team::loop(std::size_t& index, int member) {
  if (index == kLoops) {  // start over: once everybody is here, nobody is behind in any of them
    meet();
    if (member == 0) {
      for (Loop& loop : loops_) {
        loop.next.store(0, std::memory_order_relaxed);
        loop.done.store(0, std::memory_order_relaxed);
      }
    }
    meet();
    index = 0;
  }
  if (member == 0 && index >= used_) used_ = index + 1;
  return loops_[index++];
}

void Team::meet() {
  State& state = *state_;
  const std::uint32_t generation = state.generation.load(std::memory_order_acquire);
  if (state.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    state.arrived.store(0, std::memory_order_relaxed);
    state.generation.fetch_add(1, std::memory_order_release);
    state.generation.notify_all();
  } else {
    wait_while(state.generation, generation, kLooksInPass);
  }
}

}  // namespace kbit
