#pragma once
// Encrypted bytes in and out of a file, for all formats that have them.

#include <cstdint>
#include <memory>
#include <shared_mutex>

#include "crypto/cipher.h"
#include "qcow/storage.h"

namespace qcow {

/// Decrypts what it reads from a file, and encrypts what it writes. Requests may begin and end anywhere: a sector that
/// is written in part is read first.
///
/// Thread safety: all functions may be called from any number of threads.
class EncryptedBytes {
public:
    explicit EncryptedBytes(std::shared_ptr<const crypto::SectorCipher> cipher) : cipher_(std::move(cipher)) {}

    /// Reads from `at` on. `position` gives the sectors their numbers: it is the byte at `at` of what is encrypted.
    /// Returns what Storage::read does. What lies past the end of the file is as if it were zeros there, which is not
    /// what it decrypts to.
    Result<std::size_t> read(const Storage& file, HostOffset at, std::uint64_t position, Buffers to) const;
    Result<void> write(Storage& file, HostOffset at, std::uint64_t position, ConstBuffers from);

    /// Copies whole sectors within a file where their position is their offset in it.
    Result<void> copy(Storage& file, HostOffset from, HostOffset to, std::uint64_t length);

private:
    Result<void> write_piece(Storage& file, HostOffset at, std::uint64_t position, ConstBuffers from,
                             std::span<std::byte> memory);

    std::shared_ptr<const crypto::SectorCipher> cipher_;
    /// Held alone by a write that reads a sector and writes all of it, so that no other write of it is lost.
    std::shared_mutex partial_;
};

}  // namespace qcow
