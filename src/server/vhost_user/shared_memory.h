#pragma once
// Memory that another process shares, and can take away at any moment.

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/try.h"

namespace qcow::vhost_user {

/// A file of another process, mapped for reading and writing.
///
/// Its owner can truncate the file. The kernel then answers an access with SIGBUS. While there is a SharedMemory, the
/// process has a handler that puts a page of zeros there instead, and counts it.
///
/// Thread safety: make() and the destructor may be called from any thread. The memory is for everybody.
class SharedMemory {
public:
    /// No memory.
    SharedMemory() = default;

    /// Maps `length` bytes of the file from `offset` on. Errors: Errc::invalid_argument: the file is shorter, or cannot
    /// be mapped; Errc::no_memory; Errc::unsupported: there are more than 1024 already.
    static Result<SharedMemory> map(int fd, std::uint64_t offset, std::uint64_t length);

    SharedMemory(SharedMemory&& other) noexcept;
    SharedMemory& operator=(SharedMemory&& other) noexcept;
    ~SharedMemory();

    [[nodiscard]] std::span<std::byte> bytes() const { return bytes_; }

    /// The number of accesses that found a page gone.
    [[nodiscard]] std::uint64_t losses() const;

private:
    std::byte* mapping_ = nullptr;
    std::size_t mapped_ = 0;
    std::span<std::byte> bytes_;
    std::size_t watched_ = 0;
};

}  // namespace qcow::vhost_user
