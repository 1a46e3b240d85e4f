// A file of prepared weights, mapped read-only: processes share its pages, and reading it costs nothing until a page is
// used.
//
// Nobody but kbit writes such a file, and kbit never changes one, so a change is a mistake or an attack. Two guards make
// it an error instead of a crash or of noise: check() compares size, time and identity with those of the opened file; and
// where the file has shrunk below a page that is read (SIGBUS), a page of zeros takes its place and check() fails.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace kbit {

// A mapped file is no longer what it was when it was opened.
class FileChanged : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class MappedFile {
 public:
  // Throws std::runtime_error with the system's reason: the file cannot be opened or mapped, or is empty.
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  const std::string& path() const { return path_; }

  // Throws FileChanged. Costs one system call, so it may follow every pass.
  void check() const;
  // Asks the system to read bytes [begin, end) ahead.
  void prefetch(std::size_t begin, std::size_t end) const;

 private:
  struct Identity;

  std::string path_;
  int descriptor_ = -1;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  std::unique_ptr<Identity> identity_;
  int slot_ = -1;  // in the table of the SIGBUS handler
};

}  // namespace kbit
