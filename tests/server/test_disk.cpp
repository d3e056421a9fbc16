#include "server/test_disk.h"

#include "base/buffers.h"

namespace qcow::test {

Result<void> TestDisk::do_read(GuestOffset at, Buffers to) {
    TRY_VOID(verify_range(*this, at, to.size()));
    TRY_VOID(enter(at, to.size()));
    ++reads;
    const std::shared_lock lock(mutex_);
    scatter(std::span(bytes_).subspan(at.value, to.size()), to);
    return {};
}

Result<Extent> TestDisk::do_extent(GuestOffset at, std::uint64_t limit) {
    TRY_VOID(verify_range(*this, at, 1));
    const std::shared_lock lock(mutex_);
    const auto first = at.value / block;
    auto last = first + 1;
    while (last < holes_.size() && holes_[last] == holes_[first]) ++last;
    Extent extent;
    extent.start = at;
    extent.length = std::min({limit, last * block - at.value, size() - at.value});
    extent.kind = holes_[first] ? Extent::Kind::unallocated : Extent::Kind::data;
    extent.depth = first % 2;
    return extent;
}

Result<void> TestDisk::do_write(GuestOffset at, ConstBuffers from) {
    TRY_VOID(verify_range(*this, at, from.size()));
    TRY_VOID(enter(at, from.size()));
    ++writes;
    const std::unique_lock lock(mutex_);
    gather(from, std::span(bytes_).subspan(at.value));
    for (auto i = at.value / block; i * block < at.value + from.size(); ++i) holes_[i] = false;
    return {};
}

Result<void> TestDisk::do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes zeroes) {
    TRY_VOID(verify_range(*this, at, length));
    ++(zeroes == Zeroes::keep ? kept : released);
    const std::unique_lock lock(mutex_);
    std::fill_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at.value), length, std::byte{0});
    return {};
}

Result<void> TestDisk::do_discard(GuestOffset at, std::uint64_t length) {
    TRY_VOID(verify_range(*this, at, length));
    ++discards;
    return {};
}

Result<void> TestDisk::do_flush() {
    ++flushes;
    if (flush_fails) return fail(Errc::no_space, "disk", "full");
    return {};
}

void TestDisk::fill(Random& random) {
    for (std::size_t at = 0; at < bytes_.size(); at += block) {
        const auto piece = random.bytes(std::min<std::size_t>(block, bytes_.size() - at));
        std::ranges::copy(as_bytes(piece), bytes_.begin() + static_cast<std::ptrdiff_t>(at));
    }
}

void TestDisk::punch(std::uint64_t at) {
    holes_[at / block] = true;
    std::ranges::fill(std::span(bytes_).subspan(at, std::min(block, size() - at)), std::byte{0});
}

void TestDisk::open() {
    {
        const std::lock_guard lock(gate_mutex_);
        closed_ = false;
    }
    gate_.notify_all();
}

Result<void> TestDisk::enter(GuestOffset at, std::uint64_t length) {
    const auto now = ++inside;
    for (auto most = most_inside.load(); now > most && !most_inside.compare_exchange_weak(most, now);) {
    }
    const auto covers = [&](std::uint64_t sector) { return at.value <= sector && sector < at.value + length; };
    if (delay_microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_microseconds));
    if (covers(slow_sector)) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    if (closed_) {
        std::unique_lock lock(gate_mutex_);
        gate_.wait(lock, [&] { return !closed_; });
    }
    --inside;
    if (covers(bad_sector)) return fail(Errc::io, "disk", "a bad sector");
    return {};
}

}  // namespace qcow::test
