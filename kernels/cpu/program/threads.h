// A team of threads that runs one function on every core and shares out its loops.
//
// All members run the same code (as in SPMD programs). A loop is cut into pieces; members take pieces until there are none
// and then wait, not for each other, but until all pieces are done. So a member that does not run, because another process
// has its core, holds up the others by at most the one piece it has in hand; when it runs again it finds nothing left to do
// in the loops it missed and catches up. (A barrier in place of that waits for every member, at every loop: a hundred and
// fifty times for a token.) Waiting is spin-then-park: inside a pass the end of a loop is microseconds away, and a parked
// thread frees its core for a member that waits to run.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

namespace kbit {

class Team;

// One member's view of the team, while it runs.
class Worker {
 public:
  Worker(Team& team, int index) : team_(team), index_(index) {}

  int index() const { return index_; }  // 0 is the thread that called Team::run
  int size() const;

  // Whether the next loop, of `count` indices, has nothing left to give: what it needs need not be made ready.
  bool nothing_left(std::int64_t count) const;

  // Calls body(begin, end) on pieces of at most `grain` of the indices [0, count), each by one member, and returns when
  // all are done; what they wrote is visible then. Every member must call it with the same numbers, in the same order,
  // and may write to shared memory only in a body: outside, a member that is behind would write into another's present.
  template <typename Body>
  void for_each(std::int64_t count, std::int64_t grain, Body&& body);

 private:
  Team& team_;
  int index_;
  std::size_t loop_ = 0;  // loops so far in this run
};

class Team {
 public:
  // size >= 1 members: the caller of run() and size - 1 threads that wait.
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Runs function(worker) on every member and returns when all have finished. Calls from several threads take turns.
  // `function` must not throw.
  template <typename Function>
  void run(Function&& function) {
    auto call = [](void* context, Worker& worker) { (*static_cast<std::remove_reference_t<Function>*>(context))(worker); };
    run(call, const_cast<void*>(static_cast<const void*>(&function)));
  }

 private:
  friend class Worker;
  using Call = void (*)(void*, Worker&);

  // One loop of a run: the next index to give out, and how many are done.
  struct alignas(64) Loop {
    std::atomic<std::int64_t> next{0};
    std::atomic<std::uint32_t> done{0};
  };
  // Loops of one run that need no reset in between (a hundred layers have seven each).
  static constexpr std::size_t kLoops = 1024;
  struct State;  // shared with the threads, which may outlive a forked parent's Team

  void run(Call call, void* context);
  void start_threads();
  void meet();  // a barrier
  Loop& loop(std::size_t& index, int member);
  static void wait_for(std::atomic<std::uint32_t>& value, std::uint32_t wanted);

  int size_;
  std::shared_ptr<State> state_;
  std::vector<Loop> loops_;
  std::size_t used_ = kLoops;  // loops of the last run: to be reset before the next
  std::mutex turn_;
};

inline int Worker::size() const { return team_.size(); }

inline bool Worker::nothing_left(std::int64_t count) const {
  return team_.size() > 1 && loop_ < Team::kLoops && team_.loops_[loop_].next.load(std::memory_order_relaxed) >= count;
}

template <typename Body>
void Worker::for_each(std::int64_t count, std::int64_t grain, Body&& body) {
  if (team_.size() == 1) {
    for (std::int64_t begin = 0; begin < count; begin += grain) body(begin, begin + grain < count ? begin + grain : count);
    return;
  }
  if (count <= 0) return;
  Team::Loop& loop = team_.loop(loop_, index_);
  const auto all = static_cast<std::uint32_t>(count);
  while (loop.next.load(std::memory_order_relaxed) < count) {
    const std::int64_t begin = loop.next.fetch_add(grain, std::memory_order_relaxed);
    if (begin >= count) break;
    const std::int64_t end = begin + grain < count ? begin + grain : count;
    body(begin, end);
    const auto part = static_cast<std::uint32_t>(end - begin);
    if (loop.done.fetch_add(part, std::memory_order_acq_rel) + part == all) loop.done.notify_all();
  }
  Team::wait_for(loop.done, all);
}

}  // namespace kbit
