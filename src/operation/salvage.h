#pragma once
// Reading past what cannot be read.

#include <map>
#include <mutex>
#include <span>

#include "qcow/copy.h"

namespace qcow {

/// Gives zeros for what `source` cannot read, and takes note of it. Thread-safe.
class Salvager {
public:
    explicit Salvager(Disk& source) : source_(source) {}

    /// As Disk::read. An error is one that is_loss() does not cover.
    Result<void> read(GuestOffset at, std::span<std::byte> to);

    /// Takes note of bytes that were given up. Each byte once.
    void lose(const GuestRange& bytes, const Error& why);

    /// What was noted so far.
    [[nodiscard]] Losses losses() const;

private:
    Result<std::uint64_t> give_up(const GuestRange& lost, std::span<std::byte> to, Error why);

    struct Lost {
        std::uint64_t length = 0;
        Error why;
    };

    Disk& source_;
    mutable std::mutex mutex_;
    std::map<std::uint64_t, Lost> ranges_;  // by their first byte
    std::uint64_t bytes_ = 0;
    std::uint64_t unlisted_bytes_ = 0;
};

}  // namespace qcow
