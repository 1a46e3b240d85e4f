#include "codecs/mapped_file.h"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>

#ifdef _WIN32
#include <cstdio>
#include <cstdlib>
#else
#include <csignal>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace kbit {

#ifdef _WIN32

// Windows refuses to shrink a mapped file, but so would it refuse to replace or remove one: it is read instead.
struct MappedFile::Identity {};

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  std::FILE* file = std::fopen(path_.c_str(), "rb");
  if (file == nullptr) throw std::runtime_error(std::strerror(errno));
  _fseeki64(file, 0, SEEK_END);
  size_ = static_cast<std::size_t>(_ftelli64(file));
  _fseeki64(file, 0, SEEK_SET);
  data_ = static_cast<std::uint8_t*>(_aligned_malloc(size_ + 64, 4096));
  const bool complete = data_ != nullptr && size_ > 0 && std::fread(data_, 1, size_, file) == size_;
  std::fclose(file);
  if (!complete) {
    _aligned_free(data_);
    throw std::runtime_error("it could not be read");
  }
}
MappedFile::~MappedFile() { _aligned_free(data_); }
void MappedFile::check() const {}
void MappedFile::prefetch(std::size_t, std::size_t) const {}

#else

namespace {

// What the handler of SIGBUS knows. It may run at any moment in any thread, so it reads atomics and takes no lock.
struct Range {
  std::atomic<std::uintptr_t> begin{0}, end{0};
  std::atomic<bool> damaged{false};
};
constexpr int kRanges = 256;  // more mapped files than a process has models
Range ranges[kRanges];
std::mutex ranges_mutex;
struct sigaction previous_action;
std::uintptr_t page_bytes = 4096;

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  for (Range& range : ranges) {
    if (address < range.begin.load() || address >= range.end.load()) continue;
    range.damaged.store(true);
    void* page = reinterpret_cast<void*>(address / page_bytes * page_bytes);
    if (mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) return;
  }
  // Not ours: to whoever was there before, or to the default, which ends the process when the access is tried again.
  if ((previous_action.sa_flags & SA_SIGINFO) && previous_action.sa_sigaction != nullptr) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
  } else {
    sigaction(SIGBUS, &previous_action, nullptr);
  }
}

int take_slot(const std::uint8_t* data, std::size_t size) {
  const std::lock_guard<std::mutex> lock(ranges_mutex);
  static const bool installed = [] {
    page_bytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &previous_action) == 0;
  }();
  if (!installed) throw std::runtime_error("no handler for bus errors could be installed");
  for (int slot = 0; slot < kRanges; ++slot) {
    Range& range = ranges[slot];
    if (range.begin.load() != 0) continue;
    range.damaged.store(false);
    range.end.store(reinterpret_cast<std::uintptr_t>(data) + (size + page_bytes - 1) / page_bytes * page_bytes);
    range.begin.store(reinterpret_cast<std::uintptr_t>(data));
    return slot;
  }
  throw std::runtime_error("too many files are mapped at once");
}

}  // namespace

struct MappedFile::Identity {
  struct stat status;
};

MappedFile::MappedFile(std::string path) : path_(std::move(path)), identity_(std::make_unique<Identity>()) {
  descriptor_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw std::runtime_error(std::strerror(errno));
  const auto fail = [&](const std::string& reason) {
    close(descriptor_);
    throw std::runtime_error(reason);
  };
  if (fstat(descriptor_, &identity_->status) != 0) fail(std::strerror(errno));
  if (identity_->status.st_size <= 0) fail("it is empty");
  size_ = static_cast<std::size_t>(identity_->status.st_size);
  void* memory = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
  if (memory == MAP_FAILED) fail(std::strerror(errno));
  data_ = static_cast<std::uint8_t*>(memory);
#ifdef MADV_HUGEPAGE
  madvise(memory, size_, MADV_HUGEPAGE);  // what is still to be read from the disk comes in huge pages
#endif
  try {
    slot_ = take_slot(data_, size_);
  } catch (...) {
    munmap(memory, size_);
    close(descriptor_);
    throw;
  }
}

MappedFile::~MappedFile() {
  ranges[slot_].begin.store(0);
  munmap(data_, size_);
  close(descriptor_);
}

void MappedFile::check() const {
  struct stat now;
  const struct stat& then = identity_->status;
#ifdef __APPLE__
  const auto same_time = [](const struct stat& a, const struct stat& b) {
    return a.st_mtimespec.tv_sec == b.st_mtimespec.tv_sec && a.st_mtimespec.tv_nsec == b.st_mtimespec.tv_nsec;
  };
#else
  const auto same_time = [](const struct stat& a, const struct stat& b) {
    return a.st_mtim.tv_sec == b.st_mtim.tv_sec && a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
  };
#endif
  if (ranges[slot_].damaged.load() || fstat(descriptor_, &now) != 0 || now.st_size != then.st_size ||
      !same_time(now, then)) {
    throw FileChanged(path_ + ": changed while it was in use, so what was computed with it means nothing; run the command "
                              "again");
  }
}

void MappedFile::prefetch(std::size_t begin, std::size_t end) const {
  end = end < size_ ? end : size_;
  begin = begin / page_bytes * page_bytes;
  if (begin < end) madvise(data_ + begin, end - begin, MADV_WILLNEED);
}

#endif

}  // namespace kbit
