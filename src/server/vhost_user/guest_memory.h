#pragma once
// The memory of a guest, as far as the front end shares it.

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "server/vhost_user/shared_memory.h"

namespace qcow::vhost_user {

/// A region of the guest's memory, as messages describe it.
struct RegionDescription {
    std::uint64_t guest_address = 0;
    std::uint64_t size = 0;          // bytes
    std::uint64_t user_address = 0;  // of the front end's own mapping, which addresses of rings refer to
    std::uint64_t file_offset = 0;
    bool operator==(const RegionDescription&) const = default;
};

/// The regions of a guest's memory, and the record of its changed pages for live migration.
///
/// Thread safety: functions that are const may be called from any number of threads, while no other is.
class GuestMemory {
public:
    /// Regions at a time.
    static constexpr std::size_t max_regions = 512;

    /// Maps a region. Errors: Errc::invalid_argument: it is empty, wraps around or overlaps another one, or the file is
    /// too short; Errc::no_memory.
    Result<void> add(const RegionDescription& region, int fd);

    /// Errors: Errc::not_found.
    Result<void> remove(const RegionDescription& region);

    void clear() { regions_.clear(); }

    /// Appends the pieces of memory that hold `length` bytes of the guest from `address` on. Returns whether all of
    /// them are the guest's; if not, some pieces may have been appended.
    template <class Byte>
    [[nodiscard]] bool append(std::uint64_t address, std::uint64_t length, std::vector<std::span<Byte>>& pieces) const {
        while (length > 0) {
            const auto memory = at(address, length);
            if (memory.empty()) return false;
            pieces.emplace_back(memory);
            address += memory.size();
            length -= memory.size();
        }
        return true;
    }

    /// Returns `length` bytes at an address of the front end's own. None: they do not lie within one region, or not at
    /// a multiple of `alignment`.
    [[nodiscard]] std::span<std::byte> at_user(std::uint64_t address, std::uint64_t length,
                                               std::size_t alignment) const;

    /// The number of accesses that found a page of a region gone.
    [[nodiscard]] std::uint64_t losses() const;

    /// The place of the record of changed pages: a bit for each 4 KiB of the guest's addresses.
    void set_log(SharedMemory log) { log_ = std::move(log); }

    /// Whether changed pages are recorded. At first they are not.
    void record_changes(bool on) { recording_ = on; }

    /// Records that bytes of the guest's memory have changed. Thread-safe.
    void note_changed(std::span<const std::byte> memory) const;
    void note_changed(std::uint64_t guest_address, std::uint64_t length) const;

private:
    struct Region {
        RegionDescription description;
        SharedMemory memory;
    };

    /// As many of the bytes as lie in one region.
    [[nodiscard]] std::span<std::byte> at(std::uint64_t address, std::uint64_t length) const;

    std::vector<Region> regions_;
    SharedMemory log_;
    bool recording_ = false;
};

}  // namespace qcow::vhost_user
