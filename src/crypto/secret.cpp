#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "qcow/key.h"

namespace qcow {
namespace {

/// Whole pages: locks and exclusions from core dumps are of pages.
std::size_t mapped_bytes(std::size_t size) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return (size + page - 1) / page * page;
}

}  // namespace

void wipe(std::span<std::byte> bytes) noexcept {
    if (!bytes.empty()) explicit_bzero(bytes.data(), bytes.size());
}

Secret::Secret(std::size_t size) : size_(size) {
    if (size == 0) return;
    const auto bytes = mapped_bytes(size);
    if (bytes < size) throw std::bad_alloc();
    auto* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // Where the system refuses one of these, the secret is as safe as the rest of the process.
    static_cast<void>(mlock(memory, bytes));
    static_cast<void>(madvise(memory, bytes, MADV_DONTDUMP));
    // They are not wiped in a child (MADV_WIPEONFORK): it would write to an image with a key of zeros.
    data_ = static_cast<std::byte*>(memory);
}

Secret::Secret(std::span<const std::byte> bytes) : Secret(bytes.size()) { std::ranges::copy(bytes, data_); }

Secret::Secret(Secret&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Secret& Secret::operator=(Secret&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

Secret::~Secret() {
    if (data_ == nullptr) return;
    wipe(bytes());
    munmap(data_, mapped_bytes(size_));
}

}  // namespace qcow
