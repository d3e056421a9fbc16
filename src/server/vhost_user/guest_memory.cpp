#include "server/vhost_user/guest_memory.h"

#include <algorithm>
#include <atomic>
#include <limits>

namespace qcow::vhost_user {
namespace {

constexpr std::uint64_t logged_page = 4096;

bool overlap(std::uint64_t a, std::uint64_t b, std::uint64_t a_size, std::uint64_t b_size) {
    return a < b ? b - a < a_size : a - b < b_size;
}

}  // namespace

Result<void> GuestMemory::add(const RegionDescription& region, int fd) {
    const auto invalid = [](const char* why) { return fail(Errc::invalid_argument, "region of memory", why); };
    constexpr auto most = std::numeric_limits<std::uint64_t>::max();
    if (regions_.size() >= max_regions) return invalid("there are too many");
    if (region.size == 0 || region.size > most - region.guest_address || region.size > most - region.user_address)
        return invalid("it is empty, or wraps around");
    for (const auto& [other, memory] : regions_) {
        if (overlap(region.guest_address, other.guest_address, region.size, other.size) ||
            overlap(region.user_address, other.user_address, region.size, other.size))
            return invalid("it overlaps another one");
    }
    auto memory = TRY(SharedMemory::map(fd, region.file_offset, region.size));
    regions_.push_back({region, std::move(memory)});
    return {};
}

Result<void> GuestMemory::remove(const RegionDescription& region) {
    // The offset says nothing: front ends leave it out here.
    const auto removed = std::erase_if(regions_, [&](const Region& other) {
        return other.description.guest_address == region.guest_address && other.description.size == region.size &&
               other.description.user_address == region.user_address;
    });
    if (removed == 0) return fail(Errc::not_found, "region of memory", "there is none like it");
    return {};
}

std::span<std::byte> GuestMemory::at(std::uint64_t address, std::uint64_t length) const {
    for (const auto& [region, memory] : regions_) {
        const auto from = address - region.guest_address;
        if (address < region.guest_address || from >= region.size) continue;
        return memory.bytes().subspan(from, std::min(length, region.size - from));
    }
    return {};
}

std::span<std::byte> GuestMemory::at_user(std::uint64_t address, std::uint64_t length, std::size_t alignment) const {
    for (const auto& [region, memory] : regions_) {
        const auto from = address - region.user_address;
        if (address < region.user_address || from >= region.size || length > region.size - from) continue;
        const auto bytes = memory.bytes().subspan(from, length);
        return reinterpret_cast<std::uintptr_t>(bytes.data()) % alignment == 0 ? bytes : std::span<std::byte>();
    }
    return {};
}

std::uint64_t GuestMemory::losses() const {
    std::uint64_t sum = 0;
    for (const auto& region : regions_) sum += region.memory.losses();
    return sum;
}

void GuestMemory::note_changed(std::span<const std::byte> changed) const {
    if (!recording_) return;
    const auto address = reinterpret_cast<std::uintptr_t>(changed.data());
    for (const auto& [region, memory] : regions_) {
        const auto from = address - reinterpret_cast<std::uintptr_t>(memory.bytes().data());
        if (from < region.size) return note_changed(region.guest_address + from, changed.size());
    }
}

void GuestMemory::note_changed(std::uint64_t guest_address, std::uint64_t length) const {
    const auto log = log_.bytes();
    if (!recording_ || length == 0) return;
    const auto last = (guest_address + length - 1) / logged_page;
    for (auto page = guest_address / logged_page; page <= last; ++page) {
        if (page / 8 >= log.size()) return;
        auto* const byte = reinterpret_cast<std::uint8_t*>(log.data()) + page / 8;
        std::atomic_ref(*byte).fetch_or(static_cast<std::uint8_t>(1U << (page % 8)));
    }
}

}  // namespace qcow::vhost_user
