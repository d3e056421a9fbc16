#include "disk/encrypted.h"

#include <algorithm>
#include <mutex>

#include "base/bits.h"
#include "base/buffers.h"
#include "base/page_memory.h"
#include "base/try.h"

namespace qcow {
namespace {

/// Small enough to be in the processor's cache from one step to the next.
constexpr std::size_t piece_bytes = 256 * KiB;

std::span<std::byte> memory_of_thread() {
    thread_local const PageMemory memory(piece_bytes);
    return {memory.data(), piece_bytes};
}

/// Whether all pieces of memory are whole sectors.
template <class Pieces>
bool is_whole(std::uint64_t position, Pieces buffers, std::uint64_t sector) {
    if (!is_aligned(position | buffers.size(), sector)) return false;
    for (const auto piece : buffers)
        if (!is_aligned(piece.size(), sector)) return false;
    return true;
}

}  // namespace

Result<std::size_t> EncryptedBytes::read(const Storage& file, HostOffset at, std::uint64_t position, Buffers to) const {
    const std::uint64_t sector = cipher_->sector_bytes();
    std::size_t there = 0;
    while (!to.empty()) {
        const std::uint64_t skip = position % sector;
        const auto part = to.first(std::min<std::size_t>(to.size(), piece_bytes - skip));
        std::size_t found = 0;
        if (is_whole(position, part, sector)) {
            found = TRY(file.read(at, part));
            auto number = position / crypto::sector_unit;
            for (const auto piece : part) {
                cipher_->decrypt(number, piece);
                number += piece.size() / crypto::sector_unit;
            }
        } else {
            const auto memory = memory_of_thread().first(divide_up(skip + part.size(), sector) * sector);
            const std::size_t in_file = TRY(file.read({at.value - skip}, memory));
            found = std::min(part.size(), in_file - std::min<std::size_t>(in_file, skip));
            cipher_->decrypt((position - skip) / crypto::sector_unit, memory);
            scatter(memory.subspan(skip, part.size()), part);
        }
        there += found;
        at += part.size();
        position += part.size();
        to = to.subspan(part.size());
    }
    return there;
}

Result<void> EncryptedBytes::write(Storage& file, HostOffset at, std::uint64_t position, ConstBuffers from) {
    const std::uint64_t sector = cipher_->sector_bytes();
    std::shared_lock whole(partial_, std::defer_lock);
    std::unique_lock partial(partial_, std::defer_lock);
    if (is_aligned(position | from.size(), sector)) {
        whole.lock();
    } else {
        partial.lock();
    }
    while (!from.empty()) {
        const auto part = from.first(std::min<std::size_t>(from.size(), piece_bytes - position % sector));
        TRY_VOID(write_piece(file, at, position, part, memory_of_thread()));
        at += part.size();
        position += part.size();
        from = from.subspan(part.size());
    }
    return {};
}

Result<void> EncryptedBytes::copy(Storage& file, HostOffset from, HostOffset to, std::uint64_t length) {
    while (length > 0) {
        const auto memory = memory_of_thread().first(std::min<std::uint64_t>(length, piece_bytes));
        TRY(file.read(from, memory));
        cipher_->decrypt(from.value / crypto::sector_unit, memory);
        cipher_->encrypt(to.value / crypto::sector_unit, memory);
        TRY_VOID(file.write(to, memory));
        from += memory.size();
        to += memory.size();
        length -= memory.size();
    }
    return {};
}

Result<void> EncryptedBytes::write_piece(Storage& file, HostOffset at, std::uint64_t position, ConstBuffers from,
                                         std::span<std::byte> memory) {
    const std::uint64_t sector = cipher_->sector_bytes();
    const std::uint64_t skip = position % sector;
    const std::uint64_t end = skip + from.size();
    const HostOffset start{at.value - skip};
    const auto number = (position - skip) / crypto::sector_unit;
    memory = memory.first(divide_up(end, sector) * sector);
    if (is_whole(position, from, sector)) {
        std::size_t done = 0;
        for (const auto piece : from) {
            cipher_->encrypt(number + done / crypto::sector_unit, piece, memory.subspan(done));
            done += piece.size();
        }
        return file.write(start, memory);
    }
    const auto read_sector = [&](std::uint64_t offset) -> Result<void> {
        const auto bytes = memory.subspan(offset, sector);
        TRY(file.read(start + offset, bytes));
        cipher_->decrypt(number + offset / crypto::sector_unit, bytes);
        return {};
    };
    const std::uint64_t last = memory.size() - sector;
    if (skip != 0) TRY_VOID(read_sector(0));
    if (end % sector != 0 && (skip == 0 || last != 0)) TRY_VOID(read_sector(last));
    gather(from, memory.subspan(skip));
    cipher_->encrypt(number, memory);
    return file.write(start, memory);
}

}  // namespace qcow
